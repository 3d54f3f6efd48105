"""Giving a live model the class and the sizes of a saved one, and weights that the Trainer cannot load itself."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_compressm import models
from hf_compressm.checkpoints.saved_model import SavedModel
from hf_compressm.files.names import BASE_FOLDER
from hf_compressm.peft import underlying
from hf_compressm.peft.saved_base import keep_base_beside, keeps_base_beside, load_adapters, load_base
from hf_compressm.surgery import reshape_model


def fit_to_checkpoint(model: nn.Module, saved: SavedModel, optimizer: Any = None) -> bool:
    """Give a live model the class and state sizes of a checkpoint, so that its weights can be loaded.

    Args:
        model: a transformers model, or a `PeftModel` around one; any other module is left unchanged, since it has
            no configuration to compare.
        saved: the checkpoint.
        optimizer: the optimizer that trains the model, if there is one yet.

    Returns:
        Whether anything had to change its shape.

    Raises:
        ValueError: if the checkpoint contradicts itself, or is of another kind of model. The model is then unchanged.
    """
    base = underlying(model)
    if not isinstance(base, PreTrainedModel) or saved.values is None:
        return False
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
