"""Streams through an engine whose pictures are worked out by hand: each prompt asks for a grey."""

import dataclasses
import json
import math

import numpy as np
import pytest

from svd2_jax.api import SessionSpec
from svd2_jax.config import StreamConfig
from svd2_jax.errors import MediaError
from svd2_jax.evaluate import chart, clips, measures, report, run
from svd2_jax.evaluate.clip_model import ClipScores
from svd2_jax.evaluate.report import Report, Settings
from svd2_jax.media import VideoWriter, synthetic_clip

CFG = StreamConfig(height=32, width=32)  # first group 5 frames, then 4; two steps
SPEC = SessionSpec("x", CFG)
GREY = {"dark": 40, "old": 45, "light": 200}
FRAMES = 21


@dataclasses.dataclass(frozen=True)
class Chunk:
    first_frame: int
    pixels: np.ndarray

    @property
    def frame_count(self) -> int:
        return len(self.pixels)

    def frames(self) -> np.ndarray:
        return self.pixels


class Session:
    """Gives each chunk when the next one has come in: grey as its prompt asks, after a change first 7/10 of the way."""

    def __init__(self, spec: SessionSpec):
        self.spec, self.steps = spec, spec.stream.steps
        self.grey = self._goal = float(GREY[spec.prompt])
        self._waiting: list[np.ndarray] = []
        self._held: list[Chunk] = []
        self._taken = 0
        self.closed = False
        self.blends: list[tuple[str, int]] = []

    def set_prompt(self, prompt: str, blend_chunks: int = 0) -> None:
        self.blends.append((prompt, blend_chunks))
        self._goal = float(GREY[prompt])

    def push(self, frames: np.ndarray) -> list[Chunk]:
        self._waiting += list(frames)
        size = CFG.chunk_frames if self._taken else CFG.first_frames
        if len(self._waiting) < size:
            return []
        return self._chunk()

    def finish(self) -> list[Chunk]:
        return [*(self._chunk() if self._waiting else []), *self._held]

    def close(self) -> None:
        self.closed = True

    def _chunk(self) -> list[Chunk]:
        if self._goal != self.grey:
            near = 0.7 * self._goal + 0.3 * GREY[self.spec.prompt]
            self.grey = self._goal if self.grey == near else near
        pixels = np.full_like(np.stack(self._waiting), round(self.grey))
        out, self._held = self._held, [Chunk(self._taken, pixels)]
        self._taken += len(self._waiting)
        self._waiting = []
        return out


class Engine:
    def __init__(self):
        self.sessions: list[Session] = []
        self.prepared: list[str] = []

    def open(self, spec: SessionSpec) -> Session:
        self.sessions.append(Session(spec))
        return self.sessions[-1]

    def prepare_prompt(self, prompt: str) -> None:
        self.prepared.append(prompt)


def save(path, frames: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    with VideoWriter(path, 16, *frames.shape[1:3]) as writer:
        writer.write(frames)


def make_folder(path) -> clips.ClipFolder:
    """Two clips with two styles, the second clip of "night" asked for with another phrasing."""
    (path / "prompts.json").write_text(json.dumps({"night": ["dark", "old"], "day": ["light"]}))
    for name in ("a", "b"):
        save(path / name / "input.mp4", np.stack(list(synthetic_clip(FRAMES, 32, 32))))
        for style, grey in (("night", 40), ("day", 200)):
            save(path / name / f"{style}.mp4", np.full((FRAMES, 32, 32, 3), grey, np.uint8))
    return clips.read_folder(path)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def as_report(found: run.Found, styles: tuple[str, ...] = ("night", "day")) -> Report:
    settings = Settings("fake", "clips", CFG.to_dict(), 0.8, 0, 16.0)
    return Report(settings, styles, found.streams, found.rebuilt, found.changes, found.long)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("clips"))
    engine = Engine()
    told: list[int] = []
    plan = run.EvaluationPlan(folder, SPEC)
    found = run.evaluate(engine, lambda clip: clip, plan, told.append)
    assert sum(told) == run.check_clips(plan) == 2 * 3 * FRAMES
    assert all(session.closed for session in engine.sessions)
    return found


def test_each_clip_is_redrawn_to_each_style_with_one_of_its_phrasings(found):
    assert [(s.clip, s.style, s.prompt, s.nearest) for s in found.streams] == [
        ("a", "night", "dark", "night"),
        ("a", "day", "light", "day"),
        ("b", "night", "old", "night"),
        ("b", "day", "light", "day"),
    ]
    dark, _, old, _ = found.streams
    # five levels of 255 apart, and one more that the video file may add
    assert old.to_target.psnr_db == pytest.approx(-20 * math.log10(5 / 255), abs=2)
    assert dark.to_target.psnr_db > 45 > old.to_target.psnr_db > dark.input_to_target.psnr_db


def test_a_grey_picture_is_steady_whatever_its_input_does(found):
    for stream in found.streams:
        assert stream.output.flicker == stream.output.distance == stream.output.warp_error == 0
        assert stream.input.distance > 0


def test_the_vae_is_measured_on_clips_and_on_targets(found):
    assert [(r.clip, r.style) for r in found.rebuilt] == [
        (clip, style) for clip in ("a", "b") for style in (None, "night", "day")
    ]
    assert all(r.likeness.psnr_db == 100 for r in found.rebuilt)


def test_a_change_of_the_prompt_is_timed(found):
    first, second = found.changes
    assert (first.old, first.new, second.old, second.new) == ("dark", "light", "light", "old")
    # chunks begin at 5, 9, 13, 17: the third one is nearly there, the next one is
    assert first.at_frame == 13
    assert first.shares[:13] == (1.0,) * 13
    assert first.shares[13:17] == pytest.approx([0.3] * 4)
    assert first.shares[17:] == (0.0,) * 4
    assert (first.changed_frame, first.settled_frame) == (13, 17)
    assert first.changed_s == (21 - 13) / 16  # it comes out when frames up to 20 are there
    assert first.settled_s is None  # that chunk comes out because the clip ends


def test_a_given_clip_model_judges_every_output(folder):
    class Judge:
        def scores(self, frames: np.ndarray, prompt: str) -> ClipScores:
            return ClipScores(float(frames.mean()), float(GREY[prompt]))

    found = run.evaluate(Engine(), lambda clip: clip, run.EvaluationPlan(folder, SPEC, clip_model=Judge()))
    assert [s.clip_scores for s in found.streams] == [ClipScores(g, g) for g in (40, 200, 45, 200)]
    assert as_report(found).to_dict()["means"]["clip"] == {"prompt": 121.25, "neighbours": 121.25}
    assert "frames with their prompt 121.25" in report.table(as_report(found))


def test_a_long_stream_goes_there_and_back(folder):
    order = run.there_and_back(3)
    assert [next(order) for _ in range(9)] == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    plan = run.EvaluationPlan(folder, SPEC, rate_hz=0.5, minutes=3)
    long = run.evaluate(Engine(), lambda clip: clip, plan).long
    assert (long.clip, long.style, long.prompt, len(long.minutes)) == ("a", "night", "dark", 3)
    drift = long.drift()
    assert drift["brightness"] == drift["psnr_db"] == 0
    assert drift["flicker"] is None  # there was none
    assert long.minutes[0].input.flicker > 0


def test_a_forward_and_a_backward_step_use_their_own_flow(folder):
    """A clip played back is as steady as it is forwards, to the flow's precision."""
    plan = run.EvaluationPlan(folder, SPEC, rate_hz=2 * (FRAMES - 1) / 60, minutes=1)

    class Copy(Engine):
        def open(self, spec):
            session = super().open(spec)
            session._chunk = lambda: copied(session)
            return session

    def copied(session):
        pixels = np.stack(session._waiting)
        out = [Chunk(session._taken, pixels)]
        session._taken += len(pixels)
        session._waiting = []
        return out

    long = run.evaluate(Copy(), lambda clip: clip, plan).long
    forwards = run.evaluate(Copy(), lambda clip: clip, run.EvaluationPlan(folder, SPEC)).streams[0]
    assert long.minutes[0].output == long.minutes[0].input
    assert long.minutes[0].input.warp_error == pytest.approx(forwards.input.warp_error, rel=0.2)
    assert long.minutes[0].input.warp_error < 0.7 * long.minutes[0].input.distance


def test_each_frame_of_a_long_stream_is_seen_with_the_one_that_it_was_made_of(folder):
    frames = clips.read_clip(folder.clips[0].input, 32, 32, 3)
    seen: list[int] = []
    spec = dataclasses.replace(SPEC, prompt="dark")
    motion = measures.motion(frames)
    minutes = run.play_minutes(
        Engine(), spec, frames, motion, None, (2, 5), lambda index, _: seen.append(index)
    )
    assert seen == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1]
    assert len(minutes) == 2
    assert minutes[0].to_target is None


def test_a_prompt_may_come_over_several_chunks():
    engine = Engine()
    frames = np.zeros((13, 32, 32, 3), np.uint8)
    list(run.play(engine, dataclasses.replace(SPEC, prompt="old"), frames, (9, "light"), 3))
    assert engine.sessions[0].blends == [("light", 3)]


def test_plain_clips_have_prompts_and_no_targets(folder, tmp_path):
    plain = tmp_path / "plain"
    save(plain / "a.mp4", np.stack(list(synthetic_clip(13, 32, 32))))
    found = run.evaluate(
        Engine(), lambda clip: clip, run.EvaluationPlan(clips.read_folder(plain, ["dark", "light"]), SPEC)
    )
    assert [(s.style, s.prompt, s.nearest, s.to_target) for s in found.streams] == [
        (None, "dark", None, None),
        (None, "light", None, None),
    ]
    assert len(found.changes) == 1
    values = as_report(found, ()).to_dict()
    assert values["means"]["to_target"] is None
    assert values["means"]["nearest_is_right"] is None
    assert "likeness" not in report.table(as_report(found, ()))


def test_the_report_holds_means_a_confusion_table_and_no_nan(found):
    whole = as_report(found)
    assert whole.confusion() == [[2, 0], [0, 2]]
    assert whole.right_share() == 1
    wrong = dataclasses.replace(found.streams[0], nearest="day")
    mixed = dataclasses.replace(whole, streams=(wrong, *found.streams[1:]))
    assert mixed.confusion() == [[1, 1], [0, 2]]
    assert mixed.of_style("night").right_share() == 0.5
    values = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert list(values) == [
        "settings", "means", "styles", "confusion", "streams", "rebuilt", "changes", "long"
    ]  # fmt: skip
    assert values["means"]["output"]["flicker"] == 0
    assert values["changes"][0]["changed_frame"] == 13
    lines = report.table(whole).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["night", "day", "all"]
    assert lines[3].endswith("100 %")


def test_the_chart_is_drawn_with_and_without_targets(folder, found, tmp_path):
    chart.draw(tmp_path / "a.png", as_report(found), found.samples)
    bare = dataclasses.replace(
        as_report(found, ()),
        streams=tuple(
            dataclasses.replace(
                s, style=None, target=None, to_target=None, input_to_target=None, nearest=None
            )
            for s in found.streams
        ),
        changes=(),
    )
    samples = [dataclasses.replace(sample, target=None) for sample in found.samples]
    chart.draw(tmp_path / "b.png", bare, samples)
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 0


def test_clips_are_checked_before_the_work(folder):
    save(folder.clips[1].targets[0], np.zeros((FRAMES - 1, 32, 32, 3), np.uint8))
    with pytest.raises(MediaError, match=r"night.mp4: has 20 frames, its input 21"):
        run.check_clips(run.EvaluationPlan(folder, SPEC))
    assert run.check_clips(run.EvaluationPlan(folder, SPEC, most_frames=20)) == 2 * 3 * 20
    save(folder.clips[0].input, np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(MediaError, match="has one frame"):
        run.check_clips(run.EvaluationPlan(folder, SPEC))


def test_a_clip_too_short_for_a_change_has_none(folder):
    assert run.change_frame(SPEC, 12) is None
    assert run.change_frame(SPEC, 13) == 9
    assert (
        run.evaluate(Engine(), lambda clip: clip, run.EvaluationPlan(folder, SPEC, most_frames=12)).changes
        == ()
    )
