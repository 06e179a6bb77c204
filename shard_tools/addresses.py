"""Which network addresses a URL from a list may lead to, and looking them up.

Called by the downloader. A list of URLs is anybody's input: one entry may name the machine itself,
its neighbours or its cloud's metadata service. So every address is checked twice: after the name
was looked up, and when the socket to it is made. What is connected to is what was checked; a name
that changes its address in between gains nothing, nor does any spelling of a loopback address.

Source: the IANA special-purpose address registries. Python's `is_global` knows most of them; which
it misses depends on its version, so those are listed here.
"""

import asyncio
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import AddrInfoType

LOOKUP_THREADS = 32  # a lookup of a dead name server's name takes its thread for seconds
KEEP_S = 300.0  # a name's addresses
KEEP_FAILURE_S = 60.0
MAX_NAMES = 20_000  # of about 1 kB each

_REFUSED_V4 = [
    ip_network("192.0.0.0/24"),  # protocol assignments; one cloud's metadata service among them
    ip_network("192.88.99.0/24"),  # 6to4 relays, once: whoever is near may answer
    ip_network("168.63.129.16/32"),  # a cloud's host, seen from its machines
]
_UNICAST_V6 = ip_network("2000::/3")  # all that was ever given out
_REFUSED_V6 = [ip_network("3fff::/20"), ip_network("2001:db8::/32")]  # documentation
_NAT64 = ip_network("64:ff9b::/96")


class ForbiddenAddressError(OSError):
    """A host is at no public address."""


def is_public(address: str) -> bool:
    """Whether an address in its usual notation belongs to the public internet.

    For forms that carry an IPv4 address (mapped, 6to4, NAT64), that one decides. False for what is
    no address.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return _is_public_v4(parsed) if isinstance(parsed, IPv4Address) else _is_public_v6(parsed)


def _is_public_v4(address: IPv4Address) -> bool:
    refused = address.is_multicast or any(address in network for network in _REFUSED_V4)
    return address.is_global and not refused


def _is_public_v6(address: IPv6Address) -> bool:
    embedded = address.ipv4_mapped or address.sixtofour
    if address in _NAT64:
        embedded = IPv4Address(int(address) & 0xFFFFFFFF)
    if embedded is not None:
        return _is_public_v4(embedded)
    if address not in _UNICAST_V6 or any(address in network for network in _REFUSED_V6):
        return False
    return address.is_global and address.teredo is None


def open_public_socket(info: AddrInfoType) -> socket.socket:
    """A socket for a connection to an address: aiohttp's `socket_factory`.

    Raises ForbiddenAddressError if the address is not public.
    """
    family, kind, protocol, _, address = info
    if not is_public(str(address[0])):
        raise ForbiddenAddressError(f"{address[0]} is not a public address")
    return socket.socket(family, kind, protocol)


class Resolver(AbstractResolver):
    """Looks names up in threads, and remembers answers, failures too, for a while.

    `allow(address)` decides which addresses of a name are returned.
    """

    def __init__(self, allow: Callable[[str], bool]) -> None:
        self._allow = allow
        self._threads = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="lookup")
        self._known: dict[str, tuple[float, asyncio.Future[list[ResolveResult]]]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """A host's addresses.

        Raises socket.gaierror if it has none, ForbiddenAddressError if `allow` lets none through.
        """
        now = time.monotonic()
        expires, answer = self._known.get(host, (0.0, None))
        if answer is None or expires < now:
            answer = asyncio.ensure_future(self._look_up(host, family))
            answer.add_done_callback(lambda _: self._shorten_if_failed(host))
            self._remember(host, now + KEEP_S, answer)
        # Shielded: one waiter that gives up must not take the answer from the others.
        addresses = await asyncio.shield(answer)
        return [{**address, "port": port} for address in addresses]

    async def close(self) -> None:
        """Stop; a lookup in progress cannot be interrupted, so its thread ends by itself."""
        for _, answer in self._known.values():
            answer.cancel()
        await asyncio.gather(*(a for _, a in self._known.values()), return_exceptions=True)
        self._known.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look_up(self, host: str, family: socket.AddressFamily) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        name = host.encode("ascii")  # as bytes it is spared Python's own, stricter IDNA
        infos = await loop.run_in_executor(self._threads, _addresses_of, name, family)
        allowed = [info for info in infos if self._allow(info["host"])]
        if not allowed:
            raise ForbiddenAddressError(f"{infos[0]['host']} is not a public address")
        return allowed

    def _remember(
        self, host: str, expires: float, answer: asyncio.Future[list[ResolveResult]]
    ) -> None:
        self._known.pop(host, None)  # so that the oldest answer stays the first one
        self._known[host] = expires, answer
        if len(self._known) > MAX_NAMES:
            self._known.pop(next(iter(self._known)))

    def _shorten_if_failed(self, host: str) -> None:
        if (known := self._known.get(host)) and known[1].done():
            _, answer = known
            if answer.cancelled() or answer.exception():
                self._known[host] = time.monotonic() + KEEP_FAILURE_S, answer


def _addresses_of(name: bytes, family: socket.AddressFamily) -> list[ResolveResult]:
    infos = socket.getaddrinfo(name, None, family=family, type=socket.SOCK_STREAM)
    return [
        ResolveResult(
            hostname=name.decode("ascii"),
            host=str(address[0]),
            port=0,
            family=found,
            proto=protocol,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        )
        for found, _, protocol, _, address in infos
    ]
