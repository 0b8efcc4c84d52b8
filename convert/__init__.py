"""Converts published PyTorch checkpoints into the checkpoint folder that svd2_jax loads."""
