from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim

from hf_compressm.scans import disable_fast_selective_scan, enable_fast_selective_scan
from tests.exporting.cases import SIZES, compressed, inputs_of, logits_of
from tests.family_table import LRU, MAMBA, MAMBA2, S5, S5_BIDIRECTIONAL, S5_CLASSIFIER, Family, family_id


pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TOLERANCE = 2e-5  # float32: other kernels, sums in another order, relative to the largest logit
EXAMPLE = (2, 20)
STANDARD = {"", "ai.onnx"}


@pytest.fixture(autouse=True)
def fast_scan():
    enable_fast_selective_scan()
    yield
    disable_fast_selective_scan()


def to_onnx(model: Any, inputs: dict[str, torch.Tensor], path: Path) -> Path:
    kwargs = dict(inputs) if model.config.model_type in ("s5", "lru") else {**inputs, "use_cache": False}
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if name in inputs else None for name in kwargs}
    torch.onnx.export(
        model, (), path, kwargs=kwargs, dynamic_shapes=shapes, output_names=["logits"], dynamo=True, verbose=False
    )
    return path


def run(session: Any, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    return session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "masked", "layers"),
    [
        pytest.param(MAMBA, True, 1, marks=pytest.mark.slow),
        (S5_CLASSIFIER, True, 1),
        pytest.param(S5, False, 1, marks=pytest.mark.slow),
        pytest.param(S5, True, 2, marks=pytest.mark.slow),
        pytest.param(S5_BIDIRECTIONAL, False, 2, marks=pytest.mark.slow),
        pytest.param(LRU, True, 2, marks=pytest.mark.slow),
        pytest.param(MAMBA, False, 2, marks=pytest.mark.slow),
        pytest.param(MAMBA2, True, 2, marks=pytest.mark.slow),
    ],
    ids=lambda value: family_id(value) or str(value),
)
def test_the_runtime_computes_what_the_model_does_at_every_size(
    family: Family, masked: bool, layers: int, tmp_path: Path
) -> None:
    model = compressed(family, num_hidden_layers=layers)
    path = to_onnx(model, inputs_of(family, *EXAMPLE, masked=masked), tmp_path / "model.onnx")
    assert {node.domain for node in onnx.load(path).graph.node} <= STANDARD
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        inputs = inputs_of(family, *size, masked=masked)
        expected = logits_of(model, inputs).numpy()
        atol = TOLERANCE * abs(expected).max()
        np.testing.assert_allclose(run(session, inputs), expected, rtol=TOLERANCE, atol=atol)
