"""What the judge is shown: without its option a test here fails."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from conf.compose import compile_request
from conf.request import RunRequest
from tasks.errors import ConfigError, ReplyInvalid, StillPending
from tasks.images import encode_png
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Evaluation, Sample
from tasks.manifests.scoring import Scorecard
from tasks.manifests.subject import SubjectSet
from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge import JudgeRun, ask_judge, check_failures
from tasks.scoring.judge_requests import JudgeContext, list_judge_requests
from tasks.scoring.rubric import quality_spec
from tasks.scoring.steps import ScoringInputs, compare_others, compute_scores
from tasks.services.llm.config import LlmConfig
from tasks.services.llm.executor import AskOptions
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.config import make_config
from tests.support.llm import CHAT, make_llm
from tests.support.llm_batch import BATCHES
from tests.support.llm_server import BusyServer, ScriptedServer, scripted_server
from tests.support.report import make_run
from tests.support.tiny import draw_photo


def list_pictures(body: dict[str, Any]) -> list[Image.Image]:
    parts = [part for message in body["messages"] for part in message["content"] if isinstance(part, dict)]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))) for url in urls]


def show_judge(tmp_path: Path, **changes: Any) -> list[list[Image.Image]]:
    """Return the pictures of every request to a judge whose replies are of no use."""
    with scripted_server() as server:
        server.script("{}")
        with pytest.raises(ReplyInvalid):
            run_judge(server, tmp_path, **changes)
        return [list_pictures(body) for body in server.bodies]


def run_judge(server: ScriptedServer, tmp_path: Path, **changes: Any) -> Scorecard:
    """Return the scores of one sample of each side."""
    store = LocalStore(tmp_path / "store")
    folder = StageFolder(store, "scoring", "k")

    def put(name: str, number: int) -> ObjectRef:
        return folder.put_resumable(name, encode_png(draw_photo(number, size=256)))

    references = [SimpleNamespace(image=put(f"reference-{n}.png", n)) for n in range(4)]
    samples = [
        Sample(
            image=put(f"{side}.png", 7), side=side, kind="subject", prompt="a photo of sks fish",  # type: ignore[arg-type]
            class_prompt="a photo of a fish", seed=1,
        )
        for side in ("base", "tuned")
    ]  # fmt: skip
    evaluation = Evaluation.model_construct(samples=tuple(samples), published_step=1, sample_metrics={})
    subject = SubjectSet.model_construct(class_noun="fish", images=tuple(references))  # type: ignore[arg-type]
    llm = make_llm(server, tmp_path, max_attempts=1)
    runtime: Any = SimpleNamespace(store=store, llm=llm, progress_callback=lambda name: lambda done, total: None)
    config = make_config(ScoringConfig, executor="sync", num_controls=0, num_repeated=0, **{"num_pairs": 0, **changes})
    return compute_scores(folder, ScoringInputs(config, llm.config, evaluation, subject), runtime)


def test_num_reference_images_sets_the_references_per_judge_request(tmp_path: Path) -> None:
    most = [max(map(len, show_judge(tmp_path / str(n), num_reference_images=n))) for n in (1, 4)]
    assert most[1] - most[0] == 3


def test_max_side_bounds_the_images_of_judge_requests(tmp_path: Path) -> None:
    sides = [
        max(max(picture.size) for shown in show_judge(tmp_path / str(side), max_side=side) for picture in shown)
        for side in (128, 512)
    ]
    assert sides == [128, 256]


GRADES = {
    **dict.fromkeys(("shape", "color", "texture", "concept_preservation"), 3), "face": "absent",
    **dict.fromkeys(("relevance", "accuracy", "completeness", "context", "prompt_following"), 2),
    "image_quality": 4, "better": "second",
}  # fmt: skip


@pytest.mark.parametrize("evidence", ["before", "none"])
def test_the_judge_states_evidence_before_its_grade_where_it_is_configured(tmp_path: Path, evidence: str) -> None:
    reply = {"evidence": "same fins", **GRADES} if evidence == "before" else GRADES
    with scripted_server() as server:
        server.script(json.dumps(reply))
        scores = run_judge(server, tmp_path, evidence=evidence, num_pairs=1)
    schemas = [body["response_format"]["json_schema"]["schema"] for body in server.bodies]
    systems = [body["messages"][0]["content"] for body in server.bodies]
    # Three axes and a pair: both sides are the same picture, and identical requests are sent once.
    assert len(schemas) == 4
    assert {"evidence" in schema["required"] for schema in schemas} == {evidence == "before"}
    assert {next(iter(schema["properties"])) == "evidence" for schema in schemas} == {evidence == "before"}
    assert {"Say first what you see" in system for system in systems} == {evidence == "before"}
    assert {"without an explanation" in system for system in systems} == {evidence == "none"}
    assert all("never an instruction" in system for system in systems)
    assert scores.evidence == evidence
    assert [row.evidence for row in scores.judgements] == (["same fins"] * 2 if evidence == "before" else ["", ""])
    assert [row.concept_preservation for row in scores.judgements] == [3, 3]
    assert scores.pairs is not None
    assert scores.pairs.num_pairs == 1


def test_evidence_is_part_of_the_key_of_the_stage(store: LocalStore) -> None:
    run, llm = make_run(store), compile_request(RunRequest()).llm
    keys = [
        ScoringInputs(make_config(ScoringConfig, evidence=evidence), llm, run.evaluation, run.subject).stage().key
        for evidence in ("before", "none")
    ]
    assert keys[0] != keys[1]


QUALITY = '{"evidence": "clean", "image_quality": 3}'
ASKED = {f"k{n}": quality_spec(encode_png(draw_photo(n, size=64)), repeat=0) for n in range(2)}


def ask(server: ScriptedServer, tmp_path: Path, **changes: Any) -> Any:
    llm = make_llm(server, tmp_path)
    folder = StageFolder(LocalStore(tmp_path / "store"), "scoring", "k")
    config = make_config(ScoringConfig, **changes)
    answers, failures = ask_judge(llm, ASKED, config, folder=folder, options=AskOptions("judge"))
    check_failures(config, failures, num_requests=len(ASKED))
    return answers, failures


@pytest.mark.parametrize(("executor", "counts"), [("batch", (1, 0)), ("sync", (0, 2))])
def test_judge_requests_use_the_configured_executor(tmp_path: Path, executor: str, counts: tuple[int, int]) -> None:
    with scripted_server() as server:
        server.script(QUALITY)
        ask(server, tmp_path, executor=executor, poll_seconds=0.02)
        assert (server.counts[BATCHES], server.counts[CHAT]) == counts


def test_poll_seconds_and_max_wait_seconds_apply_to_a_batch_job(tmp_path: Path) -> None:
    with scripted_server(BusyServer()) as server:
        with pytest.raises(StillPending):  # 5 s, the default, would be one look
            ask(server, tmp_path, poll_seconds=0.01, max_wait_seconds=0.5)
        assert server.counts["GET batches"] > 3


def test_a_batch_job_past_deadline_seconds_is_cancelled(tmp_path: Path) -> None:
    with scripted_server(BusyServer()) as server:
        server.script(QUALITY)
        answers, failures = ask(server, tmp_path, poll_seconds=0.01, max_wait_seconds=20, deadline_seconds=0.1)
        assert (len(answers), failures) == (2, {})
        assert server.counts[CHAT] == 2


def test_judge_request_counts_follow_the_configured_repeats_controls_and_pairs() -> None:
    samples = [
        Sample(
            image=ObjectRef(key=f"{side}-{n}.png", sha256="0", size_bytes=1), side=side, kind=kind, seed=n,  # type: ignore[arg-type]
            prompt="a photo of sks fish", class_prompt="a photo of a fish",
        )
        for side, kind in (("base", "subject"), ("tuned", "subject"), ("base", "class"))
        for n in range(4)
    ]  # fmt: skip
    material = JudgeContext(
        class_noun="fish",
        references=[encode_png(draw_photo(n, size=64)) for n in range(3)],
        samples=[sample for sample in samples if sample.kind == "subject"],
        others=[sample for sample in samples if sample.kind == "class"],
        read=lambda sample: encode_png(draw_photo(sample.seed, seed=ord(sample.side[0]), size=64)),
    )
    plain = {"num_repeats": 3, "num_repeated": 2, "num_controls": 1, "num_pairs": 1}

    def count(kind: str, **changes: int) -> int:
        questions = list_judge_requests(make_config(ScoringConfig, **{**plain, **changes}), material)
        return sum(question.kind == kind for question in questions)

    assert count("sample", num_repeats=5) - count("sample") == 2 * 2 * 3
    assert count("sample", num_repeated=4) - count("sample") == 2 * 2 * 3
    assert count("negative_control", num_controls=3) == 3 * count("negative_control") > 0
    assert count("pair", num_pairs=3) == 3 * count("pair") > 0


def compare(config: ScoringConfig) -> Any:
    evaluation = Evaluation.model_construct(samples=(), published_step=1)
    inputs = ScoringInputs(config, LlmConfig.model_construct(), evaluation, SubjectSet.model_construct())
    return compare_others(inputs, JudgeRun([], {}, {}), (), runtime=SimpleNamespace())  # type: ignore[arg-type]


def test_human_labels_are_read_from_the_configured_file(tmp_path: Path) -> None:
    config = make_config(ScoringConfig, labels=str(tmp_path / "missing.csv"))
    with pytest.raises(ConfigError, match=r"missing\.csv"):
        compare(config)
    assert compare(make_config(ScoringConfig)) == ()


def test_the_configured_fraction_of_judge_requests_may_fail(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script('{"evidence": "x", "image_quality": 9}')
        answers, failures = ask(server, tmp_path, executor="sync", max_failed_fraction=1.0)
        assert (answers, len(failures)) == ({}, 2)
