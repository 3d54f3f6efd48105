"""The table of families that every law about cutting runs over, and what the tests do to models."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_compressm.models import LRUConfig, LRUForCausalLM, S5Config, S5ForCausalLM, S5ForSequenceClassification
from tests.stock_configs import SIZE_FIELDS, is_there, stock_settings


VOCAB_SIZE = 13
INPUT_SIZE = 3
NUM_LABELS = 4
STATE_SIZE = 8
HIDDEN_SIZE = 6
LAYERS = 2
SIZE_ATTRIBUTES = ("state_size", "ssm_state_size", "head_k_dim")
SLOW_TO_MOVE = ("dt_bias", "nu_log", "theta", "gamma_log", "Lambda_re", "Lambda_im", "log_step", "A_log")
"""Parameters that a perturbation moves little: the layer stays stable."""


def token_batch(batch_size: int = 3, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB_SIZE, (batch_size, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}


def frame_batch(batch_size: int = 3, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(batch_size, length, INPUT_SIZE, generator=generator)
    return {"input_values": frames, "labels": torch.randint(NUM_LABELS, (batch_size,), generator=generator)}


@dataclass(frozen=True)
class Family:
    """One row: how to build a tiny model, feed it, and what its adapter promises."""

    name: str
    family: str
    model_class: type
    config_class: type
    variant: dict[str, Any] = field(default_factory=dict)
    batch: Callable[..., dict[str, Tensor]] = token_batch
    size_field: str = "state_size"
    criteria: tuple[str, ...] = ("empirical", "hankel")
    per_layer: bool = True
    granularity: int = 1

    @property
    def is_linear(self) -> bool:
        return "hankel" in self.criteria

    @property
    def is_language_model(self) -> bool:
        return self.batch is token_batch

    @property
    def widest(self) -> torch.dtype:
        """transformers' mixtures of experts and delta nets have no float64."""
        return torch.float32 if self.family in ("jamba", "granitemoehybrid") or self in DELTA_NETS else torch.float64

    @property
    def is_stock(self) -> bool:
        return self.family in SIZE_FIELDS

    def config(self, **kwargs: Any) -> Any:
        if self.is_stock:
            state_size = kwargs.pop("state_size", STATE_SIZE)
            return self.config_class(**{**stock_settings(self.family, state_size), **self.variant, **kwargs})
        sizes = {"hidden_size": HIDDEN_SIZE, "state_size": STATE_SIZE, "num_hidden_layers": LAYERS}
        inputs = (
            {"vocab_size": VOCAB_SIZE}
            if self.is_language_model
            else {"input_size": INPUT_SIZE, "num_labels": NUM_LABELS}
        )
        return self.config_class(**{**sizes, **inputs, **self.variant, **kwargs})

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs: Any) -> Any:
        """A model in evaluation mode, none of whose parameters is what its initialisation would make it again."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = perturbed(self.model_class(self.config(**kwargs)))
        return model.to(dtype).eval()

    def calibration(self, count: int = 2, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
        batches = [self.batch(seed=100 + number) for number in range(count)]
        return [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]


def stock_family(model_type: str, prefix: str, name: str = "", config_class: str = "", **variant: Any) -> Family:
    """A row for a family of transformers."""
    selective = model_type in ("mamba", "zamba")
    normalized = model_type in ("falcon_mamba", "jamba")
    return Family(
        name or model_type,
        model_type,
        getattr(transformers, f"{prefix}ForCausalLM", type(None)),
        getattr(transformers, config_class or f"{prefix}Config", type(None)),
        variant,
        size_field=SIZE_FIELDS[model_type],
        criteria=("interpolative", "surrogate") if selective else ("interpolative",) if normalized else ("empirical",),
        per_layer=False,
    )


def present(*families: Family) -> tuple[Family, ...]:
    """Those that this version of transformers has; the oldest lacks some."""
    return tuple(family for family in families if not family.is_stock or is_there(family.family))


MAMBA = stock_family("mamba", "Mamba", hidden_size=6, time_step_rank=2)
FALCON_MAMBA = stock_family("falcon_mamba", "FalconMamba")
JAMBA = stock_family("jamba", "Jamba")
ZAMBA = stock_family("zamba", "Zamba")
MAMBA2 = stock_family("mamba2", "Mamba2")
MAMBA2_PLAIN = stock_family(
    "mamba2", "Mamba2", "mamba2-tied", n_groups=1, use_conv_bias=False, tie_word_embeddings=True
)
BAMBA = stock_family("bamba", "Bamba")
ZAMBA2 = stock_family("zamba2", "Zamba2")
FALCON_H1 = stock_family("falcon_h1", "FalconH1")
GRANITE = stock_family("granitemoehybrid", "GraniteMoeHybrid")
NEMOTRON_H = stock_family("nemotron_h", "NemotronH")
QWEN3_NEXT = stock_family("qwen3_next", "Qwen3Next")
QWEN3_5 = stock_family("qwen3_5", "Qwen3_5", config_class="Qwen3_5TextConfig")
QWEN3_5_MOE = stock_family("qwen3_5_moe", "Qwen3_5Moe", config_class="Qwen3_5MoeTextConfig")
QWEN4_EXP = stock_family("qwen4_exp", "Qwen4Exp", config_class="Qwen4ExpTextConfig")
LARA_MINI = stock_family("lara_mini", "LaraMini")
OLMO_HYBRID = stock_family("olmo_hybrid", "OlmoHybrid")
KIMI_LINEAR = stock_family("kimi_linear", "KimiLinear")
BAILING_HYBRID = stock_family("bailing_hybrid", "BailingHybrid")
MINIMAX = stock_family("minimax", "MiniMax")
S5 = Family("s5", "s5", S5ForCausalLM, S5Config, granularity=2)
S5_COMPLEX = Family("s5-complex", "s5", S5ForCausalLM, S5Config, {"conj_sym": False})
S5_CLASSIFIER = Family(
    "s5-classifier", "s5", S5ForSequenceClassification, S5Config, {"norm": "batch"}, frame_batch, granularity=2
)
S5_BIDIRECTIONAL = Family(
    "s5-bidirectional",
    "s5",
    S5ForSequenceClassification,
    S5Config,
    {"bidirectional": True, "discretization": "bilinear", "clip_eigs": True},
    frame_batch,
    granularity=2,
)
LRU = Family("lru", "lru", LRUForCausalLM, LRUConfig)
XLSTM = stock_family("xlstm", "xLSTM")
XLSTM_BIASED = stock_family("xlstm", "xLSTM", "xlstm-biased", use_bias=True)

MAMBA_FAMILIES = (
    MAMBA,
    FALCON_MAMBA,
    JAMBA,
    ZAMBA,
    MAMBA2,
    MAMBA2_PLAIN,
    BAMBA,
    ZAMBA2,
    FALCON_H1,
    GRANITE,
    NEMOTRON_H,
)
DELTA_NETS = present(QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE, LARA_MINI, OLMO_HYBRID)
ONLY_OWN = present(KIMI_LINEAR, BAILING_HYBRID, MINIMAX)
"""Families whose stock layers have no state size of their own: only layers of this package's classes are cut."""
OTHERS = (S5, S5_COMPLEX, S5_CLASSIFIER, S5_BIDIRECTIONAL, LRU, XLSTM, XLSTM_BIASED)
FAMILIES = (*MAMBA_FAMILIES, *DELTA_NETS, *OTHERS)
LAYOUTS = (MAMBA, FALCON_MAMBA, ZAMBA, MAMBA2, BAMBA, QWEN3_NEXT, QWEN3_5, S5, LRU, XLSTM)
"""One family for each way in which a cut changes parameters."""
LINEAR = tuple(family for family in FAMILIES if family.is_linear)
LANGUAGE_MODELS = tuple(family for family in FAMILIES if family.is_language_model)


def each(families: tuple[Family, ...] = FAMILIES) -> list[Any]:
    """Families as the cases of a test; of linear attention, those whose layout another one has are slow ones."""
    again = [family for family in (*DELTA_NETS, XLSTM_BIASED) if family not in LAYOUTS]
    return [pytest.param(family, marks=pytest.mark.slow) if family in again else family for family in families]


def by_layout() -> list[Any]:
    """Every family, those whose layout another one has too as slow tests."""
    return [family if family in LAYOUTS else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


def family_id(value: Any) -> str | None:
    return value.name if isinstance(value, Family) else None


def perturbed(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move every parameter and saved float buffer, those of the eigenvalues a little."""
    saved = model.state_dict()
    with torch.no_grad():
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
        for name, tensor in [*model.named_parameters(), *buffers]:
            if tensor.is_floating_point():
                noise = torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)
                tensor.add_(noise, alpha=0.05 if name.rpartition(".")[2] in SLOW_TO_MOVE else scale)
    return model


def ssm_layers(model: nn.Module) -> dict[str, Any]:
    """The SSM layers by name, found without the package: those that own a matrix of state parameters, or keys."""
    own = ("A_log", "B_re", "qk_dim")
    return {name: module for name, module in model.named_modules() if any(hasattr(module, each) for each in own)}


def states_of(layer: nn.Module) -> int:
    """The number of states of a layer, found without the package."""
    if hasattr(layer, "qk_dim"):
        return layer.qk_dim // layer.config.num_heads
    return next(int(getattr(layer, name)) for name in SIZE_ATTRIBUTES if hasattr(layer, name))


def owner_of_a_cut_parameter(layer: nn.Module) -> tuple[nn.Module, str]:
    """Module and name of a parameter that every cut of a layer replaces."""
    if hasattr(layer, "B_re"):
        return layer, "B_re"
    if hasattr(layer, "qk_dim"):
        return getattr(layer, "qkv_opreact", None) or layer.k, "weight"
    return (layer, "A_log") if layer.A_log.dim() > 1 else (layer.conv1d, "weight")


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a model is: tensors, gradients, modes, attributes of its layers and its config."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()},
        "identities": [id(parameter) for parameter in model.parameters()],
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "sizes": [states_of(layer) for layer in ssm_layers(model).values()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "config": model.config.to_dict(),
    }


def same(one: Any, other: Any) -> bool:
    """Equality of nested containers, bit for bit on tensors; NaN equals NaN."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and one.shape == other.shape
            and one.dtype == other.dtype
            and bool(((one == other) | (one.isnan() & other.isnan())).all())
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
