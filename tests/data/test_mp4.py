"""Frames of a video file by number, against playing the whole file; and files that are broken."""

from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
import pytest

from sam2_jax.data import headers, mp4
from sam2_jax.data.mp4 import read_frames, read_header
from sam2_jax.types import UserError

COUNT, SIZE = 50, (64, 96)
KINDS = {
    "closed": ("libx264", "keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"),
    "open": ("libx264", "keyint=12:bframes=3:b-adapt=0:open-gop=1:scenecut=0"),
    "refresh": ("libx264", "keyint=12:intra-refresh=1:bframes=0"),
    "mpeg4": ("mpeg4", ""),
}


def write_video(path, images, kind="closed", rotation=0, uneven=False, container=None):
    """Write RGB frames with B-frames, and key frames every 12."""
    codec, params = KINDS[kind]
    options = {"x264-params": params, "preset": "ultrafast"} if params else {"g": "12", "bf": "2"}
    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=24, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for t, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = t + (t // 3 if uneven else 0)
            frame.time_base = Fraction(1, 24)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def moving(count=COUNT, size=SIZE):
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 256, (12, 24, 3), np.uint8), (size[1] + 3 * count, size[0]))
    return [np.ascontiguousarray(scene[:, 3 * t : 3 * t + size[1]]) for t in range(count)]


def play(path):
    """All frames, as OpenCV plays them: the reference extracts frames by it."""
    video, frames = cv2.VideoCapture(str(path)), []
    while (found := video.read())[0]:
        frames.append(found[1][..., ::-1])
    video.release()
    return np.stack(frames)


@pytest.fixture(params=KINDS)
def video(request, tmp_path):
    write_video(tmp_path / "v.mp4", moving(), request.param)
    return tmp_path / "v.mp4"


@pytest.mark.parametrize("kind", ["closed", "open", "mpeg4"])
def test_the_videos_have_what_they_are_written_for(tmp_path, kind):
    write_video(tmp_path / "v.mp4", moving(), kind)
    with av.open(str(tmp_path / "v.mp4")) as file:
        packets = [p for p in file.demux(video=0) if p.pts is not None]
    times: list[Any] = [p.pts for p in packets]
    assert times != sorted(times)  # B-frames
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    assert len(keys) >= 4
    before = any(times[j] < times[i] for i in keys for j in range(i, len(times)))
    assert before == (kind != "closed")  # frames shown before the key frame that they follow


def test_every_frame_alone_is_the_frame_of_playing(video):
    frames = play(video)
    assert len(frames) == COUNT and read_header(video) == (COUNT, *SIZE)
    for t in range(COUNT):
        np.testing.assert_array_equal(read_frames(video, [t])[0], frames[t])


def test_in_any_order_and_more_than_once(video):
    order = [*np.random.default_rng(1).permutation(COUNT)[:20].tolist(), 3, 3, COUNT - 1, 0]
    np.testing.assert_array_equal(read_frames(video, order), play(video)[order])


@pytest.mark.parametrize("kind", ["closed", "open"])
def test_frames_are_decoded_once_from_the_nearest_key_frame(tmp_path, kind, monkeypatch):
    write_video(tmp_path / "v.mp4", moving(), kind)
    decoded, decode = [], mp4._decode

    class Counting:
        def __init__(self, container):
            self.seek, self._container = container.seek, container

        def decode(self, stream):
            for frame in self._container.decode(stream):
                decoded.append(frame.pts)
                yield frame

    monkeypatch.setattr(mp4, "_decode", lambda file, *rest: decode(Counting(file), *rest))
    frames = read_frames(tmp_path / "v.mp4", [40, 4, 8, 4, 0, 44])
    np.testing.assert_array_equal(frames, play(tmp_path / "v.mp4")[[40, 4, 8, 4, 0, 44]])
    # Key frames are 0, 12, 24, 36 and 48, of open groups up to a few frames off.
    assert len(decoded) == len(set(decoded)) <= 9 + 12


def test_uneven_times_rotation_and_fragments(tmp_path):
    for name, options in {
        "uneven": {"uneven": True},
        "turned": {"rotation": 90},
        "upside": {"rotation": 180},
        "fragments": {"container": {"movflags": "frag_keyframe+empty_moov"}},
        "faststart": {"container": {"movflags": "faststart"}},
    }.items():
        path = tmp_path / f"{name}.mp4"
        write_video(path, moving(), **options)
        frames = play(path)
        assert read_header(path) == (COUNT, *frames.shape[1:3])
        np.testing.assert_array_equal(read_frames(path, [30, 7]), frames[[30, 7]])


@pytest.mark.parametrize("movflags", ["", "faststart", "frag_keyframe+empty_moov"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_files_are_named(tmp_path, movflags, share):
    path = tmp_path / "v.mp4"
    write_video(path, moving(), container={"movflags": movflags} if movflags else {})
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"v.mp4 .*(download|copy)"):
        count = read_header(path).num_frames
        if "frag" in movflags:  # whole up to the fragment that is cut: known when that is read
            read_frames(path, [count - 1, COUNT - 1])


def test_what_is_no_video_is_named(tmp_path):
    path = tmp_path / "v.mp4"
    for data in (b"", b"nonsense" * 1000):
        path.write_bytes(data)
        for function in (read_header, lambda p: read_frames(p, [0])):
            with pytest.raises(UserError, match="v.mp4 cannot be decoded"):
                function(path)
    with pytest.raises(UserError, match="none.mp4 cannot be decoded"):
        read_frames(tmp_path / "none.mp4", [0])
    write_video(path, moving(5))
    for t in (5, -1):
        with pytest.raises(UserError, match=rf"v.mp4 has 5 frames and none of number {t}"):
            read_frames(path, [0, t])
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 400] = b"\xff" * 400
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="v.mp4"):
        read_header(path)
        read_frames(path, range(5))


def test_large_frames_are_refused_before_one_is_decoded(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", moving(3))
    monkeypatch.setattr(headers, "MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    with pytest.raises(UserError, match=r"a\.mp4 is 96 x 64, more than"):
        read_header(tmp_path / "a.mp4")
