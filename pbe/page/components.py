"""Gradio's components, changed so that what a browser sends is opened by pbe/page/uploads.py alone.

Gradio's own would decode a picture by Pillow, without our limits, before any handler sees it, and would fetch an
address that a request names in place of an uploaded file.
"""

import base64
import binascii
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta
from gradio.data_classes import FileData, ImageData

PNG_ADDRESS = "data:image/png;base64,"


class _Plain(ComponentMeta):
    """Makes a class only. Gradio's metaclass would also write a .pyi file beside this one, at every import."""

    def __new__(cls, name: str, bases: tuple[type, ...], attrs: dict[str, Any]) -> "_Plain":
        return ABCMeta.__new__(cls, name, bases, attrs)


class PictureInput(gr.Image, metaclass=_Plain):
    """An upload or a paste, whose handler gets the file's path."""

    is_template = True  # the browser sees its base class

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        _refuse_others(url_or_file_path, self.GRADIO_CACHE)
        return await super().async_move_resource_to_block_cache(url_or_file_path)

    def preprocess(self, payload: ImageData | None) -> Path | None:  # type: ignore[override]
        return None if payload is None or payload.path is None else Path(payload.path)


class FileInput(gr.File, metaclass=_Plain):
    """The same for a file that the page does not show."""

    is_template = True

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        _refuse_others(url_or_file_path, self.GRADIO_CACHE)
        return await super().async_move_resource_to_block_cache(url_or_file_path)

    def preprocess(self, payload: Any) -> Path | None:  # type: ignore[override]
        return Path(payload.path) if isinstance(payload, FileData) else None


class HoleBrush(gr.HTML, metaclass=_Plain):
    """A brush over the photo, on a plain canvas. Its handler gets the painted layer as PNG bytes, b"" for none.

    Not gr.ImageEditor, which needs WebGL (in headless Chromium it ends in a script error, without a photo), decodes by
    Pillow what a browser sends, and keeps for ever what was painted if no edit asks for it.
    """

    is_template = True

    def preprocess(self, payload: str | None) -> bytes:  # type: ignore[override]
        if not isinstance(payload, str) or not payload.startswith(PNG_ADDRESS):
            return b""
        try:
            return base64.b64decode(payload.removeprefix(PNG_ADDRESS), validate=True)
        except binascii.Error:
            return b"\0"  # no picture: the handler says so

    def postprocess(self, value: bytes | None) -> str:  # type: ignore[override]
        """value: the photo, JPEG bytes."""
        return "" if value is None else "data:image/jpeg;base64," + base64.b64encode(value).decode()


def hole_brush() -> HoleBrush:
    here = Path(__file__)
    return HoleBrush(
        html_template=here.with_name("canvas.html").read_text(encoding="utf-8"),
        js_on_load=here.with_name("canvas.js").read_text(encoding="utf-8"),
        elem_id="brush",
    )


def _refuse_others(path: str | Path | None, folder: str) -> None:
    """Only files of this server's own folder, and no addresses."""
    if path is not None and not Path(path).is_relative_to(folder):
        raise gr.Error("This was not uploaded here.", title="Refused", print_exception=False)
