"""An empty engine for stubs, which are no recommenders that could be read."""

import json
import shutil
from pathlib import Path


def make_empty(like: Path, directory: Path) -> Path:
    shutil.copytree(like, directory)
    stub = json.loads((like / "stub.json").read_text())
    kept = {name: stub[name] for name in ("name", "item_ids")}
    (directory / "stub.json").write_text(json.dumps(kept | {"delay_ms": 0, "weights_bytes": 1024}))
    return directory
