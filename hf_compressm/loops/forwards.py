"""The last batches of a loop of one's own: what its model's forward was given in training mode."""

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn

from hf_compressm.loops.recent import Batch, RecentBatches


class ForwardBatches(RecentBatches):
    """The last batches that a model was called with in training mode, with gradients.

    A hook sees them only while they are wanted. Nothing of it stays in a copy of the model.

    Args:
        model: the model that the loop calls.
        steps_done: returns the number of steps that are done.

    Attributes:
        autocast: kind of device and dtype of the autocast under which the model was called last, or None.
    """

    def __init__(self, model: nn.Module, steps_done: Callable[[], int]) -> None:
        """Keep nothing yet."""
        super().__init__()
        self.autocast: tuple[str, torch.dtype] | None = None
        self._model = model
        self._steps_done = steps_done
        self._unhook: Callable[[], Any] | None = None

    def want(self, wanted: bool) -> None:
        """Hook into the model while its batches are wanted."""
        super().want(wanted)
        if wanted and self._unhook is None:
            handle = self._model.register_forward_pre_hook(_Hook(self), with_kwargs=True)
            self._unhook = weakref.finalize(self, handle.remove)  # also where a loop ends before its last measurement
        elif not wanted and self._unhook is not None:
            self._unhook()
            self._unhook = None

    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what the model is called with, if that is for training."""
        if not (model.training and torch.is_grad_enabled()):
            return
        parameter = next(model.parameters(), None)
        kind = "cpu" if parameter is None else parameter.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        inputs, others = (recursively_apply(torch.detach, part) for part in (args, dict(kwargs)))
        self.keep(Batch(inputs, others, self._steps_done()))

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """Call the model as the loop has called it."""
        again = batch.copy()
        with nullcontext() if self.autocast is None else torch.autocast(self.autocast[0], self.autocast[1]):
            return model(*again.inputs, **again.others)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss that the model itself returns.

        Raises:
            ValueError: if it returns none.
        """
        outputs = self.run(model, batch)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            raise ValueError(
                "max_loss_increase and criterion='fisher' need a loss, and "
                f"{type(model).__name__} returns none when it is called as in training. Give it labels; or for a "
                "guard pass held_out_loss= a function that returns a loss on held-out data."
            )
        return loss

    @property
    def absence(self) -> str:
        """A loop that goes around the model's forward needs a loader."""
        return (
            f"A step was made without calling {type(self._model).__name__} in training mode with gradients, where the "
            "batches for calibration are taken. Call model.train() before the loop; or, if the loop does not call the "
            "model itself, pass batches of model inputs: Compressor(..., calibration=loader)."
        )

    @property
    def origin(self) -> str:
        """The batch comes from a call of the model, and goes there again."""
        return (
            f"It is the batch with which {type(self._model).__name__} was called last in the first step, run again in "
            "evaluation mode. If that cannot work, pass batches of model inputs, "
            "Compressor(..., calibration=loader), and held_out_loss= for a guard."
        )


class _Hook:
    """Passes what a model is called with on to the batches, as long as these exist; a copy passes nothing on."""

    def __init__(self, batches: ForwardBatches | None = None) -> None:
        self._batches = (lambda: None) if batches is None else weakref.ref(batches)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches = self._batches()
        if batches is not None:
            batches.see(model, args, kwargs)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()
