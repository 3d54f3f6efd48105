"""Settings: what is refused, and that files and the command line give back what was written."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser

from hf_compressm import CompreSSMConfig
from hf_compressm.config import DEFAULT_TOLERANCE, RANK_RULES


EVERYTHING: dict[str, Any] = {
    "target_state_size": 12,
    "criterion": "empirical",
    "keep": "random",
    "realization": "complex",
    "per_layer": False,
    "round_to": 4,
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
    words += "--interval 5 --start 0.1 --round_to 4 --keep random"
    (config,) = HfArgumentParser(CompreSSMConfig).parse_args_into_dataclasses(words.split())
    assert config.max_error == 0.3
    assert config.tolerance is None
    assert config.per_layer is False
    assert config.layers == ["layers.0", "layers.1"]
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


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "", "plain words"])
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
