"""Which samples are drawn, and that they are drawn once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.diffusion.lora.adapters import save_lora
from tasks.diffusion.registry import load_model
from tasks.diffusion.sampling.devices import Devices, sample
from tasks.diffusion.sampling.job import IndexedImage
from tasks.diffusion.types import SamplingRequest
from tasks.encoders.config import EncoderConfig
from tasks.evaluation.config import EvaluationConfig
from tasks.evaluation.sampling import Source, generate_samples, plan_job, plan_samples
from tasks.images import read_mark
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.config import make_config
from tests.support.tiny import tiny_diffusion_config
from tests.support.tiny_lora import EXPORT, adapt

ONE = Devices("evaluation.num_devices", 1)
CONFIG = make_config(
    EvaluationConfig,
    prompts=("a photo of {subject}", "{subject} in the snow"),
    num_images_per_prompt=2,
    num_class_images=3,
    num_inference_steps=2,
    batch_size=3,
    encoders=make_config(EncoderConfig, clip="mini", dino="mini", dino_resize=None),
)


def test_base_and_tuned_model_get_the_same_prompts_and_seeds() -> None:
    planned = plan_samples(CONFIG, class_noun="orca", identifier_token="sks", class_prompt="a photo of an orca")
    sides = {side: [(p.prompt, p.seed, p.kind) for p in planned if p.side == side] for side in ("base", "tuned")}
    assert sides["base"] == sides["tuned"]
    assert len(sides["base"]) == 2 * 2 + 3
    assert ("sks orca in the snow", 1001, "subject") in sides["base"]


def test_candidates_sample_every_prompt_once_before_repeating_any() -> None:
    config = CONFIG.model_copy(update={"num_candidate_images": 3})
    planned = plan_samples(
        config, class_noun="orca", identifier_token="sks", class_prompt="a photo of an orca", candidates=(400, 600)
    )
    drawn = [plan for plan in planned if plan.kind == "candidate"]
    assert [plan.source for plan in drawn] == [400] * 3 + [600] * 3
    assert [(plan.prompt, plan.seed) for plan in drawn[:3]] == [
        ("a photo of sks orca", 1000), ("sks orca in the snow", 1000), ("a photo of sks orca", 1001),
    ]  # fmt: skip
    assert len({plan.name for plan in planned}) == len(planned)
    published = {(plan.prompt, plan.seed) for plan in planned if plan.side == "tuned" and plan.kind == "subject"}
    assert {(plan.prompt, plan.seed) for plan in drawn} <= published


def test_clip_t_uses_the_prompt_without_the_identifier_token() -> None:
    planned = plan_samples(CONFIG, class_noun="orca", identifier_token="sks", class_prompt="a photo of an orca")
    assert {p.class_prompt for p in planned if p.kind == "subject"} == {"a photo of an orca", "an orca in the snow"}
    assert not any("sks" in p.class_prompt for p in planned)


def test_samples_of_an_earlier_attempt_are_reused(tmp_path: Path, tiny_model_folder: Path) -> None:
    store, loads = LocalStore(tmp_path), []

    diffusion = tiny_diffusion_config(tiny_model_folder)

    def draw(side: Source, requests: list[SamplingRequest]) -> Iterator[IndexedImage]:
        loads.append(side)
        return sample(plan_job(diffusion, CONFIG, requests, weights=None), ONE)

    planned = plan_samples(CONFIG, class_noun="fish", identifier_token="sks", class_prompt="a photo of a fish")
    runs = [
        generate_samples(
            StageFolder(store, "evaluation", "k"), CONFIG, planned, draw=draw, on_progress=lambda d, t: None
        )
        for _ in range(2)
    ]
    assert loads == ["base", "tuned"]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 14
    mark = read_mark(store.find_bytes(runs[0][0].image.key) or b"")
    assert (mark["Title"], mark["Comment"]) == (runs[0][0].prompt, f"seed {runs[0][0].seed}")


def test_the_samples_do_not_depend_on_the_number_of_devices(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Those of a LoRA at half its strength: weights and scale reach each process."""
    config = CONFIG.model_copy(update={"lora_scale": 0.5})
    diffusion = tiny_diffusion_config(tiny_model_folder)
    model = load_model(diffusion)
    save_lora(model, tmp_path / "lora", adapt(model), export=EXPORT)
    planned = plan_samples(config, class_noun="fish", identifier_token="sks", class_prompt="a photo of a fish")

    def generate(name: str, num_devices: int, weights: Path | None) -> list[np.ndarray]:
        samples = generate_samples(
            StageFolder(LocalStore(tmp_path / name), "evaluation", "k"), config, planned[:7],
            draw=lambda side, requests: sample(
                plan_job(diffusion, config, requests, weights=None if weights is None else str(weights)),
                Devices("evaluation.num_devices", num_devices),
            ),
            on_progress=lambda done, total: None,
        )  # fmt: skip
        return [np.asarray(Image.open(tmp_path / name / each.image.key), int) for each in samples]

    one, two = generate("one", 1, tmp_path / "lora"), generate("two", 2, tmp_path / "lora")
    base = generate("base", 1, None)
    # Batches differ, so kernels may sum in another order.
    assert max(np.abs(a - b).max() for a, b in zip(one, two, strict=True)) <= 1
    assert min(np.abs(a - b).max() for a, b in zip(one, base, strict=True)) > 1
