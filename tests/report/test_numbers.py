"""Numbers are written so that a reader can compare them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.report import numbers as n
from fedsim.report.facts import ClientValues


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (386_000, "386 kB"),
        (4.31e6, "4.31 MB"),
        (2e15, "2000 TB"),
    ],
)
def test_sizes(count: float, shown: str) -> None:
    assert n.size(count).replace("\u00a0", " ") == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0314, "31 ms"),
        (1.424, "1.42 s"),
        (12.34, "12.3 s"),
        (250, "4 min 10 s"),
        (12_000, "3 h 20 min"),
        (None, "\u2013"),
    ],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert n.duration(seconds).replace("\u00a0", " ") == shown


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("accuracy", 0.9612, "96.1 %"),
        ("loss", 0.05, "0.0500"),
        ("loss", 123.4, "123"),
        ("loss", 1e-7, "1e-07"),
        ("loss", float("inf"), "\u221e"),
        ("loss", float("nan"), "\u2013"),
        ("loss", None, "\u2013"),
    ],
)
def test_metrics(name: str, value: float | None, shown: str) -> None:
    assert n.metric(name, value).replace("\u00a0", " ") == shown


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        (0.0, "0.00 %"),
        (1e-6, "under 0.01 %"),
        (5130 / 11_173_962, "0.05 %"),
        (0.0046, "0.46 %"),
        (0.0123, "1.2 %"),
        (0.456, "46 %"),
        (0.999, "over 99 %"),
        (1.0, "100 %"),
    ],
)
def test_shares(part: float, shown: str) -> None:
    assert n.share(part).replace("\u00a0", " ") == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (85, "85"),
        (5130, "5,130"),
        (10_000, "10.0 k"),
        (81_734, "81.7 k"),
        (999_700, "1.00 M"),
        (11_173_962, "11.2 M"),
        (7.24e9, "7.24 G"),
    ],
)
def test_large_counts(number: int, shown: str) -> None:
    assert n.millions(number).replace("\u00a0", " ") == shown


def test_the_wilson_interval_is_that_of_scipy() -> None:
    from scipy.stats import binomtest

    for seen, examples in [(0, 10), (345, 359), (359, 359), (1, 2)]:
        interval = binomtest(seen, examples).proportion_ci(method="wilson")
        assert n.wilson(seen / examples, examples) == pytest.approx((interval.low, interval.high), abs=1e-6)


@given(st.integers(0, 5000), st.integers(2, 300))
def test_thinning_keeps_both_ends_and_the_order(length: int, most: int) -> None:
    kept = n.thinned(length, most)
    assert len(kept) <= most
    assert kept == sorted(set(kept))
    assert not length or (kept[0], kept[-1]) == (0, length - 1)


def test_a_share_of_the_clients_does_not_exceed_its_quantile() -> None:
    values = ClientValues("client_test", list(range(10)), [c / 10 for c in range(10)], [1] * 10)
    assert [values.quantile(share) for share in (0.1, 0.5, 0.55, 1.0)] == [0.0, 0.4, 0.5, 0.9]
