"""Configuration of a Mamba whose layers may have state sizes of their own.

Glossary:
    state_size  N, states per channel of one layer
"""

from collections.abc import Collection
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import MambaConfig
from transformers.configuration_utils import PreTrainedConfig


def layers_with_own(config: PreTrainedConfig, fields: Collection[str]) -> list[PreTrainedConfig]:
    """The configuration of every layer, each with its own values of some `fields`.

    Raises:
        ValueError: When `per_layer_config` names a layer that the model does not have, or sets another field.
    """
    if config.is_heterogeneous:
        written = config.to_dict()["per_layer_config"]
        absent = [int(index) for index in written if int(index) >= config.num_hidden_layers]
        if absent:
            raise ValueError(
                f"`per_layer_config` names layer {absent[0]}, but `num_hidden_layers` is {config.num_hidden_layers}: "
                f"layers are counted from 0 to {config.num_hidden_layers - 1}. Remove the entry, or set "
                "`num_hidden_layers`."
            )
        foreign = sorted({field for values in written.values() for field in values} - set(fields))
        if foreign:
            raise ValueError(
                f"`per_layer_config` sets {foreign}, which all layers must share. "
                f"Set them globally; a layer may have its own {sorted(fields)}."
            )
    return list(config.per_layer_config)


def check_state_size(index: int, layer: PreTrainedConfig) -> None:
    """Raise `ValueError` unless layer `index` has at least one state."""
    if layer.state_size < 1:
        raise ValueError(
            f"`state_size` is {layer.state_size} in layer {index}; it must be a positive integer. A layer needs "
            "states: use 1 for the smallest."
        )


@strict
class CompreSSMambaConfig(MambaConfig):
    r"""Configuration of a [`CompreSSMambaModel`]: the fields of [`~transformers.MambaConfig`], perhaps by layer.

    Sizes go through transformers' own `per_layer_config`, for example `per_layer_config={"0": {"state_size": 12}}`; a
    layer that is not named there has the global value. Where sizes differ, read
    `config.per_layer_config[i].state_size`: `config.state_size` alone raises.

    Raises:
        ValueError: When `per_layer_config` names a missing layer or a field that layers share, or a `state_size` is
            below 1.

    Example:
    ```python
    >>> from hf_compressm import CompreSSMambaConfig, CompreSSMambaForCausalLM
    >>> config = CompreSSMambaConfig(
    ...     vocab_size=256, hidden_size=32, num_hidden_layers=2, per_layer_config={"0": {"state_size": 12}}
    ... )
    >>> model = CompreSSMambaForCausalLM(config)
    ```
    """

    model_type = "compressm_mamba"
    per_layer_fields: ClassVar[frozenset[str]] = frozenset({"state_size"})

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # the one of a stock checkpoint would hide the class's
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Check the sizes of every layer. Runs at construction, before saving and when a model is built."""
        for index, layer in enumerate(layers_with_own(self, self.per_layer_fields)):
            check_state_size(index, layer)


__all__ = ["CompreSSMambaConfig"]
