"""Stock Mamba models with the fast scan in place: same numbers, and out of the way of everything that works."""

import importlib.util
import sys
import types

import pytest
import torch
import transformers.models.mamba.modeling_mamba as modeling
from transformers import MambaConfig, MambaForCausalLM

import hf_compressm.scans.stock as stock
from hf_compressm.scans import disable_fast_selective_scan, enable_fast_selective_scan


SINGLE_ROUND_OFF = 1e-5  # float32, relative to the largest entry
FUNCTIONS = ("mamba_selective_scan", "mamba_inner_fn", "mamba_selective_state_update")


@pytest.fixture(autouse=True)
def stock_functions():
    """Every test starts and ends with the functions of transformers."""
    disable_fast_selective_scan()
    yield {name: getattr(modeling, name) for name in FUNCTIONS}
    disable_fast_selective_scan()


@pytest.fixture
def fast_calls(monkeypatch):
    """Count the calls of the fast scan."""
    calls = []

    def counted(*args):
        calls.append(args)
        return original(*args)

    original = stock.selective_scan
    monkeypatch.setattr(stock, "selective_scan", counted)
    return calls


def make_model(**options):
    torch.manual_seed(0)
    config = {"vocab_size": 40, "hidden_size": 16, "state_size": 5, "num_hidden_layers": 2, "pad_token_id": 1}
    return MambaForCausalLM(MambaConfig(**{**config, **options})).train()


def make_tokens(length=37):
    return torch.randint(2, 40, (2, length), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model):
    model.zero_grad()
    output = model(make_tokens(), labels=make_tokens())
    output.loss.backward()
    return [output.logits, *(parameter.grad.clone() for parameter in model.parameters())]


def fake_mamba_ssm(monkeypatch, works_on=()):
    """Install a mamba_ssm whose functions raise, but on the given device types. Returns the list of its calls."""
    calls = []

    def kernel(name, torch_function):
        def function(*args, **kwargs):
            if args[0].device.type not in works_on:
                raise RuntimeError("selective_scan_cuda is not installed")
            calls.append(name)
            return torch_function(*args, **kwargs)

        return function

    def unfused(*args, **kwargs):
        return None

    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton")
    modules = {name: types.ModuleType(name) for name in (*names, "mamba_ssm.ops.triton.selective_state_update")}
    for name, module in modules.items():
        module.__path__ = []
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
        monkeypatch.setitem(sys.modules, name, module)
    interface = modules["mamba_ssm.ops.selective_scan_interface"]
    interface.selective_scan_fn = kernel("scan", stock._torch_path(modeling.mamba_selective_scan))
    interface.mamba_inner_fn = kernel("fused", unfused)
    update = modules["mamba_ssm.ops.triton.selective_state_update"]
    update.selective_state_update = kernel("update", stock._torch_path(modeling.mamba_selective_state_update))
    return calls, interface, update


def bind_fakes(monkeypatch, interface, update):
    """What transformers does when it is imported beside such a package: bind its functions."""
    for name, function in zip(
        FUNCTIONS,
        (interface.selective_scan_fn, interface.mamba_inner_fn, update.selective_state_update),
        strict=True,
    ):
        reference = stock._torch_path(getattr(modeling, name))

        def bound(*args, function=function, **kwargs):
            kwargs.pop("use_mambapy", None)
            kwargs.pop("use_associative_scan", None)
            return function(*args, **kwargs)

        bound.__wrapped__ = reference
        monkeypatch.setattr(modeling, name, bound)


def test_same_logits_and_gradients(fast_calls):
    model = make_model()
    expected = logits_and_gradients(model)
    assert enable_fast_selective_scan() is True
    actual = logits_and_gradients(model)
    assert len(fast_calls) == 2
    for left, right in zip(actual, expected, strict=True):
        assert left.dtype == right.dtype
        assert (left - right).abs().max() <= SINGLE_ROUND_OFF * max(1.0, right.abs().max().item())


def test_same_generation(fast_calls):
    model = make_model().eval()
    tokens, options = make_tokens(9), {"max_new_tokens": 12, "do_sample": False}
    options["attention_mask"] = torch.ones_like(tokens)
    expected = model.generate(tokens, **options)
    enable_fast_selective_scan()
    assert torch.equal(model.generate(tokens, **options), expected)
    assert len(fast_calls) == 2  # the prompt in two layers; single steps use the update


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_same_dtypes(dtype):
    A = -torch.rand(6, 4)
    u, delta, z = (torch.rand(2, 6, 11, dtype=dtype) for _ in range(3))
    B, C = (torch.rand(2, 4, 11, dtype=dtype) for _ in range(2))
    for D in (None, torch.rand(6)):
        arguments = {"D": D, "z": z, "delta_softplus": True, "return_last_state": True}
        disable_fast_selective_scan()
        expected = modeling.mamba_selective_scan(u, delta, A, B, C, **arguments)
        enable_fast_selective_scan()
        actual = modeling.mamba_selective_scan(u, delta, A, B, C, **arguments)
        for left, right in zip(actual, expected, strict=True):
            assert (left.dtype, left.shape) == (right.dtype, right.shape)
            assert (left - right).abs().max() <= 2e-2 * right.abs().max()


def test_idempotent_and_reversible(stock_functions):
    assert enable_fast_selective_scan() is True
    first = modeling.mamba_selective_scan
    assert first is not stock_functions["mamba_selective_scan"]
    assert enable_fast_selective_scan() is True
    assert stock._torch_path(modeling.mamba_selective_scan) is stock._torch_path(first)
    assert disable_fast_selective_scan() is False
    assert disable_fast_selective_scan() is False
    assert {name: getattr(modeling, name) for name in FUNCTIONS} == stock_functions


def test_no_warning_about_a_slow_path(monkeypatch):
    messages = []
    logger = importlib.import_module("transformers.integrations.hub_kernels").logger
    monkeypatch.setattr(logger, "warning_once", lambda message, *args, **kwargs: messages.append(message))
    enable_fast_selective_scan()
    make_model()(make_tokens())
    assert not [message for message in messages if "selective_scan_fn" in message or "mamba_inner_fn" in message]


def test_explicit_mambapy_is_obeyed(fast_calls, monkeypatch):
    enable_fast_selective_scan()
    monkeypatch.setattr(stock, "is_mambapy_available", lambda: True)
    make_model(use_mambapy=True)(make_tokens())
    assert not fast_calls
    monkeypatch.setattr(stock, "is_mambapy_available", lambda: False)
    make_model(use_mambapy=True)(make_tokens())
    assert len(fast_calls) == 2


def test_packed_sequences_are_left_to_stock(fast_calls):
    cube = torch.zeros(1, 4, 4)
    arguments, options = (cube, cube, torch.zeros(4, 4), cube, cube), {"seq_idx": torch.zeros(1, 4)}
    answers = []
    for _ in range(2):  # an error in some versions of transformers, the plain loop in others
        try:
            answers.append(str(modeling.mamba_selective_scan(*arguments, **options).shape))
        except ValueError as error:
            answers.append(str(error))
        enable_fast_selective_scan()
    assert answers[0] == answers[1]
    assert not fast_calls


def test_broken_kernel_is_passed_over(monkeypatch, fast_calls):
    model = make_model()
    expected = logits_and_gradients(model)
    _, interface, update = fake_mamba_ssm(monkeypatch)
    bind_fakes(monkeypatch, interface, update)
    with pytest.raises(RuntimeError, match="selective_scan_cuda"):
        model(make_tokens())
    assert enable_fast_selective_scan() is True
    for left, right in zip(logits_and_gradients(model), expected, strict=True):
        assert (left - right).abs().max() <= SINGLE_ROUND_OFF * max(1.0, right.abs().max().item())
    assert len(fast_calls) == 2
    tokens = make_tokens(9)
    generated = model.eval().generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False
    )
    assert generated.shape == (2, 12)
    disable_fast_selective_scan()
    with pytest.raises(RuntimeError, match="selective_scan_cuda"):
        model(make_tokens())


def test_working_kernel_is_left_alone(monkeypatch, fast_calls):
    calls, interface, update = fake_mamba_ssm(monkeypatch, works_on=("cpu",))
    bind_fakes(monkeypatch, interface, update)
    monkeypatch.setattr(stock, "_device_types", lambda: ["cpu"])
    assert enable_fast_selective_scan() is False
    calls.clear()
    make_model()(make_tokens())
    assert calls == ["fused", "scan"] * 2
    assert not fast_calls


def test_kernel_of_another_device_only(monkeypatch):
    _, interface, update = fake_mamba_ssm(monkeypatch, works_on=("meta",))
    bind_fakes(monkeypatch, interface, update)
    monkeypatch.setattr(stock, "_device_types", lambda: ["cpu", "meta"])
    monkeypatch.setattr(interface, "selective_scan_fn", lambda u, *args, **kwargs: _fail_on_cpu(u))
    assert enable_fast_selective_scan() is False  # the accelerator has its kernel
    make_model()(make_tokens())  # and tensors on the CPU still run


def _fail_on_cpu(u):
    if u.device.type == "cpu":
        raise RuntimeError("Expected u.is_cuda() to be true")
    return u


def test_unknown_transformers_is_left_alone(monkeypatch, stock_functions):
    monkeypatch.delattr(modeling, "mamba_inner_fn")
    assert enable_fast_selective_scan() is False
    assert modeling.mamba_selective_scan is stock_functions["mamba_selective_scan"]


def test_replaced_by_somebody_else(monkeypatch, stock_functions):
    enable_fast_selective_scan()
    monkeypatch.setattr(modeling, "mamba_inner_fn", max)
    disable_fast_selective_scan()
    assert modeling.mamba_inner_fn is max
    assert modeling.mamba_selective_scan is stock_functions["mamba_selective_scan"]
    monkeypatch.setattr(modeling, "mamba_inner_fn", stock_functions["mamba_inner_fn"])


class _Kernelizable(torch.nn.Module):
    """What the kernels package makes of a function: a module that closes over it."""


def _as_kernelizable(func):
    class Function(_Kernelizable):
        def forward(self, *args, **kwargs):
            return func(*args, **kwargs)

    return Function()


def test_hub_kernel_mechanism(monkeypatch, fast_calls, stock_functions):
    wrapped = _as_kernelizable(stock_functions["mamba_selective_scan"])
    monkeypatch.setattr(modeling, "mamba_selective_scan", wrapped)
    assert stock._torch_path(wrapped) is stock._torch_path(stock_functions["mamba_selective_scan"])
    assert enable_fast_selective_scan() is True
    model = make_model()
    model(make_tokens())
    assert len(fast_calls) == 2
    hub_calls = []

    def hub_kernel(*args, **kwargs):
        hub_calls.append(args)
        return stock._torch_path(stock_functions["mamba_selective_scan"])(*args, **kwargs)

    wrapped.forward = hub_kernel  # what kernelize() does
    model(make_tokens())
    assert (len(hub_calls), len(fast_calls)) == (2, 2)
    disable_fast_selective_scan()
    assert modeling.mamba_selective_scan is wrapped


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a:UserWarning")  # about transformers' own code
def test_compilers_see_the_stock_code(fast_calls):
    enable_fast_selective_scan()
    model = make_model(num_hidden_layers=1).eval()
    tokens = make_tokens(6)
    expected = model(tokens, use_cache=False).logits
    fast_calls.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        actual = compiled(tokens, use_cache=False).logits
    assert not fast_calls
    assert (actual - expected).abs().max() <= SINGLE_ROUND_OFF * expected.abs().max()
