"""Memory attention and the memory encoder against the reference's, on random inputs."""
# pyright: reportMissingImports=false

import numpy as np
import pytest
import torch

from sam2_jax.model.position import sine_grid
from tests.parity import tolerances
from tests.parity.compare import close, close_to_exact, first, last
from tests.parity.rounding import exactly, given, roundings

N = 2  # videos
OBJECTS = 2  # each
OTHERS = [("2.0", 2), ("faint", 2)]  # memory attention beyond that of 2.1: kind, memories


@pytest.mark.parametrize("kind", ["2.1", "2.0", "faint"])
def test_no_memory(make_pair, call, draw, resolution, kind):
    pair, side = make_pair(kind), resolution // 16
    c = pair.model.variant.hidden_dim
    top = draw(N, side, side, c)
    theirs = pair.reference._prepare_memory_conditioned_features(
        frame_idx=0,
        is_init_cond_frame=True,
        current_vision_feats=[torch.tensor(top.reshape(N, -1, c)).transpose(0, 1)],
        current_vision_pos_embeds=[torch.zeros(side * side, N, c)],
        feat_sizes=[(side, side)],
        output_dict={},
        num_frames=8,
    )
    close("without memory", call(pair, "without_memory", top), last(theirs))


@pytest.mark.parametrize("kind, count", [*(("2.1", i) for i in range(1, 8)), *OTHERS])
def test_memory_attention(make_pair, call, draw, resolution, kind, count):
    """`count` memories, the first of a conditioning frame, and as many pointers."""
    pair, side = make_pair(kind), resolution // 16
    v = pair.model.variant
    c, d, n = v.hidden_dim, v.memory_dim, N * OBJECTS
    top, memory = draw(N, side, side, c), draw(N, OBJECTS, count, side * side, d)
    top *= 0.02 if kind == "faint" else 1.0
    pointers = draw(N, OBJECTS, count, c)

    def output(i):
        features = first(memory[:, :, i].reshape(n, side, side, d))
        code = first(sine_grid(side, side, d)[None]).expand(n, -1, -1, -1)
        return {
            "maskmem_features": given(features),
            "maskmem_pos_enc": [given(code)],
            "obj_ptr": given(pointers[:, :, i].reshape(n, c)),
        }

    def theirs(model):
        flat = given(np.repeat(top, OBJECTS, 0).reshape(n, side * side, c)).transpose(0, 1)
        code = given(sine_grid(side, side, c).reshape(-1, 1, c)).expand(-1, n, -1)
        found = model._prepare_memory_conditioned_features(
            frame_idx=count,
            is_init_cond_frame=False,
            current_vision_feats=[flat],
            current_vision_pos_embeds=[code],
            feat_sizes=[(side, side)],
            output_dict={
                "cond_frame_outputs": {0: output(0)},
                "non_cond_frame_outputs": {t: output(t) for t in range(1, count)},
            },
            num_frames=20,
        )
        return last(found)

    rows = np.array([6] + [count - t - 1 for t in range(1, count)])
    # In other slots than the reference's, beside slots that hold nothing
    at, where = np.random.default_rng(count).permutation(8), np.zeros(8, int)
    where[at[:count]] = np.arange(count)

    def spread(x):
        slots = np.full((N, OBJECTS, 8, *x.shape[3:]), 100.0, np.float32)
        slots[:, :, at[:count]] = x
        return slots

    used = np.isin(np.arange(8), at[:count])
    distance = ((count - where) / 15).astype(np.float32)
    slots = spread(memory), rows[where], spread(pointers), distance
    ours = call(pair, "with_memory", top, *slots, np.int32(count), at, used)
    exact, runs = exactly(theirs, pair.reference), roundings(theirs, pair.reference)
    ours = ours.reshape(n, side, side, c)
    close_to_exact(f"memory attention {kind}", ours, runs, exact, tolerances.MODULE)


@pytest.mark.parametrize("kind", ["2.1", "2.0", "faint"])
def test_memory_encoder(make_pair, call, draw, resolution, kind):
    pair, side = make_pair(kind), resolution // 16
    c = pair.model.variant.hidden_dim
    top, mask = draw(N, side, side, c), 3 * draw(N, OBJECTS, resolution, resolution)
    present = np.array([[True, False], [False, True]])
    flat = torch.tensor(np.repeat(top, OBJECTS, 0).reshape(N * OBJECTS, side * side, c)).transpose(
        0, 1
    )
    features, codes = pair.reference._encode_new_memory(
        current_vision_feats=[flat],
        feat_sizes=[(side, side)],
        pred_masks_high_res=torch.tensor(mask.reshape(N * OBJECTS, 1, resolution, resolution)),
        object_score_logits=torch.tensor(np.where(present, 1.0, -1.0).reshape(-1, 1)),
        is_mask_from_pts=True,
    )
    ours = call(pair, "encode_memory", top, mask, present)
    d = features.shape[1]
    close(f"memory encoder {kind}", ours.reshape(N * OBJECTS, side, side, d), last(features))
    close("memory's sine code", sine_grid(side, side, d), last(codes[0])[0])


def test_mask_downsample(pair, call, rng, resolution):
    mask = rng.integers(0, 2, (N, resolution, resolution)).astype(np.float32)
    theirs = pair.reference.mask_downsample(first(mask[..., None]))
    close("mask downsample", call(pair, "downsample_mask", mask), theirs[:, 0])
