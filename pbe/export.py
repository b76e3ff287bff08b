"""`pbe export`: writes a trained model as a folder to publish, in the hub's layout, with a model card.

Weights go through `load_model` and `save_model`, so the result is complete and in safetensors. With `half` the UNet is
rounded to float16, which takes half the space; it is read back as float32. The card states what is known: data digest,
settings from dvc.lock, metrics of exactly these weights, or of them before rounding. It omits what is not known.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from pbe.errors import UserError
from pbe.model.adapter import read_adapter
from pbe.model.folder import is_adapter
from pbe.model.weights import ADAPTER_FOLDER, Model, load_model, new_folder, opens_in_diffusers, save_model

OPEN_IN_DIFFUSERS = """In diffusers, without pbe:

```python
from diffusers import DiffusionPipeline  # needs transformers too

pipe = DiffusionPipeline.from_pretrained("this folder", custom_pipeline="this folder", trust_remote_code=True)
[edited] = pipe(image=photo, mask_image=mask, example_image=reference).images  # Pillow's; the mask is white in the hole
```

`trust_remote_code=True` runs `pipeline.py` and `image_encoder/exemplar_encoder.py` of the folder with your rights: read
these two files first, and from the hub name a `revision`. The pipeline squashes the whole photo to the model's square;
`pbe` edits the square around the hole."""
PIPELINE, ENCODER = "pipeline.py", "exemplar_encoder.py"  # of pbe/published


class ExportError(UserError):
    """There is no such model to export, or the output folder is taken; the message says which."""


def export_model(root: Path, name: str, out: Path, *, half: bool = False) -> Model:
    """Write the model of variant `name` (models/<name> below root) or of folder `name` to `out`, which is new or empty.

    half: the UNet in float16. An error leaves nothing behind. Raises ExportError, ModelError, WeightsError.
    """
    source = root / "models" / name if (root / "models" / name).is_dir() else Path(name)
    if not source.is_dir():
        known = sorted(path.name for path in (root / "models").glob("*") if path.is_dir())
        raise ExportError(f"{name}: no such variant or folder; models/ has: {', '.join(known) or 'none yet'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: already exists and is not an empty folder; name a new one")
    model = load_model(source)
    with new_folder(out) as folder:
        save_model(folder, model, unet_dtype=torch.float16 if half else torch.float32)
        if opens_in_diffusers(model):
            _add_pipeline(folder, model)
        if is_adapter(source / ADAPTER_FOLDER):
            shutil.copytree(source / ADAPTER_FOLDER, folder / ADAPTER_FOLDER)
        lines = _card(root, source, model, _file_hashes(folder), half=half)
        (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return model


def _add_pipeline(folder: Path, model: Model) -> None:
    """Add the pipeline's code, and an index that names it: diffusers has deprecated its own, and moved its classes."""
    code = resources.files("pbe.published")
    for name, target in ((PIPELINE, folder), (ENCODER, folder / "image_encoder")):
        (target / name).write_bytes((code / name).read_bytes())
    index = {
        "_class_name": [Path(PIPELINE).stem, "PaintByExamplePipeline"],
        "_diffusers_version": "0.33.1",  # the oldest that it was tried with
        "image_encoder": [Path(ENCODER).stem, "ExemplarEncoder"],
        "scheduler": ["diffusers", model.card.scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _file_hashes(folder: Path) -> dict[str, str]:
    out = {}
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.py")]):
        with path.open("rb") as stream:
            out[path.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return out


def _card(root: Path, source: Path, model: Model, hashes: Mapping[str, str], *, half: bool) -> Iterator[str]:
    run, network = model.card.run, model.network
    in_diffusers = opens_in_diffusers(model)
    front = {"tags": ["paint-by-example", "image-editing"], "library_name": "diffusers" if in_diffusers else "pbe"}
    yield from ("---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "")
    yield f"# Paint by Example{': ' + run['variant'] if run.get('variant') else ''}"
    yield ""
    of_text = model.card.condition == "text"
    of_what = "the object that a caption names, beside the method of" if of_text else "the object of a reference image"
    yield f"Fills a hole in a photo with {of_what} (arXiv 2211.13227). Made by pbe."
    yield "These weights have the licence of the weights and photos that they were made from."
    yield from ("", "## Use", "", "```python", "from pbe.edit import Editor", "")
    reference = '"a photo of a red car"' if of_text else "reference"
    yield f'edited, = Editor.load("this folder").edit(photo, hole_mask, {reference}, seed=7)'
    yield from ("```", "")
    if in_diffusers:
        yield OPEN_IN_DIFFUSERS
    else:
        lacks = (
            "it reads text" if of_text else "diffusers has no class for its codec or backbone, or it has another mapper"
        )
        yield f"Opens only in pbe: {lacks}."
    yield from ("", "## What it is", "")
    trained = sum(value.numel() for value in network.parameters())
    yield f"- {model.card.image_px} px; {'UNet has' if of_text else 'UNet and mapper have'} {trained:,} parameters"
    if half:
        yield "- the UNet's weights are rounded to float16; settings and metrics are of the weights before that"
    all_tokens = of_text or model.card.tokens == "all"
    yield f"- reads {'all tokens' if all_tokens else 'the class token'} of {model.backbone.name}"
    yield from (f"- {key.replace('_', ' ')}: {value}" for key, value in run.items() if key != "variant")
    if is_adapter(source / ADAPTER_FOLDER):
        adapter = read_adapter(source / ADAPTER_FOLDER)
        yield (
            f"- fine-tuned from {adapter.base.name} by LoRA of rank {adapter.lora.rank}, merged; `{ADAPTER_FOLDER}/` "
            "has the updates alone"
        )
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
