"""One folder of masks per object: ids, absent objects, annotated frames, and what can be broken."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from sam2_jax.data.decode import decode_frame
from sam2_jax.data.object_folders import open_object_folders
from sam2_jax.data.sources import EncodedSource, Faults, keep_usable
from sam2_jax.types import UserError


def square(t, label):
    mask = np.zeros((24, 40), bool)
    mask[4 : 8 + label, 2 + t : 12 + t] = True
    return mask


def write(root, clips, step=1, count=8, objects=(0, 1, 11), folders=("JPEGImages", "Annotations")):
    """Overlapping objects; object 1 is absent on the last annotated frame."""
    rng = np.random.default_rng(0)
    for clip in clips:
        frames = root / folders[0] / clip
        frames.mkdir(parents=True)
        for t in range(count):
            pixels = rng.integers(0, 256, (24, 40, 3), np.uint8)
            Image.fromarray(pixels).save(frames / f"{t:05d}.jpg", quality=95)
        for label in objects:
            folder = root / folders[1] / clip / f"{label:03d}"
            folder.mkdir(parents=True)
            for t in range(0, count, step):
                if label != 1 or t + step < count:
                    mask = square(t, label).astype(np.uint8) * 255
                    Image.fromarray(mask).save(folder / f"{t:05d}.png")
    return str(root)


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "root", ("ant", "bee"))


def names(source):
    return [source.video(i).name for i in range(len(source))]


def test_ids_are_numbers_plus_one_and_masks_may_overlap(root):
    source = pickle.loads(pickle.dumps(open_object_folders(root)))
    assert isinstance(source, EncodedSource) and names(source) == ["ant", "bee"]
    assert source.video(0) == ("ant", 8, 24, 40)
    assert [source.objects(0, t) for t in (0, 7)] == [(1, 2, 12), (1, 12)]
    frames, masks = source.read(1, [7, 3], [12, 2, 5])
    for place, t in enumerate((7, 3)):
        np.testing.assert_array_equal(masks[place, 0], square(t, 11))
        np.testing.assert_array_equal(frames[place], decode_frame(source.encoded(1, t)))
    assert not masks[0, 1].any() and not masks[:, 2].any()  # absent, unknown
    np.testing.assert_array_equal(masks[1, 1], square(3, 1))
    assert (masks[1, 0] & masks[1, 1]).any()


def test_a_mask_of_zeros_is_an_absent_object(root, tmp_path):
    path = tmp_path / "root/Annotations/ant/000/00002.png"
    Image.fromarray(np.zeros((24, 40), np.uint8)).save(path)
    assert open_object_folders(root).objects(0, 2) == (2, 12)


def test_names_and_rates_of_sav(tmp_path):
    folders = ("JPEGImages_24fps", "Annotations_6fps")
    root = write(tmp_path / "sav", ("sav_1",), step=4, count=17, folders=folders)
    source = open_object_folders(root, annotated_every=4)
    assert source.video(0).num_frames == 5 and source.objects(0, 4) == (1, 12)
    np.testing.assert_array_equal(source.read(0, [2], [1])[1][0, 0], square(8, 0))
    assert open_object_folders(root, annotated_every=4, sample_rate=8).video(0).num_frames == 3
    with pytest.raises(UserError, match="on one frame in 4 only, .* set that to 4"):
        open_object_folders(root)
    with pytest.raises(UserError, match="not one in 3 .* set folder.annotated_every to 4"):
        open_object_folders(root, annotated_every=3)


def test_single_object_makes_a_clip_of_every_object(root):
    source = open_object_folders(root, single_object=True)
    assert names(source) == [
        f"{clip}/{o}" for clip in ("ant", "bee") for o in ("000", "001", "011")
    ]
    assert [source.objects(1, t) for t in (0, 7)] == [(2,), ()] and source.objects(5, 7) == (12,)
    _, masks = source.read(1, [3], [1, 2])
    assert not masks[0, 0].any() and (masks[0, 1] == square(3, 1)).all()


def test_300_objects(tmp_path):
    root = write(tmp_path / "root", ("ant",), count=2, objects=range(300))
    source = open_object_folders(root)
    assert source.objects(0, 0) == tuple(range(1, 301))
    assert source.read(0, [0], source.objects(0, 0))[1].shape == (1, 300, 24, 40)


def test_lists(root, tmp_path):
    (tmp_path / "list.txt").write_text("bee\n")
    assert names(open_object_folders(root, include=str(tmp_path / "list.txt"))) == ["bee"]
    assert names(open_object_folders(root, exclude=str(tmp_path / "list.txt"))) == ["ant"]
    (tmp_path / "list.txt").write_text("")
    with pytest.raises(UserError, match="list.txt is empty"):
        open_object_folders(root, include=str(tmp_path / "list.txt"))


def test_clips_without_objects_are_left_to_keep_usable(root, tmp_path):
    for path in (tmp_path / "root/Annotations/ant").glob("*/*.png"):
        Image.fromarray(np.zeros((24, 40), np.uint8)).save(path)
    source = open_object_folders(root)
    assert names(source) == ["ant", "bee"] and names(keep_usable(source, 2)) == ["bee"]


FRAME, MASK = "JPEGImages/ant/00003.jpg", "Annotations/ant/011/00003.png"


def save(array, path, kind=None):
    Image.fromarray(array).save(path, kind)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


BLANK = np.zeros((24, 40, 4), np.uint8)
BROKEN = [
    (lambda r: cut(r / FRAME), [FRAME, "cut short"]),
    (lambda r: (r / MASK).write_bytes(b""), [MASK, "0 bytes"]),
    (lambda r: save(BLANK[:9, :, 0], r / MASK), [MASK, "40 x 9", "40 x 24"]),
    (lambda r: save(BLANK[..., :3], r / MASK), [MASK, "RGB"]),
    (lambda r: save(BLANK, r / FRAME, "PNG"), [FRAME, "alpha"]),
    (lambda r: (r / FRAME).unlink(), ["ant", "lacks frame 00003"]),
    (lambda r: (r / MASK).rename(r / "Annotations/ant/011/00033.png"), ["00033.png", "no frame"]),
    (lambda r: (r / MASK).parent.rename(r / "Annotations/ant/dog"), ["ant/dog", "number"]),
    (lambda r: shutil.copytree((r / MASK).parent, r / "Annotations/ant/11"), ["of one number"]),
    (lambda r: shutil.rmtree(r / "Annotations/ant"), ["ant has no masks", "OBJECT/FRAME.png"]),
    (lambda r: [p.unlink() for p in (r / "JPEGImages/ant").iterdir()], ["ant has no frames"]),
]


@pytest.mark.parametrize("how, expected", BROKEN)
def test_names_what_is_broken_or_leaves_it_out(root, tmp_path, how, expected):
    how(tmp_path / "root")
    with pytest.raises(UserError) as error:
        open_object_folders(root)
    source = open_object_folders(root, faults=Faults("skip", 0.5))
    assert names(source) == ["bee"] and "1 of 2 clips" in source.notes[0]
    for part in expected:
        assert part in str(error.value) and part in source.notes[0]


def test_other_layouts(flat, tmp_path):
    with pytest.raises(UserError, match="ant has no masks in .* but not in folders per object"):
        open_object_folders(str(flat))
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="holds no folders: expected JPEGImages/CLIP"):
        open_object_folders(str(tmp_path / "other"))
    with pytest.raises(UserError, match="key=nowhere is no folder"):
        open_object_folders("nowhere", key="key")
