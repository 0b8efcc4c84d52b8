"""Synthetic training pairs: moving scenes, looks made by classical image processing, and prompts for them."""
