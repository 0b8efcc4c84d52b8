"""The published names and shapes of the weights, written out, for checkpoints of any size."""

from svd2_jax.config import DiTConfig, TextConfig

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, inp: int) -> Shapes:
    return {f"{name}.weight": (out, inp), f"{name}.bias": (out,)}


def wan_dit(cfg: DiTConfig) -> Shapes:
    """Wan2.1's own names, as in StreamDiffusionV2, Self-Forcing and CausVid checkpoints."""
    e, m = cfg.dim, cfg.ffn_dim
    shapes = {
        "patch_embedding.weight": (e, cfg.in_channels, *cfg.patch),
        "patch_embedding.bias": (e,),
        **linear("text_embedding.0", e, cfg.text_dim),
        **linear("text_embedding.2", e, e),
        **linear("time_embedding.0", e, cfg.freq_dim),
        **linear("time_embedding.2", e, e),
        **linear("time_projection.1", 6 * e, e),
    }
    for n in range(cfg.num_layers):
        block = f"blocks.{n}"
        shapes[f"{block}.modulation"] = (1, 6, e)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes |= linear(f"{block}.{attention}.{part}", e, e)
            for norm in ("norm_q", "norm_k"):
                shapes[f"{block}.{attention}.{norm}.weight"] = (e,)
        shapes |= {f"{block}.norm3.weight": (e,), f"{block}.norm3.bias": (e,)}
        shapes |= linear(f"{block}.ffn.0", m, e) | linear(f"{block}.ffn.2", e, m)
    shapes["head.modulation"] = (1, 2, e)
    return shapes | linear("head.head", cfg.out_channels * cfg.patch[1] * cfg.patch[2], e)


_DIFFUSERS_NAMES = (
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("head.modulation", "scale_shift_table"),
    ("head.head.", "proj_out."),
    (".modulation", ".scale_shift_table"),
    (".self_attn.", ".attn1."),
    (".cross_attn.", ".attn2."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
    (".norm3.", ".norm2."),
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
)


def diffusers_name(name: str) -> str:
    """The name that Diffusers' WanTransformer3DModel gives to a Wan parameter."""
    for wan, diffusers in _DIFFUSERS_NAMES:
        name = name.replace(wan, diffusers)
    return name


def umt5(cfg: TextConfig) -> Shapes:
    """Names of models_t5_umt5-xxl-enc-bf16.pth."""
    shapes: Shapes = {"token_embedding.weight": (cfg.vocab, cfg.dim), "norm.weight": (cfg.dim,)}
    for n in range(cfg.num_layers):
        block = f"blocks.{n}"
        shapes |= {
            f"{block}.norm1.weight": (cfg.dim,),
            f"{block}.norm2.weight": (cfg.dim,),
            **{f"{block}.attn.{p}.weight": (cfg.dim_attn, cfg.dim) for p in "qkv"},
            f"{block}.attn.o.weight": (cfg.dim, cfg.dim_attn),
            f"{block}.pos_embedding.embedding.weight": (cfg.num_buckets, cfg.num_heads),
            f"{block}.ffn.gate.0.weight": (cfg.dim_ffn, cfg.dim),
            f"{block}.ffn.fc1.weight": (cfg.dim_ffn, cfg.dim),
            f"{block}.ffn.fc2.weight": (cfg.dim, cfg.dim_ffn),
        }
    return shapes


def conv(name: str, out: int, inp: int) -> Shapes:
    """A 3x3 convolution with bias."""
    return {f"{name}.weight": (out, inp, 3, 3), f"{name}.bias": (out,)}
