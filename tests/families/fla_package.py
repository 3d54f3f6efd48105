"""The layers of flash-linear-attention itself on a CPU: its naive references stand for its kernels."""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


NORM_EPS = 1e-6
"""Of the squared length of queries and keys, `fla.modules.l2norm`."""


def package() -> ModuleType:
    """`fla.layers`, or the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells that there is no GPU
        return pytest.importorskip("fla.layers")


def _found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _by_text(
    run: Callable[..., tuple[Tensor, Any]], cu_seqlens: Tensor | None, *signals: Tensor
) -> tuple[Tensor, None]:
    """A reference on every text of a row by itself."""
    if cu_seqlens is None:
        return run(*signals)[0], None
    bounds = pairwise(cu_seqlens.tolist())
    parts = [run(*(signal[:, start:end] for signal in signals))[0] for start, end in bounds]
    return torch.cat(parts, dim=1), None


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + NORM_EPS).sqrt()


def _step(beta: Tensor, use_beta_sigmoid_in_kernel: bool, allow_neg_eigval: bool) -> Tensor:
    if not use_beta_sigmoid_in_kernel:
        return beta
    return beta.sigmoid() * (2 if allow_neg_eigval else 1)


def _shared(x: Tensor, values: Tensor) -> Tensor:
    return x.repeat_interleave(values.shape[2] // x.shape[2], dim=2)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    cu_seqlens: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`chunk_gated_delta_rule` and `fused_recurrent_gated_delta_rule`."""
    if use_qk_l2norm_in_kernel:
        q, k = _unit(q), _unit(k)
    if use_gate_in_kernel:
        g = _found("fla.ops.gated_delta_rule.gate.naive_gdn_gate")(g, A_log, dt_bias)
    beta = _step(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    reference = _found("fla.ops.gated_delta_rule.naive.naive_recurrent_gated_delta_rule")
    return _by_text(reference, cu_seqlens, _shared(q, v), _shared(k, v), v, beta, g)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`chunk_delta_rule` and `fused_recurrent_delta_rule`."""
    if use_qk_l2norm_in_kernel:
        q, k = _unit(q), _unit(k)
    reference = _found("fla.ops.gated_delta_rule.naive.naive_recurrent_gated_delta_rule")
    return _by_text(reference, cu_seqlens, q, k, v, beta, torch.zeros_like(beta))


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`chunk_kda` and `fused_recurrent_kda`."""
    if use_qk_l2norm_in_kernel:
        q, k = _unit(q), _unit(k)
    if lower_bound is None:
        g = _found("fla.ops.kda.gate.naive_kda_gate")(g, A_log, dt_bias)
    else:
        g = _found("fla.ops.kda.gate.naive_kda_lowerbound_gate")(g, A_log, dt_bias, lower_bound)
    beta = _step(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _by_text(_found("fla.ops.kda.naive.naive_recurrent_kda"), cu_seqlens, q, k, v, g, beta)


def gla(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None = None, cu_seqlens: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`fused_recurrent_gla`; `chunk_gla` calls the decay g."""
    decay = kwargs["g"] if gk is None else gk
    return _by_text(_found("fla.ops.gla.naive.naive_recurrent_gla"), cu_seqlens, q, k, v, decay)


OPS: dict[str, Callable[..., Any]] = {
    "fla.ops.gated_delta_rule.chunk.chunk_gated_delta_rule": gated_delta_rule,
    "fla.ops.gated_delta_rule.fused_recurrent.fused_recurrent_gated_delta_rule": gated_delta_rule,
    "fla.ops.delta_rule.chunk.chunk_delta_rule": delta_rule,
    "fla.ops.delta_rule.fused_recurrent.fused_recurrent_delta_rule": delta_rule,
    "fla.ops.kda.chunk.chunk_kda": kda,
    "fla.ops.kda.fused_recurrent.fused_recurrent_kda": kda,
    "fla.ops.gla.chunk.chunk_gla": gla,
    "fla.ops.gla.fused_recurrent.fused_recurrent_gla": gla,
}
LAYERS = ("gated_deltanet", "delta_net", "kda", "gla")


def _short_convolution(
    self: Any, x: Tensor, cu_seqlens: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    return causal_conv1d(x, self.weight.squeeze(1), self.bias, self.activation, cu_seqlens)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Of `(batch, length, channels)`, text by text."""

    def run(text: Tensor) -> tuple[Tensor, None]:
        out = F.conv1d(F.pad(text.mT, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=weight.shape[0]).mT
        return (out if activation is None else F.silu(out)), None

    return _by_text(run, cu_seqlens, x)


def _norm(self: Any, x: Tensor, g: Tensor | None = None, **kwargs: Any) -> Tensor:
    y = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
    y = y if self.weight is None else y * self.weight
    if g is None:
        return y
    return y * (g.sigmoid() if self.activation == "sigmoid" else F.silu(g))


@contextmanager
def on_a_cpu() -> Iterator[ModuleType]:
    """The package with references where its kernels are."""
    layers, modules = package(), importlib.import_module("fla.modules")
    with pytest.MonkeyPatch.context() as patch:
        for path, reference in OPS.items():
            module, _, name = path.rpartition(".")
            stand_in = _named(reference, name)
            patch.setattr(importlib.import_module(module), name, stand_in)
            for layer in LAYERS:
                holder = sys.modules[f"fla.layers.{layer}"]
                if hasattr(holder, name):
                    patch.setattr(holder, name, stand_in)
        patch.setattr(sys.modules["fla.layers.gated_deltanet"], "causal_conv1d", causal_conv1d)
        patch.setattr(modules.ShortConvolution, "forward", _short_convolution)
        patch.setattr(modules.FusedRMSNormGated, "forward", _norm)
        patch.setattr(modules.RMSNorm, "forward", _norm)
        patch.setattr(importlib.import_module("fla.modules.mlp"), "swiglu", lambda gate, x: F.silu(gate) * x)
        yield layers


def _named(reference: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Another function for each name, since functions are told apart by identity."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return reference(*args, **kwargs)

    stand_in.__name__ = name
    return stand_in
