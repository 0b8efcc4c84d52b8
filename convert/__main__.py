"""`python -m convert`, which is `svd2 convert`."""

import sys

from svd2_jax.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
