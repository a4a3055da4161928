"""Batches: the same wherever a run was cut, complete in every epoch, keyed by seed and epoch."""

from __future__ import annotations

import pytest
import torch

from prunus.data.batches import Batches
from prunus.data.examples import Examples
from prunus.errors import InvalidValue


def pictures(n: int = 23) -> Examples:
    x = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Examples.from_arrays(x, torch.arange(n) % 4, 1000 + torch.arange(n), mean=(0.5,) * 3, std=(0.2,) * 3)


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_the_same_batch_wherever_the_run_was_cut() -> None:
    whole = list(Batches(pictures(), 5, seed=3, augment="crop2,flip,cutout3").epoch(2))
    for cut in range(6):
        fresh = Batches(pictures(), 5, seed=3, augment="crop2,flip,cutout3")
        rest = list(fresh.epoch(2, start_step=cut))
        assert len(rest) == len(whole) - cut
        assert all(equal(a, b) for a, b in zip(whole[cut:], rest, strict=True))
    again = Batches(pictures(), 5, seed=3, augment="crop2,flip,cutout3")
    list(again.epoch(0))
    assert equal(again.batch(2, 3), whole[3])


def test_global_randomness_is_neither_used_nor_moved() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = list(Batches(pictures(), 5, augment="crop2,flip"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(equal(a, b) for a, b in zip(first, Batches(pictures(), 5, augment="crop2,flip"), strict=True))


def test_each_epoch_visits_everything_once() -> None:
    batches = Batches(pictures(), 5, seed=1)
    orders = []
    for epoch in range(3):
        ids = torch.cat([ids for _, _, ids in batches.epoch(epoch)])
        assert ids.sort().values.tolist() == list(range(1000, 1023))
        orders.append(ids.tolist())
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != torch.cat([ids for _, _, ids in Batches(pictures(), 5, seed=2)]).tolist()


def test_labels_and_inputs_follow_ids() -> None:
    source = pictures()
    for x, y, ids in Batches(source, 4):
        same = source.with_ids(ids)
        assert torch.equal(same.y, y)
        assert torch.equal(source.normalise(same.x), x)
        assert x.dtype == torch.float32


def test_without_shuffle_and_with_drop_last() -> None:
    ids = [ids.tolist() for _, _, ids in Batches(pictures(), 10, shuffle=False, drop_last=True)]
    assert ids == [list(range(1000, 1010)), list(range(1010, 1020))]
    assert len(Batches(pictures(), 10)) == 3
    assert len(Batches(pictures(), 10, drop_last=True)) == 2


def test_augmentation_differs_between_steps_and_epochs() -> None:
    def twins(seed: int) -> Batches:
        x = torch.arange(64.0).view(1, 1, 8, 8).expand(32, 1, 8, 8).clone()
        made = Examples.from_arrays(x, torch.arange(32) % 2)
        return Batches(made, 8, seed=seed, shuffle=False, augment="crop3,flip")

    seen = [twins(0).batch(epoch, step)[0] for epoch in (0, 1) for step in (0, 1)] + [twins(1).batch(0, 0)[0]]
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_refusals() -> None:
    with pytest.raises(InvalidValue, match="batch_size"):
        Batches(pictures(), 0)
    with pytest.raises(InvalidValue, match="no full batch"):
        Batches(pictures(), 24, drop_last=True)
    with pytest.raises(InvalidValue, match="images"):
        Batches(Examples.from_arrays(torch.zeros(4, 3), [0, 1, 0, 1]), 2, augment="flip")
    with pytest.raises(InvalidValue, match="start_step"):
        Batches(pictures(), 5).epoch(0, start_step=6)
    with pytest.raises(InvalidValue, match="step 5"):
        Batches(pictures(), 5).batch(0, 5)
