"""Plays a file or a camera as a live source through the scheduler, several streams if asked for: `svd2 live`.

python scripts/stream_demo.py --input in.mp4 --loop --fps 8 \
    --prompt "a watercolour painting" --output out.mp4 --metrics out.jsonl --chart out.png
python scripts/stream_demo.py --help
"""

import sys

from svd2_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["live", *sys.argv[1:]]))
