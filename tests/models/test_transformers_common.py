"""transformers' own common model tests on every model class of this package, with the failures that are expected.

Of 160 tests, 72 or 73 run and the others skip themselves: attention, rotary embeddings, experts, pictures and sound,
which these models do not have, and accelerators, of which the processor has none. It takes about ten seconds a class.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import transformers

from tests import tools


pytestmark = pytest.mark.slow
tools.module("parameterized")

NO_GENERATION_TESTS = {
    "test_generation_tester_mixin_inheritance": (
        "it asks for the mixin with the tests of `generate()`, which the source distribution does not have; "
        "tests/models/test_generation.py has our own"
    )
}
NO_DEPRECATION = {
    "test_bc_cache_name_forward": (
        "it asks for a deprecation warning about `cache_params`, under which `generate()` passes the cache before "
        "transformers 5.24: the name is taken without a word as long as these versions are supported"
    )
}
EXPECTED_FAILURES: dict[str, dict[str, str]] = {
    "S5Model": NO_DEPRECATION,
    "S5ForCausalLM": {**NO_DEPRECATION, **NO_GENERATION_TESTS},
    "S5ForSequenceClassification": {},
    "LRUModel": NO_DEPRECATION,
    "LRUForCausalLM": {**NO_DEPRECATION, **NO_GENERATION_TESTS},
    "LRUForSequenceClassification": {},
    "CompreSSMambaModel": {},
    "CompreSSMambaForCausalLM": NO_GENERATION_TESTS,
    "CompreSSMamba2Model": {},
    "CompreSSMamba2ForCausalLM": NO_GENERATION_TESTS,
}
LEAST_PASSED = 70  # fewer mean that tests skip themselves which ran before
RUNNER = Path(__file__).with_name("common_run.py")


@pytest.fixture(scope="module")
def common_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of transformers' tests, for the version that is installed."""
    return tools.source_of("transformers", transformers.__version__, tmp_path_factory.mktemp("source")) / "tests"


@pytest.mark.parametrize("class_name", EXPECTED_FAILURES)
def test_common_tests(class_name: str, common_tests: Path, capsys: pytest.CaptureFixture) -> None:
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}  # some tests read the log
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(RUNNER), str(common_tests), class_name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    outcomes = json.loads(run.stdout.splitlines()[-1])
    counts = Counter(outcome for outcome, _ in outcomes.values())
    with capsys.disabled():
        print(f"\n{class_name}: {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}")
    failures = {name: reason for name, (outcome, reason) in outcomes.items() if outcome == "failed"}
    assert failures.keys() == EXPECTED_FAILURES[class_name].keys(), "\n".join(failures.values())
    assert counts["passed"] >= LEAST_PASSED
