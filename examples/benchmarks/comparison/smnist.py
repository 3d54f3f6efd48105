"""Cut while training, or another way to a small model? LRU and S5 on sequential MNIST (784 steps).

Sizes, batch and tolerances are those of the CompreSSM paper (arXiv 2510.02823, tables 1 and 2); its own runs have
200,000 steps, these as many as the settings say. The comparators are in `arms.py`, every seed is in the settings.

    python examples/benchmarks/comparison/smnist.py --mnist_dir MNIST --output DIR
    python examples/benchmarks/comparison/smnist.py --mnist_dir MNIST --output DIR --only "*-seed0"   # a part of it
"""

from running import main


if __name__ == "__main__":
    main(__doc__, ["smnist_lru.yaml", "smnist_s5.yaml", "smnist_long.yaml", "smnist_costs.yaml"])
