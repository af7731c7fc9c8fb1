"""Config groups and their options, discovered from the files in `conf/`: a new file is a new option in form and CLI."""

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `likeness --help` lists options, and must not wait for pydantic
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema

CONFIG_DIR = Path(__file__).resolve().parent
# Groups of conf/ by the request's field.
GROUPS = {
    "subject": "subject", "prior": "prior", "method": "training/method",
    "devices": "training/devices", "evaluation": "evaluation", "encoders": "evaluation/encoders",
    "scoring": "scoring", "publishing": "publishing", "diffusion": "diffusion", "llm": "llm",
    "store": "store", "tracking": "tracking", "experiment": "experiment",
}  # fmt: skip
FIELDS = {group: field for field, group in GROUPS.items()}


@cache
def read_default_options() -> dict[str, str]:
    """Return the default option of every group: the defaults list of `run.yaml`."""
    # By pattern: help and completion list them, and importing a YAML parser would double their start-up.
    return dict(re.findall(r"^  - ([\w/]+): ([\w+-]+)", (CONFIG_DIR / "run.yaml").read_text(), re.MULTILINE))


def extra_config_dir() -> Path | None:
    """Return the operator's own folder of options, LIKENESS_CONF: the same groups, searched beside `conf/`."""
    named = os.environ.get("LIKENESS_CONF", "")
    return Path(named).absolute() if named else None


def list_options(group: str) -> list[str]:
    """Return the options of a group, sorted: its YAML files' names."""
    folders = [CONFIG_DIR, *filter(None, [extra_config_dir()])]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


@dataclass(frozen=True)
class OptionOf:
    """Restricts a string to the options of a group, in validation and in the form's schema."""

    group: str

    def check(self, value: str) -> str:
        """Return an option. Raises ValueError that lists the valid ones."""
        # Listed at every check, since options are files that may be added while a server runs.
        options = list_options(self.group)
        if value not in options:
            raise ValueError(f"must be one of {', '.join(options)}")
        return value

    def __get_pydantic_core_schema__(self, source: object, handler: "GetCoreSchemaHandler") -> "CoreSchema":
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: "CoreSchema", handler: "GetJsonSchemaHandler") -> dict[str, object]:
        return {**handler(schema), "enum": list_options(self.group)}
