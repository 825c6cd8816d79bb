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


SECRETS = [
    "http://user:CANARY@127.0.0.1:80/pool.jsonl",
    "https://CANARY@host/pool.jsonl",
    "https://user:CAN/ARY@host/pool.jsonl",
    "s3://key:CANARY@bucket/pool.jsonl",
    "simplecache::https://user:CANARY@host/pool.jsonl",
    "https://host/pool.jsonl?X-Amz-Signature=CANARY&X-Amz-Expires=60",
    "https://host/pool.jsonl?CANARY",
]
PLAIN = [
    "https://host:8080/a@b/pool.jsonl",
    "https://host/pool.jsonl?download=true",
    "s3://bucket/a:b@c.jsonl",
    "abfs://container@account.dfs.core.windows.net/pool.jsonl",
    "sftp://user@host/pool.jsonl",
    "github://org:repo@main/pool.jsonl",
    "org/name@main:train",
    "what?/a:b@c.jsonl",
]


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize("role", ["pool", "general", "anchors", "target"])
def test_a_url_that_holds_a_secret_is_refused_and_not_repeated(url, role):
    given = url if role == "target" else [{"label": "b", "path": url}]
    with pytest.raises(ConfigError, match="secret") as raised:
        build_recipe({**LEAST, role: given})
    assert "fsspec" in raised.value.do
    assert "CAN" not in str(raised.value)


@pytest.mark.parametrize("url", PLAIN)
def test_other_paths_and_urls_are_taken_as_they_are(url):
    assert build_recipe({**LEAST, "target": url}).target == url


def test_no_other_mistake_repeats_a_secret(tmp_path):
    url = SECRETS[0]
    file = tmp_path / "recipe.yaml"
    file.write_text(f"target: {url}\nbudget: [\n")
    for call in (
        lambda: build_recipe({**LEAST, "pool": [url]}),
        lambda: parse_override(f"target={url}: ["),
        lambda: parse_override(url),
        lambda: load_recipe(file),
    ):
        with pytest.raises(ConfigError) as raised:
            call()
        assert "CANARY" not in str(raised.value)
