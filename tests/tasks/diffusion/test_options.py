"""Options of the base model: without its option a test here fails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tasks.diffusion.adapter import DiffusionModel
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.device import choose_device
from tasks.diffusion.families.stable_diffusion import rescale_guidance
from tasks.diffusion.hub import find_folder, identify_model
from tasks.diffusion.registry import load_model
from tasks.diffusion.types import SamplingRequest
from tasks.errors import ConfigError
from tests.support.config import make_config
from tests.support.tiny import make_tiny_stable_diffusion, tiny_diffusion_config

REQUESTS = [SamplingRequest("a photo of a fish", 3)]


def draw(folder: Path, **changes: Any) -> np.ndarray:
    model = load_model(tiny_diffusion_config(folder, **changes))
    return np.asarray(model.sample(REQUESTS, num_inference_steps=3, guidance_scale=3.0)[0], int)


@pytest.mark.parametrize("changes", [{"sampler": "ddim"}, {"sampler": "euler"}, {"precision": "bf16"}])
def test_sampler_and_precision_change_the_image(tiny_model_folder: Path, changes: dict[str, Any]) -> None:
    assert not np.array_equal(draw(tiny_model_folder, sampler="dpm++"), draw(tiny_model_folder, **changes))


def test_any_scheduler_of_diffusers_that_suits_the_model_is_a_sampler(tiny_model_folder: Path) -> None:
    pictures = [draw(tiny_model_folder, sampler=name) for name in ("DDIMScheduler", "ddim", "UniPCMultistepScheduler")]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    with pytest.raises(ValidationError, match="did you mean DDIMScheduler"):
        tiny_diffusion_config(tiny_model_folder, sampler="DDIMSheduler")
    with pytest.raises(ConfigError, match="FlowMatchHeunDiscreteScheduler doesn't suit Gaussian diffusion"):
        draw(tiny_model_folder, sampler="FlowMatchHeunDiscreteScheduler")


@pytest.mark.parametrize("sampler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverSDEScheduler"])
def test_a_sampler_that_adds_noise_at_each_step_draws_it_from_the_images_seed(
    tiny_model_folder: Path, sampler: str
) -> None:
    if sampler == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    first = draw(tiny_model_folder, sampler=sampler)
    torch.manual_seed(99)  # the global generator has no part in it
    assert np.array_equal(first, draw(tiny_model_folder, sampler=sampler))


def test_guidance_rescale_lowers_the_deviation_of_guided_predictions_to_the_prompted_one() -> None:
    torch.manual_seed(0)
    guided, prompted = 3 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    full = rescale_guidance(guided, prompted, 1.0)
    torch.testing.assert_close(full.std((1, 2, 3)), prompted.std((1, 2, 3)))
    assert torch.equal(rescale_guidance(guided, prompted, 0.0), guided)


def test_the_pipelines_guidance_rescale_gives_the_same_image(tiny_model_folder: Path) -> None:
    model = load_model(tiny_diffusion_config(tiny_model_folder, sampler="ddim"))
    options = {"num_inference_steps": 3, "guidance_scale": 6.0, "guidance_rescale": 0.7}
    request = [SamplingRequest("a photo of a fish", 3, "snow")]
    ours, theirs = model.sample(request, **options)[0], DiffusionModel.sample(model, request, **options)[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1  # another order of summation


def test_images_have_the_configured_resolution(tiny_model_folder: Path) -> None:
    assert draw(tiny_model_folder, resolution=64).shape == (64, 64, 3)


def test_the_configured_model_is_loaded(tmp_path: Path, tiny_model_folder: Path) -> None:
    other = make_tiny_stable_diffusion(tmp_path / "other" / "model", prediction_type="v_prediction")
    first, second = (identify_model(tiny_diffusion_config(folder)).sha256 for folder in (tiny_model_folder, other))
    assert first != second
    assert not np.array_equal(draw(tiny_model_folder), draw(other))


def test_a_model_of_another_family_is_rejected(tiny_model_folder: Path) -> None:
    with pytest.raises(ConfigError):
        draw(tiny_model_folder, family="flux")


def test_a_repository_is_loaded_at_its_pinned_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub" / "models--nobody--nothing" / "snapshots"
    for commit in ("a" * 40, "b" * 40):
        (hub / commit).mkdir(parents=True)
        (hub / commit / "model_index.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for commit in ("a" * 40, "b" * 40):
        config = make_config(DiffusionConfig, pretrained_model_name_or_path="nobody/nothing", revision=commit)
        assert find_folder(config).name == commit
        assert identify_model(config).revision == commit


def test_an_unavailable_device_is_rejected(tmp_path: Path) -> None:
    assert choose_device(tiny_diffusion_config(tmp_path, device="cpu")) == torch.device("cpu")
    if torch.cuda.is_available():
        assert choose_device(tiny_diffusion_config(tmp_path, device="cuda")) == torch.device("cuda")
    else:
        with pytest.raises(ConfigError, match="diffusion.device=cuda"):
            choose_device(tiny_diffusion_config(tmp_path, device="cuda"))
