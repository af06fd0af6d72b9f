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
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, UInt8
from tqdm.auto import tqdm

from sam2_jax import metrics, plots
from sam2_jax.data import transforms
from sam2_jax.data.sources import VideoSource
from sam2_jax.predict import video
from sam2_jax.types import Array, UserError

CHUNK = 8  # frames decoded at a time: bounds the memory of a long clip

Image = UInt8[np.ndarray, "h w 3"]
Masks = Bool[np.ndarray, "o h w"]
Labels = UInt8[np.ndarray, "h w"]  # 0 background, otherwise the object's id
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
    count = min(len(source), max_clips or len(source))
    lengths = [source.video(i).num_frames for i in range(count)]
    total = sum(min(n, max_frames or n) for n in lengths)
    objects: list[metrics.ObjectScores] = []
    hide = None if progress else True  # None: hidden where no terminal shows it
    with tqdm(total=total, desc="evaluate", unit="frame", leave=False, disable=hide) as bar:
        for i in range(count):
            objects += _evaluate_clip(predict, source, i, max_frames, watch, bar)
    if not objects:
        raise UserError(
            f"evaluation found no object to score in {count} clips: it needs clips of at least 3 "
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


def tracker_predictor(tracker: video.Tracker, params: Any, resolution: int) -> PredictClip:
    """Runs a tracker over a clip; the host works on a frame while the device tracks the next.

    The number of objects is padded to one of few sizes (with empty masks, whose output is dropped),
    so that few programs are compiled.
    """

    def predict(frames: Iterator[Image], masks: Masks, num_frames: int) -> Iterator[Labels]:
        size = masks.shape[1:]
        pad = np.zeros((_padded(len(masks)) - len(masks), resolution, resolution), bool)
        prompt = np.concatenate([transforms.resize_masks(masks, resolution), pad])
        resize = functools.partial(_resize_frame, resolution=resolution)
        state, logits = tracker.first(params, resize(next(frames)), prompt, num_frames)
        for frame in frames:
            pending = logits
            state, logits = tracker.next(params, state, resize(frame))
            yield label_map(np.asarray(pending)[: len(masks)], size)
        yield label_map(np.asarray(logits)[: len(masks)], size)

    return predict


def label_map(logits: Float[Array, "o hl wl"], size: tuple[int, int]) -> Labels:
    """Upsamples logits bilinearly to `size` and gives each pixel to the highest one, if positive.

    Ties go to the earlier object. The same as the reference's non-overlapping masks
    (sam2_base.py `_apply_non_overlapping_constraints`), with one object in memory at a time.
    """
    best = np.zeros(size, np.float32)
    labels = np.zeros(size, np.uint8)
    for k, low in enumerate(np.asarray(logits, np.float32)):
        high = cv2.resize(low, size[::-1], interpolation=cv2.INTER_LINEAR)
        labels[high > best] = k + 1
        np.maximum(best, high, out=best)
    return labels


def evaluate_config(
    config: Any, model: Any, params: Any, source: VideoSource, workdir: str | Path, step: int
) -> dict[str, float]:
    """Evaluates a model in training: a line on the screen, `overlay.png` in the workdir.

    Returns the row for metrics.jsonl: `eval/J&F`, `eval/J`, `eval/F` and the static baseline's
    `eval/static J&F`, `eval/static J`, fractions. Of several processes each evaluates everything,
    so that none runs into a timeout of the others' collectives, and the first one tells.
    """
    sheet = plots.Sheet()
    results = evaluate(
        tracker_predictor(_tracker(model), _local(params), config.model.resolution),
        source,
        max_clips=config.eval.max_clips,
        max_frames=config.eval.max_frames,
        watch=sheet.watch,
        progress=jax.process_index() == 0,
    )
    if jax.process_index() == 0:
        tqdm.write(f"step {step}: {results}")
        scores = {name: clip.jf for name, clip in results.clips.items()}
        title = f"step {step}: J&F {results.jf:.3f}, static mask {results.static.jf:.3f}"
        plots.overlay_sheet(sheet.rows, scores, Path(workdir) / "overlay.png", title=title)
    return {
        "eval/J&F": results.jf,
        "eval/J": results.j,
        "eval/F": results.f,
        "eval/static J&F": results.static.jf,
        "eval/static J": results.static.j,
    }


def _evaluate_clip(
    predict: PredictClip,
    source: VideoSource,
    i: int,
    max_frames: int,
    watch: Watch | None,
    bar: tqdm,
) -> list[metrics.ObjectScores]:
    name = source.video(i).name
    start, first = _first_annotated(source, i)
    stop = source.video(i).num_frames
    stop = min(stop, start + max_frames) if max_frames else stop
    num_frames = stop - start
    ids = tuple(int(k) for k in np.unique(first) if k)
    if not ids:
        return []
    masks = first == np.array(ids)[:, None, None]
    to_id = np.array((0, *ids), np.uint8)
    decoded: deque[tuple[Image, Labels]] = deque()  # handed to the tracker, not yet predicted

    def frames() -> Iterator[Image]:
        for chunk in range(start, stop, CHUNK):
            images, labels = source.read(i, range(chunk, min(chunk + CHUNK, stop)))
            for image, true in zip(images, labels, strict=True):
                decoded.append((image, true))
                yield image

    model_scores, static_scores = [], []
    for t, predicted in enumerate(predict(frames(), masks, num_frames)):
        image, true = decoded.popleft()
        predicted = to_id[predicted]
        if 0 < t < num_frames - 1:
            model_scores.append(metrics.score_frame(predicted, true, ids))
            static_scores.append(metrics.score_frame(first, true, ids))
        if watch:
            watch(plots.View(name, i, start + t, t, num_frames, image, predicted, true))
        bar.update()
    if not model_scores:
        return []
    columns = *metrics.clip_means(model_scores), *metrics.clip_means(static_scores)
    rows = [
        metrics.ObjectScores(name, k, *map(float, row))
        for k, *row in zip(ids, *columns, strict=True)
    ]
    return [row for row in rows if not np.isnan(row.j)]


def _first_annotated(source: VideoSource, i: int) -> tuple[int, Labels]:
    """The first frame with an object, 0 in nearly every clip, and its label map."""
    for t in range(source.video(i).num_frames):
        labels = source.labels(i, [t])[0]
        if labels.any():
            return t, labels
    return 0, np.zeros((1, 1), np.uint8)


def _padded(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ..."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 and power > 2 else power


def _resize_frame(image: Image, resolution: int) -> Array:
    return transforms.resize_frames(image[None], resolution)[0]


def _local(params: Any) -> Any:
    """A whole copy on one device of this process, wherever the parameters were sharded to."""
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    return jax.device_put(params, jax.local_devices()[0])


@functools.lru_cache(maxsize=4)
def _tracker(model: Any) -> video.Tracker:
    """One tracker per model, so that a later evaluation finds its programs compiled."""
    return video.make_tracker(model)
