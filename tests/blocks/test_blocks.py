"""The blocks compute what their originals do: shapes, gradients, and the same output by every path."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compressm.scans import selective_scan, ssd_scan
from tests import blocks
from tests.blocks import SS2D, FlaMamba, FlaMamba2, Mamba, Mamba2, Mamba2Simple, Mamba3, OffsetVim, Vim, at_path
from tests.blocks import mamba_ssm as mamba_ssm_blocks
from tests.blocks.mamba3 import angle_sums, by_head, mamba3_mimo_combined, mamba3_siso_combined, turned
from tests.blocks.vision import four_ways, turned_back


CLOSE = 1e-5
"""Relative; one float32 computation in two orders."""
EXACT = 1e-10
"""Relative; the same in float64."""
WIDTH = 6
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "vim": lambda: Vim(WIDTH, 5, dt_rank=2),
    "vim halved": lambda: Vim(WIDTH, 5, dt_rank=2, if_devide_out=True),
    "vim in two calls": lambda: Vim(WIDTH, 5, dt_rank=2, use_fast_path=False),
    "vim with offset": lambda: OffsetVim(WIDTH, 5, dt_rank=2),
    "ss2d": lambda: SS2D(WIDTH, 5, dt_rank=2),
    "ss2d that keeps its scan": lambda: SS2D(WIDTH, 5, dt_rank=2, keeps_scan=True),
    "mamba": lambda: Mamba(WIDTH, 5, bias=True),
    "mamba2": lambda: Mamba2(WIDTH, 5, headdim=3, ngroups=2),
    "mamba2 beside an mlp": lambda: Mamba2(WIDTH, 5, headdim=3, d_ssm=6, D_has_hdim=True, rmsnorm=False),
    "mamba2 with limits": lambda: Mamba2(WIDTH, 5, headdim=3, norm_before_gate=True, dt_limit=(0.01, 0.05)),
    "mamba2simple": lambda: Mamba2Simple(WIDTH, 5, headdim=3, learnable_init_states=True),
    "mamba3": lambda: Mamba3(WIDTH, 8, headdim=3, ngroups=2),
    "mamba3 with norm": lambda: Mamba3(WIDTH, 8, headdim=3, rope_fraction=1.0, is_outproj_norm=True),
    "mamba3 mimo": lambda: Mamba3(WIDTH, 8, headdim=3, is_mimo=True, mimo_rank=2),
    "mamba3 mimo with norm": lambda: Mamba3(WIDTH, 8, headdim=3, is_mimo=True, mimo_rank=2, is_outproj_norm=True),
    "fla mamba": lambda: FlaMamba(WIDTH, 5),
    "fla mamba2": lambda: FlaMamba2(head_dim=3, hidden_size=WIDTH, state_size=5),
}


def inputs(block: nn.Module) -> Tensor:
    return torch.randn(2, 3, 5, WIDTH) if isinstance(block, SS2D) else torch.randn(2, 9, WIDTH)


def run(block: nn.Module, x: Tensor) -> Tensor:
    out = block(x)
    return out[0] if isinstance(out, tuple) else out


def perturbed(block: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def assert_same(one: Tensor, other: Tensor, tolerance: float = CLOSE) -> None:
    one, other = one.detach(), other.detach()
    assert (one - other).norm() <= tolerance * other.norm()
    assert other.norm() > 0


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_keeps_the_shape_and_learns_with_every_parameter(name: str) -> None:
    block = perturbed(BLOCKS[name]())
    x = inputs(block)
    target, optimizer = torch.randn_like(x), torch.optim.AdamW(block.parameters(), lr=0.02)
    losses = []
    for step in range(15):
        out = run(block, x)
        assert out.shape == x.shape
        loss = (out - target).square().mean()
        loss.backward()
        if step == 0:
            assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in block.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_blocks_of_a_package_have_its_paths() -> None:
    for block, path in {
        Mamba: "mamba_ssm.modules.mamba_simple.Mamba",
        Mamba2: "mamba_ssm.modules.mamba2.Mamba2",
        Mamba2Simple: "mamba_ssm.modules.mamba2_simple.Mamba2Simple",
        Mamba3: "mamba_ssm.modules.mamba3.Mamba3",
        FlaMamba: "fla.layers.mamba.Mamba",
        FlaMamba2: "fla.layers.mamba2.Mamba2",
        at_path(Vim, "mamba_ssm.modules.mamba_simple.Mamba"): "mamba_ssm.modules.mamba_simple.Mamba",
    }.items():
        assert f"{block.__module__}.{block.__qualname__}" == path
    assert copy.deepcopy(at_path(SS2D, "models.vmamba.SS2D")(WIDTH))(torch.randn(1, 2, 2, WIDTH)).shape[-1] == WIDTH


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("vim", "use_fast_path"),
        ("vim halved", "use_fast_path"),
        ("mamba", "use_fast_path"),
        ("mamba2", "use_mem_eff_path"),
        ("mamba2 beside an mlp", "use_mem_eff_path"),
        ("mamba2 with limits", "use_mem_eff_path"),
        ("mamba2simple", "use_mem_eff_path"),
    ],
)
def test_both_paths_give_the_same(name: str, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = perturbed(BLOCKS[name]())
    x = inputs(block)
    fused = run(block, x)
    setattr(block, switch, False)
    assert_same(run(block, x), fused)
    monkeypatch.setattr(mamba_ssm_blocks, "causal_conv1d_fn", None)
    assert_same(run(block, x), fused)


@pytest.mark.parametrize("name", ["fla mamba", "fla mamba2"])
def test_a_layer_of_fla_gives_the_same_in_training(name: str) -> None:
    block = perturbed(BLOCKS[name]())
    x = inputs(block)
    training = run(block.train(), x)
    assert_same(run(block.eval(), x), training)


@pytest.mark.parametrize("name", ["vim", "vim with offset"])
def test_vim_without_its_second_direction_is_a_mamba(name: str) -> None:
    block = perturbed(BLOCKS[name]())
    for parameter in (block.dt_proj_b.weight, block.D_b, block.x_proj_b.weight):
        nn.init.zeros_(parameter)
    if block.x_proj_b.bias is not None:
        nn.init.zeros_(block.x_proj_b.bias)
    x = inputs(block)
    z = (block.in_proj.weight @ x.mT).chunk(2, dim=1)[1]
    one_way = block.direction(block.in_proj.weight @ x.mT, "", "A_log")
    assert one_way.shape == z.shape
    assert_same(run(block, x), F.linear(one_way.mT, block.out_proj.weight))


def test_vim_backwards_with_directions_exchanged_is_the_same() -> None:
    block = perturbed(BLOCKS["vim in two calls"]())
    x = inputs(block)
    expected = run(block, x)
    other = copy.deepcopy(block)
    for name, ending in {"conv1d": "_b", "x_proj": "_b", "dt_proj": "_b", "D": "_b"}.items():
        setattr(other, name, getattr(block, name + ending))
        setattr(other, name + ending, getattr(block, name))
    other.A_log, other.A_b_log = block.A_b_log, block.A_log
    assert_same(run(other, x.flip(1)).flip(1), expected)


def test_four_groups_in_one_scan_are_four_scans() -> None:
    block = perturbed(BLOCKS["ss2d"]()).double()
    K, D, N, length = 4, block.d_inner, block.d_state, 7
    u, delta = torch.randn(2, K * D, length).double(), torch.randn(2, K * D, length).double()
    B, C = torch.randn(2, K, N, length).double(), torch.randn(2, K, N, length).double()
    A, bias = -block.A_logs.exp(), block.dt_projs_bias.flatten()
    one = selective_scan(u, delta, A, B, C, block.Ds, delta_bias=bias, delta_softplus=True)
    four = [
        selective_scan(
            u.unflatten(1, (K, D))[:, k],
            delta.unflatten(1, (K, D))[:, k],
            A.unflatten(0, (K, D))[k],
            B[:, k],
            C[:, k],
            block.Ds.unflatten(0, (K, D))[k],
            delta_bias=block.dt_projs_bias[k],
            delta_softplus=True,
        )
        for k in range(K)
    ]
    assert_same(one, torch.cat(four, dim=1), EXACT)


def test_four_ways_of_a_picture_come_back_to_their_places() -> None:
    picture = torch.randn(2, 3, 4, 5)
    ways = four_ways(picture)
    assert torch.equal(ways[0, 0, 0], picture[0, 0].flatten())
    assert torch.equal(ways[0, 3, 0], picture[0, 0].mT.flatten().flip(0))
    assert torch.allclose(turned_back(ways, 4, 5), 4 * picture.permute(0, 2, 3, 1))


def test_mamba3_without_trapezoid_and_angles_is_the_recurrence_of_mamba2() -> None:
    """With all weight on the present input, `ssd_scan` runs on B and C as they are after their bias."""
    batch, length, groups, heads, N, P = 2, 7, 2, 4, 6, 3
    Q, K = (torch.randn(batch, length, groups, N).double() for _ in "QK")
    V, Z = (torch.randn(batch, length, heads, P).double() for _ in "VZ")
    DT, A = torch.rand(batch, heads, length).double(), -torch.rand(heads).double()
    Q_bias, K_bias = (torch.randn(heads, N).double() for _ in "QK")
    angles = torch.zeros(batch, length, heads, N // 4).double()
    trap = torch.full((batch, heads, length), 100.0).double()
    D = torch.randn(heads).double()
    found = mamba3_siso_combined(Q, K, V, A[:, None] * DT, DT, trap, Q_bias, K_bias, angles, D, Z)
    expected = ssd_scan(V, DT.mT, A, by_head(K, heads) + K_bias, by_head(Q, heads) + Q_bias, D=D, z=Z)
    assert_same(found, expected, EXACT)


@pytest.mark.parametrize("neighbours", [True, False])
def test_mamba3_turns_its_first_pairs_as_complex_numbers(neighbours: bool) -> None:
    vectors, theta = torch.randn(3, 8).double(), torch.randn(3, 2).double()
    out = turned(vectors, theta, neighbours)
    places = [(0, 1), (2, 3)] if neighbours else [(0, 4), (1, 5)]
    for number, (real, imaginary) in enumerate(places):
        before = torch.complex(vectors[:, real], vectors[:, imaginary])
        after = torch.complex(out[:, real], out[:, imaginary])
        assert torch.allclose(after, before * torch.exp(1j * theta[:, number]))
    rest = sorted(set(range(8)) - {place for pair in places for place in pair})
    assert torch.equal(out[:, rest], vectors[:, rest])


def test_mamba3_of_one_rank_is_siso_with_its_states_in_another_order() -> None:
    """MIMO pairs halves, SISO neighbours; which is which is a permutation of the states of B and C."""
    batch, length, heads, N, P = 2, 6, 2, 8, 3
    Q, K = (torch.randn(batch, length, 1, N).double() for _ in "QK")
    V, Z = (torch.randn(batch, length, heads, P).double() for _ in "VZ")
    DT, ADT = torch.rand(batch, heads, length).double(), -torch.rand(batch, heads, length).double()
    trap, D = torch.randn(batch, heads, length).double(), torch.randn(heads).double()
    biases = [torch.randn(heads, N).double() for _ in "QK"]
    angles = torch.randn(batch, length, heads, N // 4).double()
    siso = mamba3_siso_combined(Q, K, V, ADT, DT, trap, *biases, angles, D, Z)
    halves = torch.arange(N).unflatten(0, (-1, 2)).mT.flatten()
    ones = torch.ones(heads, 1, P).double()
    mimo = mamba3_mimo_combined(
        Q[..., None, :, halves],
        K[..., None, :, halves],
        V,
        ADT,
        DT,
        trap,
        *(bias[:, None, halves] for bias in biases),
        ones,
        ones,
        ones,
        angles,
        D,
        Z,
        chunk_size=4,
        rotary_dim_divisor=4,
        dtype=torch.float64,
    )
    assert_same(mimo, siso, EXACT)


def test_the_states_of_mamba3_turn_by_the_change_of_the_angle() -> None:
    """Only differences of theta matter: an angle that all steps have at once changes nothing."""
    angles, DT = torch.randn(2, 5, 3, 2).double(), torch.rand(2, 3, 5).double()
    theta = angle_sums(angles, DT)
    assert torch.allclose(theta[:, 1:] - theta[:, :-1], (torch.pi * angles.tanh() * DT.mT[..., None])[:, 1:])
    q, k = torch.randn(3, 8).double(), torch.randn(3, 8).double()
    one, other = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    plain = (turned(q, one, True) * turned(k, other, True)).sum(-1)
    assert torch.allclose((turned(q, one - other, True) * k).sum(-1), plain)


def fla_layer(name: str) -> tuple[nn.Module, nn.Module]:
    """A layer of the installed package on a CPU, whose activation is otherwise a kernel; and its stand-in."""
    layers = pytest.importorskip("fla.layers")
    if name == "Mamba":
        layer = layers.Mamba(hidden_size=WIDTH, state_size=5, intermediate_size=24, backend="triton")
        stand_in: nn.Module = FlaMamba(WIDTH, 5)
    else:
        sizes = {"head_dim": 3, "hidden_size": WIDTH, "state_size": 5, "chunk_size": 4, "rmsnorm": False}
        layer, stand_in = layers.Mamba2(backend="triton", **sizes), FlaMamba2(**sizes)
    layer.act = nn.SiLU()
    stand_in.load_state_dict(layer.state_dict())
    return layer, stand_in


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_the_stand_ins_compute_what_fla_does(name: str) -> None:
    layer, stand_in = fla_layer(name)
    x = torch.randn(2, 9, WIDTH)
    assert_same(run(stand_in.eval(), x), run(layer.eval(), x))
    assert type(layer).__module__ == type(stand_in).__module__
    missing = {key for key, value in vars(layer).items() if type(value) is int} - vars(stand_in).keys()
    assert missing <= {"layer_idx"}


def test_all_blocks_are_here() -> None:
    made = {type(build()).__name__ for build in BLOCKS.values()}
    assert made == set(blocks.__all__) - {"RMSNormGated", "at_path"}
