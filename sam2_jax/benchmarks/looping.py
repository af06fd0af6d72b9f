"""Where the training loop's time goes on the host: `benchmark.py loop`."""

import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from sam2_jax import loop, preparing, recipe, train
from sam2_jax.benchmarks import report, serving, settings
from sam2_jax.data import catalogue
from sam2_jax.types import Batch

WAIT, TRANSFER, DISPATCH, READ = "wait for data", "transfer", "dispatch", "wait for the device"
SKIPPED = 3  # first steps, of which one compiles


def run(get_config: settings.GetConfig, argv: list[str]) -> None:
    """A short real run, from rendered clips to metrics.jsonl: seconds a step by what the loop does.

    The loop is train.py's, with the default configuration's loader. Waiting for the device, in
    which the metrics of the step before are read, is the time in which it is kept busy. What is
    left of a step is `other`; below zero, parts were counted that are not of the steps timed.
    """
    parser = settings.make_parser(run.__doc__, 64, 4)
    settings.add_training(parser)
    parser.add_argument("--steps", type=int, default=30, help="of the run")
    args = parser.parse_args(argv)
    settings.check(args)
    settings.at_least("steps", args.steps, SKIPPED + 2)
    serving.use_threads(args.threads)
    config = settings.make_config(get_config, args)
    with config.unlocked():
        config.train.steps = args.steps
    with tempfile.TemporaryDirectory() as workdir:
        spent, whole = measure(config, pathlib.Path(workdir))
    # The last step, which no other follows, is not in `whole` either
    mean = {name: statistics.fmean(found[SKIPPED:-1]) for name, found in spent.items()}
    mean["other"] = whole - sum(mean.values())
    print(
        f"a step of the loop: {args.variant}, {args.resolution} px, {args.frames} frames, "
        f"{args.objects} objects, {args.batch_size} videos, {args.threads} threads"
    )
    rows = [[name, 1e3 * x, x / whole] for name, x in [*mean.items(), ("step", whole)]]
    report.table(("", "ms", "share"), rows)
    figures = {name: x for name, x in vars(args).items() if name != "json"}
    figures |= {"seconds": whole, "seconds_by_part": mean}
    report.write(args.json, figures)


def measure(config: Any, workdir: pathlib.Path) -> tuple[dict[str, list[float]], float]:
    """(seconds of every call by part, seconds of a step after the first ones)."""
    spent: dict[str, list[float]] = {name: [] for name in (WAIT, TRANSFER, DISPATCH, READ)}
    starts: list[float] = []

    def timed(name: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            spent[name].append(time.perf_counter() - begin)
            return result

        return wrapped

    ready = preparing.prepare(config, workdir)
    batches = catalogue.make_train_loader(config, ready.parts, 0, 1)
    take = timed(WAIT, functools.partial(next, batches))

    def feed() -> Iterator[Batch]:
        while True:
            starts.append(time.perf_counter())
            yield take()

    try:
        state, _, _ = preparing.start(config, ready, batches)
        step = recipe.make_config_step(config, ready.model, ready.optimizer, ready.mesh)
        jitted = timed(DISPATCH, train.jit_step(step, ready.like, ready.mesh))
        put = timed(TRANSFER, loop.sharding.put_batch)
        get = timed(READ, jax.device_get)
        with (
            mock.patch.object(loop.sharding, "put_batch", put),
            mock.patch.object(jax, "device_get", get),
        ):
            loop.run_loop(
                state,
                jitted,
                feed(),
                jax.random.key(config.seed),
                loop.make_loop_settings(config),
                ready.mesh,
                workdir=workdir,
                # Of train.py's the one that every step pays for
                hooks=loop.Hooks(save=lambda step, state: None, clips_of=batches.clips_of),
            )
    finally:
        batches.close()
    return spent, (starts[-1] - starts[SKIPPED]) / (len(starts) - 1 - SKIPPED)
