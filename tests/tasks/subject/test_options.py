"""Options of the subject stage: without its option a test here fails."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks.errors import StillPending, SubjectRejected
from tasks.services.llm.batch.jobs import ask_many
from tasks.services.llm.config import CapabilityConfig
from tasks.services.llm.executor import AskOptions
from tasks.services.store.local import LocalStore
from tasks.subject.captions.captioning import batch_options
from tasks.subject.name_lookup import look_up_names
from tasks.subject.photos.ingest import Photo, check_photo, check_photos
from tests.support.config import make_subject_config
from tests.support.llm import make_llm
from tests.support.llm_batch import SPECS
from tests.support.llm_server import BusyServer, completion, scripted_server
from tests.support.tiny import draw_photo, draw_photos


def encode(image: Image.Image) -> bytes:
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()


def shade(low: float, high: float, *, size: tuple[int, int] = (128, 128)) -> bytes:
    """Return a noisy gray photo between two lumas, 0..1."""
    noise = np.random.default_rng(0).uniform(low, high, size[::-1])
    return encode(Image.fromarray((noise * 255).astype(np.uint8)).convert("RGB"))


@pytest.mark.parametrize(
    ("data", "changes", "fault"),
    [
        (shade(0.0, 1.0), {"min_side": 200}, "too small"),
        (shade(0.0, 1.0, size=(384, 128)), {"max_aspect": 2.0}, "aspect ratio too high"),
        (shade(0.0, 1.0), {"max_pixels": 5000}, "too large"),
        (shade(0.0, 1.0), {"min_brightness": 0.7}, "too dark"),
        (shade(0.0, 1.0), {"max_brightness": 0.3}, "too bright"),
        (shade(0.4, 0.6), {"min_contrast": 0.2}, "almost one tone"),
        (encode(draw_photo(size=256)), {"min_sharpness": 1e6}, "blurred"),
        (shade(0.0, 1.0), {"excluded_photos": ["b.png", "a.png"]}, "excluded by subject.excluded_photos"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_photo_outside_a_configured_bound_is_rejected(data: bytes, changes: dict[str, Any], fault: str) -> None:
    assert isinstance(check_photo("a.png", data, make_subject_config()), Photo)
    refused = check_photo("a.png", data, make_subject_config(**changes))
    assert fault in refused.reason  # type: ignore[union-attr]


def test_photos_within_duplicate_distance_are_duplicates(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path / "in", num=6, size=256)
    source = str(tmp_path / "in")
    apart = check_photos(make_subject_config(source=source, duplicate_distance=0), store)
    assert len(apart.accepted) == 6
    with pytest.raises(SubjectRejected, match="same as photo-0.png"):
        check_photos(make_subject_config(source=source, duplicate_distance=64), store)


def test_web_lookup_uses_the_configured_query_and_domains(tmp_path: Path) -> None:
    able = CapabilityConfig(response_format="json_schema", web_search="responses")
    asked = []
    for web_lookup in ({"query": "Maine Coon", "domains": ("example.org",)}, {}):
        with scripted_server() as server:
            server.script((200, {}, json.dumps(completion("{}")).encode()))
            config = make_subject_config(class_noun="cup", web_lookup={"enabled": True, **web_lookup})
            look_up_names(config, llm=make_llm(server, tmp_path / str(len(asked)), capabilities=able, max_attempts=1))
            asked.append(json.dumps(server.bodies[0]))
    assert "Maine Coon" in asked[0]
    assert "example.org" in asked[0]
    assert "Maine Coon" not in asked[1]
    assert "example.org" not in asked[1]


def test_fewer_photos_than_min_images_are_rejected(tmp_path: Path, store: LocalStore) -> None:
    draw_photos(tmp_path / "in", num=4, size=256)
    assert len(check_photos(make_subject_config(source=str(tmp_path / "in"), min_images=4), store).accepted) == 4
    with pytest.raises(SubjectRejected, match="5 needed"):
        check_photos(make_subject_config(source=str(tmp_path / "in"), min_images=5), store)


def test_a_caption_batch_job_past_max_wait_seconds_suspends_the_run(tmp_path: Path) -> None:
    with scripted_server(BusyServer()) as server:
        config = make_subject_config(batch_threshold=2, max_wait_seconds=0.01)
        batch = batch_options(len(SPECS), config, state_prefix="01-subject/k/batches")
        with pytest.raises(StillPending):
            ask_many(make_llm(server, tmp_path), SPECS, AskOptions("captioner"), batch=batch)
