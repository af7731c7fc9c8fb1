"""Photos of one drawn fish, and what a model says about them."""

import json
from pathlib import Path
from typing import Any

from tasks.manifests.base import ObjectRef
from tasks.manifests.subject import ImageMeasures, InstanceImage, SubjectSet
from tasks.services.store.base import Store
from tasks.subject.captions.captioning import ImageInspection
from tasks.subject.photos.ingest import CheckedPhotos, check_photos
from tasks.subject.photos.quality import Box
from tasks.subject.subject_profile import SubjectProfile
from tests.support.config import make_subject_config
from tests.support.llm_server import completion
from tests.support.tiny import draw_photos

INSPECTION = ImageInspection(
    evidence="A fish.", is_class_noun_visible=True, num_subjects="one", is_cut_off=False, has_watermark=False,
    verdict="accept", confidence="high", subject_box=Box(left=0.1, top=0.2, right=0.5, bottom=0.8),
)  # fmt: skip
PROFILE = SubjectProfile(
    evidence="e", is_one_subject=True, class_noun="fish", is_class_noun_right=True,
    invariant_traits=["blue fins with white stripes", "a round fish"], varying=["places"], best_photos=[3, 9, 1],
)  # fmt: skip


def take_photos(folder: Path, store: Store, *, num: int = 4) -> CheckedPhotos:
    """Draw photos and put them through the checks."""
    draw_photos(folder, num=num, size=256)
    return check_photos(make_subject_config(source=str(folder)), store)


def call_tools(*calls: tuple[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """Return a completion that calls tools."""
    asked = [
        {"id": f"call-{n}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for n, (name, arguments) in enumerate(calls)
    ]
    whole = completion(None, finish_reason="tool_calls")
    whole["choices"][0]["message"]["tool_calls"] = asked
    return 200, {}, json.dumps(whole).encode()


def make_subject_set(*, num: int = 3) -> SubjectSet:
    """Return a subject set whose pictures exist nowhere."""

    def make_image(number: int) -> InstanceImage:
        name, sha256 = f"{number}.png", f"{number:064x}"
        return InstanceImage(
            image=ObjectRef(key=f"01-subject/k/images/{name}", sha256=sha256, size_bytes=1),
            source_name=name, source_sha256=sha256, inspection={}, caption="", instance_prompt="a photo of sks fish",
            surroundings=f"at place {number}", view="from above",
            measures=ImageMeasures(
                width=64, height=64, sharpness=1, brightness=1, contrast=1, perceptual_hash="0" * 16
            ),
        )  # fmt: skip

    return SubjectSet(
        stage="subject", stage_key="0123456789abcdef" * 2, stage_version=1, seconds=0, counts={}, objects=(),
        class_noun="fish", identifier_token="sks", images=tuple(map(make_image, range(num))), rejected=(),
    )  # fmt: skip
