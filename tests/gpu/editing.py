"""Edit: seconds for one or several edits at once, by dtype, and for diffusers' pipeline on the same weights."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from pbe.diffusion.sampling import Sampling
from pbe.edit import Editor
from pbe.errors import one_line
from pbe.model.precision import TORCH_DTYPES, float32_products
from pbe.model.settings import EditDtype
from pbe.protocol import UPSTREAM
from tests.gpu.networks import new_model
from tests.gpu.sizes import Sizes
from tests.gpu.stops import stops

SCALE, WARM_UP_STEPS = 5.0, 3


def measure_edits(device: torch.device, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """float32 comes first, because the others cast the shared weights permanently, bfloat16 the last."""
    model, made = new_model(device, sizes), Inputs(sizes)
    dtypes: tuple[EditDtype, ...] = ("float32", "tf32", "float16", "bfloat16")
    for dtype in dtypes:
        editor = Editor(model, device, dtype=dtype)
        yield from _rows(device, sizes, f"ours, {dtype}", partial(made.ours, editor))
        if dtype != "tf32":
            yield from _diffusers_rows(device, sizes, made, model, dtype)


def measure_compiled_edits(device: torch.device, sizes: Sizes, count: int) -> Iterator[dict[str, Any]]:
    """A separate process compiles for one number of edits."""
    if device.type != "cuda":
        yield {"case": f"edit, ours, bfloat16, {count} at once", "skipped": "on a GPU alone"}
        return
    since = time.perf_counter()
    editor, made = Editor(new_model(device, sizes), device, dtype="bfloat16", compile_unet=True), Inputs(sizes)
    made.ours(editor, count, WARM_UP_STEPS)
    started_s = time.perf_counter() - since
    for row in _rows(device, sizes, "edit, ours, bfloat16", lambda n, steps: made.ours(editor, n, steps), (count,)):
        yield row | {"start_s": started_s}


def stops_of_edits(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The places where the CPU waits between two sampling steps of one edit."""
    editor, made = Editor(new_model(device, sizes), device, dtype="bfloat16"), Inputs(sizes)
    made.ours(editor, 1, WARM_UP_STEPS)
    seen_by_step: list[int] = []
    with stops(device) as seen:
        made.ours(editor, 1, 6, on_step=lambda: seen_by_step.append(sum(seen.values())))
    return {"per_step": (seen_by_step[-1] - seen_by_step[1]) / (len(seen_by_step) - 2), "places": dict(seen)}


class Inputs:
    """A photo with a hole and a reference, all noise."""

    def __init__(self, sizes: Sizes) -> None:
        rng, side = np.random.default_rng(0), sizes.image_px
        self._photo = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
        self._hole = np.zeros((side, side), np.uint8)
        self._hole[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
        self._reference = rng.integers(0, 256, (224, 224, 3)).astype(np.uint8)

    def ours(self, editor: Editor, count: int, steps: int, on_step: Callable[[], object] | None = None) -> None:
        editor.edit(
            self._photo,
            self._hole,
            self._reference,
            seed=1,
            n=count,
            sampling=Sampling(SCALE, steps),
            protocol=UPSTREAM,
            on_step=on_step,
        )

    def diffusers(self, pipeline: Any, count: int, steps: int) -> None:
        pipeline(
            example_image=[Image.fromarray(self._reference)] * count,
            image=[Image.fromarray(self._photo)] * count,
            mask_image=[Image.fromarray(self._hole * 255)] * count,
            num_inference_steps=steps,
            guidance_scale=SCALE,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
        )


def _diffusers_rows(
    device: torch.device, sizes: Sizes, made: Inputs, model: Any, dtype: EditDtype
) -> Iterator[dict[str, Any]]:
    try:
        from diffusers import PNDMScheduler

        from tests.diffusers_pipeline import pipeline_of
    except ImportError as error:
        yield {"case": f"diffusers, {dtype}", "skipped": f"this diffusers has no PaintByExamplePipeline ({error})"}
        return
    try:
        pipeline = pipeline_of(model, PNDMScheduler.from_config(model.card.scheduler))
        pipeline.image_encoder.to(device, TORCH_DTYPES[dtype])

        def run(count: int, steps: int) -> None:
            with float32_products(tf32=dtype == "tf32"):
                made.diffusers(pipeline, count, steps)

        yield from _rows(device, sizes, f"diffusers, {dtype}", run)
    except Exception as error:  # from diffusers; ours must still be measured
        said = one_line(error, 200)
        yield {"case": f"diffusers, {dtype}", "failed": f"{type(error).__name__}: {said}"}


def _rows(
    device: torch.device,
    sizes: Sizes,
    name: str,
    run: Callable[[int, int], None],
    counts: tuple[int, ...] | None = None,
) -> Iterator[dict[str, Any]]:
    for count in counts or sizes.edits:
        run(count, WARM_UP_STEPS)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        since = time.perf_counter()
        run(count, sizes.edit_steps)  # ends with pictures on the CPU
        seconds = time.perf_counter() - since
        row = {"case": f"{name}, {count} at once", "seconds": seconds, "per_edit_s": seconds / count}
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        yield row | {"peak_gib": peak}
