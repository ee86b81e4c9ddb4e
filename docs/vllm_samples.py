"""Sample by vLLM for an E-step of mt.py: MODEL PROMPTS OUT, say
python docs/vllm_samples.py POLICY runs/llama3/prompts/s0.jsonl runs/llama3/round1/e1/samples.unscored.jsonl
"""
import json
import sys

from vllm import LLM, SamplingParams

model, prompts, out = sys.argv[1:]
prompts = [json.loads(line)["prompt"] for line in open(prompts, encoding="utf-8")]
chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
how = dict(temperature=0.8, top_p=0.95)  # as mt.py's --temperature and --top_p: it holds them to its own
answers = LLM(model).chat(chats, SamplingParams(n=5, max_tokens=1024, seed=0, **how))
with open(out, "w", encoding="utf-8") as file:
    for prompt, answer in zip(prompts, answers):
        for index, one in enumerate(answer.outputs):
            row = dict(prompt=prompt, index=index, response=one.text, tokens=len(one.token_ids),
                       finished=one.finish_reason == "stop", policy=model, **how)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
