"""The report: one self-contained HTML file with all images and figures of a run."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from tasks.images import decode_png, encode_png
from tasks.manifests.base import ObjectRef
from tasks.manifests.evaluation import Evaluation, Sample
from tasks.manifests.run import RunManifests
from tasks.manifests.scoring import Judgement, Scorecard
from tasks.manifests.training import LossRow
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
    manifests: RunManifests
    losses: Sequence[LossRow]
    config_rows: Sequence[tuple[str, str]]


def render_report(store: Store, inputs: ReportInputs) -> str:
    """Return the report as one self-contained HTML page."""
    # Names, captions and evidence are untrusted text: everything is escaped.
    # `default=True`, since select_autoescape decides by suffix and the template's is .jinja.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["picture"] = lambda ref: to_data_url(store, ref)
    run = inputs.manifests
    graded = {judgement.sample.key: judgement for judgement in run.scoring.judgements}
    return environment.get_template("report.html.jinja").render(
        inputs=inputs,
        subject=run.subject,
        prior=run.prior,
        tuned=run.training,
        evaluation=run.evaluation,
        scores=run.scoring.scores,
        intervals=run.scoring.intervals,
        reliability=run.scoring.reliability,
        pairs=run.scoring.pairs,
        num_tie_breaks=sum(bool(judgement.tie_breaks) for judgement in run.scoring.judgements),
        checkpoints=list_checkpoints(run.evaluation, run.scoring),
        judge=run.scoring.served_model,
        metric_rows=list_metrics(run.evaluation),
        drift_rows=list_drift(run.evaluation),
        sample_rows=list_samples(run.evaluation.samples, graded),
        class_samples={
            side: [s for s in run.evaluation.samples if s.side == side and s.kind == "class"]
            for side in ("base", "tuned")
        },
        curves=draw_curves(inputs.losses),
        training_grids=[ref for ref in run.training.objects if "/samples/" in ref.key],
        stages=run.ordered(),
    )


def list_metrics(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return a row per metric: base, tuned, ceiling, and the fraction of the gap between base and ceiling closed."""
    rows = []
    for key, metric in ((key, METRICS[key]) for key in FIDELITY):
        base, tuned = (getattr(evaluation.metrics[side], key) for side in ("base", "tuned"))
        ceiling = getattr(evaluation.ceiling, key)
        gap = ceiling - base
        # None for CLIP-T, where real photos are no upper bound, and without a gap.
        share = (tuned - base) / gap if key != "clip_t" and gap > 1e-6 else None
        rows.append(
            {"name": metric.name, "metric": metric, "base": base, "tuned": tuned, "ceiling": ceiling, "share": share}
        )
    return rows


def list_drift(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return a row per drift metric that was measured on both sides."""
    rows = []
    for key in ("pres", "div", "dino_div"):
        base, tuned = (getattr(evaluation.drift[side], key) for side in ("base", "tuned"))
        if base is not None and tuned is not None:
            rows.append({"metric": METRICS[key], "base": base, "tuned": tuned})
    return rows


def list_checkpoints(evaluation: Evaluation, scores: Scorecard) -> list[dict[str, Any]]:
    """Return a row per ranked checkpoint with its mean DINO and CLIP-T.

    Published weights have more samples than the others; only the draws that all have are averaged.
    """
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
    # `groupby` needs sorted input; the prompts' own order is restored below.
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
    """Return a stored image as a PNG data URL, at most 256 px a side."""
    data = read_verified(store, ref)
    picture = decode_png(data)
    if max(picture.size) > PICTURE_SIDE:
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
        data = encode_png(picture)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def draw_sample_grid(store: Store, evaluation: Evaluation, *, side: int = 128) -> bytes:
    """Return a PNG grid: base samples in the first row, tuned ones in the second."""
    rows = [[s for s in evaluation.samples if s.side == name and s.kind == "subject"] for name in ("base", "tuned")]
    width = max(len(row) for row in rows)
    grid = Image.new("RGB", (width * side, len(rows) * side), "white")
    for y, row in enumerate(rows):
        for x, sample in enumerate(row):
            picture = decode_png(read_verified(store, sample.image))
            # Upscaled, a small image keeps its pixels visible.
            resample = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            grid.paste(picture.resize((side, side), resample), (x * side, y * side))
    return encode_png(grid)


def draw_curves(losses: Sequence[LossRow], *, width: int = 640, height: int = 180) -> list[dict[str, Any]]:
    """Return smoothed loss curves as SVG point lists on one scale, with their first and last value."""
    named = {
        "instance_loss": [row.instance_loss for row in losses if row.instance_loss is not None],
        "prior_loss": [row.prior_loss for row in losses if row.prior_loss is not None],
    }
    smooth = {name: smoothed(values) for name, values in named.items() if values}
    top = max((max(values) for values in smooth.values()), default=1.0) or 1.0
    curves = []
    for name, values in smooth.items():
        step = width / max(1, len(values) - 1)
        # SVG's y axis points down; 8 px are left above the maximum.
        points = " ".join(f"{i * step:.1f},{height - v / top * (height - 8):.1f}" for i, v in enumerate(values))
        curves.append({"name": name.replace("_", " "), "points": points, "first": values[0], "last": values[-1]})
    return curves


def smoothed(values: list[float]) -> list[float]:
    """Return a centered running mean, thinned to at most 400 points; single losses vary with their timesteps."""
    window = max(1, len(values) // 12)
    result = []
    for i in range(len(values)):
        part = values[max(0, i - window) : i + window + 1]
        result.append(sum(part) / len(part))
    stride = max(1, len(result) // 200)
    return result[::stride]
