"""The measurement of one server: conversations begun, followed up, and gone on with after a restart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlx_launcher.bench.client import Answer, Message
from mlx_launcher.bench.prompt import words, words_for

# What an agent's turns are like: a long prompt, a short answer. Speed while decoding wants a longer one.
SHORT_ANSWER = 8
LONG_ANSWER = 64
RUNS = 10**6
_TASK = "\n\nTell me a long story in which these words occur in this order."
_TURNS = ("Go on with the story.", "Go on, and tell me about everybody in it.", "How does the story end?")


class Server(Protocol):
    """One that runs. Both raise LaunchError when it fails."""

    def ask(self, messages: Sequence[Message], max_tokens: int) -> Answer: ...

    def restart(self) -> None:
        """Returns when it is ready again, its memory empty."""


@dataclass
class Measured:
    """One answer for each conversation, in their order."""

    first: list[Answer] = field(default_factory=list)
    follow_up: list[Answer] = field(default_factory=list)
    long: list[Answer] = field(default_factory=list)
    after_restart: list[Answer] = field(default_factory=list)


def measure(server: Server, tokens: int, conversations: int, run: int, say: Callable[[str], None]) -> Measured:
    """Asks a server that runs: for each conversation a first request of about `tokens` tokens and two follow-ups at once, then,
    after one restart of the server, the next turn of each.

    Prompts are the same for the same `run`, below RUNS, and new for any other: a server of the user's may have a cache that
    outlives it.
    """
    say("prompt")
    count = words_for(tokens, lambda text: server.ask([_user(text + _TASK)], 1).prompt_tokens)
    measured, talks = Measured(), list[list[Message]]()
    for number in range(1, conversations + 1):
        of = f"{number} of {conversations}"
        talk = [_user(words(number * RUNS + run, count) + _TASK)]
        talks.append(talk)
        say(f"first request {of}")
        measured.first.append(_turn(server, talk, SHORT_ANSWER))
        say(f"follow-up {of}")
        talk.append(_user(_TURNS[0]))
        measured.follow_up.append(_turn(server, talk, SHORT_ANSWER))
        say(f"decoding {of}")
        talk.append(_user(_TURNS[1]))
        measured.long.append(_turn(server, talk, LONG_ANSWER))
    say("restart")
    server.restart()
    for number, talk in enumerate(talks, 1):
        say(f"follow-up after the restart {number} of {conversations}")
        talk.append(_user(_TURNS[2]))
        measured.after_restart.append(_turn(server, talk, SHORT_ANSWER))
    return measured


def _turn(server: Server, talk: list[Message], max_tokens: int) -> Answer:
    """Asks, and adds the answer to the conversation."""
    answer = server.ask(talk, max_tokens)
    # A template may refuse a turn without a text, as a model's that only thought so far is.
    talk.append({"role": "assistant", "content": answer.text or "Yes."})
    return answer


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
