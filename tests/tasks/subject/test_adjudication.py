"""A doubtful photo is measured before it is dropped."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.services.llm.config import CapabilityConfig
from tasks.services.llm.service import LlmService
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tasks.subject.adjudication import MAX_ROUNDS, DoubtfulPhoto, adjudicate
from tasks.subject.captions.captioning import annotate_photos
from tasks.subject.photos.ingest import CheckedPhotos
from tasks.subject.selection import select_photos
from tests.support.config import make_subject_config
from tests.support.llm import CHAT, make_llm
from tests.support.llm_server import ScriptedServer, completion, scripted_server
from tests.support.subject import INSPECTION, call_tools

CONFIG = make_subject_config()
PART = {"left": 0.2, "top": 0.2, "right": 0.8, "bottom": 0.8}


def answer(verdict: str) -> tuple[int, dict[str, str], bytes]:
    return call_tools(("answer", {"evidence": "sharpness 400 in the middle", "verdict": verdict}))


def decide(photos: CheckedPhotos, llm: LlmService) -> Any:
    first, *others = photos.accepted
    return adjudicate(DoubtfulPhoto(first, "blurred", others), CONFIG, llm=llm).verdict


def test_tool_calls_are_executed_and_their_results_returned_to_the_model(photos: CheckedPhotos, tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(
            call_tools(("measure_sharpness", PART), ("find_near_duplicates", {})),
            call_tools(("crop_preview", PART), ("compare_with", {"number": 2})),
            answer("accept"),
        )
        llm = make_llm(server, tmp_path)
        assert decide(photos, llm).verdict == "accept"
        assert server.counts[CHAT] == 3
        *_, last = server.bodies
        told = [json.loads(message["content"]) for message in last["messages"] if message["role"] == "tool"]
        assert told[0]["sharpness"] > 20
        assert len(told[1]["different_bits_of_64"]) == 3
        assert told[2] == {"width": 154, "height": 154}
        shown = last["messages"][-1]["content"]
        assert [part["type"] for part in shown] == ["text", "image_url", "image_url"]
        assert [row.outcome for row in llm.ledger.rows] == ["ok"] * 3
        assert decide(photos, make_llm(server, tmp_path)).verdict == "accept"
        assert server.counts[CHAT] == 3  # kept, tools and all


def test_invalid_tool_calls_are_returned_to_the_model_as_errors(photos: CheckedPhotos, tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(
            call_tools(("measure_sharpness", {"left": "here"}), ("delete_photo", {}), ("compare_with", {"number": 9})),
            answer("reject"),
        )
        assert decide(photos, make_llm(server, tmp_path)).verdict == "reject"
        told = [json.loads(m["content"])["error"] for m in server.bodies[-1]["messages"] if m["role"] == "tool"]
        assert "left: Input should be a valid number" in told[0]
        assert told[1:] == ["there is no tool delete_photo", "there are 3 other photos"]


def test_the_last_round_forces_the_answer_tool(photos: CheckedPhotos, tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(*[call_tools(("find_near_duplicates", {}))] * MAX_ROUNDS, answer("accept"))
        assert decide(photos, make_llm(server, tmp_path)).verdict == "accept"
        choices = [body["tool_choice"] for body in server.bodies]
        assert choices[:-1] == ["required"] * MAX_ROUNDS
        assert choices[-1]["function"]["name"] == "answer"


def test_a_verdict_without_a_tool_call_is_discarded(photos: CheckedPhotos, tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(answer("accept"))
        assert decide(photos, make_llm(server, tmp_path)) is None


class Objecting(ScriptedServer):
    """An inspector that rejects every photo, and an adjudicator that measures and accepts."""

    def next_answer(self) -> Any:
        body = self.bodies[-1]
        if body.get("tools"):
            has_measured = any(message["role"] == "tool" for message in body["messages"])
            return answer("accept") if has_measured else call_tools(("measure_sharpness", PART))
        name = body["response_format"]["json_schema"]["name"]
        told = {"surroundings": "at sea", "view": ""}
        if name == "ImageInspection":
            told = INSPECTION.model_copy(update={"verdict": "reject"}).model_dump()
        return 200, {}, json.dumps(completion(json.dumps(told))).encode()


@pytest.mark.parametrize(("has_tools", "num_accepted"), [(True, 4), (False, 0)])
def test_adjudication_with_tools_retains_photos_rejected_by_inspection(
    photos: CheckedPhotos, tmp_path: Path, store: LocalStore, has_tools: bool, num_accepted: int
) -> None:
    with scripted_server(Objecting()) as server:
        capabilities = CapabilityConfig(response_format="json_schema", tools=has_tools)
        llm = make_llm(server, tmp_path, capabilities=capabilities)
        described = annotate_photos(photos, CONFIG, llm=llm, on_progress=lambda done, total: None)
    outcome = select_photos(
        StageFolder(store, "subject", "k"), photos.accepted, described, config=CONFIG, overview=None
    )
    assert len(outcome.images) == num_accepted
    if has_tools:
        assert "sharpness 400" in str(outcome.images[0].inspection["adjudication"])
