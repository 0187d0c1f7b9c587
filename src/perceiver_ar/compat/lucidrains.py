"""The classes of `perceiver-ar-pytorch` 0.0.10 (lucidrains): same arguments, same `state_dict`, same results.

    from perceiver_ar.compat.lucidrains import PerceiverAR, AutoregressiveWrapper
    from perceiver_ar.compat import load_lucidrains  # a saved checkpoint -> our network

There is no second network here: both classes set up `perceiver_ar.PerceiverAR` and translate names. The parameters also
come in the package's order and shapes, so a saved optimizer state loads too. Training step, loss and greedy generation
equal the package's up to rounding. Errors of the package on valid use are corrected:

- a sequence no longer than `cross_attn_seq_len` has one latent, its last position (the package raises AssertionError);
- a prefix mask of any length up to the sequence's works together with prefix dropout (the package fails on indexing);
- a query that a mask leaves without any key gets zeros from the attention (the package averages all values, also the
  future's);
- heads of fewer than 32 channels are rotated whole (the package crashes);
- positions are rotated in float32 or better whatever the model's dtype (the package's bfloat16 positions collapse);
- in `generate`, an EOS in the prompt does not end the sampling, `temperature=0` is greedy, and at least one candidate
  survives `filter_thres` in small vocabularies (the package stops immediately, divides by zero, draws from nothing).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_ar.compat.checkpoint_files import read_torch
from perceiver_ar.compat.lucidrains_names import INV_FREQ, names, use_package_names
from perceiver_ar.compat.weights import find_state, plain_tensors, refuse_differences, rotary_settings, to_ours
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.text import BytesCodec
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path
from perceiver_ar.generation import evaluation_mode, prompt_rows
from perceiver_ar.generation.decoder import Decoder
from perceiver_ar.generation.rows import Row, RowSettings
from perceiver_ar.generation.sampling import Sampling, keep_top_k, sample
from perceiver_ar.network import model as network
from perceiver_ar.objective import next_token_loss
from perceiver_ar.windows import Schedule

__all__ = ["AutoregressiveWrapper", "PerceiverAR", "load_lucidrains"]


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
            max_seq_len: context length; rows of the position table.
            cross_attn_seq_len: prefix length, below max_seq_len.
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
        self.rotary_dim = max(32, dim_head // 2) if dim_head >= 32 else dim_head // 2 * 2
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
            **rotary_settings(self.rotary_dim, dim_head),
            attention_dropout=dropout,
            mlp_dropout=dropout,
            prefix_dropout=cross_attn_dropout,
        )
        self.model = network.PerceiverAR(config)
        use_package_names(self)

    def forward(
        self,
        x: Tensor,
        prefix_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        ignore_index: int = 0,
        prefix_keep: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, N, num_tokens) of the positions from cross_attn_seq_len on, or the loss if labels are given.

        Args:
            x: (B, T) ids, 1 <= T <= max_seq_len.
            prefix_mask: (B, up to T) bool, True where the cross-attention may read a key; a short one is extended with
                True. One that is longer than the prefix also hides latent positions, but from cross-attention only, as
                in the package.
            labels: (B, T) the next id of every position; those before cross_attn_seq_len are not used.
            ignore_index: the label that is no target. The package ignores label 0.
            prefix_keep: as in `perceiver_ar.PerceiverAR.forward`, to fix what prefix dropout keeps.
        """
        B, T = x.shape[0], x.shape[-1]
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

        The prefix stays at cross_attn_seq_len tokens while latents grow to fill max_seq_len, over a cache; then the
        window slides by one token at a time, and all latents are recomputed for each (`perceiver_ar.stream` is far
        faster then). Draws come from torch's global generator, one per row and step, as in the package.

        Args:
            eos_token: when every row has drawn it, sampling ends, and everything after it in a row becomes pad_value.
            temperature: 0 is greedy.
            filter_thres: only the int((1 - filter_thres) * num_tokens) most likely ids, and at least one, can be drawn.

        Raises:
            InputError: start tokens that are no rows of ids, or a temperature below 0.
        """
        model, shape = self.net.model, tuple(start_tokens.shape)
        require(len(shape) == 2, f"start_tokens have shape {shape}: they must be (batch, length)")
        Sampling(temperature)  # raises InputError if it is invalid
        out = torch.stack(prompt_rows(start_tokens, model.config.vocab_size))
        n = out.shape[1]
        decoder: Decoder | None = None
        with evaluation_mode(self.net.modules()):
            for _ in range(seq_len):
                if not kwargs and self.net.cross_attn_seq_len < out.shape[1] <= self.max_seq_len:
                    if decoder is None:  # all tokens after the prefix are latents
                        schedule = Schedule(prompt_latents=out.shape[1] - self.net.cross_attn_seq_len)
                        rows = [Row(r, row, model.config, RowSettings(schedule=schedule)) for r, row in enumerate(out)]
                        decoder = Decoder(model, rows, 1, self.max_seq_len - out.shape[1])
                    else:
                        decoder.add(out[:, -1].tolist())
                    logits = decoder.next_logits()
                else:
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


def load_lucidrains(
    path: str | Path, *, cross_attn_seq_len: int | None = None, heads: int | None = None
) -> network.PerceiverAR:
    """The network in a checkpoint of `perceiver-ar-pytorch`, in evaluation mode.

    Args:
        path: what `torch.save` or safetensors wrote: a state dict of PerceiverAR or AutoregressiveWrapper, alone or
            somewhere in a training checkpoint, with any prefix before its names. Tensors beside it that are not of the
            network are left out, and a warning names them.
        cross_attn_seq_len: the prefix length, which the weights do not tell.
        heads: attention heads; only needed if the weights leave a choice (512 may be 8 heads of 64 or 16 of 32).

    Raises:
        InputError: the file is missing, damaged, of another kind or only readable by running code in it, or one of
            these arguments is needed.
    """
    return read(Path(path), cross_attn_seq_len, heads)[0]


def read(path: Path, cross_attn_seq_len: int | None, heads: int | None) -> tuple[network.PerceiverAR, Codec | None]:
    """The network, and the codec if the vocabulary is that of single bytes."""
    state = find_state(read_torch(path), "token_emb.weight", "perceiver-ar-pytorch", str(path))
    net = PerceiverAR(**package_arguments(state, cross_attn_seq_len, heads, str(path)))
    state.pop(INV_FREQ, None)
    net.model.load_tensors(to_ours(names(net.model), state, str(path)), where=str(path))
    return net.model.eval(), BytesCodec(text=False) if net.model.config.vocab_size == 256 else None


def package_arguments(
    state: dict[str, Tensor], cross_attn_seq_len: int | None, heads: int | None, where: str
) -> dict[str, Any]:
    """The constructor's arguments, from the weights. Raises InputError if an argument that is None must be given."""

    def shape(name: str, axis: int) -> int:
        if name not in state or state[name].ndim != 2:
            raise InputError(f"{where} has no matrix {name}, so it is not of perceiver-ar-pytorch")
        return state[name].shape[axis]

    inner, dim = shape("perceive_layers.0.0.to_q.weight", 0), shape("token_emb.weight", 1)
    length, hidden = shape("pos_emb.weight", 0), shape("perceive_layers.0.1.1.weight", 0)
    bands = state[INV_FREQ].numel() if INV_FREQ in state else None
    possible = [
        inner // width
        for width in range(32, inner + 1)
        if inner % width == 0 and bands in (None, (max(32, width // 2) + 1) // 2)
    ]
    if not possible:
        raise InputError(
            f"{where} is damaged: no number of heads goes with {inner} rows and {bands} rotary frequencies"
        )
    asked = []
    if heads is None and len(possible) == 1:
        heads = possible[0]
    if heads is None:
        asked.append(f"heads (one of {', '.join(map(str, reversed(possible)))})")
    elif heads not in possible:
        raise InputError(f"{where}: heads is {heads}, its weights allow {', '.join(map(str, reversed(possible)))}")
    if cross_attn_seq_len is None:
        asked.append(f"cross_attn_seq_len (the prefix length, below its max_seq_len {length})")
    if heads is None or cross_attn_seq_len is None:
        raise InputError(f"{where} does not tell everything: give {' and '.join(asked)}")
    return {
        "num_tokens": shape("token_emb.weight", 0),
        "dim": dim,
        "depth": sum(name.startswith("layers.") and name.endswith(".0.to_qkv.weight") for name in state),
        "max_seq_len": length,
        "cross_attn_seq_len": cross_attn_seq_len,
        "dim_head": inner // heads,
        "heads": heads,
        "ff_mult": hidden / dim if hidden % dim == 0 else (hidden + 0.5) / dim,  # the package rounds down
        "perceive_depth": sum(
            name.startswith("perceive_layers.") and name.endswith(".0.to_q.weight") for name in state
        ),
    }


def save_lucidrains(model: network.PerceiverAR, file: str | Path) -> dict[str, Any]:
    """Writes the package's state dict with `torch.save`; returns the constructor's arguments for it.
    Raises InputError, naming settings, if the package has no arguments for this function.
    """
    config = model.config
    arguments = {
        "num_tokens": config.vocab_size,
        "dim": config.dim,
        "depth": config.num_layers,
        "max_seq_len": config.context_length,
        "cross_attn_seq_len": config.context_length - config.num_latents,
        "dim_head": config.width_head,
        "heads": config.num_heads,
        "cross_attn_dropout": config.prefix_dropout,
        "ff_mult": int(config.mlp_ratio) if config.mlp_ratio % 1 == 0 else config.mlp_ratio,
        "perceive_depth": len(config.cross_layers),
    }
    require(config.width_head >= 32, f"heads of {config.width_head} channels: perceiver-ar-pytorch needs 32 or more")
    net = PerceiverAR(**arguments)
    refuse_differences(config, net.model.config, "perceiver-ar-pytorch")
    net.model.load_state_dict(plain_tensors(model))
    with atomic_path(file) as temporary, open(temporary, "wb") as stream:  # a stream: no file name goes into the file
        torch.save(net.state_dict(), stream)
    return arguments
