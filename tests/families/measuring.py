"""What layers show of themselves when they run by themselves."""

from typing import Any

from torch import Tensor, nn

from hf_compressm.families import CutMethod, collect_statistics, find_layers
from hf_compressm.families.calls import Seen, Signals, signals
from hf_compressm.families.sums import Statistics
from hf_compressm.families.watching import watching


class Recorded(Statistics):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []

    def update(self, seen: Seen) -> None:
        self.seen.append(seen)


def run(layer: nn.Module, criterion: str, *calls: tuple[Tensor, dict[str, Any]]) -> Statistics:
    """The statistics of a layer that is called by itself, each time with a signal and further arguments."""

    def forward(module: nn.Module, call: Any) -> None:
        module(call[0], **call[1])

    (found,) = collect_statistics(layer, find_layers(layer), [CutMethod(criterion)], calls, forward)
    assert found is not None
    return found


def calls_of(model: nn.Module, batch: dict[str, Tensor]) -> list[Seen]:
    """What every layer of a model shows of itself on one batch."""
    recorded = [(layer, Recorded()) for layer in find_layers(model)]
    with watching(model, recorded):
        model(**batch)
    return [seen for _, item in recorded for seen in item.seen]


def signals_of(model: nn.Module, batch: dict[str, Tensor]) -> list[list[Signals]]:
    """The signals of every call of every layer."""
    return [[signals(call, seen.mask) for call in seen.calls] for seen in calls_of(model, batch)]
