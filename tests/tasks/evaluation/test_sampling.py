"""Which samples are drawn, and that they are drawn once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.diffusion.sampling.devices import sample
from tasks.diffusion.sampling.job import IndexedImage
from tasks.diffusion.types import SamplingRequest
from tasks.encoders.config import EncoderConfig
from tasks.evaluation.config import EvaluationConfig
from tasks.evaluation.sampling import Source, generate_samples, plan_job, plan_samples
from tasks.images import read_mark
from tasks.manifests.evaluation import Sample
from tasks.services.store.local import LocalStore
from tasks.stage.cache import StageFolder
from tests.support.config import make_config
from tests.support.tiny import tiny_diffusion_config

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
        return sample(plan_job(diffusion, CONFIG, requests, weights=None), num_devices=1)

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
    diffusion = tiny_diffusion_config(tiny_model_folder)
    planned = plan_samples(CONFIG, class_noun="fish", identifier_token="sks", class_prompt="a photo of a fish")

    def generate(name: str, num_devices: int) -> tuple[Sample, ...]:
        return generate_samples(
            StageFolder(LocalStore(tmp_path / name), "evaluation", "k"), CONFIG, planned,
            draw=lambda side, requests: sample(
                plan_job(diffusion, CONFIG, requests, weights=None), num_devices=num_devices
            ),
            on_progress=lambda done, total: None,
        )  # fmt: skip

    one, two = generate("one", 1), generate("two", 2)
    assert [(each.prompt, each.seed, each.side) for each in one] == [
        (each.prompt, each.seed, each.side) for each in two
    ]
    for first, second in zip(one, two, strict=True):
        a, b = (
            np.asarray(Image.open(tmp_path / place / each.image.key), int)
            for place, each in (("one", first), ("two", second))
        )
        assert np.abs(a - b).max() <= 1  # batches differ, so kernels may sum in another order
