"""What goes out with a cut model: its history, the pictures of its cuts, and a model card that explains them.

A Trainer's `save_model` and `push_to_hub` write weights and a card of their own, and its pushes during training copy a
fixed list of files. So the methods by which it saves a model and writes a card are stood in front of, and
`on_push_begin` completes the directory that is about to be pushed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from hf_compressm.adapters import underlying
from hf_compressm.durable import write_text
from hf_compressm.history import CutEvent
from hf_compressm.pace import machine
from hf_compressm.reporting.cards import (
    CARD_FILE,
    FIGURES_FOLDER,
    CardFacts,
    is_by_hand,
    with_metadata_of,
    write_card,
)
from hf_compressm.reporting.pictures import Picture, draw_pictures
from hf_compressm.reporting.runs import Run, finite_entries


logger = logging.get_logger(__name__)

_FILE_FORMATS = ("csv", "json", "pandas", "parquet", "text", "generator")
"""What `datasets` calls data that were read from files, and that have no name of their own."""


class Publisher:
    """Stands in front of a Trainer's methods that save a model and write its card, once for each Trainer.

    Args:
        trainer: whose methods are stood in front of.
        events: gives the run's attempts to cut.
        write_traces: writes history and log into a directory.
    """

    def __init__(
        self, trainer: Trainer, events: Callable[[], list[CutEvent]], write_traces: Callable[[Path], None]
    ) -> None:
        """Take the Trainer's methods."""
        self.trainer = trainer
        self.events = events
        self.write_traces = write_traces
        self._drawn: tuple[Any, list[Picture]] = (None, [])
        self._save_model: Callable[..., None] = trainer.save_model
        self._create_model_card: Callable[..., None] = trainer.create_model_card
        vars(trainer).update(save_model=self.save_model, create_model_card=self.create_model_card)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the Trainer does; beside a model that was cut, what explains it."""
        self._save_model(output_dir, _internal_call)
        if not _internal_call:  # a checkpoint, or a push that writes a card in its turn
            self.publish(Path(output_dir) if output_dir else self._output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Let the Trainer write its card, keep what a person wrote, and put in what the cuts were."""
        path = self._output_dir / CARD_FILE
        before = _read(path)
        self._create_model_card(*args, **kwargs)
        card = _read(path)
        if card is None or not self._has_something_to_tell():
            return
        by_hand = before is not None and is_by_hand(before)
        if before is not None and by_hand:
            card = with_metadata_of(before, card)
        _without_failing(lambda: write_text(path, write_card(self._run(), self._facts(path.parent), card, by_hand)))

    def publish(self, folder: Path) -> None:
        """Write history, pictures, card and code into the directory of a model that was cut.

        What fails is warned of: a trained model must not be lost over it.
        """
        if self._has_something_to_tell():
            _without_failing(lambda: self._write(folder))

    def _write(self, folder: Path) -> None:
        """All that explains the model."""
        folder.mkdir(parents=True, exist_ok=True)
        self.write_traces(folder)
        model = underlying(self.trainer.model)
        if isinstance(model, PreTrainedModel) and model.is_remote_code():
            custom_object_save(model, folder)  # a push during training copies the weights alone
        path = folder / CARD_FILE
        write_text(path, write_card(self._run(), self._facts(folder), _read(path)))

    @property
    def _output_dir(self) -> Path:
        return Path(self.trainer.args.output_dir or ".")

    def _has_something_to_tell(self) -> bool:
        cut = any(event.outcome == "cut" for event in self.events())
        return self.trainer.args.should_save and bool(cut or self._run().record)

    def _run(self) -> Run:
        """The run so far."""
        trainer, model = self.trainer, underlying(self.trainer.model)
        config = model.config.to_dict() if isinstance(model, PreTrainedModel) else {}
        return Run(
            name=self._output_dir.resolve().name,
            events=tuple(self.events()),
            log=tuple(finite_entries(trainer.state.log_history)),
            config=config | {"architectures": [type(model).__name__]},
            steps=trainer.state.global_step,
            machine=machine(),
        )

    def _facts(self, folder: Path) -> CardFacts:
        """What the card says beside the run; draws the pictures that it shows."""
        trainer = self.trainer
        repo_id, started_from = getattr(trainer, "hub_model_id", None), _started_from(underlying(trainer.model))
        return CardFacts(
            name=repo_id.split("/")[-1] if repo_id else folder.resolve().name,
            repo_id=repo_id,
            base_model=started_from,
            datasets=_dataset_names(trainer.train_dataset),
            pictures=self._draw(folder / FIGURES_FOLDER),
        )

    def _draw(self, folder: Path) -> list[Picture]:
        """The pictures of the run, drawn anew when there is something new; none without matplotlib."""
        of_now = (folder.resolve(), self.trainer.state.global_step, len(self.events()))
        if self._drawn[0] != of_now:
            try:
                self._drawn = (of_now, draw_pictures(self._run(), folder))
            except ImportError as error:
                logger.warning_once(f"The model card has no pictures. {error}")
                self._drawn = (of_now, [])
        return self._drawn[1]


def watch_publishing(
    trainer: Trainer, events: Callable[[], list[CutEvent]], write_traces: Callable[[Path], None]
) -> Publisher:
    """The publisher that stands in front of a Trainer's methods, put there by the first call."""
    publisher = getattr(trainer.save_model, "__self__", None)
    if not isinstance(publisher, Publisher):
        return Publisher(trainer, events, write_traces)
    publisher.events, publisher.write_traces = events, write_traces
    return publisher


def _without_failing(write: Callable[[], object]) -> None:
    """Do it, or warn that it could not be done."""
    try:
        write()
    except Exception as error:  # of files, plots and templates: no training run is to end over them
        logger.warning(f"What explains the cuts could not be written beside the model: {error}")


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _started_from(model: Any) -> str | None:
    """Id on the Hub of the model that training began with; None for a new model, or one from a directory."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return name if name and not Path(name).exists() else None


def _dataset_names(dataset: Any) -> list[str]:
    """What the training data are called, where they say so themselves."""
    name = getattr(dataset, "builder_name", None)
    return [name] if isinstance(name, str) and name not in _FILE_FORMATS else []
