"""Compressed models on a Hub: pushed by `push_to_hub`, loaded by id in other processes, with this package and not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaForCausalLM, PreTrainedModel

from hf_compressm import CompreSSMambaForCausalLM, CompreSSMConfig, S5ForCausalLM, compress
from tests.family_table import MAMBA, S5, Family, outputs, ssm_layers
from tests.hub_server import in_another_process, point_client_at, serving


CODE_OF_S5 = {
    "cache_diagonal_ssm.py",
    "configuration_diagonal_ssm.py",
    "configuration_s5.py",
    "heads_diagonal_ssm.py",
    "hippo.py",
    "layers_diagonal_ssm.py",
    "modeling_diagonal_ssm.py",
    "modeling_s5.py",
    "packing_diagonal_ssm.py",
}

LOADER = """
import json
import sys
from pathlib import Path

folder, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "without package":
    sys.modules["hf_compressm"] = None  # importing it now fails
else:
    import hf_compressm
import torch
from transformers import AutoModelForCausalLM, MambaForCausalLM

for path in sorted(folder.glob("*.pt")):
    saved = torch.load(path, weights_only=True)
    needs_trust = mode == "without package" and path.stem != "stock"
    options = {"trust_remote_code": True} if needs_trust else {}
    if needs_trust:
        try:
            AutoModelForCausalLM.from_pretrained(f"me/{path.stem}", trust_remote_code=False)
        except ValueError as error:
            assert "contains custom code" in str(error), error
        else:
            raise AssertionError("loaded without trust")
    model = AutoModelForCausalLM.from_pretrained(f"me/{path.stem}", **options).eval()
    home = "transformers_modules" if needs_trust else "transformers." if path.stem == "stock" else "hf_compressm"
    assert type(model).__module__.startswith(home), type(model)
    with torch.no_grad():
        torch.testing.assert_close(model(saved["tokens"]).logits, saved["logits"], rtol=1e-5, atol=1e-5)
    print(path.stem, "loaded")
"""


def compressed(family: Family) -> PreTrainedModel:
    """Half the states everywhere, by the default of the family's class."""
    model = family.build()
    assert compress(model, CompreSSMConfig(fraction=0.5), family.calibration()).changed
    return model


def uneven_mamba() -> PreTrainedModel:
    """A Mamba whose layers have sizes of their own after the cut, so that it is of this package's class."""
    model = MAMBA.build(state_size=16)
    with torch.no_grad():
        next(iter(ssm_layers(model).values())).x_proj.weight[2 + 2 : 2 + 16] *= 1e-3
    compress(model, CompreSSMConfig(tolerance=0.1, per_layer=True), MAMBA.calibration())
    return model


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Hub with three models, and a folder with what each of them computes."""
    folder = tmp_path_factory.mktemp("expected")
    models = {"stock": compressed(MAMBA), "s5": compressed(S5), "uneven": uneven_mamba()}
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        point_client_at(server, patch)
        for name, model in models.items():
            model.push_to_hub(f"me/{name}")
            tokens = MAMBA.batch()["input_ids"]
            torch.save({"tokens": tokens, "logits": outputs(model, {"input_ids": tokens})}, folder / f"{name}.pt")
        yield server, folder, models


def test_a_push_carries_the_code_that_the_model_needs_and_no_other(hub: Any) -> None:
    server, _, models = hub
    kinds = {"stock": MambaForCausalLM, "s5": S5ForCausalLM, "uneven": CompreSSMambaForCausalLM}
    assert {name: type(model) for name, model in models.items()} == kinds
    trees = {name: server.repos[f"me/{name}"].files() for name in models}
    for name, tree in trees.items():
        assert {"config.json", "model.safetensors", "README.md"} <= set(tree)
        code = {file for file in tree if file.endswith(".py")}
        auto_map = json.loads(tree["config.json"]).get("auto_map", {})
        assert {f"{target.split('.')[0]}.py" for target in auto_map.values()} <= code
        assert code == {"stock": set(), "s5": CODE_OF_S5}.get(name, code)
        assert bool(auto_map) == bool(code) == (name != "stock")
        assert len(server.repos[f"me/{name}"].commits()) == 2  # its making, and one of everything
    assert json.loads(trees["stock"]["config.json"])["state_size"] == 4
    sizes = [layer.ssm_state_size for layer in ssm_layers(models["uneven"]).values()]
    assert len(set(sizes)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["with package", "without package"])
def test_models_load_by_id_in_another_process(hub: Any, mode: str, tmp_path: Path) -> None:
    server, folder, models = hub
    server.requests.clear()
    printed = in_another_process(server, tmp_path, LOADER, folder, mode)
    assert printed.split() == [word for name in sorted(models) for word in (name, "loaded")]
    assert all(server.count("GET", f"^/me/{name}/resolve/[^/]+/model.safetensors") == 1 for name in models)
