"""Run by test_processes.py: one of several processes, with a device each, that read what they need of checkpoints.

python reads_its_part.py PORT PROCESS_ID PROCESSES FILE CHECKPOINT=SPLIT ...

Prints the items that were read, a line for each split. The last process also asks for a writer of checkpoints, and
waits for FILE before it meets the others.
"""

import os
import sys
import time
from pathlib import Path

from jax.sharding import SingleDeviceSharding

from svd2_jax.engine import cluster
from svd2_jax.engine.checkpoint import Checkpoint, CheckpointWriter
from svd2_jax.engine.mesh import stage_meshes
from svd2_jax.engine.params import StageWeights
from svd2_jax.errors import CheckpointError


def main():
    port, process, processes, file, *cases = sys.argv[1:]
    me, count = int(process), int(processes)
    with cluster.join(f"localhost:{port}", me, count, say_s=1) as group:
        for case in cases:
            path, _, split = case.partition("=")
            print(*read(Checkpoint.open(path), tuple(map(int, split.split(",")))), flush=True)
        if me == count - 1:
            try:
                CheckpointWriter(f"{path}.copy")
            except CheckpointError as e:
                print(e)
            while not Path(file).exists():
                time.sleep(0.05)
        group.meet()


def read(checkpoint, split):
    items = []

    def read_item(item, device):
        items.append(item)
        return checkpoint.restore(item, SingleDeviceSharding(device))

    (mesh,) = stage_meshes(1, len(split))
    StageWeights(checkpoint.manifest.model, read_item, mesh).params(split, "wan")
    return items


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # JAX reads these when it opens its devices
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    main()
