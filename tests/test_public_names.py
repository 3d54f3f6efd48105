"""Public names are imported when they are asked for, and the command line answers before torch is."""

import ast
import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import hf_compressm
from hf_compressm.cli.app import app


LAZY = ("hf_compressm", "hf_compressm.data")
COMMANDS = ["", *(command.name for command in app.registered_commands)]


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", LAZY)
def test_every_public_name_is_there_and_known_to_type_checkers(package: str):
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    checked = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert checked == set(module.__all__) == set(module.__all__) & set(dir(module))
    for name in module.__all__:
        assert getattr(module, name).__doc__ or name.isupper()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018 - the access is what is tested


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_neither_torch_nor_transformers(command: str):
    code = """
        import sys
        from hf_compressm.cli import main
        try:
            main([*sys.argv[1:], "--help"])
        except SystemExit as ended:
            assert ended.code == 0
        heavy = {"torch", "transformers", "accelerate", "numpy", "scipy", "huggingface_hub"} & set(sys.modules)
        assert not heavy, heavy
    """
    printed = run(code, *command.split())
    assert "Usage" in printed


def test_the_package_alone_imports_no_trainer():
    run("import sys, hf_compressm; assert 'torch' not in sys.modules and 'transformers' not in sys.modules")
    run("import sys; from hf_compressm import CompreSSMConfig; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("first", ["hf_compressm", pytest.param("transformers", marks=pytest.mark.slow)])
def test_model_types_are_known_in_whichever_order_the_packages_are_imported(first: str, tmp_path: Path):
    config = hf_compressm.LRUConfig(vocab_size=8, hidden_size=4, state_size=4)
    hf_compressm.LRUForCausalLM(config).save_pretrained(tmp_path)
    code = """
        import importlib.util, pickle, sys
        importlib.import_module(sys.argv[1])
        import hf_compressm
        importlib.util.find_spec("transformers.models.auto.configuration_auto")  # looks and imports nothing
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        assert "hf_compressm.models" not in sys.modules
        assert {"s5", "lru", "compressm_mamba", "compressm_mamba2", "mamba"} <= set(CONFIG_MAPPING.keys())
        if sys.argv[1] == "transformers":
            copied = pickle.loads(pickle.dumps(CONFIG_MAPPING))
            assert copied["s5"].__name__ == "S5Config"
        assert type(AutoModelForCausalLM.from_pretrained(sys.argv[2])).__name__ == "LRUForCausalLM"
        assert [key for key in CONFIG_MAPPING.keys()].count("lru") == 1
        hf_compressm.compress
        assert "transformers.trainer" not in sys.modules
    """
    run(code, first, tmp_path)
