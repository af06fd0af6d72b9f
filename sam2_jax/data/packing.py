"""Pack the clips of any source into few large files that `packed` reads.

Clips are divided beforehand into groups of consecutive ones, each a shard and the work of one
process. Nothing gets its final name before it is whole and was read back, so packing may be killed
at any instant: started again it keeps the shards that are finished. Until all are, what is planned
and what is finished stands in DIR/.packing.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from sam2_jax.data.packed import is_packed, open_packed
from sam2_jax.data.packed_check import check_shard, clips_bar, file_crc
from sam2_jax.data.packed_format import (
    INDEX,
    UNFINISHED,
    VERSION,
    Clip,
    Index,
    Shard,
    index_text,
    read_index,
)
from sam2_jax.data.packed_writer import bytes_per_pixel, write_shard, writing
from sam2_jax.data.parallel import run_parallel
from sam2_jax.data.sources import SKIP, STOP, Faults, VideoSource
from sam2_jax.types import UserError

PLAN, LOCK = "plan.json", "lock"
LEAST_SHARDS = 16  # also of little data: as many processes can work on it
MB = 10**6
MARK = " (packed)"  # at the end of the name of a source


class Done(NamedTuple):
    """What became of one group of clips."""

    shard: Shard | None  # None: all of its clips are broken
    clips: list[Clip]
    broken: list[tuple[str, str]]  # name, error


def pack_source(
    source: VideoSource,
    root: str | Path,
    *,
    settings: Mapping[str, Any],
    chunk_frames: int = 16,
    shard_mb: int = 256,
    workers: int = 1,
    on_error: str = STOP,
    max_bad: float = 0.0,
) -> Index:
    """Write all clips of a source, or what is left to be written of them.

    Args:
        source: must pickle; frames that it holds encoded are kept as they are.
        root: folder to write to.
        settings: JSON, with which the source was opened: other ones are refused in the same folder.
        chunk_frames: frames of a record, the least that is read at a time.
        shard_mb: size of a file, roughly, in 10^6 bytes; less where there would be few.
        workers: processes; 1: this one.
        on_error: "stop", or "skip" clips that cannot be read, up to the share `max_bad`.

    Raises:
        UserError: the folder belongs to something else, or another process is packing into it; a
            clip cannot be read, or too many; the disk is full.
    """
    folder = Path(root)
    videos = [source.video(i) for i in range(len(source))]
    made_of = {
        **settings,
        "chunk_frames": chunk_frames,
        "shard_mb": shard_mb,
        "number of clips": len(videos),
        "list of clips": hashlib.sha256(json.dumps(videos).encode()).hexdigest(),
    }
    work = folder / UNFINISHED
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if is_packed(folder):
        index = read_index(folder / INDEX)
        _check_same(folder, index.made_of, made_of)
        open_packed(folder, key="--output")  # are all shards there?
        shutil.rmtree(work, ignore_errors=True)
        return index
    with writing(folder):
        work.mkdir(exist_ok=True)
    with _locked(work / LOCK):
        groups = _plan(source, work, made_of, shard_mb)
        done = _resume(folder, len(groups), keep_broken=on_error == SKIP)
        task = partial(_pack_group, source, folder, len(groups), chunk_frames, on_error == SKIP)
        todo = {n: (n, *group) for n, group in enumerate(groups) if n not in done}
        count = sum(len(result.clips) + len(result.broken) for result in done.values())
        bar = clips_bar(f"packing {source.name}", len(source), count)
        faults = Faults(on_error, max_bad)
        _add_faults(faults, done.values())
        with contextlib.closing(run_parallel(task, todo, workers)) as results, bar:
            start, written = time.monotonic(), 0
            for number, result in results:
                with writing(work):
                    _write(work / f"{number:05d}.json", json.dumps(result))
                done[number] = result
                for name, error in result.broken:
                    tqdm.write(f"warning: clip {name} is left out: {error}", sys.stderr)
                _add_faults(faults, [result])
                faults.notes(len(source), source.name)  # too many of them?
                written += result.shard.bytes if result.shard else 0
                bar.set_postfix_str(f"{written / MB / (time.monotonic() - start):.1f} MB/s", False)
                bar.update(len(result.clips) + len(result.broken))
        index = _gather(source, [done[n] for n in sorted(done)], made_of, on_error, max_bad)
        with writing(folder):
            _write(folder / INDEX, index_text(index))
            shutil.rmtree(work, ignore_errors=True)
    return index


def _plan(source: VideoSource, work: Path, made_of: dict, shard_mb: int) -> list[tuple[int, int]]:
    """First and behind the last clip of each shard: as planned at the first start."""
    path = work / PLAN
    if path.is_file():
        plan = json.loads(path.read_text())
        _check_same(work.parent, plan["made_of"], made_of)
        return [tuple(group) for group in plan["groups"]]
    videos = [source.video(i) for i in range(len(source))]
    pixels = [v.num_frames * v.height * v.width for v in videos]
    estimate = bytes_per_pixel(source)
    total = estimate * sum(pixels)
    if total > (free := shutil.disk_usage(work).free):
        tqdm.write(
            f"warning: about {total / MB:,.0f} MB will be written, {free / MB:,.0f} MB are free",
            sys.stderr,
        )
    most = min(shard_mb * MB, total / LEAST_SHARDS)
    groups, start, size = [], 0, 0.0
    for i, count in enumerate(pixels):
        size += estimate * count
        if size >= most or i == len(pixels) - 1:
            groups.append((start, i + 1))
            start, size = i + 1, 0.0
    with writing(work):
        _write(path, json.dumps({"version": VERSION, "made_of": made_of, "groups": groups}))
    return groups


def _check_same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a UserError that names the first setting that is another one."""
    now = json.loads(json.dumps(now))  # tuples become lists
    for key in [*then, *now]:
        if then.get(key) != now.get(key):
            raise UserError(
                f"{folder} holds clips packed with {key} {json.dumps(then.get(key))}, now it is "
                f"{json.dumps(now.get(key))}: expected the same, since shards of both would be "
                "mixed; give another --output, or delete that folder"
            )


def _resume(folder: Path, count: int, keep_broken: bool) -> dict[int, Done]:
    """What is finished, by number of the group; left-overs of killed processes are removed."""
    work, done = folder / UNFINISHED, {}
    for path in work.glob("*.part"):
        path.unlink(missing_ok=True)
    for number in range(count):
        path = work / f"{number:05d}.json"
        if not path.is_file():
            continue
        shard, clips, broken = json.loads(path.read_text())
        if broken and not keep_broken:
            continue  # perhaps they were mended
        found = Done(Shard(*shard) if shard else None, [Clip(*c) for c in clips], broken)
        if found.shard:
            file = folder / found.shard.file
            if not file.is_file() or file.stat().st_size != found.shard.bytes:
                continue
        done[number] = found
    return done


def _pack_group(
    source: VideoSource,
    folder: Path,
    count: int,
    chunk_frames: int,
    skip: bool,
    number: int,
    start: int,
    stop: int,
) -> Done:
    """Write and check one shard, of the clips from `start` to before `stop`."""
    name = f"clips-{number:05d}-of-{count:05d}.array_record"
    path = folder / UNFINISHED / f"{name}.{os.getpid()}.part"
    try:
        clips, broken = write_shard(path, source, range(start, stop), chunk_frames, skip)
        if not clips:
            return Done(None, clips, broken)
        check_shard(path, clips, chunk_frames, decode=False)
        with writing(folder / name):
            records = sum(clip.records(chunk_frames) for clip in clips)
            shard = Shard(name, path.stat().st_size, records, file_crc(path))
            _sync(path)
            path.replace(folder / name)
    finally:
        path.unlink(missing_ok=True)
    return Done(shard, clips, broken)


def _add_faults(faults: Faults, done: Iterable[Done]) -> None:
    for result in done:
        for _, error in result.broken:
            faults.add(UserError(error))


def _gather(
    source: VideoSource, done: Sequence[Done], made_of: dict, on_error: str, max_bad: float
) -> Index:
    faults = Faults(on_error, max_bad)
    _add_faults(faults, done)
    shards, clips, broken = [], [], []
    for result in done:
        if result.shard:
            clips += [clip._replace(shard=len(shards)) for clip in result.clips]
            shards.append(result.shard)
        broken += result.broken
    if not clips:
        raise UserError(f"{source.name} has no clip that can be read, nothing was packed: mend it")
    name = source.name.removesuffix(MARK) + MARK
    notes = [*source.notes, *faults.notes(len(source), source.name)]
    return Index(name, notes, made_of, broken, made_of["chunk_frames"], shards, clips)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    new = path.parent / f"{path.name}.part"
    new.write_text(text)
    _sync(new)
    new.replace(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The lock ends with its process, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is packing into {path.parents[1]}: wait for it, or end it"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
