"""StreamDiffusionV2 in JAX: live video re-drawn to a text prompt."""
