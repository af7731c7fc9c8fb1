"""Every family on a tiny random-weight model of its true architecture."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.families.flux import TRAINING_GUIDANCE
from tasks.diffusion.registry import load_model
from tasks.diffusion.types import SamplingRequest
from tasks.errors import ConfigError
from tests.support.numerics import assert_same_up_to_rounding
from tests.support.tiny import SIDE
from tests.support.tiny_families import MAKERS, family_config, make_tiny_sd3, open_family

PROMPTS = ["a photo of sks fish", "a fish on the beach"]


@pytest.mark.parametrize("family", MAKERS)
def test_a_prediction_has_the_targets_shape_and_a_gradient(folders: dict[str, Path], family: str) -> None:
    model = open_family(family, folders[family])
    for module in model.trainable_modules(train_text_encoder=True).values():
        module.requires_grad_(True)
    posterior = model.encode_images(torch.rand(2, 3, SIDE, SIDE) * 2 - 1)
    noise = torch.randn(posterior.mean.shape)
    timesteps = model.noise_scheduler.sample_timesteps(torch.tensor([0.1, 0.9]))
    time_ids = torch.tensor([[64.0, 48, 0, 8, SIDE, SIDE]] * 2)
    prompt_embeds = model.encode_prompts(model.tokenize(PROMPTS))
    noisy = model.noise_scheduler.add_noise(posterior.mean, noise, timesteps)
    target = model.noise_scheduler.compute_target(posterior.mean, noise, timesteps)
    predicted = model.predict(noisy, timesteps, prompt_embeds, time_ids=time_ids)
    assert predicted.shape == target.shape == posterior.mean.shape
    (predicted - target).square().mean().backward()
    for name, module in model.trainable_modules(train_text_encoder=True).items():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters()), name


@pytest.mark.parametrize("family", MAKERS)
def test_an_image_depends_on_its_seed_not_on_its_batch(folders: dict[str, Path], family: str) -> None:
    model = open_family(family, folders[family])
    requests = [SamplingRequest(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    together = model.sample(requests, num_inference_steps=2, guidance_scale=3.0)
    alone = [model.sample([request], num_inference_steps=2, guidance_scale=3.0)[0] for request in requests]
    for first, second in zip(together, alone, strict=True):
        assert first.size == (SIDE, SIDE)
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1


@pytest.mark.parametrize("family", MAKERS)
def test_denoising_steps_are_reported_and_change_nothing(folders: dict[str, Path], family: str) -> None:
    model, steps = open_family(family, folders[family]), list[tuple[int, int]]()
    request, options = [SamplingRequest(PROMPTS[0], 1)], {"num_inference_steps": 3, "guidance_scale": 3.0}
    shown = model.sample(request, **options, on_step=lambda done, total: steps.append((done, total)))[0]  # type: ignore[arg-type]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert shown.tobytes() == model.sample(request, **options)[0].tobytes()  # type: ignore[arg-type]


@pytest.mark.parametrize("family", MAKERS)
def test_a_saved_model_loads_in_diffusers_and_in_likeness(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    model = open_family(family, folders[family])
    model.save(tmp_path / "saved")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(pipeline).__name__ == model.pipeline_class
    again = open_family(family, tmp_path / "saved")
    for name, tensor in model.denoiser.state_dict().items():
        assert torch.equal(tensor, again.denoiser.state_dict()[name])


@pytest.mark.parametrize("family", ["stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_prompt_embeds_equal_those_of_the_diffusers_pipeline(folders: dict[str, Path], family: str) -> None:
    model = open_family(family, folders[family])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[family])
    arguments = {
        "stable_diffusion_xl": {"do_classifier_free_guidance": False},
        "stable_diffusion_3": {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False},
        "flux": {"prompt_2": None},
    }[family]
    theirs = pipeline.encode_prompt(PROMPTS, device=torch.device("cpu"), **arguments)
    prompt_embeds = model.encode_prompts(model.tokenize(PROMPTS))
    assert prompt_embeds.pooled_prompt_embeds is not None
    pooled = theirs[1] if family == "flux" else theirs[2]
    # Two encoder layers of attention and two products each, the longest sum being the one over T5's 512 tokens.
    assert_same_up_to_rounding(prompt_embeds.encoder_hidden_states, theirs[0], terms=512, layers=6)
    assert_same_up_to_rounding(prompt_embeds.pooled_prompt_embeds, pooled, terms=512, layers=6)


@pytest.mark.parametrize(
    "missing", [("text_encoder_3",), ("text_encoder",), ("text_encoder_2",), ("text_encoder", "text_encoder_3")]
)
def test_text_encoders_of_stable_diffusion_3_may_be_absent(tmp_path: Path, missing: tuple[str, ...]) -> None:
    whole = open_family("stable_diffusion_3", make_tiny_sd3(tmp_path / "whole" / "model"))
    model = open_family("stable_diffusion_3", make_tiny_sd3(tmp_path / "part" / "model", missing=missing))
    assert set(model.text_encoders) == {"text_encoder", "text_encoder_2", "text_encoder_3"} - set(missing)
    prompt_embeds, full = (m.encode_prompts(m.tokenize(PROMPTS)) for m in (model, whole))
    assert prompt_embeds.encoder_hidden_states.shape == full.encoder_hidden_states.shape
    assert prompt_embeds.pooled_prompt_embeds is not None
    assert full.pooled_prompt_embeds is not None
    assert prompt_embeds.pooled_prompt_embeds.shape == full.pooled_prompt_embeds.shape
    assert len(model.sample([SamplingRequest(PROMPTS[0], 1)], num_inference_steps=1, guidance_scale=2.0)) == 1


def test_unsafe_or_incomplete_repository_content_raises_an_error_naming_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folders["stable_diffusion"], tmp_path / name))

    pickled = copy("pickled")
    next((pickled / "unet").glob("*.safetensors")).unlink()
    (pickled / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    scripted = copy("scripted")
    (scripted / "unet" / "my_unet.py").write_text("raise SystemExit")
    adapted, nameless = copy("adapted"), copy("nameless")
    (adapted / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    (nameless / "text_encoder" / "config.json").unlink()
    foreign, lacking = copy("foreign"), copy("lacking")
    for folder, value in ((foreign, ["my_code", "MyUNet"]), (lacking, [None, None])):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "unet": value}))
    for folder, message in (
        (pickled, "holds diffusion_pytorch_model.bin, a pickle; only safetensors"),
        (scripted, r"contains custom code \(unet/my_unet.py\)"),
        (adapted, r"holds text_encoder/adapter_config.json, an adapter of another model"),
        (nameless, "text_encoder has no config.json"),
        (foreign, "unet is a my_code.MyUNet"),
        (lacking, "has no unet"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_family("stable_diffusion", folder)


@pytest.mark.parametrize(
    "text", ['{"weight_map": {"a": "../../secret.safetensors"}}', '{"weight_map": {"a": "x.bin"}}',
             '{"weight_map": {"a": 5}}', "[]", "{", "[" * 100_000],
)  # fmt: skip
def test_a_weight_index_may_reference_only_sibling_safetensors(
    folders: dict[str, Path], tmp_path: Path, text: str
) -> None:
    folder = Path(shutil.copytree(folders["stable_diffusion"], tmp_path / "model"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"unet/diffusion_pytorch_model.safetensors.index.json names"):
        open_family("stable_diffusion", folder)


@pytest.mark.parametrize("is_zeroed", [True, False])
def test_the_empty_prompt_of_sdxl_follows_force_zeros_for_empty_prompt(tmp_path: Path, is_zeroed: bool) -> None:
    folder = MAKERS["stable_diffusion_xl"](tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": is_zeroed}))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    model = open_family("stable_diffusion_xl", folder)
    theirs = pipeline.encode_prompt(PROMPTS[:1], device=torch.device("cpu"), do_classifier_free_guidance=True)
    ours = model.pipeline_inputs(PROMPTS[:1])
    empty = model.encode_prompts(model.tokenize([""]))  # what training is prompt_embeds of dropped captions
    for found in (ours["negative_prompt_embeds"], empty.encoder_hidden_states):
        torch.testing.assert_close(found.detach(), theirs[1].detach(), rtol=1e-5, atol=1e-4)
    for found in (ours["negative_pooled_prompt_embeds"], empty.pooled_prompt_embeds):
        assert found is not None
        torch.testing.assert_close(found.detach(), theirs[3].detach(), rtol=1e-5, atol=1e-4)
    assert bool((theirs[1] == 0).all()) is is_zeroed
    model.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert saved["force_zeros_for_empty_prompt"] is is_zeroed


def test_flux_class_images_use_the_guidance_scale_of_training() -> None:
    preset = yaml.safe_load((Path(__file__).parents[4] / "conf" / "diffusion" / "flux-dev.yaml").read_text())
    assert preset["prior"]["guidance_scale"] == TRAINING_GUIDANCE


@pytest.mark.parametrize("family", MAKERS)
def test_the_vae_decodes_in_float32_under_fp16_to_avoid_overflow(folders: dict[str, Path], family: str) -> None:
    pictures = []
    for precision in ("fp32", "fp16"):
        config = family_config(family, folders[family]).model_copy(update={"precision": precision})
        model = load_model(config)
        assert isinstance(model, DiffusionModel)
        for parameter in model.vae.decoder.conv_in.parameters():  # a norm follows, so that only fp16 notices
            parameter.mul_(1e6)
        requests = [SamplingRequest(PROMPTS[0], 1)]
        pictures.append(np.asarray(model.sample(requests, num_inference_steps=2, guidance_scale=2.0)[0], int))
    # Latents of two fp16 steps, decoded in float32.
    assert np.abs(pictures[0] - pictures[1]).mean() < 4
    assert pictures[1].std() > 1


@pytest.mark.parametrize("weights", ["bf16", "fp16"])
@pytest.mark.parametrize("family", MAKERS)
def test_half_precision_weights_sample_the_same_under_any_configured_precision(
    folders: dict[str, Path], family: str, weights: str
) -> None:
    requests = [SamplingRequest(PROMPTS[0], 1)]
    pictures = []
    for precision in ("fp32", weights):
        config = family_config(family, folders[family]).model_copy(update={"precision": precision})
        model = load_model(config, precision=weights)
        pictures.append(np.asarray(model.sample(requests, num_inference_steps=2, guidance_scale=2.0)[0], int))
    assert np.array_equal(*pictures)
