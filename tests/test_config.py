"""Strict configuration."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from ditmoe_ds import config
from ditmoe_ds.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    limit: int | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    sizes: tuple[int, ...] = ()
    flag: bool = False
    inner: Inner = field(default_factory=Inner)


def load(tmp_path, text, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return config.load(Outer, path, list(overrides))


def test_defaults_then_yaml_then_command_line(tmp_path):
    loaded = load(tmp_path, "name: x\ninner: {rate: 1e-4, limit: 3}\nsizes: [1, 2]", "inner.rate=2", "inner.kind=b", "flag=true")
    assert loaded == Outer("x", (1, 2), True, Inner(2.0, "b", 3))
    assert load(tmp_path, "name: x", "inner.limit=null").inner.limit is None


def test_dump_reads_back(tmp_path):
    value = Outer("x", (1,), True, Inner(1e-4, "b", None))
    config.dump(value, tmp_path / "config.yaml")
    assert config.load(Outer, tmp_path / "config.yaml") == value


@pytest.mark.parametrize(
    "text, overrides, words",
    [
        ("name: x\ninner: {rat: 1}", [], ["inner.rat", "inner.rate"]),
        ("name: x\nrate: 1", [], ["rate=1", "did you mean inner.rate?"]),
        ("name: x\ninner: {flag: true}", [], ["inner.flag=True", "did you mean flag?"]),
        ("name: x\nother: 1", [], ["other", "name, sizes, flag, inner"]),
        ("name: 3", [], ["name", "expected str", "int"]),
        ("name: x\nflag: 1", [], ["flag", "expected bool"]),
        ("name: x\ninner: {rate: true}", [], ["inner.rate", "expected float"]),
        ("name: x\ninner: {rate: fast}", [], ["inner.rate", "'fast'"]),
        ("name: x\ninner: {kind: c}", [], ["inner.kind", "'a', 'b'"]),
        ("name: x\ninner: {limit: 1.5}", [], ["inner.limit", "expected int"]),
        ("name: x\ninner: 3", [], ["inner", "section"]),
        ("name: x\nsizes: 3", [], ["sizes", "list"]),
        ("name: x\nsizes: [1, y]", [], ["sizes[1]", "expected int"]),
        ("flag: true", [], ["name", "required"]),
        ("- 1", [], ["recipe.yaml", "mapping"]),
        ("name: [", [], ["recipe.yaml", "not valid YAML"]),
        ("name: x", ["inner.rate"], ["inner.rate", "key=value"]),
        ("name: x", ["name.deep=1"], ["name.deep", "not a section"]),
    ],
)
def test_mistakes_name_key_value_and_fix(tmp_path, text, overrides, words):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_what_is_no_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"inner\.kind='\[x': not valid YAML"):
        load(tmp_path, "name: x", "inner.kind=[x")
    with pytest.raises(ConfigError, match="not valid YAML.*unhashable key"):
        load(tmp_path, "? [a]\n: b\n")
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(Outer, tmp_path / "recipe.yaml")


def test_a_section_that_is_there_twice_is_refused(tmp_path):
    """YAML would take the second alone."""
    with pytest.raises(ConfigError, match=r"'inner' is there twice.*line 4"):
        load(tmp_path, "name: x\ninner:\n  rate: 1\ninner:\n  kind: b\n")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        config.load(Outer, tmp_path / "none.yaml")


def test_the_types_of_a_class_are_looked_up_once():
    """A large data set's manifest has hundreds of thousands of shards."""
    config.build(Inner, {})
    before = config._hints.cache_info().misses
    config.build(Inner, {})
    assert config._hints.cache_info().misses == before


def test_values_of_the_right_type_cost_no_call(monkeypatch):
    """A unit of encoded data counts the samples of a thousand classes; there may be a hundred thousand units."""
    calls, convert = [], config._convert
    monkeypatch.setattr(config, "_convert", lambda *arguments: calls.append(arguments[2]) or convert(*arguments))
    assert config.build(Outer, dict(name="x", sizes=list(range(1000)))).sizes == tuple(range(1000)) and calls == ["sizes"]
    with pytest.raises(ConfigError, match=r"sizes\[1\]=True: expected int"):
        config.build(Outer, dict(name="x", sizes=[1, True]))


def test_what_has_changed_is_told_by_dotted_keys():
    """Of what both know: a release may have keys that an older one lacked."""
    before = dict(name="x", sizes=[1], inner=dict(rate=0.1, limit=None, gone=1))
    now = dict(name="x", sizes=[1, 2], inner=dict(rate=0.2, limit=3, new=1))
    assert config.changes(before, now) == ["inner.limit: None -> 3", "inner.rate: 0.1 -> 0.2", "sizes: [1] -> [1, 2]"]
    assert not config.changes(before, before)
