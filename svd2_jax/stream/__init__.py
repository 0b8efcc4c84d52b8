"""The streaming step as pure functions of (params, state, inputs)."""
