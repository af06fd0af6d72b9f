"""The pictures of a run: what they show, that they replace the old ones whole, no global state."""

import pathlib
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest

from sam2_jax import plots


def view(size=(60, 100), place=0, predicted=True, clip="clip", num_frames=9):
    true = np.zeros((1, *size), bool)
    true[0, 10:40, 10:40] = True
    guess = np.zeros(size, np.uint8)
    if predicted:
        guess[10:40, 50:80] = 1
    image = np.full((*size, 3), 90, np.uint8)
    return plots.View(clip, 0, place, place, num_frames, image, (1,), guess, true)


def near(image, colour, tolerance=40):
    return np.abs(image.astype(int) - np.array(colour)).max(-1) <= tolerance


def test_tile_shows_prediction_and_truth_where_they_are():
    tile = plots._tile(view(), 400, 240)
    assert tile.shape == (480, 800, 3)
    scale = tile.shape[1] // 100
    coloured, white = near(tile, plots.COLOURS[0]), near(tile, (255, 255, 255))
    ys, xs = np.nonzero(coloured)
    assert 48 * scale < xs.min() < 52 * scale and 78 * scale < xs.max() < 82 * scale
    ys, xs = np.nonzero(white)
    assert 8 * scale < xs.min() < 12 * scale and 38 * scale < xs.max() < 42 * scale
    assert 8 * scale < ys.min() < 12 * scale and 38 * scale < ys.max() < 42 * scale
    # Dashed: of a side's line, part is white and part is not.
    side = white[12 * scale : 38 * scale, 8 * scale : 12 * scale].any(1).mean()
    assert 0.3 < side < 0.9
    # Lightly filled: inside, between the image and the colour. Outside: the image.
    inside = tile[25 * scale, 65 * scale].astype(float)
    mixed = 0.7 * 90 + 0.3 * np.array(plots.COLOURS[0])
    np.testing.assert_allclose(inside, mixed, atol=2)
    assert (tile[50 * scale, 95 * scale] == 90).all()
    assert not near(plots._tile(view(predicted=False), 400, 240), plots.COLOURS[0]).any()


def test_prompts_are_drawn():
    points = np.array([[[0.2, 0.4], [0.7, 0.2], [0.0, 0.0]]])
    clicks = plots.Given("click2", points, np.array([[1, 0, -1]]))
    tile = plots._tile(view(predicted=False)._replace(given=clicks), 400, 240)
    for (x, y), label in (((160, 192), 1), ((560, 96), 0)):  # 800 x 480 pixels
        assert (tile[y, x] == plots.CLICKS[label][1]).all()
        assert not near(tile, plots.CLICKS[label][1])[: y - 30].any()
        assert not near(tile, plots.CLICKS[label][1])[:, x + 30 :].any()
    assert (tile[0, 0] == 90).all()  # label -1: no click
    box = plots.Given("box", points[:, :2, :], np.array([[2, 3]]))
    tile = plots._tile(view(predicted=False)._replace(given=box), 400, 240)
    ys, xs = np.nonzero(near(tile, plots.COLOURS[0]))
    assert abs(xs.min() - 160) < 5 and abs(xs.max() - 560) < 5 and abs(ys.min() - 96) < 5
    mask = plots.Given("mask", np.zeros((1, 0, 2)), np.zeros((1, 0), int))
    dashed = near(plots._tile(view(predicted=False), 400, 240), (255, 255, 255)).sum()
    whole = plots._tile(view(predicted=False)._replace(given=mask), 400, 240)
    assert near(whole, (255, 255, 255)).sum() > 1.3 * dashed
    assert plots._caption(view()._replace(given=clicks)) == "frame 0 (given: click2)"
    assert plots._caption(view(place=4)) == "frame 4"


def test_a_prompt_belongs_to_the_clip_of_its_thread():
    sheet = plots.Sheet(range(4), columns=2)
    barrier = threading.Barrier(4)

    def one(n):
        sheet.note(plots.Given(f"click{n}", np.zeros((1, 1, 2)), np.ones((1, 1), int)))
        barrier.wait()
        for t in (0, 8):
            sheet.watch(view(place=t, clip=str(n))._replace(clip_index=n))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for action in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            action(thread)
    for name, (first, last) in sheet.rows.items():
        assert first.given and first.given.prompt == f"click{name}" and last.given is None


def test_sheet_keeps_evenly_spaced_frames_of_the_first_clips():
    sheet = plots.Sheet(range(2), columns=3)
    for number in (2, 1, 0):  # as they come from several devices
        for t in range(9):
            sheet.watch(view(place=t, clip="abc"[number])._replace(clip_index=number))
    assert list(sheet.rows) == ["a", "b"]
    assert [v.place for v in sheet.rows["a"]] == [0, 4, 8]
    short = plots.Sheet(columns=5)
    for t in range(3):
        short.watch(view(place=t, num_frames=3))
    assert [v.place for v in short.rows["clip"]] == [0, 1, 2]


@pytest.mark.parametrize(("size", "tile"), [((64, 64), 240), ((128, 128), 256), ((480, 854), 400)])
def test_overlay_sheet_is_written_whole(tmp_path, size, tile):
    path = tmp_path / "new" / "overlay.png"
    rows = {"wide": [view(size, t) for t in (0, 4, 8)], "other": [view((60, 40))]}
    plots.overlay_sheet(rows, {"wide": 0.5}, path, title="step 1")
    picture = cv2.imread(str(path))
    assert picture is not None and picture.shape[1] == 3 * (tile + 6) + 6
    assert near(picture, plots.COLOURS[0][::-1]).any()
    plots.overlay_sheet({"wide": rows["wide"]}, {}, path, title="step 2")  # replaces
    assert [p.name for p in path.parent.iterdir()] == ["overlay.png"]


def test_pyplot_is_not_imported():
    code = "import sys, sam2_jax.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    root = pathlib.Path(plots.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
