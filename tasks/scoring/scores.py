"""From answers to scores, and to what is known of the judge that gave them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from tasks.csv_files import read_rows
from tasks.errors import ConfigError
from tasks.manifests.evaluation import Sample, Side, SubjectMetrics
from tasks.manifests.scoring import (
    Agreement,
    CheckpointRank,
    ControlResult,
    Judgement,
    JudgeReliability,
    PairResult,
    SideScores,
)
from tasks.scoring.judge_requests import AXES, JudgeRequest, Kind
from tasks.scoring.statistics import (
    bootstrap_mean,
    compute_alpha,
    compute_kappa,
    compute_spearman,
    compute_strengths,
)
from tasks.services.llm.executor import Answers

SIDES: tuple[Side, ...] = ("base", "tuned")
SELF_LIMIT, OTHER_LIMIT = 3.0, 1.0
MEANINGFUL = 0.05


def to_judgements(
    samples: Sequence[Sample],
    questions: Sequence[JudgeRequest],
    answers: Answers,
    settled: Mapping[tuple[str, str], int] = MappingProxyType({}),
) -> tuple[Judgement, ...]:
    """Join grades with their samples; a sample without a grade on some axis is left out.

    Args:
        settled: grades that decide where others differ much, by sample key and axis.

    """
    judgements = []
    for sample in samples:
        grades = {axis: grades_of(sample, axis, questions, answers) for axis in AXES}
        if not all(grades.values()):
            continue
        first = next(q for q in questions if q.kind == "sample" and q.key == sample.image.key and q.name in answers)
        judgements.append(
            Judgement(
                sample=sample.image,
                side=sample.side,
                prompt=sample.prompt,
                evidence=answers[first.name].reply.evidence[:500],
                **{axis: float(settled.get((sample.image.key, axis), median(grades[axis]))) for axis in AXES},
                settled=tuple(axis for axis in AXES if (sample.image.key, axis) in settled),
                num_repeats=max(map(len, grades.values())),
                spread=max(max(values) - min(values) for values in grades.values()),
            )
        )
    return tuple(judgements)


def grades_of(sample: Sample, axis: str, questions: Sequence[JudgeRequest], answers: Answers) -> list[int]:
    """Return a sample's grades on an axis, one per repeat."""
    asked = [q for q in questions if q.kind == "sample" and q.axis == axis and q.key == sample.image.key]
    return [int(getattr(answers[q.name].reply, axis)) for q in asked if q.name in answers]


def average(judgements: Sequence[Judgement]) -> dict[Side, SideScores]:
    """Return mean grades per side."""
    scores: dict[Side, SideScores] = {}
    for side in SIDES:
        rows = [judgement for judgement in judgements if judgement.side == side]
        if rows:
            scores[side] = SideScores(**{axis: sum(getattr(row, axis) for row in rows) / len(rows) for axis in AXES})
    return scores


def find_intervals(judgements: Sequence[Judgement]) -> dict[Side, dict[str, tuple[float, float]]]:
    """Return bootstrap intervals of the mean grades."""
    found: dict[Side, dict[str, tuple[float, float]]] = {}
    for side in SIDES:
        rows = [judgement for judgement in judgements if judgement.side == side]
        if rows:
            found[side] = {axis: bootstrap_mean([getattr(row, axis) for row in rows]) for axis in AXES}
    return found


def examine_judge(
    samples: Sequence[Sample],
    questions: Sequence[JudgeRequest],
    answers: Answers,
    *,
    is_comparable: bool,
    others: tuple[Agreement, ...] = (),
    measured: Mapping[str, SubjectMetrics] = MappingProxyType({}),
) -> JudgeReliability:
    """Return what controls and repeats say of the judge."""
    controls = check_controls(questions, answers)
    repeated = [s for s in samples if len(grades_of(s, AXES[0], questions, answers)) > 1]
    return JudgeReliability(
        controls=controls,
        alpha={axis: compute_alpha([grades_of(s, axis, questions, answers) for s in repeated]) for axis in AXES},
        num_repeated=len(repeated),
        is_comparable=is_comparable,
        is_reliable=bool(controls) and all(control.is_passed for control in controls) and is_comparable,
        others=others,
        spearman=correlate(to_judgements(samples, questions, answers), measured),
    )


def correlate(judgements: Sequence[Judgement], measured: Mapping[str, SubjectMetrics]) -> dict[str, float | None]:
    """Return how grades rank with what was measured of the same samples; empty where nothing was."""
    rows = [(judgement, measured[judgement.sample.key]) for judgement in judgements if judgement.sample.key in measured]
    if not rows:
        return {}
    return {
        "concept_preservation": compute_spearman([j.concept_preservation for j, _ in rows], [m.dino for _, m in rows]),
        "prompt_following": compute_spearman([j.prompt_following for j, _ in rows], [m.clip_t for _, m in rows]),
    }


def check_controls(questions: Sequence[JudgeRequest], answers: Answers) -> tuple[ControlResult, ...]:
    """Compare the grades of controls with what they must be."""
    concept, prompt, quality = AXES
    results = []

    def grades(kind: Kind, axis: str, keys: set[str] | None = None) -> list[int]:
        asked = [q for q in questions if q.kind == kind and q.axis == axis and q.repeat == 0]
        wanted = [q for q in asked if q.name in answers and (keys is None or q.key in keys)]
        return [int(getattr(answers[q.name].reply, axis)) for q in wanted]

    def add(name: str, text: str, value: float, limit: float, *, is_passed: bool) -> None:
        results.append(ControlResult(name=name, text=text, value=value, limit=limit, is_passed=is_passed))

    own = grades("self", concept)
    if own:
        value = float(median(own))
        add(
            "the subject itself",
            "a photo against the others: at least",
            value,
            SELF_LIMIT,
            is_passed=value >= SELF_LIMIT,
        )
    other = grades("other", concept)
    if other:
        value = float(median(other))
        add("another subject", "another one of its class: at most", value, OTHER_LIMIT, is_passed=value <= OTHER_LIMIT)
    for kind, axis, name, text in (
        ("shuffled", prompt, "a wrong prompt", "samples with a prompt of others: below their own"),
        ("blurred", quality, "a blurred sample", "samples blurred on purpose: below themselves"),
    ):
        spoiled = grades(kind, axis)  # type: ignore[arg-type]
        keys = {q.key for q in questions if q.kind == kind}
        plain = grades("sample", axis, keys)
        if spoiled and plain:
            value, limit = sum(spoiled) / len(spoiled), sum(plain) / len(plain)
            add(name, text, value, limit, is_passed=value < limit - MEANINGFUL)
    return tuple(results)


def judge_pairs(
    questions: Sequence[JudgeRequest], answers: Answers, kind: Kind
) -> list[tuple[tuple[str, str], tuple[str, ...]]]:
    """Return candidates and the winner in each order, of every pair that was answered both ways."""
    by_key: dict[str, tuple[tuple[str, str], list[str]]] = {}
    for question in questions:
        if question.kind == kind and question.name in answers:
            one, other = question.candidates
            first, second = (other, one) if question.is_swapped else (one, other)
            winner = {"first": first, "second": second, "equal": "equal"}[answers[question.name].reply.better]
            by_key.setdefault(question.key, (question.candidates, []))[1].append(winner)
    return [(candidates, tuple(winners)) for candidates, winners in by_key.values() if len(winners) == 2]


def rank_players(pairs: Sequence[tuple[tuple[str, str], tuple[str, ...]]]) -> dict[str, float]:
    """Return Bradley-Terry strengths; only a win in both orders counts as one, all else is half a win each."""
    wins: dict[tuple[str, str], float] = {}
    for (one, other), winners in pairs:
        for winner, loser in ((one, other), (other, one)):
            won = 1.0 if winners == (winner, winner) else 0.0 if winners == (loser, loser) else 0.5
            wins[winner, loser] = wins.get((winner, loser), 0.0) + won
    candidates = list(dict.fromkeys(candidate for pair in wins for candidate in pair))
    return compute_strengths(candidates, wins) if candidates else {}


def count_pairs(questions: Sequence[JudgeRequest], answers: Answers) -> PairResult | None:
    """Return who won which pair; an answer that changes with the order is no win."""
    pairs = judge_pairs(questions, answers, "pair")
    if not pairs:
        return None
    wins = {side: sum(winners == (side, side) for _, winners in pairs) for side in SIDES}
    inconsistent = sum(set(winners) == set(SIDES) for _, winners in pairs)
    return PairResult(
        num_pairs=len(pairs),
        tuned_wins=wins["tuned"],
        base_wins=wins["base"],
        ties=len(pairs) - sum(wins.values()) - inconsistent,
        inconsistent=inconsistent,
        tuned_strength=rank_players(pairs)["tuned"],
    )


def rank_checkpoints(
    questions: Sequence[JudgeRequest], answers: Answers, *, published_step: int
) -> tuple[CheckpointRank, ...]:
    """Return how the kept weights did against each other, the strongest first."""
    pairs = judge_pairs(questions, answers, "checkpoint_pair")
    ranks = []
    for step, strength in rank_players(pairs).items():
        met = [winners for candidates, winners in pairs if step in candidates]
        wins = sum(winners == (step, step) for winners in met)
        losses = sum(winners[0] == winners[1] not in (step, "equal") for winners in met)
        ranks.append(
            CheckpointRank(
                step=int(step),
                is_published=int(step) == published_step,
                strength=strength,
                wins=wins,
                losses=losses,
                undecided=len(met) - wins - losses,
            )
        )
    return tuple(sorted(ranks, key=lambda rank: -rank.strength))


def compare_raters(rater: str, grades: dict[str, dict[str, int]], judgements: Sequence[Judgement]) -> Agreement | None:
    """Return how another rater's grades, by sample and axis, agree with the judge's."""
    shared = [judgement for judgement in judgements if judgement.sample.key in grades]
    if not shared:
        return None
    kappa, spearman = {}, {}
    for axis in AXES:
        rows = [row for row in shared if axis in grades[row.sample.key]]
        theirs = [grades[row.sample.key][axis] for row in rows]
        ours = [round(getattr(row, axis)) for row in rows]
        kappa[axis], spearman[axis] = compute_kappa(ours, theirs), compute_spearman(ours, theirs)
    return Agreement(rater=rater, num_samples=len(shared), kappa=kappa, spearman=spearman)


def read_labels(path: Path, samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """Return a person's grades by sample key; the CSV names samples by the end of their keys.

    Raises:
        ConfigError: the file can't be read, or names a sample or grade that isn't there.

    """
    grades: dict[str, dict[str, int]] = {}
    for number, row in read_rows(path, ("sample", *AXES), setting="scoring.labels"):
        name = row["sample"].strip()
        keys = [sample.image.key for sample in samples if name and sample.image.key.endswith(name)]
        if len(keys) != 1:
            raise ConfigError(f"{path}, line {number}: {name!r} names {len(keys)} samples, not one")
        grades[keys[0]] = {axis: read_grade(row[axis], path, number) for axis in AXES if row[axis].strip()}
    return grades


def read_grade(text: str, path: Path, number: int) -> int:
    """Return a grade of 0 to 4. Raises ConfigError."""
    if text.strip() not in ("0", "1", "2", "3", "4"):
        raise ConfigError(f"{path}, line {number}: {text!r} is no grade; write 0 to 4")
    return int(text)


def collect_grades(questions: Sequence[JudgeRequest], answers: Answers) -> dict[str, dict[str, Any]]:
    """Return another judge's grades by sample and axis."""
    grades: dict[str, dict[str, Any]] = {}
    for question in questions:
        if question.name in answers:
            value = int(getattr(answers[question.name].reply, question.axis))
            grades.setdefault(question.key, {})[question.axis] = value
    return grades
