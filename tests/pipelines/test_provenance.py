"""What a result says of the code that made it."""

from pathlib import Path

import pytest

from pipelines.runtime.provenance import COMMIT_VARIABLE, git_commit
from tests.pipelines.project import Project


def test_files_that_differ_make_a_commit_dirty_but_not_the_lock_that_every_stage_rewrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    git = Project(tmp_path).git
    git("init", "-q")
    for name in ("params.yaml", "dvc.lock"):
        (tmp_path / name).write_text("seed: 1\n")
    git("add", "params.yaml")
    git("commit", "-qm", "start")
    clean = git_commit(tmp_path)
    git("add", "dvc.lock")
    assert len(clean) == 40 and git_commit(tmp_path) == clean
    (tmp_path / "params.yaml").write_text("seed: 2\n")
    assert git_commit(tmp_path) == f"{clean}-dirty"
