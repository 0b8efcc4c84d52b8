"""What a folder of clips holds: videos alone, or videos with what each style makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svd2_jax import media
from svd2_jax.api import check_prompt
from svd2_jax.errors import ConfigError, MediaError

PROMPTS = "prompts.json"
INPUT = "input"
SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")


@dataclass(frozen=True)
class Style:
    """Something that clips are re-drawn to.

    Attributes:
      name: as the targets' files are called; None for a prompt without targets.
      phrasings: prompts that ask for it.
    """

    name: str | None
    phrasings: tuple[str, ...]

    def phrasing(self, clip: int) -> str:
        """Returns the prompt for clip 0, 1, ...: each in turn."""
        return self.phrasings[clip % len(self.phrasings)]


@dataclass(frozen=True)
class Clip:
    """A video to re-draw.

    Attributes:
      name: of the file without its suffix, or of the folder.
      input: the video.
      targets: what each style makes of it, in the order of the folder's styles; empty where that is not known.
    """

    name: str
    input: Path
    targets: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ClipFolder:
    """Clips and what they are re-drawn to."""

    clips: tuple[Clip, ...]
    styles: tuple[Style, ...]


def read_folder(path: Path, prompts: Sequence[str] = (), styles: Sequence[str] = ()) -> ClipFolder:
    """Returns what a folder of clips holds; no video is opened.

    Args:
      path: the folder. With a file `prompts.json` it holds `NAME/input.mp4` and `NAME/STYLE.mp4`, else video files.
      prompts: what to re-draw plain clips to.
      styles: takes only these of a folder with targets; all if empty.

    Raises:
      ConfigError: there are no clips, no prompts or no such style, or the folder is not of either form.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: is no folder; give one with video files")
    if (path / PROMPTS).exists():
        if prompts:
            raise ConfigError(f"{path}: has prompts of its own in {PROMPTS}; leave out --prompt")
        return _with_targets(path, styles)
    if styles:
        raise ConfigError(
            f"{path}: has no {PROMPTS}, so it knows no styles; give --prompt instead of --style"
        )
    if not prompts:
        raise ConfigError(
            f'{path}: has no {PROMPTS}; say what to re-draw to, as in --prompt "a pencil sketch"'
        )
    for prompt in prompts:
        check_prompt(prompt)
    files = sorted(f for f in path.iterdir() if f.is_file() and _is_video(f))
    return _folder(path, [Clip(file.stem, file) for file in files], [Style(None, (p,)) for p in prompts])


def _with_targets(path: Path, names: Sequence[str]) -> ClipFolder:
    known = _read_prompts(path / PROMPTS)
    for name in names:
        if name not in {style.name for style in known}:
            raise ConfigError(
                f"{path}: has no style {name!r}; it has {', '.join(str(style.name) for style in known)}"
            )
    styles = [style for style in known if not names or style.name in names]
    clips = []
    for folder in sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith(".")):
        input_ = _video(folder, INPUT)
        for file in sorted(filter(_is_video, folder.iterdir())):
            if file.stem not in {INPUT, *(style.name for style in known)}:
                raise ConfigError(f"{file}: {PROMPTS} knows no style {file.stem!r}")
        clips.append(Clip(folder.name, input_, tuple(_video(folder, str(style.name)) for style in styles)))
    return _folder(path, clips, styles)


def _folder(path: Path, clips: Sequence[Clip], styles: Sequence[Style]) -> ClipFolder:
    if not clips:
        raise ConfigError(f"{path}: holds no clips; expected {', '.join(SUFFIXES)} files")
    return ClipFolder(tuple(clips), tuple(styles))


def _read_prompts(path: Path) -> list[Style]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise ConfigError(f"{path}: is not JSON ({e})") from e
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{path}: expected {{style: [phrasing, ...]}}")
    if INPUT in values:
        raise ConfigError(f"{path}: a style cannot be called {INPUT!r}, the name of each clip's own video")
    for name, phrasings in values.items():
        if not isinstance(phrasings, list) or not phrasings:
            raise ConfigError(f"{path}: the style {name!r} has no phrasings; expected [phrasing, ...]")
        for phrasing in phrasings:
            try:
                check_prompt(phrasing)
            except ConfigError as e:
                raise ConfigError(f"{path}: the style {name!r}: {e}") from e
    return [Style(name, tuple(phrasings)) for name, phrasings in values.items()]


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _video(folder: Path, stem: str) -> Path:
    for suffix in SUFFIXES:
        if (path := folder / f"{stem}{suffix}").is_file():
            return path
    raise ConfigError(f"{folder}: has no video {stem}{SUFFIXES[0]}, which {PROMPTS} and its clips ask for")


def read_clip(path: Path, height: int, width: int, most_frames: int | None) -> np.ndarray:
    """Returns a video's frames, uint8 [T, H, W, 3], scaled to a size.

    Raises:
      MediaError: it cannot be read.
    """
    with media.VideoReader(path, height, width, most_frames) as reader:
        return np.stack(list(reader))


def read_target(path: Path, like: np.ndarray, most_frames: int | None) -> np.ndarray:
    """Returns a target's frames, of the shape of its input's [T, H, W, 3].

    Raises:
      MediaError: it cannot be read, or has another length.
    """
    target = read_clip(path, like.shape[1], like.shape[2], most_frames)
    if len(target) != len(like):
        raise MediaError(f"{path}: has {len(target)} frames, its input {len(like)}; both must be as long")
    return target
