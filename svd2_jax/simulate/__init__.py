"""The scheduler under a virtual clock: no model, hours of streams in seconds, the same policy as live. No JAX."""
