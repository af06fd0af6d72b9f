"""Semi-supervised video object segmentation: first-frame masks in, tracked masks out, scored.

The protocol of DAVIS 2017 as the reference runs it (facebookresearch/sam2@2b90b9f
tools/vos_inference.py, sav_dataset/sav_evaluator.py): the objects are those of the first annotated
frame, each pixel goes to the object with the highest positive logit, the first frame (it was given)
and the last are not scored (of a clip cut to `max_frames`, the last that is left), and the overall
figure is the mean over all (video, object) pairs. An object that enters later is background.
Beside the model stands the static baseline, the first-frame mask repeated: what a tracker scores
that tracks nothing.
"""

import functools
import queue
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt16
from tqdm.auto import tqdm

from sam2_jax import metrics, plots
from sam2_jax.data import transforms
from sam2_jax.data.sources import VideoSource
from sam2_jax.predict import video
from sam2_jax.types import Array, UserError

CHUNK = 8  # frames decoded at a time: bounds the memory of a long clip

Image = UInt8[np.ndarray, "h w 3"]
Masks = Bool[np.ndarray, "o h w"]
Labels = UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"]  # 0 background, k + 1 object k
# Predicts a clip frame by frame: (frames, masks of the first frame, number of frames) -> for each
# frame in order the label map with k + 1 where object k of the masks is.
PredictClip = Callable[[Iterator[Image], Masks, int], Iterator[Labels]]
Watch = Callable[[plots.View], None]  # called for every frame


def evaluate(
    predict: PredictClip,
    source: VideoSource,
    *,
    max_clips: int = 0,
    max_frames: int = 0,
    watch: Watch | None = None,
    progress: bool = False,
) -> metrics.Results:
    """Tracks and scores the clips of `source`, at most `max_clips` of `max_frames` each (0: all).

    Raises UserError where there is nothing to score.
    """
    clips = range(min(len(source), max_clips or len(source)))
    found = score_clips([predict], source, clips, max_frames, watch, progress)
    return collect(found, len(clips))


def score_clips(
    predictors: Sequence[PredictClip],
    source: VideoSource,
    clips: Sequence[int],
    max_frames: int = 0,
    watch: Watch | None = None,
    progress: bool = False,
    title: str = "evaluate",
    check: Callable[[], None] | None = None,
) -> list[metrics.ObjectScores]:
    """Tracks and scores some clips, each by the next predictor that is free.

    Scores come in the order of `clips`, frames are watched as they are predicted. `check` is called
    before every clip; what it raises ends all.
    """
    lengths = [source.video(i).num_frames for i in clips]
    total = sum(min(n, max_frames or n) for n in lengths)
    free: queue.SimpleQueue[PredictClip] = queue.SimpleQueue()
    for predict in predictors:
        free.put(predict)
    hide = None if progress else True  # None: hidden where no terminal shows it
    with (
        tqdm(total=total, desc=title, unit="frame", leave=False, disable=hide) as bar,
        ThreadPoolExecutor(len(predictors)) as pool,
    ):

        def one(i: int) -> list[metrics.ObjectScores]:
            if check:
                check()
            predict = free.get()
            try:
                return _evaluate_clip(predict, source, i, max_frames, watch, bar)
            finally:
                free.put(predict)

        try:
            return [row for rows in pool.map(one, clips) for row in rows]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def collect(objects: Sequence[metrics.ObjectScores], clips: int) -> metrics.Results:
    """All scores as one result; raises UserError where there are none."""
    if not objects:
        raise UserError(
            f"evaluation found no object to score in {clips} clips: it needs clips of at least 3 "
            "annotated frames whose objects are seen again after the first; check data.eval_root, "
            "eval.max_clips and eval.max_frames"
        )
    return metrics.Results(tuple(objects))


def check_source(source: VideoSource, max_clips: int = 0) -> None:
    """Raises UserError if none of the clips to evaluate has a frame that is scored."""
    count = min(len(source), max_clips or len(source))
    longest = max((source.video(i).num_frames for i in range(count)), default=0)
    if longest < metrics.SCORED:
        raise UserError(
            f"the longest of {count} evaluation clips has {longest} frames: at least "
            f"{metrics.SCORED} are needed, since the first and the last are not scored; "
            "check data.eval_root and eval.max_clips"
        )


def parse_prompt(prompt: str) -> int | None:
    """How many clicks a prompt's name means; None for "mask" and "box".

    Raises UserError for a name that is neither of these nor click1, click2 ...
    """
    if prompt in ("mask", "box"):
        return None
    if match := re.fullmatch(r"click([1-9]\d*)", prompt):
        return int(match[1])
    raise UserError(
        f"eval.prompts: {prompt!r} is no prompt of the first frame: take 'mask', 'box', or "
        "'click1', 'click3' ... for so many clicks on every object"
    )


def tracker_predictor(
    tracker: video.Tracker,
    params: Any,
    resolution: int,
    prompt: str = "mask",
    note: Callable[[plots.Given], None] | None = None,
) -> PredictClip:
    """Runs a tracker over a clip; the host works on a frame while the device tracks the next.

    The tracker is given the first frame's masks, the boxes around them, or clicks (see
    `parse_prompt`). The number of objects is padded to one of few sizes (with empty masks, whose
    output is dropped), so that few programs are compiled. `note` is told the prompt of a clip
    before its first frame is predicted.
    """
    clicks = parse_prompt(prompt)

    def start(image: Image, masks: Masks, num_frames: int, count: int) -> tuple[Any, Array]:
        points, labels = np.zeros((count, 0, 2), np.float32), np.zeros((count, 0), np.int32)
        if clicks:
            state, logits, points, labels = tracker.first_clicks(
                params, image, masks, num_frames, clicks=clicks
            )
        elif prompt == "box":
            points, labels = boxes(masks)
            state, logits = tracker.first_points(params, image, points, labels, num_frames)
        else:
            state, logits = tracker.first(params, image, masks, num_frames)
        if note:
            places = (np.asarray(points)[:count] + 0.5) / resolution
            note(plots.Given(prompt, places, np.asarray(labels)[:count]))
        return state, logits

    def predict(frames: Iterator[Image], masks: Masks, num_frames: int) -> Iterator[Labels]:
        size = masks.shape[1:]
        pad = np.zeros((_padded(len(masks)) - len(masks), resolution, resolution), bool)
        given = np.concatenate([transforms.resize_masks(masks, resolution), pad])
        resize = functools.partial(_resize_frame, resolution=resolution)
        state, logits = start(resize(next(frames)), given, num_frames, len(masks))
        for frame in frames:
            pending = logits
            state, logits = tracker.next(params, state, resize(frame))
            yield label_map(np.asarray(pending)[: len(masks)], size)
        yield label_map(np.asarray(logits)[: len(masks)], size)

    return predict


def boxes(masks: Masks) -> tuple[Float[np.ndarray, "o 2 2"], Int[np.ndarray, "o 2"]]:
    """Corners (x, y in pixels, inclusive) of the boxes around masks, and their labels 2 and 3.

    An empty mask has no corners: labels -1.
    """
    points = np.zeros((len(masks), 2, 2), np.float32)
    labels = np.full((len(masks), 2), -1, np.int32)
    for k, mask in enumerate(masks):
        y, x = np.nonzero(mask)
        if len(y):
            points[k] = (x.min(), y.min()), (x.max(), y.max())
            labels[k] = 2, 3
    return points, labels


def label_map(logits: Float[Array, "o hl wl"], size: tuple[int, int]) -> Labels:
    """Upsamples logits bilinearly to `size` and gives each pixel to the highest one, if positive.

    Ties go to the earlier object. The same as the reference's non-overlapping masks
    (sam2_base.py `_apply_non_overlapping_constraints`), with one object in memory at a time.
    """
    best = np.zeros(size, np.float32)
    labels = np.zeros(size, np.uint8 if len(logits) < 256 else np.uint16)
    for k, low in enumerate(np.asarray(logits, np.float32)):
        high = cv2.resize(low, size[::-1], interpolation=cv2.INTER_LINEAR)
        labels[high > best] = k + 1
        np.maximum(best, high, out=best)
    return labels


def _evaluate_clip(
    predict: PredictClip,
    source: VideoSource,
    i: int,
    max_frames: int,
    watch: Watch | None,
    bar: tqdm,
) -> list[metrics.ObjectScores]:
    name = source.video(i).name
    start, ids = _first_annotated(source, i)
    stop = source.video(i).num_frames
    stop = min(stop, start + max_frames) if max_frames else stop
    num_frames = stop - start
    if not ids:
        return []
    decoded: deque[tuple[Image, Masks]] = deque()  # handed to the tracker, not yet predicted
    masks = source.read(i, [start], ids)[1][0]
    # Overlapping masks become a label map as predictions do: the earlier object wins
    static = np.zeros(masks.shape[1:], np.uint16)
    for k in range(len(ids), 0, -1):
        static[masks[k - 1]] = k

    def frames() -> Iterator[Image]:
        for chunk in range(start, stop, CHUNK):
            images, truths = source.read(i, range(chunk, min(chunk + CHUNK, stop)), ids)
            for image, true in zip(images, truths, strict=True):
                decoded.append((image, true))
                yield image

    model_scores, static_scores = [], []
    for t, predicted in enumerate(predict(frames(), masks, num_frames)):
        image, true = decoded.popleft()
        if 0 < t < num_frames - 1:
            model_scores.append(metrics.score_frame(predicted, true))
            static_scores.append(metrics.score_frame(static, true))
        if watch:
            watch(plots.View(name, i, start + t, t, num_frames, image, ids, predicted, true))
        bar.update()
    if not model_scores:
        return []
    columns = *metrics.clip_means(model_scores), *metrics.clip_means(static_scores)
    rows = [
        metrics.ObjectScores(name, k, *map(float, row))
        for k, *row in zip(ids, *columns, strict=True)
    ]
    return [row for row in rows if not np.isnan(row.j)]


def _first_annotated(source: VideoSource, i: int) -> tuple[int, tuple[int, ...]]:
    """The first frame with an object, 0 in nearly every clip, and the objects that it shows."""
    for t in range(source.video(i).num_frames):
        if ids := source.objects(i, t):
            return t, ids
    return 0, ()


def _padded(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ..."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 and power > 2 else power


def _resize_frame(image: Image, resolution: int) -> UInt8[np.ndarray, "s s 3"]:
    return transforms.resize_frames(image[None], resolution)[0]
