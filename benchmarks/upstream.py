"""`mlx_textgen serve` as its documentation starts it, with a home of its own: it writes into ~/.cache and ~/.config."""

import os
import subprocess
import sys
from pathlib import Path

# Its script's entry point. As it is, each request fails where there is no Metal (KeyError: max_recommended_working_set_size):
# it is given mlx-lm's function of the same name there, as our host uses it, and nothing else.
_MAIN = """
import sys
import mlx.core as mx
if not mx.metal.is_available():
    from mlx_lm.generate import wired_limit
    from mlx_textgen import model_utils
    model_utils.wired_limit = wired_limit
from mlx_textgen.cli import main
main()
"""
NAME = "m"


class Upstream:
    """`with Upstream(model, port, home)`: started, not yet listening."""

    def __init__(self, model: Path, port: int, home: Path) -> None:
        home.mkdir(exist_ok=True)
        serve = ["serve", "--model-path", str(model), "--model-name", NAME, "--port", str(port)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, *serve],
            env={**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> "Upstream":
        return self

    def __exit__(self, *_: object) -> None:
        # SIGTERM would wait for the generation that is going on.
        self._process.kill()
        self._process.wait(30)
