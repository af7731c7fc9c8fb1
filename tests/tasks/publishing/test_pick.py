"""The published checkpoint: each value of publishing.pick publishes other weights, and says why."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.compose import compile_request
from conf.overrides import parse_overrides
from tasks.diffusion.types import SamplingRequest
from tasks.errors import ConfigError
from tasks.evaluation.config import EvaluationConfig
from tasks.evaluation.steps import EvaluationInputs, draw_samples
from tasks.images import encode_png
from tasks.manifests.evaluation import Evaluation, Sample, SubjectMetrics
from tasks.manifests.training import TunedModel
from tasks.publishing.config import PublishingConfig
from tasks.publishing.export import export_model
from tasks.publishing.model_card import CardInputs
from tasks.publishing.pick import Pick, pick_checkpoint
from tasks.publishing.report.page import ReportInputs, render_report
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder, fetch_folder
from tasks.stage.context import Runtime
from tasks.training.callbacks import validation as callbacks
from tasks.training.steps import list_files
from tests.support.config import make_config
from tests.support.report import GATE, make_run
from tests.support.tiny import draw_photo, tiny_diffusion_config, train_here

KNEE = {2: (0.2, 0.70), 4: (0.5, 0.68), 6: (0.55, 0.5), 8: (0.58, 0.4)}
"""DINO and CLIP-T by step; after step 4 fidelity costs editability. Training publishes step 6."""


@pytest.fixture
def tuned(tmp_path: Path, store: LocalStore, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> TunedModel:
    """A tiny model of eight steps, four of which are retained; step 6 has the lowest validation loss."""
    measured = iter((0.9, 0.6, 0.3, 0.5))
    monkeypatch.setattr(callbacks, "compute_validation_loss", lambda module, batches: torch.tensor(next(measured)))
    validation = {"validation_steps": 2, "keep": "best", "save_top_k": 4}
    run = train_here(tmp_path / "training", tiny_model_folder, method="lora", validation=validation)
    folder = StageFolder(store, "training", "k")
    for root in (run.model, run.candidates):
        for path in list_files(root.rglob("*")):
            folder.put_file(path.relative_to(run.folder).as_posix(), path)
    base = make_run(store).training
    refs = tuple(folder.refs.values())
    model = tuple(ref for ref in refs if "/model/" in ref.key)
    published = json.loads(run.result.read_text())["published_step"]
    changes = {"stage_key": "k", "model": model, "objects": refs, "num_steps": 8, "published_step": published}
    return base.model_copy(update={**changes, "method": "lora"})


def evaluate(store: LocalStore, tuned: TunedModel, values: dict[int, tuple[float, float]]) -> Evaluation:
    """Return an evaluation of all retained steps with given metrics."""
    folder, evaluation = StageFolder(store, "evaluation", "checkpoints"), make_run(store).evaluation
    samples, metrics = [], {}
    for step, (dino, clip_t) in values.items():
        ref = folder.put(f"{step}.png", encode_png(draw_photo(0, size=32)))
        is_published = step == tuned.published_step
        samples.append(
            Sample(
                image=ref, side="tuned", kind="subject" if is_published else "candidate", prompt="p", class_prompt="c",
                seed=1, step=None if is_published else step,
            )
        )  # fmt: skip
        metrics[ref.key] = SubjectMetrics(dino=dino, clip_i=0, clip_t=clip_t)
    changes = {"samples": tuple(samples), "sample_metrics": metrics, "published_step": tuned.published_step}
    return evaluation.model_copy(update=changes)


def pick(store: LocalStore, tuned: TunedModel, value: str, values: dict[int, tuple[float, float]] = KNEE) -> Pick:
    config = make_config(PublishingConfig, pick=value)
    return pick_checkpoint(config, tuned, evaluate(store, tuned, values))


def test_each_value_of_pick_publishes_other_weights(tmp_path: Path, store: LocalStore, tuned: TunedModel) -> None:
    assert tuned.published_step == 6
    files = {}
    for value, step, reason in (
        ("best", 6, "the best validated step"),
        ("last", 8, "the latest of the retained steps 2, 4, 6, 8"),
        ("knee", 4, "the knee of DINO and CLIP-T over the retained steps 2, 4, 6, 8"),
    ):
        found = pick(store, tuned, value)
        assert (found.model.published_step, found.reason) == (step, reason)
        run = replace(make_run(store), training=found.model, published_because=found.reason)
        local = tmp_path / value
        refs = export_model(StageFolder(store, "publishing", value), run, card=CardInputs("T", GATE), local=local)
        assert any(ref.key.endswith("/model/pytorch_lora_weights.safetensors") for ref in refs)
        files[value] = load_file(local / "pytorch_lora_weights.safetensors")
        card = (local / "README.md").read_text()
        assert f"| published | step {step}, {reason} |" in card
        lineage = json.loads((local / "lineage.json").read_text())
        assert (lineage["published_step"], lineage["published_because"]) == (step, reason)
        page = render_report(
            store, ReportInputs("T", replace(run, evaluation=make_run(store).evaluation), (), (), GATE)
        )
        assert f"(published: step {step}, {reason})" in page
    key = next(key for key in files["best"] if "lora_B" in key)
    assert len({files[value][key].numpy().tobytes() for value in files}) == 3
    # As training wrote them.
    candidate = tmp_path / "training" / "run" / "candidates" / "step-00000004" / "pytorch_lora_weights.safetensors"
    assert torch.equal(files["knee"][key], load_file(candidate)[key])


def test_the_step_that_training_published_becomes_a_candidate(
    store: LocalStore, tuned: TunedModel, tmp_path: Path
) -> None:
    picked = pick(store, tuned, "last").model
    assert sorted(picked.find_candidates()) == [2, 4, 6]
    assert picked.find_candidates()[6] == list(tuned.model)
    assert picked.compute_content_digest() != tuned.compute_content_digest()  # evaluated anew
    weights = fetch_folder(store, picked.find_candidates()[6], below="model", folder=tmp_path / "six")
    assert (weights / "pytorch_lora_weights.safetensors").is_file()


def test_the_picked_checkpoint_is_what_is_evaluated(
    tmp_path: Path, store: LocalStore, tuned: TunedModel, tiny_model_folder: Path
) -> None:
    nothing: Any = None
    runtime = Runtime("r", store, llm=nothing, tracker=nothing, progress=nothing, live=nothing, work_folder=tmp_path)
    subject, config = make_run(store).subject, make_config(EvaluationConfig, num_inference_steps=2, guidance_scale=3.0)

    def draw(model: TunedModel, source: str | int) -> bytes:
        inputs = EvaluationInputs(config, tiny_diffusion_config(tiny_model_folder), model, subject)
        request = SamplingRequest(prompt="a photo of sks fish", seed=1)
        [(_, picture)] = draw_samples(inputs, source, [request], runtime=runtime)  # type: ignore[arg-type]
        return picture.tobytes()

    picked = pick(store, tuned, "knee").model
    assert draw(picked, "tuned") == draw(tuned, 4) != draw(tuned, "tuned")
    assert draw(picked, 6) == draw(tuned, "tuned")
    assert draw(picked, 8) == draw(tuned, 8)
    keys = [
        EvaluationInputs(config, tiny_diffusion_config(tiny_model_folder), m, subject).stage().key
        for m in (tuned, picked)
    ]
    assert keys[0] != keys[1]


def test_without_a_knee_or_another_checkpoint_training_decides(store: LocalStore, tuned: TunedModel) -> None:
    flat = {step: (0.5, 0.5) for step in KNEE}
    found = pick(store, tuned, "knee", flat)
    assert found.model is tuned
    assert found.reason == "the best validated step; DINO and CLIP-T have no knee over the retained steps 2, 4, 6, 8"
    single = tuned.model_copy(update={"objects": tuned.model, "published_step": 8})
    for value, reason in (("best", "the last step"), ("last", "the last step; no other checkpoint is retained")):
        found = pick(store, single, value, {8: (0.5, 0.5)})
        assert (found.model, found.reason) == (single, reason)


def test_a_knee_needs_three_retained_checkpoints() -> None:
    words = ["training.validation.validation_steps=2", "training.validation.keep=best", "publishing.pick=knee"]
    with pytest.raises(ConfigError, match=r"publishing.pick=knee needs 3 retained checkpoints.*save_top_k to 3"):
        compile_request(parse_overrides([*words, "training.validation.save_top_k=2"]))
    assert compile_request(parse_overrides([*words, "training.validation.save_top_k=3"])).publishing.pick == "knee"
    with pytest.raises(ConfigError, match=r"publishing.pick"):
        compile_request(parse_overrides(["publishing.pick=first"]))
