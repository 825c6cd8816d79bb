"""The recipe: mistakes in it are told in words, whole numbers are read where text holds a number, URLs hold no secrets."""

from __future__ import annotations

import pytest

from gradsift.errors import ConfigError
from gradsift.recipe import build_recipe, load_recipe, parse_override

LEAST = {"pool": [{"label": "a", "path": "a.jsonl"}], "method": {"name": "random"}, "budget": "5"}


@pytest.mark.parametrize("text", ["x: 2024-13-45\n", "x: {[a]: 1}\n", "[" * 5000, "x: \xff", "x: [\n"])
def test_what_is_not_yaml_is_told_with_the_file(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, "latin-1")
    with pytest.raises(ConfigError, match="not YAML") as raised:
        load_recipe(file)
    assert raised.value.where == str(file)
    assert raised.value.do


@pytest.mark.parametrize("value", ["2024-13-45", "{[a]: 1}", "[" * 5000])
def test_a_value_that_is_not_yaml_is_told_with_its_key(value):
    with pytest.raises(ConfigError, match="not YAML") as raised:
        parse_override(f"x={value}")
    assert raised.value.where == "--set x"


def test_a_recipe_that_cannot_be_opened_is_told(tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    file.write_text("budget: 5\n")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(file), "read_text", refuse)
    with pytest.raises(ConfigError, match="cannot be read") as raised:
        load_recipe(file)
    assert "Permission denied" in raised.value.got


def test_a_whole_number_is_a_budget_a_count_of_layers_and_a_screen():
    built = build_recipe({**LEAST, "budget": 500, "collect": {"layers": 8}, "screen": {"by": 4}})
    assert (built.budget, built.collect.layers, built.screen.by) == ("500", "8", "4")
    with pytest.raises(ConfigError, match="not valid"):
        build_recipe({**LEAST, "budget": True})
