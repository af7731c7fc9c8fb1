"""Options of the evaluation stage: without its option a test here fails."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conf.compose import compile_request
from conf.overrides import parse_overrides
from tasks.diffusion.registry import load_model
from tasks.diffusion.sampling.job import sample_in_batches
from tasks.diffusion.types import SamplingRequest
from tasks.errors import ConfigError
from tasks.evaluation.comparison import find_other_settings
from tasks.evaluation.config import EvaluationConfig
from tasks.evaluation.sampling import generate_samples, plan_job, plan_samples
from tasks.evaluation.steps import EvaluationInputs, describe_protocol, draw_samples
from tasks.manifests.evaluation import Protocol
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.config import make_config
from tests.support.report import make_run
from tests.support.tiny import CountingModel, tiny_diffusion_config

SMALL = {
    "prompts": ("a photo of {subject}",), "num_images_per_prompt": 2, "num_class_images": 2, "num_inference_steps": 2,
    "batch_size": 2,
}  # fmt: skip


def plan(**changes: Any) -> tuple[EvaluationConfig, Any]:
    config = make_config(EvaluationConfig, **{**SMALL, **changes})
    return config, plan_samples(config, class_noun="fish", identifier_token="sks", class_prompt="a photo of a fish")


def test_the_protocol_names_every_sampling_setting_and_the_encoders_but_not_lpips() -> None:
    def describe(*words: str) -> Protocol:
        config = compile_request(parse_overrides(list(words)))
        return describe_protocol(config.evaluation, config.diffusion)

    plain = describe()
    assert plain.encoders
    assert describe("evaluation.encoders.lpips=none", "evaluation.seed=3") == plain
    assert describe("evaluation.encoders.dino_resize=300").encoders != plain.encoders
    for name, value in {
        "evaluation.num_inference_steps": "7", "evaluation.guidance_scale": "2.0", "diffusion.sampler": "euler",
        "diffusion.resolution": "32", "evaluation.negative_prompt": "blurry", "evaluation.guidance_rescale": "0.5",
        "evaluation.lora_scale": "0.5",
    }.items():  # fmt: skip
        found = describe(f"{name}={value}")
        setting = name.rpartition(".")[2]
        assert find_other_settings(found, plain)[0].startswith(f"{setting} {value}, not ")


def test_another_version_of_a_set_is_another_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(LocalStore(tmp_path))
    config = compile_request(parse_overrides(["evaluation=quick", f"subject.class_noun={run.subject.class_noun}"]))
    inputs = EvaluationInputs(config.evaluation, config.diffusion, run.training, run.subject)
    found = inputs.find_prompt_set()
    assert found is not None
    assert found.show() == "living/quick, version 1"
    key = inputs.stage().key
    monkeypatch.setattr("tasks.evaluation.prompt_sets.find_version", lambda kind: 2)
    assert inputs.stage().key != key


def draw(folder: Path, model: Path, **changes: Any) -> tuple[list[str], list[int]]:
    """Return the samples' digests, and the sizes of the batches that they were drawn in."""
    config, planned = plan(**changes)
    diffusion = tiny_diffusion_config(model)
    counted: Any = CountingModel(load_model(diffusion))
    drawn = generate_samples(
        StageFolder(LocalStore(folder), "evaluation", "k"), planned,
        draw=lambda side, requests: sample_in_batches(counted, plan_job(diffusion, config, requests, weights=None)),
        on_progress=lambda done, total: None,
    )  # fmt: skip
    return [sample.image.sha256 for sample in drawn], counted.sizes


def test_the_sampling_plan_follows_the_configured_prompts_counts_and_seed() -> None:
    _, planned = plan(prompts=("{subject} at night",), num_images_per_prompt=3, num_class_images=4, seed=50)
    tuned = [sample for sample in planned if sample.side == "tuned"]
    assert [(p.prompt, p.seed) for p in tuned if p.kind == "subject"] == [
        ("sks fish at night", seed) for seed in (50, 51, 52)
    ]
    assert [p.seed for p in tuned if p.kind == "class"] == [50, 51, 52, 53]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_inference_steps": 4}, {"guidance_scale": 2.0}, {"negative_prompt": "snow on the beach"},
        {"guidance_rescale": 0.9},
    ],
)  # fmt: skip
def test_the_sampling_options_change_the_samples(
    tmp_path: Path, tiny_model_folder: Path, changes: dict[str, Any]
) -> None:
    plain, _ = draw(tmp_path / "plain", tiny_model_folder)
    other, _ = draw(tmp_path / "other", tiny_model_folder, **changes)
    assert plain != other


def test_samples_are_generated_in_batches_of_batch_size(tmp_path: Path, tiny_model_folder: Path) -> None:
    _, sizes = draw(tmp_path, tiny_model_folder, batch_size=3)
    assert sizes == [3, 1, 3, 1]


def test_a_sample_does_not_depend_on_the_prompts_and_seeds_that_share_its_batch(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    prompts = ("a photo of {subject}", "{subject} in the snow", "{subject} on the beach")
    pictures = []
    for size in (1, 5):
        draw(tmp_path / str(size), tiny_model_folder, prompts=prompts, batch_size=size)
        paths = sorted((tmp_path / str(size)).rglob("*.png"))
        pictures.append([np.asarray(Image.open(path), int) for path in paths])
    assert len(pictures[0]) == 2 * (3 * 2 + 2)
    # Matrix products sum in another order for another batch size: one level of 255 at most.
    assert max(np.abs(one - other).max() for one, other in zip(*pictures, strict=True)) <= 1


def test_sampling_resumes_after_the_last_stored_image(tmp_path: Path, tiny_model_folder: Path) -> None:
    draw(tmp_path, tiny_model_folder)
    lost = sorted(tmp_path.rglob("*.png.ref"))[3]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png") if f"{path.name}.ref" != lost.name}
    lost.unlink()
    _, sizes = draw(tmp_path, tiny_model_folder)
    assert sizes == [1]
    assert {path: path.stat().st_mtime_ns for path in kept if path.parent != lost.parent} == {
        path: at for path, at in kept.items() if path.parent != lost.parent
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["diffusion=flux-dev", "evaluation.negative_prompt=fog"], "evaluation.negative_prompt: guidance of flux"),
        (
            ["diffusion=sd35-medium", "evaluation.guidance_rescale=0.5"],
            "evaluation.guidance_rescale: stable_diffusion_3",
        ),
    ],
)
def test_a_sampling_option_that_the_family_lacks_is_rejected_before_training(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_request(parse_overrides(["subject.source=x", "subject.class_noun=dog", "llm=openai", *words]))


def test_num_devices_selects_sampling_on_several_devices(tmp_path: Path) -> None:
    nothing: Any = None
    for num_devices, message in ((2, r"on device \d failed"), (1, r"^(?!.*on device)")):
        config = make_config(EvaluationConfig, batch_size=1, num_devices=num_devices)
        inputs = EvaluationInputs(config, tiny_diffusion_config(tmp_path / "no model"), nothing, nothing)
        requests = [SamplingRequest(prompt="a fish", seed=seed) for seed in (1, 2)]
        with pytest.raises(ConfigError, match=message):
            list(draw_samples(inputs, "base", requests, runtime=nothing))


def test_number_of_devices_and_batch_size_keep_the_stage_key(tmp_path: Path, store: LocalStore) -> None:
    run = make_run(store)
    inputs = EvaluationInputs(make_config(EvaluationConfig), tiny_diffusion_config(tmp_path), run.training, run.subject)
    for changes, is_same in (({"num_devices": 4}, True), ({"batch_size": 3}, True), ({"seed": 3}, False)):
        other = replace(inputs, config=make_config(EvaluationConfig, **changes))
        assert (other.stage().key == inputs.stage().key) == is_same
