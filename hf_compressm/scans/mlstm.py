"""The recurrence of mLSTM layers (xLSTM), as far as measuring them takes it.

    C_t = f_t C_{t-1} + i_t v_t k_t^T       n_t = f_t n_{t-1} + i_t k_t       y_t = s C_t q_t / max(s |n_t q_t|, 1)

| symbol | meaning | shape |
|---|---|---|
| q, k | read-out and input vectors | `(batch, length, heads, N)` |
| v | input | `(batch, length, heads, head_dim)` |
| i, f | gates: the exponential, and the logistic function of a projection | `(batch, heads, length)` |
| C | state | `(batch, heads, head_dim, N)` |
| n | normaliser, the state of an input that is always 1 | `(batch, heads, N)` |
| m | stabiliser: C and n are kept times `exp(-m)`, or the gates would overflow | `(batch, heads, length)` |
| s | scale of the read-out, `1 / sqrt(N)` | |

Source: *xLSTM: Extended Long Short-Term Memory* (arXiv 2405.04517), section 2.3 and appendix A.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .ssd_chunks import states_after_chunks


EPS = 1e-6
"""What the layers add to the normaliser."""
Start = tuple[Tensor, Tensor, Tensor]
"""C as the layers keep it, `(batch, heads, N, head_dim)`, n `(batch, heads, N)`, and m `(batch, heads, 1)`."""


def mlstm_states(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, start: Start | None = None, every: int = 1
) -> Iterator[Tensor]:
    """Yield the states as they are read out, one step at a time, `(1, batch, heads, head_dim, N)`, without gradients.

    What is yielded is `s C_t / max(s |n_t q_t|, 1)`, so that its product with q is the output.

    Args:
        q: read-out vectors, `(batch, length, heads, N)`.
        k: input vectors, likewise.
        v: input, `(batch, length, heads, head_dim)`.
        igate: input gate before the exponential, `(batch, heads, length)`.
        fgate: forget gate before the logistic function, `(batch, heads, length)`.
        start: state before the first step; zero if None.
        every: yield only the states after every `every`-th step.
    """
    with torch.no_grad():
        scale = q.shape[-1] ** -0.5
        before = v.new_zeros(*igate.shape[:2], 1) if start is None else start[2].to(v)
        log_decay, log_input, m = _stabilised(igate, F.logsigmoid(fgate), before)
        drive = F.pad(v, (0, 1), value=1.0) * log_input.exp().mT[..., None]  # the last channel is the normaliser's
        state = drive.new_zeros(v.shape[0], *drive.shape[2:], k.shape[-1])
        if start is not None:
            state = torch.cat([start[0].to(v).mT, start[1].to(v).unsqueeze(2)], dim=2)
        chunks = states_after_chunks(drive, log_decay.mT, k, state, every)
        for step, after in zip(range(every - 1, v.shape[1], every), chunks, strict=True):
            along = (after[:, :, -1] * q[:, step]).sum(dim=-1).abs() * scale  # (batch, heads)
            norm = torch.maximum(along, (-m[..., step]).exp()) + EPS
            yield (after[:, :, :-1] * (scale / norm)[..., None, None])[None]


def _stabilised(log_i: Tensor, log_f: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of the gates of the stabilised recurrence, none above 0, and m; all `(batch, heads, length)`.

    `m_t = max(log f_t + m_{t-1}, log i_t)`, the largest exponent of anything that the state has taken in.
    """
    m, last = [], before[..., 0]
    for step in range(log_i.shape[-1]):
        last = torch.maximum(log_f[..., step] + last, log_i[..., step])
        m.append(last)
    now = torch.stack(m, dim=-1)
    then = torch.cat([before, now[..., :-1]], dim=-1)
    return log_f + then - now, log_i - now, now
