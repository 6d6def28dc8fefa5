import numpy as np
import pytest

import data
from data import DENOISERS, MODES, NO_TARGET, UL2, Denoising, denoise, extra_tokens, mixture, span_mask
from engine import options
from engine.errors import UserError
from text.corpus import Corpus, rng
from text.prepare import SEP

VOCAB, SEQ = 1000, 128
FIRST = VOCAB + len(MODES)  # the first sentinel


def text(rows, seq=SEQ, seed=0):
    """Tokens that are all different from their neighbours, so that a mix-up would show."""
    return np.random.default_rng(seed).integers(5, VOCAB, (rows, seq - 1))


def rebuilt(tokens, prefix, targets):
    """The text of one row, put together from what is read and what is written, token by token."""
    written, current = {}, None
    for token in targets[prefix - 1 :]:
        assert token != NO_TARGET
        if token >= FIRST:
            current = written.setdefault(int(token), [])
        elif current is not None:
            current.append(int(token))
    assert targets[-1] == SEP and current.pop() == SEP
    whole = []
    for token in tokens[1:prefix]:
        whole += written.pop(int(token)) if token >= FIRST else [int(token)]
    assert not written
    return whole


def inside(part, whole):
    return any(part == list(whole[i : i + len(part)]) for i in range(len(whole) - len(part) + 1))


@pytest.mark.parametrize("name", UL2.split(","))
@pytest.mark.parametrize("seq", [32, 64, 128, 512])
def test_inputs_and_targets_rebuild_the_text(name, seq):
    source = text(40, seq)
    tokens, prefix, targets = denoise(source, [name] * 40, VOCAB, seq, rng(0, "t"))
    assert tokens.shape == targets.shape == (40, seq)
    for row in range(40):
        assert tokens[row, 0] == VOCAB + DENOISERS[name].mode
        assert inside(rebuilt(tokens[row], prefix[row], targets[row]), source[row])
        assert (targets[row, : prefix[row] - 1] == NO_TARGET).all() and (
            targets[row, prefix[row] - 1 :] != NO_TARGET
        ).all()
        assert (
            tokens[row, prefix[row] :] == targets[row, prefix[row] - 1 : -1]
        ).all()  # what is written is seen afterwards
        sentinels = tokens[row, : prefix[row]][tokens[row, : prefix[row]] >= FIRST]
        assert list(sentinels) == list(range(FIRST, FIRST + len(sentinels)))
    assert max(tokens.max(), targets.max()) < VOCAB + extra_tokens(seq)


def test_a_causal_row_is_the_text():
    source = text(3)
    tokens, prefix, targets = denoise(source, ["causal"] * 3, VOCAB, SEQ, rng(0, "t"))
    assert (prefix == 1).all() and (targets[:, :-1] == source).all() and (targets[:, -1] == SEP).all()
    assert (tokens[:, 1:] == source).all()


@pytest.mark.parametrize("name", [n for n in UL2.split(",") if n != "s"])
@pytest.mark.parametrize("seq", [512, 1280])
def test_corruption_rate_and_mean_span(name, seq):
    """Within 2% over many draws, counted from the rows themselves, and every position as often as any other."""
    denoiser, rows = DENOISERS[name], 4000
    mask, n = span_mask(denoiser, rows, seq, rng(0, "m"))
    assert mask.sum() / n.sum() == pytest.approx(denoiser.rate, rel=0.02)
    begins = mask & ~np.concatenate([np.zeros((rows, 1), bool), mask[:, :-1]], 1)
    assert mask.sum() / begins.sum() == pytest.approx(denoiser.span, rel=0.02)
    middle = mask[:, : n.min() * 9 // 10].mean(0)
    ends = [
        np.take_along_axis(mask, place, 1).mean()
        for place in (np.tile(np.arange(4), (rows, 1)), n[:, None] - 1 - np.arange(4))
    ]
    shares = [*(part.mean() for part in np.array_split(middle, 8)), *ends]  # from the row's own ends, too
    assert shares == pytest.approx([denoiser.rate] * 10, rel=0.07)
    if name == "x64":
        assert mask[np.arange(rows), n - 1].mean() < 0.25  # not always the tail


def counts(read, written, extra):
    """(tokens of text, of them in spans, spans, tokens read, tokens written) of a row, without mode and end."""
    spans = int((read >= extra).sum())
    return len(read) + len(written) - 2 * spans, len(written) - spans, spans, len(read), len(written)


def counts_of_t5(t5, denoiser, n, seed):
    """The same of n tokens of text by the functions that T5 was trained with."""
    import seqio
    import tensorflow as tf

    words, vocabulary = tf.range(5, 5 + n), seqio.PassThroughVocabulary(10 * n)  # it counts sentinels down from its end
    seeds = [(seed, 1), (seed, 2)]
    mask = t5.random_spans_noise_mask(
        n, denoiser.rate, seeds=seeds, mean_noise_span_length=float(denoiser.span or n / 4)
    )
    read = t5.noise_span_to_unique_sentinel(words, mask, vocabulary, seeds).numpy()
    written = t5.nonnoise_span_to_unique_sentinel(words, mask, vocabulary, seeds).numpy()
    return counts(read, written, 5 + n)


@pytest.mark.parametrize("seq", [512, 1280])
def test_counts_are_those_of_t5(seq):
    """Row by row the counts of T5's code on as many tokens of text, up to what it rounds. (pip install t5; with -s it
    prints results/denoisers.md.)"""
    t5 = pytest.importorskip("t5.data.preprocessors", reason="the package `t5` is not installed")
    for name in UL2.split(","):
        denoiser, rows = DENOISERS[name], 200
        tokens, prefix, targets = denoise(text(rows, seq + 1), [name] * rows, VOCAB, seq, rng(0, "t5"))
        both = []
        for row in range(rows):
            ours = counts(tokens[row, 1 : prefix[row]], targets[row, prefix[row] - 1 : -1], VOCAB)
            both.append((ours, counts_of_t5(t5, denoiser, ours[0], row)))
        ours, theirs = np.array(both).transpose(1, 0, 2)
        print(
            f"| {name}, {seq} | " + " | ".join(f"{a:.1f}, {b:.1f}" for a, b in zip(ours.mean(0), theirs.mean(0))) + " |"
        )
        assert (ours[:, 0] == theirs[:, 0]).all()
        if denoiser.span:  # the prefix language model's tail is of random length here
            assert abs(ours[:, 1] - theirs[:, 1]).max() <= 2 and abs(ours[:, 2] - theirs[:, 2]).max() <= 2
            assert abs(ours[:, 3:] - theirs[:, 3:]).max() <= 4
        else:
            assert (
                ours[:, 1].mean() == pytest.approx(theirs[:, 1].mean(), rel=0.05) and (ours[:, 2] == theirs[:, 2]).all()
            )


def test_a_prefix_language_model_writes_a_quarter():
    mask, n = span_mask(DENOISERS["s"], 4000, 512, rng(0, "m"))
    assert mask.sum() / n.sum() == pytest.approx(0.25, rel=0.02)
    assert all(row[: length - m].sum() == 0 for row, length, m in zip(mask, n, mask.sum(1)))


def test_rows_are_full_whatever_the_draw():
    names = rng(0, "n").choice(UL2.split(","), 3000)
    tokens, prefix, targets = denoise(text(3000, 64), names, VOCAB, 64, rng(0, "t"))
    assert (targets[:, -1] == SEP).all() and (prefix > 1).all() and (prefix < 64).all()


def test_the_mixture_is_even_and_can_be_weighted(corpus):
    corpus = Corpus(corpus)
    batches = Denoising(64, corpus.vocab, data.mixture(UL2), corpus)
    modes = np.concatenate([batches.batch(0, step, 64)[0][:, 0] for step in range(1, 41)]) - corpus.vocab
    assert np.bincount(modes, minlength=3) / len(modes) == pytest.approx([2 / 7, 1 / 7, 4 / 7], abs=0.03)
    assert data.mixture("r3,s:3") == {"r3": 0.25, "s": 0.75}


def test_a_batch_is_a_function_of_seed_and_step(corpus):
    corpus = Corpus(corpus)
    batches, again = (Denoising(64, corpus.vocab, data.mixture(UL2), corpus) for _ in range(2))
    again.batch(3, 8, 16)
    for a, b in zip(batches.batch(3, 9, 16), again.batch(3, 9, 16)):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(batches.batch(3, 9, 16), batches.batch(4, 9, 16)))


def test_targets_per_row_are_those_of_real_batches(corpus):
    args = options.parse(["--config", "configs/ul2_toy.toml"])
    objective = data.objective(args, Corpus(corpus))
    real = np.mean([(objective.batch(0, step, 64)[2] != NO_TARGET).sum(1).mean() for step in range(1, 21)])
    assert data.objective(args).targets_per_row() == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("bad", ["r4", "r3,", "r3:0", "r3:x", "r3:-1", "s:inf"])
def test_a_bad_mixture(bad, capsys):
    with pytest.raises(UserError, match="--denoisers"):
        data.mixture(bad)


@pytest.mark.parametrize("seq, farthest", [(32, 0.045), (128, 0.018), (512, 0.008)])
def test_the_rate_is_exact_and_positions_as_even_as_said(seq, farthest):
    """In short rows too. How far tenths of the text may be from the rate is what data.py says."""
    for name in ("r3", "r8", "x3", "x8", "x64", "x64half", "x32"):
        denoiser, generator = DENOISERS[name], rng(0, f"even {name}")
        in_spans, tokens = np.zeros(10), np.zeros(10)
        for _ in range(10 if seq < 512 else 4):
            mask, n = span_mask(denoiser, 3000, seq, generator)
            position = np.arange(mask.shape[1])[None]
            inside = position < n[:, None]
            tenth = np.minimum(9, position * 10 // n[:, None])
            in_spans += np.bincount(tenth[mask & inside], minlength=10)
            tokens += np.bincount(tenth[inside], minlength=10)
        assert in_spans.sum() / tokens.sum() == pytest.approx(denoiser.rate, abs=0.0015), name
        assert abs(in_spans / tokens - denoiser.rate).max() < farthest, name


def test_named_mixtures():
    assert mixture("ul2") == mixture(UL2) and set(mixture("ul2").values()) == {1 / 7}
    garcia = mixture("garcia")
    assert garcia == pytest.approx({"causal": 0.6, "s": 0.2, "r3": 0.1, "x32": 0.1})
    assert (DENOISERS["x32"].span, DENOISERS["x32"].rate) == (32, 0.5)
    assert (DENOISERS["r3"].span, DENOISERS["r3"].rate) == (3, 0.15)
