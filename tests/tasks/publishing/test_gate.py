"""The gate: each limit alone keeps a model from becoming the champion."""

from typing import Any

import pytest

from tasks.manifests.evaluation import DriftMetrics, Estimate
from tasks.manifests.run import RunManifests
from tasks.publishing.gate import find_blockers
from tasks.services.store.local import LocalStore
from tests.support.report import GATE, make_run


def gain(mean: float, spread: float | None = 0.01) -> dict[str, Estimate]:
    low, high = (None, None) if spread is None else (mean - spread, mean + spread)
    estimate = Estimate(mean=mean, low=low, high=high, num=12)
    return {"gain": estimate, "tuned": estimate}


def no_interval(mean: float, *, num: int) -> dict[str, Estimate]:
    return {"gain": Estimate(mean=mean, num=num)}


def change(run: RunManifests, **changes: Any) -> RunManifests:
    estimates = {"dino": gain(0.1), "clip_t": gain(0.0), "copies": gain(0.0)} | changes.pop("estimates", {})
    drift = {side: DriftMetrics(pres=0.1, dino_div=0.5) for side in ("base", "tuned")} | changes.pop("drift", {})
    evaluation = run.evaluation.model_copy(update={"estimates": estimates, "drift": drift})
    reliability = run.scoring.reliability.model_copy(update={"is_reliable": changes.pop("is_reliable", True)})
    subject = run.subject.model_copy(update=changes)
    scoring = run.scoring.model_copy(update={"reliability": reliability})
    return RunManifests(subject, run.prior, run.training, evaluation, scoring)


def test_a_good_model_passes(store: LocalStore) -> None:
    assert find_blockers(change(make_run(store)), GATE) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"estimates": {"dino": gain(0.005)}}, "lower bound of the DINO gain is -0.005, required > +0.000"),
        ({"estimates": {"dino": no_interval(0.1, num=2)}}, "DINO gain: no interval, too few prompts were sampled"),
        ({"estimates": {"dino": gain(0.1, None)}}, "DINO gain: no interval, values do not vary between prompts"),
        ({"estimates": {"dino": {}}}, "DINO gain: not measured"),
        ({"estimates": {"dino": gain(float("nan"))}}, "lower bound of the DINO gain is +nan"),
        ({"estimates": {"clip_t": {}}}, "CLIP-T change: not measured"),
        ({"estimates": {"copies": {}}}, "near-duplicates of photos: not measured"),
        ({"estimates": {"clip_t": gain(-0.2)}}, "CLIP-T changed by -0.200"),
        ({"estimates": {"copies": gain(0.5)}}, "50% of samples are near-duplicates of a photo"),
        ({"drift": {"tuned": DriftMetrics(pres=0.5, dino_div=0.5)}}, "PRES rose by 0.400"),
        ({"is_reliable": False}, "the judge is not reliable"),
        ({"unknown_world": "no boats here"}, "out of domain: no boats here"),
    ],
)
def test_each_limit_alone_blocks(store: LocalStore, changes: dict[str, Any], told: str) -> None:
    [blocker] = find_blockers(change(make_run(store), **changes), GATE)
    assert told in blocker


@pytest.mark.parametrize(
    ("limit", "changes"),
    [
        ({"min_dino_gain": -0.1}, {"estimates": {"dino": gain(0.005)}}),
        ({"max_clip_t_loss": 0.9}, {"estimates": {"clip_t": gain(-0.2)}}),
        ({"max_pres_gain": 0.9}, {"drift": {"tuned": DriftMetrics(pres=0.5, dino_div=0.5)}}),
        ({"max_copies": 0.9}, {"estimates": {"copies": gain(0.5)}}),
        ({"needs_reliable_judge": False}, {"is_reliable": False}),
    ],
)
def test_each_limit_is_that_of_the_configuration(
    store: LocalStore, limit: dict[str, Any], changes: dict[str, Any]
) -> None:
    run = change(make_run(store), **changes)
    assert len(find_blockers(run, GATE)) == 1
    assert find_blockers(run, GATE.model_copy(update=limit)) == []
