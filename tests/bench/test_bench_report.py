"""What a report makes of samples, by hand."""

import dataclasses
import json

from svd2_jax.bench import chart
from svd2_jax.bench.report import Against, Measured, Report, Settings, text
from svd2_jax.bench.timing import Sample
from svd2_jax.config import StreamConfig
from svd2_jax.hardware import Cost, Hardware

CEILING = Hardware("cpu", 0, 10e9, 100e9, 100e9, 0.0, "by hand")
SETTINGS = Settings(
    "random:golden", 4, StreamConfig(height=48, width=64).to_dict(), "float32", "auto", "cpu", "cpu", 2,
    "0.10", "", "the reference",
)  # fmt: skip


def part(name: str, *ms: float, against: Against | None = None) -> Measured:
    samples = tuple(Sample(x / 4000, x / 1000) for x in ms)
    return Measured(name, samples, Cost(10**9, 10**7), 4, against=against)


REPORT = Report(
    SETTINGS,
    CEILING,
    (
        part("encode", 20, 40, 30, against=Against((0.04, 0.04, 0.09), 1e-6)),
        part("tick", 50, 50),
        part("decode-wan", 100),
    ),
    {"weights": 1.0, "compile": 2.5},
)


def test_the_share_of_the_ceiling_is_the_least_time_over_the_median():
    # 1 GFLOP at 100 GFLOP/s takes 10 ms, 10 MB at 10 GB/s 1 ms; the median is 30 ms.
    share, bound = REPORT.share(REPORT.parts[0])
    assert (round(share, 6), bound) == (round(1 / 3, 6), "compute")
    assert REPORT.share(dataclasses.replace(REPORT.parts[0], work=None)) is None


def test_ratios_compare_repetition_by_repetition():
    ratio = REPORT.parts[0].ratio
    assert (ratio.median, ratio.least, ratio.most) == (2.0, 1.0, 3.0)
    assert REPORT.parts[1].ratio is None


def test_the_text_tells_times_rates_shares_and_ratios():
    lines = text(REPORT).splitlines()
    encode = next(line for line in lines if line.startswith("encode"))
    assert " ".join(encode.split()) == "encode 30.0 20.0 40.0 7.500 133.33 33.33 G 333.3 M 33 % compute"
    assert "first frame after 3.50 s: weights 1.00, compile 2.50" in lines
    assert any(
        line.split() == ["encode", "30.0", "40.0", "2.00", "1.00", "3.00", "1.0e-06"] for line in lines
    )


def test_the_report_is_plain_values():
    values = json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))
    encode = values["parts"][0]
    assert encode["total_s"] == {"median": 0.03, "least": 0.02, "most": 0.04}
    assert encode["bound"] == "compute"
    assert encode["ratio"]["median"] == 2.0
    assert len(encode["samples"]) == 3
    assert values["ceiling"] == {"flops": 100e9, "memory_bandwidth": 10e9}


def test_a_chart_is_drawn_of_whatever_was_measured(tmp_path):
    for name, report in (
        ("all", REPORT),
        ("one", dataclasses.replace(REPORT, parts=REPORT.parts[:1])),
        ("none", dataclasses.replace(REPORT, parts=(), first_frame={})),
    ):
        chart.draw(tmp_path / f"{name}.png", report)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
