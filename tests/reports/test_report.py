"""The report of a run: what it says is what the run left, and nothing in it is more than text."""

import base64
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_compressm.files.names import HISTORY_FILE, TRAINER_STATE_FILE
from hf_compressm.reports import read_run, write_report
from tests import tools
from tests.family_table import LRU, STATE_SIZE
from tests.reports.example_runs import CUTS, STEPS, train
from tests.reports.plots.test_spectra import PNG_SIGNATURE


EVIL = (
    "</td><script>alert(1)</script><img src=x onerror=alert(2)> ![a](javascript:alert(3)) | `x` {{ 7 * 7 }} $\\frac$"
)
PICTURES = ("before_after", "cut_cost", "spectra", "state_sizes", "training")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-quic --hide-scrollbars"
).split()


class Page(HTMLParser):
    """Tags, text, and images of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.text: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.images += [value or "" for name, value in attrs if name == "src"]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a run"
    train(folder)
    return folder


@pytest.fixture
def copied(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "copy"))


def test_the_page_says_what_the_run_left(run_folder: Path, tmp_path: Path) -> None:
    page = write_report(run_folder, tmp_path)
    assert page == tmp_path / "report.html"
    assert list(tmp_path.iterdir()) == [page]
    events = read_run(run_folder).events
    text = " ".join(Page(page.read_text()).text)
    assert f"{STATE_SIZE} states per layer became {max(events[-1].sizes.values())} in 2 cuts" in text
    for event in events:
        assert f"{max(layer.predicted_error for layer in event.result.plan.layers):.4f}" in text
        assert f"{event.result.seconds:.2f}" in text
    for name in events[0].sizes:
        assert name in text
    for line in (
        "a run",
        "fraction",
        "0.3",
        "validation loss",
        "bytes of state per sequence",
        "steps per second",
        "Measured with torch",
    ):
        assert line in text
    assert [event.step for event in events] == list(CUTS)


def test_the_page_holds_all_it_shows(run_folder: Path, tmp_path: Path) -> None:
    page = write_report(run_folder, tmp_path)
    parsed = Page(page.read_text())
    assert len(parsed.images) == len(PICTURES)
    for image in parsed.images:
        kind, _, data = image.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(PNG_SIGNATURE)
    assert not {"script", "link", "iframe"} & set(parsed.tags)


def test_values_around_a_cut_are_those_of_the_log(run_folder: Path) -> None:
    run = read_run(run_folder)
    first, second = run.events
    losses = dict(run.series("eval_loss"))
    assert run.before(first, "loss") == (2, losses[2])
    assert run.after(first, "loss") == (4, losses[4])
    assert run.before(second, "loss") == (6, losses[6])
    assert run.metrics() == ["loss"]
    assert run.steps == STEPS
    before, after = run.paces()
    assert before > 0
    assert after > 0


def test_evaluations_at_the_cut_itself_count_more(copied: Path) -> None:
    path = copied / TRAINER_STATE_FILE
    state = json.loads(path.read_text())
    own = [
        {"before_cut_loss": 5.0, "step": 3},
        {"after_cut_loss": 6.0, "step": 3},
        {"eval_loss": float("nan"), "step": 9},
    ]
    path.write_text(json.dumps({**state, "log_history": [*state["log_history"], *own, "text", {"loss": 1}]}))
    run = read_run(copied)
    assert (run.before(run.events[0], "loss"), run.after(run.events[0], "loss")) == ((3, 5.0), (3, 6.0))
    assert run.series("eval_loss")[-1][0] == STEPS


def test_a_run_that_goes_on_is_read_from_its_last_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, save_strategy="steps", save_steps=4)
    for name in (HISTORY_FILE, TRAINER_STATE_FILE, "config.json"):
        (tmp_path / name).unlink()
    run = read_run(tmp_path)
    assert run.steps == STEPS  # the last checkpoint is that of the end
    assert [event.step for event in run.events] == list(CUTS)
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    assert read_run(tmp_path).steps == 8


def test_a_model_that_was_only_cut_and_saved_has_a_report(tmp_path: Path) -> None:
    from hf_compressm import CompreSSMConfig, compress

    model = LRU.build()
    compress(model, CompreSSMConfig(fraction=0.5))
    model.save_pretrained(tmp_path)
    page = write_report(tmp_path, tmp_path / "new" / "place")
    assert f"{STATE_SIZE} states per layer became {STATE_SIZE // 2} in 1 cut" in page.read_text()
    assert Page(page.read_text()).images == []


def test_what_tells_of_no_cut_is_refused(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        read_run(tmp_path / "nothing")
    LRU.build().save_pretrained(tmp_path / "uncut")
    with pytest.raises(ValueError, match="has no record of a cut"):
        write_report(tmp_path / "uncut")
    assert not (tmp_path / "uncut" / "report.html").exists()
    (copied / HISTORY_FILE).write_text('{"schema_version": 1, "events": [{"step": 1}]}')
    with pytest.raises(ValueError, match=HISTORY_FILE):
        read_run(copied)
    (copied / HISTORY_FILE).write_text('{"schema_version": 1')
    with pytest.raises(ValueError, match="not whole"):
        read_run(copied)


def poison(folder: Path) -> None:
    """Put markup wherever a stranger's files may hold text."""
    history = json.loads((folder / HISTORY_FILE).read_text())
    for event in history["events"]:
        for layer in event["layers"]:
            layer["reason"] = EVIL
    history["machine"] = EVIL
    (folder / HISTORY_FILE).write_text(json.dumps(history))
    state = json.loads((folder / TRAINER_STATE_FILE).read_text())
    state["log_history"].append({f"eval_{EVIL}": 1.0, "step": 9})
    state["stateful_callbacks"]["CompreSSMCallback"]["args"]["config"]["criterion"] = EVIL
    (folder / TRAINER_STATE_FILE).write_text(json.dumps(state))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [EVIL]}))


def test_text_of_strangers_stays_text(copied: Path) -> None:
    evil = copied.rename(copied.with_name("<b>bold<b> *x* [a](b)"))
    poison(evil)
    page = write_report(evil)
    parsed = Page(page.read_text())
    assert not {"script", "b"} & set(parsed.tags)
    assert len(parsed.images) == len(PICTURES)
    assert not parsed.handlers
    assert EVIL.split("$")[0].strip() in " ".join(parsed.text)


def test_a_history_cannot_name_a_place_to_write_to(copied: Path) -> None:
    history = json.loads((copied / HISTORY_FILE).read_text())
    history["events"][0]["layers"][0]["name"] = "../../outside"
    (copied / HISTORY_FILE).write_text(json.dumps(history))
    with pytest.raises(ValueError, match="cannot be read: name"):
        write_report(copied)


@pytest.mark.slow
def test_a_browser_shows_the_page_and_runs_nothing(copied: Path, tmp_path: Path) -> None:
    chromium = tools.browser()
    poison(copied)
    page = write_report(copied)
    own = [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    shot = tmp_path / "shot.png"
    command = [chromium, *FLAGS, "--window-size=1000,3000", f"--screenshot={shot}", *own]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(3000, -1, 3)
    for band in np.split(pixels[:1200], 3):  # tables, and the pictures below them
        assert len(np.unique(band.reshape(-1, 3), axis=0)) > 5
    blue = (np.abs(pixels.astype(int) - (0, 0x72, 0xB2)).sum(axis=2) < 12).sum()
    assert blue > 5000  # pictures are drawn, not only framed
    done = subprocess.run(
        [chromium, *FLAGS, "--dump-dom", *own], check=True, capture_output=True, text=True, timeout=120
    )
    shown = Page(done.stdout)
    assert not {"script"} & set(shown.tags)
    assert len(shown.images) == len(PICTURES)
