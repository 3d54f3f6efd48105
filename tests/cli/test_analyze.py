"""`hf-compressm analyze` as a user would try it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress, plan_compression
from hf_compressm.compression import compare_tolerances, count_state_bytes
from tests.caches import cache_of
from tests.cli.running import complaint, run
from tests.family_table import (
    LRU,
    MAMBA,
    MAMBA2,
    MAMBA_FAMILIES,
    STATE_SIZE,
    Family,
    each,
    family_id,
    same,
    snapshot,
    token_batch,
)


def save(family: Family, folder: Path) -> Path:
    family.build().save_pretrained(folder)
    return folder


def test_a_table_and_a_picture(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model, picture = save(LRU, tmp_path / "model"), tmp_path / "pictures" / "spectra.png"
    code, out, _ = run(capsys, "analyze", model, "--tolerances", "0.3,0.05", "--plot", picture)
    assert code == 0
    assert "0.05" in out.split("0.3")[0]  # in ascending order
    assert "parameters" in out
    assert "state bytes" in out
    assert max(map(len, out.splitlines())) <= max(80, len(f"Drawn in {picture}."))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_has_what_the_cut_then_does(tmp_path: Path, capsys: Any) -> None:
    model = save(LRU, tmp_path / "model")
    code, out, _ = run(capsys, "analyze", model, "--tolerances", "0.1", "--json")
    found = json.loads(out)
    (cut,) = found["tolerances"]
    assert code == 0
    assert len(cut["layers"][0]["hankel_singular_values"]) == 2 * STATE_SIZE
    arguments = ("compress", model, "--output", tmp_path / "small", "--tolerance", 0.1, "--json")
    done = json.loads(run(capsys, *arguments)[1])
    assert cut["parameters"] == done["parameters_after"] < found["parameters"]
    assert {layer["name"]: layer["new_state_size"] for layer in cut["layers"]} == done["state_sizes_after"]
    assert json.loads(run(capsys, "analyze", tmp_path / "small", "--json")[1])["state_bytes"] == cut["state_bytes"]


def test_serving_is_a_second_table(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model = save(MAMBA2, tmp_path / "model")
    arguments = ("analyze", model, "--tolerances", "0.2,0.9", "--calibration-batches", 1)
    monkeypatch.setattr("hf_compressm.cli.inputs.calibration_batches", lambda *_: MAMBA2.calibration())
    assert "moved for a token" not in run(capsys, *arguments)[1]
    for given in (("--serving",), ("--memory", "1MiB")):
        out = run(capsys, *arguments, *given)[1]
        for row in ("state of a sequence", "convolution", "8 bits", "moved for a token", "attention layers"):
            assert row in out
        assert f"sequences in {'1 MiB' if 'MiB' in given[-1] else '40 GiB'}" in out
        assert max(map(len, out.splitlines())) <= 80
    found = json.loads(run(capsys, *arguments, "--memory", "1MiB", "--json")[1])
    before, after = (place["serving"]["cache"]["float32"] for place in (found, found["tolerances"][1]))
    assert before["state_bytes"] == found["state_bytes"]
    assert after["state_bytes"] == found["tolerances"][1]["state_bytes"] < before["state_bytes"]
    assert before["sequences"] == 2**20 // (before["state_bytes"] + before["convolution_bytes"]) < after["sequences"]
    assert "such as 40GiB or 80GB" in complaint(capsys, *arguments, "--memory", "much")


def test_settings_come_from_a_file_too_and_quiet_is_quiet(tmp_path: Path, capsys: Any) -> None:
    model = save(LRU, tmp_path / "model")
    (tmp_path / "cuts.yaml").write_text("min_state_size: 6\ntolerance: 0.3\n")  # its rank rule is not used here
    arguments = ("analyze", model, "--tolerances", "0.9", "--config", tmp_path / "cuts.yaml")

    def sizes(*more: object) -> set[int]:
        layers = json.loads(run(capsys, *arguments, "--json", *more)[1])["tolerances"][0]["layers"]
        return {layer["new_state_size"] for layer in layers}

    assert sizes() == {6}
    assert sizes("--min-state-size", 5) == {5}
    assert run(capsys, *arguments, "--quiet", "--plot", tmp_path / "plot.png")[:2] == (0, "")
    assert (tmp_path / "plot.png").exists()


def test_sizes_are_numbers_with_commas_or_a_word(tmp_path: Path, capsys: Any) -> None:
    model = save(LRU, tmp_path / "model")

    def sizes(given: object) -> set[int]:
        out = run(capsys, "analyze", model, "--tolerances", "0.9", "--sizes", given, "--json")[1]
        return {layer["new_state_size"] for layer in json.loads(out)["tolerances"][0]["layers"]}

    assert sizes("5,7") == sizes(5) == {5}
    assert sizes("serving") == {STATE_SIZE}
    assert "sizes must be a list of whole numbers" in complaint(capsys, "analyze", model, "--sizes", "many")


def test_switches_take_true_and_false(tmp_path: Path, capsys: Any) -> None:
    model = save(LRU, tmp_path / "model")
    assert run(capsys, "analyze", model, "--per-layer", "False")[0] == 0
    assert "'maybe' is neither true nor false" in complaint(capsys, "analyze", model, "--per-layer", "maybe")


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, capsys: Any) -> None:
    model = save(MAMBA, tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert f"The tokenizer of {model} cannot be read" in complaint(capsys, "analyze", model)


@pytest.mark.parametrize("family", each(), ids=family_id)
def test_every_tolerance_is_planned_as_by_itself_and_counted_as_cut(family: Family) -> None:
    model = family.build()
    before = snapshot(model)
    data, tolerances = family.calibration(), [0.02, 0.4]
    found = compare_tolerances(model, tolerances, CompreSSMConfig(fraction=0.5, min_reduction=0.0), data)
    assert same(snapshot(model), before)
    for tolerance, alternative in zip(tolerances, found, strict=True):
        settings = CompreSSMConfig(tolerance=tolerance, min_reduction=0.0)
        alone = plan_compression(model, settings, data)
        sizes = [layer.new_state_size for layer in alone.layers]
        assert [layer.new_state_size for layer in alternative.plan.layers] == sizes
        cut = family.build()
        compress(cut, settings, data)
        assert alternative.parameters == sum(parameter.numel() for parameter in cut.parameters())
        assert alternative.state_bytes == count_state_bytes(cut)


@pytest.mark.parametrize("family", MAMBA_FAMILIES, ids=family_id)
def test_bytes_of_state_are_those_of_a_cache(family: Family) -> None:
    model = family.build()
    with torch.no_grad():
        cache = cache_of(model(**token_batch(1, 4), use_cache=True))
    states: list[torch.Tensor] = []
    for layer in cache.layers:
        held = getattr(layer, "recurrent_states", None)
        states += list(held.values()) if isinstance(held, dict) else [held] if isinstance(held, torch.Tensor) else []
    assert count_state_bytes(model) == 4 * sum(state.numel() for state in states)


def test_mistakes_are_one_line(tmp_path: Path, capsys: Any) -> None:
    model = save(MAMBA, tmp_path / "model")
    assert "--train-file" in complaint(capsys, "analyze", model)
    assert "takes numbers with commas" in complaint(capsys, "analyze", model, "--tolerances", "0.1;0.2")
    assert "neither a directory nor an id" in complaint(capsys, "analyze", tmp_path / "nothing")
    other = save(LRU, tmp_path / "other")
    assert "tolerance must lie in" in complaint(capsys, "analyze", other, "--tolerances", "0.1,2")
    assert "No such option" in complaint(capsys, "analyze", other, "--tolerance", "0.1")


def test_what_cannot_be_measured_says_why(tmp_path: Path, capsys: Any) -> None:
    model = LRU.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("C_re", "C_im")):
                parameter.zero_()
    model.save_pretrained(tmp_path)
    out = run(capsys, "analyze", tmp_path)[1]
    assert "cannot be cut: no output energy" in out


def test_a_picture_that_cannot_be_written_is_found_before_any_work(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_compressm.cli.inputs.local_directory", None)
    (tmp_path / "file").touch()
    for place, reason in {
        tmp_path / "spectra.xyz": "does not say what kind of image it is: end it with ",
        tmp_path / "spectra": "does not say what kind of image it is",
        tmp_path: "is not a file that may be written over",
        tmp_path / "file" / "a.png": "Not a directory",
        "/proc/a.png": "cannot be written",
    }.items():
        assert reason in complaint(capsys, "analyze", tmp_path, "--plot", place), place
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
