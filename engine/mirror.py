"""The numbers of a run's log, shown by TensorBoard or Weights & Biases as well.

    python train.py --log_to tensorboard            pip install tensorboard; then: tensorboard --logdir out
    python train.py --log_to tensorboard,wandb      pip install wandb; offline: WANDB_MODE=offline

log.jsonl stays the run's only record; these show what is written to it. When a run resumes, TensorBoard drops what was
logged after its checkpoint, and Weights & Biases ignores what comes twice.
"""

import importlib.util
import uuid

from engine.errors import UserError


def numbers(event, facts):
    """{name: number} of a logged event: step/loss, step/layers (how many), eval/loss, eval/loss_6_layers, ..."""
    scalars = {name: value for name, value in facts.items() if type(value) in (int, float) and name != "step"}
    values = {f"{event}/{name}": value for name, value in scalars.items()}
    if event == "step":
        values["step/layers"] = len(facts["layers"])
    return values | {f"{event}/loss_{k}_layers": loss for k, loss in facts.get("subnetworks", {}).items()}


def tensorboard(run, step, flags):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def show(event, facts):
        for name, value in numbers(event, facts).items():
            writer.add_scalar(name, value, facts.get("step", 0))
        if event == "eval":
            writer.flush()

    return show


def wandb(run, step, flags):
    import wandb

    place = run / "wandb_id"  # one run per folder
    if not place.exists():
        place.write_text(uuid.uuid4().hex)
    made = wandb.init(project="raptr", name=run.name, id=place.read_text(), resume="allow", dir=run, config=flags)
    return lambda event, facts: made.log(numbers(event, facts), step=facts.get("step", 0))


KINDS = {"tensorboard": tensorboard, "wandb": wandb}


def check(names):
    """Raise UserError unless each of "tensorboard,wandb" is one of these, and installed."""
    for name in names.split(",") if names else []:
        if name not in KINDS:
            raise UserError(f"--log_to {name}: must be one of {', '.join(KINDS)}")
        if not importlib.util.find_spec(name):
            raise UserError(f"--log_to {name}: pip install {name}")


def mirrors(names, run, step, flags):
    """Functions of (event, facts), one per name. run: the folder; step: of the checkpoint it goes on from."""
    return [KINDS[name](run, step, flags) for name in names.split(",")] if names else []
