"""Which fills of a bench item there are: not every item has an object's mask, or a true other view."""

from collections.abc import Mapping, Sequence
from typing import Any

from pbe.data.schema import HoleKind, ReferenceKind

Scope = tuple[HoleKind, ReferenceKind]


def scopes_of(row: Mapping[str, Any], holes: Sequence[HoleKind], references: Sequence[ReferenceKind]) -> list[Scope]:
    """The pairs of a hole and a reference that a row of BENCH has, of those that are asked for."""
    having = [hole for hole in holes if row.get(f"{hole}_hole_mask") is not None]
    return [(hole, reference) for hole in having for reference in references if row.get(reference) is not None]
