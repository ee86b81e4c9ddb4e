"""pytest tests/test_report.py

A run to look at: its figures are those of its files, whatever texts it holds and however large it is.
"""
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import eval as eval_script
import evals.report as report_script
import reward
from common import toy
from common.data import read_jsonl, write_jsonl
from common.parallel import Problem
from evals import figures, plots
from evals.figures import Sample, arm, load, steps_of, steps_table
from evals.report import report
from filter import compare, preference_pairs

RATES = {"e1": {"step-1": 0.5, "step-2": 0.75}, "e2": {"step-1": 0.25}}
HOSTILE = ['<script>window.pwned=1</script>', '</script><img src=x onerror="window.pwned=1">', '"\'>&amp;<b>',
           "</style></details></li><svg onload=window.pwned=1>", "\u202eevil\x00\x1b $\\frac$", "--> ]]>"]


def answers(prompts, samples, rng, text):
    """Scored responses as sampler.py and reward.py write them."""
    return [dict(prompt=p, index=i, response=text(p, rng), tokens=rng.randrange(5, 30),
                 finished=rng.random() < 0.9, score=rng.gauss(0, 2)) for p in prompts for i in range(samples)]


def make_run(folder, prompts, text=toy.demonstration, gold=False, **settings):
    """A run of one round, stopped in its last step; what it trains on is chosen by filter.py itself."""
    rng, steps = random.Random(0), ["e1", "m", "e2"] if settings.get("update_rm", True) else ["e1", "e2"]
    for part in steps:
        at = folder / "round1" / part
        if part == "m":
            new, old = (answers(prompts, 1, rng, text) for _ in range(2))
            write_jsonl(at / "comparisons.jsonl", compare(new, old, settings.get("filter", True)))
            (at / "rm").mkdir()
            continue
        samples = answers(prompts, 5, rng, text)
        write_jsonl(at / "samples.jsonl", samples)
        write_jsonl(at / "pairs.jsonl", preference_pairs(samples)[0])
        rates = RATES[part] if settings.get("select", True) else {}
        chosen = ("step-2" if part == "e1" else None) if rates else "step-2"
        (at / "selection.json").write_text(json.dumps({"chosen": chosen, "win_rates": rates, "tau": 0.6}))
        for name in ("before", *rates):
            write_jsonl(at / "select" / f"{name}.jsonl", answers(prompts[:5], 1, rng, text))
    if gold:
        row = dict(gold=1.25, gold_se=0.1, n=30, win_rate=0.5, tokens=9.0, finished=0.9, reward_r0=0.2,
                   reward_r0_se=0.3, rm="r0",
                   accuracy_base=0.625, accuracy_current=0.71, length_slope=0.1)
        write_jsonl(folder / "gold.jsonl", [row | {"policy": name} for name in ("base", "round 1")])
    write_jsonl(folder / "metrics.jsonl", [
        {"phase": f"round1/{p}/checkpoints", "step": i, "steps": 11, "batch": 3 if i == 11 else 8,
         "loss": 0.7 - i / 100, "rewards/margins": i / 10, "rewards/accuracies": i / 20,
         "rewards/chosen": i, "rewards/rejected": -i,
         "logps/chosen": -20 - i, "logps/rejected": -20 - 2 * i} for p in ("e1", "e2") for i in range(1, 12)]
        + [{"phase": "round1/m/rm", "step": i, "steps": 5, "loss": 0.4, "margin": 1.5, "accuracy": 0.875,
            "mean_reward": 0.0} for i in range(1, 6)] * ("m" in steps))
    settings = {"rounds": 1, "update_rm": True, "select": True, "filter": True, **settings}
    (folder / "run.json").write_text(json.dumps({"settings": settings, "versions": {"torch": "2.x"},
                                                 "templates": {"policy": "{{ m['content'] }}"}}))
    return folder


@pytest.fixture
def run(tmp_path, prompts):
    return make_run(tmp_path / "run", prompts)


class Reader(HTMLParser):
    """What a browser makes of a page: its tags with their attributes, its text."""
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def written_page(*runs, **more):
    report(*runs, **more)
    return (Path(more.get("out") or runs[0]) / "report.html").read_text(encoding="utf-8")


def tables(page):
    """[[cells]] of all tables."""
    rows = re.findall(r"<tr>(.*?)(?=<tr>|<tbody>|</table>)", page, re.S)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


# ---------------------------------------------------------------- table and picture
def test_the_table_has_a_line_for_every_step_in_order(run, capsys):
    lines = steps_table(steps_of(run)).splitlines()
    assert [line.split()[0] for line in lines] == ["step", "round1/e1", "round1/m", "round1/e2"]
    rows = read_jsonl(run / "round1/e1/samples.jsonl")
    mean = {key: np.mean([row[key] for row in rows]) for key in ("score", "tokens", "finished")}
    assert f"{mean['score']:.3f} {mean['tokens']:.1f} {mean['finished']:.1%} 30 0.750 policy: step-2" \
        in " ".join(lines[1].split())
    compared = read_jsonl(run / "round1/m/comparisons.jsonl")
    margin = np.mean([row["margin"] for row in compared])
    assert f"{sum(row['kept'] for row in compared)}/30" in lines[2]
    assert f"margin {margin:+.3f}, epsilon {compared[0]['epsilon']:.3f}" in lines[2]
    assert "0.250 discarded, run stopped" in " ".join(lines[3].split())
    report(run)
    assert "\n".join(lines) in capsys.readouterr().out


def test_a_run_of_ten_rounds_is_in_order_and_its_models_are_numbered(run):
    for number in (10, 2):
        shutil.copytree(run / "round1" / "e1", run / f"round{number}" / "e1")
    steps = steps_of(run)
    assert [s["phase"] for s in steps] == [f"round{p}" for p in ("1/e1", "1/m", "1/e2", "2/e1", "10/e1")]
    assert [(s["pm"], s["rm"]) for s in steps] == [(0, 0), (1, 0), (1, 1), (1, 1), (2, 1)]


def test_there_is_a_picture_with_matplotlib(tmp_path, prompts, call, capsys):
    pytest.importorskip("matplotlib")
    runs = [make_run(tmp_path / name, prompts, gold=name == "gold") for name in ("plain", "gold")]
    call(eval_script, "report", *runs)
    said = capsys.readouterr().out
    for folder in runs:
        assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
        assert f"picture: {folder / 'report.png'}" in said
    assert "round 1" in said  # the embedded task's table
    assert "Stopped in round 1 · E(c): best win rate 0.250" in said


# ---------------------------------------------------------------- whether it worked
STATE = dict(policy="base", n=300, win_rate=0.5, reward_r0=0.0, reward_r0_se=0.05, tokens=20.0, finished=1.0)


@pytest.mark.parametrize("values, said", [
    ((3.0, 3.3, 3.6), "It worked. Gold rose from 3.00 to 3.60."),
    ((3.0, 3.6, 3.5), "It worked. Gold rose from 3.00 to 3.50; its best was 3.60, of round 1."),
    ((3.0, 3.6, 3.3), "It went too far. Gold went from 3.00 to 3.30; its best was 3.60, of round 1."),
    ((3.0, 3.5, 3.5), "It worked. Gold rose from 3.00 to 3.50."),
    ((3.0, 3.6, 2.8), "It harmed. Gold fell from 3.00 to 2.80; its best was 3.60, of round 1."),
    ((3.0, 3.1, 3.1), "It changed little. Gold went from 3.00 to 3.10."),
])
def test_the_verdict_is_that_of_gold(values, said):
    states = [STATE | dict(policy=f"round {i}" if i else "base", gold=value, gold_se=0.05)
              for i, value in enumerate(values)]
    assert figures.verdict(dict(states=states, judge="gold", steps=[])) == [said]


def test_what_was_optimised_after_the_best_policy_is_said():
    states = [STATE | dict(policy=policy, gold=gold, gold_se=0.05, reward_r0=reward)
              for policy, gold, reward in (("base", 3.0, 0.0), ("round 1", 3.6, 1.0), ("round 2", 3.3, 1.5))]
    _, warned = figures.verdict(dict(states=states, judge="gold", steps=[]))
    assert warned == ("Since round 1 the reward under RM 0 rose from 1.00 to 1.50, while gold fell: "
                      "over-optimisation.")


def test_a_run_that_stopped_shows_no_rounds_after_the_stop(tmp_path, prompts):
    run = make_run(tmp_path / "run", prompts, gold=True)
    base = read_jsonl(run / "gold.jsonl")[0]
    write_jsonl(run / "gold.jsonl", [base | {"policy": policy} for policy in ("base", "round 1", "round 2")])
    found = load(run)
    assert [state["policy"] for state in found["states"]] == ["base"]
    assert figures.verdict(found)[0].startswith("It changed little. Gold went from")


def test_without_gold_the_base_reward_model_judges_and_cannot_say_more_than_that():
    states = [STATE, STATE | dict(policy="round 1", reward_r0=0.5)]
    said, warning = figures.verdict(dict(states=states, judge="reward_r0", steps=[]))
    assert said == "Reward under the base RM rose from 0.00 to 0.50." and "a benchmark or people" in warning
    assert "Nothing here says yet" in figures.verdict(dict(states=[], judge="reward_r0"))[0]


@pytest.mark.parametrize("last, warned", [
    (dict(finished=0.94), "Only 94.0% of the last policy’s answers are finished"),
    (dict(tokens=25.0), "Answers are 25% longer"), (dict(tokens=15.0), "Answers are 25% shorter"),
    (dict(win_rate=0.43), "by the reward model in use the last update won 0.860, yet against the base this "
                          "policy wins 0.430 (0.375 to 0.487)"),
    (dict(gold=2.95, reward_r0=2.0), ""),
    (dict(gold=2.8, reward_r0=2.0), "while gold fell: over-optimisation"),
    (dict(finished=0.96, tokens=23.0, win_rate=0.51), "")])
def test_what_to_beware_of_is_said(last, warned):
    states = [STATE | dict(gold=3.0, gold_se=0.05) | more for more in ({}, last)]
    steps = [dict(kind="E", chosen="step-2", win_rate=0.86), dict(kind="E", chosen=None, win_rate=0.3)]
    said = figures.warnings(dict(states=states, judge="gold", steps=steps))
    assert len(said) == bool(warned) and all(warned in line for line in said)


def test_the_seconds_of_a_step_are_those_of_its_phases(run):
    write_jsonl(run / "timings.jsonl", [dict(phase=f"round1/{name}", seconds=seconds) for name, seconds in {
        "e1/samples": 1.0, "e1/checkpoints": 2.0, "e1/select/before": 4.0, "e1/select/step-2": 8.0,
        "m/new": 16.0, "m/old": 32.0, "m/rm": 64.0}.items()])
    found, parts = figures.seconds_of(load(run))
    assert {step: [seconds[part] for part in parts] for step, seconds in found.items()} == {
        "round1/e1": [1.0, 2.0, 12.0], "round1/m": [48.0, 64.0, 0.0]}
    assert "In all 42.33 times the time of DPO" in written_page(run)  # 127 / 3


def test_plots_that_are_compared_share_their_axes(tmp_path, prompts):
    pytest.importorskip("matplotlib")
    runs = [load(make_run(tmp_path / name, prompts[:n])) for name, n in (("a", 30), ("b", 3))]
    alone = [plots.alike([run], plots.plot_lengths) for run in runs]
    assert plots.alike(runs, plots.plot_lengths) == (0, max(high for _, high in alone))
    assert alone[0] != alone[1]


def test_every_axis_says_what_it_is(tmp_path, prompts):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    run = load(make_run(tmp_path / "run", prompts, gold=True)) | {"label": "run"}
    run["timings"] = [dict(phase="round1/e1/samples", seconds=1.0)]
    drawn = [lambda axis, steps=steps: plots.plot_steps(axis, run, *steps) for steps in (
        (kind, unit, keys) for kind, _, unit, keys in report_script.METRICS)]
    drawn += [lambda axis, plot=plot: plot(axis, run) for plot in (
        plots.plot_held_out, plots.plot_win_rates, plots.plot_lengths, plots.plot_finished,
        plots.plot_seconds, plots.plot_accuracy)]
    drawn += [lambda axis, key=key: plots.plot_states(axis, [run], key) for key in plots.UNITS]
    for draw in drawn:
        axis = Figure().subplots()
        draw(axis)
        assert axis.get_ylabel() and (axis.get_xlabel() or axis.get_xticklabels()[0].get_text())


# ---------------------------------------------------------------- the page
def test_the_figures_on_the_page_are_those_of_the_files(run):
    page = written_page(run)
    rows = tables(page)
    for part in ("e1", "e2"):
        samples = read_jsonl(run / f"round1/{part}/samples.jsonl")
        select = [read_jsonl(run / f"round1/{part}/select/{name}.jsonl")
                  for name in ("before", max(RATES[part], key=RATES[part].get))]
        means = [f"{np.mean([row['score'] for row in some]):.3f}" for some in (samples, *select)]
        e, pm = ("E(a)", 0) if part == "e1" else ("E(c)", 1)
        assert [f"round 1 · {e}", f"PM {pm}", f"RM {pm}", *means] in rows
        tokens, finished = ([row[key] for row in samples] for key in ("tokens", "finished"))
        assert [f"PM {pm}", *(f"{np.percentile(tokens, q):.0f}" for q in (10, 50, 90)),
                f"{np.mean(tokens):.1f}", f"{np.mean(finished):.1%}"] in rows
        for step, rate in RATES[part].items():
            assert f"{step}: {rate:.3f}" in page
    compared = read_jsonl(run / "round1/m/comparisons.jsonl")
    kept = sum(row["kept"] for row in compared)
    margin, epsilon = np.mean([row["margin"] for row in compared]), compared[0]["epsilon"]
    assert ["round 1 · M(b)", "30", str(kept), str(30 - kept), f"{margin:.3f}", f"{epsilon:.3f}",
            f"{30 - kept} margin at or below -epsilon"] in rows
    # without DPO's first step and the last one of 3 pairs: of 2 to 10 the first two and the last two
    assert ["1/e1", "11", "0.675", "0.605", "0.250", "0.950", "0.125", "0.475"] in rows
    assert ["1/m", "5", "0.400", "0.400", "1.500", "1.500", "0.875", "0.875"] in rows
    assert "win rate 0.750 (0.336 to 0.947)" in page  # of 5 prompts
    assert ("Stopped in round 1 · E(c): best win rate 0.250 (0.053 to 0.664) &lt; τ = 0.6 (τ is within the "
            "interval); PM 1 stays.") in page


def test_the_histogram_of_margins_holds_every_comparison(run):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    step, axis = load(run)["steps"][1], Figure().subplots()
    plots.plot_margins(axis, step, (step["margins"].min(), step["margins"].max()))
    kept, dropped = (sum(bar.get_height() for bar in bars) for bars in axis.containers)
    assert (kept, dropped) == (step["kept"], 30 - step["kept"]) and 0 < kept < 30
    assert axis.lines[0].get_xdata()[0] == -step["epsilon"]
    assert max(bar.get_x() for bar in axis.containers[1] if bar.get_height()) <= -step["epsilon"]


def test_every_response_stands_with_its_score_role_and_reason(run):
    page = written_page(run)
    for row in read_jsonl(run / "round1/e1/samples.jsonl"):
        assert f"reward {row['score']:.3f} · {row['tokens']} tokens" in page
        assert f"<p>{escape(row['response'])}</p>" in page
    for pair in read_jsonl(run / "round1/e1/pairs.jsonl"):
        for role, style in (("chosen", "good"), ("rejected", "bad")):
            assert f"<b class={style}>{role}</b> reward {pair[f'{role}_score']:.3f}" in page
        assert escape(pair["reason"]) in page
    for row in read_jsonl(run / "round1/m/comparisons.jsonl"):
        assert f"Δr {row['margin']:+.3f} <b class={'good' if row['kept'] else 'bad'}>" in page
        assert f"<b class=name>old</b> reward {row['old_score']:.3f}" in page


def test_prompts_without_a_pair_say_why(tmp_path):
    samples = [dict(prompt=f"p{i}", response=text, tokens=3, finished=True, score=score)
               for i, (scores, texts) in enumerate([((1, 1), "ab"), ((1, 2), "aa"), ((1, 2), "ab")])
               for score, text in zip(scores, texts)]
    run = make_run(tmp_path / "run", ["p"], lambda prompt, rng: f"{rng.random()}")
    write_jsonl(run / "round1/e1/samples.jsonl", samples)
    write_jsonl(run / "round1/e1/pairs.jsonl", preference_pairs(samples)[0])
    page = written_page(run)
    assert "1 of 3 prompts gave a pair" in page
    assert page.count("no pair: all rewards are equal") == page.count("no pair: the same text twice") == 1


def test_gold_stands_beside_reward(tmp_path, prompts):
    run = make_run(tmp_path / "run", prompts, gold=True)
    page = written_page(run)
    assert ["base", "1.250 ± 0.100", "0.500", "0.710", "0.200 ± 0.300", "9.0",
            "90.0%"] in tables(page)
    assert ["round 1", "r0", "0.710", "0.625", "0.100"] in tables(page)
    row = read_jsonl(run / "round1/e1/samples.jsonl")[0]
    assert f"reward {row['score']:.3f} · gold {toy.gold_of(row):.3f}" in page


def test_text_cannot_inject_markup(tmp_path, prompts):
    chat = [{"role": "<i>system", "content": HOSTILE[0]}, {"role": "user", "content": HOSTILE[1]}]
    plain = make_run(tmp_path / "plain", prompts[:7])
    run = make_run(tmp_path / "<b onclick=x>", [*prompts[:6], chat], lambda prompt, rng: f"{rng.random()}",
                   policy=HOSTILE[1])
    hostile = iter(HOSTILE * 100)
    for part, fields in {"e1/samples": ["response"], "e1/pairs": ["reason"],
                         "m/comparisons": ["new", "old", "reason"]}.items():
        path = run / f"round1/{part}.jsonl"
        path.write_text("".join(json.dumps(row | {field: next(hostile) for field in fields}) + "\n"
                                for row in read_jsonl(path)))
    pages = [Reader(written_page(folder)) for folder in (plain, run)]
    assert {tag for tag, _ in pages[1].tags} <= {tag for tag, _ in pages[0].tags} | {"i"}
    assert [tag for tag, _ in pages[1].tags].count("script") == 1
    names = {name for page in pages for _, attrs in page.tags for name in attrs}
    assert not [name for name in names if name.startswith("on")] and "srcdoc" not in names
    for text in HOSTILE[:4]:
        assert text in pages[1].text


def test_characters_that_hide_or_turn_the_writing_round_are_named(tmp_path, prompts):
    marks, kept = [0, 7, 0x1b, 0x7f, 0x9b, 0x202e, 0x2066, 0xfeff, 0xe0041], "\t\n naïve 你好 👩\u200d🚀"
    hostile = "".join(map(chr, marks)) + kept
    run = make_run(tmp_path / "run", [hostile], lambda prompt, rng: f"{rng.random()} {hostile}")
    page = written_page(run)
    assert not [char for char in hostile if char in page and char not in kept]
    assert page.count("".join(f"⟨U+{mark:04X}⟩" for mark in marks) + kept) == 3 + 12  # prompts, answers


def test_the_page_loads_nothing(run):
    page = written_page(run)
    assert "http://" not in page and "https://" not in page and "@import" not in page
    links = [value for _, attrs in Reader(page).tags for name, value in attrs.items()
             if name in ("src", "href", "xlink:href", "data", "action")]
    assert links and all(link.startswith("#") for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "default-src 'none'" in page


def test_ids_and_the_plots_references_to_them_are_unique(run):
    pytest.importorskip("matplotlib")
    page = written_page(run)
    ids = [attrs["id"] for _, attrs in Reader(page).tags if "id" in attrs]
    wanted = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert len(set(ids)) == len(ids) and set(wanted) <= set(ids)


def test_the_same_run_gives_the_same_page(run):
    assert written_page(run) == written_page(run)


def test_without_matplotlib_one_line_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = written_page(run)
    assert capsys.readouterr().out.count("pip install matplotlib") == 1
    assert not (run / "report.png").exists()
    assert "<svg" not in page and page.count("pip install matplotlib") == 1 and "PM 0 → PM 1" in page


ARMS = {"full": {}, "fixed RM (iterative DPO)": {"update_rm": False}, "no selection": {"select": False},
        "no filter": {"filter": False},
        "fixed RM (iterative DPO), no selection": {"update_rm": False, "select": False, "filter": False}}


@pytest.mark.parametrize("name", ARMS)
def test_settings_have_the_papers_names(name):
    assert arm(ARMS[name]) == name


def test_runs_stand_side_by_side_by_their_ablations_names(tmp_path, prompts, call):
    runs = [make_run(tmp_path / f"run{i}", prompts, **settings) for i, settings in enumerate(ARMS.values())]
    call(eval_script, "report", *runs, "--out", tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text()
    for i, name in enumerate(ARMS):
        assert page.count(f"<h3>run{i}: {escape(name)}</h3>") == 8
    heads = [row[0] for row in tables(page)]
    at = heads.index("settings")  # what differs comes first
    assert heads[at:at + 5] == ["settings", "update_rm", "select", "filter", "settings"]
    assert "No M-step: nothing was compared." in page
    report(*runs)
    assert (runs[0] / "report.html").exists() and not (runs[1] / "report.html").exists()


BROKEN = {
    "run.json": ["{", "[1]"],
    "metrics.jsonl": ["{}"],
    "round1/e1/selection.json": ["{}", "no", "[]", '{"chosen": "../../victim", "win_rates": {}}',
                                 '{"chosen": null, "win_rates": {"../../victim": 0.5}}',
                                 '{"chosen": null, "win_rates": {"step-1": NaN}}'],
    "round1/e1/samples.jsonl": [
        "", "{", "{}", '{"prompt": "p", "response": 1, "score": 1, "tokens": 1, "finished": true}',
        '{"prompt": "p", "response": "r", "score": "<b>", "tokens": 1, "finished": true}',
        '{"prompt": "p", "response": "r", "score": NaN, "tokens": 1, "finished": true}',
        '{"prompt": "p", "response": "\\ud800", "score": 1, "tokens": 1, "finished": true}', "[" * 100_000,
        '{"prompt": "p", "response": "r", "score": ' + "1" * 5000 + ', "tokens": 1, "finished": true}'],
    "round1/e1/pairs.jsonl": ["[]"],
    "round1/m/comparisons.jsonl": ["", '{"prompt": "p"}'],
    "gold.jsonl": ['{"policy": "base"}'],
}


@pytest.mark.parametrize("name, text", [(name, text) for name, texts in BROKEN.items() for text in texts])
def test_a_broken_run_is_one_line(run, name, text):
    (run / name).write_text(text)
    with pytest.raises(Problem, match=re.escape(str(run))) as problem:
        report(run)
    assert "\n" not in str(problem.value) and not (run / "report.html").exists()


def test_a_missing_file_is_one_line(run):
    (run / "round1/e1/samples.jsonl").unlink()
    with pytest.raises(Problem, match="samples.jsonl: no such file"):
        report(run)


def test_a_run_that_has_just_begun_has_a_page(run):
    shutil.rmtree(run / "round1")
    (run / "metrics.jsonl").unlink()
    assert "Unfinished: 0 of 3 steps so far." in written_page(run)


# ---------------------------------------------------------------- large runs
def test_a_sample_is_fair_ordered_and_the_same_each_time():
    hits = np.zeros(20)
    for shift in range(2000):  # one seed for all: what differs is which item stands where
        sample = Sample(5)
        for i in range(20):
            sample.add((i * 7 + shift) % 20)
        hits[list(sample)] += 1
    assert hits.min() == hits.max() == 500
    one, two = Sample(5), Sample(5)
    for i in range(1000):
        one.add(i)
        two.add(i)
    assert list(one) == list(two) == sorted(one) and len(list(one)) == 5 and max(one) > 100


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run on 60,000 prompts, 20,000 a step, with 220,000 responses."""
    text = ("\"Once\" upon <a> time & so on. " * 15).__add__
    return make_run(tmp_path_factory.mktemp("large") / "run", [f"prompt {i}?" for i in range(20_000)],
                    lambda prompt, rng: text(str(rng.random())))


def test_a_run_of_60000_prompts_gives_a_small_page_with_exact_figures(large):
    began = time.time()
    page = written_page(large)
    print(f"{len(page.encode()) / 1e6:.1f} MB in {time.time() - began:.1f} s")
    assert len(page.encode()) < 10e6
    assert page.count("100 of 20000 prompts") == 3
    [step, *_] = load(large)["steps"]
    scores = np.array([row["score"] for row in figures.stream(large / "round1/e1/samples.jsonl")])
    assert len(scores) == 100_000 and step["reward"] == pytest.approx(scores.mean())
    assert "20000 of 20000 prompts gave a pair" in page


def test_very_long_texts_are_cut_and_said_to_be(tmp_path, prompts):
    run = make_run(tmp_path / "run", prompts, lambda prompt, rng: f"{rng.random()}" + '"' * 60_000)
    page = written_page(run)
    assert len(page.encode()) < 10e6
    assert re.search(r"<i> … 520\d\d more characters</i>", page)
    shown = [int(n) for n in re.findall(r": (\d+) of 30 prompts</span>", page)]
    assert len(shown) == 3 and all(0 < n < 30 for n in shown)


def test_the_limits_hold_for_any_number_of_steps():
    assert report_script.TEXT_BYTES < 6e6 and report_script.SHOWN_IN_ALL <= 1500


# ---------------------------------------------------------------- agreement
@pytest.mark.parametrize("gold", [True, False])
def test_agreement_is_that_of_scored_files(tmp_path, tiny, prompts, call, gold, capsys):
    rms = {"RM 0": tiny(reward=True), "RM 1": tiny(reward=True, seed=3)}
    run = make_run(tmp_path / "run", prompts, gold=gold, rm=rms["RM 0"])
    shutil.rmtree(run / "round1/m/rm")
    shutil.copytree(rms["RM 1"], run / "round1/m/rm")
    states = {"base": "e1", "round 1": "e2"} if gold else {"PM 0": "e1", "PM 1": "e2"}
    scored = {}
    for pm, part in states.items():
        rows = [row for row in read_jsonl(run / f"round1/{part}/samples.jsonl") if row["index"] < 2]
        path = f"test/{pm.replace(' ', '')}/r0.jsonl" if gold else f"round1/{part}/samples.jsonl"
        write_jsonl(run / path, rows)
        if not gold:
            write_jsonl(run / f"round1/{part}/pairs.jsonl", [])
        for rm, folder in rms.items():
            reward.score(folder, rows, tmp_path / "scored.jsonl", 8)
            scored[pm, rm] = read_jsonl(tmp_path / "scored.jsonl")
    call(eval_script, "agreement", "--run", run, "--json", tmp_path / "figures.json", "--prompts", 30)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert all(list(row) == (["RM 0", "RM 1"] if gold else ["RM 0"]) for row in found["agreement"].values())
    for (pm, rm), rows in scored.items():
        if not gold and rm == "RM 1":
            continue  # the judge
        truth = [toy.gold_of(row) if gold else row["score"] for row in (rows if gold else scored[pm, "RM 1"])]
        pairs = np.array([(row["score"], t) for row, t in zip(rows, truth)]).reshape(-1, 2, 2)
        differ = pairs[:, 0] - pairs[:, 1]
        differ = differ[differ[:, 1] != 0]
        assert found["agreement"][pm][rm] == pytest.approx(np.mean((differ[:, 0] > 0) == (differ[:, 1] > 0)))
    assert found["disagreement"] == {f"round1/{p}": pytest.approx(1 - (6 + 7 + 8 + 9 + 10 + 11) / 6 / 20)
                                     for p in ("e1", "e2")}
    assert f"agreement with {'gold' if gold else 'RM 1'}" in capsys.readouterr().out


def test_agreement_of_one_reward_model_without_gold_says_that_there_is_none(
        tmp_path, tiny, prompts, call, capsys):
    run = make_run(tmp_path / "run", prompts, update_rm=False, rm=tiny(reward=True))
    call(eval_script, "agreement", "--run", run, "--prompts", 3)
    assert "nothing to agree with\nPM-RM disagreement\nround1/e1" in capsys.readouterr().out


# ---------------------------------------------------------------- in a real browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """browser(method, path, body): Chromium without a window, through chromedriver's WebDriver protocol."""
    driver = shutil.which("chromedriver")
    if not driver or not any(map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    port = next(found[1] for line in process.stdout if (found := re.search(r"on port (\d+)\.", line)))
    profile = tempfile.mkdtemp(dir=tmp_path_factory.mktemp("browser"))
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--disable-background-networking", f"--user-data-dir={profile}"]

    def call(method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, method=method,
                                         headers={"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return json.load(opener.open(request, timeout=60))["value"]

    try:
        wanted = {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}}}
        session = call("POST", "/session", {"capabilities": wanted})["sessionId"]
        yield lambda method, path, body=None: call(method, f"/session/{session}{path}", body)
        call("DELETE", f"/session/{session}")
    finally:
        process.kill()
        process.wait()


class Tab:
    def __init__(self, browser, path):
        self.browser = browser
        browser("POST", "/url", {"url": Path(path).as_uri()})

    def js(self, code):
        return self.browser("POST", "/execute/sync", {"script": f"return {code}", "args": []})

    def find(self, selector):
        found = self.browser("POST", "/element", {"using": "css selector", "value": selector})
        return next(iter(found.values()))

    def click(self, selector):
        self.browser("POST", f"/element/{self.find(selector)}/click", {})

    def type(self, selector, text):
        self.browser("POST", f"/element/{self.find(selector)}/value", {"text": text})


def test_a_browser_sorts_and_searches_and_runs_no_text(browser, tmp_path, prompts):
    hostile = iter(HOSTILE[:4] * 1000)
    run = make_run(tmp_path / "run", prompts, lambda prompt, rng: f"{rng.random()} {next(hostile)}")
    written_page(run)
    tab = Tab(browser, run / "report.html")
    assert tab.js("window.pwned") is None and tab.js("performance.getEntriesByType('resource').length") == 0
    gaps = "[...document.querySelector('.items').children].map(item => +item.dataset.gap)"
    drawn = tab.js(gaps)
    for times, order in ((1, sorted(drawn, reverse=True)), (2, sorted(drawn))):
        tab.click("button[data-key=gap]")
        assert tab.js(gaps) == order, times
    tab.click("button[data-key=drawn]")
    assert tab.js(gaps) == drawn != sorted(drawn)
    tab.type("input[type=search]", prompts[3][:-1].upper())
    shown = tab.js("[...document.querySelectorAll('.item:not([hidden]) .prompt')].map(p => p.textContent)")
    assert prompts[3] in shown and set(shown) == {p for p in prompts if prompts[3][:-1] in p}
    assert tab.js("document.getElementById('found').textContent") == f"{len(shown)} of 90 prompts"
    assert tab.js("window.pwned") is None


TOOLS_TOP = "document.getElementById('tools').getBoundingClientRect().top"


def test_the_search_bar_stays_with_the_texts(browser, run):
    written_page(run)
    tab = Tab(browser, run / "report.html")
    for place, seen in ((".items > :last-child", True), ("section:last-of-type table", False)):
        tab.js(f"document.querySelector('{place}').scrollIntoView()")
        assert (tab.js(TOOLS_TOP) >= 0) == seen, place


def test_a_large_page_opens_in_three_seconds_and_fits_a_phone(browser, large):
    if not (large / "report.html").exists():
        report(large)
    tab = Tab(browser, large / "report.html")
    opened = tab.js("performance.getEntriesByType('navigation')[0].loadEventEnd")
    print(f"opened in {opened:.0f} ms")
    assert 0 < opened < 3000
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
    assert tab.js("document.documentElement.scrollWidth") <= 390
    assert 0 < tab.js(TOOLS_TOP) < 15 * 800  # screens before the texts
