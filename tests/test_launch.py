"""The scripts that launch: they run, pass arguments on, and name only settings that exist."""

import os
import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from configs import default, mixture
from sam2_jax import config as config_lib
from sam2_jax import stopping
from sam2_jax.model.variants import VARIANTS

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
ARGUMENTS = ["--config=configs/own.py:tiny", "--config.data.root=a b/$c", "--workdir=/shared/a"]

needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")


def run(
    script: str, arguments: list[str], folder: pathlib.Path, programs: dict[str, str], **env: str
) -> tuple[subprocess.CompletedProcess, str]:
    """Runs a script with stand-ins for other programs; also the log that these write."""
    for name, text in programs.items():
        path = folder / name
        path.write_text(f'#!/usr/bin/env bash\n{text}\necho "{name}: $*" >> "$LOG"\n')
        path.chmod(0o755)
    log = folder / "log"
    log.touch()
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(log), **env}
    command = ["bash", str(LAUNCH / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return done, log.read_text()


def slurm(
    folder: pathlib.Path, status: int, state: str = "RUNNING", **env: str
) -> tuple[subprocess.CompletedProcess, str]:
    programs = {
        "srun": f'printf "[%s]" "$@" "${{JAX_LOCAL_DEVICE_IDS:-}}"; exit {status}',
        "squeue": f"echo {state}",
        "scontrol": "",
    }
    return run("slurm.sh", ARGUMENTS, folder, programs, SLURM_JOB_ID="7", **env)


@needs_bash
def test_slurm_queues_again_what_was_stopped(tmp_path):
    done, log = slurm(tmp_path, stopping.STOPPED)
    assert done.returncode == stopping.STOPPED
    assert "scontrol: requeue 7" in log
    assert all(f"[{argument}]" in done.stdout for argument in ARGUMENTS)


@needs_bash
@pytest.mark.parametrize(
    ("status", "state"), [(stopping.STOPPED, "COMPLETING"), (0, "RUNNING"), (1, "RUNNING")]
)
def test_slurm_leaves_it_where_it_ended_otherwise(status, state, tmp_path):
    done, log = slurm(tmp_path, status, state)
    assert done.returncode == status
    assert "scontrol" not in log


@needs_bash
@pytest.mark.parametrize(("tasks", "devices"), [("1", "[0,1,2,3]"), ("4", "[]")])
def test_slurm_gives_one_process_a_node_all_devices(tasks, devices, tmp_path):
    done, _ = slurm(tmp_path, 0, SLURM_NTASKS_PER_NODE=tasks, SLURM_GPUS_ON_NODE="4")
    assert done.stdout.endswith(devices)


@needs_bash
def test_slurm_wants_a_workdir(tmp_path):
    done, _ = run("slurm.sh", ARGUMENTS[:2], tmp_path, {})
    assert done.returncode == 2
    assert "--workdir" in done.stderr


@needs_bash
def test_tpu_quotes_for_the_hosts(tmp_path):
    # Runs what it would run there, with a python that says its arguments
    host = tmp_path / "host"
    python = host / "sam2_jax/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "[%s]" "$@"\n')
    python.chmod(0o755)
    gcloud = f'cd "{host}" && command=${{*: -1}} && bash -c "${{command#--command=}}"'
    done, log = run(
        "tpu.sh", ["train", *ARGUMENTS], tmp_path, {"gcloud": gcloud}, TPU="slice", ZONE="here"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[scripts/train.py]" + "".join(f"[{x}]" for x in ARGUMENTS)
    assert "ssh slice --zone=here --worker=all" in log
    assert (host / "sam2_jax/.pid").read_text().strip().isdigit()


@needs_bash
def test_tpu_names_what_it_can_do(tmp_path):
    done, _ = run("tpu.sh", ["trian"], tmp_path, {}, TPU="slice", ZONE="here")
    assert done.returncode == 2
    assert "setup, train, stop" in done.stderr


def test_gke_starts_again_all_but_wrong_settings():
    text: Any = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    (slice_,) = text["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    side, other = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert chips == side * other
    path, arguments = config_lib.split_arguments(container["args"])
    config_lib.check_overrides(str(ROOT / path), arguments)
    assert f"--config.data.batch_size={chips}" in arguments
    claims = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claims


@pytest.mark.parametrize(
    "path",
    [*LAUNCH.iterdir(), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.py"), ROOT / "README.md"],
    ids=lambda path: path.name,
)
def test_what_is_written_about_exists(path):
    """Config files, variants, keys and scripts in commands."""
    text = path.read_text()
    keys = {*config_lib.flat_keys(default.get_config()), "a.b"}
    keys |= set(config_lib.flat_keys(mixture.get_config()))
    for key in re.findall(r"--config\.([\w.]*\w)", text):
        assert key in keys | {"data.mixture", "eval.sets.NAME"}, key
    for name, variant in re.findall(r"configs/(\w+)\.py(?::(\w+))?", text):
        assert name == "NAME" or (ROOT / "configs" / f"{name}.py").is_file(), name
        assert variant in {"", "VARIANT", *VARIANTS}, variant
    for script in re.findall(r"scripts/[\w/]+\.\w+", text):
        assert (ROOT / script).is_file(), script
