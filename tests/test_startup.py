"""How the process of a script begins."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from sam2_jax import startup

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = """
import json, os, pathlib, sys
sys.path.insert(0, {root!r})
from sam2_jax import startup
startup.PAGES = pathlib.Path({pages!r})
started = os.environ.setdefault("STARTED", str(os.getpid()))
startup.begin()
told = [os.getpid() == int(started), sys.argv[1:], sys.flags.dev_mode, "jax" in sys.modules]
cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
print(json.dumps([*told, os.environ.get(startup.TUNABLES), cache]))
"""


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A function that sets what the kernel says of huge pages."""

    def say(text: str | None) -> pathlib.Path:
        path = tmp_path / "enabled"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(startup, "PAGES", path)
        return path

    return say


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_nothing_to_ask_for(pages, text):
    pages(text)
    assert startup.huge_pages({}) == {}


def test_asks_where_the_kernel_wants_to_be_asked(pages):
    pages("always [madvise] never\n")
    assert startup.huge_pages({}) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    other = {"GLIBC_TUNABLES": "glibc.malloc.check=3"}
    both = "glibc.malloc.check=3:glibc.malloc.hugetlb=1"
    assert startup.huge_pages(other) == {"GLIBC_TUNABLES": both}
    assert startup.huge_pages({"GLIBC_TUNABLES": both}) == {}
    assert startup.huge_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) == {}


@pytest.mark.parametrize("given", [None, "glibc.malloc.hugetlb=0"])
def test_begins_anew_once_with_the_same_arguments(pages, tmp_path, given):
    path = pages("always [madvise] never\n")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), pages=str(path)))
    env = {name: x for name, x in os.environ.items() if name != startup.TUNABLES}
    env |= {startup.TUNABLES: given} if given else {}
    cache = env.setdefault("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-X", "dev", str(script), "--a=1", "b c"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    expected = given or "glibc.malloc.hugetlb=1"
    assert json.loads(done.stdout) == [True, ["--a=1", "b c"], True, False, expected, cache]
