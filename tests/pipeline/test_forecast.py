import math

import pytest

from pipeline.forecast import Costs, cores_needed, forecast, forecast_table, slowest

COSTS = Costs(cpu_s=0.001, read_bytes=100_000)


@pytest.mark.parametrize(
    ("cores", "bytes_per_s", "device", "images_per_s", "bound"),
    [
        (8, 1e9, math.inf, 8_000, "decode"),
        (16, 1e9, math.inf, 10_000, "network"),
        (16, 1e9, 2_500, 2_500, "device"),
        (64, 10e9, 1e6, 64_000, "decode"),
    ],
)
def test_the_least_of_the_parts_is_what_comes_out(cores, bytes_per_s, device, images_per_s, bound):
    rate = forecast(COSTS, cores=cores, bytes_per_s=bytes_per_s, device=device)
    assert rate.images_per_s == pytest.approx(images_per_s)
    assert rate.bound == bound


def test_the_cores_of_a_rate_prepare_that_rate():
    cores = cores_needed(COSTS, 2_500)
    assert cores == pytest.approx(2.5)
    assert forecast(COSTS, cores=cores, bytes_per_s=1e12).images_per_s == pytest.approx(2_500)


def test_without_a_device_it_is_never_the_bound():
    assert slowest(network=5, decode=7).bound == "network"


def test_the_table_marks_every_cell_with_its_bound():
    head, eight, many, legend = forecast_table(COSTS, cores=(8, 128), gigabytes_per_s=(1.0, 10.0))
    assert head.split() == ["cores", "1", "GB/s", "10", "GB/s"]
    assert eight.split() == ["8", "8,000", "d", "8,000", "d"]
    assert many.split() == ["128", "10,000", "n", "100,000", "n"]
    assert "device" not in legend
    *_, bounded, legend = forecast_table(COSTS, device=9_000)
    assert bounded.split() == ["128", *(["9,000", "g"] * 4)]
    assert "g device" in legend
