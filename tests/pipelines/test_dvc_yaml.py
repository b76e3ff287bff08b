"""dvc.yaml is the map: each stage depends on the files whose VERSION names its parts, on settings and on inputs."""

import ast
import re
from functools import cache
from typing import Any

import grimp
import pytest
import yaml

from pbe.config import Params, load_params
from pbe.places import repo_root
from pipelines.runtime.stage import DATA_STAGES, MAKES_PARTS_OF, STAGES, VARIANT_STAGES

ROOT = repo_root()
# the sweep is of one variant: its keys are then those of the stages that run once per variant
DVC_YAML = yaml.safe_load((ROOT / "dvc.yaml").read_text().replace("${sweep.variant}", "${key}"))
ENTRIES: dict[str, dict[str, Any]] = {name: entry.get("do", entry) for name, entry in DVC_YAML["stages"].items()}
# the files of the report's page, beside its own: it makes no parts, and is soon made again
PAGE = {
    f"pipelines/reporting/{name}"
    for name in (
        "baselines.yaml",
        "charts.py",
        "page.html.j2",
        "summary.py",
        "table_1.html.j2",
        "user_study.html.j2",
        "user_study.py",
    )
} | {
    f"pipelines/reporting/{name}{suffix}"
    for name in ("deviations", "metric_glossary", "published")
    for suffix in (".py", ".yaml")
}

STUDY_PAGE = {"pbe/study/page.py"} | {f"pbe/study/study.{suffix}" for suffix in ("css", "html", "js")}


@cache
def _graph() -> grimp.ImportGraph:
    return grimp.build_graph("pbe", "pipelines", cache_dir=None)


def _versioned(stage: str) -> set[str]:
    """Files of the modules with a VERSION that pipelines.<stage> imports, directly or not; its own included."""
    imported = _graph().find_upstream_modules(f"pipelines.{stage}") | {f"pipelines.{stage}"}
    files = {f"{module.replace('.', '/')}.py" for module in imported if module.startswith("pipelines.")}
    return {file for file in files if re.search(r"^VERSION = \d+$", (ROOT / file).read_text(), re.MULTILINE)}


def _code_deps(stage: str) -> set[str]:
    return {dep for dep in ENTRIES[stage]["deps"] if dep.startswith(("pbe/", "pipelines/"))}


def _upstream(stage: str) -> set[str]:
    """Stages whose output it depends on, directly or not."""
    out: set[str] = set()
    for dep in ENTRIES[stage]["deps"]:
        if dep.startswith("data/"):
            before = dep.split("/")[1]
            out |= {before} | _upstream(before)
    return out


def _settings_read(stage: str) -> set[str]:
    """Every NAME of `....params.NAME` in the stage's own file."""
    tree = ast.parse((ROOT / "pipelines" / f"{stage}.py").read_text())
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "attr", getattr(node.value, "id", "")) == "params"
    }
    return {name.removesuffix("_variant") for name in names}


def test_the_stages_are_those_of_the_code_and_each_calls_itself() -> None:
    assert tuple(ENTRIES) == STAGES
    for name, entry in ENTRIES.items():
        variant = " --variant ${key}" if name in VARIANT_STAGES else ""
        variant += " --baseline ${key}" if name == "baseline" else ""
        assert entry["cmd"] == f"python -m pipelines {name}{variant}"


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_the_files_whose_versions_name_what_the_stage_makes(stage: str) -> None:
    """A raised VERSION runs every stage again whose parts it names; other code is no dependency."""
    expected = {"pipelines/report.py", *PAGE} if stage == "report" else _versioned(stage)
    expected |= STUDY_PAGE if stage == "study" else set()
    assert _code_deps(stage) == expected and f"pipelines/{stage}.py" in expected
    assert all((ROOT / dep).is_file() for dep in expected)
    own, *others = (f"pipelines/{module}.py" for module in (stage, *MAKES_PARTS_OF.get(stage, ())))
    assert set(others) == expected - {own} - PAGE - STUDY_PAGE


def test_the_page_is_all_that_the_report_imports_for_itself_and_its_template() -> None:
    others = set().union(*(_graph().find_modules_directly_imported_by(f"pipelines.{name}") for name in STAGES[:-1]))
    mine = _graph().find_modules_directly_imported_by("pipelines.report") - others
    assert {f"{module.replace('.', '/')}.py" for module in mine if module.startswith("pipelines.")} <= PAGE
    data = {
        path.relative_to(ROOT).as_posix() for end in ("j2", "yaml") for path in (ROOT / "pipelines").rglob(f"*.{end}")
    }
    assert data == {name for name in PAGE if not name.endswith(".py")}


@pytest.mark.parametrize("stage", [name for name in STAGES if name in Params.model_fields])
def test_a_stage_depends_on_its_own_settings(stage: str) -> None:
    assert stage in ENTRIES[stage]["params"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_that_is_read_re_runs_the_stage_itself_or_one_before_it(stage: str) -> None:
    listed = {str(key) for name in {stage} | _upstream(stage) for key in ENTRIES[name].get("params", [])}
    listed |= {key.partition(".")[0] for key in listed if key.endswith(".${key}")}
    read = _settings_read(stage)
    assert read, "every stage reads settings"
    assert sorted(name for name in read if name not in listed) == []
    if stage in VARIANT_STAGES:
        assert "variants.${key}" in listed


def test_listed_settings_exist() -> None:
    params = load_params().model_dump()
    for entry in ENTRIES.values():
        for key in entry.get("params", []):
            node: Any = params
            for part in str(key).split("."):
                node = {"${key}": None} if part in ("variants", "baselines") else node[part]


def test_inputs_are_outputs_of_stages_before() -> None:
    made: set[str] = set()
    for name, entry in ENTRIES.items():
        for dep in entry["deps"]:
            if dep.startswith("data/"):
                assert any(out == dep or out.startswith(f"{dep}/") for out in made), f"{name}: nobody makes {dep}"
        for out in [*entry["outs"], *entry.get("metrics", []), *entry.get("plots", [])]:
            path = out if isinstance(out, str) else next(iter(out))
            if name == "baseline":  # lies beside the variants' edits, under another name
                path = path.replace("${key}", "${baseline}")
            assert path not in made
            made.add(path)


@pytest.mark.parametrize("stage", DATA_STAGES)
def test_a_data_stages_output_is_its_manifest_alone_and_its_counts_are_a_metric(stage: str) -> None:
    """Whatever must survive a kill is in the storage: DVC deletes outputs before it runs a stage."""
    assert ENTRIES[stage]["outs"] == [f"data/{stage}/manifest.json"]
    assert ENTRIES[stage]["metrics"] == [f"data/{stage}/counts.json"]
