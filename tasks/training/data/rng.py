"""Counter-based random numbers: every draw is a function of (seed, purpose, global sample index).

Draws differ between ranks, don't depend on the number of ranks, and need no generator state in checkpoints.
All are made on the CPU, so they don't depend on the device.
"""

import hashlib

import torch
from torch import Tensor


def make_seed(seed: int, purpose: str, index: int) -> int:
    """Return the generator seed of one purpose of one sample, in [0, 2^63)."""
    text = f"{seed}/{purpose}/{index}".encode()
    # A hash, not a sum: neighbouring seeds and indices get unrelated streams. 63 bits, since seeds are signed.
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def make_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """Return a CPU generator for one purpose of one sample."""
    return torch.Generator().manual_seed(make_seed(seed, purpose, index))


def draw_normal(shape: tuple[int, ...], *, seed: int, purpose: str, indices: list[int]) -> Tensor:
    """Return standard normal float32 values, `(len(indices), *shape)`."""
    # One generator per sample: a single draw for the batch would depend on its size.
    return torch.stack([torch.randn(shape, generator=make_generator(seed, purpose, i)) for i in indices])


def draw_uniform(*, seed: int, purpose: str, indices: list[int]) -> Tensor:
    """Return one float64 number in [0, 1) per sample index."""
    rows = [torch.rand((), generator=make_generator(seed, purpose, i), dtype=torch.float64) for i in indices]
    return torch.stack(rows)


def draw_integers(high: int, *, seed: int, purpose: str, indices: list[int]) -> Tensor:
    """Return one integer in [0, high) per sample index."""
    rows = [torch.randint(high, (), generator=make_generator(seed, purpose, i)) for i in indices]
    return torch.stack(rows)


def draw_flags(probability: float, *, seed: int, purpose: str, indices: list[int]) -> Tensor:
    """Return one boolean per sample index, true with the given probability."""
    rows = [torch.rand((), generator=make_generator(seed, purpose, i)) for i in indices]
    return torch.stack(rows) < probability


def choose_items(num_items: int, *, seed: int, purpose: str, indices: list[int]) -> list[int]:
    """Return the item of each sample: every item once per round, each round with a new permutation."""
    chosen = []
    for index in indices:
        round_index, place = divmod(index, num_items)
        # Recomputed from the round: a permutation held as state would have to be checkpointed.
        order = torch.randperm(num_items, generator=make_generator(seed, purpose, round_index))
        chosen.append(int(order[place]))
    return chosen
