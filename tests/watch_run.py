"""What both processes of a test do: watch a model that is wrapped by DDP or split by FSDP2, in a training step.

    torchrun --standalone --nproc_per_node 2 tests/watch_run.py FOLDER FAMILY ENGINE

Process 0 leaves the sums of both in `FOLDER/sums.pt`.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_compressm.families import find_layers
from hf_compressm.families.watching import watching
from tests.family_table import LRU, MAMBA, MAMBA2, S5, XLSTM
from tests.launched_run import leave


FAMILIES = {"lru": LRU, "mamba": MAMBA, "mamba2": MAMBA2, "s5": S5, "xlstm": XLSTM}


def main(folder: Path, name: str, engine: str) -> None:
    dist.init_process_group("gloo")
    family, rank = FAMILIES[name], dist.get_rank()
    model = family.build().train()
    layers = find_layers(model)
    if engine == "fsdp2":
        for layer in layers:
            fully_shard(layer.module)
        fully_shard(model)
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model)
    watched = [(layer, layer.family.statistics(layer.module, family.criteria[0])) for layer in layers]
    with watching(model, watched):
        wrapped(**family.batch(seed=rank)).loss.backward()
    seen = [None, None]
    dist.all_gather_object(seen, [item.sums for _, item in watched])
    if rank == 0:
        torch.save(seen, folder / "sums.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
