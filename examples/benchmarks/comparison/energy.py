"""Ranking Mamba's states by their energy alone, without repair: a comparator that the package does not offer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

from torch import nn

from hf_compressm.families import CutMethod, Measurement, SelectiveFamily, SSMLayer, Statistics, register
from hf_compressm.families.registry import find_layers
from hf_compressm.families.selective import Selection


class EnergyFamily(SelectiveFamily):
    """Keeps the states with the largest `P_ii Q_ii`, state energy times read-out energy; the others are gone."""

    def measure(self, layer: SSMLayer, method: CutMethod, statistics: Statistics | None) -> Measurement:
        """As for the interpolated cut, with another order and no read-out of the dropped states."""
        measurement = super().measure(layer, method, statistics)
        if measurement.problem:
            return measurement
        found: Selection = measurement.detail
        orders = measurement.scores.argsort(dim=-1, descending=True)
        return replace(measurement, detail=Selection(orders, found.P, found.Q, reads_out=False))


@contextmanager
def ranking_by_energy(model: nn.Module) -> Iterator[None]:
    """Cut the Mamba layers of a model by energy inside, under any setting but `criterion="surrogate"`.

    Raises:
        ValueError: for a model with other layers.
    """
    families = {layer.family for layer in find_layers(model)}
    others = [family.name for family in families if type(family) is not SelectiveFamily]
    if others:
        raise ValueError(f"Ranking by energy is for Mamba-1 layers; this model has layers of {others[0]}.")
    try:
        for family in families:
            register(EnergyFamily(**{item.name: getattr(family, item.name) for item in fields(family)}))
        yield
    finally:
        for family in families:
            register(family)
