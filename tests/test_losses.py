"""Loss terms against their definitions, and what must not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import losses
from sam2_jax.resize import resize
from sam2_jax.types import FrameOut

T, B, OBJECTS, SIDE = 3, 2, 3, 16
CLOSE = 1e-5


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def outputs(seed: int, corrections: int = 3) -> FrameOut:
    keys = iter(jax.random.split(jax.random.key(seed), 12))
    low, p, s = SIDE // 4, min(2, 1 + corrections), max(0, corrections - 1)

    def normal(*shape):
        return jax.random.normal(next(keys), (T, *shape))

    return FrameOut(
        multi_masks=normal(p, B, OBJECTS, 3, low, low) * 3,
        multi_ious=jax.nn.sigmoid(normal(p, B, OBJECTS, 3)),
        is_multi=jnp.array([[True, False][:p]] * T),
        single_masks=normal(s, B, OBJECTS, low, low),
        single_ious=jax.nn.sigmoid(normal(s, B, OBJECTS)),
        object_scores=normal(1 + corrections, B, OBJECTS),
        from_mask=jnp.array([False] * T),
        is_corrected=jnp.array([True, False, False]),
        mask=normal(B, OBJECTS, low, low),
        pointer=normal(B, OBJECTS, 4),
        memory=normal(B, OBJECTS, 1, 2),
        points=jnp.zeros((T, B, OBJECTS, 2, 2)),
        labels=jnp.zeros((T, B, OBJECTS, 2), jnp.int32),
    )


@pytest.fixture
def truth():
    masks = np.random.default_rng(0).random((T, B, OBJECTS, SIDE, SIDE)) > 0.6
    masks[1, 0, 1] = False  # absent on one frame
    return masks


def by_definition(out, truth, valid):
    """All terms with loops, from the formulas."""
    sums = dict.fromkeys(("loss_mask", "loss_dice", "loss_iou", "loss_class"), 0.0)
    for t, b, o in np.ndindex(T, B, OBJECTS):
        if not valid[b, o]:
            continue
        passes = [(out.multi_masks[t, 0, b, o], out.multi_ious[t, 0, b, o], out.is_multi[t, 0])]
        if out.is_corrected[t]:
            passes += [
                (out.multi_masks[t, 1, b, o], out.multi_ious[t, 1, b, o], out.is_multi[t, 1])
            ]
            for i in range(out.single_masks.shape[1]):
                passes.append(
                    (out.single_masks[t, i, b, o][None], out.single_ious[t, i, b, o][None], False)
                )
        target = truth[t, b, o]
        for i, (masks, ious, multi) in enumerate(passes):
            score = float(out.object_scores[t, i, b, o])
            present = target.any()
            sums["loss_class"] += -float(np.log(sigmoid(np.array(score if present else -score))))
            if not present:
                continue
            terms = []
            for mask, iou in list(zip(masks, ious, strict=True))[: 3 if multi else 1]:
                logits = np.asarray(resize(mask, (SIDE, SIDE)))
                p = sigmoid(logits)
                pt = np.where(target, p, 1 - p)
                focal = (np.where(target, 0.25, 0.75) * (1 - pt) ** 2 * -np.log(pt)).mean()
                dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
                hard = logits > 0
                real = (hard & target).sum() / max((hard | target).sum(), 1)
                terms.append((20 * focal + dice, focal, dice, abs(float(iou) - real)))
            best = min(terms)
            sums["loss_mask"] += best[1]
            sums["loss_dice"] += best[2]
            sums["loss_iou"] += float(np.mean([x[3] for x in terms]))
    return {k: v / valid.sum() for k, v in sums.items()}


def test_terms_are_the_definitions(truth):
    out = outputs(0)
    valid = np.array([[True, True, True], [True, False, False]])
    loss, terms = jax.jit(losses.total)(out, truth, valid)
    expected = by_definition(jax.device_get(out), truth, valid)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=CLOSE, err_msg=name)
    weighted = 20 * expected["loss_mask"] + sum(list(expected.values())[1:])
    np.testing.assert_allclose(loss, weighted, rtol=CLOSE)


def test_padded_objects_count_for_nothing(truth):
    valid = np.array([[True, True, False], [True, False, False]])
    out = outputs(1)
    other = truth.copy()
    other[:, ~valid] = ~other[:, ~valid]
    moved = jax.tree.map(lambda x: x, out)._replace(
        multi_masks=jnp.where(valid[None, None, :, :, None, None, None], out.multi_masks, 7.0)
    )
    loss, _ = losses.total(out, truth, valid)
    np.testing.assert_array_equal(loss, losses.total(moved, other, valid)[0])
    grads = jax.grad(lambda m: losses.total(out._replace(multi_masks=m), truth, valid)[0])
    by_object = jnp.abs(grads(out.multi_masks)).sum((0, 1, 4, 5, 6))
    assert (by_object[~valid] == 0).all() and (by_object[valid] > 0).all()


def test_absent_objects_teach_only_the_score(truth):
    truth[:] = False
    valid = np.ones((B, OBJECTS), bool)
    _, terms = losses.total(outputs(2), truth, valid)
    assert float(terms["loss_class"]) > 0
    assert float(terms["loss_mask"]) == float(terms["loss_dice"]) == float(terms["loss_iou"]) == 0


def test_a_given_mask_costs_next_to_nothing_and_has_no_gradient(truth):
    out = outputs(3, corrections=0)._replace(
        from_mask=jnp.ones(T, bool),
        object_scores=jnp.where(truth.any((-2, -1)), 10.0, -10.0)[:, None],
    )
    valid = np.ones((B, OBJECTS), bool)
    loss, terms = losses.total(out, truth, valid)
    assert float(loss) < 0.01 and float(terms["loss_iou"]) == 0
    grad = jax.grad(lambda m: losses.total(out._replace(multi_masks=m), truth, valid)[0])
    assert not grad(out.multi_masks).any()


def test_a_batch_without_objects_is_finite(truth):
    loss, _ = losses.total(outputs(4), truth, np.zeros((B, OBJECTS), bool))
    assert float(loss) == 0


@pytest.mark.parametrize("size", [(64, 32), (4, 8), (16, 16), (24, 5)])
def test_resize_is_bilinear_and_antialiased(size):
    x = jax.random.normal(jax.random.key(0), (2, 3, 16, 16))
    expected = jax.image.resize(x, (2, 3, *size), "linear", antialias=True)
    np.testing.assert_allclose(resize(x, size), expected, atol=1e-5)
