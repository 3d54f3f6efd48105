"""`hf-compressm verify`: check that a checkpoint is whole, agrees with its configuration, is finite, and loads."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track


if TYPE_CHECKING:
    from hf_compressm.checkpoints import SavedModel


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Directory of a checkpoint or saved model, or an id on the Hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, for programs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Make sure that training can resume from a checkpoint: it is whole, sizes agree, it has no NaN, and it loads.

    Exit code 0 means that it can; 2 that it cannot, with the file and the reason on standard error.
    """
    from hf_compressm.checkpoints import read_whole
    from hf_compressm.cli.inputs import local_directory
    from hf_compressm.compression.history import read_history
    from hf_compressm.utils.checks import is_count

    directory = Path(local_directory(checkpoint))
    console = Console(stderr=True, quiet=quiet)
    with console.status("Reading every file ..."):
        saved = read_whole(directory, to_resume=True)
    found: dict[str, Any] = {"sealed": saved.is_sealed}
    if saved.trainer_state is not None:
        best = read_history(directory).get("model_step")
        found["step"] = best if is_count(best) else saved.trainer_state.get("global_step")
    model = saved if saved.values is not None else saved.base
    if model is not None:
        found |= _verified(model, console)
    else:
        found |= {"model": None} | ({"tensors": len(saved.headers)} if saved.headers else {})
    if as_json and not quiet:
        typer.echo(json.dumps({"checkpoint": str(directory), **found}, indent=2))
    elif not quiet:
        typer.echo(f"{directory} is whole: {_in_words(found)}.")


def _verified(saved: "SavedModel", console: Console) -> dict[str, Any]:
    """What a directory with a configuration and weights holds; raises `ValueError` if they do not agree."""
    import torch

    from hf_compressm.families import find_layers
    from hf_compressm.files.weights import read_tensors

    with console.status("Loading the model ..."):
        model = saved.load()
    tensors = read_tensors(saved.headers)
    for name, tensor in track(tensors, "Looking for NaN", len(saved.headers), console=console, transient=True):
        is_number = tensor.is_floating_point() or tensor.is_complex()
        if is_number and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{saved.directory}: tensor {name} holds NaN or infinity.")
    return {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_sizes": {layer.name: layer.state_size for layer in find_layers(model)},
    }


def _in_words(found: dict[str, Any]) -> str:
    if "tensors" in found:
        parts = [f"{found['tensors']} tensors of a model without a configuration"]
    elif found["model"] is None:
        parts = ["adapters, without the model that they belong to"]
    else:
        sizes = sorted(set(found["state_sizes"].values()))
        states = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        parts = [f"{found['model']}, {found['parameters']:,} parameters"]
        parts += [f"{len(found['state_sizes'])} SSM layers of {states} states"] if sizes else ["no SSM layer"]
    parts += [f"step {found['step']}"] if "step" in found else []
    return ", ".join([*parts, "sealed" if found["sealed"] else "without a seal"])
