"""Runs transformers' common model tests on one class of this package and prints what became of each, as JSON.

The test files come from the source distribution of transformers, in the folder that is given:

    python tests/models/common_run.py FOLDER CLASS

The distribution holds the top of transformers' tests and not the folders below, so the mixins for `generate()` and for
exporters, which the common tests import from there, are empty here.
"""

import copy
import importlib.util
import json
import sys
import types
import unittest
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

import hf_compressm.models as own


PACKAGE = "transformers_tests"
BATCH, LENGTH, VOCABULARY, LAYERS = 3, 7, 99, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "state_size": 16,
    "num_hidden_layers": LAYERS,
    "pad_token_id": VOCABULARY - 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXER = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
FIELDS = {"CompreSSMamba2Config": MIXER}
# A cut of every layer to a size of its own, which is what these two classes are for.
CUT = {
    "CompreSSMambaConfig": {0: {"state_size": 16}, 1: {"state_size": 5}},
    "CompreSSMamba2Config": {0: {"state_size": 16}, 1: {"state_size": 5, "conv_state_size": 16}},
}


def load_common_tests(folder: Path) -> Any:
    """The module `test_modeling_common` of transformers' tests."""
    absent = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
    for name, mixin in absent.items():
        parent = name.partition(".")[0]
        for path in (PACKAGE, f"{PACKAGE}.{parent}"):
            module = sys.modules.setdefault(path, types.ModuleType(path))
            module.__path__ = []
        stub = sys.modules[f"{PACKAGE}.{name}"] = types.ModuleType(f"{PACKAGE}.{name}")
        setattr(stub, mixin, type(mixin, (), {}))
    path = folder / "test_modeling_common.py"
    specification = importlib.util.spec_from_file_location(f"{PACKAGE}.test_modeling_common", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


class Tester:
    """What transformers' `ModelTester` classes are: a small configuration and a batch."""

    is_training = True
    batch_size, seq_length, num_hidden_layers, hidden_size = BATCH, LENGTH, LAYERS, SIZES["hidden_size"]

    def __init__(self, model_class: type[PreTrainedModel]):
        self.config_class = model_class.config_class

    def get_config(self) -> Any:
        name = self.config_class.__name__
        options = copy.deepcopy({**SIZES, **FIELDS.get(name, {})})
        if name in CUT:
            options["per_layer_config"] = copy.deepcopy(CUT[name])
        return self.config_class(**options)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        tokens = torch.randint(3, VOCABULARY - 1, (BATCH, LENGTH))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_case(common: Any, model_class: type[PreTrainedModel]) -> type[unittest.TestCase]:
    """The common tests on one class."""

    class Case(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model_class,)
        has_attentions = False
        test_can_init_all_missing_weights_before_2023 = True  # run for every model, whatever year its file names

        def setUp(self) -> None:
            self.model_tester = Tester(model_class)

        def _check_caches_are_equal(self, first: Any, second: Any) -> None:
            for layer, other in zip(first.layers, second.layers, strict=True):
                for name in ("conv_states", "recurrent_states"):
                    pairs = zip(tensors_in(getattr(layer, name)), tensors_in(getattr(other, name)), strict=True)
                    assert all(torch.equal(tensor, its_other) for tensor, its_other in pairs), name

    return Case


def tensors_in(states: Any) -> list[torch.Tensor]:
    """What a layer of a cache holds under one name, a list or a dictionary."""
    return [state for state in (states.values() if isinstance(states, dict) else states) if state is not None]


def name_for_auto_classes(model_class: type[PreTrainedModel]) -> None:
    """Write the class where the common tests look up what kind of model it is."""
    for suffix, names in (
        ("ForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("ForSequenceClassification", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        ("Model", modeling_auto.MODEL_MAPPING_NAMES),
    ):
        if model_class.__name__.endswith(suffix):
            names[model_class.config_class.model_type] = model_class.__name__


class Outcomes(unittest.TestResult):
    """The outcome of every test, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, tuple[str, str]] = {}

    def _note(self, test: unittest.TestCase, outcome: str, reason: str = "") -> None:
        name = getattr(test, "test_case", test)._testMethodName  # a subtest knows its test
        self.of[name] = (outcome, reason)

    def addSuccess(self, test: Any) -> None:
        self.of.setdefault(test._testMethodName, ("passed", ""))

    def addSkip(self, test: Any, reason: str) -> None:
        self._note(test, "skipped", reason)

    def addFailure(self, test: Any, error: Any) -> None:
        self._note(test, "failed", self._exc_info_to_string(error, test))

    def addError(self, test: Any, error: Any) -> None:
        self._note(test, "failed", self._exc_info_to_string(error, test))

    def addSubTest(self, test: Any, subtest: Any, error: Any) -> None:
        if error is not None:
            self._note(test, "failed", self._exc_info_to_string(error, test))


def main(folder: str, class_name: str) -> None:
    """Run the tests and print the outcomes."""
    warnings.simplefilter("default")  # the tests look for some of them
    model_class = getattr(own, class_name)
    name_for_auto_classes(model_class)
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(test_case(load_common_tests(Path(folder)), model_class))
    outcomes = Outcomes()
    suite.run(outcomes)
    print(json.dumps(outcomes.of))


if __name__ == "__main__":
    main(*sys.argv[1:])
