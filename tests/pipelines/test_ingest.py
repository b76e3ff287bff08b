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
from PIL import ExifTags, Image

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


@pytest.mark.parametrize("others", [("2/a.jpg",), ("2/a.jpg", "3/a.jpg")], ids=["kept", "rejected as they differ"])
def test_a_further_try_reads_the_file_that_failed_and_sees_that_others_of_its_id_differ(
    project: Project, monkeypatch: pytest.MonkeyPatch, others: tuple[str, ...]
) -> None:
    """As on S3: of different files with one id, the first could not be read in passing, the others could."""
    photos, rng, read = project.root / "photos", np.random.default_rng(1), FolderSource.read
    for name in ("1/a.jpg", *others, "1/b.jpg"):
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
    assert {row["image_id"] for row in project.rows(first, "images")} == ({"a", "b"} if len(others) == 1 else {"b"})
    second, _ = project.run(**settings, retry_rejected=True)
    reasons = {row["key"]: row["reason"] for row in project.rows(second, "rejects")}
    assert {reasons.get(name) for name in ("1/a.jpg", *others)} == {"image_id_duplicated"}
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
        ({"splits": ["test"]}, r"ingest\.boxes: none of the 48 boxes .* matches ingest\.splits, classes and image_ids"),
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
        "images_converted_to_srgb": 39,
    }
    found = project.rows(manifest, "boxes")
    areas = [(box["xmax"] - box["xmin"]) * (box["ymax"] - box["ymin"]) for box in found]
    assert sum(0.02 <= area <= 0.8 for area in areas) == 772
    assert Counter(box["split"] for box in found) == {"train": 929, "validation": 898}
    assert all(box["label_name"] != box["label"] or boxes_as == "json" for box in found)


# -- box files of other tools, with their photos -----------------------------------------------------------------------


class Folder:
    """A folder of photos with one red object each, and box files about them."""

    def __init__(self, project: Project) -> None:
        self.project, self.root = project, project.root / "own"
        (self.root / "boxes").mkdir(parents=True)

    def photo(self, name: str, *, orientation: int = 1, shade: int = 200) -> None:
        """160 x 120 as stored, red in x 40..110, y 30..90."""
        pixels = np.full((120, 160, 3), 90, np.uint8)
        pixels[30:90, 40:110] = (shade, 10, 10)
        tag, path = Image.Exif(), self.root / "photos" / name
        tag[ExifTags.Base.Orientation] = orientation
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, exif=tag, quality=95)

    def csv(self, *lines: str, header: str = HEADER, encoding: str = "utf-8") -> None:
        (self.root / "boxes" / "boxes.csv").write_bytes("\n".join([header, *lines, ""]).encode(encoding))

    def coco(self, images: list[dict[str, Any]], boxes: list[dict[str, Any]]) -> None:
        entries = [{"category_id": 1, "bbox": [40, 30, 70, 60]} | box for box in boxes]
        coco = {"images": images, "categories": [{"id": 1, "name": "cup"}], "annotations": entries}
        (self.root / "boxes" / "instances.json").write_text(json.dumps(coco))

    def run(self, **changes: Any) -> tuple[Manifest, dict[str, Any]]:
        """The manifest, and by image id how red its boxes are: 0 to 255."""
        own = {"source": "folder", "images": str(self.root / "photos"), "boxes": str(self.root / "boxes")}
        manifest, _ = self.project.run(**{**own, "image_base": None, "max_reject_frac": 1.0, **changes})
        rows = {row["image_id"]: row for row in self.project.rows(manifest, "images")}
        reds: dict[str, list[float]] = {}
        for box in self.project.rows(manifest, "boxes"):
            row = rows[box["image_id"]]
            pixels = images.decode(row["bytes"], exif_orientation=row["exif_orientation"])
            height, width = pixels.shape[:2]
            x0, x1, y0, y1 = (
                round(box[end] * side) for end, side in zip(ENDS, (width, width, height, height), strict=True)
            )
            inside = pixels[y0:y1, x0:x1].astype(float)
            assert abs(inside.shape[0] * inside.shape[1] - 70 * 60) < 300
            reds.setdefault(box["image_id"], []).append(round((inside[..., 0] - inside[..., 1]).mean(), -1))
        return manifest, reds

    def reasons(self, manifest: Manifest) -> Counter[str]:
        return Counter(row["reason"] for row in self.project.rows(manifest, "rejects"))


ENDS = ("xmin", "xmax", "ymin", "ymax")
RED = 190.0  # of the object, less green


@pytest.fixture
def folder(project: Project) -> Folder:
    return Folder(project)


UPRIGHT_BOX = {6: [30, 40, 60, 70], 8: [30, 50, 60, 70], 5: [30, 40, 60, 70], 7: [30, 50, 60, 70]}  # by orientation


@pytest.mark.parametrize("exif", ["ignore", "apply"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_coco_box_is_on_its_object_in_whichever_frame_the_file_states(
    folder: Folder, exif: str, orientation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("stored", "upright"):
        folder.photo(f"{name}.jpg", orientation=orientation)
    folder.photo("plain.jpg")
    sizes = {"stored": (160, 120), "upright": (120, 160), "plain": (120, 160)}
    listed = [{"id": n, "file_name": f"{n}.jpg", "width": w, "height": h} for n, (w, h) in sizes.items()]
    turned = {"image_id": "upright", "bbox": UPRIGHT_BOX[orientation]}
    folder.coco(listed, [{"image_id": "stored"}, turned, {"image_id": "plain"}])
    manifest, reds = folder.run(exif=exif)
    assert reds == {"stored": [RED], "upright": [RED]}
    assert folder.reasons(manifest) == {"box_size_mismatch": 1, "image_without_box": 1}
    assert manifest.counts["boxes_turned"] == 1
    assert "1 boxes were turned with their photo" in capsys.readouterr().out


def test_a_coco_box_of_a_photo_without_a_size_is_in_its_pixels(folder: Folder) -> None:
    folder.photo("a.jpg")
    folder.photo("b.jpg")
    folder.coco(
        [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg", "width": 0, "height": None}],
        [{"image_id": 1}, {"image_id": 2}, {"image_id": 2, "bbox": [40, 30, 200, 60]}],
    )
    manifest, reds = folder.run()
    assert reds == {"a": [RED], "b": [RED]} and folder.reasons(manifest) == {"box_outside_image": 1}


def test_a_csv_that_states_the_size_of_the_other_frame_is_turned_too(folder: Folder) -> None:
    """As infra/labels/from_voc.py writes it."""
    folder.photo("a.jpg", orientation=6)
    folder.csv("a,cup,0.25,0.75,0.25,0.6875,120,160", header=f"{HEADER},ImageWidth,ImageHeight")
    assert folder.run()[1] == {"a": [RED]}


def test_coco_entries_of_one_name_are_never_all_on_one_photo(folder: Folder) -> None:
    folder.photo("frame.jpg")
    folder.photo("a.jpg")
    size = {"width": 160, "height": 120}
    names = {1: "frame.jpg", 2: "frame.jpg", 3: "video/frame.jpg", 4: "a.jpg"}
    folder.coco([{"id": n, "file_name": name, **size} for n, name in names.items()], [{"image_id": n} for n in names])
    manifest, reds = folder.run()
    assert reds == {"a": [RED]}
    assert folder.reasons(manifest) == {"box_image_ambiguous": 3, "image_without_box": 1}


@pytest.mark.parametrize("form", ["coco", "csv"])
def test_photos_of_one_name_in_two_folders_each_get_their_own_boxes(folder: Folder, form: str) -> None:
    folder.photo("train/p0.jpg", shade=200)
    folder.photo("val/p0.jpg", shade=150)
    names = {1: "train/p0.jpg", 2: "/data/photos/val/p0.jpg"}
    if form == "coco":
        folder.coco([{"id": n, "file_name": name} for n, name in names.items()], [{"image_id": n} for n in (1, 2, 2)])
    else:
        folder.csv(*(f"{names[n]},cup,0.25,0.6875,0.25,0.75" for n in (1, 2, 2)))
    manifest, reds = folder.run()
    assert reds == {"train__p0": [RED], "val__p0": [RED - 50] * 2} and not folder.reasons(manifest)
    (folder.root / "ids.txt").write_text("val/p0.jpg\n")
    assert folder.run(image_ids=str(folder.root / "ids.txt"))[1].keys() == {"val__p0"}


def test_a_csv_that_calls_one_photo_by_two_paths_gives_it_no_box(folder: Folder) -> None:
    folder.photo("p0.jpg")
    folder.photo("p1.jpg")
    folder.csv(*(f"{name},cup,0.25,0.6875,0.25,0.75" for name in ("a/p0.jpg", "p1.jpg", "b/p0.jpg", "c/none.jpg")))
    manifest, reds = folder.run()
    assert reds == {"p1": [RED]}
    assert folder.reasons(manifest) == {"box_image_ambiguous": 2, "image_without_box": 1, "image_missing": 1}


def test_names_in_other_spellings_find_their_photos_and_that_is_told(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cafe\u0301.jpg", "my cup.jpg", "0012.jpg", "1.jpg"):
        folder.photo(name)
    folder.csv(*(f"{name};cup;0,25;0,6875;0,25;0,75" for name in ("caf\u00e9", "my%20cup.jpg", "12", "1")),
               header=HEADER.replace(",", ";"), encoding="utf-16")  # fmt: skip
    manifest, reds = folder.run()
    assert reds == {name: [RED] for name in ("cafe\u0301", "my cup", "0012", "1")} and not folder.reasons(manifest)
    out = capsys.readouterr().out
    for said in ("in another Unicode form", "percent-decoded", "with the zeros a spreadsheet took"):
        assert f"ingest: 1 photos were found {said}" in out
    assert "ingest: boxes.csv: read with UTF-16, semicolons between cells" in out


def test_clipped_boxes_are_counted_over_files_and_photos(folder: Folder) -> None:
    folder.photo("a.jpg")
    folder.csv("a,cup,0.25,1.0000001,-1e-9,1", "a,cup,0.25,0.6875,0.25,0.75")
    folder.coco([{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "bbox": [-0.5, 0, 160, 121]}])
    manifest, _ = folder.project.run(
        source="folder", images=str(folder.root / "photos"), boxes=str(folder.root / "boxes"), image_base=None
    )
    counts = json.loads((folder.project.root / "data" / "ingest" / "counts.json").read_text())
    assert (counts["boxes_clipped"], counts["boxes_kept"], manifest.counts["boxes_clipped"]) == (2, 3, 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "p{n},cup,12,48,30,90",
            r"box_outside_image 8, .* First boxes\.csv:\d: x 12.* fix it, .* fractions of the photo",
        ),
        ("p{n},cup,a,0.5,0.2,0.6", r"box_unparsable 8, .* First boxes\.csv:\d: XMin a is not a number\. To fix it"),
        ("q{n},cup,0.1,0.5,0.2,0.6", r"image_missing 8, .* First .* 'q\d'\. To fix it, .*ingest\.images"),
        ("p{n},cup,0.1,0.5,0.2", r"box_unparsable 8, .* 5 cells where the header has 6"),
    ],
)
def test_what_hits_all_lines_is_named_with_its_first_line_and_its_cure(folder: Folder, line: str, said: str) -> None:
    for n in range(8):
        folder.photo(f"p{n}.jpg")
    folder.csv(*(line.format(n=n) for n in range(8)))
    with pytest.raises(StageError, match=rf"none of 8 images could be used \({said}") as caught:
        folder.run()
    assert "\n" not in str(caught.value) and "`pbe rejects`" in str(caught.value)


def test_the_index_of_a_plain_csv_says_nothing_new(folder: Folder) -> None:
    """Else the parts of everybody's photos would have new names."""
    folder.photo("a.jpg")
    folder.csv("a,cup,0.25,0.6875,0.25,0.75")
    folder.run()
    store = folder.project.store
    names = {name for unit in store.list_names("parts/index") for name in store.list_names(f"parts/index/{unit}")}
    assert names and not any("stated" in name for name in names)
