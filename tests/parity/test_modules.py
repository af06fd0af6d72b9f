"""The parts that look at one image and its prompts against the reference's, on random inputs."""
# pyright: reportMissingImports=false

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sam2.modeling.position_encoding import apply_rotary_enc, compute_axial_cis
from sam2.modeling.sam2_utils import get_1d_sine_pe

from sam2_jax import convert, decode
from sam2_jax.model.position import bicubic_matrix, rotary_table, rotate, sine_1d, sine_grid
from sam2_jax.model.sam2 import normalise
from sam2_jax.prompts import noisy_box, uniform_click
from sam2_jax.resize import resize
from sam2_jax.types import Decoded, Features
from tests.parity import reference, tolerances
from tests.parity.compare import close, close_to_exact, first, last
from tests.parity.rounding import exactly, given, roundings

N = 2  # videos
OBJECTS = 2  # each


@pytest.fixture(params=["2.1", "faint"])
def pair(request, make_pair):
    return make_pair(request.param)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_names_go_both_ways_exactly(make_pair, version):
    pair = make_pair(version)
    state = reference.state_of(pair.reference)
    back = convert.to_reference(pair.params)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert value.tobytes() == back[name].tobytes() and value.shape == back[name].shape


def test_trunk_stages(pair, rng, resolution):
    images = rng.integers(0, 256, (N, resolution, resolution, 3), dtype=np.uint8)
    x = normalise(images, jnp.float32)
    flat = torch.tensor(images).float() / 255
    expected = (flat.movedim(-1, 1) - reference.MEAN) / reference.STD
    close("normalised images", x, last(expected))
    theirs = pair.reference.image_encoder.trunk(expected)
    module = pair.model.bind({"params": pair.params}).image_encoder.trunk.unbind()[0]
    trunk = pair.params["image_encoder"]["trunk"]
    ours = jax.jit(lambda p, x: module.apply({"params": p}, x, None))(trunk, x)
    assert len(ours) == len(theirs) == 4
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        close(f"trunk stage {i}", a, last(b))


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (256, 256)])
@pytest.mark.parametrize("side", [7, 14])
def test_bicubic(draw, size, side):
    grid = draw(side, side, 3)
    resized = torch.nn.functional.interpolate(first(grid[None]), size, mode="bicubic")
    rows, cols = (bicubic_matrix(n, side) for n in size)
    close("bicubic", np.einsum("hi,wj,ijc->hwc", rows, cols, grid), last(resized)[0])


def test_image_encoder_and_its_position_code(pair, call, draw, resolution):
    x = draw(N, resolution, resolution, 3)
    out = pair.reference.forward_image(first(x))
    ours = call(pair, "encode_image", x)
    s0, s1, top = out["backbone_fpn"]
    close("neck, stride 16", ours.top, last(top))
    close("neck, stride 8", ours.s1, last(s1))
    close("neck, stride 4", ours.s0, last(s0))
    for code in out["vision_pos_enc"]:
        c, h, w = code.shape[1:]
        close("sine code", sine_grid(h, w, c), last(code)[0])


def test_temporal_code():
    position = np.array([-3, 0, 1, 7, 15], np.float32) / 15
    theirs = get_1d_sine_pe(torch.tensor(position), 64)
    close("temporal code", sine_1d(jnp.asarray(position), 64), theirs)


@pytest.mark.parametrize("side, channels", [(4, 64), (16, 256), (32, 256)])
def test_rotary_code(draw, side, channels):
    """Of queries and of the keys of three memories."""
    table = compute_axial_cis(channels, side, side)
    ours = rotary_table(side, channels)
    close("rotary code", np.moveaxis(ours, 1, -1), torch.view_as_real(table))
    query, key = draw(2, 1, side**2, channels), draw(2, 1, 3 * side**2, channels)
    theirs = apply_rotary_enc(torch.tensor(query), torch.tensor(key), table, repeat_freqs_k=True)
    close("rotated queries", rotate(query, ours), theirs[0])
    frames = rotate(key.reshape(2, 3, side**2, channels), ours)
    close("rotated keys", frames.reshape(key.shape), theirs[1])


def test_prompt_encoder(pair, call, rng, draw, resolution):
    """Points of every label, boxes, masks, nothing."""
    side = resolution // 16
    labels = np.array([[1, 0, -1], [2, 3, -1], [-1, 1, 0], [2, 3, 1]], np.int32)
    points = rng.uniform(0, resolution - 1, (4, 3, 2)).astype(np.float32)
    mask = 5 * draw(4, 4 * side, 4 * side)
    theirs = pair.reference.sam_prompt_encoder
    sparse, dense = theirs(
        (torch.tensor(points), torch.tensor(labels)), None, first(mask[..., None])
    )
    ours = pair.model.bind({"params": pair.params}).sam_prompt_encoder
    close("point tokens", ours.points(jnp.asarray(points), jnp.asarray(labels)), sparse[:, :3])
    padding = ours.points(jnp.zeros((4, 1, 2)), -jnp.ones((4, 1), int))
    close("padding token", padding, sparse[:, 3:])
    close("mask prompt", call(pair, "mask_prompt", mask), last(dense))
    boxes, _ = theirs(None, torch.tensor(points[:, :2].reshape(4, 4)), None)
    corners = jnp.asarray(points[:, :2]), jnp.tile(jnp.array([2, 3]), (4, 1))
    close("box tokens", ours.points(*corners), boxes)
    nothing, dense = theirs(None, None, None)
    assert nothing.shape[1] == 0
    none = jnp.broadcast_to(call(pair, "no_mask_prompt"), (side, side, dense.shape[1]))
    close("no mask prompt", none, last(dense)[0])
    close("grid code", ours.grid_code(side), last(theirs.get_dense_pe())[0])


def decoder_inputs(pair, rng, draw, resolution, count):
    """Random features, points of which `count` are in use, and a dense prompt."""
    c, n, side = pair.model.variant.hidden_dim, N * OBJECTS, resolution // 16
    top, dense = draw(n, side, side, c), draw(n, side, side, c)
    s1, s0 = draw(N, 2 * side, 2 * side, c // 4), draw(N, 4 * side, 4 * side, c // 8)
    points = rng.uniform(0, resolution - 1, (n, 4, 2)).astype(np.float32)
    labels = rng.integers(0, 2, (n, 4)).astype(np.int32)
    labels[:, count:] = -1
    return top, dense, s1, s0, points, labels


@pytest.mark.parametrize("count", [0, 1, 3])
def test_mask_decoder(pair, call, rng, draw, resolution, count):
    """All four mask tokens at once."""
    top, dense, s1, s0, points, labels = decoder_inputs(pair, rng, draw, resolution, count)
    n, shown = len(top), max(count, 1)  # the reference stands one padding point in for none
    present = np.arange(n) % 2 == 0

    def theirs(model) -> dict[str, torch.Tensor]:
        sparse, _ = model.sam_prompt_encoder(
            (given(points[:, :shown]), given(labels[:, :shown])), None, None
        )
        masks, ious, tokens, scores = model.sam_mask_decoder.predict_masks(
            image_embeddings=given(first(top)),
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=given(first(dense)),
            repeat_image=False,
            high_res_features=[given(first(np.repeat(x, OBJECTS, 0))) for x in (s0, s1)],
        )
        pointer = model.obj_ptr_proj(tokens[:, 0])
        pointer = torch.where(torch.tensor(present)[:, None], pointer, model.no_obj_ptr)
        found = {"masks": masks, "IoU": ious, "tokens": tokens}
        return found | {"object score": scores[:, 0], "pointer": pointer}

    padded = np.concatenate([np.zeros((n, 1, 2), np.float32), points], 1)
    kinds = np.concatenate([-np.ones((n, 1), np.int32), labels], 1)
    used = np.arange(5) < 1 + shown
    ours = call(pair, "decode", top, s1, s0, padded, kinds, used, dense)
    exact = exactly(theirs, pair.reference)
    for name, mine in (
        ("masks", ours.masks),
        ("IoU", ours.ious),
        ("tokens", ours.tokens),
        ("object score", ours.object_score),
        ("pointer", call(pair, "pointer", ours.tokens[:, 0], present)),
    ):
        runs = (run[name] for run in roundings(theirs, pair.reference))
        close_to_exact(f"decoder {name}", mine, runs, exact[name], tolerances.MODULE)


@pytest.mark.parametrize("kind", ["single", "multi", "stable"])
def test_heads(make_pair, rng, draw, resolution, kind):
    """A pass as a frame sees it: one mask, the best of three, or the reference's evaluation."""
    pair = make_pair("2.1")
    count = 1 if kind == "multi" else 3
    top, _, s1, s0, points, labels = decoder_inputs(pair, rng, draw, resolution, count)
    side = resolution // 16
    before = 5 * draw(len(top), 4 * side, 4 * side)
    model = copy.deepcopy(pair.reference)
    model.sam_mask_decoder.dynamic_multimask_via_stability = True
    model.sam_mask_decoder.dynamic_multimask_stability_delta = decode.DELTA
    model.sam_mask_decoder.dynamic_multimask_stability_thresh = decode.STABLE
    model.train(kind != "stable")

    def theirs(model) -> dict[str, torch.Tensor]:
        coords, kinds = given(points[:, :count]), given(labels[:, :count])
        low, high, ious, best, _, pointer, score = model._forward_sam_heads(
            backbone_features=given(first(top)),
            point_inputs={"point_coords": coords, "point_labels": kinds},
            mask_inputs=given(before[:, None]),
            high_res_features=[given(first(np.repeat(x, OBJECTS, 0))) for x in (s0, s1)],
            multimask_output=kind == "multi",
        )
        masks = {"masks": low, "upsampled": high, "chosen mask": best}
        return masks | {"IoU": ious, "pointer": pointer, "object score": score[:, 0]}

    with torch.no_grad():  # half of the objects present, half absent
        scores = theirs(model)["object score"].sort().values
        reference.score_bias(model).sub_((scores[1] + scores[2]) / 2)
    exact = exactly(theirs, model)

    rest: Any = dict(num_frames=2, corrections=2, deterministic=True, points=True)
    inference = decode.Inference(stability=kind == "stable")
    params = convert.from_reference(reference.state_of(model), pair.params)

    def shape(x):
        return x.reshape(N, OBJECTS, *x.shape[1:])

    @jax.jit
    def run(params, top, s1, s0, points, labels, before):
        tracking = decode.Tracking(
            pair.model, params, click=uniform_click, box=noisy_box, inference=inference, **rest
        )
        visit = decode.Visit(
            frame=jnp.int32(0),
            features=Features(top[::OBJECTS], s1, s0),
            truth=jnp.zeros((N, OBJECTS, resolution, resolution), bool),
            from_mask=jnp.array(False),
            is_cond=jnp.array(True),
            is_box=jnp.array(False),
            is_corrected=jnp.array(False),
            from_truth=jnp.zeros(2, bool),
            remembered=jnp.array(True),
        )
        dense = tracking.call("mask_prompt", before).reshape(top.shape)
        prompt = decode.Prompt(shape(points), shape(labels), jnp.int32(count))
        is_multi = jnp.array(kind == "multi")
        done = decode.predict(tracking, visit, shape(top), prompt, shape(dense), is_multi)
        return done, tracking.call("pointer", done.token, done.object_score > 0)

    ours, token = run(params, top, s1, s0, points, labels, before)
    present = exact["object score"].numpy() > 0
    assert present.any() and not present.all()

    def flat(x):
        return np.asarray(x).reshape(-1, *x.shape[2:])

    many, high = exact["masks"].shape[1], exact["upsampled"].shape[2:]
    everywhere = np.ones_like(present)
    for name, mine, where in (
        ("masks", flat(ours.masks)[:, :many], present),
        ("upsampled", flat(resize(ours.masks, high))[:, :many], present),
        ("chosen mask", flat(ours.mask)[:, None], present),
        ("IoU", flat(ours.ious)[:, :many], everywhere),
        ("object score", flat(ours.object_score), everywhere),
        ("pointer", flat(token), everywhere),
    ):
        assert np.array_equal(mine[~where], exact[name].numpy()[~where])
        runs = (run[name][where] for run in roundings(theirs, model))
        part = f"heads, {kind}: {name}"
        close_to_exact(part, mine[where], runs, exact[name][where], tolerances.MODULE)


def test_stability(pair, rng):
    """Single masks that hang on a threshold give way to the best of the other three."""
    masks = rng.normal(size=(16, 4, 16, 16)).astype(np.float32)
    masks[::2, 0] *= 100  # hardly any logit near zero
    ious = rng.random((16, 4)).astype(np.float32)
    decoder = pair.reference.sam_mask_decoder
    theirs = decoder._dynamic_multimask_via_stability(torch.tensor(masks), torch.tensor(ious))
    tokens, score = np.zeros((16, 4, 8), np.float32), np.zeros(16, np.float32)
    ours = decode.prefer_stable(Decoded(jnp.asarray(masks), jnp.asarray(ious), tokens, score))
    changed = np.asarray(ours.masks[:, 0] != masks[:, 0]).any((1, 2))
    assert changed.any() and not changed.all()
    close("stability: mask", ours.masks[:, :1], theirs[0])
    close("stability: IoU", ours.ious[:, :1], theirs[1])
