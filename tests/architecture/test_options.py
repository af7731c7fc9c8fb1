"""Every option has a test that fails when the option has no effect."""

import ast
from pathlib import Path

from conf.trust import list_rules
from tests.architecture.option_tests import OPTION_TESTS

TESTS = Path(__file__).resolve().parent.parent


def list_test_functions(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_option_is_mapped_to_a_test() -> None:
    assert sorted(OPTION_TESTS) == sorted(list_rules())


def test_every_mapped_test_exists() -> None:
    missing = []
    for option, node in OPTION_TESTS.items():
        file, function = node.split("::")
        path = TESTS / file
        if not path.is_file() or function not in list_test_functions(path):
            missing.append(f"{option}: {node}")
    assert not missing
