"""What a training has otherwise than the settings it is compared with: MLflow's params `diff` and `diff.*`.

Those settings are `train` and `edit` of params.yaml; in `dvc exp run`, of its baseline's params.yaml, so that `-S`
counts too.
"""

import json
import os
import subprocess

from pbe.config import Params, parse_params
from pbe.errors import ParamsError
from pbe.track import flatten
from pipelines.runtime.stage import Stage

BASELINE_VARIABLE = "DVC_EXP_BASELINE_REV"  # DVC sets it
DIFF_VARIABLE = "PBE_SETTINGS_DIFF"
SAME = "nothing"


def differences(stage: Stage) -> dict[str, str]:
    """Return the variant's values by dotted key, such as train.lr; in a Ray job, as the submitter sees them."""
    if DIFF_VARIABLE in os.environ:
        return dict(json.loads(os.environ[DIFF_VARIABLE]))
    assert stage.variant is not None
    base = _experiment_baseline(stage) or stage.params
    before = flatten({"train": base.train.model_dump(mode="json")})
    after = flatten({"train": stage.params.train_variant(stage.variant).model_dump(mode="json")})
    before["edit.guidance_scale"] = str(base.edit.guidance_scale)
    after["edit.guidance_scale"] = str(stage.params.edit_variant(stage.variant).guidance_scale)
    return {key: value for key, value in after.items() if before.get(key) != value}


def diff_params(differing: dict[str, str]) -> dict[str, str]:
    """Return the params of a run: one that says all, because MLflow's table of differences skips what a run lacks."""
    text = ", ".join(f"{key}={value}" for key, value in differing.items()) or SAME
    return {"diff": text, **{f"diff.{key}": value for key, value in differing.items()}}


def _experiment_baseline(stage: Stage) -> Params | None:
    """Return the settings that a DVC experiment began from; None outside one, or if this code cannot read them."""
    revision = os.environ.get(BASELINE_VARIABLE)
    if not revision:
        return None
    command = ["git", "show", f"{revision}:./params.yaml"]
    try:
        text = subprocess.run(command, cwd=stage.root, capture_output=True, text=True, check=True).stdout
        return parse_params(text, f"params.yaml of {revision[:8]}")
    except (OSError, subprocess.CalledProcessError, ParamsError) as error:
        print(f"{stage.title}: diff.* compares with params.yaml as it is, not with the experiment's baseline: {error}")
        return None
