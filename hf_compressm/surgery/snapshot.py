"""Undoing a cut: references to everything that it may change.

A cut replaces tensors, gradients included, and never writes into them, so nothing needs to be copied. What is put back
is the original, bit for bit. The only cost of a snapshot is that the replaced tensors stay in memory as long as it
exists.
"""

from typing import Any

from torch import nn

from hf_compressm.surgery.compiled import forget_compiled_graphs
from hf_compressm.surgery.stores import stores_in
from hf_compressm.utils.configurations import configurations


class Snapshot:
    """A model's structure, its configurations and its optimizer's state as they are now.

    Args:
        model: any module.
        optimizer: the optimizer that trains it, if any; perhaps a wrapper around others, or a list of them.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None) -> None:
        """Take the snapshot."""
        holders = [*model.modules(), *configurations(model)]
        self._classes = [(holder, type(holder)) for holder in holders]
        self._contents: list[tuple[Any, dict[Any, Any]]] = [(vars(holder), dict(vars(holder))) for holder in holders]
        for module in model.modules():  # parameters, buffers and hooks are in dicts of their own
            self._contents += [(value, dict(value)) for value in vars(module).values() if isinstance(value, dict)]
        self._groups: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        for store in stores_in(optimizer) if optimizer is not None else ():
            self._groups += [(group, list(group["params"])) for group in store.groups]
            self._contents += [(state, dict(state)) for state in (store.state, *store.state.values())]

    def restore(self) -> None:
        """Put everything back; this is exact if no tensor was written into since."""
        for holder, original in self._classes:
            if type(holder) is not original:
                holder.__class__ = original
        for present, contents in self._contents:
            present.clear()
            present.update(contents)
        for group, parameters in self._groups:
            group["params"] = parameters
        forget_compiled_graphs()
