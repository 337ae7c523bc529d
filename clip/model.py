"""CLIP's two towers in PyTorch, with a hook for prompts and adapters in the image tower.

Paper: Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020.
Parameter names are those of OpenAI's checkpoints, so `build_model(state_dict)` needs no config.
Weights are fp32; lower precision is the business of torch.autocast.

Letters: B images, n texts, T tokens, P prompt tokens, W width of a tower, H heads, D embedding.

The hook, `visual(x, prompts=None, adapters=None)`; with neither it is exactly CLIP:
    prompts   ViT only: (layers, P, W), P tokens between class token and patches, replaced at every
              block's input (VPT-deep), or (1, P, W), inserted before the first block and kept.
    adapters  one callable (or None) per entry of `visual.adapter_widths`; returns a tensor or None.
              ViT block:    adapter("qkv", h), h = ln_1's output (B, T, W) -> (B, T, 3W), added to
                            the queries, keys and values (LoRA);
                            adapter("mlp", h), h = ln_2's output (B, T, W) -> (B, T, W), added to
                            the MLP's output (parallel bottleneck adapter).
              ResNet stage: adapter("stage", h), h = its output (B, H, W, C) -> same shape, added.
"""
import ctypes
import hashlib
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class CLIPError(RuntimeError):
    """A mistake in a file, a name or an argument; the message is one line, fit to be printed."""


# ---------------------------------------------------------------------------------- transformer


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in fp32, whatever the input's dtype, which is returned."""

    def forward(self, x):
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(),
                         self.eps)
        return y.to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the approximation of GELU that OpenAI's weights were trained with.

    As silu(1.702 x) / 1.702 it keeps one tensor for the backward pass instead of two.
    """

    def forward(self, x):
        return F.silu(1.702 * x) * (1 / 1.702)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, h, causal=False, delta=None, shared=0, texts=1):
        """h (B, T, W); or (B, shared + texts R, W), `shared` tokens in front of each text's R."""
        qkv = F.linear(h, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3W)
        if delta is not None:
            qkv = qkv + delta.to(qkv.dtype)  # (B, T, 3W)
        qkv = qkv.unflatten(-1, (3, self.heads, h.shape[-1] // self.heads))  # (B, T, 3, H, W/H)
        if shared:
            qkv, own = qkv.split([shared, h.shape[1] - shared], dim=1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 times (B, H, T, W/H), T: all or the shared ones
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
        if shared:
            q, *kv = own.unflatten(1, (texts, -1)).permute(3, 0, 1, 4, 2, 5)  # (B, n, H, R, W/H)
            k, v = (torch.cat([f[:, None].expand(-1, texts, -1, -1, -1), t], dim=3).flatten(0, 1)
                    for f, t in zip((k, v), kv))  # (B n, H, shared + R, W/H)
            mask = torch.ones(q.shape[3], k.shape[2], dtype=torch.bool, device=k.device)
            own = F.scaled_dot_product_attention(q.flatten(0, 1), k, v, attn_mask=mask.tril(shared))
            own = own.transpose(1, 2).unflatten(0, (len(h), texts)).flatten(1, 2)
            y = torch.cat([y, own], dim=1)  # (B, T, H, W/H)
        return self.out_proj(y.flatten(2))  # (B, T, W)


class ResidualAttentionBlock(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, width, heads, activation):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=activation(),
            c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, causal=False, adapter=None, **shared):
        h = self.ln_1(x)  # (B, T, W)
        delta = None if adapter is None else adapter("qkv", h)
        x = x + self.attn(h, causal, delta, **shared)  # (B, T, W)
        h = self.ln_2(x)  # (B, T, W)
        extra = None if adapter is None else adapter("mlp", h)
        y = self.mlp(h)  # (B, T, W)
        return x + y if extra is None else x + y + extra  # (B, T, W)


class Transformer(nn.Module):
    """A stack of residual attention blocks."""

    def __init__(self, width, layers, heads, activation):
        super().__init__()
        if heads < 1 or width % heads:
            raise CLIPError(f"a transformer of width {width} cannot have {heads} attention heads")
        self.width, self.layers, self.heads = width, layers, heads
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, activation) for _ in range(layers))
        for block in self.resblocks:  # residual branches start smaller in deeper networks
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, x, causal=False, checkpointing=False, **shared):
        for block in self.resblocks:
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, causal, use_reentrant=False, preserve_rng_state=False,
                               **shared)  # (B, T, W)
            else:
                x = block(x, causal, **shared)  # (B, T, W)
        return x


# ---------------------------------------------------------------------------------- image towers


def checked_adapters(visual, adapters):
    """The adapters as a list; ValueError unless there is one per entry of `adapter_widths`."""
    count = len(visual.adapter_widths)
    adapters = [None] * count if adapters is None else list(adapters)
    if len(adapters) != count:
        raise ValueError(f"expected {count} adapters, one per block or stage, got {len(adapters)}")
    return adapters


class VisionTransformer(nn.Module):
    """Images (B, 3, R, R) -> features (B, D) of the class token.

    With `checkpointing`, which is on for ViT-L, the backward pass computes the blocks again instead
    of keeping what is inside them: same numbers, a forward pass more, an eighth of the memory.
    """

    def __init__(self, input_resolution, patch_size, width, layers, heads, output_dim, activation):
        super().__init__()
        self.input_resolution, self.output_dim = input_resolution, output_dim
        self.adapter_widths, self.checkpointing = [width] * layers, width > 768
        scale = width ** -0.5
        patches = (input_resolution // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(patches + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def forward(self, x, prompts=None, adapters=None):
        adapters = checked_adapters(self, adapters)
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, W)
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # (B, 1, W)
        x = torch.cat([cls, x], dim=1)  # (B, T, W)
        x = self.ln_pre(x + self.positional_embedding)  # (B, T, W)
        layers, width = self.transformer.layers, self.transformer.width
        if prompts is not None and (prompts.dim() != 3 or prompts.shape[2] != width
                                    or prompts.shape[0] not in (1, layers)):
            raise ValueError(f"prompts must be ({layers}, P, {width}) or (1, P, {width}), "
                             f"got {tuple(prompts.shape)}")
        for i, block in enumerate(self.transformer.resblocks):
            if prompts is not None and i < len(prompts):
                old = prompts.shape[1] if i else 0  # the previous block's prompts are replaced
                new = prompts[i].to(x.dtype).expand(len(x), -1, -1)  # (B, P, W)
                x = torch.cat([x[:, :1], new, x[:, 1 + old:]], dim=1)  # (B, T + P, W)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, adapter=adapters[i], use_reentrant=False,
                               preserve_rng_state=False)  # (B, T, W)
            else:
                x = block(x, adapter=adapters[i])  # (B, T, W)
        return self.ln_post(x[:, 0]) @ self.proj  # (B, D)


class Bottleneck(nn.Module):
    """ResNet bottleneck; its stride is an average pooling, on the branch and on the skip."""

    def __init__(self, inputs, planes, stride):
        super().__init__()
        outputs = 4 * planes
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.bn3.weight)  # a new block starts as the identity
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False),
                                            nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        if self.stride > 1:
            x, y = F.avg_pool2d(x, self.stride), F.avg_pool2d(y, self.stride)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """One attention layer that pools a feature map; the query is its mean."""

    def __init__(self, side, width, heads, output_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side ** 2 + 1, width) * width ** -0.5)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.c_proj = nn.Linear(width, width), nn.Linear(width, output_dim)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=width ** -0.5)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, cells, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (B, T, C)
        x = x + self.positional_embedding  # (B, T, C)
        q, k, v = (layer(y).unflatten(-1, (self.heads, x.shape[-1] // self.heads)).transpose(1, 2)
                   for layer, y in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x)))
        y = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1, C/H)
        return self.c_proj(y.transpose(1, 2).flatten(1))  # (B, D)


class ModifiedResNet(nn.Module):
    """Images (B, 3, R, R) -> features (B, D): a ResNet with a deep stem and attention pooling.

    Keep it in eval() while adapting: its batch statistics are part of the pretrained model.
    """

    def __init__(self, layers, output_dim, heads, input_resolution, width):
        super().__init__()
        self.input_resolution, self.output_dim = input_resolution, output_dim
        self.adapter_widths = [4 * width * 2 ** i for i in range(4)]
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        inputs = width
        for i, count in enumerate(layers):
            planes = width * 2 ** i
            blocks = [Bottleneck(inputs if j == 0 else 4 * planes, planes, 2 if i and j == 0 else 1)
                      for j in range(count)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inputs = 4 * planes
        self.attnpool = AttentionPool2d(input_resolution // 32, inputs, heads, output_dim)

    def forward(self, x, prompts=None, adapters=None):
        if prompts is not None:
            raise ValueError("a ResNet image tower takes no prompt tokens: use adapters, or a ViT")
        adapters = checked_adapters(self, adapters)
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)))
        x = F.avg_pool2d(x, 2)  # (B, C, R/4, R/4)
        for stage, adapter in zip((self.layer1, self.layer2, self.layer3, self.layer4), adapters):
            x = stage(x)  # (B, C, H, W)
            extra = None if adapter is None else adapter("stage", x.permute(0, 2, 3, 1))
            if extra is not None:
                x = x + extra.permute(0, 3, 1, 2)  # (B, C, H, W)
        return self.attnpool(x)  # (B, D)


# ---------------------------------------------------------------------------------- CLIP


class CLIP(nn.Module):
    """Both towers.  `vision_layers` is an int for a ViT, four ints for a ResNet.

    Heads default to OpenAI's rule: one per 64 channels (a ResNet ends with 32 * vision_width).
    """

    def __init__(self, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_heads=None,
                 transformer_layers=12, vision_heads=None, quick_gelu=True):
        super().__init__()
        self.context_length, self.vocab_size = context_length, vocab_size
        activation = QuickGELU if quick_gelu else nn.GELU
        if isinstance(vision_layers, int):
            self.visual = VisionTransformer(
                image_resolution, vision_patch_size, vision_width, vision_layers,
                vision_heads or max(1, vision_width // 64), embed_dim, activation)
        else:
            self.visual = ModifiedResNet(
                vision_layers, embed_dim, vision_heads or max(1, vision_width // 2),
                image_resolution, vision_width)
        self.transformer = Transformer(
            transformer_width, transformer_layers,
            transformer_heads or max(1, transformer_width // 64), activation)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=transformer_width ** -0.5)

    @property
    def dtype(self):
        """dtype of the weights: torch.float32 for every model that `load` returns."""
        return self.visual.conv1.weight.dtype

    def encode_image(self, image, prompts=None, adapters=None):
        """Images (B, 3, R, R) -> features (B, D), not normalised; the hook is described on top."""
        size = self.visual.input_resolution
        if image.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (B, 3, {size}, {size}), got {tuple(image.shape)}")
        return self.visual(image.to(self.dtype), prompts, adapters)  # (B, D)

    def encode_text(self, text):
        """Token ids (n, L) as `tokenize` makes them -> features (n, D), not normalised.

        The tower is causal and the feature is read at the end-of-text token (the largest id), so
        what comes after the last of them is never computed.
        """
        emb = self.token_embedding(text)  # (n, L, W)
        return self.encode_text_embeddings(emb, text.argmax(dim=-1).cpu())  # (n, D)

    def encode_text_embeddings(self, emb, eot, shared=0):
        """Token embeddings (n, L, W) without positions, end-of-text index (n,) -> features (n, D).
        Several prompts of the same texts in one pass: emb (G, n, L, W) -> (G, n, D).

        Of more than 256 texts the backward pass computes each block again, as in the image tower.
        Let emb end with the longest text: what follows is cut off only if eot is on the CPU, as
        reading it on a GPU would mean to wait.

        shared: so many tokens at the front, none of them the last, are the same in all n texts.  As
        the tower is causal they are computed once.
        """
        n, L = emb.shape[-3:-1]
        if L > self.context_length:
            raise ValueError(f"texts of {L} tokens, but the model's context length is "
                             f"{self.context_length}")
        if eot.device.type == "cpu":
            emb = emb[..., :int(eot.max()) + 1 if n else 1, :]  # (G, n, T, W)
        x = emb + self.positional_embedding[:emb.shape[-2]]
        x = x.reshape(-1, *x.shape[-3:])  # (G, n, T, W)
        if shared:
            x = torch.cat([x[:, 0, :shared], x[:, :, shared:].flatten(1, 2)], dim=1)
            x = self.transformer(x, True, n > 256, shared=shared, texts=n)  # (G, shared + n R, W)
            x = x[:, shared:].unflatten(1, (n, -1))  # (G, n, R, W)
        else:
            x = self.transformer(x.flatten(0, 1), True, n > 256).unflatten(0, x.shape[:2])
        x = x[:, torch.arange(n, device=x.device), eot.to(x.device) - shared]  # (G, n, W)
        return (self.ln_final(x) @ self.text_projection).reshape(*emb.shape[:-2], -1)  # (G, n, D)

    def forward(self, image, text):
        """Images (B, 3, R, R), token ids (n, L) -> scaled cosines (B, n) and their transpose."""
        image = F.normalize(self.encode_image(image), dim=-1)  # (B, D)
        text = F.normalize(self.encode_text(text), dim=-1)  # (n, D)
        logits_per_image = self.logit_scale.exp() * image @ text.t()  # (B, n)
        return logits_per_image, logits_per_image.t()


def build_model(state_dict, quick_gelu=True, vision_heads=None, transformer_heads=None):
    """The CLIP, in eval() and fp32, that a state dict with OpenAI's names describes.

    The tensors are copied: two models from one dict share nothing.  What shapes do not tell can be
    given: the activation (`quick_gelu=False` for most open_clip weights trained on LAION) and the
    numbers of heads.  Raises CLIPError when the dict is not a CLIP.
    """
    ignored = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
    weights = {key: value.detach().to(torch.float32 if value.is_floating_point() else value.dtype,
                                      copy=True).contiguous()
               for key, value in state_dict.items() if key.split(".")[-1] not in ignored}

    def count(prefix):  # number of different indices that follow the prefix
        return len({key[len(prefix):].split(".")[0] for key in weights if key.startswith(prefix)})

    try:
        width, _, _, patch = weights["visual.conv1.weight"].shape
        if "visual.proj" in weights:
            layers = count("visual.transformer.resblocks.")
            side = math.isqrt(weights["visual.positional_embedding"].shape[0] - 1) * patch
            if width == 1280 and vision_heads is None:
                vision_heads = 16  # ViT-H/14, whose heads are 80 wide, not 64
        else:
            layers = tuple(count(f"visual.layer{i}.") for i in (1, 2, 3, 4))
            width = weights["visual.layer1.0.conv1.weight"].shape[0]
            side = math.isqrt(weights["visual.attnpool.positional_embedding"].shape[0] - 1) * 32
        vocab_size, text_width = weights["token_embedding.weight"].shape
        shape = dict(embed_dim=weights["text_projection"].shape[1], image_resolution=side,
                     vision_layers=layers, vision_width=width, vision_patch_size=patch,
                     context_length=weights["positional_embedding"].shape[0],
                     vocab_size=vocab_size, transformer_width=text_width,
                     transformer_layers=count("transformer.resblocks."))
    except KeyError as error:
        raise CLIPError(f"not the weights of a CLIP model: {error} is missing") from None
    with torch.device("meta"):  # shapes only: no time spent on values that are replaced
        model = CLIP(**shape, vision_heads=vision_heads, transformer_heads=transformer_heads,
                     quick_gelu=quick_gelu)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n", 1)[-1].split())[:200]
        raise CLIPError(f"the weights do not fit a CLIP model: {reason}") from None
    return model.eval()


def fingerprint(model):
    """SHA-256 (hex) of the weights, the same whatever kind of file they came in."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.float().cpu().contiguous()
        digest.update(name.encode() + ctypes.string_at(value.data_ptr(), 4 * value.numel()))
    return digest.hexdigest()


def checkpoint_of(model):
    """What to torch.save for openai/CLIP, open_clip and `load`: the state dict. With it, for `load`
    alone, what shapes do not tell, if it is not as in OpenAI's models: heads, activation."""
    heads = {"transformer_heads": model.transformer.heads}
    if hasattr(model.visual, "transformer"):
        heads["vision_heads"] = model.visual.transformer.heads
    quick_gelu = any(isinstance(part, QuickGELU) for part in model.transformer.modules())
    if heads["transformer_heads"] * 64 == model.transformer.width and quick_gelu:
        return model.state_dict()
    return {"state_dict": model.state_dict(), "quick_gelu": quick_gelu, **heads}
