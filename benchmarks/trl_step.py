"""One whole GRPO step of TRL's GRPOTrainer on step_cost.py's model, image and lengths.

Called by step_cost.py with the interpreter of an environment that has TRL; prints the same line.
"""

import sys
import tempfile
import time

import torch
from datasets import Dataset
from step_cost import GROUP, build, picture, report
from transformers import BatchFeature, ProcessorMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class PilProcessor(ProcessorMixin):
    """Tokenizer and PIL image processor in the form TRL asks for, without torchvision."""

    def __init__(self, image_processor, tokenizer):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.chat_template = tokenizer.chat_template
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def __call__(self, images=None, text=None, padding=False, return_tensors=None, **_):
        fields = {}
        text = [text] if isinstance(text, str) else list(text)
        if images is not None:
            flat = [x for y in images for x in (y if isinstance(y, list) else [y])]
            fields = dict(self.image_processor(images=flat, return_tensors=return_tensors))
            sizes = [int(torch.as_tensor(grid).prod()) // 4 for grid in fields["image_grid_thw"]]
            for row, line in enumerate(text):
                text[row] = line.replace(self.image_token, self.image_token * sizes[row])
        tokens = self.tokenizer(
            text, padding=padding, padding_side="left", return_tensors=return_tensors
        )
        kinds = [[int(i == self.image_token_id) for i in row] for row in tokens["input_ids"]]
        tokens["mm_token_type_ids"] = torch.tensor(kinds) if return_tensors else kinds
        return BatchFeature({**tokens, **fields}, tensor_type=return_tensors)


class Clock(TrainerCallback):
    """Seconds of each step, rollout and update."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start)


def main(p: int, t: int, repeats: int) -> None:
    model, processor = build()
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    question = " ".join(f"w{i}" for i in range(10, 22))
    content = [{"type": "image"}, {"type": "text", "text": question}]
    row = {"prompt": [{"role": "user", "content": content}], "images": [picture(p)]}
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        config = GRPOConfig(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            loss_type="grpo",
            beta=0.0,
            num_generations=GROUP,
            per_device_train_batch_size=GROUP,
            max_completion_length=t,
            generation_kwargs={"min_new_tokens": t},
            max_steps=repeats + 1,
            learning_rate=1e-6,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [i / GROUP for i in range(len(completions))],
            args=config,
            train_dataset=Dataset.from_list([row] * (repeats + 1)),
            processing_class=PilProcessor(processor.image_processor, processor.tokenizer),
            callbacks=[clock],
        )
        trainer.train()
    lengths = [
        x["completions/mean_length"]
        for x in trainer.state.log_history
        if "completions/mean_length" in x
    ]
    assert all(length == t for length in lengths), lengths
    report(clock.seconds[1:])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
