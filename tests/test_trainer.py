"""RaPTr inside the Trainer of `transformers`: the callback as README.md has it, with a tiny BERT and a tiny Llama."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from engine import ROOT
from raptr import RaPTr, stage_plan

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")

SECTION = (ROOT / "README.md").read_text().split("## With the Trainer of transformers")[1].split("\n## ")[0]
CALLBACK, USE = (block.split("```")[0] for block in SECTION.split("```python\n")[1:])
exec(CALLBACK, README := {})

LAYERS, STAGES, STEPS, SEED = 12, [6, 8, 10, 12], 28, 3
WHERE = {"bert": "bert.encoder.layer", "llama": "model.layers"}
WORDS, MASK = 10, 10  # ids 0 .. 9 are words
LOOK = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5, "eval_on_start": True}


def small(kind, seed):
    """A model with random weights. BERT has dropout, so a resumed run must also restore the random state."""
    sizes = {"vocab_size": WORDS + 1, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.1}
    torch.manual_seed(seed)
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1))


def examples(kind, count, seed=0):
    """For BERT, sequences that repeat one word, and one token in four is masked. For Llama, two words in turn."""
    generator = torch.Generator().manual_seed(seed)
    words = 1 if kind == "bert" else 2
    inputs = labels = torch.randint(WORDS, (count, words), generator=generator).repeat(1, 16 // words)
    if kind == "bert":
        masked = torch.rand(inputs.shape, generator=generator) < 0.25
        inputs, labels = inputs.masked_fill(masked, MASK), labels.masked_fill(~masked, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(inputs, labels)]


class Watch(transformers.TrainerCallback):
    """Records, for each optimizer step, the layers that ran, and the layers whose weights and moments changed."""

    def __init__(self, model, kind):
        self.model, self.layers = model, list(model.get_submodule(WHERE[kind]))
        self.ran = []  # for each optimizer step its passes, for each pass the layers in the order of their calls
        self.evaluated = []  # the same for the passes of an evaluation
        self.weights, self.moments = [], []
        model.register_forward_pre_hook(lambda module, args: self.passes().append([]))
        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda module, args, i=i: self.passes()[-1].append(i))

    def passes(self):
        return self.ran[-1] if self.model.training else self.evaluated

    def state(self, optimizer):
        """Copies of each layer's weights, and of each layer's optimizer state."""
        weights = [list(layer.parameters()) for layer in self.layers]
        moments = [[x for p in some for x in optimizer.state.get(p, {}).values()] for some in weights]
        return [[[x.detach().clone() for x in some] for some in each] for each in (weights, moments)]

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        self.ran.append([])
        self.before = self.state(optimizer)

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        for record, before, after in zip((self.weights, self.moments), self.before, self.state(optimizer)):
            record.append([i for i in range(LAYERS) if not equal(before[i], after[i])])

    def paths(self):
        """The path of each optimizer step. Fails if two passes of a step run different layers."""
        paths = [[sorted(set(layers)) for layers in passes] for passes in self.ran]
        assert all(path == passes[0] for passes in paths for path in passes)
        return [passes[0] for passes in paths]


def equal(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


def build(kind, folder, seed=0, data=None, **more):
    """A Trainer for a new model, the callback of README.md, and a Watch."""
    model = small(kind, seed)
    arguments = {"max_steps": STEPS, "seed": SEED, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
    arguments |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    paths, watch = README["RandomPaths"](model.get_submodule(WHERE[kind]), STAGES), Watch(model, kind)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(folder, **arguments | more),
        train_dataset=data or examples(kind, 64),
        eval_dataset=examples(kind, 32, seed=1),
        callbacks=[paths, watch],
    )
    return trainer, paths, watch


def planned(steps=STEPS):
    """The path of each step, as the method says it."""
    method = RaPTr(stage_plan(STAGES, steps, LAYERS), LAYERS, {0, LAYERS - 1}, seed=SEED)
    return [list(s.layers if s else range(LAYERS)) for s in map(method.subnetwork, range(1, steps + 1))]


def loaded(folder, trainer):
    """The model of a checkpoint. Fails if the checkpoint lacks a weight, or has one too many."""
    model, report = type(trainer.model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def assert_same_weights(some, others):
    """Bit for bit."""
    torch.testing.assert_close(dict(some.state_dict()), dict(others.state_dict()), rtol=0, atol=0)


@pytest.fixture(scope="module", params=["bert", "llama"])
def run(request, tmp_path_factory):
    """A finished run that was evaluated and saved every 5 steps, which is inside stages and inside epochs."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer, paths, watch = build(request.param, folder, **LOOK)
    with paths.context:
        trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    return SimpleNamespace(kind=request.param, folder=folder, trainer=trainer, watch=watch, losses=losses)


def test_each_step_trains_its_path_and_the_other_layers_rest(run):
    """A layer that rests keeps its weights and its moments."""
    paths = run.watch.paths()
    assert paths == planned() and len({tuple(path) for path in paths[:21]}) > 15
    assert [len(path) for path in paths] == [6] * 7 + [8] * 7 + [10] * 7 + [12] * 7
    assert run.watch.weights == paths
    assert run.watch.moments == paths


def test_the_loss_falls(run):
    assert run.losses[0] > math.log(WORDS) > 1.2 * run.losses[STEPS]  # log(WORDS): without context


def test_an_evaluation_runs_the_full_model(run):
    assert list(run.losses) == [0, 5, 10, 15, 20, 25, 28]
    assert run.watch.evaluated == [list(range(LAYERS))] * 4 * 7  # 32 sequences, 8 in a batch


def test_a_checkpoint_holds_all_layers(run):
    """Checkpoint 10 was saved after a step of 8 layers. Its model has the loss that the Trainer logged then."""
    model = loaded(run.folder / "checkpoint-10", run.trainer).eval()
    batch = {name: torch.stack([e[name] for e in examples(run.kind, 32, seed=1)]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(run.losses[10], abs=0.02)
    assert_same_weights(loaded(run.folder / "checkpoint-28", run.trainer), run.trainer.model)


def test_a_resumed_run_takes_the_same_paths_and_ends_with_the_same_weights(run, tmp_path):
    trainer, paths, watch = build(run.kind, tmp_path, seed=9, **LOOK)
    with paths.context:
        trainer.train(resume_from_checkpoint=run.folder / "checkpoint-10")
    assert watch.paths() == planned()[10:]
    assert_same_weights(trainer.model, run.trainer.model)


def test_an_interrupted_step_gives_the_layers_back(run, tmp_path):
    """Ctrl-C in the middle of step 13, as in a notebook, where the same Trainer then continues."""
    trainer, paths, watch = build(run.kind, tmp_path, **LOOK)

    def interrupt(module, args):
        if trainer.state.global_step == 12:
            raise KeyboardInterrupt

    hook = watch.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), paths.context:
        trainer.train()
    hook.remove()
    watch.evaluated.clear()
    trainer.evaluate()
    assert watch.evaluated == [list(range(LAYERS))] * 4
    with paths.context:
        trainer.train(resume_from_checkpoint=True)
    assert_same_weights(trainer.model, run.trainer.model)


@pytest.mark.parametrize("kind", WHERE)
def test_an_accumulated_step_has_one_path(kind, tmp_path):
    trainer, paths, watch = build(
        kind,
        tmp_path,
        data=examples(kind, 40),
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
    )
    with paths.context:
        trainer.train()
    assert [len(passes) for passes in watch.ran] == [3, 3, 3, 1] * 3  # ten batches in an epoch
    assert watch.paths() == watch.weights == watch.moments == planned(12)


class Stream(torch.utils.data.IterableDataset):
    """Data without a length."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


@pytest.mark.parametrize("kind", WHERE)
def test_a_stream_may_end_inside_an_accumulation(kind, tmp_path):
    """The Trainer then saves between two passes of a step: all layers, and the step continues on its path."""
    data = Stream(examples(kind, 20))
    more = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "epoch"}
    trainer, paths, watch = build(kind, tmp_path, data=data, max_steps=8, **more)
    with paths.context:
        trainer.train()
    assert [len(passes) for passes in watch.ran] == [2, 2, 1] * 3 + [2, 2]
    assert watch.weights == watch.moments == planned(8)
    saved = {path.name: loaded(path, trainer) for path in tmp_path.iterdir()}
    assert saved.keys() == {f"checkpoint-{step}" for step in (2, 4, 6, 8)}


def test_gradient_checkpointing_changes_nothing(run, tmp_path):
    new = hasattr(transformers.TrainingArguments, "activation_checkpointing")  # the newer name of the two
    more = {"activation_checkpointing" if new else "gradient_checkpointing": True}
    trainer, paths, watch = build(run.kind, tmp_path, **more, **LOOK)
    calls = []
    next(watch.layers[0].children()).register_forward_pre_hook(lambda module, args: calls.append(module.training))
    with paths.context:
        trainer.train()
    assert sum(calls) == 2 * STEPS  # once forward, and again in the backward pass
    assert watch.paths() == planned()
    assert_same_weights(trainer.model, run.trainer.model)


def test_total_flos_count_the_layers_that_ran(run):
    """The Trainer's own count: 6 x tokens x parameters without embeddings."""
    (layer,) = {sum(p.numel() for p in layer.parameters()) for layer in run.watch.layers}
    full = 6 * STEPS * 8 * 16 * run.trainer.model.num_parameters(exclude_embeddings=True)
    skipped = sum(LAYERS - len(path) for path in planned())
    assert run.trainer.state.total_flos == full - 6 * 8 * 16 * layer * skipped


def test_the_readmes_use(tmp_path):
    """Its lines as they stand there."""
    model = small("bert", 0)
    watch = Watch(model, "bert")
    args = transformers.TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, report_to="none", disable_tqdm=True, use_cpu=True
    )
    names = {**README, "model": model, "args": args, "dataset": examples("bert", 8)}
    exec(USE.replace("[paths]", "[paths, watch]"), names | {"watch": watch})
    assert [len(path) for path in watch.paths()] == STAGES
    assert watch.weights == watch.paths()

    def interrupt(module, args):
        raise KeyboardInterrupt

    watch.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        exec(USE, names)
    assert len(model.bert.encoder.layer) == LAYERS


SCRIPT = """
import os
import sys

import torch
import torch.distributed as dist

from test_trainer import WHERE, build

torch.set_num_threads(1)
for kind in WHERE:
    trainer, paths, watch = build(
        kind, sys.argv[1], max_steps=12, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        ddp_find_unused_parameters=True, ddp_backend="gloo",
    )
    with paths.context:
        trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    paths = [watch.paths(), watch.weights, watch.moments]
    found = {"weights": trainer.model.state_dict(), "passes": [len(passes) for passes in watch.ran], "paths": paths}
    torch.save(found, f"{sys.argv[1]}/{kind}-{dist.get_rank()}.pt")
dist.barrier()
os._exit(0)  # a thread of gloo that outlives Python may abort an ordinary exit
"""


def test_two_processes_train_the_same_path(tmp_path):
    """Half of each batch in each process, in two passes. DistributedDataParallel does not touch a layer that no process
    ran, and both processes end with the same weights."""
    (tmp_path / "script.py").write_text(SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    more = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*start, tmp_path / "script.py", tmp_path], env=env, **more)
    try:
        errors = process.communicate(timeout=120)[1]
    finally:
        process.terminate()  # torchrun ends its processes too
    assert process.returncode == 0, errors
    for kind in WHERE:
        ranks = [torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in (0, 1)]
        for rank in ranks:
            assert rank["paths"] == [planned(12)] * 3
            assert rank["passes"] == [2] * 12
        torch.testing.assert_close(ranks[0]["weights"], ranks[1]["weights"], rtol=0, atol=0)
    trainer, paths, _ = build("llama", tmp_path, max_steps=12)  # without dropout, one process does the same
    with paths.context:
        trainer.train()
    torch.testing.assert_close(ranks[0]["weights"], trainer.model.state_dict(), rtol=0, atol=1e-3)
