"""The PyTorch implementation as a rival: it runs in a process and an environment of its own, on the same weights."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from svd2_jax import shipped
from svd2_jax.bench.benchmarks import Bench
from svd2_jax.bench.timing import Sample
from svd2_jax.config import ModelConfig
from svd2_jax.errors import ConfigError, EngineError

WORKER = Path(__file__).parents[2] / "benchmarks" / "reference_worker.py"
SHIPPED_VOCAB = 1024  # tokens of the shipped tokenizer


class ReferenceProcess:
    """A worker process; see `benchmarks/reference_worker.py` for what it is asked."""

    parts: Sequence[str] = ()

    def __init__(self, environment: Path):
        """Starts the worker.

        Args:
          environment: the folder that `scripts/reference_venv.sh` made.

        Raises:
          ConfigError: there is no such environment, or no worker beside this package.
        """
        python = environment / "bin" / "python"
        if not python.exists():
            raise ConfigError(
                f"{environment}: no virtual environment; make it with `bash scripts/reference_venv.sh {environment}`"
            )
        if not WORKER.exists():
            raise ConfigError(
                f"{WORKER}: not found; --against reference works in a checkout of the repository"
            )
        self._scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self._scratch.name) / "weights"
        self.folder.mkdir()
        self._log = (self.folder / "worker.log").open("w+")
        self._process = subprocess.Popen(
            [python, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def make_checkpoint(self, model: ModelConfig, dtype: str) -> Path:
        """Has random weights written in the published layouts; returns them converted."""
        from convert import convert_checkpoint

        text = dataclasses.replace(
            model.text, num_layers=1, vocab=SHIPPED_VOCAB
        )  # random weights know no language
        self._model = dataclasses.replace(model, text=text).to_dict()
        self._ask(do="make", folder=str(self.folder), model=self._model)
        return convert_checkpoint(
            out=Path(self._scratch.name) / "checkpoint",
            generator=self.folder / "model.pt",
            wan=self.folder,
            taehv=self.folder / "taew2_1.pth",
            tokenizer=shipped.checkpoint_folder(shipped.TINY) / "tokenizer",
            dtype=dtype,
            progress=False,
        )

    def load(self, bench: Bench, threads: int) -> str:
        """Loads the weights and the inputs; returns what the worker runs on."""
        inputs, platform = self.folder / "inputs.npz", bench.engine.mesh.home.platform
        np.savez(inputs, **dataclasses.asdict(bench.inputs))
        answer = self._ask(
            do="load", folder=str(self.folder), model=self._model, stream=bench.cfg.to_dict(),
            dtype=bench.engine.dtype.name, device="cuda" if platform == "gpu" else "cpu", threads=threads,
            inputs=str(inputs), noise_scale=bench.spec.noise_scale,
        )  # fmt: skip
        self.parts = answer["parts"]
        return f"torch {answer['torch']}"

    def prepare(self, name: str, times: int) -> None:
        """See `run.Rival`."""
        self._ask(do="prepare", part=name, times=times)

    def sample(self) -> Sample:
        """See `run.Rival`; a call returns when its result is there."""
        seconds = self._ask(do="sample")["seconds"]
        return Sample(seconds, seconds)

    def result(self) -> np.ndarray | None:
        """See `run.Rival`."""
        file = self.folder / "result.npy"
        return np.load(file) if self._ask(do="result", file=str(file))["compared"] else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._scratch.cleanup()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise EngineError(f"the reference failed to {request['do']}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        return (self._log.read().strip().splitlines() or ["it ended without a word"])[-1]
