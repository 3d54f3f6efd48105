"""The Linear Recurrent Unit, LRU (arXiv 2303.06349), as Hugging Face models.

Glossary (discrete time):
    eigenvalues  exp(-exp(nu_log) + i theta), complex, (N,)
    theta        phase angle itself, radians, (N,); the reference stores its logarithm
    gamma        input scale, exp(gamma_log), (N,); sqrt(1 - |eigenvalue|^2) at the start
    B, C         input matrix before that scale and output matrix, complex, (N, H) and (H, N)
    D            feed-through, real, (H,)
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin

from .configuration_lru import LRUConfig
from .heads_diagonal_ssm import DiagonalSSMForCausalLM, DiagonalSSMForSequenceClassification
from .layers_diagonal_ssm import DiagonalSSMLayer
from .modeling_diagonal_ssm import DiagonalSSMBlock, DiagonalSSMModel


# Squared moduli are drawn within [this, 1 - this], so that no logarithm of a fresh layer is infinite.
SQUARED_MODULUS_MARGIN = 1e-12


class LRULayer(DiagonalSSMLayer):
    """The LRU state-space layer.

    Parameters, all real: `nu_log`, `theta`, `gamma_log` `(N,)`; `B_re`, `B_im` `(N, H)`; `C_re`, `C_im` `(H, N)`;
    `D` `(H,)`.
    """

    def __init__(self, config: LRUConfig):
        super().__init__(config)
        self.r_min, self.r_max, self.max_phase = config.r_min, config.r_max, config.max_phase
        self.nu_log = nn.Parameter(torch.empty(self.state_size))
        self.theta = nn.Parameter(torch.empty(self.state_size))
        self.gamma_log = nn.Parameter(torch.empty(self.state_size))
        self.B_re = nn.Parameter(torch.empty(self.state_size, self.hidden_size))
        self.B_im = nn.Parameter(torch.empty(self.state_size, self.hidden_size))
        self.C_re = nn.Parameter(torch.empty(self.hidden_size, self.state_size))
        self.C_im = nn.Parameter(torch.empty(self.hidden_size, self.state_size))
        self.D = nn.Parameter(torch.empty(self.hidden_size))
        if self.D.device.type != "meta":
            self.init_weights()

    @property
    def slots(self) -> int:
        """The number of complex states that are stored and cached."""
        return self.nu_log.shape[0]

    def system(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The discrete-time system; see [`DiagonalSSMLayer.system`]. `B` includes gamma."""
        eigenvalues = torch.polar((-self.nu_log.to(dtype).exp()).exp(), self.theta.to(dtype))
        gamma = self.gamma_log.to(dtype).exp()[:, None]
        B = torch.complex(gamma * self.B_re.to(dtype), gamma * self.B_im.to(dtype))
        return eigenvalues, B, torch.complex(self.C_re.to(dtype), self.C_im.to(dtype))

    def system_in_pairs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The result of `system()` as pairs [Re, Im]; see [`DiagonalSSMLayer.system_in_pairs`]."""
        modulus, theta = (-self.nu_log.to(dtype).exp()).exp(), self.theta.to(dtype)
        eigenvalues = modulus[:, None] * torch.stack([theta.cos(), theta.sin()], dim=-1)
        B = torch.stack([self.B_re.to(dtype), self.B_im.to(dtype)], dim=-1)
        C = torch.stack([self.C_re.to(dtype), self.C_im.to(dtype)], dim=-1)
        return eigenvalues, self.gamma_log.to(dtype).exp()[:, None, None] * B, C

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw eigenvalues uniformly on the ring `r_min <= |lambda| <= r_max` and normalise the inputs by gamma.

        Source: arXiv 2303.06349, section 3.2.2 (ring) and 3.3 (gamma).
        """
        uniform = torch.rand(self.slots, dtype=torch.float64, device=self.nu_log.device)
        squared_modulus = uniform * (self.r_max**2 - self.r_min**2) + self.r_min**2
        squared_modulus = squared_modulus.clamp(SQUARED_MODULUS_MARGIN, 1 - SQUARED_MODULUS_MARGIN)
        init.copy_(self.nu_log, (-0.5 * squared_modulus.log()).log())
        init.uniform_(self.theta, 0.0, self.max_phase)
        # 1 - |lambda|^2 of the eigenvalues as they are stored now, loaded ones included
        init.copy_(self.gamma_log, 0.5 * (-torch.expm1(-2 * self.nu_log.double().exp())).log())
        for parameter in (self.B_re, self.B_im):
            init.normal_(parameter, std=1 / math.sqrt(2 * self.hidden_size))
        for parameter in (self.C_re, self.C_im):
            init.normal_(parameter, std=1 / math.sqrt(self.slots))
        init.normal_(self.D, std=1.0)


class LRUBlock(DiagonalSSMBlock):
    """Norm, LRU layer, gate and residual."""

    layer_class = LRULayer


_EXPORTED_CLASSES = {
    "AutoModel": "modeling_lru.LRUModel",
    "AutoModelForCausalLM": "modeling_lru.LRUForCausalLM",
    "AutoModelForSequenceClassification": "modeling_lru.LRUForSequenceClassification",
}


class LRUModel(DiagonalSSMModel):
    """Encoder and stack of LRU blocks."""

    config_class = LRUConfig
    block_class = LRUBlock
    _no_split_modules = ["LRUBlock"]
    _exported_classes = _EXPORTED_CLASSES


class LRUForSequenceClassification(DiagonalSSMForSequenceClassification):
    """LRU backbone, pooling and a linear head."""

    config_class = LRUConfig
    backbone_class = LRUModel
    _no_split_modules = ["LRUBlock"]
    _exported_classes = _EXPORTED_CLASSES


class LRUForCausalLM(DiagonalSSMForCausalLM, GenerationMixin):
    """LRU backbone and language-modelling head."""

    config_class = LRUConfig
    backbone_class = LRUModel
    _no_split_modules = ["LRUBlock"]
    _exported_classes = _EXPORTED_CLASSES


__all__ = ["LRUForCausalLM", "LRUForSequenceClassification", "LRULayer", "LRUModel"]
