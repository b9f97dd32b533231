"""Where a pruned model loses: told by cases, by users, and against another result."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.quality.losses import main
from models.data import load_data
from models.ranked_lists import RANKED_LISTS, write_lists
from tests.tiny import write_tiny_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data whose one busy user takes one item again and again; 30 others go on to the next item."""
    folder = write_tiny_data(tmp_path / "data")
    items = pq.read_table(folder / "items.parquet")["item_id"].to_pylist()
    often = [([items[7]] * (n + 1), items[7]) for n in range(6)]
    others = [([items[n]], items[n + 1]) for n in range(30)]
    cases = [("often", *case) for case in often] + [(f"u{n}", *case) for n, case in enumerate(others)]
    for part in ("train", "valid", "test"):
        users, histories, targets = zip(*cases, strict=True)
        rows = {"user_id": users, "history_item_ids": histories, "target_item_id": targets}
        pq.write_table(pa.table({**rows, "timestamp": [10**9] * len(cases)}), folder / f"{part}.parquet")
    return folder


def told(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict:
    """Return what the command says of a run that loses the busy user and another that loses u0 to u9."""
    data = load_data(str(folder))
    targets, users = data.test.targets.tolist(), data.test.histories.user_ids
    full = [[target] for target in targets]
    for run, lost in (("one", {"often"}), ("two", {f"u{n}" for n in range(10)})):
        pruned = [[] if user in lost else found for user, found in zip(users, full, strict=True)]
        (folder / run).mkdir()
        write_lists(folder / run / RANKED_LISTS, data.test, data.catalog, {"full": full, "pruned": pruned})
    command = ["losses", "--run", str(folder / "one"), "--other", str(folder / "two"), "--data", str(folder)]
    monkeypatch.setattr(sys, "argv", [*command, "--users", "1"])
    main()
    return json.loads(capsys.readouterr().out)


def test_the_loss_is_told_by_what_came_next_and_by_who_lost_it(folder, monkeypatch, capsys):
    found = told(folder, monkeypatch, capsys)
    assert (found["all"]["cases"], found["all"]["users"]) == (36, 31)
    assert found["all"]["kept"] == pytest.approx(30 / 36)
    assert found["the last item again"]["kept"] == 0
    assert found["the last item again"]["share_of_loss"] == pytest.approx(1)
    assert found["another item"]["kept"] == 1
    assert found["users that lose most"] == {"often": {"cases": 6, "share_of_loss": pytest.approx(1)}}
    assert found["without them"]["cases"] == 30


def test_another_result_may_gain_over_cases_and_lose_over_users(folder, monkeypatch, capsys):
    gained = told(folder, monkeypatch, capsys)["this run less the other"]
    assert gained["over cases"]["ndcg@10"]["difference"] == pytest.approx((30 - 26) / 36)
    assert gained["each user once"]["ndcg@10"]["difference"] == pytest.approx((30 - 21) / 31)


def test_a_folder_without_lists_is_named(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["losses", "--run", str(folder), "--data", str(folder)])
    with pytest.raises(SystemExit, match=r"data has no test-lists\.parquet; name a directory that"):
        main()
