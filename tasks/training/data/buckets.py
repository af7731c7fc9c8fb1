"""Aspect-ratio buckets: sizes of about equal area, so that photos are trained with little cropping."""

import math
from typing import NamedTuple

MAX_ASPECT = 2.0


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


def list_buckets(resolution: int) -> list[Size]:
    """Return sizes of at most `resolution`^2 pixels and an aspect ratio of at most 2.

    Sides are multiples of 64 px, so that every downsampling of VAE and denoiser divides them evenly (SDXL,
    arXiv 2307.01952, appendix I); of 8 px below 512 px, for small models.
    """
    step = 64 if resolution >= 512 else 8
    sizes = {Size(resolution, resolution)}
    for side in range(step, int(resolution * MAX_ASPECT) + 1, step):
        other = resolution**2 // side // step * step
        if other and max(side / other, other / side) <= MAX_ASPECT:
            sizes |= {Size(side, other), Size(other, side)}
    return sorted(sizes)


def choose_bucket(picture: tuple[int, int], resolution: int) -> Size:
    """Return the bucket of the nearest aspect ratio to an image of (width, height); of equals, the largest."""
    # Log ratios treat portrait and landscape alike; rounding lets the area decide between numerically equal ones.
    aspect = math.log(picture[0] / picture[1])
    return min(
        list_buckets(resolution),
        key=lambda size: (round(abs(math.log(size.width / size.height) - aspect), 9), -size.width * size.height),
    )
