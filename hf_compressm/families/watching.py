"""Seeing the recurrence of a layer as the layer calls it: its arguments, and how loud each of its channels becomes.

While layers are watched, stand-ins take the places of the functions in `recurrences.py`. One that is called while a
watched layer runs notes the arguments, and runs the function itself. What a layer computes is the same; masks, biases,
multipliers and packing are in the arguments. Calls inside a call are not seen, nor those of a backward pass, in which
gradient checkpointing runs a layer again.

The loudness of a channel is the derivative of the layer's output with respect to the recurrence's: a vector-Jacobian
product from the input of the output projection, whatever gates and norms stand between.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.families.calls import Call, Seen, bound, first_tensor
from hf_compressm.families.family import (
    SSMLayer,
)
from hf_compressm.families.gradients import Waiting
from hf_compressm.families.norms import AfterRecurrence
from hf_compressm.families.recurrences import replaced
from hf_compressm.families.sums import Statistics
from hf_compressm.peft import effective_weight


class Watch:
    """Watches one layer, and gives what it sees to its statistics.

    Args:
        layer: the layer.
        statistics: what is told of every forward call.
        running: the watches whose layers run at present, the innermost last.
        waiting: where calls are kept until the gradients of a loss are there; None if no loss is looked at.
    """

    def __init__(
        self, layer: SSMLayer, statistics: Statistics, running: list["Watch"], waiting: list[Waiting] | None = None
    ) -> None:
        self.layer, self.statistics, self._running, self._waiting = layer, statistics, running, waiting
        self._calls: list[Call] = []
        self._records = False  # whether gradients are recorded, as in a training step
        self._after: AfterRecurrence | None = None
        self._given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the layer meanwhile."""
        module, family = self.layer.module, self.layer.family
        switches = {name: getattr(module, name) for name in family.unfused if hasattr(module, name)}
        with ExitStack() as stack:
            for name in switches:
                setattr(module, name, family.unfused[name])
                stack.callback(setattr, module, name, switches[name])
            hooks = [
                module.register_forward_pre_hook(self._begin, with_kwargs=True),
                # before the hooks of FSDP, which frees the layer's parameters, that arguments may share memory with
                module.register_forward_hook(self._end, prepend=True, always_call=True),
            ]
            output = family.output_of(module)
            if output is not None:
                hooks.append(output.register_forward_pre_hook(self._at_output))
            for hook in hooks:
                stack.callback(hook.remove)
            yield

    def run(self, kind: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a recurrence that the layer calls, and note the call."""
        self._running.append(_BUSY)
        try:
            with torch.set_grad_enabled(self._records):
                result = function(*args, **kwargs)
        finally:
            self._running.pop()
        output, *others = result if isinstance(result, tuple) else (result,)
        call = Call(kind, bound(kind, function, args, kwargs), output)
        self._calls.append(call)
        projection: Any = self.layer.family.output_of(self.layer.module)
        if projection is not None:
            if not output.requires_grad:  # what lies between recurrence and output projection is differentiated
                call.output = output.detach().requires_grad_()
                torch.set_grad_enabled(True)
            if self._after is None and self._waiting is None:
                self._after = AfterRecurrence(getattr(projection, "weight", None), self.heard)
                self._after.__enter__()
            if self._after is not None:
                self._after.is_on = True
            output = call.output.clone()  # not a leaf, which could not be changed in place
        return (output, *others) if isinstance(result, tuple) else output

    def heard(self, signal: Tensor, weight: Tensor) -> Tensor:
        """Take the loudness of all channels from the input of the output projection.

        Args:
            signal: the input, with channels in the axis that the weight multiplies.
            weight: of the projection, `(out, channels, ...)`.
        """
        calls = [call for call in self._calls if call.gain is None]
        if self._waiting is not None or not calls or not signal.requires_grad or self._after is None:
            return signal
        self._after.is_on = False
        cotangent = _loudness(weight.detach(), signal)
        mask = self._mask
        if mask is not None and signal.shape[:2] == mask.shape:
            cotangent = cotangent * mask.view(*mask.shape, *[1] * (signal.dim() - 2)).to(signal.dtype)
        outputs = [call.output for call in calls]
        with self._after.constant_norms():
            gains = torch.autograd.grad(signal, outputs, cotangent, retain_graph=self._records, allow_unused=True)
        for call, gain in zip(calls, gains, strict=True):
            call.gain = torch.zeros_like(call.output) if gain is None else gain.abs()
        if self._records:
            return signal
        torch.set_grad_enabled(False)
        return signal.detach()

    @property
    def _mask(self) -> Tensor | None:
        return self._given[1].get(self.layer.family.mask)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls, self._given, self._records = [], (args, kwargs), torch.is_grad_enabled()
        self._running.append(self)

    def _at_output(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._running or self._running[-1] is not self or not self._calls:
            return None
        self._running.append(_BUSY)  # with adapters, this runs the projection
        try:
            weight = effective_weight(module)
        finally:
            self._running.pop()
        return (self.heard(args[0], weight), *args[1:])

    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        """Hand over what was seen; this is called after an error too."""
        if self._after is not None:
            self._after.__exit__(None, None, None)
            self._after = None
        if self._running and self._running[-1] is self:
            self._running.pop()
        if not self._records:
            torch.set_grad_enabled(False)
        calls, self._calls = self._calls, []
        if result is None or in_backward():
            return
        seen = Seen(module, *self._given, self._mask, calls)
        if self._waiting is not None:
            self._waiting.append(Waiting(seen, first_tensor(result), self.statistics))
            return
        with torch.no_grad():
            self.statistics.observe(seen)


_BUSY: Any = object()
"""Stands for a recurrence that runs: what it calls is not seen."""


@contextmanager
def watching(
    model: nn.Module, watched: Sequence[tuple[SSMLayer, Statistics]], waiting: list[Waiting] | None = None
) -> Iterator[None]:
    """Give every forward call of the layers to their statistics meanwhile.

    Args:
        model: the model that they are layers of.
        watched: layers with their statistics.
        waiting: takes the calls instead, for `gradients.tell`.
    """
    running: list[Watch] = []

    def stand_in(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def seen(*args: Any, **kwargs: Any) -> Any:
            if not running or running[-1] is _BUSY or in_backward():
                return function(*args, **kwargs)
            return running[-1].run(kind, function, args, kwargs)

        return seen

    def heard(signal: Tensor, weight: Tensor) -> Tensor:
        return running[-1].heard(signal, weight) if running and running[-1] is not _BUSY else signal

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer, statistics in watched:
            stack.enter_context(Watch(layer, statistics, running, waiting).attached())
        stack.enter_context(replaced(model, stand_in, heard))
        yield


def in_backward() -> bool:
    """Whether a backward pass runs in this thread: gradient checkpointing runs layers again there."""
    return bool(torch._C._current_graph_task_id() != -1)


def _loudness(weight: Tensor, signal: Tensor) -> Tensor:
    """How much every channel of a projection's input `signal` changes its output, with a sign for each channel.

    The signs look like random ones: what a norm mixes does not add up.

    Args:
        weight: `(out, channels)` for channels in the last axis, `(out, channels, ...)` for those of a convolution.
        signal: `(batch, ..., channels)`, or `(batch, channels, ...)`.
    """
    columns = weight.movedim(1, 0).flatten(1).norm(dim=1).to(signal)
    number = torch.arange(columns.numel(), device=columns.device)
    signs = 1 - 2 * ((number * 2654435761 >> 13) & 1)  # Knuth's multiplicative hashing
    shape = [1] * signal.dim()
    shape[-1 if weight.dim() == 2 else 1] = -1
    return (columns * signs).view(shape).expand_as(signal)
