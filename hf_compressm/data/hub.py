"""Data sets on the Hub, through the `datasets` library."""

from typing import Any


def load_hub_dataset(name: str, config_name: str | None) -> Any:
    """Load a data set with `datasets.load_dataset`; the error for one that cannot be loaded is one line.

    Returns:
        A `datasets.DatasetDict` with a split `train`.

    Raises:
        ValueError: if there is nothing to load, or no `train` split.
    """
    try:
        import datasets  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ValueError("dataset_name needs the datasets library: pip install datasets.") from error
    try:
        splits = datasets.load_dataset(name, config_name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"Data set {name!r} cannot be loaded: {reason}") from error
    if "train" not in splits:
        raise ValueError(f"Data set {name!r} has no split 'train', only {', '.join(splits)}.")
    return splits


def check_column(name: str, splits: Any, column: str) -> None:
    """Raise `ValueError` unless a data set has a column."""
    if column not in splits["train"].column_names:
        raise ValueError(f"{name} has no column {column!r}, only {splits['train'].column_names}.")
