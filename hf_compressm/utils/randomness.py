"""Running a model without a trace in random generators, modes or config."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module | None = None) -> Iterator[None]:
    """Restore the random generators of Python, NumPy and torch afterwards; with a model, its modes and config too.

    Inside, the model is in evaluation mode. Its config is restored because transformers' classifiers write
    `config.problem_type` into it when they first see labels.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what must be kept
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    settings = getattr(getattr(model, "config", None), "__dict__", {})
    before = dict(settings)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        if model is not None:
            model.eval()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            settings.clear()
            settings.update(before)
            for module, mode in modes:
                module.training = mode
