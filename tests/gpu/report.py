"""Writes the results as JSON and as a Markdown page, after every row, so that an interrupted run keeps its results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEADINGS = {
    "card": "The device",
    "ladder": "The ladder",
    "cards": "Profiles for one card",
    "peers": "Compared with other training loops, in turns",
    "stops": "Where the CPU waits for the device",
    "encode": "Encode",
    "edit": "Edit",
    "parity": "The same training on CPU and GPU",
    "doctor": "`pbe doctor`",
    "speedrun": "Profile speedrun",
    "compile": "With torch.compile",
}
ABOUT = {
    "parity": "30 steps of a tiny network: the largest relative difference of the loss from the float32 curve on the "
    "CPU, and the bound that was fixed beforehand.",
    "ladder": "Each setting is added to the fastest so far. `of_bf16_peak`: the operations of three forward passes as "
    "a fraction of the data sheet's dense bfloat16 rate, or, for a card not listed, of the matrix product's rate "
    "above; recomputed activations do not count. `predicted_gib`: infra/memory.py, which does not cover "
    "attention without sdpa. `data_frac`: fraction of a step in which the device waits for rows; target: below 0.01 "
    "for the fastest setting.",
    "cards": "`predicted_gib`: infra/memory.py --cards. `peak_gib`: of the GPU's allocator; target: at most 95 % of "
    "the profile's card.",
    "peers": "`bare`: the same network and optimizer in a plain torch loop on tensors already on the device; target: "
    "ours_over_theirs >= 0.98. `official`: a loop like upstream's, with the encoders in every step.",
    "stops": "Synchronization points of one optimizer step with four micro-batches, and of one sampling step.",
    "encode": "A row is a photo, two masked photos and all their references.",
    "edit": "At the model's native size: PNDM, guidance scale 5, upstream protocol.",
    "speedrun": "Rows of noise at 64 px. `training_min`: all of the profile's rows at this rate. `predicted_gib`: "
    "infra/memory.py.",
    "compile": "`start_s`: time to the end of the first window of steps, or of the first edit with three steps.",
}
HIDDEN = ("settings", "places")  # only in the JSON


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "GPU.md").write_text(page(results))


def page(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    title = "# On a GPU" if machine.get("device") == "cuda" else "# Rehearsal on a CPU with tiny sizes: no GPU was used"
    lines = [title, "", "Written by `make gpu` (tests/gpu), which measured every number.", ""]
    lines += [f"- {key}: {_text(key, value)}" for key, value in machine.items()]
    lines += [f"- took: {results['seconds']:.0f} s"]
    for name, rows in results["parts"].items():
        lines += ["", f"## {HEADINGS[name]}", ""]
        if name in ABOUT:
            lines += [ABOUT[name], ""]
        lines += table(rows)
        for row in rows:
            if row.get("places"):
                lines += ["", f"{row['case']}:", ""]
                lines += [f"- {count} x {place}" for place, count in row["places"].items()]
    rungs = [row for part in ("ladder", "compile") for row in results["parts"].get(part, []) if "settings" in row]
    if rungs:
        fastest = max(rungs, key=lambda row: row["rows_per_s"])
        lines += ["", "## The fastest settings on one GPU", "", f"{fastest['rows_per_s']:.1f} rows/s, `train:`", ""]
        lines += [f"    {key}: {_setting(value)}" for key, value in fastest["settings"].items()]
        lines += ["", "## Command for the cost model", "", f"    {cost_command(results, fastest)}"]
    problems = [*failures(results), *missed(results)]
    lines += ["", "## Failures and missed targets", "", *([f"- {problem}" for problem in problems] or ["Nothing."])]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = [key for row in rows for key in row if key not in HIDDEN]
    columns = list(dict.fromkeys(keys))
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return head + [f"| {' | '.join(_text(key, row.get(key)) for key in columns)} |" for row in rows]


def _text(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if key.endswith(("difference", "bound", "data_frac")):
            return f"{value:.1e}"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def cost_command(results: Mapping[str, Any], fastest: Mapping[str, Any]) -> str:
    """Return the infra/cost.py command for the fastest step, with encode and edit times if they were measured."""
    settings = fastest["settings"]
    rows = settings["micro_batch"] * settings["accumulation"]
    options = {"step-s": rows / fastest["rows_per_s"], "step-rows": rows}
    parts = results["parts"]
    rates = [row["rows_per_s"] for row in parts.get("encode", []) if row["case"].startswith("encode_triplets")]
    edits = [row["per_edit_s"] for row in parts.get("edit", []) if row["case"].startswith("ours")]
    options |= {"encode-row-s": 1 / max(rates)} if rates else {}
    options |= {"edit-s": min(edits)} if edits else {}
    return "python infra/cost.py " + " ".join(f"--{name} {value:.4g}" for name, value in options.items())


def _setting(value: Any) -> str:
    if not isinstance(value, Mapping):
        return _text("", value)
    return "{" + ", ".join(f"{key}: {str(inner).lower()}" for key, inner in value.items()) + "}"


def failures(results: Mapping[str, Any]) -> list[str]:
    """List the rows that failed or exceeded a parity bound; if there are any, the program exits with 1."""
    rows = [(part, row) for part, found in results["parts"].items() for row in found]
    return [
        f"{part}, {row['case']}: {row.get('failed') or 'outside its bound'}"
        for part, row in rows
        if row.get("failed") or row.get("missed")
    ]


def missed(results: Mapping[str, Any]) -> list[str]:
    """List the GPU targets that the results miss."""
    if results["machine"].get("device") != "cuda":
        return []
    parts = results["parts"]
    out = [
        f"{part}, {row['case']}: ours_over_theirs {row['ours_over_theirs']:.3f}, target 0.98"
        for part in ("peers", "compile")
        for row in parts.get(part, [])
        if row["case"] == "bare" and row.get("ours_over_theirs", 1) < 0.98
    ]
    out += [
        f"cards, {row['case']}: {row['peak_gib']:.1f} GiB, target below {row['card_gb']}"
        for row in parts.get("cards", [])
        if row.get("peak_gib") and row["peak_gib"] > 0.95 * row["card_gb"]
    ]
    rungs = [row for part in ("ladder", "compile") for row in parts.get(part, []) if "settings" in row]
    if rungs:
        fastest = max(rungs, key=lambda row: row["rows_per_s"])
        if fastest["data_frac"] >= 0.01:
            out.append(f"ladder, {fastest['case']}: data_frac {fastest['data_frac']:.3f}, target below 0.01")
    return out
