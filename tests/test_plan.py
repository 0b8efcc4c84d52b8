"""`plan` adds up what a pipeline holds and does; sums are worked out by hand or from other plans."""

import dataclasses
import json

import pytest

from svd2_jax import plan as plan_lib
from svd2_jax.config import StreamConfig, preset
from svd2_jax.engine.memory import Temporaries
from svd2_jax.errors import ConfigError
from svd2_jax.hardware import GIB, Hardware, hardware

H100 = hardware("h100")
TINY = StreamConfig(height=48, width=64)


def tiny(stages=2, stream=TINY, device=H100, **settings):
    return plan_lib.plan(preset("golden"), stream, stages, device, **settings)


def device_with(memory=80 * GIB, rate=1e12):
    return Hardware("toy", memory, 1e12, rate, rate, 1e12, "made up")


@pytest.fixture(scope="module")
def large():
    """The 14B model on four H100s; module-wide because tracing it takes a second."""
    return plan_lib.plan(preset("wan-14b"), StreamConfig(height=480, width=832), 4, H100)


def test_the_large_models_sizes_are_those_worked_out_by_hand(large):
    E, M, Q, rows = 5120, 13824, 1560, 2
    matrices_and_vectors = 8 * E * E + 2 * E * M + (8 * E + M + E) + (4 * E + 2 * E) + 6 * E
    patch_and_head = (64 * E + E) + (E * 64 + 64 + 2 * E)
    middle, longest = large.devices[1], max(device.blocks for device in large.devices)
    assert middle.weights == 2 * (middle.blocks * matrices_and_vectors + patch_and_head)
    keys_and_values = longest * rows * 2 * 6 * Q * E * 2
    assert middle.cache == pytest.approx(keys_and_values, rel=0.001)  # and the means of the sinks
    assert middle.prompt == longest * 2 * 512 * E * 2
    latents = 60 * 104 * 16 * 4
    counters = 4 + 4 + 1  # timestep, start, whether there is a chunk
    assert large.hop_bytes == rows * (2 * Q * E + latents + 7 * E * 4 + counters)
    assert [device.first_block for device in large.devices] == [0, 9, 21, 33]
    assert sum(device.blocks for device in large.devices) == 40


def test_a_tick_of_the_large_model_is_its_slowest_device_and_a_hop(large):
    slowest = max(device.seconds for device in large.devices)
    assert large.devices[large.bottleneck].seconds == slowest
    assert large.hop_seconds == large.hop_bytes / H100.link_bandwidth
    assert large.bounds.chunk_seconds == pytest.approx(slowest + large.hop_seconds)
    assert large.bounds.fps == pytest.approx(4 / large.bounds.chunk_seconds)


def test_a_chunk_takes_steps_times_stages_ticks_and_waits_for_a_live_source(large):
    assert large.bounds.ticks == 2 * 4
    assert large.bounds.latency_seconds == pytest.approx(8 * large.bounds.chunk_seconds)
    assert large.bounds.live_latency_seconds == 8 * 4 / 16


def test_the_first_device_encodes_and_the_last_one_decodes(large):
    names = [[part.name for part in device.parts] for device in large.devices]
    assert names == [["encode", "timesteps", "blocks"], ["blocks"], ["blocks"], ["blocks", "decode"]]


def test_all_devices_together_hold_every_weight_once_and_the_ends_everywhere():
    one, four = tiny(1), tiny(4)
    ends = 2 * ((64 * 96 + 96) + (96 * 64 + 64 + 2 * 96))  # patch embedding and head, bfloat16
    assert sum(d.weights for d in four.devices) == one.devices[0].weights + 3 * ends
    assert sum(d.cache for d in four.devices) == one.devices[0].cache


def test_all_devices_together_do_the_work_of_one():
    def work(plan, name):
        return [p.work for d in plan.devices for p in d.parts if p.name == name]

    one, two = tiny(1), tiny(2)
    for name in ("encode", "timesteps", "decode"):
        assert work(two, name) == work(one, name)
    blocks = work(one, "blocks")[0].flops
    ends = 2 * 2 * 12 * 2 * 64 * 96  # two rows of 12 tokens through patch embedding and head
    assert sum(w.flops for w in work(two, "blocks")) == blocks + ends


def test_a_shared_vae_is_no_bottleneck_of_its_own():
    # 64 rows of latents are shared by 1, 2, 4, 8 or 16 devices only: fewer programs to trace.
    model, stream = preset("wan-1.3b"), StreamConfig(height=512, width=832)
    apart, shared = (plan_lib.plan(model, stream, 4, H100, share_vae=share) for share in (False, True))
    names = [[part.name for part in device.parts] for device in shared.devices]
    assert names == [["encode", "timesteps", "blocks", "decode"], *[["encode", "blocks", "decode"]] * 3]
    everything = sum(p.seconds for p in plan_lib.plan(model, stream, 1, H100).devices[0].parts)
    slowest = max(device.seconds for device in shared.devices)
    assert everything / 4 < slowest < 1.05 * everything / 4
    assert slowest < 0.7 * max(device.seconds for device in apart.devices)
    assert shared.first_frame_seconds < apart.first_frame_seconds
    assert "4 devices share encoding, and as many decoding" in plan_lib.report(shared)
    assert "share" not in plan_lib.report(apart)
    assert max(d.weights for d in shared.devices) < max(d.weights for d in apart.devices)


def test_what_devices_share_a_single_chunk_passes_once():
    stream = dataclasses.replace(TINY, mode="sequential")
    plan = tiny(2, stream, split=(2, 2), share_vae=True)
    first, second = plan.devices
    ends = sum(part.seconds for part in second.parts if part.name in ("encode", "decode"))
    around = first.seconds + second.seconds - 2 * ends + 2 * 2 * plan.hop_seconds
    assert plan.bounds.latency_seconds == pytest.approx(around + ends)


def test_temporaries_of_a_shared_vae_are_on_all_that_share_it_and_in_proportion():
    shared = Temporaries(tick=1, encode=20, decode=40, vae_devices=2)
    assert [shared.on(stage, 3) for stage in range(3)] == [20, 40, 40]
    assert shared.shared_by(1) == Temporaries(1, 40, 80)


def test_a_stage_with_fewer_blocks_has_room_for_the_longest_stages_cache():
    devices = tiny(2, split=(3, 1)).devices
    assert [d.blocks for d in devices] == [3, 1]
    assert devices[0].cache == devices[1].cache == 3 * tiny(4).devices[0].cache


def test_one_device_hands_nothing_over():
    alone = tiny(1)
    assert (alone.hop_bytes, alone.hop_seconds) == (0, 0.0)
    assert alone.bounds.chunk_seconds == alone.devices[0].seconds


def test_a_single_chunk_goes_around_for_every_step_in_sequential_mode():
    stream = dataclasses.replace(TINY, mode="sequential")
    ahead, alone = tiny(2, split=(2, 2)), tiny(2, stream, split=(2, 2))
    assert alone.devices[0].cache < ahead.devices[0].cache  # one row instead of two
    everything = sum(d.seconds for d in alone.devices) + 2 * 2 * alone.hop_seconds
    assert alone.bounds.latency_seconds == pytest.approx(everything)
    around = everything - sum(
        p.seconds for d in alone.devices for p in d.parts if p.name in ("encode", "decode")
    )
    busiest = max(d.seconds for d in alone.devices) + 2 * alone.hop_seconds
    assert alone.bounds.chunk_seconds == pytest.approx(max(around, busiest))
    assert "all steps of a chunk one after another" in plan_lib.report(alone)


def test_text_to_video_encodes_nothing_and_a_small_decoder_keeps_little():
    stream = StreamConfig.for_task("t2v", height=48, width=64, decoder="taehv")
    plan = tiny(2, stream)
    assert [[p.name for p in d.parts] for d in plan.devices] == [
        ["timesteps", "blocks"],
        ["blocks", "decode"],
    ]
    assert "after the first" not in plan_lib.report(plan)
    waiting = plan.hop_bytes
    assert plan.devices[0].stream == waiting
    assert plan.devices[1].stream == waiting + 3 * 6 * 8 * 16 * 2 + 4  # three latent frames and a counter


def test_float32_takes_twice_the_memory_and_the_slower_units():
    half, full = tiny(1, split=(4,)), tiny(1, split=(4,), dtype="float32")
    assert full.devices[0].weights == 2 * half.devices[0].weights
    assert full.bounds.fps < half.bounds.fps


def test_the_compilers_temporaries_are_asked_for_once_and_added():
    asked = []

    def temporaries(split):
        asked.append(split)
        return Temporaries(tick=1 << 30, encode=2 << 30, decode=0)

    without, known = tiny(2, split=(3, 1)), tiny(2, split=(3, 1), temporaries=temporaries)
    assert asked == [(3, 1)]
    added = [k.total - w.total for k, w in zip(known.devices, without.devices, strict=True)]
    assert added == [2 << 30, 1 << 30]
    assert known.options[0].memory == without.options[0].memory + (2 << 30)
    assert "temp is an upper bound" in plan_lib.report(known)
    assert "temp is an upper bound" not in plan_lib.report(without)


def test_where_programs_need_little_the_making_of_the_caches_rows_needs_more():
    nothing = tiny(2, temporaries=lambda split: Temporaries(0, 0, 0))
    assert [d.temporaries for d in nothing.devices] == [
        d.cache // 2 for d in nothing.devices
    ]  # one of two rows
    alone = dataclasses.replace(TINY, mode="sequential")
    assert [d.temporaries for d in tiny(2, alone, temporaries=lambda _: Temporaries(0, 0, 0)).devices] == [
        0,
        0,
    ]


def test_the_fewest_stages_that_fit_and_are_fast_enough_at_a_part_of_the_best_are_recommended():
    options = tiny(1).options
    assert [len(option.split) for option in options] == [1, 2, 3, 4]  # the model has no more blocks
    assert tiny(1).recommended == 1

    def reached(stages, rate):
        return plan_lib.EFFICIENCY * tiny(stages, device=device_with(rate=rate)).bounds.fps

    # A rate of arithmetic at which one stage would make the frames in time only at its best, two also in fact.
    rate = next(r for e in range(60) if reached(2, r := 1e9 * 1.1**e) >= 16)
    assert reached(1, rate) < 16 <= reached(2, rate)
    matched = tiny(1, device=device_with(rate=rate))
    assert matched.recommended == 2
    assert "the fewest that fit and reach 16 FPS, " in plan_lib.report(matched)
    assert "FPS at 40 % of the best" in plan_lib.report(matched)
    # Too slow in any number: the fastest. Too small in any number: none.
    crawling = tiny(1, device=device_with(rate=1e6))
    assert crawling.options[crawling.recommended - 1].fps == max(o.fps for o in crawling.options)
    assert "the fastest that fits, but only " in plan_lib.report(crawling)
    full = tiny(1, device=device_with(memory=1000))
    assert full.recommended is None
    assert "recommended: none" in plan_lib.report(full)


def test_a_device_that_is_too_small_gets_a_line_of_its_own(large):
    assert plan_lib.too_full(large) == []
    split, (first, middle, *_) = large.bounds.split, (d.total for d in large.devices)
    small = device_with(memory=int((middle - 3.2 * GIB) / plan_lib.LARGEST_SHARE))
    tight = plan_lib.plan(preset("wan-14b"), StreamConfig(), 4, small, split=split)
    lines = plan_lib.too_full(tight)
    assert [line.split(":")[0] for line in lines] == [
        f"device 0 exceeds its memory by {(first - middle) / GIB + 3.2:.1f} GiB",
        "device 1 exceeds its memory by 3.2 GiB",
        "device 2 exceeds its memory by 3.2 GiB",
        f"device 3 exceeds its memory by {(large.devices[3].total - middle) / GIB + 3.2:.1f} GiB",
    ]
    assert plan_lib.report(tight).splitlines()[-4:] == lines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 5}, "stages must be 1 to 4, the blocks of golden; got 5"),
        ({"stages": 0}, "got 0"),
        ({"stages": 2, "split": (3, 2)}, "the split has to give 2 stages all 4 blocks"),
        ({"stages": 2, "split": (4, 0)}, "at least one each"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**settings)


def test_the_report_says_what_is_needed_and_the_json_has_the_same_numbers(large):
    text = plan_lib.report(large)
    assert max(map(len, text.splitlines())) <= 120
    for words in (
        "wan-14b, 832x480, 2 steps, v2v, mode stream, decoder wan, bfloat16",
        "4 x h100: 79.1 GiB at 3.35 TB/s, 989.4 TFLOP/s, link 450 GB/s",
        "8 ticks (2 steps x 4 stages)",
        "2.00 s from a live source of 16 FPS",
        f"{large.bounds.fps:.1f} FPS",
        "recommended: 2 stages, split 21+19",
        "weights: 26.85 in all, 29 % of them at most on one device",
    ):
        assert words in text
    values = json.loads(json.dumps(large.to_dict()))
    assert values["bounds"]["fps"] == large.bounds.fps
    assert [d["total"] for d in values["devices"]] == [d.total for d in large.devices]
    assert values["hardware"]["source"] == H100.source
