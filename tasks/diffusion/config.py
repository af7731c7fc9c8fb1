"""Settings of the base model."""

import difflib
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tasks.config_base import CHECKED, ModelName, PlainName, Section

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
"""Short names; any other is the name of a scheduler class of diffusers."""


@cache
def list_schedulers() -> list[str]:
    """Return the scheduler classes of the installed diffusers, read from its files: its import takes seconds."""
    found = importlib.util.find_spec("diffusers")
    places = found.submodule_search_locations or [] if found else []
    files = [path for place in places for path in (Path(place) / "schedulers").glob("scheduling_*.py")]
    pattern = re.compile(r"^class (\w+Scheduler)\(.*SchedulerMixin", re.MULTILINE)
    return sorted({name for path in files for name in pattern.findall(path.read_text(encoding="utf-8"))})


def check_sampler(value: str) -> str:
    """Return a sampler's name. Raises ValueError for one that neither is a short name nor a scheduler of diffusers."""
    if value in SAMPLERS or value in list_schedulers():
        return value
    near = difflib.get_close_matches(value, [*SAMPLERS, *list_schedulers()], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it is {', '.join(SAMPLERS)} or a scheduler of diffusers"
    raise ValueError(f"no scheduler of that name in diffusers; {hint}")


class DiffusionConfig(Section):
    """The base model and its sampling."""

    family: Literal["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"] = Field(
        description="model adapter"
    )
    pretrained_model_name_or_path: ModelName = Field(
        description="diffusers folder, hub repository, or mini: the shipped model"
    )
    revision: PlainName | None = Field(description="pinned commit of a hub repository")
    resolution: int = Field(ge=32, le=4096, multiple_of=16, description="side of training images and samples, pixels")
    sampler: Annotated[str, AfterValidator(check_sampler), CHECKED] = Field(
        description="scheduler used for sampling: ddim, dpm++, euler, or the class of any diffusers scheduler that "
        "suits the base model, for example UniPCMultistepScheduler"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(description="number format of sampling")
    device: Literal["auto", "cpu", "cuda"] = Field(description="auto: a GPU if there is one")
