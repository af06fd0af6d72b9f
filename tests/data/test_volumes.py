"""Volumes in .npz files, and files that are broken or hold something else."""

import pickle
import zipfile
from typing import Any

import numpy as np
import pytest

from sam2_jax.data import headers, volumes
from sam2_jax.data.sources import EncodedSource, Faults, VideoSource, keep_usable
from sam2_jax.data.volumes import open_volumes
from sam2_jax.types import UserError

SHAPE = (9, 24, 32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def images(*more):
    return np.random.default_rng(0).integers(0, 256, (*SHAPE, *more), np.uint8)


def labels(dtype: Any = np.uint8):
    """Object 1 on slices 2-6, object 300 (44 in 8 bits) on slices 4-8."""
    gts = np.zeros(SHAPE, dtype)
    gts[2:7, 5:12, 6:18] = 1
    gts[4:, 15:20, 6:18] = 300 if np.dtype(dtype).itemsize > 1 else 44
    return gts


@pytest.fixture
def root(tmp_path):
    """Two volumes, one of them in a folder of its own."""
    folder = tmp_path / "volumes"
    (folder / "ct").mkdir(parents=True)
    np.savez_compressed(folder / "ct" / "a.npz", imgs=images(), gts=labels(), spacing=np.ones(3))
    np.savez(folder / "b.npz", imgs=images(3), gts=labels(np.int32))
    return folder


def test_slices_are_frames(root):
    source = open_volumes(str(root))
    assert isinstance(source, VideoSource) and not isinstance(source, EncodedSource)
    assert [source.video(i) for i in range(2)] == [("b", *SHAPE), ("ct/a", *SHAPE)]
    assert [source.objects(0, t) for t in (0, 2, 4, 8)] == [(), (1,), (1, 300), (300,)]
    assert source.objects(1, 4) == (1, 44)
    frames, masks = source.read(1, [8, 3, 3], [44, 1])
    np.testing.assert_array_equal(frames, np.repeat(images()[[8, 3, 3], ..., None], 3, -1))
    for i, t in enumerate((8, 3, 3)):
        np.testing.assert_array_equal(masks[i, 0], labels()[t] == 44)
        np.testing.assert_array_equal(masks[i, 1], labels()[t] == 1)
    frames, masks = source.read(0, [5], [300])
    np.testing.assert_array_equal(frames[0], images(3)[5])
    np.testing.assert_array_equal(masks[0, 0], labels(np.int32)[5] == 300)
    assert source.read(0, [5], [])[1].shape == (1, 0, *SHAPE[1:])
    assert source.read(0, [], [1])[0].shape == (0, *SHAPE[1:], 3)
    frames[:] = 0  # what is kept of a volume is not what is handed out
    assert source.read(0, [5], [])[0].any()
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(0, [5], [300])[1], masks)
    assert keep_usable(source, 4) is source


def test_few_arrays_are_kept_and_none_is_read_without_need(root, monkeypatch):
    source = open_volumes(str(root))
    volumes._load.cache_clear()
    loads = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    for t in range(9):
        source.objects(0, t)
    assert not loads
    for t in range(9):
        source.read(0, [t], [1])
    assert len(loads) == 2
    source.read(1, [0], [])
    assert len(loads) == 3
    assert volumes._load.cache_info().maxsize == 4


def test_booleans_and_three_hundred_objects(tmp_path):
    gts = np.zeros(SHAPE, bool)
    gts[3] = True
    np.savez(tmp_path / "a.npz", imgs=images(), gts=gts)
    many = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) % 301
    np.savez(tmp_path / "b.npz", imgs=images(), gts=np.stack([many] * 9))
    source = open_volumes(str(tmp_path))
    assert source.objects(0, 3) == (1,) and source.read(0, [3], [1])[1].all()
    assert source.objects(1, 0) == tuple(range(1, 301))
    np.testing.assert_array_equal(source.read(1, [0], [256])[1][0, 0], many == 256)


def save(**arrays):
    return lambda path: np.savez_compressed(path, **arrays)


def cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 4 + 50] = bytes(50)
    path.write_bytes(bytes(data))


def short(path):
    """A header that promises more than there is."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data[:-10] if name == "gts.npy" else data)


BROKEN = {
    "a.npz cannot be read": cut,
    "a.npz cannot be read ": damage,
    r"a.npz cannot be read .*is not a zip file": lambda path: path.write_bytes(b"nonsense"),
    "a.npz holds imgs, labels, expected imgs and gts": save(imgs=images(), labels=labels()),
    "a.npz has [0-9,]+ bytes of gts, expected": short,
    "a.npz has gts of Python objects": save(imgs=images(), gts=np.array([{}, None])),
    "a.npz has imgs of Python objects": save(imgs=np.array([print]), gts=labels()),
    "a.npz has imgs of float32, expected uint8": save(imgs=images() / np.float32(3), gts=labels()),
    "a.npz has imgs of int16, expected uint8": save(imgs=images().astype(np.int16), gts=labels()),
    r"a.npz has imgs of shape \[24, 32\]": save(imgs=images()[0], gts=labels()[0]),
    r"a.npz has imgs of shape \[9, 24, 32, 2\]": save(imgs=images(2), gts=labels()),
    r"a.npz has imgs of shape \[0, 24, 32\]": save(imgs=images()[:0], gts=labels()[:0]),
    r"a.npz has gts of uint8 and shape \[8, 24, 32\]": save(imgs=images(), gts=labels()[1:]),
    "a.npz has gts of float64": save(imgs=images(), gts=labels().astype(float)),
    "a.npz has gts down to -1": save(imgs=images(), gts=labels().astype(np.int8) - 1),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_volumes_stop_or_are_left_out(root, message, tmp_path):
    BROKEN[message](root / "ct" / "a.npz")
    with pytest.raises(UserError, match=message):
        open_volumes(str(root))
    source = open_volumes(str(root), faults=Faults("skip", 0.5))
    assert [source.video(i).name for i in range(len(source))] == ["b"]
    assert "1 of 2 clips" in source.notes[0]
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("ct/a.npz\n")
    assert len(open_volumes(str(root), exclude=str(exclude))) == 1


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    np.savez(tmp_path / "a.npz", imgs=np.array([Bomb()]), gts=labels())
    with pytest.raises(UserError, match="could run any code"):
        open_volumes(str(tmp_path))


def test_roots_and_changes(root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="key=.*empty has no .npz file below it"):
        open_volumes(str(tmp_path / "empty"), key="key")
    source = open_volumes(str(root))
    (root / "b.npz").unlink()
    with pytest.raises(UserError, match="b.npz cannot be read"):
        source.read(0, [0], [1])


def test_large_slices_are_refused_before_they_are_read(root, monkeypatch):
    monkeypatch.setattr(headers, "MAX_PIXELS", SHAPE[1] * SHAPE[2] - 1)
    monkeypatch.setattr(volumes, "_array", None)
    with pytest.raises(UserError, match="slices of 32 x 24 pixels, more than"):
        open_volumes(str(root))
