"""Converts weights between the reference's files, safetensors, and folders of our own.

  python scripts/convert_checkpoint.py --src=sam2.1_hiera_tiny.pt --dst=tiny
  python scripts/convert_checkpoint.py --src=runs/davis-tiny --dst=mine.pt
  python scripts/convert_checkpoint.py --src=checkpoint.pt --dst=mine.safetensors
  python scripts/convert_checkpoint.py --src=runs/lora --dst=merged.pt

SRC is a .pt or .pth file of facebookresearch/sam2 (released, or a checkpoint of its trainer), a
.safetensors file with the same names, a workdir of scripts/train.py (its last step), or one step,
workdir/checkpoints/N. Variant and version are recognised from its tensors; --variant only says what
is expected. DST is a .pt, .pth or .safetensors file, or, without a suffix, a folder with params/
and config.json, to be given as scripts/evaluate.py --checkpoint and as checkpoint.init_from;
config.json says --resolution=N (if not given, that of SRC's own config.json, else 1024), on which
no tensor depends. .pt and .pth need PyTorch. Of a run with lora.rules the
adapters are merged into the weights that it stands on, which --base=FILE says where to find if they
are not where they were. --ema takes the moving average (train.ema_decay). A DST that exists is
refused unless --overwrite is given.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from sam2_jax import checkpoint, convert, initial, integrity, resume, weights
from sam2_jax.config import Parser
from sam2_jax.memory_estimate import size
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.model.variants import VARIANTS
from sam2_jax.types import UserError, fail, listed

RESOLUTION = 1024  # that of the released weights
OURS = {"params", integrity.ITEM, resume.CONFIG}  # what a folder written here holds


class Source(NamedTuple):
    """What --src is."""

    found: pathlib.Path  # the file or Orbax's folder
    model: dict[str, str | int]  # variant, version and resolution, as config.json has them
    params: dict  # numpy, float32


def read(
    path: pathlib.Path,
    resolution: int | None = None,
    expected: str = "",
    ema: bool = False,
    base: str = "",
) -> Source:
    """Reads any of the formats strictly: all the tensors of the recognised model, no other.

    Raises `UserError` for what is no whole model, for another variant than `expected` (if given),
    and for an impossible resolution.
    """
    found = initial.find_params(path, key="--src")
    variant, version = initial.identify(found, base)
    if expected not in ("", variant):
        raise UserError(f"--variant={expected}: {found} is {variant} {version}; leave the flag out")
    if resolution is None:
        resolution = own_resolution(found)
    model = make_sam2(variant, resolution, version)
    like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.device_get(initial.load_init(found, like, ema, base))
    about = {"variant": variant, "version": version, "resolution": resolution}
    return Source(found, about, params)


def own_resolution(found: pathlib.Path) -> int:
    """The resolution that a run's config.json has; that of the released weights without one."""
    beside = None if found.is_file() else initial.config_beside(found)
    model = (resume.read_config(beside) or {}).get("model") if beside else None
    value = model.get("resolution", RESOLUTION) if isinstance(model, dict) else RESOLUTION
    if type(value) is not int:
        raise UserError(
            f"{beside}/{resume.CONFIG}: model.resolution is {value!r}, expected a number: "
            "mend it, or say --resolution=N"
        )
    return value


def check_output(path: pathlib.Path, overwrite: bool) -> None:
    """Raises `UserError` unless `path` can be written, which is known before anything is read."""
    # A folder's name may have a dot in it, sam2.1_tiny; what looks like a file's must be known.
    if path.suffix not in weights.SUFFIXES and path.suffix[1:2].isalpha():
        raise UserError(
            f"--dst={path}: '{path.suffix}' is unknown: expected {', '.join(weights.SUFFIXES)}, "
            "or no suffix for a folder"
        )
    try:
        exists = path.exists()
        above = next(p for p in path.absolute().parents if p.exists())
    except OSError as e:
        raise UserError(f"--dst={path} cannot be written: {e.strerror}") from e
    if not os.access(above, os.W_OK):
        raise UserError(f"--dst={path} cannot be written: no permission to write in {above}")
    if not exists:
        return
    if not overwrite:
        raise UserError(f"--dst={path} exists: choose another name, or say --overwrite")
    if path.is_dir() == (path.suffix in weights.SUFFIXES):
        kind = "folder" if path.is_dir() else "file"
        raise UserError(f"--dst={path} is a {kind}, in place of which the other cannot be put")
    if path.is_dir() and (other := {p.name for p in path.iterdir()} - OURS):
        raise UserError(
            f"--dst={path} also holds {listed(sorted(other))}: only a folder that this script "
            "wrote is overwritten; choose another name"
        )


def write_folder(path: pathlib.Path, source: Source) -> None:
    """Writes params/ and config.json into a folder beside `path`, and moves it there when whole.

    With the sums by which damage is noticed (integrity.py). Raises `UserError` without room.
    """
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(x.nbytes for x in jax.tree.leaves(source.params))
        if needed > (free := shutil.disk_usage(path.parent).free):
            raise UserError(f"--dst={path} needs {size(needed)}: there are {size(free)} left")
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            new, old = pathlib.Path(scratch, "new"), pathlib.Path(scratch, "old")
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(new / "params", source.params)
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
                sums = integrity.record({"params": source.params}, {})
                writer.save(new / integrity.ITEM, args=ocp.args.JsonSave(sums))
            resume.write_config(new, json.dumps({"model": source.model}, indent=2) + "\n")
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(new, path)
            except OSError:
                os.replace(old, path)
                raise
    except (OSError, ValueError) as e:  # Orbax's storage raises the latter
        raise UserError(f"--dst={path} cannot be written ({e}): is there room?") from e


def main(argv: list[str]) -> None:
    """Converts as the flags say and prints what it was."""
    parser = Parser(__doc__)
    parser.add_argument("--src", type=pathlib.Path, required=True)
    parser.add_argument("--dst", type=pathlib.Path, required=True)
    parser.add_argument("--variant", default="", choices=["", *VARIANTS], help="to be checked")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--ema", action="store_true", help="the moving average")
    parser.add_argument("--base", default="", help="weights under a LoRA run")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    to_file = args.dst.suffix in weights.SUFFIXES
    if to_file and args.resolution is not None:
        raise UserError(
            f"--resolution={args.resolution} is for folders: {args.dst} has no place for it, "
            "and no tensor depends on it; leave the flag out"
        )
    check_output(args.dst, args.overwrite)
    source = read(args.src, args.resolution, args.variant, args.ema, args.base)
    state = convert.to_reference(source.params)
    if to_file:
        weights.write(args.dst, state, args.overwrite)
    else:
        write_folder(args.dst, source)
    size = sum(x.size for x in state.values())
    print(
        f"{source.found}: {source.model['variant']} {source.model['version']}, {len(state)} "
        f"tensors, {size:,} parameters -> {args.dst}"
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    checkpoint.quiet()
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(fail(error))
