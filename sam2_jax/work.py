"""Floating-point operations of a function, counted over its jaxpr.

XLA's own cost analysis counts the body of a loop once and all branches of a conditional. Here the
program is walked as it would run: what follows from values that are known (a plan, a counter, an
index: small arrays) is computed, all else is a shape. So a loop's body is walked once for each
turn, a conditional's branch is the one that is taken, and the work of a step is known for a plan.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from sam2_jax.kernel_work import KERNELS, dot_work

# Arrays of more elements are shapes: no decision hangs on them. Of floats that is few, such as one
# random number for each frame: every small table of the model would be computed in vain.
SMALL, SMALL_FLOAT = 4096, 64
DOT, CONV = "dot_general", "conv_general_dilated"
# What runs a jaxpr once, and the parameter that holds it
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


class Work(NamedTuple):
    """Operations, two for each multiplication with its addition; of products and convolutions."""

    dot: int = 0
    conv: int = 0
    guessed: int = 0  # conditionals whose branch is unknown and matters: the largest was counted

    @property
    def total(self) -> int:
        return self.dot + self.conv

    def plus(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def count(fn: Callable, *args: Any, platform: str = "") -> Work:
    """Work of `fn(*args)`; nothing is run but what is small and known.

    `args` are trees of arrays or `jax.ShapeDtypeStruct`s. Of arrays, and of what `fn` closes over,
    those of at most SMALL elements are known, the others shapes alone: to count the work of a plan,
    close over it. With a random key that is known, so are the draws. `platform` chooses where the
    program differs ('cpu', 'tpu', 'cuda'; else what none has of its own). Raises `ValueError` for
    loops of an unknown number of turns that do count, and for calls that are not known here.

    >>> count(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 5))).total
    60
    """
    return total(count_by_scope(fn, *args, platform=platform).values())


def count_by_scope(fn: Callable, *args: Any, platform: str = "") -> "Scopes":
    """`count`, apart for every path of named scopes: modules of Flax, functions, transformations.

    Paths are those of jaxprs: 'jvp(Sam2.encode_image)/image_encoder/...', and the same within
    'transpose(...)' in the backward pass, with 'rematted_computation' where it computes again.
    """
    return trace(fn, *args).count_by_scope(*args, platform=platform)


class Program(NamedTuple):
    """What a function does, traced once for all values of its arguments."""

    jaxpr: core.Jaxpr
    consts: list

    def count_by_scope(self, *args: Any, platform: str = "") -> "Scopes":
        """As the function of that name, for arguments of the shapes that were traced."""
        leaves = jax.tree.leaves(args)
        known = [None if isinstance(x, jax.ShapeDtypeStruct) else small(x) for x in leaves]
        with jax.ensure_compile_time_eval():
            return _Walk(platform).open(self.jaxpr, [*map(small, self.consts), *known])[0]


def trace(fn: Callable, *args: Any) -> Program:
    """The program of `fn(*args)`; arguments as for `count`."""
    closed = jax.make_jaxpr(fn)(*args)
    # What no result needs is not run: the forward pass of a last layer, say, for its gradient
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals), True)
    return Program(jaxpr, closed.consts)


def total(works: Iterable[Work]) -> Work:
    """Their sum."""
    return functools.reduce(Work.plus, works, Work())


def small(x: Any) -> Any:
    """The value if it is to be known, else None."""
    return x if _is_small(x) else None


Scopes = dict[str, Work]  # path of named scopes -> what is done there


def _add(works: Scopes, more: Scopes) -> None:
    """Adds in place."""
    for path, work in more.items():
        works[path] = works[path].plus(work) if path in works else work


class _Walk:
    """Walks jaxprs; `None` stands for a value that is not known."""

    def __init__(self, platform: str):
        self._platform = platform
        self._seen: dict[Any, tuple[Scopes, list]] = {}
        self._kept: list[Any] = []  # jaxprs in `_seen` go by identity, hence must not vanish

    def closed(self, closed: core.ClosedJaxpr, known: Sequence[Any]) -> tuple[Scopes, list]:
        """(work, what is known of the results)."""
        return self.open(closed.jaxpr, [*map(small, closed.consts), *known])

    def open(self, jaxpr: core.Jaxpr, known: Sequence[Any]) -> tuple[Scopes, list]:
        """As `closed`, constants before arguments. Walked once for the same known values."""
        key = (id(jaxpr), *map(_bytes, known))
        if key not in self._seen:
            self._kept.append(jaxpr)
            self._seen[key] = self._walk(jaxpr, known)
        return self._seen[key]

    def _walk(self, jaxpr: core.Jaxpr, known: Sequence[Any]) -> tuple[Scopes, list]:
        env: dict[Any, Any] = {}
        env.update(zip([*jaxpr.constvars, *jaxpr.invars], known, strict=True))

        def read(atom: Any) -> Any:
            return small(atom.val) if isinstance(atom, core.Literal) else env.get(atom)

        works: Scopes = {}
        for eqn in jaxpr.eqns:
            done, results = self._equation(eqn, [read(atom) for atom in eqn.invars])
            if done:
                scope = str(eqn.source_info.name_stack)
                _add(works, {f"{scope}/{path}" if path else scope: x for path, x in done.items()})
            for var, value in zip(eqn.outvars, results, strict=True):
                if value is not None:
                    env[var] = value
        return works, [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, known: list) -> tuple[Scopes, list]:
        name, params = eqn.primitive.name, eqn.params
        unknown = [None] * len(eqn.outvars)
        if name == DOT:
            return {"": Work(dot=dot_work(eqn))}, unknown
        if name == CONV:
            return {"": Work(conv=conv_work(eqn))}, unknown
        if name == "cond":
            return self._cond(params["branches"], known[0], known[1:])
        if name == "scan":
            return self._scan(params, known)
        if name == "while":
            return self._while(params, known)
        if name in KERNELS:
            return {"": Work(dot=KERNELS[name](eqn))}, unknown
        if name == "platform_index":
            return {}, [np.int32(_place(params["platforms"], self._platform))]
        if name == "shard_map":
            return self._shard_map(params, known), unknown
        if name in CALLS:
            inner = params[CALLS[name]]
            is_closed = isinstance(inner, core.ClosedJaxpr)
            return self.closed(inner, known) if is_closed else self.open(inner, known)
        if any(isinstance(x, core.Jaxpr | core.ClosedJaxpr) for x in params.values()):
            if name not in HARMLESS:
                raise ValueError(f"'{name}' calls a program, and how often is not known here")
            return {}, unknown
        if eqn.effects or not all(_is_small(v.aval) for v in eqn.outvars):
            return {}, unknown
        if any(x is None for x in known):
            return {}, unknown
        out = eqn.primitive.bind(*known, **params)
        return {}, list(out) if eqn.primitive.multiple_results else [out]

    def _cond(self, branches: Sequence[Any], index: Any, known: list) -> tuple[Scopes, list]:
        if index is not None:
            # As lax.switch has it, an index beyond the last is the last
            return self.closed(branches[int(np.clip(index, 0, len(branches) - 1))], known)
        works, results = zip(*(self.closed(branch, known) for branch in branches), strict=True)
        sums = [total(each.values()) for each in works]
        most = works[max(range(len(sums)), key=lambda i: sums[i].total)]
        if any(each != sums[0] for each in sums):
            most = most | {"": most.get("", Work()).plus(Work(guessed=1))}
        return most, [None] * len(results[0])

    def _shard_map(self, params: dict, known: list) -> Scopes:
        """What all devices do that are each given a part of the arrays, or all of one."""
        inner = params["jaxpr"]
        whole = [
            x if x is not None and np.shape(x) == v.aval.shape else None
            for x, v in zip(known, inner.invars, strict=True)
        ]
        shape = params["mesh"].shape
        devices = int(np.prod([shape[axis] for axis in params["newly_manual_axes"]]))
        works, _ = self.open(inner, whole)
        return {path: Work(*(devices * x for x in done)) for path, done in works.items()}

    def _scan(self, params: dict, known: list) -> tuple[Scopes, list]:
        consts, carries = params["num_consts"], params["num_carry"]
        fixed, carry = known[:consts], known[consts : consts + carries]
        rows = known[consts + carries :]
        turns = range(params["length"])
        works: Scopes = {}
        outs = []
        for i in reversed(turns) if params["reverse"] else turns:
            row = [None if x is None else x[i] for x in rows]
            done, results = self.closed(params["jaxpr"], [*fixed, *carry, *row])
            _add(works, done)
            carry = results[:carries]
            outs.append(results[carries:])
        if params["reverse"]:
            outs.reverse()
        stacked = [
            None if any(x is None for x in ys) else small(jnp.stack(ys))
            for ys in zip(*outs, strict=True)
        ]
        if not outs:
            stacked = [None] * (len(params["jaxpr"].jaxpr.outvars) - carries)
        return works, [*carry, *stacked]

    def _while(self, params: dict, known: list) -> tuple[Scopes, list]:
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        asks, fixed, carry = known[: split[0]], known[split[0] : split[1]], known[split[1] :]
        works: Scopes = {}
        while True:
            _, (more,) = self.closed(params["cond_jaxpr"], [*asks, *carry])
            if more is None:
                break
            if not more:
                return works, carry
            done, carry = self.closed(params["body_jaxpr"], [*fixed, *carry])
            _add(works, done)
        if total(self.closed(params["body_jaxpr"], [*fixed, *carry])[0].values()).total:
            raise ValueError("a while loop whose number of turns is not known has work in it")
        return works, [None] * len(carry)


# Programs in parameters that do no work of their own: how to combine two elements, say.
HARMLESS = ("reduce", "reduce_window", "scatter", "scatter-add", "scatter-mul", "scatter-min")
HARMLESS += ("scatter-max", "scatter-apply", "reduce_precision", "pure_callback", "sort")


def _place(platforms: Sequence[Any], platform: str) -> int:
    """Branch of a platform; the one without a name is for all others."""
    named = [i for i, names in enumerate(platforms) if names and platform in names]
    return named[0] if named else next(i for i, names in enumerate(platforms) if not names)


def _is_small(x: Any) -> bool:
    is_float = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return int(np.prod(np.shape(x))) <= (SMALL_FLOAT if is_float else SMALL)


def _bytes(x: Any) -> Any:
    if x is None:
        return None
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    array = np.asarray(x)
    return array.dtype.name, array.shape, array.tobytes()


def conv_work(eqn: Any) -> int:
    """Two operations for each product with an element of the input, none for those with padding.

    So the backward passes of a convolution, which are convolutions of spread-out inputs, count as
    much as it does itself. XLA counts alike.
    """
    p, (lhs, rhs) = eqn.params, (v.aval.shape for v in eqn.invars)
    out = eqn.outvars[0].aval.shape
    numbers = p["dimension_numbers"]
    pairs = 1
    for axis, (low, _) in enumerate(p["padding"]):
        size = lhs[numbers.lhs_spec[2 + axis]]
        spread = p["lhs_dilation"][axis]
        taps = np.arange(rhs[numbers.rhs_spec[2 + axis]]) * p["rhs_dilation"][axis]
        starts = np.arange(out[numbers.out_spec[2 + axis]]) * p["window_strides"][axis] - low
        at = starts[:, None] + taps
        pairs *= int(((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)).sum())
    batch, features = (out[numbers.out_spec[i]] for i in (0, 1))
    return 2 * batch * features * rhs[numbers.rhs_spec[1]] * pairs
