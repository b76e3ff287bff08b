"""dvc.yaml is the map: each stage depends on exactly the code it imports, on its settings, and on its inputs.

The list of code re-runs a stage and names its parts (pipelines/stage.py, code_paths). A module missing there means
stale results; one too many throws good parts away.
"""

import ast
from functools import cache
from typing import Any

import grimp
import pytest
import yaml

from pbe.config import Params, load_params, repo_root
from pipelines.stage import DATA_STAGES, STAGES, VARIANT_STAGES, code_paths

ROOT = repo_root()
# the sweep is of one variant: its keys are then those of the stages that run once per variant
DVC_YAML = yaml.safe_load((ROOT / "dvc.yaml").read_text().replace("${sweep.variant}", "${key}"))
ENTRIES: dict[str, dict[str, Any]] = {name: entry.get("do", entry) for name, entry in DVC_YAML["stages"].items()}
# They start, place and log the work; they do not shape a stage's bytes. What only they import is not looked at.
ORCHESTRATION = {
    "pbe.config",
    "pbe.errors",
    "pbe.track",
    "pipelines.__main__",
    "pipelines.environment",
    "pipelines.capacity",
    "pipelines.jobs",
    "pipelines.lease",
    "pipelines.logs",
    "pipelines.plans",
    "pipelines.progress",
    "pipelines.provenance",
    "pipelines.stage",
    "pipelines.units",
}


@cache
def _graph() -> grimp.ImportGraph:
    return grimp.build_graph("pbe", "pipelines", cache_dir=None)


def _imported(stage: str) -> set[str]:
    """Modules that pipelines.<stage> imports, at its top or inside functions, directly or not; itself included."""
    seen: set[str] = set()
    left = [f"pipelines.{stage}"]
    while left:
        module = left.pop()
        if module not in seen | ORCHESTRATION:
            seen.add(module)
            left += _graph().find_modules_directly_imported_by(module)
    return seen


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


def test_the_graph_sees_imports_inside_functions() -> None:
    """Otherwise the law below would be empty for what stages import late."""
    assert "pbe.model.backbone" in _imported("encode") and "pbe.train.worker" in _imported("train")
    assert _graph().modules >= ORCHESTRATION


def test_the_stages_are_those_of_the_code_and_each_calls_itself() -> None:
    assert tuple(ENTRIES) == STAGES
    for name, entry in ENTRIES.items():
        variant = " --variant ${key}" if name in VARIANT_STAGES else ""
        variant += " --baseline ${key}" if name == "baseline" else ""
        assert entry["cmd"] == f"python -m pipelines {name}{variant}"


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_exactly_what_the_stage_imports(stage: str) -> None:
    listed = {dep for dep in _code_deps(stage) if dep.endswith(".py")}
    modules = {dep.removesuffix(".py").replace("/", ".") for dep in listed}
    assert sorted(_imported(stage) - modules) == [], "imported, not listed in dvc.yaml"
    assert sorted(modules - _imported(stage)) == [], "listed in dvc.yaml, not imported"


@pytest.mark.parametrize("stage", STAGES)
def test_code_paths_are_the_listed_files_and_all_exist(stage: str) -> None:
    paths = code_paths(ROOT, stage)
    assert {path.relative_to(ROOT).as_posix() for path in paths} == _code_deps(stage)
    assert all(path.is_file() for path in paths) and len(set(paths)) == len(paths)


def test_templates_are_dependencies_of_the_stage_that_names_them() -> None:
    templates = sorted((ROOT / "pipelines").glob("*.j2"))
    listed = {dep for stage in STAGES for dep in _code_deps(stage) if not dep.endswith(".py")}
    assert listed == {template.relative_to(ROOT).as_posix() for template in templates}
    for stage in STAGES:
        for dep in _code_deps(stage) - {dep for dep in _code_deps(stage) if dep.endswith(".py")}:
            assert dep.rsplit("/", 1)[1] in (ROOT / "pipelines" / f"{stage}.py").read_text()


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
    assert ENTRIES[stage]["metrics"] == [{f"data/{stage}/counts.json": {"cache": False}}]
