"""Where training and calibration data come from: the examples and the command line read them in the same way."""

from hf_compressm.data.hub import HubSource, load_hub_dataset
from hf_compressm.data.sequences import SequenceSource, read_sequences
from hf_compressm.data.text import ByteTokenizer, TextSource, read_texts, split_into_blocks


__all__ = [
    "ByteTokenizer",
    "HubSource",
    "SequenceSource",
    "TextSource",
    "load_hub_dataset",
    "read_sequences",
    "read_texts",
    "split_into_blocks",
]
