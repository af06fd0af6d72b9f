"""A training step beside the reference's: `benchmark.py step`."""

import contextlib
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from sam2_jax import work
from sam2_jax.benchmarks import clips, ours, parts, plans, reference_work, report, settings, workers
from sam2_jax.benchmarks.settings import OURS, REFERENCE, environment
from sam2_jax.model.variants import VARIANTS

PLANS = "mask1,mask2,point11,point12,point22,box11"


def run(get_config: settings.GetConfig, argv: list[str]) -> None:
    """A training step of ours and of the reference: seconds, memory and work.

    With --precision=bfloat16 the reference runs under autocast, as its trainer does on GPUs.
    Work is that of forward and backward pass, two operations for each multiplication with its
    addition, without what is computed again to save memory. Of ours it is counted over the step's
    jaxpr, of the reference by PyTorch's FlopCounterMode over tensors without values.
    """
    parser = settings.make_parser(run.__doc__, 1024, 8)
    settings.add_training(parser)
    parser.add_argument("--plans", default=PLANS, help="prompts of the step, by name")
    parser.add_argument("--repeats", type=int, default=3, help="steps timed of each plan and side")
    parser.add_argument("--reference", default="auto", help="yes, no, or auto: if it is installed")
    parser.add_argument("--work-only", action="store_true", help="count, run nothing")
    parser.add_argument("--parts", action="store_true", help="work of ours by part of the model")
    parser.add_argument("--recomputed", action="store_true", help="count what is done again, too")
    args = parser.parse_args(argv)
    settings.check(args)
    names = settings.parse_plans(args.plans, args.frames)
    beside = settings.wants_reference(args.reference)
    config = settings.make_config(get_config, args)
    given = {name: plans.make(name, args.frames, config.prompts.corrections) for name in names}
    figures = {name: x for name, x in vars(args).items() if name not in ("json", "reference")}
    figures |= {"plans": names}
    if not args.work_only:
        figures |= measure(config, args, given, beside)
    figures |= count(config, args, given, beside)
    report.write(args.json, figures)


def measure(config: Any, args: Any, given: dict[str, Any], beside: bool) -> dict[str, Any]:
    """Times both sides in turn, then has each work alone for its memory; prints both."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        images, masks = clips.render(args.batch_size, args.frames, args.objects, args.resolution)
        variant = VARIANTS[args.variant]._asdict()
        setup = {"config": config.to_dict(), "variant": variant, "precision": args.precision}
        setup |= {"resolution": args.resolution, "threads": args.threads}
        workers.prepare(folder, setup, images, masks, given)
        seconds, losses = take_turns(folder, list(given), args.repeats, beside)
        peaks = {side: peak(side, folder, list(given)) for side in seconds}
    print(
        f"a step: {args.variant}, {args.resolution} px, {args.frames} frames, {args.objects} "
        f"objects, {args.batch_size} videos, {args.threads} threads, {args.precision}"
    )
    median = {
        side: {n: statistics.median(x) for n, x in found.items()} for side, found in seconds.items()
    }
    ratios = {
        name: report.ratio(x, median.get(REFERENCE, {}).get(name))
        for name, x in median[OURS].items()
    }
    rows = []
    for plan in given:
        for side in seconds:
            took = seconds[side][plan]
            ratio = ratios[plan] if side == OURS else None
            row = median[side][plan], ratio, min(took), max(took), losses[side][plan]
            rows.append([plan, side, *row])
    report.table(("plan", "side", "seconds", "ratio", "least", "most", "first loss"), rows)
    return figures_of(median, seconds, losses, peaks) | {"seconds_ratio_by_plan": ratios}


def take_turns(
    folder: pathlib.Path, names: list[str], repeats: int, beside: bool
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, float]]]:
    """Seconds of steps by side and plan, and the losses of the first ones, of the same weights.

    Each plan once to warm up, then `repeats` turns. A turn is two steps, of which the second is
    timed: in training no step follows a pause, in which a virtual machine takes free memory back.
    """
    with contextlib.ExitStack() as stack:
        sides = {OURS: stack.enter_context(workers.started("step_ours", folder, environment(OURS)))}
        if beside:
            theirs = stack.enter_context(workers.started("step_reference", folder))
            sides[REFERENCE] = theirs
            for side in reversed(sides.values()):
                side.ask(weights=True)
        seconds = {side: {name: [] for name in names} for side in sides}
        losses: dict[str, dict[str, float]] = {side: {} for side in sides}
        for turn in range(repeats + 1):
            for name in names:
                for side, worker in sides.items():
                    found = worker.ask(plan=name)
                    if turn:
                        found = worker.ask(plan=name)
                        seconds[side][name].append(found["seconds"])
                    else:
                        losses[side][name] = found["loss"]
                    print(f"{name}, {side}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
    return seconds, losses


def peak(side: str, folder: pathlib.Path, names: list[str]) -> tuple[int, int]:
    """The most memory that a fresh process of one side ever holds, and once it is under way.

    The first steps, of each plan, compile and allocate; the second ones are under way.
    """
    module = "step_ours" if side == OURS else "step_reference"
    with workers.started(module, folder, environment(side)) as worker:
        for name in names:
            worker.ask(plan=name)
        first, *rest = names
        found = worker.ask(plan=first, forget_peak=True)
        for name in rest:
            found = worker.ask(plan=name)
        return found["peak_bytes"], found["peak_since"]


def figures_of(
    median: dict[str, dict[str, float]],
    seconds: dict[str, dict[str, list[float]]],
    losses: dict[str, dict[str, float]],
    peaks: dict[str, tuple[int, int]],
) -> dict[str, Any]:
    """The figures for JSON; `seconds` is the mean over the plans of their medians."""
    own, theirs = (
        statistics.fmean(median[side].values()) if side in median else None
        for side in (OURS, REFERENCE)
    )
    rows = [["seconds, mean of the plans", own, theirs, report.ratio(own, theirs)]]
    memory: dict[str, Any] = {}
    labels = "peak of a process, MiB", "peak once under way, MiB"
    for i, (prefix, label) in enumerate(zip(("", "steady_"), labels, strict=True)):
        both = [peaks[side][i] if side in peaks else None for side in (OURS, REFERENCE)]
        memory[f"{prefix}peak_bytes"], memory[f"reference_{prefix}peak_bytes"] = both
        memory[f"{prefix}memory_ratio"] = report.ratio(*both)
        rows.append([label, *(x and x / report.MIB for x in both), report.ratio(*both)])
    report.table(("", OURS, REFERENCE, "ratio"), rows)
    return memory | {
        "seconds": own,
        "reference_seconds": theirs,
        "seconds_ratio": report.ratio(own, theirs),
        "seconds_by_plan": median[OURS],
        "reference_seconds_by_plan": median.get(REFERENCE),
        "all_seconds": seconds,
        "first_losses": losses,
    }


def teraflops(scopes: Mapping[str, work.Scopes]) -> dict[str, float]:
    """Work by plan; warns on stderr of plans that do not settle which branches are taken."""
    found = {name: work.total(x.values()) for name, x in scopes.items()}
    for name, done in found.items():
        if done.guessed:
            print(
                f"warning: {name} does not settle {done.guessed} branches of the step: the work of "
                "the largest is counted",
                file=sys.stderr,
            )
    return {name: done.total / 1e12 for name, done in found.items()}


def count(config: Any, args: Any, given: dict[str, Any], beside: bool) -> dict[str, Any]:
    """Counts and prints the work of both sides."""
    scopes = ours.count(config, given)
    own = teraflops(scopes)
    theirs: dict[str, float] = {}
    if beside:
        sizes = args.batch_size, args.frames, args.objects, args.resolution
        counted = reference_work.count(VARIANTS[args.variant]._asdict(), sizes, given)
        theirs = {name: x["whole"] / 1e12 for name, x in counted.items()}
    ratios = {name: report.ratio(x, theirs.get(name)) for name, x in own.items()}
    print(
        f"work of a step, TFLOP: {args.variant}, {args.resolution} px, {args.frames} frames,",
        end="",
    )
    print(f" {args.objects} objects, {args.batch_size} videos")
    rows = [[name, x, theirs.get(name), ratios[name]] for name, x in own.items()]
    report.table(("plan", "ours", "reference", "ratio"), rows)
    figures = {"tflop_by_plan": own, "reference_tflop_by_plan": theirs or None}
    figures["work_ratio_by_plan"] = ratios
    if args.recomputed:
        scopes = ours.count(config, given, recomputed=True)
        figures["tflop_run_by_plan"] = teraflops(scopes)
        print("with what is computed again to save memory")
        report.table(("plan", "ours"), list(figures["tflop_run_by_plan"].items()))
    if args.parts:
        figures["tflop_by_part"] = {name: parts.by_part(x) for name, x in scopes.items()}
        for name, found in figures["tflop_by_part"].items():
            print(f"{name}, by part")
            passes = parts.FORWARD, parts.BACKWARD, parts.AGAIN
            report.table(
                ("part", *passes), [[part, *(x[p] for p in passes)] for part, x in found.items()]
            )
    return figures
