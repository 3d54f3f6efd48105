"""What a loss says of layers and their recurrences: gradients by their outputs, from one backward pass for a batch.

The gain of a channel is then the size of the loss's gradient there, in place of the loudness that `watching.py` takes
from the output projection. With it the second moments of `moments.py` are the diagonal of the empirical Fisher matrix
by the outputs of a recurrence, where half of the trace of `Q P` is what the loss would rise by, per token, if nothing
of the recurrence got through. No parameter gets a gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_compressm.families.calls import Seen
from hf_compressm.families.sums import Statistics


IGNORED = -100
"""The label of what is not scored, as in `transformers`."""


@dataclass(frozen=True, eq=False)
class Waiting:
    """A forward call of a layer that waits for the loss.

    Attributes:
        seen: the call.
        output: of the layer, a part of the graph.
        statistics: what is told of it.
    """

    seen: Seen
    output: Tensor
    statistics: Statistics


def tell(waiting: Sequence[Waiting], loss: Tensor, scored: int) -> None:
    """Give every call that waits to its statistics, with the gradients of the loss.

    Args:
        waiting: the calls of one batch.
        loss: its mean loss, a scalar.
        scored: number of tokens, or of examples, that it is the mean of; 0 for all tokens of the batch.

    Raises:
        ValueError: if the loss does not depend on the model.
    """
    if not loss.requires_grad:
        raise ValueError("its loss does not depend on what the model computes, so that it has no gradient")
    outputs = [tensor for each in waiting for tensor in (each.output, *(call.output for call in each.seen.calls))]
    gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    with torch.no_grad():
        for each in waiting:
            gradient, mask = next(gradients), each.seen.mask
            tokens = each.output[..., 0].numel() if mask is None else int(mask.sum())
            for call in each.seen.calls:
                found = next(gradients)
                share = ((scored or tokens) * tokens) ** 0.5
                call.gain = torch.zeros_like(call.output) if found is None else found.abs() * share
            each.statistics.observe(replace(each.seen, gradient=gradient, scored=scored or tokens))


def loss_of(result: Any) -> Tensor:
    """The loss in what a model, or a function of it, has returned.

    Raises:
        ValueError: if there is none.
    """
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", result)
    if not isinstance(loss, Tensor) or loss.dim():
        raise ValueError(
            f"criterion='fisher' needs a loss, and the model returned a {type(result).__name__} without one; batches "
            "must hold labels"
        )
    return loss


def scored_in(batch: Any) -> int:
    """How many of a batch's labels count in the loss of a causal model or a classifier; 0 if it shows none."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return 0
    counted = labels[:, 1:] if labels.dim() == 2 and not labels.is_floating_point() else labels
    return int((counted != IGNORED).sum()) if labels.dim() < 3 else 0


def second_order(terms: Tensor, scored: Tensor) -> float:
    """The expected change of the mean loss; the Hessian is taken to be the empirical Fisher matrix.

    Args:
        terms: `(rows,)`, gradient of the summed loss of a row times the change of a layer's output, over `scored`.
        scored: `(rows,)`, tokens of a row in the loss.
    """
    return float(terms.mean() + 0.5 * (scored * terms.square()).mean())
