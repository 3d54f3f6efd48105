"""`hf-compressm push`: a saved model or a checkpoint to the Hub, in one commit."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
)
from rich.console import Console

from hf_compressm.hub import PushResult, Selection, choose_files, push_directory
from hf_compressm.hub.pushing import MESSAGE, check_target


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a saved model or checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Id on the Hub, owner/name; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repo private, if it is made.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, main unless given.")] = None,
    message: Annotated[str, typer.Option(help="Title of the commit.")] = MESSAGE,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be pushed; nothing is sent.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was pushed as JSON, for programs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Push a model to the Hub: weights, configuration, tokenizer, code, history and figures, all in one commit.

    Optimizer and Trainer state stay behind, weights of an earlier push that have no successor are deleted, and DIR
    stays as it is. A broken connection, or a Hub that is down, is tried again.
    """
    console = Console(stderr=True, quiet=quiet)
    if dry_run:
        check_target(repo, revision, message, create_pr)
        with console.status("Reading every file ..."):
            selection = choose_files(directory)
        found: dict[str, Any] = {"repo": repo, "dry_run": True, **_listed(selection)}
        lines = _listing(selection)
    else:
        with console.status("Reading and pushing ..."), _client_silenced(quiet):
            result = push_directory(
                directory,
                repo,
                private=private,
                revision=revision,
                message=message,
                create_pr=create_pr,
                say=_telling(quiet),
            )
        found = _summary(result)
        lines = _closing_lines(result)
    if not quiet:
        typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(lines))


def _telling(quiet: bool) -> Callable[[str], None]:
    """Where failed attempts are told of."""

    def tell(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    return tell


@contextmanager
def _client_silenced(quiet: bool) -> Iterator[None]:
    """Without the warnings and progress bars of the Hub's client, if so asked."""
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


def _listed(selection: Selection) -> dict[str, Any]:
    files = [{"name": file.name, "bytes": file.bytes} for file in selection.files]
    return {"files": files, "bytes": selection.bytes, "left": list(selection.left)}


def _summary(result: PushResult) -> dict[str, Any]:
    own = {"repo": result.repo_id, "url": result.url, "commit": result.commit, "created": result.created}
    return {**own, "dry_run": False, **_listed(result.selection), "removed": list(result.removed)}


def _listing(selection: Selection) -> list[str]:
    """A line for each file that would go, and one for what would not."""
    lines = [f"{file.bytes:>15,}  {file.name}" for file in selection.files]
    lines.append(f"{selection.bytes:>15,}  bytes in {len(selection.files)} files would be pushed.")
    return lines + ([f"Left behind: {_shown(selection.left)}."] if selection.left else [])


def _closing_lines(result: PushResult) -> list[str]:
    """What was done, and last, on a line of its own, where it is."""
    selection = result.selection
    lines = [f"{len(selection.files)} files of {selection.bytes:,} bytes are in {result.repo_id}."]
    if selection.left:
        lines.append(f"Left behind: {_shown(selection.left)}.")
    if result.removed:
        lines.append(f"Deleted, of an earlier push: {_shown(result.removed)}.")
    return [*lines, result.url]


def _shown(names: tuple[str, ...]) -> str:
    """Names as a terminal may see them."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names)
