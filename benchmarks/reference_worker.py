"""Runs the PyTorch implementation for `svd2 bench --against reference`, in the environment of its own.

Reads one JSON object a line from standard input and answers each with one on standard output:

  {"do": "make", "folder": F, "model": SIZES}   writes random weights in the layouts that are published
  {"do": "load", "folder": F, "model": SIZES, "stream": SETTINGS, "dtype": D, "threads": N, "inputs": NPZ,
   "device": "cpu" or "cuda", "noise_scale": X}
  {"do": "prepare", "part": P, "times": N}      P is one of the keys of BENCHMARKS; starts a new stream
  {"do": "sample"}                              runs the part N times: {"seconds": S}, each time
  {"do": "result", "file": NPY}                 writes what it gave last, laid out like svd2's

Every Gaussian is zero, as it is on the other side: results can be compared, and nobody pays for drawing.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from models.wan import wan_wrapper
from models.wan.causal_model import CausalWanModel
from models.wan.causal_stream_inference import CausalStreamInferencePipeline
from models.wan.flow_match import FlowMatchScheduler
from models.wan.taehv_wrapper import TAEHV, TAEHVWanVAEWrapper
from models.wan.wan_base.modules.t5 import T5Encoder
from models.wan.wan_base.modules.vae import WanVAE_
from models.wan.wan_wrapper import CausalWanDiffusionWrapper, WanVAEWrapper

# What reads videos is not needed; last, as others ask whether it is there.
for _name in ("av", "torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules.setdefault(_name, types.ModuleType(_name))

from streamv2v.inference import compute_noise_scale_and_step

VAE_FILE, TEXT_FILE, TAEHV_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "taew2_1.pth"
FRAMES_PER_LATENT = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# --- modules in the sizes asked for


def transformer(sizes: dict) -> CausalWanModel:
    """Returns the causal transformer."""
    d = sizes["dit"]
    return CausalWanModel(
        model_type="t2v", patch_size=tuple(d["patch"]), text_len=d["text_len"], in_dim=d["in_channels"],
        dim=d["dim"], ffn_dim=d["ffn_dim"], freq_dim=d["freq_dim"], text_dim=d["text_dim"],
        out_dim=d["out_channels"], num_heads=d["num_heads"], num_layers=d["num_layers"], eps=d["eps"],
    )  # fmt: skip


def vae(sizes: dict) -> WanVAE_:
    """Returns the VAE."""
    v = sizes["vae"]
    return WanVAE_(
        dim=v["dim"], z_dim=v["z_dim"], dim_mult=list(v["dim_mult"]), num_res_blocks=v["num_res_blocks"],
        attn_scales=[], temperal_downsample=list(v["temporal_downsample"]),
    )  # fmt: skip


def text_encoder(sizes: dict) -> T5Encoder:
    """Returns the text encoder."""
    t = sizes["text"]
    return T5Encoder(
        vocab=t["vocab"], dim=t["dim"], dim_attn=t["dim_attn"], dim_ffn=t["dim_ffn"], num_heads=t["num_heads"],
        num_layers=t["num_layers"], num_buckets=t["num_buckets"], shared_pos=False,
    )  # fmt: skip


class BlankTAEHV(TAEHV):
    """The small decoder without a file of weights."""

    def patch_tgrow_layers(self, state_dict):
        return self.state_dict()


def randomise(module: torch.nn.Module) -> dict:
    """Draws weights that keep activations in range; returns them."""
    with torch.no_grad():
        for name, x in module.named_parameters():
            if name.endswith("gamma") or (x.ndim == 1 and name.endswith("weight")):
                x.normal_(1.0, 0.1)  # of a norm
            elif x.ndim == 1:
                x.normal_(0.0, 0.02)
            else:
                x.normal_().div_(max(1, x[0].numel()) ** 0.5)
    return module.state_dict()


def make(folder: str, model: dict) -> dict:
    """Writes random weights: a Wan2.1 folder, StreamDiffusionV2's transformer and TAEHV."""
    torch.manual_seed(0)
    place, d = Path(folder), model["dit"]
    generator = {f"model.{name}": x for name, x in randomise(transformer(model)).items()}
    torch.save({"generator": generator}, place / "model.pt")
    names = {"in_channels": "in_dim", "out_channels": "out_dim"}
    config = {names.get(key, key): value for key, value in d.items() if key != "patch"}
    (place / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v", **config}))
    torch.save(randomise(vae(model)), place / VAE_FILE)
    torch.save(randomise(text_encoder(model)), place / TEXT_FILE)
    torch.save({}, place / TAEHV_FILE)
    torch.save(randomise(BlankTAEHV(place / TAEHV_FILE)), place / TAEHV_FILE)
    return {}


# --- the implementation's own classes around them, without the sizes that they take for granted


def bare(kind: type, **attributes):
    """Returns an object of a module class whose `__init__` would read published files."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Pipeline(CausalStreamInferencePipeline):
    """The stream batch with caches for any head width and prompt length."""

    def _initialize_kv_cache(self, batch_size, dtype, device):
        model, steps = self.generator.model, len(self.denoising_step_list)
        shape = batch_size, self.kv_cache_length, self.num_heads, model.dim // self.num_heads
        for block in model.blocks:
            block.self_attn.sink_size, block.self_attn.adapt_sink_thr = (
                self.num_sink_tokens,
                self.adapt_sink_threshold,
            )
            block.self_attn.evict_idx = None  # else it would be that of the stream before
        self.kv_cache1 = [
            {
                "k": torch.zeros(shape, dtype=dtype, device=device),
                "v": torch.zeros(shape, dtype=dtype, device=device),
                "global_end_index": torch.tensor([0]), "local_end_index": torch.tensor([0]),
                "total_steps": steps, "current_step": steps,
            }
            for _ in model.blocks
        ]  # fmt: skip

    def _initialize_crossattn_cache(self, batch_size, dtype, device):
        model = self.generator.model
        shape = batch_size, model.text_len, self.num_heads, model.dim // self.num_heads
        self.crossattn_cache = [
            {
                "k": torch.zeros(shape, dtype=dtype, device=device),
                "v": torch.zeros(shape, dtype=dtype, device=device),
                "is_init": False,
            }
            for _ in model.blocks
        ]


class Stream:
    """One model with its parts; a part starts a new stream and is a function to repeat."""

    def __init__(self, folder, model, stream, dtype, device, threads, inputs, noise_scale):
        torch.set_num_threads(threads)
        torch.randn_like = torch.zeros_like
        self.device = device
        self.model, self.cfg, self.dtype, self.noise_scale = model, stream, DTYPES[dtype], noise_scale
        place = Path(folder)

        def loaded(module, file, prefix=""):
            state = torch.load(place / file, map_location="cpu", weights_only=True)
            state = {name.removeprefix("model."): x for name, x in state.get("generator", state).items()}
            module.load_state_dict(state)
            return module.to(device, self.dtype).eval().requires_grad_(False)

        self.generator = bare(CausalWanDiffusionWrapper, model=loaded(transformer(model), "model.pt"))
        self.generator.uniform_timestep, self.generator.seq_len = False, 32760
        self.generator.scheduler = FlowMatchScheduler(shift=8.0, sigma_min=0.0, extra_one_step=True)
        self.generator.scheduler.set_timesteps(1000, training=True)
        self.generator.post_init()
        wan_wrapper._video_vae = lambda **_: loaded(vae(model), VAE_FILE)
        self.vae = WanVAEWrapper()
        taehv = TAEHV(place / TAEHV_FILE).to(device, self.dtype).eval().requires_grad_(False)
        self.taehv = bare(
            TAEHVWanVAEWrapper, taehv=taehv, model=types.SimpleNamespace(first_decode=True), parallel_decode=False,
            use_tensorrt=False, decode_context_latents=3, _decode_latent_cache=None,
        )  # fmt: skip
        with np.load(inputs) as arrays:
            self.inputs = {name: torch.from_numpy(arrays[name]).to(device) for name in arrays.files}

    def frames(self, name: str) -> torch.Tensor:
        """Returns uint8 [T, H, W, C] as [1, C, T, H, W] in [-1, 1]."""
        x = self.inputs[name].permute(3, 0, 1, 2)[None].float()
        return (x / 127.5 - 1).to(self.dtype).contiguous()

    def latents(self, name: str) -> torch.Tensor:
        """Returns [F, h, w, C] as [1, F, C, h, w]."""
        return self.inputs[name].permute(0, 3, 1, 2)[None].to(self.dtype).contiguous()

    # The three stages as streamv2v.inference.SingleGPUInferencePipeline runs them, in the dtype asked for.

    def encoder(self):
        self.vae.model.first_encode = True
        scale, last = self.noise_scale, self.frames("first")[:, :, [-1]]

        def noisy(frames):
            latents = self.vae.stream_encode(frames).transpose(2, 1).contiguous().to(self.dtype)
            return torch.randn_like(latents) * scale + latents * (1 - scale)

        first = noisy(self.frames("first"))

        def run(frames):
            nonlocal scale, last
            count = frames.shape[2]
            scale, step = compute_noise_scale_and_step(
                torch.cat([last, frames], dim=2), count + 1, count, float(scale), self.noise_scale
            )
            last = frames[:, :, [-1]]
            return noisy(frames), step

        return first, run

    def denoiser(self, first: torch.Tensor):
        c, heads = self.cfg, self.model["dit"]["num_heads"]
        tokens = (c["height"] // 16) * (c["width"] // 16)
        pipeline = bare(
            Pipeline, generator=self.generator, scheduler=self.generator.get_scheduler(), num_heads=heads,
            num_transformer_blocks=len(self.generator.model.blocks), frame_seq_length=tokens,
            kv_cache_length=tokens * c["cache_frames"], num_sink_tokens=c["sink_frames"],
            adapt_sink_threshold=c["sink_threshold"], num_frame_per_block=c["frames_per_block"],
            denoising_step_list=torch.tensor(c["timesteps"], device=self.device), kv_cache1=None, crossattn_cache=None,
        )  # fmt: skip
        self.generator.model.num_frame_per_block = c["frames_per_block"]
        pipeline.text_encoder = lambda text_prompts: {
            "prompt_embeds": self.inputs["embedding"].to(self.dtype)
        }
        start = tokens * first.shape[1]
        chunk = tokens * c["frames_per_block"]
        clean = pipeline.prepare(
            [""], self.device, self.dtype, noise=first, current_start=0, current_end=start
        )

        def run(noisy, step=None):
            nonlocal start
            if start // tokens >= c["rope_refresh"]:
                start = pipeline.kv_cache_length - tokens
            rows = pipeline.inference_stream(noisy, start, start + chunk, step)
            start += chunk
            return rows

        return clean, run

    def decoder(self, name: str, first: torch.Tensor):
        def unit_range(video):  # as _decode_video_array
            video = (video.float() * 0.5 + 0.5).clamp(0, 1)
            return video[0].permute(0, 2, 3, 1).contiguous().float().cpu().numpy()

        if name == "taehv":
            self.taehv.model.first_decode = True
            run = lambda latents: unit_range(self.taehv.stream_decode_to_pixel(latents))  # noqa: E731
        else:
            self.vae.model.first_decode = True
            mean, std = (x.to(self.device, self.dtype) for x in (self.vae.mean, self.vae.std))

            def run(latents):  # stream_decode_to_pixel, but not in bfloat16 always
                video = self.vae.model.stream_decode(latents.permute(0, 2, 1, 3, 4), [mean, 1.0 / std])
                return unit_range(video.float().clamp_(-1, 1).permute(0, 2, 1, 3, 4))

        run(first)
        return run

    # --- parts

    def encode_part(self):
        _, run = self.encoder()
        frames = self.frames("chunk")
        return lambda: run(frames)[0], lambda x: x[0].permute(0, 2, 3, 1)

    def tick_part(self):
        _, run = self.denoiser(self.latents("first_latents"))
        noisy = self.latents("latents")
        return lambda: run(noisy), lambda x: x[-1].permute(0, 2, 3, 1)

    def decode_part(self, name):
        run = self.decoder(name, self.latents("first_latents"))
        latents = self.latents("latents")
        return lambda: run(latents), lambda x: torch.from_numpy(np.round(255 * x))

    def stream_part(self):
        first, encode = self.encoder()
        clean, denoise = self.denoiser(first)
        decode = self.decoder(self.cfg["decoder"], clean)

        def run():
            noisy, step = encode(self.frames("chunk"))  # from uint8: svd2's session is given that as well
            return decode(denoise(noisy, step)[[-1]])

        return run, None


BENCHMARKS = {
    "encode": Stream.encode_part,
    "tick": Stream.tick_part,
    "decode-wan": lambda stream: stream.decode_part("wan"),
    "decode-taehv": lambda stream: stream.decode_part("taehv"),
    "stream": Stream.stream_part,
}


class Worker:
    """What the requests change."""

    def make(self, **request) -> dict:
        return make(**request)

    def load(self, **request) -> dict:
        self.stream = Stream(**request)
        return {"parts": list(BENCHMARKS), "torch": torch.__version__}

    def wait(self) -> None:
        if self.stream.device == "cuda":
            torch.cuda.synchronize()

    def prepare(self, part: str, times: int) -> dict:
        self.times = times
        self.run, self.layout = BENCHMARKS[part](self.stream)
        return {}

    def sample(self) -> dict:
        self.wait()
        started = time.perf_counter()
        for _ in range(self.times):
            self.last = self.run()
        self.wait()
        return {"seconds": (time.perf_counter() - started) / self.times}

    def result(self, file: str) -> dict:
        if self.layout is None:
            return {"compared": False}
        np.save(file, self.layout(self.last).float().cpu().numpy())
        return {"compared": True}


def main() -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the implementation prints goes elsewhere
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
