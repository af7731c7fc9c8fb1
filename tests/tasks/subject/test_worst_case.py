"""The most requests that the subject stage makes, counted at the server; the README states them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ConfigError, LikenessError, ServiceUnavailable
from tasks.services.store.local import LocalStore
from tasks.subject.adjudication import MAX_ROUNDS
from tasks.subject.captions.captioning import describe_photos
from tasks.subject.config import SubjectConfig
from tasks.subject.photos.ingest import CheckedPhotos, check_photos
from tasks.subject.selection import profile_subject
from tests.support.llm_server import Answer, ScriptedServer, scripted_server
from tests.support.tiny import draw_photos
from tests.tasks.services.llm.test_service import CHAT, make_llm
from tests.tasks.subject.test_adjudication import calling
from tests.tasks.subject.test_selection import GOOD

CONFIG = SubjectConfig(source="x", class_noun="fish")
NUM = 4
REJECTION = GOOD.model_copy(update={"verdict": "reject", "confidence": "high"}).model_dump_json()


@pytest.fixture
def photos(tmp_path: Path, store: LocalStore) -> CheckedPhotos:
    draw_photos(tmp_path / "in", num=NUM, size=256)
    return check_photos(SubjectConfig(source=str(tmp_path / "in"), class_noun="fish"), store)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


def describe(photos: CheckedPhotos, server: ScriptedServer, folder: Path, **changes: Any) -> Any:
    llm = make_llm(server, folder, **changes)
    return describe_photos(photos, CONFIG, llm=llm, on_progress=lambda done, total: None)


@pytest.mark.parametrize(
    ("answer", "error", "asked"),
    [((401, {}, b"{}"), ConfigError, 1), ((500, {"retry-after": "0"}, b"{}"), ServiceUnavailable, 3)],
)
def test_a_server_that_fails_ends_the_inspection(
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


def test_nonsense_costs_one_inspection_of_each_photo_and_a_quarter_more(
    photos: CheckedPhotos, server: ScriptedServer, tmp_path: Path
) -> None:
    server.script('{"grade": 9}')
    found = describe(photos, server, tmp_path)
    assert all(described.problem for described in found.values())
    assert server.counts[CHAT] == NUM + 1


def test_objections_cost_at_most_five_adjudications_of_each_photo(
    photos: CheckedPhotos, server: ScriptedServer, tmp_path: Path
) -> None:
    def answer_by(body: dict[str, Any]) -> Any:
        return calling(("find_near_duplicates", {})) if body.get("tools") else REJECTION

    with scripted_server(Answering(answer_by)) as answering:
        describe(photos, answering, tmp_path)
        assert answering.counts[CHAT] == NUM + NUM * (MAX_ROUNDS + 1)


def test_a_profile_costs_two(photos: CheckedPhotos, server: ScriptedServer, tmp_path: Path) -> None:
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
