"""Training of the small model that ships with the package; see `scripts/train_tiny.py`."""
