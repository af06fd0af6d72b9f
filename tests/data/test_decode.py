"""Bytes to arrays: every kind that is read equals Pillow's, every other kind says what to do."""

import io
import struct
import time
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from sam2_jax.data.decode import decode_binary, decode_frame, decode_labels, masks_of, visible_ids
from sam2_jax.data.headers import MAX_PIXELS, Unfit, exif_orientation, parse_header

NOISE = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
LABELS = np.zeros((30, 50), np.uint8)
LABELS[3:9, 4:20], LABELS[12:20, 30:40] = 1, 2


def encode(array, kind="PNG", mode=None, **options):
    stream = io.BytesIO()
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(stream, kind, **options)
    return stream.getvalue()


def palette(array, **options):
    image, stream = Image.fromarray(array), io.BytesIO()
    image.putpalette([value for index in range(256) for value in (index * 37 % 256, 9, 200)])
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


def size(data):
    header = parse_header(data)
    assert header
    return header.width, header.height


def png(width, height, bits=8, colour=2, pixels=b""):
    """A PNG of valid chunks, the pixels as given."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_frames_are_pillows(kind, mode):
    data = encode(NOISE, kind, mode)
    np.testing.assert_array_equal(decode_frame(data), np.array(opened(data).convert("RGB")))
    assert size(data) == (50, 30)


def test_indexed_and_bilevel_frames():
    np.testing.assert_array_equal(
        decode_frame(palette(LABELS, transparency=b"\0\1")),
        np.array(opened(palette(LABELS)).convert("RGB")),
    )
    assert set(np.unique(decode_frame(encode(LABELS * 200, mode="1")))) == {0, 255}


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 3)])
def test_of_16_bits_the_upper_8_are_kept(suffix, shape):
    deep = np.random.default_rng(1).integers(0, 65536, shape).astype(np.uint16)
    found = decode_frame(cv2.imencode(suffix, deep)[1].tobytes())
    expected = (deep >> 8).reshape(8, 9, -1)[..., ::-1]
    np.testing.assert_array_equal(found, np.broadcast_to(expected, (8, 9, 3)))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_turned_pictures_and_their_headers(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    exif[0x010F] = "a maker"
    data = encode(NOISE, kind, exif=exif)
    expected = np.array(ImageOps.exif_transpose(opened(data)).convert("RGB"))
    found = decode_frame(data)
    np.testing.assert_array_equal(found, expected)
    assert size(data) == found.shape[1::-1] == ((30, 50) if turn >= 5 else (50, 30))
    if kind == "PNG":
        labels = palette(LABELS, exif=exif)
        expected = np.array(ImageOps.exif_transpose(opened(labels)))
        np.testing.assert_array_equal(decode_labels(labels), expected)


def test_broken_exif_is_no_broken_picture():
    for exif in (b"", b"Exif\0\0junk", b"II*\0", b"MM\0*\0\0\0\x08\0\x09" + b"\1" * 20):
        assert exif_orientation(exif) == 1
    data = encode(NOISE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_frame(data).shape == (30, 50, 3)


@pytest.mark.parametrize(
    "data, words",
    [
        (encode(NOISE, mode="RGBA"), "RGBA, with an alpha channel"),
        (encode(NOISE, mode="LA"), "grey with an alpha channel"),
        (encode(NOISE, "TIFF", "RGBA"), "RGBA, with an alpha channel"),
        (encode(NOISE, "WEBP", "RGBA", lossless=True), None),  # opaque: WebP drops the channel
        (encode(NOISE, "JPEG", "CMYK"), "CMYK"),
        (encode(NOISE, "TIFF", "CMYK"), "CMYK"),
        (encode(NOISE[..., 0].astype(np.float32), "TIFF"), "mode F"),
        (
            encode(NOISE, "TIFF", save_all=True, append_images=[Image.new("L", (4, 4))]),
            "2 pictures",
        ),
        (encode(NOISE, "GIF"), "neither JPEG nor PNG"),
        (b"no picture", "neither JPEG nor PNG"),
    ],
)
def test_other_kinds_say_what_to_do(data, words):
    if words is None:
        assert decode_frame(data).shape == (30, 50, 3)
        return
    with pytest.raises(Unfit, match=words) as error:
        decode_frame(data)
    assert "save it" in str(error.value)


def test_five_bands(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for bands, photometric in ((2, "minisblack"), (5, "rgb"), (5, "minisblack")):
        pixels = np.zeros((8, 9, bands), np.uint8)
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric=photometric, planarconfig="contig")
        with pytest.raises(ValueError):
            decode_frame((tmp_path / "a.tif").read_bytes())


def test_too_large_is_told_from_the_header_and_at_once():
    jpeg = bytearray(encode(NOISE, "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 10000, 10000)
    bmp = bytearray(encode(NOISE, "BMP"))
    bmp[18:26] = struct.pack("<ii", 10000, 10000)
    began = time.perf_counter()
    for data in (png(10000, 10000), png(20000, 20000), bytes(jpeg), bytes(bmp)):
        with pytest.raises(Unfit, match="more than 64 million pixels: shrink it"):
            decode_frame(data)
    for decoder in (decode_labels, decode_binary):
        with pytest.raises(Unfit, match="10000 x 10000"):
            decoder(png(10000, 10000, colour=0))
    assert time.perf_counter() - began < 1 and 8000 * 8000 <= MAX_PIXELS


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_cut_short_is_an_error_that_names_no_internals(kind, share):
    data = encode(NOISE, kind)
    with pytest.raises((ValueError, OSError)):
        decode_frame(data[: int(share * len(data))])


def test_broken_pixels_are_a_value_error():
    for data in (png(30, 20, pixels=b"short"), png(30, 20, bits=3), palette(LABELS)[:-30]):
        for decoder in (decode_frame, decode_labels):
            with pytest.raises((ValueError, OSError)):
                decoder(data)


def test_labels_of_every_depth():
    for bits in (1, 2, 4, 8):
        labels = np.minimum(LABELS, 2**bits - 1).astype(np.uint8)
        np.testing.assert_array_equal(decode_labels(palette(labels, bits=bits)), labels)
    deep = LABELS.astype(np.uint16) * 300
    found = decode_labels(encode(deep))
    assert found.dtype == np.uint16 and visible_ids(found) == (300, 600)
    packed = np.packbits(np.pad(LABELS > 0, ((0, 0), (0, 6))), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    np.testing.assert_array_equal(decode_labels(png(50, 30, 1, 0, rows)), LABELS > 0)
    rows = b"".join(b"\0" + (row[::2] << 4 | row[1::2]).tobytes() for row in LABELS)
    np.testing.assert_array_equal(decode_labels(png(50, 30, 4, 0, rows)), LABELS)


def test_grey_masks_are_ids_or_black_and_white():
    np.testing.assert_array_equal(decode_labels(encode(LABELS)), LABELS)
    white = decode_labels(encode((LABELS > 0).astype(np.uint8) * 255))
    assert white.dtype == np.uint8
    np.testing.assert_array_equal(white, LABELS > 0)
    assert visible_ids(decode_labels(palette(LABELS * 255))) == (254, 255)  # indices stay
    smooth = LABELS * 255
    smooth[2, 4] = 77
    with pytest.raises(Unfit, match=r"white \(255\) beside 2 other values .* smoothing"):
        decode_labels(encode(smooth))


def test_masks_of_one_object():
    forms = [LABELS, LABELS * 100, (LABELS > 0) * np.uint8(255), LABELS.astype(np.uint16) * 999]
    for data in [*map(encode, forms), palette(LABELS), encode(LABELS * 255, mode="1")]:
        found = decode_binary(data)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, LABELS > 0)


@pytest.mark.parametrize("decoder", [decode_labels, decode_binary])
def test_masks_of_colours_or_as_jpeg_are_refused(decoder):
    for data, words in (
        (encode(NOISE), "is RGB with 8 bits, expected an indexed PNG"),
        (encode(NOISE, mode="LA"), "alpha channel"),
        (encode(LABELS, "JPEG"), "is no PNG"),
        (encode(LABELS, "TIFF"), "is no PNG"),
    ):
        with pytest.raises(Unfit, match=words):
            decoder(data)


def test_ids_and_masks():
    assert visible_ids(LABELS) == (1, 2) and visible_ids(np.zeros((3, 3), np.uint16)) == ()
    assert visible_ids(np.array([[0, 65535], [256, 0]], np.uint16)) == (256, 65535)
    masks = masks_of(LABELS, [2, 7, 300, 1])
    assert masks.shape == (4, 30, 50) and not masks[1:3].any()
    np.testing.assert_array_equal(masks[0], LABELS == 2)
    np.testing.assert_array_equal(masks[3], LABELS == 1)
