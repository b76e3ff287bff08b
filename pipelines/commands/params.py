"""params [--diff PROFILE]: prints each resolved setting with its unit and source, or differences from a profile."""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from pbe.config import load_params, parse_params
from pbe.places import repo_root
from pipelines.commands.profile import full_text

WIDTH = 44  # column where comments start


def main(diff: str | None = None) -> None:
    """Print the settings. Raises ParamsError if params.yaml is invalid or the profile unknown."""
    here = {key: (value, default) for key, value, default in _settings(load_params(), "")}
    if diff is None:
        comments = _comments((repo_root() / "params.yaml").read_text())
        for key, (value, default) in here.items():
            comment = comments.get(key) or default
            print(f"{key}: {_shown(value)}".ljust(WIDTH) + f" # {comment}" if comment else f"{key}: {_shown(value)}")
        return
    profile = parse_params(full_text(repo_root() / "infra" / "profiles", diff), f"profile {diff}")
    there = {key: value for key, value, _ in _settings(profile, "")}
    nothing = "not there"
    differing = 0
    for key in {**here, **there}:
        ours = _shown(here[key][0]) if key in here else nothing
        theirs = _shown(there[key]) if key in there else nothing
        if ours != theirs:
            differing += 1
            print(f"{key}: {ours}; {diff}: {theirs}")
    print(f"{differing} of {len(here)} settings differ from profile {diff}")


def _settings(model: BaseModel, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, description, "" if it has none) for every setting, in the models' order."""
    for name, field in type(model).model_fields.items():
        key, value = prefix + name, getattr(model, name)
        if isinstance(value, BaseModel) and (not prefix or _describes(value)):
            yield from _settings(value, f"{key}.")
        elif isinstance(value, dict):  # variants, baselines
            for inner, entry in value.items():
                yield f"{key}.{inner}", entry.model_dump(mode="json", exclude_unset=True), ""
        else:
            meaning = field.description or ""
            if name not in model.model_fields_set:
                meaning = f"(default) {meaning}"
            yield key, model.model_dump(mode="json")[name], meaning


def _describes(model: BaseModel) -> bool:
    return any(field.description for field in type(model).model_fields.values())


def _shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 16, sort_keys=False)
    return text.removesuffix("\n...\n").strip()


def _comments(text: str) -> dict[str, str]:
    """Map each key of a block-style YAML file to the comment after it or the comment lines above it."""
    out: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    above: list[str] = []
    for line in text.split("\n"):
        found = re.match(r"( *)(\w+):(?: .*?)??(?:\s+# (.*))?$", line)
        if found is None:
            above = [*above, line.strip(" #")] if line.lstrip().startswith("#") else []
            continue
        indent = len(found[1])
        path = [*((depth, key) for depth, key in path if depth < indent), (indent, found[2])]
        if comment := found[3] or " ".join(above):
            out[".".join(key for _, key in path)] = comment
        above = []
    return out
