"""The words for a machine: two of one name that multiply at other rates are not the same."""

import pytest

from loadtest import machine
from models import precision

TOLD = """processor\t: 0
model name\t: AMD EPYC
flags\t\t: fpu {flags}
processor\t: 1
model name\t: another
flags\t\t: amx_bf16
"""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("avx512f", "AMD EPYC"),
        ("avx512f avx512_bf16", "AMD EPYC with AVX512-BF16"),
        ("avx512_bf16 amx_bf16", "AMD EPYC with AMX"),
    ],
)
def test_what_multiplies_bf16_is_named(tmp_path, monkeypatch, flags, words):
    facts = tmp_path / "cpuinfo"
    facts.write_text(TOLD.format(flags=flags), encoding="utf-8")
    monkeypatch.setattr(precision, "CPU_FACTS", facts)
    assert machine.processors().partition(" x ")[2] == words
    assert machine.describe_machine()["cpu"] == "AMD EPYC"


def test_elsewhere_the_platform_s_own_name_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "CPU_FACTS", tmp_path / "none")
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")
    assert machine.processors().endswith(" x arm")
