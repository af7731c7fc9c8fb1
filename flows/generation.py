"""Draw single pictures with a run's tuned model."""

import json
import secrets
from pathlib import Path

from conf.schema import RunConfig
from tasks.errors import ConfigError
from tasks.manifests import Publication


def generate(
    folder: Path,
    prompt: str,
    *,
    seed: int | None = None,
    out: Path | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> tuple[Path, int]:
    """Draw one picture and return its file and seed. Raises ConfigError for an unfinished run."""
    from tasks.contract import fetch_folder, find_manifest
    from tasks.diffusion.base import SamplingRequest, open_model
    from tasks.services.store import open_store

    config = RunConfig.model_validate_json((folder / "config.json").read_text())
    own_store = f"{config.output_dir}/store"
    if config.store.folder == own_store:  # relative to where the run was started; its folder knows better
        moved = config.store.model_copy(update={"folder": str(folder.parent / "store")})
        config = config.model_copy(update={"store": moved, "output_dir": str(folder.parent)})
    summary = json.loads((folder / "summary.json").read_text())
    if summary["status"] != "finished":
        raise ConfigError(f"run {folder.name} did not finish; it has no model")
    store = open_store(config.store)
    key = summary["stages"]["publishing"]["key"]
    publication = find_manifest(store, Publication, "publishing", key)
    if publication is None:
        raise ConfigError(f"the model of run {folder.name} is gone from the store; run it again")
    local = Path(config.output_dir) / "work" / "published" / key
    weights = fetch_folder(store, publication.model, below="model", folder=local)
    seed = secrets.randbelow(2**31) if seed is None else seed
    model = open_model(config.diffusion, folder=weights)
    picture = model.sample(
        [SamplingRequest(prompt=prompt, seed=seed)],
        num_inference_steps=num_inference_steps or config.evaluation.num_inference_steps,
        guidance_scale=guidance_scale or config.evaluation.guidance_scale,
    )[0]
    path = out or folder / f"picture-{seed}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="PNG")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; set --out") from error
    return path, seed
