"""SSM layers inside a PEFT model: adapters around their projections, and how LoRA follows a cut.

| symbol | meaning | shape |
|---|---|---|
| W | weight of a projection, the base's | `(out, in)` |
| A, B, s | a LoRA adapter: while active, the projection is `W + s B A` | `(rank, in)`, `(out, rank)`, number |
| m | DoRA's magnitudes, of the rows of `W + s B A` | `(out,)` |
| M | what a cut does to the rows of W: selects, scales or mixes them | `(new, out)` |

`M (W + s B A) = M W + s (M B) A`: if a cut is one linear map of the rows, every adapter, active or not, follows it
exactly with its B alone. The gradient of B is `s G A^T` for the gradient G of W, so its moments map as those of W. If
M only selects, the rows that stay keep their norms, and m is selected too.
Nothing here imports peft: its layers are recognised by `adapter_layer_names`, which all of them have.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_compressm.families.changes import AttributeChange, MomentTerm, ParameterChange
from hf_compressm.families.family import CutMethod, LayerCut, SSMLayer
from hf_compressm.peft import innermost_module, plain_modules, underlying, wrapped_module


def check_adapters(model: nn.Module, layers: Sequence[tuple[SSMLayer, CutMethod]]) -> None:
    """Make sure that the adapters of some layers follow a cut exactly.

    Args:
        model: the model, perhaps inside a `PeftModel`.
        layers: the layers to cut, each with its method.

    Raises:
        ValueError: naming layer and adapter, and the way out.
    """
    base = underlying(model)
    modules = dict(base.named_modules())
    for name, module in modules.items():
        if getattr(module, "merged_adapters", None):
            raise ValueError(
                f"{name} has the adapter {module.merged_adapters[0]!r} merged into its weight, from which "
                "neither a cut nor a file could separate it again. Call unmerge_adapter() before the cut, or "
                "merge_and_unload() for good."
            )
    for layer, method in layers:
        parts = layer.name.split(".")
        above = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        around = next((name for name in above if wrapped_module(modules[name]) is not None), None)
        if around is not None:
            raise ValueError(_refusal(around, modules[around], "it is around a whole SSM layer"))
        for part in layer.family.cut_parts(layer, method):
            module = modules.get(f"{layer.name}.{part}" if layer.name else part)
            why = "" if module is None else _obstacle(module, layer.family.selects_rows)
            if module is not None and why:
                raise ValueError(_refusal(f"{layer.name}.{part}", module, why))


def follow(layer: SSMLayer, cut: LayerCut) -> LayerCut:
    """The cut together with the changes of the layer's adapters.

    Raises:
        ValueError: if an adapter cannot follow, and is around a part that the family does not name in `cut_parts`.
    """
    changes, attributes = list(cut.changes), list(cut.attributes)
    widths = {id(item.module): item.value for item in cut.attributes if item.name == "out_features"}
    for name, module in layer.module.named_modules():
        if wrapped_module(module) is None:
            continue
        base = innermost_module(module)
        present = next((change for change in cut.changes if change.parameter is getattr(base, "weight", None)), None)
        if present is None:
            continue
        if present.row_map is None:
            why = "the cut is not a linear map of its rows"
        else:
            why = _obstacle(module, not present.row_map.is_floating_point())
        if why:
            raise ValueError(_refusal(f"{layer.name}.{name}", module, why))
        followers = _by_rows(module)
        changes += [_followed(f"{layer.name}.{name}.{own}", followers[own], present) for own in followers]
        if id(module) in widths:
            attributes += [AttributeChange(part, "out_features", widths[id(module)]) for part in _wide(module)]
    return replace(cut, changes=tuple(changes), attributes=tuple(attributes))


def resized(layer: SSMLayer, widths: Mapping[str, int]) -> Iterator[ParameterChange | AttributeChange]:
    """Changes that fit a layer's LoRA adapters to other projections; B holds zeros until it is loaded.

    Args:
        layer: the layer, as it is.
        widths: by plain name, of projections in it, the number of rows that they will have.
    """
    for name, plain in plain_modules(layer.module):
        wanted = widths.get(name)
        for place, module in layer.module.named_modules():
            if (
                wrapped_module(module) is None
                or innermost_module(module) is not plain
                or _obstacle(module, selects=True)
            ):
                continue
            if wanted is not None and module.out_features != wanted:
                for own, parameter in _by_rows(module).items():
                    value = torch.zeros(wanted, *parameter.shape[1:], dtype=parameter.dtype)
                    yield ParameterChange(f"{layer.name}.{place}.{own}", parameter, value, ())
                yield from (AttributeChange(part, "out_features", wanted) for part in (module, *_wide(module)))


def _followed(name: str, B: nn.Parameter, change: ParameterChange) -> ParameterChange:
    """B, or m, after the cut."""
    row_map = change.row_map
    assert row_map is not None  # the caller has checked
    moments = tuple(MomentTerm(B, term.matrix, term.dim) for term in change.moments)
    return ParameterChange.mapped(name, B, row_map, 0, moments)


def _obstacle(module: nn.Module, selects: bool) -> str:
    """Why the adapter around a projection cannot follow a cut that selects its rows, or else mixes them; or ""."""
    if wrapped_module(module) is None:
        return ""
    if "original_module" in module._modules:
        return "a copy of it is trained in its place (modules_to_save)"
    variants = [type(variant).__name__ for variant in getattr(module, "lora_variant", {}).values()]
    if not selects and getattr(module, "lora_magnitude_vector", None):
        return "DoRA's magnitudes cannot follow where rows are mixed"
    others = [name for name in variants if name != "DoraLinearVariant"]
    if others:
        return f"it is not plain LoRA ({others[0]})"
    ups: Any = getattr(module, "lora_B", None)
    base = innermost_module(module)
    is_lora = isinstance(ups, nn.ModuleDict) and len(ups) > 0
    if not is_lora or not isinstance(base, nn.Linear) or not all(isinstance(B, nn.Linear) for B in ups.values()):
        return "only LoRA around a linear layer follows a cut"
    if not base.weight.is_floating_point() or base.weight.shape[0] != base.out_features:
        return "the weight below it is quantised"
    if wrapped_module(module) is not base:
        return "there are two kinds of adapters, one around the other"
    if any(B.bias is not None for B in ups.values()):
        return "it has a bias of its own (lora_bias)"
    return ""


def _refusal(place: str, module: nn.Module, why: str) -> str:
    """The error message: the adapter, what is wrong with it, and the way out."""
    kind = ".".join([*type(module).__module__.split(".")[-2:-1], type(module).__name__])
    names = getattr(module, "active_adapters", None) or ["default"]
    return (
        f"{place} carries the adapter {names[0]!r} ({kind}), which would not follow a cut exactly: {why}. Leave "
        f"{place.rpartition('.')[2]} out of target_modules and modules_to_save, use plain LoRA there, or call "
        "merge_and_unload() before the cut."
    )


def _by_rows(module: Any) -> dict[str, nn.Parameter]:
    """The parameters of a LoRA layer with one row, or one entry, for every row of the projection."""
    named = {f"lora_B.{name}.weight": B.weight for name, B in module.lora_B.items()}
    return named | {
        f"lora_magnitude_vector.{name}.weight": m.weight for name, m in module.lora_magnitude_vector.items()
    }


def _wide(module: Any) -> list[nn.Module]:
    """The linear layers in a LoRA layer that are as wide as its output."""
    return [innermost_module(module), *module.lora_B.values()]
