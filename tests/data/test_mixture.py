"""Which source gives which batch: exact shares, draws, repeats, all from the position alone."""

import collections
import functools
import pickle
from typing import Any

import grain
import pytest

from sam2_jax.data import mixture
from sam2_jax.data.mixture import RandomDraw, Share
from sam2_jax.types import UserError


def shares(*weights: float) -> list[Share]:
    clips = (100, 30, 8)
    return [
        Share(name, n, batch, weight, multiplier)
        for name, n, batch, weight, multiplier in zip(
            "abc", clips, (2, 1, 4), weights, (1.0, 2.5, 1.0), strict=True
        )
    ]


def order(found: list[Share], count: int, draw: str = mixture.INTERLEAVE) -> list[int]:
    marks = [grain.MapDataset.source([number]).repeat() for number in range(len(found))]
    stream: Any = mixture.mix(marks, found, draw, 1, 3)
    return [stream[n] for n in range(count)]


def test_default_weights_are_the_batches_of_an_epoch():
    found = shares(0, 0, 0)
    assert [share.batches for share in found] == [50, 75, 2]
    assert mixture.weights(found) == [50 / 127, 75 / 127, 2 / 127]
    found = order(found, 12_700)
    assert [round(found.count(source) / 100) for source in range(3)] == [50, 75, 2]


def test_interleaved_shares_are_kept_at_any_time():
    found = order(shares(0.7, 0.2, 0.1), 500)
    for end in range(1, 500):
        for source, weight in enumerate((0.7, 0.2, 0.1)):
            assert abs(found[:end].count(source) - weight * end) < 2


def test_interleaving_leaves_out_no_batch_and_repeats_none():
    found = shares(0.701, 0.2, 0.099)
    streams = [
        grain.MapDataset.range(10**6).map(functools.partial(lambda i, n: (i, n), i))
        for i in range(3)
    ]
    stream: Any = mixture.mix(streams, found)
    drawn = [stream[n] for n in range(10_000)]
    for source, share in enumerate((0.701, 0.2, 0.099)):
        ranks = [rank for s, rank in drawn if s == source]
        assert ranks == list(range(len(ranks)))
        assert abs(len(ranks) / 10_000 - share) < 0.005  # grain rounds shares to that


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((0.7, 0.2, 0.2), "sum to 1.1, not 1: a 0.7, b 0.2, c 0.2"),
        ((1.2, -0.1, -0.1), "must not be negative: a 1.2, b -0.1"),
        ((1.0, 0.0, 0.0), "for some sources only"),
    ],
)
def test_weights_that_cannot_be(weights, words):
    with pytest.raises(UserError, match=words):
        mixture.weights(shares(*weights))


def test_random_draws_follow_the_weights_until_a_source_has_given_all():
    found = [Share("a", 20_000, 1, 0.75, 1.0), Share("b", 1_000, 1, 0.25, 1.0)]
    draw = RandomDraw(found, 1, 0)
    phase = [draw[n] for n in range(21_000)]
    first = [source for source, _ in phase[:3000]]
    assert 640 < first.count(1) < 860  # 750 expected, standard deviation 24
    assert len({tuple(first[i : i + 4]) for i in range(2996)}) == 16  # no pattern
    last = max(n for n, (source, _) in enumerate(phase) if source == 1)
    assert last < 5_000 and {source for source, _ in phase[last + 1 :]} == {0}
    for source, batches in enumerate((20_000, 1_000)):  # every batch once, in order
        assert [rank for s, rank in phase if s == source] == list(range(batches))


def test_random_phases_differ_and_go_on_where_the_last_one_ended():
    draw = RandomDraw(shares(0, 0, 0), 2, 1)
    total = sum(draw.batches)
    assert draw.batches == [25, 37, 1]
    phases = [[draw[n + k * total] for n in range(total)] for k in range(2)]
    assert [s for s, _ in phases[0]] != [s for s, _ in phases[1]]
    assert [r for s, r in phases[1] if s == 0] == list(range(25, 50))
    assert draw[total] == pickle.loads(pickle.dumps(draw))[total] == phases[1][0]


def test_a_multiplier_repeats_all_clips_and_some_once_more():
    share = Share("a", 30, 1, 0.0, 2.5)
    stream = mixture.clips(share, (0, 0), lambda clip, rng: clip)
    epochs = [[stream[n + 75 * k] for n in range(75)] for k in range(2)]
    extra = []
    for epoch in epochs:
        counts = collections.Counter(epoch)
        assert collections.Counter(counts.values()) == {2: 15, 3: 15}
        extra.append({clip for clip, n in counts.items() if n == 3})
    assert extra[0] != extra[1] and epochs[0] != epochs[1]


def test_a_multiplier_below_one_shows_other_clips_in_every_epoch():
    share = Share("a", 40, 1, 0.0, 0.25)
    stream = mixture.clips(share, (0, 0), lambda clip, rng: clip)
    epochs = [{stream[n + 10 * k] for n in range(10)} for k in range(30)]
    assert all(len(epoch) == 10 for epoch in epochs)
    assert set().union(*epochs) == set(range(40))


def test_what_is_random_depends_on_seed_epoch_and_clip_alone():
    share = Share("a", 6, 1, 0.0, 1.0)

    def drawn(seed, share=share):
        stream: Any = mixture.clips(share, seed, lambda clip, rng: (clip, int(rng.integers(10**9))))
        return [dict(stream[n + 6 * k] for n in range(6)) for k in range(2)]

    assert drawn((0, 0)) == drawn((0, 0), share._replace(batch_size=3))
    epochs = drawn((0, 0))
    assert all(epochs[0][clip] != epochs[1][clip] for clip in range(6))
    assert drawn((0, 1)) != drawn((0, 0)) != drawn((1, 0))


def test_the_seed_changes_draws():
    found = shares(0, 0, 0)
    by_seed = [[RandomDraw(found, 1, seed)[n][0] for n in range(60)] for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]
