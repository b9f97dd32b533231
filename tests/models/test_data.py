"""Reading and splitting data: every format, and what is wrong with bad ones."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

from models import catalog
from models.catalog import make_catalog
from models.data import load_data
from models.errors import LeanRecError, UsageError
from tests.tiny import write_tiny_data

ITEMS = {"item_id": ["a", "b", "c", "d"], "title": ["Alpha", "Beta  two", "Gamma", "Delta"]}
INTERACTIONS = {
    "user_id": ["u", "v", "u", "u", "u", "v"],
    "item_id": ["c", "a", "a", "b", "d", "b"],
    "timestamp": [300, 5, 100, 200, 90_000, 6],
}


def write(folder: Path, extension: str, items: dict = ITEMS, interactions: dict = INTERACTIONS) -> str:
    folder.mkdir(exist_ok=True)
    for name, columns in (("items", items), ("interactions", interactions)):
        table, path = pa.table(columns), folder / f"{name}.{extension}"
        pcsv.write_csv(table, path) if extension == "csv" else pq.write_table(table, path)
    return str(folder)


@pytest.mark.parametrize("extension", ["parquet", "csv"])
def test_leave_one_out_from_a_folder(tmp_path: Path, extension: str) -> None:
    data = load_data(write(tmp_path, extension))
    assert data.catalog.titles == ("Alpha", "Beta two", "Gamma", "Delta")
    ids = data.catalog.item_ids
    # u: a b c d in order of time; v has too few for a split and only trains.
    assert [[ids[i] for i in data.train[n]] for n in range(len(data.train))] == [["a", "b"], ["a", "b"]]
    assert [ids[i] for i in data.valid.histories[0]] == ["a", "b"]
    assert [ids[i] for i in data.valid.targets] == ["c"]
    assert [ids[i] for i in data.test.histories[0]] == ["a", "b", "c"]
    assert [ids[i] for i in data.test.targets] == ["d"]
    assert data.test.later_day.tolist() == [True]
    assert data.valid.later_day.tolist() == [False]
    assert data.catalog.popularity.tolist() == [2, 2, 0, 0]


MANY = 200_000
"""rows of more than the megabyte from which a CSV column's type is guessed"""


def test_columns_that_are_not_read_may_hold_anything(tmp_path: Path) -> None:
    source = write(tmp_path, "csv")
    rows = [f"w,a,{n},12" for n in range(MANY)] + ["w,b,1000000,none"]
    (tmp_path / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp,price", *rows]) + "\n")
    assert len(load_data(source).train.items) == MANY + 1 - 2


@pytest.mark.parametrize("extension", ["parquet", "csv"])
def test_further_columns_of_items_are_attributes(tmp_path: Path, extension: str) -> None:
    further = {"genre": ["x", None, "NA", "y"], "year": [1990, 2000, None, 2010], "popularity": [9, 9, 9, 9]}
    found = load_data(write(tmp_path, extension, {**ITEMS, **further})).catalog
    assert {name: column.to_pylist() for name, column in found.attributes.items()} == {
        "genre": ["x", None, "NA", "y"],
        "year": [1990, 2000, None, 2010],
    }
    assert found.popularity.tolist() == [2, 2, 0, 0]  # as the interactions have it


def test_columns_that_cannot_be_attributes_are_left_out(tmp_path: Path) -> None:
    odd = {"released": np.array([1, 2, 3, 4], "datetime64[D]"), "image": [b"1", b"2", b"3", b"4"]}
    tags = pa.array([["p"], ["q", "r"], None, []], pa.list_(pa.string()))
    found = load_data(write(tmp_path, "parquet", {**ITEMS, **odd, "tags": tags})).catalog
    assert {name: column.to_pylist() for name, column in found.attributes.items()} == {
        "tags": [["p"], ["q", "r"], None, []]
    }


def test_a_column_of_csv_is_typed_by_all_of_its_rows(tmp_path: Path) -> None:
    source = write(tmp_path, "csv")
    lines = [f"i{n},Title {n},12" for n in range(MANY)] + ["last,Last,12.99"]
    lines += [f"{i},{title},1" for i, title in zip(ITEMS["item_id"], ITEMS["title"], strict=True)]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,title,price", *lines]) + "\n")
    found = load_data(source).catalog
    assert found.attributes["price"].to_pylist()[MANY - 1 : MANY + 1] == [12.0, 12.99]


def test_a_title_that_is_no_text_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, "parquet")
    odd = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"item_id": ["a"], "title": odd}), tmp_path / "items.parquet")
    with pytest.raises(LeanRecError, match="not readable"):
        load_data(source)


@pytest.mark.parametrize("extension", ["parquet", "csv"])
@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_rows_without_an_id_are_refused(tmp_path: Path, extension: str, column: str) -> None:
    nothing = "" if extension == "csv" else None
    bad = {**INTERACTIONS, "user_id": ["u", nothing, "u", "u", "u", "v"]}
    items = {**ITEMS, "item_id": ["a", "b", nothing, "d"]}
    source = write(tmp_path, extension, *((ITEMS, bad) if column == "user_id" else (items, INTERACTIONS)))
    with pytest.raises(LeanRecError, match=f"has rows without {column}"):
        load_data(source)


def test_interactions_of_one_second_keep_the_files_order(tmp_path: Path) -> None:
    same = {"user_id": ["u"] * 4, "item_id": ["d", "a", "c", "b"], "timestamp": [7, 7, 7, 7]}
    data = load_data(write(tmp_path, "parquet", interactions=same))
    assert [data.catalog.item_ids[i] for i in data.test.histories[0]] == ["d", "a", "c"]


def test_ready_splits_are_taken_unchanged(tmp_path: Path) -> None:
    write(tmp_path, "parquet")

    def rows(histories: list[list[str]], targets: list[str]) -> pa.Table:
        return pa.table(
            {"user_id": ["u"] * len(targets), "history_item_ids": histories, "target_item_id": targets}
        )

    pq.write_table(rows([["a"], ["a", "b"], ["d"]], ["b", "c", "a"]), tmp_path / "train.parquet")
    pq.write_table(rows([["a", "b", "c"]], ["d"]), tmp_path / "valid.parquet")
    pq.write_table(rows([["b", "c"], ["d", "c"]], ["a", "b"]), tmp_path / "test.parquet")
    data = load_data(str(tmp_path))
    ids = data.catalog.item_ids
    # the second row continues the first, the third does not
    assert [[ids[i] for i in data.train[n]] for n in range(2)] == [["a", "b", "c"], ["d", "a"]]
    assert [[ids[i] for i in data.test.histories[n]] for n in range(2)] == [["b", "c"], ["d", "c"]]
    assert [ids[i] for i in data.test.targets] == ["a", "b"]


def test_a_target_of_the_same_day_is_told_from_one_of_a_later_day(tmp_path: Path) -> None:
    day = np.timedelta64(1, "D")
    start = np.datetime64("2020-01-01T10:00", "ns")
    when = {"a": start, "b": start + np.timedelta64(2, "h"), "c": start + 3 * day}
    rows = {"user_id": ["u", "u", "v", "v"], "item_id": ["b", "a", "a", "b"]}
    # Not in order of time: what counts is the last meeting.
    times = [when["b"], when["a"], when["a"], when["b"]]
    write(tmp_path, "parquet", interactions={**rows, "timestamp": np.array(times)})
    for split, history in (("train", ["a"]), ("valid", ["a"])):
        table = pa.table({"user_id": ["u"], "history_item_ids": [history], "target_item_id": ["b"]})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    test = {
        "user_id": ["u", "v"],
        "history_item_ids": [["a", "b"], ["a", "b"]],
        "target_item_id": ["c", "d"],
        "timestamp": np.array([when["c"], when["b"] + np.timedelta64(1, "h")]),
    }
    pq.write_table(pa.table(test), tmp_path / "test.parquet")
    assert load_data(str(tmp_path)).test.later_day.tolist() == [True, False]


def test_dates_are_read_like_seconds(tmp_path: Path) -> None:
    seconds = load_data(write(tmp_path / "seconds", "parquet"))
    times = np.array(INTERACTIONS["timestamp"]).astype("datetime64[s]").astype("datetime64[ns]")
    dates = load_data(write(tmp_path / "dates", "parquet", interactions={**INTERACTIONS, "timestamp": times}))
    assert dates.test.later_day.tolist() == seconds.test.later_day.tolist()
    assert dates.valid.later_day.tolist() == seconds.valid.later_day.tolist()
    np.testing.assert_array_equal(dates.train.items, seconds.train.items)


def test_milliseconds_are_read_like_seconds(tmp_path: Path) -> None:
    start = 1_700_000_000  # a day ends 6,400 s later
    times = [start + time for time in INTERACTIONS["timestamp"]]
    for factor in (1, 1000):
        interactions = {**INTERACTIONS, "timestamp": [factor * time for time in times]}
        data = load_data(write(tmp_path / str(factor), "parquet", interactions=interactions))
        assert (data.test.later_day.tolist(), data.valid.later_day.tolist()) == ([True], [False])


def test_moments_within_a_second_have_an_order(tmp_path: Path) -> None:
    start = 1_700_000_000_000
    numbers = [start + moment for moment in (4, 1, 3, 2)]
    moments = {"user_id": ["u"] * 4, "item_id": ["d", "a", "c", "b"], "timestamp": numbers}
    times = np.array(numbers).astype("datetime64[ms]")
    for name, given in (("number", moments), ("date", {**moments, "timestamp": times})):
        data = load_data(write(tmp_path / name, "parquet", interactions=given))
        assert [data.catalog.item_ids[i] for i in data.test.histories[0]] == ["a", "b", "c"]


def test_recbole_files(tmp_path: Path) -> None:
    (tmp_path / "x.item").write_text(
        "\ufeffitem_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\trated:float\tpixels:float_seq\n"
        "1\tHeat\t1995\tCrime  Drama \t8.3\t1 2\n2\tHeat\t1972\t\t\t\n3\tunknown\t\tDrama\t1\t3\n"
    )
    (tmp_path / "x.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t2\t3\t30\n7\t1\t3\t10\n7\t3\t3\t20\n"
    )
    data = load_data(str(tmp_path))
    assert data.catalog.titles == ("Heat (1995)", "Heat (1972)", "unknown")
    assert {name: column.to_pylist() for name, column in data.catalog.attributes.items()} == {
        "release_year": ["1995", "1972", None],
        "class": [["Crime", "Drama"], None, ["Drama"]],
        "rated": [8.3, None, 1.0],
    }
    assert data.test.histories[0].tolist() == [0, 2]
    assert data.test.targets.tolist() == [1]


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ("item_id:token\ttitle:token_seq\n", "holds no items"),
        ("item_id:token\ttitle:token_seq\tprice:float\n1\tA\t$3\n", "price is no float"),
        ("item_id:token\ttitle:token_seq\ttitle:token\n1\tA\tB\n", "has the column title more than once"),
    ],
)
def test_bad_recbole_files_are_named(tmp_path: Path, items: str, said: str) -> None:
    (tmp_path / "x.item").write_text(items)
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n7\t1\t3\n")
    with pytest.raises(LeanRecError, match=said) as error:
        load_data(str(tmp_path))
    assert "x.item" in str(error.value)


def test_what_the_catalogue_itself_tells_is_no_attribute(tmp_path: Path) -> None:
    header = "item_id:token\tmovie_title:token_seq\ttitle:token\tpopularity:float\t\t\n"
    items = "".join(f"{n}\tFilm {n}\tx\t3.5\t\t\n" for n in range(3))
    (tmp_path / "x.item").write_text(header + items)
    rows = "".join(f"7\t{n}\t{n}\n" for n in range(3))
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + rows)
    found = load_data(str(tmp_path)).catalog
    assert found.titles == ("Film 0", "Film 1", "Film 2")
    assert not found.attributes
    with pytest.raises(LeanRecError, match="popularity cannot be the name of an attribute"):
        make_catalog(["a"], ["b"], None, "test", {"popularity": pa.chunked_array([[1]])})


def test_an_attribute_that_fills_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "MAX_ATTRIBUTE_BYTES", 2**20)
    source = write(tmp_path, "parquet", {**ITEMS, "description": ["x" * 2**19] * 4})
    with pytest.raises(LeanRecError, match=r"description takes 2 MiB in memory.*leave it out"):
        load_data(source)


@pytest.mark.parametrize("spoil", ["header", "page"])
def test_damaged_items_are_named(tmp_path: Path, spoil: str) -> None:
    source = write(tmp_path, "csv" if spoil == "header" else "parquet")
    if spoil == "header":
        (tmp_path / "items.csv").write_bytes(b"item_id,title,Gr\xf6\xdfe\na,A,1\n")
    else:
        content = bytearray((tmp_path / "items.parquet").read_bytes())
        content[4:40] = b"\xff" * 36
        (tmp_path / "items.parquet").write_bytes(content)
    with pytest.raises(LeanRecError, match=r"items.*not readable"):
        load_data(source)


def test_an_index_is_no_attribute(tmp_path: Path) -> None:
    source = write(tmp_path, "csv")
    lines = [f"{n},{i},{i.upper()},," for n, i in enumerate(ITEMS["item_id"])]
    (tmp_path / "items.csv").write_text("\n".join([",item_id,title,,", *lines]) + "\n")
    assert not load_data(source).catalog.attributes


def test_movielens_100k_comes_with_its_wheel() -> None:
    data = load_data("ml-100k")
    assert (len(data.catalog), len(data.train), len(data.test)) == (1682, 943, 943)
    assert len(data.train.items) == 100_000 - 2 * 943
    assert data.catalog.titles[0] == "Toy Story (1995)"


def test_many_batches_read_as_one(tmp_path: Path) -> None:
    folder = write_tiny_data(tmp_path, users=40)
    whole = load_data(str(folder))
    table = pq.read_table(folder / "interactions.parquet")
    pq.write_table(table, folder / "interactions.parquet", row_group_size=7)
    again = load_data(str(folder))
    np.testing.assert_array_equal(whole.train.items, again.train.items)
    np.testing.assert_array_equal(whole.test.targets, again.test.targets)


@pytest.mark.parametrize(
    ("items", "interactions", "message"),
    [
        ({"item_id": [], "title": []}, INTERACTIONS, "holds no items"),
        ({**ITEMS, "title": ["x", None, "", "y"]}, INTERACTIONS, "2 items have no title (first: 'b', 'c')"),
        ({**ITEMS, "item_id": ["a", "a", "c", "d"]}, INTERACTIONS, "'a' stands more than once"),
        ({"item_id": ITEMS["item_id"]}, INTERACTIONS, "lacks the column title"),
        (
            ITEMS,
            {**INTERACTIONS, "item_id": ["c", "q", "a", "b", "d", "b"]},
            "1 items that the item file lacks",
        ),
        (ITEMS, {k: v[:2] for k, v in INTERACTIONS.items()}, "none of 2 users has 3 interactions"),
        (ITEMS, {"user_id": ["u"], "item_id": ["a"]}, "lacks the column timestamp"),
        (ITEMS, {**INTERACTIONS, "timestamp": ["soon"] * 6}, "timestamp must be seconds or a date"),
        (
            ITEMS,
            {**INTERACTIONS, "timestamp": [10**15] * 6},
            "the timestamp 1000000000000000; give seconds",
        ),
    ],
)
def test_bad_data_is_named(tmp_path: Path, items: dict, interactions: dict, message: str) -> None:
    source = write(tmp_path, "parquet", items, interactions)
    with pytest.raises(LeanRecError) as error:
        load_data(source)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value) or tmp_path.name in str(error.value)


def test_unreadable_or_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither 'ml-100k' nor a folder"):
        load_data(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match=r"neither items\.parquet"):
        load_data(str(tmp_path))
    write(tmp_path, "parquet")
    (tmp_path / "interactions.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(LeanRecError, match="not readable"):
        load_data(str(tmp_path))
