"""The stream of batches: the same for any number of workers and processes, and resumable."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import davis as davis_config
from sam2_jax.config import finish
from sam2_jax.data.pipeline import make_eval_source, make_train_loader, make_train_source
from sam2_jax.types import Batch, UserError


def config(**data):
    return ConfigDict(
        {
            "seed": 5,
            "model": {"resolution": 32},
            "data": {
                "source": "synthetic",
                "root": "",
                "eval_root": "",
                "num_frames": 3,
                "max_objects": 2,
                "batch_size": 4,
                "hflip": 0.5,
                "reverse": 0.5,
                "workers": 0,
                "synthetic": {
                    "num_clips": 10,
                    "max_objects": 2,
                    "eval_clips": 3,
                    "eval_frames": 5,
                    "speed": 1.0,
                },
            }
            | data,
        }
    )


def batches(settings, count, process_index=0, process_count=1, state=None):
    """Some batches, copied out of shared memory, and the iterator's state after them."""
    loader = make_train_loader(settings, make_train_source(settings), process_index, process_count)
    iterator = iter(loader)
    if state is not None:
        iterator.set_state(state)
    found = [Batch(*(np.array(a) for a in next(iterator))) for _ in range(count)]
    state = iterator.get_state()
    iterator.close()
    return found, state


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for left, right in zip(a, b, strict=True):
            np.testing.assert_array_equal(left, right)


def test_a_batch_is_what_the_model_takes():
    batch = batches(config(), 1)[0][0]
    assert batch.images.shape == (4, 3, 32, 32, 3) and batch.images.dtype == np.uint8
    assert batch.masks.shape == (4, 3, 2, 32, 32) and batch.masks.dtype == bool
    assert batch.valid.shape == (4, 2) and batch.valid[:, 0].all() and not batch.valid.all()
    assert (batch.masks[:, 0].any((2, 3)) == batch.valid).all()  # seen on the first frame
    assert not batch.masks[:, :, 1][~batch.valid[:, 1]].any()


def test_same_batches_for_any_number_of_workers():
    expected, _ = batches(config(), 4)
    assert_equal(batches(config(workers=2), 4)[0], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_exactly(workers):
    expected, _ = batches(config(), 5)
    _, state = batches(config(workers=workers), 2)
    assert_equal(batches(config(workers=workers), 3, state=state)[0], expected[2:])


def rows(found):
    return [row.tobytes() for batch in found for row in batch.images]


def test_processes_deal_out_the_stream_of_one():
    whole, _ = batches(config(), 5)
    shares = [batches(config(), 5, i, 2)[0] for i in range(2)]
    assert shares[0][0].images.shape[0] == 2
    assert not set(rows(shares[0])) & set(rows(shares[1]))
    for step in range(5):
        dealt = {row for share in shares for row in rows([share[step]])}
        assert dealt == set(rows([whole[step]]))


def test_an_epoch_is_a_permutation_and_the_next_one_differs():
    settings = config(batch_size=10, hflip=0.0, reverse=0.0, num_frames=5)
    source = make_train_source(settings)
    names = {source.read(i, [0])[0].tobytes(): i for i in range(10)}
    epochs = [[names[x.tobytes()] for x in b.images[:, :1]] for b in batches(settings, 3)[0]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_seed_changes_the_batches():
    other = config()
    other.seed = 6
    assert set(rows(batches(config(), 1)[0])).isdisjoint(rows(batches(other, 1)[0]))


def test_flip_and_reverse_happen():
    settings = config(batch_size=10, num_frames=5, hflip=0.0, reverse=0.0)
    plain = set(rows(batches(settings, 1)[0]))
    for key in ("hflip", "reverse"):
        changed = batches(config(batch_size=10, num_frames=5, **{"hflip": 0.0, "reverse": 0.0}
                                 | {key: 1.0}), 1)[0][0].images  # fmt: skip
        undone = changed[:, :, :, ::-1] if key == "hflip" else changed[:, ::-1]
        assert {np.ascontiguousarray(x).tobytes() for x in undone} == plain


def test_evaluation_clips_are_others_and_do_not_depend_on_the_seed():
    settings, other = config(), config()
    other.seed = 6
    held, train = make_eval_source(settings), make_train_source(settings)
    assert (len(held), held.video(0).num_frames) == (3, 5)
    np.testing.assert_array_equal(held.read(0, [0])[0], make_eval_source(other).read(0, [0])[0])
    seen = {train.read(i, [0])[0].tobytes() for i in range(10)}
    assert not seen & {held.read(i, [0])[0].tobytes() for i in range(3)}


def test_folders(davis, flat):
    settings = config(source="folder", root=str(davis))
    batch = batches(settings, 1)[0][0]
    assert batch.images.shape == (4, 3, 32, 32, 3) and batch.valid[:, 0].all()
    assert len(make_eval_source(settings)) == 1
    apart = config(source="folder", root=str(davis), eval_root=str(flat))
    assert len(make_eval_source(apart)) == 3


def test_tfds_with_a_folder_as_root_reads_the_folder(davis):
    settings = davis_config.get_config("nano")
    settings.data.root = str(davis)
    settings = finish(settings)
    assert (len(make_train_source(settings)), len(make_eval_source(settings))) == (2, 1)


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="config.data.source is 'cloud'"):
        make_train_source(config(source="cloud"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="no prepared davis/480p"):
        make_eval_source(config(source="tfds"))
    with pytest.raises(UserError, match="config.data.batch_size is 4.*3 process"):
        make_train_loader(config(), make_train_source(config()), 0, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_during_training_is_named(flat, workers):
    settings = config(source="folder", root=str(flat), workers=workers)
    source = make_train_source(settings)
    for path in flat.glob("JPEGImages/*/*.jpg"):
        path.write_bytes(path.read_bytes()[:400])
    iterator = iter(make_train_loader(settings, source))
    with pytest.raises(UserError, match=r"\d+\.jpg cannot be decoded"):
        next(iterator)
    iterator.close()


TRAINER = """
import json, multiprocessing, sys, time
from ml_collections import ConfigDict
from sam2_jax.data.pipeline import make_train_loader, make_train_source
settings = ConfigDict(json.loads(sys.argv[1]))
iterator = iter(make_train_loader(settings, make_train_source(settings)))
next(iterator)
print(multiprocessing.active_children()[0].pid, flush=True)
time.sleep(600)
"""


def running(pid):
    """Is there such a process, and not only its exit status?"""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_workers_end_with_a_killed_trainer():
    command = [sys.executable, "-c", TRAINER, config(workers=1).to_json()]
    root = pathlib.Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout
        worker = int(trainer.stdout.readline())
        assert running(worker)
        trainer.kill()
    deadline = time.monotonic() + 10
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.2)
    survived = running(worker)
    if survived:
        os.kill(worker, signal.SIGKILL)
    assert not survived
