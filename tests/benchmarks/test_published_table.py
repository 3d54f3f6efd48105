"""The published table, on small models of a Hub on this machine: its rows, and how it goes on after a stop."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer

from hf_compressm import CompreSSMConfig
from hf_compressm.families import find_layers
from tests import tools
from tests.family_table import BAMBA, MAMBA2, Family
from tests.hub_server import point_client_at, serving


MODEL, HYBRID = "me/mamba2-130m-hf", "me/hybrid"
STATES = 8
END = "<end>"
LINES = [f"{n} apples and {n + 1} pears make {2 * n + 1} pieces of fruit.\n" for n in range(60)]
SHORT = ["--length", "16", "--samples", "3", "--batch_size", "2", "--test_batch", "4", "--warmup_steps", "1"]
ROUNDING = 1e-5
"""Relative, of float32 figures."""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.txt").write_text("".join(LINES[:48]), encoding="utf-8")
    (folder / "test.txt").write_text("".join(LINES[48:]), encoding="utf-8")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub with a Mamba-2 and a hybrid, each with a tokenizer of bytes."""
    with serving() as server:
        point_client_at(server, monkeypatch)
        for name, family in ((MODEL, MAMBA2), (HYBRID, BAMBA)):
            small(family).push_to_hub(name)
            tokenizer_of_bytes().push_to_hub(name)
        yield


def small(family: Family) -> Any:
    return family.build(vocab_size=257, state_size=STATES)


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: n for n, character in enumerate([*alphabet, END])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def command(texts: Path, output: Path, *more: str) -> list[str]:
    return ["--text", str(texts), "--output", str(output), *SHORT, *more]


def interrupted_at(call: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are trained from now on; one of them is stopped by Ctrl-C."""
    training_step, seen = Trainer.training_step, []

    def step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.state.global_step)
        if len(seen) == call:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)
    return seen


def test_every_stage_of_every_cut_is_a_row_and_the_published_figures_stand_beside_it(
    part: Any, hub: None, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script, output = part("published_table"), tmp_path / "out"
    options = command(texts, output, "--models", MODEL, HYBRID, "--arms", "ours", "best", "--tasks", "--steps", "2")
    script.main(options)
    told = capsys.readouterr().out
    done = part("rows").Results(output).read()
    of_model = {(row["arm"], row["step"]): row for row in done.values() if row["model"] == MODEL}
    assert set(of_model) == {(arm, step) for arm in ("uncut", "ours", "best") for step in (0, 2)}
    assert {row["arm"] for row in done.values() if row["model"] == HYBRID} == {"uncut", "ours"}
    assert "the package has no class for BambaForCausalLM" in told
    for arm in ("ours", "best"):
        assert of_model[arm, 0]["cut"]["states"] == [STATES, STATES // 2]
        assert of_model[arm, 0]["cut"]["state_bytes"][1] < of_model[arm, 0]["cut"]["state_bytes"][0]
        assert of_model[arm, 2]["perplexity"] != of_model[arm, 0]["perplexity"]
    assert of_model["ours", 0]["parameters"] < of_model["uncut", 0]["parameters"]
    assert "| GHOST, published for WikiText-2 (arXiv 2602.11408) | 29.06 |  |" in told
    assert (output / "tables.md").read_text(encoding="utf-8") in told
    assert not list((output / "runs").iterdir())

    monkeypatch.setattr(part("published.checkpoint").Checkpoint, "load", None)  # nothing may run again
    script.main(options)
    assert part("rows").Results(output).read() == done


@pytest.mark.slow
def test_a_recovery_goes_on_from_its_checkpoint(
    part: Any, hub: None, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, cells = part("published_table"), part("published.cells")
    options = ["--models", MODEL, "--arms", "best", "--only", "best*", "--tasks", "--steps", "2", "5"]
    options += ["--save_steps", "1"]
    script.main(command(texts, tmp_path / "whole", *options))

    seen = interrupted_at(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        script.main(command(texts, tmp_path / "stopped", *options))
    assert [row["step"] for row in part("rows").Results(tmp_path / "stopped").read().values()] == [0, 2]
    monkeypatch.setattr(cells.Cell, "cut", None)  # it is cut already
    script.main(command(texts, tmp_path / "stopped", *options))
    assert seen == [0, 1, 2, 3, 4, 4]
    whole, stopped = (part("rows").Results(tmp_path / name).read() for name in ("whole", "stopped"))
    assert {key: row["perplexity"] for key, row in whole.items()} == {
        key: row["perplexity"] for key, row in stopped.items()
    }


def test_a_checkpoint_that_is_too_far_is_not_measured(part: Any, tmp_path: Path) -> None:
    recovery = part("published.recovery").Recovery([1, 2], save_steps=1, training={"use_cpu": True})
    rows = torch.arange(32).view(4, 8)
    folder = tmp_path / "run"
    assert recovery.train(small(MAMBA2), folder, 2, rows).name == "checkpoint-2"
    assert recovery.checkpoint(folder, 2) == folder / "checkpoint-2"
    assert recovery.checkpoint(folder, 1) is None
    assert not list(folder.iterdir())


def test_rows_of_other_settings_are_not_taken_for_done(
    part: Any, hub: None, texts: Path, tmp_path: Path, capsys: Any
) -> None:
    script = part("published_table")
    options = command(texts, tmp_path, "--models", MODEL, "--only", "uncut", "--tasks", "--steps")
    script.main(options)
    with pytest.raises(SystemExit, match="2"):
        script.main([*options, "--length", "8"])
    assert "was run with other settings (length)" in capsys.readouterr().err
    script.main([*options, "--learning_rate", "1", "--save_steps", "3"])  # nothing was trained


def test_what_other_settings_have_left_in_a_folder_is_not_trained_on(
    part: Any, hub: None, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, seen = part("published_table"), interrupted_at(3, monkeypatch)
    options = ["--models", MODEL, "--only", "uncut", "--tasks", "--steps", "3", "--save_steps", "1"]
    with pytest.raises(KeyboardInterrupt):
        script.main(command(texts, tmp_path, *options))
    script.main(command(texts, tmp_path, *options, "--learning_rate", "1e-2"))
    assert seen == [0, 1, 2, 0, 1, 2]


def test_a_text_that_is_not_there_is_one_line(part: Any, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        part("published_table").main(["--tasks", "--output", str(tmp_path)])
    assert capsys.readouterr().err.startswith("error: Couldn't reach 'Salesforce/wikitext' on the Hub")


def test_a_cell_that_fails_does_not_keep_the_others(
    part: Any, hub: None, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script, Arm = part("published_table"), part("published.arms").Arm

    def nothing(model: Any, config: CompreSSMConfig, batches: Any) -> None: ...

    monkeypatch.setattr(script, "ARMS", (Arm("idle", cut=nothing), Arm("random", {"keep": "random"})))
    with pytest.raises(SystemExit, match="1"):
        script.main(command(texts, tmp_path, "--models", MODEL, "--tasks", "--steps"))
    done = part("rows").Results(tmp_path).read()
    assert [row["arm"] for row in done.values()] == ["uncut", "random"]
    told = capsys.readouterr().err
    assert "idle 0.5 was to leave 4 states in every layer of me/mamba2-130m-hf: {8}" in told
    assert "the same command tries them again: me_mamba2-130m-hf-idle_0.5-seed0" in told


def test_perplexity_is_that_of_the_windows_token_by_token(part: Any) -> None:
    model = small(MAMBA2)
    tokens = torch.randint(257, (43,), generator=torch.Generator().manual_seed(0))
    windows = part("published.texts").windows(tokens, 8)
    assert windows.shape == (5, 8)
    losses = []
    with torch.no_grad():
        for window in tokens[:40].split(8):
            likelihoods = model(window[None]).logits[0].log_softmax(-1)
            losses += [-float(likelihoods[place, window[place + 1]]) for place in range(7)]
    expected = math.exp(sum(losses) / len(losses))
    for batch_size in (1, 2, 5):
        assert part("published.measures").perplexity(model, windows, batch_size) == pytest.approx(
            expected, rel=ROUNDING
        )


def test_calibration_windows_are_pieces_of_the_text(part: Any) -> None:
    tokens = torch.arange(20)
    batches = part("published.texts").calibration(tokens, samples=200, length=16, batch_size=64, seed=0)
    assert [len(batch["input_ids"]) for batch in batches] == [64, 64, 64, 8]
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert set(rows[:, 0].tolist()) == {0, 1, 2, 3, 4}
    assert bool((rows.diff(dim=1) == 1).all())


def test_texts_of_a_file_or_a_folder(part: Any, texts: Path, tmp_path: Path) -> None:
    local = part("published.texts").local
    assert local(texts).test == "".join(LINES[48:])
    file = tmp_path / "book.txt"
    file.write_text("a" * 90 + "b" * 10, encoding="utf-8")
    assert (local(file).train, local(file).test) == ("a" * 90, "b" * 10)
    (texts / "test.txt").unlink()
    with pytest.raises(ValueError, match=r"test\.txt is missing"):
        local(texts)


@pytest.mark.parametrize("family", [MAMBA2, BAMBA], ids=lambda family: family.name)
def test_an_order_decides_which_states_stay(part: Any, family: Family) -> None:
    arms, model = part("published.arms"), small(family)
    families = [type(layer.family) for layer in find_layers(model)]
    layer = find_layers(model)[0].module
    before = layer.in_proj.weight.detach().clone()
    seen = []

    def last(layer: Any, measured: Any) -> torch.Tensor:
        seen.append(measured.scores)
        return torch.arange(STATES - 1, -1, -1).expand_as(measured.scores)

    arms.in_order(last)(model, CompreSSMConfig(target_state_size=3), family.calibration())
    assert len(seen) == 2
    assert seen[0].shape == (layer.n_groups, STATES)
    inner = int(layer.out_proj.weight.shape[1])
    kept = [2 * inner + group * STATES + state for group in range(2) for state in (5, 6, 7)]
    torch.testing.assert_close(layer.in_proj.weight[2 * inner : 2 * inner + 6], before[kept], rtol=0, atol=0)
    assert [type(layer.family) for layer in find_layers(model)] == families


def test_published_figures_are_found_by_the_end_of_a_name(part: Any) -> None:
    published = part("published.tables").published
    assert published("GHOST", "AntonV/mamba2-1.3b-hf", 0.5) == 14.23
    assert published("second-order Taylor", "folder/mamba2-1.3b", 0.9) == 4690
    assert published("magnitude", "AntonV/mamba2-130m-hf", 0.9) is None
    assert published("uncut", "state-spaces/mamba-130m-hf", 0.0) is None


def test_a_missing_harness_is_named(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measures = part("published.measures")
    monkeypatch.setattr(measures, "find_spec", lambda name: None)
    measures.Harness((), None, 1, 16, None).check()
    with pytest.raises(ValueError, match=r"hf_compressm\[bench\]"):
        measures.Harness(("piqa",), None, 1, 16, None).check()


@pytest.mark.slow
def test_tasks_of_the_harness_are_in_the_rows(part: Any, hub: None, texts: Path, tmp_path: Path, capsys: Any) -> None:
    tools.module("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.json"
    data.write_text("\n".join(json.dumps({"text": line[:8], "right": "s", "wrong": "x"}) for line in LINES[:6]))
    task = {
        "task": "next_letter",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{[right, wrong]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "next_letter.yaml").write_text(json.dumps(task))
    options = ["--models", MODEL, HYBRID, "--arms", "ours", "--tasks", "next_letter", "--tasks_path", str(folder)]
    part("published_table").main(command(texts, tmp_path / "out", *options, "--steps", "1"))
    done = part("rows").Results(tmp_path / "out").read()
    assert len(done) == 8
    assert all(list(row["tasks"]) == ["next_letter"] for row in done.values())
    assert all(0 <= row["tasks"]["next_letter"]["acc"] <= 1 for row in done.values())
    assert "next_letter acc" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="2"):
        part("published_table").main(command(texts, tmp_path / "other", "--models", MODEL, "--tasks", "no_such_task"))
    assert "error: --tasks no_such_task cannot be loaded" in capsys.readouterr().err
