"""CLIP as a judge of pictures: how near frames are to their prompt, and to the frames before.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision". The model is given
as ONNX files, as CLIP's ports to ONNX are published, and run by ONNX Runtime on the CPU.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from svd2_jax.errors import CheckpointError, ConfigError

FILES = ("vision_model.onnx", "text_model.onnx", "tokenizer.json")
BATCH = 16  # frames at once
TEXT_TOKENS = 77
# Mean and deviation of the pictures that CLIP was trained on, published with it; channels R, G, B in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipScores:
    """Cosines of CLIP's vectors, times 100.

    Attributes:
      prompt: mean of the frames with their prompt.
      neighbours: mean of the frames with the frame before.
    """

    prompt: float
    neighbours: float


class ClipModel:
    """Vectors of unit length for frames and texts."""

    def __init__(self, folder: Path):
        """Loads a model.

        Args:
          folder: holds `FILES`, the models directly or in a folder "onnx".

        Raises:
          ConfigError: ONNX Runtime is not installed.
          CheckpointError: a file is missing or cannot be loaded, or has no vectors as its output.
        """
        try:
            runtime: Any = importlib.import_module("onnxruntime")
        except ImportError as e:
            raise ConfigError('--clip needs ONNX Runtime: pip install "svd2-jax[clip]"') from e
        paths = [_find(folder, name) for name in FILES]
        from tokenizers import Tokenizer

        try:
            self._vision, self._text = (
                runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in paths[:2]
            )
            self._tokenizer = Tokenizer.from_file(str(paths[2]))
        except Exception as e:  # both libraries raise types of their own
            raise CheckpointError(f"{folder}: cannot be loaded as CLIP ({str(e).splitlines()[0]})") from e
        self._tokenizer.enable_truncation(TEXT_TOKENS)
        for model, output in ((self._vision, "image_embeds"), (self._text, "text_embeds")):
            if output not in [o.name for o in model.get_outputs()]:
                raise CheckpointError(
                    f"{folder}: the model has no output {output!r}; export it with projection"
                )
        size = self._vision.get_inputs()[0].shape[-1]
        self._size = size if isinstance(size, int) else 224

    def scores(self, frames: np.ndarray, prompt: str) -> ClipScores:
        """Returns how well frames, uint8 [T >= 2, H, W, 3], fit their prompt and each other."""
        seen, read = self.frames(frames), self.text(prompt)
        neighbours = (seen[1:] * seen[:-1]).sum(axis=1)
        return ClipScores(100.0 * float((seen @ read).mean()), 100.0 * float(neighbours.mean()))

    def frames(self, frames: np.ndarray) -> np.ndarray:
        """Returns vectors, float32 [T, E], of frames, uint8 [T, H, W, 3]."""
        (pixels,) = self._vision.get_inputs()
        parts = []
        for start in range(0, len(frames), BATCH):
            batch = np.stack([self._pixels(frame) for frame in frames[start : start + BATCH]])
            parts.append(self._vision.run(["image_embeds"], {pixels.name: batch})[0])
        return _unit(np.concatenate(parts))

    def text(self, prompt: str) -> np.ndarray:
        """Returns the vector, float32 [E], of a text."""
        tokens = self._tokenizer.encode(prompt)
        known = {"input_ids": tokens.ids, "attention_mask": tokens.attention_mask}
        wanted = {i.name: np.array([known[i.name]], np.int64) for i in self._text.get_inputs()}
        return _unit(self._text.run(["text_embeds"], wanted)[0])[0]

    def _pixels(self, frame: np.ndarray) -> np.ndarray:
        """Returns the square in the middle of a frame as the model takes it, float32 [3, S, S]."""
        height, width, _ = frame.shape
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        square = Image.fromarray(frame).resize(
            (self._size, self._size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
        )
        unit = np.asarray(square, np.float32) / 255.0
        scaled = (unit - np.asarray(PIXEL_MEAN, np.float32)) / np.asarray(PIXEL_STD, np.float32)
        return scaled.transpose(2, 0, 1)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / "onnx" / name):
        if path.is_file():
            return path
    raise CheckpointError(
        f"{folder}: has no {name}; expected CLIP exported to ONNX: {', '.join(FILES[:2])} (there or in onnx/) and "
        f"{FILES[2]}"
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors [N, E] divided by their lengths."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
