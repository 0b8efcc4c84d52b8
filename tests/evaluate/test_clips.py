"""What a folder of clips may hold, and what is said when it holds something else."""

import json

import numpy as np
import pytest

from svd2_jax.errors import ConfigError, MediaError
from svd2_jax.evaluate import clips
from svd2_jax.media import VideoWriter, synthetic_clip


def save(path, frames=3):
    path.parent.mkdir(exist_ok=True)
    with VideoWriter(path, 16, 16, 32) as writer:
        writer.write(np.stack(list(synthetic_clip(frames, 16, 32))))


@pytest.fixture
def with_targets(tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps({"sepia": ["old", "brown"], "comic": ["a comic"]}))
    for name in ("b", "a"):
        for stem in ("input", "comic", "sepia"):
            save(tmp_path / name / f"{stem}.mp4")
    return tmp_path


def test_plain_videos_are_each_redrawn_to_each_prompt(tmp_path):
    for name in ("b.mp4", "a.mkv"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no video")
    folder = clips.read_folder(tmp_path, ["a sketch", "a comic"])
    assert [clip.name for clip in folder.clips] == ["a", "b"]
    assert [(style.name, style.phrasings) for style in folder.styles] == [
        (None, ("a sketch",)),
        (None, ("a comic",)),
    ]
    assert not any(clip.targets for clip in folder.clips)


def test_clips_with_targets_have_styles_in_the_order_of_the_prompts(with_targets):
    folder = clips.read_folder(with_targets)
    assert [style.name for style in folder.styles] == ["sepia", "comic"]
    assert [clip.name for clip in folder.clips] == ["a", "b"]
    assert [path.name for path in folder.clips[0].targets] == ["sepia.mp4", "comic.mp4"]


def test_phrasings_take_turns(with_targets):
    sepia = clips.read_folder(with_targets).styles[0]
    assert [sepia.phrasing(clip) for clip in range(3)] == ["old", "brown", "old"]


def test_some_styles_can_be_taken_alone(with_targets):
    folder = clips.read_folder(with_targets, styles=["comic"])
    assert [style.name for style in folder.styles] == ["comic"]
    assert [path.name for path in folder.clips[1].targets] == ["comic.mp4"]


def test_a_target_has_the_frames_of_its_input_and_of_any_size(with_targets):
    clip = clips.read_folder(with_targets).clips[0]
    frames = clips.read_clip(clip.input, 32, 64, 2)
    assert frames.shape == (2, 32, 64, 3)
    assert clips.read_target(clip.targets[0], frames, 2).shape == frames.shape


def refused(*args, **settings):
    with pytest.raises((ConfigError, MediaError)) as caught:
        clips.read_folder(*args, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_that_is_not_there_or_holds_nothing_is_named(tmp_path):
    assert refused(tmp_path / "none", ["x"]).endswith("none: is no folder; give one with video files")
    assert "holds no clips" in refused(tmp_path, ["x"])
    (tmp_path / "prompts.json").write_text('{"sepia": ["old"]}')
    assert "holds no clips" in refused(tmp_path)


def test_plain_clips_need_a_prompt_and_know_no_styles(tmp_path):
    save(tmp_path / "a.mp4")
    assert "--prompt" in refused(tmp_path)
    assert "the prompt is empty" in refused(tmp_path, [" "])
    assert "knows no styles" in refused(tmp_path, styles=["sepia"])


def test_clips_with_targets_take_no_prompt(with_targets):
    assert "leave out --prompt" in refused(with_targets, ["x"])


def test_an_unknown_style_is_named_with_those_there_are(with_targets):
    assert "has no style 'oil'; it has sepia, comic" in refused(with_targets, styles=["oil"])
    save(with_targets / "a" / "oil.mp4")
    assert "a/oil.mp4: prompts.json knows no style 'oil'" in refused(with_targets)


@pytest.mark.parametrize("stem", ["input", "comic"])
def test_a_video_that_is_missing_is_named(with_targets, stem):
    (with_targets / "b" / f"{stem}.mp4").unlink()
    assert f"b: has no video {stem}.mp4" in refused(with_targets)


def test_a_target_of_another_length_is_named(with_targets):
    clip = clips.read_folder(with_targets).clips[0]
    save(clip.targets[1], 4)
    frames = clips.read_clip(clip.input, 16, 32, None)
    with pytest.raises(MediaError, match=r"a/comic.mp4: has 4 frames, its input 3; both must be as long"):
        clips.read_target(clip.targets[1], frames, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "expected {style: [phrasing, ...]}"),
        ('{"sepia": []}', "'sepia' has no phrasings"),
        ('{"sepia": "old"}', "'sepia' has no phrasings"),
        ('{"sepia": [""]}', "'sepia': the prompt is empty"),
        ('{"sepia": [3]}', "'sepia': the prompt must be text"),
    ],
)
def test_prompts_that_are_none_are_refused(with_targets, text, said):
    (with_targets / "prompts.json").write_text(text)
    assert said in refused(with_targets)
