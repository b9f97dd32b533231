"""From a full recommender to a pruned one: three cuts, each restored, then verified and reported."""

import contextlib
import gc
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import logging

from compress import inputs
from compress.failures import explained
from compress.job import Job, Run
from compress.plan import make_plan, parse_target
from compress.recipe import RECIPES
from compress.result import finish, result_of
from compress.stages import run_stages
from compress.verify import check_vllm_installed
from models.checkpoint import Recommender, read_recommender
from models.data import Dataset, load_data
from models.errors import LeanRecError, UsageError
from models.families import check_supported
from models.memory import keep_freed_memory, release_freed_memory
from models.precision import check_int8_products
from models.sources import BUILT_IN
from models.unfinished import check_settings, hold, work_directory
from models.vocabulary import trimmed_recommender


def compress(job: Job) -> Path | None:
    """Do the job and return the directory of the pruned recommender, or None where only a plan was asked.

    Raises:
        UsageError: the request cannot be met.
        LeanRecError: an input is bad, or the result does not verify.
    """
    device = _device(job.device)
    _check_request(job, device)
    # The others wait for what one does alone, and a ranking of all test users takes hours of a large model.
    processes = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # one a file it reads; ours show the work
    keep_freed_memory()
    if device == "cpu":
        # Sums that threads share in any order would differ from run to run.
        torch.use_deterministic_algorithms(True, warn_only=True)
    run = prepare(job, _full_model(job, processes), device)
    if processes.is_main_process:
        print("\n\n".join([run.plan.describe(), *_layout(run), _cost(run)]), flush=True)
    if job.plan_only:
        return None
    out = job.out or inputs.default_out(_data_spec(job, run.full), job.target)
    if result_of(out, run.settings):
        _say(processes, f"{out}: already there, made with the same settings")
        return out
    with contextlib.ExitStack() as stack:
        if processes.is_main_process:
            work = stack.enter_context(hold(out))
            check_settings(work, run.settings)
        processes.wait_for_everyone()
        work = work_directory(out)
        stack.enter_context(explained(work))
        run_stages(run, work, processes)
        gc.collect()  # vLLM starts where enough is free
        release_freed_memory()
        if device == "cuda":
            torch.cuda.empty_cache()
        if processes.is_main_process:
            finish(run, work, out)
        processes.wait_for_everyone()
    return out


def _device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available; use --device cpu")
    return asked


def _check_request(job: Job, device: str) -> None:
    """Refuse what can be told before the demonstration model is trained, which takes minutes.

    Raises:
        UsageError: no such target, or options that do not go together.
        LeanRecError: this machine, or the place for the result, will not do.
    """
    parse_target(job.target, sys.maxsize)
    if job.layout == "per-layer" and job.recipe != "leanrec":
        raise UsageError(f"--layout per-layer: goes with --recipe leanrec, not {job.recipe}")
    if job.plan_only or (job.out is not None and (job.out / "report.json").is_file()):
        return  # nothing is to be done, or it is there already
    if job.ranked_by == "vllm":
        check_vllm_installed()
    if job.quantize != "none" and device == "cpu":
        check_int8_products(f"--quantize {job.quantize}")
    if job.out is not None and job.out.is_mount():
        raise LeanRecError(
            f"--out {job.out}: is a mounted volume, and the result replaces the folder as a whole; choose a "
            f"folder in it, like {job.out / 'pruned'}"
        )


def _full_model(job: Job, processes: PartialState) -> Path:
    """Return the full recommender's directory; the demonstration model is made where it is missing."""
    if job.model is not None:
        return inputs.find_model(job.model)
    directory = inputs.default_model(job.data)
    if directory.is_dir():
        return directory
    if inputs.data_name(job.data) != BUILT_IN:
        raise UsageError(
            f"{directory}: there is no full model for this data yet; make one with "
            f"`finetune --base demo --data {job.data} --out {directory}`, or name one with --model"
        )
    if job.plan_only:
        raise UsageError(
            f"{directory}: the demonstration model is not there yet; run without --plan to make it, "
            "or name a model with --model"
        )
    from models.finetune import FinetuneConfig, finetune

    _say(processes, f"{directory}: not there yet, training the demonstration model")
    finetune(FinetuneConfig(base="demo", data=BUILT_IN, out=directory, seed=job.seed))
    processes.wait_for_everyone()  # the main process writes it
    return directory


def _data_spec(job: Job, full: Recommender) -> str:
    spec = job.data or full.training.get("data")
    if not spec:
        raise UsageError(
            f"{full.directory}: recommender.json does not say what it was trained on; give --data"
        )
    return str(spec)


def prepare(job: Job, directory: Path, device: str) -> Run:
    """Return the inputs, read and checked, and the plan."""
    full = read_recommender(directory)
    check_supported(full.config, str(directory))
    recipe = RECIPES[job.recipe]
    plan = make_plan(
        full.config,
        job.target,
        cuts=tuple(stage.cuts for stage in recipe.stages),
        shape=recipe.shape,
        int8=job.quantize != "none",
    )
    data = inputs.aligned(load_data(_data_spec(job, full)), full.catalog)
    trimmed = trimmed_recommender(full, data.train) if job.vocab == "catalog" else None
    if trimmed:
        plan = plan.with_vocabulary(len(trimmed.rows))
    tokens = job.restore_tokens or recipe.default_tokens(
        _title_tokens(full, data), plan.counts[-1].non_embedding
    )
    settings = {
        "recipe": job.recipe,
        "parameters": plan.budget,
        "model_sha256": inputs.model_sha256(directory),
        "data": data.name,
        "data_sha256": inputs.data_sha256(data),
        "restore_tokens": tokens,
        "seed": job.seed,
        # The default is left out: results made before there was a choice stay what they are.
        **({"vocab": job.vocab} if trimmed else {}),
        **({"layout": job.layout} if job.layout != "uniform" else {}),
        **({"quantize": job.quantize} if job.quantize != "none" else {}),
    }
    return Run(
        full=full,
        trimmed=trimmed,
        data=data,
        plan=plan,
        recipe=recipe,
        stages=recipe.stages_for(plan.cuts),
        tokens=tokens,
        layout=job.layout,
        quantize=job.quantize,
        seed=job.seed,
        device=device,
        shared=job.shared,
        ranked_by=job.ranked_by,
        settings=settings,
    )


def _title_tokens(full: Recommender, data: Dataset) -> int:
    """Return the title tokens of all training interactions."""
    lengths = torch.tensor([len(tokens) for tokens in full.prompter.title_tokens])
    return int(lengths[torch.from_numpy(data.train.items).long()].sum())


def _layout(run: Run) -> list[str]:
    """Return in words what the plan's table does not say where layers will differ."""
    if run.layout == "uniform":
        return []
    return [
        "layout per-layer: hidden size and budget are these; heads, KV heads and MLP widths are a layer's on "
        "average, and each gets its own by score. Stored as LeanRecForCausalLM"
    ]


def _cost(run: Run) -> str:
    """Return in words what the work will take."""
    counts, shares = run.plan.counts, [stage.share for stage in run.stages]
    drawn = run.recipe.drawings * _title_tokens(run.full, run.data)
    read = min(run.tokens, drawn)
    reading = 2 * counts[0].total * read
    training = sum(
        share * run.tokens * 6 * count.total for share, count in zip(shares, counts[1:], strict=True)
    )
    return (
        f"cost: the full model reads {read / 1e6:.2f} M tokens once ({reading / 1e12:.2f} TFLOP, "
        f"{2 * run.plan.full.hidden_size * read / 1e6:.0f} MB on disk meanwhile); "
        f"restoration learns from {run.tokens / 1e6:.2f} M tokens ({training / 1e12:.2f} TFLOP)"
    )


def _say(processes: PartialState, text: str) -> None:
    if processes.is_main_process:
        print(text, file=sys.stderr, flush=True)
