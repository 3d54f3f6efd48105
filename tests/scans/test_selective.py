"""The selective scan against the recurrence as it is written: outputs, last state and every gradient."""

import pytest
import torch

import hf_compressm.scans.selective as selective
import hf_compressm.scans.selective_chunks as selective_chunks
import hf_compressm.scans.selective_kernel as selective_kernel
from hf_compressm.scans import selective_scan, selective_scan_reference, selective_states


ROUND_OFF = 1e-10  # float64, a few hundred steps: products in another order, nothing else
HALF_ROUND_OFF = 2e-2  # the output's own rounding in bfloat16 (8 bits)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")

CASES = {
    # name: (batch, channels, N, length)
    "length 1": (2, 3, 5, 1),
    "length 2": (2, 3, 5, 2),
    "below a chunk": (2, 3, 5, 15),
    "one chunk": (2, 3, 5, 16),
    "above a chunk": (2, 3, 5, 17),
    "odd": (3, 7, 3, 53),
    "batch 1": (1, 4, 6, 32),
    "N 1": (2, 4, 1, 33),
    "one channel": (2, 1, 4, 20),
}


def make(batch, channels, N, length, dtype=torch.float64, requires_grad=True):
    """Random arguments; one entry of A is 0 (no decay), one so negative that the state is forgotten at once."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    A = -5 * torch.rand(channels, N, dtype=dtype, generator=generator)
    A[0, 0] = 0.0
    A[-1, -1] = -1e4
    tensors = [
        normal(batch, channels, length),
        normal(batch, channels, length),
        A,
        normal(batch, N, length),
        normal(batch, N, length),
        normal(channels),
        normal(batch, channels, length),
        normal(channels),
    ]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def outputs_and_gradients(scan, arguments):
    """Out, last state, and the gradients of a loss that weights every output differently."""
    out, last = scan(*arguments, delta_softplus=True, return_last_state=True)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, last, *torch.autograd.grad((out * weights).sum() + (last * (last.detach() + 1)).sum(), arguments)]


def assert_all_close(actual, expected, tolerance=ROUND_OFF):
    for name, left, right in zip(("out", "last_state", *NAMES), actual, expected, strict=True):
        scale = max(1.0, right.abs().max().item())
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


@pytest.mark.parametrize("block_entries", [1, 65536])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, block_entries, poisoned_empty, monkeypatch):
    monkeypatch.setattr(selective_chunks, "BLOCK_ENTRIES", block_entries)
    arguments = make(*CASES[case])
    actual = outputs_and_gradients(selective_scan, arguments)
    assert_all_close(actual, outputs_and_gradients(selective_scan_reference, arguments))


FORMS = ("shared", "constant", "1 group", "2 groups", "3 groups", "a group per channel")


def vectors(form, batch=2, channels=6, N=4, length=19):
    """B or C in one of the forms that mamba-ssm takes."""
    groups = {"1 group": 1, "2 groups": 2, "3 groups": 3, "a group per channel": channels}
    shapes = {"shared": (batch, N, length), "constant": (channels, N)}
    shape = shapes.get(form) or (batch, groups[form], N, length)
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def of_channel(tensor, channel, channels=6, length=19):
    """What one channel reads of B or C, in the shared form."""
    if tensor.dim() == 2:
        return tensor[channel, None, :, None].expand(2, -1, length)
    return tensor if tensor.dim() == 3 else tensor[:, channel * tensor.shape[1] // channels]


@pytest.mark.parametrize("C_form", FORMS)
@pytest.mark.parametrize("B_form", FORMS)
@pytest.mark.parametrize("scan", [selective_scan, selective_scan_reference])
def test_forms_of_B_and_C(scan, B_form, C_form):
    arguments = make(2, 6, 4, 19)
    arguments[3:5] = vectors(B_form), vectors(C_form)
    u, delta, A, B, C, D, z, delta_bias = arguments
    one_by_one = [
        selective_scan_reference(
            u[:, c : c + 1],
            delta[:, c : c + 1],
            A[c : c + 1],
            of_channel(B, c),
            of_channel(C, c),
            *(D[c : c + 1], z[:, c : c + 1], delta_bias[c : c + 1]),
            delta_softplus=True,
            return_last_state=True,
        )
        for c in range(6)
    ]
    together = [torch.cat(parts, dim=1) for parts in zip(*one_by_one, strict=True)]
    expected = outputs_and_gradients(lambda *given, **options: together, arguments)
    assert_all_close(outputs_and_gradients(scan, arguments), expected)


def test_groups_run_fast(monkeypatch):
    arguments = make(2, 6, 4, 19, requires_grad=False)
    arguments[3:5] = vectors("2 groups").detach(), vectors("3 groups").detach()
    expected = selective_scan_reference(*arguments, delta_softplus=True)
    bare = [*arguments[:5], None, None, None]
    bare_expected = selective_scan_reference(*bare, delta_softplus=True)
    monkeypatch.setattr(selective, "selective_scan_reference", None)
    assert (selective_scan(*arguments, delta_softplus=True) - expected).abs().max() <= ROUND_OFF * expected.abs().max()
    out = selective_scan(*bare, delta_softplus=True)
    assert (out - bare_expected).abs().max() <= ROUND_OFF * bare_expected.abs().max()


@pytest.mark.parametrize("missing", ["D", "z", "delta_bias"])
@pytest.mark.parametrize("softplus", [False, True])
def test_optional_arguments(missing, softplus):
    arguments = dict(zip(NAMES, make(2, 3, 5, 20, requires_grad=False), strict=True))
    arguments["delta"] = arguments["delta"].abs()
    arguments["delta_bias"] = arguments["delta_bias"].abs()
    arguments[missing] = None
    out = selective_scan(**arguments, delta_softplus=softplus)
    expected = selective_scan_reference(**arguments, delta_softplus=softplus)
    assert (out - expected).abs().max() <= ROUND_OFF * max(1.0, expected.abs().max().item())


def test_gradcheck():
    arguments = make(2, 2, 3, 4)
    with torch.no_grad():
        arguments[2].clamp_(min=-5.0)
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a, True, True), arguments)


def test_gradient_of_one_output_alone():
    arguments = make(2, 3, 5, 20)
    for pick in (0, 1):
        actual = selective_scan(*arguments, True, True)[pick].sum()
        expected = selective_scan_reference(*arguments, True, True)[pick].sum()
        for argument in arguments[:4]:
            (left,) = torch.autograd.grad(actual, argument, retain_graph=True)
            (right,) = torch.autograd.grad(expected, argument, retain_graph=True)
            assert (left - right).abs().max() <= ROUND_OFF * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(dtype):
    arguments = make(2, 3, 5, 40, dtype=torch.float32, requires_grad=False)
    halves = [
        argument if name in ("A", "D", "delta_bias") else argument.to(dtype)
        for name, argument in zip(NAMES, arguments, strict=True)
    ]
    halves[0].requires_grad_()
    out, last = selective_scan(*halves, True, True)
    exact = selective_scan_reference(*(half.detach().float() for half in halves), True)
    assert (out.dtype, last.dtype) == (dtype, torch.float32)
    assert (out.float() - exact).abs().max() <= HALF_ROUND_OFF * exact.abs().max()
    out.sum().backward()
    assert halves[0].grad.dtype == dtype


def test_autocast_does_not_lower_the_precision():
    arguments = make(2, 3, 5, 20, dtype=torch.float32)
    expected = outputs_and_gradients(selective_scan, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = selective_scan(*arguments, True)
    assert torch.equal(actual, expected[0])


def test_non_contiguous_and_no_gradient():
    arguments = make(2, 3, 5, 40, requires_grad=False)
    strided = [a.transpose(0, -1).contiguous().transpose(0, -1) if a.dim() > 1 else a for a in arguments]
    out = selective_scan(*strided, True)
    assert not out.requires_grad
    assert (out - selective_scan_reference(*arguments, True)).abs().max() <= ROUND_OFF * out.abs().max()


def test_inputs_are_not_changed():
    arguments = make(2, 3, 5, 40)
    copies = [argument.detach().clone() for argument in arguments]
    selective_scan(*arguments, True).sum().backward()
    list(selective_states(*arguments[:4]))
    assert all(torch.equal(*pair) for pair in zip(arguments, copies, strict=True))


def test_memory_is_a_share_of_the_length():
    arguments = make(1, 64, 16, 320)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda x: x):
        selective_scan(*arguments, True)
    assert max(saved) == 64 * 16 * 320 // selective.CHUNK_SIZE


@pytest.mark.parametrize("chunk_size", [1, 16, 50, 64])
def test_states_read_out_to_the_outputs(chunk_size, poisoned_empty):
    u, delta, A, B, C, _, _, bias = make(2, 3, 5, 50)
    chunks = [chunk.clone() for chunk in selective_states(u, delta, A, B, bias, True, chunk_size)]
    assert max(chunk.shape[0] for chunk in chunks) <= chunk_size
    states = torch.cat(chunks)  # (length, batch, channels, N)
    expected, last = selective_scan_reference(u, delta, A, B, C, None, None, bias, True, True)
    assert not states.requires_grad
    assert (torch.einsum("lbcn,bnl->bcl", states, C) - expected).abs().max() <= ROUND_OFF * expected.abs().max()
    assert (states[-1] - last).abs().max() <= ROUND_OFF * last.abs().max()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("u", torch.zeros(2, 3), r"u has shape \(2, 3\)"),
        ("u", torch.zeros(2, 3, 0), "length at least 1"),
        ("u", torch.zeros(2, 3, 7, dtype=torch.int64), "u is torch.int64"),
        ("delta", torch.zeros(2, 3, 6), r"delta has shape \(2, 3, 6\); expected \(2, 3, 7\)"),
        ("A", torch.zeros(4, 5), r"A has shape \(4, 5\); expected \(channels, N\) with 3"),
        ("A", torch.zeros(3, 5, dtype=torch.complex64), "A is torch.complex64; expected a real"),
        ("B", torch.zeros(2, 4, 7), r"B has shape \(2, 4, 7\); expected \(2, 5, 7\)"),
        ("C", torch.zeros(2, 7, 5), r"C has shape \(2, 7, 5\); expected \(2, 5, 7\)"),
        ("B", torch.zeros(3, 4), r"B has shape \(3, 4\); expected \(3, 5\)"),
        ("B", torch.zeros(2, 2, 5, 7), r"B has shape \(2, 2, 5, 7\); expected \(2, 5, 7\)"),  # 2 groups, 3 channels
        ("C", torch.zeros(2, 3, 5, 6), r"C has shape \(2, 3, 5, 6\); expected \(2, 3, 5, 7\)"),
        ("C", torch.zeros(5), r"C has shape \(5,\); expected \(2, 5, 7\)"),
        ("D", torch.zeros(3, 1), r"D has shape \(3, 1\); expected \(3,\)"),
        ("z", torch.zeros(2, 4, 7), r"z has shape \(2, 4, 7\)"),
        ("delta_bias", torch.zeros(4), r"delta_bias has shape \(4,\)"),
    ],
)
@pytest.mark.parametrize("scan", [selective_scan, selective_scan_reference])
def test_bad_arguments(scan, name, value, message):
    arguments = dict(zip(NAMES, make(2, 3, 5, 7, requires_grad=False), strict=True))
    with pytest.raises(ValueError, match=message):
        scan(**{**arguments, name: value})


@pytest.mark.parametrize("B", [torch.zeros(3, 5), torch.zeros(2, 3, 5, 7)])
def test_states_need_shared_vectors(B):
    u, delta, A, *_ = make(2, 3, 5, 7, requires_grad=False)
    with pytest.raises(ValueError, match=r"B has shape .*; expected \(batch, N, length\), shared by all channels"):
        next(selective_states(u, delta, A, B))


def test_bad_chunk_size():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        next(selective_states(*make(2, 3, 5, 7, requires_grad=False)[:4], chunk_size=0))


def test_a_batch_that_no_grid_holds_needs_no_kernel(monkeypatch):
    monkeypatch.setattr(selective, "has_kernel", lambda device, dtype: True)
    monkeypatch.setattr(selective, "fused_selective_scan", None)
    monkeypatch.setattr(selective_kernel, "MOST_SEQUENCES", 1)
    arguments = [tensor.float() for tensor in make(2, 3, 5, 6, requires_grad=False)]
    assert selective_scan(*arguments, delta_softplus=True).shape == (2, 3, 6)
    with pytest.raises(TypeError, match="not callable"):
        selective_scan(*[tensor[:1] if tensor.shape[0] == 2 else tensor for tensor in arguments], delta_softplus=True)
