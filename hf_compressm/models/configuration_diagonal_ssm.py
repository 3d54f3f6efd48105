"""Configuration fields that S5 and LRU share.

Glossary:
    hidden_size          H, features per token or frame
    state_size, d_state  N, states of one layer; for S5 with conjugate symmetry N counts both halves
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


ACTIVATIONS = ("gelu", "half_glu1", "half_glu2", "full_glu")
NORMS = ("layer", "batch")
POOLINGS = ("mean", "last")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; choose one of {', '.join(repr(choice) for choice in choices)}.")


@strict
class DiagonalSSMConfig(PreTrainedConfig):
    r"""Base of [`S5Config`] and [`LRUConfig`]: everything around the state-space layer itself.

    Layer-wise sizes go through transformers' own `per_layer_config`, for example
    `per_layer_config={"0": {"state_size": 12}}`; a layer that is not named there has the global value.

    Args:
        hidden_size (`int`, *optional*, defaults to 128):
            H, the number of features between layers.
        state_size (`int`, *optional*, defaults to 64):
            N, the number of states per layer. `d_state` is an alias.
        num_hidden_layers (`int`, *optional*, defaults to 4):
            The number of blocks.
        vocab_size (`int`, *optional*):
            The number of tokens, for models that read `input_ids`.
        input_size (`int`, *optional*):
            The number of features per frame, for models that read `input_values` `(batch, length, input_size)`.
            At most one of `vocab_size` and `input_size` is set; with neither, only `inputs_embeds` is read.
        norm (`str`, *optional*, defaults to `"layer"`):
            `"layer"`, or `"batch"` for statistics per feature over all positions that are not padding.
        norm_epsilon (`float`, *optional*, defaults to 1e-05):
            Added to the variance in the norm.
        prenorm (`bool`, *optional*, defaults to `True`):
            Whether the norm is before the state-space layer, or else after the residual sum.
        activation (`str`, *optional*, defaults to `"half_glu1"`):
            `"gelu"`, `"half_glu1"`, `"half_glu2"` or `"full_glu"`, as in the S5 reference.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability, after the activation and after the gate.
        pooling (`str`, *optional*, defaults to `"mean"`):
            What a sequence classifier reads: the `"mean"` over positions that are not padding, or the `"last"` one.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of embeddings, encoder, gates and heads. State-space parameters have their own scheme.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns its recurrent states outside training.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether a language model's head is its embedding matrix.

    Raises:
        ValueError: When a value is outside its range; the message names the value and the remedy.
    """

    keys_to_ignore_at_inference = ["cache"]
    attribute_map = {"d_state": "state_size", "d_model": "hidden_size"}
    per_layer_fields: ClassVar[frozenset[str]] = frozenset({"state_size", "dropout"})

    hidden_size: int = 128
    state_size: int = 64
    num_hidden_layers: int = 4
    vocab_size: int | None = None
    input_size: int | None = None
    norm: str = "layer"
    norm_epsilon: float = 1e-5
    prenorm: bool = True
    activation: str = "half_glu1"
    dropout: int | float = 0.0
    pooling: str = "mean"
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @property
    def layer_types(self) -> list[str]:
        """One entry per layer; tells transformers' `DynamicCache` to keep a recurrent state and no keys or values."""
        return ["linear_attention"] * self.num_hidden_layers

    def validate_architecture(self) -> None:
        """Check every size and choice, layer by layer when sizes differ. Runs at construction and before saving."""
        if not self.is_heterogeneous:
            self._check_fields()
            return
        foreign = sorted(set(self.per_layer_attributes) - self.per_layer_fields)
        if foreign:
            raise ValueError(
                f"`per_layer_config` sets {foreign}, which all layers must share. "
                f"Set them globally; a layer may have its own {sorted(self.per_layer_fields)}."
            )
        for layer_config in self.per_layer_config:
            layer_config._check_fields()

    def _check_fields(self) -> None:
        """Raise `ValueError` for the first field out of range, in a config with one value per field."""
        for name in ("hidden_size", "state_size", "num_hidden_layers"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be a positive integer.")
        for name in ("vocab_size", "input_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; set a positive integer, or None without such input.")
        if self.vocab_size is not None and self.input_size is not None:
            raise ValueError(
                f"`vocab_size` is {self.vocab_size} and `input_size` is {self.input_size}; a model reads tokens or "
                "continuous values, so leave one of them None."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` is {self.dropout}; it must lie in [0, 1).")
        if self.norm_epsilon <= 0.0:
            raise ValueError(f"`norm_epsilon` is {self.norm_epsilon}; it must be positive, for example 1e-5.")
        check_choice("norm", self.norm, NORMS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("pooling", self.pooling, POOLINGS)


__all__ = ["DiagonalSSMConfig"]
