"""Megatron moves: only one folder knows it."""

import ast
from pathlib import Path

import rlhfuse


def imported(path: Path) -> set[str]:
    """First words of all that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_one_folder_imports_megatron() -> None:
    (root,) = rlhfuse.__path__
    homes = {
        path.relative_to(root).parts[0]
        for path in Path(root).rglob("*.py")
        if "megatron" in imported(path)
    }
    assert homes == {"megatron"}
