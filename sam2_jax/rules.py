"""Which parameters a setting means: ordered selectors over slash paths.

Parameters are addressed by slash paths (`image_encoder/trunk/blocks_0/attn/qkv/kernel`). A rule is
a sequence of selectors; of several rules the first match wins. A selector is a glob in fnmatch's
sense (`*` crosses `/`), or `class:NAME` for what a module of exactly that class holds itself.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from sam2_jax.types import UserError

Tree = Any  # a nested dict of arrays, or what mirrors one
CLASS = "class:"


def nearest(word: str, words: Sequence[str]) -> str:
    """The most similar of `words`."""
    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]


def path_of(keys: Sequence[Any]) -> str:
    """Slash path of a leaf from the key path that jax.tree_util gives."""

    def name(key: Any) -> str:  # of a dict, a NamedTuple, a sequence
        return str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))

    return "/".join(map(name, keys))


def paths_of(tree: Tree) -> list[str]:
    """Slash paths of all leaves, in the order of `jax.tree.leaves`."""
    return [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def check_selectors(key: str, selectors: Any) -> None:
    """Raises `UserError`, which names `key`, unless it is a tuple of strings, or JSON's list."""
    if isinstance(selectors, tuple | list) and all(isinstance(x, str) for x in selectors):
        return
    raise UserError(
        f"{key}={selectors!r} must be a tuple of globs, strings such as ('image_encoder/*',)"
    )


def match_some(
    rules: Sequence[Sequence[str]],
    paths: Sequence[str],
    key: str,
    classes: Mapping[str, str] | None = None,
) -> list[int | None]:
    """Index of the first rule (a sequence of selectors) that takes each path, None if none does.

    `classes` tells the class of each module by its slash path. Raises `UserError`, which names
    `key`, for a selector that takes no path.
    """
    holders = [(classes or {}).get(path.rpartition("/")[0]) for path in paths]

    def taker(selector: str) -> Callable[[str, str | None], bool]:
        if selector.startswith(CLASS):
            return lambda path, holder: holder == selector.removeprefix(CLASS)
        glob = re.compile(fnmatch.translate(selector))
        return lambda path, holder: glob.match(path) is not None

    takers = [[(selector, taker(selector)) for selector in selectors] for selectors in rules]
    used: set[tuple[int, str]] = set()
    result: list[int | None] = []
    for path, holder in zip(paths, holders, strict=True):
        hits = ([s for s, takes in rule if takes(path, holder)] for rule in takers)
        first = next(((number, taken) for number, taken in enumerate(hits) if taken), None)
        result.append(first[0] if first else None)
        if first:
            used.update((first[0], selector) for selector in first[1])
    for number, selectors in enumerate(rules):
        for selector in selectors:
            if (number, selector) in used:
                continue
            name = selector.removeprefix(CLASS)
            known = sorted({holder for holder in holders if holder})
            if selector.startswith(CLASS) and name not in known:
                raise UserError(
                    f"{key}: no module of class '{name}' holds parameters: those that do are "
                    f"{', '.join(known) or 'not known here'}"
                )
            if any(map(taker(selector), paths, holders)):
                raise UserError(
                    f"{key}: '{selector}' matches no parameter that earlier rules leave: put it "
                    "before them, or leave it out"
                )
            near = f" (nearest parameter: '{nearest(selector, paths)}')" if paths else ""
            raise UserError(f"{key}: '{selector}' matches no parameter{near}")
    return result


def match_rules(
    rules: Sequence[Sequence[str]],
    paths: Sequence[str],
    key: str,
    classes: Mapping[str, str] | None = None,
) -> list[int]:
    """As `match_some`, but every path must be taken: `UserError`, which names `key`, otherwise."""
    result: list[int] = []
    for path, index in zip(paths, match_some(rules, paths, key, classes), strict=True):
        if index is None:
            raise UserError(
                f"{key}: no rule matches parameter '{path}'; end the rules with one for '*'"
            )
        result.append(index)
    return result
