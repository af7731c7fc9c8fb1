"""The report's figures and curves."""

from pathlib import Path
from typing import Any

import pytest

from tasks.images import decode_png, encode_png
from tasks.manifests.base import Manifest, ModelRef, ObjectRef
from tasks.manifests.evaluation import CeilingMetrics, DriftMetrics, Evaluation, Sample, SubjectMetrics
from tasks.manifests.prior import ClassImageSet
from tasks.manifests.run import RunManifests
from tasks.manifests.scoring import CheckpointRank, JudgeReliability, Scorecard
from tasks.manifests.subject import RejectedImage
from tasks.manifests.training import LossRow, TunedModel
from tasks.publishing.export import headline_metrics, sum_llm_costs
from tasks.publishing.report import (
    ReportInputs,
    draw_curves,
    draw_sample_grid,
    list_checkpoints,
    list_metrics,
    list_samples,
    render_report,
    smoothed,
)
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.subject import make_subject_set
from tests.support.tiny import draw_photo


def make_evaluation(store: LocalStore) -> Evaluation:
    folder = StageFolder(store, "evaluation", "k")
    samples = []
    for side in ("base", "tuned"):
        for number, prompt in enumerate(["a photo of sks fish", "sks fish at night"]):
            image = folder.put(f"{side}-{number}.png", encode_png(draw_photo(number, size=64)))
            samples.append(
                Sample.model_validate(
                    {"image": image, "side": side, "kind": "subject", "prompt": prompt, "class_prompt": "c", "seed": 1}
                )
            )
    return folder.finish(
        Evaluation(
            **folder.head(1, counts={}),
            samples=tuple(samples),
            metrics={
                "base": SubjectMetrics(dino=0.2, clip_i=0.5, clip_t=0.4),
                "tuned": SubjectMetrics(dino=0.5, clip_i=0.7, clip_t=0.3),
            },
            drift={"base": DriftMetrics(pres=0.1, dino_div=0.9), "tuned": DriftMetrics(pres=0.2, dino_div=0.8)},
            ceiling=CeilingMetrics(dino=0.8, clip_i=0.9, clip_t=0.5),
            sample_metrics={
                s.image.key: SubjectMetrics(dino=0.1 * n, clip_i=0, clip_t=0) for n, s in enumerate(samples)
            },
            published_step=800,
        )
    )


def make_inputs(store: LocalStore) -> ReportInputs:
    """Return a run of which a person captioned the only accepted photo and an LLM rejected another."""

    def head(stage: str) -> dict[str, Any]:
        return StageFolder(store, stage, "k").head(1, counts={})

    base = ModelRef(location="m", revision=None, sha256="b")
    reliability = JudgeReliability(controls=(), alpha={}, num_repeated=0, is_comparable=True, is_reliable=False)
    subject = make_subject_set(num=1)
    photo = StageFolder(store, "subject", "k").put("images/0.png", encode_png(draw_photo(0, size=64)))
    [image] = subject.images
    run = RunManifests(
        subject=subject.model_copy(update={
            "images": (image.model_copy(update={"image": photo, "surroundings": "at <b>sea</b>"}),),
            "rejected": (RejectedImage(source_name="<i>.jpg", source_sha256="r", reason="no fish & no sea"),),
        }),
        prior=ClassImageSet(**head("prior"), class_prompt="a fish", base_model=base, images=()),
        training=TunedModel(
            **head("training"), base_model=base, model=(), family="stable_diffusion", method="full", num_steps=3,
            published_step=3, trainable_parameters=1, total_parameters=2, final_loss=0.5, peak_memory_bytes=1,
            subject_sha256="s", prior_sha256="p",
        ),
        evaluation=make_evaluation(store),
        scoring=Scorecard(
            **head("scoring"), served_model="j", judgements=(), failed=(), scores={}, intervals={},
            reliability=reliability,
        ),
    )  # fmt: skip
    return ReportInputs(
        title="a <fish>", manifests=run, losses=[LossRow(step=1, loss=1.0)], config_rows=[("a.b", "<c>")],
    )  # fmt: skip


def test_a_photo_without_inspection_and_a_run_without_grades_or_class_images_are_shown(store: LocalStore) -> None:
    html = render_report(store, make_inputs(store))
    assert "1 accepted, 1 rejected" in html
    assert "a photo of sks fish" in html


def test_names_and_values_are_escaped(store: LocalStore) -> None:
    html = render_report(store, make_inputs(store))
    for raw, shown in (("<i>.jpg", "&lt;i&gt;.jpg"), ("a <fish>", "a &lt;fish&gt;"), ("<c>", "&lt;c&gt;")):
        assert raw not in html
        assert shown in html


def test_gap_closed_is_the_fraction_between_base_and_ceiling(store: LocalStore) -> None:
    rows = {row["name"]: row for row in list_metrics(make_evaluation(store))}
    assert rows["DINO"]["share"] == pytest.approx(0.5)
    assert rows["CLIP-I"]["share"] == pytest.approx(0.5)
    assert rows["CLIP-T"]["share"] is None


def test_samples_are_grouped_by_prompt_in_configured_order(store: LocalStore) -> None:
    rows = list_samples(make_evaluation(store).samples, {})
    assert [row["prompt"] for row in rows] == ["a photo of sks fish", "sks fish at night"]
    assert all(len(row["base"]) == len(row["tuned"]) == 1 for row in rows)


def test_the_checkpoint_table_shows_the_mean_metrics_of_compared_samples(store: LocalStore) -> None:
    evaluation = make_evaluation(store)
    published = evaluation.samples[2]
    image = StageFolder(store, "evaluation", "k").put("c.png", b"x")
    drawn = published.model_copy(update={"kind": "candidate", "step": 400, "image": image})
    evaluation = evaluation.model_copy(
        update={
            "samples": (*evaluation.samples, drawn),
            "sample_metrics": {**evaluation.sample_metrics, image.key: SubjectMetrics(dino=0.9, clip_i=0, clip_t=0)},
        }
    )
    ranks = [
        CheckpointRank(step=step, is_published=step == 800, strength=0.5, wins=0, losses=0, undecided=1)
        for step in (400, 800)
    ]
    scores = Scorecard.model_construct(checkpoints=tuple(ranks))
    rows = list_checkpoints(evaluation, scores)
    assert [(row["rank"].step, row["dino"]) for row in rows] == [(400, 0.9), (800, pytest.approx(0.2))]


def test_the_grid_has_base_above_tuned(store: LocalStore) -> None:
    grid = decode_png(draw_sample_grid(store, make_evaluation(store), side=64))
    assert grid.size == (128, 128)


def test_loss_curves_share_one_scale_and_stay_within_the_plot() -> None:
    losses = [LossRow(step=i, loss=1.0, instance_loss=2.0 - i / 50, prior_loss=0.5) for i in range(100)]
    curves = draw_curves(losses, width=100, height=50)
    assert [curve["name"] for curve in curves] == ["instance loss", "prior loss"]
    points = [tuple(map(float, p.split(","))) for curve in curves for p in curve["points"].split()]
    assert all(0 <= x <= 100.1 and 0 <= y <= 50 for x, y in points)
    assert curves[0]["last"] < curves[0]["first"]
    assert draw_curves([]) == []


def test_smoothing_leaves_a_constant_curve_unchanged() -> None:
    assert smoothed([3.0] * 40) == [3.0] * 40


def test_headline_metrics_are_flat_and_complete(store: LocalStore) -> None:
    from tasks.manifests.scoring import SideScores

    scores = StageFolder(store, "scoring", "k").finish(
        Scorecard(
            **StageFolder(store, "scoring", "k").head(1, counts={}),
            served_model="m",
            judgements=(),
            failed=(),
            scores={"tuned": SideScores(concept_preservation=3, prompt_following=4, image_quality=2)},
            intervals={},
            reliability=JudgeReliability(controls=(), alpha={}, num_repeated=0, is_comparable=True, is_reliable=False),
        )
    )
    figures = headline_metrics(make_evaluation(store), scores)
    assert figures["tuned/dino"] == 0.5
    assert figures["ceiling/clip_t"] == 0.5
    assert figures["tuned/concept_preservation"] == 3
    assert len(figures) == 6 + 4 + 3 + 3 + 1


def test_llm_cost_sums_over_stages_and_is_unknown_if_any_stage_is_unknown() -> None:
    def stage(cost: float | None, calls: int) -> Manifest:
        return Manifest.model_construct(cost_usd=cost, counts={"llm_calls": calls})

    assert sum_llm_costs([stage(0.01, 11), stage(0.02, 100)]) == (
        {"llm/calls": 111.0, "llm/cost_usd": pytest.approx(0.03)}, "0.03000 USD",
    )  # fmt: skip
    assert sum_llm_costs([stage(0.01, 11), stage(None, 100)]) == ({"llm/calls": 111.0}, "unknown")


def test_the_model_card_template_is_filled(tmp_path: Path, store: LocalStore) -> None:
    from tasks.publishing.export import CARD

    text = CARD.format(
        title="T", class_noun="fish", subject="sks fish", num_photos=5, num_steps=3, base_model="b",
        loading="pipeline = ...", spoken="sks fish", method="full",
        base=SubjectMetrics(dino=0.1, clip_i=0.2, clip_t=0.3), tuned=SubjectMetrics(dino=0.4, clip_i=0.5, clip_t=0.6),
        ceiling=CeilingMetrics(dino=0.7, clip_i=0.8, clip_t=0.9),
    )  # fmt: skip
    assert "| DINO | 0.100 | 0.400 | 0.700 |" in text
    assert ObjectRef(key="a", sha256="b", size_bytes=1).key == "a"
