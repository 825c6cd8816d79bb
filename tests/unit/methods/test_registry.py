"""The registry, and what a method refuses before it looks at a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from gradsift.errors import ConfigError
from gradsift.geometry.trust import Prior
from gradsift.methods import base
from gradsift.methods.base import Needs, make_method, methods, register


@dataclass(frozen=True)
class _Taken:
    name: ClassVar[str] = "random"


def test_a_name_is_registered_once(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    known = methods()["random"]
    assert register(known) is known  # importing twice is no fault
    with pytest.raises(ConfigError, match="registered twice"):
        register(_Taken)


def test_a_third_party_method_is_found_through_its_entry_point(monkeypatch):
    @dataclass(frozen=True)
    class Foreign:
        name: ClassVar[str] = "foreign"
        paper: ClassVar[str] = "ours"
        summary: ClassVar[str] = "a method from elsewhere"
        evidence: ClassVar[str] = "ours"
        level: float = 0.5

        @property
        def needs(self):
            return base.Needs()

        def select(self, problem, budget, stream):
            raise AssertionError("never run here")

    class Point:
        def load(self):
            return Foreign

    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.setattr(base, "entry_points", lambda group: [Point()] if group == "gradsift.methods" else [])
    base._register_third_parties.cache_clear()
    try:
        assert methods()["foreign"] is Foreign
        assert make_method("foreign", {"level": "0.25"}) == Foreign(0.25)
    finally:
        base._register_third_parties.cache_clear()


@pytest.mark.parametrize(
    ("name", "config", "field"),
    [
        ("conflict", {"worst_share": 1.0}, "worst_share"),
        ("conflict", {"worst_share": float("nan")}, "worst_share"),
        ("hybrid", {"cap_factor": 0.5}, "cap_factor"),
        ("hybrid", {"num_clusters": 0}, "num_clusters"),
        ("loss", {"band": "lowest"}, "band"),
    ],
)
def test_a_value_out_of_range_is_refused_by_field(name, config, field):
    with pytest.raises(ConfigError, match=field) as refusal:
        make_method(name, config)
    assert refusal.value.expected


def test_the_cost_class_follows_the_dearest_signal():
    assert Needs().cost_class == "text"
    assert Needs(signals=frozenset({"lexical"})).cost_class == "text"
    assert Needs(signals=frozenset({"loss", "lexical"})).cost_class == "forward"
    assert Needs(signals=frozenset({"loss", "sketch"})).cost_class == "gradient"
    assert Needs(signals=frozenset({"likeness"})).cost_class == "text"
    probes = Needs(signals=frozenset({"loss", "held_out_loss"}), probes=Prior(0.5, 3))
    assert probes.cost_class == "probe"
    with pytest.raises(ValueError, match="probes"):
        Needs(signals=frozenset({"held_out_loss"}))
