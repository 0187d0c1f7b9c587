"""Checkpoints of `perceiver-io` (krasserm): its causal language model and its symbolic audio model, in and out.

    from perceiver_ar.compat import load_krasserm

The function of weights and tokens is the same, with one exception: if left padding reaches the latents, the package
lets padded latents read every key, future ones included, and later latents read those; ours never does.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from perceiver_ar.compat.checkpoint_files import existing, listed, read_torch
from perceiver_ar.compat.weights import (
    Weight,
    find_names,
    find_state,
    inverse_frequencies,
    plain_tensors,
    refuse_differences,
    rotary_settings,
    rotated_channels,
    to_ours,
    to_theirs,
)
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.text import OffsetBytesCodec
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path, write_text
from perceiver_ar.network.model import PerceiverAR

MARKER = "input_adapter.txt_embedding.weight"
INV_FREQ = "input_adapter.frq_pos_encoding.inv_freq"
SETTINGS: dict[str, tuple[str, Any]] = {  # the package's -> ours, and the package's default; None: required
    "vocab_size": ("vocab_size", None),
    "max_seq_len": ("context_length", None),
    "max_latents": ("num_latents", None),
    "num_channels": ("dim", None),
    "num_heads": ("num_heads", 8),
    "num_self_attention_layers": ("num_layers", 8),
    "num_self_attention_rotary_layers": ("rotary_layers", 1),
    "self_attention_widening_factor": ("mlp_ratio", 4),
    "cross_attention_widening_factor": ("cross_mlp_ratio", 4),
    "cross_attention_dropout": ("prefix_dropout", 0.5),
    "output_norm": ("final_norm", False),
    "output_bias": ("logits_bias", True),
    "abs_pos_emb": ("position_table", True),
}
WITHOUT_EFFECT = {  # on the function of weights and tokens
    "activation_checkpointing": False,
    "activation_offloading": False,
    "init_scale": 0.02,
    "max_heads_parallel": None,
    "post_attention_dropout": 0.0,
    "residual_dropout": 0.0,
}


def load_krasserm(path: str | Path) -> PerceiverAR:
    """The network in a checkpoint of `perceiver-io`, in evaluation mode; everything is read from the files.

    Args:
        path: a directory of `save_pretrained` (config.json with pytorch_model.bin or model.safetensors), or a Lightning
            checkpoint (.ckpt). Dropouts but that of the prefix are not taken over: they are settings of training.

    Raises:
        InputError: the file is missing, damaged, of another kind, or only readable by running code in it.
    """
    return read(Path(path))[0]


def read(path: Path) -> tuple[PerceiverAR, Codec | None]:
    """The network, and the codec if the checkpoint states that its tokens are bytes."""
    existing(path)
    if path.is_dir() or path.name in ("pytorch_model.bin", "model.safetensors", "config.json"):
        directory = path if path.is_dir() else path.parent
        about = read_config(directory / "config.json")
        files = [directory / name for name in ("model.safetensors", "pytorch_model.bin") if (directory / name).exists()]
        if not files:
            shards = any(directory.glob("*-of-*"))
            remedy = "save them again in one file, not in shards" if shards else "get the weights, too"
            raise InputError(f"{directory} has neither model.safetensors nor pytorch_model.bin: {remedy}")
        weights = files[0]
        content = read_torch(weights)
        settings, tokenizer = about["model_config"], about.get("tokenizer_class")
    else:
        weights = path
        content = read_torch(path, stand_ins="perceiver")
        settings = content.get("hyper_parameters") if isinstance(content, Mapping) else None
        if not isinstance(settings, Mapping):
            raise InputError(f"{path} is no Lightning checkpoint (no hyper_parameters): give one, or a directory")
        data = content.get("datamodule_hyper_parameters")
        tokenizer = data.get("tokenizer") if isinstance(data, Mapping) else None
    model = network(find_state(content, MARKER, "perceiver-io", str(weights)), settings, str(weights))
    is_bytes = tokenizer in ("PerceiverTokenizer", "deepmind/language-perceiver") and model.config.vocab_size == 262
    return model, OffsetBytesCodec(reserved=6) if is_bytes else None


def network(state: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> PerceiverAR:
    """The network of the package's parameters and buffers, by name."""
    config = to_config(settings, where)
    bands = rotated_channels(config, config.width_head) // 2
    if INV_FREQ in state and state[INV_FREQ].numel() != bands:
        raise InputError(f"{where}: {INV_FREQ} has {state[INV_FREQ].numel()} frequencies, its settings ask for {bands}")
    # The output layer is the embedding; some ways of saving store it under both names.
    head, embedding = state.get("output_adapter.weight"), state.get("input_adapter.txt_embedding.weight")
    if head is not None and embedding is not None:
        require(torch.equal(head, embedding), f"{where}: output_adapter.weight is not the embedding")
    weights = {name: tensor for name, tensor in state.items() if name not in (INV_FREQ, "output_adapter.weight")}
    model = PerceiverAR(config)
    model.load_tensors(to_ours(names(model), weights, where), where=where)
    return model.eval()


def read_config(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(existing(file).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged ({error}): get it again") from None
    if not isinstance(about, dict) or not isinstance(about.get("model_config"), dict):
        kind = about.get("model_type") if isinstance(about, dict) else None
        raise InputError(f"{file} is not of perceiver-io (model_type {kind!r}, no model_config)")
    return about


def to_config(settings: Mapping[str, Any], where: str = "the settings") -> PerceiverARConfig:
    """Our settings for the package's."""
    of = {name: settings.get(name, default) for name, (_, default) in SETTINGS.items()}
    if missing := [name for name, value in of.items() if value is None]:
        raise InputError(f"{where} does not say {listed(missing)}: it is not of perceiver-io's causal sequence model")
    ours = {own: of[name] for name, (own, _) in SETTINGS.items()}
    ours["position_table"] = "learned" if of["abs_pos_emb"] else "none"
    if ours["rotary_layers"] == -1:
        ours["rotary_layers"] = None
    try:
        config = PerceiverARConfig.preset("krasserm", **ours)
        C = config.width_head
        require(
            of["abs_pos_emb"] or C % 2 == 0,
            f"heads of {C} channels without abs_pos_emb: perceiver-io fails on an odd number",
        )
        return config.replace(**rotary_settings(rotated(config), C))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def rotated(config: PerceiverARConfig) -> int:
    """Rotated channels of a head by the package's settings; if the number is odd, it rotates one more."""
    return config.width_head // 2 if config.position_table == "learned" else config.width_head


def names(model: PerceiverAR) -> list[Weight]:
    """Which of the package's parameters make up each of ours."""
    modules = {
        "embed": "input_adapter.txt_embedding",
        "position_embed.0": "input_adapter.pos_embedding",
        "norm": "out_norm",
        "head": "output_adapter",
    }
    parts = {f"{letter}_proj": f"0.module.attention.{letter}_proj" for letter in "qkv"}
    parts |= {"out_proj": "0.module.attention.o_proj", "norm": "0.module.norm"}
    parts |= {"query_norm": "0.module.q_norm", "context_norm": "0.module.kv_norm"}
    parts |= {"mlp.norm": "1.module.0", "mlp.up_proj": "1.module.1", "mlp.down_proj": "1.module.3"}
    layers = {"cross_attention.0": "cross_attention"}
    layers |= {f"self_attention.{i}": f"self_attention.{i}" for i in range(model.config.num_layers)}
    for layer, theirs in layers.items():
        modules |= {f"{layer}.{name}": f"{theirs}.{part}" for name, part in parts.items()}
    return find_names(model, modules)


def save_krasserm(model: PerceiverAR, directory: str | Path, codec: Codec | None = None) -> dict[str, Any]:
    """Writes config.json and model.safetensors for the package's `from_pretrained`; returns the former.

    codec: of the ids; None: the package's tokenizer of bytes if there are 262 ids, else unknown.

    Raises InputError, naming settings of ours, if the package has none for this function.
    """
    config = model.config
    theirs = {name: getattr(config, ours) for name, (ours, _) in SETTINGS.items()} | WITHOUT_EFFECT
    theirs |= {
        "num_self_attention_rotary_layers": -1 if config.rotary_layers is None else config.rotary_layers,
        "self_attention_widening_factor": int(config.mlp_ratio),
        "cross_attention_widening_factor": int(config.cross_mlp_ratio or config.mlp_ratio),
        "abs_pos_emb": config.position_table == "learned",
    }
    refuse_differences(config, to_config(theirs), "perceiver-io")
    tensors = plain_tensors(model)
    state = to_theirs(names(model), tensors)
    state[INV_FREQ] = inverse_frequencies(rotated(config))
    about = {
        "architectures": ["PerceiverCausalLanguageModel"],
        "is_decoder": True,
        "model_config": theirs,
        "model_type": "perceiver-ar-causal-language-model",
        "torch_dtype": "float32",
    }
    if config.vocab_size == 262 and (codec is None or isinstance(codec, OffsetBytesCodec)):
        about["tokenizer_class"] = "PerceiverTokenizer"
    with atomic_path(Path(directory) / "model.safetensors") as temporary:
        save_file({f"backend_model.{name}": x.clone() for name, x in state.items()}, temporary, {"format": "pt"})
    write_text(Path(directory) / "config.json", json.dumps(about, indent=2, sort_keys=True) + "\n")
    return about
