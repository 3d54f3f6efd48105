"""Refusing, before the first step, what cannot work: engines, optimizers, and guards."""

from typing import Any, cast

from torch import nn
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from hf_compressm.compression.history import CALLBACK
from hf_compressm.config import CompreSSMConfig
from hf_compressm.loops.engines import find_engine
from hf_compressm.loops.schedule import Scheduled, Trigger
from hf_compressm.surgery import check_optimizer
from hf_compressm.training.held_out import aside, check_held_out_loss, few_examples
from hf_compressm.training.recovery import metric_name, recovery_length
from hf_compressm.utils.randomness import undisturbed


logger = logging.get_logger(__name__)


def refuse_engines(trainer: Trainer) -> None:
    """Refuse runs whose parameters an engine owns or splits, and runs with two callbacks that cut.

    Raises:
        ValueError: naming the engine and the way out.
    """
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"CompreSSMCallback cannot cut a model in place under nn.DataParallel ({args.n_gpu} GPUs in one process). "
            "Start one process per GPU, with `accelerate launch` or `torchrun`: that is faster, and can be cut."
        )
    engine = _engine(args, trainer)
    if engine:
        raise ValueError(
            f"CompreSSMCallback cannot cut a model in place under {engine}. Train without the callback up to a "
            "checkpoint, cut that with `hf-compressm compress CHECKPOINT --output DIR`, and resume from DIR."
        )
    kinds = [[kind.__name__ for kind in type(each).__mro__] for each in trainer.callback_handler.callbacks]
    if sum(CALLBACK in names for names in kinds) > 1:
        raise ValueError("Trainer has two CompreSSMCallbacks; keep one.")


def _engine(args: TrainingArguments, trainer: Trainer) -> str:
    """The engine of a run that cannot be cut in place, in words; "" where it can."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    if trainer.is_fsdp_enabled:
        return "FSDP"
    return find_engine(_model(trainer), trainer.model_wrapped, args.world_size)


def refuse_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimizer that cannot be given the new parameters of a cut.

    Raises:
        ValueError: naming the optimizer and the way out.
    """
    if optimizer is not None:
        check_optimizer(optimizer, list(model.parameters()))


def check_guards(trainer: Trainer, config: CompreSSMConfig, trigger: Trigger, max_steps: int) -> None:
    """Refuse guards that cannot work, before the first step.

    Raises:
        ValueError: naming the setting and the way out.
    """
    if config.max_loss_increase is not None:
        if trainer.eval_dataset is None:
            logger.warning(
                "There is no eval_dataset: max_loss_increase is measured on batches of the training data, on which "
                "the model may have been trained."
            )
        else:
            check_held_out_loss(trainer, _model(trainer))
    if config.save_around_cuts and trainer.args.save_strategy == SaveStrategy.BEST:
        raise ValueError("save_around_cuts does not go with save_strategy='best', which alone decides what is saved.")
    if config.recovery_steps is not None:
        _check_recovery(trainer, config, trigger, max_steps)


def _check_recovery(trainer: Trainer, config: CompreSSMConfig, trigger: Trigger, max_steps: int) -> None:
    args = trainer.args
    wanted = f"metric_tolerance={config.metric_tolerance:g}"
    if args.eval_strategy == IntervalStrategy.NO or trainer.eval_dataset is None:
        there = "missing" if trainer.eval_dataset is None else "given"
        raise ValueError(
            f"{wanted} compares a metric of the Trainer's evaluation, and there is none (eval_strategy="
            f"{_text(args.eval_strategy)}, eval_dataset {there}). Set eval_strategy='steps' and pass an eval_dataset, "
            "or use max_loss_increase."
        )
    if args.save_only_model or args.save_strategy == SaveStrategy.BEST:
        raise ValueError(
            f"{wanted} goes back to a checkpoint with its optimizer, saved before each cut; save_only_model="
            f"{args.save_only_model} and save_strategy={_text(args.save_strategy)} leave none. Use "
            "save_only_model=False and save_strategy='steps', 'epoch' or 'no'."
        )
    steps = recovery_length(config, max_steps)
    latest = trigger.latest + steps
    if latest >= max_steps:
        raise ValueError(
            f"The last cut may come after step {trigger.latest}, and its metric recovery_steps="
            f"{config.recovery_steps:g} later, after step {latest}, but the run has {max_steps} steps. Lower "
            "recovery_steps or end."
        )
    if isinstance(trigger, Scheduled):
        gaps = [later - earlier for earlier, later in zip(trigger.steps, trigger.steps[1:], strict=False)]
        if gaps and min(gaps) <= steps:
            raise ValueError(
                f"recovery_steps={config.recovery_steps:g} ({steps} steps) must be less than the {min(gaps)} steps "
                "from one cut to the next. Lower recovery_steps, or num_cuts."
            )
    _check_metric(trainer)


def _check_metric(trainer: Trainer) -> None:
    """Raise `ValueError` unless an evaluation gives the metric; if need be, try it on a few examples."""
    name = metric_name(trainer.args)
    known = {"eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    if isinstance(trainer.eval_dataset, dict):
        known = {f"eval_{part}_{metric[5:]}" for part in trainer.eval_dataset for metric in known}
        if name not in known and trainer.compute_metrics is None:
            raise ValueError(_absent_metric(name, known))
        return
    if name in known:
        return
    if trainer.compute_metrics is not None:
        known |= _computed_metrics(trainer)
    if name not in known:
        raise ValueError(_absent_metric(name, known))


def _computed_metrics(trainer: Trainer) -> set[str]:
    """Names of the metrics of the first examples; this evaluation is not logged, and `on_evaluate` is not called."""
    few = few_examples(trainer.eval_dataset, trainer.args.per_device_eval_batch_size, seed=0)
    with undisturbed(_model(trainer)), aside(trainer):
        output = trainer.evaluation_loop(trainer.get_eval_dataloader(few), "Evaluation", metric_key_prefix="eval")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):  # closes the bar that it opened for this evaluation
            callback.on_predict(trainer.args, trainer.state, trainer.control, metrics={})
    return set(output.metrics or ())


def _absent_metric(name: str, known: set[str]) -> str:
    return f"The metric {name!r} (metric_for_best_model) is none of those that an evaluation gives: {sorted(known)}."


def _model(trainer: Trainer) -> nn.Module:
    return cast(nn.Module, trainer.model)


def _text(strategy: Any) -> str:
    return repr(getattr(strategy, "value", strategy))
