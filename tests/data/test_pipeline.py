"""The stream of batches: the same for any number of workers and processes, and resumable."""

import collections
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from configs import davis as davis_config
from configs import default
from sam2_jax.config import finish
from sam2_jax.data.augment import AugmentSettings
from sam2_jax.data.catalogue import make_eval_source, make_parts, make_train_loader
from sam2_jax.data.pipeline import MakeExample, Part, describe
from sam2_jax.data.sampling import Sampling
from sam2_jax.types import Batch, UserError
from tests.data.arrays import Arrays


def config(**data):
    """Rendered clips, mirrored and reversed; `data` are changes by flat key of config.data."""
    c = default.get_config("nano")
    c.seed = 5
    c.model.resolution = 32
    c.data.source = "synthetic"
    default.plain(c.data)
    c.data.update_from_flattened_dict(
        {
            "num_frames": 3,
            "max_objects": 2,
            "batch_size": 4,
            "reverse": 0.5,
            "synthetic.num_clips": 10,
            "synthetic.max_objects": 2,
            "synthetic.eval_clips": 3,
            "synthetic.eval_frames": 5,
        }
        | data
    )
    return c


def mixed(**data):
    """Video, images and more video, of other shapes and shares."""
    c = config(**data)
    for name, changes in {
        "video": {"weight": 0.5},
        "images": {"weight": 0.3, "num_frames": 1, "max_objects": 4, "batch_size": 6},
        "more": {"weight": 0.2, "num_frames": 2, "batch_size": 2, "multiplier": 1.5},
    }.items():
        entry = default.source()
        default.plain(entry)
        entry.source = "synthetic"
        entry.update_from_flattened_dict({"synthetic.num_clips": 10} | changes)
        c.data.mixture[name] = entry
    return c


def loader(settings, process_index=0, process_count=1):
    parts = make_parts(settings)
    return make_train_loader(settings, parts, process_index, process_count)


def batches(settings, count, process_index=0, process_count=1, state=None):
    """Some batches, copied out of shared memory, and the loader's state after them."""
    stream = loader(settings, process_index, process_count)
    if state is not None:
        stream.set_state(state)
    found = [Batch(*(np.array(a) for a in next(stream))) for _ in range(count)]
    state = stream.get_state()
    stream.close()
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


@pytest.mark.parametrize("settings", [config, mixed])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0), (0, 3)])
def test_resumes_exactly_with_any_number_of_workers(settings, before, after):
    expected, _ = batches(settings(), 9)
    _, state = batches(settings(workers=before), 4)
    state = json.loads(json.dumps(state))
    assert_equal(batches(settings(workers=after), 5, state=state)[0], expected[4:])


@pytest.mark.parametrize("draw", ["interleave", "random"])
def test_a_mixture_has_batches_of_several_shapes(draw):
    settings = mixed(draw=draw)
    stream = loader(settings)
    shapes = {"video": (1, 8, 3), "images": (6, 1, 4), "more": (2, 2, 3)}
    names = [stream.source_of(n) for n in range(20)]
    for name, batch in zip(names, batches(settings, 20)[0], strict=True):
        assert batch.masks.shape[:3] == shapes[name]
        assert batch.images.shape[:2] == shapes[name][:2] and batch.valid[:, 0].all()
    assert set(names) == set(shapes)
    if draw == "interleave":
        assert collections.Counter(names) == {"video": 10, "images": 6, "more": 4}


def test_clips_of_a_batch_are_known_by_name():
    settings = config(**{"augment.hflip": 0.0}, batch_size=4, reverse=0.0, num_frames=5)
    source = make_parts(settings)[0].source
    names = {source.read(i, [0], ())[0].tobytes(): source.video(i).name for i in range(10)}
    stream = loader(settings)
    for position, batch in enumerate(batches(settings, 6)[0]):
        found = [names[np.ascontiguousarray(x).tobytes()] for x in batch.images[:, :1]]
        assert stream.clips_of(position) == found
    assert loader(mixed()).clips_of(3) and len(loader(settings, 1, 2).clips_of(0)) == 4


def test_another_number_of_processes_goes_on_with_the_same_clips():
    settings = mixed()
    for entry in settings.data.mixture.values():
        entry.batch_size = 2
    _, state = batches(settings, 3)
    expected, _ = batches(settings, 8)
    shares = [batches(settings, 5, i, 2, state)[0] for i in range(2)]
    for step in range(5):
        dealt = [row for share in shares for row in rows([share[step]])]
        assert dealt == rows([expected[3 + step]])


def test_a_changed_source_is_not_gone_on_with():
    _, state = batches(config(), 2)
    with pytest.raises(UserError, match=r'"train": 10.* clips at the checkpoint, .*"train": 11'):
        loader(config(**{"synthetic.num_clips": 11})).set_state(state)


def rows(found):
    return [row.tobytes() for batch in found for row in batch.images]


def test_processes_deal_out_the_stream_of_one():
    whole, _ = batches(config(), 5)
    shares = [batches(config(), 5, i, 2)[0] for i in range(2)]
    assert shares[0][0].images.shape[0] == 2
    assert not set(rows(shares[0][:1])) & set(rows(shares[1][:1]))
    for step in range(5):
        dealt = [row for share in shares for row in rows([share[step]])]
        assert dealt == rows([whole[step]])  # each at the place that it has there


def test_an_epoch_is_a_permutation_and_the_next_one_differs():
    settings = config(**{"augment.hflip": 0.0}, batch_size=10, reverse=0.0, num_frames=5)
    source = make_parts(settings)[0].source
    names = {source.read(i, [0], ())[0].tobytes(): i for i in range(10)}
    epochs = [[names[x.tobytes()] for x in b.images[:, :1]] for b in batches(settings, 3)[0]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_seed_changes_the_batches():
    other = config()
    other.seed = 6
    assert set(rows(batches(config(), 1)[0])).isdisjoint(rows(batches(other, 1)[0]))


def test_flip_and_reverse_happen():
    still = {"augment.hflip": 0.0, "reverse": 0.0, "num_frames": 5, "batch_size": 10}
    plain = set(rows(batches(config(**still), 1)[0]))
    for key in ("augment.hflip", "reverse"):
        changed = batches(config(**still | {key: 1.0}), 1)[0][0].images
        undone = changed[:, ::-1] if key == "reverse" else changed[:, :, :, ::-1]
        assert {np.ascontiguousarray(x).tobytes() for x in undone} == plain


def test_evaluation_clips_are_others_and_do_not_depend_on_the_seed():
    settings, other = config(), config()
    other.seed = 6
    held, again = make_eval_source(settings), make_eval_source(other)
    train = make_parts(settings)[0].source
    assert held and again and (len(held), held.video(0).num_frames) == (3, 5)
    np.testing.assert_array_equal(held.read(0, [0], ())[0], again.read(0, [0], ())[0])
    seen = {train.read(i, [0], ())[0].tobytes() for i in range(10)}
    assert not seen & {held.read(i, [0], ())[0].tobytes() for i in range(3)}


def test_folders(davis, flat):
    settings = config(source="folder", root=str(davis))
    batch = batches(settings, 1)[0][0]
    assert batch.images.shape == (4, 3, 32, 32, 3) and batch.valid[:, 0].all()
    evaluated = make_eval_source(settings)
    assert evaluated and len(evaluated) == 1
    apart = make_eval_source(config(source="folder", root=str(davis), eval_root=str(flat)))
    assert apart and len(apart) == 3


def test_evaluation_is_left_out_where_there_is_nothing_for_it():
    settings = mixed()
    settings.data.source = "folder"
    assert make_eval_source(settings) is None


def test_tfds_with_a_folder_as_root_reads_the_folder(davis):
    settings = davis_config.get_config("nano")
    settings.data.root = str(davis)
    settings = finish(settings)
    evaluated = make_eval_source(settings)
    assert len(make_parts(settings)[0].source) == 2 and evaluated and len(evaluated) == 1


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="no prepared davis/480p"):
        make_eval_source(config(source="tfds"))
    with pytest.raises(UserError, match="config.data.batch_size of train is 4.*3 process"):
        loader(config(), 0, 3)
    settings = mixed()
    settings.data.mixture.video.weight = 0.6
    with pytest.raises(UserError, match="sum to 1.1"):
        loader(settings)


def cut_short(paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_during_training_is_named(flat, workers):
    settings = config(source="folder", root=str(flat), workers=workers)
    stream = loader(settings)
    cut_short(flat.glob("JPEGImages/*/*.jpg"))
    with pytest.raises(UserError, match=r"\d+\.jpg"):
        next(stream)
    stream.close()


def test_a_clip_that_breaks_is_replaced_if_asked_for(flat, capfd):
    settings = config(source="folder", root=str(flat), on_error="skip", max_bad=1.0)
    settings.data.eval_root = str(flat)  # all three clips are trained on
    stream = loader(settings)
    cut_short((flat / "JPEGImages" / "bee").glob("*.jpg"))
    first = next(stream)
    assert first.images.shape[0] == 4 and first.valid[:, 0].all()
    again = loader(settings)  # opened anew, bee is found broken and left out
    stream.close()
    assert "another takes its place" in capfd.readouterr().err
    assert again.get_state()["clips"] == {"train": 2}


def test_too_many_broken_clips_stop_all_the_same(flat):
    settings = config(source="folder", root=str(flat), on_error="skip", max_bad=0.01)
    stream = loader(settings)
    cut_short(flat.glob("JPEGImages/*/*.jpg"))
    with pytest.raises(UserError, match=r"more than config\.data\.max_bad=0\.01"):
        next(stream)
    stream.close()


def spoiled(count, bad, max_bad):
    """A `MakeExample` of clips of which the first ones cannot be read."""
    mask = np.ones((8, 8), bool)
    source = Arrays([[{1: mask}] for _ in range(count)], broken=tuple(range(bad)))
    part = Part("train", source, Sampling(1, 1), AugmentSettings(), 1)
    return MakeExample(part, 16, "skip", max_bad)


def test_a_clip_that_is_met_again_is_no_other_broken_clip():
    make = spoiled(200, bad=2, max_bad=0.01)
    for epoch in range(4):
        for index in range(200):
            make(index, np.random.default_rng((epoch, index)))
    make = spoiled(200, bad=3, max_bad=0.01)
    with pytest.raises(UserError, match=r"3 of 200 clips of train .*max_bad=0\.01"):
        for index in range(200):
            make(index, np.random.default_rng(index))


def test_the_search_for_a_clip_that_can_be_read_ends():
    with pytest.raises(UserError, match="5 of 5 clips"):
        spoiled(5, bad=5, max_bad=1.0)(0, np.random.default_rng(0))


def test_the_table_says_what_random_draws_come_to():
    parts = [
        Part(name, Arrays([[{1: np.ones((8, 8), bool)}]] * n), Sampling(1, 1), AugmentSettings(), 1)
        for name, n in (("few", 10), ("many", 30))
    ]
    parts = [p._replace(weight=w) for p, w in zip(parts, (0.8, 0.2), strict=True)]
    for draw, shares in (("interleave", ("80.0%", "20.0%")), ("random", ("25.0%", "75.0%"))):
        told = [text for label, text in describe(parts, draw) if label.endswith("share")]
        assert [text.split()[0] for text in told] == list(shares)


def test_other_clips_of_the_same_number_are_another_stream(flat):
    settings = config(source="folder", root=str(flat), eval_root=str(flat))
    state = json.loads(json.dumps(loader(settings).get_state()))
    loader(settings).set_state(state)
    loader(settings).set_state({key: state[key] for key in ("batches", "clips")})
    for kind in ("JPEGImages", "Annotations"):
        (flat / kind / "bee").rename(flat / kind / "bug")
    with pytest.raises(UserError, match="of other names"):
        loader(settings).set_state(state)


def test_settings_of_the_training_folder_do_not_apply_to_another(flat, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(flat, other)
    frames = make_eval_source(config(source="folder", root=str(flat), eval_root=str(other)))
    changes = {"folder.sample_rate": 2, "folder.single_object": True}
    settings = config(source="folder", root=str(flat), eval_root=str(other), **changes)
    found = make_eval_source(settings)
    assert found and frames
    assert [found.video(i) for i in range(len(found))] == [
        frames.video(i) for i in range(len(frames))
    ]
    settings.data.eval_root = ""
    own = make_eval_source(settings)
    assert own and "/" in own.video(0).name


TRAINER = """
import multiprocessing, time
from configs import smoke
from sam2_jax.data.catalogue import make_parts, make_train_loader
settings = smoke.get_config()
settings.data.workers = 1
stream = make_train_loader(settings, make_parts(settings))
next(stream)
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
    command = [sys.executable, "-c", TRAINER]
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_ends_no_worker(number):
    """Not at its birth, when it has not come to ignoring signals yet, and not later."""

    def send() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.001)
        os.kill(workers[0].pid or 0, number)

    sender = threading.Thread(target=send)
    sender.start()
    stream = loader(config(workers=1))
    next(stream)
    sender.join()
    (worker,) = multiprocessing.active_children()
    assert worker.pid
    os.kill(worker.pid, number)
    worker.join(3)
    assert worker.is_alive()
    stream.close()
