"""Configurations of linear attention whose layers may have state sizes of their own, and project onto their states.

| layers | states of a key head | channels of a key head before the projection |
|---|---|---|
| gated delta nets | `linear_key_head_dim` | `conv_key_head_dim` |
| Kimi delta attention | `linear_key_head_dim` | `linear_head_dim`, also that of values and gates |
| lightning attention | `linear_key_head_dim` | `head_dim`, also that of values and of full attention |

A layer without a value in that one of the two fields which transformers does not have does not project.

Every class is made when it is asked for, since it needs the files of its model type.
"""

import copy
import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_compressm_mamba import layers_with_own


class LinearAttentionConfig(PreTrainedConfig):
    """What the configurations share: a size per layer, and the width before the projection.

    Sizes go through transformers' own `per_layer_config`, for example
    `per_layer_config={"0": {"linear_key_head_dim": 32, "conv_key_head_dim": 128}}`; a layer that is not named there
    has the global values.
    """

    kind: ClassVar["ConfigKind"]
    per_layer_fields: ClassVar[frozenset[str]]

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the sizes."""
        kwargs.pop("model_type", None)  # the one of a stock checkpoint would hide the class's
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @property
    def projected_states(self) -> int | None:
        """States of a key head, in the configuration of a layer that projects; None without projection."""
        return None if getattr(self, self.kind.added) is None else getattr(self, self.kind.size_field)

    @property
    def unprojected(self) -> PreTrainedConfig:
        """The configuration from which the stock layer has the channels before the projection."""
        config, width = copy.copy(self), getattr(self, self.kind.width_field)
        if self.kind.added == self.kind.width_field and width is not None:
            setattr(config, self.kind.size_field, width)
        return config

    def validate_architecture(self) -> None:
        """Check the sizes of every layer. Runs at construction, before saving and when a model is built.

        Raises:
            ValueError: When `per_layer_config` names a missing layer or a field that layers share, a size is below 1,
                or a width is below its size.
        """
        layers = layers_with_own(self, self.per_layer_fields)
        super().validate_architecture()
        size_field, width_field = self.kind.size_field, self.kind.width_field
        for index, layer in enumerate(layers):
            size, width = getattr(layer, size_field), getattr(layer, width_field)
            if size is not None and size < 1:
                raise ValueError(
                    f"`{size_field}` is {size} in layer {index}; it must be a positive integer. A layer needs states: "
                    "use 1 for the smallest."
                )
            if layer.projected_states is not None and width is not None and width < size:
                raise ValueError(
                    f"`{width_field}` is {width} in layer {index}, below its `{size_field}` of {size}: a projection "
                    f"cannot make states out of fewer channels. Use a `{size_field}` of at most {width}, or "
                    f"`{self.kind.added}=None` for a layer without projection."
                )


@dataclass(frozen=True)
class ConfigKind:
    """One model type.

    Attributes:
        folder: where transformers keeps it.
        stock: the name of its configuration class.
        size_field: the field with the states of a key head.
        width_field: the field with its channels before the projection.
        added: which of the two transformers does not have; a layer in which it is None does not project.
        whole: the name of the configuration class around it where the model type sees images too, or "".
    """

    folder: str
    stock: str
    size_field: str = "linear_key_head_dim"
    width_field: str = "conv_key_head_dim"
    added: str = "conv_key_head_dim"
    whole: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stock classes that have a counterpart."""
        return (self.stock, self.whole) if self.whole else (self.stock,)

    def stock_class(self, name: str) -> Any:
        """A configuration class of transformers."""
        return getattr(importlib.import_module(f"transformers.models.{self.folder}.configuration_{self.folder}"), name)

    def make(self, name: str) -> Any:
        """The counterpart of the stock class of that name."""
        stock = self.stock_class(name)
        space: dict[str, Any] = {"__module__": __name__, "model_type": f"compressm_{stock.model_type}"}
        if name == self.whole:
            field = "sub_configs_defaults" if hasattr(stock, "sub_configs_defaults") else "sub_configs"  # before 5.24
            space[field] = {**stock.sub_configs, "text_config": own_config_class(self.stock)}
            space["__doc__"] = f"A [`~transformers.{name}`] around a text model with a size per layer."
            return strict(type(f"CompreSSM{name}", (stock,), space))
        space |= {
            "__doc__": f"A [`~transformers.{name}`] with a size per layer.",
            "__annotations__": {self.added: int | None},
            self.added: None,
            "kind": self,
            "per_layer_fields": frozenset({self.size_field, self.added}),
        }
        return strict(type(f"CompreSSM{name}", (LinearAttentionConfig, stock), space))


CONFIG_KINDS = (
    ConfigKind("qwen3_next", "Qwen3NextConfig"),
    ConfigKind("qwen3_5", "Qwen3_5TextConfig", whole="Qwen3_5Config"),
    ConfigKind("qwen3_5_moe", "Qwen3_5MoeTextConfig", whole="Qwen3_5MoeConfig"),
    ConfigKind("qwen4_exp", "Qwen4ExpTextConfig", whole="Qwen4ExpConfig"),
    ConfigKind("lara_mini", "LaraMiniConfig"),
    ConfigKind("olmo_hybrid", "OlmoHybridConfig"),
    ConfigKind("kimi_linear", "KimiLinearConfig", width_field="linear_head_dim", added="linear_key_head_dim"),
    ConfigKind("bailing_hybrid", "BailingHybridConfig", width_field="linear_head_dim", added="linear_key_head_dim"),
    ConfigKind(
        "glm5_next",
        "Glm5NextTextConfig",
        width_field="linear_head_dim",
        added="linear_key_head_dim",
        whole="Glm5NextConfig",
    ),
    ConfigKind("minimax", "MiniMaxConfig", width_field="head_dim", added="linear_key_head_dim"),
)


def own_config_class(stock: str) -> Any:
    """The counterpart of the stock class of that name; it is made when it is asked for first."""
    name = f"CompreSSM{stock}"
    if name not in globals():
        kind = next((kind for kind in CONFIG_KINDS if stock in kind.names), None)
        if kind is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = kind.make(stock)
    return globals()[name]


def __getattr__(name: str) -> Any:
    return own_config_class(name.removeprefix("CompreSSM"))


__all__ = ["CONFIG_KINDS", "ConfigKind", "LinearAttentionConfig", "own_config_class"]
