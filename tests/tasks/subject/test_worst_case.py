"""The most requests that the subject stage makes, counted at the server; the README states them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ConfigError, LikenessError, ServiceUnavailable
from tasks.subject.adjudication import MAX_ROUNDS
from tasks.subject.captions.captioning import annotate_photos
from tasks.subject.photos.ingest import CheckedPhotos
from tasks.subject.selection import profile_subject
from tests.support.config import make_subject_config
from tests.support.llm import CHAT, make_llm
from tests.support.llm_server import Answer, ScriptedServer, scripted_server
from tests.support.subject import INSPECTION, call_tools

CONFIG = make_subject_config()
NUM = 4
REJECTION = INSPECTION.model_copy(update={"verdict": "reject", "confidence": "high"}).model_dump_json()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


def describe(photos: CheckedPhotos, server: ScriptedServer, folder: Path, **changes: Any) -> Any:
    llm = make_llm(server, folder, **changes)
    return annotate_photos(photos, CONFIG, llm=llm, on_progress=lambda done, total: None)


@pytest.mark.parametrize(
    ("answer", "error", "asked"),
    [((401, {}, b"{}"), ConfigError, 1), ((500, {"retry-after": "0"}, b"{}"), ServiceUnavailable, 3)],
)
def test_a_failing_server_stops_the_inspection(
    photos: CheckedPhotos,
    server: ScriptedServer,
    tmp_path: Path,
    answer: Answer,
    error: type[LikenessError],
    asked: int,
) -> None:
    server.script(answer)
    with pytest.raises(error):
        describe(photos, server, tmp_path)
    assert server.counts[CHAT] == asked


def test_invalid_replies_cost_one_request_per_photo_and_a_quarter_for_repairs(
    photos: CheckedPhotos, server: ScriptedServer, tmp_path: Path
) -> None:
    server.script('{"grade": 9}')
    found = describe(photos, server, tmp_path)
    assert all(described.problem for described in found.values())
    assert server.counts[CHAT] == NUM + 1


def test_objections_cost_at_most_five_adjudication_requests_per_photo(
    photos: CheckedPhotos, server: ScriptedServer, tmp_path: Path
) -> None:
    def answer_by(body: dict[str, Any]) -> Any:
        return call_tools(("find_near_duplicates", {})) if body.get("tools") else REJECTION

    with scripted_server(Answering(answer_by)) as answering:
        describe(photos, answering, tmp_path)
        assert answering.counts[CHAT] == NUM + NUM * (MAX_ROUNDS + 1)


def test_an_invalid_subject_profile_costs_two_requests(
    photos: CheckedPhotos, server: ScriptedServer, tmp_path: Path
) -> None:
    server.script('{"grade": 9}')
    assert profile_subject(photos, CONFIG, llm=make_llm(server, tmp_path)) is None
    assert server.counts[CHAT] == 2


class Answering(ScriptedServer):
    """Answers by what is asked."""

    def __init__(self, answer_by: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__()
        self.answer_by = answer_by

    def next_answer(self) -> Any:
        self.script(self.answer_by(self.bodies[-1]))
        return super().next_answer()
