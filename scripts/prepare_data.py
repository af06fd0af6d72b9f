"""Packs training clips into few large files, which are faster to copy and to read than many.

  python scripts/prepare_data.py --config=configs/davis.py --config.data.root=DAVIS --output=DIR
  python scripts/prepare_data.py --config=FILE.py --output=DIR --workers=8 --shard_mb=1024
  python scripts/prepare_data.py --config=FILE.py --output=DIR --verify

Every source that the config names is packed whole, whatever frames and objects it would train on:
into DIR, or with a mixture into DIR/NAME. Frames are kept as they are where they are JPEG or PNG
files, others become lossless PNG; masks are run lengths in COCO's format. So training sees the same
pixels as before. Clips to evaluate on, as scripts/train.py finds them (a val list, the clips held
out of a flat folder, config.data.eval_root), go to DIR/evaluation and are never among the others.
What to train with is printed at the end.

Killed, or the disk full: the same command goes on with what is missing. What is packed is not read
again: names, sizes and settings are compared, not pixels. Every file is read back
after it was written; --verify reads and decodes all that is in DIR again and packs nothing.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for `import configs`

import os
from typing import Any

from absl import flags

from configs import default
from sam2_jax import config as config_lib
from sam2_jax.data import catalogue, packed_check, packing
from sam2_jax.data.packed import is_packed
from sam2_jax.data.packed_format import INDEX, Index
from sam2_jax.data.sources import VideoSource
from sam2_jax.types import UserError

_OUTPUT = flags.DEFINE_string("output", "", "Folder to pack into.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: as many as there are cores.")
_CHUNK = flags.DEFINE_integer("chunk_frames", 16, "Frames that are stored, and read, together.")
_SHARD = flags.DEFINE_integer("shard_mb", 256, "Size of a file, about, in 10^6 bytes.")
_VERIFY = flags.DEFINE_bool("verify", False, "Check what is in DIR again, and pack nothing.")

EVALUATION = "evaluation"
# Keys of a source that choose among its clips, frames and objects while training
DRAWN = (
    "num_frames",
    "max_objects",
    "batch_size",
    "reverse",
    "min_stride",
    "max_stride",
    "later_objects",
    "weight",
    "multiplier",
    "augment",
)


def settings_of(config: Any, entry: Any) -> dict[str, Any]:
    """The settings that make the clips of a source what they are."""
    flat = config_lib.flat_keys(entry)
    known = config_lib.flat_keys(default.source())
    kept = {key: flat[key] for key in known if key in flat and key.split(".")[0] not in DRAWN}
    if entry.root and "://" not in entry.root:
        kept["root"] = os.path.abspath(entry.root)
    if entry.source == "synthetic":
        kept["seed"] = config.seed
    return kept


def flags_for(prefix: str, entry: Any, folder: pathlib.Path) -> str:
    """What to give scripts/train.py to read a packed source."""
    given = {"source": "packed", "root": str(folder.absolute())}
    given |= {key: "" for key in ("include", "exclude") if entry[key]}
    return " ".join(f"--config.{prefix}.{key}={value}" for key, value in given.items())


def pack(
    config: Any, source: VideoSource, entry: Any, folder: pathlib.Path, more: dict[str, Any]
) -> None:
    """Pack one source and say what was written."""
    if entry.root and folder.absolute() == pathlib.Path(entry.root).absolute():
        raise UserError(f"--output: {folder} is where the data are: choose another folder")
    if is_packed(folder):
        print(f"{folder}: already packed, not read again; for changed files give another --output")
    index = packing.pack_source(
        source,
        folder,
        settings=settings_of(config, entry) | more,
        chunk_frames=_CHUNK.value,
        shard_mb=_SHARD.value,
        workers=workers(),
        on_error=config.data.on_error,
        max_bad=config.data.max_bad,
    )
    report(folder, index)


def report(folder: pathlib.Path, index: Index) -> None:
    """Print what is in a folder."""
    frames = sum(clip.num_frames for clip in index.clips)
    megabytes = sum(shard.bytes for shard in index.shards) / packing.MB
    print(
        f"{folder}: {len(index.clips):,} clips, {frames:,} frames, {megabytes:,.1f} MB in "
        f"{len(index.shards):,} shards; {index.name}"
    )
    for note in index.notes:
        print(f"  note: {note}")


def workers() -> int:
    """Number of processes."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return _WORKERS.value or (len(affinity(0)) if affinity else os.cpu_count() or 1)


def verify(output: pathlib.Path) -> None:
    """Check all packed sources in a folder."""
    found = sorted(path.parent for path in (*output.glob(INDEX), *output.glob(f"*/{INDEX}")))
    if not found:
        raise UserError(
            f"--output={output} holds no {INDEX}: there is nothing to verify, pack first"
        )
    for folder in found:
        report(folder, packed_check.verify_packed(folder, workers()))
    print("verified: every record is whole, every frame and mask can be decoded")


def main(config: Any) -> None:
    """Packs or verifies as the flags say."""
    if not _OUTPUT.value:
        raise UserError("--output=DIR is missing, the folder to pack into")
    for flag, least in ((_WORKERS, 0), (_CHUNK, 1), (_SHARD, 1)):
        if flag.value < least:
            raise UserError(f"--{flag.name}={flag.value} must be at least {least}")
    output = pathlib.Path(_OUTPUT.value)
    if _VERIFY.value:
        verify(output)
        return
    data = config.data
    if EVALUATION in data.mixture:
        raise UserError(
            f"config.data.mixture.{EVALUATION}: that name is kept for the clips to evaluate on, "
            "choose another"
        )
    jobs, advice = [], []  # all are opened before the first is packed: errors come early
    for name, entry in data.mixture.items() or [("", data)]:
        prefix, folder = (f"data.mixture.{name}" if name else "data"), output / name
        # As in training: what is held out for evaluation is not trained on.
        holdout = entry.source == "folder" and not name
        source = catalogue.open_training(config, entry, f"config.{prefix}.root", holdout)
        jobs.append((source, entry, folder, {}))
        advice.append(flags_for(prefix, entry, folder))
    if evaluated := catalogue.make_eval_source(config):
        folder = output / EVALUATION
        jobs.append((evaluated, data, folder, {"eval_root": data.eval_root}))
        advice.append(f"--config.data.eval_root={folder.absolute()}")
    for source, entry, folder, more in jobs:
        pack(config, source, entry, folder, more)
    print("done: train from it with the same --config and\n  " + "\n  ".join(advice))


if __name__ == "__main__":
    config_lib.run(main)
