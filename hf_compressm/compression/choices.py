"""Which layers the settings pick, how each is ranked, and which of them have one size together."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import nn
from transformers.utils import logging

from hf_compressm.compression.record import check_record
from hf_compressm.compression.sizes import check_sizes
from hf_compressm.config import CompreSSMConfig
from hf_compressm.families import CutMethod, SSMLayer, find_layers, holders_of
from hf_compressm.models import own_class
from hf_compressm.peft import underlying
from hf_compressm.surgery import has_room
from hf_compressm.surgery.lora import check_adapters
from hf_compressm.surgery.obstacles import check_layers, check_memory
from hf_compressm.utils.configurations import configurations


logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """A layer to be measured.

    Attributes:
        layer: the layer.
        method: how its states are ranked.
        group: layers of the same group have one size together.
    """

    layer: SSMLayer
    method: CutMethod
    group: Hashable

    @property
    def needs_data(self) -> bool:
        """Whether it is measured on calibration batches."""
        return self.method.criterion in self.layer.family.data_criteria


def check_settings(
    model: nn.Module, config: CompreSSMConfig, calibrated: bool, training: bool = False
) -> list[LayerChoice]:
    """The layers that the settings pick, and how each is to be cut.

    Args:
        model: any module.
        config: settings.
        calibrated: whether calibration data will be available.
        training: whether the model is trained on after the cut, by the run that makes it.

    Raises:
        ValueError: for a model without SSM layers, settings that do not fit it, or a record of cuts in its config that
            this version cannot read.
    """
    for each in configurations(model):
        check_record(getattr(each, "compressm", None))
    found = find_layers(model)
    layers = _matching_layers(found, config)
    _check_target(layers, config)
    check_sizes(layers, config)
    own = own_class(type(underlying(model)))
    groups = {layer.name: _group(layer, found, config, own) for layer in found}
    choices = []
    for layer in layers:
        name = layer.family.criterion(config.criterion, calibrated, config.realization)
        project = config.compat == "best" and own is not None
        default = layer.family.refit_steps if layer.family.refits_within_training or not training else 0
        steps = default if config.refit_steps is None else config.refit_steps
        method = CutMethod(name, config.keep, config.realization, config.sampling_seed, project, steps)
        choices.append(LayerChoice(layer, method, groups[layer.name]))
    methods = [(choice.layer, choice.method) for choice in choices]
    check_layers(methods, _cut_before(model, layers))
    if any(choice.needs_data for choice in choices):
        check_memory(model)
    check_adapters(model, methods)
    _check_whole_groups(found, layers, groups)
    return choices


def _cut_before(model: nn.Module, layers: Sequence[SSMLayer]) -> set[str]:
    """Names of the layers whose state was larger before the first recorded cut."""
    found = set()
    for layer in layers:
        for holder in holders_of(underlying(model), layer.name):
            before = (getattr(holder.config, "compressm", None) or {}).get("state_sizes_before", {})
            if before.get(holder.relative(layer.name), 0) > layer.state_size:
                found.add(layer.name)
    return found


def _matching_layers(found: Sequence[SSMLayer], config: CompreSSMConfig) -> list[SSMLayer]:
    """The layers that `layers` and `ignore_layers` leave."""
    chosen = [
        layer
        for layer in found
        if (config.layers is None or _matches(layer.name, config.layers))
        and not _matches(layer.name, config.ignore_layers or [])
    ]
    if not chosen:
        names = ", ".join(layer.name for layer in found)
        raise ValueError(
            f"layers={config.layers} and ignore_layers={config.ignore_layers} leave no layer; there are {names}."
        )
    for layer in found:
        if layer not in chosen:
            logger.info(f"{layer.name} is left alone (layers / ignore_layers).")
    return chosen


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) or name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _check_target(layers: Sequence[SSMLayer], config: CompreSSMConfig) -> None:
    largest = max(layer.state_size for layer in layers)
    if config.target_state_size is not None and config.target_state_size > largest:
        raise ValueError(
            f"target_state_size={config.target_state_size} is above the present state size {largest}; "
            f"choose a whole number from 1 to {largest}."
        )
    if config.sizes and config.target_state_size not in (None, *config.sizes):
        logger.warning_once(
            f"target_state_size={config.target_state_size} is not among sizes={list(config.sizes)}: layers get the "
            "next larger one, and stay as they are if there is none below their present size."
        )


def _group(layer: SSMLayer, found: Sequence[SSMLayer], config: CompreSSMConfig, own: type | None) -> Hashable:
    """What a layer shares its size with: the layers of its owner, or those that its owner counts as one, or nothing.

    Args:
        layer: the layer.
        found: all layers of the model.
        config: settings.
        own: this package's class for the model, to which a stock model can move; None where there is none.
    """
    if layer.owner is None:
        return layer.name if config.per_layer is not False else (None, layer.family.name)
    together = [each for each in found if each.owner is layer.owner and each.family.name == layer.family.name]
    has_own = len(together) == 1 or all(has_room(each, layer) for each in layer.owner.configs)
    if config.per_layer and not has_own and own is None:
        raise ValueError(
            f"per_layer=True needs a model class with a size per layer; {type(layer.owner.module).__name__}, to which "
            f"{layer.name} ({layer.family.name}) belongs, has a single {layer.family.size_field}. There are such "
            "classes for S5, LRU, Mamba, Mamba-2 and linear attention, by themselves and not inside another model. "
            "Use per_layer=False."
        )
    separate = config.per_layer
    if separate is None:
        separate = has_own or (config.compat == "best" and own is not None)
    return (id(layer.owner), layer.index if separate else None, layer.family.name)


def _check_whole_groups(found: Sequence[SSMLayer], chosen: Sequence[SSMLayer], groups: Mapping[str, Hashable]) -> None:
    """Raise `ValueError` if the settings pick only some of the layers that one configuration gives one size."""
    names = {layer.name for layer in chosen}
    for layer in chosen:
        together = [each for each in found if groups[each.name] == groups[layer.name] and each.owner is not None]
        picked = sum(each.name in names for each in together)
        if picked < len(together):
            raise ValueError(
                f"layers / ignore_layers pick {picked} of {len(together)} layers, but these {layer.family.name} "
                "models have one state size for all. Drop layers / ignore_layers, or use per_layer=True where it "
                "applies."
            )
