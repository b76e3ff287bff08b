"""Slots: each is one Parquet file per bucket, named so that names sort in slot order."""

from pbe.store import File, Manifest


def slot_name(slot: int) -> str:
    """Dataset name of a slot's file."""
    return f"slot-{slot:04d}"


def slot_files(manifest: Manifest) -> list[list[File]]:
    """Files of each slot, in bucket order: result[slot][bucket]."""
    slots: dict[str, list[File]] = {}
    for unit in manifest.units:
        for file in unit.files:
            if file.dataset.startswith("slot-"):
                slots.setdefault(file.dataset, []).append(file)
    return [slots[name] for name in sorted(slots)]


def group_rows(file: File, rows_per_group: int) -> list[int]:
    """Row counts of a file's row groups, which follow from how `Store.write_unit` cuts them."""
    full, rest = divmod(file.rows, rows_per_group)
    return [rows_per_group] * full + ([rest] if rest else [])
