"""profile NAME [--root DIR]: params.yaml from infra/profiles/NAME.yaml, checked before it takes the old one's place.

A profile of photos or weights on disk holds the placeholder @ROOT@ where their folder goes.
"""

import json
import os
from pathlib import Path

from pbe.config import ParamsError, load_params, repo_root

PLACEHOLDER = "@ROOT@"


def main(name: str, root: str) -> None:
    """root: folder of the photos or weights; "" for profiles that need none. Raises ParamsError; params.yaml then
    stays."""
    home = repo_root()
    text = profile_text(home / "infra" / "profiles", name, root)
    target = home / "params.yaml"
    beside = target.with_name("params.yaml.new")
    try:
        beside.write_text(text)
        params = load_params(beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    print(f"params.yaml: profile {name}, variants {', '.join(params.variants)}; `make repro` runs it")


def profile_text(folder: Path, name: str, root: str) -> str:
    """The profile with its placeholder replaced by the absolute `root`. Raises ParamsError."""
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ParamsError(f"profile '{name}' is unknown; there are: {', '.join(known)}")
    text = (folder / f"{name}.yaml").read_text()
    if PLACEHOLDER not in text:
        if root:
            raise ParamsError(f"profile {name} needs no folder and takes no ROOT; '{root}' was given")
        return text
    if not root:
        raise ParamsError(f"profile {name} needs a folder: make profile P={name} ROOT=/path/to/folder")
    absolute = Path(root).expanduser().resolve()
    if not absolute.is_dir():
        raise ParamsError(f"ROOT={root}: {absolute} is not a folder")
    # the placeholder stands in double-quoted YAML scalars, whose escapes are those of JSON
    return text.replace(PLACEHOLDER, json.dumps(str(absolute))[1:-1])
