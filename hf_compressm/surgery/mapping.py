"""How gradients and moments of parameters follow a cut: the linear maps that a family gives with each change."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_compressm.families.changes import MomentTerm
from hf_compressm.families.complex_terms import ComplexTerm
from hf_compressm.families.maps import apply_map
from hf_compressm.surgery.parameters import Replacement
from hf_compressm.utils.devices import lacks_float64, on_host, to_device


def mapped(terms: Sequence[MomentTerm], value_of: Callable[[nn.Parameter], Tensor], squared: bool = False) -> Tensor:
    """Sum of the mapped values of all sources, in the first one's dtype and on its device.

    Args:
        terms: the terms of a change.
        value_of: the gradient or moment of a source.
        squared: whether the values are second moments, which take the squared entries of the maps. Those of a complex
            parameter hold the squares of the real and of the imaginary part, as torch's optimizers keep them.
    """
    values = dict(enumerate(value_of(term.source) for term in terms))
    device, dtype = values[0].device, values[0].dtype
    if lacks_float64(device) and any(term.matrix.is_floating_point() for term in terms):
        values = on_host(values)
    parts = [_apply(term, values[place], squared) for place, term in enumerate(terms)]
    return to_device(torch.stack(parts).sum(dim=0).to(dtype), device).contiguous()


def carry_gradients(replacements: Sequence[Replacement]) -> None:
    """Give the new parameters the gradients that were accumulated so far; the old ones keep theirs.

    A gradient follows as a first moment does, by the adjoint of the change of basis. A source without a gradient
    counts as zero beside one that has it.
    """
    for item in replacements:
        terms, own = item.change.moments, item.change.parameter
        if any(term.source.grad is not None for term in terms):
            item.new.grad = mapped(terms, _gradient).to(own.dtype if own.grad is None else own.grad.dtype)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def _apply(term: MomentTerm, value: Tensor, squared: bool) -> Tensor:
    """Apply the term's map along its axis, as `apply_map` does."""
    if isinstance(term, ComplexTerm):
        return _apply_to_pairs(term, value, squared)
    if value.is_complex():
        along = replace(term, dim=term.dim % value.dim())
        return torch.view_as_complex(_apply(along, _pairs(value), squared).contiguous())
    return apply_map(value, term.matrix, term.dim, squared)


def _apply_to_pairs(term: ComplexTerm, value: Tensor, squared: bool) -> Tensor:
    """Apply a map of `[Re; Im]` to complex numbers, or to real ones with both parts in their last axis."""
    pairs = _pairs(value)
    plain = MomentTerm(term.source, term.matrix, term.dim % (pairs.dim() - 1))
    stacked = _apply(plain, torch.cat(pairs.unbind(-1), dim=plain.dim), squared)
    moved = torch.stack(stacked.chunk(2, dim=plain.dim), dim=-1)
    return torch.view_as_complex(moved) if value.is_complex() else moved


def _pairs(value: Tensor) -> Tensor:
    """Real and imaginary parts in a last axis."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
