"""J and F, the two measures of semi-supervised video object segmentation.

J is region similarity (Jaccard index), F the boundary measure; both as defined by DAVIS 2017
(Perazzi et al., CVPR 2016) and as computed by the reference's evaluator
(facebookresearch/sam2@2b90b9f sav_dataset/utils/sav_benchmark.py), to the last digit. Host code:
numpy and OpenCV, nothing here is traced. All values are fractions, 0-1.
"""

import functools
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8, UInt16

BOUND = 0.008  # tolerance of F, as a fraction of the image's diagonal
SCORED = 3  # frames that a clip needs for one to be scored: the first and the last are not


class FrameScores(NamedTuple):
    """J and F of every object on one frame (stacked: on all frames), and who was there to score."""

    j: Float[np.ndarray, "*t o"]
    f: Float[np.ndarray, "*t o"]
    in_truth: Bool[np.ndarray, "*t o"]  # the object has pixels in the ground truth
    in_prediction: Bool[np.ndarray, "*t o"]  # ... and in the prediction


class ObjectScores(NamedTuple):
    """Means over the scored frames of one object of one clip, 0-1."""

    clip: str
    object_id: int
    j: float
    f: float
    static_j: float
    static_f: float


class Results(NamedTuple):
    """Scores of every (clip, object) pair; the properties average over the pairs."""

    objects: tuple[ObjectScores, ...]

    @property
    def j(self) -> float:
        return float(np.mean([o.j for o in self.objects]))

    @property
    def f(self) -> float:
        return float(np.mean([o.f for o in self.objects]))

    @property
    def jf(self) -> float:
        """J&F, the mean of J and F."""
        return (self.j + self.f) / 2

    @property
    def static(self) -> "Results":
        """The static baseline's scores in the model's place."""
        return Results(tuple(o._replace(j=o.static_j, f=o.static_f) for o in self.objects))

    @property
    def clips(self) -> dict[str, "Results"]:
        """The same by clip, in the order of evaluation."""
        names = dict.fromkeys(o.clip for o in self.objects)
        return {n: Results(tuple(o for o in self.objects if o.clip == n)) for n in names}

    def __str__(self) -> str:
        """One line: the model beside the static baseline."""
        static, clips = self.static, len(self.clips)
        return (
            f"J&F {self.jf:.3f} (J {self.j:.3f}, F {self.f:.3f}); static first-frame mask "
            f"J&F {static.jf:.3f} (J {static.j:.3f}, F {static.f:.3f}); "
            f"{clips} clip{'s' * (clips != 1)}, "
            f"{len(self.objects)} object{'s' * (len(self.objects) != 1)}"
        )


def jaccard(predicted: Bool[np.ndarray, "h w"], true: Bool[np.ndarray, "h w"]) -> float:
    """Intersection over union; 1 where both masks are empty."""
    union = np.count_nonzero(predicted | true)
    return np.count_nonzero(predicted & true) / union if union else 1.0


def boundary_f(
    predicted: Bool[np.ndarray, "h w"], true: Bool[np.ndarray, "h w"], bound: float = BOUND
) -> float:
    """F measure of two outlines that match within a disk of `bound` times the diagonal.

    Precision is the share of predicted outline pixels that lie near the true outline, recall the
    reverse. 1 where neither mask has an outline (both empty, or both full), 0 where only one has.
    """
    edges = [_boundary(predicted), _boundary(true)]
    count = [np.count_nonzero(edge) for edge in edges]
    if not all(count):
        return float(count[0] == count[1])
    disk = _disk(int(np.ceil(bound * np.linalg.norm(true.shape))))
    near = [cv2.dilate(edge.astype(np.uint8), disk).astype(bool) for edge in edges]
    precision = np.count_nonzero(edges[0] & near[1]) / count[0]
    recall = np.count_nonzero(edges[1] & near[0]) / count[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def score_frame(
    predicted: UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"],
    true: Bool[np.ndarray, "o h w"],
) -> FrameScores:
    """Scores a label map, 0 background and k + 1 for object k, against the objects' masks."""
    j, f, in_truth, in_prediction = [], [], [], []
    for k, t in enumerate(true):
        p = predicted == k + 1
        j.append(jaccard(p, t))
        f.append(boundary_f(p, t))
        in_truth.append(bool(t.any()))
        in_prediction.append(bool(p.any()))
    return FrameScores(np.array(j), np.array(f), np.array(in_truth), np.array(in_prediction))


def clip_means(
    frames: list[FrameScores],
) -> tuple[Float[np.ndarray, " o"], Float[np.ndarray, " o"]]:
    """Mean J and mean F of each object over the scored frames of a clip.

    As in the reference's evaluator, an object counts from the first scored frame that shows it in
    the truth or in the prediction, and one that the truth never shows is not scored (NaN).
    """
    scores = FrameScores(*map(np.stack, zip(*frames, strict=True)))
    counted = np.logical_or.accumulate(scores.in_truth | scores.in_prediction, axis=0)
    counted &= scores.in_truth.any(axis=0)
    total = counted.sum(axis=0)
    empty = np.where(total > 0, 0.0, np.nan)
    return tuple(
        np.where(counted, x, 0.0).sum(axis=0) / np.maximum(total, 1) + empty
        for x in (scores.j, scores.f)
    )


def _boundary(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Outline one pixel wide: pixels that differ from their right, lower or diagonal neighbour.

    Beyond the image's edge the mask goes on as it is, so an edge alone is no outline.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)


@functools.lru_cache(maxsize=8)
def _disk(radius: int) -> UInt8[np.ndarray, "d d"]:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (x**2 + y**2 <= radius**2).astype(np.uint8)
