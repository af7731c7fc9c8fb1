"""Which retained checkpoint is published: as training chose, the latest, or the knee of fidelity and editability."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tasks.manifests.evaluation import Evaluation, SubjectMetrics
from tasks.manifests.training import TunedModel
from tasks.publishing.config import MIN_KNEE, PublishingConfig

MIN_HEIGHT = 0.05
"""Of a knee above the chord, in ranges of both axes; less is noise."""


@dataclass(frozen=True)
class Pick:
    """The model to publish, and why these weights."""

    model: TunedModel
    reason: str


@dataclass(frozen=True)
class CheckpointMeans:
    """Mean DINO and CLIP-T of a checkpoint over the draws that all checkpoints have."""

    step: int
    dino: float
    clip_t: float


def pick_checkpoint(config: PublishingConfig, tuned: TunedModel, evaluation: Evaluation) -> Pick:
    """Return the tuned model with the weights that `publishing.pick` says, and the reason."""
    candidates = tuned.find_candidates()
    steps = sorted({tuned.published_step, *candidates})
    listed = f"the retained steps {join(steps)}"
    if config.pick == "best" or not candidates:
        chosen = "the best validated step" if candidates or tuned.published_step < tuned.num_steps else "the last step"
        return Pick(tuned, chosen if config.pick == "best" else f"{chosen}; no other checkpoint is retained")
    if config.pick == "last":
        return Pick(take(tuned, steps[-1]), f"the latest of {listed}")
    knee = find_knee(measure_checkpoints(evaluation))
    if knee is None:
        return Pick(tuned, f"the best validated step; DINO and CLIP-T have no knee over {listed}")
    return Pick(take(tuned, knee), f"the knee of DINO and CLIP-T over {listed}")


def take(tuned: TunedModel, step: int) -> TunedModel:
    """Return the model with the weights of a step; the model itself where they are published already."""
    return tuned if step == tuned.published_step else tuned.pick(step)


def join(steps: Iterable[int]) -> str:
    """Return steps as text."""
    return ", ".join(map(str, steps))


def measure_checkpoints(evaluation: Evaluation) -> list[CheckpointMeans]:
    """Return the means of the retained checkpoints, in the order of steps; empty where only one is retained."""
    means = []
    for step, by_prompt in collect_draws(evaluation).items():
        values = [(found.dino, found.clip_t) for by_seed in by_prompt.values() for found in by_seed.values()]
        means.append(CheckpointMeans(step, *(sum(column) / len(values) for column in zip(*values, strict=True))))
    return means


def collect_draws(evaluation: Evaluation) -> dict[int, dict[str, dict[int, SubjectMetrics]]]:
    """Return the metrics of retained checkpoints by step, prompt and seed; empty where only one is retained.

    Published weights have more samples than the others; only the draws that all have are compared.
    """
    drawn = [s for s in evaluation.samples if s.kind == "candidate"]
    if not drawn:
        return {}
    drawn += [s for s in evaluation.samples if s.kind == "subject" and s.side == "tuned"]
    by_weights: dict[int | None, set[tuple[str, int]]] = {}
    for sample in drawn:
        by_weights.setdefault(sample.step, set()).add((sample.prompt, sample.seed))
    shared = set.intersection(*by_weights.values())  # the safety checker may have dropped some of one checkpoint
    by_step: dict[int, dict[str, dict[int, SubjectMetrics]]] = {}
    for sample in drawn:
        found = evaluation.sample_metrics.get(sample.image.key)
        if found is not None and (sample.prompt, sample.seed) in shared:
            step = evaluation.published_step if sample.step is None else sample.step
            by_step.setdefault(step, {}).setdefault(sample.prompt, {})[sample.seed] = found
    return dict(sorted(by_step.items()))


def find_knee(rows: Sequence[CheckpointMeans]) -> int | None:
    """Return the step after which fidelity costs more editability than before; None with fewer than three steps.

    The point farthest above the chord from the first to the last checkpoint, both axes scaled to their range
    (Satopaa et al. 2011, "Finding a Kneedle in a Haystack").
    """
    if len(rows) < MIN_KNEE:
        return None
    x, y = [row.dino for row in rows], [row.clip_t for row in rows]
    wide, tall = x[-1] - x[0], y[-1] - y[0]
    if wide <= 0 or tall >= 0:  # no trade-off: more training is not better in one and worse in the other
        return None
    heights = [(b - y[0]) / -tall + (a - x[0]) / wide for a, b in zip(x, y, strict=True)]
    # Both ends lie on the chord: only a point above it is a knee, and a straight line has none.
    best = max(range(1, len(rows) - 1), key=heights.__getitem__)
    return rows[best].step if heights[best] > MIN_HEIGHT else None
