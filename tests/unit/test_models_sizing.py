"""The arithmetic of `cluster size`, on models whose numbers can be added up by hand."""

import math
from typing import Any

import pytest

from mlx_launcher.errors import LaunchError
from mlx_launcher.models import sizing, splitting
from mlx_launcher.models.architectures import Architecture, architecture
from mlx_launcher.models.facts import Tensors
from mlx_launcher.models.outline import outline

HIDDEN, KV_HEADS, HEAD, MLP, VOCAB = 64, 2, 16, 128, 1000
CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "torch_dtype": "float16",
    "max_position_embeddings": 4096,
}
LAYER = {
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.bias": (HIDDEN,),
    "self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.o_proj.bias": (HIDDEN,),
    "mlp.down_proj.weight": (HIDDEN, MLP),
    "input_layernorm.weight": (HIDDEN,),
}
WHOLE_OF_LAYER = 2 * sum(map(math.prod, LAYER.values()))
KEPT_BY_ALL = 2 * (HIDDEN + HIDDEN)  # the norm and the bias of what is added up
EMBEDDINGS = 2 * VOCAB * HIDDEN
TOKEN = 2 * KV_HEADS * HEAD * 2  # bytes that a layer keeps of one


def tensors(layers: int = 5, layer: dict[str, tuple[int, ...]] = LAYER, head: bool = True, prefix: str = "") -> Tensors:
    found: Tensors = {f"{prefix}model.embed_tokens.weight": ("F16", (VOCAB, HIDDEN))}
    if head:
        found[f"{prefix}lm_head.weight"] = ("F16", (VOCAB, HIDDEN))
    for index in range(layers):
        found.update({f"{prefix}model.layers.{index}.{name}": ("F16", dims) for name, dims in layer.items()})
    return found


def shape(config: dict[str, Any] = CONFIG, given: Tensors | None = None) -> sizing.Shape:
    return sizing.shape(config, tensors() if given is None else given, architecture(config))


def test_the_whole_model_on_one_host() -> None:
    sized = sizing.size(shape(), "single", 1, 100, 3)
    (host,) = sized.hosts
    assert host.weight_bytes == 2 * EMBEDDINGS + 5 * WHOLE_OF_LAYER
    assert host.cache_bytes == 3 * 100 * 5 * TOKEN
    # One row of the embeddings, and what one conversation keeps.
    assert sized.read_bytes == EMBEDDINGS + 5 * WHOLE_OF_LAYER + 100 * 5 * TOKEN
    assert (sized.sent_bytes, sized.steps) == (0, 0)


def test_a_head_that_is_the_embeddings_is_read() -> None:
    sized = sizing.size(shape(given=tensors(head=False)), "single", 1, 1, 1)
    assert sized.hosts[0].weight_bytes == EMBEDDINGS + 5 * WHOLE_OF_LAYER
    assert sized.read_bytes == EMBEDDINGS + 5 * (WHOLE_OF_LAYER + TOKEN)


def test_tensor_parallel_hosts_keep_a_part_of_each_layer_and_the_embeddings_in_whole() -> None:
    sized = sizing.size(shape(), "tensor", 2, 100, 1)
    assert sized.hosts[0] == sized.hosts[1]
    layer = KEPT_BY_ALL + (WHOLE_OF_LAYER - KEPT_BY_ALL) // 2
    assert sized.hosts[0].weight_bytes == 2 * EMBEDDINGS + 5 * layer
    assert sized.hosts[0].cache_bytes == 100 * 5 * TOKEN // 2
    assert sized.read_bytes == EMBEDDINGS + 5 * layer + 100 * 5 * TOKEN / 2
    # Ten sums of one vector; in a ring of two each host sends it once, in two halves.
    assert (sized.sent_bytes, sized.steps) == (10 * HIDDEN * 2, 20)


def test_pipelined_hosts_keep_some_layers_and_rank_0_the_last_of_them() -> None:
    first, second = sizing.size(shape(), "pipeline", 2, 100, 2).hosts
    assert (first.layers, second.layers) == (range(2, 5), range(2))
    assert first.weight_bytes == 2 * EMBEDDINGS + 3 * WHOLE_OF_LAYER
    assert second.cache_bytes == 2 * 100 * 2 * TOKEN
    sized = sizing.size(shape(), "pipeline", 2, 100, 2)
    # As much as one host alone would read: they take turns.
    assert sized.read_bytes == sizing.size(shape(), "single", 1, 100, 2).read_bytes
    assert (sized.sent_bytes, sized.steps) == (2 * HIDDEN * 2, 2)


def test_of_the_experts_those_that_are_chosen_are_read() -> None:
    stack = {"mlp.switch_mlp.up_proj.weight": (8, MLP, HIDDEN), "mlp.shared_expert.up_proj.weight": (MLP, HIDDEN)}
    config = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
    model = shape(config, tensors(layer={**LAYER, **stack}))
    expert = 2 * MLP * HIDDEN
    assert model.layers[0].weights.bytes == WHOLE_OF_LAYER + 9 * expert
    assert model.layers[0].weights.read == WHOLE_OF_LAYER + 3 * expert
    for name in ("num_experts_per_token", "moe_k"):  # Kimi Linear's and ERNIE's
        config = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 8, name: 2}
        assert shape(config, tensors(layer={**LAYER, **stack})).layers[0] == model.layers[0]
    # One by one, as they are before mlx-lm has stacked them.
    single = {f"mlp.experts.{number}.up_proj.weight": (MLP, HIDDEN) for number in range(8)}
    model = shape(config, tensors(layer={**LAYER, **single}))
    assert model.layers[0].weights.read == WHOLE_OF_LAYER + 2 * expert


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]},
        {"model_type": "gemma3_text", "sliding_window_pattern": 2},
    ],
)
def test_a_window_is_kept_and_no_more(config: dict[str, Any]) -> None:
    model = shape({**CONFIG, **config, "sliding_window": 30})
    assert [layer.cache_bytes(100) // TOKEN for layer in model.layers] == [30, 100, 30, 100, 30]
    assert [layer.cache_bytes(20) // TOKEN for layer in model.layers] == [20] * 5


def test_a_linear_layer_keeps_a_state_of_one_size() -> None:
    linear = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
    }
    config = {**CONFIG, "model_type": "qwen3_next", "full_attention_interval": 5}
    model = shape({**config, **linear})
    state = 3 * (2 * 2 * 32 + 4 * 16) * 2 + 4 * 16 * 32 * 4
    assert [layer.cache_bytes(100) for layer in model.layers] == [state] * 4 + [100 * TOKEN]
    assert not model.uncounted
    assert shape(config).uncounted


def test_layers_that_share_the_keys_and_values_of_others_keep_none() -> None:
    model = shape({**CONFIG, "num_kv_shared_layers": 2})
    assert [layer.cache_bytes(10) for layer in model.layers] == [10 * TOKEN] * 3 + [0] * 2


def test_compressed_keys_and_values_are_kept_by_every_host() -> None:
    latent = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    model = shape({**CONFIG, "model_type": "deepseek_v3", **latent})
    assert sizing.size(model, "tensor", 4, 100, 1).hosts[0].cache_bytes == 100 * 5 * (32 + 8) * 2


def test_what_mlx_lm_drops_is_not_counted() -> None:
    given = tensors(prefix="language_model.")
    more: Tensors = {
        "vision_tower.layers.0.q_proj.weight": ("F16", (64, 64)),
        "language_model.model.layers.5.mlp.down_proj.weight": ("F16", (64, 64)),  # guesses further tokens
        "mtp.fc.weight": ("F32", (64, 64)),
    }
    assert shape(given={**given, **more}).weight_bytes == shape().weight_bytes


@pytest.mark.parametrize(
    ("config", "hosts", "works", "why"),
    [
        ({}, 1, ["single"], ""),
        ({}, 2, ["tensor", "pipeline"], ""),
        ({}, 4, ["pipeline"], "its 2 key-value heads cannot be divided by 4"),
        ({}, 6, [], "it has 5 layers"),
        ({"model_type": "llama"}, 2, ["tensor"], "no pipeline"),
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, 2, ["pipeline"], "its 1 attention head cannot"),
        # Keys and values that are compressed are no heads, whatever the configuration calls them.
        ({"model_type": "deepseek_v2", "num_key_value_heads": 1}, 4, ["tensor", "pipeline"], ""),
        ({"model_type": "deepseek_v3", "num_key_value_heads": 1}, 4, ["tensor", "pipeline"], ""),
        ({"model_type": "qwen3_5", "linear_num_value_heads": 3}, 2, ["pipeline"], "its 3 linear value heads"),
        ({"model_type": "gemma3_text"}, 2, [], "no tensor parallelism"),
        ({"model_type": "qwen3_next"}, 2, ["pipeline"], "no tensor parallelism"),
        # What offers its text model's layers as its own.
        ({"model_type": "qwen3_5"}, 2, ["tensor", "pipeline"], ""),
        ({"model_type": "no_such_thing"}, 2, [], "does not know this architecture"),
    ],
)
def test_what_a_model_can_be_spread_by(config: dict[str, Any], hosts: int, works: list[str], why: str) -> None:
    given = {**CONFIG, **config}
    found, fails = splitting.strategies(given, hosts)
    assert found == works
    assert why in "; ".join(fails.values())


def test_what_bounds_the_tokens_a_second() -> None:
    sized = sizing.Sized("tensor", (), read_bytes=8e9, sent_bytes=1e6, steps=100)
    assert sizing.speed(sized, None, None, None) == (None, None, None, None)
    assert sizing.speed(sized, 400e9, None, None) == (0.02, None, None, None)
    found = sizing.speed(sized, 400e9, 1e9, None)
    assert found.link_s == pytest.approx(0.001)
    assert found.tokens_per_s == pytest.approx(1 / 0.021)
    assert found.bound_by == "memory"
    slow = sizing.speed(sized, 400e9, 1e9, 500e-6)
    assert slow.link_s == pytest.approx(0.051)
    assert slow.bound_by == "link"
    alone = sized._replace(strategy="single", sent_bytes=0, steps=0)
    assert sizing.speed(alone, 400e9, None, None).tokens_per_s == pytest.approx(50)


def test_what_the_configuration_does_not_tell() -> None:
    with pytest.raises(LaunchError, match="does not tell its layers"):
        shape({"model_type": "llama"})
    with pytest.raises(LaunchError, match="of type F4"):
        shape(given={"model.layers.0.mlp.up_proj.weight": ("F4", (2, 2))})


def test_weights_that_are_packed_in_another_programs_way() -> None:
    with pytest.raises(LaunchError, match=r"which weights are packed how \(mxfp4\)") as refused:
        outline({**CONFIG, "quantization_config": {"quant_method": "mxfp4"}})
    assert "Download" in refused.value.hint


def test_mlx_lm_tells_what_it_can_split() -> None:
    """Read from its sources; the two-rank test of tests/e2e asks mlx-lm itself."""

    def can(name: str) -> tuple[bool, bool]:
        found = architecture({"model_type": name})
        assert isinstance(found, Architecture)
        return found.tensor, found.pipeline

    assert can("llama") == (True, False)
    assert can("qwen3_moe") == (True, True)
    assert can("gemma3_text") == (False, False)
    assert can("kimi_k25") == (True, True)  # the layers are those of a sibling
    assert can("kimi_vl") == (False, False)  # the same ones, where `sharded_load` does not find them
    assert can("solar_open") == (True, True)  # inherits both
