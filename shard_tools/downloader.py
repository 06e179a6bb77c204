"""Images from URLs: asked for politely and many at a time, handed over in the order of the input.

Called by pack. One thread of its own runs a loop that talks to all servers; the caller's thread
takes URLs from the input and bodies from the loop. Three bounds hold, whatever the input is:

- LOOK_AHEAD URLs are taken before their turn. That is the room in which others overtake a host
  that is slow or has to be left alone for a while.
- `concurrency` requests run at once, `per_host` of them at a host (see hosts.py).
- READ_AHEAD_BYTES of bodies are held, whole or in parts (see crawl.py).

How long one URL is waited for is bounded too, once it is the next to be handed over: it is asked
for retries + 1 times at most, each time through max_redirects hops more. Before each request it may
have to let others that already run end (timeout_s), and its host be closed after that
(RETRY_AFTER_S, or delay_s if that is longer, or 20 s of pause at most); then it takes timeout_s at
most. So with R = retries + 1 and H = max_redirects + 1 it is R * H * (2 * timeout_s + max(60 s,
delay_s)): 36 minutes with the default settings, of which a URL that is not redirected can use 6.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from types import TracebackType
from typing import Self

from pipeline.errors import SampleError
from shard_tools.crawl import Crawl, Download
from shard_tools.download import DownloadSettings
from shard_tools.hosts import HostQueue
from shard_tools.request import Client

LOOK_AHEAD = 4096  # URLs, of about 1 kB each

_TAKE_URLS = 64  # at once, so that the two threads seldom disturb each other


class Downloader:
    """A context in which URLs can be fetched; leaving it ends every connection and the thread.

    max_bytes: the largest body that is accepted.
    """

    def __init__(self, settings: DownloadSettings, *, max_bytes: int) -> None:
        self._settings = settings
        self._max_bytes = max_bytes
        self._numbers = 0
        self._crawl: Crawl | None = None
        self._failure: BaseException | None = None  # the thread's

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
        if self._failure and error is None:
            raise self._failure

    def fetch(self, urls: Iterable[str]) -> Iterator[bytes | SampleError]:
        """The body at each URL, or why there is none, in the order of the input.

        URLs are taken as they are needed, by the calling thread. One fetch at a time. Errors of
        single images are results, not raised; raised is what ends the downloader's thread early.
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
        except BaseException as error:  # noqa: BLE001 - the caller's thread raises it
            if not started.done():
                started.set_exception(error)
                return
            self._failure = error
        started.result().fail(self._failure or RuntimeError("the downloader has been left"))

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
