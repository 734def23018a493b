from hypothesis import given
from hypothesis import strategies as st

from mlx_launcher.host.stops import StopScanner


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None, str]:
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces:
        text, stop, rest = scanner.feed(piece)
        shown += text
        if stop is not None:
            return shown, stop, rest
    return shown + scanner.flush(), None, ""


def test_a_stop_split_over_pieces_is_found_and_none_of_it_is_shown() -> None:
    assert run(["<tool_call>\n"], ["Well, <to", "ol_", "call>", '\n{"']) == ("Well, ", "<tool_call>\n", '{"')


def test_what_only_looked_like_a_stop_is_shown() -> None:
    assert run(["<tool_call>"], ["a <tool", "box>"]) == ("a <toolbox>", None, "")


def test_the_earliest_stop_wins_and_of_two_at_one_place_the_longer() -> None:
    assert run(["b", "abc"], ["xxabcb"]) == ("xx", "abc", "b")
    assert run(["ab", "abc"], ["abcd"]) == ("", "abc", "d")


def test_no_stops_lets_everything_through_at_once() -> None:
    assert StopScanner(["", ""]).feed("text") == ("text", None, "")


@given(st.lists(st.text("ab<", max_size=4)), st.lists(st.text("ab<", min_size=1, max_size=3)))
def test_text_is_cut_where_it_would_be_cut_whole(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    shown, stop, _ = run(stops, pieces)
    if stop is None:
        assert shown == whole
        assert not any(candidate in whole for candidate in stops)
    else:
        assert whole.startswith(shown + stop)
        assert not any(candidate in shown for candidate in stops)
