"""The arms of `compare_mamba2.py`: ways to cut the states of Mamba-2 and of hybrids with it."""

from cut_arms import Arm
from state_orders import UnweightedStatistics, by_energy
from state_scores import activations, magnitude, taylor_of_masks, taylor_of_weights


CALIBRATION_BATCHES = 16
_SELECTED = {"refit_steps": 0}
_PROJECTED = {"compat": "best", "per_layer": False}

ARMS = (
    Arm("random", {"keep": "random", **_SELECTED}),
    Arm("magnitude", _SELECTED, scores=magnitude),
    Arm("energy", _SELECTED, by_energy, further=True),
    Arm("GHOST", {"sequential": True, **_SELECTED}, by_energy, statistics=UnweightedStatistics, further=True),
    Arm("Taylor", _SELECTED, scores=taylor_of_weights, further=True),
    Arm("Taylor of masks", _SELECTED, scores=taylor_of_masks),
    Arm("UniQL's order", _SELECTED, scores=activations),
    Arm("selection", _SELECTED, further=True),
    Arm("sequential", {"sequential": True, **_SELECTED}),
    Arm("fisher", {"criterion": "fisher", **_SELECTED}),
    Arm("refit", {"refit_steps": 100}, further=True),
    Arm("refit 400", {"refit_steps": 400}),
    Arm("fisher, refit", {"criterion": "fisher", "refit_steps": 100}),
    Arm("sequential, refit", {"sequential": True, "refit_steps": 100}),
    Arm("projection", {"refit_steps": 0, **_PROJECTED}, further=True),
    Arm("fisher, projection", {"criterion": "fisher", "refit_steps": 0, **_PROJECTED}),
    Arm("best", {"refit_steps": 100, **_PROJECTED}),
    Arm("budget", {"compat": "best", "criterion": "fisher", "refit_steps": 0}, shared=True),
    Arm("budget, best", {"compat": "best", "criterion": "fisher", "refit_steps": 100}, shared=True),
    Arm("fisher, best", {"criterion": "fisher", "refit_steps": 100, **_PROJECTED}),
)
"""`energy` is that of a state in the layer's output, in one pass. GHOST, arXiv 2602.11408, has it in the output of the
recurrence, the root of `E[h^2 C^2]` in a group, layer after layer, each measured in the network that is cut so far.
"""
