"""Reads the data that a config names, all of it, and says whether training would work on them.

  python scripts/check_data.py --config=configs/davis.py --config.data.root=DAVIS
  python scripts/check_data.py --config=FILE.py --sample=200 --contact-sheet=sheet.png --json=a.json

Every training source and all evaluation clips, those of eval.sets too, are opened and checked as
scripts/train.py does it, then every frame and mask is decoded (of rendered clips 20, and with
--sample=N N random ones of every source). Reported are sizes and numbers, what cannot be read,
what is there twice, and clips that are both trained on and evaluated on. --contact-sheet shows
clips as they are stored, and as the model gets them.

Exit status 0: training would work. 1: it would not; the last line says what to mend. 2: the
command or the config is wrong, or there is nothing to read.
"""

import json
import pathlib
import random
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for `import configs`

import os
from typing import Any, NamedTuple

from absl import flags
from tqdm.auto import tqdm

from sam2_jax import config as config_lib
from sam2_jax import validation
from sam2_jax.data import catalogue, pipeline, sheet, sources, survey
from sam2_jax.data.sources import SKIP, VideoSource
from sam2_jax.data.synthetic import SyntheticSource
from sam2_jax.data.tally import TOLD, Tally, as_json, duplicates, obstacle, rows
from sam2_jax.types import UserError

_SAMPLE = flags.DEFINE_integer("sample", 0, "Read so many random clips of each source; 0: all.", 0)
_WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Processes that read; 0: threads. Not given: threads for little, else one a core.",
    0,
)
_SHEET = flags.DEFINE_string("contact_sheet", "", "PNG file to draw samples of the data to.")
flags.DEFINE_alias("contact-sheet", "contact_sheet")
_JSON = flags.DEFINE_string("json", "", "File to write the report to as JSON.")
EVALUATION = "evaluation"
RENDERED = 20  # rendered clips that are read: no file of theirs can be broken
MANY = 10_000  # frames from which on processes are worth the seconds that they take to start


class Opened(NamedTuple):
    """What training would read, and why it would not even start."""

    parts: list[pipeline.Part]
    evaluation: list[validation.EvalSet]
    obstacles: list[str]
    broken: list[str]  # clips that cannot be opened, and why


class Report(NamedTuple):
    """What was found in one source."""

    name: str
    source: VideoSource
    part: pipeline.Part | None  # None: for evaluation
    indices: list[int]  # of the clips to read
    tally: Tally


def open_all(config: Any) -> Opened:
    """Open everything as training does; where that stops at broken clips, without these.

    Where nothing is left without them, nothing is opened, and what broke first is the obstacle.

    Raises:
        UserError: what is wrong is not a matter of some broken clips.
    """
    lenient = config.copy_and_resolve_references().unlock()
    lenient.data.on_error, lenient.data.max_bad = SKIP, 1.0
    obstacles: list[str] = []
    broken: list[UserError] = []
    opened: list[Any] = []
    for make in (catalogue.make_parts, validation.make_eval_sets):
        found: list[UserError] = []
        try:
            opened.append(make(config, found))
        except UserError as error:
            found = []  # the same ones are found again
            try:
                opened.append(make(lenient, found))
            except UserError as again:
                if str(again) == str(error):
                    raise  # broken clips are not the reason
                opened.append([])
            obstacles.append(str(error))
        broken += found
    parts, sets = opened
    evaluation = [chosen for chosen in sets if len(chosen.source)]
    return Opened(parts, evaluation, obstacles, [str(error) for error in broken])


def label_of(chosen: validation.EvalSet) -> str:
    """What a set of evaluation clips is called in the report."""
    return f"{EVALUATION} {chosen.name}".strip()


def chosen(source: VideoSource, count: int, seed: int) -> list[int]:
    """Which of the first `count` clips to read, ascending."""
    most = _SAMPLE.value or (RENDERED if isinstance(source, SyntheticSource) else count)
    return sorted(random.Random(seed).sample(range(count), min(count, most)))


def read(config: Any, opened: Opened) -> list[Report]:
    """Read all sources, under one progress bar."""
    reports = []
    for number, part in enumerate(opened.parts):
        indices = chosen(part.source, len(part.source), number)
        reports.append(Report(part.name, part.source, part, indices, Tally()))
    for evaluated in opened.evaluation:
        source = evaluated.source
        count = min(len(source), config.eval.max_clips or len(source))
        indices = chosen(source, count, len(reports))
        reports.append(Report(label_of(evaluated), source, None, indices, Tally()))
    jobs = [(number, i) for number, report in enumerate(reports) for i in report.indices]
    all_sources = [report.source for report in reports]
    lengths = [all_sources[number].video(i).num_frames for number, i in jobs]
    workers = _WORKERS.value
    if workers is None:
        workers = (os.cpu_count() or 1) if sum(lengths) >= MANY else 0
    with tqdm(total=sum(lengths), desc="reading", unit="frame", leave=False, disable=None) as bar:
        found = survey.look_at(all_sources, jobs, workers)
        for length, (number, clip) in zip(lengths, found, strict=True):
            reports[number].tally.add(clip)
            bar.update(length)
    return reports


def tables(config: Any, opened: Opened, reports: list[Report]) -> list[list[tuple[str, str]]]:
    """Lines of every source: what scripts/train.py shows at its start, then what was found."""
    starts = pipeline.describe(opened.parts, config.data.draw)
    found = []
    for report in reports:
        if report.part is None:
            lines = sources.describe(report.source)
        else:
            split = [(*label.split(" ", 1), text) for label, text in starts]
            lines = [(label, text) for name, label, text in split if name == report.name]
            lines.append(("epoch", f"{report.part.share.batches:,} batches"))
        found.append([*lines, *rows(report.tally, len(report.source))])
    return found


class Shared(NamedTuple):
    """Clips with frames in common, in words."""

    leaks: list[str]  # one is trained on, the other one evaluated on
    repeats: list[str]


def shared(opened: Opened, reports: list[Report]) -> Shared:
    """Describe what `duplicates` finds."""
    found = Shared([], [])
    last = len(opened.parts)
    for pair in duplicates([report.tally for report in reports]):
        names = []
        for number, index in (pair.one, pair.other):
            report = reports[number]
            names.append(f"{report.source.video(index).name} ({report.name})")
        shortest = min(reports[n].tally.lengths[i] for n, i in (pair.one, pair.other))
        text = f"{names[0]} and {names[1]}: {pair.frames} of {shortest} frames"
        leaks = pair.one[0] < last <= pair.other[0]
        (found.leaks if leaks else found.repeats).append(text)
    return found


def described(report: Report) -> dict[str, Any]:
    """What the JSON file holds of a source."""
    sizes = {report.source.video(i)[2:] for i in report.indices}
    return {
        "name": report.name,
        "source": report.source.name,
        "clips": len(report.source),
        "frame_sizes": sorted([width, height] for height, width in sizes),
        "notes": report.source.notes,
        "batches_per_epoch": report.part.share.batches if report.part else None,
        **as_json(report.tally),
    }


def draw(config: Any, opened: Opened, path: pathlib.Path) -> None:
    """Draw the contact sheet."""
    side, seed = config.model.resolution, config.seed
    count = sheet.rows_of_each(len(opened.parts) + len(opened.evaluation))
    groups = {}
    for part in opened.parts:
        heading = f"{part.name}: as stored, and as the model gets it ({side} x {side})"
        groups[heading] = sheet.training_rows(part, side, seed, count)
    for evaluated in opened.evaluation:
        heading = f"{label_of(evaluated)}: as stored"
        groups[heading] = sheet.evaluation_rows(evaluated.source, seed, count)
    sheet.contact_sheet(groups, path)


def check_output(flag: str, name: str) -> None:
    """Raises `UserError` unless the folder of a file can be made; before hours of reading."""
    try:
        pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag}={name}: its folder cannot be made ({error})") from error
    if name and pathlib.Path(name).is_dir():
        raise UserError(f"--{flag}={name} is a folder, expected the name of a file")


def say(lines: list[tuple[str, str]]) -> None:
    """Prints two aligned columns."""
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"  {label:<{width}}  {text}")


def told(texts: list[str]) -> list[tuple[str, str]]:
    """The first of many lines."""
    lines = [("", text) for text in texts[:TOLD]]
    more = len(texts) - len(lines)
    return [*lines, ("", f"and {more:,} more")] if more else lines


def judge(config: Any, report: Report) -> list[str]:
    """What would stop training, in words; at most one."""
    data = config.data
    # Evaluation leaves out nothing
    on_error = data.on_error if report.part else sources.STOP
    text = obstacle(report.tally, on_error, data.max_bad)
    if text and report.part and data.on_error == sources.STOP and not report.tally.mismatches.count:
        text += "; or leave out such clips with --config.data.on_error=skip"
    return [f"{report.name}: {text}"] if text else []


def main(config: Any) -> int:
    """Read, report, judge."""
    check_output("contact-sheet", _SHEET.value)
    check_output("json", _JSON.value)
    opened = open_all(config)
    reports = read(config, opened)
    found, twice = tables(config, opened, reports), shared(opened, reports)
    obstacles = list(opened.obstacles)
    for report in reports:
        obstacles += judge(config, report)
    for report, lines in zip(reports, found, strict=True):
        print(report.name)
        say(lines)
    if opened.broken:
        print(f"broken: {len(opened.broken)} clips")
        say(told(opened.broken))
    if twice.repeats:
        print("clips with frames in common")
        say(told(twice.repeats))
    if twice.leaks:
        print(f"WARNING: {len(twice.leaks)} pairs of clips are trained on and evaluated on, so")
        print("evaluation measures what was learnt by heart: exclude them (config.data.exclude)")
        say(told(twice.leaks))
    if _SHEET.value and reports:
        draw(config, opened, pathlib.Path(_SHEET.value))
        print(f"contact sheet: {_SHEET.value}")
    if _JSON.value:
        whole = {
            "works": not obstacles,
            "obstacles": obstacles,
            "broken": opened.broken,
            "sources": [described(report) for report in reports],
            "duplicates": twice.repeats,
            "leakage": twice.leaks,
        }
        pathlib.Path(_JSON.value).write_text(json.dumps(whole, indent=2) + "\n")
    if obstacles:
        more = f" (and {len(obstacles) - 1} more)" if len(obstacles) > 1 else ""
        print(f"training would stop: {obstacles[0]}{more}")
        return 1
    print("training would work")
    return 0


if __name__ == "__main__":
    config_lib.run(main)
