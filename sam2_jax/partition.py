"""A parameter tree in two: what is trained and what stays as it is.

Gradients are taken with respect to the first part alone. The second enters a step as constants, so
that the backward pass of, say, a frozen image encoder is never built.
"""

from collections.abc import Callable, Mapping

from sam2_jax.rules import Tree


def split(tree: Tree, chosen: Callable[[str], bool], prefix: str = "") -> tuple[Tree, Tree]:
    """(leaves whose slash path is `chosen`, the others), nested dicts without empty ones."""
    yes, no = {}, {}
    for name, sub in tree.items():
        path = f"{prefix}{name}"
        if not isinstance(sub, Mapping):
            (yes if chosen(path) else no)[name] = sub
            continue
        for part, kept in zip((yes, no), split(sub, chosen, f"{path}/"), strict=True):
            if kept:
                part[name] = kept
    return yes, no


def join(base: Tree, over: Tree) -> Tree:
    """The leaves of both trees; where both have one, that of `over`."""
    merged = dict(base)
    for name, sub in over.items():
        nested = isinstance(sub, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = join(merged[name], sub) if nested else sub
    return merged
