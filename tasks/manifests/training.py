"""The training stage's manifest: the tuned model, and the rows of its loss log."""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from tasks.manifests.base import Machine, Manifest, ModelRef, ObjectRef, Record


class PhotoCrops(Record):
    """The parts of one photo that training saw."""

    photo: ObjectRef
    boxes: tuple[tuple[float, float, float, float], ...]
    """Left, top, right and bottom as fractions of width and height; flipped crops are not repeated."""


class TunedModel(Manifest):
    """The fine-tuned weights and their provenance."""

    base_model: ModelRef
    model: tuple[ObjectRef, ...]
    """Below `model/`: a diffusers folder, or adapters (LoRA, learned token) for the base model."""
    family: str
    method: str
    num_steps: int
    published_step: int
    """The step whose weights these are: the last, or the best."""
    trainable_parameters: int
    total_parameters: int
    final_loss: float
    peak_memory_bytes: int
    subject_sha256: str
    """Content digest of the subject set that it was trained on."""
    prior_sha256: str
    crops: tuple[PhotoCrops, ...] = ()
    """Of the photos that were trained on; those held out for validation have none."""
    machine: Machine | None = None
    """None for a model from elsewhere."""
    NOT_RESULT: ClassVar[frozenset[str]] = Manifest.NOT_RESULT | {"peak_memory_bytes", "machine"}

    def find_candidates(self) -> "dict[int, list[ObjectRef]]":
        """Return the retained checkpoints other than the published one, by step."""
        found: dict[int, list[ObjectRef]] = {}
        for ref in self.objects:
            step = re.search(r"/candidates/step-(\d+)/", ref.key)
            if step:
                found.setdefault(int(step[1]), []).append(ref)
        return found

    def pick(self, step: int) -> "PickedModel":
        """Return the model with the weights of a retained checkpoint as the published ones."""
        weights = {"model": tuple(self.find_candidates()[step]), "published_step": step}
        return PickedModel(**{**dict(self), **weights, "trained_step": self.published_step})


class PickedModel(TunedModel):
    """A tuned model with a retained checkpoint in the place of the weights that training published.

    It is no stage's output but derived from one, so it is never stored.
    """

    trained_step: int
    """The step that training published, whose weights lie below `model/`."""

    def find_candidates(self) -> "dict[int, list[ObjectRef]]":
        """Return the retained checkpoints other than the picked one, by step."""
        found = {step: refs for step, refs in super().find_candidates().items() if step != self.published_step}
        found[self.trained_step] = [ref for ref in self.objects if find_below([ref]) == "model"]
        return found


def find_below(refs: Sequence[ObjectRef]) -> str:
    """Return the part of a training's object keys that precedes the paths within a model folder."""
    # `<prefix>/<stage key>/model/<path>`, or `<prefix>/<stage key>/candidates/step-00000400/<path>`
    parts = refs[0].key.split("/")[2:]
    return "/".join(parts[:2]) if parts[0] == "candidates" else parts[0]


class LossRow(Record):
    """One optimizer step of `losses.jsonl`; None where a number is not finite, unset where it was not measured."""

    step: int
    loss: float | None = None
    """What is minimized: instance loss plus weighted prior loss."""
    instance_loss: float | None = None
    prior_loss: float | None = None
    grad_norm: float | None = None
    """Before clipping."""
    learning_rate: float | None = None
    """Of the first parameter group, after the scheduler; prodigy's own estimate included."""
    validation_loss: float | None = None
    validation_similarity: float | None = None

    @property
    def is_skipped(self) -> bool:
        """Whether the update was skipped, since loss or gradient was not finite."""
        # A non-finite validation result skips no step.
        measured = self.model_fields_set - {"step", "validation_loss", "validation_similarity"}
        return any(getattr(self, name) is None for name in measured)


def dump_losses(rows: Iterable[LossRow]) -> str:
    """Return rows as lines of JSON."""
    return "".join(json.dumps(row.model_dump(exclude_unset=True)) + "\n" for row in rows)


def parse_losses(text: str) -> list[LossRow]:
    """Return the rows of a loss log. Raises ValueError for a damaged one."""
    return [LossRow.model_validate_json(line) for line in text.splitlines()]


def count_skipped(rows: Sequence[LossRow]) -> int:
    """Return how many of the last steps were skipped."""
    skipped = itertools.takewhile(lambda row: row.is_skipped, reversed(rows))
    return sum(1 for _ in skipped)
