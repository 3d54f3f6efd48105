"""A layer of one's own, declared in a few lines: measured, cut, trained on, saved and loaded."""

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, Layout, analyze, compress, declare_layer, rows, states
from hf_compressm.families import find_layers, registry
from tests.blocks import Mamba, OffsetVim, at_path


STEPS = 8


def declare() -> None:
    """The declaration of a block with two directions."""
    declare_layer(
        OffsetVim,
        Layout(
            state_size="d_state",
            output="out_proj",
            parts=(
                states("A_log"),
                rows("x_proj", "*", "B", "C", folds=True),
                states("A_b_log", group=1),
                rows("x_proj_b", "*", "B", "C", folds=True, group=1),
            ),
        ),
        example=(OffsetVim(8, d_state=4), torch.randn(2, 9, 8)),
    )


@pytest.fixture(autouse=True)
def declared() -> Iterator[None]:
    before = dict(registry._FAMILIES)
    declare()
    yield
    registry._FAMILIES.clear()
    registry._FAMILIES.update(before)


class Tagger(nn.Module):
    """Two blocks, a head and a loss."""

    def __init__(self, d_state: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OffsetVim(8, d_state) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, signal: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for block in self.blocks:
            signal = signal + block(signal)
        logits = self.head(signal)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def built(seed: int = 0, d_state: int = 16) -> Tagger:
    torch.manual_seed(seed)
    return Tagger(d_state)


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    signals = torch.randn(count, 4, 24, 8, generator=generator).cumsum(2) / 5
    return [{"signal": signal, "labels": (signal[..., 0] > 0).long()} for signal in signals]


def test_it_takes_fewer_than_fifteen_lines() -> None:
    assert len(inspect.getsource(declare).splitlines()) - 2 <= 15  # without the head and docstring of the function


def error_of_a_cut(block: nn.Module, signal: Tensor, size: int) -> float:
    """The relative error of what the recurrences give: the feed-through, which no cut changes, is left out."""
    model = nn.Sequential(block).eval()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name in ("D", "D_b"):
                parameter.zero_()
        before = model(signal)
        compress(model, CompreSSMConfig(target_state_size=size), [signal])
        return float((model(signal) - before).norm() / before.norm())


@pytest.mark.parametrize("size", [16, 8, 4])
def test_its_cut_is_as_near_as_that_of_the_stock_layout(size: int) -> None:
    stock = at_path(Mamba, "mamba_ssm.modules.mamba_simple.Mamba")
    errors: dict[str, list[float]] = {"own": [], "stock": []}
    for seed in range(4):
        for name, block in (("own", OffsetVim), ("stock", stock)):
            torch.manual_seed(seed)
            signal = torch.randn(8, 64, 16).cumsum(1) / 8
            errors[name].append(error_of_a_cut(block(16, 32), signal, size))
    assert sum(errors["own"]) <= sum(errors["stock"])


def test_each_direction_keeps_states_of_its_own() -> None:
    model = built()
    with torch.no_grad():  # states of the first direction from the front, of the second from the back
        for block in model.blocks:
            block.x_proj.weight[block.dt_rank + 8 : block.dt_rank + 16] = 0
            block.x_proj.bias[block.dt_rank + 8 : block.dt_rank + 16] = 0
            block.x_proj_b.weight[block.dt_rank : block.dt_rank + 8] = 0
            block.x_proj_b.bias[block.dt_rank : block.dt_rank + 8] = 0
    before = copy.deepcopy(model)
    signal = batches()[0]["signal"]
    result = compress(model, CompreSSMConfig(target_state_size=8), batches())
    assert result.state_sizes_after == {"blocks.0": 8, "blocks.1": 8}
    for old, new in zip(before.blocks, model.blocks, strict=True):
        assert torch.equal(new.A_log, old.A_log[:, :8])
        assert torch.equal(new.A_b_log, old.A_b_log[:, 8:])
    torch.testing.assert_close(model(signal)["logits"], before(signal)["logits"], rtol=1e-4, atol=1e-5)


def test_it_is_cut_in_a_trainer_and_resumes_across_the_cut(tmp_path: Path) -> None:
    def trained(folder: Path, steps: int, resume: bool = False) -> Trainer:
        args = TrainingArguments(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            save_steps=5,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        data = [{key: value[row] for key, value in batch.items()} for batch in batches(4) for row in range(4)]
        callback = CompreSSMCallback(CompreSSMConfig(fraction=0.5, end=3, num_cuts=1, calibration_batches=2))
        trainer = Trainer(model=built(), args=args, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{steps}") if resume else None)
        return trainer

    whole = trained(tmp_path, STEPS)
    assert [layer.state_size for layer in find_layers(whole.model)] == [8, 8]
    again = trained(tmp_path, 5, resume=True)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    moments = whole.optimizer.state_dict()["state"]
    assert all(each["exp_avg"].isfinite().all() for each in moments.values())


def test_gradients_follow_as_autograd_has_them_where_nothing_is_lost() -> None:
    """The dropped states are copies of kept ones: the cut model is the same function."""
    model = built(d_state=4)
    with torch.no_grad():
        for block in model.blocks:
            for A, x_proj in ((block.A_log, block.x_proj), (block.A_b_log, block.x_proj_b)):
                A[:, 2:] = A[:, :2]
                for tensor in (x_proj.weight, x_proj.bias):
                    tensor[block.dt_rank + 2 : block.dt_rank + 4] = tensor[block.dt_rank : block.dt_rank + 2]
    batch = batches()[0]
    model(**batch)["loss"].backward()
    before = model(**batch)["logits"].detach()
    compress(model, CompreSSMConfig(target_state_size=2), batches())
    torch.testing.assert_close(model(**batch)["logits"], before, rtol=1e-3, atol=1e-4)
    carried = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(**batch)["loss"].backward()
    for name, parameter in model.named_parameters():
        if "A_" not in name:  # the decay of a dropped copy had a gradient of its own
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(carried[name], parameter.grad, rtol=1e-2, atol=1e-3 * scale)


def test_an_example_says_more_than_the_first_batch_and_a_name_is_given_once() -> None:
    layout = find_layers(built())[0].family.layout
    with pytest.raises(ValueError, match="already belongs to the family 'offsetvim'"):
        declare_layer(OffsetVim, layout, name="other")
    declare_layer(OffsetVim, layout)  # again, tried on the first batch
    plan = analyze(built(), CompreSSMConfig(fraction=0.5), iter(batches()))
    assert [(layer.family, layer.new_state_size) for layer in plan.layers] == [("offsetvim", 8)] * 2


class Derived(OffsetVim):
    """A class of its own."""


class Field(nn.Module):
    """A model with a configuration that names the size."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.block = Derived(8, config.width_of_state)

    def forward(self, signal: Tensor) -> Tensor:
        return self.block(signal)


def test_a_derived_class_is_such_a_layer_too_and_a_configuration_follows() -> None:
    config = PreTrainedConfig(width_of_state=16)
    layout = find_layers(built())[0].family.layout
    declare_layer(Derived, layout, config_field="width_of_state")
    model = Field(config)
    compress(model, CompreSSMConfig(target_state_size=6), [{"signal": batches()[0]["signal"]}])
    assert model.block.d_state == model.config.width_of_state == 6
