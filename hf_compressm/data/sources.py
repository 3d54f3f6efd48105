"""Sources of data, as options that the command line and the examples share."""

from dataclasses import dataclass, field


@dataclass
class HubSource:
    """A data set on the Hub."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, with a train split."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})


@dataclass
class SequenceSource(HubSource):
    """A source of labelled sequences."""

    mnist_dir: str | None = field(default=None, metadata={"help": "Directory with MNIST's idx files, gzipped or not."})
    input_column: str = field(default="image", metadata={"help": "The data set's column of images or numbers."})
    label_column: str = field(default="label", metadata={"help": "The data set's column of class indices."})


@dataclass
class TextSource(HubSource):
    """A source of text: Python's standard library unless another one is given."""

    train_file: list[str] | None = field(default=None, metadata={"help": "Local text file or files."})
    text_column: str = field(default="text", metadata={"help": "The data set's column of text."})
    block_size: int = field(default=256, metadata={"help": "Tokens per example."})
    max_characters: int = field(default=2_000_000, metadata={"help": "Use no more text than this."})
