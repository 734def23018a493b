"""What a rank of a cluster does before it serves: it joins the others, and loads its part of the model."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer

from mlx_launcher.host.errors import ModelFault
from mlx_launcher.host.settings import Membership
from mlx_launcher.host.weights import read_weights
from mlx_launcher.models.directory import BrokenModelError, check
from mlx_launcher.models.fingerprint import fingerprint


def join(path: str, membership: Membership, say: Callable[[dict[str, Any]], object]) -> None:
    """Makes this process a rank: `mx.distributed.init()` is the cluster from here on.

    Says `joining` with what its model is, and `joined`. In between MLX waits for the others without an end and holds the
    interpreter's lock, so no thread of this process runs: whoever watches it has to end it. ModelFault where the model is not
    whole, or the cluster cannot be.
    """
    try:
        check(Path(path))
    except BrokenModelError as error:
        raise ModelFault(error.reason, error.hint) from None
    say({"type": "joining", "fingerprint": fingerprint(Path(path))})
    os.environ.update(membership["environment"])
    os.environ["MLX_RANK"] = str(membership["rank"])
    with contextlib.ExitStack() as stack:
        for name, content in membership["files"].items():
            # Without a name, so that nothing is left of it however this ends.
            file = stack.enter_context(tempfile.TemporaryFile())
            file.write(content.encode())
            file.seek(0)
            os.environ[name] = f"/dev/fd/{file.fileno()}"
        try:
            group = mx.distributed.init(strict=True, backend=membership["link"])
        except RuntimeError as error:
            raise ModelFault(f"the other ranks cannot be joined: {error}") from None
    if (group.size(), group.rank()) != (membership["size"], membership["rank"]):
        raise ModelFault(f"MLX made it rank {group.rank()} of {group.size()} instead of what it was told")
    say({"type": "joined"})


def load_part(progress: Callable[[int, int], object], path: str, **given: Any) -> tuple[Any, Any, Any]:
    """Stands in for `mlx_lm.utils.sharded_load` with a group given: it reads array by array, and tells of its part's bytes.

    mlx-lm's own shows nothing before the end, and wants an index file for a pipeline.
    """
    model, config = load_model(Path(path), lazy=True)
    tokenizer = load_tokenizer(Path(path), given["tokenizer_config"], eos_token_ids=config.get("eos_token_id", None))
    if given["tensor_group"] is not None:
        model.shard(given["tensor_group"])
    else:
        model.model.pipeline(given["pipeline_group"])
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    read_weights(model, total, progress)
    # Nobody generates before the slowest has read its part.
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
    return model, tokenizer, config
