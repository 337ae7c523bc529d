"""CLIP, written out: the API and parameter names of github.com/openai/CLIP in a few small files.

    model, preprocess = clip.load("ViT-B/16")          # or "tiny", or a checkpoint file
    logits_per_image, logits_per_text = model(preprocess(image)[None], clip.tokenize(["a dog"]))

Other than there, weights are fp32, `load` uses the CPU unless told, and `model.transformer` takes
(B, T, W), causal only if told so: for texts as word vectors there is `encode_text_embeddings`.
"""
from .clip import (CLIPError, available_models, check_architecture, load, tokenize,
                   zeroshot_classifier)
from .model import CLIP, build_model, checkpoint_of, fingerprint

__all__ = ["CLIP", "CLIPError", "available_models", "build_model", "check_architecture",
           "checkpoint_of", "fingerprint", "load", "tokenize", "zeroshot_classifier"]
