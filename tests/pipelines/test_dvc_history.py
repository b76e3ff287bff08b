"""DVC's own commands about the past: metrics of two commits, experiments, a queue, a clone that pulls from a remote."""

import csv
import json
from pathlib import Path

import pytest

from tests.pipelines.project import Project, metrics

pytest.importorskip("skimage", reason="needs the sample extra")
# it waits for the chain itself if it comes first
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SCORE = "full.box.exemplar.qs_rank_efficientnet_lite2.value"


def _score(project: Project) -> float:
    return metrics(project)["full"]["box"]["exemplar"]["qs_rank_efficientnet_lite2"]["value"]


def _commit(project: Project, message: str) -> None:
    project.git("add", "-A")
    project.git("commit", "-qm", message)


def _metrics_diff(project: Project) -> dict[str, dict[str, float]]:
    """Of the last commit against the one before it, of evaluate: {metric: {old, new, diff}}."""
    shown = json.loads(project.run("dvc", "metrics", "diff", "--json", "HEAD~1", "HEAD").stdout)
    return shown["data/evaluate/metrics.json"]


def test_every_commit_and_experiment_keeps_its_metrics_in_a_clone_too(changeable: Project, tmp_path: Path) -> None:
    project = changeable
    scores = {"main": _score(project)}
    _commit(project, "two components")
    project.set_params(evaluate__quality_components=3)
    project.run("dvc", "repro")
    scores["changed"] = _score(project)
    _commit(project, "three components")
    assert scores["changed"] != scores["main"]
    expected = {"old": scores["main"], "new": scores["changed"], "diff": scores["changed"] - scores["main"]}
    assert _metrics_diff(project)[SCORE] == pytest.approx(expected)
    for command in ("params", "plots"):
        assert project.run("dvc", command, "diff", "--json", "HEAD~1", "HEAD").stdout.strip() not in ("", "{}")

    project.run("dvc", "exp", "run", "-n", "now", "-S", "evaluate.quality_components=4", "evaluate")
    scores["now"] = _score(project)
    project.run("dvc", "exp", "run", "--queue", "-n", "later", "-S", "evaluate.quality_components=1", "evaluate")
    project.run("dvc", "exp", "run", "--run-all")
    table = csv.DictReader(project.run("dvc", "exp", "show", "--csv").stdout.splitlines())
    shown = {row["Experiment"]: row for row in table}
    column = next(name for name in shown["now"] if name.endswith(SCORE))
    assert "!" not in {cell for row in shown.values() for cell in row.values()}
    assert float(shown["now"][column]) == pytest.approx(scores["now"], rel=1e-4)
    assert float(shown["later"][column]) not in (float(shown["now"][column]), pytest.approx(scores["changed"]))
    project.git("checkout", "-q", ".")
    project.run("dvc", "checkout")
    assert _score(project) == scores["changed"]

    project.run("dvc", "remote", "add", "-d", "shelf", str(tmp_path / "remote"))
    _commit(project, "a remote")
    project.run("dvc", "push", "-q")
    project.git("clone", "-q", str(project.folder), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    (clone.folder / ".venv").symlink_to(project.folder / ".venv")
    clone.run("dvc", "pull", "-q")
    assert _score(clone) == scores["changed"]
    assert "up to date" in clone.run("dvc", "status").stdout
