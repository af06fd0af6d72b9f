"""How the process of a script begins, before JAX is imported; hence this module does not import it.

Linux hands memory out in pages of 4 KB, each with a trap into the kernel when it is first touched.
A training step on a CPU asks for one block of some hundred MB to several GB and gives it back at
its end, so that every step pays for every page again: with `tiny` at 256 pixels and 4 frames half a
million traps, a quarter of the step. Pages of 2 MB make that a thousand. Where the kernel has them
for who asks (`madvise`, the default of many distributions), glibc 2.35 and newer asks if an
environment variable told it to when the process began.
"""

import os
import pathlib
import sys
from collections.abc import Mapping

PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES, HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
CACHE = pathlib.Path.home() / ".cache" / "sam2_jax"


def huge_pages(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the environment of a process must have, beside `environ`, to be given huge pages.

    Nothing where that is settled: the variable speaks of them already (glibc.malloc.hugetlb=0 is
    how to do without), or the kernel gives them always, or never.
    """
    given = environ.get(TUNABLES, "")
    if HUGE in given or not PAGES.exists() or "[madvise]" not in PAGES.read_text():
        return {}
    return {TUNABLES: ":".join(filter(None, [given, f"{HUGE}=1"]))}


def begin() -> None:
    """To be called by a script before it imports JAX, and anything else that takes long.

    Compiled programs are kept in ~/.cache/sam2_jax, or where JAX_COMPILATION_CACHE_DIR says. If
    that is how to get huge pages, the process begins anew: same number, same arguments; but not
    under a debugger, which would be lost.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    added = huge_pages()
    if added and sys.executable and not sys.gettrace() and "pydevd" not in sys.modules:
        os.environ.update(added)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
