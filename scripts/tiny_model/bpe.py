"""The small model's own tokenizer: byte-level BPE over the training prompts, lower case only."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from svd2_jax.engine.tokenizer import TOKENIZER_FILE
from tiny_model import phrasings

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
CONFIG_FILE = "tokenizer_config.json"


def train_tokenizer(folder: Path, vocab: int) -> None:
    """Writes a tokenizer of at most `vocab` tokens as a Hugging Face folder."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(phrasings.all_text(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    names = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
    (folder / CONFIG_FILE).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
