"""The harness of lm-evaluation-harness on a cut model, a tokenizer and a task that are all on this machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tools
from tests.exporting.cases import compressed
from tests.exporting.test_generating import tokenizer_of_words
from tests.family_table import MAMBA, S5, Family, family_id


lm_eval = tools.module("lm_eval")
huggingface = tools.module("lm_eval.models.huggingface")

TOLERANCE = 1e-4  # float32 log-likelihoods, in batches of other lengths
ROWS = [
    {"text": "d f", "right": "h", "wrong": "j"},
    {"text": "e e g", "right": "k", "wrong": "d"},
    {"text": "i", "right": "c", "wrong": "l"},
]

pytestmark = pytest.mark.slow


def task(data: Path) -> dict[str, Any]:
    """A choice between two words, as a YAML file of the harness would have it."""
    return {
        "task": "next_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{[right, wrong]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


@pytest.mark.parametrize("family", [MAMBA, S5], ids=family_id)
def test_the_harness_finds_the_log_likelihoods_of_the_model(family: Family, tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    model, tokenizer = compressed(family), tokenizer_of_words()
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64, device="cpu")
    report = lm_eval.simple_evaluate(harness, tasks=[task(data)], bootstrap_iters=0, log_samples=True)

    right = 0
    for row, sample in zip(ROWS, report["samples"]["next_word"], strict=True):
        prompt = torch.tensor([tokenizer.encode(row["text"])])
        with torch.no_grad():
            likelihoods = model(prompt).logits[0, -1].log_softmax(-1)
        expected = [float(likelihoods[tokenizer.encode(row[name])[0]]) for name in ("right", "wrong")]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, abs=TOLERANCE)
        right += expected[0] > expected[1]
    assert report["results"]["next_word"]["acc,none"] == pytest.approx(right / len(ROWS))
