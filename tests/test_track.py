"""The memory loop as a whole, on the nano model with perturbed weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import losses, prompts, track
from sam2_jax.decode import Inference
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.predict import video
from sam2_jax.types import Batch, PromptPlan

SIDE, T, OBJECTS = 64, 4, 2
CLOSE = 2e-4  # float32 through a few dozen layers, on logits of size 1 to 10


@pytest.fixture(scope="module")
def model():
    return make_sam2("nano", SIDE)


@pytest.fixture(scope="module")
def params(model):
    """Random weights under which objects are present and memories matter."""
    params = init_params(model, jax.random.key(0))
    rng = np.random.default_rng(1)

    def perturb(x):
        return np.asarray(x + 0.1 * rng.standard_normal(x.shape), np.float32)

    params = jax.tree.map(perturb, params)
    head = params["sam_mask_decoder"]["pred_obj_score_head"]["layers_2"]
    head["bias"] = head["bias"] + 3.0
    return params


def clip(seed: int, frames: int = T, videos: int = 1) -> Batch:
    rng = np.random.default_rng(seed)
    masks = np.zeros((videos, frames, OBJECTS, SIDE, SIDE), bool)
    for b, t, o in np.ndindex(videos, frames, OBJECTS):
        y, x = 4 + 24 * o + t, 6 + 2 * t + 5 * b
        masks[b, t, o, y : y + 20, x : x + 24] = True
    images = rng.integers(0, 255, (videos, frames, SIDE, SIDE, 3), dtype=np.uint8)
    return Batch(images, masks, np.ones((videos, OBJECTS), bool))


def plan(points: bool, cond=(0,), corrected=(), box=(), frames: int = T, clicks: int = 7):
    def at(which):
        return jnp.isin(jnp.arange(frames), jnp.array(which, int))

    order = [*cond, *(t for t in range(frames) if t not in cond)]
    return PromptPlan(
        jnp.array(order, jnp.int32),
        jnp.array(points),
        at(cond),
        at(box),
        at(corrected),
        jnp.zeros((frames, clicks), bool),
    )


@pytest.fixture(scope="module")
def run(model):
    return jax.jit(partial(track.track, model, deterministic=True))


KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def masked(run, params):
    return run(params, clip(0), plan(False), KEY)


def test_given_masks_are_the_output(run, params):
    out = run(params, clip(0), plan(False, cond=(0, 2)), KEY)
    assert out.from_mask.tolist() == [True, False, True, False]
    truth = clip(0).masks[0]
    for t in (0, 2):
        small = truth[t][:, ::4, ::4]
        # away from the border a quarter-size pixel is wholly inside or outside
        agree = ((np.asarray(out.mask[t, 0]) > 0) == small).mean()
        assert agree > 0.9
    assert np.abs(out.mask[1]).max() < 1000  # predicted present, so not the -1024 of absence


def test_the_past_does_not_see_the_future(run, params, masked):
    batch = clip(0)
    images = batch.images.copy()
    images[:, 3] = 255 - images[:, 3]
    other = run(params, batch._replace(images=images), plan(False), KEY)
    np.testing.assert_allclose(other.mask[:3], masked.mask[:3], atol=CLOSE)
    assert np.abs(other.mask[3] - masked.mask[3]).max() > 100 * CLOSE


def test_frames_depend_on_memories_and_objects_do_not_mix(run, params, masked):
    batch = clip(0)
    masks = batch.masks.copy()
    masks[:, 0, 0] = np.roll(masks[:, 0, 0], 20, axis=1)
    other = run(params, batch._replace(masks=masks), plan(False), KEY)
    assert np.abs(other.mask[1:, :, 0] - masked.mask[1:, :, 0]).max() > 100 * CLOSE
    np.testing.assert_allclose(other.mask[:, :, 1], masked.mask[:, :, 1], atol=CLOSE)


def test_clicks_boxes_and_corrections_follow_the_plan(run, params):
    batch = clip(0)
    out = run(params, batch, plan(True, cond=(0,), corrected=(0, 2)), KEY)
    labels = np.asarray(out.labels)[:, 0]
    assert (labels[0, :, :8] >= 0).all() and (labels[0, :, 8] == -1).all()  # 1 + 7 clicks
    assert (labels[2, :, :7] >= 0).all() and (labels[2, :, 7:] == -1).all()  # 0 + 7 clicks
    assert (labels[[1, 3]] == -1).all()
    for o in range(OBJECTS):
        x, y = np.asarray(out.points[0, 0, o, 0], int)
        assert batch.masks[0, 0, o, y, x] and labels[0, o, 0] == 1
    # One click is ambiguous (three masks), two are not; a frame tracked starts from none
    assert out.is_multi[:, 0].tolist() == [True, True, True, True]
    assert out.is_multi[[0, 2], 1].tolist() == [False, True]
    assert not out.single_masks[jnp.array([1, 3])].any() and out.single_masks[0].any()

    boxed = run(params, batch, plan(True, cond=(0,), corrected=(0,), box=(0,)), KEY)
    labels = np.asarray(boxed.labels)[0, 0]
    assert (labels[:, :2] == [2, 3]).all()
    assert np.isin(labels[:, 2:], [0, 1]).all()  # 2 corners + 7 clicks
    assert boxed.is_multi[0].tolist() == [False, False]


def test_first_prompts_need_no_corrections(model, params):
    out = jax.jit(partial(track.track, model, deterministic=True))(
        params, clip(0), plan(True, cond=(0, 2), box=(2,), clicks=0), KEY
    )
    labels = np.asarray(out.labels)[:, 0]
    assert (labels[0] == [1, -1]).all() and (labels[2] == [2, 3]).all()
    assert (labels[[1, 3]] == -1).all()


def test_empty_point_slots_change_nothing(run, model, params, masked):
    """A tracked frame has one slot where no plan gives points, nine where they may."""
    few = jax.jit(partial(track.track, model, deterministic=True, points=False, last_memory=True))(
        params, clip(0), plan(False, clicks=0), KEY
    )
    assert few.labels.shape[-1] == 1 and masked.labels.shape[-1] == 9
    np.testing.assert_allclose(few.mask, masked.mask, atol=CLOSE)
    # Made on request alone, for nobody reads it
    np.testing.assert_allclose(few.memory[:-1], masked.memory[:-1], atol=CLOSE)
    assert few.memory[-1].any() and not masked.memory[-1].any()


def test_samplers_can_be_injected(model, params):
    def click(key, truth, prediction, frame, step):
        shape = truth.shape[:2]
        points = jnp.broadcast_to(jnp.stack([frame, step]).astype(jnp.float32), (*shape, 2))
        return points, jnp.ones(shape, jnp.int32)

    out = jax.jit(partial(track.track, model, deterministic=True, click=click))(
        params, clip(0), plan(True, corrected=(0, 2)), KEY
    )
    assert out.points[2, 0, 0, :7].tolist() == [[2.0, s] for s in range(1, 8)]
    assert out.points[0, 0, 0, :8].tolist() == [[0.0, s] for s in range(8)]


@pytest.mark.parametrize("frames", [5, 20])
def test_one_frame_at_a_time_is_the_scan(model, params, frames):
    """The tracker's unbounded bank with masks against the scan's exact prefix."""
    batch = clip(1, frames)
    whole = jax.jit(partial(track.track, model, deterministic=True, points=False))(
        params, batch, prompts.mask_plan(frames), KEY
    )
    tracker = video.make_tracker(model, Inference())
    state, logits = tracker.first(params, batch.images[0, 0], batch.masks[0, 0], jnp.int32(frames))
    each = [logits]
    for t in range(1, frames):
        state, logits = tracker.next(params, state, batch.images[0, t])
        each.append(logits)
    np.testing.assert_allclose(np.stack(each), whole.mask[:, 0], atol=CLOSE)


def test_remat_changes_no_gradient_and_padding_no_result(model, params):
    """Each policy's gradient, with a padded object whose content differs between them."""
    valid = np.array([[True, False]])
    settings = plan(False, frames=2, clicks=0)

    def loss(params, batch, remat):
        out = track.track(
            model, params, batch, settings, KEY, deterministic=True, remat=remat, points=False
        )
        return losses.total(out, batch.masks.swapaxes(0, 1), batch.valid)[0]

    batch = clip(0, 2)._replace(valid=valid)
    other = batch.masks.copy()
    other[:, :, 1] = np.roll(other[:, :, 1], 11, -1)
    grad = jax.jit(jax.value_and_grad(loss), static_argnames="remat")
    plain, plain_grads = grad(params, batch, remat="none")
    again, again_grads = grad(params, batch._replace(masks=other), remat="full")
    np.testing.assert_allclose(plain, again, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(plain_grads), jax.tree.leaves(again_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * max(1e-3, np.abs(a).max()))
