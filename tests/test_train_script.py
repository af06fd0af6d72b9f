"""scripts/train.py: what it joins and what it refuses before it starts."""

import errno
import functools
import importlib.util
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from jax._src.clusters import cloud_tpu_cluster

from sam2_jax import checkpoint, cluster, convert, preparing, stopping, weights
from sam2_jax import config as config_lib
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]


@functools.cache  # its flags can be defined once
def load() -> Any:
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "scripts/train.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    module = load()
    flags.FLAGS.mark_as_parsed()
    yield module
    flags.FLAGS.unparse_flags()


@pytest.fixture
def joined(script, monkeypatch) -> list:
    """Gets an entry for every call of jax.distributed.initialize; no launcher is seen."""
    for name in (*cluster.LAUNCHERS, "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: calls.append(1))
    return calls


def tpu_vm(monkeypatch, answer) -> None:
    """A Cloud TPU VM whose metadata server gives `answer(key)`."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (answer(key), 200))


@pytest.mark.parametrize("hosts", [1, 2])
def test_cloud_tpu_vms_find_each_other(script, joined, monkeypatch, hosts):
    about = {
        "agent-worker-number": "0",
        "worker-network-endpoints": ",".join(["a:0:10.0.0.2", "b:1:10.0.0.3"][:hosts]),
        "tpu-env": "",
    }
    tpu_vm(monkeypatch, about.__getitem__)
    script.connect()
    assert len(joined) == (hosts > 1)


@pytest.mark.parametrize(
    ("name", "value", "joins"),
    [
        ("TPU_WORKER_HOSTNAMES", "a,b", True),
        ("TPU_WORKER_HOSTNAMES", "localhost", False),
        ("SLURM_STEP_NUM_TASKS", "2", True),
        ("SLURM_STEP_NUM_TASKS", "1", False),
    ],
)
def test_launchers_are_seen(script, joined, monkeypatch, name, value, joins):
    monkeypatch.setenv(name, value)
    script.connect()
    assert bool(joined) == joins


def test_a_silent_metadata_server_is_named(script, joined, monkeypatch):
    def answer(key):
        raise ConnectionError

    tpu_vm(monkeypatch, answer)
    with pytest.raises(UserError, match="TPU_SKIP_MDS_QUERY"):
        script.connect()


def test_a_launcher_that_jax_does_not_know_is_named(script, joined, monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="--coordinator_address, --num_processes"):
        script.connect()


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_weights_are_checked_before_the_run(script, tmp_path, version):
    model = make_sam2("nano", 64, version)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    state = convert.hollow_reference(shapes)
    weights.write(tmp_path / "w.safetensors", state)
    config = config_lib.load_file(str(ROOT / "configs/smoke.py"))
    config.data.batch_size = jax.device_count()
    config.checkpoint.init_from = str(tmp_path / "w.safetensors")
    with flagsaver.flagsaver(workdir=str(tmp_path / "run")):
        if version == "2.1":
            assert script.prepare(config).latest is None
        else:
            with pytest.raises(UserError, match=r"looks like nano 2\.0.*model\.version=2\.0"):
                script.prepare(config)


@pytest.fixture
def started(script, tmp_path, monkeypatch) -> Iterator[list]:
    """The runs that `main` starts to train in tmp_path/run; nothing of them is made."""
    runs = []
    monkeypatch.setattr(cluster, "agree", lambda *args: None)
    monkeypatch.setattr(preparing, "same_everywhere", lambda *args: None)
    monkeypatch.setattr(script.catalogue, "make_train_loader", lambda *args: mock.Mock())
    monkeypatch.setattr(script, "train_on", lambda config, run, batches: runs.append(run))

    def prepare(config, workdir):
        return mock.Mock(workdir=workdir, latest=checkpoint.latest_step(workdir))

    monkeypatch.setattr(preparing, "prepare", prepare)
    with flagsaver.flagsaver(workdir=str(tmp_path / "run")):
        yield runs


def test_a_run_that_ends_meanwhile_is_gone_on_with(script, started, tmp_path, monkeypatch):
    """It saves after this one has looked for its last checkpoint, and before this one has it."""
    take = stopping.take
    config = config_lib.load_file(str(ROOT / "configs/smoke.py"))

    def ended(workdir):
        (workdir / "checkpoints/40").mkdir(parents=True)
        return take(workdir)

    script.main(config)
    monkeypatch.setattr(stopping, "take", ended)
    script.main(config)
    assert [run.latest for run in started] == [None, 40]


def test_a_disk_that_is_still_full_at_the_start(script, started, monkeypatch):
    def full(workdir):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stopping, "take", full)
    with pytest.raises(checkpoint.Unwritten, match="disk is full"):
        script.main(config_lib.load_file(str(ROOT / "configs/smoke.py")))
    assert not started


def test_the_summary_lists_what_is_there(script, tmp_path, capsys):
    for name in ("overlay.png", "overlay-far.png", "metrics.jsonl"):
        (tmp_path / name).touch()
    script.summarise(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        str(tmp_path / name) for name in ("overlay-far.png", "overlay.png", "metrics.jsonl")
    ]


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_is_no_workdir(script, tmp_path, monkeypatch, scheme):
    monkeypatch.chdir(tmp_path)
    config = config_lib.load_file(str(ROOT / "configs/smoke.py"))
    with (
        flagsaver.flagsaver(workdir=f"{scheme}://bucket/run"),
        pytest.raises(UserError, match=f"--workdir={scheme}://bucket/run is no folder: .*mount"),
    ):
        script.prepare(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_workdir_that_is_a_file_is_one_line(tmp_path, below):
    (tmp_path / "notes.txt").write_text("mine")
    command = [sys.executable, "scripts/train.py", "--config=configs/smoke.py"]
    command += [f"--workdir={tmp_path / 'notes.txt'}{below}", "--config.mesh.fsdp=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "notes.txt is a file, not a folder" in done.stderr
