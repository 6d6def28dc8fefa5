"""The metrics of SuperGLUE and of question answering: pure functions of lists. All give 0 .. 1 (mcc: -1 .. 1).

Sources: the benchmarks' own rules: SuperGLUE (Wang et al., arXiv 1905.00537), SQuAD 2.0 (Rajpurkar et al., arXiv 1806.03822),
TriviaQA (Joshi et al., arXiv 1705.03551), Winogender parity (Rudinger et al., arXiv 1804.09301).
Not here: the formats of the tasks (superglue.py, qa.py).
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
    """Share of pairs (sentences that differ in a pronoun's gender) that got one prediction for both."""
    found = collections.defaultdict(set)
    for p, pair in zip(predicted, pairs, strict=True):
        found[pair].add(p)
    return sum(len(kinds) == 1 for kinds in found.values()) / len(found)


def normalise(text, trivia=False):
    """SQuAD's normalisation of an answer: lower case, no punctuation, no articles, single blanks. TriviaQA's puts a blank in
    the place of punctuation and of its own quotation marks first."""
    text = text.lower()
    if trivia:
        text = re.sub(f"[{re.escape(string.punctuation)}‘’´`_]", " ", text)
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def best(score, predicted, answers, **how):
    """The best score of a prediction against several right answers."""
    return max(score(predicted, answer, **how) for answer in answers)


def exact(predicted, answer, **how):
    return float(normalise(predicted, **how) == normalise(answer, **how))


def token_f1(predicted, answer, **how):
    """F1 of the words two answers share; where either has no words, 1 if both have none."""
    a, b = normalise(predicted, **how).split(), normalise(answer, **how).split()
    if not a or not b:
        return float(a == b)
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * common / (len(a) + len(b))
