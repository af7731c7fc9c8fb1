"""Tests stand alone: what they share lies in `tests/support/` or in a conftest."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def list_test_imports(path: Path) -> Iterator[str]:
    """Yield the test modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.rsplit(".", 1)[-1].startswith("test_"))


def test_no_file_imports_a_test_module() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): modules
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if (modules := sorted(set(list_test_imports(path))))
    }
    assert found == {}
