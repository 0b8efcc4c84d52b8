"""What programs are computed in and compiled with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.engine.policy import (
    ONEDNN,
    VAE_OPTIONS,
    XLA_OPTIONS,
    checked_dtype,
    compiler_options,
    computes_by_onednn,
    matmul_precision,
)
from svd2_jax.errors import ConfigError


def test_a_platform_without_options_is_given_none():
    assert compiler_options("tpu", given="") == ()


def test_what_the_environment_names_is_left_to_it():
    ours = dict(compiler_options("gpu", given=""))
    assert ours == dict(XLA_OPTIONS["gpu"])
    given = "--xla_gpu_force_conv_nhwc=false --xla_gpu_autotune_level=0"
    assert dict(compiler_options("gpu", given=given)).keys() == ours.keys() - {"xla_gpu_force_conv_nhwc"}
    # Another option whose name begins like one of ours decides nothing.
    assert dict(compiler_options("gpu", given="--xla_gpu_force_conv_nhwc_too=1")) == ours


def test_programs_of_the_vae_have_options_of_their_own():
    for platform in ("cpu", "gpu"):
        extra = VAE_OPTIONS.get(platform, ())
        assert (
            compiler_options(platform, is_vae=True, given="") == compiler_options(platform, given="") + extra
        )


def test_it_is_known_whether_onednn_may_compute():
    ours, flag = ((ONEDNN, True),), f"--{ONEDNN}"
    assert computes_by_onednn(ours, "")
    assert not computes_by_onednn((), "--xla_cpu_enable_fast_math=true")
    for on in (flag, f"{flag}=true", f"{flag}=1"):
        assert computes_by_onednn((), on)
    assert not computes_by_onednn((), f"{flag}=false")
    assert compiler_options("cpu", is_vae=True, given=f"{flag}=false") == ()


def test_this_jax_knows_every_option():
    # A CPU ignores them, but their names and values are checked.
    for options in (*XLA_OPTIONS.values(), *VAE_OPTIONS.values()):
        doubled = jax.jit(lambda x: x * 2).lower(jnp.ones(3)).compile(compiler_options=dict(options))
        np.testing.assert_array_equal(doubled(jnp.ones(3)), np.full(3, 2.0))


def test_no_convolution_is_captured_in_a_graph():
    # It fails where it was not run before, as after a start with kept programs.
    assert "CONVOLUTION" not in str(dict(XLA_OPTIONS["gpu"]).get("xla_gpu_enable_command_buffer", ""))


def test_float32_means_float32():
    assert matmul_precision(checked_dtype("float32")) == "highest"
    assert matmul_precision(checked_dtype("bfloat16")) == "default"
    assert checked_dtype("bfloat16") == jnp.bfloat16
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        checked_dtype("float16")
