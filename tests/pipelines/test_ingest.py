"""ingest over a real HTTP server that misbehaves: what is asked for, what is asked for again, what is selected."""

import copy
import json
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pbe.config import Params
from pbe.data import images
from pbe.data.download import PhotoError
from pbe.data.files import SourceError
from pbe.data.rng import shard_of
from pbe.data.sources import FolderSource
from pbe.gc import used_paths
from pbe.settings import TaskResources
from pbe.store import File, Manifest, Record, Store, load_manifest
from pipelines import ingest
from pipelines.runtime.parts import Unit
from pipelines.runtime.stage import Stage, StageError
from tests.profiles import profile_mapping

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = profile_mapping("tiny")
HEADER = "ImageID,LabelName,XMin,XMax,YMin,YMax"
COUNT = 24
IDS = [f"{number:016x}" for number in range(COUNT)]
BUSY, UNPUBLISHED, PAGE, LARGE, BUSY_TOO = (IDS[index] for index in (3, 5, 8, 11, 17))
ATTEMPTS = 2


class Server(ThreadingHTTPServer):
    """Serves train/<id>.jpg; those in `busy` answer 503, unknown ones 404."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        rng = np.random.default_rng(0)
        self.photos = {f"train/{i}.jpg": images.encode_jpeg(_noise(rng), 90) for i in IDS if i != UNPUBLISHED}
        self.photos[f"train/{PAGE}.jpg"] = b"<html>sorry</html>"
        self.photos[f"train/{LARGE}.jpg"] += bytes(50_000)
        self.busy = {f"train/{BUSY}.jpg", f"train/{BUSY_TOO}.jpg"}
        self.asked: Counter[str] = Counter()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up: it has seen enough of the large photo."""


def _noise(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.removeprefix("/base/")
        self.server.asked[name] += 1
        body = self.server.photos.get(name, b"none")
        self.send_response(503 if name in self.server.busy else 200 if name in self.server.photos else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield running
        running.shutdown()


def _here(
    stage: Stage,
    kind: str,
    units: Sequence[Unit],
    *,
    worker: Callable[[], Callable[[Unit], Record]],
    each: TaskResources,
    key: str,
) -> list[Record]:
    """run_units in this process: worker and unit travel as they do through Ray."""
    records = []
    for unit in units:
        make, sent = pickle.loads(pickle.dumps((worker, unit)))
        records.append(stage.store.find_unit(kind, unit.name) or make()(sent))
    return records


class Project:
    """OpenImages CSVs in a folder; `run` is one `python -m pipelines ingest`, but for Ray."""

    def __init__(self, root: Path, server: Server) -> None:
        self.root, self.server, self.store = root, server, Store(str(root / "store"))
        for folder in ("info", "boxes"):
            (root / folder).mkdir(parents=True)
        self.info([f"{image_id},train" for image_id in IDS])
        self.boxes([f"{image_id},/m/{n % 2 + 1},0.1,0.5,0.2,0.{n % 4 + 5}" for n, image_id in enumerate(IDS * 2)])
        (root / "boxes" / "class-descriptions.csv").write_text("/m/1,Cat\n/m/2,Flying bat\n")

    def info(self, lines: Sequence[str], name: str = "train-images-with-rotation.csv") -> None:
        (self.root / "info" / name).write_text("\n".join(["ImageID,Subset", *lines, ""]))

    def boxes(self, lines: Sequence[str], name: str = "train-annotations-bbox.csv") -> None:
        (self.root / "boxes" / name).write_text("\n".join([HEADER, *lines, ""]))

    def run(self, **changes: Any) -> tuple[Manifest, Counter[str]]:
        """The manifest, and how often each address was asked for. Keys are ingest's; fails as the stage does."""
        raw = copy.deepcopy(TINY)
        download = {
            "attempts": ATTEMPTS,
            "backoff_s": 0.01,
            "connect_timeout_s": 2,
            "read_timeout_s": 2,
            "attempt_timeout_s": 5,
        }
        raw["ingest"] |= {
            "source": "openimages",
            "images": str(self.root / "info"),
            "boxes": str(self.root / "boxes"),
            "image_base": f"http://127.0.0.1:{self.server.server_address[1]}/base",
            "shards": 3,
            "max_image_bytes": 20_000,
            "max_reject_frac": 0.5,
            "download": download,
        }
        raw["ingest"] |= changes
        stage = Stage("ingest", None, Params.model_validate(raw), self.store, self.root)
        self.server.asked.clear()
        ingest.main(stage)
        return load_manifest(stage.outputs / "manifest.json"), Counter(self.server.asked)

    def rows(self, manifest: Manifest, dataset: str) -> list[dict[str, Any]]:
        return [row for file in manifest.files(dataset) for row in self.store.read_table(file).to_pylist()]

    def rejects(self, manifest: Manifest) -> dict[str, str]:
        """Of photos, by id."""
        rows = self.rows(manifest, "rejects")
        return {
            row["key"].removeprefix("train/").removesuffix(".jpg"): row["reason"]
            for row in rows
            if row["reason"] != "box_image_rejected"
        }


@pytest.fixture
def project(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(ingest, "run_units", _here)
    return Project(tmp_path / "project", server)


def _hashes(manifest: Manifest) -> list[tuple[str, str]]:
    files: list[File] = [file for unit in manifest.units for file in unit.files]
    return [(file.dataset, file.sha256) for file in files]


PERMANENT = {UNPUBLISHED: "image_unpublished", PAGE: "image_unreadable", LARGE: "image_too_large"}
BOTH_BUSY = {BUSY: "download_failed", BUSY_TOO: "download_failed"}
ONCE = Counter({f"train/{image_id}.jpg": 1 for image_id in IDS})


# -- another try ----------------------------------------------------------------------------------------------------


def test_every_photo_is_asked_for_once_and_each_failure_has_its_reason(project: Project) -> None:
    manifest, asked = project.run()
    assert project.rejects(manifest) == PERMANENT | BOTH_BUSY
    assert asked == ONCE + Counter({f"train/{image_id}.jpg": ATTEMPTS - 1 for image_id in BOTH_BUSY})
    counts = manifest.counts
    assert (counts["images_in"], counts["images_kept"], counts["images_rejected"]) == (COUNT, COUNT - 5, 5)
    assert (counts["boxes_in"], counts["boxes_kept"], counts["rejected_box_image_rejected"]) == (48, 38, 10)


def test_a_run_again_asks_for_nothing(project: Project) -> None:
    first, _ = project.run()
    again, asked = project.run()
    assert not asked and again == first


def test_a_further_try_asks_for_what_failed_in_passing_alone_and_ends_as_if_nothing_had_happened(
    project: Project, tmp_path: Path, server: Server
) -> None:
    first, _ = project.run()
    still, asked = project.run(retry_rejected=True)
    assert asked == Counter({f"train/{image_id}.jpg": ATTEMPTS for image_id in BOTH_BUSY})
    assert project.rejects(still) == PERMANENT | BOTH_BUSY and _hashes(still) == _hashes(first)

    server.busy.remove(f"train/{BUSY}.jpg")
    half, asked = project.run(retry_rejected=True)
    assert asked == Counter({f"train/{BUSY}.jpg": 1, f"train/{BUSY_TOO}.jpg": ATTEMPTS})
    assert project.rejects(half) == PERMANENT | {BUSY_TOO: "download_failed"}

    server.busy.clear()
    last, asked = project.run(retry_rejected=True)
    assert asked == Counter({f"train/{BUSY_TOO}.jpg": 1})
    assert project.rejects(last) == PERMANENT
    assert last.counts["images_kept"] == COUNT - 3

    for retry in (False, True):  # the newest try is found without any request; nothing is left to try
        found, asked = project.run(retry_rejected=retry)
        assert not asked and found == last
    fresh, _ = Project(tmp_path / "another project", server).run()
    assert _hashes(fresh) == _hashes(last) and fresh.digest == last.digest


def test_parts_of_other_shards_are_not_made_again(project: Project, server: Server) -> None:
    first, _ = project.run()
    server.busy.clear()
    second, _ = project.run(retry_rejected=True)
    with_failures = [unit.counts.get("rejected_download_failed", 0) > 0 for unit in first.units]
    assert any(with_failures) and not all(with_failures)
    changed = [old.unit != new.unit for old, new in zip(first.units, second.units, strict=True)]
    assert changed == with_failures


def test_lines_put_anywhere_into_the_box_file_redo_their_own_shard_alone(project: Project) -> None:
    lines = [f"{image_id},/m/1,0.1,0.5,0.2,0.6" for image_id in IDS]
    project.boxes(lines)
    first, _ = project.run()
    shard = shard_of(IDS[3], 3)
    project.boxes([lines[0], f"{IDS[3]},/m/2,0.2,0.5,0.2,0.6", f"{IDS[3]},/m/1,0.3,oops,0.2,0.6", *lines[1:]])
    second, _ = project.run()
    changed = [old.unit != new.unit for old, new in zip(first.units, second.units, strict=True)]
    assert changed == [number == shard for number in range(3)]
    (wrong,) = [row for row in project.rows(second, "rejects") if row["reason"] == "box_unparsable"]
    assert wrong["key"] == "train-annotations-bbox.csv:4"  # the line that an editor shows
    rejected = [row["key"] for row in project.rows(second, "rejects") if row["reason"] == "box_image_rejected"]
    assert rejected and len(set(rejected)) == len(rejected) and all("#" in key for key in rejected)


def test_a_lost_part_of_a_first_try_is_made_again_and_loses_no_photo(project: Project, server: Server) -> None:
    first, _ = project.run()
    server.busy.clear()
    last, _ = project.run(retry_rejected=True)
    for unit in first.units:
        project.store.delete_unit(f"parts/ingest/{unit.unit}")
    again, _ = project.run()
    assert _hashes(again) == _hashes(last)


def test_after_gc_a_run_again_asks_for_nothing(project: Project, server: Server) -> None:
    """gc keeps what the manifest names; a further try is found through the ones before it."""
    project.run()
    server.busy.clear()
    last, _ = project.run(retry_rejected=True)
    used = used_paths([json.loads((project.root / "data" / "ingest" / "manifest.json").read_text())])
    for stage in project.store.list_names("parts"):
        for name in project.store.list_names(f"parts/{stage}"):
            if f"parts/{stage}/{name}" not in used:
                project.store.delete_unit(f"parts/{stage}/{name}")
    again, asked = project.run()
    assert not asked and again == last


def test_a_photo_that_is_listed_twice_is_kept_once_and_survives_a_further_try(project: Project, server: Server) -> None:
    """OpenImages has several image-info CSVs for one split; with both in the folder every photo is in two."""
    project.info([f"{image_id},train" for image_id in IDS], "oidv6-train-images-with-labels-with-rotation.csv")
    first, _ = project.run(max_reject_frac=1.0)
    assert first.counts["images_kept"] == COUNT - 5
    server.busy.clear()
    second, _ = project.run(max_reject_frac=1.0, retry_rejected=True)
    assert second.counts["images_kept"] == COUNT - 3


def test_a_further_try_reads_the_file_that_failed_not_another_one_of_its_id(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on S3: of two different files with one id, the first could not be read in passing, the second could."""
    photos, rng, read = project.root / "photos", np.random.default_rng(1), FolderSource.read
    for name in ("1/a.jpg", "2/a.jpg", "1/b.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(images.encode_jpeg(_noise(rng), 90))
    project.boxes(["a,/m/1,0.1,0.5,0.2,0.5", "b,/m/1,0.1,0.5,0.2,0.5"])
    settings = {"source": "folder", "images": str(photos), "image_base": None, "max_reject_frac": 1.0}

    def busy(self: FolderSource, address: str, max_bytes: int) -> bytes:
        if address == "1/a.jpg":
            raise PhotoError("download_failed", f"{address}: busy")
        return read(self, address, max_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "read", busy)
        first, _ = project.run(**settings)
    assert {row["image_id"] for row in project.rows(first, "images")} == {"a", "b"}
    second, _ = project.run(**settings, retry_rejected=True)
    reasons = {row["key"]: row["reason"] for row in project.rows(second, "rejects")}
    assert {reasons.get("1/a.jpg"), reasons.get("2/a.jpg")} == {"image_id_duplicated"}
    assert {row["image_id"] for row in project.rows(second, "images")} == {"b"}


def test_too_many_rejects_fail_the_stage_and_leave_a_manifest_that_says_why(project: Project, server: Server) -> None:
    with pytest.raises(
        StageError, match=r"5 of 24 images rejected .*download_failed 2.*ingest\.max_reject_frac"
    ) as caught:
        project.run(max_reject_frac=0.2)
    assert "ingest.retry_rejected" in str(caught.value) and "pbe rejects" in str(caught.value)
    manifest = load_manifest(project.root / "data" / "ingest" / "manifest.json")
    assert project.rejects(manifest) == PERMANENT | BOTH_BUSY
    server.busy.clear()
    _, asked = project.run(max_reject_frac=0.2, retry_rejected=True)
    assert sum(asked.values()) == 2


def test_nothing_at_all_is_an_error_whatever_the_limit(project: Project, server: Server) -> None:
    server.photos.clear()
    with pytest.raises(StageError, match=r"none of 24 images could be used \(.*image_unpublished"):
        project.run(max_reject_frac=1.0)


# -- what is asked for ----------------------------------------------------------------------------------------------


def test_photos_that_no_wanted_box_names_are_not_asked_for(project: Project) -> None:
    manifest, asked = project.run(limit=2)
    assert asked == Counter({f"train/{image_id}.jpg": 1 for image_id in IDS[:2]})
    assert (manifest.counts["images_in"], manifest.counts["boxes_in"]) == (2, 4)
    counts = json.loads((project.root / "data" / "ingest" / "counts.json").read_text())
    assert counts["boxes_not_selected"] == 44


@pytest.mark.parametrize(
    "text",
    [f"{IDS[0]}\n{IDS[2]}\n", f"\ufefftrain/{IDS[0]}\r\ntrain/{IDS[2]}\r\n", f"{IDS[2]}.jpg\n{IDS[0]}.jpg\nunknown"],
    ids=["plain", "as the downloader's", "with suffix"],
)
def test_a_list_of_ids_selects_in_the_usual_spellings(project: Project, text: str) -> None:
    path = project.root / "ids.txt"
    path.write_bytes(text.encode())
    _, asked = project.run(image_ids=str(path))
    assert asked == Counter({f"train/{IDS[0]}.jpg": 1, f"train/{IDS[2]}.jpg": 1})


@pytest.mark.parametrize("classes", [["/m/2"], ["Flying bat"], ["flying BAT"], ["/m/2", "flying bat"]])
def test_classes_select_by_label_or_name_in_any_case(project: Project, classes: list[str]) -> None:
    manifest, asked = project.run(classes=classes)
    assert asked.keys() == {f"train/{image_id}.jpg" for image_id in IDS[1::2]}
    assert {box["label_name"] for box in project.rows(manifest, "boxes")} == {"Flying bat"}


def test_without_class_descriptions_a_class_that_no_box_has_is_refused_by_name(project: Project) -> None:
    (project.root / "boxes" / "class-descriptions.csv").unlink()
    with pytest.raises(SourceError, match=r"ingest\.classes: no box .* is of class /m/7; there are /m/1, /m/2"):
        project.run(classes=["/m/1", "/m/7"])
    assert project.run(classes=["/m/1"])[0].counts["boxes_kept"]


def test_splits_select_by_the_box_files_name(project: Project, server: Server) -> None:
    project.boxes([f"{IDS[0]},/m/1,0.1,0.5,0.2,0.5"], "validation-annotations-bbox.csv")
    manifest, asked = project.run(splits=["validation"])
    assert asked == Counter({f"train/{IDS[0]}.jpg": 1})  # where its info says that it is
    assert {row["split"] for row in project.rows(manifest, "images")} == {"validation"}


def test_a_photo_without_info_is_looked_for_in_the_split_of_its_box_file(project: Project) -> None:
    project.info([f"{image_id},train" for image_id in IDS[1:]])
    manifest, asked = project.run()
    assert asked[f"train/{IDS[0]}.jpg"] == 1
    assert IDS[0] in {row["image_id"] for row in project.rows(manifest, "images")}


def test_val_frac_moves_no_photo_on_the_server(project: Project) -> None:
    """It is about what the photo is used for; the photo lies where its box file's split says."""
    project.info([f"{IDS[0]},train"])
    manifest, asked = project.run(val_frac=0.5, splits=["train", "validation"])
    assert asked.keys() == ONCE.keys()
    assert {row["split"] for row in project.rows(manifest, "images")} == {"train", "validation"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["Flying cat"]}, r"ingest\.classes: 'Flying cat' is neither a label nor a name"),
        ({"image_ids": "/nowhere/ids.txt"}, r"ingest\.image_ids: /nowhere/ids.txt cannot be read"),
        ({"splits": ["test"]}, r"ingest\.boxes: none of the 48 boxes .* is of ingest\.splits, classes and image_ids"),
        ({"boxes": "/nowhere/boxes"}, r"ingest\.boxes: /nowhere/boxes does not exist"),
        ({"images": "/nowhere/info.csv"}, r"ingest\.images: /nowhere/info.csv does not exist"),
    ],
    ids=str,
)
def test_a_source_that_cannot_be_read_is_one_message_before_any_request(
    project: Project, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        project.run(**changes)
    assert "\n" not in str(caught.value) and not project.server.asked


def test_an_empty_list_of_ids_is_one_message(project: Project) -> None:
    (project.root / "ids.txt").write_text("\n\n")
    with pytest.raises(SourceError, match=r"ingest\.image_ids: .*ids\.txt holds no id"):
        project.run(image_ids=str(project.root / "ids.txt"))


def test_a_folder_of_which_only_some_boxes_are_wanted_rejects_no_other_photo(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for image_id in IDS:
        (folder / f"{image_id}.png").write_bytes(images.encode_png(np.full((20, 30, 3), 9, np.uint8)))
    own = {"source": "folder", "images": str(folder), "image_base": None, "max_reject_frac": 0.0}
    for wanted in ({"limit": 2}, {"splits": ["train"], "limit": 3}):
        manifest, _ = project.run(**own, **wanted)
        assert manifest.counts["images_kept"] == manifest.counts["images_in"] == wanted["limit"]
    manifest, _ = project.run(**own)
    assert manifest.counts["images_kept"] == len(IDS)


def test_a_wrong_base_address_leaves_nothing_to_the_right_one(project: Project) -> None:
    right = f"http://127.0.0.1:{project.server.server_address[1]}/base"
    with pytest.raises(StageError, match="none of"):
        project.run(image_base=right + "/404")
    manifest, _ = project.run(image_base=right)
    assert manifest.counts["images_kept"] > 0


def test_listed_ids_may_be_file_names_and_those_without_a_box_are_told(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.root / "ids.txt").write_text(f" train/{IDS[0]} \n{IDS[1]}.JPG\n\n{IDS[2]}.png\nno such photo\n")
    _, asked = project.run(image_ids=str(project.root / "ids.txt"))
    assert set(asked) == {f"train/{image_id}.jpg" for image_id in IDS[:3]}
    assert "1 of 4 ids of ingest.image_ids have no box, such as no such photo" in capsys.readouterr().out


# -- real photos, both formats -----------------------------------------------------------------------------------------

COCO256 = REPOSITORY.parent / "shared" / "data" / "coco256"


def _as_coco_json(target: Path) -> None:
    """coco256's YOLO labels as two COCO instances files."""
    names = yaml.safe_load((COCO256 / "object_detection" / "config.yaml").read_text())["names"]
    classes = names if isinstance(names, dict) else dict(enumerate(names))
    for split in ("train2017", "val2017"):
        photos: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        for number, path in enumerate(sorted((COCO256 / "images" / split).glob("*.jpg"))):
            size = images.read_header(path.read_bytes())
            photos.append({"id": number, "file_name": path.name, "width": size.width_px, "height": size.height_px})
            labels = COCO256 / "object_detection" / "labels" / split / f"{path.stem}.txt"
            for line in labels.read_text().splitlines() if labels.is_file() else ():
                label, *ends = line.split()
                x, y, width, height = (float(end) for end in ends)
                box = [(x - width / 2) * size.width_px, (y - height / 2) * size.height_px]
                box += [width * size.width_px, height * size.height_px]
                boxes.append(
                    {"id": len(boxes), "image_id": number, "category_id": int(label), "bbox": box, "iscrowd": 0}
                )
        categories = [{"id": int(number), "name": name} for number, name in classes.items()]
        text = json.dumps({"images": photos, "annotations": boxes, "categories": categories})
        (target / f"instances_{split}.json").write_text(text)


@pytest.mark.parametrize("boxes_as", ["csv", "json"])
def test_coco256_from_a_folder_loses_nothing_in_either_format(project: Project, tmp_path: Path, boxes_as: str) -> None:
    """Its README: 256 photos, 2 of them without a box, 1827 boxes, 772 of which pass the area rule."""
    if not COCO256.is_dir():
        pytest.skip(f"needs the photos and boxes of coco256 at {COCO256}")
    boxes = COCO256
    if boxes_as == "json":
        boxes = tmp_path / "json"
        boxes.mkdir()
        _as_coco_json(boxes)
    manifest, _ = project.run(
        source="folder", images=str(COCO256 / "images"), boxes=str(boxes), image_base=None, max_image_bytes=1 << 26
    )
    counts = {key: value for key, value in manifest.counts.items() if value}
    print(boxes_as, counts)
    assert counts == {
        "images_in": 256,
        "images_kept": 254,
        "images_rejected": 2,
        "rejected_image_without_box": 2,
        "boxes_in": 1827,
        "boxes_kept": 1827,
    }
    found = project.rows(manifest, "boxes")
    areas = [(box["xmax"] - box["xmin"]) * (box["ymax"] - box["ymin"]) for box in found]
    assert sum(0.02 <= area <= 0.8 for area in areas) == 772
    assert Counter(box["split"] for box in found) == {"train": 929, "validation": 898}
    assert all(box["label_name"] != box["label"] or boxes_as == "json" for box in found)
