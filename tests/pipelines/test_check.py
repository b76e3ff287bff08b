"""`python -m pipelines check`: what `make repro` asks before DVC reads anything."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pbe import config, places
from pbe.data.files import SourceError
from pbe.errors import ParamsError, UserError
from pbe.places import repo_root
from pbe.track import TrackError
from pipelines.commands import check


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the sample settings, its photos and boxes, and DVC's folder."""
    home = repo_root()
    for name in ("params.yaml", "pbe/data/sample/photos.csv", "pbe/data/sample/boxes_openimages.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((home / name).read_bytes())
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    for module in (check, config, places):
        monkeypatch.setattr(module, "repo_root", lambda: tmp_path)
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(check, "TORN_AFTER_S", 0.3)
    return tmp_path


def _replace(root: Path, old: str, new: str) -> None:
    text = (root / "params.yaml").read_text()
    assert old in text
    (root / "params.yaml").write_text(text.replace(old, new))


def test_sound_settings_pass_in_silence(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check.main()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("key", ["images", "boxes"])
def test_photos_or_boxes_that_are_not_there_are_named_with_their_key(root: Path, key: str) -> None:
    name = {"images": "photos.csv", "boxes": "boxes_openimages.csv"}[key]
    (root / "pbe" / "data" / "sample" / name).unlink()
    with pytest.raises(SourceError, match=rf"^ingest\.{key}: .*{name} does not exist"):
        check.main()


@pytest.mark.parametrize("what", ["a name in Latin-1", "a dangling link", "where the stages write", "no permission"])
def test_what_dvc_would_stumble_over_is_named_with_its_key(root: Path, what: str, tmp_path: Path) -> None:
    photos = tmp_path / ("data/photos" if what == "where the stages write" else "photos")
    photos.mkdir(parents=True)
    (photos / "a.jpg").write_bytes(b"a")
    if what == "a name in Latin-1":
        Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.jpg")).write_bytes(b"b")
    elif what == "a dangling link":
        (photos / "b.jpg").symlink_to("nothing.jpg")
    elif what == "no permission":
        (photos / "a.jpg").chmod(0)
        if os.access(photos / "a.jpg", os.R_OK):
            pytest.skip("this user may read everything")
    _replace(root, "  images: pbe/data/sample/photos.csv", f"  images: {photos}")
    words = {
        "a name in Latin-1": r"caf.xe9\.jpg: the name is not UTF-8",
        "a dangling link": r"b\.jpg \(a broken link\)",
        "where the stages write": "the stages write there",
        "no permission": r"a\.jpg \(no permission to read it\)",
    }
    with pytest.raises(SourceError, match=rf"^ingest\.images.*{words[what]}"):
        check.main()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("key", ["images", "boxes"])
def test_what_dvc_would_wait_for_or_not_watch_is_named_before_it_starts(root: Path, key: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"a")
    os.mkfifo(folder / "deep" / "b.jpg")
    (folder / "deep" / "up").symlink_to("..")
    old = {"images": "pbe/data/sample/photos.csv", "boxes": "pbe/data/sample/boxes_openimages.csv"}[key]
    _replace(root, f"  {key}: {old}", f"  {key}: {folder}")
    with pytest.raises(SourceError, match=rf"^ingest\.{key}: .*b\.jpg \(a named pipe\), .*up \(a link to a folder\)"):
        check.main()
    (folder / "deep" / "b.jpg").unlink()
    (folder / "deep" / "up").unlink()
    for name in ("c.jpg", "c.bin"):
        with (folder / name).open("wb") as stream:
            stream.truncate(1 << 40)  # of which the disk holds nothing, but DVC would read it all
    with pytest.raises(SourceError, match=rf"^ingest\.{key}: .*c\.bin \(1,100 GB.*c\.jpg \(1,100 GB, which DVC would"):
        check.main()


def test_a_folder_without_git_is_refused_before_dvc_does(root: Path) -> None:
    shutil.rmtree(root / ".git")
    with pytest.raises(UserError, match=r"^git: .*not a git repository.*`git init`; `dvc repro` needs it$"):
        check.main()


def test_mlflow_is_asked_before_an_hour_of_work(
    root: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    check.main()
    assert capsys.readouterr().out == ""
    MlflowClient(mlflow_uri).delete_experiment("1")
    with pytest.raises(TrackError, match="mlflow experiments restore -x 1"):
        check.main()
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")  # whose MLflow may be out of reach from here
    check.main()
    assert "the cluster in RAY_ADDRESS must reach it" in capsys.readouterr().out


def test_settings_are_refused_in_our_words(root: Path) -> None:
    _replace(root, "  images: pbe/data/sample/photos.csv", "  images: ~/photos.csv")
    with pytest.raises(ParamsError, match=r"images: ~/photos\.csv: use an absolute path"):
        check.main()
    (root / "params.yaml").write_text("variants: [full]\n")
    with pytest.raises(ParamsError, match=r"^params\.yaml: "):
        check.main()


@pytest.mark.parametrize("left", ["", '{"a": '])
def test_a_lock_that_a_killed_dvc_left_half_written_is_removed(
    root: Path, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = root / ".dvc" / "tmp" / "rwlock"
    lock.write_text(left)
    check.main()
    assert not lock.exists() and str(lock) in capsys.readouterr().out


def test_a_whole_lock_stays(root: Path) -> None:
    lock = root / ".dvc" / "tmp" / "rwlock"
    lock.write_text(json.dumps({"data": {"write": {"pid": 1, "cmd": "dvc repro"}}}))
    check.main()
    assert lock.exists()
