"""Lists the known differences from the paper or its official code that apply to given settings, for the report.

Each is a row of deviations.yaml; this module compares its settings and fills in its text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from pbe.config import Params
from pbe.data.slots import TRIPLETS_PER_GROUP
from pbe.evaluate.bench.cocoee import ITEMS
from pbe.evaluate.settings import ClipExtractorConfig, EditConfig

TABLE = Path(__file__).with_suffix(".yaml")
PAPER_PHOTOS = 1_900_000
TRAIN_TIMESTEPS = 1000  # as pbe/diffusion/schedule.py, which imports torch


@dataclass(frozen=True)
class Deviation:
    """One difference of this run from the paper or its code. `variants`: those it applies to, "" for all."""

    topic: str
    here: str
    original: str
    why: str
    variants: str = ""


def deviations(params: Params, *, train_photos: int) -> list[Deviation]:
    """Return the deviations that hold for these settings, one per distinct text among the variants, data first."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    settings = {name: _settings(params, name, train_photos) for name in params.variants}
    found = []
    for row in yaml.safe_load(TABLE.read_text()):
        variants: dict[tuple[str, str, str], list[str]] = {}
        for name, values in settings.items():
            changed = _changed(row.get("paper", {}), values)
            if _changed(row.get("only", {}), values) or ("paper" in row and not changed):
                continue
            here, original, why = (
                " ".join(environment.from_string(row[key]).render(values, changed=changed).split())
                for key in ("here", "original", "why")
            )
            variants.setdefault((here, original, why), []).append(name)
        for (here, original, why), names in variants.items():
            only = "" if len(names) == len(settings) else ", ".join(names)
            found.append(Deviation(row["topic"], here, original, why, only))
    return found


def _settings(params: Params, variant: str, train_photos: int) -> dict[str, Any]:
    """Return the values that deviations.yaml may use: params.yaml, `train` of one variant, derived values."""
    edit, train = params.edit, params.train_variant(variant)
    extractors = [extractor.kind for extractor in params.evaluate.extractors]
    default_is_plms = train.beta_schedule == "scaled_linear" and train.objective != "x0"
    return {
        **{name: getattr(params, name) for name in Params.model_fields},
        "train": train,
        "train_photos": train_photos,
        "few_photos": train_photos < PAPER_PHOTOS // 2,
        "plms": edit.sampler == "pndm" if edit.sampler else default_is_plms,
        "holds_pixels": params.encode.codec.kind == "patch",  # pbe/edit.py clips what such a codec decodes
        "rows_per_group": params.encode.rows_per_group if train.input == "encoded" else TRIPLETS_PER_GROUP,
        **_timesteps(edit, leading=train.beta_schedule == "scaled_linear"),
        "whole_cocoee": params.bench.source != "cocoee" or params.bench.max_items >= ITEMS,
        "extractors": extractors,
        "clip_is_extractor": "clip" in extractors,
        "weights_are_named": bool({"dino", "inception"} & {*extractors}),
        "clip_has_mixture": any(isinstance(e, ClipExtractorConfig) and e.mixture for e in params.evaluate.extractors),
    }


def _timesteps(edit: EditConfig, *, leading: bool) -> dict[str, Any]:
    """Return upstream's number of steps where it is not edit.steps, else null, and the first timestep here.

    leading: timesteps are spaced as Stable Diffusion's (`timesteps_of` of pbe/diffusion/schedule.py).
    """
    apart = TRAIN_TIMESTEPS // edit.steps
    upstream = len(range(0, TRAIN_TIMESTEPS, apart))
    as_upstream = edit.protocol == "upstream" and edit.sampler in (None, "ddim", "pndm")
    return {
        "more_steps": None if not leading or as_upstream or upstream == edit.steps else upstream,
        "first_timestep": (edit.steps - 1) * apart + 1,
    }


def _changed(expected: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ from `expected`, by dotted keys, as in "max_iou 0.9"."""
    out = []
    for key, wanted in expected.items():
        section, *rest = key.split(".")
        value = values[section]
        for part in rest:
            value = getattr(value, part)
        if (list(value) if isinstance(value, tuple) else value) != wanted:
            out.append(f"{key.rpartition('.')[2]} {value}")
    return out
