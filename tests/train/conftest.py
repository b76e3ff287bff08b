"""Encoded rows to train on, and the loss curve that every way of training on them must have."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pbe.store import Manifest, Store
from tests.train.golden import straight_curve
from tests.train.ranks import end_ranks, tiny_encoded


@pytest.fixture(scope="module", autouse=True)
def ranks_of_the_module() -> Iterator[None]:
    """Each file has its own, started once unless one of its tests ends them."""
    yield
    end_ranks()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store, Manifest]:
    """A folder for the ranks, and a storage with encoded rows; runs in it need names of their own."""
    folder = tmp_path_factory.mktemp("train")
    store = Store(str(folder / "store"))
    return folder, store, tiny_encoded(store)


@pytest.fixture(scope="session")
def golden(place: tuple[Path, Store, Manifest]) -> list[float]:
    """Stage 0 on one rank: no sharding, no communication."""
    return straight_curve(*place)
