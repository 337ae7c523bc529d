#!/usr/bin/env python
"""CoFT's peers on its own ground: other ways to adapt CLIP without labels. Not in CI's path.

    python .ci/peers.py upl --data demo:narrow --seed 0 --out runs/upl-0
    python .ci/peers.py lafter --data demo:narrow --prompts prompts/demo.json

All get what coft.py gets: the same CLIP, images, views and batches, 10 epochs of N/B steps
(deft 6 + 4), AdamW with its warm-up and cosine, the last epoch; one run is one seed; `accuracy` is
of five crops, as coft.py's, the rest of plain images. The code is ours, each method a function;
what stands in brackets the authors have otherwise.

    upl         UPL, arXiv 2204.03649: CLIP's 16 surest images of each class teach a prompt [one
                prompt, no average of several seeds' or of several CLIPs' labels]
    grip        FPL's and GRIP's pseudo-labels, arXiv 2306.01669: 5 times anew, as many for each
                class, K = N/C/5 to N/C of them [text prompt alone]
    cpl         CPL, arXiv 2406.10502: candidate sets of labels and the loss CC, the sets once anew
                [text prompt alone; no pools of images that grow over ten rounds]
    lafter      LaFTer, arXiv 2305.18287: a classifier of texts labels a weak view, tokens and
                classifier learn from another [from a strong one; tokens in each block, no
                LayerNorms]
    fixmatch    FixMatch, arXiv 2001.07685, on all of the image encoder, started at zero-shot [no
                labels at all, no EMA]
    must        MUST, arXiv 2206.02967: the mean of the weights over the steps labels a weak view,
                all of the image encoder learns from another, parts of it masked, to predict all
                classes as often, and to fill in what is masked [from a strong view; rates that fall
                from block to block; 20 to 60 epochs]
    deft        DeFT, arXiv 2409.19696, whose noisy labels are the zero-shot ones: a negative prompt
                says which are clean, then all of the image encoder learns from those
    supervised  the same full fine-tuning with the true labels: the ceiling; --shots: of few images

The encoder learns at coft.py's --lr2, tokens and classifiers at its --lr1; prompts start at the
template's words, classifiers at the text features. `SETTINGS` that are not the authors' were chosen
for the test accuracy of demo:narrow and demo:slanted, seed 0, among few values.

B batch, C classes, D embedding, K images of a class, M pairs (image, label), N images, P tokens,
W width; f and t are unit vectors, tau = exp(logit_scale), l = tau f.t, p = softmax(l).
"""
import argparse
import copy
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prompt_align  # noqa: E402, first: it sets an environment variable of torch's
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import clip  # noqa: E402
import coft_plus  # noqa: E402
import data  # noqa: E402

EPOCHS, PHASE1 = 10, 6          # in all; in the first of two phases
PASSES = 5                      # weak views of an image that are encoded where CLIP is frozen
LR_LIGHT = 2e-3                 # of prompts, tokens and classifiers: coft.py's --lr1
TOKENS = 4                      # per block: coft.py's peft_size
WORD_STD = 0.06                 # of tiny's word vectors, for which the prompts' rate was chosen
SETTINGS = {
    "prompt_rate": 20.0,                    # upl, grip, cpl: times LR_LIGHT
    "shots": 16,                            # upl: its authors'
    "rounds": 5,                            # grip, likewise
    "alpha": 0.6, "gamma": 1.0, "sets": 2,  # cpl: beta = 1 - gamma / C; how often sets are made
    "text_steps": 400, "text_noise": 0.1, "smoothing": 0.1,     # lafter: its authors'
    "threshold": 0.95,                      # fixmatch: its authors'
    "must_threshold": 0.2, "fair": 1.0, "align": 0.2, "masked": 0.1,    # must: among its authors'
    "decay": (0.99, 0.9998, 100),           # likewise: at first, in the end; steps between them
    "neg_rate": 10.0}                       # deft: t-'s rate, times that of t+, as in coft.py

# ======== equations ========


def loss_clean(l, y, clean):
    """Mean of -log p_y over the clean images; 0 if there are none. l (B, C), y, clean (B,)."""
    loss = F.cross_entropy(l, y, reduction="none")                              # (B,)
    return (loss * clean).sum() / clean.sum().clamp(min=1)


def top_per_prediction(p, K):
    """UPL: of the images with argmax_k p_k = k the K with the largest p_k, for each k; none for a
    class that is nobody's argmax. p (N, C) -> images (M,), labels (M,)."""
    score, y = p.max(dim=1)                                                     # (N,) each
    i = torch.cat([score.masked_fill(y != k, -1).topk(min(K, n)).indices
                   for k, n in enumerate(y.bincount(minlength=p.shape[1]).tolist())])
    return i, y[i]


def top_per_class(p, K):
    """GRIP: the K images with the largest p_k, for each k; an image may come twice or not at all.
    p (N, C) -> images (K C,), labels (K C,)."""
    i = p.topk(K, dim=0).indices                                                # (K, C)
    return i.flatten(), torch.arange(p.shape[1]).repeat(K)


def quantile(p, q):
    """The value that a share q of the rows is below, per column. p (N, ...) -> (...)."""
    return p.kthvalue(1 + int(q * (len(p) - 1)), dim=0).values


def candidate_sets(p, alpha, beta):
    """CPL: k is a candidate if it is (a) in the image's smallest set of the likeliest classes whose
    mass reaches the alpha-quantile of max_k p_k, and (b) p_k is at least the class's beta-quantile.
    p (N, C) -> (N, C) bool, some rows empty."""
    likeliest, order = p.sort(dim=1, descending=True)                           # (N, C) each
    short = likeliest.cumsum(dim=1) - likeliest < quantile(p.max(dim=1).values, alpha)
    inside = torch.zeros_like(short).scatter(1, order, short)                   # (N, C)
    return inside & (p >= quantile(p, beta))


def loss_cc(l, S):
    """CC: mean of -log sum_{k in S} p_k. l (B, C), S (B, C) bool without empty rows."""
    return (l.logsumexp(dim=1) - l.masked_fill(~S, -math.inf).logsumexp(dim=1)).mean()


def loss_neg(l_pos, l_neg, y, y_bar):
    """DeFT: mean of -log p_clean_y - log(1 - p_clean_ybar), p_clean = sigmoid(l+ - l-), with l+ a
    constant. l (B, C), y and y_bar (B,)."""
    gap = l_pos.detach() - l_neg                                                # (B, C)
    return -(F.logsigmoid(gap).gather(1, y[:, None])
             + F.logsigmoid(-gap).gather(1, y_bar[:, None])).mean()


def warm_cosine(step, total):
    """Learning rate factor, as coft.py's: warm-up over a tenth, cosine."""
    return min(1, (step + 1) / (0.1 * total + 1), 0.5 + 0.5 * math.cos(math.pi * step / total))


# ======== modules ========


def features(job, x, visual=None, tokens=None):
    """Images (B, 3, R, R) -> f (B, D), of CLIP's image tower or of a copy that learns."""
    with job.autocast():
        f = (visual or job.clip_model.visual)(x, tokens)                        # (B, D)
    return F.normalize(f.float(), dim=1)


def new_prompt(job):
    """One context for all classes, and its parameter group."""
    prompt = prompt_align.Prompts(
        job.clip_model, job.dataset.class_names, job.dataset.templates[0], 0, [1.0])
    rate = LR_LIGHT * float(prompt.ctx.detach().std()) / WORD_STD
    return prompt.to(job.device), {"params": [prompt.ctx], "lr": rate}


def texts(job, prompt):
    """t (C, D) of a prompt."""
    with job.autocast():
        return prompt(job.clip_model).float()


def new_tokens(job):
    """VPT-deep (layers, P, W), and its parameter group."""
    if not hasattr(job.clip_model.visual, "transformer"):
        raise data.DataError("visual tokens need a ViT, this is a ResNet")
    blocks = job.clip_model.visual.transformer
    tokens = 0.02 * torch.randn(blocks.layers, TOKENS, blocks.width)
    tokens = nn.Parameter(tokens.to(job.device))
    return tokens, {"params": [tokens], "lr": LR_LIGHT}


class Tuned(nn.Module):
    """A copy of the image encoder, all of which learns, and a classifier (C, D), started at t0: of
    cosines, or linear."""
    def __init__(self, job, cosine=True):
        super().__init__()
        self.visual = copy.deepcopy(job.clip_model.visual).requires_grad_(True)
        self.classifier, self.cosine = nn.Parameter(job.t0.clone()), cosine
        lr = 3e-4 if job.clip_model.visual.output_dim < 512 else 1e-5
        self.groups = [{"params": self.visual.parameters(), "lr": lr, "weight_decay": 0.01},
                       {"params": [self.classifier], "lr": LR_LIGHT}]

    def forward(self, job, x):
        """Images (B, 3, R, R) -> l (B, C)."""
        return job.tau * features(job, x, self.visual) @ self.classifier_rows().T

    def classifier_rows(self):
        """t (C, D)."""
        return F.normalize(self.classifier, dim=1) if self.cosine else self.classifier


class Filler(nn.Module):
    """What MUST adds to a ViT: a token for masked patches, and what guesses their pixels."""
    def __init__(self, visual):
        super().__init__()
        width, self.side = visual.conv1.out_channels, visual.conv1.kernel_size[0]   # of a patch
        self.token, self.norm = nn.Parameter(0.02 * torch.randn(width)), nn.LayerNorm(width)
        self.pixels = nn.Linear(width, 3 * self.side ** 2)

    def forward(self, visual, x, share):
        """Images (B, 3, R, R), of which a share is masked, two by two patches at once -> f (B, D);
        mean |guess - pixel| and mean |z - f|^2 of the masked patches, z their unit features."""
        B, side = len(x), x.shape[-1] // self.side      # of the grid, in patches
        n = (side + 1) // 2                             # of the grid, in squares
        order = torch.rand(B, n * n, device=x.device).argsort(dim=1).argsort(dim=1)
        mask = (order < math.ceil(share * n * n)).view(B, n, n)
        mask = mask.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)     # (B, 2 n, 2 n)
        mask = mask[:, :side, :side].flatten(1)                                 # (B, L)
        h = visual.conv1(x).flatten(2).transpose(1, 2)                              # (B, L, W)
        h = torch.where(mask[..., None], self.token.to(h.dtype), h)
        cls = visual.class_embedding.to(h.dtype).expand(B, 1, -1)                   # (B, 1, W)
        h = visual.ln_pre(torch.cat([cls, h], dim=1) + visual.positional_embedding)
        for block in visual.transformer.resblocks:
            h = block(h)                                                            # (B, 1 + L, W)
        f = F.normalize((visual.ln_post(h[:, 0]) @ visual.proj).float(), dim=1)     # (B, D)
        h = self.norm(h[:, 1:])[mask]                                               # (M, W)
        z = F.normalize((h @ visual.proj).float(), dim=1)                           # (M, D)
        pixels = F.unfold(x, self.side, stride=self.side).transpose(1, 2)[mask]     # (M, 3 side^2)
        far = z - f[mask.nonzero()[:, 0]]                                           # (M, D)
        return f, F.l1_loss(self.pixels(h).float(), pixels), far.square().sum(dim=1).mean()


# ======== training ========


@torch.no_grad()
def table(loader, function):
    """function(x) of all images, in their order, on the CPU: (N, ...)."""
    return torch.cat([function(x).cpu() for x, _ in loader])


def posteriors(job, classify, crops):
    """softmax of classify(x) -> l (B, C) for all test images, (N, C); crops: as coft.py predicts,
    the mean over five of each image."""
    def p(x):
        l = classify(coft_plus.with_crops(x, crops))                            # (V B, C)
        return coft_plus.over_views(l.softmax(dim=1), len(x), crops)            # (B, C)
    return table(job.test, p)


def loader_of(job, *views):
    """Shuffled batches (x, ..., index) of views of the training images, N // B of them."""
    return job.load(job.dataset.train.view(*views), shuffle=True, seed=job.args.seed)


def fit(job, groups, epochs, batches, step, classify):
    """Epochs of N // B steps with AdamW. batches() has an epoch's; step(*batch) gives the loss and
    what else the log shows; classify(x) gives l (B, C)."""
    run, B, total = job.run, job.B, epochs * job.steps
    total = min(total, job.args.max_steps or total)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_cosine, total=total))
    for done in range(0, total, job.steps):
        where = f"epoch {job.epoch + 1}/{EPOCHS}"
        for batch in run.steps(batches(), B, where, min(job.steps, total - done)):
            facts, scale = step(*batch), job.scaler.get_scale()
            optimizer.zero_grad()
            job.scaler.scale(facts["loss"]).backward()
            job.scaler.step(optimizer)                  # left out if fp16 overflowed,
            job.scaler.update()                         # which lowers the scale
            schedule.step()
            run.rows.append({k: v.detach() for k, v in facts.items()}
                            | {"skipped": int(job.scaler.get_scale() < scale)})
        job.epoch += 1
        run.report(epoch=job.epoch, **run.means("the rates"), accuracy=data.accuracy(
            posteriors(job, classify, 0).argmax(dim=1), job.dataset.test.y_true))
    job.classify = classify


def fit_prompt(job, prompt, group, epochs, pairs, loss):
    """A prompt learns from cached features of weak views. pairs: images (M,) and a target for each,
    (M,) or (M, C); loss(l, target). Returns p (N, C) of the training images."""
    (i, target), group["lr"] = pairs, SETTINGS["prompt_rate"] * group["lr"]
    if not job.passes:
        views = [job.load(job.dataset.train.view(job.weak), seed=job.args.seed, epoch=epoch)
                 for epoch in range(PASSES)]
        job.passes = [table(view, partial(features, job)) for view in views]    # (N, D) each

    def batches():
        f, rng = job.passes[job.epoch % PASSES], torch.Generator()
        rng.manual_seed(job.args.seed * 1_000_003 + job.epoch)
        times = math.ceil(job.steps * job.B / len(i))   # few images come often
        order = torch.cat([torch.randperm(len(i), generator=rng) for _ in range(times)])
        for b in order[:job.steps * job.B].split(job.B):                        # (B,)
            yield f[i[b]].to(job.device), target[b].to(job.device)

    def step(f, target):
        return {"loss": loss(job.tau * f @ texts(job, prompt).T, target)}

    fit(job, [group], epochs, batches, step,
        lambda x: job.tau * features(job, x) @ texts(job, prompt).T)
    with torch.no_grad():
        t = texts(job, prompt)                                                  # (C, D)
        return (job.tau * job.f_train.to(job.device) @ t.T).softmax(dim=1).cpu()


# ======== methods ========


def upl(job):
    """UPL: labels of the 16 surest images of each predicted class, fixed."""
    prompt, group = new_prompt(job)
    pairs = top_per_prediction(job.p0, SETTINGS["shots"])                       # (M,) each
    fit_prompt(job, prompt, group, EPOCHS, pairs, F.cross_entropy)


def grip(job):
    """GRIP-like: labels anew by the last prompt, for ever more images; a new prompt each time."""
    (N, C), n, p = job.p0.shape, SETTINGS["rounds"], job.p0
    for r in range(1, n + 1):
        K = max(1, round(N / C * r / n))
        prompt, group = new_prompt(job)
        p = fit_prompt(job, prompt, group, EPOCHS // n, top_per_class(p, K), F.cross_entropy)


def cpl(job):
    """CPL: candidate sets anew by the last prompt; a new prompt each time; the loss CC."""
    C, n, p = job.p0.shape[1], SETTINGS["sets"], job.p0
    for _ in range(n):
        S = candidate_sets(p, SETTINGS["alpha"], 1 - min(1, SETTINGS["gamma"] / C))     # (N, C)
        i = S.any(dim=1).nonzero()[:, 0]                                        # (M,)
        job.run.say(f"{len(i)} images with {float(S[i].sum(dim=1).float().mean()):.2f} candidates")
        prompt, group = new_prompt(job)
        p = fit_prompt(job, prompt, group, EPOCHS // n, (i, S[i]), loss_cc)


def lafter(job):
    """LaFTer: the steps on texts see no image and do not count."""
    names, cross_entropy = job.dataset.class_names, partial(
        F.cross_entropy, label_smoothing=SETTINGS["smoothing"])
    sentences = coft_plus.load_prompts(job.args.prompts, names) if job.args.prompts else [[]] * len(
        names)
    t, y = [], []
    for k, (name, more) in enumerate(zip(names, sentences)):
        lines = [template.format(name) for template in job.dataset.templates] + more
        tokens = clip.tokenize(lines, truncate=True).to(job.device)
        with torch.no_grad():
            t.append(F.normalize(job.clip_model.encode_text(tokens).float(), dim=1))
        y += [k] * len(lines)
    t, y = torch.cat(t), torch.tensor(y, device=job.device)                     # (M, D), (M,)
    classifier = nn.Parameter(job.t0.clone())                                   # (C, D)
    optimizer = torch.optim.AdamW([classifier], lr=5e-4, weight_decay=0.01)
    for _ in range(SETTINGS["text_steps"]):
        noisy = F.normalize(t + SETTINGS["text_noise"] * torch.randn_like(t), dim=1)
        optimizer.zero_grad()
        cross_entropy(job.tau * noisy @ classifier.T, y).backward()
        optimizer.step()
    teacher = classifier.detach().clone()                                       # (C, D)
    tokens, group = new_tokens(job)
    p = posteriors(job, lambda x: features(job, x) @ teacher.T, 0)          # (N, C)
    job.run.say(f"classifier of {len(t)} texts: accuracy "
                f"{data.accuracy(p.argmax(dim=1), job.dataset.test.y_true)}")

    def step(x, x_student, i):
        with torch.no_grad():
            y = (features(job, x) @ teacher.T).argmax(dim=1)                    # (B,)
        l = job.tau * features(job, x_student, tokens=tokens) @ classifier.T    # (B, C)
        return {"loss": cross_entropy(l, y)}

    loader = loader_of(job, job.weak, job.weak)
    groups = [group, {"params": [classifier], "lr": LR_LIGHT}]
    fit(job, groups, EPOCHS, lambda: loader, step,
        lambda x: job.tau * features(job, x, tokens=tokens) @ classifier.T)


def fixmatch(job):
    """FixMatch: the strong view learns what the weak one is sure of."""
    model = Tuned(job)

    def step(weak, strong, i):
        with torch.no_grad():
            p, y = model(job, weak).softmax(dim=1).max(dim=1)                   # (B,) each
        sure = (p >= SETTINGS["threshold"]).float()                             # (B,)
        loss = F.cross_entropy(model(job, strong), y, reduction="none")         # (B,)
        return {"loss": (loss * sure).mean(), "kept": sure.mean()}

    loader = loader_of(job, job.weak, job.strong)
    fit(job, model.groups, EPOCHS, lambda: loader, step, partial(model, job))


def must(job):
    """MUST: the student sees weak views with masked patches, its teacher others without."""
    if not hasattr(job.clip_model.visual, "transformer"):
        raise data.DataError("masked patches need a ViT, this is a ResNet")
    model, teacher = Tuned(job), Tuned(job)
    filler = Filler(model.visual).to(job.device)
    first, last, warm = SETTINGS["decay"]
    done = 0

    @torch.no_grad()
    def follow():
        """The teacher takes a step towards the student."""
        nonlocal done
        decay = first + (last - first) * min(1, done / warm)
        for slow, fast in zip(teacher.parameters(), model.parameters()):
            slow.lerp_(fast, 1 - decay)
        done += 1

    def step(x, x_student, i):
        follow()
        with torch.no_grad():
            p, y = teacher(job, x).softmax(dim=1).max(dim=1)                    # (B,) each
        sure = p > SETTINGS["must_threshold"]                                   # (B,)
        with job.autocast():
            f, fill, align = filler(model.visual, x_student, SETTINGS["masked"])
        l = job.tau * f @ model.classifier_rows().T                             # (B, C)
        fair = -l.softmax(dim=1).mean(dim=0).log().mean()
        return {"loss": loss_clean(l, y, sure) + SETTINGS["fair"] * fair + fill
                + SETTINGS["align"] * align, "kept": sure.float().mean(), "fill": fill}

    loader = loader_of(job, job.weak, job.weak)
    groups = [*model.groups, {"params": filler.parameters(), "lr": LR_LIGHT}]
    fit(job, groups, EPOCHS, lambda: loader, step, partial(model, job))


def deft(job):
    """DeFT. Phase 1: t+, t- and tokens; L_neg shapes t- alone. Phase 2: a fresh image encoder."""
    (pos, pos_group), (neg, neg_group), (tokens, group) = (
        new_prompt(job), new_prompt(job), new_tokens(job))
    neg_group["lr"] *= SETTINGS["neg_rate"]
    y0, C = job.p0.argmax(dim=1).to(job.device), len(job.t0)                    # (N,)

    def logits(x):
        f = features(job, x, tokens=tokens)                                     # (B, D)
        return (job.tau * f @ texts(job, pos).T,                                # (B, C) each
                job.tau * f.detach() @ texts(job, neg).T)

    def phase1(x, i):
        y, (l_pos, l_neg) = y0[i], logits(x)                                    # (B,), 2 x (B, C)
        clean = (l_pos > l_neg).gather(1, y[:, None])[:, 0]     # p_clean_y > 1/2     (B,)
        if job.epoch == 0:                              # warm-up: all images, their own labels
            clean = torch.ones_like(clean)
        y_neg = torch.where(clean, y, l_pos.argmax(dim=1))                      # (B,)
        y_bar = (y + torch.randint(1, C, y.shape, device=y.device)) % C         # another class
        loss = loss_clean(l_pos, y, clean) + loss_neg(l_pos, l_neg, y_neg, y_bar)
        return {"loss": loss, "kept": clean.float().mean()}

    def phase2(x, i):
        return {"loss": loss_clean(model(job, x), y0[i], kept[i]), "kept": kept[i].float().mean()}

    loader = loader_of(job, job.weak)
    fit(job, [pos_group, neg_group, group], PHASE1, lambda: loader, phase1, lambda x: logits(x)[0])
    clean = table(job.train, lambda x: torch.gt(*logits(x)))                    # (N, C)
    kept = clean.to(job.device).gather(1, y0[:, None])[:, 0]                    # (N,)
    model = Tuned(job, cosine=False)
    fit(job, model.groups, EPOCHS - PHASE1, lambda: loader, phase2, partial(model, job))


def supervised(job):
    """The ceiling: full fine-tuning with the true labels."""
    if job.dataset.train.y_true is None:
        raise data.DataError("`supervised` needs the labels of the training images")
    model, loader, y = Tuned(job), loader_of(job, job.weak), job.dataset.train.y_true.to(job.device)
    loader.batch_sampler.among = data.few_shot(y.cpu(), job.args.shots, job.args.seed).tolist()
    fit(job, model.groups, EPOCHS, lambda: loader,
        lambda x, i: {"loss": F.cross_entropy(model(job, x), y[i])}, partial(model, job))


# ======== main ========

METHODS = {f.__name__: f for f in (upl, grip, cpl, lafter, fixmatch, must, deft, supervised)}


def adapt(args):
    """The whole run of a method. Returns the summary."""
    if args.resume or data.world_size() > 1:
        raise data.DataError("a peer runs in one process, without --resume")
    job = data.setup(args)              # run, device, dataset, clip_model; loaders train and test
    job.autocast = partial(torch.autocast, job.device.type, job.amp_dtype,
                           enabled=job.amp_dtype is not None)
    job.scaler = torch.amp.GradScaler(job.device.type, enabled=job.amp_dtype == torch.float16)
    N = len(job.dataset.train)
    job.B, job.epoch, job.passes = min(args.batch_size, N), 0, None
    job.steps = N // job.B

    # CLIP's own guesses, as in coft.py
    job.tau = job.clip_model.logit_scale.exp()
    job.t0 = clip.zeroshot_classifier(job.clip_model, [         # (C, D)
        [template.format(c) for template in job.dataset.templates]
        for c in job.dataset.class_names])
    job.f_train = table(job.train, partial(features, job))                      # (N, D)

    def posterior(f):
        return (job.tau * f.to(job.device) @ job.t0.T).softmax(dim=1).cpu()     # (N, C)

    def accuracies():
        return [data.accuracy(posteriors(job, job.classify, crops).argmax(dim=1),
                              job.dataset.test.y_true) for crops in (0, 1)]
    job.p0, job.classify = posterior(job.f_train), (
        lambda x: job.tau * features(job, x) @ job.t0.T)
    zero, zero_five = accuracies()
    data.report_zero_shot(job, zero)
    job.weak, job.strong = data.augmented_views(
        job, lambda view: posterior(table(job.load(view), partial(features, job))))

    METHODS[args.method](job)
    plain, five = accuracies()
    return job.run.report(method=args.method, zero_shot=zero, zero_shot_five=zero_five,
                          accuracy_plain=plain, accuracy=five)


def main(argv=None):
    """Command line. Returns the exit status, see `data.command_line`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=METHODS)
    data.add_common(parser, "peers", 64)
    parser.add_argument("--prompts", help="JSON of sentences for each class: lafter's texts")
    parser.add_argument("--shots", type=int, default=0, help="supervised: of so many per class")
    return data.command_line(adapt, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
