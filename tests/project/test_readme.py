"""The documents say what the commands do: make targets, shell blocks, flags, links."""

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
COMMANDS = ("compress", "serve", "loadtest", "finetune", "evaluate")
SHELL = {"bash", "sh", "shell", "console"}


def shell_blocks(text):
    """Fenced blocks marked as shell, and blocks indented by four spaces."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if language in SHELL:
            yield re.sub(r"^\$ ", "", body, flags=re.MULTILINE)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for body in re.findall(r"(?:^\n|\A)((?:^ {4}\S.*\n)+)", plain, flags=re.MULTILINE):
        yield re.sub(r"^ {4}", "", body, flags=re.MULTILINE)


def command_lines(text):
    """Every simple command in a document's shell blocks, as words."""
    for block in shell_blocks(text):
        # shlex would take a comment's line end with it.
        text_only = re.sub(r"(^|\s)#[^\n]*", r"\1", block.replace("\\\n", " "))
        lexer = shlex.shlex(text_only, posix=True, punctuation_chars=";&|()\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
        words = []
        for word in [*lexer, "\n"]:
            if set(word) <= set(";&|()\n"):
                if words:
                    yield words
                words = []
            elif words or not re.fullmatch(r"\w+=.*", word):
                words.append(word)


def invoked(words):
    """The console command a line runs and its arguments, or None."""
    if "-m" in words and words[0] in {"python", "accelerate"}:
        words = words[words.index("-m") + 1 :]
    name = Path(words[0]).name if words else ""
    return (name, words[1:]) if name in COMMANDS else None


@cache
def known_flags(command):
    done = subprocess.run([BIN / command, "--help"], capture_output=True, text=True, check=True)
    flags = set(re.findall(r"(?<![\w-])-{1,2}[a-z][a-z-]*", done.stdout))
    return flags | engine_flags() if command == "serve" else flags


def engine_flags():
    """vLLM's engine arguments, which serve passes on, read from its source: importing it takes long."""
    source = Path(find_spec("vllm").origin).parent / "engine" / "arg_utils.py"
    classes = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)]
    fields = [
        f for node in classes if node.name == "EngineArgs" for f in node.body if isinstance(f, ast.AnnAssign)
    ]
    return {"--" + ast.unparse(field.target).replace("_", "-") for field in fields}


def lines_of(path):
    return list(command_lines(path.read_text()))


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_readme_shows_both_commands_and_make_knows_them(target):
    assert ["make", target] in lines_of(ROOT / "README.md")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_knows_every_target_that_is_shown(path):
    for words in lines_of(path):
        if words[0] == "make":
            done = subprocess.run(
                ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_blocks_parse(path):
    for block in shell_blocks(path.read_text()):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_shown_with_flags_they_know(path):
    for words in lines_of(path):
        if command := invoked(words):
            name, arguments = command
            flags = {argument.split("=")[0] for argument in arguments if re.match(r"--?[a-z]", argument)}
            assert flags <= known_flags(name), " ".join(words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_machine_path_is_shown(path):
    assert not re.search(r"(?<![\w.])/(work|root|home)/", path.read_text())


def test_the_checks_see_what_they_look_for():
    text = (
        "Words\n\n    make demo  # all of it\n    make test\n\n"
        "```bash\nA=1 compress --target 5% \\\n  --out x | tee log && serve --model y\n```\n"
        "```\nnot shell\n```\n```console\n$ accelerate launch -m compress --target 5%\n```\n"
    )
    lines = list(command_lines(text))
    assert lines == [
        ["compress", "--target", "5%", "--out", "x"],
        ["tee", "log"],
        ["serve", "--model", "y"],
        ["accelerate", "launch", "-m", "compress", "--target", "5%"],
        ["make", "demo"],
        ["make", "test"],
    ]
    names = [command[0] for line in lines if (command := invoked(line))]
    assert names == ["compress", "serve", "compress"]
    assert {"--kv-cache-memory-bytes", "--max-model-len"} <= engine_flags()
