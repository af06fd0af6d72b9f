"""Evaluation while training: named sets of clips, prompts, shares of devices and processes."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from sam2_jax import checkpoint, cluster, evaluate, metrics, plots
from sam2_jax.data import catalogue
from sam2_jax.data.folders import EVAL, open_folder
from sam2_jax.data.sources import Faults, VideoSource
from sam2_jax.data.sources import describe as describe_source
from sam2_jax.predict import video
from sam2_jax.types import UserError

SHOWN = 6  # clips on a picture
MASK = "mask"  # the prompt whose rows bear no name


class EvalSet(NamedTuple):
    """Clips to evaluate on; `name` is part of what metrics call the results, "" of none."""

    name: str
    source: VideoSource


def make_eval_sets(config: Any, broken: list[UserError] | None = None) -> list[EvalSet]:
    """What a config evaluates on: the clips that belong to its data, then `eval.sets` by name.

    What is wrong with clips that are left out (`data.on_error`) is added to `broken`.

    Raises:
        UserError: a set is not there, is broken, or has no frame that is scored; or a prompt is
            none.
    """
    for prompt in config.eval.prompts:
        evaluate.parse_prompt(prompt)
    own = catalogue.make_eval_source(config, broken)
    sets = [EvalSet("", own)] if own else []
    for name, root in config.eval.sets.items():
        faults = Faults(config.data.on_error, config.data.max_bad)
        key = f"config.eval.sets.{name}"
        sets.append(EvalSet(name, open_folder(root, EVAL, key=key, faults=faults)))
        if broken is not None:
            broken += faults.errors
    for chosen in sets:
        evaluate.check_source(chosen.source, config.eval.max_clips)
    return sets


def describe(sets: Sequence[EvalSet], prompts: Sequence[str]) -> list[tuple[str, str]]:
    """`(label, value)` lines of the start-up table."""
    if not sets:
        return [("evaluation", "none: give --config.data.eval_root")]
    rows = []
    for chosen in sets:
        label = f"evaluation {chosen.name}".strip()
        rows += [(f"{label} {name}", value) for name, value in describe_source(chosen.source)]
    return [*rows, ("evaluation prompts", ", ".join(prompts))]


def row_name(*parts: str) -> str:
    """eval/SET/PROMPT/METRIC without what is not named."""
    return "/".join(["eval", *(part for part in parts if part and part != MASK)])


def validate(
    config: Any,
    model: Any,
    sets: Sequence[EvalSet],
    workdir: str | Path,
    params: Any,
    step: int,
    check: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Evaluates a model in training on all sets: lines on the screen, pictures in the workdir.

    The clips of a set are dealt out to the processes, and there to the devices. Returns the row
    for metrics.jsonl, fractions: for each set and prompt `eval/SET/PROMPT/J&F`, `J` and `F`, and
    once a set the static baseline's `eval/SET/static J&F` and `static J`. The name of a set may be
    empty, and the prompt "mask" is not written. Pictures are `overlay.png` or `overlay-SET.png`,
    of the first prompt. `check` is called before every clip; what it raises ends all.
    """
    row: dict[str, float] = {}
    copies = _copies(params)
    tracker = _tracker(model, config.train.precision)
    for chosen in sets:
        for number, prompt in enumerate(config.eval.prompts):
            sheet = plots.Sheet(_share(config, chosen)[:SHOWN])
            predictors = [
                evaluate.tracker_predictor(
                    tracker, copy, config.model.resolution, prompt, sheet.note
                )
                for copy in copies
            ]
            results = _evaluate(config, predictors, chosen, prompt, sheet, check)
            scores = {"J&F": results.jf, "J": results.j, "F": results.f}
            row |= {row_name(chosen.name, prompt, key): value for key, value in scores.items()}
            if jax.process_index():
                continue
            named = " ".join(part for part in (chosen.name, prompt) if part and part != MASK)
            tqdm.write(f"step {step}{', ' * bool(named)}{named}: {results}")
            if not number:
                _draw(sheet, results, chosen.name, Path(workdir), step)
        row[row_name(chosen.name, "static J&F")] = results.static.jf
        row[row_name(chosen.name, "static J")] = results.static.j
    return row


def _share(config: Any, chosen: EvalSet) -> range:
    """This process's clips of a set."""
    count = min(len(chosen.source), config.eval.max_clips or len(chosen.source))
    return range(count)[jax.process_index() :: jax.process_count()]


def _evaluate(
    config: Any,
    predictors: list[evaluate.PredictClip],
    chosen: EvalSet,
    prompt: str,
    sheet: plots.Sheet,
    check: Callable[[], None] | None,
) -> metrics.Results:
    """This process's share of a set, and what the others found in theirs."""
    source, clips = chosen.source, _share(config, chosen)
    count = min(len(source), config.eval.max_clips or len(source))
    leads = jax.process_index() == 0
    found = evaluate.score_clips(
        predictors,
        source,
        clips,
        config.eval.max_frames,
        sheet.watch if leads else None,
        leads,
        " ".join(part for part in ("evaluate", chosen.name, prompt) if part),
        check,
    )
    order = {source.video(i).name: i for i in range(count)}
    rows = sorted(_gather(found), key=lambda row: order[row.clip])
    return evaluate.collect(rows, count)


def _gather(found: list[metrics.ObjectScores]) -> list[metrics.ObjectScores]:
    """What all processes found, the same on each of them."""
    if jax.process_count() == 1:
        return found
    rows = [json.loads(text) for text in cluster.gather_text(json.dumps(found))]
    return [metrics.ObjectScores(*row) for share in rows for row in share]


def _draw(sheet: plots.Sheet, results: metrics.Results, name: str, workdir: Path, step: int):
    if not sheet.rows:
        return
    by_clip = {clip: scores.jf for clip, scores in results.clips.items()}
    title = f"step {step}: J&F {results.jf:.3f}, static mask {results.static.jf:.3f}"
    path = workdir / f"overlay{'-' * bool(name)}{name}.png"
    with checkpoint.writing(workdir):
        plots.overlay_sheet(sheet.rows, by_clip, path, title=title)


def _copies(params: Any) -> list[Any]:
    """A whole copy for each device of this process, wherever the parameters were sharded to.

    Forced devices of a CPU share its cores, and would each compile the programs again: one copy.
    """
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        devices = devices[:1]
    return [jax.device_put(params, device) for device in devices]


@functools.lru_cache(maxsize=4)
def _tracker(model: Any, precision: str) -> video.Tracker:
    """One for each model and precision: a later evaluation finds its programs compiled."""
    return video.make_tracker(model, precision=precision)
