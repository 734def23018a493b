"""What the installed mlx-lm can load, read from its sources: importing it would import mlx, seconds before anything is shown."""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

PLAIN = "KVCache"
# In a `shard`. Qwen 3.5's repeats those that are fewer than the machines; what that takes is not counted here.
_SPLITS_KV_HEADS = re.compile(r"\b(?:n_kv_heads|num_key_value_heads|num_kv_heads) (?://= N|= max\()")


class Architecture(NamedTuple):
    """A module of `mlx_lm.models`.

    `states` are the classes in which its layers may keep what they have read; empty where the source does not tell.
    """

    module: str
    states: frozenset[str]
    full_attention_by_default: bool  # without `layer_types` in the configuration
    latent: bool  # keys and values are kept compressed (multi-head latent attention)
    tensor: bool  # mlx-lm can split each layer among machines
    splits_kv_heads: bool  # and divides its key-value heads then; else every machine keeps them in whole, or has none
    pipeline: bool  # mlx-lm can split the model layer by layer


def architecture(config: dict[str, Any]) -> Architecture | None:
    """The module that mlx-lm loads this config.json with, None where it has none. `config` names a `model_type`."""
    root = _package()
    if root is None:
        return None
    return _read(root, _module_name(root, config))


def defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm takes where this configuration of a text model has nothing; {} where its source does not tell."""
    root = _package()
    return _defaults(root, _module_name(root, config)) if root and "model_type" in config else {}


def mlx_lm_is_installed() -> bool:
    return _package() is not None


def states_of_mlx_lm() -> frozenset[str]:
    """The states that `mlx_lm.models.cache` defines: these alone can it write to a file and read again."""
    root = _package()
    tree = _parse(root / "models" / "cache.py") if root else None
    return frozenset(node.name for node in (tree.body if tree else []) if isinstance(node, ast.ClassDef))


@lru_cache
def _package() -> Path | None:
    spec = find_spec("mlx_lm")  # a top-level name is found without importing it
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def _module_name(root: Path, config: dict[str, Any]) -> str:
    """`mlx_lm.utils._get_classes` in 0.32."""
    name = str(config["model_type"])
    given = config.get("architectures")
    for wanted in [given] if isinstance(given, str) else given if isinstance(given, list) else []:
        if found := _table(root, "MODEL_ARCHITECTURE_REMAPPING").get((name, str(wanted))):
            return str(found)
    return str(_table(root, "MODEL_REMAPPING").get(name, name))


@lru_cache
def _table(root: Path, name: str) -> dict[Any, Any]:
    """A dictionary of literals in `mlx_lm/utils.py`; empty where a newer version has none of that name."""
    tree = _parse(root / "utils.py")
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                break
            return value if isinstance(value, dict) else {}
    return {}


@lru_cache
def _defaults(root: Path, name: str) -> dict[str, Any]:
    found = _Source(root, name).find_class("ModelArgs")
    return {
        part.target.id: part.value.value
        for part in (found[1].body if found else [])
        if isinstance(part, ast.AnnAssign)
        and isinstance(part.target, ast.Name)
        and isinstance(part.value, ast.Constant)
    }


@lru_cache
def _read(root: Path, name: str) -> Architecture | None:
    source = _Source(root, name)
    if source.find_class("Model") is None:
        return None
    text, states, sharder = source.text, source.states("Model"), source.having("Model", "shard")
    return Architecture(
        module=name,
        states=frozenset({PLAIN} if states is None else states),
        full_attention_by_default=re.search(r'layer_types = \["full_attention"\] \*', text) is not None,
        latent=re.search(r"^from \.mla import", text, re.MULTILINE) is not None,
        tensor=sharder is not None,
        splits_kv_heads=sharder is not None and _SPLITS_KV_HEADS.search(sharder.text) is not None,
        pipeline=source.pipelines(),
    )


class _Source:
    """One module of mlx_lm/models; an empty one where there is none of that name."""

    def __init__(self, root: Path, name: str) -> None:
        self._root = root
        file = root / "models" / f"{name}.py"
        tree = _parse(file) if re.fullmatch(r"[\w-]+", name, re.ASCII) else None
        self.text = file.read_text("utf-8") if tree else ""
        self._body = tree.body if tree else []
        self._classes = {node.name: node for node in self._body if isinstance(node, ast.ClassDef)}

    def find_class(self, name: str) -> "tuple[_Source, ast.ClassDef] | None":
        """A class defined here, or in the sibling that it is imported from."""
        if name in self._classes:
            return self, self._classes[name]
        for node in self._body:
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return _Source(self._root, node.module).find_class(alias.name)
        return None

    def states(self, class_name: str) -> set[str] | None:
        """What the class's `make_cache` builds, its own or an inherited one; None where it has none."""
        found = self.find_class(class_name)
        if found is None:
            return None
        source, node = found
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "make_cache":
                return source._built_by(method)
        for base in node.bases:
            inherited = source._states_of_base(base)
            if inherited is not None:
                return inherited
        return None

    def having(self, class_name: str, method: str) -> "_Source | None":
        """Where the class's method is, its own or an inherited one; None where it has none."""
        found = self.find_class(class_name)
        if found is None:
            return None
        source, node = found
        if any(isinstance(part, ast.FunctionDef) and part.name == method for part in node.body):
            return source
        for base in node.bases:
            if isinstance(base, ast.Name) and (inherited := source.having(base.id, method)):
                return inherited
            if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):
                return _Source(self._root, base.value.id).having(base.attr, method)
        return None

    def pipelines(self) -> bool:
        """Whether what `Model` offers as `model` has mlx-lm's PipelineMixin: `sharded_load` looks for it there."""
        found = self.find_class("Model")
        if found is None:
            return False
        source, node = found
        offered = any(getattr(part, "name", "") == "model" for part in node.body) or _assigned_to_model(node)
        if not offered and not source._inherits_own(node):
            return False
        built = {name for part in source._classes.values() for name in _assigned_to_model(part)}
        return any(source._has_pipeline(name) for name in built)

    def _has_pipeline(self, class_name: str) -> bool:
        found = self.find_class(class_name)
        if found is None:
            return False
        mixed_in = any(isinstance(base, ast.Name) and base.id == "PipelineMixin" for base in found[1].bases)
        return mixed_in or self.having(class_name, "pipeline") is not None

    def _inherits_own(self, node: ast.ClassDef) -> bool:
        """Whether a base is a class of mlx_lm/models."""
        return any(isinstance(base, ast.Name) and self.find_class(base.id) is not None for base in node.bases)

    def _states_of_base(self, base: ast.expr) -> set[str] | None:
        if isinstance(base, ast.Name):
            return self.states(base.id)
        if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):
            return _Source(self._root, base.value.id).states(base.attr)
        return None

    def _built_by(self, method: ast.FunctionDef) -> set[str]:
        called = set(_calls(method))
        if built := _caches(called):
            return built
        # It asks a part of itself: a class of this module, or the model of a sibling, which knows nothing of this one.
        others = [node for part in self._classes.values() for node in part.body if node is not method]
        built = _caches({name for node in others if getattr(node, "name", "") == "make_cache" for name in _calls(node)})
        for sibling in () if built else self._siblings():
            built |= _Source(self._root, sibling).states("Model") or set()
        return built

    def _siblings(self) -> Iterator[str]:
        for node in self._body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                yield from [node.module] if node.module else (alias.name for alias in node.names)


def _caches(called: set[str]) -> set[str]:
    return {name for name in called if (name.endswith("Cache") and name[0].isupper()) or name == "CacheList"}


def _assigned_to_model(node: ast.ClassDef) -> list[str]:
    """The names of the classes in `self.model = Name(…)`."""
    return [
        child.value.func.id
        for child in ast.walk(node)
        if isinstance(child, ast.Assign)
        and isinstance(child.value, ast.Call)
        and isinstance(child.value.func, ast.Name)
        and any(isinstance(target, ast.Attribute) and target.attr == "model" for target in child.targets)
    ]


def _calls(node: ast.AST) -> Iterator[str]:
    """The names that are called, without what goes into a CacheList: a layer with one keeps a CacheList."""
    for child in ast.iter_child_nodes(node):
        name = None
        if isinstance(child, ast.Call):
            function = child.func
            name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", None)
            if name:
                yield name
        if name != "CacheList":
            yield from _calls(child)


def _parse(file: Path) -> ast.Module | None:
    try:
        return ast.parse(file.read_text("utf-8"))
    except (OSError, ValueError, SyntaxError):
        return None
