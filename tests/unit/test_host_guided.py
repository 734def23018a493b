import json
import subprocess
import sys
from typing import Any

import mlx.core as mx
import pytest
from transformers import AutoTokenizer

from mlx_launcher.demo import build_demo
from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.guided import Guides, guide_grammar, tool_call_grammar
from mlx_launcher.host.requests import Guide, Tool


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(build_demo(tmp_path_factory.mktemp("models") / "demo"))


@pytest.fixture(scope="module")
def guides(tokenizer: Any) -> Guides:
    return Guides(tokenizer)


def accepts(guides: Guides, tokenizer: Any, grammar: Any, text: str) -> bool:
    """Whether the grammar allows exactly this text, token by token, and may then end."""
    matcher = guides.matcher(grammar)
    logits = mx.zeros((1, len(tokenizer)))
    for token in [*tokenizer.encode(text, add_special_tokens=False)]:
        if matcher(input_ids=mx.zeros((1, 0)), logits=logits)[0, token].item() != 0:
            return False
        assert matcher.consume([token])
    return matcher.finished or matcher(input_ids=mx.zeros((1, 0)), logits=logits)[0, tokenizer.eos_token_id].item() == 0


PLACE = {
    "type": "object",
    "$defs": {"P": {"type": "string", "enum": ["north", "south"]}},
    "properties": {"where": {"$ref": "#/$defs/P"}},
    "required": ["where"],
    "additionalProperties": False,
}
COUNT = {
    "type": "object",
    "$defs": {"P": {"type": "integer", "minimum": 1}},
    "properties": {"count": {"$ref": "#/$defs/P"}},
    "required": ["count"],
    "additionalProperties": False,
}


def test_a_tool_call_is_of_one_tool_with_its_own_schema(guides: Guides, tokenizer: Any) -> None:
    grammar = tool_call_grammar([Tool("go", PLACE), Tool("wait", COUNT)])

    def allowed(name: str, arguments: Any) -> bool:
        return accepts(guides, tokenizer, grammar, json.dumps({"name": name, "arguments": arguments}))

    assert allowed("go", {"where": "north"})
    assert allowed("wait", {"count": 3})
    # Both schemas call their definition "P": each must mean its own.
    assert not allowed("go", {"where": 3})
    assert not allowed("wait", {"count": "north"})
    assert not allowed("run", {})
    assert not allowed("go", {})


@pytest.mark.parametrize(
    "keywords",
    [
        {"uniqueItems": True},
        {"propertyNames": {"type": "string"}},
        {"if": {}, "then": {}},
        {"not": {"type": "string"}},
        {"format": "of-its-own"},
    ],
)
def test_a_tool_is_called_also_where_its_schema_asks_for_more_than_can_be_followed(
    guides: Guides, tokenizer: Any, keywords: dict[str, Any]
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": keywords}, "required": ["a"]}
    grammar = tool_call_grammar([Tool("go", schema), Tool("wait", COUNT)])
    assert accepts(guides, tokenizer, grammar, '{"name": "go", "arguments": {"a": "x"}}')
    assert accepts(guides, tokenizer, grammar, '{"name": "wait", "arguments": {"count": 3}}')
    # The rest of it holds.
    assert not accepts(guides, tokenizer, grammar, '{"name": "go", "arguments": {"a": 1}}')


@pytest.mark.parametrize("wrong", [{"type": "objekt"}, {"$ref": "http://nowhere.invalid/x"}, {"pattern": "(?!x)a"}])
def test_a_schema_that_is_none_leaves_an_object(guides: Guides, tokenizer: Any, wrong: dict[str, Any]) -> None:
    grammar = tool_call_grammar([Tool("go", {"type": "object", "properties": {"a": {"type": "string", **wrong}}})])
    assert accepts(guides, tokenizer, grammar, '{"name": "go", "arguments": {"a": 1}}')
    assert not accepts(guides, tokenizer, grammar, '{"name": "go", "arguments": []}')


def test_a_tool_name_with_quotes_is_followed(guides: Guides, tokenizer: Any) -> None:
    grammar = tool_call_grammar([Tool('a"b\\c', {"type": "object"})])
    assert accepts(guides, tokenizer, grammar, json.dumps({"name": 'a"b\\c', "arguments": {}}))


@pytest.mark.parametrize(
    ("guide", "good", "bad"),
    [
        (Guide("json", {"type": "object"}), '{"a": [1, null]}', "[1]"),
        (Guide("choice", ["yes", 'say "no"']), 'say "no"', "maybe"),
        (Guide("regex", "[0-9]{3}"), "042", "42"),
        (Guide("grammar", 'start: "a"+'), "aaa", "b"),
    ],
)
def test_guides_allow_what_they_say(guides: Guides, tokenizer: Any, guide: Guide, good: str, bad: str) -> None:
    assert accepts(guides, tokenizer, guide_grammar(guide), good)
    assert not accepts(guides, tokenizer, guide_grammar(guide), bad)


@pytest.mark.parametrize(
    "guide", [Guide("regex", "("), Guide("grammar", "nonsense"), Guide("json", {"type": "nothing"})]
)
def test_a_grammar_that_cannot_be_followed_is_a_400(guides: Guides, guide: Guide) -> None:
    with pytest.raises(RequestError) as caught:
        guides.matcher(guide_grammar(guide))
    assert caught.value.status == 400


def test_logits_beyond_the_vocabulary_are_never_allowed(guides: Guides, tokenizer: Any) -> None:
    padded = mx.zeros((1, len(tokenizer) + 100))
    masked = guides.matcher(guide_grammar(Guide("regex", "a")))(input_ids=mx.zeros((1, 0)), logits=padded)
    assert (masked[0, len(tokenizer) :] == -mx.inf).all().item()


def test_tokens_that_do_not_fit_leave_the_matcher_as_it_was(guides: Guides, tokenizer: Any) -> None:
    matcher = guides.matcher(guide_grammar(Guide("regex", "abc")))
    assert not matcher.consume(tokenizer.encode("abx", add_special_tokens=False))
    assert matcher.consume(tokenizer.encode("abc", add_special_tokens=False))
    assert matcher.finished


def test_the_host_never_imports_outlines_or_torch() -> None:
    heavy = ("torch", "outlines", "mlx_vlm", "datasets")
    code = f"import mlx_launcher.host.textgen, sys; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "[]"
