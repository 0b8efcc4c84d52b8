"""UMT5's encoder: the names in Wan2.1's file and in a Hugging Face folder, and the leaves they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convert.rules import Rule, transpose
from svd2_jax.config import TextConfig
from svd2_jax.errors import ConversionError

_BLOCK = "text.block.{n:03d}"

RULES: tuple[Rule, ...] = (
    Rule(r"token_embedding\.weight", "text.embed/embedding"),
    Rule(r"blocks\.(?P<n>\d+)\.norm1\.weight", f"{_BLOCK}/norm_attn/scale"),
    Rule(r"blocks\.(?P<n>\d+)\.attn\.(?P<part>[qkvo])\.weight", f"{_BLOCK}/attn/{{part}}/kernel", transpose),
    Rule(r"blocks\.(?P<n>\d+)\.pos_embedding\.embedding\.weight", f"{_BLOCK}/attn/position_bias"),
    Rule(r"blocks\.(?P<n>\d+)\.norm2\.weight", f"{_BLOCK}/norm_mlp/scale"),
    Rule(r"blocks\.(?P<n>\d+)\.ffn\.gate\.0\.weight", f"{_BLOCK}/mlp/gate/kernel", transpose),
    Rule(r"blocks\.(?P<n>\d+)\.ffn\.fc1\.weight", f"{_BLOCK}/mlp/up/kernel", transpose),
    Rule(r"blocks\.(?P<n>\d+)\.ffn\.fc2\.weight", f"{_BLOCK}/mlp/down/kernel", transpose),
    Rule(r"norm\.weight", "text.head/norm/scale"),
)

_HF_BLOCK = r"encoder\.block\.(?P<n>\d+)\.layer"
_HF_ATTENTION = rf"{_HF_BLOCK}\.0\.SelfAttention"
_HF_MLP = rf"{_HF_BLOCK}\.1\.DenseReluDense"

HUGGING_FACE_RULES: tuple[Rule, ...] = (
    Rule(r"shared\.weight", "text.embed/embedding"),
    Rule(rf"{_HF_BLOCK}\.0\.layer_norm\.weight", f"{_BLOCK}/norm_attn/scale"),
    Rule(rf"{_HF_ATTENTION}\.(?P<part>[qkvo])\.weight", f"{_BLOCK}/attn/{{part}}/kernel", transpose),
    Rule(rf"{_HF_ATTENTION}\.relative_attention_bias\.weight", f"{_BLOCK}/attn/position_bias"),
    Rule(rf"{_HF_BLOCK}\.1\.layer_norm\.weight", f"{_BLOCK}/norm_mlp/scale"),
    Rule(rf"{_HF_MLP}\.wi_0\.weight", f"{_BLOCK}/mlp/gate/kernel", transpose),
    Rule(rf"{_HF_MLP}\.wi_1\.weight", f"{_BLOCK}/mlp/up/kernel", transpose),
    Rule(rf"{_HF_MLP}\.wo\.weight", f"{_BLOCK}/mlp/down/kernel", transpose),
    Rule(r"encoder\.final_layer_norm\.weight", "text.head/norm/scale"),
)

# A second name of the token embedding in some Hugging Face files.
HUGGING_FACE_IGNORED: tuple[str, ...] = (r"encoder\.embed_tokens\.weight",)


def infer_config(shapes: Mapping[str, Sequence[int]]) -> TextConfig:
    """Returns the sizes that the shapes of either layout's tensors imply.

    Raises:
      ConversionError: they are not those of a UMT5 encoder.
    """
    if "shared.weight" in shapes:
        table, block = "shared.weight", "encoder.block.{n}.layer"
        parts = ("0.SelfAttention.q", "1.DenseReluDense.wi_0", "0.SelfAttention.relative_attention_bias")
    else:
        table, block = "token_embedding.weight", "blocks.{n}"
        parts = ("attn.q", "ffn.gate.0", "pos_embedding.embedding")
    q, gate, bias = (f"{block.format(n=0)}.{part}.weight" for part in parts)
    missing = [name for name in (table, q, gate, bias) if name not in shapes]
    if missing:
        raise ConversionError(f"not a UMT5 encoder: {', '.join(missing)} missing among {len(shapes)} tensors")
    layers = 0
    while f"{block.format(n=layers)}.{parts[0]}.weight" in shapes:
        layers += 1
    return TextConfig(
        vocab=int(shapes[table][0]),
        dim=int(shapes[table][1]),
        dim_attn=int(shapes[q][0]),
        dim_ffn=int(shapes[gate][0]),
        num_heads=int(shapes[bias][1]),
        num_layers=layers,
        num_buckets=int(shapes[bias][0]),
    )
