"""pytest tests/test_report.py

The report shows what the files of a run say, whatever texts they hold and however large they are. Its verdict
and its warnings follow from the numbers, its page is safe to open, and damaged runs are refused in one line.
"""
import json
import random
import re
import shutil
import sys
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import with_weights

import eval as eval_script
import reward
from common import toy
from common.data import by_prompt, read_jsonl, write_jsonl
from common.parallel import Problem
from eval import report
from evals import figures
from evals.report import TEXT_BYTES
from evals.stats import ordered_alike, share
from filter import compare, preference_pairs
from sampler import sample

RATES = {"e1": {"step-1": 0.5, "step-2": 0.75}, "e2": {"step-1": 0.25}}
HOSTILE = ['<script>window.pwned=1</script>', '</script><img src=x onerror="window.pwned=1">', '"\'>&amp;<b>',
           "</style></details></li><svg onload=window.pwned=1>", "\u202eevil\x00\x1b $\\frac$", "--> ]]>"]

def answers(prompts, samples, rng, text):
    """Return scored responses as sampler.py and reward.py write them."""
    return [dict(prompt=p, index=i, response=text(p, rng), tokens=rng.randrange(5, 30),
                 finished=rng.random() < 0.9, score=rng.gauss(0, 2)) for p in prompts for i in range(samples)]

def make_run(folder, prompts, text=toy.demonstration, gold=False, **settings):
    """Write a run of one round that stopped in its last step. filter.py makes its pairs and comparisons."""
    rng, at = random.Random(0), folder / "round1" / "m"
    if settings.get("update_rm", True):
        new, old = (answers(prompts, 1, rng, text) for _ in range(2))
        write_jsonl(at / "comparisons.jsonl", compare(new, old, settings.get("filter", True)))
        (at / "rm").mkdir()
    for part, rates in RATES.items():
        at = folder / "round1" / part
        samples = answers(prompts, 5, rng, text)
        write_jsonl(at / "samples.jsonl", samples)
        write_jsonl(at / "pairs.jsonl", preference_pairs(samples)[0])
        rates = rates if settings.get("select", True) else {}
        chosen = None if rates == RATES["e2"] else "step-2"
        (at / "selection.json").write_text(json.dumps({"chosen": chosen, "win_rates": rates, "tau": 0.6}))
        write_jsonl(at / "select" / "before.jsonl", answers(prompts[:5], 1, rng, text))
    if gold:
        row = dict(gold=1.25, gold_se=0.1, form=1.0, content=0.25, n=30, win_rate=0.5, tokens=9.0,
                   finished=0.9, reward_r0=0.2, reward_r0_se=0.3, rm="r0", accuracy_base=0.625,
                   accuracy_current=0.71)
        write_jsonl(folder / "gold.jsonl", [row | {"policy": policy} for policy in ("base", "round 1")])
    write_jsonl(folder / "metrics.jsonl", [
        {"phase": f"round1/{p}/checkpoints", "loss": 0.7, "rewards/margins": 1, "rewards/accuracies": i / 20,
         "rewards/chosen": 1, "rewards/rejected": -1} for p in RATES for i in range(1, 12)]
        + [{"phase": "round1/m/rm", "loss": 0.4, "margin": 1.5, "accuracy": 0.875, "mean_reward": 0.0}] * 5)
    (folder / "run.json").write_text(json.dumps({"settings": {"rounds": 1, **settings}, "versions": {}}))
    return folder

@pytest.fixture
def run(tmp_path, prompts):
    return make_run(tmp_path / "run", prompts)

def written_page(*runs):
    report(*runs)
    return (runs[0] / "report.html").read_text(encoding="utf-8")

class Reader(HTMLParser):
    """What a browser reads in a page: `tags` with their attributes, and `texts`."""
    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.handle_starttag = lambda tag, attrs: self.tags.append((tag, dict(attrs)))
        self.handle_data = self.texts.append
        self.feed(page)

STATE = dict(policy="base", n=300, win_rate=0.5, reward_r0=0.0, reward_r0_se=0.05, tokens=20.0, finished=1.0)

@pytest.mark.parametrize("values, said", [
    ((3.0, 3.3, 3.6), "The policy got better: gold rose from 3.00 to 3.60. More --rounds may add to that."),
    *(((3.0, 3.6, last), f"The policy got better and then worse: gold rose from 3.00 to 3.60 in round 1 and "
       f"fell to {last:.2f}. Use the policy of round 1, or try a smaller --policy_lr or --update_rm false.")
      for last in (3.3, 2.8)),
    ((3.0, 3.1, 2.8), "The policy got worse: gold fell from 3.00 to 2.80. Keep the base policy, and try a "
                      "smaller --policy_lr or --update_rm false."),
    ((3.0, 3.1, 3.1), "The policy hardly changed: gold went from 3.00 to 3.10, within two standard errors. "
                      "Try more prompts, more --rounds or a larger --policy_lr.")])
def test_the_verdict_follows_from_gold(values, said):
    states = [STATE | dict(policy=f"round {i}" if i else "base", gold=value, gold_se=0.05)
              for i, value in enumerate(values)]
    assert figures.verdict(dict(states=states, judge="gold", steps=[dict(kind="M")])) == said

def test_without_gold_the_base_reward_model_judges_and_cannot_say_whether_it_worked():
    run = dict(states=[STATE, STATE | dict(policy="round 1", reward_r0=0.5)], judge="reward_r0", steps=[])
    assert figures.verdict(run) == (
        "The policy got better by the base reward model’s account: its reward rose from 0.00 to 0.50. "
        "More --rounds may add to that.")
    assert "a benchmark or people" in figures.warnings(run)[0]
    nothing = dict(states=[], judge="reward_r0", steps=[])
    assert "This run is not judged yet" in figures.verdict(nothing) and figures.warnings(nothing) == []

@pytest.mark.parametrize("last, warned", [
    (dict(finished=0.94), "Only 94.0% of the last policy’s answers are finished"),
    (dict(tokens=25.0), "The answers are 25% longer"), (dict(tokens=15.0), "The answers are 25% shorter"),
    (dict(win_rate=0.43), "says that the last update won 86.0% of prompts, while gold says that it wins "
                          "43.0% against the base"),
    (dict(gold=2.95, reward_r0=2.0), ""),
    (dict(gold=2.8, reward_r0=2.0), "over-optimised: its reward rose from 0.00 to 2.00, while gold fell"),
    (dict(finished=0.96, tokens=23.0, win_rate=0.51), "")])
def test_a_warning_is_given_if_there_is_a_reason_and_only_then(last, warned):
    states = [STATE | dict(gold=3.0, gold_se=0.05) | more for more in ({}, last)]
    steps = [dict(kind="E", chosen="step-2", win_rate=0.86), dict(kind="E", chosen=None, win_rate=0.3)]
    said = figures.warnings(dict(states=states, judge="gold", steps=steps))
    assert len(said) == bool(warned) and all(warned in line for line in said)

def test_the_figures_in_terminal_and_page_are_over_all_rows(run, capsys, monkeypatch):
    monkeypatch.setattr(eval_script, "SHOWN", 3)
    page, said = written_page(run), capsys.readouterr().out
    for part, rates in RATES.items():
        rows = read_jsonl(run / f"round1/{part}/samples.jsonl")
        score, tokens, share = np.mean([[row[key] for key in ("score", "tokens", "finished")]
                                        for row in rows], 0)
        assert f"reward {score:.3f}, {tokens:.1f} tokens, {share:.1%} finished" in page
        assert re.search(rf"/{part} +{score:.3f} +{tokens:.1f} +{share:.1%} +30 +{max(rates.values())}", said)
        assert all(f"{step}: {rate:.3f}" in page for step, rate in rates.items())
    rows = read_jsonl(run / "round1/m/comparisons.jsonl")
    kept, margin = sum(row["kept"] for row in rows), np.mean([row["margin"] for row in rows])
    assert f"{kept} of 30 comparisons kept" in page and re.search(rf"round1/m .* {kept}/30 ", said)
    assert f"mean Δr {margin:+.3f}, ε {rows[0]['epsilon']:.3f}" in page
    assert f"margin {margin:+.3f}, epsilon {rows[0]['epsilon']:.3f}" in said
    assert "win rate 0.750 (0.336 to 0.947)" in page and "30 of 30 prompts gave a pair" in page
    stop = ("The run stopped in round 1 · E(c), because the best win rate, 0.250 (0.053 to 0.664), is below "
            "τ = 0.6. That may be chance, since τ lies in the interval.")
    assert {figures.verdict(figures.load(run)), stop} < {*said.splitlines()} and escape(stop) in page
    assert page.count("3 of 30 prompts</summary>") == 3

def test_ten_rounds_are_shown_in_order_with_their_models_numbered(run):
    for number in (10, 2):
        shutil.copytree(run / "round1" / "e1", run / f"round{number}" / "e1")
    steps = figures.load(run)["steps"]
    assert [s["phase"] for s in steps] == [f"round{p}" for p in ("1/e1", "1/m", "1/e2", "2/e1", "10/e1")]
    assert [(s["pm"], s["rm"]) for s in steps] == [(0, 0), (1, 0), (1, 1), (1, 1), (2, 1)]

def test_the_seconds_of_a_step_are_the_sum_over_its_phases(run):
    names = "e1/samples e1/checkpoints e1/select/before e1/select/step-2 e1/selection m/new m/old m/rm"
    lines = [json.dumps(dict(phase=f"round1/{name}", seconds=2.0**i)) for i, name in enumerate(names.split())]
    (run / "timings.jsonl").write_text("\n".join([*lines, '{"phase": "round1/e2/sam']))  # cut by a kill
    assert {step: [*seconds.values()] for step, seconds in figures.load(run)["seconds"].items()} == {
        "round1/e1": [1.0, 2.0, 12.0], "round1/m": [96.0, 128.0, 0.0]}
    assert "<td>1.0</td><td>2.0</td><td>12.0</td>" in written_page(run)

def test_gold_is_shown_in_the_first_table_in_the_terminal_and_beside_each_reward(tmp_path, prompts, capsys):
    run = make_run(tmp_path / "run", prompts, gold=True)
    page = written_page(run)
    assert "<p class=warning>Only 90.0% of" in page
    assert "<td>round 1</td>" not in page  # a line equal to the one before is left out, as after a stop
    cells = ".*".join(["1.250 ± 0.100", "1.000", "0.250", "0.500", "0.710", "0.200 ± 0.300", "9.0", "90.0%"])
    assert re.search(f"base</td>.*{cells}</td>", page)
    assert re.search(r"base +r0 +1.250 +0.100 +1.000 +0.250 +0.500 ", capsys.readouterr().out)
    for row in read_jsonl(run / "round1/e1/samples.jsonl"):
        assert f"reward {row['score']:.3f} · gold {toy.gold_of(row):.3f}" in page

def test_every_response_is_shown_with_its_score_role_and_reason(run):
    page = written_page(run)
    for row in read_jsonl(run / "round1/e1/samples.jsonl"):
        assert f"reward {row['score']:.3f} · {row['tokens']} tokens" in page
        assert f"<p class=text>{escape(row['response'])}</p>" in page
    for pair in read_jsonl(run / "round1/e1/pairs.jsonl"):
        for role, style in (("chosen", "good"), ("rejected", "bad")):
            assert f"<b class={style}>{role}</b> reward {pair[f'{role}_score']:.3f}" in page
        assert escape(pair["reason"]) in page
    for row in read_jsonl(run / "round1/m/comparisons.jsonl"):
        assert f"Δr {row['margin']:+.3f} <b class={'good>kept' if row['kept'] else 'bad>dropped'}" in page
        assert f"<b>old</b> reward {row['old_score']:.3f}" in page and f">{row['reason']}: Δr" in page

def test_text_cannot_inject_markup(tmp_path, prompts):
    chat = [{"role": "<i>system", "content": HOSTILE[0]}, {"role": "user", "content": HOSTILE[1]}]
    hostile, plain = iter(HOSTILE * 100), make_run(tmp_path / "plain", prompts[:7])
    run = make_run(tmp_path / "<b onclick=x>", [*prompts[:6], chat], **{HOSTILE[0]: 1, "policy": HOSTILE[1]},
                   text=lambda prompt, rng: f"{rng.random()} {next(hostile)}")
    for name in ("pairs", "../m/comparisons"):
        path = run / "round1/e1" / f"{name}.jsonl"
        write_jsonl(path, [row | {"reason": next(hostile)} for row in read_jsonl(path)])
    before, after = (Reader(written_page(folder)) for folder in (plain, run))
    assert {tag for tag, _ in after.tags} == {tag for tag, _ in before.tags}
    assert not [name for _, given in after.tags for name in given if name[:2] == "on" or name == "srcdoc"]
    assert all(text in "".join(after.texts) for text in HOSTILE[:4])

def test_characters_that_are_invisible_or_reverse_the_text_are_shown_by_their_codes(tmp_path):
    marks, kept = [0, 7, 0x1b, 0x7f, 0x9b, 0x202e, 0x2066, 0xfeff, 0xe0041], "\t\n naïve 你好 👩\u200d🚀"
    hostile = "".join(map(chr, marks)) + kept
    run = make_run(tmp_path / "run", [hostile], lambda prompt, rng: f"{rng.random()} {hostile}")
    write_jsonl(run / "base.jsonl", [STATE | {"policy": "".join(map(chr, marks))}])  # this text is in a plot
    page = written_page(run)
    assert not [char for char in hostile if char in page and char not in kept]
    assert page.count("".join(f"⟨U+{mark:04X}⟩" for mark in marks) + kept) == 3 + 12  # prompts and answers

def test_the_page_loads_nothing_forbids_scripts_and_has_no_broken_references(tmp_path, prompts):
    page = written_page(*(make_run(tmp_path / name, prompts[:6]) for name in "ab"))
    tags = Reader(page).tags
    assert [attrs["content"] for _, attrs in tags if "http-equiv" in attrs] == [
        "default-src 'none'; script-src 'none'; style-src 'unsafe-inline'"]
    assert "script" not in {tag for tag, _ in tags} and "//" not in page and "@import" not in page
    links = re.findall(r"url\(([^)]*)\)", page) + [value for _, attrs in tags for name, value in attrs.items()
                                                  if name in ("src", "href", "xlink:href", "data", "action")]
    ids = ["#" + attrs["id"] for _, attrs in tags if "id" in attrs]
    assert links and set(links) <= set(ids) and len(set(ids)) == len(ids)

def test_a_page_has_all_pictures_of_its_run_and_is_the_same_each_time(tmp_path, prompts):
    pytest.importorskip("matplotlib")
    for gold, count in ((False, 8), (True, 11)):
        run = make_run(tmp_path / f"run{gold}", prompts, gold=gold)
        assert (page := written_page(run)).count("<svg") == count and page == written_page(run)
        assert (run / "report.png").read_bytes().startswith(b"\x89PNG")

def test_without_matplotlib_one_line_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = written_page(run)
    assert [text.count("pip install matplotlib") for text in (page, capsys.readouterr().out)] == [1, 1]
    assert "<svg" not in page and "PM 0 → PM 1" in page

ARMS = {"full method": {}, "fixed RM (iterative DPO)": {"update_rm": False},
        "no selection": {"select": False}, "no filter": {"filter": False},
        "fixed RM (iterative DPO), no selection": {"update_rm": False, "select": False, "filter": False}}

def test_several_runs_are_compared_under_the_names_of_their_ablations(tmp_path, prompts, call):
    runs = [make_run(tmp_path / f"run{i}", prompts[:6], **how) for i, how in enumerate(ARMS.values())]
    call(eval_script, "report", *runs, "--out", tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text()
    for i, name in enumerate(ARMS):
        assert page.count(f"<h3>run{i}: {escape(name)}</h3>") == 5
        assert f"<td>run{i}</td><td>{name}</td><td>RM 0</td>" in page  # in the table that compares runs
    assert "<td>select</td><td>–</td><td>–</td><td>False</td><td>–</td><td>False</td>" in page

COMPARED = json.dumps(compare(*(answers(["p"], 1, random.Random(i), lambda *_: "r") for i in (0, 1)))[0])
ROW = '{"prompt": "p", "response": "r", "score": 1, "tokens": 1, "finished": true}'
BROKEN = [("run.json", "{"), ("run.json", "[1]"), ("metrics.jsonl", "{}"), ("gold.jsonl", '{"n": 1}'),
          ("timings.jsonl", '{"phase": "round1/e1/samples"}'), ("round1/e1/selection.json", "[]"),
          ("round1/e1/selection.json", '{"chosen": null, "win_rates": {"../../victim": 0.5}}'),
          ("round1/e1/pairs.jsonl", "[]"), ("round1/m/comparisons.jsonl", COMPARED.replace('"p"', "5")), *(
              ("round1/e1/samples.jsonl", text) for text in (
                  None, "", "{", "[" * 100_000, ROW.replace('"r"', "1"), ROW.replace('"r"', '"\\ud800"'),
                  ROW.replace('"p"', "5"), ROW.replace('"score": 1', '"score": NaN')))]

@pytest.mark.parametrize("name, text", BROKEN)
def test_a_missing_or_damaged_file_is_a_problem_of_one_line(run, name, text):
    (run / name).unlink() if text is None else (run / name).write_text(text)
    with pytest.raises(Problem, match=re.escape(str(run))) as problem:
        report(run)
    assert "\n" not in str(problem.value) and not (run / "report.html").exists()

def test_a_run_that_has_just_begun_has_a_page(run):
    shutil.rmtree(run / "round1")
    assert "The run is not finished: 0 steps of --rounds 1 are done." in written_page(run)

def test_long_texts_are_cut_and_the_size_of_the_page_is_limited(tmp_path, prompts):
    run = make_run(tmp_path / "run", prompts, lambda prompt, rng: f"{rng.random()}" + '"' * 60_000)
    page = written_page(run)
    assert len(page.encode()) < TEXT_BYTES + 1_000_000 < 10e6
    assert re.search(r"<i> … 520\d\d more characters</i>", page)
    shown = [int(n) for n in re.findall(r"(\d+) of 30 prompts</summary>", page)]
    assert len(shown) == 3 and all(0 < n < 30 for n in shown)

@pytest.mark.parametrize("gold", [True, False])
def test_agreement_is_how_often_a_reward_model_orders_answers_as_the_judge_does(
        tmp_path, tiny, prompts, call, gold):
    rms = [tiny(reward=True), tiny(reward=True, seed=3)]
    run = make_run(tmp_path / "run", prompts, gold=gold, rm=rms[0])
    (run / "round1/m/rm").rmdir()
    (run / "round1/m/rm").symlink_to(rms[1])
    rows = read_jsonl(run / "round1/e1/samples.jsonl")
    write_jsonl(run / "test/base/r0.jsonl", rows)
    scores = [reward.score(rm, rows, tmp_path / "scored.jsonl", 8) or read_jsonl(tmp_path / "scored.jsonl")
              for rm in rms]
    first, last, by_gold = (np.reshape(some, (-1, 5)) for some in (
        *([row["score"] for row in some] for some in scores), [toy.gold_of(row) for row in rows]))
    alike = ordered_alike(first, by_gold if gold else last)  # without gold the last reward model is the judge
    call(eval_script, "agreement", "--run", run, "--json", tmp_path / "figures.json", "--first", 30)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["agreement"]["base" if gold else "PM 0"]["RM 0"] == pytest.approx(alike)
    assert found["disagreement"] == pytest.approx({f"round1/{part}": 1 - 8.5 / 20 for part in RATES})

def test_a_judge_gets_the_last_policys_answers_in_drawn_order_and_all_reward_models_are_held_to_its_verdicts(
        tmp_path, tiny, prompts, call, written, capsys):
    rms = [tiny(reward=True), tiny(reward=True, seed=3), with_weights(  # the last one rewards all alike
        tiny(reward=True), tmp_path / "alike", lambda w: w | {"score.weight": 0 * w["score.weight"]})]
    how = dict(temperature=0.5, top_p=0.5, max_new_tokens=1)
    run = make_run(tmp_path / "run", prompts, rm=rms[0], policy=tiny(), seed=5, sample_batch=8, **how)
    shutil.copytree(run / "round1", run / "round2")
    for name, model in (("1/m/rm", rms[1]), ("2/m/rm", rms[2]), ("2/e1/policy", tiny(seed=2))):
        shutil.rmtree(run / f"round{name}", ignore_errors=True)
        (run / f"round{name}").symlink_to(model)
    command, file, again = ["agreement", "--run", run], tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    ask = [*command, "--prompts", written("p.jsonl", [{"prompt": p} for p in prompts]), "--write"]
    call(eval_script, *ask, file)
    call(eval_script, *ask, again)
    rows, same = read_jsonl(file), file.read_bytes() == again.read_bytes()
    sample(tiny(seed=2), prompts, again, samples=2, **how, seed="5/judge", rows=3)
    drawn = {a["prompt"]: [a["response"], b["response"]] for a, b in by_prompt(read_jsonl(again))}
    assert same and [row["prompt"] for row in rows] == [p for p in prompts if len({*drawn[p]}) == 2]
    assert all({*row["answers"]} == {*drawn[row["prompt"]]} and row["chosen"] is None for row in rows)
    assert 0.2 < np.mean([row["answers"] == drawn[row["prompt"]] for row in rows]) < 0.8
    assert len(rows) < 30 and f"; {30 - len(rows)} prompts got" in capsys.readouterr().out
    write_jsonl(file, rows := [row | {"chosen": int(row["answers"][1] > row["answers"][0])} for row in rows])
    call(eval_script, *ask, file)
    with pytest.raises(Problem, match="choose another --write"):
        call(eval_script, *ask, file, "--prompts", written("q.jsonl", [{"prompt": prompts[0]}]))
    assert read_jsonl(file) == rows  # the verdicts are still there
    call(eval_script, *command, "--verdicts", file, "--json", again)
    found, right = json.loads(again.read_text()), []
    for number, rm in enumerate(rms):
        rewards = reward.score_answers(*reward.load(rm), [(row["prompt"], row["answers"]) for row in rows], 1)
        right.append([two[row["chosen"]] > two[1 - row["chosen"]] for row, two in zip(rows, rewards)])
        gains = np.subtract(right[-1], right[0], dtype=float)
        gain = gains.mean() + 1.959964 * gains.std(ddof=1) / len(rows)**0.5 * np.array([0, -1, 1])
        assert [*found[f"RM {number}"].values()] == pytest.approx(
            [*share(right[-1], "accuracy").values(), *gain[:3 * number]])  # RM 0 has no gain
    assert "RM 2 is worse than RM 0 on the policy's answers: leave" in capsys.readouterr().out
    (run / "round2/m/rm").unlink()  # RM 1 is the last one now, and its own rewards are the verdicts
    own = reward.score_answers(*reward.load(rms[1]), [(row["prompt"], row["answers"]) for row in rows], 1)
    rows = [row | {"chosen": int(second > first)} for row, (first, second) in zip(rows, own)]
    for some, says in ((rows, "RM 1 is better than RM 0"), (rows[:9], "don't tell RM 1 from RM 0")):
        write_jsonl(file, some)
        call(eval_script, *command, "--verdicts", file)
        assert says in capsys.readouterr().out

@pytest.mark.parametrize("row", [{"chosen": None}, {"chosen": "1"}, {"chosen": True}, {"answers": ["a"]}])
def test_a_row_without_a_verdict_is_refused_and_named(call, written, row):
    good = dict(prompt="p", answers=["a", "b"], chosen=0)
    with pytest.raises(Problem, match="v.jsonl:2: "):
        call(eval_script, "agreement", "--run", "x", "--verdicts", written("v.jsonl", [good, good | row]))
