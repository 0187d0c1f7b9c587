"""The parameter names of perceiver-ar-pytorch, under which the drop-in class saves and loads."""

import re
from typing import Any

from torch import Tensor

from perceiver_ar.compat.weights import Weight, find_names, inverse_frequencies
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.network.model import PerceiverAR

INV_FREQ = "rotary_pos_emb.inv_freq"
"""A buffer of the package, which is computed from the settings here."""


def use_package_names(net: Any) -> None:
    """Makes `net`, which holds our network as `model` and its `rotary_dim`, save and load under the package's names."""
    net.loading = ("", [])  # set and read by the next two: prefix, and torch's errors
    net.register_state_dict_post_hook(_to_package_names)
    net.register_load_state_dict_pre_hook(_from_package_names)
    net.register_load_state_dict_post_hook(_say_package_names)


def names(model: PerceiverAR) -> list[Weight]:
    """Which of the package's parameters is each of ours."""
    return find_names(model, package_modules(model.config), fused=True)


def package_modules(config: PerceiverARConfig) -> dict[str, str]:
    """The package's module for each of ours."""
    modules = {"embed": "token_emb", "position_embed.0": "pos_emb", "head": "to_logits"}
    both = {"out_proj": "0.to_out", "mlp.norm": "1.0", "mlp.up_proj": "1.1", "mlp.down_proj": "1.4"}
    cross = {"query_norm": "0.norm", "context_norm": "0.context_norm", "q_proj": "0.to_q", "kv_proj": "0.to_kv"}
    own = {"norm": "0.norm", "qkv_proj": "0.to_qkv"}
    for i in range(len(config.cross_layers)):
        modules |= {f"cross_attention.{i}.{a}": f"perceive_layers.{i}.{b}" for a, b in (cross | both).items()}
    for i in range(config.num_layers):
        modules |= {f"self_attention.{i}.{a}": f"layers.{i}.{b}" for a, b in (own | both).items()}
    return modules


def _modules(net: Any) -> dict[str, str]:
    """The package's module for each of ours, by its name in `net`."""
    root = "model._orig_mod" if hasattr(net.model, "_orig_mod") else "model"  # of torch.compile
    return {f"{root}.{ours}": theirs for ours, theirs in package_modules(net.model.config).items()}


def _renamed(name: str, modules: dict[str, str]) -> str:
    """The name of a tensor with its module renamed, even if torch parametrizes or prunes the tensor.

    Other additions to a module, such as peft's adapters, keep the names that their libraries look for.
    """
    module = name.partition(".parametrizations.")[0]
    module = name.rpartition(".")[0] if module == name else module
    return modules[module] + name.removeprefix(module) if module in modules else name


def _to_package_names(net: Any, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    modules = _modules(net)
    for name in [name.removeprefix(prefix) for name in state if name.startswith(f"{prefix}model.")]:
        theirs = _renamed(name, modules)
        if not theirs.startswith(("token_emb.", "pos_emb.")):
            state.setdefault(prefix + INV_FREQ, inverse_frequencies(net.rotary_dim))
        state[prefix + theirs] = state.pop(prefix + name)


def _from_package_names(net: Any, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    modules, errors = {theirs: ours for ours, theirs in _modules(net).items()}, others[-1]
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
    modules = _modules(net)
    ours = re.compile(rf"(?<![\w.]){re.escape(prefix)}(model\.[\w.]+)")
    for texts in (incompatible.missing_keys, incompatible.unexpected_keys, errors):
        texts[:] = [ours.sub(lambda found: prefix + _renamed(found[1], modules), text) for text in texts]
