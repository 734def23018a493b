"""What is compared: this project as a user starts it, and mlx_lm.server by itself. Both serve a model of random weights."""

import http.client
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_launcher.bench.client import Address, Answer, Message, ask
from mlx_launcher.bench.prompt import words, words_for
from mlx_launcher.demo import build_random
from mlx_launcher.errors import LaunchError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.launched import Launcher
from support.waiting import free_port, until

# On two CPU cores, where MLX is slow, its prefill outweighs everything around it as a large model's does on a GPU: 2,400 tokens
# take 3 s and 8 tokens decoded 0.04 s. A model ten times as large needs a minute for the same.
MODEL = "llama of 11 MB (float32, 4 layers)"
TOKENS_OUT = 8
_NAME = "default_model"  # any other one is looked for on the hub by mlx_lm.server
_START_S = 120.0


class Ours:
    """`mlx-launch start`, ready."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.launcher = Launcher(directory / "state")
        try:
            self.launcher.start("--model", str(model))
        except BaseException:
            self.close()
            raise

    def ask(self, messages: Sequence[Message], max_tokens: int = TOKENS_OUT) -> Answer:
        return ask(Address("127.0.0.1", self.launcher.port, _NAME), messages, max_tokens)

    def restart(self) -> None:
        done = self.launcher.command("restart")
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        self.launcher.clean_up()


class MlxLm:
    """`mlx_lm.server`, its model loaded."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._start()

    def ask(self, messages: Sequence[Message], max_tokens: int = TOKENS_OUT) -> Answer:
        return ask(Address("127.0.0.1", self._port, _NAME), messages, max_tokens)

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        self._port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlx_lm", "server", "--model", str(self._model), "--port", str(self._port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            # Its /health says nothing of the model: one token does.
            until(self._answers, _START_S, "an answer of mlx_lm.server")
        except BaseException:
            self.close()
            raise

    def _answers(self) -> bool:
        assert self._process.poll() is None, f"mlx_lm.server ended with {self._process.returncode}"
        with suppress(LaunchError, OSError, http.client.HTTPException):
            return self.ask([user("Hi")], 1).completion_tokens == 1
        return False


@contextmanager
def both(directory: Path) -> Iterator[tuple[Ours, MlxLm]]:
    """Both, of one model."""
    model = build_random(directory / "random")
    ours = Ours(model, directory)
    try:
        theirs = MlxLm(model)
        try:
            yield ours, theirs
        finally:
            theirs.close()
    finally:
        ours.close()


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def next_turn(talk: Sequence[Message], answer: Answer, text: str) -> list[Message]:
    """The conversation with its answer and a further question."""
    return [*talk, {"role": "assistant", "content": answer.text}, user(text)]


def words_of(server: Ours | MlxLm, tokens: int) -> int:
    """How many words make a prompt of so many tokens; `words(number, this)` is one."""
    return words_for(tokens, lambda text: server.ask([user(text)], 1).prompt_tokens)


def conversation(number: int, count: int) -> list[Message]:
    return [user(words(number, count))]
