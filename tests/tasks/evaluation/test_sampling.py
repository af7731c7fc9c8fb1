"""Which samples are drawn, and that they are drawn once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.compose import compile_request
from conf.request import RunRequest
from tasks.diffusion.lora.adapters import save_lora
from tasks.diffusion.registry import load_model
from tasks.diffusion.sampling.devices import Devices, sample
from tasks.diffusion.sampling.job import IndexedImage
from tasks.diffusion.types import SamplingRequest
from tasks.encoders.config import EncoderConfig
from tasks.errors import ServiceUnavailable
from tasks.evaluation.config import EvaluationConfig, PromptTemplate
from tasks.evaluation.sampling import (
    BASE_SAMPLES,
    BaseSample,
    BaseSamples,
    Source,
    generate_samples,
    plan_job,
    plan_samples,
)
from tasks.evaluation.steps import EvaluationInputs
from tasks.images import read_mark
from tasks.manifests.base import ModelRef
from tasks.manifests.training import TunedModel
from tasks.services.store.local import LocalStore
from tasks.stage.cache import PREFIXES, StageFolder
from tasks.stage.digests import digest, dump_signed
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
        generate_samples(StageFolder(store, "evaluation", "k"), planned, draw=draw, on_progress=lambda d, t: None)
        for _ in range(2)
    ]
    assert loads == ["base", "tuned"]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 14
    mark = read_mark(store.find_bytes(runs[0][0].image.key) or b"")
    assert (mark["Title"], mark["Comment"]) == (runs[0][0].prompt, f"seed {runs[0][0].seed}")


class Evaluations:
    """Evaluations in one store, whose models draw a number that tells them apart."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalStore(folder)
        self.drawn: list[tuple[Source, int]] = []
        self.planned = plan_samples(CONFIG, class_noun="fish", identifier_token="sks", class_prompt="a photo of a fish")

    def run(self, key: str, identity: str = "base") -> tuple[list[str], int]:
        """Return the digests of an evaluation's samples, and how many of them another one drew."""
        folder = StageFolder(self.store, "evaluation", key)
        shared = BaseSamples(folder, [identity])
        shared.take(self.planned)

        def draw(side: Source, requests: list[SamplingRequest]) -> Iterator[IndexedImage]:
            self.drawn.append((side, len(requests)))
            for position, request in enumerate(requests):
                colour = (request.seed % 256, len(request.prompt), len(f"{side} {identity}"))
                yield position, Image.new("RGB", (8, 8), colour)

        samples = generate_samples(folder, self.planned, draw=draw, on_progress=lambda done, total: None)
        shared.share(self.planned, samples)
        assert all(f"/{key}/" in sample.image.key for sample in samples)  # each folder is complete
        return [sample.image.sha256 for sample in samples], len(shared.taken)


def test_samples_of_the_base_model_are_drawn_once_for_all_evaluations_of_a_store(tmp_path: Path) -> None:
    every = Evaluations(tmp_path)
    first, again, other = every.run("a"), every.run("b"), every.run("c", "other base")
    assert every.drawn == [("base", 7), ("tuned", 7), ("tuned", 7), ("base", 7), ("tuned", 7)]
    assert (first[1], again[1], other[1]) == (0, 7, 0)
    assert first[0] == again[0]
    assert not set(first[0][:7]) & set(other[0][:7])


def test_other_prompts_seeds_and_negative_prompts_are_not_taken_for_each_other(tmp_path: Path) -> None:
    every = Evaluations(tmp_path)
    every.run("a")
    for changes in ({"seed": 1100}, {"negative_prompt": "blurry"}):
        config = CONFIG.model_copy(update=changes)
        every.planned = plan_samples(config, class_noun="fish", identifier_token="sks", class_prompt="a photo of one")
        assert every.run(f"of {changes}")[1] == 0
    config = CONFIG.model_copy(
        update={"prompts": (*CONFIG.prompts, PromptTemplate(text="{subject} at night", kind="scene"))}
    )
    every.planned = plan_samples(config, class_noun="fish", identifier_token="sks", class_prompt="a photo of a fish")
    assert every.run("of one prompt more")[1] == 7
    assert every.drawn[-2:] == [("base", 2), ("tuned", 9)]


def test_a_shared_sample_that_was_removed_or_damaged_is_drawn_again(tmp_path: Path) -> None:
    every = Evaluations(tmp_path)
    first = every.run("a")
    store, pictures = every.store, f"{PREFIXES['evaluation']}/a/base"
    notes = sorted(store.list_keys(f"{BASE_SAMPLES}/"))
    store.delete(f"{pictures}/class-000.png")
    store.put_bytes(f"{pictures}/class-001.png", b"torn")
    valid = store.find_bytes(notes[0]) or b""
    store.put_bytes(notes[1], b"no JSON")
    store.put_bytes(notes[2], valid)  # of another sample
    found, num_taken = every.run("b")
    assert found == first[0]
    assert 7 - 4 <= num_taken <= 7 - 2  # a damaged note may be that of a damaged picture
    assert every.run("c") == (first[0], 7)  # what was drawn again is noted again
    assert every.run("c") == (first[0], 0)  # a second attempt has them, whoever drew them


def test_a_note_leads_to_evaluations_alone_and_one_that_cannot_be_written_costs_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = Evaluations(tmp_path)
    shared = BaseSamples(StageFolder(every.store, "evaluation", "a"), ["base"])
    secret = StageFolder(every.store, "prior", "a").put("secret.png", b"pixels")
    for plan in every.planned:
        name = shared.name_note(plan)
        every.store.put_bytes(name, dump_signed(BaseSample(name=name, image=secret)))
    assert every.run("a")[1] == 0
    plain = every.store.put_bytes

    def refuse(key: str, data: bytes) -> None:
        if key.startswith(BASE_SAMPLES):
            raise ServiceUnavailable("503")
        plain(key, data)

    monkeypatch.setattr(every.store, "put_bytes", refuse)
    assert len(every.run("b", "other base")[0]) == 14


def test_what_samples_of_the_base_model_depend_on_is_part_of_their_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    def identify(base: str = "0" * 64, **settings: str) -> str:
        config = compile_request(RunRequest(source="demo", class_noun="fish", settings=settings))
        tuned = TunedModel.model_construct(base_model=ModelRef(location="x", revision=None, sha256=base))
        return digest(EvaluationInputs(config.evaluation, config.diffusion, tuned, None).identify_base())  # type: ignore[arg-type]

    plain = identify()
    assert identify() == plain
    assert identify(**{"evaluation.lora_scale": "0.5", "evaluation.seed": "7"}) == plain  # a note's own, or no matter
    for name, value in {
        "evaluation.num_inference_steps": "7", "evaluation.guidance_scale": "5", "evaluation.guidance_rescale": "0.5",
        "diffusion.sampler": "euler", "diffusion.resolution": "32", "diffusion.precision": "bf16",
    }.items():  # fmt: skip
        assert identify(**{name: value}) != plain, name
    assert identify(base="1" * 64) != plain
    for target in ("describe_device", "version"):
        with monkeypatch.context() as patch:
            place = "tasks.diffusion.device" if target == "describe_device" else "tasks.evaluation.steps"
            patch.setattr(f"{place}.{target}", lambda name: "another")
            assert identify() != plain, target


def test_the_samples_do_not_depend_on_the_number_of_devices(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Those of a LoRA at half its strength: weights and scale reach each process."""
    config = CONFIG.model_copy(update={"lora_scale": 0.5})
    diffusion = tiny_diffusion_config(tiny_model_folder)
    model = load_model(diffusion)
    save_lora(model, tmp_path / "lora", adapt(model), export=EXPORT)
    planned = plan_samples(config, class_noun="fish", identifier_token="sks", class_prompt="a photo of a fish")

    def generate(name: str, num_devices: int, weights: Path | None) -> list[np.ndarray]:
        samples = generate_samples(
            StageFolder(LocalStore(tmp_path / name), "evaluation", "k"), planned[:7],
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


def test_samples_of_a_lora_follow_the_configured_strength(tmp_path: Path, tiny_model_folder: Path) -> None:
    diffusion = tiny_diffusion_config(tiny_model_folder)
    model = load_model(diffusion)
    save_lora(model, tmp_path / "lora", adapt(model), export=EXPORT)
    requests = [SamplingRequest(prompt="a photo of sks fish", seed=1)]

    def draw(lora_scale: float, weights: str | None = str(tmp_path / "lora")) -> bytes:
        config = CONFIG.model_copy(update={"lora_scale": lora_scale})
        [(_, picture)] = sample(plan_job(diffusion, config, requests, weights=weights), ONE)
        return picture.tobytes()

    assert draw(0.0) == draw(1.0, weights=None)
    assert len({draw(0.0), draw(0.5), draw(1.0)}) == 3
