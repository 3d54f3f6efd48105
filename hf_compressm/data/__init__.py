"""Where training and calibration data come from: the examples and the command line read them in the same way."""

from typing import TYPE_CHECKING

from hf_compressm.utils.lazy import lazy_names


if TYPE_CHECKING:
    from hf_compressm.data.hub import load_hub_dataset
    from hf_compressm.data.sequences import read_sequences
    from hf_compressm.data.sources import HubSource, SequenceSource, TextSource
    from hf_compressm.data.text import ByteTokenizer, read_texts, split_into_blocks


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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "hub": ["load_hub_dataset"],
        "sequences": ["read_sequences"],
        "sources": ["HubSource", "SequenceSource", "TextSource"],
        "text": ["ByteTokenizer", "read_texts", "split_into_blocks"],
    },
)
