"""What a run works on: the full recommender, the data, the place for the result."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from models.catalog import Catalog, file_sha256
from models.checkpoint import weight_files
from models.data import Dataset, Examples, Sequences
from models.errors import LeanRecError, UsageError
from models.sources import BUILT_IN

RUNS = Path("runs")
HUB_FILES = ("*.json", "*.safetensors", "*.parquet", "*.txt", "*.model", "*.jinja")


def default_model(data: str | None) -> Path:
    """Return where `finetune` leaves the full recommender of a data set."""
    return RUNS / data_name(data) / "full"


def default_out(data: str | None, target: str) -> Path:
    """Return `runs/DATA/pruned-SIZE`, the size in percent, or as given when it is a count."""
    text = target.strip()
    if re.fullmatch(r"\d*\.\d*", text):
        text = f"{float(text) * 100:g}"
    return RUNS / data_name(data) / f"pruned-{text.removesuffix('%').strip()}"


def data_name(data: str | None) -> str:
    """Return the folder name under `runs/` of a `--data` value."""
    return BUILT_IN if data is None else Path(data).resolve().name


def find_model(model: str) -> Path:
    """Return the directory of `--model`, fetching a hub repository where that is what was named.

    Raises:
        UsageError: no such directory and no hub id.
        LeanRecError: the hub cannot be reached or has no such repository.
    """
    directory = Path(model)
    if directory.is_dir():
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or directory.exists():
        raise UsageError(f"--model {model}: no such directory, and not a hub id such as OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub client raises its own, requests' and OS errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LeanRecError(
            f"--model {model}: no such directory, and fetching it from the hub failed ({reason[:200]})"
        ) from error


def aligned(data: Dataset, catalog: Catalog) -> Dataset:
    """Return the data with its items numbered as in a recommender's catalogue.

    Raises:
        LeanRecError: the data has items the catalogue lacks.
    """
    if data.catalog.item_ids == catalog.item_ids:
        return replace(data, catalog=catalog)
    unknown = [item_id for item_id in data.catalog.item_ids if item_id not in catalog.row_of]
    if unknown:
        raise LeanRecError(
            f"data {data.name}: {len(unknown)} of its items are not in the model's catalogue (first: "
            f"{', '.join(map(repr, unknown[:3]))}); use the data the model was trained on"
        )
    row = np.array([catalog.row_of[item_id] for item_id in data.catalog.item_ids], np.int32)

    def sequences(old: Sequences) -> Sequences:
        return replace(old, items=row[old.items])

    def examples(old: Examples) -> Examples:
        return replace(old, histories=sequences(old.histories), targets=row[old.targets])

    return replace(
        data,
        catalog=catalog,
        train=sequences(data.train),
        valid=examples(data.valid),
        test=examples(data.test),
    )


def model_sha256(directory: Path) -> str:
    """Return one checksum over all that a recommender's answers depend on."""
    digest = hashlib.sha256()
    names = ("config.json", "recommender.json", "tokenizer.json", "catalog.parquet")
    for path in sorted([*weight_files(directory), *(directory / name for name in names)]):
        if path.is_file():
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def data_sha256(data: Dataset) -> str:
    """Return one checksum over the items and every split, whatever files they came from."""
    digest = hashlib.sha256("\n".join(data.catalog.item_ids).encode())
    digest.update("\n".join(data.catalog.titles).encode())
    for sequences in (data.train, data.valid.histories, data.test.histories):
        digest.update(sequences.items.astype(np.int32).tobytes())
        digest.update(sequences.offsets.astype(np.int64).tobytes())
    for targets in (data.valid.targets, data.test.targets):
        digest.update(targets.astype(np.int32).tobytes())
    return digest.hexdigest()
