"""The base of every configuration section."""

import re

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen section: unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def refuse_user_info(url: str | None) -> str | None:
    """Return an address; raise ValueError where it carries a name or password."""
    if url and re.search(r"://[^/]*@", url):
        raise ValueError("an address with a name or password would be stored and logged; use the environment")
    return url
