"""Instances in COCO's format: polygons, run lengths, crowds, and files that are broken."""

import json
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from sam2_jax.data.coco import open_coco
from sam2_jax.data.decode import decode_frame
from sam2_jax.data.rle import encode_rle
from sam2_jax.data.sources import EncodedSource, Faults, keep_usable
from sam2_jax.types import UserError

SIZE = (40, 60)
TRIANGLE = [10.0, 5.0, 40.0, 5.0, 10.0, 35.0]
BOX = [[42.0, 4.0, 58.0, 4.0, 58.0, 20.0, 42.0, 20.0]]
EDGE = 0.06  # of an object's pixels: two libraries draw the outline of a polygon differently


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def instance(image, segmentation, area: float | None = 200.0, iscrowd=0, **fields):
    return {
        "id": 900_100_000_000 + image,
        "image_id": image,
        "category_id": 1,
        "segmentation": segmentation,
        "area": area,
        "bbox": [0.0, 0.0, 1.0, 1.0],
        "iscrowd": iscrowd,
    } | fields


def circle():
    return np.hypot(*(np.indices(SIZE) - np.array([20, 30])[:, None, None])) < 9


class Set:
    """A set on disk, to be changed by tests before it is written."""

    def __init__(self, folder):
        self.folder, self.file = folder / "images", folder / "instances.json"
        self.images, self.annotations = [], []
        (self.folder / "inner").mkdir(parents=True)
        for number, name in ((5, "b.jpg"), (9, "inner/a.png"), (2, "none.jpg")):
            pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(self.folder / name)
            self.images.append(
                {"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
            )
        listed = encode_rle(circle())
        flat = circle().ravel(order="F").astype(int)
        edges = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
        counts = np.diff(edges, prepend=0).tolist()
        self.annotations = [
            instance(5, [TRIANGLE, *BOX]),
            instance(5, {"size": list(SIZE), "counts": counts}, iscrowd=1),
            instance(9, BOX, area=256.0),
            instance(5, {"size": list(SIZE), "counts": counts}),
            instance(5, listed),
        ]

    def open(self, **options):
        data = {"images": self.images, "annotations": self.annotations, "categories": []}
        self.file.write_text(json.dumps(data))
        return open_coco(str(self.file), str(self.folder), **options)


@pytest.fixture
def instances(tmp_path):
    return Set(tmp_path)


def test_polygons_and_run_lengths(instances):
    source = instances.open()
    assert isinstance(source, EncodedSource)
    assert source.notes == ["1 annotations left out: 1 crowds"]
    assert [source.video(i) for i in range(3)] == [
        ("b.jpg", 1, *SIZE),
        ("inner/a.png", 1, *SIZE),
        ("none.jpg", 1, *SIZE),
    ]
    assert [source.objects(i, 0) for i in range(3)] == [(1, 2, 3), (1,), ()]
    frames, masks = source.read(0, [0], [3, 1, 2])
    np.testing.assert_array_equal(masks[0, 0], circle())
    np.testing.assert_array_equal(masks[0, 2], circle())
    drawn = np.zeros(SIZE, np.uint8)
    for polygon in (TRIANGLE, *BOX):
        cv2.fillPoly(drawn, [np.array(polygon, np.int32).reshape(-1, 2)], 1)
    assert (masks[0, 1] != (drawn > 0)).sum() < EDGE * 2 * drawn.sum()
    assert masks[0, 1, 7, 12] and masks[0, 1, 10, 50] and not masks[0, 1, 30, 50]
    data = (instances.folder / "b.jpg").read_bytes()
    assert source.encoded(0, 0) == data
    np.testing.assert_array_equal(frames[0], decode_frame(data))
    assert not source.read(0, [0], [4])[1].any()
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(0, [0], [3, 1, 2])[1], masks)


def test_images_without_objects_are_left_out_afterwards(instances):
    source = keep_usable(instances.open(), 1)
    assert [source.video(i).name for i in range(len(source))] == ["b.jpg", "inner/a.png"]
    assert "1 of 3 clips left out, without a visible object" in source.notes[-1]


def test_large_and_empty_objects_are_left_out(instances):
    thin = [[10.0, 10.0, 20.0, 10.0, 30.0, 10.0]]  # holds no pixel
    instances.annotations += [
        instance(2, [[0, 0, 60, 0, 60, 40, 0, 40]], area=2400),
        instance(2, thin, area=0.1),
        instance(2, [[3.0, 4.0, 9.0, 9.0]], area=30),  # two points; pycocotools takes it for a box
        instance(2, [], area=0),
        instance(2, BOX, area=None),
    ]
    source = instances.open()
    assert source.objects(2, 0) == (1, 2) and source.read(2, [0], [1])[1].all()
    source = instances.open(max_area=1.0)
    assert source.objects(2, 0) == (1,) and source.read(2, [0], [1])[1].mean() < 0.2
    assert source.notes == ["5 annotations left out: 1 crowds, 3 empty, 1 too large"]
    assert instances.open(max_area=256 / 2400).objects(1, 0) == ()
    assert instances.open(max_area=257 / 2400).objects(1, 0) == (1,)


def test_three_hundred_objects(instances):
    masks = np.random.default_rng(0).random((300, *SIZE)) < 0.1
    instances.annotations = [instance(9, encode_rle(m)) for m in masks]
    source = instances.open()
    assert source.objects(1, 0) == tuple(range(1, 301))
    np.testing.assert_array_equal(source.read(1, [0], [300, 256])[1][0], masks[[299, 255]])


def test_lists_name_files(instances, tmp_path):
    include = tmp_path / "include.txt"
    include.write_text("inner/a.png\nb\n")
    source = instances.open(exclude=str(include))
    assert [source.video(i).name for i in range(len(source))] in (
        ["none.jpg"],
        ["b.jpg", "none.jpg"],
    )
    include.write_text("inner/a.png\n")
    assert instances.open(include=str(include)).video(0).name == "inner/a.png"
    include.write_text("")
    with pytest.raises(UserError, match="include.txt is empty"):
        instances.open(include=str(include))


def change(**fields):
    def apply(instances):
        instances.annotations[2].update(fields)

    return apply


def cut(instances):
    path = instances.folder / "b.jpg"
    path.write_bytes(path.read_bytes()[:-100])


def resize(instances):
    Image.new("RGB", (30, 40)).save(instances.folder / "b.jpg")


FAR = [[0, 0, 10, 0, 1e8, 1e8]]
BROKEN = {  # b.jpg is image 0, inner/a.png is image 1
    "b.jpg cannot be read": (0, lambda s: (s.folder / "b.jpg").unlink()),
    "b.jpg is cut short": (0, cut),
    "b.jpg is 30 x 40, but .*instances.json is for 60 x 40": (0, resize),
    "annotation 900100000009 has a polygon that is no list": (1, change(segmentation=[["a"] * 6])),
    "annotation 900100000009 has a polygon that is no": (1, change(segmentation=[[1, 2, 3, 4, 5]])),
    "annotation 900100000009 has a polygon that": (1, change(segmentation=[[[1, 2], [3, 4]]])),
    "has a polygon that is no list": (1, change(segmentation=[[float("nan")] * 6])),
    "has a polygon with a corner at 1e.08": (1, change(segmentation=FAR)),
    "has a segmentation of type str": (1, change(segmentation="square")),
    "has a segmentation of type NoneType": (1, change(segmentation=None)),
    "has run lengths of 30 pixels": (1, change(segmentation={"size": SIZE, "counts": [10, 20]})),
    r"has run lengths for size \[60, 40\]": (
        1,
        change(segmentation=encode_rle(np.ones(SIZE[::-1], bool))),
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_images_stop_or_are_left_out(instances, message):
    index, damage = BROKEN[message]
    damage(instances)
    with pytest.raises(UserError, match=message):
        instances.open()
    source = instances.open(faults=Faults("skip", 0.5))
    names = ["b.jpg", "inner/a.png", "none.jpg"]
    del names[index]
    assert [source.video(i).name for i in range(len(source))] == names
    assert "1 of 3 clips" in source.notes[0]


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "inner/../../x.jpg"])
def test_names_that_lead_out_of_the_folder(instances, name):
    instances.images[1]["file_name"] = name
    with pytest.raises(UserError, match=f"instances.json has the file name {name}"):
        instances.open(faults=Faults("skip", 1.0))


def test_files_that_are_no_instances(instances, tmp_path):
    with pytest.raises(UserError, match=r"config.data.instances.annotations is empty"):
        open_coco("", str(instances.folder))
    with pytest.raises(UserError, match="key=.* is no folder"):
        open_coco("x.json", str(tmp_path / "none"), key="key")
    with pytest.raises(UserError, match="none.json cannot be read"):
        open_coco(str(tmp_path / "none.json"), str(instances.folder))
    instances.open()
    whole = instances.file.read_bytes()
    instances.file.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="instances.json is no JSON or cut off"):
        open_coco(str(instances.file), str(instances.folder))
    for text in ("[]", "{}", '{"images": [{"id": 1}], "annotations": []}', '{"images": 3}'):
        instances.file.write_text(text)
        with pytest.raises(UserError, match="instances.json lacks what COCO's instances have"):
            open_coco(str(instances.file), str(instances.folder))
    instances.annotations.append(instance(77, BOX))
    with pytest.raises(UserError, match="annotates image 77, which is not in its list"):
        instances.open()
    instances.images, instances.annotations = [], []
    with pytest.raises(UserError, match="names no image"):
        instances.open()


def test_numbers_and_names_that_no_image_has(instances):
    instances.images[0]["file_name"] = "a\0.jpg"
    with pytest.raises(UserError, match="which no file can have"):
        instances.open()
    faults = Faults("skip", 0.5)
    assert len(instances.open(faults=faults)) == 2 and len(faults.errors) == 1
    instances.images[0]["height"] = float("inf")
    with pytest.raises(UserError, match="lacks what COCO"):
        instances.open()


def test_lists_name_files_without_their_ending(instances, tmp_path):
    path = tmp_path / "take.txt"
    path.write_text("inner/a\nb\n")
    source = instances.open(include=str(path))
    assert [source.video(i).name for i in range(len(source))] == ["b.jpg", "inner/a.png"]
