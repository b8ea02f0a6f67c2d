"""The Llama/Mistral decoder, over flat batches of packed documents.

Shape suffixes: N tokens of all documents together, H hidden size, Q query heads, K key/value heads,
D head dimension, F feed-forward size, V vocabulary. Parameter names and layouts are those of Hugging
Face checkpoints, so that weights move in and out untouched.

The block is that of Touvron et al. 2023 (arXiv 2302.13971); each part names the source of its equation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..kernels import (
    Embedding,
    LinearCrossEntropyOutput,
    RMSNorm,
    apply_rope,
    linear_cross_entropy,
    rope_cos_sin,
)
from .activations import Activations, run_layers
from .attention import PackedDocuments, packed_attention
from .config import ModelConfig
from .errors import CheckpointError
from .kv_cache import KeyValueCache
from .projections import gated_mlp, project
from .trained_rows import MatrixTraining, rows_from

# `torch.compile` would otherwise compile anew for other document lengths. Not `torch.compiler.disable`, which brings in
# the compiler at once, for those who do not compile, too.
uncompiled_attention = cast(Callable[..., Tensor], _disable_dynamo(packed_attention))


class Attention(nn.Module):
    """softmax(R(q)·R(k)ᵀ / √D + mask) · v per head of the normalised input, then the output projection.

    Scaled dot products from Vaswani et al. 2017 (arXiv 1706.03762); R turns each query and key by its position (RoPE,
    Su et al. 2021, 2104.09864); Q/K query heads share a key/value head (Ainslie et al. 2023, 2305.13245); the mask is
    causal, within documents, and within the sliding window if there is one (Jiang et al. 2023, 2310.06825).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.head_dim = config.head_dim
        self.sliding_window = config.sliding_window
        self.q_proj = nn.Linear(hidden, heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * config.head_dim, hidden, bias=config.output_bias)

    def forward(
        self,
        x_NH: Tensor,
        norm: RMSNorm,
        cos: Tensor,
        sin: Tensor,
        documents: PackedDocuments,
        cache: KeyValueCache | None,
        recompute: bool,
    ) -> Tensor:
        q, k, v = project(x_NH, norm, (self.q_proj, self.k_proj, self.v_proj), recompute=recompute)
        q_NQD = apply_rope(q.unflatten(-1, (-1, self.head_dim)), cos, sin, inplace=True)
        k_NKD = apply_rope(k.unflatten(-1, (-1, self.head_dim)), cos, sin, inplace=True)
        v_NKD = v.unflatten(-1, (-1, self.head_dim))
        if cache is not None:
            out_NQD = cache.attend(self.layer, q_NQD, k_NKD, v_NKD, self.sliding_window)
        else:
            out_NQD = uncompiled_attention(q_NQD, k_NKD, v_NKD, documents, self.sliding_window)
        return self.o_proj(out_NQD.flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) of the normalised input x, SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_NH: Tensor, norm: RMSNorm, recompute: bool) -> Tensor:
        return gated_mlp(x_NH, norm, self.gate_proj, self.up_proj, self.down_proj, recompute=recompute)


class DecoderLayer(nn.Module):
    """x ← x + attention(norm(x)), then x ← x + MLP(norm(x)) (pre-norm: Xiong et al. 2020, arXiv 2002.04745)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_NH: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: PackedDocuments,
        cache: KeyValueCache | None,
        recompute: bool = True,
    ) -> Tensor:
        """`recompute`: whether backward computes norms and SwiGLU once more, or their results are kept for it."""
        x_NH = x_NH + self.self_attn(x_NH, self.input_layernorm, cos, sin, documents, cache, recompute)
        return x_NH + self.mlp(x_NH, self.post_attention_layernorm, recompute)


class Decoder(nn.Module):
    """Token embedding, the layers, and the final norm: everything but the LM head."""

    activations: Activations = "recompute-cheap"
    embed_training = MatrixTraining()

    def __init__(self, config: ModelConfig, vocabulary_rows: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(vocabulary_rows, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, documents: PackedDocuments | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        if documents is None:
            assert cache is not None, "a forward pass needs packed documents or a cache"
            documents = PackedDocuments.from_lengths([len(input_ids)], input_ids.device)
        position_ids = documents.position_ids if cache is None else cache.reserve(documents)
        lengths = documents.lengths if cache is None else cache.lengths_with(documents)
        frequencies = self.config.inverse_frequencies(lengths, documents.lengths, input_ids.device)
        cos, sin = rope_cos_sin(position_ids, frequencies)
        x_NH = self.embed_tokens(input_ids, **self.embed_training.options())
        if cache is None and torch.is_grad_enabled():
            x_NH = run_layers(self.layers, self.activations, x_NH, cos, sin, documents)
        else:
            for layer in self.layers:
                x_NH = layer(x_NH, cos, sin, documents, cache)
        if cache is not None:
            cache.advance()
        return self.norm(x_NH)


class Llama(nn.Module):
    """Decoder plus LM head. Build it with `Llama(config)`, or load one with `load_model`.

    Args:
        config: shape and constants.
        pad_vocab_to: round the rows of embedding and LM head up to a multiple of this, for aligned matrix
            products; the extra rows appear in no logits, no loss and no saved checkpoint.

    Set `model.model.activations` to choose what is kept for backward (`Activations`), and call `train_rows` to train
    some rows of the embedding and the LM head alone.
    """

    head_training = MatrixTraining()

    def __init__(self, config: ModelConfig, *, pad_vocab_to: int = 1) -> None:
        super().__init__()
        self.config = config
        rows = math.ceil(config.vocab_size / pad_vocab_to) * pad_vocab_to
        self.model = Decoder(config, rows)
        self.lm_head = nn.Linear(config.hidden_size, rows, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self, generator: torch.Generator) -> None:
        """Matrices from N(0, initializer_range²), norms one, biases zero; same generator, same weights."""
        for name, parameter in self.named_parameters():  # shared tensors are visited once
            with torch.no_grad():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                else:
                    parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    def hidden_states(self, input_ids: Tensor, documents: PackedDocuments) -> Tensor:
        """Final hidden states [N, H] of packed documents; `input_ids` is [N] int64."""
        return self.model(input_ids, documents)

    def forward(
        self, input_ids: Tensor, documents: PackedDocuments | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Logits [N, V] in the weights' dtype, of packed documents, or of the tokens behind those in `cache`."""
        return self.logits(self.model(input_ids, documents, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., H], without those of padding rows."""
        return self.lm_head(hidden)[..., : self.config.vocab_size]

    def train_rows(self, embed_from: int | None, head_from: int | None) -> dict[str, nn.Parameter]:
        """Train the last rows of embedding and LM head alone, by parameters of their own in the same memory.

        `forward` and `loss` use them from now on, and refuse an embedding or a head that requires a gradient itself.
        They are no parameters of the module: `named_parameters`, `state_dict` and saved checkpoints stay as they are.
        Call it once the model has its final device and dtype, and again with None to undo it. Gradient buffers are
        forgotten.

        Args:
            embed_from: first row of the embedding that trains, up to `config.vocab_size`; None for no such rows.
            head_from: the same of the LM head. A tied head is the embedding: one of the two is enough.

        Returns:
            What trains, by name: "model.embed_tokens.weight[FIRST:]" and "lm_head.weight[FIRST:]", the former alone
            where they are tied.

        Raises:
            CheckpointError: if the vocabulary has no such rows, or if two different ones of a tied matrix are named.
        """
        tied, vocab_size = self.config.tie_word_embeddings, self.config.vocab_size
        if tied:
            if None not in (embed_from, head_from) and embed_from != head_from:
                raise CheckpointError(
                    f"embedding and LM head are one matrix: train it from row {embed_from} or {head_from} on, not both"
                )
            embed_from = head_from if embed_from is None else embed_from
        embed = rows_from(self.model.embed_tokens.weight, embed_from, vocab_size)
        head = embed if tied else rows_from(self.lm_head.weight, head_from, vocab_size)
        self.model.embed_training, self.head_training = embed, head
        trained = {f"model.embed_tokens.weight[{embed.first_row}:]": embed.rows}
        if not tied:
            trained[f"lm_head.weight[{head.first_row}:]"] = head.rows
        return {name: rows for name, rows in trained.items() if rows is not None}

    def set_gradient_buffers(self, embed: Tensor | None, head: Tensor | None) -> None:
        """Let backward add gradients of embedding and LM head to fp32 buffers, in place of `.grad`.

        Args:
            embed: in the shape of what trains of the embedding, the matrix or the rows of `train_rows`; None for
                `.grad`.
            head: the same of the LM head. Where the two are tied, one buffer, `embed`, takes both gradients.

        Raises:
            ValueError: if a tied head is given a buffer of its own. Shapes and dtypes are checked by the next `loss`.
        """
        if self.config.tie_word_embeddings:
            if head is not None and head is not embed:
                raise ValueError("embedding and LM head are one matrix, whose gradient adds up in one buffer: embed")
            head = embed
        self.model.embed_training = self.model.embed_training.with_buffer(embed)
        self.head_training = self.head_training.with_buffer(head)

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        documents: PackedDocuments,
        *,
        token_weights: Tensor | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        chunk_tokens: int | None = None,
    ) -> LinearCrossEntropyOutput:
        """Summed next-token loss in nats, without ever holding all logits.

        Args:
            input_ids: [N] int64.
            targets: [N] int64, −100 where nothing is to be predicted.
            documents: layout of the N tokens.
            token_weights, z_loss, label_smoothing, chunk_tokens: see `linear_cross_entropy`.
        """
        hidden_NH = self.hidden_states(input_ids, documents)
        return linear_cross_entropy(
            hidden_NH,
            self.lm_head.weight,
            targets,
            bias=self.lm_head.bias,  # None but for Phi
            vocab_size=self.config.vocab_size,
            token_weights=token_weights,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            chunk_tokens=chunk_tokens,
            **self.head_training.options(),
        )
