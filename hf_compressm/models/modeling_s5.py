"""S5: simplified state-space layers (arXiv 2208.04933) as Hugging Face models.

Glossary (continuous time unless stated):
    Lambda           eigenvalues of the state matrix, complex, (slots,)
    B, C             input and output matrix in eigenvector coordinates, complex, (slots, H) and (H, slots)
    D                feed-through, real, (H,)
    Delta            step sizes, exp(log_step), real, (slots,)
    slots            N // 2 with conjugate symmetry, where a slot holds a pair, else N
    Lambda_bar, B_bar  the discrete-time counterparts, same shapes
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin

from .configuration_s5 import S5Config
from .heads_diagonal_ssm import DiagonalSSMForCausalLM, DiagonalSSMForSequenceClassification
from .hippo import hippo_normal_blocks
from .layers_diagonal_ssm import DiagonalSSMLayer, exported
from .modeling_diagonal_ssm import DiagonalSSMBlock, DiagonalSSMModel


# Upper end of the eigenvalues' real parts with `clip_eigs`, as in the S5 reference.
LARGEST_REAL_PART = -1e-4
# Standard deviation of a standard normal variable truncated to [-2, 2], by which Lecun's scheme divides.
TRUNCATED_NORMAL_STD = 0.87962566103423978
# (exp(z) - 1) / z is 1 to the last digit of float64 if |z|^2 is below this, which float32 can represent.
TINY_SQUARE = 1e-32


def expm1_ratio(z: torch.Tensor) -> torch.Tensor:
    """The quotient `(exp(z) - 1) / z` of a complex tensor, with accurate gradient, down to `z = 0`, where it is 1.

    Below modulus 1 it is `exp(w) sinh(w) / w` with `w = z / 2` and seven terms of the series of `sinh(w) / w`, whose
    error is below 1e-16; above, the plain quotient loses nothing. Each branch sees only arguments of its own range, so
    that the unused one passes no NaN back.
    """
    is_small = z.abs() < 1
    small, large = torch.where(is_small, z, 0), torch.where(is_small, 1, z)
    half = small / 2
    squared = half * half
    series = torch.ones_like(squared)
    for k in range(6, 0, -1):
        series = 1 + series * squared / (2 * k * (2 * k + 1))
    return torch.where(is_small, torch.exp(half) * series, (torch.exp(large) - 1) / large)


def discretize(
    Lambda: torch.Tensor, B: torch.Tensor, Delta: torch.Tensor, method: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Lambda_bar` `(slots,)` and `B_bar` `(slots, H)` by zero-order hold or the bilinear transform.

    zoh: `Lambda_bar = exp(Lambda Delta)`, `B_bar = (Lambda_bar - 1) / Lambda B`; bilinear:
    `Lambda_bar = (1 + Lambda Delta / 2) / (1 - Lambda Delta / 2)`, `B_bar = Delta / (1 - Lambda Delta / 2) B`.
    Source: arXiv 2208.04933, section 2.
    """
    z = Lambda * Delta
    if method == "zoh":
        return torch.exp(z), (Delta * expm1_ratio(z))[:, None] * B
    denominator = 1 - z / 2
    return (1 + z / 2) / denominator, (Delta / denominator)[:, None] * B


def discretize_in_pairs(
    Lambda: torch.Tensor, B: torch.Tensor, Delta: torch.Tensor, method: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of `discretize` for pairs [Re, Im] in the last dimension: `(slots, 2)` and `(slots, H, 2)`.

    With `z = x + iy`, `exp(z) - 1 = expm1(x) cos y - 2 sin(y / 2)^2 + i exp(x) sin y`, which loses nothing near 0.
    """
    z = Lambda * Delta[:, None]
    one = torch.tensor([1.0, 0.0], dtype=z.dtype, device=z.device)
    if method == "zoh":
        x, y = z.unbind(-1)
        Lambda_bar = x.exp()[:, None] * torch.stack([y.cos(), y.sin()], dim=-1)
        real = torch.expm1(x) * y.cos() - 2 * (y / 2).sin() ** 2
        difference = torch.stack([real, x.exp() * y.sin()], dim=-1)
        is_tiny = (z * z).sum(-1, keepdim=True) < TINY_SQUARE
        scale = torch.where(is_tiny, one, exported.divide_pairs(difference, z))
    else:
        Lambda_bar = exported.divide_pairs(one + z / 2, one - z / 2)
        scale = exported.divide_pairs(one, one - z / 2)
    return Lambda_bar, exported.multiply_pairs((Delta[:, None] * scale)[:, None], B)


def _truncated_normal(rows: int, columns: int, fan_in: int) -> torch.Tensor:
    """A float64 `(rows, columns)` sample of Lecun's truncated normal distribution of variance 1 / fan_in."""
    sample = torch.empty(rows, columns, dtype=torch.float64)
    nn.init.trunc_normal_(sample, std=1.0, a=-2.0, b=2.0)
    return sample / (TRUNCATED_NORMAL_STD * math.sqrt(fan_in))


class S5Layer(DiagonalSSMLayer):
    """The S5 state-space layer with diagonal state matrix.

    Parameters, all real: `Lambda_re`, `Lambda_im`, `log_step` `(slots,)`; `B_re`, `B_im` `(slots, H)`; `C_re`, `C_im`
    `(H, slots)`, or `(H, 2 slots)` as `[forward | backward]` when bidirectional; `D` `(H,)`.
    """

    def __init__(self, config: S5Config):
        super().__init__(config)
        self.bidirectional = config.bidirectional
        self.conj_sym = config.conj_sym
        self.discretization = config.discretization
        self.clip_eigs = config.clip_eigs
        self.num_blocks = config.num_blocks
        self.dt_min, self.dt_max = config.dt_min, config.dt_max
        slots = self.state_size // 2 if self.conj_sym else self.state_size
        directions = 2 if self.bidirectional else 1
        self.Lambda_re = nn.Parameter(torch.empty(slots))
        self.Lambda_im = nn.Parameter(torch.empty(slots))
        self.B_re = nn.Parameter(torch.empty(slots, self.hidden_size))
        self.B_im = nn.Parameter(torch.empty(slots, self.hidden_size))
        self.C_re = nn.Parameter(torch.empty(self.hidden_size, directions * slots))
        self.C_im = nn.Parameter(torch.empty(self.hidden_size, directions * slots))
        self.D = nn.Parameter(torch.empty(self.hidden_size))
        self.log_step = nn.Parameter(torch.empty(slots))
        if self.D.device.type != "meta":
            self.init_weights()

    @property
    def slots(self) -> int:
        """The number of complex states that are stored and cached."""
        return self.log_step.shape[0]

    def system(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The discrete-time system; see [`DiagonalSSMLayer.system`]. `C` includes the 2 of conjugate symmetry."""
        real_part = self.Lambda_re.to(dtype)
        if self.clip_eigs:
            real_part = real_part.clamp(max=LARGEST_REAL_PART)
        Lambda = torch.complex(real_part, self.Lambda_im.to(dtype))
        B = torch.complex(self.B_re.to(dtype), self.B_im.to(dtype))
        C = torch.complex(self.C_re.to(dtype), self.C_im.to(dtype))
        if self.bidirectional:
            C = torch.cat(C.chunk(2, dim=1))  # (H, 2 slots) -> (2H, slots)
        eigenvalues, B = discretize(Lambda, B, self.log_step.to(dtype).exp(), self.discretization)
        return eigenvalues, B, 2 * C if self.conj_sym else C

    def system_in_pairs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The result of `system()` as pairs [Re, Im]; see [`DiagonalSSMLayer.system_in_pairs`]."""
        real_part = self.Lambda_re.to(dtype)
        if self.clip_eigs:
            real_part = real_part.clamp(max=LARGEST_REAL_PART)
        Lambda = torch.stack([real_part, self.Lambda_im.to(dtype)], dim=-1)
        B = torch.stack([self.B_re.to(dtype), self.B_im.to(dtype)], dim=-1)
        C = torch.stack([self.C_re.to(dtype), self.C_im.to(dtype)], dim=-1)
        if self.bidirectional:
            C = torch.cat(C.chunk(2, dim=1))  # (H, 2 slots, 2) -> (2H, slots, 2)
        eigenvalues, B = discretize_in_pairs(Lambda, B, self.log_step.to(dtype).exp(), self.discretization)
        return eigenvalues, B, 2 * C if self.conj_sym else C

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw HiPPO-N eigenvalues by blocks, B and C in their eigenvector basis, and log-uniform step sizes.

        Real matrices are sampled in the original coordinates and rotated: `B = V^H B_0`, `C = C_0 V`, with `B_0` and
        `C_0` from Lecun's truncated normal distribution (arXiv 2208.04933, appendix B).
        """
        Lambda, blocks = hippo_normal_blocks(self.slots, self.num_blocks, self.conj_sym)
        V = torch.block_diag(*(torch.from_numpy(block) for block in blocks))  # (size, slots)
        size = V.shape[0]
        B = V.mH @ _truncated_normal(size, self.hidden_size, size).to(V.dtype)
        C = []
        for _ in range(2 if self.bidirectional else 1):
            real, imaginary = (_truncated_normal(self.hidden_size, size, size) for _ in range(2))
            C.append(torch.complex(real, imaginary) @ V)
        values = {
            "Lambda": torch.from_numpy(Lambda),
            "B": B,
            "C": torch.cat(C, dim=1),
        }
        for name, value in values.items():
            init.copy_(getattr(self, f"{name}_re"), value.real)
            init.copy_(getattr(self, f"{name}_im"), value.imag)
        init.normal_(self.D, std=1.0)
        init.uniform_(self.log_step, math.log(self.dt_min), math.log(self.dt_max))

    def extra_repr(self) -> str:
        """Sizes and variant, for `print(model)`."""
        return (
            f"{super().extra_repr()}, conj_sym={self.conj_sym}, discretization={self.discretization!r}, "
            f"bidirectional={self.bidirectional}"
        )


class S5Block(DiagonalSSMBlock):
    """Norm, S5 layer, gate and residual."""

    layer_class = S5Layer


_EXPORTED_CLASSES = {
    "AutoModel": "modeling_s5.S5Model",
    "AutoModelForCausalLM": "modeling_s5.S5ForCausalLM",
    "AutoModelForSequenceClassification": "modeling_s5.S5ForSequenceClassification",
}


class S5Model(DiagonalSSMModel):
    """Encoder and stack of S5 blocks."""

    config_class = S5Config
    block_class = S5Block
    _no_split_modules = ["S5Block"]
    _exported_classes = _EXPORTED_CLASSES


class S5ForSequenceClassification(DiagonalSSMForSequenceClassification):
    """S5 backbone, pooling and a linear head."""

    config_class = S5Config
    backbone_class = S5Model
    _no_split_modules = ["S5Block"]
    _exported_classes = _EXPORTED_CLASSES


class S5ForCausalLM(DiagonalSSMForCausalLM, GenerationMixin):
    """S5 backbone and language-modelling head.

    Raises:
        ValueError: When the configuration is bidirectional, or has no `vocab_size`.
    """

    config_class = S5Config
    backbone_class = S5Model
    _no_split_modules = ["S5Block"]
    _exported_classes = _EXPORTED_CLASSES

    def __init__(self, config: S5Config):
        if config.bidirectional:
            raise ValueError(
                "`bidirectional` is True, so every output sees the future: set it to False for a causal model."
            )
        super().__init__(config)


__all__ = ["S5ForCausalLM", "S5ForSequenceClassification", "S5Layer", "S5Model"]
