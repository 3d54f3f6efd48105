"""What every process of a loop of one's own does under `accelerate launch`.

    accelerate launch --cpu --num_processes 2 tests/launched_loop.py FOLDER

Each process leaves `FOLDER/rank<r>.pt` with what it saw.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_compressm import Compressor
from tests.family_table import LRU, MAMBA, Family
from tests.launched_run import leave
from tests.loop_runs import batches_of, state_of
from tests.trainers import HALVE


class Launched:
    """A loop of this process, on its part of the batches."""

    def __init__(self, accelerator: Accelerator, family: Family, settings: Any = HALVE, **kwargs: Any) -> None:
        self.accelerator = accelerator
        self.batches = batches_of(family)[accelerator.process_index :: 2]
        model = family.build().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.compressor = Compressor(self.model, settings, self.optimizer, total_steps=6, **kwargs)

    def run(self, begin: int = 0, end: int = 6) -> "Launched":
        for number in range(begin, end):
            self.accelerator.backward(self.model(**self.batches[number]).loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.compressor.step()
        return self

    def saved(self) -> dict[str, Any]:
        parts = {"compressor": self.compressor, "model": self.model, "optimizer": self.optimizer}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, saved: dict[str, Any]) -> "Launched":
        for name, state in saved.items():
            getattr(self, name).load_state_dict(state)
        return self

    def seen(self) -> dict[str, Any]:
        inner = self.accelerator.unwrap_model(self.model)
        events = self.compressor.events
        return {
            "outcomes": [event.outcome for event in events],
            "sizes": [dict(event.sizes) for event in events],
            "state": state_of(inner, self.optimizer),
        }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    found: dict[str, Any] = {}
    try:
        Compressor(MAMBA.build(), HALVE)
    except ValueError as error:
        found["refused"] = str(error)
    half = Launched(accelerator, MAMBA).run(0, 1)
    torch.save(half.saved(), folder / f"saved{rank}.pt")
    found["mamba"] = half.run(1).seen()
    saved = torch.load(folder / f"saved{rank}.pt", weights_only=True)
    found["resumed"] = Launched(accelerator, MAMBA).load(saved).run(1).seen()
    found["lru"] = Launched(accelerator, LRU, {**HALVE, "rewarmup_steps": 2}).run().seen()
    stable = {"fraction": 0.3, "trigger": "stable", "stability": -1, "stability_window": 1, "interval": 1, "end": 5}
    found["stable"] = Launched(accelerator, MAMBA, stable).run().seen()
    losses = [1.0, 1.5 + rank, 1.0]  # what one process alone would keep, the mean does not
    guarded = {**HALVE, "max_loss_increase": 0.8}
    found["guard"] = Launched(accelerator, MAMBA, guarded, held_out_loss=lambda: losses.pop(0)).run().seen()
    torch.save(found, folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
