"""Encoded rows to train on, and the loss curve that every training on them must reproduce."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbe.store import Manifest, Store
from tests.train.golden import straight_curve
from tests.train.ranks import end_ranks, tiny_encoded


@pytest.fixture(scope="module", autouse=True)
def ranks_of_the_module() -> Iterator[None]:
    """Ranks of one test file, restarted only after a test that ends them."""
    yield
    end_ranks()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A folder whose storage has the run `golden`: stage 0 on one rank, no sharding, no communication."""
    folder = tmp_path_factory.mktemp("golden")
    store = Store(str(folder / "store"))
    return folder, straight_curve(folder, store, tiny_encoded(store))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store, Manifest]:
    """A folder for the ranks, and a storage with encoded rows. The tests of a file share it, those of two files do not:
    each run of a file needs its own name."""
    folder = tmp_path_factory.mktemp("train")
    store = Store(str(folder / "store"))
    return folder, store, tiny_encoded(store)


@pytest.fixture(scope="module")
def golden(place: tuple[Path, Store, Manifest], trained: tuple[Path, list[float]]) -> list[float]:
    """The losses of the run `golden`, which is then in the storage of `place` too."""
    folder, losses = trained
    shutil.copytree(folder / "store" / "runs" / "golden", place[0] / "store" / "runs" / "golden")
    return losses
