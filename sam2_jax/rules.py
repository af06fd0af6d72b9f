"""Which parameters a setting means: ordered globs over slash paths.

Parameters are addressed by slash paths (`image_encoder/trunk/blocks_0/attn/qkv/kernel`). A rule is
a sequence of globs in fnmatch's sense (`*` crosses `/`); of several rules the first match wins.
"""

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

import jax

from sam2_jax.types import UserError

Tree = Any  # a nested dict of arrays, or what mirrors one


def path_of(keys: Sequence[Any]) -> str:
    """Slash path of a leaf from the key path that jax.tree_util gives."""

    def name(key: Any) -> str:  # of a dict, a NamedTuple, a sequence
        return str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))

    return "/".join(map(name, keys))


def paths_of(tree: Tree) -> list[str]:
    """Slash paths of all leaves, in the order of `jax.tree.leaves`."""
    return [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def match_rules(rules: Sequence[Sequence[str]], paths: Sequence[str], key: str) -> list[int]:
    """Index of the first rule (a sequence of globs) that matches each path.

    Raises `UserError`, which names `key`, if a path matches no rule or a glob takes no path.
    """
    used: set[tuple[int, str]] = set()
    result = []
    for path in paths:
        for index, globs in enumerate(rules):
            hits = [glob for glob in globs if fnmatch.fnmatchcase(path, glob)]
            if hits:
                used.update((index, glob) for glob in hits)
                result.append(index)
                break
        else:
            raise UserError(
                f"{key}: no rule matches parameter '{path}'; end the rules with one for '*'"
            )
    for index, globs in enumerate(rules):
        for glob in globs:
            if (index, glob) not in used:
                near = difflib.get_close_matches(glob, paths, n=1, cutoff=0.0)
                raise UserError(
                    f"{key}: '{glob}' matches no parameter that earlier rules leave"
                    + (f" (nearest parameter: '{near[0]}')" if near else "")
                )
    return result
