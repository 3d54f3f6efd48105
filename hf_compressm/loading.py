"""What a checkpoint says of its model, whether its tensors agree, and giving a live model its sizes."""

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_compressm import models
from hf_compressm.adapters import find_layers, size_fields, underlying
from hf_compressm.bases import keep_base_beside, keeps_base_beside, load_adapters, load_base
from hf_compressm.checkpoints import BASE_FOLDER, saved_tensors, tensor_shapes, verify_files
from hf_compressm.compression import check_record
from hf_compressm.durable import quoted, read_json
from hf_compressm.surgery import reshape_model, skeleton


MOST_LAYERS = 10_000


def read_config(directory: str | Path, like: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """The configuration of a saved model, with every state size checked before anything is built from it.

    Args:
        directory: a checkpoint or saved model.
        like: a configuration whose class serves where it has the model type of the saved one.

    Raises:
        ValueError: naming the file, the field and the value.
    """
    path = Path(directory) / "config.json"
    values = read_json(path)
    try:
        _check_sizes(values)
        check_record(values.get("compressm"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model_type = values.get("model_type")
    if like is not None and model_type == like.model_type:
        config_class = type(like)
    elif isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[model_type]
    else:
        raise ValueError(f"{path}: model_type {quoted(model_type)} is not one that transformers knows.")
    try:
        return config_class.from_json_file(path)
    except Exception as error:  # whatever a configuration class makes of bad values, the file is to blame
        raise ValueError(f"{path} does not describe a {config_class.__name__}: {error}") from error


def verify_checkpoint(directory: str | Path) -> None:
    """Make sure that a checkpoint or saved model is whole and that sizes in configuration and tensors agree.

    Args:
        directory: with `config.json` and safetensors weights; as the Trainer or `save_pretrained` wrote it.

    Raises:
        ValueError: naming the file, and what is wrong with it.
    """
    verify_files(directory)
    config = read_config(directory)
    model_class = _model_class(config.architectures)
    if model_class is None or model_class.config_class is not type(config):
        raise ValueError(
            f"{Path(directory) / 'config.json'}: architectures {quoted(config.architectures)} is no model class for "
            f"a {type(config).__name__} that transformers or this package has, so that its tensors cannot be compared "
            "with the configuration."
        )
    _check_tensors(_skeleton(model_class, config, directory), directory)


def fit_to_checkpoint(model: nn.Module, directory: str | Path, optimizer: Any = None) -> bool:
    """Give a live model the class and state sizes of a checkpoint, so that its weights can be loaded.

    Args:
        model: a transformers model, or a `PeftModel` around one; any other module is left as it is, since nothing
            tells what to make of it.
        directory: a checkpoint.
        optimizer: the optimizer that trains the model, if there is one yet.

    Returns:
        Whether anything had another shape.

    Raises:
        ValueError: if the checkpoint is not whole, contradicts itself, or is of another kind of model. The model is
            then as before.
    """
    verify_files(directory)
    base = underlying(model)
    if not isinstance(base, PreTrainedModel) or not (Path(directory) / "config.json").exists():
        return False
    config = read_config(directory, base.config)
    stock = models.stock_class(type(base))
    kinds: list[Any] = [kind for kind in (type(base), stock, models.own_class(stock)) if kind is not None]
    kind = next((kind for kind in kinds if kind.config_class is type(config)), None)
    if kind is None:
        raise ValueError(
            f"{directory} holds a {config.model_type!r} model, and the model is a {type(base).__name__}. Resume with "
            "the kind of model that the checkpoint was saved from."
        )
    wanted = _skeleton(kind, config, directory)
    _check_tensors(wanted, directory)
    try:
        return reshape_model(model, wanted, optimizer)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def fit_with_adapters(model: Any, directory: str | Path, optimizer: Any = None) -> None:
    """Give a live `PeftModel` the base of a checkpoint, weights and all, and every adapter that is in it.

    Args:
        model: a `PeftModel` around a transformers model of any state size.
        directory: a checkpoint; one without a base goes with the base that the model has.
        optimizer: the optimizer that trains the model, if there is one yet.

    Raises:
        ValueError: as `fit_to_checkpoint`; or if the checkpoint has no base, and that of the model was cut since.
    """
    verify_files(directory)
    folder = Path(directory) / BASE_FOLDER
    if folder.is_dir():
        fit_to_checkpoint(model, folder, optimizer)
        load_base(model, folder)
        load_adapters(model, directory)
        keep_base_beside(model)
    elif keeps_base_beside(model):
        raise ValueError(
            f"{directory} has adapters and no {BASE_FOLDER}, and the model was cut since: the base that they belong "
            "to is not there. Load that base anew, put the adapters around it, and resume from this checkpoint."
        )


def load_converted(model: PreTrainedModel, directory: str | Path) -> bool:
    """Load weights whose names on disk are not those in memory, as transformers saves mixtures of experts.

    `from_pretrained` renames and stacks them; the Trainer's own loading does not, and leaves what it cannot place as
    it is, with a warning.

    Args:
        model: that already has the sizes of the checkpoint.
        directory: the checkpoint.

    Returns:
        Whether the names were others and the weights have been loaded here.
    """
    present = model.state_dict()
    if set(tensor_shapes(directory)) <= set(present):
        return False
    loaded = type(model).from_pretrained(directory, config=model.config, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())
    return True


def load_model(directory: str | Path) -> PreTrainedModel:
    """The model of a checkpoint by the class that its configuration names, every tensor in the dtype it was saved in.

    Args:
        directory: that `verify_checkpoint` has passed.

    Raises:
        ValueError: if a tensor that the model needs is not in it.
    """
    config = read_config(directory)
    kind: Any = _model_class(config.architectures)
    model, info = kind.from_pretrained(
        directory, config=config, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{directory} has no tensor {missing[0]}, which a {kind.__name__} needs.")
    present = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, stored in saved_tensors(directory):
            if name in present and present[name].dtype != stored.dtype:  # one dtype is asked for, and may not be all
                present[name].data = stored
    return model


def _model_class(architectures: Any) -> type[PreTrainedModel] | None:
    """The class that a configuration names, None if it names none."""
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str):
        return None
    try:
        found = getattr(models, name, None) or getattr(transformers, name, None)
    except Exception:  # transformers imports what is asked for, and what that needs may be missing
        return None
    return found if inspect.isclass(found) and issubclass(found, PreTrainedModel) else None


def _skeleton(model_class: type, config: PreTrainedConfig, directory: str | Path) -> PreTrainedModel:
    """A model without memory for parameters, after making sure that building it is not a matter of hours."""
    place, shapes = Path(directory) / "config.json", tensor_shapes(directory)
    largest = 2 * max((size for shape in shapes.values() for size in shape), default=0)  # S5 has pairs of states
    values = read_json(place)
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(shapes):
        raise ValueError(f"{place} is at odds with the weights: {layers} layers, and {len(shapes)} tensors in all.")
    for field, size in _sizes(values):
        if size > largest:
            raise ValueError(f"{place} is at odds with the weights: no tensor has room for {field} {quoted(size)}.")
    try:
        model = skeleton(model_class, config)
        find_layers(model)
        return model
    except Exception as error:  # whatever a model class makes of bad values, the file is to blame
        raise ValueError(f"{place} does not describe a {model_class.__name__}: {error}") from error


def _check_tensors(wanted: PreTrainedModel, directory: str | Path) -> None:
    """Raise `ValueError` unless every SSM layer's tensors are there with the shapes of the configuration."""
    on_disk = {_below_the_head(name): shape for name, shape in tensor_shapes(directory).items()}
    layers = getattr(wanted.config, "num_hidden_layers", None)
    for name in on_disk:
        place = re.match(r"layers\.(\d+)\.", name)
        if place and layers is not None and int(place[1]) >= layers:
            raise ValueError(f"{directory} has a tensor {name}, and {layers} layers by its config.json.")
    for layer in find_layers(wanted):
        prefix = f"{layer.name}." if layer.name else ""
        expected = {_below_the_head(prefix + name): value.shape for name, value in layer.module.named_parameters()}
        for name, shape in expected.items():
            if name not in on_disk:
                raise ValueError(f"{directory} has no tensor {name}, which its config.json asks for.")
            if on_disk[name] != tuple(shape):
                raise ValueError(
                    f"{directory}: config.json is at odds with the weights: {name} has shape {on_disk[name]}, and "
                    f"{tuple(shape)} by the sizes in config.json. Restore the file that was changed."
                )
        known = {*expected, *(_below_the_head(prefix + name) for name, _ in layer.module.named_buffers())}
        extra = [name for name in on_disk if prefix and name.startswith(_below_the_head(prefix)) and name not in known]
        if extra:
            raise ValueError(f"{directory} has a tensor {extra[0]} that its config.json knows nothing of.")


def _below_the_head(name: str) -> str:
    """A tensor's name without its first part, under which some families are saved by another name than they have."""
    return name.split(".", 1)[-1]


def _check_sizes(values: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless every state size is a whole number of at least 1, and of a layer that is there."""
    per_layer = values.get("per_layer_config") or {}
    if not isinstance(per_layer, Mapping):
        raise ValueError(f"per_layer_config must be an object of layers, got {quoted(per_layer)}.")
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:  # configurations make lists of that length
        raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}, got {quoted(layers)}.")
    for index, own in per_layer.items():
        known = isinstance(index, str) and index.isdecimal()
        if not known or (isinstance(layers, int) and int(index) >= layers):
            raise ValueError(
                f"per_layer_config names layer {quoted(index)}, and num_hidden_layers is {quoted(layers)}."
            )
        if not isinstance(own, Mapping):
            raise ValueError(f"per_layer_config[{quoted(index)}] must be an object, got {quoted(own)}.")
    for field, size in _sizes(values):
        if type(size) is not int or size < 1:
            raise ValueError(f"{field} must be a whole number of at least 1, got {quoted(size)}.")


def _sizes(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every state size of a configuration, with where it is; null is for families that have another field."""
    for index, source in [("", values), *(values.get("per_layer_config") or {}).items()]:
        place = f"per_layer_config[{quoted(index)}]." if index else ""
        yield from ((place + field, source[field]) for field in size_fields() if source.get(field) is not None)
