"""The cuts of a run as flat numbers, the only form that every tracker takes, and in a sentence."""

import math
from collections.abc import Iterable

from hf_compressm.compression import LayerPlan
from hf_compressm.compression.history import CutEvent
from hf_compressm.numerics.ranks import count_by_tolerance


PACE = "compressm/steps_per_second"
STABILITY = "compressm/rank_stability"
NEGLIGIBLE_ENERGY = 0.01
"""Share of the sum of the HSVs that the states beyond the effective ones hold."""


def scalars(event: CutEvent) -> dict[str, float]:
    """Flat numbers of one event for a Trainer's log; layers are numbered in model order."""
    result = event.result
    layers = result.plan.layers
    values: dict[str, float] = {
        "compressm/cut": float(event.outcome == "cut"),
        "compressm/state_size_mean": sum(event.sizes.values()) / len(layers),
        "compressm/energy_kept": min(layer.energy_kept for layer in layers),
        "compressm/predicted_error": max(layer.predicted_error for layer in layers),
        "compressm/skipped_layers": float(sum(layer.status == "skipped" for layer in layers)),
        "compressm/parameters": float(
            result.parameters_before if event.outcome == "undone" else result.parameters_after
        ),
        "compressm/seconds": result.seconds,
        "compressm/attempt": float(event.attempt),
        "compressm/undone": float(event.outcome == "undone"),
        "compressm/rolled_back": float(event.outcome == "rolled back"),
    }
    bounds = [layer.error_bound for layer in layers if layer.error_bound is not None]
    if bounds:
        values["compressm/error_bound"] = max(bounds)
    if (change := result.plan.predicted_loss_change) is not None:
        values["compressm/predicted_loss_change"] = change
    for name in ("before", "after"):
        if getattr(event, name) is not None:
            values[f"compressm/guard_{name}"] = float(getattr(event, name))
    if (state_bytes := _state_bytes(event)) is not None:
        values["compressm/state_bytes"] = float(state_bytes)
    for number, layer in enumerate(layers):
        own = _layer_scalars(event, layer)
        values |= {f"compressm/layer_{number:02d}/{name}": value for name, value in own.items()}
    return values


def sentence(event: CutEvent) -> str:
    """One event in a sentence for a person, however many layers there are."""
    result, count = event.result, len(event.sizes)
    layers = "1 layer" if count == 1 else f"{count} layers"
    before, after = _span(result.state_sizes_before.values()), _span(event.sizes.values())
    text = f"CompreSSM, {event.outcome} after step {event.step}: "
    if event.outcome == "cut":
        changed = sum(event.sizes[name] != size for name, size in result.state_sizes_before.items())
        text += f"{changed} of {layers}, {before} -> {after} states"
        text += f", {result.parameters_before:,} -> {result.parameters_after:,} parameters"
        if result.state_bytes_before is not None and result.state_bytes_after is not None:
            text += f", {result.state_bytes_before:,} -> {result.state_bytes_after:,} bytes of state per sequence"
    elif event.outcome == "rolled back":
        text += f"{layers}, {before} -> {after} states"
    else:
        text += f"{layers} of {after} states"
    if (change := result.plan.predicted_loss_change) is not None:
        text += f", loss {change:+.4f} expected"
    if event.before is not None and event.after is not None:
        measured = "metric" if event.outcome == "rolled back" else "held-out loss"
        text += f", {measured} {event.before:.4g} -> {event.after:.4g}"
    return f"{text} ({result.seconds:.2f} s)."


def _span(sizes: Iterable[int]) -> str:
    """The sizes of all layers, as one number or two."""
    low, high = min(sizes := list(sizes)), max(sizes)
    return f"{low}" if low == high else f"{low} to {high}"


def _state_bytes(event: CutEvent) -> int | None:
    """Bytes of one sequence's state after an attempt; None if its record lacks them."""
    return event.result.state_bytes_before if event.outcome == "undone" else event.result.state_bytes_after


def _layer_scalars(event: CutEvent, layer: LayerPlan) -> dict[str, float]:
    """Numbers of one layer; `effective_states` are those that hold 99 % of the energy, before the cut."""
    values = {
        "state_size": float(event.sizes[layer.name]),
        "energy_kept": layer.energy_kept,
        "predicted_error": layer.predicted_error,
    }
    if layer.predicted_loss_change is not None:
        values["predicted_loss_change"] = layer.predicted_loss_change
    sigma = layer.hankel_singular_values
    if sigma.numel() and math.isfinite(float(sigma.sum())):
        per_state = max(sigma.numel() / layer.state_size, 1.0)  # two in the real realization of S5 and LRU
        values["effective_states"] = count_by_tolerance(sigma, NEGLIGIBLE_ENERGY) / per_state
    return values
