"""Folders of clips: all layouts and choices, and every way in which they can be broken."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from sam2_jax.data.decode import decode_frame
from sam2_jax.data.folders import eval_folder, open_folder, train_folder
from sam2_jax.data.sources import EncodedSource, Faults, keep_usable
from sam2_jax.types import UserError


def names(source):
    return [source.video(i).name for i in range(len(source))]


def notes_of(source):
    return " ".join(source.notes)


def test_davis_layout_uses_the_list_of_the_split(davis):
    assert names(train_folder(str(davis), holdout=True)) == ["ant", "cow"]
    assert names(eval_folder(str(davis), "")) == ["bee"]


def test_flat_layout_holds_out_the_last_clips(flat):
    train, held = train_folder(str(flat), holdout=True), eval_folder(str(flat), "")
    assert (names(train), names(held)) == (["ant", "bee"], ["cow"])
    assert "held out" in notes_of(train) and "held out" in notes_of(held)
    assert names(train_folder(str(flat), holdout=False)) == ["ant", "bee", "cow"]
    assert names(eval_folder("elsewhere", str(flat))) == ["ant", "bee", "cow"]


def test_resolutions(davis):
    for folder in ("JPEGImages", "Annotations"):
        shutil.copytree(davis / folder / "480p", davis / folder / "Full-Resolution")
        shutil.rmtree(davis / folder / "480p/bee")
    assert names(open_folder(str(davis), "val", resolution="Full-Resolution")) == ["bee"]
    with pytest.raises(UserError, match="clip bee has no frames"):
        open_folder(str(davis), "val")
    with pytest.raises(UserError, match="no JPEGImages/1080p, found 480p, Full-Resolution"):
        open_folder(str(davis), "val", resolution="1080p")
    for folder in ("JPEGImages", "Annotations"):
        shutil.rmtree(davis / folder / "480p")
    assert names(open_folder(str(davis), "val")) == ["bee"]


@pytest.mark.parametrize("listing", ["480p", "2016"])
def test_davis_2016_lists_paths_and_has_black_and_white_masks(davis, listing):
    (davis / "ImageSets/2017").rename(davis / "ImageSets" / listing)
    lines = [
        f"/JPEGImages/480p/{clip}/{t:05d}.jpg /Annotations/480p/{clip}/{t:05d}.png \n"
        for clip in ("cow", "ant")
        for t in range(6)
    ]
    (davis / f"ImageSets/{listing}/train.txt").write_text("".join(lines))
    for path in (davis / "Annotations/480p").glob("*/*.png"):
        grey(path)
    source = train_folder(str(davis), holdout=True)
    assert names(source) == ["ant", "cow"] and source.objects(0, 3) == (1,)
    _, masks = source.read(0, [0, 3], [1])
    assert masks[1, 0, 4:12, 5:15].all() and masks.sum((1, 2, 3)).tolist() == [80, 80 + 60]


def test_reads_frames_and_objects_in_the_order_asked_for(flat):
    source = open_folder(str(flat), "train")
    assert isinstance(source, EncodedSource)
    frames, masks = source.read(1, [4, 0], [2, 9, 1])
    assert source.video(1) == ("bee", 6, 24, 40)
    assert frames.shape == (2, 24, 40, 3) and masks.shape == (2, 3, 24, 40) and masks.dtype == bool
    assert masks[0, 2, 4:12, 6:16].all() and masks[0, 2].sum() == 80 and masks[1, 2, 5, 2]
    assert masks[0, 0].sum() == 60 and not masks[1, 0].any() and not masks[:, 1].any()
    assert [source.objects(1, t) for t in (4, 0)] == [(1, 2), (1,)]
    with Image.open(flat / "JPEGImages/bee/00004.jpg") as image:
        np.testing.assert_array_equal(frames[0], np.array(image.convert("RGB")))
    np.testing.assert_array_equal(decode_frame(source.encoded(1, 4)), frames[0])
    assert source.stem(1, 4) == "00004"


def test_masks_are_decoded_only_for_objects_asked_for(flat):
    source = pickle.loads(pickle.dumps(open_folder(str(flat), "train")))
    shutil.rmtree(flat / "Annotations")
    frames, masks = source.read(0, [1, 2], [])
    assert frames.shape == (2, 24, 40, 3) and masks.shape == (2, 0, 24, 40)
    assert source.read(0, [], [1])[1].shape == (0, 1, 24, 40)
    with pytest.raises(UserError, match="Annotations/ant/00001.png cannot be decoded"):
        source.read(0, [1], [1])


def test_frames_are_ordered_by_number_and_may_be_png(flat):
    for t in range(6):
        with Image.open(flat / f"JPEGImages/ant/{t:05d}.jpg") as image:
            image.save(flat / f"JPEGImages/ant/{t + 7}.png")
        (flat / f"JPEGImages/ant/{t:05d}.jpg").unlink()
        (flat / f"Annotations/ant/{t:05d}.png").rename(flat / f"Annotations/ant/{t + 7:08d}.png")
    _, masks = open_folder(str(flat), "train").read(0, range(6), [1])
    assert [int(np.flatnonzero(m[0, 5])[0]) for m in masks] == [2, 3, 4, 5, 6, 7]


def test_include_and_exclude(flat, davis, tmp_path):
    keep, drop = tmp_path / "keep.txt", tmp_path / "drop.txt"
    keep.write_text("cow\nant.mp4\n\n")
    drop.write_text("ant\nother\n")
    root = str(flat)
    assert names(open_folder(root, "train", include=str(keep))) == ["ant", "cow"]
    assert names(open_folder(root, "train", exclude=str(drop))) == ["bee", "cow"]
    assert names(open_folder(root, "train", include=str(keep), exclude=str(drop))) == ["cow"]
    assert names(train_folder(root, True, include=str(keep))) == ["ant"]
    assert names(eval_folder(root, "", include=str(keep))) == ["cow"]
    assert names(train_folder(str(davis), True, exclude=str(drop))) == ["cow"]
    assert names(eval_folder(str(davis), "", include=str(keep))) == ["bee"]
    keep.write_text("cow\nelk\n")
    with pytest.raises(UserError, match="keep.txt names .*elk"):
        open_folder(root, "train", include=str(keep))
    keep.write_text("../../etc\n")
    with pytest.raises(UserError, match="keep.txt names .*etc"):
        open_folder(root, "train", include=str(keep))
    keep.write_text("\n")
    for include, exclude in ((str(keep), ""), ("", str(keep))):
        with pytest.raises(UserError, match="keep.txt is empty"):
            open_folder(root, "train", include=include, exclude=exclude)


def test_sample_rate_and_annotated_every(flat):
    root = str(flat)
    source = open_folder(root, "train", sample_rate=2)
    assert source.video(0).num_frames == 3 and source.stem(0, 2) == "00004"
    for path in (flat / "Annotations").glob("*/*.png"):
        if int(path.stem) % 3 != 1:  # frames 1 and 4 keep their masks
            path.unlink()
    source = open_folder(root, "train", annotated_every=3)
    assert [source.stem(0, t) for t in range(source.video(0).num_frames)] == ["00001", "00004"]
    assert source.read(0, [1], [1])[1][0, 0, 5, 6:16].all()
    source = open_folder(root, "train", annotated_every=3, sample_rate=4)
    assert source.video(0).num_frames == 1 and source.stem(0, 0) == "00004"
    with pytest.raises(UserError, match="no frame that is both one in 6 and annotated"):
        open_folder(root, "train", annotated_every=3, sample_rate=6)
    with pytest.raises(UserError, match="6 frames .* 2 masks .*00000 .*folder.annotated_every"):
        open_folder(root, "train")
    (flat / "Annotations/bee/00004.png").unlink()
    with pytest.raises(UserError, match="clip bee .*00004 .* every frame in 3"):
        open_folder(root, "train", annotated_every=3)
    with pytest.raises(UserError, match="sample_rate .* is 0, expected 1"):
        open_folder(root, "train", sample_rate=0)


def test_single_object_makes_a_clip_of_every_object(flat):
    source = open_folder(str(flat), "train", single_object=True)
    assert names(source) == ["ant/1", "ant/2", "bee/1", "bee/2", "cow/1", "cow/2"]
    assert [source.objects(3, t) for t in (0, 2)] == [(), (2,)] and source.objects(2, 2) == (1,)
    assert source.read(3, [2], [2])[1].sum() == 60 and source.stem(3, 2) == "00002"


def test_300_objects_in_16_bits(flat):
    labels = np.arange(24 * 40).reshape(24, 40).astype(np.uint16) % 301 * 7
    for path in (flat / "Annotations").glob("*/*.png"):
        Image.fromarray(labels).save(path)
    source = open_folder(str(flat), "train")
    ids = source.objects(0, 5)
    assert ids == tuple(range(7, 2101, 7))
    masks = source.read(0, [5], ids)[1]
    assert masks.shape == (1, 300, 24, 40) and masks.any((2, 3)).all()
    np.testing.assert_array_equal(masks[0, -1], labels == 2100)


def test_short_and_empty_clips_are_left_to_keep_usable(flat, write_clip):
    write_clip(flat / "JPEGImages/dim", flat / "Annotations/dim", objects=False)
    write_clip(flat / "JPEGImages/eel", flat / "Annotations/eel", count=2)
    source = open_folder(str(flat), "train")
    assert names(source) == ["ant", "bee", "cow", "dim", "eel"] and source.notes == []
    assert names(keep_usable(source, 4)) == ["ant", "bee", "cow"]


def cut(path, share=0.7):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def grey(path):
    with Image.open(path) as image:
        array = np.array(image)
    Image.fromarray((array > 0).astype(np.uint8) * 255).save(path)


def saved_as(path, mode, kind=None):
    with Image.open(path) as image:
        changed = image.convert(mode)
    changed.save(path, kind)


def resized(path):
    with Image.open(path) as image:
        image.resize((20, 12)).save(path)


FRAME, MASK = "JPEGImages/bee/00003.jpg", "Annotations/bee/00003.png"
BROKEN_CLIP = [
    (lambda r: cut(r / FRAME), [FRAME, "cut short"]),
    (lambda r: cut(r / FRAME, 0.995), [FRAME, "cut short"]),
    (lambda r: cut(r / MASK), [MASK, "cut short"]),
    (lambda r: cut(r / MASK, 0.1), [MASK, "cut short"]),
    (lambda r: (r / MASK).write_bytes(b""), [MASK, "0 bytes"]),
    (lambda r: (r / FRAME).write_text("no image at all"), [FRAME, "neither JPEG nor PNG"]),
    (lambda r: saved_as(r / FRAME, "CMYK"), [FRAME, "CMYK", "save it as RGB"]),
    (lambda r: saved_as(r / FRAME, "RGBA", "PNG"), [FRAME, "alpha", "save it as RGB"]),
    (lambda r: saved_as(r / MASK, "RGB"), [MASK, "RGB", "palette"]),
    (lambda r: resized(r / MASK), [MASK, "20 x 12", "40 x 24", "00000.jpg"]),
    (lambda r: resized(r / FRAME), [FRAME, "20 x 12"]),
    (lambda r: (r / MASK).unlink(), ["bee", "6 frames", "5 masks", "00003"]),
    (
        lambda r: shutil.copy(r / MASK, r / MASK.replace("3.", "9.")),
        ["6 frames", "7 masks", "00009"],
    ),
    (lambda r: (r / FRAME).unlink(), ["bee", "lacks frame 00003", "JPEGImages/bee"]),
    (lambda r: shutil.copy(r / FRAME, r / FRAME.replace("jpg", "png")), ["both 00003.jpg and"]),
    (lambda r: shutil.rmtree(r / "Annotations/bee"), ["bee", "no masks", "Annotations/bee"]),
    (lambda r: [p.unlink() for p in (r / "JPEGImages/bee").iterdir()], ["bee", "no frames"]),
]
BROKEN_ROOT = [
    (lambda r: shutil.rmtree(r / "Annotations"), ["config.data.root", "JPEGImages", "expected"]),
    (lambda r: shutil.rmtree(r), ["config.data.root", "no folder"]),
    (lambda r: [shutil.rmtree(p) for p in (r / "JPEGImages").iterdir()], ["no folder of frames"]),
]


@pytest.mark.parametrize("how, expected", BROKEN_CLIP + BROKEN_ROOT)
def test_names_what_is_broken(flat, how, expected):
    how(flat)
    with pytest.raises(UserError) as error:
        open_folder(str(flat), "train")
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize("how, expected", BROKEN_CLIP)
def test_broken_clips_are_left_out_and_counted_if_wanted(flat, how, expected):
    how(flat)
    source = open_folder(str(flat), "train", faults=Faults("skip", 0.4))
    assert names(source) == ["ant", "cow"]
    assert "1 of 3 clips" in notes_of(source) and all(p in notes_of(source) for p in expected)
    with pytest.raises(UserError, match="max_bad=0.3"):
        open_folder(str(flat), "train", faults=Faults("skip", 0.3))


def test_root_not_given_and_root_one_level_up(davis):
    with pytest.raises(UserError, match="--config.data.root=DIR"):
        train_folder("", holdout=True)
    with pytest.raises(UserError, match="--data_root=DIR"):
        open_folder("", "val", key="--data_root")
    with pytest.raises(UserError, match="davis has them, give that"):
        train_folder(str(davis.parent), holdout=True)
    with pytest.raises(UserError, match="config.data.eval_root=nowhere"):
        eval_folder(str(davis), "nowhere")


def test_davis_list_missing_or_naming_what_is_not_there(davis):
    listing = davis / "ImageSets/2017/train.txt"
    listing.write_text("ant\nelk\n")
    with pytest.raises(UserError, match="clip elk has no frames"):
        train_folder(str(davis), holdout=True)
    for text, words in (("/a/../b.jpg\n", "has the line"), ("\n", "names no clip")):
        listing.write_text(text)
        with pytest.raises(UserError, match=f"train.txt {words}"):
            train_folder(str(davis), holdout=True)
    listing.unlink()
    with pytest.raises(UserError, match="train.txt is missing"):
        train_folder(str(davis), holdout=True)


def test_nothing_to_hold_out(tmp_path, write_clip):
    write_clip(tmp_path / "one/JPEGImages/ant", tmp_path / "one/Annotations/ant")
    with pytest.raises(UserError, match="config.data.eval_root"):
        train_folder(str(tmp_path / "one"), holdout=True)


def test_file_changed_after_the_check_is_named_when_read(flat):
    source = open_folder(str(flat), "train")
    resized(flat / MASK)
    with pytest.raises(UserError, match=f"{MASK} is 20 x 12, but was 40 x 24"):
        source.objects(1, 3)
    cut(flat / FRAME)
    with pytest.raises(UserError, match=FRAME):
        source.read(1, [3], [])


def test_real_clips(real_clips):
    source = train_folder(str(real_clips / "davis"), holdout=True)
    assert names(source) == ["hike", "motorbike", "rollerblade", "surf"]
    frames, masks = source.read(1, [0, 30], [1])
    assert frames.shape == (2, 480, 854, 3) and masks.any((2, 3)).all()
    cells = open_folder(str(real_clips / "science"), "train")
    assert len(cells) == 3 and max(len(cells.objects(2, t)) for t in range(10)) == 13
