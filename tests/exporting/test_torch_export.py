import io
from typing import Any

import pytest
import torch
from torch.export import Dim, export
from torch.testing import assert_close

from hf_compressm.scans import disable_fast_selective_scan, enable_fast_selective_scan
from tests.exporting.cases import SIZES, compressed, inputs_of, logits_of
from tests.family_table import (
    FALCON_MAMBA,
    JAMBA,
    LRU,
    MAMBA,
    MAMBA2,
    S5,
    S5_BIDIRECTIONAL,
    S5_CLASSIFIER,
    ZAMBA,
    Family,
    family_id,
)


TOLERANCE = 1e-5  # float32: sums in another order, relative to the largest logit
EXAMPLE = (2, 20)
CASES = [MAMBA, S5, S5_CLASSIFIER]
MORE = [LRU, S5_BIDIRECTIONAL, MAMBA2, FALCON_MAMBA]


@pytest.fixture(autouse=True)
def fast_scan():
    enable_fast_selective_scan()
    yield
    disable_fast_selective_scan()


def exported(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.export.ExportedProgram:
    """The model as a program with open batch and length; a stock model returns a cache unless it is told not to."""
    kwargs = dict(inputs) if model.config.model_type in ("s5", "lru") else {**inputs, "use_cache": False}
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if name in inputs else None for name in kwargs}
    return export(model, (), kwargs, dynamic_shapes=shapes, **options)


def assert_same_everywhere(model: Any, program: torch.export.ExportedProgram, family: Family, masked: bool) -> None:
    run = program.module()
    extra = {} if model.config.model_type in ("s5", "lru") else {"use_cache": False}
    for size in SIZES:
        inputs = inputs_of(family, *size, masked=masked)
        expected = logits_of(model, inputs)
        with torch.no_grad():
            found = run(**inputs, **extra).logits
        assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))


def assert_real(program: torch.export.ExportedProgram) -> None:
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert sum(isinstance(value, torch.Tensor) for value in values) > 10
    assert not any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)


@pytest.mark.parametrize(
    ("family", "masked"),
    [
        (MAMBA, True),
        *(pytest.param(family, True, marks=pytest.mark.slow) for family in CASES if family is not MAMBA),
        *(pytest.param(family, False, marks=pytest.mark.slow) for family in CASES),
        *(pytest.param(family, masked, marks=pytest.mark.slow) for family in MORE for masked in (False, True)),
    ],
    ids=lambda value: ("masked" if value else "whole") if isinstance(value, bool) else family_id(value),
)
def test_a_program_computes_what_the_model_does_at_every_size(family, masked):
    model = compressed(family)
    program = exported(model, inputs_of(family, *EXAMPLE, masked=masked))
    assert_same_everywhere(model, program, family, masked)
    if family.is_linear:
        assert_real(program)


def test_no_cache_is_exported_unless_it_is_asked_for():
    model = compressed(S5, num_hidden_layers=1)
    inputs = inputs_of(S5, 2, 9)
    assert model(**inputs).cache is not None
    with torch.no_grad():
        assert export(model, (), inputs).module()(**inputs).cache is None


def test_without_the_fast_scan_a_stock_mamba_keeps_the_length_of_its_example():
    model, inputs = compressed(MAMBA, num_hidden_layers=1), inputs_of(MAMBA, 2, 6)
    disable_fast_selective_scan()
    with pytest.raises(Exception, match="specialized"):
        exported(model, inputs)


@pytest.mark.slow
def test_the_size_of_a_program_does_not_depend_on_the_length_of_the_example():
    model = compressed(MAMBA)
    counts = {len(exported(model, inputs_of(MAMBA, 2, length)).graph.nodes) for length in (20, 200)}
    assert len(counts) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.9's own loading
def test_a_program_survives_the_disk():
    model, file = compressed(S5_CLASSIFIER), io.BytesIO()
    torch.export.save(exported(model, inputs_of(S5_CLASSIFIER, *EXAMPLE)), file)
    file.seek(0)
    assert_same_everywhere(model, torch.export.load(file), S5_CLASSIFIER, masked=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", [MAMBA, S5_CLASSIFIER], ids=family_id)
def test_strict_export_agrees(family):
    model = compressed(family)
    program = exported(model, inputs_of(family, *EXAMPLE), strict=True)
    assert_same_everywhere(model, program, family, masked=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", [JAMBA, ZAMBA], ids=family_id)
def test_hybrids_are_exported_for_the_size_of_their_example(family):
    """Their attention and experts look at sizes."""
    model, inputs = compressed(family), inputs_of(family, *EXAMPLE)
    program = export(model, (), {**inputs, "use_cache": False})
    with torch.no_grad():
        found = program.module()(**inputs, use_cache=False).logits
    expected = logits_of(model, inputs)
    assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))
