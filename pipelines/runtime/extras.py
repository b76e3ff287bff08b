"""What ingest stores beside photos and boxes where the data have it: masks of objects, and pairs."""

import pyarrow as pa

from pbe.data.materialize import NO_MASKS, Masks, masks_of
from pbe.data.schema import BOXES, PAIRS, require
from pbe.store import File, Record, Store

Extras = tuple[File | None, File | None]


def extras_of(ingested: Record) -> Extras:
    """Ingest's boxes where they have masks, which filter leaves there, and its pairs where it has some."""
    masks = ingested.file("boxes") if ingested.counts.get("masks_kept") else None
    return masks, ingested.file("pairs") if ingested.counts.get("pairs_kept") else None


def read_extras(store: Store, extras: Extras) -> tuple[Masks, pa.Table | None]:
    """Masks by image id and box index, and PAIRS."""
    masks, pairs = extras
    return (
        masks_of(require(store.read_table(masks), BOXES, masks.path)) if masks else NO_MASKS,
        require(store.read_table(pairs), PAIRS, pairs.path) if pairs else None,
    )
