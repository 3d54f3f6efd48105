"""Declaring a layer of one's own: which of its parameters hold states."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from hf_compressm.families.family import SSMLayer
from hf_compressm.families.laws import check_laws
from hf_compressm.families.layout import Layout
from hf_compressm.families.registry import register, registered
from hf_compressm.families.running import first_rows
from hf_compressm.families.selective import SelectiveFamily
from hf_compressm.utils.randomness import undisturbed


ROWS = 2
"""Rows of a batch that the laws are tried on."""
_TRIED: set[type] = set()
"""Classes of declared layers that have kept the laws."""


@dataclass(frozen=True)
class DeclaredFamily(SelectiveFamily):
    """Layers that a user has declared."""

    def __reduce__(self) -> Any:
        """Another process has the same declaration, whose functions could not be sent."""
        return registered, (self.module_type, self.mark)


def declare_layer(
    layer_type: type[nn.Module],
    layout: Layout,
    example: tuple[Any, ...] | None = None,
    *,
    name: str = "",
    config_field: str = "",
) -> None:
    """Declare a layer of one's own, so that all that cuts layers cuts it too.

    Its recurrence must be a call of mamba-ssm's `selective_scan_fn`, `mamba_chunk_scan_combined` or `mamba_inner_fn`,
    or of `selective_scan` or `ssd_scan` of `hf_compressm.scans`: it is measured on the arguments of every such call.
    The layout is held to the laws of `hf_compressm.families.laws` on a copy of the example, or of the first layer that
    is measured, on its batch.

        declare_layer(
            BidirectionalBlock,
            Layout(
                state_size="d_state",
                output="out_proj",
                parts=(
                    states("A_log"),
                    rows("x_proj", "*", "B", "C", folds=True),
                    states("A_b_log", group=1),
                    rows("x_proj_b", "*", "B", "C", folds=True, group=1),
                ),
            ),
            example=(BidirectionalBlock(8, d_state=4), torch.randn(2, 9, 8)),
        )

    Args:
        layer_type: the class of the layer. A class that derives from it is such a layer too.
        layout: which axes of which parameters hold states.
        example: a small layer, and the positional arguments of a call of it.
        name: of the family, in plans and messages; by default that of the class.
        config_field: the field of the model's configuration that holds the state size, if there is one; a cut rewrites
            it, and all layers have one size.

    Raises:
        ValueError: if the example breaks a law, naming the law; nothing is declared then. If the class is declared
            already, under another name.
    """
    family = DeclaredFamily(
        name=name or layer_type.__name__.lower(),
        module_type=layer_type,
        size_field=config_field,
        per_layer=False,
        criteria=("interpolative", "surrogate", "fisher") if layout.folds else ("empirical", "fisher"),
        tells_texts_apart_by=frozenset({"seq_idx"}),
        layout=layout,
    )
    _TRIED.discard(layer_type)
    if example is not None:
        layer, *args = example
        check_laws(family, layer, tuple(args), {})
        _TRIED.add(layer_type)
    register(family)


def tried(
    model: nn.Module, layers: Sequence[SSMLayer], calibration: Iterable[Any] | None, forward: Callable[..., Any]
) -> Iterable[Any]:
    """Hold declared layers to their laws before they are measured for the first time, on the first batch.

    Args:
        model: the model.
        layers: that will be measured.
        calibration: batches.
        forward: runs the model on one.

    Returns:
        The batches, all of them.

    Raises:
        ValueError: naming the law that a layer breaks.
    """
    new = {type(layer.module): layer for layer in layers if isinstance(layer.family, DeclaredFamily)}
    new = {kind: layer for kind, layer in new.items() if kind not in _TRIED}
    batches = iter(calibration or ())
    if not new:
        return batches
    first = next(batches, None)
    if first is None:
        return ()
    with undisturbed(model), torch.no_grad():
        given = _given(model, list(new.values()), lambda: forward(model, first))
    for kind, layer in new.items():
        if kind in given and isinstance(layer.family, SelectiveFamily):
            check_laws(layer.family, layer.module, *given[kind])
            _TRIED.add(kind)
    return chain([first], batches)


def _given(
    model: nn.Module, layers: Sequence[SSMLayer], run: Callable[[], Any]
) -> dict[type, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What layers are called with while a model runs, for a few rows of the batch; by class."""
    found: dict[type, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(type(module), first_rows(args, kwargs, ROWS))

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(note, with_kwargs=True).remove)
        run()
    return found
