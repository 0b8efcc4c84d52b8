"""The training loop: resumed runs, and data from a step number alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiny_model import fit
from tiny_model.fit import Run

TARGET = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)


def batch_at(step):
    x = np.random.default_rng(step).standard_normal((8, 6)).astype(np.float32)
    return x, x @ TARGET


def loss(params, batch, key):
    x, y = batch
    error = jnp.square(x @ params["kernel"] + params["bias"].reshape(1, 3) - y).mean()
    return error, {"error": error}


def start():
    return {"kernel": jnp.zeros((6, 3)), "bias": jnp.zeros((3,))}


def trained(folder, steps, stop_after=None, asked=None):
    run = Run("line", steps, rate=0.1, vector_rate=0.01, warmup=5, save_every=10)

    def at(step):
        if asked is not None:
            asked.append(step)
        if step == stop_after:
            raise KeyboardInterrupt
        return batch_at(step)

    return fit.fit(run, folder, start(), loss, at)


def test_training_finds_a_linear_map_on_all_devices(tmp_path):
    params = trained(tmp_path, 200)
    assert len(jax.devices()) == 8
    np.testing.assert_allclose(params["kernel"], TARGET, atol=0.05)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 100, 150, 200]
    assert lines[-1]["error"] < lines[0]["error"]


def test_an_interrupted_run_goes_on_to_the_same_parameters(tmp_path):
    whole = trained(tmp_path / "whole", 40)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", 40, stop_after=25)
    asked = []
    resumed = trained(tmp_path / "cut", 40, asked=asked)
    assert asked[1:] == list(
        range(20, 41)
    )  # saved every ten steps; before that the sizes of a batch, behind it one ahead
    np.testing.assert_array_equal(resumed["kernel"], whole["kernel"])


def test_a_complete_run_is_not_trained_again(tmp_path):
    whole = trained(tmp_path, 20)
    again = trained(tmp_path, 20, stop_after=1)
    np.testing.assert_array_equal(again["kernel"], whole["kernel"])
