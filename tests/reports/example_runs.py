"""Real runs for the pages of a report: small models, trained and cut, with every kind of trace."""

from pathlib import Path

from hf_compressm.compression.history import CutEvent
from tests.family_table import LRU
from tests.trainers import Examples, callback_of, trainer_of


SETTINGS = {"fraction": 0.3, "end": 6, "num_cuts": 2, "min_reduction": 0.0}
CUTS = (3, 6)
STEPS = 10


def train(folder: Path, settings: dict | None = None, **kwargs) -> list[CutEvent]:
    """Train into a folder; returns the attempts to cut."""
    often = {"max_steps": STEPS, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(LRU, folder, settings or SETTINGS, eval_dataset=Examples(LRU, 4), **{**often, **kwargs})
    trainer.train()
    trainer.save_model()
    return callback_of(trainer).events
