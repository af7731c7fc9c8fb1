"""The safety checker of Stable Diffusion 1.x: CLIP embeddings of pictures near embeddings of refused concepts."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.diffusion.config import DiffusionConfig
from tasks.diffusion.hub import MINI_FOLDER
from tasks.encoders.folders import read_preprocessor
from tasks.errors import ConfigError, first_line
from tasks.redaction import logger_level, show_value

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

INDEX, CHECKER, EXTRACTOR = "model_index.json", "safety_checker", "feature_extractor"
CLASS = "StableDiffusionSafetyChecker"
FILES = (INDEX, f"{CHECKER}/config.json", f"{CHECKER}/model.safetensors", f"{EXTRACTOR}/preprocessor_config.json")
LOGGER = "diffusers.pipelines.stable_diffusion.safety_checker"
OFF = "set evaluation.safety_checker=none"
BATCH_SIZE = 16


@dataclass(frozen=True)
class CheckerFiles:
    """The folders of a safety checker and of its preprocessor."""

    checker: Path
    extractor: Path
    off: str = OFF
    """The setting that turns it off, for errors."""


def find_safety_checker(setting: str, config: DiffusionConfig, *, off: str = OFF) -> CheckerFiles | None:
    """Return the base model's safety checker, downloaded where it is a hub's; None where it has none, or it is off.

    `off` is the setting that turns it off, for errors.

    Raises:
        ConfigError: the model names one that can't be had or isn't supported.

    """
    if setting == "none" or config.family != "stable_diffusion":
        return None  # no other family has one
    location = config.pretrained_model_name_or_path
    folder = MINI_FOLDER / "base" if location == "mini" else Path(location)
    folder = folder if folder.is_dir() else fetch(config, off=off)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        name = (index.get(CHECKER) or (None, None))[1]
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, IndexError) as error:
        raise ConfigError(f"{folder / INDEX} can't be read: {first_line(error)}") from error
    if name is None:  # `[null, null]` marks an absent component
        return None
    if name != CLASS:
        raise ConfigError(f"{folder} has the safety checker {show_value(str(name))}, which isn't supported; {off}")
    found = CheckerFiles(folder / CHECKER, folder / EXTRACTOR, off)
    missing = [path for path in FILES if not (folder / path).is_file()]
    if missing:
        raise ConfigError(f"the safety checker of {location} lacks {missing[0]}; download the model again, or {off}")
    read_preprocessor(found.extractor)
    return found


def fetch(config: DiffusionConfig, *, off: str) -> Path:
    """Return the local copy of a hub repository's safety checker. Raises ConfigError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    location = config.pretrained_model_name_or_path
    try:
        return Path(snapshot_download(location, revision=config.revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = "it is not cached and the hub is not reached"
        reason = reason if isinstance(error, LocalEntryNotFoundError) else first_line(error)
        raise ConfigError(f"no safety checker of {location}: {reason}; run once online, or {off}") from error


class SafetyChecker:
    """Tells which pictures show refused concepts."""

    def __init__(self, files: CheckerFiles, device: "torch.device") -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        from tasks.encoders.embeddings import Preprocessor

        self.device = device
        model, report = StableDiffusionSafetyChecker.from_pretrained(
            files.checker, use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ConfigError(f"{files.checker} lacks {len(report['missing_keys'])} weights of a {CLASS}; {files.off}")
        self.model: Any = model.to(device).eval()
        self.preprocess = Preprocessor(files.extractor)

    def find_unsafe(self, pictures: "Sequence[Image]") -> list[bool]:
        """Return for each picture whether it is refused."""
        import numpy as np
        import torch

        found: list[bool] = []
        # diffusers warns of each refused picture; they are counted.
        with torch.no_grad(), logger_level(LOGGER, logging.ERROR):
            for start in range(0, len(pictures), BATCH_SIZE):
                batch = torch.stack([self.preprocess(picture) for picture in pictures[start : start + BATCH_SIZE]])
                # It blackens refused pictures of its second argument, of which there is no use here.
                blank = np.zeros((len(batch), 1, 1, 3))
                found += map(bool, self.model(clip_input=batch.to(self.device), images=blank)[1])
        return found
