"""The loader beside the reference's: `benchmark.py data`."""
# pyright: reportMissingImports=false

import contextlib
import io
import pathlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sam2_jax.benchmarks import report
from sam2_jax.config import Parser
from sam2_jax.data.augment import AugmentSettings, augment
from sam2_jax.data.davis import clip_folders
from sam2_jax.data.folders import TRAIN, open_folder
from sam2_jax.data.pipeline import Part, make_example
from sam2_jax.data.sampling import Sampling, sample_clip
from sam2_jax.data.sources import keep_usable
from sam2_jax.types import UserError


def run(argv: list[str]) -> None:
    """Frames a second that one core makes ready for the model: ours and the reference's.

    Both sample a clip, decode it and apply the reference's recipe for fine-tuning on MOSE (flip,
    rotation and shear, resize, colour), in turn on the same clips, in one thread of one process;
    a core's seconds are those of the process, waits for the disk not counted. The reference then
    turns pixels to normalised float32, which here the device does: its time until then is given,
    too. Figures are medians over clips.
    """
    parser = Parser(run.__doc__)
    parser.add_argument("--data_root", required=True, help="DAVIS layout, or a flat folder")
    parser.add_argument("--resolution", type=int, default=1024, help="pixels")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--objects", type=int, default=3, help="of a clip, at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="to measure, about")
    parser.add_argument("--step_seconds", type=float, help="of a training step: tells its wait")
    parser.add_argument("--batch_size", type=int, default=1, help="clips a step, of this host")
    parser.add_argument("--workers", type=int, default=1, help="cores that load, of this host")
    report.add_json(parser)
    args = parser.parse_args(argv)
    for name in ("resolution", "frames", "objects", "batch_size", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    seconds, objects, missing = measure_data(args)
    rate = {name: args.frames / statistics.median(found) for name, found in seconds.items()}
    names = "whole", "decode", "augment", "reference", "reference_uint8"
    whole, decode, augmenting, reference, reference_uint8 = (rate.get(name) for name in names)
    assert whole
    load = args.batch_size * args.frames / (whole * args.workers)
    figures = {
        "frames_per_second_per_core": whole,
        "reference_frames_per_second_per_core": reference,
        "speedup": whole / reference if reference else None,
        "decode_frames_per_second_per_core": decode,
        "augment_frames_per_second_per_core": augmenting,
        "reference_until_uint8_frames_per_second_per_core": reference_uint8,
        "speedup_until_uint8": whole / reference_uint8 if reference_uint8 else None,
        "load_seconds": load,
        "wait_share": None if args.step_seconds is None else max(0, 1 - args.step_seconds / load),
        "resolution": args.resolution,
        "frames": args.frames,
        "objects": statistics.mean(objects),
        "clips": len(objects),
    }
    print(
        f"{len(objects)} clips of {args.frames} frames, {figures['objects']:.1f} objects, ", end=""
    )
    print(f"{args.resolution} pixels; frames per second per core")
    for label, value in (
        ("decode", decode),
        ("augment", augmenting),
        ("sample, decode, augment", whole),
        ("reference, until uint8", reference_uint8),
        ("reference", reference),
    ):
        print(f"  {label:24}{value:8.1f}" if value else f"  {label:24}    none: {missing}")
    if reference:
        print(f"  {'times the reference':24}{figures['speedup']:8.2f}")
    if args.step_seconds is not None:
        print(
            f"{args.workers} core(s) load {args.batch_size} clip(s) in {load:.3f} s: steps of "
            f"{args.step_seconds:.3f} s wait for {figures['wait_share']:.1%} of their time"
        )
    report.write(args.json, figures)


def measure_data(args: Any) -> tuple[dict[str, list[float]], list[int], str]:
    """Seconds a clip by what was measured, objects of each clip, and why there is no reference."""
    source = keep_usable(open_folder(args.data_root, TRAIN, key="--data_root"), args.frames)
    sampling = Sampling(args.frames, args.objects)
    part = Part("data", source, sampling, AugmentSettings(), 1)
    names = [source.video(index).name for index in range(len(source))]
    seconds: dict[str, list[float]] = {"decode": [], "augment": [], "whole": []}
    objects: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        reference, missing = open_reference(args, names, pathlib.Path(folder))
        begin, turn = time.monotonic(), 0
        while turn <= len(names) or time.monotonic() - begin < args.seconds:
            index, rng = turn % len(names), np.random.default_rng(turn)
            starts = [time.process_time()]
            frames = source.video(index).num_frames
            sample = sample_clip(rng, lambda t, i=index: source.objects(i, t), frames, sampling)
            clip = source.read(index, sample.frames, sample.objects)
            starts.append(time.process_time())
            augment(rng, *clip, args.resolution, part.augment)
            starts.append(time.process_time())
            make_example(part, index, np.random.default_rng(turn), args.resolution)
            starts.append(time.process_time())
            spent = dict(zip(seconds, np.diff(starts).tolist(), strict=False))
            if reference:
                spent["reference_uint8"], spent["reference"] = reference(names[index], turn)
            if turn:  # the first one warms up
                objects.append(len(sample.objects))
                for name, value in spent.items():
                    seconds.setdefault(name, []).append(value)
            turn += 1
    return seconds, objects, missing


def open_reference(
    args: Any, names: list[str], folder: pathlib.Path
) -> tuple[Callable[[str, int], tuple[float, float]] | None, str]:
    """Seconds that the reference takes for a clip, until uint8 and in all; or None and why."""
    try:
        import torch
        from training.dataset import transforms as t
        from training.dataset.vos_dataset import VOSDataset
        from training.dataset.vos_raw_dataset import PNGRawDataset
        from training.dataset.vos_sampler import RandomUniformSampler
    except ImportError as error:
        return None, f"not installed ({error}); it takes torch, torchvision and sam2"
    torch.set_num_threads(1)
    # The list of sam2.1_hiera_b+_MOSE_finetune.yaml, in facebookresearch/sam2@2b90b9f
    recipe = [
        t.RandomHorizontalFlip(True),
        t.RandomAffine(25, True, shear=20, image_interpolation="bilinear", log_warning=False),
        t.RandomResizeAPI(args.resolution, True, square=True),
        t.ColorJitter(True, 0.1, 0.03, 0.03, None),
        t.RandomGrayscale(True, 0.05),
        t.ColorJitter(False, 0.1, 0.05, 0.05, None),
    ]
    to_float = [t.ToTensorAPI(), t.NormalizeAPI([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    images, annotations, _ = clip_folders(pathlib.Path(args.data_root), "", "--data_root")
    listing = folder / "clips.txt"
    listing.write_text("".join(f"{name}.mp4\n" for name in names))  # it cuts a suffix off
    sampler = RandomUniformSampler(args.frames, args.objects)
    with contextlib.redirect_stdout(io.StringIO()):
        videos = PNGRawDataset(str(images), str(annotations), str(listing))
        dataset = VOSDataset([t.ComposeAPI(recipe)], False, videos, sampler, 1)
    order = sorted(names)

    def load(name: str, seed: int) -> tuple[float, float]:
        random.seed(seed)
        torch.manual_seed(seed)
        begin = time.process_time()
        point = dataset[order.index(name)]
        until = time.process_time()
        t.ComposeAPI(to_float)(point)
        return until - begin, time.process_time() - begin

    try:
        load(names[0], 0)
    except Exception as error:  # whatever it stumbles over, ours can be measured
        return None, f"it cannot read these clips ({type(error).__name__}: {error})"
    return load, ""
