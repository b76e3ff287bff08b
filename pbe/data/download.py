"""Download photos over HTTP: bounded attempts, backoff, deadlines, size limits; every failure has a reject reason.

A public S3 bucket is read unsigned over HTTPS: s3://open-images-dataset becomes
https://open-images-dataset.s3.amazonaws.com, or the server in AWS_ENDPOINT_URL, which the AWS tools use too.
"""

import os
import random
import threading
import time
from functools import partial
from typing import Any
from urllib.parse import quote

import urllib3
from urllib3.util import Retry, Timeout

from pbe.data.settings import DownloadConfig

CHUNK_BYTES = 1 << 16
PERMANENT = {401: "refused", 403: "refused", 404: "no such image", 410: "no such image"}
RETRIED = {408, 425, 429, 500, 502, 503, 504}


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
        try:
            with self._manager().request("GET", url, preload_content=False) as response:
                if response.status in PERMANENT:
                    detail = f"{url}: {PERMANENT[response.status]} (HTTP {response.status})"
                    raise PhotoError("image_unpublished", detail)
                if response.status in RETRIED:
                    raise _RetryableError(
                        f"HTTP {response.status}", self._retry_after_s(response.headers.get("Retry-After"))
                    )
                if response.status != 200:
                    raise PhotoError("image_unpublished", f"{url}: HTTP {response.status}")
                return self._body(response, url, deadline)
        except urllib3.exceptions.HTTPError as error:
            cause = getattr(error, "reason", None) or error
            raise _RetryableError(f"{type(cause).__name__}: {' '.join(str(cause).split())[:160]}") from None

    def _body(self, response: urllib3.BaseHTTPResponse, url: str, deadline: float) -> bytes:
        parts, size = [], 0
        while part := response.read1(CHUNK_BYTES):  # what has arrived; a full chunk could take forever
            size += len(part)
            if size > self.max_bytes:
                raise PhotoError("image_too_large", f"{url}: more than {self.max_bytes} bytes")
            if time.monotonic() > deadline:
                raise _RetryableError(f"not done after {self.limits.attempt_timeout_s:g} s, {size} bytes had come")
            parts.append(part)
        return b"".join(parts)

    def _retry_after_s(self, header: str | None) -> float | None:
        try:
            return min(float(header), self.limits.attempt_timeout_s) if header else None
        except ValueError:
            return None  # a date; use our own backoff

    def _manager(self) -> urllib3.PoolManager:
        with self._lock:
            if self._pool is None:
                self._pool = urllib3.PoolManager(
                    maxsize=self.limits.connections,
                    timeout=Timeout(connect=self.limits.connect_timeout_s, read=self.limits.read_timeout_s),
                    retries=Retry(total=None, connect=0, read=0, status=0, other=0, redirect=3),
                    headers={"User-Agent": "pbe"},
                )
            return self._pool


class _RetryableError(Exception):
    """This attempt failed; a retry may succeed, after wait_s if the server gave it."""

    def __init__(self, detail: str, wait_s: float | None = None) -> None:
        super().__init__(detail)
        self.wait_s = wait_s
