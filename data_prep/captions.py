"""Captions that lie beside the images of a folder: ``x.txt`` beside ``x.png``, or lines of ``metadata.jsonl`` or ``metadata.csv``.

``x.txt`` is read in the decoding processes, so nothing heavy is imported here.
"""

from __future__ import annotations

import csv
import json
import posixpath
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.files import content, inside
from ditmoe_ds.errors import DataError, in_a_line, visible

METADATA = ("metadata.csv", "metadata.jsonl")
COLUMNS = ("caption", "captions", "text")
"""Names that a caption, or a list of them, may have; the first that is there counts."""
LIMIT = 1 << 20
"""Most bytes of a text, and characters of a line."""
SEVERAL = 100
"""Most captions of an image. The tokens of each take memory, and time whenever the sample is read."""


def read(path: Path, root: Path) -> str:
    """The text in a file, without the space around it.

    Raises:
        ValueError: it lies outside of the folder ``root``, is too long, or no UTF-8.
        DataError: the file cannot be read at all.
    """
    if not inside(path, root):  # a private text of this machine, say, which would be published as a caption
        raise ValueError(f"{path.name} leads out of the source's folder; copy the text there")
    try:
        return content(path, LIMIT).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: {error}") from None


def checked(found: object) -> str | list[str] | None:
    """What was found in place of a caption; a list only if there are several in it.

    Raises:
        ValueError: it is none, or there are too many.
    """
    several: list[Any] = found if isinstance(found, list) else [] if found is None else [found]
    if len(several) > SEVERAL:
        raise ValueError(f"{len(several)} captions; at most {SEVERAL} are taken")
    for one in several:
        if not isinstance(one, str):
            raise ValueError(f"a caption of type {type(one).__name__}; a caption is a text, several are a list of texts")
    return several if len(several) > 1 else several[0] if several else None


def first_of(row: dict[str, Any]) -> Any:
    """What a row has under the first of ``COLUMNS``; None if nothing."""
    return next((row[column] for column in COLUMNS if row.get(column) is not None), None)


def text_of(image: str) -> str:
    """The path of its text beside an image's path."""
    return f"{image.rpartition('.')[0]}.txt"


def beside(source: str, root: Path, images: list[str], files: dict[str, Path]) -> dict[str, Any]:
    """By image: its caption from a line of metadata, or the path of its text file, which is not opened yet; or None.

    Args:
        source: as given to ``--source``, for messages.
        root: its folder.
        images: paths relative to the folder.
        files: the other files there, by relative path.

    Raises:
        DataError: two captions for one image, or none for any; metadata that cannot be read, or outside of the folder.
    """
    found: dict[str, Any] = {image: files.get(text_of(image)) for image in images}
    places: dict[str, str] = {}
    lost: list[str] = []
    for table in sorted(file for file in files if posixpath.basename(file) in METADATA):
        if not inside(files[table], root):
            raise DataError(f"--source={source!r}: {files[table]} leads out of this folder; copy it there")
        for number, name, caption in _lines(files[table]):
            image, place = posixpath.normpath(posixpath.join(posixpath.dirname(table), name)), f"{files[table]}, line {number}"
            if image not in found:
                lost.append(f"{place}: {name!r}")
            elif caption is not None:
                if found[image] is not None:
                    two = f"{image} has a caption in {places.get(image, found[image])} and one in {place}"
                    raise DataError(f"--source={source!r}: {two}; remove one of them")
                found[image], places[image] = caption, place
    if lost:
        first = visible(lost[0])
        print(f"--source={source!r}: {len(lost)} lines of metadata name no image that is there, first {first}; left out", file=sys.stderr)
    without = sum(caption is None for caption in found.values())
    if without == len(images):
        wanted = f"put x.txt beside x.png, or a {METADATA[1]} with file_name and text there"
        raise DataError(f"--source={source!r}: none of {len(images)} images has a caption; {wanted}, or leave --text out")
    if without:
        print(f"--source={source!r}: {without} of {len(images)} images have no caption; theirs is empty", file=sys.stderr)
    return found


def _lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """For each row of a metadata file: its line's number, its ``file_name``, and its caption or None."""
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        while line := file.readline(LIMIT):
            number += 1
            if len(line) == LIMIT and not line.endswith("\n"):
                raise ValueError(f"more than {LIMIT} characters")
            yield line

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: Any = csv.DictReader(lines(), strict=True) if path.suffix == ".csv" else map(json.loads, filter(str.strip, lines()))
            for row in rows:
                if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                    raise ValueError("no file_name")
                if None in row:  # a caption that was cut at its first comma
                    raise ValueError("more fields than its first line names; quote what has commas")
                yield number, row["file_name"], first_of(row)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); repair or remove it") from None
    except (ValueError, csv.Error, RecursionError) as error:
        where = "" if isinstance(error, UnicodeDecodeError) else f", line {number}"  # text is decoded ahead of its lines
        raise DataError(f"{path}{where}: {in_a_line(error)}; repair or remove it") from None
