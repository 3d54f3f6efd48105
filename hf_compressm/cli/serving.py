"""The table of `hf-compressm analyze --serving`: what a sequence's state costs before and after a cut."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table


if TYPE_CHECKING:
    from hf_compressm.compression import StateCost


MEMORY = "40GiB"
"""Memory for states, unless the user says more or less."""

_CAPTION = (
    "Sequences: what fits into the memory that is left for states, beside weights and activations. Keys and values of "
    "attention layers, which a cut does not change, are not counted."
)


def serving_table(headings: Sequence[str], costs: Sequence["StateCost"], memory: int) -> Table:
    """A column per cut, the first without any; a row for each dtype of the recurrent state in each part.

    Args:
        headings: of the columns.
        costs: of one sequence's state, by column.
        memory: bytes for the states of all sequences.
    """
    from hf_compressm.compression import STATE_BYTES

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Serving at each tolerance", caption=_CAPTION)
    table.add_column("", min_width=11)
    for heading in headings:
        table.add_column(heading, justify="right")
    parts = {
        "state of a sequence": lambda cost, width: in_units(cost.recurrent_bytes(width)),
        f"sequences in {in_units(memory)}": lambda cost, width: f"{cost.sequences(memory, width):,}",
        "moved for a token": lambda cost, width: in_units(cost.moved_bytes(width)),
    }
    for part, cell in parts.items():
        table.add_row(part)
        for name, width in STATE_BYTES.items():
            table.add_row(f"  {name}", *(cell(cost, width) for cost in costs))
        if part.startswith("state"):
            table.add_row("  convolution", *(in_units(cost.convolution_bytes) for cost in costs))
        table.add_section()
    return table


def in_units(count: int) -> str:
    """Bytes with three digits in binary units, such as `1.5 MiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"
