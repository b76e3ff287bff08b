"""What the page's handlers keep of a visitor, and when: clicks that come while an edit waits, computes or has ended."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pbe.data import images
from pbe.page import handlers
from pbe.page.handlers import BOX, BRUSH, MASK, OWN_SAMPLER, Handlers, guarded
from pbe.page.layout import make_page
from pbe.page.models import Models
from pbe.page.samples import open_samples
from pbe.page.uploads import Upload
from pbe.page.visitors import Visitor, Visitors
from pbe.recipe import recipes_of

if TYPE_CHECKING:
    from gradio import Blocks

ADA: Any = SimpleNamespace(session_hash="ada")
EDITS = 2


@pytest.fixture
def act(model_folder: Path, tmp_path: Path) -> Handlers:
    """Handlers of a page on which Ada has chosen a photo and a reference."""
    act = Handlers(Models([str(model_folder)]), Visitors(tmp_path / "page"), open_samples(), None)
    visitor = _visitor(act)
    visitor.photo, visitor.reference = _picture(0), _picture(1)
    return act


def _visitor(act: Handlers) -> Visitor:
    return act._visitors.of(ADA.session_hash)


def _picture(seed: int, width_px: int = 40) -> Upload:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, width_px, 3), np.uint8)
    return Upload(images.encode_png(pixels), pixels)


def _edit(act: Handlers, seed: int = 5) -> list[Any]:
    """The edit of a box, once the queue begins it."""
    settings = (5.0, EDITS, seed, 2, OWN_SAMPLER, "ours", act.models.labels[0])
    return guarded(act.edit, 6)(BOX, b"", "8,6,25,20", *settings, ADA, lambda *given, **named: None)


def _click(index: int) -> Any:
    return SimpleNamespace(index=index)


def _files(act: Handlers) -> list[Path]:
    return sorted(path for path in _visitor(act).folder.rglob("*") if path.is_file())


def test_an_edit_that_waits_is_of_what_was_chosen_at_its_click(act: Handlers) -> None:
    visitor = _visitor(act)
    photo, reference = visitor.photo, visitor.reference
    act.busy(ADA)
    visitor.photo, visitor.reference = _picture(2), _picture(3)
    _edit(act)
    assert visitor.result is not None and photo is not None and reference is not None
    assert [visitor.result.recipes[0].photo.data, visitor.result.recipes[0].reference.data] == [
        photo.data,
        reference.data,
    ]
    _edit(act)  # without a click before it
    assert visitor.result.photo is visitor.photo


def test_an_edit_waits_for_one_that_was_cancelled_and_may_be_cancelled_itself(
    act: Handlers, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[list[Any]] = []
    with act._editing:
        act.busy(ADA)
        waiting = threading.Thread(target=lambda: answers.append(_edit(act)))
        waiting.start()
        while _visitor(act)._new:  # until it has begun
            time.sleep(0.01)
        act.stop(ADA)
    waiting.join()
    assert "Cancelled." in answers[0][-1] and "begin" not in capsys.readouterr().out


def test_a_model_that_cannot_be_opened_names_its_folder_in_the_terminal_alone(
    act: Handlers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act.models = Models([str(tmp_path / "models" / "gone")])
    said = _edit(act)[-1]
    assert "the terminal that runs `pbe page` says what" in said and str(tmp_path) not in said
    assert f"pbe page: error: {tmp_path}" in capsys.readouterr().out


@pytest.fixture
def at_the_end(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Give it what happens after the last step of an edit, before its pictures are written."""

    def give(happens: Callable[[], object]) -> None:
        def recipes(*given: Any, **named: Any) -> Any:
            happens()
            return recipes_of(*given, **named)

        monkeypatch.setattr(handlers, "recipes_of", recipes)

    return give


def test_an_edit_cancelled_after_its_last_step_leaves_those_before(
    act: Handlers, at_the_end: Callable[[Callable[[], object]], None]
) -> None:
    act.busy(ADA)
    _edit(act, seed=5)
    at_the_end(lambda: act.stop(ADA))
    act.busy(ADA)
    assert "Cancelled." in _edit(act, seed=9)[-1]
    result = _visitor(act).result
    assert result is not None and [recipe.seed for recipe in result.recipes] == [5, 6]


def test_an_edit_that_ends_after_its_page_was_closed_leaves_no_file(
    act: Handlers, tmp_path: Path, at_the_end: Callable[[Callable[[], object]], None]
) -> None:
    at_the_end(lambda: act.leave(ADA))
    act.busy(ADA)
    assert "Cancelled." in _edit(act)[-1]
    assert not list((tmp_path / "page").rglob("*"))


async def _blocks(act: Handlers) -> "Blocks":
    """Within an event loop: otherwise Gradio makes some, and closes none."""
    return make_page(act)


def test_a_result_has_its_files_once_until_the_next_and_gradio_keeps_them(act: Handlers) -> None:
    from gradio.route_utils import delete_files_created_by_app

    shown = _edit(act)
    files = _files(act)
    assert act.choose(_click(0), ADA)[:3] == shown[2:5] and _files(act) == files
    act.choose(_click(1), ADA)
    assert len(_files(act)) == len(files) + 4
    blocks = asyncio.run(_blocks(act))
    for block in blocks.blocks.values():
        block.temp_files.update(map(str, files))
    blocks.upload_file_set.add(str(files[-1]))
    delete_files_created_by_app(blocks, age=-1)
    assert all(path.exists() for path in files[:-1]) and not files[-1].exists()
    _edit(act, seed=9)
    assert [path.name for path in _files(act) if path.suffix == ".png"] == ["edit-seed-9.png"]


def test_the_view_shows_the_hole_that_the_edit_would_use(act: Handlers, tmp_path: Path) -> None:
    level = np.zeros((30, 40), np.uint8)
    level[10:20, 5:15] = 255
    for name, size in (("fits.png", 40), ("wide.png", 41)):
        mask = np.pad(level, ((0, 0), (0, size - 40)))
        (tmp_path / name).write_bytes(images.encode_png(np.repeat(mask[..., None], 3, axis=2)))
    take_mask = guarded(act.take_mask, 2, emptied=1)
    take_mask(tmp_path / "fits.png", ADA)
    by_mask = act.show_hole(MASK, "5,10,15,20", ADA)
    by_box = act.show_hole(BOX, "5,10,15,20", ADA)
    assert by_mask is not None and by_box is not None and Path(by_mask).read_bytes() == Path(by_box).read_bytes()
    assert act.show_hole(BOX, "5,10,15", ADA) is None and act.show_hole(BRUSH, "5,10,15,20", ADA) is None
    emptied, said = take_mask(tmp_path / "wide.png", ADA)
    assert emptied is None and "The mask is 41 x 30 px" in said and act.show_hole(MASK, "", ADA) is None
