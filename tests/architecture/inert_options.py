"""Check the table of options by mutation: with an option pinned to its default, its test has to fail.

    python -m tests.architecture.inert_options [OPTION ...]

Pins the value in the test's process and in every process that it starts. Each option takes a run of its test, so all
of them take half an hour on two cores; it is no part of `make test`.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

ROOT = Path(__file__).resolve().parent.parent.parent
VARIABLE = "LIKENESS_TEST_INERT_OPTION"
UNPINNED = ("subject.source", "subject.class_noun")
"""Have no default: without a value there is no run."""


def pin(class_name: str, field: str, value: object) -> None:
    """Give a field of a configuration class one value, whatever is configured; before that class is defined."""
    from tasks.config_base import Section

    def set_value(section: BaseModel) -> None:
        if type(section).__name__ == class_name:
            kind = type(section).model_fields[field].rebuild_annotation()
            section.__dict__[field] = TypeAdapter(kind).validate_python(value)

    def post_init(self: Section, context: object) -> None:
        set_value(self)

    plain_copy = BaseModel.model_copy

    def copy(self: Section, **arguments: object) -> Section:
        made = plain_copy(self, **arguments)  # type: ignore[arg-type]
        set_value(made)
        return made

    Section.model_post_init = post_init  # type: ignore[assignment]
    Section.model_copy = copy  # type: ignore[assignment,method-assign]


def find_field(option: str) -> tuple[str, str, object]:
    """Return an option's configuration class, its field and its default."""
    from conf.defaults import read_defaults
    from conf.schema import RunConfig

    model: type[BaseModel] = RunConfig
    default: object = read_defaults()
    *parents, field = option.split(".")
    for name in parents:
        kind = model.model_fields[name].annotation
        assert isinstance(kind, type)
        assert isinstance(default, dict)
        model, default = kind, default[name]
    assert isinstance(default, dict)
    return model.__name__, field, default[field]


def run_test(option: str, node: str, site: Path) -> str:
    """Return `fails`, as it should, or what the test does instead."""
    environment = {
        **os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", VARIABLE: json.dumps(find_field(option)),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", f"tests/{node}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 1 and " failed" in done.stdout:
        return "fails"
    if done.returncode == 0:
        return "skipped" if "passed" not in done.stdout else "PASSES"
    return f"exit code {done.returncode}: {(done.stdout + done.stderr)[-300:]}"


def main(options: list[str]) -> int:
    """Print one line per option; return 1 where a test passes although its option is inert."""
    from tests.architecture.option_tests import OPTION_TESTS

    chosen = options or [option for option in OPTION_TESTS if option not in UNPINNED]
    num_bad = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        site = Path(folder)
        (site / "sitecustomize.py").write_text(
            "import json, os\n"
            "from tests.architecture.inert_options import VARIABLE, pin\n"
            "pin(*json.loads(os.environ[VARIABLE]))\n"
        )
        outcomes = pool.map(lambda option: run_test(option, OPTION_TESTS[option], site), chosen)
        for option, outcome in zip(chosen, outcomes, strict=True):
            num_bad += outcome != "fails"
            print(f"{option}: {outcome}", flush=True)
    print(f"{len(chosen) - num_bad} of {len(chosen)} tests fail without their option")
    return min(1, num_bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
