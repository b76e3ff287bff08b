"""Downloads against real servers that misbehave: what is retried, what is not, and the reason of each failure."""

import contextlib
import datetime
import gzip
import ipaddress
import itertools
import socket
import socketserver
import ssl
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from pickle import dumps, loads
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pbe.data.download import Downloader, PhotoError, _Guard, _RetryableError, http_base
from pbe.data.settings import DownloadConfig

LIMITS = DownloadConfig(
    connections=4, attempts=3, connect_timeout_s=2, read_timeout_s=1.0, attempt_timeout_s=2.0, backoff_s=0.01
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
        ("drip", "download_failed", 3, "not done after 2 s"),
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


# --- servers that misbehave ------------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
HASTY = LIMITS.model_copy(update={"attempts": 2, "read_timeout_s": 0.6, "attempt_timeout_s": 1.0})
Pieces = Iterator[bytes | float]  # what a server sends; a number is a pause in s
Script = Callable[[], Pieces]


def once(data: bytes) -> Script:
    """Send it, then close."""
    return lambda: iter([data])


def flood(first: bytes, again: bytes) -> Script:
    """Send `again` without end, as fast as it is read."""
    return lambda: itertools.chain([first], itertools.repeat(again * max(1, 4096 // len(again))))


def drip(first: bytes, again: bytes) -> Script:
    """Send `again` without end, byte by byte, and never pause for as long as the read timeout."""
    bytewise = [piece for byte in again for piece in (bytes([byte]), 0.03)]
    return lambda: itertools.chain([first], itertools.cycle(bytewise))


def body(*headers: str, data: bytes = BODY) -> Script:
    return once(OK + "".join(f"{line}\r\n" for line in headers).encode("latin-1") + b"\r\n" + data)


def busy(retry_after: str) -> Script:
    return once(f"HTTP/1.1 503 Busy\r\nRetry-After: {retry_after}\r\nContent-Length: 0\r\n\r\n".encode())


def redirect(location: str | bytes, status: int = 302) -> Script:
    place = location if isinstance(location, bytes) else location.encode()
    return once(b"HTTP/1.1 %d Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % (status, place))


def packed(data: bytes, times: int = 1) -> bytes:
    for _ in range(times):
        data = gzip.compress(data)
    return data


def empty_blocks() -> Pieces:
    """A deflate stream that goes on for ever and unpacks to nothing."""
    yield OK + b"Content-Encoding: deflate\r\n\r\n" + zlib.compressobj().flush(zlib.Z_SYNC_FLUSH)
    while True:
        yield b"\x00\x00\x00\xff\xff" * 100


FAILED: dict[str, Script] = {
    "closes at once": once(b""),
    "HTTP/0.9": once(b"<html>hello</html>"),
    "no HTTP": once(bytes(range(256)) * 40),
    "a status without a number": once(b"HTTP/1.1 \r\n\r\n"),
    "a status of letters": once(b"HTTP/1.1 two hundred\r\n\r\n"),
    "a status out of range": once(b"HTTP/1.1 99 Low\r\n\r\n"),
    "an unknown status": once(b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n"),
    "an unknown version": once(b"HTTP/9.9 200 OK\r\n\r\n"),
    "no content": once(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "a part that was not asked for": once(b"HTTP/1.1 206 Partial\r\nContent-Length: 2\r\n\r\nab"),
    "not modified": once(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "a proxy's own error": once(b"HTTP/1.1 522 Origin\r\nContent-Length: 0\r\n\r\n"),
    "a status line without end": flood(b"HTTP/1.1 200 ", b"O"),
    "a dripped status line": drip(b"HTTP/1.1 200 ", b"O"),
    "dripped headers": drip(OK, b"X-Header: value\r\n"),
    "a dripped header without end": drip(OK + b"X-Header: ", b"value"),
    "thousands of headers": once(OK + b"".join(b"X-%d: 1\r\n" % n for n in range(5000)) + b"\r\n"),
    "headers without end": flood(OK, b"X-Header: value\r\n"),
    "a header of a megabyte": once(OK + b"X-Header: " + b"v" * (1 << 20) + b"\r\n\r\n"),
    "closes amid its headers": once(OK + b"Content-Le"),
    "100 Continue without end": flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "dripped 100 Continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "early hints and nothing else": once(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "closes amid its body": body(f"Content-Length: {len(BODY)}", data=BODY[:100]),
    "a length beyond reason": body("Content-Length: 999999999999999999999999999"),
    "two lengths": body("Content-Length: 5", "Content-Length: 7"),
    "a dripped body": drip(OK + b"\r\n", b"x"),
    "a chunk size that is none": once(CHUNKED + b"photo\r\nabc\r\n0\r\n\r\n"),
    "no chunk size": once(CHUNKED + b"\r\n\r\n\r\n"),
    "a chunk size without end": flood(CHUNKED, b"0"),
    "a dripped chunk size": drip(CHUNKED, b"0"),
    "a dripped chunk extension": drip(CHUNKED + b"5;", b"name=value"),
    "a chunk beyond reason": once(CHUNKED + b"ffffffffffffffffff\r\nabc"),
    "no last chunk": once(CHUNKED + b"3\r\nabc\r\n"),
    "dripped chunks": drip(CHUNKED, b"1\r\nx\r\n"),
    "dripped trailers": drip(CHUNKED + b"3\r\nabc\r\n0\r\n", b"X-Trailer: value\r\n"),
    "trailers without end": flood(CHUNKED + b"3\r\nabc\r\n0\r\n", b"X-Trailer: value\r\n"),
    "gzip that is none": body("Content-Encoding: gzip"),
    "gzip ten times over": body("Content-Encoding: " + ", ".join(["gzip"] * 10), data=packed(BODY, 10)),
    "deflate that unpacks to nothing": empty_blocks,
    **{f"Retry-After {value[:9]}": busy(value) for value in
       ("nan", "-1", "inf", "-inf", "1e999", "soon", "9" * 5000, "Fri, 32 Foo 2026 25:00:00 GMT", "")},
    "a redirect to nowhere": once(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"),
    "a redirect to itself": redirect("?"),
    "redirects for ever": lambda: redirect(f"/bucket/{time.monotonic_ns()}", 307)(),
    "slow redirects for ever": lambda: itertools.chain([0.2], redirect(f"/bucket/{time.monotonic_ns()}")()),
    **{f"a redirect to {place[:40]!r}": redirect(place) for place in
       ("http://[", "http://[::1", "http://[zz]/", "http://127.0.0.1:99999/", "http://127.0.0.1:-1/", "http://127.0.0.1:x/",
        "http://:80/", "http:///photo", "http://", "http://a b/", "http://%00/", "http://\x7f/", "http://.../",
        "http://xn--/", f"http://{'a' * 70}.test/", "http://" + "a." * 300, b"http://\xff\xfe/", "x" * 60_000,
        "ftp://127.0.0.1/a.jpg", "file:///etc/passwd", "gopher://127.0.0.1:70/_", "data:image/png;base64,AAAA",
        "javascript:alert(1)", "s3://bucket/a.jpg", "http+unix://%2Fsock/", "HTTPS://127.0.0.1:9/", "//127.0.0.1:9/a")},
}  # fmt: skip

# Where clouds give out credentials, and other places of other private networks, in all ways to write them.
METADATA = ["169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.16689662", "metadata.test",
            "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::1]",
            "[fe80::1]", "[fd00:ec2::254]", "10.0.0.1", "192.168.0.1", "172.31.255.255", "100.100.100.200",
            "0.0.0.0", "0", "[::]", "224.0.0.1", "255.255.255.255", "[ff02::1]", "[fec0::1]", "[::169.254.169.254]",
            "user@169.254.169.254"]  # fmt: skip


class Misbehaving(socketserver.ThreadingTCPServer):
    """Answers every request with a script. tls: it speaks TLS with this."""

    daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.script, self.tls, self.asked, self.over = script, tls, 0, threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def base(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.server_address[1]}/bucket"

    def finish_request(self, request: Any, client_address: object) -> None:
        self.asked += 1
        with contextlib.suppress(OSError):  # the client has hung up
            request.settimeout(5)
            with self.tls.wrap_socket(request, server_side=True) if self.tls else request as stream:
                stream.recv(65536)  # the request, or a client's part of a TLS handshake
                for piece in self.script():
                    if self.over.is_set():
                        return
                    if isinstance(piece, float):
                        self.over.wait(piece)
                    else:
                        stream.sendall(piece)

    def handle_error(self, request: object, client_address: object) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


def refused(base: str, limits: DownloadConfig = HASTY) -> PhotoError:
    """The error of a photo that does not come."""
    with pytest.raises(PhotoError) as caught:
        Downloader(base, limits, max_bytes=10_000).fetch("a.jpg")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return caught.value


@pytest.mark.timeout(15)
@pytest.mark.parametrize("name", FAILED)
def test_whatever_a_server_does_is_a_failed_attempt(name: str) -> None:
    with Misbehaving(FAILED[name]) as server:
        error = refused(server.base)
        assert error.reason == "download_failed" and str(error).endswith("2 attempts")
        assert server.asked


@pytest.mark.timeout(15)
@pytest.mark.parametrize("host", METADATA)
def test_a_redirect_leads_to_no_other_private_network(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    named = {"metadata.test": "169.254.169.254"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real(named.get(host, host), *rest, **more))
    with Misbehaving(redirect(f"http://{host}/latest/meta-data/")) as server:
        error = refused(server.base)
    assert error.reason == "download_failed" and "in another private network" in str(error)


@pytest.mark.timeout(15)
@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("a body without end", flood(OK + b"\r\n", b"x")),
        ("one with a length that is none", flood(OK + b"Content-Length: many\r\n\r\n", b"x")),
        ("one with a negative length", flood(OK + b"Content-Length: -5\r\n\r\n", b"x")),
        ("chunks without end", flood(CHUNKED, b"5\r\nabcde\r\n")),
        ("a gzip bomb", body("Content-Encoding: gzip", data=packed(bytes(100 << 20)))),
        ("a bomb in a bomb", body("Content-Encoding: gzip, gzip", data=packed(bytes(100 << 20), 2))),
    ],
)
def test_a_photo_without_end_is_too_large_and_takes_no_memory(name: str, script: Script) -> None:
    with Misbehaving(script) as server:
        tracemalloc.start()
        try:
            error = refused(server.base)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert error.reason == "image_too_large" and server.asked == 1
    assert peak_bytes < 8 << 20


@pytest.mark.timeout(15)
@pytest.mark.parametrize(
    ("script", "came"),
    [
        (body("Content-Type: image/jpeg; charset=klingon-1", f"Content-Length: {len(BODY)}"), BODY),
        (body("X-Name: \xfc\xff", "X-Folded: a", "\tb", "no colon", "Content-Encoding: klingon"), BODY),
        (body("Content-Encoding: gzip", data=packed(BODY)), BODY),
        (body("Content-Length: 100"), BODY[:100]),  # ingest finds that it is no photo
    ],
)
def test_what_a_server_may_do_is_read(script: Script, came: bytes) -> None:
    with Misbehaving(script) as server:
        assert Downloader(server.base, HASTY, max_bytes=10_000).fetch("a.jpg") == came


def test_a_redirect_within_the_network_of_the_base_is_followed(server: Server) -> None:
    with Misbehaving(redirect(f"{server.base.replace('127.0.0.1', '127.1')}/fine.jpg", 308)) as first:
        assert Downloader(first.base, LIMITS, max_bytes=10_000).fetch("a.jpg") == BODY


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.1.2.3", "169.254.169.254", "192.168.1.1"])
def test_a_public_base_leads_to_no_private_network(host: str) -> None:
    guard = _Guard("8.8.8.8", time.monotonic() + 1)
    with pytest.raises(_RetryableError, match="in another private network"):
        guard.connect(host, 80, 0.01)


def certificate(folder: Path, *, days: int = 1) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate of 127.0.0.1, and a server's TLS with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=9))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path, secret = folder / "certificate.pem", folder / "key.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    secret.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path, secret)
    return path, tls


@pytest.mark.timeout(15)
@pytest.mark.parametrize("name", ["dripped headers", "trailers without end", "closes amid its body"])
def test_over_tls_the_limits_are_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tls = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with Misbehaving(body(f"Content-Length: {len(BODY)}"), tls) as server:
        assert Downloader(server.base, HASTY, max_bytes=10_000).fetch("a.jpg") == BODY
    with Misbehaving(FAILED[name], tls) as server:
        assert refused(server.base).reason == "download_failed"
        assert server.asked == 2


@pytest.mark.timeout(15)
@pytest.mark.parametrize("case", ["self-signed", "expired", "no TLS", "closes", "silent", "drips"])
def test_a_handshake_that_fails_is_a_failed_attempt(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tls = certificate(tmp_path, days=-1 if case == "expired" else 1)
    if case != "self-signed":
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
    plain = {
        "no TLS": body(),
        "closes": once(b""),
        "silent": lambda: iter([5.0]),
        "drips": drip(b"\x16\x03\x03\x40\x00", b"\x02"),
    }
    with Misbehaving(plain.get(case, body()), None if case in plain else tls) as server:
        error = refused(server.base.replace("http://", "https://"))
    assert error.reason == "download_failed" and str(error).endswith("2 attempts")
