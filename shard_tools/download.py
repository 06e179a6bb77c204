"""Images from URLs: asked for politely and many at a time, handed over in the order of the input.

Called by pack. One thread of its own runs a loop that talks to all servers; the caller's thread
takes URLs from the input and bodies from the loop. Three bounds hold, whatever the input is:

- LOOK_AHEAD URLs are taken before their turn. That is the room in which others overtake a host
  that is slow or has to be left alone for a while.
- `concurrency` requests run at once, `per_host` of them at a host (see hosts.py).
- READ_AHEAD_BYTES of bodies are held, whole or in parts (see crawl.py).
"""

import asyncio
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from types import TracebackType
from typing import Self

from pipeline.errors import SampleError, UsageError
from shard_tools.crawl import Crawl, Download
from shard_tools.hosts import HostQueue
from shard_tools.request import Client

LOOK_AHEAD = 4096  # URLs, of about 1 kB each

_TAKE_URLS = 64  # at once, so that the two threads seldom disturb each other


@dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """How images are asked for. The numbers are a worker's.

    Raises UsageError for values that cannot be meant.
    """

    # Say who asks, and where one may complain: many sites refuse or ban who does not.
    user_agent: str = f"cropstream/{version('cropstream')} (image data set; no contact given)"
    timeout_s: float = 30.0  # for a request from its start to its body's end; a redirect is another
    connect_timeout_s: float = 10.0  # for looking up and connecting
    retries: int = 2
    per_host: int = 8  # connections
    concurrency: int = 128
    delay_s: float = 0.0  # between the starts of two requests to a host
    allow_private: bool = False  # addresses that are not on the public internet
    max_redirects: int = 5

    def __post_init__(self) -> None:
        if not self.user_agent.isascii() or not self.user_agent.isprintable():
            raise UsageError(f"user_agent: {self.user_agent!a} is not one line of plain ASCII")
        for name in ("timeout_s", "connect_timeout_s"):
            if not 0 < getattr(self, name) < 86400:
                raise UsageError(f"{name}: {getattr(self, name)} is not above 0 and below a day")
        if not 0 <= self.delay_s <= 3600:
            raise UsageError(f"delay_s: {self.delay_s} is not between 0 and 3600")
        least = {"retries": 0, "max_redirects": 0, "per_host": 1, "concurrency": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(f"{name}: {getattr(self, name)} is less than {value}")


class Downloader:
    """A context in which URLs can be fetched; leaving it ends every connection and the thread.

    max_bytes: the largest body that is accepted.
    """

    def __init__(self, settings: DownloadSettings, *, max_bytes: int) -> None:
        self._settings = settings
        self._max_bytes = max_bytes
        self._numbers = 0
        self._crawl: Crawl | None = None

    def __enter__(self) -> Self:
        started: Future[Crawl] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="download")
        self._thread.start()
        self._crawl = started.result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._crawl is not None
        self._crawl.call(self._crawl.stop)
        self._crawl = None
        self._thread.join()

    def fetch(self, urls: Iterable[str]) -> Iterator[bytes | SampleError]:
        """The body at each URL, or why there is none, in the order of the input.

        URLs are taken as they are needed, by the calling thread. One fetch at a time. Errors of
        single images are results, not raised.
        """
        source = iter(urls)
        taken: deque[Download] = deque()
        crawl = self._crawl
        assert crawl is not None, "fetch is called inside the downloader's context"
        try:
            while True:
                if len(taken) <= LOOK_AHEAD - _TAKE_URLS:
                    more = [self._number(url) for url in islice(source, LOOK_AHEAD - len(taken))]
                    if more:
                        taken.extend(more)
                        crawl.call(crawl.add, more)
                if not taken:
                    return
                outcome = crawl.take(taken[0])
                taken.popleft()
                yield outcome
        finally:
            if self._crawl is not None:
                crawl.call(crawl.drop, list(taken))

    def _number(self, url: str) -> Download:
        self._numbers += 1
        return Download(self._numbers, url)

    def _run(self, started: "Future[Crawl]") -> None:
        try:
            asyncio.run(self._serve(started))
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
                return
            raise

    async def _serve(self, started: "Future[Crawl]") -> None:
        settings = self._settings
        client = Client(
            user_agent=settings.user_agent,
            timeout_s=settings.timeout_s,
            connect_timeout_s=settings.connect_timeout_s,
            allow_private=settings.allow_private,
            max_bytes=self._max_bytes,
        )
        async with client:
            crawl = Crawl(
                client,
                concurrency=settings.concurrency,
                queue=HostQueue(per_host=settings.per_host, delay_s=settings.delay_s),
                retries=settings.retries,
                max_redirects=settings.max_redirects,
            )
            started.set_result(crawl)
            await crawl.run_until_stopped()
