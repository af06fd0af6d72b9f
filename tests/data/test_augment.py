"""Augmentation as a whole: pure, alike on pixels and masks, and the reference's recipe."""

import numpy as np
import pytest
from PIL import Image

from sam2_jax.data import augment as module
from sam2_jax.data.augment import AugmentSettings, augment
from sam2_jax.data.colour import GREY
from sam2_jax.data.transforms import resize_clip

RECIPE = AugmentSettings()
NO_JITTER = (0.0, 0.0, 0.0)
RED, GREEN = np.array([[250, 10, 60], [0, 200, 160]], np.uint8)
OFF = RECIPE._replace(
    hflip=0.0, degrees=0.0, shear=0.0, jitter=NO_JITTER, grayscale=0.0, frame_jitter=NO_JITTER
)
EVERYTHING = RECIPE._replace(
    vflip=0.5, scale=(0.8, 1.2), mosaic=0.5, mosaic_hflip=True, noise=4.0, blur=1.5
)
# Eight roundings in a row, of which Pillow cuts off most: a level of difference in one moves the
# cut of the next. Values beyond are single pixels at sharp edges.
TWO_LEVELS, MEAN, CHAIN = 0.98, 1, 8  # share within two levels; mean; most
# A mask's pixel falls to the other side where its warped position is half-way between pixels.
MASKS = 0.001  # share of pixels


def clip(t=3, height=60, width=90):
    """Smooth frames that differ, and two objects; the second is missing on the first frame."""
    y, x = np.mgrid[:height, :width]
    shift = np.arange(t)[:, None, None, None]
    waves = np.sin((x[..., None] + 4 * shift) / 9 + np.arange(3)) * np.cos(y[..., None] / 7)
    frames = np.clip(127 + 140 * waves, 0, 255).astype(np.uint8)
    masks = np.zeros((t, 3, height, width), bool)
    masks[:, 0, 20:40, 30:60], masks[:, 2, 10:30, 50:70] = True, True
    masks[1:, 1, 30:45, 20:40] = True
    return frames, masks


def run(settings, seed=0, side=64, **kwargs):
    return augment(np.random.default_rng(seed), *clip(**kwargs), side, settings)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("settings", [RECIPE, EVERYTHING, OFF._replace(jitter=(0.5, 0.5, 0.5))])
@pytest.mark.parametrize("side", [60, 64])  # a clip of 60 needs no resize
def test_same_generator_same_pixels_and_the_clip_is_not_written_to(settings, side):
    given, kept = clip(width=60), clip(width=60)
    for seed in range(4):
        results = [augment(np.random.default_rng(seed), *given, side, settings) for _ in range(2)]
        assert_same(*results)
        assert_same(given, kept)
        frames, masks = results[0]
        assert frames.shape == (3, side, side, 3) and frames.dtype == np.uint8
        assert masks.shape == (3, 3, side, side) and masks.dtype == bool
    other = augment(np.random.default_rng(9), *given, side, settings)
    assert (other[0] != results[0][0]).any()


@pytest.mark.parametrize("side", [32, 64, 128])
def test_with_everything_off_a_clip_is_resized(side):
    assert_same(run(OFF, side=side), resize_clip(*clip(), (side, side)))


def test_a_setting_moves_no_other_draw():
    """The same seed flips, turns and tiles the same clips whatever else is on."""
    for seed in range(12):
        plain = OFF._replace(hflip=0.5, degrees=25.0, mosaic=0.5)
        coloured = plain._replace(jitter=(0.5, 0.5, 0.5), grayscale=0.5, blur=2.0, noise=3.0)
        np.testing.assert_array_equal(run(plain, seed)[1], run(coloured, seed)[1])


@pytest.mark.parametrize("key, axis", [("hflip", 2), ("vflip", 1)])
def test_flips_mirror_frames_and_masks_half_of_the_time(key, axis):
    frames, masks = resize_clip(*clip(), (64, 64))
    flipped = np.flip(frames, axis), np.flip(masks, axis + 1)
    count = 0
    for seed in range(200):
        found = run(OFF._replace(**{key: 0.5}), seed)
        is_flipped = bool((found[0] == flipped[0]).all())
        assert_same(found, flipped if is_flipped else (frames, masks))
        count += is_flipped
    assert 70 < count < 130
    assert_same(run(OFF._replace(**{key: 1.0})), flipped)


def test_one_affine_change_for_all_frames_and_masks():
    settings = OFF._replace(degrees=25.0, shear=20.0, scale=(0.9, 1.1))
    frames, masks = clip()
    frames[:] = np.where(masks[:1, 0, ..., None], RED, GREEN)
    masks[:, 0] = masks[0, 0]
    for seed in range(6):
        found, moved = augment(np.random.default_rng(seed), frames, masks, 90, settings)
        assert (found == found[0]).all() and (moved[:, 0] == moved[0, 0]).all()
        painted = found[0, ..., 0].astype(int) - found[0, ..., 1] > 20  # nearer the object's colour
        assert (painted != moved[0, 0]).mean() < 0.03 and moved[0, 0].sum() > 500


def test_an_object_turned_out_of_the_first_frame_leaves_the_clip_as_it_is():
    frames, masks = clip()
    settings = OFF._replace(degrees=40.0)
    masks[0, 0] = False
    masks[0, 0, :2, :3] = True  # in a corner
    done = 0
    for seed in range(20):
        found = augment(np.random.default_rng(seed), frames, masks, 64, settings)
        assert (found[1][0].any((1, 2)) == [True, False, True]).all()
        done += bool((found[0] != resize_clip(frames, masks, (64, 64))[0]).any())
    assert done < 10
    without = masks[:, 1:]  # an object that the first frame never showed counts for nothing
    turned = augment(np.random.default_rng(0), frames, without, 64, settings)[0]
    assert (turned != resize_clip(frames, masks, (64, 64))[0]).any()


def test_mosaic_keeps_one_cell_and_no_object_is_lost_in_it():
    cells = set()
    for seed in range(40):
        masks = run(OFF._replace(mosaic=1.0), seed)[1]
        areas = masks.any((0, 1)).reshape(2, 32, 2, 32).any((1, 3))
        assert areas.sum() == 1
        cells.add(int(areas.argmax()))
    assert cells == {0, 1, 2, 3}
    frames, masks = clip(height=64, width=64)
    masks[0, 0] = False
    masks[0, 0, 9, 9] = True  # a pixel is gone at half the size
    found = augment(np.random.default_rng(0), frames, masks, 64, OFF._replace(mosaic=1.0))
    assert_same(found, (frames, masks))


def test_aspect_is_kept_and_padding_has_the_fill_colour():
    settings = OFF._replace(keep_aspect=True, fill=(9, 8, 7))
    found = run(settings, side=45)
    expected = resize_clip(*clip(), (30, 45))
    assert_same((found[0][:, :30], found[1][..., :30, :]), expected)
    assert (found[0][:, 30:] == (9, 8, 7)).all() and not found[1][..., 30:, :].any()


def test_jitter_is_drawn_for_the_clip_or_for_each_frame():
    frames, masks = clip()
    frames[:] = frames[0]
    rng = np.random.default_rng(0)
    whole = augment(rng, frames, masks, 60, OFF._replace(jitter=(0.5, 0.5, 0.5)))[0]
    each = augment(rng, frames, masks, 60, OFF._replace(frame_jitter=(0.5, 0.5, 0.5)))[0]
    plain = resize_clip(frames, masks, (60, 60))[0]
    assert (whole == whole[0]).all() and (whole != plain).mean() > 0.5
    assert (each[0] != each[1]).mean() > 0.5 and (each[1] != each[2]).mean() > 0.5


def test_a_grey_clip_is_grey_on_every_frame_and_the_share_is_the_probability():
    grey = [
        np.ptp(run(RECIPE._replace(grayscale=0.3), n)[0], -1).max(1).max(1) == 0 for n in range(90)
    ]
    assert all(len(set(clip_is)) == 1 for clip_is in grey)
    assert 14 <= sum(bool(clip_is[0]) for clip_is in grey) <= 40


@pytest.mark.parametrize("std", [0.4, 6.0])
def test_noise_has_the_standard_deviation_asked_for(std):
    frames, masks = np.full((2, 200, 200, 3), 128, np.uint8), np.ones((2, 1, 200, 200), bool)
    found = augment(np.random.default_rng(0), frames, masks, 200, OFF._replace(noise=std))[0]
    noise = found.astype(float) - 128
    rounded = np.sqrt(std**2 + 1 / 12)  # whole levels; for small std roughly
    assert noise.std() == pytest.approx(rounded, rel=0.15 if std < 1 else 0.01)
    assert abs(noise.mean()) < 0.05 and (noise[0] != noise[1]).any()
    assert 3 * std < noise.max() < 5 * std + 1
    dark = augment(np.random.default_rng(0), frames // 128, masks, 200, OFF._replace(noise=std))[0]
    assert dark.max() < 50  # clipped at 0, not wrapped around


def test_blur_smooths_all_frames_alike():
    frames, masks = clip()
    frames[:] = np.random.default_rng(0).integers(0, 256, frames.shape[1:], np.uint8)
    settings = OFF._replace(blur=2.0)
    spreads = []
    for seed in range(6):
        found = augment(np.random.default_rng(seed), frames, masks, 60, settings)[0]
        assert (found == found[0]).all()
        spreads.append(found.std())
    assert min(spreads) < 0.4 * resize_clip(frames, masks, (60, 60))[0].std() < max(spreads)


@pytest.mark.parametrize("side", [48, 128])
def test_the_recipe_is_torchvisions(side, monkeypatch):
    """The recipe, done again by torchvision and Pillow with the factors drawn here."""
    torch = pytest.importorskip("torch")
    tv = pytest.importorskip("torchvision.transforms.functional")
    turns, blends = [], []
    matrix, adjust = module.inverse_matrix, module.adjust
    monkeypatch.setattr(module, "inverse_matrix", lambda *a: turns.append(a) or matrix(*a))
    monkeypatch.setattr(module, "adjust", lambda f, ops: blends.append(ops) or adjust(f, ops))
    frames, masks = clip(height=72, width=110)
    for seed in range(6):
        turns.clear()
        blends.clear()
        settings = RECIPE._replace(hflip=float(seed % 2), grayscale=0.3)
        found = augment(np.random.default_rng(seed), frames, masks, side, settings)
        angle, shear, zoom = turns[0][:3]
        for t, ops in enumerate(blends):
            image, cover = Image.fromarray(frames[t]), torch.from_numpy(masks[t].view(np.uint8))
            if seed % 2:
                image, cover = tv.hflip(image), tv.hflip(cover)
            how = angle, [0, 0], zoom, [shear, 0.0]
            modes = tv.InterpolationMode
            image = tv.affine(image, *how, interpolation=modes.BILINEAR, fill=list(RECIPE.fill))
            cover = tv.affine(cover, *how, interpolation=modes.NEAREST, fill=[0.0])
            image, cover = tv.resize(image, [side, side]), tv.resize(cover, [side, side])
            for op in ops:
                change = getattr(tv, f"adjust_{op.kind}")
                image = tv.to_grayscale(image, 3) if op == GREY else change(image, op.factor)
            difference = np.abs(found[0][t].astype(int) - np.asarray(image))
            assert (difference <= 2).mean() >= TWO_LEVELS and difference.max() <= CHAIN
            assert difference.mean() <= MEAN
            assert (found[1][t] != (cover.numpy() > 0)).mean() <= MASKS


def test_noise_is_not_blurred():
    frames, masks = np.full((2, 64, 64, 3), 128, np.uint8), np.ones((2, 1, 64, 64), bool)
    settings = OFF._replace(noise=10.0, blur=5.0)
    noisy, _ = augment(np.random.default_rng(0), frames, masks, 64, settings)
    assert noisy.std() == pytest.approx(10, rel=0.05)
