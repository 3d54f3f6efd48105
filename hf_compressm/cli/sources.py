"""What a user may name a model by: a directory, or an id on the Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download


MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py"]


def local_directory(model: str) -> str:
    """A local directory as it is; what is on the Hub is downloaded.

    Raises:
        ValueError: if it is neither, or out of reach.
    """
    if Path(model).is_dir():
        return model
    if Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise ValueError(f"{model} is neither a directory nor an id on the Hub (owner/name).")
    try:
        return snapshot_download(model, allow_patterns=MODEL_FILES)
    except Exception as error:  # of the network, the Hub and its client, in several libraries
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{model} is neither a directory nor a model on the Hub within reach: {reason}") from error
