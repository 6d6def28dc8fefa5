"""Several processes, one run: what they agree on before a step, and how their gradients become one.

    torchrun --nproc_per_node 8 train.py             data parallel: each process holds the whole model
    torchrun --nproc_per_node 8 train.py --fsdp      FSDP2: weights, gradients and moments are sharded, block by block

Every process ("rank") derives the same path and the same batch from (seed, step) and trains on its share of the batch.
Data parallel sums the gradients of the layers that ran: skipped layers are not sent. (DDP would send everything, or
fail at the second step: it expects the same parameters in every step.) Under FSDP2 a skipped block is never gathered.
With one process nothing here communicates, and torch.distributed is not started.
Not here: the loop (train.py).
"""

import contextlib
import gc
import hashlib
import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  Before the process group is made: see `Ranks.close`.

from engine import machine
from engine.errors import Disagreement, Exit

BUCKET = 1 << 25  # bytes of gradients that are sent together
KEPT = 4e9  # bytes of a model's weights that FSDP2 keeps gathered throughout a step, at most


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
        self.device, self.step, self.waits, self.announced = torch.device(device), 0, 0, None
        self.mesh, self.keeps = None, False  # of FSDP2; keeps: weights stay gathered throughout a step
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
        """Up to four numbers of every rank, as [(a, b, ...), ...] by rank. Raises Left if a rank has left."""
        if self.size == 1:
            return [numbers]
        mine = torch.tensor([code, *numbers, *[0] * (4 - len(numbers))], dtype=torch.float64)  # exact up to 2^53
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        codes = [int(row[0]) for row in rows]
        if any(codes):
            mildest = min(code for code in codes if code)  # of 1 to 5, and 75, stopped and saved
            raise Left(mildest, codes.index(mildest))
        return [tuple(row[1 : 1 + len(numbers)].tolist()) for row in rows]

    def exchange(self, loss, step, subnetwork, stop):
        """The loss of every rank. With it travels what `agree` looks at when `step` begins: the step, the subnetwork,
        and whether a rank wants to stop. So a step needs one exchange, and different paths are found before they
        run."""
        path = int.from_bytes(hashlib.sha256(repr(subnetwork).encode()).digest()[:6], "big")
        self.announced = self.gather(loss, step, path, bool(stop))
        return [loss for loss, *_ in self.announced]

    def agree(self, step):
        """Whether any rank wants to stop before `step`. Raises Disagreement unless all have announced this step with
        the same subnetwork."""
        self.step, (_, my_step, my_path, _) = step, self.announced[self.rank]
        for rank, (_, their_step, their_path, _) in enumerate(self.announced):
            if (their_step, their_path) != (my_step, my_path):
                what = f"is at step {their_step:.0f}" if their_step != my_step else "would train other layers"
                raise Disagreement(f"step {step}: rank {rank} {what}, unlike rank {self.rank}; nothing was updated")
        return any(stop for *_, stop in self.announced)

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

    @contextlib.contextmanager
    def summing(self, model, last):
        """A context for the backward pass of a micro-batch. That of the `last` one in a step sums the gradients of all
        ranks, in buckets, while it runs. Parameters of skipped layers get no gradient, and nothing is sent for them.

        FSDP2 sums by itself, in every micro-batch; if it keeps weights gathered, in the last one."""
        sharded = hasattr(model, "set_requires_gradient_sync")
        if sharded and self.keeps and self.size > 1:
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)
        if sharded or self.size == 1 or not last:
            yield
            return
        bucket, in_flight = [], []

        def send():
            if bucket:
                flat = torch.cat([p.grad.flatten() for p in bucket])
                in_flight.append((dist.all_reduce(flat, async_op=True), flat, bucket.copy()))
                bucket.clear()

        def receive():
            work, flat, sent = in_flight.pop(0)
            work.wait()
            for p, total in zip(sent, flat.split([p.numel() for p in sent])):
                p.grad.copy_(total.view_as(p))

        def ready(p):
            bucket.append(p)
            if sum(p.grad.nbytes for p in bucket) >= BUCKET:
                send()
                while in_flight[0][0].is_completed() and len(in_flight) > 1:
                    receive()  # frees the bucket's memory

        hooks = [p.register_post_accumulate_grad_hook(ready) for p in model.parameters()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        send()
        while in_flight:
            receive()

    def add(self, values):
        """Sums over ranks of a list of numbers, the same on all."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    # --- sharding ---------------------------------------------------------------------------------------------------

    def shard(self, model, dtype=torch.float32):
        """FSDP2: each block on its own, and the rest together. Gradients are summed, as in `summing`, not averaged.

        dtype: of gathered weights; gradients are summed in float32. A block's weights are freed after its forward
        pass and gathered again for the backward pass. If all take KEPT bytes at most, they stay until the step ends.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.mesh = self.mesh or dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
        self.keeps = sum(p.numel() for p in model.parameters()) * dtype.itemsize <= KEPT
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if dtype != torch.float32:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in [*model.blocks, model]:
            fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=False if self.keeps else None)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        for block in model.blocks:  # torch does not expect one that no forward pass has reached yet
            block.unshard()
            block.reshard()

    def close(self):
        """Leave the process group and end its threads. A thread that still holds a tensor when Python exits aborts the
        process, and the threads end only with the last reference to the group. Three things would keep one: default
        arguments in torch.distributed.nn, which AdamW loads (so it is imported before the group is made); the mesh, in
        torch's caches (so its registry is cleared); a sharded model, in reference cycles (so it is collected)."""
        if self.size > 1:
            getattr(self.mesh, "_pg_registry", {}).clear()
            dist.destroy_process_group()
            gc.collect()


def run(main, args):
    """Call main(ranks), and turn what ends the run into an exit code and one sentence on stderr, said by one rank.
    Returns the code. An exception that is no Exit, and does not come from a lost process, keeps its traceback."""
    ranks, code, reason = None, 0, ""
    try:
        ranks = Ranks(machine.choose(args.device, args.dtype)[0], args.timeout)
        main(ranks)
    except Left as left:
        ranks.close()
        return left.code
    except Exit as error:
        code, reason = error.code, str(error)
    except KeyboardInterrupt:  # before the steps, which stop by themselves
        if ranks is None or ranks.size > 1:
            raise
        code, reason = 130, "interrupted; the same command continues"
    except RuntimeError as error:
        if not is_lost(error) or (ranks is not None and ranks.size == 1):
            raise
        first_line = str(error).strip().splitlines()[0][:120]
        where = f"rank {ranks.rank}, step {ranks.step}: {ranks.missing()}" if ranks else "another process was lost"
        print(f"train.py: {where} ({first_line})", file=sys.stderr)
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
    signs = ("gloo/transport", "closed by peer", "reset by peer", "timed out waiting", "socket timeout")  # of gloo
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs)


def reshard(model):
    """Free what FSDP2 keeps gathered after a forward pass that no backward pass follows. The optimizer does not know
    the gathered weights."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # of this module alone
            module.reshard()


def is_sharded(tensor):
    """Whether it is a DTensor, without importing that class, which takes half a second."""
    return hasattr(tensor, "full_tensor")


def full(tensor):
    """A tensor in full. If it is sharded it is gathered, and all ranks must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def copy_into(target, tensor):
    """Copy a full tensor into one that may be sharded."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(tensor)
