"""Settings, records and histories of any content are accepted or refused with a ValueError, and do nothing else."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hf_compressm import CompreSSMConfig, compress
from hf_compressm.compression import check_record, recorded_cuts
from hf_compressm.compression.history import CutEvent, from_record, to_record
from hf_compressm.compression.log import scalars
from hf_compressm.loops.schedule import StableRanking
from hf_compressm.training import CompressedRun
from hf_compressm.training.recovery import RecoveryGuard
from tests.family_table import LRU


FUZZ = settings(
    max_examples=200,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = [item.name for item in fields(CompreSSMConfig)] + ["seed"]
scalar_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**400), 10**400, 2**63, 0, -1]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["auto", "largest", "skip", "0.5", "1e400", "nan", "<b>", "../x", "a\0b", "hankel"]),
)
json_values = st.recursive(
    scalar_values,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


DEEP, TANGLED = nested(50_000), ["a"] * 9
for _ in range(12):
    TANGLED = [TANGLED] * 9  # 9^13 entries, as a few aliases in YAML give them
MONSTERS = {"deep": DEEP, "tangled": TANGLED, "mapping": {1: 2, None: 3}, "long": "x" * 10**6, "huge": 10**400}


# Settings


@FUZZ
@given(st.dictionaries(st.sampled_from(NAMES), json_values, max_size=3))
def test_any_values_are_settings_or_refused(values: dict[str, Any]) -> None:
    accepted(lambda: CompreSSMConfig.from_dict(values))


def accepted(build: Callable[[], Any]) -> Any:
    """What a call returns, or None where it raises `ValueError`; anything else that is raised is a fault."""
    try:
        return build()
    except ValueError as error:
        assert len(str(error)) < 5000  # noqa: PT017 - most values are refused, some are fine
        return None


@pytest.mark.parametrize("value", MONSTERS.values(), ids=MONSTERS)
@pytest.mark.parametrize("name", NAMES)
def test_no_setting_takes_a_value_that_is_too_much(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name.replace("seed", "se")):
        CompreSSMConfig.from_dict({name: value})


@pytest.mark.parametrize("values", [{1: 2, "a": 3, None: 4}, {("a",): 1}, {"x" * 10**6: 1}, [1], "tolerance", 3, None])
def test_what_is_no_mapping_of_settings_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match=r"Unknown setting|must be a mapping"):
        CompreSSMConfig.from_dict(values)


@FUZZ
@given(
    content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), suffix=st.sampled_from([".json", ".yaml"])
)
@example(content=b"tolerance: !!timestamp x", suffix=".yaml")
@example(content=b"tolerance: !!int ''", suffix=".yaml")
@example(content=b"tolerance: !!bool x", suffix=".yaml")
@example(content=b"tolerance: !!python/object/apply:os.getcwd []", suffix=".yaml")
@example(content=b"tolerance: 2001-99-99", suffix=".yaml")
@example(content=b"? [a]\n: 1", suffix=".yaml")
@example(content=b"a: &a [*a]", suffix=".yaml")
@example(content=b"layers: &a [*a]", suffix=".yaml")
@example(content=b"[" * 50_000, suffix=".yaml")
@example(content=b"[" * 50_000, suffix=".json")
@example(content=b'{"seed": ' + b"9" * 5000 + b"}", suffix=".json")
@example(content=b"seed: " + b"9" * 5000, suffix=".yaml")
@example(content=b"1: 2\na: 3", suffix=".yaml")
def test_a_file_of_any_content_is_settings_or_refused_by_name(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"settings{suffix}"
    path.write_bytes(content)
    try:
        CompreSSMConfig.from_file(path)
    except ValueError as error:
        assert path.name in str(error)  # noqa: PT017 - any content may be accepted too
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()


def test_a_few_aliases_do_not_become_gigabytes(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path = tmp_path / "settings.yaml"
    path.write_text("\n".join([*lines, "layers: *a11"]))
    with pytest.raises(ValueError, match=r"settings\.yaml.*Unknown setting"):
        CompreSSMConfig.from_file(path)


# Records and histories


@pytest.fixture(scope="module")
def valid() -> dict[str, Any]:
    """A record of cuts, and the history of a run, as JSON gives them back."""
    model = LRU.build()
    events = [CutEvent(3, compress(model, CompreSSMConfig(target_state_size=size), step=3)) for size in (6, 4)]
    return json.loads(json.dumps({"record": model.config.compressm, "history": to_record(events)}))


def places(values: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in nested lists and dicts."""
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def at(values: Any, path: tuple) -> Any:
    for key in path:
        values = values[key]
    return values


def changed(values: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    values = copy.deepcopy(values)
    at(values, path[:-1])[path[-1]] = value
    return values


def read_record(record: Any) -> None:
    check_record(record)
    json.dumps(recorded_cuts(SimpleNamespace(compressm=record)), allow_nan=False)


def read_history(record: Any) -> None:
    for event in from_record(record):
        json.dumps([event.to_dict(), scalars(event)], allow_nan=False)


READERS = {"record": read_record, "history": read_history}
reader = pytest.mark.parametrize("kind", READERS)


@reader
def test_what_was_written_is_accepted(kind: str, valid: dict[str, Any]) -> None:
    READERS[kind](valid[kind])
    assert to_record(from_record(valid["history"])) == valid["history"]


@reader
@FUZZ
@given(value=json_values)
def test_any_value_is_a_record_or_refused(kind: str, value: Any) -> None:
    accepted(lambda: READERS[kind](value))


@reader
@settings(FUZZ, max_examples=300)
@given(data=st.data())
def test_a_record_with_any_change_is_accepted_or_refused(
    kind: str, data: st.DataObject, valid: dict[str, Any]
) -> None:
    path = data.draw(st.sampled_from(list(places(valid[kind]))))
    accepted(lambda: READERS[kind](changed(valid[kind], path, data.draw(json_values))))


@reader
def test_a_record_that_lacks_anything_is_refused(kind: str, valid: dict[str, Any]) -> None:
    for path in places(valid[kind]):
        parent = at(valid[kind], path[:-1]) if path else None
        if isinstance(parent, dict) and path[-1] not in OPTIONAL:
            without = copy.deepcopy(valid[kind])
            del at(without, path[:-1])[path[-1]]
            with pytest.raises(ValueError, match=r"config\.compressm|history"):
                READERS[kind](without)


LAYERS = ("backbone.layers.0.ssm", "backbone.layers.1.ssm")
OPTIONAL = (*LAYERS, "step", "state_bytes_before", "state_bytes_after")
"""Keys that may be absent: any of a table, the step of a cut outside training, what earlier records did not have."""


@reader
@pytest.mark.parametrize("value", [DEEP, "x" * 10**6, 10**400, math.nan, math.inf, {"a": DEEP}], ids=lambda v: type(v))
def test_values_that_are_too_much_are_refused_everywhere(kind: str, value: Any, valid: dict[str, Any]) -> None:
    for path in places(valid[kind]):
        with pytest.raises(ValueError, match=r"config\.compressm|history|Exceeds") as caught:
            READERS[kind](changed(valid[kind], path, value))
        assert len(str(caught.value)) < 2000


BAD_NAMES = [
    "<script>alert(1)</script>",
    "../../x",
    "/etc/passwd",
    "a b",
    "](http://x)",
    "| a |",
    "`x`",
    "a\nb",
    "a\0",
    "x" * 501,
]


@reader
@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name[:20]))
def test_names_with_paths_or_markup_are_refused(kind: str, name: str, valid: dict[str, Any]) -> None:
    for path in places(valid[kind]):
        parent = at(valid[kind], path[:-1]) if path else None
        if path and path[-1] in LAYERS:
            renamed = copy.deepcopy(valid[kind])
            table = at(renamed, path[:-1])
            table[name] = table.pop(path[-1])
        elif isinstance(parent, dict) and isinstance(parent[path[-1]], str) and path[-1] != "reason":
            renamed = changed(valid[kind], path, name)
        else:
            continue
        if path[-1] == "method" and name in ("a b",):
            continue
        with pytest.raises(ValueError, match=r"config\.compressm|history"):
            READERS[kind](renamed)


def test_other_entries_are_refused_where_they_would_be_copied_and_saved(valid: dict[str, Any]) -> None:
    for values in (valid["record"] | {"extra": DEEP}, valid["record"] | {"<b>": 1}):
        with pytest.raises(ValueError, match="limited to the entries"):
            check_record(values)
    record = copy.deepcopy(valid["record"])
    record["cuts"][0]["note"] = "<script>"
    with pytest.raises(ValueError, match=r"cuts\[0\].*limited to the entries"):
        check_record(record)


@pytest.mark.parametrize("count", [10_001, 100_000])
def test_endless_lists_are_refused(count: int, valid: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a list of cuts"):
        check_record(valid["record"] | {"cuts": valid["record"]["cuts"] * count})
    with pytest.raises(ValueError, match="a list of events"):
        from_record(valid["history"] | {"events": valid["history"]["events"] * count})


# What a callback goes on from


@FUZZ
@given(state=st.dictionaries(st.sampled_from(["pending", "metric_before"]), json_values))
def test_a_recovery_of_any_content_is_taken_or_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    accepted(lambda: RecoveryGuard(CompreSSMConfig()).restore(state, tmp_path))


@pytest.mark.parametrize("step", ["5/../../victim", "../victim", 5.0, True, None, [5], "5"], ids=repr)
def test_a_recovery_cannot_name_a_folder_outside_the_run(step: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "_before-cut-checkpoint-5").mkdir(parents=True)
    (tmp_path / "victim").mkdir()
    pending = {"step": step, "due": 9, "folder": f"_before-cut-checkpoint-{step}", "before": 1.0, "after": 2.0}
    guard = RecoveryGuard(CompreSSMConfig())
    with pytest.raises(ValueError, match="cannot be read"):
        guard.restore({"pending": pending | {"worse": True}}, run)
    guard.end()
    guard.clean(run)
    assert (tmp_path / "victim").is_dir()
    assert guard.pending is None


@FUZZ
@given(
    state=st.dictionaries(st.sampled_from(["scores", "correlations", "due_after", "cuts"]), json_values),
)
def test_a_ranking_of_any_content_is_taken_or_refused(state: dict[str, Any]) -> None:
    config = CompreSSMConfig(trigger="stable", end=50, interval=1)
    trigger = StableRanking(config, 100, lambda: {"a": [[1.0, 2.0]]})
    accepted(lambda: trigger.restore(state))
    trigger.observe(3)
    json.dumps(trigger.state())


@FUZZ
@given(run=st.dictionaries(st.sampled_from(["reduction_share", "recovery", "trigger"]), json_values))
def test_a_callback_state_of_any_content_is_taken_or_refused(
    run: dict[str, Any], valid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = CompressedRun(CompreSSMConfig())
    trainer = SimpleNamespace(_get_output_dir=lambda trial: str(tmp_path))
    monkeypatch.setattr(CompressedRun, "trainer", trainer)
    accepted(lambda: own.restore(valid["history"] | run))
    assert list(tmp_path.iterdir()) == []
