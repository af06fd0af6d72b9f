"""Mesh arithmetic, layouts by shape, and their errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sam2_jax import sharding
from sam2_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """Of a device what a mesh and the checks ask of it."""

    id: int
    process_index: int


def machines(data, fsdp, model, owners):
    devices = np.empty(len(owners), object)
    devices[:] = [Device(*numbers) for numbers in enumerate(owners)]
    return Mesh(devices.reshape(data, fsdp, model), sharding.AXES)


@pytest.mark.parametrize(
    ("axes", "devices", "expected"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 4, 1), 8, (2, 4, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((2, 4, 1), 8, (2, 4, 1)),
        ((-1, 8, 1), 8, (1, 8, 1)),
    ],
)
def test_mesh_shape(axes, devices, expected):
    data, fsdp, model = axes
    assert sharding.mesh_shape(data, fsdp, model, devices) == expected


@pytest.mark.parametrize("axes", [(-1, 3, 1), (2, 2, 1), (-1, -1, 1), (0, 1, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_names_the_keys(axes):
    with pytest.raises(UserError, match="mesh.data=.*mesh.fsdp=.*mesh.model=") as e:
        sharding.mesh_shape(axes[0], axes[1], axes[2], 8)
    assert ("set mesh.data=-1" in str(e.value)) == (axes[0] > 0)  # no advice that is followed


def test_batch_size_must_divide():
    mesh = sharding.make_mesh(2, 2, 1)
    sharding.check_batch_size(8, mesh)
    with pytest.raises(UserError, match="data.batch_size=6 .* 2 \\* 2"):
        sharding.check_batch_size(6, mesh)
    with pytest.raises(UserError, match="2 \\* 2 \\* 8; .* or train.accumulate=2$"):
        sharding.check_batch_size(8, mesh, accumulate=8)
    with pytest.raises(UserError, match="8 processes"):
        sharding.check_batch_size(4, mesh, processes=8)


def test_a_video_belongs_to_one_process():
    """16 hosts of 4 chips and model=8: every two hosts would load different videos for a shard."""
    hosts = np.repeat(np.arange(16), 4)
    sharding.check_batch_size(16, machines(4, 4, 4, hosts), processes=16)
    sharding.check_batch_size(32, machines(16, 2, 2, hosts), processes=16)
    with pytest.raises(UserError, match="mesh.model=8 .*16, with 4 devices each.*mesh.model=4,"):
        sharding.check_batch_size(16, machines(8, 1, 8, hosts), processes=16)
    with pytest.raises(UserError, match="mesh.model=2 .*6, with 1 devices each.*mesh.model=1,"):
        sharding.check_batch_size(6, machines(3, 1, 2, range(6)), processes=6)


def test_devices_that_share_a_video_are_of_one_host_where_they_can_be(monkeypatch):
    """A slice of 4 x 4 chips, four to a host: JAX would lay four along a row, which is two hosts'.

    Eight are of two hosts in any case.
    """
    devices = [Device(i, i // 4) for i in range(16)]
    hosts = np.array(devices, object).reshape(2, 2, 2, 2)  # host's row, column, chip's row, column
    rows = hosts.transpose(0, 2, 1, 3)
    monkeypatch.setattr(
        sharding.mesh_utils, "create_device_mesh", lambda shape, *_, **__: rows.reshape(shape)
    )
    assert sharding.spans_processes(machines(4, 1, 4, [d.process_index for d in rows.flat]))
    sharding.check_batch_size(4, sharding.make_mesh(4, 1, 4, devices), processes=4)
    with pytest.raises(UserError, match="take mesh.model=4"):
        sharding.check_batch_size(4, sharding.make_mesh(-1, 1, 8, devices), processes=4)


def test_a_video_on_a_torus_belongs_to_one_process_too():
    """The numbers fit, but the mesh was laid along a row of chips of two hosts."""
    rows = [0, 0, 1, 1, 0, 0, 1, 1]
    with pytest.raises(UserError, match="mesh.model=4 .* take mesh.model=2,"):
        sharding.check_batch_size(2, machines(2, 1, 4, rows), processes=2)
    sharding.check_batch_size(4, machines(4, 1, 2, rows), processes=2)


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((256, 2048), 4, P("fsdp")),
        ((2048, 256), 4, P(None, "fsdp")),
        ((256, 256), 4, P("fsdp")),  # the first of equals
        ((1022, 2048), 4, P(None, "fsdp")),  # the smallest is not divisible
        ((1023, 1023), 4, P()),
        ((256,), 4, P()),  # too small
        ((), 4, P()),
        ((2048, 256), 1, P()),
    ],
)
def test_leaf_spec(shape, fsdp, spec):
    assert sharding.leaf_spec(shape, fsdp) == spec


def test_parameters_and_moments_lie_alike():
    mesh = sharding.make_mesh(1, 4, 1)
    params = {"a": jnp.ones((512, 256)), "b": jnp.ones(3)}
    shapes = jax.eval_shape(lambda: (params, {"mu": params, "count": jnp.int32(0)}))
    laid, rest = sharding.tree_shardings(shapes, mesh)
    assert laid == rest["mu"]
    assert laid["a"].spec == P(None, "fsdp")
    placed = jax.device_put(params["a"], laid["a"])
    assert {s.data.shape for s in placed.addressable_shards} == {(512, 64)}


def test_put_batch_splits_videos():
    mesh = sharding.make_mesh(2, 2, 1)
    batch = {"images": np.arange(24).reshape(4, 6)}
    placed = sharding.put_batch(batch, mesh)["images"]
    np.testing.assert_array_equal(placed, batch["images"])
    assert {s.data.shape for s in placed.addressable_shards} == {(1, 6)}


def test_jax_is_told_the_shape_of_the_whole_batch(monkeypatch):
    """Of two processes each has half; JAX, which sees that there is one, says so."""
    mesh = sharding.make_mesh(2, 2, 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"global_shape=\(8, 6\)"):
        sharding.put_batch({"images": np.zeros((4, 6))}, mesh)
