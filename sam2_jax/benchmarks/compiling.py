"""Time to the first training step: `benchmark.py compile`."""

import pathlib
import sys
import tempfile
import time
from typing import Any

from sam2_jax.benchmarks import clips, report, settings, workers

COLD, WARM = "cold", "warm"


def run(get_config: settings.GetConfig, argv: list[str]) -> None:
    """Time to the first training step, without and with the compilation cache.

    Each in a fresh process, with the step that train.py compiles: all plans are in it. Imports are
    train.py's, the batch is at hand.
    """
    parser = settings.make_parser(run.__doc__, 128, 8)
    settings.add_training(parser)
    args = parser.parse_args(argv)
    settings.check(args)
    config = settings.make_config(get_config, args)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        images, masks = clips.render(args.batch_size, args.frames, args.objects, args.resolution)
        setup = {"config": config.to_dict(), "threads": args.threads}
        workers.prepare(folder, setup, images, masks)
        found = {}
        for kind in (COLD, WARM):
            print(f"{kind} ...", file=sys.stderr, flush=True)
            found[kind] = first_step(folder)
    phases = list(found[COLD]["seconds"])
    print(
        f"time to the first step, seconds: {args.variant}, {args.resolution} px, {args.frames} "
        f"frames, {args.objects} objects, {args.batch_size} videos, {args.threads} threads"
    )
    rows: list[list[Any]] = [
        [phase, *(found[kind]["seconds"][phase] for kind in found)] for phase in phases
    ]
    totals = {kind: sum(x["seconds"].values()) for kind, x in found.items()}
    rows.append(["all", *totals.values()])
    rows.append(["peak, MiB", *(x["peak_bytes"] / report.MIB for x in found.values())])
    report.table(("", *found), rows)
    figures = {name: x for name, x in vars(args).items() if name != "json"}
    for kind, x in found.items():
        figures[f"{kind}_seconds"] = totals[kind]
        figures[f"{kind}_seconds_by_phase"] = x["seconds"]
        figures[f"{kind}_peak_bytes_by_phase"] = x["peaks"]
    report.write(args.json, figures)


def first_step(folder: pathlib.Path) -> dict[str, Any]:
    """What a fresh process took, its compilation cache in the folder."""
    env = settings.environment(settings.OURS) | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }
    started = time.time()
    with workers.started("first_step", folder, env) as worker:
        return worker.ask(started=started)
