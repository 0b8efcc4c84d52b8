"""Layers shared by the models: attention, rotary embedding, rolling KV cache, causal convolution."""
