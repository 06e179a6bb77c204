"""Lists of URLs: every format gives the same rows; what is no list is told with its line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ObjectMissingError, StoreError, UsageError
from pipeline.store import open_store
from shard_tools.lists import (
    BAD_ROW,
    MAX_FIELD_BYTES,
    ColumnNames,
    ListedUrl,
    is_list,
    read_list,
    read_urls,
)

ROWS = [
    {"url": "https://h/1.jpg", "label": "cat", "text": 'a, "quoted"\ttabbed\nword'},
    {"url": "https://h/2.jpg", "label": None, "text": "é 你"},
    {"url": None, "label": "dog", "text": None},
]
EXPECTED = [
    ListedUrl(0, "https://h/1.jpg", "cat", {"text": ROWS[0]["text"]}),
    ListedUrl(1, "https://h/2.jpg", None, {"text": "é 你"}),
    ListedUrl(2, "", "dog", {"text": None}),
]


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_json_lines(path: Path) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n\n" for row in ROWS), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "write"), [("l.parquet", write_parquet), ("l.jsonl", write_json_lines)]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_formats(tmp_path: Path, name: str, write: Callable[[Path], None], zipped: bool) -> None:
    path = tmp_path / name
    write(path)
    if zipped and name != "l.parquet":
        path = zip_file(path)
    assert list(read_list(str(path))) == EXPECTED


def zip_file(path: Path) -> Path:
    zipped = path.with_name(f"{path.name}.gz")
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    return zipped


@pytest.mark.parametrize("name", ["l.csv", "l.tsv"])
def test_delimited(tmp_path: Path, name: str) -> None:
    """An empty field is an empty string there, and a short line lacks its last fields."""
    delimiter = "\t" if name == "l.tsv" else ","
    lines = ["URL label text", 'https://h/1.jpg cat "a ""b"" c"', "https://h/2.jpg", "", " dog "]
    text = "\r\n".join(line.replace(" ", delimiter) for line in lines)
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8", newline="")
    for path in (tmp_path / name, zip_file(tmp_path / name)):
        rows = list(read_list(str(path)))
        assert [(row.url, row.label) for row in rows] == [
            ("https://h/1.jpg", "cat"),
            ("https://h/2.jpg", None),
            ("", "dog"),
        ]
        assert rows[0].columns == {"text": f'a{delimiter}"b"{delimiter}c'}


def test_plain_text_on_s3(s3_url: str) -> None:
    store = open_store(s3_url)
    body = gzip.compress(b"https://h/1.jpg\r\n\n  https://h/2.jpg\n\xff\n")
    store.put_if_absent("lists/a.txt.gz", body)
    rows = list(read_list(f"{s3_url}/lists/a.txt.gz"))
    assert [row.url for row in rows] == ["https://h/1.jpg", "https://h/2.jpg", "\ufffd"]
    assert read_urls(f"{s3_url}/lists/a.txt.gz", [1, 5]) == {1: "https://h/2.jpg"}


def test_which_column(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"Image_URL": "https://h/1", "thumb": "https://h/2", "Key": "k", "n": 1.5}\n')
    [row] = read_list(str(path))
    assert (row.url, row.columns["input_Key"], row.columns["n"]) == ("https://h/1", "k", "1.5")
    [row] = read_list(str(path), "thumb")
    assert row.url == "https://h/2"
    with pytest.raises(UsageError, match="no column 'nope': name one of Image_URL, thumb, Key, n"):
        list(read_list(str(path), "nope"))
    path.write_text('{"a": 1}\n')
    with pytest.raises(UsageError, match="no column of URLs"):
        list(read_list(str(path)))


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("l.parquet", b"PAR1 not", "not what its name says"),
        ("l.jsonl", b'{"url": \n' * 100 + b'{"url": "a"}\n', "line 1: "),
        ("l.jsonl", b"[" * 10**5, "line 1: "),
        ("l.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("l.csv", b"url,b\n1,2,3\n", "line 2 has 3 fields, the first 2"),
        ("l.csv", b"url\n" + b"x" * (MAX_FIELD_BYTES + 1), "line 2: field larger"),
        ("l.csv.gz", b"url\n", "not what its name says"),
        ("l.csv.gz", gzip.compress(b"url\nx\n" * 100, mtime=0)[:-9], "not what its name says"),
    ],
)
def test_what_is_no_list(tmp_path: Path, name: str, body: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(UsageError, match=message) as told:
        list(read_list(str(tmp_path / name)))
    assert str(tmp_path / name) in str(told.value)


@pytest.mark.parametrize(
    ("name", "body", "problem"),
    [
        ("l.jsonl", b'{"url": "a"}\n{"url": "https://me:word@h/b", \n', "line 2: Expecting"),
        ("l.jsonl", b'{"url": "a"}\n"b"\n', 'line 2 is no JSON object: "b"'),
        ("l.jsonl", b'{"url": "a"}\n' + b"[" * 10**5 + b"\n", "line 2: maximum recursion"),
        ("l.csv", b"url,b\na,\nhttps://me:word@h/b,2,3\n", "line 3 has 3 fields, the first 2: "),
        ("l.tsv", b"url\na\n" + b"x" * (MAX_FIELD_BYTES + 1) + b"\n", "line 3: field larger"),
    ],
)
def test_a_bad_row_is_a_row(tmp_path: Path, name: str, body: bytes, problem: str) -> None:
    """… without a URL, so that it ends as a reject; positions count it."""
    path = str(tmp_path / name)
    (tmp_path / name).write_bytes(body + (b'{"url": "z"}' if name == "l.jsonl" else b"z"))
    first, bad, last = read_list(path)
    assert (first.url, bad.url, last.url) == ("a", "", "z")
    said = bad.columns[BAD_ROW]
    assert said is not None
    assert said.startswith(problem)
    assert "word" not in said
    assert len(said) < 400
    assert read_urls(path, [0, 1, 2, 3]) == {0: "a", 2: "z"}


def test_bad_rows_at_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_bytes(b'{"url": \n' * 99 + b'{"url": "a"}\n')
    rows = list(read_list(str(path)))
    assert [row.url for row in rows] == [""] * 99 + ["a"]
    assert read_urls(str(path), [99]) == {99: "a"}


def test_long_fields(tmp_path: Path) -> None:
    text = "x" * 300_000
    (tmp_path / "l.csv").write_text(f"url,text\nhttps://h/1,{text}\n")
    [row] = read_list(str(tmp_path / "l.csv"))
    assert row.columns == {"text": text}


def test_carried_columns_keep_no_secrets(tmp_path: Path) -> None:
    secret = "https://me:word@h/t.jpg?X-Amz-Signature=secret&w=1"
    row = {"url": "https://h/1.jpg", "thumb": secret, "label": secret, "all": [{"a": secret}]}
    for name, write in (("l.jsonl", write_json_line), ("l.parquet", write_parquet_row)):
        write(tmp_path / name, row)
        [listed] = read_list(str(tmp_path / name))
        assert listed.columns["thumb"] == listed.label == "https://h/t.jpg?w=1"
        assert "secret" not in str(listed)
        assert "word" not in str(listed)


def write_json_line(path: Path, row: dict[str, object]) -> None:
    path.write_text(json.dumps(row))


def write_parquet_row(path: Path, row: dict[str, object]) -> None:
    pq.write_table(pa.Table.from_pylist([row]), path)


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"url": "https://h/\\ud800", "text": "\\ud800 bad", "\\ud800": "x"}\n')
    [row] = read_list(str(path))
    assert (row.url, row.columns) == ("https://h/?", {"text": "? bad", "?": "x"})


def test_names_that_sql_would_confuse(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    columns = ["key", "input_key", "Key", "Label", "text", "Text", "original_width", "", BAD_ROW]
    path.write_text(json.dumps({"url": "u", "label": "l"} | {name: name for name in columns}))
    [row] = read_list(str(path))
    assert row.label == "l"
    assert row.columns == {
        "input_key": "key",
        "input_key_2": "input_key",
        "input_Key_3": "Key",
        "input_Label": "Label",
        "text": "text",
        "Text_2": "Text",
        "input_original_width": "original_width",
        "input_": "",
        f"input_{BAD_ROW}": BAD_ROW,
    }


def test_lists_of_one_source_share_their_names(tmp_path: Path) -> None:
    names = ColumnNames()
    for name in ("text", "Text", "text"):
        (tmp_path / "l.csv").write_text(f"url,{name}\nu,x\n")
        [row] = read_list(str(tmp_path / "l.csv"), names=names)
        assert row.columns == {"text" if name == "text" else "Text_2": "x"}


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("url,a,a\nu,1,2\n")
    [row] = read_list(str(tmp_path / "l.csv"))
    assert row.columns == {"a": "1", "a_2": "2"}


def test_urls_out_of_a_parquet_list(tmp_path: Path) -> None:
    """Row groups without a wanted position are not read: here they cannot be."""
    path = tmp_path / "l.parquet"
    urls = [f"https://h/{number}?sig={number}" for number in range(1000)]
    table = pa.table({"Image_URL": urls, "text": ["x" * 100] * 1000})
    pq.write_table(table, path, row_group_size=100, compression="none", use_dictionary=False)
    body = bytearray(path.read_bytes())
    body[4 : body.index(b"https://h/500?")] = b"\xff" * (body.index(b"https://h/500?") - 4)
    path.write_bytes(body)
    assert read_urls(str(path), [999, 620, 2000]) == {620: urls[620], 999: urls[999]}
    with pytest.raises(StoreError, match="cannot read"):
        read_urls(str(path), [3])


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissingError, match=r"nowhere\.csv"):
        list(read_list(str(tmp_path / "nowhere.csv")))
    assert is_list("a/B.CSV.GZ")
    assert not is_list("a/b.tar")
