"""Counter-based randomness."""

from collections import Counter

import torch

from tasks.training.data import rng


def test_random_values_depend_only_on_seed_purpose_and_index() -> None:
    first = rng.draw_normal((2, 3), seed=1, purpose="noise", indices=[4, 5])
    assert torch.equal(first[1], rng.draw_normal((2, 3), seed=1, purpose="noise", indices=[5])[0])
    for other in (
        rng.draw_normal((2, 3), seed=2, purpose="noise", indices=[4, 5]),
        rng.draw_normal((2, 3), seed=1, purpose="posterior", indices=[4, 5]),
        rng.draw_normal((2, 3), seed=1, purpose="noise", indices=[6, 7]),
    ):
        assert not torch.equal(first, other)


def test_every_item_is_chosen_once_per_epoch_and_epochs_are_shuffled() -> None:
    chosen = rng.choose_items(5, seed=1, purpose="item", indices=list(range(500)))
    assert all(sorted(chosen[i : i + 5]) == list(range(5)) for i in range(0, 500, 5))
    assert len({tuple(chosen[i : i + 5]) for i in range(0, 500, 5)}) > 20


def test_random_flags_and_integers_follow_the_requested_distribution() -> None:
    flags = rng.draw_flags(0.25, seed=1, purpose="flip", indices=list(range(4000)))
    assert abs(flags.float().mean() - 0.25) < 0.03
    steps = rng.draw_integers(10, seed=1, purpose="t", indices=list(range(4000)))
    assert min(Counter(steps.tolist()).values()) > 300
