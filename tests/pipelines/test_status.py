"""status where files are damaged; on real runs in test_chain.py and test_cluster.py."""

import json
from pathlib import Path

import pytest

from pbe.store import Store
from pipelines.commands import status
from pipelines.runtime.progress_records import read_plans, write_plan


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PBE_STORAGE", str(tmp_path / "store"))
    monkeypatch.setattr(status, "repo_root", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize("manifest", ["{", "[]", "{}"])
def test_a_damaged_file_costs_its_stage_alone(root: Path, manifest: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {"train/full/manifest.json": manifest, "filter/counts.json": '{"rejected_x": "many"}'}.items():
        (root / "data" / name).parent.mkdir(parents=True)
        (root / "data" / name).write_text(text)
    status.main()
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "unknown: a file in" in lines["train@full"] and str(root / "data" / "train" / "full") in lines["train@full"]
    assert "unknown: a file in" in lines["filter"]
    assert "no results here yet" in lines["ingest"]


@pytest.mark.parametrize("finished", ["{", "[]"])
def test_a_damaged_run_is_told(root: Path, finished: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(root / "store"))
    write_plan(store, "train@full", "run", ["full-0123"], total=10)
    store.write_bytes("runs/full-0123/export/pbe.json", b"{}")
    store.write_bytes("runs/full-0123/finished.json", finished.encode())
    status.main()
    assert "train@full" in capsys.readouterr().out


def test_plans_that_cannot_be_read_are_left_out(root: Path) -> None:
    store = Store(str(root / "store"))
    whole = {"kind": "encode", "units": ["b0"], "total": 1, "began": 1.0, "where": "here"}
    damaged = [{}, [], {**whole, "units": []}, {**whole, "total": "many"}, {**whole, "began": 1e20}, {**whole, "x": 1}]
    for number, plan in enumerate([whole, *damaged]):
        store.write_bytes(f"plans/encode/{number}.json", json.dumps(plan).encode())
    store.write_bytes("plans/encode/half.json", b"{")
    assert [plan.units for plan in read_plans(store, "encode")] == [("b0",)]
