"""Whole models under `torch.compile`: one graph, with the recurrences of this package as its nodes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_compressm.scans import disable_fast_selective_scan, enable_fast_selective_scan
from hf_compressm.scans.operators import NAMESPACE
from tests.family_table import (
    FAMILIES,
    LAYERS,
    MAMBA,
    MAMBA2,
    QWEN3_NEXT,
    S5,
    S5_CLASSIFIER,
    XLSTM,
    XLSTM_BIASED,
    Family,
    family_id,
)


ROUND_OFF = 1e-3  # float32, relative to the largest entry of a gradient; experts are chosen by small differences
QUICK = (MAMBA, MAMBA2, QWEN3_NEXT, S5)
WITHOUT = (S5_CLASSIFIER, XLSTM, XLSTM_BIASED)
"""aot_eager cannot run torch's batch norm of a transposed tensor; xLSTM runs the loop of transformers."""


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    enable_fast_selective_scan()
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    disable_fast_selective_scan()


def loss_and_gradients(model: Any, family: Family) -> list[torch.Tensor]:
    loss = model(**family.batch()).loss
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [loss, *(grad for grad in grads if grad is not None)]


def compiled(model: Any, backend: str, graphs: list[Any]) -> Any:
    def keep(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, examples)

    return torch.compile(model, backend=keep, fullgraph=True)


@pytest.mark.filterwarnings("ignore")  # dynamo and inductor look at attributes that warn
@pytest.mark.parametrize(
    ("family", "backend"),
    [
        pytest.param(family, backend, marks=() if family in QUICK and backend == "aot_eager" else pytest.mark.slow)
        for family in FAMILIES
        for backend in ("aot_eager", "inductor")
        if family not in WITHOUT and (backend == "aot_eager" or family in (MAMBA, MAMBA2, S5))
    ],
    ids=family_id,
)
def test_one_graph_trains_as_the_eager_model(family: Family, backend: str) -> None:
    model = family.build().train()
    expected, graphs = loss_and_gradients(model, family), []
    actual = loss_and_gradients(compiled(model, backend, graphs), family)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= ROUND_OFF * other.abs().max()
    (graph,) = graphs
    nodes = [node for node in graph.graph.nodes if NAMESPACE in str(node.target) and node.op == "call_function"]
    assert len(nodes) >= LAYERS
