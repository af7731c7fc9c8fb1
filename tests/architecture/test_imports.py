"""The six directions of the house, read from the source."""

import ast
import importlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("subject", "prior", "training", "evaluation", "scoring", "publishing")
HEAVY = {"torch", "diffusers", "transformers", "pytorch_lightning"}
FILES = sorted(p for top in ("flows", "tasks", "conf") for p in (ROOT / top).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield imported module names; imports for type checking alone do not count."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.AST] = list(tree.body) if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def roots_of(path: Path, **options: bool) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path, **options)}


def test_stages_never_import_each_other() -> None:
    for stage in STAGES:
        others = tuple(f"tasks.{other}" for other in STAGES if other != stage)
        for path in (ROOT / "tasks" / stage).rglob("*.py"):
            found = [name for name in imports_of(path) if name.startswith(others)]
            assert not found, f"{name_of(path)} imports {found}"


def test_only_flows_and_steps_import_prefect() -> None:
    for path in FILES:
        is_allowed = name_of(path).startswith("flows/") or path.name in ("steps.py", "states.py")
        assert is_allowed or "prefect" not in roots_of(path), name_of(path)


def list_decorated(path: Path) -> set[str]:
    """Return the names of a file's functions that are decorated as a flow or a task."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for each in getattr(node, "decorator_list", ()):
            decorator = each.func if isinstance(each, ast.Call) else each
            if getattr(decorator, "id", getattr(decorator, "attr", "")) in ("flow", "task"):
                found.add(node.name)  # type: ignore[attr-defined]
    return found


def test_no_flow_or_task_stores_its_result() -> None:
    """Prefect would pickle it; what steps exchange is manifests, in JSON, which the store keeps."""
    from prefect import Flow, Task

    decorated = {path: names for path in FILES if (names := list_decorated(path))}
    assert len(decorated) >= 5 + len(STAGES), "five flows and the steps of each stage"
    stored = []
    for path, names in decorated.items():
        module = importlib.import_module(name_of(path).removesuffix(".py").replace("/", "."))
        objects = {name: each for name, each in vars(module).items() if isinstance(each, Flow | Task)}
        assert names <= set(objects), name_of(path)
        stored += [f"{name_of(path)}: {name}" for name, each in objects.items() if each.persist_result is not False]
    assert stored == []


def test_flows_steps_and_manifests_import_heavy_libraries_lazily() -> None:
    for path in FILES:
        name = name_of(path)
        if name.startswith(("flows/", "conf/", "tasks/manifests/")) or path.name in ("steps.py", "config.py"):
            assert not HEAVY & roots_of(path, top_level_only=True), name


def test_sdks_stay_in_services() -> None:
    for path in FILES:
        if not name_of(path).startswith("tasks/services/"):
            assert not {"openai", "boto3", "botocore", "mlflow"} & roots_of(path), name_of(path)


def test_hydra_stays_in_conf() -> None:
    for path in FILES:
        if not name_of(path).startswith("conf/"):
            assert not {"hydra", "omegaconf"} & roots_of(path), name_of(path)


def test_services_import_no_dreambooth_code() -> None:
    for path in (ROOT / "tasks" / "services").rglob("*.py"):
        allowed = ("tasks.services", "tasks.errors", "tasks.config_base", "tasks.stage", "tasks.redaction")
        found = [n for n in imports_of(path) if n.startswith("tasks") and not n.startswith(allowed)]
        assert not found, f"{name_of(path)} imports {found}"


@pytest.mark.parametrize("module", ["flows.cli.main", "flows.personalize_subject", "conf.request"])
def test_importing_the_entry_points_loads_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


LATE = HEAVY | {"prefect", "hydra", "omegaconf", "rich", "mlflow", "openai", "yaml", "PIL", "numpy", "psutil"}


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["--help"], LATE | {"pydantic"}),
        (["run", "--help"], LATE),  # Typer itself reads a command's values with pydantic
    ],
)
def test_help_does_not_import_runtime_libraries(words: list[str], unwanted: set[str]) -> None:
    """Runs the help itself: what commands register and the list of config groups are part of start-up."""
    code = f"""
import sys
from flows.cli.main import main
assert main({words!r}) == 0
print("imported", sorted({unwanted!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "training/method" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported []"


def name_module(path: Path) -> str:
    return name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Return the project's modules that a file imports, deferred and typing-only imports included."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else node.module for name in names}
    return found & modules


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import cycle, or nothing."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(graph[module]):
            cycle = visit(imported, [*way, module])
            if cycle:
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def test_find_cycle_detects_an_import_cycle() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_there_are_no_import_cycles_including_deferred_and_typing_only_imports() -> None:
    modules = {name_module(path) for path in FILES}
    graph = {name_module(path): imported_modules(path, modules) - {name_module(path)} for path in FILES}
    assert find_cycle(graph) == []


def test_a_folder_has_at_most_nine_files() -> None:
    counts = Counter(name_of(path.parent) for path in FILES if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > 9} == {}


def test_files_and_functions_stay_within_the_length_limits() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400, name_of(path)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                limit = 75 if node.name in ("make_app",) else 60
                assert length <= limit, f"{name_of(path)}:{node.name} has {length} lines"
