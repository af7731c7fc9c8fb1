"""Sample grids during training, generated with the model in memory."""

import pytorch_lightning as pl
from PIL import Image

from tasks.diffusion.types import SamplingRequest
from tasks.prompts import write_subject_prompt
from tasks.stage.files import explain_full_disk
from tasks.training.callbacks.step import StepCallback, is_due
from tasks.training.module import DreamBoothModule
from tasks.training.process.worker_spec import RunFolder

# Constants, so that grids of different steps are comparable.
SAMPLE_SEED, SAMPLE_GUIDANCE, SAMPLES_PER_PROMPT = 7, 3.0, 2


class SampleGrids(StepCallback):
    """Generates a grid every `sample_steps`, between two optimizer steps."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_step_end(self, trainer: pl.Trainer, module: DreamBoothModule) -> None:
        """Generate when due; with sharded weights every rank takes part in the forwards."""
        if not is_due(module.step, module.spec.training.validation.sample_steps):
            return
        rows = generate_samples(module) if trainer.is_global_zero or module.is_sharded else []
        if trainer.is_global_zero:
            self.run.samples.mkdir(exist_ok=True)
            with explain_full_disk(self.run.samples):
                join_grid(rows).save(self.run.samples / f"step-{module.step:08d}.png")
            self.run.emit_event({"event": "samples", "step": module.step})
        trainer.strategy.barrier()  # ranks without a part in the forwards wait here


def generate_samples(module: DreamBoothModule) -> list[list[Image.Image]]:
    """Return one row of samples per prompt, generated with the current weights and fixed seeds."""
    spec = module.spec
    words = {"identifier_token": spec.identifier_token, "class_noun": spec.class_noun}
    # Dropout would perturb the samples; the modes are restored below.
    was_training = [part.training for part in module.trained.values()]
    module.trained.eval()
    # The VAE was moved to the CPU once the latents were cached.
    vae_device = module.model.vae.device
    module.model.vae.to(module.device)
    rows = []
    validation = spec.training.validation
    for template in validation.sample_prompts:  # small batches: optimizer state fills the device
        prompt = write_subject_prompt(template, **words)
        requests = [SamplingRequest(prompt, SAMPLE_SEED + i) for i in range(SAMPLES_PER_PROMPT)]
        num_steps = validation.sample_num_inference_steps
        rows.append(module.model.sample(requests, num_inference_steps=num_steps, guidance_scale=SAMPLE_GUIDANCE))
    module.model.vae.to(vae_device)
    for part, mode in zip(module.trained.values(), was_training, strict=True):
        part.train(mode)
    return rows


def join_grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Tile rows of equally sized images into one."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            grid.paste(picture, (width * x, height * y))
    return grid
