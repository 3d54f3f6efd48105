"""What the reader of a page has at hand before its first block."""

from typing import Any

import torch
from transformers import MambaConfig, MambaForCausalLM, TrainingArguments


HUB_ID = "state-spaces/mamba-130m-hf"


def at_hand(**arguments: Any) -> dict[str, Any]:
    """A small model, also under its Hub id (here a folder below the current one), data, and training arguments.

    Args:
        **arguments: of `TrainingArguments`, besides those that keep a run small.
    """
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=16, num_hidden_layers=2))
    model.save_pretrained(HUB_ID)
    tokens = torch.randint(1, 64, (48, 16))
    examples = [{"input_ids": row, "labels": row} for row in tokens]
    small = {"max_steps": 40, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "report_to": []}
    args = TrainingArguments("run", **{**small, **arguments})
    return {"model": model, "args": args, "train": examples, "dev": examples[:8], "calibration": tokens.split(8)}
