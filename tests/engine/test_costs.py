"""What pieces cost, the split that follows from it, and the memory a stage needs: against hand and real arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from svd2_jax.config import StreamConfig, TAEHVConfig, preset
from svd2_jax.engine import costs, memory
from svd2_jax.engine.balance import bottleneck
from svd2_jax.engine.mesh import stage_meshes
from svd2_jax.engine.params import StageWeights, random_items
from svd2_jax.engine.programs import Builder
from svd2_jax.errors import ConfigError
from svd2_jax.hardware import GIB, hardware, roofline

TINY, LARGE = preset("golden"), preset("wan-14b")
SMALL_PICTURE = StreamConfig(height=48, width=64)
F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
H100 = "NVIDIA H100 80GB HBM3"


# --- the split


def test_encoding_and_decoding_take_blocks_off_the_two_ends():
    first, *middle, last = costs.default_split(LARGE, StreamConfig(), BF16, 4, H100)
    assert first + sum(middle) + last == 40
    assert last < first < min(middle)  # decoding takes longer than encoding
    small_decoder = costs.default_split(LARGE, StreamConfig(decoder="taehv"), BF16, 4, H100)
    assert small_decoder[-1] > last


def test_no_split_has_a_faster_slowest_stage_than_the_default_one():
    cfg, device = StreamConfig(), hardware("h100")
    work = costs.costs(LARGE, cfg, BF16).chunk

    def slowest(split):
        def seconds(work):
            return roofline(work, device, 16).seconds

        overheads = [seconds(work.ends)] * 3
        overheads[0] += seconds(work.encode) + seconds(work.condition)
        overheads[2] += seconds(work.decode)
        return bottleneck(split, [seconds(work.block)] * 40, overheads)

    chosen = costs.default_split(LARGE, cfg, BF16, 3, H100)
    others = [(a, b, 40 - a - b) for a in range(1, 39) for b in range(1, 40 - a)]
    assert slowest(chosen) == min(map(slowest, others))


def test_a_device_that_is_not_known_is_weighed_by_arithmetic_alone():
    work = costs.costs(TINY, SMALL_PICTURE, F32).chunk
    split = costs.default_split(TINY, SMALL_PICTURE, F32, 2, "cpu")
    encode, decode = (w.flops for w in (work.encode, work.decode))
    # The VAE of the small model outweighs its blocks, and decoding outweighs encoding: the last stage has one block.
    assert decode - encode > 4 * work.block.flops
    assert split == (3, 1)


def test_one_chunk_alone_in_the_ring_is_split_evenly():
    cfg = StreamConfig(mode="sequential")
    assert costs.default_split(LARGE, cfg, BF16, 4, H100) == (10, 10, 10, 10)
    assert sorted(costs.default_split(LARGE, cfg, BF16, 3, "cpu")) == [13, 13, 14]


def test_one_stage_has_all_blocks_and_nothing_is_traced():
    before = costs.costs.cache_info().misses
    assert costs.default_split(LARGE, StreamConfig(height=16, width=16), BF16, 1, H100) == (40,)
    assert costs.costs.cache_info().misses == before


# --- memory


@pytest.mark.parametrize("cfg", [SMALL_PICTURE, dataclasses.replace(SMALL_PICTURE, decoder="taehv")])
def test_a_stages_weights_are_those_that_are_read(cfg):
    (mesh,) = stage_meshes(1, 2)
    weights = StageWeights(TINY, random_items(TINY, 0, F32), mesh)
    weights.params((3, 1), cfg.decoder)
    stages = memory.stage_memory(TINY, cfg, F32, (3, 1))
    assert weights.resident_bytes() == dict(zip(mesh.devices, (s.weights for s in stages), strict=True))


def test_a_stage_holds_what_its_tick_reads():
    (mesh,) = stage_meshes(1, 2)
    builder = Builder(TINY, SMALL_PICTURE, F32, mesh)
    read = builder.ticks((3, 1)).tick[1].memory_analysis().argument_size_in_bytes  # by each device
    stage = memory.stage_memory(TINY, SMALL_PICTURE, F32, (3, 1))[1]
    sizes = costs.costs(TINY, SMALL_PICTURE, F32).sizes
    # The second and third block of this stage are labels on its first. A tick reads the prompt's keys and values,
    # for each row, and not the weights that make them.
    blocks = 3 * (sizes.block - 4 * (2 * (96 * 96 + 96) + 96))
    entry = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(builder.entry("rows", 1)))
    held = blocks + sizes.ends + stage.cache + 2 * stage.prompt + sizes.message + entry
    assert read == pytest.approx(held, abs=100)  # and a few counters
    assert stage.weights == sizes.block + sizes.ends + sizes.decoder


def test_what_does_not_fit_is_refused_with_the_stage_and_what_to_do():
    (mesh,) = stage_meshes(1, 2)
    split = (28, 12)
    needs = [m.held + m.opening for m in memory.stage_memory(LARGE, StreamConfig(), BF16, split)]

    def check(*limits):
        memory.check_memory(LARGE, StreamConfig(), BF16, split, mesh, limits)

    check(needs[0], needs[1])
    check(needs[0], None)
    with pytest.raises(ConfigError) as refused:
        check(needs[0] - 8 * GIB, needs[1] - 1 * GIB)
    assert str(refused.value) == (
        f"stage 0 (blocks 0 to 27) needs {needs[0] / GIB:.1f} GiB, its device has {needs[0] / GIB - 8:.1f} GiB for "
        "JAX, 8.0 GiB too little; use more --stages or a smaller picture"
    )
    with pytest.raises(ConfigError, match=r"stage 1 \(blocks 28 to 39\) .* 1.0 GiB too little") as refused:
        check(needs[0], needs[1] - 1 * GIB)
    assert "XLA_CLIENT_MEM_FRACTION=0.9 instead of JAX's 0.75, more --stages or a smaller picture" in str(
        refused.value
    )


def test_float32_is_told_of_bfloat16_and_as_many_stages_as_blocks_of_no_more():
    (mesh,) = stage_meshes(1, 4)
    with pytest.raises(ConfigError, match="use --dtype bfloat16 or a smaller picture"):
        memory.check_memory(TINY, SMALL_PICTURE, F32, (1, 1, 1, 1), mesh, [1000] * 4)


def test_streams_that_are_open_at_once_share_the_parameters_only():
    (mesh,) = stage_meshes(1, 1)
    (one,) = memory.stage_memory(LARGE, StreamConfig(), BF16, (40,))
    three = one.held + one.opening + 2 * (one.cache + one.prompt + one.stream)
    memory.check_memory(LARGE, StreamConfig(), BF16, (40,), mesh, [three], streams=3)
    with pytest.raises(ConfigError, match=r"too little for 3 streams; use .*fewer streams or a smaller"):
        memory.check_memory(LARGE, StreamConfig(), BF16, (40,), mesh, [three - GIB], streams=3)


def test_a_device_that_does_not_say_how_much_it_has_is_not_checked():
    (mesh,) = stage_meshes(1, 2)
    memory.check_memory(LARGE, StreamConfig(), F32, (20, 20), mesh)


def test_temporaries_are_those_of_the_largest_program_on_a_device():
    sizes = memory.Temporaries(tick=1, encode=2, decode=3)
    assert [sizes.on(stage, 3) for stage in range(3)] == [2, 1, 3]
    assert sizes.on(0, 1) == 3


def test_temporaries_are_those_of_the_real_programs():
    (mesh,) = stage_meshes(1, 2)
    cfg, told = StreamConfig.for_task("t2v", 1, height=48, width=64, decoder="taehv"), []
    small = dataclasses.replace(TINY, taehv=TAEHVConfig(channels=(8, 8, 4, 4)))
    found = memory.compiled_temporaries(small, cfg, BF16, (3, 1), mesh, told.append)
    assert told == ["the tick, 3 blocks a stage", "encoder and decoder"]
    assert found.encode == 0  # no video comes in
    assert min(found.tick, found.decode) > 0
