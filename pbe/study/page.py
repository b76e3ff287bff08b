"""The page of a user study: one HTML file that opens from disk or from any server and asks no other file or host.

It holds the plan without the names of methods, the pictures, and the program that shows them (study.js). Its answers
are files that raters download and send back.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pbe.data import images
from pbe.data.contact import with_hole
from pbe.data.rng import row_rng
from pbe.study.plan import ABSURD

QUALITY = 92  # of JPEG, at full colour resolution, for all methods alike; a photo of 384 px then has 41 to 62 kB
TILES = 8  # of the absurd picture, along each side
KNOWN_TO_RATERS = ("format", "version", "digest", "questions", "raters")  # of the plan; the rest names methods


@dataclass(frozen=True)
class Item:
    """Pictures of one item, (h, w, 3) uint8. hole_mask: (h, w) of the photo, 1 = hole. edits: by blind name."""

    photo: np.ndarray
    hole_mask: np.ndarray
    exemplar: np.ndarray
    edits: Mapping[str, np.ndarray]


def encode_item(item: Item, *, picture_px: int) -> dict[str, str]:
    """The item's pictures as data: URIs: `photo` with its hole in grey, `exemplar`, and the edits by blind name.

    picture_px: larger pictures are scaled down to this longer side.
    """
    pictures = {"photo": with_hole(item.photo, item.hole_mask), "exemplar": item.exemplar, **item.edits}
    return {name: _uri(picture, picture_px) for name, picture in pictures.items()}


def absurd_picture(height_px: int, width_px: int) -> np.ndarray:
    """Tiles of random colours, (h, w, 3) uint8, which no method makes: it must be ranked last."""
    tiles = row_rng(0, "study", ABSURD).integers(0, 256, (TILES, TILES, 3), np.uint8)
    rows, columns = (np.arange(side_px) * TILES // side_px for side_px in (height_px, width_px))
    return tiles[rows][:, columns]


def render(plan: Mapping[str, Any], pictures: Mapping[str, Mapping[str, str]], *, without: str = "") -> str:
    """The page's HTML. pictures: data: URIs by item and name, as encode_item. without: why there is nothing to rank."""
    folder = Path(__file__).parent
    data = {key: plan[key] for key in KNOWN_TO_RATERS} | {"pictures": pictures, "without": without}
    style, script = ((folder / f"study.{suffix}").read_text(encoding="utf-8") for suffix in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    html = (folder / "study.html").read_text(encoding="utf-8")
    # "<" would end the element of the data, in a name that a box file chose
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    for name, value in (("policy", policy), ("style", style), ("script", script), ("data", text)):
        before, after = html.split(f"@{name}@")
        html = before + value + after
    return html


def _uri(picture: np.ndarray, picture_px: int) -> str:
    height_px, width_px = picture.shape[:2]
    scale = picture_px / max(height_px, width_px)
    if scale < 1:
        sides = {"width_px": max(1, round(scale * width_px)), "height_px": max(1, round(scale * height_px))}
        picture = images.resize_antialiased(picture, **sides, resampling="bicubic")
    return "data:image/jpeg;base64," + base64.b64encode(images.encode_jpeg(picture, QUALITY)).decode()


def _sha256(text: str) -> str:
    """The source of an inline element, for Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
