"""Settings: what is refused, and that files and the command line give back what was written."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import HfArgumentParser

from hf_compressm import CompreSSMConfig
from hf_compressm.config import DEFAULT_TOLERANCE, RANK_RULES, as_config


EVERYTHING: dict[str, Any] = {
    "target_state_size": 12,
    "criterion": "empirical",
    "keep": "random",
    "realization": "complex",
    "per_layer": False,
    "round_to": 4,
    "sizes": [8, 12, 24],
    "min_state_size": 2,
    "min_reduction": 0.1,
    "layers": ["layers.0.*", "mixer"],
    "ignore_layers": ["head"],
    "start": 5,
    "end": 0.25,
    "num_cuts": 3,
    "interval": 7,
    "calibration_batches": 2,
    "sampling_seed": 3,
    "rewarmup_steps": 9,
    "optimizer_state": "reset",
    "on_nonfinite": "raise",
}


def test_every_setting_has_a_help_text() -> None:
    assert all(len(item.metadata.get("help", "")) > 10 for item in fields(CompreSSMConfig))


def test_the_default_rule_is_the_tolerance_and_no_other_is_set() -> None:
    config = CompreSSMConfig()
    assert config.tolerance == DEFAULT_TOLERANCE
    assert config.rank_rule == "tolerance"
    assert all(getattr(config, name) is None for name in RANK_RULES[1:])


@pytest.mark.parametrize(
    ("rule", "value"), [("tolerance", 0.0), ("max_error", 0.2), ("fraction", 0.5), ("target_state_size", 4)]
)
def test_each_rule_stands_alone(rule: str, value: float) -> None:
    config = CompreSSMConfig(**{rule: value})
    assert config.rank_rule == rule
    assert sum(getattr(config, name) is not None for name in RANK_RULES) == 1


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_a_file_gives_back_what_was_written(tmp_path: Path, suffix: str, settings: dict) -> None:
    path = tmp_path / f"settings{suffix}"
    CompreSSMConfig(**settings).to_file(path)
    assert CompreSSMConfig.from_file(path) == CompreSSMConfig(**settings)
    assert CompreSSMConfig.from_dict(CompreSSMConfig(**settings).to_dict()) == CompreSSMConfig(**settings)


def test_the_command_line_reaches_every_kind_of_field() -> None:
    words = "--max_error 0.3 --per_layer no --layers layers.0 layers.1 "
    words += "--interval 5 --start 0.1 --round_to 4 --sizes 12,8 --keep random"
    (config,) = HfArgumentParser(CompreSSMConfig).parse_args_into_dataclasses(words.split())
    assert config.max_error == 0.3
    assert config.tolerance is None
    assert config.per_layer is False
    assert config.layers == ("layers.0", "layers.1")
    assert config.sizes == (8, 12)
    assert (config.interval, config.start, config.round_to, config.keep) == (5, 0.1, 4, "random")


def test_the_command_line_without_words_gives_the_defaults() -> None:
    (config,) = HfArgumentParser(CompreSSMConfig).parse_args_into_dataclasses([])
    assert config == CompreSSMConfig()


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_the_parser_reads_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"settings{suffix}"
    path.write_text(json.dumps(EVERYTHING) if suffix == ".json" else yaml.safe_dump(EVERYTHING), encoding="utf-8")
    parser = HfArgumentParser(CompreSSMConfig)
    (config,) = parser.parse_json_file(str(path)) if suffix == ".json" else parser.parse_yaml_file(str(path))
    assert config == CompreSSMConfig(**EVERYTHING)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"tolerence.*tolerance"):
        CompreSSMConfig.from_dict({"tolerence": 0.1})


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "0", "plain words"])
def test_a_file_without_a_mapping_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"settings\.yaml"):
        CompreSSMConfig.from_file(path)


@pytest.mark.parametrize(
    "two",
    [
        {"tolerance": 0.1, "fraction": 0.5},
        {"max_error": 0.1, "target_state_size": 4},
        {"tolerance": 0.0, "max_error": 0.0},
    ],
)
def test_two_rank_rules_are_refused_with_both_names(two: dict) -> None:
    with pytest.raises(ValueError, match=r".*".join(f"{name}={value}" for name, value in two.items())):
        CompreSSMConfig(**two)


NAN, INF = float("nan"), float("inf")
BAD_VALUES: list[tuple[str, Any]] = [
    *[("tolerance", value) for value in (-0.1, 1, 1.0, 2, NAN, INF, "0.1", True, [0.1])],
    *[("max_error", value) for value in (-1, NAN, INF, "a", False)],
    *[("fraction", value) for value in (0, 1, -0.5, NAN, "half", True)],
    *[("target_state_size", value) for value in (0, -3, 2.5, True, NAN, INF, "many", "3", [3])],
    *[("round_to", value) for value in (0, -1, 1.5, True, None, "a")],
    *[("sizes", value) for value in (0, -64, 1.5, True, "", "many", "64;96", "64,", [], [64, 0], [None], ["serving"])],
    *[("min_state_size", value) for value in (0, True, None, 2.5)],
    *[("num_cuts", value) for value in (0, -1, 1.5, NAN, None)],
    *[("calibration_batches", value) for value in (0, 0.5, None)],
    *[("rewarmup_steps", value) for value in (-1, 0.5, None)],
    *[("min_reduction", value) for value in (-0.1, 1, NAN, None)],
    *[("start", value) for value in (-1, NAN, INF, "0", True, None)],
    *[("end", value) for value in (0, -1, NAN, INF, True, None)],
    *[("interval", value) for value in (0, -2, NAN, INF, "5")],
    *[("sampling_seed", value) for value in (None, 0.5, "a", True)],
    *[("per_layer", value) for value in ("yes", 1, 0)],
    *[("layers", value) for value in ("layers.0", 3, [3])],
    *[("ignore_layers", value) for value in ("layers.0", 3, [None])],
    *[(name, value) for name in ("criterion", "keep", "realization", "trigger") for value in ("best", None, 3, "")],
    *[(name, value) for name in ("optimizer_state", "on_nonfinite") for value in ("drop", None, True, [])],
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=[f"{name}={value!r}" for name, value in BAD_VALUES])
def test_a_bad_value_is_named_with_its_setting(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} ") as caught:
        CompreSSMConfig(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["target_state_size", "num_cuts", "calibration_batches", "round_to"])
def test_a_whole_number_from_a_file_is_an_integer(name: str) -> None:
    assert type(getattr(CompreSSMConfig(**{name: 4.0}), name)) is int


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ("serving", (64, 96, 128, 256)),
        ("96, 64", (64, 96)),
        ([96, 64, 96], (64, 96)),
        (np.array([64, 96]), (64, 96)),
        (64, (64,)),
        (["64", 96.0], (64, 96)),
    ],
)
def test_sizes_are_a_word_text_or_numbers_and_end_as_numbers(given: Any, sizes: tuple[int, ...]) -> None:
    config = CompreSSMConfig(sizes=given)
    assert config.sizes == sizes
    assert all(type(size) is int for size in config.sizes)
    assert config.to_dict()["sizes"] == list(sizes)
    assert replace(config, num_cuts=2).sizes == sizes


@pytest.mark.parametrize("other", [{"round_to": 128}, {"min_state_size": 97}, {"round_to": 64, "min_state_size": 65}])
def test_sizes_of_which_the_other_settings_leave_none_are_refused(other: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"sizes=\(64, 96\) .*round_to=.*min_state_size=.*Add one"):
        CompreSSMConfig(sizes=[64, 96], **other)


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("target_state_size", 2, "replace(config, tolerance=None, target_state_size=2)"),
        ("tolerance", 5.0, "replace(config, tolerance=5.0)"),
        ("num_cuts", 2, "replace(config, num_cuts=2)"),
        ("layers", ["a"], "replace(config, layers=['a'])"),
    ],
)
def test_a_setting_cannot_be_changed_and_the_error_says_how_to_make_new_ones(
    name: str, value: Any, way_out: str
) -> None:
    config = CompreSSMConfig()
    with pytest.raises(FrozenInstanceError) as caught:
        setattr(config, name, value)
    assert way_out in str(caught.value)
    with pytest.raises(FrozenInstanceError, match=name):
        delattr(config, name)
    assert config == CompreSSMConfig()


def test_a_misspelt_setting_is_not_set_without_a_word() -> None:
    with pytest.raises(FrozenInstanceError, match=r"no setting 'tolerence'; known are .*'tolerance'"):
        CompreSSMConfig().tolerence = 0.2  # type: ignore[attr-defined]


def test_replaced_settings_are_checked() -> None:
    config = replace(CompreSSMConfig(layers=["layers.0"]), tolerance=None, target_state_size=2)
    assert (config.rank_rule, config.target_state_size, config.layers) == ("target_state_size", 2, ("layers.0",))
    assert replace(config, seed=7).sampling_seed == 7
    with pytest.raises(ValueError, match="target_state_size must be a whole number"):
        replace(config, target_state_size=0)


def test_a_list_that_its_owner_changes_later_changes_no_setting() -> None:
    names = ["layers.0"]
    config = CompreSSMConfig(layers=names)
    names.append("layers.1")
    assert config.layers == ("layers.0",)
    assert config.to_dict()["layers"] == ["layers.0"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal_and_cannot_be_changed_either(copied: Any) -> None:
    config = copied(CompreSSMConfig(**EVERYTHING))
    assert config == CompreSSMConfig(**EVERYTHING)
    assert CompreSSMConfig(**asdict(config)) == CompreSSMConfig(**vars(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.num_cuts = 1


def test_a_dataclass_may_extend_the_settings() -> None:
    @dataclass
    class Arguments(CompreSSMConfig):
        note: str = ""

    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(["--note", "x", "--num_cuts", "2"])
    assert (arguments.note, arguments.num_cuts) == ("x", 2)
    with pytest.raises(FrozenInstanceError, match="note cannot be changed"):
        arguments.note = "y"


class Keep(str, Enum):
    SMALLEST = "smallest"


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("tolerance", np.float64(0.25), 0.25),
        ("tolerance", np.float32(0.25), 0.25),
        ("fraction", torch.tensor(0.5), 0.5),
        ("target_state_size", np.int64(4), 4),
        ("num_cuts", np.uint8(3), 3),
        ("start", np.array(2), 2),
        ("sampling_seed", torch.tensor(7), 7),
        ("per_layer", np.bool_(True), True),
        ("save_around_cuts", np.bool_(False), False),
        ("keep", np.str_("random"), "random"),
        ("keep", Keep.SMALLEST, "smallest"),
        ("layers", [np.str_("layers.0")], ("layers.0",)),
        ("tolerance", "1e-2", 0.01),
        ("tolerance", "1.5E-1", 0.15),
        ("num_cuts", "1e1", 10),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_numbers_of_numpy_torch_and_yaml_are_plain_settings(
    name: str, value: Any, plain: Any, suffix: str, tmp_path: Path
) -> None:
    config = CompreSSMConfig(**{name: value})
    kept = getattr(config, name)
    assert (kept, type(kept)) == (plain, type(plain))
    config.to_file(tmp_path / f"settings{suffix}")
    assert CompreSSMConfig.from_file(tmp_path / f"settings{suffix}") == config


@pytest.mark.parametrize("value", [np.array([1, 2]), np.float64("nan"), np.int64(0), "1e-2x", "1e999", "0x1"])
def test_what_is_no_number_is_still_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="target_state_size must be a whole number"):
        CompreSSMConfig(target_state_size=value)


def test_yaml_reads_numbers_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "cuts.yaml").write_text("tolerance: 1e-2\nend: 2e3\nmin_reduction: .5\n", encoding="utf-8")
    config = CompreSSMConfig.from_file(tmp_path / "cuts.yaml")
    assert (config.tolerance, config.end, config.min_reduction) == (0.01, 2000, 0.5)
    (parsed,) = HfArgumentParser(CompreSSMConfig).parse_yaml_file(str(tmp_path / "cuts.yaml"))
    assert parsed == config


@pytest.mark.parametrize("text", ["", " \n", "# tolerance: 0.2\n", "\ufeff", "null"])
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_without_settings_gives_the_defaults(text: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"settings{suffix}"
    path.write_text("" if text.startswith("#") and suffix == ".json" else text, encoding="utf-8")
    assert CompreSSMConfig.from_file(path) == CompreSSMConfig()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_in_another_encoding_is_read_or_named(encoding: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"settings{suffix}"
    path.write_text('{"layers": ["schön"]}', encoding=encoding)
    if encoding == "utf-8-sig":
        assert CompreSSMConfig.from_file(path).layers == ("schön",)
    else:
        with pytest.raises(ValueError, match=rf"settings\{suffix} is not text in UTF-8: byte \d+ is 0x.. ?.*convert"):
            CompreSSMConfig.from_file(path)


def test_settings_in_any_form_are_the_same(tmp_path: Path) -> None:
    config = CompreSSMConfig(**EVERYTHING)
    config.to_file(tmp_path / "cuts.yaml")
    forms = (config, config.to_dict(), tmp_path / "cuts.yaml", str(tmp_path / "cuts.yaml"))
    assert all(as_config(form) == config for form in forms)
    assert as_config(None) == as_config({}) == CompreSSMConfig()


@pytest.mark.parametrize("value", [0.1, [0.1], CompreSSMConfig, True, b"cuts.yaml"])
def test_what_holds_no_settings_is_refused_with_what_to_write(value: Any) -> None:
    with pytest.raises(ValueError, match=r"a mapping such as \{'tolerance': 0.1\}.*; got "):
        as_config(value)
