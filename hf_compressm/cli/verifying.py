"""`hf-compressm verify`: is a checkpoint whole, at one with its configuration, finite, and does it load?"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from hf_compressm.adapters import find_layers
from hf_compressm.checkpoints import BASE_FOLDER, SEAL, TRAINER_STATE_FILE, saved_tensors, tensor_shapes, verify_files
from hf_compressm.cli.sources import local_directory
from hf_compressm.durable import read_json
from hf_compressm.loading import load_model, verify_checkpoint


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Directory of a checkpoint or saved model, or an id on the Hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, for programs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Make sure that a checkpoint can be gone on from: every file whole, sizes that agree, no NaN, and it loads.

    Exit code 0 says that it can; 2 that it cannot, with the file and the reason on standard error.
    """
    directory = Path(local_directory(checkpoint))
    console = Console(stderr=True, quiet=quiet)
    found = _verified(directory, console)
    if as_json and not quiet:
        typer.echo(json.dumps({"checkpoint": str(directory), **found}, indent=2))
    elif not quiet:
        typer.echo(f"{directory} is whole: {_in_words(found)}.")


def _verified(directory: Path, console: Console) -> dict[str, Any]:
    """What a whole checkpoint holds; raises `ValueError` where it is not."""
    with console.status("Reading every file ..."):
        verify_files(directory)
    has_model, base = (directory / "config.json").exists(), directory / BASE_FOLDER
    found: dict[str, Any] = {"sealed": (directory / SEAL).exists()}
    if (directory / TRAINER_STATE_FILE).exists():
        found["step"] = read_json(directory / TRAINER_STATE_FILE).get("global_step")
    if has_model or base.is_dir():
        return found | _verified_model(directory if has_model else base, console)
    return found | {"model": None}


def _verified_model(directory: Path, console: Console) -> dict[str, Any]:
    """The same of a directory with a configuration and weights."""
    verify_checkpoint(directory)
    names = tensor_shapes(directory)
    tensors = saved_tensors(directory)
    for name, tensor in track(tensors, "Looking for NaN", len(names), console=console, transient=True):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{directory}: tensor {name} holds NaN or infinity.")
    with console.status("Loading the model ..."):
        model = load_model(directory)
    return {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_sizes": {layer.name: layer.state_size for layer in find_layers(model)},
    }


def _in_words(found: dict[str, Any]) -> str:
    if found["model"] is None:
        parts = ["adapters, without the model that they belong to"]
    else:
        sizes = sorted(set(found["state_sizes"].values()))
        states = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        parts = [f"{found['model']}, {found['parameters']:,} parameters"]
        parts += [f"{len(found['state_sizes'])} SSM layers of {states} states"] if sizes else ["no SSM layer"]
    parts += [f"step {found['step']}"] if "step" in found else []
    return ", ".join([*parts, "sealed" if found["sealed"] else "without a seal"])
