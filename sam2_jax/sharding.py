"""The device mesh, and where every array of a run lies on it.

Decided once, from shapes alone, outside the model: batches are split over the axes `data` and
`fsdp`, the state (parameters and optimizer moments alike) over `fsdp`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sam2_jax.types import Batch, UserError

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")  # over which videos are dealt out
BATCH, EVERYWHERE = PartitionSpec(BATCH_AXES), PartitionSpec()
# A smaller array costs more to gather than to keep on every device.
MIN_SHARDED_ELEMENTS = 2**14


def mesh_shape(data: int, fsdp: int, model: int, devices: int) -> tuple[int, int, int]:
    """Axis sizes with -1 (at most one) replaced by what is left of `devices`.

    Raises `UserError` if the axes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    keys = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{keys}: each must be at least 1; one may be -1 (what is left)")
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if devices % known or (not open_axes and devices != known):
        raise UserError(
            f"{keys} does not fit {devices} device{'s' * (devices != 1)}: the product must "
            f"{'divide' if open_axes else 'equal'} that number"
            + ("" if open_axes else "; set mesh.data=-1 for what is left")
        )
    for name in open_axes:
        sizes[name] = devices // known
    return sizes["data"], sizes["fsdp"], sizes["model"]


def make_mesh(data: int, fsdp: int, model: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over `devices` (all of the run by default); errors as in `mesh_shape`."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(data, fsdp, model, len(devices))
    # A torus of 4 x 4 x 4 chips has no axis of 8, unless its axes may be split
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    if model > 1 and spans_processes(mesh):
        # A host has 2 x 2 chips of a torus, of whose rows it has a half: host by host instead
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        mesh = Mesh(np.reshape(ordered, shape), AXES, axis_types=(AxisType.Auto,) * 3)
    return mesh


def check_batch_size(
    batch_size: int,
    mesh: Mesh,
    processes: int = 1,
    accumulate: int = 1,
    key: str = "data.batch_size",
) -> None:
    """Raises `UserError`, which names `key`, unless mesh and processes that load divide the batch.

    Of a batch in `accumulate` parts, each is to be divided by the mesh. Every video must belong to
    one of the processes alone, since no two load the same one.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if batch_size < 1 or batch_size % shards or batch_size % processes:
        parts = accumulate > 1
        fewer = math.gcd(batch_size // (shards // accumulate), accumulate)
        raise UserError(
            f"{key}={batch_size} must be a multiple of mesh.data * mesh.fsdp"
            + (" * train.accumulate" if parts else "")
            + f" = {mesh.shape['data']} * {mesh.shape['fsdp']}"
            + (f" * {accumulate}" if parts else "")
            + (f" and of the {processes} processes" if processes > 1 else "")
            + f"; take {math.lcm(shards, processes)} or a multiple of it, or fewer devices"
            + (f", or train.accumulate={fewer}" if 0 < fewer < accumulate else "")
        )
    model = mesh.shape["model"]
    if processes > 1 and (mesh.size // model % processes or spans_processes(mesh)):
        each = mesh.size // processes
        smaller = [n for n in range(1, model) if model % n == 0 and each % n == 0]
        raise UserError(
            f"mesh.model={model} shares a video among devices of several processes (of "
            f"{processes}, with {each} devices each), which load different videos: take "
            f"mesh.model={max(smaller, default=1)}, so that those of a video belong to one process"
        )


def spans_processes(mesh: Mesh) -> bool:
    """Whether devices that hold the same videos belong to several processes.

    On a torus they may lie across hosts though the numbers would allow them within one.
    """
    groups = mesh.devices.reshape(-1, mesh.shape["model"])
    return any(len({device.process_index for device in group}) > 1 for group in groups)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, EVERYWHERE)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis (videos) split over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def leaf_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits the smallest axis that `fsdp` divides, the first of several; else replicates.

    The smallest, since TPUs lay the largest along a register's 128 lanes: where a shard's part of
    it is no multiple of these, their compiler sums the whole gradient on every device instead of
    scattering the sums, which sends twice as much.
    """
    if fsdp == 1 or np.prod(shape) < MIN_SHARDED_ELEMENTS:
        return PartitionSpec()
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if not divisible:
        return PartitionSpec()
    chosen = min(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == chosen else None for axis in range(chosen + 1)))


def tree_shardings(shapes: Any, mesh: Mesh) -> Any:
    """`NamedSharding` of each leaf of a tree of arrays or shapes (`jax.eval_shape`).

    One function for parameters and optimizer state: moments lie where their parameter lies.
    """
    return jax.tree.map(functools.partial(NamedSharding, mesh), tree_specs(shapes, mesh))


def tree_specs(shapes: Any, mesh: Mesh) -> Any:
    """`leaf_spec` of each leaf of a tree of arrays or shapes."""
    return jax.tree.map(lambda leaf: leaf_spec(leaf.shape, mesh.shape["fsdp"]), shapes)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes that carry shardings, as restoring a checkpoint wants them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays from this process's share of a batch of numpy arrays, one of equal shares."""
    sharding, processes = batch_sharding(mesh), jax.process_count()

    def place(local: np.ndarray) -> jax.Array:
        # Without the shape JAX would take shares of a video's devices for different videos
        whole = (len(local) * processes, *local.shape[1:])
        return jax.make_array_from_process_local_data(sharding, local, whole)

    return jax.tree.map(place, batch)


def shares() -> Any:
    """Specs, in a `Batch`, of a device's share: its videos, and of these its objects' masks.

    The devices along `model` have the same images.
    """
    batch: Any = Batch  # of specs, not of arrays
    return batch(
        BATCH, PartitionSpec(BATCH_AXES, None, "model"), PartitionSpec(BATCH_AXES, "model")
    )


def pad_objects(batch: Batch, mesh: Mesh) -> Batch:
    """As many objects as the devices along `model` can share out evenly, more by empty ones."""
    more = -batch.valid.shape[1] % mesh.shape["model"]
    if not more:
        return batch
    masks = jnp.pad(batch.masks, [(0, more if axis == 2 else 0) for axis in range(5)])
    return batch._replace(masks=masks, valid=jnp.pad(batch.valid, [(0, 0), (0, more)]))


def gather(tree: Any, specs: Any) -> Any:
    """Brings a sharded tree together on every device, in the dtype that it has.

    Inside `jax.shard_map`; `specs` are `tree_specs` of the whole tree. For a step's copy of the
    parameters, once and outside all loops: so the number of gathers grows neither with the frames
    nor with the parts of a batch.
    """

    def one(x: Any, spec: PartitionSpec) -> Any:
        if "fsdp" not in spec:
            return x
        return jax.lax.all_gather(x, "fsdp", axis=spec.index("fsdp"), tiled=True)

    return jax.tree.map(one, tree, specs)


def sum_and_scatter(tree: Any, specs: Any) -> Any:
    """Sums each device's own gradients over all of them, and leaves each the shard it updates.

    Inside `jax.shard_map`, as `gather`: a reduce-scatter over `fsdp`, then the shard is summed over
    the other axes; what is not sharded is summed over all.
    """

    def one(x: Any, spec: PartitionSpec) -> Any:
        if "fsdp" not in spec:
            return jax.lax.psum(x, AXES)
        axis = spec.index("fsdp")
        shard = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(shard, ("data", "model"))

    return jax.tree.map(one, tree, specs)


def local_rows(x: Any) -> np.ndarray:
    """This process's share of a batch's array, whose leading axis is split; see `put_batch`."""
    rows = {shard.index[0].start or 0: np.asarray(shard.data) for shard in x.addressable_shards}
    return np.concatenate([rows[start] for start in sorted(rows)])
