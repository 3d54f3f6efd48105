"""What keeps a layer from being cut, found before anything is measured: parameters that are not what they seem.

A cut replaces parameters. It cannot follow where a weight is computed from others, has no data, is quantised or split,
belongs to two layers, or where the layer has something of the state's width that its family does not know.
"""

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_compressm.families.family import CutMethod, SSMLayer
from hf_compressm.peft import plain_modules


_COMPUTED = ("_g", "_v", "_u", "_orig", "_mask")
"""Endings of the names of what a weight is computed from, in `torch.nn.utils` before parametrizations."""


def check_layers(layers: Sequence[tuple[SSMLayer, CutMethod]], cut_before: Collection[str] = ()) -> None:
    """Make sure that a cut can replace what it has to, and that the families know all that depends on the state.

    Args:
        layers: the layers to cut, each with its method.
        cut_before: names of layers that were cut: they were looked at when their state had another size, and the
            present one may by chance be the width of something else.

    Raises:
        ValueError: naming layer and parameter, the cause, and the way out.
    """
    holders: dict[int, str] = {}
    for layer, method in layers:
        check_memory(layer.module, layer.name)
        for name, owner in plain_modules(layer.module):
            for own, parameter in owner.named_parameters(recurse=False):
                _check_whole(_full(layer, name, own), parameter)
        for name, owner, own in _replaced(layer, method):
            value = owner._parameters.get(own)
            if value is None and own not in owner._buffers:
                _refuse_computed(_full(layer, name, own), owner, own)
            elif value is not None and (other := holders.setdefault(id(value), layer.name)) != layer.name:
                raise ValueError(
                    f"{_full(layer, name, own)} and that of {other} are one shared parameter, but each layer is cut "
                    "in its own way. Untie them, or leave these layers out with ignore_layers."
                )
        if layer.name not in cut_before:
            _refuse_unknown(layer)


def check_memory(model: nn.Module, prefix: str = "") -> None:
    """Make sure that every parameter is in memory: what is offloaded or empty can neither be run nor cut.

    Args:
        model: the model, if calibration batches are to run through it, or a layer.
        prefix: name of the layer in the model.

    Raises:
        ValueError: naming the parameter, the cause, and the way out.
    """
    for module, owner in model.named_modules():
        for own, parameter in owner.named_parameters(recurse=False):
            if parameter.device.type != "meta":
                continue
            name = ".".join(part for part in (prefix, module, own) if part)
            if hasattr(owner, "_hf_hook"):
                raise ValueError(
                    f"{name} is offloaded: accelerate brings it into memory only while its layer runs. Load the model "
                    "without offloading (no 'cpu' or 'disk' in its device_map), or call "
                    "accelerate.hooks.remove_hook_from_submodules(model) first."
                )
            raise ValueError(
                f"{name} has no data: it is on the meta device, as under init_empty_weights. Load the weights first, "
                "with from_pretrained or load_state_dict(..., assign=True)."
            )


def _replaced(layer: SSMLayer, method: CutMethod) -> Iterator[tuple[str, nn.Module, str]]:
    """What a cut replaces: names of the module in the layer, the module, and name in it."""
    parts = layer.family.cut_parts(layer, method)
    modules = dict(plain_modules(layer.module))
    for full, axis in layer.family.state_axes(layer.module).items():
        name, _, own = full.rpartition(".")
        wanted = name in parts if name else axis is not None or own in parts
        if wanted and name in modules and getattr(modules[name], own, None) is not None:
            yield name, modules[name], own


def _check_whole(name: str, parameter: Tensor) -> None:
    """Raise `ValueError` for a parameter in pieces, or quantised."""
    if isinstance(parameter, DTensor):
        raise ValueError(
            f"{name} is a DTensor, of which each process holds a part. Cut a checkpoint, with "
            "`hf-compressm compress CHECKPOINT --output DIR`, or the model before it is split."
        )
    is_wrapper: bool = is_traceable_wrapper_subclass(parameter)
    is_number = parameter.is_floating_point() or parameter.is_complex()
    if is_wrapper or not is_number or parameter.itemsize < 2:
        kind = type(parameter.data).__name__ if is_wrapper else str(parameter.dtype)
        raise ValueError(
            f"{name} is quantised ({kind}), and a layer with quantised weights cannot be measured or cut. Load it "
            "without quantization_config, and quantise the model after its last cut."
        )


def _refuse_computed(name: str, owner: nn.Module, own: str) -> None:
    """Raise `ValueError` for a weight that is computed from other parameters at every use."""
    if parametrize.is_parametrized(owner, own):
        kinds = [type(part).__name__.strip("_") for part in getattr(owner.parametrizations, own)]
        undo = f"torch.nn.utils.parametrize.remove_parametrizations(module, {own!r})"
    else:
        hooks = [hook for hook in owner._forward_pre_hooks.values() if getattr(hook, "_tensor_name", None) == own]
        hooks += [hook for hook in owner._forward_pre_hooks.values() if getattr(hook, "name", None) == own]
        kinds = [type(hook).__name__ for hook in hooks]
        pruned = any(isinstance(hook, prune.BasePruningMethod) for hook in hooks)
        undo = "torch.nn.utils.prune.remove(module, name)" if pruned else "the remove_... function of torch.nn.utils"
    raise ValueError(
        f"{name} is not a parameter: it is computed from others at every use ({', '.join(kinds) or 'an attribute'}), "
        f"which a cut cannot follow. Make it a parameter again, with {undo}, or leave the layer out with "
        "ignore_layers."
    )


def _refuse_unknown(layer: SSMLayer) -> None:
    """Raise `ValueError` for a parameter or buffer of the state's width that the layer's family does not know."""
    known = layer.family.state_axes(layer.module)
    if None not in known.values() or layer.state_size == 1:  # nothing to compare with, or nothing to cut
        return
    tensors = {
        f"{name}.{own}" if name else own: tensor
        for name, owner in plain_modules(layer.module)
        for own, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
    }
    widths = layer.family.state_widths(layer.module)
    widths |= {tensors[name].shape[axis] for name, axis in known.items() if axis is not None and name in tensors}
    for name, tensor in tensors.items():
        width = next((length for length in tensor.shape if length in widths), None)
        if width is not None and not _is_known(name, known):
            raise ValueError(
                f"{layer.name} has {name} of shape {tuple(tensor.shape)}, which {layer.family.name} layers do not "
                f"have: its axis of {width} looks like one of the state (N = {layer.state_size}), and a cut would "
                "leave it as it is. Declare the layer (hf_compressm.declare_layer), or leave it out (ignore_layers)."
            )


def _is_known(name: str, known: Collection[str]) -> bool:
    """Whether the family knows a tensor, or the weight that is computed from it."""
    module, _, rest = name.partition("parametrizations.")
    if rest:
        name = module + rest.partition(".")[0]
    stems = (name.removesuffix(ending) for ending in _COMPUTED if name.endswith(ending))
    return name in known or any(stem in known for stem in stems)


def _full(layer: SSMLayer, module: str, name: str) -> str:
    return ".".join(part for part in (layer.name, module, name) if part)
