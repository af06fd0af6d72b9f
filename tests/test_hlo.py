"""Reading a compiled program: collectives in loops, branches and fusions; and a real program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sam2_jax import hlo, sharding

PROGRAM = """HloModule jit_step, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.3 (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%p), channel_id=1, to_apply=%add
  ROOT %slice = f32[2,4]{1,0} dynamic-slice(%all-reduce.1)
}

%fused.stage.2 (q2: bf16[2]) -> bf16[8] {
  %q2 = bf16[2]{0} parameter(0)
  ROOT %all-gather.9 = bf16[8]{0} all-gather(%q2), channel_id=1, frontend_attributes={chain_id="3"}
}

%fused.stage.3 (q3: bf16[2]) -> bf16[8] {
  %q3 = bf16[2]{0} parameter(0)
  ROOT %all-gather.10 = bf16[8]{0} all-gather(%q3), channel_id=1, frontend_attributes={chain_id="3"}
}

%quiet (x0: f32[4]) -> f32[4] {
  ROOT %x0 = f32[4]{0} parameter(0)
}

%loud (x1: f32[4]) -> f32[4] {
  %x1 = f32[4]{0} parameter(0)
  ROOT %all-reduce.2 = f32[4]{0} all-reduce(%x1), channel_id=1, to_apply=%add
}

%condition (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[], f32[4]{0}) parameter(0)
  %limit = s32[] constant(5)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (d: (s32[], f32[4])) -> (s32[], f32[4]) {
  %d = (s32[], f32[4]{0}) parameter(0)
  %which = s32[] get-tuple-element(%d), index=0
  %x = f32[4]{0} get-tuple-element(%d), index=1
  %y = f32[4]{0} conditional(%which, %x, %x), branch_computations={%quiet, %loud}
  %k = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={}
  %k2 = f32[4]{0} custom-call(%x), custom_call_target="AllocateBuffer"
  %y2 = f32[4]{0} all-reduce(%y), channel_id=1, backend_config={"estimated_cycles":"10"}
  ROOT %out = (s32[], f32[4]{0}) tuple(%which, %y2)
}

ENTRY %main (p0: f32[8,4], p1: bf16[2], p2: (s32[], f32[4])) -> f32[2,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = bf16[2]{0} parameter(1)
  %p2 = (s32[], f32[4]{0}) parameter(2)
  %rs = f32[2,4]{1,0} fusion(%p0), kind=kCustom, calls=%all-reduce-scatter.3
  %g1 = bf16[8]{0} fusion(%p1), kind=kCustom, calls=%fused.stage.2, CYCLES
  %g2 = bf16[8]{0} fusion(%p1), kind=kCustom, calls=%fused.stage.3
  %start = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%p1), channel_id=1, dimensions={0}
  %done = bf16[8]{0} all-gather-done(%start)
  %loop = (s32[], f32[4]{0}) while(%p2), condition=%condition, body=%body
  %known = (s32[], f32[4]{0}) while(%loop), condition=%condition, body=%body, TURNS
  ROOT %r = f32[2,4]{1,0} copy(%rs)
}
""".replace("CYCLES", 'backend_config={"estimated_cycles":"100"}').replace(
    "TURNS", 'backend_config={"known_trip_count":{"n":"3"}}'
)


def test_shapes():
    shape = "(f32[2,3]{1,0}, /*index=1*/bf16[4]{0:T(8,128)}, pred[], s4[2], f8e4m3fn[3], u32[])"
    assert hlo.shape_bytes(shape) == 24 + 8 + 1 + 1 + 3 + 4


def test_loops_branches_and_stages():
    found = hlo.totals(PROGRAM)
    assert hlo.by_kind(found) == {
        # One in stages of two fusions, one asynchronous
        "all-gather": {"count": 2, "bytes": 16 + 16},
        # Of 5 + 3 turns: one in the body, one in the branch that sends more
        "all-reduce": {"count": 16, "bytes": 16 * 16},
        "reduce-scatter": {"count": 1, "bytes": 8 * 4 * 4},
    }
    assert found.bytes == 32 + 2 * 256 + 128  # a sum that all get: scattered, then gathered
    assert found.cycles == 100 + (5 + 3) * 10
    assert found.kernels == 5 + 3  # one in the body, of which no cycles are known
    assert found.unknown_loops == 0


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        # As the compiler for GPUs writes them: ((operands), (results))
        (
            "((f32[8,4]{1,0}, bf16[2]{0}), (f32[2,4]{1,0}, bf16[1]{0})) "
            "reduce-scatter-start(%p0, %p1)",
            "reduce-scatter",
            8 * 4 * 4 + 2 * 2,
        ),
        ("((f32[8,4]{1,0}), f32[8,4]{1,0}) all-to-all-start(%p0)", "all-to-all", 8 * 4 * 4),
        ("((bf16[2]{0}), (bf16[8]{0})) all-gather-start(%p1)", "all-gather", 16),
        ("(bf16[2]{0}, bf16[2]{0}) all-reduce-start(%p1, %p1)", "all-reduce", 8),
    ],
)
def test_operands_in_the_shape_are_not_sent_twice(line, kind, size):
    text = f"""ENTRY %main (p0: f32[8,4], p1: bf16[2]) -> f32[8,4] {{
  %p0 = f32[8,4]{{1,0}} parameter(0)
  %p1 = bf16[2]{{0}} parameter(1)
  %start = {line}, channel_id=1
  ROOT %r = f32[8,4]{{1,0}} copy(%p0)
}}
"""
    assert hlo.by_kind(hlo.totals(text)) == {kind: {"count": 1, "bytes": size}}


def test_a_loop_of_unknown_length_is_counted_once_and_told():
    text = PROGRAM.replace("s32[] constant(5)", "s32[] parameter(1)")
    assert hlo.totals(text).unknown_loops == 1
    assert hlo.by_kind(hlo.totals(text))["all-reduce"]["count"] == 2 * (1 + 3)


def test_a_real_program():
    """A sum over devices in a loop of three turns, in one of two, and one before."""
    mesh = sharding.make_mesh(-1, 1, 1)
    n = mesh.shape["data"]
    if n == 1:
        pytest.skip("one device sends nothing")
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((n, 6), jnp.float32)

    def step(x):
        def total(y, _):
            return jnp.cos(y + (x * y).sum(0)), None

        y, _ = jax.lax.scan(total, x.sum(0), None, length=3)
        return jax.lax.scan(
            lambda z, _: (jax.lax.scan(total, z, None, length=2)[0], None), y, None, 4
        )[0]

    text = jax.jit(step, in_shardings=rows).lower(x).compile().as_text() or ""
    assert hlo.by_kind(hlo.totals(text)) == {"all-reduce": {"count": 1 + 3 + 8, "bytes": 12 * 24}}
