"""A checkpoint cut on disk, with a model card that tells of the cut."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_compressm.checkpoints import cut_checkpoint
from hf_compressm.compression import CompressionResult
from hf_compressm.config import CompreSSMConfig
from hf_compressm.files.atomic import write_text
from hf_compressm.files.names import CARD_FILE
from hf_compressm.reports.card import card_of


logger = logging.get_logger(__name__)


def compress_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    config: CompreSSMConfig,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> CompressionResult:
    """Cut a Trainer's checkpoint, or a saved model, so that the next launch goes on with the smaller model.

    The model is loaded and measured on the CPU. Checkpoints of FSDP are read and written as FSDP does; those with
    sharded weights need a `config.json` beside them.

    To resume with `Trainer.train(resume_from_checkpoint=output)`, build the model from `output`; with
    `CompreSSMCallback` a model of the original size will do. Call `output` `<output_dir>/checkpoint-<step>`, with the
    same step, for `resume_from_checkpoint=True` and `find_last_complete_checkpoint` to see it.

    Args:
        checkpoint: a `checkpoint-<step>` directory of a Trainer, or what `save_pretrained` wrote. It stays as it is.
        output: directory of the new one; it is there whole and sealed, or not at all.
        config: settings; those of the schedule are not used here. `optimizer_state="reset"` goes on where the saved
            optimizer state cannot be matched to parameters: all moments are then dropped.
        calibration: iterable of model-input dicts, needed by selective layers.

    Returns:
        What was done, as of `compress`.

    Raises:
        ValueError: if the checkpoint is not whole, or not of a kind that can be cut on disk (DeepSpeed, adapters of
            PEFT); if it is not clear beyond doubt which parameters the optimizer's state belongs to; if `output` has
            something in it or lies inside the checkpoint; and as `compress`. Nothing is then written.
        OSError: from the file system; likewise.
    """
    return cut_checkpoint(checkpoint, output, config, calibration, finish=_renew_card)


def _renew_card(folder: Path) -> None:
    """Let a model card that was copied tell of this cut too."""
    path = folder / CARD_FILE
    if not path.is_file():
        return
    try:
        write_text(path, card_of(folder) or "")
    except ValueError as error:
        logger.warning(f"{CARD_FILE} stays as it was, since it cannot be read: {error}")
