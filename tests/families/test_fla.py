"""Layers of flash-linear-attention where the package is installed; `ready.py` has their stand-ins."""

import pytest
import torch
from torch import nn

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.families import CutMethod, find_layers
from tests.blocks import FlaMamba, FlaMamba2
from tests.families import ready
from tests.families.measuring import calls_of, run, signals_of


WIDTH = ready.WIDTH
SUMS = 1e-5
"""Relative error of float32 sums in another order."""
SIZES = {"head_dim": 3, "hidden_size": WIDTH, "state_size": 6, "n_groups": 2, "chunk_size": 4}


def layer_of(name: str) -> nn.Module:
    layers = pytest.importorskip("fla.layers")
    if name == "Mamba":
        return layers.Mamba(hidden_size=WIDTH, state_size=6, intermediate_size=24, backend="triton")
    return layers.Mamba2(backend="triton", rmsnorm=False, **SIZES)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_its_loop_on_a_cpu_is_left_alone_with_a_reason(name: str) -> None:
    model = ready.Stack([layer_of(name)])
    (found,) = find_layers(model)
    assert found.family.name == name.lower()
    model.layers[0].act = nn.SiLU()  # the package's own is a kernel
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = compress(model, CompreSSMConfig(target_state_size=4), [ready.batch(model)])
    assert not result.changed
    (layer,) = result.plan.layers
    assert layer.status == "skipped"
    assert "no recurrence was seen" in layer.reason
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_a_smaller_layer_is_one_that_was_built_so(name: str) -> None:
    """The stand-in, cut, holds the sizes of the package's layer of that size, and its weights fit."""
    row = ready.READY["mamba of fla" if name == "Mamba" else "mamba2 of fla"]
    model = ready.built(row)
    with ready.as_installed():
        compress(model, CompreSSMConfig(target_state_size=4), [ready.batch(model)])
    (stand_in,) = model.layers
    assert isinstance(stand_in, FlaMamba | FlaMamba2)
    layers = pytest.importorskip("fla.layers")
    if name == "Mamba":
        whole = layers.Mamba(hidden_size=WIDTH, state_size=4, intermediate_size=24, backend="triton")
    else:
        whole = layers.Mamba2(backend="triton", **{**SIZES, "state_size": 4})
    whole.load_state_dict(stand_in.state_dict())
    for attribute in ("ssm_state_size", "conv_dim"):
        assert getattr(whole, attribute, None) == getattr(stand_in, attribute, None)


@pytest.mark.parametrize("name", ["gated deltanet of fla", "deltanet of fla, plain", "kda of fla", "gla of fla"])
def test_read_out_of_its_states_a_layer_gives_what_its_recurrence_gives(name: str) -> None:
    with ready.as_installed():
        model = ready.built(ready.READY[name])
        data = ready.batch(model)
        ((signal,),), (seen,) = signals_of(model, data), calls_of(model, data)
    given = torch.einsum("lbgcn,blgn->blgc", torch.cat([chunk.clone() for chunk in signal.states]), signal.C)
    wanted = seen.calls[0].output.detach().unflatten(2, (given.shape[2], -1)).flatten(3, 4)
    torch.testing.assert_close(given.detach(), wanted, rtol=SUMS, atol=SUMS * float(wanted.abs().max()))


def test_heads_that_share_keys_are_left_alone_with_a_reason() -> None:
    with ready.as_installed():
        model = ready.Stack([ready.GatedLinearAttention(WIDTH, 2.0, num_kv_heads=1)])
        (layer,) = find_layers(model)
        statistics = layer.family.statistics(layer.module, "empirical")
        assert statistics is not None
        assert "share keys" in layer.family.measure(layer, CutMethod("empirical"), statistics).problem


@pytest.mark.parametrize("name", ["gated deltanet of fla, plain", "deltanet of fla, plain", "kda of fla, bounded"])
def test_padding_that_a_delta_net_takes_away_is_not_seen(name: str) -> None:
    """Rows of real tokens lie one after the other then, and the state of each begins at zero."""
    with ready.as_installed():
        layer = ready.READY[name].build(6)
        x = torch.randn(3, 7, WIDTH)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
        padded = run(layer, "empirical", (x, {"attention_mask": mask}))
        alone = run(layer, "empirical", *((row[None, real.bool()], {}) for row, real in zip(x, mask, strict=True)))
    assert padded.tokens == alone.tokens == 18
    for moment in ("P", "Q", "M"):
        scale = float(alone.sums[moment].abs().max())
        torch.testing.assert_close(padded.sums[moment], alone.sums[moment], rtol=SUMS, atol=SUMS * scale)
