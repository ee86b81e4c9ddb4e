"""pytest tests/test_input.py

Whatever a user gives to a command, what is wrong with it is said in one line, before anything is computed.
Whatever is left out is counted, and that is said, too.
"""
import json
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dpo
import eval as eval_script
import filter as filter_script
import mt
import reward
import sampler
from common import data, run
from common.data import prompt_id, read_jsonl, read_pairs, read_prompts, write_jsonl
from common.parallel import Problem

SAMPLE = dict(prompt="a", response="b", tokens=3, finished=True, score=1.0)
PAIR = dict(prompt="a sad poem", chosen="grey waves weep .", rejected="the end .")
SYSTEM, TURN = dict(role="system", content="Be kind."), {"from": "human", "value": "a"}
USER, BOT = dict(role="user", content="a sad poem"), dict(role="assistant", content="the end .")
# A case gives the contents of in.jsonl or in.json to the commands that name such a file, and further words to
# the others.
COMMANDS = {
    "prompts": (sampler, "--model PM --prompts in.jsonl --out out.jsonl"),
    "json": (sampler, "--model PM --prompts in.json --out out.jsonl"),
    "pairs": (dpo, "--model PM --pairs in.jsonl --out out"),
    "accuracy": (eval_script, "accuracy --rm RM --pairs in.jsonl --json out"),
    "files": (sampler, "--model PM --out out.jsonl --prompts="),
    "scored": (filter_script, "--samples in.jsonl --out out.jsonl"),
    "new": (filter_script, "--new in.jsonl --old scored.jsonl --out out.jsonl"),
    "score": (reward, "--model RM --samples in.jsonl --out out.jsonl"),
    "mt": (mt, "--policy PM --rm RM --prompts prompts.jsonl --select_prompts 2 --max_new_tokens 8 "
               "--out out "),
    "toy": (mt, "--out out "),
    "sample": (sampler, "--model PM --prompts prompts.jsonl --out out.jsonl "),
    "dpo": (dpo, "--model PM --pairs pairs.jsonl --out out "),
    "rm": (reward, "--model RM --pairs pairs.jsonl --out out "),
    "filter": (filter_script, "--out out.jsonl "),
    "eval": (eval_script, ""),
}

def line(row=SAMPLE, **changes):
    return json.dumps({**row, **changes})

CASES = [  # the command, what it is given, and a part of the line that refuses it
    # ------------------------------------------------------------ JSON
    ("prompts", "", "in.jsonl: empty"), ("prompts", "\n \n", "in.jsonl: empty"), ("json", "[]", ": empty"),
    ("prompts", '{"prompt": "a"}\n\n{"prompt": }', "in.jsonl:3: not readable JSON"),
    ("json", '[{"prompt": "a"},\n {"prompt": }]', "in.json:2: not readable JSON"),
    ("prompts", '["a"]', "in.jsonl:1: a row must be a JSON object, but this is list"),
    ("prompts", "[" * 100_000, "in.jsonl:1: not readable JSON (maximum recursion depth"),
    ("prompts", '{"prompt": "a"}\n{"x": ' + "1" * 5000 + "}", "in.jsonl:2: not readable JSON"),
    ("prompts", '{"prompt": "a \\ud800"}', "in.jsonl:1: not readable JSON"),
    ("prompts", b"\xff\xfe\x00", "in.jsonl: not UTF-8"),
    ("prompts", '{"prompt": "a"}'.encode("utf-16"), "in.jsonl: not UTF-8"),
    # ------------------------------------------------------------ prompts
    *[("prompts", line(prompt=prompt), "wanted is a field `prompt` with text, or a list of messages")
      for prompt in (None, 3, True, "", " \n", [], [{}], ["a"], USER, [{"role": "user"}], [USER, "a"],
                     [USER | {"role": 3}], [USER | {"content": None}], [USER | {"content": " "}])],
    ("prompts", line(prompt=[USER, BOT]), "in.jsonl:1: the prompt must end where the answer begins, "),
    ("prompts", line(prompt="sad " * 200),
     "PM: no prompt fits into its context of 96 tokens with an answer of 1; the shortest has 203"),
    ("prompts", line(system=3), "in.jsonl:1: `system` must be text, and the only system turn"),
    ("prompts", line(prompt=[SYSTEM, USER], system="Be kind."), "`system` must be text, and the only system"),
    # ------------------------------------------------------------ forms that are not read
    *[("prompts", json.dumps({name: [TURN], "prompt": "a", "x": 1}),
       f"in.jsonl:1: {name} can't be read; the row has {name}, prompt, x; wanted is a field `prompt` with ")
      for name in ("history", "tools", "conversations", "instruction", "input")],
    ("pairs", line(PAIR, history=[["a", "b"]]), "1: history can't be read; the row has prompt, chosen, "),
    *[(how, json.dumps(row), f"in.jsonl:1: {problem}; the row has {', '.join(row)}; wanted is a field")
      for how, row, problem in (
        ("prompts", {"instruction": "a", "input": "b", "output": "c"}, "instruction, input can't be read"),
        ("prompts", {"question": "a"}, "no prompt that can be read"),
        ("pairs", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"},
         "no prompt that can be read"))],
    *[("files", name, f"{name}: neither a .jsonl, .json or .parquet file nor a hub id") for name in (
        "prompts.csv", "prompts.jsonl.gz", "PM", "nowhere", "")],
    ("files", "nowhere.json", "nowhere.json: no such file"), ("files", "x.jsonl", "x.jsonl: no such file"),
    # ------------------------------------------------------------ pairs
    ("pairs", line(PAIR, prompt=None), "in.jsonl:1: no prompt"),
    *[("pairs", line(PAIR, chosen=chosen), "in.jsonl:1: `chosen` must be text, or messages") for chosen in (
        None, 3, [], [USER], [{"role": "assistant"}], [3, BOT])],
    ("pairs", line(PAIR, rejected={}), "in.jsonl:1: `rejected` must be text, or messages"),
    ("pairs", line(PAIR, prompt=None, chosen=[USER, BOT], rejected=[BOT, BOT]), "in `rejected` don't begin"),
    ("pairs", line(PAIR, prompt="Bye", chosen=[USER, BOT]), "1: the messages in `chosen` don't begin"),
    ("pairs", line(PAIR, rejected=[USER, BOT, USER, BOT]), "messages in `rejected` don't begin"),
    ("pairs", line(PAIR, prompt=[BOT, USER], chosen=[USER, BOT]), "messages in `chosen` don't begin"),
    *[("pairs", line(PAIR, weight=weight), "in.jsonl:1: the weight ") for weight in (
        -1, "1", True, [], float("nan"), float("inf"), 10**400)],
    ("pairs", line(PAIR, rejected_finished="no"), "the rejected_finished 'no' is not true or false"),
    ("pairs", line(PAIR, chosen="sad " * 9000), "none of 1 pairs is short enough for --max_length 2048"),
    ("accuracy", line(PAIR, chosen="sad " * 200), "none of 1 pairs is short enough for --max_length 96"),
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
    ("score", line(prompt=5), "in.jsonl:1: the prompt 5 can't be read"),
    ("score", line(response="sad " * 200), "does not fit into its context of 96; leave it out or sample with "
     "a smaller --max_new_tokens"),
    ("new", line() + "\n" + line(), "new and old must answer the same prompts"),
    ("new", line(prompt="b"), "new and old must answer the same prompts"),
    # ------------------------------------------------------------ flags
    *[(how, words, f"{words.split()[0]} {value} is out of range") for how, words, value in (
        ("dpo", "--lr nan", "nan"), ("dpo", "--lr inf", "inf"), ("dpo", "--lr 1e100", "1e+100"),
        ("dpo", "--lr -1", "-1"), ("rm", "--lr 0", "0"), ("dpo", "--epochs 100000000000", "1e+11"),
        ("sample", "--temperature 1e-40", "1e-40"), ("sample", "--temperature -0.1", "-0.1"),
        ("sample", "--seed -1", "-1"), ("sample", "--seed 9223372036854775808", "9.22337204e+18"),
        ("sample", "--top_p 1.5", "1.5"), ("mt", "--tau nan", "nan"), ("mt", "--rounds 0", "0"))],
    ("dpo", "--lr many", "--lr: invalid float value: 'many'"), ("mt", "--rounds 1.5", "--rounds: invalid"),
    ("mt", "--select maybe", "--select: Truthy value expected: got maybe but"),
    ("toy", "--seed", "--seed: expected one argument"),
    ("mt", "--beeta 1", "unrecognized arguments: --beeta 1 (see --help)"),
    ("dpo", "--epochs " + "9" * 5000, "--epochs: invalid int value"),
    ("toy", "--samples 1", "--samples 1 gives no pairs"),
    ("toy", "--rm RM", "give --policy, --rm and --prompts together"),
    ("mt", "--policy RM", "RM: LlamaForSequenceClassification with a reward head is a reward model, but a"),
    ("mt", "--rm PM", "PM: LlamaForCausalLM has no reward head (score.weight in safetensors); train o"),
    ("mt", "--select_prompts 30", "need at least 33; --select_prompts 5 fits"),
    ("mt", "--max_new_tokens 90", "RM: no prompt fits into its context of 96 tokens with an answer of 90"),
    ("dpo", "--out pairs.jsonl/x/out", "pairs.jsonl/x"),
    ("dpo", "--out prompts.csv", "File exists: 'prompts.csv'"),
    ("filter", "--samples scored.jsonl --out pairs.jsonl/out.jsonl", "File exists: "),
    ("dpo", "--out out.jsonl", "--out out.jsonl: the name of a file must end in .jsonl, and that of a"),
    ("sample", "--out out", "--out out: the name of a file must end in .jsonl, and that of a folder must"),
    ("toy", "--rm RM --policy PM --prompts nowhere.jsonl --out out", "nowhere.jsonl: no such file"),
    ("rm", "--samples scored.jsonl", "give --pairs to train or --samples to score"),
    ("mt", "--select_prompts 0", "--select_prompts 0 needs --select false"),
    ("toy", "--rm_pairs new", "--rm_pairs new must be both, comparisons or ranked"),
    *[("filter", words, "give --samples, or --new and --old") for words in (
        "", "--samples scored.jsonl --new scored.jsonl", "--samples scored.jsonl --old scored.jsonl",
        "--new scored.jsonl")],
    ("eval", "accuracy --rm RM --pairs pairs.jsonl --json folder", "Is a directory"),
    ("eval", "accuracy --rm RM --pairs pairs.jsonl --max_length 5", "is short enough for --max_length 5"),
    ("eval", "nothing", "name a command: winrate, accuracy, rewardbench, rewardbench2, "),
    ("eval", "rewardbench --rm RM --data pairs.jsonl --prior nan", "--prior nan is out of range"),
    ("eval", "winrate --policy PM --baseline PM --rm RM --prompts prompts.jsonl --max_new_tokens 90",
     "RM: no prompt fits into its context of 96 tokens with an answer of 90"),
    *[("eval", f"arena-generate --policy PM --prompts questions.jsonl --out out --name {name}",
       f"--name '{name}': a plain name is needed") for name in ("../../x", "a/b", "..", ".hidden", "/tmp/x")],
]

@pytest.fixture
def here(tiny, tmp_path, monkeypatch, prompts):
    """Makes a temporary folder the current one, with models PM and RM and a good file of each kind."""
    monkeypatch.chdir(tmp_path)
    for name, folder in (("PM", tiny()), ("RM", tiny(reward=True))):
        Path(name).symlink_to(folder)
    monkeypatch.setattr(mt.models, "local_folder", str)  # keeps the names PM and RM in messages
    monkeypatch.setattr(eval_script, "local_folder", str)
    monkeypatch.setattr(mt.toy, "build", None)  # a call would fail
    Path("folder").mkdir()
    write_jsonl("prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_jsonl("pairs.jsonl", [PAIR])
    write_jsonl("scored.jsonl", [SAMPLE])
    write_jsonl("questions.jsonl", [dict(question_id=1, turns=[dict(content="a sad poem")])])
    Path("prompts.csv").write_text("prompt\na\n")
    return tmp_path

def refused(call, module, words):
    """The one line by which these words are refused, at once, before prompts are split or a model saved."""
    began = time.time()
    with pytest.raises((Problem, OSError)) as problem:
        call(module, *words)
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 500
    assert time.time() - began < 5
    assert not list(Path("out").glob("*.safetensors")) and not Path("out/prompts").exists()
    return str(problem.value)

@pytest.mark.parametrize("how, given, expected", CASES, ids=[
    f"{i}-{how}-{given[:40] if len(given) < 200 else 'large'!r}" for i, (how, given, _) in enumerate(CASES)])
def test_bad_input_is_refused_in_one_line(call, here, how, given, expected):
    module, words = COMMANDS[how]
    if "in.json" in words:
        Path("in.json" if how == "json" else "in.jsonl").write_bytes(
            given if isinstance(given, bytes) else given.encode())
    else:
        words += given
    assert expected in refused(call, module, words.split())
    assert not Path("out.jsonl").exists()

def test_prompts_that_are_too_long_are_left_out_and_their_number_is_said(call, here, prompts, capsys):
    long = ["sad " * 200, "happy " * 200]
    write_jsonl("prompts.jsonl", [{"prompt": prompt} for prompt in [*long, *prompts, prompts[0]]])
    call(sampler, *COMMANDS["sample"][1].split(), "--max_new_tokens", 2, "--samples", 1)
    said = capsys.readouterr().out
    assert f"2 of {len(prompts) + 2} prompts are too long for PM and are left out" in said
    assert f"{len(prompts)} prompts (1 repeated ones left out)" in said
    assert [row["prompt"] for row in read_jsonl("out.jsonl")] == prompts

@pytest.mark.parametrize("words, said", [
    ("", "the following arguments are required: --out (see --help)"),
    ("--samples samples.jsonl --out /dev/null/x.jsonl", "[Errno 17] File exists: '/dev/null'")])
def test_on_the_real_command_line_a_refusal_is_one_line_and_exit_code_2(
        script, written, tmp_path, words, said):
    written("samples.jsonl", [SAMPLE])
    done = script("filter.py", *words.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"filter.py: {said}\n")

@pytest.mark.parametrize("file, text, expected", [
    ("config.json", "{", "config.json' is not a valid JSON"), ("config.json", None, "not a model folder ("),
    ("tokenizer_config.json", "[]", "no tokenizer could be loaded ("),
    ("generation_config.json", "{", "generation_config.json:1: not readable JSON"),
    ("generation_config.json", "[]", "generation_config.json: it must hold a JSON object, but this is list"),
    ("generation_config.json", '{"eos_token_id": [2, "x"]}', "eos_token_id [2, 'x'] is neither a token id"),
    ("model.safetensors", "1234", "model.safetensors: not a file of weights"),
    ("model.safetensors", None, "can't be loaded as a model"),
    ("model.safetensors", "other shapes", "its weights have other shapes than config.json says"),
    ("tokenizer.json", None, "tokenizers` library serialization file, (2) a slow tokenizer instance"),
    ("chat_template.jinja", None, "the tokenizer has no chat template (add chat_template.jinja"),
    ("chat_template.jinja", " ", "model: its chat template writes nothing"),
    ("chat_template.jinja", "{{ raise_exception('no\\n\\x1b[31m\\u202e!') }}", "(no [31m !)"),
    ("chat_template.jinja", "{{ messages[0].content.__class__.__mro__ }}", "is unsafe"),
])
def test_a_damaged_model_folder_is_refused_in_one_line(call, here, file, text, expected):
    folder = Path(shutil.copytree("PM", "model"))
    if text == "other shapes":
        save_file({k: w[:8].clone() for k, w in load_file(folder / file).items()}, folder / file)
    else:
        (folder / file).unlink() if text is None else (folder / file).write_text(text)
    words = "--model model --prompts prompts.jsonl --out out.jsonl".split()
    assert expected in refused(call, sampler, words)

# ---------------------------------------------------------------- what is accepted, or left out and said
def test_a_byte_order_mark_is_accepted(here):
    Path("bom.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    Path("bom.json").write_bytes(b'\xef\xbb\xbf[{"prompt": "a"}, {"prompt": "b"}]')
    assert read_prompts("bom.jsonl") == read_prompts("bom.json") == (["a", "b"], 0)

def test_pairs_with_equal_or_empty_answers_are_counted_and_their_number_is_said(here, capsys):
    write_jsonl("in.jsonl", [PAIR, PAIR | {"chosen": PAIR["rejected"]}, PAIR | {"rejected": " "},
                             PAIR | {"chosen": "", "rejected": ""}])
    assert len(read_pairs("in.jsonl")) == 4
    assert capsys.readouterr().out.splitlines() == [
        "WARNING: in.jsonl: 3 of 4 pairs have equal or empty answers"]
    read_pairs("pairs.jsonl")
    assert capsys.readouterr().out == ""

@pytest.mark.parametrize("how", ["dpo", "rm", "accuracy"])
def test_pairs_that_are_too_long_are_left_out_and_if_they_are_many_a_warning_says_so(call, here, capsys, how):
    module, words = COMMANDS[how]
    long = PAIR | {"chosen": "sad " * 3000}
    for rows, said in (([PAIR] * 2 + [long] * 3, "2 pairs; WARNING: 3 OF 5 ARE TOO LONG AND LEFT OUT"),
                       ([PAIR] * 9 + [long], "9 pairs (1 too long)")):
        write_jsonl("in.jsonl", rows)
        call(module, *words.replace("pairs.jsonl", "in.jsonl").split())
        assert said in capsys.readouterr().out
        run.remove("out")

def test_no_environment_variable_is_written_to_a_run_folder(call, here, monkeypatch):
    secrets = {name: f"secret-{i}" for i, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "SOMETHING"))}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    call(mt, *COMMANDS["mt"][1].split(), *"--update_rm false --tau 0 --samples 2 --max_length 64".split())
    texts = [path.read_bytes() for path in Path("out").rglob("*") if path.is_file()]
    assert len(texts) > 10
    assert not [value for value in secrets.values() for text in texts if value.encode() in text]
    assert not [name for name in secrets for text in texts if name.encode() in text]

# ---------------------------------------------------------------- random rows
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner:
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=5)
GOOD = st.fixed_dictionaries(dict(
    prompt=st.sampled_from(["a", "b", "b ", [USER], [SYSTEM, USER]]), rejected=st.text(max_size=4),
    chosen=st.sampled_from(["a", " ", "", [BOT]]), response=st.sampled_from(["a", "b", "a\n", ""]),
    tokens=st.integers(0, 9), finished=st.booleans(), weight=st.floats(0, 9),
    score=st.integers(-3, 3) | st.floats(-1e100, 1e100)))
NAMES = st.sampled_from("prompt chosen rejected response tokens finished score weight system".split())
ODD = JSON | st.sampled_from([float("nan"), float("inf"), 10**400, -1, True, [USER]])
BAD = JSON | st.tuples(GOOD, NAMES, ODD).map(lambda parts: parts[0] | {parts[1]: parts[2]})
ROWS = st.tuples(st.lists(GOOD, max_size=4), st.lists(BAD, max_size=1)).map(lambda lists: lists[0] + lists[1])

def answer(read, *inputs):
    """The result of read(*inputs), or None if it refuses in one line."""
    try:
        return read(*inputs)
    except Problem as problem:
        assert "\n" not in str(problem)

@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("rows") / "rows.jsonl"

@settings(max_examples=400, deadline=None, derandomize=True)
@given(rows=ROWS)
def test_any_rows_are_read_without_losing_one_or_refused_in_one_line(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # NaN and lone surrogates among them
    prompts, pairs = answer(read_prompts, path), answer(read_pairs, path)
    assert not prompts or len(prompts[0]) + prompts[1] == len(rows)
    assert not pairs or len(pairs) == len(rows) and all(pair.get("weight", 1) >= 0 and
        type(pair[side]) is str for pair in pairs for side in ("chosen", "rejected"))
    samples = answer(data.read_samples, path, "response", "tokens", "finished", "score")
    if samples:
        chosen, without = filter_script.preference_pairs(samples)
        assert len(chosen) + without == len({prompt_id(row["prompt"]) for row in rows})
        for pair in chosen:
            scores = [row["score"] for row in rows if prompt_id(row["prompt"]) == prompt_id(pair["prompt"])]
            assert min(scores) == pair["rejected_score"] < pair["chosen_score"] in scores
