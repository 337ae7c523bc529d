"""CoFT+: CoFT with three parts more (same paper, arXiv 2602.04337). Read coft.py first.

`diff coft.py coft_plus.py` shows these three: sentences that an LLM wrote about each class give
the first guess; phase 1 goes round several times, each time from the labels that the last round's
two models agree on; a momentum-contrastive loss learns from two views of every image, so from
those too whose label nobody trusts yet.

    t0_k = mean of the features of the sentences about class k                              Eq. 12
    p0 = posterior(f, t0, tau)                      CLIP's zero-shot guess                  Eq. 1
    y, high = pseudo_labels(align(p0), rho)         a confident subset, every class         Eq. 2
    phase 1, for me, peer in ((0, 1), (1, 0)):
        l_pos, l_neg = tau f(x).t+, tau f(x).t-     two prompts per class                   Eq. 3
        keep = high & (the peer's p_clean_y > 1/2)  no threshold to tune                    Eq. 4
        loss = loss_cls(l_pos, y, keep) + lam loss_neg(l_pos, l_neg, y_peer, y_bar)         Eq. 5-7
    again, rounds times, with new light modules:
        y, high = next_labels(p, rho), rho grows; in phase 2 keep &= high, rho grows to 1   Eq. 10
    phase 2, all weights of the image encoder:
        y = the peer's label now, keep = its p_clean_y > 1/2, for every image
        loss = loss_cls(l_pos, y, keep)             t- learns too, f ignores its gradient   Eq. 8
    both + balance fairness(l_pos) + mu info_nce(q, k, queue)                               Eq. 11
    prediction = mean of the two softmaxes                                                  Eq. 9

B batch, C classes, D embedding, d contrastive embedding, K keys in the queue, L context tokens,
N images, P prompt tokens, T tokens, W width; tau = exp(logit_scale), f(x) and t unit vectors.

Run:  python coft_plus.py                               the demo, offline, 76 s on two cores
      python coft_plus.py --data ./oxford_pets          with our sentences, prompts/oxford_pets.json
      python coft_plus.py --data ./photos --classes cat,dog --prompts mine.json
Measured: see README.md; on the demo only. With OpenAI's CLIP on real data: not measured.

Decided here (the public summaries of the paper do not fix it):
- labels come from posteriors divided by their own class marginal (`align`), and a `fairness` term
  spreads the predictions over the classes: without them a few classes swallow the others;
- V- has a context per class (V+ one for all), learns from all images with the peer's labels; in
  phase 2 t+ and t- are matrices, and t- learns without a gradient into the encoder; y_bar is drawn
  from the peer's posterior;
- phase 2: EMA copies judge and predict; light (not RandAugment) views, see README.md;
- t+ and t0 are averaged; a round starts from new modules and the images on which the last two
  models agree; keys with the query's clean label are positives too; the EMA copies are the key
  encoders, in both phases.
"""
import argparse
import copy
import math
import re
import sys
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data

# ======== equations ========


def posterior(f, t, tau):
    """Eq. (1): p_k(x) = softmax_k(tau f(x).t_k). f (B, D), t (C, D) unit vectors -> (B, C)."""
    return (tau * f @ t.T).softmax(dim=1)


def pseudo_labels(p0, rho):
    """Eq. (2): y = argmax_k p0_k; high: per class the ceil(rho N / C) images with the largest p0_y.

    A class that is nobody's argmax takes the largest p0 of its column from the classes that have
    more than they need, so that none is left empty. p0 (N, C) -> y (N,), high (N,) bool.
    """
    N, C = p0.shape
    y, high, n = p0.argmax(dim=1), torch.zeros(N, dtype=torch.bool), math.ceil(rho * N / C)
    for k in range(C):
        if not (y == k).any():                      # from classes that have images to spare
            spare = torch.bincount(y, minlength=C)[y] > n
            mine = p0[:, k].masked_fill(~spare, -1).topk(min(n, int(spare.sum()))).indices
            y[mine] = k
    for k in range(C):
        mine = p0[:, k].masked_fill(y != k, -1).topk(min(n, int((y == k).sum()))).indices
        high[mine] = True
    return y, high


def logits(f, t_pos, t_neg, tau):
    """Eq. (3): l+_k = tau f(x).t+_k, l-_k = tau f(x).t-_k. f (B, D), t (C, D) -> 2 x (B, C)."""
    return tau * f @ t_pos.T, tau * f @ t_neg.T


def log_p_clean(l_pos, l_neg):
    """Eq. (4): p_clean_k = sigmoid(l+_k - l-_k). (B, C) -> log p_clean, log(1 - p_clean)."""
    return F.logsigmoid(l_pos - l_neg), F.logsigmoid(l_neg - l_pos)


def loss_cls(l_pos, y, keep):
    """Eq. (5): mean of -log softmax(l+)_y over the kept images; 0 if none is kept."""
    loss = F.cross_entropy(l_pos, y, reduction="none")                  # (B,)
    return (loss * keep).sum() / keep.sum().clamp(min=1)


def complementary_labels(p, y):
    """ybar of Eq. (6): a class other than y, drawn from p without y: a likely mistake (y itself if
    there is no other). p (B, C), y (B,) -> (B,)."""
    others = (p + 1e-6).scatter(1, y[:, None], 0.0 if p.shape[1] > 1 else 1.0)  # (B, C)
    return torch.multinomial(others, 1)[:, 0]


def loss_neg(l_pos, l_neg, y, y_bar):
    """Eq. (6): mean of -log p_clean_y - log(1 - p_clean_ybar)."""
    log_clean, log_unclean = log_p_clean(l_pos, l_neg)                  # (B, C) each
    return -(log_clean.gather(1, y[:, None]) + log_unclean.gather(1, y_bar[:, None])).mean()


def next_labels(p, rho, strength=1.0):
    """Eq. (10): the next round's y and high, as Eq. (2) from the mean of the two models, of which
    high keeps the images on which both agree: even with rho = 1 at most N / C per class.
    p (2, N, C) -> y (N,), high (N,) bool."""
    y, high = pseudo_labels(align(mean_prediction(p), strength), rho)
    return y, high & (p[0].argmax(dim=1) == p[1].argmax(dim=1))


def grown(rho, part):
    """Eq. (10): rho of Eq. (2) after `part` (0 to 1) of the way to 1."""
    return rho + (1 - rho) * part


def info_nce(q, k, y, queue, y_queue, T=0.1):
    """Eq. (11): -mean over the positives of log softmax(q.keys / T), keys: k and the queue.

    Image b's positives: its own k_b, and the keys with its clean label y_b (-1: not clean). All
    rows are unit vectors: q, k (B, d), queue (K, d); y (B,), y_queue (K,). MoCo, arXiv 1911.05722;
    the positives by label are SupCon's, arXiv 2004.11362.
    """
    keys, y_keys = torch.cat([k, queue]), torch.cat([y, y_queue])       # (B + K, d), (B + K,)
    same = (y[:, None] == y_keys) & (y >= 0)[:, None]                   # (B, B + K)
    same |= torch.eye(len(q), len(keys), dtype=torch.bool, device=q.device)
    log_p = (q @ keys.T / T).log_softmax(dim=1)                         # (B, B + K)
    return -((log_p * same).sum(dim=1) / same.sum(dim=1)).mean()


def align(p, strength=1.0):
    """Distribution alignment (decided here): p_k / (mean over all images of p_k)^strength, then
    normalised: no class may swallow the others. p (N, C) -> (N, C)."""
    p = p / p.mean(dim=0, keepdim=True).clamp(min=0.01 / p.shape[1]) ** strength    # (N, C)
    return p / p.sum(dim=1, keepdim=True)


def fairness(l):
    """Decided here: -mean_k log(mean over the batch of softmax(l)_k). l (B, C). It is left out of a
    batch without kept labels: alone it would make all predictions uniform."""
    return -l.softmax(dim=1).mean(dim=0).clamp(min=1e-6).log().mean()


def mean_prediction(p):
    """Eq. (9): the mean of the two models' softmax. 2 x (N, C) -> (N, C)."""
    return (p[0] + p[1]) / 2


# ======== modules ========


WORD = 0.06     # standard deviation of tiny's word vectors, for which lr1 and the noise were chosen


class Prompt(nn.Module):
    """L learnable context vectors V before each class name: [V_1] ... [V_L] cat. -> (C, D) unit.

    V is shared by all classes, or there is one per class (of its own). It starts from the words
    that stand before the class name in the template ("a photo of a" if none do), so that training
    starts at CLIP's zero-shot classifier.
    """
    def __init__(self, model, class_names, template, noise, of_its_own):
        super().__init__()
        words = template.split("{}")[0].strip() or "a photo of a"
        L = int((clip.tokenize(words)[0] > 0).sum()) - 2                # without <sot> and <eot>
        rest = template.split("{}", 1)[1]
        tokens = clip.tokenize([f"{words} {c}{rest}" for c in class_names], truncate=True)
        tokens = tokens.to(model.token_embedding.weight.device)
        with torch.no_grad():                                           # T: the longest prompt
            emb = model.token_embedding(tokens[:, :tokens.argmax(dim=1).max() + 1])     # (C, T, W)
        start = emb[:len(emb) if of_its_own else 1, 1:1 + L]            # (C or 1, L, W)
        noise = noise * min(1.0, float(start.std()) / WORD)
        self.V = nn.Parameter(start + noise * torch.randn_like(start))
        self.register_buffer("before", emb[:, :1], persistent=False)            # (C, 1, W) <sot>
        self.register_buffer("after", emb[:, 1 + L:], persistent=False)         # (C, T - L - 1, W)
        self.register_buffer("eot", tokens.argmax(dim=1), persistent=False)     # (C,)

    def forward(self, model):
        V = self.V.expand(len(self.eot), -1, -1)                        # (C, L, W)
        emb = torch.cat([self.before, V, self.after], dim=1)            # (C, T, W)
        shared = 1 + V.shape[1] if len(self.V) == 1 else 0              # tokens that all start with
        return F.normalize(model.encode_text_embeddings(emb, self.eot, 256, shared), dim=-1)


class LoRA(nn.Module):
    """Low-rank update of the q and v projections of one block (arXiv 2106.09685); starts at 0."""
    def __init__(self, width, rank):
        super().__init__()
        self.down = nn.Linear(width, 2 * rank, bias=False)
        self.q, self.v = (nn.Linear(rank, width, bias=False) for _ in range(2))
        nn.init.zeros_(self.q.weight)
        nn.init.zeros_(self.v.weight)

    def forward(self, site, h):                                         # h (B, T, W)
        if site != "qkv":
            return None
        q, v = self.down(h).chunk(2, dim=-1)
        q, v = self.q(q), self.v(v)
        return torch.cat([q, torch.zeros_like(q), v], dim=-1)           # (B, T, 3W)


class Bottleneck(nn.Module):
    """Adapter beside the MLP of one block (or after one ResNet stage); starts at 0."""
    def __init__(self, width, rank):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, site, h):                                         # h (..., W)
        return None if site == "qkv" else self.up(F.relu(self.down(h)))


class Queue(nn.Module):
    """The last K keys and their clean labels (-1: not clean). First in, first out; at the start
    random directions without labels."""
    def __init__(self, K, d):
        super().__init__()
        self.register_buffer("k", F.normalize(torch.randn(K, d), dim=1))        # (K, d) unit rows
        self.register_buffer("y", torch.full((K,), -1))                         # (K,)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))      # at the oldest

    def push(self, k, y):
        """k (B, d) and y (B,) take the places of the B oldest."""
        at = (self.pointer + torch.arange(len(k), device=k.device)) % len(self.k)       # (B,)
        self.k[at], self.y[at] = k, y
        self.pointer.copy_((self.pointer + len(k)) % len(self.k))


class Model(nn.Module):
    """One of the two models: V+, V-, the light visual modules and, in phase 2, an image encoder
    and two classifiers (2, C, D) of its own. CLIP itself is frozen and shared."""
    def __init__(self, model, class_names, template, peft, t0, d):
        super().__init__()
        self.register_buffer("t0", t0)                                  # (C, D)
        D = model.visual.output_dim
        self.head = d and nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, d))
        self.pos = Prompt(model, class_names, template, noise=0.01, of_its_own=False)
        self.neg = Prompt(model, class_names, template, noise=0.01, of_its_own=True)
        self.prompts = self.adapters = self.visual = self.classifier = None
        kind, size = peft.split(":")
        if kind == "vpt":                                               # VPT-deep, arXiv 2203.12119
            layers, width = model.visual.transformer.layers, model.visual.transformer.width
            self.prompts = nn.Parameter(0.02 * torch.randn(layers, int(size), width))   # (., P, W)
        else:
            kind = {"lora": LoRA, "adapter": Bottleneck}[kind]
            self.adapters = nn.ModuleList(kind(w, int(size)) for w in model.visual.adapter_widths)

    def unfreeze(self, model):
        """Phase 2: own copy of the image encoder; the classifiers start at t+ and t-."""
        self.classifier = nn.Parameter(torch.stack(self.text(model)).detach())      # (2, C, D)
        self.visual = copy.deepcopy(model.visual).requires_grad_(True)
        self.pos.requires_grad_(False)
        self.neg.requires_grad_(False)

    def text(self, model):
        """t+ and t-, unit rows (C, D): the prompts' in phase 1, then matrices that started there,
        so that phase 2 does not run the text tower."""
        if self.classifier is None:                                     # with Eq. 12
            t_pos, t_neg = self.pos(model), self.neg(model)             # (C, D) each
            return t_pos if self.t0 is None else F.normalize(t_pos + self.t0, dim=-1), t_neg
        return F.normalize(self.classifier, dim=-1).unbind()

    def groups(self, lr1, lr2):
        """What learns, and how fast. Word vectors take steps relative to their own size."""
        word = lr1 * float(self.pos.V.detach().std()) / WORD
        light = [v for v in (self.prompts, *(self.adapters or nn.Module()).parameters())
                 if v is not None]
        head = [{"params": self.head.parameters(), "lr": 1e-3}] if self.head else []
        if self.visual is None:
            return head + [{"params": light, "lr": lr1}, {"params": [self.pos.V], "lr": word},
                           {"params": [self.neg.V], "lr": 10 * word}]
        return head + [
                {"params": light, "lr": lr2}, {"params": [self.classifier], "lr": lr1},
                {"params": self.visual.parameters(), "lr": lr2, "weight_decay": 0.01}]

    def features(self, model, x):
        """Images (B, 3, R, R) -> unit features (B, D)."""
        visual = self.visual or model.visual
        return F.normalize(visual(x, self.prompts, self.adapters).float(), dim=-1)

    def project(self, f):
        """Features (B, D) -> unit vectors (B, d) that info_nce compares."""
        return F.normalize(self.head(f), dim=-1)

    def forward(self, loss, *args):
        """loss(self, ...): called so, DistributedDataParallel sees what the loss uses."""
        return loss(self, *args)


# ======== training ========


@torch.no_grad()
def judge(model, models, batches, N, autocast):
    """Both models' opinions on the plain views: softmax p and p_clean, each (2, N, C)."""
    tau = model.logit_scale.exp()
    with autocast():
        t = [[t.float() for t in me.text(model)] for me in models]              # (C, D) each
    p, p_clean = torch.zeros(2, 2, N, len(t[0][0]))                             # (2, N, C) each
    for x, i in batches:                                                        # (B, 3, R, R)
        for m, (t_pos, t_neg) in enumerate(t):
            with autocast():
                f = models[m].features(model, x)                                # (B, D)
            p[m, i] = posterior(f, t_pos, tau).cpu()
            p_clean[m, i] = log_p_clean(*logits(f, t_pos, t_neg, tau))[0].exp().cpu()
    return data.total(p), data.total(p_clean)


def verdicts(phase, p, p_clean, y0, high, peers=(1, 0), threshold=None):
    """What each model is taught next: labels y (2, N) and the peer's verdict keep (2, N) bool.

    Phase 1: the zero-shot labels of the confident images. Phase 2: the peer's current labels, so
    images come in as they become clean. threshold: keep where the peer's p_y is above it, instead
    of p_clean_y > 1/2 (for comparison). p (2, N, C), aligned; p_clean (2, N, C).
    """
    y, keep = [], []
    for me, peer in enumerate(peers):
        y.append(y0 if phase == 1 else p[peer].argmax(dim=1))                   # (N,)
        score = p_clean[peer] if threshold is None else p[peer]                 # (N, C)
        clean = score.gather(1, y[me][:, None])[:, 0] > (0.5 if threshold is None else threshold)
        keep.append(clean & high if phase == 1 else clean)                      # (N,)
    return torch.stack(y), torch.stack(keep)


def contrastive_loss(me, f, k, y, keep, queue):
    """Eq. (11) of the images f (B, D) with the keys k (B, d); 0 without a queue."""
    if queue is None:
        return 0.0
    return info_nce(me.project(f), k, y.masked_fill(~keep, -1), queue.k, queue.y)


def phase1_loss(model, me, x, y, keep, y_peer, y_bar, lam, balance, mu, k, queue, autocast):
    """Eq. (7): L_cls + lam L_neg (+ fairness), for the prompts and the light visual modules.

    L_neg sees every image, with the peer's label y_peer (B,): it will have to judge them all. t+
    enters it as a constant; f(x) does not: V- also shapes f. x: this process's share of the batch.
    """
    tau = model.logit_scale.exp()
    with autocast():
        f, (t_pos, t_neg) = me.features(model, x), me.text(model)               # (B, D), (C, D) x 2
    f, t_pos, t_neg = data.gather(f), t_pos.float(), t_neg.float()              # f: of all x
    l_pos, _ = logits(f, t_pos, t_neg, tau)                                     # (B, C)
    judged = logits(f, t_pos.detach(), t_neg, tau)                              # (B, C) x 2
    loss = loss_cls(l_pos, y, keep) + lam * loss_neg(*judged, y_peer, y_bar)
    loss = loss + mu * contrastive_loss(me, f, k, y, keep, queue)
    return loss + balance * keep.any() * fairness(l_pos)


def phase2_loss(model, me, x, y, keep, y_peer, y_bar, lam, balance, mu, k, queue, autocast):
    """Eq. (8): an augmented view learns the label that the peer gave the plain view. t- goes on
    learning to judge, but as a spectator: no gradient of L_neg reaches f or t+."""
    tau = model.logit_scale.exp()
    with autocast():
        f = data.gather(me.features(model, x))                                  # (B, D)
    t_pos, t_neg = me.text(model)                                               # (C, D) each
    l_pos, _ = logits(f, t_pos, t_neg, tau)                                     # (B, C)
    judged = logits(f.detach(), t_pos.detach(), t_neg, tau)                     # (B, C) x 2
    loss = loss_cls(l_pos, y, keep) + balance * keep.any() * fairness(l_pos)
    loss = loss + mu * contrastive_loss(me, f, k, y, keep, queue)
    return loss + lam * loss_neg(*judged, y_peer, y_bar)


def warm_cosine(step, total):
    """Learning rate factor: up in a line over the first tenth, then down to 0 as a cosine. Without
    the warm-up Adam's first steps, all of full size, would undo what phase 1 has learnt."""
    return min(1, (step + 1) / (0.1 * total + 1), 0.5 + 0.5 * math.cos(math.pi * step / total))


@torch.no_grad()
def ema_update(teacher, student, decay):
    """teacher <- decay teacher + (1 - decay) student."""
    for t, s in zip(teacher.parameters(), student.parameters()):
        t.lerp_(s, 1 - decay)


def train_step(phase, step, pair, model, models, teachers, optimizers, schedules, scaler, tables,
               peers, lam, balance, mu, queues, autocast):
    """Each model takes one step on its own batch, taught by its peer. Returns what the log shows.
    pair: (x, x_key, i) per model; tables: y (2, N), keep (2, N), aligned posterior (2, N, C)."""
    (y, keep, p), device = tables, model.logit_scale.device
    shown = {"loss": 0.0, "skipped": 0}                 # tensors, not read before the epoch's end
    for me, peer in enumerate(peers):
        x, *x_key, i = pair[me]                                                 # (B, 3, R, R), (B,)
        y_peer = p[peer, i].argmax(dim=1)                                       # (B,)
        y_bar = complementary_labels(p[peer, i], y_peer)                        # (B,)
        labels = [v.to(device, non_blocking=True) for v in (y[me, i], keep[me, i], y_peer, y_bar)]
        queue = k = None
        if mu:                                          # keys: by the EMA copy, without a gradient
            queue = queues[me]
            with torch.no_grad():
                with autocast():
                    f = teachers[me].features(model, x_key[0])
                k = data.gather(teachers[me].project(f))                        # (B, d)
        loss = models[me](partial(phase1_loss if phase == 1 else phase2_loss, model), x, *labels,
                          lam, balance, mu, k, queue, autocast)
        optimizers[me].zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizers[me])                     # not if fp16 overflowed: then no EMA either
        schedules[me].step()
        skip = data.skipped(scaler, optimizers[me])
        decay = min((0.9 if mu else 0.0) if phase == 1 else 0.99, step / (step + 9))
        ema_update(teachers[me], models[me], decay + (1 - decay) * skip)
        if mu:
            queue.push(k, labels[0].masked_fill(~labels[1], -1))
        shown = {"loss": shown["loss"] + loss.detach() / 2, "skipped": shown["skipped"] + skip}
    scaler.update()                                     # once: it halves the scale if either did
    return shown


# ======== evaluation ========


@torch.no_grad()
def classifier(model, sentences, autocast):
    """Eq. (12): unit rows t0 (C, D), each the mean of its class's text features. sentences: C
    lists, in label order."""
    with autocast():
        t = [model.encode_text(clip.tokenize(some, truncate=True).to(model.logit_scale.device), 256)
             for some in sentences]                                             # C x (., D)
    return F.normalize(torch.stack([F.normalize(t_k.float(), dim=-1).mean(dim=0) for t_k in t]),
                       dim=-1)


@torch.no_grad()
def zero_shot(model, t0, batches, N, autocast):
    """Eq. (1) for N images and the classifier t0 (C, D): (N, C)."""
    tau, p0 = model.logit_scale.exp(), torch.zeros(N, len(t0))
    for x, i in batches:
        with autocast():
            f = model.encode_image(x)                                           # (B, D)
        p0[i] = posterior(F.normalize(f.float(), dim=-1), t0, tau).cpu()
    return data.total(p0)


def accuracy(p, y_true):
    """Percent of the images whose argmax_k p_k is the true class; None without labels."""
    if y_true is not None:
        return round(100 * float((p.argmax(dim=1) == y_true).double().mean()), 2)


def diagnostics(p, p_clean, y, keep, y_true):
    """How good the filter is, as means over the two models: share and precision of the labels that
    are kept, and how well p_clean and the maximum softmax each tell when the model is right."""
    found = {"kept": round(float(keep.float().mean()), 4)}
    if y_true is not None:                                                      # diagnostics only
        right = (y == y_true)[keep].double()
        found["precision"] = round(float(right.mean()), 4) if len(right) else None
        for key, score in (("auroc", p_clean), ("auroc_softmax", p)):
            each = [data.auroc(s.gather(1, q.argmax(1, True))[:, 0], q.argmax(1) == y_true)
                    for q, s in zip(p, score)]
            found[key] = None if None in each else round(sum(each) / 2, 4)
    return found


# ======== main ========


def adapt(args):
    """The whole run: zero-shot, phase 1, phase 2, the files. Returns the summary."""
    device, found, model, clip_name = data.begin(args)
    names, N, N_test = found.class_names, len(found.train), len(found.test)
    y_true = found.train.y_true                                                 # diagnostics only
    if not args.peft.startswith("adapter") and not hasattr(model.visual, "transformer"):
        raise data.DataError(f"--peft {args.peft} needs a ViT; a ResNet takes --peft adapter")
    small = sum(v.numel() for v in model.visual.parameters()) < 10**7
    lr2 = args.lr2 if args.lr2 is not None else 3e-4 if small else 1e-5
    peers = (0, 1) if args.judge == "self" else (1, 0)
    threshold = args.judge if isinstance(args.judge, float) else None
    workers = data.pick_workers(args.workers, found.train)
    run = data.Run(args.out, {**vars(args), "found": found.description}, args.resume,
                   args.overwrite)
    run.say(found.description)
    autocast, scaler = data.precision(args.amp, device)
    plain_view, weak, strong = views = data.transforms(model.visual.input_resolution)
    run.say(data.keep_decoded(found, views, args.cache))

    def batches(images, *views, **how):
        return data.loader(images.view(*views), args.batch_size, workers=workers,
                           device=device, **how)

    plain, test = batches(found.train, plain_view), batches(found.test, plain_view)
    sentences = [[template.format(c) for template in found.templates] for c in names]
    if path := data.our_prompts(args.data, found.title) if args.prompts is None else args.prompts:
        written, line = data.load_prompts(path, names, found.templates[0])
        sentences = [list(dict.fromkeys(a + b)) for a, b in zip(sentences, written)]
        run.say(line)
    else:
        run.say("no sentences about these classes (--prompts FILE): the template alone")
    t0 = classifier(model, sentences, autocast)                                 # (C, D)
    p0, p0_test = (zero_shot(model, t0, b, n, autocast)
                   for b, n in ((plain, N), (test, N_test)))                    # (N, C) each
    zero = accuracy(p0_test, found.test.y_true)
    y0, high = pseudo_labels(align(p0, args.balance), args.rho)                 # (N,) each
    run.say("no labels: predictions only" if zero is None else f"zero-shot accuracy {zero:.2f} %")
    data.check_label_order(found, zero)

    # Two models that differ in their random numbers, and EMA copies of them that judge and predict.
    def fresh():
        return nn.ModuleList(Model(model, names, found.templates[0], args.peft, t0 if path else
                                   None, 64 if args.mu else None) for _ in range(2)).to(device)

    models, queues = fresh(), None
    p, p_clean = torch.stack([p0, p0]), torch.ones(2, *p0.shape)                # until they differ
    p_test = None
    for phase, turn, epochs, view in (
            *((1, r, args.epochs1, weak) for r in range(args.rounds)),
            (2, 0, args.epochs2, strong if args.strong_view else weak)):
        if phase == 2 and not epochs:
            break
        if turn:                                                                # Eq. 10
            y0, high = next_labels(p, grown(args.rho, turn / args.rounds), args.balance)
            models = fresh()
        if phase == 2:
            for me in models:
                me.unfreeze(model)
        teachers = copy.deepcopy(models).requires_grad_(False)
        if run.state and (run.state["phase"], run.state["round"]) > (phase, turn):
            continue
        two = (view, weak) if args.mu else (view,)      # of the query; of the key
        loaders = [batches(found.train, *two, shuffle=True, drop_last=True,
                           seed=4 * args.seed + 2 * phase + m + 1000 * turn) for m in range(2)]
        total = max(1, min(epochs * len(loaders[0]), args.max_steps or 10**9))          # steps
        optimizers = [torch.optim.AdamW(me.groups(args.lr1, lr2), weight_decay=0.0,
                                        fused=device.type == "cuda") for me in models]
        schedules = [torch.optim.lr_scheduler.LambdaLR(o, partial(warm_cosine, total=total))
                     for o in optimizers]
        parts = {"models": models, "teachers": teachers, "scaler": scaler,
                 **{f"optimizer{m}": o for m, o in enumerate(optimizers)},
                 **{f"schedule{m}": s for m, s in enumerate(schedules)}}
        if args.mu:
            K = math.ceil(min(16, N / 2 / args.batch_size)) * args.batch_size   # half an epoch's
            queues = nn.ModuleList(Queue(K, 64) for _ in range(2)).to(device)
            parts["queues"] = queues
        wrapped = [data.parallel(me) for me in models]
        first, step, rows = 0, 0, []                    # rows: what the steps of this epoch showed
        if run.state:                                   # perhaps from the middle of an epoch
            saved = run.restore(parts)
            first, step, rows, (p, p_clean, y0, high) = (saved[k] for k in (
                "epoch", "step", "rows", "tables"))
            for loader in loaders:
                loader.sampler.epoch, loader.sampler.skip = first, len(rows)

        for epoch in range(first, epochs):
            if step >= total and not rows:
                break
            aligned = torch.stack([align(q, args.balance) for q in p])          # (2, N, C)
            y, keep = verdicts(phase, aligned, p_clean, y0, high, peers, threshold)
            if phase == 2 and args.rounds > 1:          # Eq. 10: it goes on growing, to rho = 1
                part = (args.rounds - 1 + epoch / max(1, epochs - 1)) / args.rounds
                keep &= next_labels(p, grown(args.rho, part), args.balance)[1]
            for step, pair in run.steps(zip(range(step + 1, total + 1), zip(*loaders)),
                                        2 * min(args.batch_size, N)):
                rows.append(train_step(phase, step, pair, model, wrapped, teachers, optimizers,
                                       schedules, scaler, (y, keep, aligned), peers, args.lam,
                                       args.balance, args.mu, queues, autocast))
                run.live(lambda: f"phase {phase} epoch {epoch + 1}/{epochs} step {step}/{total} "
                         f"loss {float(rows[-1]['loss']):.3f} {run.speed():.0f} img/s, "
                         f"{(total - step) * 2 * args.batch_size / run.speed():.0f} s left here")
            where = f"phase {phase}", step, f"--lr{phase}"
            rows, facts = run.read(rows, *where)
            if run.asked:                                                       # to stop
                run.checkpoint(parts, phase=phase, round=turn, epoch=epoch, step=step,
                               rows=rows, tables=[p, p_clean, y0, high])
            p, p_clean = judge(model, teachers, plain, N, autocast)             # (2, N, C) each
            run.check([float(p.sum())], *where)
            p_test, clean_test = (p, p_clean) if found.test is found.train else judge(
                model, teachers, test, N_test, autocast)
            score = accuracy(mean_prediction(p_test), found.test.y_true)
            at = {"phase": phase, **({"round": turn + 1} if phase == 1 else {}), "epoch": epoch + 1}
            run.epoch(at, epochs, device, **facts,
                      accuracy=score, **diagnostics(p, p_clean, y, keep, y_true))
            rows = []
            run.checkpoint(parts, phase=phase, round=turn, epoch=epoch + 1, step=step, rows=rows,
                           tables=[p, p_clean, y0, high])
        if phase == 1 and epochs:
            data.pseudo_label_sheet(run.out / "pseudo_labels.png", found.train, names,
                                    mean_prediction(p), mean_prediction(p_clean))

    if p_test is None:                                                          # nothing to train
        p_test, clean_test = judge(model, teachers, test, N_test, autocast)
    data.write_predictions(run.out / "predictions.csv", found.test.names, names,
                           mean_prediction(p_test), mean_prediction(clean_test))
    run.save("model.pt", {"models": teachers.state_dict(), "class_names": names,
                          "templates": found.templates, "peft": args.peft, "clip": clip_name})
    summary = {"zero_shot": zero, "accuracy": accuracy(mean_prediction(p_test), found.test.y_true),
               **run.totals(device)}
    run.log(**summary)
    run.say(("" if zero is None else f"accuracy {summary['accuracy']:.2f} %, zero-shot was "
             f"{zero:.2f} %; ") + f"{summary['seconds']:.0f} s; results in {run.out}")
    return summary


def peft(text):
    """argparse type of --peft: "vpt" -> "vpt:4"."""
    kind, _, size = text.partition(":")
    usual = {"vpt": "4", "lora": "4", "adapter": "16"}
    if kind not in usual or not re.fullmatch(r"[1-9]\d*", size or usual[kind]):
        raise argparse.ArgumentTypeError(f"expected vpt, lora or adapter, or one:SIZE, not {text}")
    return f"{kind}:{size or usual[kind]}"


def referee(text):
    """argparse type of --judge."""
    return text if text in ("peer", "self") else data.fraction(text)


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="CoFT+: adapt CLIP to unlabelled images. Without arguments: the offline demo.",
        formatter_class=data.Help)
    data.add_common(parser, "coft_plus", 64, "images per step and model")
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction}
    add("--peft", type=peft, default="vpt", metavar="KIND[:SIZE]", help="light visual modules: vpt "
        "(deep prompts; 4 tokens), lora (on q and v; rank 4) or adapter (bottlenecks; width 16)")
    add("--prompts", metavar="FILE", help="sentences about the classes, Eq. 12: JSON, see data.py; "
        "default: ours for the demo and ten data sets; '': the template alone")
    add("--rounds", type=data.positive, default=3, metavar="R", help="of phase 1, Eq. 10; 1: "
        "one, as CoFT")
    add("--mu", type=float, default=1.0, help="weight of the contrastive loss, Eq. 11; 0: off, "
        "and no EMA in phase 1")
    add("--epochs1", type=data.natural, default=4, help="of each round of phase 1")
    add("--epochs2", type=data.natural, default=4, help="of phase 2; 0 leaves it out")
    add("--lr1", type=float, default=2e-3, help="of the light modules (AdamW, cosine)")
    add("--lr2", type=float, help="of the image encoder; default: 3e-4 for tiny, else 1e-5")
    add("--rho", type=data.fraction, default=0.3, help="share of the images to start from, Eq. 2")
    add("--lam", type=float, default=1.0, help="weight of L_neg, Eq. 7")
    add("--balance", type=float, default=1.0, help="strength of distribution alignment, weight of "
        "the fairness term; 0: off. It wants batches of more images than there are classes")
    add("--judge", type=referee, default="peer", metavar="peer|self|T", help="whose p_clean_y "
        "> 1/2 keeps an image: the peer's, the model's own; or keep it where the peer's p_y > T")
    add("--strong-view", default=False, help="phase 2 learns from RandAugment views", **switch)
    return parser.parse_args(argv)


# same in prompt_align.py
def main(argv=None):
    """Command line. Returns the exit status, see `data.command_line`."""
    return data.command_line(adapt, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
