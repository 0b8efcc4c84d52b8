"""What programs are computed in and compiled with."""

import jax.numpy as jnp
import pytest

from svd2_jax.engine.policy import XLA_OPTIONS, checked_dtype, compiler_options, matmul_precision
from svd2_jax.errors import ConfigError


def test_a_cpu_is_given_no_options():
    assert compiler_options("cpu", "") == ()


def test_what_the_environment_names_is_left_to_it():
    ours = dict(compiler_options("gpu", ""))
    assert ours == dict(XLA_OPTIONS["gpu"])
    given = "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
    assert dict(compiler_options("gpu", given)).keys() == ours.keys() - {"xla_gpu_enable_command_buffer"}
    # Another option whose name begins like one of ours decides nothing.
    assert dict(compiler_options("gpu", "--xla_gpu_enable_command_buffer_scheduling=1")) == ours


def test_float32_means_float32():
    assert matmul_precision(checked_dtype("float32")) == "highest"
    assert matmul_precision(checked_dtype("bfloat16")) == "default"
    assert checked_dtype("bfloat16") == jnp.bfloat16
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        checked_dtype("float16")
