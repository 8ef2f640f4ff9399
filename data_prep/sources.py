"""Where images come from. A source is cut into units, which are encoded independently of each other."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from data_prep import captions, shapes
from data_prep.files import MEMBER_LIMIT, inside
from ditmoe_ds.errors import ConfigError, DataError, in_a_line, loading, some
from ditmoe_ds.latents import remote

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
# Extensions of images in a tar; of several in a sample the first counts.
MEMBERS = ("jpg", "jpeg", "png", "webp", "image", "img")
TEXTS = ("json", "cls", "txt")
LABELS = 1_000_000
"""Most classes. A manifest lists them all, so labels that are really ids of another kind would fill the memory."""
_URL = re.compile("[a-z][a-z0-9]*:")
Wanted = Literal["classes", "captions", "images"]
FLIP = "-flip"
"""Ends the key of a mirrored copy."""


@dataclass(frozen=True)
class Item:
    """One image and what is known about it."""

    key: str
    """Stable, and unique in the source: it names the sample in its shard and decides its split."""
    label: int | None
    caption: str | list[str] | None
    """A list: several, of which training takes another at each visit."""
    origin: str
    """Where it came from, for messages; for tars, its key there."""
    image: Path | bytes | np.ndarray | str
    """As ``images.decode`` takes it; for a sample that cannot be used, the reason."""
    caption_file: tuple[Path, Path] | None = None
    """Holds the caption, if ``caption`` does not, and the folder in which it must lie; read together with the image."""


@dataclass(frozen=True)
class Source:
    """Images, maybe with classes, maybe with captions."""

    name: str
    class_names: tuple[str, ...] | None
    """None: the labels found while reading."""
    images: int | None
    """Number of images; None if it is not known before all are read."""
    units: int
    unit: Callable[[int], Iterable[Item]]
    """The items of a unit, always the same in the same order."""
    sha256: str
    """sha256 of what the source lists, without reading its images."""

    def items(self) -> Iterator[Item]:
        """All items, unit by unit."""
        return (item for unit in range(self.units) for item in self.unit(unit))


def open_source(name: str, unit_size: int = 1000, classes: int | None = None, wanted: Wanted = "classes") -> Source:
    """The source ``folder:PATH``, ``wds:URLS``, ``hf:PATH``, ``sample:digits``, ``sample:emoji`` or ``sample:shapes``.

    Args:
        unit_size: images in a unit; for tars, each tar is a unit.
        classes: number of classes, for labels without names.
        wanted: what is needed of a folder beside its images. For ``classes``, images in no sub-folder are left out; ``captions`` are looked
            for beside the images; for ``images`` alone, neither.

    Raises:
        ConfigError: ``classes`` does not fit this source; a URL of a kind that nothing opens.
        DataError: an unknown source, one that cannot be read or has no images, a missing package.
    """
    from data_prep.samples import digits, emoji

    kind, _, value = name.partition(":")
    names = tuple(map(str, range(classes))) if classes else None
    if kind == "wds" and value:
        return _tars(name, value, names)
    if kind == "hf" and value:
        return _hub_dataset(name, value, names, unit_size)
    if classes:
        raise ConfigError("--classes", classes, f"{name} has names for its classes; leave it out")
    if name == "sample:shapes":
        return _shapes(name, unit_size)
    if name == "sample:digits":
        return listed(name, *digits(), unit_size)
    if name == "sample:emoji":
        return listed(name, *emoji(), unit_size)
    if kind == "folder" and value:
        return listed(name, *_folder(name, Path(value), wanted), unit_size)
    raise DataError(f"--source={name!r}: choose folder:PATH, wds:URLS, hf:PATH, sample:digits, sample:emoji or sample:shapes")


def is_heldout(key: str, fraction: float) -> bool:
    """Whether a sample belongs to the held-out split: a hash of its key alone, so that adding images moves no others."""
    return below(key.removesuffix(FLIP), fraction)


def below(key: str, fraction: float) -> bool:
    """True for a share ``fraction`` of all keys; those of a smaller fraction are among them."""
    return hash_of(key) < fraction * 2**64


def hash_of(key: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def safe_key(name: str) -> str:
    """``name`` if it can be a sample's key, also with ``FLIP`` appended; else a hash of it."""
    return name if re.fullmatch(r"[\w-]{1,75}", name, re.ASCII) else _digest(name)


def _digest(name: str) -> str:
    """A hash of ``name``, which as a file's may not be UTF-8."""
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=12).hexdigest()


def listed(name: str, class_names: tuple[str, ...], items: list[Item], unit_size: int) -> Source:
    """A source of ``items``; each unit is ``unit_size`` of them."""
    listing = [(item.key, item.label, item.caption_file[0].name if item.caption_file else item.caption) for item in items]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    units = -(-len(items) // unit_size)
    return Source(name, class_names, len(items), units, lambda unit: items[unit * unit_size : (unit + 1) * unit_size], digest)


def _shapes(name: str, unit_size: int) -> Source:
    def unit(number: int) -> Iterator[Item]:
        for i in range(number * unit_size, min((number + 1) * unit_size, shapes.IMAGES)):
            scene, picture = shapes.sample(i)
            yield Item(f"shapes-{i:05d}", shapes.CATEGORIES.index(scene.category), scene.caption, scene.category, picture)

    digest = hashlib.sha256(Path(shapes.__file__).read_bytes()).hexdigest()
    return Source(name, shapes.CATEGORIES, shapes.IMAGES, -(-shapes.IMAGES // unit_size), unit, digest)


def _folder(name: str, root: Path, wanted: Wanted) -> tuple[tuple[str, ...], list[Item]]:
    if not root.is_dir():
        raise DataError(f"--source={name!r}: no such folder")
    with os.scandir(root) as entries:  # tells folders from files without a look at each of a million
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    known = set(folders)
    classes: list[str] = []
    empty: list[str] = []
    items: list[Item] = []
    others: dict[str, Path] = {}
    for folder in (None, *folders):
        before = len(items)
        for path in root.joinpath(folder).rglob("*") if folder else (path for path in root.iterdir() if path.name not in known):
            origin = path.relative_to(root).as_posix()
            if "/." in f"/{origin}":  # hidden: of a file manager, of a notebook, or an unfinished class
                continue
            if path.suffix.lower() not in SUFFIXES or (folder is None and wanted == "classes"):
                others[origin] = path
            else:
                # File names may hold dots or be longer than a tar header; a hash of the path is a key in any case.
                items.append(Item(_digest(origin), len(classes) if folder else None, None, origin, path))
        if folder:
            (classes if len(items) > before else empty).append(folder)
    texts = {captions.text_of(item.origin) for item in items}  # by name, not by a look at each file
    strange = [path for origin, path in others.items() if origin not in texts and path.name not in captions.METADATA]
    if count := sum(path.is_file() or path.is_symlink() for path in strange):
        place = " in a class's folder" if wanted == "classes" else ""
        print(
            f"--source={name!r}: {count} files are no images ({', '.join(SUFFIXES)}){place}, or linked folders; left out", file=sys.stderr
        )
    if items and empty:
        print(f"--source={name!r}: {len(empty)} folders without images are no classes: {some(empty)}; left out", file=sys.stderr)
    if not items:
        what = "one folder per class there, with files" if wanted == "classes" else "there files"
        raise DataError(f"--source={name!r}: no images; put {what} of {', '.join(SUFFIXES)}")
    if wanted == "captions":
        found = captions.beside(name, root, [item.origin for item in items], others)
        items = [_captioned(item, found[item.origin], root) for item in items]
    # Not class by class: shards of one or two classes would give batches of few classes.
    return tuple(classes), sorted(items, key=lambda item: item.key)


def _captioned(item: Item, caption: Any, root: Path) -> Item:
    if isinstance(caption, Path):
        return replace(item, caption_file=(caption, root))
    try:
        return replace(item, caption=captions.checked(caption))
    except ValueError as error:
        return replace(item, image=str(error)[:200])


def _tars(name: str, value: str, class_names: tuple[str, ...] | None) -> Source:
    from webdataset.shardlists import expand_urls  # webdataset imports torch

    try:
        urls = expand_urls(value)
    except ValueError as error:
        raise DataError(f"--source={name!r}: its braces cannot be expanded ({error})") from None
    for url in urls:
        if _URL.match(url):
            remote.refuse_unknown("--source", name, url)
        elif not Path(url).is_file():
            raise DataError(f"--source={name!r}: no file {url}")
    digest = hashlib.sha256(json.dumps(urls).encode()).hexdigest()
    return Source(name, class_names, None, len(urls), lambda unit: _tar(urls[unit]), digest)


_LONG_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class _Whole(tarfile.TarInfo):
    """A member of an archive that must end with the mark of the end. ``tarfile`` takes a damaged header for the end, without a word, and
    reads one of any length into memory, as it does the map of a sparse file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Whole:
        found = super().frombuf(buf, encoding, errors)
        if found.type in _LONG_HEADERS and found.size > captions.LIMIT:
            raise tarfile.ReadError(f"a header of more than {captions.LIMIT} bytes")
        return found

    def _proc_sparse(self, *_: object) -> None:
        raise tarfile.ReadError("a sparse file; write the tar without --sparse")

    _proc_gnusparse_10 = _proc_sparse

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Whole:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the mark of the end
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from None


def _opened(url: str) -> BinaryIO:
    """A tar, or a copy of the one behind a URL: a download that breaks off can be tried again, a stream cannot."""
    if not _URL.match(url):
        return open(url, "rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    remote.fetch(url, copy)
    copy.seek(0)
    return copy


def _members(url: str) -> Iterator[dict[str, Any]]:
    """The files of a tar, as ``group_by_keys`` takes them."""
    from webdataset.tariterators import base_plus_ext

    with _opened(url) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Whole) as archive:
        for member in archive:
            if member.isreg():
                kind = (base_plus_ext(member.name)[1] or "").lower()
                content = archive.extractfile(member) if kind in (*MEMBERS, *TEXTS) and member.size <= MEMBER_LIMIT else None
                yield dict(fname=member.name, data=content and content.read(), __url__=url)  # None: unused or too large, such as a video
            elif member.islnk() or member.issym():
                raise tarfile.ReadError(f"{member.name} is a link; write the tar with --dereference --hard-dereference")
            archive.members = []  # type: ignore[attr-defined] # else it remembers all
        while behind := archive.fileobj.read(1 << 20):  # type: ignore[union-attr]
            if behind.strip(b"\0"):
                raise tarfile.ReadError("it goes on behind its mark of the end, as joined tars do; name them one by one")


def _tar(url: str) -> Iterator[Item]:
    from webdataset.tariterators import group_by_keys

    samples = group_by_keys(_members(url))
    while True:
        try:
            sample = next(samples)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:  # disks and tars each fail in their own way
            reason = getattr(error, "strerror", None) or (error.args[0] if error.args else error)
            raise DataError(f"{url}: cannot be read to its end ({in_a_line(reason)}); repair it or leave it out") from None
        yield _item(sample)


def _item(sample: dict[str, Any]) -> Item:
    """A sample of a tar, whose texts may hold anything."""
    key = sample["__key__"]
    kind = next((kind for kind in MEMBERS if kind in sample), None)
    try:
        if kind is None:
            raise ValueError(f"no image, only {sorted(k for k in sample if k[0] != '_')}; name it .{', .'.join(MEMBERS)}")
        for part in (kind, *TEXTS):
            if part in sample and sample[part] is None:
                raise ValueError(f"its {part} has more than {MEMBER_LIMIT} bytes")
        meta = json.loads(sample.get("json", b"{}"))
        label = meta.get("label") if "cls" not in sample else int(sample["cls"])
        caption = captions.first_of(meta) if "txt" not in sample else sample["txt"].decode()
        _check(label)
        return Item(safe_key(key), label, captions.checked(caption), key, sample[kind])
    except (ValueError, AttributeError, RecursionError) as error:
        return Item(safe_key(key), None, None, key, str(error)[:200])


def _hub_dataset(name: str, value: str, class_names: tuple[str, ...] | None, unit_size: int) -> Source:
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(f"--source={name!r}: needs package datasets; pip install datasets") from None
    with loading(f"--source={name!r}: no data set saved with save_to_disk"):
        rows = datasets.load_from_disk(value)
        digest = hashlib.sha256(Path(value, "state.json").read_bytes()).hexdigest() if isinstance(rows, datasets.Dataset) else ""
    if isinstance(rows, datasets.DatasetDict):
        raise DataError(f"--source={name!r}: holds the splits {', '.join(rows)}; choose one, such as {name}/{next(iter(rows))}")
    if not len(rows) or not isinstance(rows.features.get("image"), datasets.Image):
        raise DataError(f"--source={name!r}: needs rows with a column image of type Image, has {len(rows)} of {', '.join(rows.features)}")
    label = rows.features.get("label")
    if isinstance(label, datasets.ClassLabel):
        if class_names not in (None, tuple(label.names)):
            raise ConfigError("--classes", len(class_names), f"{name} has names for its classes; leave it out")
        class_names = tuple(label.names)
    rows = rows.cast_column("image", datasets.Image(decode=False))

    def unit(number: int) -> Iterator[Item]:
        for row in range(number * unit_size, min((number + 1) * unit_size, len(rows))):
            found: dict[str, Any] = rows[row]
            stored = found["image"] or {"bytes": b"", "path": None}
            image = Path(stored["path"]) if stored["bytes"] is None else stored["bytes"]
            label, caption, origin = found.get("label"), None, f"row {row}"
            try:
                _check(label)
                caption = captions.checked(captions.first_of(found))
                if isinstance(image, Path) and not inside(image, Path(value)):  # any picture of this machine
                    raise ValueError(f"{image} lies outside of the data set's folder; save the data set again where the image is")
            except ValueError as error:
                image = str(error)[:200]
            yield Item(f"row-{row:09d}", label, caption, origin, image)

    return Source(name, class_names, len(rows), -(-len(rows) // unit_size), unit, digest)


def _check(label: object) -> None:
    if label is not None and (type(label) is not int or not 0 <= label < LABELS):
        raise ValueError(f"label {label!r}; labels are whole numbers from 0 to {LABELS - 1}")
