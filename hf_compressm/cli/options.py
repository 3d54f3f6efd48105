"""Options of the commands, made from the fields of dataclasses: each setting is defined and explained once.

Nothing here imports torch or transformers, so that `--help` answers at once.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from hf_compressm.config import RANK_RULES, CompreSSMConfig


OF_MEASURING = (
    "criterion",
    "realization",
    "per_layer",
    "compat",
    "round_to",
    "sizes",
    "min_state_size",
    "min_reduction",
    "layers",
    "ignore_layers",
    "calibration_batches",
    "sampling_seed",
)
"""Settings of what is measured and which sizes are allowed, for every command that plans."""


def read_settings(path: Path | None, options: dict[str, Any]) -> CompreSSMConfig:
    """The settings of a file, overridden by the options; a rank rule among the options replaces that of the file.

    Raises:
        ValueError: for a file that cannot be read, an unknown setting, or a value that it cannot have.
    """
    if path is None:
        return CompreSSMConfig.from_dict(options)
    values = CompreSSMConfig.from_file(path).to_dict()
    if any(rule in options for rule in RANK_RULES):
        values |= dict.fromkeys(RANK_RULES)
    return CompreSSMConfig.from_dict(values | options)


@dataclass(frozen=True)
class Expansion:
    """A parameter of a command that stands for the fields of a dataclass.

    Attributes:
        kind: the dataclass; its fields have `metadata={"help": ...}`.
        panel: heading of the options in `--help`.
        names: fields to take; all of them by default.
    """

    kind: type
    panel: str
    names: Sequence[str] = ()


def expanded(**expansions: Expansion) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command so that typer sees the fields in place of the named parameters.

    Each such parameter is a dict of the options that were given. A field of several dataclasses becomes one option.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        options = {name: _options(expansion) for name, expansion in expansions.items()}
        flat = {option.name: option for group in options.values() for option in group}
        own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name not in options]

        @wraps(command)
        def run(**values: Any) -> Any:
            given = {name: value for name, value in values.items() if name in flat and value not in (None, [])}
            groups = {
                name: {option.name: given[option.name] for option in group if option.name in given}
                for name, group in options.items()
            }
            return command(**{name: value for name, value in values.items() if name not in flat}, **groups)

        parameters = [*own, *flat.values()]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _options(expansion: Expansion) -> list[inspect.Parameter]:
    """One keyword parameter for each field, None if it is not given."""
    hints = get_type_hints(expansion.kind)
    fields = {item.name: item for item in dataclasses.fields(expansion.kind)}
    parameters = []
    for name in expansion.names or fields:
        field = fields[name]
        text = field.metadata["help"]
        if field.default not in (None, dataclasses.MISSING):
            text = f"{text.removesuffix('.')} ({field.default} unless given)."
        kind, hint = inspect.Parameter.KEYWORD_ONLY, hints[name]
        switch: dict[str, Any] = {}
        if bool in (hint, *get_args(hint)):  # typer would make two flags of it, in a wide column
            hint, switch = str, {"parser": _truth, "metavar": "true|false"}
        elif str in get_args(hint):  # also where Python code may give a list: typer takes one kind
            hint = str
        option = typer.Option(None, help=text, rich_help_panel=expansion.panel, show_default=False, **switch)
        parameters.append(inspect.Parameter(name, kind, default=option, annotation=hint | None))
    return parameters


def _truth(text: str | bool) -> bool:
    """The value of `true` or `false`, which the examples take too."""
    words = {"true": True, "false": False}
    if str(text).lower() not in words:
        raise ValueError(f"{text!r} is neither true nor false.")
    return words[str(text).lower()]
