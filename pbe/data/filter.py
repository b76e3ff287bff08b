"""Which boxes become triplets (upstream scripts/read_bbox.py: relative area in [0.02, 0.8], nothing else)."""

import numpy as np
import pyarrow as pa

from pbe.data.boxes import area_frac
from pbe.data.schema import REJECTS


def filter_boxes(boxes: pa.Table, *, min_area_frac: float, max_area_frac: float) -> tuple[pa.Table, pa.Table]:
    """Split a `boxes` table into kept boxes and `rejects`; both limits are inclusive."""
    columns = [boxes.column(name).to_numpy() for name in ("xmin", "xmax", "ymin", "ymax")]
    area = area_frac(*columns)
    small, large = area < min_area_frac, area > max_area_frac
    dropped = np.flatnonzero(small | large)
    keys = boxes.select(["image_id", "box_index"]).take(dropped).to_pylist()
    rejects = [
        {
            "stage": "filter",
            "key": f"{key['image_id']}#{key['box_index']}",
            "reason": "area_below_min" if small[index] else "area_above_max",
            "detail": f"relative area {area[index]:.4f}, allowed {min_area_frac}..{max_area_frac}",
        }
        for key, index in zip(keys, dropped, strict=True)
    ]
    return boxes.filter(pa.array(~(small | large))), pa.Table.from_pylist(rejects, schema=REJECTS)
