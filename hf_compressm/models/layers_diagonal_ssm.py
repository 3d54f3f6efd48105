"""Parts of a block that S5 and LRU share: the contract of a state-space layer, the gate and the batch norm.

Glossary (discrete time, step k):
    u            input of a state-space layer, (batch, length, H)
    h            its state, complex, (batch, slots); h_k = diag(eigenvalues) h_{k-1} + B u_k
    slots        complex states that are stored and cached: N, or N // 2 if only one of each conjugate pair is
    eigenvalues  of the state transition, complex, (slots,)
    B, C         input and output matrix, complex, (slots, H) and (P, slots); y_k = Re(C h_k) + D u_k
    D            feed-through, real, (H,)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_diagonal_ssm import DiagonalSSMConfig


try:
    from hf_compressm.scans import diagonal_scan, exported
except ImportError:  # loaded as custom code, in a process without the package
    exported = None  # type: ignore[assignment]

    def diagonal_scan(  # type: ignore[misc, no-untyped-def]
        u, eigenvalues, B, C, initial_state=None, return_last_state=False, reverse=False
    ):
        """Run the plain recurrence, with the signature and results of `hf_compressm.scans.diagonal_scan`."""
        inputs = u.to(eigenvalues.dtype) @ B.mT  # (batch, length, slots)
        state = inputs.new_zeros(inputs[:, 0].shape) if initial_state is None else initial_state
        states = []
        for step in inputs.flip(1).unbind(1) if reverse else inputs.unbind(1):
            state = eigenvalues * state + step
            states.append(state)
        outputs = (torch.stack(states[::-1] if reverse else states, dim=1) @ C.mT).real
        return (outputs, state) if return_last_state else outputs


# The S5 reference's momentum (flax 0.95), in torch's convention.
BATCH_NORM_MOMENTUM = 0.05


class DiagonalSSMLayer(nn.Module):
    """A diagonal state-space layer: `h_k = diag(eigenvalues) h_{k-1} + B u_k`, `y_k = Re(C h_k) + D u_k`.

    Subclasses own real parameters only, among them `D` `(H,)`, and turn them into the system above.

    Attributes:
        state_size: N, as in the configuration.
        bidirectional: Whether a second read-out runs over the reversed sequence.
    """

    def __init__(self, config: DiagonalSSMConfig):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.state_size = config.state_size
        self.bidirectional = False

    @property
    def slots(self) -> int:
        """The number of complex states that are stored and cached."""
        raise NotImplementedError

    def system(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The discrete-time system that the layer computes, differentiable in its parameters.

        Args:
            dtype: Real type to which the parameters are cast first; `torch.float64` gives complex128 results.

        Returns:
            `eigenvalues` `(slots,)`, `B` `(slots, H)` and `C` `(P, slots)`, complex, with every factor of the layer
            inside (`y_k = Re(C h_k)`). P is H, or 2H for a bidirectional layer: rows `[:H]` read the forward states,
            rows `[H:]` those of the reversed sequence.
        """
        raise NotImplementedError

    def system_in_pairs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The result of `system()` without complex numbers, as [Re, Im] in one more dimension, for export."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialise the parameters in place, except those that a checkpoint has filled."""
        raise NotImplementedError

    def forward(
        self,
        u: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        return_last_state: bool = False,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run the layer in float32 at least, whatever the parameters' type and autocast are.

        Args:
            u: Input `(batch, length, H)`.
            initial_state: Complex state `(batch, slots)` before the first step; zero if omitted.
            return_last_state: Whether to return the state after the last step too.
            mask: `(batch, length)`, True where there is no padding; padding is zero input, and leaves no trace.

        Returns:
            Output `(batch, length, H)` in the type of `u`; with `return_last_state` also the complex `(batch, slots)`.

        Raises:
            ValueError: When a bidirectional layer is asked to start from or return a state.
        """
        stateful = initial_state is not None or return_last_state
        if self.bidirectional and stateful:
            raise ValueError("A bidirectional layer has no state to continue from; call it on whole sequences only.")
        dtype = torch.promote_types(torch.promote_types(u.dtype, self.D.dtype), torch.float32)
        if mask is not None:
            u = u.masked_fill(~mask[..., None], 0.0)
        with maybe_autocast(device_type=u.device.type, enabled=False):
            inputs = u.to(dtype)
            outputs: Any
            if exported is not None and exported.is_exported() and not stateful:
                return (self._exported(inputs) + self.D.to(dtype) * inputs).to(u.dtype)
            eigenvalues, B, C = self.system(dtype)
            if self.bidirectional:
                forward_C, backward_C = C.chunk(2)
                outputs = diagonal_scan(inputs, eigenvalues, B, forward_C)
                outputs = outputs + diagonal_scan(inputs, eigenvalues, B, backward_C, reverse=True)
            elif return_last_state:
                outputs, state = diagonal_scan(inputs, eigenvalues, B, C, initial_state, return_last_state=True)
            else:
                outputs = diagonal_scan(inputs, eigenvalues, B, C, initial_state)
            outputs = (outputs + self.D.to(dtype) * inputs).to(u.dtype)
        return (outputs, state) if return_last_state else outputs

    def _exported(self, inputs: torch.Tensor) -> torch.Tensor:
        """Re(C h) as `torch.export` records it: for sequences of any length, in real arithmetic."""
        eigenvalues, B, C = self.system_in_pairs(inputs.dtype)
        scan = exported.diagonal_scan_in_pairs
        if not self.bidirectional:
            return scan(inputs, eigenvalues, B, C)
        forward_C, backward_C = C.chunk(2)
        return scan(inputs, eigenvalues, B, forward_C) + scan(inputs, eigenvalues, B, backward_C, reverse=True)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"hidden_size={self.hidden_size}, state_size={self.state_size}"


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch norm per feature over batch and length; padded positions enter no statistics and come out as zero."""

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise `(batch, length, H)`; `mask` `(batch, length)` is True at positions that are not padding."""
        if mask is None or not self.training:
            return super().forward(hidden_states.mT).mT
        normalised = torch.zeros_like(hidden_states)
        normalised[mask] = super().forward(hidden_states[mask]).to(normalised.dtype)
        return normalised


class GatedActivation(nn.Module):
    """GELU and gate after the state-space layer, with dropout: the four variants of the S5 reference.

    `gelu`: `g`; `half_glu1`: `g * sigmoid(W g)`; `half_glu2`: `y * sigmoid(W g)`; `full_glu`: `(V g) * sigmoid(W g)`,
    where `g = gelu(y)` (tanh form) and V, W are affine. Dropout acts on g and on the gated result.
    """

    def __init__(self, config: DiagonalSSMConfig):
        super().__init__()
        self.kind = config.activation
        self.dropout = nn.Dropout(config.dropout)
        if self.kind == "full_glu":
            self.value = nn.Linear(config.hidden_size, config.hidden_size)
        if self.kind != "gelu":
            self.gate = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, length, H)` to the same shape."""
        activated = self.dropout(F.gelu(hidden_states, approximate="tanh"))
        if self.kind == "gelu":
            return activated
        if self.kind == "full_glu":
            value = self.value(activated)
        else:
            value = activated if self.kind == "half_glu1" else hidden_states
        return self.dropout(value * torch.sigmoid(self.gate(activated)))

    def extra_repr(self) -> str:
        """The variant, for `print(model)`."""
        return self.kind
