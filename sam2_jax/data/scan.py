"""Look once into many annotation files, and remember what was found.

SA-V has 50,000 JSON files of some megabytes and SA-1B 11 million: opening such a set means to read
all of them. What was found is kept as JSON under ~/.cache/sam2_jax/scan (XDG_CACHE_HOME is
respected), one file for every folder that was scanned, so that a scan that was stopped goes on
where it was. An entry counts as long as its files have the same size and time of change.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import stat
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sam2_jax.data.checks import read_header
from sam2_jax.data.decode import decode_frame
from sam2_jax.data.file_source import decode_file, read_file
from sam2_jax.data.files import open_root, unreadable
from sam2_jax.data.headers import frame_fault
from sam2_jax.data.sources import THREADS, Faults, Video, bar
from sam2_jax.data.workers import end_with_trainer
from sam2_jax.types import UserError

FORMAT = 2  # of what the functions given to `scan_files` return: raise it when that changes
PART = 64  # files of one task of a pool
FEW = 16  # files that are not worth a pool
POOL_BYTES = 128 * 2**20  # more than this is worth the seconds in which processes start
MOST_PROCESSES = 32
Group = tuple[Path, ...]
Found = Any  # whatever JSON can hold


def scan_files(
    paths: Sequence[Path | Group],
    look: Callable[..., Found],
    *,
    where: str,
    quick: bool = False,
    faults: Faults | None = None,
) -> list[Found | UserError]:
    """Run `look(path)` on every file, or take what it returned the last time.

    Args:
        paths: files; or tuples of files that belong together, given to `look` one by one. The
            first one names the entry. A folder stands for the files in it.
        look: returns what JSON can hold, or raises a UserError. It must pickle (a function of a
            module, or a `partial` of one): it may run in other processes.
        where: what is scanned, for the progress bar.
        quick: `look` reads only headers, and other processes would not pay for themselves.
        faults: what the caller will do about errors; where the first one stops, it stops the scan.

    Returns:
        What `look` returned, or the UserError that it raised, in the order of `paths`. Errors
        are not remembered.

    Raises:
        UserError: the first one of `look`, if `faults` say so; what was found is remembered.
    """
    groups = [(path,) if isinstance(path, Path) else path for path in paths]
    results: list[Any] = [None] * len(groups)
    todo: list[int] = []
    with ThreadPoolExecutor(THREADS) as pool:
        stamps = [s for part in pool.map(_stamps, _parts(groups, PART)) for s in part]
    order = sorted(range(len(groups)), key=lambda i: groups[i][0].parent)
    for folder, indices in groupby(order, key=lambda i: groups[i][0].parent):
        known = _load(_cache_file(folder, look))
        for i in indices:
            entry = known.get(groups[i][0].name)
            if entry and entry[0] == stamps[i]:
                results[i] = entry[1]
            else:
                todo.append(i)
    size = 0 if quick else sum(stamps[i][0][1] for i in todo)
    looked = _look_at([groups[i] for i in todo], look, where, size)
    with contextlib.closing(looked):
        for folder, pairs in groupby(
            zip(todo, looked, strict=True), key=lambda pair: groups[pair[0]][0].parent
        ):
            new = {}
            try:
                for i, found in pairs:
                    results[i] = found
                    if not isinstance(found, UserError):
                        new[groups[i][0].name] = [stamps[i], found]
                    elif faults and faults.stop:
                        raise found
            finally:  # also when it is interrupted
                _save(_cache_file(folder, look), new)
    return results


def load_json(path: Path | str) -> Any:
    """Contents of a JSON file.

    Raises:
        UserError: it cannot be read, or is no JSON or cut off.
    """
    data = read_file(Path(path))
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(
            f"{path} is no JSON or cut off ({error}): download or export it again"
        ) from error


def changed(path: Path) -> int:
    """When a file was last changed (ns), to keep results by; 0 if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below `root`, itself included, and the names of its files; links are followed.

    Both come in the order of their names.

    Raises:
        UserError: a folder cannot be listed: what it holds would be lacking without a word.
    """

    def stop(error: OSError) -> None:
        raise unreadable(error.filename or str(root), error) from error

    seen = set()
    for folder, inner, names in os.walk(root, onerror=stop, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up would never end
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if name[0] != ".")
        yield Path(folder), sorted(name for name in names if name[0] != ".")


def local_root(root: str, key: str, wanted: str) -> Path:
    """The folder that a config key names, on a disk of this machine or mounted there.

    Raises:
        UserError: the key is empty or names no such folder; `wanted` says what should be in it.
    """
    if "://" in root:
        raise UserError(
            f"{key}={root} is not on a disk, as this source needs it ({wanted}): copy it to one, "
            "or mount it as a folder"
        )
    open_root(root, key, wanted)
    return Path(root)


def frame_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, without decoding.

    Raises:
        UserError: it cannot be a frame, is cut short or cannot be read.
    """
    header = read_header(path)
    if fault := frame_fault(header):
        raise UserError(f"{path} {fault}")
    return header.height, header.width


def decode_pictures(paths: Sequence[Path], video: Video) -> UInt8[np.ndarray, "t h w 3"]:
    """Read and decode some frames of a clip; a path that is named twice is decoded once.

    Raises:
        UserError: one cannot be read or decoded, or is not as large as the clip.
    """
    frames = {path: decode_file(path, decode_frame, video) for path in paths}
    if not frames:
        return np.zeros((0, video.height, video.width, 3), np.uint8)
    return np.stack([frames[path] for path in paths])


def _parts(groups: list[Group], size: int) -> list[list[Group]]:
    """A task of a pool is some files: one each for 11 million would fill the memory."""
    return [groups[i : i + size] for i in range(0, len(groups), size)]


def _stamps(groups: list[Group]) -> list[list[list[Any]]]:
    return [_stamp(group) for group in groups]


def _stamp(group: Group) -> list[list[Any]]:
    """`[name, size, time]` of every file; names of other folders are whole paths."""
    stamp = []
    for path in group:
        name = path.name if path.parent == group[0].parent else str(path)
        try:
            found = path.stat()
            if stat.S_ISDIR(found.st_mode):  # its own time tells only of names that come and go
                with os.scandir(path) as entries:
                    inner = sorted((e.name, *_size_and_time(e)) for e in entries)
                stamp.append([name, len(inner), zlib.crc32(repr(inner).encode())])
            else:
                stamp.append([name, found.st_size, found.st_mtime_ns])
        except OSError:
            stamp.append([name, 0, 0])  # `look` will say it better
    return stamp


def _size_and_time(entry: os.DirEntry) -> tuple[int, int]:
    found = entry.stat()
    return found.st_size, found.st_mtime_ns


def _looked(look: Callable[..., Found], groups: list[Group]) -> list[Found | UserError]:
    results = []
    for group in groups:
        try:
            results.append(look(*group))
        except UserError as error:
            results.append(error)
    return results


def _look_at(
    groups: list[Group], look: Callable[..., Found], where: str, size: int
) -> Generator[Found | UserError, None, None]:
    """Results in order, from processes, threads, or one after the other."""
    task = partial(_looked, look)
    if len(groups) <= FEW and size < POOL_BYTES:
        for group in groups:
            yield from task([group])
        return
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    processes = min(cores, MOST_PROCESSES, len(groups))
    pool: Executor
    if size < POOL_BYTES or processes == 1:
        pool = ThreadPoolExecutor(THREADS)
    else:
        # Not forked: threads of JAX may hold locks that nobody would ever release in the copy.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, spawn, end_with_trainer)
    try:
        parts = _parts(groups, max(1, min(PART, len(groups) // (4 * THREADS))))
        found: Iterable[Any] = (one for part in pool.map(task, parts) for one in part)
        yield from bar(f"scanning {where}", len(groups), "file", found)
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that scanned {where} ended, perhaps for lack of memory: free some and "
            "start again; a script of your own also needs an if __name__ == '__main__' around it"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _cache_file(folder: Path, look: Callable[..., Found]) -> Path:
    """Where the results of one function for one folder are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    function = look.func if isinstance(look, partial) else look
    settings = [look.args, sorted(look.keywords.items())] if isinstance(look, partial) else []
    identity = [FORMAT, function.__module__, function.__qualname__, settings, folder.absolute()]
    name = hashlib.sha256(repr([str(part) for part in identity]).encode()).hexdigest()[:32]
    return Path(base) / "sam2_jax" / "scan" / f"{name}.json"


def _load(path: Path) -> dict[str, list[Any]]:
    """Entries `name -> [stamp, result]`; none if the file is missing or broken."""
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {k: v for k, v in entries.items() if isinstance(v, list) and len(v) == 2}


def _save(path: Path, new: dict[str, list[Any]]) -> None:
    """Add entries. Where nothing can be written, the next scan is slow and that is all."""
    if not new:
        return
    whole = path.with_name(f"{path.name}.{os.getpid()}")  # others may write at the same time
    with contextlib.suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole.write_text(json.dumps(_load(path) | new))
            whole.replace(path)
        finally:
            whole.unlink(missing_ok=True)
