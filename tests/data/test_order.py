from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest

from clip_train.data.hashing import mix, permutation, uniform
from clip_train.data.order import Order, Position, SourceOrder, share
from clip_train.errors import DataError

MASK = 2**64 - 1


def reference_mix(*parts: int) -> int:
    """SplitMix64 in Python's own integers."""
    state = 0
    for part in parts:
        z = ((state ^ part) + 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        state = z ^ (z >> 31)
    return state


def reference_permutation(length: int, *parts: int) -> list[int]:
    return sorted(range(length), key=lambda i: reference_mix(*parts, i))


def reference_epoch(counts: list[int], seed: int, source: int, epoch: int, lanes: int, window: int) -> list[Position]:
    """One epoch by the four rules of the module's head, with plain lists and no arithmetic."""
    shards = reference_permutation(len(counts), seed, 1, source, epoch)
    lanes = min(lanes, len(counts))
    queues: list[list[tuple[int, int]]] = []
    for lane in range(lanes):
        samples = [(shard, i) for shard in shards[lane::lanes] for i in range(counts[shard])]
        queue: list[tuple[int, int]] = []
        for number, start in enumerate(range(0, len(samples), window)):
            part = samples[start : start + window]
            queue += [part[i] for i in reference_permutation(len(part), seed, 2, source, epoch, lane, number)]
        queues.append(queue)
    rounds = itertools.zip_longest(*queues)
    return [Position(source, one[0], one[1], epoch) for dealt in rounds for one in dealt if one is not None]


def test_mix_is_splitmix64() -> None:
    # The first outputs of SplitMix64 seeded with 0, as published with the generator.
    assert int(mix(0)) == 0xE220A8397B1DCDAF
    for parts in [(0,), (1, 2, 3), (2**63 - 1, 5), (7, 0, 0, 9)]:
        assert int(mix(*parts)) == reference_mix(*parts)
    assert mix(3, np.arange(5)).tolist() == [reference_mix(3, i) for i in range(5)]
    assert permutation(50, 1, 2).tolist() == reference_permutation(50, 1, 2)
    assert uniform(1, np.arange(10_000)).mean() == pytest.approx(0.5, abs=0.02)


def test_the_worked_example_of_the_docs() -> None:
    """Hand-worked: 3 shards of 2, 3 and 1 samples in 2 lanes with a window of 2 (docs/data-and-resume.md)."""
    order = Order([[2, 3, 1]], None, seed=0, batch_size=3, lanes=2, window=2)
    assert [(p.shard, p.sample) for p in order.batch(0)] == [(1, 1), (2, 0), (1, 0)]
    assert [(p.shard, p.sample) for p in order.batch(1)] == [(1, 2), (0, 0), (0, 1)]
    assert {p.epoch for p in order.batch(2)} == {1}


@pytest.mark.parametrize(
    ("counts", "lanes", "window"),
    [([7], 1, 3), ([5, 5, 5], 2, 4), ([1, 9, 4, 4, 2], 3, 1), ([3, 8, 1, 1, 12, 6], 16, 5), ([20, 30], 2, 1000)],
)
def test_follows_the_rules_and_covers_each_epoch_once(counts: list[int], lanes: int, window: int) -> None:
    total = sum(counts)
    order = SourceOrder(counts, seed=11, source=2, lanes=lanes, window=window)
    found = order.at(np.arange(3 * total))
    expected = [p for epoch in range(3) for p in reference_epoch(counts, 11, 2, epoch, lanes, window)]
    assert found == expected
    for epoch in range(3):
        part = found[epoch * total : (epoch + 1) * total]
        assert Counter((p.shard, p.sample) for p in part) == Counter(
            (shard, i) for shard, count in enumerate(counts) for i in range(count)
        )


def test_any_step_can_be_asked_first() -> None:
    """No state: resuming at a step, splitting among ranks and going backwards give what going through gives."""
    arguments = ([[40, 7, 23], [31, 30]], [2.0, 1.0], 5, 12, 4, 16)
    through = [Order(*arguments).batch(step) for step in range(40)]  # type: ignore[arg-type]
    backwards = Order(*arguments)  # type: ignore[arg-type]
    for step in reversed(range(40)):
        parts = [backwards.rows(step, 3 * rank, 3 * rank + 3) for rank in range(4)]
        assert list(itertools.chain(*parts)) == through[step]


def test_seeds_and_epochs_differ() -> None:
    first = Order([[100]], None, seed=0, batch_size=100)
    assert first.batch(0) != Order([[100]], None, seed=1, batch_size=100).batch(0)
    assert [p.sample for p in first.batch(0)] != [p.sample for p in first.batch(1)]


@pytest.mark.parametrize("weights", [[1, 1], [7, 2, 1], [1, 1, 1, 1], [997, 1, 1, 1], [5, 40, 300, 2, 9]])
def test_share_is_whole_growing_and_in_proportion(weights: list[int]) -> None:
    total = sum(weights)
    before = [0] * len(weights)
    for n in range(0, 3 * total, 7):
        now = share(n, weights)
        assert sum(now) == n
        assert all(a >= b for a, b in zip(now, before, strict=True))
        allowed = {2: 0.5, 3: 1.0, 4: 1.0}.get(len(weights), 1.5)
        assert all(abs(c - n * w / total) <= allowed for c, w in zip(now, weights, strict=True))
        before = now
    assert share(2 * total, weights) == [2 * w for w in weights]


def test_mixture_counts_follow_the_weights() -> None:
    order = Order([[50, 50], [30], [20]], [0.5, 0.3, 0.2], seed=3, batch_size=16)
    counted = Counter[int]()
    for step in range(50):
        counted.update(p.source for p in order.batch(step))
        for source, weight in enumerate((0.5, 0.3, 0.2)):
            assert abs(counted[source] - weight * 16 * (step + 1)) <= 1
    # Each source goes through its own epochs, each sample once in every one.
    seen = [p for step in range(50) for p in order.batch(step) if p.source == 2]
    assert Counter((p.epoch, p.sample) for p in seen).most_common(1)[0][1] == 1
    assert max(p.epoch for p in seen) == 50 * 16 // 5 // 20 - 1
    # Rows are mixed, so that a rank does not get one source only.
    assert len({p.source for p in order.rows(0, 0, 8)}) > 1


def test_without_weights_an_epoch_of_all_sources_holds_each_sample_once() -> None:
    order = Order([[13, 9], [5], [23]], None, seed=0, batch_size=10)
    seen = Counter(p for step in range(5) for p in order.batch(step))
    assert len(seen) == 50 == seen.total()
    assert {p.epoch for p in seen} == {0}


def test_too_little_data() -> None:
    with pytest.raises(DataError, match=r"data\.batch_size is 9, but there are only 8 samples"):
        Order([[5, 3]], None, seed=0, batch_size=9)
    with pytest.raises(DataError, match="no samples"):
        Order([[0]], None, seed=0, batch_size=1)


def test_a_hundred_million_samples_cost_nothing() -> None:
    """The order is a formula: a step far into a huge set is answered from a few windows."""
    order = Order([[10_000] * 10_000], None, seed=0, batch_size=64, lanes=16, window=4096)
    keys = [(p.shard, p.sample, p.epoch) for p in order.batch(1_400_000)]
    assert len(set(keys)) == 64
    # Pinned: the order of a run must not change from one version to the next.
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).hexdigest()
    assert digest == "e72e88c00dbf8540"


def test_draws_with_replacement_by_hand() -> None:
    """Number n is `mix(seed, 7, source, n)` modulo the samples; any batch size; every rank the same."""
    counts = [[4, 1, 7], [5, 3]]
    order = Order(counts, [1.0, 1.0], seed=9, batch_size=40, sampling="replacement")
    begun = [0, 0]
    for step in range(3):
        batch = order.batch(step)
        assert [order.rows(step, row, row + 10) for row in range(0, 40, 10)] == [
            batch[i : i + 10] for i in range(0, 40, 10)
        ]
        for source in (0, 1):
            found = sorted((p for p in batch if p.source == source), key=lambda p: p.epoch)
            assert len(found) == 20
            for number, place in enumerate(found, begun[source]):
                drawn = reference_mix(9, 7, source, number) % sum(counts[source])
                assert place.epoch == number and order.epoch(place) == number // sum(counts[source])
                assert sum(counts[source][: place.shard]) + place.sample == drawn
            begun[source] += 20


def test_another_batch_size_goes_on_where_the_old_one_stopped() -> None:
    arguments: tuple[list[list[int]], None, int] = ([[40, 7, 23]], None, 5)
    small, large = Order(*arguments, 10, 4, 16), Order(*arguments, 15, 4, 16)
    large.origin = (6, 60)
    assert [p for step in range(6, 10) for p in large.batch(step)] == [
        p for step in range(6, 12) for p in small.batch(step)
    ]
    with pytest.raises(DataError, match="steps up to 6"):
        large.batch(5)
