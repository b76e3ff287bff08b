"""Building an index: what is found in it, and what a stopped, grown, crowded or damaged build leaves."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pbe.cli.__main__ import main
from pbe.data import images
from pbe.gc import PART_STAGES
from pbe.retrieve import build, embed
from pbe.retrieve.build import KIND, Built, Embedder, build_from_folder, build_from_run
from pbe.retrieve.file import open_index
from pbe.retrieve.index import Index
from pbe.store import Store, make_manifest
from tests.retrieve.conftest import HEIGHT_PX, PHOTOS, WIDTH_PX, write_boxes, write_photo


def _built(data: Path, store: Store, embedder: Embedder, name: str = "made.index") -> Built:
    return build_from_folder(data / name, store, str(data / "photos"), str(data / "boxes.csv"), embedder)


def _contents(path: Path) -> list[object]:
    """All but the links of the graph, which depend on when its threads met."""
    contents = open_index(path)
    vectors = np.asarray(contents.graph.get(np.arange(len(contents.graph), dtype=np.uint64)))
    return [contents.photos.to_pylist(), contents.rows.to_pylist(), contents.meta, vectors.tobytes()]


def test_a_build_that_was_stopped_makes_only_the_rest(
    data: Path, store: Store, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _built(data, Store(str(data / "other store")), embedder, "whole.index")
    calls = 0

    def stopped(*given: object) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        return embed.embed(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(build, "embed", stopped)
        with pytest.raises(KeyboardInterrupt):
            _built(data, store, embedder)
    assert not (data / "made.index").exists()
    rest = _built(data, store, embedder)
    assert rest.parts == whole.parts and rest.parts_made == whole.parts - 4
    assert _contents(data / "made.index") == _contents(data / "whole.index")


def test_a_folder_that_has_grown_costs_only_its_new_shards(data: Path, store: Store, embedder: Embedder) -> None:
    before = _built(data, store, embedder)
    write_photo(data / "photos", PHOTOS)
    write_boxes(data / "boxes.csv", PHOTOS + 1)
    after = _built(data, store, embedder)
    assert after.boxes == before.boxes + 2 and after.parts_made == 1


def test_parts_that_gc_removed_are_made_again(data: Path, store: Store, embedder: Embedder) -> None:
    assert KIND in PART_STAGES  # so that `pbe gc` knows the folder
    first = _built(data, store, embedder)
    before = _contents(data / "made.index")
    store.delete_tree(f"parts/{KIND}")
    assert _built(data, store, embedder).parts_made == first.parts
    assert _contents(data / "made.index") == before


def test_two_builds_at_once_both_leave_a_whole_file(data: Path, store: Store, embedder: Embedder) -> None:
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(_built, data, store, embedder) for _ in range(2)]
    assert [future.result().boxes for future in futures] == [2 * PHOTOS] * 2
    assert len(Index.open(data / "made.index", verify=True)) == 2 * PHOTOS
    assert not list(data.glob(".*.tmp"))


def test_nan_is_named_with_its_photo(data: Path, store: Store, embedder: Embedder) -> None:
    assert isinstance(embedder.backbone, torch.nn.Module)
    for parameter in embedder.backbone.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(embed.EmbeddingError, match=r"photo p\d\d, box 0: .* NaN"):
        _built(data, store, embedder)
    assert not (data / "made.index").exists()


def test_boxes_without_photos_are_nothing_to_index(
    data: Path, store: Store, embedder: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    for photo in (data / "photos").iterdir():
        photo.rename(photo.with_name(f"x{photo.name}"))
    with pytest.raises(build.BuildError, match="nothing to index"):
        _built(data, store, embedder)
    assert f"{2 * PHOTOS} boxes whose photos are not in" in capsys.readouterr().out


def test_a_photo_that_does_not_decode_is_left_out_and_said(
    data: Path, store: Store, embedder: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = data / "photos" / "p03.png"
    broken.write_bytes(broken.read_bytes()[:200])
    assert _built(data, store, embedder).boxes == 2 * PHOTOS - 2
    assert "left out: p03.png: image_unreadable" in capsys.readouterr().out


def test_a_runs_boxes_are_those_that_the_filter_kept_and_crops_come_from_its_parts(
    data: Path, store: Store, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    [*shards] = build._folder_shards(store, str(data / "photos"), str(data / "boxes.csv"), embedder)
    pairs = [pair for shard in shards if shard.rows for pair in shard.tables]
    photos = pa.concat_tables([photos.drop_columns(["address"]) for photos, _ in pairs])
    kept = pa.concat_tables([boxes for _, boxes in pairs]).filter(pa.compute.field("label_name") == "Car")
    ingested = store.write_unit("ingest", "s0000-a", {"images": photos}, counts={}, rows_per_group=5)
    filtered = store.write_unit("filter", "s0000-b", {"boxes": kept}, counts={})
    photos_of, boxes_of = (make_manifest("-", config={}, version=1, units=[record]) for record in (ingested, filtered))
    build_from_run(data / "run.index", store, photos_of, boxes_of, embedder)
    monkeypatch.setenv("PBE_STORAGE", store.uri)
    index = Index.open(data / "run.index")
    assert index.labels == {"Car": PHOTOS}
    for hit in index.find(label="Car", k=PHOTOS):  # photos of all three row groups
        photo = images.open_picture(data / "photos" / f"{hit.image_id}.png").upright()
        x0, y0, x1, y1 = (round(end * side) for end, side in zip(hit.box, (WIDTH_PX, HEIGHT_PX) * 2, strict=True))
        assert np.array_equal(index.crop_of(hit), photo[max(0, y0 - 10) : y1 + 10, max(0, x0 - 10) : x1 + 10])


def test_a_damaged_part_says_what_makes_it_again(
    data: Path, store: Store, clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    monkeypatch.setenv("PBE_STORAGE", store.uri)
    command = ["index", "--photos", "photos", "--boxes", "boxes.csv", "--model", str(clip)]
    assert main(command) == 0
    path = next(Path(store.path(f"parts/{KIND}")).glob("*/rows.parquet"))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert main(command) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert str(path) in line and line.endswith("delete its folder; `pbe index` makes it again")
