"""Stock models with the fast scans in place: same numbers, and out of the way of everything that works."""

import importlib.util
import sys
import types

import pytest
import torch
import transformers.models.kimi_linear.modeling_kimi_linear as modeling_kimi
import transformers.models.mamba.modeling_mamba as modeling
import transformers.models.mamba2.modeling_mamba2 as modeling2
import transformers.models.qwen3_next.modeling_qwen3_next as modeling_qwen
from transformers import AutoConfig, AutoModelForCausalLM

import hf_compressm.scans.dispatchers as dispatchers
import hf_compressm.scans.kernels as kernels
import hf_compressm.scans.stock as stock
from hf_compressm.scans import disable_fast_selective_scan, enable_fast_selective_scan
from tests.caches import as_cache, cache_of
from tests.stock_configs import CAUSAL_DELTA, DELTA, HAVE_FILES, OWN, stock_settings


SINGLE_ROUND_OFF = 1e-5  # float32, relative to the largest entry
HALF_ROUND_OFF = 2e-2  # bfloat16 has 8 bits, and the stock code rounds step sizes to it

SCANS = {  # calls of the scan per forward pass: one per recurrent layer, and in Zamba one per head of it
    "mamba": 2,
    "falcon_mamba": 2,
    "jamba": 2,
    "zamba": 4,
    "mamba2": 2,
    "bamba": 2,
    "zamba2": 2,
    "falcon_h1": 2,
    "granitemoehybrid": 2,
    "nemotron_h": 2,
    **dict.fromkeys(CAUSAL_DELTA, 2),
}
BOUND = {  # our kernel: the modeling file and the name by which it calls it
    kernels.SELECTIVE_SCAN: (modeling, "mamba_selective_scan"),
    kernels.INNER: (modeling, "mamba_inner_fn"),
    kernels.CHANNEL_UPDATE: (modeling, "mamba_selective_state_update"),
    kernels.CHUNK_SCAN: (modeling2, "mamba2_chunk_scan"),
    kernels.SPLIT_SCAN: (modeling2, "mamba2_split_conv1d_scan_combined"),
    kernels.HEAD_UPDATE: (modeling2, "mamba2_selective_state_update"),
    kernels.GATED_DELTA_RULE: (modeling_qwen, "torch_chunk_gated_delta_rule"),
    kernels.GATED_DELTA_UPDATE: (modeling_qwen, "torch_recurrent_gated_delta_rule"),
    kernels.KIMI_DELTA_ATTENTION: (modeling_kimi, "chunk_kimi_delta_attention"),
    kernels.KIMI_DELTA_UPDATE: (modeling_kimi, "recurrent_kimi_delta_attention"),
}
FUNCTIONS = [name for module, name in BOUND.values() if module is modeling]


def modeling_file(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def functions_of_all_files():
    return {
        (family, job.name): getattr(modeling_file(family), job.name)
        for family in HAVE_FILES
        for job in stock._FAMILIES[family]
    }


@pytest.fixture(autouse=True)
def stock_functions():
    """Every test starts and ends with the functions of transformers."""
    disable_fast_selective_scan()
    yield {name: getattr(modeling, name) for name in FUNCTIONS}
    disable_fast_selective_scan()


@pytest.fixture
def fast_calls(monkeypatch):
    """Count the calls of the fast scans."""
    calls = []

    def count(original):
        def counted(*args):
            calls.append(args)
            return original(*args)

        return counted

    for name in ("selective_scan", "ssd_scan", "delta_scan"):
        monkeypatch.setattr(dispatchers, name, count(getattr(dispatchers, name)))
    return calls


def make_model(family="mamba", **options):
    torch.manual_seed(0)
    model_type = DELTA.get(family) or family
    config = AutoConfig.for_model(model_type, **{**stock_settings(family, 5), **options})
    return AutoModelForCausalLM.from_config(config).train()


def make_tokens(length=37):
    return torch.randint(2, 40, (2, length), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model):
    model.zero_grad()
    output = model(make_tokens(), labels=make_tokens())
    output.loss.backward()
    return [output.logits, *(parameter.grad.clone() for parameter in model.parameters())]


def states_in(cache):
    """The tensors that the layers of a cache hold."""
    found = []
    for layer in cache.layers:
        for value in vars(layer).values():
            entries = value.values() if isinstance(value, dict) else [value]
            found += [entry for entry in entries if isinstance(entry, torch.Tensor) and entry.is_floating_point()]
    return found


def assert_all_close(actual, expected, tolerance=SINGLE_ROUND_OFF):
    for left, right in zip(actual, expected, strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert (left - right).abs().max() <= tolerance * max(1.0, right.abs().max().item())


def fake_packages(monkeypatch, works_on=()):
    """Install a mamba_ssm and a fla whose functions raise, but on the given device types; return a list of calls."""
    calls = []

    def fake(kernel, torch_function):
        def function(*args, **kwargs):
            if args[0].device.type not in works_on:
                raise RuntimeError(f"{kernel.function} is not installed")
            calls.append(kernel.function)
            return torch_function(*args, **kwargs)

        return function

    leaves = sorted({f"{kernel.package}.{kernel.module}" for kernel in BOUND})
    modules = {}
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "fla", "fla.ops", *leaves):
        module = modules[name] = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
        monkeypatch.setitem(sys.modules, name, module)
    for kernel, (module, name) in BOUND.items():
        function = fake(kernel, kernels.torch_path(getattr(module, name)))
        if kernel is kernels.HEAD_UPDATE:  # one function of mamba-ssm serves Mamba and Mamba-2
            function = _update_of_either_kind(
                modules[f"{kernel.package}.{kernel.module}"].selective_state_update, function
            )
        setattr(modules[f"{kernel.package}.{kernel.module}"], kernel.function, function)
    return calls, modules


def _update_of_either_kind(by_channel, by_head):
    return lambda state, *args, **kwargs: (by_head if state.dim() == 4 else by_channel)(state, *args, **kwargs)


def bind_fakes(monkeypatch, modules):
    """What transformers does when it is imported beside such a package: bind its functions."""
    for kernel, (module, name) in BOUND.items():
        function = getattr(modules[f"{kernel.package}.{kernel.module}"], kernel.function)

        def bound(*args, function=function, **kwargs):
            kwargs.pop("use_mambapy", None)
            kwargs.pop("use_associative_scan", None)
            return function(*args, **kwargs)

        bound.__wrapped__ = kernels.torch_path(getattr(module, name))
        monkeypatch.setattr(module, name, bound)


def test_every_family_has_a_case():
    scans = [*(family for family in OWN if family not in DELTA and family != "xlstm"), *DELTA]  # xLSTM's is no scan
    assert scans == list(stock._FAMILIES)


@pytest.mark.parametrize("family", SCANS)
def test_same_logits_and_gradients(family, fast_calls):
    model = make_model(family)
    expected = logits_and_gradients(model)
    assert enable_fast_selective_scan() is True
    actual = logits_and_gradients(model)
    assert len(fast_calls) == SCANS[family]
    assert_all_close(actual, expected)


@pytest.mark.parametrize("family", SCANS)
def test_same_generation(family, fast_calls):
    model = make_model(family).eval()
    tokens, options = make_tokens(9), {"max_new_tokens": 12, "do_sample": False}
    options["attention_mask"] = torch.ones_like(tokens)
    options["attention_mask"][0, :3] = 0
    expected = model.generate(tokens, **options)
    enable_fast_selective_scan()
    assert torch.equal(model.generate(tokens, **options), expected)
    assert len(fast_calls) == SCANS[family]  # the prompt; single steps use the update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SCANS)
def test_same_caches(family, dtype):
    model = make_model(family).eval().to(dtype)
    tokens = make_tokens(70)
    runs = []
    for _ in range(2):
        with torch.no_grad():
            output = model(tokens[:, :65], use_cache=True)
            cache = cache_of(output)
            states = [state.clone() for state in states_in(cache)]
            rest = [
                model(tokens[:, start:stop], use_cache=True, **as_cache(model, cache))
                for start, stop in ((65, 66), (66, 70))
            ]
        runs.append([output.logits, *states, *(step.logits for step in rest), *states_in(cache)])
        enable_fast_selective_scan()
    assert len(runs[0]) > 4
    assert_all_close(runs[1], runs[0], SINGLE_ROUND_OFF if dtype == torch.float32 else HALF_ROUND_OFF)


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
        assert_all_close(actual, expected, HALF_ROUND_OFF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_same_dtypes_of_the_chunk_scan(dtype):
    A = -torch.rand(6)
    x, dt = torch.rand(2, 11, 6, 3, dtype=dtype), torch.rand(2, 11, 6, dtype=dtype)
    B, C = (torch.rand(2, 11, 2, 4, dtype=dtype) for _ in range(2))
    for D in (None, torch.rand(6), torch.rand(6, dtype=dtype)):
        for state in (None, torch.rand(2, 6, 3, 4, dtype=dtype)):
            arguments = {"D": D, "dt_softplus": True, "initial_states": state, "return_final_states": True}
            disable_fast_selective_scan()
            expected = modeling2.mamba2_chunk_scan(x, dt, A, B, C, 8, **arguments)
            enable_fast_selective_scan()
            actual = modeling2.mamba2_chunk_scan(x, dt, A, B, C, 8, **arguments)
            assert_all_close(actual, expected, HALF_ROUND_OFF)
            assert actual[0].is_contiguous()


def test_idempotent_and_reversible():
    originals = functions_of_all_files()
    assert enable_fast_selective_scan() is True
    first = functions_of_all_files()
    scans = [(family, stock._FAMILIES[family][0].name) for family in HAVE_FILES]
    assert all(first[scan] is not originals[scan] for scan in scans)
    assert enable_fast_selective_scan() is True
    assert all(
        kernels.torch_path(function) is kernels.torch_path(first[key])
        for key, function in functions_of_all_files().items()
    )
    assert disable_fast_selective_scan() is False
    assert disable_fast_selective_scan() is False
    assert functions_of_all_files() == originals


def test_no_warning_about_a_slow_path(monkeypatch):
    messages = []
    logger = importlib.import_module("transformers.integrations.hub_kernels").logger
    monkeypatch.setattr(logger, "warning_once", lambda message, *args, **kwargs: messages.append(message))
    enable_fast_selective_scan()
    make_model()(make_tokens())
    assert not [message for message in messages if "selective_scan_fn" in message or "mamba_inner_fn" in message]


def test_explicit_mambapy_is_obeyed(fast_calls, monkeypatch):
    enable_fast_selective_scan()
    monkeypatch.setattr(dispatchers, "is_mambapy_available", lambda: True)
    make_model(use_mambapy=True)(make_tokens())
    assert not fast_calls
    monkeypatch.setattr(dispatchers, "is_mambapy_available", lambda: False)
    make_model(use_mambapy=True)(make_tokens())
    assert len(fast_calls) == 2


def test_packed_sequences_of_mamba_1_are_left_to_stock(fast_calls):
    cube, options = torch.zeros(1, 4, 4), {"seq_idx": torch.zeros(1, 4, dtype=torch.int32)}
    answers = []
    for _ in range(2):  # an error in some versions of transformers, the plain code in others
        try:
            answers.append(modeling.mamba_selective_scan(cube, cube, torch.zeros(4, 4), cube, cube, **options).shape)
        except ValueError as error:
            answers.append(str(error))
        enable_fast_selective_scan()
    assert answers[0] == answers[1]
    assert not fast_calls


MAMBA_2 = [family for family, jobs in stock._FAMILIES.items() if jobs is stock._MAMBA2]
PACKED = [*MAMBA_2, *CAUSAL_DELTA]


# The head of Mamba-2 does not pass `seq_idx` on, and the attention of GraniteMoeHybrid knows no packed texts.
@pytest.mark.parametrize("family", [family for family in PACKED if family != "granitemoehybrid"])
def test_packed_texts_stay_apart(family, fast_calls):
    texts = (9, 1, 2, 25)
    model, tokens = make_model(family).base_model, make_tokens(sum(texts))[:1]
    enable_fast_selective_scan()
    parts = [model(part, use_cache=False).last_hidden_state for part in tokens.split(texts, dim=1)]
    expected = torch.cat(parts, dim=1)
    packed = {
        "seq_idx": torch.repeat_interleave(torch.arange(4, dtype=torch.int32), torch.tensor(texts))[None],
        "position_ids": torch.cat([torch.arange(length) for length in texts])[None],
    }
    fast_calls.clear()
    actual = model(tokens, use_cache=False, **packed).last_hidden_state
    assert len(fast_calls) == SCANS[family]
    assert (actual - expected).abs().max() <= SINGLE_ROUND_OFF * expected.abs().max()
    together = model(tokens, use_cache=False).last_hidden_state
    assert (together - expected).abs().max() > 100 * SINGLE_ROUND_OFF * expected.abs().max()


@pytest.mark.parametrize("family", [family for family in HAVE_FILES if family in DELTA])
def test_every_delta_rule_equals_its_torch_path(family):
    """Also of files without a tiny model."""
    generator = torch.Generator().manual_seed(0)
    chunked, step = (job.name for job in stock._FAMILIES[family][:2])
    is_per_channel = stock._FAMILIES[family] is stock._KIMI_DELTA_ATTENTION
    q, k = torch.randn(2, 2, 70, 4, 5, generator=generator)
    v, beta = torch.randn(2, 70, 4, 3, generator=generator), torch.rand(2, 70, 4, generator=generator)
    g = -torch.rand(2, 70, 4, *((5,) if is_per_channel else ()), generator=generator)
    options = {"initial_state": None, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    enable_fast_selective_scan()
    for name, tensors in ((chunked, (q, k, v, g, beta)), (step, [tensor[:, :1] for tensor in (q, k, v, g, beta)])):
        function = getattr(modeling_file(family), name)
        actual, expected = (run(*tensors, **options) for run in (function, kernels.torch_path(function)))
        assert_all_close(actual, expected)


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float32, 1), (torch.bfloat16, 0)])
@pytest.mark.parametrize("file", [modeling2, modeling_qwen, modeling_kimi])
def test_convolution_of_single_precision_is_fast(file, dtype, calls, monkeypatch):
    seen, fast = [], dispatchers.causal_convolution
    monkeypatch.setattr(dispatchers, "causal_convolution", lambda *args: seen.append(args) or fast(*args))
    x, weight = torch.randn(2, 6, 9).to(dtype), torch.randn(6, 4).to(dtype)
    expected = file.causal_conv1d_fn(x, weight=weight, bias=None, activation="silu")
    enable_fast_selective_scan()
    actual = file.causal_conv1d_fn(x, weight=weight, bias=None, activation="silu")
    assert len(seen) == calls
    assert_all_close([actual], [expected])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_packed_convolution_equals_that_of_each_text(bias, activation):
    texts = (1, 2, 7, 1)
    x, weight = torch.randn(2, 6, sum(texts)), torch.randn(6, 4)
    given = weight, torch.randn(6) if bias else None, activation
    expected = torch.cat([modeling2.causal_conv1d_fn(part, *given) for part in x.split(texts, dim=-1)], dim=-1)
    enable_fast_selective_scan()
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 0, 1]), torch.tensor(texts)).expand(2, -1)
    actual = modeling2.causal_conv1d_fn(x, *given, seq_idx=seq_idx)
    assert (actual - expected).abs().max() <= SINGLE_ROUND_OFF * expected.abs().max()
    earlier = torch.randn(2, 6, 3)  # what a cache holds
    actual = modeling2.causal_conv1d_fn(torch.cat([earlier, x], dim=-1), *given, seq_idx=seq_idx)[..., 3:]
    first = modeling2.causal_conv1d_fn(torch.cat([earlier, x[..., :1]], dim=-1), *given)[..., 3:]
    expected = torch.cat([first, expected[..., 1:]], dim=-1)
    assert (actual - expected).abs().max() <= SINGLE_ROUND_OFF * expected.abs().max()


@pytest.mark.parametrize("family", ["mamba", "mamba2", "qwen3_next", "kimi_linear"])
def test_broken_kernel_is_passed_over(family, monkeypatch, fast_calls):
    model = make_model(family)
    expected = logits_and_gradients(model)
    _, modules = fake_packages(monkeypatch)
    bind_fakes(monkeypatch, modules)
    with pytest.raises(RuntimeError, match="is not installed"):
        model(make_tokens())
    assert enable_fast_selective_scan() is True
    assert_all_close(logits_and_gradients(model), expected)
    assert len(fast_calls) == 2
    tokens = make_tokens(9)
    generated = model.eval().generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False
    )
    assert generated.shape == (2, 12)
    disable_fast_selective_scan()
    with pytest.raises(RuntimeError, match="is not installed"):
        model(make_tokens())


@pytest.mark.parametrize(
    ("family", "kernel_calls"),
    [
        ("mamba", ["mamba_inner_fn", "selective_scan_fn"]),
        ("mamba2", ["mamba_split_conv1d_scan_combined", "mamba_chunk_scan_combined"]),
        ("qwen3_next", ["chunk_gated_delta_rule"]),
        ("kimi_linear", ["chunk_kda"]),
    ],
)
def test_working_kernel_is_left_alone(family, kernel_calls, monkeypatch, fast_calls):
    calls, modules = fake_packages(monkeypatch, works_on=("cpu",))
    bind_fakes(monkeypatch, modules)
    assert enable_fast_selective_scan() is True
    assert not calls  # a kernel is tried when a layer needs it
    model = make_model(family)
    model(make_tokens())
    assert calls == [tried for name in kernel_calls for tried in (name, name)] + kernel_calls
    calls.clear()
    model(make_tokens())
    assert calls == kernel_calls * 2
    assert not fast_calls


def test_kernel_of_another_device_only(monkeypatch):
    _, modules = fake_packages(monkeypatch, works_on=("meta",))
    bind_fakes(monkeypatch, modules)
    interface, combined = (
        modules[f"{kernel.package}.{kernel.module}"] for kernel in (kernels.INNER, kernels.CHUNK_SCAN)
    )
    monkeypatch.setattr(interface, "selective_scan_fn", lambda u, *args, **kwargs: _fail_on_cpu(u))
    monkeypatch.setattr(combined, "mamba_chunk_scan_combined", lambda x, *args, **kwargs: _fail_on_cpu(x))
    enable_fast_selective_scan()
    for kernel in (kernels.SELECTIVE_SCAN, kernels.CHUNK_SCAN):
        assert kernels.tester(kernel)("meta")  # the accelerator has its kernels
    for family in ("mamba", "mamba2"):
        make_model(family)(make_tokens())  # and tensors on the CPU still run


def _fail_on_cpu(u):
    if u.device.type == "cpu":
        raise RuntimeError("Expected u.is_cuda() to be true")
    return u


def test_unknown_transformers_is_left_alone(monkeypatch, stock_functions):
    monkeypatch.setattr(stock, "_FAMILIES", {"mamba": stock._MAMBA, "no_such_model": stock._MAMBA})
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
    assert kernels.torch_path(wrapped) is kernels.torch_path(stock_functions["mamba_selective_scan"])
    assert enable_fast_selective_scan() is True
    model = make_model()
    model(make_tokens())
    assert len(fast_calls) == 2
    hub_calls = []

    def hub_kernel(*args, **kwargs):
        hub_calls.append(args)
        return kernels.torch_path(stock_functions["mamba_selective_scan"])(*args, **kwargs)

    wrapped.forward = hub_kernel  # what kernelize() does
    model(make_tokens())
    assert (len(hub_calls), len(fast_calls)) == (2, 2)
    disable_fast_selective_scan()
    assert modeling.mamba_selective_scan is wrapped
