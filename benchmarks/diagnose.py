"""What to know before training with RAL: where a model looks, and what is left for the attention
term to act on.

    python benchmarks/diagnose.py                                   # the toy's cold start
    python benchmarks/diagnose.py --model DIR_OR_HUB_NAME --data FILE

It takes the arguments of `ral_grpo.py`, so a planned run can be diagnosed as it stands. It responds
to the run's first prompts, takes one optimiser step of plain GRPO on them, and undoes the step.
Arguments about steps, evaluation and saved states have no effect; an earlier diagnosis at --out is
replaced.

The table has a line for the policy of each layer and row kind (means over tokens, then responses):
  vision, question, response  mass on visual tokens, the rest of the prompt, and earlier tokens
  entropy     in nats
  target      mass on the visual tokens that show what the question is about (prompts with boxes)
  lift        that, over what it would be if the mass on vision were spread evenly
  gap         target of a group's right responses (accuracy 0.5 or more) minus that of its wrong
              ones, a mean over groups that have both; and half its 95% `interval`
  moved       divergence D of the policy after the step from that at rollout time, in nats
  rounding    share of this that is rounding (on a GPU, of bfloat16), estimated from the step and
              its mirror image: too low by up to 0.3, and far too high where `moved` is above 0.001,
              as curvature counts too. The term's gradient suffers more than the share says
  left_group  share of sum |A D / T| that is left if a group's responses and tokens are summed first
  left_row    the same if only responses that share a row are summed first. Those with a common
              prefix do, and their advantages A nearly cancel. Only this share has a gradient
  gradient    gradient norm of the term at lambda 1, over that of the token term, at the second
              pass
  lambda      the weight that makes this ratio 0.1
"""

import json
import math
import os
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import ral_grpo
from common import Rollout, accuracy, response_mean, score
from ral_grpo import Batch, attention_policy, divergence, loss_terms, score_policy
from support import cli, disk, ranks, runs, toy
from support.data import open_file
from support.memory import GIB, memory_gb
from support.pictures import load_pyplot, save
from support.prompts import Processor, Prompt, collate
from support.ranks import require

ROWS = ("own", "predicting")
MASSES = ("vision", "question", "response")
AIMED = {"target": ".3f", "lift": ".2f", "gap": "+.1e", "interval": ".1e"}  # with boxes
AFTER = {"moved": ".1e", "rounding": ".2f", "left_group": ".4f", "left_row": ".4f"}
AFTER |= {"gradient": ".1e", "lambda": ".2g"}
# Of the table, with their formats.
COLUMNS = dict.fromkeys((*MASSES, "entropy"), ".3f") | AIMED | AFTER

DRAWN = {
    "vision": "attention mass on vision",
    "response": "attention mass on earlier tokens",
    "entropy": "entropy (nats)",
    "moved": "moved in one step of GRPO (nats)",
    "left_row": "share of the term that is left",
    "lambda": "lambda for a tenth of the token gradient",
}


@dataclass
class Args(ral_grpo.Args):
    out: str = "runs/diagnose"
    """Directory of diagnosis.txt, .png and .json, and of samples.jsonl."""
    prompts: int = 32
    """Prompts that are answered together, at most one epoch."""
    layers: tuple[int, ...] = ()
    """Layers to measure beside --attn-layer; unset: all. Each costs two passes with gradients."""


def shares_prefix(rollout: Rollout) -> Tensor:
    """Whether responses i and j of a group have the same first t tokens, (B, G, G, T), t = 1 to T.
    The end of a response counts as a token."""
    ids = rollout.response_ids.masked_fill(~rollout.response_mask, -1)
    return (ids[:, :, None] == ids[:, None]).int().cumprod(-1).bool()


def look(batch: Batch, prompts: list[Prompt], rows: Tensor, row: str) -> dict[str, Tensor]:
    """Where each response token looks: the three masses, the entropy, the mass on the target and
    what this would be if the mass on vision were spread evenly, (B, G, T) each. `rows` are those of
    `common.score`."""
    policy = attention_policy(rows, row)
    visual = (batch.rollout.prompts.patches >= 0).to(policy.device)[:, None, None]
    target = torch.zeros_like(visual)
    for there, cells, prompt in zip(target, visual, prompts, strict=True):
        there[..., cells.nonzero()[list(prompt.target), -1]] = True
    before, response = policy.split([visual.shape[-1], policy.shape[-2]], dim=-1)
    vision, entropy = (before * visual).sum(-1), torch.special.entr(policy).sum(-1)
    masses = (vision, before.sum(-1) - vision, response.sum(-1))
    even = vision * target.sum(-1) / visual.sum(-1).clamp_min(1)
    aimed = {"target": (before * target).sum(-1), "even": even}
    return dict(zip(MASSES, masses, strict=True)) | {"entropy": entropy} | aimed


def aim(target: Tensor, even: Tensor, right: Tensor) -> dict[str, float | None]:
    """The columns `AIMED` of responses (B, G) to prompts with boxes, from two means of `look` over
    each one's tokens, and from whether it is right."""
    found = dict.fromkeys(AIMED)
    if len(target):
        found |= {"target": target.mean().item(), "lift": (target.mean() / even.mean()).item()}
    gaps = [(x[ok].mean() - x[~ok].mean()).item() for x, ok in zip(target, right, strict=True)]
    gaps = [gap for gap in gaps if not math.isnan(gap)]  # of groups that have both
    if (n := len(gaps)) > 1:
        half = student_t.ppf(0.975, n - 1) * statistics.stdev(gaps) / math.sqrt(n)
        found |= {"gap": statistics.mean(gaps), "interval": float(half)}
    return found


def remainders(batches: list[Batch], moved: list[Tensor], row: str) -> dict[str, float]:
    """The two shares that are left; `moved` are the divergences (B, G, T) of each batch."""
    total = left_group = left_row = 0.0
    for batch, x in zip(batches, moved, strict=True):
        mask = batch.rollout.response_mask
        term = batch.advantages * torch.where(mask, x, 0.0) / mask.sum(-1, keepdim=True)
        shared = shares_prefix(batch.rollout).to(term.dtype)
        if row == "predicting":  # the row of token t follows from the tokens before it
            shared = F.pad(shared, (1, -1), value=1.0)
        sums = torch.einsum("bijt,bjt->bit", shared, term).abs() / shared.sum(2)
        left_row += torch.where(mask, sums, 0.0).sum()
        left_group += term.sum((1, 2)).abs().sum()
        total += term.abs().sum()
    total = total.clamp_min(torch.finfo(total.dtype).tiny)  # nothing of nothing is left
    return {"left_group": (left_group / total).item(), "left_row": (left_row / total).item()}


def gradient_norm(model: Module, batches: list[Batch], term: str, args: Args) -> float:
    """Gradient norm of one term of the loss alone, before its weight."""
    responses = sum(batch.rollout.num_responses for batch in batches)
    for batch in batches:
        terms = loss_terms(score_policy(model, batch, args), batch, args)
        # Adds zero: under FSDP, every layer's output must receive a gradient.
        (terms[term].sum() / responses + 0 * terms["loss"].sum()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return ranks.full_tensor(norm).item()


def diagnose(
    model: Module, processor: Processor, prompts: list[Prompt], args: Args, layers: list[int]
) -> tuple[dict[str, Any], list[dict]]:
    """Measure the groups and all policies of `layers`; returns the report and the samples. Every
    weight is afterwards what it was before, to the bit."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [ranks.full_tensor(p.detach()).to("cpu", copy=True) for p in parameters]
    inputs = collate(model, prompts, processor.tokenizer.pad_token_id)
    rollout, texts, rewards, metrics = ral_grpo.roll_out(model, processor, prompts, inputs, args)
    samples = runs.sample_rows(prompts, texts, rewards)
    advantages, size = ral_grpo.group_advantages(rewards), args.micro_batch_size
    cuts = common.cut_prompts(rollout, 1, size)
    batches = [Batch(rollout[cut], advantages[cut]) for cut in cuts]
    masks = [batch.rollout.response_mask for batch in batches]
    alike = shares_prefix(rollout)[:, 0].all(1)  # (B, T)
    report = {"metrics": metrics, "lengths": rollout.response_mask.sum(-1).flatten().tolist()}
    report["parting"] = [int(x.sum()) + 1 for x in alike if not x[-1]]
    report |= {"never_part": alike[:, -1].float().mean().item(), "notes": [], "rows": []}
    if not (inputs.patches >= 0).any():
        report["notes"].append("vision: no prompt has an image or a video")
    groups, boxes = zip(prompts, texts, strict=True), [bool(prompt.target) for prompt in prompts]
    rates = [[accuracy(x, p.example, args.accuracy_rule) for x in group] for p, group in groups]
    right = torch.tensor(rates) >= 0.5
    if not (learns := bool(advantages.any())):
        why = f"the rewards of every group are equal ({runs.WHY_EQUAL})"
        report["notes"].append(f"movement, remainders, gradients: {why}")

    @torch.no_grad()
    def attentions() -> list[dict[int, Tensor]]:
        """The rows of all responses by layer, for each batch, on the host."""
        scores = (score(model.eval(), x.rollout, args.temperature, layers) for x in batches)
        return [{layer: x.cpu() for layer, x in found.attentions.items()} for found in scores]

    def means(values: list[Tensor]) -> Tensor:
        return torch.cat([response_mean(*pair) for pair in zip(values, masks, strict=True)])

    def between(new: list, old: list) -> dict[tuple[int, str], list[Tensor]]:
        """The divergence of each token's policies in two `attentions`, by layer and row."""
        moved = {key: [] for key in product(layers, ROWS)}
        for pair in zip(new, old, strict=True):
            for layer, row in moved:
                # Float32 would round away what moves at a learning rate of 1e-5.
                both = (x[layer].to(model.device).double() for x in pair)
                moved[layer, row].append(divergence(*(attention_policy(x, row) for x in both)))
        return moved

    @torch.no_grad()
    def go_back(share: float) -> None:
        """Move every weight back to where it began, or, at 2, as far beyond."""
        for module in model.modules():  # a pass without gradients leaves some weights gathered
            if isinstance(module, FSDPModule):
                module.reshard()
        for parameter, weight in zip(parameters, kept, strict=True):
            begun = ranks.shard_like(weight, parameter)
            parameter.copy_(begun if share == 1 else parameter.lerp(begun, share))

    before = attentions()
    pairs = list(zip(batches, before, strict=True))
    for layer, row in product(layers, ROWS):
        parts = zip(cuts, batches, (old[layer].to(model.device) for old in before), strict=True)
        looks = [look(batch, prompts[cut], rows, row) for cut, batch, rows in parts]
        found = {name: means([x[name] for x in looks]).cpu() for name in looks[0]}
        target, even = (found.pop(name)[boxes] for name in ("target", "even"))
        line = {"layer": layer, "row": row} | {name: x.mean().item() for name, x in found.items()}
        report["rows"].append(line | aim(target, even, right[boxes]) | dict.fromkeys(AFTER))
    if not learns:
        return report, samples
    try:
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
        grpo = replace(args, lambda_attn=0.0, beta=0.0, num_iterations=1, num_minibatches=1)
        norm = ral_grpo.update(model, optimizer, batches, grpo)["train/grad_norm"]
        require(math.isfinite(norm), f"--model {args.model}: the gradient of GRPO is {norm}")
        del optimizer
        stepped = attentions()
        moved = between(stepped, before)
        model.train()  # gradient checkpointing needs it
        tokens = gradient_norm(model, batches, "pg_loss", args)
        for line in tqdm(report["rows"], desc="gradients"):
            layer, row = line["layer"], line["row"]
            for batch, old in pairs:
                batch.old_attn = attention_policy(old[layer].to(model.device), row)
            options = replace(args, attn_layer=layer, attn_row=row)
            ratio = gradient_norm(model, batches, "attn_loss", options) / tokens
            line |= {"moved": means(moved[layer, row]).mean().item(), "gradient": ratio}
            line["lambda"] = 0.1 / ratio if ratio else None
            line |= remainders(batches, moved[layer, row], row)
        go_back(2)
        mirrored = attentions()
        back, across = between(mirrored, before), between(mirrored, stepped)
        for line in report["rows"]:
            key = line["layer"], line["row"]
            one, other, both = (means(x[key]).mean().item() for x in (moved, back, across))
            # Of movement S and rounding N, either step shows S + N, and both together 4 S + N.
            noise = (2 * (one + other) - both) / 3
            line["rounding"] = min(1.0, max(0.0, noise / one)) if one else 0.0
    finally:
        go_back(1)
        model.zero_grad()
        model.eval()
    return report, samples


def conclude(report: dict[str, Any], args: Args) -> list[str]:
    """Three sentences about the layer and row of `args` and, where there are boxes, two about the
    rows that look at them most."""
    ours, best = report["planned"], max(report["rows"], key=lambda x: x["vision"])
    named, other = (f"the {x['row']} rows of layer {x['layer']}" for x in (ours, best))
    acted = "them" if ours is best else f"{named} ({ours['vision']:.0%})"
    looks = f"T{other[1:]} look at vision most ({best['vision']:.0%} of their mass)"
    looks += f", and RAL would reward {acted}."
    if best["vision"] < 0.05:
        looks = f"No rows look at vision: at most {best['vision']:.1%} of their mass is there."
    aims = []
    if ours["target"] is not None:
        most = max(report["rows"], key=lambda x: x["target"])
        rows = f"he {most['row']} rows of layer {most['layer']}"
        aim = f"T{rows} look at the target most"
        if most["lift"] < 1.2:
            aim = f"No rows pick out the target. Most of it is in t{rows}"
        aims.append(f"{aim} ({most['target']:.1%} of their mass, {most['lift']:.2g} times chance).")
    if ours["gap"] is not None:
        aims.append(
            f"There, right responses have {most['gap']:+.1e} ± {most['interval']:.1e} of mass on it"
            " relative to wrong ones of the same group."
        )
        if abs(most["gap"]) <= most["interval"]:
            aims[1] += " Where it is 0, no reward can teach these rows where to look."
    if ours["moved"] is None:
        equal = "Groups do not differ in reward: RAL and GRPO learn nothing here."
        return [looks, equal, "So no lambda can be given.", *aims]
    left, weight = ours["left_row"], args.lambda_attn or 1.0
    much = "next to nothing" if left < 0.05 else "little" if left < 0.3 else "enough"
    acts = (
        f"Groups part at token {statistics.median(report['parting']):.0f} (median), and {left:.0%}"
        f" of the term is left in {named} once responses that share a row are summed (`left_row`):"
        f" {much} to act on."
    )
    felt = f"At lambda {weight:g} the term's gradient is {weight * ours['gradient']:.1g} of the"
    felt += " token term's"
    felt += f"; lambda {ours['lambda']:.2g} would make it a tenth." if ours["lambda"] else "."
    if ours["rounding"] > 0.2 and ours["moved"] <= 1e-3:  # else it may be curvature
        felt += f" But about {ours['rounding']:.0%} of what moved is rounding, and more of that"
        felt += " gradient is."
    return [looks, acts, felt, *aims]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    metrics, parting, lengths = report["metrics"], report["parting"], report["lengths"]
    first = f"part at token {statistics.median(parting):.0f} (median)" if parting else "do not part"
    differ, cut = 1 - metrics["rollout/frac_zero_std"], metrics["rollout/truncated_frac"]
    columns = {k: v for k, v in COLUMNS.items() if k not in AIMED or report["rows"][0]["target"]}
    lines = [
        f"groups: {first}, {report['never_part']:.0%} never; rewards differ in {differ:.0%}",
        f"rewards: mean {metrics['rollout/reward']:.3f}",
        f"responses: {min(lengths)} to {max(lengths)} tokens, {cut:.0%} truncated",
        f"\nlayer {'row':<10}{''.join(f'{name:>11}' for name in columns)}",
    ]
    for line in report["rows"]:
        cells = ["-" if line[x] is None else f"{line[x]:{form}}" for x, form in columns.items()]
        lines.append(f"{line['layer']:>5} {line['row']:<10}{''.join(f'{x:>11}' for x in cells)}")
    notes = [f"not measured: {note}" for note in report["notes"]]
    return "\n".join([*lines, "", *notes, *report["conclusion"]])


def draw(path: Path, report: dict[str, Any]) -> None:
    """Draw columns of the table by layer, a line for each kind of row."""
    figure, axes = load_pyplot().subplots(2, 3, figsize=(13, 7.5))
    for axis, (name, title) in zip(axes.flat, DRAWN.items(), strict=True):
        for row in ROWS:
            lines = [x for x in report["rows"] if x["row"] == row and x[name] is not None]
            layers, values = [x["layer"] for x in lines], [x[name] for x in lines]
            axis.plot(layers, values, "o-", label=row)
        scale = "log" if name in ("moved", "lambda") else "linear"
        axis.set(title=title, xlabel="layer", yscale=scale)
        axis.grid(alpha=0.3)
        axis.legend()
    save(figure, path)


def main(args: Args) -> dict[str, Any]:
    """Print and write the diagnosis; returns the report."""
    alone = "a diagnosis is made by one process; start it without torchrun"
    require(ranks.world_size() == 1, alone)
    cli.require_positive(args, "prompts")
    count = min(args.prompts, len(open_file(args, "--data"))) if args.data else args.prompts
    one_step = {"prompts_per_step": count, "num_minibatches": 1, "resume": None}
    one_step |= {} if args.data else {"eval_examples": 1}  # the toy would draw them
    prepared = common.prepare(
        replace(args, **one_step),
        ral_grpo.PROMPTS,
        learning_rate=lambda args, *_: 2e-5 if args.lora_rank else 1e-5,
        layers=("layers", "attn_layer"),
        kind=disk.DIAGNOSIS,
    )
    given = {name: getattr(args, name) for name in one_step}
    args, processor, out = prepared.args, prepared.processor, Path(args.out)
    with disk.writing(out, "the directory"):
        out.mkdir(parents=True, exist_ok=True)
        lock = disk.lock_directory(out)
    count = min(count, prepared.train.steps(1)) if args.data else count  # some are held out
    prompts = list(islice(prepared.train.begin(1, count), count))
    depth = processor.config.text_config.num_hidden_layers
    layers = sorted({x % depth for x in (*(args.layers or range(depth)), args.attn_layer)})
    new, longest = args.max_new_tokens, max(len(prompt.ids) for prompt in prompts)
    rows = count * args.group_size * (new + 1) * len(layers)
    needs = list(memory_gb(processor.config, args, args.lora_rank).values())
    host = 3 * 4 * rows * (longest + new) / GIB + needs[0]["optimizer"] / 2  # which is two copies
    print(
        f"{count} prompts of up to {longest} tokens, {args.group_size} responses of up to {new} to"
        f" each: a rollout, 3 passes forward, {2 + 2 * len(layers)} forward and backward."
        f"\nMemory: about {max(sum(x.values()) for x in needs):.1f} GB, and on the host up to"
        f" {host:.1f} GB for attention and a copy of the weights; --layers, --prompts: choose less."
    )
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    require(host < 0.95 * have, f"--layers, --prompts: the host has {have:.1f} GB; choose less")
    report, samples = diagnose(prepared.model, processor, prompts, args, layers)
    planned = (args.attn_layer % depth, args.attn_row)
    report["planned"] = next(x for x in report["rows"] if (x["layer"], x["row"]) == planned)
    report["conclusion"] = conclude(report, args)
    print(f"\n{table(report)}")
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
    files = {"samples.jsonl": "\n".join(lines), "diagnosis.json": json.dumps(report)}
    files["diagnosis.txt"] = table(report)
    with disk.writing(out, "the diagnosis"):
        disk.write_record(out, disk.DIAGNOSIS, asdict(args) | given)
        for name, content in files.items():
            disk.write_aside(out / name, f"{content}\n")
        draw(out / "diagnosis.png", report)
    lock.close()
    print(f"results: {out}; --help says what the columns mean")
    return report


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__, partial(toy.defaults, ral_grpo.TOY))
