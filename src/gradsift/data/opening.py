"""Opening a source of rows: a local file, a folder, a URL or a hub id."""

from __future__ import annotations

from pathlib import Path

from gradsift.data import hub, tables
from gradsift.data.lines import Opened
from gradsift.data.readers import ARCHIVES, SUFFIXES, compressed, read_text_file
from gradsift.data.remote import URL, local_copy
from gradsift.errors import DataError
from gradsift.recipe import refuse_secrets

# A missing file with one of these endings is a missing file: the hub is not asked about it.
OTHER_FILES = (".txt", ".tsv", ".md", ".xls", ".xlsx", ".xml", ".yaml", ".yml", ".pkl", ".npy", ".npz", ".pt", ".bin")


def open_source(source: str) -> Opened:
    """Open a local file, a ``save_to_disk`` folder, a URL or a hub id.

    Args:
        source: path, URL or hub id as given.

    Returns:
        The file's rows.

    Raises:
        DataError: there is no such file, its kind is not known, or it cannot be read.
    """
    refuse_secrets(source)
    if URL.fullmatch(source):
        return _open_url(source)
    path = Path(source)
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.exists():
            return _open_file(path, suffix)
    except OSError as error:
        raise DataError("the file cannot be read", where=repr(source), got=str(error), do="check the path") from None
    if suffix not in (*SUFFIXES, *ARCHIVES, *OTHER_FILES):
        opened = hub.read_hub(source)
        if opened is not None:
            return opened
    raise DataError(
        "the file does not exist",
        where=source,
        expected=f"a file ({', '.join(SUFFIXES)}) or a hub id (org/name, org/name:split)",
        do="check the path",
    )


def _open_url(url: str) -> Opened:
    path = local_copy(url)
    try:
        return open_source(str(path))
    except DataError as error:  # a person knows the URL, not the copy
        raise DataError(error.what, where=url, got=error.got, expected=error.expected, do=error.do) from None


def _open_folder(path: Path) -> Opened:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return tables.read_table_file(path, "arrow")
    raise DataError(
        "a folder is only read when datasets wrote it with save_to_disk",
        where=str(path),
        expected="a folder with state.json and data-*.arrow, or one file",
        do="pass the files themselves, one --pool each",
    )


def _open_file(path: Path, suffix: str) -> Opened:
    if not path.is_file():
        raise DataError("this is not a regular file", where=str(path), do="write the rows to a file first")
    if suffix in ARCHIVES:
        raise compressed(path)
    kind = SUFFIXES.get(suffix)
    if kind is None:
        raise DataError(
            "the kind of file is not known",
            where=str(path),
            got=suffix or "no extension",
            expected=", ".join(SUFFIXES),
            do="convert the file or rename it to its true kind",
        )
    if kind in ("parquet", "arrow"):
        return tables.read_table_file(path, kind)
    return read_text_file(path, kind)
