"""The report: one HTML file with every picture and figure of a run inside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from PIL import Image

from tasks.images import decode_png, encode_png
from tasks.manifests.base import Manifest, ObjectRef
from tasks.manifests.evaluation import Evaluation, Sample
from tasks.manifests.prior import ClassImageSet
from tasks.manifests.scoring import Judgement, Scorecard
from tasks.manifests.subject import SubjectSet
from tasks.manifests.training import TunedModel
from tasks.metrics import METRICS
from tasks.services.store.base import Store
from tasks.stage.cache import read_verified

TEMPLATE_FOLDER = Path(__file__).resolve().parent
PICTURE_SIDE = 256
FIDELITY = ("dino", "clip_i", "clip_t")


@dataclass(frozen=True)
class ReportInputs:
    """The manifests that a report shows."""

    title: str
    subject: SubjectSet
    prior: ClassImageSet
    tuned: TunedModel
    evaluation: Evaluation
    scores: Scorecard
    losses: list[dict[str, float]]
    config_rows: list[tuple[str, str]]

    def stages(self) -> list[Manifest]:
        """Return the stages' manifests in order."""
        return [self.subject, self.prior, self.tuned, self.evaluation, self.scores]


def render_report(store: Store, inputs: ReportInputs) -> str:
    """Return the report as one self-contained HTML page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_FOLDER), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    environment.filters["picture"] = lambda ref: to_data_url(store, ref)
    graded = {judgement.sample.key: judgement for judgement in inputs.scores.judgements}
    return environment.get_template("report.html.jinja").render(
        inputs=inputs,
        subject=inputs.subject,
        prior=inputs.prior,
        tuned=inputs.tuned,
        evaluation=inputs.evaluation,
        scores=inputs.scores.scores,
        intervals=inputs.scores.intervals,
        health=inputs.scores.health,
        pairs=inputs.scores.pairs,
        num_settled=sum(bool(judgement.settled) for judgement in inputs.scores.judgements),
        checkpoints=list_checkpoints(inputs.evaluation, inputs.scores),
        judge=inputs.scores.served_model,
        metric_rows=list_metrics(inputs.evaluation),
        drift_rows=list_drift(inputs.evaluation),
        sample_rows=list_samples(inputs.evaluation.samples, graded),
        class_samples={
            side: [s for s in inputs.evaluation.samples if s.side == side and s.kind == "class"]
            for side in ("base", "tuned")
        },
        curves=draw_curves(inputs.losses),
        training_grids=[ref for ref in inputs.tuned.objects if "/samples/" in ref.key],
        stages=inputs.stages(),
    )


def list_metrics(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return a row per metric: values, ceiling, and the share of the way to it."""
    rows = []
    for key, metric in ((key, METRICS[key]) for key in FIDELITY):
        base, tuned = (getattr(evaluation.metrics[side], key) for side in ("base", "tuned"))
        ceiling = getattr(evaluation.ceiling, key)
        gap = ceiling - base
        share = (tuned - base) / gap if key != "clip_t" and gap > 1e-6 else None
        rows.append(
            {"name": metric.name, "metric": metric, "base": base, "tuned": tuned, "ceiling": ceiling, "share": share}
        )
    return rows


def list_drift(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return a row per measure of the class that was taken: values of both sides."""
    rows = []
    for key in ("pres", "div", "dino_div"):
        base, tuned = (getattr(evaluation.drift[side], key) for side in ("base", "tuned"))
        if base is not None and tuned is not None:
            rows.append({"metric": METRICS[key], "base": base, "tuned": tuned})
    return rows


def list_checkpoints(evaluation: Evaluation, scores: Scorecard) -> list[dict[str, Any]]:
    """Return a row per step whose weights were compared, with the means of the samples that were."""
    drawn = [s for s in evaluation.samples if s.kind == "candidate"]
    draws = {(sample.prompt, sample.seed) for sample in drawn}
    drawn += [
        s for s in evaluation.samples if s.kind == "subject" and s.side == "tuned" and (s.prompt, s.seed) in draws
    ]
    rows = []
    for rank in scores.checkpoints:
        own = [s for s in drawn if (evaluation.published_step if s.step is None else s.step) == rank.step]
        values = [evaluation.sample_metrics[sample.image.key] for sample in own]
        means = {name: sum(getattr(v, name) for v in values) / len(values) for name in ("dino", "clip_t")}
        rows.append({"rank": rank, **means})
    return rows


def list_samples(samples: Sequence[Sample], graded: dict[str, Judgement]) -> list[dict[str, Any]]:
    """Return a row per prompt with its samples of both sides and their grades."""
    subject = [sample for sample in samples if sample.kind == "subject"]
    ordered = sorted(subject, key=lambda sample: (sample.prompt, sample.side, sample.seed))
    rows = []
    for prompt, group in groupby(ordered, key=lambda sample: sample.prompt):
        members = list(group)
        sides = {
            side: [(sample, graded.get(sample.image.key)) for sample in members if sample.side == side]
            for side in ("base", "tuned")
        }
        rows.append({"prompt": prompt, **sides})
    order = [sample.prompt for sample in subject]
    return sorted(rows, key=lambda row: order.index(str(row["prompt"])))


def to_data_url(store: Store, ref: ObjectRef) -> str:
    """Return a stored picture inline, at most 256 px a side."""
    data = read_verified(store, ref)
    picture = decode_png(data)
    if max(picture.size) > PICTURE_SIDE:
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
        data = encode_png(picture)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def draw_sample_grid(store: Store, evaluation: Evaluation, *, side: int = 128) -> bytes:
    """Return one picture: the base model's samples above, the tuned model's below."""
    rows = [[s for s in evaluation.samples if s.side == name and s.kind == "subject"] for name in ("base", "tuned")]
    width = max(len(row) for row in rows)
    grid = Image.new("RGB", (width * side, len(rows) * side), "white")
    for y, row in enumerate(rows):
        for x, sample in enumerate(row):
            picture = decode_png(read_verified(store, sample.image))
            resample = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            grid.paste(picture.resize((side, side), resample), (x * side, y * side))
    return encode_png(grid)


def draw_curves(losses: list[dict[str, float]], *, width: int = 640, height: int = 180) -> list[dict[str, Any]]:
    """Return smoothed loss curves as SVG point lists on one scale, with their first and last value."""
    names = [name for name in ("instance_loss", "prior_loss") if losses and name in losses[0]]
    smooth = {name: smoothed([row[name] for row in losses]) for name in names}
    top = max((max(values) for values in smooth.values()), default=1.0) or 1.0
    curves = []
    for name, values in smooth.items():
        step = width / max(1, len(values) - 1)
        points = " ".join(f"{i * step:.1f},{height - v / top * (height - 8):.1f}" for i, v in enumerate(values))
        curves.append({"name": name.replace("_", " "), "points": points, "first": values[0], "last": values[-1]})
    return curves


def smoothed(values: list[float]) -> list[float]:
    """Return a running mean: losses of single steps jump with their timesteps."""
    window = max(1, len(values) // 12)
    result = []
    for i in range(len(values)):
        part = values[max(0, i - window) : i + window + 1]
        result.append(sum(part) / len(part))
    stride = max(1, len(result) // 200)
    return result[::stride]
