"""A checkpoint or saved model as it was read: its configuration, the headers of its weights, and whether they agree.

This value is passed on to all code that needs to know what is on the disk, so that nothing is read or verified twice.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_compressm import models
from hf_compressm.checkpoints.sizes import check_sizes, described, named_sizes
from hf_compressm.compression import check_record
from hf_compressm.families import find_layers
from hf_compressm.files.atomic import read_json
from hf_compressm.files.names import CONFIG_FILE
from hf_compressm.files.weights import Headers, read_tensors
from hf_compressm.surgery import skeleton
from hf_compressm.utils.checks import quoted


@dataclass(frozen=True, eq=False)
class SavedModel:
    """The contents of a directory; made by `read_saved`, which has checked that every file is whole.

    Attributes:
        directory: of the checkpoint or saved model.
        values: of `config.json`; None without one.
        trainer_state: of `trainer_state.json`; None without one.
        headers: of every tensor of the weights; empty where the directory holds adapters.
        base: the base beside adapters, if a cut has changed it.
        is_sealed: whether a seal confirms that all of it was written.
    """

    directory: Path
    values: Mapping[str, Any] | None
    trainer_state: Mapping[str, Any] | None
    headers: Headers
    base: "SavedModel | None" = None
    is_sealed: bool = False

    @property
    def config_path(self) -> Path:
        """Where its configuration is, or would be."""
        return self.directory / CONFIG_FILE

    def config(self, like: PreTrainedConfig | None = None) -> PreTrainedConfig:
        """The configuration, with every state size checked before anything is built from it.

        Args:
            like: a configuration whose class is used if it has the saved one's model type.

        Raises:
            ValueError: naming the file, the field and the value.
        """
        values = read_json(self.config_path) if self.values is None else self.values
        try:
            check_sizes(values)
            for _, own in described(values):
                check_record(own.get("compressm"))
        except ValueError as error:
            raise ValueError(f"{self.config_path}: {error}") from error
        model_type = values.get("model_type")
        if like is not None and model_type == like.model_type:
            config_class = type(like)
        elif isinstance(model_type, str) and model_type in CONFIG_MAPPING:
            config_class = CONFIG_MAPPING[model_type]
        else:
            raise ValueError(
                f"{self.config_path}: model_type {quoted(model_type)} is not one that transformers knows."
            )
        try:
            return config_class(**config_class._decode_special_floats(dict(values)))  # which copies them
        except Exception as error:  # a configuration class may raise anything for bad values of the file
            raise ValueError(f"{self.config_path} does not describe a {config_class.__name__}: {error}") from error

    def verify(self) -> type[PreTrainedModel]:
        """Make sure that the sizes in configuration and tensors agree; returns the model's class.

        Raises:
            ValueError: naming the file, and what is wrong with it.
        """
        config = self.config()
        kind = _model_class(config.architectures)
        if kind is None or kind.config_class is not type(config):
            raise ValueError(
                f"{self.config_path}: architectures {quoted(config.architectures)} is not a model class of "
                f"transformers or this package for a {type(config).__name__}, so its tensors cannot be compared with "
                "the configuration."
            )
        self.check_tensors(self.skeleton(kind, config))
        return kind

    def skeleton(self, kind: type, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of the saved sizes without memory for parameters.

        Raises:
            ValueError: if no tensor has room for a size that the configuration names, or nothing can be built from it.
        """
        place, values = self.config_path, self.values or {}
        largest = 2 * max((size for header in self.headers.values() for size in header.shape), default=0)  # S5's pairs
        for _, own in described(values):
            layers = own.get("num_hidden_layers")
            if isinstance(layers, int) and layers > len(self.headers):
                raise ValueError(
                    f"{place} is at odds with the weights: {layers} layers, but {len(self.headers)} tensors in all."
                )
        for name, size in named_sizes(values):
            if size > largest:
                raise ValueError(f"{place} is at odds with the weights: no tensor has room for {name} {quoted(size)}.")
        try:
            model = skeleton(kind, config)
            find_layers(model)
            return model
        except Exception as error:  # a model class may raise anything for bad values of the file
            raise ValueError(f"{place} does not describe a {kind.__name__}: {error}") from error

    def check_tensors(self, wanted: PreTrainedModel) -> None:
        """Make sure that the tensors of every SSM layer exist, with the shapes of a skeleton.

        Raises:
            ValueError: naming the tensor and both shapes.
        """
        layers = getattr(wanted.config, "num_hidden_layers", None)
        for name in map(_below_the_head, self.headers):
            place = re.match(r"layers\.(\d+)\.", name)
            if place and layers is not None and int(place[1]) >= layers:
                raise ValueError(f"{self.directory} has a tensor {name}, but {layers} layers by its {CONFIG_FILE}.")
        for layer in find_layers(wanted):
            prefix = f"{layer.name}." if layer.name else ""
            on_disk = {f"{prefix}{name}": shape for name, shape in self.layer_shapes(layer.name).items()}
            expected = {
                f"{prefix}{name}": tuple(parameter.shape) for name, parameter in layer.module.named_parameters()
            }
            if not expected.keys() <= on_disk.keys():
                expected = _as_saved(wanted, prefix)
            if not expected.keys() <= on_disk.keys():  # the layer itself may have another name
                on_disk = {name: header.shape for name, header in self.headers.items() if name in expected}
            for name, shape in expected.items():
                if name not in on_disk:
                    raise ValueError(f"{self.directory} has no tensor {name}, which its {CONFIG_FILE} asks for.")
                if tuple(on_disk[name]) != shape:
                    raise ValueError(
                        f"{self.directory}: {CONFIG_FILE} is at odds with the weights: {name} has shape "
                        f"{tuple(on_disk[name])}, but {shape} by the sizes in {CONFIG_FILE}. Restore the file that "
                        "was changed."
                    )
            known = {*expected, *(f"{prefix}{name}" for name, _ in layer.module.named_buffers())}
            extra = [name for name in on_disk if prefix and name not in known]
            if extra:
                raise ValueError(f"{self.directory} has a tensor {extra[0]} that its {CONFIG_FILE} has no place for.")

    def layer_shapes(self, layer: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a layer, by their names in it; empty if it is not there.

        The first parts of a name may differ between disk and memory (`backbone`, `model.language_model`), so the layer
        is the one whose name on disk agrees with the longest end of its own.

        Raises:
            ValueError: if several agree equally well.
        """
        parts = layer.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
        shortest = max(numbers[-1] - 1, 0) if numbers else min(1, len(parts) - 1)
        for start in range(shortest + 1):
            ending = ".".join(parts[start:])
            found = [place for place in self._places if place == ending or (ending and place.endswith(f".{ending}"))]
            found = [ending] if ending in found else found
            if len(found) > 1:
                raise ValueError(f"{self.directory} has {found[0]} and {found[1]}, and either may be {layer}.")
            if found:
                prefix = f"{found[0]}." if found[0] else ""
                inside = {name: header.shape for name, header in self.headers.items() if name.startswith(prefix)}
                return {name[len(prefix) :]: shape for name, shape in inside.items()}
        return {}

    @cached_property
    def _places(self) -> list[str]:
        """Names of all modules with tensors in them, sorted; "" for the whole."""
        split = [name.split(".") for name in self.headers]
        return sorted({".".join(parts[:length]) for parts in split for length in range(len(parts))})

    def load(self) -> PreTrainedModel:
        """Load the model with the class that its configuration names, every tensor in the dtype it was saved in.

        Raises:
            ValueError: if `verify` refuses it, or a tensor that the model needs is missing.
        """
        kind: Any = self.verify()
        model, info = kind.from_pretrained(
            self.directory,
            config=self.config(),
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"{self.directory} has no tensor {missing[0]}, which a {kind.__name__} needs.")
        present = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, stored in read_tensors(self.headers, [name for name in self.headers if name in present]):
                if present[name].dtype != stored.dtype:  # `from_pretrained` takes one dtype for all
                    present[name].data = stored
        return model


def _model_class(architectures: Any) -> type[PreTrainedModel] | None:
    """The class that a configuration names, None if it names none."""
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str):
        return None
    try:
        found = getattr(models, name, None) or getattr(transformers, name, None)
    except Exception:  # transformers imports the class only here, and what it needs may be missing
        return None
    return found if inspect.isclass(found) and issubclass(found, PreTrainedModel) else None


def _as_saved(model: PreTrainedModel, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a layer by the names that transformers saves them under, which may fuse or split them.

    Args:
        model: a model without memory for parameters.
        prefix: of the names of the layer's tensors in the model.
    """
    held: dict[str, torch.Tensor] = {
        name: value for name, value in model.named_parameters() if name.startswith(prefix)
    }
    return {name: tuple(value.shape) for name, value in revert_weight_conversion(model, held).items()}


def _below_the_head(name: str) -> str:
    """A tensor's name without its first part, which in some families differs between disk and memory."""
    return name.split(".", 1)[-1]
