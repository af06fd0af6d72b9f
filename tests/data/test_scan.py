"""Looking into many files, and remembering it; lists of clips."""

import json
import os
import pathlib
import time
from functools import partial
from typing import Any

import numpy as np
import pytest

from sam2_jax.data import scan
from sam2_jax.data.folders import open_folder
from sam2_jax.data.lists import choose
from sam2_jax.data.object_folders import open_object_folders
from sam2_jax.data.pictures import open_pictures
from sam2_jax.data.scan import load_json, local_root, walk
from sam2_jax.data.sources import Faults
from sam2_jax.types import UserError

LOOKED = []


def scan_files(*arguments) -> list[Any]:
    return scan.scan_files(*arguments, where="here")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    LOOKED.clear()
    return tmp_path / "cache" / "sam2_jax" / "scan"


def look(path: pathlib.Path, other: pathlib.Path | None = None, factor: int = 1) -> dict:
    LOOKED.append(path.name)
    text = path.read_text()
    if text == "bad":
        raise UserError(f"{path} is bad")
    return {"length": factor * len(text), "other": other and other.read_text()}


def slow_look(path: pathlib.Path) -> dict:
    time.sleep(0.002)
    return look(path)


def write(folder, count):
    paths = [folder / f"{'ab'[i % 2]}" / f"{i}.txt" for i in range(count)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * i)
    return paths


@pytest.mark.parametrize("count", [5, 40])  # one after the other, and in threads
def test_results_come_in_order_and_are_remembered(tmp_path, count, cache):
    paths = write(tmp_path, count)
    paths[3].write_text("bad")
    results = scan_files(paths, look)
    assert [r["length"] for i, r in enumerate(results) if i != 3] == [
        i for i in range(count) if i != 3
    ]
    assert isinstance(results[3], UserError)
    assert len(list(cache.iterdir())) == 2  # one for each folder, nothing else
    LOOKED.clear()
    again = scan_files(paths, look)
    assert LOOKED == ["3.txt"]  # errors are not remembered
    assert [r for r in again if isinstance(r, dict)] == [r for r in results if isinstance(r, dict)]
    # Other settings are another question, a changed file is another file.
    assert scan_files(paths[:2], partial(look, factor=2))[1]["length"] == 2
    LOOKED.clear()
    paths[4].write_text("longer than before")
    assert scan_files(paths, look)[4]["length"] == 18
    assert sorted(LOOKED) == ["3.txt", "4.txt"]


def test_files_that_belong_together(tmp_path):
    one, two = write(tmp_path, 2)
    assert scan_files([(one, two)], look)[0]["other"] == "x"
    two.write_text("changed")
    assert scan_files([(one, two)], look)[0]["other"] == "changed"
    assert scan_files([], look) == []


def test_processes_give_the_same(tmp_path, monkeypatch):
    # Not `look`: the processes do not know this file by a name that they could import.
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps([i]) if i != 1 else "[")
    monkeypatch.setattr(scan, "POOL_BYTES", 1)
    monkeypatch.setattr(scan.os, "sched_getaffinity", lambda pid: {0, 1})
    results = scan_files(paths, load_json)
    assert results[0] == [0] and results[2] == [2]
    assert isinstance(results[1], UserError) and "1.json is no JSON or cut off" in str(results[1])


@pytest.mark.parametrize("broken", [b"", b"{", b"[1]", b'{"0.txt": 3}', b"\xff\xfe"])
def test_a_broken_cache_is_written_anew(tmp_path, cache, broken):
    paths = write(tmp_path, 1)
    expected = scan_files(paths, look)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(broken)
    assert scan_files(paths, look) == expected
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert scan_files(write(tmp_path, 1), look)[0]["length"] == 0


def test_what_was_found_before_an_interruption_is_kept(tmp_path):
    paths = sorted(write(tmp_path, 8))

    def stop(path):
        if path == paths[-1]:
            raise KeyboardInterrupt
        return look(path)

    stop.__qualname__, stop.__module__ = look.__qualname__, look.__module__
    with pytest.raises(KeyboardInterrupt):
        scan_files(paths, stop)
    LOOKED.clear()
    scan_files(paths, look)
    assert LOOKED == [paths[-1].name]


def test_json_and_roots(tmp_path):
    path = tmp_path / "x.json"
    for text in (b'{"a": [1, 2', b"", b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(text)
        with pytest.raises(UserError, match="x.json is no JSON or cut off"):
            load_json(path)
    with pytest.raises(UserError, match="none.json cannot be read"):
        load_json(tmp_path / "none.json")
    for root, found in (("", "is empty"), (str(path), "is no folder"), ("gs://b", "not on a disk")):
        with pytest.raises(UserError, match=f"config.data.root.*{found}.*clips"):
            local_root(root, "config.data.root", "clips")


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "b.txt").touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "root")
    assert [names for _, names in walk(tmp_path / "root")] == [[], ["b.txt"]]


def test_lists_choose_clips(tmp_path):
    names = ["cow", "ant", "bee.v2"]
    take, leave = tmp_path / "take.txt", tmp_path / "leave.txt"
    take.write_text("ant.mp4\n\n  bee.v2\n")
    leave.write_text("ant\nunknown\n")
    assert choose(names, "", "", "here") == [0, 1, 2]
    assert choose(names, str(take), "", "here") == [1, 2]
    assert choose(names, str(take), str(leave), "here") == [2]
    assert choose(names, "", str(leave), "here") == [0, 2]
    take.write_text("dog\nant\n")
    with pytest.raises(UserError, match=r"take.txt .*here does not have \(dog\)"):
        choose(names, str(take), "", "here")
    take.write_text("\n")
    with pytest.raises(UserError, match="take.txt is empty"):
        choose(names, str(take), "", "here")
    leave.write_text("\n".join(names))
    with pytest.raises(UserError, match="leave.txt leaves no clip"):
        choose(names, "", str(leave), "here")
    leave.write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    with pytest.raises(UserError, match="leave.txt cannot be read"):
        choose(names, "", str(leave), "here")
    with pytest.raises(UserError, match="none.txt cannot be read"):
        choose(names, str(tmp_path / "none.txt"), "", "here")


def test_lists_from_windows_and_names_without_ending(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfant\r\nv1.5\r\n")
    assert choose(["ant.jpg", "bee.png", "v1.5"], str(path), "", "here") == [0, 2]
    path.write_text("v1")  # what follows the point is no ending of a picture
    assert choose(["ant.jpg", "v1.5"], "", str(path), "here") == [0, 1]
    with pytest.raises(UserError, match="names clips that here does not have"):
        choose(["v1.jpg", "v1.png"], str(path), "", "here")  # which of them?


def refuse(*names):
    """For a system that lets nobody look into folders of these names; root may look anywhere."""

    def allowed(path) -> None:
        if pathlib.Path(path).name in names:
            raise PermissionError(13, "Permission denied", str(path))

    return allowed


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path, 4)
    scandir, allowed = os.scandir, refuse("b")

    def guarded(path):
        allowed(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match=rf"{tmp_path}/b cannot be read .*give read permission"):
        list(walk(tmp_path))


@pytest.mark.parametrize("opener", [open_folder, open_object_folders, open_pictures])
def test_a_folder_that_cannot_be_entered_is_named(tmp_path, monkeypatch, opener):
    is_dir, allowed = pathlib.Path.is_dir, refuse("480p", "JPEGImages", "images")

    def guarded(path):
        allowed(path)
        return is_dir(path)

    monkeypatch.setattr(pathlib.Path, "is_dir", guarded)
    more = ("train",) if opener is open_folder else ()
    with pytest.raises(UserError, match="cannot be read .*Permission denied"):
        opener(str(tmp_path), *more)


def test_the_first_error_ends_the_scan_and_what_was_found_is_kept(tmp_path):
    paths = write(tmp_path, 2000)
    paths[300].write_text("bad")  # in the folder that comes first
    with pytest.raises(UserError, match="300.txt is bad"):
        scan.scan_files(paths, slow_look, where="here", faults=Faults())
    assert len(LOOKED) < 1500
    paths[300].write_text("good")
    LOOKED.clear()
    again = scan.scan_files(paths, slow_look, where="here", faults=Faults())
    assert all(isinstance(found, dict) for found in again)
    assert 500 < len(LOOKED) <= 1850  # 150 of the first folder came before the bad one
    paths[300].write_text("bad")
    assert sum(isinstance(r, UserError) for r in scan_files(paths, slow_look)) == 1
