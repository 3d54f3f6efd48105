"""The numbers that a cut leaves in a log."""

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.history import CutEvent, scalars
from tests.families import LRU, MAMBA


def test_scalars_are_flat_numbers_that_tell_what_happened() -> None:
    result = compress(LRU.build(), CompreSSMConfig(fraction=0.5, layers=["layers.1.ssm"]))
    values = scalars(CutEvent(7, result))
    assert all(type(value) is float for value in values.values())
    assert values["compressm/cut"] == 1
    assert values["compressm/layer_00/state_size"] == 4
    assert values["compressm/parameters"] == result.parameters_after
    assert values["compressm/error_bound"] == result.plan.layers[0].error_bound


def test_without_a_bound_none_is_logged() -> None:
    result = compress(MAMBA.build(), CompreSSMConfig(fraction=0.5), MAMBA.calibration())
    assert "compressm/error_bound" not in scalars(CutEvent(1, result))


def test_a_cut_that_changed_nothing_is_logged_as_such() -> None:
    result = compress(LRU.build(), CompreSSMConfig(tolerance=0.0))
    values = scalars(CutEvent(1, result))
    assert (values["compressm/cut"], values["compressm/energy_kept"], values["compressm/state_size_mean"]) == (0, 1, 8)
