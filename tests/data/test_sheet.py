"""The contact sheet: clips before and after, objects in their colours on both sides."""

import numpy as np
import pytest
from PIL import Image

from sam2_jax.data import sheet
from sam2_jax.data.augment import AugmentSettings
from sam2_jax.data.pipeline import Part
from sam2_jax.data.sampling import Sampling
from sam2_jax.data.synthetic import SyntheticSource
from sam2_jax.plots import COLOURS, colour_of
from sam2_jax.types import UserError

SIDE = 96
NONE = (0.0, 0.0, 0.0)
OFF = AugmentSettings(hflip=0, degrees=0, shear=0, jitter=NONE, grayscale=0, frame_jitter=NONE)


class Broken(SyntheticSource):
    """Every second clip cannot be read."""

    def read(self, index, frames, objects):
        if index % 2:
            raise UserError(f"clip {index} cannot be decoded")
        return super().read(index, frames, objects)


def source(made=SyntheticSource, clips=10):
    return made(num_clips=clips, num_frames=9, size=SIDE, max_objects=2)


def part(num_frames=6, of=None, **changes):
    settings = OFF._replace(**changes)
    return Part("part", of or source(), Sampling(num_frames, 2), settings, 1)


def share(image, colour):
    return (np.abs(image.astype(int) - np.array(colour)).max(-1) <= 30).mean()


def test_a_tile_outlines_each_object_in_its_colour():
    image, masks = np.full((50, 100, 3), 90, np.uint8), np.zeros((2, 50, 100), bool)
    masks[0, 10:30, 10:30] = masks[1, 10:30, 60:80] = True
    tile = sheet.draw_tile(image, masks, (2, 300)).image
    assert tile.shape == (2 * sheet.TALL, 4 * sheet.TALL, 3)
    half = tile.shape[1] // 2
    for side, k in ((tile[:, :half], 2), (tile[:, half:], 300)):
        assert share(side, colour_of(k)) > 0.005
        others = [colour for colour in COLOURS if colour != colour_of(k)]
        assert all(share(side, colour) < 1e-3 for colour in others)
    assert (tile[-20:] == 90).all()


def test_both_sides_show_the_same_frames():
    # With nothing changed on the way the picture is the same, though larger.
    for row in sheet.training_rows(part(), SIDE, seed=1):
        assert len(row.stored) == len(row.seen) == sheet.FRAMES
        for stored, seen in zip(row.stored, row.seen, strict=True):
            np.testing.assert_array_equal(stored.image, seen.image)
    flipped = sheet.training_rows(part(hflip=1.0), SIDE, seed=1)[0]
    difference = np.abs(flipped.stored[0].image[:, ::-1].astype(int) - flipped.seen[0].image)
    assert np.median(difference) <= 1


def test_images_share_a_row():
    rows = sheet.training_rows(part(1), SIDE, seed=0, clips=2)
    assert [len(row.stored) for row in rows] == [len(row.seen) for row in rows] == [4, 4]
    assert rows[0].stored[0].caption.startswith("synthetic-")


def test_clips_that_cannot_be_read_are_left_out():
    broken = source(Broken)
    names = [row.title for row in sheet.training_rows(part(of=broken), SIDE, seed=0)]
    names += [row.title for row in sheet.evaluation_rows(broken, seed=0)]
    assert len(names) == 8 and all(int(name[-1]) % 2 == 0 for name in names)


@pytest.mark.parametrize("single", [False, True])
def test_a_sheet_is_written(tmp_path, single):
    groups = {
        "a $source$": sheet.training_rows(part(1 if single else 6), SIDE, seed=0),
        "evaluation": sheet.evaluation_rows(source(clips=2), seed=0),
        "nothing": [],
    }
    sheet.contact_sheet(groups, tmp_path / "sheet.png")
    image = Image.open(tmp_path / "sheet.png")
    pixels = np.asarray(image.convert("RGB"))
    assert image.mode == "P" and (pixels[-3:] == 255).all()
    assert (pixels != 255).any(-1).mean() > 0.5
    assert share(pixels, COLOURS[0]) > 1e-3


def test_few_colours_keep_those_of_outlines():
    picture = np.random.default_rng(0).integers(0, 60, (200, 200, 3), np.uint8)
    for n, colour in enumerate(COLOURS):
        picture[20 * n : 20 * n + 3, 50:60] = colour
    indexed = np.asarray(sheet._indexed(Image.fromarray(picture)).convert("RGB"))
    for n, colour in enumerate(COLOURS):
        line = indexed[20 * n + 1, 53:57].astype(int)
        assert np.abs(line - np.array(colour)).max() <= 8


def test_the_same_seed_draws_the_same():
    first, again = (sheet.training_rows(part(degrees=20.0), SIDE, seed=3) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert a.title == b.title
        np.testing.assert_array_equal(a.seen[0].image, b.seen[0].image)
