"""Layers of flash-linear-attention: what is particular to them, and the package itself where it is installed.

`ready.py` has their stand-ins, which `test_ready.py` cuts.
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.families import find_layers
from hf_compressm.families.calls import Seen, signals
from hf_compressm.families.registry import registered
from hf_compressm.families.running import example_of
from hf_compressm.surgery import reshape_layers
from tests.blocks import FlaMamba, FlaMamba2
from tests.families import ready
from tests.families.measuring import calls_of, run, signals_of


WIDTH = ready.WIDTH
SUMS = 1e-5
"""Relative error of float32 sums in another order."""
GRADIENT = 1e-4
"""Relative to the largest entry; float32, through a recurrence and its interpolation."""
SIZES = {"head_dim": 3, "hidden_size": WIDTH, "state_size": 6, "n_groups": 2, "chunk_size": 4}
ATTENTION = [name for name, row in ready.READY.items() if row.family in ("gated_deltanet", "delta_net", "kda", "gla")]
PLAIN = [name for name in ATTENTION if "plain" in name or "bounded" in name or name == "gla of fla, keys shared"]
"""Those without a convolution, which in the stand-ins runs from text to text."""
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])


@pytest.fixture
def installed() -> Iterator[None]:
    with ready.as_installed():
        yield


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


def assert_read_outs_are_outputs(layer: nn.Module, x: Tensor, **kwargs: Any) -> None:
    """The states of the signals, read out by their C, are what the recurrence returned: gates, norms and texts too."""
    (seen,) = calls_of(layer, {"hidden_states" if hasattr(layer, "mode") else "hidden": x, **kwargs})
    (call,) = seen.calls
    found = signals(call, seen.mask)
    states = torch.cat([chunk.clone() for chunk in found.states])  # (length, batch, groups, channels, N)
    read = torch.einsum("lbgcn,blgn->blgc", states, found.C).flatten(2)
    torch.testing.assert_close(read, call.output.detach().flatten(2), rtol=SUMS, atol=SUMS)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_what_the_states_read_out_is_the_output(name: str, mask: Tensor | None, installed: None) -> None:
    layer = ready.READY[name].build(6)
    assert_read_outs_are_outputs(layer, torch.randn(3, 7, WIDTH), attention_mask=mask)


@pytest.mark.parametrize("name", PLAIN)
def test_padding_that_a_layer_takes_away_is_not_seen(name: str, installed: None) -> None:
    """Rows of real tokens lie one after the other then, and the state of each begins at zero."""
    layer = ready.READY[name].build(6)
    x = torch.randn(3, 7, WIDTH)
    padded = run(layer, "empirical", (x, {"attention_mask": MASK}))
    alone = run(layer, "empirical", *((row[None, real.bool()], {}) for row, real in zip(x, MASK, strict=True)))
    assert padded.tokens == alone.tokens == int(MASK.sum())
    assert padded.told_apart
    for moment in {"P", "Q", "M"} & alone.sums.keys():
        scale = float(alone.sums[moment].abs().max())
        torch.testing.assert_close(padded.sums[moment], alone.sums[moment], rtol=SUMS, atol=SUMS * scale)


def test_texts_of_a_row_that_is_kept_in_part_end_with_it() -> None:
    given = {"hidden_states": torch.randn(1, 20, WIDTH), "cu_seqlens": torch.tensor([0, 4, 13, 20])}
    example = example_of(Seen(None, (), given, None, ()), tokens=11)
    assert example is not None
    assert example.kwargs["hidden_states"].shape == (1, 11, WIDTH)
    assert example.kwargs["cu_seqlens"].tolist() == [0, 4, 11]
    whole = example_of(Seen(None, (), given, None, ()), tokens=20)
    assert whole is not None
    assert whole.kwargs["cu_seqlens"].tolist() == [0, 4, 13, 20]


def with_twins(shared: int) -> ready.Stack:
    """Heads of six channels, of which the last two hold what the first two do: four suffice."""
    layer: Any = ready.GatedLinearAttention(WIDTH, 4 * 6 / WIDTH, num_heads=4, num_kv_heads=4 // shared)
    layer.g_norm_swish_gate.eps = 1.0  # a scale that is off would show
    with torch.no_grad():
        for tensor in (layer.k_proj.weight, layer.gk_proj[1].weight, layer.gk_proj[1].bias):
            heads = tensor.unflatten(0, (-1, 6))
            heads[:, 4:] = heads[:, :2]
    return ready.Stack([layer])


@pytest.mark.parametrize("shared", [1, 2])
def test_twins_are_folded_exactly_and_moments_are_gradients_of_the_cut_layer(shared: int, installed: None) -> None:
    model = with_twins(shared)
    layer: Any = model.layers[0]
    data, target = ready.batch(model), torch.randn(3, 13, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.9), weight_decay=0.0)
    before = model(**data)
    (before * target).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    settings = CompreSSMConfig(target_state_size=4, refit_steps=0)
    result = compress(model, settings, [data], optimizer)
    assert result.plan.layers[0].predicted_error < SUMS
    after = model(**data)
    torch.testing.assert_close(after, before, rtol=SUMS, atol=SUMS)
    (after * target).sum().backward()
    for weight in (layer.q_proj.weight, layer.k_proj.weight):
        scale = float(weight.grad.abs().max())
        torch.testing.assert_close(
            optimizer.state[weight]["exp_avg"], weight.grad, rtol=GRADIENT, atol=GRADIENT * scale
        )


def test_heads_that_share_keys_are_added_up(installed: None) -> None:
    layer = ready.READY["gla of fla, keys shared"].build(6)
    x = torch.randn(3, 13, WIDTH)
    ((found,),) = signals_of(layer, {"hidden": x})
    states = torch.cat([chunk.clone() for chunk in found.states]) * found.gain[..., None]
    P = torch.einsum("lbgcm,lbgcn->gmn", states, states).double()  # of every head
    sums = run(layer, "interpolative", (x, {})).sums["P"]
    torch.testing.assert_close(sums, torch.stack([P[:2].sum(0), P[2:].sum(0)]), rtol=SUMS, atol=SUMS * float(P.max()))


def test_channels_are_chosen_by_elimination_where_queries_are_not_linear(installed: None) -> None:
    criteria = {name: find_layers(ready.built(ready.READY[name]))[0].family.criteria for name in ATTENTION}
    folding = {name for name, known in criteria.items() if known[0] == "interpolative"}
    assert folding == {"gla of fla", "gla of fla, keys shared"}
    assert set(criteria.values()) == {("interpolative", "fisher"), ("empirical", "fisher")}


def test_factors_are_found_for_every_size() -> None:
    """The conditions are those of `fla.layers`."""
    gated: Any = registered("fla.layers.gated_deltanet.GatedDeltaNet")
    for values in (*range(1, 20), 48, 64, 100, 127, 128, 192, 256, 512):
        for size in range(1, 257):
            layer = SimpleNamespace(head_v_dim=values)
            fields = gated.configured(layer, size)
            assert fields["head_dim"] == size
            assert int(size * fields["expand_v"]) == values
            assert math.isclose(16 * size * fields["expand_v"], 16 * values, rel_tol=1e-5)
    delta: Any = registered("fla.layers.delta_net.DeltaNet")
    for hidden, heads in ((768, 12), (1000, 3), (2048, 16), (2560, 20)):
        for size in range(1, 257):
            layer = SimpleNamespace(hidden_size=hidden, num_heads=heads)
            (factor,) = delta.configured(layer, size).values()
            assert math.isclose(hidden * factor, round(hidden * factor))
            assert round(hidden * factor) == heads * size


class Config(PreTrainedConfig):
    """Fields of fla's configurations."""

    model_type = "stand_in_of_fla"

    def __init__(self, head_dim: int = 6, expand_v: float = 2.0, **kwargs: Any) -> None:
        self.head_dim, self.expand_v, self.num_hidden_layers = head_dim, expand_v, 2
        super().__init__(**kwargs)


class Model(PreTrainedModel):
    """Layers of fla that are built from a configuration."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        build = ready.GatedDeltaNet
        self.layers = nn.ModuleList(build(WIDTH, config.head_dim, config.expand_v, num_v_heads=4) for _ in range(2))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """None but those of the layers."""

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden)[0]
        return hidden


def test_a_configuration_gets_both_fields(installed: None) -> None:
    model = Model(Config()).eval()
    data = {"hidden": torch.randn(3, 13, WIDTH)}
    compress(model, CompreSSMConfig(target_state_size=5, refit_steps=0), [data])
    assert (model.config.head_dim, model.config.expand_v) == (5, 2.4)
    again = Model(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**data), model(**data))


def test_a_part_that_is_loaded_by_shapes_gets_both_fields_too(installed: None) -> None:
    saved = Model(Config(head_dim=5, expand_v=2.4))
    whole = nn.ModuleDict({"backbone": Model(Config())})
    shapes = {
        f"backbone.layers.{index}": {name: tuple(value.shape) for name, value in layer.named_parameters()}
        for index, layer in enumerate(saved.layers)
    }
    assert reshape_layers(whole, shapes, lambda *_: None)
    backbone: Any = whole["backbone"]
    assert (backbone.config.head_dim, backbone.config.expand_v) == (5, 2.4)
    Model(backbone.config).load_state_dict(backbone.state_dict())


class HeldStates(Cache):
    """What `fla.models.utils.FLACache` holds of a layer."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__(layers=[])
        states = [{"recurrent_state": torch.zeros(shape), "conv_state": None} for shape in shapes]
        self.layers = [SimpleNamespace(state=state) for state in states]


@pytest.mark.parametrize("name", ["gated deltanet of fla", "deltanet of fla", "kda of fla", "gla of fla"])
def test_a_cache_of_the_old_size_is_refused(name: str, installed: None) -> None:
    model = ready.built(ready.READY[name])
    layer: Any = model.layers[0]
    layer.layer_idx = 0
    compress(model, CompreSSMConfig(target_state_size=4, refit_steps=0), [ready.batch(model)])
    heads, values = layer.value_dim // layer.head_v_dim, layer.head_v_dim
    stale, fresh = (
        HeldStates((3, heads, size, values) if name == "deltanet of fla" else (3, heads, values, size))
        for size in (6, 4)
    )
    x = torch.randn(3, 1, WIDTH)
    with pytest.raises(ValueError, match=r"\b6\b.*\b4\b"):
        layer(x, past_key_values=stale)
    layer(x, past_key_values=fresh)
    layer(x, past_key_values=HeldStates())
