"""An import of transformers that does not read what it read the last time.

Defect: transformers 5 reads all sources of its models twice at each import, over 3,000 files, to learn what each exports: at each
start, and after each crash (`tests/contract/test_transformers_exports.py` counts them). What it has learned is kept in a file.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

_NAME = "transformers"
# What transformers calls an import structure: names by module, by what has to be installed for them.
Exports = dict[frozenset[str], dict[str, set[str]]]


def remember_exports(file: str) -> None:
    """From now on `import transformers` takes from `file` what its models export, and writes it where it is not there.

    The names are those of the same release in the same place; what cannot be read or written is learned anew, as ever.
    """
    sys.meta_path.insert(0, _Finder(file))


class _Finder(MetaPathFinder):
    def __init__(self, file: str) -> None:
        self._file = file

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _NAME:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.origin and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.origin, self._file)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, path: str, file: str) -> None:
        super().__init__(_NAME, path)
        self._file = file

    def exec_module(self, module: ModuleType) -> None:
        with contextlib.suppress(ImportError, AttributeError, OSError):
            # What is imported below asks for it, before the module itself has said it.
            module.__dict__["__version__"] = importlib.metadata.version(_NAME)
            models = Path(self.path).parent / "models"
            release = [module.__dict__["__version__"], str(models), models.stat().st_mtime_ns]
            utils: Any = importlib.import_module(f"{_NAME}.utils.import_utils")
            learn = utils.define_import_structure
            known = functools.cache(lambda: _exports(self._file, release, lambda: learn(models)))

            def define(path: str | Path, prefix: str | None = None, **more: Any) -> Exports:
                if more or Path(path) not in (models, models / "__init__.py"):
                    return learn(path, prefix, **more)  # type: ignore[no-any-return]
                start = f"{prefix}." if prefix else ""
                return {
                    needs: {start + name: set(of) for name, of in found.items()} for needs, found in known().items()
                }

            utils.define_import_structure = define
        super().exec_module(module)


def _exports(file: str, release: list[Any], learn: Callable[[], Exports]) -> Exports:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        kept = json.loads(Path(file).read_bytes())
        if kept["release"] == release:
            return {frozenset(needs): {name: set(of) for name, of in found.items()} for needs, found in kept["exports"]}
    exports = learn()
    found = [[sorted(needs), {name: sorted(of) for name, of in found.items()}] for needs, found in exports.items()]
    fresh = f"{file}.{os.getpid()}"
    with contextlib.suppress(OSError):
        Path(fresh).write_text(json.dumps({"release": release, "exports": found}))
        os.replace(fresh, file)  # noqa: PTH105
    return exports
