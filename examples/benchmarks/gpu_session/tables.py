"""The table of a session."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


HEADER = "| work | way | N | time | speed-up over the first N | peak of memory | more |\n|---|---|---|---|---|---|---|"
UNMEASURED = {"unmeasured": True}


def table(first_line: str, figures: Sequence[Any], found: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table.

    Args:
        first_line: name of what came before the figures, for all ways and sizes.
        figures: with `name`, `section`, `way` and `size`; one line each, those of a section together.
        found: values by name; what is not there was not measured.
    """
    time, memory, more = cells(found.get(first_line, UNMEASURED))
    sizes = Counter((figure.section, figure.way) for figure in figures)
    rows, base = [f"| {first_line} | - | - | {time} | - | {memory} | {more} |"], {}
    sections = list(dict.fromkeys(figure.section for figure in figures))
    for figure in sorted(figures, key=lambda figure: sections.index(figure.section)):
        values = found.get(figure.name, UNMEASURED)
        time, memory, more = cells(values)
        speed_up, work = "-", (figure.section, figure.way)
        if "milliseconds" in values and sizes[work] > 1:
            speed_up = f"{base.setdefault(work, values['milliseconds']) / values['milliseconds']:.2f}"
        rows.append(f"| {figure.section} | {figure.way} | {figure.size} | {time} | {speed_up} | {memory} | {more} |")
    return "\n".join([HEADER, *rows])


def cells(values: Mapping[str, Any]) -> tuple[str, str, str]:
    """Time, peak of memory, and whatever else was seen."""
    for name, text in (("unmeasured", "not measured"), ("absent", "left out"), ("failed", "failed")):
        if name in values:
            reason = values[name] if isinstance(values[name], str) else ""
            return "-", "-", ": ".join(filter(None, [text, " ".join(reason.replace("|", "/").split())[:200]]))
    time = _show(values["milliseconds"]) if "milliseconds" in values else "-"
    memory = f"{values['peak']:.2f} GiB" if values.get("peak") is not None else "-"
    return time, memory, "; ".join(_more(values)) or "-"


def _show(milliseconds: float) -> str:
    """A time."""
    return f"{milliseconds:.4g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def _more(values: Mapping[str, Any]) -> list[str]:
    """In words."""
    texts = []
    if "errors" in values:
        worst = max(values["errors"], key=values["errors"].__getitem__)
        texts.append(f"largest error {values['errors'][worst]:.2g} ({worst})")
    if "same bits" in values:
        texts.append("the same bits in every run" if values["same bits"] else "**other bits** in other runs")
    if "forward" in values:
        texts.append(f"forward alone {_show(values['forward'])}")
    if "share" in values:
        texts.append(f"{values['share']:.0%} of its roofline, forward {values['forward share']:.0%}")
    if "tokens" in values:
        texts.append(f"{values['tokens']:,.0f} tokens/s")
    if "first step" in values:
        texts.append(f"first step {values['first step']:.1f} s")
    if "waits" in values:
        texts.append(f"with the {values['scan']} scan")
        texts.append(f"{values['waits']} waits for the GPU, {values['waits of a step']:g} in the median step")
    if values.get("cut"):
        texts.append(f"{values['cut']:.2f} s for the cut")
    if "variants" in values:
        texts.append(f"{values['variants']} variants, {len(values['failures'])} failed")
    return texts
