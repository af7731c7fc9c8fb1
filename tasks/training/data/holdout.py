"""Photos that are kept out of training, so that a loss can tell learning from overfitting."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from tasks.errors import ConfigError
from tasks.training.config import TrainingConfig

LEAST_PHOTOS = 6  # with fewer, each one that isn't trained on is missed more than validation gains
HOLDOUT_SHARE = 5  # one in so many
T = TypeVar("T")


def settle_validation(config: TrainingConfig, num_photos: int, note: Callable[[str], None]) -> TrainingConfig:
    """Return the configuration with the number of held-out photos, and a metric that they allow.

    The loss on photos that are trained on falls as they are learned by heart, so it can't choose the best
    weights: where none can be held out, similarity of samples does.

    Raises:
        ConfigError: as many photos would be held out as there are.

    """
    validation = config.validation
    is_by_loss = validation.keep == "best" and validation.metric == "loss"
    num, metric = validation.num_holdout, validation.metric
    if num is None:
        num = num_photos // HOLDOUT_SHARE if is_by_loss and num_photos >= LEAST_PHOTOS else 0
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
    settled = validation.model_copy(update={"num_holdout": num, "metric": metric})
    return config.model_copy(update={"validation": settled})


def split_photos(photos: Sequence[T], num_holdout: int, *, key: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """Return the photos to train on, in order, and those held out: the first by their digests."""
    held = {key(photo) for photo in sorted(photos, key=key)[:num_holdout]}
    return [p for p in photos if key(p) not in held], [p for p in photos if key(p) in held]
