"""Folders of clips: both layouts, and every way in which they can be broken."""

import shutil

import numpy as np
import pytest
from PIL import Image

from sam2_jax.data.checks import read_header
from sam2_jax.data.decode import decode_frame
from sam2_jax.data.folders import eval_folder, open_folder, train_folder
from sam2_jax.data.sources import describe
from sam2_jax.types import UserError


def names(source):
    return [source.video(i).name for i in range(len(source))]


def test_davis_layout_uses_the_list_of_the_split(davis):
    assert names(train_folder(str(davis), 4, holdout=True)) == ["ant", "cow"]
    assert names(eval_folder(str(davis), "")) == ["bee"]


def test_flat_layout_holds_out_the_last_clips(flat):
    train, held = train_folder(str(flat), 4, holdout=True), eval_folder(str(flat), "")
    assert (names(train), names(held)) == (["ant", "bee"], ["cow"])
    assert any("held out" in note for note in train.notes)
    assert names(train_folder(str(flat), 4, holdout=False)) == ["ant", "bee", "cow"]
    assert names(eval_folder("elsewhere", str(flat))) == ["ant", "bee", "cow"]


def test_full_resolution_is_used_where_480p_is_not(davis):
    for folder in ("JPEGImages", "Annotations"):
        (davis / folder / "480p").rename(davis / folder / "Full-Resolution")
    assert names(open_folder(str(davis), "val")) == ["bee"]


def test_reads_the_frames_asked_for_in_that_order(flat):
    source = open_folder(str(flat), "train")
    frames, labels = source.read(1, [4, 0])
    assert source.video(1)[1:] == (6, 24, 40)
    assert frames.shape == (2, 24, 40, 3) and set(np.unique(labels[0])) == {0, 1, 2}
    assert labels[0, 5, 6:16].all() and not labels[0, 5, :6].any() and labels[1, 5, 2] == 1
    with Image.open(flat / "JPEGImages/bee/00004.jpg") as image:
        np.testing.assert_array_equal(frames[0], np.array(image.convert("RGB")))
    np.testing.assert_array_equal(source.labels(1, [4, 0]), labels)


def test_frames_are_ordered_by_number_and_may_be_png(flat):
    for t in range(6):
        with Image.open(flat / f"JPEGImages/ant/{t:05d}.jpg") as image:
            image.save(flat / f"JPEGImages/ant/{t + 7}.png")
        (flat / f"JPEGImages/ant/{t:05d}.jpg").unlink()
        (flat / f"Annotations/ant/{t:05d}.png").rename(flat / f"Annotations/ant/{t + 7}.png")
    labels = open_folder(str(flat), "train").labels(0, range(6))
    assert [int(np.flatnonzero(m[5])[0]) for m in labels] == [2, 3, 4, 5, 6, 7]


def test_clips_without_a_reachable_object_are_left_out_and_counted(flat, write_clip):
    write_clip(flat / "JPEGImages/dim", flat / "Annotations/dim", objects=False)
    source = open_folder(str(flat), "train")
    assert names(source) == ["ant", "bee", "cow"]
    assert source.notes == ["1 of 4 clips left out: no visible object"]
    assert ("note", source.notes[0]) in describe(source)
    assert dict(describe(source))["frames"] == "18 (6 a clip)"


def cut(path, share=0.7):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def grey(path):
    with Image.open(path) as image:
        array = np.array(image)
    Image.fromarray((array > 0).astype(np.uint8) * 255).save(path)


def colours(path):
    with Image.open(path) as image:
        image.convert("RGB").save(path)


def resized(path):
    with Image.open(path) as image:
        image.resize((20, 12)).save(path)


def emptied(path):
    path.write_bytes(b"")


FRAME, MASK = "JPEGImages/bee/00003.jpg", "Annotations/bee/00003.png"
BROKEN = [
    (lambda r: cut(r / FRAME), [FRAME, "cut short"]),
    (lambda r: cut(r / FRAME, 0.995), [FRAME, "cut short"]),
    (lambda r: cut(r / MASK), [MASK, "cut short"]),
    (lambda r: cut(r / MASK, 0.1), [MASK, "cut short"]),
    (lambda r: emptied(r / MASK), [MASK, "0 bytes"]),
    (lambda r: (r / FRAME).write_text("no image at all"), [FRAME, "neither JPEG nor PNG"]),
    (lambda r: grey(r / MASK), [MASK, "grey", "putpalette"]),
    (lambda r: colours(r / MASK), [MASK, "RGB", "palette"]),
    (lambda r: resized(r / MASK), [MASK, "20 x 12", "40 x 24", "00000.jpg"]),
    (lambda r: resized(r / FRAME), [FRAME, "20 x 12"]),
    (lambda r: (r / MASK).unlink(), ["bee", "6 frames", "5 masks", "00003"]),
    (lambda r: shutil.rmtree(r / "Annotations/bee"), ["bee", "no masks", "Annotations/bee"]),
    (lambda r: [p.unlink() for p in (r / "JPEGImages/bee").iterdir()], ["bee", "no frames"]),
    (lambda r: shutil.rmtree(r / "Annotations"), ["config.data.root", "JPEGImages", "expected"]),
    (lambda r: shutil.rmtree(r), ["config.data.root", "no folder"]),
    (lambda r: [shutil.rmtree(p) for p in (r / "JPEGImages").iterdir()], ["names no clip"]),
]


@pytest.mark.parametrize("how, expected", BROKEN)
def test_names_what_is_broken(flat, how, expected):
    how(flat)
    with pytest.raises(UserError) as error:
        open_folder(str(flat), "train", 4)
    for part in expected:
        assert part in str(error.value)


def test_clip_shorter_than_num_frames(flat):
    with pytest.raises(UserError, match="ant .* 6 frames, fewer than config.data.num_frames=7"):
        open_folder(str(flat), "train", 7)


def test_root_not_given_and_root_one_level_up(davis):
    with pytest.raises(UserError, match="--config.data.root=DIR"):
        train_folder("", 4, holdout=True)
    with pytest.raises(UserError, match="davis has them, give that"):
        train_folder(str(davis.parent), 4, holdout=True)
    with pytest.raises(UserError, match="config.data.eval_root=nowhere"):
        eval_folder(str(davis), "nowhere")


def test_davis_list_missing_or_naming_a_clip_that_is_not_there(davis):
    listing = davis / "ImageSets/2017/train.txt"
    listing.write_text("ant\nelk\n")
    with pytest.raises(UserError, match="clip elk has no frames"):
        train_folder(str(davis), 4, holdout=True)
    listing.unlink()
    with pytest.raises(UserError, match="train.txt is missing"):
        train_folder(str(davis), 4, holdout=True)


def test_nothing_to_hold_out_and_nothing_visible(flat, tmp_path, write_clip):
    write_clip(tmp_path / "one/JPEGImages/ant", tmp_path / "one/Annotations/ant", objects=False)
    with pytest.raises(UserError, match="config.data.eval_root"):
        train_folder(str(tmp_path / "one"), 4, holdout=True)
    with pytest.raises(UserError, match="no visible object in any of its 1 clips"):
        open_folder(str(tmp_path / "one"), "train")


def test_file_broken_after_the_check_is_named_when_read(flat):
    source = open_folder(str(flat), "train")
    cut(flat / FRAME)
    with pytest.raises(UserError, match=FRAME):
        source.read(1, [3])


@pytest.mark.parametrize("name", [FRAME, MASK])
def test_bytes_after_the_end_are_no_damage_and_do_not_hide_any(flat, name):
    path, trailer = flat / name, b"trailer" * 100
    whole = path.read_bytes()
    header = read_header(path)
    path.write_bytes(whole + trailer)
    assert read_header(path) == header
    assert len(open_folder(str(flat), "train").read(1, [3])[0]) == 1
    for kept in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept] + trailer)
        with pytest.raises(UserError, match=f"{name} is cut short"):
            read_header(path)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + b"x" * 9000}]
)
def test_header_and_pixels_are_pillows(tmp_path, options):
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    path = tmp_path / "a.jpg"
    Image.fromarray(noise).save(path, **options)
    assert read_header(path) == (50, 30, "JPEG", 8)
    with Image.open(path) as image:
        np.testing.assert_array_equal(decode_frame(path.read_bytes()), np.array(image))


def test_many_files_show_progress_on_stderr(flat, monkeypatch, capsys):
    monkeypatch.setattr("sam2_jax.data.checks.SHOW_PROGRESS", 5)
    open_folder(str(flat), "train")
    captured = capsys.readouterr()
    assert captured.out == "" and "checking files" in captured.err


def test_real_clips(real_clips):
    source = train_folder(str(real_clips / "davis"), 8, holdout=True)
    assert names(source) == ["hike", "motorbike", "rollerblade", "surf"]
    frames, labels = source.read(1, [0, 30])
    assert frames.shape == (2, 480, 854, 3) and labels.max() == 1
    cells = open_folder(str(real_clips / "science"), "train", 8)
    assert len(cells) == 3
