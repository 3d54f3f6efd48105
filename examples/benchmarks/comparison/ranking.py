"""When has the order of the states settled, and how much do time, number and kind of the cuts matter?

The order of the states is measured over whole trainings of S5, LRU and Mamba and compared with that at the end. Rows
with other settings of the cut show what each is worth: the time of the cut, the number of cuts, a re-warm-up, carrying
or resetting the optimizer's moments, real, complex or empirical balancing, an H2-optimal refinement, and
`trigger="stable"`.

    python examples/benchmarks/comparison/ranking.py --mnist_dir MNIST --output DIR
"""

from running import main


if __name__ == "__main__":
    main(__doc__, ["ranking_lru.yaml", "ranking_s5.yaml", "ranking_mamba.yaml"])
