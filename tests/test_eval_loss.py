"""The loss on evaluation clips: equal to that of each clip by hand, and which clips it is of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from sam2_jax import eval_loss, losses, prompts, sharding, track
from sam2_jax.config_checks import check
from sam2_jax.data.synthetic import SyntheticSource
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.types import Batch, UserError
from sam2_jax.validation import EvalSet

SIDE, FRAMES, MOST = 64, 2, 2
RELATIVE = 1e-5  # float32 sums in another order


def source(num_clips: int = 3, num_frames: int = 4) -> SyntheticSource:
    return SyntheticSource(
        num_clips=num_clips, num_frames=num_frames, size=SIDE, max_objects=3, seed=0, stream=1
    )


def settings(loss_clips: int = 3):
    config = smoke.get_config()
    config.model.resolution, config.eval.loss_clips = SIDE, loss_clips
    config.data.num_frames, config.data.max_objects = FRAMES, MOST
    config.model.dropout = 0.1
    return config


def test_it_is_the_loss_of_all_objects(tmp_path, capsys):
    model = make_sam2("nano", SIDE, dropout=0.1)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    clips, config = source(), settings()
    mesh = sharding.make_mesh(1, 2, 1, jax.devices()[:2])  # 3 clips on 2 devices: one is padding
    laid = jax.device_put(params, sharding.tree_shardings(params, mesh))
    sets = [EvalSet("", clips), EvalSet("far", source(1))]
    compute = eval_loss.make_eval_loss(config, model, sets, mesh)
    row = compute(laid, 7)
    names = ["loss", "loss_class", "loss_dice", "loss_iou", "loss_mask"]
    assert sorted(row) == sorted(f"eval/{prefix}{x}" for prefix in ("", "far/") for x in names)
    assert "step 7, far: evaluation loss " in capsys.readouterr().out
    assert compute(laid, 8) == row

    @jax.jit
    def by_hand(batch):
        key = jax.random.key(9)
        plan = prompts.mask_plan(FRAMES)
        out = track.track(model, params, batch, plan, key, deterministic=True, points=False)
        return losses.total(out, jnp.moveaxis(batch.masks, 1, 0), batch.valid)

    total, count, first = {}, 0, None
    for i in range(3):
        ids = clips.objects(i, 0)[:MOST]
        images, masks = clips.read(i, range(FRAMES), ids)
        masks = np.pad(masks, ((0, 0), (0, MOST - len(ids)), (0, 0), (0, 0)))
        valid = np.arange(MOST) < len(ids)
        loss, terms = by_hand(Batch(*(jnp.asarray(x)[None] for x in (images, masks, valid))))
        found = {key: float(value) for key, value in ({"loss": loss} | terms).items()}
        first = first or found
        count += len(ids)
        for key, value in found.items():
            total[key] = total.get(key, 0.0) + value * len(ids)
    for key, value in total.items():
        np.testing.assert_allclose(row[f"eval/{key}"], value / count, rtol=RELATIVE, atol=1e-7)
    assert first is not None
    for key, value in first.items():
        np.testing.assert_allclose(row[f"eval/far/{key}"], value, rtol=RELATIVE, atol=1e-7)


def test_without_clips_nothing_is_computed():
    compute = eval_loss.make_eval_loss(settings(0), None, [], sharding.make_mesh(1, 1, -1))
    assert compute({}, 1) == {}


def test_clips_are_spread_and_long_enough():
    each = EvalSet("", source(num_clips=10))
    assert eval_loss.choose(each, 5, 4) == [(0, 0), (2, 0), (4, 0), (6, 0), (8, 0)]
    assert len(eval_loss.choose(each, 99, 4)) == 10
    with pytest.raises(UserError, match=r"eval\.loss_clips=2: no clip of .* has 5 frames"):
        eval_loss.choose(each, 2, 5)
    with pytest.raises(UserError, match=r"eval\.loss_clips=3 finds no evaluation clips"):
        eval_loss.make_eval_loss(settings(), None, [], sharding.make_mesh(1, 1, -1))


def test_images_are_prompted_with_a_click():
    assert bool(eval_loss.make_plan(1).use_points)
    assert not bool(eval_loss.make_plan(2).use_points)


def test_the_best_by_a_loss_is_the_lowest():
    config = settings()
    config.checkpoint.best = "eval/far/loss"
    with pytest.raises(UserError, match="best_is_lowest=False would keep the highest"):
        check(config)
    config.checkpoint.best_is_lowest = True
    check(config)
