"""A page that serves a tiny model, in a process of its own; and Chromium."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pbe.data import images
from pbe.model.backbone import EfficientNetLite
from pbe.model.codec import PatchCodec
from pbe.store import Store

if TYPE_CHECKING:
    from pbe.model.architecture import Architecture

pytest.importorskip("gradio", reason="gradio is not installed; install pbe[page]")


@dataclass
class Server:
    """`pbe page` at work. said: what it has printed so far."""

    process: subprocess.Popen
    log: Path
    temporary: Path  # where it makes its private folder
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self.port = int(self.wait_for(r"open http://127\.0\.0\.1:(\d+)/"))

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_for(self, pattern: str, seconds: float = 90) -> str:
        """The first group of the pattern in what the server prints."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(pattern, self.said):
                return found[1] if found.groups() else found[0]
            assert self.process.poll() is None, self.said
            time.sleep(0.1)
        raise AssertionError(f"{pattern} did not come in {seconds} s:\n{self.said}")

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


def start(folder: Path, *arguments: str) -> Server:
    """`pbe page` with these arguments, on a free port."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary, log = folder / "temporary", folder / "log"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "GRADIO_SHARE": "True"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "pbe.cli", "page", "--port", str(port), *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    return Server(process, log, temporary)


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, arch: "Architecture", codec: PatchCodec, backbone: EfficientNetLite
) -> Path:
    """models/tiny, with random weights; large enough that 200 steps of 8 edits last for seconds."""
    import torch

    from pbe.diffusion.scheduler_config import scheduler_config
    from pbe.model.card import ModelCard
    from pbe.model.unet import new_network
    from pbe.model.weights import Model, save_model

    unet = arch.unet.model_copy(update={"block_channels": (32, 64), "layers_per_block": 2})
    larger = replace(arch, latent_channels=codec.channels, latent_px=8, unet=unet)
    card = ModelCard(
        image_px=8 * codec.patch_px,
        reference_px=224,
        reference_pad_px=10,
        tokens="class",
        scheduler=scheduler_config("squaredcos_cap_v2", "x0"),
        run={"variant": "tiny", "steps": 0},
        guidance_scale=2.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = new_network(larger).eval()
    folder = tmp_path_factory.mktemp("page") / "models" / "tiny"
    save_model(folder, Model(network, codec, backbone, card))
    return folder


@pytest.fixture(scope="session")
def damaged_model(tiny_model: Path) -> Path:
    """models/damaged, whose numbers overflow: weights with NaN are refused when they are loaded."""
    import torch

    from pbe.model.weights import load_model, save_model

    model = load_model(tiny_model)
    with torch.no_grad():
        next(model.network.parameters()).fill_(1e30)
    folder = tiny_model.with_name("damaged")
    save_model(folder, replace(model, card=replace(model.card, guidance_scale=None)))
    return folder


@pytest.fixture(scope="session")
def index_file(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An index of four photos, each with a Cat and a Dog."""
    import torch

    from pbe.model.weights import load_exemplar_backbone
    from pbe.retrieve.build import Embedder, build_from_folder

    folder = tmp_path_factory.mktemp("index")
    (folder / "photos").mkdir()
    flags = "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    lines = [f"ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,{flags}"]
    for number in range(4):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        photo = images.resize(coarse, width_px=80, height_px=60)
        (folder / "photos" / f"p{number}.png").write_bytes(images.encode_png(photo))
        lines.append(f"p{number},made,Cat,1,0.05,0.45,0.1,0.6,0,0,0,0,0")
        lines.append(f"p{number},made,Dog,1,0.5,0.95,0.3,0.9,0,0,0,0,0")
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    embedder = Embedder(*load_exemplar_backbone(tiny_model), torch.device("cpu"), str(tiny_model))
    file = folder / "made.index"
    build_from_folder(file, Store(str(folder / "store")), str(folder / "photos"), str(folder / "boxes.csv"), embedder)
    return file


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, damaged_model: Path, index_file: Path
) -> Iterator[Server]:
    server = start(
        tmp_path_factory.mktemp("server"), "--model", str(tiny_model), str(damaged_model), "--index", str(index_file)
    )
    yield server
    if server.process.poll() is None:
        server.end()
