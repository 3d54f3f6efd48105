"""Giving a live model the class and the sizes of a saved one, and weights that the Trainer cannot load itself."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from hf_compressm import models
from hf_compressm.checkpoints.saved_model import SavedModel
from hf_compressm.compression import check_record
from hf_compressm.compression.history import read_history
from hf_compressm.families import Holder, SSMLayer, find_layers
from hf_compressm.files.names import BASE_FOLDER
from hf_compressm.peft import underlying
from hf_compressm.peft.saved_base import keep_base_beside, keeps_base_beside, load_adapters, load_base
from hf_compressm.surgery import follows_config, is_described, reshape_layers, reshape_model
from hf_compressm.utils.configurations import configuration_of


_KNOWN_PACKAGES = ("transformers", "hf_compressm")
_FOLLOWING: WeakKeyDictionary[type, bool] = WeakKeyDictionary()
"""Whether the classes of other packages build their layers as large as their configuration says."""


def fit_to_checkpoint(
    model: nn.Module, saved: SavedModel, optimizer: Any = None, records: Mapping[str, Any] | None = None
) -> bool:
    """Give a live model the class and state sizes of a checkpoint, so that its weights can be loaded.

    Args:
        model: a transformers model, a `PeftModel` around one, or any other module: where the model's own configuration
            does not say how large its SSM layers are, the shapes of the checkpoint's tensors do.
        saved: the checkpoint.
        optimizer: the optimizer that trains the model, if there is one yet.
        records: the records of cuts of parts, as in `records_of`; by default those of the checkpoint's history.

    Returns:
        Whether anything had to change its shape.

    Raises:
        ValueError: if the checkpoint contradicts itself, or is of another kind of model. The model is then unchanged.
    """
    base = underlying(model)
    if saved.values is None or not takes_sizes_from_config(base):
        return _fit_by_shapes(model, saved, optimizer, records)
    config = saved.config(base.config)
    stock = models.stock_class(type(base))
    kinds: list[Any] = [kind for kind in (type(base), stock, models.own_class(stock)) if kind is not None]
    kind = next((kind for kind in kinds if kind.config_class is type(config)), None)
    if kind is None:
        raise ValueError(
            f"{saved.directory} holds a {config.model_type!r} model, and the model is a {type(base).__name__}. Resume "
            "with the kind of model that the checkpoint was saved from."
        )
    wanted = saved.skeleton(kind, config)
    saved.check_tensors(wanted)
    try:
        return reshape_model(model, wanted, optimizer)
    except ValueError as error:
        raise ValueError(f"{saved.directory}: {error}") from error


def takes_sizes_from_config(model: nn.Module) -> bool:
    """Whether a model can be built again from its own configuration, with the sizes of all its SSM layers."""
    if not isinstance(model, PreTrainedModel) or not is_described(model, _layers(model)):
        return False
    kind = type(model)
    if kind.__module__.split(".")[0] in _KNOWN_PACKAGES:
        return True
    if kind not in _FOLLOWING:
        _FOLLOWING[kind] = follows_config(model)
    return _FOLLOWING[kind]


def records_of(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint cannot keep in its `config.json`: the records of cuts of parts, by the names of the parts."""
    if takes_sizes_from_config(model):
        return {}
    parts = {name: configuration_of(part) for name, part in model.named_modules()}
    found = {name: getattr(config, "compressm", None) for name, config in parts.items() if config is not None}
    return {name: record for name, record in found.items() if record}


def check_resizable(model: nn.Module) -> None:
    """Make sure that a model can take the sizes of any of its checkpoints, from before a cut and from after it.

    Raises:
        ValueError: naming the layer.
    """
    if takes_sizes_from_config(model):
        return
    for layer in _layers(model):
        if layer.family.at_size(layer.module, layer.state_size) is None:
            raise ValueError(
                f"{type(model).__name__} has no configuration with the size of {layer.name}, and the family "
                f"{layer.family.name!r} does not define at_size: a checkpoint from the other side of a cut could not "
                "be loaded. Define at_size, or leave load_best_model_at_end and recovery_steps out."
            )


def _fit_by_shapes(
    model: nn.Module, saved: SavedModel, optimizer: Any, records: Mapping[str, Any] | None = None
) -> bool:
    """Give the SSM layers of a model the sizes that the tensors of a checkpoint have."""
    layers = _layers(underlying(model))
    if not layers or not saved.headers:
        return False
    known = _records_in(saved) if records is None else records

    def restore(config: Any, holder: Holder, names: Sequence[str]) -> None:
        record = known.get(holder.name)
        check_record(record)
        vars(config).pop("compressm", None)
        if record is not None:
            config.compressm = record

    try:
        return reshape_layers(
            model, {layer.name: saved.layer_shapes(layer.name) for layer in layers}, restore, optimizer
        )
    except ValueError as error:
        raise ValueError(f"{saved.directory}: {error}") from error


def _records_in(saved: SavedModel) -> Mapping[str, Any]:
    """The records of cuts of parts that the history of a checkpoint keeps."""
    directory = saved.directory.parent if saved.directory.name == BASE_FOLDER else saved.directory
    records = read_history(directory, saved.trainer_state).get("records")
    return records if isinstance(records, Mapping) else {}


def _layers(model: nn.Module) -> list[SSMLayer]:
    """The SSM layers of a model; none where it has none."""
    try:
        return find_layers(model)
    except ValueError:
        return []


def fit_with_adapters(model: Any, saved: SavedModel, optimizer: Any = None) -> None:
    """Give a live `PeftModel` the base of a checkpoint with its weights, and every adapter of the checkpoint.

    Args:
        model: a `PeftModel` around a transformers model of any state size.
        saved: the checkpoint; if it has no base, the model keeps its own.
        optimizer: the optimizer that trains the model, if there is one yet.

    Raises:
        ValueError: as `fit_to_checkpoint`; or if the checkpoint has no base, and the model's was cut since.
    """
    if saved.base is not None:
        fit_to_checkpoint(model, saved.base, optimizer)
        load_base(model, saved.base.directory, saved.base.headers)
        load_adapters(model, saved.directory)
        keep_base_beside(model)
    elif keeps_base_beside(model):
        raise ValueError(
            f"{saved.directory} has adapters and no {BASE_FOLDER}, and the model was cut since: the base that they "
            "belong to is missing. Load that base anew, put the adapters around it, and resume from this checkpoint."
        )


def load_converted(model: PreTrainedModel, saved: SavedModel) -> bool:
    """Load weights whose names on disk differ from those in memory, as transformers saves mixtures of experts.

    `from_pretrained` renames and stacks them. The Trainer's own loading does not: it warns, and leaves unchanged what
    it has no weights for.

    Args:
        model: a model that already has the sizes of the checkpoint.
        saved: the checkpoint.

    Returns:
        Whether the names differed, so that the weights were loaded here.
    """
    present = model.state_dict()
    if saved.headers.keys() <= present.keys():
        return False
    loaded = type(model).from_pretrained(saved.directory, config=model.config, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())
    return True
