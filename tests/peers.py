"""Prints what TRL's own trainers compute on three pairs: the numbers PEERS in test_variants.py.

    pip install trl==1.16.0 && python tests/peers.py

The tests do not need TRL, only these numbers.
"""
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402

from common import toy  # noqa: E402

WORDS, DRAW = toy.tokenizer(), random.Random(3)
CONFIG = LlamaConfig(vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, max_position_embeddings=128, initializer_range=0.15)
PROMPTS = DRAW.sample(toy.all_prompts(), 3)
PAIRS = Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} | {
    side: [{"role": "assistant", "content": toy.demonstration(prompt, DRAW)}]
    for side in ("chosen", "rejected")} for prompt in PROMPTS])

def model(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(CONFIG)

def dpo(loss_type):
    """Yield per pair: [log π of chosen and rejected, the same by the reference, their tokens], the loss."""
    settings = DPOConfig(tempfile.mkdtemp(), loss_type=[loss_type], beta=0.1, use_cpu=True, report_to=[],
                         precompute_ref_log_probs=True, per_device_train_batch_size=1)
    trainer = DPOTrainer(model(0), model(1), settings, train_dataset=PAIRS, processing_class=WORDS)
    trainer.get_train_dataloader()  # computes the reference's log-probabilities
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        loss = trainer.compute_loss(trainer.model, batch).item()
        logps = [trainer._metrics["train"][f"logps/{side}"][-1] for side in ("chosen", "rejected")]
        yield [*logps, row["ref_chosen_logps"], row["ref_rejected_logps"],
               *batch["completion_mask"].sum(1).tolist()], loss

def simpo():
    """Yield the loss of each pair. CPO without its supervised part (alpha) is SimPO."""
    settings = CPOConfig(tempfile.mkdtemp(), loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0,
                         use_cpu=True, report_to=[], per_device_train_batch_size=1)
    trainer = CPOTrainer(model(0), settings, train_dataset=PAIRS, processing_class=WORDS)
    for row in trainer.train_dataset:
        yield trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator([row]))[0].item()

if __name__ == "__main__":
    ipo, sppo = list(dpo("ipo")), [loss for _, loss in dpo("sppo_hard")]
    for (numbers, loss), *others in zip(ipo, sppo, simpo()):
        print([round(number, 4) for number in numbers], "ipo, sppo_hard, simpo:", loss, *others)
