"""What can be told of files without decoding them, and what becomes of broken ones."""

import builtins
import io
import pathlib
import re
import struct

import numpy as np
import pytest
from PIL import Image

from sam2_jax.data import checks, sources
from sam2_jax.data.checks import check_files, read_header
from sam2_jax.data.decode import decode_frame
from sam2_jax.data.files import Files
from sam2_jax.data.sources import Faults
from sam2_jax.types import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
KINDS = {".jpg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".bmp": "BMP", ".webp": "WEBP"}


@pytest.fixture
def picture(tmp_path):
    def save(name, array=NOISE, **options):
        Image.fromarray(array).save(tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_bytes_after_the_end_are_no_damage_and_do_not_hide_any(picture, name):
    path, trailer = picture(name), b"trailer" * 100
    whole = path.read_bytes()
    header = read_header(path)
    path.write_bytes(whole + trailer)
    assert read_header(path) == header
    for kept in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept] + trailer)
        with pytest.raises(UserError, match=f"{name} is cut short"):
            read_header(path)


def test_mask_with_bytes_after_its_end(picture):
    path = picture("a.png", NOISE[..., 0].astype(np.uint16) * 9)
    path.write_bytes(path.read_bytes() + b"trailer")
    assert read_header(path) == (50, 30, "grey", 16, 1)


def test_bytes_after_the_end_of_what_cannot_be_used(picture):
    path = picture("a.png", np.dstack([NOISE, NOISE[..., 0]]))
    path.write_bytes(path.read_bytes() + b"trailer")
    assert "alpha" in read_header(path).kind  # a fault of its own, and not cut short


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + b"x" * 9000}]
)
def test_header_and_pixels_are_pillows(picture, options):
    path = picture("a.jpg", **options)
    assert read_header(path) == (50, 30, "JPEG", 8, 1)
    with Image.open(path) as image:
        np.testing.assert_array_equal(decode_frame(path.read_bytes()), np.array(image))


@pytest.mark.parametrize("suffix", KINDS)
def test_header_of_a_turned_picture_behind_a_long_profile(picture, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if suffix == ".bmp" else {"exif": exif, "icc_profile": NOISE.tobytes() * 2}
    path = picture(f"a{suffix}", **options)
    height, width = decode_frame(path.read_bytes()).shape[:2]
    assert read_header(path)[:2] == (width, height)
    assert (width, height) == ((50, 30) if suffix == ".bmp" else (30, 50))


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.99])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_cut_short_files_are_named(picture, suffix, share):
    path = picture(f"a{suffix}", **({"compression": "tiff_lzw"} if suffix == ".tif" else {}))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        read_header(path)
    assert "copy or extract it again" in str(error.value) or "neither" in str(error.value)


def test_too_large_needs_no_whole_file(tmp_path):
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 10000, 10000, 8, 3, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(head)
    clip = Files("a", tmp_path, ["a.png"], tmp_path, ["a.png"])
    with pytest.raises(UserError, match=r"a.png is 10000 x 10000, more than 64 million .* shrink"):
        check_files([clip], Faults())


def test_unreadable_permissions(picture, monkeypatch):
    path, opened = picture("a.jpg"), io.open

    def refuse(name, *args, **kwargs):
        if pathlib.Path(name) == path:
            raise PermissionError(13, "Permission denied", str(name))
        return opened(name, *args, **kwargs)

    path.chmod(0)  # which root does not mind
    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(UserError, match="a.jpg cannot be read .Permission denied.: give read"):
        read_header(path)


def clips(tmp_path, count):
    for number in range(count):
        Image.fromarray(NOISE).save(tmp_path / f"{number}.jpg")
        Image.fromarray(NOISE[..., 0] % 3).save(tmp_path / f"{number}.png")
    return [Files(f"c{n}", tmp_path, [f"{n}.jpg"], tmp_path, [f"{n}.png"]) for n in range(count)]


@pytest.mark.parametrize("group", [1, 3, 4096])
def test_errors_belong_to_their_clips(tmp_path, monkeypatch, group):
    monkeypatch.setattr(checks, "GROUP", group)
    files = clips(tmp_path, 7)
    (tmp_path / "2.jpg").write_bytes(b"")
    Image.fromarray(NOISE).save(tmp_path / "5.png")
    faults = Faults("skip", 0.5)
    kept = check_files(files, faults)
    assert [video.name for _, video in kept] == ["c0", "c1", "c3", "c4", "c6"]
    assert kept[0] == (files[0], ("c0", 1, 30, 50))
    assert ["2.jpg" in str(faults.errors[0]), "5.png" in str(faults.errors[1])] == [True, True]
    assert faults.notes(7, "here")[0].startswith("2 of 7 clips of here are broken and left out")
    with pytest.raises(UserError, match="2.jpg is empty"):
        check_files(files, Faults())


def test_sizes_differ(tmp_path):
    files = clips(tmp_path, 1)
    Image.fromarray(NOISE[:, :20, 0]).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="0.png is 20 x 30, but .*0.jpg is 50 x 30"):
        check_files(files, Faults())


def test_many_files_show_progress_on_stderr(tmp_path, monkeypatch, capsys):
    files = clips(tmp_path, 3)
    check_files(files, Faults())
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sources, "SHOW_PROGRESS", 5)
    check_files(files, Faults())
    assert capsys.readouterr() == ("", "")  # nobody looks
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    check_files(files, Faults())
    captured = capsys.readouterr()
    assert captured.out == "" and "checking files" in captured.err
