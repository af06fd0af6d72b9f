"""What a compiled step says of itself: collectives and cycles, read from XLA's own text (HLO).

XLA's cost analysis counts the body of a loop once; here loops are multiplied out. Of a conditional
the branch that moves most is counted, since which one runs depends on the plan of a step.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# TPUs reduce and scatter in one custom fusion of this name, which holds an all-reduce and a slice
TPU_REDUCE_SCATTER = "all-reduce-scatter"
CHAIN = "chain "
# A kernel that XLA did not make: the compiler for TPUs estimates no cycles of it
TPU_KERNEL = 'custom_call_target="tpu_custom_call"'
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "c128": 128}
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+[a-z0-9]*)\[([\d,]*)\]")
_NAMES = re.compile(r"%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CONSTANT = re.compile(r"constant\((\d+)\)")


class Totals(NamedTuple):
    """Of a computation run once."""

    # (kind, identity) -> (times a step, bytes each time, shape)
    collectives: dict[tuple[str, str], tuple[int, int, str]]
    cycles: int  # as the compiler for TPUs estimates them; 0 where it does not
    kernels: int  # calls of kernels for TPUs that are in none of these cycles
    unknown_loops: int  # whose number of turns is not to be found: counted once

    @property
    def bytes(self) -> int:
        return sent(by_kind(self))


class _Op(NamedTuple):
    name: str
    shape: str
    opcode: str
    line: str


def shape_bytes(text: str) -> int:
    """Bytes of all arrays that a shape, or tuple of shapes, names.

    >>> shape_bytes("(f32[2,3]{1,0}, /*index=1*/bf16[4]{0:T(8,128)}, pred[])")
    33
    """
    total = 0
    for dtype, dims in _SHAPE.findall(text):
        size = BITS.get(dtype) or int((re.match(r"[a-z]+(\d+)", dtype) or [0, 0])[1])  # f8e4m3fn: 8
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size
    return total // 8


def totals(text: str) -> Totals:
    """Of a whole program, given as the text of its optimised HLO for one device."""
    entry, computations = _parse(text)
    return _Counter(computations).of(entry)


def by_kind(found: Totals) -> dict[str, dict[str, int]]:
    """Count and bytes a step of each kind of collective, per device.

    Bytes are those of the whole array that a device takes part in: what it has after a gather, and
    before a reduction.
    """
    kinds: dict[str, dict[str, int]] = {}
    for (kind, _), (times, size, _) in found.collectives.items():
        row = kinds.setdefault(kind, {"count": 0, "bytes": 0})
        row["count"] += times
        row["bytes"] += times * size
    return dict(sorted(kinds.items()))


def sent(kinds: Mapping[str, Mapping[str, int]]) -> int:
    """Bytes of all that `by_kind` gives; a sum that all devices get counts twice.

    On a ring it is a reduce-scatter and a gather of what was scattered.
    """
    return sum(row["bytes"] * (1 + (kind == "all-reduce")) for kind, row in kinds.items())


def _parse(text: str) -> tuple[str, dict[str, list[_Op]]]:
    entry, current = "", []
    computations: dict[str, list[_Op]] = {}
    for line in text.splitlines():
        if line[:1] in ("%", "E") and (head := _HEAD.match(line)):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line[:1] == " " and (op := _OP.match(line)):
            current.append(_Op(op[1], op[2], op[3], line[op.end() - 1 :]))
    return entry, computations


class _Counter:
    """Adds up computations from the innermost; each is walked once."""

    def __init__(self, computations: dict[str, list[_Op]]):
        self._computations = computations
        self._seen: dict[str, Totals] = {}

    def of(self, name: str) -> Totals:
        if name not in self._seen:
            self._seen[name] = self._walk(name)
        return self._seen[name]

    def _walk(self, name: str) -> Totals:
        ops = self._computations[name]
        shapes = {op.name: op.shape for op in ops}
        collectives: dict[tuple[str, str], tuple[int, int, str]] = {}
        cycles = kernels = unknown = 0
        for op in ops:
            times, inner = 1, None
            if op.opcode == "while":
                times, inner, missing = self._loop(op)
                unknown += missing
            elif op.opcode == "conditional":
                branches = (self.of(b) for b in _branches(op))
                inner = max(branches, key=lambda t: (t.bytes, t.cycles, t.kernels))
            elif op.opcode in ("call", "fusion", "async-start", "custom-call"):
                inner = self._called(op)
            elif (kind := op.opcode.removesuffix("-start")) in KINDS:
                key, value = _collective(name, kind, op, shapes)
                _add(collectives, key, value)
            if match := _CYCLES.search(op.line):
                cycles += int(match[1])
            elif TPU_KERNEL in op.line:
                kernels += 1
            if inner is None:
                continue
            # The compiler's own figure for a fusion or a call is of all that is in it
            if not match:
                cycles += times * inner.cycles
                kernels += times * inner.kernels
            unknown += inner.unknown_loops
            for key, (count, size, shape) in inner.collectives.items():
                staged = op.opcode == "fusion" and key[1].startswith(CHAIN)
                _add(collectives, key, (times * count, size, shape), staged)
        return Totals(collectives, cycles, kernels, unknown)

    def _loop(self, op: _Op) -> tuple[int, Totals, int]:
        """(turns, what one turn does, 1 if the turns are not known)."""
        inner = self.of(_attribute(op, "body"))
        if match := _TRIPS.search(op.line):
            return int(match[1]), inner, 0
        # A counter that starts from 0 is compared with the only constant that there is; a loop that
        # may end earlier (model/growing.py) names the most turns there can be
        condition = [*self._with_called(self._computations[_attribute(op, "condition")])]
        limits = [int(m[1]) for o in condition if (m := _CONSTANT.search(o.opcode + o.line))]
        compares = any(
            o.opcode == "compare" and ("direction=LT" in o.line or "direction=GT" in o.line)
            for o in condition
        )
        if compares and len(limits) == 1:
            return limits[0], inner, 0
        return 1, inner, 1

    def _with_called(self, ops: list[_Op]) -> Iterator[_Op]:
        for op in ops:
            yield op
            if "calls=" in op.line:
                yield from self._computations[_attribute(op, "calls")]

    def _called(self, op: _Op) -> Totals | None:
        attribute = "to_apply" if op.opcode == "call" else "calls"
        if op.opcode == "custom-call" and "calls=" not in op.line:
            return None
        return self.of(_attribute(op, attribute))


def _add(
    collectives: dict[tuple[str, str], tuple[int, int, str]],
    key: tuple[str, str],
    value: tuple[int, int, str],
    staged: bool = False,
) -> None:
    """One more; `staged`: if met before, then this is a further stage of the same one."""
    if key in collectives and not staged:
        value = (value[0] + collectives[key][0], *value[1:])
    collectives[key] = value


def _attribute(op: _Op, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", op.line)
    assert match, f"{op.opcode} without {name}: {op.line[:200]}"
    return match[1]


def _branches(op: _Op) -> list[str]:
    if match := _BRANCHES.search(op.line):
        return [name.strip().lstrip("%") for name in match[1].split(",")]
    return [_attribute(op, "true_computation"), _attribute(op, "false_computation")]


def _collective(
    computation: str, kind: str, op: _Op, shapes: dict[str, str]
) -> tuple[tuple[str, str], tuple[int, int, str]]:
    """Key and value of one in `Totals.collectives`."""
    operands = _NAMES.findall(op.line[: op.line.index(")")])
    given = sum(shape_bytes(shapes.get(name, "")) for name in operands)
    made = shape_bytes(op.shape)
    # The shape of one that is only begun holds its operands, too; but for sums, where it does not
    pair = op.opcode in ("all-gather-start", "collective-permute-start")
    if op.opcode.endswith("-start") and (pair or op.shape.startswith("((")):
        made -= given
    if computation.startswith(TPU_REDUCE_SCATTER):
        kind = "reduce-scatter"
    # TPUs split a gather into stages that lie in several fusions, under the number of a chain
    chain = re.search(r'chain_id="(\d+)"', op.line)
    identity = f"{CHAIN}{chain[1]}" if chain else f"{computation}/{op.name}"
    shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", op.shape)
    return (kind, identity), (1, max(given, made), shape)
