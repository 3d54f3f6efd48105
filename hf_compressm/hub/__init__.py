"""Saved models on the Hub: which files of a directory go there, and one commit that takes them there or does not."""

from hf_compressm.hub.files import ChosenFile, Selection, choose_files
from hf_compressm.hub.pushing import PushResult, push_directory


__all__ = ["ChosenFile", "PushResult", "Selection", "choose_files", "push_directory"]
