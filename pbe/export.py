"""`pbe export`: writes a trained model as a folder to publish, in the hub's layout, with a model card.

Weights go through `load_model` and `save_model`, so the result is complete and in safetensors. The card states what is
known: data digest, settings from dvc.lock, metrics of exactly these weights. It omits what is not known.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pbe.errors import UserError
from pbe.model.weights import Model, load_model, opens_in_diffusers, save_model

OPEN_IN_DIFFUSERS = """```python
import diffusers  # 0.33 to 0.37; later versions need the next two lines
import diffusers.pipelines as P, diffusers.pipelines.deprecated.paint_by_example as moved
P.paint_by_example = moved
pipe = diffusers.PaintByExamplePipeline.from_pretrained("this folder")
```"""


class ExportError(UserError):
    """There is no such model to export, or the output folder is taken; the message says which."""


def export_model(root: Path, name: str, out: Path) -> Model:
    """Write the model of variant `name` (models/<name> below root) or of folder `name` to `out`, which is new or empty.

    Raises ExportError, ModelError.
    """
    source = root / "models" / name if (root / "models" / name).is_dir() else Path(name)
    if not source.is_dir():
        known = sorted(path.name for path in (root / "models").glob("*") if path.is_dir())
        raise ExportError(f"{name}: no such variant or folder; models/ has: {', '.join(known) or 'none yet'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: already exists and is not an empty folder; name a new one")
    model = load_model(source)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(temporary, model)
    lines = _card(root, source, model, _file_hashes(temporary))
    (temporary / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if out.is_dir():
        out.rmdir()
    os.replace(temporary, out)
    return model


def _file_hashes(folder: Path) -> dict[str, str]:
    out = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as stream:
            out[path.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return out


def _card(root: Path, source: Path, model: Model, hashes: Mapping[str, str]) -> Iterator[str]:
    run, network = model.card.run, model.network
    in_diffusers = opens_in_diffusers(model)
    front = {"tags": ["paint-by-example", "image-editing"], "library_name": "diffusers" if in_diffusers else "pbe"}
    yield from ("---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "")
    yield f"# Paint by Example{': ' + run['variant'] if run.get('variant') else ''}"
    yield ""
    yield "Fills a hole in a photo with the object of a reference image (arXiv 2211.13227). Made by pbe."
    yield "These weights have the licence of the weights and photos that they were made from."
    yield from ("", "## Use", "", "```python", "from pbe.edit import Editor", "")
    yield 'edited, = Editor.load("this folder").edit(photo, hole_mask, reference, seed=7)'
    yield from ("```", "")
    if in_diffusers:
        yield OPEN_IN_DIFFUSERS
    else:
        yield "Opens only in pbe: PaintByExamplePipeline does not support its codec, backbone or mapper."
    yield from ("", "## What it is", "")
    trained = sum(value.numel() for value in network.parameters())
    yield f"- {model.card.image_px} px; UNet and mapper have {trained:,} parameters"
    yield f"- reads {'the class token' if model.card.tokens == 'class' else 'all tokens'} of {model.backbone.name}"
    yield from (f"- {key.replace('_', ' ')}: {value}" for key, value in run.items() if key != "variant")
    made = _made_here(root, source, run)
    if made is None:
        yield from ("", "Its settings and metrics are not known.")
    else:
        yield from made
    yield from ("", "## Files", "", *(f"- `{name}` sha256 {value}" for name, value in hashes.items()))


def _made_here(root: Path, source: Path, run: Mapping[str, Any]) -> list[str] | None:
    """Settings and metrics of the run in this repository that made exactly these weights, or None."""
    variant = run.get("variant")
    manifest = root / "data" / "train" / str(variant) / "manifest.json"
    if not manifest.is_file():
        return None
    exported = json.loads(manifest.read_text())["export"]
    for name, sha256 in exported.items():
        path = source / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            return None
    lines: list[str] = []
    lock = root / "dvc.lock"
    stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {}) if lock.is_file() else {}
    settings = stages.get(f"train@{variant}", {}).get("params", {}).get("params.yaml")
    if settings:
        lines += ["", "## Settings", "", "```yaml", yaml.safe_dump(settings, sort_keys=True).strip(), "```"]
    return lines + _metrics(root, str(variant), manifest)


def _metrics(root: Path, variant: str, manifest: Path) -> list[str]:
    """Lines with the metrics of the training run of `manifest`, or a line that says there are none."""
    path = root / "data" / "evaluate" / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    scored = metrics.get(variant, {"protocol": {}})
    protocol = scored.pop("protocol")
    if protocol.get("run") != json.loads(manifest.read_text())["run"]:
        return ["", "These weights have not been scored."]
    rows = [
        f"| {hole} | {reference} | {name} | {value['value']:.4g} | {value['low']:.4g} to {value['high']:.4g} | "
        f"{value['n']} |"
        for hole, references in scored.items()
        for reference, numbers in references.items()
        for name, value in sorted(numbers.items())
    ]
    shown = ("protocol", "guidance_scale", "steps", "seeds")
    how = ", ".join(f"{key} {protocol[key]}" for key in shown if key in protocol)
    table = ["| hole | reference | metric | value | 95 % interval | N |", "|---|---|---|---|---|---|", *rows]
    return ["", f"## Metrics ({how})", "", *table]
