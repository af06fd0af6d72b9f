"""What every source of video looks like, which clips of it can be used, and its start-up lines.

A source is random access: it names its clips and decodes only the frames and objects asked for, at
their original resolution. It is opened once, checks everything there, and is then only read; it
must pickle, since loader processes receive a copy. An image is a clip of one frame.
"""

import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt8
from tqdm.auto import tqdm

from sam2_jax.types import NAMED, UserError, listed

THREADS = 16  # waits for disks and network file systems, not for the processor
SHOW_PROGRESS = 2000  # clips or files, a second or two
BLOCK = 4096  # jobs that a pool is given at a time
T = TypeVar("T")
R = TypeVar("R")
SKIP, STOP = "skip", "stop"  # what config.data.on_error can be


class Video(NamedTuple):
    """One clip as its source knows it before any frame is decoded."""

    name: str
    num_frames: int
    height: int  # pixels, original resolution
    width: int


@runtime_checkable  # tests check annotations with isinstance
class VideoSource(Protocol):
    """Clips whose objects have an id, a positive integer, and a mask on every frame.

    Masks of different objects may overlap. Where an object is absent its mask is empty.
    """

    name: str
    notes: list[str]  # what a user should know: clips left out, splits that were made

    def __len__(self) -> int:
        """Number of clips."""
        ...

    def video(self, index: int) -> Video:
        """Name, length and size of a clip, without decoding."""
        ...

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects that are visible on a frame, ascending."""
        ...

    def read(
        self, index: int, frames: Sequence[int], objects: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], Bool[np.ndarray, "t o h w"]]:
        """RGB frames of a clip and the masks of some objects, in the order asked for.

        Raises:
            UserError: a file cannot be read or decoded; it is named.
        """
        ...


@runtime_checkable
class EncodedSource(VideoSource, Protocol):
    """A source that can also hand out its frames as they are stored."""

    def encoded(self, index: int, frame: int) -> bytes:
        """The bytes that `decode.decode_frame` turns into the frame that `read` gives."""
        ...


class Faults:
    """What becomes of broken clips: the first one stops, or they are left out and counted."""

    def __init__(self, on_error: str = STOP, max_bad: float = 0.0) -> None:
        """`max_bad`: the share of clips, 0-1, that may be left out with `on_error` "skip"."""
        self.stop, self._max_bad = on_error != SKIP, max_bad
        self.errors: list[UserError] = []

    def add(self, error: UserError) -> None:
        """One clip is broken. Raises the error unless broken clips are left out."""
        if self.stop:
            raise error
        self.errors.append(error)

    def notes(self, total: int, where: str) -> list[str]:
        """A line about what was left out of `total` clips, if anything was.

        Raises:
            UserError: that is more than `max_bad` of them.
        """
        if not self.errors:
            return []
        found = f"{len(self.errors)} of {total} clips of {where} are broken"
        told = listed(str(error) for error in self.errors)
        if len(self.errors) > self._max_bad * total:
            raise UserError(
                f"{found}, more than config.data.max_bad={self._max_bad} allows: mend them or "
                f"raise that; {told}"
            )
        return [f"{found} and left out: {told}"]


class Selection:
    """Some clips of a source, as a source of their own."""

    def __init__(self, source: VideoSource, indices: Sequence[int], notes: Sequence[str]) -> None:
        """`notes` come after those of the source."""
        self.name = source.name
        self.notes = [*source.notes, *notes]
        self.source, self.indices = source, array.array("q", indices)

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.indices)

    def video(self, index: int) -> Video:
        """Name, length and size of a clip."""
        return self.source.video(self.indices[index])

    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects visible on a frame."""
        return self.source.objects(self.indices[index], frame)

    def read(
        self, index: int, frames: Sequence[int], objects: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], Bool[np.ndarray, "t o h w"]]:
        """Frames and masks."""
        return self.source.read(self.indices[index], frames, objects)


def bar(what: str, total: int, unit: str, items: Iterable[Any] | None = None) -> tqdm:
    """Progress of checks, over `items` or to be updated: of many, where stderr is a terminal."""
    hide = True if total <= SHOW_PROGRESS else None  # None: where it is none
    return tqdm(items, what, total, leave=False, unit=unit, disable=hide)


def in_blocks(pool: Executor, look: Callable[[T], R], jobs: Sequence[T]) -> Iterator[R]:
    """`pool.map`, which takes kilobytes of memory for every job, for any number of jobs."""
    for start in range(0, len(jobs), BLOCK):
        yield from pool.map(look, jobs[start : start + BLOCK])


def keep_usable(
    source: VideoSource, span: int, backwards: bool = False, faults: Faults | None = None
) -> VideoSource:
    """Leave out the clips that no sample can be drawn from, and say so in the notes.

    Args:
        source: all clips.
        span: frames of the video from the first to the last frame of a sample.
        backwards: whether a sample may also be played from its last frame.
        faults: what to do about clips that cannot be read.

    Raises:
        UserError: no clip is left; or a clip cannot be read.
    """
    faults = faults or Faults()

    def look(index: int) -> str | UserError:
        """Why a clip cannot be used, or an empty string."""
        count = source.video(index).num_frames
        if count < span:
            return f"shorter than {span} frames"
        try:
            if any(source.objects(index, t) for t in range(count - span + 1)):
                return ""
            if backwards and any(source.objects(index, t) for t in range(count - 1, span - 2, -1)):
                return ""
        except UserError as error:
            return error
        return "without a visible object where a sample may start"

    indices = array.array("q")  # of 11 million images in SA-1B
    counts: Counter[str] = Counter()
    first: dict[str, list[str]] = {}  # the names that are told, by reason
    with ThreadPoolExecutor(THREADS) as pool:
        found: Iterable[str | UserError] = in_blocks(pool, look, range(len(source)))
        for index, reason in enumerate(bar("looking for objects", len(source), "clip", found)):
            if isinstance(reason, UserError):
                faults.add(reason)
            elif reason:
                counts[reason] += 1
                if counts[reason] <= NAMED:
                    first.setdefault(reason, []).append(source.video(index).name)
            else:
                indices.append(index)
    notes = []
    for reason, names in sorted(first.items()):
        more = counts[reason] - len(names)
        told = "; ".join(names) + (f"; and {more} more" if more else "")
        notes.append(f"{counts[reason]} of {len(source)} clips left out, {reason}: {told}")
    notes += faults.notes(len(source), source.name)
    if not indices:
        why = "; ".join([*source.notes, *notes]) or "it has no clips"
        raise UserError(
            f"{source.name} has no clip to train on ({why}): lower config.data.num_frames or the "
            "stride, or check that masks hold objects (0 is background)"
        )
    return Selection(source, indices, notes) if notes else source


def describe(source: VideoSource) -> list[tuple[str, str]]:
    """`(label, value)` lines of the start-up table: clips, frames, sizes and the notes."""
    videos = [source.video(i) for i in range(len(source))]
    lengths = [v.num_frames for v in videos]
    sizes = sorted({(v.width, v.height) for v in videos})
    shown = ", ".join(f"{w} x {h}" for w, h in sizes[:3])
    if len(sizes) > 3:
        shown = (
            f"{len(sizes)} sizes, {sizes[0][0]} x {sizes[0][1]} to {sizes[-1][0]} x {sizes[-1][1]}"
        )
    spread = str(lengths[0]) if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
    rows = [
        ("source", source.name),
        ("clips", f"{len(videos):,}"),
        ("frames", f"{sum(lengths):,} ({spread} a clip)"),
        ("frame size", shown),
    ]
    return rows + [("note", note) for note in source.notes]
