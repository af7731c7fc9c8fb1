"""What to generate: prompts, seeds and sampling settings, checked before anything is loaded."""

import json
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from flows.cli.arguments import MAX_INTEGER
from tasks.diffusion.config import DiffusionConfig
from tasks.errors import ConfigError, first_line
from tasks.publishing.prompt_policy import check_prompt
from tasks.redaction import show_value

MAX_IMAGES, MAX_PROMPTS, MAX_LINE = 1_000, 1_000, 2_000
MAX_CELLS = 100
GUIDANCE, STEPS = (1.0, 30.0), (1, 1000)
"""Bounds of a settings grid, those of the options for one image."""


@dataclass(frozen=True)
class ImageRequest:
    """Images to generate; None: as the run's evaluation says."""

    prompts: tuple[str, ...]
    num: int = 1
    """Images per prompt; their seeds follow each other."""
    seed: int | None = None
    """None: random."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    candidate: int | None = None
    """The step of the retained checkpoint to use; None: the published weights."""
    size: int | None = None
    """Side of the square image, in px."""
    sampler: str | None = None
    lora_scale: float = 1.0
    negative_prompt: str = ""
    grid_guidance: tuple[float, ...] = ()
    """Guidance scales of a settings grid; empty: one."""
    grid_steps: tuple[int, ...] = ()
    """Denoising steps of a settings grid; empty: one."""
    is_checked: bool | None = None
    """Whether the base model's safety checker checks the images; None: as the evaluation is configured."""

    @property
    def is_settings_grid(self) -> bool:
        """Whether one prompt and seed are drawn with several settings."""
        return bool(self.grid_guidance or self.grid_steps)

    def count_pictures(self) -> int:
        """Return how many pictures are drawn."""
        if self.is_settings_grid:
            return max(1, len(self.grid_guidance)) * max(1, len(self.grid_steps))
        return self.num * len(self.prompts)

    def describe(self) -> str:
        """Return the settings that shape the images, as JSON for a PNG text chunk."""
        left_out = {"prompts", "num", "seed", "candidate", "is_checked"}
        left_out |= set() if self.is_settings_grid else {"grid_guidance", "grid_steps"}
        return json.dumps({name: value for name, value in asdict(self).items() if name not in left_out})


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a file, one per line; empty lines and `#` comments are left out. Raises ConfigError."""
    try:
        # Lines end at "\n" only: `splitlines` also splits at characters that a prompt may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a NUL
        raise ConfigError(f"--prompts-file: {path} cannot be read: {first_line(error)}") from error
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise ConfigError(f"--prompts-file: {path} has {len(prompts):,} prompts, must be 1 to {MAX_PROMPTS:,}")
    for number, prompt in enumerate(prompts, 1):
        check_text(prompt, f"--prompts-file: prompt {number}")
    return prompts


def check_text(text: str, name: str) -> None:
    """Raise ConfigError for a prompt with control characters or invalid UTF-8, or a long one."""
    # Surrogates (Cs) stand for bytes of an argument that are not UTF-8.
    if any(unicodedata.category(char) in ("Cc", "Cs") and char != "\t" for char in text):
        raise ConfigError(f"{name} has control characters or invalid UTF-8; write it as plain text")
    if len(text) > MAX_LINE:
        raise ConfigError(f"{name} has {len(text):,} characters, at most {MAX_LINE:,}; shorten it")


def check_request(request: ImageRequest, *, subject: tuple[str, str] | None = None) -> None:
    """Refuse an invalid request before anything is loaded; `subject`: identifier token and class noun.

    Raises:
        ConfigError: names the option, and the number of the prompt where there are several.

    """
    check_text(request.negative_prompt, "--negative")
    for number, prompt in enumerate(request.prompts, 1):
        check_text(prompt, "the prompt")
        try:
            check_prompt(prompt, negative_prompt=request.negative_prompt, subject=subject)
        except ConfigError as error:
            if len(request.prompts) > 1:  # the same error: what is refused is logged by its rule
                error.args = (f"--prompts-file: prompt {number}: {error}",)
            raise
    check_settings_grid(request)
    if request.size is not None and request.size % 8:
        raise ConfigError(f"--size {request.size} is not a multiple of 8; use {round(request.size / 8) * 8}")
    if request.count_pictures() > MAX_IMAGES:
        raise ConfigError(f"{request.count_pictures():,} images, at most {MAX_IMAGES:,} at once")
    if request.seed is not None and request.seed + request.num - 1 > MAX_INTEGER:
        raise ConfigError(f"--seed {request.seed}: at most {MAX_INTEGER - request.num + 1} with --num {request.num}")


def change_diffusion(config: DiffusionConfig, request: ImageRequest) -> DiffusionConfig:
    """Return a run's model configuration with the request's size and sampler. Raises ConfigError."""
    changes: dict[str, object] = {}
    if request.size is not None:
        changes["resolution"] = request.size
    if request.sampler is not None:
        changes["sampler"] = request.sampler
    try:
        return DiffusionConfig.model_validate({**config.model_dump(), **changes})
    except ValidationError as error:
        found = error.errors()[0]
        name = {"resolution": "--size", "sampler": "--sampler"}.get(str(found["loc"][0]), str(found["loc"][0]))
        raise ConfigError(f"{name}: {found['msg'].removeprefix('Value error, ')}") from error


def read_values(text: str | None, option: str, bounds: tuple[float, float]) -> tuple[float, ...]:
    """Return the numbers of a comma-separated list; empty for None. Raises ConfigError that names the option."""
    if text is None:
        return ()
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} {show_value(text)} is no list of numbers; write for example 3,5,7.5") from error
    low, high = bounds
    for value in values:
        if not low <= value <= high:  # false for NaN
            raise ConfigError(f"{option}: {value:g} is out of bounds; it must be {low:g} to {high:g}")
    if len(set(values)) < len(values):
        raise ConfigError(f"{option} {show_value(text)} names a value twice; leave one out")
    return values


def read_steps(text: str | None, option: str) -> tuple[int, ...]:
    """Return the numbers of steps of a comma-separated list. Raises ConfigError."""
    values = read_values(text, option, STEPS)
    if any(value != int(value) for value in values):
        raise ConfigError(f"{option} {show_value(text or '')}: steps are whole numbers; write for example 20,50")
    return tuple(map(int, values))


def check_settings_grid(request: ImageRequest) -> None:
    """Raise ConfigError where a settings grid is combined with what it replaces, or is too large."""
    if not request.is_settings_grid:
        return
    if len(request.prompts) > 1 or request.num > 1:
        raise ConfigError(
            "--grid-guidance and --grid-steps draw one prompt and seed; leave --prompts-file and --num out"
        )
    if request.grid_guidance and request.guidance_scale is not None:
        raise ConfigError("give --guidance or --grid-guidance, not both")
    if request.grid_steps and request.num_inference_steps is not None:
        raise ConfigError("give --steps or --grid-steps, not both")
    if request.count_pictures() > MAX_CELLS:
        raise ConfigError(f"the grid has {request.count_pictures()} images, at most {MAX_CELLS}; name fewer values")
