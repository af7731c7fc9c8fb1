"""The verdict says what the figures allow, and the next step."""

from typing import Any

import pytest

from tasks.manifests.evaluation import Estimate
from tasks.manifests.run import RunManifests
from tasks.manifests.scoring import CheckpointRank
from tasks.publishing.report.tables import CheckpointRow, find_knee
from tasks.publishing.report.verdict import reach_verdict
from tasks.services.store.local import LocalStore
from tests.support.report import GATE, make_run


def estimate(mean: float, spread: float | None = 0.01) -> Estimate:
    if spread is None:
        return Estimate(mean=mean, num=2)
    return Estimate(mean=mean, low=mean - spread, high=mean + spread, num=12)


def with_gains(run: RunManifests, **gains: Estimate) -> RunManifests:
    estimates = {name: {"gain": gain, "tuned": gain} for name, gain in gains.items()}
    evaluation = run.evaluation.model_copy(update={"estimates": estimates})
    return RunManifests(run.subject, run.prior, run.training, evaluation, run.scoring)


@pytest.mark.parametrize(
    ("gains", "headline", "told"),
    [
        ({"dino": estimate(0.1)}, "Better than the base model, with reservations", "resemble the subject more"),
        ({"dino": estimate(0.005)}, "Not shown to be better", "A gain in subject fidelity is not shown"),
        ({"dino": estimate(-0.1)}, "Not shown to be better", "resemble the subject less"),
        ({"dino": estimate(0.1, None)}, "Too few prompts for a verdict", "Sample more"),
        ({}, "Too few prompts for a verdict", "No sample was graded"),
        ({"dino": estimate(0.1), "clip_t": estimate(-0.1)}, "Better than the base model, with", "over-training"),
        ({"dino": estimate(0.1), "clip_t": estimate(0.0)}, "Better than the base model, with", "followed as before"),
        ({"dino": estimate(0.1), "copies": estimate(0.5)}, "with reservations", "50% of samples are nearer to a photo"),
    ],
)  # fmt: skip
def test_the_headline_follows_from_the_interval_of_the_gain(
    store: LocalStore, gains: dict[str, Any], headline: str, told: str
) -> None:
    verdict = reach_verdict(with_gains(make_run(store), **gains), GATE)
    assert headline in verdict.headline
    assert any(told in f"{finding.text} {finding.advice}" for finding in verdict.findings)


def test_a_drawn_world_without_the_subjects_kind_must_not_be_used(store: LocalStore) -> None:
    run = make_run(store)
    subject = run.subject.model_copy(update={"unknown_world": "no boats here"})
    odd = with_gains(RunManifests(subject, run.prior, run.training, run.evaluation, run.scoring), dino=estimate(0.1))
    verdict = reach_verdict(odd, GATE)
    assert verdict.level == "bad"
    assert "should not be used" in verdict.headline
    assert "no boats here" in verdict.findings[0].text


def rows(*points: tuple[float, float]) -> list[CheckpointRow]:
    return [
        CheckpointRow(
            CheckpointRank(step=100 * n, is_published=False, strength=0.3, wins=0, losses=0, undecided=0), *point
        )
        for n, point in enumerate(points, 1)
    ]


def test_the_knee_is_where_fidelity_begins_to_cost_more_editability() -> None:
    assert find_knee(rows((0.2, 0.70), (0.5, 0.68), (0.55, 0.5), (0.58, 0.4))) == 200
    assert find_knee(rows((0.2, 0.7), (0.5, 0.6))) is None
    assert find_knee(rows((0.2, 0.6), (0.5, 0.65), (0.6, 0.7))) is None  # better in both: no trade-off
