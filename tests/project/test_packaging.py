"""What is installed: the wheel's content, its commands, and an environment that transformers can live in."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata, util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    """The files of a wheel built from a copy of the sources, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "checkpoints")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    (source / "models" / "checkpoints").mkdir()
    (source / "models" / "checkpoints" / "model.safetensors").write_bytes(b"never in a wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", "out"], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "out").glob("leanrec-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_no_weights(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package in PACKAGES:
        modules = {f"{package}/{path.name}" for path in (ROOT / package).glob("*.py")}
        assert modules <= wheel_names
    assert not [name for name in wheel_names if name.endswith(".safetensors")]
    assert [name for name in wheel_names if name.endswith("licenses/LICENSE")]


@pytest.mark.slow
def test_the_wheel_holds_the_files_that_are_not_python(wheel_names):
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for package, names in data.items():
        assert {f"{package}/{name}" for name in names} <= wheel_names
    beside = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and "checkpoints" not in path.parts
    }
    assert beside <= wheel_names


def watched(command, *arguments):
    """Run a command; the last line of stderr says what slow to import it imported."""
    module, function = PROJECT["project"]["scripts"][command].split(":")
    code = (
        f"import sys; sys.argv = {[command, *arguments]!r}\n"
        f"from {module} import {function}\n"
        "try:\n"
        f"    {function}()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'vllm', 'locust'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", sorted(PROJECT["project"]["scripts"]))
def test_a_command_shows_its_help_without_loading_torch(command):
    done = watched(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {command}")
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("finetune", ("--base", "demo", "--out", "o")),
        ("compress", ("--target", "5%")),
        ("evaluate", ("--model", "m")),
    ],
)
def test_data_that_is_not_there_is_told_before_torch_is_loaded(command, more):
    done = watched(command, "--data", "absent", *more)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: data 'absent': neither 'ml-100k' nor a folder", "[]"]


@pytest.mark.parametrize("command", sorted(PROJECT["project"]["scripts"]))
def test_an_unknown_flag_is_a_usage_error(command):
    executable = Path(sys.executable).parent / command
    done = subprocess.run([executable, "--no-such-flag-at-all"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_nothing_that_breaks_transformers_beside_a_cpu_torch_is_installed():
    if "+cpu" not in metadata.version("torch"):
        pytest.skip("torch here is not the CPU build")
    installed = [name for name in ("torchvision", "torchaudio", "torchcodec") if util.find_spec(name)]
    assert installed == []


def test_the_changelog_tells_of_this_version():
    assert f"## {PROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_license_is_the_whole_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
