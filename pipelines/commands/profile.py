"""profile NAME [--root DIR]: write params.yaml from infra/profiles/NAME.yaml, after checking it.

A profile is an overlay: `base:` names the profile below it, and only differing keys follow, in blocks between blank
lines as in params.yaml. The result is one complete file with the comments of both. A profile that reads photos or
weights from disk has the placeholder @ROOT@ in place of their folder.
"""

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from pbe.config import parse_params
from pbe.errors import ParamsError
from pbe.places import repo_root

PLACEHOLDER = "@ROOT@"
NULL = "tag:yaml.org,2002:null"
REPLACED_WHOLE = ("variants", "baselines")  # a profile's entries replace those of its base


def main(name: str, root: str) -> None:
    """Write params.yaml. root: folder of photos or weights, "" if the profile needs none.

    A params.yaml that no profile has written is kept beside it. Raises ParamsError and leaves params.yaml unchanged if
    the result is invalid.
    """
    home = repo_root()
    text = profile_text(home / "infra" / "profiles", name, root)
    params = parse_params(text, "params.yaml")
    target = home / "params.yaml"
    beside = target.with_name("params.yaml.new")
    _keep_own_edits(home / "infra" / "profiles", target)
    try:
        beside.write_text(text)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    print(f"params.yaml: profile {name}, variants {', '.join(params.variants)}; `make repro` runs it")


def _keep_own_edits(folder: Path, params: Path) -> None:
    """Copy a params.yaml that differs from every profile to a name of its content."""
    text = params.read_text() if params.exists() else ""
    if text and not any(_could_write(folder, path.stem, text) for path in folder.glob("*.yaml")):
        kept = params.with_name(f"params.{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml")
        kept.write_text(text)
        print(f"{kept.name}: params.yaml as it was, with your edits")


def _could_write(folder: Path, name: str, text: str) -> bool:
    """Return whether `text` is the profile with some folder as its root. A broken profile writes nothing."""
    try:
        parts = full_text(folder, name).split(PLACEHOLDER)
    except ParamsError:
        return False
    return re.fullmatch(".*".join(map(re.escape, parts)), text) is not None


def profile_text(folder: Path, name: str, root: str = "") -> str:
    """Return the full profile, its placeholder replaced by the absolute `root`. Raises ParamsError."""
    text = full_text(folder, name)
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


def full_text(folder: Path, name: str, *, above: tuple[str, ...] = ()) -> str:
    """Merge the profile onto its bases, with @ROOT@ unchanged. above: profiles that use it as a base.

    Raises ParamsError.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ParamsError(f"profile '{name}' is unknown; there are: {', '.join(known)}")
    text = (folder / f"{name}.yaml").read_text()
    head, over = _blocks(text)
    if "base" not in over:
        return text
    under = over.pop("base").removeprefix("base:").strip()
    if under in (name, *above):
        raise ParamsError(f"infra/profiles/{name}.yaml: base: {under} is its own base")
    _, base = _blocks(full_text(folder, under, above=(name, *above)))
    if unknown := sorted(over.keys() - base.keys()):
        raise ParamsError(f"infra/profiles/{name}.yaml: {unknown[0]}: not a section of its base")
    merged = [_merged(key, block, over[key]) if key in over else block for key, block in base.items()]
    return "\n\n".join([head, *merged]) + "\n"


def _blocks(text: str) -> tuple[str, dict[str, str]]:
    """Split a profile into its head comment and one block per top-level key, with the comment lines above it."""
    head, *blocks = re.split(r"\n\s*\n", text.strip())
    return head, {re.findall(r"^(\w+):", block, re.MULTILINE)[0]: block for block in blocks}


def _merged(key: str, base: str, over: str) -> str:
    if key in REPLACED_WHOLE:
        comments = [line for line in base.split("\n") if line.startswith("#")]
        return over if over.startswith("#") else "\n".join([*comments, over])
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 1 << 16, True
    yaml.brace_single_entry_mapping_in_flow_sequence = True
    yaml.representer.add_representer(type(None), lambda representer, _: representer.represent_scalar(NULL, "null"))
    tree = yaml.load(base)
    _lay(yaml.load(over), tree)
    out = io.StringIO()
    yaml.dump(tree, out)
    return out.getvalue().rstrip("\n")


def _lay(over: CommentedMap, tree: CommentedMap) -> None:
    """Set the keys of `over` in `tree`, with their comments. A new key is placed after its predecessor in `over`."""
    before: Any = None
    for key, value in over.items():
        old = tree.get(key)
        if (
            isinstance(value, CommentedMap)
            and isinstance(old, CommentedMap)
            and value.get("kind")
            in (
                None,
                old.get("kind"),
            )
        ):
            if old.fa.flow_style() and not value.fa.flow_style():
                old.fa.set_block_style()  # comments of its keys would break a line in braces
                tree.ca.items.pop(key, None)
                old.ca.comment = None  # ruamel.yaml keeps the comment that ends the line in both places
            _lay(value, old)
        elif key in tree:
            tree[key] = value
        else:
            keys = list(tree)
            tree.insert(keys.index(before) + 1 if before in keys else 0, key, value)
        if key in over.ca.items:
            tree.ca.items[key] = over.ca.items[key]
        before = key
