"""Makes a full recommender: from scratch, or from a checkpoint, on a data set."""

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from models.catalog import Catalog
from models.checkpoint import Recommender, make_storable, read_recommender, write_recommender
from models.compiled import compile_layers
from models.data import Dataset, load_data
from models.errors import LeanRecError, UsageError
from models.families import check_supported
from models.gguf_smollm2 import smollm2_checkpoint
from models.memory import keep_freed_memory
from models.precision import prefers_bf16
from models.presets import PRESETS, Preset, new_model, train_tokenizer
from models.prompt import STREAM_TEMPLATE, PromptConfig
from models.sources import find_source
from models.streams import PackedStreams, StreamConfig
from models.trainer import ChosenBy, RecommenderTrainer
from models.unfinished import SETTINGS_FILE, check_settings, hold, work_directory

SMOLLM2 = "smollm2-135m"
COST = "training.json"
BATCH_TOKENS, LEARNING_RATE = 8192, 1e-3
"""of a pretrained model"""
LATER_SETTINGS = {"piece_titles": None, "validation_users": 1000}
"""Settings that came later, with what they were before: models made without the choice stay what they are."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What to train, on what, for how long."""

    base: str
    """A size preset, `smollm2-135m`, a checkpoint directory, or a hub id."""
    data: str
    out: Path
    epochs: int | None = None
    """Passes over the training targets; None for 10."""
    learning_rate: float | None = None
    """Peak; None for the preset's own, or 1e-3."""
    batch_tokens: int | None = None
    """Tokens a step and device; None for the preset's own, or 8192."""
    max_history: int | None = None
    """Titles a prompt holds; None for the preset's own, or 20."""
    keep_titles: float = 0.85
    """Share of the titles of a stream that an epoch reads, drawn anew each time: a model that meets the same
    streams again and again recites them."""
    piece_titles: float | None = None
    """Titles, on average and at least 2, of the pieces that a history is cut into, elsewhere each epoch;
    None: left whole. Where users buy few items, histories tell them apart, and the model recites them."""
    template: str = STREAM_TEMPLATE
    separator: str = "\n"
    loss: str = "valid"
    """`valid`: softmax over the trie's children; `vocabulary`: over all tokens."""
    seed: int = 0
    validation_users: int = 1000
    """who tell the states of the run apart"""
    device: str = "auto"
    report_to: tuple[str, ...] = ()
    """Trainer integrations, for example tensorboard."""


def finetune(config: FinetuneConfig) -> Path:
    """Train and write a recommender directory; a finished one with the same settings is kept.

    An interrupted run continues from its last checkpoint in `<out>.work`.

    Raises:
        UsageError: an unknown base or loss, or pieces of less than two titles.
        LeanRecError: the output is taken, another run is at it or left other work, or the data or the base
            cannot be used.
    """
    out = Path(config.out)
    settings = {
        name: str(value)
        for name, value in asdict(config).items()
        if name not in ("out", "device", "report_to")
        and not (name in LATER_SETTINGS and value == LATER_SETTINGS[name])
    }
    if out.exists():
        if read_recommender(out).training.get("settings") == settings:
            return out
        raise LeanRecError(f"{out}: already exists with other settings; remove it or choose another --out")
    if config.loss not in ("valid", "vocabulary"):
        raise UsageError(f"loss {config.loss!r}: choose valid or vocabulary")
    if config.piece_titles is not None and not config.piece_titles >= 2:
        raise UsageError(
            f"piece_titles {config.piece_titles}: a piece has a title to read and one to predict"
        )
    set_seed(config.seed)
    keep_freed_memory()
    work = work_directory(out)
    data = load_data(config.data)
    preset = PRESETS.get(config.base)
    prompt = PromptConfig(
        template=config.template,
        separator=config.separator,
        max_history=config.max_history or (preset.max_history if preset else 20),
    )
    model, tokenizer = _base(config, preset, data.catalog, prompt, work)
    recommender = Recommender(
        directory=out, config=model.config, tokenizer=tokenizer, catalog=data.catalog, prompt=prompt
    )
    trainer = _trainer(config, preset, recommender, model, data, work=work)
    with hold(out) if trainer.is_world_process_zero() else contextlib.nullcontext():
        if out.exists():
            raise LeanRecError(f"{out}: another run has just made it")
        checkpoint = _last_checkpoint(work)
        if trainer.is_world_process_zero():
            if checkpoint is None:  # nothing is lost
                (work / SETTINGS_FILE).unlink(missing_ok=True)
            check_settings(work, settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.is_world_process_zero():
            write_recommender(
                out,
                model=model.to(torch.float32),
                tokenizer=tokenizer,
                catalog=data.catalog,
                prompt=prompt,
                training={
                    "data": config.data,
                    "split": "given" if find_source(config.data).has_splits else "leave-one-out",
                    "seed": config.seed,
                    "base": config.base,
                    "chosen_by": trainer.chosen_by,
                    "settings": settings,
                },
                extra_files={COST: json.dumps(trainer.cost(), indent=2)},
            )
            shutil.rmtree(work, ignore_errors=True)
    return out


def _base(
    config: FinetuneConfig, preset: Preset | None, catalog: Catalog, prompt: PromptConfig, work: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model to train, new if there is a preset of the base's name, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if preset is not None:
        tokenizer = train_tokenizer(catalog.titles, catalog.popularity, preset.vocabulary)
        return new_model(preset, tokenizer, max_positions=4096), tokenizer
    source = str(smollm2_checkpoint(work / "base")) if config.base == SMOLLM2 else config.base
    if not Path(source).is_dir() and source.count("/") != 1:
        raise UsageError(
            f"base {source!r}: not a preset ({', '.join(PRESETS)}, {SMOLLM2}), not a directory, "
            "and not a hub id (owner/name)"
        )
    try:
        check_supported(AutoConfig.from_pretrained(source, trust_remote_code=False), source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
    except LeanRecError:
        raise
    except Exception as error:  # hub and file errors come in many kinds
        raise LeanRecError(
            f"base {source!r}: cannot be loaded ({str(error).strip().splitlines()[0]})"
        ) from error
    make_storable(model)
    return model, tokenizer


def _trainer(
    config: FinetuneConfig,
    preset: Preset | None,
    recommender: Recommender,
    model: PreTrainedModel,
    data: Dataset,
    *,
    work: Path,
) -> RecommenderTrainer:
    chosen_by: ChosenBy = "ndcg@10" if preset is None else "nll"
    epochs = config.epochs or 10
    rows = PackedStreams(
        data.train,
        recommender,
        StreamConfig(keep_share=config.keep_titles, piece_titles=config.piece_titles),
        epochs=epochs,
        seed=config.seed,
    )
    batch_tokens = config.batch_tokens or (preset.batch_tokens if preset else BATCH_TOKENS)
    batch = max(1, min(batch_tokens // rows.row_tokens, rows.rows_per_epoch))  # little data: smaller steps
    steps_per_epoch = max(1, rows.rows_per_epoch // batch)
    cuda = torch.cuda.is_available() and config.device != "cpu"
    if config.device == "cuda" and not cuda:
        raise UsageError("device cuda: no CUDA device is available; use --device cpu")
    compile_layers(
        model,
        steps=steps_per_epoch * epochs,
        step_rows=batch,
        row_tokens=rows.row_tokens,
        device="cuda" if cuda else "cpu",
    )
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=1,  # the rows of all epochs are one pass: each is drawn once
        per_device_train_batch_size=batch,
        # Rows come in a seeded random order already, and any of them can be made on resume.
        train_sampling_strategy="sequential",
        learning_rate=config.learning_rate or (preset.learning_rate if preset else LEARNING_RATE),
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps_per_epoch * epochs // 10),
        weight_decay=0.01 if preset is None else 0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        # Matrix products in bf16, weights and losses in fp32, where the hardware is faster that way.
        bf16=prefers_bf16("cuda" if cuda else "cpu"),
        use_cpu=not cuda,
        eval_strategy="steps",
        eval_steps=max(1, steps_per_epoch * epochs // 4),
        save_strategy="steps",
        save_steps=max(1, steps_per_epoch * epochs // 4),
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=chosen_by,
        greater_is_better=chosen_by != "nll",
        logging_steps=max(1, steps_per_epoch // 4),
        report_to=list(config.report_to),
        remove_unused_columns=False,
        label_names=[],
        dataloader_drop_last=True,
        dataloader_pin_memory=cuda,
        seed=config.seed,
        disable_tqdm=False,
    )
    # Trainer would spread one process over all GPUs with DataParallel: steps would be as many times as large.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return RecommenderTrainer(
        recommender=recommender,
        users=data.valid.sample(config.validation_users, config.seed),
        loss=config.loss,
        chosen_by=chosen_by,
        model=model,
        train_dataset=rows,
        eval_dataset=rows,  # not read: evaluation ranks the validation users; Trainer asks for one
        args=arguments,
    )


def _last_checkpoint(work: Path) -> str | None:
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if (path / "trainer_state.json").is_file()]
    return str(whole[-1]) if whole else None
