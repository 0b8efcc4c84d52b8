"""Compiled programs kept on disk."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.config import persistent_cache_min_compile_time_secs
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import svd2_jax
from svd2_jax.engine.kept_programs import Store, keep_programs, kept_program, kept_value
from svd2_jax.engine.policy import compiler_options

COMPILE = """
import jax, jax.numpy as jnp
from svd2_jax.engine.kept_programs import keep_programs
compiled = []
jax.monitoring.register_event_listener(lambda name, **_: compiled.append(name))
print(keep_programs())
jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))))
print(compiled.count("/jax/compilation_cache/cache_hits"), compiled.count("/jax/compilation_cache/cache_misses"))
print(jax.config.values["jax_compilation_cache_dir"])
"""
# A program of the engine on the way that all of them take, small.
EMBED = """
import json, jax, jax.numpy as jnp, numpy as np
from svd2_jax.engine.kept_programs import keep_programs
from svd2_jax.engine.programs import run_where_it_lies
from svd2_jax.models import text_encoder
keep_programs()
seen = []
jax.monitoring.register_event_duration_secs_listener(lambda name, _, **more: seen.append((name, more.get("fun_name"))))
got = run_where_it_lies(text_encoder.embed, (), {"embedding": jnp.arange(6.0).reshape(3, 2)}, np.array([[2, 0]]))
print(json.dumps([got.tolist(), sorted({name.split("/")[-1] for name, function in seen if "embed" in str(function)})]))
"""
STREAM = """
import hashlib, json, sys
import jax, numpy as np, svd2_jax
traced = set()
jax.monitoring.register_event_duration_secs_listener(lambda name, _, **more: traced.add(more.get("fun_name")))
engine = svd2_jax.load("random:golden", stages=2)
cfg = engine.stream_config(height=32, width=48)
clip = np.random.default_rng(0).integers(0, 255, (17, 32, 48, 3), np.uint8)
with engine.open(svd2_jax.SessionSpec("a dog", cfg)) as session:
    frames = np.concatenate(list(session.run(clip)))
print(json.dumps([hashlib.sha256(frames.tobytes()).hexdigest(), sorted(filter(None, traced))]))
"""
PROGRAMS = {"encode_first_group", "encode_chunk", "decode_first_group", "decode_chunk", "tick", "prompt_kv",
            "open_rows", "init_stream_state", "draw_chunk", "condition", "run_block"}  # fmt: skip
# XLA cannot write down what oneDNN computes.
BY_ONEDNN = {"encode_first_group", "encode_chunk", "decode_first_group", "decode_chunk"}
KEPT = PROGRAMS - BY_ONEDNN if compiler_options("cpu", is_vae=True) else PROGRAMS


def run_new(script: str, path: Path | None = None, **variables: str) -> str:
    """Returns what a new process prints; `path`: where it finds the package."""
    kept = {k: v for k, v in os.environ.items() if k not in ("SVD2_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=path or Path(svd2_jax.__file__).parents[1],
        env={**kept, **variables},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def run(**variables: str) -> tuple[str, int, int, str]:
    """Returns (folder, programs found there, programs not found, JAX's folder) of a new process."""
    folder, counts, of_jax, _ = run_new(COMPILE, **variables).split("\n")
    hits, misses = counts.split()
    return folder, int(hits), int(misses), of_jax


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder that a process has kept its programs in."""
    folder = tmp_path_factory.mktemp("caches") / "new" / "programs"
    _, hits, misses, _ = run(SVD2_CACHE=str(folder))
    assert hits == 0
    assert misses > 0
    return folder


def test_python_keeps_programs_unless_told_otherwise(tmp_path):
    """Loading is enough to tell: it makes the folder."""
    load = "import svd2_jax; svd2_jax.load('random:golden'{})"
    run_new(load.format(", keep_programs=False"), SVD2_CACHE=str(tmp_path / "none"))
    run_new(load.format(""), SVD2_CACHE=str(tmp_path / "kept"))
    assert not (tmp_path / "none").exists()
    assert (tmp_path / "kept").is_dir()


def test_next_process_compiles_nothing(filled):
    folder, hits, misses, _ = run(SVD2_CACHE=str(filled))
    assert folder == str(filled)
    assert hits > 0
    assert misses == 0


@pytest.mark.parametrize("kind", ["truncated", "empty", "foreign"])
def test_a_damaged_file_of_jax_is_done_without_and_nobody_is_told(tmp_path, kind):
    run(SVD2_CACHE=str(tmp_path))
    damage(kind, list((tmp_path / "jax").glob("*-cache")))
    _, hits, _, _ = run(SVD2_CACHE=str(tmp_path))  # which sees to it that nothing is on standard error
    assert hits == 0


def test_stands_among_the_users_caches(tmp_path):
    folder, _, _, of_jax = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder == str(tmp_path / "svd2-jax")
    assert Path(of_jax).parent == Path(folder)
    assert (tmp_path / "svd2-jax").stat().st_mode & 0o777 == 0o700


def test_leaves_what_jax_was_told(tmp_path, filled):
    folder, _, _, of_jax = run(SVD2_CACHE=str(filled), JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    assert (folder, of_jax) == (str(filled), str(tmp_path))
    folder, _, _, of_jax = run(SVD2_CACHE=str(filled), JAX_ENABLE_COMPILATION_CACHE="false")
    assert (folder, of_jax) == ("None", "None")


def test_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    folder, hits, misses, _ = run(SVD2_CACHE=str(tmp_path / "file" / "programs"))
    assert (folder, hits, misses) == ("None", 0, 0)


# --- one program


def double(scale: float, x: jax.Array, unused: jax.Array) -> dict[str, jax.Array]:
    del unused
    return {"y": x * scale}


class Kept:
    """Asks for one program, and counts how often it was traced."""

    def __init__(self, folder: Path):
        self.folder, self.traced = folder / "engine", 0

    def ask(
        self,
        *,
        shape=(8,),
        dtype=jnp.float32,
        scale=2.0,
        device=0,
        over=1,
        options=None,
        what=(),
        writable=True,
    ):
        devices = tuple(jax.devices()[device : device + over])
        sharding = NamedSharding(Mesh(np.array(devices), ("stage",)), PartitionSpec("stage"))
        if over == 1:
            sharding = SingleDeviceSharding(devices[0])
        x = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        def trace():
            self.traced += 1
            traced = jax.jit(
                lambda *args: double(scale, *args), donate_argnums=0, out_shardings=sharding
            ).trace(x, x)
            return traced, traced.lower()

        self.sharding = sharding
        self.program, self.results = kept_program(
            "double", (double, scale, *what), (x, x), devices, trace, options or {}, writable
        )
        return self

    def run(self, shape=(8,)) -> np.ndarray:
        x = jax.device_put(np.ones(shape, np.float32), self.sharding)
        return np.asarray(self.program(x + x, x)["y"])

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Programs kept in a folder of the test's own."""
    with monkeypatch.context() as patch:
        patch.setenv("SVD2_CACHE", str(tmp_path))
        keep_programs()
        yield Kept(tmp_path)
    keep_programs()


@pytest.mark.parametrize("over", [1, 8])
def test_a_program_asked_for_again_is_not_traced(kept, over):
    first = kept.ask(over=over).run()
    again = kept.ask(over=over).run()
    assert kept.traced == 1
    np.testing.assert_array_equal(again, first)
    assert kept.results == {"y": jax.ShapeDtypeStruct((8,), jnp.float32)}


@pytest.mark.parametrize("over", [1, 8])
def test_what_was_donated_is_taken_over_by_a_kept_program(kept, over):
    kept.ask(over=over)
    kept.ask(over=over)
    x = jax.device_put(jnp.ones((8,)), kept.sharding) + 0
    pointers = [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]
    y = kept.program(x, jax.device_put(jnp.ones((8,)), kept.sharding))["y"]
    assert x.is_deleted()
    assert [shard.data.unsafe_buffer_pointer() for shard in y.addressable_shards] == pointers


@pytest.mark.parametrize(
    "other",
    [
        {"shape": (16,)},
        {"dtype": jnp.bfloat16},
        {"scale": 3.0},
        {"device": 1},
        {"over": 2},
        {"what": ("highest",)},
    ],
)
def test_nothing_else_is_loaded_in_its_place(kept, other):
    kept.ask()
    kept.ask(**other)
    assert kept.traced == 2
    if "scale" in other:
        np.testing.assert_array_equal(kept.run(), np.full(8, 6, np.float32))


def test_flags_and_settings_tell_programs_apart(kept, monkeypatch):
    kept.ask()
    files = len(kept.files)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=false")
    kept.ask()
    assert (kept.traced, len(kept.files)) == (2, 2 * files)
    jax.config.update("jax_enable_checks", True)
    try:
        kept.ask()
    finally:
        jax.config.update("jax_enable_checks", False)
    assert (kept.traced, len(kept.files)) == (3, 3 * files)


def test_what_xla_cannot_write_down_is_not_tried(kept):
    for _ in range(2):
        kept.ask(writable=False)
    assert kept.traced == 2
    assert list(kept.folder.glob("*")) == []


def damage(kind: str, files: list[Path]) -> None:
    contents = [file.read_bytes() for file in files]
    for i, file in enumerate(files):
        if kind == "truncated":
            file.write_bytes(contents[i][:-9])
        elif kind == "empty":
            file.write_bytes(b"")
        elif kind == "foreign":
            file.write_bytes(b"not a program" * 100)
        else:
            file.write_bytes(contents[i - 1])


@pytest.mark.parametrize("kind", ["truncated", "empty", "foreign", "swapped"])
def test_a_damaged_file_is_compiled_and_written_anew(kept, kind):
    first = kept.ask().run()
    files = kept.files
    damage(kind, files)
    np.testing.assert_array_equal(kept.ask().run(), first)
    assert kept.traced == 2
    assert kept.files == files
    kept.ask()
    assert kept.traced == 2


def test_a_folder_that_cannot_be_written_is_done_without(kept):
    kept.folder.write_text("")
    kept.ask()
    kept.ask()
    assert kept.traced == 2


def test_a_function_without_a_lasting_name_is_not_kept(kept):
    kept.ask(what=(lambda x: x,))
    kept.ask(what=(lambda x: x,))
    assert kept.traced == 2
    assert not kept.folder.exists()


def shapes_of(rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    shapes_of.calls += 1
    return {"x": jax.ShapeDtypeStruct((rows, 2), jnp.bfloat16)}


shapes_of.calls = 0


def test_shapes_are_kept_as_well(kept):
    before = shapes_of.calls
    first = kept_value(shapes_of, 3)
    kept_value.cache_clear()  # as a new process
    assert kept_value(shapes_of, 3) == first
    assert kept_value(shapes_of, 4)["x"].shape == (4, 2)
    assert shapes_of.calls == before + 2


# --- the folder


def test_what_was_not_read_for_longest_goes_first(tmp_path):
    store = Store(tmp_path / "engine", most_bytes=2600)
    for i, key in enumerate(("aa", "bb")):
        store.write(key, bytes(1000))
        os.utime(tmp_path / "engine" / f"{key}.pickle", (i, i))
    assert store.read("aa") == bytes(1000)  # so it is newer than the other
    store.write("cc", bytes(1000))
    assert store.read("bb") is None
    assert store.read("aa") == store.read("cc") == bytes(1000)


def test_half_written_files_go_once_nobody_writes_them_any_more(tmp_path):
    store = Store(tmp_path)
    for name, age_s in (("old", 7200), ("new", 60)):
        part = tmp_path / f".{name}.12345678.part.pickle"
        part.write_bytes(b"")
        os.utime(part, (time.time() - age_s,) * 2)
    store.write("aa", 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".new.12345678.part.pickle", "aa.pickle"]


def test_readers_see_whole_values_while_others_write(tmp_path):
    store, value = Store(tmp_path), bytes(1 << 20)
    store.write("aa", value)
    writers = [
        threading.Thread(target=lambda: [store.write("aa", value) for _ in range(20)]) for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert store.read("aa") == value
    assert [file.name for file in tmp_path.iterdir()] == ["aa.pickle"]


# --- new processes


def test_another_source_is_traced_again(tmp_path):
    package = tmp_path / "lib" / "svd2_jax"
    shutil.copytree(
        Path(svd2_jax.__file__).parent, package, ignore=shutil.ignore_patterns("assets", "__pycache__")
    )

    def embedded() -> tuple[list, list[str]]:
        return tuple(json.loads(run_new(EMBED, tmp_path / "lib", SVD2_CACHE=str(tmp_path / "cache"))))

    cold, restart = embedded(), embedded()
    assert cold[0] == restart[0] == [[[4.0, 5.0], [0.0, 1.0]]]
    assert "backend_compile_duration" in cold[1]
    assert restart[1] == []
    with (package / "nn" / "rope.py").open("a") as file:
        file.write("\n# a remark\n")
    edited = embedded()
    assert edited[0] == cold[0]
    assert "jaxpr_trace_duration" in edited[1]
    assert "backend_compile_duration" not in edited[1]  # it came out the same
    assert embedded() == restart


@pytest.mark.slow
def test_a_restarted_pipeline_traces_no_program_and_draws_the_same_frames(tmp_path):
    (cold, traced), (restart, traced_again) = (
        json.loads(run_new(STREAM, SVD2_CACHE=str(tmp_path))) for _ in range(2)
    )
    assert traced_again != traced
    assert set(traced) >= PROGRAMS
    assert not KEPT & set(traced_again)
    assert restart == cold


@pytest.mark.parametrize(("platform", "kept"), [("gpu", False), ("cpu", True)])
def test_jax_keeps_no_program_over_the_gpus_of_several_processes(platform, kept):
    least_s = []

    class Lowered:
        out_info = ()

        def compile(self, options):
            least_s.append(persistent_cache_min_compile_time_secs.value)

    devices = [SimpleNamespace(platform=platform, process_index=i) for i in range(2)]
    kept_program("tick", (), (), devices, lambda: (None, Lowered()), {})
    assert (least_s[0] < math.inf) == kept
