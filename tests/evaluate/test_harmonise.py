"""Harmonisation by networks of files: real TorchScript and torch.export files, and what breaks the contract."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pbe.evaluate.bench.baselines import composite, copy_paste
from pbe.evaluate.rivals.fill import FillTask, RivalError
from pbe.evaluate.rivals.harmonise import Harmonise
from pbe.evaluate.rivals.weights import open_rival, store_rival
from pbe.evaluate.settings import HarmoniseBaseline
from pbe.model.tensors import WeightsError
from pbe.store import Store
from tests.tiny_weights import harmoniser

SIDE_PX = 32
CPU = torch.device("cpu")


class Odd(nn.Module):
    """What `how` says is wrong with its image."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, composite: Tensor, mask: Tensor) -> Tensor:
        if self.how == "nan":
            return composite + float("nan")
        if self.how == "bytes":
            return composite * 255
        if self.how == "half":
            return composite[:, :, ::2, ::2]
        if self.how == "transparent":
            return torch.cat([composite, mask], 1)
        return composite


def _scripted(path: Path, network: nn.Module) -> Path:
    torch.jit.script(network).save(str(path))
    return path


def _exported(path: Path, network: nn.Module) -> Path:
    shapes = torch.zeros(1, 3, SIDE_PX, SIDE_PX), torch.zeros(1, 1, SIDE_PX, SIDE_PX)
    torch.export.save(torch.export.export(network, shapes), path)
    return path


def _opened(tmp_path: Path, file: Path, sha256: str | None = None) -> Harmonise:
    """As the stage does: copied to the storage, opened from there."""
    sha256 = sha256 or hashlib.sha256(file.read_bytes()).hexdigest()
    cfg = HarmoniseBaseline(kind="harmonise", file=str(file), sha256=sha256, license="none")
    store = Store(str(tmp_path / "store"))
    weights = store_rival(store, cfg)
    assert store_rival(store, cfg) == weights
    rival = open_rival(store, cfg, weights, CPU)
    assert isinstance(rival, Harmonise)
    return rival


def _task(*, object_mask: bool = False, side_px: int = SIDE_PX) -> FillTask:
    rng = np.random.default_rng(0)
    hole_mask, shown = np.zeros((side_px, side_px), np.uint8), np.zeros((12, 10), np.uint8)
    hole_mask[5:20, 8:26], shown[3:9, 2:8] = 1, 1
    source, reference = (rng.integers(0, 256, size).astype(np.uint8) for size in ((side_px, side_px, 3), (12, 10, 3)))
    return FillTask(source, hole_mask, reference, "", 0, shown if object_mask else None)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("write", [_scripted, _exported])
def test_the_hole_is_filled_by_the_network_and_nothing_else_changes(tmp_path: Path, write: object) -> None:
    network = harmoniser()
    rival = _opened(tmp_path, write(tmp_path / "network", network))  # type: ignore[operator]
    for task in (_task(), _task(object_mask=True)):
        [edit] = rival([task])
        assert edit is not None and edit.dtype == np.uint8
        hole = task.hole_mask != 0
        np.testing.assert_array_equal(edit[~hole], task.source[~hole])
        picture, lies = composite(task.source, task.hole_mask, task.reference, task.object_mask)
        image, mask = torch.from_numpy(picture / 255).permute(2, 0, 1)[None].float(), torch.from_numpy(lies)[None, None]
        wanted = network(image, mask.float())[0].permute(1, 2, 0).detach().numpy() * 255
        assert np.abs(edit.astype(float) - wanted)[hole].max() <= 0.51
    hidden = FillTask(np.where(hole[..., None], 255 - task.source, task.source), *_rest(task))
    np.testing.assert_array_equal(rival([hidden])[0], edit)


def _rest(task: FillTask) -> tuple[np.ndarray, np.ndarray, str, int, np.ndarray | None]:
    return task.hole_mask, task.reference, task.label_name, task.seed, task.object_mask


def test_a_network_that_changes_nothing_pastes(tmp_path: Path) -> None:
    task = _task()
    [edit] = _opened(tmp_path, _scripted(tmp_path / "same.pt", Odd("")))([task])
    np.testing.assert_array_equal(edit, copy_paste(task.source, task.hole_mask, task.reference))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", r"its image has values from nan to nan, expected 0 to 1"),
        ("bytes", r"its image has values from \d+ to 255, expected 0 to 1"),
        ("half", r"makes \(1, 3, 16, 16\), expected an image \(1, 3, 32, 32\)"),
        ("transparent", r"makes \(1, 4, 32, 32\), expected an image"),
    ],
)
def test_a_network_that_breaks_the_contract_is_named(tmp_path: Path, how: str, message: str) -> None:
    rival = _opened(tmp_path, _scripted(tmp_path / "odd.pt", Odd(how)))
    with pytest.raises(RivalError, match=rf"odd\.pt: .*{message}"):
        rival([_task()])


@pytest.mark.timeout(120)
def test_a_network_exported_for_another_size_is_named(tmp_path: Path) -> None:
    rival = _opened(tmp_path, _exported(tmp_path / "network.pt2", harmoniser()))
    with pytest.raises(RivalError, match=r"network\.pt2: it fails on a composite \(1, 3, 48, 48\) and a mask"):
        rival([_task(side_px=48)])


def test_a_file_is_opened_only_for_its_hash_and_only_as_code(tmp_path: Path) -> None:
    file = _scripted(tmp_path / "network.pt", harmoniser())
    with pytest.raises(WeightsError, match=r"network\.pt: its SHA-256 is \w+, params\.yaml expects 0000"):
        _opened(tmp_path, file, "0" * 64)
    with pytest.raises(WeightsError, match=r"none\.pt: cannot be read"):
        _opened(tmp_path, tmp_path / "none.pt", "0" * 64)
    other = tmp_path / "other.pt"
    torch.save(harmoniser().state_dict(), other)
    with pytest.raises(WeightsError, match=r"other\.pt: neither a TorchScript nor .*: weights without code"):
        _opened(tmp_path, other)
    other.write_text("<html>Not found</html>")
    with pytest.raises(WeightsError, match=r"other\.pt: neither a TorchScript nor .*: a web page"):
        _opened(tmp_path, other)
    damaged = harmoniser()
    damaged.convolution.weight.data[0] = float("nan")
    with pytest.raises(WeightsError, match=r"NaN or infinite values, such as convolution\.weight"):
        _opened(tmp_path, _scripted(tmp_path / "damaged.pt", damaged))
