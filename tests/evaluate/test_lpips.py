"""LPIPS: the original's values with the same weights, and the original's and torchvision's files, read without them."""

import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pbe.data.schema import LpipsNet
from pbe.errors import UserError
from pbe.evaluate.features.lpips import load_lpips
from pbe.evaluate.features.weights import ExtractorError, open_lpips, store_lpips
from pbe.evaluate.metrics.background import fill_hole
from pbe.evaluate.settings import LpipsConfig
from pbe.store import Store
from tests.tiny_weights import write_lpips

# by lpips 0.1.4 (its forward with normalize=True) on `_pairs`, with the weights of `write_lpips` and torch 2.13
ORIGINAL = {
    "alex": (0.8557143211364746, 0.8518370389938354, 0.009708533994853497),
    "vgg": (0.48914438486099243, 0.49148204922676086, 0.009052356705069542),
}


def _pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    a, b, c, d = (rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((64, 64),) * 2 + ((96, 70),) * 2)
    return [(a, b), (c, d), (a, np.clip(a.astype(int) + 8, 0, 255).astype(np.uint8))]


def _tensor(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[LpipsNet, tuple[Path, Path]]:
    """Backbone and heads of each network."""
    folder = tmp_path_factory.mktemp("lpips")
    return {net: write_lpips(folder, net) for net in get_args(LpipsNet)}


@pytest.fixture
def alex(files: dict[LpipsNet, tuple[Path, Path]]) -> tuple[Path, Path]:
    return files["alex"]


@pytest.mark.parametrize("net", get_args(LpipsNet))
def test_it_is_the_originals(net: LpipsNet, files: dict[LpipsNet, tuple[Path, Path]]) -> None:
    lpips = load_lpips(net, *files[net])
    for (one, other), expected in zip(_pairs(), ORIGINAL[net], strict=True):
        found = lpips(_tensor(one, other, one))
        assert float(found[0]) == pytest.approx(expected, abs=1e-4)
        assert float(found[1]) == 0


def test_background_and_hole_are_told_apart(alex: tuple[Path, Path]) -> None:
    lpips, hole_mask = load_lpips("alex", *alex), np.zeros((64, 64), np.uint8)
    hole_mask[10:40, 20:60] = 1
    photo, other = _pairs()[0]
    assert lpips.of_edit(photo, photo, hole_mask) == (0, 0)
    background, hole = lpips.of_edit(fill_hole(photo, other, hole_mask), photo, hole_mask)
    assert background == 0 and hole > 0.05
    edit = fill_hole(other, photo, hole_mask)
    alone = lpips.of_edit(edit, photo, hole_mask)
    np.testing.assert_allclose(alone, [float(lpips(_tensor(photo, edit))), 0], atol=1e-6)
    np.testing.assert_allclose(lpips.of_edit(other, photo, hole_mask), [alone[0], hole], atol=1e-6)


@pytest.mark.parametrize(("net", "least_px"), [("alex", 31), ("vgg", 16)])
def test_the_least_size_is_the_networks(net: LpipsNet, least_px: int, files: dict[LpipsNet, tuple[Path, Path]]) -> None:
    lpips = load_lpips(net, *files[net])
    for side in (least_px, least_px - 1):
        photo, hole_mask = np.zeros((side, side + 9, 3), np.uint8), np.zeros((side, side + 9), np.uint8)
        hole_mask[2:5, 2:5] = 1
        edit = np.full_like(photo, 200)
        if side == least_px:
            assert all(np.isfinite(lpips.of_edit(edit, photo, hole_mask)))
        else:
            with pytest.raises(UserError, match=rf"evaluate\.lpips: {net} takes pictures of {least_px} px or more"):
                lpips.of_edit(edit, photo, hole_mask)


def test_weights_are_stored_by_content_whatever_their_file(alex: tuple[Path, Path], tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    entry = store_lpips(store, _config(*map(str, alex)))
    opened = open_lpips(store, entry)
    assert opened.digest == entry["digest"] and entry["digest"] in entry["path"]
    photo, other = _pairs()[0]
    assert float(opened(_tensor(photo, other))) == pytest.approx(ORIGINAL["alex"][0], abs=1e-4)
    folder = tmp_path / "folder"  # as on the hub
    folder.mkdir()
    save_file(torch.load(alex[0], weights_only=True), folder / "model.safetensors")
    assert store_lpips(store, _config(str(folder), str(alex[1]))) == entry


def test_wrong_files_are_named_with_their_key(alex: tuple[Path, Path], tmp_path: Path) -> None:
    store, (backbone, heads) = Store(str(tmp_path)), map(str, alex)
    with pytest.raises(ExtractorError, match=r"evaluate\.lpips: .*nowhere\.pth: no such file"):
        store_lpips(store, _config("nowhere.pth", heads))
    with pytest.raises(ExtractorError, match=r"evaluate\.lpips: .*alex\.pth: .* unexpected 11 such as classifier"):
        store_lpips(store, _config(backbone, backbone))
    with pytest.raises(ExtractorError, match=r"evaluate\.lpips: .*heads\.pth: .* missing 10 such as features\.0\.bias"):
        store_lpips(store, _config(heads, heads))
    with pytest.raises(ExtractorError, match=r"evaluate\.lpips\.heads: .*no model\.safetensors"):
        store_lpips(store, _config(backbone, str(tmp_path)))
    tensors = torch.load(heads, weights_only=True)
    tensors["lin2.model.1.weight"][0, 3] = float("nan")
    torch.save(tensors, tmp_path / "nan.pth")
    with pytest.raises(ExtractorError, match=r"nan\.pth: 1 of 5 tensors have NaN"):
        store_lpips(store, _config(backbone, str(tmp_path / "nan.pth")))
    shutil.copy(heads, tmp_path / "half.pth")
    with (tmp_path / "half.pth").open("r+b") as stream:
        stream.truncate(2000)
    with pytest.raises(ExtractorError, match=r"evaluate\.lpips: .*half\.pth: damaged or incomplete"):
        store_lpips(store, _config(backbone, str(tmp_path / "half.pth")))


def _config(backbone: str, heads: str) -> LpipsConfig:
    return LpipsConfig(net="alex", backbone=backbone, heads=heads)
