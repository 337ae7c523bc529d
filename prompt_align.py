"""Prompt alignment: learn a CLIP prompt from candidate labels (arXiv 2407.07638, DASFAA 2025).

Each image has a set of possible labels, the true one among them. An objective for such partial
labels ("PLL"; eight are here) trains a prompt, and degrades as the sets grow. The paper's remedy:
the prompt must also agree with a mix of the hand-crafted prompt's posterior and its own, within the
candidates. CLIP is frozen.

    f = encode(A views of the images)                       --passes times, before training
    l, l_hand = tau f.t(prompt), tau f.t_hand               t: texts of the classes
    c = table[i]                                            how far each candidate is believed
    pll = pll_loss(objective, l, S, c, lam)                 PiCO has also Eq. 9         Eq. 3-8
    align = loss_weighted(l[0], mixed_posterior(l[0], l_hand, S, alpha))  alpha 1 -> 0  Eq. 10, 5
    loss = pll + balance(pll, align) * align                both are equally large      Eq. 11
    table[i] = confidence(objective, l, S)                  RC, PRODEN, LWS, CRDPLL     Eq. 2

This is `--teacher dynamic`. How much it helps depends on objective and sets: tens of points, or
less than nothing. The default trains several prompts and adds their logits: one learns from `align`
+ CC, the likelihood of the sets, one from CC alone and, if `pll` is another objective, one from
that. The first two predict together; the third joins them if that makes a held-out fifth of the
sets likelier, for prompts that learnt from the rest.

A views of an image, B batch, C classes, D embedding, L context words, M prompts, N images, T tokens
of a text, W width of a word; PiCO: d its space, Q keys; S (B, C) bool candidate sets; tau =
exp(logit_scale), f and t unit vectors, p = softmax(l), Eq. (1). Equation numbers are ours.

Run:  python prompt_align.py                                the demo, offline; 16 to 25 seconds
      python prompt_align.py --data ./oxford_pets           OpenAI's CLIP: not measured
      python prompt_align.py --data ./photos --classes cat,dog --candidates sets.csv

Decided here (the paper's text was not at hand; "released" is its authors' code):
- several prompts instead of Eq. (11), which `--teacher dynamic` and `handcrafted` (alpha = 1, as
  released) have. Sets that follow CLIP's own posterior (`follow_clip`) cannot correct it: there the
  aligned prompt predicts alone;
- w of Eq. (11) is at least `MIN_WEIGHT`; features are normalised (released aligned runs: not);
- PRODEN, LWS and CRDPLL update c by the step's own logits, RC by the prompt after it; LWS starts at
  1/|S| in S, 1/(C - |S|) elsewhere (released: 1/C); CAVL takes the step's own argmax (its authors:
  the previous visit's); PiCO's head learns from its own loss (released: nothing trains it), its
  slow copy moves after the key, both averages by 0.99 (released: 0.999, prototypes 0.9), phi and
  CRDPLL's lam change per step, a class without prototype is chosen last.
"""
import argparse
import copy
import csv
import io
import math
import os
import sys
import unicodedata
from functools import cache, partial

os.environ.setdefault("GOMP_SPINCOUNT", "2000")   # before torch is imported: README, "Speed"
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data

# ======== equations ========

def masked_softmax(l, S):
    """Eq. (2): softmax_S(l)_k = exp(l_k) / sum_{j in S} exp(l_j) for k in S, else 0; 0 if S is
    empty. A target: it has no gradient. l, S (B, C) -> (B, C)."""
    return l.detach().masked_fill(~S, -math.inf).softmax(dim=1).masked_fill(~S, 0.0)


def log_inside(l, S):
    """log sum_{k in S} p_k. l, S (B, C) -> (B,)."""
    return l.masked_fill(~S, -math.inf).logsumexp(dim=1) - l.logsumexp(dim=1)


def loss_cc(l, S):
    """Eq. (4), CC (arXiv 2007.08929): mean of -log sum_{k in S} p_k. l, S (B, C)."""
    return -log_inside(l, S).mean()


def loss_weighted(l, c):
    """Eq. (5): mean of -sum_k c_k log p_k. c: the table's for RC (arXiv 2007.08929), PRODEN
    (2002.08053), PiCO; q of Eq. (10) for the alignment; 1/|S| in S for naive, Eq. (3), as if every
    candidate were right. l, c (B, C)."""
    return -(c * l.log_softmax(dim=1)).sum(dim=1).mean()


def log_one_minus(l):
    """log(1 - p_k), exact also where the largest p_k rounds to 1. (B, C)."""
    top = l.argmax(dim=1, keepdim=True)                                         # (B, 1)
    rest = l.scatter(1, top, torch.finfo(l.dtype).min).logsumexp(dim=1) - l.logsumexp(dim=1)  # (B,)
    others = l.softmax(dim=1).scatter(1, top, 0.0)                              # (B, C), <= 1/2
    return torch.log1p(-others).scatter(1, top, rest[:, None])                  # (B, C)


def loss_lws(l, S, c):
    """Eq. (6), LWS (arXiv 2106.05731), log loss, beta = 1: mean of -sum_{k in S} c_k log p_k
    - sum_{k not in S} c_k log(1 - p_k). l, S, c (B, C)."""
    return -(c * torch.where(S, l.log_softmax(dim=1), log_one_minus(l))).sum(dim=1).mean()


def loss_cavl(l, S):
    """Eq. (7), CAVL (Zhang et al., ICLR 2022): cross-entropy on argmax_{k in S} |l_k - 1| l_k, the
    class activation value. l, S (B, C)."""
    v = ((l - 1).abs() * l).masked_fill(~S, -math.inf)                          # (B, C)
    return F.cross_entropy(l, v.argmax(dim=1))


def loss_crdpll(l, S, c, lam):
    """Eq. (8), CRDPLL (Wu et al., ICML 2022): mean of lam sum_v KL(c || p^v)
    - sum_{k not in S} log(1 - p^0_k), p^v of view v. l (A, B, C); S, c (B, C)."""
    kl = sum(F.kl_div(view.log_softmax(dim=1), c, reduction="batchmean") for view in l)
    return lam * kl - (log_one_minus(l[0]) * ~S).sum(dim=1).mean()


def loss_contrastive(z, y, keys, y_keys, temperature=0.07):
    """Eq. (9), PiCO (arXiv 2201.08984): mean of -log softmax_j(z_i.z_j / temperature) over the j of
    label y_i in batch and keys, but i. z (B, d), y (B,), keys (Q, d), y_keys (Q,)."""
    me = torch.eye(len(z), len(z) + len(keys), dtype=torch.bool, device=z.device)   # (B, B + Q)
    positive = (y[:, None] == torch.cat([y, y_keys])) & ~me                     # (B, B + Q)
    s = (z @ torch.cat([z, keys]).T / temperature).masked_fill(me, -math.inf)   # (B, B + Q)
    log_p = torch.where(positive, s.log_softmax(dim=1), 0.0)
    return -(log_p.sum(dim=1) / positive.sum(dim=1).clamp(min=1)).mean()


def pll_loss(objective, l, S, c, lam):
    """Eq. (3)-(8) by name. l (A, B, C), all but CRDPLL learn from the first view; S, c (B, C)."""
    if objective == "cc":
        return loss_cc(l[0], S)
    elif objective == "lws":
        return loss_lws(l[0], S, c)
    elif objective == "cavl":
        return loss_cavl(l[0], S)
    elif objective == "crdpll":
        return loss_crdpll(l, S, c, lam)
    elif objective in ("naive", "rc", "proden", "pico"):
        return loss_weighted(l[0], c)                   # by c they differ


def confidence(objective, l, S):
    """Rows of the table: softmax_S(l); LWS also weighs the others; CRDPLL takes the geometric mean
    of the views' softmax, which is that of the mean logits. l (A, B, C), S (B, C) -> (B, C)."""
    if objective == "lws":
        return masked_softmax(l[0], S) + masked_softmax(l[0], ~S)
    return masked_softmax(l.mean(dim=0) if objective == "crdpll" else l[0], S)


def mixed_posterior(l, l_hand, S, alpha):
    """Eq. (10): q = alpha softmax_S(l_hand) + (1 - alpha) softmax_S(l). (B, C) each -> (B, C)."""
    return alpha * masked_softmax(l_hand, S) + (1 - alpha) * masked_softmax(l, S)


MIN_WEIGHT = 0.03   # the alignment stays on where the objective says nothing, as CC on full sets


def balance(pll, align):
    """Eq. (11): w = pll / align, at least MIN_WEIGHT, a constant: both losses are equally large."""
    return (pll.detach() / align.detach().clamp(min=1e-8)).clamp(min=MIN_WEIGHT)


def helps(l, S):
    """Whether sets that no prompt learnt from are likelier under the mean of all prompts' logits
    than under that of all but the last. l (M, N, C), S (N, C)."""
    with_it, without = (log_inside(some.mean(dim=0), S).mean() for some in (l, l[:-1]))
    return bool(with_it > without)


def follow_clip(p, S):
    """Whether the candidates are CLIP's own likely mistakes: the half of an image's classes that
    CLIP finds least likely enters its set less than 3/4 as often as wrong classes do on average
    (drawn uniformly: about as often). p, S (N, C)."""
    known = ~S.all(dim=1)                               # full sets say nothing
    C, p, S = S.shape[1], p[known], S[known]
    size = S.sum(dim=1).double().mean()
    unlikely = S.gather(1, p.argsort(dim=1))[:, :C // 2].double().mean()
    return bool(unlikely < 0.75 * (size - 1) / max(1, C - 1))


# ======== modules ========

class Prompts(nn.Module):
    """M prompts of L learnable context vectors, the same before each class name: [V_1] ... [V_L]
    cat. They start from random words, as large as CLIP's own; for L = 0 from the template's words
    before the class name, as CLIP's zero-shot classifier ("a photo of a" if there are none). M
    weights make one classifier of them, t_k = sum_m weight_m t_mk: the logits add up so, too."""
    def __init__(self, clip_model, class_names, template, L, weights):
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
        start = emb[0, 1:1 + n].repeat(len(weights), 1, 1)              # (M, L, W)
        if L:
            start = vectors[vectors.any(dim=1)].std() * torch.randn_like(start)
        self.ctx = nn.Parameter(start)                                  # (M, L, W)
        self.register_buffer("emb", emb, persistent=False)              # (C, T, W)
        self.register_buffer("eot", tokens.argmax(dim=1), persistent=False)     # (C,)
        self.register_buffer("weights", emb.new_tensor(weights))         # (M,)

    def each(self, clip_model):
        """-> t (M, C, D), unit rows, in one pass."""
        M, L, _ = self.ctx.shape
        emb = self.emb.expand(M, -1, -1, -1)                            # (M, C, T, W)
        ctx = self.ctx[:, None].expand(-1, len(self.emb), -1, -1)       # (M, C, L, W)
        emb = torch.cat([emb[:, :, :1], ctx, emb[:, :, 1 + L:]], dim=2)
        t = clip_model.encode_text_embeddings(emb, self.eot, 1 + L)
        return F.normalize(t.float(), dim=-1)

    def forward(self, clip_model):
        """-> t (C, D)."""
        return (self.weights[:, None, None] * self.each(clip_model)).sum(dim=0)


class Contrast(nn.Module):
    """PiCO's second space: a head and its slow copy, a queue of keys, a prototype per class. With
    CLIP frozen, the contrastive loss trains the head alone; the prototypes choose among the
    candidates, and so reach the prompt by the table of confidences."""
    def __init__(self, D, C, d=128, queue=1024):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, d))
        self.slow_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("keys", F.normalize(torch.randn(queue, d), dim=1))     # (Q, d)
        self.register_buffer("y_keys", torch.full((queue,), -1))                    # (Q,) -1: none
        self.register_buffer("prototypes", torch.zeros(C, d))                       # (C, d)

    @torch.no_grad()
    def update(self, z, key, y, m=0.99):
        """The batch enters queue and prototypes; z, key (B, d), y (B,)."""
        n = F.one_hot(y, len(self.prototypes)).sum(dim=0)[:, None]                  # (C, 1)
        total = torch.zeros_like(self.prototypes).index_add(0, y, z)                # (C, d)
        mixed = m ** n * self.prototypes + (1 - m ** n) * total / n.clamp(min=1)    # n steps
        self.prototypes.copy_(F.normalize(mixed, dim=1))
        self.keys.copy_(torch.cat([key, self.keys])[:len(self.keys)])
        self.y_keys.copy_(torch.cat([y, self.y_keys])[:len(self.keys)])
        for slow, fast in zip(self.slow_head.parameters(), self.head.parameters()):
            slow.lerp_(fast, 1 - m)


# ======== training ========

OBJECTIVES = ("naive", "cc", "rc", "proden", "lws", "cavl", "crdpll", "pico")
SETTINGS = {    # where no flag says otherwise: (tiny: few words, a short tower; as released)
    "ctx": (0, 16), "lr": (0.1, 2e-3), "epochs": (20, 100), "shots": (0, 16)}


@torch.no_grad()
def encode(job, view, epoch=0):
    """Unit features of the A views of N images, augmented as in `epoch`: (A, N, D), on the CPU."""
    f = torch.zeros(len(view.transforms), len(view), job.clip_model.visual.output_dim)
    for *x, i in job.load(view, seed=job.args.seed, epoch=epoch):               # (B, 3, R, R) each
        with job.autocast():
            f_x = job.clip_model.encode_image(torch.cat(x))                     # (A B, D)
        f[:, i] = F.normalize(f_x.float(), dim=1).unflatten(0, (len(x), -1)).cpu()
    return data.all_reduce_sum(f)


def logits(job, prompts, f):
    """l = tau f.t of each prompt, in fp32 whatever the precision of CLIP's. f (A, B, D) ->
    (M, A, B, C)."""
    with job.autocast():
        t = prompts.each(job.clip_model)                                        # (M, C, D)
    return job.tau * f @ t.mT[:, None]


class Learner(nn.Module):
    """The prompts, their optimiser for so many steps, the candidate sets and their confidences
    (N, C). weights, of the prompts in the prediction: [aligned, CC's, the objective's]; [aligned,
    CC's], the objective then is CC; [1], of the only one."""
    def __init__(self, job, sets, steps, weights):
        super().__init__()
        self.objective = objective = job.args.objective if len(weights) != 2 else "cc"
        torch.manual_seed(job.args.seed)
        self.prompts = Prompts(job.clip_model, job.dataset.class_names, job.dataset.templates[0],
                               job.args.ctx, weights)
        groups = [{"params": self.prompts.parameters(), "lr": job.args.lr}]
        if objective == "pico":
            self.contrast = Contrast(job.clip_model.visual.output_dim, sets.shape[1])
            groups.append({"params": self.contrast.head.parameters(), "lr": 0.01})
        self.trusts_sets = any(weights[1:])
        self.register_buffer("sets", sets)
        self.register_buffer("table", confidence(objective, torch.zeros(1, *sets.shape), sets))
        self.to(job.device)
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)   # as CoOp
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / max(1, steps)))


def pico_step(learner, epoch, progress, f, i, l, S):
    """PiCO's part of a step: moves the confidences towards the candidate of the nearest prototype,
    updates queue and prototypes; returns the head's loss. f (A, B, D), i (B,), l (A, B, C), S."""
    contrast, table = learner.contrast, learner.table
    z = F.normalize(contrast.head(f[0]), dim=1)                                 # (B, d)
    key = F.normalize(contrast.slow_head(f[1]), dim=1)                          # (B, d)
    y = masked_softmax(l[0], S).argmax(dim=1)                                   # (B,)
    keys, y_keys = torch.cat([key, contrast.keys]), torch.cat([y, contrast.y_keys])
    loss = 0.5 * loss_contrastive(z, y, keys, y_keys)
    if epoch > 0:                                       # the first epoch only builds prototypes
        cosine = z @ contrast.prototypes.T                                      # (B, C)
        cosine = cosine.masked_fill(~contrast.prototypes.any(dim=1), -2.0)      # without one: last
        nearest = F.one_hot(masked_softmax(cosine, S).argmax(dim=1), S.shape[1])    # (B, C)
        phi = 0.95 - 0.15 * progress
        table[i] = phi * table[i] + (1 - phi) * nearest
    contrast.update(z.detach(), key, y)
    return loss


def train_step(job, learner, epoch, progress, f, i):
    """One step on the features f (A, B, D) of the images i (B,). Returns what the log shows."""
    objective, scaler, scale = learner.objective, job.scaler, job.scaler.get_scale()
    f, i = f.to(job.device), i.to(job.device)
    S, extra = learner.sets[i], 0.0                                             # (B, C)
    l_each = logits(job, learner.prompts, f)                                    # (M, A, B, C)
    l_align, l = l_each[0], l_each[-1]                  # the same if one prompt is all
    if objective == "pico":
        extra = pico_step(learner, epoch, progress, f, i, l, S)
    c = learner.table[i]                                                        # (B, C)
    loss = pll = pll_loss(objective, l, S, c, lam=min(2 * progress, 1))
    shown = {"pll": pll.detach()}
    if job.args.align:
        alpha = 1.0 if job.args.teacher == "handcrafted" else 1 - progress
        l_hand = job.tau * f[0] @ job.t_hand.T                                  # (B, C)
        align = loss_weighted(l_align[0], mixed_posterior(l_align[0], l_hand, S, alpha))
        w = balance(pll, align) if len(l_each) == 1 else 1.0
        loss = pll + w * align
        if learner.trusts_sets:                         # CC for all but the last, which has pll
            loss = loss + sum(loss_cc(l_m[0], S) for l_m in l_each[:-1])
        shown |= {"align": align.detach(), "w": w, "alpha": alpha}
    learner.optimizer.zero_grad()
    scaler.scale(loss + extra).backward()
    scaler.step(learner.optimizer)                      # left out if fp16 overflowed,
    scaler.update()                                     # which lowers the scale
    skipped = scaler.get_scale() < scale
    if not skipped:
        learner.schedule.step()

    if objective == "rc":                               # RC asks the prompt after the step
        with torch.no_grad():
            l = logits(job, learner.prompts, f)[-1]                             # (A, B, C)
    if objective not in ("naive", "pico"):              # CC and CAVL do not read it
        learner.table[i] = confidence(objective, l, S)
    return {"loss": loss.detach(), **shown, "skipped": int(skipped)}


def train(job, passes, sets, weights, trial=False):
    """The epochs, each on the features (A, N, D) of one of the passes; a trial leaves no traces in
    the run folder. weights: see Learner, which it returns."""
    args, run, N, B = job.args, job.run, len(sets), min(job.args.batch_size, len(sets))
    steps = min(args.epochs * (N // B), args.max_steps or math.inf)
    epochs, learner = math.ceil(steps / (N // B)), Learner(job, sets, steps, weights)
    parts = {"learner": learner, "scaler": job.scaler, "optimizer": learner.optimizer,
             "schedule": learner.schedule}
    first = run.restore(parts)["epoch"] if run.state else 0                     # --resume
    for epoch in range(first, epochs):
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
        torch.randint(2**62, (N,), generator=rng)       # unused: keeps EpochSampler's order
        batches = torch.randperm(N, generator=rng)[:N - N % B].split(B)         # (B,) each
        done = epoch * (N // B)                         # steps before this epoch
        taken = run.steps(batches, B, f"epoch {epoch + 1}/{epochs}", steps - done)
        for step, i in enumerate(taken, done):
            f = passes[epoch % len(passes)][:, i]                               # (A, B, D)
            run.rows.append(train_step(job, learner, epoch, step / steps, f, i))
        means = run.means("--lr")
        if not trial:
            run.report(epoch=epoch + 1, **means, **evaluate(job, learner)[2])
            run.checkpoint(parts, epoch=epoch + 1)
    return learner


def choose_weights(job, passes, sets):
    """The weights of the prompts, see Learner: [1] for Eq. 11, or no alignment; [1, 0], the aligned
    one alone predicts; [1/3] * 3 if the objective's `helps` to explain a fifth of the sets (N, C),
    where all three learnt from the others; else [1/2, 1/2]."""
    args, run = job.args, job.run
    if run.state:                                       # --resume has them
        return run.state["learner"]["prompts.weights"].tolist()
    elif not args.align or args.teacher != "evidence":
        return [1.0]
    elif follow_clip(posterior(job, job.f_train, job.t_hand), sets):
        run.say("the sets seem to follow CLIP's own posterior: --objective is not used")
        return [1.0, 0.0]
    elif args.objective == "cc":
        return [0.5, 0.5]
    held = torch.arange(len(sets)) % 5 == 4                                     # (N,)
    learner = train(job, [f[:, ~held] for f in passes], sets[~held], [1.0, 1.0, 1.0], trial=True)
    with torch.no_grad():
        l = logits(job, learner.prompts, job.f_train[None, held].to(job.device))
    joins = helps(l[:, 0].cpu(), sets[held])                                    # l (3, 1, n, C)
    run.say(f"{args.objective} {'helps' if joins else 'does not help'} to explain held-out sets")
    return [1 / 3] * 3 if joins else [0.5, 0.5]


# ======== evaluation ========

def posterior(job, f, t):
    """Eq. (1): softmax(tau f.t), on the CPU. f (N, D), t (C, D) -> (N, C)."""
    return (job.tau * f.to(job.device) @ t.T).softmax(dim=1).cpu()


@torch.no_grad()
def evaluate(job, learner):
    """Logits of the training and the test images, (N, C) each, on the CPU; percent, or None:
    accuracy on the test images, likeliest candidates that are true."""
    with job.autocast():
        t = learner.prompts(job.clip_model)                                     # (C, D)
    l_train, l_test = ((job.tau * f.to(job.device) @ t.T).cpu() for f in (job.f_train, job.f_test))
    inside = l_train.masked_fill(~learner.sets.cpu(), -math.inf)                # (N, C)
    return l_train, l_test, {
        "accuracy": data.accuracy(l_test.argmax(dim=1), job.dataset.test.y_true),   # diagnostics
        "disambiguation": data.accuracy(inside.argmax(dim=1), job.dataset.train.y_true)}


def write_disambiguated(path, images, class_names, S, l):
    """disambiguated.csv: each training image, its candidates, the likeliest one. l, S (N, C)."""
    score, y = masked_softmax(l, S).max(dim=1)                                  # (N,) each
    with data.replacing(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["image", "candidates", "label", "confidence"])
        for image, row, k, p in zip(images.names, S.tolist(), y.tolist(), score.tolist()):
            candidates = "|".join(c for c, inside in zip(class_names, row) if inside)
            table.writerow([image, candidates, class_names[k], f"{p:.4f}"])


# ======== candidate labels ========

def draw_candidates(p, y_true, q, seed):
    """The true label, and wrong label k with probability min(1, q (C-1) p_k / sum_{j != y} p_j). p
    (N, C) all ones: each with q, as in PiCO (arXiv 2201.08984); a posterior: likely mistakes more
    often, nearly VALEN's (Xu et al. 2021), which has C for C-1. y_true (N,) -> (N, C)."""
    wrong = p.double().scatter(1, y_true[:, None], 0.0)                         # (N, C)
    mass = wrong.sum(dim=1, keepdim=True)                                       # (N, 1)
    chance = torch.where(mass > 0, q * (p.shape[1] - 1) * wrong / mass, q)      # (N, C)
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(p.shape, generator=rng) < chance).scatter(1, y_true[:, None], True)


def read_candidates(path, images, class_names):
    """(sets (N, C), a line about them) of the user's JSON {image: [class, ...]} or CSV: the image,
    then its classes, in columns or separated by | or ;. Classes are names or indices from 0. Images
    go by path, or by file name if no other has it; without an entry they may be of any class."""
    C, indices = len(class_names), {}
    classes_of = cache(lambda cell: data.meant(cell, class_names))      # ImageNet: two `missile`
    nfc = partial(unicodedata.normalize, "NFC")         # macOS: accents are characters themselves
    for i, image in enumerate(images.names):
        indices.setdefault(os.path.basename(nfc(image)), []).append(i)
    indices |= {nfc(image): [i] for i, image in enumerate(images.names)}    # a path wins
    numbers = range(0 if any(map(str.isdecimal, class_names)) else C)   # is a class `1`: none
    sets = torch.zeros(len(images), C, dtype=torch.bool)
    for where, image, cells in candidate_rows(path, classes_of):
        if not cells:
            raise data.DataError(f"{where}: expected at least one candidate class")
        elif len(set(cells)) < len(cells) and not any(map(classes_of, cells)):  # an index twice
            raise data.DataError(f"{where}: expected an image's classes, not a column per class")
        found = indices.get(nfc(image.replace("\\", "/").removeprefix("./")), [])
        for cell in cells:
            chosen = classes_of(cell)
            if not chosen and not (cell.isdecimal() and int(cell) in numbers):
                raise data.DataError(f"{where}: expected a class"
                                     f"{f' or 0 to {C - 1}' if numbers else ''}, got {cell}")
            if len(found) == 1:
                sets[found[0], chosen or int(cell)] = True
    missing = ~sets.any(dim=1)                                                  # (N,)
    if missing.all():
        raise data.DataError(f"{path}: expected images like {images.names[0]}, found none of them")
    sets[missing] = True
    note = f"; {int(missing.sum())} have no entry of their own in {path}: all classes"
    return sets, note if missing.any() else ""


def candidate_rows(path, classes_of):
    """(where, image, [class, ...]) of each entry. A CSV's first line without a dot is a header."""
    if path.lower().endswith(".json"):
        content = data.read_json(path)
        if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
            raise data.DataError(f"{path}: expected {{image: [class, ...], ...}}")
        for image, cells in content.items():
            yield f"{path}: {image}", image, [str(cell) for cell in cells]
        return
    text = data.read_text(path)
    first = text.lstrip().split("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=min(
        (d for d in ",;\t|" if d in first), key=first.index, default=","))
    for n, (image, *cells) in enumerate(filter(any, rows)):
        cells = "|".join(cells).replace(";", "|").split("|")
        cells = [cell.strip() for cell in cells if cell.strip()]
        if n or "." in image:
            yield f"{path} line {rows.line_num}", image.strip(), cells
        elif len(cells) > 1 and all(map(classes_of, cells)):
            raise data.DataError(f"{path}: expected an image's classes, not a column per class")


def describe_candidates(sets, y_true=None):
    """One line: mean size of the sets (N, C), their range, the share that holds y_true (N,)."""
    size = sets.sum(dim=1)                                                      # (N,)
    line = f"{size.double().mean():.1f} candidate labels an image ({size.min()} to {size.max()})"
    if y_true is not None:                                                      # diagnostics only
        inside = 100 * sets.gather(1, y_true[:, None]).double().mean()
        line += f", the true one among them for {inside:.2f} %"
    return line


# ======== after the run ========

class Adapted(nn.Module):
    """What a run learnt: preprocessed images (B, 3, R, R) -> probabilities of the classes (B, C).
    Has .class_names, and .preprocess: PIL image -> (3, R, R)."""
    def __init__(self, saved, clip_model, full=None, preprocess=None):
        super().__init__()
        self.class_names, self.preprocess = saved["class_names"], preprocess
        self.clip_model = clip_model.requires_grad_(False)
        prompts = Prompts(clip_model, self.class_names, saved["templates"][0], saved["ctx"],
                          saved["models"]["weights"].tolist())
        data.fill(prompts, saved["models"])
        self.register_buffer("t", prompts(clip_model).detach())                 # (C, D)

    def forward(self, x):
        f = F.normalize(self.clip_model.encode_image(x), dim=-1)                # (B, D)
        return (self.clip_model.logit_scale.exp() * f @ self.t.T).softmax(dim=1)


def load(path, device="cpu", weights=None):
    """The `Adapted` model of a run's model.pt; weights: its CLIP, if that lies elsewhere now.
    Raises data.DataError, clip.CLIPError."""
    return Adapted(*data.read_model(path, "prompt_align", weights, device))


# ======== main ========

def adapt(args):
    """The whole run: candidate sets, training, the files."""
    if args.supervised:                                 # arXiv 2109.01134
        args.candidates, args.q, args.objective, args.align = "uniform", 0.0, "naive", False
    made = args.candidates in ("uniform", "instance")   # from the labels
    if not made and args.shots is None:
        args.shots = 0                                  # with a FILE all images, unless asked
    job = data.setup(args, SETTINGS)    # run, device, dataset, clip_model, load
    run, dataset, clip_model, names = job.run, job.dataset, job.clip_model, job.dataset.class_names
    job.autocast = partial(torch.autocast, job.device.type, job.amp_dtype,
                           enabled=job.amp_dtype is not None)
    job.scaler = torch.amp.GradScaler(job.device.type, enabled=job.amp_dtype == torch.float16)

    # the images in use; a file's candidate sets
    y_true, note = dataset.train.y_true, ""             # to make candidates, and for diagnostics
    plain, *_ = transforms = data.transforms(clip_model.visual.input_resolution)
    if args.load:
        dataset.templates = job.saved["templates"]
    elif y_true is None and made:
        raise data.DataError("no labels to make candidate sets from: give --candidates FILE, and "
                             "no --supervised")
    elif args.shots:
        dataset.train = dataset.train.subset(data.few_shot(y_true, args.shots, args.seed))
        run.say(data.cache_pixels(dataset, transforms, args.cache))
        y_true = dataset.train.y_true                                           # (N,)
    if not (made or args.load):
        sets, note = read_candidates(args.candidates, dataset.train, names)     # (N, C)
        if run.state and not sets.equal(run.state["learner"]["sets"]):
            raise data.DataError(f"--resume: this run was begun with other {args.candidates}")

    # CLIP's features and zero-shot posteriors; sets made from them or from the labels alone
    job.tau = clip_model.logit_scale.exp()
    prompts = [[template.format(c) for template in dataset.templates] for c in names]
    job.t_hand = clip.zeroshot_classifier(clip_model, prompts)                  # (C, D)
    job.f_test = encode(job, dataset.test.view(plain))[0]                       # (N, D)
    p0_test = posterior(job, job.f_test, job.t_hand)                            # (N, C)
    zero_shot = data.accuracy(p0_test.argmax(dim=1), dataset.test.y_true)
    index = torch.arange(len(names)).expand(p0_test.shape)                      # (N, C)
    if args.load:
        with job.autocast():
            t = Adapted(job.saved, clip_model).t                                # (C, D)
        return data.write_results(job, posterior(job, job.f_test, t), p0_test, index, zero_shot)

    job.f_train = encode(job, dataset.train.view(plain))[0]                     # (N, D)
    if made:
        p = posterior(job, job.f_train, job.t_hand)                             # (N, C)
        p = p if args.candidates == "instance" else torch.ones_like(p)
        sets = draw_candidates(p, y_true, args.q, args.seed)                    # (N, C)
    about = describe_candidates(sets, y_true) + note
    run.say(f"{len(sets)} images in use, {about}")
    data.report_zero_shot(job, zero_shot)

    # the prompt learns from augmented views: as CLIP is frozen, from their features
    weak, strong = data.augmented_views(job, lambda view: posterior(
        job, encode(job, view)[0], job.t_hand))
    views = {"crdpll": (weak, weak, strong), "pico": (weak, strong)}.get(args.objective, (weak,))
    passes = [encode(job, dataset.train.view(*views), epoch)                    # (A, N, D) each
              for epoch in range(min(args.passes, args.epochs))]
    learner = train(job, passes, sets, choose_weights(job, passes, sets))

    # the results; p_clean of predictions.csv is CLIP's own posterior
    l_train, l_test, percent = evaluate(job, learner)                           # (N, C) each
    write_disambiguated(run.out / "disambiguated.csv", dataset.train, names, sets, l_train)
    data.save_model(job, learner.prompts, ctx=args.ctx)
    data.write_results(job, l_test.softmax(dim=1), p0_test, index, zero_shot,
                       disambiguation=percent["disambiguation"], candidates=about,
                       weights=learner.prompts.weights.tolist())


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data.add_common(parser, "prompt_align", 32)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--objective", choices=OBJECTIVES, default="cc", help="Eq. 3-9 (%(default)s)")
    add("--align", default=True, action=switch, help="Eq. 10; without: the objective alone")
    add("--teacher", choices=["evidence", "dynamic", "handcrafted"], default="evidence",
        help="%(default)s: logits of several prompts, added; one prompt, Eq. 11: dynamic (alpha "
        "falls), handcrafted (alpha = 1)")
    add("--candidates", default="uniform", metavar="uniform|instance|FILE", help="made from the "
        "labels, all wrong ones alike or those CLIP finds likely; or your CSV or JSON")
    add("--q", type=float, default=0.5, help="chance of a wrong label to be in a set (%(default)s)")
    add("--shots", type=int, help="images per class; default: 16; 0, all, for tiny or with a FILE")
    add("--ctx", type=int, help="random words; 0: the template's; default: 16; 0 for tiny")
    add("--lr", type=float, help="of the context (SGD, cosine); default: 0.002; 0.1 for tiny")
    add("--epochs", type=int, help="default: 100; 20 for tiny")
    add("--passes", type=int, default=5, help="augmentations of each image (%(default)s)")
    add("--supervised", default=False, action=switch, help="true labels, to compare: CoOp")
    return parser.parse_args(argv)


def main(argv=None):
    """Command line. Returns the exit status, see `data.command_line`."""
    return data.command_line(adapt, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
