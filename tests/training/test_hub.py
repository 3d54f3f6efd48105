"""What a Trainer's own pushes carry for a run with cuts: at every commit, the model and all that explains it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_compressm.checkpoints import read_saved
from hf_compressm.files.names import KEPT_PREFIX, SEAL
from tests.family_table import MAMBA, S5, STATE_SIZE, Family, outputs
from tests.hub_repos import Repo
from tests.hub_server import HubServer, in_another_process, point_client_at, serving
from tests.trainers import trainer_of
from tests.training.test_recovery import trainer_with


FAMILIES = {"stock": MAMBA, "s5": S5}
SAVES = 3  # of the steps 2, 4 and 6; the cut is before the second
IN_PROGRESS = "Training in progress"
EXPLAINING = {"README.md", "compressm_history.json", "compressm_figures/spectra.png"}

LOADER = """
import sys
from pathlib import Path

sys.modules["hf_compressm"] = None  # importing it now fails
import torch
from transformers import AutoModelForCausalLM

for path in sorted(Path(sys.argv[1]).glob("*.pt")):
    saved = torch.load(path, weights_only=True)
    options = {"trust_remote_code": True} if path.stem.startswith("s5") else {}
    for revision in saved["revisions"]:
        model = AutoModelForCausalLM.from_pretrained(f"me/{path.stem}", revision=revision, **options).eval()
        with torch.no_grad():
            logits = model(saved["tokens"]).logits
        assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits, saved["logits"], rtol=1e-5, atol=1e-5)
    print(path.stem)
"""


@dataclass(frozen=True)
class Pushed:
    """A run that has pushed, and where to."""

    trainer: Any
    repo: Repo
    name: str

    @property
    def in_progress(self) -> list[dict[str, bytes]]:
        """Trees of the commits that were made during training, after the cut."""
        commits = [commit for commit in self.repo.commits() if commit.title.startswith(IN_PROGRESS)]
        return [commit.files for commit in commits if state_size(commit.files) < STATE_SIZE]


def state_size(tree: dict[str, bytes]) -> int:
    return json.loads(tree["config.json"])["state_size"]


def code_of(tree: dict[str, bytes]) -> set[str]:
    return {name for name in tree if name.endswith(".py")}


def pushing_run(family: Family, folder: Path, name: str, **kwargs: Any) -> Any:
    return trainer_of(
        family,
        folder / name,
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_model_id=f"me/{name}",
        hub_always_push=True,  # a push that is still going on is no reason to leave the next one out
        **kwargs,
    )


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        point_client_at(server, patch)
        yield server


@pytest.fixture(scope="module")
def run_of(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pushed]:
    """The run of a kind of model with a strategy, which is trained when it is first asked for."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def run(name: str) -> Pushed:
        if name not in done:
            kind, strategy = name.split("-")
            torch.manual_seed(0)
            trainer = pushing_run(FAMILIES[kind], folder, name, hub_strategy=strategy)
            trainer.train()
            trainer.push_to_hub()
            done[name] = Pushed(trainer, hub.repos[f"me/{name}"], name)
        return done[name]

    return run


every_run = pytest.mark.parametrize(
    "name",
    [
        "stock-every_save",
        "s5-checkpoint",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("stock-checkpoint", "stock-end", "s5-end", "s5-every_save")
        ),
    ],
)


@every_run
def test_the_last_commit_has_the_model_and_what_explains_it(run_of: Callable[[str], Pushed], name: str) -> None:
    repo = run_of(name).repo
    tree = repo.files()
    assert repo.commits()[-1].title == "End of training"
    assert {"config.json", "model.safetensors", *EXPLAINING} <= set(tree)
    assert state_size(tree) == STATE_SIZE // 2
    assert bool(code_of(tree)) == name.startswith("s5")
    history = json.loads(tree["compressm_history.json"])
    assert "cut" in [event["outcome"] for event in history["events"]]
    assert tree["compressm_figures/spectra.png"].startswith(b"\x89PNG")


@every_run
def test_so_has_every_commit_of_the_training_from_the_cut_on(run_of: Callable[[str], Pushed], name: str) -> None:
    run = run_of(name)
    titles = [commit.title for commit in run.repo.commits() if commit.title.startswith(IN_PROGRESS)]
    if name.endswith("end"):
        assert titles == []
        return
    per_save = 2 if name.endswith("checkpoint") else 1
    assert len(titles) == SAVES * per_save
    assert len(run.in_progress) >= (SAVES - 1) * per_save
    for tree in run.in_progress:
        assert set(tree) >= EXPLAINING | {"config.json", "model.safetensors"}
        assert code_of(tree) >= code_of(run.repo.files())


@pytest.mark.parametrize("kind", [pytest.param("stock", marks=pytest.mark.slow), "s5"])
def test_the_checkpoint_on_the_hub_is_whole_and_the_run_goes_on_from_it(
    run_of: Callable[[str], Pushed], kind: str, tmp_path: Path
) -> None:
    run = run_of(f"{kind}-checkpoint")
    prefix, folder = "last-checkpoint/", tmp_path / "checkpoint-6"
    for name, data in run.repo.files().items():
        if name.startswith(prefix):
            path = folder / name.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    read_saved(folder)
    assert {"compressm.complete", "compressm_history.json", "optimizer.pt"} <= {path.name for path in folder.iterdir()}
    resumed = trainer_of(FAMILIES[kind], tmp_path / "resumed", max_steps=7)
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.state.global_step == 7
    assert resumed.model.config.state_size == STATE_SIZE // 2


@pytest.mark.parametrize(
    "names",
    [
        ("s5-checkpoint", "stock-every_save"),
        pytest.param(("s5-end", "s5-every_save", "stock-checkpoint", "stock-end"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_models_load_without_the_package_from_every_push(
    run_of: Callable[[str], Pushed], names: tuple[str, ...], hub: HubServer, tmp_path: Path
) -> None:
    tokens = MAMBA.batch()["input_ids"]
    for name in names:
        run = run_of(name)
        during = [commit.oid for commit in run.repo.commits() if commit.files in run.in_progress]
        logits = outputs(run.trainer.model.eval(), {"input_ids": tokens})
        revisions = [*during[:1], "main"]
        torch.save({"tokens": tokens, "logits": logits, "revisions": revisions}, tmp_path / f"{name}.pt")
    assert in_another_process(hub, tmp_path, LOADER, tmp_path).split() == list(names)


class Kept(TrainerCallback):
    """Looks for checkpoints from before a cut when a push starts."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen += [path.name for path in Path(args.output_dir).glob(f"{KEPT_PREFIX}*")]


class Watch(TrainerCallback):
    """Looks at each push just before it starts, after this package's callback."""

    def __init__(self) -> None:
        self.overlaps: list[bool] = []
        self.sealed: list[bool] = []

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        earlier = self.trainer.push_in_progress
        self.overlaps.append(earlier is not None and not earlier.is_done())
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.sealed.append((folder / SEAL).exists())


def test_a_push_finds_sealed_checkpoints_and_none_before_it_going_on(hub: HubServer, tmp_path: Path) -> None:
    """The one before would find the configuration of one size and weights of another, or files that are half there."""
    hub.fail("POST", "/api/models/me/slow/commit/", "slow", last=9)
    watch = Watch()
    trainer = pushing_run(MAMBA, tmp_path, "slow", hub_strategy="checkpoint", callbacks=[watch])
    watch.trainer = trainer
    trainer.train()
    trainer.push_to_hub()
    assert (watch.overlaps, watch.sealed) == ([False] * (SAVES + 1), [True] * (SAVES + 1))
    assert len(hub.repos["me/slow"].commits()) == 1 + 2 * SAVES + 1
    for commit in hub.repos["me/slow"].commits()[1:]:
        (tmp_path / "weights").write_bytes(commit.files["model.safetensors"])
        shape = load_file(tmp_path / "weights")["backbone.layers.0.mixer.A_log"].shape
        assert shape[1] == state_size(commit.files)


def test_a_push_that_fails_while_training_does_not_end_it(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("POST", "/api/models/me/unlucky/commit/", 403, last=SAVES)
    trainer = pushing_run(MAMBA, tmp_path, "unlucky", hub_strategy="every_save")
    trainer.train()
    trainer._finish_current_push()
    assert hub.repos["me/unlucky"].files().keys() == {".gitattributes"}
    trainer.push_to_hub()
    assert {"model.safetensors", *EXPLAINING} <= set(hub.repos["me/unlucky"].files())


def test_what_is_kept_for_a_rollback_is_not_pushed(hub: HubServer, tmp_path: Path) -> None:
    by_step = {4: 0.5, 6: 0.4, 8: 0.5, 10: 0.6}
    pushing = {"push_to_hub": True, "hub_model_id": "me/guarded", "hub_always_push": True, "max_steps": 8}
    trainer = trainer_with(MAMBA, tmp_path, by_step, {"end": 4, "num_cuts": 1}, callbacks=[kept := Kept()], **pushing)
    trainer.train()
    assert any(kept.seen)
    commits = hub.repos["me/guarded"].commits()
    assert len(commits) > 1
    assert not [name for commit in commits for name in commit.files if KEPT_PREFIX in name]
