"""Run folders: opened for training, resumed, saved to; and opened again by whatever comes after training.

A run folder out/NAME/ holds config.json (the flags), log.jsonl (every step), step_XXXXXXXX/ (checkpoints) and its
tokenizer. Not here: what a checkpoint is (engine/checkpoint.py), the training loop (train.py).
"""

import contextlib
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import torch

import model as transformer
from data import objective
from engine import checkpoint, log, mirror, options
from engine.errors import Exit, NoCheckpoint, UserError
from text.corpus import open_corpus
from text.prepare import load_tokenizer
from text.wordpiece import WordPiece

# Flags that may differ when a run is continued. All others would make it another run.
MAY_CHANGE = {
    *("config", "out", "data", "init", "micro_batch", "eval_every", "save_every", "keep", "keep_every"),
    *("log_to", "device", "compile", "recompute", "threads", "fsdp", "timeout", "dry_run", "gpus", "peak", "mfu"),
}


class Run:
    """A run folder, open for training.

    step, flops, seconds: where the run stands, 0 for a new one. saved: step of the newest checkpoint.
    The constructor locks the folder, checks that it belongs to a run with these flags, and reads the newest checkpoint.
    Only the first rank writes. Raises UserError if the folder is in use or belongs to another run, and NoCheckpoint if
    there is a checkpoint and none can be used.
    """

    def __init__(self, args, corpus, ranks):
        self.folder, self.args, self.ranks = Path(args.out), args, ranks
        self.flags = {**vars(args), "data_fingerprint": corpus.fingerprint}
        self.tokenizer_sha256 = corpus.meta["tokenizer_sha256"]
        self.changed, self.newest, self.pruning, self.log_failed = {}, None, None, False

        def open_folder():
            self.lock = checkpoint.lock(self.folder)
            tokenizer = (corpus.folder / "tokenizer.model").read_bytes()
            try:
                self.changed = check_config(self.folder, self.flags)
                (self.folder / "tokenizer.model").write_bytes(tokenizer)  # for all that comes after training
            except OSError as error:
                raise UserError(f"--out {self.folder}: {error.strerror}") from None
            self.newest = checkpoint.load_newest(self.folder)
            if self.newest is None and any(event["event"] in ("save", "done") for event in log.read_log(self.folder)):
                raise NoCheckpoint(f"--out {self.folder}: its log says that checkpoints were saved, and none is left; "
                                   "put one back, or choose another --out")  # fmt: skip
            return self.newest[1]["step"] if self.newest else 0

        self.step = self.saved = ranks.first_does(open_folder)
        if self.step and not ranks.first:
            self.newest = checkpoint.load(self.folder / f"step_{self.step:08d}")
        meta = self.newest[1] if self.newest else {"flops": 0, "seconds": 0.0}
        self.flops, self.seconds = meta["flops"], meta["seconds"]

    def restore(self, model, optimizer, initial=None):
        """Copy the newest checkpoint into a model and its optimizer. initial: weights to begin a new run with, or
        None."""
        if self.newest:
            checkpoint.load_weights(model, self.newest[0]["model"], "the checkpoint")
            checkpoint.load_moments(model, optimizer, self.newest[0]["optimizer"])
        elif initial:
            checkpoint.load_weights(model, initial, f"--init {self.args.init}")
        self.newest = None  # memory

    def open_log(self):
        """Open log.jsonl for appending, without the events after the checkpoint, whose steps will run again. Returns
        (whether the log has its "run" event, which may have been lost; whether the run has ended)."""
        events, path = [], self.folder / "log.jsonl"
        if self.ranks.first:
            if self.step:
                events = [event for event in log.read_log(self.folder) if event.get("step", 0) <= self.step]
            log.write(path, "".join(json.dumps(event) + "\n" for event in events))
        self.log = open(path if self.ranks.first else os.devnull, "a")
        has_begun = any(event["event"] == "run" for event in events)
        begun, ended = map(bool, self.ranks.gather(has_begun, log.has_ended(events))[0])
        names = self.args.log_to if self.ranks.first and not ended else ""
        self.mirrors = mirror.mirrors(names, self.folder, self.step, self.flags)
        return begun, ended

    def record(self, event, **facts):
        """Write one event to the log, and to its mirrors. If one of these fails, training goes on: the log may lack
        events, a mirror is left out."""
        try:
            self.log.write(json.dumps({"event": event, **facts}) + "\n")
            self.log.flush()
        except OSError as error:
            if not self.log_failed:
                print(f"warning: the log cannot be written, training goes on: {error}", file=sys.stderr)
            self.log_failed = True
        for show in self.mirrors.copy():
            try:
                show(event, facts)
            except Exception as error:  # of somebody else's package: no reason to end a run
                self.mirrors.remove(show)
                print(f"warning: --log_to: {error}; training goes on without it", file=sys.stderr)

    def save(self, step, model, optimizer, last, stopping=False):
        """Save a checkpoint. All ranks agree whether it worked. If it did not, and there is no next time (`last`),
        raises Exit; else training goes on, older checkpoints stay, and the next interval tries again.

        It is read back, and older ones are deleted, in a thread; a run that is `stopping` does not wait for that.
        """
        tensors = checkpoint.state(model, optimizer, keep=self.ranks.first)
        meta = {"step": step, "flops": self.flops, "seconds": self.seconds, "flags": self.flags}
        meta["tokenizer_sha256"] = self.tokenizer_sha256

        def write():
            if self.pruning:
                self.pruning.join()
            try:
                checkpoint.save(self.folder, step, tensors, meta)
            except OSError as error:  # a full disk, say
                return str(error)

        problem = self.ranks.first_does(write)
        if problem is None:
            self.saved = step
            self.record("save", step=step)
            if self.ranks.first and not stopping:
                arguments = (self.folder, step, self.args.keep, self.args.keep_every)
                self.pruning = threading.Thread(target=checkpoint.prune, args=arguments, daemon=True)
                self.pruning.start()
        elif last:
            raise Exit(f"the state at step {step} could not be saved: {problem}")
        elif self.ranks.first:
            print(f"warning: no checkpoint at step {step}, training goes on: {problem}", file=sys.stderr)

    def close(self):
        """Finish what `save` began, and unlock the folder."""
        if self.pruning:
            self.pruning.join()
        with contextlib.suppress(OSError):  # `record` has said so
            self.log.close()
        if self.ranks.first:
            self.lock.close()


def check_config(folder, flags):
    """Write config.json, or compare with it. Returns {flag: [then, now]} of those that may change and did. Raises
    UserError if the folder belongs to a run with other flags or another text."""
    if not (folder / "config.json").exists():
        log.write(folder / "config.json", json.dumps(flags, indent=1))
    before = read_config(folder)
    for name, value in must_match(before, flags).items():
        what = "another text" if name == "data_fingerprint" else f"--{name} {value}, not {flags.get(name)}"
        raise UserError(f"--out {folder}: this run began with {what}; choose another --out")
    return {name: [value, flags.get(name)] for name, value in before.items() if flags.get(name) != value}


def read_config(folder):
    """The flags of a run. Flags of older versions that had their default are left out; others raise UserError."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError
    except ValueError:
        raise UserError(f"{folder / 'config.json'}: not readable; choose another --out") from None
    if config.get("method") == "decreasing" and "drop_gate" in config:
        raise UserError(f"--out {folder}: this run drew layers for each sequence; this version draws for the batch")
    for name, default in options.REMOVED.items():
        if config.pop(name, default) != default:
            raise UserError(f"--out {folder}: this run began with --{name}, which this version no longer has")
    return config


def must_match(before, now):
    """{name: value before} of the flags that may not change and are different now. A flag that no longer exists has its
    default."""
    now = options.REMOVED | now
    return {name: value for name, value in before.items() if name not in MAY_CHANGE and now.get(name) != value}


def initial_weights(args, config, depth, tokenizer_sha256):
    """Load and validate the weights of --init. Raises UserError if they are missing, do not fit, or used another
    tokenizer."""
    folders = checkpoint.folders(args.init)
    if not folders:
        raise UserError(f"--init {args.init}: there is no checkpoint in it")
    tensors, meta = checkpoint.load(folders[-1])
    if meta.get("tokenizer_sha256", tokenizer_sha256) != tokenizer_sha256:
        raise UserError(f"--init {args.init}: was trained with another tokenizer than that of --data")
    with torch.device("meta"):
        model = transformer.make(config)
    model.blocks = model.blocks[:depth]
    checkpoint.check_weights(model, tensors["model"], f"--init {args.init}")
    return tensors["model"]


def make_run(run, flags, tokenizer, tensors, texts=None):
    """Write a run folder with a checkpoint of step 0, which is evaluated, or trained on by --init. It appears when it
    is complete.

    flags: of train.py, {name: value}. tokenizer: files to copy, if they are there; the first one identifies it.
    tensors: see checkpoint.save. texts: {name: text} of other files.
    """
    unfinished = run.with_name(f".{run.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        copies = [Path(shutil.copy(file, unfinished)) for file in tokenizer if file.exists()]
        for name, text in {"config.json": json.dumps(flags, indent=1), **(texts or {})}.items():
            (unfinished / name).write_text(text)
        meta = {"step": 0, "flops": 0, "seconds": 0.0, "flags": flags}
        meta["tokenizer_sha256"] = checkpoint.sha256(copies[0])
        checkpoint.save(unfinished, 0, tensors, meta)
        unfinished.rename(run)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------
# After training


def load_run(run, device="cpu"):
    """(model, tokenizer, flags) of a run folder, from its newest checkpoint. Raises UserError if it is not a run
    folder, or if that checkpoint is missing or not good."""
    run = Path(run)
    try:
        given = json.loads((run / "config.json").read_text())
        if not {"layers", "seed"} <= given.keys():
            raise ValueError
        args, folders = options.complete(given), checkpoint.folders(run)
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"{run}: not a run folder of train.py") from None
    if not folders:
        raise UserError(f"{run}: there is no checkpoint in it yet")
    if (run / "vocab.txt").exists():  # imported from elsewhere (tools/hf.py)
        tokenizer = WordPiece(run / "vocab.txt")
    else:
        tokenizer = load_tokenizer(run / "tokenizer.model")
    tensors = checkpoint.load(folders[-1])[0]  # on the CPU, as the moments are not needed
    config = transformer.Config.of(args, objective(args, vocab=tokenizer.vocab_size()).model_vocab)
    model = transformer.make(config).to(device).eval()
    depth = 1 + max(int(name.split(".")[1]) for name in tensors["model"] if name.startswith("blocks."))
    model.blocks = model.blocks[:depth]
    checkpoint.check_weights(model, tensors["model"], folders[-1])
    model.load_state_dict(tensors["model"], strict=False)  # buffers are made, not saved
    model.pooler = tensors.get("pooler")
    return model, tokenizer, args


def own_text(run, flags):
    """The corpus that a run was trained on. Raises UserError if --data names another text now: the run's tokens would
    mean nothing in it."""
    corpus = open_corpus(flags.data, flags.vocab)
    if getattr(flags, "data_fingerprint", None) != corpus.fingerprint:
        raise UserError(f"{run}: {corpus.folder} is not the text it was trained on")
    return corpus


def provenance(run, args, names, files):
    """What a score depends on: {"run": its folder, "weights": hash of the newest checkpoint's manifest ("" if there is
    none), hashes of `files`, which is {name: path}, and the flags `names`}."""
    newest = checkpoint.folders(run)[-1:]
    weights = "".join(checkpoint.sha256(path / "manifest.json") for path in newest)
    facts = {"run": str(Path(run).resolve()), "weights": weights}
    facts |= {name: checkpoint.sha256(path) for name, path in files.items()}
    return facts | {name: getattr(args, name) for name in names}
