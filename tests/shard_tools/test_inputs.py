"""Inputs that are gone, changed, denied or too large are rejects; a store that fails is none."""

import contextlib
import os
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import AccessDeniedError, ObjectMissingError, SampleError, StoreError
from pipeline.store import SourceFile, find_file, open_store
from shard_tools.download import DownloadSettings
from shard_tools.inputs import read_inputs
from shard_tools.sources import Kind, PlannedInput
from tests.shard_tools.test_tars import make_tar
from tests.support import killing_proxy
from tests.support.http_server import HttpServer, Page
from tests.support.killing_proxy import KillingProxy
from tests.support.s3_server import S3Server

CAP = 10**6

Put = Callable[[str, bytes], SourceFile]


@pytest.fixture(params=["file", "s3", "memory"])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Put]:
    """A function that writes a file on some store and describes it as a listing would."""
    url = f"file://{tmp_path}/in"
    if request.param == "s3":
        url = str(request.getfixturevalue("s3_url"))
    if request.param == "memory":
        url = "memory://inputs"
    memory = fsspec.filesystem("memory")

    def write(name: str, body: bytes) -> SourceFile:
        if request.param == "memory":
            memory.pipe(f"/inputs/{name}", body)
        else:
            with open_store(url).writer(name) as writer:
                writer.write(body)
        file = find_file(f"{url}/{name}")
        assert file is not None
        return file

    yield write
    with contextlib.suppress(FileNotFoundError):
        memory.rm("/inputs", recursive=True)


def planned(row: int, file: SourceFile) -> PlannedInput:
    return PlannedInput(row, file.url, file.size_bytes, file.tag, start_bytes=0)


def another_try(row: int, file: SourceFile) -> PlannedInput:
    return replace(planned(row, file), size_bytes=None, tag=None)


def read(*inputs: PlannedInput, kind: Kind = "files", cap: int = CAP) -> list[bytes | str]:
    """The bytes of all inputs, or the reasons why not."""
    arrivals = read_inputs(
        inputs, kind, max_bytes=cap, url_column=None, download=DownloadSettings()
    )
    return [a.data.reason if isinstance(a.data, SampleError) else a.data for a in arrivals]


# ----------------------------------------------------------------------------------------
# size


def test_what_is_read_without_a_planned_size_is_capped(put: Put) -> None:
    small, large, exact, empty = (
        put("small", b"x"),
        put("large", bytes(5 * CAP)),
        put("exact", bytes(CAP)),
        put("empty", b""),
    )
    inputs = [another_try(row, file) for row, file in enumerate((small, large, exact, empty))]
    assert read(*inputs) == [b"x", "too large", bytes(CAP), b""]


def test_what_has_grown_is_not_read_whole(put: Put) -> None:
    """A byte more is enough to see it; where no tag is known either."""
    files = [put("a", b"abc"), put("b", b""), put("c", b"abc")]
    put("a", b"abcd")
    put("b", b"x")
    inputs = [replace(planned(row, file), tag=None) for row, file in enumerate(files)]
    assert read(*inputs) == ["changed", "changed", b"abc"]


@pytest.mark.parametrize("size_bytes", [None, 10])
def test_a_large_local_file_takes_no_memory(tmp_path: Path, size_bytes: int | None) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**30)
    large = PlannedInput(0, f"file://{tmp_path}/large", size_bytes)
    tracemalloc.start()
    try:
        assert read(large) == ["too large" if size_bytes is None else "changed"]
        assert tracemalloc.get_traced_memory()[1] < 4 * CAP
    finally:
        tracemalloc.stop()


def test_a_size_that_the_store_does_not_tell() -> None:
    pages = {
        name: Page(bytes(size), chunked=True, headers=[("Connection", "close")])
        for name, size in (("/small", 9), ("/large", CAP + 1))
    }
    with HttpServer(pages) as web:
        files = [find_file(web.url(name)) for name in pages]
        assert [file.size_bytes for file in files if file is not None] == [None, None]
        inputs = [planned(row, file) for row, file in enumerate(files) if file is not None]
        assert read(*inputs) == [bytes(9), "too large"]


def test_a_file_that_comes_in_pieces() -> None:
    """A file that the kernel makes up comes page by page, as from some network file systems."""
    symbols = Path("/proc/kallsyms")
    whole = symbols.read_bytes()
    with symbols.open("rb", buffering=0) as file:
        if len(os.read(file.fileno(), 2 * len(whole))) == len(whole):
            pytest.skip("here it comes in one piece")
    assert read(PlannedInput(0, "file:///proc/kallsyms", len(whole)), cap=10**9) == [whole]


# ----------------------------------------------------------------------------------------
# what was planned


def test_another_file_of_the_same_size(put: Put) -> None:
    files = [put("a", b"one"), put("b", b"two")]
    put("a", b"ONE")
    assert read(*(planned(row, file) for row, file in enumerate(files))) == ["changed", b"two"]
    assert read(another_try(0, files[0])) == [b"ONE"]


def test_a_file_that_is_gone(put: Put) -> None:
    there = put("a", b"one")
    gone = replace(there, url=f"{there.url}-gone")
    assert read(planned(0, gone), planned(1, there)) == ["missing", b"one"]
    assert read(planned(0, gone)) == ["missing"]


def test_a_disk_that_is_not_mounted(tmp_path: Path) -> None:
    """Files that were deleted leave their neighbours, or at least their folder."""
    inputs = [PlannedInput(row, f"file://{tmp_path}/disk/{row}.jpg", 3, "1") for row in range(20)]
    with pytest.raises(ObjectMissingError, match="plan what is left: --new-plan"):
        read(*inputs)
    (tmp_path / "disk").mkdir()
    with pytest.raises(ObjectMissingError, match="plan what is left: --new-plan"):
        read(*inputs)
    (tmp_path / "disk" / "other.jpg").write_bytes(b"x")
    assert read(*inputs) == ["missing"] * 20


# ----------------------------------------------------------------------------------------
# what a store refuses


Refusal = Callable[[str, str], int | None]  # (method, path) -> status to answer with


@pytest.fixture
def refuse(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Refusal], None]]:
    """A function that sets which requests the store refuses."""
    ask = killing_proxy._Exchange._ask
    refusals: list[Refusal] = []

    def ask_or_refuse(exchange: killing_proxy._Exchange, head: bytes, body: bytes) -> bytes:
        method, target, _ = head.decode("latin-1").split(" ", 2)
        for refusal in refusals:
            if (status := refusal(method, target)) is not None:
                code = b"AccessDenied" if status == 403 else b"InternalError"
                error = b"<Error><Code>%s</Code></Error>" % code
                length = len(error) if method != "HEAD" else 0
                head = b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n" % (status, length)
                return head + b"Connection: close\r\n\r\n" + error[:length]
        return ask(exchange, head, body)

    monkeypatch.setattr(killing_proxy._Exchange, "_ask", ask_or_refuse)
    with KillingProxy(s3.url, lambda write, moment: False) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield refusals.append


@pytest.fixture
def objects(s3_url: str) -> list[PlannedInput]:
    store = open_store(s3_url)
    for number in range(4):
        store.put_if_absent(f"{number}", b"%d" % number)
    files = [find_file(f"{s3_url}/{number}") for number in range(4)]
    return [planned(row, file) for row, file in enumerate(files) if file is not None]


@pytest.mark.parametrize("status", [403, 500])
def test_an_object_that_the_store_will_not_hand_out(
    objects: list[PlannedInput], refuse: Callable[[Refusal], None], status: int
) -> None:
    refuse(lambda method, path: status if path.endswith("/0") else None)
    reason = "access denied" if status == 403 else "unreadable"
    assert read(*objects) == [reason, b"1", b"2", b"3"]


def test_one_denied_object_alone_in_its_unit(
    objects: list[PlannedInput], refuse: Callable[[Refusal], None]
) -> None:
    """Its neighbours, which other units hold, vouch for the store."""
    refuse(lambda method, path: 403 if path.endswith("/0") else None)
    assert read(objects[0]) == ["access denied"]


@pytest.mark.parametrize("unit", [slice(0, 1), slice(0, 4)])
def test_a_store_that_denies_everything(
    objects: list[PlannedInput], refuse: Callable[[Refusal], None], unit: slice
) -> None:
    """… although the folder can be listed: a key without the right to read is no reject."""
    refuse(lambda method, path: None if "list-type" in path else 403)
    with pytest.raises(AccessDeniedError, match="Neither can anything else there be read"):
        read(*objects[unit])


# ----------------------------------------------------------------------------------------
# tars


def test_tars_that_are_gone_or_changed_are_one_reject(put: Put) -> None:
    tars = [put(name, make_tar([("1.jpg", name.encode())])) for name in ("a.tar", "b.tar", "c.tar")]
    put("b.tar", make_tar([("1.jpg", b"B")]))
    gone = replace(tars[0], url=tars[0].url.replace("a.tar", "z.tar"))
    inputs = [planned(100 * row, file) for row, file in enumerate((gone, *tars[1:]))]
    assert read(*inputs, kind="tars") == ["missing", "changed", b"c.tar"]


def test_a_tar_that_is_denied(s3_url: str, refuse: Callable[[Refusal], None]) -> None:
    store = open_store(s3_url)
    for name in ("a.tar", "b.tar"):
        store.put_if_absent(name, make_tar([("1.jpg", name.encode())]))
    files = [find_file(f"{s3_url}/{name}") for name in ("a.tar", "b.tar")]
    tars = [planned(100 * row, file) for row, file in enumerate(files) if file is not None]
    refuse(lambda method, path: 403 if path.endswith("/a.tar") else None)
    assert read(*tars, kind="tars") == ["access denied", b"b.tar"]
    refuse(lambda method, path: 403)
    with pytest.raises(AccessDeniedError):
        read(*tars, kind="tars")


def test_a_store_that_fails_on_a_tar_ends_the_job(
    s3_url: str, refuse: Callable[[Refusal], None]
) -> None:
    """It may pass, and a tar is too much to lose."""
    open_store(s3_url).put_if_absent("a.tar", make_tar([("1.jpg", b"a")]))
    file = find_file(f"{s3_url}/a.tar")
    assert file is not None
    refuse(lambda method, path: 500 if path.endswith("/a.tar") else None)
    with pytest.raises(StoreError):
        read(planned(0, file), kind="tars")
