"""The projection of B and C in Mamba-2; what it shares with Mamba is in test_compressm_mamba.py."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv1d, pad, silu, softplus
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from hf_compressm.scans import disable_fast_selective_scan, enable_fast_selective_scan
from tests.caches import as_cache, cache_of
from tests.models.cases import perturbed, tokens
from tests.models.cases_mamba import MAMBA2, left_padded


TOLERANCE = 1e-5  # float32: a recurrence step by step against the scan in chunks
PROJECTED = {"state_size": 3, "conv_state_size": 5, "per_layer_config": None}

layouts = pytest.mark.parametrize(
    "layout",
    [{}, {"n_groups": 1}, {"n_groups": 4, "use_conv_bias": False}, {"state_size": 1}, {"state_size": 5}],
    ids=str,
)


def recurrence(mixer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The mixer's definition, one time step after the other."""
    G, M, H, P = mixer.n_groups, mixer.conv_state_size, mixer.num_heads, mixer.head_dim
    gate, x_B_C, dt = mixer.in_proj(hidden_states).split([H * P, H * P + 2 * G * M, H], dim=-1)
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    x_B_C = silu(conv1d(pad(x_B_C.mT, (weight.shape[-1] - 1, 0)), weight, bias, groups=weight.shape[0])).mT
    x, B, C = x_B_C.split([H * P, G * M, G * M], dim=-1)
    dt, A = softplus(dt + mixer.dt_bias), -mixer.A_log.exp()
    state = hidden_states.new_zeros(len(x), H, P, mixer.B_proj.shape[1])
    outputs = []
    for t in range(x.shape[1]):
        x_t = x[:, t].view(-1, H, P)
        B_t, C_t = (
            (weight @ signal[:, t].view(-1, G, M, 1))[..., 0].repeat_interleave(H // G, dim=1)
            for weight, signal in ((mixer.B_proj, B), (mixer.C_proj, C))
        )
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + dt[:, t, :, None, None] * x_t[..., None] * B_t[:, :, None]
        outputs.append((state @ C_t[..., None])[..., 0] + mixer.D[:, None] * x_t)
    return mixer.out_proj(mixer.norm(torch.stack(outputs, dim=1).flatten(2), gate))


@layouts
def test_the_projected_mixer_is_its_recurrence(layout):
    mixer = MAMBA2.causal_model(**{**PROJECTED, **layout}).backbone.layers[0].mixer
    hidden_states = torch.randn(2, 11, 8)
    assert_close(mixer(hidden_states), recurrence(mixer, hidden_states), rtol=TOLERANCE, atol=TOLERANCE)
    assert_close(mixer.train()(hidden_states), recurrence(mixer, hidden_states), rtol=TOLERANCE, atol=TOLERANCE)


@layouts
@pytest.mark.parametrize("cuts", [(4, 5, 6, 7, 8), (1, 4), (3, 4, 7), (6,)], ids=str)
def test_continuing_from_a_cache_equals_the_whole_sequence(layout, cuts):
    """By one token or several; what is cached is as small as the projected state."""
    model, x = MAMBA2.causal_model(**{**PROJECTED, **layout}), tokens()
    cache, logits = DynamicCache(config=model.config), []
    for start, end in zip((0, *cuts), (*cuts, 9), strict=True):
        logits.append(model(x[:, start:end], **as_cache(model, cache), use_cache=True).logits)
    assert_close(torch.cat(logits, dim=1), model(x).logits, rtol=TOLERANCE, atol=TOLERANCE)
    assert cache.layers[0].recurrent_states[0].shape == (3, 4, 4, layout.get("state_size", 3))


@pytest.mark.parametrize("index", [0, 1], ids=["projected", "stock"])
def test_the_mixer_takes_its_cache_by_either_name(index):
    model, hidden_states = MAMBA2.causal_model(), torch.randn(2, 9, 8)
    mixer = model.backbone.layers[index].mixer
    expected = mixer(hidden_states)
    for name in ("cache", "cache_params"):
        cache = {name: DynamicCache(config=model.config)}
        parts = [mixer(hidden_states[:, start:end], **cache) for start, end in ((0, 4), (4, 5), (5, 9))]
        assert_close(torch.cat(parts, dim=1), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_cache_that_records_its_past_decodes_alike():
    model, x = MAMBA2.causal_model(**PROJECTED), tokens()
    cache, logits = DynamicCache(config=model.config), []
    for layer in cache.layers:
        layer.activate_past_recording()
    for start, end in ((0, 5), (5, 6), (6, 9)):
        logits.append(model(x[:, start:end], **as_cache(model, cache), use_cache=True).logits)
    assert_close(torch.cat(logits, dim=1), model(x).logits, rtol=TOLERANCE, atol=TOLERANCE)
    assert cache.layers[0].conv_states[0].shape[-1] == 9


def test_left_padding_in_a_continuation_leaves_no_trace():
    model, rows, lengths = MAMBA2.causal_model(**PROJECTED), tokens(2, 7), [7, 4]
    padded, mask = left_padded(rows, lengths)
    outputs = model(padded[:, :5], attention_mask=mask[:, :5], use_cache=True)
    cache = cache_of(outputs)
    logits = [outputs.logits]
    logits.append(model(padded[:, 5:], attention_mask=mask, **as_cache(model, cache), use_cache=True).logits)
    for row, length, found in zip(rows, lengths, torch.cat(logits, dim=1), strict=True):
        assert_close(found[7 - length :], model(row[None, :length]).logits[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_gradients_reach_the_projections_and_are_those_of_the_recurrence():
    model = MAMBA2.causal_model(**PROJECTED)
    mixer = model.backbone.layers[0].mixer.double()
    hidden_states = torch.randn(2, 6, 8, dtype=torch.float64)
    weight = torch.randn(2, 6, 8, dtype=torch.float64)
    names = [name for name, _ in mixer.named_parameters()]
    gradients = [
        torch.autograd.grad((run(hidden_states) * weight).sum(), list(mixer.parameters()))
        for run in (mixer, lambda x: recurrence(mixer, x))
    ]
    assert {"B_proj", "C_proj"} < set(names)
    for name, found, expected in zip(names, *gradients, strict=True):
        assert expected.abs().max() > 0, name
        assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)  # the chunked scan computes in float32


def test_a_fresh_projection_passes_on_the_first_channels():
    model = MAMBA2.causal_class(MAMBA2.config(**PROJECTED))
    for layer in model.backbone.layers:
        for weight in (layer.mixer.B_proj, layer.mixer.C_proj):
            assert_close(weight.detach(), torch.eye(3, 5).expand(2, 3, 5), rtol=0, atol=0)
    square, x = MAMBA2.causal_class(MAMBA2.config(conv_state_size=6)).eval(), tokens()
    stock = MAMBA2.stock()
    missing = square.load_state_dict(stock.state_dict(), strict=False).missing_keys
    assert {name.rpartition(".")[2] for name in missing} == {"B_proj", "C_proj"}
    assert_close(square(x).logits, stock(x).logits, rtol=TOLERANCE, atol=TOLERANCE)
    alone = type(square.backbone.layers[0].mixer)(square.config, layer_idx=0)
    assert_close(alone.B_proj.detach(), torch.eye(6).expand(2, 6, 6), rtol=0, atol=0)


def test_projections_missing_from_a_checkpoint_are_initialised():
    model = MAMBA2.causal_model(**PROJECTED)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("B_proj")}
    loaded = MAMBA2.causal_class.from_pretrained(None, config=model.config, state_dict=kept)
    assert_close(loaded.backbone.layers[1].mixer.B_proj.detach(), torch.eye(3, 5).expand(2, 3, 5), rtol=0, atol=0)
    assert_close({name: loaded.state_dict()[name] for name in kept}, kept, rtol=0, atol=0)


def test_without_a_projection_the_stock_mixer_runs(monkeypatch):
    model, x = MAMBA2.causal_model(), tokens()
    stock, calls = Mamba2Mixer.forward, []
    monkeypatch.setattr(
        Mamba2Mixer, "forward", lambda self, *a, **k: (calls.append(self.layer_idx), stock(self, *a, **k))[1]
    )
    model(x)
    assert calls == [1, 2]
    assert "B_proj" not in dict(model.backbone.layers[1].mixer.named_parameters())


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("mamba2_chunk_scan", 4),
        ("causal_conv1d_fn", 4),
        ("mamba2_selective_state_update", 1),
        ("causal_conv1d_update", 1),
    ],
)
def test_functions_are_called_where_they_are_patched(monkeypatch, name, length):
    model, x = MAMBA2.causal_model(**PROJECTED), tokens()
    cache = cache_of(model(x, use_cache=True))
    stock, calls = getattr(modeling_mamba2, name), []
    monkeypatch.setattr(modeling_mamba2, name, lambda *a, **k: (calls.append(name), stock(*a, **k))[1])
    model(x[:, :length], **as_cache(model, cache), use_cache=True)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"conv_state_size": 7}, None),
        ({"conv_state_size": 7}, {"1": {"state_size": 2}}),
        ({"conv_state_size": 7}, {"1": {"conv_state_size": None}, "2": {"conv_state_size": 9}}),
        ({}, {"0": {"conv_state_size": 6}, "1": {"conv_state_size": None}}),
        ({}, {str(index): {"state_size": 2 + index, "conv_state_size": 8} for index in range(3)}),
    ],
    ids=str,
)
def test_conv_sizes_set_globally_or_per_layer_survive_saving(fields, sizes, tmp_path):
    config = MAMBA2.config(per_layer_config=sizes, **fields)
    expected = [(layer.state_size, layer.conv_state_size) for layer in config.per_layer_config]
    for index, found in enumerate(expected):
        own = (sizes or {}).get(str(index), {})
        assert found == (own.get("state_size", 6), own.get("conv_state_size", fields.get("conv_state_size")))
    model, x = perturbed(MAMBA2.causal_class(config)).eval(), tokens()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert [(layer.state_size, layer.conv_state_size) for layer in config.per_layer_config] == expected
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [layer.mixer.B_proj is None for layer in loaded.backbone.layers] == [size is None for _, size in expected]
    assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "sizes", "layer"),
    [({"conv_state_size": 5}, None, 0), ({}, {"1": {"conv_state_size": 5}}, 1)],
)
def test_fewer_channels_than_states_are_refused(fields, sizes, layer):
    message = (
        f"`conv_state_size` is 5 in layer {layer}, below its `state_size` of 6.*at most 5, or `conv_state_size=None`"
    )
    with pytest.raises(ValueError, match=message):
        MAMBA2.config(per_layer_config=sizes, **fields)
    config = MAMBA2.config(conv_state_size=6)
    config.conv_state_size = 5
    with pytest.raises(ValueError, match="`conv_state_size` is 5 in layer 0"):
        MAMBA2.model_class(config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo looks at .grad of everything it meets
def test_a_projected_model_compiles_as_one_graph():
    model, x = MAMBA2.causal_model(**PROJECTED), tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x).logits, model(x).logits, rtol=TOLERANCE, atol=TOLERANCE)


def test_autocast_trains_a_projected_model_as_it_does_the_stock_one():
    model, x = MAMBA2.causal_model(**PROJECTED).train(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, labels=x).loss
    loss.backward()
    assert_close(loss, model(x, labels=x).loss, rtol=0.05, atol=0)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_printed_model_shows_its_sizes():
    assert "state_size=3, conv_state_size=5" in str(MAMBA2.causal_model())


@pytest.mark.parametrize("projected", [False, True])
def test_packed_texts_stay_apart_with_the_fast_scan(projected):
    texts = (4, 1, 7)
    model = MAMBA2.causal_model(**(PROJECTED if projected else {})).backbone
    row = tokens(1, sum(texts))
    seq_idx = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(texts))[None]
    enable_fast_selective_scan()
    try:
        parts = [model(text, use_cache=False).last_hidden_state for text in row.split(texts, dim=1)]
        actual = model(row, seq_idx=seq_idx, use_cache=False).last_hidden_state
        together = model(row, use_cache=False).last_hidden_state
    finally:
        disable_fast_selective_scan()
    expected = torch.cat(parts, dim=1)
    assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert (together - expected).abs().max() > 100 * TOLERANCE
