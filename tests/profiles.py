"""The profiles of infra/profiles in full, for tests that start from one."""

from typing import Any

from pbe.config import Params, parse_params
from pbe.places import repo_root
from pipelines.commands.profile import full_text

FOLDER = repo_root() / "infra" / "profiles"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def profile(name: str) -> Params:
    """@ROOT@ stays as it is."""
    return parse_params(full_text(FOLDER, name), name)


def profile_mapping(name: str) -> dict[str, Any]:
    """Every setting, also those that have their default, as YAML would have them."""
    return profile(name).model_dump(mode="json")
