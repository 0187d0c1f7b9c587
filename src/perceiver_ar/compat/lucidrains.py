"""The classes of `perceiver-ar-pytorch` 0.0.10 (lucidrains): same arguments, same `state_dict`, same results.

    from perceiver_ar.compat.lucidrains import PerceiverAR, AutoregressiveWrapper

There is no second network here: both classes set up `perceiver_ar.PerceiverAR` and translate names. The parameters also
come in the package's order and shapes, so a saved optimizer state loads too. Training step, loss and greedy generation
equal the package's up to rounding. What the package gets wrong on valid use is put right:

- a sequence no longer than `cross_attn_seq_len` has one latent, its last position (the package raises AssertionError);
- a prefix mask of any length up to the sequence's works together with prefix dropout (the package fails on indexing);
- a query that a mask leaves without any key gets zeros from the attention (the package averages all values, also the
  future's);
- heads of fewer than 32 channels are rotated whole (the package crashes);
- positions are rotated in float32 or better whatever the model's dtype (the package's bfloat16 positions collapse);
- in `generate`, an EOS in the prompt does not end the sampling, `temperature=0` is greedy, and at least one candidate
  survives `filter_thres` in small vocabularies (the package stops at once, divides by zero, draws from nothing).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from perceiver_ar import model as network
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError
from perceiver_ar.generation import evaluation_mode
from perceiver_ar.objective import next_token_loss
from perceiver_ar.sampling import keep_top_k, sample

__all__ = ["AutoregressiveWrapper", "PerceiverAR"]


class PerceiverAR(nn.Module):
    """`perceiver_ar_pytorch.PerceiverAR`; our network is its attribute `model`."""

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        max_seq_len: int,
        cross_attn_seq_len: int,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        cross_attn_dropout: float = 0.0,
        ff_mult: float = 4,
        perceive_depth: int = 1,
        perceive_max_heads_process: int = 2,
    ) -> None:
        """
        Args:
            num_tokens: vocabulary size.
            dim: width.
            depth: self-attention layers.
            max_seq_len: context length; rows of the position table.
            cross_attn_seq_len: prefix length, below max_seq_len.
            dim_head, heads: channels per head, and heads.
            dropout: on cross-attention probabilities and on the hidden units of feed-forward blocks.
            cross_attn_dropout: share of the prefix that each cross-attention layer drops in training.
            ff_mult: hidden width of feed-forward blocks over dim.
            perceive_depth: cross-attention layers.
            perceive_max_heads_process: accepted and unused: fused attention never holds the matrix it would chunk.

        Raises:
            InputError: settings that cannot work.
        """
        super().__init__()
        if not 0 <= cross_attn_seq_len < max_seq_len:
            raise InputError(
                f"cross_attn_seq_len is {cross_attn_seq_len} and max_seq_len {max_seq_len}: "
                "the prefix must be shorter than the sequence"
            )
        self.max_seq_len, self.cross_attn_seq_len = max_seq_len, cross_attn_seq_len
        self.rotary_dim = min(dim_head, max(32, dim_head // 2))
        config = PerceiverARConfig.preset(
            "lucidrains",
            vocab_size=num_tokens,
            context_length=max_seq_len,
            num_latents=max_seq_len - cross_attn_seq_len,
            dim=dim,
            num_layers=depth,
            num_heads=heads,
            head_dim=dim_head,
            mlp_ratio=ff_mult,
            cross_layers=(0,) * perceive_depth,
            rotary_fraction=self.rotary_dim / dim_head,
            attention_dropout=dropout,
            mlp_dropout=dropout,
            prefix_dropout=cross_attn_dropout,
        )
        self.model = network.PerceiverAR(config)
        self.register_state_dict_post_hook(_to_package_names)
        self.register_load_state_dict_pre_hook(_from_package_names)

    def forward(
        self,
        x: Tensor,
        prefix_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        ignore_index: int = 0,
        prefix_keep: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, N, num_tokens) of the positions from cross_attn_seq_len on, or the loss where labels are given.

        Args:
            x: (B, T) ids, 1 <= T <= max_seq_len.
            prefix_mask: (B, up to T) bool, True where the cross-attention may read a key; a short one is extended with
                True. One that reaches beyond the prefix also hides latent positions there, from the cross-attention
                alone, as in the package.
            labels: (B, T) the next id of every position; those before cross_attn_seq_len are not used.
            ignore_index: the label that is no target. The package ignores label 0.
            prefix_keep: as in `perceiver_ar.PerceiverAR.forward`, to fix what prefix dropout keeps.
        """
        B, T = x.shape
        P = min(self.cross_attn_seq_len, T - 1)
        mask = None
        if prefix_mask is not None:
            if prefix_mask.ndim != 2 or prefix_mask.shape[0] != B or prefix_mask.shape[1] > T:
                raise InputError(f"prefix_mask has shape {tuple(prefix_mask.shape)}: it must be ({B}, at most {T})")
            mask = nn.functional.pad(prefix_mask.bool(), (0, T - prefix_mask.shape[1]), value=True)
        # The package counts positions from the start of the window whatever the mask hides.
        positions = torch.arange(T, device=x.device)
        logits = self.model(x, P, mask=mask, positions=positions, prefix_keep=prefix_keep)
        return logits if labels is None else next_token_loss(logits, labels[:, P:], ignore_index=ignore_index)


class AutoregressiveWrapper(nn.Module):
    """`perceiver_ar_pytorch.autoregressive_wrapper.AutoregressiveWrapper`: loss on shifted sequences, and sampling."""

    def __init__(self, net: PerceiverAR, pad_value: int = 0) -> None:
        super().__init__()
        self.max_seq_len = net.max_seq_len
        self.pad_value = pad_value
        self.net = net

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Loss of x (B, T + 1): every token from cross_attn_seq_len + 1 on is a target."""
        return self.net(x[:, :-1], labels=x[:, 1:], **kwargs)

    @torch.no_grad()
    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        **kwargs: Any,
    ) -> Tensor:
        """Samples up to seq_len new ids after start_tokens (B, n), n >= 1; returns only the new ones.

        The prefix stays at cross_attn_seq_len tokens while latents grow to fill max_seq_len; then the window slides by
        one token at a time. Draws come from torch's global generator, one per row and step, as in the package.

        Args:
            eos_token: when every row has drawn it, sampling ends, and everything after it in a row becomes pad_value.
            temperature: 0 is greedy.
            filter_thres: only the int((1 - filter_thres) * num_tokens) most likely ids, and at least one, can be drawn.
        """
        out, n = start_tokens, start_tokens.shape[1]
        with evaluation_mode(self.net):
            for _ in range(seq_len):
                logits = self.net(out[:, -self.max_seq_len :], **kwargs)[:, -1]
                k = max(1, int((1 - filter_thres) * logits.shape[-1]))
                out = torch.cat([out, sample(keep_top_k(logits, k), temperature)[:, None]], dim=1)
                if eos_token is not None:
                    is_eos = out[:, n:] == eos_token
                    if is_eos.any(dim=1).all():
                        after = is_eos.long().cumsum(dim=1) - is_eos.long() >= 1
                        out[:, n:] = out[:, n:].masked_fill(after, self.pad_value)
                        break
        return out[:, n:]


def package_names(config: PerceiverARConfig) -> dict[str, str]:
    """The package's parameter names, in its order, with ours."""
    names = {"token_emb.weight": "embed.weight", "pos_emb.weight": "position_embed.0.weight"}
    mlp = {
        "0.weight": "norm.weight",
        "0.bias": "norm.bias",
        "1.weight": "up_proj.weight",
        "4.weight": "down_proj.weight",
    }
    for i in range(len(config.cross_layers)):
        theirs, ours = f"perceive_layers.{i}", f"cross_attention.{i}"
        norms = {"norm": "query_norm", "context_norm": "context_norm"}
        names |= {f"{theirs}.0.{a}.{p}": f"{ours}.{b}.{p}" for a, b in norms.items() for p in ("weight", "bias")}
        names |= {f"{theirs}.0.to_{a}.weight": f"{ours}.{a}_proj.weight" for a in ("q", "kv", "out")}
        names |= {f"{theirs}.0.to_out.bias": f"{ours}.out_proj.bias"}
        names |= {f"{theirs}.1.{a}": f"{ours}.mlp.{b}" for a, b in mlp.items()}
    for i in range(config.num_layers):
        theirs, ours = f"layers.{i}", f"self_attention.{i}"
        names |= {f"{theirs}.0.norm.{p}": f"{ours}.norm.{p}" for p in ("weight", "bias")}
        names |= {f"{theirs}.0.to_{a}.weight": f"{ours}.{a}_proj.weight" for a in ("qkv", "out")}
        names |= {f"{theirs}.1.{a}": f"{ours}.mlp.{b}" for a, b in mlp.items()}
    return names | {"to_logits.weight": "head.weight"}


_INV_FREQ = "rotary_pos_emb.inv_freq"


def _to_package_names(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    owner = cast(PerceiverAR, module)
    for theirs, ours in package_names(owner.model.config).items():
        state[prefix + theirs] = state.pop(f"{prefix}model.{ours}")
        if theirs == "pos_emb.weight":  # a buffer there, recomputed from the settings here
            R = owner.rotary_dim
            state[prefix + _INV_FREQ] = 1.0 / (10000 ** (torch.arange(0, R, 2).float() / R))


def _from_package_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *_args: Any) -> None:
    for theirs, ours in package_names(cast(PerceiverAR, module).model.config).items():
        if prefix + theirs in state:
            state[f"{prefix}model.{ours}"] = state.pop(prefix + theirs)
    state.pop(prefix + _INV_FREQ, None)
