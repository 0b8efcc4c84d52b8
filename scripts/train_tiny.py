"""Trains the small model that ships with the package, from nothing but two packages' sample photographs.

python scripts/train_tiny.py --out runs/tiny
python scripts/train_tiny.py --out runs/tiny --only vae      # one part: vae, transformer, export
python scripts/train_tiny.py --quick                         # all parts in a few minutes, for a look at the mechanics

Interrupt it at any time: it goes on where it was saved last. Needs `pip install -e ".[train]"`.
"""

import sys

from svd2_jax.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
