"""The benchmark of Mamba-2 and its rivals: rows resume, every rival's order is right where the answer is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_compressm.families import find_layers
from hf_compressm.families.recurrences import replaced
from hf_compressm.scans import ssd_states


STATES = 6
STEP = 0.01
"""Of finite differences, with errors of its square."""
LOUDER = 10
ROUNDING = 1e-5
"""Of such differences of a float32 loss."""
SCORES = ("magnitude", "taylor_of_weights", "taylor_of_masks", "activations")


@pytest.fixture(params=["mamba2", "hybrid"])
def training(part: Any, request: pytest.FixtureRequest) -> Any:
    module = part("small_training")
    task = module.recall(keys=4, shown=8, rows=2, held_out=1)
    torch.manual_seed(0)
    model = getattr(part("small_models"), request.param)(STATES, 32, task.vocab_size, 2)
    return module.Training(task, 0, model.double())


def state_rows(layer: Any, group: int, state: int) -> list[int]:
    """The rows of `in_proj` that make B and C of a state."""
    inner, groups = int(layer.module.out_proj.weight.shape[1]), int(layer.module.n_groups)
    return [2 * inner + (kind * groups + group) * STATES + state for kind in (0, 1)]


def test_rows_are_written_told_drawn_and_passed_over(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = part("compare_mamba2")
    arms = {arm.name: arm for arm in script.ARMS}
    odd = part("cut_arms").Arm("odd", {"a": 1})
    monkeypatch.setattr(script, "ARMS", (arms["Taylor"], arms["energy"], arms["fisher"], arms["projection"], odd))
    command = ["--smoke", "--tasks", "recall", "hybrid", "--output", str(tmp_path)]
    command += ["--only", "uncut*", "Taylor to 4", "*to 2, trained on", "fisher to 4", "projection to 4", "odd to *"]
    script.main(command)
    told = capsys.readouterr().out
    done = part("rows").Results(tmp_path).read()
    assert {key for key in done if key.startswith("recall")} == {
        "recall-uncut-seed0",
        "recall-Taylor_to_4-seed0",
        "recall-fisher_to_4-seed0",
        "recall-projection_to_4-seed0",
        "recall-uncut_trained_on-seed0",
        "recall-Taylor_to_2_trained_on-seed0",
        "recall-energy_to_2_trained_on-seed0",
        "recall-projection_to_2_trained_on-seed0",
    }
    assert told.count("left out, there is no setting a") == 2
    assert told.count("left out, the package has no class for BambaForCausalLM") == 1
    cut = done["recall-fisher_to_4-seed0"]
    assert len(cut["measured"]) == len(cut["predicted"]) == 2
    assert cut["predicted loss change"] is not None
    assert done["recall-Taylor_to_4-seed0"]["predicted loss change"] is None
    assert (tmp_path / "loss_changes.png").stat().st_size > 0
    later = done["recall-uncut_trained_on-seed0"]["trained on"]
    assert done["recall-uncut-seed0"]["before"]["loss"] > later["1"]["loss"] > later["3"]["loss"]

    (tmp_path / "loss_changes.png").unlink()
    monkeypatch.setattr(script.Mamba2Bench, "trained", None)  # nothing may run again
    script.main(command)
    assert "| projection | 2 | 0 |" in capsys.readouterr().out
    assert part("rows").Results(tmp_path).read() == done
    assert (tmp_path / "loss_changes.png").exists()


def test_nothing_is_drawn_of_changes_without_a_logarithm(part: Any, tmp_path: Path) -> None:
    part("plots").draw_loss_changes([("fisher", -0.01, 0.02), ("fisher", 0.01, 0.0)], tmp_path / "changes.png")
    assert (tmp_path / "changes.png").exists()


def test_the_time_of_a_cut_counts_as_steps(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = part("compare_mamba2")
    module = part("small_training")
    bench = script.Mamba2Bench(
        module.recall(rows=2, held_out=1), 0, tmp_path, 2, script.SMOKE, part("small_models").mamba2
    )
    steps: list[tuple[int, float]] = []

    def until(self: Any, step: int, shape: Callable[[int], float]) -> None:
        while self.step < step:
            steps.append((self.step, shape(self.step)))
            self.step += 1

    training = bench.begin()
    training.step = 2
    monkeypatch.setattr(module.Training, "until", until)
    bench.trained_on(training, 2)  # of the 3 steps of a smoke test
    assert steps == [(2, pytest.approx(1 / 3))]
    bench.trained_on(training, 5)
    assert len(steps) == 1
    bench.trained_on(training, 0)
    assert [share for _, share in steps[1:]] == pytest.approx([1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("name", SCORES)
def test_a_state_that_does_nothing_is_wanted_least(part: Any, training: Any, name: str) -> None:
    dead = {"magnitude": (0, 1), "taylor_of_weights": (0, 1), "taylor_of_masks": (1,), "activations": (0,)}[name]
    layers = find_layers(training.model)
    inner = int(layers[0].module.out_proj.weight.shape[1])
    with torch.no_grad():
        for layer in layers:
            for group in range(layer.module.n_groups):
                rows = torch.tensor([state_rows(layer, group, 2)[kind] for kind in dead])
                layer.module.in_proj.weight[rows] = 0
                layer.module.conv1d.bias[rows - inner] = 0  # the gate's rows come before
    scores = getattr(part("state_scores"), name)(training.model, training.calibration(2))
    assert list(scores) == [layer.name for layer in layers]
    for layer in layers:
        found = scores[layer.name]
        assert found.shape == (layer.module.n_groups, STATES)
        assert found.argmin(dim=1).tolist() == [2] * layer.module.n_groups
        assert found[:, 2].abs().max() < 1e-12
        others = found[:, [0, 1, 3, 4, 5]]
        assert others.min() > 0


def test_magnitude_is_that_of_both_rows(part: Any, training: Any) -> None:
    scores = part("state_scores").magnitude(training.model, [])
    for layer in find_layers(training.model):
        weight = layer.module.in_proj.weight
        for group in range(layer.module.n_groups):
            norms = [weight[row].norm() for row in state_rows(layer, group, 4)]
            torch.testing.assert_close(scores[layer.name][group, 4], norms[0] * norms[1])


def masked_losses(training: Any, batch: Any, where: tuple[int, int, int], value: float) -> Tensor:
    """The loss of every sequence with a mask on one state of one layer."""
    count = [0]

    def stand_in(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def masked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any, **kwargs: Any) -> Any:
            if count[0] == where[0]:
                C = C.clone()
                C[:, :, where[1], where[2]] *= value
            count[0] += 1
            return function(x, dt, A, B, C, *args, **kwargs)

        return masked

    losses = []
    for row in range(batch["input_ids"].shape[0]):
        count[0] = 0
        with replaced(training.model, stand_in, lambda signal, weight: signal), torch.no_grad():
            losses.append(training.model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss)
    return torch.stack(losses)


def test_the_taylor_score_of_masks_is_that_of_finite_differences(part: Any, training: Any) -> None:
    training.model.eval()
    with torch.no_grad():
        training.model.get_output_embeddings().weight *= LOUDER
        for layer in find_layers(training.model):
            layer.module.in_proj.weight *= LOUDER
            layer.module.out_proj.weight *= LOUDER
    (batch,) = training.calibration(1)
    scored = (batch["labels"][:, 1:] != -100).sum(dim=1)
    batch = {name: tensor[scored == scored.max()] for name, tensor in batch.items()}  # alike, so that means agree
    scores = part("state_scores").taylor_of_masks(training.model, [batch])
    tokens = float(scored.max())
    for number, layer in enumerate(find_layers(training.model)):
        group, state = divmod(int(scores[layer.name].argmax()), STATES)  # where the loss, in float32, shows most
        ends = [masked_losses(training, batch, (number, group, state), 1 + sign * STEP) for sign in (1, -1)]
        gradients = (ends[0] - ends[1]) / (2 * STEP)
        expected = abs(-gradients.mean() + tokens * gradients.square().mean() / 2)
        assert float(scores[layer.name][group, state]) == pytest.approx(float(expected), rel=0.02, abs=ROUNDING)


def test_the_taylor_score_of_weights_is_that_of_single_sequences(part: Any, training: Any) -> None:
    (batch,) = training.calibration(1)
    scores = part("state_scores").taylor_of_weights(training.model, [batch])
    layer = find_layers(training.model)[1]
    rows, total = state_rows(layer, 0, 1), 0.0
    for row in range(batch["input_ids"].shape[0]):
        training.model.zero_grad()
        training.model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss.backward()
        weight = layer.module.in_proj.weight
        total += float((weight.detach()[rows] * weight.grad[rows]).square().mean(dim=1).sum())
    assert float(scores[layer.name][0, 1]) == pytest.approx(total, rel=1e-9)


def test_the_score_of_activations_is_of_inputs_and_reads_alone(part: Any, training: Any) -> None:
    batches = training.calibration(2)
    module = part("state_scores")
    scores = module.activations(training.model, batches)
    seen = []
    for batch in batches:
        with module.recurrences_seen(training.model) as calls, torch.no_grad():
            training.model(**batch)
        seen.append(calls[0])
    B, C, dt = (torch.cat([call[name] for call in seen]).flatten(0, 1) for name in ("B", "C", "dt"))
    layer = find_layers(training.model)[0]
    heads = dt.shape[1] // layer.module.n_groups
    of_heads = [torch.linalg.norm(dt[:, head, None] * B[:, 0], dim=0) for head in range(heads)]
    torch.testing.assert_close(scores[layer.name][0], sum(of_heads) * torch.linalg.norm(C[:, 0], dim=0))


def test_a_cut_by_scores_keeps_the_states_with_the_largest(part: Any, training: Any) -> None:
    arms, layers = part("cut_arms"), find_layers(training.model)
    before = [layer.module.in_proj.weight.detach().clone() for layer in layers]

    def last(model: Any, batches: Any) -> dict[str, Tensor]:
        assert len(batches) == 1
        return {layer.name: torch.arange(STATES).expand(layer.module.n_groups, STATES) for layer in layers}

    training.model.float()
    result = arms.cut(training, arms.Arm("last", {"refit_steps": 0}, scores=last), 2, batches=1)
    assert result.seconds > 0
    for layer, weight in zip(layers, before, strict=True):
        inner, groups = int(layer.module.out_proj.weight.shape[1]), layer.module.n_groups
        kept = sorted(row for state in (4, 5) for group in range(groups) for row in state_rows(layer, group, state))
        torch.testing.assert_close(
            layer.module.in_proj.weight[2 * inner : 2 * inner + 4 * groups].double(), weight[kept], rtol=1e-6, atol=0
        )


def test_tables_say_what_was_added_and_what_was_foreseen(part: Any) -> None:
    tables = part("mamba2_tables")
    shared = {"task": "text", "steps": 1, "seed": 0, "seconds of the cut": 1.0, "measured": [0.5], "predicted": [0.4]}
    rows = [{**shared, "arm": "uncut", "size": 8, "before": {"loss": 1.0}}]
    for arm, loss, predicted in (("energy", 1.05, 0.04), ("refit", 1.02, 0.05), ("selection", 1.2, 0.5)):
        values = {"arm": arm, "size": 4, "after": {"loss": loss}, "predicted loss change": predicted}
        rows.append(shared | values)
    del rows[0]["measured"]
    text = tables.tables(rows)
    assert "| refit | 0 | +0.0200 | 1.0 |" in text
    assert "| refit / energy | 0.40 |" in text
    assert "| refit | 4 | 0 | 0.500 | 0.80 to 0.80 |" in text
    assert "- energy: 1 of 1 cuts, predicted / measured 0.80" in text
    assert "- refit: 0 of 1 cuts" in text
    assert "- selection" not in text


def test_unweighted_energy_is_that_of_the_recurrence_alone(part: Any, training: Any) -> None:
    orders, scores = part("state_orders"), part("state_scores")
    batches = training.calibration(1)
    layer = find_layers(training.model)[0]
    with scores.recurrences_seen(training.model) as calls, torch.no_grad():
        training.model(**batches[0])
    given = {name: calls[0][name] for name in ("x", "dt", "A", "B", "dt_bias", "dt_softplus") if name in calls[0]}
    chunks = ssd_states(**given, every=1)
    states = torch.cat(list(chunks)).unflatten(
        2, (layer.module.n_groups, -1)
    )  # (length, batch, groups, heads, ..., N)
    reads = calls[0]["C"].transpose(0, 1)[:, :, :, None, None]
    expected = (states * reads).square().sum(dim=(0, 1, 3, 4))
    seen = []

    def order(layer: Any, measured: Any) -> Tensor:
        seen.append(measured.scores)
        return orders.by_energy(layer, measured)

    arms = part("cut_arms")
    arm = arms.Arm("GHOST", {"refit_steps": 0}, order, statistics=orders.UnweightedStatistics)
    arms.cut(training, arm, 2, batches=1)
    torch.testing.assert_close(seen[0] / seen[0].sum(), (expected / expected.sum()).double(), rtol=1e-4, atol=0)
