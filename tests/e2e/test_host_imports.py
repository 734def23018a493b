"""What a ready host has imported: serving text needs no vision, no audio, no data sets and no second tensor library."""

import json
import subprocess
import sys
from pathlib import Path

NOT_FOR_TEXT = {
    *("torch", "torchvision", "torchaudio", "tensorflow", "jax", "outlines"),
    *("mlx_vlm", "mlx_audio", "cv2", "soundfile", "librosa", "scipy", "sklearn", "numba"),
    *("datasets", "pandas", "pyarrow", "matplotlib", "aiohttp", "gradio", "fastapi", "IPython"),
    "mlx_textgen.server",
    "mlx_textgen.engine",
}

SERVE = """
import json, sys, threading
from mlx_launcher.host import server
from mlx_launcher.host.engine import Counters
from mlx_launcher.host.requests import Generation
runtime = server._runtime()
cache = {"enabled": False, "dir": "/nowhere", "slots": 1, "min_tokens": 1, "memory_bytes": None, "max_bytes": None}
settings = {"model_path": sys.argv[1], "model_id": "m", "prefill_batch": 512, "cache": cache, "warmup": []}
runtime.load(settings, lambda done, total: None)
request = Generation(messages=[{"role": "user", "content": "Hi"}], max_tokens=1, sampling={"temperature": 0})
assert list(runtime.generate(request, threading.Event(), Counters()))
print(json.dumps(sorted(sys.modules)), flush=True)
"""


def test_a_ready_host_has_imported_nothing_that_text_does_not_need(random_model: Path) -> None:
    # os._exit as in the host: interpreter teardown after MLX may abort.
    program = SERVE + "import os; os._exit(0)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(random_model)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert "mlx_lm" in modules
    assert modules & NOT_FOR_TEXT == set()
