"""Finding exemplars: against brute force and CLIP itself, and what is said of damage and of wrong questions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel

from pbe.cli.__main__ import main
from pbe.cli.find import _json_lines
from pbe.data import images
from pbe.errors import printable
from pbe.model.clip import MEAN, STD
from pbe.retrieve import index as index_module
from pbe.retrieve.build import Embedder, build_from_folder
from pbe.retrieve.embed import FindError
from pbe.retrieve.file import MAGIC, IndexFileError
from pbe.retrieve.index import Hit, Index
from pbe.store import Store
from tests.retrieve.conftest import CLASSES, PHOTOS, embedder_of

CROP = images.resize(np.random.default_rng(99).integers(0, 256, (4, 5, 3), np.uint8), width_px=50, height_px=40)


@pytest.fixture
def index(data: Path, store: Store, embedder: Embedder) -> Index:
    build_from_folder(data / "made.index", store, str(data / "photos"), str(data / "boxes.csv"), embedder)
    return Index.open(data / "made.index")


def _unit(pictures: list[np.ndarray], clip: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Class tokens and projections of transformers' own model."""
    squares = np.stack([images.resize(picture, width_px=28, height_px=28) for picture in pictures])
    pixels = (torch.from_numpy(squares).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(
        STD
    )[:, None, None]
    network = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        tokens = network.vision_model(pixel_values=pixels).pooler_output
        projected = network.visual_projection(tokens)
    return torch.nn.functional.normalize(tokens), torch.nn.functional.normalize(projected)


def _brute_force(index: Index, clip: Path) -> list[tuple[str, int]]:
    hits = [hit for label in CLASSES for hit in index.find(label=label, k=999, one_per_photo=False)]
    tokens, _ = _unit([CROP, *(index.crop_of(hit) for hit in hits)], clip)
    order = torch.argsort(1 - tokens[1:] @ tokens[0], stable=True)
    return [(hits[number].image_id, hits[number].box_index) for number in order]


def _keys(hits: list[Hit]) -> list[tuple[str, int]]:
    return [(hit.image_id, hit.box_index) for hit in hits]


@pytest.mark.parametrize("exact_rows", [0, 10**6], ids=["graph", "scan"])
def test_the_nearest_are_those_of_brute_force(
    index: Index, clip: Path, exact_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "EXACT_ROWS", exact_rows)
    truth = _brute_force(index, clip)
    assert len(truth) == 2 * PHOTOS
    found = index.find(like=CROP, backbone=index.backbone(), k=8, one_per_photo=False)
    assert _keys(found) == truth[:8]
    first_of_photo = list({key[0]: key for key in reversed(truth)}.values())
    by_photo = index.find(like=CROP, backbone=index.backbone(), k=999)  # more than there are
    assert sorted(_keys(by_photo)) == sorted(first_of_photo)
    assert [hit.distance for hit in by_photo] == sorted(hit.distance for hit in by_photo)


def test_a_crop_of_the_index_finds_itself(index: Index) -> None:
    [hit] = index.find(label="Dog", k=1)
    [found] = index.find(like=index.crop_of(hit), backbone=index.backbone(), k=1)
    assert _keys([found]) == _keys([hit]) and found.distance < 1e-3


def test_a_class_and_a_picture_combine(index: Index) -> None:
    both = index.find(like=CROP, label="dog", backbone=index.backbone(), k=4)
    every = index.find(like=CROP, backbone=index.backbone(), k=999, one_per_photo=False)
    assert _keys(both) == _keys([hit for hit in every if hit.label_name == "Dog"][:4])


def test_an_unknown_class_names_the_closest(index: Index) -> None:
    with pytest.raises(FindError, match=r"no box of class doge; the closest are Dog"):
        index.find(label="doge")
    with pytest.raises(FindError, match=r"no box of class xyzzy; there are Car, Cat, Dog"):
        index.find(label="xyzzy")


def test_words_are_compared_as_clip_does(index: Index, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = CLIPModel.from_pretrained(clip).eval()
    tokens = AutoTokenizer.from_pretrained(clip)(["a red car"], return_tensors="pt")
    hits = index.find_text("a red car", k=999, one_per_photo=False)
    _, projected = _unit([index.crop_of(hit) for hit in hits], clip)
    with torch.no_grad():
        words = torch.nn.functional.normalize(
            network.text_projection(network.text_model(**tokens).pooler_output).float()
        )
    np.testing.assert_allclose([hit.distance for hit in hits], 1 - (projected @ words[0]).numpy(), atol=2e-3)
    monkeypatch.setattr(index_module, "EXACT_ROWS", 0)  # candidates from the graph, here all boxes
    assert _keys(index.find_text("a red car", k=5)) == _keys(_best_of_photos(hits)[:5])


def _best_of_photos(hits: list[Hit]) -> list[Hit]:
    seen: dict[str, Hit] = {}
    for hit in hits:
        seen.setdefault(hit.image_id, hit)
    return list(seen.values())


def test_words_need_a_text_tower(data: Path, store: Store, clip: Path, index: Index) -> None:
    (data / "blind").mkdir()
    tensors = load_file(clip / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if name.startswith("vision_model")}
    save_file(kept, data / "blind" / "model.safetensors")
    (data / "blind" / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(FindError, match=r"made with backbone clip .* but .*blind has clip"):
        index.find_text("a red car", model=data / "blind")
    where = str(data / "photos"), str(data / "boxes.csv")
    build_from_folder(data / "blind.index", store, *where, embedder_of(data / "blind"))
    with pytest.raises(FindError, match="lacks the text tower"):
        Index.open(data / "blind.index").find_text("a red car")


def test_another_backbone_is_refused_with_both_names(index: Index, other_clip: Path) -> None:
    made_with = index.meta["backbone"]
    with pytest.raises(FindError, match=f"made with backbone {made_with}, but .* has clip "):
        index.backbone(other_clip)


@pytest.mark.parametrize("keep_frac", [0.0, 0.3, 0.99])
def test_a_truncated_index_is_one_line(index: Index, data: Path, keep_frac: float) -> None:
    whole = (data / "made.index").read_bytes()
    (data / "short.index").write_bytes(whole[: int(keep_frac * len(whole))])
    with pytest.raises(IndexFileError, match=r"short\.index: not a whole index \([^\n]*\); `pbe index"):
        Index.open(data / "short.index")


def test_other_files_and_versions_are_no_index(index: Index, data: Path) -> None:
    with pytest.raises(IndexFileError, match="does not end like one"):
        Index.open(data / "boxes.csv")
    later = (data / "made.index").read_bytes()[:-1] + b"9"
    assert later[-8:-1] == MAGIC[:-1]
    (data / "later.index").write_bytes(later)
    with pytest.raises(IndexFileError, match="another version's format"):
        Index.open(data / "later.index")


@pytest.mark.parametrize("place", [200, 0.5, -300], ids=["graph", "tables", "footer"])
def test_a_flipped_bit_is_found(index: Index, data: Path, place: float) -> None:
    damaged = bytearray((data / "made.index").read_bytes())
    at = int(place * len(damaged)) if 0 < place < 1 else int(place)
    damaged[at] ^= 1
    (data / "damaged.index").write_bytes(damaged)
    with pytest.raises(IndexFileError, match=r"differs? from (its|their) sha256"):
        Index.open(data / "damaged.index")


def test_the_command_lists_writes_and_says_what_is_gone(
    data: Path, store: Store, clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    monkeypatch.setenv("PBE_STORAGE", store.uri)
    assert main(["index", "--photos", "photos", "--boxes", "boxes.csv", "--model", str(clip), "--out", "a.index"]) == 0
    assert f"{2 * PHOTOS} boxes of {PHOTOS} photos" in capsys.readouterr().out
    (data / "crop.png").write_bytes(images.encode_png(CROP))
    find = ["find", "--index", "a.index", "--like", "crop.png", "--like-box", "5,5,40,30"]
    assert main([*find, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 12 and {"image_id", "box", "distance", "label_name", "license", "author"} <= set(rows[0])

    (data / "photos" / f"{rows[0]['image_id']}.png").unlink()
    (data / "photos" / f"{rows[1]['image_id']}.png").write_bytes(images.encode_png(CROP))
    assert main([*find, "--sheet", "sheet.png", "--out", "crops"]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 + 12  # the table has them all
    assert f"photo {rows[0]['image_id']}: its crop cannot be cut" in said.err
    assert f"photo {rows[1]['image_id']}: its crop cannot be cut: the file is another one" in said.err
    assert [path.name[:3] for path in sorted((data / "crops").iterdir())] == [f"{rank:03d}" for rank in range(3, 13)]
    assert images.open_picture(data / "sheet.png").header.width_px > 500

    (data / "photos").rename(data / "moved")
    assert main([*find, "--sheet", "none.png"]) == 1
    assert "none of the 12 crops can be cut, so no picture was written" in capsys.readouterr().err
    assert main(["find", "--index", "a.index"]) == 1
    assert "say what to find" in capsys.readouterr().err


def test_json_is_json_whatever_an_author_is_called(index: Index) -> None:
    """A soft hyphen and the tag letters of a flag: a terminal gets them escaped, in JSON's own way."""
    hit = replace(index.find(label=next(iter(index.labels)), k=1)[0], author="Jos\u00ad\U000e0067")
    [line] = _json_lines([hit])
    assert json.loads(printable(line))["author"] == hit.author
