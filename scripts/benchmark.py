"""Measures the system beside the reference (facebookresearch/sam2), where that is installed.

  python scripts/benchmark.py step --variant=tiny --resolution=256 --json=step.json
  python scripts/benchmark.py step --variant=base_plus --work-only
  python scripts/benchmark.py inference --variant=tiny --resolution=512 --objects=1,3
  python scripts/benchmark.py compile --variant=nano
  python scripts/benchmark.py loop --variant=nano
  python scripts/benchmark.py data --data_root=DAVIS --json=data.json
  python scripts/benchmark.py plot --json a.json b.json --output=cost.png

COMMAND is one of: compile, data, inference, loop, plot, step; `benchmark.py COMMAND --help` tells
its flags.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for `import configs`

import functools

from configs import default
from sam2_jax.benchmarks import compiling, data, inference, looping, plot, step
from sam2_jax.types import UserError, fail

COMMANDS = {
    "compile": functools.partial(compiling.run, default.get_config),
    "data": data.run,
    "inference": inference.run,
    "loop": functools.partial(looping.run, default.get_config),
    "plot": plot.run,
    "step": functools.partial(step.run, default.get_config),
}


def main(argv: list[str]) -> None:
    """Runs the command that the first argument names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] not in COMMANDS:
        raise UserError(f"unknown command '{argv[0]}', expected one of {', '.join(COMMANDS)}")
    else:
        COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(fail(error))
