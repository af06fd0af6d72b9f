"""What the compiler for TPUs makes of the sums of gradients; no TPU is needed."""

import importlib.util
import math

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sam2_jax import hlo, sharding, topology
from sam2_jax.model.sam2 import init_params, make_sam2
from tests.offline import without_compilation_cache  # noqa: F401

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed"
)


@pytest.mark.usefixtures("without_compilation_cache")
def test_gradients_are_scattered_not_summed_everywhere():
    """Of each shape of base_plus that is sharded one, over `fsdp`, then the shards over `data`.

    A sum on every device sends twice as much; split along the axis that lies on a register's lanes
    three tenths of these bytes were such sums.
    """
    target = topology.open_target("v5e:4x4")
    mesh = sharding.make_mesh(-1, 8, 1, target.devices)
    whole = jax.eval_shape(lambda: init_params(make_sam2("base_plus", 1024), jax.random.key(0)))
    shapes = dict.fromkeys(leaf.shape for leaf in jax.tree.leaves(whole))
    shapes = [shape for shape in shapes if any(sharding.leaf_spec(shape, 8))]
    specs = [sharding.leaf_spec(shape, 8) for shape in shapes]

    def sums(*gradients):
        return tuple(sharding.sum_and_scatter([2 * x for x in gradients], specs))

    step = jax.shard_map(
        sums, mesh=mesh, in_specs=(P(),) * len(shapes), out_specs=tuple(specs), check_vma=False
    )
    where = NamedSharding(mesh, P())
    given = [jax.ShapeDtypeStruct(shape, "float32", sharding=where) for shape in shapes]
    text = jax.jit(step).lower(*given).compile().as_text() or ""
    size = 4 * sum(map(math.prod, shapes))
    assert size <= hlo.totals(text).bytes <= 1.1 * (size + 2 * size // 8)
