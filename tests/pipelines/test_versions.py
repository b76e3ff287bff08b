"""Whoever changes what a stage makes raises its VERSION: parts are named by it, not by the code.

Compared with golden_parts.json (tests/pipelines/golden.py): the content, to the byte, of what ingest, filter,
materialize, bench and the copy-paste baseline write. What torch and Poisson blending compute (latents, edits, features,
metrics) differs in its last bits from one processor to the next: some numbers of it are compared, with a tolerance.
"""

import copy
import json
from typing import Any

import pytest

from pbe.places import repo_root
from tests.pipelines import golden
from tests.pipelines.golden import Golden

pytest.importorskip("skimage", reason="needs the sample extra")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return golden.run_stages(tmp_path_factory.mktemp("golden"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("module", golden.READS)
def test_a_stage_makes_what_it_made_or_has_a_new_version(found: Golden, module: str) -> None:
    told = golden.verdict(found, golden.read_golden(), module)
    assert not told, told


def _changed(tree: Golden, module: str, name: str, value: Any) -> Golden:
    other = copy.deepcopy(tree)
    other[module]["made"][name] = value
    return other


def test_changed_bytes_of_the_same_version_ask_for_another_and_later_stages_are_not_blamed() -> None:
    known = golden.read_golden()
    found = _changed(_changed(known, "filter", "boxes", "0"), "materialize", "slot-0000", "0")
    told = {module: golden.verdict(found, known, module) for module in golden.READS}
    assert "raise VERSION there" in told.pop("filter") and not any(told.values())
    found["filter"]["version"] += 1
    assert "VERSION of pipelines/filter.py is new" in golden.verdict(found, known, "filter")


@pytest.mark.parametrize(("times", "asks"), [(1.0001, False), (1.001, True)])
def test_last_bits_of_torch_are_no_change(times: float, asks: bool) -> None:
    known = golden.read_golden()
    numbers = [number * times for number in known["edit"]["made"]["edit"]]
    assert ("raise VERSION" in golden.verdict(_changed(known, "edit", "edit", numbers), known, "edit")) == asks


def test_a_default_that_changes_asks_for_a_new_version() -> None:
    """params.yaml, which DVC watches, need not name it."""
    known = json.loads(golden.DEFAULTS_FILE.read_text())
    found = golden.defaults()
    assert [told for stage in found if (told := golden.defaults_verdict(found, known, stage))] == []
    found["train"]["defaults"]["weight_decay"] = 0.02
    assert "another default of weight_decay" in golden.defaults_verdict(found, known, "train")
    found["train"]["version"] += 1
    assert "raise VERSION" not in golden.defaults_verdict(found, known, "train")


def test_every_module_with_a_version_is_run_but_train_which_has_a_loss_curve() -> None:
    folder = repo_root() / "pipelines"
    having = {path.stem for path in folder.glob("*.py") if "\nVERSION = " in path.read_text()}
    assert having == {*golden.READS, "train"}
