"""The parameter names of perceiver-ar-pytorch, under which the drop-in class saves and loads."""

import re
from typing import Any

from torch import Tensor

from perceiver_ar.compat.weights import inverse_frequencies
from perceiver_ar.config import PerceiverARConfig

INV_FREQ = "rotary_pos_emb.inv_freq"
"""A buffer of the package, which is computed from the settings here."""


def use_package_names(net: Any) -> None:
    """Makes `net`, which holds our network as `model` and its `rotary_dim`, save and load under the package's names."""
    net.loading = ("", [])  # set and read by the next two: prefix, and torch's errors
    net.register_state_dict_post_hook(_to_package_names)
    net.register_load_state_dict_pre_hook(_from_package_names)
    net.register_load_state_dict_post_hook(_say_package_names)


def package_names(config: PerceiverARConfig) -> dict[str, str]:
    """The package's parameter names -> ours, in the package's order."""
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


def _modules(net: Any) -> dict[str, str]:
    """Our modules by the package's names."""
    root = "model._orig_mod" if hasattr(net.model, "_orig_mod") else "model"  # of torch.compile
    names = package_names(net.model.config)
    return {theirs.rpartition(".")[0]: f"{root}.{ours.rpartition('.')[0]}" for theirs, ours in names.items()}


def _renamed(name: str, modules: dict[str, str]) -> str:
    """The name of a tensor with its module renamed, even if torch parametrizes or prunes the tensor.

    Other additions to a module, such as peft's adapters, keep the names that their libraries look for.
    """
    module = name.partition(".parametrizations.")[0]
    module = name.rpartition(".")[0] if module == name else module
    return modules[module] + name.removeprefix(module) if module in modules else name


def _to_package_names(net: Any, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    modules = {ours: theirs for theirs, ours in _modules(net).items()}
    for name in [name.removeprefix(prefix) for name in state if name.startswith(f"{prefix}model.")]:
        theirs = _renamed(name, modules)
        if not theirs.startswith(("token_emb.", "pos_emb.")):
            state.setdefault(prefix + INV_FREQ, inverse_frequencies(net.rotary_dim))
        state[prefix + theirs] = state.pop(prefix + name)


def _from_package_names(net: Any, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    modules, errors = _modules(net), others[-1]
    frequencies, expected = state.pop(prefix + INV_FREQ, None), inverse_frequencies(net.rotary_dim)
    if frequencies is not None and frequencies.shape != expected.shape:
        errors.append(
            f"size mismatch for {prefix}{INV_FREQ}: {tuple(frequencies.shape)} in the checkpoint, "
            f"{tuple(expected.shape)} for dim_head {net.model.config.width_head}."
        )
    for name in [name.removeprefix(prefix) for name in state if name.startswith(prefix)]:
        state[prefix + _renamed(name, modules)] = state.pop(prefix + name)
    net.loading = prefix, errors


def _say_package_names(net: Any, incompatible: Any) -> None:
    """After loading: puts the package's names into the lists of missing, unexpected and misshaped tensors."""
    (prefix, errors), net.loading = net.loading, ("", [])
    modules = {ours: theirs for theirs, ours in _modules(net).items()}
    ours = re.compile(rf"(?<![\w.]){re.escape(prefix)}(model\.[\w.]+)")
    for texts in (incompatible.missing_keys, incompatible.unexpected_keys, errors):
        texts[:] = [ours.sub(lambda found: prefix + _renamed(found[1], modules), text) for text in texts]
