"""The embedded task: short poems in a tiny English. mt.py runs it when no --policy is given. It needs no
download.

A prompt asks for some lines in a mood about a topic, and may name a reader to greet and a guest to let in:

    a sad poem about the sea in three lines for my sister with dogs

and a perfect answer greets the reader, writes that many `ADJECTIVE NOUN VERB .` lines, and closes:

    dear sister . grey waves weep . lonely dogs sigh . broken sails fade . the end .

The base policy learns from poems of unlike writers: experts do nearly everything better than the others. So a
policy that moves towards good form may learn good content with it. The base reward model learns from noisy
labels of people who look at a poem's form, and not at its content, which is topic and guest. `gold`, the
judge, looks at form and content, and no training sees more of it than these labels. Real writers and labels
are like that. With SKILL 0, LABELLERS "all" and a policy_lr of 4e-5, M-steps harm (docs/results.md).
"""
import functools
import hashlib
import itertools
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import reward
from common import models, run, training
from common.data import encode_chat, encode_response, read_jsonl, read_pairs, write_jsonl
from common.packing import collate, row_of
from common.parallel import Problem, barrier, device, rank, say
from common.run import option
from dpo import ResponseLogps
from sampler import sample

SETTINGS = dict(  # the defaults of mt.py's options for this task, whose models have 0.1 M parameters
    max_new_tokens=64, max_length=128, beta=0.1, policy_lr=2e-5, policy_batch=16, rm_lr=5e-4, rm_batch=16,
    save_every=13, select_prompts=300, tau=0.5, sample_batch=256, score_batch=64, micro_batch=16)
SOURCES = "toy data models packing dpo reward sampler training".split()  # modules that change base models
LOOP_PROMPTS, TEST_PROMPTS, LABELS, DEMONSTRATIONS = 2700, 300, 3000, 7000
SHAPE = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
             initializer_range=0.08, max_position_embeddings=128)
SFT = dict(lr=3e-3, batch=32, epochs=3)
RM = dict(lr=1e-3, batch=16, micro_batch=16, epochs=4)
LABEL_NOISE = 0.6  # by how much what is looked at must differ for one nat of preference

# ---------------------------------------------------------------- the world
# mood -> (adjectives, verbs). Each word belongs to one mood only, so that its mood can be looked up.
MOODS = {
    "happy": ("merry bright golden sunny jolly cheerful", "dance laugh sing smile cheer play"),
    "sad": ("grey lonely tearful broken mournful weary", "weep sigh mourn fade sob droop"),
    "scary": ("dark grim ghostly bloody evil cursed", "scream howl haunt stalk bite shriek"),
    "calm": ("quiet soft gentle still mild sleepy", "rest drift doze float breathe linger"),
}
TOPICS = {
    "sea": "waves ships gulls shells sails whales reefs sailors",
    "farm": "barns cows fields hens ploughs pigs fences farmers",
    "castle": "towers kings gates knights banners queens moats thrones",
    "forest": "trees foxes owls leaves ferns wolves streams bears",
    "city": "streets trams shops crowds bridges clocks lamps drivers",
}
NUMBERS = {"two": 2, "three": 3, "four": 4}
READERS = "sister brother mother father teacher neighbour doctor captain".split()
GUESTS = "dogs cats horses mice robots wizards pirates dragons".split()
TEMPLATES = (
    "a {mood} poem about the {topic} in {number} lines{reader}{guest}",
    "{number} {mood} lines about the {topic}{guest}{reader}",
    "tell me a {mood} {topic} story{guest} in {number} lines{reader}",
)
RAMBLES = ("well you know .", "and so on .", "as they say .")

ADJECTIVES = {mood: adjectives.split() for mood, (adjectives, _) in MOODS.items()}
VERBS = {mood: verbs.split() for mood, (_, verbs) in MOODS.items()}
NOUNS = {topic: nouns.split() for topic, nouns in TOPICS.items()}
ADJECTIVE_MOOD = {word: mood for mood, group in ADJECTIVES.items() for word in group}
VERB_MOOD = {word: mood for mood, group in VERBS.items() for word in group}
NOUN_TOPIC = {word: topic for topic, group in NOUNS.items() for word in group}

GOLD_MAX = 5.5  # 2 mood + 2 topic + 0.5 ending + 0.5 greeting + 0.5 guest
SKILL = 1.0         # how far experts and other writers lie apart; 0: all make the same mistakes
LABELLERS = "form"  # what the labellers look at: "form", or "all" that gold looks at
EXPERTS = 0.4       # share of poems that an expert has written
MISTAKES = {"topic": (0.6, 1.27), "other": (0.2, 1.6)}  # at SKILL 1, those of experts and of the others

def all_prompts() -> list[str]:
    """All 14,580 prompts of the task, in a fixed order."""
    readers = [""] + [f" for my {reader}" for reader in READERS]
    guests = [""] + [f" with {guest}" for guest in GUESTS]
    grid = itertools.product(TEMPLATES, MOODS, TOPICS, NUMBERS, readers, guests)
    return [template.format(mood=mood, topic=topic, number=number, reader=reader, guest=guest)
            for template, mood, topic, number, reader, guest in grid]

def words() -> list[str]:
    """The vocabulary, sorted: every word that can occur in a prompt or a demonstration."""
    templates = [t.format(mood="", topic="", number="", reader=" for my", guest=" with") for t in TEMPLATES]
    groups = [MOODS, TOPICS, NUMBERS, READERS, GUESTS, ADJECTIVE_MOOD, VERB_MOOD, NOUN_TOPIC]
    texts = [*templates, *RAMBLES, "dear . the end ."]
    return sorted(set(itertools.chain(*groups)) | set(" ".join(texts).split()))

def wishes(prompt: str) -> dict:
    """What a prompt asks for: mood, topic, lines (an int), reader and guest (None if it names none)."""
    def first(group):
        return next((word for word in prompt.split() if word in group), None)
    return {"mood": first(MOODS), "topic": first(TOPICS), "lines": NUMBERS[first(NUMBERS)],
            "reader": first(READERS), "guest": first(GUESTS)}

def is_line(sentence: list[str]) -> bool:
    """Whether a sentence has the form ADJECTIVE NOUN VERB."""
    if len(sentence) != 3:
        return False
    adjective, noun, verb = sentence
    return adjective in ADJECTIVE_MOOD and (noun in NOUN_TOPIC or noun in GUESTS) and verb in VERB_MOOD

def gold(prompt: str, response: str, finished: bool = True) -> float:
    """The judge: how well the response does what the prompt asks. At most GOLD_MAX, negative for a mess."""
    return sum(gold_parts(prompt, response, finished))

def gold_parts(prompt, response, finished=True) -> tuple[float, float]:
    """Gold's two parts, (form, content). Only the lines that the prompt asks for are looked at, and a missing
    one has neither mood nor topic.

    Form: 2 × the share of adjectives and verbs that are in the mood. 0.5 less for each line too many or too
    few, each repeated noun, each other sentence (at most 4 of each). 0.5 more for the ending `the end .` and
    for greeting the reader (nobody, if the prompt names none). 0.5 less if it is cut off (not `finished`).
    Content: 2 × the share of nouns that are on the topic or the guest. 0.5 more if no guest is missing."""
    wish = wishes(prompt)
    sentences = [sentence.split() for sentence in response.split(" .")]
    broken_off = bool(sentences.pop()) or not finished  # nothing should follow the last full stop
    ends = bool(sentences) and sentences[-1] == ["the", "end"]
    greets = [sentence[1:] for sentence in sentences[:1] if sentence[:1] == ["dear"]]
    body = sentences[len(greets):len(sentences) - ends]
    lines = [sentence for sentence in body if is_line(sentence)]
    nouns = [noun for _, noun, _ in lines]

    counted = lines[:wish["lines"]]
    moods = sum((ADJECTIVE_MOOD[a] == wish["mood"]) + (VERB_MOOD[v] == wish["mood"]) for a, _, v in counted)
    topics = sum(n == wish["guest"] or NOUN_TOPIC.get(n) == wish["topic"] for _, n, _ in counted)
    faults = (abs(len(lines) - wish["lines"]), len(nouns) - len(set(nouns)), len(body) - len(lines))
    form = moods / wish["lines"] - 0.5 * sum(min(fault, 4) for fault in faults) - 0.5 * broken_off
    form += 0.5 * (ends and not broken_off)
    form += 0.5 * (greets == ([[wish["reader"]]] if wish["reader"] else []))
    content = 2 * topics / wish["lines"] + 0.5 * (wish["guest"] is None or wish["guest"] in nouns)
    return form, content

def demonstration(prompt: str, rng: random.Random) -> str:
    """A poem by a writer who drifts off, slips, repeats, rambles, miscounts and forgets; an expert less."""
    expert, wish = rng.random() < EXPERTS, wishes(prompt)

    def errs(chance, about="other"):
        return rng.random() < chance * (1 - SKILL + SKILL * MISTAKES[about][not expert])

    count = wish["lines"] + (rng.choice([-1, 1]) if errs(0.5) else 0)
    mood_drift = rng.randrange(count) if errs(0.6) else count  # from this line on: another mood
    topic_drift = rng.randrange(count) if errs(0.6, "topic") else count
    other_mood, other_topic = rng.choice(list(MOODS)), rng.choice(list(TOPICS))
    guest_line = rng.randrange(count) if wish["guest"] and not errs(0.5) else count

    sentences, nouns = [], []
    if wish["reader"] and not errs(0.4):
        sentences.append(f"dear {rng.choice(READERS) if errs(0.3) else wish['reader']} .")
    for i in range(count):
        mood = wish["mood"] if i < mood_drift else other_mood
        topic = wish["topic"] if i < topic_drift else other_topic
        if errs(0.25):  # a slip: any mood, any topic, for this line only
            mood, topic = rng.choice(list(MOODS)), rng.choice(list(TOPICS))
        noun = wish["guest"] if i == guest_line else rng.choice(NOUNS[topic])
        if nouns and errs(0.2):
            noun = rng.choice(nouns)
        nouns.append(noun)
        sentences.append(f"{rng.choice(ADJECTIVES[mood])} {noun} {rng.choice(VERBS[mood])} .")
        if errs(0.15):
            sentences.append(rng.choice(RAMBLES))
    if not errs(0.45):
        sentences.append("the end .")
    return " ".join(sentences)

# ---------------------------------------------------------------- the base models
def tokenizer(more=()):
    """A tokenizer of whole words. A chat is: <bos> <user> prompt <assistant> response <eos>. more: words."""
    special = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words(), *more])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = Sequence([WhitespaceSplit(), Split("<", "isolated")])  # a text "<eos>" is no <eos>
    template = ("{{ bos_token }}{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }}"
                "{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %} <assistant>{% endif %}")
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        chat_template=template, additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False)

def parts(seed):
    """All prompts, shuffled and cut: for the loop, for the test, and for the training of the base models."""
    prompts = all_prompts()
    random.Random(seed).shuffle(prompts)
    rest = prompts[LOOP_PROMPTS + TEST_PROMPTS:]
    return {"loop": prompts[:LOOP_PROMPTS], "test": prompts[LOOP_PROMPTS:LOOP_PROMPTS + TEST_PROMPTS],
            "labels": rest[:LABELS], "demonstrations": rest[-DEMONSTRATIONS:]}

def build(seed, script=__file__):
    """Make the base models and prompts of a seed, unless they exist; return mt.py's options policy, rm and
    prompts. `script` runs in a process of its own, with one thread however many the run has."""
    torch.set_num_threads(1)  # also for the run: its models are too small for more, and rounding would change
    name, modules = Path(script).stem, run.sources().items()
    made_by = {path: digest for path, digest in modules if Path(path).stem in (*SOURCES, name)}
    made_by |= {"world": (SKILL, LABELLERS), "versions": (torch.__version__, transformers.__version__)}
    version = hashlib.sha256(str(made_by).encode())
    folder = Path("runs") / f"{name}-base" / f"seed{seed}-{version.hexdigest()[:8]}"
    if not run.exists(folder / "rm" / "config.json"):
        say(f"making the base models of the embedded task in {folder} (once, about a minute)")
        if rank() == 0:
            run.delete(folder)
            alone = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0",
                     "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, script, "--seed", str(seed), "--out", str(folder)]
            if subprocess.run(command, env=os.environ | alone).returncode:
                raise Problem("the base models could not be made; see the error above")
        barrier()
    return dict(policy=str(folder / "policy"), rm=str(folder / "rm"), prompts=str(folder / "prompts.jsonl"))

def write_demonstrator(prompts, seed, folder, log, more=(), more_words=()):
    """Train the base policy, a small Llama, on the writers' poems. The loss is the mean over tokens.
    more: further (prompt, answer), in the words of the task and `more_words`."""
    torch.manual_seed(seed)
    words, rng = tokenizer(more_words), random.Random(seed)
    config = LlamaConfig(**SHAPE, vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    words.save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed").eval()
    model = training.shard(ResponseLogps(model))
    chats = [*((prompt, demonstration(prompt, rng)) for prompt in prompts), *more]
    rows = [row_of(encode_chat(words, prompt), [encode_response(words, text)]) for prompt, text in chats]
    tokens = [len(row.branches[0]) for row in rows]
    steps = training.steps_of([len(r) for r in rows], SFT["batch"], SFT["batch"], seed, SFT["epochs"], tokens)

    def loss(numbers):
        return -model(collate([rows[i] for i in numbers], device())), {}

    list(training.optimise(model, steps, loss, lr=SFT["lr"], log=log))  # all steps
    models.save(model, folder, folder)

def write_preferences(policy, prompts, seed, path):
    """Label pairs of the base policy's answers, with noise: P(a ≻ b) = σ(appeal(a) − appeal(b))."""
    rng, samples = random.Random(seed), path.with_name("answers.jsonl")
    sample(str(policy), prompts, samples, samples=2, temperature=0.8, top_p=0.95,
           max_new_tokens=SETTINGS["max_new_tokens"], seed=f"{seed}/labels", rows=256)
    rows, pairs = read_jsonl(samples), []
    for a, b in zip(rows[::2], rows[1::2]):
        if a["response"] != b["response"]:
            chance = 1 / (1 + math.exp(appeal(b) - appeal(a)))
            chosen, rejected = (a, b) if rng.random() < chance else (b, a)
            pairs.append(dict(prompt=a["prompt"], chosen=chosen["response"], rejected=rejected["response"]))
    write_jsonl(path, pairs)

def gold_of(row):
    return sum(parts_of_gold(row))

def parts_of_gold(row):
    return gold_parts(row["prompt"], row["response"], row["finished"])

def appeal(row):
    """How much a labeller likes an answer, in nats."""
    form, content = parts_of_gold(row)
    return (form + content * (LABELLERS == "all")) / LABEL_NOISE

@dataclass
class Options:
    out: str = option(help="folder for the base policy, the base reward model and the prompts")
    seed: int = option(0)

def main():
    o = run.parse(Options)
    out, cut = Path(o.out), parts(o.seed)
    log = functools.partial(run.open_log, out / "metrics.jsonl")
    write_demonstrator(cut["demonstrations"], o.seed, out / "policy", log("base policy"))
    write_preferences(out / "policy", cut["labels"], o.seed, out / "preferences.jsonl")
    rm = reward.train(str(out / "policy"), read_pairs(out / "preferences.jsonl"), log=log("base rm"),
                      seed=o.seed, fresh_head=True, max_length=SETTINGS["max_length"], **RM)
    write_jsonl(out / "prompts.jsonl", [{"prompt": prompt} for prompt in cut["loop"]])
    models.save(rm, out / "policy", out / "rm")

if __name__ == "__main__":
    run.launch(main)
