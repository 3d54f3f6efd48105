"""The recurrences as operators: what `torch.library` asks of them, and what compilers make of the scans."""

import pytest
import torch

from hf_compressm.scans import (
    delta_scan,
    diagonal_scan,
    selective_scan,
    selective_scan_reference,
    ssd_scan,
)
from hf_compressm.scans.operators import NAMESPACE


ROUND_OFF = 1e-5  # float32, relative to the largest entry


def real(*shape):
    return torch.randn(shape).requires_grad_()


def complex_(*shape):
    return torch.randn(shape, dtype=torch.complex64).requires_grad_()


def strided(tensor):
    """The same numbers with other strides."""
    return tensor.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()


OPERATORS = {
    "selective_recurrence": lambda: (
        torch.rand(20, 2, 8).requires_grad_(),
        real(20, 2, 8),
        (-torch.rand(4, 8)).requires_grad_(),
        real(20, 2, 4),
        strided(real(20, 2, 4)),
    ),
    "ssd_recurrence": lambda: (
        real(2, 3, 4, 2, 5),
        (-torch.rand(2, 3, 4, 2)).requires_grad_(),
        real(2, 3, 4, 1, 6),
        strided(real(2, 3, 4, 1, 6)),
        real(2, 2, 5, 6),
    ),
    "delta_recurrence": lambda: (
        strided(real(2, 11, 2, 4)),
        real(2, 11, 2, 4),
        real(2, 11, 4, 3),
        (-torch.rand(2, 11, 4)).requires_grad_(),
        torch.rand(2, 11, 4).requires_grad_(),
        real(2, 4, 4, 3),
        4,
        0.5,
        1e-6,
    ),
    "diagonal_recurrence": lambda: (
        (0.5 * torch.ones(5, dtype=torch.complex64)).requires_grad_(),
        strided(complex_(2, 3, 5)),
        complex_(2, 5),
    ),
}


def selective(length):
    tensors = real(2, 8, length), real(2, 8, length), real(8, 4), real(2, 4, length), real(2, 4, length)
    return lambda u, delta, A, B, C: selective_scan(u, delta, -A.exp(), B, C, delta_softplus=True), tensors


def ssd(length):
    tensors = real(2, length, 4, 8), real(2, length, 4), real(4), real(2, length, 1, 6), real(2, length, 1, 6)
    return lambda x, dt, A, B, C: ssd_scan(x, dt, -A.exp(), B, C, dt_softplus=True), tensors


def delta(length):
    tensors = real(2, length, 2, 4), real(2, length, 2, 4), real(2, length, 4, 3), real(2, length, 4)
    return lambda q, k, v, g: delta_scan(q, k, v, -g.exp(), use_qk_l2norm_in_kernel=True)[0], tensors


def diagonal(length):
    eigenvalues = torch.polar(torch.rand(5), torch.rand(5)).requires_grad_()
    return diagonal_scan, (real(2, length, 3), eigenvalues, complex_(5, 3), complex_(3, 5))


SCANS = [selective, ssd, delta, diagonal]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at it
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    torch.library.opcheck(getattr(getattr(torch.ops, NAMESPACE), name).default, OPERATORS[name]())


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_of_the_backward_pass(name):
    """What a compiler is told of the shapes of gradients is what they are."""
    given = [value.detach() if isinstance(value, torch.Tensor) else value for value in OPERATORS[name]()]
    outputs = getattr(getattr(torch.ops, NAMESPACE), name)(*given)
    backward = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default
    if name == "diagonal_recurrence":
        saved = (torch.randn_like(outputs), given[0], outputs)
    else:
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        kept = outputs[2:]
        if name == "delta_recurrence":
            tensors = tensors[:5]
        numbers = [value for value in given if not isinstance(value, torch.Tensor)]
        saved = (torch.randn_like(outputs[0]), None, *tensors, *kept, *numbers)
    torch.library.opcheck(backward, saved, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("make", SCANS)
def test_one_graph_of_the_same_size_for_any_length(make):
    sizes = []
    for length in (45, 173):
        scan, tensors = make(length)
        expected = scan(*tensors)
        graphs = []

        def keep(graph, examples, graphs=graphs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

        torch.compiler.reset()
        actual = torch.compile(scan, backend=keep, fullgraph=True)(*tensors)
        assert (actual - expected).abs().max() <= ROUND_OFF * expected.abs().max()
        losses = [out.square().sum() for out in (actual, expected)]
        found, wanted = (torch.autograd.grad(loss, tensors) for loss in losses)
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).abs().max() <= ROUND_OFF * other.abs().max()
        (graph,) = graphs
        sizes.append(len(graph.graph.nodes))
    assert sizes[0] == sizes[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("make", [selective, ssd])
def test_one_graph_for_all_lengths(make):
    graphs = []

    def keep(graph, examples):
        graphs.append(graph)
        return graph.forward

    compiled = None
    for length in (65, 97, 129):
        scan, tensors = make(length)
        compiled = compiled or torch.compile(scan, backend=keep, fullgraph=True, dynamic=True)
        expected = scan(*tensors)
        assert (compiled(*tensors) - expected).abs().max() <= ROUND_OFF * expected.abs().max()
    assert len(graphs) == 1


@pytest.mark.parametrize("make", SCANS)
def test_a_second_derivative_is_refused(make):
    scan, tensors = make(9)
    (grad,) = torch.autograd.grad(scan(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="recurrence_backward"):
        torch.autograd.grad(grad.sum(), tensors[1])


@pytest.mark.parametrize("make", [selective, ssd, delta])
def test_a_backward_pass_inside_of_autocast_computes_as_outside(make):
    scan, tensors = make(45)
    expected = torch.autograd.grad(scan(*tensors).square().sum(), tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(scan(*tensors).square().sum(), tensors)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("make", SCANS)
def test_no_sequence_at_all(make):
    scan, tensors = make(9)
    tensors = [tensor[:0].detach().requires_grad_() if tensor.shape[0] == 2 else tensor for tensor in tensors]
    out = scan(*tensors)
    assert out.shape[0] == 0
    for grad, tensor in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


def test_a_checkpointed_scan_runs_again():
    scan, tensors = selective(20)
    expected = torch.autograd.grad(scan(*tensors).square().sum(), tensors)
    out = torch.utils.checkpoint.checkpoint(scan, *tensors, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(out.square().sum(), tensors), expected, strict=True):
        assert torch.equal(one, other)


def test_without_gradients_the_scan_is_that_of_the_reference():
    scan, tensors = selective(20)
    with torch.inference_mode():
        out = scan(*tensors)
    u, delta, A, B, C = tensors
    expected = selective_scan_reference(u, delta, -A.exp(), B, C, delta_softplus=True)
    assert (out - expected).abs().max() <= ROUND_OFF * expected.abs().max()
