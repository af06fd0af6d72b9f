"""SA-V: the real annotation file with a rendered video, and layouts that are broken."""

import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from sam2_jax.data.rle import encode_rle
from sam2_jax.data.sav import open_sav
from sam2_jax.data.sources import EncodedSource, Faults, VideoSource, keep_usable
from sam2_jax.types import UserError
from tests.data.test_mp4 import write_video

SIZE = (64, 96)  # of the small clips
INK = 40  # grey levels by which an object that is drawn stands out


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def square(t, k):
    """Object k of annotated frame t: moves right, each in a row of its own."""
    mask = np.zeros(SIZE, bool)
    mask[8 * k + 2 : 8 * k + 8, 4 * t : 4 * t + 10] = True
    return mask


def annotate(path, rows, **fields):
    fields = {"video_height": float(SIZE[0]), "video_width": float(SIZE[1])} | fields
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"video_id": path.stem, "masklet": rows, **fields}))


def draw(rows, every=4, tail=3):
    """Frames of a video of which every so manieth shows the masks of a row; the others are grey."""
    frames = []
    for row in rows:
        image = np.full((*SIZE, 3), 100, np.uint8)
        for mask in row:
            image[mask] = 100 + 2 * INK
        frames += [image] + [np.full((*SIZE, 3), 100, np.uint8)] * (every - 1)
    return frames[: len(frames) - every + 1 + tail]


@pytest.fixture
def masks():
    return [[square(t, k) & (k < 2 or t != 1) for k in range(3)] for t in range(6)]


@pytest.fixture
def root(tmp_path, masks):
    """One clip as an mp4 file beside its annotations: 6 annotated frames, 3 objects."""
    folder = tmp_path / "sav" / "sav_000"
    annotate(folder / "a_manual.json", [[encode_rle(m) for m in row] for row in masks])
    write_video(folder / "a.mp4", draw(masks))
    return tmp_path / "sav"


def extract(folder, frames, every=4):
    folder.mkdir(parents=True)
    for t in range(0, len(frames), every):
        Image.fromarray(frames[t]).save(folder / f"{t:05d}.jpg", quality=95)


def check_alignment(source, index=0):
    """Masks lie where the objects are drawn."""
    count = source.video(index).num_frames
    for t in range(count):
        ids = source.objects(index, t)
        frames, found = source.read(index, [t], ids)
        np.testing.assert_array_equal(frames[0, ..., 0] > 100 + INK, found[0].any(0))


def test_a_video_and_its_masks(root, masks):
    source = open_sav(str(root))
    assert isinstance(source, VideoSource) and not isinstance(source, EncodedSource)
    assert [source.video(i) for i in range(len(source))] == [("a", 6, *SIZE)]
    assert [source.objects(0, t) for t in range(3)] == [(1, 2, 3), (1, 2), (1, 2, 3)]
    frames, found = source.read(0, [4, 1, 4], [3, 1])
    assert frames.shape == (3, *SIZE, 3)
    for i, t in enumerate([4, 1, 4]):
        np.testing.assert_array_equal(found[i, 0], masks[t][2])
        np.testing.assert_array_equal(found[i, 1], masks[t][0])
    assert source.read(0, [2], [])[1].shape == (1, 0, *SIZE)
    assert source.read(0, [], [1])[0].shape == (0, *SIZE, 3)
    assert not source.read(0, [0], [9])[1].any()
    check_alignment(source)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(0, [4, 1, 4], [3, 1])[1], found)
    assert keep_usable(source, 3) is source


def test_extracted_frames_go_first_and_can_be_taken_as_they_are(root, masks):
    extract(root / "frames" / "a", draw(masks))
    (root / "sav_000" / "a.mp4").write_bytes(b"not looked at")
    source = open_sav(str(root))
    assert isinstance(source, EncodedSource)
    check_alignment(source)
    assert source.encoded(0, 2) == (root / "frames" / "a" / "00008.jpg").read_bytes()
    (root / "frames" / "a" / "00008.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match="00008.jpg cannot be decoded"):
        source.read(0, [2], [])


def test_frames_that_lack_a_mask_are_left_out(root, masks):
    rows: list = [[encode_rle(m) for m in row] for row in masks]
    rows[0][2] = None
    rows[3] = None
    rows[4] = rows[4][:2]  # a later object that is not there yet, as the reference reads it
    annotate(root / "sav_000" / "a_manual.json", rows)
    source = open_sav(str(root))
    assert source.video(0).num_frames == 4
    assert source.notes == ["2 of 6 annotated frames left out: an object lacks its mask"]
    np.testing.assert_array_equal(source.read(0, [1], [2])[1][0, 0], masks[2][1])
    assert source.objects(0, 2) == (1, 2) and not source.read(0, [2], [3])[1].any()


def test_auto_annotations_and_rates(root, masks):
    rows = [[encode_rle(m) for m in row] for row in masks]
    annotate(root / "sav_000" / "a_auto.json", [row[:1] for row in rows])
    source = open_sav(str(root), annotations="auto")
    assert source.video(0).name == "a" and source.objects(0, 0) == (1,)
    # The older form, with the frames annotated in a second, which go before ann_every.
    path = root / "sav_000" / "a_auto.json"
    path.write_text(json.dumps({"masks": rows, "fps": [6.0]}))
    source = open_sav(str(root), annotations="auto", ann_every=1)
    assert source.video(0) == ("a", 6, *SIZE)
    check_alignment(source)
    path.write_text(json.dumps(rows))
    check_alignment(open_sav(str(root), annotations="auto"))
    path.write_text(json.dumps({"masks": rows, "fps": 7}))
    with pytest.raises(UserError, match="a_auto.json has fps 7, expected a divisor of 24"):
        open_sav(str(root), annotations="auto")
    with pytest.raises(UserError, match="config.data.sav.annotations"):
        open_sav(str(root), annotations="both")
    with pytest.raises(UserError, match="ann_every is 0"):
        open_sav(str(root), ann_every=0)


def test_three_hundred_objects(root):
    rng = np.random.default_rng(0)
    rows = [[encode_rle(rng.random(SIZE) < 0.01 * (k % 7 > 0)) for k in range(300)]] * 6
    annotate(root / "sav_000" / "a_manual.json", rows)
    source = open_sav(str(root))
    ids = source.objects(0, 5)
    assert ids == tuple(k + 1 for k in range(300) if k % 7 > 0)
    found = source.read(0, [5], [300, 1])[1]
    np.testing.assert_array_equal(encode_rle(found[0, 0])["counts"], rows[5][299]["counts"])
    assert not found[0, 1].any()


def other_size(root, rows):
    frames = [np.zeros((*SIZE[::-1], 3), np.uint8)] * 30
    write_video(root / "sav_000" / "a.mp4", frames)


def cut(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


BROKEN = {
    "a_manual.json has neither a.mp4 nor frames in a/": lambda root, rows: (
        root / "sav_000" / "a.mp4"
    ).unlink(),
    "a_manual.json is no JSON or cut off": lambda root, rows: cut(
        root / "sav_000" / "a_manual.json"
    ),
    "a.mp4 .*(is it whole|cut short)": lambda root, rows: cut(root / "sav_000" / "a.mp4"),
    "a.mp4 is 64 x 96, but .*a_manual.json is for 96 x 64": other_size,
    "a.mp4 has 24 frames, but .*a_manual.json annotates number 24": lambda root, rows: annotate(
        root / "sav_000" / "a_manual.json", [*rows, rows[0]]
    ),
    "a_manual.json: object 2 of annotated frame 3 has (run lengths of|counts)": lambda root, rows: (
        annotate(
            root / "sav_000" / "a_manual.json",
            [*rows[:3], [rows[3][0], {**rows[3][1], "counts": rows[3][1]["counts"][:-2]}]],
        )
    ),
    r"a_manual.json: object 3 of annotated frame 0 has run lengths for size \[96, 64\]": (
        lambda root, rows: annotate(
            root / "sav_000" / "a_manual.json",
            [[*row[:2], encode_rle(np.ones(SIZE[::-1], bool))] for row in rows],
        )
    ),
    "a_manual.json has video_height and video_width": lambda root, rows: annotate(
        root / "sav_000" / "a_manual.json", rows, video_height="tall"
    ),
    "a_manual.json has no list of frames called masklet": lambda root, rows: (
        root / "sav_000" / "a_manual.json"
    ).write_text('{"masklet": 3}'),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_clips_stop_or_are_left_out(root, masks, message, tmp_path):
    shutil.copy(root / "sav_000" / "a.mp4", root / "sav_000" / "b.mp4")
    shutil.copy(root / "sav_000" / "a_manual.json", root / "sav_000" / "b_manual.json")
    BROKEN[message](root, [[encode_rle(m) for m in row] for row in masks])
    with pytest.raises(UserError, match=message):
        open_sav(str(root))
    source = open_sav(str(root), faults=Faults("skip", 0.5))
    assert [source.video(i).name for i in range(len(source))] == ["b"]
    assert "1 of 2 clips" in source.notes[0] and "a" in source.notes[0]
    with pytest.raises(UserError, match="config.data.max_bad"):
        open_sav(str(root), faults=Faults("skip", 0.1))
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("a\n")
    assert len(open_sav(str(root), exclude=str(exclude))) == 1


def test_missing_and_broken_frames(root, masks):
    frames = root / "frames" / "a"
    extract(frames, draw(masks))
    last = frames / "00020.jpg"
    data = last.read_bytes()
    last.unlink()
    with pytest.raises(UserError, match="lacks 00020.jpg, 1 of the 6 frames"):
        open_sav(str(root))
    last.write_bytes(data[:-30])
    with pytest.raises(UserError, match="00020.jpg is cut short"):
        open_sav(str(root))
    Image.new("RGB", (96, 60)).save(last)
    with pytest.raises(UserError, match="00020.jpg is 96 x 60, but .* is for 96 x 64"):
        open_sav(str(root))


def test_roots_and_lists(root, tmp_path):
    with pytest.raises(UserError, match=r"key=.* has no file \*_auto.json below it"):
        open_sav(str(root), key="key", annotations="auto")
    with pytest.raises(UserError, match="key is empty"):
        open_sav("", key="key")
    include = tmp_path / "include.txt"
    include.write_text("b\n")
    with pytest.raises(UserError, match=r"include.txt names clips .* \(b\)"):
        open_sav(str(root), include=str(include))
    (root / "other").mkdir()
    shutil.copy(root / "sav_000" / "a_manual.json", root / "other")
    with pytest.raises(UserError, match="annotate one clip"):
        open_sav(str(root))


def test_real_annotations(real_clips, tmp_path):
    """The video is rendered: object k of annotated frame t is brighter, the rest is grey."""
    annotations = tmp_path / "root" / "sav_000001_manual.json"
    annotations.parent.mkdir()
    shutil.copyfile(real_clips / "sav" / annotations.name, annotations)
    from pycocotools import mask as coco_mask

    rows = json.loads(annotations.read_text())["masklet"]
    merged = [coco_mask.merge(row) for row in rows]
    frames = []
    for t in range(483):
        frames.append(np.full((848, 480, 3), 60, np.uint8))
        if t % 4 == 0:
            frames[-1][coco_rle(merged[t // 4])] = 60 + 3 * INK
    write_video(annotations.parent / "sav_000001.mp4", frames)
    source = open_sav(str(tmp_path / "root"))
    assert source.video(0) == ("sav_000001", 121, 848, 480) and source.notes == []
    assert source.objects(0, 0) == (1, 2, 3, 5)  # the fourth appears at frame 113
    picks = [120, 0, 57, 58]
    images, masks = source.read(0, picks, [1, 2, 3, 4, 5])
    for image, mask, t in zip(images, masks, picks, strict=True):
        for m, rle in zip(mask, rows[t], strict=True):
            np.testing.assert_array_equal(m, coco_rle(rle))
            assert m.sum() == coco_mask.area(rle)
        wrong = (image[..., 0] > 60 + 1.5 * INK) != mask.any(0)
        assert wrong.mean() < 0.005  # edges, blurred by the codec


def coco_rle(rle):
    """Decoded as by pycocotools, without its warning."""
    import warnings

    from pycocotools import mask as coco_mask

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return coco_mask.decode(rle).astype(bool)


@pytest.mark.parametrize("fps", [[], "24", None, float("inf")])
def test_rates_that_are_none(root, masks, fps):
    rows = [[encode_rle(m) for m in row] for row in masks]
    annotate(root / "sav_000" / "a_manual.json", rows, fps=fps)
    with pytest.raises(UserError, match="a_manual.json has fps"):
        open_sav(str(root))


def test_a_frame_that_changes_is_looked_at_again(root, masks):
    extract(root / "sav_000" / "a", draw(masks))
    open_sav(str(root))
    path = root / "sav_000" / "a" / "00008.jpg"
    path.write_bytes(path.read_bytes()[:-200])  # the folder's own time stays as it is
    with pytest.raises(UserError, match=r"a/00008\.jpg"):
        open_sav(str(root))
