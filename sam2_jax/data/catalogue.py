"""From a config to the sources that it names.

folder      DAVIS 2016 and 2017; flat folders as of MOSE and YouTube-VOS
objects     the same with one folder of PNGs per object, as SA-V's validation set
sav         SA-V: JSON masklets beside extracted frames or mp4 files
sa1b        SA-1B: images with a JSON of masks each
coco        images and one JSON of instances in COCO's format
pictures    images with masks beside them
volumes     .npz volumes, slices taken for frames, as MedSAM2 has
tfds        what TensorFlow Datasets has prepared: DAVIS, YouTube-VIS
packed      what scripts/prepare_data.py wrote of any of these
synthetic   rendered while training
"""

from typing import Any

from sam2_jax.data.augment import AugmentSettings
from sam2_jax.data.coco import open_coco
from sam2_jax.data.folders import eval_folder, train_folder
from sam2_jax.data.object_folders import open_object_folders
from sam2_jax.data.packed import is_packed, open_packed
from sam2_jax.data.pictures import open_pictures
from sam2_jax.data.pipeline import Loader, Part, make_loader
from sam2_jax.data.sa1b import open_sa1b
from sam2_jax.data.sampling import Sampling
from sam2_jax.data.sav import open_sav
from sam2_jax.data.sources import Faults, VideoSource, keep_usable
from sam2_jax.data.synthetic import SyntheticSource
from sam2_jax.data.tfds import PreparedSource
from sam2_jax.data.volumes import open_volumes
from sam2_jax.types import UserError

KINDS = (
    "folder",
    "objects",
    "sav",
    "sa1b",
    "coco",
    "pictures",
    "volumes",
    "tfds",
    "packed",
    "synthetic",
)
TRAIN_STREAM, EVAL_STREAM = 0, 1  # of rendered clips
SINGLE = "train"  # name of the only source where there is no mixture


def make_parts(config: Any, broken: list[UserError] | None = None) -> list[Part]:
    """Open the training sources that `config.data` names, and check them.

    The source `tfds` does not look at its root: `config.finish` has turned it into `folder` where
    that is given. What is wrong with clips that are left out (`data.on_error`) is
    added to `broken`.

    Raises:
        UserError: nothing there, something there is broken, or no clip can be used.
    """
    data = config.data
    entries = {f"mixture.{name}": entry for name, entry in data.mixture.items()} or {"": data}
    parts = []
    for name, entry in entries.items():
        key = f"config.data.{name}.root" if name else "config.data.root"
        sampling = Sampling(
            entry.num_frames,
            entry.max_objects,
            entry.reverse,
            entry.min_stride,
            entry.max_stride,
            entry.later_objects,
        )
        opening, looking = (Faults(data.on_error, data.max_bad) for _ in range(2))
        holdout = entry.source == "folder" and not name
        source = open_training(config, entry, key, holdout, opening)
        if entry.source != "synthetic":  # rendered so that an object is always seen
            source = keep_usable(source, sampling.span, entry.reverse > 0, looking)
        if broken is not None:
            broken += [*opening.errors, *looking.errors]
        augment = AugmentSettings(**entry.augment)
        label = name.removeprefix("mixture.") or SINGLE
        parts.append(
            Part(label, source, sampling, augment, entry.batch_size, entry.weight, entry.multiplier)
        )
    return parts


def open_training(
    config: Any, source: Any, key: str, holdout: bool, faults: Faults | None = None
) -> VideoSource:
    """Open one source, all clips; `source` is `config.data` or an entry of its mixture.

    Args:
        config: the whole.
        source: the settings of this source.
        key: that names its root, for messages.
        holdout: keep clips of a flat folder back for evaluation, if nothing else is evaluated.
        faults: what to do about broken clips; None: what `config.data` says.

    Raises:
        UserError: nothing there, or something there is broken.
    """
    common: dict[str, Any] = {
        "key": key,
        "include": source.include,
        "exclude": source.exclude,
        "faults": faults or Faults(config.data.on_error, config.data.max_bad),
    }
    root, instances = source.root, source.instances
    match source.source:
        case "folder":
            given = {"holdout": holdout and not config.data.eval_root, **source.folder}
            return train_folder(root, **given, **common)
        case "objects":
            given = {name: value for name, value in source.folder.items() if name != "resolution"}
            return open_object_folders(root, **given, **common)
        case "sav":
            return open_sav(root, **source.sav, **common)
        case "sa1b":
            limits = {"max_area": instances.max_area, "min_stability": instances.min_stability}
            return open_sa1b(root, **limits, **common)
        case "coco":
            return open_coco(instances.annotations, root, max_area=instances.max_area, **common)
        case "pictures":
            return open_pictures(root, **common)
        case "volumes":
            return open_volumes(root, **common)
        case "tfds":
            lists = (source.include, source.exclude)
            return PreparedSource(source.tfds.dataset, "train", common["faults"], *lists)
        case "packed":
            return open_packed(root, **common)
        case _:
            return synthetic(config, source, train=True)


def synthetic(config: Any, source: Any, train: bool) -> SyntheticSource:
    """Rendered clips to train on, or others to evaluate on, which are equal for every seed."""
    s = source.synthetic
    length = (source.num_frames - 1) * source.max_stride + 1
    return SyntheticSource(
        num_clips=s.num_clips if train else s.eval_clips,
        num_frames=max(length, s.eval_frames) if train else s.eval_frames,
        size=config.model.resolution,
        max_objects=s.max_objects,
        seed=config.seed if train else 0,
        stream=TRAIN_STREAM if train else EVAL_STREAM,
        speed=s.speed,
    )


def make_eval_source(config: Any, broken: list[UserError] | None = None) -> VideoSource | None:
    """Open the evaluation clips that belong to a config.

    `config.data.eval_root`, a folder of clips or of packed ones, goes before what belongs to
    `config.data.source`: the val list or the clips held out of a folder, the validation split of
    TensorFlow Datasets, other rendered clips. None where there is nothing of the kind.
    `config.data.folder` is about `config.data.root` and not applied to another `eval_root`. What
    is wrong with clips that are left out is added to `broken`.

    Raises:
        UserError: nothing there, or something there is broken.
    """
    data = config.data
    if data.source == "synthetic" and not data.eval_root:
        return synthetic(config, data, train=False)
    if data.source == "tfds" and not data.eval_root:
        return PreparedSource(data.tfds.dataset, "validation", Faults(data.on_error, data.max_bad))
    faults = Faults(data.on_error, data.max_bad)
    if data.eval_root and is_packed(data.eval_root):
        source = open_packed(data.eval_root, key="config.data.eval_root", faults=faults)
    elif data.eval_root or (data.source == "folder" and (data.root or not data.mixture)):
        settings: dict[str, Any] = {"include": data.include, "exclude": data.exclude}
        if data.eval_root in ("", data.root):  # data.folder says how that folder is laid out
            settings |= data.folder
        source = eval_folder(data.root, data.eval_root, faults=faults, **settings)
    else:
        return None
    if broken is not None:
        broken += faults.errors
    return source


def make_train_loader(
    config: Any, parts: list[Part], process_index: int = 0, process_count: int = 1
) -> Loader:
    """The batches of one process, as `config.data` describes them.

    Raises:
        UserError: see `pipeline.make_loader`.
    """
    data = config.data
    return make_loader(
        parts,
        side=config.model.resolution,
        seed=config.seed,
        workers=data.workers,
        draw=data.draw,
        phases=data.phases_per_epoch,
        on_error=data.on_error,
        max_bad=data.max_bad,
        process_index=process_index,
        process_count=process_count,
    )
