"""Scores from the judge's answers, and statistics of the judge's reliability."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType

from tasks.csv_files import read_rows
from tasks.errors import ConfigError
from tasks.intervals import estimate_samples, subtract
from tasks.manifests.evaluation import Sample, Side, SubjectMetrics, Table
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
    compute_alpha,
    compute_kappa,
    compute_spearman,
    compute_strengths,
)
from tasks.services.llm.executor import Answers

SIDES: tuple[Side, ...] = ("base", "tuned")
POSITIVE_LIMIT, NEGATIVE_LIMIT = 3.0, 1.0  # median grades, of 0 to 4
MIN_GRADE_DROP = 0.05  # of mean grades; a smaller drop counts as none


@dataclass(frozen=True)
class Judged:
    """Requests of one judge and its answers by request name; unanswered requests have none."""

    requests: Sequence[JudgeRequest]
    answers: Answers

    def answered(self, *kinds: Kind) -> list[JudgeRequest]:
        """Return the answered requests of the given kinds, in request order."""
        return [request for request in self.requests if request.kind in kinds and request.name in self.answers]

    def grades_of(self, sample: Sample, axis: str) -> list[int]:
        """Return a sample's grades (0 to 4) on an axis, one per answered repeat."""
        return [
            self.grade(request)
            for request in self.answered("sample")
            if request.axis == axis and request.key == sample.image.key
        ]

    def grade(self, request: JudgeRequest) -> int:
        """Return the grade (0 to 4) of an answered request on its axis."""
        return int(getattr(self.answers[request.name].reply, request.axis))


def to_judgements(
    samples: Sequence[Sample],
    judged: Judged,
    tie_breaks: Mapping[tuple[str, str], int] = MappingProxyType({}),
) -> tuple[Judgement, ...]:
    """Aggregate grades by sample: tie-break grade where there is one, else the median over repeats.

    A sample without a grade on some axis is left out.

    Args:
        samples: the judged samples.
        judged: the judge's requests and answers.
        tie_breaks: tie-break grades by (sample key, axis).

    """
    judgements = []
    for sample in samples:
        grades = {axis: judged.grades_of(sample, axis) for axis in AXES}
        if not all(grades.values()):
            continue
        # The first request of a sample is on concept preservation, see `axis_requests`: the report shows its evidence.
        first = next(request for request in judged.answered("sample") if request.key == sample.image.key)
        judgements.append(
            Judgement(
                sample=sample.image,
                side=sample.side,
                prompt=sample.prompt,
                evidence=str(getattr(judged.answers[first.name].reply, "evidence", ""))[:500],
                **{axis: float(tie_breaks.get((sample.image.key, axis), median(grades[axis]))) for axis in AXES},
                tie_breaks=tuple(axis for axis in AXES if (sample.image.key, axis) in tie_breaks),
                num_repeats=max(map(len, grades.values())),
                spread=max(max(values) - min(values) for values in grades.values()),
            )
        )
    return tuple(judgements)


def mean_scores(judgements: Sequence[Judgement]) -> dict[Side, SideScores]:
    """Return the mean grade per side and axis; sides without judgements are left out."""
    scores: dict[Side, SideScores] = {}
    for side in SIDES:
        rows = [judgement for judgement in judgements if judgement.side == side]
        if rows:
            scores[side] = SideScores(**{axis: sum(getattr(row, axis) for row in rows) / len(rows) for axis in AXES})
    return scores


def estimate_scores(samples: Sequence[Sample], judgements: Sequence[Judgement]) -> Table:
    """Return mean grades by axis with 95 % intervals: of base and tuned, and of their difference where both have it."""
    by_key = {sample.image.key: sample for sample in samples}
    table: Table = {}
    for axis in AXES:
        values: dict[str, dict[str, dict[int, float]]] = {side: {} for side in SIDES}
        for row in judgements:
            sample = by_key[row.sample.key]
            values[row.side].setdefault(sample.prompt, {})[sample.seed] = getattr(row, axis)
        pairs = {**values, "gain": subtract(values["tuned"], values["base"])}
        table[axis] = {name: estimate_samples(own) for name, own in pairs.items() if own}
    return table


def assess_judge(
    samples: Sequence[Sample],
    judged: Judged,
    *,
    is_comparable: bool,
    others: tuple[Agreement, ...] = (),
    measured: Mapping[str, SubjectMetrics] = MappingProxyType({}),
) -> JudgeReliability:
    """Return the judge's reliability: controls, agreement of repeats, other raters, correlation with metrics.

    Reliable means that there are controls, all pass, and the answers are comparable.
    """
    controls = check_controls(judged)
    # Repeats cover all axes, so the first tells which samples have them.
    repeated = [s for s in samples if len(judged.grades_of(s, AXES[0])) > 1]
    return JudgeReliability(
        controls=controls,
        alpha={axis: compute_alpha([judged.grades_of(s, axis) for s in repeated]) for axis in AXES},
        num_repeated=len(repeated),
        is_comparable=is_comparable,
        is_reliable=bool(controls) and all(control.is_passed for control in controls) and is_comparable,
        others=others,
        spearman=correlate(to_judgements(samples, judged), measured),
    )


def correlate(judgements: Sequence[Judgement], measured: Mapping[str, SubjectMetrics]) -> dict[str, float | None]:
    """Return Spearman correlations of grades with DINO and CLIP-T of the same samples; empty without metrics."""
    rows = [(judgement, measured[judgement.sample.key]) for judgement in judgements if judgement.sample.key in measured]
    if not rows:
        return {}
    return {
        "concept_preservation": compute_spearman([j.concept_preservation for j, _ in rows], [m.dino for _, m in rows]),
        "prompt_following": compute_spearman([j.prompt_following for j, _ in rows], [m.clip_t for _, m in rows]),
    }


def check_controls(judged: Judged) -> tuple[ControlResult, ...]:
    """Compare the grades of controls with their known outcomes; kinds without an answer are left out."""
    concept, prompt, quality = AXES
    results = []

    def grades(kind: Kind, axis: str, keys: set[str] | None = None) -> list[int]:
        # Controls are graded once, so samples are compared by their first grade.
        found = [request for request in judged.answered(kind) if request.axis == axis and request.repeat == 0]
        return [judged.grade(request) for request in found if keys is None or request.key in keys]

    def add(name: str, text: str, *, value: float, limit: float, is_passed: bool) -> None:
        results.append(ControlResult(name=name, text=text, value=value, limit=limit, is_passed=is_passed))

    own = grades("positive_control", concept)
    if own:
        value = float(median(own))
        add(
            "the subject itself",
            "a photo against the others: at least",
            value=value,
            limit=POSITIVE_LIMIT,
            is_passed=value >= POSITIVE_LIMIT,
        )
    other = grades("negative_control", concept)
    if other:
        value = float(median(other))
        add(
            "another subject",
            "another one of its class: at most",
            value=value,
            limit=NEGATIVE_LIMIT,
            is_passed=value <= NEGATIVE_LIMIT,
        )
    degraded_kinds: tuple[tuple[Kind, str, str, str], ...] = (
        ("shuffled", prompt, "a wrong prompt", "samples with a prompt of others: below their own"),
        ("blurred", quality, "a blurred sample", "samples blurred on purpose: below themselves"),
    )
    for kind, axis, name, text in degraded_kinds:
        degraded = grades(kind, axis)
        # Paired: degraded samples are compared with their own originals, not with all samples.
        keys = {request.key for request in judged.answered(kind)}
        plain = grades("sample", axis, keys)
        if degraded and plain:
            value, limit = sum(degraded) / len(degraded), sum(plain) / len(plain)
            add(name, text, value=value, limit=limit, is_passed=value < limit - MIN_GRADE_DROP)
    return tuple(results)


@dataclass(frozen=True)
class ComparedPair:
    """Two candidates and the winner, or `equal`, in each of the two presentation orders."""

    candidates: tuple[str, str]
    winners: tuple[str, ...]
    key: str = ""
    """The key of its requests."""


def read_pairs(judged: Judged, kind: Kind) -> list[ComparedPair]:
    """Return the pairs that were answered in both orders; others can't be checked for position bias."""
    winners: dict[str, list[str]] = {}
    candidates: dict[str, tuple[str, str]] = {}
    for request in judged.answered(kind):
        one, other = request.candidates
        # From positions back to candidates.
        first, second = (other, one) if request.is_swapped else (one, other)
        better = judged.answers[request.name].reply.better
        winners.setdefault(request.key, []).append({"first": first, "second": second, "equal": "equal"}[better])
        candidates[request.key] = request.candidates
    return [ComparedPair(candidates[key], tuple(found), key) for key, found in winners.items() if len(found) == 2]


def rank_candidates(pairs: Sequence[ComparedPair]) -> dict[str, float]:
    """Return Bradley-Terry strengths that sum to 1; a pair without a winner in both orders is half a win each."""
    wins: dict[tuple[str, str], float] = {}
    for pair in pairs:
        for winner, loser in (pair.candidates, pair.candidates[::-1]):
            won = 1.0 if pair.winners == (winner, winner) else 0.0 if pair.winners == (loser, loser) else 0.5
            wins[winner, loser] = wins.get((winner, loser), 0.0) + won
    candidates = list(dict.fromkeys(candidate for match in wins for candidate in match))
    return compute_strengths(candidates, wins) if candidates else {}


def count_pairs(judged: Judged) -> PairResult | None:
    """Return wins of base and tuned; a preference that flips with the order is inconsistent, not a win."""
    pairs = read_pairs(judged, "pair")
    if not pairs:
        return None
    wins = {side: sum(pair.winners == (side, side) for pair in pairs) for side in SIDES}
    # Each side won once: the answer followed the position. A win beside an `equal` counts as a tie.
    inconsistent = sum(set(pair.winners) == set(SIDES) for pair in pairs)
    return PairResult(
        num_pairs=len(pairs),
        tuned_wins=wins["tuned"],
        base_wins=wins["base"],
        ties=len(pairs) - sum(wins.values()) - inconsistent,
        inconsistent=inconsistent,
        tuned_strength=rank_candidates(pairs)["tuned"],
    )


def rank_checkpoints(judged: Judged, *, published_step: int) -> tuple[CheckpointRank, ...]:
    """Rank the retained checkpoints by pairwise comparison, strongest first."""
    pairs = read_pairs(judged, "checkpoint_pair")
    ranks = []
    for step, strength in rank_candidates(pairs).items():
        met = [pair.winners for pair in pairs if step in pair.candidates]
        wins = sum(winners == (step, step) for winners in met)
        # A loss is a win of the opponent in both orders.
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


def compare_raters(
    rater: str, grades: Mapping[str, Mapping[str, int]], judgements: Sequence[Judgement]
) -> Agreement | None:
    """Return another rater's agreement with the judge; None without common samples.

    `grades` are by sample key and axis.
    """
    shared = [judgement for judgement in judgements if judgement.sample.key in grades]
    if not shared:
        return None
    kappa, spearman = {}, {}
    for axis in AXES:
        rows = [row for row in shared if axis in grades[row.sample.key]]
        theirs = [grades[row.sample.key][axis] for row in rows]
        # Kappa needs levels; a median over repeats may be half a grade.
        ours = [round(getattr(row, axis)) for row in rows]
        kappa[axis], spearman[axis] = compute_kappa(ours, theirs), compute_spearman(ours, theirs)
    return Agreement(rater=rater, num_samples=len(shared), kappa=kappa, spearman=spearman)


def read_labels(path: Path, samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """Return human grades by sample key and axis; the CSV names samples by an unambiguous suffix of their keys.

    Raises:
        ConfigError: the file can't be read, a name matches no or several samples, or a grade is invalid.

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
        raise ConfigError(f"{path}, line {number}: {text!r} is not a grade; write 0 to 4")
    return int(text)


def collect_grades(judged: Judged) -> dict[str, dict[str, int]]:
    """Return a judge's grades by sample key and axis."""
    grades: dict[str, dict[str, int]] = {}
    for request in judged.requests:
        if request.name in judged.answers:
            grades.setdefault(request.key, {})[request.axis] = judged.grade(request)
    return grades
