import math

import pytest

from llama_jax.analysis import hardware
from llama_jax.plan import roofline
from llama_jax.plan.hlo import Collective, Compiled

V4_32 = hardware.SLICES["v4_32"]  # 2 x 2 x 4 chips


GATHER = Collective("all-gather", 45_000_000_000, 2, 16, False, 0.0, True, "")


def gather(**changed):
    return GATHER._replace(**changed)


def compiled(collectives):
    return Compiled(1, 1, 1, {"matmul": 1.05e9, "copy": 1.05e9}, 1e12, 275e12, collectives, 1)


@pytest.mark.parametrize(
    ("topology", "parts", "links"),
    [
        ("v4:2x2x4", 16, 3),  # no dimension wraps
        ("v4:2x2x4", 4, 1),
        ("v4:4x4x4", 64, 6),  # a cube wraps around
        ("v4:4x8x8", 4, 2),
        ("v4:4x8x8", 64, 4),
        ("v5e:16x16", 256, 4),
        ("v5e:8x8", 8, 1),
    ],
)
def test_a_group_has_the_links_of_the_dimensions_that_it_spans(topology, parts, links):
    assert roofline.links(topology, parts) == links


def test_a_collective_takes_its_share_of_the_bytes_over_the_links():
    assert roofline.collective(gather(), V4_32) == pytest.approx(15 / 16 / 3)
    assert roofline.collective(gather(kind="all-reduce"), V4_32) == pytest.approx(2 * 15 / 16 / 3)
    assert roofline.collective(gather(kind="collective-permute"), V4_32) == pytest.approx(1)


def test_the_bracket_is_a_factor_around_cycles_kernels_and_what_nothing_covers():
    """2.1e9 cycles at 1.05 GHz; 275 TFLOP of kernels, 275 TFLOP/s the peak; two gathers of 0.3125 s."""
    took = roofline.seconds(compiled([gather()]), V4_32)
    rates = roofline.USUAL
    estimate = 2 * rates.slower + 1 / rates.kernel + 2 * 0.3125
    assert took.low == pytest.approx(estimate / 1.16)
    assert took.high == pytest.approx(estimate * 1.16)


def test_a_generation_has_rates_of_its_own():
    v6e = hardware.SLICES["v6e_16"]
    took = roofline.seconds(compiled([]), v6e)
    rates = roofline.RATES["TPU v6 lite"]
    estimate = 2.1 / 1.75 * rates.slower + 275 / 918 / rates.kernel
    assert (took.low * took.high) ** 0.5 == pytest.approx(estimate)
    assert set(roofline.RATES) < set(hardware.DEVICES)


def test_nothing_is_faster_than_the_peak():
    """Kernels have no cycles: 1,100 TFLOP, most of them in kernels, take four seconds at 275 a second."""
    took = roofline.seconds(compiled([])._replace(flops=1100e12), V4_32)
    assert took.low == pytest.approx(4)


def test_work_that_is_scheduled_beside_a_collective_covers_it():
    half = gather(started=True, covered=0.15625 * 1.05e9)
    assert roofline.seconds(compiled([half]), V4_32).exposed == pytest.approx(0.3125)
    alone = gather(started=True)
    assert roofline.seconds(compiled([alone]), V4_32).exposed == pytest.approx(2 * 0.3125)
    carried = gather(started=True, covered=math.inf)
    assert roofline.seconds(compiled([carried]), V4_32).exposed == 0
    whole = gather(started=True, covered=9e9)
    assert roofline.seconds(compiled([whole]), V4_32).exposed == 0


def test_the_slow_end_waits_for_the_host():
    took = roofline.seconds(compiled([]), V4_32, offloaded=8e9)
    assert took.host == pytest.approx(1)  # 8 GB there and back at 16 GB/s
    assert took.high == pytest.approx((took.on_device + 1) * roofline.SPREAD)
    assert took.low == pytest.approx(took.on_device / roofline.SPREAD), "copies may hide"
    much = roofline.seconds(compiled([]), V4_32, offloaded=80e9)
    assert much.low == pytest.approx(10 / roofline.SPREAD), "but they take their time"


def test_slices_exchange_over_the_data_centres_network():
    """6.4 Tbit/s for 256 chips of v5e; what is received comes while something is sent."""
    two = hardware.SLICES["v5e_256x2"]
    assert roofline.collective(gather(kind="send", bytes=1e9), two) == pytest.approx(256 * 8 / 6400)
    assert roofline.collective(gather(kind="recv", bytes=1e9), two) == 0
