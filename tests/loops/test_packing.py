"""Several texts in one row are noticed where states run from one into the next."""

from pathlib import Path

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_compressm.families import SSMLayer, Statistics, find_layers
from hf_compressm.loops.packing import warn_of_packed_texts
from tests.family_table import BAMBA, MAMBA, MAMBA2, S5, Family
from tests.trainers import Examples, callback_of, trainer_of


PACKED = {
    "restarting positions": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
    "lengths": {"cu_seq_lens_q": torch.tensor([0, 3, 6])},
    "text numbers": {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
}
PLAIN = {
    "positions": {"position_ids": torch.arange(6)[None]},
    "padded positions": {
        "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
    },
    "one text": {"cu_seq_lens_q": torch.tensor([0, 6]), "seq_idx": torch.zeros(1, 6)},
}


@pytest.fixture
def warnings_told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr("hf_compressm.loops.packing.logger.warning", told.append)
    return told


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("family", [MAMBA, BAMBA, S5], ids=lambda family: family.name)
def test_packed_texts_are_told_where_states_run_on(family: Family, name: str, warnings_told: list[str]) -> None:
    warn_of_packed_texts(seen_layers(family, told=True), PACKED[name])
    knows = family is S5 or (family is BAMBA and name == "text numbers")
    assert len(warnings_told) == (0 if knows else 1)
    assert knows or "runs from one text into the next" in warnings_told[0]


def seen_layers(family: Family, told: bool) -> list[tuple[SSMLayer, Statistics | None]]:
    found = []
    for layer in find_layers(family.build()):
        statistics = layer.family.statistics(layer.module, layer.family.criterion("auto", calibrated=True))
        statistics.told_apart = told or family is S5
        found.append((layer, statistics))
    return found


def test_layers_whose_model_keeps_the_numbers_of_texts_from_them_are_told(warnings_told: list[str]) -> None:
    warn_of_packed_texts(seen_layers(BAMBA, told=False), PACKED["text numbers"])
    assert "bamba" in warnings_told[0]


@pytest.mark.parametrize("name", PLAIN)
def test_batches_that_are_not_packed_warn_of_nothing(name: str, warnings_told: list[str]) -> None:
    warn_of_packed_texts(seen_layers(MAMBA, told=False), PLAIN[name])
    assert warnings_told == []


@pytest.mark.parametrize(
    ("family", "numbered", "told"),
    [(MAMBA, False, "mamba"), (MAMBA2, True, "mamba2"), (BAMBA, False, "bamba"), (BAMBA, True, ""), (S5, False, "")],
    ids=["Mamba", "Mamba-2", "Bamba", "Bamba with seq_idx", "S5"],
)
def test_a_run_on_packed_batches_says_so_once_and_cuts(
    family: Family, numbered: bool, told: str, tmp_path: Path, warnings_told: list[str]
) -> None:
    rows = [{"input_ids": row["input_ids"].tolist()} for row in Examples(family).rows]
    collator = DataCollatorWithFlattening(return_seq_idx=numbered)
    trainer = trainer_of(family, tmp_path, train_dataset=rows, data_collator=collator)
    trainer.train()
    assert [event.outcome for event in callback_of(trainer).events] == ["cut"]
    assert len(warnings_told) == bool(told)
    assert all(f"the state of {told} layers runs from one text into the next" in text for text in warnings_told)
