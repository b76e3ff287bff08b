"""The profiles of infra/profiles in full, for tests that start from one."""

from typing import Any

import yaml

from pbe.config import Params, parse_params
from pbe.places import repo_root
from pipelines.commands.profile import full_text

FOLDER = repo_root() / "infra" / "profiles"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def profile(name: str) -> Params:
    """@ROOT@ stays as it is."""
    return parse_params(full_text(FOLDER, name), name)


def profile_mapping(name: str) -> dict[str, Any]:
    """As params.yaml would say it: without the settings that have their default."""
    return yaml.safe_load(full_text(FOLDER, name))
