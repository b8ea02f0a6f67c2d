"""Phi-2 (Javaheripi et al. 2023), the base of EEVE-Korean-2.8B: what differs from Llama, and nothing else.

Attention and MLP read the same normalised input and are added together (the parallel block of GPT-J, Wang & Komatsuzaki
2021); norms are LayerNorm; every linear layer has a bias, the LM head too; only the first part of each head is rotated.
Parameter names are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Embedding, apply_rope
from .attention import PackedDocuments
from .config import ModelConfig
from .kv_cache import KeyValueCache
from .llama import Decoder, Llama, uncompiled_attention


class PhiAttention(nn.Module):
    """Attention whose heads rotate their first `config.rotary_dim` dimensions and pass the others on."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.head_dim, self.rotary_dim = config.head_dim, config.rotary_dim
        self.q_proj = nn.Linear(hidden, heads * config.head_dim)
        self.k_proj = nn.Linear(hidden, kv_heads * config.head_dim)
        self.v_proj = nn.Linear(hidden, kv_heads * config.head_dim)
        self.dense = nn.Linear(heads * config.head_dim, hidden)

    def forward(
        self, x_NH: Tensor, cos: Tensor, sin: Tensor, documents: PackedDocuments, cache: KeyValueCache | None
    ) -> Tensor:
        q_NQD = self._rotate(self.q_proj(x_NH).unflatten(-1, (-1, self.head_dim)), cos, sin)
        k_NKD = self._rotate(self.k_proj(x_NH).unflatten(-1, (-1, self.head_dim)), cos, sin)
        v_NKD = self.v_proj(x_NH).unflatten(-1, (-1, self.head_dim))
        if cache is not None:
            out_NQD = cache.attend(self.layer, q_NQD, k_NKD, v_NKD, None)
        else:
            out_NQD = uncompiled_attention(q_NQD, k_NKD, v_NKD, documents)
        return self.dense(out_NQD.flatten(1))

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated, passed = x.split((self.rotary_dim, self.head_dim - self.rotary_dim), dim=-1)
        return torch.cat((apply_rope(rotated, cos, sin), passed), dim=-1)


class PhiMLP(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh approximation of GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_NH: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_NH), approximate="tanh"))


class PhiLayer(nn.Module):
    """x + attention(norm(x)) + MLP(norm(x)). It has no fused operations, so nothing cheap is computed twice."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = PhiAttention(config, layer)
        self.mlp = PhiMLP(config)

    def forward(
        self,
        x_NH: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: PackedDocuments,
        cache: KeyValueCache | None,
        recompute: bool = True,
    ) -> Tensor:
        normalised = self.input_layernorm(x_NH)
        return self.self_attn(normalised, cos, sin, documents, cache) + self.mlp(normalised) + x_NH


class PhiDecoder(Decoder):
    """Embedding, parallel layers, and a final LayerNorm."""

    def __init__(self, config: ModelConfig, vocabulary_rows: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.embed_tokens = Embedding(vocabulary_rows, config.hidden_size)
        self.layers = nn.ModuleList(PhiLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def norm(self) -> nn.Module:
        return self.final_layernorm


class Phi(Llama):
    """Phi-2 with the interface of `Llama`."""

    def __init__(self, config: ModelConfig, *, pad_vocab_to: int = 1) -> None:
        nn.Module.__init__(self)
        self.config = config
        rows = math.ceil(config.vocab_size / pad_vocab_to) * pad_vocab_to
        self.model = PhiDecoder(config, rows)
        self.lm_head = nn.Linear(config.hidden_size, rows)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


def build_model(config: ModelConfig, *, pad_vocab_to: int = 1) -> Llama:
    """The model of a configuration's family, with uninitialised weights; see `Llama`."""
    family = Phi if config.model_type == "phi" else Llama
    return family(config, pad_vocab_to=pad_vocab_to)
