"""Run lengths: equal to pycocotools where they are whole, refused where they are not."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam2_jax.data.rle import decode_rle, encode_rle, rle_area
from sam2_jax.types import UserError

WHERE = "object 3 of x.json"


def blobs(seed, height=37, width=53):
    rng = np.random.default_rng(seed)
    return rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])


@pytest.mark.parametrize("seed", range(6))
def test_compressed_and_list_counts_are_decoded(seed):
    mask = blobs(seed)
    mask[0, 0] = seed % 2  # the first run may be empty
    rle = encode_rle(mask)
    assert isinstance(rle["counts"], str) and rle["size"] == [37, 53]
    flat = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
    listed = {"size": [37, 53], "counts": np.diff(edges, prepend=0).tolist()}
    for form in (rle, {**rle, "counts": rle["counts"].encode()}, listed):
        np.testing.assert_array_equal(decode_rle(form, 37, 53, WHERE), mask)
        assert rle_area(form, 37, 53, WHERE) == mask.sum()


def test_all_and_nothing_and_large():
    for mask in (np.zeros((5, 7), bool), np.ones((5, 7), bool), np.ones((3000, 2000), bool)):
        rle = encode_rle(mask)
        assert rle_area(rle, *mask.shape, WHERE) == mask.sum()
        np.testing.assert_array_equal(decode_rle(rle, *mask.shape, WHERE), mask)


@pytest.mark.parametrize(
    "rle, found",
    [
        (None, "NoneType"),
        ([[1, 2, 3]], "list"),
        ({"counts": "52o0"}, r"\['counts'\]"),
        ({"size": [5, 4], "counts": [20]}, r"size \[5, 4\]"),
        ({"size": 20, "counts": [20]}, "size 20"),
        ({"size": [4, 5], "counts": [10, 9]}, "19 pixels"),
        ({"size": [4, 5], "counts": [10, 11]}, "21 pixels"),
        ({"size": [4, 5], "counts": [30, -10]}, "no run lengths"),
        ({"size": [4, 5], "counts": [19, True]}, "no run lengths"),
        ({"size": [4, 5], "counts": [19.0, 1.0]}, "no run lengths"),
        ({"size": [4, 5], "counts": []}, "0 pixels"),
        ({"size": [4, 5], "counts": None}, "no run lengths"),
        ({"size": [4, 5], "counts": ""}, "no run lengths"),
        ({"size": [4, 5], "counts": "52"}, "7 pixels"),  # pycocotools leaves 13 unwritten
        ({"size": [4, 5], "counts": "5P"}, "no run lengths"),  # the last number is cut off
        ({"size": [4, 5], "counts": "PPPPPPPPPPPP1"}, "no run lengths"),  # more than 32 bits
        ({"size": [4, 5], "counts": "4 2"}, "no run lengths"),
        ({"size": [4, 5], "counts": "4é"}, "no run lengths"),
        ({"size": [4, 5], "counts": "O1"}, "no run lengths"),  # a negative run
    ],
)
def test_what_is_broken_is_refused(rle, found):
    for function in (decode_rle, rle_area):
        with pytest.raises(UserError, match=f"^{WHERE} .*{found}.*: download"):
            function(rle, 4, 5, WHERE)


# pycocotools and numpy 2
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_random_bytes_are_decoded_as_by_pycocotools_or_refused():
    rng = np.random.default_rng(0)
    good = encode_rle(blobs(1))["counts"]
    kept = 0
    for _ in range(500):
        text = list(good)
        for at in rng.integers(0, len(text), rng.integers(0, 3)):
            text[at] = chr(rng.integers(48, 112))
        rle = {"size": [37, 53], "counts": "".join(text)}
        try:
            mask = decode_rle(rle, 37, 53, WHERE)
        except UserError:
            continue
        kept += 1
        np.testing.assert_array_equal(mask, coco_mask.decode(rle))  # pyright: ignore
    assert kept > 100
