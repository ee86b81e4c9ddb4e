"""The figures of the benchmarks that the paper reports, from the inputs of their official tools.

AlpacaEval 2 from a judge's preferences, RewardBench from a reward model's rewards, Arena-Hard from a judge's
verdicts, and shares of pairs or prompts with their intervals. Pure functions on numpy arrays; `eval.py` reads
the files and prints the tables. The three benchmarks are in percent, as their tools and the paper have them;
accuracies and win rates under a reward model are shares, as everywhere else in this project. All intervals
are at 95%.

Left out on purpose: asking a judge (it needs a network and a key), the cross-validated L1 penalty of
AlpacaEval's fit (it moves the result by 0.1 at most), style control and version 2 of Arena-Hard.
"""
import math

import numpy as np

SIMILAR = 0.9  # two lengths are similar if the shorter is at least this share of the longer


# ---------------------------------------------------------------- shares and intervals
def wilson(share, count):
    """Bounds of the interval of a share of `count` (Wilson 1927); too wide, never too narrow, where some
    of the count are ties at a half."""
    if not count:
        return math.nan, math.nan
    z = 1.959964
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count))**2)
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def bootstrap(statistic, count, draws=1000, seed=0):
    """Bounds of the percentile interval of statistic(rows) over `draws` samples of `count` row numbers, drawn
    with replacement (Efron 1979)."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(count, size=count)) for _ in range(draws)]
    return [float(bound) for bound in np.percentile(values, [2.5, 97.5])]


def similar(lengths, others):
    """(N,), (N,) lengths in any unit -> (N,) bool."""
    return np.minimum(lengths, others) >= SIMILAR * np.maximum(lengths, others)


def share(hits, name):
    """(N,) of 0, 1, or 1/2 for a tie -> the mean under `name`, its Wilson interval and N."""
    mean = float(np.mean(hits)) if len(hits) else math.nan
    low, high = wilson(mean, len(hits))
    return {name: mean, "ci_low": low, "ci_high": high, "n": len(hits)}


def shares(hits, name, lengths, others, subsets=()):
    """The share of hits; the same where both lengths are similar; and, given (N,) names, by subset."""
    hits, subsets = np.asarray(hits, float), np.array(subsets, str)
    figures = share(hits, name) | {"similar_length": share(hits[similar(lengths, others)], name)}
    if len(subsets):
        figures["subsets"] = {str(s): share(hits[subsets == s], name) for s in np.unique(subsets)}
    return figures


# ---------------------------------------------------------------- AlpacaEval 2
def preferences(raw):
    """Raw preferences (N,): 1 baseline … 2 model, 0 a draw, NaN none -> in [0, 1], where a draw is 1/2."""
    return np.where(raw == 0, 1.5, raw) - 1


def win_rates(y):
    """(N,) preferences in [0, 1] -> AlpacaEval's figures, in percent; NaN is left out."""
    y = y[~np.isnan(y)]
    wins, losses = int((y > 0.5).sum()), int((y < 0.5).sum())
    draws = len(y) - wins - losses
    return dict(win_rate=100 * float(y.mean()), standard_error=100 * standard_error(y), n_wins=wins,
                n_wins_base=losses, n_draws=draws, n_total=len(y),
                discrete_win_rate=100 * (wins + draws / 2) / len(y))


def standard_error(values):
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def sigmoid(z):
    return np.exp(-np.logaddexp(0, -z))


def cross_entropy(theta, x, y, weights):
    """Σ w (log(1 + e^z) − y z) with z = x·θ, for labels y in [0, 1]."""
    z = x @ theta
    return float(weights @ (np.logaddexp(0, z) - y * z))


def logistic(x, y, weights):
    """(N, K), (N,) in [0, 1], (N,) -> (K,): the minimum of cross_entropy, by Newton's method; a step that
    would raise the loss is halved. The ridge keeps separable data solvable and moves no minimum."""
    theta = np.zeros(x.shape[1])
    for _ in range(100):
        p = sigmoid(x @ theta)
        gradient = x.T @ (weights * (p - y))
        if np.abs(gradient).max() < 1e-9:
            break
        hessian = (x.T * (weights * p * (1 - p))) @ x + 1e-9 * np.eye(len(theta))
        step, before = np.linalg.solve(hessian, gradient), cross_entropy(theta, x, y, weights)
        while cross_entropy(theta - step, x, y, weights) > before and np.abs(step).max() > 1e-12:
            step /= 2
        theta = theta - step
    return theta


def length_controlled(y, shorter, difficulty, gamed):
    """The preference that each row would have at equal lengths (arXiv 2404.04475): logit p = θt + φγ + ψ,
    t = tanh(shorter / its standard deviation), predicted at t = 0.

    y (N,): preferences, NaN rows are only predicted. shorter (N,): characters by which the model's answer is
    shorter than the baseline's. difficulty (N,): γ of each row's position. gamed (G, 3): t, γ, y of the two
    gamed baselines, which enter with weight 0.1 and without ψ. Returns predictions (N,), (θ, φ, ψ).
    """
    deviation = shorter.std(ddof=1) if len(shorter) > 1 else 0.0
    t = np.tanh(shorter / deviation) if deviation > 0 else np.zeros(len(shorter))
    rows = np.stack([t, difficulty, np.ones(len(y))], axis=1)[~np.isnan(y)]
    x = np.concatenate([rows, gamed[:, :2] @ np.eye(2, 3)])
    weights = np.repeat([1.0, 0.1], [len(rows), len(gamed)])
    theta = logistic(x, np.concatenate([y[~np.isnan(y)], gamed[:, 2]]), weights)
    return sigmoid(theta[1] * difficulty + theta[2]), theta


def alpaca(y, lengths, baseline_lengths, difficulty, gamed, is_baseline=False):
    """AlpacaEval 2's figures, under its names and in percent, with bootstrap intervals over the rows.

    y (N,): preferences; lengths of the outputs in characters; else as in length_controlled. The baseline
    against itself is 50 by definition.
    """
    def controlled(i):
        if is_baseline:
            return np.full(len(i), 0.5)
        return length_controlled(y[i], (baseline_lengths - lengths)[i], difficulty[i], gamed)[0]

    predicted, known = controlled(np.arange(len(y))), y[~np.isnan(y)]
    low, high = bootstrap(lambda i: 100 * known[i].mean(), len(known))
    lc_low, lc_high = bootstrap(lambda i: 100 * controlled(i).mean(), len(y))
    return win_rates(y) | dict(
        avg_length=int(np.mean(lengths)),  # cut off, not rounded, like the published ones
        length_controlled_winrate=100 * float(predicted.mean()),
        lc_standard_error=100 * standard_error(predicted),  # of the instructions' spread alone, as published
        win_rate_ci_low=low, win_rate_ci_high=high, lc_ci_low=lc_low, lc_ci_high=lc_high)


# ---------------------------------------------------------------- RewardBench
# weights of the subsets (arXiv 2403.13787); math-prm has 447 rows and weighs as much as the code
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                  "hep-python": 164, "hep-rust": 164},
}
SUBSETS = [subset for weights in SECTIONS.values() for subset in weights]
OLD_XSTEST = {"xstest-should-refuse": 250, "xstest-should-respond": 154}


def rewardbench(accuracies, old_xstest=False, prior=None):
    """{subset: percent} -> {section: percent}, their mean and, given `prior`, the published score.

    old_xstest: the two xstest weights exchanged, as the tool had them at first (published tables mix both).
    prior: percent on the prior test sets, which count half a section. A section is the weighted mean of the
    subsets that are there; the means need all four sections.
    """
    figures = {}
    for section, weights in SECTIONS.items():
        weights = {s: old_xstest and OLD_XSTEST.get(s) or w for s, w in weights.items() if s in accuracies}
        if weights:
            figures[section] = sum(w * accuracies[s] for s, w in weights.items()) / sum(weights.values())
    if len(figures) == len(SECTIONS):
        total = sum(figures.values())
        figures["Average"] = total / 4
        if prior is not None:
            figures["Score"] = (2 * total + prior) / 9
    return figures


# ---------------------------------------------------------------- Arena-Hard
GAMES = {"A>>B": (3, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B>A": (0, 1), "B>>A": (0, 3)}  # A's wins, games


def tally(first, second):
    """Verdicts on a question's two games, the baseline being A in the first and the model in the second ->
    (games won by the model, games played); no verdict, no game."""
    lost, played = GAMES.get(first, (0, 0))
    won, more = GAMES.get(second, (0, 0))
    return won + played - lost, played + more


def arena(verdicts):
    """[(first verdict, second verdict)] per question -> the score against the baseline in percent
    (arXiv 2406.11939).

    With all games against one baseline the Bradley-Terry likelihood is Π σ(θ)^won (1 − σ(θ))^lost; its
    maximum is the share of games won, so nothing is fitted. The interval draws questions, not games: the
    games of a question are not independent. (The official tool draws games.)
    """
    games = np.array([tally(*pair) for pair in verdicts], float)  # (Q, 2) won, played
    games = games[games[:, 1] > 0]
    low, high = bootstrap(lambda i: 100 * np.divide(*games[i].sum(0)), len(games))
    return dict(score=float(100 * np.divide(*games.sum(0))), ci_low=low, ci_high=high, n_questions=len(games),
                n_games=int(games[:, 1].sum()), n_no_verdict=sum(v not in GAMES for p in verdicts for v in p))
