#!/usr/bin/env python3
# mlx-launch built-in: legacy
"""anyclaude's legacy server: mlx-server.py --model MODEL --port PORT [--host HOST], in whatever virtual environment.

Serves MODEL on PORT with mlx-lm's own server, without mlx-textgen, supervised by mlx-launch, until anyclaude is gone. This file
needs the standard library alone: mlx-launch runs in its own interpreter, named below by `mlx-launch config init`, else by
MLX_LAUNCH_PYTHON, else found by the mlx-launch command on the PATH.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

PYTHON = ""
STATE_DIR = ""


def interpreter() -> str:
    if named := PYTHON or os.environ.get("MLX_LAUNCH_PYTHON"):
        return named
    beside = shutil.which("mlx-launch")
    return str(Path(beside).resolve().with_name("python")) if beside else sys.executable


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model with mlx-lm's own server for anyclaude.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=8081)
    parser.add_argument("--host")
    arguments = parser.parse_args()
    program = interpreter()
    words = [f"--state-dir={STATE_DIR}"] if STATE_DIR else []
    words += ["run", "--with-caller", "--mode=mlx-legacy", f"--model={arguments.model}", f"--port={arguments.port}"]
    words += [f"--host={arguments.host}"] if arguments.host else []
    try:
        # -P: the directory that anyclaude was started in may hold a json.py.
        os.execv(program, [program, "-P", "-m", "mlx_launcher", *words])  # noqa: S606
    except OSError as error:
        sys.exit(f"mlx-launch: {program} cannot be started: {error.strerror}. Name its Python in MLX_LAUNCH_PYTHON.")


if __name__ == "__main__":
    main()
