"""Schemathesis over the OpenAPI document: no failure of the service, no answer outside its schema."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import TOKEN
from tests.stress.conftest import SECONDS, Start

pytestmark = [pytest.mark.stress, pytest.mark.slow]

pytest.importorskip("schemathesis", reason="pip install leanrec[stress]")

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


def test_no_answer_outside_the_schema(start: Start, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    process, url, log = start("tests.serve.process", "--admin-token-file", str(tmp_path / "token"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--max-time", str(SECONDS), "--max-examples", "1000000"),
            *("--header", f"Authorization: Bearer {TOKEN}", "--request-timeout", "60", "--no-color"),
            *(
                "--phases",
                "examples,coverage,fuzzing",
                "--suppress-health-check",
                "all",
                "--continue-on-failure",
            ),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert process.poll() is None
    assert "Traceback" not in log.read_text()
