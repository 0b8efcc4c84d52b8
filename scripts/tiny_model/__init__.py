"""Synthetic training pairs: moving scenes, styles made by classical image processing, and prompts for them."""

from typing import Literal

Split = Literal["train", "held_out"]
"""What is trained on, and what is kept to see how well it went."""
