"""Trains one SASRec with RecTools and ranks the catalogue; runs in RecTools' own environment.

    python -m benchmarks.quality.sasrec_train --arrays FILE.npz --job JOB.json --out DIR

`DIR/result.json` appears last, so a directory that has it is whole.
"""

import argparse
import copy
import json
import logging
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.sasrec_search import Config
from benchmarks.quality.sasrec_tables import Table, history_table, ranked_lists, training_table
from models.atomic import write_json
from models.metrics import per_user_metrics, target_ranks

K = 10
GBCE_T = 0.75


@dataclass(frozen=True)
class Arrays:
    """What the trainer is given; the test targets are not among it."""

    train_items: np.ndarray
    train_offsets: np.ndarray
    valid_items: np.ndarray
    valid_offsets: np.ndarray
    valid_targets: np.ndarray
    test_items: np.ndarray
    test_offsets: np.ndarray


def dataset_of(table: Table) -> Any:
    """Return the library's data set; its times are a session's places, a second each."""
    import pandas as pd
    from rectools import Columns
    from rectools.dataset import Dataset

    frame = pd.DataFrame(
        {
            Columns.User: table.sessions,
            Columns.Item: table.items,
            Columns.Weight: 1.0,
            Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(table.places, unit="s"),
        }
    )
    return Dataset.construct(frame)


def rank(model: Any, items: np.ndarray, offsets: np.ndarray, session: int, popular: np.ndarray) -> np.ndarray:
    """Return the K best of the whole catalogue for every history, `[histories, K]`; nothing is masked."""
    from rectools import Columns

    table = history_table(items, offsets, session)
    found = model.recommend(
        np.unique(table.sessions),
        dataset_of(table),
        k=K,
        filter_viewed=False,
        on_unsupported_targets="ignore",
    )
    return ranked_lists(
        found[Columns.User].to_numpy(),
        found[Columns.Item].to_numpy(),
        found[Columns.Rank].to_numpy(),
        popular,
        len(offsets) - 1,
    )


def make_model(config: Config) -> Any:
    """Return the library's model, untrained."""
    from rectools.models import SASRecModel

    return SASRecModel(
        n_blocks=config.layers,
        n_heads=config.heads,
        n_factors=config.hidden,
        dropout_rate=config.dropout,
        session_max_len=config.session,
        loss=config.loss,
        n_negatives=max(config.negatives, 1),
        gbce_t=GBCE_T,
        lr=config.learning_rate,
        batch_size=config.batch,
        pos_encoding_kwargs={"use_scale_factor": config.scaled},
    )


def train(arrays: Arrays, config: Config, job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train until validation gets no better; leave the best epoch's lists in `out`, return the record."""
    from pytorch_lightning import seed_everything

    began, cpu_began = time.monotonic(), time.process_time()
    seed_everything(job["seed"], verbose=False)
    data = dataset_of(
        training_table(arrays.train_items, arrays.train_offsets, config.session, config.windows)
    )
    counts = np.bincount(arrays.train_items)
    popular = np.lexsort((np.arange(len(counts)), -counts))[:K]
    model = make_model(config)
    curve: list[float] = []
    losses: list[float] = []
    best: dict[str, Any] = {}
    best_lists = np.zeros(0)
    stopped = "epochs"
    for epoch in range(job["epochs"]):
        model.fit_partial(data, min_epochs=1, max_epochs=1)
        losses.append(float(model.fit_trainer.callback_metrics["train_loss"]))
        lists = rank(model, arrays.valid_items, arrays.valid_offsets, config.session, popular)
        metrics = per_user_metrics(target_ranks(lists.tolist(), arrays.valid_targets))
        curve.append(float(metrics["ndcg@10"].mean()))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}, ndcg@10 {curve[-1]:.4f}", flush=True)
        if curve[-1] >= max(curve):
            best = copy.deepcopy(model.torch_model.state_dict())
            best_lists = lists
            best_metrics = {name: float(values.mean()) for name, values in metrics.items()}
        if len(curve) - 1 - int(np.argmax(curve)) >= job["patience"]:
            stopped = "patience"
            break
        if time.process_time() - cpu_began > job["seconds"]:
            stopped = "seconds"
            break
    model.torch_model.load_state_dict(best)
    test_lists = rank(model, arrays.test_items, arrays.test_offsets, config.session, popular)
    np.savez(out / "lists.npz", valid=best_lists, test=test_lists)
    return {
        "config": job["config"],
        "valid": best_metrics,
        "best_epoch": int(np.argmax(curve)) + 1,
        "epochs": len(curve),
        "stopped": stopped,
        "parameters": sum(p.numel() for p in model.torch_model.parameters()),
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "finished": time.time(),
        "versions": {name: version(name) for name in ("rectools", "torch", "pytorch-lightning", "numpy")},
        "curve": curve,
        "losses": losses,
    }


def main() -> None:
    """Train what the job file says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.sasrec_train")
    parser.add_argument("--arrays", type=Path, required=True)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    job = json.loads(options.job.read_text(encoding="utf-8"))
    with np.load(options.arrays) as stored:
        arrays = Arrays(**{name: stored[name] for name in Arrays.__dataclass_fields__})
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "result.json", train(arrays, Config(**job["config"]), job, options.out))


if __name__ == "__main__":
    main()
