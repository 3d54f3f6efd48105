"""The numbers that a cut leaves in a log."""

from dataclasses import replace

import torch

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.compression import CompressionPlan
from hf_compressm.compression.history import CutEvent, rollback_event
from hf_compressm.compression.log import scalars, sentence
from tests.family_table import LRU, MAMBA


def test_scalars_are_flat_numbers_that_tell_what_happened() -> None:
    result = compress(LRU.build(), CompreSSMConfig(fraction=0.5, layers=["layers.1.ssm"]))
    values = scalars(CutEvent(7, result))
    assert all(type(value) is float for value in values.values())
    assert values["compressm/cut"] == 1
    assert values["compressm/layer_00/state_size"] == 4
    assert values["compressm/parameters"] == result.parameters_after
    assert values["compressm/error_bound"] == result.plan.layers[0].error_bound
    assert result.state_bytes_after == result.state_bytes_before * 3 / 4  # one of two layers is halved
    assert values["compressm/state_bytes"] == result.state_bytes_after
    layer = result.plan.layers[0]
    assert values["compressm/layer_00/energy_kept"] == layer.energy_kept
    assert values["compressm/layer_00/predicted_error"] == layer.predicted_error


def test_without_a_bound_none_is_logged() -> None:
    result = compress(MAMBA.build(), CompreSSMConfig(fraction=0.5), MAMBA.calibration())
    assert "compressm/error_bound" not in scalars(CutEvent(1, result))


def test_a_cut_that_changed_nothing_is_logged_as_such() -> None:
    result = compress(LRU.build(), CompreSSMConfig(tolerance=0.0))
    values = scalars(CutEvent(1, result))
    assert (values["compressm/cut"], values["compressm/energy_kept"], values["compressm/state_size_mean"]) == (0, 1, 8)


def test_effective_states_hold_99_percent_of_the_energy() -> None:
    result = compress(LRU.build(), CompreSSMConfig(fraction=0.5))
    sigma = torch.tensor([50.0, 49.5, 0.4, 0.1] + 12 * [0.0], dtype=torch.float64)  # two values per state
    layers = tuple(replace(layer, hankel_singular_values=sigma) for layer in result.plan.layers)
    values = scalars(CutEvent(1, replace(result, plan=CompressionPlan(layers))))
    assert values["compressm/layer_00/effective_states"] == 1


def test_a_sentence_tells_of_any_number_of_layers() -> None:
    result = compress(LRU.build(num_hidden_layers=24), CompreSSMConfig(fraction=0.5))
    parameters = f"{result.parameters_before:,} -> {result.parameters_after:,} parameters"
    state = f"{result.state_bytes_before:,} -> {result.state_bytes_after:,} bytes of state per sequence"
    assert result.state_bytes_after == result.state_bytes_before / 2
    told = sentence(CutEvent(2, replace(result, seconds=0.314)))
    assert told == f"CompreSSM, cut after step 2: 24 of 24 layers, 8 -> 4 states, {parameters}, {state} (0.31 s)."
    assert str(result.plan).endswith(f"state of a sequence: {state.removesuffix(' of state per sequence')}")


def test_a_sentence_tells_of_sizes_that_differ() -> None:
    result = compress(LRU.build(), CompreSSMConfig(fraction=0.5, layers=["layers.1.ssm"]))
    both = replace(
        result,
        state_sizes_before={"a": 8, "b": 8},
        state_sizes_after={"a": 8, "b": 3},
    )
    assert ": 1 of 2 layers, 8 -> 3 to 8 states, " in sentence(CutEvent(1, both))
    assert ": 1 of 1 layer, 8 -> 4 states, " in sentence(CutEvent(1, result))


def test_a_sentence_tells_what_was_not_cut_or_did_not_last() -> None:
    unchanged = CutEvent(1, compress(LRU.build(), CompreSSMConfig(tolerance=0.0)))
    assert sentence(unchanged).startswith("CompreSSM, unchanged after step 1: 2 layers of 8 states (")
    cut = CutEvent(3, compress(LRU.build(), CompreSSMConfig(fraction=0.5)), before=2.0, after=2.5)
    assert ": 2 layers of 8 states, held-out loss 2 -> 2.5 (" in sentence(replace(cut, outcome="undone"))
    back = rollback_event(5, cut, 1.0, float("nan"), 0.1)
    assert sentence(back).startswith("CompreSSM, rolled back after step 5: 2 layers, 4 -> 8 states, metric 1 -> nan (")
