"""The command line `hf-compressm`: one file for each command."""

from hf_compressm.cli.app import main


__all__ = ["main"]
