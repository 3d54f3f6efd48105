"""Configuration of the Linear Recurrent Unit, LRU (arXiv 2303.06349).

Glossary:
    r_min, r_max  moduli between which the eigenvalues of a fresh layer lie
    max_phase     largest phase angle of a fresh layer's eigenvalues, in radians
"""

import math
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_diagonal_ssm import DiagonalSSMConfig


@strict
class LRUConfig(DiagonalSSMConfig):
    r"""Configuration of an LRU model; the fields of [`DiagonalSSMConfig`] and these.

    Args:
        r_min (`float`, *optional*, defaults to 0.9):
            Smallest initial modulus of an eigenvalue.
        r_max (`float`, *optional*, defaults to 0.999):
            Largest initial modulus of an eigenvalue, at most 1.
        max_phase (`float`, *optional*, defaults to 2 pi):
            Initial phase angles are uniform in `[0, max_phase]`, in radians.

    Example:
    ```python
    >>> from hf_compressm import LRUConfig, LRUForCausalLM
    >>> model = LRUForCausalLM(LRUConfig(vocab_size=256, hidden_size=32, state_size=16, num_hidden_layers=2))
    ```
    """

    model_type = "lru"
    per_layer_fields: ClassVar[frozenset[str]] = DiagonalSSMConfig.per_layer_fields | {"max_phase", "r_max", "r_min"}

    activation: str = "full_glu"
    r_min: int | float = 0.9
    r_max: int | float = 0.999
    max_phase: int | float = 2 * math.pi

    def _check_fields(self) -> None:
        super()._check_fields()
        if not 0.0 <= self.r_min < self.r_max <= 1.0:
            raise ValueError(f"`r_min` is {self.r_min} and `r_max` {self.r_max}; they need 0 <= r_min < r_max <= 1.")
        if self.max_phase < 0.0:
            raise ValueError(f"`max_phase` is {self.max_phase}; it is an angle in radians and must not be negative.")


__all__ = ["LRUConfig"]
