"""pytest tests/test_variants.py

The variants of the E-step: their losses and choices agree with numbers worked out by hand and with TRL's, and
each script runs tiny.
"""
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mt
from common import run, toy, training
from common.data import encode_chat, load_tokenizer, read_json, read_jsonl, response_ids
from common.models import load_policy
from common.packing import collate, row_of
from common.parallel import Problem
from dpo import ResponseLogps
from evals import figures, gold
from filter import win_rate
from variants import gold_labels, ipo, large_margins, online_dpo, rest_em, simpo, sppo
from variants.ema_reference import average

# What `python tests/peers.py` prints with trl 1.16.0, pair by pair: log-probabilities of chosen and rejected
# by the policy, then by the reference; their tokens; DPOTrainer's losses ipo and sppo_hard with β = 0.1, and
# CPOTrainer's loss simpo with β = 2 and γ = 1.
PEERS = [
    ((-87.1329, -47.9518, -81.5282, -47.7825), (16, 9), (28.424678802, 135.794692993, 1.490796447)),
    ((-107.8032, -106.3643, -94.743, -104.8608), (20, 20), (31.112255096, 338.395721436, 1.420447350)),
    ((-102.4591, -104.9653, -105.6095, -102.2164), (20, 20), (22.137348175, 8.488389969, 1.136446118)),
]

def test_sppo_fits_log_ratios_to_the_share_of_wins():
    # the log-ratios should be 0.4 / 0.1 and −0.3 / 0.1
    logps = torch.tensor([[-6.0], [-9.0], [-8.0], [-5.0]])  # they are 2 and −4
    found = sppo.sppo_loss(*logps, 0.1, [dict(chosen_wins=0.9, rejected_wins=0.2)])
    assert [value.item() for value in found] == pytest.approx([(2**2 + 1**2) / 2, 0.2, -0.4])

@pytest.mark.parametrize("loss, beta, which, factor", [
    (ipo.ipo_loss, 0.1, 0, 1), (sppo.sppo_loss, 0.1, 1, 2), (simpo.simpo_loss, 2.0, 2, 1)])  # TRL's has no ½
def test_ipos_sppos_and_simpos_losses_are_trls(loss, beta, which, factor):
    logps, tokens, expected = zip(*PEERS)
    pairs = [dict(chosen_tokens=chosen, rejected_tokens=rejected, chosen_wins=1.0, rejected_wins=0.0)
             for chosen, rejected in tokens]
    ours = factor * loss(*torch.tensor(logps).T, beta, pairs)[0]
    assert ours.tolist() == pytest.approx([losses[which] for losses in expected], rel=2e-5)

def test_online_dpo_chooses_the_highest_and_rejects_the_lowest():
    assert online_dpo.best_and_worst([1.0, 5.0, 3.0, 0.5], [1, 9, 1, 1])[:2] == (1, 3)
    assert online_dpo.best_and_worst([2.0, 2.0], [1, 2]) is None

def test_sppo_counts_wins_among_all_samples_the_response_itself_included():
    # σ(0) = ½, σ(ln 3) = ¾, σ(2 ln 3) = 9/10
    wins = sppo.wins_among([math.log(3), 0.0, -math.log(3)])
    assert wins.tolist() == pytest.approx([(1/2 + 3/4 + 9/10) / 3, 1/2, (1/2 + 1/4 + 1/10) / 3])

@pytest.mark.parametrize("constants, kept", [
    ({}, ["0.3", "0.0", "1.1"]),  # the means are 1.75, 1, and a hair below 1.4
    ({"MOST": 1}, ["0.3", "1.1"]),
    ({"THRESHOLD": 1}, ["0.3", "0.0", "0.1", "1.1", "2.0", "2.1", "2.2"]),  # as for a verifier
])
def test_rest_em_keeps_samples_above_the_mean_or_from_a_threshold_up(monkeypatch, constants, kept):
    for name, value in constants.items():
        monkeypatch.setattr(rest_em, name, value)
    rows, without = rest_em.best_samples([
        dict(prompt=f"p{number}", response=f"{number}.{index}", score=score, tokens=1, finished=True)
        for number, group in enumerate(([2.0, 1.0, 0.0, 4.0], [0.0, 2.0], [1.4, 1.4, 1.4]))
        for index, score in enumerate(group)])
    assert [row["chosen"] for row in rows] == kept and without == 3 - len({row["prompt"] for row in rows})
    assert rows[0]["rejected"] == "0.2" and rows[0]["reason"].startswith("chosen: kept")

def losses(folder, step):
    return [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")
            if row["phase"] == f"{step}/checkpoints" and "loss" in row]

def pairs_and_scores(folder):
    """The pairs of an E-step, each with the scores of its prompt's samples."""
    samples = {}
    for row in read_jsonl(folder / "samples.jsonl"):
        samples.setdefault(row["prompt"], []).append(row["score"])
    return [(pair, samples[pair["prompt"]]) for pair in read_jsonl(folder / "pairs.jsonl")]

def test_the_first_losses_of_a_run_are_those_of_the_formulas(variant):
    assert losses(variant("ipo"), "round1/e2")[0] == pytest.approx(1 / (2 * 0.01)**2)  # log-ratios are 0
    first = next(row for row in read_jsonl(variant("simpo") / "metrics.jsonl") if "rewards/chosen" in row)
    assert abs(first["loss"] - math.log(2)) > 0.01 and first["rewards/chosen"] != 0  # without a reference
    out = variant("dpo_fixed_reference")
    assert losses(out, "round1/e1")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses(out, "round1/e2")[0] - math.log(2)) > 1e-5  # the start is not the reference

def test_online_dpo_runs_with_pairs_of_the_highest_and_the_lowest_reward(variant):
    for pair, scores in pairs_and_scores(variant("online_dpo") / "round1/e2"):
        assert (pair["chosen_score"], pair["rejected_score"]) == (max(scores), min(scores))
        assert pair["reason"] == "chosen: highest of 4; rejected: lowest"

def test_sppo_runs_without_m_steps(variant):
    out = variant("sppo")
    assert figures.load(out)["arm"] == "sppo, fixed RM (iterative DPO)" and not (out / "round1/m").exists()
    for pair, scores in pairs_and_scores(out / "round1/e1"):
        wins = sppo.wins_among(scores)
        assert (pair["chosen_wins"], pair["rejected_wins"]) == (wins.max(), wins.min())

def test_gold_ranks_runs_with_gold_in_the_place_of_the_reward_model(variant, monkeypatch):
    monkeypatch.setattr(toy, "gold_of", lambda row: len(row["response"]))  # random answers have equal gold
    out = variant("gold_ranks") / "round1"
    judged = [row for name in ("samples", "select/*") for file in out.glob(f"e?/{name}.jsonl")
              for row in read_jsonl(file)]
    assert len(judged) > 80 and all(row["score"] == len(row["response"]) for row in judged)

def test_rest_em_runs_from_the_base_and_against_it_and_two_processes_give_its_losses(variant):
    out, two = (variant("rest_em", "--policy_batch", 4, processes=processes) for processes in (1, 2))
    assert losses(out, "round1/e2") == pytest.approx(losses(two, "round1/e2"), rel=1e-5, abs=1e-5)
    assert not (out / "round1/m").exists()
    policy = read_json(out / "run.json")["settings"]["policy"]
    for folder in (out / "round1/e1", out / "round1/e2"):
        choice, before = read_json(folder / "selection.json"), read_jsonl(folder / "select/before.jsonl")
        assert choice["policy_before"] == policy == before[0]["policy"]
        for name, rate in choice["win_rates"].items():
            after = read_jsonl(folder / f"select/{name}.jsonl")
            assert rate == win_rate(*([row["score"] for row in rows] for rows in (after, before)))
    # The second E-step starts from the base policy, so its first loss is that policy's mean over the tokens
    # of the first batch.
    rows, tokenizer = read_jsonl(out / "round1/e2/pairs.jsonl"), load_tokenizer(policy)
    chats = [row_of(encode_chat(tokenizer, row["prompt"]), [response_ids(tokenizer, row, "chosen")])
             for row in rows]
    order = training.steps_of([len(chat) for chat in chats], 4, 4, 0)[0][0].numbers
    first = [chats[i] for i in order]
    logps = ResponseLogps(load_policy(policy))(collate(first))
    expected = -logps.sum().item() / sum(len(chat.branches[0]) for chat in first)
    assert losses(out, "round1/e2")[0] == pytest.approx(expected, rel=1e-5)

def test_iterations_are_the_papers_e_and_m_steps_by_the_files_that_they_leave(variant, capfd):
    def prompts_of(name):
        return sorted({row["prompt"] for row in read_jsonl(out / f"{name}.jsonl")})

    out = variant("iterations", "--rounds", 2)
    settings, parts = read_json(out / "run.json")["settings"], [prompts_of("parts/1"), prompts_of("parts/2")]
    assert len(parts[0]) == len(parts[1])
    assert sorted(sum(parts, [])) == sorted(prompts_of("prompts/s0") + prompts_of("prompts/s1"))
    policy, rm = settings["policy"], settings["rm"]
    for name, part in zip(("round1", "round2"), parts):
        assert prompts_of(f"{name}/e1/samples") == part
        assert prompts_of(f"{name}/m/new") == prompts_of("prompts/s2")
        first, compared = (read_jsonl(out / name / f"{file}.jsonl")[0]
                           for file in ("e1/samples", "m/comparisons"))
        assert (first["policy"], first["rm"]) == (compared["old_policy"], compared["rm"]) == (policy, rm)
        policy, rm = f"{out}/{name}/e1/policy", f"{out}/{name}/m/rm"
        assert compared["new_policy"] == policy
        assert {row["source"] for row in read_jsonl(out / name / "m/preferences.jsonl")} == {
            f"{out}/{name}/m/comparisons.jsonl", f"{out}/{name}/e1/pairs.jsonl"}
        made_from = read_json(out / "run.json")["results"][f"{name}/m/rm"]["made_from"]
        assert [*made_from] == [f"{name}/m/preferences.jsonl"]  # and from the base reward model
    assert [(out / kind).resolve() for kind in ("policy", "rm")] == [Path(policy), Path(rm)]
    assert figures.outcome(figures.load(out)) == "All 2 rounds are done."
    with pytest.raises(AssertionError):
        variant("iterations", "--rounds", 3)
    assert "parts: 2 there, 3 now" in capfd.readouterr().err

def test_large_margins_keeps_those_above_epsilon():
    kept, margins, epsilon = large_margins.large_margins([5.0, 2.0, 1.0, 0.0], [0.0, 2.0, 0.0, 2.0])
    assert (kept.tolist(), margins.tolist(), epsilon) == ([True, False, False, False], [5, 0, 1, -2], 1.0)

GOOD, BETTER, BAD = "merry cows dance .", "merry cows dance . jolly pigs sing . the end .", "and so on ."
FARM = dict(prompt="two happy lines about the farm", kept=True) | {
    f"{side}_{name}": True for name in ("finished", "policy")
    for side in ("new", "old", "chosen", "rejected")}

@pytest.mark.parametrize("mix, rm_pairs, expected", [
    (mt.mix, "both", [(GOOD, BAD), (GOOD, BETTER), (BAD, BAD), (BAD, GOOD)]),
    (mt.mix, "comparisons", [(GOOD, BAD), (GOOD, BETTER), (BAD, BAD)]), (mt.mix, "ranked", [(BAD, GOOD)]),
    (gold_labels.mix, "both", [(GOOD, BAD), (BETTER, GOOD), (GOOD, BAD)])])
def test_the_reward_model_trains_on_kept_comparisons_and_ranked_pairs_which_gold_can_label(
        tmp_path, written, mix, rm_pairs, expected):
    o = mt.Options(out=str(tmp_path / "run"), rm_pairs=rm_pairs)
    run.claim(o.out, o)
    comparisons = written("comparisons.jsonl", [FARM | {"new": new, "old": old} | more for new, old, more in (
        (GOOD, BAD, {}), (GOOD, BETTER, {}), (BETTER, BAD, {"kept": False}), (BAD, BAD, {}))])
    ranked = written("pairs.jsonl", [FARM | {"chosen": BAD, "rejected": GOOD}])
    mixed = mix(o, comparisons, ranked, "policy", tmp_path / "run" / "preferences.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in read_jsonl(mixed)] == expected
    assert gold.right_comparisons(comparisons) == 1 / 2  # two of the kept ones differ in gold
    assert gold.right_comparisons(tmp_path / "nothing.jsonl") is None

def test_an_average_has_the_shares_of_all_weights_and_all_else_of_the_last_model(tiny, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    for last in (tiny(), tmp_path / "bf16"):
        folders = tiny(seed=1), last, tmp_path / f"of {Path(last).name}"
        average(folders[:2], [0.25, 0.75], folders[2])
        one, other, mean = (load_file(f"{folder}/model.safetensors") for folder in folders)
        names, lasts = ({path.name for path in Path(folder).iterdir()} for folder in (folders[2], last))
        assert names == lasts and load_policy(folders[2]) and mean.keys() == one.keys()
        for name, weight in mean.items():
            expected = 0.25 * one[name] + 0.75 * other[name].float()
            assert weight.dtype == other[name].dtype and torch.equal(weight, expected.to(weight.dtype)), name
    with pytest.raises(Problem, match="its weights have other names"):
        average([tiny(), tiny(reward=True)], [0.5, 0.5], tmp_path / "mixed")
