"""JSON Lines, JSON and CSV files to rows; each has a JSON line, which stays in its file or is kept.

A bad row is a row with a reason; only a file that cannot be read as a whole raises.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gradsift.data.line_file import LineFile, refuse_other, stamp_of
from gradsift.data.lines import Kind, Lines, Opened, to_line
from gradsift.data.spool import BLOCK, Spool
from gradsift.errors import DataError

SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
ARCHIVES = (".gz", ".tgz", ".bz2", ".xz", ".lzma", ".zst", ".lz4", ".br", ".zip", ".tar", ".7z", ".rar")
ARCHIVE_MARKS = (b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"7z\xbc\xaf", b"Rar!\x1a\x07")
ARCHIVE_MARKS += tuple(b"BZh%d1AY&" % level for level in range(1, 10))
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


def read_text_file(path: Path, kind: Kind) -> Opened:
    """Read a JSON Lines, JSON or CSV file; one that cannot be read as a whole is a ``DataError``.

    Args:
        path: the file.
        kind: jsonl, json or csv.

    Returns:
        Its rows as lines.
    """
    if kind == "jsonl":
        return _read_jsonl(path)
    with path.open("rb") as file:
        _check_start(path, file.read(8))
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    body = data.removeprefix(UTF8_MARK)
    return Opened(kind, digest, _read_json(path, body) if kind == "json" else _read_csv(path, body))


def _check_start(path: Path, start: bytes) -> None:
    if start.startswith(UTF16_MARKS):
        raise DataError(
            "the file is UTF-16", where=str(path), got=start[:2].hex(), expected="UTF-8", do="convert it to UTF-8"
        )
    if start.startswith(ARCHIVE_MARKS):
        raise compressed(path)


def compressed(path: Path | str) -> DataError:
    """Build the refusal of a compressed file.

    Args:
        path: the file as given.

    Returns:
        The error, to be raised.
    """
    return DataError(
        "compressed files and archives are never unpacked",
        where=str(path),
        got="a compressed file",
        expected=f"one of {', '.join(SUFFIXES)}",
        do="unpack it yourself and pass the file inside",
    )


def _read_jsonl(path: Path) -> Opened:
    """Note where the lines begin; the lines themselves are read again when they are needed."""
    digest, starts, offset = hashlib.sha256(), array("q"), 0
    with path.open("rb", buffering=BLOCK) as file:
        stamp = stamp_of(file.fileno())
        for line in file:  # a binary file splits at b"\n" alone, so a raw U+2028 or \r stays inside its row
            digest.update(line)
            mark = 0
            if not offset:
                _check_start(path, line[:8])
                mark = len(UTF8_MARK) if line.startswith(UTF8_MARK) else 0
            if line != UTF8_MARK or offset:  # otherwise the whole file is a mark
                starts.append(offset + mark)
            offset += len(line)
        refuse_other(path, stamp, stamp_of(file.fileno()), offset)
    return Opened("jsonl", digest.hexdigest(), LineFile(path, np.frombuffer(starts, np.int64), stamp))


_OUTSIDE_STRINGS = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|[ \t\r\n]+')
# Values are thrown away while the list is cut up: numbers of any length must not stop the scan.
_SCANNER = json.JSONDecoder(parse_int=len, parse_float=len)


def _read_json(path: Path, body: bytes) -> Lines:
    """Cut a top-level list into its elements; each keeps its literals and loses only whitespace outside strings."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_json(path, f"byte {error.start} is not UTF-8") from None
    position = _skip_blank(text, 0)
    if not text.startswith("[", position):
        raise DataError(
            "a .json file must hold one list of objects",
            where=str(path),
            got=repr(text[position : position + 20]) if text.strip() else "an empty file",
            expected='[{"text": "..."}, ...]',
            do="rename it to .jsonl if each line is an object; otherwise save the list of rows alone",
        )
    lines = Spool()
    position = _skip_blank(text, position + 1)
    while len(lines) or not text.startswith("]", position):
        try:
            _, end = _SCANNER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _not_json(path, f"row {len(lines)}: {_first_line(error)}") from None
        minified = _OUTSIDE_STRINGS.sub(lambda match: match[1] or "", text[position:end])
        lines.append(minified.encode("utf-8"))
        position = _skip_blank(text, end)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            raise _not_json(path, f"row {len(lines) - 1}: expected a comma or ] at character {position}")
        position = _skip_blank(text, position + 1)
    if _skip_blank(text, position + 1) != len(text):
        raise _not_json(path, f"there is more after the list, at character {position + 1}")
    return Lines(lines.seal())


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _not_json(path: Path, got: str) -> DataError:
    return DataError("the file is not JSON", where=str(path), got=got, expected="a list of objects", do="correct it")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def _read_csv(path: Path, body: bytes) -> Lines:
    """Read a CSV with a header; all values are strings. Rows the header does not fit are problems, not errors.

    A quote that opens and does not close as it should in a later line is an error: which of the lines are rows is not known.
    """
    text = body.decode("utf-8", "surrogateescape")
    taken: list[str] = []

    def source() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            taken.append(line)
            yield line

    limit = csv.field_size_limit(sys.maxsize)  # process-wide: put back below
    try:
        # strict: an unclosed quote would otherwise swallow the rest of the file into one cell without a word
        reader = csv.reader(source(), strict=True)
        header = _csv_header(path, reader)
        lines = Spool()
        problems: dict[int, str] = {}
        torn: list[str] = []
        while True:
            taken.clear()
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                cells, problem = None, f"the CSV row cannot be read: {error}"
                if len(taken) > 1:
                    torn.append(_span(reader.line_num, len(taken)))
            else:
                problem = _csv_problem(cells, header)
                if problem and len(taken) > 1:
                    problem += f", and spans lines {_span(reader.line_num, len(taken))}"
            raw = "".join(taken).removesuffix("\n").removesuffix("\r").encode("utf-8", "surrogateescape")
            if problem:
                problems[len(lines)] = problem
            lines.append(raw if problem or not cells else to_line(dict(zip(header, cells, strict=True))))
    finally:
        csv.field_size_limit(limit)
    if torn:
        raise _torn(path, torn)
    return Lines(lines.seal(), problems)


def _span(last: int, count: int) -> str:
    return f"{last - count + 1} to {last}"


def _torn(path: Path, spans: list[str]) -> DataError:
    named, more = ", ".join(spans[:3]), len(spans) - 3
    return DataError(
        "a quote of the CSV file does not close as it should, so that its rows cannot be told apart",
        where=str(path),
        got=f"a cell with an open quote from line {named}" + (f" and {more} more" if more > 0 else ""),
        expected='a closing quote, and every quote inside such a cell doubled ("")',
        do="correct the line where it opens, or write the rows as JSON Lines",
    )


def _csv_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next(reader)
    except StopIteration:
        header = []
    except csv.Error as error:
        raise DataError("the CSV header cannot be read", where=str(path), got=str(error), do="correct it") from None
    repeated = sorted({name for name in header if header.count(name) > 1})
    if not header or repeated or any("\udc80" <= c <= "\udcff" for name in header for c in name):
        raise DataError(
            "the CSV file has no usable header",
            where=str(path),
            got=f"repeated names {repeated}" if repeated else repr(header)[:200],
            expected="a first row of different column names in UTF-8",
            do="add or correct the header row",
        )
    return header


def _csv_problem(cells: list[str], header: list[str]) -> str:
    if cells and len(cells) != len(header):
        return f"the row has {len(cells)} cells, the header {len(header)}"
    if any("\0" in cell for cell in cells):
        return "the row holds a NUL byte"
    if any("\udc80" <= c <= "\udcff" for cell in cells if not cell.isascii() for c in cell):
        return "the row is not UTF-8"
    return ""
