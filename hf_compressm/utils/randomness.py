"""Running a model without a trace in random generators, modes or configurations."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from hf_compressm.utils.configurations import configurations


@contextmanager
def undisturbed(model: nn.Module | None = None) -> Iterator[None]:
    """Restore the random generators of Python, NumPy and torch afterwards; with a model, its modes and configs too.

    Inside, the model is in evaluation mode. Configurations, those of its parts included, are restored because
    transformers' classifiers write `config.problem_type` into theirs when they first see labels.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what must be kept
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    settings = [(vars(config), dict(vars(config))) for config in configurations(model)]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        if model is not None:
            model.eval()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            for present, before in settings:
                present.clear()
                present.update(before)
            for module, mode in modes:
                module.training = mode
