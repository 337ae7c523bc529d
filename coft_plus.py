"""CoFT+: CoFT with three parts more (same paper, arXiv 2602.04337).

Read coft.py first; its letters are used here, and Q keys in the queue.

`diff coft.py coft_plus.py` shows the three, and additions of ours, (A8), (A9) and (A11): sentences
that an LLM wrote help the first guess; phase 1 goes in rounds, each from the labels of the last; in
phase 2 a momentum-contrastive loss learns from two views of every image, whether its label is
trusted or not. `--recipe paper`:

    p0, from t0_k = mean text feature of the sentences about class k            section 3.3.3
    phase 1 of coft.py in rounds, with new students, each from its own          section 3.3.1
        y, S* = pseudo_labels(p, K), p what the student of the last round says
    phase 2, on batches of all images:
        loss += gamma info_nce(q of a view, k of another view from an EMA copy) Eq. 8-10

Run:  python coft_plus.py                               the demo, offline; README.md has results
      python coft_plus.py --data ./oxford_pets          with our sentences, prompts/oxford_pets.json
      python coft_plus.py --data ./photos --classes cat,dog --prompts mine.json

`--recipe ours` takes the sentences, and one student's prompts start at them, so that the two err
differently (A8); but one round and gamma 0: on its labels more rounds and the contrast as published
won nothing (.ci/results.md). In their place (A9): an image encoder that is being adapted gathers
the images of a class, whatever some of their labels say. So after phase 1, and again after a third
of phase 2, each class gets a Gaussian in the features; its density times the model's posterior
joins the labels' running mean, and the peer's Gaussians, not its V-, call them clean. Likelihood
decides whether classes are held to equal sizes (A2): if that costs little after phase 1, and steps
are not few, Gaussians label after each epoch of phase 2's first third, else only at its end; if it
costs much then, (A2) stops. Later epochs add the models' own posteriors to the labels' running
mean, and in the end the models predict by Gaussians too (A11): with few images most is won there.
That takes five crops anyway, so their softmax counts as far as A5 lets; coft.py's crops_tell won
nothing here.

The paper does not say, so decided here, beyond coft.py: three rounds, gamma 0.1, temperature 0.1,
mu 0.99 at most, a queue of half an epoch or 16 batches at most; classes without sentences get the
template.
"""
import argparse
import copy
import math
import os
import sys
from functools import partial
from pathlib import Path
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
    "crops":   "A6 the models of phase 2 predict the mean over five crops, as A5 lets: with_crops",
    "third":   "A7 --student learns in a phase 3, from what the models of phase 2 predict: adapt",
    "mix":     "A8 t0 counts the template too; FC layers and one student start at t0: adapt",
    "gauss":   "A9 phase 2's labels, verdicts: where the features crowd; needs A3: ask_density",
    "start":   "A10 the FC layer starts no softer than CLIP's posterior: clip_scale",
    "head":    "A11 phase 2's models predict by the features' density too; needs A6: fit_head",
}
VIEWS = 8           # (A1) of each image, for the first labels
WORD_STD = 0.06     # (A4) of tiny's word vectors, for which lr1 and the noise were chosen
TOP = 16            # classes of an image that a table holds, see Table
WHOLE = 300         # steps of phase 2 that are not few: part_way (A5), train_phase (A9)
FEW = 4             # (A5), (A11) from up to so many images a class nothing is learnt
NATS = 0.8, 1.0     # (A9) nats an image that equal class sizes may cost: after phase 1, in phase 2
SHRINK = 0.2        # (A9), (A11) at most this share of the covariance is a multiple of I
ROOT = 8            # (A11) the 8th root of the density: its D features are not independent
FIT = 2**17         # (A9) Gaussians are fitted to so many images, or up to twice
TIMES = 7           # (--shots) draws of a labelled image per draw of another, at least
# Of (tiny CLIPs, D < 512; OpenAI's models), where no flag says otherwise. k: images per class to
# start from, < 1: a share of N / C, at least 16; ctx: context words, 0: the template's.
SETTINGS = {
    "paper": {"k": (16, 16), "ctx": (0, 16), "peft_size": (4, 20), "lam": (1.0, 1.0),
              "lr1": (0.03, 0.03), "lr2": (0.01, 5e-4), "epochs1": (4, 10), "epochs2": (4, 10),
              "gamma": (0.1, 0.1), "rounds": (3, 3)},
    "ours": {"k": (0.25, 0.25), "ctx": (0, 0), "peft_size": (4, 20), "lam": (1.0, 1.0),
             "lr1": (2e-3, 2e-3), "lr2": (3e-4, 1e-5), "epochs1": (4, 4), "epochs2": (12, 12),
             "gamma": (0.0, 0.0), "rounds": (1, 1)}}

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


def info_nce(q, k, queue, temperature=0.1):
    """Eq. (8): mean of -log softmax(q.keys / temperature)_own. Image b has its own key, k_b,
    and the queue's (MoCo, arXiv 1911.05722). Unit rows q, k (B, D), queue (Q, D)."""
    l = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1)       # (B, 1 + Q)
    return F.cross_entropy(l / temperature, torch.zeros(len(l), dtype=torch.long, device=l.device))


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
        self.register_buffer("shift", torch.zeros(len(class_names), clip_model.visual.output_dim))
        # (A8) from the template's texts to t0, of one student

    def forward(self, clip_model):
        """-> t+ and t-, unit rows (C, D) in fp32, in one pass."""
        V = torch.cat([self.pos, self.neg])[:, None]                    # (2, 1, n, W)
        V, emb = V.expand(-1, len(self.emb), -1, -1), self.emb.expand(2, -1, -1, -1)
        n = V.shape[2]                                                  # <sot> V class name <eot>
        emb = torch.cat([emb[:, :, :1], V, emb[:, :, 1 + n:]], dim=2)   # (2, C, T, W)
        t = clip_model.encode_text_embeddings(emb, self.eot, 1 + n)     # (2, C, D)
        return F.normalize(F.normalize(t.float(), dim=-1) + self.shift, dim=-1).unbind()


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


class Keys(nn.Module):
    """Eq. (9), (10): an image encoder that follows a student's slowly makes the keys; the last Q of
    them wait in a queue, first in, first out, random directions at the start."""
    def __init__(self, visual, Q):
        super().__init__()
        self.visual = copy.deepcopy(visual).requires_grad_(False)
        queue = F.normalize(torch.randn(Q, visual.output_dim), dim=1)
        self.register_buffer("queue", queue)                                    # (Q, D) unit rows

    def push(self, k):
        """k (B, D) take the places of the B oldest."""
        self.queue.copy_(torch.cat([self.queue, k])[-len(self.queue):])

    def follow(self, visual, mu):
        """Eq. (10)."""
        for slow, fast in zip(self.visual.parameters(), visual.parameters()):
            slow.lerp_(fast.detach(), 1 - mu)


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
        self.register_buffer("gauss_W", torch.zeros_like(W0))           # (A11) see posterior,
        self.register_buffer("gauss_b", torch.zeros_like(W0[:, 0]))     # 0: says nothing
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


def next_labels(job, table):
    """Section 3.3.1: a round's y and S*, (2, N) each, of each student its own."""
    y, confident = zip(*(pseudo_labels(p, index, job.C, job.K)
                         for p, index in zip(guess(job, table), table.index)))
    return torch.stack(y), torch.stack(confident)


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
    """What learns in a phase of so many steps: students, keys, optimiser."""
    args = job.args
    if number > 1:
        students = nn.ModuleList(FullModel(job.full, job.W0, me) for me in students)
    if "adam" in job.added:                                                     # (A4)
        groups = [g for student in students for g in student.param_groups(args.lr1, args.lr2)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=job.device.type == "cuda")
    else:
        optimizer = torch.optim.SGD(students.parameters(), args.lr1 if number == 1 else args.lr2,
                                    momentum=0.9, weight_decay=5e-4)    # frozen: no gradient
    Q = args.batch_size * math.ceil(min(16, len(job.dataset.train) / 2 / args.batch_size))
    keys = [Keys(me.visual, Q) for me in students] if number == 2 and args.gamma else []
    return SimpleNamespace(
        number=number, students=students, optimizer=optimizer,
        keys=nn.ModuleList(keys).to(job.device),
        forward=data.distributed(students, args.compile),       # averages gradients
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_cosine, total=steps)))


def train_step(job, phase, batches, y, clean):
    """One step of both students, each on its own batch (x, x_key, i) or (x, i). y, clean (2, N):
    see train_phase. Returns what the log shows; nll: the mean -log p_y of the clean images."""
    scale, losses, nlls, contrasts = job.scaler.get_scale(), [], [], []
    phase.optimizer.zero_grad()
    for m, (x, *x_key, i) in enumerate(batches):                                # x (B, 3, R, R)
        i = data.gather(i)                              # of all processes
        y_bar = complementary_labels(y[m, i], job.C)                            # (B,)
        target = [v.to(job.device) for v in (y[m, i], clean[m, i], y_bar)]
        with job.autocast():
            v, *l = phase.forward[m](job.clip_model, x)                 # (B, D); l+, l- (B, C)
        l = [data.gather(v) for v in l]
        loss = total_loss(job, phase.number, *l, target)
        losses.append(loss.detach())                    # of the labels alone
        nll = loss_cls(l[0].detach(), target[0]) * target[1]            # (A5) whatever the loss
        nlls.append(nll.sum() / target[1].sum().clamp(min=1))
        if phase.keys:                                  # Eq. 8-10; keys have no gradient
            keys = phase.keys[m]
            with torch.no_grad(), job.autocast():
                k = keys.visual(*x_key).float()                                 # (B, D)
            q, k = (F.normalize(data.gather(u), dim=-1) for u in (v, k))
            contrast = job.args.gamma * info_nce(q, k, keys.queue.clone())
            contrasts.append(contrast.detach())
            loss = loss + contrast
            keys.push(k)
        job.scaler.scale(data.world_size() * loss).backward()       # DDP takes the mean
    job.scaler.step(phase.optimizer)                    # left out if fp16 overflowed,
    job.scaler.update()                                 # which lowers the scale
    skipped = job.scaler.get_scale() < scale
    if not skipped:
        phase.schedule.step()
        n = phase.schedule.last_epoch                   # steps so far
        for keys, student in zip(phase.keys, phase.students):
            keys.follow(student.visual, min(0.99, n / (n + 9)))
    contrast = {"contrast": sum(contrasts) / 2} if phase.keys else {}
    return {"loss": sum(losses) / 2, "nll": sum(nlls) / 2, **contrast, "skipped": int(skipped)}


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


def train_phase(job, number, round, students, weak, lesson, table):
    """The epochs of a phase, on views made by the transform weak. lesson: y and clean, (2, N) each,
    that are being taught: in phase 1 y and S*, then those of select_clean. table: of plain or (A1)
    weak views. Returns the table and the models after it."""
    args, run, images = job.args, job.run, job.dataset.train
    first = run.state["epoch"] if run.state else 0      # --resume
    views = [weak, weak] if number == 2 and args.gamma else [weak]      # Eq. 8 compares two
    loaders = [job.load(images.view(*views), shuffle=True, epoch=first,
                        seed=4 * args.seed + 2 * number + m + 1000 * round) for m in range(2)]
    epochs = (args.epochs1, args.epochs2, 2 * args.epochs2)[number - 1]
    steps = min(epochs * len(loaders[0]), args.max_steps or math.inf)
    epochs = math.ceil(steps / len(loaders[0]))
    phase = start_phase(job, number, students, max(1, steps))
    parts = {"scaler": job.scaler, "students": phase.students, "optimizer": phase.optimizer,
             "schedule": phase.schedule, "keys": phase.keys}
    third, asked = math.ceil(epochs / 3), []            # (A9) after which epochs Gaussians speak
    if run.state:
        state = run.restore(parts)
        lesson, table = state["lesson"], Table(*state["table"])
        job.added, asked = set(state["added"]), state["asked"]
    elif number == 2 and {"gauss", "fresh"} <= job.added:       # once in the features of phase 1
        table, early = ask_density(job, students, table, 1 / 2, NATS[0])
        often = early and steps >= WHOLE                # few steps: they would confirm themselves
        asked = [*range(1 if often else third, third + 1)]
    verdict = number == 1                               # then phase 1's p_clean stays, or A9's
    seen = first - sum(epoch <= first for epoch in asked)       # looks so far: none where asked
    looks = job.train if "views" not in job.added else job.load(                # (A1)
        images.view(weak), epoch=seen, seed=4 * args.seed + number + 1000 * round)
    for epoch in range(first, epochs):
        if number > 1 and (epoch == 0 or number == 2 and "fresh" in job.added):     # (A3)
            y, clean = select_clean(guess(job, table), table)
            lesson = y, clean if number < 3 else clean >= 0     # (A7) all: V- knows less
        y, clean = lesson                                                       # (2, N) each
        if args.shots:                                  # section 4.4: their true labels
            y[:, job.known], clean[:, job.known] = images.y_true[job.known], True
        for loader, mine in zip(loaders, clean):        # batches of clean images, or for Eq. 8 all
            among = ((mine > 0) | bool(phase.keys)).nonzero()[:, 0].tolist()
            if args.shots:                              # or the labelled drown among them
                part = 1 / 2 if number == 1 else min(1 / 2, args.shots ** 0.5 / 16)    # of a batch
                more = int(len(among) * part / (1 - part) / len(job.known))     # copies of each
                among += max(TIMES - 1, more) * job.known.tolist()
            loader.batch_sampler.among = among if args.shots or not phase.keys else []
        for batches in run.steps(zip(*loaders), 2 * min(args.batch_size, len(images)),
                                 f"phase {number} round {round + 1} epoch {epoch + 1}/{epochs}",
                                 steps - epoch * len(loaders[0])):
            run.rows.append(train_step(job, phase, batches, y, clean))
        means = run.means(f"--lr{min(number, 2)}")
        # (A1) p is the mean over looks at the images: one an epoch, all before the phase as one
        n = epoch + 1 if "views" in job.added else 0
        rate = 1 / (n + 1), 1 / max(1, n) if verdict else 0.0       # of this look in p, p_clean
        if epoch + 1 in asked:
            table, even = ask_density(job, phase.students, table, rate[0], NATS[1])
            if epoch + 1 == third and "balance" in job.added and not even:
                job.added = job.added - {"balance"}
                run.say("classes are not equally large: labels are no longer balanced (A2)")
        elif number < 3:
            table = predict(job, phase.students, looks, verdict, table, rate)
        run.report(phase=number, round=round + 1, epoch=epoch + 1, **means,
                   accuracy=test_accuracy(job, phase.students),
                   **diagnostics(table, lesson, images.y_true))
        run.checkpoint(parts, phase=number, round=round, epoch=epoch + 1, table=tuple(table),
                       lesson=lesson, added=sorted(job.added), asked=asked)
    if number > 1:
        far = 1.0
        if "part" in job.added:                         # (A5); phase 3's labels are trusted: 0
            power = 4 if {"head", "crops"} <= job.added else 2      # (A11) makes up for the rest
            nll = run.lines[-1]["nll"] if number == 2 else 0.0
            far = part_way(job, phase.students, steps, nll, power)
        job.crops = far * ("crops" in job.added)        # (A6) as far as they have left CLIP
        if job.crops and "head" in job.added and len(images) > FEW * job.C:    # (A11) not of fewer
            fit_head(job, phase.students, table.index)
    return table, phase.students


# ======== (A9): where the features crowd ========

def gaussians(f, q, index, C):
    """Linear discriminant analysis: a Gaussian for each class, all with the same covariance, from
    the images' shares q in their classes; a class of less than one image is filled up with the mean
    of all. f (N, D), q, index (N, H). Returns W (C, D), b (C,) and root (D, D), the covariance's
    Cholesky factor: see log_density."""
    (N, D), device = f.shape, f.device
    size = mean = cov = 0.0
    for v, k, share in zip(f.split(2048), index.split(2048), q.split(2048)):    # (B, D), (B, H)
        v, k, share = v.float(), k.long().to(device), share.to(device)
        share = torch.zeros(len(v), C, device=device).scatter(1, k, share)      # (B, C)
        size, mean, cov = size + share.sum(dim=0)[:, None], mean + share.T @ v, cov + v.T @ v
    size = size.clamp(min=1e-6)
    mean = mean / size
    cov = cov / N - (mean * size / N).T @ mean
    mean = mean.lerp((mean * size).sum(dim=0) / N, (1 - size).clamp(min=0))     # of hardly an image
    ball = cov.diagonal().mean().clamp(min=1e-5 * (N + D) / D) * torch.eye(D, device=device)
    part = min(SHRINK, D / (N + D))                             # the more, the fewer images
    root = torch.linalg.cholesky(cov.lerp(ball, part))                          # (D, D)
    W = torch.cholesky_solve(mean.T, root).T                                    # (C, D)
    return W, -(W * mean).sum(dim=1) / 2, root


def log_density(f, index, W, b, root):
    """log N(f; mean of class k, covariance), but for a constant: W_k f + b_k, less what all classes
    share. f (N, D), index (N, H) -> (N, H)."""
    found = []
    for v, k in zip(f.split(2048), index.split(2048)):                          # (B, D), (B, H)
        v = v.float()
        white = torch.linalg.solve_triangular(root, v.T, upper=False)           # (D, B)
        shared = white.square().sum(dim=0) / 2 + root.diagonal().log().sum()    # (B,)
        found.append((v @ W.T + b - shared[:, None]).gather(1, k.long().to(f.device)).cpu())
    return torch.cat(found)


def by_density(q, index, p, f, C, nats):
    """A student's labels by its posterior p times the density of the features f (see `features`).
    Three steps of EM from q, the table's posterior, fit the Gaussians, to every n-th image of a
    large folder. Classes are held to the same size (A2) if that costs less than so many nats of
    likelihood an image. q, index, p (N, H), f (N, D). Returns the new q (N, H), whether they were
    held, and W, b of `gaussians`."""
    some = slice(None, None, max(1, len(f) // FIT))

    def times(prior, d, index, held):
        p = (prior.clamp(min=1e-9).log() + d).softmax(dim=1)                    # (N, H)
        return balanced(p, index, C) if held else p

    def em(held):
        prior, d = q[some], 0.0
        for _ in range(3):
            fit = gaussians(f[some], times(prior, d, index[some], held), index[some], C)
            prior, d = p[some], log_density(f[some], index[some], *fit)         # (N / n, H) each
        return fit, float(d.logsumexp(dim=1).mean())

    (free, ll_free), (held, ll_held) = em(False), em(True)              # mean log-likelihoods
    even = data.broadcast_from_rank0(lambda: ll_free - ll_held < nats)  # GPUs differ in rounding
    W, b, root = held if even else free
    return times(p, log_density(f, index, W, b, root), index, even), even, (W, b)


@torch.no_grad()
def features(job, model, index):
    """What a model says of the training images: the softmax of the classes index (N, H), and
    features (N, D), means over five crops of both. The features are all held at once, on the GPU if
    it is CUDA's: 1.3 GB for 1.28 million images and D = 512."""
    with job.autocast():
        texts = model.texts(job.clip_model) if isinstance(model, Student) else None
    p, f = torch.zeros(index.shape), torch.zeros(
        len(index), getattr(model, "visual", job.clip_model.visual).output_dim, dtype=torch.half,
        device=job.device if job.device.type == "cuda" else "cpu")
    for x, i in job.train:                                                      # (B, 3, R, R), (B,)
        x = with_crops(x, 1.0)[len(i):]                                         # (5 B, 3, R, R)
        with job.autocast():
            v, l_pos, _ = model(job.clip_model, x, texts)                       # (5 B, D), (5 B, C)
        now, v = (u.unflatten(0, (5, -1)).mean(dim=0)                           # (B, C), (B, D)
                  for u in (l_pos.softmax(dim=1), F.normalize(v, dim=1)))
        p[i], f[i] = now.cpu().gather(1, index[i].long()), v.to(f)
    return data.all_reduce_sum(p), data.all_reduce_sum(f)


def ask_density(job, models, table, rate, nats):
    """The table after the Gaussians were asked: p moves towards their posterior at `rate`, p_clean
    is it. And whether both models' classes were held to the same size: see by_density."""
    nats = nats if "balance" in job.added else -math.inf
    q, held, _ = zip(*(by_density(q, index, *features(job, me, index), job.C, nats)
                       for me, q, index in zip(models, table.p, table.index)))
    q = torch.stack(q)                                                          # (2, N, H)
    return table._replace(p=table.p.lerp(q, rate), p_clean=q), all(held)


@torch.no_grad()
def fit_head(job, models, index):
    """(A11) The Gaussians that the models of phase 2 predict by, after part_way. EM starts from
    what they say of the training images, classes index (2, N, H)."""
    nats = NATS[1] if "balance" in job.added else -math.inf
    for me, k in zip(models, index):
        p, f = features(job, me, k)
        _, _, (W, b) = by_density(p, k, p, f, job.C, nats)
        me.gauss_W.copy_(W / ROOT)
        me.gauss_b.copy_(b / ROOT)


def posterior(me, v, l, B, crops):
    """What a model says of B images, from v (V B, D) and l (V B, C) of their views: (B, C). (A11)
    After phase 2 times the root of the density of their features, means over the five crops."""
    p = over_views(l.softmax(dim=1), B, crops)
    if not isinstance(me, FullModel):
        return p
    with torch.autocast(v.device.type, enabled=False):
        f = over_views(F.normalize(v, dim=1), B, 1.0)                           # (B, D)
        return (p.log() + f @ me.gauss_W.T + me.gauss_b).softmax(dim=1)


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
                v, l_pos, l_neg = me(job.clip_model, x, t)          # (V B, D), (V B, C) each
                now = posterior(me, v, l_pos, len(i), crops)                    # (B, C)
                if me is not judge:
                    _, l_pos, l_neg = judge(job.clip_model, x, t)
            clean = (over_views(log_p_clean(l_pos, l_neg)[0].exp(), len(i), crops) if verdict
                     else torch.ones_like(now))
            says.append(torch.stack([now, clean]).cpu())
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
        says = [posterior(me, *me(self.clip_model, views)[:2], len(x), self.crops)
                for me in self.models]                                  # (B, C) each
        return sum(says) / len(says)


def load(path, device="cpu", weights=None, student=None):
    """The `Adapted` model of a run's model.pt; weights, student: its CLIP and --student's, if they
    lie elsewhere now. Raises data.DataError, clip.CLIPError."""
    return Adapted(*data.read_model(path, "coft_plus", weights, device, student))


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

def load_prompts(path, class_names):
    """Section 3.3.3: C lists of sentences from a JSON file {class name: [sentence, ...]}, whose
    names may differ in case, punctuation and the order of their words. {} in a sentence becomes the
    class. A class without any has an empty list, and a warning names it. Raises DataError."""
    def words(name):
        return sorted(data.plain_name(name).split())
    table = data.read_json(path)
    if not isinstance(table, dict) or not all(
            isinstance(texts, list) and all(isinstance(text, str) for text in texts)
            for texts in table.values()):
        raise data.DataError(f'{path}: expected {{"class name": ["sentence", ...], ...}}')
    keys, sentences, unused = list(table), [], dict.fromkeys(table)
    for c in class_names:
        found = data.meant(c, keys) or [k for k, key in enumerate(keys) if words(key) == words(c)]
        key = keys[found[0]] if found else None
        sentences.append([text.replace("{}", c) for text in table.get(key, [])])
        unused.pop(key, None)
    missing = [c for c, texts in zip(class_names, sentences) if not texts]
    says = (f"{path} has no sentences for {len(missing)} of {len(class_names)} classes: "
            f"{', '.join(missing[:9])}; unused keys: {', '.join([*unused][:9]) or 'none'}")
    if len(missing) == len(class_names):
        raise data.DataError(f"{says}; --prompts '': none")
    if missing:
        print(f"warning: {says}; they get the template", file=sys.stderr)
    return sentences


def adapt(args):
    """The whole run: CLIP's guesses, phase 1, phase 2, the files."""
    base, added = data.recipe(args.recipe, ADDITIONS)
    rates = SETTINGS["ours" if "adam" in added else "paper"]    # they go with the optimiser
    job = data.setup(args, SETTINGS[base] | {k: rates[k] for k in ("lr1", "lr2")})
    job.added = added
    run, dataset, clip_model, names = job.run, job.dataset, job.clip_model, job.dataset.class_names
    # job has what data.setup says, also added, autocast, scaler, crops (A6), W0 (Eq. 7's), known, K
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

    # CLIP's own guesses, helped by sentences, and the confident ones among them
    ours = Path(__file__).with_name("prompts") / f"{dataset.name}.json"
    path = args.prompts if args.prompts is not None else ours if ours.is_file() else ""
    written = load_prompts(path, names) if path else [[] for _ in names]        # section 3.3.3
    run.say(f"sentences about the classes: {path or 'none'}")
    prompts = [[template.format(c) for template in dataset.templates] for c in names]
    texts = [a + b if "mix" in added else b or a for a, b in zip(prompts, written)]     # (A8)
    t0 = clip.zeroshot_classifier(clip_model, texts)                            # (C, D)
    starts = {one: clip.zeroshot_classifier(one, texts if "mix" in added else prompts)
              for one in {clip_model, other}}                                   # (C, D) each
    zero = test_accuracy(job, [ZeroShot(t0)])
    data.report_zero_shot(job, zero)
    weak, _ = data.augmented_views(job, lambda view: predict(
        job, [ZeroShot(t0)], job.load(view), False, top=len(names)).p[0])       # (n, C)
    looks, views, table = job.train, 1, None
    if "views" in added:                                                        # (A1)
        looks, views = job.load(dataset.train.view(weak), seed=args.seed), VIEWS
    for n in range(views):
        table = predict(job, [ZeroShot(t0)], looks, False, table, (1 / (n + 1), 1.0))
    table = Table(*(torch.cat([v, v]) for v in table))                          # both students'
    job.K = math.ceil(args.k if args.k >= 1 else max(16, args.k * len(dataset.train) / job.C))

    # two students, which differ in their random numbers, learn from each other
    phases = [(1, round) for round in range(args.rounds)] + [(2, 0)]
    if args.student and "third" in added:                                       # (A7)
        phases.append((3, 0))
    for number, round in phases if args.epochs2 else phases[:args.rounds]:
        job.full = other if number == phases[-1][0] else clip_model
        if number == 1:                                 # section 3.3.1: each round starts anew
            students = nn.ModuleList(Student(clip_model, names, dataset.templates[0], args)
                                     for _ in range(2)).to(job.device)
            if "mix" in added:                          # (A8) students that err differently
                template = [row[:1] for row in prompts]                 # where a student starts
                students[1].texts.shift.copy_(t0 - clip.zeroshot_classifier(clip_model, template))
            lesson = next_labels(job, table)            # (2, N) each; --resume has others
        if run.state and (run.state["phase"], run.state["round"]) > (number, round):
            continue
        scale = clip_scale(job) if number > 1 and "start" in added else 1.0     # (A10)
        job.W0 = scale * starts[job.full]
        if number == 3 and not run.state:
            table = predict(job, models, job.train, crops=job.crops)            # (2, N, H) each
        table, models = train_phase(job, number, round, students, weak, lesson, table)
        if args.epochs1:                                # without, V- judges nothing
            y, clean = (v[0] for v in select_clean(guess(job, table), table))    # (N,) each
            data.pseudo_label_sheet(run.out / "pseudo_labels.png", dataset.train, names, y, clean,
                                    at(table.p_clean[1], table.index[1], y))

    finish(job, models, zero)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data.add_common(parser, "coft_plus", 64, "images per step and student, of all processes")
    add = parser.add_argument
    add("--recipe", default="ours", metavar="R", help="paper (as published), ours, or a change of "
        "one of them: ours-fresh, paper+views+balance; the table ADDITIONS (%(default)s)")
    add("--peft", choices=["vpt", "adapter"], help="light visual modules: deep prompt tokens (a "
        "ViT's default), or bottlenecks beside the MLPs (a ResNet's)")
    add("--prompts", metavar="FILE", help="JSON {class: [sentence, ...]}; default: ours; '': none")
    add("--rounds", type=int, metavar="R", help="of phase 1")
    add("--gamma", type=float, help="weight of the contrastive loss")
    add("--shots", type=int, default=0, metavar="K", help="labelled images per class (%(default)s)")
    add("--student", metavar="ARCH|FILE", type=data.on_disk, help="another CLIP, whose image "
        "encoder learns last and predicts")
    add("--epochs1", type=int, help="of each round of phase 1; 0: V- judges nothing, nor p_clean; "
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
