"""The table of devices and the roofline."""

import pytest

from svd2_jax.errors import ConfigError
from svd2_jax.hardware import HARDWARE, Cost, Hardware, hardware, hardware_of_device, roofline

TOY = Hardware(
    "toy", 1000, memory_bandwidth=10, flops_16bit=200, flops_32bit=50, link_bandwidth=1, source="made up"
)


def test_work_is_summed_and_repeated():
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
    assert 3 * Cost(1, 2) == Cost(1, 2) * 3 == Cost(3, 6)
    assert 2 * (Cost(sent=3) + Cost(1)) == Cost(2, 0, 6)


@pytest.mark.parametrize(
    ("work", "bits", "seconds", "bound"),
    [
        (Cost(400, 10), 16, 2.0, "compute"),
        (Cost(400, 10), 32, 8.0, "compute"),
        (Cost(400, 50), 16, 5.0, "memory"),
        (Cost(400, 50, 4), 16, 5.0, "memory"),
        (Cost(400, 50, 6), 16, 6.0, "link"),
        (Cost(), 16, 0.0, "compute"),
    ],
)
def test_the_slowest_of_arithmetic_and_traffic_binds(work, bits, seconds, bound):
    least = roofline(work, TOY, bits)
    assert (least.seconds, least.bound) == (seconds, bound)


def test_numbers_of_eight_bits_are_refused():
    with pytest.raises(ConfigError, match="16 or 32 bits, got 8"):
        roofline(Cost(1, 1), TOY, 8)


def test_a_name_finds_its_entry_and_an_unknown_one_lists_the_known():
    assert hardware("h100").flops_16bit == 989.4e12
    with pytest.raises(
        ConfigError, match="unknown hardware 'h900'; known are h100, h200, a100, rtx4090, b200"
    ):
        hardware("h900")


@pytest.mark.parametrize("name", HARDWARE)
def test_every_entry_has_a_source_and_numbers_in_the_right_units(name):
    entry = hardware(name)
    assert entry.name == name
    assert "NVIDIA" in entry.source
    assert 16e9 < entry.memory_bytes < 400e9
    assert 0.5e12 < entry.memory_bandwidth < 20e12
    # Tensor cores on 16 bits are faster than other cores on 32, a link is slower than the memory.
    assert entry.flops_16bit > entry.flops_32bit > 10e12
    assert 10e9 < entry.link_bandwidth < entry.memory_bandwidth


def test_a_device_is_found_by_the_name_jax_gives_it_and_its_other_forms_are_not():
    found = hardware_of_device("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert found.name == "h100"
    for other in ("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 4090 Laptop GPU", "cpu"):
        assert hardware_of_device(other) is None
