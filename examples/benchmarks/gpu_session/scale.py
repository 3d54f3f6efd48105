"""How large everything is: the shapes of a session on a GPU, and toy ones that take a minute on a CPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Shapes of a session.

    Attributes:
        name: tells the figures of one scale from those of another.
        device: type of the device that everything runs on.
        compiled: shape (batch, channels, length) at which Triton's cache is built: several segments, and a number of
            channels that 16 divides, as in models, since Triton compiles for both.
        checked: shapes (batch, channels, length) of the scan that is compared with float64, by state size.
        scanned: shape (batch, channels, length) of the scan that is timed.
        states: sizes of a Mamba-1, the largest first.
        ends: the two of them at which steps of slow ways are timed, and from and to which the run of a Trainer is
            cut.
        mamba2_states: sizes of a Mamba-2.
        lru_states: sizes of an LRU.
        layers: of the language models.
        hidden: their width; twice as many channels.
        head_dim: channels of a head of a Mamba-2.
        vocabulary: tokens of the language models.
        batch: sequences in a step.
        length: tokens in a sequence.
        lru: layers, width, sequences and length of an LRU.
        trainer_steps: steps of the run of a Trainer; it is cut once, after a third of them.
        repeats: of which a time is the median.
        compiler: backend of `torch.compile`.
    """

    name: str
    device: str
    compiled: tuple[int, int, int]
    checked: dict[int, tuple[int, int, int]]
    scanned: tuple[int, int, int]
    states: tuple[int, ...]
    ends: tuple[int, int]
    mamba2_states: tuple[int, ...]
    lru_states: tuple[int, ...]
    layers: int
    hidden: int
    head_dim: int
    vocabulary: int
    batch: int
    length: int
    lru: tuple[int, int, int, int]
    trainer_steps: int
    repeats: int
    compiler: str = "inductor"


def full(device: str) -> Scale:
    """Language models of 130 million parameters, and the LRU that the paper trained on sCIFAR."""
    return Scale(
        name="full",
        device=device,
        compiled=(2, 256, 512),
        checked={13: (2, 200, 131), 128: (1, 1536, 300), 12: (3, 65, 7)},
        scanned=(8, 1536, 2048),
        states=(128, 12, 64, 32, 16),
        ends=(128, 12),
        mamba2_states=(128, 16, 64, 32),
        lru_states=(384, 96),
        layers=24,
        hidden=768,
        head_dim=64,
        vocabulary=50280,
        batch=8,
        length=2048,
        lru=(6, 512, 50, 1024),
        trainer_steps=24,
        repeats=7,
    )


def toy(device: str) -> Scale:
    """The smallest of everything."""
    return Scale(
        name="toy",
        device=device,
        compiled=(2, 16, 32),
        checked={3: (2, 5, 19), 8: (1, 8, 33), 2: (3, 3, 7)},
        scanned=(2, 16, 32),
        states=(8, 2),
        ends=(8, 2),
        mamba2_states=(8, 4),
        lru_states=(8, 4),
        layers=2,
        hidden=16,
        head_dim=8,
        vocabulary=32,
        batch=2,
        length=32,
        lru=(1, 8, 2, 32),
        trainer_steps=9,
        repeats=2,
        compiler="eager",
    )
