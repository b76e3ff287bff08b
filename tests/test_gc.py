"""`pbe gc`: what a manifest in git's history names is kept; a real git, a real DVC, a real storage."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from pbe import places
from pbe.cli.__main__ import main
from pbe.gc import find_unused, remove, used_paths
from pbe.store import Store, make_manifest, save_manifest, write_json

DAY_S = 24 * 3600.0
DVC_YAML = """
stages:
  all:
    cmd: cp -r made/. data
    deps: [made]
    outs: [data/ingest/manifest.json, data/encode/manifest.json, data/train/full/manifest.json]
"""
GENERATIONS = ("old", "new", "never")  # in the first commit, in the second, in none


def _names(generation: str) -> set[str]:
    parts = {f"parts/ingest/b0000-{generation}", f"parts/encode/codec-{generation}", f"parts/weights/unet-{generation}"}
    return parts | {f"runs/full-{generation}"}


def _run(root: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def _git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    _run(root, "git", *identity, *arguments)


def _dvc(root: Path, *arguments: str) -> None:
    _run(root, sys.executable, "-m", "dvc", *arguments)


def _write(store: Store, generation: str) -> None:
    """A unit of ingest, a codec of encode, a run."""
    store.write_unit("ingest", f"b0000-{generation}", {"images": pa.table({"a": [generation]})}, counts={})
    store.write_bytes(f"parts/encode/codec-{generation}/codec.safetensors", b"codec" * 100)
    store.write_bytes(f"parts/weights/unet-{generation}/config.json", b"{}" * 30)
    for name in ("finished.json", "checkpoints/step-1/model.pt", "export/model.json"):
        store.write_bytes(f"runs/full-{generation}/{name}", b"x" * 50)


def _manifests(store: Store, generation: str, folder: Path) -> None:
    """Write the stages' manifests: ingest names its unit, encode the codec in its config, train its run."""
    record = store.find_unit("ingest", f"b0000-{generation}")
    assert record is not None
    save_manifest(folder / "ingest" / "manifest.json", make_manifest("ingest", config={}, version=1, units=[record]))
    codec = {"codec": f"parts/encode/codec-{generation}/codec.safetensors"}
    save_manifest(folder / "encode" / "manifest.json", make_manifest("encode", config=codec, version=1, units=[]))
    run = {
        "stage": "train",
        "run": f"full-{generation}",
        "export": {"model.json": "sha256"},
        "initial": [f"parts/weights/unet-{generation}"],
    }
    write_json(folder / "train" / "full" / "manifest.json", run)


def _age(store: Store, relative: str, age_s: float) -> None:
    for path in Path(store.path(relative)).rglob("*"):
        os.utime(path, (time.time() - age_s,) * 2)


def _commit(root: Path, store: Store, generation: str) -> None:
    """Make the generation's manifests with `dvc repro` and commit their dvc.lock."""
    _manifests(store, generation, root / "made")
    _dvc(root, "repro", "-q")
    _git(root, "add", "-A")
    _git(root, "commit", "-qm", generation)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `project`, where dvc.lock was committed twice, and its `store`."""
    folder = tmp_path_factory.mktemp("gc")
    root, store = folder / "project", Store(str(folder / "store"))
    for generation in GENERATIONS:
        _write(store, generation)
    root.mkdir()
    _run(root, "git", "init", "-q", "-b", "main")
    _dvc(root, "init", "-q")
    _dvc(root, "config", "core.analytics", "false")
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / ".gitignore").write_text("/data\n/made\n")
    for generation in ("old", "new"):
        _commit(root, store, generation)
    return folder


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; everything in its storage was written two days ago."""
    shutil.copytree(template, tmp_path / "copy", symlinks=True)
    root = tmp_path / "copy" / "project"
    monkeypatch.setattr(places, "repo_root", lambda: root)
    monkeypatch.setenv("PBE_STORAGE", str(tmp_path / "copy" / "store"))
    _age(_store(root), "", 2 * DAY_S)
    return root


def _store(root: Path) -> Store:
    return Store(str(root.parent / "store"))


def _present(store: Store) -> set[str]:
    folders = ["runs", *(f"parts/{stage}" for stage in store.list_names("parts"))]
    return {f"{folder}/{name}" for folder in folders for name in store.list_names(folder)}


EVERY = set().union(*map(_names, GENERATIONS))
USED = _names("old") | _names("new")


def test_without_yes_it_says_what_would_go_and_nothing_goes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc"]) == 0
    out = capsys.readouterr().out
    *lines, last = out.splitlines()
    assert {line.split()[-1] for line in lines} == _names("never")
    assert all("48.0 h old" in line for line in lines)
    assert last.startswith("4 folders, 0.0 MB in ") and "`pbe gc --yes` removes them" in last
    assert _present(_store(root)) == EVERY


def test_with_yes_only_what_nothing_refers_to_goes_and_only_when_it_is_old(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = _store(root)
    _write(store, "young")  # of a stage that is running now
    _age(store, "runs/full-young/checkpoints", 3 * DAY_S)  # the newest file decides
    used = {path: store.folder_size(path).files for path in USED}
    assert main(["gc", "--yes"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("removed 4 folders")
    assert _present(store) == USED | _names("young")
    assert {path: store.folder_size(path).files for path in USED} == used
    assert store.find_unit("ingest", "b0000-old") is not None

    assert main(["gc", "--yes", "--older-than-h", "0"]) == 0
    assert _present(store) == USED
    assert main(["gc", "--yes", "--older-than-h", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("removed 0 folders")


def test_manifests_of_the_working_tree_count_before_they_are_committed(root: Path) -> None:
    _manifests(_store(root), "never", root / "data")
    assert main(["gc", "--yes"]) == 0
    assert _present(_store(root)) == EVERY


def test_branches_tags_and_experiments_count(root: Path) -> None:
    """Each ref alone keeps the last commit; nothing else refers to it."""
    _commit(root, _store(root), "never")
    commit = (root / ".git" / "refs" / "heads" / "main").read_text().strip()
    _git(root, "reset", "-q", "--hard", "HEAD~1")
    shutil.rmtree(root / "data")
    for reference in ("refs/heads/side", "refs/tags/v1", "refs/exps/ab/cdef01/exp-1"):
        _git(root, "update-ref", reference, commit)
        assert main(["gc", "--yes", "--no-run-cache"]) == 0
        assert _present(_store(root)) == EVERY, reference
        _git(root, "update-ref", "-d", reference)
    assert main(["gc", "--yes", "--no-run-cache"]) == 0
    assert _present(_store(root)) == USED  # when no ref is left


def test_a_side_branch_counts_after_a_merge_that_took_the_other_sides_lock(root: Path) -> None:
    """The usual resolution of a conflict in dvc.lock; the branch is then deleted."""
    _git(root, "checkout", "-qb", "side")
    _commit(root, _store(root), "never")
    _git(root, "checkout", "-q", "main")
    _git(root, "commit", "-q", "--allow-empty", "-m", "meanwhile")
    _git(root, "merge", "-q", "-s", "ours", "--no-edit", "side")
    _git(root, "branch", "-qD", "side")
    shutil.rmtree(root / "data")
    assert main(["gc", "--yes", "--no-run-cache"]) == 0
    assert _present(_store(root)) == EVERY


def test_a_project_below_the_root_of_its_git_keeps_what_its_history_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dvc init --subdir`: commits name dvc.lock by its path from the root."""
    root, store = tmp_path / "everything" / "project", Store(str(tmp_path / "everything" / "store"))
    root.mkdir(parents=True)
    for generation in GENERATIONS:
        _write(store, generation)
    _run(root.parent, "git", "init", "-q", "-b", "main")
    _dvc(root, "init", "-q", "--subdir")
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / ".gitignore").write_text("/data\n/made\n")
    (root.parent / ".gitignore").write_text("/store\n")
    for generation in ("old", "new"):
        _commit(root, store, generation)
    _age(store, "", 2 * DAY_S)
    monkeypatch.setattr(places, "repo_root", lambda: root)
    monkeypatch.setenv("PBE_STORAGE", store.uri)
    assert main(["gc", "--yes"]) == 0
    assert _present(store) == USED


def test_a_manifest_that_is_gone_from_dvcs_cache_stops_it_unless_it_is_to_be_forgotten(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a fresh clone, whose cache is empty: what the old manifests refer to is unknown."""
    for generation in ("old", "new"):
        for path in (root / ".dvc" / "cache").rglob("*"):
            if path.is_file() and f"full-{generation}" in path.read_text():
                path.unlink()
    assert main(["gc", "--yes"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("pbe: error: 1 manifests ") and "--forget-missing" in err and err.count("\n") == 1
    assert _present(_store(root)) == EVERY
    assert main(["gc", "--yes", "--forget-missing"]) == 0
    assert _present(_store(root)) == USED - {
        "runs/full-old",
        "parts/weights/unet-old",
    }  # the new one is in the working tree too


def test_what_the_run_cache_can_restore_stays_unless_it_is_left_out(root: Path) -> None:
    """A parameter was changed and changed back without a commit: DVC restores the manifests without a run."""
    _manifests(_store(root), "never", root / "made")
    _dvc(root, "repro", "-q")
    _git(root, "checkout", "-q", "dvc.lock")
    _manifests(_store(root), "new", root / "data")
    assert main(["gc", "--yes"]) == 0
    assert _present(_store(root)) == EVERY
    assert main(["gc", "--yes", "--no-run-cache"]) == 0
    assert _present(_store(root)) == USED


@pytest.mark.parametrize("text", ["stages: [", "stages: {all: {outs: [text]}}"])
def test_a_lock_that_cannot_be_read_removes_nothing(root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "dvc.lock").write_text(text)
    assert main(["gc", "--yes"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("pbe: error: dvc.lock: ") and "nothing is removed" in err and err.count("\n") == 1
    assert _present(_store(root)) == EVERY


def test_a_cache_that_lies_elsewhere_is_found(root: Path, tmp_path: Path) -> None:
    shutil.move(root / ".dvc" / "cache", tmp_path / "my cache")
    _dvc(root, "cache", "dir", "-q", str(tmp_path / "my cache"))
    assert main(["gc", "--yes"]) == 0
    assert _present(_store(root)) == USED


def test_a_commit_without_dvc_lock_and_one_that_is_empty_are_no_error(root: Path) -> None:
    for text in ("", "schema: '2.0'\n", None):
        if text is None:
            (root / "dvc.lock").unlink()
        else:
            (root / "dvc.lock").write_text(text)
        _git(root, "add", "-A")
        _git(root, "commit", "-qm", "less")
    assert main(["gc", "--yes"]) == 0
    assert _present(_store(root)) == USED


def test_a_stray_file_in_the_storage_stops_nothing(root: Path) -> None:
    store = _store(root)
    strays = ("parts/.DS_Store", "parts/ingest/notes.txt", "runs/notes.txt")
    for name in strays:
        store.write_bytes(name, b"not ours")
    assert main(["gc", "--yes"]) == 0
    for name in strays:
        Path(store.path(name)).unlink()  # it stays
    assert _present(store) == USED


def test_folders_that_are_not_ours_stay(root: Path) -> None:
    store = _store(root)
    names = ("parts/wood/oak/f", "runs/my_tensorboard/events", "parts/ingested/b0/x")
    for name in names:
        store.write_bytes(name, b"not ours")
    assert main(["gc", "--yes", "--older-than-h", "0"]) == 0
    assert all(Path(store.path(name)).is_file() for name in names)


@pytest.mark.parametrize("missing", ["git and DVC", "git", "the git program"])
def test_without_a_history_nothing_is_removed_and_one_line_says_why(
    root: Path, missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "the git program":
        monkeypatch.setenv("PATH", str(root))
    else:
        shutil.rmtree(root / ".git")
        if missing == "git":
            shutil.rmtree(root / ".dvc")
            _dvc(root, "init", "-q", "--no-scm")
        else:
            shutil.rmtree(root / ".dvc")
    assert main(["gc", "--yes", "--older-than-h", "0"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pbe: error: ") and err.count("\n") == 1
    assert "nothing is removed" in err
    assert _present(_store(root)) == EVERY


def test_a_manifest_that_cannot_be_read_removes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "data" / "ingest" / "manifest.json").write_text("{half")
    assert main(["gc", "--yes"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert _present(_store(root)) == EVERY


def test_s3_is_cleaned_too(root: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"{s3}/{tmp_path.name}")
    for name in ("parts", "runs"):
        store.copy_tree_in(Path(_store(root).path(name)), name)
    monkeypatch.setenv("PBE_STORAGE", store.uri)
    assert main(["gc", "--yes"]) == 0
    assert _present(store) == EVERY  # written just now
    # S3 counts whole seconds: a moment old may look younger than now
    remove(store, find_unused(store, root, older_than_s=-60, run_cache=True, forget_missing=False))
    assert _present(store) == USED


def test_a_codec_path_is_found_wherever_it_stands_in_a_manifest() -> None:
    manifest = {
        "config": {"deep": [{"bench": {"path": "parts/evaluate/bench-1/bench.parquet"}}, "parts/encode/codec-2/c"]},
        "units": [{"unit": "b0", "files": [{"path": "parts/encode/b0-3/a.parquet"}]}],
        "digest": "apart/from/this",
    }
    assert used_paths([manifest]) == {"parts/evaluate/bench-1", "parts/encode/codec-2", "parts/encode/b0-3"}
    assert used_paths([{"run": "full-1", "export": {}}]) == {"runs/full-1"}
    assert used_paths([{"history": ["runs/full-2/export/model.json"]}]) == {"runs/full-2"}
