"""Tracking through a video beside the reference's predictor: `benchmark.py inference`."""

import contextlib
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from sam2_jax.benchmarks import clips, report, settings, workers
from sam2_jax.benchmarks.settings import OURS, REFERENCE, environment
from sam2_jax.model.variants import VARIANTS
from sam2_jax.types import UserError

# Frames until all memories of a frame exist: those before are not timed. Object pointers grow on
# until frame 16, from 8 to 16 of 4 tokens each: at 512 pixels 0.4 % of what the reference attends
# to, while ours has slots for all of them from the start.
FILLING = 8
# Nor is the last frame, behind which no other is computed: ours hands a frame out once the next one
# is under way
TIMED = slice(FILLING, -1)
MODULES = {OURS: "video_ours", REFERENCE: "video_reference"}


def run(argv: list[str]) -> None:
    """Time per frame of tracking from a first frame's masks: ours and the reference's predictor.

    Ours is what evaluation runs; of the reference, its video predictor without postprocessing or
    compilation, as its evaluation runs it. Frames are in memory. Each has a process of its own,
    they take turns clip by clip, and memory is measured in fresh ones. float32 on a CPU; both keep
    memories in bfloat16.
    """
    parser = settings.make_parser(run.__doc__, 512, 24)
    parser.add_argument("--objects", default="1,3", help="of the clip; the last counts for JSON")
    parser.add_argument("--repeats", type=int, default=2, help="clips timed of each side")
    parser.add_argument("--reference", default="auto", help="yes, no, or auto: if it is installed")
    args = parser.parse_args(argv)
    settings.check(args)
    objects = parse_objects(args.objects)
    if args.frames <= FILLING + 1:
        raise UserError(
            f"--frames={args.frames}: of the first {FILLING} and the last no time is taken: "
            f"give at least {FILLING + 2}"
        )
    sides = [OURS, REFERENCE] if settings.wants_reference(args.reference) else [OURS]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        images, masks = clips.render(1, args.frames, max(objects), args.resolution)
        setup = {"name": args.variant, "variant": VARIANTS[args.variant]._asdict()}
        setup |= {"resolution": args.resolution, "threads": args.threads}
        workers.prepare(folder, setup, images, masks)
        seconds = take_turns(folder, sides, objects, args.repeats)
        peaks = {side: peak(side, folder, objects[-1]) for side in sides}
    figures = {name: x for name, x in vars(args).items() if name not in ("json", "reference")}
    report.write(args.json, figures | tell(args, objects, seconds, peaks))


def parse_objects(text: str) -> list[int]:
    """Numbers with commas between them; UserError for anything else."""
    try:
        found = [int(x) for x in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise UserError(f"--objects={text}: expected numbers from 1, with commas between them")
    return found


def take_turns(
    folder: pathlib.Path, sides: list[str], objects: list[int], repeats: int
) -> dict[str, dict[int, list[float]]]:
    """Seconds of frames by side and number of objects. A clip of each to warm up."""
    with contextlib.ExitStack() as stack:
        each = {
            side: stack.enter_context(workers.started(MODULES[side], folder, environment(side)))
            for side in sides
        }
        if REFERENCE in each:
            each[REFERENCE].ask(weights=True)
            each[OURS].ask(weights=True)
        seconds = {side: {n: [] for n in objects} for side in sides}
        for turn in range(repeats + 1):
            for n in objects:
                for side, worker in each.items():
                    took = worker.ask(objects=n)["seconds"][TIMED]
                    if turn:
                        seconds[side][n] += took
                    mean = statistics.fmean(took)
                    print(f"{n} objects, {side}: {mean:.3f} s", file=sys.stderr, flush=True)
    return seconds


def peak(side: str, folder: pathlib.Path, objects: int) -> int:
    """The most memory that a fresh process of one side ever holds over a clip."""
    with workers.started(MODULES[side], folder, environment(side)) as worker:
        return worker.ask(objects=objects)["peak_bytes"]


def tell(
    args: Any,
    objects: list[int],
    seconds: dict[str, dict[int, list[float]]],
    peaks: dict[str, int],
) -> dict[str, Any]:
    """Prints the tables and returns the figures."""
    print(
        f"seconds a frame: {args.variant}, {args.resolution} px, {args.frames} frames of which "
        f"{args.frames - FILLING - 1} timed, {args.threads} threads"
    )
    rows, by_objects = [], {}
    for n in objects:
        median = {side: statistics.median(found[n]) for side, found in seconds.items()}
        own, theirs = median[OURS], median.get(REFERENCE)
        figures = {"seconds": own, "reference_seconds": theirs}
        figures["seconds_ratio"] = report.ratio(own, theirs)
        figures["frames_per_second"] = 1 / own
        figures["reference_frames_per_second"] = theirs and 1 / theirs
        figures["all_seconds"] = {side: found[n] for side, found in seconds.items()}
        by_objects[str(n)] = figures
        for side, found in seconds.items():
            rate = 1 / median[side]
            rows.append([str(n), side, median[side], min(found[n]), max(found[n]), rate])
        rows.append([str(n), "ratio", figures["seconds_ratio"], None, None, None])
    report.table(("objects", "side", "median", "least", "most", "frames/s"), rows)
    own, theirs = peaks[OURS], peaks.get(REFERENCE)
    mib = [x and x / report.MIB for x in (own, theirs)]
    row = [f"peak of a process, MiB, {objects[-1]} objects", *mib, report.ratio(own, theirs)]
    report.table(("", OURS, REFERENCE, "ratio"), [row])
    main = {name: x for name, x in by_objects[str(objects[-1])].items() if name != "all_seconds"}
    memory = {"peak_bytes": own, "reference_peak_bytes": theirs}
    memory["memory_ratio"] = report.ratio(own, theirs)
    return main | memory | {"by_objects": by_objects}
