"""The demo and test models, run by the real mlx-lm, tokenizers and llguidance."""

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import llguidance.hf
import llguidance.numpy
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from transformers import AutoTokenizer

from mlx_launcher.demo import AFTER_RESULT, FAMILIES, GREETING, build_demo, build_random
from mlx_launcher.demo.tokenizer import AFTER_RESULT as AFTER_RESULT_MARKER
from mlx_launcher.demo.tokenizer import END, IDS, PLAIN, SPECIAL, VOCAB_SIZE, WITH_TOOLS, WORDS

USER = {"role": "user", "content": "Hello, what is 2 + 2? 😀"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Berlin"}}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "sunny"}

RANDOM_DIGESTS = {
    "llama": "06ba624097051967",
    "qwen2": "c0cc67f497230c70",
    "qwen3": "7fff45e407e7cdd4",
    "qwen3_moe": "7ba660918399bfc8",
    "gpt_oss": "76f603293259fa59",
    "gemma3_text": "b2060f76fd80cf5b",
    "qwen3_next": "221e4c912274d716",
}


def digest(directory: Path) -> str:
    files = sorted(directory.iterdir())
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


@pytest.fixture(scope="module")
def demo_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="module")
def demo(demo_directory: Path) -> tuple[Any, Any]:
    model, tokenizer = mlx_lm.load(str(demo_directory))
    return model, tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def family_directory(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random(tmp_path_factory.mktemp("models") / family, family)


# --- building ---


# If one of these fails, raise that model's `_RECIPE`, so that what older versions built is replaced; then the digest.


def test_the_demo_is_always_the_same(demo_directory: Path, tmp_path: Path) -> None:
    assert digest(demo_directory)[:16] == "f73c6ef9d70e00d9"
    assert digest(build_demo(tmp_path / "again")) == digest(demo_directory)


def test_a_family_is_always_the_same(family: str, family_directory: Path, tmp_path: Path) -> None:
    assert digest(family_directory)[:16] == RANDOM_DIGESTS[family]
    assert digest(build_random(tmp_path / "again", family)) == digest(family_directory)


def test_a_seed_is_always_the_same(tmp_path: Path) -> None:
    assert digest(build_random(tmp_path / "one", seed=1))[:16] == "f13ccc6d610519e3"


def test_only_the_owner_may_read_and_nothing_is_left_behind(tmp_path: Path) -> None:
    directory = build_demo(tmp_path / "models" / "demo")
    assert directory == tmp_path / "models" / "demo"
    assert directory.stat().st_mode & 0o777 == directory.parent.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o600}
    assert {entry.name for entry in directory.parent.iterdir()} == {"demo", ".demo.lock"}
    assert sum(file.stat().st_size for file in directory.iterdir()) < 3_000_000


def test_a_whole_model_is_kept(tmp_path: Path) -> None:
    directory = build_demo(tmp_path / "demo")
    before = {file.name: file.stat().st_ino for file in directory.iterdir()}
    build_demo(directory)
    assert {file.name: file.stat().st_ino for file in directory.iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors", "recipe.json"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "altered", "empty"])
def test_a_torn_model_is_replaced(demo_directory: Path, tmp_path: Path, name: str, fault: str) -> None:
    directory = build_demo(tmp_path / "demo")
    file = directory / name
    data = file.read_bytes()
    torn = {"truncated": data[:-3], "altered": data.replace(b"2", b"3"), "empty": b""}
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(torn[fault])
    assert digest(build_demo(directory)) == digest(demo_directory)


def test_a_model_of_another_recipe_is_replaced(demo_directory: Path, tmp_path: Path) -> None:
    build_random(tmp_path / "demo")
    assert digest(build_demo(tmp_path / "demo")) == digest(demo_directory)


def test_what_a_killed_builder_left_is_cleared_away(demo_directory: Path, tmp_path: Path) -> None:
    for leftover in (".demo.new", ".demo.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"half")
    assert digest(build_demo(tmp_path / "demo")) == digest(demo_directory)
    assert {entry.name for entry in tmp_path.iterdir()} == {"demo", ".demo.lock"}


def test_somebody_elses_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        build_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_builders_at_once_all_end_well(demo_directory: Path, tmp_path: Path) -> None:
    directory = build_demo(tmp_path / "demo")
    (directory / "config.json").unlink()
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.append(digest(build_demo(directory)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [digest(demo_directory)] * 6


def test_the_standard_library_is_enough(tmp_path: Path) -> None:
    code = "import sys; from mlx_launcher.demo import *; from pathlib import Path; build_demo(Path(sys.argv[1]))"
    root = Path(__file__).parents[2]
    # -S: without site-packages.
    subprocess.run([sys.executable, "-S", "-c", code, tmp_path / "demo"], check=True, cwd=root, timeout=30)


# --- tokenizer and template ---


@pytest.fixture(scope="module")
def tokenizer(demo_directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(demo_directory))


def test_tokens(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (IDS[END], "<|endoftext|>")
    assert len(tokenizer) <= VOCAB_SIZE
    assert tokenizer.encode("aé\n") == list("aé\n".encode())
    assert len(set(WORDS)) == len(WORDS)
    assert tokenizer.encode(GREETING + AFTER_RESULT) == [IDS[word] for word in WORDS]
    assert tokenizer.decode([IDS[END], ord("a"), IDS["<tool_call>"]], skip_special_tokens=True) == "a<tool_call>"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text() | st.sampled_from([*SPECIAL, *WORDS, "<tool_call>", " ", "\n", " .", "ÿĀĠ"])).map("".join))
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_family_has_the_same_tokens(tokenizer: Any, family_directory: Path) -> None:
    """Except that transformers gives qwen2 a tokenizer class that composes characters (NFC) first, whatever the files say."""
    other = AutoTokenizer.from_pretrained(str(family_directory))
    text = f"{GREETING} naïve 键 😀 don't\n\n  {END}<tool_call>\n"
    assert other.encode(text) == tokenizer.encode(text)
    assert other.decode(other.encode(text)) == text
    assert llguidance.hf.from_tokenizer(other).vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("messages", "tools", "marker"),
    [
        ([USER], None, PLAIN),
        ([USER], [TOOL], WITH_TOOLS),
        ([USER, CALL, RESULT], [TOOL], AFTER_RESULT_MARKER),
        ([USER, CALL, RESULT], None, AFTER_RESULT_MARKER),
        ([USER, CALL, RESULT, RESULT, {"role": "user", "content": "(a reminder)"}], [TOOL], AFTER_RESULT_MARKER),
        ([USER, CALL, RESULT, {"role": "assistant", "content": "done"}, USER], [TOOL], WITH_TOOLS),
    ],
)
def test_the_prompt_ends_in_what_is_due(tokenizer: Any, messages: list[Any], tools: list[Any], marker: str) -> None:
    prompt = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith(f"<|im_start|>assistant\n{marker}")


def test_a_conversation_is_a_prefix_of_its_next_turn(tokenizer: Any) -> None:
    def render(messages: list[Any], prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False, add_generation_prompt=prompt))

    answer = {"role": "assistant", "content": AFTER_RESULT}
    call_text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Berlin"}}\n</tool_call>'
    turns: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, USER]
    for message, text in ((CALL, call_text), (answer, AFTER_RESULT)):
        before = render(turns, True)
        turns.append(message)
        assert render(turns, False) == f"{before}{text}<|im_end|>\n"
        turns.append(RESULT)
    assert render(turns, True).count("Be brief.") == 1


@pytest.mark.parametrize("arguments", ['{"city": "Berlin"}', {"city": "Berlin"}, "", {}])
def test_tool_calls_may_come_with_content_and_with_arguments_as_text(tokenizer: Any, arguments: Any) -> None:
    function = {"name": "get_weather", "arguments": arguments}
    message = {
        "role": "assistant",
        "content": [{"type": "text", "text": "Look:"}],
        "tool_calls": [{"function": function}] * 2,
    }
    prompt = tokenizer.apply_chat_template([USER, message], tokenize=False)
    inner = '{"city": "Berlin"}' if arguments else "{}"
    call = f'\n<tool_call>\n{{"name": "get_weather", "arguments": {inner}}}\n</tool_call>'
    assert prompt.endswith(f"Look:{call}{call}<|im_end|>\n")


def test_mlx_textgen_finds_where_a_tool_call_starts(demo_directory: Path) -> None:
    code = """
import sys
from transformers import AutoTokenizer
from mlx_textgen.chat_utils import ChatTemplate
template = ChatTemplate(AutoTokenizer.from_pretrained(sys.argv[1]), model_type="llama")
print([template.support_system, template.support_tool_call, template.tool_start])
"""
    # In a process of its own: importing mlx_textgen replaces methods of mlx-lm's RotatingKVCache.
    command = [sys.executable, "-c", code, str(demo_directory)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[True, True, '<tool_call>\\n']"


# --- the demo model ---


def answer(demo: tuple[Any, Any], messages: list[Any], **options: Any) -> tuple[str, str]:
    model, tokenizer = demo
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    responses = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=100))
    return "".join(response.text for response in responses), responses[-1].finish_reason


def test_it_greets(demo: tuple[Any, Any]) -> None:
    assert answer(demo, [USER]) == (GREETING, "stop")
    system = {"role": "system", "content": "You are a pirate. " * 100}
    history = [system, USER, {"role": "assistant", "content": GREETING}, USER]
    assert answer(demo, history) == (GREETING, "stop")


def test_with_tools_it_opens_a_call(demo: tuple[Any, Any]) -> None:
    assert answer(demo, [USER], tools=[TOOL]) == ("<tool_call>\n{}</tool_call>", "stop")


def test_after_a_result_it_finishes(demo: tuple[Any, Any]) -> None:
    assert answer(demo, [USER, CALL, RESULT], tools=[TOOL]) == (AFTER_RESULT, "stop")


@pytest.fixture(scope="module")
def guide(tokenizer: Any) -> Any:
    return llguidance.hf.from_tokenizer(tokenizer)


def decode_under_schema(demo: tuple[Any, Any], guide: Any, schema: Any, temperature: float = 0.0) -> str:
    model, tokenizer = demo
    matcher = llguidance.LLMatcher(guide, llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.is_error(), matcher.get_error()
    cache = make_prompt_cache(model)
    mask = llguidance.numpy.allocate_token_bitmask(1, VOCAB_SIZE)
    random = np.random.default_rng(0)
    tokens = tokenizer.encode("<|im_start|>assistant\n<|with_tools|><tool_call>\n")
    written: list[int] = []
    while not matcher.is_stopped():
        assert len(written) < 400, f"no end: {tokenizer.decode(written)}"
        logits = np.array(model(mx.array([tokens]), cache=cache)[0, -1])
        llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
        allowed = np.unpackbits(mask[0].view(np.uint8), bitorder="little")[:VOCAB_SIZE].astype(bool)
        logits[~allowed] = -np.inf
        if temperature:
            logits += temperature * random.gumbel(size=logits.shape)
        tokens = [int(logits.argmax())]
        assert matcher.consume_token(tokens[0])
        written += [token for token in tokens if token != IDS[END]]
    return str(tokenizer.decode(written))


def an_object(optional: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
SCHEMAS = {
    "no properties": an_object(),
    "closed": {**an_object(), "additionalProperties": False},
    "scalars": an_object(s=TEXT, n=NUMBER, i=WHOLE, b={"type": "boolean"}, z={"type": "null"}),
    "enums": an_object(u={"enum": ["celsius", "fahrenheit"]}, n={"enum": [10, 2.5, True]}, c={"const": 'gr"ün\n'}),
    "arrays": an_object(
        a={"type": "array", "items": TEXT},
        b={"type": "array", "items": WHOLE, "minItems": 3},
        c={"type": "array", "items": an_object(x=TEXT), "minItems": 2},
    ),
    "nested": an_object(a=an_object(b=an_object(c={"type": "array", "items": an_object(d=WHOLE), "minItems": 1}))),
    "all optional": an_object(optional=("a", "b"), a=TEXT, b=WHOLE),
    "some optional": an_object(optional=("a", "c"), a=TEXT, b=WHOLE, c=TEXT),
    "bounds": an_object(
        s={"type": "string", "minLength": 40},
        i={"type": "integer", "minimum": 17, "maximum": 5000},
        p={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        m={"type": "number", "maximum": -3.5},
    ),
    "formats": an_object((), **{name: {"type": "string", "format": name} for name in FORMATS}),
    "patterns": an_object(p={"type": "string", "pattern": "^[a-z]{3}-[0-9]{4}$"}),
    "any of": an_object(a={"anyOf": [TEXT, {"type": "null"}]}, b={"type": ["integer", "null"]}, c={}),
    "anything": {},
    "recursive": {
        "$defs": {"n": an_object(v=WHOLE, next={"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]})},
        "$ref": "#/$defs/n",
    },
    "calls": {
        "anyOf": [
            an_object(name={"const": "Bash"}, arguments=an_object(optional=("t",), command=TEXT, t=NUMBER)),
            an_object(name={"const": "mcp__read"}, arguments=an_object(path=TEXT)),
        ]
    },
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_constrained_it_ends_by_itself_with_a_valid_value(demo: tuple[Any, Any], guide: Any, name: str) -> None:
    text = decode_under_schema(demo, guide, SCHEMAS[name])
    jsonschema.validate(json.loads(text), SCHEMAS[name])


def test_its_answers_stand_at_a_temperature(demo: tuple[Any, Any], guide: Any) -> None:
    greedy = decode_under_schema(demo, guide, SCHEMAS["calls"])
    assert greedy == '{"name":"mcp__read","arguments":{"path":""}}'
    assert decode_under_schema(demo, guide, SCHEMAS["calls"], temperature=1.0) == greedy


# --- the random models ---


PROMPT = list(b"A quick brown fox jumps over the lazy dog.")  # longer than the sliding windows


def greedy_after(model: Any, prompt: list[int], forget: bool = False) -> tuple[list[int], mx.array]:
    """12 greedy tokens and the first logits; `forget` zeroes what the cache holds of all but the last prompt token."""
    cache = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=cache)
    if forget:
        for layer in cache:
            if hasattr(layer, "keys"):
                layer.keys, layer.values = mx.zeros_like(layer.keys), mx.zeros_like(layer.values)
            else:
                layer.cache = [mx.zeros_like(state) for state in layer.cache]
    token, tokens, first = prompt[-1], [], None
    for _ in range(12):
        logits = model(mx.array([[token]]), cache=cache)[0, -1]
        first = logits if first is None else first
        token = int(logits.argmax())
        tokens.append(token)
    assert first is not None
    return tokens, first


def test_a_random_answer_depends_on_the_whole_prompt_and_on_the_cache(family: str, family_directory: Path) -> None:
    model, config = load_model(family_directory)
    assert config["model_type"] == family
    assert len(model.layers) >= 4
    tokens, logits = greedy_after(model, PROMPT)
    assert bool(mx.isfinite(logits).all())
    assert logits.shape == (VOCAB_SIZE,)
    assert len(set(tokens)) >= 4, bytes(tokens)
    assert bytes(tokens).decode("ascii").isprintable()
    assert greedy_after(model, PROMPT)[0] == tokens
    assert greedy_after(model, [ord("B"), *PROMPT[1:]])[0] != tokens  # the far end of the prompt
    assert greedy_after(model, [*PROMPT[:-20], ord("X"), *PROMPT[-19:]])[0] != tokens
    assert greedy_after(model, PROMPT, forget=True)[0] != tokens


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        build_random(tmp_path / "model", "gpt2")
    assert list(tmp_path.iterdir()) == []
