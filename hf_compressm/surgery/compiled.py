"""Compiled graphs of a model whose parameters are replaced."""

import sys

import torch


def forget_compiled_graphs() -> None:
    """Let compiled graphs go: those of the model hold its parameters, and on a GPU a pool of memory beside them.

    The next step compiles anew, which it has to anyway, and starts counting recompilations from zero.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
