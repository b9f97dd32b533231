"""The floors hold: imports point down, and nothing opens a pickle or runs a checkpoint's code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "models": {"compress", "serve", "loadtest"},
    "compress": {"serve", "loadtest"},
    "serve": {"compress", "loadtest"},
    "loadtest": {"compress", "serve"},
}
"""`tests` and `benchmarks` stand above all four; none of them may be imported."""
FILES = sorted(path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py"))
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imported(tree):
    """Top-level packages a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def unsafe(tree):
    """Calls that can run code out of a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in {"torch.load", "eval", "exec", "np.load", "numpy.load"}:
            allowed = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if not (name.endswith("p.load") or name == "numpy.load") or allowed.get("allow_pickle") == "True":
                yield f"line {node.lineno}: {name}"
        for keyword in node.keywords:
            if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                yield f"line {node.lineno}: trust_remote_code={ast.unparse(keyword.value)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_keeps_to_its_floor(path):
    tree = ast.parse(path.read_text())
    floor = path.relative_to(ROOT).parts[0]
    assert set(imported(tree)) & (FORBIDDEN[floor] | {"tests", "benchmarks"} | PICKLES) == set()
    assert list(unsafe(tree)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_stays_readable_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.name not in {"utils.py", "common.py", "helpers.py"}


def test_the_checks_see_what_they_look_for():
    source = (
        "import torch, pickle\nfrom serve.app import x\ntorch.load(p)\nf(trust_remote_code=True)\nnp.load(p)"
    )
    tree = ast.parse(source)
    assert set(imported(tree)) == {"torch", "pickle", "serve"}
    assert list(unsafe(tree)) == ["line 3: torch.load", "line 4: trust_remote_code=True"]
    assert list(unsafe(ast.parse("np.load(p, allow_pickle=True)"))) == ["line 1: np.load"]


def test_only_the_locust_file_imports_locust():
    found = {str(p.relative_to(ROOT)) for p in FILES if "locust" in imported(ast.parse(p.read_text()))}
    assert found <= {"loadtest/locustfile.py"}
