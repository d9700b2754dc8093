"""A random model of a family that keeps float64 throughout (the RMSNorm of Llama and its kin computes in float32)."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def tiny_gpt2(vocabulary: int) -> GPT2LMHeadModel:
    """Float64, the same weights at every call, scores far enough apart for open and closed hinges."""
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    config = GPT2Config(vocab_size=vocabulary, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes)
    return GPT2LMHeadModel(config).double()
