"""A GPU that is not there: the scripts' own step at full size on fake tensors, which have shapes,
dtypes, devices and strides, and no numbers.

`fake_gpu("cuda")` finds what is on the wrong device; autograd has no engine for it, so it runs
forwards alone. `fake_gpu("cpu")` runs the backward pass too, with attention in the layouts of
CUDA's kernels, and counts the bytes that are alive.
"""

import contextlib
import itertools
import sys
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from shared import terms_of
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen3VLTextModel

import common
from support import memory as memory_module
from support import prompts as prompts_module
from support.prompts import Block, PromptBatch, visual_features

GIB = 2**30
VIEWS = "view _unsafe_view detach slice split transpose t permute expand unsqueeze select alias"
VIEWS = frozenset(VIEWS.split())


class Memory(TorchDispatchMode):
    """Bytes alive on `device`, by what they are for, and the most there were since `reset`.

    It also answers when Python asks a fake tensor for its number: `answers` maps a piece of the
    asking line to a value; else a bool is True, an integer `length`, a float 0.5.
    """

    def __init__(self, device: str, answers: dict[str, Any], length: int):
        super().__init__()
        self.device, self.answers, self.length = device, answers, length
        self.what, self.size, self.alive = {}, {}, {}
        self.now, self.peak, self.at = Counter(), 0, Counter()
        self.new = "activations"  # what a new tensor is for

    def change(self, key: int, size: int) -> None:
        self.now[self.what[key]] += size - self.size[key]
        self.size[key] = size
        if (total := self.now.total()) > self.peak:
            self.peak, self.at = total, Counter(self.now)

    def track(self, tensor: Tensor, what: str | None = None) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.size:
            self.what[key], self.size[key] = what or self.new, 0
            self.alive[key] = weakref.ref(storage, lambda _: self.forget(key))
            self.change(key, storage.nbytes())
        elif what not in (None, self.what[key]):
            self.now[self.what[key]] -= self.size[key]
            self.now[what] += self.size[key]
            self.what[key] = what

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def counted(storage, size):  # how FSDP frees and fills gathered weights
            resize(storage, size)
            if storage._cdata in self.size:
                self.change(storage._cdata, size)

        self.resizing = mock.patch.object(torch.UntypedStorage, "resize_", counted)
        self.resizing.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.resizing.stop()
        return super().__exit__(*error)

    def forget(self, key: int) -> None:
        self.change(key, 0)
        for table in (self.what, self.size, self.alive):
            del table[key]

    def reset(self) -> None:
        self.peak, self.at = self.now.total(), Counter(self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # autograd asks this more often than all else
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer(args[0].dtype)
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        quick = self.device == "cpu" and func._opname in VIEWS and type(args[0]) is FakeTensor
        out = view(func, *args) if quick and not kwargs else func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.track(leaf)
        return out

    def answer(self, dtype: torch.dtype) -> Any:
        frame, lines = sys._getframe(2), []
        while frame and len(lines) < 3:
            if "/torch/" not in frame.f_code.co_filename:
                lines.append(line_of(frame))
            frame = frame.f_back
        for piece, value in self.answers.items():
            if any(piece in line for line in lines):
                return value() if callable(value) else value
        return True if dtype == torch.bool else 0.5 if dtype.is_floating_point else self.length


def view(func: Any, x: FakeTensor, *args: Any) -> FakeTensor | list[FakeTensor]:
    """As FakeTensorMode does, whose checks take most of the time of the operators called most."""
    with fake_tensor.in_kernel_invocation_manager(x.fake_mode):
        out = func(x, *args)
    return tree_map_only(Tensor, lambda y: FakeTensor(x.fake_mode, y, x.fake_device), out)


def line_of(frame: Any) -> str:
    import linecache

    return linecache.getline(frame.f_code.co_filename, frame.f_lineno)


class LowerRight(NamedTuple):
    """Stands for `causal_lower_right`, a tensor that cannot be made where all tensors are fake."""

    rows: int
    keys: int


KERNELS = Counter()  # attention kernels that ran: (name, query's shape, key's shape)


def attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Scaled dot-product attention by the kernel that an Ampere or Ada GPU chooses, with its rules
    for dtypes and its layout of the output."""
    if isinstance(attn_mask, LowerRight):  # flash attention aligns a causal mask to that corner
        assert attn_mask == (q.shape[2], k.shape[2])
        attn_mask, is_causal = None, True
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16, (q.dtype, k.dtype, v.dtype)
    assert q.shape[1] == k.shape[1] and not enable_gqa, "query heads that share a key head"
    if attn_mask is None:
        KERNELS["flash", tuple(q.shape), tuple(k.shape)] += 1
        q, k, v = (F.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, 0.0, is_causal, False, scale=scale)[0][..., : v.shape[-1]]
    assert attn_mask.dtype in (torch.bool, q.dtype), attn_mask.dtype
    assert attn_mask.device == q.device, attn_mask.device
    KERNELS["memory-efficient", tuple(q.shape), tuple(k.shape)] += 1
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    attn_mask = F.pad(attn_mask, (0, -attn_mask.shape[-1] % 16))[..., : attn_mask.shape[-1]]
    attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return efficient(q, k, v, attn_mask, needs_grad, 0.0, is_causal, scale=scale)[0]


class Stub:
    """A stream, an event or a device guard that does nothing."""

    device, priority = torch.device("cuda", 0), 0

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


CUDA = {
    "is_available": lambda: True,
    "current_device": lambda: 0,
    "device_count": lambda: 8,
    "set_device": lambda *_: None,
    "synchronize": lambda *_: None,
    "Stream": Stub,
    "Event": Stub,
    "current_stream": Stub,
    "default_stream": Stub,
    "stream": lambda stream: contextlib.nullcontext(),
    "_lazy_init": lambda: None,
    "reset_peak_memory_stats": lambda: None,
    "is_current_stream_capturing": lambda: False,
}


class Indexing(TorchFunctionMode):
    """Indexing by the operators behind it, and no assignment: Python's own indexing asks for CUDA,
    which this PyTorch may lack, before the tensor can say that it is fake."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.copy_, Tensor.__setitem__):
            return args[0]
        if func in (Tensor.__int__, Tensor.__bool__, Tensor.item):
            return torch.ops.aten._local_scalar_dense(args[0])
        if func is Tensor.contiguous:
            return args[0].clone(memory_format=torch.contiguous_format)
        if func is Tensor.__invert__:
            return args[0].bitwise_not()
        if func is Tensor.__getitem__:
            return self.index(args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
        return func(*args, **(kwargs or {}))

    def index(self, x: Tensor, index: tuple) -> Tensor:
        left, dim, tensors = sum(i is not None and i is not Ellipsis for i in index), 0, {}
        for i in index:
            if i is Ellipsis:
                dim = x.ndim - left
                continue
            if i is None:
                x = x.unsqueeze(dim)
            elif isinstance(i, slice):
                x = torch.ops.aten.slice(x, dim, i.start, i.stop, i.step or 1)
            elif isinstance(i, Tensor):
                tensors[dim] = i
            else:
                x, dim = x.select(dim, i), dim - 1
            left, dim = left - (i is not None), dim + 1
        if tensors:
            x = torch.ops.aten.index(x, [tensors.get(i) for i in range(max(tensors) + 1)])
        return x


@contextlib.contextmanager
def fake_gpu(device: str, processes: int, answers: dict[str, Any], length: int) -> Iterator[Memory]:
    """Everything inside computes on a fake GPU, one of `processes`, on which no tensor has
    numbers."""
    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        if device == "cuda":
            stack.enter_context(mock.patch.multiple(torch.cuda, **CUDA))
            patch(torch, "Event", Stub)
            patch(fake_tensor, "init_gpu_context", lambda device: None)  # it needs a driver
            patch(FakeTensorMode, "avoid_device_init", property(lambda self: True))
        patch(common, "device", lambda: device)
        patch(common, "compute_dtype", lambda: torch.bfloat16)
        patch(common, "on_gpu", lambda x: True)
        patch(F, "scaled_dot_product_attention", attention)
        patch(torch.nn.functional, "scaled_dot_product_attention", attention)
        patch(common, "causal_lower_right", LowerRight)
        patch(common, "fill", lambda *_: None)
        patch(PreTrainedModel, "to", lambda self, device: self)
        # Indexing by a mask needs its values. The original, too, keeps one clone.
        patch(Qwen3VLTextModel, "_deepstack_process", lambda self, hidden, *_: hidden.clone())
        patch(common, "gather", lambda items: items)
        patch(prompts_module, "gather", lambda items: items)
        patch(common, "require_finite", lambda logits: None)  # there are no values to check
        patch(common, "on_rank_0", lambda action: action())
        patch(common, "ATTENTION_CHUNK", 2**26)
        stack.enter_context(mock.patch.dict(common.in_chunks.__kwdefaults__, elements=2**26))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        stack.callback(dist.destroy_process_group)
        mesh = init_device_mesh(device, (processes,))  # on real tensors, before there are none
        patch(_fully_shard, "_init_default_mesh", lambda *_, **__: mesh)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if device == "cuda":
            stack.enter_context(Indexing())
        yield stack.enter_context(Memory(device, answers, length))


def see(visual: torch.nn.Module, patches: int) -> None:
    """Give a vision encoder what it would compute from the numbers of its grid, for videos of so
    many patches; one call of attention stands for those of its frames."""
    forward = visual.forward

    def fake_forward(pixels: Tensor, grid_thw: Tensor, **options: Any) -> Any:
        n, device = len(pixels), pixels.device
        lengths = {"cu_seqlens": n // patches + 1}
        if visual.config.model_type.startswith("qwen2_5_vl"):
            lengths |= {"cu_window_seqlens": n // patches + 1, "window_index": n // 4}
        if visual.config.model_type.startswith("qwen3_vl"):
            options["interp_weights"] = torch.zeros(n, 4, device=device)
            options["interp_indices"] = torch.zeros(n, 4, dtype=torch.long, device=device)
        for name, length in lengths.items():
            options[name] = torch.zeros(length, dtype=torch.long, device=device)
        positions = torch.zeros(n, 2, dtype=torch.long, device=device)
        return forward(pixels, grid_thw=grid_thw, position_ids=positions, **options)

    visual.forward = fake_forward


def load(config: Any, patches: int, **fields: Any) -> torch.nn.Module:
    """`load_model` of a checkpoint with this config, whose weights are made up; see `see`."""

    def read_model(path, field, processor, options):
        if dist.get_world_size() == 1 and fields.get("frozen"):  # it is not sharded
            with torch.device(common.device()):
                model = AutoModelForImageTextToText.from_config(config, **options)
        else:
            with unset_fake_temporarily():
                model = common.empty_model(config, **options)
        model.generation_config.eos_token_id = [1]
        return model

    processor = types.SimpleNamespace(config=config, end_ids={1})
    add_adapters = common.add_adapters

    def add_adapters_without_storage(*args):
        with unset_fake_temporarily(), torch.device("meta"):
            add_adapters(*args)

    with (
        mock.patch.object(common, "read_model", read_model),
        mock.patch.object(common, "write_files", lambda *_: None),
        mock.patch.object(common, "load_processor", lambda *_, **__: processor),
        mock.patch.object(common, "add_adapters", add_adapters_without_storage),
    ):
        model = common.load_model("checkpoint", **fields)
    see(model.model.visual, patches)
    return model


def step(
    script: Any, config: Any, args: Any, processes: int, device: str = "cpu", padded: bool = False
) -> dict[str, Counter]:
    """Run the rollout, the reference pass and the update of `script` on a fake GPU; returns what
    was alive at the peak of each phase, in bytes by what it is for.

    The rollout stops after one token. On `cuda`, where the scripts ask only after every 16 tokens
    whether all responses have ended, it does not, and the update is its forward pass alone. An
    evaluation decodes as many positions as are decoded together, with more text where they are no
    multiple of a prompt's.
    """
    prompt = memory_module.prompt_tokens(args, config.model_type)
    visual = memory_module.visual_tokens(args) // 128 * 128
    patches = 4 * visual
    b, g, t = args.prompts_per_step, args.group_size, args.max_new_tokens
    evaluated = min(2 * b, memory_module.DECODED // (prompt + t))
    longest = prompt if evaluated == 2 * b else memory_module.DECODED // evaluated - t
    asked = itertools.count(1)  # a rollout ends where all responses have ended
    answers = {
        "done.all": lambda: next(asked) % 2 == 0,
        "argmax": 0,
        ".all())": not padded,
        "lengths.tolist": patches,
        "split_sizes": visual,
    }
    peaks = {}
    with fake_gpu(device, processes, answers, length=t) as memory:

        def phase(name: str) -> None:
            peaks[name] = memory.at
            memory.reset()

        def make_prompts(count: int, prompt: int = prompt) -> PromptBatch:
            vision = config.vision_config
            channels = getattr(vision, "in_channels", 3)
            values = channels * vision.temporal_patch_size * vision.patch_size**2
            shape = (visual // 128, 8, 16)
            blocks = [[Block(torch.empty(patches, values), shape, is_video=True)]] * count
            features = None
            if not args.train_vision:
                with torch.no_grad():
                    features = visual_features(model, blocks)
            return PromptBatch(
                torch.zeros(count, prompt, dtype=torch.long, device=device),
                torch.zeros(3, count, prompt, dtype=torch.long, device=device),
                torch.ones(count, prompt, dtype=torch.bool, device=device) if padded else None,
                torch.full((count, prompt), -1),
                blocks,
                features,
            )

        options = {"gradient_checkpointing": True, "train_vision": args.train_vision}
        model = load(config, patches, lora_rank=args.lora_rank, **options)
        reference = model if args.lora_rank else load(config, patches, frozen=True)
        for parameter in model.parameters():
            memory.track(parameter, "weights")
        if reference is not model:
            for parameter in reference.parameters():
                memory.track(parameter, "frozen models")
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        memory.new = "gradients"
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        memory.new = "optimizer"
        optimizer.step()  # from here on there are moments
        optimizer.zero_grad()
        memory.new = "activations"
        memory.reset()
        memory.new = "gathered"
        with common.gathered(model):
            memory.new = "activations"
            prompts = make_prompts(max(b, evaluated))
            phase("vision")
            prompts = prompts[:b]
            rollout = common.generate_group(model, prompts, g, t, torch.rand(b * g, t))
            phase("rollout")
        advantages = torch.rand(b, g, 1, device=device)
        size = args.micro_batch_size
        cuts = [slice(i, i + size) for i in range(0, b, size)]
        # A distillation script reads the same rollout, with the teacher's features.
        teachers = [load(config, patches, frozen=True)] if hasattr(args, "teacher") else []
        batches = [
            script.Batch(rollout[cut], advantages[cut], *(rollout[cut] for _ in teachers))
            for cut in cuts
        ]
        # The last one is scored and trained on. The others' values, and in the update the gradients
        # that they have left, are alive meanwhile.
        for batch in batches[:-1]:
            batch.ref_logps = torch.empty(size, g, t, device=device)
        with common.without_adapters(reference):
            script.score_reference(reference, batches[-1:], args)
        phase("reference")
        if device == "cuda":
            with torch.no_grad():
                terms_of(script, model, batches[-1], args, *teachers)
        else:
            for batch in batches[:-1]:
                batch.old_logps = torch.empty_like(batch.ref_logps)
                if hasattr(batch, "old_attn"):
                    batch.old_attn = torch.empty(size, g, t, prompt + t)
            memory.new = "gradients"
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            memory.new = "activations"
            script.update(model, *teachers, optimizer, batches[-1:], args)
            assert all(p.grad is None for p in parameters)
        phase("update")
        # Last, so that what the reference pass leaves gathered would be seen.
        prompts = rollout = advantages = batches = batch = None
        memory.new = "gathered"
        with common.gathered(model):
            memory.new = "activations"
            common.generate_group(model, make_prompts(evaluated, longest), 1, t)
            phase("evaluation")
    return peaks
