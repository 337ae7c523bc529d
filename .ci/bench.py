#!/usr/bin/env python
"""Speed and memory of the scripts' training steps, on random weights, images and labels.

    python .ci/bench.py                                     toy size, CPU, under a minute
    python .ci/bench.py --device cuda --arch ViT-B/16 --batch-size 64 --classes 37,100,1000
    python .ci/bench.py --loader PHOTOS                     the loader against torchvision's
    python .ci/bench.py --scale 10000,100000,1281167        the tables of so many images
    python .ci/bench.py --estimate --amp bf16               GPU memory of phase 2, in parts

Every row is timed on the script's own train_step, from uint8 pixels in (pinned) memory to the
optimiser's step; decoding is left out. The baseline, `Usual`, is the same training step as it is
usually written: texts of 77 tokens, attention as an explicit softmax, no checkpointing, a frozen
CLIP per model. "of peak": the floating point operations of a step, those that are done again for
checkpointing among them, per second, divided by the chip's dense bf16 rate.

B images per step and model, C classes, D embedding, H heads, L context tokens, n texts, T tokens,
W width.
"""
import argparse
import copy
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip  # noqa: E402
import coft  # noqa: E402
import coft_plus  # noqa: E402
import data  # noqa: E402
import prompt_align  # noqa: E402
from clip.clip import MEAN, STD  # noqa: E402

ARCHS = {   # embedding, resolution, layers, width, patch; text: length, words, width, heads, layers
    "toy": (64, 32, 3, 128, 8, 77, 49408, 64, 2, 3),
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "ViT-L/14": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12)}
TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312,
          "A10G": 70, "A10": 125, "A30": 165, "L40S": 362, "L40": 181, "L4": 121, "RTX 4090": 165,
          "RTX 3090": 71}                           # bf16, dense, per the maker; first match counts
WORDS = ("cat dog tree house river bread knife piano castle horse boat train apple chair lamp "
         "tiger shoe clock bridge flower glove truck eagle mushroom guitar spider bottle ladder "
         "rabbit violin barn whale").split()
TEMPLATE = "a photo of a {}."


class Usual(nn.Module):
    """The baseline's model: deep visual prompts, a shared V+ and a V- per class, a CLIP of its own.
    """
    def __init__(self, model, names):
        super().__init__()
        self.clip = copy.deepcopy(model)
        tokens = clip.tokenize([TEMPLATE.format(c) for c in names]).to(model.logit_scale.device)
        self.emb, self.eot = model.token_embedding(tokens), tokens.argmax(dim=1)    # (C, 77, W)
        self.pos = nn.Parameter(self.emb[0, 1:5].clone())                           # (L, W)
        self.neg = nn.Parameter(self.emb[:, 1:5].clone())                           # (C, L, W)
        layers, width = model.visual.transformer.layers, model.visual.transformer.width
        self.prompts = nn.Parameter(0.02 * torch.randn(layers, 4, width))

    def block(self, block, x, mask=0.0):
        a, h = block.attn, block.ln_1(x)
        qkv = F.linear(h, a.in_proj_weight, a.in_proj_bias)                         # (n, T, 3W)
        q, k, v = qkv.unflatten(-1, (3, a.heads, -1)).permute(2, 0, 3, 1, 4)        # (n, H, T, W/H)
        s = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(dim=-1)   # (n, H, T, T)
        x = x + a.out_proj((s @ v).transpose(1, 2).flatten(2))                      # (n, T, W)
        return x + block.mlp(block.ln_2(x))

    def text(self, V):
        V = V.expand(len(self.emb), -1, -1)                                         # (C, L, W)
        x = torch.cat([self.emb[:, :1], V, self.emb[:, 5:]], dim=1)                 # (C, 77, W)
        x = x + self.clip.positional_embedding
        mask = torch.full((77, 77), float("-inf"), device=x.device).triu(1)
        for block in self.clip.transformer.resblocks:
            x = self.block(block, x, mask)
        x = self.clip.ln_final(x)[torch.arange(len(x), device=x.device), self.eot]  # (C, W)
        return F.normalize((x @ self.clip.text_projection).float(), dim=-1)         # (C, D)

    def features(self, x):
        v = self.clip.visual
        x = v.conv1(x).flatten(2).transpose(1, 2)                                   # (B, T, W)
        x = torch.cat([v.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = v.ln_pre(x + v.positional_embedding)
        for block, new in zip(v.transformer.resblocks, self.prompts):
            new = new.to(x.dtype).expand(len(x), -1, -1)
            x = self.block(block, torch.cat([x[:, :1], new, x[:, 1:]], dim=1))[
                :, [0, *range(5, x.shape[1] + 4)]]                                  # (B, T, W)
        return F.normalize((v.ln_post(x[:, 0]) @ v.proj).float(), dim=-1)           # (B, D)

    def step(self, x, y, keep, y_bar, optimizer, scaler, autocast):
        tau = self.clip.logit_scale.exp()
        with autocast():
            f, t_pos, t_neg = self.features(x), self.text(self.pos), self.text(self.neg)
        l_pos, l_neg = coft.logits(f, t_pos, tau), coft.logits(f, t_neg, tau)       # (B, C) each
        loss = coft.loss_cls(l_pos, y) + coft.loss_neg(l_pos, l_neg, y, y_bar)      # (B,)
        loss = (loss * keep).sum() / keep.sum().clamp(min=1)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


# What is measured: {row: setup(o) -> step()}. o: device, model, names, B, C, autocast, scaler,
# pixels() -> a batch (B, 3, R, R) as the loader gives it, compiled.


def usual(o):
    models = [Usual(o.model, o.names).to(o.device) for _ in range(2)]
    for me in models:
        me.clip.requires_grad_(False)
    optimizers = [torch.optim.AdamW([me.pos, me.neg, me.prompts], fused=o.fused) for me in models]
    y, y_bar = torch.randint(o.C, (2, o.B), device=o.device)
    keep = torch.rand(o.B, device=o.device) > 0.5

    def step():
        for me, optimizer in zip(models, optimizers):
            me.step(o.pixels(), y, keep, y_bar, optimizer, o.scaler, o.autocast)
    return step, 2 * o.B


def a_job(o):
    """What the scripts' training steps need, as data.setup makes it."""
    dataset = SimpleNamespace(train=range(4 * o.B), class_names=o.names, templates=[TEMPLATE])
    return SimpleNamespace(
        args=SimpleNamespace(batch_size=o.B, lr1=2e-3, lr2=1e-5, lam=1.0, gamma=1.0, seed=0, ctx=0,
                             peft="vpt", peft_size=4, objective="cc", lr=2e-3, align=True,
                             teacher="evidence", compile=o.compiled),
        device=o.device, clip_model=o.model, dataset=dataset, autocast=o.autocast, scaler=o.scaler,
        C=o.C, added=set(coft_plus.ADDITIONS), tau=o.model.logit_scale.exp())


def two_models(script, phase, o):
    job, plus, N = a_job(o), script is coft_plus, 4 * o.B
    job.W0 = F.normalize(torch.randn(o.C, o.model.visual.output_dim, device=o.device), dim=1)
    job.full = o.model
    students = nn.ModuleList(script.Student(o.model, o.names, TEMPLATE, job.args)
                             for _ in range(2)).to(o.device)
    state = script.start_phase(job, phase, students, 1000)
    y, clean = torch.randint(o.C, (2, N)), torch.rand(2, N) > 0.5

    def step():
        batches = [(*(o.pixels() for _ in range(1 + plus)), torch.randint(N, (o.B,)))
                   for _ in range(2)]
        script.train_step(job, state, batches, y, clean)
    return step, 2 * o.B


def prompts(o):
    """prompt_align.py learns from features that are kept."""
    job, D = a_job(o), o.model.visual.output_dim
    job.args.ctx = 16
    job.t_hand = F.normalize(torch.randn(o.C, D, device=o.device), dim=1)           # (C, D)
    sets = torch.rand(4 * o.B, o.C) > 0.5                                           # (N, C)
    learner = prompt_align.Learner(job, sets, 1000, [0.5, 0.5])
    f = F.normalize(torch.randn(1, 4 * o.B, D), dim=-1)                             # (1, N, D)

    def step():
        i = torch.randint(4 * o.B, (o.B,))
        prompt_align.train_step(job, learner, 0, 0.5, f[:, i], i)
    return step, o.B


ROWS = {"the usual way": usual, "coft.py, phase 1": partial(two_models, coft, 1),
        "coft.py, phase 2": partial(two_models, coft, 2),
        "coft_plus.py, phase 1": partial(two_models, coft_plus, 1),
        "coft_plus.py, phase 2": partial(two_models, coft_plus, 2),
        "prompt_align.py, features kept": prompts}


def prepare(args, row, C):
    """(step, images per step) of a row."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    e, r, vl, vw, p, length, words, tw, th, tl = ARCHS[args.arch]
    with device:
        model = clip.CLIP(e, r, vl, vw, p, length, words, tw, th, tl).eval().requires_grad_(False)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None,
                       cache_enabled=False)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    x = torch.randint(256, (args.batch_size, r, r, 3), dtype=torch.uint8)
    x = x.pin_memory() if device.type == "cuda" else x
    names = [f"{WORDS[k % 32]} {WORDS[k // 32]}" for k in range(C)]
    return ROWS[row](SimpleNamespace(
        device=device, model=model, names=names, B=args.batch_size, C=C, autocast=autocast,
        scaler=scaler, fused=device.type == "cuda", compiled=args.compile,
        pixels=lambda: data.normalize(x.to(device, non_blocking=True))))


def peak(args, row, C, queue):
    """In a process of its own: the peak memory of it and one step, in GB."""
    prepare(args, row, C)[0]()
    queue.put(data.peak_memory_gb())


def measure(args, row, C):
    """A row of the table as a dict."""
    cuda, found = args.device.startswith("cuda"), {"row": row, "classes": C}
    wait = partial(torch.cuda.synchronize, args.device) if cuda else lambda: None
    if not cuda and args.memory:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        child = context.Process(target=peak, args=(args, row, C, queue))
        child.start()
        child.join()
        found["peak_gb"] = None if child.exitcode else queue.get()
    try:
        plain = copy.copy(args)
        plain.compile = False                       # compiled code is not counted
        with FlopCounterMode(display=False) as counter:
            prepare(plain, row, C)[0]()
        if cuda:                                    # the counter keeps what is computed again
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step, images = prepare(args, row, C)
        for _ in range(args.warmup):
            step()
        times = []
        for _ in range(args.steps):
            wait()
            start = time.perf_counter()
            step()
            wait()
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return {**found, "error": "out of memory"}
    if cuda:
        found["peak_gb"] = data.peak_memory_gb()
    middle, chip = statistics.median(times), torch.cuda.get_device_name(args.device) if cuda else ""
    rate = next((v for k, v in TFLOPS.items() if k in chip), None)
    tflop = counter.get_total_flops() / 1e12
    return {**found, "ms": 1e3 * middle, "least_ms": 1e3 * min(times), "most_ms": 1e3 * max(times),
            "images_per_s": images / middle, "tflop": tflop,
            "of_peak": rate and tflop / middle / rate}


class Decoded(torch.utils.data.Dataset):
    """As torchvision's ImageFolder: each image decoded anew, with a transform for each view."""
    def __init__(self, images, views):
        self.images, self.views = images, views

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images.image(i)
        return tuple(view(image) for view in self.views)


def measure_loader(path, size=224, workers=2):
    """Prints images/s of a weak and a strong view of the training images in `path`, by
    torchvision's transforms on freshly decoded images and by data.py."""
    images = data.load(path, "a,b" if not any(Path(path).glob("*/*")) else None).train
    end = [T.ToTensor(), T.Normalize(MEAN, STD)]
    usual = [T.Compose([T.RandomResizedCrop(size, area, interpolation=T.InterpolationMode.BICUBIC),
                        T.RandomHorizontalFlip(), *more, *end])
             for area, more in (((0.6, 1), []), ((0.4, 1), [T.RandAugment(2, 9)]))]
    plainly = torch.utils.data.DataLoader(Decoded(images, usual), 64, shuffle=True,
                                          num_workers=workers, persistent_workers=True)
    _, weak, strong = views = data.transforms(size)
    print(data.cache_pixels(SimpleNamespace(train=images, test=images), views, 100))
    ours = data.DeviceLoader(images.view(weak, strong), 64, shuffle=True, workers=workers)
    for name, batches in (("torchvision", plainly), ("data.py", ours)):
        for epoch in (1, 2, 3):
            start = time.time()
            for _ in batches:
                pass
            print(f"{name:11} epoch {epoch}: {len(images) / (time.time() - start):5.0f} images/s")


def kept(visual, B, dtype):
    """Bytes that the backward pass of B images keeps, without weights; their casts are counted."""
    known = {v.untyped_storage().data_ptr() for v in visual.parameters()}
    storages = {}                                       # held, so that none takes another's place

    def pack(v):
        storages[v.untyped_storage().data_ptr()] = v.untyped_storage()
        return v
    x = torch.randn(B, 3, *2 * [visual.input_resolution])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v), torch.autocast(
            "cpu", dtype, enabled=dtype is not None):
        visual(x)
    return sum(v.nbytes() for at, v in storages.items() if at not in known)


def estimate(arch, B, dtype):
    """Prints GB of phase 2: CLIP; of both students weights, gradients, Adam's two means; what the
    backward pass of one student's B images keeps, of one block more if the others are computed
    again."""
    e, r, vl, vw, p, length, words, tw, th, tl = ARCHS[arch]
    model, GB = clip.CLIP(e, r, vl, vw, p, length, words, tw, th, tl), 2**30
    visual, found = model.visual, {}
    weights, tower = (sum(v.numel() for v in part.parameters()) for part in (model, visual))
    for visual.checkpointing in (False, True):
        one, three = kept(visual, 1, dtype), kept(visual, 3, dtype)
        image = (three - one) / 2
        found[visual.checkpointing] = one - image + B * image       # casts once
    more = found[False] / vl
    for again, gb in ((False, found[False]), (True, found[True] + more)):
        parts = [4 * weights / GB, 2 * 4 * 4 * tower / GB, gb / GB]
        print(f"| {arch} | {B} | {'yes' if again else 'no'} | "
              f"{' | '.join(f'{v:.2f}' for v in [*parts, sum(parts)])} |", flush=True)


class MadeUp:
    """A student whose logits of C classes are random numbers, class i % C of image i raised."""
    def __init__(self, C):
        self.C = C

    def texts(self, clip_model):
        return torch.zeros(self.C, 1), None

    def __call__(self, clip_model, i, texts):
        l_pos, l_neg = 2 * torch.randn(2, len(i), self.C)                           # (B, C) each
        return None, l_pos.scatter_add_(1, i[:, None] % self.C, torch.full((len(i), 1), 7.0)), l_neg


class Batches:
    """Numbers of N images in the place of their pixels."""
    def __init__(self, N):
        self.N = N

    def __iter__(self):
        return ((i, i) for i in torch.arange(self.N).split(512))


def one_round(N, C, top, plus, threads, device, queue):
    """In a process of its own: coft.py's work on its tables in an epoch of phase 2, no CLIP; plus:
    also coft_plus.py's labels by density (A9), of features (N, 512) on the device."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    coft.TOP, names, seconds, mark = top, [f"class {k}" for k in range(C)], {}, time.time()
    job = SimpleNamespace(autocast=nullcontext, clip_model=None, added={"balance"}, C=C)
    predict = partial(coft.predict, job, top=top)

    def lap(what):
        nonlocal mark
        seconds[what], mark = time.time() - mark, time.time()
    table = predict([MadeUp(C)], Batches(N), False)
    table = coft.Table(*(torch.cat([v, v]) for v in table))
    mark = time.time()
    table = predict([MadeUp(C), MadeUp(C)], Batches(N), True, table, (0.5, 1.0))
    lap("posteriors")
    for q, index in zip(table.p, table.index) if plus else ():      # one student's at a time
        f = torch.zeros(N, 512, dtype=torch.half, device=device)
        for part in f.split(8192):
            part.copy_(F.normalize(torch.randn(part.shape, device=device), dim=1))
        coft_plus.by_density(q, index, q, f, C, 1.0)
        del f
    lap("densities")
    p = coft.guess(job, table)
    lap("balance")
    coft.pseudo_labels(p[0], table.index[0], C, 16)
    lap("S*")
    lesson = coft.select_clean(p, table)
    coft.diagnostics(table, lesson, torch.arange(N) % C)
    coft.complementary_labels(lesson[0], C)
    lap("verdicts")
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"table": tuple(table), "lesson": lesson}, f"{folder}/last.pt")
        lap("last.pt")
        size = Path(folder, "last.pt").stat().st_size / 2**30
        data.write_predictions(f"{folder}/predictions.csv", [f"{i}.jpg" for i in range(N)], names,
                               *(v[0] for v in table))
        lap("predictions.csv")
    peaks = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, (
        torch.cuda.max_memory_allocated() / 2**30)
    queue.put((*peaks, size, seconds))


def measure_scale(numbers, C, threads, device):
    """Prints time and memory of `one_round` with tables of 16 classes an image, for coft.py and
    coft_plus.py, and, up to 100,000 images, of all C."""
    context = multiprocessing.get_context("spawn")
    print("| images | classes held | script | peak GB | GPU GB | last.pt GB | seconds | "
          "posteriors | densities | balance | S* | verdicts | last.pt | predictions.csv |\n|"
          + 14 * "---|", flush=True)
    for N, top, plus in ((N, *way) for N in numbers for way in ((16, 0), (16, 1), (C, 0))
                         if way[0] == 16 or N <= 100_000):
        queue = context.Queue()
        child = context.Process(target=one_round, args=(N, C, top, plus, threads, device, queue))
        child.start()
        *gb, size, seconds = queue.get()
        child.join()
        print(f"| {N:,} | {top} | {'coft_plus' if plus else 'coft'} |",
              " | ".join(f"{v:.2f}" for v in (*gb, size)), "|",
              f"{sum(seconds.values()):.1f} |",
              " | ".join(f"{v:.1f}" for v in seconds.values()), "|", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Speed and memory of the training steps.")
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction}
    add("--loader", metavar="PATH", help="measure the loader on these images, nothing else")
    add("--estimate", default=False, help="memory of phase 2 on a GPU, nothing else", **switch)
    add("--scale", metavar="N,N,...", help="measure the tables of so many images and 1,000 "
        "classes, nothing else")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to measure")
    add("--arch", choices=ARCHS, default="toy", help="shape of the model; its weights are random")
    add("--batch-size", type=int, default=32, help="images per step and model")
    add("--classes", default="300", help="numbers of classes, up to 1024, a table each")
    add("--amp", choices=["bf16", "fp16", "off"], default="off", help="as in the scripts")
    add("--compile", default=False, help="as in coft.py and coft_plus.py", **switch)
    add("--rows", metavar="TEXT", default="", help="only those whose name contains it")
    add("--steps", type=int, default=3, help="that are timed; the median counts")
    add("--warmup", type=int, default=1, help="steps before")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--memory", default=True, help="on a CPU: a process for each row, to see its peak",
        **switch)
    add("--out", metavar="FILE", help="also write the table there, as JSON lines")
    args = parser.parse_args(argv)
    if args.loader:
        return measure_loader(args.loader)
    if args.scale:
        return measure_scale(list(map(int, args.scale.split(","))), 1000, args.threads, args.device)
    if args.estimate:
        print("| arch | images | blocks computed again | CLIP, GB | students and optimiser | "
              "activations | sum |\n|" + 7 * "---|")
        for arch in ARCHS:
            estimate(arch, args.batch_size, {"bf16": torch.bfloat16}.get(args.amp))
        return None
    chip = (torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else
            f"CPU with {args.threads} threads")
    about = dict(torch=torch.__version__, chip=chip, **vars(args))
    print(", ".join(f"{k} {about[k]}" for k in ("chip", "torch", "arch", "batch_size", "amp",
                                                "compile")))
    lines = [about]
    for C in map(int, args.classes.split(",")):
        print(f"\n| {C} classes | ms/step (least-most) | images/s | times the usual | peak GB | "
              f"TFLOP/step | of peak |\n|---|---|---|---|---|---|---|", flush=True)
        base = None
        for row in (r for r in ROWS if args.rows in r):
            m = measure(args, row, C)
            lines.append(m)
            if "error" in m:
                print(f"| {row} | {m['error']} |", flush=True)
                continue
            base = m["images_per_s"] if row == "the usual way" else base
            ratio = f"{m['images_per_s'] / base:.2f}" if base else "-"
            print(f"| {row} | {m['ms']:.1f} ({m['least_ms']:.1f}-{m['most_ms']:.1f}) | "
                  f"{m['images_per_s']:.0f} | {ratio} | {m.get('peak_gb') or '-'} | "
                  f"{m['tflop']:.3g} | {format(m['of_peak'], '.0%') if m['of_peak'] else '-'} |",
                  flush=True)
    if args.out:
        Path(args.out).write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
