"""From questions to scores, and what is known of the judge that answered."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from tasks.errors import ConfigError, ReplyInvalid
from tasks.images import encode_png
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Sample, Side, SubjectMetrics
from tasks.manifests.scoring import Judgement, JudgeReliability
from tasks.scoring import scores
from tasks.scoring.config import ScoringConfig
from tasks.scoring.judge import ask_judge, check_failures, grade
from tasks.scoring.judge_requests import (
    AXES,
    JudgeContext,
    JudgeRequest,
    list_judge_requests,
    list_second_judge_requests,
)
from tasks.scoring.rubric import (
    ConceptGrade,
    PromptGrade,
    QualityGrade,
    concept_spec,
    pair_spec,
    prompt_spec,
    quality_spec,
)
from tasks.scoring.scores import Judged
from tasks.scoring.tie_break import break_ties, find_disputed, read_tie_breaks
from tasks.services.llm.chat.request import Answer
from tasks.services.llm.executor import Answers, AskOptions
from tasks.services.llm.service import LlmService
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.config import make_config, make_llm_config
from tests.support.llm import make_llm, two_profiles
from tests.support.llm_server import scripted_server
from tests.support.tiny import draw_photo

GOOD = '{"evidence": "clean", "image_quality": 3}'
SPECS = {f"k{n}": quality_spec(encode_png(draw_photo(n, size=64)), repeat=0) for n in range(4)}
PROMPTS = ("a photo of a fish", "a fish in the snow", "a fish on the beach at night")


def ask(tmp_path: Path, server: Any, executor: str) -> tuple[Answers, dict[str, str]]:
    llm = make_llm(server, tmp_path)
    config = make_config(ScoringConfig, executor=executor, poll_seconds=0.05)  # type: ignore[arg-type]
    folder = StageFolder(LocalStore(tmp_path / "store"), "scoring", "k")
    answers, failures = ask_judge(llm, SPECS, config, folder=folder, options=AskOptions("judge"))
    check_failures(config, failures, num_requests=len(SPECS))
    return answers, failures


@pytest.mark.parametrize("executor", ["batch", "sync"])
def test_both_executors_give_the_same_grades(tmp_path: Path, executor: str) -> None:
    with scripted_server() as server:
        server.script(GOOD)
        answers, failures = ask(tmp_path, server, executor)
    assert failures == {}
    assert [answers[name].reply.image_quality for name in SPECS] == [3, 3, 3, 3]


def test_executors_share_the_reply_cache(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.script(GOOD)
        ask(tmp_path, server, "batch")
        ask(tmp_path, server, "sync")
        assert server.counts["POST /v1/chat/completions"] == 0


@pytest.mark.parametrize("executor", ["batch", "sync"])
def test_too_many_failed_judge_requests_raise_instead_of_scoring(tmp_path: Path, executor: str) -> None:
    with scripted_server() as server:
        server.script('{"evidence": "x", "image_quality": 9}')
        with pytest.raises(ReplyInvalid, match="4 of 4 judge requests failed"):
            ask(tmp_path, server, executor)


def test_a_failing_second_judge_does_not_fail_the_samples(material: JudgeContext, tmp_path: Path) -> None:
    config = make_config(
        ScoringConfig, executor="sync", num_controls=0, num_pairs=0, num_repeated=0, second_judge_fraction=1.0
    )
    with scripted_server() as first, scripted_server() as second:
        replies = (ConceptGrade, PromptGrade, QualityGrade)
        fields = {name: field for reply in replies for name, field in reply.model_fields.items()}
        first.script(json.dumps({name: (get_args(field.annotation) or ("e",))[-1] for name, field in fields.items()}))
        second.script("no JSON")
        both = two_profiles(first, second, tmp_path)
        roles = both.config.model_copy(update={"models": ("cheap",), "second_judge": ("strong",)})
        llm = LlmService(roles, store=both.store, ledger=both.ledger)
        folder = StageFolder(both.store, "scoring", "k")
        grading = grade(config, material, llm=llm, folder=folder, show=lambda name: lambda done, total: None)
        assert second.counts["POST /v1/chat/completions"] > 0
    assert (len(grading.answers), grading.failures, grading.second) == (len(material.samples) * 3, {}, {})


def make_sample(number: int, side: Side, *, kind: Any = "subject") -> Sample:
    prompt = PROMPTS[number % len(PROMPTS)]
    return Sample(
        image=ObjectRef(key=f"04/{side}-{kind}-{number}.png", sha256="0", size_bytes=1), side=side, kind=kind,
        prompt=prompt.replace("a fish", "sks fish"), class_prompt=prompt, seed=number,
    )  # fmt: skip


@pytest.fixture
def material() -> JudgeContext:
    pictures: dict[str, bytes] = {}

    def read(sample: Sample) -> bytes:
        key = sample.image.key
        pictures.setdefault(key, encode_png(draw_photo(len(pictures) % 5, seed=len(pictures), size=64)))
        return pictures[key]

    sides: tuple[Side, ...] = ("base", "tuned")
    return JudgeContext(
        class_noun="fish",
        references=[encode_png(draw_photo(i, size=64)) for i in range(3)],
        samples=[make_sample(n, side) for side in sides for n in range(6)],
        others=[make_sample(n, "base", kind="class") for n in range(4)],
        read=read,
    )


def answer_all(questions: list[JudgeRequest], grade: Callable[[JudgeRequest], Any]) -> Answers:
    """Answer as a judge would who grades by a rule."""
    answers = {}
    for question in questions:
        value = grade(question)
        is_pair = question.kind in ("pair", "checkpoint_pair")
        fields: dict[str, Any] = {"better": value} if is_pair else {question.axis: value}
        reply: BaseModel = question.spec.reply.model_construct(evidence="e", **fields)
        answers[question.name] = Answer(reply, "p", "m")
    return answers


def fair_judge(question: JudgeRequest) -> Any:
    """Grades tuned samples higher, passes every control, and sees through the order of pairs."""
    if question.kind == "pair":
        return "first" if question.is_swapped else "second"
    if question.kind in ("negative_control", "shuffled", "blurred"):
        return 1
    if question.kind == "positive_control":
        return 4
    return 4 if "tuned" in question.key else 2


def examine(material: JudgeContext, judge: Callable[[JudgeRequest], Any], **changes: Any) -> JudgeReliability:
    questions = list_judge_requests(make_config(ScoringConfig, **changes), material)
    return scores.assess_judge(material.samples, Judged(questions, answer_all(questions, judge)), is_comparable=True)


def test_every_sample_is_judged_on_every_axis_and_some_repeatedly(material: JudgeContext) -> None:
    questions = list_judge_requests(make_config(ScoringConfig, num_repeats=3, num_repeated=4), material)
    asked = [question for question in questions if question.kind == "sample"]
    assert len({(q.key, q.axis) for q in asked}) == 12 * 3
    assert len(asked) == 12 * 3 + 4 * 2 * 3
    assert len({question.name for question in questions}) == len(questions)
    assert len({q.spec.compute_key(make_profile()) for q in asked}) == len(asked)  # a repeat is asked anew


def make_profile() -> Any:
    from tasks.services.llm.config import ProfileConfig

    return ProfileConfig(model="m")


def test_repeated_judge_requests_permute_the_reference_images(material: JudgeContext) -> None:
    questions = list_judge_requests(make_config(ScoringConfig, num_repeats=3, num_repeated=1), material)
    concept = [
        q for q in questions if q.kind == "sample" and q.axis == AXES[0] and q.key == material.samples[0].image.key
    ]
    orders = {q.spec.parts[1:4] for q in concept}
    assert len(orders) == 3
    assert all(set(order) == set(material.references) for order in orders)


def test_scores_are_per_side_means_of_median_grades_with_intervals(material: JudgeContext) -> None:
    def judge(question: JudgeRequest) -> Any:
        if question.kind == "sample" and question.key == material.samples[0].image.key:
            return (0, 4, 3)[question.repeat]
        return fair_judge(question)

    questions = list_judge_requests(make_config(ScoringConfig), material)
    judgements = scores.to_judgements(material.samples, Judged(questions, answer_all(questions, judge)))
    first = judgements[0]
    assert (first.concept_preservation, first.num_repeats, first.spread) == (3, 3, 4)
    found = scores.mean_scores(judgements)
    assert found["tuned"].prompt_following == 4
    assert found["base"].concept_preservation == pytest.approx((3 + 5 * 2) / 6)
    table = scores.estimate_scores(material.samples, judgements)
    for side in ("base", "tuned"):
        for axis in AXES:
            assert table[axis][side].mean == pytest.approx(getattr(found[side], axis))


def grade_all(samples: Sequence[Sample], grade: Callable[[Sample], float]) -> list[Judgement]:
    """Return a judgement of each sample, with the same grade on all axes."""
    return [
        Judgement(
            sample=sample.image, side=sample.side, prompt=sample.prompt, evidence="",
            **dict.fromkeys(AXES, grade(sample)),
        )
        for sample in samples
    ]  # fmt: skip


def make_samples(num_prompts: int, num_seeds: int) -> list[Sample]:
    """Return samples of both sides with the same prompts and seeds."""
    return [
        Sample(
            image=ObjectRef(key=f"{side}-{prompt}-{seed}", sha256="0", size_bytes=1), side=side, kind="subject",
            prompt=f"prompt {prompt}", class_prompt="", seed=seed,
        )
        for side in scores.SIDES for prompt in range(num_prompts) for seed in range(num_seeds)
    ]  # fmt: skip


def test_intervals_of_grades_are_over_prompts_and_those_of_gains_are_paired() -> None:
    samples = make_samples(8, 4)

    def by_prompt(sample: Sample) -> float:
        """Prompts differ much, seeds of one don't; the tuned model is one better on each but the first."""
        level = int(sample.prompt.split()[1])
        return level % 4 / 2 + (sample.side == "tuned") * (level > 0)

    table = scores.estimate_scores(samples, grade_all(samples, by_prompt))["image_quality"]
    assert {name: estimate.num for name, estimate in table.items()} == {"base": 8, "tuned": 8, "gain": 8}
    base, gain = table["base"], table["gain"]
    assert gain.mean == pytest.approx(7 / 8)
    assert base.low is not None and base.high is not None and gain.low is not None and gain.high is not None
    # Over 32 samples as if each were independent, it would be half as wide.
    assert base.high - base.low > 2 * 1.96 * 0.559 / 8**0.5
    assert gain.high - gain.low < base.high - base.low, "what prompts share cancels in a paired difference"
    assert gain.is_decided


def test_few_prompts_and_equal_grades_have_no_interval_and_a_side_alone_no_gain() -> None:
    few = make_samples(3, 4)
    table = scores.estimate_scores(few, grade_all(few, lambda sample: sample.seed))
    assert (table["image_quality"]["base"].low, table["image_quality"]["base"].num) == (None, 3)
    many = make_samples(8, 1)
    table = scores.estimate_scores(many, grade_all(many, lambda sample: 4.0))
    assert table["image_quality"]["gain"].low is None
    tuned = [sample for sample in many if sample.side == "tuned"]
    assert set(scores.estimate_scores(tuned, grade_all(tuned, lambda sample: 4.0))["image_quality"]) == {"tuned"}


def test_a_fair_judge_passes_its_controls(material: JudgeContext) -> None:
    reliability = examine(material, fair_judge)
    assert [control.name for control in reliability.controls] == [
        "the subject itself", "another subject", "a wrong prompt", "a blurred sample",
    ]  # fmt: skip
    assert reliability.is_reliable
    assert reliability.alpha["concept_preservation"] == pytest.approx(1)
    assert reliability.num_repeated == 6


def test_a_degraded_sample_without_a_grade_is_left_out_with_its_original(material: JudgeContext) -> None:
    questions = list_judge_requests(make_config(ScoringConfig, num_controls=2), material)
    blurred = [question for question in questions if question.kind == "blurred"]
    # The failed one's original has the low grade: unpaired, the mean of the originals would fall.
    answers = answer_all(questions, lambda q: 0 if q.kind == "sample" and q.key == blurred[0].key else fair_judge(q))
    del answers[blurred[0].name]
    found = scores.assess_judge(material.samples, Judged(questions, answers), is_comparable=True)
    [control] = [control for control in found.controls if control.name == "a blurred sample"]
    original = next(
        q for q in questions if q.kind == "sample" and q.key == blurred[1].key and q.axis == blurred[1].axis
    )
    assert control.limit == fair_judge(original)


@pytest.mark.parametrize(
    ("kind", "grade", "control"),
    [
        ("positive_control", 1, "the subject itself"),
        ("negative_control", 4, "another subject"),
        ("shuffled", 4, "a wrong prompt"),
        ("blurred", 4, "a blurred sample"),
    ],
)
def test_a_judge_that_fails_a_control_is_not_reliable(
    material: JudgeContext, kind: str, grade: int, control: str
) -> None:
    reliability = examine(material, lambda q: grade if q.kind == kind else fair_judge(q))
    assert not reliability.is_reliable
    assert [c.name for c in reliability.controls if not c.is_passed] == [control]


def test_a_judge_without_controls_or_of_another_model_is_not_reliable(material: JudgeContext) -> None:
    assert not examine(material, fair_judge, num_controls=0).is_reliable
    questions = list_judge_requests(make_config(ScoringConfig), material)
    answers = answer_all(questions, fair_judge)
    assert not scores.assess_judge(material.samples, Judged(questions, answers), is_comparable=False).is_reliable


def test_a_pairwise_win_counts_only_if_consistent_in_both_orders(material: JudgeContext) -> None:
    questions = list_judge_requests(make_config(ScoringConfig, num_pairs=4), material)
    fair = scores.count_pairs(Judged(questions, answer_all(questions, fair_judge)))
    assert fair is not None
    assert (fair.num_pairs, fair.tuned_wins, fair.base_wins, fair.inconsistent) == (4, 4, 0, 0)
    assert fair.tuned_strength == pytest.approx(4.5 / 5)
    first = scores.count_pairs(Judged(questions, answer_all(questions, lambda q: "first")))
    assert first is not None
    assert (first.tuned_wins, first.base_wins, first.ties, first.inconsistent) == (0, 0, 0, 4)
    assert first.tuned_strength == pytest.approx(0.5)


def with_candidates(material: JudgeContext, *steps: int) -> JudgeContext:
    """Add samples of other steps on four of the tuned samples' draws."""
    tuned = [sample for sample in material.samples if sample.side == "tuned"][:4]
    drawn = [
        sample.model_copy(
            update={"kind": "candidate", "step": step, "image": ObjectRef(key=f"c{step}/{n}", sha256="0", size_bytes=1)}
        )
        for step in steps
        for n, sample in enumerate(tuned)
    ]
    return replace(material, candidates=drawn, published_step=800)


def test_retained_checkpoints_are_compared_pairwise_in_both_orders_and_ranked(material: JudgeContext) -> None:
    several = with_candidates(material, 400, 600)
    questions = list_judge_requests(make_config(ScoringConfig, num_checkpoint_pairs=3), several)
    checkpoint_pairs = [question for question in questions if question.kind == "checkpoint_pair"]
    assert len(checkpoint_pairs) == 3 * 3 * 2
    assert {question.candidates for question in checkpoint_pairs} == {("400", "600"), ("400", "800"), ("600", "800")}

    def later_is_better(question: JudgeRequest) -> Any:
        return (
            ("first" if question.is_swapped else "second")
            if question.kind == "checkpoint_pair"
            else fair_judge(question)
        )

    ranks = scores.rank_checkpoints(Judged(questions, answer_all(questions, later_is_better)), published_step=800)
    assert [(rank.step, rank.wins, rank.losses, rank.is_published) for rank in ranks] == [
        (800, 6, 0, True), (600, 3, 3, False), (400, 0, 6, False),
    ]  # fmt: skip
    assert sum(rank.strength for rank in ranks) == pytest.approx(1)
    by_order = scores.rank_checkpoints(Judged(questions, answer_all(questions, lambda q: "first")), published_step=800)
    assert {(rank.wins, rank.losses, rank.undecided) for rank in by_order} == {(0, 0, 6)}


def test_without_candidates_no_checkpoints_are_compared(material: JudgeContext) -> None:
    questions = list_judge_requests(make_config(ScoringConfig), material)
    assert not any(question.kind == "checkpoint_pair" for question in questions)
    assert scores.rank_checkpoints(Judged(questions, answer_all(questions, fair_judge)), published_step=800) == ()


def test_disagreeing_grades_get_a_tie_break_by_the_next_profile_with_reasoning(
    material: JudgeContext, tmp_path: Path
) -> None:
    config = make_config(ScoringConfig, num_repeats=3, num_repeated=2)
    questions = list_judge_requests(config, material)
    torn = material.samples[0].image.key

    def judge(question: JudgeRequest) -> Any:
        if question.key == torn and question.axis == "concept_preservation" and question.kind == "sample":
            return (0, 2, 0)[question.repeat]
        return fair_judge(question)

    answers = answer_all(questions, judge)
    [disputed] = find_disputed(config, material.samples, Judged(questions, answers), second={})
    assert (disputed.key, disputed.axis, disputed.spec.is_reasoning) == (torn, "concept_preservation", True)
    reply = {
        "evidence": "e", "shape": 3, "color": 3, "texture": 3, "face": "absent", "concept_preservation": 3,
    }  # fmt: skip
    with scripted_server() as cheap, scripted_server() as strong:
        strong.script(json.dumps(reply))
        cheap_llm = make_llm(cheap, tmp_path)
        profile = cheap_llm.config.profiles["p"]
        able = profile.capabilities.model_copy(update={"reasoning": "effort"})
        other = profile.model_copy(update={"base_url": strong.url, "capabilities": able})
        cheap_llm.config = make_llm_config(models=("p", "strong"), profiles={"p": profile, "strong": other})
        answered = break_ties([disputed], llm=cheap_llm, on_progress=lambda done, total: None)
        assert not cheap.counts
        assert strong.bodies[0]["reasoning_effort"] == "medium"
    decided = read_tie_breaks([disputed], answered)
    before = scores.to_judgements(material.samples, Judged(questions, answers))[0]
    after = scores.to_judgements(material.samples, Judged(questions, answers), decided)[0]
    assert (before.concept_preservation, after.concept_preservation) == (0, 3)
    assert (before.tie_breaks, after.tie_breaks) == ((), ("concept_preservation",))
    assert break_ties([], llm=cheap_llm, on_progress=lambda done, total: None) == {}


def test_disagreement_with_the_second_judge_requires_a_tie_break(material: JudgeContext) -> None:
    config = make_config(ScoringConfig, num_repeated=0)
    questions = list_judge_requests(config, material)
    answers = answer_all(questions, fair_judge)
    key = material.samples[0].image.key  # base: graded 2
    assert find_disputed(config, material.samples, Judged(questions, answers), second={key: {"image_quality": 3}}) == []
    [disputed] = find_disputed(config, material.samples, Judged(questions, answers), second={key: {"image_quality": 0}})
    assert disputed.axis == "image_quality"
    off = config.model_copy(update={"disagreement_threshold": 0})
    assert find_disputed(off, material.samples, Judged(questions, answers), second={key: {"image_quality": 0}}) == []


def test_grades_are_rank_correlated_with_the_metrics(material: JudgeContext) -> None:
    questions = list_judge_requests(make_config(ScoringConfig), material)
    judgements = scores.to_judgements(material.samples, Judged(questions, answer_all(questions, fair_judge)))
    measured = {
        sample.image.key: SubjectMetrics(dino=0.9 if sample.side == "tuned" else 0.1, clip_i=0, clip_t=0.5)
        for sample in material.samples
    }
    found = scores.correlate(judgements, measured)
    assert found == {"concept_preservation": pytest.approx(1), "prompt_following": None}
    assert scores.correlate(judgements, {}) == {}


def test_agreement_is_computed_with_the_second_judge_and_human_labels(material: JudgeContext, tmp_path: Path) -> None:
    questions = list_judge_requests(make_config(ScoringConfig), material)
    judgements = scores.to_judgements(material.samples, Judged(questions, answer_all(questions, fair_judge)))
    seconds = list_second_judge_requests(make_config(ScoringConfig, second_judge_fraction=0.5), material)
    assert len(seconds) == 6 * 3
    grades = scores.collect_grades(Judged(seconds, answer_all(seconds, fair_judge)))
    agreement = scores.compare_raters("other", grades, judgements)
    assert agreement is not None
    assert agreement.num_samples == 6
    assert agreement.kappa["concept_preservation"] == pytest.approx(1)

    path = tmp_path / "labels.csv"
    rows = ["sample,concept_preservation,prompt_following"]
    rows += [f"{s.image.key.split('/')[-1]},{4 if s.side == 'base' else 0},2" for s in material.samples]
    path.write_text("\n".join(rows))
    person = scores.compare_raters("a person", scores.read_labels(path, material.samples), judgements)
    assert person is not None
    assert person.spearman["concept_preservation"] == pytest.approx(-1)
    assert person.kappa["prompt_following"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [("nobody.png,3,3", "'nobody.png' names 0 samples"), ("base-subject-1.png,5,", "'5' is not a grade")],
)
def test_invalid_labels_raise_an_error_naming_line_and_value(
    material: JudgeContext, tmp_path: Path, row: str, message: str
) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(f"sample,concept_preservation,prompt_following\n{row}\n")
    with pytest.raises(ConfigError, match=f"labels.csv, line 2: {message}"):
        scores.read_labels(path, material.samples)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "sample,concept_preservation,prompt_following\nbase-subject-1.png,\xfc,\n".encode("latin1"),
            "line 2: this is not UTF-8; save",
        ),
        (b"sample,prompt_folowing\n", "line 1: there is no column"),
        (b"prompt_following\n", "line 1: no column"),
        (b"sample,concept_preservation,prompt_following\nbase-subject-1.png,,,w\n", "line 2: 4 fields, not 3; quote"),
        (b"", "line 1: the file is empty; the columns are"),
    ],
)
def test_a_malformed_label_file_raises_an_error_naming_the_line(
    material: JudgeContext, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"labels.csv, {message}"):
        scores.read_labels(path, material.samples)
    path.write_bytes("\ufeffsample,prompt_following\nbase-subject-1.png,3\n".encode())
    assert list(scores.read_labels(path, material.samples).values()) == [{"prompt_following": 3}]


def test_judge_requests_omit_context_that_would_bias_their_axis() -> None:
    references = [b"r1", b"r2"]
    concept = concept_spec(references, b"s", class_noun="dog", repeat=0)
    assert concept.parts.index(b"r2") < concept.parts.index(b"s")  # what is the same comes first: providers cache it
    assert "Prompt:" not in str(concept.parts)
    prompt = prompt_spec(b"s", class_prompt="a photo of a dog", repeat=0)
    assert not {b"r1", b"r2"} & set(prompt.parts)
    assert quality_spec(b"s", repeat=0).parts.count(b"s") == 1
    assert pair_spec(references, b"x", b"y", class_noun="dog").parts.index(b"x") > 2
    for reply in (ConceptGrade, QualityGrade):
        text = str(reply.model_json_schema())
        assert text.index("evidence") < text.index("Grade" if reply is ConceptGrade else "image_quality")
