"""The groups of options in `conf/`, read off its files: a new file is a new option, in the form, the CLI and here."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `likeness --help` lists options, and must not wait for pydantic
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema

FOLDER = Path(__file__).resolve().parent
# Groups of conf/ by the request's field.
GROUPS = {
    "subject": "subject", "prior": "prior", "method": "training/method",
    "devices": "training/devices", "evaluation": "evaluation",
    "scoring": "scoring", "publishing": "publishing", "diffusion": "diffusion", "llm": "llm",
    "store": "store", "tracking": "tracking", "experiment": "experiment",
}  # fmt: skip
FIELDS = {group: field for field, group in GROUPS.items()}


def extra_folder() -> Path | None:
    """Return the operator's own folder of options, LIKENESS_CONF: the same groups, searched beside `conf/`."""
    named = os.environ.get("LIKENESS_CONF", "")
    return Path(named).absolute() if named else None


def list_options(group: str) -> list[str]:
    """Return the options of a group, sorted: its YAML files' names."""
    folders = [FOLDER, *filter(None, [extra_folder()])]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


@dataclass(frozen=True)
class OptionOf:
    """Restricts a string to the options of a group, in validation and in the form's schema."""

    group: str

    def check(self, value: str) -> str:
        """Return an option. Raises ValueError naming those that there are."""
        options = list_options(self.group)
        if value not in options:
            raise ValueError(f"must be one of {', '.join(options)}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: "GetCoreSchemaHandler") -> "CoreSchema":
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: "CoreSchema", handler: "GetJsonSchemaHandler") -> dict[str, Any]:
        return {**handler(schema), "enum": list_options(self.group)}
