"""Downloads against a real server that misbehaves: what is retried, what is not, and the reason of each failure."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pickle import dumps, loads

import pytest

from pbe.data.download import Downloader, PhotoError, http_base
from pbe.data.settings import DownloadConfig

LIMITS = DownloadConfig(
    connections=4, attempts=3, connect_timeout_s=2, read_timeout_s=0.4, attempt_timeout_s=0.8, backoff_s=0.01
)
BODY = b"\xff\xd8\xff" + b"x" * 5000


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # many threads connect at once; the default of 5 refused one

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/bucket"

    def handle_error(self, request: object, client_address: object) -> None:
        """These tests hang up on purpose: print no traceback."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        self.server.agents.add(self.headers.get("User-Agent", ""))
        count = self.server.asked[name]
        kind = name.partition(".")[0].partition("-")[0]
        if kind.isdigit():
            return self._answer(int(kind), b"<html>no</html>")
        if kind == "twice":  # 503 twice, then fine
            return self._answer(200, BODY) if count > 2 else self._answer(503, b"busy")
        if kind == "wait":
            return self._answer(200, BODY) if count > 1 else self._answer(429, b"", ("Retry-After", "0.3"))
        if kind == "cut":
            return self._cut()
        if kind == "cutonce":
            return self._cut() if count == 1 else self._answer(200, BODY)
        if kind == "silent":
            time.sleep(1.5)
            return None
        if kind == "drip":
            return self._drip()
        if kind == "large":
            return self._answer(200, b"x" * 20_000)
        return self._answer(200, BODY)

    def _answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for key, value in (("Content-Length", str(len(body))), *headers):
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def _cut(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:1000])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _drip(self) -> None:
        """Send a byte now and then: never idle for long, never done."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        for _ in range(30):
            try:
                self.wfile.write(b"x")
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.1)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield running
        running.shutdown()


@pytest.fixture
def downloader(server: Server) -> Downloader:
    server.asked.clear()
    return Downloader(server.base, LIMITS, max_bytes=10_000)


@pytest.mark.parametrize("name", ["fine.jpg", "with space.jpg", "ünïcode+%.jpg"])
def test_a_photo_comes_whole(server: Server, downloader: Downloader, name: str) -> None:
    assert downloader.fetch(f"train/{name}") == BODY
    assert server.agents == {"pbe"}


@pytest.mark.parametrize(("name", "attempts"), [("twice-a", 3), ("wait-a", 2), ("cutonce-a", 2)])
def test_what_fails_in_passing_is_tried_again(server: Server, downloader: Downloader, name: str, attempts: int) -> None:
    started = time.monotonic()
    assert downloader.fetch(name) == BODY
    assert server.asked[name] == attempts
    if name == "wait-a":
        assert time.monotonic() - started >= 0.3  # Retry-After is obeyed


@pytest.mark.parametrize(
    ("name", "reason", "attempts", "detail"),
    [
        ("404", "image_unpublished", 1, "no such image (HTTP 404)"),
        ("403", "image_unpublished", 1, "refused (HTTP 403)"),
        ("429", "download_failed", 3, "HTTP 429, 3 attempts"),
        ("503", "download_failed", 3, "HTTP 503"),
        ("cut", "download_failed", 3, "IncompleteRead"),
        ("silent", "download_failed", 3, "timed out"),
        ("drip", "download_failed", 3, "not done after 0.8 s"),
        ("large", "image_too_large", 1, "more than 10000 bytes"),
    ],
)
def test_every_failure_is_named_and_only_passing_ones_are_tried_again(
    server: Server, downloader: Downloader, name: str, reason: str, attempts: int, detail: str
) -> None:
    with pytest.raises(PhotoError) as caught:
        downloader.fetch(name)
    assert caught.value.reason == reason
    assert detail in str(caught.value) and server.base in str(caught.value) and "\n" not in str(caught.value)
    assert server.asked[name] == attempts


def test_no_server_at_all_is_a_passing_failure() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(PhotoError) as caught:
            Downloader(f"http://127.0.0.1:{held.getsockname()[1]}", LIMITS, max_bytes=10_000).fetch("a.jpg")
    assert caught.value.reason == "download_failed"


def test_a_public_bucket_is_read_by_its_https_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert http_base("s3://open-images-dataset") == "https://open-images-dataset.s3.amazonaws.com"
    assert http_base("s3://bucket/some/prefix/") == "https://bucket.s3.amazonaws.com/some/prefix"
    assert http_base("http://mirror.example/images/") == "http://mirror.example/images"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:5000/")
    assert http_base("s3://bucket/prefix") == "http://127.0.0.1:5000/bucket/prefix"


def test_many_threads_share_one_downloader_and_workers_get_a_copy(server: Server, downloader: Downloader) -> None:
    from concurrent.futures import ThreadPoolExecutor

    copy = loads(dumps(downloader))
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(copy.fetch, [f"fine-{n}.jpg" for n in range(64)])) == {BODY}
    assert sum(server.asked.values()) == 64
