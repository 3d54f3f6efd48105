"""Configuration of S5 (arXiv 2208.04933).

Glossary:
    state_size      N, states of one layer, both halves of the conjugate pairs counted
    slots           stored complex states: N // 2 with conjugate symmetry, else N
    dt_min, dt_max  range of the initial step sizes Delta (dimensionless time)
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_diagonal_ssm import DiagonalSSMConfig, check_choice


DISCRETIZATIONS = ("zoh", "bilinear")


@strict
class S5Config(DiagonalSSMConfig):
    r"""Configuration of an S5 model; the fields of [`DiagonalSSMConfig`] and these.

    Args:
        conj_sym (`bool`, *optional*, defaults to `True`):
            Store one of each conjugate pair of states and read out `2 Re(C x)`. `state_size` must then be even.
        num_blocks (`int`, *optional*, defaults to 1):
            HiPPO-N blocks that a fresh state matrix is made of. Sizes that it does not divide get blocks of nearly
            equal size; it has no effect once weights are loaded.
        discretization (`str`, *optional*, defaults to `"zoh"`):
            `"zoh"` (zero-order hold) or `"bilinear"`.
        clip_eigs (`bool`, *optional*, defaults to `False`):
            Keep the continuous-time eigenvalues' real parts at or below -1e-4.
        dt_min (`float`, *optional*, defaults to 0.001):
            Smallest initial step size.
        dt_max (`float`, *optional*, defaults to 0.1):
            Largest initial step size.
        bidirectional (`bool`, *optional*, defaults to `False`):
            Also run the recurrence from the end to the start, with a read-out of its own. Not for causal models.

    Example:
    ```python
    >>> from hf_compressm import S5Config, S5ForSequenceClassification
    >>> config = S5Config(input_size=1, hidden_size=32, state_size=16, num_hidden_layers=2, num_labels=10)
    >>> model = S5ForSequenceClassification(config)
    ```
    """

    model_type = "s5"
    per_layer_fields: ClassVar[frozenset[str]] = DiagonalSSMConfig.per_layer_fields | {
        "clip_eigs",
        "conj_sym",
        "discretization",
        "dt_max",
        "dt_min",
        "num_blocks",
    }

    conj_sym: bool = True
    num_blocks: int = 1
    discretization: str = "zoh"
    clip_eigs: bool = False
    dt_min: int | float = 0.001
    dt_max: int | float = 0.1
    bidirectional: bool = False

    def _check_fields(self) -> None:
        super()._check_fields()
        if self.conj_sym and self.state_size % 2:
            raise ValueError(
                f"`state_size` is {self.state_size}, but with `conj_sym=True` states come in conjugate pairs: use "
                f"{self.state_size + 1} or {max(2, self.state_size - 1)}, or set `conj_sym=False`."
            )
        if self.num_blocks < 1:
            raise ValueError(f"`num_blocks` is {self.num_blocks}; it must be a positive integer.")
        if not 0.0 < self.dt_min <= self.dt_max:
            raise ValueError(f"`dt_min` is {self.dt_min} and `dt_max` {self.dt_max}; they need 0 < dt_min <= dt_max.")
        check_choice("discretization", self.discretization, DISCRETIZATIONS)


__all__ = ["S5Config"]
