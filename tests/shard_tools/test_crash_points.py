"""Every write to the store is a point to die at: before it, and after the server has done it.

A real command on a real S3 server, through a proxy that counts its writes and ends the whole
process group at the n-th. What a reader finds then is the version from before or the finished one,
never half of one; the same command again ends well, with the same bytes as without the kill.
"""

import hashlib
import os
import subprocess
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.manifest import latest_version, read_snapshot
from pipeline.store import Store, resolve
from shard_tools.commits import read_unit_commit
from shard_tools.plan import list_plans, read_plan
from shard_tools.verify import ShardTask, verify_shard
from tests.support.killing_proxy import KillingProxy, Strike
from tests.support.s3_server import S3Server

LIMIT_S = 120
AT_ONCE = 2  # kill points that are tried side by side


# ----------------------------------------------------------------------------------------
# what is there to be seen


class Shard(NamedTuple):
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
    """Read the newest version, every byte of it; what is damaged or missing is an error."""
    if not latest_version(store):
        return Seen(0)
    snapshot = read_snapshot(store)
    for row in snapshot.table.to_pylist():
        verdict = verify_shard(ShardTask(dataset=store.url, quick=False, **row))
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
                assert found in [shard._replace(mask=None) for shard in seen.shards]


# ----------------------------------------------------------------------------------------
# killing


class Victim:
    """A command in a process group of its own, behind a proxy."""

    def __init__(self, server: S3Server, *arguments: str, strike: Strike) -> None:
        self._proxy = KillingProxy(server.url, strike)
        self._arguments = arguments

    def start(self) -> subprocess.Popen[bytes]: ...


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to all processes of a group; wait until they are gone."""
    members = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if in_group]
