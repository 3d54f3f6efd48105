"""A checkpoint cut on disk, with a model card that describes the cut."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_compressm.checkpoints import cut_checkpoint
from hf_compressm.compression import CompressionResult
from hf_compressm.config import Settings, as_config
from hf_compressm.files.atomic import write_text
from hf_compressm.files.names import CARD_FILE
from hf_compressm.reports.card import card_of
from hf_compressm.utils.modes import plain_modes


logger = logging.get_logger(__name__)


@plain_modes()  # for loading, too
def compress_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    config: Settings,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> CompressionResult:
    """Cut a Trainer's checkpoint, or a saved model, so that the next launch continues with the smaller model.

    The model is loaded and measured on the CPU. Checkpoints of FSDP are read and written in FSDP's formats; those with
    sharded weights need a `config.json` beside them.

    To resume with `Trainer.train(resume_from_checkpoint=output)`, build the model from `output`; with
    `CompreSSMCallback`, a model of the original size works too. Name `output` `<output_dir>/checkpoint-<step>`, with
    the same step, if `resume_from_checkpoint=True` and `find_last_complete_checkpoint` are to find it.

    Args:
        checkpoint: a `checkpoint-<step>` directory of a Trainer, or what `save_pretrained` wrote. It does not change.
        output: directory of the new one; it appears whole and sealed, or not at all.
        config: settings, as in `analyze`; those of the schedule are ignored. With `optimizer_state="reset"`, a saved
            optimizer state that cannot be matched to parameters is accepted, and all its moments are dropped.
        calibration: iterable of model-input dicts, needed by selective layers.

    Returns:
        What was done, as from `compress`.

    Raises:
        ValueError: if the checkpoint is not whole, or is of a kind that cannot be cut on disk (DeepSpeed, adapters of
            PEFT); if it is not certain which parameters the optimizer's state belongs to; if `output` is not empty
            or is inside the checkpoint; and as `compress`. Nothing is then written.
        OSError: from the file system; likewise.
    """
    return cut_checkpoint(checkpoint, output, as_config(config), calibration, finish=_renew_card)


def _renew_card(folder: Path) -> None:
    """Add this cut to a model card that was copied."""
    path = folder / CARD_FILE
    if not path.is_file():
        return
    try:
        write_text(path, card_of(folder) or "")
    except ValueError as error:
        logger.warning(f"{CARD_FILE} stays as it was, since it cannot be read: {error}")
