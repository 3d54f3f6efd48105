"""The interface of a family of SSM layers, and the values that measuring, planning and cutting exchange.

A family knows one kind of layer: how large its state is, how it is measured, and what a cut to r states writes. It
never changes the layer. The room `surgery` does that, from the list of parameter changes that the family returns.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_compressm.families.calls import Example
from hf_compressm.families.changes import AttributeChange, ParameterAddition, ParameterChange
from hf_compressm.families.owners import Owner
from hf_compressm.families.sums import Statistics
from hf_compressm.utils.devices import first_not_finite


@dataclass(frozen=True)
class CutMethod:
    """The way in which states are ranked.

    Attributes:
        criterion: `"hankel"`, `"empirical"`, `"fisher"`, `"surrogate"` or `"interpolative"`.
        keep: `"largest"`; for ablations `"smallest"` or `"random"`.
        realization: `"real"` or `"complex"` balancing of LTI layers.
        seed: seed of the random ablation.
        project: whether the model's class lets a layer project B and C after its convolution.
        refit_steps: steps in which a cut layer is fitted to what it gave before.
    """

    criterion: str
    keep: str = "largest"
    realization: str = "real"
    seed: int = 0
    project: bool = False
    refit_steps: int = 0


@dataclass(frozen=True, eq=False)
class LayerCut:
    """Everything that a cut of one layer writes, and its expected cost.

    Attributes:
        changes: parameters to replace.
        attributes: plain attributes to set.
        predicted_error: relative output error, an estimate.
        error_bound: upper bound of the H-infinity error, for LTI layers cut by their closed-form Gramians; else None.
        energy_kept: share of the HSV sum that stays.
        note: what the user should know, such as a fallback that was taken.
        additions: parameters to add.
        config_fields: further fields of the layer's config, besides the state size.
        loss_change: what it is expected to add to the loss, by itself; None where no loss was looked at.
    """

    changes: tuple[ParameterChange, ...]
    attributes: tuple[AttributeChange, ...]
    predicted_error: float
    error_bound: float | None
    energy_kept: float
    note: str = ""
    additions: tuple[ParameterAddition, ...] = ()
    config_fields: Mapping[str, int | float] = field(default_factory=dict)
    loss_change: float | None = None


@dataclass(frozen=True, eq=False)
class LayerShape:
    """What a layer looks like at another state size.

    Attributes:
        shapes: by name in the layer, of all parameters whose shape depends on the state size.
        attributes: plain attributes and buffers that follow.
    """

    shapes: Mapping[str, tuple[int, ...]]
    attributes: tuple[AttributeChange, ...]


@dataclass(frozen=True, eq=False)
class Measurement:
    """The spectrum of one layer, and the cost of keeping its first k values.

    Attributes:
        hankel_singular_values: float64 `(n,)`, descending; n may differ from the state size.
        errors: float64 `(n + 1,)`, relative error after keeping the first k values: a guarantee for LTI layers under
            `criterion="hankel"`, an estimate otherwise.
        problem: why the layer cannot be cut (non-finite, unstable, no energy), or "".
        detail: what the family needs later to cut.
        note: what the user should know.
        scores: float64 `(groups, n)`, what each present state passes on by itself; empty if not measured.
        shortage: why the spectrum cannot decide on a size, since too few tokens were seen; or "".
        examples: inputs of the layer, on which a cut is to be tried; empty where its error is computed.
        energy: what errors are shares of: the rise of the loss if nothing is kept under `criterion="fisher"`, else 1.
    """

    hankel_singular_values: Tensor
    errors: Tensor
    problem: str = ""
    detail: Any = None
    note: str = ""
    scores: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    shortage: str = ""
    examples: Sequence[Example] = ()
    energy: float = 1.0


@dataclass(frozen=True, eq=False)
class SSMLayer:
    """A layer found in a model.

    Attributes:
        name: dotted name in the model.
        module: the layer.
        family: the family it belongs to.
        index: its place among the model's layers, as `per_layer_config` counts them.
        owner: the configuration that says how large it is, with the part of the model that it describes; or None.
    """

    name: str
    module: Any
    family: "Family"
    index: int
    owner: Owner | None = None

    @property
    def state_size(self) -> int:
        """Present number of states."""
        return self.family.state_size(self.module)

    def state_bytes(self, size: int) -> int:
        """Bytes of the state of one sequence with `size` states, in the dtype of the layer's parameters."""
        entries = self.family.state_entries(self.module) * size // self.state_size
        return entries * int(next(self.module.parameters()).element_size())


@dataclass(frozen=True)
class Family(ABC):
    """One family of SSM layers.

    Attributes:
        name: its name in plans, tables and error messages.
        module_type: class of the layer, or its dotted path where importing it would be slow or might fail.
        size_field: the model config's field with the state size, or what it follows from.
        per_layer: whether all of the family's model classes hold a size per layer.
        criteria: supported criteria; the default is the first one, or without data the first that needs none.
        data_criteria: criteria that are measured on data.
        tells_texts_apart_by: arguments of packed rows by which its models let no state pass from one text to the next.
        mark: an attribute that tells the family's layers from others of the same class where it is not None, or "".
        size_type: of the values of `size_field`: float where it is a share of another width; see `configured`.
        shares_field: whether configurations of other models have a field of this name that says something else.
    """

    name: str
    module_type: type[nn.Module] | str
    size_field: str
    per_layer: bool
    criteria: tuple[str, ...]
    data_criteria: frozenset[str] = field(default=frozenset({"empirical", "fisher", "surrogate", "interpolative"}))
    tells_texts_apart_by: frozenset[str] = frozenset()
    mark: str = ""
    size_type: type[int | float] = int
    shares_field: bool = False

    def criterion(self, wanted: str, calibrated: bool, realization: str = "real") -> str:
        """The criterion to use for `wanted`, which may be `"auto"`.

        Args:
            wanted: the criterion in the settings.
            calibrated: whether there will be calibration data.
            realization: `"real"` or `"complex"` balancing of LTI layers.

        Raises:
            ValueError: if the family does not support it, or if it needs calibration data and there is none.
        """
        choices = [name for name in self.criteria if calibrated or name not in self.data_criteria]
        if wanted == "auto" and choices:
            return choices[0]
        if wanted != "auto" and wanted not in self.criteria:
            raise ValueError(
                f"criterion={wanted!r} does not apply to {self.name} layers; choose one of {list(self.criteria)}, "
                "or leave those layers out with ignore_layers."
            )
        if wanted not in choices:
            raise ValueError(
                f"{self.name} layers are measured on data (criterion={wanted!r}), and no calibration was given. "
                "Pass calibration=, an iterable of model-input dicts; a DataLoader works."
            )
        return wanted

    @abstractmethod
    def state_size(self, module: Any) -> int:
        """Present number of states of a layer."""

    def configured(self, module: Any, size: int) -> Mapping[str, int | float]:
        """What the configuration must say for the layer to have `size` states, by field."""
        return {self.size_field: size}

    @abstractmethod
    def state_entries(self, module: Any) -> int:
        """Number of real numbers in a layer's state of one sequence, which decoding carries from token to token."""

    def cached_sizes(self, module: Any, given: Sequence[Any]) -> Iterable[int]:
        """Numbers of states that a cache among the arguments of a layer's forward holds for it."""
        return ()

    @abstractmethod
    def statistics(self, module: Any, criterion: str) -> Statistics | None:
        """An empty accumulator for the criterion, or None if it needs no data."""

    @abstractmethod
    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """The spectrum of a layer, computed in float64 on the CPU; nothing is changed."""

    @abstractmethod
    def cut(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> LayerCut:
        """What a cut to `size` states writes."""

    def values_kept(self, layer: SSMLayer, method: CutMethod, measurement: Measurement, size: int) -> int:
        """Number of singular values that a cut to `size` states keeps."""
        return size * measurement.hankel_singular_values.numel() // layer.state_size

    def state_axes(self, module: Any) -> Mapping[str, int | None]:
        """The tensors that a layer of this kind may have, by name, each with the axis of its states, or None.

        If any has none, a tensor that is not among them and is as wide as the state is refused.
        """
        return {}

    def state_widths(self, module: Any) -> set[int]:
        """Lengths that an axis of the state may have, besides those of the axes in `state_axes`."""
        return {self.state_size(module)}

    def at_size(self, module: Any, size: int) -> LayerShape | None:
        """What a layer would look like with `size` states, more or fewer than now; None if the family cannot tell.

        Only a module of one's own needs it, which takes its sizes from the shapes in a checkpoint.
        """
        return None

    @property
    def mask(self) -> str:
        """Argument of the layer's forward that is 1 at real tokens and 0 at padding, `(batch, length)`."""
        return "attention_mask"

    @property
    def unfused(self) -> Mapping[str, Any]:
        """Attributes of the layer, with the values that make it call its recurrence by itself."""
        return {}

    @property
    def reruns(self) -> bool:
        """Whether the error of a cut is measured by running the cut layer, instead of being computed."""
        return False

    @property
    def refit_steps(self) -> int:
        """In how many steps a cut layer is fitted to what it gave before, where the settings do not say."""
        return 0

    @property
    def fits_other_states(self) -> bool:
        """Whether a cut that is fitted afterwards keeps other states than one that is not."""
        return False

    @property
    def refits_within_training(self) -> bool:
        """Whether that is also done where the model is trained on after the cut, which mends it anyway."""
        return True

    @property
    def refit_rates(self) -> tuple[float, ...]:
        """Largest steps of a fit, as shares of a tensor's root mean square: one after the other until one helps."""
        return (0.1, 0.03)

    def fitted(self, module: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The tensors of a cut layer that may be fitted, each with the share of a step that its entries take."""
        yield from ()

    def output_of(self, module: Any) -> nn.Module | None:
        """The projection of a layer at whose input the loudness of its channels is measured, if that is."""
        return None

    def granularity(self, module: Any) -> int:
        """The number of which all state sizes of this layer are multiples."""
        return 1

    @property
    def selects_rows(self) -> bool:
        """Whether a cut only selects rows of the parts in `cut_parts`; otherwise it may mix or scale them."""
        return False

    def cut_parts(self, layer: SSMLayer, method: CutMethod) -> tuple[str, ...]:
        """Names of the modules whose weights a cut replaces, and of such parameters; adapters elsewhere may stay."""
        return ()


def has_finite_parameters(module: nn.Module) -> bool:
    """Whether no parameter of a layer holds NaN or infinity."""
    return first_not_finite(list(module.parameters())) is None


def kept_order(count: int, method: CutMethod, layer: SSMLayer) -> Tensor:
    """Permutation of `count` ranked states, most wanted first, for `keep` = largest, smallest or random.

    The random order depends only on the seed, the layer's index and the count, so that a resumed run draws it again.
    """
    if method.keep == "random":
        generator = torch.Generator().manual_seed(method.seed + 1_000_003 * (layer.index + 1) + count)
        return torch.randperm(count, generator=generator)
    order = torch.arange(count)
    return order.flip(0) if method.keep == "smallest" else order
