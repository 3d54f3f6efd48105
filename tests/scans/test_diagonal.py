"""The diagonal scan against the recurrence as it is written: outputs, last state and every gradient."""

import pytest
import torch

import hf_compressm.scans.diagonal as diagonal
from hf_compressm.scans import diagonal_scan, diagonal_scan_reference, diagonal_states


ROUND_OFF = 1e-10  # float64, a few hundred steps: products in another order, nothing else
SINGLE_ROUND_OFF = 1e-4  # float32, relative to the largest entry
HALF_ROUND_OFF = 2e-2  # the input's own rounding in bfloat16 (8 bits) and the output's
NAMES = ("u", "eigenvalues", "B", "C", "initial_state")

CASES = {
    # name: (batch, length, H, P, N)
    "length 1": (2, 1, 3, 4, 5),
    "below a chunk": (2, 31, 3, 4, 5),
    "one chunk": (2, 32, 3, 4, 5),
    "above a chunk": (2, 33, 3, 4, 5),
    "two chunks": (2, 64, 3, 4, 5),
    "odd": (3, 101, 3, 2, 7),
    "batch 1": (1, 50, 2, 2, 4),
    "N 1": (2, 40, 2, 3, 1),
    "H 1, P 1": (2, 67, 1, 1, 6),
    "wide": (1, 19, 40, 33, 3),
    "wider": (1, 11, 96, 90, 2),
}


def make(batch, length, H, P, N, dtype=torch.float64, requires_grad=True):
    """Random arguments; moduli up to 1, one eigenvalue 0, one real (angle 0), one on the unit circle."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    complex_dtype = dtype.to_complex()

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    modulus = torch.rand(N, dtype=dtype, generator=generator)
    angle = torch.rand(N, dtype=dtype, generator=generator) * 6
    special = torch.tensor([0.9999, 0.0, 1.0], dtype=dtype)
    modulus[: min(3, N)] = special[: min(3, N)]
    angle[0] = 0.0
    tensors = [
        normal(batch, length, H),
        torch.polar(modulus, angle),
        normal(N, H, dtype=complex_dtype),
        normal(P, N, dtype=complex_dtype),
        normal(batch, N, dtype=complex_dtype),
    ]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def outputs_and_gradients(scan, arguments, **options):
    """Y, last state, and the gradients of a loss that weights every output differently."""
    y, last = scan(*arguments, return_last_state=True, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    loss = (y * weights).sum() + (
        last * torch.view_as_complex(torch.stack([last.real, last.imag + 1], -1)).detach()
    ).real.sum()
    return [y, last, *torch.autograd.grad(loss, arguments)]


def assert_all_close(actual, expected, tolerance=ROUND_OFF):
    for name, left, right in zip(("y", "last_state", *NAMES), actual, expected, strict=True):
        scale = max(1.0, right.abs().max().item())
        assert (left - right).abs().max().item() <= tolerance * scale, name


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Memory that is not written shows as NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, original=original, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() or tensor.is_complex() else tensor

        monkeypatch.setattr(owner, name, poisoned)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, reverse, poisoned_empty):
    arguments = make(*CASES[case])
    actual = outputs_and_gradients(diagonal_scan, arguments, reverse=reverse)
    expected = outputs_and_gradients(diagonal_scan_reference, arguments, reverse=reverse)
    assert all(torch.isfinite(torch.view_as_real(t) if t.is_complex() else t).all() for t in actual)
    assert_all_close(actual, expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_chunk_size_does_not_matter(steps, monkeypatch):
    monkeypatch.setattr(diagonal, "_choose_chunk_size", lambda *_: steps)
    arguments = make(2, 25, 3, 4, 5)
    expected = outputs_and_gradients(diagonal_scan_reference, arguments)
    assert_all_close(outputs_and_gradients(diagonal_scan, arguments), expected)


def test_all_eigenvalues_zero():
    arguments = make(2, 40, 3, 4, 5)
    arguments[1] = torch.zeros(5, dtype=torch.complex128, requires_grad=True)
    actual = outputs_and_gradients(diagonal_scan, arguments)
    assert_all_close(actual, outputs_and_gradients(diagonal_scan_reference, arguments))
    assert actual[3].abs().max() > 0  # the gradient at zero is not zero


def test_gradcheck():
    arguments = make(2, 7, 2, 2, 3)
    assert torch.autograd.gradcheck(lambda *a: diagonal_scan(*a, return_last_state=True), arguments)


def test_reverse_is_the_flipped_scan():
    u, eigenvalues, B, C, state = make(2, 45, 3, 4, 5, requires_grad=False)
    backward = diagonal_scan(u, eigenvalues, B, C, state, reverse=True)
    assert (backward - diagonal_scan(u.flip(1), eigenvalues, B, C, state).flip(1)).abs().max() <= ROUND_OFF


def test_two_halves_make_the_whole():
    u, eigenvalues, B, C, state = make(2, 75, 3, 4, 5, requires_grad=False)
    first, middle = diagonal_scan(u[:, :40], eigenvalues, B, C, state, return_last_state=True)
    second = diagonal_scan(u[:, 40:], eigenvalues, B, C, middle)
    assert (torch.cat([first, second], 1) - diagonal_scan(u, eigenvalues, B, C, state)).abs().max() <= ROUND_OFF


def test_float32_near_the_unit_circle():
    arguments = make(2, 1000, 3, 4, 6, requires_grad=False)[:4]
    single = [argument.to(torch.complex64 if argument.is_complex() else torch.float32) for argument in arguments]
    y, exact = diagonal_scan(*single), diagonal_scan_reference(*arguments)
    assert y.dtype == torch.float32
    assert (y - exact).abs().max() <= SINGLE_ROUND_OFF * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(dtype):
    u, *rest = make(2, 40, 3, 4, 5, dtype=torch.float32, requires_grad=False)
    u = u.to(dtype).requires_grad_()
    y, last = diagonal_scan(u, *rest, return_last_state=True)
    exact = diagonal_scan(u.detach().float(), *rest)
    assert (y.dtype, last.dtype) == (dtype, torch.complex64)
    assert (y.float() - exact).abs().max() <= HALF_ROUND_OFF * exact.abs().max()
    y.sum().backward()
    assert u.grad.dtype == dtype


def test_autocast_does_not_lower_the_precision():
    arguments = make(2, 40, 3, 4, 5, dtype=torch.float32, requires_grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = diagonal_scan(*arguments)
    assert torch.equal(y, diagonal_scan(*arguments))


def test_non_contiguous_and_no_gradient():
    u, eigenvalues, B, C, state = make(2, 50, 3, 4, 5, requires_grad=False)
    strided = [
        u.transpose(0, 1).contiguous().transpose(0, 1),
        eigenvalues,
        B.T.contiguous().T,
        C.T.contiguous().T,
        state,
    ]
    y = diagonal_scan(*strided)
    assert not y.requires_grad
    assert (y - diagonal_scan_reference(u, eigenvalues, B, C, state)).abs().max() <= ROUND_OFF


def test_inputs_are_not_changed():
    arguments = make(2, 50, 3, 4, 5, requires_grad=False)
    copies = [argument.clone() for argument in arguments]
    diagonal_scan(*arguments)
    list(diagonal_states(arguments[0], arguments[1], arguments[2], 16, arguments[4]))
    assert all(torch.equal(*pair) for pair in zip(arguments, copies, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 16, 50, 64])
def test_states_read_out_to_the_outputs(chunk_size, reverse, poisoned_empty):
    u, eigenvalues, B, C, state = make(2, 50, 3, 4, 5)
    chunks = list(diagonal_states(u, eigenvalues, B, chunk_size, state, reverse))
    assert max(chunk.shape[1] for chunk in chunks) <= chunk_size
    states = torch.cat(chunks, dim=1)
    states = states.flip(1) if reverse else states
    expected = diagonal_scan_reference(u, eigenvalues, B, C, state, reverse=reverse)
    assert not states.requires_grad
    assert ((states @ C.T).real - expected).abs().max() <= ROUND_OFF


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("u", torch.zeros(2, 5), r"u is torch.float32 \(2, 5\)"),
        ("u", torch.zeros(2, 0, 3), "length at least 1"),
        ("u", torch.zeros(2, 5, 3, dtype=torch.complex64), "expected real"),
        ("eigenvalues", torch.zeros(5), "eigenvalues is torch.float32; expected a complex"),
        ("eigenvalues", torch.zeros(5, 1, dtype=torch.complex64), r"eigenvalues has shape \(5, 1\); expected \(N,\)"),
        ("B", torch.zeros(5, 4, dtype=torch.complex64), r"B has shape \(5, 4\); expected \(5, 3\)"),
        ("C", torch.zeros(4, 6, dtype=torch.complex64), r"C has shape \(4, 6\); expected \(4, 5\)"),
        ("initial_state", torch.zeros(1, 5, dtype=torch.complex64), r"initial_state has shape \(1, 5\)"),
    ],
)
@pytest.mark.parametrize("scan", [diagonal_scan, diagonal_scan_reference])
def test_bad_arguments(scan, name, value, message):
    arguments = dict(zip(NAMES, make(2, 5, 3, 4, 5, requires_grad=False), strict=True))
    with pytest.raises(ValueError, match=message):
        scan(**{**arguments, name: value})


def test_bad_chunk_size():
    u, eigenvalues, B, _, _ = make(2, 5, 3, 4, 5, requires_grad=False)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        next(diagonal_states(u, eigenvalues, B, chunk_size=0))
