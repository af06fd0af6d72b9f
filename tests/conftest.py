"""Set-up of all tests: shape checks on every annotated call, four CPU devices, compile cache."""

import os
import pathlib

from tests import quick

# Before JAX starts: tests of sharding want several devices, and a machine may have one core.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{quick.XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}"

import jax
from jaxtyping import install_import_hook

# Functions of the package check shapes and dtypes of what they are given, as annotated.
install_import_hook("sam2_jax", "beartype.beartype")

jax.config.update("jax_num_cpu_devices", 4)
# Most of a test's time is compilation: keep the results, so that a second run is quick.
_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or pathlib.Path.home() / ".cache/sam2_jax"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Files in which a test takes a minute or more: they begin first, so that in the end no process is
# left with one of them while the others have nothing to do.
LONG = {
    "test_benchmark_work.py",
    "test_benchmark_workers.py",
    "test_compiled.py",
    "test_eval_loss.py",
    "test_objective.py",
    "test_optimizer.py",
    "test_precision.py",
    "test_processes.py",
    "test_track.py",
    "test_train_step.py",
    "test_training.py",
}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


def numbers(text: str) -> list[int]:
    """'0-3,7' to [0, 1, 2, 3, 7]."""
    spans = [part.split("-") for part in text.split(",")]
    return [i for span in spans for i in range(int(span[0]), int(span[-1]) + 1)]


def pytest_addoption(parser):
    # Of tests/parity; pytest reads options only from here
    about = "weights, clips and prompts, a number or several: 0-3,7"
    parser.addoption("--parity-seed", type=numbers, default=[0], help=about)
    parser.addoption("--parity-variant", default="nano", help="model size")
    parser.addoption("--parity-resolution", type=int, default=0, help="0: 64 for nano, else 256")
    parser.addoption("--parity-json", default="", help="file for the largest error of every part")
