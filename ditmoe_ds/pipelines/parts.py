"""Files of image sets that several processes make and that can be continued: each gets its name only once it is complete."""

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ditmoe_ds.errors import ConfigError

DESCRIPTION = "samples.json"
"""The file in a folder of images that says how they were made."""


def describe(note: Path, settings: dict[str, Any], key: str, *places: Path, grows: str = "") -> None:
    """Write into the file ``note`` how the images at ``places`` are made; if it exists, compare with it.

    Args:
        settings: compared without ``checkpoint``, the path of the weights, since their sha256 is among them.
        key: the option by which the user named the first of ``places``.
        grows: name of a number among the settings that may be larger than noted; the note is then updated.

    Raises:
        ConfigError: something else is there, or images of other settings.
    """
    settings = json.loads(json.dumps(settings))
    if note.is_file():
        found = read_description(note)
        if found is None:
            raise ConfigError(key, str(places[0]), f"{note} does not say what is there; choose another")
        more = grows in settings and isinstance(found.get(grows), int) and found[grows] < settings[grows]
        before = _flat(found)
        for name, value in _flat(settings).items():
            if before.get(name) != value and not (more and name == grows):
                fix = f"begun with {name} {before.get(name)!r}, not {value!r}; repeat its settings or choose another"
                raise ConfigError(key, str(places[0]), fix)
        if more:
            write(note, json.dumps(found | {grows: settings[grows]}, indent=1) + "\n")
    elif there := [place for place in places if place.is_file() or (place.is_dir() and any(place.iterdir()))]:
        raise ConfigError(key, str(places[0]), f"{there[0]} is there, but no {note.name} that says what it is; choose another")
    else:
        note.parent.mkdir(parents=True, exist_ok=True)
        write(note, json.dumps(settings, indent=1) + "\n")


def read_description(note: Path) -> dict[str, Any] | None:
    """The settings in ``note``; None if there is none, or it is no JSON object."""
    try:
        found = json.loads(note.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted keys, without ``checkpoint``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key != "checkpoint":
            flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def save_png(path: Path, image: Tensor) -> None:
    """One uint8 image (H, W, 3)."""
    unfinished = path.with_name(path.name + ".partial")
    Image.fromarray(image.numpy()).save(unfinished, format="png")
    os.replace(unfinished, path)
