"""Model folders: find them, check them, load them, save them. Safetensors only, and no remote code."""
import gc
import math
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.core_model_loading import revert_weight_conversion

from common import packing  # noqa: F401  (it registers the attention that models get)
from common.data import encode_chat, first_line, load_tokenizer
from common.parallel import Problem, barrier, device, memory, rank, say, share_work, world

def local_folder(name):
    """The folder of a model: `name` if it is a folder, else the downloaded snapshot of the hub id `name`."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise Problem(f"{name}: no such folder")
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
    try:
        if rank() == 0:
            snapshot_download(name, allow_patterns=patterns)
        barrier()
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as error:
        raise Problem(f"{name}: no such folder, and the hub does not give it ({first_line(error)})") from None

# ---------------------------------------------------------------- checks
def config_of(folder):
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise Problem(f"{folder}: not a model folder ({first_line(error)})") from None

def check_policy(folder):
    """Return the folder's config. Raise a Problem if it is that of a reward model."""
    config = config_of(folder)
    if (config.architectures or ["?"])[0].endswith("ForSequenceClassification"):
        raise Problem(f"{folder}: {config.architectures[0]} is a reward model, but a policy is needed")
    return config

def check_reward(folder, fresh_head=False):
    """Return the folder's config. Raise a Problem if it has several labels or, but for `fresh_head`, none."""
    config = config_of(folder)
    kind = (config.architectures or ["?"])[0]
    if not kind.endswith("ForSequenceClassification"):
        if not fresh_head:
            raise Problem(f"{folder}: {kind} has no reward head; "
                          f"train one: python reward.py --model {folder} --pairs …")
        say(f"{folder} is a {kind}, so training starts with a new reward head")
    elif config.num_labels != 1:
        raise Problem(f"{folder}: its head has {config.num_labels} labels, but a reward model has one")
    return config

def context_of(folder, config=None):
    """The longest sequence that the model takes, in tokens: its number of positions, or fewer with longrope,
    which reads chats beyond the original context differently, and with attention that is cut into chunks."""
    config = (config or config_of(folder)).get_text_config()
    if not hasattr(config, "max_position_embeddings"):
        raise Problem(f"{folder}: {config.model_type} models are not supported (no max_position_embeddings)")
    rope = getattr(config, "rope_parameters", None) or {}
    # `rope` has the parameters of all layers, or a dict of them for each kind of layer.
    ends = [kind["original_max_position_embeddings"] for kind in (rope, *rope.values())
            if isinstance(kind, dict) and kind.get("rope_type") == "longrope"]
    chunk = getattr(config, "attention_chunk_size", None) or math.inf
    return min(config.max_position_embeddings, chunk, *ends)

def prompts_that_fit(folder, prompts, answer=1):
    """Return (prompts, their lengths in tokens) of those prompts that leave room for `answer` more tokens in
    the model's context. Raise a Problem if there are none."""
    tokenizer, context = load_tokenizer(folder), context_of(folder)
    lengths = share_work(len(prompts), lambda i: len(encode_chat(tokenizer, prompts[i]).ids), "tokens")
    fit = [(prompt, length) for prompt, length in zip(prompts, lengths) if length + answer <= context]
    if not fit:
        raise Problem(f"{folder}: no prompt fits into its context of {context} tokens with an answer of "
                      f"{answer}; the shortest has {min(lengths)}")
    if len(fit) < len(prompts):
        say(f"{len(prompts) - len(fit)} of {len(prompts)} prompts are too long for {folder} and are left out")
    return map(list, zip(*fit))

def bytes_of(folder):
    """The size of the weights in a model folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))

def disk_needed(o, policy, rm, steps):
    """Bytes on disk for a run's models. policy, rm: bytes of one; steps: optimiser steps of an E-step."""
    checkpoints = steps // o.save_every + 1 if o.select else 1
    return o.rounds * (2 * policy + o.update_rm * rm) + checkpoints * policy

def check_fits(folder, training=False):
    """Raise a Problem if the model is too large for memory. For sampling and scoring each process has a whole
    copy. For training the processes share 16 bytes per parameter (training.kept_whole)."""
    parameters = bytes_of(folder) // (config_of(folder).dtype or torch.float32).itemsize
    need = parameters * (16 / world() if training else 2 if device().type == "cuda" else 4)
    if need > memory():
        what = "training it" if training else "sampling or scoring with it"
        raise Problem(f"{folder}: {what} takes {need / 1e9:.3g} GB in each process, but a process has only "
                      f"{memory() / 1e9:.3g} GB; smaller batches can't help")

# ---------------------------------------------------------------- loading
def load_policy(folder, training=False):
    """Load a causal LM. Only rank 0 has its weights, until `replicate` or `training.shard` sends them."""
    return _load(AutoModelForCausalLM, folder, check_policy(folder), training)

def load_reward(folder, training=False, fresh_head=False, seed=0):
    """Load a sequence classifier with one logit. With `fresh_head` a causal LM is taken, too, and gets a new
    head. Only rank 0 has weights, as in `load_policy`."""
    config = check_reward(folder, fresh_head)
    config.num_labels = 1
    torch.manual_seed(seed)  # the fresh head's
    model = _load(AutoModelForSequenceClassification, folder, config, training)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear) or model.score.bias is not None:
        raise Problem(f"{folder}: {type(model).__name__} has no linear head `score`, which is not supported")
    return model

def _load(kind, folder, config, training):
    check_fits(folder, training)
    # A sharded model refers to itself, so only the garbage collector frees it. That takes 0.2 s. On CPUs it
    # can wait until the next training, since only one such model is then left.
    if torch.cuda.is_available() or training and dist.is_initialized():
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    stored = config.dtype or torch.float32
    dtype = torch.float32 if training or device().type == "cpu" else torch.bfloat16
    try:
        if rank() == 0:
            model, info = kind.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa",
                                               use_safetensors=True, output_loading_info=True)
            headless = not (config.architectures or [""])[0].endswith("ForSequenceClassification")
            missing = sorted(n for n in info["missing_keys"] if not (headless and n.startswith("score.")))
            if missing:
                raise ValueError(f"weights are missing: {', '.join(missing[:3])}")
        else:
            with torch.device("meta"):
                model = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:
        raise Problem(f"{folder}: can't be loaded as a model ({first_line(error)})") from None
    model.set_attn_implementation("packed")  # after loading, so that models without SDPA fail there
    model.stored_dtype, model.context = stored, context_of(folder, config)
    return model.eval()  # also in training: with dropout the policy would differ from its own reference

# ---------------------------------------------------------------- saving
def save(root, source, folder):
    """Save root.model to `folder` for from_pretrained and vLLM. Tokenizer and template come from the folder
    `source`. config.json is written last, so a folder that has one is complete."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(root, options=options) if dist.is_initialized() else root.state_dict()
    if rank() == 0:
        try:
            _write(root.model, weights, source, Path(folder))
        except Exception as error:  # for a full disk tokenizers raises a bare Exception
            raise Problem(f"{folder}: could not be saved: {first_line(error)}") from None
    barrier()

def average(folders, shares, out):
    """Write the folder `out`, a model with the weights Σ shares[i] · weights of folders[i], added up in fp32
    and rounded to the last folder's precision. All else is the last folder's. For one process."""
    mean = {}
    for folder, share in zip(folders, shares):
        weights = {k: w for file in Path(folder).glob("*.safetensors") for k, w in load_file(file).items()}
        if mean and mean.keys() != weights.keys():
            raise Problem(f"{folder}: its weights have other names than those of {folders[0]}")
        mean = {name: mean.get(name, 0) + share * w.float() for name, w in weights.items()}
    shutil.copytree(folders[-1], out, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    save_torch_state_dict({name: w.to(weights[name].dtype) for name, w in mean.items()}, out)

def _write(model, weights, source, folder):
    weights = {name.removeprefix("model."): w for name, w in weights.items()}
    damaged = [name for name, w in weights.items() if not w.isfinite().all()]
    if damaged:
        raise Problem(f"NaN or infinite numbers in {damaged[0]}; try a smaller learning rate")
    if model.config.tie_word_embeddings:
        weights = {name: w for name, w in weights.items() if name not in (model._tied_weights_keys or {})}
    weights = {name: w.to(model.stored_dtype, copy=True)
               for name, w in revert_weight_conversion(model, weights).items()}  # to the names on the hub
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, max_shard_size="5GB")
    load_tokenizer(source).save_pretrained(folder)
    generation = Path(source) / "generation_config.json"
    if generation.exists() and model.can_generate():
        shutil.copy(generation, folder)
    model.config.architectures = [type(model).__name__]
    config = model.config.to_dict() | {"dtype": str(model.stored_dtype).removeprefix("torch.")}
    type(model.config).from_dict(config).save_pretrained(folder)
