"""What can be said about a model from its directory alone, before anything is started."""

from pathlib import Path

from mlx_launcher.errors import LaunchError
from mlx_launcher.models.directory import BrokenModelError, check


def check_model(directory: Path) -> None:
    """Raises LaunchError `model_not_found`, or `model_incomplete` that names the file that is missing or torn."""
    if not directory.exists():
        raise LaunchError(
            "model_not_found", f"there is no model at {directory}", "Give a directory that holds an MLX model"
        )
    if not directory.is_dir():
        raise LaunchError(
            "model_not_found", f"{directory} is a file, not a model", "Give the directory that the file lies in"
        )
    try:
        check(directory)
    except BrokenModelError as error:
        raise LaunchError("model_incomplete", error.reason, error.hint.rstrip(".")) from None


def served_names(model_id: str, path: str) -> list[str]:
    """What a model answers to: its id, its directory's name, mlx-textgen's short form of that, and its path.

    mlx-textgen alone would answer only to the short form, and clients send what stands in their configuration.
    """
    base = Path(path).name
    short = base.lower().replace("_", "-")
    head, _, last = short.rpartition("-")
    if "bit" in last:
        short = head
    return list(dict.fromkeys(name for name in (model_id, base, short, path) if name))
