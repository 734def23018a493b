"""Downloads a model from the hub into the hub's own cache, so that every other program on this machine finds it too.

huggingface_hub alone begins a file anew when it was interrupted, and fetches several at once: Ctrl-C near the end of 17 GB
would lose all of it. So the large files are fetched here, by range requests into a file that outlives the process, and put
where the cache wants them; `snapshot_download` then does the rest and finds them there.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from mlx_launcher.errors import LaunchError
from mlx_launcher.models.directory import BrokenModelError, check, read_config
from mlx_launcher.models.places import hub_cache, repository
from mlx_launcher.models.resolve import CONVERTED, split_hub_name

Say = Callable[[str, dict[str, int]], object]

# What mlx-lm reads; its `DEFAULT_ALLOW_PATTERNS` without Python, which nobody asked to run.
_WANTED = ("*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja")
_AT_ONCE = 4
_SAY_EVERY_S = 0.5
_PARTIAL = ".mlx-launch.partial"
_TRY_AGAIN = "Give the same command again: what has arrived is kept"


class _File(NamedTuple):
    name: str
    size: int
    sha256: str | None  # of the files that the hub keeps apart from git: the large ones


def download(name: str, say: Say) -> Path:
    """The directory of `org/name[@revision]`, downloaded where it is not in the hub's cache yet.

    `say(what, {"done": bytes, "total": bytes})` is called at most twice a second, on this thread. An interrupted download
    goes on where it was, byte for byte. HF_ENDPOINT, HF_TOKEN and the cache's variables are those of huggingface_hub.

    LaunchError: `model_not_found`, `model_gated`, `hub_unreachable`, `disk_full`, `model_unsupported` for a repository
    without MLX weights, `model_incomplete`, `download_failed`.
    """
    repo, revision = split_hub_name(name)
    cache = hub_cache(os.environ)
    try:
        return _download(repo, revision, cache, say)
    except LaunchError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise LaunchError("disk_full", f"the disk of {cache} is full", f"Make room there. {_TRY_AGAIN}") from None
        raise _explained(name, error) from None
    except Exception as error:  # whatever HTTP library the hub's client is built on this year
        raise _explained(name, error) from None


def fetch_config(name: str) -> dict[str, Any]:
    """config.json of `org/name[@revision]` as the hub has it; nothing of it stays on this machine. LaunchError as `download`."""
    repo, revision = split_hub_name(name)
    import huggingface_hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    _be_quiet()
    endpoint = os.environ.get("HF_ENDPOINT") or None
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = huggingface_hub.hf_hub_download(
                repo, "config.json", revision=revision, cache_dir=folder, endpoint=endpoint
            )
            return read_config(Path(file).parent)
        except BrokenModelError as error:
            raise LaunchError("model_incomplete", f"{name} on the hub: {error.reason}", "Choose another") from None
        except RemoteEntryNotFoundError:
            raise LaunchError("model_unsupported", f"{name} has no config.json on the hub", CONVERTED) from None
        except Exception as error:  # whatever HTTP library the hub's client is built on this year
            raise _explained(name, error) from None


def _be_quiet() -> None:
    """What counts of the hub's client comes as an exception."""
    import huggingface_hub.file_download  # noqa: F401 - sets the log's level when it is imported, so it comes first
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def _download(repo: str, revision: str | None, cache: Path, say: Say) -> Path:
    import huggingface_hub

    _be_quiet()
    # The client keeps these from its import; a caller's environment may be newer.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    info = huggingface_hub.HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True)
    files = _wanted(repo, info.siblings or [])
    blobs = repository(cache, repo) / "blobs"
    large = [file for file in files if file.sha256 and not (blobs / file.sha256).exists()]
    here = repository(cache, repo) / "snapshots" / str(info.sha)
    small = [file for file in files if not file.sha256 and not (here / file.name).exists()]
    total = sum(file.size for file in files)
    progress = _Progress(f"downloading {repo}", total, total - sum(file.size for file in [*large, *small]), say)
    _require_room(repo, cache, sum(_missing(blobs, file) for file in large) + sum(file.size for file in small))
    _fetch(
        large,
        blobs,
        progress,
        lambda file: huggingface_hub.hf_hub_url(repo, file.name, revision=info.sha, endpoint=endpoint),
    )
    path = Path(
        huggingface_hub.snapshot_download(
            repo, revision=revision, cache_dir=cache, endpoint=endpoint, allow_patterns=[file.name for file in files]
        )
    )
    try:
        check(path)
    except BrokenModelError as error:
        raise LaunchError(
            "model_incomplete", f"{repo} is not whole on the hub: {error.reason}", "Choose another"
        ) from None
    progress.finish()
    return path


def _wanted(repo: str, siblings: Iterable[Any]) -> list[_File]:
    """The files that a server needs; LaunchError `model_unsupported` where there are no weights for MLX among all."""
    files = [
        _File(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None) for sibling in siblings
    ]
    wanted = [file for file in files if "/" not in file.name and any(fnmatch(file.name, p) for p in _WANTED)]
    if not any(fnmatch(file.name, "model*.safetensors") for file in wanted):
        kind = " (it holds GGUF, llama.cpp's format)" if any(file.name.endswith(".gguf") for file in files) else ""
        what = f"{repo} has no model*.safetensors, which MLX needs{kind}"
        raise LaunchError("model_unsupported", what, CONVERTED)
    return wanted


def _missing(blobs: Path, file: _File) -> int:
    try:
        return file.size - _partial(blobs, file).stat().st_size
    except OSError:
        return file.size


def _partial(blobs: Path, file: _File) -> Path:
    return blobs / f"{file.sha256}{_PARTIAL}"


def _require_room(repo: str, cache: Path, needed: int) -> None:
    place = next(place for place in (cache, *cache.parents) if place.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        what = f"{repo} needs {needed / 1e9:.1f} GB more on the disk of {cache}, and {free / 1e9:.1f} GB are free"
        raise LaunchError("disk_full", what, "Make room there, or name another place in HF_HUB_CACHE")


class _Progress:
    """How far all files together are. Worker threads add, the caller's thread says."""

    def __init__(self, what: str, total: int, done: int, say: Say) -> None:
        self._what, self._total, self._done, self._say = what, total, done, say
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count

    def tell(self) -> None:
        self._say(self._what, {"done": min(max(self._done, 0), self._total), "total": self._total})

    def finish(self) -> None:
        self._done = self._total
        self.tell()


def _fetch(files: list[_File], blobs: Path, progress: _Progress, url: Callable[[_File], str]) -> None:
    """Several at a time. On daemon threads: Ctrl-C ends the command at once, and what is on the disk stays there."""
    queue, errors, lock = list(files), list[Exception](), threading.Lock()

    def work() -> None:
        while not errors:
            with lock:
                if not queue:
                    return
                file = queue.pop(0)
            try:
                _fetch_one(file, blobs, progress, url(file))
            except Exception as error:
                errors.append(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(_AT_ONCE, len(files)))]
    for worker in workers:
        worker.start()
    while not errors and any(worker.is_alive() for worker in workers):
        progress.tell()
        until = time.monotonic() + _SAY_EVERY_S
        for worker in workers:
            worker.join(max(0.0, until - time.monotonic()))
    if errors:
        raise errors[0]


def _fetch_one(file: _File, blobs: Path, progress: _Progress, url: str) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    class Count:
        """What `http_get` takes for a progress bar."""

        def __init__(self, **_: object) -> None: ...
        def __enter__(self) -> "Count":
            return self

        def __exit__(self, *_: object) -> None: ...
        def update(self, count: float) -> None:
            progress.add(int(count))

    blobs.mkdir(parents=True, exist_ok=True)
    partial, whole = _partial(blobs, file), blobs / str(file.sha256)
    with partial.open("ab") as out:
        fcntl.flock(out, fcntl.LOCK_EX)  # another command may be at the same file
        if whole.exists():
            partial.unlink(missing_ok=True)
            return
        if out.tell() > file.size:  # not of ours, and no range request could go on from there
            out.truncate(0)
        have = out.seek(0, os.SEEK_END)
        progress.add(have)
        http_get(url, out, resume_size=have, headers=build_hf_headers(), expected_size=file.size, tqdm_class=Count)
        out.flush()
        os.fsync(out.fileno())
        if _sha256(partial) != file.sha256:
            partial.unlink()
            raise LaunchError("download_failed", f"{file.name} arrived damaged", _TRY_AGAIN)
        partial.rename(whole)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _explained(name: str, error: Exception) -> LaunchError:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why it was looked for here alone
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return LaunchError("model_not_found", f"the hub has no such revision: {name}", "Check what follows the @")
    if isinstance(error, errors.GatedRepoError) or status == 403:
        what = f"{name} is given only to those who accepted its terms"
        hint = f"Accept them at huggingface.co/{name.partition('@')[0]}, and set HF_TOKEN to a token of yours"
        return LaunchError("model_gated", what, hint)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        what = f"there is no directory {name}, and no such model on the hub, or only for its owners"
        return LaunchError(
            "model_not_found", what, "Check the name; for a private model set HF_TOKEN to a token of yours"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        what = f"{name} is not whole on this machine, and HF_HUB_OFFLINE forbids to download it"
        return LaunchError(
            "hub_unreachable", what, "Unset HF_HUB_OFFLINE, or name a model that is here (mlx-launch models)"
        )
    if status is not None:
        return LaunchError("hub_unreachable", f"the hub answered {status} for {name}", f"Try later. {_TRY_AGAIN}")
    kind = type(error).__name__
    if "Connect" in kind or "Timeout" in kind or "Network" in kind or "Protocol" in kind:
        what = f"{name} is not on this machine, and the hub cannot be reached ({kind}: {error})"
        return LaunchError("hub_unreachable", what, f"Check the network. {_TRY_AGAIN}")
    return LaunchError("download_failed", f"{name} could not be downloaded: {kind}: {error}", _TRY_AGAIN)
