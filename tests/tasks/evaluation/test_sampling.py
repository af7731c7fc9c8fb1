"""Which samples are drawn, and that they are drawn once."""

from pathlib import Path

from tasks.contract import StageFolder
from tasks.diffusion.base import DiffusionModel, open_model
from tasks.encoders.config import EncoderConfig
from tasks.evaluation.config import EvaluationConfig
from tasks.evaluation.sampling import draw_samples, plan_samples
from tasks.manifests import Side
from tasks.services.store import LocalStore
from tests.tiny import tiny_diffusion_config

CONFIG = EvaluationConfig(
    prompts=("a photo of {subject}", "{subject} in the snow"),
    num_images_per_prompt=2,
    num_class_images=3,
    num_inference_steps=2,
    batch_size=3,
    encoders=EncoderConfig(clip="mini", dino="mini"),
)


def test_both_sides_get_the_same_prompts_and_seeds() -> None:
    planned = plan_samples(CONFIG, class_noun="orca", identifier_token="sks", class_prompt="a photo of an orca")
    sides = {side: [(p.prompt, p.seed, p.kind) for p in planned if p.side == side] for side in ("base", "tuned")}
    assert sides["base"] == sides["tuned"]
    assert len(sides["base"]) == 2 * 2 + 3
    assert ("sks orca in the snow", 1001, "subject") in sides["base"]


def test_clip_t_compares_with_the_prompt_without_identifier() -> None:
    planned = plan_samples(CONFIG, class_noun="orca", identifier_token="sks", class_prompt="a photo of an orca")
    assert {p.class_prompt for p in planned if p.kind == "subject"} == {"a photo of an orca", "an orca in the snow"}
    assert not any("sks" in p.class_prompt for p in planned)


def test_samples_of_an_earlier_attempt_are_kept(tmp_path: Path, tiny_model_folder: Path) -> None:
    store, loads = LocalStore(tmp_path), []

    def load(side: Side) -> DiffusionModel:
        loads.append(side)
        return open_model(tiny_diffusion_config(tiny_model_folder))

    planned = plan_samples(CONFIG, class_noun="fish", identifier_token="sks", class_prompt="a photo of a fish")
    runs = [
        draw_samples(
            StageFolder(store, "evaluation", "k"), CONFIG, planned, load_model=load, on_progress=lambda d, t: None
        )
        for _ in range(2)
    ]
    assert loads == ["base", "tuned"]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 14
