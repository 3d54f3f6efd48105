"""What a Trainer writes beside a model that was cut: history, pictures, code, and a card that is the user's."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import Trainer
from transformers.utils import logging as transformers_logging

from hf_compressm import CompreSSMConfig, compress_checkpoint
from hf_compressm.files.names import FIGURES_FOLDER, HISTORY_FILE, TRAINER_STATE_FILE
from hf_compressm.reports import read_run, write_report
from hf_compressm.reports.card import TAGS, CardFacts, card_of, is_by_hand, write_card
from hf_compressm.reports.tables import headline
from tests.cli.running import run as run_command
from tests.family_table import LRU, MAMBA, Family, family_id
from tests.reports.plots.test_spectra import assert_is_picture
from tests.reports.test_report import EVIL
from tests.trainers import HALVE, Examples, keeping_best, trainer_of


OWN_TEXT = "Made for the *tide tables* of Brest.\n"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the run; these tests look at text."""
    monkeypatch.setattr("hf_compressm.training.reporting.draw_pictures", lambda run, folder: [])


def trained(folder: Path, family: Family = LRU, **kwargs: Any) -> Trainer:
    """A run with one cut and evaluations."""
    evaluating = {"eval_dataset": Examples(family, 4), "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(family, folder, **{**evaluating, **kwargs})
    trainer.train()
    return trainer


def warnings_of(act: Any) -> list[str]:
    """What the package warns of meanwhile."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = transformers_logging.get_logger("hf_compressm.training.reporting")
    transformers_logging.get_logger("hf_compressm").addHandler(handler)
    level = logger.getEffectiveLevel()
    logger.setLevel(logging.WARNING)
    try:
        act()
    finally:
        transformers_logging.get_logger("hf_compressm").removeHandler(handler)
        logger.setLevel(level)
    return seen


@pytest.mark.parametrize("family", [pytest.param(LRU, marks=pytest.mark.slow), MAMBA], ids=family_id)
def test_save_model_carries_what_explains_the_model(family: Family, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", family)
    trainer.save_model(str(tmp_path / "saved"))
    saved = tmp_path / "saved"
    run = read_run(saved)
    assert [(event.step, event.outcome) for event in run.events] == [(2, "cut")]
    assert run.series("eval_loss")[-1][0] == 6
    for name in ("before_after", "training", "spectra", "state_sizes", "cut_cost"):
        assert_is_picture(saved / FIGURES_FOLDER / f"{name}.png")
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "transformers"
    assert set(TAGS) <= set(card.data.tags)
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "saved"
    assert {result.metric_type: result.metric_value for result in results} == {"loss": run.series("eval_loss")[-1][1]}
    assert {result.task_type for result in results} == {"text-generation"}
    for line in (
        "## Compression",
        "8 states per layer became 4 in 1 cut",
        "arxiv.org/abs/2510.02823",
        "compressm_figures/",
    ):
        assert line in card.text
    assert ("trust_remote_code=True" in card.text) == (family is LRU)
    assert "AutoModelForCausalLM" in card.text


@pytest.mark.usefixtures("undrawn")
def test_the_card_s_loading_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tmp_path, MAMBA)
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    block = text.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", str(tmp_path))
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["model"].config.state_size == 4


@pytest.mark.usefixtures("undrawn")
def test_a_card_of_ours_is_written_anew_until_a_person_changes_it(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.save_model()
    path = tmp_path / "README.md"
    card = path.read_text()
    assert not is_by_hand(card)
    trainer.save_model()
    assert path.read_text() == card
    changed = card.replace("tags:\n", "license: cc-by-4.0\ntags:\n- tides\n", 1)
    changed = changed.replace("\n## Compression", "\nto be overwritten\n\n## Compression", 1)
    head, _, tail = changed.partition("<!-- compressm: begin")
    path.write_text(f"{head}{OWN_TEXT}\n<!-- compressm: begin{tail}\n{OWN_TEXT}")
    assert is_by_hand(path.read_text())
    for loss in (0.5, 0.25):
        trainer.state.log_history.append({"eval_loss": loss, "step": 6})
        trainer.save_model()
        kept = path.read_text()
        assert ModelCard(kept).data.eval_results[0].metric_value == loss
        assert kept.count(OWN_TEXT) == 2
        assert kept.count("## Compression") == 1
        assert "to be overwritten" not in kept
        data = ModelCard(kept).data
        assert data.license == "cc-by-4.0"
        assert data.tags.count("tides") == 1
        assert is_by_hand(kept)


@pytest.mark.usefixtures("undrawn")
def test_results_that_a_person_gave_stay(tmp_path: Path) -> None:
    metric = {"type": "accuracy", "value": 0.9, "name": "Accuracy by hand"}
    result = {"task": {"type": "other"}, "dataset": {"name": "tides", "type": "tides"}, "metrics": [metric]}
    for index in ([{"name": "mine", "results": [result]}], ["odd"], "odd"):
        head = json.dumps({"model-index": index})  # JSON is YAML
        (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# Tides\n")
        trained(tmp_path).save_model()
        assert yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])["model-index"] == index


@pytest.mark.usefixtures("undrawn")
def test_a_card_that_was_there_gets_a_section_and_tags(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        f"---\nlicense: mit\ntags: tides\nodd: [1, {{a: b}}]\n---\n# Tides\n\n{OWN_TEXT}"
    )
    trained(tmp_path).save_model()
    text = (tmp_path / "README.md").read_text()
    assert f"# Tides\n\n{OWN_TEXT}" in text
    assert "## Compression" in text
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["tags"][0], data["odd"]) == ("mit", "tides", [1, {"a": "b"}])
    assert set(TAGS) <= set(data["tags"])


@pytest.mark.usefixtures("undrawn")
def test_metadata_that_cannot_be_read_stay_as_they_are(tmp_path: Path) -> None:
    head = "---\ntags: [unclosed\n---\n"
    (tmp_path / "README.md").write_text(f"{head}# Tides\n")
    trainer = trained(tmp_path)
    assert any("cannot be read as YAML" in text for text in warnings_of(trainer.save_model))
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"{head}# Tides\n")
    assert "## Compression" in text


@pytest.mark.usefixtures("undrawn")
def test_the_trainer_s_own_card_gets_the_section_and_is_kept_once_changed(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.create_model_card(model_name="tides", tags="sea")
    path = tmp_path / "README.md"
    text = path.read_text()
    assert "## Training procedure" in text
    assert "## Compression" in text
    assert "sea" in ModelCard(text).data.tags
    assert set(TAGS) <= set(ModelCard(text).data.tags)
    assert ModelCard(text).data.to_dict()["model-index"][0]["results"]
    trainer.create_model_card(model_name="waves")  # nobody changed it: it is the Trainer's to write anew
    assert "# waves" in path.read_text()
    assert path.read_text().count("## Compression") == 1
    path.write_text(path.read_text().replace("More information needed", OWN_TEXT, 1))
    trainer.create_model_card(model_name="storms", license="mit")
    kept = path.read_text()
    assert OWN_TEXT in kept
    assert "# waves" in kept
    assert kept.count("## Compression") == 1
    assert ModelCard(kept).data.license == "mit"  # what the head did not have yet
    trainer.save_model()
    assert path.read_text().count(OWN_TEXT) == 1


@pytest.mark.usefixtures("undrawn")
def test_without_a_cut_nothing_is_written(tmp_path: Path) -> None:
    trainer = trained(tmp_path, settings={"tolerance": 0.0, "num_cuts": 1, "end": 2})
    trainer.save_model()
    written = {path.name for path in tmp_path.iterdir()}
    assert HISTORY_FILE in written  # the attempt is told of
    assert not {"README.md", FIGURES_FOLDER} & written


def test_a_model_that_cannot_be_explained_is_saved_all_the_same(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    (tmp_path / "README.md").mkdir()
    assert any("could not be written" in text for text in warnings_of(trainer.save_model))
    assert (tmp_path / "model.safetensors").exists()


def test_without_matplotlib_the_card_has_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "## Compression" in text
    assert "![" not in text


@pytest.mark.usefixtures("undrawn")
def test_markup_in_names_does_not_reach_the_card(tmp_path: Path) -> None:
    trained(tmp_path).save_model()
    state = json.loads((tmp_path / TRAINER_STATE_FILE).read_text())
    state["log_history"].append({f"eval_{EVIL}": 1.0, "step": 6})
    (tmp_path / TRAINER_STATE_FILE).write_text(json.dumps(state))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [EVIL]}))
    evil = f"{EVIL}\n---\n<!-- compressm: end, write below -->"
    facts = CardFacts(name=evil, repo_id='x"); import os; ("', base_model=evil, datasets=[evil])
    text = write_card(read_run(tmp_path), facts)
    body = text.split("\n---\n", 1)[1]
    for part in ("<script", "<img", "](javascript", "import os", "{{ 7"):
        assert part not in body
    assert body.count("<!-- compressm: end, write below -->") == 1
    data = ModelCard(text).data.to_dict()
    assert data["model-index"][0]["name"] == evil
    assert "base_model" not in data
    assert "datasets" not in data
    again = write_card(read_run(tmp_path), facts, text)
    assert again == text


def test_a_cut_on_disk_renews_the_card_and_leaves_the_report_behind(tmp_path: Path) -> None:
    trained(tmp_path / "run").save_model()
    card = tmp_path / "run" / "README.md"
    card.write_text(card.read_text().replace("# run\n", f"# run\n\n{OWN_TEXT}", 1))
    write_report(tmp_path / "run")
    compress_checkpoint(tmp_path / "run", tmp_path / "smaller", CompreSSMConfig(target_state_size=2))
    text = (tmp_path / "smaller" / "README.md").read_text()
    assert OWN_TEXT in text
    assert "8 states per layer became 2 in 2 cuts" in text
    assert "![" not in text  # the pictures were those of the run before
    names = {path.name for path in (tmp_path / "smaller").iterdir()}
    assert not {FIGURES_FOLDER, "report.html", "report.md", "report_figures"} & names
    (tmp_path / "run" / "README.md").write_bytes(b"\xff\xfe")
    compress_checkpoint(tmp_path / "run", tmp_path / "again", CompreSSMConfig(target_state_size=2))
    assert (tmp_path / "again" / "README.md").read_bytes() == b"\xff\xfe"


@pytest.mark.parametrize("best", [1, 2])
def test_what_is_told_of_a_best_model_from_before_the_cut_is_told_of_that_model(
    best: int, tmp_path: Path, undrawn: None
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(MAMBA, tmp_path / "run", HALVE, **saving, **keeping_best(MAMBA, best))
    warnings = warnings_of(trainer.train)
    assert f"The best model is that of step {best}, from before the cut after step 2" in " ".join(warnings)
    trainer.save_model(str(tmp_path / "saved"))
    names = sorted(path.name for path in (tmp_path / "saved").iterdir() if path.suffix in (".md", ".json"))
    assert names == ["config.json", "generation_config.json"]
    run = read_run(tmp_path / "run")
    assert [event.step for event in run.events] == [2]
    assert run.model_step == best
    assert f"no layer was cut. It is the best model of the run, that of step {best}." in headline(run.of_the_model())
    trainer.save_model()
    assert card_of(tmp_path / "run") is None
    report = write_report(tmp_path / "run").read_text()
    assert f"the best model of the run, that of step {best}" in report


def test_what_is_told_of_a_best_model_from_between_two_cuts_ends_there(
    tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    settings = {"fraction": 0.5, "end": 4, "num_cuts": 2}
    trainer = trainer_of(MAMBA, tmp_path / "run", settings, **saving, **keeping_best(MAMBA, 3))
    trainer.train()
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    size, parameters = MAMBA.build().config.state_size, trainer.model.num_parameters()
    card = (folder / "README.md").read_text()
    told = f"{size} states per layer became {size // 2} in 1 cut. It is the best model of the run, that of step 3."
    assert told in card
    assert f"{parameters:,} |" in card
    assert f"became {size // 4}" not in card
    assert "(step 3) |" in next(line for line in card.splitlines() if line.startswith("| validation loss"))
    assert card_of(folder) == card
    capsys.readouterr()
    _, found, _ = run_command(capsys, "verify", folder, "--json")
    assert json.loads(found)["step"] == 3


def test_a_section_of_an_earlier_save_goes_when_the_model_has_no_cut(tmp_path: Path, undrawn: None) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    trained(tmp_path / "other")
    mine = f"---\nlicense: mit\ntags:\n- tides\n---\n{OWN_TEXT}"
    path = tmp_path / "run" / "README.md"
    path.parent.mkdir()
    path.write_text(write_card(read_run(tmp_path / "other"), CardFacts("tides"), mine))
    trainer = trainer_of(MAMBA, tmp_path / "run", HALVE, **saving, **keeping_best(MAMBA, 1))
    trainer.train()
    trainer.save_model()
    assert path.read_text().replace("library_name: transformers\n", "") == mine
