"""Encoded rows to train on, and the loss curve that every training on them must reproduce."""

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
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store, Manifest]:
    """A folder for the ranks, and a storage with encoded rows; tests share it, so each needs its own run names."""
    folder = tmp_path_factory.mktemp("train")
    store = Store(str(folder / "store"))
    return folder, store, tiny_encoded(store)


@pytest.fixture(scope="session")
def golden(place: tuple[Path, Store, Manifest]) -> list[float]:
    """Stage 0 on one rank: no sharding, no communication."""
    return straight_curve(*place)
