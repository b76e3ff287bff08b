"""The job's side of the bridge, without a cluster; with one in test_cluster.py."""

import json
from pathlib import Path

import pytest

from pbe.store import Store
from pipelines.cluster import job_entry
from pipelines.cluster.working_dir import versions_here
from pipelines.runtime.stage import StageError


def test_equal_versions_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    job_entry._refuse_other_versions(json.loads(json.dumps(versions_here())), versions_here())
    job_entry._refuse_other_versions({}, versions_here())  # submitted by hand
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "found"), [("ray", "2.9.0"), ("python", "3.13")])
def test_another_ray_or_python_is_refused(name: str, found: str) -> None:
    ours = versions_here()
    with pytest.raises(StageError) as error:
        job_entry._refuse_other_versions({**ours, name: found}, ours)
    assert f"{name} {ours[name]} here and {found} there" in str(error.value)
    assert "requirements.lock" in str(error.value) and "\n" not in str(error.value)


def test_another_torch_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    job_entry._refuse_other_versions({**versions_here(), "torch": "2.0.0"}, versions_here())
    assert "warning" in (said := capsys.readouterr().out) and "2.0.0 there" in said


def test_a_node_that_does_not_share_the_storage_says_so(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    Store(str(tmp_path / "shared")).write_bytes("nodes/driver", b"")
    assert job_entry._probe(str(tmp_path / "shared"), "driver", "node-1") == ""
    assert Store(str(tmp_path / "shared")).exists("nodes/node-1")
    assert "does not see what another node wrote" in job_entry._probe(str(tmp_path / "own"), "driver", "node-1")


def test_a_node_that_cannot_write_says_so(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("nodes/driver", b"")
    (tmp_path / "nodes" / "node-1").mkdir()  # root may write anywhere, but not a file where a folder is
    problem = job_entry._probe(str(tmp_path), "driver", "node-1")
    assert "cannot be written" in problem and "\n" not in problem


def test_storage_that_is_another_place_for_the_sender_is_refused(tmp_path: Path) -> None:
    """As a folder of the laptop is, when the dashboard is at the other end of a tunnel."""
    store = Store(str(tmp_path))
    job_entry._refuse_other_storage(store, None)  # submitted by hand
    with pytest.raises(StageError, match="resolves to a different location on the cluster than"):
        job_entry._refuse_other_storage(store, "from-laptop")
    store.write_bytes("nodes/from-laptop", b"")
    job_entry._refuse_other_storage(store, "from-laptop")


def test_an_mlflow_that_is_a_file_of_the_sender_is_refused(tmp_path: Path) -> None:
    for fine in (f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "mlruns"), "http://mlflow.example:5000"):
        job_entry._refuse_far_mlflow(fine)
    for far in (f"sqlite:///{tmp_path}/laptop/mlflow.db", f"file://{tmp_path}/laptop/mlruns"):
        with pytest.raises(StageError, match="a file of the machine that sent this job; set MLFLOW_TRACKING_URI"):
            job_entry._refuse_far_mlflow(far)
