"""Generate single images with a run's tuned model."""

import gc
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.runs.records import read_run
from tasks.errors import ConfigError
from tasks.manifests.publishing import Publication
from tasks.manifests.training import TunedModel
from tasks.services.store.base import Store


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate; None: as the run's evaluation says."""

    prompt: str
    seed: int | None = None
    """None: random."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    candidate: int | None = None
    """The step whose retained weights draw; None: the published ones."""


def generate(folder: Path, request: ImageRequest, *, out: Path | None = None) -> tuple[Path, int]:
    """Generate one image with a run's weights; return its file and seed.

    Raises:
        ConfigError: the run did not finish, or retained no weights of that step.

    """
    from tasks.diffusion.registry import load_model
    from tasks.diffusion.types import SamplingRequest
    from tasks.services.store.open import open_store

    run = read_run(folder)
    config, key = run.config, run.find_stage_key("publishing" if request.candidate is None else "training")
    store, work = open_store(config.store), Path(config.output_dir) / "work"
    weights = fetch_weights(store, folder.name, key, candidate=request.candidate, work=work)
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    with fast_imports(weights):
        model = load_model(config.diffusion, folder=weights)
    picture = model.sample(
        [SamplingRequest(prompt=request.prompt, seed=seed)],
        num_inference_steps=request.num_inference_steps or config.evaluation.num_inference_steps,
        guidance_scale=request.guidance_scale or config.evaluation.guidance_scale,
    )[0]
    path = out or folder / f"image-{seed}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="PNG")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; set --out") from error
    return path, seed


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
            f"run {name} retained no weights of step {candidate} besides the published ones (retained: {retained})"
        )
    below = f"candidates/step-{candidate:08d}"
    return fetch_folder(store, candidates[candidate], below=below, folder=work / "candidates" / key / str(candidate))
