"""Linear attention of flash-linear-attention itself where it is installed: references run instead of kernels."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.families import find_layers
from hf_compressm.families.laws import check_laws
from tests.families import ready
from tests.families.fla_package import on_a_cpu
from tests.families.test_fla import MASK, assert_read_outs_are_outputs


if importlib.util.find_spec("fla") is None:
    pytest.skip("flash-linear-attention is not installed", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial:UserWarning")
WIDTH = 12
SUMS = 1e-5
"""Relative error of float32 sums in another order."""
HEADS = {"hidden_size": WIDTH, "num_heads": 2}
SHARED = {"hidden_size": WIDTH, "num_heads": 4, "num_kv_heads": 2}
Build = Callable[[ModuleType, int], nn.Module]


def gated(**options: Any) -> Build:
    return lambda layers, N: layers.GatedDeltaNet(head_dim=N, expand_v=12 / N, **HEADS, **options)


def delta(**options: Any) -> Build:
    return lambda layers, N: layers.DeltaNet(expand_k=2 * N / WIDTH, **HEADS, **options)


def kimi(**options: Any) -> Build:
    return lambda layers, N: layers.KimiDeltaAttention(head_dim=N, expand_v=12 / N, **HEADS, **options)


def linear(**options: Any) -> Build:
    return lambda layers, N: layers.GatedLinearAttention(expand_k=4 * N / WIDTH, **SHARED, **options)


LAYERS: dict[str, Build] = {
    "gated, more value heads": gated(num_v_heads=4),
    "gated, with a bias": gated(conv_bias=True),
    "gated, plain": gated(use_short_conv=False, use_gate=False, allow_neg_eigval=True),
    "delta": delta(),
    "delta, elu and sums": delta(qk_norm="sum", qk_activation="elu", use_gate=True),
    "delta, relu without steps": delta(qk_activation="relu", use_short_conv=False, use_beta=False),
    "delta, linear": delta(qk_activation="identity", use_short_conv=False, allow_neg_eigval=True),
    "kimi, more value heads": kimi(num_v_heads=4),
    "kimi, bounded": kimi(safe_gate=True, lower_bound=-5.0),
    "kimi, bounded without the safe kernel": kimi(lower_bound=-3.0, use_short_conv=False),
    "gla": linear(clamp_min=-0.1),
    "gla, convolved": linear(use_short_conv=True, conv_bias=True),
    "gla, mapped": linear(feature_map="relu", use_output_gate=False, elementwise_affine=False),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_mode = pytest.mark.parametrize("trains", [False, True], ids=["eval", "train"])


@pytest.fixture
def layers() -> Iterator[ModuleType]:
    with on_a_cpu() as package:
        yield package


def moved(layer: nn.Module) -> nn.Module:
    """The layer with parameters that are not as they are initialised."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


@every_layer
@every_mode
@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_what_the_states_read_out_is_the_output(name: str, trains: bool, kind: str, layers: ModuleType) -> None:
    layer = moved(LAYERS[name](layers, 8)).train(trains)
    given: dict[str, Any] = {"attention_mask": MASK} if kind == "padded" else {}
    if kind == "packed":
        given = {"cu_seqlens": torch.tensor([0, 3, 7])}
    assert_read_outs_are_outputs(layer, torch.randn(1 if kind == "packed" else 3, 7, WIDTH), **given)


@every_layer
@every_mode
def test_a_layer_keeps_the_laws_and_becomes_one_that_was_built_smaller(
    name: str, trains: bool, layers: ModuleType
) -> None:
    model = ready.Stack([moved(LAYERS[name](layers, 8))]).train(trains)
    data = {"hidden": torch.randn(3, 17, WIDTH)}
    layer = model.layers[0]
    check_laws(find_layers(model)[0].family, layer, (data["hidden"],), {})  # type: ignore[arg-type]
    compress(model, CompreSSMConfig(target_state_size=5, refit_steps=0), [data])
    built = LAYERS[name](layers, 5).train(trains)
    built.load_state_dict(layer.state_dict())
    assert sizes(built) == sizes(layer)
    assert torch.equal(built(data["hidden"])[0], layer(data["hidden"])[0])


def sizes(layer: nn.Module) -> dict[str, float]:
    """All numbers that a layer and its parts hold."""
    return {
        f"{part}.{name}": value
        for part, module in layer.named_modules()
        for name, value in vars(module).items()
        if type(value) in (int, float)
    }


STAND_INS: dict[str, Callable[[ModuleType], nn.Module]] = {
    "gated deltanet of fla": lambda fla: fla.GatedDeltaNet(
        hidden_size=6, head_dim=6, expand_v=2.0, num_heads=2, num_v_heads=4, conv_bias=True
    ),
    "gated deltanet of fla, plain": lambda fla: fla.GatedDeltaNet(
        hidden_size=6, head_dim=6, expand_v=2.0, num_heads=2, use_short_conv=False, allow_neg_eigval=True
    ),
    "deltanet of fla": lambda fla: fla.DeltaNet(hidden_size=6, expand_k=2.0, num_heads=2, conv_bias=True),
    "deltanet of fla, plain": lambda fla: fla.DeltaNet(
        hidden_size=6, expand_k=2.0, num_heads=2, use_short_conv=False, qk_norm="sum"
    ),
    "gla of fla": lambda fla: fla.GatedLinearAttention(hidden_size=6, expand_k=2.0, expand_v=2.0, num_heads=2),
    "gla of fla, keys shared": lambda fla: fla.GatedLinearAttention(
        hidden_size=6, expand_k=4.0, expand_v=2.0, num_heads=4, num_kv_heads=2
    ),
    "gla of fla, convolved": lambda fla: fla.GatedLinearAttention(
        hidden_size=6, expand_k=4.0, expand_v=2.0, num_heads=4, num_kv_heads=2, use_short_conv=True, conv_bias=True
    ),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_the_stand_ins_compute_what_the_package_does(name: str, layers: ModuleType) -> None:
    layer, stand_in = moved(STAND_INS[name](layers)), ready.READY[name].build(6)
    stand_in.load_state_dict(layer.state_dict())
    x = torch.randn(3, 7, 6)
    torch.testing.assert_close(stand_in(x)[0], layer(x)[0], rtol=SUMS, atol=SUMS)
    plain = sizes(layer)
    held = {key: value for key, value in sizes(stand_in).items() if key in plain and "norm" not in key}
    assert held == {key: plain[key] for key in held}


def language_model(kind: str) -> Any:
    """A small one of the package's, without its other kernels."""
    models = pytest.importorskip("fla.models")
    sizes: dict[str, Any] = {"head_dim": 8, "expand_v": 1.5} if kind in ("GatedDeltaNet", "KDA") else {}
    config = getattr(models, f"{kind}Config")(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_heads=2,
        intermediate_size=16,
        fuse_norm=False,
        fuse_swiglu=False,
        fuse_cross_entropy=False,
        **(sizes or {"expand_k": 2 * 8 / WIDTH}),
    )
    return on_torch(getattr(models, f"{kind}ForCausalLM")(config))


def on_torch(model: Any) -> Any:
    """The model with activations of torch."""
    for layer in model.model.layers:
        if hasattr(layer.attn, "gate_fn"):
            layer.attn.gate_fn = F.silu
    return model.eval()


@pytest.mark.parametrize("kind", ["GatedDeltaNet", "DeltaNet", "KDA", "GLA"])
def test_a_language_model_of_the_package_is_saved_with_its_new_sizes(
    kind: str, tmp_path: Path, layers: ModuleType
) -> None:
    model = language_model(kind)
    batch = {"input_ids": torch.randint(3, 40, (3, 7)), "attention_mask": MASK}
    result = compress(model, CompreSSMConfig(target_state_size=5, refit_steps=0), [batch])
    assert set(result.state_sizes_after.values()) == {5}
    model.save_pretrained(tmp_path)
    loaded = on_torch(type(model).from_pretrained(tmp_path))
    logits: Tensor = model(**batch).logits
    assert torch.equal(loaded(**batch).logits, logits)
    assert {layer.state_size for layer in find_layers(loaded)} == {5}
