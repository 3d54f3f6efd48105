"""Results of `compare_matrix.py` as Markdown tables: means over seeds, and the sample standard deviation."""

from collections.abc import Mapping, Sequence
from typing import Any

from tables import grouped, spread


Result = Mapping[str, Any]


def tables(results: Sequence[Result]) -> str:
    """All tables."""
    found = []
    for task, members in grouped(results, lambda result: result["task"]).items():
        found.append(f"### {task}, {members[0]['steps']} steps")
        for part in (trained_table(members), training_table(members), errors_table(members)):
            found += [part] if part else []
    return "\n\n".join(found)


def trained_table(results: Sequence[Result]) -> str:
    """Cuts of trained models: right after, and after more steps."""
    sizes = sorted({result["size"] for result in results if "after" in result}, reverse=True)
    heads = [f"{when} {size}" for size in sizes for when in ("right after the cut to", "later, at")]
    lines = [f"| arm | seeds | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for uncut in grouped([result for result in results if "before" in result], lambda result: result["arm"]).values():
        cells = [figure(uncut, "before"), figure(uncut, "then"), *[""] * (len(heads) - 2)]
        lines.append(f"| uncut: before, later | {seeds(uncut)} | {' | '.join(cells)} |")
    for arm, members in grouped([result for result in results if "after" in result], lambda one: one["arm"]).items():
        cells = []
        for size in sizes:
            same = [member for member in members if member["size"] == size]
            cells += [figure(same, "after"), figure(same, "then")]
        lines.append(f"| {arm} | {seeds(members)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table(results: Sequence[Result]) -> str:
    """Cuts during training, and small models from the start; "" without any."""
    cut = [result for result in results if "end" in result]
    lines = ["| arm | channels | cut after this share of training | seeds | at the end |", "|---" * 5 + "|"]
    for (arm, size, share), members in grouped(cut, lambda one: (one["arm"], one["size"], one["share"])).items():
        lines.append(f"| {arm} | {size} | {share:g} | {seeds(members)} | {figure(members, 'end')} |")
    return "\n".join(lines) if cut else ""


def errors_table(results: Sequence[Result]) -> str:
    """Relative errors of the layers' outputs on held-out data, and over those the predicted ones; "" without any."""
    cut = [result for result in results if "measured" in result]
    lines = ["| arm | channels | seeds | layer | predicted | measured | predicted / measured |", "|---" * 7 + "|"]
    for (arm, size), members in grouped(cut, lambda one: (one["arm"], one["size"])).items():
        for layer in range(len(members[0]["measured"])):
            pairs = [(member["predicted"][layer], member["measured"][layer]) for member in members]
            columns = [*zip(*pairs, strict=True), [predicted / measured for predicted, measured in pairs]]
            cells = " | ".join(spread(list(column), ".3f") for column in columns)
            lines.append(f"| {arm} | {size} | {seeds(members)} | {layer} | {cells} |")
    return "\n".join(lines) if cut else ""


def figure(results: Sequence[Result], when: str) -> str:
    """Loss, and for recall the accuracy."""
    if not results:
        return ""
    loss = spread([result[when]["loss"] for result in results], ".3f")
    if results[0]["task"] == "text":
        return loss
    return f"{loss} ({spread([result[when]['accuracy'] for result in results], '.3f')})"


def seeds(results: Sequence[Result]) -> str:
    """Those that the results have."""
    return ", ".join(str(seed) for seed in sorted({result["seed"] for result in results}))
