"""Tolerances for comparing our numbers with those of other code paths.

Two kernels that sum the same terms in another order differ by rounding alone. A rounding is at most half a unit
in the last place; over a sum of n terms these errors add up like a random walk, about sqrt(n) of them, and
each layer passes them on. Which order a kernel takes depends on the CPU (AVX2, AVX-512), its threads and
the memory's alignment, so a default tolerance is a claim about somebody else's machine.
"""

import math

import torch
from torch import Tensor

SAFETY = 8.0  # a layer may enlarge what it gets: norms divide, attention exponentiates


def rounding(dtype: torch.dtype, *, terms: int, layers: int = 1) -> float:
    """Return the relative error that other summation orders may cause in `layers` sums of `terms` each."""
    return SAFETY * torch.finfo(dtype).eps * math.sqrt(terms) * layers


def assert_same_up_to_rounding(ours: Tensor, theirs: Tensor, *, terms: int, layers: int = 1) -> None:
    """Compare results of two code paths; errors are measured against the largest value, as sums cancel."""
    assert ours.dtype == theirs.dtype
    relative = rounding(ours.dtype, terms=terms, layers=layers)
    torch.testing.assert_close(
        ours.detach(), theirs.detach(), rtol=relative, atol=relative * float(theirs.detach().abs().max())
    )
