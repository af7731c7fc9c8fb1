"""What each method learns, leaves alone, and writes in the formats that other tools read."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.lora.adapters import KOHYA_FILE
from tasks.diffusion.registry import load_model
from tasks.diffusion.textual_inversion import EMBEDS_FILE
from tasks.diffusion.types import LORA_FILE, SamplingRequest
from tasks.errors import ConfigError, TrainingFailed
from tasks.training.module import DreamBoothModule
from tasks.training.process.worker_spec import RunFolder, TrainingSpec
from tests.support.tiny import family_spec, make_spec, train_here
from tests.support.tiny_families import MAKERS, make_tiny_sdxl

PROMPT = "a photo of sks fish"


def train(tmp_path: Path, model_folder: Path, *, family: str = "stable_diffusion", **changes: object) -> RunFolder:
    return train_here(tmp_path, model_folder, spec=family_spec(tmp_path, model_folder, family=family, **changes))


def draw(spec: TrainingSpec, folder: Path | None) -> np.ndarray:
    model = load_model(spec.diffusion, folder=folder)
    picture = model.sample([SamplingRequest(PROMPT, 3)], num_inference_steps=4, guidance_scale=3.0)[0]
    return np.asarray(picture, int)


def weights(model: DiffusionModel, part: str) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.components[part].state_dict().items()}


FILES = {
    "full": {"model_index.json"},
    "lora": {LORA_FILE, KOHYA_FILE},
    "textual_inversion": {EMBEDS_FILE},
    "textual_inversion+lora": {EMBEDS_FILE, LORA_FILE, KOHYA_FILE},
    "textual_inversion+full": {EMBEDS_FILE, "model_index.json"},
}


@pytest.mark.parametrize("method", FILES)
def test_every_method_changes_the_images_and_writes_its_files(
    tmp_path: Path, tiny_model_folder: Path, method: str
) -> None:
    rates = {"lora": {"learning_rate": 3e-2}, "textual_inversion": {"learning_rate": 0.3, "num_vectors": 2}}
    run = train(tmp_path, tiny_model_folder, method=method, **rates)
    assert {path.name for path in run.model.iterdir() if path.is_file()} == FILES[method]
    spec = family_spec(tmp_path, tiny_model_folder, family="stable_diffusion", method=method)
    assert np.abs(draw(spec, run.model) - draw(spec, None)).max() > 0


def reference_pipeline(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_reference(pipeline: StableDiffusionPipeline, prompt: str) -> np.ndarray:
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(3))
    picture = pipeline(prompt, num_inference_steps=4, guidance_scale=3.0, height=32, width=32, latents=latents)
    return np.asarray(picture.images[0], int)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_lora_adapter_samples_the_same_image_in_diffusers(
    tmp_path: Path, tiny_model_folder: Path, use_dora: bool
) -> None:
    lora = {"learning_rate": 3e-2, "rank": 4, "lora_alpha": 8.0, "use_dora": use_dora}
    run = train(tmp_path, tiny_model_folder, method="lora", lora=lora)
    spec = family_spec(tmp_path, tiny_model_folder, family="stable_diffusion", method="lora", lora=lora)
    pipeline = reference_pipeline(tiny_model_folder)
    plain = draw_reference(pipeline, PROMPT)
    pipeline.load_lora_weights(run.model, weight_name=LORA_FILE)
    theirs = draw_reference(pipeline, PROMPT)
    assert np.abs(theirs - plain).max() > 1
    assert np.abs(theirs - draw(spec, run.model)).max() <= 1
    magnitudes = [key for key in load_file(run.model / KOHYA_FILE) if key.endswith(".dora_scale")]
    assert bool(magnitudes) is use_dora


def test_kohya_and_diffusers_adapter_files_sample_the_same_image(tmp_path: Path, tiny_model_folder: Path) -> None:
    lora = {"learning_rate": 3e-2, "rank": 4, "lora_alpha": 8.0}
    run = train(tmp_path, tiny_model_folder, method="lora", lora=lora)
    kohya = load_file(run.model / KOHYA_FILE)
    assert {key.split("_")[1] for key in kohya} == {"unet", "te"}
    assert {float(value) for key, value in kohya.items() if key.endswith(".alpha")} == {8.0}
    pictures = []
    for name in (LORA_FILE, KOHYA_FILE):
        pipeline = reference_pipeline(tiny_model_folder)
        pipeline.load_lora_weights(run.model, weight_name=name)
        pictures.append(draw_reference(pipeline, PROMPT))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_textual_inversion_embedding_samples_the_same_image_in_diffusers(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    token = {"learning_rate": 0.3, "num_vectors": 2}
    run = train(tmp_path, tiny_model_folder, method="textual_inversion", textual_inversion=token)
    spec = family_spec(
        tmp_path, tiny_model_folder, family="stable_diffusion", method="textual_inversion", textual_inversion=token
    )
    pipeline = reference_pipeline(tiny_model_folder)
    pipeline.load_textual_inversion(run.model, weight_name=EMBEDS_FILE, token="<sks>")
    theirs = draw_reference(pipeline, "a photo of <sks> fish")
    assert np.abs(theirs - draw(spec, run.model)).max() <= 1


def test_a_full_model_with_a_placeholder_token_samples_the_same_in_diffusers(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    token = {"learning_rate": 0.3, "num_vectors": 1}
    run = train(tmp_path, tiny_model_folder, method="textual_inversion+full", textual_inversion=token)
    spec = family_spec(
        tmp_path, tiny_model_folder, family="stable_diffusion", method="textual_inversion+full", textual_inversion=token
    )
    theirs = draw_reference(reference_pipeline(run.model), "a photo of <sks> fish")
    assert np.abs(theirs - draw(spec, run.model)).max() <= 1


def test_textual_inversion_leaves_every_model_weight_unchanged(tmp_path: Path, tiny_model_folder: Path) -> None:
    run = train(
        tmp_path,
        tiny_model_folder,
        method="textual_inversion",
        textual_inversion={"learning_rate": 0.3, "num_vectors": 2},
    )
    spec = family_spec(tmp_path, tiny_model_folder, family="stable_diffusion", method="textual_inversion")
    base, tuned = load_model(spec.diffusion), load_model(spec.diffusion, folder=run.model)
    assert isinstance(base, DiffusionModel)
    assert isinstance(tuned, DiffusionModel)
    for part in ("unet", "vae", "text_encoder"):
        before, after = weights(base, part), weights(tuned, part)
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name][: len(tensor)] if tensor.ndim else after[name]), name
    vectors = load_file(run.model / EMBEDS_FILE)["<sks>"]
    assert vectors.shape == (2, 16)
    table = base.components["text_encoder"].get_input_embeddings().weight
    noun = base.tokenizers["text_encoder"]("fish", add_special_tokens=False).input_ids[0]
    assert not torch.equal(vectors[0], table[noun])


@pytest.mark.parametrize(("switch", "is_token_alone"), [(3, True), (1, False)])
def test_before_switch_step_only_the_placeholder_token_is_trained(
    tmp_path: Path, tiny_model_folder: Path, switch: int, is_token_alone: bool
) -> None:
    token = {"learning_rate": 0.3, "switch_step": switch}
    run = train(
        tmp_path,
        tiny_model_folder,
        method="textual_inversion+lora",
        textual_inversion=token,
        lora={"learning_rate": 1e-2},
    )
    ups = [tensor for name, tensor in load_file(run.model / LORA_FILE).items() if "lora_B" in name or ".up." in name]
    assert ups
    assert all(not tensor.any() for tensor in ups) is is_token_alone


def test_after_switch_step_the_placeholder_token_is_frozen(tmp_path: Path, tiny_model_folder: Path) -> None:
    vectors = []
    for steps in (1, 3):
        folder = tmp_path / str(steps)
        folder.mkdir()
        token = {"learning_rate": 0.3, "switch_step": 1}
        run = train(
            folder, tiny_model_folder, method="textual_inversion+lora", textual_inversion=token, max_train_steps=steps
        )
        vectors.append(load_file(run.model / EMBEDS_FILE)["<sks>"])
    assert torch.equal(*vectors)


@pytest.mark.parametrize("method", ["full", "lora", "textual_inversion+lora"])
@pytest.mark.parametrize("family", [name for name in MAKERS if name != "stable_diffusion"])
def test_every_family_trains_end_to_end(tmp_path: Path, family: str, method: str) -> None:
    folder = MAKERS[family](tmp_path / "base" / "model")
    changes = {"method": method, "snr_gamma": 5.0, "lora": {"learning_rate": 3e-2}, "learning_rate": 1e-2}
    if method == "lora":
        # Samples are configured in fp32, which the half-precision weights can't be drawn with.
        changes |= {"mixed_precision": "bf16", "weight_dtype": "bf16"}
        changes["validation"] = {"validation_steps": 2, "sample_steps": 2, "sample_num_inference_steps": 2}
    run = train(tmp_path, folder, family=family, gradient_checkpointing=True, **changes)
    spec = family_spec(tmp_path, folder, family=family, method=method)
    assert np.abs(draw(spec, run.model) - draw(spec, None)).max() > 0
    if method == "lora":
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipeline.load_lora_weights(run.model, weight_name=LORA_FILE)
        pipeline.scheduler = load_model(spec.diffusion).make_sampler()
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        size = {"height": 32, "width": 32}
        picture = pipeline(PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=generator, **size).images[0]
        assert np.abs(np.asarray(picture, int) - draw(spec, run.model)).max() <= 2
        adapted = {name.split(".")[0] for name in load_file(run.model / LORA_FILE)}
        assert "text_encoder" in adapted
        assert any(name.startswith("text_encoder.text_model.") for name in load_file(run.model / LORA_FILE))
        assert str(tmp_path).encode() not in (run.model / LORA_FILE).read_bytes()


def test_a_configuration_that_trains_nothing_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    spec = make_spec(tmp_path, tiny_model_folder, train_denoiser=False, train_text_encoder=False)
    model = load_model(spec.diffusion)
    assert isinstance(model, DiffusionModel)
    with pytest.raises(ConfigError, match="nothing would be trained"):
        DreamBoothModule(model, spec)


def test_a_first_step_that_changes_nothing_is_refused(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_gradient(module: DreamBoothModule, *_: object) -> dict[str, torch.Tensor]:
        loss = torch.stack([p.sum() for _, p in module.named_trained()]).sum() * 0.0
        return {"loss": loss, "total_loss": loss.detach()}

    monkeypatch.setattr(DreamBoothModule, "training_step", without_gradient)
    with pytest.raises(TrainingFailed, match="first step changed nothing"):
        train(tmp_path, tiny_model_folder)


def test_weight_dtype_applies_to_frozen_weights_and_not_to_trained_ones(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    spec = make_spec(tmp_path, tiny_model_folder, method="lora", weight_dtype="bf16", mixed_precision="bf16")
    model = load_model(spec.diffusion)
    assert isinstance(model, DiffusionModel)
    module = DreamBoothModule(model, spec)
    assert {p.dtype for _, p in module.named_trained()} == {torch.float32}
    frozen = {p.dtype for p in model.denoiser.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_a_placeholder_token_is_not_taken_for_the_eos_token(tmp_path: Path) -> None:
    folder = make_tiny_sdxl(tmp_path / "base" / "model")
    for name in ("text_encoder", "text_encoder_2"):  # as published configurations have it
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 2}))
    spec = family_spec(tmp_path, folder, family="stable_diffusion_xl", method="textual_inversion")
    model = load_model(spec.diffusion)
    DreamBoothModule(model, spec)
    conditioning = model.encode_prompts(model.tokenize(["a photo of sks fish", "a photo of sks fish in the snow"]))
    assert conditioning.pooled_prompt_embeds is not None
    assert not torch.allclose(conditioning.pooled_prompt_embeds[0], conditioning.pooled_prompt_embeds[1])
