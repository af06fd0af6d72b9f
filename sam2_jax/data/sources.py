"""What every source of video looks like, and the lines it shows at start-up.

A source is random access: it names its clips and decodes only the frames asked for, at their
original resolution. It is opened once, checks everything there, and is then only read; it must
pickle, since loader processes receive a copy.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8


class Video(NamedTuple):
    """One clip as its source knows it before any frame is decoded."""

    name: str
    num_frames: int
    height: int  # pixels, original resolution
    width: int


@runtime_checkable  # tests check annotations with isinstance
class VideoSource(Protocol):
    """Clips with one label map per frame: 0 is background, k > 0 is object k of the clip."""

    name: str
    notes: list[str]  # what a user should know: clips left out, splits that were made

    def __len__(self) -> int:
        """Number of clips."""
        ...

    def video(self, index: int) -> Video:
        """Name, length and size of a clip, without decoding."""
        ...

    def read(
        self, index: int, frames: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], UInt8[np.ndarray, "t h w"]]:
        """RGB frames and label maps of a clip, in the order asked for."""
        ...

    def labels(self, index: int, frames: Sequence[int]) -> UInt8[np.ndarray, "t h w"]:
        """Label maps alone: what is needed to look for a frame with a visible object."""
        ...


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
