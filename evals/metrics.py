"""The metrics of SuperGLUE and of question answering: pure functions of lists. All give 0 .. 1 (mcc: -1 .. 1).

Sources: the benchmarks' own rules: SuperGLUE (Wang et al., arXiv 1905.00537), SQuAD 1.1 and 2.0 (Rajpurkar et al.,
arXiv 1606.05250, 1806.03822), TriviaQA (Joshi et al., arXiv 1705.03551), Winogender parity (Rudinger et al., arXiv
1804.09301).
Not here: the formats of the tasks (evals/superglue.py, evals/qa_files.py).
"""

import collections
import re
import string


def accuracy(predicted, gold):
    return sum(p == g for p, g in zip(predicted, gold, strict=True)) / len(gold)


def binary_f1(predicted, gold, positive=True):
    """F1 of one label against the rest; 0 where that label is neither predicted nor there."""
    hits = sum(p == g == positive for p, g in zip(predicted, gold, strict=True))
    total = sum(p == positive for p in predicted) + sum(g == positive for g in gold)
    return 2 * hits / total if total else 0.0


def macro_f1(predicted, gold, labels):
    """Mean of one-against-the-rest F1 over all `labels`, those that never occur included."""
    return sum(binary_f1(predicted, gold, label) for label in labels) / len(labels)


def mcc(predicted, gold, positive):
    """Matthews' correlation; 0 where either side is constant."""
    cells = collections.Counter((p == positive, g == positive) for p, g in zip(predicted, gold, strict=True))
    tp, fp, fn, tn = (cells[cell] for cell in ((True, True), (True, False), (False, True), (False, False)))
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    return (tp * tn - fp * fn) / root if root else 0.0


def parity(predicted, pairs):
    """Share of pairs of sentences, which differ in a pronoun's gender alone, with one prediction for both. pairs: for
    each prediction, which pair its sentence belongs to."""
    kinds = collections.defaultdict(set)
    for p, pair in zip(predicted, pairs, strict=True):
        kinds[pair].add(p)
    return sum(len(kind) == 1 for kind in kinds.values()) / len(kinds)


def normalise(text, trivia=False):
    """SQuAD's normalisation of an answer: lower case, no punctuation, no articles, single blanks. TriviaQA's first puts
    a blank in the place of punctuation and of some more quotation marks."""
    text = text.lower()
    if trivia:
        text = re.sub(f"[{re.escape(string.punctuation)}‘’´`]", " ", text)
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def best(score, predicted, answers, **how):
    """The best score of a prediction against several right answers."""
    return max(score(predicted, answer, **how) for answer in answers)


def exact(predicted, answer, trivia=False):
    return float(normalise(predicted, trivia) == normalise(answer, trivia))


def token_f1(predicted, answer, trivia=False, empty=0.0):
    """F1 of the words that two answers share. empty: the score of two answers that both normalise to nothing: 0 in the
    scripts of SQuAD 1.1, ReCoRD, TriviaQA and T5, 1 in that of SQuAD v2."""
    a, b = normalise(predicted, trivia).split(), normalise(answer, trivia).split()
    if not a and not b:
        return empty
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * common / (len(a) + len(b))
