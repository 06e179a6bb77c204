"""One store, two backends: a real S3 server and a local directory must keep the same promises."""

import asyncio
import os
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.session
import pytest
from botocore.config import Config

from pipeline.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectMissingError,
    StoreError,
    ThrottledError,
    UsageError,
)
from pipeline.store import (
    PART_BYTES,
    ObjectWriter,
    Store,
    find_file,
    list_files,
    open_file,
    open_store,
    open_stream,
    read_file,
    resolve,
    source_errors,
)
from tests.support.fault_proxy import FaultProxy, Kind, Rule
from tests.support.http_server import HttpServer, Page
from tests.support.s3_server import S3Server


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_url"))
    return open_store(f"file://{tmp_path}/not/there yet")


@pytest.fixture
def bucket_store(s3_url: str) -> Store:
    return open_store(s3_url)


def keys(store: Store, prefix: str = "") -> set[str]:
    return {info.key for info in store.list(prefix)}


def pending_uploads(s3: S3Server, key_part: str) -> list[str]:
    """Multipart uploads that were begun and neither completed nor aborted."""
    client = botocore.session.Session().create_client(
        "s3", endpoint_url=s3.url, config=Config(s3={"addressing_style": "path"})
    )
    uploads = client.list_multipart_uploads(Bucket="cropstream").get("Uploads", [])
    client.close()
    return [upload["Key"] for upload in uploads if key_part in upload["Key"]]


def test_objects_come_back(store: Store) -> None:
    assert store.put_if_absent("a/b c+d%20é.bin", b"0123456789")
    assert store.get("a/b c+d%20é.bin") == b"0123456789"
    assert store.get_range("a/b c+d%20é.bin", 3, 4) == b"3456"
    assert store.get_range("a/b c+d%20é.bin", 3, 0) == b""
    info = store.head("a/b c+d%20é.bin")
    assert info is not None
    assert (info.key, info.size_bytes) == ("a/b c+d%20é.bin", 10)
    assert abs(info.modified.timestamp() - time.time()) < 60


def test_the_first_put_wins(store: Store) -> None:
    assert store.put_if_absent("key", b"first")
    assert not store.put_if_absent("key", b"second")
    assert store.get("key") == b"first"


def test_one_of_many_contenders_wins(store: Store) -> None:
    barrier = threading.Barrier(12)

    def contend(number: int) -> bool:
        barrier.wait()
        return store.put_if_absent("key", b"%d" % number)

    with ThreadPoolExecutor(12) as threads:
        wins = list(threads.map(contend, range(12)))
    assert wins.count(True) == 1
    assert store.get("key") == b"%d" % wins.index(True)


def test_list_and_delete(store: Store) -> None:
    for key in ("a/1", "a/2", "ab/3", "c"):
        store.put_if_absent(key, b"x")
    assert keys(store) == {"a/1", "a/2", "ab/3", "c"}
    assert keys(store, "a") == {"a/1", "a/2"}
    assert keys(store, "nothing") == set()
    store.delete("a/1")
    store.delete("a/1")
    assert keys(store, "a") == {"a/2"}
    assert store.head("a/1") is None


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, 2 * PART_BYTES + 3])
def test_writer(store: Store, size: int) -> None:
    body = os.urandom(size)
    with store.writer("w/object") as writer:
        for start in range(0, size, 1_000_003):
            writer.write(body[start : start + 1_000_003])
        assert store.head("w/object") is None
    assert writer.info.size_bytes == writer.size_bytes == size
    assert store.get("w/object") == body


@pytest.mark.parametrize("size", [1, 2 * PART_BYTES + 3])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_failed_writer_leaves_nothing(
    store: Store, s3: S3Server, size: int, error: type[BaseException]
) -> None:
    def write_and_fail() -> None:
        with store.writer("failed/object") as writer:
            writer.write(bytes(size))
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert store.head("failed/object") is None
    assert keys(store) == set()
    assert pending_uploads(s3, f"{store.url.rpartition('/')[2]}/failed") == []


def test_errors_of_the_body_stay_what_they_are(store: Store) -> None:
    with pytest.raises(FileNotFoundError), store.writer("key"):
        raise FileNotFoundError("of the caller's own")


def test_reader(store: Store) -> None:
    body = os.urandom(PART_BYTES + 5000)
    with store.writer("object") as writer:
        writer.write(body)
    reader = store.reader("object", len(body), tag=writer.info.tag)
    assert reader.read(10) == body[:10]
    assert reader.read(PART_BYTES) == body[10 : PART_BYTES + 10]
    assert reader.read(PART_BYTES) == body[PART_BYTES + 10 :]
    assert reader.read(1) == b""


def test_reader_that_skips(store: Store) -> None:
    body = os.urandom(3 * PART_BYTES + 5000)
    with store.writer("object") as writer:
        writer.write(body)
    reader = store.reader("object", len(body), tag=writer.info.tag)
    position = 0
    for skipped, length in [(0, 10), (100, 7), (PART_BYTES, 3), (PART_BYTES + 1, 70_000), (0, 9)]:
        reader.skip(skipped)
        position += skipped
        assert reader.read(length) == body[position : position + length]
        position += length
    reader.skip(len(body))
    assert reader.read(1) == b""


def test_missing(store: Store) -> None:
    assert store.head("no") is None
    with pytest.raises(
        ObjectMissingError, match=r"cannot read .*/no: .*no such object.*restore it"
    ):
        store.get("no")
    with pytest.raises(ObjectMissingError):
        store.get_range("no", 0, 1)


def test_a_missing_bucket(s3: S3Server) -> None:
    store = open_store("s3://no-such-bucket/prefix")
    assert store.head("key") is None
    with pytest.raises(ObjectMissingError, match="there is no such bucket"):
        store.get("key")


@pytest.mark.parametrize("start", [5, 10, 50])
def test_too_short(store: Store, start: int) -> None:
    store.put_if_absent("key", b"0123456789")
    with pytest.raises(
        ObjectChangedError, match=r"/key .*restore it.* shard_tools verify"
    ) as caught:
        store.get_range("key", start, 10)
    assert "AWS" not in str(caught.value)


def test_tags(bucket_store: Store) -> None:
    bucket_store.put_if_absent("key", b"0123456789")
    info = bucket_store.head("key")
    assert info is not None
    assert bucket_store.get_range("key", 0, 4, tag=info.tag) == b"0123"
    bucket_store.delete("key")
    bucket_store.put_if_absent("key", b"9876543210")
    with pytest.raises(ObjectChangedError, match="/key"):
        bucket_store.get_range("key", 0, 4, tag=info.tag)


def test_resolve(store: Store) -> None:
    store.put_if_absent("folder/key", b"x")
    assert resolve(store, "folder/key") == (store, "folder/key")
    elsewhere, key = resolve(open_store("/"), store.url_of("folder/key"))
    assert elsewhere.get(key) == b"x"


def test_pickle(store: Store) -> None:
    store.put_if_absent("key", b"x")
    assert pickle.loads(pickle.dumps(store)).get("key") == b"x"


def test_opening_creates_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "typo")
    assert store.url == f"file://{tmp_path}/typo"
    assert list(store.list()) == []
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("url", ["s3://AKIA:hush@bucket/x", "https://me:hush@host/x"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="must not hold credentials") as refusal:
        open_store(url)
    assert "hush" not in str(refusal.value)


@pytest.mark.parametrize("url", ["http://host/x", "s3://", "s3:///x", "gs://b/p", "file://x/y"])
def test_no_store(url: str) -> None:
    with pytest.raises(UsageError, match="is no store"):
        open_store(url)


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_store("data/../set").put_if_absent("key", b"x")
    assert (tmp_path / "set" / "key").read_bytes() == b"x"


def test_unfinished_writes(store: Store) -> None:
    def begin(key: str) -> ObjectWriter:
        writer = store.writer(key)
        writer.__enter__()
        writer.write(bytes(6 * PART_BYTES))
        return writer

    store.put_if_absent("a/whole", b"x")
    writers = [begin("a/one"), begin("b/two")]
    while len(found := {write.key: write for write in store.unfinished()}) < 2:
        time.sleep(0.01)
    assert set(found) == {"a/one", "b/two"}
    assert all(abs(write.begun.timestamp() - time.time()) < 60 for write in found.values())
    store.abort(found["a/one"])
    store.abort(found["a/one"])
    assert {write.key for write in store.unfinished()} == {"b/two"}
    assert keys(store) == {"a/whole"}
    for writer in writers:
        writer.__exit__(KeyError, KeyError(), None)
    assert list(store.unfinished()) == []


# ----------------------------------------------------------------------------------------
# what goes wrong


@pytest.fixture
def wrong_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    return s3_url


def test_wrong_credentials(wrong_credentials: str) -> None:
    store = open_store(wrong_credentials)
    attempts = [
        lambda: store.get("key"),
        lambda: store.head("key"),
        lambda: store.put_if_absent("key", b"x"),
        lambda: list(store.list()),
        lambda: list(list_files(wrong_credentials)),
        lambda: read_file(f"{wrong_credentials}/key"),
    ]
    for attempt in attempts:
        with pytest.raises(AccessDeniedError, match="check AWS_ACCESS_KEY_ID") as caught:
            attempt()
        assert wrong_credentials in str(caught.value)
        assert "\n" not in str(caught.value)
        assert os.environ["AWS_ACCESS_KEY_ID"] not in str(caught.value)
    with pytest.raises(AccessDeniedError), store.writer("key") as writer:
        writer.write(b"x")


def test_no_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDeniedError, match="no AWS credentials found"):
        open_store(s3_url)


def test_unknown_profile(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UsageError, match="nobody"):
        open_store(s3_url)


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_nobody_listens(s3_url: str, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    started = time.monotonic()
    for attempt in (lambda: open_store(s3_url).get("key"), lambda: list(list_files(s3_url))):
        with pytest.raises(StoreError, match="AWS_ENDPOINT_URL") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 15


def test_an_awkward_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for store in (open_store(tmp_path / "file"), open_store(tmp_path / "file" / "below")):
        for attempt in (lambda s: s.put_if_absent("key", b"x"), lambda s: s.head("key")):
            with pytest.raises(StoreError, match=r"/file is a file.*name the folder") as caught:
                attempt(store)
            assert "AWS" not in str(caught.value)
    with pytest.raises(StoreError, match="cannot write"), open_store(tmp_path / "file").writer("k"):
        pass


def test_settings_from_files(s3: S3Server, s3_url: str, tmp_path: Path) -> None:
    """A profile of ~/.aws with its own endpoint is as good as the environment."""
    access, secret = s3.environment["AWS_ACCESS_KEY_ID"], s3.environment["AWS_SECRET_ACCESS_KEY"]
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n"
    )
    (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-x\nendpoint_url = {s3.url}\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in s3.environment:
            patch.delenv(name)
        patch.setenv("AWS_PROFILE", "lab")
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        assert open_store(s3_url).put_if_absent("key", b"x")
        assert [file.path for file in list_files(s3_url)] == ["key"]


# ----------------------------------------------------------------------------------------
# sources


def test_sources(store: Store) -> None:
    for key in ("a/1.jpg", "a/b/2.jpg", "3 %20é.jpg"):
        store.put_if_absent(key, key.encode())
    files = {file.path: file for file in list_files(store.url)}
    assert set(files) == {"a/1.jpg", "a/b/2.jpg", "3 %20é.jpg"}
    for path, file in files.items():
        assert read_file(file.url) == path.encode()
        assert file.size_bytes == len(path.encode())
        assert file.tag


def test_awkward_s3_keys(s3: S3Server, s3_url: str) -> None:
    """Keys that are no paths: other tools write them, a source may hold them."""
    client = botocore.session.Session().create_client(
        "s3", endpoint_url=s3.url, config=Config(s3={"addressing_style": "path"})
    )
    prefix = s3_url.removeprefix("s3://cropstream/")
    for name in ("a b+c%20é#?.jpg", "x.y.z/..jpg", "folder/"):
        client.put_object(Bucket="cropstream", Key=f"{prefix}/{name}", Body=name.encode())
    client.close()
    files = {file.path: file for file in list_files(s3_url)}
    assert set(files) == {"a b+c%20é#?.jpg", "x.y.z/..jpg"}
    for path, file in files.items():
        assert read_file(file.url) == path.encode()


def test_a_listing_of_several_pages(bucket_store: Store) -> None:
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda n: bucket_store.put_if_absent(f"f/{n}", b""), range(1100)))
    assert len(list(list_files(f"{bucket_store.url}/f/"))) == 1100
    assert len(keys(bucket_store)) == 1100


def test_other_filesystems() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/images/a/1.jpg", b"one")
    memory.pipe("/images/2.jpg", b"two!")
    files = sorted(list_files("memory://images"), key=lambda file: file.path)
    assert [(f.path, f.size_bytes) for f in files] == [("2.jpg", 4), ("a/1.jpg", 3)]
    assert [read_file(f.url) for f in files] == [b"two!", b"one"]


@pytest.mark.parametrize("kind", ["file", "s3", "memory", "awkward"])
def test_streams(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One file of any store, read forward; an S3 key that is no path, too."""
    import fsspec

    body = os.urandom(100_000)
    if kind == "memory":
        fsspec.filesystem("memory").pipe("/streams/x", body)
        url = "memory://streams/x"
    else:
        folder = str(tmp_path) if kind == "file" else str(request.getfixturevalue("s3_url"))
        url = f"{folder}/x"
        with open_store(folder).writer("x") as writer:
            writer.write(body)
    if kind == "awkward":
        url = copy_to_awkward_key(request.getfixturevalue("s3"), url)
    file = find_file(url)
    assert file is not None
    with open_stream(url, file.size_bytes, tag=file.tag) as stream:
        assert stream.read(10) == body[:10]
        stream.skip(50_000)
        assert stream.read(10) == body[50_010:50_020]
        assert stream.read(10**6) == body[50_020:]
        assert stream.read(1) == b""


def copy_to_awkward_key(s3: S3Server, url: str) -> str:
    client = botocore.session.Session().create_client(
        "s3", endpoint_url=s3.url, config=Config(s3={"addressing_style": "path"})
    )
    key = url.removeprefix("s3://cropstream/")
    client.copy_object(Bucket="cropstream", Key=f"{key}#?.y/z", CopySource=f"cropstream/{key}")
    client.close()
    return f"{url}#?.y/z"


def test_a_stream_of_nothing(store: Store) -> None:
    url = store.url_of("nothing")
    with open_stream(url, 5) as stream, pytest.raises(ObjectMissingError, match="nothing"):
        stream.read(1)


def test_names_that_fsspec_would_take_for_a_chain(tmp_path: Path) -> None:
    (tmp_path / "a::b").mkdir()
    (tmp_path / "a::b" / "x::y.jpg").write_bytes(b"x")
    [file] = list_files(f"file://{tmp_path}/a::b")
    assert (file.path, read_file(file.url)) == ("x::y.jpg", b"x")


def test_a_local_file_that_cannot_be_read() -> None:
    """Reading our own memory at address 0 fails with EIO, for root too."""
    with pytest.raises(StoreError, match="check the path") as caught:
        read_file("file:///proc/self/mem")
    assert "AWS" not in str(caught.value)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.jpg").write_bytes(b"x")
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "root" / "a" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "broken").symlink_to(tmp_path / "nothing")
    assert [file.path for file in list_files(str(tmp_path / "root"))] == ["a/link/1.jpg"]


@pytest.mark.parametrize("url", ["nothing/here", "s3://no-such-bucket-here/x", "blah://x"])
def test_missing_sources(s3: S3Server, url: str) -> None:
    with pytest.raises((ObjectMissingError, UsageError), match=r"cannot list .*(here|blah)"):
        list(list_files(url))


def test_a_prefix_without_objects_is_empty(s3_url: str) -> None:
    assert list(list_files(s3_url)) == []


def read_opened(url: str) -> bytes:
    with source_errors("read", url), open_file(url) as file:
        return file.read()


@pytest.mark.parametrize(
    "page", [Page(status=503), Page(hang_up=True), Page(b"x", length=9), Page(status=404)]
)
def test_a_web_server_that_fails(page: Page) -> None:
    """One of our errors, without what is secret in the URL."""
    with HttpServer({"/a.csv": page}) as web:
        url = web.url("/a.csv?token=hunter2").replace("//", "//me:hunter3@")
        for read in (read_file, read_opened):
            with pytest.raises(StoreError) as told:
                read(url)
            assert "hunter" not in str(told.value)
            assert f"127.0.0.1:{web.port}/a.csv" in str(told.value)


def stream(store: Store, start: int, length: int, tag: str | None = None) -> list[bytes]:
    async def collect() -> list[bytes]:
        return [part async for part in store.stream_range("key", start, length, tag=tag)]

    return asyncio.run(collect())


def test_streamed_ranges(store: Store) -> None:
    body = os.urandom(2**20)
    store.put_if_absent("key", body)
    parts = stream(store, 5, 900_000)
    assert b"".join(parts) == body[5:900_005]
    assert store.is_local == (len(parts) == 1)
    for start in (2**20 - 5, 2**20, 2**20 + 5):
        with pytest.raises(ObjectChangedError, match=r"/key .*restore it.* shard_tools verify"):
            stream(store, start, 10)
    store.delete("key")
    with pytest.raises(ObjectMissingError, match="/key"):
        stream(store, 0, 10)


def test_streamed_ranges_check_the_tag(bucket_store: Store) -> None:
    bucket_store.put_if_absent("key", b"0123456789")
    info = bucket_store.head("key")
    assert info is not None
    assert stream(bucket_store, 2, 3, info.tag) == [b"234"]
    with pytest.raises(ObjectChangedError, match="recorded"):
        stream(bucket_store, 2, 3, '"another"')


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        (Rule(kind=Kind.REFUSE, status=503), ThrottledError),
        (Rule(kind=Kind.REFUSE, status=429), ThrottledError),
        (Rule(kind=Kind.REFUSE, status=500), StoreError),
        (Rule(kind=Kind.RESET), StoreError),
        (Rule(kind=Kind.CUT, after_bytes=300_000), StoreError),
    ],
)
def test_streamed_ranges_are_asked_for_once(
    s3: S3Server,
    bucket_store: Store,
    rule: Rule,
    error: type[StoreError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket_store.put_if_absent("key", bytes(10**6))
    with FaultProxy(s3.url, [rule]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StoreError) as caught:
            stream(open_store(bucket_store.url), 0, 10**6)
    assert type(caught.value) is error
    assert len(proxy.exchanges) == 1
