"""Several processes, one run: what they agree on before a step, and how their gradients become one.

    torchrun --nproc_per_node 8 train.py             data parallel: each process holds the whole model
    torchrun --nproc_per_node 8 train.py --fsdp      FSDP2: weights, gradients and moments are sharded, block by block

Every process ("rank") derives the same path and the same batch from (seed, step) and trains on its share of the batch.
Data parallel needs one all-reduce a step, over the gradients of the layers that ran: skipped layers are not sent. (DDP
would send everything, or hang: it expects the same parameters in every step.) Under FSDP2 a skipped block is never
gathered. With one process nothing here communicates, and torch.distributed is not started.
Not here: the loop (train.py).
"""

import hashlib
import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from engine import machine
from engine.errors import Disagreement, Exit


class Left(Exit):
    """Another rank has left with this exit code, and has said why."""

    def __init__(self, code, rank):
        super().__init__(code, rank)
        self.code, self.rank = code, rank


class Ranks:
    """The processes of this run, as torchrun started them: `rank` of `size`.

    device: "cpu" or "cuda"; becomes the device of this rank. timeout: seconds to wait for the others, at each exchange.
    """

    def __init__(self, device, timeout=600.0):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0  # only the first rank writes
        self.device, self.step, self.waits = torch.device(device), 0, 0
        if self.size == 1:
            return
        backend = "gloo"
        if device == "cuda":
            local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            self.device = torch.device("cuda", local % gpus)
            torch.cuda.set_device(self.device)
            crowded = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus  # NCCL wants a GPU for each
            backend = "cpu:gloo,cuda:gloo" if crowded else "cpu:gloo,cuda:nccl"
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self.store = dist.PrefixStore(f"raptr{restart}", next(dist.rendezvous("env://"))[0])
        wait = timedelta(seconds=timeout)
        dist.init_process_group(backend, timeout=wait, world_size=self.size, rank=self.rank, store=self.store)

    # --- agreeing ---------------------------------------------------------------------------------------------------

    def gather(self, *numbers, code=0):
        """Up to three numbers of every rank, as [(a, b, c), ...] by rank, with 0 for those not given if there are
        several ranks. Raises Left if a rank has left."""
        if self.size == 1:
            return [numbers]
        mine = torch.tensor([code, *numbers, *[0] * (3 - len(numbers))], dtype=torch.float64)  # exact up to 2^53
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        codes = [int(row[0]) for row in rows]
        if any(codes):
            mildest = min(code for code in codes if code)  # of 1 to 5, and 75, stopped and saved
            raise Left(mildest, codes.index(mildest))
        return [tuple(row[1:].tolist()) for row in rows]

    def agree(self, step, subnetwork, stop):
        """Whether any rank wants to stop. Raises Disagreement unless all are at this step with this subnetwork."""
        self.step = step
        if self.size == 1:
            return stop
        path = int.from_bytes(hashlib.sha256(repr(subnetwork).encode()).digest()[:6], "big")
        rows = self.gather(step, path, stop)
        for rank, (their_step, their_path, _) in enumerate(rows):
            if (their_step, their_path) != (step, path):
                what = f"is at step {their_step:.0f}" if their_step != step else "would train other layers"
                raise Disagreement(f"step {step}: rank {rank} {what}, unlike rank {self.rank}; nothing was updated")
        return any(stop for _, _, stop in rows)

    def first_does(self, work):
        """Call work() on rank 0 and return its result, a JSON value, on all ranks. However long it takes, the others
        wait outside of any collective, where no time-out counts. Raises Left on the others if it ends the run on rank
        0."""
        if self.size == 1:
            return work()
        self.waits += 1
        key = f"wait {self.waits}"
        if self.first:
            try:
                result = work()
            except Exit as error:
                self.store.set(key, json.dumps({"code": error.code}))
                raise
            self.store.set(key, json.dumps({"result": result}))
            return result
        pause = 0.001
        while not self.store.check([key]):  # raises if the store, which lives in rank 0 or torchrun, has gone
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        answer = json.loads(self.store.get(key))
        if "code" in answer:
            self.gather()  # raises Left, as rank 0 tells its code when it leaves
        return answer["result"]

    def leave(self, code):
        """Tell the others. Returns (the run's exit code, whether it is for this rank to say why)."""
        if self.size == 1:
            return code, True
        try:
            self.gather(code=code)
        except Left as left:
            return left.code, left.rank == self.rank
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
        """Sums over ranks of gradients, as views of one buffer, from one all-reduce. FSDP2 has summed its own
        already."""
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


def run(main, args):
    """Call main(ranks), and turn what ends the run into an exit code and one sentence on stderr, said by one rank.
    Returns the code. An exception that is no Exit, and does not come from a lost process, keeps its traceback."""
    ranks, code, reason = None, 0, ""
    try:
        ranks = Ranks(machine.choose(args.device, args.dtype)[0], args.timeout)
        main(ranks)
    except Left as left:
        return left.code
    except Exit as error:
        code, reason = error.code, str(error)
    except RuntimeError as error:
        if ranks is None or ranks.size == 1 or not is_lost(error):
            raise
        first_line = str(error).strip().splitlines()[0][:120]
        print(f"train.py: rank {ranks.rank}, step {ranks.step}: {ranks.missing()} ({first_line})", file=sys.stderr)
        return Disagreement.code
    speaks = True
    if ranks is not None:
        code, speaks = ranks.leave(code)
        ranks.close()
    if reason and speaks:
        print(f"train.py: {reason}", file=sys.stderr)
    return code


def is_lost(error):
    """Whether an error comes from the process group: another process was lost, or did not answer in time."""
    signs = ("gloo", "connection", "timed out", "timeout", "socket", "store", "nccl", "peer")
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs)


def pairwise(part, first, last, add):
    """The sum of part(first) .. part(last - 1), added by halves. The order does not depend on who computes which
    half, so one and two processes get the same bits."""
    if last - first == 1:
        return part(first)
    middle = (first + last) // 2
    return add(pairwise(part, first, middle, add), pairwise(part, middle, last, add))


def reshard(model):
    """Free what FSDP2 keeps gathered after a forward pass that no backward pass follows."""
    if hasattr(model, "reshard"):
        model.reshard()


def full(tensor):
    """A tensor in full. If it is sharded it is gathered, and all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_into(target, tensor):
    """Copy a full tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(tensor)
