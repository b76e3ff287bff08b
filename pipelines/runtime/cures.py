"""Adds what fixes an error: the command, where pbe/store.py names a part or manifest at fault but does not know stages;
the setting, where ingest rejected rows.
"""

from pathlib import Path

from pbe.errors import UserError
from pbe.store import ManifestError, PartError

STAGE_OF_KIND = {
    "index": "ingest",
    "features": "evaluate",
    "edit": "edit@VARIANT (or baseline@NAME)",
    "runs": "train@VARIANT",
}  # else: kind

_NAMES = "ImageID (CSV) and file_name (COCO) must be file names of photos, or their paths below ingest.images"
_AGAIN = "set ingest.retry_rejected: true"
_OF_REJECTS = {
    "image_id_invalid": "rename the file",
    "image_without_box": f"see that ingest.boxes belongs to the photos in ingest.images: {_NAMES}",
    "image_id_duplicated": "rename one of the files, or name each by its path below ingest.images in the box file",
    "image_unreadable": "replace these files, or save them as JPEG or PNG",
    "image_too_large": "raise ingest.max_image_bytes or ingest.max_image_pixels, or scale the photos down",
    "image_unpublished": "check ingest.image_base, and that the box file's name says the split in which the photos are",
    "download_failed": f"check ingest.image_base, and {_AGAIN}",
    "image_changed": f"leave the photos as they are, and {_AGAIN}",
    "box_image_id_invalid": f"correct the box file (ingest.boxes): {_NAMES}",
    "box_unparsable": "correct the box file (ingest.boxes)",
    "box_outside_image": "correct the box file (ingest.boxes): a CSV has fractions of the photo, a COCO JSON pixels",
    "image_missing": f"name the folder of these photos in ingest.images: {_NAMES}",
    "box_image_ambiguous": "name each photo by its path below ingest.images in the box file (ingest.boxes)",
    "box_size_mismatch": "name in ingest.images the photos that were labelled, unchanged",
    "box_without_mask": "mend its mask, or write a box for it",
    "mask_unreadable": "save the picture as PNG, or the segmentation as COCO has it, or leave it out",
    "mask_size_mismatch": "make the mask on the photo that is in ingest.images, in its size",
    "mask_empty": "mark the object, or leave the mask out",
    "mask_full": "mark the object alone: white on black",
    "mask_outside_box": "see that N of masks/ID_N.png counts the photo's boxes from 0, in the box file's order",
    "mask_ambiguous": "write one black and white picture for each object",
    "mask_without_box": "see that N of masks/ID_N.png counts the photo's boxes from 0, in the box file's order",
    "pair_unreadable": "see that ref_image names a picture below ingest.images",
    "pair_of_itself": "name another picture of the object, or leave the row to ingest.source: folder",
    "pair_mask_unusable": "mend the reference's mask, or leave it out: the whole picture is then the object",
    "box_in_other_split": "put all lines about a photo into the box file of one split, or set ingest.val_frac",
}


def cure_of_reject(reason: str) -> str:
    """Return what likely cures a reason for which ingest rejects images or boxes."""
    return _OF_REJECTS.get(reason, "see the detail")


def with_cure(error: UserError) -> str:
    """Return the error's message and, if one helps, the command to run."""
    if isinstance(error, PartError):
        return f"{error}{';' if error.damage is None else ', then'} {made_again(error.kind)}"
    if isinstance(error, ManifestError):
        stage = _stage_of(error.path)
        if error.damage is None:
            return f"{error}; run `dvc repro {stage}` first"
        return f"{error}; `dvc repro -f -s {stage}` writes it"
    return str(error)


def made_again(kind: str) -> str:
    """Return the advice for a missing part of `kind`: DVC tracks manifests and does not notice missing parts."""
    return f"`dvc repro -f -s {STAGE_OF_KIND.get(kind, kind)}` makes it again"


def _stage_of(manifest: Path) -> str:
    """Return the DVC target of a manifest in data/<stage>/ or data/<stage>/<variant>/."""
    folder = manifest.parent
    return folder.name if folder.parent.name in ("data", "") else f"{folder.parent.name}@{folder.name}"
