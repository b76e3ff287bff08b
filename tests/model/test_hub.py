"""Weights by name: folders, and hub models by id and revision, served by a local hub."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from pbe.model.hub import is_on_hub, part_folder, weights_folder
from pbe.model.tensors import WeightsError
from tests.tiny_weights import write_inpainting

COMMIT = "0123456789abcdef0123456789abcdef01234567"


FILES = {
    "model_index.json": b'{"index": 1}',
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"unet",
    "unet/diffusion_pytorch_model.bin": b"unet as a pickle",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "vae/config.json": b'{"vae": 1}',
    "vae/diffusion_pytorch_model.bin": b"vae as a pickle",
    "text_encoder/config.json": b'{"text": 1}',
    "text_encoder/model.safetensors": b"text",
    "model.safetensors": b"top",
    "image_encoder/config.json": b'{"encoder": 1}',
    "image_encoder/model.fp16.safetensors": b"half alone",
}


@dataclass
class Hub:
    """Serves one model, org/model, to huggingface_hub: its files by revision."""

    address: str
    files: dict[str, bytes]
    fetched: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub("", FILES)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith("/api/models/org/model/"):
                names = [
                    {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": _etag(data)}
                    for name, data in hub.files.items()
                ]
                answer: object = names if "/tree/" in path else {"id": "org/model", "sha": COMMIT, "siblings": names}
                self._answer(200, json.dumps(answer).encode())
            elif path.startswith("/org/model/resolve/"):
                name = path.split("/", 5)[5]
                if self.command == "GET":
                    hub.fetched.append(name)
                self._answer(200, hub.files[name]) if name in hub.files else self._answer(404, b"")
            else:
                self._answer(404, b'{"error": "no"}', **{"X-Error-Code": "RepoNotFound"})

        def _answer(self, status: int, data: bytes, **headers: str) -> None:
            self.send_response(status)
            fixed = {"Content-Length": str(len(data)), "ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT}
            for key, value in (fixed | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    server.server_close()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _fetch(hub: Hub, cache: Path, name: str, parts: list[str] | None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run in a separate process, because huggingface_hub reads its settings at import. parts: None for all."""
    call = f"whole_model({name!r})" if parts is None else f"weights_folder({name!r}, parts={parts!r})"
    code = (
        "import sys\nfrom pbe.model.hub import weights_folder, whole_model\nfrom pbe.errors import UserError\n"
        f"try: print({call})\n"
        "except UserError as error: sys.exit(f'user error: {error}')"
    )
    settings = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings | env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_only_the_parts_that_are_needed_come_and_pickles_only_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    first = _fetch(hub, tmp_path, f"org/model@{COMMIT}", ["unet", "image_encoder"])
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.splitlines()[-1])
    assert (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes() == b"unet"
    assert (folder / "image_encoder/model.fp16.safetensors").read_bytes() == b"half alone"
    assert set(hub.fetched) == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "image_encoder/config.json",
        "image_encoder/model.fp16.safetensors",
    }
    second = _fetch(hub, tmp_path, f"org/model@{COMMIT}", ["vae"])
    assert (Path(second.stdout.splitlines()[-1]) / "vae/diffusion_pytorch_model.bin").read_bytes() == b"vae as a pickle"
    asked = len(hub.fetched)
    again = _fetch(hub, tmp_path, f"org/model@{COMMIT}", ["unet", "image_encoder"], HF_HUB_OFFLINE="1")
    assert again.stdout == first.stdout and len(hub.fetched) == asked  # from the cache, without a network


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_whole_model_comes_with_all_that_its_pipeline_loads(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizers too; no second copy of weights, no code."""
    model = write_inpainting(tmp_path / "model")
    names = {file.relative_to(model).as_posix() for file in model.rglob("*") if file.is_file()}
    files = {name: (model / name).read_bytes() for name in names}
    unused = ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "v1-5.safetensors")
    monkeypatch.setattr(hub, "files", files | dict.fromkeys((*unused, "unet/evil.py"), b"x"))
    hub.fetched.clear()
    found = _fetch(hub, tmp_path / "cache", f"org/model@{COMMIT}", None)
    assert found.returncode == 0, found.stderr
    folder = Path(found.stdout.splitlines()[-1])
    assert all((folder / name).read_bytes() == data for name, data in files.items())
    assert not set(hub.fetched) & {*unused, "unet/evil.py"}
    again = _fetch(hub, tmp_path / "cache", f"org/model@{COMMIT}", None, HF_HUB_OFFLINE="1")
    assert again.stdout == found.stdout
    gone = _fetch(hub, tmp_path / "other", f"org/model@{COMMIT}", None, HF_ENDPOINT="http://127.0.0.1:9")
    assert gone.returncode == 1 and "user error: org/model@" in gone.stderr and "or name a folder" in gone.stderr


@pytest.mark.timeout(120)
def test_a_model_that_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    result = _fetch(hub, tmp_path, "org/other@main", ["unet"])
    assert result.returncode == 1 and result.stderr.startswith("user error: org/other@main: ")
    assert "no such model" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.timeout(120)
def test_without_a_network_it_is_one_line(hub: Hub, tmp_path: Path) -> None:
    result = _fetch(hub, tmp_path, "org/model@main", ["unet"], HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1 and "name a folder" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert weights_folder(str(tmp_path), parts=["unet"]) == tmp_path
    (tmp_path / "vae").mkdir()
    assert part_folder(tmp_path, "vae") == tmp_path
    (tmp_path / "vae" / "config.json").write_text("{}")
    assert part_folder(tmp_path, "vae") == tmp_path / "vae"


def test_a_name_on_the_hub_needs_a_revision() -> None:
    assert is_on_hub("org/model@main") and not is_on_hub("org/model") and not is_on_hub("/org/model@main")
    with pytest.raises(WeightsError, match="written org/name@revision"):
        weights_folder("CompVis/stable-diffusion-v1-4", parts=["unet"])


def test_a_file_is_for_pbe_import(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"pbe import .*model\.ckpt --out FOLDER"):
        weights_folder(str(tmp_path / "model.ckpt"), parts=["unet"])
