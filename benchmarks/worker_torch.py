"""Worker of the Hugging Face side, in its own environment: `worker_torch.py TASK.json RESULT.json`.

Rollouts are transformers' `generate`. Updates are the loss of TRL's GRPOTrainer with its backward pass and AdamW.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload
from common import timed, versions
from transformers import AutoModelForCausalLM, set_seed


def load(task: dict[str, Any]) -> Any:
    """Loads the model in float32."""
    return AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32, trust_remote_code=False)


def generate(task: dict[str, Any]) -> dict[str, Any]:
    """Times rollouts. `generate` decodes every batch until the last of its responses has ended."""
    shape = workload.shape(task["shape"])
    stops = workload.stop_ids(shape, task["median"])
    prompts = workload.prompts(shape, task["requests"] // task["group"], task["prompt"], len(stops), task["seed"])
    prompts = torch.tensor(np.repeat(prompts, task["group"], axis=0), dtype=torch.long)
    model = load(task).eval()

    def call(number):
        set_seed(1000 * task["seed"] + number)
        lengths = []
        for ids in prompts.split(task["batch"]):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
                top_p=task["top_p"], max_new_tokens=task["longest"], eos_token_id=stops or None,
                pad_token_id=shape.vocab - 1,
            )[:, ids.shape[1] :]  # fmt: skip
            ended = out < len(stops)
            first = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, out.shape[1])
            lengths += first.tolist()
        return lengths

    lengths, measured = timed(call, task["calls"])
    return measured | {"tokens": list(map(sum, lengths)), "median_length": float(np.median(lengths))}


def update(task: dict[str, Any]) -> dict[str, Any]:
    """Times updates. Responses are padded to the longest of the batch, and go in micro-batches of rows."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    shape = workload.shape(task["shape"])
    data = workload.responses(shape, task)
    rows = data.lengths.size
    micro = task["micro_batch"] or rows
    # The trainer needs a tokenizer, but this benchmark tokenizes nothing.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "<pad>": 1}, unk_token="a")), pad_token="<pad>", eos_token="<pad>"
    )
    config = GRPOConfig(
        output_dir="trl", use_cpu=True, bf16=False, beta=0.0, loss_type="grpo", epsilon=0.2, epsilon_high=0.28,
        learning_rate=1e-6, weight_decay=0.01, adam_beta2=0.95, max_grad_norm=1.0, report_to=[],
        per_device_train_batch_size=micro, gradient_accumulation_steps=rows // micro, num_generations=task["group"],
        max_completion_length=task["longest"], gradient_checkpointing=task["remat"],
    )  # fmt: skip
    trainer = GRPOTrainer(
        load(task), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * rows}), processing_class=tokenizer,
    )  # fmt: skip
    model, optimizer = trainer.model.train(), trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = rows // micro

    width = int(data.lengths.max())
    inside = torch.tensor(np.arange(width) < data.lengths.reshape(-1, 1))
    completions = torch.tensor(data.tokens.reshape(rows, -1)[:, :width], dtype=torch.long)
    prompts = torch.tensor(np.repeat(data.prompts, task["group"], axis=0), dtype=torch.long)
    spread = data.rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4
    advantages = torch.tensor(((data.rewards - data.rewards.mean(axis=1, keepdims=True)) / spread).reshape(-1))
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": torch.where(inside, completions, shape.vocab - 1),
        "completion_mask": inside.long(),
        "advantages": advantages.float(),
    }

    def call(_):
        for start in range(0, rows, micro):
            part = {name: value[start : start + micro] for name, value in inputs.items()}
            trainer.compute_loss(model, part).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(call, task["calls"])[1]


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    work = {function.__name__: function for function in (generate, update)}[task["work"]]
    names = ("torch", "trl", "transformers", "accelerate", "numpy")
    Path(sys.argv[2]).write_text(json.dumps(work(task) | {"versions": versions(*names)}))
