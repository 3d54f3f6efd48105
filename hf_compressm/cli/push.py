"""`hf-compressm push`: push a saved model or a checkpoint to the Hub, in one commit."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a saved model or checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Id on the Hub, owner/name; created if new.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repo private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, main unless given.")] = None,
    message: Annotated[str, typer.Option(help="Title of the commit.")] = "Upload compressed model",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be pushed; nothing is sent.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was pushed as JSON, for programs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Push a model to the Hub: weights, configuration, tokenizer, code, history and figures, all in one commit.

    Optimizer and Trainer state are left out. Weights of an earlier push that this one does not replace are deleted.
    DIR does not change.
    """
    from hf_compressm.reports.hub import PushTarget, files_to_push, push_directory

    target = PushTarget(repo, private, revision, message, create_pr)
    console = Console(stderr=True, quiet=quiet)
    if dry_run:
        with console.status("Reading every file ..."):
            files, left = files_to_push(directory)
        found: dict[str, Any] = {"repo": repo, "dry_run": True, **_listed(files, left)}
        lines = _listing(files, left)
    else:
        with console.status("Reading and pushing ..."), _client_silenced(quiet):
            done = asdict(push_directory(directory, target))
        files, left, removed = done.pop("files"), done.pop("left"), done.pop("removed")
        named = {"repo": done["repo_id"], "url": done["url"], "commit": done["commit"], "dry_run": False}
        found = {**named, **_listed(files, left), "removed": removed}
        lines = [f"{len(files)} files of {sum(files.values()):,} bytes are in {done['repo_id']}."]
        lines += _sentences(("Left behind", left), ("Deleted, of an earlier push", removed))
        lines.append(done["url"])
    if not quiet:
        typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(lines))


@contextmanager
def _client_silenced(quiet: bool) -> Iterator[None]:
    """Silence the warnings and progress bars of the Hub's client, if asked to."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, has_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    if quiet:
        logging.set_verbosity_error()
    if quiet and has_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if quiet and has_bars:
            enable_progress_bars()


def _listed(files: Mapping[str, int], left: Sequence[str]) -> dict[str, Any]:
    """The files, JSON-ready."""
    named = [{"name": name, "bytes": size} for name, size in files.items()]
    return {"files": named, "bytes": sum(files.values()), "left": list(left)}


def _listing(files: Mapping[str, int], left: Sequence[str]) -> list[str]:
    """A line for each file that would be pushed, and one for the others."""
    lines = [f"{size:>15,}  {name}" for name, size in files.items()]
    lines.append(f"{sum(files.values()):>15,}  bytes in {len(files)} files would be pushed.")
    return lines + _sentences(("Left behind", left))


def _sentences(*lists: tuple[str, Sequence[str]]) -> list[str]:
    """A sentence for each list that is not empty, with names that are safe for a terminal."""
    shown = ((title, [name if name.isprintable() else ascii(name) for name in names]) for title, names in lists)
    return [f"{title}: {', '.join(names)}." for title, names in shown if names]
