"""What attention as a policy costs: time and peak memory of an update, a rollout and a whole step.

    python benchmarks/step_cost.py                               # the headline cell
    python benchmarks/step_cost.py --grid                        # P 256 to 4096, T 64 and 256 too
    python benchmarks/step_cost.py --grid --rounds 0 --variants grpo ral      # the grid alone
    python benchmarks/step_cost.py --trl-python ENV/bin/python   # TRL's GRPOTrainer too

One prompt of P positions, G responses of T tokens, hidden 256, 8 decoder layers, 8 heads, 2
key-value heads, MLP 768, vocabulary 4096; vision frozen (depth 2, width 64), beta 0, one inner
iteration, AdamW. An update is forward, backward and optimiser step with visual features given:

    eager       unpacked, eager attention, output_attentions=True, JSD on the last layer
    unpacked    unpacked, SDPA, GRPO alone
    grpo        grpo_baseline.py's own update
    ral         ral_grpo.py's own update; the attention term is computed and backpropagated in full
    in-turn     grpo, ral, and ral with the predicting row, 15 times in turn in one process: they
                differ by less than one process differs from the next

A rollout is from pixels (an image of P visual tokens): `generate` with G copies of the prompt
against ours. A whole step is image processing, vision, rollout and update. TRL 1.16.0 runs in an
environment of its own (`pip install -r requirements.txt trl==1.16.0`).

Every measurement is a process of its own, so that its peak memory is its own: one warm-up, then
timed repetitions, of which the process reports the median. Variants take turns, and the table has
the median and the range over the rounds. Written to benchmarks/results/step_cost.json.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import common
import grpo_baseline
import ral_grpo
from support import toy
from support.prompts import (
    BaseModelOutputWithDeepstackFeatures,
    Block,
    Example,
    Media,
    PromptBatch,
    collate,
    encode_prompt,
)

UPDATES = ("eager", "unpacked", "grpo", "ral")
IN_TURN = {  # the scripts' own updates
    "grpo": (grpo_baseline, {}),
    "ral": (ral_grpo, {}),
    "ral-predicting": (ral_grpo, {"attn_row": "predicting"}),
}
ROLLOUTS = ("generate", "ours")
STEPS = ("step-grpo", "step-ral")
VARIANTS = (*UPDATES, "in-turn", *ROLLOUTS, *STEPS, "trl")
GROUP = 8


@dataclass
class Args:
    grid: bool = False
    """All of P 256, 512, 1024, 2048, 4096 and T 64, 256; else P 1024 and T 64 (16 for rollouts)."""
    rounds: int = 7
    """Processes of each variant at the headline cell, 0 for none; elsewhere one."""
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """Which variants to run; numbers of the others stay in the file as they are."""
    trl_python: str | None = None
    """Interpreter of an environment with TRL; unset: no such row."""
    results: Path = ROOT / "benchmarks" / "results" / "step_cost.json"
    """Where the numbers go."""


# The worker: one variant, one cell, one process


def build():
    """The benchmark's model with random weights, and a processor with 4096 words; both are the
    toy's, in another size."""
    words = [*toy.WORDS, *(f"w{i}" for i in range(4096 - len(toy.WORDS) - len(toy.SPECIAL)))]
    with (
        TemporaryDirectory() as folder,
        mock.patch.dict(toy.SIZES, small=(256, 8, 8, 2, 768)),
        mock.patch.object(toy, "make_tokenizer", partial(toy.make_tokenizer, words)),
    ):
        toy.write_base(Path(folder), seed=0)
        model, processor = common.load_model(folder), common.load_processor(folder)
    # A token that is never sampled ends a response, so that every response has its full length.
    model.generation_config.eos_token_id = model.config.vision_end_token_id
    processor.image_processor.size = {"shortest_edge": toy.CELL**2, "longest_edge": 1 << 24}
    return model, processor


def picture(p: int) -> Image.Image:
    """An image of exactly p visual tokens, of 28 x 28 pixels each."""
    rows = 2 ** int(np.log2(p) / 2)
    noise = np.random.default_rng(0).integers(0, 255, (28 * rows, 28 * (p // rows), 3))
    return Image.fromarray(noise.astype(np.uint8))


def update_work(variant: str, p: int, t: int) -> Callable[[], None]:
    """One update on one prompt of p positions (16 of them text) and 8 responses of t tokens."""
    model, _ = build()
    config = model.config
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    ids = torch.randint(3, 4000, (1, p))
    ids[:, 8 : p - 8] = config.image_token_id
    positions = torch.arange(p).expand(3, 1, p)
    block = Block(torch.empty(0), shape=(1, 1, p - 16), start=8)
    patches = (ids == config.image_token_id).long() - 1
    features = [[(torch.randn(p - 16, 256),)]]
    prompts = PromptBatch(ids, positions, None, patches, [[block]], features)
    completions = torch.randint(3, 4000, (1, GROUP, t))
    full = torch.ones(1, GROUP, t, dtype=torch.bool)
    rollout = common.Rollout(prompts, completions, full, torch.zeros(1, GROUP, dtype=torch.bool))
    advantages = torch.linspace(-1, 1, GROUP)[None, :, None]
    if variant in IN_TURN:
        script, fields = IN_TURN[variant]
        args = script.Args(num_iterations=1, beta=0.0, **fields)
        return lambda: script.update(model, optimizer, [script.Batch(rollout, advantages)], args)
    model.set_attn_implementation("eager" if variant == "eager" else "sdpa")
    model.train()
    inputs = {
        "input_ids": torch.cat([ids.expand(GROUP, -1), completions[0]], dim=1),
        "position_ids": torch.arange(p + t).expand(3, GROUP, -1),
        "mm_encoder_outputs": {
            "image": BaseModelOutputWithDeepstackFeatures(pooler_output=features[0][0] * GROUP)
        },
        "logits_to_keep": torch.arange(p - 1, p + t - 1),
        "output_attentions": variant == "eager",
        "use_cache": False,
    }

    def work() -> None:
        outputs = model(**inputs)
        logps = outputs.logits.log_softmax(-1).gather(-1, completions[0, ..., None])[..., 0]
        ratio = torch.exp(logps - logps.detach())
        loss = -(ratio * advantages[0]).mean()
        if variant == "eager":
            rows = outputs.attentions[-1][None, :, :, p - 1 :].mean(dim=2)
            attention = ral_grpo.attention_policy(rows, "own")[0]
            jsd = ral_grpo.divergence(attention, attention.detach())
            loss = loss + (jsd * advantages[0]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return work


def prompt_of(processor, p: int):
    """The prompt whose image has p visual tokens."""
    question = " ".join(f"w{i}" for i in range(10, 22))
    example = Example(question, "w7", [Media([picture(p)])])
    return encode_prompt(processor, example)


def rollout_work(variant: str, p: int, t: int) -> Callable[[], None]:
    """8 sampled responses of t tokens, from pixels."""
    model, processor = build()
    prompt = prompt_of(processor, p)
    if variant == "ours":
        noise = common.sampling_noise(0, [0], GROUP, t)

        def work() -> None:
            with torch.no_grad():
                batch = collate(model, [prompt], 0)
            assert common.generate_group(model, batch, GROUP, t, noise).response_ids.shape[2] == t

        return work
    model.set_attn_implementation("sdpa")
    kinds, (block,) = (prompt.ids == model.config.image_token_id).int(), prompt.blocks

    def work() -> None:
        ids = model.generate(
            prompt.ids.expand(GROUP, -1),
            attention_mask=torch.ones(GROUP, len(prompt.ids), dtype=torch.long),
            mm_token_type_ids=kinds.expand(GROUP, -1),
            pixel_values=block.pixels.repeat(GROUP, 1),
            image_grid_thw=torch.tensor([[1, 2 * block.shape[1], 2 * block.shape[2]]] * GROUP),
            suppress_tokens=common.vision_token_ids(model.config),
            do_sample=True,
            top_k=0,
            max_new_tokens=t,
        )
        assert ids.shape[1] == len(prompt.ids) + t

    return work


def step_work(variant: str, p: int, t: int) -> Callable[[], None]:
    """A whole step of a script: image processing, vision, rollout, update."""
    script = grpo_baseline if variant == "step-grpo" else ral_grpo
    model, processor = build()
    args = script.Args(num_iterations=1, beta=0.0, max_new_tokens=t, think=False)
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def work() -> None:
        prompt = prompt_of(processor, p)
        batch = collate(model, [prompt], processor.tokenizer.pad_token_id)
        rollout, _, rewards, _ = script.roll_out(model, processor, [prompt], batch, args)
        advantages = torch.linspace(-1, 1, GROUP)[None, :, None] + script.group_advantages(rewards)
        script.update(model, optimizer, [script.Batch(rollout, advantages)], args)

    return work


def worker(variant: str, p: int, t: int, repeats: int) -> None:
    """Warm up once, time the rest, print one line of JSON."""
    if variant == "in-turn":
        works = {name: update_work(name, p, t) for name in IN_TURN}
        seconds = [{name: timed(work) for name, work in works.items()} for _ in range(repeats + 1)]
        return print(json.dumps(seconds[1:]))
    makers = dict.fromkeys(UPDATES, update_work) | dict.fromkeys(ROLLOUTS, rollout_work)
    makers |= dict.fromkeys(STEPS, step_work)
    work = makers[variant](variant, p, t)
    work()
    report([timed(work) for _ in range(repeats)])


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report(seconds: list[float]) -> None:
    """Print a line with the median and the peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps([{"seconds": float(np.median(seconds)), "gb": peak}]))


# The driver: processes in turn, a table, a file


def measure(args: Args, variant: str, p: int, t: int) -> Any:
    repeats = {"eager": 1, "trl": 1, "in-turn": 15}.get(variant, 3)
    command = [sys.executable, __file__, "--worker", variant, str(p), str(t), str(repeats)]
    if variant == "trl":
        script = str(Path(__file__).with_name("trl_step.py"))
        command = [args.trl_python, script, str(p), str(t), str(repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant} P {p} T {t} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(args: Args) -> None:
    cells = [(v, 1024, 64) for v in (*UPDATES, *ROLLOUTS, *STEPS)]
    cells += [(v, 1024, 16) for v in ROLLOUTS]
    cells += [("trl", 1024, 64)] * bool(args.trl_python)
    rounds = [cells] * args.rounds
    if args.grid:
        sizes = [(p, t) for t in (64, 256) for p in (256, 512, 1024, 2048, 4096)]
        grid = [(v, p, t) for p, t in sizes for v in UPDATES if (p, t) != (1024, 64)]
        grid += [(v, p, 64) for p in (256, 512, 2048, 4096) for v in (*ROLLOUTS, *STEPS)]
        # The eager attention matrices of longer prompts take more than 14 GB.
        rounds.insert(0, [(v, p, t) for v, p, t in grid if v != "eager" or p <= 1024])
    rounds = [[cell for cell in turn if cell[0] in args.variants] for turn in rounds]
    rounds.append([("in-turn", 1024, t) for t in (64, 256) if "in-turn" in args.variants])
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    for cell in {cell for turn in rounds for cell in turn}:
        results.pop("{} P{} T{}".format(*cell), None)
    for number, turn in enumerate(rounds, 1):
        for variant, p, t in turn:
            rows = measure(args, variant, p, t)
            results.setdefault(f"{variant} P{p} T{t}", []).extend(rows)
            print(f"round {number}/{len(rounds)}  {variant:<10} P {p:<5} T {t:<4}", flush=True)
        args.results.parent.mkdir(exist_ok=True)
        args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


PAIRS = (("ral", "grpo", 64), ("ral", "unpacked", 64), ("ral", "eager", 64))
PAIRS += (("step-ral", "trl", 64), ("ours", "generate", 16), ("ours", "generate", 64))


def tables(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians and ranges of the cells, and ratios paired by round or turn, so that a drift of the
    machine does not count."""
    lines, ratios = ["| cell | seconds | peak memory |", "|---|---|---|"], {}
    for cell, rows in results.items():
        if "seconds" in rows[0]:
            seconds, gb = ([row[name] for row in rows] for name in ("seconds", "gb"))
            lines.append(f"| {cell} | {spread(seconds, '.2f', ' s')} | {np.median(gb):.2f} GB |")
        else:
            for name in [*IN_TURN][1:]:
                ratios[f"{name} / grpo, {cell}"] = [row[name] / row["grpo"] for row in rows]
    for ours, theirs, t in PAIRS:
        both = [results.get(f"{name} P1024 T{t}", ()) for name in (ours, theirs)]
        for what in ("seconds", "gb"):
            pairs = [(x[what], y[what]) for x, y in zip(*both, strict=False)]
            ratios[f"{ours} / {theirs}, T {t}, {what}"] = [x / y for x, y in pairs]
    lines += ["", "| ratio | measured |", "|---|---|"]
    lines += [f"| {label} | {spread(x, '.3f')} |" for label, x in ratios.items() if x]
    return "\n".join(lines)


def spread(values: list[float], form: str, unit: str = "") -> str:
    """The median and, of several values, their range."""
    middle = f"{np.median(values):{form}}{unit}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main(tyro.cli(Args, description=__doc__))
