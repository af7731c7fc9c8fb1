"""From grades to scores."""

from pathlib import Path

import pytest

from tasks.contract import StageFolder
from tasks.errors import ReplyInvalid
from tasks.manifests import ObjectRef, Sample
from tasks.scoring.config import ScoringConfig
from tasks.scoring.judging import Answers, ask_judge, average, to_judgements
from tasks.scoring.rubric import SampleJudgement, judge_spec
from tasks.services.llm.config import ProfileConfig
from tasks.services.llm.requests import RequestSpec
from tasks.services.store import LocalStore
from tests.llm_server import scripted_server
from tests.tasks.services.llm.test_client import make_llm

GOOD = '{"evidence": "same stripes", "concept_preservation": 3, "prompt_following": 4}'
SPECS = {f"k{n}": RequestSpec("judge", (f"sample {n}",), SampleJudgement) for n in range(4)}


def ask(tmp_path: Path, url_server: object, executor: str) -> tuple[Answers, dict[str, str]]:
    llm = make_llm(url_server, tmp_path)  # type: ignore[arg-type]
    config = ScoringConfig(executor=executor, poll_seconds=0.05)  # type: ignore[arg-type]
    folder = StageFolder(LocalStore(tmp_path / "store"), "scoring", "k")
    return ask_judge(SPECS, config, llm=llm, folder=folder, on_progress=lambda done, total: None)


@pytest.mark.parametrize("executor", ["batch", "sync"])
def test_both_executors_give_the_same_grades(tmp_path: Path, executor: str) -> None:
    with scripted_server() as server:
        server.script(GOOD)
        answers, failures = ask(tmp_path, server, executor)
    assert failures == {}
    assert [answers[name][0].concept_preservation for name in SPECS] == [3, 3, 3, 3]


def test_grades_of_one_executor_serve_the_other(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(GOOD)
        ask(tmp_path, server, "batch")
        ask(tmp_path, server, "sync")
        assert server.counts["POST /v1/chat/completions"] == 0


@pytest.mark.parametrize("executor", ["batch", "sync"])
def test_too_many_failures_are_an_error_not_a_score(tmp_path: Path, executor: str) -> None:
    with scripted_server() as server:
        server.script('{"evidence": "x", "concept_preservation": 9, "prompt_following": 9}')
        with pytest.raises(ReplyInvalid, match="4 of 4 samples got no grade"):
            ask(tmp_path, server, executor)


def test_scores_are_means_per_side() -> None:
    samples = [
        Sample(
            image=ObjectRef(key=f"k{n}", sha256="0", size_bytes=1), side="base" if n < 1 else "tuned",
            kind="subject", prompt="p", class_prompt="c", seed=n,
        )
        for n in range(3)
    ]  # fmt: skip
    grades = [(0, 4), (3, 2), (4, 4)]
    answers = {
        f"k{n}": (SampleJudgement(evidence="e", concept_preservation=c, prompt_following=p), "m")  # type: ignore[arg-type]
        for n, (c, p) in enumerate(grades)
    }
    scores = average(to_judgements(samples, answers))
    assert scores["base"].concept_preservation == 0
    assert scores["tuned"].concept_preservation == 3.5
    assert scores["tuned"].prompt_following == 3.0


def test_the_rubric_and_the_references_come_before_the_sample() -> None:
    spec = judge_spec(references=[b"r1", b"r2"], sample=b"s", class_prompt="a photo of a dog")
    assert spec.parts.index(b"r2") < spec.parts.index(b"s")
    assert "sks" not in str(spec.parts)
    text = str(spec.reply.model_json_schema())
    assert text.index("evidence") < text.index("concept_preservation")
    assert ProfileConfig(model="m").max_output_tokens >= 256
