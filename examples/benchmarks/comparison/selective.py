"""Cut while training, or another way to a small model? Mamba, from 128 states to 12, on recall and on bytes of text.

The recall task is one on which the state size matters, see `recall.py`; text is Python's standard library unless files
are given. States are chosen by interpolation, by the paper's surrogate, by energy, at random, and the smallest first.

    python examples/benchmarks/comparison/selective.py --output DIR
"""

from running import main


if __name__ == "__main__":
    main(__doc__, ["recall.yaml", "text.yaml", "text_deep.yaml"])
