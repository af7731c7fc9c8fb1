"""Generate images with a run's tuned model."""

import gc
import json
import math
import os
import re
import secrets
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from flows.cli.arguments import MAX_INTEGER
from flows.runs.records import read_run
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.types import LORA_FILE
from tasks.errors import ConfigError, first_line
from tasks.images import SOURCE_TYPE, XMP_KEY, encode_png, read_mark
from tasks.manifests.publishing import Publication
from tasks.manifests.training import TunedModel
from tasks.publishing.prompt_policy import check_prompt
from tasks.services.store.base import Store
from tasks.stage.files import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


MAX_IMAGES, MAX_PROMPTS, MAX_LINE = 1_000, 1_000, 2_000
GRID_SIDE = 256


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

    def describe(self) -> str:
        """Return the settings that shape the images, as JSON for a PNG text chunk."""
        left_out = ("prompts", "num", "seed", "candidate")
        return json.dumps({name: value for name, value in asdict(self).items() if name not in left_out})


@dataclass(frozen=True)
class Target:
    """Where images go: a file, or files of a folder; and whether a grid of all is written too."""

    folder: Path
    file: Path | None = None
    has_grid: bool = False

    def name(self, seed: int, number: int, *, num: int) -> Path:
        """Return the file of one image."""
        if num == 1:
            return self.file or self.folder / f"image-{seed}.png"
        if self.file is None:
            return self.folder / f"image-{seed}-{number:03d}.png"
        return self.file.with_name(f"{self.file.stem}-{number:03d}{self.file.suffix}")

    def grid(self) -> Path:
        """Return the grid's file."""
        return self.file.with_name(f"{self.file.stem}-grid.png") if self.file else self.folder / "grid.png"

    def check(self, *, num: int) -> None:
        """Refuse an output file that cannot be written, or would replace anything but a generated image.

        Raises:
            ConfigError: names the file.

        """
        if self.file is None:
            return
        if self.file.suffix.lower() != ".png":
            raise ConfigError(f"--out {str(self.file)!r} must name a file that ends in .png")
        for path in [self.name(0, n, num=num) for n in range(num)] + ([self.grid()] if self.has_grid else []):
            check_replaceable(path)
        parent = next(folder for folder in self.file.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(f"--out {self.file}: {parent} is no folder that can be written; choose another")

    def write(self, path: Path, picture: "Picture", *, facts: Mapping[str, str]) -> Path:
        """Write one image and return its file: a default name that another image has is numbered."""
        if self.file is None:
            path = find_free(path, facts)
        write(path, encode_png(picture, is_generated=True, facts=facts))
        return path


@dataclass(frozen=True)
class GeneratedImages:
    """The files written, with their seeds, and the grid's."""

    images: tuple[tuple[Path, int], ...]
    grid: Path | None = None


def read_generated(path: Path) -> dict[str, str] | None:
    """Return the text chunks of a PNG marked as generated; None for any other file."""
    from PIL.Image import DecompressionBombError

    try:
        mark = read_mark(path.read_bytes())
    except (OSError, SyntaxError, ValueError, DecompressionBombError):  # no image, damaged, or too large
        return None
    return mark if mark.get("Software") == "likeness" and SOURCE_TYPE in mark.get(XMP_KEY, "") else None


def check_replaceable(path: Path) -> None:
    """Raise ConfigError where a file exists that is no image of `likeness generate`."""
    if not os.path.lexists(path):
        return
    # A read-only file is an object of the store.
    if not path.is_file() or not path.stat().st_mode & 0o200 or read_generated(path) is None:
        raise ConfigError(f"--out: {path} exists and is no generated image; choose another file")


def find_free(path: Path, facts: Mapping[str, str]) -> Path:
    """Return a path, numbered from 2 where other images have the names; the same image is replaced."""
    free, number = path, 1
    while os.path.lexists(free):
        mark = read_generated(free)
        if mark is not None and all(mark.get(name) == value for name, value in facts.items()):
            break
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


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
            if len(request.prompts) == 1:
                raise
            raise ConfigError(f"--prompts-file: prompt {number}: {error}") from error
    if request.size is not None and request.size % 8:
        raise ConfigError(f"--size {request.size} is not a multiple of 8; use {round(request.size / 8) * 8}")
    if request.num * len(request.prompts) > MAX_IMAGES:
        raise ConfigError(f"{request.num * len(request.prompts):,} images, at most {MAX_IMAGES:,} at once")
    if request.seed is not None and request.seed + request.num - 1 > MAX_INTEGER:
        raise ConfigError(f"--seed {request.seed}: at most {MAX_INTEGER - request.num + 1} with --num {request.num}")


def generate(
    folder: Path, request: ImageRequest, target: Target, *, on_progress: Callable[[int, int], None]
) -> GeneratedImages:
    """Generate images with a run's weights; return their files and seeds. Each is written as soon as it is there.

    Raises:
        ConfigError: the run did not finish, retained no checkpoint of that step, or a prompt or file is refused.

    """
    from tasks.diffusion.registry import load_model
    from tasks.diffusion.types import SamplingRequest
    from tasks.services.store.open import open_store

    run = read_run(folder)
    names = run.summary.subject
    check_request(request, subject=(names.identifier_token, names.class_noun) if names else None)
    target.check(num=request.num * len(request.prompts))
    config, key = run.config, run.find_stage_key("publishing" if request.candidate is None else "training")
    diffusion = change_diffusion(config.diffusion, request)
    store, work = open_store(config.store), Path(config.output_dir) / "work"
    weights = fetch_weights(store, folder.name, key, candidate=request.candidate, work=work)
    if request.lora_scale != 1 and not (weights / LORA_FILE).is_file():
        raise ConfigError("--lora-scale needs a LoRA; the run's model has none (training.method=lora trains one)")
    first = secrets.randbelow(2**31 - request.num) if request.seed is None else request.seed
    planned = [(prompt, first + number) for prompt in request.prompts for number in range(request.num)]
    with fast_imports(weights):
        model = load_model(diffusion, folder=weights, lora_scale=request.lora_scale)
    done, pictures = [], []
    origin = f"run {folder.name}, step {'published' if request.candidate is None else request.candidate}"
    for number, (prompt, seed) in enumerate(planned):
        on_progress(number, len(planned))
        # One at a time: each is on disk before the next begins, and the first one soon.
        [picture] = model.sample(
            [SamplingRequest(prompt=prompt, seed=seed, negative_prompt=request.negative_prompt)],
            num_inference_steps=request.num_inference_steps or config.evaluation.num_inference_steps,
            guidance_scale=request.guidance_scale or config.evaluation.guidance_scale,
        )
        facts = {"Title": prompt, "Comment": f"seed {seed}, {origin}", "Description": request.describe()}
        done.append((target.write(target.name(seed, number, num=len(planned)), picture, facts=facts), seed))
        pictures.append(picture)
    on_progress(len(planned), len(planned))
    if not target.has_grid:
        return GeneratedImages(tuple(done))
    facts = {
        "Title": "\n".join(request.prompts),
        "Comment": f"seeds {first} to {first + request.num - 1}, {origin}",
        "Description": request.describe(),
    }
    grid = target.write(target.grid(), draw_grid(pictures, columns=request.num), facts=facts)
    return GeneratedImages(tuple(done), grid)


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


def draw_grid(pictures: Sequence["Picture"], *, columns: int) -> "Picture":
    """Return the pictures in rows of one prompt each; all in one near-square grid where each prompt has one."""
    from PIL import Image

    columns = columns if columns > 1 else math.ceil(math.sqrt(len(pictures)))
    side = min(GRID_SIDE, pictures[0].width)
    grid = Image.new("RGB", (columns * side, math.ceil(len(pictures) / columns) * side), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        grid.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (column * side, row * side))
    return grid


def show_progress(done: int, total: int, *, name: str = "images") -> None:
    """Print how far several images or files are."""
    if total > 1:
        print(f"{name}: {done}/{total}", file=sys.stderr)


def write(path: Path, data: bytes) -> None:
    """Write a picture. Raises ConfigError that names the option."""
    try:
        write_atomic(path, data)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; set --out") from error


@contextmanager
def fast_imports(weights: Path) -> Iterator[None]:
    """Import less, and faster, in a process that has imported nothing heavy yet.

    diffusers imports bitsandbytes, scipy and peft wherever they are installed: 1.2 s of the 5.5 s to the first
    picture of the mini model. Sampling needs peft for adapters, and scipy for beta sigmas. The garbage collector
    finds nothing among modules that are being imported, but walks through them all each time: another 0.8 s.
    """
    if "torch" in sys.modules:  # what is imported stays, and others may need the rest
        yield
        return
    unused = ["bitsandbytes"]
    if (weights / "model_index.json").is_file():
        # A whole pipeline, without an adapter to load.
        unused.append("peft")
        scheduler = weights / "scheduler" / "scheduler_config.json"
        if scheduler.is_file() and not re.search(rb'"use_beta_sigmas"\s*:\s*true', scheduler.read_bytes()):
            unused.append("scipy")
    for name in unused:
        # With None in sys.modules, `find_spec` returns None, and diffusers takes the package for not installed.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    gc.disable()
    try:
        yield
    finally:
        # Moves the imported modules to the permanent generation, which later collections skip.
        gc.freeze()
        gc.enable()


def fetch_weights(store: Store, name: str, key: str, *, candidate: int | None, work: Path) -> Path:
    """Copy the published weights of a run, or a candidate's, to local files."""
    from tasks.stage.cache import fetch_folder, find_manifest

    if candidate is None:
        manifest: Publication | TunedModel | None = find_manifest(store, Publication, stage="publishing", key=key)
    else:
        manifest = find_manifest(store, TunedModel, stage="training", key=key)
    if manifest is None:
        raise ConfigError(f"the model of run {name} is missing from the store; run it again")
    if isinstance(manifest, Publication):
        return fetch_folder(store, manifest.model, below="model", folder=work / "published" / key)
    candidates = manifest.find_candidates()
    if candidate not in candidates:
        retained = ", ".join(map(str, sorted(candidates))) or "none; see training.validation.save_top_k"
        raise ConfigError(
            f"run {name} retained no checkpoint of step {candidate} besides the published one (retained: {retained})"
        )
    below = f"candidates/step-{candidate:08d}"
    return fetch_folder(store, candidates[candidate], below=below, folder=work / "candidates" / key / str(candidate))
