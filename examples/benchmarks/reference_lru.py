"""Times of the reference implementation of CompreSSM (JAX), for `goals_lru.py`; run by a Python that has JAX.

Needs a clone of github.com/camail-official/compressm, and jax, equinox, optax, numpy and scipy. The clone's packages
are entered without their `__init__` files, which would import data sets and torchvision.

    python examples/benchmarks/reference_lru.py CLONE step 1 256 8 50 784 5
    python examples/benchmarks/reference_lru.py CLONE cut 2 384 128 96 5
"""

import importlib
import json
import sys
import time
import types
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr


def load(clone: Path, name: str) -> types.ModuleType:
    """A module of the clone."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(clone.joinpath(*parts[:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


def wait(tree: object) -> None:
    """JAX computes in the background: wait for every array."""
    jax.block_until_ready(jax.tree_util.tree_leaves(eqx.filter(tree, eqx.is_array)))


def build(clone: Path, blocks: int, states: int, hidden: int) -> eqx.Module:
    """A fresh LRU classifier of ten classes."""
    lru = load(clone, "compressm.models.lru")
    return lru.LRU(blocks, 1, states, hidden, 10, key=jr.PRNGKey(0))


def steps(
    clone: Path, blocks: int, states: int, hidden: int, batch: int, length: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of whole training steps, the first one, which compiles, left out."""
    utils = load(clone, "compressm.training.utils")
    model = build(clone, blocks, states, hidden)
    norms = eqx.nn.State(model)
    optimizer = utils.create_optimizer(
        lr=1e-3, num_steps=1000, weight_decay=0.05, ssm_lr_factor=0.25, use_warmup_cosine=True
    )
    moments = optimizer.init([eqx.filter(model, eqx.is_inexact_array)])
    everything = jax.tree_util.tree_map(lambda _: True, model)
    inputs = jr.normal(jr.PRNGKey(1), (batch, length, 1))
    labels = jax.nn.one_hot(jr.randint(jr.PRNGKey(2), (batch,), 0, 10), 10)
    seconds = []
    for number in range(repeats + 1):
        start = time.perf_counter()
        model, norms, moments, _ = utils.make_step(
            model,
            everything,
            inputs,
            labels,
            utils.classification_loss,
            norms,
            optimizer,
            moments,
            jr.PRNGKey(number),
            use_multi_optimizer=True,
        )
        wait(model)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:]}


def cuts(clone: Path, blocks: int, states: int, hidden: int, rank: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of whole cuts: Hankel singular values of every block, then the reduction."""
    model = build(clone, blocks, states, hidden)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        reduced = model.reduce(rank, model.get_all_hankel_singular_values())
        wait(reduced)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:]}


if __name__ == "__main__":
    path, what, *numbers = sys.argv[1:]
    jnp.zeros(1).block_until_ready()
    print(json.dumps({"step": steps, "cut": cuts}[what](Path(path).resolve(), *map(int, numbers))))
