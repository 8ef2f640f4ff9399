"""Captioned pictures of coloured shapes, in the six categories of GenEval (arXiv 2310.11513), for a benchmark without a hub.

A fifth of the compositions (which colour on which shape, which pair of shapes, how many of what, on which side, which pair of
colours) never occurs in training, in no caption and in no picture.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels
CATEGORIES = ("single object", "two objects", "counting", "colors", "position", "color attribution")
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
COLORS = {
    "red": (220, 40, 40),
    "green": (30, 150, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 200, 30),
    "purple": (150, 50, 180),
    "cyan": (40, 200, 220),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
RADIUS = 8, 11  # pixels, smallest and largest
SHARPNESS = 8  # drawn this many times larger, then averaged


@dataclass(frozen=True)
class Thing:
    """What a caption says of one object."""

    shape: str
    color: str | None = None
    """None: any."""


@dataclass(frozen=True)
class Scene:
    """What a picture is to show: these objects, and no others."""

    category: str
    things: tuple[Thing, ...]
    relation: str | None = None
    """Where the first of two things is."""

    @property
    def caption(self) -> str:
        first = self.things[0]
        if self.category == "counting":
            return f"{NUMBERS[len(self.things)]} {first.shape}{'es' if first.shape == 'cross' else 's'}"
        names = [f"a {thing.color} {thing.shape}" if thing.color else f"a {thing.shape}" for thing in self.things]
        return f" {self.relation or 'and'} ".join(names)

    @property
    def held_out(self) -> set[str]:
        """The kinds of composition in which this scene does not occur in training."""
        names = [f"{thing.color} {thing.shape}" for thing in self.things]
        shapes = sorted({thing.shape for thing in self.things})
        held = set()
        if any(thing.color and _number(thing.shape, thing.color) % 5 == 0 for thing in self.things):
            held.add("colors")
        if tuple(shapes) in HELD_PAIRS:
            held.add("two objects")
        if (len(self.things), *shapes) in HELD_COUNTS:
            held.add("counting")
        if self.category == "color attribution" and _share(*sorted(names)) < 0.2:
            held.add(self.category)
        if self.relation:
            # a left of b is b right of a
            first, second = self.things if self.relation in ("left of", "above") else self.things[::-1]
            if _share(first.shape, self.relation in ("above", "below"), second.shape) < 0.2:
                held.add(self.category)
        return held


HELD_PAIRS = {("circle", "triangle"), ("cross", "diamond")}
HELD_COUNTS = {(2, "triangle"), (3, "square"), (4, "circle")}


def scenes(category: str, unseen: bool) -> list[Scene]:
    """All scenes of a category: those of training, or those in which the composition is new, and nothing else.

    A single object without a colour has no composition: there is one set for both.
    """
    pairs = list(itertools.permutations(SHAPES, 2))
    if category == "single object":
        return [Scene(category, (Thing(shape),)) for shape in SHAPES]
    if category == "two objects":
        found = [Scene(category, (Thing(a), Thing(b))) for a, b in pairs]
    elif category == "counting":
        found = [Scene(category, (Thing(shape),) * number) for number in NUMBERS for shape in SHAPES]
    elif category == "colors":
        found = [Scene(category, (Thing(shape, color),)) for color in COLORS for shape in SHAPES]
    elif category == "position":
        found = [Scene(category, (Thing(a), Thing(b)), relation) for a, b in pairs for relation in RELATIONS]
    else:
        hues = list(itertools.permutations(COLORS, 2))
        found = [Scene(category, (Thing(a, one), Thing(b, other))) for a, b in pairs for one, other in hues]
    return [scene for scene in found if scene.held_out == ({category} if unseen else set())]


def draw(scene: Scene, random: np.random.Generator) -> np.ndarray:
    """A picture (SIZE, SIZE, 3) uint8 on white; colours that the caption leaves open are chosen among those of training."""
    places = _place(scene, random)
    picture = Image.new("RGB", (SIZE * SHARPNESS,) * 2, "white")
    for thing, (x, y, radius) in zip(scene.things, places):
        allowed = [color for color in COLORS if _number(thing.shape, color) % 5]
        color = thing.color or allowed[random.integers(len(allowed))]
        outline = [((x + radius * dx) * SHARPNESS, (y + radius * dy) * SHARPNESS) for dx, dy in outline_of(thing.shape)]
        ImageDraw.Draw(picture).polygon(outline, fill=COLORS[color])
    return np.array(picture.resize((SIZE, SIZE), Image.Resampling.BOX))


def outline_of(shape: str) -> list[tuple[float, float]]:
    """Corners in [-1, 1] x [-1, 1]; the outline touches all four sides."""
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        return [(float(np.cos(a)), float(np.sin(a))) for a in angles]
    third = 1 / 3
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
        "cross": [
            *[(-third, -1), (third, -1), (third, -third), (1, -third), (1, third), (third, third)],
            *[(third, 1), (-third, 1), (-third, third), (-1, third), (-1, -third), (-third, -third)],
        ],
    }
    return corners[shape]


IMAGES = 12_000
"""Of the training set."""


def sample(number: int) -> tuple[Scene, np.ndarray]:
    """The ``number``-th training picture: categories in turn, scenes and places by chance."""
    random = np.random.default_rng([0, number])
    choices = scenes(CATEGORIES[number % len(CATEGORIES)], unseen=False)
    scene = choices[random.integers(len(choices))]
    return scene, draw(scene, random)


def _place(scene: Scene, random: np.random.Generator) -> list[tuple[float, float, float]]:
    """(x, y, radius) of each thing: inside, apart from each other, and on the right side."""
    while True:
        radii = random.uniform(*RADIUS, len(scene.things))
        places = [(*random.uniform(radius + 2, SIZE - radius - 2, 2), radius) for radius in radii]
        apart = all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) > a[2] + b[2] + 3 for a, b in itertools.combinations(places, 2))
        if apart and (scene.relation is None or side(places[0], places[1], clearly=2.0) == scene.relation):
            return places


def side(a: Any, b: Any, clearly: float = 1.5) -> str | None:
    """On which side of ``b`` the object ``a`` is, both (x, y, ...): clearly farther along one axis than along the other."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) > clearly * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > clearly * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _number(shape: str, color: str) -> int:
    return SHAPES.index(shape) + list(COLORS).index(color)


def _share(*composition: object) -> float:
    return hashlib.blake2b(repr(composition).encode(), digest_size=8).digest()[0] / 256
