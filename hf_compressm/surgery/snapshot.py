"""Undoing a cut: references to everything that it may change.

A cut replaces tensors and never writes into them, so nothing needs to be copied. What is put back is the original, bit
for bit. The only cost of a snapshot is that the replaced tensors stay in memory as long as it exists.
"""

from typing import Any

from torch import nn

from hf_compressm.surgery.optimizer import unwrap
from hf_compressm.utils.configurations import configurations


class Snapshot:
    """A model's structure, its configurations and its optimizer's state as they are now.

    Args:
        model: any module.
        optimizer: the optimizer that trains it, if any; a torch optimizer or accelerate's wrapper.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None) -> None:
        """Take the snapshot."""
        holders = [*model.modules(), *configurations(model)]
        self._classes = [(holder, type(holder)) for holder in holders]
        self._contents = [(vars(holder), dict(vars(holder))) for holder in holders]
        for module in model.modules():  # parameters, buffers and hooks are in dicts of their own
            self._contents += [(value, dict(value)) for value in vars(module).values() if isinstance(value, dict)]
        self._groups: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        if optimizer is not None:
            inner = unwrap(optimizer)
            self._groups = [(group, list(group["params"])) for group in inner.param_groups]
            self._contents += [(state, dict(state)) for state in (inner.state, *inner.state.values())]

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
