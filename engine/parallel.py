"""Several processes, one run: what they agree on before a step, and how their gradients become one.

    torchrun --nproc_per_node 8 train.py             data parallel: each process holds the whole model
    torchrun --nproc_per_node 8 train.py --fsdp      FSDP2: weights, gradients and moments are sharded, block by block

Every process ("rank") draws the same path and the same batch from (seed, step), and trains on its own share of the batch.
Data parallel needs one all-reduce a step, over the gradients of the layers that ran: what is skipped is not sent. (DDP would
send it all, or hang: it wants the same parameters used at every step.) Under FSDP2 a skipped block is never gathered.
With one process nothing here communicates, and torch.distributed is not started.
Not here: the loop (train.py).
"""

import hashlib
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor


class Disagreement(Exception):
    """The ranks are not doing the same thing; nothing was updated."""


class Left(Exception):
    """Another rank has left with an exit code, which is the argument; it has said why."""


class Ranks:
    """The processes of this run, as torchrun started them: `rank` of `size`.

    device: where the model lives. timeout: seconds to wait for the others, at each exchange.
    """

    def __init__(self, device, timeout):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.step = torch.device(device), 0
        if self.size == 1:
            return
        backend = "gloo"
        if device == "cuda":
            local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            self.device = torch.device("cuda", local % there)
            torch.cuda.set_device(self.device)
            crowded = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > there  # NCCL wants a GPU for each
            backend = "cpu:gloo,cuda:gloo" if crowded else "cpu:gloo,cuda:nccl"
        self.store = dist.PrefixStore(
            f"raptr{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", next(dist.rendezvous("env://"))[0]
        )
        wait = timedelta(seconds=timeout)
        dist.init_process_group(backend, timeout=wait, world_size=self.size, rank=self.rank, store=self.store)

    # --- agreeing ---------------------------------------------------------------------------------------------------

    def gather(self, *numbers, code=0):
        """Up to three numbers of every rank, as [(a, b, c), ...] by rank, with 0 for those not given if there are several ranks.
        Raises Left if a rank has left."""
        if self.size == 1:
            return [numbers]
        own = torch.tensor([code, *numbers, *[0] * (3 - len(numbers))], dtype=torch.float64)  # exact up to 2^53
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        codes, seen = [int(part[0]) for part in parts], [tuple(part[1:].tolist()) for part in parts]
        if any(codes):
            worst = min(code for code in codes if code)  # 75, stopped and saved, is the mildest
            raise Left(worst, codes.index(worst))
        return seen

    def agree(self, step, subnetwork, stop):
        """Whether any rank wants to stop. Raises Disagreement unless all are at this step with this subnetwork."""
        self.step = step
        if self.size == 1:
            return stop
        path = int.from_bytes(hashlib.sha256(repr(subnetwork).encode()).digest()[:6], "big")
        seen = self.gather(step, path, stop)
        for rank, (their_step, their_path, _) in enumerate(seen):
            if (their_step, their_path) != (step, path):
                what = f"is at step {their_step:.0f}" if their_step != step else "would train other layers"
                raise Disagreement(f"step {step}: rank {rank} {what}, unlike rank {self.rank}; nothing was updated")
        return any(stop for _, _, stop in seen)

    def leave(self, code):
        """Tell the others. Returns (the run's exit code, whether it is for this rank to say why)."""
        if self.size == 1:
            return code, True
        try:
            self.gather(code=code)
        except Left as left:
            return left.args[0], left.args[1] == self.rank
        except RuntimeError:  # they are gone already
            return code, True
        return code, True

    def missing(self, wait=5.0):
        """The ranks that do not answer within `wait` seconds, in words, after an exchange has failed."""
        try:
            self.store.set(f"here {self.rank}", "yes")
            end, absent = time.monotonic() + wait, {*range(self.size)}
            while absent and time.monotonic() < end:
                absent = {rank for rank in absent if not self.store.check([f"here {rank}"])}
                time.sleep(0.05)
        except RuntimeError:  # the store lives in rank 0, or in torchrun
            return "rank 0 or torchrun does not answer"
        gone = ", ".join(str(rank) for rank in sorted(absent))
        return f"rank {gone} does not answer" if gone else "another process was lost, or did not answer in time"

    # --- adding -----------------------------------------------------------------------------------------------------

    def reduce(self, gradients):
        """Sums over ranks of gradients, as views of one buffer, from one all-reduce. FSDP2 has summed its own already."""
        if self.size == 1 or any(isinstance(g, DTensor) for g in gradients):
            return gradients
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        return [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients)]

    def add(self, values):
        """Sums over ranks of a list of numbers, the same on all."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    # --- sharding ---------------------------------------------------------------------------------------------------

    def shard(self, model):
        """FSDP2: each block on its own, and the rest together. Gradients are summed, as in `reduce`, not averaged."""
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
        from torch.distributed.fsdp import fully_shard

        for module in [*model.blocks, model]:
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def pairwise(part, first, last, add):
    """The sum of part(first) .. part(last - 1), added up by halves. The order does not depend on who computes which half,
    so one and two processes get the same bits."""
    if last - first == 1:
        return part(first)
    middle = (first + last) // 2
    return add(pairwise(part, first, middle, add), pairwise(part, middle, last, add))


def reshard(model):
    """Let go of what FSDP2 keeps gathered after a forward pass that no backward pass follows."""
    if hasattr(model, "reshard"):
        model.reshard()


def whole(tensor):
    """A tensor in full, gathered from the ranks if it is sharded: then all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_into(target, tensor):
    """Copy a full tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(tensor)
