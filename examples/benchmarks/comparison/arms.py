"""The comparators, each an arm: what is done with a model from its first step to the figure in the table.

| arm | what happens | its options |
|---|---|---|
| `scratch` | trained at one size from start to end | `state_size`, `ranking` |
| `cut` | trained big, cut by `CompreSSMCallback` on the way | `cut`, `by_energy`, `refine` |
| `prune` | a trained model is cut to the sizes of another row, and fine-tuned or not | `fine_tune`, `fine_tune_rate` |
| `distil` | a small model learns from a trained one and from the labels | `temperature`, `mixing` |
| `regularise` | trained big with the Hankel norm in the loss, then cut once or not | `weight`, `realization` |

All use the same learning rate schedule over the same number of steps; `prune` fine-tunes beyond them, with a schedule
of the same shape over its own. What an arm takes over from another row, such as a teacher, counts among its costs.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import energy
from distillation import DistillationTrainer
from hankel import HankelRegularisedTrainer
from rankings import RankingRecorder
from refinement import Refinement
from runs import Run
from sampling import fixed_batches
from transformers import PreTrainedModel

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress
from hf_compressm.families import find_layers


Outcome = dict[str, Any]


def scratch(run: Run, state_size: int | None = None, ranking: int = 0) -> Outcome:
    """Train at one size: that of another row, or a given one, or the full one.

    Args:
        run: the row, its data and its folder.
        state_size: of all layers.
        ranking: how often the order of the states is measured on the way.
    """
    model = run.build(run.sizes if state_size is None else [state_size])
    recorders = [RankingRecorder(run.folder, run.max_steps, ranking)] if ranking else []
    run.train(run.trainer(model, callbacks=recorders))
    return run.outcome(model, ranking=[recorder.summary() for recorder in recorders])


def cut(run: Run, cut: Mapping[str, Any], by_energy: bool = False, refine: int = 0) -> Outcome:
    """Train the full size and cut on the way.

    Args:
        run: the row, its data and its folder.
        cut: settings of `CompreSSMConfig`.
        by_energy: rank Mamba's states by energy and repair nothing.
        refine: iterations of an H2-optimal refinement of S5 and LRU layers after each cut.
    """
    model = run.build()
    compressm = CompreSSMCallback(CompreSSMConfig(sampling_seed=run.row.seed, **cut))
    refinement = Refinement(compressm, refine)
    callbacks = [refinement.remembering, compressm, refinement] if refine else [compressm]
    with energy.ranking_by_energy(model) if by_energy else nullcontext():
        run.train(run.trainer(model, callbacks=callbacks))
    cuts = [
        {"step": event.step, "seconds": event.result.seconds, "outcome": event.outcome, "sizes": event.sizes}
        for event in compressm.events
    ]
    return run.outcome(model, cuts=cuts, refinements=refinement.errors)


def prune(run: Run, fine_tune: float = 0.0, fine_tune_rate: float = 1.0) -> Outcome:
    """Cut a model that was trained at full size to the sizes of another row, and fine-tune it or not.

    Args:
        run: the row, its data and its folder.
        fine_tune: steps that follow, as a share of those of the whole training.
        fine_tune_rate: peak learning rate in them, as a share of that of the training.
    """
    model = run.load()
    steps = max(round(fine_tune * run.max_steps), 1)
    rate = run.arguments().learning_rate * fine_tune_rate
    trainer = run.trainer(model, max_steps=steps, learning_rate=rate)
    _cut_at_the_end(run, trainer, model)
    before = run.test(trainer)
    if fine_tune:
        run.train(trainer)
    return run.outcome(model, right_after_the_cut=before)


def distil(run: Run, temperature: float = 2.0, mixing: float = 0.5) -> Outcome:
    """Train a small model with a trained one as its teacher.

    Args:
        run: the row, its data and its folder.
        temperature: as in `DistillationTrainer`.
        mixing: likewise.
    """
    model, options = run.build(run.sizes), {"temperature": temperature, "mixing": mixing}
    run.train(run.trainer(model, DistillationTrainer, teacher=run.load(), **options))
    return run.outcome(model)


def regularise(run: Run, weight: float, realization: str = "real") -> Outcome:
    """Train the full size with the Hankel nuclear norm in the loss, and cut once at the end if sizes are given.

    Several cuts of one such model are rows of the arm `prune` that come after one without a cut.

    Args:
        run: the row, its data and its folder.
        weight: of the norm.
        realization: as in `HankelRegularisedTrainer`.
    """
    model = run.build()
    trainer = run.trainer(model, HankelRegularisedTrainer, weight=weight, realization=realization)
    run.train(trainer)
    before = run.test(trainer)
    if run.sizes is not None:
        _cut_at_the_end(run, trainer, model)
    return run.outcome(model, right_before_the_cut=before)


def _cut_at_the_end(run: Run, trainer: Any, model: PreTrainedModel) -> None:
    """One cut without an optimizer, to the sizes of the run.

    Raises:
        ValueError: if the row names no other, or a layer cannot be cut to its size.
    """
    if run.sizes is None:
        raise ValueError(f"{run.row.key} does not say in size_of to which sizes it cuts.")
    with run.clock.aside("afterwards"):
        size = trainer.args.per_device_train_batch_size
        settings = CompreSSMConfig(sampling_seed=run.row.seed)
        loader = trainer.get_train_dataloader()
        batches = fixed_batches(loader, size, settings.calibration_batches, settings.sampling_seed)
        if len(set(run.sizes)) == 1:
            compress(model, CompreSSMConfig(target_state_size=run.sizes[0], sampling_seed=run.row.seed), batches)
        else:
            for layer, wanted in zip(find_layers(model), run.sizes, strict=True):
                compress(model, CompreSSMConfig(target_state_size=wanted, layers=[layer.name]), batches)
    reached = [layer.state_size for layer in find_layers(model)]
    if reached != run.sizes:
        raise ValueError(f"{run.row.key} was to be cut to {run.sizes} states, and has {reached}.")


ARMS: dict[str, Callable[..., Outcome]] = {
    "scratch": scratch,
    "cut": cut,
    "prune": prune,
    "distil": distil,
    "regularise": regularise,
}
