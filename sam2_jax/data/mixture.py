"""Several sources as one endless stream of batches, each batch of one source.

Images (one frame) are trained beside video (eight), as SAM 2 was: the sources differ in frames,
objects and batch size, so a batch comes from one of them, and the same one on every device.

Everything is a function of a position in the stream, so nothing but the position need be saved:
which source gives batch n, which clips are in it, what is random about them. Of the two ways to
choose the source, "interleave" is the default: after any number of steps each source has had its
share to within a batch or two, where independent draws ("random", the reference's) stray by the
square root of the number of steps and end each epoch with whatever source is left. So with
"random" weights only order an epoch: over all of it a source has its share of the epoch's batches.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int8, Int64

from sam2_jax.types import UserError

INTERLEAVE, RANDOM = "interleave", "random"
SUM_TOLERANCE = 1e-6  # of weights written down as decimal fractions


class Share(NamedTuple):
    """What one source gives to the stream."""

    name: str
    clips: int
    batch_size: int  # clips of a batch over all processes
    weight: float  # share of the batches (see above); 0 for all: in proportion to their batches
    multiplier: float  # how often an epoch shows a clip, on average

    @property
    def epoch(self) -> int:
        """Clips shown in one epoch, repetitions counted."""
        return max(1, round(self.clips * self.multiplier))

    @property
    def batches(self) -> int:
        """Batches of one epoch, at least one."""
        return max(1, self.epoch // self.batch_size)


def weights(shares: Sequence[Share]) -> list[float]:
    """The probability of each source, in order.

    Raises:
        UserError: a weight is negative, only some are given, or they do not sum to 1.
    """
    given = [share.weight for share in shares]
    shown = ", ".join(f"{share.name} {share.weight:g}" for share in shares)
    if any(weight < 0 for weight in given):
        raise UserError(f"weights of config.data.mixture must not be negative: {shown}")
    if not any(given):
        total = sum(share.batches for share in shares)
        return [share.batches / total for share in shares]
    if not all(given):
        raise UserError(
            f"weights of config.data.mixture are given for some sources only: {shown}; give all, "
            "or none (0: proportional to length), and take out the source that is not wanted"
        )
    if abs(sum(given) - 1) > SUM_TOLERANCE:
        raise UserError(f"weights of config.data.mixture sum to {sum(given):g}, not 1: {shown}")
    return given


@functools.lru_cache(maxsize=8)
def _extra(seed: tuple[int, ...], clips: int) -> Int64[np.ndarray, " n"]:
    return np.random.default_rng(seed).permutation(clips)


def clip_of(entry: int, epoch: int, share: Share, seed: tuple[int, ...]) -> int:
    """Which clip an entry of an epoch is.

    A multiplier of 2.3 shows every clip twice, and 3 of 10 clips, others in every epoch, once
    more. The reference rounds each clip's factor on its own (training/dataset/utils.py,
    RepeatFactorWrapper): the same expectation, but epochs of different lengths.
    """
    if entry < share.clips * int(share.multiplier):
        return entry % share.clips
    rank = entry - share.clips * int(share.multiplier)
    return int(_extra((*seed, epoch), share.clips)[rank])


class MakeEntry:
    """(position, entry of an epoch) -> example. A class, for loader processes get it pickled."""

    def __init__(
        self, share: Share, seed: tuple[int, ...], make: Callable[[int, np.random.Generator], Any]
    ) -> None:
        """See `clips`."""
        self._share, self._seed, self._make = share, seed, make

    def __call__(self, position: int, entry: int) -> Any:
        """The example; what is random about it is the epoch's and the clip's own."""
        epoch = position // self._share.epoch
        rng = np.random.default_rng((*self._seed, epoch, entry))
        return self._make(clip_of(entry, epoch, self._share, self._seed), rng)


def clips(
    share: Share, seed: tuple[int, ...], make: Callable[[int, np.random.Generator], Any]
) -> grain.MapDataset:
    """The endless stream of one source's examples: `make(clip, rng)` at every position.

    An epoch shows every clip (see `clip_of`) in an order of its own. What is random about an
    example depends on the seed, the epoch and the clip alone.
    """
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    # Shuffling comes before repeating, else an epoch would not be a permutation.
    shuffled = grain.MapDataset.range(share.epoch).seed(mixed).shuffle().repeat()
    return shuffled.map_with_index(MakeEntry(share, seed, make))


class RandomDraw:
    """Which source gives batch n, and its how manieth batch that is, as the reference draws.

    A phase offers each source's batches of an epoch, divided by `phases`. Sources are drawn by
    probability; one that has given all of its batches is no longer drawn, and a phase ends when
    all have (facebookresearch/sam2@2b90b9f training/dataset/sam2_datasets.py, which draws the same
    sequence in every epoch; here each phase has its own).
    """

    def __init__(self, shares: Sequence[Share], phases: int, seed: int) -> None:
        """`phases`: of an epoch (the reference's phases_per_epoch)."""
        self.batches = [max(1, share.batches // phases) for share in shares]
        self._probabilities = weights(shares)
        self._seed = seed
        self._phase = functools.lru_cache(maxsize=2)(self._draw)

    def __getstate__(self) -> dict:
        """Without the cache, which does not pickle."""
        return {name: value for name, value in self.__dict__.items() if name != "_phase"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self._phase = functools.lru_cache(maxsize=2)(self._draw)

    def _draw(self, phase: int) -> tuple[Int8[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """(source, rank among that source's batches of this phase) of every batch."""
        rng = np.random.default_rng((self._seed, phase))
        left = np.array(self.batches)
        drawn: list[np.ndarray] = []
        while left.any():
            chances = np.where(left > 0, self._probabilities, 0.0)
            some = rng.choice(len(left), int(left.sum()), p=chances / chances.sum()).astype(np.int8)
            # Up to and with the batch that exhausts the first source
            ends = [np.flatnonzero(some == i)[n - 1 : n] for i, n in enumerate(left) if n]
            stop = min((int(end[0]) for end in ends if len(end)), default=len(some) - 1) + 1
            drawn.append(some[:stop])
            left = left - np.bincount(some[:stop], minlength=len(left))
        sources = np.concatenate(drawn)
        ranks = np.zeros(len(sources), np.int64)
        for i in range(len(self.batches)):
            ranks[sources == i] = np.arange(self.batches[i])
        return sources, ranks

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(source, number of its batches before this one) of a batch of the stream."""
        phase, place = divmod(position, sum(self.batches))
        sources, ranks = self._phase(phase)
        source = int(sources[place])
        return source, phase * self.batches[source] + int(ranks[place])


class Drawn:
    """Batches of several streams in the order of a `RandomDraw`, for grain to read."""

    def __init__(self, streams: Sequence[grain.MapDataset], draw: RandomDraw) -> None:
        """`streams`: endless, of batches."""
        self._streams, self._draw = streams, draw

    def __len__(self) -> int:
        """As many as grain can count: the stream has no end."""
        return min(len(stream) for stream in self._streams)

    def __getitem__(self, index: int) -> Any:
        """Batch number `index`."""
        source, number = self._draw[index]
        return self._streams[source][number]


def mix(
    streams: Sequence[grain.MapDataset],
    shares: Sequence[Share],
    draw: str = INTERLEAVE,
    phases: int = 1,
    seed: int = 0,
) -> grain.MapDataset:
    """One endless stream of the batches of several.

    Args:
        streams: endless, of batches, one for each share.
        shares: what they are.
        draw: "interleave" (even proportions, by grain) or "random" (independent draws).
        phases: of an epoch; "random" only, since it alone has epochs to divide.
        seed: of random draws; the same on every process.

    Raises:
        UserError: the weights cannot be, see `weights`.
    """
    chances = weights(shares)
    if len(streams) == 1:
        return streams[0]
    if draw == RANDOM:
        return grain.MapDataset.source(Drawn(streams, RandomDraw(shares, phases, seed)))
    # Grain cuts proportions down to whole hundredths of the smallest: let none fall by rounding
    hundredths = [round(100 * chance / min(chances)) for chance in chances]
    return grain.MapDataset.mix(streams, [float(n) for n in hundredths])
