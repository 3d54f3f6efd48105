"""What both processes of a test under FSDP2 do: train, or go on from a checkpoint with a model that was built anew.

    torchrun --standalone --nproc_per_node 2 tests/fsdp_run.py FOLDER FAMILY STATE_DICT_TYPE [CHECKPOINT]

Process 0 leaves the losses in `FOLDER/losses.json`, and the weights that the run ends with in `FOLDER/weights.pt`.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer

from hf_compressm.checkpoints import read_saved
from tests.family_table import LRU, MAMBA, S5, perturbed
from tests.launched_run import leave
from tests.trainers import Examples, arguments


BLOCKS = {"lru": (LRU, "LRUBlock"), "mamba": (MAMBA, "MambaBlock"), "s5": (S5, "S5Block")}
RUN = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "lr_scheduler_type": "cosine"}


def main(folder: Path, name: str, kind: str, checkpoint: Path | None) -> None:
    family, block = BLOCKS[name]
    torch.manual_seed(0)
    # the weights that it has must not be those of the checkpoint, so that loading is what is tested
    model = family.build() if checkpoint is None else perturbed(read_saved(checkpoint).load())
    settings = {"version": 2, "state_dict_type": kind, "transformer_layer_cls_to_wrap": [block]}
    args = arguments(folder, fsdp=True, fsdp_config=settings, **RUN)
    assert args.device.type == "cpu"  # this sets up the processes, for what accelerate calls MULTI_CPU
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # of which alone it makes FSDP
    trainer = Trainer(model, args, train_dataset=Examples(family))
    assert trainer.is_fsdp_enabled
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = get_model_state_dict(trainer.model_wrapped, options=StateDictOptions(full_state_dict=True))
    if args.process_index == 0:
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        (folder / "losses.json").write_text(json.dumps(losses))
        torch.save(weights, folder / "weights.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]) if len(sys.argv) > 4 else None)
