"""Renders the report; the template, its style sheet and its script lie beside this file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from PIL import Image

from tasks.images import decode_png, encode_png
from tasks.manifests.evaluation import DriftMetrics, Evaluation
from tasks.manifests.run import RunManifests
from tasks.manifests.run_summary import EvaluatedModel
from tasks.manifests.training import LossRow
from tasks.metrics import METRICS
from tasks.publishing.config import GateConfig
from tasks.publishing.pick import find_knee, measure_checkpoints
from tasks.publishing.report import charts
from tasks.publishing.report.pictures import make_gallery, thin
from tasks.publishing.report.tables import (
    CheckpointRow,
    find_metric,
    list_checkpoints,
    list_metrics,
    list_prompts,
    show_figure,
)
from tasks.publishing.report.template import FOLDER, make_environment
from tasks.publishing.report.verdict import reach_verdict
from tasks.services.store.base import Store
from tasks.stage.cache import read_verified

MAX_POINTS = 400
"""Of a line."""
ABSOLUTE = re.compile(r"(?:^|(?<=[\"',\[])|(?<=file:)|(?<=file://)|(?<=sqlite:///))/[^/\s\"',\]]+(?:/[^/\s\"',\]]*)+")
"""Paths in a setting, not those in URLs of servers."""


@dataclass(frozen=True)
class ReportInputs:
    """The manifests that a report shows."""

    title: str
    manifests: RunManifests
    losses: Sequence[LossRow]
    config_rows: Sequence[tuple[str, str]]
    gate: GateConfig
    """The limits of the verdict."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Default values by name, to show what was changed."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages and the machine that published."""
    snippets: Sequence[tuple[str, str]] = ()
    """How to use the model: a name and the text to copy."""
    evaluated: EvaluatedModel | None = None
    """The model from elsewhere that was evaluated; None: the run trained its own."""


def render_report(store: Store, inputs: ReportInputs) -> str:
    """Return the report as one self-contained HTML page."""
    environment = make_environment()
    run = inputs.manifests
    gallery = make_gallery(store, run)
    environment.filters["picture"] = lambda ref: gallery.urls[ref.key]
    environment.filters["figure"] = show_figure
    environment.globals |= {
        "find_metric": find_metric,
        "draw_values": charts.draw_values,
        "draw_crops": charts.draw_crops,
    }
    crops = {each.photo.key: each.boxes for each in run.training.crops}
    checkpoints = list_checkpoints(run.evaluation, run.scoring)
    metric_rows = list_metrics(run.evaluation)
    knee = find_knee(measure_checkpoints(run.evaluation))
    return environment.get_template("report.html.jinja").render(
        inputs=inputs,
        # Both are this package's own files.
        style=Markup((FOLDER / "report.css").read_text()),  # noqa: S704
        script=Markup((FOLDER / "report.js").read_text()),  # noqa: S704
        verdict=reach_verdict(run, inputs.gate, inputs.evaluated),
        subject=run.subject,
        prior=run.prior,
        class_prompt=find_class_prompt(run),
        tuned=run.training,
        evaluation=run.evaluation,
        scores=run.scoring.scores,
        score_estimates=run.scoring.estimates,
        kinds=run.evaluation.kinds,
        reliability=run.scoring.reliability,
        pairs=run.scoring.pairs,
        num_tie_breaks=sum(bool(judgement.tie_breaks) for judgement in run.scoring.judgements),
        checkpoints=checkpoints,
        knee=knee,
        plane=draw_plane(run.evaluation, checkpoints, knee),
        judge=run.scoring.served_model,
        evidence=run.scoring.evidence,
        metric_rows=metric_rows,
        drift_rows=[row for row in metric_rows if row.key in DriftMetrics.model_fields],
        names={key: metric.name for key, metric in METRICS.items()},
        prompt_rows=list_prompts(run.evaluation),
        gallery=gallery,
        crops=crops,
        is_cropped=any(charts.draw_crops(crops.get(each.image.key, ()), each.measures) for each in run.subject.images),
        curves=draw_losses(inputs.losses),
        stages=run.ordered(),
        settings=[(name, hide_folders(value)) for name, value in inputs.config_rows],
        changed=[(name, hide_folders(v)) for name, v in inputs.config_rows if inputs.defaults.get(name) != v],
    )


def hide_folders(value: str) -> str:
    """Return a setting without the absolute folders of its files, which tell a reader who made the report where."""
    return ABSOLUTE.sub(lambda found: "\N{HORIZONTAL ELLIPSIS}/" + name_of_path(found[0]), value)


def name_of_path(path: str) -> str:
    """Return a path's last part, unless that is a person's home folder."""
    parts = path.strip("/").split("/")
    return "" if len(parts) == 2 and parts[0] in ("home", "Users") else parts[-1]


def find_class_prompt(run: RunManifests) -> str:
    """Return the prompt of the class samples."""
    prompts = [sample.prompt for sample in run.evaluation.samples if sample.kind == "class"]
    return next(iter(prompts), run.prior.class_prompt if run.prior else f"a photo of a {run.subject.class_noun}")


def draw_sample_grid(store: Store, evaluation: Evaluation, *, side: int = 128) -> bytes:
    """Return a PNG grid: base samples in the first row, tuned ones in the second."""
    rows = [[s for s in evaluation.samples if s.side == name and s.kind == "subject"] for name in ("base", "tuned")]
    width = max(1, *(len(row) for row in rows))  # without samples, an empty cell
    grid = Image.new("RGB", (width * side, len(rows) * side), "white")
    for y, row in enumerate(rows):
        for x, sample in enumerate(row):
            picture = decode_png(read_verified(store, sample.image))
            # Upscaled, a small image keeps its pixels visible.
            resample = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            grid.paste(picture.resize((side, side), resample), (x * side, y * side))
    return encode_png(grid)


def draw_losses(losses: Sequence[LossRow]) -> Markup:
    """Return the chart of losses and learning rate by step; training losses are running means."""
    series = []
    for name, role in (("instance_loss", "tuned"), ("prior_loss", "base"), ("validation_loss", "other")):
        points = [
            (float(row.step), float(value))
            for row in losses
            if (value := getattr(row, name)) is not None and charts.is_drawable(value)
        ]
        if points:
            is_measured = name == "validation_loss"
            shown = points if is_measured else smooth(points)
            series.append(charts.Series(name.replace("_", " "), shown, role, has_dots=is_measured))
    rates = [(float(row.step), row.learning_rate) for row in losses if row.learning_rate is not None]
    # Not smoothed: the schedule has no noise, and a corner of it is no step of a mean.
    rate = charts.Series("learning rate", thin(rates, MAX_POINTS), "path") if rates else None
    return charts.draw_lines(series, ("optimizer step", "loss (mean squared error)"), right=rate)


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a centered running mean, thinned to at most 400 points; single losses vary with their timesteps."""
    window = max(1, len(points) // 12)
    result = []
    for i, (step, _) in enumerate(points):
        part = [value for _, value in points[max(0, i - window) : i + window + 1]]
        result.append((step, sum(part) / len(part)))
    return result[:: max(1, len(result) // 200)]


def draw_plane(evaluation: Evaluation, checkpoints: Sequence[CheckpointRow], knee: int | None) -> Markup:
    """Return base, tuned and retained checkpoints by subject fidelity and prompt fidelity; the knee is named."""
    rows = {row.key: row for row in list_metrics(evaluation)}
    if "dino" not in rows or "clip_t" not in rows:
        return Markup("")
    x, y, step = rows["dino"], rows["clip_t"], evaluation.published_step
    others = [row for row in checkpoints if not row.is_published]
    points = [
        charts.PlanePoint(f"step {row.step}{' (knee)' * (row.step == knee)}", row.dino, row.clip_t, "other")
        for row in others
    ]
    name = f"tuned: step {step} (knee)" if step == knee else "tuned"
    points.insert(sum(row.step < step for row in others), charts.PlanePoint(name, x.tuned, y.tuned, "tuned"))
    base = charts.PlanePoint("base", x.base, y.base, "base")
    return charts.draw_plane([base, *points], ("DINO: subject fidelity", "CLIP-T: prompt fidelity"))
