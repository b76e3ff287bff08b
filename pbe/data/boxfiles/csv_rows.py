"""Rows of a CSV file in the dialect that its beginning shows: encoding, line ends, delimiter, names of the columns.

The dialect is decided once per file. OpenImages' own (UTF-8, commas, line feeds, names as spelled) costs nothing: its
bytes go to pyarrow as they are, block by block. An unreadable row costs no other row.
"""

import codecs
import csv
import io
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pbe.data.files import FileTree, SourceError
from pbe.errors import one_line

BLOCK_BYTES = 8 << 20  # of text parsed at a time
SAMPLE_BYTES = 1 << 16  # of the beginning, which decides
ROW_BYTES_MAX = 16 << 20
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SHOWN = 120  # characters of an unreadable row in its detail
_QUOTED = r'^\s*"(.*)"\s*$'  # a cell
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is the beginning of it
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NO_TEXT = {
    b"PK\x03\x04": "an Excel workbook or a zip file",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"\x1f\x8b": "a gzip file",
}


@dataclass(frozen=True)
class Dialect:
    """header: names of the columns, those of `wanted` as spelled there. first_row: number of the line after it."""

    encoding: str
    mark_bytes: int  # of the byte order mark
    carriage_returns: bool  # alone, as line ends
    delimiter: str
    header: tuple[str, ...]
    first_row: int

    @property
    def remark(self) -> str:
        """What is unlike OpenImages' own files; "" for nothing."""
        unlike = []
        if self.encoding != "utf-8":
            unlike.append(self.encoding.upper().removesuffix("-LE").removesuffix("-BE"))
        if self.delimiter != ",":
            unlike.append(f"{DELIMITERS[self.delimiter]} between cells")
        if self.carriage_returns:
            unlike.append("carriage returns as line ends")
        return ", ".join(unlike)


@dataclass(frozen=True)
class UnreadableRow:
    """A row with a wrong number of cells, or with bytes that are no text. text: its beginning."""

    line: int
    text: str
    why: str
    cells: tuple[str, ...] = ()

    @property
    def detail(self) -> str:
        return f"{self.why}: {self.text}"

    def cell(self, place: int) -> str:
        """Without quotes; "" where the row is too short."""
        return self.cells[place].strip().strip('"') if place < len(self.cells) else ""


@dataclass(frozen=True)
class Rows:
    """Rows of one block of a file. cells: text by column. lines: (N,) int64, the first line is 1."""

    cells: pa.RecordBatch
    lines: np.ndarray
    unreadable: Sequence[UnreadableRow]


def read_dialect(tree: FileTree, name: str, wanted: Collection[str]) -> Dialect:
    """Decide on a file's dialect: the delimiter that finds most of the `wanted` columns.

    Names of columns are compared without regard to case, spaces, _ and -. Raises SourceError for an empty file, and for
    a wanted column that is there twice.
    """
    with tree.open(name) as stream:
        first = bytes(stream.read(SAMPLE_BYTES))
    where = tree.path_of(name)
    for start, what in _NO_TEXT.items():
        if first.startswith(start):
            raise SourceError(f"{where}: {what}, not a CSV; save it as CSV in UTF-8")
    encoding, mark_bytes = _encoding_of(first)
    text = first[mark_bytes:].decode(encoding, "replace")
    carriage_returns = "\n" not in text and "\r" in text
    lines = text.replace("\r\n", "\n").split("\r" if carriage_returns else "\n")
    has_separator = re.fullmatch(r'"?sep=."?', lines[0]) is not None  # Excel's own first line
    line = lines[1] if has_separator and len(lines) > 1 else lines[0]
    if not line.strip():
        raise _no_header(first, where)
    headers = {delimiter: _header(line, delimiter, wanted) for delimiter in DELIMITERS}
    delimiter = max(headers, key=lambda key: len(set(wanted) & set(headers[key])))  # the first, if none finds more
    _refuse_repeated(wanted, headers[delimiter], where)
    first_row = 3 if has_separator else 2
    return Dialect(encoding, mark_bytes, carriage_returns, delimiter, headers[delimiter], first_row)


def _encoding_of(first: bytes) -> tuple[str, int]:
    """Encoding of a file that begins like this, and the number of bytes of its mark. Without one, UTF-16 has a zero in
    every other byte of its Latin letters, of which a header and ids consist; fewer zeros are damage in a row."""
    for mark, encoding in _BOMS:
        if first.startswith(mark):
            return encoding, len(mark)
    beginning = first[:200]
    zeros = {"utf-16-le": beginning[1::2].count(0), "utf-16-be": beginning[::2].count(0)}
    likeliest = max(zeros, key=lambda encoding: zeros[encoding])
    return likeliest if 8 * zeros[likeliest] > len(beginning) else "utf-8", 0  # in a quarter of the letters


def _no_header(first: bytes, where: str) -> SourceError:
    """first: the beginning of the file."""
    what = "its first line is empty; put the header there" if first else "the file is empty"
    return SourceError(f"{where}: {what}")


def _refuse_repeated(columns: Collection[str], header: Sequence[str], where: str) -> None:
    """Raise SourceError if the header has one of these columns twice."""
    repeated = sorted({column for column in columns if header.count(column) > 1})
    if repeated:
        raise SourceError(f"{where}: the header contains {', '.join(map(repr, repeated))} more than once")


def _split_line(line: str, delimiter: str) -> list[str]:
    """Cells of a line, in which quotes may hold delimiters. Raises csv.Error for a cell of more than 128 KiB."""
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]


def _header(line: str, delimiter: str, wanted: Collection[str]) -> tuple[str, ...]:
    try:
        cells = _split_line(line, delimiter)
    except csv.Error:
        cells = []
    spelled = {_plain(name): name for name in wanted if name not in cells}
    return tuple(spelled.get(_plain(cell), cell) for cell in cells)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def read_rows(
    tree: FileTree,
    name: str,
    dialect: Dialect,
    columns: Sequence[str],
    *,
    block_bytes: int,
) -> Iterator[Rows]:
    """Yield the named columns as text, block by block, without rows in which they all are empty.

    A row ends at every line end, so that a stray quote spoils only its own row; quotes around a cell are removed. Rows
    with delimiters inside quotes, or with empty cells after the last, come at the end of their block. Rows of another
    width, and those with a byte in these columns that is no text, are `unreadable`.
    """
    places = [dialect.header.index(column) for column in columns]
    line = dialect.first_row
    for block in _blocks(tree, name, dialect, places, block_bytes):
        cells, irregular = _split(block.data, dialect, places, columns)
        count = cells.num_rows + len(irregular)
        lines = line + np.delete(np.arange(count), [row.number - 1 for row in irregular])
        unreadable = [replace(row, line=line + row.line) for row in block.unreadable]
        mended: list[tuple[int, tuple[str, ...]]] = []
        for row in irregular:
            at, split = line + row.number - 1, _cells(row.text, dialect)
            if len(split) == len(dialect.header):
                mended.append((at, split))
            elif any(split):
                why = f"{row.actual_columns} cells where the header has {row.expected_columns}"
                unreadable.append(UnreadableRow(at, row.text[:_SHOWN], why, split))
        blank = np.ones(cells.num_rows, bool)
        for column in cells.columns:
            blank &= np.asarray(pc.equal(column, ""))
        if blank.any():
            cells, lines = cells.filter(pa.array(~blank)), lines[~blank]
        cells = _without_quotes(cells)
        if mended:
            arrays = [pa.array([split[place] for _, split in mended], pa.string()) for place in places]
            cells = pa.concat_batches([cells, pa.record_batch(arrays, schema=cells.schema)])
            lines = np.append(lines, [at for at, _ in mended])
        yield Rows(cells, lines, unreadable)
        line += count


def _split(
    data: bytes, dialect: Dialect, places: Sequence[int], columns: Sequence[str]
) -> tuple[pa.RecordBatch, list[pacsv.InvalidRow]]:
    irregular: list[pacsv.InvalidRow] = []

    def keep(row: pacsv.InvalidRow) -> str:
        irregular.append(row)
        return "skip"

    numbered = [str(place) for place in range(len(dialect.header))]  # names may occur twice
    wanted = [str(place) for place in places]
    table = pacsv.read_csv(
        pa.BufferReader(data),
        # only a single thread gives an irregular row its number
        read_options=pacsv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=numbered),
        parse_options=pacsv.ParseOptions(
            delimiter=dialect.delimiter, invalid_row_handler=keep, ignore_empty_lines=False, quote_char=False
        ),
        convert_options=pacsv.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
        ),
    )
    arrays = [column.combine_chunks() for column in table.columns]
    return pa.record_batch(arrays, names=list(columns)), irregular


def _cells(text: str, dialect: Dialect) -> tuple[str, ...]:
    """Cells of an irregular row: delimiters inside quotes are text, and empty cells after the last are none."""
    try:
        cells = _split_line(text, dialect.delimiter)
    except csv.Error:
        return (text[:_SHOWN],)
    while len(cells) > len(dialect.header) and not cells[-1]:
        cells.pop()
    return tuple(cells)


def _without_quotes(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Cells without the quotes around them, within which "" is a quote, as in the irregular rows."""
    columns = []
    for column in batch.columns:
        if pc.any(pc.match_substring(column, '"')).as_py():
            within = pc.replace_substring_regex(column, pattern=_QUOTED, replacement=r"\1")
            within = pc.replace_substring(within, '""', '"')
            column = pc.if_else(pc.match_substring_regex(column, _QUOTED), within, column)
        columns.append(column)
    return pa.record_batch(columns, names=batch.schema.names)


# -- blocks of whole lines -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """data: whole lines in UTF-8. unreadable: rows that are blank in `data`; their line counts from its first."""

    data: bytes
    unreadable: tuple[UnreadableRow, ...] = ()


def _blocks(tree: FileTree, name: str, dialect: Dialect, places: Sequence[int], block_bytes: int) -> Iterator[_Block]:
    header_lines = dialect.first_row - 1
    for data, too_long in _whole_lines(tree, name, dialect, block_bytes):
        while header_lines and data:
            data = data[data.find(b"\n") + 1 or len(data) :]
            header_lines -= 1
        if not data:
            continue
        block = _Block(data)
        if too_long:
            why = f"a row of more than {ROW_BYTES_MAX >> 20} MB"
            block = _Block(b"\n", (UnreadableRow(0, data[:_SHOWN].decode(errors="replace"), why),))
        elif not data.isascii():
            block = _in_utf8(data, dialect, places)
        yield block


def _whole_lines(tree: FileTree, name: str, dialect: Dialect, block_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Yield whole lines in UTF-8; True with the beginning of a line longer than ROW_BYTES_MAX."""
    with tree.open(name) as stream:
        stream.read(dialect.mark_bytes)
        decoder = codecs.getincrementaldecoder(dialect.encoding)("replace") if dialect.encoding != "utf-8" else None
        begun, skipping, ended = b"", False, False
        while not ended:
            chunk = bytes(stream.read(block_bytes))
            ended = not chunk
            if decoder is not None:
                chunk = decoder.decode(chunk, final=ended).encode().replace("\ufffd".encode(), b"\xff")  # bad in UTF-8
            if dialect.carriage_returns:
                chunk = chunk.replace(b"\r", b"\n")
            if skipping:
                end = chunk.find(b"\n") + 1
                skipping, chunk = not (end or ended), chunk[end:] if end else b""
            cut = len(chunk) if ended else chunk.rfind(b"\n") + 1
            if cut or (ended and begun):
                yield from _without_long_rows(b"".join((begun, memoryview(chunk)[:cut])))  # copies once
                begun = chunk[cut:]
            else:
                begun += chunk
            if len(begun) > ROW_BYTES_MAX:
                yield begun, True
                begun, skipping = b"", True


def _without_long_rows(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Only a block that began with the rest of the last one can have a long row, and it is the first."""
    end = data.find(b"\n") + 1 or len(data)
    if end > ROW_BYTES_MAX:
        yield data[:end], True
        data = data[end:]
    if data:
        yield data, False


def _in_utf8(data: bytes, dialect: Dialect, places: Sequence[int]) -> _Block:
    """The block without the rows that are not UTF-8 in the columns at `places`."""
    try:
        data.decode()
        return _Block(data)
    except UnicodeDecodeError:
        pass
    lines, unreadable = data.removesuffix(b"\n").split(b"\n"), []
    for number, line in enumerate(lines):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            text = line.removesuffix(b"\r").decode(errors="replace")
            cells = text.split(dialect.delimiter)
            lines[number] = text.encode()
            if len(cells) != len(dialect.header) or any("\ufffd" in cells[place] for place in places):
                why = f"byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8"
                unreadable.append(UnreadableRow(number, text[:_SHOWN], why, tuple(cells)))
                lines[number] = b""
    return _Block(b"\n".join([*lines, b""]), tuple(unreadable))


# -- other CSVs ------------------------------------------------------------------------------------------------------


def two_columns(data: bytes) -> Iterator[list[str]]:
    """Rows of a small CSV of ids and names, in any of the encodings and delimiters of Dialect.

    Raises UnicodeDecodeError or csv.Error.
    """
    encoding, mark_bytes = _encoding_of(data)
    text = data[mark_bytes:].decode(encoding)
    lines = text.splitlines()
    firsts = {delimiter: next(csv.reader(lines[:1], delimiter=delimiter), []) for delimiter in DELIMITERS}
    fitting = (mark for mark, cells in firsts.items() if len(cells) > 1 and not set(cells[0]) & set(DELIMITERS))
    return csv.reader(io.StringIO(text, newline=None), delimiter=next(fitting, ","))


def csv_header(tree: FileTree, name: str) -> list[str]:
    """Column names of a CSV. Raises SourceError for an empty file or a repeated name."""
    with tree.open(name) as stream:
        first = stream.read(SAMPLE_BYTES)
    where = tree.path_of(name)
    try:
        header = _split_line(first.split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r"), ",")
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{where}: not a CSV in UTF-8: {one_line(error)}") from None
    if not header:
        raise _no_header(first, where)
    _refuse_repeated(header, header, where)
    return header


def csv_batches(tree: FileTree, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield string columns of a CSV, block by block; rows of the wrong width are passed over.

    For lists of photos, whose titles and authors often have delimiters inside quotes: read_rows keeps such rows until
    the end, because in a box file they are rare.

    Raises SourceError if the file is not a CSV in UTF-8.
    """
    try:
        with tree.open(name) as stream:
            yield from pacsv.open_csv(
                stream,
                read_options=pacsv.ReadOptions(
                    use_threads=False, block_size=BLOCK_BYTES, column_names=csv_header(tree, name), skip_rows=1
                ),
                parse_options=pacsv.ParseOptions(invalid_row_handler=lambda row: "skip", ignore_empty_lines=False),
                convert_options=pacsv.ConvertOptions(
                    include_columns=list(columns),
                    column_types=dict.fromkeys(columns, pa.string()),
                    strings_can_be_null=False,
                ),
            )
    except pa.ArrowInvalid as error:
        raise SourceError(f"{tree.path_of(name)}: not a CSV in UTF-8: {one_line(error)}") from None
