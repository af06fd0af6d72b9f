"""Tiny clips on disk for the tests of data."""

import pathlib

import numpy as np
import pytest
from PIL import Image

REAL = pathlib.Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_scans(tmp_path_factory):
    """What is found in files of the tests is not kept in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def real_clips():
    """Folder of real clips beside the repository, where there is one."""
    if not REAL.is_dir():
        pytest.skip("no real clips beside the repository")
    return REAL


def save_mask(path: pathlib.Path, labels: np.ndarray) -> None:
    """Write indices as a palette PNG."""
    image = Image.fromarray(labels)
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(path)


@pytest.fixture
def write_clip():
    """Write one clip: a 10 x 8 square of object 1 that moves right, object 2 from frame 2 on."""

    def write(frames: pathlib.Path, masks: pathlib.Path, count: int = 6, objects: bool = True):
        frames.mkdir(parents=True)
        masks.mkdir(parents=True)
        rng = np.random.default_rng(len(frames.name))
        for t in range(count):
            pixels = rng.integers(0, 256, (24, 40, 3), np.uint8)
            Image.fromarray(pixels).save(frames / f"{t:05d}.jpg", quality=95)
            labels = np.zeros((24, 40), np.uint8)
            if objects:
                labels[4:12, 2 + t : 12 + t] = 1
                labels[14:20, 20:30] = 2 if t >= 2 else 0
            save_mask(masks / f"{t:05d}.png", labels)

    return write


@pytest.fixture
def flat(tmp_path, write_clip):
    """A flat folder of three clips."""
    root = tmp_path / "flat"
    for name in ("ant", "bee", "cow"):
        write_clip(root / "JPEGImages" / name, root / "Annotations" / name)
    return root


@pytest.fixture
def davis(tmp_path, write_clip):
    """A folder in DAVIS layout: two clips to train on, one to evaluate on, one in no list."""
    root = tmp_path / "davis"
    for name in ("ant", "bee", "cow", "unlisted"):
        write_clip(root / "JPEGImages/480p" / name, root / "Annotations/480p" / name)
    lists = root / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("cow\nant\n")
    (lists / "val.txt").write_text("bee\n")
    return root
