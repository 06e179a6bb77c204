"""Whose turn it is: downloads waiting at their hosts, none of which is asked too much at once.

Called by the downloader's loop; pure, it knows no network and no clock. A download has a number,
its place in the input. Each host has a queue of its own, a number of slots, a delay between
requests, and may be closed for a while. Next comes the lowest number among the hosts that are
open. A download takes up one of the downloader's connections only once its host lets it, so a
thousand URLs in a row of one slow host occupy its slots and no others. No download waits with a
slot in its hands (redirects and repetitions queue up anew), so nothing can wait for itself.
"""

from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Host(Generic[T]):
    name: str
    waiting: list[tuple[int, T]] = field(default_factory=list)  # a heap
    active: int = 0
    closed_until: float = 0.0


class HostQueue(Generic[T]):
    """Items by number and host. Times are seconds of any clock that never goes back.

    A host is forgotten once nothing of it waits or runs and it is open again.
    """

    def __init__(self, *, per_host: int, delay_s: float = 0.0) -> None:
        self._per_host = per_host
        self._delay_s = delay_s
        self._hosts: dict[str, _Host[T]] = {}
        # Both heaps may hold entries that no longer apply; they are dropped when they come up.
        self._open: list[tuple[int, str]] = []  # (number, host) that may start
        self._closed: list[tuple[float, str]] = []  # (when it opens, host)

    def __len__(self) -> int:
        """Hosts that are remembered."""
        return len(self._hosts)

    def push(self, host: str, number: int, item: T, now: float) -> None:
        """Let an item wait for its turn at a host. No two of one number at a time."""
        known = self._hosts.get(host)
        if known is None:
            known = self._hosts[host] = _Host(host)
        heappush(known.waiting, (number, item))
        self._offer(known, now)

    def first(self, now: float) -> T | None:
        """The item whose turn it is, left where it is; None if no host is open that has any."""
        self._reopen(now)
        while self._open:
            number, name = self._open[0]
            host = self._hosts.get(name)
            if host and self._may_start(host, now) and host.waiting[0][0] == number:
                return host.waiting[0][1]
            heappop(self._open)
        return None

    def start(self, now: float) -> tuple[str, T]:
        """Take the item that `first` has just shown, and a slot of its host, which it names."""
        host = self._hosts[heappop(self._open)[1]]
        _, item = heappop(host.waiting)
        host.active += 1
        if self._delay_s:
            self._close(host, now + self._delay_s)
        self._offer(host, now)
        return host.name, item

    def finish(self, name: str, now: float) -> None:
        """Give a slot back."""
        host = self._hosts[name]
        host.active -= 1
        self._offer(host, now)
        self._forget_if_idle(host, now)

    def close_until(self, name: str, until: float) -> None:
        """Start nothing more at a host, of which something runs, before a time."""
        self._close(self._hosts[name], until)

    def remove(self, name: str) -> list[T]:
        """Take out all that waits at a host, of which something runs."""
        waiting = self._hosts[name].waiting
        items = [item for _, item in sorted(waiting)]
        waiting.clear()
        return items

    def has_waiting(self, name: str) -> bool:
        """Whether more of a host, of which something runs, is to come."""
        return bool(self._hosts[name].waiting)

    def opens_at(self) -> float | None:
        """When a closed host opens next, if there is one."""
        return self._closed[0][0] if self._closed else None

    def clear(self, now: float) -> None:
        """Forget what waits; what runs is still to be finished."""
        for host in list(self._hosts.values()):
            host.waiting.clear()
            self._forget_if_idle(host, now)
        self._open.clear()

    def _may_start(self, host: _Host[T], now: float) -> bool:
        free = host.active < self._per_host
        return free and bool(host.waiting) and host.closed_until <= now

    def _offer(self, host: _Host[T], now: float) -> None:
        if self._may_start(host, now):
            heappush(self._open, (host.waiting[0][0], host.name))

    def _close(self, host: _Host[T], until: float) -> None:
        if until > host.closed_until:
            host.closed_until = until
            heappush(self._closed, (until, host.name))

    def _reopen(self, now: float) -> None:
        while self._closed and self._closed[0][0] <= now:
            host = self._hosts.get(heappop(self._closed)[1])
            if host:
                self._offer(host, now)
                self._forget_if_idle(host, now)

    def _forget_if_idle(self, host: _Host[T], now: float) -> None:
        if not host.waiting and not host.active and host.closed_until <= now:
            del self._hosts[host.name]
