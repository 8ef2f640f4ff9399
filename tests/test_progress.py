"""Progress of long loops."""

import sys
import time

from ditmoe_ds import progress


def test_in_a_log_it_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 0.05)
    with progress.Progress("encode", "images", 1000) as bar:
        for _ in range(3):
            time.sleep(0.06)
            bar.update(100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "\r" not in "".join(lines)
    assert all(words in lines[1] for words in ("encode", "200/1000", "images/s", "<00:0"))


def test_things_count_when_they_are_done(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", -1)
    with progress.Progress("score", "prompts", 2) as bar:
        assert [(thing, bar.done) for thing in bar.over("ab")] == [("a", 0), ("b", 1)]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:3] for line in lines] == [["score:", "50%", "1/2"], ["score:", "100%", "2/2"], ["score:", "100%", "2/2"]]


def test_one_rank_of_many_shows_it(capsys, monkeypatch):
    """On a terminal, too."""
    monkeypatch.setattr(progress, "PAUSE", -1)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        for shown in (False, True):
            with progress.Progress("sample", "images", 3, shown) as bar:
                bar.update(3)
            assert ("sample: 100%" in capsys.readouterr().err) == shown
