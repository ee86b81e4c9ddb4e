"""pytest tests/test_input.py

Whatever comes in, a line says what is wrong with it, before anything is computed; nothing is dropped unsaid.
"""
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

import dpo
import eval as eval_script
import filter as filter_script
import mt
import reward
import sampler
from common import data, run
from common.data import (
    encode_chat,
    load_tokenizer,
    prompt_id,
    read_jsonl,
    read_pairs,
    read_prompts,
    write_jsonl,
)
from common.parallel import Problem
from filter import compare

SAMPLE = dict(prompt="a", response="b", tokens=3, finished=True, score=1.0)
PAIR = dict(prompt="a sad poem", chosen="grey waves weep .", rejected="the end .")
USER, BOT = dict(role="user", content="a sad poem"), dict(role="assistant", content="the end .")
COMMANDS = {  # {} is what a case gives: the text of the file in.jsonl, or further words
    "prompts": (sampler, "--model PM --prompts in.jsonl --out out.jsonl"),
    "json": (sampler, "--model PM --prompts in.json --out out.jsonl"),
    "pairs": (dpo, "--model PM --pairs in.jsonl --out out"),
    "test": (reward, "--model RM --pairs pairs.jsonl --test in.jsonl --out out"),
    "accuracy": (eval_script, "accuracy --rm RM --pairs in.jsonl --json out"),
    "scored": (filter_script, "--samples in.jsonl --out out.jsonl"),
    "new": (filter_script, "--new in.jsonl --old scored.jsonl --out out.jsonl"),
    "score": (reward, "--model RM --samples in.jsonl --out out.jsonl"),
    "arena": (eval_script, "arena --judgments in.jsonl --json out"),
    "annotations": (eval_script, "alpaca --annotations in.jsonl --gamed gamed.csv --json out"),
    "gamed": (eval_script, "alpaca --annotations annotations.json --gamed in.jsonl --json out"),
    "mt": (mt, "--policy PM --rm RM --prompts prompts.jsonl --select_prompts 2 --max_new_tokens 8 "
               "--out out "),
    "toy": (mt, "--out out "),
    "sample": (sampler, "--model PM --prompts prompts.jsonl --out out.jsonl "),
    "dpo": (dpo, "--model PM --pairs pairs.jsonl --out out "),
    "rm": (reward, "--model RM --pairs pairs.jsonl --out out "),
    "filter": (filter_script, "--out out.jsonl "),
    "eval": (eval_script, ""),
}
FLAGS = ("mt", "toy", "sample", "dpo", "rm", "filter", "eval")


def line(row=SAMPLE, **changes):
    return json.dumps({**row, **changes})


CASES = [
    # ------------------------------------------------------------ trackers
    ("mt", "--report_to mlflow", "--report_to mlflow: wandb or tensorboard"),
    # ------------------------------------------------------------ JSON
    ("prompts", "", "in.jsonl: empty"),
    ("prompts", "\n \n", "in.jsonl: empty"),
    ("json", "[]", "in.json: empty"),
    ("prompts", '{"prompt": "a"', "in.jsonl:1: not JSON"),
    ("prompts", '{"prompt": "a"}\n\n{"prompt": }', "in.jsonl:3: not JSON"),
    ("json", '[{"prompt": "a"},\n {"prompt": }]', "in.json:2: not JSON"),
    ("prompts", '["a"]', "in.jsonl:1: a JSON object is needed, this is list"),
    ("prompts", "null", "in.jsonl:1: a JSON object is needed, this is NoneType"),
    ("prompts", "[" * 100_000, "in.jsonl:1: nested too deeply"),
    ("prompts", '{"prompt": "a", "x": ' + "[" * 300 + "]" * 300 + "}", "in.jsonl:1: nested too deeply"),
    ("prompts", '{"prompt": "a", "x": ' + '{"x": ' * 300 + "1" + "}" * 301, "in.jsonl:1: nested too deeply"),
    ("prompts", '{"prompt": "a"}\n{"x": ' + "1" * 5000 + "}", "in.jsonl:2: a number of too many digits"),
    ("prompts", '{"prompt": "a \\ud800"}', "in.jsonl:1: half a surrogate pair in a text"),
    ("prompts", '{"prompt": [{"role": "\\udc00", "content": "a"}]}', "in.jsonl:1: half a surrogate pair"),
    ("prompts", '{"prompt": "a", "\\ud83d": 1}', "in.jsonl:1: half a surrogate pair"),
    ("pairs", line(PAIR, chosen="\ud800"), "in.jsonl:1: half a surrogate pair"),
    ("scored", line(response="\ud800"), "in.jsonl:1: half a surrogate pair"),
    ("prompts", b"\xff\xfe\x00", "in.jsonl: not UTF-8"),
    ("prompts", '{"prompt": "a"}'.encode("utf-16"), "in.jsonl: not UTF-8"),
    # ------------------------------------------------------------ prompts
    *[("prompts", line(prompt=prompt), "in.jsonl:1: no prompt (a field `prompt` with text") for prompt in (
        None, 3, True, "", " \n", [], [{}], ["a"], {"role": "user", "content": "a"}, [{"role": "user"}],
        [{"role": 3, "content": "a"}], [{"role": "user", "content": None}], [USER | {"content": " "}],
        [USER, "a"])],
    ("prompts", '{"text": "a"}', "in.jsonl:1: no prompt"),
    ("prompts", line(prompt=[USER, BOT]), "in.jsonl:1: the prompt ends with an assistant turn"),
    ("prompts", line(prompt="a" * 50_000_000), "in.jsonl:1: a prompt of 50,000,014 characters; leave out"),
    ("prompts", line(prompt=[USER] * 50_000), "in.jsonl:1: a prompt of 1,"),
    ("prompts", line(prompt="sad " * 200), "prompt of 203 tokens does not fit into the context of 96 tokens"),
    # ------------------------------------------------------------ pairs
    ("pairs", line(PAIR, prompt=None), "in.jsonl:1: no prompt"),
    *[("pairs", line(PAIR, chosen=chosen), "in.jsonl:1: no answer in `chosen`") for chosen in (
        None, 3, [], [USER], [{"role": "assistant"}], [3, BOT])],
    ("pairs", line(PAIR, rejected={}), "in.jsonl:1: no answer in `rejected`"),
    ("pairs", line(PAIR, prompt=None, chosen=[USER, BOT], rejected=[BOT, BOT]), "answer different prompts"),
    ("pairs", line(PAIR, prompt="Bye", chosen=[USER, BOT]), "of `chosen` answer another prompt than"),
    ("pairs", line(PAIR, rejected=[USER, BOT, USER, BOT]), "of `rejected` answer another prompt"),
    ("pairs", line(PAIR, prompt=[BOT, USER], chosen=[USER, BOT]), "of `chosen` answer another prompt"),
    ("pairs", line(PAIR, chosen="a" * 1_000_001), "in.jsonl:1: the chosen 'aaaa"),
    *[("pairs", line(PAIR, weight=weight), "in.jsonl:1: the weight ") for weight in (
        -1, "1", True, [], float("nan"), float("inf"), 10**400)],
    ("pairs", line(PAIR, rejected_finished="no"), "the rejected_finished 'no' is not true or false"),
    ("pairs", line(PAIR, subset=["a"]), "the subset ['a'] is not text"),
    ("pairs", line(PAIR, chosen="sad " * 9000), "none of 1 pairs is short enough for --max_length 2048"),
    ("accuracy", line(PAIR, subset={"a": 1}), "in.jsonl:1: the subset {'a': 1} is not text"),
    ("accuracy", line(PAIR, chosen="sad " * 200), "none of 1 pairs fits into 96 tokens"),
    ("test", line(PAIR, chosen=3), "in.jsonl:1: no answer in `chosen`"),
    ("test", line(PAIR, chosen="sad " * 200), "none of 1 pairs fits into 96 tokens"),
    # ------------------------------------------------------------ scored responses
    *[("scored", line(score=score), "in.jsonl:1: the score ") for score in (
        True, "1", [], float("nan"), float("inf"), -float("inf"), 10**400, 1e300)],
    ("scored", line() + "\n" + line(score=None), "in.jsonl:2: no score (a field `score` with a finite "
     "number); score samples first: python reward.py --samples"),
    *[("scored", line(tokens=tokens), "in.jsonl:1: the tokens ") for tokens in (
        "3", -1, 2.5, True, [], float("nan"), 10**18)],
    ("scored", line(tokens=None), "in.jsonl:1: no tokens (a field `tokens` with a whole number from 0)"),
    *[("scored", line(finished=finished), "in.jsonl:1: the finished ") for finished in ("yes", 1, 0.0, [])],
    *[(how, line(response=response), "in.jsonl:1: the response ") for response in (3, [], {})
      for how in ("scored", "score", "new")],
    ("score", line(response=None), "in.jsonl:1: no response"),
    ("score", line(prompt=5), "in.jsonl:1: no prompt"),
    ("score", line(response="sad " * 200), "does not fit into its context of 96; leave it out or sample with "
     "a smaller --max_new_tokens"),
    ("new", line() + "\n" + line(), "in.jsonl has 2 rows, scored.jsonl has 1"),
    ("new", line(prompt="b"), "new and old answer different prompts, or not in the same order"),
    # ------------------------------------------------------------ flags
    *[(how, words, f"{words.split()[0]} {value} makes no sense") for how, words, value in (
        ("dpo", "--lr nan", "nan"), ("dpo", "--lr inf", "inf"), ("dpo", "--lr 1e100", "1e+100"),
        ("dpo", "--lr -1", "-1"), ("rm", "--lr 0", "0"), ("dpo", "--beta nan", "nan"),
        ("dpo", "--epochs 100000000000", "1e+11"), ("sample", "--temperature nan", "nan"),
        ("sample", "--temperature inf", "inf"), ("sample", "--temperature 1e-40", "1e-40"),
        ("sample", "--temperature -0.1", "-0.1"), ("sample", "--seed -1", "-1"),
        ("sample", "--seed 9223372036854775808", "9.22337204e+18"), ("sample", "--top_p nan", "nan"),
        ("sample", "--top_p 1.5", "1.5"), ("sample", "--samples 100000000000", "1e+11"),
        ("sample", "--max_new_tokens 1000000000000", "1e+12"), ("mt", "--tau nan", "nan"),
        ("mt", "--rounds -1", "-1"), ("mt", "--policy_lr inf", "inf"), ("mt", "--select_prompts -1", "-1"),
        ("toy", "--samples 100000000000", "1e+11"), ("toy", "--seed -1", "-1"))],
    ("dpo", "--lr many", "--lr: invalid float value: 'many'"),
    ("dpo", "--epochs " + "9" * 5000, "--epochs: invalid int value"),
    ("dpo", "--out a\udcff", "--out 'a\\udcff' holds characters that can't be printed"),
    ("toy", "--samples 1", "--samples 1 makes no pairs"),
    ("toy", "--rm RM", "--policy, --rm and --prompts go together"),
    ("mt", "--policy RM", "RM: a LlamaForSequenceClassification, which is a reward model and no policy"),
    ("sample", "--model RM", "RM: a LlamaForSequenceClassification, which is a reward model and no policy"),
    ("mt", "--select_prompts 30", "need at least 33"),
    ("mt", "--max_new_tokens 90", "with an answer of 90; leave it out or set a smaller"),
    ("dpo", "--out pairs.jsonl/x/out", "--out pairs.jsonl/x/out: pairs.jsonl is a file, not a folder"),
    ("dpo", "--out gamed.csv", "--out gamed.csv: gamed.csv is a file, not a folder"),
    ("filter", "--samples scored.jsonl --out pairs.jsonl/out.jsonl", "pairs.jsonl is a file, not a folder"),
    ("dpo", "--out out.jsonl", "--out out.jsonl: a folder is written; its name must not end in .jsonl"),
    ("sample", "--out out", "--out out: a file is written; its name must end in .jsonl"),
    ("rm", "--samples scored.jsonl", "give --pairs to train or --samples to score"),
    ("toy", "--policy PM", "--policy, --rm and --prompts go together"),
    ("mt", "--select_prompts 0", "--select_prompts 0 needs --select false"),
    ("filter", "", "give --samples, or --new and --old"),
    ("filter", "--samples scored.jsonl --new scored.jsonl", "give --samples, or --new and --old"),
    ("filter", "--samples scored.jsonl --old scored.jsonl", "give --samples, or --new and --old"),
    ("filter", "--new scored.jsonl", "give --samples, or --new and --old"),
    ("filter", "--samples nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("filter", "--samples PM", "PM: a folder; a JSONL, JSON or parquet file is needed"),
    ("eval", "accuracy --rm RM --pairs pairs.jsonl --json PM", "--json PM is a folder, not a file"),
    ("eval", "accuracy --rm RM --pairs pairs.jsonl --max_length 5", "none of 1 pairs fits into 5 tokens"),
    ("eval", "rewardbench --rm RM --data pairs.jsonl --prior nan", "--prior nan makes no sense"),
    ("eval", "winrate --policy PM --baseline PM --rm RM --prompts prompts.jsonl --max_new_tokens 90",
     "of RM with an answer of 90; leave it out or set a smaller --max_new_t"),
    *[("eval", f"arena-generate --policy PM --prompts questions.jsonl --out out --name {name}",
       f"--name '{name}': a plain name is needed") for name in ("../../x", "a/b", "..", ".hidden", "/tmp/x")],
    # ------------------------------------------------------------ what judges said
    *[("arena", json.dumps(dict(model=model, games=games)), "in.jsonl: ") for model, games in (
        ("m", [{"score": ["A>B"]}, {"score": "A>B"}]), ("m", [{"score": {}}, None]), (["m"], [None, None]),
        ("m", 3), ("m", ["A>B", "A>B"]), ("m", [None, None]))],
    *[("annotations", json.dumps(dict(generator_1=name, generator_2="m", output_1=output, output_2="o",
                                      preference=preference)), "in.jsonl: ") for name, output, preference in (
        (["b"], "o", 3), ("b", None, 1), ("b", "o", 10**400), ("b", "o", []), ("b", "o", True + 2))],
    ("gamed", "index\0\n1,2", "in.jsonl: not AlpacaEval's df_gamed.csv"),
    ("gamed", "index,std_delta_len,instruction_difficulty,preference\n" + "1" * 200_000,
     "in.jsonl: not AlpacaEval's df_gamed.csv"),
]


@pytest.fixture
def here(tiny, tmp_path, monkeypatch, prompts):
    """A current folder with models PM and RM and a good file of every kind."""
    monkeypatch.chdir(tmp_path)
    for name, folder in (("PM", tiny()), ("RM", tiny(reward=True))):
        Path(name).symlink_to(folder)
    monkeypatch.setattr(mt.models, "local_folder", str)  # so that messages name PM and RM
    monkeypatch.setattr(eval_script, "local_folder", str)
    monkeypatch.setattr(mt.toy, "build", None)  # a call would fail
    write_jsonl("prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_jsonl("pairs.jsonl", [PAIR])
    write_jsonl("scored.jsonl", [SAMPLE])
    write_jsonl("questions.jsonl", [dict(question_id=1, turns=[dict(content="a sad poem")])])
    Path("annotations.json").write_text(json.dumps(dict(
        generator_1="b", generator_2="m", output_1="o", output_2="o", preference=1)))
    Path("gamed.csv").write_text("index,std_delta_len,instruction_difficulty,preference\n0,1,1,0.5\n")
    return tmp_path


def refused(call, module, words):
    """The line that refuses these words."""
    began = time.time()
    with pytest.raises((Problem, OSError)) as problem:
        call(module, *words)
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 500
    assert time.time() - began < 5
    assert not list(Path("out").glob("*.safetensors"))
    return str(problem.value)


@pytest.mark.parametrize("how, given, expected", CASES, ids=[
    f"{i}-{how}-{given[:40] if len(given) < 200 else 'large'!r}" for i, (how, given, _) in enumerate(CASES)])
def test_bad_input_is_one_line(call, here, how, given, expected):
    module, words = COMMANDS[how]
    if how in FLAGS:
        words += given
    else:
        path = Path("in.json" if how == "json" else "in.jsonl")
        path.write_bytes(given if isinstance(given, bytes) else given.encode())
    assert expected in refused(call, module, words.split())
    assert not Path("out.jsonl").exists()


def test_a_tracker_that_is_not_installed_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Problem, match=r"--report_to wandb: it is not installed \(pip install wandb\)"):
        run.parse(mt.Options, ["--report_to", "wandb"])


@pytest.mark.parametrize("module, words", [(sampler, COMMANDS["sample"][1]), (mt, COMMANDS["mt"][1])])
def test_a_long_prompt_is_named_by_its_row_and_left_out_and_counted_where_that_is_asked_for(
        call, here, prompts, capsys, module, words):
    rows = [{"prompt": prompt} for prompt in ["sad " * 200, *prompts, "happy " * 200]]
    write_jsonl("prompts.jsonl", [rows[1], *rows])  # a row is not a prompt's number: repeats count
    words = words.split()
    with pytest.raises(Problem, match=r"^prompts.jsonl:2: .* of 203 tokens .*skip_long leaves out all 2: "):
        call(module, *words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "scored_samples" if module is mt else "sample", lambda *a, **b: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(module, *words, "--skip_long")
    said = capsys.readouterr().out
    model = "RM" if module is mt else "PM"
    assert f"2 of {len(prompts) + 2} prompts are too long for {model} and left out" in said
    assert f"{len(prompts)} prompts (1 repeated ones left out)" in said


def test_there_are_a_hundred_cases():
    assert len(CASES) >= 100


# ---------------------------------------------------------------- models
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("file, text, expected", [
    ("config.json", "{", "config.json:1: not JSON"),
    ("config.json", "[]", "config.json: a JSON object is needed, this is list"),
    ("config.json", "[" * 100_000, "config.json:1: nested too deeply"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json: a JSON object is needed"),
    ("generation_config.json", "[]", "generation_config.json: a JSON object is needed"),
    ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id 'x' is not a token's number"),
    ("generation_config.json", '{"eos_token_id": [2, "x"]}', "eos_token_id [2, 'x'] is not a token's number"),
    ("tokenizer.json", "{", "no tokenizer could be loaded (Expecting property name enclosed in double"),
    ("tokenizer.json", None, "tokenizers` library serialization file, (2) a slow tokenizer instance"),
    ("chat_template.jinja", None, "the tokenizer has no chat template (add a chat_template.jinja"),
    ("chat_template.jinja", " ", "its chat template refuses [{'role': 'user', "),
    ("chat_template.jinja", "{% if 0 %}{{ messages }}{% endif %}", "(it writes nothing)"),
    ("chat_template.jinja", LOOPS, "(it takes more than 0.2 seconds)"),
    ("chat_template.jinja", "{{ raise_exception('no\\n\\x1b[31m\\u202e!') }}", "(no [31m !)"),
    ("chat_template.jinja", "{{ messages[0].content.__class__.__mro__ }}", "is unsafe"),
    ("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "(maximum recursion depth"),
])
def test_a_bad_file_of_a_model_is_one_line(call, here, monkeypatch, file, text, expected):
    monkeypatch.setattr(data, "SECONDS", 0.2)
    folder = Path(shutil.copytree("PM", "model"))
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    words = "--model model --prompts prompts.jsonl --out out.jsonl".split()
    assert expected in refused(call, sampler, words)


def test_weights_of_other_shapes_are_said_to_be_that(call, here):
    folder = Path(shutil.copytree("PM", "model"))
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight[:8].clone() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "its weights have other shapes than config.json says" in refused(
        call, sampler, "--model model --prompts prompts.jsonl --out out.jsonl".split())


def test_a_template_that_loops_in_another_thread_is_not_interrupted_and_signals_stay_as_they_were(here):
    import signal
    import threading
    before, done = signal.getsignal(signal.SIGALRM), []
    thread = threading.Thread(target=lambda: done.append(encode_chat(load_tokenizer("PM"), "a sad poem")))
    thread.start()
    thread.join()
    assert done == [encode_chat(load_tokenizer("PM"), "a sad poem")]
    assert signal.getsignal(signal.SIGALRM) is before


def test_an_error_on_the_way_to_a_file_names_it_without_a_number(here):
    done = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", f"""
import sys; sys.path.insert(0, {str(Path(run.__file__).parent)!r}); sys.stderr = open("said", "w")
import run
run.launch(lambda: open("pairs.jsonl/x"))"""])
    assert done == 2 and Path("said").read_text() == "-c: pairs.jsonl/x: Not a directory\n"


# ---------------------------------------------------------------- read all the same, or left out and said
def test_a_byte_order_mark_is_read(here):
    Path("bom.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    Path("bom.json").write_bytes(b'\xef\xbb\xbf[{"prompt": "a"}, {"prompt": "b"}]')
    assert read_prompts("bom.jsonl") == read_prompts("bom.json") == (["a", "b"], 0)


def test_half_a_surrogate_pair_does_not_break_the_writing_of_a_file(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"response": "a\ud800b"}])
    assert read_jsonl(tmp_path / "x.jsonl") == [{"response": "a?b"}]


def test_a_prompts_responses_make_one_group_wherever_they_stand(call, here):
    rows = [dict(SAMPLE, prompt=prompt, response=f"{prompt}{score}", score=score)
            for score in (1, 2, 3) for prompt in "abcd"]
    write_jsonl("in.jsonl", rows)
    write_jsonl("sorted.jsonl", sorted(rows, key=lambda row: row["prompt"]))
    for name in ("in", "sorted"):
        call(filter_script, "--samples", f"{name}.jsonl", "--out", f"pairs-{name}.jsonl")
    pairs = read_jsonl("pairs-in.jsonl")
    assert [pair["chosen"] for pair in pairs] == ["a3", "b3", "c3", "d3"] == [p + "3" for p in "abcd"]
    assert pairs == read_jsonl("pairs-sorted.jsonl")


def test_interleaved_responses_get_the_scores_of_sorted_ones(call, here, prompts):
    rows = [dict(SAMPLE, prompt=prompt, response=text) for text in ("waves weep .", "the end .")
            for prompt in prompts[:5]]
    write_jsonl("in.jsonl", rows)
    write_jsonl("sorted.jsonl", sorted(rows, key=lambda row: row["prompt"]))
    for name in ("in", "sorted"):
        call(reward, "--model", "RM", "--samples", f"{name}.jsonl", "--out", f"scored-{name}.jsonl")
    scores = {(row["prompt"], row["response"]): row["score"] for row in read_jsonl("scored-sorted.jsonl")}
    for row, before in zip(read_jsonl("scored-in.jsonl"), rows, strict=True):
        assert row["response"] == before["response"]
        assert row["score"] == pytest.approx(scores[row["prompt"], row["response"]], abs=1e-5)


def test_equal_and_empty_answers_are_counted_and_said(here, capsys):
    write_jsonl("in.jsonl", [PAIR, PAIR | {"chosen": PAIR["rejected"]}, PAIR | {"rejected": " "},
                             PAIR | {"chosen": "", "rejected": ""}])
    assert len(read_pairs("in.jsonl")) == 4
    assert capsys.readouterr().out.splitlines() == [
        "WARNING: in.jsonl: 2 of 4 pairs have equal answers",
        "WARNING: in.jsonl: 2 of 4 pairs have an empty answer"]
    read_pairs("pairs.jsonl")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words", [
    (dpo, "--model PM --pairs in.jsonl --out out"), (reward, "--model RM --pairs in.jsonl --out out"),
    (eval_script, "accuracy --rm RM --pairs in.jsonl --json out"),
    (reward, "--model RM --pairs pairs.jsonl --test in.jsonl --out out")])
def test_long_pairs_are_left_out_and_many_of_them_in_capitals(call, here, capsys, words):
    module, words = words
    long = PAIR | {"chosen": "sad " * 3000}
    for rows, said in (([PAIR] * 2 + [long] * 3, "2 pairs; WARNING: 3 OF 5 ARE TOO LONG AND LEFT OUT"),
                       ([PAIR] * 9 + [long], "9 pairs (1 too long)")):
        write_jsonl("in.jsonl", rows)
        call(module, *words.split())
        assert said in capsys.readouterr().out
        run.remove("out")


def test_one_long_pair_does_not_end_the_accuracy_of_the_others(call, here, capsys):
    write_jsonl("in.jsonl", [PAIR] * 3 + [PAIR | {"rejected": "sad " * 200}])
    call(eval_script, "accuracy", "--rm", "RM", "--pairs", "in.jsonl")
    assert "on 3 pairs" in capsys.readouterr().out


def test_test_pairs_are_read_before_training(call, here, monkeypatch):
    monkeypatch.setattr(reward, "train", None)  # a call would fail
    write_jsonl("in.jsonl", [PAIR, {}])
    assert "in.jsonl:2: no prompt" in refused(
        call, reward, "--model RM --pairs pairs.jsonl --test in.jsonl --out out".split())


# ---------------------------------------------------------------- special tokens that a message spells
def added():
    """The embedded task's tokenizer with a stop token that its vocabulary doesn't have."""
    tokenizer = mt.toy.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|eot_id|>"})
    return tokenizer


def unigram():
    """One of letters, as sentencepiece makes them."""
    pieces = [("<pad>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in sorted(set(
        "▁" + "".join(map(chr, range(33, 127))))))]
    model = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=False))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        chat_template=mt.toy.tokenizer().chat_template)


@pytest.fixture(params=["embedded", "added", "unigram", "golden", "stories"])
def tokenizer(request):
    made = dict(embedded=mt.toy.tokenizer, added=added, unigram=unigram)
    if request.param in made:
        return made[request.param]()
    shared = request.getfixturevalue("shared")
    return load_tokenizer(shared / ("golden/policy" if request.param == "golden" else "models/stories3M"))


def test_a_message_that_spells_the_end_of_turn_cannot_end_it(tokenizer):
    end, unknown = tokenizer.eos_token, {tokenizer.pad_token_id}  # the embedded task's word for unknown ones

    def special(chat):
        return [i for i in chat.ids if i in data._special_ids(tokenizer) - unknown]
    plain = encode_chat(tokenizer, "sad poem", "grey waves")
    for text in (end, f"a{end}b", f"{end}\n{tokenizer.bos_token}{end}"):
        hostile, response = f"sad {text} poem", f"grey {text} waves"
        chat, cut = (encode_chat(tokenizer, hostile, response, finished) for finished in (True, False))
        assert special(chat) == special(plain)
        assert chat.ids[:chat.start] == encode_chat(tokenizer, hostile).ids == cut.ids[:cut.start]
        assert chat.ids[:-1] == cut.ids and chat.ids[-1] == plain.ids[-1]
        if len(tokenizer) > 200:  # one that knows all letters
            assert response in tokenizer.decode(chat.ids[chat.start:])
            assert hostile in tokenizer.decode(chat.ids[:chat.start])
        assert special(encode_chat(tokenizer, "sad poem", response)) == special(plain)
        role = encode_chat(tokenizer, [dict(role=f"user{text}", content="sad poem")])
        assert len(special(role)) <= len(special(encode_chat(tokenizer, "sad poem")))


def test_with_special_tokens_in_a_message_all_other_tokens_are_as_without(tokenizer):
    careful = Careful(tokenizer)
    for text in ("a sad poem", " two  spaces\nand a line ", "Tom’s 42 … 你好", ""):
        for response in (None, text + "!"):
            turns = [dict(role="user", content="x" + text), dict(role="assistant", content=response)]
            turns = turns[:1 + (response is not None)]
            drawn = data._render(tokenizer, turns)
            shown = data._render(tokenizer, turns, careful)
            expected = tokenizer(drawn, add_special_tokens=False)["input_ids"]
            assert careful.encode(shown)[0] == expected


def test_ordinary_text_never_goes_the_careful_way(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "Careful", None)  # a call would fail
    encode_chat(tokenizer, "a sad poem < s > |eot|", "grey waves <", whole=True)


# ---------------------------------------------------------------- paths and secrets
def test_a_selection_cannot_move_a_folder_from_elsewhere_into_the_run(here, monkeypatch):
    o = run.parse(mt.Options, COMMANDS["mt"][1].split())
    manifest.claim(o.out, o)
    Path("victim").mkdir()
    (Path("out") / "e1" / "checkpoints").mkdir(parents=True)
    for name in ("scored_samples", "make_pairs"):
        monkeypatch.setattr(mt, name, lambda *_: Path("pairs.jsonl"))
    monkeypatch.setattr(manifest, "due", lambda *_: False)
    monkeypatch.setattr(manifest, "done", lambda out, path: path)
    for chosen in ("../../../victim", "/etc", "..", "", 3, ["step-1"], "step-1/../../../victim"):
        (Path("out") / "e1" / "selection.json").write_text(json.dumps(dict(chosen=chosen, win_rates={})))
        with pytest.raises(Problem, match="selection.json: not as mt.py writes it"):
            mt.e_step(o, "PM", "RM", "s0.jsonl", Path("out") / "e1")
    assert Path("victim").is_dir() and not (Path("out") / "e1" / "policy").exists()


def test_no_environment_variable_and_no_token_is_written(call, here, monkeypatch):
    secrets = {name: f"secret-{i}" for i, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "SOMETHING"))}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    call(mt, *COMMANDS["mt"][1].split(), *"--update_rm false --tau 0 --samples 2 --max_length 64".split())
    texts = [path.read_bytes() for path in Path("out").rglob("*") if path.is_file()]
    assert len(texts) > 10
    assert not [value for value in secrets.values() for text in texts if value.encode() in text]
    assert not [name for name in secrets for text in texts if name.encode() in text]


# ---------------------------------------------------------------- any rows at all
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner:
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=5)
TEXT = st.sampled_from(["a", "b", "a\n", "", " "]) | st.text(max_size=4)
PROMPT = st.sampled_from(["a", "b", "b "])
CHAT = PROMPT | st.lists(st.fixed_dictionaries(dict(
    role=st.sampled_from(["user", "system"]), content=PROMPT)), min_size=1, max_size=2)


def rows_of(**fields):
    """Lists of rows with these fields; half of the lists have a last row in which one of them is anything."""
    good, name = st.fixed_dictionaries(fields), st.sampled_from(list(fields))
    bad = st.tuples(good, name, JSON).map(lambda parts: [parts[0] | {parts[1]: parts[2]}])
    some = st.lists(good, min_size=1, max_size=6)
    return st.tuples(some, st.just([]) | bad).map(lambda parts: parts[0] + parts[1])


def answer(work):
    """What work() gives, or None where it refused in one line."""
    try:
        return work()
    except Problem as problem:
        assert "\n" not in str(problem)
        return None


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """file(rows) -> the path of their JSONL file; floats and surrogates as json.dumps has them."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"

    def write(rows):
        run.remove(path)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    return write


RANDOM = settings(max_examples=200, deadline=None, derandomize=True)


@RANDOM
@given(rows=rows_of(prompt=CHAT))
def test_of_any_prompts_none_is_lost(file, rows):
    found = answer(lambda: read_prompts(file(rows)))
    if found:
        assert [prompt_id(prompt) for prompt in found[0]] == list(dict.fromkeys(
            prompt_id(row["prompt"]) for row in rows))
        assert len(found[0]) + found[1] == len(rows)


@RANDOM
@given(rows=rows_of(prompt=CHAT, chosen=TEXT, rejected=TEXT, weight=st.floats(0, 9)))
def test_of_any_pairs_none_is_lost(file, rows):
    pairs = answer(lambda: read_pairs(file(rows)))
    for pair, row in zip(pairs or rows, rows, strict=True):
        if pairs:
            assert all(type(pair[side]) is str for side in ("chosen", "rejected"))
            assert pair.get("weight", 1) >= 0 and "weight" in pair or row["weight"] is None


SCORED = dict(prompt=PROMPT, response=TEXT, tokens=st.integers(0, 9), finished=st.booleans(),
              score=st.integers(-3, 3) | st.floats(-1e100, 1e100))


@RANDOM
@given(rows=rows_of(**SCORED))
def test_of_any_scored_responses_each_prompt_gives_a_pair_or_is_counted(file, rows):
    def work():
        return filter_script.preference_pairs(data.read_samples(file(rows), *list(SCORED)[1:]))
    found = answer(work)
    if found:
        pairs, without = found
        assert len(pairs) + without == len({row["prompt"] for row in rows})
        for pair in pairs:
            assert pair["chosen_score"] > pair["rejected_score"] and pair["chosen"] != pair["rejected"]
            scores = [row["score"] for row in rows if row["prompt"] == pair["prompt"]]
            assert pair["rejected_score"] == min(scores) and pair["chosen_score"] in scores


@RANDOM
@given(new=rows_of(**SCORED), scores=st.lists(SCORED["score"], min_size=7, max_size=7))
def test_of_any_comparisons_none_is_lost(file, new, scores):
    old = [row | {"score": score, "response": "a"} for row, score in zip(new, scores)]

    def work():
        return compare(*(data.read_samples(file(some), *list(SCORED)[1:]) for some in (new, old)))
    rows = answer(work)
    if rows:
        assert [row["new"] for row in rows] == [row["response"] for row in new]
        for row in rows:
            assert row["kept"] == (row["margin"] > -row["epsilon"] and row["new"] != "a")


@RANDOM
@given(text=st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode(errors="replace")))
def test_any_bytes_are_rows_or_one_line(file, text):
    path = file([])
    path.write_bytes(text)
    answer(lambda: data.read_rows(path))
