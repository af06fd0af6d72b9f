"""Damaged checkpoints: everything restored is what was saved, or it is said what is damaged."""

import json
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2_jax import arrays, base, checkpoint, integrity, judging, sharding
from sam2_jax.types import UserError

BASE = base.Base("/weights.pt", "0" * 32, ((("*",), 2, 1.0),))
ROOT = pathlib.Path(__file__).parents[1]
KEEP = checkpoint.Keep(2, best=1)
METRICS = {"eval/J&F": 0.25}
DATA = {"batches": 4, "clips": {"train": 30}}


def tree(seed: int) -> dict:
    a, b = jax.random.split(jax.random.key(seed))
    return {"neck": {"kernel": jax.random.normal(a, (64, 32)), "bias": jax.random.normal(b, (9,))}}


def rest() -> dict:
    return {"step": jnp.int32(4), "moments": (tree(1), ())}


def like(of: dict, fsdp: int = 1) -> dict:
    shapes = jax.eval_shape(lambda: of)
    mesh = sharding.make_mesh(-1, fsdp, 1)
    return sharding.with_shardings(shapes, sharding.tree_shardings(shapes, mesh))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A workdir with checkpoints 2 and 4, with every item that there can be."""
    workdir = tmp_path_factory.mktemp("run")
    with checkpoint.make_manager(workdir, KEEP) as manager:
        for step in (2, 4):
            checkpoint.save(manager, step, tree(0), rest(), DATA, tree(2), BASE)
            judging.judge(manager, step, METRICS)
    return workdir


def load(workdir: pathlib.Path):
    """Everything that a start reads, and opening the manager, as leaves and values."""
    params, optimizer, data = checkpoint.restore(workdir, 4, like(tree(0)), like(rest()))
    ema = checkpoint.restore_ema(workdir, 4, like(tree(2)))
    found = base.read(workdir / "checkpoints/4")
    checkpoint.make_manager(workdir, KEEP).close()
    return jax.device_get((params, optimizer, ema)), (data, found)


def same(found, wanted) -> bool:
    if found[1] != wanted[1] or jax.tree.structure(found[0]) != jax.tree.structure(wanted[0]):
        return False
    pairs = zip(jax.tree.leaves(found[0]), jax.tree.leaves(wanted[0]), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def damages(data: bytes, rng: random.Random, flips: int):
    """Copies of a file's bytes with one bit changed, cut off, emptied; None: it is gone."""
    for _ in range(flips):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
    yield from (data[: rng.randrange(len(data))], b"", None)


def try_damages(workdir: str) -> int:
    """Damages every file of a checkpoint in turn; returns how often that was told."""
    run, rng, told = pathlib.Path(workdir), random.Random(0), 0
    whole = load(run)
    values = list((run / "checkpoints/4").rglob("ocdbt.process_0/d/*"))
    for path in sorted(p for p in (run / "checkpoints/4").rglob("*") if p.is_file()):
        data = path.read_bytes()
        for bad in damages(data, rng, 4 if path in values else 1):
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            try:
                assert same(load(run), whole), f"{path} was restored as if it were whole"
            except UserError as error:
                assert "delete" in str(error) and len(str(error)) < 1000
                told += 1
            path.write_bytes(data)
    return told


def test_damage_is_told_or_harmless(run, tmp_path):
    # In a process of its own: where one array cannot be read Orbax leaves the coroutines of the
    # others unfinished, and Python would complain about them in any later test
    shutil.copytree(run, tmp_path / "run")
    code = "import sys; from tests import test_integrity as t; print(t.try_damages(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 50


def test_what_is_damaged_and_how_to_go_on(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    step = tmp_path / "run/checkpoints/4"
    sums = step / "sums/metadata"
    saved = json.loads(sums.read_text())
    saved["arrays"]["optimizer"]["moments/0/neck/bias"] ^= 1
    sums.write_text(json.dumps(saved))
    expected = r"checkpoints/4/optimizer .*values.*'moments/0/neck/bias'.*go on.* step 2"
    with pytest.raises(UserError, match=expected):
        load(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    with pytest.raises(UserError, match=r"there is no earlier checkpoint; delete .*/4 to begin"):
        load(tmp_path / "run")
    assert (step / "optimizer").is_dir()  # nothing is deleted for the user
    assert not (tmp_path / "run/checkpoints/2").exists()


def test_metrics_of_an_earlier_checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/checkpoints/2/metrics/metrics").write_text('{"eval/J&F": 0.75}')
    with pytest.raises(UserError, match="checkpoints/2/metrics .*which is not the last one"):
        checkpoint.make_manager(tmp_path / "run", KEEP)


def test_checkpoints_without_sums_are_taken(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4/sums")
    assert same(load(tmp_path / "run"), load(run))


def test_an_unknown_metric_is_the_worst(tmp_path):
    # checkpoint.best may change from one start to the next
    with checkpoint.make_manager(tmp_path, checkpoint.Keep(1, best=1)) as manager:
        checkpoint.save(manager, 1, tree(0), rest(), DATA)
        judging.judge(manager, 1, METRICS)
    keep = checkpoint.Keep(1, best=1, metric="eval/loss", lowest=True)
    for step, loss in ((2, 3.0), (3, 4.0)):
        with checkpoint.make_manager(tmp_path, keep) as manager:
            checkpoint.save(manager, step, tree(0), rest(), DATA)
            judging.judge(manager, step, {"eval/loss": loss})
    assert checkpoint.steps_of(tmp_path) == [2, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8"])
def test_a_sum_notices_every_bit_and_the_order(dtype):
    values = jax.random.normal(jax.random.key(0), (3, 5)).astype(dtype)
    whole = int(integrity.bit_sum(values))
    raw = np.asarray(values).tobytes()
    for bit in range(len(raw) * 8):
        other = bytearray(raw)
        other[bit // 8] ^= 1 << bit % 8
        changed = np.frombuffer(bytes(other), values.dtype).reshape(3, 5)
        assert int(integrity.bit_sum(changed)) != whole
    assert int(integrity.bit_sum(values[::-1])) != whole


def test_a_sum_is_that_of_any_layout():
    many = {"kernel": jax.random.normal(jax.random.key(0), (256, 256))}
    split = jax.device_put(many, jax.tree.map(lambda x: x.sharding, like(many, fsdp=4)))
    assert len(split["kernel"].sharding.device_set) == 4
    assert integrity.sums_of(many) == integrity.sums_of(split)


def test_part_of_an_item_is_verified_alone(run):
    folder = run / "checkpoints/4/params"
    part = {"neck": {"kernel": tree(0)["neck"]["kernel"]}}
    integrity.verify(folder, part)
    part["neck"]["kernel"] += 1
    with pytest.raises(UserError, match="not the values that were saved: 'neck/kernel'"):
        integrity.verify(folder, part)
    assert set(arrays.shapes(folder)) == {"neck/kernel", "neck/bias"}
