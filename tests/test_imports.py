"""Who may import whom: service -> shared <- trainer, and no torch where requests are answered."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEARNING = {"torch", "pytorch_lightning", "lightning", "polars", "onnx", "onnxscript", "omegaconf", "tensorboard"}
SERVING = {"fastapi", "starlette", "uvicorn", "redis"}

FORBIDDEN: dict[str, set[str]] = {
    "service": {"trainer", "tests", "deploy"} | LEARNING,
    "shared": {"service", "trainer", "tests", "deploy"} | LEARNING | SERVING,
    "trainer": {"service", "tests", "deploy"} | SERVING,
    "deploy": {"service", "trainer", "shared", "tests"} | LEARNING,
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of everything that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_module_imports_across_the_line(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        file.relative_to(ROOT).as_posix(): crossed
        for file in files
        if (crossed := sorted(FORBIDDEN[package] & set(imports(ast.parse(file.read_text())))))
    }
    assert wrong == {}


def test_the_reader_of_imports_finds_hidden_ones() -> None:
    text = "def f():\n    import torch.nn as nn\n    from trainer.config import x\nfrom . import y\n"
    assert set(imports(ast.parse(text))) == {"torch", "trainer"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("service.main", LEARNING | {"trainer"}),
        ("shared.bundle", LEARNING | SERVING),
        ("trainer.__main__", SERVING | {"torch", "pytorch_lightning", "onnx"}),
    ],
)
@pytest.mark.slow
def test_importing_leaves_the_other_side_out(module: str, absent: set[str]) -> None:
    """What third parties bring counts too, so a real interpreter is asked."""
    code = f"import {module}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert module.split(".", maxsplit=1)[0] in loaded
    assert not loaded & absent
