"""A report with everything in it: what the browser looks at."""

from dataclasses import replace

from tasks.images import encode_png
from tasks.manifests.base import Machine, ObjectRef
from tasks.manifests.evaluation import DriftMetrics, Estimate, PromptRow, Side, SubjectMetrics, Table
from tasks.manifests.prior import ClassImage
from tasks.manifests.run import RunManifests
from tasks.manifests.scoring import Agreement, CheckpointRank, ControlResult, Judgement, PairResult
from tasks.manifests.subject import RejectedImage
from tasks.manifests.training import LossRow, PhotoCrops
from tasks.metrics import METRICS
from tasks.publishing.report.page import ReportInputs
from tasks.publishing.report.usage import UsedModel, write_snippets
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.report import GATE, make_run, with_checkpoints, with_grades
from tests.support.tiny import draw_photo

SIDES: tuple[Side, ...] = ("base", "tuned")
KNEE = {200: (0.42, 0.66), 400: (0.61, 0.645), 800: (0.66, 0.51)}
"""DINO and CLIP-T of retained checkpoints by step."""
LONG = "a photo of {subject} wearing a very long scarf that ends far beyond any phone's screen"
KINDS = ("scene", "accessory", "property change", "style", "imaginative")
OWN = "composition_score_of_another_package"


def make_full_inputs(store: LocalStore) -> ReportInputs:
    """Return a run with checkpoints and a knee, controls, raters, dropped samples, rejected photos, and all metrics."""
    run = with_checkpoints(store, with_grades(make_run(store)), KNEE, published=800)
    run = with_scores(with_figures(with_pictures(store, run)))
    losses = [
        LossRow(step=step, loss=1.0, instance_loss=1 / step, prior_loss=0.5, learning_rate=2e-6 * (800 - step))
        for step in range(10, 800, 10)
    ]
    losses[40] = losses[40].model_copy(update={"validation_loss": 0.4})
    folder = "/home/ann/a-long-folder-name/" * 3
    prompts = '["a photo of {subject}", "' + LONG + '"]'
    rows = [
        ("training.learning_rate", "1e-5"),
        ("seed", "23"),
        ("subject.source", f"{folder}photos"),
        ("evaluation.prompts", prompts),
        ("store.endpoint", "http://" + "x" * 90),
    ]
    defaults = {**dict(rows), "training.learning_rate": "2e-6", "subject.source": "???"}
    snippets = write_snippets(UsedModel("fish", "sks", "stable_diffusion", "lora", "some/base", None))
    return ReportInputs("One fish", run, losses, rows, GATE, defaults, {"torch": "2"}, snippets)


def with_pictures(store: LocalStore, run: RunManifests) -> RunManifests:
    """Return a run with crops, rejected and quarantined photos, class samples, class images and sample grids."""

    def draw(stage: str, name: str, number: int) -> ObjectRef:
        return StageFolder(store, stage, "full").put(name, encode_png(draw_photo(number, size=64)))

    assert run.prior is not None
    sample = run.evaluation.samples[0]
    drawn = [
        sample.model_copy(
            update={
                "image": draw("evaluation", f"class-{side}-{n}.png", n),
                "side": side,
                "kind": "class",
                "prompt": "a photo of a fish",
                "seed": n,
            }
        )
        for side in SIDES
        for n in range(6)
    ]
    rejected = tuple(
        RejectedImage(
            source_name=f"IMG_{n}_{'x' * 40}.jpg",
            source_sha256=str(n),
            reason=reason,
            thumbnail=draw("subject", f"rejected/{n}.png", n),
        )
        for n, reason in enumerate(("no fish & no sea", "too blurred: sharpness 3, required 20"))
    )
    crops = PhotoCrops(photo=run.subject.images[0].image, boxes=((0.25, 0.0, 0.75, 1.0),))
    grids = tuple(draw("training", f"samples/step-{100 * n:08d}.png", n) for n in range(1, 4))
    images = tuple(ClassImage(image=draw("prior", f"images/{n}.png", n), seed=n) for n in range(9))
    return replace(
        run,
        subject=run.subject.model_copy(
            update={
                "rejected": rejected[:1],
                "quarantined": rejected[1:],
                "traits": ("blue fins",),
                "leaks": ("0.png: blue",),
                "warnings": ("the web calls it a trout, not a fish",),
                "sources": ("https://example.org/" + "y" * 80,),
            }
        ),
        prior=run.prior.model_copy(update={"images": images}),
        training=run.training.model_copy(
            update={
                "crops": (crops,),
                "objects": grids,
                "num_steps": 800,
                "published_step": 800,
                "machine": Machine(
                    system="Linux x86_64", device="NVIDIA H200", num_devices=2, versions={"torch": "2.9"}
                ),
            }
        ),
        evaluation=run.evaluation.model_copy(update={"samples": (*run.evaluation.samples, *drawn)}),
    )


def make_estimates(base: float, tuned: float, half: float) -> dict[str, Estimate]:
    means = {"base": base, "tuned": tuned, "gain": tuned - base}
    return {side: Estimate(mean=mean, low=mean - half, high=mean + half, num=12) for side, mean in means.items()}


def with_figures(run: RunManifests) -> RunManifests:
    """Return a run with every metric of the registry, one of another package, five kinds and as many prompts."""
    headline: Table = {
        "dino": make_estimates(0.32, 0.66, 0.06),
        "clip_i": make_estimates(0.61, 0.74, 0.05),
        "clip_t": make_estimates(0.64, 0.51, 0.05),
    }
    for by_side in headline.values():
        by_side["ceiling"] = Estimate(mean=0.8, low=0.71, high=0.89, num=5)
    others = {name: make_estimates(0.2, 0.35, 0.08) for name in METRICS if name not in headline}
    estimates = {**headline, **others, "sharpness": make_estimates(15.8, 212.4, 9), OWN: make_estimates(-3, 1234.5, 40)}
    measured = {
        key: SubjectMetrics.model_validate(
            {**dict(found), "nearest": found.dino + 0.1, "sharpness": 212.4, OWN: 1234.5, "copies": float(n % 3 == 0)}
        )
        for n, (key, found) in enumerate(run.evaluation.sample_metrics.items())
    }
    changes = {
        "estimates": estimates,
        "metrics": {side: SubjectMetrics(**{key: headline[key][side].mean for key in headline}) for side in SIDES},
        "drift": {
            side: DriftMetrics(pres=others["pres"][side].mean, dino_div=others["dino_div"][side].mean) for side in SIDES
        },
        "kinds": dict.fromkeys(KINDS, headline),
        "prompts": tuple(
            PromptRow(template=LONG if kind == "style" else f"{{subject}} as a {kind}", kind=kind, values=headline)
            for kind in KINDS
        ),
        "sample_metrics": measured,
        "dropped": {"base": 1, "tuned": 2},
    }
    return replace(run, evaluation=run.evaluation.model_copy(update=changes))


def with_scores(run: RunManifests) -> RunManifests:
    """Return a run that the judge graded, with evidence, controls, repeats, pairs, checkpoints and other raters."""
    grades = tuple(
        Judgement(
            sample=sample.image,
            side=sample.side,
            prompt=sample.prompt,
            evidence=f"evidence {number} <script>",
            concept_preservation=number % 5,
            prompt_following=3,
            image_quality=2,
            tie_breaks=("image_quality",) if number == 1 else (),
        )
        for number, sample in enumerate(run.evaluation.samples)
        if sample.kind == "subject"
    )
    controls = tuple(
        ControlResult(name=name, text="the subject itself; at least", value=value, limit=3, is_passed=value >= 3)
        for name, value in (("photo of the subject", 3.75), ("photo of another fish", 1.25))
    )
    axes = ("concept_preservation", "prompt_following", "image_quality")
    reliability = run.scoring.reliability.model_copy(
        update={
            "controls": controls,
            "num_repeated": 8,
            "alpha": {"concept_preservation": 0.81, "prompt_following": None, "image_quality": 0.44},
            "spearman": {"concept_preservation": 0.62, "prompt_following": None},
            "others": (
                Agreement(
                    rater="people", num_samples=24, kappa=dict.fromkeys(axes, 0.5), spearman=dict.fromkeys(axes, 0.6)
                ),
            ),
        }
    )
    ranks = tuple(
        CheckpointRank(step=step, is_published=step == 800, strength=0.3, wins=3, losses=4, undecided=1)
        for step in KNEE
    )
    pairs = PairResult(num_pairs=8, tuned_wins=5, base_wins=1, ties=1, inconsistent=1, tuned_strength=0.8)
    changes = {"judgements": grades, "reliability": reliability, "checkpoints": ranks, "pairs": pairs}
    return replace(run, scoring=run.scoring.model_copy(update=changes))
