"""Loading CLIP: checkpoints of five formats, verified downloads, tokens, preprocessing.

No code that a checkpoint holds is executed.  OpenAI's files are TorchScript archives, whose tensors
are read here without torch.jit; torch.load (weights_only) and safetensors read all others.
"""
import hashlib
import io
import pickle
import re
import socket
import sys
import urllib.request
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import transforms

from .model import CLIPError, build_model
from .simple_tokenizer import SimpleTokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# name: (SHA-256 of OpenAI's file, Hugging Face repository with a copy of the weights,
#        (resolution, embedding width, patch size or 0 for a ResNet))
_MODELS = {
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
             "timm/resnet50_clip.openai", (224, 1024, 0)),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
              "timm/resnet101_clip.openai", (224, 512, 0)),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
               "timm/resnet50x4_clip.openai", (288, 640, 0)),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
                "timm/resnet50x16_clip.openai", (384, 768, 0)),
    "RN50x64": ("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
                "timm/resnet50x64_clip.openai", (448, 1024, 0)),
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
                 "openai/clip-vit-base-patch32", (224, 512, 32)),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
                 "openai/clip-vit-base-patch16", (224, 512, 16)),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
                 "openai/clip-vit-large-patch14", (224, 768, 14)),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
                       "openai/clip-vit-large-patch14-336", (336, 768, 14)),
    "tiny": (None, None, (32, 64, 8)),
}
_TIMEOUT = 60  # seconds without a byte from a host
_tokenizer = SimpleTokenizer()


# ---------------------------------------------------------------------------------- public

def available_models():
    """Names that `load` knows: OpenAI's nine, and "tiny", which lies in this folder."""
    return list(_MODELS)


def load(name, device="cpu", download_root=None, jit=False, quick_gelu=None):
    """(model in eval() and fp32, preprocess) for a model's name or a checkpoint file.

    `name`: one of `available_models()`, downloaded on first use to `download_root` (default
    ~/.cache/clip), or a file: OpenAI's .pt, a plain state dict (also one under "state_dict" or
    "model"), Hugging Face's CLIPModel or open_clip's, as .pt, .bin or .safetensors (if installed).
    `quick_gelu`: None is what the file says, else True, which is right for OpenAI's weights; most
    open_clip weights trained on LAION need False, and their files do not say so.
    `preprocess`: PIL image of any mode and size -> (3, R, R), R = model.visual.input_resolution.
    Raises CLIPError, one line, when the name, the file, its contents or the network are at fault.
    """
    if jit or download_root is True:  # True: openai/CLIP has jit in the third place
        raise CLIPError("jit=True is not supported: TorchScript is deprecated, use jit=False")
    if name == "tiny":
        path = Path(__file__).with_name("tiny.pt")
    elif name in _MODELS:
        path = _download(name, download_root or Path.home() / ".cache" / "clip")
    else:
        path = Path(name)
    if not path.is_file():
        raise CLIPError(f"no such model or file: {path} (models: {', '.join(available_models())})")
    weights, extra = _read_checkpoint(path)
    if quick_gelu is None:
        quick_gelu = extra.get("quick_gelu", True)
    try:
        model = build_model(weights, quick_gelu=bool(quick_gelu),
                            vision_heads=extra.get("vision_heads"),
                            transformer_heads=extra.get("transformer_heads"))
    except Exception as error:  # any shape may be in a file, 0 among them
        raise CLIPError(f"{path}: {_one_line(error)}") from None
    return model.to(device), _transform(model.visual.input_resolution)


def check_architecture(model, name):
    """CLIPError unless `model` has the architecture `name`, one of `available_models()`."""
    visual = model.visual
    patch = visual.conv1.kernel_size[0] if hasattr(visual, "transformer") else 0
    if name not in _MODELS:
        raise CLIPError(f"no such model: {name} (models: {', '.join(_MODELS)})")
    found = (visual.input_resolution, visual.output_dim, patch)
    if found != _MODELS[name][2]:
        raise CLIPError(f"the weights are not those of {name}: resolution {found[0]}, embedding "
                        f"{found[1]}, " + (f"patch {patch}" if patch else "a ResNet"))


def tokenize(texts, context_length=77, truncate=False):
    """A string or a list of n strings -> LongTensor (n, context_length): start, text, end, zeros.

    A text that does not fit raises CLIPError (a RuntimeError), or is cut when `truncate` is set.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    start, end = _tokenizer.encoder["<|startoftext|>"], _tokenizer.encoder["<|endoftext|>"]
    result = torch.zeros(len(texts), context_length, dtype=torch.long)  # (n, L)
    for row, text in zip(result, texts):
        ids = [start, *_tokenizer.encode(text), end]
        if len(ids) > context_length:
            if not truncate:
                raise CLIPError(f"{len(ids)} tokens are too long for context length "
                                f"{context_length}: {text[:60]!r}")
            ids = [*ids[:context_length - 1], end]
        row[:len(ids)] = torch.tensor(ids)
    return result


@torch.no_grad()
def zeroshot_classifier(model, texts):
    """C lists of prompts -> (C, D): per class the mean of its unit text features, a unit vector."""
    tokens = tokenize([text for prompts in texts for text in prompts], truncate=True)
    parts = tokens.to(model.logit_scale.device).split(256)
    t = torch.cat([model.encode_text(part) for part in parts])
    rows = F.normalize(t, dim=-1).split([len(prompts) for prompts in texts])
    return F.normalize(torch.stack([row.mean(dim=0) for row in rows]), dim=-1)


def to_rgb(image):
    """RGB; of 16 bits, or a microscope's 12, the upper eight: Pillow's own clips above 255."""
    if image.mode[0] == "I":
        image = image.convert("I")  # I;16B, which ImageJ writes, has no point
        scale = 2**8 if image.getextrema()[1] >= 2**12 else 2**4
        image = image.point(lambda v: v / scale)
    return image.convert("RGB")


def _transform(n_px):
    """CLIP's test transform.  Its order matters: palette images are resized before they are RGB."""
    return transforms.Compose([
        transforms.Resize(n_px, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(n_px),
        to_rgb,
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])


# ---------------------------------------------------------------------------------- checkpoints

def _read_checkpoint(path):
    """(state dict with OpenAI's names, other entries such as quick_gelu) of any file."""
    try:
        checkpoint, extra = _read_file(path), {}
        if not isinstance(checkpoint, dict):
            raise ValueError("it holds no state dict")
        for key in ("state_dict", "model", "model_state_dict"):
            if isinstance(checkpoint.get(key), dict):
                checkpoint, extra = checkpoint[key], checkpoint
                break
        weights = {key: value for key, value in checkpoint.items()
                   if isinstance(key, str) and isinstance(value, torch.Tensor)}
        weights = _openai_names(weights)
        if extra.get("token_ids") is not None:  # only the rows of tokens that were trained
            rows = weights["token_embedding.weight"]  # (ids, W); the others are zero
            full = rows.new_zeros(extra["vocab_size"], rows.shape[1])  # (vocabulary, W)
            full[extra["token_ids"]] = rows
            weights["token_embedding.weight"] = full
    except Exception as error:  # a damaged file may provoke any
        raise CLIPError(f"cannot read {path} as a checkpoint: {_one_line(error)}") from error
    return weights, extra


def _one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def _read_file(path):
    """What a file holds: a dict of tensors, or whatever else torch.save wrote."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # safetensors: the length of a JSON header, the header, the tensors
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError("safetensors needs a package: pip install safetensors") from None
        return load_file(path)
    if head[:4] != b"PK\x03\x04":
        raise ValueError("expected safetensors or a zip archive (a file that torch.save wrote "
                         "before 1.6: torch.load it where you trust it, and torch.save it again)")
    with zipfile.ZipFile(path) as archive:
        if any("/code/" in name or "/constants.pkl" in name for name in archive.namelist()):
            return _read_torchscript(archive)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its text tells how to run what the file holds
        raise ValueError("it is damaged, or holds more than tensors and plain values: torch.save "
                         "its state dict alone") from None


class _Module:
    """Stands for any object of a TorchScript archive: keeps its attributes, runs nothing."""
    def __init__(self, *args):
        pass


def _rebuild_tensor(storage, offset, size, stride, *_):
    return torch.as_strided(storage, size, stride, offset)  # checks that it fits the storage


class _TorchScriptUnpickler(pickle.Unpickler):
    """Builds tensors, dicts and `_Module`s from an archive's data.pkl, and refuses all else."""
    allowed = {("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
               ("collections", "OrderedDict"): dict,
               ("torch", "DoubleStorage"): torch.float64, ("torch", "FloatStorage"): torch.float32,
               ("torch", "HalfStorage"): torch.float16, ("torch", "LongStorage"): torch.int64,
               ("torch", "IntStorage"): torch.int32, ("torch", "BoolStorage"): torch.bool}

    def __init__(self, archive):
        self.archive, self.root = archive, archive.namelist()[0].split("/")[0]
        super().__init__(io.BytesIO(archive.read(f"{self.root}/data.pkl")))

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__" or module == "torch.jit._pickle":
            return _Module  # its class is code of the archive; or a list with a type
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return self.allowed[module, name]

    def persistent_load(self, pid):
        """("storage", dtype, key, device, elements) -> tensor (elements,)."""
        _, dtype, key, *_ = pid
        raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.frombuffer(raw, dtype=dtype)


def _read_torchscript(archive):
    """{name: tensor} of a zip archive that torch.jit.save wrote; its code is not looked at."""
    def tensors(module, prefix):
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            elif isinstance(value, _Module):
                yield from tensors(value, f"{prefix}{name}.")
    return dict(tensors(_TorchScriptUnpickler(archive).load(), ""))


_HUGGING_FACE = (  # (their part of a name, OpenAI's), replaced in this order
    ("text_model.", ""), ("vision_model.", "visual."), ("embeddings.", ""),
    ("position_embedding.weight", "positional_embedding"), ("patch_embedding.", "conv1."),
    ("encoder.layers.", "transformer.resblocks."), ("self_attn.", "attn."),
    ("layer_norm1.", "ln_1."), ("layer_norm2.", "ln_2."), ("fc1.", "c_fc."), ("fc2.", "c_proj."),
    ("post_layernorm.", "ln_post."), ("final_layer_norm.", "ln_final."),
    ("visual_projection.", "visual.proj."), ("pre_layrnorm.", "ln_pre."))  # their spelling


def _openai_names(weights):
    """The state dict with OpenAI's names, from those of wrappers, open_clip or Hugging Face."""
    for prefix in ("module.", "model.", "_orig_mod."):  # DDP, Lightning, torch.compile
        if weights and all(key.startswith(prefix) for key in weights):
            weights = {key[len(prefix):]: value for key, value in weights.items()}
    if "text.token_embedding.weight" in weights:  # open_clip's CustomTextCLIP
        weights = {key.removeprefix("text."): value for key, value in weights.items()}
    if "text_model.embeddings.token_embedding.weight" in weights:
        for theirs, ours in _HUGGING_FACE:
            weights = {key.replace(theirs, ours): value for key, value in weights.items()}
        for key in [key for key in weights if ".attn.q_proj." in key]:
            parts = [weights.pop(key.replace(".q_proj.", f".{c}_proj.")) for c in "qkv"]
            weights[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    for key in ("text_projection", "visual.proj"):
        if f"{key}.weight" in weights:  # a Linear layer keeps the transpose
            weights[key] = weights.pop(f"{key}.weight").t()
    return weights


# ---------------------------------------------------------------------------------- download

def _sources(name):
    """[(url, SHA-256, or None: ask the host)] of a model's file, in the order of trial."""
    sha256, repo, _ = _MODELS[name]
    file = f"{sha256}/{re.sub('[/@]', '-', name)}.pt"
    copy = "open_clip_model.safetensors" if repo.startswith("timm/") else "pytorch_model.bin"
    return [(f"https://openaipublic.azureedge.net/clip/models/{file}", sha256),
            (f"https://openaipublic.blob.core.windows.net/clip/models/{file}", sha256),
            (f"https://huggingface.co/{repo}/resolve/main/{copy}", None)]


def _download(name, root):
    """Path of a named model's verified file: found in the folder `root`, else downloaded to it."""
    files, tried = [], []
    for url, sha256 in _sources(name):
        path = Path(root, re.sub("[/@]", "-", name) + Path(url).suffix)
        note = Path(f"{path}.sha256")  # of a Hugging Face copy: the hash that was verified
        known = sha256 or (note.read_text().strip() if note.is_file() else None)
        if known and path.is_file():
            _check_sha256(path, known)
            return path
        files.append((url, sha256, path, note))
    for url, sha256, path, note in files:
        print(f"downloading {name} from {url}", file=sys.stderr)
        try:
            known = _fetch(url, sha256, path)
        except Exception as error:  # whatever a host does, the next one is asked
            tried.append(f"{url.split('/')[2]}: {_one_line(error)}")
            print(tried[-1], file=sys.stderr)
            continue
        _check_sha256(path, known)
        if sha256 is None:
            note.write_text(known + "\n")
        return path
    raise CLIPError(f"cannot download {name} (tried {'; '.join(tried)}): get the file elsewhere "
                    f"and pass it with --weights FILE")


def _fetch(url, sha256, path):
    """Download to `path`, unless a file is there; the SHA-256 that it must have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        sha256 = sha256 or _sha256_in_reply(url)
        if not path.exists():
            torch.hub.download_url_to_file(url, str(path), sha256)  # verifies, then renames
    finally:
        socket.setdefaulttimeout(before)
    return sha256


def _sha256_in_reply(url):
    """The SHA-256 that Hugging Face names in its first reply, a redirect."""
    opener = urllib.request.OpenerDirector()  # which follows no redirect
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler,
                    urllib.request.HTTPSHandler):
        opener.add_handler(handler())
    with opener.open(urllib.request.Request(url, method="HEAD")) as reply:
        etag = reply.headers.get("X-Linked-Etag", "").strip('W/"').lower()
    if not re.fullmatch("[0-9a-f]{64}", etag):
        raise ValueError(f"its reply (HTTP {reply.status}) names no SHA-256")
    return etag


def _check_sha256(path, sha256):
    """CLIPError unless the file has this SHA-256: it may be a user's own, so it is left alone."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise CLIPError(f"{path} is not the expected file (its SHA-256 differs): move it away to "
                        "download it again, or pass it with --weights FILE if you trust it")
