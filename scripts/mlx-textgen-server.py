#!/usr/bin/env python3
# mlx-launch built-in: textgen
"""anyclaude's serverScript as Python: mlx-textgen-server.py --model MODEL --port PORT, in whatever virtual environment.

Serves MODEL on PORT with mlx-textgen, supervised by mlx-launch, until anyclaude is gone. This file needs the standard library
alone: mlx-launch runs in its own interpreter, named by MLX_LAUNCH_PYTHON or found by the mlx-launch command on the PATH.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path


def interpreter() -> str:
    if named := os.environ.get("MLX_LAUNCH_PYTHON"):
        return named
    beside = shutil.which("mlx-launch")
    return str(Path(beside).resolve().with_name("python")) if beside else sys.executable


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model with mlx-textgen for anyclaude.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=8081)
    arguments = parser.parse_args()
    python = interpreter()
    words = ["run", "--with-caller", f"--model={arguments.model}", f"--port={arguments.port}"]
    try:
        # -P: the directory that anyclaude was started in may hold a json.py.
        os.execv(python, [python, "-P", "-m", "mlx_launcher", *words])  # noqa: S606
    except OSError as error:
        sys.exit(f"mlx-launch: {python} cannot be started: {error.strerror}. Name its Python in MLX_LAUNCH_PYTHON.")


if __name__ == "__main__":
    main()
