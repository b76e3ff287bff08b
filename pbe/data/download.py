"""Download photos over HTTP: bounded attempts, backoff, deadlines, size limits; every failure has a reject reason.

A public S3 bucket is read unsigned over HTTPS: s3://open-images-dataset becomes
https://open-images-dataset.s3.amazonaws.com, or the server in AWS_ENDPOINT_URL, which the AWS tools use too.

Servers are not trusted. An attempt ends at its deadline, whatever trickles in, and any error that an answer causes in a
library is a failed attempt. Redirects may lead to the internet, or into the private network that the base is in.
"""

import ipaddress
import math
import os
import random
import socket
import ssl
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import Timeout

from pbe.data.settings import DownloadConfig
from pbe.errors import one_line

CHUNK_BYTES = 1 << 16
PERMANENT = {401: "refused", 403: "refused", 404: "no such image", 410: "no such image"}
RETRIED = {408, 425, 429}  # and all that are no 4xx: the server is at fault
REDIRECTS = {301, 302, 303, 307, 308}
MAX_REDIRECTS = 3
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64 = ipaddress.ip_network("64:ff9b::/96")
PRIVATE = [
    {ipaddress.ip_network(block) for block in blocks}
    for blocks in (
        {"127.0.0.0/8", "::1/128"},
        {"169.254.0.0/16", "fe80::/10"},  # link-local; also where clouds give out credentials
        *({block} for block in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")),
    )
]


class PhotoError(Exception):
    """A photo is not available. `reason` is one of the schema's; `str()` is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def http_base(base: str) -> str:
    """HTTPS form of s3://bucket/prefix; http(s):// addresses stay. No slash at the end."""
    if not base.startswith("s3://"):
        return base.rstrip("/")
    bucket, _, prefix = base.removeprefix("s3://").rstrip("/").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    address = f"{endpoint.rstrip('/')}/{bucket}" if endpoint else f"https://{bucket}.s3.amazonaws.com"
    return f"{address}/{prefix}" if prefix else address


class Downloader:
    """Fetches addresses below one base, from many threads at once. Picklable; the pool is made at first use."""

    def __init__(self, base: str, limits: DownloadConfig, *, max_bytes: int) -> None:
        self.base, self.limits, self.max_bytes = http_base(base), limits, max_bytes
        self._pool: urllib3.PoolManager | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Downloader, max_bytes=self.max_bytes), (self.base, self.limits)

    def fetch(self, address: str) -> bytes:
        """Download one photo. Raises PhotoError: image_unpublished, image_too_large or download_failed."""
        url = f"{self.base}/{quote(address)}"
        problem = ""
        for attempt in range(self.limits.attempts):
            try:
                return self._attempt(url)
            except _RetryableError as again:
                problem = str(again)
                if attempt + 1 < self.limits.attempts:
                    time.sleep(again.wait_s if again.wait_s is not None else self._backoff_s(attempt))
        raise PhotoError("download_failed", f"{url}: {problem}, {self.limits.attempts} attempts")

    def _backoff_s(self, attempt: int) -> float:
        longest = min(self.limits.backoff_s * 2**attempt, self.limits.attempt_timeout_s)
        return longest * random.uniform(0.5, 1)

    def _attempt(self, url: str) -> bytes:
        deadline = time.monotonic() + self.limits.attempt_timeout_s
        token = _GUARD.set(_Guard(urlsplit(self.base).hostname or "", deadline))
        try:
            return self._follow(url)
        except (PhotoError, _RetryableError):
            raise
        except Exception as error:  # what hostile answers make the parsers raise is not documented
            if time.monotonic() >= deadline:
                raise _RetryableError(f"not done after {self.limits.attempt_timeout_s:g} s") from None
            raise _RetryableError(f"{type(error).__name__}: {one_line(error, 160)}") from None
        finally:
            _GUARD.reset(token)

    def _follow(self, url: str) -> bytes:
        """Get the photo at the address, or at the one that it redirects to."""
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            with self._manager().request("GET", target, preload_content=False) as response:
                location = response.headers.get("Location")
                if response.status not in REDIRECTS or not location:
                    return self._answer(response, url)
            target = urljoin(target, location)
            if urlsplit(target).scheme not in ("http", "https"):
                raise _RetryableError(f"redirected to {one_line(target, 120)}, which is not HTTP")
        raise _RetryableError(f"redirected more than {MAX_REDIRECTS} times")

    def _answer(self, response: urllib3.BaseHTTPResponse, url: str) -> bytes:
        status = response.status
        if 400 <= status < 500 and status not in RETRIED:
            detail = f"{PERMANENT[status]} (HTTP {status})" if status in PERMANENT else f"HTTP {status}"
            raise PhotoError("image_unpublished", f"{url}: {detail}")
        if status != 200:
            raise _RetryableError(f"HTTP {status}", self._retry_after_s(response.headers.get("Retry-After")))
        parts, size = [], 0
        while part := response.read1(CHUNK_BYTES):  # what has arrived; a full chunk could take forever
            size += len(part)
            if size > self.max_bytes:
                raise PhotoError("image_too_large", f"{url}: more than {self.max_bytes} bytes")
            parts.append(part)
        if not parts and response.headers.get("Content-Length") != "0":
            raise _RetryableError("no bytes came")  # cut amid the headers, which http.client takes for their end
        return b"".join(parts)

    def _retry_after_s(self, header: str | None) -> float | None:
        try:
            wait_s = float(header or "")
        except ValueError:
            return None  # none, or a date; use our own backoff
        return min(wait_s, self.limits.attempt_timeout_s) if 0 <= wait_s < math.inf else None

    def _manager(self) -> urllib3.PoolManager:
        with self._lock:
            if self._pool is None:
                tls = ssl.create_default_context()
                tls.sslsocket_class = _TimedTLSSocket
                self._pool = urllib3.PoolManager(
                    maxsize=self.limits.connections,
                    timeout=Timeout(connect=self.limits.connect_timeout_s, read=self.limits.read_timeout_s),
                    retries=False,  # also no redirects: _follow checks each
                    headers={"User-Agent": "pbe"},
                    ssl_context=tls,
                )
                self._pool.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
            return self._pool


class _RetryableError(Exception):
    """This attempt failed; a retry may succeed, after wait_s if the server gave it."""

    def __init__(self, detail: str, wait_s: float | None = None) -> None:
        super().__init__(detail)
        self.wait_s = wait_s


@dataclass(frozen=True)
class _Guard:
    """What the sockets of one attempt keep to. base_host: of the address that the user gave."""

    base_host: str
    deadline: float  # of time.monotonic()

    def limited(self, timeout_s: float | None) -> float:
        """Return the timeout, or what is left of the attempt. Raises TimeoutError if nothing is."""
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the attempt's time is over")
        return left_s if timeout_s is None else min(timeout_s, left_s)

    def connect(self, host: str, port: int, timeout_s: float | None) -> socket.socket:
        """Connect to the first address of the host that answers. Raises OSError, or _RetryableError if none may be."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        allowed = [entry for entry in found if host == self.base_host or self._may_lead_to(str(entry[4][0]))]
        problem: Exception = _RetryableError(f"redirected to {host} in another private network ({found[0][4][0]})")
        for family, kind, protocol, _, place in allowed:
            sock = _TimedSocket(family, kind, protocol)
            try:
                sock.settimeout(self.limited(timeout_s))
                sock.connect(place)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except OSError as error:
                sock.close()
                problem = error
        raise problem

    def _may_lead_to(self, text: str) -> bool:
        """Return whether a redirect may lead to an address: a public one, or of the base's own private network."""
        address = _plain(text)
        if address.is_global and not (address.is_multicast or address.is_reserved):
            return not (isinstance(address, ipaddress.IPv6Address) and address.is_site_local)
        base = [_plain(str(entry[4][0])) for entry in socket.getaddrinfo(self.base_host, None)]
        around = [blocks for blocks in PRIVATE if any(address in block for block in blocks)]
        return any(own in block for blocks in around for block in blocks for own in base)


def _plain(text: str) -> Address:
    """Return an address; if it is an IPv6 address that stands for an IPv4 address, the latter."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


_GUARD: ContextVar[_Guard] = ContextVar("guard of the thread's attempt")


class _TimedSocket(socket.socket):
    """A socket whose reads end with the attempt, however slowly bytes trickle in: headers, chunk sizes, trailers."""

    def recv_into(self, *arguments: Any) -> int:
        before_s, timeout_s = self.gettimeout(), _GUARD.get().limited(self.gettimeout())
        if timeout_s != before_s:  # a system call, so only near the end; urllib3 sets it anew for each request
            self.settimeout(timeout_s)
        return super().recv_into(*arguments)


class _TimedTLSSocket(_TimedSocket, ssl.SSLSocket):
    pass


class _HTTPConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _GUARD.get().connect(self._dns_host, self.port, self.timeout)


class _HTTPSConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _GUARD.get().connect(self._dns_host, self.port, self.timeout)


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection
