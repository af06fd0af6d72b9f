"""Scores a checkpoint on annotated video: tracks the first frame's masks to the end of each clip.

  python scripts/evaluate.py --checkpoint=runs/davis-tiny --data_root=DAVIS --output=predictions
  python scripts/evaluate.py --checkpoint=sam2.1_hiera_tiny.pt --data_root=DAVIS --output=official

CHECKPOINT is a workdir (its last step) or one step, workdir/checkpoints/N, where config.json of
the workdir says which model it is; or a file of weights, .pt, .pth or .safetensors, which is
recognised by its tensors and run at --resolution=N pixels (1024 if not given). DATA_ROOT has the
DAVIS layout (its val list is used) or is a flat folder with JPEGImages/ and Annotations/. OUTPUT
gets CLIP/FRAME.png, palette images with the ids of the ground truth, overlay.png, and
results.json: J, F and J&F (fractions; the first and the last frame are not scored) over all
objects and for each, beside those of the repeated first mask.
"""

import json
import os
import pathlib
import sys

from sam2_jax import startup

if __name__ == "__main__":
    startup.begin()

import jax
import numpy as np
from PIL import Image

from sam2_jax import checkpoint, evaluate, initial, metrics, plots, resume
from sam2_jax.config import Parser
from sam2_jax.data.folders import EVAL, FolderSource, open_folder
from sam2_jax.model.sam2 import Sam2, init_params, make_sam2
from sam2_jax.predict.video import make_tracker
from sam2_jax.types import UserError, fail

RESOLUTION = 1024  # that of the released weights


def load(
    path: pathlib.Path, resolution: int | None = None, ema: bool = False, base: str = ""
) -> tuple[Sam2, dict]:
    """The model that a checkpoint belongs to, and its parameters (float32).

    `resolution` is for files of weights only, which fit every one; `ema` and `base` as in
    `initial.load_init`.
    """
    found = initial.find_params(path, key="--checkpoint")
    model = model_of_file(found, resolution) if found.is_file() else model_of_run(path, found)
    if resolution is not None and not found.is_file():
        raise UserError(
            f"--resolution={resolution} is for files of weights: --checkpoint={path} is of "
            f"{model.resolution} pixels, as its {resume.CONFIG} says; leave the flag out"
        )
    like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return model, initial.load_init(found, like, ema, base)


def model_of_file(found: pathlib.Path, resolution: int | None) -> Sam2:
    """The model of a file of weights, by its tensors."""
    variant, version = initial.identify(found)
    return make_sam2(variant, RESOLUTION if resolution is None else resolution, version)


def model_of_run(path: pathlib.Path, found: pathlib.Path) -> Sam2:
    """The model of a folder, by the config.json above it; `path` is what the user gave."""
    where = initial.config_beside(found)
    if where is None:
        raise UserError(
            f"--checkpoint={path}: no {resume.CONFIG} beside or above it says which model it "
            "is; give a workdir of scripts/train.py, or one of its checkpoints/N"
        )
    config = resume.read_config(where)
    try:
        m = (config or {})["model"]
        return make_sam2(m["variant"], m["resolution"], version=m["version"])
    except (TypeError, KeyError) as e:
        raise UserError(
            f"{where / resume.CONFIG} describes no model ({e!r}): expected model.variant, "
            "model.resolution and model.version, as scripts/train.py writes them"
        ) from e


def precision_of(path: pathlib.Path) -> str:
    """The `train.precision` of the run that a checkpoint belongs to; "" of a file of weights."""
    found = initial.find_params(path, key="--checkpoint")
    where = None if found.is_file() else initial.config_beside(found)
    config = resume.read_config(where) if where else None
    return (config or {}).get("train", {}).get("precision", "")


class Writer:
    """Writes every predicted frame as an image of object ids, named after the true mask's file.

    Indexed images where ids fit a palette, else 16-bit grey ones.
    """

    def __init__(self, source: FolderSource, output: pathlib.Path):
        self._source, self._output = source, output

    def __call__(self, view: plots.View) -> None:
        # An evaluator wants every frame: before the first annotated one nothing is predicted.
        for frame in range(view.frame) if view.place == 0 else ():
            self._write(view, frame, np.zeros_like(view.predicted))
        self._write(view, view.frame, view.predicted)

    def _write(self, view: plots.View, frame: int, predicted: np.ndarray) -> None:
        folder = self._output / view.clip
        folder.mkdir(parents=True, exist_ok=True)
        ids = np.array((0, *view.ids), np.uint8 if max(view.ids) < 256 else np.uint16)
        image = Image.fromarray(ids[predicted])
        if ids.dtype == np.uint8:
            image.putpalette(palette())
        image.save(folder / f"{self._source.stem(view.clip_index, frame)}.png")


def palette() -> list[int]:
    """DAVIS's colours: bit b of an index's three lowest bits sets bit 7 - b of R, G and B."""
    index = np.arange(256)
    colours = np.zeros((256, 3), int)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.reshape(-1).tolist()


def scores(results: metrics.Results) -> dict[str, float]:
    """The three figures, fractions."""
    return {"J&F": results.jf, "J": results.j, "F": results.f}


def report(results: metrics.Results) -> dict:
    """What results.json holds."""
    objects: dict[str, dict[str, dict]] = {}
    for row in results.objects:
        one = metrics.Results((row,))
        entry = scores(one) | {"static": scores(one.static)}
        objects.setdefault(row.clip, {})[str(row.object_id)] = entry
    return scores(results) | {"static": scores(results.static), "objects": objects}


def main(argv: list[str]) -> None:
    """Evaluates as the flags say."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--ema", action="store_true", help="the moving average of a run")
    parser.add_argument("--base", default="", help="weights under a LoRA run, if they moved")
    args = parser.parse_args(argv)
    source = open_folder(args.data_root, EVAL, key="--data_root")
    model, params = load(args.checkpoint, args.resolution, args.ema, args.base)
    args.output.mkdir(parents=True, exist_ok=True)
    sheet, write = plots.Sheet(), Writer(source, args.output)

    def watch(view: plots.View) -> None:
        sheet.watch(view)
        write(view)

    tracker = make_tracker(model, precision=precision_of(args.checkpoint))
    predict = evaluate.tracker_predictor(tracker, params, model.resolution)
    results = evaluate.evaluate(predict, source, watch=watch, progress=True)
    part = args.output / "results.json.tmp"
    part.write_text(json.dumps(report(results), indent=2) + "\n")
    os.replace(part, args.output / "results.json")
    by_clip = {name: clip.jf for name, clip in results.clips.items()}
    title = f"{args.checkpoint}: J&F {results.jf:.3f}, static mask {results.static.jf:.3f}"
    plots.overlay_sheet(sheet.rows, by_clip, args.output / "overlay.png", title=title)
    for name, clip in results.clips.items():
        print(f"{name}: {clip}")
    print(f"all: {results}")


if __name__ == "__main__":
    checkpoint.quiet()
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(fail(error))
