"""`svd2 demo`: see it work in a minute, nothing to download.

examples:
  svd2 demo --out out
  svd2 demo --input in.mp4 --prompt "a watercolour painting" --prompt "thermal camera" --out out

Re-draws a short clip with the small model that comes with the package, with two changes of prompt on the way, and
writes demo.mp4, input beside output, and demo.png, a contact sheet.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from svd2_jax import files, media, shipped
from svd2_jax.api import check_prompt
from svd2_jax.cli import device
from svd2_jax.cli.options import EngineOptions, NoiseOptions, OptionGroup, StreamOptions, option
from svd2_jax.errors import ConfigError, MediaError
from svd2_jax.text import counted

PROMPTS = ("a neon city at night", "an oil painting", "a pencil sketch")
HEIGHT = 384  # pixels of the picture, about: small frames are enlarged


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `svd2 demo` takes."""

    engine: EngineOptions
    input: Path = option("video to re-draw (default: a cat)", shipped.DEMO_CLIP)
    prompt: tuple[str, ...] = option(
        "what it should look like; given several times, the clip is cut into as many equal parts, one prompt each "
        f"(default: {', '.join(PROMPTS)})",
        metavar="TEXT",
    )
    frames: int | None = option("of the clip (default: all)")
    out: Path = option("folder for the results (default %(default)s)", Path("out"), metavar="FOLDER")
    noise: NoiseOptions
    stream: StreamOptions


def run(options: Options) -> int:
    """Writes the video and a contact sheet."""
    import numpy as np

    if options.frames is not None and options.frames < 1:
        raise ConfigError(f"--frames must be at least 1, got {options.frames}")
    video, sheet = options.out / "demo.mp4", options.out / "demo.png"
    files.check_apart(
        [("--out", video), ("--out", sheet)],
        [("--input", options.input), ("--config", options.stream.config)],
    )
    cfg, texts = options.stream.stream(options.engine.sizes), options.prompt or PROMPTS
    for text in texts:
        check_prompt(text)
    options.engine.note_untrained(options.noise.noise_scale, texts)
    with media.VideoReader(options.input, cfg.height, cfg.width, options.frames) as reader:
        clip, fps = list(reader), reader.fps
    if len(clip) < len(texts):
        raise ConfigError(
            f"{len(texts)} prompts cannot share {counted(len(clip), 'frame')}; give fewer prompts or more frames"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise MediaError(f"{options.out}: cannot be made ({os.strerror(e.errno or 0)})") from e
    prompts = {round(i * len(clip) / len(texts)): text for i, text in enumerate(texts)}
    scale = max(1, round(HEIGHT / cfg.height))
    height = cfg.height * scale + media.CAPTION_HEIGHT
    writer = media.VideoWriter(video, fps, height, 2 * cfg.width * scale)
    shown: list[np.ndarray] = []

    def beside_input(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for chunk in chunks:
            pairs = []
            for frame in chunk:
                prompt = prompts[max(at for at in prompts if at <= len(shown))]
                pairs.append(media.side_by_side(clip[len(shown)], frame, prompt, scale))
                shown.append(frame)
            yield np.stack(pairs)

    spec, mesh = options.noise.spec(prompts[0], cfg), device.meshes()[0]
    with device.open_session(options.engine, spec, mesh, len(clip)) as session:
        changes = {frame: prompt for frame, prompt in prompts.items() if frame}
        device.write(beside_input(session.run(clip, prompts=changes)), writer, len(clip))
    media.contact_sheet(sheet, clip, shown, prompts)
    print(f"{sheet}: input above output, prompts as captions")
    return 0
