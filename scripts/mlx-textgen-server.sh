#!/bin/bash
# mlx-launch built-in: textgen
#
# anyclaude's serverScript: bash mlx-textgen-server.sh MODEL PORT LOG
# Serves MODEL on PORT with mlx-textgen, supervised by mlx-launch, until anyclaude is gone, however it goes.
# Nothing is written to LOG: anyclaude appends there what is printed here.
# `mlx-launch config init` installs a copy that knows its interpreter.

python=""
state_dir=""

if [ $# -lt 2 ]; then
    echo "usage: bash $0 MODEL PORT [LOG]" >&2
    exit 2
fi

# Not installed by `config init`: the active virtual environment, else whatever python3 the PATH has.
if [ -z "$python" ] && [ -n "$VIRTUAL_ENV" ]; then
    python="$VIRTUAL_ENV/bin/python"
fi
if [ -z "$python" ]; then
    python=$(command -v python3)
fi
if [ ! -x "$python" ]; then
    echo "mlx-launch: there is no Python at '$python'. Install mlx-launcher again, then run mlx-launch config init." >&2
    exit 1
fi

# -P: the directory that anyclaude was started in may hold a json.py.
exec "$python" -P -m mlx_launcher ${state_dir:+--state-dir="$state_dir"} run --with-caller --model="$1" --port="$2"
