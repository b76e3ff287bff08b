"""The whole chain through `dvc repro` on real Ray, DeepSpeed, MLflow and DVC, in a folder with a space in its name.

These tests read what one run has left; those that change settings, code or data are in test_chain_changes.py.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pbe.data import images
from pbe.evaluate.metrics.frechet import statistics_from_bytes
from tests.pipelines.project import BASELINES, VARIANTS, Project, metrics

pytest.importorskip("skimage", reason="needs the sample extra")


GAIN = "exemplar_gain_efficientnet_lite2"


@pytest.mark.timeout(2000)  # the fixture: three tries of ten minutes on a busy machine
def test_repro_leaves_every_promised_output(repro: Project) -> None:
    for stage in ("ingest", "filter", "materialize", "encode"):
        manifest = json.loads((repro.folder / "data" / stage / "manifest.json").read_text())
        for unit in manifest["units"]:
            for file in unit["files"]:
                assert pq.read_metadata(repro.folder / ".store" / file["path"]).num_rows == file["rows"]
    counts = json.loads((repro.folder / "data" / "filter" / "counts.json").read_text())
    assert counts["boxes_in"] == 44
    assert counts["boxes_kept"] + counts["boxes_rejected"] == 44
    for variant in VARIANTS:
        assert (repro.folder / "models" / variant / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    found = metrics(repro)
    assert set(found) == {*VARIANTS, *BASELINES, "card"}
    for method in (*VARIANTS, *BASELINES):
        for hole in ("box", "bezier"):
            assert set(found[method][hole]) == {"exemplar", "own"}
            gain = found[method][hole]["exemplar"][GAIN]
            assert gain["low"] <= gain["value"] <= gain["high"] and (gain["n"], gain["extractor"]) == (12, GAIN[14:])
    html = (repro.folder / "reports" / "index.html").read_text()
    assert "exemplar gain" in html.lower() and re.search(r'<strong class="key v\d">full</strong>', html)
    clean, *draws = re.findall(r'<img src="(data:[^"]+)" alt="(?:clean|augmented) reference', html)
    assert len(draws) == 16 and len({clean, *draws}) > 8  # some draws leave it as it is
    assert 'src="http' not in html
    assert 'href="http' not in html.split("</head>")[0]


DVC_SAYS = [r"Running stage '[\w@]+':", r"> python -m pipelines .*", r"(Generating|Updating) lock file 'dvc\.lock'", ""]
DVC_SAYS += [r"Use `dvc push` to send your updates to remote storage\.", r"Stage .* didn.t change, skipping"]
DVC_SAYS += [
    r"WARNING: Process '.*' with \(Pid \d+\), in RWLock-file '.*' had been killed\. .*"
]  # after such a timeout
STAGE_SAYS = [
    r"\w+: \d+ of \d+ parts are already there, \d+ to do",
    r"[\w@]+: +\d+%\|.*\| \d+/\d+ \[.*\]",  # bars
    r"[\w: ]+: +\d+%\|.*\| \d+/\d+ \[.*\]",
    r"ingest: boxes: [\d.]+box \[.*\]",
    r"\w+: (\w+ \d+, )*\w+ \d+",  # counts
    r"encode: \d+ components keep [\d.]+% of the patch variance",
    r"train: resuming from step \d+.*",  # after a timeout of the fixture
    r"train@\w+: (registered in MLflow as pbe-\w+ version \d+|model in models/\w+)",
    r"evaluate: \w+: \d+ numbers",
    r"evaluate: features \d+ s, metrics and intervals \d+ s",
    r"(evaluate|sweep): side by side in MLflow: http://127\.0\.0\.1:5000/#/experiments/\d+/runs\?\S+",
    r"study: \d+ raters, \d+ items( \(.*\))?, \d+ screens each, methods [\w, ]+; plan \w{16}",
    r"study: .*/reports/study\.html \([\d.]+ MB\)",
    r"report: .*/reports/index\.html \([\d.]+ MB\)",
]


def test_every_line_on_the_terminal_is_news_and_the_rest_is_in_the_logs(repro: Project) -> None:
    shapes = [re.compile(shape) for shape in DVC_SAYS + STAGE_SAYS]
    summary = repro.run("pipelines", "summary").stdout
    said = repro.terminal_log.read_text()
    assert summary in said and "exemplar gain" in summary
    lines = said.replace(summary, "").split("\n")
    assert [line for line in lines if not any(shape.fullmatch(line) for shape in shapes)] == []
    assert len(lines) < 120
    logs = "".join(path.read_text() for path in (repro.folder / "logs" / "train-full").glob("*.log"))
    assert "Started training worker group" in logs and "train@full: model in models/full" in logs


def test_repro_again_does_nothing(repro: Project) -> None:
    before = {stage: repro.part_times(stage) for stage in ("ingest", "materialize", "encode")}
    said = repro.run("pipelines", "repro").stdout
    assert "up to date" in said and f"Report: {repro.folder / 'reports' / 'index.html'}" in said
    assert before == {stage: repro.part_times(stage) for stage in before}


def test_a_repro_that_fails_ends_with_dvcs_status_and_without_a_summary(repro: Project) -> None:
    done = repro.run("pipelines", "repro", "--single-item", "no_such_stage", check=False)
    assert done.returncode == 255 and "no_such_stage" in done.stderr and "Report:" not in done.stdout


def test_status_says_how_far_each_stage_is(repro: Project) -> None:
    said = repro.run("pipelines", "status").stdout.splitlines()
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in said if not line.startswith(" ")}
    assert lines["ingest"] == lines["evaluate"] == "its results are here"
    assert lines["train@full"].startswith("run full-") and "12 steps, its model is here" in lines["train@full"]
    assert any(line.strip().startswith("MLflow run http://127.0.0.1:5000/#/runs/") for line in said)
    assert any("rejected: 1 area_above_max" in line for line in said)
    # parts that went, and a training that is half way
    record = next((repro.folder / ".store" / "parts" / "encode").glob("s*/record.json"))
    kept = record.read_bytes()
    record.unlink()
    try:
        assert "3 of 4 encode parts; began " in repro.run("pipelines", "status").stdout
    finally:
        record.write_bytes(kept)


def test_metrics_and_plots_are_shown(repro: Project) -> None:
    assert GAIN in repro.run("dvc", "metrics", "show").stdout
    repro.run("dvc", "plots", "show", "--out", "plots-out")
    assert (repro.folder / "plots-out" / "index.html").is_file()


def test_what_is_known_of_the_methods_shows_in_their_numbers(repro: Project) -> None:
    """Pasting follows the reference and copies it, twelve steps of training do not."""
    found = {name: scopes["box"]["exemplar"] for name, scopes in metrics(repro).items() if name != "card"}
    value = {name: {metric: number["value"] for metric, number in numbers.items()} for name, numbers in found.items()}
    for trained in VARIANTS:
        assert value["copy_paste"][GAIN] > value[trained][GAIN] + 0.2
        assert value["copy_paste"]["copy_paste"] > 0.8 > 0.3 > value[trained]["copy_paste"]
        assert value["poisson"]["copy_paste"] > value[trained]["copy_paste"]
    assert all(numbers["background_psnr_db"] == 60 for numbers in value.values())
    assert value["copy_paste"]["similarity_efficientnet_lite2"] > value["poisson"]["similarity_efficientnet_lite2"]
    assert value["full"] != value["untrained"]


def test_every_number_has_its_card(repro: Project) -> None:
    found = metrics(repro)
    card, protocol = found["card"], found["full"]["protocol"]
    bench = json.loads((repro.folder / "data/bench/manifest.json").read_text())
    assert card["bench"]["sha256"] == bench["units"][0]["files"][0]["sha256"] and card["bench"]["items"] == 12
    assert card["data_digest"] == json.loads((repro.folder / "data/ingest/manifest.json").read_text())["digest"]
    assert set(card["extractors"]) == {"efficientnet_lite2", "efficientnet_lite0"}
    known = {"digest", "resize_rule", "papers_network", "reference_digest", "reference_n", "reference_statistics"}
    known.add("exemplars_n")
    for name, extractor in card["extractors"].items():
        assert set(extractor) == known and extractor["reference_n"] == 12
        kept = (repro.folder / ".store" / extractor["reference_statistics"]).read_bytes()
        statistics, whose = statistics_from_bytes(kept, "")
        assert (statistics.n, whose.extractor, whose.resize_rule) == (12, name, extractor["resize_rule"])
    assert (protocol["guidance_scale"], protocol["steps"], protocol["seeds"]) == (3.0, 3, [42])
    assert found["untrained"]["protocol"]["guidance_scale"] == 1.0
    assert protocol["run"] == json.loads((repro.folder / "data/train/full/manifest.json").read_text())["run"]
    assert len(card["git_commit"]) >= 40


def test_pairs_are_tested_against_full_and_full_against_itself_is_nothing(repro: Project) -> None:
    paired = json.loads((repro.folder / "data/evaluate/paired.json").read_text())
    assert paired["against"] == "full" and set(paired["methods"]) == {*VARIANTS, *BASELINES}
    itself = paired["methods"]["full"]["box"]["exemplar"]
    assert itself["frechet_efficientnet_lite2"]["p_value"] == 1
    for found in itself.values():
        assert (found["difference"]["value"], found["p_value"]) == (0, 1)
    pasted = paired["methods"]["copy_paste"]["box"]["exemplar"][GAIN]
    value = {name: metrics(repro)[name]["box"]["exemplar"][GAIN]["value"] for name in ("copy_paste", "full")}
    assert pasted["difference"]["value"] == pytest.approx(value["copy_paste"] - value["full"])
    assert pasted["difference"]["low"] > 0 and pasted["p_value"] < 0.05


def test_a_sweep_is_the_edits_and_metrics_of_every_scale(repro: Project) -> None:
    found = json.loads((repro.folder / "data/sweep/metrics.json").read_text())
    assert (found["variant"], found["hole"], found["diversity_scale"]) == ("full", "box", 3.0)
    cards = [{k: v for k, v in which["card"].items() if k != "git_commit"} for which in (found, metrics(repro))]
    assert set(found["scales"]) == {"1", "3", "7.5"} and cards[0] == cards[1]
    assert found["paired"]["against"] == "1" and set(found["paired"]["scales"]) == set(found["scales"])
    assert all(test["p_value"] == 1 for test in found["paired"]["scales"]["1"].values())
    # the tiny sweep is of all items: at full's own scale its numbers are full's, but for the last bits of another batch
    evaluated = metrics(repro)["full"]["box"]["exemplar"]
    for metric, number in found["scales"]["3"].items():
        close = 0.1 if metric.startswith("retrieval_") else 2e-3  # those bits may swap two exemplars of one item
        assert number["value"] == pytest.approx(evaluated[metric]["value"], rel=0.02, abs=close), metric
    frechet = [found["scales"][scale]["frechet_efficientnet_lite2"]["value"] for scale in ("1", "3", "7.5")]
    assert len(set(frechet)) == 3
    spreads = found["diversity"]
    assert set(spreads) == {"spread_efficientnet_lite2", "spread_efficientnet_lite0", "spread_pixels"}
    for spread in spreads.values():
        assert 0 < spread["low"] <= spread["value"] <= spread["high"] and spread["n"] == 4
    manifest = json.loads((repro.folder / "data/sweep/manifest.json").read_text())
    files = {unit["unit"]: unit["files"][0]["path"] for unit in manifest["units"]}
    names = manifest["config"]["edits"]["diversity"]
    rows = [row for name in names for row in pq.read_table(repro.folder / ".store" / files[name]).to_pylist()]
    assert {row["seed"] for row in rows} == {1, 2, 3} and len(rows) == 12
    by_item: dict[str, list[np.ndarray]] = {}
    for row in rows:
        by_item.setdefault(row["bench_id"], []).append(images.decode(row["edit"]).astype(float))
    # outside the hole nothing changes, so that the spread of the whole picture is the hole's, times its share
    assert all(
        0 < np.stack(fills).std(0, ddof=1).mean() < spreads["spread_pixels"]["high"] for fills in by_item.values()
    )


def test_mlflow_has_all_variants_with_curves_images_dataset_and_system_metrics(repro: Project) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{repro.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("paint-by-example")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    names = [run.data.tags["variant"] for run in parents]
    assert set(names) >= {*VARIANTS, *BASELINES} and all(names.count(variant) == 1 for variant in VARIANTS)
    for run in (run for run in parents if run.data.tags["variant"] == "full"):
        assert run.data.params["train.steps"] == "12"
        assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["dataset_digest"]
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) > 2
        assert {f"eval-box/{GAIN}", f"eval-bezier/{GAIN}", "edit/guidance_scale"} <= set(run.data.metrics)
        assert any(name.startswith("system/") for name in run.data.metrics)
        swept = {"guidance.png", "diversity.png"} if run.data.tags["variant"] == "full" else set()
        artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert artifacts == {"edits.png", "images", *swept}
        grids = [image.path for image in client.list_artifacts(run.info.run_id, "images")]
        steps = {int(step) for grid in grids for step in re.findall(r"/edits[%+]step[%+](\d+)[%+]", grid)}
        assert steps == {6 * 8, 12 * 8}  # validate_every x batch: grids stand against samples seen
        validation = client.get_metric_history(run.info.run_id, "train/validation_loss")
        assert [point.step for point in validation] == sorted(steps)
        assert {"train/grad_norm", "train/peak_memory_gib", "train/data_s"} <= set(run.data.metrics)
        version = client.search_model_versions(f"name='pbe-{run.data.tags['variant']}'")[0]
        assert version.run_id == run.info.run_id
        assert Path(version.source, "unet", "diffusion_pytorch_model.safetensors").is_file()
        children = [other for other in runs if other.data.tags.get("mlflow.parentRunId") == run.info.run_id]
        evaluated = [child for child in children if child.data.tags["part_of"] == "evaluate"]
        assert evaluated and all(f"box/own/{GAIN}.low" in child.data.metrics for child in evaluated)
        assert evaluated[0].data.params["card.bench.items"] == "12"
    scales = {run.data.params["guidance_scale"]: run for run in runs if run.data.tags.get("part_of") == "sweep"}
    assert set(scales) == {"1", "3", "7.5"}
    assert all("similarity_efficientnet_lite2.low" in run.data.metrics for run in scales.values())


@pytest.mark.browser
def test_report_shows_in_a_browser(repro: Project, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on PATH")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}"]
    picture, page = tmp_path / "page.png", (repro.folder / "reports" / "index.html").as_uri()
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", "--window-size=1280,3000", page],
        check=True,
        capture_output=True,
        timeout=120,
    )
    shown = images.decode(picture.read_bytes())
    assert shown.shape == (3000, 1280, 3)
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 2000  # pictures are there, not only text
