"""CoFT: adapt CLIP to your images without a single label (arXiv 2602.04337).

CLIP's own guesses are the labels, and many are wrong. Two students learn, besides the usual prompt
of each class ("positive"), a second prompt ("negative") that says when the first one should not be
believed. Phase 1 trains light modules (prompts and visual tokens) on the most confident guesses;
in phase 2 each student labels all images, the other one throws out labels that it takes for wrong,
and a whole image encoder learns from the rest. `--recipe paper` is this, as published:

    p0 = predict(ZeroShot(t0))                                                          Eq. 1
    y, S* = pseudo_labels(p0, K)            the K most confident images of each class   Eq. 1
    phase 1, both students, from different random numbers, on batches of S*:
        l+, l- = tau f.t_pos, tau f.t_neg       image features, two texts per class     Eq. 2, 3
        loss = loss_cls(l+, y) + lam loss_neg(l+, l-, y, another class)                 Eq. 4-6
    phase 2, for student, peer in ((0, 1), (1, 0)), on batches of its clean images:     3.2.2
        y = the student's label; clean = the peer's p_clean of y > 1/2, for every image Eq. 5
        loss = loss_cls(W v + b, y), a fresh encoder and W, b learn                     Eq. 7
    prediction = mean of the two students' softmax                                      our choice

`--recipe ours`, the default, has other SETTINGS and adds the table ADDITIONS, (A1) ... Most is
won by three: labels are means over many random views of an image (A1), balanced over the classes
(A2); predictions are means over five crops of it (A6). (A8), (A9), (A11): coft_plus.py.

Equation numbers are the paper's. B batch, C classes, D embedding, H classes in a `Table`, L context
tokens, M models, N images, T tokens of a text, W width, but W v + b: the FC layer; tau =
exp(logit_scale); f and t are unit vectors, t0 the zero-shot texts; V+, V- the two prompts.

Run:  python coft.py                                    the demo, offline; 1 to 4 minutes, two cores
      python coft.py --data ./oxford_pets               real data with OpenAI's CLIP: not measured
      python coft.py --data ./photos --classes cat,dog  a folder of unlabelled photos

The paper does not say, so decided here:
  settings  the table SETTINGS (OpenAI's models: `paper` from arXiv 2602.04340, UPL and DeFT's
            code, `ours` untried; tiny: chosen on drawn styles), lam 1, batches of 64
  data      an epoch is N / B steps, however small the set it draws from; training images are random
            crops; a class that is nobody's guess takes its likeliest images
  start     CoOp's templates, in V+ and V- too (ctx > 0: random words as large as CLIP's); W at t0;
            students differ in batches and y_bar too
  steps     momentum 0.9, warm-up, cosine, weight decay 5e-4; in A4 0.01 for the encoder, none
            elsewhere, and V- learns ten times as fast as V+
"""
import argparse
import copy
import math
import os
import sys
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "2000")   # before torch is imported: README, "Speed"
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import five_crop

import clip
import data

# What `--recipe ours` adds to the paper or does otherwise, beside SETTINGS, and where. `ours-fresh`
# leaves one out, `paper+views+balance` adds two.
ADDITIONS = {
    "views":   "A1 labels from posteriors averaged over weak views and epochs: adapt, train_phase",
    "balance": "A2 labels from posteriors balanced over the classes: guess",
    "fresh":   "A3 labels, and so verdicts, anew each epoch of phase 2: train_phase",
    "adam":    "A4 AdamW, rates relative to the size of words, not SGD: start_phase",
    "part":    "A5 models go part of the way: few steps or images, labels not learnt: part_way",
    "crops":   "A6 predict the mean over five crops, as A5 or CLIP lets: with_crops, crops_tell",
    "third":   "A7 --student learns in a phase 3, from what the models of phase 2 predict: adapt",
    "start":   "A10 the FC layer starts no softer than CLIP's posterior: clip_scale",
}
VIEWS = 8           # (A1) of each image, for the first labels
WORD_STD = 0.06     # (A4) of tiny's word vectors, for which lr1 and the noise were chosen
TOP = 16            # classes of an image that a table holds, see Table
WHOLE = 300         # (A5) steps of phase 2 that take its models the whole way
FEW = 4             # (A5) from up to so many images a class nothing is learnt
TIMES = 7           # (--shots) draws of a labelled image per draw of another, at least
# Of (tiny CLIPs, D < 512; OpenAI's models), where no flag says otherwise. k: images per class to
# start from, < 1: a share of N / C, at least 16; ctx: context words, 0: the template's.
SETTINGS = {
    "paper": {"k": (16, 16), "ctx": (0, 16), "peft_size": (4, 20), "lam": (1.0, 1.0),
              "lr1": (0.03, 0.03), "lr2": (0.01, 5e-4), "epochs1": (6, 10), "epochs2": (4, 10)},
    "ours": {"k": (0.25, 0.25), "ctx": (0, 0), "peft_size": (4, 20), "lam": (1.0, 1.0),
             "lr1": (2e-3, 2e-3), "lr2": (3e-4, 1e-5), "epochs1": (4, 4), "epochs2": (12, 12)}}

# ======== equations ========

def logits(f, t, tau):
    """l_k = tau f(x).t_k, in fp32: l+ for t+, l- for t-. f (B, D), t (C, D) -> (B, C)."""
    with torch.autocast(f.device.type, enabled=False):
        return tau * f @ t.T


class Table(NamedTuple):
    """What M models say of N images. Per image it holds the H = min(C, TOP) likeliest classes, the
    others count as 0, in p_clean too: so it grows with N, not with N C. (M, N, H) each."""
    p: torch.Tensor             # softmax, (A1) a running mean over views and epochs, train_phase
    p_clean: torch.Tensor       # Eq. (5)
    index: torch.Tensor         # which class, ascending; int32


def at(values, index, y):
    """The values of the classes y, 0 where an image's H lack it. values, index (..., H), y (...)
    -> (...)."""
    return (values * (index == y[..., None])).sum(dim=-1)


def labels_of(p, index):
    """argmax_k p_k. p, index (..., H) -> (...)."""
    return index.gather(-1, p.argmax(dim=-1, keepdim=True))[..., 0].long()


def pseudo_labels(p0, index, C, K):
    """Eq. (1), S*: y = argmax_k p0_k; confident: per class the K images with the largest p0_y. A
    class that is no image's argmax gets those where its own p0 is largest, even another class's
    last: min(K, ceil(N / C)) at most. p0, index (N, H) -> y (N,), confident (N,) bool."""
    y = labels_of(p0, index)
    for k in set(range(C)) - set(y.tolist()):
        best = at(p0, index, torch.tensor([k])).topk(min(K, math.ceil(len(y) / C)))
        y[best.indices[best.values > 0]] = k
    order = at(p0, index, y).argsort(descending=True, stable=True)
    order = order[y[order].argsort(stable=True)]        # class by class, the surest first
    surest = torch.cat([mine[:K] for mine in order.split(y.bincount().tolist())])
    return y, torch.zeros(len(y), dtype=torch.bool).index_fill(0, surest, True)


def loss_cls(l_pos, y):
    """Eq. (4), (7): -log softmax(l+)_y of each image. l_pos (B, C), y (B,) -> (B,)."""
    return F.cross_entropy(l_pos, y, reduction="none")


def log_p_clean(l_pos, l_neg):
    """Eq. (5): p_clean_k = sigmoid(l+_k - l-_k). (B, C) -> log p_clean, log(1 - p_clean)."""
    return F.logsigmoid(l_pos - l_neg), F.logsigmoid(l_neg - l_pos)


def loss_neg(l_pos, l_neg, y, y_bar):
    """Eq. (6): -log p_clean_y - log(1 - p_clean_ybar) of each image. l (B, C), y and y_bar (B,)
    -> (B,)."""
    log_clean, log_unclean = log_p_clean(l_pos, l_neg)                          # (B, C) each
    return -(log_clean.gather(1, y[:, None]) + log_unclean.gather(1, y_bar[:, None]))[:, 0]


def complementary_labels(y, C):
    """ybar of Eq. (6): any of the other C - 1 classes, all as likely (y itself if C = 1).
    y (B,) -> (B,)."""
    return (y + torch.randint(1, max(2, C), y.shape)) % C


def with_crops(x, share):
    """(A6) V = 6 views: the images, then four corners and the centre, 0.9 of each side (about the
    weak views' mean), scaled up to R; V = 1 if share = 0. (B, 3, R, R) -> (V B, 3, R, R)."""
    if not share:
        return x
    R = x.shape[-1]
    return torch.cat([x, *(F.interpolate(crop, (R, R), mode="bicubic", antialias=True)
                           for crop in five_crop(x, round(0.9 * R)))])


def over_views(p, B, share):
    """(A6) `share` of the mean over the five crops, the rest of the plain image. p (V B, C), see
    with_crops -> (B, C)."""
    plain, *crops = p.split(B)
    return plain.lerp(torch.stack(crops).mean(dim=0), share) if crops else plain


def balanced(p, index, C):
    """(A2) p_k / (mean over all images of p_k), then normalised; 20 times (Sinkhorn's iteration):
    in sum all classes get about the same. p, index (N, H) -> p (N, H)."""
    for _ in range(20):
        mean = torch.zeros(C).index_add_(0, index.flatten(), p.flatten()) / len(p)      # (C,)
        p = p / mean.clamp(min=0.01 / C)[index]
        p = p / p.sum(dim=1, keepdim=True)
    return p


# ======== modules ========

class Prompts(nn.Module):
    """Eq. (2), (3): V+ and V-, each L learnable context vectors before each class name: [V_1] ...
    [V_L] cat. All classes share them. They start from random words, as large as CLIP's; for L = 0
    from the template's words before the class name ("a photo of a" if there are none) and a little
    noise: near CLIP's zero-shot classifier."""
    def __init__(self, clip_model, class_names, template, L):
        super().__init__()
        before, rest = template.split("{}", 1)
        words = before.strip() or "a photo of a"
        if L:                                           # as CoOp's
            words, rest = " ".join(["x"] * L), "."
        n = int(clip.tokenize(words)[0].argmax()) - 1                   # between <sot> and <eot>
        tokens = clip.tokenize([f"{words} {c}{rest}" for c in class_names])
        vectors = clip_model.token_embedding.weight.detach()            # most rows of tiny's are 0
        tokens = tokens[:, :tokens.argmax(dim=1).max() + 1].to(vectors.device)  # (C, T), T: longest
        emb = vectors[tokens]                                           # (C, T, W)
        start = emb[:1, 1:1 + n]                                        # (1, n, W), n: L if not 0
        noise = 0.01 * min(1.0, float(start.std()) / WORD_STD)
        if L:
            start, noise = torch.zeros_like(start), vectors[vectors.any(dim=1)].std()
        self.pos = nn.Parameter(start + noise * torch.randn_like(start))        # V+ (1, n, W)
        self.neg = nn.Parameter(start + noise * torch.randn_like(start))        # V-
        self.register_buffer("emb", emb, persistent=False)              # (C, T, W)
        self.register_buffer("eot", tokens.argmax(dim=1), persistent=False)     # (C,)

    def forward(self, clip_model):
        """-> t+ and t-, unit rows (C, D) in fp32, in one pass."""
        V = torch.cat([self.pos, self.neg])[:, None]                    # (2, 1, n, W)
        V, emb = V.expand(-1, len(self.emb), -1, -1), self.emb.expand(2, -1, -1, -1)
        n = V.shape[2]                                                  # <sot> V class name <eot>
        emb = torch.cat([emb[:, :, :1], V, emb[:, :, 1 + n:]], dim=2)   # (2, C, T, W)
        t = clip_model.encode_text_embeddings(emb, self.eot, 1 + n)     # (2, C, D)
        return F.normalize(t.float(), dim=-1).unbind()


class Adapter(nn.Module):
    """Bottleneck beside the MLP of one block (or after one ResNet stage), as clip/model.py asks;
    starts at 0. Dropout in it: F.dropout(h, p, self.training and torch.is_grad_enabled())."""
    def __init__(self, width, rank):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, site, h):                                         # h (..., W)
        return None if site == "qkv" else self.up(F.relu(self.down(h)))


class Student(nn.Module):
    """One of the two models of phase 1: V+, V- and the light visual modules. CLIP itself is frozen
    and shared. args: peft, peft_size, ctx."""
    def __init__(self, clip_model, class_names, template, args):
        super().__init__()
        self.texts = Prompts(clip_model, class_names, template, args.ctx)
        self.prompts = self.adapters = None             # one of them, see clip/model.py
        widths = clip_model.visual.adapter_widths       # of its blocks
        if args.peft == "vpt":                                          # VPT-deep, arXiv 2203.12119
            start = torch.randn(len(widths), args.peft_size, widths[0])
            self.prompts = nn.Parameter(0.02 * start)
        else:
            self.adapters = nn.ModuleList(Adapter(width, args.peft_size) for width in widths)

    def forward(self, clip_model, x, texts=None):
        """Images (B, 3, R, R), `texts` if they are at hand -> unit features f (B, D), l+ and l-
        (B, C), fp32."""
        f = F.normalize(clip_model.visual(x, self.prompts, self.adapters).float(), dim=-1)
        t_pos, t_neg = texts or self.texts(clip_model)
        tau = clip_model.logit_scale.exp()
        return f, logits(f, t_pos, tau), logits(f, t_neg, tau)

    def param_groups(self, lr1, lr2):
        """(A4) What learns, and how fast."""
        light = [v for k, v in self.named_parameters() if not k.startswith("texts.")]
        word = lr1 * float(self.texts.pos.detach().std()) / WORD_STD
        return [{"params": light, "lr": lr1}, {"params": self.texts.pos, "lr": word},
                {"params": self.texts.neg, "lr": 10 * word}]


class FullModel(nn.Module):
    """Section 3.2.2, Eq. (7): one of the two models of phase 2, a fresh image encoder and an FC
    layer W v + b on its unnormalised features v. W starts at W0 (C, D), the zero-shot texts, (A10)
    times clip_scale; b at 0: (A5) needs every copy to start alike. The student of phase 1,
    frozen, gives p_clean of new images."""
    def __init__(self, clip_model, W0, student):
        super().__init__()
        self.visual = copy.deepcopy(clip_model.visual).requires_grad_(True)
        self.fc = nn.Linear(W0.shape[1], W0.shape[0], device=W0.device)
        self.fc.weight.data.copy_(W0)
        self.fc.bias.data.zero_()
        self.judge = student.requires_grad_(False)

    def forward(self, clip_model, x, texts=None):
        """Images (B, 3, R, R) -> v (B, D), W v + b (B, C), None: there is no l-."""
        v = self.visual(x).float()
        with torch.autocast(v.device.type, enabled=False):
            return v, self.fc(v), None

    def param_groups(self, lr1, lr2):
        """(A4) What learns, and how fast."""
        fc = [v for k, v in self.named_parameters() if not k.startswith(("visual.", "judge."))]
        return [{"params": fc, "lr": lr1},
                {"params": self.visual.parameters(), "lr": lr2, "weight_decay": 0.01}]


# ======== training ========
# job: what a run works with, see data.setup and adapt

def guess(job, table):
    """The posteriors that labels are taken from: p (2, N, H) as it is; (A2) balanced."""
    if "balance" not in job.added:
        return table.p
    return torch.stack([balanced(p, index, job.C) for p, index in zip(table.p, table.index)])


def select_clean(p, table):
    """Section 3.2.2: the labels y (2, N) that each student gives all images, by p (2, N, H), and
    which are clean, (2, N) bool or weights: those that the peer lets pass, p_clean_y > 1/2."""
    y = labels_of(p, table.index)                                               # (2, N)
    return y, at(table.p_clean.flip(0), table.index.flip(0), y) > 0.5


def total_loss(job, number, l_pos, l_neg, target):
    """Phase 1: Eq. (4) + lam Eq. (6); then: Eq. (7). The mean over the clean images, 0 if there are
    none. l (B, C), l_neg None after phase 1; target: y, clean, y_bar, (B,)."""
    y, clean, y_bar = target
    loss = loss_cls(l_pos, y)                                                   # (B,)
    if number == 1:
        loss = loss + job.args.lam * loss_neg(l_pos, l_neg, y, y_bar)
    return (loss * clean).sum() / clean.sum().clamp(min=1)


def warm_cosine(step, total):
    """Learning rate factor: linear warm-up over a tenth, then half a cosine."""
    return min((step + 1) / (0.1 * total + 1), 0.5 + 0.5 * math.cos(math.pi * step / total))


def start_phase(job, number, students, steps):
    """What learns in a phase of so many steps: students, optimiser."""
    args = job.args
    if number > 1:
        students = nn.ModuleList(FullModel(job.full, job.W0, me) for me in students)
    if "adam" in job.added:                                                     # (A4)
        groups = [g for student in students for g in student.param_groups(args.lr1, args.lr2)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=job.device.type == "cuda")
    else:
        optimizer = torch.optim.SGD(students.parameters(), args.lr1 if number == 1 else args.lr2,
                                    momentum=0.9, weight_decay=5e-4)    # frozen: no gradient
    return SimpleNamespace(
        number=number, students=students, optimizer=optimizer,
        forward=data.distributed(students, args.compile),       # averages gradients
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_cosine, total=steps)))


def train_step(job, phase, batches, y, clean):
    """One step of both students, each on its own batch (x, i). y, clean (2, N): see train_phase.
    Returns what the log shows; nll: the mean -log p_y of the clean images."""
    scale, losses, nlls = job.scaler.get_scale(), [], []
    phase.optimizer.zero_grad()
    for m, (x, i) in enumerate(batches):                                        # x (B, 3, R, R)
        i = data.gather(i)                              # of all processes
        y_bar = complementary_labels(y[m, i], job.C)                            # (B,)
        target = [v.to(job.device) for v in (y[m, i], clean[m, i], y_bar)]
        with job.autocast():
            _, *l = phase.forward[m](job.clip_model, x)                         # l+, l- (B, C)
        l = [data.gather(v) for v in l]
        loss = total_loss(job, phase.number, *l, target)
        job.scaler.scale(data.world_size() * loss).backward()       # DDP takes the mean
        losses.append(loss.detach())
        nll = loss_cls(l[0].detach(), target[0]) * target[1]            # (A5) whatever the loss
        nlls.append(nll.sum() / target[1].sum().clamp(min=1))
    job.scaler.step(phase.optimizer)                    # left out if fp16 overflowed,
    job.scaler.update()                                 # which lowers the scale
    skipped = job.scaler.get_scale() < scale
    if not skipped:
        phase.schedule.step()
    return {"loss": sum(losses) / 2, "nll": sum(nlls) / 2, "skipped": int(skipped)}


@torch.no_grad()
def clip_scale(job):
    """(A10) s = max(1, tau / mean |v| over the images): with W = s t0, softmax(W v) is as sharp as
    CLIP's posterior. If it is softer, all labels, wrong ones too, pull at the encoder."""
    length = torch.zeros(job.train.N)
    for x, i in job.train:                                                      # (B, 3, R, R), (B,)
        with job.autocast():
            length[i] = job.full.encode_image(x).float().norm(dim=1).cpu()
    return max(1.0, float(job.full.logit_scale.exp() / data.all_reduce_sum(length).mean()))


@torch.no_grad()
def crops_tell(job, model):
    """(A6) Whether the crops get all the weight, whatever A5 says: if the mutual information of
    image and class, entropy(mean over images of p) - mean of entropy(p), of a crop, on average over
    the five, is over 98 % of the plain image's. If not, crops cut objects off."""
    images, plain = data.some(job.dataset.train), job.train.dataset.transforms
    p = torch.zeros(6, len(images), job.C)
    for x, i in job.load(images.view(*plain)):                                  # (B, 3, R, R), (B,)
        with job.autocast():
            _, l, _ = model(job.clip_model, with_crops(x, 1.0))                 # (6 B, C)
        p[:, i] = l.softmax(dim=1).cpu().unflatten(0, (6, -1))
    p, entropy = data.all_reduce_sum(p), torch.special.entr                     # (6, n, C)
    told = entropy(p.mean(dim=1)).sum(dim=1) - entropy(p).sum(dim=2).mean(dim=1)        # (6,)
    return bool(told[1:].mean() > 0.98 * told[0])


@torch.no_grad()
def part_way(job, models, steps, nll, power=2):
    """(A5) Every weight of the models of phase 2 becomes start + far (learnt - start) (WiSE-FT,
    arXiv 2109.01903), as in small folders wrong labels are learnt by heart. far, which is returned,
    is the product of steps / WHOLE and (N / C - FEW) / 2, each from 0 to 1. At most (2 p)^power, p
    the geometric mean of the labels' probabilities in the last epoch: below 1/2 they were not
    learnt, they only pull. At least K / (K + 1) with K true labels a class."""
    each, K = len(job.dataset.train) / job.C, len(job.known) / job.C
    enough = min(1.0, max(0.0, (each - FEW) / 2))
    learnt = (2 * math.exp(-nll)) ** power              # nll: mean of -log p_y
    far = max(min(enough * min(1.0, steps / WHOLE), learnt), K / (K + 1))
    for me in models:
        for v, v0 in zip(me.parameters(), FullModel(job.full, job.W0, me.judge).parameters()):
            v.copy_(v0.lerp(v, far))
    job.run.say(f"{steps} steps, {each:.0f} images a class: the models go {100 * far:.0f} % of "
                "the way")
    return far


def train_phase(job, number, students, weak, lesson, table):
    """The epochs of a phase, on views made by the transform weak. lesson: y and clean, (2, N) each,
    that are being taught: in phase 1 y and S*, then those of select_clean. table: of plain or (A1)
    weak views. Returns the table and the models after it."""
    args, run, images = job.args, job.run, job.dataset.train
    first = run.state["epoch"] if run.state else 0      # --resume
    loaders = [job.load(images.view(weak), shuffle=True, epoch=first,
                        seed=4 * args.seed + 2 * number + m) for m in range(2)]
    epochs = (args.epochs1, args.epochs2, 2 * args.epochs2)[number - 1]
    steps = min(epochs * len(loaders[0]), args.max_steps or math.inf)
    epochs = math.ceil(steps / len(loaders[0]))
    phase = start_phase(job, number, students, max(1, steps))
    parts = {"scaler": job.scaler, "students": phase.students, "optimizer": phase.optimizer,
             "schedule": phase.schedule}
    if run.state:
        state = run.restore(parts)
        lesson, table = state["lesson"], Table(*state["table"])
    verdict = number == 1                               # from then on phase 1's p_clean stays
    looks = job.train if "views" not in job.added else job.load(                # (A1)
        images.view(weak), epoch=first, seed=4 * args.seed + number)
    for epoch in range(first, epochs):
        if number > 1 and (epoch == 0 or number == 2 and "fresh" in job.added):     # (A3)
            y, clean = select_clean(guess(job, table), table)
            lesson = y, clean if number < 3 else clean >= 0     # (A7) all: V- knows less
        y, clean = lesson                                                       # (2, N) each
        if args.shots:                                  # section 4.4: their true labels
            y[:, job.known], clean[:, job.known] = images.y_true[job.known], True
        for loader, mine in zip(loaders, clean):        # batches of clean images, if any
            among = mine.nonzero()[:, 0].tolist()
            if args.shots:                              # or the labelled drown among them
                part = 1 / 2 if number == 1 else min(1 / 2, args.shots ** 0.5 / 16)    # of a batch
                more = int(len(among) * part / (1 - part) / len(job.known))     # copies of each
                among += max(TIMES - 1, more) * job.known.tolist()
            loader.batch_sampler.among = among
        for batches in run.steps(zip(*loaders), 2 * min(args.batch_size, len(images)),
                                 f"phase {number} epoch {epoch + 1}/{epochs}",
                                 steps - epoch * len(loaders[0])):
            run.rows.append(train_step(job, phase, batches, y, clean))
        means = run.means(f"--lr{min(number, 2)}")
        # (A1) p is the mean over looks at the images: one an epoch, all before the phase as one
        n = epoch + 1 if "views" in job.added else 0
        rate = 1 / (n + 1), 1 / max(1, n) if verdict else 0.0       # of this look in p, p_clean
        if number < 3:                                  # (A7) phase 3 keeps its table
            table = predict(job, phase.students, looks, verdict, table, rate)
        run.report(phase=number, epoch=epoch + 1, **means,
                   accuracy=test_accuracy(job, phase.students),
                   **diagnostics(table, lesson, images.y_true))
        run.checkpoint(parts, phase=number, epoch=epoch + 1, table=tuple(table), lesson=lesson)
    if number > 1:
        far = 1.0
        if "part" in job.added:                         # (A5); phase 3's labels are trusted: 0
            nll = run.lines[-1]["nll"] if number == 2 else 0.0
            far = part_way(job, phase.students, steps, nll)
        if "crops" in job.added:                        # (A6) 1 by crops_tell, or A5's far
            job.crops = max(job.crops, far)
    return table, phase.students


# ======== evaluation ========

class ZeroShot:
    """Eq. (1): CLIP with the texts t0 (C, D), called like a student."""
    def __init__(self, t0):
        self.t0 = t0

    def __call__(self, clip_model, x, texts=None):
        f = F.normalize(clip_model.encode_image(x).float(), dim=-1)             # (B, D)
        return f, logits(f, self.t0, clip_model.logit_scale.exp()), None


@torch.no_grad()
def predict(job, models, loader, verdict=True, before=None, rate=(1.0, 1.0), top=TOP, mean=False,
            crops=0):
    """The `Table` of all images, on the CPU: softmax and, if verdict, their judges' p_clean (else
    1). mean: one table, of their means; crops: the share of over_views; top: H at most. before: the
    last table, which moves towards the new one at the `rate` of (p, p_clean)."""
    judges = [getattr(me, "judge", me) if verdict else me for me in models]     # phase 1: itself
    with job.autocast():                                                        # (C, D) each
        texts = [me.texts(job.clip_model) if isinstance(me, Student) else None for me in judges]
    M = 1 if mean else len(models)
    p, p_clean = torch.zeros(2, M, loader.N, min(job.C, top))                   # (M, N, H) each
    index = torch.zeros(p.shape, dtype=torch.int32)
    for x, i in loader:                                                         # (B, 3, R, R), (B,)
        x, says = with_crops(x, crops), []                                      # (V B, 3, R, R)
        for me, judge, t in zip(models, judges, texts):
            with job.autocast():
                _, l_pos, l_neg = me(job.clip_model, x, t)                      # (V B, C) each
                now = l_pos.softmax(dim=1)
                if me is not judge:
                    _, l_pos, l_neg = judge(job.clip_model, x, t)
            clean = log_p_clean(l_pos, l_neg)[0].exp() if verdict else torch.ones_like(now)
            says.append(torch.stack([over_views(v, len(i), crops) for v in (now, clean)]).cpu())
        says = torch.stack(says)                                                # (M, 2, B, C)
        for m, new in enumerate(says.mean(dim=0, keepdim=True) if mean else says):
            if before:                                                          # new (2, B, C)
                old, k = torch.stack([v[m, i] for v in before[:2]]), before.index[m, i].long()
                old = torch.zeros_like(new).scatter(2, k.expand_as(old), old)
                new = old.lerp(new, torch.tensor(rate)[:, None, None])
            best = new[0].topk(p.shape[2]).indices.sort().values                # (B, H)
            p[m, i], p_clean[m, i] = new.gather(2, best.expand(2, -1, -1))
            index[m, i] = best.int()
    return Table(*map(data.all_reduce_sum, (p, p_clean, index)))


def test_accuracy(job, models):
    """Percent of the plain test images, or None if their labels are not known."""
    if job.dataset.test.y_true is None:
        return None
    table = predict(job, models, job.test, verdict=False, mean=True)
    return data.accuracy(labels_of(table.p, table.index)[0], job.dataset.test.y_true)


def diagnostics(table, lesson, y_true):
    """How good the filter is, over both models. Of the labels just learnt from:
        kept                    the share that is clean
        unfiltered, precision   how many are right: of all, of the clean ones
    Of those that the table would give now (before A2):
        shared_errors           how many of the first one's wrong labels the second gives too
        auroc, auroc_softmax    whether the peer's p_clean (softmax) ranks the right ones first
    """
    y, clean = lesson                                                   # (2, N) each
    facts = {"kept": clean.double().mean()}
    if y_true is not None:                                              # diagnostics only
        right, labels = (y == y_true).double(), labels_of(table.p, table.index)     # (2, N) each
        wrong = labels[0] != y_true                                     # (N,)
        facts |= {"precision": (right * clean).sum() / clean.sum(), "unfiltered": right.mean(),
                  "shared_errors": (labels[0] == labels[1])[wrong].double().mean()}
        for key, v in ("auroc", table.p_clean), ("auroc_softmax", table.p):
            given = at(v.flip(0), table.index.flip(0), labels)          # (2, N)
            facts[key] = sum(data.auroc(a, k == y_true) for a, k in zip(given, labels)) / len(y)
    return {k: None if math.isnan(v) else round(float(v), 4) for k, v in facts.items()}


# ======== after the run ========

class Adapted(nn.Module):
    """What a run learnt: preprocessed images (B, 3, R, R) -> probabilities of the classes (B, C),
    the mean of both students' and (A6) of five crops. Has .class_names, and .preprocess: PIL image
    -> (3, R, R)."""
    def __init__(self, saved, clip_model, full, preprocess=None):
        super().__init__()
        self.class_names, self.preprocess = saved["class_names"], preprocess
        self.crops, self.clip_model, weights = saved["crops"], clip_model, saved["models"]
        models = [Student(clip_model, self.class_names, saved["templates"][0],
                          SimpleNamespace(**saved["light"])) for _ in range(2)]
        if "0.fc.weight" in weights:                    # after phase 2
            models = [FullModel(full, weights["0.fc.weight"], me) for me in models]
        self.models = nn.ModuleList(models)
        data.fill(self.models, weights)
        self.to(clip_model.logit_scale.device).requires_grad_(False).eval()

    def forward(self, x):
        views = with_crops(x, self.crops)                               # (V B, 3, R, R)
        p = sum(me(self.clip_model, views)[1].softmax(dim=1) for me in self.models)
        return over_views(p / len(self.models), len(x), self.crops)


def load(path, device="cpu", weights=None, student=None):
    """The `Adapted` model of a run's model.pt; weights, student: its CLIP and --student's, if they
    lie elsewhere now. Raises data.DataError, clip.CLIPError."""
    return Adapted(*data.read_model(path, "coft", weights, device, student))


def finish(job, models, zero=None):
    """The files of the run folder, and the last line of its log."""
    args = job.args
    if not args.load:
        data.save_model(job, models, recipe=args.recipe, student=args.student, crops=job.crops,
                        light={"peft": args.peft, "peft_size": args.peft_size, "ctx": args.ctx})
    table = predict(job, models, job.test, mean=True, crops=job.crops)          # (A6)
    data.write_results(job, *(v[0] for v in table), zero, crops=job.crops)
    if args.export:
        t = data.export_clip(job, models[0])            # of job.clip_model, from here on
        percent = test_accuracy(job, [ZeroShot(t)])
        job.run.say(f"{args.export} and {args.export}.classes: one model's encoder and W alone, no "
                    f"crops; accuracy {'unknown' if percent is None else percent}")


# ======== main ========

def adapt(args):
    """The whole run: CLIP's guesses, phase 1, phase 2, the files."""
    base, added = data.recipe(args.recipe, ADDITIONS)
    rates = SETTINGS["ours" if "adam" in added else "paper"]    # they go with the optimiser
    job = data.setup(args, SETTINGS[base] | {k: rates[k] for k in ("lr1", "lr2")})
    job.added = added
    run, dataset, clip_model, names = job.run, job.dataset, job.clip_model, job.dataset.class_names
    # job has what data.setup says, also added, autocast, scaler, crops (A6), W0 (Eq. 7's), known
    # mixed precision: weights stay fp32; fp16's small gradients need their loss scaled
    job.autocast = partial(torch.autocast, job.device.type, job.amp_dtype,
                           enabled=job.amp_dtype is not None, cache_enabled=False)  # --compile
    job.scaler = torch.amp.GradScaler(job.device.type, enabled=job.amp_dtype == torch.float16)
    job.crops = job.saved["crops"] if args.load else 0.0
    other = job.full                                    # --student's, or the same
    if args.load:
        return finish(job, Adapted(job.saved, clip_model, other).models)
    vit = hasattr(clip_model.visual, "transformer")
    args.peft = args.peft or ("vpt" if vit else "adapter")
    if args.peft == "vpt" and not vit:
        raise data.DataError("--peft vpt needs a ViT; a ResNet takes --peft adapter")
    job.known = data.few_shot(dataset.train.y_true, args.shots, args.seed) if args.shots else []

    # CLIP's own guesses, and the confident ones among them
    prompts = [[template.format(c) for template in dataset.templates] for c in names]
    starts = {one: clip.zeroshot_classifier(one, prompts) for one in {clip_model, other}}
    t0 = starts[clip_model]                                                     # (C, D)
    zero = test_accuracy(job, [ZeroShot(t0)])
    data.report_zero_shot(job, zero)
    job.crops = float("crops" in added and crops_tell(job, ZeroShot(t0)))       # (A6)
    weak, _ = data.augmented_views(job, lambda view: predict(
        job, [ZeroShot(t0)], job.load(view), False, top=len(names)).p[0])       # (n, C)
    looks, views, table = job.train, 1, None
    if "views" in added:                                                        # (A1)
        looks, views = job.load(dataset.train.view(weak), seed=args.seed), VIEWS
    for n in range(views):
        table = predict(job, [ZeroShot(t0)], looks, False, table, (1 / (n + 1), 1.0))
    table = Table(*(torch.cat([v, v]) for v in table))                          # both students'
    K = math.ceil(args.k if args.k >= 1 else max(16, args.k * len(dataset.train) / job.C))
    y, confident = pseudo_labels(guess(job, table)[0], table.index[0], len(names), K)   # (N,) each
    lesson = torch.stack([y, y]), torch.stack([confident, confident])           # for both students

    # two students, which differ in their random numbers, learn from each other
    students = nn.ModuleList(Student(clip_model, names, dataset.templates[0], args)
                             for _ in range(2)).to(job.device)
    phases = (1, 2, 3) if args.student and "third" in added else (1, 2)         # (A7)
    for number in phases if args.epochs2 else (1,):
        job.full = other if number == phases[-1] else clip_model
        if run.state and run.state["phase"] > number:
            continue
        scale = clip_scale(job) if number > 1 and "start" in added else 1.0     # (A10)
        job.W0 = scale * starts[job.full]
        if number == 3 and not run.state:
            table = predict(job, models, job.train, crops=job.crops)            # (2, N, H) each
        table, models = train_phase(job, number, students, weak, lesson, table)
        if args.epochs1:                                # without, nobody judges
            y, clean = (v[0] for v in select_clean(guess(job, table), table))    # (N,) each
            data.pseudo_label_sheet(run.out / "pseudo_labels.png", dataset.train, names, y, clean,
                                    at(table.p_clean[1], table.index[1], y))

    finish(job, models, zero)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data.add_common(parser, "coft", 64, "images per step and student, of all processes")
    add = parser.add_argument
    add("--recipe", default="ours", metavar="R", help="paper (as published), ours, or a change of "
        "one of them: ours-fresh, paper+views+balance; the table ADDITIONS (%(default)s)")
    add("--peft", choices=["vpt", "adapter"], help="light visual modules: deep prompt tokens (a "
        "ViT's default), or bottlenecks beside the MLPs (a ResNet's)")
    add("--shots", type=int, default=0, metavar="K", help="labelled images per class (%(default)s)")
    add("--student", metavar="ARCH|FILE", type=data.on_disk, help="another CLIP, whose image "
        "encoder learns last and predicts")
    add("--epochs1", type=int, help="of phase 1; 0: nothing is filtered, p_clean says nothing; "
        "default of this and the next three: the table SETTINGS")
    add("--epochs2", type=int, help="of phase 2; 0 leaves it out; phase 3's are twice as many")
    add("--lr1", type=float, help="of prompts, light modules and (A4) the FC layer")
    add("--lr2", type=float, help="of the image encoder")
    add("--compile", action="store_true", help="torch.compile; on a GPU CUDA graphs: for long runs")
    add("--export", metavar="FILE", help="also write one model as a plain CLIP")
    return parser.parse_args(argv)


def main(argv=None):
    """Command line. Returns the exit status, see `data.command_line`."""
    return data.command_line(adapt, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
