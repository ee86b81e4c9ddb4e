"""Sampling followed by scoring: prompts -> scored responses. Loop, win rates and embedded task need it."""
from itertools import zip_longest

import numpy as np

import reward
from data import Lines, Problem, prompt_id, read_samples
from parallel import dealt, rank, say
from run import exists, parts_of, remove_all
from sampler import sample


def sample_and_score(o, policy, rm, prompts, samples, seed, path, judge=None):
    """`samples` responses of `policy` to every prompt, scored by `rm`, in the file `path`; returns its rows.

    o: options with temperature, top_p, max_new_tokens, sample_batch and score_batch. judge: what scores in
    the place of reward.score, with its arguments.
    """
    raw = path.with_name(f"{path.stem}.unscored.jsonl")
    if not exists(path):
        if not exists(raw):
            sample(policy, prompts, raw, samples=samples, temperature=o.temperature, top_p=o.top_p,
                   max_new_tokens=o.max_new_tokens, rows=o.sample_batch, seed=seed)
        elif rank() == 0:
            check_samples(o, prompts, samples, raw)
        (judge or reward.score)(rm, Lines(raw), path, o.score_batch)
    remove_all(raw, parts_of(raw), parts_of(path))
    return Lines(path)


def means(rows, *keys):
    """{key: mean over the rows}; each process reads its share of them."""
    columns = zip(*dealt(len(rows), lambda i: [rows[i][key] for key in keys], "means"))
    return {key: float(np.mean(column)) for key, column in zip(keys, columns)}


def check_samples(o, prompts, samples, path):
    """Responses that are there before sampling may come from elsewhere (docs/run-folder.md): they are held to
    the prompts, their number, and, where they say it, to the temperature and top_p."""
    rows = read_samples(path, "response", "tokens", "finished")
    wanted = [(prompt_id(prompt), index) for prompt in prompts for index in range(samples)]
    found = [(prompt_id(row["prompt"]), row.get("index")) for row in rows]
    if found != wanted:
        row = next(i for i, (one, other) in enumerate(zip_longest(found, wanted), 1) if one != other)
        raise Problem(f"{path}: {len(rows)} rows; {samples} responses (`index` from 0) to each of "
                      f"{len(prompts)} prompts are needed, in the prompts' order, which row {row} leaves; "
                      "delete it to sample here")
    for name in ("temperature", "top_p"):
        if other := {row.get(name, getattr(o, name)) for row in rows} - {getattr(o, name)}:
            raise Problem(f"{path}: sampled with {name} {other.pop()}, the run has {getattr(o, name)}")
    say(f"{path}: {len(rows)} responses that are there are taken")
