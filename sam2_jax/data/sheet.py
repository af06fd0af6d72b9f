"""A contact sheet of training data: clips as they are stored, beside what the model gets of them.

Every source has a few rows of a few frames, objects outlined in their colours, on the left before
and on the right after sampling and augmentation. Colours tell objects apart by id on both sides.
"""

import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sam2_jax.data.pipeline import Part, make_example
from sam2_jax.data.sampling import sample_clip
from sam2_jax.data.sources import VideoSource
from sam2_jax.plots import COLOURS, DPI, colour_of, enlarge, paint
from sam2_jax.types import UserError

CLIPS, FRAMES = 4, 4  # of a source
MOST_ROWS = 16  # of all sources, where there are fewer sources than that: bounds the file
TALL = 156  # pixels of a tile
GAP, HEAD, TITLE = 5, 30, 18  # pixels between tiles, of a heading, of a clip's name
NARROW, WIDE = 0.5, 2.0  # width by height of a tile; what is slimmer or wider is squeezed
LINE = 2  # pixels of an outline, on a tile drawn at twice its size
BROKEN = (UserError, ValueError)  # clips that `survey` names and the sheet leaves out
DRAWS = 8  # clips drawn for one that is shown: some may be unreadable
FEW = 256  # colours of the file: a third of the bytes, and hardly seen

Picture = UInt8[np.ndarray, "h w 3"]


class Tile(NamedTuple):
    """One frame, drawn at twice its size on the sheet: outlines are smooth once reduced."""

    image: Picture
    caption: str


class Row(NamedTuple):
    """Tiles side by side, as stored and as trained on; `seen` is empty for evaluation."""

    title: str
    stored: list[Tile]
    seen: list[Tile]


def draw_tile(
    image: Picture, masks: Bool[np.ndarray, "o h w"], ids: Sequence[int], caption: str = ""
) -> Tile:
    """A frame with its objects outlined."""
    aspect = min(max(image.shape[1] / image.shape[0], NARROW), WIDE)
    size = round(2 * TALL * aspect), 2 * TALL
    how = cv2.INTER_AREA if image.shape[0] > size[1] else cv2.INTER_CUBIC
    drawn = cv2.resize(image, size, interpolation=how)
    for mask, k in zip(masks, ids, strict=True):
        if mask.any():
            paint(drawn, enlarge(mask, size), colour_of(k), LINE)
    return Tile(drawn, caption)


def training_rows(part: Part, side: int, seed: int, clips: int = CLIPS) -> list[Row]:
    """Some clips of a source, before and after sampling and augmentation.

    Args:
        part: source and settings.
        side: of the model's input, pixels.
        seed: of which clips, and of what happens to them.
        clips: rows; of images, a row has several.
    """
    single = part.sampling.num_frames == 1
    count = clips * FRAMES if single else clips
    pairs: list[Row] = []
    for index in _draw(len(part.source), count, seed):
        try:
            pairs.append(_pair(part, index, side, seed))
        except BROKEN:
            continue
        if len(pairs) == count:
            break
    if not single:
        return pairs
    rows = [pairs[i : i + FRAMES] for i in range(0, len(pairs), FRAMES)]
    return [
        Row("", [tile for r in row for tile in r.stored], [tile for r in row for tile in r.seen])
        for row in rows
    ]


def _pair(part: Part, index: int, side: int, seed: int) -> Row:
    source, video = part.source, part.source.video(index)
    # The same draws as in make_example, of which sampling takes the first ones.
    sample = sample_clip(
        np.random.default_rng((seed, index)),
        lambda frame: source.objects(index, frame),
        video.num_frames,
        part.sampling,
    )
    example = make_example(part, index, np.random.default_rng((seed, index)), side)
    places = _spread(len(sample.frames), FRAMES)
    stored = _stored(source, index, [sample.frames[place] for place in places])
    if len(places) == 1:
        stored = [stored[0]._replace(caption=video.name)]
    order = np.argsort(sample.objects)  # outlines cross alike on both sides
    ids = [sample.objects[k] for k in order]
    seen = [draw_tile(example.images[p], example.masks[p, order], ids) for p in places]
    return Row(video.name, stored, seen)


def evaluation_rows(source: VideoSource, seed: int, clips: int = CLIPS) -> list[Row]:
    """Some clips of a source as they are stored, frames from the first to the last."""
    rows: list[Row] = []
    for index in _draw(len(source), clips, seed):
        video = source.video(index)
        try:
            frames = _spread(video.num_frames, FRAMES + 2)  # as wide as a row of training
            rows.append(Row(video.name, _stored(source, index, frames), []))
        except BROKEN:
            continue
        if len(rows) == clips:
            break
    return rows


def _draw(length: int, count: int, seed: int) -> Iterator[int]:
    """Random clips, each once, more than are shown."""
    yield from random.Random(seed).sample(range(length), min(length, DRAWS * count))


def _spread(length: int, count: int) -> list[int]:
    """Places from the first to the last, as even as whole numbers allow."""
    return np.unique(np.linspace(0, length - 1, count).round().astype(int)).tolist()


def _stored(source: VideoSource, index: int, frames: Sequence[int]) -> list[Tile]:
    """All objects of some frames. One at a time: a frame may have hundreds."""
    tiles = []
    for frame in frames:
        ids = source.objects(index, frame)
        images, masks = source.read(index, [frame], ids)
        tiles.append(draw_tile(images[0], masks[0], ids, f"frame {frame}"))
    return tiles


def rows_of_each(sources: int) -> int:
    """Rows for every source, so that the sheet of many sources stays small."""
    return max(1, min(CLIPS, MOST_ROWS // max(1, sources)))


def contact_sheet(groups: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the rows of all sources, under a heading each, to a PNG of at most 256 colours."""
    lefts = {
        heading: max([_width(row.stored) for row in group if row.seen], default=0)
        for heading, group in groups.items()
    }
    whole = max(
        [lefts[heading] + 3 * GAP + _width(row.seen) if row.seen else _width(row.stored)
         for heading, group in groups.items() for row in group],
        default=8 * TALL,
    )  # fmt: skip
    height = sum(HEAD + sum(_height(row) for row in group) for group in groups.values()) + GAP
    width = whole + 2 * GAP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    y = 0.0
    for heading, group in groups.items():
        middle = 1 - (y + HEAD / 2) / height
        figure.text(
            GAP / width, middle, heading, size=12, weight="bold", va="center", parse_math=False
        )
        y += HEAD
        if not group:
            figure.text(
                0.5, middle, "no clip could be read", size=10, va="center", parse_math=False
            )
        for row in group:
            if row.title:
                title = 1 - (y + TITLE / 2) / height
                figure.text(GAP / width, title, row.title, size=9, va="center", parse_math=False)
                y += TITLE
            for x, tiles in ((GAP, row.stored), (lefts[heading] + 4 * GAP, row.seen)):
                for tile in tiles:
                    wide = tile.image.shape[1] / 2
                    box = x / width, 1 - (y + TALL) / height, wide / width, TALL / height
                    axes = figure.add_axes(box)
                    axes.imshow(tile.image, interpolation="antialiased", aspect="auto")
                    axes.set_axis_off()
                    if tile.caption:
                        axes.text(
                            0.03, 0.95, tile.caption, color="white", size=7, va="top",
                            transform=axes.transAxes, clip_on=True, parse_math=False,
                            bbox={"facecolor": "black", "alpha": 0.55, "pad": 1.5, "lw": 0},
                        )  # fmt: skip
                    x += wide + GAP
            y += TALL + GAP
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _indexed(picture).save(part, format="PNG", optimize=True)
    os.replace(part, path)


def _indexed(picture: Image.Image) -> Image.Image:
    """With few colours, those of objects among them: thin outlines would lose theirs."""
    kept = [*COLOURS, (0, 0, 0), (255, 255, 255)]
    common = picture.quantize(FEW - len(kept)).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*common, *(value for colour in kept for value in colour)])
    return picture.quantize(palette=palette)


def _width(tiles: Sequence[Tile]) -> int:
    return sum(math.ceil(tile.image.shape[1] / 2) + GAP for tile in tiles) - GAP


def _height(row: Row) -> int:
    return (TITLE if row.title else 0) + TALL + GAP
