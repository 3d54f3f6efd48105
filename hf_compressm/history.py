"""The cuts of one training run, as the callback remembers and logs them."""

from dataclasses import dataclass

from hf_compressm.compression import CompressionResult


@dataclass(frozen=True, eq=False)
class CutEvent:
    """One cut of a training run, tried at the start of step `step + 1`.

    Attributes:
        step: optimizer steps done before it.
        result: what it did, with every layer's spectrum in `result.plan`.
    """

    step: int
    result: CompressionResult


def scalars(event: CutEvent) -> dict[str, float]:
    """Flat numbers of one cut for a Trainer's log; layers are numbered in model order."""
    result = event.result
    layers = result.plan.layers
    values: dict[str, float] = {
        "compressm/cut": float(result.changed),
        "compressm/state_size_mean": sum(layer.new_state_size for layer in layers) / len(layers),
        "compressm/energy_kept": min(layer.energy_kept for layer in layers),
        "compressm/predicted_error": max(layer.predicted_error for layer in layers),
        "compressm/skipped_layers": float(sum(layer.status == "skipped" for layer in layers)),
        "compressm/parameters": float(result.parameters_after),
        "compressm/seconds": result.seconds,
    }
    bounds = [layer.error_bound for layer in layers if layer.error_bound is not None]
    if bounds:
        values["compressm/error_bound"] = max(bounds)
    for number, layer in enumerate(layers):
        values[f"compressm/layer_{number:02d}/state_size"] = float(layer.new_state_size)
    return values
