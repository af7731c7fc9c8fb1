"""The manifests of a small drawn run, for report and publishing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tasks.images import encode_png
from tasks.manifests.base import ModelRef
from tasks.manifests.evaluation import (
    CeilingMetrics,
    DriftMetrics,
    Estimate,
    Evaluation,
    PromptRow,
    Sample,
    Side,
    SubjectMetrics,
    Table,
)
from tasks.manifests.prior import ClassImageSet
from tasks.manifests.run import RunManifests
from tasks.manifests.scoring import Judgement, JudgeReliability, Scorecard, SideScores
from tasks.manifests.subject import RejectedImage
from tasks.manifests.training import TunedModel
from tasks.publishing.config import GateConfig
from tasks.scoring.judge_requests import AXES
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.config import make_config
from tests.support.subject import make_subject_set
from tests.support.tiny import draw_photo

GATE = make_config(GateConfig)


def make_table(*, has_interval: bool) -> Table:
    """Return estimates of three metrics, with all intervals or none."""
    half = 0.05 if has_interval else None

    def estimate(mean: float) -> Estimate:
        low, high = (mean - half, mean + half) if half else (None, None)
        return Estimate(mean=mean, low=low, high=high, num=6 if half else 2)

    return {
        name: {"base": estimate(0.2), "tuned": estimate(0.5), "gain": estimate(0.3)}
        for name in ("dino", "clip_i", "clip_t")
    }


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
            kinds={"scene": make_table(has_interval=True), "accessory": make_table(has_interval=False)},
            prompts=(
                PromptRow(template="a photo of {subject}", kind="scene", values=make_table(has_interval=True)),
                PromptRow(
                    template="a photo of {subject} wearing a very long scarf that ends far beyond any phone's screen",
                    kind="accessory",
                    values=make_table(has_interval=False),
                ),
            ),
            published_step=800,
        )
    )


def make_run(store: LocalStore) -> RunManifests:
    """Return a run of which a person captioned the only accepted photo and an LLM rejected another."""

    def head(stage: str) -> dict[str, Any]:
        return StageFolder(store, stage, "k").head(1, counts={})

    base = ModelRef(location="m", revision=None, sha256="b")
    reliability = JudgeReliability(controls=(), alpha={}, num_repeated=0, is_comparable=True, is_reliable=False)
    subject = make_subject_set(num=1)
    photo = StageFolder(store, "subject", "k").put("images/0.png", encode_png(draw_photo(0, size=64)))
    [image] = subject.images
    return RunManifests(
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
            **head("scoring"), served_model="j", judgements=(), failed=(),
            scores={},
            reliability=reliability,
        ),
    )  # fmt: skip


def with_grades(run: RunManifests) -> RunManifests:
    """Return a run whose judge graded both sides."""
    estimates = {
        "base": Estimate(mean=1, low=0.5, high=1.5, num=6), "tuned": Estimate(mean=3, low=2.5, high=3.5, num=6),
        "gain": Estimate(mean=2, low=1.25, high=2.75, num=6),
    }  # fmt: skip
    sides: tuple[Side, ...] = ("base", "tuned")
    changes = {
        "scores": {side: SideScores(**dict.fromkeys(AXES, estimates[side].mean)) for side in sides},
        "estimates": dict.fromkeys(AXES, estimates),
    }
    return replace(run, scoring=run.scoring.model_copy(update=changes))


def with_judgements(run: RunManifests) -> RunManifests:
    """Return a run with the judge's grades of each sample."""
    rows = tuple(
        Judgement(
            sample=sample.image, side=sample.side, prompt=sample.prompt, evidence="",
            **dict.fromkeys(AXES, 3.0),  # type: ignore[arg-type]
        )
        for sample in run.evaluation.samples
    )  # fmt: skip
    return replace(run, scoring=run.scoring.model_copy(update={"judgements": rows}))


def with_checkpoints(
    store: LocalStore, run: RunManifests, means: Mapping[int, tuple[float, float]], *, published: int
) -> RunManifests:
    """Return a run whose retained checkpoints have the given DINO and CLIP-T by step."""
    folder = StageFolder(store, "evaluation", "k")
    samples, metrics = list[Sample](), dict(run.evaluation.sample_metrics)
    drawn: list[tuple[Side, str, int | None, tuple[float, float]]] = [("base", "subject", None, (0.2, 0.6))]
    for step, means_of_step in means.items():
        is_published = step == published
        kind = "subject" if is_published else "candidate"
        drawn.append(("tuned", kind, None if is_published else step, means_of_step))
    for side, kind, step, (dino, clip_t) in drawn:
        for number in range(8):
            image = folder.put(f"{side}-{kind}-{step}-{number}.png", encode_png(draw_photo(number, size=64)))
            update = {"image": image, "side": side, "kind": kind, "step": step, "prompt": f"sks fish in place {number}"}
            samples.append(run.evaluation.samples[0].model_copy(update=update))
            spread = 0.01 * (number - 3.5)
            metrics[image.key] = SubjectMetrics(dino=dino + spread, clip_i=0.5, clip_t=clip_t - spread)
    changes = {"samples": tuple(samples), "sample_metrics": metrics, "published_step": published}
    return replace(run, evaluation=run.evaluation.model_copy(update=changes))
