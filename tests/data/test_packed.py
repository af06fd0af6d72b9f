"""Packed clips are the clips that were packed, and what is broken about them is found."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sam2_jax.data import packed, packed_writer
from sam2_jax.data.augment import AugmentSettings
from sam2_jax.data.decode import decode_frame
from sam2_jax.data.folders import train_folder
from sam2_jax.data.packed import open_packed
from sam2_jax.data.packed_check import verify_packed
from sam2_jax.data.packed_format import visible_on, visible_text
from sam2_jax.data.pipeline import Part, make_loader
from sam2_jax.data.sampling import Sampling
from sam2_jax.data.sources import Faults, Selection, keep_usable
from sam2_jax.data.synthetic import SyntheticSource
from sam2_jax.types import UserError
from tests.data.arrays import Arrays, assert_same, pack, random_masks, some_clips

PLAIN = AugmentSettings(hflip=0.5)


@pytest.mark.parametrize("workers", [1, 2])
def test_rendered_clips_are_the_same(tmp_path, workers):
    source = SyntheticSource(num_clips=5, num_frames=7, size=48)
    pack(source, tmp_path, chunk_frames=3, workers=workers)
    opened = open_packed(tmp_path)
    assert_same(source, opened)
    frame = decode_frame(opened.encoded(4, 6))
    np.testing.assert_array_equal(frame, source.read(4, [6], [])[0][0])
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == "index.json"


def test_files_are_kept_as_they_are(tmp_path, flat):
    source = train_folder(str(flat), holdout=False)
    chosen = Selection(source, [2, 0], ["not all"])
    pack(chosen, tmp_path / "out", chunk_frames=4)
    opened = open_packed(tmp_path / "out")
    assert_same(chosen, opened)
    assert opened.encoded(0, 5) == (flat / "JPEGImages/cow/00005.jpg").read_bytes()
    assert opened.notes[-1] == "not all"


@pytest.mark.parametrize("limits", [(2**28, 2**26), (1, 1)])
def test_overlaps_large_ids_many_objects_single_frames(tmp_path, monkeypatch, limits):
    monkeypatch.setattr(packed_writer, "MASK_BYTES", limits[0])  # one object at a time
    monkeypatch.setattr(packed_writer, "SPOOL_BYTES", limits[1])  # clips wait on disk
    many, few = random_masks(range(1, 301)), random_masks((3, 256, 70_000, 2**40))
    source = Arrays([[many], [few, {}, {256: few[256]}, many], [{}], [random_masks((5,))]])
    pack(source, tmp_path, chunk_frames=2)
    assert_same(source, open_packed(tmp_path))
    assert open_packed(tmp_path).notes == ["made up"]
    verify_packed(tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_visible_objects_in_words(seed):
    rng = np.random.default_rng(seed)
    seen = [sorted(set(rng.integers(1, 9, rng.integers(0, 9)).tolist())) for _ in range(12)]
    text = visible_text(seen)
    assert [list(visible_on(text, t)) for t in range(12)] == seen
    assert visible_text([[1, 2, 3, 8], [1, 2, 3], [8]]) == "1-3:0-1 8:0,2"


def test_batches_are_the_same(tmp_path, flat):
    source = train_folder(str(flat), holdout=False)
    pack(source, tmp_path / "out", chunk_frames=4)
    batches = []
    for each in (source, open_packed(tmp_path / "out")):
        usable = keep_usable(each, 3)
        part = Part("train", usable, Sampling(3, 2, reverse=0.5), PLAIN, 2)
        loader = make_loader([part], side=32, seed=3)
        batches.append([next(loader) for _ in range(6)])
        loader.close()
    for one, two in zip(*batches, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    source = SyntheticSource(num_clips=2, num_frames=9, size=32)
    pack(source, tmp_path, chunk_frames=3)
    opened, read = open_packed(tmp_path), []
    parse = packed.parse_record
    monkeypatch.setattr(packed, "parse_record", lambda data: read.append(1) or parse(data))
    opened.objects(0, 4)
    assert not read
    opened.read(0, [3, 5, 4, 3], [1])
    assert len(read) == 1


def test_copies_and_threads(tmp_path):
    source = SyntheticSource(num_clips=4, num_frames=6, size=32)
    pack(source, tmp_path, chunk_frames=2)
    opened = open_packed(tmp_path)
    opened.read(0, [0], [1])
    copy = pickle.loads(pickle.dumps(opened))
    expected = [source.read(i, range(6), [1, 2])[0] for i in range(4)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: copy.read(i % 4, range(6), [1, 2])[0], range(80)))
    for i, images in enumerate(found):
        np.testing.assert_array_equal(images, expected[i % 4])


def test_some_clips_by_name(tmp_path):
    pack(Arrays(some_clips(4)), tmp_path / "out")
    (tmp_path / "list.txt").write_text("set/clip 2\nset/clip 0\n")
    opened = open_packed(tmp_path / "out", include=str(tmp_path / "list.txt"))
    assert [opened.video(i).name for i in range(2)] == ["set/clip 0", "set/clip 2"]
    np.testing.assert_array_equal(
        opened.read(1, [1], [2])[1], Arrays(some_clips(4)).read(2, [1], [2])[1]
    )


def shard_of(root: Path) -> Path:
    return sorted(root.glob("clips-*"))[2]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.6])
def test_a_flipped_byte_is_found(tmp_path, share):
    source = SyntheticSource(num_clips=16, num_frames=2, size=160)
    pack(source, tmp_path)
    verify_packed(tmp_path)
    shard = shard_of(tmp_path)
    flip(shard, int(share * len(shard.read_bytes().rstrip(b"\0"))))
    with pytest.raises(UserError, match=rf"(?s)1 of 16 shards .*{shard.name} is broken"):
        verify_packed(tmp_path, workers=2 if share == 0.3 else 1)
    with pytest.raises(UserError, match=rf"{shard.name}: record 0 of clip synthetic-00002"):
        open_packed(tmp_path).read(2, [0, 1], [1])
    open_packed(tmp_path).read(1, [0, 1], [1])


def test_a_flipped_byte_between_records_is_found(tmp_path):
    pack(Arrays(some_clips()), tmp_path)
    flip(shard_of(tmp_path), 100_000)  # of 131,072, filled up with zeros
    with pytest.raises(UserError, match="1 of 6 shards are broken: .*another checksum"):
        verify_packed(tmp_path)


@pytest.mark.parametrize("part", ["header", "frame"])
def test_own_checksums_find_it_too(tmp_path, monkeypatch, part):
    pack(Arrays(some_clips(1)), tmp_path)
    opened, parse = open_packed(tmp_path), packed.parse_record

    def broken(data):
        changed = bytearray(data)
        changed[30 if part == "header" else -1] ^= 4
        return parse(bytes(changed))

    monkeypatch.setattr(packed, "parse_record", broken)
    with pytest.raises(UserError, match=r"array_record: record 0 of clip .* \(the checksum of"):
        opened.read(0, [2], [])
    with pytest.raises(UserError, match=r"array_record: record 0 of clip .* \(the checksum of"):
        opened.encoded(0, 2)


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_shard_that_is_not_whole(tmp_path, how):
    pack(Arrays(some_clips()), tmp_path)
    shard = shard_of(tmp_path)
    if how == "cut":
        shard.write_bytes(shard.read_bytes()[:-9])
        told = rf"{shard.name} has 131,063 bytes, expected 131,072"
    else:
        shard.unlink()
        told = rf"{shard.name} is missing"
    for use in (open_packed, verify_packed, lambda root: pack(Arrays(some_clips()), root)):
        with pytest.raises(UserError, match=told):
            use(tmp_path)
    opened = open_packed(tmp_path, faults=Faults("skip", 0.2))
    assert [opened.video(i).name[-1] for i in range(len(opened))] == ["0", "1", "3", "4", "5"]
    assert "1 of 6 clips" in opened.notes[-1]


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_broken_index(tmp_path):
    pack(Arrays(some_clips()), tmp_path)
    index = tmp_path / "index.json"
    text = index.read_text()
    rows = json.loads(text)

    def refused(match):
        with pytest.raises(UserError, match=match):
            open_packed(tmp_path)
        index.write_text(text)

    index.write_text(text[:-40])
    refused("index.json is no JSON or cut off")
    index.write_text(text.replace("1-2:0-2", "1-2:0-1", 1))
    refused("index.json is broken, crc32")
    edit(index, version=2)
    refused("index.json is of version 2 of the format, expected 1")
    edit(index, format="other")
    refused("index.json is no index of packed clips")
    edit(index, shards=[["../x", 1, 1, 1], *rows["shards"][1:]])
    refused("index.json is broken, a shard with a path")
    edit(index, shards=rows["shards"][:3])
    refused("index.json lacks or misplaces something")
    edit(index, shards=[[*rows["shards"][0][:2], 0, 0], *rows["shards"][1:]])
    refused("index.json is broken, the place of set/clip 0")
    index.unlink()
    refused("has no index.json; expected a folder")


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="data.x.root is empty"):
        open_packed("", key="data.x.root")
    with pytest.raises(UserError, match="data.x.root=.*/nowhere has no index.json"):
        open_packed(tmp_path / "nowhere", key="data.x.root")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        pack(Arrays(some_clips()), tmp_path / "file")
