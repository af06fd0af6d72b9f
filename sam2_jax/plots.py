"""Pictures of masks: `overlay.png`, predicted and true outlines.

Drawn with matplotlib's object interface on Agg (no pyplot, so no global state and no display), and
written to a temporary file that replaces the old one, so that a reader never meets half a picture.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt16
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

Image = UInt8[np.ndarray, "h w 3"]
Labels = UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"]

# Bright, told apart by the colour-blind, none near white: that is the truth's.
COLOURS = ((255, 149, 0), (64, 196, 255), (255, 64, 160), (140, 230, 40), (178, 120, 255),
           (255, 226, 0), (0, 214, 160), (255, 84, 64))  # fmt: skip
WIDEST, NARROWEST = 400, 240  # pixels of one frame on the sheet; between them twice its own
FILL = 0.3  # opacity of a predicted mask's inside
DPI = 100
CLICKS = {1: ("click on the object", (0, 200, 0)), 0: ("click beside it", (230, 0, 0))}  # by label


class Given(NamedTuple):
    """The prompt of a clip's first frame."""

    prompt: str  # mask, box, click1 ...
    points: Float[np.ndarray, "o p 2"]  # x, y as shares of width and height
    labels: Int[np.ndarray, "o p"]  # 1 on the object, 0 beside it, 2 and 3 corners, -1 none


class View(NamedTuple):
    """One evaluated frame, as handed to whoever watches an evaluation."""

    clip: str
    clip_index: int  # in the source
    frame: int  # in the video
    place: int  # in the evaluated part of the video: 0 is the frame whose masks were given
    num_frames: int  # of the evaluated part
    image: Image
    ids: tuple[int, ...]  # of the objects
    predicted: Labels  # k + 1 where ids[k] is, 0 background
    true: Bool[np.ndarray, "o h w"]
    given: Given | None = None  # of the first frame, if it is known


class Sheet:
    """Keeps what an overlay sheet shows of an evaluation: some clips, frames evenly spaced."""

    def __init__(self, shown: Sequence[int] = range(6), columns: int = 5):
        """`shown`: numbers of the clips. Not the first to arrive: they are tracked side by side."""
        self._views: dict[int, list[View]] = {}
        self._shown, self._columns = shown, columns
        self._here = threading.local()  # clips side by side are tracked by a thread each

    def note(self, given: Given) -> None:
        """The prompt of the clip whose frames this thread watches next."""
        self._here.given = given

    def watch(self, view: View) -> None:
        """Keeps the frame if the sheet shows it."""
        places = np.linspace(0, view.num_frames - 1, self._columns).round().astype(int)
        if view.clip_index in self._shown and view.place in places:
            # Copies: these are windows on a chunk of frames that would otherwise stay in memory.
            kept = view._replace(image=view.image.copy(), true=view.true.copy())
            if view.place == 0:
                kept = kept._replace(given=getattr(self._here, "given", None))
            self._views.setdefault(view.clip_index, []).append(kept)

    @property
    def rows(self) -> dict[str, list[View]]:
        """The frames kept, by clip, in the order of the clips."""
        return {views[0].clip: views for _, views in sorted(self._views.items())}


def overlay_sheet(
    rows: Mapping[str, Sequence[View]], scores: Mapping[str, float], path: str | Path, title: str
) -> None:
    """Draws clips as rows and frames as columns; `scores` is J&F by clip, shown beside its name."""
    columns = max(len(views) for views in rows.values())
    shapes = [views[0].image.shape for views in rows.values()]
    tile_width = min(max(NARROWEST, 2 * max(shape[1] for shape in shapes)), WIDEST)
    heights = [shape[0] / shape[1] * tile_width for shape in shapes]
    gap, head, label, foot = 6, 44, 26, 40
    width = columns * (tile_width + gap) + gap
    height = head + sum(h + label + gap for h in heights) + foot
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    figure.text(gap / width, 1 - head / 2 / height, title, size=15, weight="bold", va="center")
    y = height - head
    for (name, views), tile_height in zip(rows.items(), heights, strict=True):
        score = f"   J&F {scores[name]:.3f}" if name in scores else "   not scored"
        figure.text(gap / width, (y - label / 2) / height, name + score, size=12, va="center")
        y -= label + tile_height
        for column, view in enumerate(views):
            x = gap + column * (tile_width + gap)
            box = (x / width, y / height, tile_width / width, tile_height / height)
            axes = figure.add_axes(box)
            tile = _tile(view, tile_width, round(tile_height))
            axes.imshow(tile, interpolation="antialiased", aspect="auto")
            axes.set_axis_off()
            axes.text(0.012, 0.97, _caption(view), color="white", size=10, va="top",
                      transform=axes.transAxes,
                      bbox={"facecolor": "black", "alpha": 0.55, "pad": 2.5, "lw": 0})  # fmt: skip
        y -= gap
    ids = sorted({x.ids[k - 1] for v in rows.values() for x in v for k in _present(x.predicted)})
    handles: list[Any] = [
        Patch(facecolor=(_hex(k), FILL), edgecolor=_hex(k), lw=2, label=f"predicted: object {k}")
        for k in ids
    ]
    handles.append(Line2D([], [], color="white", lw=2, ls=(0, (3, 2)), label="true outline"))
    labels = {int(n) for v in rows.values() for x in v if x.given for n in x.given.labels.flat}
    for label in sorted(labels & CLICKS.keys()):
        name, colour = CLICKS[label]
        colour = "#{:02x}{:02x}{:02x}".format(*colour)
        dot = Line2D([], [], color=colour, marker="o", ls="", mec="white", ms=9, label=name)
        handles.append(dot)
    figure.legend(
        handles=handles, loc="lower left", ncols=min(len(handles), columns * 2),
        facecolor="0.35", labelcolor="white", fontsize=9, borderaxespad=0.3,
        columnspacing=1.0, handletextpad=0.5,
    )  # fmt: skip
    save(figure, path)


def _present(labels: Labels) -> list[int]:
    return [int(k) for k in np.unique(labels) if k]


def paint(
    image: Image, mask: Bool[np.ndarray, "h w"], colour: tuple[int, int, int], width: int
) -> None:
    """Fills a mask lightly, in place, and outlines it by `width` pixels with a black edge."""
    image[mask] = (1 - FILL) * image[mask] + FILL * np.array(colour)
    outlines = _outlines(mask)
    cv2.polylines(image, outlines, True, (0, 0, 0), width + 2, cv2.LINE_AA)
    cv2.polylines(image, outlines, True, colour, width, cv2.LINE_AA)


def _tile(view: View, width: int, height: int) -> Image:
    """One frame at twice the sheet's size (outlines drawn large are smooth once reduced)."""
    size = 2 * width, 2 * height
    image = cv2.resize(view.image, size, interpolation=cv2.INTER_CUBIC)
    for k in _present(view.predicted):
        paint(image, enlarge(view.predicted == k, size), colour_of(view.ids[k - 1]), 5)
    whole = view.given is not None and view.given.prompt == "mask"
    for mask in view.true:
        for outline in _outlines(enlarge(mask, size)):
            # Dashes of 14 points, gaps of 10; points of a contour are one pixel apart.
            dashes = [outline[i : i + 14] for i in range(0, len(outline), 24)]
            lines = [outline] if whole else dashes
            cv2.polylines(image, lines, whole, (0, 0, 0), 5, cv2.LINE_AA)
            cv2.polylines(image, lines, whole, (255, 255, 255), 3, cv2.LINE_AA)
    if view.given:
        _draw_points(image, view.given, view.ids)
    return image


def _draw_points(image: Image, given: Given, ids: Sequence[int]) -> None:
    """Clicks as dots, boxes as rectangles in the colour of their object, in place."""
    places = np.round(given.points * image.shape[1::-1]).astype(int)
    for k, points, labels in zip(ids, places, given.labels, strict=True):
        if list(labels[:2]) == [2, 3]:
            corners = tuple(map(int, points[0])), tuple(map(int, points[1]))
            cv2.rectangle(image, *corners, (255, 255, 255), 9)
            cv2.rectangle(image, *corners, colour_of(k), 5)
        for point, label in zip(points, labels, strict=True):
            if int(label) in CLICKS:
                centre = int(point[0]), int(point[1])
                cv2.circle(image, centre, 13, (255, 255, 255), -1, cv2.LINE_AA)
                cv2.circle(image, centre, 10, CLICKS[int(label)][1], -1, cv2.LINE_AA)


def _caption(view: View) -> str:
    if view.place:
        return f"frame {view.frame}"
    return f"frame {view.frame} (given{f': {view.given.prompt}' if view.given else ''})"


def enlarge(mask: Bool[np.ndarray, "h w"], size: tuple[int, int]) -> Bool[np.ndarray, "h2 w2"]:
    """A mask resized to `size`, width and height in pixels."""
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5


def _outlines(mask: Bool[np.ndarray, "h w"]) -> Sequence[np.ndarray]:
    return cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]


def colour_of(k: int) -> tuple[int, int, int]:
    """The colour (RGB, 0-255) of an object."""
    return COLOURS[(k - 1) % len(COLOURS)]


def _hex(k: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour_of(k))


def save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG that replaces an old one at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        FigureCanvasAgg(figure).print_png(part)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
