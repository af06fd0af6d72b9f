"""Checkpoints of a run (Orbax) and what else makes a workdir resumable.

The checkpoint of step N, that is after N updates, is `checkpoints/N/` with the items `params`,
`optimizer` (step count and moments) and `data` (the loader's position, one file per process).
"""

import json
import os
import pathlib
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sam2_jax import convert, weights
from sam2_jax.rules import paths_of
from sam2_jax.types import UserError, listed

Tree = Any
CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
MEND = "put back what scripts/train.py wrote, or delete it to go on with the settings given now"
ARRAYS = "_METADATA"  # marks a folder in which Orbax keeps one tree of arrays


def make_manager(workdir: pathlib.Path, keep: int) -> ocp.CheckpointManager:
    """Orbax manager of `workdir/checkpoints`, asynchronous, which keeps the last `keep` steps."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager((workdir / CHECKPOINTS).resolve(), options=options)


def latest_step(workdir: pathlib.Path) -> int | None:
    """Step of the last whole checkpoint of a workdir; makes no folder where there is none."""
    folder = (workdir / CHECKPOINTS).resolve()
    if not folder.is_dir():
        return None
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        return manager.latest_step()


def save(
    manager: ocp.CheckpointManager, step: int, params: Tree, optimizer: Tree, data: Any
) -> None:
    """Starts to write checkpoint `step`; arrays may be donated as soon as this returns."""
    manager.save(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            data=grain.checkpoint.CheckpointSave(data),  # pyright: ignore[reportCallIssue]
        ),
    )


def restore(
    workdir: pathlib.Path, step: int, params: Tree, optimizer: Tree, data: Any
) -> tuple[Tree, Tree]:
    """(params, optimizer) of checkpoint `step`; sets the iterator `data` to its position.

    `params` and `optimizer` are shapes with shardings, on which arrays are restored. Raises
    `UserError` if the checkpoint has other arrays.
    """
    folder = workdir / CHECKPOINTS / str(step)
    check_arrays(folder / "params", params, "this config's model")
    check_arrays(folder / "optimizer", optimizer, "this config's optimizer (optim.*)")
    options = ocp.CheckpointManagerOptions(create=False)
    try:
        with ocp.CheckpointManager(folder.parent.resolve(), options=options) as manager:
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params),
                    optimizer=ocp.args.StandardRestore(optimizer),
                    data=grain.checkpoint.CheckpointRestore(data),  # pyright: ignore
                ),
            )
    except (IndexError, KeyError, ValueError) as e:
        raise UserError(
            f"{folder}: the position in the data cannot be restored ({e}); go on with the same "
            "data.workers, data.source and number of processes, or take a new --workdir"
        ) from e
    return restored["params"], restored["optimizer"]


def array_shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Slash path -> shape of every array that Orbax keeps in `folder`. Reads no array."""
    # The handler itself: a Checkpointer would look for, and miss, a step's metadata here.
    tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder.resolve())).tree
    leaves = jax.tree.leaves(tree)
    return {path: tuple(leaf.shape) for path, leaf in zip(paths_of(tree), leaves, strict=True)}


def differences(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    """In words: arrays that are missing, unexpected or of another shape."""
    missing = [f"'{path}' is missing" for path in wanted if path not in found]
    extra = [f"'{path}' is not expected" for path in found if path not in wanted]
    shapes = [
        f"'{path}' is {list(found[path])}, expected {list(wanted[path])}"
        for path in wanted
        if path in found and found[path] != wanted[path]
    ]
    return shapes + missing + extra


def check_arrays(folder: pathlib.Path, like: Tree, of: str) -> None:
    """Raises `UserError` unless the arrays in `folder` have the paths and shapes of `like`."""
    if not (folder / ARRAYS).exists():
        raise UserError(
            f"{folder} is missing or holds no arrays: this checkpoint is not whole; delete "
            f"{folder.parent} to take an earlier one, or take another folder"
        )
    wanted = {
        path: tuple(leaf.shape)
        for path, leaf in zip(paths_of(like), jax.tree.leaves(like), strict=True)
    }
    if differing := differences(array_shapes(folder), wanted):
        raise UserError(
            f"{folder} does not fit {of}: {listed(differing)}; take the settings it was saved "
            "with, or another folder"
        )


def write_config(workdir: pathlib.Path, text: str) -> None:
    """Writes the workdir's config.json, whole or not at all; makes the workdir if need be."""
    workdir.mkdir(parents=True, exist_ok=True)
    whole = workdir / f"{CONFIG}.tmp"
    with whole.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(whole, workdir / CONFIG)


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What the workdir's config.json holds, None if there is none; `UserError` if it is torn."""
    path = workdir / CONFIG
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): {MEND}") from e
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no settings: {MEND}")
    return config


def check_same_model(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Raises `UserError` if the workdir's checkpoints belong to another `model` section."""
    before = (read_config(workdir) or {}).get("model")
    if before is None:
        return
    now = json.loads(json.dumps(config["model"]))
    # Dropout may change from one start to the next: it makes no other parameters.
    keys = [key for key in ("variant", "version", "resolution") if before.get(key) != now.get(key)]
    if keys:
        texts = [f"model.{key} was {before.get(key)!r}, is now {now.get(key)!r}" for key in keys]
        raise UserError(
            f"{workdir} holds a run of another model ({listed(texts)}): take another --workdir "
            "or the same model"
        )


def changed_keys(workdir: pathlib.Path, flat: dict[str, Any]) -> list[str]:
    """'key: old -> new' for what differs from the workdir's config.json, by dotted key."""
    config = read_config(workdir)
    if config is None:
        return []

    def walk(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix[:-1]: node}
        return {
            k: v for name, sub in node.items() for k, v in walk(sub, f"{prefix}{name}.").items()
        }

    before = walk(config)
    now = json.loads(json.dumps(flat))
    return [
        f"{key}: {before.get(key)!r} -> {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]


def find_params(path: pathlib.Path, key: str = "checkpoint.init_from") -> pathlib.Path:
    """The folder with a parameter tree, given it, a step, a `checkpoints` folder or a workdir.

    Of several steps the latest. A file of weights.py is returned as it is. Raises `UserError`,
    which says what was found instead; `key` is the setting that it names.
    """
    hint = (
        "expected a workdir, its checkpoints/, one step of it, an Orbax folder of parameters, or "
        f"a file of weights ({', '.join(weights.SUFFIXES)})"
    )
    if not path.exists():
        raise UserError(f"{key}={path} does not exist: {hint}")
    if path.is_file() and path.suffix in weights.SUFFIXES:
        return path
    if not path.is_dir():
        raise UserError(f"{key}={path} is a file: {hint}")
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    steps = [int(p.name) for p in path.iterdir() if p.name.isdigit() and (p / "params").is_dir()]
    if steps:
        path = path / str(max(steps))
    if (path / "params").is_dir():
        path = path / "params"
    if not (path / ARRAYS).exists():
        names = sorted(p.name for p in path.iterdir())
        raise UserError(f"{key}={path} holds {listed(names) or 'nothing'}: {hint}")
    return path


def config_beside(found: pathlib.Path) -> pathlib.Path | None:
    """The nearest folder above what `find_params` found that has a config.json."""
    return next((p for p in found.resolve().parents if (p / CONFIG).is_file()), None)


def identify(found: pathlib.Path) -> tuple[str, str]:
    """(variant, version) of what `find_params` found, by its tensors; `UserError` if of none."""
    state = weights.read(found, values=False) if found.is_file() else None
    try:
        if state is None:
            shapes = {path: weights.hollow(shape) for path, shape in array_shapes(found).items()}
            state = convert.to_reference(shapes)
        return weights.recognise(state)
    except UserError as e:
        raise UserError(f"{found}: {e}") from e


def check_init(path: pathlib.Path | str, like: Tree) -> pathlib.Path:
    """What `find_params` finds; `UserError` if its names or shapes are not those of `like`.

    Reads no values: a large file is read once, by `load_init`.
    """
    found = find_params(pathlib.Path(path))
    if found.is_file():
        weights.load(found, like, values=False)
    else:
        check_arrays(found, like, "this config's model (checkpoint.init_from)")
    return found


def load_init(path: pathlib.Path | str, like: Tree) -> Tree:
    """Parameters from what `find_params` takes, laid out as `like` says.

    `like` is a tree of shapes; those without a sharding go to the first device. Raises
    `UserError` naming parameters that differ.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), like
    )
    found = find_params(pathlib.Path(path))
    if found.is_file():
        # One parameter at a time: they are strided views, of a file or of what was read of it
        return jax.tree.map(
            lambda to, x: jax.device_put(np.array(x, to.dtype, order="C"), to.sharding),
            like,
            weights.load(found, like),
        )
    check_init(found, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(found.resolve(), like)
