"""A stage as a KubeRay manifest: it holds what the bridge would send. Its pods: tests/infra/test_manifests.py."""

import io
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from pbe.store import Store
from pipelines.cluster import rayjob
from pipelines.runtime.stage import Stage, StageError
from tests.profiles import profile

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def stage(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    root = tmp_path / "a project"
    for name in ("pbe", "pipelines", "infra/kuberay"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "params.yaml", root / "params.yaml")
    (root / "data" / "ingest").mkdir(parents=True)
    (root / "data" / "ingest" / "manifest.json").write_text("{}")
    params = profile("tiny")
    return Stage("materialize", None, params, Store(f"{s3}/{tmp_path.name}"), root)


def test_the_manifest_runs_the_package_that_lies_in_the_storage(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    rayjob.main(stage)
    said = capsys.readouterr()
    manifest = yaml.safe_load(said.out)
    spec = manifest["spec"]
    job_id = spec["entrypoint"].split()[-1]
    assert spec["entrypoint"] == f"python -m pipelines materialize --as-job {job_id}"
    assert re.fullmatch(r"pbe-materialize-[0-9a-f]{16}-1", job_id) and manifest["metadata"]["name"] == job_id
    runtime = yaml.safe_load(spec["runtimeEnvYAML"])
    assert runtime["working_dir"] == f"{stage.store.uri}/jobs/{job_id}/package.zip"
    assert runtime["env_vars"]["PBE_STORAGE"] == stage.store.uri
    with zipfile.ZipFile(io.BytesIO(stage.store.read_bytes(f"jobs/{job_id}/package.zip"))) as package:
        assert {"pipelines/__main__.py", "data/ingest/manifest.json", "params.yaml"} <= set(package.namelist())
    assert "hunter2" not in said.out
    template = yaml.safe_load((stage.root / rayjob.TEMPLATE).read_text())
    assert spec["rayClusterSpec"] == template["spec"]["rayClusterSpec"]
    assert "fetches its results" in said.err

    rayjob.main(stage)  # Kubernetes would take an equal name for the same job
    assert yaml.safe_load(capsys.readouterr().out)["metadata"]["name"].endswith("-2")


def test_storage_of_this_machine_is_refused_before_anything_is_written(stage: Stage, tmp_path: Path) -> None:
    here = Stage(stage.name, None, stage.params, Store(str(tmp_path / "store")), stage.root)
    with pytest.raises(StageError, match=r"out of reach for Kubernetes; set PBE_STORAGE=s3"):
        rayjob.main(here)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("job_id", "name"),
    [
        ("pbe-encode-0123456789abcdef-1", "pbe-encode-0123456789abcdef-1"),
        ("pbe-train-no_mask_aug-0123456789abcdef-12", "pbe-train-no-mask-aug-0123456789abcdef-12"),
        ("pbe-train-a_variant_with_a_long_name-0123456789abcdef-3", "pbe-train-a-variant-with-a-l-0123456789abcdef-3"),
    ],
)
def test_kubernetes_takes_the_name(job_id: str, name: str) -> None:
    assert rayjob.kubernetes_name(job_id) == name
    assert len(name) <= rayjob.NAME_CHARS and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)


@pytest.mark.parametrize(
    ("arguments", "told"), [(["ingest", "--variant", "full"], "has no variants"), (["train"], "needs --variant NAME")]
)
def test_a_variant_belongs_to_the_stages_that_have_some(arguments: list[str], told: str) -> None:
    command = [sys.executable, "-m", "pipelines", "rayjob", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and told in done.stderr and not done.stdout
