"""Serve the page: on loopback, or with passwords; one edit at a time; what visitors send is gone when it ends."""

import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from pbe.errors import UserError
from pbe.page.guard import LOOPBACK, Guard
from pbe.page.models import Models
from pbe.page.uploads import UPLOAD_BYTES_MAX
from pbe.page.users import open_users
from pbe.page.visitors import Visitors
from pbe.retrieve.index import Index

WAITING_MAX = 16  # clicks that wait for others; the next is told so


class ServeError(UserError):
    """The page cannot be served so."""


def serve(
    models: Sequence[str],
    *,
    host: str,
    port: int,
    allowed: Sequence[str] = (),
    auth_file: Path | None = None,
    index: Path | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM. models: folders, or org/name@revision; the first is loaded now.

    allowed: names that the page answers to besides its own, such as a reverse proxy's.

    Raises ServeError, UsersError, ModelError, WeightsError.
    """
    if find_spec("gradio") is None:
        raise ServeError("the page needs Gradio; `make env` installs it, or `pip install '.[page]'`")
    if auth_file is None and (host not in LOOPBACK or allowed):
        option = f"--host {host}" if host not in LOOPBACK else f"--allow-host {' '.join(allowed)}"
        raise ServeError(f"{option}: others could reach the page; name its users by --auth-file FILE")
    users = None if auth_file is None else open_users(auth_file)
    exemplars = None if index is None else Index.open(index)
    _refuse_taken(host, port)
    folder = Path(tempfile.mkdtemp(prefix="pbe-page-")).resolve()  # mode 0700
    # Gradio reads these once, when it is imported; any other of its variables would change the page
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    tempfile.tempdir = str(folder)  # uploads on their way
    try:
        _serve(Models(models), folder, host=host, port=port, allowed=allowed, users=users, index=exemplars)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(
    models: Models,
    folder: Path,
    *,
    host: str,
    port: int,
    allowed: Sequence[str],
    users: Callable[[str, str], bool] | None,
    index: Index | None,
) -> None:
    from starlette.middleware import Middleware

    from pbe.page.handlers import Handlers
    from pbe.page.layout import STYLE, make_page, make_theme
    from pbe.page.samples import open_samples

    models.load(models.labels[0])
    blocks = make_page(Handlers(models, Visitors(folder), open_samples(), index))
    blocks.queue(max_size=WAITING_MAX, api_open=False)
    guard = Middleware(Guard, hosts=(host, *allowed), folder=folder, upload_bytes_max=UPLOAD_BYTES_MAX)
    blocks.launch(
        server_name=host,
        server_port=port,
        auth=users,
        app_kwargs={"middleware": [guard]},
        max_file_size=UPLOAD_BYTES_MAX,
        state_session_capacity=64,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        css_paths=STYLE,
        theme=make_theme(),
    )
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    print(f"pbe page: open {blocks.local_url} in a browser; Ctrl-C ends it", flush=True)
    stop.wait()
    blocks.close(verbose=False)


def _refuse_taken(host: str, port: int) -> None:
    """Before the model loads."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:  # of a port beyond 65535
            why = getattr(error, "strerror", None) or error
            raise ServeError(f"--host {host} --port {port}: {why}; choose another --port") from None
