"""What config.json and the headers tell."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.modeldirs import ONE_TENSOR, model_directory

from mlx_launcher.demo import FAMILIES, build_random
from mlx_launcher.errors import LaunchError
from mlx_launcher.models import architectures
from mlx_launcher.models.directory import BrokenModelError
from mlx_launcher.models.facts import Facts, context_length, facts, refuse_unserved, serves, vocabulary_size

QWEN3_CODER = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_size": 2048,
    "max_position_embeddings": 262144,
    "torch_dtype": "float16",
    "quantization": {"group_size": 64, "bits": 4},
}
DEEPSEEK = {
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
SMALL = {"num_hidden_layers": 12, "hidden_size": 64, "num_attention_heads": 4}


def of(tmp_path: Path, config: dict[str, Any], tensors: Any = ONE_TENSOR) -> Facts:
    return facts(model_directory(tmp_path / "model", config, tensors))


def test_qwen3_coder_keeps_96_kib_a_token(tmp_path: Path) -> None:
    model = of(tmp_path, QWEN3_CODER)
    assert model.kv_bytes_per_token == 96 * 1024
    assert (model.context, model.layers, model.cache) == (262144, 48, "plain")
    assert serves(model) == "mlx-textgen"
    refuse_unserved(model)


@pytest.mark.parametrize(
    ("config", "bytes_"),
    [
        # no key-value heads of their own, no size of a head
        ({"model_type": "llama", **SMALL}, 12 * 2 * 64 * 2),
        ({"model_type": "gpt2", "n_layer": 12, "n_head": 4, "n_embd": 64}, 12 * 2 * 64 * 2),
        # compressed keys and values where mlx-lm keeps them so, whole ones where it does not
        ({"model_type": "deepseek_v3", **DEEPSEEK}, 10 * (512 + 64) * 2),
        ({"model_type": "deepseek_v2", **DEEPSEEK}, 10 * 16 * (128 + 64 + 128) * 2),
        # only the layers that keep every token
        ({"model_type": "qwen3_next", **SMALL, "full_attention_interval": 4}, 3 * 2 * 64 * 2),
        ({"model_type": "gemma3_text", **SMALL, "head_dim": 16, "sliding_window_pattern": 6}, 2 * 2 * 64 * 2),
        (
            {
                "model_type": "gpt_oss",
                **SMALL,
                "head_dim": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 6,
            },
            6 * 2 * 64 * 2,
        ),
        # Step's heads of keys and values have another name
        ({"model_type": "step3p5", **SMALL, "head_dim": 16, "num_attention_groups": 2}, 12 * 2 * 2 * 16 * 2),
        # the layers of Granite's hybrids are called otherwise
        ({"model_type": "granitemoehybrid", **SMALL, "layer_types": ["mamba", "attention"] * 6}, 6 * 2 * 64 * 2),
        # what a configuration leaves to mlx-lm: every sixth layer, heads of 256
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **SMALL}}, 2 * 2 * 4 * 256 * 2),
        # layers with heads of another size, and layers that keep nothing of their own
        (
            {
                "model_type": "gemma4_text",
                **SMALL,
                "layer_types": ["sliding_attention", "full_attention"] * 6,
                "head_dim": 16,
                "global_head_dim": 32,
                "num_kv_shared_layers": 4,
            },
            4 * 2 * 4 * 32 * 2,
        ),
        # an index beside the compressed keys and values; two attentions in a layer
        ({"model_type": "deepseek_v32", **DEEPSEEK, "index_head_dim": 128}, 10 * (512 + 64 + 2 * 128) * 2),
        ({"model_type": "longcat_flash", **DEEPSEEK}, 10 * 2 * (512 + 64) * 2),
        # the part of a vision-language model that writes
        ({"model_type": "qwen3_vl", "text_config": SMALL, "vision_config": {"hidden_size": 9}}, 12 * 2 * 64 * 2),
        ({"model_type": "llama"}, None),
    ],
)
def test_keys_and_values_of_one_token(tmp_path: Path, config: dict[str, Any], bytes_: int | None) -> None:
    assert of(tmp_path, config).kv_bytes_per_token == bytes_


@pytest.mark.parametrize(
    ("config", "cache", "backend"),
    [
        ({"model_type": "llama"}, "plain", "mlx-textgen"),
        (
            {"model_type": "mistral", "sliding_window": 4096},
            "plain",
            "mlx-textgen",
        ),  # mlx-lm loads it as llama: no window
        ({"model_type": "llama", "layer_types": ["full_attention"] * 2}, "plain", "mlx-textgen"),
        ({"model_type": "llama", "layer_types": ["sliding_attention", "full_attention"]}, "sliding", "mlx-textgen"),
        ({"model_type": "exaone4", "sliding_window": None}, "plain", "mlx-textgen"),
        ({"model_type": "gpt_oss", "sliding_window": 128}, "sliding", "mlx-textgen"),
        ({"model_type": "gemma3", "text_config": {"sliding_window": 512}}, "sliding", "mlx-textgen"),
        ({"model_type": "llama4"}, "sliding", "mlx-textgen"),
        ({"model_type": "qwen3_next"}, "hybrid", "mlx-textgen"),
        ({"model_type": "qwen3_5_moe", "text_config": {}}, "hybrid", "mlx-textgen"),  # by inheritance
        ({"model_type": "lfm2-vl"}, "hybrid", "mlx-textgen"),  # by asking its language model
        ({"model_type": "falcon_mamba"}, "hybrid", "mlx-textgen"),  # by another name
        ({"model_type": "deepseek_v32"}, "hybrid", "mlx-textgen"),
        ({"model_type": "kimi_k2"}, "plain", "mlx-textgen"),
        ({"model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"]}, "hybrid", "mlx-textgen"),
        ({"model_type": "deepseek_v41"}, "hybrid", "mlx-legacy"),  # a state of its own, which mlx-lm cannot read again
        ({"model_type": "bert"}, "unknown", None),
        ({"model_type": "cache"}, "unknown", None),  # a module of mlx_lm.models that is no model
        ({"model_type": "../models/llama"}, "unknown", None),
        ({"model_type": ""}, "unknown", None),
    ],
)
def test_what_keeps_the_state_and_who_serves_it(
    tmp_path: Path, config: dict[str, Any], cache: str, backend: str | None
) -> None:
    model = of(tmp_path, config)
    assert (model.cache, serves(model)) == (cache, backend)


def test_the_states_are_those_that_mlx_lm_builds(tmp_path: Path) -> None:
    """Each family that can be built here, loaded by the real mlx-lm."""
    paths = [str(build_random(tmp_path / family, family)) for family in FAMILIES]
    script = (
        "import sys, json, pathlib\n"
        "from mlx_lm.utils import load_model\n"
        "from mlx_lm.models.cache import make_prompt_cache\n"
        "for path in sys.argv[1:]:\n"
        "    model, _ = load_model(pathlib.Path(path), lazy=True)\n"
        "    print(json.dumps(sorted({type(state).__name__ for state in make_prompt_cache(model)} - {'KVCache'})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, timeout=100, check=False
    )
    built = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert built == [facts(Path(path)).states for path in paths], done.stderr


def test_the_source_of_every_architecture_is_understood() -> None:
    root = architectures._package()
    assert root is not None
    names = [file.stem for file in (root / "models").glob("*.py")]
    found = {name: known for name in names if (known := architectures.architecture({"model_type": name}))}
    assert len(found) > 100
    assert {name for name, known in found.items() if not known.states} == set()


def test_it_does_not_import_mlx(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "model", QWEN3_CODER)
    script = (
        "import sys, pathlib; from mlx_launcher.models.facts import facts; facts(pathlib.Path(sys.argv[1]));"
        "assert not {'mlx', 'mlx_lm', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], timeout=30, check=True)


def test_without_mlx_lm_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_package", lambda: None)
    model = of(tmp_path, {"model_type": "whatever"})
    assert serves(model) == "mlx-textgen"
    refuse_unserved(model)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    model = of(tmp_path, {"model_type": "bert"})
    with pytest.raises(LaunchError, match="architecture bert") as caught:
        refuse_unserved(model)
    assert caught.value.code == "architecture_unsupported"


def test_a_state_that_mlx_lm_cannot_read_again_is_refused_with_what_serves_it(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"deepseek_v41.* keeps its state in LayerCache") as caught:
        refuse_unserved(of(tmp_path, {"model_type": "deepseek_v41"}))
    assert "mlx-legacy" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "None"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "4 bit"),
        (
            {"quantization": {"group_size": 64, "bits": 4, "mode": "affine", "a.b": {"bits": 4, "group_size": 64}}},
            "4 bit",
        ),
        ({"quantization": {"group_size": 64, "bits": 4, "a.b": {"bits": 8, "group_size": 64}}}, "4 bit, mixed"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, "awq"),
        ({"quantization": "4bit"}, "None"),
    ],
)
def test_quantization(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    assert str(of(tmp_path, {"model_type": "llama", **config}).quantization) == text


PACKED = {
    "model.a.weight": ("U32", (128, 8)),
    "model.a.scales": ("BF16", (128, 1)),
    "model.a.biases": ("BF16", (128, 1)),
    "model.norm.weight": ("BF16", (64,)),
}


def test_parameters_are_counted_unpacked(tmp_path: Path) -> None:
    model = of(tmp_path, {"model_type": "llama", "quantization": {"group_size": 64, "bits": 4}}, PACKED)
    assert model.parameters == 128 * 64 + 64
    assert model.dtype == "bfloat16"
    assert model.weight_bytes == 128 * 8 * 4 + 2 * 128 * 2 + 64 * 2


def test_a_layer_with_a_group_size_of_its_own(tmp_path: Path) -> None:
    packing = {"group_size": 64, "bits": 4, "model.a": {"group_size": 32, "bits": 8}}
    assert of(tmp_path, {"model_type": "llama", "quantization": packing}, PACKED).parameters == 128 * 32 + 64


def test_packed_without_saying_how(tmp_path: Path) -> None:
    assert of(tmp_path, {"model_type": "llama"}, PACKED).parameters is None


def test_a_broken_model_is_named_not_judged(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "model", {"model_type": "llama"})
    (path / "tokenizer.json").unlink()
    with pytest.raises(BrokenModelError, match="tokenizer"):
        facts(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        *("quantization", "quantization_config", "layer_types", "text_config", "num_hidden_layers", "hidden_size"),
        *("head_dim", "architectures", "num_attention_heads", "num_key_value_heads", "sliding_window", "torch_dtype"),
        *("kv_lora_rank", "qk_rope_head_dim", "full_attention_interval", "max_position_embeddings"),
    ]
)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(KEYS, JSON, max_size=8), st.sampled_from(["llama", "gemma3", "qwen3_next", "deepseek_v3", "x y"])
)
def test_any_configuration_gives_facts(config: dict[str, Any], model_type: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = facts(model_directory(Path(directory) / "m", {**config, "model_type": model_type}, PACKED))
    assert str(model.quantization)
    assert model.kv_bytes_per_token is None or model.kv_bytes_per_token >= 0


def test_what_bounds_a_request_is_found_where_a_model_of_several_parts_keeps_it() -> None:
    whole = {"max_position_embeddings": 32, "vocab_size": 10}
    for config in (whole, {"model_type": "x", "vision_config": {}, "text_config": whole}):
        assert (context_length(config), vocabulary_size(config)) == (32, 10)
    assert (context_length({}), vocabulary_size({})) == (None, None)
