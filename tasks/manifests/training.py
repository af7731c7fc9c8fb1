"""The training stage's manifest: the tuned model."""

import re
from typing import ClassVar

from tasks.manifests.base import Manifest, ModelRef, ObjectRef


class TunedModel(Manifest):
    """The fine-tuned weights and how they came to be."""

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
    NOT_RESULT: ClassVar[frozenset[str]] = Manifest.NOT_RESULT | {"peak_memory_bytes"}

    def find_candidates(self) -> "dict[int, list[ObjectRef]]":
        """Return the weights that were kept beside the published ones, by step."""
        found: dict[int, list[ObjectRef]] = {}
        for ref in self.objects:
            step = re.search(r"/candidates/step-(\d+)/", ref.key)
            if step:
                found.setdefault(int(step[1]), []).append(ref)
        return found
