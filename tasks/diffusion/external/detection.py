"""What a path holds: a diffusers folder, a LoRA, or a textual-inversion embedding. Reads headers, loads no weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.errors import ConfigError, first_line
from tasks.stage.digests import digest, digest_file, digest_folder

Kind = Literal["pipeline", "lora", "textual_inversion"]
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
MAX_HEADER = 100_000_000
LYCORIS = ("hada_", "lokr_", "oft_", "boft_", "glora")
MAX_EMBEDDINGS = 4
INDEX = "model_index.json"


@dataclass(frozen=True)
class ExternalModel:
    """A model of another trainer: a folder, or a safetensors file with the names of its tensors."""

    path: Path
    kind: Kind
    keys: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()

    def compute_digest(self) -> str:
        """Return the digest of its content."""
        return digest([self.kind, digest_folder(self.path) if self.path.is_dir() else digest_file(self.path)])


def detect(location: str) -> ExternalModel:
    """Return what a path holds.

    Raises:
        ConfigError: it is missing, a pickle, of an unknown kind, or a folder of several files.

    """
    path = Path(location).expanduser()
    if not path.exists():
        raise ConfigError(f"there is no model at {path}; name a diffusers folder, a LoRA or an embedding")
    if path.is_dir() and (path / INDEX).is_file():
        return ExternalModel(path, "pipeline")
    if path.is_dir():
        path = find_weights(path)
    if path.suffix in PICKLES:
        raise ConfigError(f"{path} is a pickle, which can run code; convert it to safetensors")
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is no model: name a diffusers folder or a file in safetensors")
    header = read_header(path)
    metadata = header.pop("__metadata__", {})
    entries = tuple((name, str(value)) for name, value in sorted(metadata.items()))
    return ExternalModel(path, find_kind(path, header), tuple(header), entries)


def find_weights(folder: Path) -> Path:
    """Return the one weights file of a folder. Raises ConfigError where there is none, or more than one."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    # Our own exports hold the same adapter in two formats.
    found = [path for path in files if path.suffix == ".safetensors" and path.name != "lora_kohya.safetensors"]
    if len(found) == 1:
        return found[0]
    pickles = [path.name for path in files if path.suffix in PICKLES]
    if not found and pickles:
        raise ConfigError(f"{folder} holds {pickles[0]}, a pickle, which can run code; convert it to safetensors")
    if not found:
        raise ConfigError(f"{folder} holds neither {INDEX} nor a file in safetensors")
    raise ConfigError(f"{folder} holds {found[0].name} and {found[1].name}; name one of them")


def read_header(path: Path) -> dict[str, dict[str, object]]:
    """Return the header of a safetensors file: dtype and shape by tensor. Raises ConfigError for a damaged file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(MAX_HEADER, path.stat().st_size):
                raise ValueError("its header is damaged")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is damaged")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no safetensors file: {first_line(error)}") from error
    return header


def find_kind(path: Path, header: dict[str, dict[str, object]]) -> Kind:
    """Return what tensors are, by their names. Raises ConfigError for a kind that isn't supported."""
    keys = list(header)
    for key in keys:
        if any(mark in key for mark in LYCORIS):
            raise ConfigError(f"{path} is a LyCORIS network ({key}), of which only LoRA is supported")
    if any("lora" in key for key in keys):
        return "lora"
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in keys):
        raise ConfigError(f"{path} is a whole model in one file; convert it to a diffusers folder")
    shapes = [header[key].get("shape") for key in keys]
    is_small = 0 < len(keys) <= MAX_EMBEDDINGS and all(isinstance(shape, list) and len(shape) < 3 for shape in shapes)
    if is_small:
        return "textual_inversion"
    raise ConfigError(f"{path} holds neither a LoRA nor an embedding (first tensor {keys[0] if keys else 'none'})")
