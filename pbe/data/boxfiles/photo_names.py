"""Which photo a box file means: ids, file names and paths, in the spellings of tools, file systems and spreadsheets.

A photo's id is its file name without folder and suffix. A name is tried in this order, until a single photo fits:

    p0, p0.jpg                   the id itself
    train/p0.jpg, /data/x/p0     a path: its folders and the photo's are the same, from the last, as far as both go
    é as one character or two    Unicode forms NFC and NFD: macOS writes the other one
    my%20photo.jpg               percent-encoded, as in addresses
    12, 12.0                     0012: a spreadsheet took the zeros
    val/p0.jpg                   train/p0.jpg: by its name alone, if no other path fits that photo

Where photos of several folders have one name and a path tells them apart, their ids are made of the path: train__p0.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

IMAGE_SUFFIX = (
    r"(?i)\.(jpe?g?|jfif|png|webp|avif|hei[cf]|bmp|gif|tiff?|jp2|jxl|dng)$"  # some tools write file names into ImageID
)
ID_CHARACTERS_MAX = 200
# within [] of a regular expression of pyarrow's: control characters (C0, C1), soft hyphen, zero-width and direction
# marks, BOM, tags; not the joiners that Persian and emoji need
UNSEEN = (
    r"\x00-\x1f\x7f-\x{9f}\xad\x{61c}\x{180e}\x{200b}\x{200e}\x{200f}\x{2028}-\x{202e}\x{2060}-\x{206f}\x{feff}"
    r"\x{fff9}-\x{fffb}\x{e0000}-\x{e007f}"
)
_SUFFIX = re.compile(IMAGE_SUFFIX)
_SEPARATOR = re.compile(r"[/\\]+|\?d=")  # /data/local-files/?d=train/p0.jpg, as Label Studio exports it
_ORDINARY = re.compile(r"[0-9A-Za-z_-]*[A-Za-z_-][0-9A-Za-z_-]*")  # has no other spelling
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,199})(?:\.0+)?")  # as a spreadsheet writes it
# how a photo was found, in words for the user
BY_PATH, BY_SUFFIX, BY_NAME_ALONE = "by their path", "by their suffix", "by their name, in another folder"
UNICODE_FORM, PERCENT, WITH_ZEROS = "in another Unicode form", "percent-decoded", "with the zeros a spreadsheet took"


def clean_ids(text: pa.Array) -> pa.Array:
    """Strip surrounding spaces and an image suffix from image ids."""
    return pc.replace_substring_regex(pc.utf8_trim_whitespace(text), pattern=IMAGE_SUFFIX, replacement="")


def invalid_ids(image_id: pa.Array) -> pa.Array:
    """True for ids that are empty, over 200 characters, or unsafe as a path or in a terminal: separators, "..", control
    characters, and characters that show nothing or turn the direction of text."""
    return pc.or_(
        pc.match_substring_regex(image_id, rf"[/\\{UNSEEN}]|^\.*$"),
        pc.greater(pc.utf8_length(image_id), ID_CHARACTERS_MAX),
    )


@dataclass(frozen=True)
class _Name:
    """A name or a photo's address in parts, in NFC. suffix: in lower case, "" where there is none."""

    folders: tuple[str, ...]
    stem: str
    suffix: str

    @property
    def folders_from_last(self) -> tuple[str, ...]:
        return self.folders[::-1]

    def agrees(self, other: "_Name") -> bool:
        """True if both have the same folders, from the last, as far as both go."""
        pairs = zip(self.folders_from_last, other.folders_from_last, strict=False)
        return all(mine == theirs for mine, theirs in pairs)


def _name_of(text: str) -> _Name:
    *folders, file = _SEPARATOR.split(unicodedata.normalize("NFC", text.strip()))
    suffix = _SUFFIX.search(file)
    stem = file[: suffix.start()] if suffix else file
    return _Name(tuple(f for f in folders if f not in ("", ".")), stem, suffix.group().lower() if suffix else "")


@dataclass(frozen=True)
class _Claim:
    """What a photo was called, and how it was found by that name."""

    name: _Name
    how: str


class PhotoNames:
    """Finds the photos of a source by the names that box files give them, and remembers those names.

    listed: PHOTOS, all that there are; None for OpenImages, where a name is an id, or split/id.
    """

    def __init__(self, listed: pa.Table | None = None) -> None:
        self._listed = listed
        self._ids: list[str] = [] if listed is None else listed.column("image_id").to_pylist()
        self._addresses: list[str] = [] if listed is None else listed.column("address").to_pylist()
        self._photo_of = {image_id: photo for photo, image_id in enumerate(self._ids)}
        counts = Counter(self._ids) if len(self._photo_of) < len(self._ids) else Counter[str]()
        self._shared = {image_id for image_id, count in counts.items() if count > 1}
        self._opened: set[str] = set()  # shared ids whose photos a name has told apart
        self._called_by_id = np.zeros(len(self._ids), bool)
        # by photo, or by the id of an unlisted one
        self._claims: dict[int | str, _Claim] = {}
        self._conflicts: dict[int | str, tuple[_Name, _Name]] = {}

    def ids(self, names: pa.Array) -> pa.Array:
        """Image ids; a name that fits no photo stays as it is, but for spaces around it and an image suffix."""
        encoded = pc.dictionary_encode(names)
        plain = clean_ids(encoded.dictionary)
        if self._listed is None:
            found = self._unlisted(plain)
        else:
            found = pa.array(self._find_all(encoded.dictionary.to_pylist(), plain.to_pylist()), pa.string())
        return found.take(encoded.indices)

    def missing(self, image_ids: pa.Array) -> pa.Array:
        """True for paths that `ids` left: the source has no photo that fits."""
        if self._listed is None:
            return pa.array(np.zeros(len(image_ids), bool))
        path = rf"^[^{UNSEEN}]{{0,999}}[/\\][^{UNSEEN}/\\]{{1,{ID_CHARACTERS_MAX}}}$"
        path = pc.match_substring_regex(image_ids, path)
        return pc.and_not(path, pc.match_substring_regex(image_ids, r"(^|[/\\])\.\.([/\\]|$)"))

    def photos(self) -> pa.Table:
        """PHOTOS with the ids that `ids` has given. The source must be listed."""
        assert self._listed is not None
        if not self._opened:
            return self._listed
        ids = pa.array([self._id(photo) for photo in range(len(self._ids))], pa.string())
        return self._listed.set_column(0, self._listed.schema.field("image_id"), ids)

    def ambiguous(self) -> Iterator[tuple[str, str]]:
        """Image ids that stand for names of different photos, each with the reason."""
        for photo, (one, other) in self._conflicts.items():
            yield self._id(photo), f"box files call it {_path(one)} and {_path(other)}: boxes could mean either"
        for photo, claim in self._claims.items():
            if claim.how == WITH_ZEROS and isinstance(photo, int) and self._called_by_id[photo]:
                image_id = self._id(photo)
                yield image_id, f"box files call it {claim.name.stem} and {image_id}: boxes could mean either"

    def counts(self) -> Counter[str]:
        """Number of photos by how they were found, but for those called by their id."""
        return Counter(claim.how for claim in self._claims.values())

    # -- finding ----------------------------------------------------------------------------------------------------

    def _unlisted(self, plain: pa.Array) -> pa.Array:
        if not pc.any(pc.match_substring_regex(plain, r"[/\\]")).as_py():
            return plain
        out = []
        for text in plain.to_pylist():
            name = _name_of(text)
            if name.folders and ".." not in name.folders and text[0] not in "/\\":
                self._claim(name.stem, _Claim(name, BY_PATH))
                text = name.stem
            out.append(text)
        return pa.array(out, pa.string())

    def _find_all(self, names: Sequence[str], plain: Sequence[str]) -> list[str]:
        out, left = list(plain), []
        for place, image_id in enumerate(plain):
            photo = self._photo_of.get(image_id)
            if photo is not None and image_id not in self._shared:
                self._called_by_id[photo] = True
            elif photo is not None or not _ORDINARY.fullmatch(image_id):
                found = self._find(names[place])
                if found is None:
                    left.append(place)
                else:
                    out[place] = self._take(*found)
        for place in left:  # last, so that a path that fits comes first
            name = _name_of(names[place])
            photos = self._by_stem.get(name.stem, []) if ".." not in name.folders else []
            claim = self._claims.get(photos[0]) if photos else None
            if len(photos) == 1 and (claim is None or claim.how == BY_NAME_ALONE):
                out[place] = self._take(photos[0], _Claim(name, BY_NAME_ALONE))
        return out

    def _find(self, text: str) -> tuple[int, _Claim] | None:
        """The only photo that fits a name."""
        name = _name_of(text)
        number = _NUMBER.fullmatch(name.stem) if not name.suffix else None
        tries = [(name, self._by_stem.get(name.stem, []), BY_PATH if name.folders else "")]
        if "%" in text:
            decoded = _name_of(unquote(text))
            tries.append((decoded, self._by_stem.get(decoded.stem, []), PERCENT))
        if number:
            tries.append((name, self._by_number.get(int(number.group(1)), []), WITH_ZEROS))
        for spelled, photos, how in tries:
            photo = self._fitting(spelled, photos) if ".." not in spelled.folders else None
            if photo is not None:
                return photo, _Claim(spelled, how or (BY_SUFFIX if len(photos) > 1 else UNICODE_FORM))
        return None

    def _fitting(self, name: _Name, photos: Sequence[int]) -> int | None:
        """The only one of `photos` that has the folders of `name`, and its suffix if several have.

        photos: as `_sort_by_folders` leaves them. To compare each name with each of them would be quadratic where every
        folder has an rgb.png.
        """
        path, fitting = name.folders_from_last, list[int]()
        compared = cache(lambda photo: self._name(photo).folders_from_last[: len(path)])  # asked for twice or more
        for length in range(min(len(path), self._deepest), -1, -1):  # all its folders, or all that a photo has
            first = bisect_left(photos, path[:length], key=compared)
            fitting = list(photos[first : bisect_right(photos, path[:length], first, key=compared)])
            if fitting:
                break
        if len(fitting) > 1 and name.suffix:
            fitting = [photo for photo in fitting if self._name(photo).suffix == name.suffix] or fitting
            fitting = [photo for photo in fitting if self._name(photo) == name] or fitting  # p0.jpg, not x/p0.jpg
        return fitting[0] if len(fitting) == 1 else None

    def _take(self, photo: int, claim: _Claim) -> str:
        self._claim(photo, claim)
        if self._ids[photo] in self._shared:
            self._opened.add(self._ids[photo])
        return self._id(photo)

    def _claim(self, photo: int | str, claim: _Claim) -> None:
        before = self._claims.setdefault(photo, claim)
        if before.name.stem != claim.name.stem or not before.name.agrees(claim.name):
            self._conflicts.setdefault(photo, (before.name, claim.name))
        elif len(claim.name.folders) > len(before.name.folders):
            self._claims[photo] = claim

    # -- the listed photos ------------------------------------------------------------------------------------------

    def _id(self, photo: int | str) -> str:
        if isinstance(photo, str):
            return photo
        return self._path_ids[photo] if self._ids[photo] in self._opened else self._ids[photo]

    def _name(self, photo: int) -> _Name:
        return _name_of(self._addresses[photo])

    @cached_property
    def _by_stem(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for photo, image_id in enumerate(self._ids):
            found.setdefault(unicodedata.normalize("NFC", image_id), []).append(photo)
        self._sort_by_folders(found.values())
        return found

    @cached_property
    def _by_number(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for photo, image_id in enumerate(self._ids):
            if image_id.isascii() and image_id.isdigit():
                found.setdefault(int(image_id), []).append(photo)
        self._sort_by_folders(found.values())
        return found

    def _sort_by_folders(self, alike: Iterable[list[int]]) -> None:
        """Sort each list of photos by their folders, the last folder first."""
        for photos in alike:
            if len(photos) > 1:
                photos.sort(key=lambda photo: self._name(photo).folders_from_last)

    @cached_property
    def _deepest(self) -> int:
        """No photo has more folders; a name may have millions."""
        return max((len(_SEPARATOR.findall(address)) for address in self._addresses), default=0)

    @cached_property
    def _path_ids(self) -> dict[int, str]:
        """Ids made of the whole path, for photos that share one."""
        names = {photo: self._name(photo) for photo, image_id in enumerate(self._ids) if image_id in self._shared}
        joined = {photo: "__".join((*name.folders, name.stem)) for photo, name in names.items()}
        same = Counter(joined.values())
        return {p: own if same[own] == 1 else f"{own}_{names[p].suffix.lstrip('.')}" for p, own in joined.items()}


def _path(name: _Name) -> str:
    return "/".join((*name.folders, name.stem)) + name.suffix
