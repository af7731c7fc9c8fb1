"""The rows of the report's tables and galleries."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from tasks.intervals import estimate_samples
from tasks.manifests.evaluation import Estimate, Evaluation, PromptRow, Sample, Side, SubjectMetrics
from tasks.manifests.scoring import CheckpointRank, Judgement, Scorecard
from tasks.metrics import METRICS, Metric
from tasks.publishing.pick import collect_draws
from tasks.publishing.report.charts import is_drawable, widen

HEADLINE = ("dino", "clip_i", "clip_t")
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class MetricRow:
    """One metric of both sides."""

    key: str
    metric: Metric
    base: Estimate
    tuned: Estimate
    gain: Estimate | None
    ceiling: Estimate | None
    """Among the real photos."""
    share: float | None
    """Fraction of the gap between base and photos that is closed; None where photos are no upper bound."""

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of an axis that holds all values of the row."""
        shown = [each for each in (self.base, self.tuned, self.ceiling) if each is not None]
        values = [value for each in shown for value in (each.mean, each.low, each.high) if value is not None]
        values = [value for value in values if is_drawable(value)] or [0.0]
        return widen(min(values), max(values), margin=0.08, least=0.05)


@dataclass(frozen=True)
class CheckpointRow:
    """A retained checkpoint with the means of the draws that all checkpoints have."""

    step: int
    is_published: bool
    dino: Estimate
    clip_t: Estimate
    rank: CheckpointRank | None
    """None where the judge compared no pairs."""


@dataclass(frozen=True)
class SamplePair:
    """The samples of both sides for one prompt and seed."""

    base: Sample | None
    tuned: Sample | None
    metrics: Mapping[str, SubjectMetrics] = field(default_factory=dict)
    """By side."""
    grades: Mapping[str, Judgement] = field(default_factory=dict)

    @property
    def shown(self) -> Sample:
        """The sample that names prompt and seed."""
        sample = self.tuned or self.base
        assert sample is not None
        return sample

    @property
    def others(self) -> list[str]:
        """The metrics beside the headline ones, of the registry and of other packages, in the order of measuring."""
        names = dict.fromkeys(name for side in SIDES if side in self.metrics for name in dict(self.metrics[side]))
        return [name for name in names if name not in HEADLINE]

    @property
    def copies(self) -> list[Side]:
        """The sides whose sample is a near-duplicate of a photo."""
        return [side for side in SIDES if self.value(side, "copies")]

    def value(self, side: Side, key: str) -> float | None:
        """Return a sample's metric; None where it was not measured."""
        return getattr(self.metrics.get(side), key, None)

    def rank(self, key: str) -> float | None:
        """Return the tuned sample's value that the gallery is sorted by."""
        if key == "judge":
            grade = self.grades.get("tuned")
            return None if grade is None else grade.concept_preservation + grade.prompt_following
        return self.value("tuned", key)


def find_metric(key: str) -> Metric:
    """Return a metric of the registry, or what is known of another package's."""
    return METRICS.get(key, Metric(key.upper(), "of another package", "not known", direction="none"))


def show_figure(value: float, sign: str = "") -> str:
    """Return a value of any metric: cosines with three digits, large values without; `sign` may be `+`."""
    text = f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign},.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def list_metrics(evaluation: Evaluation) -> list[MetricRow]:
    """Return a row per metric that was measured on both sides, headline metrics first."""
    rows = []
    for key in dict.fromkeys([*HEADLINE, *METRICS, *evaluation.estimates]):
        table = evaluation.estimates.get(key, {})
        base = table.get("base") or find_mean(evaluation, "base", key)
        tuned = table.get("tuned") or find_mean(evaluation, "tuned", key)
        if base is None or tuned is None:
            continue
        ceiling = find_ceiling(evaluation, key)
        room = None if ceiling is None else ceiling.mean - base.mean
        # Real photos are no upper bound of what is not a similarity to them.
        share = (tuned.mean - base.mean) / room if key in ("dino", "clip_i") and room and room > 1e-6 else None
        rows.append(MetricRow(key, find_metric(key), base, tuned, table.get("gain"), ceiling, share))
    return rows


def find_ceiling(evaluation: Evaluation, key: str) -> Estimate | None:
    """Return a metric among the real photos; without an interval in older manifests."""
    found, mean = evaluation.estimates.get(key, {}).get("ceiling"), getattr(evaluation.ceiling, key, None)
    return found if found is not None or mean is None else Estimate(mean=mean, num=0)


def find_mean(evaluation: Evaluation, side: Side, key: str) -> Estimate | None:
    """Return a mean without an interval, from where means stand; None where it was not measured."""
    for means in (evaluation.metrics.get(side), evaluation.drift.get(side)):
        value = getattr(means, key, None)
        if value is not None:
            return Estimate(mean=value, num=0)
    return None


def list_prompts(evaluation: Evaluation) -> list[PromptRow]:
    """Return the prompts with the smallest gain in DINO first."""

    def gain(row: PromptRow) -> float:
        found = row.values.get("dino", {}).get("gain")
        return found.mean if found else 0.0

    return sorted(evaluation.prompts, key=gain)


def list_checkpoints(evaluation: Evaluation, scores: Scorecard) -> list[CheckpointRow]:
    """Return a row per measured checkpoint, in the order of steps, with its rank where the judge compared it."""
    ranks = {rank.step: rank for rank in scores.checkpoints}
    return [
        CheckpointRow(
            step,
            step == evaluation.published_step,
            estimate_draws(by_prompt, "dino"),
            estimate_draws(by_prompt, "clip_t"),
            ranks.get(step),
        )
        for step, by_prompt in collect_draws(evaluation).items()
    ]


def estimate_draws(by_prompt: Mapping[str, Mapping[int, SubjectMetrics]], name: str) -> Estimate:
    """Return the mean of a metric over prompts and seeds, with its interval."""
    return estimate_samples(
        {
            prompt: {seed: getattr(found, name) for seed, found in by_seed.items()}
            for prompt, by_seed in by_prompt.items()
        }
    )


def list_samples(evaluation: Evaluation, grades: Mapping[str, Judgement]) -> list[SamplePair]:
    """Return the samples of the subject in pairs of one prompt and seed, in the prompts' configured order."""
    found: dict[tuple[str, int], dict[str, Sample]] = {}
    for sample in evaluation.samples:
        if sample.kind == "subject":
            found.setdefault((sample.prompt, sample.seed), {})[sample.side] = sample
    measured = evaluation.sample_metrics
    return [
        SamplePair(
            sides.get("base"),
            sides.get("tuned"),
            {side: measured[s.image.key] for side, s in sides.items() if s.image.key in measured},
            {side: grades[s.image.key] for side, s in sides.items() if s.image.key in grades},
        )
        for sides in found.values()
    ]
