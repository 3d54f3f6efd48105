"""Configuration of a Mamba-2 whose layers may have state sizes of their own, and project B and C onto their states.

Glossary:
    state_size       N, states of one head: what the scan computes and the cache keeps
    conv_state_size  M >= N, channels of B and of C per group that pass input projection, convolution and SiLU
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Mamba2Config

from .configuration_compressm_mamba import check_state_size, layers_with_own


@strict
class CompreSSMamba2Config(Mamba2Config):
    r"""Configuration of a [`CompreSSMamba2Model`]: the fields of [`~transformers.Mamba2Config`], and one more.

    Sizes go through transformers' own `per_layer_config`, for example
    `per_layer_config={"0": {"state_size": 12, "conv_state_size": 64}}`; a layer that is not named there has the global
    values. Where sizes differ, read `config.per_layer_config[i].state_size`: `config.state_size` alone raises.

    Args:
        conv_state_size (`int`, *optional*):
            M, channels of B and of C per group before the projection onto `state_size` states. None: B and C enter
            the scan as they leave the convolution, without projection, as in the stock model.

    Raises:
        ValueError: When `per_layer_config` names a missing layer or a field that layers share, a `state_size` is below
            1, or a `conv_state_size` below its `state_size`.

    Example:
    ```python
    >>> from hf_compressm import CompreSSMamba2Config, CompreSSMamba2ForCausalLM
    >>> sizes = {"vocab_size": 256, "hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1}
    >>> config = CompreSSMamba2Config(**sizes, num_hidden_layers=2, state_size=12, conv_state_size=64)
    >>> model = CompreSSMamba2ForCausalLM(config)
    ```
    """

    model_type = "compressm_mamba2"
    per_layer_fields: ClassVar[frozenset[str]] = frozenset({"conv_state_size", "state_size"})

    conv_state_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # the one of a stock checkpoint would hide the class's
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Check the sizes of every layer. Runs at construction, before saving and when a model is built."""
        layers = layers_with_own(self, self.per_layer_fields)
        super().validate_architecture()
        for index, layer in enumerate(layers):
            check_state_size(index, layer)
            if layer.conv_state_size is not None and layer.conv_state_size < layer.state_size:
                raise ValueError(
                    f"`conv_state_size` is {layer.conv_state_size} in layer {index}, below its `state_size` of "
                    f"{layer.state_size}: a projection cannot make states out of fewer channels. Use a `state_size` "
                    f"of at most {layer.conv_state_size}, or `conv_state_size=None` for a layer without projection."
                )


__all__ = ["CompreSSMamba2Config"]
