"""Prompt alignment: learn a CLIP prompt from candidate labels (arXiv 2407.07638, DASFAA 2025).

Each training image comes with a set of possible labels, the true one among them. A prompt with
learnable words V is trained by an objective for such partial labels ("PLL"; eight are here). These
objectives degrade as the sets grow. The paper's remedy: V must also agree with a mix of the
hand-crafted prompt's posterior and its own, both restricted to the candidates. CLIP is frozen.

    f = features of the batch's images                      encoded once, for all that follows
    l, l_hand = tau f.t(V), tau f.t_hand                    t(V), t_hand: texts of the classes
    c = table[i]                                            how far each candidate is believed
    pll = pll_loss(objective, l, S, c, lam)                                             Eq. 3-9
    align = loss_weighted(l, mixed_posterior(l, l_hand, S, alpha))   alpha: 1 -> 1/2    Eq. 10, 5
    u = information(S)                                      what the sets tell, 1 to 0  Eq. 12
    loss = u * pll + (1 - u) * balance(pll, align) * align                              Eq. 11
    table[i] = confidence(objective, l, S)                  only the rows of the batch  Eq. 2

A views of an image, B batch, C classes, D embedding, L context tokens, N images, W width of a word;
S (B, C) bool candidate sets; tau = exp(logit_scale), f and t unit vectors, p = softmax(l).

Run:  python prompt_align.py                                    the demo, offline, some seconds
      python prompt_align.py --q 0.9 --no-align                 the objective alone
      python prompt_align.py --data ./oxford_pets               real data with OpenAI's CLIP
      python prompt_align.py --data ./photos --classes cat,dog --candidates sets.csv
Measured: on the demo only, see README.md. With OpenAI's CLIP on real data: not measured.

Decided here (the paper's text was not at hand; "released" is its authors' code):
- alpha falls linearly from 1 to 1/2 (to 0, large sets made V forget CLIP), and the less the sets
  tell, the more the alignment counts: with single labels the run is supervised CoOp, with all
  labels in every set the alignment alone teaches. --teacher handcrafted is as released: alpha = 1,
  u = 1/2 (the sum, halved, so that --lr means the same). w is at least 0.03;
- features are normalised, which the released aligned runs did not do;
- PRODEN, LWS and CRDPLL update their tables from the step's own logits, RC from the new V's, all
  for the batch only; LWS starts at 1/|S| inside and 1/(C - |S|) outside (released: 1/C);
- PiCO's head is trained by its contrastive loss, see `Contrast`, from the first epoch (in the
  released code nothing trains it); its prototypes and slow head move with 0.99, per class;
- the views are data.py's weak and strong ones, five augmentations kept and used in turn;
- for tiny, V starts from the template's words, all images are used, --lr is larger;
- predictions.csv: p_clean is the hand-crafted prompt's probability of the chosen class.
"""
import argparse
import copy
import csv
import math
import os
import sys
import time
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data
from clip.simple_tokenizer import SimpleTokenizer

# ======== equations ========


# same in coft.py
def posterior(f, t, tau):
    """Eq. (1): p_k(x) = softmax_k(tau f(x).t_k). f (B, D), t (C, D) unit vectors -> (B, C)."""
    return (tau * f @ t.T).softmax(dim=1)


def masked_softmax(l, S):
    """Eq. (2): softmax_S(l)_k = exp(l_k) / sum_{j in S} exp(l_j) for k in S, else 0. A target: it
    has no gradient. Never 0/0, however far behind S is; 0 if S is empty. l, S (B, C) -> (B, C)."""
    return l.detach().masked_fill(~S, -math.inf).softmax(dim=1).masked_fill(~S, 0.0)


def loss_average(l, S):
    """Eq. (3), naive: mean of -1/|S| sum_{k in S} log p_k, as if every candidate were right; the
    averaging baseline of arXiv 2002.08053. l (B, C), S (B, C) bool."""
    return loss_weighted(l, S / S.sum(dim=1, keepdim=True))


def loss_cc(l, S):
    """Eq. (4), CC: mean of -log sum_{k in S} p_k; arXiv 2007.08929. l (B, C), S (B, C) bool."""
    return (l.logsumexp(dim=1) - l.masked_fill(~S, -math.inf).logsumexp(dim=1)).mean()


def loss_weighted(l, c):
    """Eq. (5): mean of -sum_k c_k log p_k. RC (arXiv 2007.08929) and PRODEN (2002.08053) with their
    confidences c, the alignment with c = q of Eq. (10). l, c (B, C)."""
    return -(c * l.log_softmax(dim=1)).sum(dim=1).mean()


def log_one_minus(l):
    """log(1 - p_k), exact also where p_k, which must be the largest, rounds to 1. (B, C)."""
    top = l.argmax(dim=1, keepdim=True)                                         # (B, 1)
    rest = l.scatter(1, top, torch.finfo(l.dtype).min).logsumexp(dim=1) - l.logsumexp(dim=1)  # (B,)
    others = l.softmax(dim=1).scatter(1, top, 0.0)                              # (B, C), <= 1/2
    return torch.log1p(-others).scatter(1, top, rest[:, None])


def loss_lws(l, S, c):
    """Eq. (6), LWS with the log loss and beta = 1: mean of -sum_{k in S} c_k log p_k
    - sum_{k not in S} c_k log(1 - p_k); arXiv 2106.05731. l, S, c (B, C)."""
    return -(c * torch.where(S, l.log_softmax(dim=1), log_one_minus(l))).sum(dim=1).mean()


def loss_cavl(l, S):
    """Eq. (7), CAVL: cross-entropy on argmax_{k in S} |l_k - 1| l_k, the class activation value;
    Zhang et al., ICLR 2022. l (B, C), S (B, C) bool."""
    v = ((l - 1).abs() * l).masked_fill(~S, -math.inf)                          # (B, C)
    return F.cross_entropy(l, v.argmax(dim=1))


def loss_crdpll(l, S, c, lam):
    """Eq. (8), CRDPLL: mean of lam sum_v KL(c || p^v) - sum_{k not in S} log(1 - p^0_k), p^v of
    view v; Wu et al., ICML 2022. l (A, B, C); S, c (B, C)."""
    kl = sum(F.kl_div(v.log_softmax(dim=1), c, reduction="batchmean") for v in l)
    return lam * kl - (log_one_minus(l[0]) * ~S).sum(dim=1).mean()


def loss_contrastive(z, y, keys, y_keys, T=0.07):
    """Eq. (9), PiCO (arXiv 2201.08984): mean of -log softmax_j(z_i.z_j / T) over the j of label y_i
    in the batch, without i, and in the keys. z (B, d), y (B,), keys (M, d), y_keys (M,)."""
    same = y[:, None] == torch.cat([y, y_keys])                                 # (B, B + M)
    me = torch.eye(*same.shape, dtype=torch.bool, device=z.device)
    s = (z @ torch.cat([z, keys]).T / T).masked_fill(me, -math.inf)             # (B, B + M)
    log_p = torch.where(same & ~me, s.log_softmax(dim=1), 0.0)
    return -(log_p.sum(dim=1) / (same & ~me).sum(dim=1).clamp(min=1)).mean()


def mixed_posterior(l, l_hand, S, alpha):
    """Eq. (10): q = alpha softmax_S(l_hand) + (1 - alpha) softmax_S(l). (B, C) each -> (B, C)."""
    return alpha * masked_softmax(l_hand, S) + (1 - alpha) * masked_softmax(l, S)


W_MIN = 0.03


def balance(pll, align):
    """Eq. (11): w = pll / align, a constant, so that both losses are equally large; at least W_MIN,
    for where the objective says nothing, as CC does if all classes are candidates."""
    return (pll.detach() / align.detach().clamp(min=1e-8)).clamp(min=W_MIN)


def information(S):
    """Eq. (12), decided here: how much the sets tell, mean of 1 - log|S| / log C: 1 if they hold a
    single label, 0 if they hold all. S (B, C) bool."""
    return 1 - (S.sum(dim=1).float().log() / (math.log(S.shape[1]) or 1)).mean()


# ======== modules ========


class Prompt(nn.Module):
    """L learnable context vectors V before each class name: [V_1] ... [V_L] cat. -> (C, D) unit.

    V is shared by all classes. It starts from random words, as large as the model's own; for L = 0
    from those before the class name in the template, which make CLIP's zero-shot classifier.
    """
    def __init__(self, model, class_names, template, L):
        super().__init__()
        words = " ".join(["x"] * L) or template.split("{}")[0].strip() or "a photo of a"
        rest, n = template.split("{}", 1)[1], int((clip.tokenize(words)[0] > 0).sum()) - 2
        tokens = clip.tokenize([f"{words} {c}{rest}" for c in class_names], truncate=True)
        E = model.token_embedding.weight.detach()                       # (vocabulary, W)
        tokens = tokens[:, :tokens.argmax(dim=1).max() + 1].to(E.device)    # (C, T), T: the longest
        emb = E[tokens]                                                 # (C, T, W)
        V = E[E.any(dim=1)].std() * torch.randn_like(emb[0, 1:1 + n]) if L else emb[0, 1:1 + n]
        self.V = nn.Parameter(V.clone())                                # (L, W)
        self.register_buffer("before", emb[:, :1], persistent=False)            # (C, 1, W) <sot>
        self.register_buffer("after", emb[:, 1 + n:], persistent=False)         # (C, T - L - 1, W)
        self.register_buffer("eot", tokens.argmax(dim=1), persistent=False)     # (C,)

    def forward(self, model):
        V = self.V.expand(len(self.eot), -1, -1)                        # (C, L, W)
        emb = torch.cat([self.before, V, self.after], dim=1)            # (C, T, W)
        t = model.encode_text_embeddings(emb, self.eot, chunk=256, shared=1 + V.shape[1])
        return F.normalize(t, dim=-1)                                   # (C, D)


class Contrast(nn.Module):
    """PiCO's second space: a head and its slow copy, a queue of keys, a prototype per class.

    As the towers are frozen, the contrastive loss cannot teach V. It trains the head alone (in the
    released code nothing trained it); the prototypes in the head's space choose among the
    candidates, and only so do they reach V: through the table of confidences.
    """
    def __init__(self, D, C, d=128, queue=1024):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, d))
        self.slow = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("keys", F.normalize(torch.randn(queue, d), dim=1))     # (Q, d) rows
        self.register_buffer("y_keys", torch.full((queue,), -1))                    # (Q,) -1: none
        self.register_buffer("prototypes", torch.zeros(C, d))                       # (C, d)

    @torch.no_grad()
    def update(self, z, key, y, m=0.99):
        """The batch enters queue and prototypes; z, key (B, d), y (B,)."""
        n = F.one_hot(y, len(self.prototypes)).sum(dim=0)[:, None]                  # (C, 1)
        total = torch.zeros_like(self.prototypes).index_add(0, y, z)                # (C, d)
        mixed = m ** n * self.prototypes + (1 - m ** n) * total / n.clamp(min=1)    # n at once
        self.prototypes.copy_(F.normalize(mixed, dim=1))
        self.keys.copy_(torch.cat([key, self.keys])[:len(self.keys)])
        self.y_keys.copy_(torch.cat([y, self.y_keys])[:len(self.keys)])
        for slow, fast in zip(self.slow.parameters(), self.head.parameters()):
            slow.lerp_(fast, 1 - m)


# ======== training ========


OBJECTIVES = ("naive", "cc", "rc", "proden", "lws", "cavl", "crdpll", "pico")
MADE = ("uniform", "instance")                                          # candidates from labels
CLIP, TINY = (16, 2e-3, 100, 16), (0, 0.1, 20, 0)   # usual --ctx, --lr, --epochs, --shots
PASSES = 5             # --cache-features: the augmentations of each image that are kept


def pll_loss(objective, l, S, c, lam):
    """Eq. (3)-(8) by name. l (A, B, C), all but CRDPLL learn from the first view; S, c (B, C)."""
    return {"naive": lambda: loss_average(l[0], S), "cc": lambda: loss_cc(l[0], S),
            "lws": lambda: loss_lws(l[0], S, c), "cavl": lambda: loss_cavl(l[0], S),
            "crdpll": lambda: loss_crdpll(l, S, c, lam)
            }.get(objective, lambda: loss_weighted(l[0], c))()          # rc, proden, pico


def confidence(objective, l, S):
    """Rows of the table: softmax_S(l); LWS also weighs the others; CRDPLL takes the geometric mean
    of the views' softmax, which is that of the mean logits. l (A, B, C), S (B, C) -> (B, C)."""
    if objective == "lws":
        return masked_softmax(l[0], S) + masked_softmax(l[0], ~S)
    return masked_softmax(l.mean(dim=0) if objective == "crdpll" else l[0], S)


class Features:
    """Each epoch's batches: features of augmented images (A, B, D), their indices (B,).

    The tower is frozen: with --cache-features those of PASSES epochs are kept and used in turn;
    without, an image is encoded once per step. Several processes encode a share each.
    """
    def __init__(self, model, load, A, batch_size, cached, autocast):
        self.model, self.load, self.A, self.cached, self.autocast = model, load, A, cached, autocast
        self.size, self.batches = batch_size, load(batch_size, shuffle=True, drop_last=True)
        self.kept = {}                                                  # {pass: (A, N, D)}

    @torch.no_grad()
    def encode(self, x):
        """A x (B, 3, R, R) -> unit features (A, B, D)."""
        with self.autocast():
            f = self.model.encode_image(torch.cat(x))                           # (A B, D)
        return F.normalize(f.float(), dim=1).unflatten(0, (len(x), -1))

    def table(self, batches, A, N):
        """The features of N images, (A, N, D), on the CPU."""
        f = torch.zeros(A, N, self.model.visual.output_dim)
        for *x, i in batches:
            f[:, i] = self.encode(x).cpu()
        return data.total(f)

    def epoch(self, e, skip=0):
        """Those of epoch e, without its first `skip` batches."""
        order, k = self.batches.sampler, e % PASSES                     # order and augmentations
        order.epoch, order.skip = e, skip
        if not self.cached:
            for *x, i in self.batches:
                yield data.gather(self.encode(x).transpose(0, 1)).transpose(0, 1), i
            return
        if k not in self.kept:
            self.kept[k] = self.table(self.load(self.size, epoch=k), self.A, len(order.indices))
        for batch in order.batches():
            i = torch.tensor([i for i, _ in batch])                             # (B,)
            yield self.kept[k][:, i], i


def logits(model, prompt, f, autocast):
    """l = tau f.t(V), in fp32 whatever the precision of the text tower. f (..., D) -> (..., C)."""
    with autocast():
        t = prompt(model)                                                       # (C, D)
    return model.logit_scale.exp() * f @ t.float().T


def train_step(objective, teacher, epoch, progress, f, i, model, prompt, contrast, tables, descent,
               autocast):
    """One step on the features f (A, B, D) of the images i (B,). tables: candidate sets (N, C), on
    the CPU, confidences (N, C), hand-crafted classifier (C, D). Without a teacher: the objective
    alone. Returns what the log shows."""
    sets, table, t_hand = tables
    u = float(information(sets[i]))
    f, S, i = (v.to(t_hand.device, non_blocking=True) for v in (f, sets[i], i))     # S (B, C)
    c = table[i]                                                                # (B, C)
    l, extra = logits(model, prompt, f, autocast), 0.0                          # (A, B, C)
    l_hand = model.logit_scale.exp() * f[0] @ t_hand.T                          # (B, C)

    if contrast is not None:                                                    # PiCO
        z, y = F.normalize(contrast.head(f[0]), dim=1), masked_softmax(l[0], S).argmax(dim=1)
        key = F.normalize(contrast.slow(f[1]), dim=1)                           # z, key (B, d)
        extra = 0.5 * loss_contrastive(z, y, torch.cat([key, contrast.keys]),
                                       torch.cat([y, contrast.y_keys]))
        if epoch > 0:                               # in the first there are no prototypes yet
            best = masked_softmax(z @ contrast.prototypes.T, S).argmax(dim=1)   # (B,)
            phi = 0.95 - 0.15 * progress
            c = phi * c + (1 - phi) * F.one_hot(best, S.shape[1])               # (B, C)
            table[i] = c
        contrast.update(z.detach(), key, y)

    loss = pll = pll_loss(objective, l, S, c, min(2 * progress, 1))
    if teacher:
        released = teacher == "handcrafted"
        alpha, u = (1.0, 0.5) if released else (1 - progress / 2, u)
        align = loss_weighted(l[0], mixed_posterior(l[0], l_hand, S, alpha))
        w = balance(pll, align)
        loss = u * pll + (1 - u) * w * align
        shown = {"align": align.detach(), "w": w, "alpha": alpha, "u": u}
    else:
        shown = {}
    optimizer, schedule, scaler = descent
    optimizer.zero_grad()
    scaler.scale(loss + extra).backward()
    data.average_gradients(optimizer)
    scaler.step(optimizer)                                              # not if fp16 overflowed
    schedule.step()
    skip = data.skipped(scaler, optimizer)

    if objective == "rc":                                               # RC asks the new V
        with torch.no_grad():
            l = logits(model, prompt, f, autocast)                              # (A, B, C)
    if objective in ("rc", "proden", "lws", "crdpll"):
        table[i] = confidence(objective, l, S)
    scaler.update()
    return {"loss": loss.detach(), "pll": pll.detach(), **shown, "skipped": skip}


# ======== evaluation ========


@torch.no_grad()
def hand_crafted(model, class_names, templates, autocast):
    """The classifier (C, D) of the hand-crafted prompts: the mean of the templates' texts."""
    with autocast():
        t = sum(F.normalize(model.encode_text(clip.tokenize(
            [template.format(c) for c in class_names], truncate=True).to(model.logit_scale.device),
            chunk=256).float(), dim=1) for template in templates)
    return F.normalize(t, dim=1)


@torch.no_grad()
def predict(model, prompt, f, autocast):
    """Logits (N, C) of features (N, D), on the CPU."""
    return logits(model, prompt, f.to(model.logit_scale.device), autocast).cpu()


# same in coft.py
def accuracy(p, y_true):
    """Percent of the images whose argmax_k p_k is the true class; None without labels."""
    if y_true is not None:
        return round(100 * float((p.argmax(dim=1) == y_true).double().mean()), 2)


def nearest_words(model, V):
    """The vocabulary's word nearest to each context vector, with its distance. V (L, W)."""
    E = model.token_embedding.weight.detach()
    ids = E.any(dim=1).nonzero()[:, 0]                                  # tiny lacks most words
    distance, near = torch.cdist(V.detach(), E[ids]).min(dim=1)                 # (L,) each
    return [f"{SimpleTokenizer().decode([k]).strip()} {d:.2f}"
            for k, d in zip(ids[near].tolist(), distance.tolist())]


def write_disambiguated(path, images, class_names, S, l):
    """disambiguated.csv: each training image, its candidates, the likeliest one. l, S (N, C)."""
    score, y = masked_softmax(l, S).max(dim=1)                                  # (N,) each
    with data.replacing(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "candidates", "label", "confidence"])
        for image, row, k, q in zip(images.names, S.tolist(), y.tolist(), score.tolist()):
            candidates = "|".join(c for c, inside in zip(class_names, row) if inside)
            table.writerow([image, candidates, class_names[k], f"{q:.4f}"])


# ======== main ========


def made_candidates(args, images, class_names, p0):
    """(sets (N, C) bool, one line about them) made from the labels; `instance` prefers the classes
    that the zero-shot posterior p0 (N, C) finds likely."""
    y, C = images.y_true, len(class_names)                              # to make candidates
    sets = (data.flip_candidates(y, C, args.q, args.seed) if args.candidates == "uniform" else
            data.hard_candidates(p0, y, args.q, args.seed))
    return sets, data.describe_candidates(sets, y)


def adapt(args):
    """The whole run: zero-shot, candidates, training, the files. Returns the summary."""
    made = args.candidates in MADE
    if not (made or os.path.isfile(args.candidates)):
        raise data.DataError(f"--candidates {args.candidates}: expected uniform, instance or a CSV "
                             f"or JSON file")
    device, found, model, clip_name = data.begin(args)
    if made and found.train.y_true is None:
        raise data.DataError("the training images have no labels to make candidate sets from: give "
                             "--candidates FILE (CSV or JSON: image, its possible classes)")
    usual = TINY if model.visual.output_dim < 512 else CLIP
    L, lr, epochs, shots = (u if given is None else given for given, u in zip(
        (args.ctx, args.lr, args.epochs, args.shots), usual))
    K = shots if made else args.shots                                   # a FILE: all, unless asked
    if K:
        found.train = found.train.subset(data.few_shot(found.train, K, args.seed))
    names, y_true, y_test = found.class_names, found.train.y_true, found.test.y_true
    given = None if made else data.read_candidates(args.candidates, found.train, names)
    workers = data.pick_workers(args.workers, found.train)
    autocast, _ = data.precision(args.amp, device)
    plain, weak, strong = views = data.transforms(model.visual.input_resolution)
    run = data.Run(args.out, {**vars(args), "found": found.description}, args.resume,
                   args.overwrite)
    run.say(found.description)
    run.say(data.keep_decoded(found, views, args.cache))

    load = partial(data.loader, seed=args.seed, workers=workers, device=device)
    shown = {"crdpll": (weak, weak, strong), "pico": (weak, strong)}.get(args.objective, (weak,))
    features = Features(model, partial(load, found.train.view(*shown)), len(shown),
                        args.batch_size, args.cache_features, autocast)
    f_train, f_test = (features.table(load(images.view(plain), args.batch_size), 1, len(images))[0]
                       for images in (found.train, found.test))                 # (N, D)
    t_hand, tau = hand_crafted(model, names, found.templates, autocast), model.logit_scale.exp()
    p0, p0_test = (posterior(f, t_hand.cpu(), tau.cpu()) for f in (f_train, f_test))    # (N, C)
    sets, about = given or made_candidates(args, found.train, names, p0)        # (N, C) bool
    zero = accuracy(p0_test, y_test)
    run.say(f"{len(sets)} images in use, {about}")
    run.say("no test labels" if zero is None else f"zero-shot accuracy {zero:.2f} %")
    data.check_label_order(found, zero)

    torch.manual_seed(args.seed)
    prompt, contrast = Prompt(model, names, found.templates[0], L).to(device), None
    reference = copy.deepcopy(prompt) if args.supervised and y_true is not None else None
    table = confidence(args.objective, torch.zeros(1, *sets.shape), sets).to(device)    # (N, C)
    total = max(1, min(epochs * len(features.batches), args.max_steps or 10**9))   # steps
    parts, descents = {}, []
    if args.objective == "pico":
        contrast = parts["contrast"] = Contrast(f_train.shape[1], len(names)).to(device)
    for name, learner in (("prompt", prompt), ("reference", reference)):
        if learner is None:
            continue
        groups = [{"params": learner.parameters(), "lr": lr}]
        if name == "prompt" and contrast is not None:
            groups.append({"params": contrast.head.parameters(), "lr": 0.01})
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4,    # as CoOp
                                    fused=device.type == "cuda")
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: 0.5 + 0.5 * math.cos(math.pi * k / total))
        parts |= {name: learner, f"{name} optimizer": optimizer, f"{name} schedule": schedule}
        scaler = data.precision(args.amp, device)[1]    # each its own: the two are independent
        parts[f"{name} scaler"] = scaler
        descents.append((optimizer, schedule, scaler))
    if reference is not None:           # true labels, the only candidates: CoOp, arXiv 2109.01134
        one = F.one_hot(y_true, len(names)).float()                             # (N, C)
        truth = one.bool(), one.to(device), t_hand
    first, step, rows = 0, 0, []                        # rows: what the steps of this epoch showed
    if run.state:                                       # perhaps from the middle of an epoch
        saved = run.restore(parts)
        first, step, rows = (saved[k] for k in ("epoch", "step", "rows"))
        table = saved["table"].to(device)

    for epoch in range(first, epochs):
        if step >= total and not rows:
            break
        for step, (f, i) in run.steps(zip(range(step + 1, total + 1), features.epoch(
                epoch, len(rows))), min(args.batch_size, len(sets))):
            now = (epoch, (step - 1) / total, f, i, model)
            rows.append(train_step(args.objective, args.align and args.teacher, *now, prompt,
                                   contrast, (sets, table, t_hand), descents[0], autocast))
            if reference is not None:                                           # diagnostics only
                pause = time.time()
                train_step("naive", None, *now, reference, None, truth, descents[1], autocast)
                run.busy -= time.time() - pause
            run.live(lambda: f"epoch {epoch + 1}/{epochs} step {step}/{total} loss "
                     f"{float(rows[-1]['loss']):.3f} {run.speed():.0f} img/s, "
                     f"{(total - step) * args.batch_size / run.speed():.0f} s left")
        where = "training", step, "--lr"
        rows, line = run.read(rows, *where)
        if run.asked:                                                           # to stop
            run.checkpoint(parts, epoch=epoch, step=step, rows=rows, table=table)
        l = predict(model, prompt, f_test, autocast)                            # (N, C)
        run.check([float(l.sum())], *where)
        line["accuracy"] = accuracy(l, y_test)
        if y_true is not None:                                                  # diagnostics only
            l = predict(model, prompt, f_train, autocast)                       # (N, C)
            line["disambiguation"] = accuracy(l.masked_fill(~sets, -math.inf), y_true)
        if reference is not None:                                               # diagnostics only
            line["supervised"] = accuracy(predict(model, reference, f_test, autocast), y_test)
        run.epoch({"epoch": epoch + 1}, epochs, device, **line)
        rows = []
        run.checkpoint(parts, epoch=epoch + 1, step=step, rows=rows, table=table)

    l, l_test = (predict(model, prompt, f, autocast) for f in (f_train, f_test))    # (N, C) each
    write_disambiguated(run.out / "disambiguated.csv", found.train, names, sets, l)
    data.write_predictions(run.out / "predictions.csv", found.test.names, names,
                           l_test.softmax(dim=1), p0_test)
    words = nearest_words(model, prompt.V)
    run.say("words nearest to the context (and distance): " + ", ".join(words))
    run.save("model.pt", {"prompt": prompt.state_dict(), "ctx": L, "class_names": names,
                          "template": found.templates[0], "clip": clip_name})
    top = None if reference is None else predict(model, reference, f_test, autocast)
    summary = {"zero_shot": zero, "accuracy": accuracy(l_test, y_test),
               "supervised": None if reference is None else accuracy(top, y_test),
               "candidates": about, "nearest_words": words, **run.totals(device)}
    run.log(**summary)
    run.say("".join(f"{k.replace('_', '-')} {summary[k]:.2f} %, " for k in (
        "zero_shot", "supervised", "accuracy") if summary[k] is not None)
        + f"{summary['seconds']:.0f} s; results in {run.out}")
    return summary


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="Learn a CLIP prompt from candidate labels. Without arguments: the demo.",
        formatter_class=data.Help)
    data.add_common(parser, "prompt_align", 32)
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction}
    add("--objective", choices=OBJECTIVES, default="cc", help="Eq. 3-9")
    add("--align", default=True, help="Eq. 11; without: the objective alone", **switch)
    add("--teacher", choices=["mixed", "handcrafted"], default="mixed", help="Eq. 10; handcrafted: "
        "alpha stays 1, as in the released code")
    add("--candidates", default="uniform", metavar="uniform|instance|FILE", help="made from the "
        "labels: all wrong ones alike, or those CLIP finds likely; or your CSV or JSON (data.py)")
    add("--q", type=float, default=0.5, help="chance of a wrong label to be a candidate, 0 to 1")
    add("--shots", type=data.natural, metavar="K", help="training images per class, 0: all; "
        "default: 16; all for tiny or with a FILE")
    add("--ctx", type=data.natural, metavar="L", help="random context tokens; 0: the template's "
        "words; default: 0 for tiny, else 16")
    add("--lr", type=data.above_zero, help="of V (SGD, cosine); default: 0.1 for tiny, else 0.002")
    add("--epochs", type=data.natural, help="default: 20 for tiny, else 100")
    add("--cache-features", default=True, help=f"encode {PASSES} augmentations of each image and "
        "use them in turn; without: a new one in each epoch", **switch)
    add("--supervised", default=True, help="also learn from the true labels, to compare", **switch)
    args = parser.parse_args(argv)
    if not 0 <= args.q <= 1:
        parser.error(f"argument --q: expected a number in [0, 1], got {args.q}")
    return args


# same in coft.py
def main(argv=None):
    """Command line. Returns the exit status, see `data.command_line`."""
    return data.command_line(adapt, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
