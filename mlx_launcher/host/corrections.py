"""What is corrected in mlx-textgen 0.2.1, one small piece each.

Every correction names the defect, has a test that fails without it, and a test that says so when upstream no longer has the
defect (tests/contract/test_upstream_defects.py). It must be imported on the engine's thread, as mlx_textgen must.
"""

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from mlx_textgen import cache_utils, utils
from mlx_textgen.model_utils import LLMModel

from mlx_launcher.kvcache.files import remove_leftovers, set_aside, write_atomically
from mlx_launcher.models.safetensors import TornFileError, read_header

log = logging.getLogger("mlx_launcher.host")


def keep_prompt_cache_in(directory: Path) -> None:
    """Has mlx-textgen keep its KV cache in `directory`, written whole or not at all.

    Defect: the place comes from `~/.config/mlx_textgen/ENVIRONMENT/config.json`, one for all servers of a user, and two servers
    in one folder answer 500.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    utils.get_prompt_cache_dir = lambda: str(directory)
    cache_utils.CacheManager = HealingCacheManager
    cache_utils.save_cache = save_cache_atomically


class LazyTextModel(LLMModel):  # type: ignore[misc]
    """mlx-textgen's model, loaded lazily and as text.

    Defects: `LLMModel` loads all weights before it returns, so a load shows no progress; and a model with a vision part is
    loaded with the vision stack, though text is all that is asked of it here.
    """

    @property
    def is_vision(self) -> bool:
        return False

    def _load_model_and_config(self, model_id_or_path: str, **_: Any) -> None:
        from mlx_lm.utils import load_model

        self._model_local_path = model_id_or_path
        self._model, self._config = load_model(Path(model_id_or_path), lazy=True)


_save_cache = cache_utils.save_cache


def save_cache_atomically(cache: list[Any], file: str, model_name: str, *args: Any, **kwargs: Any) -> None:
    """Saves one entry under a temporary name first.

    Defect: a kill or a full disk leaves a torn file that the index names; half-torn entries give NaN.
    """

    def write(partial: Path) -> None:
        try:
            _save_cache(cache, str(partial), model_name, *args, **kwargs)
        except RuntimeError as error:  # mlx reports a failed write so
            raise OSError(f"{file}: {error}") from error

    write_atomically(Path(file), write)


class HealingCacheManager(cache_utils.CacheManager):  # type: ignore[misc]
    """mlx-textgen's cache manager with an index that survives kills, and entries that are checked before they are used.

    Defects: a kill while `cached_prompts.json` is written makes every later prompt a 500; so does an entry that is missing or
    torn, for each prompt that matches it best.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._directory = Path(self.cache_dir)
        self._cache_info: list[Any] = []
        remove_leftovers(self._directory)
        self._set_torn_index_aside()
        whole = [entry for entry in self.cache_info if self._is_whole(entry.cache_id)]
        if len(whole) < len(self._cache_info):
            self._cache_info = whole
            self.save_cache_info()

    def save_cache_info(self) -> None:
        entries = {
            entry.cache_id: {"token_ids": entry.token_ids, "last_modified": entry.last_modified}
            for entry in self.cache_info
        }
        document = json.dumps(entries, separators=(",", ":"))
        write_atomically(Path(self.cache_info_dir), lambda partial: _write_text(partial, document))

    def get_cache(self, create_cache_fn: Any, *args: Any, **kwargs: Any) -> tuple[list[Any], int]:
        try:
            cache, offset = super().get_cache(create_cache_fn, *args, **kwargs)
        except (OSError, RuntimeError, ValueError, KeyError, IndexError) as error:
            log.warning("the KV cache could not be read and is not used for this request: %s", error)
            self._cache_info = [entry for entry in self._cache_info if self._is_whole(entry.cache_id)]
            return create_cache_fn(), 0
        return cache, int(offset)

    def drop_cache_by_id(self, cache_ids: str | list[str]) -> None:
        wanted = {cache_ids} if isinstance(cache_ids, str) else set(cache_ids)
        dropped = [entry.cache_id for entry in self.cache_info if entry.cache_id in wanted]
        self._cache_info = [entry for entry in self._cache_info if entry.cache_id not in wanted]
        self.save_cache_info()
        for cache_id in dropped:
            self._entry(cache_id).unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        """What `status` shows of it."""
        sizes = 0
        for path in self._directory.glob("cache_*.safetensors"):
            with contextlib.suppress(OSError):
                sizes += path.stat().st_size
        return {"dir": str(self._directory), "entries": len(self._cache_info), "bytes": sizes, "limit_bytes": None}

    def _entry(self, cache_id: str) -> Path:
        return self._directory / f"{cache_id}.safetensors"

    def _is_whole(self, cache_id: str) -> bool:
        path = self._entry(cache_id)
        try:
            read_header(path)
        except FileNotFoundError:
            return False
        except TornFileError as error:
            log.warning("set aside: %s", error)
            set_aside(path)
            return False
        return True

    def _set_torn_index_aside(self) -> None:
        path = Path(self.cache_info_dir)
        try:
            self._cache_info = _read_index(path)
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, AttributeError):
            log.warning("set aside: %s is torn", path)
            set_aside(path)


def _read_index(path: Path) -> list[Any]:
    entries = json.loads(path.read_bytes())
    return [
        cache_utils.CacheInfo(
            cache_id=cache_id,
            token_ids=entry["token_ids"],
            last_modified=entry.get("last_modified", time.time()),
        )
        for cache_id, entry in entries.items()
    ]


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
