"""pytest tests/test_alpaca.py

AlpacaEval's figures agree with numbers worked out by hand and with published ones, also through the commands,
and files that are not AlpacaEval's are refused. The published numbers are in ../shared; that test is skipped
without it.
"""
import json
import math

import numpy as np
import pytest

import eval as eval_script
from common.data import read_jsonl
from common.parallel import Problem
from evals import alpaca
from evals.alpaca import alpaca_figures, length_controlled, logistic, preferences, read_gamed, sigmoid

def test_win_rates_count_a_draw_as_half_and_leave_nulls_out():
    y = preferences(np.array([2, 1, 0, 1.5, 1.75, np.nan]))
    assert np.array_equal(y, [1, 0, 0.5, 0.5, 0.75, np.nan], equal_nan=True)
    figures = alpaca.win_rates(y)
    assert (figures["win_rate"], figures["discrete_win_rate"]) == pytest.approx((55.0, 60.0))
    # the squared deviations from the mean add up to 0.55; they are divided by n − 1 = 4 and by n = 5
    assert figures["standard_error"] == pytest.approx(100 * math.sqrt(0.55 / 4 / 5))
    assert [figures[key] for key in ("n_wins", "n_wins_base", "n_draws", "n_total")] == [2, 1, 2, 5]

@pytest.fixture
def annotated(rng):
    """Random y (60,), shorter (60,), difficulty (60,) and gamed (40, 3), as length_controlled takes them."""
    return (rng.beta(0.5, 0.5, 60), rng.normal(100, 300, 60), rng.normal(size=60),
            np.stack([np.tanh(rng.normal(size=40)), rng.normal(size=40), rng.uniform(size=40)], axis=1))

def lc_loss(theta, y, shorter, difficulty, gamed):
    """The objective of the length-controlled fit, written row by row."""
    def bernoulli(y, z):
        p = 1 / (1 + math.exp(-z))
        return -y * math.log(p) - (1 - y) * math.log(1 - p)
    mean = sum(shorter) / len(shorter)
    s = math.sqrt(sum((d - mean)**2 for d in shorter) / (len(shorter) - 1))
    own = sum(bernoulli(v, theta[0] * math.tanh(d / s) + theta[1] * g + theta[2])
              for v, d, g in zip(y, shorter, difficulty) if not math.isnan(v))
    return own + 0.1 * sum(bernoulli(v, theta[0] * t + theta[1] * g) for t, g, v in gamed)

def test_the_length_controlled_fit_is_the_minimum_of_its_objective(annotated):
    annotated[0][[3, 7]] = np.nan  # NaN rows are left out of the fit but are predicted
    predicted, theta = length_controlled(*annotated)
    assert predicted == pytest.approx(1 / (1 + np.exp(-theta[1] * annotated[2] - theta[2])))
    for step in np.eye(3):
        for size in (-1, -1e-3, 1e-3, 1):
            assert lc_loss(theta + size * step, *annotated) > lc_loss(theta, *annotated)

def test_newtons_method_converges_where_it_needs_damping_and_on_separable_data():
    x = np.array([[-5.9, 0.6, 0], [20.5, -0.1, -0.4], [-5.8, -9.3, -0.2], [0.9, -0.6, -10.6]])
    y, weights = np.array([0.98, 0.001, 0.5, 0.001]), np.array([1000, 1000, 10, 1000])
    residual = sigmoid(x @ logistic(x, y, weights)) - y
    assert x.T @ (weights * residual) == pytest.approx(np.zeros(3), abs=1e-6)
    assert sigmoid(logistic(np.ones((5, 1)), np.ones(5), np.ones(5))) == pytest.approx(1)  # separable data

def test_each_interval_contains_its_estimate_and_the_baseline_itself_has_50_percent(annotated):
    y, shorter, difficulty, gamed = annotated
    lengths, base = np.full(60, 500.0), 500 + shorter
    figures = alpaca_figures(y, lengths, base, difficulty, gamed)
    assert figures["win_rate_ci_low"] < figures["win_rate"] < figures["win_rate_ci_high"]
    assert figures["lc_ci_low"] < figures["length_controlled_winrate"] < figures["lc_ci_high"]
    itself = alpaca_figures(np.full(60, 0.5), base, base, difficulty, gamed, is_baseline=True)
    assert itself["length_controlled_winrate"] == itself["win_rate"] == 50
    assert itself["lc_standard_error"] == itself["standard_error"] == 0

def test_a_policy_in_a_run_folder_is_named_after_the_run_and_the_step():
    for policy, name in (("models/llama", "llama"), ("meta-llama/Llama", "Llama"), ("runs/mt/policy", "mt"),
                         ("runs/mt/round1/e2/policy", "mt-round1-e2")):
        assert alpaca.name_of(policy) == name

def test_the_figures_of_ten_systems_are_the_published_ones(shared, monkeypatch):
    folder = shared / "data" / "alpaca_eval"
    published = json.loads((folder / "expected.json").read_text())
    difficulty, gamed = read_gamed(folder / "df_gamed_reconstructed.csv")
    assert len(published) == 10 and len(difficulty) == 805 and gamed.shape == (1610, 3)
    monkeypatch.setattr(alpaca, "bootstrap", lambda *_: (0, 0))  # slow, and not compared here
    for system, expected in published.items():
        path = folder / "annotations" / f"{system}.json"
        model, baseline, raw, lengths, base = alpaca.read_annotations(path)
        figures = alpaca_figures(
            preferences(raw), lengths, base, difficulty[:len(raw)], gamed, model == baseline)
        for key in expected.keys() & set(
                "win_rate standard_error discrete_win_rate n_wins n_wins_base n_draws n_total".split()):
            assert figures[key] == pytest.approx(expected[key], abs=1e-6), (system, key)
        fit = expected.get("same_inputs_mle", {"lc": 50, "se": 0})  # the baseline has no fit
        controlled, error = figures["length_controlled_winrate"], figures["lc_standard_error"]
        assert controlled == pytest.approx(expected["length_controlled_winrate"], abs=0.2), system
        assert (controlled, error) == pytest.approx((fit["lc"], fit["se"]), abs=1e-3), system
        if len(raw) == 805:  # else the published length counts outputs without an annotation, too
            assert figures["avg_length"] == expected["avg_length"], system

# ---------------------------------------------------------------- the commands
@pytest.fixture
def gamed(tmp_path):
    """A file like df_gamed.csv, of two gamed baselines on four instructions."""
    lines = ["preference,index,std_delta_len,instruction_difficulty,model"] + [
        f"{0.6 - 0.1 * i},{i},{0.3 * i - 0.5},{0.2 * i},{model}" for model in "ab" for i in range(4)]
    (tmp_path / "df_gamed.csv").write_text("\n".join(lines))
    return tmp_path / "df_gamed.csv"

ROWS = [dict(preference=p, output_1="b" * b, output_2="m" * m, generator_1="base", generator_2="mine")
        for p, b, m in ((2.0, 10, 20), (1.2, 30, 20), (None, 10, 11), (0, 40, 10))]
COLUMNS = dict(model="mine", baseline="base", preference=[2.0, 1.2, None, 0], len_output=[20, 20, 11, 10],
               len_baseline=[10, 30, 10, 40])

def test_annotations_as_rows_and_as_columns_give_the_same_figures(call, gamed, tmp_path, capsys):
    for name, value in (("rows", ROWS), ("columns", COLUMNS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
        call(eval_script, "alpaca", "--annotations", tmp_path / f"{name}.json", "--gamed", gamed,
             "--json", tmp_path / f"{name}.out.json")
    assert "mine against base" in capsys.readouterr().out
    figures = json.loads((tmp_path / "rows.out.json").read_text())
    assert figures == json.loads((tmp_path / "columns.out.json").read_text())
    assert figures["win_rate"] == pytest.approx(100 * 1.7 / 3) and figures["avg_length"] == 15
    difficulty, baselines = read_gamed(gamed)
    assert difficulty == pytest.approx([0, 0.2, 0.4, 0.6]) and baselines.shape == (8, 3)
    assert baselines[7] == pytest.approx([math.tanh(0.4), 0.6, 0.3])
    predicted, _ = length_controlled(np.array([1, 0.2, np.nan, 0.5]), np.array([-10, 10, -1, 30.0]),
                                     difficulty, baselines)
    assert figures["length_controlled_winrate"] == pytest.approx(100 * predicted.mean())

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

# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize("value, message", [
    ([{"a": 1}], "not AlpacaEval's annotations .*preference"),
    (COLUMNS | {"preference": [2.0, 3.0, None, 0]}, "from 1 to 2"),
    (COLUMNS | {"preference": [None] * 4}, "from 1 to 2"),
    (COLUMNS | {"preference": [1, 1, 1, "?"]}, "not AlpacaEval's annotations"),
    (COLUMNS | {"len_output": [1, 2]}, "different lengths"),
    ([ROWS[0], ROWS[1] | {"generator_2": "another"}], "several models"),
    (2 * ROWS, "8 rows, but .* knows 4")])
def test_a_file_that_is_not_annotations_of_one_model_is_refused(value, message, call, gamed, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(Problem, match=message):
        call(eval_script, "alpaca", "--annotations", tmp_path / "a.json", "--gamed", gamed)

def test_a_file_that_is_not_df_gamed_or_has_no_instructions_is_refused(call, tiny, written, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(COLUMNS))
    for text in ("", "a,b\n1,2\n", "HEAD\n", "HEAD\n1,x,2,3\n", "HEAD\n1\n"):
        head = "index,std_delta_len,instruction_difficulty,preference"
        (tmp_path / "g.csv").write_text(text.replace("HEAD", head))
        with pytest.raises(Problem, match="g.csv: not AlpacaEval's df_gamed.csv"):
            call(eval_script, "alpaca", "--annotations", tmp_path / "a.json", "--gamed", tmp_path / "g.csv")
    path = written("q.jsonl", [dict(question_id=1, turns=[])])
    with pytest.raises(Problem, match="q.jsonl:1: the prompt None can't be read"):
        call(eval_script, "alpaca-generate", "--policy", tiny(), "--prompts", path)
