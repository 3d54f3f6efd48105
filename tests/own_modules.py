"""Models that are more than one model: modules of one's own around stock models and layers, and composite models."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    BambaConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.mamba.modeling_mamba import MambaMixer

from hf_compressm.models import LRUConfig, LRULayer, LRUModel
from tests.family_table import LRU, MAMBA, STATE_SIZE, VOCAB_SIZE, Family, perturbed
from tests.stock_configs import stock_settings


def mamba_config(**kwargs: Any) -> MambaConfig:
    return MAMBA.config(**{"vocab_size": VOCAB_SIZE, **kwargs})


def lru_config(**kwargs: Any) -> LRUConfig:
    return LRU.config(**kwargs)


def hidden_states(part: nn.Module, hidden: Tensor, input_ids: Tensor) -> Tensor:
    """What a backbone makes of tokens, or what a layer makes of hidden states."""
    return part(input_ids=input_ids).last_hidden_state if isinstance(part, PreTrainedModel) else part(hidden)


class Around(nn.Module):
    """A module of one's own around parts that follow one another, with a head and a loss."""

    def __init__(self, width: int = 6, **parts: nn.Module) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCAB_SIZE, width)
        for name, part in parts.items():
            setattr(self, name, part)
        self.names = list(parts)
        self.head = nn.Linear(width, VOCAB_SIZE)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embeddings(input_ids)
        for name in self.names:
            part = getattr(self, name)
            for each in part if isinstance(part, nn.ModuleList) else [part]:
                hidden = hidden + hidden_states(each, hidden, input_ids)
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def seeded(build: Any) -> Any:
    """A module with parameters that are the same every time, none as its initialisation would make it again."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return perturbed(build(), 0.1).eval()


def around_mamba(config: MambaConfig | None = None) -> Around:
    return seeded(lambda: Around(bb=MambaModel(config or mamba_config())))


def around_lru(config: LRUConfig | None = None) -> Around:
    return seeded(lambda: Around(bb=LRUModel(config or lru_config())))


def two_mambas(fwd: int = STATE_SIZE, bwd: int = 16) -> Around:
    return seeded(
        lambda: Around(fwd=MambaModel(mamba_config(state_size=fwd)), bwd=MambaModel(mamba_config(state_size=bwd)))
    )


def own_mixers(sizes: Sequence[int] = (8, 16), config: MambaConfig | None = None) -> Around:
    """Bare mixers, each with a configuration of its own; or all with one."""
    configs = [config or mamba_config(state_size=size) for size in sizes]
    return seeded(lambda: Around(mixers=nn.ModuleList(MambaMixer(each, layer_idx=0) for each in configs)))


def own_layers(sizes: Sequence[int] = (8, 16)) -> Around:
    """Layers of this package, which hold no configuration."""
    return seeded(lambda: Around(layers=nn.ModuleList(LRULayer(lru_config(state_size=size)) for size in sizes)))


def stock_around(family: Family, **kwargs: Any) -> Around:
    """A backbone of a family of the table."""
    config = family.config(**kwargs)
    return seeded(lambda: Around(config.hidden_size, bb=_backbone(family.model_class(copy.deepcopy(config)))))


def _backbone(model: Any) -> PreTrainedModel:
    return getattr(model, model.base_model_prefix)


def llava(state_size: int = STATE_SIZE) -> LlavaForConditionalGeneration:
    """Llava with a Bamba that has seen no picture."""
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    text = BambaConfig(**stock_settings("bamba", state_size))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1)
    return seeded(lambda: LlavaForConditionalGeneration(config))


class PairConfig(PreTrainedConfig):
    """Two configurations inside one."""

    model_type = "compressm_pair"
    sub_configs: ClassVar = {"left_config": LRUConfig, "right_config": LRUConfig}
    left_config: Any = None
    right_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            value = getattr(self, name)
            if not isinstance(value, LRUConfig):
                setattr(self, name, LRUConfig(**(value or {})))
        super().__post_init__(**kwargs)


class Pair(PreTrainedModel):
    """A composite model of two LRU backbones."""

    config_class = PairConfig
    base_model_prefix = "pair"

    def __init__(self, config: PairConfig) -> None:
        super().__init__(config)
        self.left, self.right = LRUModel(config.left_config), LRUModel(config.right_config)
        self.head = nn.Linear(config.left_config.hidden_size, VOCAB_SIZE)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        hidden = self.left(input_ids=input_ids).last_hidden_state + self.right(input_ids=input_ids).last_hidden_state
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def pair(left: int = STATE_SIZE, right: int = 12) -> Pair:
    config = PairConfig(left_config=lru_config(state_size=left), right_config=lru_config(state_size=right))
    return seeded(lambda: Pair(config))


class Twins(PreTrainedModel):
    """Two LRU backbones from one configuration, which is that of the whole."""

    config_class = LRUConfig
    base_model_prefix = "twins"

    def __init__(self, config: LRUConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = LRUModel(config), LRUModel(config)
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        encoded = self.encoder(input_ids=input_ids).last_hidden_state
        return self.decoder(input_ids=input_ids).last_hidden_state + encoded


class Plain(PreTrainedModel):
    """A model whose configuration says nothing of its layers."""

    config_class = PreTrainedConfig
    base_model_prefix = "plain"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.bb = around_mamba()
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        return self.bb(input_ids, labels)


class Given(PreTrainedModel):
    """A model that cannot be built from its configuration alone."""

    config_class = MambaConfig
    base_model_prefix = "given"

    def __init__(self, config: MambaConfig, backbone: nn.Module) -> None:
        super().__init__(config)
        self.around = Around(config.hidden_size, backbone=backbone)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        return self.around(input_ids, labels)


class Fixed(PreTrainedModel):
    """A model that builds its backbone without looking at its configuration."""

    config_class = MambaConfig
    base_model_prefix = "fixed"

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.around = Around(6, backbone=MambaModel(mamba_config()))
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        return self.around(input_ids, labels)


def fixed() -> Fixed:
    return seeded(lambda: Fixed(mamba_config()))


def plain() -> Plain:
    return seeded(lambda: Plain(PreTrainedConfig()))


def given() -> Given:
    config = mamba_config()
    return seeded(lambda: Given(config, MambaModel(config)))
