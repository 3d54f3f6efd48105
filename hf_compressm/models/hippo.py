"""HiPPO-N: the eigenvalues and eigenvectors that a fresh S5 layer starts from (arXiv 2208.04933, appendix B.1).

Glossary (continuous time):
    A       HiPPO-LegS matrix, (size, size), lower triangular
    A_norm  its normal part, A + p p^T with p_n = sqrt(n + 1/2), (size, size)
    Lambda  eigenvalues of A_norm, complex, ordered by imaginary part
    V       unitary eigenvectors of A_norm, complex, (size, slots)
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=16)
def hippo_normal_eigensystem(size: int) -> tuple[np.ndarray, np.ndarray]:
    """`Lambda` `(size,)` and `V` `(size, size)` of the normal part of HiPPO-LegS. Cubic in `size`.

    Every eigenvalue has real part -1/2. They come in conjugate pairs, with those of negative imaginary part first.
    """
    index = np.arange(size)
    scale = np.sqrt(1 + 2 * index)
    A = np.diag(index) - np.tril(np.outer(scale, scale))
    low_rank = np.sqrt(index + 0.5)
    A_norm = A + np.outer(low_rank, low_rank)  # -1/2 on the diagonal, antisymmetric off it
    imaginary, V = np.linalg.eigh(-1j * A_norm)
    return A_norm.diagonal().mean() + 1j * imaginary, V


def hippo_normal_blocks(slots: int, num_blocks: int, conj_sym: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """`Lambda` `(slots,)` and the eigenvectors of each diagonal block, `(size, slots of the block)`.

    Args:
        slots: Stored complex states.
        num_blocks: HiPPO-N blocks; when it does not divide `slots` their sizes differ by one, and there are never more
            blocks than slots.
        conj_sym: Whether a slot stands for a conjugate pair: a block then has twice as many states as slots, and the
            half with negative imaginary parts is kept.
    """
    blocks = []
    for block_slots in (len(part) for part in np.array_split(np.arange(slots), min(num_blocks, slots))):
        Lambda, V = hippo_normal_eigensystem(2 * block_slots if conj_sym else block_slots)
        blocks.append((Lambda[:block_slots], V[:, :block_slots]))
    return np.concatenate([Lambda for Lambda, _ in blocks]), [V for _, V in blocks]
