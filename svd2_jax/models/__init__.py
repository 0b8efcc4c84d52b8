"""Networks as Flax modules that hold parameters only; caches and states are arguments and results."""
