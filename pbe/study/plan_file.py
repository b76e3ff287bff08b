"""The plan of a user study, read again (plan.py draws it).

Its digest is its name: answers to another plan, or to one that was edited by hand, are not about these pictures.
"""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pbe.errors import UserError, one_line
from pbe.store import digest
from pbe.study.plan import FORMAT, FORMAT_VERSION, Screen


class PlanError(UserError):
    """The plan is missing, damaged, or of another version."""


class _Part(BaseModel):
    """Frozen. Keys that only the page reads are left alone: the digest covers them."""

    model_config = ConfigDict(frozen=True)


class Rater(_Part):
    rater: int
    screens: tuple[Screen, ...]


class _Item(_Part):
    item: str


class Plan(_Part):
    """methods: their names by id. bench: sha256 of the bench. edits: digests of the manifests by method."""

    digest: str
    questions: tuple[str, ...]
    methods: dict[str, str]
    bench: str
    edits: dict[str, str]
    items: tuple[_Item, ...]
    raters: tuple[Rater, ...]

    @property
    def item_ids(self) -> list[str]:
        return [item.item for item in self.items]

    def screens_of(self, rater: int) -> dict[int, Screen] | None:
        """Screens by number, practice included; None for a rater that is not planned."""
        found = next((planned for planned in self.raters if planned.rater == rater), None)
        return None if found is None else {screen.screen: screen for screen in found.screens}


def load_plan(path: Path) -> Plan:
    """Read and check a plan. Raises PlanError."""
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PlanError(f"{path}: not there; run `dvc repro study` first, or name the plan with --plan") from None
    except ValueError as error:
        raise PlanError(f"{path}: not a plan ({one_line(error, 100)}); run `dvc repro -f -s study`") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise PlanError(f"{path}: not the plan of a study; name the plan.json that the stage study wrote")
    if raw.get("version") != FORMAT_VERSION:
        raise PlanError(f"{path}: a plan of version {raw.get('version')}; this program reads version {FORMAT_VERSION}")
    try:
        plan = Plan.model_validate(raw)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"]))
        raise PlanError(f"{path}: {where}: {found['msg']}; run `dvc repro -f -s study`") from None
    if plan.digest != digest({key: value for key, value in raw.items() if key != "digest"}):
        raise PlanError(f"{path}: changed since it was written; run `dvc repro -f -s study`, or restore it")
    if not plan.raters:
        raise PlanError(f"{path}: has no raters: a study needs two methods, and three items that all of them edited")
    for rater in plan.raters:
        for screen in rater.screens:
            if screen.role in ("item", "repeat") and set(screen.shown) != plan.methods.keys():
                raise PlanError(
                    f"{path}: rater {rater.rater}, screen {screen.screen}: shows {len(screen.shown)} of "
                    f"{len(plan.methods)} methods; ranks of some methods do not compare with ranks of all"
                )
    return plan
