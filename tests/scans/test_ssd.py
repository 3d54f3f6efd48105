"""The scan of Mamba-2 against the recurrence as it is written: outputs, last state and every gradient."""

import math

import pytest
import torch

import hf_compressm.scans.ssd_chunks as ssd_chunks
from hf_compressm.scans import ssd_scan, ssd_scan_reference, ssd_states


ROUND_OFF = 1e-10  # float64, a few hundred steps: products in another order, nothing else
SINGLE_ROUND_OFF = 1e-5  # float32, relative to the largest entry
HALF_ROUND_OFF = 2e-2  # the output's own rounding in bfloat16 (8 bits)
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
STATES_NAMES = ("x", "dt", "A", "B", "dt_bias", "initial_states")

CASES = {
    # name: (batch, length, heads, head_dim, groups, N)
    "length 1": (2, 1, 2, 3, 1, 5),
    "length 2": (2, 2, 2, 3, 1, 5),
    "below a chunk": (2, 31, 2, 3, 1, 5),
    "one chunk": (2, 32, 2, 3, 1, 5),
    "above a chunk": (2, 33, 2, 3, 1, 5),
    "longer chunks": (1, 133, 2, 3, 1, 65),
    "odd": (3, 133, 6, 5, 3, 7),
    "batch 1": (1, 70, 4, 2, 2, 3),
    "N 1": (2, 70, 4, 3, 2, 1),
    "a group per head": (2, 20, 3, 4, 3, 4),
    "one head": (2, 20, 1, 4, 1, 4),
    "head_dim 1": (2, 20, 4, 1, 2, 4),
}


def make(batch, length, heads, head_dim, groups, N, dtype=torch.float64, requires_grad=True):
    """Random arguments by name; the first head does not decay, the last forgets its state at once."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    A = -2 * torch.rand(heads, dtype=dtype, generator=generator)
    A[-1] = -1e4
    A[0] = 0.0
    tensors = {
        "x": normal(batch, length, heads, head_dim),
        "dt": normal(batch, length, heads) - 1,
        "A": A,
        "B": normal(batch, length, groups, N),
        "C": normal(batch, length, groups, N),
        "D": normal(heads),
        "z": normal(batch, length, heads, head_dim),
        "dt_bias": normal(heads),
        "initial_states": normal(batch, heads, head_dim, N),
    }
    return {name: tensor.requires_grad_(requires_grad) for name, tensor in tensors.items()}


def outputs_and_gradients(scan, arguments, **options):
    """Out, last state, and the gradients of a loss that weights every output differently."""
    options = {"dt_softplus": True, "return_final_states": True, **options}
    out, last = scan(**arguments, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * weights).sum() + (last * (last.detach() + 1)).sum()
    gradients = torch.autograd.grad(loss, list(arguments.values()))
    return {"out": out, "last": last, **dict(zip(arguments, gradients, strict=True))}


def packed(arguments, texts):
    """An index that changes from text to text, the same pattern shifted by one step in every further row."""
    batch, length = arguments["x"].shape[:2]
    row = torch.repeat_interleave(torch.arange(len(texts)) % 2, torch.tensor(texts))  # 0 1 0: an index may come back
    assert len(row) == length
    return torch.stack([torch.roll(row, shift) for shift in range(batch)])


def assert_all_close(actual, expected, tolerance=ROUND_OFF):
    for name, right in expected.items():
        left, scale = actual[name], max(1.0, right.abs().max().item())
        assert left.shape == right.shape, name
        assert (left - right).abs().max().item() <= tolerance * scale, name


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Memory that is not written shows as NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, poisoned)


@pytest.mark.parametrize("block_entries", [1, 1 << 18])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, block_entries, poisoned_empty, monkeypatch):
    monkeypatch.setattr(ssd_chunks, "BLOCK_ENTRIES", block_entries)
    arguments = make(*CASES[case])
    actual = outputs_and_gradients(ssd_scan, arguments)
    assert_all_close(actual, outputs_and_gradients(ssd_scan_reference, arguments))


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 32, 1000])
def test_chunk_size_does_not_matter(chunk_size):
    arguments = make(2, 40, 4, 3, 2, 5)
    actual = outputs_and_gradients(ssd_scan, arguments, chunk_size=chunk_size)
    assert_all_close(actual, outputs_and_gradients(ssd_scan_reference, arguments))


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 1000])
@pytest.mark.parametrize("texts", [(70,), (1, 69), (69, 1), (32, 32, 6), (5, 1, 1, 40, 23)])
def test_packed_texts_equal_the_reference(texts, chunk_size, poisoned_empty):
    arguments = make(3, 70, 4, 3, 2, 5)
    options = {"seq_idx": packed(arguments, texts), "chunk_size": chunk_size}
    actual = outputs_and_gradients(ssd_scan, arguments, **options)
    assert_all_close(actual, outputs_and_gradients(ssd_scan_reference, arguments, **options))


@pytest.mark.parametrize("scan", [ssd_scan, ssd_scan_reference])
def test_packed_texts_run_as_if_apart(scan):
    texts = (5, 1, 40, 24)
    arguments = make(1, 70, 4, 3, 2, 5, requires_grad=False)
    seq_idx = torch.repeat_interleave(torch.tensor([3, 0, 7, 3]), torch.tensor(texts))[None]
    out, last = scan(**arguments, seq_idx=seq_idx, dt_softplus=True, return_final_states=True)
    state, start = arguments.pop("initial_states"), 0  # which belongs to the first text
    for length in texts:
        text = slice(start, start + length)
        parts = {
            name: tensor[:, text] if name in ("x", "dt", "B", "C", "z") else tensor
            for name, tensor in arguments.items()
        }
        alone, last_alone = scan(**parts, initial_states=state, dt_softplus=True, return_final_states=True)
        assert (out[:, text] - alone).abs().max() <= ROUND_OFF * alone.abs().max()
        state, start = None, start + length
    assert (last - last_alone).abs().max() <= ROUND_OFF * last_alone.abs().max()


def test_nothing_of_a_text_reaches_the_next_in_float32():
    arguments = make(2, 40, 4, 3, 2, 5, dtype=torch.float32, requires_grad=False)
    arguments["A"].zero_()  # no decay: a state lives for ever
    arguments["z"] = None
    loud = {**arguments, "x": arguments["x"].clone(), "initial_states": arguments["initial_states"] * 1e6}
    loud["x"][:, :13] *= 1e6
    seq_idx = (torch.arange(40) >= 13).long().expand(2, -1)
    quiet, loud = (ssd_scan(**given, seq_idx=seq_idx, dt_softplus=True) for given in (arguments, loud))
    assert torch.equal(quiet[:, 13:], loud[:, 13:])


def test_arguments_by_position_are_those_of_mamba_ssm():
    arguments = make(2, 40, 4, 3, 2, 5, requires_grad=False)
    x, dt, A, B, C, D, z, dt_bias, initial_states = (arguments[name] for name in NAMES)
    seq_idx = packed(arguments, (15, 25))
    options = {"seq_idx": seq_idx, "dt_softplus": True, "dt_limit": (0.1, 2.0), "return_final_states": True}
    expected = ssd_scan(**arguments, **options)
    for scan in (ssd_scan, ssd_scan_reference):
        in_order = scan(x, dt, A, B, C, 16, D, z, dt_bias, initial_states, seq_idx, None, True, (0.1, 2.0), True)
        for left, right in zip(in_order, expected, strict=True):
            assert (left - right).abs().max() <= ROUND_OFF * right.abs().max()


@pytest.mark.parametrize("missing", ["D", "z", "dt_bias", "initial_states"])
@pytest.mark.parametrize("softplus", [False, True])
def test_optional_arguments(missing, softplus):
    arguments = make(2, 70, 4, 3, 2, 5, requires_grad=False)
    arguments["dt"], arguments["dt_bias"] = arguments["dt"].abs(), arguments["dt_bias"].abs()
    arguments[missing] = None
    out = ssd_scan(**arguments, dt_softplus=softplus)
    expected = ssd_scan_reference(**arguments, dt_softplus=softplus)
    assert (out - expected).abs().max() <= ROUND_OFF * max(1.0, expected.abs().max().item())


def test_feed_through_per_channel():
    arguments = make(2, 20, 4, 3, 2, 5)
    arguments["D"] = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    actual = outputs_and_gradients(ssd_scan, arguments)
    assert_all_close(actual, outputs_and_gradients(ssd_scan_reference, arguments))


def test_step_sizes_are_limited():
    arguments = make(2, 20, 4, 3, 2, 5)
    actual = outputs_and_gradients(ssd_scan, arguments, dt_limit=(0.1, 0.5))
    assert_all_close(actual, outputs_and_gradients(ssd_scan_reference, arguments, dt_limit=(0.1, 0.5)))
    free = ssd_scan(**arguments, dt_softplus=True)
    assert (actual["out"] - free).abs().max() > 1e-3


def test_gradcheck():
    arguments = make(2, 5, 4, 2, 2, 3)
    with torch.no_grad():
        arguments["A"].clamp_(min=-5.0)

    def scan(*tensors):
        named = dict(zip(NAMES, tensors, strict=True))
        return ssd_scan(**named, dt_softplus=True, return_final_states=True, chunk_size=3)

    assert torch.autograd.gradcheck(scan, tuple(arguments[name] for name in NAMES))


def test_two_halves_make_the_whole():
    arguments = make(2, 75, 4, 3, 2, 5, requires_grad=False)
    expected, last = ssd_scan(**arguments, dt_softplus=True, return_final_states=True)
    sequences = ("x", "dt", "B", "C", "z")
    halves, state = [], arguments.pop("initial_states")
    for part in (slice(0, 40), slice(40, 75)):
        cut = {name: tensor[:, part] if name in sequences else tensor for name, tensor in arguments.items()}
        out, state = ssd_scan(**cut, initial_states=state, dt_softplus=True, return_final_states=True)
        halves.append(out)
    assert (torch.cat(halves, dim=1) - expected).abs().max() <= ROUND_OFF * expected.abs().max()
    assert (state - last).abs().max() <= ROUND_OFF * last.abs().max()


@pytest.mark.parametrize("largest", [1.0, 1e4, 1e30])
def test_slow_decay_beside_fast_decay_in_float32(largest):
    exact = make(2, 70, 4, 3, 2, 5, requires_grad=False)
    exact["A"] = -torch.ones(4, dtype=torch.float64)
    exact["dt"] = torch.full_like(exact["dt"], 0.01)
    exact["dt"][:, ::5] = largest  # the sums inside a chunk are large, some of their differences small
    del exact["dt_bias"], exact["D"]
    exact["x"] = exact["x"] / exact["dt"][..., None]
    single = {name: tensor.float() for name, tensor in exact.items()}
    expected = ssd_scan_reference(**{name: tensor.double() for name, tensor in single.items()})
    assert (ssd_scan(**single) - expected).abs().max() <= SINGLE_ROUND_OFF * expected.abs().max()


@pytest.mark.parametrize("fastest", [16.0, 128.0, 1e4])
def test_gradients_in_float32(fastest):
    exact = make(2, 200, 4, 3, 2, 5)
    with torch.no_grad():
        exact["A"].copy_(-torch.linspace(1, fastest, 4))
    single = {name: tensor.detach().float().requires_grad_() for name, tensor in exact.items()}
    expected = outputs_and_gradients(ssd_scan_reference, exact)
    actual = outputs_and_gradients(ssd_scan, single)
    for name, right in expected.items():
        assert (actual[name] - right).abs().max() <= SINGLE_ROUND_OFF * right.abs().max(), name


def test_gradient_of_one_output_alone():
    arguments = make(2, 70, 4, 3, 2, 5)
    inputs = [arguments[name] for name in ("x", "dt", "A", "B", "initial_states")]
    for pick in (0, 1):
        results = [
            scan(**arguments, dt_softplus=True, return_final_states=True)[pick].sum()
            for scan in (ssd_scan, ssd_scan_reference)
        ]
        gradients = [torch.autograd.grad(result, inputs) for result in results]
        for left, right in zip(*gradients, strict=True):
            assert (left - right).abs().max() <= ROUND_OFF * max(1.0, right.abs().max().item())


def test_a_growing_state_is_exact_too():
    arguments = make(2, 70, 4, 3, 2, 5)
    with torch.no_grad():
        arguments["A"].copy_(torch.linspace(-0.1, 0.1, 4))
    actual = outputs_and_gradients(ssd_scan, arguments)
    assert_all_close(actual, outputs_and_gradients(ssd_scan_reference, arguments))


def test_memory_does_not_grow_with_the_chunk():
    arguments = make(1, 256, 4, 8, 1, 16)
    largest = []
    for chunk_size in (None, 64, 128):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            ssd_scan(**arguments, chunk_size=chunk_size)
        largest.append(max(saved))
    assert largest == [256 * 4 * 8] * 3  # as large as the input; no T x T matrix, no state per step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(dtype):
    arguments = make(2, 70, 4, 3, 2, 5, dtype=torch.float32, requires_grad=False)
    kept = ("A", "D", "dt_bias", "initial_states")
    halves = {name: tensor if name in kept else tensor.to(dtype) for name, tensor in arguments.items()}
    exact = ssd_scan_reference(**{name: half.float() for name, half in halves.items()}, dt_softplus=True)
    halves["x"].requires_grad_()
    out, last = ssd_scan(**halves, dt_softplus=True, return_final_states=True)
    assert (out.dtype, last.dtype) == (dtype, torch.float32)
    assert (out.float() - exact).abs().max() <= HALF_ROUND_OFF * exact.abs().max()
    out.sum().backward()
    assert halves["x"].grad.dtype == dtype


def test_autocast_does_not_lower_the_precision():
    arguments = make(2, 70, 4, 3, 2, 5, dtype=torch.float32, requires_grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ssd_scan(**arguments, dt_softplus=True)
    assert torch.equal(out, ssd_scan(**arguments, dt_softplus=True))


def test_non_contiguous_and_no_gradient():
    arguments = make(2, 70, 4, 3, 2, 5, requires_grad=False)
    strided = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in arguments.items()}
    out = ssd_scan(**strided, dt_softplus=True)
    assert not out.requires_grad
    expected = ssd_scan_reference(**arguments, dt_softplus=True)
    assert (out - expected).abs().max() <= ROUND_OFF * expected.abs().max()


def test_inputs_are_not_changed():
    arguments = make(2, 70, 4, 3, 2, 5)
    copies = {name: tensor.detach().clone() for name, tensor in arguments.items()}
    ssd_scan(**arguments, dt_softplus=True).sum().backward()
    list(ssd_states(**{name: arguments[name] for name in STATES_NAMES}))
    assert all(torch.equal(arguments[name], copies[name]) for name in NAMES)


@pytest.mark.parametrize("chunk_size", [1, 16, 50, 64])
def test_states_read_out_to_the_outputs(chunk_size, poisoned_empty):
    arguments = make(2, 50, 4, 3, 2, 5)
    options = {"dt_softplus": True, "dt_limit": (0.05, 2.0)}
    generator = ssd_states(**{name: arguments[name] for name in STATES_NAMES}, **options, chunk_size=chunk_size)
    chunks = [chunk.clone() for chunk in generator]
    assert max(chunk.shape[0] for chunk in chunks) <= chunk_size
    states = torch.cat(chunks)  # (length, batch, heads, head_dim, N)
    assert not states.requires_grad
    expected, last = ssd_scan_reference(**{**arguments, "D": None, "z": None}, **options, return_final_states=True)
    C = arguments["C"].repeat_interleave(2, dim=2)
    assert (torch.einsum("lbhpn,blhn->blhp", states, C) - expected).abs().max() <= ROUND_OFF * expected.abs().max()
    assert (states[-1] - last).abs().max() <= ROUND_OFF * last.abs().max()


@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_states_of_packed_texts(chunk_size):
    arguments = make(2, 50, 4, 3, 2, 5, requires_grad=False)
    seq_idx = packed(arguments, (16, 3, 31))
    named = {name: arguments[name] for name in STATES_NAMES}
    states = torch.cat([chunk.clone() for chunk in ssd_states(**named, seq_idx=seq_idx, chunk_size=chunk_size)])
    expected = ssd_scan_reference(**{**arguments, "D": None, "z": None}, seq_idx=seq_idx)
    C = arguments["C"].repeat_interleave(2, dim=2)
    assert (torch.einsum("lbhpn,blhn->blhp", states, C) - expected).abs().max() <= ROUND_OFF * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 7, 4), r"x has shape \(2, 7, 4\)"),
        ("x", torch.zeros(2, 0, 4, 3), "length at least 1"),
        ("x", torch.zeros(2, 7, 4, 3, dtype=torch.int64), "x is torch.int64"),
        ("dt", torch.zeros(2, 6, 4), r"dt has shape \(2, 6, 4\); expected \(2, 7, 4\)"),
        ("A", torch.zeros(4, 5), r"A has shape \(4, 5\); expected \(4,\)"),
        ("A", torch.zeros(4, dtype=torch.complex64), "A is torch.complex64; expected a real"),
        ("B", torch.zeros(2, 7, 3, 5), r"B has shape \(2, 7, 3, 5\); .* divides the 4 heads"),
        ("B", torch.zeros(2, 7, 5), r"B has shape \(2, 7, 5\); expected \(batch, length, groups, N\)"),
        ("B", torch.zeros(2, 6, 2, 5), r"B has shape \(2, 6, 2, 5\); expected \(2, 7, 2, 5\)"),
        ("C", torch.zeros(2, 7, 1, 5), r"C has shape \(2, 7, 1, 5\); expected \(2, 7, 2, 5\)"),
        ("D", torch.zeros(4, 1), r"D has shape \(4, 1\); expected \(4, 3\)"),
        ("D", torch.zeros(3), r"D has shape \(3,\); expected \(4,\)"),
        ("z", torch.zeros(2, 7, 4, 4), r"z has shape \(2, 7, 4, 4\)"),
        ("dt_bias", torch.zeros(3), r"dt_bias has shape \(3,\)"),
        ("initial_states", torch.zeros(2, 4, 5, 3), r"initial_states has shape \(2, 4, 5, 3\)"),
        ("seq_idx", torch.zeros(2, 6, dtype=torch.int32), r"seq_idx has shape \(2, 6\); expected \(2, 7\)"),
        ("seq_idx", torch.zeros(2, 7), "seq_idx is torch.float32; expected an integer"),
        ("cu_seqlens", torch.tensor([0, 3, 7]), "cu_seqlens is not supported; pass .* as seq_idx"),
        ("chunk_size", torch.zeros(4), "chunk_size is a tensor .* D comes after it, as in mamba-ssm"),
        ("dt_limit", (1.0, 0.0), r"dt_limit is \(1.0, 0.0\)"),
        ("dt_limit", (math.nan, 1.0), r"dt_limit is \(nan, 1.0\)"),
    ],
)
@pytest.mark.parametrize("scan", [ssd_scan, ssd_scan_reference])
def test_bad_arguments(scan, name, value, message):
    arguments = make(2, 7, 4, 3, 2, 5, requires_grad=False)
    with pytest.raises(ValueError, match=message):
        scan(**{**arguments, name: value})


def test_bad_chunk_size():
    arguments = make(2, 7, 4, 3, 2, 5, requires_grad=False)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        ssd_scan(**arguments, chunk_size=0)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        next(ssd_states(**{name: arguments[name] for name in STATES_NAMES}, chunk_size=0))


@pytest.mark.parametrize("every", [2, 3, 16, 50])
@pytest.mark.parametrize("packing", [False, True])
def test_states_after_every_so_many_steps(every, packing):
    arguments = make(2, 50, 4, 3, 2, 5, requires_grad=False)
    seq_idx = packed(arguments, (16, 3, 31)) if packing else None
    named = {name: arguments[name] for name in STATES_NAMES}
    all_states = torch.cat([chunk.clone() for chunk in ssd_states(**named, seq_idx=seq_idx)])
    found = torch.cat(list(ssd_states(**named, seq_idx=seq_idx, every=every)))
    expected = all_states[every - 1 :: every]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= ROUND_OFF * expected.abs().max()
