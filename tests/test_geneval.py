"""GenEval: the scorer on detections whose verdicts are known, a folder of pictures whose objects are known."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from geneval import wants, write_prompts
from PIL import Image
from scipy import ndimage

from data_prep.shapes import CATEGORIES, draw, scenes
from ditmoe_ds.errors import DataError
from ditmoe_ds.evaluation.detector import detect
from ditmoe_ds.evaluation.geneval.colors import crop
from ditmoe_ds.evaluation.geneval.folder import differences, read_folder, report, score
from ditmoe_ds.evaluation.geneval.prompts import PROMPTS, read_prompts
from ditmoe_ds.evaluation.geneval.scorer import Detected, Limits, judge, kept, relation, summary


def at(x, y, score=0.95, size=10):
    return Detected((x, y, x + size, y + size), score)


# the scorer

SINGLE = wants("single_object", ("dog", 1))
TWO = wants("two_object", ("dog", 1), ("cat", 1))
COUNT = wants("counting", ("dog", 2), exclude=[("dog", 3)])
COLOR = wants("colors", ("dog", 1, "red"))
LEFT = wants("position", ("cat", 1), ("dog", 1, ["left of", 0]))
BOTH = wants("color_attr", ("dog", 1, "red"), ("cat", 1, "blue"))
RED, BLUE = (1, 1), (2, 2)
"""Places of objects with these colours."""
VERDICTS = [
    (SINGLE, dict(dog=[at(0, 0)]), ""),
    (SINGLE, dict(dog=[at(0, 0)] * 5, cat=[at(0, 0)]), ""),  # more of it, and others, are no mistake
    (SINGLE, dict(cat=[at(0, 0)]), "dog>=1, found 0"),
    (SINGLE, {}, "dog>=1, found 0"),
    (TWO, dict(dog=[at(0, 0)], cat=[at(0, 0)]), ""),
    (TWO, dict(dog=[at(0, 0)] * 2), "cat>=1, found 0"),
    (TWO, {}, "dog>=1, found 0\nexpected cat>=1, found 0"),
    (COUNT, dict(dog=[at(0, 0), at(50, 0)]), ""),
    (COUNT, dict(dog=[at(0, 0)]), "dog>=2, found 1"),
    (COUNT, dict(dog=[at(0, 0), at(50, 0), at(90, 0)]), "dog<3, found 3"),
    (COUNT, dict(dog=[at(0, 0), at(50, 0)], cat=[at(90, 0)] * 9), ""),
    (wants("counting", ("dog", 1), exclude=[("cat", 1), ("bird", 2)]), dict(dog=[at(0, 0)], bird=[at(0, 0)]), ""),
    (wants("counting", ("dog", 1), exclude=[("cat", 1), ("bird", 2)]), dict(dog=[at(0, 0)], cat=[at(0, 0)]), "cat<1, found 1"),
    (COLOR, dict(dog=[at(*RED)]), ""),
    (COLOR, dict(dog=[at(*BLUE)]), "red dog>=1, found blue"),
    (COLOR, dict(dog=[at(*RED), at(*BLUE)]), ""),  # the strongest is asked,
    (COLOR, dict(dog=[at(*BLUE), at(*RED)]), "red dog>=1, found blue"),  # and no other
    (wants("colors", ("dog", 2, "red")), dict(dog=[at(*RED), at(*RED)]), ""),
    (wants("colors", ("dog", 2, "red")), dict(dog=[at(*RED), at(*BLUE)]), "red dog>=2, found red, blue"),
    (LEFT, dict(cat=[at(50, 0)], dog=[at(0, 0)]), ""),
    (LEFT, dict(cat=[at(0, 0)], dog=[at(50, 0)]), "dog left of the other, found right of"),
    (LEFT, dict(cat=[at(0, 50)], dog=[at(0, 0)]), "dog left of the other, found above"),
    (LEFT, dict(cat=[at(50, 50)], dog=[at(0, 0)]), ""),  # left and above
    (LEFT, dict(cat=[at(5, 5)], dog=[at(5, 5)]), "neither side"),
    (LEFT, dict(cat=[at(50, 0), at(0, 0)], dog=[at(25, 0), at(90, 0)]), ""),  # the strongest of each are asked
    (LEFT, dict(dog=[at(0, 0)]), "cat>=1, found 0\nexpected dog left of another object, which is not as expected"),
    (LEFT, dict(cat=[at(50, 0)]), "dog>=1, found 0"),
    (wants("position", ("cat", 2), ("dog", 1, ["left of", 0])), dict(cat=[at(50, 0), at(99, 0)], dog=[at(0, 0)]), ""),
    (wants("position", ("cat", 2), ("dog", 1, ["left of", 0])), dict(cat=[at(50, 0), at(0, 0)], dog=[at(25, 0)]), "found right of"),
    (wants("position", ("cat", 1), ("dog", 1), ("bird", 1, ["above", 1])), dict(cat=[at(0, 0)], dog=[at(0, 50)], bird=[at(0, 0)]), ""),
    (BOTH, dict(dog=[at(*RED)], cat=[at(*BLUE)]), ""),
    (BOTH, dict(dog=[at(*BLUE)], cat=[at(*RED)]), "red dog>=1, found blue\nexpected blue cat>=1, found red"),
    (BOTH, dict(dog=[at(*RED)], cat=[at(*RED)]), "blue cat>=1, found red"),
    (BOTH, dict(dog=[at(*RED)]), "cat>=1, found 0"),
    # a wrong colour is not also asked for its side, and what it stands beside is not found either
    (wants("position", ("cat", 1, "red"), ("dog", 1, ["left of", 0])), dict(cat=[at(*BLUE)], dog=[at(90, 0)]), "which is not as expected"),
]


@pytest.mark.parametrize("prompt,found,reason", VERDICTS)
def test_verdicts(tmp_path, prompt, found, reason):
    [read] = read_prompts(write_prompts(tmp_path / "metadata.jsonl", prompt))

    def colors_of(name, objects):
        assert name in read.names
        return [{RED: "red", BLUE: "blue"}.get(one.box[:2], "white") for one in objects]

    wrong = judge(read, found, colors_of)
    assert bool(wrong) == bool(reason)
    assert "\n".join(wrong).removeprefix("expected ").endswith(reason)


def test_sides_at_the_threshold():
    """Boxes of 10 x 10: 2 pixels of the offset are the margin, and more than half of the rest must be left: (d - 2) / d > 0.5."""
    still, size = (100, 100, 110, 110), 10
    directions = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    for name, (x, y) in directions.items():
        for distance, sides in ((0, set()), (1.9, set()), (2, set()), (4, set()), (4.01, {name}), (5, {name}), (80, {name})):
            left, top = 100 + x * distance, 100 + y * distance
            assert relation((left, top, left + size, top + size), still) == sides, (name, distance)
    diagonal = 2 / (1 - math.sqrt(0.5))  # (d - 2) / (d sqrt 2) > 0.5
    for distance, sides in ((diagonal - 0.01, set()), (diagonal + 0.01, {"right of", "below"})):
        assert relation((100 + distance, 100 + distance, 110 + distance, 110 + distance), still) == sides
    # both sizes count, each along its axis
    assert relation((104.5, 100, 114.5, 110), still) == {"right of"} and relation((94.5, 100, 124.5, 110), (90, 100, 120, 110)) == set()
    assert relation((94.5, 60, 124.5, 150), (90, 100, 120, 110)) == set() and relation((104.5, 60, 114.5, 150), still) == {"right of"}


def test_sides_are_those_of_a_plain_computation():
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(500):
        a, b = ([x, y, x + w, y + h] for x, y, w, h in random.uniform((0, 0, 5, 5), (60, 60, 60, 60), (2, 4)))
        sides = set()
        dx, dy = ((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
        for name, along, axis, sign in (("left of", dx, 0, -1), ("right of", dx, 0, 1), ("above", dy, 1, -1), ("below", dy, 1, 1)):
            rest = along * sign - 0.1 * (a[axis + 2] - a[axis] + b[axis + 2] - b[axis])
            if rest > 0.5 * math.hypot(dx, dy):
                sides.add(name)
        assert relation(a, b) == sides
        seen.add(frozenset(sides))
    assert len(seen) == 9


def test_what_counts():
    found = [at(i, 0, score=s) for i, s in enumerate((0.3, 0.31, 0.9, 0.91, 0.1))]
    assert [one.score for one in kept(found, "position", Limits())] == [0.91, 0.9, 0.31]
    assert [one.score for one in kept(found, "counting", Limits())] == [0.91]
    many = [at(i, 0, score=0.5 + i / 100) for i in range(20)]
    assert [one.box[0] for one in kept(many, "colors", Limits())] == [*range(19, 3, -1)]
    # 10 x 10, shifted by 2, with the last pixel: 9 * 11 of 13 * 11 are shared
    pair = [at(0, 0, 0.8), at(2, 0, 0.9)]
    assert len(kept(pair, "colors", Limits(overlap=9 / 13 + 0.01))) == 2
    assert [one.score for one in kept(pair, "colors", Limits(overlap=9 / 13 - 0.01))] == [0.9]
    assert len(kept(pair, "colors", Limits())) == 2 and len(kept([at(0, 0)] * 3, "colors", Limits())) == 3
    assert len(kept([at(0, 0), at(30, 0)], "colors", Limits(overlap=0.01))) == 2


WRONG = [
    ("not json", "line 2"),
    ("[]", "a prompt is an object with include, prompt, tag"),
    (json.dumps(SINGLE | {"tag": "style"}), "tag 'style' is none of single_object"),
    (json.dumps(SINGLE | {"exlude": []}), "a prompt is an object"),
    (json.dumps(SINGLE | {"prompt": ""}), "is no text"),
    (json.dumps(SINGLE | {"include": []}), "include is not empty"),
    (json.dumps(SINGLE | {"include": {"class": "dog", "count": 1}}), "are lists"),
    (json.dumps(wants("counting", ("dog", 0))), "at least 1"),
    (json.dumps(wants("counting", ("dog", "two"))), "at least 1"),
    (json.dumps(wants("counting", ("", 2))), "a name"),
    (json.dumps(wants("counting", ("dog", 2), exclude=[("dog", 0)])), "at least 1"),
    (json.dumps(wants("colors", ("dog", 1, "teal"))), "color 'teal' is none of red"),
    (json.dumps(wants("position", ("dog", 1, ["left of", 0]))), "number of an earlier clause"),
    (json.dumps(wants("position", ("cat", 1), ("dog", 1, ["beside", 0]))), "relations: left of"),
    (
        json.dumps(wants("position", ("cat", 1), ("dog", 1, ["left of", 0]))).replace('"count": 1', '"count": 1, "size": 3'),
        "include is an obj",
    ),
]


@pytest.mark.parametrize("line,reason", WRONG)
def test_wrong_prompts(tmp_path, line, reason):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(SINGLE) + "\n" + line + "\n")
    with pytest.raises(
        DataError,
        match=f"prompts.jsonl, line 2: .*{re.escape(reason)}" if reason != "line 2" else "line 2: Expecting.*with tag, include and prompt",
    ):
        read_prompts(path)


def test_prompts_are_lines_of_json(tmp_path):
    path, text = tmp_path / "prompts.jsonl", "a photo of\u2028a cat"
    path.write_text(json.dumps(SINGLE | {"prompt": text}, ensure_ascii=False) + "\n")
    assert [prompt.text for prompt in read_prompts(path)] == [text]


def test_prompts_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=re.escape("evaluation_metadata.jsonl of github.com/djghosh13/geneval")):
        read_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(DataError, match="no prompts"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_the_summary():
    hits = {("colors", "a"): [1, 0, 0, 0], ("colors", "b"): [0, 0, 0, 0], ("position", "a"): [1, 1]}
    verdicts = [dict(tag=tag, metadata=line, correct=bool(hit)) for (tag, line), row in hits.items() for hit in row]
    found = summary(verdicts)
    assert found["overall"] == (1 / 8 + 1) / 2 and found["images_right"] == 3 / 10 and found["prompts_right"] == 2 / 3
    assert list(found["tasks"]) == ["colors", "position"]
    assert found["tasks"]["colors"] | {"ci95": None} == dict(right=1, images=8, prompts=2, score=1 / 8, ci95=None)
    assert found["tasks"]["colors"]["ci95"] == pytest.approx([0.0224, 0.4709], abs=1e-4)
    assert sum(PROMPTS.values()) == 553


# pictures whose objects are known


class Exact:
    """Finds the shapes in renderings."""

    difference = "an exact detector"

    def __call__(self, image, names, threshold):
        picture = np.array(image)
        labels, _ = ndimage.label(picture.min(-1) < 150)
        things = detect(picture)
        assert len(things) == labels.max()
        found = {name: [] for name in names}
        for number, (thing, (rows, columns)) in enumerate(zip(things, ndimage.find_objects(labels)), 1):
            box = (columns.start, rows.start, columns.stop, rows.stop)
            found.get(thing.shape, []).append(Detected(box, 0.99, labels == number))
        return found


def exact_colors(image, name, objects):
    """As the detector sees them, cut out."""
    things = [detect(np.array(crop(image, one))) for one in objects]
    assert all([thing.shape for thing in found] == [name] for found in things)
    return [found[0].color for found in things]


def as_prompt(scene):
    tag = dict(zip(CATEGORIES, PROMPTS))[scene.category]
    if tag == "counting":
        name, count = scene.things[0].shape, len(scene.things)
        return wants(tag, (name, count), exclude=[(name, count + 1)], prompt=scene.caption)
    clauses = [(thing.shape, 1, *([thing.color] if thing.color else [])) for thing in scene.things]
    if tag == "position":
        clauses = [clauses[1], (*clauses[0], [scene.relation, 0])]
    return wants(tag, *clauses, prompt=scene.caption)


def write_renderings(folder, prompts_of):
    """Twelve prompts of each task, two pictures each; the prompt beside pictures i is ``prompts_of(i)``."""
    chosen = []
    for category in CATEGORIES:
        known = [scene for scene in scenes(category, False) if all(thing.color != "cyan" for thing in scene.things)]
        chosen += [known[i * len(known) // 12] for i in range(12)]
    for number, scene in enumerate(chosen):
        place = folder / f"{number:05d}"
        write_prompts(place / "metadata.jsonl", as_prompt(chosen[prompts_of(number)]))
        (place / "samples").mkdir()
        for i in range(2):
            Image.fromarray(draw(scene, np.random.default_rng([number, i]))).save(place / "samples" / f"{i:04d}.png")
    return folder


def test_renderings_are_right(tmp_path):
    folder = write_renderings(tmp_path / "right", lambda i: i)
    (folder / "grid.png").write_bytes(b"")  # the published layout has more files, which do not matter
    pictures = read_folder(folder)
    verdicts, colors = score(folder, pictures, Exact(), exact_colors, Limits()), SimpleNamespace(difference="exact colours")
    assert [verdict["reason"] for verdict in verdicts if not verdict["correct"]] == []
    (folder / "samples.json").write_text("[" * 100_000)  # whoever made the pictures may have written anything
    found = report(folder, verdicts, dict(differences=differences(pictures, Exact(), colors, Limits(threshold=0.1))))
    assert found["overall"] == 1 and all(row["images"] == 24 and row["score"] == 1 for row in found["tasks"].values())
    assert found["tasks"].keys() == PROMPTS.keys() and found["made"] is None
    assert found["differences"] == [
        "72 prompts that are not the published 553",
        "not 4 pictures of each prompt",
        "an exact detector",
        "exact colours",
        "threshold 0.1",
    ]
    assert json.loads((folder / "geneval.json").read_text()) == found
    lines = [json.loads(line) for line in (folder / "geneval.jsonl").read_text().splitlines()]
    assert lines == verdicts and lines[0]["filename"] == "00000/samples/0000.png" and len(lines) == 144
    assert lines[0].keys() == {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    [[box]] = json.loads(lines[0]["details"]).values()
    assert len(box) == 5 and box[4] == 0.99


def test_the_prompts_of_others_are_wrong(tmp_path):
    """Each picture beside the next prompt of its task: a single object or two may be there by chance, the rest hardly."""
    folder = write_renderings(tmp_path, lambda i: i // 12 * 12 + (i + 5) % 12)
    verdicts = score(folder, read_folder(folder), Exact(), exact_colors, Limits())
    tasks = summary(verdicts)["tasks"]
    assert all(row["score"] < 0.3 for row in tasks.values()), tasks
    assert all(verdict["reason"] for verdict in verdicts if not verdict["correct"])


def test_folders_that_are_not_in_the_layout(tmp_path):
    with pytest.raises(DataError, match="no folders 00000"):
        read_folder(tmp_path / "none")
    place = tmp_path / "00000"
    write_prompts(place / "metadata.jsonl", SINGLE)
    with pytest.raises(DataError, match="1 prompts in metadata.jsonl, 0 pictures"):
        read_folder(tmp_path)
    (place / "samples").mkdir()
    (place / "samples" / "0000.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0000\.png: cannot be read"):
        read_folder(tmp_path)


def test_a_damaged_picture_is_found_before_any_is_scored(tmp_path):
    """Though its header is whole."""
    file = write_prompts(tmp_path / "00000" / "metadata.jsonl", SINGLE).parent / "samples" / "0000.png"
    file.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file)
    assert len(read_folder(tmp_path)) == 1
    content = file.read_bytes()
    for damaged in (content[:-100], content[:200] + bytes(9) + content[209:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"0000\.png: cannot be read"):
            read_folder(tmp_path)
