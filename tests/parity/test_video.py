"""Tracking through a video against the reference's predictor, longer than all its windows."""
# pyright: reportMissingImports=false

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest
import torch
from sam2.sam2_video_predictor import SAM2VideoPredictor

from sam2_jax import convert
from sam2_jax.decode import NO_OBJECT
from sam2_jax.predict import video
from tests.parity import reference, tolerances
from tests.parity.compare import close_to_exact, same_mask
from tests.parity.rounding import exactly, roundings

FRAMES = 20
OBJECTS = 3
ATTEMPTS = 20  # clips
ROUNDS = 10  # of shifting the scores of one
PROMPTS = {  # points and their labels, as shares of the side; none: a mask
    "mask": None,
    "click": ([[0.4, 0.3]], [1]),
    "two clicks": ([[0.4, 0.3], [0.8, 0.7]], [1, 0]),
    "box": ([[0.2, 0.1], [0.6, 0.7]], [2, 3]),
}


# Both predictors keep memories in bfloat16, where a last digit of float32 may decide the rounding:
# compared with memories in float32, and once as they are.
KINDS = {
    "plain": video.PLAIN._replace(memory_dtype=None),
    "postprocessed": video.POSTPROCESSED._replace(memory_dtype=None),
    "bfloat16 memories": video.PLAIN,
    "2.0": video.PLAIN._replace(memory_dtype=None),
}
CASES = [("plain", prompt) for prompt in PROMPTS]
CASES += [("postprocessed", "mask"), ("postprocessed", "two clicks"), ("bfloat16 memories", "mask")]
CASES += [("2.0", "mask"), ("2.0", "click")]


def version_of(kind: str) -> str:
    return "2.0" if kind == "2.0" else "2.1"


@pytest.fixture(scope="module")
def trackers(make_pair):
    return {
        kind: video.make_tracker(make_pair(version_of(kind)).model, inference)
        for kind, inference in KINDS.items()
    }


def make_predictor(model: Any, inference: Any) -> Any:
    """The reference's predictor around a copy of its training model's parts."""
    predictor: Any = copy.deepcopy(model)
    predictor.__class__ = SAM2VideoPredictor
    predictor.fill_hole_area = 0  # its kernel for it runs on GPUs only
    predictor.non_overlap_masks = False
    predictor.clear_non_cond_mem_around_input = False
    predictor.add_all_frames_to_correct_as_cond = False
    predictor.binarize_mask_from_pts_for_mem_enc = inference.binarise
    decoder = predictor.sam_mask_decoder
    decoder.dynamic_multimask_via_stability = inference.stability
    decoder.dynamic_multimask_stability_delta = 0.05
    decoder.dynamic_multimask_stability_thresh = 0.98
    if inference.stability:  # single masks so flat that none of them is stable
        with torch.no_grad():
            for x in decoder.output_hypernetworks_mlps[0].layers[-1].parameters():
                x *= 0.01
    return predictor.eval()


class Clip(NamedTuple):
    """Images, and what is prompted on the first: a mask per object, or points and labels."""

    images: np.ndarray
    masks: np.ndarray
    prompts: tuple[np.ndarray, np.ndarray] | None


class Tracked(NamedTuple):
    """What the reference returned."""

    logits: torch.Tensor  # t o h w
    scores: torch.Tensor  # t o

    @property
    def present(self) -> torch.Tensor:
        return self.scores > 0


def make_clip(rng: np.random.Generator, side: int, prompt: str) -> Clip:
    """Noise, and prompts at other places for every object."""
    images = rng.integers(0, 256, (FRAMES, side, side, 3), dtype=np.uint8)
    masks = np.zeros((OBJECTS, side, side), bool)
    for k in range(OBJECTS):
        y, x = rng.integers(2, side // 2, 2)
        masks[k, y : y + side // 3, x : x + side // 3] = True
    if not PROMPTS[prompt]:
        return Clip(images, masks, None)
    points, labels = (np.array(x, np.float32) for x in PROMPTS[prompt])
    shift = rng.uniform(-0.1, 0.1, (OBJECTS, 1, 2))
    points = (side * (points + shift)).astype(np.float32)
    return Clip(images, masks, (points, np.tile(labels.astype(np.int32), (OBJECTS, 1))))


def track(predictor: Any, clip: Clip, inference: Any) -> Tracked:
    """The reference on a clip, its memories in the dtype of ours."""
    side = clip.images.shape[1]
    frames = torch.tensor(clip.images).permute(0, 3, 1, 2).to(torch.float32) / 255
    frames = ((frames - reference.MEAN) / reference.STD).to(torch.get_default_dtype())
    where = "sam2.sam2_video_predictor.load_video_frames"
    with mock.patch(where, return_value=(frames, side, side)):
        state = predictor.init_state("")
    for k in range(OBJECTS):
        if clip.prompts is None:
            predictor.add_new_mask(state, 0, k, clip.masks[k])
        else:
            points, labels = (x[k] for x in clip.prompts)
            box = points[:2].reshape(4) if labels[0] == 2 else None
            points, labels = (None, None) if box is not None else (points, labels)
            predictor.add_new_points_or_box(state, 0, k, points=points, labels=labels, box=box)
    kept = torch.bfloat16 if inference.memory_dtype else torch.get_default_dtype()
    with mock.patch.object(torch, "bfloat16", kept):
        for _ in predictor.propagate_in_video(state):
            pass
    each = [state["output_dict_per_obj"][k] for k in range(OBJECTS)]
    outs = [d["cond_frame_outputs"] | d["non_cond_frame_outputs"] for d in each]

    def gather(name):
        return torch.stack([torch.cat([out[t][name][:, 0] for out in outs]) for t in range(FRAMES)])

    return Tracked(gather("pred_masks"), gather("object_score_logits"))


def tune(predictor: Any, clip: Clip, inference: Any, always: bool) -> Tracked | None:
    """Shift all object scores until objects come and go, or `always` are all there.

    An object that is absent on one frame is sooner absent on the next, so that few or no shifts
    may lie between all of them present and all absent: then none is found.
    """
    bias = reference.score_bias(predictor)
    least, most = -np.inf, np.inf  # below all were absent, above all present
    for _ in range(ROUNDS):
        found = track(predictor, clip, inference)
        present, scores = found.present[1:], found.scores[1:].flatten().sort().values
        if present.any() and bool(present.all()) == always:
            return found
        now = float(bias.detach())
        if present.all():
            most = now
        elif not present.any():
            least = now
        if always:
            now += 1 - float(scores[0])
        elif np.isfinite(most - least):
            now = (least + most) / 2
        else:
            middle = scores[FRAMES // 2 : -FRAMES // 2]
            widest = int((middle[1:] - middle[:-1]).argmax())
            now -= float(middle[widest] + middle[widest + 1]) / 2
        bias.fill_(now)
    return None


class Chosen(NamedTuple):
    """A clip on which the reference decides firmly, and its runs in float32 and float64."""

    clip: Clip
    predictor: Any
    run: Tracked
    exact: Tracked


def choose(model: Any, rng: np.random.Generator, kind: str, prompt: str) -> Chosen:
    """The first random clip whose objects are present and absent beyond doubt."""
    inference = KINDS[kind]
    # Where unstable masks are replaced, all objects are there
    always = kind == "postprocessed" and PROMPTS[prompt] is not None
    for _ in range(ATTEMPTS):
        clip = make_clip(rng, model.image_size, prompt)
        predictor = make_predictor(model, inference)
        with reference.images_remembered(predictor):
            run = tune(predictor, clip, inference, always)
        if run is None:
            continue
        exact = exactly(lambda x, clip=clip: track(x, clip, inference), predictor)
        noise = (run.scores.double() - exact.scores).abs().max()
        if bool((exact.scores.abs() > tolerances.DECIDED * noise).all()):
            return Chosen(clip, predictor, run, exact)
    raise AssertionError(f"no clip of {ATTEMPTS} leaves the reference's decisions beyond doubt")


def runs(chosen: Chosen, inference: Any) -> Iterator[Tracked]:
    """The reference in float32 as it is, then in other orders of summation."""
    yield chosen.run
    for run in roundings(lambda x: track(x, chosen.clip, inference), chosen.predictor, first=1):
        if run.present.equal(chosen.exact.present):
            yield run


@pytest.mark.parametrize(("kind", "prompt"), CASES)
def test_predictor(make_pair, trackers, rng, kind, prompt):
    pair = make_pair(version_of(kind))
    chosen = choose(pair.reference, rng, kind, prompt)
    (images, masks, prompts), predictor = chosen.clip, chosen.predictor
    present = chosen.run.present
    assert present[1:].any()
    assert bool(present[1:].all()) == (kind == "postprocessed" and prompts is not None)

    params = convert.from_reference(reference.state_of(predictor), pair.params)
    tracker = trackers[kind]
    if prompts is None:
        state, logits = tracker.first(params, images[0], masks, FRAMES)
    else:
        state, logits = tracker.first_points(params, images[0], *prompts, FRAMES)
    ours = [logits]
    for image in images[1:]:
        state, logits = tracker.next(params, state, image)
        ours.append(logits)
    ours = np.stack(jax.device_get(ours))
    np.testing.assert_array_equal((ours > NO_OBJECT).any((2, 3)), present)
    others = (run.logits[present] for run in runs(chosen, KINDS[kind]))
    given = ours[np.asarray(present)], others, chosen.exact.logits[present], tolerances.ROLLOUT
    bound = close_to_exact(f"video, {kind}: mask logits", *given)
    same_mask(f"video, {kind}: binary masks", given[0], given[2], bound)
