"""Noise schedule and motion-aware noise."""
