"""What a user may name a model by: a directory, or an id on the Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

from hf_compressm.checkpoints import find_last_complete_checkpoint


OF_A_MODEL = ("config.json", "adapter_config.json", "*.safetensors")
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py"]


def local_directory(model: str) -> str:
    """A local directory as it is; what is on the Hub is downloaded.

    Raises:
        ValueError: if it is neither, or out of reach, or the folder of a run that has no model itself.
    """
    if Path(model).is_dir():
        _refuse_run_folder(model)
        return model
    if Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise ValueError(f"{model} is neither a directory nor an id on the Hub (owner/name).")
    try:
        return snapshot_download(model, allow_patterns=MODEL_FILES)
    except Exception as error:  # of the network, the Hub and its client, in several libraries
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{model} is neither a directory nor a model on the Hub within reach: {reason}") from error


def _refuse_run_folder(folder: str) -> None:
    """Name the checkpoint that is meant, where the model is not in the folder but in one below it."""
    has_model = any(any(Path(folder).glob(pattern)) for pattern in OF_A_MODEL)
    checkpoint = None if has_model else find_last_complete_checkpoint(folder)
    if checkpoint is not None:
        raise ValueError(f"{folder} has no model itself. The last complete checkpoint in it is {checkpoint}.")
