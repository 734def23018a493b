"""What can be said about a model from its directory alone, before anything is started."""

from pathlib import Path

from mlx_launcher.errors import LaunchError


def check_model(directory: Path) -> None:
    """Raises LaunchError `model_not_found` or `model_incomplete`, naming what is missing; reads no file's content."""
    try:
        names = [path.name for path in directory.iterdir()]
    except FileNotFoundError:
        raise LaunchError(
            "model_not_found", f"there is no model at {directory}", "Give a directory that holds an MLX model"
        ) from None
    except NotADirectoryError:
        raise LaunchError(
            "model_not_found", f"{directory} is a file, not a model", "Give the directory that the file lies in"
        ) from None
    except OSError as error:
        raise LaunchError(
            "model_not_found", f"the model at {directory} cannot be read: {error.strerror}", "Check who owns it"
        ) from None
    missing = [name for name in ("config.json", "tokenizer.json") if name not in names]
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("*.safetensors")
    if missing:
        raise LaunchError(
            "model_incomplete",
            f"the model at {directory} has no {' and no '.join(missing)}",
            "Download or convert it again, or give another one with --model",
        )


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
