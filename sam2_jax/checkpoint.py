"""Checkpoints of a run (Orbax) and what else makes a workdir resumable.

The checkpoint of step N, that is after N updates, is `checkpoints/N/` with the items `params`,
`optimizer` (step count and moments), `data` (the loader's position, JSON) and, of runs that have
one, `ema` (the moving average of the trained parameters). A LoRA run's `params` are the trained
ones alone; its item `lora` says where the others are (see base.py).
"""

import contextlib
import errno
import functools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from sam2_jax import arrays, convert, lora, partition, sharding, weights
from sam2_jax import base as bases
from sam2_jax.types import UserError, listed

Tree = Any
CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
EMA = "ema"  # item of a checkpoint
MEND = "put back what scripts/train.py wrote, or delete it to go on with the settings given now"
BASE = "--base"  # flag of scripts, for where the weights under a LoRA run are now


class Keep(NamedTuple):
    """Which checkpoints stay."""

    last: int
    every: int = 0  # and those of these steps' multiples; 0: none
    best: int = 0  # and so many of the best by a metric of the evaluation
    metric: str = "eval/J&F"
    lowest: bool = False  # the best is the lowest, of losses


def make_keep(config: Any) -> Keep:
    """From the config's `checkpoint` section."""
    c = config.checkpoint
    return Keep(c.keep, c.keep_every, c.keep_best, c.best, c.best_is_lowest)


def make_manager(workdir: pathlib.Path, keep: Keep) -> ocp.CheckpointManager:
    """Orbax manager of `workdir/checkpoints`, asynchronous; what `keep` does not name goes."""

    def value(metrics: dict[str, float]) -> float:
        return metrics[keep.metric]

    policies: list[managers.PreservationPolicy] = [managers.LatestN(keep.last)]
    if keep.every:
        policies.append(managers.EveryNSteps(keep.every))
    if keep.best:
        best = managers.BestN(
            get_metric_fn=value,
            reverse=keep.lowest,
            n=keep.best,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies),
        best_fn=value if keep.best else None,
        best_mode="min" if keep.lowest else "max",
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager((workdir / CHECKPOINTS).resolve(), options=options)


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Within it a checkpoint that cannot be written is a `UserError` that names the last good one.

    To be around everything that saves or waits: Orbax tells of a failure in the background at the
    next of these.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        # Of a full disk tensorstore says ValueError, with the system's words in it
        full = "No space left" in str(error) or getattr(error, "errno", 0) == errno.ENOSPC
        if isinstance(error, ValueError) and not full:
            raise
        good = latest_step(workdir)
        last = "there is none yet" if good is None else f"the last whole one is of step {good}"
        raise UserError(
            f"{workdir / CHECKPOINTS}: a checkpoint could not be written "
            f"({'the disk is full' if full else error}); {last}: make room, then start again"
        ) from error


def latest_step(workdir: pathlib.Path) -> int | None:
    """Step of the last whole checkpoint of a workdir; makes no folder where there is none."""
    folder = (workdir / CHECKPOINTS).resolve()
    if not folder.is_dir():
        return None
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        return manager.latest_step()


def save(
    manager: ocp.CheckpointManager,
    step: int,
    params: Tree,
    optimizer: Tree,
    data: dict[str, Any],
    ema: Tree | None = None,
    base: bases.Base | None = None,
    metrics: dict[str, float] | None = None,
) -> None:
    """Starts to write checkpoint `step`; arrays may be donated as soon as this returns.

    `data` is what is to be known of the data, of JSON's types, equal on all processes. With a
    `base`, `params` are the parameters that are not in it. `metrics` are of an evaluation.
    """
    items: dict[str, Any] = {
        "params": ocp.args.StandardSave(params),
        "optimizer": ocp.args.StandardSave(optimizer),
        "data": ocp.args.JsonSave(data),
    }
    if ema is not None:
        items[EMA] = ocp.args.StandardSave(ema)
    if base is not None:
        items[bases.ITEM] = ocp.args.JsonSave(base._asdict())
    manager.save(step, metrics=metrics or None, args=ocp.args.Composite(**items))


def restore(
    workdir: pathlib.Path, step: int, params: Tree, optimizer: Tree
) -> tuple[Tree, Tree, dict[str, Any]]:
    """(params, optimizer, data) of checkpoint `step`.

    `params` and `optimizer` are shapes with shardings, on which arrays are restored. Raises
    `UserError` if the checkpoint has other arrays.
    """
    folder = workdir / CHECKPOINTS / str(step)
    arrays.check(folder / "params", params, "this config's model")
    arrays.check(folder / "optimizer", optimizer, "this config's optimizer (optim.*)")
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder.parent.resolve(), options=options) as manager:
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                optimizer=ocp.args.StandardRestore(optimizer),
                data=ocp.args.JsonRestore(),
            ),
        )
    return restored["params"], restored["optimizer"], restored["data"]


def restore_ema(workdir: pathlib.Path, step: int, like: Tree) -> Tree | None:
    """The moving average in checkpoint `step`, laid out as `like` says; None if it has none."""
    folder = workdir.resolve() / CHECKPOINTS / str(step) / EMA
    if not folder.is_dir():
        return None
    arrays.check(folder, like, "what this config trains (optim.frozen, lora)")
    return arrays.read(folder, like)


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
    if not (path / arrays.MARK).exists():
        names = sorted(p.name for p in path.iterdir())
        raise UserError(f"{key}={path} holds {listed(names) or 'nothing'}: {hint}")
    return path


def config_beside(found: pathlib.Path) -> pathlib.Path | None:
    """The nearest folder above what `find_params` found that has a config.json."""
    return next((p for p in found.resolve().parents if (p / CONFIG).is_file()), None)


def identify(found: pathlib.Path, base: str = "") -> tuple[str, str]:
    """(variant, version) of what `find_params` found, by its tensors; `UserError` if of none.

    Of a LoRA run, those of what it stands on, which is looked for in `base` if that is given.
    """
    if not found.is_file() and (reference := bases.read(found.parent)):
        return identify(find_params(pathlib.Path(base or reference.path), key=BASE))
    state = weights.read(found, values=False) if found.is_file() else None
    try:
        if state is None:
            shapes = {path: weights.hollow(shape) for path, shape in arrays.shapes(found).items()}
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
    elif reference := bases.read(found.parent):
        check_init(find_params(pathlib.Path(reference.path), key=BASE), like)
    else:
        arrays.check(found, like, "this config's model (checkpoint.init_from)")
    return found


def load_init(path: pathlib.Path | str, like: Tree, ema: bool = False, base: str = "") -> Tree:
    """Parameters from what `find_params` takes, laid out as `like` says.

    `like` is a tree of shapes; those without a sharding go to the first device. `ema` takes the
    moving average of what was trained. Of a LoRA run the adapters are merged into the weights that
    it stands on, `base` if these are elsewhere now. Raises `UserError` naming what differs.
    """
    found = find_params(pathlib.Path(path))
    reference = None if found.is_file() else bases.read(found.parent)
    if base and not reference:
        raise UserError(f"{BASE}={base} is for runs with lora.rules: {path} is whole; leave it out")
    if ema and not (found.parent / EMA / arrays.MARK).exists():
        raise UserError(
            f"{found} has no moving average beside it: it was trained with train.ema_decay=0, or "
            "is no checkpoint of scripts/train.py; leave --ema out"
        )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), like
    )
    if found.is_file():
        # One parameter at a time: they are strided views, of a file or of what was read of it
        return jax.tree.map(
            lambda to, x: jax.device_put(np.array(x, to.dtype, order="C"), to.sharding),
            like,
            weights.load(found, like),
        )
    if reference is None:
        check_init(found, like)
        params = arrays.read(found, like)
        return partition.join(params, arrays.read_part(found.parent / EMA, like)) if ema else params
    whole = base or reference.path
    params = load_init(find_params(pathlib.Path(whole), key=BASE), like)
    bases.check(reference, params, whole, BASE)
    own = jax.eval_shape(lambda: lora.init(jax.random.key(0), like, reference.rules))
    where = jax.tree.leaves(like)[0].sharding
    if isinstance(where, jax.sharding.NamedSharding) and isinstance(where.mesh, jax.sharding.Mesh):
        where = sharding.replicated(where.mesh)
    own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), own)
    trained = arrays.read_part(found.parent / EMA if ema else found, partition.join(like, own))
    merge = functools.partial(lora.merge, rules=reference.rules)
    layout = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(merge, out_shardings=layout)(partition.join(params, trained))
