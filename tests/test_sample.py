import collections
import functools
import io

import pytest
import torch

from processes import script
from raptr import Subnetwork
from tools import sample


def ask(*args, text=""):
    return script("tools.sample", *args, text=text)


def test_a_mask_is_filled_with_what_fits(runs, text):
    """The right word is among the first far more often than its frequency says."""
    model, tokenizer, _ = sample.load_run(runs["bert"])
    hits = 0
    for document in text[:60]:
        words = document.split()[:6]
        answer = tokenizer.encode(" " + words[3])
        chances = sample.fill(
            model, tokenizer, " ".join([*words[:3], *words[4:]]).replace(words[2], words[2] + "[MASK]", 1)
        )
        assert chances.shape == (1, tokenizer.vocab_size()) and chances[0].sum() == pytest.approx(1, abs=1e-4)
        hits += answer[0] in chances[0].topk(25).indices
    assert hits > 12


def test_words_are_drawn_as_the_flags_say():
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0]), torch.Generator().manual_seed(0)

    def draws(count, *how, **more):
        picked = sample.pick(logits.expand(count, -1), *how, **more, generator=generator)
        return collections.Counter(picked.tolist())

    assert set(draws(5, 0)) == {0}
    plain = draws(4000, 1.0)
    for token, share in enumerate(logits.softmax(-1).tolist()):
        assert plain[token] / 4000 == pytest.approx(share, abs=0.03)
    assert set(draws(200, 5.0, top_k=2)) == {0, 1}
    assert set(draws(200, 1.0, top_p=0.6)) == {0}
    assert set(draws(300, 1.0, top_p=0.8)) == {0, 1}
    assert draws(4000, 100.0)[3] > 3 * plain[3]


@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_the_cache_does_not_change_what_is_written(runs, layers):
    """Greedy, against running the whole row again for every token."""
    model, tokenizer, _ = sample.load_run(runs["ul2"])
    path, V = layers and Subnetwork(layers), tokenizer.vocab_size()
    prefix = [V + 1, *tokenizer.encode("Return a")[:8], V + 3]
    written = model.generate([prefix], V + 3, set(), [0, 1], 11, path, functools.partial(sample.pick, temperature=0))
    slow = [V + 3]
    while len(slow) < 12:
        logits = model.logits(torch.tensor([prefix + slow]), torch.tensor([len(prefix)]), path)[0, -1]
        logits[[0, 1]] = -torch.inf
        slow.append(int(logits.argmax()))
    assert written == [slow[1:]] == model.generate([prefix], V + 3, set(), [0, 1], 11, path)


def test_gaps_are_filled_and_texts_go_on(runs, text):
    words = text[0].split()
    shown = ask(runs["ul2"], f"{' '.join(words[:3])} ___ {words[4]} ___", "--seed", 1)
    assert shown.returncode == 0 and shown.stdout.count("«") == 2 and words[4] in shown.stdout, shown.stderr
    longer = ask(runs["ul2"], " ".join(words[:3]), "--layers", 2, "--seed", 1, "--tokens", 8)
    assert longer.stdout.count("«") == 2 and "2 of 3 layers" in longer.stdout
    assert ask(runs["ul2"], " ".join(words[:3]), "--layers", 2, "--seed", 1, "--tokens", 8).stdout == longer.stdout


def test_bert_shows_a_path_beside_the_full_model(runs, text):
    shown = ask(runs["bert"], text[0].split()[0] + " [MASK]", "--layers", 2, "--top", 3)
    assert shown.returncode == 0 and "full model" in shown.stdout and "2 of 3 layers" in shown.stdout, shown.stderr
    again = ask(runs["bert"], text="one [MASK]\n\n")
    assert again.returncode == 0 and "mask 1" in again.stdout


def test_flags_may_stand_anywhere(runs):
    args, after = ["one [MASK]"], ["--layers", 2, "--seed", 1]
    orders = ([runs["bert"], *args, *after], [runs["bert"], *after, *args], [*after, runs["bert"], *args])
    shown = [ask(*order) for order in orders]
    assert all(one.returncode == 0 and "2 of 3 layers" in one.stdout for one in shown), [one.stderr for one in shown]
    assert len({one.stdout for one in shown}) == 1
    for more, word in ((["--layer", 2], "--layer; did you mean --layers?"), (["more"], "unknown argument more")):
        for order in orders:
            wrong = ask(*order, *more)
            assert wrong.returncode == 2 and word in wrong.stderr and wrong.stderr.count("\n") == 1, wrong.stderr


def test_no_more_words_are_shown_than_there_are(runs):
    shown = ask(runs["bert"], "one [MASK]", "--top", 2000)
    assert shown.returncode == 0 and shown.stdout.count("%") == 512 - 5, shown.stderr  # a special token is no word


def test_a_text_that_cannot_be_answered_is_asked_for_again(runs):
    shown = ask(runs["bert"], text="no mask\none [MASK]\n\n")
    assert shown.returncode == 0 and "there is no [MASK]" in shown.stdout, shown.stderr
    assert "mask 1" in shown.stdout.split("there is no [MASK]")[1]


def test_bytes_that_are_not_utf8_are_replaced(runs, monkeypatch, capsys):
    for arch, prompt in (("bert", "one [MASK] \udcff"), ("ul2", "one \udcff")):
        shown = ask(runs[arch], prompt)  # as Python hands on a byte of the command line
        assert shown.returncode == 0, shown.stderr
    monkeypatch.setattr("sys.argv", ["tools.sample", str(runs["ul2"])])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one \xff\n\n"), encoding="utf-8"))
    sample.main()
    assert "one \ufffd" in capsys.readouterr().out


def test_a_mask_takes_the_place_of_a_word_and_its_space(runs, text):
    model, tokenizer, _ = sample.load_run(runs["bert"])
    words = text[0].split()[:4]
    before, after = tokenizer.encode(" ".join(words[:2])), tokenizer.encode(f" {words[3]}")
    ids = [tokenizer.bos_id(), *before, tokenizer.piece_to_id("[MASK]"), *after, tokenizer.eos_id()]
    logits = model.logits(torch.tensor([ids]), torch.tensor([[1 + len(before)]]))[0, :, : tokenizer.vocab_size()]
    chances = sample.fill(model, tokenizer, f"{words[0]} {words[1]} [MASK] {words[3]}")
    ratio = (logits[0, 5:].softmax(-1) / chances[0, 5:]).detach()
    assert ratio.max() == pytest.approx(float(ratio.min()), rel=1e-3)  # equal but for the special tokens
    assert sample.parts("a ___ b___ c", "___") == ["a", " b", " c"]


def test_it_asks_about_held_out_sentences(runs, text):
    """Each question comes with what the text says, and together they are a sentence of the text."""
    sentences = {document.rstrip(".") + "." for document in text}
    for arch, said in (("bert", "full model"), ("ul2", "«")):
        shown = ask(runs[arch], "--held_out", 3, "--layers", 2, "--seed", 4)
        assert shown.returncode == 0 and shown.stdout.count(said) >= 3, shown.stderr
        lines = [line.strip() for line in shown.stdout.splitlines()]
        answers = [i for i, line in enumerate(lines) if line.startswith("the text says: ")]
        assert len(answers) == 3
        for i in answers:
            asked, answer = lines[i - 1], lines[i].removeprefix("the text says: ")
            whole = asked.replace("[MASK]", answer) if arch == "bert" else f"{asked} {answer}"
            assert whole in sentences
        assert ask(runs[arch], "--held_out", 3, "--layers", 2, "--seed", 4).stdout == shown.stdout


@pytest.mark.parametrize(
    "args, word",
    [(["bert", "no mask here"], "[MASK]"), (["bert", "[MASK] " * 40], "--seq"), (["ul2", "word " * 90], "--seq"),
     (["ul2", "a", "--top_p", "0"], "--top_p"), (["ul2", "a", "--temperature", "-1"], "--temperature"),
     (["ul2", "a", "--layers", "x"], "--layers"), (["nowhere", "a"], "nowhere")],
)  # fmt: skip
def test_bad_input_is_one_sentence(runs, args, word):
    shown = ask(runs.get(args[0], args[0]), *args[1:])
    assert shown.returncode == 2 and word in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr
