"""Counter-based randomness: every draw is a function of (seed, purpose, global sample index).

So rng differ between ranks, don't depend on how many there are, and resuming needs no stored
generator state.
"""

import hashlib

import torch
from torch import Tensor


def make_seed(seed: int, purpose: str, index: int) -> int:
    """Return a number that stands for one purpose of one sample."""
    text = f"{seed}/{purpose}/{index}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def make_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """Return a generator of its own for one purpose of one sample."""
    return torch.Generator().manual_seed(make_seed(seed, purpose, index))


def draw_normal(shape: tuple[int, ...], *, seed: int, purpose: str, indices: list[int]) -> Tensor:
    """Return one standard normal `shape` per sample index: `(len(indices), *shape)`."""
    return torch.stack([torch.randn(shape, generator=make_generator(seed, purpose, i)) for i in indices])


def draw_uniform(*, seed: int, purpose: str, indices: list[int]) -> Tensor:
    """Return one number in `[0, 1)` per sample index."""
    rows = [torch.rand((), generator=make_generator(seed, purpose, i), dtype=torch.float64) for i in indices]
    return torch.stack(rows)


def draw_integers(high: int, *, seed: int, purpose: str, indices: list[int]) -> Tensor:
    """Return one integer in `[0, high)` per sample index."""
    rows = [torch.randint(high, (), generator=make_generator(seed, purpose, i)) for i in indices]
    return torch.stack(rows)


def draw_flags(probability: float, *, seed: int, purpose: str, indices: list[int]) -> Tensor:
    """Return one boolean per sample index, true with the given probability."""
    rows = [torch.rand((), generator=make_generator(seed, purpose, i)) for i in indices]
    return torch.stack(rows) < probability


def choose_items(num_items: int, *, seed: int, purpose: str, indices: list[int]) -> list[int]:
    """Return which item each sample shows: every item once per round, each round shuffled anew."""
    chosen = []
    for index in indices:
        round_index, place = divmod(index, num_items)
        order = torch.randperm(num_items, generator=make_generator(seed, purpose, round_index))
        chosen.append(int(order[place]))
    return chosen
