"""Held-out photos, whose validation loss detects overfitting."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from tasks.errors import ConfigError
from tasks.training.config import TrainingConfig

MIN_PHOTOS = 6  # with fewer, a photo is worth more in training than in validation
HOLDOUT_SHARE = 5  # one in so many
T = TypeVar("T")


def resolve_validation(config: TrainingConfig, num_photos: int, note: Callable[[str], None]) -> TrainingConfig:
    """Resolve the number of held-out photos, and the metric that selects the best weights.

    The loss on training photos keeps falling as they are memorized, so it can't select the best weights. Where no
    photo is held out, the similarity of samples selects them.

    Raises:
        ConfigError: no photo would be left to train on.

    """
    validation = config.validation
    is_by_loss = validation.keep == "best" and validation.metric == "loss"
    num, metric = validation.num_holdout, validation.metric
    if num is None:
        num = num_photos // HOLDOUT_SHARE if is_by_loss and num_photos >= MIN_PHOTOS else 0
    if num >= num_photos:
        raise ConfigError(f"training.validation.num_holdout={num} of {num_photos} photos leaves none to train on")
    if num:
        note(f"{num} of {num_photos} photos are held out for the validation loss and never trained on")
    elif is_by_loss:
        metric = "similarity"
        note(
            f"the best weights are chosen by similarity of samples, not by loss: of {num_photos} photos none is held "
            "out; add photos, or set training.validation.num_holdout"
        )
    resolved = validation.model_copy(update={"num_holdout": num, "metric": metric})
    return config.model_copy(update={"validation": resolved})


def split_photos(photos: Sequence[T], num_holdout: int, *, key: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """Return the training photos and the held-out ones, both in the given order."""
    # Chosen by digest: pseudo-random, yet independent of file names and of the order of the photos.
    held = {key(photo) for photo in sorted(photos, key=key)[:num_holdout]}
    return [p for p in photos if key(p) not in held], [p for p in photos if key(p) in held]
