"""The delta rule in chunks against the recurrence as it is written: outputs, last state and every gradient."""

import math

import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

import hf_compressm.scans.delta_chunks as delta_chunks
from hf_compressm.scans import delta_scan, delta_scan_reference, delta_states
from hf_compressm.scans.kernels import torch_path


ROUND_OFF = 1e-10  # float64, a few hundred steps: products in another order, nothing else
SINGLE_ROUND_OFF = 2e-5  # float32, relative to the largest entry
HALF_ROUND_OFF = 2e-2  # the output's own rounding in bfloat16 (8 bits)

CASES = {
    # name: (batch, length, key heads, heads, dk, dv)
    "length 1": (2, 1, 2, 2, 4, 3),
    "length 2": (2, 2, 2, 2, 4, 3),
    "below a chunk": (2, 31, 2, 2, 4, 3),
    "one chunk": (2, 32, 2, 2, 4, 3),
    "above a chunk": (2, 33, 2, 2, 4, 3),
    "length 63": (2, 63, 2, 2, 4, 3),
    "length 65": (1, 65, 2, 2, 3, 5),
    "shared keys": (3, 130, 2, 6, 5, 7),
    "one key head": (2, 70, 1, 3, 4, 4),
    "dk 1": (2, 40, 2, 2, 1, 4),
    "dv 1": (2, 40, 2, 2, 4, 1),
}


def make(batch, length, key_heads, heads, dk, dv, decay="head", strength=1.0, dtype=torch.float64):
    """Random arguments by name; decay per head, per channel or none. The last step of a head forgets all."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    g = -strength * normal(batch, length, heads, *((dk,) if decay == "channel" else ())).abs()
    g[:, length // 2, 0] = -1e4
    tensors = {
        "query": normal(batch, length, key_heads, dk),
        "key": normal(batch, length, key_heads, dk),
        "value": normal(batch, length, heads, dv),
        "g": g,
        "beta": normal(batch, length, heads).sigmoid(),
        "initial_state": normal(batch, heads, dk, dv),
    }
    if decay == "none":
        del tensors["g"]
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def outputs_and_gradients(scan, arguments, **options):
    """Out, last state, and the gradients of a loss that weights every output differently."""
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True, **options}
    out, last = scan(**arguments, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * weights).sum() + (last * (last.detach() + 1)).sum()
    gradients = torch.autograd.grad(loss, list(arguments.values()))
    return {"out": out, "last": last, **dict(zip(arguments, gradients, strict=True))}


def assert_all_close(actual, expected, tolerance=ROUND_OFF):
    for name, right in expected.items():
        left, scale = actual[name], max(1.0, right.abs().max().item())
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        assert (left - right).abs().max().item() <= tolerance * scale, name  # fails for NaN


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Memory that is not written shows as NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, poisoned)


@pytest.mark.parametrize("decay", ["head", "channel", "none"])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, decay, poisoned_empty):
    arguments = make(*CASES[case], decay)
    actual = outputs_and_gradients(delta_scan, arguments)
    assert_all_close(actual, outputs_and_gradients(delta_scan_reference, arguments))


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("block_entries", [1, 2000])
def test_blocks_do_not_matter(block_entries, decay, monkeypatch, poisoned_empty):
    arguments = make(3, 40, 2, 4, 3, 5, decay)
    expected = outputs_and_gradients(delta_scan, arguments)
    monkeypatch.setattr(delta_chunks, "BLOCK_ENTRIES", block_entries)
    assert_all_close(outputs_and_gradients(delta_scan, arguments), expected)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("chunk_size", [1, 2, 8, 64, 1024])
def test_chunk_size_does_not_matter(chunk_size, decay):
    arguments = make(2, 40, 2, 4, 3, 5, decay)
    actual = outputs_and_gradients(delta_scan, arguments, chunk_size=chunk_size)
    assert_all_close(actual, outputs_and_gradients(delta_scan_reference, arguments))


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("strength", [0.0, 1e-3, 20.0, 1e3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, ROUND_OFF), (torch.float32, SINGLE_ROUND_OFF)])
def test_any_strength_of_decay(dtype, tolerance, strength, decay):
    arguments = make(2, 70, 2, 2, 8, 5, decay, strength, dtype)
    doubles = {name: tensor.detach().double().requires_grad_() for name, tensor in arguments.items()}
    expected = outputs_and_gradients(delta_scan_reference, doubles)
    actual = outputs_and_gradients(delta_scan, arguments)
    assert_all_close({name: tensor.double() for name, tensor in actual.items()}, expected, tolerance)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("normalises", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_scale_and_norm(scale, normalises, decay):
    arguments = make(2, 20, 2, 2, 4, 3, decay)
    arguments["key"] = (arguments["key"].detach() / 4).requires_grad_()  # long keys would make the states grow
    options = {"use_qk_l2norm_in_kernel": normalises, "scale": scale}
    actual = outputs_and_gradients(delta_scan, arguments, **options)
    assert_all_close(actual, outputs_and_gradients(delta_scan_reference, arguments, **options))


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_equals_transformers(decay):
    stock = torch_path(torch_chunk_gated_delta_rule if decay == "head" else chunk_kimi_delta_attention)
    arguments = make(2, 130, 4, 4, 8, 6, decay, 0.3, torch.float32)
    # A step of -1e4 costs the stock code digits of all later steps of its chunk.
    arguments["g"] = arguments["g"].detach().clamp(min=-5).requires_grad_()
    expected = outputs_and_gradients(stock, arguments)
    assert_all_close(outputs_and_gradients(delta_scan, arguments), expected, SINGLE_ROUND_OFF)
    assert_all_close(outputs_and_gradients(delta_scan_reference, arguments), expected, SINGLE_ROUND_OFF)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_half_precision_in_and_out(decay):
    arguments = make(2, 65, 2, 4, 8, 6, decay, 0.3, torch.bfloat16)
    singles = {name: tensor.detach().float().requires_grad_() for name, tensor in arguments.items()}
    expected = outputs_and_gradients(delta_scan_reference, singles)
    actual = outputs_and_gradients(delta_scan, arguments)
    assert actual["out"].dtype == actual["query"].dtype == torch.bfloat16
    assert actual["last"].dtype == torch.float32
    assert_all_close({name: tensor.float() for name, tensor in actual.items()}, expected, HALF_ROUND_OFF)


def test_defaults():
    arguments = make(2, 20, 2, 2, 4, 3, "none")
    q, k, v = (arguments[name].detach() for name in ("query", "key", "value"))
    k = k / k.norm(dim=-1, keepdim=True)
    out, last = delta_scan(q, k, v)
    assert last is None
    ones = torch.ones(2, 20, 2, dtype=torch.float64)
    expected, _ = delta_scan_reference(q, k, v, 0 * ones, ones, torch.zeros(2, 2, 4, 3, dtype=torch.float64))
    assert (out - expected).abs().max() <= ROUND_OFF


@pytest.mark.parametrize("decay", ["head", "channel", "none"])
def test_packed_texts_equal_texts_alone(decay):
    texts = (9, 1, 2, 38)
    arguments = make(1, sum(texts), 2, 4, 3, 5, decay)
    del arguments["initial_state"]
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 0, 1]), torch.tensor(texts))[None]
    parts = [
        delta_scan(**dict(zip(arguments, tensors, strict=True)), output_final_state=True)
        for tensors in zip(*(tensor.split(texts, dim=1) for tensor in arguments.values()), strict=True)
    ]
    for scan in (delta_scan, delta_scan_reference):
        out, last = scan(**arguments, seq_idx=seq_idx, output_final_state=True)
        assert (out - torch.cat([part[0] for part in parts], dim=1)).abs().max() <= ROUND_OFF
        assert (last - parts[-1][1]).abs().max() <= ROUND_OFF


@pytest.mark.parametrize("decay", ["head", "channel", "none"])
@pytest.mark.parametrize("every", [1, 3, 9, 50])
def test_states(every, decay):
    arguments = {name: tensor.detach() for name, tensor in make(2, 37, 2, 4, 3, 5, decay).items()}
    query = arguments.pop("query")
    options = {"use_qk_l2norm_in_kernel": True}
    chunks = [chunk.clone() for chunk in delta_states(**arguments, every=every, **options)]
    states = torch.cat(chunks) if chunks else query.new_zeros(0)
    assert len(states) == 37 // every
    assert all(len(chunk) > 0 for chunk in chunks)
    for index in {0, len(states) // 2, len(states) - 1} if chunks else ():
        steps = (index + 1) * every
        cut = {name: tensor if name == "initial_state" else tensor[:, :steps] for name, tensor in arguments.items()}
        _, last = delta_scan_reference(query[:, :steps], **cut, output_final_state=True, **options)
        assert (states[index] - last).abs().max() <= ROUND_OFF


def test_states_of_packed_texts():
    arguments = {name: tensor.detach() for name, tensor in make(1, 20, 1, 2, 3, 4).items() if name != "query"}
    seq_idx = (torch.arange(20) >= 13)[None].long()
    states = torch.cat([chunk.clone() for chunk in delta_states(**arguments, seq_idx=seq_idx)])
    del arguments["initial_state"]
    alone = torch.cat([chunk.clone() for chunk in delta_states(**{k: t[:, 13:] for k, t in arguments.items()})])
    assert (states[13:] - alone).abs().max() <= ROUND_OFF


def test_arguments_are_not_written_to():
    arguments = make(1, 32, 1, 1, 4, 3)
    before = {name: tensor.detach().clone() for name, tensor in arguments.items()}
    outputs_and_gradients(delta_scan, arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in arguments.items())


def test_under_autocast_nothing_is_rounded():
    arguments = make(1, 40, 2, 2, 4, 3, dtype=torch.float32)
    expected = outputs_and_gradients(delta_scan, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = delta_scan(**arguments, use_qk_l2norm_in_kernel=True)
    assert torch.equal(out, expected["out"])


def test_transforms_run_the_reference():
    arguments = make(1, 5, 1, 1, 3, 2)
    names = list(arguments)

    def loss(*tensors):
        return delta_scan(**dict(zip(names, tensors, strict=True)))[0].sum()

    actual = torch.func.grad(loss, argnums=tuple(range(len(names))))(*arguments.values())
    expected = torch.autograd.grad(loss(*arguments.values()), list(arguments.values()))
    for left, right in zip(actual, expected, strict=True):
        assert (left - right).abs().max() <= ROUND_OFF


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(2, 0, 4, 3)}, "value has shape"),
        ({"key": torch.zeros(2, 9, 3, 5)}, "divides the 4 heads"),
        ({"query": torch.zeros(2, 9, 2, 4)}, "query has shape"),
        ({"g": torch.zeros(2, 9, 4, 3)}, "g has shape"),
        ({"beta": torch.zeros(2, 9, 2)}, "beta has shape"),
        ({"beta": torch.zeros(2, 9, 4, dtype=torch.long)}, "expected a real floating point dtype"),
        ({"initial_state": torch.zeros(2, 4, 3, 5)}, "initial_state has shape"),
        ({"seq_idx": torch.zeros(2, 9)}, "expected integers"),
        ({"chunk_size": 24}, "power of two"),
    ],
)
def test_refusals_name_the_value(change, message):
    arguments = {
        "query": torch.zeros(2, 9, 2, 5),
        "key": torch.zeros(2, 9, 2, 5),
        "value": torch.zeros(2, 9, 4, 3),
        **change,
    }
    for scan in (delta_scan, delta_scan_reference):
        with pytest.raises(ValueError, match=message):
            scan(**arguments)


def test_states_refuse_no_steps():
    with pytest.raises(ValueError, match="every is 0"):
        next(delta_states(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3), every=0))


def test_nothing_is_left_of_a_forgotten_state():
    arguments = {name: tensor.detach() for name, tensor in make(1, 12, 1, 1, 3, 2).items()}
    arguments["g"][:, 5] = -math.inf
    out, _ = delta_scan(**arguments)
    changed = dict(arguments, initial_state=100 * arguments["initial_state"])
    assert (delta_scan(**changed)[0] - out)[:, 5:].abs().max() <= ROUND_OFF
    assert (delta_scan(**changed)[0] - out)[:, :5].abs().max() > 1
