"""CoFT: adapt CLIP to your images without a single label (arXiv 2602.04337).

CLIP's own guesses are the labels, and many are wrong. Two students learn, besides the usual prompt
of each class ("positive"), a second prompt ("negative") that says when the first one should not be
believed; each student learns only from labels that the other one calls clean. First light modules
are trained (phase 1: prompts and visual tokens), then the whole image encoder (phase 2).

    p0 = zero_shot(clip_model)                                                          Eq. 1
    y, confident = pseudo_labels(distribution_alignment(p0), rho)                       Eq. 1
    phase 1, for student, peer in ((0, 1), (1, 0)):
        f, t_pos, t_neg = student(x)            image features, two texts per class     Eq. 2, 3
        clean = confident & (the peer's p_clean of y > 1/2)                             Eq. 5
        loss = loss_cls(f.t_pos, y, clean) + lam loss_neg(f.t_pos, f.t_neg, ...)        Eq. 4, 6
    phase 2, likewise, now the image encoder learns:
        y, clean = the peer's label now, its p_clean > 1/2, for every image
        loss = loss_cls(f.t_pos, y, clean); t_neg learns on, only to judge              Eq. 7
    prediction = mean of the two students' softmax

Equation numbers are the paper's. B batch, C classes, D embedding, L context tokens, N images,
P visual tokens, T tokens of a text, W width; tau = exp(logit_scale); f and t are unit vectors.

Run:  python coft.py                                    the demo, offline, about a minute
      python coft.py --data ./oxford_pets               real data with OpenAI's CLIP: not measured
      python coft.py --data ./photos --classes cat,dog  a folder of unlabelled photos

Decided here (the paper has it otherwise, or does not say):
- labels come from posteriors divided by their own class marginal (`distribution_alignment`), and a
  `fairness` term spreads each batch over the classes: else a few classes swallow the others;
- phase 1 filters; V- has a context per class; L_neg sees all images with the peer's labels, and
  complements that the peer finds likely (paper: no filter, one V-, S* and uniform complements);
- phase 2 makes labels anew each epoch, label and verdict by the same peer (paper: once, one each);
  t+ and t- are matrices then; EMA copies of the students judge and predict; weak views;
- AdamW, warm-up, cosine; weight decay 0.01 for the encoder, none elsewhere; EMA decay 0.99 at most;
  V- learns ten times as fast as V+, both relative to the size of word vectors (`WORD_STD`); the
  default of --lr2 depends on D (tiny or not), and is untested but for tiny.
"""
import argparse
import copy
import math
import os
import sys
from functools import partial
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "2000")   # before torch is imported: README, "Speed"
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
    """Eq. (1), S*: y = argmax_k p0_k; confident: per class the K = ceil(rho N / C) images with the
    largest p0_y. A class that is nobody's argmax takes the K largest of its column. p0 (N, C) ->
    y (N,), confident (N,) bool."""
    (N, C), y = p0.shape, p0.argmax(dim=1)
    K, confident = math.ceil(rho * N / C), torch.zeros(N, dtype=torch.bool)
    for k in set(range(C)) - set(y.tolist()):
        y[p0[:, k].topk(K).indices] = k
    for k in range(C):
        top = p0[:, k].masked_fill(y != k, -1).topk(min(K, int((y == k).sum()))).indices
        confident[top] = True
    return y, confident


def logits(f, t_pos, t_neg, tau):
    """l+_k = tau f(x).t+_k, l-_k = tau f(x).t-_k. f (B, D), t (C, D) -> 2 x (B, C)."""
    return tau * f @ t_pos.T, tau * f @ t_neg.T


def loss_cls(l_pos, y, clean):
    """Eq. (4), (7): mean of -log softmax(l+)_y over the clean images; 0 if there are none.
    l_pos (B, C), y (B,), clean (B,) bool."""
    loss = F.cross_entropy(l_pos, y, reduction="none")                          # (B,)
    return (loss * clean).sum() / clean.sum().clamp(min=1)


def log_p_clean(l_pos, l_neg):
    """Eq. (5): p_clean_k = sigmoid(l+_k - l-_k). (B, C) -> log p_clean, log(1 - p_clean)."""
    return F.logsigmoid(l_pos - l_neg), F.logsigmoid(l_neg - l_pos)


def loss_neg(l_pos, l_neg, y, y_bar):
    """Eq. (6): mean of -log p_clean_y - log(1 - p_clean_ybar). l (B, C), y and y_bar (B,)."""
    log_clean, log_unclean = log_p_clean(l_pos, l_neg)                          # (B, C) each
    return -(log_clean.gather(1, y[:, None]) + log_unclean.gather(1, y_bar[:, None])).mean()


def complementary_labels(p, y):
    """ybar of Eq. (6): a class other than y, drawn from p without y: a likely mistake (y itself if
    there is no other). p (B, C), y (B,) -> (B,)."""
    others = (p + 1e-6).scatter(1, y[:, None], 0.0 if p.shape[1] > 1 else 1.0)  # (B, C)
    return torch.multinomial(others, 1)[:, 0]


def distribution_alignment(p, strength=1.0):
    """p_k / (mean over all images of p_k)^strength, then normalised. p (N, C) -> (N, C)."""
    p = p / p.mean(dim=0, keepdim=True).clamp(min=0.01 / p.shape[1]) ** strength
    return p / p.sum(dim=1, keepdim=True)


def fairness(l):
    """-mean_k log(mean over the batch of softmax(l)_k). l (B, C)."""
    return -l.softmax(dim=1).mean(dim=0).clamp(min=1e-6).log().mean()


# ======== modules ========


WORD_STD = 0.06     # of tiny's word vectors, for which lr1 and the noise were chosen


class Prompt(nn.Module):
    """Eq. (2), (3): L learnable context vectors before each class name: [V_1] ... [V_L] cat.

    They are shared by all classes or, if class_specific, one set per class. They start from the
    words before the class name in the template ("a photo of a" if there are none) and a little
    noise: at CLIP's zero-shot classifier."""
    def __init__(self, clip_model, class_names, template, class_specific):
        super().__init__()
        words = template.split("{}")[0].strip() or "a photo of a"
        rest = template.split("{}", 1)[1]
        L = int((clip.tokenize(words)[0] > 0).sum()) - 2                # without <sot> and <eot>
        tokens = clip.tokenize([f"{words} {c}{rest}" for c in class_names], truncate=True)
        tokens = tokens.to(clip_model.token_embedding.weight.device)
        with torch.no_grad():                                           # T: the longest prompt
            emb = clip_model.token_embedding(tokens[:, :tokens.argmax(dim=1).max() + 1])
        start = emb[:len(emb) if class_specific else 1, 1:1 + L]        # (C or 1, L, W)
        noise = 0.01 * min(1.0, float(start.std()) / WORD_STD)
        self.ctx = nn.Parameter(start + noise * torch.randn_like(start))
        self.register_buffer("token_prefix", emb[:, :1], persistent=False)      # (C, 1, W) <sot>
        self.register_buffer("token_suffix", emb[:, 1 + L:], persistent=False)  # (C, T - L - 1, W)
        self.register_buffer("eot", tokens.argmax(dim=1), persistent=False)     # (C,)

    def forward(self, clip_model):
        """-> t (C, D), unit rows."""
        ctx = self.ctx.expand(len(self.eot), -1, -1)                    # (C, L, W)
        emb = torch.cat([self.token_prefix, ctx, self.token_suffix], dim=1)     # (C, T, W)
        shared = 1 + ctx.shape[1] if len(self.ctx) == 1 else 0          # tokens that all start with
        t = clip_model.encode_text_embeddings(emb, self.eot, chunk=256, shared=shared)
        return F.normalize(t, dim=-1)


class Adapter(nn.Module):
    """Bottleneck beside the MLP of one block (or after one ResNet stage); starts at 0."""
    def __init__(self, width, rank):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, site, h):                                         # h (..., W)
        return None if site == "qkv" else self.up(F.relu(self.down(h)))


class Student(nn.Module):
    """One of the two models: V+, V-, the light visual modules and, in phase 2, an image encoder and
    two classifiers (2, C, D) of its own. CLIP itself is frozen and shared."""
    def __init__(self, clip_model, class_names, template, peft, size):
        super().__init__()
        self.pos = Prompt(clip_model, class_names, template, class_specific=False)
        self.neg = Prompt(clip_model, class_names, template, class_specific=True)
        self.prompts = self.adapters = None             # one of them, see clip/model.py
        self.visual = self.classifier = None            # of phase 2
        if peft == "vpt":                                               # VPT-deep, arXiv 2203.12119
            blocks = clip_model.visual.transformer
            self.prompts = nn.Parameter(0.02 * torch.randn(blocks.layers, size, blocks.width))
        else:
            widths = clip_model.visual.adapter_widths
            self.adapters = nn.ModuleList(Adapter(width, size) for width in widths)

    def start_phase2(self, clip_model):
        """Own copy of the image encoder; the classifiers start at t+ and t-."""
        self.classifier = nn.Parameter(torch.stack(self.texts(clip_model)).detach())    # (2, C, D)
        self.visual = copy.deepcopy(clip_model.visual).requires_grad_(True)
        self.pos.requires_grad_(False)
        self.neg.requires_grad_(False)

    def texts(self, clip_model):
        """t+ and t-, unit rows (C, D): the prompts' in phase 1, then matrices that started there,
        so that phase 2 does not run the text tower."""
        if self.classifier is None:
            return self.pos(clip_model), self.neg(clip_model)
        return F.normalize(self.classifier, dim=-1).unbind()

    def features(self, clip_model, x):
        """Images (B, 3, R, R) -> unit features (B, D)."""
        visual = self.visual or clip_model.visual
        return F.normalize(visual(x, self.prompts, self.adapters).float(), dim=-1)

    def forward(self, clip_model, x):
        """Images (B, 3, R, R) -> f (B, D), t+ (C, D), t- (C, D): fp32 unit vectors."""
        t_pos, t_neg = self.texts(clip_model)
        return self.features(clip_model, x), t_pos.float(), t_neg.float()

    def param_groups(self, lr1, lr2):
        """What learns, and how fast."""
        light = [self.prompts] if self.adapters is None else list(self.adapters.parameters())
        if self.visual is None:
            word = lr1 * float(self.pos.ctx.detach().std()) / WORD_STD
            return [{"params": light, "lr": lr1}, {"params": [self.pos.ctx], "lr": word},
                    {"params": [self.neg.ctx], "lr": 10 * word}]
        return [{"params": light, "lr": lr2}, {"params": [self.classifier], "lr": lr1},
                {"params": self.visual.parameters(), "lr": lr2, "weight_decay": 0.01}]


# ======== training ========


def select_clean(phase, p, p_clean, labels, peers):
    """What each student is taught next: labels y (2, N); clean (2, N) bool, the peer's p_clean_y >
    1/2. Phase 1: `labels`, the zero-shot y (N,) and which are confident (N,). Phase 2: the peer's
    labels of now, so images come in as they become clean. p, p_clean (2, N, C); p is aligned."""
    y0, confident = labels
    ys, cleans = [], []
    for peer in peers:
        y = y0 if phase == 1 else p[peer].argmax(dim=1)                         # (N,)
        clean = p_clean[peer].gather(1, y[:, None])[:, 0] > 0.5                 # (N,)
        ys.append(y)
        cleans.append(clean & confident if phase == 1 else clean)
    return torch.stack(ys), torch.stack(cleans)


def total_loss(phase, f, t_pos, t_neg, tau, target, lam, fairness_weight):
    """Phase 1: Eq. (4) + lam Eq. (6); phase 2: Eq. (7) and the loss of t-; both + fairness.

    target: y, clean, y_peer, y_bar, (B,) each. L_neg sees all images with the peer's labels, as V-
    will judge them all. t+ enters it as a constant. f does not in phase 1, where V- also shapes f;
    in phase 2 that would destroy the encoder. Fairness alone would make predictions uniform."""
    y, clean, y_peer, y_bar = target
    l_pos, _ = logits(f, t_pos, t_neg, tau)                                     # (B, C)
    judged = logits(f if phase == 1 else f.detach(), t_pos.detach(), t_neg, tau)    # 2 x (B, C)
    loss = loss_cls(l_pos, y, clean) + lam * loss_neg(*judged, y_peer, y_bar)
    return loss + fairness_weight * clean.any() * fairness(l_pos)


def warm_cosine(step, total):
    """Learning rate factor: linear warm-up over a tenth (Adam's first steps are large), cosine."""
    return min(1, (step + 1) / (0.1 * total + 1), 0.5 + 0.5 * math.cos(math.pi * step / total))


def start_phase(job, number, students, steps):
    """What learns in a phase of so many steps: students, EMA copies that judge, optimiser."""
    if number == 2:
        for student in students:
            student.start_phase2(job.clip_model)
    groups = [g for student in students for g in student.param_groups(job.args.lr1, job.lr2)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=job.device.type == "cuda")
    return SimpleNamespace(
        number=number, students=students, teachers=copy.deepcopy(students).requires_grad_(False),
        forward=[data.distributed(student) for student in students],    # averages gradients
        optimizer=optimizer, step=0,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_cosine, total=steps)))


def train_step(job, phase, batches, y, clean, p):
    """One step of both students, each on its own batch (x, i), taught by its peer. y, clean (2, N);
    p (2, N, C), aligned. Returns what the log shows."""
    tau, scale, losses = job.clip_model.logit_scale.exp(), job.scaler.get_scale(), []
    phase.optimizer.zero_grad()
    for me, (peer, (x, i)) in enumerate(zip(job.peers, batches)):               # x (B, 3, R, R)
        i = data.gather(i)                              # of all processes
        y_peer = p[peer, i].argmax(dim=1)                                       # (B,)
        y_bar = complementary_labels(p[peer, i], y_peer)                        # (B,)
        target = [v.to(job.device) for v in (y[me, i], clean[me, i], y_peer, y_bar)]
        with job.autocast():
            f, t_pos, t_neg = phase.forward[me](job.clip_model, x)              # (B, D), 2 x (C, D)
        loss = total_loss(phase.number, data.gather(f), t_pos, t_neg, tau, target, job.args.lam,
                          job.args.fairness_weight)
        job.scaler.scale(loss).backward()
        losses.append(loss.detach())
    job.scaler.step(phase.optimizer)                    # left out if fp16 overflowed,
    job.scaler.update()                                 # which lowers the scale
    phase.step += 1
    skipped = job.scaler.get_scale() < scale
    if not skipped:
        phase.schedule.step()
        decay = 0.0 if phase.number == 1 else min(0.99, phase.step / (phase.step + 9))
        for teacher, v in zip(phase.teachers.parameters(), phase.students.parameters()):
            teacher.lerp_(v.detach(), 1 - decay)        # EMA
    return {"loss": sum(losses) / 2, "skipped": int(skipped)}


def train_phase(job, number, students, epochs, view, labels, tables):
    """The epochs of a phase, on augmented views. labels: see select_clean; tables: p and p_clean,
    (2, N, C) each, of the plain views. Returns the tables and the teachers after it."""
    args, run, images = job.args, job.run, job.dataset.train
    first = run.state["epoch"] if run.state else 0      # --resume
    loaders = [job.load(images.view(view), shuffle=True, drop_last=True, epoch=first,
                        seed=4 * args.seed + 2 * number + m) for m in range(2)]
    steps = min(epochs * len(loaders[0]), args.max_steps or math.inf)
    epochs = math.ceil(steps / len(loaders[0]))
    phase = start_phase(job, number, students, max(1, steps))
    parts = {"scaler": job.scaler, "students": students, "teachers": phase.teachers,
             "optimizer": phase.optimizer, "schedule": phase.schedule}
    if run.state:
        phase.step = run.restore(parts)["step"]
    for epoch in range(first, epochs):
        p = torch.stack([distribution_alignment(q, args.alignment) for q in tables[0]])
        y, clean = select_clean(number, p, tables[1], labels, job.peers)      # (2, N) each
        for batches in run.steps(zip(*loaders), 2 * min(args.batch_size, len(images)),
                                 f"phase {number} epoch {epoch + 1}/{epochs}", steps - phase.step):
            run.rows.append(train_step(job, phase, batches, y, clean, p))
        means = run.means(f"--lr{number}")
        tables = predict(job, phase.teachers, job.train)                        # 2 x (2, N, C)
        p_test = tables[0] if job.test is job.train else predict(job, phase.teachers, job.test)[0]
        run.report(phase=number, epoch=epoch + 1, **means,
                   accuracy=accuracy(p_test.mean(dim=0), job.dataset.test.y_true),
                   **diagnostics(*tables, y, clean, images.y_true))
        run.checkpoint(parts, phase=number, epoch=epoch + 1, step=phase.step, tables=tables)
    return tables, phase.teachers


# ======== evaluation ========


@torch.no_grad()
def text_features(clip_model, class_names, templates):
    """The zero-shot classifier t0 (C, D): unit rows, the mean of the templates' text features."""
    texts = [template.format(c) for template in templates for c in class_names]
    tokens = clip.tokenize(texts, truncate=True).to(clip_model.logit_scale.device)
    t = F.normalize(clip_model.encode_text(tokens, chunk=256), dim=-1)
    return F.normalize(t.unflatten(0, (len(templates), -1)).mean(dim=0), dim=-1)


@torch.no_grad()
def zero_shot(job, t0, loader):
    """Eq. (1) for all images and the classifier t0 (C, D): (N, C), on the CPU."""
    tau, p0 = job.clip_model.logit_scale.exp(), torch.zeros(loader.N, len(t0))
    for x, i in loader:                                                         # (B, 3, R, R), (B,)
        with job.autocast():
            f = job.clip_model.encode_image(x)                                  # (B, D)
        p0[i] = posterior(F.normalize(f.float(), dim=-1), t0, tau).cpu()
    return data.all_reduce_sum(p0)


@torch.no_grad()
def predict(job, students, loader):
    """Both students' softmax p and p_clean for all images, each (2, N, C), on the CPU."""
    tau = job.clip_model.logit_scale.exp()
    with job.autocast():
        texts = [[t.float() for t in me.texts(job.clip_model)] for me in students]      # (C, D)
    p, p_clean = torch.zeros(2, 2, loader.N, len(texts[0][0]))                  # (2, N, C) each
    for x, i in loader:                                                         # (B, 3, R, R), (B,)
        for m, (student, (t_pos, t_neg)) in enumerate(zip(students, texts)):
            with job.autocast():
                f = student.features(job.clip_model, x)                         # (B, D)
            p[m, i] = posterior(f, t_pos, tau).cpu()
            p_clean[m, i] = log_p_clean(*logits(f, t_pos, t_neg, tau))[0].exp().cpu()
    return data.all_reduce_sum(p), data.all_reduce_sum(p_clean)


# same in prompt_align.py
def accuracy(p, y_true):
    """Percent of the images whose argmax_k p_k is the true class; None without labels."""
    if y_true is not None:
        return round(100 * float((p.argmax(dim=1) == y_true).double().mean()), 2)


def auroc(score, right):
    """How likely a right label scores above a wrong one. score (N,), right (N,) bool; or None."""
    a, b = score[right].contiguous(), score[~right].sort().values
    below = torch.searchsorted(b, a) + torch.searchsorted(b, a, right=True)     # twice, with ties
    return float(below.double().mean()) / (2 * len(b)) if len(a) and len(b) else None


def diagnostics(p, p_clean, y, clean, y_true):
    """How good the filter is, as means over the two students: share and precision of the clean
    labels, and how well p_clean and the maximum softmax each tell when the student is right."""
    facts = {"kept": round(float(clean.float().mean()), 4)}
    if y_true is not None:                                                      # diagnostics only
        right = (y == y_true)[clean].double()
        facts["precision"] = round(float(right.mean()), 4) if len(right) else None
        for key, scores in (("auroc", p_clean), ("auroc_softmax", p)):
            each = [auroc(s.gather(1, q.argmax(1, True))[:, 0], q.argmax(1) == y_true)
                    for q, s in zip(p, scores)]
            facts[key] = None if None in each else round(sum(each) / 2, 4)
    return facts


# ======== main ========


def adapt(args):
    """The whole run: CLIP's guesses, phase 1, phase 2, the files. Returns the summary."""
    job = data.setup(args)              # run, device, dataset, clip_model; loaders train and test
    run, dataset, clip_model, names = job.run, job.dataset, job.clip_model, job.dataset.class_names
    if args.peft == "vpt" and not hasattr(clip_model.visual, "transformer"):
        raise data.DataError("--peft vpt needs a ViT; a ResNet takes --peft adapter")
    # mixed precision: weights stay fp32; fp16's small gradients need their loss scaled
    job.autocast = partial(torch.autocast, job.device.type, job.amp_dtype,
                           enabled=job.amp_dtype is not None)
    job.scaler = torch.amp.GradScaler(job.device.type, enabled=job.amp_dtype == torch.float16)
    job.lr2 = args.lr2 or (3e-4 if clip_model.visual.output_dim < 512 else 1e-5)
    job.peers = (0, 1) if args.judge == "self" else (1, 0)

    # CLIP's own guesses, and the confident ones among them
    t0 = text_features(clip_model, names, dataset.templates)                    # (C, D)
    p0, p0_test = (zero_shot(job, t0, loader) for loader in (job.train, job.test))      # (N, C)
    labels = pseudo_labels(distribution_alignment(p0, args.alignment), args.rho)        # (N,) each
    zero = accuracy(p0_test, dataset.test.y_true)
    data.report_zero_shot(job, zero)
    weak, strong = data.augmented_views(job, lambda view: zero_shot(job, t0, job.load(view)))

    # two students, which differ in their random numbers, learn from each other
    students = nn.ModuleList(Student(clip_model, names, dataset.templates[0], args.peft,
                                     args.peft_size) for _ in range(2)).to(job.device)
    tables = torch.stack([p0, p0]), torch.ones(2, *p0.shape)        # p, p_clean: (2, N, C) each
    if run.state:                                       # --resume
        tables = run.state["tables"]
    for number, epochs, view in ((1, args.epochs1, weak),
                                 (2, args.epochs2, strong if args.strong_view else weak)):
        if number == 2 and not epochs or run.state and run.state["phase"] > number:
            continue
        tables, teachers = train_phase(job, number, students, epochs, view, labels, tables)
        if number == 1 and epochs:
            data.pseudo_label_sheet(run.out / "pseudo_labels.png", dataset.train, names,
                                    *(table.mean(dim=0) for table in tables))

    p, p_clean = (table.mean(dim=0) for table in predict(job, teachers, job.test))      # (N, C)
    data.write_predictions(run.out / "predictions.csv", dataset.test.names, names, p, p_clean)
    run.save("model.pt", {"models": teachers.state_dict(), "class_names": names, "peft": args.peft,
                          "peft_size": args.peft_size, "templates": dataset.templates,
                          "clip": job.clip_name})
    run.say(f"results in {run.out}")
    return run.report(zero_shot=zero, accuracy=accuracy(p, dataset.test.y_true))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data.add_common(parser, "coft", 64, "images per step and student, of all processes")
    add = parser.add_argument
    add("--peft", choices=["vpt", "adapter"], default="vpt", help="light visual modules: deep "
        "prompt tokens, or bottlenecks beside the MLPs (%(default)s)")
    add("--peft-size", type=int, default=4, help="tokens per block, or width (%(default)s)")
    add("--epochs1", type=int, default=6, help="of phase 1 (%(default)s)")
    add("--epochs2", type=int, default=4, help="of phase 2; 0 leaves it out (%(default)s)")
    add("--lr1", type=float, default=2e-3, help="of prompts and light modules (%(default)s)")
    add("--lr2", type=float, help="of the image encoder; default: 3e-4 if D < 512 "
        "(tiny), else 1e-5")
    add("--rho", type=float, default=0.3, help="share of the images to start from (%(default)s)")
    add("--lam", type=float, default=1.0, help="weight of L_neg, Eq. 6 (%(default)s)")
    add("--alignment", type=float, default=1.0, help="of the labels (%(default)s)")
    add("--fairness-weight", type=float, default=1.0, help="wants B > C (%(default)s)")
    add("--judge", choices=["peer", "self"], default="peer", help="who teaches it (%(default)s)")
    add("--strong-view", default=False, action=argparse.BooleanOptionalAction,
        help="phase 2 learns from RandAugment views")
    return parser.parse_args(argv)


# same in prompt_align.py
def main(argv=None):
    """Command line. Returns the exit status, see `data.command_line`."""
    return data.command_line(adapt, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
