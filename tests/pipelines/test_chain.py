"""The whole chain through `dvc repro` on real Ray, DeepSpeed, MLflow and DVC, in a folder with a space in its name."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from pbe.data import images
from pbe.evaluate.frechet import statistics_from_bytes
from tests.pipelines.project import Project, kill_tree, make_project
from tests.tiny_weights import write_inception

pytest.importorskip("skimage", reason="needs the sample extra")
POLL_S = 0.05


@pytest.fixture(scope="module")
def repro(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("chain") / "my project")
    project.run("dvc", "repro")
    return project


VARIANTS, BASELINES = ("full", "bottleneck", "untrained"), ("copy_paste", "poisson")
GAIN = "exemplar_gain_efficientnet_lite2"


def metrics(project: Project) -> dict:
    return json.loads((project.folder / "data" / "evaluate" / "metrics.json").read_text())


@pytest.mark.timeout(700)
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
            assert gain["low"] <= gain["value"] <= gain["high"] and (gain["n"], gain["judge"]) == (12, GAIN[14:])
    html = (repro.folder / "reports" / "index.html").read_text()
    assert "exemplar gain" in html.lower() and "classifier-free guidance (full)" in html
    clean, *draws = re.findall(r'<img src="(data:[^"]+)" alt="(?:clean|augmented) reference', html)
    assert len(draws) == 16 and len({clean, *draws}) > 8  # some draws leave it as it is
    assert 'src="http' not in html
    assert 'href="http' not in html.split("</head>")[0]


def test_repro_again_does_nothing(repro: Project) -> None:
    before = {stage: repro.part_times(stage) for stage in ("ingest", "materialize", "encode")}
    assert "up to date" in repro.run("dvc", "repro").stdout
    assert before == {stage: repro.part_times(stage) for stage in before}


def test_status_says_how_far_each_stage_is(repro: Project) -> None:
    said = repro.run("pipelines", "status").stdout.splitlines()
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in said if not line.startswith(" ")}
    assert lines["ingest"] == lines["evaluate"] == "its results are here"
    assert lines["train@full"].startswith("run full-") and "12 steps, its model is here" in lines["train@full"]
    assert any(line.strip().startswith("MLflow run http://127.0.0.1:5000/#/runs/") for line in said)
    assert any("rejected: 1 area_above_max" in line for line in said)
    # parts that went, and a training that is half way
    record = next((repro.folder / ".store" / "parts" / "encode").glob("b*/record.json"))
    kept = record.read_bytes()
    record.unlink()
    try:
        said = repro.run("pipelines", "status").stdout
        assert "3 of 4 encode parts; began " in said
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
    assert value["full"] != value["bottleneck"] != value["untrained"]


def test_every_number_has_its_card(repro: Project) -> None:
    found = metrics(repro)
    card, protocol = found["card"], found["full"]["protocol"]
    bench = json.loads((repro.folder / "data/bench/manifest.json").read_text())
    assert card["bench"]["sha256"] == bench["units"][0]["files"][0]["sha256"] and card["bench"]["items"] == 12
    assert card["data_digest"] == json.loads((repro.folder / "data/ingest/manifest.json").read_text())["digest"]
    assert set(card["extractors"]) == {"efficientnet_lite2", "efficientnet_lite0"}
    known = {"digest", "resize_rule", "papers_network", "reference_digest", "reference_n", "reference_statistics"}
    for name, judge in card["extractors"].items():
        assert set(judge) == known and judge["reference_n"] == 12
        kept = (repro.folder / ".store" / judge["reference_statistics"]).read_bytes()
        statistics, whose = statistics_from_bytes(kept, "")
        assert (statistics.n, whose.extractor, whose.resize_rule) == (12, name, judge["resize_rule"])
    assert (protocol["guidance_scale"], protocol["steps"], protocol["seeds"]) == (3.0, 3, [42])
    assert found["bottleneck"]["protocol"]["guidance_scale"] == 1.0
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


def test_another_metric_setting_costs_no_second_look_and_no_second_edit(repro: Project) -> None:
    before = {stage: repro.part_times(stage) for stage in ("bench", "edit", "look")}
    repro.edit_params("quality_components: 2", "quality_components: 3")
    try:
        repro.run("dvc", "repro", "evaluate")
        assert before == {stage: repro.part_times(stage) for stage in before}
    finally:
        repro.edit_params("quality_components: 3", "quality_components: 2")
    repro.run("dvc", "repro", "evaluate")


def test_methods_in_another_order_cost_no_second_look(repro: Project) -> None:
    before = {stage: repro.part_times(stage) for stage in ("edit", "look", "statistics")}
    first, second = "  copy_paste: {kind: copy_paste}\n", "  poisson: {kind: poisson}\n"
    repro.edit_params(first + second, second + first)
    try:
        repro.run("pipelines", "evaluate")
        assert before == {stage: repro.part_times(stage) for stage in before}
    finally:
        repro.edit_params(second + first, first + second)


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
        assert number["value"] == pytest.approx(evaluated[metric]["value"], rel=0.02, abs=2e-3), metric
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


@pytest.mark.timeout(600)  # four evaluations
def test_a_folder_of_untouched_photos_measures_as_the_same_photos_of_the_bench_do(repro: Project) -> None:
    """By another judge too, from one actor and in other batches: 1e-6."""
    before = metrics(repro)
    folder = repro.folder / "untouched photos"
    folder.mkdir()
    bench = json.loads((repro.folder / "data/bench/manifest.json").read_text())
    path = next(f["path"] for f in bench["units"][0]["files"] if f["dataset"] == "real")
    for row in pq.read_table(repro.folder / ".store" / path).to_pylist():
        (folder / f"{row['real_id'].replace('/', '_')}.png").write_bytes(
            images.encode_png(images.decode(row["picture"]))
        )
    sha256 = hashlib.sha256(write_inception(repro.folder / "inception.pt").read_bytes()).hexdigest()
    changes = [
        ("  reals: null\n  reals_px: null\n", "  reals: untouched photos\n  reals_px: 64\n"),
        ("  batch_rows: 16\n  actors: 2\n", "  batch_rows: 5\n  actors: 1\n"),
        ("lite0}\n  reals", f"lite0}}\n    - {{kind: inception, file: inception.pt, sha256: {sha256}}}\n  reals"),
    ]
    for old, new in changes[::-1]:
        repro.edit_params(old, new)
    try:
        shutil.rmtree(repro.folder / ".store/parts/look")
        repro.run("pipelines", "evaluate")
        after = metrics(repro)
        for method in (*VARIANTS, *BASELINES):
            for metric, number in before[method]["box"]["exemplar"].items():
                again = after[method]["box"]["exemplar"][metric]
                for key in ("value", "low", "high"):
                    assert again[key] == pytest.approx(number[key], rel=1e-6, abs=1e-6), (method, metric)
            assert {"fid", "kid", "qs_rank_inception"} <= set(after[method]["box"]["exemplar"])
        assert after["card"]["reference"] == "untouched photos"
        for name in ("zzz.png", ".DS_Store"):  # the second is none of ours
            (folder / name).write_bytes(b"no picture")
        result = repro.run("pipelines", "evaluate", check=False)
        errors = [line for line in result.stderr.splitlines() if line.startswith("pbe: error: ")]
        assert result.returncode == 1 and len(errors) == 1 and "zzz.png" in errors[0] and "remove it" in errors[0]
    finally:
        for old, new in changes:
            repro.edit_params(new, old)
    shutil.rmtree(
        repro.folder / ".store/parts/look"
    )  # kept by content: of the other batches, equal but for the last bits
    repro.run("pipelines", "evaluate")
    assert metrics(repro)["full"]["box"] == before["full"]["box"]


def test_edits_go_on_where_a_kill_left_them(repro: Project) -> None:
    """A part of the edits is gone: that one alone is made again, the same bytes."""
    manifest = json.loads((repro.folder / "data/edit/full/manifest.json").read_text())
    part = repro.folder / ".store/parts/edit" / manifest["units"][1]["unit"]
    edits = (part / "edits.parquet").read_bytes()
    before = repro.part_times("edit")
    shutil.rmtree(part)
    for variant in VARIANTS:
        repro.run("pipelines", "edit", "--variant", variant)
    assert (part / "edits.parquet").read_bytes() == edits
    after = repro.part_times("edit")
    assert {name for name in after if after[name] != before[name]} == {
        f"{part.name}/{name}" for name in ("edits.parquet", "record.json")
    }


def test_results_of_others_are_a_row_of_the_table(repro: Project) -> None:
    """Pictures named by bench id, here those of copy_paste: the same numbers, and clear words for what is missing."""
    theirs = repro.folder / "results of theirs"
    theirs.mkdir()
    manifest = json.loads((repro.folder / "data/edit/copy_paste/manifest.json").read_text())
    rows = pq.read_table(repro.folder / ".store" / manifest["units"][0]["files"][0]["path"]).to_pylist()
    for row in rows:
        if (row["hole_kind"], row["reference_kind"]) == ("box", "exemplar"):
            (theirs / f"{row['bench_id']}.png").write_bytes(row["edit"])
    last = "  poisson: {kind: poisson}\n"
    repro.edit_params(last, last + "  theirs: {kind: folder, folder: results of theirs}\n")
    try:
        repro.run("pipelines", "baseline", "--baseline", "theirs")
        repro.run("pipelines", "evaluate")
        found = metrics(repro)
        ours, again = found["copy_paste"]["box"]["exemplar"], found["theirs"]["box"]["exemplar"]
        assert set(found["theirs"]) == {"protocol", "box"}
        for metric in ("frechet_efficientnet_lite2", "qs_rank_efficientnet_lite0", "copy_paste"):
            assert again[metric]["value"] == pytest.approx(ours[metric]["value"], rel=1e-6)
        next(theirs.iterdir()).unlink()
        result = repro.run("pipelines", "baseline", "--baseline", "theirs", check=False)
        errors = [line for line in result.stderr.splitlines() if line.startswith("pbe: error: ")]
        assert result.returncode == 1 and len(errors) == 1 and "1 (" in errors[0] and "allow_missing" in errors[0]
    finally:
        repro.edit_params("  theirs: {kind: folder, folder: results of theirs}\n", "")
    repro.run("pipelines", "evaluate")


def test_mlflow_has_all_variants_with_curves_images_dataset_and_system_metrics(repro: Project) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{repro.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("paint-by-example")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    names = [run.data.tags["variant"] for run in parents]
    assert set(names) >= {*VARIANTS, *BASELINES} and all(names.count(variant) == 1 for variant in VARIANTS)
    for run in (run for run in parents if run.data.tags["variant"] in ("full", "bottleneck")):
        assert run.data.params["train.steps"] == "12"
        assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["dataset_digest"]
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) > 2
        assert {f"eval-box/{GAIN}", f"eval-bezier/{GAIN}", "edit/guidance_scale"} <= set(run.data.metrics)
        assert any(name.startswith("system/") for name in run.data.metrics)
        swept = {"guidance.png", "diversity.png"} if run.data.tags["variant"] == "full" else set()
        artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert artifacts == {"edits.png", "images", *swept}
        grids = [image.path for image in client.list_artifacts(run.info.run_id, "images")]
        steps = {int(step) for grid in grids for step in re.findall(r"[%+]step[%+](\d+)[%+]", grid)}
        assert steps == {6 * 8, 12 * 8}  # validate_every x batch: grids stand against samples seen
        validation = client.get_metric_history(run.info.run_id, "train/validation_loss")
        assert [point.step for point in validation] == sorted(steps)
        assert {"train/grad_norm", "train/peak_memory_gib", "train/data_s"} <= set(run.data.metrics)
        version = client.search_model_versions(f"name='pbe-{run.data.tags['variant']}'")[0]
        assert version.run_id == run.info.run_id
        assert Path(version.source, "unet", "diffusion_pytorch_model.safetensors").is_file()
        children = [other for other in runs if other.data.tags.get("mlflow.parentRunId") == run.info.run_id]
        evaluated = [child for child in children if "part_of" not in child.data.tags]
        assert evaluated and all(f"box/own/{GAIN}.low" in child.data.metrics for child in evaluated)
        assert evaluated[0].data.params["card.bench.items"] == "12"
    scales = {run.data.params["guidance_scale"]: run for run in runs if run.data.tags.get("part_of") == "sweep"}
    assert set(scales) == {"1", "3", "7.5"}
    assert all("similarity_efficientnet_lite2.low" in run.data.metrics for run in scales.values())


def test_param_switched_and_switched_back_recomputes_nothing(repro: Project) -> None:
    before = repro.part_times("materialize")
    repro.edit_params("min_area_frac: 0.02", "min_area_frac: 0.03")
    repro.run("pipelines", "filter")
    repro.run("pipelines", "materialize")
    added = repro.part_times("materialize")
    assert added.keys() > before.keys()
    repro.edit_params("min_area_frac: 0.03", "min_area_frac: 0.02")
    repro.run("dvc", "repro", "encode")
    assert repro.part_times("materialize") == added


def test_a_comment_renames_no_part_and_runs_no_later_stage(repro: Project) -> None:
    before = {stage: repro.part_times(stage) for stage in ("ingest", "filter", "materialize", "encode")}
    changed = [repro.folder / name for name in ("pipelines/ingest.py", "pbe/data/schema.py", "pbe/store.py")]
    texts = [path.read_text() for path in changed]
    for path, text in zip(changed, texts, strict=True):
        path.write_text(f"{text}# a comment\n")
    try:
        said = repro.run("dvc", "repro", "encode").stdout
    finally:
        for path, text in zip(changed, texts, strict=True):
            path.write_text(text)
    assert "Running stage 'ingest'" in said and "ingest: 4 of 4 parts are already there" in said
    assert all(f"Running stage '{stage}'" not in said for stage in ("filter", "materialize", "encode"))
    assert before == {stage: repro.part_times(stage) for stage in before}
    repro.run("dvc", "repro", "encode")


def test_a_new_version_makes_the_stages_parts_again_and_no_others_where_their_bytes_are_equal(repro: Project) -> None:
    before = {stage: repro.part_times(stage) for stage in ("ingest", "filter", "materialize", "encode")}
    stage = repro.folder / "pipelines" / "filter.py"
    text = stage.read_text()
    stage.write_text(text.replace("\nVERSION = 1\n", "\nVERSION = 1000\n"))
    try:
        said = repro.run("dvc", "repro", "encode").stdout
    finally:
        stage.write_text(text)
    assert "materialize: 4 of 4 parts are already there" in said
    after = {stage: repro.part_times(stage) for stage in before}
    made = {name.split("/")[0] for name in after["filter"].keys() - before["filter"].keys()}
    assert len(made) == 4 and all(after[stage] == before[stage] for stage in ("ingest", "materialize", "encode"))
    repro.run("dvc", "repro", "encode")


def test_bad_parameter_is_refused_in_one_line_before_any_work(repro: Project) -> None:
    repro.edit_params("steps: 12", "stepz: 12")
    try:
        result = repro.run("pipelines", "ingest", check=False)
    finally:
        repro.edit_params("stepz: 12", "steps: 12")
    assert result.returncode == 1
    assert "train.stepz = 12: unknown key" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def _size(path: Path) -> int:
    return path.stat().st_size


def _wait_for(found, process, what: str) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert process.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, f"no {what} within two minutes"
        time.sleep(POLL_S)


@pytest.mark.timeout(400)
def test_interrupted_or_killed_in_materialize_keeps_finished_parts(tmp_path: Path) -> None:
    project = make_project(tmp_path / "killed")
    project.edit_params("slots: 4", "slots: 600")
    project.run("pipelines", "ingest")
    project.run("pipelines", "filter")
    parts = project.folder / ".store" / "parts" / "materialize"

    photos = max((project.folder / ".store" / "parts" / "ingest").glob("*/images.parquet"), key=_size)
    whole = photos.read_bytes()
    photos.write_bytes(whole[:5000] + bytes(byte ^ 255 for byte in whole[5000:5020]) + whole[5020:])
    damaged = project.run("pipelines", "materialize", check=False)  # the error is raised in a Ray task
    assert damaged.returncode == 1 and "Traceback" not in damaged.stderr
    errors = [line for line in damaged.stderr.splitlines() if line.startswith("pbe: error: ")]
    assert len(errors) == 1 and str(photos) in errors[0] and "dvc repro -f -s ingest" in errors[0]
    photos.write_bytes(whole)
    project.edit_params("per_bucket: {cpus: 1,", "per_bucket: {cpus: 1000,")
    asked_too_much = project.run("pipelines", "materialize", check=False).stderr
    assert "materialize.per_bucket: 1000 CPUs, 0.5 GiB of memory does not fit on one node with" in asked_too_much
    project.edit_params("per_bucket: {cpus: 1000,", "per_bucket: {cpus: 4,")  # one bucket after the other
    shutil.rmtree(parts)  # the buckets that were whole are done

    process = project.start("pipelines", "materialize")
    _wait_for(lambda: "0 of 4 parts" in project.started_log(), process, "start")
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole foreground group
    assert process.wait(timeout=60) == 130
    assert "the same command goes on" in project.started_log()
    assert "Traceback" not in project.started_log()

    process = project.start("dvc", "repro", "materialize")
    _wait_for(lambda: list(parts.glob("*/record.json")), process, "finished part")
    kill_tree(process)
    finished = {path.parent.name for path in parts.glob("*/record.json")}
    assert 0 < len(finished) < 4
    before = {name: when for name, when in project.part_times("materialize").items() if name.split("/")[0] in finished}
    project.run("pipelines", "check")  # as `make repro` does
    project.run("dvc", "repro", "materialize")
    after = project.part_times("materialize")
    assert len(list(parts.glob("*/record.json"))) == 4
    assert {name: after[name] for name in before} == before


def _last_losses(project: Project) -> list[float]:
    """Training and validation loss of the last step."""
    with (project.folder / "data" / "train" / "full" / "loss.csv").open(newline="") as stream:
        last = list(csv.DictReader(stream))[-1]
    return [float(last["loss"]), float(last["validation_loss"])]


@pytest.mark.timeout(500)
def test_killed_in_train_goes_on_from_its_checkpoint_to_the_same_loss(repro: Project) -> None:
    straight = _last_losses(repro)
    run = next((repro.folder / ".store" / "runs").glob("full-*"))
    for path in (run / "finished.json", run / "history.json"):
        path.unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000012")  # as if cut off between step 8's checkpoint and step 12's
    for workers in (2, 1):  # through Ray Train: first as it was, then on another number of ranks
        repro.edit_params("workers: 2", f"workers: {workers}")
        result = repro.run("pipelines", "train", "--variant", "full")
        repro.edit_params(f"workers: {workers}", "workers: 2")
        said = result.stdout + result.stderr
        assert "goes on from the checkpoint of step 8" + (", written by 2 ranks" if workers == 1 else "") in said
        resumed = _last_losses(repro)
        assert resumed == pytest.approx(straight, rel=1e-5)
        (run / "finished.json").unlink()
        shutil.rmtree(run / "checkpoints" / "step-00000012")


@pytest.mark.timeout(500)
def test_a_loss_that_is_not_finite_ends_the_stage_without_another_try(repro: Project) -> None:
    broken = repro.folder / "broken"
    shutil.copytree(repro.folder / "models" / "full", broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"][0] = np.inf
    save_file(tensors, weights)
    repro.edit_params("init: random", f"init: {json.dumps(str(broken))}")
    result = repro.run("pipelines", "train", "--variant", "full", check=False)
    repro.edit_params(f"init: {json.dumps(str(broken))}", "init: random")
    assert result.returncode == 1
    assert (
        "the loss is not finite at step 1; the state before that step is saved as step 0. 8 of 8 rows" in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert "goes on from the checkpoint" not in result.stdout + result.stderr  # as each of two more tries would


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_killed_by_sigkill_in_train_goes_on(tmp_path: Path) -> None:
    project = make_project(tmp_path / "killed")
    project.edit_params("steps: 12", "steps: 60")
    project.run("dvc", "repro", "encode")
    process = project.start("dvc", "repro", "train@full")
    runs = project.folder / ".store" / "runs"
    _wait_for(lambda: list(runs.glob("full-*/checkpoints/*/COMPLETE.json")), process, "checkpoint")
    kill_tree(process)
    result = project.run("dvc", "repro", "train@full")
    assert "goes on from the checkpoint" in result.stdout + result.stderr
    assert (project.folder / "models" / "full" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_a_training_whose_lease_was_taken_over_stops(tmp_path: Path) -> None:
    """As by another machine, while this one slept."""
    project = make_project(tmp_path / "slept")
    project.edit_params("steps: 12", "steps: 100000")
    project.run("dvc", "repro", "encode")
    process = project.start("pipelines", "train", "--variant", "full")
    runs = project.folder / ".store" / "runs"
    _wait_for(lambda: list(runs.glob("full-*/checkpoints/*/COMPLETE.json")), process, "checkpoint")
    (lease,) = runs.glob("full-*/lease.json")
    theirs = json.loads(lease.read_text()) | {"token": "theirs", "who": "the other"}
    lease.write_text(json.dumps(theirs))
    assert process.wait(timeout=120) == 1, project.started_log()
    assert "is being trained right now by the other" in project.started_log()
    assert json.loads(lease.read_text()) == theirs


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_experiments_land_in_the_main_mlflow_database(repro: Project) -> None:
    from mlflow import MlflowClient

    repro.git("add", "-A")
    repro.git("commit", "-qm", "after repro")
    repro.run("dvc", "exp", "run", "-S", "train.lr=0.001", "train@full")
    repro.run("dvc", "exp", "run", "--queue", "-S", "train.lr=0.003", "train@full")
    repro.run("dvc", "exp", "run", "--run-all")
    client = MlflowClient(f"sqlite:///{repro.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("paint-by-example")
    assert experiment is not None
    rates = {run.data.params.get("train.lr") for run in client.search_runs([experiment.experiment_id])}
    assert {"0.001", "0.003"} <= rates


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
