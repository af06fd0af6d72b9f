"""SA-1B: files rebuilt in its format, the reference's filters, and files that are broken."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from sam2_jax.data.decode import decode_frame
from sam2_jax.data.rle import encode_rle
from sam2_jax.data.sa1b import open_sa1b
from sam2_jax.data.sources import EncodedSource, Faults, keep_usable
from sam2_jax.types import UserError

SIZE = (40, 60)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def annotation(number, mask, stability=0.97, **fields):
    """One mask with all the fields that the released files have."""
    rows, columns = np.nonzero(mask) if mask.any() else ([0], [0])
    box = [int(min(columns)), int(min(rows)), int(np.ptp(columns)), int(np.ptp(rows))]
    return {
        "id": 5_000_000_000 + number,
        "segmentation": encode_rle(mask),
        "bbox": box,
        "area": int(mask.sum()),
        "predicted_iou": 0.95,
        "stability_score": stability,
        "crop_box": [0.0, 0.0, float(mask.shape[1]), float(mask.shape[0])],
        "point_coords": [[float(columns[0]), float(rows[0])]],
    } | fields


def write(folder, number, annotations, size=SIZE):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"sa_{number}.jpg")
    name = f"sa_{number}.jpg"
    image = {"image_id": number, "width": size[1], "height": size[0], "file_name": name}
    whole = {"image": image, "annotations": annotations}
    (folder / f"sa_{number}.json").write_text(json.dumps(whole))


def rectangles(count=4, size=SIZE):
    """Masks of growing area; they overlap."""
    masks = np.zeros((count, *size), bool)
    for k, mask in enumerate(masks):
        mask[: 6 + 4 * k, 10 : 20 + 12 * k] = True
    return masks


@pytest.fixture
def root(tmp_path):
    """Two images in two folders, four masks each."""
    for number in (12, 7):
        annotations = [annotation(k, m, 0.9 + 0.02 * k) for k, m in enumerate(rectangles())]
        write(tmp_path / "sa" / f"sa_{number:06d}", number, annotations)
    return tmp_path / "sa"


def test_images_and_their_masks(root):
    source = open_sa1b(str(root))
    assert isinstance(source, EncodedSource) and source.notes == []
    assert [source.video(i) for i in range(2)] == [("sa_7", 1, *SIZE), ("sa_12", 1, *SIZE)]
    assert source.objects(1, 0) == (1, 2, 3, 4)
    frames, masks = source.read(1, [0], [4, 2])
    np.testing.assert_array_equal(masks[0], rectangles()[[3, 1]])
    path = root / "sa_000012" / "sa_12.jpg"
    np.testing.assert_array_equal(frames[0], decode_frame(path.read_bytes()))
    assert source.encoded(1, 0) == path.read_bytes()
    twice = source.read(1, [0, 0], [1])
    assert twice[0].shape == (2, *SIZE, 3) and twice[1][1, 0].any()
    assert not source.read(0, [0], [5])[1].any() and source.read(0, [0], [])[1].shape[1] == 0
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(1, [0], [4, 2])[1], masks)
    assert keep_usable(source, 1) is source


def test_finding_objects_decodes_no_mask(root, monkeypatch):
    monkeypatch.setattr("sam2_jax.data.sa1b.decode_rle", lambda *a: pytest.fail("decoded"))
    assert open_sa1b(str(root)).objects(0, 0) == (1, 2, 3, 4)


def test_filters_are_those_of_the_reference(root):
    masks = rectangles()
    share = float(masks[2].mean())
    source = open_sa1b(str(root), max_area=share)
    assert source.objects(0, 0) == (1, 2)  # as large is too large
    assert source.notes == ["4 of 8 masks left out: empty, too large or not stable"]
    assert open_sa1b(str(root), max_area=share + 1e-6).objects(0, 0) == (1, 2, 3)
    # The score that the reference looks for is not in the released files; ours reads theirs.
    source = open_sa1b(str(root), min_stability=0.94)
    assert source.objects(0, 0) == (1, 2)
    np.testing.assert_array_equal(source.read(0, [0], [1])[1][0, 0], masks[2])
    # Where there is the field that the reference reads, it goes before ours. Empty masks go.
    scored = annotation(0, np.ones(SIZE, bool), 0.5, uncertain_iou=0.8)
    write(root / "a", 3, [annotation(1, np.zeros(SIZE, bool)), scored])
    for score, seen in ((0.8, (1,)), (0.81, ())):
        source = open_sa1b(str(root), min_stability=score)
        assert source.video(0).name == "sa_3" and source.objects(0, 0) == seen
    assert open_sa1b(str(root)).read(0, [0], [1])[1].all()
    assert open_sa1b(str(root), max_area=1.0).objects(0, 0) == ()


def test_folders_apart_and_three_hundred_objects(root, tmp_path):
    rng = np.random.default_rng(0)
    masks = rng.random((300, *SIZE)) < 0.1
    write(tmp_path / "apart" / "images", 1, [annotation(k, m) for k, m in enumerate(masks)])
    (tmp_path / "apart" / "masks").mkdir()
    json_file = tmp_path / "apart" / "images" / "sa_1.json"
    json_file.rename(tmp_path / "apart" / "masks" / "sa_1.json")
    source = open_sa1b(str(tmp_path / "apart"))
    assert source.objects(0, 0) == tuple(range(1, 301))
    np.testing.assert_array_equal(source.read(0, [0], [300, 256])[1][0], masks[[299, 255]])


def test_a_photograph(real_clips, tmp_path):
    photo = Image.open(real_clips / "images" / "truck.jpg")
    mask = np.zeros(photo.size[::-1], bool)
    mask[300:700, 200:900] = True
    write(tmp_path / "sa", 5, [annotation(0, mask)], mask.shape)
    (tmp_path / "sa" / "sa_5.jpg").write_bytes((real_clips / "images" / "truck.jpg").read_bytes())
    frames, masks = open_sa1b(str(tmp_path / "sa")).read(0, [0], [1])
    np.testing.assert_array_equal(frames[0], np.array(photo))
    np.testing.assert_array_equal(masks[0, 0], mask)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def small(folder):
    Image.new("RGB", (30, 40)).save(folder / "sa_7.jpg")


def lacking(folder, field):
    data = json.loads((folder / "sa_7.json").read_text())
    del data["annotations"][2][field]
    (folder / "sa_7.json").write_text(json.dumps(data))


BROKEN = {
    "sa_7.json is no JSON or cut off": lambda folder: cut(folder / "sa_7.json"),
    "sa_7.jpg is cut short": lambda folder: cut(folder / "sa_7.jpg"),
    "sa_7.json has no image sa_7.jpg": lambda folder: (folder / "sa_7.jpg").unlink(),
    "sa_7.jpg has no sa_7.json": lambda folder: (folder / "sa_7.json").unlink(),
    "sa_7.jpg is 30 x 40, but .*sa_7.json is for 60 x 40": small,
    "sa_7.json lacks .* KeyError 'area'": lambda folder: lacking(folder, "area"),
    "sa_7.json lacks .* KeyError 'segmentation'": lambda folder: lacking(folder, "segmentation"),
    "sa_7.json lacks .* TypeError": lambda folder: (folder / "sa_7.json").write_text("[1]"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_images_stop_or_are_left_out(root, message, tmp_path):
    BROKEN[message](root / "sa_000007")
    with pytest.raises(UserError, match=message):
        open_sa1b(str(root))
    source = open_sa1b(str(root), faults=Faults("skip", 0.5))
    assert [source.video(i).name for i in range(len(source))] == ["sa_12"]
    assert "1 of 2 clips" in source.notes[0]
    include = tmp_path / "include.txt"
    include.write_text("sa_12.jpg\n")
    assert len(open_sa1b(str(root), include=str(include))) == 1


@pytest.mark.parametrize(
    ("k", "change", "found"),
    [(2, {"counts": "0"}, "run lengths of"), (3, {"size": [60, 40]}, r"size \[60, 40\]")],
)
def test_broken_masks_are_named(root, k, change, found):
    source = open_sa1b(str(root))
    path = root / "sa_000007" / "sa_7.json"
    data = json.loads(path.read_text())
    data["annotations"][k - 1]["segmentation"] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"sa_7.json: object {k} has .*{found}"):
        source.read(0, [0], [k])
    with pytest.raises(UserError, match=f"sa_7.json: object {k} has .*{found}"):
        open_sa1b(str(root))


def test_a_file_that_was_mended_is_read_anew(root):
    path = root / "sa_000007" / "sa_7.json"
    whole = path.read_text()
    data = json.loads(whole)
    data["annotations"].pop()
    path.write_text(json.dumps(data))
    assert open_sa1b(str(root)).objects(0, 0) == (1, 2, 3)
    path.write_text(whole)
    source = open_sa1b(str(root))
    assert source.objects(0, 0) == (1, 2, 3, 4) and source.read(0, [0], [4])[1].any()


def test_roots(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="key=.*empty has neither .jpg nor .json"):
        open_sa1b(str(tmp_path / "empty"), key="key")
    with pytest.raises(UserError, match="key=.*none is no folder"):
        open_sa1b(str(tmp_path / "none"), key="key")


def test_numbers_that_json_should_not_have(root):
    path = next(root.rglob("*.json"))
    path.write_text(path.read_text().replace('"height": 40', '"height": Infinity'))
    with pytest.raises(UserError, match=path.name):
        open_sa1b(str(root))
