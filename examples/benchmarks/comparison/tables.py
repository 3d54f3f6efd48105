"""Results as Markdown tables: mean and spread over seeds, sizes and costs of every row."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


Result = Mapping[str, Any]
TABLE_FILE = "tables.md"
HEADER = "| row | seeds | states at the end | {metric} | s in all | of which taken over | times the cut's |"
COSTS_HEADER = (
    "| costs of | ms per step, first and last | s per epoch | examples/s | s in cuts and calibration | "
    "share of the speed bound | peak MiB |"
)


def write_tables(results: Sequence[Result], folder: Path) -> str:
    """Write all tables into `tables.md` of a folder, and return them."""
    content = "\n\n".join(tables(results)) + "\n"
    (folder / TABLE_FILE).write_text(content, encoding="utf-8")
    return content


def tables(results: Sequence[Result]) -> list[str]:
    """A table for each study, one of its rankings, and the machines that all ran on."""
    found = []
    for study, members in grouped(results, lambda result: result["study"]).items():
        found.append(f"### {study}: {members[0]['task']}, {members[0]['training']['max_steps']} steps")
        found += [study_table(members), costs_table(members)]
        ranked = [result for result in members if result.get("ranking")]
        if ranked:
            found.append(ranking_table(ranked))
    machines = sorted({f"- {result['machine']}; {result['device']}" for result in results})
    return [*found, "Ran on:\n\n" + "\n".join(machines)]


def grouped(results: Iterable[Result], key: Callable[[Result], str]) -> dict[str, list[Result]]:
    """Results by a key, in the order in which they were found."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def study_table(results: Sequence[Result]) -> str:
    """One line for each row of a study, over its seeds: what came out, and in which time."""
    rows = grouped(results, lambda result: result["name"])
    totals = {name: mean([m["costs"]["total_seconds"] for m in members]) for name, members in rows.items()}
    lines = [HEADER.format(metric=results[0]["metric"]), "|---" * 7 + "|"]
    for name, members in rows.items():
        inherited = mean([member["costs"]["inherited_seconds"] for member in members])
        beside = seconds_beside(members, rows.get(members[0]["size_of"], []))
        cells = [
            name,
            ", ".join(str(member["seed"]) for member in members),
            spread([statistics.fmean(member["sizes"]) for member in members], ".4g"),
            spread([figure_of(member) for member in members], ".4f"),
            seconds(totals[name]),
            seconds(inherited) if inherited else "",
            "" if beside is None else f"{beside:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds_beside(members: Sequence[Result], others: Sequence[Result]) -> float | None:
    """How many times as long a row took as another, over the seeds that both have; None if not on the same device."""
    by_seed = {other["seed"]: other for other in others}
    pairs = [(member, by_seed[member["seed"]]) for member in members if member["seed"] in by_seed]
    if not pairs or len({(result["machine"], result["device"]) for pair in pairs for result in pair}) > 1:
        return None
    own, theirs = (mean([pair[i]["costs"]["total_seconds"] for pair in pairs]) for i in (0, 1))
    return own / theirs


def costs_table(results: Sequence[Result]) -> str:
    """What every row that has trained cost besides, means over its seeds."""
    lines = [COSTS_HEADER, "|---" * 7 + "|"]
    for name, members in grouped(results, lambda result: result["name"]).items():
        costs = [member["costs"] for member in members if member["costs"]["phases"]]
        if not costs:
            continue
        cells = [
            name,
            pair([cost["seconds_per_step"] for cost in costs], 1000, ".1f"),
            pair([cost["seconds_per_epoch"] for cost in costs], 1, ".1f"),
            pair([cost["examples_per_second"] for cost in costs], 1, ".0f"),
            seconds(mean([cutting_seconds(member) for member in members])),
            pair([[cost["share_of_speed_bound"] or None] for cost in costs], 1, ".3f"),
            f"{max(cost['peak_memory_mib'] for cost in costs):,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cutting_seconds(result: Result) -> float:
    """Seconds of all cuts with their calibration, during training and after it."""
    return sum(cut["seconds"] for cut in result.get("cuts", ())) + result["costs"]["seconds_after_training"]


def ranking_table(results: Sequence[Result]) -> str:
    """How the order of the states comes to agree with the final one, and from which share of training on it does."""
    shares = [0.05, 0.1, 0.25, 0.5]
    lines = [
        "| row | seed | "
        + " | ".join(f"correlation with the end at {share:.0%}" for share in shares)
        + " | overlap of the best eighth at 10% | above 0.8 from | above 0.9 from | above 0.95 from |",
        "|---" * (len(shares) + 6) + "|",
    ]
    for result in results:
        for ranking in result["ranking"]:
            near = [nearest(ranking["points"], share) for share in (*shares, 0.1)]
            cells = [f"{point['correlation']:.3f}" for point in near[:-1]] + [f"{near[-1]['overlap']:.3f}"]
            cells += [f"{share:.0%}" for share in ranking["settled"].values()]
            lines.append(f"| {result['name']} | {result['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def nearest(points: Sequence[Mapping[str, Any]], share: float) -> Mapping[str, Any]:
    """The measurement nearest to a share of training."""
    return min(points, key=lambda point: abs(point["share"] - share))


def figure_of(result: Result) -> float:
    """The figure on the test split that the study is about."""
    return result["test"][result["metric"]]


def spread(figures: Sequence[float], digits: str) -> str:
    """Mean and sample standard deviation; the figure alone where there is one."""
    if len(figures) == 1:
        return format(figures[0], digits)
    return f"{format(statistics.fmean(figures), digits)} ± {format(statistics.stdev(figures), digits)}"


def pair(figures: Sequence[Sequence[float | None]], factor: float, digits: str) -> str:
    """Means of the first and of the last phase; one where they are the same, a dash where there was none."""
    means = [mean([value for value in column if value is not None]) for column in zip(*figures, strict=True)]
    texts = ["-" if math.isnan(value) else format(value * factor, digits) for value in means]
    return texts[0] if len(set(texts)) == 1 else " to ".join(texts)


def seconds(value: float) -> str:
    """Whole seconds, tenths of a few."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def mean(figures: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return statistics.fmean(figures) if figures else math.nan
