"""Every write to the store is a point to die at: before it, and after the server has done it.

A real command on a real S3 server, through a proxy that counts its writes and ends the whole
process group at the n-th. What a reader finds then is the version from before, or the finished one
if its commit was answered, never half of one. The same command again ends well, with the same bytes
as without the kill.
"""

import contextlib
import hashlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import AccessDeniedError
from pipeline.manifest import latest_version, read_snapshot
from pipeline.store import Store, open_store, resolve
from shard_tools.commits import read_unit_commit
from shard_tools.indexes import read_indexes
from shard_tools.plan import list_plans, read_plan
from shard_tools.verify import ShardTask, verify_shard
from tests.shard_tools.conftest import (
    ROOT,
    command,
    shard_tools,
    spawn_shard_tools,
    write_images,
)
from tests.shard_tools.test_kill import assert_end, children
from tests.shard_tools.test_tars import make_tar
from tests.support.killing_proxy import KillingProxy, Moment, Write
from tests.support.s3_server import S3Server

LIMIT_S = 120
AT_ONCE = 3  # kill points that are tried side by side


# ----------------------------------------------------------------------------------------
# what is there to be seen


@dataclass(frozen=True)
class Shard:
    """SHA-256 of what a version's shard consists of."""

    tar: str
    index: str
    mask: str | None


@dataclass(frozen=True)
class Seen:
    """What readers find: the newest version (0: none) and its shards."""

    version: int
    shards: tuple[Shard, ...] = ()


def look(store: Store) -> Seen:
    """Read the newest version whole; what is missing or not as its snapshot says is an error."""
    if not latest_version(store):
        return Seen(0)
    snapshot = read_snapshot(store)
    for row in snapshot.table.to_pylist():
        verdict = verify_shard(ShardTask(dataset=store.url, quick=True, **row))
        assert verdict.problem is None
    columns = zip(snapshot.tar, snapshot.index, snapshot.mask, strict=True)
    shards = [
        Shard(digest(store, t), digest(store, i), m and digest(store, m)) for t, i, m in columns
    ]
    return Seen(snapshot.version, tuple(shards))


def digest(store: Store, key_or_url: str) -> str:
    where, key = resolve(store, key_or_url)
    return hashlib.sha256(where.get(key)).hexdigest()


def assert_commits_are_whole(store: Store, seen: Seen) -> None:
    """A committed unit is one of the undisturbed job's shards, even before anybody sees it."""
    for name in list_plans(store):
        for unit in range(read_plan(store, name).num_units):
            done = read_unit_commit(store, name, unit)
            if done is not None:
                found = Shard(digest(store, done.tar), digest(store, done.index), None)
                assert found in [replace(shard, mask=None) for shard in seen.shards]


# ----------------------------------------------------------------------------------------
# commands that die


class Killer:
    """A strike that ends the victim's process group at a write, counted at one moment.

    `num_writes` are those seen up to there; `number` 0 lets it live.
    """

    def __init__(self, moment: Moment, number: int) -> None:
        self.victim: Future[subprocess.Popen[bytes]] = Future()
        self.num_writes = 0
        self.has_struck = False
        self._moment, self._number = moment, number
        self._lock = threading.Lock()  # what comes while the victim dies has never been sent

    def __call__(self, write: Write, moment: Moment) -> bool:
        with self._lock:
            if moment is self._moment and not self.has_struck:
                self.num_writes += 1
                if self.num_writes == self._number:
                    self.has_struck = True
                    end_group(self.victim.result(LIMIT_S))
            return self.has_struck


def end_group(leader: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process group; wait until all of it is gone."""
    os.killpg(leader.pid, signal.SIGKILL)
    leader.wait(LIMIT_S)
    assert_end(group_of(leader))


def group_of(leader: subprocess.Popen[bytes]) -> list[int]:
    def is_member(pid: int) -> bool:
        with contextlib.suppress(ProcessLookupError):
            return os.getpgid(pid) == leader.pid
        return False

    names = [path.name for path in Path("/proc").iterdir()]
    return [pid for pid in map(int, filter(str.isdecimal, names)) if is_member(pid)]


@contextlib.contextmanager
def started(endpoint: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that finds its store at `endpoint`; at the end of the context all of it is gone."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env={**os.environ, "AWS_ENDPOINT_URL": endpoint},
        stdout=subprocess.DEVNULL,  # stderr is shown if the test fails
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            end_group(process)
        assert_end(group_of(process))


def run_behind_proxy(s3: S3Server, killer: "Killer | WorkerKiller", *arguments: str) -> int:
    """The exit code of a command whose writes the killer sees."""
    with KillingProxy(s3.url, killer) as proxy, started(proxy.url, *arguments) as process:
        killer.victim.set_result(process)
        return process.wait(LIMIT_S)


# ----------------------------------------------------------------------------------------
# every write of a command


@dataclass(frozen=True)
class Job:
    """A command, as a function of its data set's URL; `begin` makes what is there before it."""

    arguments: Callable[[str], tuple[str, ...]]
    begin: Callable[[Store], None] = lambda store: None
    code_if_done: int = 0  # of another run when everything is done


@dataclass(frozen=True)
class Undisturbed:
    """A job that nobody has killed."""

    job: Job
    store: Store
    num_writes: int
    before: Seen
    after: Seen


def fresh_store() -> Store:
    return open_store(f"s3://cropstream/{uuid.uuid4().hex[:12]}")


def run_undisturbed(s3: S3Server, job: Job) -> Undisturbed:
    store, counter = fresh_store(), Killer(Moment.ARRIVED, 0)
    job.begin(store)
    before = look(store)
    assert run_behind_proxy(s3, counter, *job.arguments(store.url)) == 0
    return Undisturbed(job, store, counter.num_writes, before, look(store))


def kill_everywhere(s3: S3Server, calm: Undisturbed) -> None:
    """Kill the job before and after each of its writes, each time on a data set of its own."""
    points = list(itertools.product(Moment, range(1, calm.num_writes + 1)))
    points += [(Moment.ARRIVED, calm.num_writes + 1)]  # there is no such write
    with ThreadPoolExecutor(AT_ONCE) as tries:
        for _ in tries.map(lambda point: kill_and_run_again(s3, calm, *point), points):
            pass


def kill_and_run_again(s3: S3Server, calm: Undisturbed, moment: Moment, number: int) -> None:
    point = f"{moment.name} {number} of {calm.num_writes}"
    store, killer = fresh_store(), Killer(moment, number)
    calm.job.begin(store)
    arguments = calm.job.arguments(store.url)
    code = run_behind_proxy(s3, killer, *arguments)
    assert killer.has_struck == (number <= calm.num_writes), point
    assert code == (-signal.SIGKILL if killer.has_struck else 0), point
    # The version is the last write: it is not there before, and there is nothing to do after it.
    is_done = not killer.has_struck or (moment, number) == (Moment.ANSWERED, calm.num_writes)
    assert look(store) == (calm.after if is_done else calm.before), point
    assert_commits_are_whole(store, calm.after)
    again = spawn_shard_tools(*arguments)
    assert again.code == (calm.job.code_if_done if is_done else 0), point + again.err
    assert look(store) == calm.after, point


def test_the_server_checks_signatures_behind_the_proxy(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, counter = fresh_store().url, Killer(Moment.ANSWERED, 0)
    with KillingProxy(s3.url, counter) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert open_store(url).put_if_absent("key", b"body")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        with pytest.raises(AccessDeniedError):
            open_store(url).put_if_absent("other", b"body")
    assert counter.num_writes == 2


# ----------------------------------------------------------------------------------------
# pack


def write_large_images(folder: Path, count: int) -> None:
    """Noise, which no format makes smaller: three of them need a multipart upload."""
    folder.mkdir()
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (1024, 1024, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png", compress_level=0)


def pack_job(source: Path, *, workers: int) -> Job:
    settings = ("--shard-rows", "3", "--workers", str(workers))
    return Job(lambda dataset: ("pack", str(source), dataset, *settings))


def assert_sound(store: Store, source: Path) -> None:
    """Every input has one row that counts, and verify agrees."""
    snapshot = read_snapshot(store)
    indexes = read_indexes(store, snapshot)
    counting = [rows.table["source"].filter(rows.has_bit).to_pylist() for rows in indexes]
    files = [path for path in source.rglob("*") if path.is_file()]
    assert Counter(itertools.chain(*counting)) == Counter(f"file://{path}" for path in files)
    assert shard_tools("verify", store.url).code == 0


@pytest.fixture(scope="module")
def six_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of three images, the first of them large enough for a multipart upload."""
    folder = tmp_path_factory.mktemp("six")
    write_large_images(folder / "a", 3)
    write_images(folder, 3)
    return folder


@pytest.fixture(scope="module")
def calm_pack(s3: S3Server, six_images: Path) -> Undisturbed:
    """The job whose writes are tried: what it wants to be every time."""
    calm = run_undisturbed(s3, pack_job(six_images, workers=1))
    assert_sound(calm.store, six_images)
    return calm


def test_pack_is_killed_at_every_write(s3: S3Server, calm_pack: Undisturbed) -> None:
    # 3 prove the store, 2 units, the plan; tar, index, commit of each, a tar in 4; the snapshot.
    assert calm_pack.num_writes == 3 + 2 + 1 + (4 + 2) + (1 + 2) + 1
    kill_everywhere(s3, calm_pack)


# ----------------------------------------------------------------------------------------
# other ways for a packer to be disturbed


class WorkerKiller:
    """A strike that ends the one worker, never its parent, at every kind of write of a unit.

    Of unit 0 at the first write of its tar, index and commit, of unit 1 once each is answered.
    """

    def __init__(self) -> None:
        self.victim: Future[subprocess.Popen[bytes]] = Future()
        self.done: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def __call__(self, write: Write, moment: Moment) -> bool:
        found = re.search(r"[-/](0000000[01])(?:-[0-9a-f]+)?\.(tar|parquet|json)", write.target)
        if found is None or "/plans/" in write.target:
            return False
        unit, kind = found.groups()
        with self._lock:
            if int(unit) != (moment is Moment.ANSWERED) or (unit, kind) in self.done:
                return False
            self.done.add((unit, kind))
            end_workers(self.victim.result(LIMIT_S))
            return True


def end_workers(packer: subprocess.Popen[bytes]) -> None:
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(packer.pid)}
    workers = [pid for pid, line in commands.items() if b"spawn_main" in line]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert_end(workers)


def test_workers_are_killed_at_their_writes(s3: S3Server, calm_pack: Undisturbed) -> None:
    store, killer = fresh_store(), WorkerKiller()
    assert run_behind_proxy(s3, killer, *calm_pack.job.arguments(store.url)) == 0
    assert len(killer.done) == 6
    assert look(store) == calm_pack.after


def test_pack_is_killed_at_random(s3: S3Server, calm_pack: Undisturbed) -> None:
    store, dice = fresh_store(), random.Random(3)
    arguments = calm_pack.job.arguments(store.url)
    for _ in range(4):
        with started(s3.url, *arguments) as packer, contextlib.suppress(subprocess.TimeoutExpired):
            packer.wait(dice.uniform(0.5, 2.0))
        assert look(store) in (calm_pack.before, calm_pack.after)
    assert spawn_shard_tools(*arguments).code == 0
    assert look(store) == calm_pack.after


class Meeting:
    """A strike that holds every unit's commit until both packers have sent theirs."""

    def __init__(self) -> None:
        self.num_commits: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._barriers: dict[str, threading.Barrier] = {}

    def __call__(self, write: Write, moment: Moment) -> bool:
        if moment is Moment.ARRIVED and "/commits/" in write.target:
            with self._lock:
                self.num_commits[write.target] += 1
                barrier = self._barriers.setdefault(write.target, threading.Barrier(2))
            barrier.wait(LIMIT_S)
        return False


def test_two_packers_race_on_every_unit(
    s3: S3Server, calm_pack: Undisturbed, six_images: Path
) -> None:
    store, meeting = fresh_store(), Meeting()
    # As many workers as units: wherever a packer begins, it comes to every commit.
    assert shard_tools("plan", str(six_images), store.url, "--shard-rows", "3").code == 0
    arguments = ("pack", store.url, "--seal", "--workers", "2")
    with (
        KillingProxy(s3.url, meeting) as proxy,
        started(proxy.url, *arguments) as one,
        started(proxy.url, *arguments) as other,
    ):
        assert [one.wait(LIMIT_S), other.wait(LIMIT_S)] == [0, 0]
    assert list(meeting.num_commits.values()) == [2, 2]
    assert look(store) == calm_pack.after
    # Who lost a commit has removed what it wrote.
    snapshot = read_snapshot(store)
    assert {info.key for info in store.list("data")} == {*snapshot.tar, *snapshot.index}


@pytest.mark.slow
def test_a_larger_pack_is_killed_at_every_write(s3: S3Server, tmp_path: Path) -> None:
    write_images(tmp_path, 12)
    calm = run_undisturbed(s3, pack_job(tmp_path, workers=2))
    assert_sound(calm.store, tmp_path)
    kill_everywhere(s3, calm)


# ----------------------------------------------------------------------------------------
# the other commands that write more than once


def copied(source: Store) -> Callable[[Store], None]:
    """What makes a data set that is a copy of `source`."""

    def copy(target: Store) -> None:
        for info in source.list():
            target.put_if_absent(info.key, source.get(info.key))

    return copy


def test_mask_is_killed_at_every_write(s3: S3Server, tmp_path: Path) -> None:
    write_images(tmp_path / "in", 6)
    packed = fresh_store()
    assert shard_tools("pack", str(tmp_path / "in"), packed.url, "--shard-rows", "3").code == 0
    # Run again when its version is there, it finds nothing to change and makes no other.
    job = Job(lambda dataset: ("mask", dataset, "--where", "label <> 'chelsea'"), copied(packed))
    calm = run_undisturbed(s3, job)
    assert (calm.before.version, calm.after.version) == (1, 2)
    assert calm.num_writes == 2 + 1  # the masks, the snapshot
    kill_everywhere(s3, calm)


@pytest.mark.slow
def test_retry_is_killed_at_every_write(s3: S3Server, tmp_path: Path) -> None:
    write_images(tmp_path, 6)
    late = tmp_path / "coffee" / "late.jpg"
    late.touch()
    packed = fresh_store()
    assert shard_tools("pack", str(tmp_path), packed.url, "--shard-rows", "4").code == 0
    shutil.copy(next(tmp_path.glob("*/0*.jpg")), late)
    # Run again when its version is there, it says that nothing is left to be tried, which is usage.
    job = Job(
        lambda dataset: ("retry", dataset, "--reason", "not an image", "--workers", "1"),
        copied(packed),
        code_if_done=2,
    )
    calm = run_undisturbed(s3, job)
    assert (calm.before.version, calm.after.version) == (1, 2)
    assert calm.num_writes == 3 + 1 + 1 + 3 + 1 + 1  # …, the old reject's mask, the snapshot
    assert_sound(calm.store, tmp_path)
    kill_everywhere(s3, calm)


@pytest.mark.slow
def test_adopt_is_killed_at_every_write(s3: S3Server, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 6)
    files = [(path.name, path.read_bytes()) for path in (tmp_path / "images").glob("*/*")]
    (tmp_path / "theirs").mkdir()
    for name, members in (("a.tar", files[:3]), ("b.tar", files[3:])):
        (tmp_path / "theirs" / name).write_bytes(make_tar(members))
    theirs = f"{tmp_path}/theirs"
    calm = run_undisturbed(s3, Job(lambda dataset: ("adopt", theirs, dataset, "--workers", "1")))
    assert calm.num_writes == 3 + 2 + 1 + 2 * 2 + 1  # as of pack, but no tar
    assert shard_tools("verify", calm.store.url).code == 0
    kill_everywhere(s3, calm)
