"""Weights to start from or to evaluate: where a path leads, whose they are, and reading them."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np

from sam2_jax import arrays, convert, lora, partition, sharding, weights
from sam2_jax import base as bases
from sam2_jax.checkpoint import CHECKPOINTS, EMA
from sam2_jax.resume import CONFIG
from sam2_jax.types import UserError, listed

Tree = Any
BASE = "--base"  # flag of scripts, for where the weights under a LoRA run are now


def find_params(path: pathlib.Path, key: str = "checkpoint.init_from") -> pathlib.Path:
    """The folder with a parameter tree, given it, a step, a `checkpoints` folder or a workdir.

    Of several steps the latest. A file of weights.py is returned as it is. Raises `UserError`,
    which says what was found instead; `key` is the setting that it names.
    """
    hint = (
        "expected a workdir, its checkpoints/, one step of it, an Orbax folder of parameters, or "
        f"a file of weights ({', '.join(weights.SUFFIXES)})"
    )
    try:
        return _find(path, f"{key}={path}", hint)
    except OSError as e:
        raise UserError(f"{key}={path} cannot be read ({e.strerror}): {hint}") from e


def _find(path: pathlib.Path, named: str, hint: str) -> pathlib.Path:
    """`find_params`, but for what the file system refuses."""
    if not path.exists():
        raise UserError(f"{named} does not exist: {hint}")
    if path.is_file() and path.suffix in weights.SUFFIXES:
        return path
    if not path.is_dir():
        raise UserError(f"{named} is a file: {hint}")
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    steps = [int(p.name) for p in path.iterdir() if p.name.isdigit() and (p / "params").is_dir()]
    if steps:
        path = path / str(max(steps))
    if (path / "params").is_dir():
        path = path / "params"
    if not (path / arrays.MARK).exists():
        names = sorted(p.name for p in path.iterdir())
        raise UserError(f"{named} holds {listed(names) or 'nothing'}: {hint}")
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
            shapes = {path: convert.hollow(shape) for path, shape in arrays.shapes(found).items()}
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
