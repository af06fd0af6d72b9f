"""Every part against the reference's, on random inputs."""
# pyright: reportMissingImports=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sam2.modeling.sam2_utils import get_1d_sine_pe

from sam2_jax import convert
from sam2_jax.decode import prefer_stable
from sam2_jax.model.position import sine_1d, sine_grid
from sam2_jax.model.sam2 import normalise
from sam2_jax.types import Decoded
from tests.parity import reference
from tests.parity.conftest import RESOLUTION, close

SIDE = RESOLUTION // 16
N = 2  # videos
OBJECTS = 2  # each
OTHERS = [("2.0", 2), ("faint", 2)]  # memory attention beyond that of 2.1: kind, memories


def first(x) -> torch.Tensor:
    """Channels-last to channels-first."""
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


@pytest.fixture(params=["2.1", "faint"])
def pair(request, make_pair):
    return make_pair(request.param)


@pytest.fixture
def call():
    """A method of ours, jitted."""

    def run(pair, method, *args):
        def apply(params, *args):
            return pair.model.apply({"params": params}, *args, method=method)

        return jax.jit(apply)(pair.params, *args)

    return run


@pytest.fixture
def draw(rng):
    def normal(*shape) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return normal


def test_names_go_both_ways_exactly(make_pair):
    for version in ("2.0", "2.1"):
        pair = make_pair(version)
        state = reference.state_of(pair.reference)
        back = convert.to_reference(pair.params)
        assert back.keys() == state.keys()
        for name, value in state.items():
            assert value.tobytes() == back[name].tobytes() and value.shape == back[name].shape


def test_trunk_stages(pair, rng):
    images = rng.integers(0, 256, (N, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    x = normalise(images, jnp.float32)
    theirs = pair.reference.image_encoder.trunk(first(x))
    trunk = pair.params["image_encoder"]["trunk"]
    module = pair.model.bind({"params": pair.params}).image_encoder.trunk.unbind()[0]
    ours = jax.jit(lambda p, x: module.apply({"params": p}, x, True))(trunk, x)
    assert len(ours) == len(theirs) == 4
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        close(f"trunk stage {i}", a, last(b))


def test_image_encoder_and_its_position_code(pair, call, draw):
    x = draw(N, RESOLUTION, RESOLUTION, 3)
    out = pair.reference.forward_image(first(x))
    ours = call(pair, "encode_image", x)
    s0, s1, top = out["backbone_fpn"]
    close("neck, stride 16", ours.top, last(top))
    close("neck, stride 8", ours.s1, last(s1))
    close("neck, stride 4", ours.s0, last(s0))
    code = out["vision_pos_enc"][-1]
    close("sine code", sine_grid(SIDE, SIDE, code.shape[1]), last(code)[0])


def test_temporal_code(pair):
    position = np.array([-3, 0, 1, 7, 15], np.float32) / 15
    theirs = get_1d_sine_pe(torch.tensor(position), 64)
    close("temporal code", sine_1d(jnp.asarray(position), 64), theirs)


def test_prompt_encoder(pair, call, rng, draw):
    labels = np.array([[1, 0, -1], [2, 3, -1], [-1, 1, 0], [2, 3, 1]], np.int32)
    points = rng.uniform(0, RESOLUTION - 1, (4, 3, 2)).astype(np.float32)
    mask = 5 * draw(4, 4 * SIDE, 4 * SIDE)
    theirs = pair.reference.sam_prompt_encoder
    sparse, dense = theirs(
        (torch.tensor(points), torch.tensor(labels)), None, first(mask[..., None])
    )
    ours = pair.model.bind({"params": pair.params}).sam_prompt_encoder
    close("point tokens", ours.points(jnp.asarray(points), jnp.asarray(labels)), sparse[:, :3])
    padding = ours.points(jnp.zeros((4, 1, 2)), -jnp.ones((4, 1), int))
    close("padding token", padding, sparse[:, 3:])
    close("mask prompt", call(pair, "mask_prompt", mask), last(dense))
    none = theirs.no_mask_embed.weight[0]
    close("no mask prompt", call(pair, "no_mask_prompt"), none)
    close("grid code", ours.grid_code(SIDE), last(theirs.get_dense_pe())[0])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_mask_decoder(pair, call, rng, draw, count):
    v = pair.model.variant
    c, n = v.hidden_dim, N * OBJECTS
    top, dense = draw(n, SIDE, SIDE, c), draw(n, SIDE, SIDE, c)
    s1, s0 = draw(N, 2 * SIDE, 2 * SIDE, c // 4), draw(N, 4 * SIDE, 4 * SIDE, c // 8)
    slots = 4
    points = rng.uniform(0, RESOLUTION - 1, (n, slots, 2)).astype(np.float32)
    labels = rng.integers(0, 2, (n, slots)).astype(np.int32)
    model = pair.reference
    given = max(count, 1)  # the reference stands one padding point in for none
    if not count:
        labels[:] = -1
    sparse, _ = model.sam_prompt_encoder(
        (torch.tensor(points[:, :given]), torch.tensor(labels[:, :given])), None, None
    )
    masks, ious, tokens, scores = model.sam_mask_decoder.predict_masks(
        image_embeddings=first(top),
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=first(dense),
        repeat_image=False,
        high_res_features=[first(np.repeat(s0, OBJECTS, 0)), first(np.repeat(s1, OBJECTS, 0))],
    )
    padded = np.concatenate([np.zeros((n, 1, 2), np.float32), points], 1)
    kinds = np.concatenate([-np.ones((n, 1), np.int32), labels], 1)
    used = np.arange(slots + 1) < 1 + given
    ours = call(pair, "decode", top, s1, s0, padded, kinds, used, dense)
    close("decoder masks", ours.masks, masks)
    close("decoder IoU", ours.ious, ious)
    close("decoder tokens", ours.tokens, tokens)
    close("decoder object score", ours.object_score, scores[:, 0])
    pointer = model.obj_ptr_proj(tokens[:, 0])
    present = np.arange(n) % 2 == 0
    pointer = torch.where(torch.tensor(present)[:, None], pointer, model.no_obj_ptr)
    close("pointer projection", call(pair, "pointer", ours.tokens[:, 0], present), pointer)


@pytest.mark.parametrize("kind, count", [*(("2.1", i) for i in range(1, 8)), *OTHERS])
def test_memory_attention(make_pair, call, draw, kind, count):
    """`count` memories, the first of a conditioning frame, and as many pointers."""
    pair = make_pair(kind)
    v, model = pair.model.variant, pair.reference
    c, d, n = v.hidden_dim, v.memory_dim, N * OBJECTS
    top, memory = draw(N, SIDE, SIDE, c), draw(N, OBJECTS, count, SIDE * SIDE, d)
    top *= 0.02 if kind == "faint" else 1.0
    frame = count
    frames = {0: True} | {t: False for t in range(1, count)}
    pointers = draw(N, OBJECTS, count, c)

    def output(i):
        image = memory[:, :, i].reshape(n, SIDE, SIDE, d)
        features = first(image)
        code = model.memory_encoder.position_encoding(features)
        pointer = torch.tensor(pointers[:, :, i].reshape(n, c))
        return {"maskmem_features": features, "maskmem_pos_enc": [code], "obj_ptr": pointer}

    outputs = {
        "cond_frame_outputs": {t: output(t) for t, cond in frames.items() if cond},
        "non_cond_frame_outputs": {t: output(t) for t, cond in frames.items() if not cond},
    }
    flat = torch.tensor(np.repeat(top, OBJECTS, 0).reshape(n, SIDE * SIDE, c)).transpose(0, 1)
    code = torch.tensor(sine_grid(SIDE, SIDE, c).reshape(-1, 1, c)).expand(-1, n, -1)
    theirs = model._prepare_memory_conditioned_features(
        frame_idx=frame,
        is_init_cond_frame=False,
        current_vision_feats=[flat],
        current_vision_pos_embeds=[code],
        feat_sizes=[(SIDE, SIDE)],
        output_dict=outputs,
        num_frames=20,
    )
    rows = np.array([6] + [frame - t - 1 for t in range(1, count)])
    # In other slots than the reference's, among slots that hold nothing
    order = np.random.default_rng(count).permutation(count)

    def spread(x):
        return np.concatenate([x[:, :, order], 100 * np.ones_like(x[:, :, :1])], 2)

    where = np.append(order, 0)
    used = np.append(np.ones(count, bool), False)
    distance = ((frame - where) / 15).astype(np.float32)
    ours = call(
        pair,
        "with_memory",
        top,
        spread(memory),
        rows[where],
        spread(pointers),
        distance,
        (used, used),
    )
    close(f"memory attention {kind}", ours.reshape(n, SIDE, SIDE, c), last(theirs), 1e-4)


@pytest.mark.parametrize("kind", ["2.1", "2.0", "faint"])
def test_memory_encoder(make_pair, call, draw, kind):
    pair = make_pair(kind)
    c = pair.model.variant.hidden_dim
    top, mask = draw(N, SIDE, SIDE, c), 3 * draw(N, OBJECTS, RESOLUTION, RESOLUTION)
    present = np.array([[True, False], [False, True]])
    flat = torch.tensor(np.repeat(top, OBJECTS, 0).reshape(N * OBJECTS, SIDE * SIDE, c)).transpose(
        0, 1
    )
    features, codes = pair.reference._encode_new_memory(
        current_vision_feats=[flat],
        feat_sizes=[(SIDE, SIDE)],
        pred_masks_high_res=torch.tensor(mask.reshape(N * OBJECTS, 1, RESOLUTION, RESOLUTION)),
        object_score_logits=torch.tensor(np.where(present, 1.0, -1.0).reshape(-1, 1)),
        is_mask_from_pts=True,
    )
    ours = call(pair, "encode_memory", top, mask, present)
    d = features.shape[1]
    close(f"memory encoder {kind}", ours.reshape(N * OBJECTS, SIDE, SIDE, d), last(features))
    close("memory's sine code", sine_grid(SIDE, SIDE, d), last(codes[0])[0])


def test_mask_downsample(pair, call, rng):
    mask = rng.integers(0, 2, (N, RESOLUTION, RESOLUTION)).astype(np.float32)
    theirs = pair.reference.mask_downsample(first(mask[..., None]))
    close("mask downsample", call(pair, "downsample_mask", mask), theirs[:, 0])


def test_stability(pair, rng):
    """Single masks that hang on a threshold give way to the best of the other three."""
    masks = rng.normal(size=(16, 4, 16, 16)).astype(np.float32)
    masks[::2, 0] *= 100  # hardly any logit near zero
    ious = rng.random((16, 4)).astype(np.float32)
    decoder = pair.reference.sam_mask_decoder
    theirs = decoder._dynamic_multimask_via_stability(torch.tensor(masks), torch.tensor(ious))
    tokens, score = np.zeros((16, 4, 8), np.float32), np.zeros(16, np.float32)
    ours = prefer_stable(Decoded(jnp.asarray(masks), jnp.asarray(ious), tokens, score))
    changed = np.asarray(ours.masks[:, 0] != masks[:, 0]).any((1, 2))
    assert changed.any() and not changed.all()
    close("stability: mask", ours.masks[:, :1], theirs[0])
    close("stability: IoU", ours.ious[:, :1], theirs[1])
