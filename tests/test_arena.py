"""pytest tests/test_arena.py

Arena-Hard's score is the share of games won, the commands read and write the official tool's files, and
other files are refused.
"""
import json

import pytest

import eval as eval_script
from common.data import read_jsonl
from common.parallel import Problem
from evals.arena import arena_figures

def test_a_strong_verdict_counts_three_games_a_tie_half_a_win_and_a_missing_one_no_game():
    figures = arena_figures([("A>>B", "A>B"), ("B>A", None), ("A=B", "A>>B"), (None, "A>C")])
    assert (figures["n_games"], figures["n_questions"], figures["n_no_verdict"]) == (9, 3, 3)
    # A is the baseline in the first game of a question and the model in the second
    assert figures["score"] == pytest.approx(100 * (0 + 1 + 1 + 0.5 + 3) / 9)
    assert 0 <= figures["ci_low"] < figures["score"] < figures["ci_high"] <= 100
    assert arena_figures([("A>B", "B>A")])["score"] == 0 and arena_figures([("B>>A", "A>>B")])["score"] == 100

def test_the_arena_command_scores_a_file_in_which_verdicts_are_missing(call, written, tmp_path):
    games = [("A>B", "A>>B"), ("A=B", None), ("B>A", "A>B")]
    rows = [dict(question_id=str(i), model="mine", games=[{"score": score} for score in pair])
            for i, pair in enumerate(games)] + [dict(question_id="x", model="mine", games=[None, None])]
    call(eval_script, "arena", "--judgments", written("mine.jsonl", rows), "--json", tmp_path / "out.json")
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures == pytest.approx(arena_figures(games) | {"n_no_verdict": 3})
    assert figures["score"] == pytest.approx(100 * 5.5 / 7) and figures["ci_low"] <= figures["ci_high"]

@pytest.mark.parametrize("new", [False, True])
def test_arena_generate_writes_what_the_official_tool_reads_in_the_format_of_the_questions(
        call, tiny, written, tmp_path, prompts, capsys, new):
    questions = [dict(uid=f"q{i}", prompt=p) if new else dict(question_id=f"q{i}", turns=[{"content": p}])
                 for i, p in enumerate(prompts[:5])]
    call(eval_script, "arena-generate", "--policy", tiny(), "--prompts", written("question.jsonl", questions),
         "--out", tmp_path / "out", "--max_new_tokens", 8, *["--name", "mine"] * new)
    name = "mine" if new else tiny().rpartition("/")[2]
    rows, samples = (read_jsonl(tmp_path / "out" / f"{file}.jsonl") for file in (name, "samples"))
    assert [sample["prompt"] for sample in samples] == prompts[:5]
    for number, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        if new:
            assert (row["uid"], row["model"]) == (f"q{number}", name)
            assert row["messages"] == [dict(role="user", content=sample["prompt"]), dict(
                role="assistant", content=dict(answer=sample["response"]))]
        else:
            assert (row["question_id"], row["model_id"]) == (f"q{number}", name)
            assert row["choices"][0]["turns"] == [
                {"content": sample["response"], "token_len": sample["tokens"]}]
    assert len({row["ans_id" if new else "answer_id"] for row in rows}) == 5
    assert f"5 answers, by {'uid' if new else 'question_id'}" in capsys.readouterr().out

@pytest.mark.parametrize("rows, message", [
    ([dict(model="m", verdict="A>B")], "not Arena-Hard's judgments .*games"),
    ([dict(model="m", games=[{"score": "A>B"}])], "two games per question"),
    ([dict(model=m, games=[{"score": "A>B"}] * 2) for m in "ab"], "all of one model"),
    ([dict(model="m", games=[{"score": "A"}] * 2)], "no verdict .*A>>B")])
def test_files_that_are_not_arena_hards_judgments_or_questions_are_refused(rows, message, call, written):
    with pytest.raises(Problem, match=message):
        call(eval_script, "arena", "--judgments", written("j.jsonl", rows))
    with pytest.raises(Problem, match="not Arena-Hard's questions"):
        call(eval_script, "arena-generate", "--policy", "x", "--prompts", written("q.jsonl", rows))
