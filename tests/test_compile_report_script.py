"""scripts/compile_report.py: what it refuses, in one line; see test_compiled.py for its numbers."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--topology is not given: which machine? There are v5e:1x1"),
        (["--topology=v9:2x2"], "'v9' is unknown, did you mean"),
        (["--topology=cpu:3"], "data.batch_size=8 must be a multiple of"),
        (["--topology=cpu:4", "--config.mesh.fsdp=3"], "mesh.fsdp=3"),
        (["--topology=cpu:2", "--videos_per_device=0"], "--videos_per_device=0 must be"),
        (
            ["--topology=cpu:2", "--videos_per_device=1", "--config.mesh.model=0"],
            "mesh.model=0: each",
        ),
        (["--topology=cpu:2", "--attention=flesh"], "did you mean 'flash'"),
        (["--topology=cpu:2", "--suggest"], "the memory of cpu:2 is not known"),
    ],
)
def test_it_says_in_one_line_what_is_wrong(arguments, words):
    command = [sys.executable, "scripts/compile_report.py", "--config=configs/mose.py:tiny"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and words in lines[0]
