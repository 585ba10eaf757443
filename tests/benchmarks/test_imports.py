"""Scripts and benchmarks, which tests seldom run, import what normlab has."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_they_import_is_there() -> None:
    missing = []
    for file in sorted([*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/**/*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "normlab":
                try:
                    exec(compile(ast.Module([node], []), str(file), "exec"), {})
                except ImportError as error:
                    missing.append(f"{file.relative_to(ROOT)}: {error}")
    assert missing == []
