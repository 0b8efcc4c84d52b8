"""Compiler options for GPUs: this JAX knows them, and the user's flags win."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.engine import programs


def sharding(platform):
    return SimpleNamespace(device_set=[SimpleNamespace(platform=platform)])


def test_this_jax_knows_every_option():
    # A CPU ignores them, but their names and values are checked.
    doubled = jax.jit(lambda x: x * 2).lower(jnp.ones(3)).compile(compiler_options=programs.GPU_OPTIONS)
    np.testing.assert_array_equal(doubled(jnp.ones(3)), np.full(3, 2.0))


def test_only_gpus_get_them_and_xla_flags_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_force_conv_nhwc=false")
    assert programs._options(sharding("cpu")) == {}
    named = {"xla_gpu_force_conv_nhwc"}
    assert programs._options(sharding("gpu")).keys() == programs.GPU_OPTIONS.keys() - named


def test_no_convolution_is_captured_in_a_graph():
    # It fails where it was not run before, as after a start with kept programs.
    assert "CONVOLUTION" not in str(programs.GPU_OPTIONS.get("xla_gpu_enable_command_buffer", ""))
