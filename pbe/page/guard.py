"""What may reach the page: requests of its own browser pages, to the addresses that it uses, of bounded size.

A site that a visitor has open could otherwise send requests here (Origin), or have its own name point here (Host: DNS
rebinding). Gradio has many more addresses than the page needs: some fetch addresses of others, some run code.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_BYTES_MAX = 4 << 20  # of a request that uploads no file: a click with what the brush painted
FORM_BYTES = 1 << 16  # around an uploaded file
HEADERS = {
    # Gradio's page has scripts and styles in its HTML and makes functions of text; no other host is ever asked
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_API = "/gradio_api"
_USED = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|login|login/|logout|manifest\.json)"
    r"|/(assets|static|svelte)/.+"
    rf"|{_API}/(queue/join|queue/data|run/predict|upload|upload_progress|cancel|reset|startup-events|login_check|theme\.css)"
    rf"|{_API}/heartbeat/\w+"
)


class Guard:
    """ASGI middleware. hosts: the address that is listened on, and other names. folder: whose files the page shows."""

    def __init__(self, app: Any, *, hosts: Sequence[str], folder: Path, upload_bytes_max: int) -> None:
        self._app, self._files, self._upload_bytes_max = app, f"{_API}/file={folder}/", upload_bytes_max
        self._hosts = {*LOOPBACK, *map(str.lower, hosts)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # the page uses no websocket
            return await send({"type": "websocket.close", "code": 1008})
        refusal = self._refusal(scope)
        if refusal is not None:
            return await _answer(send, *refusal)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *ours]}
            await send(message)

        return await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin, path = headers.get("host", ""), headers.get("origin"), scope["path"]
        if not self._is_ours(host):
            return 403, "This page does not answer to that name."
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "This page answers to no other site."
        is_file = path.startswith(self._files) and ".." not in path
        if not (is_file or _USED.fullmatch(path)):
            return 404, "There is nothing here."
        if scope["method"] in ("GET", "HEAD"):
            return None
        length = headers.get("content-length", "")
        most = self._upload_bytes_max + FORM_BYTES if path == f"{_API}/upload" else BODY_BYTES_MAX
        # with both headers the server reads chunks, however many: the length would bound nothing
        if "transfer-encoding" in headers or not length.isdecimal():
            return 411, "The length of the request is missing."
        if int(length) > most:
            return 413, f"Too large: at most {most >> 20} MiB."
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._hosts:
            return True
        # on all addresses of the machine: its addresses and its name, but no name that others choose
        everywhere = not self._hosts.isdisjoint(("0.0.0.0", "::"))
        return everywhere and (_is_address(name) or name == socket.gethostname().lower())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _answer(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
