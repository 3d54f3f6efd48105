"""Scores by which rivals rank the states of Mamba-2, from weights, activations and gradients of the whole model.

| symbol | meaning | shape |
|---|---|---|
| W | the row of `in_proj` that makes a state's B, or its C | `(hidden,)` |
| B, C | as the recurrence takes them, after convolution and SiLU | `(batch, length, groups, N)` |
| dt | step sizes as `in_proj` gives them, before bias and softplus | `(batch, length, heads)` |
| L | mean loss of a sequence | |
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.families import SSMLayer, find_layers
from hf_compressm.families.gradients import scored_in
from hf_compressm.families.recurrences import replaced
from hf_compressm.scans import ssd_scan


Batches = Sequence[Mapping[str, Tensor]]


@torch.no_grad()
def magnitude(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """By weights alone, `|W of B| |W of C|`: magnitude pruning of a state, both of whose rows go together.

    The table of arXiv 2602.11408 has this rival, and does not say how it joins the two.
    """
    scores = {}
    for layer in find_layers(model):
        squares = rows_of_states(layer, layer.module.in_proj.weight.double().square())
        scores[layer.name] = squares.sum(dim=-1).sqrt().prod(dim=0)
    return scores


def taylor_of_weights(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """By a second-order Taylor expansion in the weights, the mean of `W^2 E[(dL/dW)^2]` over the rows of B and of C.

    Source: arXiv 2502.18886 and the code that comes with it (`dstate_taylor_importance_aux`, order 2, with squared
    gradients in place of the Hessian, `taylor_second`). It squares gradients of batches; here they are those of single
    sequences, which is what the empirical Fisher matrix asks for.
    """
    layers = find_layers(model)
    weights = [layer.module.in_proj.weight for layer in layers]
    squares = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    model.eval()
    for batch in batches:
        for row in range(batch["input_ids"].shape[0]):
            loss = model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss
            for total, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
                total += gradient.double().square()
    found = {}
    with torch.no_grad():
        for layer, weight, total in zip(layers, weights, squares, strict=True):
            found[layer.name] = rows_of_states(layer, weight.double().square() * total).mean(dim=-1).sum(dim=0)
    return found


def taylor_of_masks(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """By a second-order Taylor expansion in a mask on each state: what the loss is expected to rise by without it.

    With g the gradient of a sequence's mean loss by the mask, and T its scored tokens, `|-E[g] + E[T g^2] / 2|`: the
    Hessian is taken to be the empirical Fisher matrix. Not a published rule: the strongest of its kind that we know.
    """
    layers = find_layers(model)
    first: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    scored: list[Tensor] = []
    model.eval()
    for batch in batches:
        rows = batch["input_ids"].shape[0]
        with recurrences_seen(model) as calls:
            loss = model(**batch).loss
        reads = [call["C"] for call in calls]
        for layer, C, gradient in zip(layers, reads, torch.autograd.grad(loss, reads), strict=True):
            first[layer.name].append(rows * (C.detach() * gradient).double().sum(dim=1))  # (batch, groups, N)
        scored.append(torch.full((rows, 1, 1), scored_in(batch) / rows, dtype=torch.float64))
    tokens, found = torch.cat(scored), {}
    for name, parts in first.items():
        gradients = torch.cat(parts)
        found[name] = (-gradients.mean(dim=0) + (tokens * gradients.square()).mean(dim=0) / 2).abs()
    return found


@torch.no_grad()
def activations(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """By `sqrt(E[C^2])` times the sum of `sqrt(E[(dt B)^2])` over the heads of a group: inputs, not states.

    Source: UniQL, arXiv 2512.03383, `ssd_BC_compression` in the code that comes with it, which takes column norms of
    the roots of the two correlation matrices: these norms are roots of their diagonals. It also gives every layer a
    size of its own, in steps of 16, and cuts the head dimension too; a stock class has one size, so only the order is
    compared here.
    """
    layers = find_layers(model)
    inputs = {layer.name: torch.zeros((), dtype=torch.float64) for layer in layers}
    reads = dict(inputs)
    model.eval()
    for batch in batches:
        with recurrences_seen(model) as calls:
            model(**batch)
        for layer, call in zip(layers, calls, strict=True):
            B, C, dt = (call[name].double() for name in ("B", "C", "dt"))
            dt = dt.unflatten(2, (B.shape[2], -1))  # (batch, length, groups, heads of a group)
            inputs[layer.name] = inputs[layer.name] + torch.einsum("blgh,blgn->ghn", dt.square(), B.square())
            reads[layer.name] = reads[layer.name] + C.square().sum(dim=(0, 1))
    return {name: inputs[name].sqrt().sum(dim=1) * reads[name].sqrt() for name in inputs}


def rows_of_states(layer: SSMLayer, rows: Tensor) -> Tensor:
    """Of rows like those of `in_proj`, the ones that make B and C, `(2, groups, N, ...)`."""
    groups, heads = int(layer.module.n_groups), int(layer.module.A_log.numel())
    width = 2 * groups * layer.state_size
    return rows[-heads - width : -heads].unflatten(0, (2, groups, layer.state_size))


@contextmanager
def recurrences_seen(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every recurrence that runs inside, by their names in `ssd_scan`, in the order of the layers."""
    calls: list[dict[str, Any]] = []
    names = list(inspect.signature(ssd_scan).parameters)
    running = [False]  # a recurrence may call another one

    def stand_in(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def seen(*args: Any, **kwargs: Any) -> Any:
            if running[0]:
                return function(*args, **kwargs)
            calls.append(dict(zip(names, args, strict=False)) | kwargs)
            running[0] = True
            try:
                return function(*args, **kwargs)
            finally:
                running[0] = False

        return seen

    with replaced(model, stand_in, lambda signal, weight: signal):
        yield calls
