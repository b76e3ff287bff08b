"""The page: what stands where, and which handler answers. Gradio's Blocks."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import gradio as gr
import numpy as np

from pbe.diffusion.sampling import Sampling
from pbe.diffusion.settings import SamplerName
from pbe.page.components import FileInput, PictureInput, hole_brush
from pbe.page.handlers import ANY_CLASS, BOX, BRUSH, MASK, OWN_SAMPLER, Handlers, guarded, status
from pbe.page.uploads import limits_text, shown
from pbe.recipe import PROTOCOLS

TITLE = "Paint by Example"
STYLE = Path(__file__).with_name("page.css")
EDITS_MAX, STEPS_MAX, SCALE_MAX = 8, 200, 15.0
THUMB_PX = 160
UNUSED_S = (600, 3600)  # uploads that no click used: looked for every so often, removed at this age
CLASSES_MAX = 1000
# Every choice is answered, in order, so the last one counts. By default Gradio drops an event while the one before is
# being answered; a click on "Paste from clipboard" is two events, of which the first empties the box. Gradio's
# "always_last" repeats the first choice: it keeps that one's event data.
EACH: Literal["multiple"] = "multiple"
# to what a click made, if it made it
SCROLL = "() => {{ if ({}) document.querySelector('{}').scrollIntoView({{behavior: 'smooth'}}); }}"
# Gradio's slider gives its two pictures no text
NAME_COMPARED = """() => new MutationObserver(() => document.querySelectorAll("#compare img").forEach(image => {
  const name = image.src.endsWith("before.jpg") ? "The photo before" : "The edit";
  if (image.alt !== name) image.alt = name;
})).observe(document.body, {childList: true, subtree: true})"""


def make_page(act: Handlers) -> gr.Blocks:
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=UNUSED_S) as blocks:
        gr.Markdown(
            f"# {TITLE}\nMark the part of a photo that should change, and show a picture of what should appear there. "
            "The model paints it in.<br>Your pictures stay with this server until you close the page; no other "
            "computer is asked."
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                gr.Markdown("## 1. Photo, and where it should change")
                photo = PictureInput(
                    label="Photo", sources=["upload", "clipboard"], height=130, buttons=[], elem_id="photo",
                    placeholder=f"Drop a photo here, or click to choose one\n(at most {limits_text()})",
                )  # fmt: skip
                sample_photos = _strip(
                    "Sample photos", [item.pixels for item in act.samples.photos], act.samples.photo_names, columns=7
                )
                kind = gr.Radio([BRUSH, BOX, MASK], value=BRUSH, label="Mark the hole by", elem_id="kind")
                brush = hole_brush()
                box = gr.Textbox(
                    label="Box: left,top,right,bottom in pixels of the photo", placeholder="140,60,480,330",
                    max_lines=1, max_length=40, visible="hidden", elem_id="box",
                )  # fmt: skip
                mask = FileInput(
                    label="Mask: a picture of the photo's size, white where the edit goes", height=110,
                    visible="hidden", elem_id="mask",
                )  # fmt: skip
                hole_view = gr.Image(
                    label="The photo with its hole", interactive=False, visible="hidden", buttons=[], elem_id="hole",
                    alt_text="The photo, grey where the edit goes",
                )  # fmt: skip
            with gr.Column(scale=2, min_width=320):
                gr.Markdown("## 2. What should appear")
                reference = PictureInput(
                    label="Reference", sources=["upload", "clipboard"], height=230, buttons=[], elem_id="reference",
                    alt_text="The reference", placeholder="Drop a picture of it here, or click to choose one",
                )  # fmt: skip
                sample_references = _strip(
                    "Sample references",
                    [item.pixels for item in act.samples.references],
                    act.samples.reference_names,
                    columns=5,
                )
                with gr.Accordion("From the index of exemplars", open=True, visible=act.index is not None):
                    names = [] if act.index is None else list(act.index.labels)[:CLASSES_MAX]
                    label = gr.Dropdown([ANY_CLASS, *names], value=ANY_CLASS, label="Class", elem_id="class")
                    alike = gr.Checkbox(label="Like the reference above", value=False, elem_id="alike")
                    find = gr.Button("Find exemplars", elem_id="find")
                    exemplars = gr.Gallery(
                        label="Exemplars; choose one as reference", columns=4, allow_preview=False, buttons=[],
                        object_fit="cover", height="auto", interactive=False, visible=False, elem_id="exemplars",
                        elem_classes="strip",
                    )  # fmt: skip
                gr.Markdown("## 3. Edit")
                scale = gr.Slider(
                    1, SCALE_MAX, value=act.models.guidance_scale(act.models.labels[0], SCALE_MAX), step=0.5,
                    label="Similarity to the reference",
                    info="The guidance scale: 1 is none, 3 to 7 is usual", elem_id="scale",
                )  # fmt: skip
                count = gr.Slider(1, EDITS_MAX, value=4, step=1, label="Number of edits", elem_id="count")
                with gr.Row():
                    seed = gr.Number(value=42, precision=0, label="Seed", elem_id="seed", min_width=120)
                    new_seed = gr.Button("New seed", elem_id="new-seed", min_width=120)
                with gr.Accordion("More settings", open=False, elem_id="more"):
                    steps = gr.Slider(1, STEPS_MAX, value=Sampling().steps, step=1, label="Steps", elem_id="steps")
                    sampler = gr.Dropdown([OWN_SAMPLER, *get_args(SamplerName)], value=OWN_SAMPLER, label="Sampler")
                    protocol = gr.Dropdown(
                        list(PROTOCOLS), value="ours", label="Protocol",
                        info="ours edits the square around the hole; the others the whole photo, as the originals do",
                    )  # fmt: skip
                    model = gr.Dropdown(list(act.models.labels), value=act.models.labels[0], label="Model")
                with gr.Row():
                    edit = gr.Button("Edit", variant="primary", size="lg", elem_id="edit", scale=2, min_width=120)
                    cancel = gr.Button("Cancel", size="lg", interactive=False, elem_id="cancel", min_width=100)
                line = gr.HTML(status("Choose a photo to begin."), elem_id="status")
        with gr.Column(visible=False, elem_id="results") as results:
            gr.Markdown("## Results")
            with gr.Row(equal_height=False):
                gallery = gr.Gallery(
                    label="Edits; choose one to compare it", columns=2, allow_preview=False, buttons=[], scale=2,
                    object_fit="contain", height="auto", interactive=False, elem_id="gallery", min_width=320,
                    elem_classes="strip",
                )  # fmt: skip
                with gr.Column(scale=3, min_width=320):
                    compare = gr.ImageSlider(
                        label="Before (left) and after (right)", interactive=False, buttons=["fullscreen"],
                        elem_id="compare",
                    )  # fmt: skip
                    with gr.Row():
                        png = gr.DownloadButton("Download PNG", elem_id="png", min_width=140)
                        recipe = gr.DownloadButton("Download recipe", elem_id="recipe", min_width=140)
                        again = gr.Button("Use as photo", elem_id="again", min_width=140)

        of_photo = [photo, brush, mask, line]
        taken = photo.input(
            guarded(act.take_photo, 4, emptied=1), photo, of_photo, show_progress_on=photo, trigger_mode=EACH
        )
        taken.failure(act.refuse_picture, None, [photo, line], queue=False, show_progress="hidden")
        sample_taken = sample_photos.select(
            guarded(act.take_sample_photo, 4), None, of_photo, show_progress="hidden", trigger_mode=EACH
        )
        result_taken = again.click(guarded(act.take_result, 4), None, of_photo, show_progress="hidden")
        result_taken.then(None, js=SCROLL.format("true", "#brush"))
        kind_shown = kind.change(
            act.show_kind, kind, [brush, box, mask, hole_view], queue=False, show_progress="hidden"
        )
        read_mask = guarded(act.take_mask, 2, emptied=1)
        mask_taken = mask.upload(read_mask, mask, [mask, line], show_progress_on=mask, trigger_mode=EACH)
        mask_cleared = mask.clear(read_mask, mask, [mask, line], show_progress="hidden", trigger_mode=EACH)
        for done in (taken, sample_taken, result_taken, kind_shown, mask_taken, mask_cleared):
            done.then(act.show_hole, [kind, box], hole_view, show_progress="hidden")
        box.change(act.show_hole, [kind, box], hole_view, show_progress="hidden", trigger_mode="always_last")

        of_reference = [reference, line]
        reference.input(
            guarded(act.take_reference, 2, emptied=1),
            reference,
            of_reference,
            show_progress_on=reference,
            trigger_mode=EACH,
        ).failure(act.refuse_picture, None, of_reference, queue=False, show_progress="hidden")
        sample_references.select(
            guarded(act.take_sample_reference, 2), None, of_reference, show_progress="hidden", trigger_mode=EACH
        )
        find.click(guarded(act.find_exemplars, 2), [label, alike], [exemplars, line], show_progress_on=exemplars)
        exemplars.select(guarded(act.take_exemplar, 2), None, of_reference, show_progress="hidden", trigger_mode=EACH)

        take_model = guarded(functools.partial(act.take_model, scale_max=SCALE_MAX), 2)
        model.change(take_model, model, [scale, line], queue=False, show_progress="hidden")
        new_seed.click(act.new_seed, None, seed, queue=False, show_progress="hidden")
        # first the click, which says what the edit is of, however long it waits
        run = edit.click(act.busy, None, [edit, cancel], queue=False, show_progress="hidden").then(
            guarded(act.edit, 6),
            [kind, brush, box, scale, count, seed, steps, sampler, protocol, model],
            [results, gallery, compare, png, recipe, line],
            concurrency_limit=1,
            show_progress_on=line,
        )
        run.then(act.idle, None, [edit, cancel], queue=False, show_progress="hidden").then(
            None, js=SCROLL.format("document.querySelector('#status .done')", "#results")
        )
        run.failure(act.refuse_edit, None, [edit, cancel, line], queue=False, show_progress="hidden")
        cancel.click(act.stop, None, [edit, cancel, line], queue=False, cancels=[run], show_progress="hidden")
        gallery.select(
            guarded(act.choose, 4), None, [compare, png, recipe, line], show_progress="hidden", trigger_mode=EACH
        )
        blocks.load(None, js=NAME_COMPARED)
        blocks.unload(act.leave)
    # Only uploads go by age. Gradio would remove what it shows too, also a result whose page is still open
    blocks.temp_file_sets = [blocks.upload_file_set]
    return blocks


def make_theme() -> gr.themes.Base:
    """Fonts of the visitor's system, so that none is fetched; greys dark enough to read (WCAG AA)."""
    return gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        body_text_color_subdued="#4b5563",
        body_text_color_subdued_dark="#cbd5e1",
        block_info_text_color="#4b5563",
        block_info_text_color_dark="#cbd5e1",
        block_label_text_color="#374151",
        block_label_text_color_dark="#e5e7eb",
        block_title_text_color="#374151",
        block_title_text_color_dark="#e5e7eb",
        input_placeholder_color="#6b7280",
        input_placeholder_color_dark="#cbd5e1",
        button_primary_background_fill="#1d4ed8",
        button_primary_background_fill_hover="#1e40af",
        button_primary_background_fill_dark="#1d4ed8",
        slider_color="#1d4ed8",
    )


def _strip(label: str, pictures: Sequence[np.ndarray], names: Sequence[str], *, columns: int) -> gr.Gallery:
    return gr.Gallery(
        value=[(shown(picture, THUMB_PX), name) for picture, name in zip(pictures, names, strict=True)],
        label=label,
        columns=columns,
        allow_preview=False,
        interactive=False,
        buttons=[],
        height="auto",
        object_fit="cover",
        visible=bool(pictures),
        elem_id=label.lower().replace(" ", "-"),
        elem_classes="strip",
    )
