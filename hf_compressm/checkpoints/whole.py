"""What a directory that a person names must hold: a whole model or whole adapters, not the checkpoints of a run."""

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_compressm.checkpoints.reading import find_last_complete_checkpoint, read_saved
from hf_compressm.checkpoints.saved_model import SavedModel
from hf_compressm.files.names import ADAPTER_CONFIG, CONFIG_FILE
from hf_compressm.files.weights import adapter_folders


OF_A_MODEL = (CONFIG_FILE, ADAPTER_CONFIG, "*.safetensors")


def read_whole(directory: str | Path, to_resume: bool = False) -> SavedModel:
    """Read a directory, and make sure that it holds a whole model or whole adapters, with their configuration.

    Args:
        directory: of a saved model or a checkpoint.
        to_resume: whether a Trainer's checkpoint of a module without a configuration will do, which can be resumed.

    Raises:
        ValueError: naming the file, if it does not; naming its last complete checkpoint, if it is the folder of a run.
    """
    directory = Path(directory)
    if not directory.exists():
        raise ValueError(f"{directory} does not exist.")
    refuse_run_folder(directory)
    saved = read_saved(directory)
    found = [each for each in (saved, saved.base) if each is not None and each.values is not None]
    for each in found:
        each.verify()
    resumable = to_resume and bool(saved.headers) and directory.name.startswith(PREFIX_CHECKPOINT_DIR)
    if saved not in found and not resumable and not any(adapter_folders(directory, ADAPTER_CONFIG)):
        raise ValueError(
            f"{directory} has neither {CONFIG_FILE} nor {ADAPTER_CONFIG}: give a directory that save_pretrained or a "
            "Trainer wrote."
        )
    return saved


def refuse_run_folder(directory: str | Path) -> None:
    """Make sure that a directory is not one that has checkpoints, and no model itself.

    Raises:
        ValueError: naming the last complete checkpoint in it.
    """
    directory = Path(directory)
    if any(any(directory.glob(pattern)) for pattern in OF_A_MODEL) or not any(directory.glob("checkpoint-*")):
        return
    last = find_last_complete_checkpoint(directory)
    if last is None:
        raise ValueError(f"{directory} has no model itself, and no checkpoint in it is complete.")
    raise ValueError(f"{directory} has no model itself. The last complete checkpoint in it is {last}.")
