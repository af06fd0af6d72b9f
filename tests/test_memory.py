"""The memory bank against the rule written down as the paper has it: a list of past frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import memory

SHAPE = (1, 1, 1, 1)


def visible(order, is_cond, at, window):
    """Frames that the frame visited at `at` may see, by the reference's rule."""
    frame, past = order[at], order[:at]
    return {f for f in past if is_cond[f] or frame - window <= f < frame}


def run(order, is_cond, num_frames, max_cond):
    """Visit frames whose memory is their own index; yield what each one reads."""
    bank = memory.empty(SHAPE, 1, num_frames, max_cond, jnp.float32)
    write = jax.jit(memory.write)
    for at, frame in enumerate(order):
        count = int(bank.memory.count)
        if count and not is_init(order, is_cond, at):
            yield at, memory.read(bank, jnp.int32(frame), num_frames)
        value = jnp.full(SHAPE, float(frame))
        bank = write(bank, jnp.int32(frame), jnp.asarray(is_cond[frame]), value, value[..., 0, :])


def is_init(order, is_cond, at):
    """Conditioning frames visited before all others see nothing."""
    return all(is_cond[f] for f in order[: at + 1])


def seen(values, which):
    frames = np.asarray(values).reshape(-1).astype(int)[which]
    assert len(frames) == len(set(frames))
    return set(frames.tolist())


def existing(context):
    """Slots of memories and of pointers that exist."""
    count = int(context.count)
    mask = context.pointer_mask
    assert sorted(context.order.tolist()) == list(range(context.memory.shape[2]))
    return np.asarray(context.order[:count]), slice(count) if mask is None else np.asarray(mask)


@pytest.mark.parametrize("num_frames", [2, 4, 8, 9, 16, 40])
@pytest.mark.parametrize("cond", [(0,), (0, 1), (0, 5), (0, 11), (0, 30)])
@pytest.mark.parametrize("corrected", [None, 3, 12])
def test_every_frame_sees_what_the_rule_says(num_frames, cond, corrected):
    cond = [f for f in cond if f < num_frames]
    order = cond + [f for f in range(num_frames) if f not in cond]
    is_cond = np.zeros(num_frames, bool)
    is_cond[cond] = True
    if corrected is not None and corrected < num_frames:
        is_cond[corrected] = True  # it becomes a conditioning frame once it is visited
    for at, context in run(order, is_cond, num_frames, max_cond=3):
        memories, pointers = existing(context)
        frame = order[at]
        assert seen(context.memory, memories) == visible(order, is_cond, at, 6), frame
        assert seen(context.pointers, pointers) == visible(order, is_cond, at, 15), frame


def test_short_clips_need_no_mask_and_no_spare_slot():
    order, is_cond = list(range(8)), np.arange(8) == 0
    for at, context in run(order, is_cond, 8, max_cond=2):
        assert context.pointer_mask is None and context.count == at
        assert context.memory.shape[2] == context.pointers.shape[2] == 7


def test_temporal_rows_and_distances():
    order, is_cond = [0, 4, 1, 2, 3, 5], np.isin(np.arange(6), [0, 4])
    reads = dict(run(order, is_cond, 6, max_cond=2))
    # Frame 3 sees conditioning frames 0 and 4 (row 6), frame 1 two before and 2 just before
    assert reads[4].count == 4 and reads[4].frames[:4].tolist() == [6, 6, 1, 0]
    np.testing.assert_allclose(reads[4].pointer_frames[:4], np.array([3, -1, 2, 1]) / 5)
