"""Layers of other implementations as layers of this package: the same function, to round-off."""

from collections.abc import Mapping
from typing import Any

import torch

from hf_compressm.models import LRUConfig, LRULayer, S5Config, S5Layer


def s5_layer_from_s5_pytorch(module: Any) -> S5Layer:
    """The layer that computes what an `S5` or `S5SSM` of s5-pytorch computes, in its precision.

    s5-pytorch reads out `Re(C x)` over all its states, hence `conj_sym=False`. Its C `(H, slots)`, or `(H, 2 slots)`
    as `[forward | backward]`, has the layout used here, and its B is stored as `(slots, H, 2)`.
    """
    ssm = getattr(module, "seq", module)
    config = S5Config(
        hidden_size=ssm.D.shape[0],
        state_size=ssm.Lambda.shape[0],
        num_hidden_layers=1,
        conj_sym=False,
        discretization=ssm.discretize.__name__.removeprefix("discretize_"),
        bidirectional=ssm.bidir,
    )
    B_re, B_im = ssm.B.detach().unbind(-1)
    parts = {"Lambda_re": ssm.Lambda.real, "Lambda_im": ssm.Lambda.imag, "C_re": ssm.C.real, "C_im": ssm.C.imag}
    return _filled(S5Layer(config), {**parts, "B_re": B_re, "B_im": B_im, "D": ssm.D, "log_step": ssm.log_step})


def lru_layer_from_reference(params: Mapping[str, Any]) -> LRULayer:
    """The layer that computes what the LRU of the CompreSSM reference computes, which stores the angle's logarithm."""
    parameters = {name: torch.as_tensor(value) for name, value in params.items()}
    parameters["theta"] = parameters.pop("theta_log").exp()
    state_size, hidden_size = parameters["B_re"].shape
    config = LRUConfig(hidden_size=hidden_size, state_size=state_size, num_hidden_layers=1)
    return _filled(LRULayer(config), parameters)


def _filled(layer: Any, parameters: Mapping[str, torch.Tensor]) -> Any:
    layer.to(parameters["D"].dtype)
    layer.load_state_dict({name: value.detach() for name, value in parameters.items()})
    return layer
