"""`compress --vocab catalog`: the plan, the work, the result in vLLM, and what it does not take."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from accelerate import PartialState
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from compress.cli import main
from compress.job import Job
from compress.measure import Yardstick
from compress.pipeline import prepare
from compress.plan import make_plan
from compress.stages import run_stages
from compress.verify import read_weights
from compress.work import finished, load_step_model
from models.checkpoint import Recommender, load_model, read_recommender, write_recommender
from models.data import load_data
from models.errors import LeanRecError, run_command
from models.gguf_smollm2 import smollm2_gguf
from models.prompt import PromptConfig
from models.search import SearchRequest
from models.transformers_engine import TransformersEngine
from models.unfinished import check_settings
from models.vocabulary import trimmed_recommender
from tests.byte_level import make_full


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_full(tmp_path_factory.mktemp("vocabulary") / "full")


def unigram() -> Tokenizer:
    return Tokenizer(Unigram([("<unk>", 0.0), *((chr(n), -1.0) for n in range(32, 127))], 0))


def test_the_command_refuses_a_tokenizer_it_cannot_trim(full, tmp_path, capsys):
    before, _ = full
    model = load_model(before)
    directory = tmp_path / "unigram"
    words = PreTrainedTokenizerFast(tokenizer_object=unigram(), pad_token="<unk>")
    write_recommender(
        directory,
        model=model,
        tokenizer=words,
        catalog=before.catalog,
        prompt=PromptConfig(separator=";"),
        training=before.training,
    )
    arguments = ["--target", "30%", "--model", str(directory), "--vocab", "catalog", "--plan"]
    assert run_command(lambda: main(arguments)) == 2
    assert "tokenizer is of type Unigram" in capsys.readouterr().err


def test_the_plan_counts_the_vocabulary_that_will_be_left(full, capsys):
    before, dataset = full
    rows = len(trimmed_recommender(before, dataset.train).rows)
    arguments = ["--target", "30%", "--model", str(before.directory), "--plan"]
    assert run_command(lambda: main([*arguments, "--vocab", "catalog"])) == 0
    told = capsys.readouterr().out
    kept = make_plan(before.config, "30%")
    plan = kept.with_vocabulary(rows)
    assert plan.stages == kept.stages
    assert plan.counts[0] == kept.counts[0]
    assert plan.counts[-1].embedding == rows * plan.final.hidden_size
    assert re.search(rf"vocabulary +{before.config.vocab_size:,}( +{rows:,}){{3}}\n", told)
    assert f"{plan.counts[-1].total:,}\n" in told
    assert f"{plan.counts[-1].total / plan.counts[0].total:.2%}\n" in told


def test_work_with_another_vocabulary_is_not_gone_on_with(full, tmp_path):
    before, _ = full
    keep, catalog = (
        prepare(Job(target="30%", restore_tokens=500, vocab=vocab), before.directory, "cpu")
        for vocab in ("keep", "catalog")
    )
    assert keep.teacher is before or keep.teacher is keep.full
    check_settings(tmp_path, keep.settings)
    with pytest.raises(LeanRecError, match="vocab was None, now 'catalog'"):
        check_settings(tmp_path, catalog.settings)


@pytest.mark.slow
def test_stages_prune_and_restore_under_the_trimmed_vocabulary(full, tmp_path):
    before, _ = full
    run = prepare(
        Job(target="30%", restore_tokens=500, vocab="catalog", device="cpu"), before.directory, "cpu"
    )
    run = replace(run, recipe=replace(run.recipe, batch_tokens=512, calibration_rows=8, validation_users=10))
    run_stages(run, tmp_path, PartialState(cpu=True))
    model = load_step_model(tmp_path, "3-depth")
    assert model.config.vocab_size == run.plan.traits.vocab_size < before.config.vocab_size
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size
    # The teacher under the trimmed vocabulary is as good as the full model, measured by itself.
    validation = run.data.valid.sample(10, run.seed)
    measured = Yardstick(before, validation).nll(load_model(before))
    assert finished(tmp_path, "full")["metrics"]["nll"] == pytest.approx(measured, abs=1e-4)


@pytest.mark.slow
def test_five_percent_of_published_shapes_is_at_most_a_tenth_in_all(tmp_path):
    gguf = smollm2_gguf()
    words = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    dataset = load_data("ml-100k")
    shapes = {
        "SmolLM2-135M": LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            tie_word_embeddings=True,
        ),
        "Qwen2-0.5B": Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            tie_word_embeddings=True,
        ),
    }
    # The shares of all parameters that docs/compression.md tells, without and with trimming.
    told = {"SmolLM2-135M": ("13.3%", "4.6%"), "Qwen2-0.5B": ("17.4%", "3.9%")}
    for name, config in shapes.items():
        before = Recommender(
            directory=gguf.parent,
            config=config,
            tokenizer=words,
            catalog=dataset.catalog,
            prompt=PromptConfig(),
        )
        rows = trimmed_recommender(before, dataset.train).rows
        assert len(rows) == 3840
        kept = make_plan(config, "5%")
        trimmed = kept.with_vocabulary(len(rows))
        shares = [plan.counts[-1].total / plan.counts[0].total for plan in (kept, trimmed)]
        assert tuple(f"{share:.1%}" for share in shares) == told[name]
        assert shares[1] <= 0.1


@pytest.mark.slow
@pytest.mark.vllm
def test_the_result_serves_in_vllm_as_in_transformers(full, tmp_path):
    from models.vllm_engine import open_engine

    before, dataset = full
    out = tmp_path / "pruned"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "compress", "--target", "30%", "--model", str(before.directory)),
            *("--out", str(out), "--restore-tokens", "2000", "--device", "cpu", "--vocab", "catalog"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((out / "report.json").read_text())
    pruned = read_recommender(out)
    full_size, size = (report["shape"][which]["vocab_size"] for which in ("full", "pruned"))
    assert (full_size, size) == (before.config.vocab_size, pruned.config.vocab_size)
    assert size < 0.7 * full_size
    assert report["parameters"]["full"]["total"] == read_weights(before.directory).counts.total
    assert pruned.parent["settings"]["vocab"] == "catalog"
    histories = [dataset.test.histories[index].tolist() for index in range(len(dataset.test))]
    requests = [SearchRequest(prompt=pruned.prompter.encode(history)) for history in histories]
    expected = TransformersEngine(load_model(pruned), pruned.trie).recommend(requests)
    engine = open_engine(pruned, arguments={"dtype": "float32", "kv_cache_memory_bytes": 64 * 2**20})
    try:
        found = engine.recommend(requests)
    finally:
        engine.close()
    assert [answer.rows for answer in found] == [answer.rows for answer in expected]
