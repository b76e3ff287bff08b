"""A recipe holds everything needed to make an edit again, bit for bit on the same machine.

    [recipe] = recipes_of([edit], editor=editor, model="models/full", weights_sha256=weights_sha256(folder), ...)
    png_with_recipe(edit, recipe)            the PNG, with the recipe in a chunk iTXt named pbe
    recipe.to_json()                         the same as a file beside it
    remake(read_recipe(Path("edit.png")), editor, folder=Path("."))

Pictures are in it as bytes, or as a path with their sha256. A recipe may come from a stranger: sizes are bounded,
absolute paths are refused, and a file whose sha256 differs is never decoded.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    ValidationError,
    field_validator,
)

from pbe.data.boxes import Box
from pbe.data.files import irregular
from pbe.data.images import encode_png
from pbe.data.inputs import decode_picture, hole_of_box, hole_of_mask, part_of
from pbe.data.metadata import read_png_text, with_png_text
from pbe.data.settings import MAX_IMAGE_BYTES
from pbe.diffusion.sampling import Sampling
from pbe.diffusion.scheduler_config import TRAIN_TIMESTEPS
from pbe.diffusion.settings import SamplerName
from pbe.edit import BATCH_ROWS, Editor, EditTask, OnStep
from pbe.errors import UserError, one_line
from pbe.model.settings import EditDtype
from pbe.protocol import CONTEXT_FACTOR, DIFFUSERS, OURS, UPSTREAM, EditProtocol, Fit
from pbe.settings import Float, Int, Seed, Settings

KEYWORD = "pbe"  # of the PNG's chunk
MAX_RECIPE_BYTES = 5 * MAX_IMAGE_BYTES  # three pictures, as base64, and some room
MAX_SIZE_PX = 4096  # of a recipe; memory grows with its square

ProtocolName = Literal["ours", "upstream", "diffusers"]
PROTOCOLS: dict[ProtocolName, EditProtocol] = {"ours": OURS, "upstream": UPSTREAM, "diffusers": DIFFUSERS}
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class RecipeError(UserError, ValueError):
    """A recipe cannot be read or followed; the message names the file, and the key or picture."""


def _box(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if len(value) != 4 or any(type(end) is not int for end in value):
            raise ValueError("a box is four whole numbers, x0, y0, x1, y1")
        return Box(*value)
    if not isinstance(value, Box):
        raise ValueError("a box in pixels, or a picture, is needed")
    return value


PixelBox = Annotated[
    Box, BeforeValidator(_box), PlainSerializer(lambda box: [box.x0, box.y0, box.x1, box.y1], return_type=list[int])
]


def _factor(value: Any) -> float:
    """JSON has no infinity: it is written as "inf"."""
    if value == "inf":
        return math.inf
    if type(value) not in (int, float) or not value >= 1:
        raise ValueError('a number of 1 or more is needed, or "inf"')
    return float(value)


ContextFactor = Annotated[
    float,
    PlainValidator(_factor),
    PlainSerializer(lambda value: "inf" if value == math.inf else value, return_type=float | str),
]


class Picture(Settings):
    """A picture file: its bytes, or where it is. name: file name, or path from the recipe's folder."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    name: Annotated[str, Field(min_length=1, max_length=4096)]
    sha256: Sha256
    data: Annotated[bytes, Field(max_length=MAX_IMAGE_BYTES)] | None = Field(None, repr=False)

    @field_validator("name")
    @classmethod
    def _is_relative(cls, name: str) -> str:
        if name.startswith("/") or "\0" in name:
            raise ValueError("must be a path from the recipe's folder")
        return name

    @classmethod
    def embedded(cls, name: str, data: bytes) -> "Picture":
        """The bytes of a file as uploaded; of its name only the last part is kept."""
        return cls(name=Path(name).name or "picture", sha256=hashlib.sha256(data).hexdigest(), data=data)

    @classmethod
    def named(cls, path: Path, data: bytes, *, folder: Path) -> "Picture":
        """A file at `path` with these bytes, for a recipe that will lie in `folder`."""
        return cls(name=os.path.relpath(path.resolve(), folder.resolve()), sha256=hashlib.sha256(data).hexdigest())

    def read(self, folder: Path | None) -> bytes:
        """The bytes, in the recipe or below `folder`, and there also beside the recipe itself. Raises RecipeError."""
        data = self.data if self.data is not None else self._found(folder)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise RecipeError(f"{self.name}: not the picture of this recipe, its sha256 differs")
        return data

    def _found(self, folder: Path | None) -> bytes:
        if folder is None:
            raise RecipeError(
                f"{self.name}: this recipe names the file but does not contain it; follow it by `pbe edit`"
            )
        paths = [folder / self.name, folder / Path(self.name).name]
        for path in paths:
            if path.is_file():
                try:
                    with path.open("rb") as stream:
                        return stream.read(MAX_IMAGE_BYTES + 1)
                except OSError as error:
                    raise RecipeError(f"{path}: {one_line(error.strerror)}") from None
        raise RecipeError(f"{paths[0]}: no such file; put the picture there, or beside the recipe")


Hole = Annotated[
    Annotated[Picture, Tag("mask")] | Annotated[PixelBox, Tag("box")],
    Discriminator(lambda value: "mask" if isinstance(value, (Picture, dict)) else "box"),
]


class Recipe(Settings):
    """One edit. Numbers are those that were used: no default is left open."""

    version: Literal[1] = 1
    model: str  # as it was named: a folder, or org/name@revision on the hub
    weights_sha256: Sha256  # model/weights.weights_sha256
    photo: Picture
    hole: Hole  # a mask, white where the edit goes; or a box in the photo
    reference: Picture
    reference_box: PixelBox | None = None  # the part of the reference that is used
    seed: Seed
    guidance_scale: Float
    steps: Int = Field(ge=1, le=TRAIN_TIMESTEPS)
    sampler: SamplerName | None = None  # None: the model's own
    size_px: Int = Field(ge=1, le=MAX_SIZE_PX)
    context_factor: ContextFactor | None  # None: the protocol edits the whole photo
    protocol: ProtocolName
    reference_fit: Fit | None = None  # None: the protocol's
    batch_rows: Int = Field(ge=1, le=BATCH_ROWS)  # edits in one forward: their number changes the last bits
    device: str  # kind: cpu, cuda
    dtype: EditDtype
    made_with: dict[str, str]  # versions of packages
    pixels_sha256: Sha256  # of the edit: `pixels_sha256`

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.guidance_scale, self.steps, self.sampler)

    @property
    def edit_protocol(self) -> EditProtocol:
        return protocol_of(self.protocol, self.reference_fit)

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def protocol_of(name: ProtocolName, reference_fit: Fit | None) -> EditProtocol:
    """The protocol, with another way to fit the reference if one is given."""
    protocol = PROTOCOLS[name]
    return protocol if reference_fit is None else replace(protocol, reference_fit=reference_fit)


def pixels_sha256(edit: np.ndarray) -> str:
    """SHA-256 in hex of an edit's size and pixels, (H, W, 3) uint8."""
    return hashlib.sha256(f"{edit.shape}".encode() + np.ascontiguousarray(edit).tobytes()).hexdigest()


def recipes_of(
    edits: Sequence[np.ndarray],
    *,
    editor: Editor,
    model: str,
    weights_sha256: str,
    photo: Picture,
    hole: Picture | Box,
    reference: Picture,
    reference_box: Box | None,
    seed: int,
    sampling: Sampling,
    size_px: int | None,
    context_factor: float | None,
    protocol: ProtocolName,
    reference_fit: Fit | None,
) -> list[Recipe]:
    """The recipe of each edit that `editor.edit` returned for n = len(edits) and these arguments."""
    if context_factor is None and PROTOCOLS[protocol].area == "window":
        context_factor = CONTEXT_FACTOR
    return [
        Recipe(
            model=model,
            weights_sha256=weights_sha256,
            photo=photo,
            hole=hole,
            reference=reference,
            reference_box=reference_box,
            seed=seed + k,
            guidance_scale=sampling.guidance_scale,
            steps=sampling.steps,
            sampler=sampling.sampler,
            size_px=editor.card.image_px if size_px is None else size_px,
            context_factor=context_factor,
            protocol=protocol,
            reference_fit=reference_fit,
            batch_rows=min(BATCH_ROWS, len(edits) - k // BATCH_ROWS * BATCH_ROWS),
            device=editor.device,
            dtype=editor.dtype,
            made_with={name: version(name) for name in ("pbe", "torch", "diffusers")},
            pixels_sha256=pixels_sha256(edit),
        )
        for k, edit in enumerate(edits)
    ]


def png_with_recipe(edit: np.ndarray, recipe: Recipe) -> bytes:
    """The edit (H, W, 3) uint8 as PNG, with its recipe."""
    return with_png_text(encode_png(edit), KEYWORD, recipe.to_json())


def read_recipe(path: Path) -> Recipe:
    """The recipe in a PNG of pbe's, or in a JSON file. Raises RecipeError, and OSError for a file that is not there."""
    if kind := irregular(path):
        raise RecipeError(f"{path}: {kind}, not a file")
    with path.open("rb") as stream:
        return recipe_from(stream.read(MAX_RECIPE_BYTES + 1), str(path))


def recipe_from(data: bytes, where: str) -> Recipe:
    """The recipe in the bytes of a PNG or JSON file, which messages call `where`. Raises RecipeError."""
    text: bytes | None = data
    if data.startswith(b"\x89PNG"):
        text = read_png_text(data, KEYWORD, max_bytes=MAX_RECIPE_BYTES + 1)
    if text is None:
        raise RecipeError(f"{where}: no recipe in this PNG; pbe writes one into each edit, other programs may drop it")
    if max(len(data), len(text)) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{where}: more than {MAX_RECIPE_BYTES} bytes")
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_problem(error)}") from None


def _problem(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    if first["type"] == "json_invalid":
        return "not a recipe of pbe: not JSON"
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}"
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key; is it from a later version of pbe?"
    return f"{key or 'recipe'}: {one_line(first['msg'])}"


def remake(recipe: Recipe, editor: Editor, *, folder: Path | None, on_step: OnStep | None = None) -> np.ndarray:
    """The edit (H, W, 3) uint8, made again; `is_same` says whether its pixels are the recipe's.

    editor: of the model of `recipe.weights_sha256`, which the caller checks. folder: where the recipe lies; None: only
    pictures inside the recipe are read. Raises RecipeError, EditInputError, and the errors of `Editor.edit_batch`.
    """
    photo, hole_mask, reference = open_inputs(recipe, folder)
    task = EditTask(photo, hole_mask, reference, recipe.seed)
    edits = editor.edit_batch(
        [task] * recipe.batch_rows,  # the number of rows matters, not what the others are
        sampling=recipe.sampling,
        size_px=recipe.size_px,
        context_factor=recipe.context_factor,
        protocol=recipe.edit_protocol,
        on_step=on_step,
    )
    return edits[0]


def is_same(recipe: Recipe, edit: np.ndarray) -> bool:
    """Whether the edit has the pixels that the recipe was written for."""
    return pixels_sha256(edit) == recipe.pixels_sha256


def open_inputs(recipe: Recipe, folder: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photo (H, W, 3) uint8, hole_mask (H, W) bool, reference (h, w, 3) uint8. Raises RecipeError, EditInputError."""
    photo = decode_picture(recipe.photo.read(folder), recipe.photo.name)
    hole, name = recipe.hole, recipe.reference.name
    hole_mask = (
        hole_of_box(hole, photo, recipe.photo.name)
        if isinstance(hole, Box)
        else hole_of_mask(hole.read(folder), photo, hole.name)
    )
    reference = decode_picture(recipe.reference.read(folder), name)
    return photo, hole_mask, part_of(reference, recipe.reference_box, name)
