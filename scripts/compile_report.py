"""Compiles the true train step for a machine that is not there, and says what it would take.

  python scripts/compile_report.py --config=configs/mose.py:base_plus --topology=h100:8
  python scripts/compile_report.py --config=configs/mose.py:base_plus --topology=v5p:4x4x4 \
      --videos_per_device=1 --config.mesh.fsdp=8 --config.train.remat=full --table
  python scripts/compile_report.py --config=configs/mose.py:large --topology=v5e:4x4 \
      --videos_per_device=1 --suggest

Prints one JSON object; nothing is run and no data are read. --topology is a slice of TPUs (v5e:4x4,
v5p:2x2x4, v6e:4x4), GPUs (h100:8, a100:16) or forced devices of a CPU (cpu:8); docs/scaling.md
tells what the numbers mean. `pip install -e '.[tpu]'` or '.[cuda]' brings the compilers, which need
no accelerator.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for `import configs`
os.environ["JAX_PLATFORMS"] = "cpu"  # a device that is here is not asked for anything

import json
from typing import Any

import jax
from absl import flags

from sam2_jax import compiled, memory_estimate, sharding, suggest, topology
from sam2_jax import config as config_lib
from sam2_jax.types import UserError

_TOPOLOGY = flags.DEFINE_string("topology", "", "The machine: v5e:4x4, h100:8, cpu:8 ...")
_TABLE = flags.DEFINE_bool("table", False, "For a person instead of JSON.")
_SUGGEST = flags.DEFINE_bool(
    "suggest", False, "Tries recomputation, parts of a batch and meshes; ranks those that fit."
)
_ATTENTION = flags.DEFINE_string(
    "attention",
    "",
    "The same as --config.model.attention; attention to earlier frames is by blocks with xla, too.",
)
_VIDEOS = flags.DEFINE_integer(
    "videos_per_device",
    None,
    "Sets data.batch_size, or that of every source of a mixture, to so many times data * fsdp.",
)


def settle(config: Any, target: topology.Target) -> None:
    """Brings the flags into the config."""
    config.unlock()
    if _ATTENTION.value:
        config.model.attention = _ATTENTION.value
    if _VIDEOS.value is not None:
        if _VIDEOS.value < 1:
            raise UserError(f"--videos_per_device={_VIDEOS.value} must be at least 1")
        m = config.mesh
        data, fsdp, _ = sharding.mesh_shape(m.data, m.fsdp, m.model, len(target.devices))
        for source in memory_estimate.sources(config).values():
            source.batch_size = _VIDEOS.value * data * fsdp
    config_lib.finish(config)


def main(config: Any) -> None:
    """Prints the report, or with --suggest those of the settings that were tried."""
    if not _TOPOLOGY.value:
        raise UserError(f"--topology is not given: which machine? There are {topology.names()}")
    # What is compiled for a machine that is not there cannot be read back
    jax.config.update("jax_enable_compilation_cache", False)
    target = topology.open_target(_TOPOLOGY.value)
    settle(config, target)
    if _SUGGEST.value:
        found = suggest.search(config, target, lambda text: print(text, file=sys.stderr))
        print(suggest.as_table(found) if _TABLE.value else json.dumps(found, indent=1))
        return
    found = compiled.report(config, target)
    print(suggest.report_table(found) if _TABLE.value else json.dumps(found, indent=1))


if __name__ == "__main__":
    config_lib.run(main)
