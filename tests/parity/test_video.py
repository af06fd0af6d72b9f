"""Tracking through a video against the reference's predictor, longer than all its windows."""
# pyright: reportMissingImports=false

import copy
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import torch
from sam2.sam2_video_predictor import SAM2VideoPredictor

from sam2_jax import convert
from sam2_jax.decode import NO_OBJECT
from sam2_jax.predict import video
from tests.parity import reference
from tests.parity.conftest import close

FRAMES = 20
OBJECTS = 3
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
}
CASES = [("plain", prompt) for prompt in PROMPTS]
CASES += [("postprocessed", "mask"), ("postprocessed", "two clicks"), ("bfloat16 memories", "mask")]


@pytest.fixture(scope="module")
def pair(make_pair):
    return make_pair("2.1")


@pytest.fixture(scope="module")
def trackers(pair):
    return {kind: video.make_tracker(pair.model, inference) for kind, inference in KINDS.items()}


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


def track(predictor: Any, images, masks, prompts, kept=torch.bfloat16):
    """Low-resolution logits (t, o, h, w) and object scores (t, o) of the reference.

    `kept` is the dtype of its memories.
    """
    side = images.shape[1]
    frames = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    frames = (frames - reference.MEAN) / reference.STD
    where = "sam2.sam2_video_predictor.load_video_frames"
    with mock.patch(where, return_value=(frames, side, side)):
        state = predictor.init_state("")
    for k in range(OBJECTS):
        if prompts is None:
            predictor.add_new_mask(state, 0, k, masks[k])
        else:
            points, labels = (x[k] for x in prompts)
            box = points[:2].reshape(4) if labels[0] == 2 else None
            points, labels = (None, None) if box is not None else (points, labels)
            predictor.add_new_points_or_box(state, 0, k, points=points, labels=labels, box=box)
    with mock.patch.object(torch, "bfloat16", kept):
        for _ in predictor.propagate_in_video(state):
            pass
    each = [state["output_dict_per_obj"][k] for k in range(OBJECTS)]
    outs = [d["cond_frame_outputs"] | d["non_cond_frame_outputs"] for d in each]

    def gather(name):
        return torch.stack([torch.cat([out[t][name][:, 0] for out in outs]) for t in range(FRAMES)])

    return gather("pred_masks"), gather("object_score_logits")


@pytest.mark.parametrize(("kind", "prompt"), CASES)
def test_predictor(pair, trackers, rng, kind, prompt):
    inference = KINDS[kind]
    side = pair.model.resolution
    images = rng.integers(0, 256, (FRAMES, side, side, 3), dtype=np.uint8)
    masks = np.zeros((OBJECTS, side, side), bool)
    for k in range(OBJECTS):
        y, x = rng.integers(2, side // 2, 2)
        masks[k, y : y + side // 3, x : x + side // 3] = True
    prompts = None
    if PROMPTS[prompt]:
        points, labels = (np.array(x, np.float32) for x in PROMPTS[prompt])
        shift = rng.uniform(-0.1, 0.1, (OBJECTS, 1, 2))
        points = (side * (points + shift)).astype(np.float32)
        prompts = points, np.tile(labels.astype(np.int32), (OBJECTS, 1))
    predictor = make_predictor(pair.reference, inference)
    kept = torch.bfloat16 if inference.memory_dtype else torch.float32
    # Objects that come and go; but where unstable masks are replaced, all are there
    always = kind == "postprocessed" and prompts is not None
    # In several rounds: an object that is absent on one frame is sooner absent on the next
    for share in (1.0, *[0.5] * 9):
        expected, scores = track(predictor, images, masks, prompts, kept)
        present = scores[1:] > 0
        if share < 1 and present.any() and bool(present.all()) == always:
            break
        middle = scores[1:].flatten().sort().values[FRAMES // 2 : -FRAMES // 2]
        widest = int((middle[1:] - middle[:-1]).argmax())
        edge = scores.min() - 1 if always else (middle[widest] + middle[widest + 1]) / 2
        with torch.no_grad():
            reference.score_bias(predictor).sub_(share * edge)
    assert present.any() and bool(present.all()) == always

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
    there = np.asarray(scores > 0)
    np.testing.assert_array_equal((ours > NO_OBJECT).any((2, 3)), there)
    close(f"video, {kind}: mask logits", ours[there], expected[there], 1e-4)
