"""What calibration shows of a selective layer: sums over the calls of its recurrences.

Symbols as in `selective.py`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from hf_compressm.families.calls import DELTA, SELECTIVE, Call, Seen, selective_inputs, signals, unrepeated
from hf_compressm.families.layout import Layout
from hf_compressm.families.running import example_of, room_for
from hf_compressm.families.sampling import spread
from hf_compressm.families.sums import Statistics
from hf_compressm.utils.devices import summing_dtype


class Selective(Protocol):
    """What a selective family says of its layers, as far as they are measured."""

    @property
    def layout(self) -> Layout:
        """Which axes of which parameters hold states."""

    @property
    def sampled_tokens(self) -> int:
        """For how many tokens of a batch B and C are kept."""

    @property
    def reads_out(self) -> bool:
        """Whether a linear map of the read-out can be folded into the layer's parameters."""

    def state_size(self, module: Any) -> int:
        """Number of states per channel."""


class RecurrenceStatistics(Statistics):
    """Sums over the calls of recurrences that a layer makes, by groups.

    Args:
        family: the family of the layer.
        module: the layer.
    """

    def __init__(self, family: Selective, module: Any) -> None:
        super().__init__()
        self.family, self.groups = family, family.layout.groups_of(module)
        self.readers = family.layout.readers_of(module)

    def update(self, seen: Seen) -> None:
        """Add up what the calls show."""
        size = self.family.state_size(seen.module)
        calls = [unrepeated(call, self.groups) for call in seen.calls]
        self.obstacle = self.obstacle or _obstacle(calls, self.family, size)
        if self.obstacle:
            return
        if self.keeps_examples:
            self.keep(seen)
        self.told_apart = any({"seq_idx", "cu_seqlens"} & call.arguments.keys() for call in calls)
        with maybe_autocast(device_type=calls[0].output.device.type, enabled=False):
            sums = [self.sums_of(call, seen.mask) for call in calls]
        tokens = [each.pop("tokens") for each in sums]
        self.add("tokens", tokens[0])
        for name in sums[0]:
            every = torch.cat([each[name] for each in sums])  # (calls * groups * readers, ...)
            if every.shape[0] % (self.groups * self.readers):
                self.obstacle = (
                    f"it calls recurrences with {every.shape[0]} group(s) of channels, and its layout has "
                    f"{self.groups * self.readers}"
                )
                return
            self.add(name, every.unflatten(0, (-1, self.groups, self.readers)).sum(dim=(0, 2)))

    def keep(self, seen: Seen) -> None:
        """Keep inputs of the layer for trying cuts, until there are enough."""
        example = example_of(seen, room_for(self.examples))
        if example is not None:
            self.examples.append(example)

    @abstractmethod
    def sums_of(self, call: Call, mask: Tensor | None) -> dict[str, Tensor]:
        """Sums of one call, `(groups, ...)` by name, and its `tokens`."""


class CovarianceStatistics(RecurrenceStatistics):
    """Loudness-weighted state covariance P and read-out covariance Q of every group; of the delta rule, keys too."""

    def sums_of(self, call: Call, mask: Tensor | None) -> dict[str, Tensor]:
        """P, Q, where a read-out cannot be folded in M, and of the delta rule K `E[k k^T]`."""
        seen = signals(call, mask)
        every, sums = seen.every, {"tokens": seen.mask.sum()}
        gains, reads = seen.gain[every - 1 :: every], seen.C[:, every - 1 :: every].transpose(0, 1)
        share = sums["tokens"] / seen.mask[:, every - 1 :: every].sum().clamp_min(1)
        start = 0
        for states in seen.states:
            weighted = states.mul_(gains[start : start + states.shape[0], ..., None])
            products = weighted.mT @ weighted  # of all channels, (chunk, batch, groups, N, N)
            moments = {"P": products.sum(dim=(0, 1))}
            if not self.family.reads_out:
                read = reads[start : start + states.shape[0]]
                moments["M"] = products.mul_(read[..., None] * read[..., None, :]).sum(dim=(0, 1))
            for name, moment in moments.items():
                moment = share * moment.to(summing_dtype(moment.device))
                sums[name] = sums[name] + moment if name in sums else moment
            self.sample(weighted, reads[start : start + states.shape[0]], start, reads.shape[0])
            start += states.shape[0]
        sums["Q"] = _second_moment((seen.C * seen.mask[..., None, None]).movedim(2, 0))
        if call.kind == DELTA:
            sums["K"] = _second_moment((seen.B * seen.mask[..., None, None]).movedim(2, 0))
        if self.family.sampled_tokens:
            places, real = spread(seen.mask.flatten(), self.family.sampled_tokens)
            for name, signal in (("B", seen.B), ("C", seen.C)):
                self.keep_rows(name, signal.flatten(0, 1)[places], real)
        return sums

    def sample(self, weighted: Tensor, reads: Tensor, first: int, count: int) -> None:
        """Keep something of a chunk of steps.

        Args:
            weighted: the states times their loudness, `(steps, batch, groups, channels, N)`.
            reads: what reads them, `(steps, batch, groups, N)`.
            first: number of the first step.
            count: how many steps there are in all chunks.
        """


class SurrogateStatistics(RecurrenceStatistics):
    """The averages that the paper's surrogate needs: of `exp(Delta A)`, `Delta B` and C."""

    def sums_of(self, call: Call, mask: Tensor | None) -> dict[str, Tensor]:
        """The three averages of every group."""
        seen = selective_inputs(call, mask=mask)
        groups = seen.B.shape[1]
        delta, A = seen.delta.unflatten(1, (groups, -1)), seen.A.unflatten(0, (groups, -1))
        sums = {"tokens": seen.mask.sum(), "c": seen.C.sum(dim=(0, 3))}
        for step in range(delta.shape[-1]):
            size = delta[..., step]  # (batch, groups, channels)
            decay = torch.exp(size[..., None] * A) * seen.mask[:, step, None, None, None]
            moments = {"a": decay.sum(dim=0), "b": torch.einsum("bgd,bgn->gdn", size, seen.B[..., step])}
            for name, moment in moments.items():
                moment = moment.to(summing_dtype(moment.device))
                sums[name] = sums[name] + moment if name in sums else moment
        return sums


def _obstacle(calls: Sequence[Call], family: Selective, size: int) -> str:
    """Why the calls of a layer cannot be measured, or ""."""
    if not calls:
        return (
            "no recurrence was seen while it ran: its forward calls none of selective_scan_fn, "
            "mamba_chunk_scan_combined, chunk_gated_delta_rule, selective_scan and ssd_scan"
        )
    if any(call.gain is None for call in calls):
        return f"its {family.layout.output} did not run after its recurrence"
    for call in calls:
        given = [call.arguments.get(name) for name in ("A", "B", "C")]
        if any(isinstance(each, Tensor) and each.is_complex() for each in given):
            return "its recurrence is complex"
        if call.kind == SELECTIVE and any(call.arguments[name].dim() == 2 for name in ("B", "C")):
            return "its B or C is the same at every step: it is not selective"
        found = call.arguments["A"].shape[1] if call.kind == SELECTIVE else call.arguments["B"].shape[-1]
        if found != size:
            return f"its recurrence has {found} states, and its {family.layout.state_size} is {size}"
    return ""


def _second_moment(signal: Tensor) -> Tensor:
    """Sum of outer products of `(groups, ..., rows, N)` over all but the groups, `(groups, N, N)`.

    One product per entry of the middle axes: a single product would first copy the states, which are transposed.
    """
    return (signal.mT @ signal).flatten(1, -3).sum(dim=1)
