"""Pictures of one's own and Pascal VOC: kinds, forms of masks, and what can be broken."""

import pickle
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from sam2_jax.data.decode import decode_frame
from sam2_jax.data.pictures import open_pictures
from sam2_jax.data.sources import EncodedSource, Faults, keep_usable
from sam2_jax.types import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
LABELS = np.zeros((24, 40), np.uint8)
LABELS[2:8, 3:12], LABELS[10:20, 20:30] = 1, 4


def save(path, array, palette=False, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette([index * 7 % 256 for index in range(768)])
    image.save(path, **options)


@pytest.fixture
def root(tmp_path):
    """Pictures of many kinds, masks in both forms."""
    root = tmp_path / "root"
    for name in ("deep.jpg", "grey.webp", "many.bmp", "white.tif"):
        save(root / "images" / name, NOISE)
    save(root / "images/index.jpg", NOISE[..., 0])
    deep = np.random.default_rng(1).integers(0, 65536, (24, 40)).astype(np.uint16)
    cv2.imwrite(str(root / "images/micro.png"), deep)
    save(root / "masks/index.png", LABELS, palette=True)
    save(root / "masks/deep.png", LABELS.astype(np.uint16) * 1000)
    save(root / "masks/grey.png", LABELS)
    save(root / "masks/white.png", (LABELS > 0).astype(np.uint8) * 255)
    save(root / "masks/micro.png", LABELS, palette=True)
    save(root / "masks/many/b.png", (LABELS > 0).astype(np.uint8) * 255)
    save(root / "masks/many/a.png", (LABELS == 4), bits=1)
    save(root / "masks/many/c.png", LABELS * 0)
    return root


def names(source):
    return [source.video(i).name for i in range(len(source))]


def test_every_kind_of_picture_and_form_of_mask(root):
    source = pickle.loads(pickle.dumps(open_pictures(str(root))))
    assert isinstance(source, EncodedSource) and source.notes == []
    assert names(source) == ["deep", "grey", "index", "many", "micro", "white"]
    assert [source.objects(i, 0) for i in range(6)] == [
        (1000, 4000),
        (1, 4),
        (1, 4),
        (1, 2),
        (1, 4),
        (1,),
    ]
    assert {source.video(i)[1:] for i in range(6)} == {(1, 24, 40)}
    for index in range(6):
        frames, _ = source.read(index, [0], [])
        np.testing.assert_array_equal(frames[0], decode_frame(source.encoded(index, 0)))
    _, masks = source.read(3, [0], [2, 1, 3, 9])  # by name: a, b, c
    np.testing.assert_array_equal(masks[0, 0], LABELS > 0)
    np.testing.assert_array_equal(masks[0, 1], LABELS == 4)
    assert not masks[0, 2:].any()
    np.testing.assert_array_equal(source.read(0, [0], [4000])[1][0, 0], LABELS == 4)


def test_turned_pictures_belong_to_turned_masks(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "images/index.jpg", NOISE, exif=exif)
    with pytest.raises(UserError, match="masks/index.png is 40 x 24, but .*index.jpg is 24 x 40"):
        open_pictures(str(root))
    save(root / "masks/index.png", np.ascontiguousarray(LABELS.T), palette=True)
    source = open_pictures(str(root))
    assert source.read(2, [0], [1])[0].shape == (1, 40, 24, 3)


def test_pascal_voc_has_void_borders_and_pictures_without_masks(tmp_path):
    labels = LABELS.copy()
    labels[0] = 255
    for name in ("2007_000032", "2007_000039", "2007_000063"):
        save(tmp_path / f"JPEGImages/{name}.jpg", NOISE)
    save(tmp_path / "SegmentationObject/2007_000032.png", labels, palette=True)
    save(tmp_path / "SegmentationObject/2007_000063.png", labels * 0, palette=True)
    source = open_pictures(str(tmp_path))
    assert names(source) == ["2007_000032", "2007_000063"]
    assert source.notes == ["1 pictures without a mask left out"]
    assert source.objects(0, 0) == (1, 4) and not source.read(0, [0], [255])[1].any()
    assert names(keep_usable(source, 1)) == ["2007_000032"]
    (tmp_path / "train.txt").write_text("2007_000063\n")
    assert names(open_pictures(str(tmp_path), include=str(tmp_path / "train.txt"))) == [
        "2007_000063"
    ]
    (tmp_path / "SegmentationObject").rename(tmp_path / "masks")
    (tmp_path / "JPEGImages").rename(tmp_path / "images")
    (tmp_path / "images/2007_000039.jpg").unlink()
    assert open_pictures(str(tmp_path)).objects(0, 0) == (1, 4, 255)


def test_300_objects_in_16_bits(root):
    labels = np.arange(24 * 40).reshape(24, 40).astype(np.uint16) % 301
    save(root / "masks/deep.png", labels)
    source = open_pictures(str(root))
    assert source.objects(0, 0) == tuple(range(1, 301))
    assert source.read(0, [0], range(1, 301))[1].any((2, 3)).all()


def test_lists_and_masks_without_picture(root, tmp_path):
    keep = tmp_path / "keep.txt"
    keep.write_text("micro.png\ngrey\n")
    assert names(open_pictures(str(root), include=str(keep))) == ["grey", "micro"]
    assert "grey" not in names(open_pictures(str(root), exclude=str(keep)))
    keep.write_text("")
    with pytest.raises(UserError, match="keep.txt is empty"):
        open_pictures(str(root), include=str(keep))
    save(root / "masks/extra.png", LABELS)
    assert open_pictures(str(root)).notes == ["1 masks belong to no picture: extra"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def large(path):
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (10000).to_bytes(2, "big") * 2
    path.write_bytes(data)


BROKEN = [
    (lambda r: cut(r / "images/index.jpg"), ["images/index.jpg", "cut short"]),
    (lambda r: (r / "masks/index.png").write_bytes(b""), ["masks/index.png", "0 bytes"]),
    (lambda r: save(r / "masks/many/b.png", LABELS[:9]), ["many/b.png", "40 x 9", "40 x 24"]),
    (lambda r: save(r / "masks/index.png", NOISE), ["masks/index.png", "RGB", "palette"]),
    (
        lambda r: Image.fromarray(NOISE).convert("RGBA").save(r / "images/micro.png"),
        ["images/micro.png", "alpha channel", "save it as RGB"],
    ),
    (
        lambda r: Image.fromarray(NOISE).convert("CMYK").save(r / "images/deep.jpg"),
        ["images/deep.jpg", "CMYK", "save it as RGB"],
    ),
    (lambda r: large(r / "images/deep.jpg"), ["images/deep.jpg", "10000 x 10000", "shrink it"]),
    (lambda r: (r / "masks/deep.png").unlink(), ["picture deep has no mask", "masks/deep.png"]),
    (lambda r: [p.unlink() for p in (r / "masks/many").iterdir()], ["masks/many", "no .png"]),
    (
        lambda r: shutil.copytree(r / "masks/many", r / "masks/deep"),
        ["masks/deep", "masks/deep.png", "remove the other"],
    ),
    (
        lambda r: (r / "masks/deep.png").rename(r / "masks/deep_0.png"),
        ["picture deep has no mask", "deep_0.png there is to be deep/deep_0.png"],
    ),
]


@pytest.mark.parametrize("how, expected", BROKEN)
def test_names_what_is_broken_or_leaves_it_out(root, how, expected):
    how(root)
    with pytest.raises(UserError) as error:
        open_pictures(str(root))
    source = open_pictures(str(root), faults=Faults("skip", 0.2))
    assert len(source) == 5 and "1 of 6 clips" in source.notes[-1]
    for part in expected:
        assert part in str(error.value) and part in source.notes[-1]


def test_two_pictures_of_one_name(root):
    save(root / "images/deep.png", NOISE)
    with pytest.raises(UserError, match="has both deep.jpg and deep.png"):
        open_pictures(str(root))


def test_other_layouts(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="holds photos: expected images/ and masks/"):
        open_pictures(str(tmp_path))
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="images has no pictures"):
        open_pictures(str(tmp_path))
