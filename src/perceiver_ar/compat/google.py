"""Checkpoints of google-research/perceiver-ar, the authors' JAX code: its weights in our network.

    from perceiver_ar.compat import load_google

Their rows end at the first token 0, so padding trails; ours may be padded anywhere and know no special token:
`from_trailing_zeros` turns their inputs into ours.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perceiver_ar.compat.checkpoint_files import existing, read_dill, read_npz
from perceiver_ar.compat.weights import Weight, find_names, say_left_out, to_ours
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.text import OffsetBytesCodec
from perceiver_ar.errors import InputError, require
from perceiver_ar.network.init import sinusoids
from perceiver_ar.network.model import PerceiverAR

DEFAULTS: dict[str, Any] = {
    # Settings that weights do not tell, with the defaults of their experiment.get_config; None: must be given.
    "max_context_length": None,
    "z_index_dim": None,
    "num_cross_attend_heads": None,
    "num_transformer_heads": None,
    "activation_name": "sq_relu",
    "additional_cross_attend_after_layers": None,
    "encoder_use_query_residual": True,
    "fraction_heads_to_rotate": 1.0,
    "fraction_to_rotate": 0.5,
    "include_initial_cross_attention": True,
    "initial_query_embed_activation_name": "sq_relu",
    "initial_query_offsetting": False,
    "mask_style": "final_block",
    "max_wavelength": None,  # max_context_length
    "use_negative_rotary_positions": False,
    "use_positions_from_data": True,
}
HEADS = {"num_cross_attend_heads": 16, "num_transformer_heads": 16}
RELEASED: dict[str, dict[str, Any]] = {
    # The released experiments, by their names; sizes are in the weights.
    "random_mirrored_32": {"max_context_length": 32, "z_index_dim": 16, **HEADS},
    "random_mirrored_131072": {"max_context_length": 131_072, "z_index_dim": 1024, **HEADS},
    "imagenet_w_positions": {"max_context_length": 12_416, "z_index_dim": 1024, **HEADS},
}
IN_THE_WEIGHTS = {  # or without effect on the function of weights and tokens
    *("cross_attend_widening_factor", "transformer_widening_factor", "cross_attention_shape_for_attn"),
    *("input_embed_dim", "input_idx_size", "num_classes", "num_z_channels", "num_transformers_per_block"),
    *("initial_query_embed_num_layers", "initial_query_embed_style", "share_learned_initial_query"),
    *("num_latents_per_position", "position_encoding", "position_encoding_type", "learnable_position_embeddings"),
    *("chunked_cross_attention", "chunked_cross_key_size", "chunked_cross_query_size", "concat_pos"),
    *("cross_attention_head_group_size", "dropout_prob", "encoder_dropout_prob", "latent_dropout_prob"),
    *("experiment", "final_layer_init_zeros", "train_input_positions", "z_pos_enc_init_scale"),
}
ACTIVATIONS = {"sq_relu": "relu2", "gelu": "gelu_tanh", "relu": "relu"}
ROOT = "perceiver_ar/~/"
ENDS = {nn.Embedding: ("", ""), nn.LayerNorm: ("/scale", "/offset"), nn.Linear: ("/w", "/b")}
"""Of their names, for weight and bias of our modules."""


def load_google(path: str | Path, settings: str | Path | Mapping[str, Any] | None = None, **more: Any) -> PerceiverAR:
    """The network in a checkpoint of google-research/perceiver-ar, in evaluation mode.

    Args:
        path: checkpoint.dill, or the directory it is in; or a .npz of its params, an array for each "module/name".
        settings: keyword arguments of their PerceiverAR, which checkpoints do not hold: a name in `RELEASED`, a JSON
            file, or a mapping. Sizes are read from the weights.
        more: single arguments, which take precedence.

    Raises:
        InputError: the file is missing, damaged, of another kind or only readable by running code in it, or settings
            are missing.
    """
    return read(Path(path), settings, **more)[0]


def read(path: Path, settings: str | Path | Mapping[str, Any] | None, **more: Any) -> tuple[PerceiverAR, Codec | None]:
    """The network, and the codec if the vocabulary is that of their bytes."""
    path = existing(path) / "checkpoint.dill" if path.is_dir() else path
    given = read_settings(settings) | {name: value for name, value in more.items() if value is not None}
    model = network(read_params(path), given, str(path))
    is_bytes = model.config.vocab_size == 259 and len(model.config.table_sizes) <= 1
    return model, OffsetBytesCodec(reserved=3, start_id=2) if is_bytes else None


def network(params: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> PerceiverAR:
    """The network for their parameters, by "module/name" in torch's layout, and their keyword arguments."""
    try:
        config = to_config(params, settings, where)
    except (LookupError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{where}: its weights and settings are not of their PerceiverAR ({error!r})") from None
    if len(config.table_sizes) == 1 and not config.positions_from_end:
        # Positions from the data start at 1, ours at 0: row 0 is for padding, which no query sees.
        params = {**params, **{name: params[name][1:] for name in table_names(params)}}
    model = PerceiverAR(config)
    model.load_tensors(to_ours(names(model), params, where), where=where)
    return model.eval()


def read_params(path: Path) -> dict[str, Tensor]:
    """Weights by "module/name"; those of linear layers transposed, as torch has them."""
    if path.suffix == ".npz":
        flat: dict[str, Any] = dict(read_npz(path))
    else:
        content = read_dill(path)
        params = content.get("params") if isinstance(content, Mapping) else None
        if not isinstance(params, Mapping) or not all(isinstance(group, Mapping) for group in params.values()):
            raise InputError(f"{path} has no params of haiku modules: it is not of google-research/perceiver-ar")
        flat = {f"{module}/{name}": array.value if hasattr(array, "value") else array
                for module, group in params.items() for name, array in group.items()}  # fmt: skip
    others = [name for name in flat if not name.startswith("perceiver_ar/")]
    flat = {name: array for name, array in flat.items() if name not in others}
    if wrong := [name for name, array in flat.items() if not isinstance(array, np.ndarray) or array.dtype.kind != "f"]:
        raise InputError(f"{path}: {wrong[0]} is no array of numbers")
    if any(name not in flat or flat[name].ndim != 2 for name in (f"{ROOT}embed/embeddings", f"{ROOT}logits/w")):
        raise InputError(f"{path} has no {ROOT}embed or {ROOT}logits: it is not of google-research/perceiver-ar")
    say_left_out(others, str(path))
    tensors = {
        name: torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False)) for name, array in flat.items()
    }
    return {name: tensor.T if name.endswith("/w") else tensor for name, tensor in tensors.items()}


def read_settings(settings: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    if settings is None:
        return {}
    if isinstance(settings, str | Path):
        if str(settings) in RELEASED:
            return dict(RELEASED[str(settings)])
        if not Path(settings).exists():
            raise InputError(f"settings {settings}: no such file, and no experiment of {', '.join(RELEASED)}")
        try:
            settings = json.loads(Path(settings).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"settings {settings} is damaged ({error})") from None
        if not isinstance(settings, dict):
            raise InputError("settings are no JSON object: give one with the arguments of their PerceiverAR")
    flat = dict(settings)
    own = flat.pop("perceiver_ar_kwargs", {})
    if not isinstance(own, Mapping):
        raise InputError(f"settings have perceiver_ar_kwargs {own!r}: give a JSON object of arguments")
    return {**flat, **own}


def numbered(module: str, i: int) -> str:
    """The name of their module number i of this kind."""
    return f"{module}_{i}" if i else module


def modules_with(params: Mapping[str, Tensor], module: str, rest: str) -> list[str]:
    """Their modules `module`, `module`_1, ... that have a parameter `rest`, in that order."""
    found = [re.fullmatch(rf"{re.escape(ROOT + module)}(?:_(\d+))?/{re.escape(rest)}", name) for name in params]
    return [numbered(ROOT + module, i) for i in sorted(int(m[1] or 0) for m in found if m)]


def table_names(params: Mapping[str, Tensor]) -> list[str]:
    return [f"{module}/embeddings" for module in modules_with(params, "embed", "embeddings")[1:]]


def to_config(params: Mapping[str, Tensor], given: Mapping[str, Any], where: str) -> PerceiverARConfig:
    """Our settings for these weights and their keyword arguments."""
    if unknown := sorted(set(given) - set(DEFAULTS) - IN_THE_WEIGHTS):
        raise InputError(f"{', '.join(unknown)}: no argument of google-research/perceiver-ar's PerceiverAR")
    of = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    own = modules_with(params, "self_attention", "attention/linear/w")
    cross = modules_with(params, "cross_attention", "attention/linear/w")
    queries = modules_with(params, "linear", "w")
    learned = params.get("perceiver_ar/q_embed_learned")
    if learned is not None and len(learned) > 1:
        of["z_index_dim"] = len(learned)
    needed = ["max_context_length", "z_index_dim"]
    needed += ["num_cross_attend_heads"] * bool(cross) + ["num_transformer_heads"] * bool(own)
    more = len(cross) - of["include_initial_cross_attention"]
    if more > 0:
        needed.append("additional_cross_attend_after_layers")
    if missing := [name for name in needed if of[name] is None]:
        raise InputError(
            f"{where} does not tell {', '.join(missing)}: give them, or settings (a JSON file or {', '.join(RELEASED)})"
        )
    after = sorted(of["additional_cross_attend_after_layers"] or ())
    if len(after) != max(more, 0):
        raise InputError(f"{where} has {len(cross)} cross-attention layers, not {len(after)} additional ones")
    activation_names = ["activation_name"] + ["initial_query_embed_activation_name"] * (len(queries) > 1)
    for name in activation_names:
        require(of[name] in ACTIVATIONS, f"{name} is {of[name]!r}: only {', '.join(ACTIVATIONS)} are computed here")
    activation, *query_activation = [ACTIVATIONS[of[name]] for name in activation_names]
    require(of["mask_style"] == "final_block", f"mask_style is {of['mask_style']!r}: only 'final_block' is supported")

    V, E = params[f"{ROOT}embed/embeddings"].shape
    D = params[f"{ROOT}logits/w"].shape[1]
    K = len(params.get(f"{ROOT}z_pos_enc/pos_embs", [0]))
    tables = [params[name] for name in table_names(params)]
    from_end = not of["use_positions_from_data"] and not (of["use_negative_rotary_positions"] and not tables)
    sizes = tuple(len(table) for table in tables)
    if len(sizes) == 1 and not from_end:
        sizes = (sizes[0] - 1,)
    fixed = E % 2 == 0 and all(torch.allclose(table, sinusoids(len(table), E), atol=1e-3) for table in tables)
    heads = of["num_cross_attend_heads"]
    for name in ("num_cross_attend_heads", "num_transformer_heads"):
        require(of[name] != 0, f"{name} is 0: it must be at least 1")
    if cross:
        width = len(params[f"{cross[0]}/attention/linear/w"])
        require(width % heads == 0, f"num_cross_attend_heads is {heads}: it does not divide {where}'s width {width}")

    def ratio(modules: list[str]) -> float | None:
        return len(params[f"{modules[0]}/dense/linear/w"]) / D if modules else None

    offset = bool(of["initial_query_offsetting"])
    try:
        return PerceiverARConfig.preset(
            "paper",
            vocab_size=V,
            context_length=of["max_context_length"],
            num_latents=of["z_index_dim"] // K,
            dim=D,
            num_layers=len(own),
            num_heads=of["num_transformer_heads"] or 1,
            mlp_ratio=ratio(own) or ratio(cross) or 1.0,
            cross_layers=(0,) * (len(cross) - len(after)) + tuple(i + 1 for i in after),
            activation=activation,
            query_residual=of["encoder_use_query_residual"],
            query_proj=learned is None,
            query_mlp_layers=max(0, len(queries) - 1),
            query_mlp_activation=next((name for name in query_activation if name != activation), None),
            learned_queries="none" if learned is None else "shared" if len(learned) == 1 else "each",
            latents_per_position=K,
            embed_dim=None if E == D else E,
            cross_num_heads=heads if cross else None,
            cross_head_dim=width // heads if cross else None,
            cross_mlp_ratio=ratio(cross),
            rotary=not tables,
            rotary_fraction=of["fraction_to_rotate"],
            rotary_heads_fraction=of["fraction_heads_to_rotate"],
            rotary_base=float((of["max_wavelength"] or of["max_context_length"]) + offset),
            position_table="none" if not tables else "sinusoidal" if fixed else "learned",
            index_dims=() if sizes in ((), (of["max_context_length"],)) else sizes,
            positions_from_end=from_end,
            query_position_offset=int(offset),
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def names(model: PerceiverAR) -> list[Weight]:
    """Which of their parameters make up each of ours."""
    config = model.config
    modules = {
        "embed": f"{ROOT}embed/embeddings",
        # The layers of the query's MLP are made before its projection.
        "query_proj": numbered(f"{ROOT}linear", config.query_mlp_layers),
        "query_embed": "perceiver_ar/q_embed_learned",
        "latent_embed": f"{ROOT}z_pos_enc/pos_embs",
        "norm": "perceiver_ar/layer_norm",
        "head": f"{ROOT}logits",
    }
    modules |= {f"position_embed.{i}": f"{ROOT}embed_{i + 1}/embeddings" for i in range(len(config.table_sizes))}
    modules |= {f"query_mlp.{i}": numbered(f"{ROOT}linear", i) for i in range(config.query_mlp_layers)}
    norms = {"cross_attention": ("query_norm", "context_norm", "mlp.norm"), "self_attention": ("norm", "mlp.norm")}
    for kind, count in {"cross_attention": len(config.cross_layers), "self_attention": config.num_layers}.items():
        for i in range(count):
            parts = {f"{name}_proj": numbered("attention/linear", j) for j, name in enumerate(("q", "k", "v", "out"))}
            parts |= {name: numbered("layer_norm", j) for j, name in enumerate(norms[kind])}
            parts |= {"mlp.up_proj": "dense/linear", "mlp.down_proj": "dense/linear_1"}
            layer = numbered(f"{ROOT}{kind}", i)
            modules |= {f"{kind}.{i}.{ours}": f"{layer}/{theirs}" for ours, theirs in parts.items()}
    return find_names(model, modules, ENDS)


def from_trailing_zeros(tokens: Tensor, input_idxs: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Their inputs as arguments of our `forward`: tokens (B, T), mask (B, T), positions.

    Rows end at their first 0. The rest of a row becomes padding in front of it, so that all rows end together.

    Args:
        tokens: (B, T) ids.
        input_idxs: (B, T, axes) their positions, for a model with `use_positions_from_data`. A single axis counts from
            1, ours from 0; several axes stay as they are. None: positions are None, and real tokens are counted.
    """
    T = tokens.shape[1]
    lengths = (tokens == 0).int().cummax(1).values.eq(0).sum(1)
    source = torch.arange(T, device=tokens.device) - (T - lengths[:, None])
    mask, source = source >= 0, source.clamp(min=0)
    positions = None
    if input_idxs is not None:
        positions = input_idxs.gather(1, source[..., None].expand(-1, -1, input_idxs.shape[-1]))
        positions = positions if positions.shape[-1] > 1 else (positions[..., 0] - 1).clamp(min=0)
    return tokens.gather(1, source).masked_fill(~mask, 0), mask, positions
