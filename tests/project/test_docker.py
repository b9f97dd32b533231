"""The images and the compose file, as far as they can be checked without a container engine."""

import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from loadtest.arguments import parse

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
BIN = Path(sys.executable).parent


def compose_file(**environment):
    """The compose file with its variables filled in as Compose does it."""
    missing = []

    def value(match):
        name, operator, word = match.groups()
        if name in environment:
            return environment[name]
        if operator == ":?":
            missing.append(name)
        return word or ""

    text = re.sub(r"\$\{(\w+)(:\?|:-|-)?([^}]*)\}", value, (ROOT / "docker-compose.yml").read_text())
    return yaml.safe_load(text), missing


def stage(name):
    """The instructions of one build stage, continued lines joined."""
    body = re.split(r"^FROM .* AS ", DOCKERFILE, flags=re.MULTILINE)
    (found,) = [part for part in body if part.split("\n", 1)[0] == name]
    lines = re.sub(r"\\\n\s*", "", found).splitlines()[1:]
    return [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]


def instruction(stage_name, keyword):
    """The last value an instruction has in a stage, as the image would have it."""
    return [words[1] for words in stage(stage_name) if words[0] == keyword][-1]


def test_hadolint_finds_nothing_in_the_dockerfile():
    done = subprocess.run(
        [BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_find_an_unpinned_base(tmp_path):
    loose = tmp_path / "Dockerfile"
    loose.write_text("FROM python:latest\nUSER 1\n")
    done = subprocess.run([BIN / "hadolint", loose], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DL3007" in done.stdout


def validate_compose(path):
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_compose_file_fits_the_compose_specification(tmp_path):
    done = validate_compose(ROOT / "docker-compose.yml")
    assert done.returncode == 0, done.stdout
    content, missing = compose_file(FULL_MODEL="/models/full", PRUNED_MODEL="/models/pruned")
    assert missing == []
    filled = tmp_path / "compose.yml"
    filled.write_text(yaml.safe_dump(content))
    done = validate_compose(filled)
    assert done.returncode == 0, done.stdout


def test_the_compose_schema_would_find_a_misspelt_key(tmp_path):
    content, _ = compose_file()
    content["services"]["full"]["mem_limits"] = "1g"
    wrong = tmp_path / "compose.yml"
    wrong.write_text(yaml.safe_dump(content))
    assert validate_compose(wrong).returncode == 1


def test_both_deployments_differ_in_model_name_cache_and_port_alone():
    content, _ = compose_file(FULL_MODEL="/models/full", PRUNED_MODEL="/models/pruned")
    full, pruned = (content["services"][name] for name in ("full", "pruned"))
    assert {key for key in full if full[key] != pruned.get(key)} == {"ports", "volumes", "command"}
    names = [service["command"].pop() for service in (full, pruned)]
    assert names == ["full", "pruned"]
    assert full["command"] == pruned["command"]
    assert full["mem_limit"] == pruned["mem_limit"]
    for service, model in ((full, "/models/full"), (pruned, "/models/pruned")):
        mount, cache = service["volumes"]
        assert (mount["source"], mount["target"], mount["read_only"]) == (model, "/model", True)
        assert cache.split(":")[0] in content["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_load_test_waits_until_both_are_healthy():
    content, _ = compose_file()
    load_test = content["services"]["loadtest"]
    assert load_test["profiles"] == ["loadtest"]
    assert load_test["depends_on"] == {name: {"condition": "service_healthy"} for name in ("full", "pruned")}
    assert {"full", "pruned"} == {
        name for name, service in content["services"].items() if "healthcheck" in service
    }


def test_a_missing_model_directory_stops_compose():
    assert set(compose_file()[1]) == {"FULL_MODEL", "PRUNED_MODEL"}


def test_base_images_are_pinned_and_stages_exist():
    images = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", DOCKERFILE, flags=re.MULTILINE))
    stages = set()
    for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE):
        variable = re.fullmatch(r"\$\{(\w+)\}", base)
        assert (variable and re.search(r":v?\d+\.\d+\.\d+", images[variable[1]])) or base in stages
        stages.add(name)
    content, _ = compose_file()
    assert {service["build"]["target"] for service in content["services"].values()} <= stages
    assert {"cpu", "gpu", "loadtest"} <= stages


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_service_image_drops_root_and_stops_gently(target):
    base = "runtime-cpu" if target == "cpu" else target
    assert instruction(base, "USER") == "10001:0"
    assert instruction(target, "STOPSIGNAL") == "SIGTERM"
    assert json.loads(instruction(target, "ENTRYPOINT"))[0] == "serve"


def test_no_secret_and_no_host_is_written_down():
    for name in ("Dockerfile", "docker-compose.yml"):
        text = (ROOT / name).read_text()
        assert not re.search(r"(?i)(password|token|secret|api_key)\s*[=:]", text)
        assert set(re.findall(r"https?://([\w.-]+)", text)) <= {"127.0.0.1", "full", "pruned"}


def test_what_the_images_copy_is_there_and_not_ignored():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = set()
    for words in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.MULTILINE):
        sources |= set(words.split()[:-1])
    assert all((ROOT / source).exists() for source in sources)
    assert sources == allowed


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
@pytest.mark.parametrize("where", ["cpu", "gpu", "compose"])
def test_the_health_check_follows_readiness(where, status, healthy):
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health/ready" else 418)
            self.end_headers()

        def log_message(self, format, *args):
            """Keep the test's output clean."""

    if where == "compose":
        command = compose_file()[0]["services"]["full"]["healthcheck"]["test"][1:]
    else:
        command = json.loads(instruction(where, "HEALTHCHECK").split("CMD ", 1)[1])
    assert command[:2] == ["python3", "-c"]
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = command[2].replace("8000", str(server.server_port))
        done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, check=False)
        server.shutdown()
    assert (done.returncode == 0) == healthy


def test_the_health_check_fails_where_nothing_listens():
    code = json.loads(instruction("cpu", "HEALTHCHECK").split("CMD ", 1)[1])[2].replace("8000", "9")
    assert (
        subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, check=False).returncode != 0
    )


@pytest.mark.parametrize(("target", "service"), [("cpu", "full"), ("loadtest", "loadtest")])
def test_the_command_lines_fit_the_commands(target, service):
    content, _ = compose_file()
    command, *arguments = (
        json.loads(instruction(target, "ENTRYPOINT")) + content["services"][service]["command"]
    )
    shown = subprocess.run([BIN / command, "--help"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown))
    asked = {argument for argument in arguments if argument.startswith("--")}
    if command == "loadtest":
        assert parse(arguments[2:] if arguments[0] == "--out" else arguments).data == "ml-100k"
    # serve hands what it does not know to vLLM.
    engine = {"--kv-cache-memory-bytes", "--served-model-name"} if command == "serve" else set()
    assert asked <= known | engine


def test_a_docker_client_reads_the_compose_file_too():
    docker = shutil.which("docker")
    if (
        not docker
        or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no docker compose client here")
    environment = {"PATH": "/usr/bin:/bin", "FULL_MODEL": "/tmp", "PRUNED_MODEL": "/tmp"}
    command = [
        docker,
        "compose",
        "--profile",
        "loadtest",
        "-f",
        str(ROOT / "docker-compose.yml"),
        "config",
        "-q",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
