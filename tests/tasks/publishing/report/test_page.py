"""The report's tables, galleries and curves."""

import re
from dataclasses import replace

import pytest
from markupsafe import escape

from tasks.images import decode_png
from tasks.manifests.base import Machine, Manifest, ModelRef
from tasks.manifests.evaluation import Evaluation, PromptSet, SubjectMetrics
from tasks.manifests.run_summary import EvaluatedModel
from tasks.manifests.scoring import CheckpointRank, JudgeReliability, Scorecard
from tasks.manifests.training import LossRow, PhotoCrops
from tasks.publishing.export import headline_metrics, sum_llm_costs
from tasks.publishing.report.page import ReportInputs, draw_losses, draw_sample_grid, render_report, smooth
from tasks.publishing.report.tables import list_checkpoints, list_metrics, list_samples
from tasks.publishing.steps import tag_prompts
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.report import GATE, make_evaluation, make_run, make_table, with_grades, with_judgements


def make_inputs(store: LocalStore) -> ReportInputs:
    rows = [("a.b", "<c>")]
    return ReportInputs("a <fish>", make_run(store), losses=[LossRow(step=1, loss=1.0)], config_rows=rows, gate=GATE)


def test_a_photo_without_inspection_and_a_run_without_grades_or_class_images_are_shown(store: LocalStore) -> None:
    html = render_report(store, make_inputs(store))
    assert "1 accepted, 1 rejected" in html
    assert "a photo of sks fish" in html


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/ann/photos/rex", "\u2026/rex"),
        ("/home/ann/photos/", "\u2026/photos"),
        ("/home/ann", "\u2026/"),
        ("file:/home/ann/prompts.yaml", "file:\u2026/prompts.yaml"),
        ("file:///home/ann/prompts.yaml", "file://\u2026/prompts.yaml"),
        ("sqlite:////home/ann/mlflow.db", "sqlite:///\u2026/mlflow.db"),
        ("a cat /w/ hat/", "a cat /w/ hat/"),
        ('["/home/ann/a.png", "b/c.png"]', '["\u2026/a.png", "b/c.png"]'),
        ("s3://bucket/photos/rex", "s3://bucket/photos/rex"),
        ("http://127.0.0.1:4200/api/x", "http://127.0.0.1:4200/api/x"),
        ("../photos/rex", "../photos/rex"),
        ("runwayml/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
        ("a photo of a dog/cat", "a photo of a dog/cat"),
    ],
)
def test_a_report_names_no_absolute_folder(store: LocalStore, value: str, shown: str) -> None:
    inputs = replace(make_inputs(store), config_rows=[("subject.source", value)], defaults={"seed": "1"})
    html = render_report(store, inputs)
    assert html.count(f"<code>{escape(shown)}</code>") == 2  # among all settings, and among those that were changed


def make_evaluated(store: LocalStore) -> ReportInputs:
    run = replace(make_run(store), prior=None)
    model = EvaluatedModel(location="/models/<b>.safetensors", kind="lora", sha256="0")
    rows = [("a.b", "c")]
    return ReportInputs("One fish", run, losses=[], config_rows=rows, gate=GATE, evaluated=model)


def test_the_report_of_a_model_from_elsewhere_has_no_training(store: LocalStore) -> None:
    html = render_report(store, make_evaluated(store))
    assert "A LoRA that was trained elsewhere, <code>/models/&lt;b&gt;.safetensors</code>" in html
    assert 'id="training"' not in html
    assert 'href="#training"' not in html
    assert "training prompt" not in html
    assert 'id="training"' in render_report(store, make_inputs(store))


def test_an_evaluation_without_samples_has_a_report_and_no_verdict(store: LocalStore) -> None:
    run = make_run(store)
    empty = {"samples": (), "metrics": {}, "drift": {}, "sample_metrics": {}}
    evaluation = run.evaluation.model_copy(update=empty)
    for inputs in (make_inputs(store), make_evaluated(store)):
        html = render_report(store, replace(inputs, manifests=replace(inputs.manifests, evaluation=evaluation)))
        assert "This evaluation holds no samples." in html
        assert "DINO was not measured: no verdict" in html
        assert "Prior drift: not measured" in html
    assert decode_png(draw_sample_grid(store, evaluation, side=16)).size == (16, 32)


def test_names_and_values_are_escaped(store: LocalStore) -> None:
    html = render_report(store, make_inputs(store))
    for raw, shown in (("<i>.jpg", "&lt;i&gt;.jpg"), ("a <fish>", "a &lt;fish&gt;"), ("<c>", "&lt;c&gt;")):
        assert raw not in html
        assert shown in html


def test_grades_and_prompts_have_gains_with_intervals(store: LocalStore) -> None:
    inputs = make_inputs(store)
    html = render_report(store, replace(inputs, manifests=with_grades(inputs.manifests)))
    assert html.count("+2.000 (+1.250 to +2.750)") == 1  # at the top
    assert html.count('+2.000<div class="small soft">+1.250 to +2.750</div>') == 3  # a grade of each axis
    assert "0.50 to 1.50" in html
    prompts = html.split("By prompt</h3>", 1)[1].split("</table>", 1)[0]
    assert '+0.300<div class="small soft">+0.250 to +0.350</div>' in prompts
    accessory = prompts.split("very long scarf", 1)[1]
    assert "+0.300</td>" in accessory, "two seeds have no interval"


def test_grades_without_evidence_are_named_so_and_show_none(store: LocalStore) -> None:
    inputs = make_inputs(store)
    run = with_judgements(inputs.manifests)
    alone = replace(run, scoring=run.scoring.model_copy(update={"evidence": "none"}))
    pages = [render_report(store, replace(inputs, manifests=each)) for each in (run, alone)]
    assert ["judge's evidence" in page for page in pages] == [True, False]
    assert ["asked for grades alone" in page for page in pages] == [False, True]
    assert all("3 of 4" in page for page in pages)


def test_the_lineage_names_the_set_of_prompts_and_its_version(store: LocalStore) -> None:
    inputs = make_inputs(store)
    assert "Prompts: 2 of evaluation.prompts, no shipped set" in render_report(store, inputs)
    run = inputs.manifests
    evaluation = run.evaluation.model_copy(update={"prompt_set": PromptSet(name="living/quick", version=3)})
    page = render_report(store, replace(inputs, manifests=replace(run, evaluation=evaluation)))
    assert "Prompts: the set living/quick, version 3" in page
    assert tag_prompts(evaluation) == {"likeness.prompt_set": "living/quick, version 3"}
    assert tag_prompts(run.evaluation) == {}


def test_gap_closed_is_the_fraction_between_base_and_ceiling(store: LocalStore) -> None:
    rows = {row.key: row for row in list_metrics(make_evaluation(store))}
    assert rows["dino"].share == pytest.approx(0.5)
    assert rows["clip_i"].share == pytest.approx(0.5)
    assert rows["clip_t"].share is None


def test_samples_are_paired_by_prompt_and_seed_in_configured_order(store: LocalStore) -> None:
    pairs = list_samples(make_evaluation(store), {})
    assert [pair.shown.prompt for pair in pairs] == ["a photo of sks fish", "sks fish at night"]
    assert all(pair.base and pair.tuned and pair.base.prompt == pair.tuned.prompt for pair in pairs)
    assert [pair.rank("dino") for pair in pairs] == pytest.approx([0.2, 0.3])
    assert pairs[0].rank("judge") is None


def with_candidate(store: LocalStore, evaluation: Evaluation, *, dino: float = 0.9) -> Evaluation:
    """Return an evaluation with a sample of step 400 beside the published step 800."""
    published = evaluation.samples[2]
    image = StageFolder(store, "evaluation", "k").put("c.png", b"x")
    drawn = published.model_copy(update={"kind": "candidate", "step": 400, "image": image})
    return evaluation.model_copy(
        update={
            "samples": (*evaluation.samples, drawn),
            "sample_metrics": {**evaluation.sample_metrics, image.key: SubjectMetrics(dino=dino, clip_i=0, clip_t=0)},
        }
    )


def make_rank(step: int) -> CheckpointRank:
    return CheckpointRank(step=step, is_published=step == 800, strength=0.5, wins=3, losses=0, undecided=1)


def test_the_checkpoint_table_shows_the_mean_metrics_of_compared_samples(store: LocalStore) -> None:
    evaluation = with_candidate(store, make_evaluation(store))
    scores = Scorecard.model_construct(checkpoints=tuple(map(make_rank, (400, 800))))
    rows = list_checkpoints(evaluation, scores)
    assert [(row.step, row.dino.mean) for row in rows] == [(400, 0.9), (800, pytest.approx(0.2))]
    assert [row.rank.wins if row.rank else None for row in rows] == [3, 3]


def test_a_rank_without_samples_is_left_out_of_the_checkpoint_table(store: LocalStore) -> None:
    assert list_checkpoints(make_evaluation(store), Scorecard.model_construct(checkpoints=(make_rank(7),))) == []


def test_measured_checkpoints_are_shown_though_the_judge_compared_none(store: LocalStore) -> None:
    inputs = make_inputs(store)
    run = replace(inputs.manifests, evaluation=with_candidate(store, inputs.manifests.evaluation))
    assert run.scoring.checkpoints == ()
    html = render_report(store, replace(inputs, manifests=run))
    table = html.split('aria-label="Checkpoints"', 1)[1].split("</table>", 1)[0]
    assert '<td data-label="step">400</td>' in table and "0.900" in table
    assert '<table class="stack">' in table
    assert "Bradley-Terry" not in table and "won" not in table
    plane = html.split("Fidelity and editability", 1)[1].split("</svg>", 1)[0]
    assert ">step 400</text>" in plane
    ranked = replace(run, scoring=run.scoring.model_copy(update={"checkpoints": (make_rank(400), make_rank(800))}))
    assert "Bradley-Terry" in render_report(store, replace(inputs, manifests=ranked))


def test_checkpoints_have_intervals_where_there_are_enough_prompts(store: LocalStore) -> None:
    evaluation = make_evaluation(store)
    images = StageFolder(store, "evaluation", "k")
    samples, metrics = [], {}
    for step in (None, 400):
        for number in range(8):
            image = images.put(f"many-{step}-{number}.png", b"x")
            kind = "subject" if step is None else "candidate"
            update = {"image": image, "prompt": f"prompt {number}", "kind": kind, "step": step, "side": "tuned"}
            samples.append(evaluation.samples[0].model_copy(update=update))
            metrics[image.key] = SubjectMetrics(dino=number / 10, clip_i=0, clip_t=0.3)
    many = evaluation.model_copy(update={"samples": tuple(samples), "sample_metrics": metrics})
    first, second = list_checkpoints(many, Scorecard.model_construct(checkpoints=()))
    assert (first.step, second.step, second.is_published) == (400, 800, True)
    assert first.dino.mean == pytest.approx(0.35)
    assert first.dino.low is not None and first.dino.high is not None
    assert 0 < first.dino.low < 0.35 < first.dino.high < 0.7
    assert first.clip_t.low is None, "equal values have no interval"


def with_training(inputs: ReportInputs, **changes: object) -> ReportInputs:
    """Return inputs whose tuned model has other fields."""
    run = inputs.manifests
    return replace(inputs, manifests=replace(run, training=run.training.model_copy(update=changes)))


def test_digests_are_shown_in_full_and_can_be_selected_without_scripts(store: LocalStore) -> None:
    base = ModelRef(location="m", revision="r1", sha256="0123456789abcdef" * 4)
    inputs = with_training(make_inputs(store), base_model=base)
    html = render_report(store, inputs)
    lineage = html.split('<h2 id="lineage">', 1)[1]
    digests = [base.sha256, *(stage.compute_content_digest() for stage in inputs.manifests.ordered())]
    for whole in digests:
        assert f'<code class="whole">{whole}</code></details>' in lineage
        assert f"{whole[:10]}…</code></summary>" in lineage


def test_machines_of_training_and_evaluation_are_named(store: LocalStore) -> None:
    trained = Machine(system="Linux x86_64", device="NVIDIA <H200>", num_devices=2, versions={"torch": "2.9"})
    inputs = with_training(make_inputs(store), machine=trained)
    html = render_report(store, inputs)
    assert "<li>Training: 2 × NVIDIA &lt;H200&gt; on Linux x86_64; torch 2.9</li>" in html
    assert "<li>Evaluation:" not in html, "older manifests name none"
    evaluation = inputs.manifests.evaluation.model_copy(update={"machine": Machine(system="s", device="cpu")})
    html = render_report(store, replace(inputs, manifests=replace(inputs.manifests, evaluation=evaluation)))
    assert "<li>Evaluation: cpu on s; </li>" in html


def test_where_a_stage_was_computed_is_no_part_of_its_result(store: LocalStore) -> None:
    run = make_run(store)
    for manifest in (run.training, run.evaluation):
        elsewhere = manifest.model_copy(update={"machine": Machine(system="other", device="other")})
        assert elsewhere.compute_content_digest() == manifest.compute_content_digest()


def test_photos_show_the_crops_that_training_saw(store: LocalStore) -> None:
    inputs = make_inputs(store)
    [image] = inputs.manifests.subject.images
    crops = PhotoCrops(photo=image.image, boxes=((0.25, 0.0, 0.75, 1.0),))
    html = render_report(store, with_training(inputs, crops=(crops,)))
    assert '<rect class="crop" x="16.0" y="0.0" width="32.0" height="64.0"/>' in html
    assert "Frames are the crops that training saw." in html
    whole = render_report(store, with_training(inputs, crops=(crops.model_copy(update={"boxes": ((0, 0, 1, 1),)}),)))
    assert "<rect" not in whole and "Frames are" not in whole
    other = PhotoCrops(photo=image.image.model_copy(update={"key": "01-subject/k/other.png"}), boxes=crops.boxes)
    assert "held out for validation" in render_report(store, with_training(inputs, crops=(other,)))
    assert "held out" not in html


def test_the_grid_has_base_above_tuned(store: LocalStore) -> None:
    grid = decode_png(draw_sample_grid(store, make_evaluation(store), side=64))
    assert grid.size == (128, 128)


def test_loss_curves_share_one_scale_and_stay_within_the_axes() -> None:
    losses = [LossRow(step=i, loss=1.0, instance_loss=2.0 - i / 50, prior_loss=0.5) for i in range(100)]
    losses[50] = losses[50].model_copy(update={"validation_loss": 1.5})
    chart = draw_losses(losses)
    lines = re.findall(r'polyline class="line (\w+)" points="([^"]*)"', chart)
    assert [role for role, _ in lines] == ["tuned", "base", "other"]
    _, _, width, height = (float(v) for v in re.search(r'viewBox="([^"]*)"', chart)[1].split())  # type: ignore[index]
    points = [tuple(map(float, point.split(","))) for _, text in lines for point in text.split()]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    instance = [tuple(map(float, point.split(","))) for point in lines[0][1].split()]
    assert instance[-1][1] > instance[0][1]  # it falls, and y points downwards
    assert "optimizer step" in chart
    assert draw_losses([]) == ""


def test_the_learning_rate_has_an_axis_of_its_own() -> None:
    losses = [LossRow(step=i, loss=1.0, instance_loss=0.5, learning_rate=1e-5 * (100 - i)) for i in range(100)]
    chart = draw_losses(losses)
    lines = re.findall(r'polyline class="line (\w+)" points="([^"]*)"', chart)
    assert [role for role, _ in lines] == ["tuned", "path"]
    _, _, width, height = (float(v) for v in re.search(r'viewBox="([^"]*)"', chart)[1].split())  # type: ignore[index]
    points = [tuple(map(float, point.split(","))) for point in lines[1][1].split()]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert points[-1][1] > points[0][1] + 100  # it falls over the whole height, and y points downwards
    assert ">0.001</text>" in chart
    assert "learning rate 0.001 to 1e−05" in chart
    assert "learning rate" not in draw_losses([LossRow(step=1, loss=1.0, instance_loss=1.0)])


def test_smoothing_leaves_a_constant_curve_unchanged() -> None:
    constant = [(float(step), 3.0) for step in range(40)]
    assert smooth(constant) == constant


def test_headline_metrics_are_flat_and_complete(store: LocalStore) -> None:
    from tasks.manifests.scoring import SideScores

    scores = StageFolder(store, "scoring", "k").finish(
        Scorecard(
            **StageFolder(store, "scoring", "k").head(1, counts={}),
            served_model="m",
            judgements=(),
            failed=(),
            scores={"tuned": SideScores(concept_preservation=3, prompt_following=4, image_quality=2)},
            reliability=JudgeReliability(controls=(), alpha={}, num_repeated=0, is_comparable=True, is_reliable=False),
        )
    )
    figures = headline_metrics(make_evaluation(store), scores)
    assert figures["tuned/dino"] == 0.5
    assert figures["ceiling/clip_t"] == 0.5
    assert figures["tuned/concept_preservation"] == 3
    assert len(figures) == 6 + 4 + 3 + 3 + 1


def test_headline_metrics_have_intervals_and_gains(store: LocalStore) -> None:
    run = with_grades(make_run(store))
    evaluation = run.evaluation.model_copy(update={"estimates": make_table(has_interval=True)})
    figures = headline_metrics(evaluation, run.scoring)
    assert (figures["tuned/dino_low"], figures["tuned/dino_high"]) == (pytest.approx(0.45), pytest.approx(0.55))
    assert figures["gain/dino"] == 0.3
    assert figures["gain/clip_t_low"] == pytest.approx(0.25)
    assert (figures["tuned/concept_preservation_low"], figures["gain/image_quality_high"]) == (2.5, 2.75)
    none = evaluation.model_copy(update={"estimates": make_table(has_interval=False)})
    assert not [name for name in headline_metrics(none, run.scoring) if "dino_low" in name]


def test_llm_cost_sums_over_stages_and_is_unknown_if_any_stage_is_unknown() -> None:
    def stage(cost: float | None, calls: int) -> Manifest:
        return Manifest.model_construct(cost_usd=cost, counts={"llm_calls": calls})

    assert sum_llm_costs([stage(0.01, 11), stage(0.02, 100)]) == (
        {"llm/calls": 111.0, "llm/cost_usd": pytest.approx(0.03)}, "0.03000 USD",
    )  # fmt: skip
    assert sum_llm_costs([stage(0.01, 11), stage(None, 100)]) == ({"llm/calls": 111.0}, "unknown")
