"""The published table of state cuts of Mamba-2, run again with the cuts of this package; hybrids beside it.

Every model is cut in every way (`published/arms.py`) by every share, without training, as in arXiv 2602.11408, whose
figures the table repeats. Measured are the model itself, the cut one, and both after steps of recovery:

- Perplexity on WikiText-2: the test split's lines joined by two line breaks, as one sequence of tokens without more
  special tokens than the tokenizer adds, in windows of 2,048 that do not overlap; the exponential of the mean loss of
  the 2,047 tokens after the first of each window. The rest at the end is dropped. `--text` takes another text.
- LAMBADA, PIQA, ARC easy and challenge by lm-evaluation-harness without examples in the prompt:
  `pip install "hf_compressm[bench]"`, or `--tasks` without names for perplexity alone.
- Calibration: 128 windows of 2,048 tokens that begin anywhere in the training split, the same for all ways.
- Recovery: language modelling on the training split with a `Trainer`, AdamW with fresh moments, a constant learning
  rate after a warm-up; the uncut model is trained on likewise. A few passes over WikiText-2 fit a model to it: read
  such figures beside those of the uncut model at the same step, and the tasks.

One row is one line of `results.jsonl` once it is done. The same command passes over such rows and an interrupted
recovery goes on from its last checkpoint; a cell that fails is named at the end. One process uses one device: with
several GPUs set `CUDA_VISIBLE_DEVICES`.

    python examples/benchmarks/published_table.py --output DIR
    python examples/benchmarks/published_table.py --models AntonV/mamba2-1.3b-hf --shares 0.1 0.3 0.5 0.7 0.9 --steps
    python examples/benchmarks/published_table.py --models FOLDER --text book.txt --tasks --length 512 --output DIR
"""

import argparse
import gc
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "comparison"))

import torch
from published.arms import ARMS
from published.cells import Cell
from published.checkpoint import Checkpoint, Options
from published.measures import TASKS, Harness
from published.recovery import Recovery
from published.tables import write_tables
from published.texts import TEST_CONFIG, local, wikitext
from rows import Results, chosen
from transformers.utils import logging

from hf_compressm import enable_fast_selective_scan


MODELS = (
    "AntonV/mamba2-130m-hf",  # conversions of state-spaces/mamba2-130m and so on, which transformers does not load
    "AntonV/mamba2-370m-hf",
    "AntonV/mamba2-780m-hf",
    "AntonV/mamba2-1.3b-hf",
    "AntonV/mamba2-2.7b-hf",
    "ibm-granite/granite-4.0-h-1b-base",
    "nvidia/Nemotron-H-4B-Base-8K",
)


def options_of(args: argparse.Namespace) -> Options:
    """What all cells share, from the command line.

    Raises:
        ValueError: if a text is not there, or tasks cannot be run.
    """
    harness = Harness(args.tasks, args.tasks_path, args.task_batch, args.length, args.limit)
    harness.check()
    training = {
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.accumulate,
        "warmup_steps": args.warmup_steps,
        "optim": args.optim,
        "bf16": args.bf16,
        "seed": args.seed,
    }
    corpus = (
        args.train_config if args.train_config == TEST_CONFIG else f"{TEST_CONFIG}, trained on {args.train_config}"
    )
    return Options(
        texts=local(args.text) if args.text else wikitext(args.train_config, args.train_split),
        data=args.text.name if args.text else corpus,
        length=args.length,
        samples=args.samples,
        calibration_batch=args.calibration_batch,
        test_batch=args.test_batch,
        seed=args.seed,
        dtype=getattr(torch, args.dtype),
        harness=harness,
        recovery=Recovery(sorted(set(args.steps)), args.save_steps, training),
        results=Results(args.output),
        output=args.output,
    )


def cells(args: argparse.Namespace, options: Options) -> Iterator[Cell]:
    """All of them, model by model; the uncut one first."""
    for name in args.models:
        checkpoint = Checkpoint(name, options)
        yield Cell(checkpoint, None, 0.0)
        arms = [arm for arm in ARMS if args.arms is None or arm.name in args.arms]
        yield from (Cell(checkpoint, arm, share) for share in args.shares for arm in arms)


def run(args: argparse.Namespace) -> list[str]:
    """Run what is not done, and print the tables.

    Returns:
        Keys of the cells that failed.
    """
    options, failed = options_of(args), []
    for cell in chosen(list(cells(args, options)), args.only):
        if not cell.missing():
            continue
        try:
            reason = cell.checkpoint.lacking(cell.arm) if cell.arm else ""
            if reason:
                print(f"{cell.key}: left out, {reason}", flush=True)
                continue
            for row in cell.run():
                options.results.add(row)
                print(f"{row['key']}: perplexity {row['perplexity']:.2f} {row['tasks'] or ''}", flush=True)
        except Exception:  # a model that does not fit into memory must not keep the others from running
            traceback.print_exc()
            failed.append(cell.key)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    done = options.results.read()
    shown = [row for row in done.values() if row["model"] in args.models and row["settings"]["seed"] == args.seed]
    print(write_tables(shown, args.output))
    return failed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [arm.name for arm in ARMS]
    add("--models", nargs="+", default=list(MODELS), help="ids on the Hub, or folders; with their tokenizers")
    add("--arms", nargs="+", choices=names, help="ways to cut (default: all)")
    add("--shares", nargs="+", type=_share, default=[0.5], help="of the states that go (default: 0.5)")
    add("--only", nargs="+", help="names or keys of cells, such as 'ours 0.5', with * and ?")
    add("--output", type=Path, default=Path("runs/published_table"), help="folder of results.jsonl and tables.md")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    add("--text", type=Path, help="a file, or a folder with train.txt and test.txt, instead of WikiText")
    add("--train_config", default=TEST_CONFIG, help="of WikiText, for calibration and recovery; wikitext-103-raw-v1")
    add("--train_split", default="train", help="of that, such as train[:5%%]")
    add("--length", type=int, default=2048, help="of all windows, in tokens")
    add("--samples", type=int, default=128, help="windows of the calibration")
    add("--calibration_batch", type=int, default=1, help="windows of it at once")
    add("--test_batch", type=int, default=1, help="windows of the test at once")
    add("--tasks", nargs="*", default=list(TASKS), help=f"of lm-evaluation-harness (default: {' '.join(TASKS)})")
    add("--tasks_path", type=Path, help="folder with YAML files of other tasks")
    add("--task_batch", type=int, default=16, help="requests at once")
    add("--limit", type=int, help="examples of each task (default: all)")
    add("--steps", nargs="*", type=_step, default=[200, 1000], help="of recovery after which is measured")
    add("--learning_rate", type=float, default=2e-5)
    add("--batch_size", type=int, default=4, help="windows of a step of recovery, on the device at once")
    add("--accumulate", type=int, default=1, help="batches of a step")
    add("--warmup_steps", type=int, default=20)
    add("--optim", default="adamw_torch", help="as in TrainingArguments")
    add("--bf16", action="store_true", help="train in bfloat16 autocast")
    add("--save_steps", type=int, default=100, help="steps between checkpoints of recovery")
    return parser.parse_args(arguments)


def _step(text: str) -> int:
    """A step of recovery."""
    step = int(text)
    if step < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return step


def _share(text: str) -> float:
    """A share between 0 and 1."""
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, got {text}")
    return share


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark; a mistake is one line and exit code 2, a cell that failed exit code 1."""
    args = parse(arguments)
    enable_fast_selective_scan()
    logging.disable_progress_bar()
    try:
        failed = run(args)
    except (OSError, ValueError) as error:  # texts that are not there, or not to be reached
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if failed:
        print(f"error: these failed, and the same command tries them again: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
