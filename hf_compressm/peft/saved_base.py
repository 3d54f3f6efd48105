"""The base of a PEFT model: saved beside its adapters after a cut, and loaded again.

`PeftModel.save_pretrained` writes only the adapters. After a cut, no other file holds the base that they were trained
on. The original base has another size; if no adapter is around a cut projection, it even accepts the adapters silently
and computes something else. So the cut base is saved in a folder of its own, `base_model`, under plain names, for
`from_pretrained`. `adapter_config.json` names that folder, unless the user has named another base since the cut.
"""

import secrets
import shutil
import zlib
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_compressm.files.atomic import link_or_copy, read_json, replace, write_json
from hf_compressm.files.names import ADAPTER_CONFIG, ADAPTER_FILE, BASE_FOLDER
from hf_compressm.files.weights import Headers, read_tensors
from hf_compressm.peft.wrapping import is_wrapped, plain_modules, underlying
from hf_compressm.utils.devices import on_host
from hf_compressm.utils.processes import checksum


logger = logging.get_logger(__name__)

_NAMES = "_compressm_base_names"
_WRITTEN = "_compressm_base_written"
_SAMPLED = 64
"""Entries of each frozen tensor, evenly spaced, that are looked at when a base is saved again."""
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract something from the base; from a saved base it is subtracted already."""


def keep_base_beside(model: Any) -> None:
    """Make a `PeftModel` that is about to be cut save its base with its adapters; leave other models alone."""
    if is_wrapped(model) and not isinstance(underlying(model), PreTrainedModel):
        logger.warning(
            f"The adapters are around a {type(underlying(model)).__name__}, which cannot be saved beside them: "
            "save_pretrained writes only the adapters. Save the base that this cut leaves yourself."
        )
    elif is_wrapped(model) and not keeps_base_beside(model):
        vars(model)[_NAMES] = {name: item.base_model_name_or_path for name, item in model.peft_config.items()}
        vars(model)["save_pretrained"] = MethodType(_save_with_base, model)


def keeps_base_beside(model: Any) -> bool:
    """Whether a model is a `PeftModel` that was cut, and saves its base with its adapters."""
    return _NAMES in vars(model)


def save_base(model: Any, directory: str | Path) -> None:
    """Save a `PeftModel`'s base in the folder `base_model` of a directory, for `from_pretrained`.

    If the base has not changed since it was saved last, the files are hard links to the earlier ones, where the file
    system has hard links: the checkpoints of a run hold one base per cut. Whether it has changed is known without
    reading it: a frozen tensor that was not replaced or written into is taken to be the same.

    Args:
        model: a `PeftModel` around a transformers model.
        directory: directory of the adapters; created if it is missing.

    Raises:
        OSError: from the file system; an earlier base is then untouched.
    """
    base, state = underlying(model), plain_state(model)
    folder = Path(directory) / BASE_FOLDER
    then, written, files = vars(model).get(_WRITTEN, (None, folder, {}))
    now = _checksum(model, state)
    is_same = then == now and _lengths(written) == files  # a checkpoint that is overwritten loses its files first
    if is_same and written.resolve() == folder.resolve():
        return
    for left_over in folder.parent.glob(f".{BASE_FOLDER}.*"):  # from a process that was killed here
        shutil.rmtree(left_over, ignore_errors=True)
    fresh = folder.with_name(f".{BASE_FOLDER}.{secrets.token_hex(8)}")
    try:
        if is_same:
            shutil.copytree(written, fresh, copy_function=link_or_copy)
        else:
            base.save_pretrained(fresh, state_dict=dict(state))  # which saves tied weights once
            now = _checksum(model, state)  # saving enters class and dtype into the configuration
        if folder.exists():
            shutil.rmtree(folder)
        replace(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    vars(model)[_WRITTEN] = (now, folder.resolve(), _lengths(folder))


def load_base(model: Any, directory: Path, headers: Headers) -> None:
    """Load a saved base into a `PeftModel` whose base already has its sizes; nothing else changes.

    Args:
        model: a `PeftModel` around a transformers model.
        directory: the folder `base_model` of a checkpoint.
        headers: headers of the tensors in it.

    Raises:
        ValueError: naming the folder, if it does not have every tensor.
    """
    base, state = underlying(model), plain_state(model)
    if headers.keys() <= state.keys():
        loaded = dict(read_tensors(headers))
    else:  # saved under other names than in memory, as transformers does with mixtures of experts
        loaded = type(base).from_pretrained(directory, config=base.config, dtype=base.dtype).state_dict()
    filled = {state[name].data_ptr() for name in loaded if name in state}  # tied weights are saved once
    missing = [name for name, value in state.items() if value.data_ptr() not in filled]
    if missing:
        raise ValueError(f"{directory} has no tensor {missing[0]}, which the model has.")
    with torch.no_grad():
        for name, value in loaded.items():
            if name in state:
                state[name].copy_(value)


def load_adapters(model: Any, directory: str | Path) -> None:
    """Load all adapters of a `PeftModel` from a checkpoint, active or not; a Trainer loads only some of them."""
    from peft import load_peft_weights, set_peft_model_state_dict  # noqa: PLC0415 - optional

    for name in model.peft_config:
        folder = Path(directory) if name == "default" else Path(directory) / name
        if (folder / ADAPTER_FILE).exists():
            set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=name)


def plain_state(model: Any) -> dict[str, Tensor]:
    """The state dict that a model would have without its adapters; the tensors are the model's own."""
    state: dict[str, Tensor] = {}
    for name, module in plain_modules(underlying(model)):
        module._save_to_state_dict(state, f"{name}." if name else "", keep_vars=False)
    return state


def check_base(model: nn.Module) -> None:
    """Make sure that the base of a PEFT model can be saved beside its adapters, and loaded again.

    Raises:
        ValueError: naming the obstacle and the way out.
    """
    if not is_wrapped(model):
        if hasattr(model, "peft_config"):  # `model.add_adapter`, or peft's model of mixed kinds
            raise ValueError(
                f"{type(model).__name__} has adapters but is not a PeftModel: its checkpoints would hold only the "
                "adapters, and the base that a cut leaves would be lost. Add the adapters with peft.get_peft_model."
            )
        return
    base = underlying(model)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"The adapters are around a {type(base).__name__}, which is not a transformers model, so the base that "
            "a cut leaves could not be saved beside them. Use hf_compressm.compress between two runs."
        )
    if getattr(base, "hf_quantizer", None) is not None:
        raise ValueError(
            "The adapters are around a quantised model, whose weights cannot be cut. Load it without "
            "quantization_config, or cut the model before it is quantised."
        )


def _save_with_base(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """Save a cut model in place of its `save_pretrained`: first the base, so that no adapter is ever without it."""
    is_writer = kwargs.get("is_main_process", True)
    if is_writer:
        save_base(self, save_directory)
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    if is_writer:
        for name in kwargs.get("selected_adapters") or self.peft_config:
            _name_base(self, name, Path(save_directory))


def _name_base(model: Any, adapter: str, directory: Path) -> None:
    """Write the path of the base into an adapter's configuration on the disk."""
    path = (directory if adapter == "default" else directory / adapter) / ADAPTER_CONFIG
    values = read_json(path)
    of_others = (None, "", vars(model)[_NAMES].get(adapter), underlying(model).name_or_path)
    if values.get("base_model_name_or_path") in of_others:
        values["base_model_name_or_path"] = str(directory / BASE_FOLDER)
    initialisation = values.get("init_lora_weights")
    if isinstance(initialisation, str) and initialisation.startswith(_CHANGING):
        values["init_lora_weights"] = True
    write_json(path, values)


def _lengths(folder: Path) -> dict[str, int]:
    """The lengths of the files in a folder, by name; empty if there is no folder."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _checksum(model: Any, state: dict[str, Tensor]) -> int:
    """CRC-32 of a base's configuration and of what tells whether its tensors are the same.

    Of a frozen tensor that is its place in memory, how often it was written into, and some of its entries, since
    torch does not count what is written through `.data`; of one that is trained, or that does not count, all of it.
    """
    trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
    read, samples, marks = [], {}, []
    for name, value in state.items():
        if value.data_ptr() in trained or value.is_inference():
            read.append(value)
        else:
            samples[name] = value.flatten()[:: max(1, value.numel() // _SAMPLED)]
            marks.append((name, value.data_ptr(), value._version))
    words = f"{underlying(model).config.to_json_string()} {list(state)} {marks}"
    return zlib.crc32(words.encode(), checksum(*read, *on_host(samples).values()))
