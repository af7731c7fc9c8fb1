"""Predicted memory: parameters exactly, activations as a real forward keeps them, ordered as methods are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tasks.diffusion.base import open_model
from tasks.diffusion.latent_model import LatentModel
from tasks.training.estimate import MemoryEstimate, estimate_memory
from tasks.training.module import DreamBoothModule
from tasks.training.spec import TrainingSpec
from tests.tasks.training.test_methods import MAKERS, family_spec
from tests.tiny import make_tiny_stable_diffusion

ALL: dict[str, Callable[[Path], Path]] = {"stable_diffusion": make_tiny_stable_diffusion, **MAKERS}


def estimate(spec: TrainingSpec) -> MemoryEstimate:
    return estimate_memory(Path(spec.model_folder), spec.diffusion, spec.training)


def measure_kept(module: DreamBoothModule) -> int:
    """Return the bytes that a real forward keeps for the backward."""
    weights = {
        p.untyped_storage().data_ptr()
        for part in module.model.parts.values()
        if isinstance(part, torch.nn.Module)
        for p in part.parameters()
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module.training_step(torch.arange(module.spec.training.train_batch_size), 0)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("method", ["full", "lora", "token"])
@pytest.mark.parametrize("family", ALL)
def test_the_estimate_agrees_with_a_real_forward(tmp_path: Path, family: str, method: str) -> None:
    folder = ALL[family](tmp_path / "base" / "model")
    spec = family_spec(tmp_path, folder, family=family, method=method, train_batch_size=2)
    model = open_model(spec.diffusion)
    assert isinstance(model, LatentModel)
    module = DreamBoothModule(model, spec)
    predicted = estimate(spec)
    assert predicted.trainable_parameters == sum(p.numel() for _, p in module.named_trained())
    assert predicted.activations == pytest.approx(measure_kept(module), rel=0.25)


def test_less_is_predicted_for_what_takes_less(tmp_path: Path, tiny_model_folder: Path) -> None:
    def total(**changes: object) -> MemoryEstimate:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return estimate(family_spec(folder, tiny_model_folder, family="stable_diffusion", **changes))

    full, lora = total(), total(method="lora")
    assert lora.total < full.total
    assert lora.moments < full.moments / 2
    assert total(is_gradient_checkpointed=True).activations < full.activations
    assert total(train_batch_size=2).activations > 1.5 * full.activations
    assert total(ema_decay=0.99).averages == full.trainable_parameters * 4
    assert total(optimizer="adamw8bit").moments == full.moments / 4
