"""Slots: one Parquet file per slot and shard, with names that sort in slot order."""

from pbe.errors import UserError
from pbe.store import File, Manifest

# in materialize's files; small, because training streams read triplets group by group
TRIPLETS_PER_GROUP = 8


class InputError(UserError):
    """The encoded rows were made from other triplets."""


def slot_name(slot: int) -> str:
    """Dataset name of a slot's file."""
    return f"slot-{slot:04d}"


def slot_files(manifest: Manifest) -> list[list[File]]:
    """Files of each slot, in shard order: result[slot][shard]."""
    slots: dict[str, list[File]] = {}
    for unit in manifest.units:
        for file in unit.files:
            if file.dataset.startswith("slot-"):
                slots.setdefault(file.dataset, []).append(file)
    return [slots[name] for name in sorted(slots)]


def group_rows(file: File, rows_per_group: int) -> list[int]:
    """Row counts of a file's row groups, as `Store.write_unit` cuts them."""
    full, rest = divmod(file.rows, rows_per_group)
    return [rows_per_group] * full + ([rest] if rest else [])


def require_same_rows(encoded: Manifest, triplets: Manifest) -> None:
    """Raises InputError unless `encoded` was made from `triplets`."""
    made_from = encoded.config.get("triplets")
    rows = [[[file.rows for file in slot] for slot in slot_files(manifest)] for manifest in (encoded, triplets)]
    if made_from != triplets.digest or rows[0] != rows[1]:
        raise InputError(
            f"the encoded rows were made from triplets {made_from}, but these are triplets {triplets.digest}"
        )
