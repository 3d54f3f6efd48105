"""Parameters that are not what they seem are named before anything is measured; what only looks alike is cut."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload, init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import parametrizations, parametrize, prune

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.families import find_layers
from tests.family_table import (
    BAMBA,
    FALCON_MAMBA,
    JAMBA,
    LRU,
    MAMBA,
    MAMBA2,
    S5,
    S5_BIDIRECTIONAL,
    ZAMBA,
    Family,
    each,
    family_id,
    same,
    snapshot,
    ssm_layers,
)
from tests.trainers import callback_of, trainer_of


HALF = CompreSSMConfig(fraction=0.5)


def refused(model: Any, family: Family, match: str, folder: Path | None = None, config: Any = HALF) -> None:
    """Planning and cutting raise, and so does a Trainer before its first step."""
    with pytest.raises(ValueError, match=match):
        analyze(model, config, family.calibration())
    with pytest.raises(ValueError, match=match):
        compress(model, config, family.calibration())
    if folder is not None:
        trainer = trainer_of(family, folder, model=model)
        with pytest.raises(ValueError, match=match):
            trainer.train()
        assert trainer.state.global_step == 0


def subclass_of(kind: type, shape_of: Callable[[Any], dict[str, tuple[int, ...]]], buffer: bool = False) -> type:
    """A class of somebody's fork under the stock class's path, with more tensors."""

    def grow(self: Any) -> None:
        for name, shape in shape_of(self).items():
            tensor = torch.zeros(shape)
            self.register_buffer(name, tensor) if buffer else self.register_parameter(name, nn.Parameter(tensor))

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "grow": grow})


def forked(family: Family, shape_of: Callable[[Any], dict[str, tuple[int, ...]]], buffer: bool = False) -> Any:
    model = family.build()
    for layer in ssm_layers(model).values():
        layer.__class__ = subclass_of(type(layer), shape_of, buffer)
        layer.grow()
    return model


FORKS: dict[str, tuple[Family, Callable[[Any], dict[str, tuple[int, ...]]], bool]] = {
    "A_b_log": (MAMBA, lambda layer: {"A_b_log": tuple(layer.A_log.shape)}, False),
    "x_proj_b": (MAMBA, lambda layer: {"x_proj_b": tuple(layer.x_proj.weight.shape)}, False),
    "state_scale": (MAMBA, lambda layer: {"state_scale": (8,)}, True),
    "A_b_log of FalconMamba": (FALCON_MAMBA, lambda layer: {"A_b_log": tuple(layer.A_log.shape)}, False),
    "A_b_log of Jamba": (JAMBA, lambda layer: {"A_b_log": tuple(layer.A_log.shape)}, False),
    "A_b_log of Zamba": (ZAMBA, lambda layer: {"A_b_log": tuple(layer.A_log.shape)}, False),
    "init_states": (MAMBA2, lambda layer: {"init_states": (4, 8, 8)}, False),
    "conv1d_b": (MAMBA2, lambda layer: {"conv1d_b": tuple(layer.conv1d.weight.shape)}, False),
    "bc_norm": (BAMBA, lambda layer: {"bc_norm": (16,)}, True),
    "log_step_b": (S5, lambda layer: {"log_step_b": (4,)}, False),
    "C_b": (S5_BIDIRECTIONAL, lambda layer: {"C_b": tuple(layer.C_re.shape)}, False),
    "h_0": (LRU, lambda layer: {"h_0": (8,)}, True),
}


@pytest.mark.parametrize("name", FORKS)
def test_a_tensor_of_the_states_width_that_the_family_does_not_know_is_refused(name: str, tmp_path: Path) -> None:
    family, shape_of, buffer = FORKS[name]
    model = forked(family, shape_of, buffer)
    before = snapshot(model)["tensors"]
    match = rf"has {name.partition(' ')[0]} of shape .*ignore_layers"
    refused(model, family, match, tmp_path if family in (MAMBA, LRU) else None)
    assert same(snapshot(model)["tensors"], before)


@pytest.mark.parametrize("family", each(), ids=family_id)
def test_the_table_of_a_family_names_every_tensor_of_its_layers(family: Family) -> None:
    for layer in find_layers(family.build()):
        tensors = dict([*layer.module.named_parameters(), *layer.module.named_buffers()])
        axes = layer.family.state_axes(layer.module)
        assert tensors.keys() <= axes.keys()
        smaller = find_layers(family.build(state_size=layer.state_size // 2))[0].module
        others = dict([*smaller.named_parameters(), *smaller.named_buffers()])
        for name, tensor in tensors.items():
            changed = [
                i for i, pair in enumerate(zip(tensor.shape, others[name].shape, strict=True)) if pair[0] != pair[1]
            ]
            axis = axes[name]
            assert changed == ([] if axis is None else [axis % tensor.dim()]), name


@pytest.mark.parametrize("width", ["hidden_size", "time_step_rank", "conv_kernel"])
def test_what_is_as_wide_as_the_state_by_chance_is_cut_in_known_layers_and_plain_subclasses(width: str) -> None:
    settings = {"hidden_size": 8, "time_step_rank": 2, width: 8}
    model = MAMBA.build(**settings)
    for layer in ssm_layers(model).values():
        layer.__class__ = subclass_of(type(layer), lambda layer: {"temperature": (1,)})
        layer.grow()
    assert compress(model, HALF, MAMBA.calibration()).changed


def test_what_has_the_width_of_the_state_only_after_a_cut_does_not_stop_the_next_one(tmp_path: Path) -> None:
    model = forked(MAMBA, lambda layer: {"mixing": (12, 4)})
    trainer = trainer_of(MAMBA, tmp_path, {"fraction": 0.5, "end": 4, "num_cuts": 2}, model=model)
    trainer.train()
    assert [event.outcome for event in callback_of(trainer).events] == ["cut", "cut"]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def old_weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module)


PARAMETRIZED: dict[str, tuple[Family, Callable[[Any], Any], str]] = {
    "weight_norm": (MAMBA, lambda x: parametrizations.weight_norm(x.x_proj), "x_proj.weight is not .*WeightNorm"),
    "spectral_norm": (
        MAMBA,
        lambda x: parametrizations.spectral_norm(x.x_proj),
        "x_proj.weight is not .*SpectralNorm",
    ),
    "old weight_norm": (
        MAMBA,
        lambda x: old_weight_norm(x.x_proj),
        "x_proj.weight is not .*WeightNorm.*torch.nn.utils",
    ),
    "old spectral_norm": (MAMBA2, lambda x: nn.utils.spectral_norm(x.in_proj), "in_proj.weight is not .*SpectralNorm"),
    "prune": (MAMBA, lambda x: prune.l1_unstructured(x.x_proj, "weight", 0.3), "L1Unstructured.*prune.remove"),
    "convolution": (BAMBA, lambda x: parametrizations.weight_norm(x.conv1d), "conv1d.weight is not .*WeightNorm"),
    "scaled": (
        FALCON_MAMBA,
        lambda x: parametrize.register_parametrization(x.out_proj, "weight", Doubled()),
        "out_proj.weight is not .*Doubled.*remove_parametrizations",
    ),
    "own": (LRU, lambda x: parametrize.register_parametrization(x, "theta", Doubled()), "theta is not .*Doubled"),
    "D": (FALCON_MAMBA, lambda x: parametrize.register_parametrization(x, "D", Doubled()), "D is not .*Doubled"),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_weight_that_is_computed_from_others_is_named_with_its_cause(kind: str, tmp_path: Path) -> None:
    family, change, match = PARAMETRIZED[kind]
    model = family.build()
    for layer in ssm_layers(model).values():
        change(layer)
    refused(model, family, match, tmp_path if kind == "weight_norm" else None)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, lambda x: prune.l1_unstructured(x, "weight", 0.3)])
def test_a_computed_weight_that_no_cut_replaces_stays(change: Callable[[Any], Any]) -> None:
    """Also where what it is computed from has, by chance, the width of the state."""
    model = MAMBA.build(hidden_size=8)
    for layer in ssm_layers(model).values():
        change(layer.in_proj)
    assert compress(model, HALF, MAMBA.calibration()).changed


def test_a_parametrization_that_was_removed_stands_in_no_ones_way() -> None:
    model = MAMBA.build()
    for layer in ssm_layers(model).values():
        parametrizations.weight_norm(layer.x_proj)
        parametrize.remove_parametrizations(layer.x_proj, "weight")
    assert compress(model, HALF, MAMBA.calibration()).changed


@pytest.mark.parametrize("family", [MAMBA, MAMBA2, LRU], ids=family_id)
def test_layers_without_their_data_are_named_with_the_cause(family: Family, tmp_path: Path) -> None:
    offloaded, on_disk = family.build(), family.build()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    disk_offload(on_disk, str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    for model in (offloaded, on_disk):
        refused(model, family, "is offloaded: accelerate.*remove_hook_from_submodules")
    with init_empty_weights():
        empty = family.model_class(family.config())
    refused(empty, family, "has no data.*meta device.*from_pretrained")


def test_an_offloaded_part_elsewhere_is_named_where_batches_have_to_run_through_it() -> None:
    measured, closed = MAMBA.build(), LRU.build()
    for model in (measured, closed):
        cpu_offload(model.get_input_embeddings(), execution_device=torch.device("cpu"))
    refused(measured, MAMBA, "embeddings.weight is offloaded")
    assert compress(closed, HALF).changed


def test_a_model_that_is_brought_back_is_cut() -> None:
    from accelerate.hooks import remove_hook_from_submodules

    model = MAMBA.build()
    cpu_offload(model, execution_device=torch.device("cpu"))
    remove_hook_from_submodules(model)
    assert compress(model, HALF, MAMBA.calibration()).changed


class Integers(nn.Linear):
    """As bitsandbytes has it: the weight is a parameter of whole numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.detach().mul(10).to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).T / 10


def test_quantised_weights_are_named_by_compress_too() -> None:
    model = MAMBA.build()
    for layer in ssm_layers(model).values():
        layer.x_proj = Integers(layer.x_proj)
    refused(model, MAMBA, r"x_proj.weight is quantised \(torch.int8\).*after its last cut")
    quantization = pytest.importorskip("torchao.quantization")
    model = MAMBA2.build()
    kinds = (nn.Linear,)
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), lambda part, name: isinstance(part, kinds) and "in_proj" in name
    )
    refused(model, MAMBA2, r"in_proj.weight is quantised \(\w+\)")


@pytest.mark.parametrize("family", [MAMBA, LRU], ids=family_id)
def test_one_parameter_of_two_layers_is_named_before_the_first_step(family: Family, tmp_path: Path) -> None:
    model = family.build()
    one, other = ssm_layers(model).values()
    name = "A_log" if family is MAMBA else "B_re"
    setattr(one, name, getattr(other, name))
    refused(model, family, rf"{name} and that of .* are one shared parameter.*ignore_layers", tmp_path)


def test_a_copied_model_is_not_a_shared_one() -> None:
    model = MAMBA.build()
    assert compress(copy.deepcopy(model), HALF, MAMBA.calibration()).changed
    assert compress(model, HALF, MAMBA.calibration()).changed


def test_a_distributed_tensor_is_named_by_compress_too(tmp_path: Path) -> None:
    model = LRU.build()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = next(iter(ssm_layers(model).values()))
        layer.C_re = nn.Parameter(DTensor.from_local(layer.C_re.detach(), mesh, [Shard(0)]))
        refused(model, LRU, "C_re is a DTensor.*hf-compressm compress")
    finally:
        dist.destroy_process_group()
