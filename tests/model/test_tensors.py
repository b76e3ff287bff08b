"""Weight files: tensors are read, code is not run, and any other file gives one line that names it."""

import json
import pickle
import resource
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pbe.errors import UserError
from pbe.model.tensors import WeightsError, folder_digest, load_strictly, read_folder, read_tensors, weight_files

STATE = OrderedDict(
    {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(3, dtype=torch.float16),
        "b": nn.Parameter(torch.zeros(2)),
        "steps": torch.tensor(7),
        "view": torch.arange(10.0)[4:8],
    }
)


def _same(got: dict[str, Tensor]) -> None:
    assert got.keys() == STATE.keys()
    assert all(torch.equal(got[name], STATE[name]) and got[name].dtype == STATE[name].dtype for name in got)
    assert not any(value.requires_grad for value in got.values())


@pytest.fixture
def lightning() -> Iterator[type]:
    """A class that only the writing process knows, like Lightning's callbacks in the official file."""
    module = types.ModuleType("pytorch_lightning_like")

    class ModelCheckpoint(dict):
        def __init__(self, path: str = "") -> None:
            self.path = path

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield ModelCheckpoint
    sys.modules.pop(module.__name__, None)


class _Attack:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (exec, (f"import pathlib; pathlib.Path({str(self.target)!r}).touch()",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".safetensors"])
def test_tensors_come_out_as_they_are(suffix: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({name: value.detach().contiguous().clone() for name, value in STATE.items()}, path)
    else:
        torch.save(
            {"state_dict": STATE, "epoch": 3} if suffix == ".ckpt" else STATE,
            path,
            _use_new_zipfile_serialization=zipped,
        )
    _same(read_tensors(path))


def test_a_checkpoint_with_foreign_objects_gives_its_tensors_without_their_classes(
    lightning: type, tmp_path: Path
) -> None:
    callback = lightning("somewhere")
    callback["best"] = 3
    extra = {"callbacks": {lightning: callback, "list": [callback]}, "hyper": types.SimpleNamespace(lr=1e-5)}
    torch.save({"state_dict": STATE, **extra}, tmp_path / "last.ckpt")
    del sys.modules[lightning.__module__]  # the reader has no Lightning
    _same(read_tensors(tmp_path / "last.ckpt"))
    assert lightning.__module__ not in sys.modules


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["beside", "inside", "alone"])
def test_code_in_a_pickle_is_not_executed(where: str, zipped: bool, tmp_path: Path) -> None:
    attack, path = _Attack(tmp_path / "owned"), tmp_path / "weights.ckpt"
    held = {
        "beside": {"state_dict": STATE, "x": attack},
        "inside": {"state_dict": {**STATE, "x": attack}},
        "alone": attack,
    }
    torch.save(held[where], path, _use_new_zipfile_serialization=zipped)
    if where == "alone" or not zipped:
        with pytest.raises(WeightsError, match="no tensors in it" if zipped else "holds Python objects that torch's"):
            read_tensors(path)
    else:
        _same(read_tensors(path))
    assert not (tmp_path / "owned").exists()
    torch.load(path, weights_only=False)  # proves that the attack works
    assert (tmp_path / "owned").exists()


def test_a_plain_pickle_is_not_executed_either(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(pickle.dumps(_Attack(tmp_path / "owned"), protocol=2))
    with pytest.raises(WeightsError, match=r"weights\.bin"):
        read_tensors(tmp_path / "weights.bin")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_large_memo_index_takes_no_memory(zipped: bool, tmp_path: Path) -> None:
    """Python's C unpickler allocates 16 bytes for each index up to the largest."""
    path = tmp_path / "weights.ckpt"
    pickled = pickle.PROTO + b"\x02}" + pickle.LONG_BINPUT + (2**31 - 1).to_bytes(4, "little") + pickle.STOP
    if zipped:
        torch.save({}, path)
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "other", "w") as other:
            for name in whole.namelist():
                other.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
        (tmp_path / "other").rename(path)
    else:
        path.write_bytes(pickled)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=r"weights\.ckpt"):
        read_tensors(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.ckpt"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "directory", "nothing", "no tensors"])
def test_what_is_no_weight_file_is_one_line_that_names_it(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file({"a": torch.arange(1000.0)}, path)
    else:
        torch.save({"a": torch.arange(1000.0)}, path)
    data = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage == "no tensors" and not name.endswith("safetensors"):
        torch.save({"state_dict": {"a": 3}}, path)
    elif damage != "nothing":
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"<!DOCTYPE html>"}.get(damage, b"\x08"))
    with pytest.raises(WeightsError) as caught:
        read_tensors(path)
    assert isinstance(caught.value, UserError) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_shards_are_joined_and_safetensors_come_before_pickles(tmp_path: Path) -> None:
    parts = [dict(list(STATE.items())[:2]), dict(list(STATE.items())[2:])]
    names = ["model-1.bin", "model-2.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, tmp_path / name)
    index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (tmp_path / "model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    _same(read_folder(tmp_path, "other", "model"))
    before = folder_digest(tmp_path, "model")
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.bin")
    assert [path.name for path in weight_files(tmp_path, "model")] == ["model.bin"]
    save_file({"b": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert read_folder(tmp_path, "model").keys() == {"b"} and folder_digest(tmp_path, "model") != before
    with pytest.raises(WeightsError, match=r"no other\.safetensors and no other\.bin"):
        read_folder(tmp_path, "other")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": "../../secret.bin"}}'])
def test_an_index_that_is_none_or_leaves_its_folder_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"model\.bin\.index\.json"):
        read_folder(tmp_path, "model")


def test_loading_names_what_is_missing_unexpected_and_misshapen() -> None:
    module, good = nn.Linear(3, 2), {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    load_strictly(module, good, "here")
    assert module(torch.ones(1, 3)).tolist() == [[4.0, 4.0]]
    with pytest.raises(WeightsError, match=r"^here: .* missing 1 such as bias; unexpected 1 such as more; .* weight$"):
        load_strictly(module, {"weight": torch.zeros(3, 2), "more": torch.zeros(1)}, "here")
    assert module.weight.sum() == 6  # nothing was loaded in part
