"""Weight files: tensors are read, code is not run, and any other file gives one line that names it."""

import json
import pickle
import random
import sys
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pbe.errors import UserError
from pbe.model.tensors import (
    WeightsError,
    folder_digest,
    load_strictly,
    read_folder,
    read_tensors,
    refuse_non_finite,
    weight_files,
)
from tests.memory import in_memory_of

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
    if where == "alone":
        with pytest.raises(WeightsError, match="no tensors in it"):
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


FORMATS = ["safetensors", "zip", "legacy"]


def _written(path: Path, kind: str, **extra: object) -> Path:
    if kind == "safetensors":
        save_file({name: value.detach().contiguous().clone() for name, value in STATE.items()}, path)
    else:
        torch.save({"state_dict": STATE, **extra}, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_a_changed_byte_takes_no_memory_and_is_one_line(kind: str, tmp_path: Path) -> None:
    path = _written(tmp_path / "w.ckpt", kind, optimizer={"state": {0: {"exp_avg": torch.zeros(5)}}})
    whole, rng, silent, messages = path.read_bytes(), random.Random(0), 0, []
    with in_memory_of(1 << 28):
        for _ in range(400):
            data = bytearray(whole)
            data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
            try:
                read = read_tensors(path)
            except WeightsError as error:
                messages.append(str(error))
            else:
                silent += any(not torch.equal(value, STATE.get(name, value)) for name, value in read.items())
    assert len(messages) > 50 and all(text.startswith(f"{path}: ") and "\n" not in text for text in messages)
    assert kind != "zip" or not silent  # only a zip has checksums; torch does not compare them


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize(
    "made",
    [
        (torch.Tensor, (1 << 18, 1 << 18)),
        (bytearray, (1 << 36,)),
        (torch._utils._rebuild_tensor_v2, (torch.zeros(2)._typed_storage(), 0, (1 << 36,), (1,), False, OrderedDict())),
        (torch._utils._rebuild_tensor_v2, (torch.zeros(2)._typed_storage(), 0, (1 << 36,), (0,), False, OrderedDict())),
        (torch._utils._rebuild_tensor_v2, (torch.zeros(2)._typed_storage(), 1 << 36, (1,), (1,), False, OrderedDict())),
    ],
    ids=["constructor", "bytearray", "size", "expanded", "offset"],
)
def test_what_torch_would_allocate_is_not_allocated(made: tuple[Any, ...], kind: str, tmp_path: Path) -> None:
    path = _written(tmp_path / "w.ckpt", kind, more=_Made(made))
    with in_memory_of(1 << 28):
        _same(read_tensors(path))
        torch.save({"a": _Made(made)}, path, _use_new_zipfile_serialization=kind == "zip")
        with pytest.raises(WeightsError, match=r"w\.ckpt: (no tensors in it|damaged or incomplete)"):
            read_tensors(path)


class _Made:
    """Unpickling it calls made[0](*made[1])."""

    def __init__(self, made: tuple[Any, ...]) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".bin", ".pt", ""])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_content_decides_whatever_the_suffix(kind: str, suffix: str, tmp_path: Path) -> None:
    _same(read_tensors(_written(tmp_path / f"w{suffix}", kind)))


@pytest.mark.parametrize(
    "held",
    [
        {"model": STATE, "step": torch.tensor(3)},
        {"module": STATE, "optimizer": {"state": {"a": {"exp_avg": torch.zeros(2)}}}, "ds_version": "0.19"},
        {"model_ema": STATE, "model": STATE, "epoch": 2},
        {"net": {"state_dict": STATE, "shadow": {"a": torch.zeros(9)}}},
        {"ema": STATE, "config": {"width": 3}},
        {f"module.{name}": value for name, value in STATE.items()},
        {"state_dict": {f"_orig_mod.{name}": value for name, value in STATE.items()}},
    ],
    ids=["model", "DeepSpeed", "model and EMA", "two keys below", "EMA alone", "data parallel", "compiled"],
)
def test_tensors_are_found_below_the_keys_that_trainers_use(held: object, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "w.ckpt")
    _same(read_tensors(tmp_path / "w.ckpt"))


def test_of_several_mappings_none_is_guessed(tmp_path: Path) -> None:
    torch.save({"teacher": STATE, "student": STATE}, tmp_path / "w.ckpt")
    with pytest.raises(WeightsError, match="its tensors are below student, teacher, and none"):
        read_tensors(tmp_path / "w.ckpt")
    torch.save(nn.Linear(2, 2), tmp_path / "w.ckpt")
    with pytest.raises(WeightsError, match="a whole module is pickled in it"):
        read_tensors(tmp_path / "w.ckpt")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4265437280\n"


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
        (b'{"error": "Repository not found"}', "text file that begins with"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\x08\x07\x12\x07pytorch\x1a\x05", "an ONNX model"),
        (b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file"),
        (b"\x1f\x8b\x08\0", "compressed by gzip"),
        (bytes(4096), "an unfinished download"),
        (b"", "empty"),
        (pickle.dumps({"a": np.zeros(3)}, protocol=4), "a pickle that torch.save did not write"),
        ((20_000).to_bytes(8, "little") + b'{"a":', "damaged or incomplete weight file"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_what_is_no_weight_file_is_told_by_its_content(content: bytes, words: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=words) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_archives_that_are_no_weights_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        archive.add(tmp_path / "w.npz", "storages")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    torch.save(STATE, tmp_path / "w.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "w.ckpt") as whole,
        zipfile.ZipFile(tmp_path / "w.zip", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    for name, words in (
        ("w.npz", "zip archive without data.pkl"),
        ("w.tar", "a tar archive"),
        ("w.pt", "a TorchScript program"),
        ("w.zip", "is compressed"),
    ):
        with pytest.raises(WeightsError, match=words):
            read_tensors(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.int64, torch.bool, torch.complex64], ids=str
)
def test_every_type_of_number_is_read(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    value = torch.tensor([[1, 0, 2], [3, 1, 0]]).to(dtype)
    torch.save({"a": value, "t": value.T}, tmp_path / "w.pt", _use_new_zipfile_serialization=kind == "zip")
    read = read_tensors(tmp_path / "w.pt")
    assert read["a"].dtype == dtype and read["a"].tolist() == value.tolist() and read["t"].tolist() == value.T.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2], ids=str
)
def test_tensors_that_are_not_finite_are_named(bad: float, dtype: torch.dtype) -> None:
    tensors = {"fine": torch.ones(3), "n": torch.tensor(3), "bad.weight": torch.tensor([1.0, bad, 2.0]).to(dtype)}
    with pytest.raises(WeightsError, match=r"^here: 1 of 3 tensors have NaN or infinite values, such as bad\.weight"):
        refuse_non_finite(tensors, "here")
    refuse_non_finite({"empty": torch.empty(0), "max": torch.tensor(torch.finfo(torch.float32).max)}, "here")


def test_a_float64_that_overflows_in_float32_is_not_finite() -> None:
    with pytest.raises(WeightsError, match="such as a"):
        refuse_non_finite({"a": torch.tensor([1e300], dtype=torch.float64)}, "here")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (["model.fp16.bin", "model.bf16.safetensors"], ["model.fp16.bin"]),
        (["model.bin", "model.fp16.safetensors"], ["model.bin"]),
        (["model.safetensors.index.fp16.json"], ["model.fp16-1.safetensors"]),
        (["model.fp16.safetensors.index.json"], ["model.fp16-1.safetensors"]),
        (["pytorch_model.fp16.bin"], ["pytorch_model.fp16.bin"]),
    ],
)
def test_a_copy_in_half_precision_is_read_where_there_is_no_other(
    names: list[str], wanted: list[str], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": "model.fp16-1.safetensors"}}))
    assert [path.name for path in weight_files(tmp_path, "model", "pytorch_model").files] == wanted


def test_other_variants_are_not_guessed_but_named(tmp_path: Path) -> None:
    (tmp_path / "model.non_ema.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"no model\.safetensors .* only model\.non_ema\.safetensors; rename"):
        read_folder(tmp_path, "model")


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
    assert [path.name for path in weight_files(tmp_path, "model").files] == ["model.bin"]
    save_file({"b": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert read_folder(tmp_path, "model").keys() == {"b"} and folder_digest(tmp_path, "model") != before
    with pytest.raises(WeightsError, match=r"no other\.safetensors and no other\.bin"):
        read_folder(tmp_path, "other")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
    + [
        json.dumps({"weight_map": {"a": name}})
        for name in ("../../secret.bin", "/etc/passwd", "..", ".", "", "a/b.bin", "a\0b")
    ],
)
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


def test_a_network_without_memory_is_only_compared() -> None:
    """torch would warn of every tensor, which filled the log of each fine-tuning."""
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_strictly(module, {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "here")
    with pytest.raises(WeightsError, match="missing 1 such as bias"):
        load_strictly(module, {"weight": torch.ones(2, 3)}, "here")
