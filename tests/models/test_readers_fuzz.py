"""Whatever a recommender's files hold, reading them succeeds or names what is wrong."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.catalog import Catalog, read_catalog, read_parquet_catalog
from models.checkpoint import check_weights, read_description, read_safetensors_header
from models.errors import LeanRecError
from models.golden import Golden
from models.index import UnusableIndexError, load_index
from models.prompt import PromptConfig, Prompter
from models.template import compile_template

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.text(max_size=20) | st.sampled_from(
    ["..", ".", "", "/", "a/b", "\x00", "model.safetensors", "../x"]
)


@FUZZ
@given(content=st.binary(max_size=300))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    for name in ("model.safetensors", "recommender.json", "catalog.parquet", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(content)
    for read in (
        lambda: read_safetensors_header(tmp_path / "model.safetensors"),
        lambda: read_description(tmp_path),
        lambda: check_weights(tmp_path),
        lambda: read_catalog(tmp_path / "catalog.parquet"),
        lambda: Golden.parse(content.decode("utf-8", "replace"), "golden"),
    ):
        with pytest.raises(LeanRecError):
            read()
    with pytest.raises((UnusableIndexError, OSError)):
        load_index(tmp_path / "catalog.parquet", "key")


@FUZZ
@given(described=VALUES | st.fixed_dictionaries({"format": st.just(1), "catalog": VALUES, "prompt": VALUES}))
def test_any_description(tmp_path: Path, described: object) -> None:
    (tmp_path / "recommender.json").write_text(json.dumps(described))
    try:
        read = read_description(tmp_path)
    except LeanRecError:
        return
    try:
        PromptConfig(**read["prompt"])
    except LeanRecError:
        return


@FUZZ
@given(
    header=VALUES
    | st.dictionaries(
        NAMES, st.fixed_dictionaries({"data_offsets": VALUES, "shape": st.just([1])}) | VALUES, max_size=3
    )
)
def test_any_weights_header(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    try:
        read_safetensors_header(path)
    except LeanRecError:
        return


@FUZZ
@given(
    index=VALUES | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=5), NAMES | VALUES)})
)
def test_any_weights_index(tmp_path: Path, index: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        check_weights(tmp_path)
    except LeanRecError:
        return
    assert isinstance(index, dict)
    assert index["weight_map"] == {}


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


SOUND = parquet(
    pa.table(
        {
            "item_id": [f"i{n}" for n in range(50)],
            "title": [f"title {n % 7}" for n in range(50)],
            "popularity": list(range(50)),
            "genres": [["a", "b"][: n % 3] for n in range(50)],
        }
    )
)


def named_or_read(content: bytes) -> Catalog | None:
    try:
        return read_parquet_catalog(io.BytesIO(content), "catalogue", 10_000)
    except LeanRecError:
        return None


@FUZZ
@given(
    changes=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, len(SOUND)) | st.just(len(SOUND)),
)
def test_a_damaged_catalogue(changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(SOUND)
    for at, value in changes:
        content[at] = value
    catalog = named_or_read(bytes(content[:cut]))
    if catalog is not None:
        assert len(catalog.version) == 12
        assert all(isinstance(title, str) for title in catalog.titles)


COLUMNS = st.sampled_from(
    [
        pa.array(["a", "b", None]),
        pa.array([1, 2, 3]),
        pa.array([1.5, float("nan"), None]),
        pa.array([-1, 2**63 - 1, 0]),
        pa.array([None, None, None]),
        pa.array([["a"], [], None]),
        pa.array([{"x": 1}, None, {"x": 2}]),
        pa.array([b"\xff", b"a", b"b"]),
        pa.array([True, False, None]),
        pa.array(["a", "b", "c"]).dictionary_encode(),
        pa.array(np.array([1, 2, 3], "datetime64[s]")),
        pa.array(["\x00", "﷽" * 50, " "]),
        pa.Array.from_buffers(
            pa.string(), 3, [*pa.array(["ab", "cd", "ef"]).buffers()[:2], pa.py_buffer(b"\xff" * 6)]
        ),
    ]
)


@FUZZ
@given(
    columns=st.lists(
        st.tuples(st.sampled_from(["item_id", "title", "popularity", "genre", ""]), COLUMNS), max_size=5
    )
)
def test_columns_of_any_type(columns: list[tuple[str, pa.Array]]) -> None:
    """And of the same name."""
    catalog = named_or_read(parquet(pa.Table.from_arrays([c for _, c in columns], [n for n, _ in columns])))
    if catalog is not None:
        assert len(catalog) == 3
        assert len(catalog.version) == 12


def test_a_small_file_of_many_rows_is_not_unpacked() -> None:
    many = pa.table({"item_id": pa.array([""] * 20_000), "title": pa.array([""] * 20_000)})
    with pytest.raises(LeanRecError, match="20000 items; at most 10000"):
        read_parquet_catalog(io.BytesIO(parquet(many)), "catalogue", 10_000)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ history.__init__.__globals__ }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "{{ lipsum() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 1 / 0 }}",
        "{{ history.append('x') }}",
        "{{ cycler }}",
        "{% set x = namespace() %}",
        "{{ nothing }}",
        "{% for",
        "{{ history | nothing }}",
        # Each would take for ever, or all memory.
        "{% for a in history %}{% for b in history %}x{% endfor %}{% endfor %}",
        "{% for a in history recursive %}{{ a }}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ 2 ** 100000000 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ ''.ljust(10000000000) }}",
        "{{ 'x' | center(10000000000) }}",
        "{% set x = 'xx' %}" + "{% set x = x ~ x %}" * 40,
        "{{ 'x' | join('ab') | join('ab') }}",
        "{{ history | join(history | join(', ')) }}",
        "{{ history | replace('a', 'aa') }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "x" * 100_000,
    ],
)
def test_a_template_can_do_nothing_but_write_the_history(template: str) -> None:
    with pytest.raises(LeanRecError, match=r"prompt\.template"):
        Prompter(None, PromptConfig(template=template), [])


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{{ history | join(', ') }}\nNext: ", "a, b\nNext: "),
        ("{% for t in history %}{{ loop.index + 1 }}. {{ t | trim }}\n{% endfor %}", "2. a\n3. b\n"),
        ("{% if history | length > 1 %}{{ history[1:] | last ~ '!' }}{% else %}-{% endif %}", "b!"),
        ("{% for t in history | reverse %}{{ t if not loop.last else '.' }}{% endfor %}", "b."),
    ],
)
def test_what_prompts_need_is_there(template: str, written: str) -> None:
    assert compile_template(template).render(history=["a", "b"]) == written
