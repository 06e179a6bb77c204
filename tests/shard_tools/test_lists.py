"""Lists of URLs: every format gives the same rows; what is no list is told with its line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ObjectMissingError, UsageError
from pipeline.store import open_store
from shard_tools.lists import ListedUrl, is_list, read_list, read_urls

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
        ("l.jsonl", b'{"url": "a"}\n{"url": \n', "line 2"),
        ("l.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("l.csv", b"url,b\n1,2,3\n", "line 2 has 3 fields, the first 2"),
        ("l.csv", b"url\n" + b"x" * 200_000, "field larger"),
        ("l.csv.gz", b"url\n", "not what its name says"),
        ("l.csv.gz", gzip.compress(b"url\nx\n" * 100)[:-9], "not what its name says"),
    ],
)
def test_what_is_no_list(tmp_path: Path, name: str, body: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(UsageError, match=message) as told:
        list(read_list(str(tmp_path / name)))
    assert str(tmp_path / name) in str(told.value)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissingError, match=r"nowhere\.csv"):
        list(read_list(str(tmp_path / "nowhere.csv")))
    assert is_list("a/B.CSV.GZ")
    assert not is_list("a/b.tar")
