"""Layers of other implementations as layers of this package: the same function, to round-off.

Glossary:
    slots    stored complex states
    H        features
    module   an `S5` or `S5SSM` of the package s5-pytorch (https://github.com/i404788/s5-pytorch)
    params   the LRU parameters of the CompreSSM reference (https://github.com/camail-official/compressm)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .configuration_lru import LRUConfig
from .configuration_s5 import S5Config
from .modeling_lru import LRULayer
from .modeling_s5 import S5Layer


LRU_REFERENCE_PARAMETERS = ("nu_log", "theta_log", "B_re", "B_im", "C_re", "C_im", "D", "gamma_log")


def s5_layer_from_s5_pytorch(module: nn.Module, discretization: str | None = None) -> S5Layer:
    """Builds the [`S5Layer`] that computes what an s5-pytorch layer computes, in the module's precision.

    s5-pytorch reads out `Re(C x)` over all its states, so the result has `conj_sym=False`; its C `(H, slots)`, or
    `(H, 2 slots)` as `[forward | backward]`, has the layout used here, and its B is stored as `(slots, H, 2)`.

    Args:
        module: An `s5.s5_model.S5` or its inner `S5SSM`.
        discretization: `"zoh"` or `"bilinear"`; by default read off the module.

    Raises:
        ValueError: When the module is not such a layer, or of a kind that has no counterpart here (liquid, higher
            degree, factorized B and C).
    """
    ssm: Any = getattr(module, "seq", module)
    missing = [name for name in ("Lambda", "B", "C", "D", "log_step") if not hasattr(ssm, name)]
    if missing:
        raise ValueError(
            f"{type(module).__name__} has no {', '.join(missing)}; pass an s5-pytorch `S5` or `S5SSM` with "
            "dense B and C (`factor_rank=None`)."
        )
    if ssm.liquid or ssm.degree != 1:
        raise ValueError(
            f"The layer has liquid={ssm.liquid} and degree={ssm.degree}; only linear time-invariant layers "
            "(`liquid=False, degree=1`) can be converted."
        )
    if discretization is None:
        discretization = ssm.discretize.__name__.removeprefix("discretize_")
    config = S5Config(
        hidden_size=ssm.D.shape[0],
        state_size=ssm.Lambda.shape[0],
        num_hidden_layers=1,
        conj_sym=False,
        discretization=discretization,
        bidirectional=ssm.bidir,
    )
    B_re, B_im = ssm.B.detach().unbind(-1)
    parameters = {
        "Lambda_re": ssm.Lambda.real,
        "Lambda_im": ssm.Lambda.imag,
        "B_re": B_re,
        "B_im": B_im,
        "C_re": ssm.C.real,
        "C_im": ssm.C.imag,
        "D": ssm.D,
        "log_step": ssm.log_step,
    }
    return _filled(S5Layer(config), parameters)


def lru_layer_from_reference(params: Mapping[str, Any]) -> LRULayer:
    """Builds the [`LRULayer`] that computes what the CompreSSM reference's LRU layer computes.

    The reference stores the logarithm of the phase angle; the angle itself is `exp(theta_log)`, also where a cut has
    left `theta_log = -inf`, which is angle 0.

    Args:
        params: `nu_log`, `theta_log`, `gamma_log` `(N,)`, `B_re`, `B_im` `(N, H)`, `C_re`, `C_im` `(H, N)` and `D`
            `(H,)`, as numpy arrays or anything numpy can read. Their precision is kept.

    Raises:
        ValueError: When one of them is missing.
    """
    missing = [name for name in LRU_REFERENCE_PARAMETERS if name not in params]
    if missing:
        raise ValueError(f"`params` lacks {', '.join(missing)}; it needs {', '.join(LRU_REFERENCE_PARAMETERS)}.")
    parameters = {name: torch.from_numpy(np.array(params[name])) for name in LRU_REFERENCE_PARAMETERS}
    parameters["theta"] = parameters.pop("theta_log").exp()
    state_size, hidden_size = parameters["B_re"].shape
    config = LRUConfig(hidden_size=hidden_size, state_size=state_size, num_hidden_layers=1)
    return _filled(LRULayer(config), parameters)


def _filled(layer: Any, parameters: Mapping[str, torch.Tensor]) -> Any:
    """Returns `layer` with copies of `parameters`, in their precision."""
    layer.to(parameters["D"].dtype)
    layer.load_state_dict({name: value.detach() for name, value in parameters.items()})
    return layer


__all__ = ["lru_layer_from_reference", "s5_layer_from_s5_pytorch"]
