"""From what a user calls a model to the directory that holds it: a path, or `org/name` found on this machine."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from mlx_launcher.errors import LaunchError
from mlx_launcher.models.directory import BrokenModelError, check, weight_files
from mlx_launcher.models.places import expand, hub_cache, lmstudio_folders, snapshot

NAME_A_MODEL = "Name a model: a directory, or org/name as on huggingface.co, mlx-community/Qwen3-4B-4bit for example"
PLACEHOLDER = "current-model"

# huggingface_hub's `validate_repo_id`, with an organisation, which every MLX model has.
_HUB_NAME = re.compile(
    r"(?!.*(?:--|\.\.))([A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?:@([\w./-]+))?", re.ASCII
)


def is_hub_name(name: str) -> bool:
    """Whether `name` can be one on the hub: `org/name`, or `org/name@revision` with a branch, a tag or a commit."""
    return _HUB_NAME.fullmatch(name) is not None


def split_hub_name(name: str) -> tuple[str, str | None]:
    """`org/name` and the revision, if one is named. ValueError for what is no hub name."""
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no name on the hub")
    return match[1], match[2]


def find(
    name: str, cwd: str, environment: Mapping[str, str], note: Callable[[str], object] = lambda text: None
) -> Path | None:
    """The directory of the model `name`, absolute; None for a hub name of which nothing whole is on this machine.

    A directory (absolute, relative to `cwd`, `~`) is returned as it is, whole or not; then `org/name[@revision]` is looked
    for in the hub's cache and, without a revision, in LM Studio's folders. One that is there but not whole is told to
    `note` and not found, so that it is downloaded again.

    LaunchError: `no_model` for an empty name and LM Studio's placeholder, `model_not_found` for what is neither a directory
    nor a hub name, `model_unsupported` for what is no MLX model: a file, GGUF, PyTorch weights, an adapter.
    """
    if not name.strip():
        raise LaunchError("no_model", "there is no model to serve", NAME_A_MODEL)
    if name == PLACEHOLDER:
        what = f"{PLACEHOLDER} is LM Studio's placeholder for what it has loaded itself: there is nothing to start"
        raise LaunchError("no_model", what, NAME_A_MODEL)
    path = Path(os.path.normpath(Path(cwd, expand(name, environment))))
    if os.path.isdir(path):  # noqa: PTH112 - answers no where Path.is_dir raises: a name too long, a directory closed to us
        refuse_other_formats(path)
        return path
    if os.path.lexists(path):
        raise _not_a_directory(path)
    if not is_hub_name(name):
        raise LaunchError("model_not_found", f"there is no model at {path}", NAME_A_MODEL)
    return _on_this_machine(name, environment, note)


def refuse_other_formats(path: Path) -> None:
    """LaunchError `model_unsupported` for a directory whose weights are of another program, with what to look for."""
    if weight_files(path):
        return
    other = next((reason for pattern, reason in _OTHER_FORMATS if next(path.glob(pattern), None)), None)
    if other:
        raise LaunchError("model_unsupported", f"{path} {other}", CONVERTED)


CONVERTED = "Look for the same model converted to MLX, at huggingface.co/mlx-community for example"
# Adapters first: their directories may hold PyTorch files too.
_OTHER_FORMATS = (
    ("adapter*.safetensors", "holds an adapter, not a model: MLX needs the model that it was fused into"),
    ("adapter_config.json", "holds an adapter, not a model: MLX needs the model that it was fused into"),
    ("*.gguf", "holds GGUF files, llama.cpp's format: MLX needs model*.safetensors"),
    ("*.bin", "holds PyTorch weights alone: MLX needs model*.safetensors"),
    ("*.pth", "holds PyTorch weights alone: MLX needs model*.safetensors"),
)


def _not_a_directory(path: Path) -> LaunchError:
    if not path.exists():
        return LaunchError("model_not_found", f"{path} is a link to what is not there", NAME_A_MODEL)
    if path.suffix.lower() == ".gguf":
        what = f"{path} is a GGUF file, llama.cpp's format: MLX needs a directory with model*.safetensors"
        return LaunchError("model_unsupported", what, CONVERTED)
    hint = "Give the directory that the file lies in"
    return LaunchError("model_unsupported", f"{path} is a file, not a model", hint)


def _on_this_machine(name: str, environment: Mapping[str, str], note: Callable[[str], object]) -> Path | None:
    plain, revision = split_hub_name(name)
    candidates = [snapshot(hub_cache(environment), plain, revision)]
    if revision is None:
        candidates += (folder / plain for folder in lmstudio_folders(environment))
    unsupported = None
    for path in candidates:
        if path is None or not os.path.isdir(path):  # noqa: PTH112
            continue
        try:
            check(path)
        except BrokenModelError as error:
            note(f"{name} is on this machine, but not whole: {error.reason}")
        else:
            return path
        try:
            refuse_other_formats(path)
        except LaunchError as error:
            unsupported = error
    if unsupported:
        raise unsupported
    return None
