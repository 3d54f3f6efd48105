"""`hf-compressm push` as a user sees it, against a Hub on this machine: what goes, what stays, and what goes wrong."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from hf_compressm import CompreSSMConfig, compress
from tests.cli.running import complaint, run
from tests.family_table import LRU, MAMBA, S5, STATE_SIZE
from tests.hub_directories import (
    LEFT,
    LEFT_FOLDERS,
    OWN,
    TOKENIZER,
    contents,
    fill,
    saved_model,
    sealed_checkpoint,
    shard_count,
)
from tests.hub_server import READ_TOKEN, HubServer, in_another_process, point_client_at, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving() as server:
        point_client_at(server, monkeypatch)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_model(tmp_path / "model")


def test_the_model_goes_and_the_run_stays(hub: HubServer, tmp_path: Path, capsys: Any) -> None:
    folder = sealed_checkpoint(tmp_path / "checkpoint-6")
    before = contents(folder)
    code, out, err = run(capsys, "push", folder, "me/cut", "--message", "Halved", "--private")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"{hub.url}/me/cut"
    repo = hub.repos["me/cut"]
    assert [commit.title for commit in repo.commits()] == ["initial commit", "Halved"]
    assert repo.private
    code_files = {name for name in before if name.endswith(".py")} - {"train.py"}
    expected = {"config.json", "generation_config.json", "model.safetensors", *code_files, *TOKENIZER, *OWN}
    assert set(repo.files()) == expected | {".gitattributes"}
    assert all(repo.files()[name] == before[name] for name in expected)
    assert all(name in out for name in (*LEFT, *LEFT_FOLDERS, "compressm.complete"))
    assert contents(folder) == before


def test_a_dry_run_lists_files_and_sizes_and_sends_nothing(tmp_path: Path, capsys: Any) -> None:
    with serving() as server:
        folder = sealed_checkpoint(tmp_path / "checkpoint-6")
        code, out, _ = run(capsys, "push", folder, "me/cut", "--dry-run")
        assert code == 0
        for name in ("model.safetensors", *TOKENIZER, *OWN):
            assert f"{(folder / name).stat().st_size:,}  {name}\n" in out
        found = json.loads(run(capsys, "push", folder, "me/cut", "--dry-run", "--json")[1])
        assert {"name": "README.md", "bytes": 2} in found["files"]
        assert set(found["left"]) == {*LEFT, *LEFT_FOLDERS, "compressm.complete"}
        assert found["bytes"] == sum(file["bytes"] for file in found["files"])
        assert server.requests == []


def test_json_and_quiet_are_for_programs(hub: HubServer, folder: Path, capsys: Any) -> None:
    found = json.loads(run(capsys, "push", folder, "cut", "--json")[1])
    assert (found["repo"], found["removed"]) == ("me/cut", [])
    assert found["commit"] == hub.repos["me/cut"].commits()[-1].oid
    assert run(capsys, "push", folder, "cut", "--quiet") == (0, "", "")
    assert len(hub.repos["me/cut"].commits()) == 2  # nothing had changed


def test_a_branch_and_a_pull_request_leave_main_alone(hub: HubServer, folder: Path, capsys: Any) -> None:
    assert run(capsys, "push", folder, "me/cut")[0] == 0
    (folder / "README.md").write_text("# Cut\n")
    assert run(capsys, "push", folder, "me/cut", "--revision", "tries/1")[1].endswith(
        f"{hub.url}/me/cut/tree/tries%2F1\n"
    )
    (folder / "README.md").write_text("# Cut again\n")
    assert run(capsys, "push", folder, "me/cut", "--create-pr")[1].endswith(f"{hub.url}/me/cut/discussions/1\n")
    repo = hub.repos["me/cut"]
    assert "README.md" not in repo.files()
    assert repo.files("tries/1")["README.md"] == b"# Cut\n"
    assert repo.files("refs/pr/1")["README.md"] == b"# Cut again\n"


def test_weights_of_an_earlier_push_are_gone_and_nothing_else_is(hub: HubServer, tmp_path: Path, capsys: Any) -> None:
    many, few, one = (tmp_path / name for name in ("many", "few", "one"))
    for folder, size in ((many, "1KB"), (few, "3KB"), (one, "1MB")):
        saved_model(folder, MAMBA, max_shard_size=size)
    fill(many / "compressm_figures" / "spectra.png")
    assert run(capsys, "push", many, "me/cut")[0] == 0
    repo = hub.repos["me/cut"]
    before = shard_count(repo.files())
    for place in ("", "last-checkpoint/"):  # a Trainer's, of which this command knows nothing
        repo.files()[f"{place}pytorch_model.bin"] = b"old"
    out = run(capsys, "push", few, "me/cut")[1]
    assert shard_count(repo.files()) < before
    assert f"model-{before:05}-of-{before:05}.safetensors" in out
    assert "pytorch_model.bin" not in repo.files()
    assert "last-checkpoint/pytorch_model.bin" in repo.files()
    assert run(capsys, "push", one, "me/cut")[0] == 0
    assert {name for name in repo.files() if "safetensors" in name} == {"model.safetensors"}
    assert "compressm_figures/spectra.png" in repo.files()
    assert len(repo.commits()) == 4


def test_adapters_go_with_their_base_and_without_the_name_of_a_place(
    hub: HubServer, tmp_path: Path, capsys: Any
) -> None:
    folder = saved_model(tmp_path / "run" / "base_model", LRU).parent
    saved_model(folder / "kept", LRU)
    (folder / "kept" / "model.safetensors").rename(folder / "kept" / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes((folder / "kept" / "adapter_model.safetensors").read_bytes())
    for place, base in {folder: str(folder / "base_model"), folder / "kept": "C:\\run\\base_model"}.items():
        fill(place / "adapter_config.json", json.dumps({"base_model_name_or_path": base}))
    before = contents(folder)
    assert run(capsys, "push", folder, "me/adapters")[0] == 0
    tree = hub.repos["me/adapters"].files()
    weights = {f"{place}adapter_model.safetensors" for place in ("", "kept/")} | {"base_model/model.safetensors"}
    assert {name for name in tree if name.endswith(".safetensors")} == weights
    assert {"base_model/config.json", "base_model/modeling_lru.py"} <= set(tree)
    for place in ("", "kept/"):
        named = json.loads(tree[f"{place}adapter_config.json"])["base_model_name_or_path"]
        assert named == "me/adapters/base_model"
    assert not any(str(tmp_path).encode() in data for data in tree.values())
    assert contents(folder) == before
    (folder / "base_model").rename(tmp_path / "elsewhere")
    assert run(capsys, "push", folder, "me/adapters")[0] == 0
    assert not any(name.startswith("base_model/") for name in hub.repos["me/adapters"].files())


def test_a_cut_model_gets_a_card_with_its_id(hub: HubServer, tmp_path: Path, capsys: Any) -> None:
    model = LRU.build()
    compress(model, CompreSSMConfig(fraction=0.5))
    model.save_pretrained(folder := tmp_path / "model")
    before = contents(folder)
    assert run(capsys, "push", folder, "me/cut")[0] == 0
    card = hub.repos["me/cut"].files()["README.md"].decode()
    assert "# cut" in card
    assert 'from_pretrained("me/cut", trust_remote_code=True)' in card
    assert f"{STATE_SIZE} states per layer became {STATE_SIZE // 2} in 1 cut" in card
    assert "compressm" in ModelCard(card).data.tags
    assert contents(folder) == before


def test_a_card_that_is_there_stays(hub: HubServer, folder: Path, capsys: Any) -> None:
    model = LRU.build()
    assert run(capsys, "push", folder, "me/cut")[0] == 0
    assert "README.md" not in hub.repos["me/cut"].files()  # nothing was cut
    (folder / "README.md").write_text("# Mine\n")
    assert run(capsys, "push", folder, "me/cut")[0] == 0
    (folder / "README.md").unlink()
    compress(model, CompreSSMConfig(fraction=0.5))
    model.save_pretrained(folder)
    assert run(capsys, "push", folder, "me/cut")[0] == 0
    assert hub.repos["me/cut"].files()["README.md"] == b"# Mine\n"  # the directory has none of its own
    (folder / "README.md").write_text("# Yours\n")
    assert run(capsys, "push", folder, "me/cut")[0] == 0
    card = hub.repos["me/cut"].files()["README.md"].decode()
    assert "# Yours" in card
    assert "## Compression" in card
    assert (folder / "README.md").read_text() == "# Yours\n"
    (folder / "compressm_history.json").write_text("{")
    assert "compressm_history.json is not whole" in complaint(capsys, "push", folder, "me/other")
    assert "me/other" not in hub.repos


def test_a_large_file_goes_on_after_a_broken_connection(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's own patience
    hub.fail("PUT", "/lfs/", "reset")
    assert run(capsys, "push", folder, "me/cut")[0] == 0
    assert hub.count("PUT", "/lfs/") == 2
    assert hub.repos["me/cut"].files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()


DOWN = {
    "500": ("POST", "/commit/", 500, "The Hub answered 500"),
    "reset": ("POST", "/commit/", "reset", "The connection to the Hub failed"),
    "answer lost": ("POST", "/commit/", "lost", "The connection to the Hub failed"),
    "503 when made": ("POST", "/api/repos/create", 503, "The Hub answered 503"),
    "answer of a gateway": ("POST", "/preupload/", "garbled", "The connection to the Hub failed"),
    "commit of somebody else": ("POST", "/commit/", 412, "Others commit to me/cut at the same time"),
}


@pytest.mark.parametrize("fault", DOWN.values(), ids=DOWN)
def test_a_hub_that_is_down_ends_the_push_and_the_next_one_succeeds(
    fault: tuple[str, str, Any, str], hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.fail(*fault[:3])
    said = complaint(capsys, "push", folder, "me/cut")
    assert fault[3] in said
    assert "Push again" in said
    assert run(capsys, "push", folder, "me/cut")[0] == 0
    assert "model.safetensors" in hub.repos["me/cut"].files()
    assert len(hub.repos["me/cut"].commits()) == 2  # a commit whose answer was lost is there once


@pytest.mark.parametrize("outcome", [500, "reset"])
def test_a_hub_that_is_down_leaves_the_repo_as_it_was(
    outcome: Any, hub: HubServer, tmp_path: Path, capsys: Any
) -> None:
    assert run(capsys, "push", saved_model(tmp_path / "old", LRU), "me/cut", "--quiet")[0] == 0
    before = hub.repos["me/cut"].commits()
    hub.fail("POST", "/commit/", outcome, last=99)
    complaint(capsys, "push", saved_model(tmp_path / "new", S5), "me/cut", "--quiet")
    assert hub.repos["me/cut"].commits() == before


def test_a_pull_request_whose_answer_was_lost_is_looked_for(hub: HubServer, folder: Path, capsys: Any) -> None:
    hub.fail("POST", "/commit/", "lost")
    assert "check whether the pull request was opened" in complaint(capsys, "push", folder, "me/cut", "--create-pr")
    assert [name for name in hub.repos["me/cut"].branches if name.startswith("refs/pr/")] == ["refs/pr/1"]


REFUSED = {
    "/commit/": {
        401: "hf auth login",
        403: "settings/tokens",
        404: "is missing or hidden",
        400: "refused the push",
        409: "(409)",
    },
    "/preupload/": {401: "HF_TOKEN", 403: "may not write to me/cut"},
    "/api/repos/create": {401: "HF_TOKEN", 403: "may not write to me/cut"},
}
CASES = [(place, status, words) for place, rows in REFUSED.items() for status, words in rows.items()]


@pytest.mark.parametrize(("place", "status", "words"), CASES, ids=[f"{place} {status}" for place, status, _ in CASES])
def test_a_refusal_is_final_and_names_the_way_out(
    place: str, status: int, words: str, hub: HubServer, folder: Path, capsys: Any
) -> None:
    hub.fail("POST", place, status, last=99)
    assert words in complaint(capsys, "push", folder, "me/cut")
    assert hub.faults[0].seen == 1
    assert all(set(repo.files()) == {".gitattributes"} for repo in hub.repos.values())


def test_tokens_and_owners_are_refused_by_the_hub_itself(
    hub: HubServer, folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    assert "may not write to you/cut" in complaint(capsys, "push", folder, "you/cut")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "may not write to me/cut" in complaint(capsys, "push", folder, "me/cut")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept the token" in complaint(capsys, "push", folder, "cut")
    assert hub.repos == {}


def test_private_is_not_asked_of_a_public_repo(hub: HubServer, folder: Path, capsys: Any) -> None:
    assert run(capsys, "push", folder, "me/cut", "--quiet")[0] == 0
    (folder / "README.md").write_text("secret")
    assert "me/cut exists and is public" in complaint(capsys, "push", folder, "me/cut", "--private")
    assert "README.md" not in hub.repos["me/cut"].files()


MISTAKES = {
    "three parts": (["a/b/c"], "'a/b/c' is not an id on the Hub"),
    "a space": (["me/my model"], "'me/my model' is not an id on the Hub"),
    "an address": (["https://huggingface.co/me/x"], "is not an id on the Hub"),
    "dots": (["me/a..b"], "is not an id on the Hub"),
    "markup": (["me/[red]x"], "'me/[red]x' is not an id on the Hub"),
    "an empty message": (["me/x", "--message", " "], "message of the commit is empty"),
    "a branch and a pull request": (["me/x", "--create-pr", "--revision", "b"], "A pull request goes to main"),
    "no branch": (["me/x", "--revision", "a b"], "'a b' is not the name of a branch"),
    "an empty branch": (["me/x", "--revision", ""], "'' is not the name of a branch"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("mode", [[], ["--dry-run"]], ids=["push", "dry run"])
def test_a_mistake_is_found_before_anything_is_sent(
    mistake: tuple[list[str], str], mode: list[str], hub: HubServer, folder: Path, capsys: Any
) -> None:
    words, expected = mistake
    assert expected in complaint(capsys, "push", folder, *words, *mode)
    assert hub.requests == []


def test_a_client_that_cannot_send_says_so(hub: HubServer, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("hf_compressm.reports.hub.read_whole", None)  # found before every file is read
    assert "hf auth login" in complaint(capsys, "push", folder, "me/cut")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in complaint(capsys, "push", folder, "me/cut")
    assert hub.requests == []


def test_a_directory_that_is_not_whole_is_not_pushed(hub: HubServer, tmp_path: Path, capsys: Any) -> None:
    folder = sealed_checkpoint(tmp_path / "model")

    def refused() -> str:
        return complaint(capsys, "push", folder, "me/cut")

    assert "does not exist" in complaint(capsys, "push", tmp_path / "none", "me/cut")
    assert "is not a directory" in complaint(capsys, "push", folder / "config.json", "me/cut")
    whole = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors", "modeling_s5.py")}
    (folder / "README.md").write_text("changed")
    assert "README.md is damaged" in refused()
    (folder / "compressm.complete").unlink()
    config = json.loads(whole["config.json"])
    (folder / "config.json").write_text(json.dumps({**config, "state_size": 2}))
    assert "config.json" in refused()
    (folder / "config.json").write_bytes(whole["config.json"])
    (folder / "model.safetensors").write_bytes(whole["model.safetensors"][:-1])
    assert "not a whole safetensors file" in refused()
    (folder / "model.safetensors").write_bytes(whole["model.safetensors"])
    (folder / "layers_diagonal_ssm.py").unlink()  # which modeling_s5.py imports
    assert "layers_diagonal_ssm.py" in refused()
    (folder / "config.json").unlink()
    assert "has neither config.json nor adapter_config.json" in refused()
    assert hub.requests == []


def test_a_card_that_is_not_text_is_named(hub: HubServer, folder: Path, capsys: Any) -> None:
    (folder / "README.md").write_bytes("# Modèle".encode("latin-1"))
    line = complaint(capsys, "push", folder, "me/cut")
    assert f"{folder / 'README.md'} is not text in UTF-8: byte 5 is 0xe8" in line
    assert hub.requests == []


@pytest.mark.skipif(os.name == "nt", reason="names and links of POSIX")
def test_links_that_lead_out_and_names_that_no_repo_takes_are_refused(
    hub: HubServer, folder: Path, capsys: Any
) -> None:
    outside = folder.parent / "secret.json"
    fill(outside, '{"password": "hunter2"}')
    inside = folder / "tokenizer.json"
    for target in (outside, folder.parent / "absent.json"):
        inside.symlink_to(target)
        assert f"tokenizer.json leads out of {folder}" in complaint(capsys, "push", folder, "me/cut")
        inside.unlink()
    inside.symlink_to(inside)
    assert "tokenizer.json" in complaint(capsys, "push", folder, "me/cut")
    inside.unlink()
    fill(folder.parent / "figures" / "secret.png")
    (folder / "compressm_figures").symlink_to(folder.parent / "figures")
    assert "leads out of" in complaint(capsys, "push", folder, "me/cut")
    (folder / "compressm_figures").unlink()
    for name in ("new\nline.json", "\x1b[31mred.json", "back\\slash.txt", os.fsdecode(b"\xff.json")):
        fill(folder / name)
        said = complaint(capsys, "push", folder, "me/cut")
        assert "a repo does not accept such a name" in said
        assert said.isprintable()
        (folder / name).unlink()
    os.mkfifo(folder / "vocab.txt")
    assert "vocab.txt has the name of a file that is pushed, but is not a file" in complaint(
        capsys, "push", folder, "me/cut"
    )
    assert hub.requests == []


def test_odd_names_and_links_inside_are_pushed_as_they_are(hub: HubServer, folder: Path, capsys: Any) -> None:
    names = ("[bold]x[red].json", "a b#c?d%20&.txt", "größe_日本.json", "'quoted\".json", "$(x);.txt")
    for name in names:
        fill(folder / name, name)
    (folder / "vocab.txt").symlink_to(folder / names[0])
    (folder / "\x1b[31mred.log").write_text("")  # stays behind, and colours nothing
    (folder / ".git").mkdir()
    out = run(capsys, "push", folder, "me/cut")[1]
    tree = hub.repos["me/cut"].files()
    assert all(tree[name] == name.encode() for name in names)
    assert tree["vocab.txt"] == names[0].encode()
    assert "\x1b" not in out
    assert ".git/" in out
    listed = run(capsys, "push", folder, "me/cut", "--dry-run")[1]
    assert all(f"  {name}\n" in listed for name in names)


def test_a_card_that_the_hub_does_not_take_is_named(hub: HubServer, folder: Path, capsys: Any) -> None:
    (folder / "README.md").write_text("---\ntags: [unclosed\n---\n")
    said = complaint(capsys, "push", folder, "me/cut")
    assert "Invalid metadata in README.md" in said


SESSION = """
import sys
from hf_compressm.cli import main

def run(*arguments):
    try:
        main(arguments)
    except SystemExit as ended:
        assert ended.code == 0, arguments

run("push", sys.argv[1], "me/cut")
run("verify", "me/cut")
run("analyze", "me/cut", "--json", "--tolerances", "0.05")
"""


@pytest.mark.slow
def test_a_process_with_nothing_but_its_environment_pushes_and_reads_back(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", S5)
    fill(folder / "compressm_history.json")
    with serving() as server:
        printed = in_another_process(server, tmp_path, SESSION, folder)
        assert f"{server.url}/me/cut\n" in printed
        assert "is whole: S5ForCausalLM" in printed
        assert '"model": "S5ForCausalLM"' in printed
        assert server.count("GET", "/me/cut/resolve/.*/compressm_history.json") == 1
