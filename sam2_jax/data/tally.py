"""What `survey` found in clips, added up: numbers, faults, and what is there twice.

Clips are added as they come and forgotten, so that millions of them take little memory: a list of
mask areas would be larger than the masks' own files.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from sam2_jax.data.sources import SKIP
from sam2_jax.data.survey import Clip

PALETTE = 255  # the largest id that an indexed PNG can hold
PERCENTILES = (5, 50, 95)
SMALLEST = 1e-9  # share of a frame; a single pixel of the largest picture is more
BINS = 8192  # of mask areas between that and 1, in equal ratios: each is 0.25% wide
TOLD = 20  # so many faults of a kind are kept by name, the others are counted


class Tally:
    """Everything about one source, added up over its clips."""

    def __init__(self) -> None:
        """Nothing read yet."""
        self.clips = self.frames = self.bare = self.pairs = self.masks = self.hollow = 0
        self.large_ids = 0  # objects whose id is above PALETTE
        self.broken = 0  # clips with something unreadable
        self.a_frame, self.a_clip = Spread(), Spread()  # numbers of objects
        self.unreadable, self.mismatches = Named(), Named()
        self._areas = np.zeros(BINS, np.int64)
        self._hashes, self._owners = array("Q"), array("Q")
        self.lengths: dict[int, int] = {}  # different frames of each clip read

    def add(self, clip: Clip) -> None:
        """Count a clip."""
        self.clips += 1
        self.frames += clip.frames
        self.bare += clip.visible.count(0)
        self.pairs += len(clip.objects) * len(clip.visible)
        self.masks += sum(clip.visible)
        self.hollow += clip.hollow
        self.large_ids += sum(k > PALETTE for k in clip.objects)
        self.broken += bool(clip.unreadable)
        for number in clip.visible:
            self.a_frame.add(number)
        self.a_clip.add(len(clip.objects))
        self.unreadable.add(clip.unreadable)
        self.mismatches.add(clip.mismatches)
        place = BINS * (1 - np.log(clip.areas) / np.log(SMALLEST))
        self._areas += np.bincount(place.astype(int).clip(0, BINS - 1), minlength=BINS)
        self._hashes.frombytes(clip.hashes.tobytes())
        self._owners.extend([clip.index] * len(clip.hashes))
        self.lengths[clip.index] = len(clip.hashes)

    @property
    def empty(self) -> float:
        """Share of (object of the clip, frame) pairs without the object, 0-1."""
        return 1 - self.masks / self.pairs if self.pairs else 0.0

    def areas(self) -> list[float]:
        """Shares of the frame, 0-1, that `PERCENTILES` of the masks stay below; empty if none."""
        total = self._areas.sum()
        if not total:
            return []
        places = np.searchsorted(self._areas.cumsum(), np.array(PERCENTILES) / 100 * total)
        return (SMALLEST ** (1 - (places + 0.5) / BINS)).tolist()

    def hashes(self) -> tuple[UInt64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Hashes of frames, and the clip that each is of."""
        return np.array(self._hashes, np.uint64), np.array(self._owners, np.int64)


class Spread:
    """Mean, least and most of some numbers."""

    def __init__(self) -> None:
        """No number yet."""
        self.count = self.total = self.least = self.most = 0

    def add(self, number: int) -> None:
        """Count a number."""
        self.least = min(self.least, number) if self.count else number
        self.most = max(self.most, number)
        self.count += 1
        self.total += number

    @property
    def mean(self) -> float:
        """0 of no numbers."""
        return self.total / self.count if self.count else 0.0


class Named:
    """Texts of which the first are kept."""

    def __init__(self) -> None:
        """No text yet."""
        self.count = 0
        self.first: list[str] = []

    def add(self, texts: Sequence[str]) -> None:
        """Count, and keep while there is room."""
        self.count += len(texts)
        self.first += texts[: TOLD - len(self.first)]


class Twice(NamedTuple):
    """Two clips with frames in common; each is (number of its source, its index there)."""

    one: tuple[int, int]
    other: tuple[int, int]
    frames: int  # different frames that are in both


def duplicates(tallies: Sequence[Tally]) -> list[Twice]:
    """Pairs of clips that show the same pixels, most frames in common first.

    Of three clips with a frame in common, two pairs are told: the first clip with each other one.
    """
    if not tallies:
        return []
    found = [tally.hashes() for tally in tallies]
    hashes = np.concatenate([h for h, _ in found])
    clips = np.concatenate([c for _, c in found])
    sources = np.repeat(np.arange(len(found)), [len(h) for h, _ in found])
    order = np.argsort(hashes, kind="stable")  # the first source and clip stay first
    hashes, clips, sources = hashes[order], clips[order], sources[order]
    again = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    pairs = Counter()
    first = np.searchsorted(hashes, hashes[again])
    for a, b in zip(first.tolist(), again.tolist(), strict=True):
        pairs[(int(sources[a]), int(clips[a])), (int(sources[b]), int(clips[b]))] += 1
    twice = [Twice(one, other, frames) for (one, other), frames in pairs.items()]
    return sorted(twice, key=lambda pair: (-pair.frames, pair.one, pair.other))


def obstacle(tally: Tally, on_error: str, max_bad: float) -> str:
    """Why reading would stop training, and what to mend; an empty string if it would not.

    Args:
        tally: of all clips of a source, or of a sample.
        on_error: what to do at clips that cannot be read: "stop" or "skip".
        max_bad: share of the clips, 0-1, that may be left out with "skip".
    """
    if tally.mismatches.count:
        return f"{tally.mismatches.first[0]}: mend that clip or take it out"
    bad = f"{tally.broken} of {tally.clips} clips cannot be read"
    if tally.broken and on_error != SKIP:
        return f"{bad}: {tally.unreadable.first[0]}"
    if tally.broken > max_bad * tally.clips:
        return f"{bad}, more than config.data.max_bad={max_bad}: {tally.unreadable.first[0]}"
    return ""


def _shown(spread: Spread) -> str:
    """Mean and range."""
    return f"{spread.mean:.3g} on average, {spread.least} to {spread.most}"


def _percent(share: float) -> str:
    """A share, 0-1, in percent."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{share:.1%}"


def rows(tally: Tally, clips: int) -> list[tuple[str, str]]:
    """`(label, value)` lines of a table; `clips`: that the source has, read or not."""
    areas = ", ".join(f"{_percent(area)}" for area in tally.areas())
    lines = [
        ("read", f"{tally.clips:,} of {clips:,} clips, {tally.frames:,} frames"),
        ("objects a frame", _shown(tally.a_frame)),
        ("objects a clip", _shown(tally.a_clip)),
        ("ids above 255", f"{tally.large_ids:,}" if tally.large_ids else "none"),
        ("no object", f"on {tally.bare:,} of {tally.a_frame.count:,} frames"),
        ("empty masks", f"{_percent(tally.empty)} of a clip's objects and frames"),
        ("mask area", f"{areas} of the frame (5, 50 and 95% of masks are smaller)"),
    ]
    if not areas:
        lines.pop()
    if tally.hollow:
        lines.append(("not a pixel", f"{tally.hollow:,} masks of objects listed as visible"))
    for label, named in (("unreadable", tally.unreadable), ("mismatch", tally.mismatches)):
        if named.count:
            lines += [(label, text) for text in named.first]
            if more := named.count - len(named.first):
                lines.append((label, f"and {more:,} more"))
        else:
            lines.append((label, "none"))
    return lines


def _range(spread: Spread) -> dict[str, float]:
    return {"mean": spread.mean, "min": spread.least, "max": spread.most}


def as_json(tally: Tally) -> dict[str, Any]:
    """The same numbers for a program."""
    return {
        "clips_read": tally.clips,
        "frames_read": tally.frames,
        "objects_per_frame": _range(tally.a_frame),
        "objects_per_clip": _range(tally.a_clip),
        "ids_above_255": tally.large_ids,
        "frames_without_object": tally.bare,
        "empty_masks": tally.empty,
        "masks_without_pixel": tally.hollow,
        "mask_area": dict(zip(map(str, PERCENTILES), tally.areas(), strict=False)),
        "clips_unreadable": tally.broken,
        "unreadable": {"count": tally.unreadable.count, "first": tally.unreadable.first},
        "mismatches": {"count": tally.mismatches.count, "first": tally.mismatches.first},
    }
