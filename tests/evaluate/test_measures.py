"""Each measure against values worked out by hand."""

import math
import sys

import numpy as np
import pytest

from svd2_jax.errors import ConfigError
from svd2_jax.evaluate import measures
from svd2_jax.evaluate.measures import Flow, Motion

ROUNDING = 1e-6  # float32 of values in [0, 1]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def grey(value: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def moved(frame: np.ndarray, down: int, right: int) -> np.ndarray:
    return np.roll(frame, (down, right), axis=(0, 1))


def flow_back(height: int, width: int, down: int, right: int) -> Flow:
    """From a frame that has moved by so much to the one before, valid where it came from inside."""
    offset = np.empty((2, height, width), np.float32)
    offset[0], offset[1] = -down, -right
    rows, columns = np.indices((height, width))
    valid = (rows >= down) & (columns >= right)
    return Flow(offset, valid)


def test_an_offset_of_51_levels_is_a_psnr_of_14_db():
    # 51 / 255 = 0.2, squared 0.04, and -10 log10(0.04) = 13.979
    a = np.stack([grey(100), grey(30)])
    assert measures.likeness(a, a + np.uint8(51)).psnr_db == pytest.approx(13.9794, abs=1e-4)


def test_the_psnr_of_a_clip_is_that_of_its_mean_error_and_not_the_mean_of_its_frames():
    a, b = np.stack([grey(0), grey(0)]), np.stack([grey(0), grey(51)])
    assert measures.likeness(a, b).psnr_db == pytest.approx(-10 * math.log10(0.02), abs=1e-4)


def test_equal_clips_have_ssim_1_and_the_most_psnr():
    a = noise(2, 16, 16, 3)
    assert measures.likeness(a, a) == measures.Likeness(measures.MOST_DB, pytest.approx(1.0))


def test_the_ssim_of_two_grey_pictures_is_that_of_their_means():
    # (2 a b + c) / (a^2 + b^2 + c) with c = 0.01^2, and no structure to compare
    a, b = 51 / 255, 102 / 255
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert measures.ssim(grey(51), grey(102)) == pytest.approx(expected, abs=1e-5)


def test_differences_do_not_wrap_around_as_bytes_do():
    assert measures.squared_error(grey(0), grey(255)) == 1.0
    flow = flow_back(16, 16, 0, 0)
    assert measures.warp_error(grey(250), grey(5), flow) == pytest.approx(245 / 255)


def test_the_nearest_target_is_found_below_noise():
    targets = [np.stack([grey(value)] * 2) for value in (20, 120, 220)]
    seen = np.clip(targets[1] + noise(2, 16, 16, 3) // 4.0 - 32, 0, 255).astype(np.uint8)
    smooth = [measures.blurred(target) for target in targets]
    assert measures.nearest(measures.blurred(seen), smooth) == 1


def test_a_picture_that_moves_by_whole_pixels_is_warped_to_itself():
    before = noise(20, 24, 3)
    now = moved(before, 2, 3)
    flow = flow_back(20, 24, 2, 3)
    assert np.allclose(
        measures.warped(before, flow)[flow.valid], measures.unit(now)[flow.valid], atol=ROUNDING
    )
    assert measures.warp_error(before, now, flow) == pytest.approx(0, abs=ROUNDING)
    assert measures.warp_error(before, now, flow_back(20, 24, 0, 0)) > 0.2  # two unrelated values: 1/3


def test_only_valid_pixels_count():
    before, now = grey(0), grey(0)
    now[:8] = 255
    flow = flow_back(16, 16, 0, 0)
    below = Flow(flow.offset, np.arange(16)[:, None].repeat(16, 1) >= 8)
    assert measures.warp_error(before, now, below) == 0
    assert math.isnan(measures.warp_error(before, now, Flow(flow.offset, np.zeros((16, 16), bool))))


def test_a_flow_is_valid_where_it_stays_inside_and_leads_home():
    there = np.zeros((2, 8, 10), np.float32)
    there[1] = 3
    back = -there
    valid = measures.consistent(there, back)
    assert valid[:, :7].all()
    assert not valid[:, 7:].any()
    back[1, :4] = -1  # the upper half comes back 2 pixels off
    valid = measures.consistent(there, back)
    assert not valid[:4].any()
    assert valid[4:, :7].all()


@pytest.mark.parametrize("lines", [96, 288])
def test_the_flow_of_a_moving_picture_is_its_motion(lines):
    """288 lines: the flow comes from a picture reduced by two."""
    rows, columns = np.indices((lines, 160), np.float32) * 96 / lines
    shade = 0.5 + 0.25 * np.sin(rows / 5) + 0.25 * np.sin(columns * 96 / lines / 4 + rows / 9)
    frame = np.repeat(np.round(255 * shade)[..., None], 3, axis=-1).astype(np.uint8)
    step = lines // 48
    flows = measures.motion(np.stack([frame, moved(frame, step, 0)]))
    inner = (slice(None), slice(lines // 4, -lines // 4), slice(40, -40))
    assert np.median(flows.to_previous[0].offset[inner][0]) == pytest.approx(-step, abs=0.2)
    assert np.median(flows.to_next[0].offset[inner][0]) == pytest.approx(step, abs=0.2)
    assert flows.to_next[0].offset.shape == (2, lines, 160)


def still(frames: int) -> Motion:
    flows = (flow_back(16, 16, 0, 0),) * (frames - 1)
    return Motion(flows, flows)


def test_brightness_that_alternates_by_51_levels_flickers_by_two_fifths():
    # second differences of 0, 0.2, 0, 0.2 are -0.4 and 0.4; first differences are 0.2
    clip = np.stack([grey(50), grey(101), grey(50), grey(101)])
    found = measures.steadiness(clip, still(4))
    assert found.flicker == pytest.approx(0.4, abs=ROUNDING)
    assert found.distance == pytest.approx(0.2, abs=ROUNDING)
    assert found.warp_error == pytest.approx(0.2, abs=ROUNDING)


def test_a_steady_fade_does_not_flicker():
    clip = np.stack([grey(value) for value in (10, 20, 30, 40)])
    assert measures.steadiness(clip, still(4)).flicker == pytest.approx(0, abs=ROUNDING)


def test_flicker_is_seen_in_a_part_of_the_picture_whose_mean_stays():
    frames = [grey(100), grey(100), grey(100)]
    frames[1][:8], frames[1][8:] = 151, 49
    assert measures.steadiness(np.stack(frames), still(3)).flicker == pytest.approx(0.4, abs=ROUNDING)


def test_local_means_of_any_size_are_means():
    frame = noise(19, 21, 3)
    means = measures.local_means(frame)
    assert means.shape == (8, 8)
    assert means[0, 0] == pytest.approx(measures.luma(frame)[:2, :2].mean(), abs=ROUNDING)
    assert measures.local_means(grey(51, 19, 21)) == pytest.approx(np.full((8, 8), 0.2), abs=ROUNDING)


def test_a_meter_goes_on_where_it_was_asked_and_forgets_what_it_told():
    clip = np.stack([grey(v) for v in (0, 51, 51, 51)])
    meter, flow = measures.SteadinessMeter(), flow_back(16, 16, 0, 0)
    meter.add(clip[0], None)
    assert math.isnan(meter.take().distance)
    meter.add(clip[1], flow)
    assert meter.take().distance == pytest.approx(0.2, abs=ROUNDING)
    meter.add(clip[2], flow)
    meter.add(clip[3], flow)
    found = meter.take()
    assert found.distance == 0
    assert found.flicker == pytest.approx(0.1, abs=ROUNDING)  # 0.2 when it stopped rising, then 0


def test_tone_is_brightness_its_deviation_and_colour():
    frame = grey(0)
    frame[:8] = (255, 255, 0)
    tone = measures.tone(frame)
    assert tone.brightness == pytest.approx((0.299 + 0.587) / 2, abs=ROUNDING)
    assert tone.contrast == pytest.approx((0.299 + 0.587) / 2, abs=ROUNDING)
    assert tone.saturation == pytest.approx(0.5)


def test_the_share_of_the_old_picture_goes_from_one_to_zero():
    old = np.stack([grey(0)] * 5)
    new = np.stack([grey(200)] * 5)
    changed = np.stack([grey(v) for v in (0, 50, 120, 180, 200)])
    shares = measures.shares_of_old(changed, old, new)
    assert shares == pytest.approx([1, 0.75, 0.4, 0.1, 0])
    assert measures.first_below(shares, 1, 0.5) == 2
    assert measures.stays_below(shares, 1, 0.25) == 3
    assert measures.first_below(shares[:2], 0, 0.5) is None
    assert measures.stays_below(shares[:3], 0, 0.25) is None


def test_a_stream_is_settled_only_when_it_stays_so():
    shares = np.array([1.0, 0.2, 0.3, 0.2, 0.1])
    assert measures.stays_below(shares, 1, 0.25) == 3
    assert measures.stays_below(np.array([0.1, 0.1]), 0, 0.25) == 0


def test_equal_streams_have_no_share():
    clip = noise(2, 16, 16, 3)
    shares = measures.shares_of_old(clip, clip, clip)
    assert np.isnan(shares).all()
    assert measures.first_below(shares, 0, 0.5) is None
    assert measures.stays_below(shares, 0, 0.25) is None


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ConfigError, match=r'pip install "svd2-jax\[eval\]"'):
        measures.require_tools()
