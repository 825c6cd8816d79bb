"""The table of figures: signs of gain and forgetting, pairing, reading back."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError, DataError, NumericsError
from gradsift.evaluate.table import EvalRow, EvalTable, direction, read_table, write_table

VALUE = st.floats(-100, 100, allow_nan=False)


def row(value, phase="before", *, task="exam", role="domain", metric="loss", n=5, seed=1, source="exam"):
    return EvalRow(task, role, metric, phase, value, n, seed, source)


def pair(before, after, **given):
    return EvalTable((row(before, **given), row(after, "after", **given)))


@pytest.mark.parametrize(
    ("metric", "before", "after", "gain", "forgetting"),
    [
        ("loss", 2.0, 1.5, 0.5, -0.5),
        ("loss", 1.5, 2.0, -0.5, 0.5),
        ("accuracy", 0.5, 0.75, 0.25, -0.25),
        ("accuracy", 0.75, 0.5, -0.25, 0.25),
        ("acc,none", 0.5, 0.75, 0.25, -0.25),
        ("word_perplexity,none", 8.0, 6.0, 2.0, -2.0),
    ],
)
def test_positive_gain_is_good_and_positive_forgetting_is_bad(metric, before, after, gain, forgetting):
    domain, general = (pair(before, after, role=role, metric=metric) for role in ("domain", "general"))
    assert [c.value for c in domain.gain()] == [gain]
    assert [c.value for c in general.forgetting()] == [forgetting]
    assert not domain.forgetting()
    assert not general.gain()


@settings(deadline=None)
@given(VALUE, VALUE, st.sampled_from(["loss", "row_loss", "exact", "accuracy", "accuracy_norm"]))
def test_gain_of_a_change_is_minus_its_forgetting_and_swapping_phases_flips_it(before, after, metric):
    gain = pair(before, after, metric=metric).gain()[0].value
    assert gain == -pair(before, after, metric=metric, role="general").forgetting()[0].value
    assert gain == -pair(after, before, metric=metric).gain()[0].value
    assert (gain > 0) == ((after > before) if direction(metric) == "higher" else (after < before))


def test_nothing_moved_is_zero_without_a_sign():
    assert math.copysign(1, pair(1.0, 1.0).gain()[0].value) == 1
    assert math.copysign(1, pair(1.0, 1.0, role="general").forgetting()[0].value) == 1


def test_sources_seeds_and_metrics_stay_apart():
    table = EvalTable(())
    for seed in (1, 2):
        for source, after in (("anatomy", 1.0), ("surgery", 3.0)):
            table += pair(2.0, after, source=source, seed=seed)
    # An average would say that nothing happened.
    assert [(c.source, c.seed, c.value) for c in table.gain()] == [
        ("anatomy", 1, 1.0),
        ("surgery", 1, -1.0),
        ("anatomy", 2, 1.0),
        ("surgery", 2, -1.0),
    ]


def test_a_divergence_is_neither_gain_nor_forgetting():
    table = EvalTable((row(0.1, "after", metric="kl_base"),))
    assert table.gain() == ()
    assert table.forgetting() == ()


@pytest.mark.parametrize(
    "rows",
    [
        (row(1.0),),
        (row(1.0, "after"),),
        (row(1.0), row(1.0, "after", seed=2)),
        (row(1.0), row(1.0, "after", n=4)),
    ],
)
def test_a_figure_without_its_partner_is_refused(rows):
    with pytest.raises(DataError, match="no partner"):
        EvalTable(rows).gain()


def test_bad_figures_are_refused_by_name():
    with pytest.raises(NumericsError, match="exam/exam/loss after"):
        row(math.nan, "after")
    with pytest.raises(ConfigError, match="nosuch"):
        row(1.0, metric="nosuch")
    with pytest.raises(ConfigError, match="role"):
        row(1.0, role="other")
    with pytest.raises(ConfigError, match="n >= 1"):
        row(1.0, n=0)
    with pytest.raises(DataError, match="twice"):
        EvalTable((row(1.0), row(2.0)))


@settings(deadline=None, max_examples=30)  # the first call imports pyarrow's Parquet reader
@given(
    st.lists(
        st.tuples(VALUE, VALUE, st.integers(0, 2**62), st.text(st.characters(codec="utf-8"), max_size=5)),
        max_size=5,
        unique_by=lambda x: x[2:],
    )
)
def test_parquet_reads_back_the_same_figures(tmp_path_factory, figures):
    table = sum((pair(b, a, seed=s, source=name) for b, a, s, name in figures), EvalTable(()))
    path = tmp_path_factory.mktemp("table") / "eval.parquet"
    write_table(table, path)
    again = read_table(path)
    assert again == table
    assert again.gain() == table.gain()
    assert len(table.to_json()) == len(table.rows)


def test_gain_is_not_stored(tmp_path):
    assert set(pair(1.0, 2.0).to_arrow().column_names) == {
        "task", "role", "metric", "phase", "value", "n", "seed", "source"
    }  # fmt: skip
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    for path in (tmp_path / "x.parquet", tmp_path / "none.parquet"):
        with pytest.raises(DataError, match="cannot be read"):
            read_table(path)
    with pytest.raises(DataError, match="no table of figures"):
        EvalTable.from_arrow(pa.table({"gain": [1.0]}))
