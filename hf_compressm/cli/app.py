"""All commands together; a mistake of the user ends in one line on standard error and exit code 2."""

import sys
from collections.abc import Sequence

import typer

from hf_compressm.cli.analyze import analyze
from hf_compressm.cli.compress import compress
from hf_compressm.cli.push import push
from hf_compressm.cli.report import report
from hf_compressm.cli.verify import verify


app = typer.Typer(
    name="hf-compressm",
    help="Compress the hidden state of state-space models (Mamba, S5, LRU).",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("analyze", no_args_is_help=True)(analyze)
app.command("compress", no_args_is_help=True)(compress)
app.command("push", no_args_is_help=True)(push)
app.command("report", no_args_is_help=True)(report)
app.command("verify", no_args_is_help=True)(verify)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: of the command line; by default those of this process.

    Raises:
        SystemExit: always; 0 on success, 2 for a mistake of the user, 130 after an interruption.
    """
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(_complain(str(error))) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if hasattr(error, "format_message"):  # an unknown option, a missing argument
            raise SystemExit(_complain(error.format_message())) from None
        if type(error).__name__ == "Abort":
            raise SystemExit(130) from None
        raise
    raise SystemExit(code if isinstance(code, int) else 0)


def _complain(message: str) -> int:
    """Write a message in one line, unless it is empty because the help was shown; returns the exit code."""
    if message:
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return 2
