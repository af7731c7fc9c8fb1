"""The verdict says what the figures allow, and the next step."""

from dataclasses import replace
from typing import Any

import pytest

from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Estimate, Evaluation, Sample, SubjectMetrics
from tasks.manifests.run import RunManifests
from tasks.manifests.run_summary import EvaluatedModel
from tasks.manifests.scoring import ControlResult, SideScores
from tasks.publishing.config import GateConfig
from tasks.publishing.gate import find_blockers
from tasks.publishing.pick import CheckpointMeans, find_knee, measure_checkpoints
from tasks.publishing.report.verdict import Finding, reach_verdict
from tasks.services.store.local import LocalStore
from tests.support.report import GATE, make_run, with_checkpoints, with_grades


def estimate(mean: float, spread: float | None = 0.01) -> Estimate:
    if spread is None:
        return Estimate(mean=mean, num=2)
    return Estimate(mean=mean, low=mean - spread, high=mean + spread, num=12)


def with_gains(run: RunManifests, **gains: Estimate) -> RunManifests:
    estimates = {name: {"gain": gain, "tuned": gain} for name, gain in gains.items()}
    evaluation = run.evaluation.model_copy(update={"estimates": estimates})
    return RunManifests(run.subject, run.prior, run.training, evaluation, run.scoring)


@pytest.mark.parametrize(
    ("gains", "headline", "text"),
    [
        ({"dino": estimate(0.1)}, "Better than the base model, with reservations", "resemble the subject more"),
        ({"dino": estimate(0.005)}, "No significant improvement over the base model", "No significant gain in"),
        ({"dino": estimate(-0.1)}, "Worse than the base model", "resemble the subject less"),
        ({"dino": estimate(0.1, None)}, "No verdict: too few prompts", "Sample more"),
        ({}, "DINO was not measured: no verdict", "No sample was graded"),
        ({"dino": estimate(0.1), "clip_t": estimate(-0.1)}, "Better than the base model, with", "over-training"),
        ({"dino": estimate(0.1), "clip_t": estimate(0.0)}, "Better than the base model, with", "followed as before"),
        ({"dino": estimate(0.1), "copies": estimate(0.5)}, "with reservations", "50% of samples are near-duplicates"),
    ],
)  # fmt: skip
def test_the_headline_follows_from_the_interval_of_the_gain(
    store: LocalStore, gains: dict[str, Any], headline: str, text: str
) -> None:
    verdict = reach_verdict(with_gains(make_run(store), **gains), GATE)
    assert headline in verdict.headline
    assert any(text in f"{finding.text} {finding.advice}" for finding in verdict.findings)


def test_a_drawn_world_without_the_subjects_kind_must_not_be_used(store: LocalStore) -> None:
    run = make_run(store)
    subject = run.subject.model_copy(update={"unknown_world": "no boats here"})
    odd = with_gains(RunManifests(subject, run.prior, run.training, run.evaluation, run.scoring), dino=estimate(0.1))
    verdict = reach_verdict(odd, GATE)
    assert verdict.level == "bad"
    assert "not recommended for use" in verdict.headline
    assert "no boats here" in verdict.findings[0].text


def describe(run: RunManifests, gate: GateConfig = GATE) -> tuple[str, str]:
    """Return the headline and all findings as one text."""
    verdict = reach_verdict(run, gate)
    return verdict.headline, " ".join(f"{finding.text} {finding.advice}" for finding in verdict.findings)


def test_a_gain_below_the_gates_limit_is_not_called_passed(store: LocalStore) -> None:
    run = with_gains(make_run(store), dino=estimate(0.1), clip_t=estimate(0.0), copies=estimate(0.0))
    gate = GATE.model_copy(update={"min_dino_gain": 0.3})
    headline, text = describe(run, gate)
    assert headline == "Better than the base model, by less than required"
    assert "lower bound of the DINO gain is +0.090, required > +0.300" in text


def test_a_loss_of_clip_t_without_an_interval_is_reported_as_the_gate_does(store: LocalStore) -> None:
    run = with_gains(make_run(store), dino=estimate(0.1), clip_t=estimate(-0.3, None), copies=estimate(0.0))
    assert any("CLIP-T changed by -0.300" in blocker for blocker in find_blockers(run, GATE))
    headline, text = describe(run)
    assert headline == "Better than the base model, with reservations"
    assert "Prompt fidelity: inconclusive" in text


def test_values_that_do_not_vary_are_not_called_too_few_prompts(store: LocalStore) -> None:
    headline, text = describe(with_gains(make_run(store), dino=Estimate(mean=0.1, num=12)))
    assert headline == "No verdict: values do not vary between prompts"
    assert "too few" not in text


def test_no_more_than_the_whole_gap_is_closed(store: LocalStore) -> None:
    _, text = describe(with_gains(make_run(store), dino=estimate(0.9)))
    assert "above real photos among themselves" in text
    assert "150%" not in text


def with_tuned(run: RunManifests, tuned: Estimate) -> RunManifests:
    """Return a run with a significant gain, whose tuned model has the given DINO; that of photos is 0.8."""
    changed = with_gains(run, dino=estimate(0.6))
    changed.evaluation.estimates["dino"]["tuned"] = tuned
    return changed


def test_samples_closer_to_the_photos_than_these_to_each_other_are_a_caution(store: LocalStore) -> None:
    run = with_tuned(make_run(store), estimate(0.9, 0.05))
    verdict = reach_verdict(run, GATE)
    [finding] = [finding for finding in verdict.findings if "sign of copying" in finding.text]
    assert finding.level == "caution"
    assert "DINO 0.900 [0.850, 0.950]" in finding.text and "0.800" in finding.text
    assert "Compare them with the photos" in finding.advice
    assert verdict.headline == "Better than the base model, with reservations"


@pytest.mark.parametrize("tuned", [estimate(0.9, 0.15), estimate(0.9, None), estimate(0.7, 0.05)])
def test_a_mean_that_is_not_surely_above_the_ceiling_is_no_sign_of_copying(store: LocalStore, tuned: Estimate) -> None:
    _, text = describe(with_tuned(make_run(store), tuned))
    assert "sign of copying" not in text


def test_metrics_that_were_not_measured_are_findings(store: LocalStore) -> None:
    _, text = describe(with_gains(make_run(store), dino=estimate(0.1)))
    assert "CLIP-T change: not measured" in text
    assert "Near-duplicates of photos: not measured" in text


def test_all_checks_passed_is_said_only_where_the_gate_has_nothing_against_it(store: LocalStore) -> None:
    run = with_gains(make_run(store), dino=estimate(0.1), clip_t=estimate(0.0), copies=estimate(0.0))
    sides = {"tuned": SideScores(concept_preservation=3, prompt_following=4, image_quality=2)}
    reliability = run.scoring.reliability.model_copy(update={"is_reliable": True})
    scoring = run.scoring.model_copy(update={"scores": sides, "reliability": reliability})
    subject = run.subject.model_copy(update={"images": run.subject.images * 3})
    good = RunManifests(subject, run.prior, run.training, run.evaluation, scoring)
    assert find_blockers(good, GATE) == []
    assert reach_verdict(good, GATE).headline == "Better than the base model; all checks passed"


def rows(*points: tuple[float, float]) -> list[CheckpointMeans]:
    return [CheckpointMeans(100 * n, *point) for n, point in enumerate(points, 1)]


def test_the_knee_is_where_fidelity_begins_to_cost_more_editability() -> None:
    assert find_knee(rows((0.2, 0.70), (0.5, 0.68), (0.55, 0.5), (0.58, 0.4))) == 200
    assert find_knee(rows((0.2, 0.7), (0.5, 0.6))) is None
    assert find_knee(rows((0.2, 0.6), (0.5, 0.65), (0.6, 0.7))) is None  # better in both: no trade-off


def test_a_straight_or_sagging_line_has_no_knee() -> None:
    assert find_knee(rows((0.5, 0.3), (0.6, 0.25), (0.7, 0.2))) is None
    assert find_knee(rows((0.5, 0.30), (0.6, 0.22), (0.7, 0.20))) is None
    assert find_knee(rows((0.5, 0.30), (0.6, 0.29), (0.7, 0.20))) == 200


def test_checkpoints_are_averaged_over_the_draws_that_all_of_them_have() -> None:
    """The safety checker may have dropped a sample of one checkpoint alone."""

    def sample(key: str, step: int | None, prompt: str) -> Sample:
        return Sample(
            image=ObjectRef(key=key, sha256="", size_bytes=0), side="tuned", prompt=prompt, class_prompt="", seed=1,
            kind="subject" if step is None else "candidate", step=step,
        )  # fmt: skip

    samples = [
        sample("a", 100, "one"),
        sample("b", 100, "two"),
        sample("c", 200, "one"),
        sample("d", None, "one"),
        sample("e", None, "two"),
    ]
    dinos = {"a": 1, "b": 9, "c": 2, "d": 3, "e": 9}
    values = {key: SubjectMetrics(dino=dino, clip_i=0, clip_t=0) for key, dino in dinos.items()}
    found = measure_checkpoints(
        Evaluation.model_construct(samples=tuple(samples), sample_metrics=values, published_step=300)
    )
    assert [(row.step, row.dino) for row in found] == [(100, 1.0), (200, 2.0), (300, 3.0)]


def find(run: RunManifests, words: str, gate: GateConfig = GATE, evaluated: EvaluatedModel | None = None) -> Finding:
    """Return the one finding whose text has the words."""
    [found] = [each for each in reach_verdict(run, gate, evaluated).findings if words in each.text]
    return found


KNEE = {100: (0.30, 0.70), 200: (0.60, 0.68), 300: (0.65, 0.40)}
TAKE = 'Take step 200: publishing.pick=knee, or likeness generate latest "a photo of sks fish" --candidate 200'
FEWER = "Train fewer steps, or keep checkpoints to choose from: training.validation.save_top_k=3"


@pytest.mark.parametrize(
    ("means", "published", "advice"),
    [
        (KNEE, 300, TAKE),
        (KNEE, 200, FEWER),  # it is published already
        ({100: (0.3, 0.7), 300: (0.65, 0.4)}, 300, FEWER),
    ],
)
def test_an_over_trained_model_has_the_step_to_take(
    store: LocalStore, means: dict[int, tuple[float, float]], published: int, advice: str
) -> None:
    run = with_checkpoints(store, make_run(store), means, published=published)
    run = replace(run, training=run.training.model_copy(update={"published_step": published}))
    found = find(with_gains(run, dino=estimate(0.1), clip_t=estimate(-0.1)), "a sign of over-training")
    assert (found.level, found.advice) == ("caution", advice)


def with_controls(run: RunManifests, *passed: bool) -> RunManifests:
    """Return a graded run whose judge passed or failed the controls."""
    controls = tuple(
        ControlResult(name=f"control {number}", text="t", value=1, limit=2, is_passed=each)
        for number, each in enumerate(passed)
    )
    graded = with_grades(run)
    update = {"controls": controls, "is_reliable": all(passed)}
    reliability = graded.scoring.reliability.model_copy(update=update)
    return replace(graded, scoring=graded.scoring.model_copy(update={"reliability": reliability}))


def test_failed_controls_are_named_with_what_to_rely_on_instead(store: LocalStore) -> None:
    found = find(with_controls(make_run(store), True, False, False), "judge's grades")
    assert found.level == "caution"
    assert found.text == "The judge's grades are not reliable: it failed 2 of 3 controls (control 1, control 2)."
    assert found.advice == "Rely on DINO and CLIP-T; choose another model for llm.judge"
    assert "grades" not in describe(with_controls(make_run(store), True, True))[1]


@pytest.mark.parametrize(
    ("num", "text"),
    [
        (1, "1 photo was accepted; 3 to 5 are usual."),
        (2, "2 photos were accepted; 3 to 5 are usual."),
        (3, None),
    ],
)
def test_too_few_photos_are_a_caution(store: LocalStore, num: int, text: str | None) -> None:
    run = make_run(store)
    run = replace(run, subject=run.subject.model_copy(update={"images": run.subject.images * num}))
    if text is None:
        assert "accepted" not in describe(run)[1]
        return
    found = find(run, "accepted")
    assert (found.level, found.text) == ("caution", text)
    assert found.advice == "Add photos from other sides and in other surroundings"


def test_each_doubt_about_the_noun_is_a_caution(store: LocalStore) -> None:
    run = make_run(store)
    doubts = ("The photos show a cat, not a fish", "The web calls it a trout")
    run = replace(run, subject=run.subject.model_copy(update={"warnings": (doubts[0], "the web calls it a trout")}))
    for doubt in doubts:
        found = find(run, doubt)
        assert (found.level, found.text) == ("caution", f"{doubt}.")
        assert found.advice == "Check the photos and subject.class_noun"


def test_prior_drift_beyond_the_limit_has_advice(store: LocalStore) -> None:
    run = make_run(store)  # PRES rises by 0.1
    drifted = find(run, "PRES", GATE.model_copy(update={"max_pres_gain": 0.05}))
    assert drifted.level == "caution" and drifted.text.startswith("Prior drift: PRES 0.100 before, 0.200 after")
    assert drifted.advice.startswith("Keep prior preservation on (prior=class_images), use more class images, or ")
    kept = find(run, "PRES", GATE.model_copy(update={"max_pres_gain": 0.2}))
    assert (kept.level, kept.advice) == ("good", "")
    assert kept.text.startswith("No prior drift: ")


def test_a_model_from_elsewhere_that_was_tuned_on_other_photos_is_a_caution(store: LocalStore) -> None:
    run = make_run(store)
    model = EvaluatedModel(location="m", kind="lora", sha256="0", num_unmatched_photos=4)
    found = find(run, "None of the photos is among the 4", evaluated=model)
    assert found.level == "caution" and "the subject that the model was tuned on" in found.advice
    matched = model.model_copy(update={"num_unmatched_photos": 0})
    assert not [each for each in reach_verdict(run, GATE, matched).findings if "None of the photos" in each.text]
