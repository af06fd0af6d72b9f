"""Packing can be stopped at any instant, and mixes nothing."""

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sam2_jax.data.packed import open_packed
from sam2_jax.data.packed_check import verify_packed
from sam2_jax.data.sources import Selection
from sam2_jax.types import UserError
from tests.data.arrays import Arrays, assert_same, pack, some_clips

ROOT = Path(__file__).parents[2]

PROGRAM = """
import resource, signal, sys
from sam2_jax.data.packing import pack_source
from sam2_jax.data.synthetic import SyntheticSource
from sam2_jax.types import UserError
if __name__ == "__main__":
    if sys.argv[3] == "full":  # no file may grow beyond this
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    source = SyntheticSource(num_clips=120, num_frames=4, size=96)
    try:
        pack_source(source, sys.argv[1], settings={}, chunk_frames=2, workers=int(sys.argv[2]))
    except UserError as error:
        print(error)
        sys.exit(2)
"""


def start(tmp_path, name, workers=1, how=""):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / name), str(workers)]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with (tmp_path / "out.txt").open("w") as out:
        return subprocess.Popen(
            [*command, how], stdout=out, stderr=subprocess.DEVNULL, env=environment
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """What a run that nobody disturbs writes."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, "out").wait() == 0
    return contents(folder / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again(tmp_path, whole, workers):
    process = start(tmp_path, "killed", workers)
    while len(list((tmp_path / "killed/.packing").glob("0*.json"))) < 3:
        time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    process.wait()
    assert not (tmp_path / "killed/index.json").exists()
    with pytest.raises(UserError, match="not packed to its end"):
        open_packed(tmp_path / "killed")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("clips-0000[01]*")}
    assert start(tmp_path, "killed", workers).wait() == 0
    assert contents(tmp_path / "killed") == whole
    assert len(kept) == 2 and all(p.stat().st_mtime_ns == then for p, then in kept.items())


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, whole):
    assert start(tmp_path, "full", how="full").wait() == 2
    out = (tmp_path / "out.txt").read_text()
    assert "cannot be written" in out and "room on the disk" in out
    assert start(tmp_path, "full").wait() == 0
    assert contents(tmp_path / "full") == whole


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": {"root": "there"}}, 'with root "here", now it is "there"'),
        ({"settings": {"root": "here", "more": 1}}, "with more null, now it is 1"),
        ({"chunk_frames": 4}, "with chunk_frames 16, now it is 4"),
        ({"shard_mb": 1}, "with shard_mb 256"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(tmp_path, change, told, finished):
    source = Arrays(some_clips(), () if finished else (5,))
    if finished:
        pack(source, tmp_path)
    else:
        with pytest.raises(UserError, match="clip 5.jpg is broken"):
            pack(source, tmp_path)
    with pytest.raises(UserError, match=told):
        pack(source, tmp_path, **change)
    with pytest.raises(UserError, match="number of clips 6, now it is 5"):
        pack(Arrays(some_clips()[1:]), tmp_path)
    with pytest.raises(UserError, match="with list of clips"):
        pack(Arrays(some_clips(frames=4)), tmp_path)


def test_finished_is_left_alone(tmp_path):
    pack(Arrays(some_clips()), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    pack(Arrays(some_clips()), tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}


def test_a_broken_clip_stops_and_can_be_mended(tmp_path):
    with pytest.raises(UserError, match="clip 2.jpg is broken"):
        pack(Arrays(some_clips(), broken=(2,)), tmp_path, chunk_frames=1)
    pack(Arrays(some_clips()), tmp_path, chunk_frames=1)
    assert_same(Arrays(some_clips()), open_packed(tmp_path))


def test_what_was_left_out_is_tried_again_where_nothing_may_be(tmp_path):
    with pytest.raises(UserError, match="more than config.data.max_bad=0.0"):
        pack(Arrays(some_clips(), broken=(2,)), tmp_path, on_error="skip")
    pack(Arrays(some_clips()), tmp_path)
    assert_same(Arrays(some_clips()), open_packed(tmp_path))


def test_broken_clips_are_left_out_and_counted(tmp_path, capsys):
    source = Arrays(some_clips(20), broken=(2, 7))
    skip = {"on_error": "skip", "chunk_frames": 1}
    with pytest.raises(UserError, match="more than config.data.max_bad=0.05"):
        pack(source, tmp_path, max_bad=0.05, **skip)
    # As soon as it is known: not at the end
    assert len(list((tmp_path / ".packing").glob("0*.json"))) == 4
    index = pack(source, tmp_path, max_bad=0.1, **skip)
    opened = open_packed(tmp_path)
    assert_same(Selection(source, [i for i in range(20) if i not in (2, 7)], []), opened)
    assert [name for name, _ in index.broken] == ["set/clip 2", "set/clip 7"]
    assert "2 of 20 clips of arrays are broken and left out: clip 2.jpg" in opened.notes[-1]
    assert "warning: clip set/clip 7 is left out: clip 7.jpg is broken" in capsys.readouterr().err
    verify_packed(tmp_path)


def test_two_at_a_time_are_refused(tmp_path):
    (tmp_path / ".packing").mkdir()
    with (tmp_path / ".packing/lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is packing into"):
            pack(Arrays(some_clips()), tmp_path)
    pack(Arrays(some_clips()), tmp_path)
