"""Which layers the settings pick, how each is ranked, and whether each may have a size of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import nn
from transformers.utils import logging

from hf_compressm.compression.record import check_record
from hf_compressm.config import CompreSSMConfig
from hf_compressm.families import CutMethod, SSMLayer, find_layers
from hf_compressm.models import own_class
from hf_compressm.peft import underlying
from hf_compressm.surgery.lora import check_adapters
from hf_compressm.surgery.obstacles import check_layers, check_memory


logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """A layer to be measured.

    Attributes:
        layer: the layer.
        method: how its states are ranked.
        per_layer: whether it may have a size of its own.
    """

    layer: SSMLayer
    method: CutMethod
    per_layer: bool

    @property
    def needs_data(self) -> bool:
        """Whether it is measured on calibration batches."""
        return self.method.criterion in self.layer.family.data_criteria


def check_settings(model: nn.Module, config: CompreSSMConfig, calibrated: bool) -> list[LayerChoice]:
    """The layers that the settings pick, and how each is to be cut.

    Args:
        model: any module.
        config: settings.
        calibrated: whether calibration data will be available.

    Raises:
        ValueError: for a model without SSM layers, settings that do not fit it, or a record of cuts in its config that
            this version cannot read.
    """
    check_record(getattr(getattr(model, "config", None), "compressm", None))
    found = find_layers(model)
    layers = _matching_layers(found, config)
    _check_target(layers, config)
    choices = []
    own = own_class(type(underlying(model)))
    for layer in layers:
        name = layer.family.criterion(config.criterion, calibrated, config.realization)
        project = config.compat == "best" and own is not None
        method = CutMethod(name, config.keep, config.realization, config.sampling_seed, project)
        choices.append(LayerChoice(layer, method, _per_layer(underlying(model), layer, config)))
    methods = [(choice.layer, choice.method) for choice in choices]
    check_layers(methods, _cut_before(model, layers))
    if any(choice.needs_data for choice in choices):
        check_memory(model)
    check_adapters(model, methods)
    uniform = [choice.layer for choice in choices if not choice.per_layer]
    if uniform and len(layers) < len(found):
        raise ValueError(
            f"layers / ignore_layers pick {len(layers)} of {len(found)} layers, but these {uniform[0].family.name} "
            "models have one state size for all. Drop layers / ignore_layers, or use per_layer=True where it applies."
        )
    return choices


def _cut_before(model: nn.Module, layers: Sequence[SSMLayer]) -> set[str]:
    """Names of the layers whose state was larger before the first recorded cut."""
    record = getattr(getattr(model, "config", None), "compressm", None) or {}
    before = record.get("state_sizes_before", {})
    return {layer.name for layer in layers if before.get(layer.name, 0) > layer.state_size}


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


def _per_layer(model: nn.Module, layer: SSMLayer, config: CompreSSMConfig) -> bool:
    """Whether the layer may have its own size: its class has room for one, or may be replaced by one that has."""
    own = own_class(type(model))
    has_room = layer.family.per_layer or own is type(model)
    if config.per_layer is None:
        return has_room or (config.compat == "best" and own is not None)
    if config.per_layer and not has_room and own is None:
        raise ValueError(
            f"per_layer=True needs a model class with a size per layer; {type(model).__name__}, to which {layer.name} "
            f"({layer.family.name}) belongs, has a single {layer.family.size_field}. There are such classes for "
            "S5, LRU, Mamba and Mamba-2 language models. Use per_layer=False."
        )
    return config.per_layer
