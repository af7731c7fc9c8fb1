"""The requests that the subject stage would send, for cost estimates."""

from PIL import Image

from tasks.images import encode_png
from tasks.manifests.subject import ImageMeasures
from tasks.services.llm.agents.tools import MAX_IMAGES
from tasks.services.llm.batch.jobs import can_batch
from tasks.services.llm.budget.cost_estimate import PlannedRequests
from tasks.services.llm.chat.request import RequestSpec
from tasks.services.llm.config import LlmConfig
from tasks.subject.adjudication import EXAMINE, MAX_ROUNDS, Adjudication
from tasks.subject.captions.captioning import batch_options, caption_spec, inspect_spec
from tasks.subject.config import SubjectConfig
from tasks.subject.name_lookup import look_up_spec
from tasks.subject.photos.ingest import SHOWN_SIDE, Photo, count_photos
from tasks.subject.subject_profile import profile_spec

UNKNOWN_NUM_PHOTOS = 5


def count_asked_photos(config: SubjectConfig) -> int:
    """Return the number of photos a run would send; 5 where it is unknown without reading the source."""
    return min(config.max_images, count_photos(config.source) or UNKNOWN_NUM_PHOTOS)


def make_blank_photo(side: int) -> Photo:
    """Return a black photo of `side` px: image tokens depend on the size alone."""
    measures = ImageMeasures(width=1, height=1, sharpness=0, brightness=0, contrast=0, perceptual_hash="")
    return Photo(name="", sha256="", png=encode_png(Image.new("RGB", (side, side))), measures=measures)


def plan_requests(config: SubjectConfig, llm: LlmConfig, *, side: int) -> list[PlannedRequests]:
    """Return the worst-case requests for photos of `side` px, with blank images."""
    num, photo = count_asked_photos(config), make_blank_photo(side)
    plan: list[PlannedRequests] = []
    if config.captioning == "llm":
        is_batch = can_batch(llm, "captioner") and batch_options(num, config, state_prefix="").is_enabled
        plan.append(PlannedRequests("inspector", [inspect_spec(photo, config)] * num))
        plan.append(PlannedRequests("captioner", [caption_spec(photo, config)] * num, is_batch=is_batch))
        if config.is_profiled:
            plan.append(PlannedRequests("profiler", [profile_spec([photo] * num, config)]))
        if llm.profile("adjudicator").capabilities.tools:
            # At worst, the inspector objects to every photo.
            plan.append(PlannedRequests("adjudicator", plan_adjudication() * num, is_follow_up=True))
    if config.web_lookup.enabled:
        plan.append(PlannedRequests("profiler", [look_up_spec(config)]))
    return plan


def plan_adjudication() -> list[RequestSpec[Adjudication]]:
    """Return the longest exchange about one photo: every round returns the maximal number of images."""
    picture = encode_png(Image.new("RGB", (SHOWN_SIDE, SHOWN_SIDE)))
    # Each round sends the pictures of all earlier rounds again.
    shown = [[picture] * (1 + MAX_IMAGES * number) for number in range(MAX_ROUNDS + 1)]
    # 1000 characters stand in for objection and tool results.
    return [RequestSpec(EXAMINE, ("x" * 1000, *pictures), Adjudication, is_reasoning=True) for pictures in shown]
