import pytest
import torch
from torch.testing import assert_close

from hf_compressm.models import LRUConfig, LRULayer, S5Config, S5Layer
from hf_compressm.models.modeling_s5 import discretize_in_pairs, expm1_ratio
from hf_compressm.scans import diagonal_scan_reference, exported, selective_scan_reference


TOLERANCE = 1e-11  # float64, sums in another order
LENGTHS = [1, 2, 31, 32, 33, 700]  # below, at and above a chunk, and many chunks

lengths = pytest.mark.parametrize("length", LENGTHS)


def complex_system(N: int, H: int, P: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A slow, a fast, a dead and a lossless mode among others."""
    eigenvalues = torch.polar(torch.linspace(0.0, 1.0, N, dtype=torch.float64), torch.randn(N, dtype=torch.float64))
    return (eigenvalues, *(torch.randn(shape, dtype=torch.complex128) for shape in ((N, H), (P, N))))


@lengths
@pytest.mark.parametrize(("H", "P"), [(3, 2), (1, 1), (40, 60), (100, 100)])  # a chunk of 32, 32, 8 and 4 steps
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_in_pairs_is_the_recurrence(length, H, P, reverse):
    system = complex_system(5, H, P)
    u = torch.randn(2, length, H, dtype=torch.float64)
    expected = diagonal_scan_reference(u, *system, reverse=reverse)
    found = exported.diagonal_scan_in_pairs(u, *map(torch.view_as_real, system), reverse=reverse)
    assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))


@lengths
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "with D, z, bias and softplus"])
def test_selective_scan_is_the_recurrence(length, extras):
    u, delta, z = (torch.randn(2, 4, length, dtype=torch.float64) for _ in range(3))
    A, (B, C) = -torch.rand(4, 3, dtype=torch.float64), torch.randn(2, 2, 3, length, dtype=torch.float64)
    D, bias = torch.randn(2, 4, dtype=torch.float64)
    options = {"D": D, "z": z, "delta_bias": bias, "delta_softplus": True} if extras else {}
    delta = delta if extras else delta.abs()
    arguments = (u, delta, A, B, C)
    expected = selective_scan_reference(*arguments, **options, return_last_state=True)
    found = exported.selective_scan_for_export(*arguments, **options, return_last_state=True)
    assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    alone = exported.selective_scan_for_export(*arguments, **options)
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize(
    "layer",
    [
        S5Layer(S5Config(hidden_size=3, state_size=6)),
        S5Layer(S5Config(hidden_size=3, state_size=6, discretization="bilinear", bidirectional=True)),
        S5Layer(S5Config(hidden_size=3, state_size=5, conj_sym=False, clip_eigs=True)),
        LRULayer(LRUConfig(hidden_size=3, state_size=5)),
    ],
    ids=["s5", "s5-bilinear-bidirectional", "s5-complex-clipped", "lru"],
)
def test_a_layer_has_the_same_system_in_pairs(layer):
    if isinstance(layer, S5Layer):
        layer.Lambda_re.data[0] = 0.5  # what clip_eigs is about
    for complex_part, pairs in zip(layer.system(torch.float64), layer.system_in_pairs(torch.float64), strict=True):
        assert_close(pairs, torch.view_as_real(complex_part), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discretisation_loses_nothing_at_small_steps(dtype):
    magnitudes = torch.tensor([0.0, 1e-30, 1e-18, 1e-12, 1e-7, 1e-3, 0.1, 3.0], dtype=torch.float64)
    z = torch.polar(-magnitudes, torch.tensor(0.7, dtype=torch.float64))
    one = torch.tensor([[1.0, 0.0]], dtype=dtype).expand(len(z), 1, 2)
    _, scale = discretize_in_pairs(torch.view_as_real(z).to(dtype), one, torch.ones(len(z), dtype=dtype), "zoh")
    expected = torch.view_as_real(expm1_ratio(z)).to(dtype)
    few_roundings = 8 * torch.finfo(dtype).eps
    assert_close(scale[:, 0], expected, rtol=few_roundings, atol=few_roundings)
