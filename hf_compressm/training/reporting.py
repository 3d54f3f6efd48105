"""What is saved beside a cut model: its history, the pictures of its cuts, and a model card that explains them.

A Trainer's `save_model` and `push_to_hub` write weights and a card of their own, and its pushes during training copy a
fixed list of files. So the methods by which it saves a model and writes a card are wrapped, and `on_push_begin`
completes the directory that is about to be pushed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from hf_compressm.compression.history import CutEvent
from hf_compressm.files.atomic import write_text
from hf_compressm.files.names import CARD_FILE, FIGURES_FOLDER
from hf_compressm.peft import underlying
from hf_compressm.reports.card import CardFacts, is_by_hand, with_metadata_of, without_section, write_card
from hf_compressm.reports.pictures import Picture, draw_pictures
from hf_compressm.reports.traces import Run, finite_entries
from hf_compressm.training.clock import machine
from hf_compressm.training.trainer import output_folder, wrap_methods


logger = logging.get_logger(__name__)

_FILE_FORMATS = ("csv", "json", "pandas", "parquet", "text", "generator")
"""The names that `datasets` gives to data that were read from files and have no name of their own."""


class Publisher:
    """A wrapper of a Trainer's methods that save a model and write its card.

    Args:
        trainer: the Trainer whose methods are wrapped.
        events: returns the run's attempts to cut, and the step of the best model if that is the present one.
        write_traces: writes history and log into a directory.
    """

    def __init__(
        self,
        trainer: Trainer,
        events: Callable[[], tuple[list[CutEvent], int | None]],
        write_traces: Callable[[Path], None],
    ) -> None:
        self._trainer = trainer
        self._events = events
        self._write_traces = write_traces
        self._drawn: tuple[Any, list[Picture]] = (None, [])
        wrap_methods(trainer, {"save_model": self._save_model, "create_model_card": self._create_model_card})

    def _save_model(
        self, method: Callable[..., None], output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        """Save as the Trainer does; beside a model that was cut, write what explains it."""
        method(output_dir, _internal_call)
        if not _internal_call:  # not for a checkpoint, or a push that writes a card itself
            self.publish(Path(output_dir) if output_dir else output_folder(self._trainer))

    def _create_model_card(self, method: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Let the Trainer write its card, keep what a person wrote, and add the section about the cuts."""
        path = output_folder(self._trainer) / CARD_FILE
        before = _read(path)
        method(*args, **kwargs)
        card = _read(path)
        if card is None:
            return
        if not self._has_something_to_tell():
            _without_failing(lambda: write_text(path, without_section(card or "")))
            return
        by_hand = before is not None and is_by_hand(before)
        if before is not None and by_hand:
            card = with_metadata_of(before, card)
        _without_failing(lambda: write_text(path, write_card(self._run(), self._facts(path.parent), card, by_hand)))

    def publish(self, folder: Path) -> None:
        """Write history, pictures, card and code into the directory of a model that was cut.

        An error becomes a warning: a trained model must not be lost because of it.
        """
        if self._has_something_to_tell():
            _without_failing(lambda: self._write(folder))
        elif self._trainer.args.should_save and (card := _read(folder / CARD_FILE)) is not None:
            _without_failing(lambda: write_text(folder / CARD_FILE, without_section(card)))

    def _write(self, folder: Path) -> None:
        """Write everything that explains the model."""
        folder.mkdir(parents=True, exist_ok=True)
        self._write_traces(folder)
        model = underlying(self._trainer.model)
        if isinstance(model, PreTrainedModel) and model.is_remote_code():
            custom_object_save(model, folder)  # a push during training copies only the weights
        path = folder / CARD_FILE
        write_text(path, write_card(self._run(), self._facts(folder), _read(path)))

    def _has_something_to_tell(self) -> bool:
        run = self._run()
        return self._trainer.args.should_save and bool(run.cuts or run.record)

    def _run(self) -> Run:
        """The run so far, as far as it made the present model."""
        trainer, model = self._trainer, underlying(self._trainer.model)
        events, model_step = self._events()
        config = model.config.to_dict() if isinstance(model, PreTrainedModel) else {}
        run = Run(
            name=output_folder(self._trainer).resolve().name,
            events=tuple(events),
            log=tuple(finite_entries(trainer.state.log_history)),
            config=config | {"architectures": [type(model).__name__]},
            steps=trainer.state.global_step,
            machine=machine(),
            model_step=model_step,
        )
        return run.of_the_model()

    def _facts(self, folder: Path) -> CardFacts:
        """What the card says besides the run; its pictures are drawn on the way."""
        trainer = self._trainer
        repo_id, started_from = getattr(trainer, "hub_model_id", None), _started_from(underlying(trainer.model))
        return CardFacts(
            name=repo_id.split("/")[-1] if repo_id else folder.resolve().name,
            repo_id=repo_id,
            base_model=started_from,
            datasets=_dataset_names(trainer.train_dataset),
            pictures=self._draw(folder / FIGURES_FOLDER),
        )

    def _draw(self, folder: Path) -> list[Picture]:
        """The pictures of the run, drawn again if something is new; none without matplotlib."""
        events, model_step = self._events()
        of_now = (folder.resolve(), self._trainer.state.global_step, len(events), model_step)
        if self._drawn[0] != of_now:
            try:
                self._drawn = (of_now, draw_pictures(self._run(), folder))
            except ImportError as error:
                logger.warning_once(f"The model card has no pictures. {error}")
                self._drawn = (of_now, [])
        return self._drawn[1]


def _without_failing(write: Callable[[], object]) -> None:
    """Write, or warn that it could not be done."""
    try:
        write()
    except Exception as error:  # errors of files, plots and templates must not end a training run
        logger.warning(f"History, pictures or card of the cuts could not be written beside the model: {error}")


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _started_from(model: Any) -> str | None:
    """Id on the Hub of the model that training began with; None for a new model, or one from a directory."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return name if name and not Path(name).exists() else None


def _dataset_names(dataset: Any) -> list[str]:
    """The name of the training data, if the dataset has one."""
    name = getattr(dataset, "builder_name", None)
    return [name] if isinstance(name, str) and name not in _FILE_FORMATS else []
