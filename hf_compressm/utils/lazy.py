"""Lazy imports: names of a package, and model types that transformers can look up before their classes are imported.

`import hf_compressm` imports neither torch nor transformers, so that the command line answers at once. Nevertheless
`AutoConfig` and the Auto classes know its models, whichever of the two packages is imported first: the model types are
entered into transformers' table of configurations without their classes, and the first lookup of a type imports them.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


AUTO_MODULE = "transformers.models.auto.configuration_auto"


def lazy_names(
    package: str, homes: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names are imported on first use (PEP 562).

    Args:
        package: dotted name of the package.
        homes: the public names, by the module that defines them, relative to the package.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get_attribute(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
        vars(sys.modules[package])[name] = value
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return get_attribute, list_names


def announce_models(model_types: Iterable[str], home: str) -> None:
    """Let transformers look up model types whose classes are not imported yet.

    Args:
        model_types: the types as `config.json` names them.
        home: the module that registers their classes when it is imported.
    """
    if AUTO_MODULE in sys.modules:
        _enter(sys.modules[AUTO_MODULE], model_types, home)
    else:
        sys.meta_path.insert(0, _Entrance(tuple(model_types), home))


class _Entrance(MetaPathFinder):
    """Import hook that waits for transformers' table of configurations, once."""

    def __init__(self, model_types: tuple[str, ...], home: str) -> None:
        self.model_types = model_types
        self.home = home

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the module of the table as Python does, and enter the types after it has been executed."""
        if name != AUTO_MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _enter(module, self.model_types, self.home)

            loader.exec_module = execute_and_enter
        return spec


def _enter(module: ModuleType, model_types: Iterable[str], home: str) -> None:
    """Enter the types into the table. If transformers has another kind of table, importing `home` makes them known."""
    mapping = getattr(module, "CONFIG_MAPPING", None)
    registered = getattr(mapping, "_extra_content", None)
    if isinstance(registered, dict):
        vars(mapping)["_extra_content"] = _Registered(registered, model_types, home)


class _Registered(dict[str, Any]):
    """Configuration classes by model type; missing ones are imported when one of them is looked up."""

    def __init__(self, present: Mapping[str, Any], model_types: Iterable[str], home: str) -> None:
        super().__init__({**dict.fromkeys(model_types), **present})
        self.home = home

    def __getitem__(self, model_type: str) -> Any:
        if super().__getitem__(model_type) is None:
            importlib.import_module(self.home)
        return super().__getitem__(model_type)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # with its own `__iter__`, `dict(...)` copies through `__getitem__`

    def values(self) -> Any:
        return [self[model_type] for model_type in self]

    def items(self) -> Any:
        return [(model_type, self[model_type]) for model_type in self]
