"""pytest tests/test_benchmarks.py

The benchmarks' figures: against numbers made by hand, against published ones, and through the command line.
"""
import csv
import json
import math

import numpy as np
import pytest

import data
import eval as eval_script
import reward
from data import Problem, read_jsonl
from evals import alpaca
from evals.alpaca import (
    alpaca_figures,
    length_controlled,
    logistic,
    preferences,
    read_annotations,
    read_gamed,
    sigmoid,
    win_rates,
)
from evals.arena import GAMES, arena_figures
from evals.rewardbench import SECTIONS, SUBSETS, rewardbench_figures
from evals.stats import bootstrap, shares, similar, wilson
from filter import win_rate


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---------------------------------------------------------------- shares and intervals
def test_wilsons_interval_is_the_textbooks():
    assert wilson(0.5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson(1.0, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert all(map(math.isnan, wilson(math.nan, 0)))


@pytest.mark.parametrize("share, count", [(0.1, 30), (0.5, 100), (0.8, 50)])
def test_wilsons_interval_covers_the_true_share_19_times_of_20(share, count, rng):
    bounds = [wilson(hits / count, count) for hits in rng.binomial(count, share, 4000)]
    assert 0.93 < np.mean([low <= share <= high for low, high in bounds]) < 0.98


def test_the_bootstrap_of_a_mean_is_two_standard_errors_wide_and_the_same_every_time(rng):
    values = rng.normal(size=400)
    low, high = bootstrap(lambda i: values[i].mean(), 400)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)
    assert [low, high] == bootstrap(lambda i: values[i].mean(), 400)


def test_shares_are_by_subset_and_among_similar_lengths():
    figures = shares([1, 0, 0.5, 1], "win_rate", np.array([10, 10, 9, 0]), np.array([9, 100, 10, 1]),
                     ["a", "b", "a", "b"])
    assert (figures["win_rate"], figures["n"]) == (0.625, 4)
    assert (figures["ci_low"], figures["ci_high"]) == wilson(0.625, 4)
    assert (figures["similar_length"]["win_rate"], figures["similar_length"]["n"]) == (0.75, 2)
    subsets = figures["subsets"]
    assert {s: (subsets[s]["win_rate"], subsets[s]["n"]) for s in subsets} == {"a": (0.75, 2), "b": (0.5, 2)}
    assert "subsets" not in shares([1], "win_rate", np.array([1]), np.array([1]))
    assert math.isnan(shares([1], "accuracy", np.array([1]), np.array([9]))["similar_length"]["accuracy"])


# ---------------------------------------------------------------- AlpacaEval
def test_win_rates_count_draws_half_and_leave_nulls_out():
    y = preferences(np.array([2, 1, 0, 1.5, 1.75, np.nan]))
    assert np.array_equal(y, [1, 0, 0.5, 0.5, 0.75, np.nan], equal_nan=True)
    figures = win_rates(y)
    assert (figures["win_rate"], figures["discrete_win_rate"]) == pytest.approx((55.0, 60.0))
    assert figures["standard_error"] == pytest.approx(100 * math.sqrt(0.55 / 4 / 5))  # 0.55: sum of squares
    assert [figures[key] for key in ("n_wins", "n_wins_base", "n_draws", "n_total")] == [2, 1, 2, 5]


@pytest.fixture
def annotated(rng):
    """(y (60,), shorter (60,), difficulty (60,), gamed (40, 3)) by chance."""
    return (rng.beta(0.5, 0.5, 60), rng.normal(100, 300, 60), rng.normal(size=60),
            np.stack([np.tanh(rng.normal(size=40)), rng.normal(size=40), rng.uniform(size=40)], axis=1))


def lc_loss(theta, y, shorter, difficulty, gamed):
    """The objective as the issue has it, row by row."""
    def bernoulli(y, z):
        p = 1 / (1 + math.exp(-z))
        return -y * math.log(p) - (1 - y) * math.log(1 - p)
    mean = sum(shorter) / len(shorter)
    s = math.sqrt(sum((d - mean)**2 for d in shorter) / (len(shorter) - 1))
    own = sum(bernoulli(v, theta[0] * math.tanh(d / s) + theta[1] * g + theta[2])
              for v, d, g in zip(y, shorter, difficulty) if not math.isnan(v))
    return own + 0.1 * sum(bernoulli(v, theta[0] * t + theta[1] * g) for t, g, v in gamed)


def test_the_length_controlled_fit_is_the_minimum_of_its_objective(annotated):
    annotated[0][[3, 7]] = np.nan  # left out of the fit, not of the prediction
    predicted, theta = length_controlled(*annotated)
    assert predicted == pytest.approx(1 / (1 + np.exp(-theta[1] * annotated[2] - theta[2])))
    for step in np.eye(3):
        slope = (lc_loss(theta + 1e-4 * step, *annotated) - lc_loss(theta - 1e-4 * step, *annotated)) / 2e-4
        assert abs(slope) < 1e-6
        for size in (-1, -0.01, 0.01, 1):
            assert lc_loss(theta + size * step, *annotated) > lc_loss(theta, *annotated)


def test_newtons_method_finds_a_known_answer_and_survives_separable_data():
    assert logistic(np.ones((4, 1)), np.array([1, 1, 1, 0.0]), np.ones(4)) == pytest.approx([math.log(3)])
    assert logistic(np.ones((2, 1)), np.array([1, 0.0]), np.array([1, 4.0])) == pytest.approx([-math.log(4)])
    x = np.array([[-5.9, 0.6, 0], [20.5, -0.1, -0.4], [-5.8, -9.3, -0.2], [0.9, -0.6, -10.6]])
    y, weights = np.array([0.98, 0.001, 0.5, 0.001]), np.array([1000, 1000, 10, 1000])
    residual = sigmoid(x @ logistic(x, y, weights)) - y  # without damping it never gets there
    assert x.T @ (weights * residual) == pytest.approx(np.zeros(3), abs=1e-6)
    assert sigmoid(logistic(np.ones((5, 1)), np.ones(5), np.ones(5))) == pytest.approx(1)


def test_length_is_what_the_length_control_takes_out(annotated):
    _, shorter, difficulty, gamed = annotated
    t = np.tanh(shorter / shorter.std(ddof=1))
    y = 1 / (1 + np.exp(2 * t - 0.5 * difficulty + 0.3))  # a judge who likes length, on an answer a bit worse
    predicted, theta = length_controlled(y, shorter, difficulty, np.stack(
        [gamed[:, 0], gamed[:, 1], 1 / (1 + np.exp(2 * gamed[:, 0] - 0.5 * gamed[:, 1]))], axis=1))
    assert theta == pytest.approx([-2, 0.5, -0.3])
    assert predicted == pytest.approx(1 / (1 + np.exp(-0.5 * difficulty + 0.3)))


def test_the_intervals_hold_the_estimates_and_the_baseline_is_50(annotated):
    y, shorter, difficulty, gamed = annotated
    lengths, base = np.full(60, 500.0), 500 + shorter
    figures = alpaca_figures(y, lengths, base, difficulty, gamed)
    assert figures["win_rate_ci_low"] < figures["win_rate"] < figures["win_rate_ci_high"]
    assert figures["lc_ci_low"] < figures["length_controlled_winrate"] < figures["lc_ci_high"]
    itself = alpaca_figures(np.full(60, 0.5), base, base, difficulty, gamed, is_baseline=True)
    assert itself["length_controlled_winrate"] == itself["win_rate"] == 50
    assert itself["lc_standard_error"] == itself["standard_error"] == 0


SYSTEMS = ["FuseChat-Llama-3.1-8B-Instruct", "OpenHermes-2.5-Mistral-7B", "alpaca-7b_verbose", "claude-2.1",
           "claude-2.1_concise", "gpt-3.5-turbo-1106", "gpt-3.5-turbo-1106_verbose", "gpt4_1106_preview",
           "openbuddy-llama2-70b-v10.1", "vicuna-13b-v1.5"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_ten_systems_agree_with_what_was_published(shared, system, monkeypatch):
    folder = shared / "data" / "alpaca_eval"
    expected = json.loads((folder / "expected.json").read_text())[system]
    model, baseline, raw, lengths, base = read_annotations(folder / "annotations" / f"{system}.json")
    difficulty, gamed = read_gamed(folder / "df_gamed_reconstructed.csv")
    assert len(difficulty) == 805 and gamed.shape == (1610, 3)
    monkeypatch.setattr(alpaca, "bootstrap", lambda *_: (0, 0))  # seconds, and not compared here
    figures = alpaca_figures(preferences(raw), lengths, base, difficulty[:len(raw)], gamed,
                                model == baseline)
    for key in expected.keys() & {"win_rate", "standard_error", "discrete_win_rate", "n_wins", "n_wins_base",
                                  "n_draws", "n_total"}:
        assert figures[key] == pytest.approx(expected[key], abs=1e-6), key
    controlled = figures["length_controlled_winrate"]
    fit = expected.get("same_inputs_mle", {"lc": 50, "se": 0})  # the baseline has none
    assert controlled == pytest.approx(expected["length_controlled_winrate"], abs=0.2)
    assert controlled == pytest.approx(fit["lc"], abs=1e-3)
    assert figures["lc_standard_error"] == pytest.approx(fit["se"], abs=1e-3)
    if len(raw) == 805:  # else the published length is of outputs that have no annotation
        assert figures["avg_length"] == expected["avg_length"]


# ---------------------------------------------------------------- RewardBench
def test_a_section_is_weighted_and_the_average_is_not():
    accuracies = dict.fromkeys(SUBSETS, 50.0) | {"math-prm": 100.0, "mt-bench-hard": 0.0}
    figures = rewardbench_figures(accuracies, prior=60.0)
    assert figures["Chat"] == figures["Safety"] == 50
    assert figures["Reasoning"] == pytest.approx(75)  # math weighs as much as the six languages
    assert figures["Chat Hard"] == pytest.approx(50 * (1 - 37 / 456))
    four = [figures[s] for s in ("Chat", "Chat Hard", "Safety", "Reasoning")]
    assert figures["Average"] == pytest.approx(sum(four) / 4)
    assert figures["Score"] == pytest.approx((2 * sum(four) + 60) / 9)


def test_the_older_convention_exchanges_the_two_xstest_weights():
    accuracies = {"xstest-should-refuse": 100.0, "xstest-should-respond": 0.0}
    assert rewardbench_figures(accuracies) == {"Safety": pytest.approx(100 * 154 / 404)}  # alone: no average
    assert rewardbench_figures(accuracies, old_xstest=True) == {"Safety": pytest.approx(100 * 250 / 404)}


def test_weights_and_the_tools_own_example_agree_with_the_specification(shared):
    spec = json.loads((shared / "data" / "rewardbench" / "spec.json").read_text())
    assert {s: w for weights in SECTIONS.values() for s, w in weights.items()} == spec["weights"]
    assert {name: sorted(weights) for name, weights in SECTIONS.items()} == {
        name: sorted(subsets) for name, subsets in spec["sections"].items()}
    accuracies = {s: 100 * value for s, value in spec["example"]["per_subset"].items()}
    figures, old = rewardbench_figures(accuracies), rewardbench_figures(accuracies, old_xstest=True)
    for section, value in spec["example"]["expected_current"].items():
        assert figures[section] == pytest.approx(value, abs=0.005)
    assert old["Safety"] == pytest.approx(spec["example"]["expected_pre_sep2024"]["Safety"], abs=0.005)


# ---------------------------------------------------------------- Arena-Hard
def test_two_greater_signs_are_three_games_a_tie_is_half_and_no_verdict_is_none():
    figures = arena_figures([("A>>B", "A>B"), ("B>A", None), ("A=B", "A>>B"), (None, "A>C")])
    assert (figures["n_games"], figures["n_questions"], figures["n_no_verdict"]) == (9, 3, 3)
    assert figures["score"] == pytest.approx(100 * (0 + 1 + 1 + 0.5 + 3) / 9)  # the baseline is A at first
    assert 0 <= figures["ci_low"] < figures["score"] < figures["ci_high"] <= 100
    assert arena_figures([("A>B", "B>A")])["score"] == 0 and arena_figures([("B>>A", "A>>B")])["score"] == 100


def bradley_terry(games, models):
    """(model, won) of games against a baseline of strength 0 -> strengths, by gradient ascent on Σ log σ."""
    strength = np.zeros(models)
    model, won = np.array([m for m, _ in games]), np.array([w for _, w in games])
    for _ in range(5000):
        residual = won - 1 / (1 + np.exp(-strength[model]))
        strength += 4 * np.bincount(model, residual, models) / np.bincount(model, minlength=models)
    return strength


def test_the_score_is_the_bradley_terry_maximum_likelihood(rng):
    labels, games, scores = list(GAMES), [], []
    for model, taste in enumerate(np.array([[3, 4, 1, 1, 1], [1, 1, 1, 4, 2], [1, 1, 1, 1, 1]]) / 10):
        taste = taste / taste.sum()
        verdicts = [*zip(rng.choice(labels, 80, p=taste), rng.choice(labels, 80, p=taste[::-1]))]
        scores.append(arena_figures(verdicts)["score"])
        for first, second in verdicts:
            for verdict, sign in ((first, "B"), (second, "A")):
                won = 0.5 if "=" in verdict else float(verdict[0] == sign)
                games += [(model, won)] * (3 if ">>" in verdict else 1)
    strengths = bradley_terry(games, 3)
    assert scores == pytest.approx(100 / (1 + np.exp(-strengths)), abs=1e-6)
    assert scores[0] < scores[2] - 10 < scores[1] - 20


def test_the_arenas_interval_holds_the_truth_19_times_of_20_though_games_depend_on_the_question(rng):
    held = []
    for _ in range(200):  # a question is won in both games or lost in both, by three games each
        questions = rng.random(60) < 0.4
        figures = arena_figures([("B>>A", "A>>B") if won else ("A>>B", "B>>A") for won in questions])
        held.append(figures["ci_low"] <= 40 <= figures["ci_high"])
    assert 0.88 < np.mean(held) <= 0.99


# ---------------------------------------------------------------- the commands
@pytest.fixture
def gamed(tmp_path):
    """df_gamed.csv of four instructions."""
    path = tmp_path / "df_gamed.csv"
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["preference", "index", "std_delta_len", "instruction_difficulty", "model"])
        table.writerows([0.6 - 0.1 * i, i, 0.3 * i - 0.5, 0.2 * i, model] for model in "ab" for i in range(4))
    return path


ROWS = [dict(preference=p, output_1="b" * b, output_2="m" * m, generator_1="base", generator_2="mine")
        for p, b, m in ((2.0, 10, 20), (1.2, 30, 20), (None, 10, 11), (0, 40, 10))]
COLUMNS = dict(model="mine", baseline="base", preference=[2.0, 1.2, None, 0], len_output=[20, 20, 11, 10],
               len_baseline=[10, 30, 10, 40])


def test_annotations_give_the_same_in_both_forms(call, gamed, tmp_path, capsys):
    for name, value in (("rows", ROWS), ("columns", COLUMNS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
        call(eval_script, "alpaca", "--annotations", tmp_path / f"{name}.json", "--gamed", gamed,
             "--json", tmp_path / f"{name}.out.json")
    assert "mine against base" in capsys.readouterr().out
    figures = json.loads((tmp_path / "rows.out.json").read_text())
    assert figures == json.loads((tmp_path / "columns.out.json").read_text())
    assert {"win_rate", "standard_error", "discrete_win_rate", "avg_length", "length_controlled_winrate",
            "lc_standard_error"} <= figures.keys()
    assert figures["win_rate"] == pytest.approx(100 * 1.7 / 3) and figures["avg_length"] == 15
    difficulty, baselines = read_gamed(gamed)
    assert difficulty == pytest.approx([0, 0.2, 0.4, 0.6]) and baselines.shape == (8, 3)
    assert baselines[0] == pytest.approx([math.tanh(-0.5), 0, 0.6])
    assert baselines[7] == pytest.approx([math.tanh(0.4), 0.6, 0.3])
    predicted, _ = length_controlled(np.array([1, 0.2, np.nan, 0.5]), np.array([-10, 10, -1, 30.0]),
                                     difficulty, baselines)
    assert figures["length_controlled_winrate"] == pytest.approx(100 * predicted.mean())


def test_rewardbench_from_a_file(call, tiny, written, pairs, tmp_path, capsys):
    rows = [dict(prompt=p["prompt"], chosen=p["chosen"], rejected=p["rejected"], subset=s)
            for p, s in zip(pairs, 2 * SUBSETS)]
    path = written("filtered.jsonl", rows)
    call(eval_script, "rewardbench", "--rm", tiny(reward=True), "--data", path, "--prior", 70,
         "--json", tmp_path / "out.json")
    figures, said = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    right = reward.ordered(tiny(reward=True), data.read_pairs(path), 8)
    accuracies = {s: 50.0 * (right[i] + right[i + 23]) for i, s in enumerate(SUBSETS)}
    assert figures == pytest.approx(accuracies | rewardbench_figures(accuracies, prior=70))
    assert 0 < figures["Average"] < 100 and "46 pairs\n" in said
    for section in ("Chat", "Chat Hard", "Safety", "Reasoning", "Average", "Score"):
        assert f"\n{section:26}{figures[section]:.6g}\n" in said
    call(eval_script, "rewardbench", "--rm", tiny(reward=True), "--data", written("few.jsonl", rows[1:23]))
    assert "without alpacaeval-easy\n" in capsys.readouterr().out


def test_accuracy_is_by_subset_and_its_file_is_json_even_without_similar_pairs(
        call, tiny, written, pairs, tmp_path, capsys):
    rows = [dict(prompt=p["prompt"], chosen=p["chosen"], rejected="no .", subset="ab"[i % 2])
            for i, p in enumerate(pairs[:20])]
    call(eval_script, "accuracy", "--rm", tiny(reward=True), "--pairs", written("pairs.jsonl", rows),
         "--json", tmp_path / "out.json")
    figures = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert figures["n"] == 20
    assert figures["similar_length"] == dict(accuracy=None, ci_low=None, ci_high=None, n=0)
    assert figures["accuracy"] == pytest.approx(np.mean([figures["subsets"][s]["accuracy"] for s in "ab"]))
    assert (figures["ci_low"], figures["ci_high"]) == wilson(figures["accuracy"], 20)
    assert "similar_length" in capsys.readouterr().out


def test_arena_from_a_file_and_a_verdict_that_is_missing(call, written, tmp_path):
    games = [("A>B", "A>>B"), ("A=B", None), ("B>A", "A>B")]
    rows = [dict(question_id=str(i), model="mine", games=[{"score": score} for score in pair])
            for i, pair in enumerate(games)] + [dict(question_id="x", model="mine", games=[None, None])]
    call(eval_script, "arena", "--judgments", written("mine.jsonl", rows), "--json", tmp_path / "out.json")
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures == pytest.approx(arena_figures(games) | {"n_no_verdict": 3})
    assert figures["score"] == pytest.approx(100 * 5.5 / 7) and figures["ci_low"] <= figures["ci_high"]


def test_winrate_needs_no_folder_and_writes_lengths_of_both_sides(
        call, tiny, written, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written("prompts.jsonl", [{"prompt": p} for p in prompts[:10]])
    words = ["winrate", "--policy", tiny(seed=1), "--baseline", tiny(), "--rm", tiny(reward=True),
             "--prompts", path, "--max_new_tokens", 8]
    call(eval_script, *words)
    call(eval_script, *words, "--json", "out.json")  # the same run, asked for its file later
    figures = json.loads((tmp_path / "out.json").read_text())
    rows = [read_jsonl(tmp_path / "runs" / "winrate" / f"{side}.jsonl") for side in ("policy", "baseline")]
    assert figures["win_rate"] == win_rate(*([row["score"] for row in side] for side in rows))
    assert (figures["ci_low"], figures["ci_high"]) == wilson(figures["win_rate"], 10)
    for side, answers in zip(("policy", "baseline"), rows):
        assert figures[side]["characters"] == np.mean([len(row["response"]) for row in answers])
        assert figures[side]["tokens"] == np.mean([row["tokens"] for row in answers])
    lengths = [np.array([len(row["response"]) for row in side]) for side in rows]
    assert figures["similar_length"]["n"] == similar(*lengths).sum()


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_alpaca_generate_writes_what_the_official_tool_reads(call, tiny, tmp_path, prompts, temperature):
    source, out = tmp_path / "alpaca_eval.json", tmp_path / "out"
    source.write_text(json.dumps([dict(instruction=p, dataset=f"d{i}", output="theirs", generator="them")
                                  for i, p in enumerate(prompts[:5] + prompts[:1])]))
    call(eval_script, "alpaca-generate", "--policy", tiny(), "--prompts", source, "--out", out,
         "--name", "mine", "--max_new_tokens", 8, "--temperature", temperature)
    rows, samples = json.loads((out / "model_outputs.json").read_text()), read_jsonl(out / "samples.jsonl")
    assert rows == [dict(instruction=p, output=s["response"], generator="mine", dataset=f"d{i}")
                    for i, (p, s) in enumerate(zip(prompts[:5] + prompts[:1], samples, strict=True))]
    assert rows[0]["output"] == rows[5]["output"] and len({row["output"] for row in rows}) > 1


def test_arena_generate_writes_what_the_official_tool_reads(call, tiny, written, tmp_path, prompts):
    questions = [dict(question_id=f"q{i}", turns=[{"content": p}]) for i, p in enumerate(prompts[:5])]
    call(eval_script, "arena-generate", "--policy", tiny(), "--prompts", written("question.jsonl", questions),
         "--out", tmp_path / "out", "--max_new_tokens", 8)
    name = tiny().rpartition("/")[2]
    rows, samples = (read_jsonl(tmp_path / "out" / f"{file}.jsonl") for file in (name, "samples"))
    assert [sample["prompt"] for sample in samples] == prompts[:5]
    for row, question, sample in zip(rows, questions, samples, strict=True):
        assert (row["question_id"], row["model_id"]) == (question["question_id"], name)
        turns = row["choices"][0]["turns"]
        assert turns == [{"content": sample["response"], "token_len": sample["tokens"]}]
    assert len({row["answer_id"] for row in rows}) == 5


# ---------------------------------------------------------------- what can go wrong
@pytest.mark.parametrize("command", eval_script.COMMANDS)
def test_every_command_has_help_with_an_example(command, call, capsys):
    with pytest.raises(SystemExit) as end:
        call(eval_script, command, "--help")
    assert end.value.code == 0 and f"python eval.py {command} " in capsys.readouterr().out


@pytest.mark.parametrize("words, place", [
    (["alpaca", "--annotations", "nowhere.json", "--gamed", "GAMED"], "github.com/tatsu-lab/alpaca_eval"),
    (["alpaca", "--annotations", "HERE", "--gamed", "nowhere.json"], "huggingface.co/datasets/tatsu-lab"),
    (["rewardbench", "--rm", "x", "--data", "nowhere.json"], "huggingface.co/datasets/allenai/reward-bench"),
    (["arena", "--judgments", "nowhere.json"], "arena-hard-browser"),
    (["alpaca-generate", "--policy", "x", "--prompts", "nowhere.json"], "alpaca_eval.json"),
    (["arena-generate", "--policy", "x", "--prompts", "nowhere.json"], "question.jsonl")])
def test_a_missing_file_is_named_with_where_it_is_published(words, place, call, gamed, tmp_path):
    (tmp_path / "here.json").write_text(json.dumps(COLUMNS))
    files = {"GAMED": gamed, "HERE": tmp_path / "here.json"}
    with pytest.raises(Problem) as error:
        call(eval_script, *(files.get(word, word) for word in words))
    said = str(error.value)
    assert said.startswith("nowhere.json: no such file") and place in said and "\n" not in said


@pytest.mark.parametrize("value, message", [
    ([{"a": 1}], "not AlpacaEval's annotations .*preference"),
    (COLUMNS | {"preference": [2.0, 3.0, None, 0]}, "from 1 to 2"),
    (COLUMNS | {"preference": [None] * 4}, "from 1 to 2"),
    (COLUMNS | {"preference": [1, 1, 1, "?"]}, "not AlpacaEval's annotations"),
    (COLUMNS | {"len_output": [1, 2]}, "different lengths"),
    ([ROWS[0], ROWS[1] | {"generator_2": "another"}], "several models"),
    (2 * ROWS, "8 rows, but .* knows 4")])
def test_annotations_that_are_none_are_a_problem(value, message, call, gamed, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(Problem, match=message):
        call(eval_script, "alpaca", "--annotations", tmp_path / "a.json", "--gamed", gamed)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "HEAD\n", "HEAD\n1,x,2,3\n", "HEAD\n1\n"])
def test_a_gamed_file_that_is_none_is_a_problem(text, call, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(COLUMNS))
    head = "index,std_delta_len,instruction_difficulty,preference"
    (tmp_path / "g.csv").write_text(text.replace("HEAD", head))
    with pytest.raises(Problem, match="g.csv: not AlpacaEval's df_gamed.csv"):
        call(eval_script, "alpaca", "--annotations", tmp_path / "a.json", "--gamed", tmp_path / "g.csv")


@pytest.mark.parametrize("rows, message", [
    ([dict(model="m", verdict="A>B")], "not Arena-Hard's judgments .*games"),
    ([dict(model="m", games=[{"score": "A>B"}])], "two games per question"),
    ([dict(model=m, games=[{"score": "A>B"}] * 2) for m in "ab"], "all of one model"),
    ([dict(model="m", games=[{"score": "A"}] * 2)], "no verdict .*A>>B")])
def test_judgments_that_are_none_are_a_problem(rows, message, call, written):
    with pytest.raises(Problem, match=message):
        call(eval_script, "arena", "--judgments", written("j.jsonl", rows))


def test_a_reward_that_is_not_finite_is_no_accuracy(call, tiny, written, pairs, monkeypatch):
    monkeypatch.setattr(reward, "score_answers", lambda *_: [[1.0, math.nan]])
    with pytest.raises(Problem, match="rewards \\[1.0, nan\\] to the answers to 'a sad"):
        call(eval_script, "accuracy", "--rm", tiny(reward=True), "--pairs", written("pairs.jsonl", pairs[:1]))


def test_from_the_shell_a_problem_is_one_line_and_exit_code_2(script):
    done = script("eval.py", "arena", "--judgments", "nowhere.jsonl")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("eval.py: nowhere.jsonl: no such file") and done.stderr.count("\n") == 1


def test_other_files_that_are_none_are_a_problem(call, tiny, written, pairs):
    path = written("q.jsonl", [dict(question_id=1, turns=[])])
    with pytest.raises(Problem, match="not Arena-Hard v0.1's questions"):
        call(eval_script, "arena-generate", "--policy", tiny(), "--prompts", path)
    with pytest.raises(Problem, match="q.jsonl:1: no prompt"):
        call(eval_script, "alpaca-generate", "--policy", tiny(), "--prompts", path)
    pair = dict(prompt="p", chosen="c", rejected="r")
    path = written("p.jsonl", [pair | {"subset": "hep-go"}, pair | {"subset": "shp"}])
    with pytest.raises(Problem, match="not a subset of RewardBench v1: shp"):
        call(eval_script, "rewardbench", "--rm", tiny(reward=True), "--data", path)
