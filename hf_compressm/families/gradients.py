"""What a loss says of layers and their recurrences: gradients by their outputs, from one backward pass for a batch.

The gain of a channel is then the size of the loss's gradient there, in place of the loudness that `watching.py` takes
from the output projection: `|dL/dy| sqrt(scored tokens)`, with the mean loss L of `scored` tokens. The second moments
of `moments.py` are then weighted by the diagonal of the empirical Fisher matrix by the outputs of a recurrence. Half
of the sum of M, which `tr(Q P)` estimates, is what L would rise by if nothing of the recurrence got through. No
parameter gets a gradient.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from hf_compressm.families.calls import Seen, tokens_of
from hf_compressm.families.sums import Statistics
from hf_compressm.utils.devices import summing_dtype


logger = logging.get_logger(__name__)

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


def tell(waiting: Sequence[Waiting], loss: Tensor, scored: int | None) -> None:
    """Give every call that waits to its statistics, with the gradients of the loss.

    The sum of the losses is differentiated, and not their mean, whose gradients are too small for 16 bits.

    Args:
        waiting: the calls of one batch.
        loss: its mean loss, a scalar.
        scored: number of tokens, or of examples, that it is the mean of; None for all tokens of the batch. A batch of
            which nothing is scored is left out.

    Raises:
        ValueError: if the loss does not depend on the layers.
    """
    if scored == 0:
        logger.warning_once("Calibration leaves out batches all of whose labels are ignored: they have no loss.")
    if not waiting or scored == 0:
        return
    count = scored or _tokens(waiting[0])
    outputs = [tensor for each in waiting for tensor in (each.output, *(call.output for call in each.seen.calls))]
    recorded = [tensor for tensor in outputs if tensor.requires_grad]
    found = torch.autograd.grad(count * loss, recorded, allow_unused=True) if loss.requires_grad else ()
    gradients = {id(tensor): each for tensor, each in zip(recorded, found, strict=False) if each is not None}
    if not gradients:
        raise ValueError("its loss does not depend on what the layers compute, so that it has no gradient there")
    times = Counter(id(each.statistics) for each in waiting)
    with torch.no_grad():
        for each in waiting:
            for call in each.seen.calls:
                gradient = gradients.get(id(call.output))
                call.gain = torch.zeros_like(call.output) if gradient is None else gradient.abs()
                tokens = tokens_of(call, each.seen.mask)
                call.gain = call.gain * (tokens.to(summing_dtype(tokens.device)) / count).sqrt()
            # the rows of a layer that runs twice in a batch belong together, and no example knows of the other
            gradient = gradients.get(id(each.output)) if times[id(each.statistics)] == 1 else None
            each.statistics.observe(replace(each.seen, gradient=gradient, scored=count))


def _tokens(call: Waiting) -> int:
    """Real tokens of a call."""
    return call.output[..., 0].numel() if call.seen.mask is None else int(call.seen.mask.sum())


def loss_of(result: Any) -> Tensor:
    """The loss in what a model, or a function of it, has returned.

    Raises:
        ValueError: if there is none.
    """
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", result)
    if not isinstance(loss, Tensor) or loss.dim():
        raise ValueError(
            f"criterion='fisher' needs a loss, and the model returned a {type(result).__name__} without one. Add "
            "labels to the batch, or choose another criterion."
        )
    return loss


def scored_in(batch: Any) -> int | None:
    """How many of a batch's labels count in the loss of a causal model or a classifier; None if it shows none.

    Args:
        batch: a dict of model inputs, or an object that holds them as `inputs` or `others`.
    """
    parts = [batch] if isinstance(batch, Mapping) else [getattr(batch, name, None) for name in ("inputs", "others")]
    labels = next((part["labels"] for part in parts if isinstance(part, Mapping) and "labels" in part), None)
    if not isinstance(labels, Tensor) or labels.dim() > 2:
        return None
    of_tokens = labels.dim() == 2 and labels.shape[1] > 1 and not labels.is_floating_point()
    return int(((labels[:, 1:] if of_tokens else labels) != IGNORED).sum())


def second_order(terms: Tensor, scored: Tensor) -> float:
    """The expected change of the mean loss; the Hessian is taken to be the empirical Fisher matrix.

    Args:
        terms: `(rows,)`, what the change of a layer's output adds to a row's mean loss, to first order.
        scored: `(rows,)`, tokens of a row in the loss, on average.
    """
    return float(terms.mean() + 0.5 * (scored * terms.square()).mean())
