"""The host side of live streams: what to run when, frames in and out on time, and what became of each. No JAX."""
