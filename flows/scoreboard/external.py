"""Models of other trainers as rows: METHOD/SUBJECT/ or METHOD/SUBJECT/SEED/ holds what `likeness evaluate` takes.

METHOD/method.yaml may name the identifier token of the method's prompts: `token: sks`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from conf.subjects import parse_yaml
from flows.scoreboard.cells import Cell, Subject, make_base
from flows.scoreboard.plan import Plan, check_name
from tasks.errors import ConfigError

METHOD_FILE = "method.yaml"


class ExternalMethod(BaseModel):
    """What `method.yaml` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str | None = Field(None, max_length=60)
    """How the models call the subject; None: as in the plan."""


def list_external(folder: Path, plan: Plan, subjects: Sequence[Subject], *, output: Path) -> Iterator[Cell]:
    """Yield a cell for each model of another trainer.

    Raises:
        ConfigError: the folder holds no models, one that can't be read, or one of a subject that isn't there.

    """
    if not folder.is_dir():
        raise ConfigError(f"--external: {folder} is not a folder")
    by_name = {subject.name: subject for subject in subjects}
    is_empty = True
    for method in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            check_name("method", method.name)
        except ValueError as error:
            raise ConfigError(f"--external: {error}") from error
        if method.name in plan.methods:
            raise ConfigError(f"--external: {method} has the name of a method of the plan; rename the folder")
        token = read_method(method / METHOD_FILE).token
        for path in sorted(path for path in method.iterdir() if path.is_dir()):
            if path.name not in by_name:
                raise ConfigError(
                    f"--external: {path}: there is no subject of this name; there are {', '.join(by_name)}"
                )
            request = make_base(plan, by_name[path.name], output)
            if token is not None:
                settings = {**request.settings, "subject.identifier_token": token}
                request = request.model_copy(update={"settings": settings})
            for seed, model in list_models(path):
                is_empty = False
                yield Cell(method.name, path.name, seed, request, str(model.absolute()))
    if is_empty:
        raise ConfigError(f"--external: no models in {folder}; they lie in METHOD/SUBJECT/ or METHOD/SUBJECT/SEED/")


def read_method(path: Path) -> ExternalMethod:
    """Return a method's file; without one, the defaults. Raises ConfigError."""
    if not path.is_file():
        return ExternalMethod()
    with path.open("rb") as file:
        return parse_yaml(file.read(1_000_000), ExternalMethod, name=str(path))


def list_models(folder: Path) -> list[tuple[int, Path]]:
    """Return the models of a subject with their training seeds; a single one has seed 0. Raises ConfigError."""
    from tasks.diffusion.external.detection import detect

    seeds = sorted(
        (path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()), key=lambda p: int(p.name)
    )
    found = [(int(path.name), path) for path in seeds] or [(0, folder)]
    if len({seed for seed, _ in found}) < len(found):
        raise ConfigError(f"--external: two folders in {folder} are the same seed, such as 1 and 01; rename one")
    for _, path in found:
        detect(str(path))  # named before anything is computed
    return found
