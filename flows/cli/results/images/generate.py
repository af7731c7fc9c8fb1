"""Generate images with the model of a run, or of another trainer."""

import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.results.images.contact_sheet import Sheet, draw_contact_sheet, draw_grid
from flows.cli.results.images.files import Target
from flows.cli.results.images.models import ImageSource, fast_imports
from flows.cli.results.images.request import ImageRequest, change_diffusion, check_request
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.types import LORA_FILE, OnStep
from tasks.encoders.safety import SafetyChecker, find_safety_checker
from tasks.errors import ConfigError
from tasks.stage.progress import ProgressView, make_progress

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from tasks.diffusion.adapter import DiffusionModel

Show = Callable[[int, int], None]
OFF = "add --no-safety-checker"
CHECKS = {True: "auto", False: "none"}


@dataclass(frozen=True)
class GeneratedImages:
    """The files written, with their seeds, and the grid's."""

    images: tuple[tuple[Path, int], ...]
    grid: Path | None = None
    refused: tuple[str, ...] = ()
    """Prompt and seed, or settings, of images that the safety checker refused: they are not written."""


@dataclass(frozen=True)
class Sampler:
    """A loaded model with the settings of a request."""

    model: "DiffusionModel"
    request: ImageRequest
    source: ImageSource
    checker: "SafetyChecker | None" = None
    on_step: OnStep | None = None
    """Called with the denoising steps of each picture."""

    @property
    def num_inference_steps(self) -> int:
        """Denoising steps, of the request or the evaluation."""
        return self.request.num_inference_steps or self.source.evaluation.num_inference_steps

    @property
    def guidance_scale(self) -> float:
        """Guidance, of the request or the evaluation."""
        return self.request.guidance_scale or self.source.evaluation.guidance_scale

    def draw(
        self, prompt: str, seed: int, *, steps: int | None = None, guidance: float | None = None
    ) -> "Picture | None":
        """Return one picture; None where the safety checker refuses it."""
        from tasks.diffusion.types import SamplingRequest

        [picture] = self.model.sample(
            [SamplingRequest(prompt=prompt, seed=seed, negative_prompt=self.request.negative_prompt)],
            num_inference_steps=steps or self.num_inference_steps,
            guidance_scale=guidance or self.guidance_scale,
            on_step=self.on_step,
        )
        return None if self.checker is not None and self.checker.find_unsafe([picture])[0] else picture


def generate(
    source: ImageSource, request: ImageRequest, target: Target, *, on_progress: Show, on_step: OnStep | None = None
) -> GeneratedImages:
    """Generate images; return their files and seeds. Each is written as soon as it is there.

    `on_progress` is called for each of several pictures, `on_step` for the denoising steps of a single one.

    Raises:
        ConfigError: a prompt, a setting or a file is refused.

    """
    check_request(request, subject=source.subject)
    target.check(num=1 if request.is_settings_grid else request.num * len(request.prompts))
    sampler = load_sampler(source, request)
    if request.count_pictures() == 1:
        sampler = replace(sampler, on_step=on_step)
    first = secrets.randbelow(2**31 - request.num) if request.seed is None else request.seed
    if request.is_settings_grid:
        return draw_settings_grid(sampler, target, first, on_progress=on_progress)
    planned = [(prompt, first + number) for prompt in request.prompts for number in range(request.num)]
    done, refused = list[tuple[Path, int]](), list[str]()
    pictures: list[Picture | None] = []
    for number, (prompt, seed) in enumerate(planned):
        on_progress(number, len(planned))
        # One at a time: each is on disk before the next begins, and the first one soon.
        picture = sampler.draw(prompt, seed)
        pictures.append(picture)
        if picture is None:
            row = f"prompt {number // request.num + 1}, " if len(request.prompts) > 1 else ""
            refused.append(f"{row}seed {seed}")
            continue
        facts = {"Title": prompt, "Comment": f"seed {seed}, {source.origin}", "Description": request.describe()}
        done.append((target.write(target.name(seed, number, num=len(planned)), picture, facts=facts), seed))
    on_progress(len(planned), len(planned))
    require_any(pictures)
    if not target.has_grid:
        return GeneratedImages(tuple(done), refused=tuple(refused))
    facts = {
        "Title": "\n".join(request.prompts),
        "Comment": f"seeds {first} to {first + request.num - 1}, {source.origin}",
        "Description": request.describe(),
    }
    grid = target.write(target.grid(), draw_grid(pictures, columns=request.num), facts=facts)
    return GeneratedImages(tuple(done), grid, tuple(refused))


def require_any(pictures: Sequence["Picture | None"]) -> None:
    """Raise ConfigError where the safety checker refused every picture."""
    if all(picture is None for picture in pictures):
        raise ConfigError(
            f"the safety checker refused all {len(pictures)} images; use another prompt or --seed, or {OFF}"
        )


def load_sampler(source: ImageSource, request: ImageRequest) -> Sampler:
    """Load the model. Raises ConfigError for settings that it lacks."""
    diffusion = change_diffusion(source.diffusion, request)
    if request.lora_scale != 1 and not (source.weights / LORA_FILE).is_file():
        raise ConfigError("--lora-scale needs a LoRA; this model has none (training.method=lora trains one)")
    setting = source.evaluation.safety_checker if request.is_checked is None else CHECKS[request.is_checked]
    files = find_safety_checker(setting, diffusion, off=OFF)
    if request.is_checked and files is None:
        raise ConfigError("--safety-checker: the base model has none; only Stable Diffusion 1.x comes with one")
    with fast_imports(source.weights):
        from tasks.diffusion.registry import load_model

        diffusion = choose_precision(diffusion) if source.is_external else diffusion
        model = load_model(diffusion, folder=source.weights, lora_scale=request.lora_scale)
        checker = None if files is None else SafetyChecker(files, model.device)
    return Sampler(model, request, source, checker)


def choose_precision(config: DiffusionConfig) -> DiffusionConfig:
    """Return a configuration in fp32 on the CPU: a preset's half precision is meant for GPUs."""
    from tasks.diffusion.device import choose_device

    return config.model_copy(update={"precision": "fp32"}) if choose_device(config).type == "cpu" else config


def draw_settings_grid(sampler: Sampler, target: Target, seed: int, *, on_progress: Show) -> GeneratedImages:
    """Write one contact sheet of one prompt and seed: guidance by row, denoising steps by column."""
    request, source = sampler.request, sampler.source
    guidances = request.grid_guidance or (sampler.guidance_scale,)
    steps = request.grid_steps or (sampler.num_inference_steps,)
    total, cells = len(guidances) * len(steps), list[list["Picture | None"]]()
    for row, guidance in enumerate(guidances):
        cells.append([])
        for column, num in enumerate(steps):
            on_progress(row * len(steps) + column, total)
            cells[-1].append(sampler.draw(request.prompts[0], seed, steps=num, guidance=guidance))
    on_progress(total, total)
    require_any([cell for row in cells for cell in row])
    rows = [f"guidance {guidance:g}" for guidance in guidances]
    rows[0] = f"{rows[0]}\n{request.prompts[0]}\nseed {seed}"
    sheet = draw_contact_sheet(Sheet([f"{num} steps" for num in steps], rows, cells))
    facts = {
        "Title": request.prompts[0],
        "Comment": f"seed {seed}, {source.origin}",
        "Description": request.describe(),
    }
    refused = tuple(
        f"guidance {guidance:g}, {num} steps"
        for guidance, row in zip(guidances, cells, strict=True)
        for num, cell in zip(steps, row, strict=True)
        if cell is None
    )
    path = target.write(target.file or target.folder / f"grid-{seed}.png", sheet, facts=facts)
    return GeneratedImages((), path, refused)


def show_progress(done: int, total: int, *, name: str = "images") -> None:
    """Print how far several images or files are."""
    if total > 1:
        print(f"{name}: {done}/{total}", file=sys.stderr)


@contextmanager
def show_steps() -> Iterator[OnStep]:
    """Yield what shows denoising steps: as a bar on a terminal, else as lines."""
    views = list[ProgressView]()

    def show(done: int, total: int) -> None:
        if not views:  # with the first step: where nothing is drawn, nothing is shown
            views.append(make_progress())
        views[0].update("steps", done, total)

    try:
        yield show
    finally:
        for view in views:
            view.close()


def print_images(done: GeneratedImages) -> None:
    """Print the files with their seeds."""
    for path, seed in done.images:
        print(f"{path}  seed {seed}")
    if done.grid is not None:
        print(f"{done.grid}  grid")
    if done.refused:
        print(f"refused by the safety checker and not written: {'; '.join(done.refused)}", file=sys.stderr)
