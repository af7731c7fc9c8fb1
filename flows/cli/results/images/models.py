"""Weights to generate with: a run's, or a model that others trained."""

import gc
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from conf.groups import CONFIG_DIR, extra_config_dir, list_options, read_default_options
from conf.schema import RunConfig
from flows.cli.results.runs import find_run
from flows.runs.records import read_run
from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.external.detection import INDEX, ExternalModel, detect
from tasks.errors import ConfigError, first_line
from tasks.evaluation.config import EvaluationConfig
from tasks.manifests.publishing import LINEAGE, Publication
from tasks.manifests.training import TunedModel, find_below
from tasks.redaction import show_value
from tasks.services.store.base import Store

PIPELINES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd35-medium",
    "FluxPipeline": "flux-dev",
}
"""The option of `diffusion` whose sampling settings suit a pipeline class."""
DEFAULT_TOKEN = "sks"  # noqa: S105 - how prompts name an embedding


@dataclass(frozen=True)
class ModelChoice:
    """Which model, as typed."""

    name: str
    """A run, or the path of a model."""
    base: str | None = None
    """For a model from elsewhere: an option of `diffusion`, or a diffusers folder."""
    token: str | None = None
    """How prompts name an embedding from elsewhere."""


@dataclass(frozen=True)
class ImageSource:
    """Weights, and the settings that samples of them take where nothing else is asked for."""

    weights: Path
    """What `load_model` opens."""
    diffusion: DiffusionConfig
    evaluation: EvaluationConfig
    folder: Path
    """Where images go by default."""
    origin: str
    """For the PNG text of images."""
    subject: tuple[str, str] | None = None
    """Identifier token and class noun."""
    is_external: bool = False


@contextmanager
def open_source(output: Path, choice: ModelChoice, *, candidate: int | None = None) -> Iterator[ImageSource]:
    """Yield the weights of a run or of a model from elsewhere, which exist until the end of the block.

    Raises:
        ConfigError: there is no such run or model, it did not finish, or it can't be loaded.

    """
    path, folder = Path(choice.name).expanduser(), None
    try:
        folder = find_run(output, choice.name, is_trained=True)
    except ConfigError:
        if not path.exists() and path.name == choice.name and path.suffix != ".safetensors":
            raise  # a name, not a path
    if folder is not None:
        if choice.base is not None or choice.token is not None:
            raise ConfigError("--base and --token take a model from elsewhere; a run knows its own")
        yield open_run_model(folder, candidate=candidate)
        return
    if candidate is not None:
        raise ConfigError("--candidate takes a run: a model from elsewhere has no retained checkpoints")
    with TemporaryDirectory(prefix="likeness-") as work:
        yield open_external(detect(choice.name), choice, Path(work))


def open_run_model(folder: Path, *, candidate: int | None) -> ImageSource:
    """Return the published weights of a run, or those of a retained checkpoint. Raises ConfigError."""
    from tasks.services.store.open import open_store

    run = read_run(folder)
    is_evaluated = run.summary.evaluated is not None
    names, config = run.summary.subject, run.config
    key = run.find_stage_key("training" if is_evaluated or candidate is not None else "publishing")
    store, work = open_store(config.store), Path(config.output_dir) / "work"
    if is_evaluated and candidate is None:
        weights = fetch_imported(store, folder.name, key, work=work)
    else:
        weights = fetch_weights(store, folder.name, key, candidate=candidate, work=work)
    return ImageSource(
        weights, config.diffusion, config.evaluation, folder,
        f"run {folder.name}, step {'published' if candidate is None else candidate}",
        (names.identifier_token, names.class_noun) if names else None,
    )  # fmt: skip


def open_external(external: ExternalModel, choice: ModelChoice, work: Path) -> ImageSource:
    """Return a model from elsewhere; adapters are converted into `work`, where nothing of them is skipped silently.

    Raises:
        ConfigError: the base is unknown, or the model is for another one, has a part that doesn't load, or a pickle.

    """
    if external.kind == "pipeline" and choice.base is None:
        config, diffusion = configure_folder(external.path)
    else:
        config, diffusion = configure_base(choice.base or find_base(external))
    weights = external.path
    if external.kind == "pipeline":
        diffusion = replace_model(diffusion, external.path)
    else:
        from tasks.diffusion.external.conversion import convert

        weights = work / "model"
        convert(external, diffusion, weights, identifier_token=choice.token or DEFAULT_TOKEN)
    origin = f"{external.path.name}, {external.kind}"
    return ImageSource(weights, diffusion, config.evaluation, Path.cwd(), origin, is_external=True)


def configure_base(base: str) -> tuple[RunConfig, DiffusionConfig]:
    """Return the configuration of an option of `diffusion`, or of a diffusers folder. Raises ConfigError."""
    if base in list_options("diffusion"):
        config = compile_preset(base)
        return config, config.diffusion
    if Path(base).expanduser().is_dir():
        return configure_folder(Path(base).expanduser())
    options = ", ".join(list_options("diffusion"))
    raise ConfigError(f"--base {show_value(base)} is no diffusers folder and none of {options}")


def compile_preset(option: str) -> RunConfig:
    """Return the configuration of a run with a base model: of interest are its sampling settings."""
    from conf.compose import compile_request
    from conf.overrides import parse_overrides

    words = [f"diffusion={option}", "subject.source=.", "subject.class_noun=thing"]
    # RunConfig refuses the default LLM, which knows the drawn world alone, with any other base model.
    return compile_request(parse_overrides(words if option == "mini" else [*words, "llm=openai"]))


def configure_folder(folder: Path) -> tuple[RunConfig, DiffusionConfig]:
    """Return the configuration that samples a diffusers folder. Raises ConfigError for an unknown pipeline."""
    index = read_json(folder / INDEX)
    option = PIPELINES.get(str(index.get("_class_name")))
    if option is None:
        known = ", ".join(PIPELINES)
        raise ConfigError(f"{folder} is a {show_value(str(index.get('_class_name')))}, not one of {known}")
    config = compile_preset(option)
    changes: dict[str, object] = {"resolution": find_resolution(folder) or config.diffusion.resolution}
    return config, replace_model(config.diffusion, folder, **changes)


def replace_model(config: DiffusionConfig, folder: Path, **changes: object) -> DiffusionConfig:
    """Return a configuration for the model in a folder. Raises ConfigError for a path that no setting may hold."""
    values = {**config.model_dump(), "pretrained_model_name_or_path": str(folder), "revision": None, **changes}
    try:
        return DiffusionConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{folder}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def find_resolution(folder: Path) -> int | None:
    """Return the side that a pipeline was trained for, in px, as its denoiser and VAE say; None where they don't."""
    denoiser = next(
        (path for name in ("unet", "transformer") if (path := folder / name / "config.json").is_file()), None
    )
    if denoiser is None or not (folder / "vae" / "config.json").is_file():
        return None
    side, blocks = (
        read_json(denoiser).get("sample_size"),
        read_json(folder / "vae" / "config.json").get("block_out_channels"),
    )
    if type(side) is not int or not isinstance(blocks, list) or not 1 <= len(blocks) <= 8:
        return None
    resolution = side * 2 ** (len(blocks) - 1)
    return resolution if 32 <= resolution <= 4096 and resolution % 16 == 0 else None


def read_json(path: Path) -> dict[str, object]:
    """Return a JSON object. Raises ConfigError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a mapping")
    return found


def find_base(external: ExternalModel) -> str:
    """Return the option of `diffusion` that adapters are for: as our export says, else the default.

    The export's file names a location; only that of a known option counts, so that no file chooses a download.
    """
    lineage = external.path.with_name(LINEAGE)
    if lineage.is_file():
        base = read_json(lineage).get("base_model")
        location = base.get("location") if isinstance(base, dict) else None
        for option, known in read_locations().items():
            if known == location:
                return option
        raise ConfigError(f"{lineage} names the base model {show_value(str(location))}; give it with --base")
    return read_default_options()["diffusion"]


def read_locations() -> dict[str, str]:
    """Return the base model of every option of `diffusion`."""
    import yaml

    found: dict[str, str] = {}
    for folder in filter(None, (extra_config_dir(), CONFIG_DIR)):
        for path in sorted((folder / "diffusion").glob("*.yaml")):
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            found.setdefault(path.stem, str(values.get("diffusion", {}).get("pretrained_model_name_or_path", "")))
    return found


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
    # Another checkpoint may be published than the one that training chose.
    candidates = {**manifest.find_candidates(), manifest.published_step: list(manifest.model)}
    if candidate not in candidates:
        retained = ", ".join(map(str, sorted(manifest.find_candidates()))) or "none; see training.validation.save_top_k"
        raise ConfigError(
            f"run {name} retained no checkpoint of step {candidate} besides the published one (retained: {retained})"
        )
    refs = candidates[candidate]
    return fetch_folder(store, refs, below=find_below(refs), folder=work / "candidates" / key / str(candidate))


def fetch_imported(store: Store, name: str, key: str, *, work: Path) -> Path:
    """Copy the model that an evaluation imported to local files. Raises ConfigError."""
    from tasks.stage.cache import fetch_folder, find_manifest

    manifest = find_manifest(store, TunedModel, stage="training", key=key)
    if manifest is None:
        raise ConfigError(f"the model of run {name} is missing from the store; evaluate it again")
    return fetch_folder(store, manifest.model, below="model", folder=work / "published" / key)
