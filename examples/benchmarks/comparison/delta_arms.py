"""The arms of `compare_matrix.py`: ways to cut the states of a delta net."""

from channel_orders import TOKENS, by_rank_revealing_qr
from cut_arms import Arm
from state_orders import by_energy


CALIBRATION_BATCHES = 4
_QR = {"order": by_rank_revealing_qr, "sampled_tokens": TOKENS}

ARMS = (
    Arm("random", {"keep": "random", "refit_steps": 0}),
    Arm("energy", {"refit_steps": 0}, by_energy),
    Arm("rank-revealing QR", {"refit_steps": 0}, **_QR, further=True),
    Arm("elimination", {"refit_steps": 0}, further=True),
    Arm("refit", {"refit_steps": 100}, further=True),
    Arm("projection", {"compat": "best", "refit_steps": 0}),
    Arm("best", {"compat": "best", "refit_steps": 100}),
    Arm("random, refit", {"keep": "random", "refit_steps": 100}),
    Arm("rank-revealing QR, refit", {"refit_steps": 100}, **_QR),
)
