import ml_dtypes
import numpy as np
import pytest
from torch_zip import Call, Global, Storage, tensor, write_torch_zip

from convert.files import open_weights
from convert.read_torch import ALLOWED_GLOBALS
from svd2_jax.errors import ConversionError


def read(path):
    return {name: t.view() for name, t in open_weights(path).tensors}


def sample():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 4), np.float32),
        "b": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
        "c": rng.standard_normal((2, 2, 2)).astype(np.float16),
        "n": np.arange(3),
        "empty": np.zeros((0, 2), np.float32),
    }


@pytest.mark.parametrize("align", [True, False], ids=["aligned", "unaligned"])
def test_tensors_come_back_bit_for_bit_in_order(tmp_path, align):
    write_torch_zip(tmp_path / "w.pt", sample(), align=align)
    got = read(tmp_path / "w.pt")
    assert list(got) == list(sample())
    for name, want in sample().items():
        assert got[name].dtype == want.dtype
        np.testing.assert_array_equal(got[name], want)


@pytest.mark.parametrize("keys", [("generator",), ("generator_ema",), ("state_dict",), ()])
def test_the_state_dict_is_found_under_every_usual_key(tmp_path, keys):
    content = sample()
    for key in keys:
        content = {key: content, "step": 7}
    write_torch_zip(tmp_path / "w.pt", content)
    assert list(read(tmp_path / "w.pt")) == list(sample())


def test_generator_goes_before_generator_ema(tmp_path):
    write_torch_zip(
        tmp_path / "w.pt",
        {"generator_ema": {"ema": np.zeros(1, np.float32)}, "generator": {"plain": np.zeros(1, np.float32)}},
    )
    assert list(read(tmp_path / "w.pt")) == ["plain"]


def test_a_strided_view_of_a_shared_storage_is_read_with_its_strides(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    storage = Storage("0", base.dtype, base.size)
    views = {"cut": tensor(storage, 7, (2, 3), (6, 2)), "transposed": tensor(storage, 0, (6, 4), (1, 6))}
    # The first entry writes storage 0; the views refer to it.
    write_torch_zip(tmp_path / "w.pt", {"base": base, **views})
    got = read(tmp_path / "w.pt")
    np.testing.assert_array_equal(got["cut"], base[1:3, 1:6:2])
    np.testing.assert_array_equal(got["transposed"], base.T)


def test_a_parameter_is_its_tensor(tmp_path):
    values = np.ones(2, np.float32)
    inner = tensor(Storage("0", values.dtype, 2), 0, (2,), (1,))
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), (inner, True, {}))
    write_torch_zip(tmp_path / "w.pt", {"base": values, "p": parameter})
    np.testing.assert_array_equal(read(tmp_path / "w.pt")["p"], values)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("argparse", "Namespace"),
        ("torch", "load"),
        ("collections", "deque"),
    ],
)
def test_a_forbidden_global_is_refused_by_name_and_never_called(tmp_path, module, name):
    bad = Call(Global(module, name), (f"touch {tmp_path}/ran",))
    write_torch_zip(tmp_path / "w.pt", {"generator": sample(), "extra": bad})
    with pytest.raises(ConversionError, match=rf"names {module}\.{name}, .* refused"):
        read(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_nothing_the_pickle_may_name_can_be_changed_by_it():
    for value in ALLOWED_GLOBALS.values():
        with pytest.raises((AttributeError, TypeError)):
            value.changed = 1


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (3,), (1,)),
        (1, (2,), (1,)),
        (0, (2, 2), (1, 1)),
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (0, (2,), (1, 1)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, offset, shape, strides):
    values = np.ones(2, np.float32)
    bad = tensor(Storage("0", values.dtype, 2), offset, shape, strides)
    write_torch_zip(tmp_path / "w.pt", {"base": values, "bad": bad})
    with pytest.raises(ConversionError, match="damaged, bad"):
        read(tmp_path / "w.pt")


def test_a_storage_without_record_is_reported(tmp_path):
    bad = tensor(Storage("9", np.dtype("float32"), 2), 0, (2,), (1,))
    write_torch_zip(tmp_path / "w.pt", {"bad": bad})
    with pytest.raises(ConversionError, match="the data of bad is missing"):
        read(tmp_path / "w.pt")


def test_entries_that_are_no_tensors_are_named(tmp_path):
    write_torch_zip(tmp_path / "w.pt", {"epoch": 3, "w": np.zeros(1, np.float32)})
    with pytest.raises(ConversionError, match="no tensors: epoch"):
        read(tmp_path / "w.pt")
