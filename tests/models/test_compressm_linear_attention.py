"""The layers of linear attention; what a cut does with them is in `tests/compression/test_own_linear_attention.py`."""

import importlib
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, silu, softplus
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from hf_compressm.models import modeling_compressm_linear_attention as own_models
from hf_compressm.models import own_class
from tests.caches import as_cache
from tests.family_table import (
    BAILING_HYBRID,
    KIMI_LINEAR,
    MINIMAX,
    OLMO_HYBRID,
    QWEN3_5,
    QWEN3_NEXT,
    Family,
    family_id,
    perturbed,
    present,
)
from tests.models.cases_mamba import left_padded


TOLERANCE = 1e-4  # float32: a recurrence step by step against the chunks of transformers
STATES, CHANNELS = 3, 8
DELTA_NETS = (QWEN3_NEXT, QWEN3_5, OLMO_HYBRID)
KIMI = present(KIMI_LINEAR, BAILING_HYBRID)
kinds = pytest.mark.parametrize("family", [*DELTA_NETS, *KIMI, MINIMAX], ids=family_id)


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(2, 13, (batch, length), generator=torch.Generator().manual_seed(3))


def projected(family: Family) -> Any:
    """A language model whose first layer projects, and whose last is the stock one."""
    stock = family.config(state_size=CHANNELS)
    own = own_class(family.model_class).config_class
    sizes = {"linear_key_head_dim": STATES}
    if family in DELTA_NETS:
        sizes["conv_key_head_dim"] = CHANNELS
    fields = {key: value for key, value in stock.to_dict().items() if key != "model_type"}
    torch.manual_seed(0)
    model = own_class(family.model_class)(own(**fields, per_layer_config={"0": sizes}))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = perturbed(model).eval()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model


def mixer_of(model: nn.Module) -> Any:
    block = model.model.layers[0]
    return block.linear_attn if hasattr(block, "linear_attn") else block.self_attn


def unit(vectors: Tensor) -> Tensor:
    return vectors / (vectors.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def inputs_of(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The input of the convolution, beta and g, spelled out."""
    if hasattr(mixer, "in_proj_qkvz"):
        rows = 2 * CHANNELS + 2 * mixer.value_dim // mixer.num_k_heads
        q, k, v, _ = (
            mixer.in_proj_qkvz(x)
            .unflatten(-1, (2, rows))
            .split([CHANNELS, CHANNELS, mixer.value_dim // 2, mixer.value_dim // 2], dim=-1)
        )
        b, a = mixer.in_proj_ba(x).unflatten(-1, (2, -1)).chunk(2, dim=-1)
        mixed, b, a = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1), b.flatten(2), a.flatten(2)
    elif hasattr(mixer, "in_proj_qkv"):
        mixed, b, a = mixer.in_proj_qkv(x), mixer.in_proj_b(x), mixer.in_proj_a(x)
    else:
        mixed = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1)
        b = mixer.b_proj(x)
        if hasattr(mixer, "forget_gate"):
            return mixed, b.sigmoid(), mixer.forget_gate(x)
        a = mixer.a_proj(x)
    g = -mixer.A_log.exp() * softplus(a + mixer.dt_bias)
    return mixed, b.sigmoid() * (2 if getattr(mixer, "allow_neg_eigval", False) else 1), g[..., None]


def delta_rule(mixer: Any, x: Tensor) -> Tensor:
    """What the value heads read, one time step after the other."""
    mixed, beta, g = inputs_of(mixer, x)
    weight, U = mixer.conv1d.weight, mixer.state_proj
    mixed = silu(conv1d(pad(mixed.mT, (weight.shape[-1] - 1, 0)), weight, groups=weight.shape[0])).mT
    q, k, v = mixed.tensor_split([len(U) * CHANNELS, 2 * len(U) * CHANNELS], dim=-1)
    v = v.unflatten(-1, (beta.shape[-1], -1))
    state, reads = x.new_zeros(len(x), v.shape[2], STATES, v.shape[3]), []
    for t in range(x.shape[1]):
        q_t, k_t = (
            torch.stack([unit(part) @ U[head].T for head, part in enumerate(signal[:, t].split(CHANNELS, dim=-1))], 1)
            .repeat_interleave(v.shape[2] // len(U), dim=1)
            .unsqueeze(-1)
            for signal in (q, k)
        )
        state = state * g[:, t, ..., None].exp()
        error = v[:, t] - (state * k_t).sum(2)
        state = state + beta[:, t, :, None, None] * k_t * error[:, :, None]
        reads.append((state * q_t).sum(2) / CHANNELS**0.5)
    return torch.stack(reads, dim=1)


def lightning(mixer: Any, x: Tensor) -> Tensor:
    """The layer's output, one time step after the other."""
    qkv = silu(mixer.qkv_proj(x)).unflatten(-1, (2, 3, CHANNELS))
    decay = torch.exp(-mixer.slope_rate)
    state, reads = x.new_zeros(len(x), 2, STATES, CHANNELS), []
    for t in range(x.shape[1]):
        q, k, v = qkv[:, t].unbind(2)
        k_t, q_t = ((weight @ signal[..., None]) for weight, signal in ((mixer.B_proj, k), (mixer.C_proj, q)))
        state = decay * state + k_t * v[:, :, None]
        reads.append((state * q_t).sum(2))
    read = mixer.norm(torch.stack(reads, dim=1).flatten(2))
    return mixer.out_proj(mixer.output_gate(x).sigmoid() * read)


@pytest.mark.parametrize("family", [*DELTA_NETS, *KIMI], ids=family_id)
def test_a_projected_delta_net_is_its_recurrence(family: Family) -> None:
    mixer = mixer_of(projected(family))
    x = torch.randn(2, 70, 16)  # two chunks
    expected = mixer.outputs(delta_rule(mixer, x), mixer.inputs(x)[1])
    assert_close(mixer(x), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_projected_lightning_attention_is_its_recurrence() -> None:
    mixer = mixer_of(projected(MINIMAX))
    x = torch.randn(2, 19, 16)  # three blocks
    assert_close(mixer(x)[0], lightning(mixer, x), rtol=TOLERANCE, atol=TOLERANCE)


@kinds
@pytest.mark.parametrize("cuts", [(4, 5, 6, 7, 8), (3, 4, 7)], ids=str)
def test_continuing_from_a_cache_equals_the_whole_sequence(family: Family, cuts: tuple[int, ...]) -> None:
    """By one token or several; what is cached is as small as the projected state."""
    if family is MINIMAX and cuts == (3, 4, 7):
        pytest.skip("for the same reason, its full attention has the wrong mask for several tokens")
    model, x, logits = projected(family), tokens(), []
    cache = MiniMaxCache() if family is MINIMAX else DynamicCache(config=model.config)
    with torch.no_grad():
        for start, end in zip((0, *cuts), (*cuts, 9), strict=True):
            places = torch.arange(start, end)[None]  # a MiniMax whose first layer is linear counts wrong
            step = model(x[:, start:end], position_ids=places, **as_cache(model, cache), use_cache=True)
            logits.append(step.logits)
        assert_close(torch.cat(logits, dim=1), model(x).logits, rtol=TOLERANCE, atol=TOLERANCE)
    state = cache.linear_cache[0] if family is MINIMAX else cache.layers[0].recurrent_states[0]
    assert state.shape[2] == STATES


@kinds
def test_left_padding_leaves_no_trace(family: Family) -> None:
    model, rows, lengths = projected(family), tokens(2, 7), [7, 4]
    padded, mask = left_padded(rows, lengths)
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits
        for row, length, logits in zip(rows, lengths, found, strict=True):
            alone = model(row[None, :length]).logits[0]
            assert_close(logits[7 - length :], alone, rtol=TOLERANCE, atol=TOLERANCE)


@kinds
def test_gradients_reach_all_that_a_cut_leaves(family: Family) -> None:
    model, x = projected(family).train(), tokens()
    model(x, labels=x).loss.backward()
    for name, parameter in mixer_of(model).named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@kinds
def test_a_fresh_projection_passes_on_the_first_channels(family: Family) -> None:
    config = projected(family).config
    for model in (
        own_class(family.model_class)(config),
        own_class(family.model_class).from_pretrained(None, config=config, state_dict={}),
    ):
        mixer = mixer_of(model)
        for name in mixer.projections:
            expected = torch.eye(STATES, CHANNELS).expand(2, -1, -1)
            assert_close(getattr(mixer, name).detach(), expected, rtol=0, atol=0)


@kinds
def test_the_recurrence_is_looked_up_where_it_is_patched(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    if family is MINIMAX:
        place, name = importlib.import_module("transformers.models.mamba2.modeling_mamba2"), "mamba2_chunk_scan"
    else:
        place = importlib.import_module(f"transformers.models.{family.family}.modeling_{family.family}")
        name = mixer_of(projected(family)).rules[0]
    stock, calls = getattr(place, name), []
    monkeypatch.setattr(place, name, lambda *a, **k: (calls.append(name), stock(*a, **k))[1])
    with torch.no_grad():
        projected(family)(tokens())
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        (
            QWEN3_5,
            {"linear_key_head_dim": 9, "conv_key_head_dim": 8},
            "`conv_key_head_dim` is 8 in layer 0.*at most 8",
        ),
        (QWEN3_5, {"linear_key_head_dim": 0}, "`linear_key_head_dim` is 0 in layer 0"),
        (QWEN3_5, {"num_attention_heads": 4}, r"sets \['num_attention_heads'\]"),
        (KIMI_LINEAR, {"linear_key_head_dim": 9}, "`linear_head_dim` is 8 in layer 0"),
        (MINIMAX, {"linear_key_head_dim": 9}, "`head_dim` is 8 in layer 0"),
    ],
    ids=family_id,
)
def test_sizes_out_of_range_are_refused(family: Family, sizes: dict[str, int], message: str) -> None:
    fields = {key: value for key, value in family.config(state_size=CHANNELS).to_dict().items() if key != "model_type"}
    with pytest.raises(ValueError, match=message):
        own_class(family.model_class).config_class(**fields, per_layer_config={"0": sizes})


def test_classes_are_made_once_under_their_names() -> None:
    for kind in filter(lambda each: each.is_known, own_models.MODEL_KINDS):
        for name in kind.names:
            own = getattr(own_models, f"CompreSSM{name}")
            assert own is own_class(getattr(kind.modeling, name))
            assert pickle.loads(pickle.dumps(own)) is own
    with pytest.raises(AttributeError, match="has no attribute 'CompreSSMNothing'"):
        own_models.CompreSSMNothing  # noqa: B018 - the attribute is looked up


def test_the_printed_model_shows_its_sizes() -> None:
    assert "states=3" in str(projected(QWEN3_5))
