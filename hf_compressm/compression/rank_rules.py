"""The rank rules: which size a cut gives to every measured layer."""

from bisect import bisect_left
from collections.abc import Sequence

from hf_compressm.compression.choices import LayerChoice
from hf_compressm.compression.sizes import sizes_of
from hf_compressm.config import CompreSSMConfig
from hf_compressm.families import Measurement
from hf_compressm.families.running import measured_error
from hf_compressm.numerics.budget import cheapest
from hf_compressm.numerics.ranks import count_by_error, count_by_tolerance, passes_gate, round_size
from hf_compressm.utils.threads import for_each


Offers = dict[int, tuple[float, float]]
"""Sizes, each with its bytes and its cost."""


def choose_sizes(
    choices: Sequence[LayerChoice],
    measurements: Sequence[Measurement],
    config: CompreSSMConfig,
    reduction_share: float = 1.0,
) -> list[int]:
    """New state size of every layer, by the rank rule; layers that have one size together share the largest."""
    if config.budget is not None:
        wanted = _within_budget(choices, measurements, config)
    else:
        wanted = for_each(lambda parts: _wanted_size(*parts, config), zip(choices, measurements, strict=True))
    if reduction_share < 1:
        wanted = [_gentler(*parts, config, reduction_share) for parts in zip(choices, wanted, strict=True)]
    for group in {choice.group for choice in choices}:
        members = [i for i, choice in enumerate(choices) if choice.group == group]
        largest = max(wanted[i] for i in members)
        for i in members:
            wanted[i] = round_size(largest, sizes_of(choices[i].layer, config))
    gated = config.rank_rule in ("tolerance", "max_error")
    present = [choice.layer.state_size for choice in choices]
    return [
        size if not gated or passes_gate(before, size, config.min_reduction) else before
        for before, size in zip(present, wanted, strict=True)
    ]


def _wanted_size(choice: LayerChoice, measurement: Measurement, config: CompreSSMConfig) -> int:
    layer, size = choice.layer, choice.layer.state_size
    if measurement.problem:
        return size
    sigma = measurement.hankel_singular_values
    count = 0
    error = _allowed_error(config)
    if layer.family.reruns and measurement.examples and error is not None:
        return _size_by_running(choice, measurement, error, config)
    if config.tolerance is not None:
        count = count_by_tolerance(sigma, config.tolerance)
        wanted = count * size / sigma.numel()
    elif config.max_error is not None:
        count = count_by_error(measurement.errors, config.max_error)
        wanted = count * size / sigma.numel()
    elif config.fraction is not None:
        wanted = int(size * (1 - config.fraction) + 1e-9)
    else:
        wanted = min(config.target_state_size or size, size)
    allowed = sizes_of(layer, config)
    new_size = round_size(wanted, allowed)
    while count and new_size < size and layer.family.values_kept(layer, choice.method, measurement, new_size) < count:
        new_size = round_size(new_size + 1, allowed)
    return new_size


def _allowed_error(config: CompreSSMConfig) -> float | None:
    """The largest relative error of a layer's output that the rank rule allows, None for rules that name a size.

    Of a layer whose cuts are tried, `tolerance` is the share of the output's energy that may be lost.
    """
    return config.max_error if config.tolerance is None else config.tolerance**0.5


def _size_by_running(choice: LayerChoice, measurement: Measurement, allowed: float, config: CompreSSMConfig) -> int:
    """The smallest size at which the cut layer, run on its examples, is within the allowed error; by bisection."""
    layer, size = choice.layer, choice.layer.state_size
    sizes = sizes_of(layer, config)

    def is_enough(candidate: int) -> bool:
        if candidate >= size:
            return True
        cut = layer.family.cut(layer, choice.method, measurement, candidate)
        return measured_error(layer, cut, measurement.examples) <= allowed

    return sizes[bisect_left(sizes, True, key=is_enough)]


def _gentler(choice: LayerChoice, wanted: int, config: CompreSSMConfig, reduction_share: float) -> int:
    """The size after only a share of the reduction."""
    size = choice.layer.state_size
    return round_size(size - reduction_share * (size - wanted), sizes_of(choice.layer, config))


def _within_budget(
    choices: Sequence[LayerChoice], measurements: Sequence[Measurement], config: CompreSSMConfig
) -> list[int]:
    """The sizes that cost least where all layers together keep a share of their bytes; groups have one size.

    What a size costs is the expected change of the loss under `criterion="fisher"`; otherwise the share of the
    output's energy that the layer loses, which takes all layers for equally important.
    """
    groups = list(dict.fromkeys(choice.group for choice in choices))
    members = {group: [i for i, choice in enumerate(choices) if choice.group == group] for group in groups}
    offers = [_together([_offers(choices[i], measurements[i], config) for i in members[group]]) for group in groups]
    present = sum(choice.layer.state_bytes(choice.layer.state_size) for choice in choices)
    chosen = cheapest(offers, (config.budget or 0) * present)
    size_of = dict(zip(groups, chosen, strict=True))
    return [size_of[choice.group] for choice in choices]


def _together(offers: Sequence[Offers]) -> Offers:
    """The sizes of a group, with bytes and costs added up; a layer that lacks one has the next, or its largest."""
    found: Offers = {}
    for size in set().union(*offers):
        parts = [each[min((own for own in each if own >= size), default=max(each))] for each in offers]
        found[size] = (sum(weight for weight, _ in parts), sum(cost for _, cost in parts))
    return found


def _offers(choice: LayerChoice, measurement: Measurement, config: CompreSSMConfig) -> Offers:
    """The sizes that a layer may have, each with its bytes and with what it costs."""
    layer, method = choice.layer, choice.method
    if measurement.problem:
        return {layer.state_size: (layer.state_bytes(layer.state_size), 0.0)}
    found: Offers = {}
    for size in sizes_of(layer, config):
        kept = layer.family.values_kept(layer, method, measurement, size)
        cost = measurement.energy * float(measurement.errors[kept]) ** 2 if size < layer.state_size else 0.0
        found[size] = (layer.state_bytes(size), cost)
    return found
