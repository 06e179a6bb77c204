"""One GET: an image's bytes, or exactly why not.

Called by the downloader's loop, which decides when, and what follows. Nothing here trusts the
server: not the length it announces, not the encoding it was not asked for, not where it redirects
to, not that it ever ends. What it says about how its images may be used is honoured (`X-Robots-Tag:
noai`, `noimageai`). aiohttp is the client, on a short leash: no proxies or passwords from the
environment, no cookies, no redirects and no decompression of its own. On a connection that the
server closed meanwhile it repeats a request once by itself.
"""

import re
import zlib
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import ClientResponse, hdrs
from multidict import CIMultiDictProxy
from yarl import URL

from pipeline.decode import TOO_LARGE, TRUNCATED
from pipeline.errors import SampleError
from shard_tools.addresses import ForbiddenAddressError, Resolver, is_public, open_public_socket
from shard_tools.urls import redact

BAD_URL = "bad url"
FORBIDDEN_ADDRESS = "forbidden address"
OPTED_OUT = "opted out"
TIMEOUT = "timeout"
TOO_MANY_REDIRECTS = "too many redirects"
UNKNOWN_ENCODING = "unknown encoding"
UNREACHABLE = "unreachable"

_PLAIN_URL = re.compile(r"[\w\-.~:/?#\[\]@!$&'()*+,;=%|]+", re.ASCII)  # needs no quoting
_PLAIN_HOST = re.compile(r"[\w\-.]+|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", re.ASCII)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NO_AI = frozenset({"noai", "noimageai"})
_COMPRESSIONS = frozenset({"br", "zstd", "compress", "x-compress", "dcb", "dcz", "lzma", "xz"})
_RECEIVE_BYTES = 256 * 1024  # a response's, that wait to be read
_KEEP_ALIVE_S = 5.0  # without a request
_GZIP, _ZLIB, _RAW_DEFLATE = 31, 15, -15  # zlib's numbers


@dataclass(frozen=True)
class Target:
    """What to ask for: a URL without user information, which goes into a header of its own."""

    url: URL
    authorization: str | None = None

    @property
    def host(self) -> str:
        """The host's name or address, in one spelling."""
        return (self.url.raw_host or "").rstrip(".").lower()

    @classmethod
    def parse(cls, text: str) -> Self:
        """A target from a URL of a list. Raises SampleError if it is none of HTTP's."""
        url = _parse(text.strip())
        if url.raw_user is None and url.raw_password is None:
            return cls(url)
        login = b64encode(f"{url.user or ''}:{url.password or ''}".encode()).decode()
        return cls(url.with_user(None), f"Basic {login}")

    def redirected(self, location: str) -> "Target":
        """Where a redirect leads. Raises SampleError if that is no URL of HTTP's.

        The authorization goes along only as long as scheme, host and port stay the same.
        """
        url = _parse(location, self.url)
        if url.raw_user is not None or url.raw_password is not None:
            url = url.with_user(None)
        same = url.origin() == self.url.origin()
        return Target(url, self.authorization if same else None)


def _parse(text: str, base: URL | None = None) -> URL:
    try:
        # Spelt as HTTP wants it, a URL stays as it is: its signature may depend on that.
        url = URL(text, encoded=bool(_PLAIN_URL.fullmatch(text)))
        url = (base.join(url) if base else url).with_fragment(None)
        host, port = url.raw_host or "", url.port
    except ValueError:
        raise SampleError(BAD_URL, f"{redact(text)!a} cannot be parsed") from None
    if url.scheme not in ("http", "https"):
        raise SampleError(BAD_URL, f"{redact(text)!a} is neither http:// nor https://")
    if not _PLAIN_HOST.fullmatch(host) or not port:
        raise SampleError(BAD_URL, f"{redact(text)!a} names no host, or no usable port")
    return url


class RedirectedError(Exception):
    """The answer is elsewhere, at `target`."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target


class PassingError(Exception):
    """It may work another time: `sample_error` tells what happened.

    `retry_after_s` is when the server said to come back, None if it did not.
    """

    def __init__(self, sample_error: SampleError, retry_after_s: float | None = None) -> None:
        super().__init__(str(sample_error))
        self.sample_error = sample_error
        self.retry_after_s = retry_after_s


class Client:
    """Asks for images. To be entered in the loop in which it is used."""

    def __init__(
        self,
        *,
        user_agent: str,
        timeout_s: float,
        connect_timeout_s: float,
        allow_private: bool,
        max_bytes: int,
    ) -> None:
        self._headers = {
            hdrs.USER_AGENT: user_agent,
            hdrs.ACCEPT: "image/*,*/*;q=0.5",
            hdrs.ACCEPT_ENCODING: "identity",
        }
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, connect=connect_timeout_s)
        self._allow_private = allow_private
        self._max_bytes = max_bytes

    async def __aenter__(self) -> Self:
        private = self._allow_private
        self._resolver = Resolver(lambda address: private or is_public(address))
        self._keeping = self._session(force_close=False, keepalive_timeout=_KEEP_ALIVE_S)
        self._closing = self._session(force_close=True)
        return self

    def _session(self, **connections: Any) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=0,  # the downloader counts
            use_dns_cache=False,  # the resolver has one
            resolver=self._resolver,
            socket_factory=None if self._allow_private else open_public_socket,
            **connections,
        )
        return aiohttp.ClientSession(
            connector=connector,
            headers=self._headers,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            read_bufsize=_RECEIVE_BYTES,
        )

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._keeping.close()
        await self._closing.close()
        await self._resolver.close()

    async def get(
        self, target: Target, *, on_bytes: Callable[[int], None], keep_alive: bool
    ) -> bytes:
        """The body that is at a target, after any decompression at most `max_bytes` long.

        keep_alive: whether to keep the connection for another request. A crawl sees more hosts than
        a process may have sockets, so it should be kept only where there will be one.
        `on_bytes` is called with the bytes that are needed, as soon and as often as that is known
        better; what it raises ends the request. Raises SampleError if there is no use in trying
        again, PassingError if there may be, RedirectedError.
        """
        session = self._keeping if keep_alive else self._closing
        login = {hdrs.AUTHORIZATION: target.authorization} if target.authorization else None
        try:
            async with session.get(target.url, headers=login, allow_redirects=False) as response:
                if response.status != 200 or hdrs.CONTENT_ENCODING in response.headers:
                    _check_status(target, response)
                _check_robots(target, response.headers)
                body = await self._read(target, response, on_bytes)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _explain(target, error) from None
        encoding = response.headers.get(hdrs.CONTENT_ENCODING)
        return self._decode(target, body, encoding) if encoding else body

    async def _read(
        self, target: Target, response: ClientResponse, on_bytes: Callable[[int], None]
    ) -> bytes:
        """The body as it comes, given up as soon as it is clear that it is too large."""
        announced = response.content_length or 0
        self._check_size(target, announced)
        on_bytes(announced)
        chunks: list[bytes] = []
        size_bytes = 0
        while chunk := await response.content.readany():
            chunks.append(chunk)
            size_bytes += len(chunk)
            if size_bytes > announced:
                self._check_size(target, size_bytes)
                on_bytes(size_bytes)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _check_size(self, target: Target, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            what = f"at least {size_bytes} bytes, allowed are {self._max_bytes}"
            raise SampleError(TOO_LARGE, _at(target, what))

    def _decode(self, target: Target, body: bytes, encoding: str) -> bytes:
        """Undo the encoding of a server that did not care that none was asked for."""
        name = encoding.strip().lower()
        if name in ("gzip", "x-gzip"):
            return self._inflate(target, body, _GZIP)
        if name == "deflate":  # meant is zlib's format; some send the bare one
            zlib_header = body[:1] and body[0] & 0x0F == 8 and int.from_bytes(body[:2]) % 31 == 0
            return self._inflate(target, body, _ZLIB if zlib_header else _RAW_DEFLATE)
        return body

    def _inflate(self, target: Target, body: bytes, window_bits: int) -> bytes:
        inflater = zlib.decompressobj(window_bits)
        try:
            data = inflater.decompress(body, self._max_bytes + 1)
        except zlib.error as error:
            raise SampleError(UNKNOWN_ENCODING, _at(target, f"damaged: {error}")) from None
        self._check_size(target, len(data))
        if not inflater.eof:
            raise PassingError(SampleError(TRUNCATED, _at(target, "the compressed data is cut")))
        return data


def _check_status(target: Target, response: ClientResponse) -> None:
    """Let a body pass that can be read; raise what else the status asks for."""
    status, headers = response.status, response.headers
    if status in _REDIRECTS and (location := headers.get(hdrs.LOCATION)):
        _check_robots(target, headers)
        raise RedirectedError(target.redirected(location))
    if not 200 <= status < 300:
        error = SampleError(f"http {status}", _at(target, response.reason or "no reason given"))
        if status == 429 or status >= 500:
            raise PassingError(error, _retry_after_s(headers.get(hdrs.RETRY_AFTER, "")))
        raise error
    # Other words (utf-8, binary, aws-chunked, …) name no compression; browsers pass them over too.
    encoding = headers.get(hdrs.CONTENT_ENCODING, "").lower()
    if not _COMPRESSIONS.isdisjoint(re.split(r"[\s,]+", encoding)) or encoding.count("gzip") > 1:
        what = f"Content-Encoding: {encoding!a}, though identity was asked for"
        raise SampleError(UNKNOWN_ENCODING, _at(target, what))


def _check_robots(target: Target, headers: CIMultiDictProxy[str]) -> None:
    """Raise SampleError if the owner does not want this image learned from, by whomever."""
    if "X-Robots-Tag" not in headers:
        return
    for header in headers.getall("X-Robots-Tag"):
        for rule in header.lower().split(","):
            word = rule.rpartition(":")[2].strip()  # "robot: noai" is for one robot, and for us
            if word in _NO_AI:
                raise SampleError(OPTED_OUT, _at(target, f"X-Robots-Tag says {word}"))


def _retry_after_s(text: str) -> float | None:
    """What Retry-After says, in seconds from now; None if it is neither a number nor a date."""
    if re.fullmatch(r"\s*\d{1,9}\s*", text, re.ASCII):
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _explain(target: Target, error: Exception) -> Exception:
    """aiohttp's error as ours. Its own text is not used: it holds the URL with its secrets."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, ForbiddenAddressError):
        return SampleError(FORBIDDEN_ADDRESS, _at(target, str(cause)))
    if isinstance(error, aiohttp.InvalidURL):
        return SampleError(BAD_URL, _at(target, "the host is no name and no plain address"))
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return SampleError(UNREACHABLE, _at(target, "its certificate is not valid"))
    if isinstance(error, TimeoutError):
        return PassingError(SampleError(TIMEOUT, _at(target, "no whole answer in time")))
    if isinstance(error, aiohttp.ClientPayloadError):
        return PassingError(SampleError(TRUNCATED, _at(target, "the body ends early")))
    what = (cause.strerror if isinstance(cause, OSError) else None) or type(cause).__name__
    return PassingError(SampleError(UNREACHABLE, _at(target, what)))


def _at(target: Target, what: str) -> str:
    return f"{redact(str(target.url))}: {what}"
