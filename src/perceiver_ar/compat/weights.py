"""The weights of other implementations by our names, and ours by theirs."""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceiver_ar.compat.checkpoint_files import listed
from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError, require
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.network.weights import REPLACED, check_plain


class Weight(NamedTuple):
    """One parameter of ours, and the parameters of theirs that it holds, concatenated along the first axis."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[Tensor | None, ...]
    """For each of `theirs`, the order in which its rows are taken; None: unchanged."""


def to_ours(weights: Iterable[Weight], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Their tensors under our names. Raises InputError that lists missing and unknown ones by their names.

    Warns of unknown integers: they are counters, not weights.
    """
    weights = list(weights)
    expected = [name for weight in weights for name in weight.theirs]
    missing = [name for name in expected if name not in tensors]
    others = sorted(set(tensors) - set(expected))
    counters = [name for name in others if not tensors[name].is_floating_point()]
    unknown = [name for name in others if name not in counters]
    if missing or unknown:
        parts = [f"{what}: {listed(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
        raise InputError(f"{where} does not hold the weights that its settings ask for: {'; '.join(parts)}")
    say_left_out(counters, where)
    ours = {}
    for weight in weights:
        parts = []
        for name, order in zip(weight.theirs, weight.rows, strict=True):
            tensor = tensors[name]
            if not tensor.is_floating_point():
                raise InputError(f"{where}: {name} is of {tensor.dtype}: weights must be floating-point numbers")
            if order is not None and len(tensor) != len(order):
                raise InputError(f"{where}: {name} has {len(tensor)} rows, its settings ask for {len(order)}")
            parts.append(tensor if order is None else tensor[order])
        if len({part.shape[1:] for part in parts}) != 1:
            raise InputError(f"{where}: {' and '.join(weight.theirs)} have different widths")
        ours[weight.ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ours


def find_names(
    model: PerceiverAR,
    modules: Mapping[str, str],
    ends: Mapping[type, tuple[str, str]] | None = None,
    fused: bool = False,
) -> list[Weight]:
    """Which of their parameters make up each of ours.

    Args:
        modules: names of our modules -> of theirs; unless `fused`, with q_proj, k_proj and v_proj for each attention.
        ends: of the names of their parameters in place of .weight and .bias, for each kind of our modules.
        fused: they project and rotate queries, keys and values as we do; else separately, and see `from_interleaved`.
    """
    config, weights = model.config, []
    for name in model.stored_tensors():
        module, _, part = name.rpartition(".")
        layer, _, projection = module.rpartition(".")
        theirs: list[str] = [module]
        rows: tuple[Tensor | None, ...] = (None,)
        if projection in ("q_proj", "kv_proj", "qkv_proj") and not fused:
            letters, heads, channels = projection.removesuffix("_proj"), config.num_heads, config.width_head
            if layer.startswith("cross_attention"):
                heads, channels = config.heads_cross, config.width_head_cross
            order = from_interleaved(heads, channels, rotated_channels(config, channels))
            theirs = [f"{layer}.{letter}_proj" for letter in letters]
            rows = tuple(None if letter == "v" else order for letter in letters)
        end = f".{part}" if ends is None else ends[type(model.get_submodule(module))][part == "bias"]
        weights.append(Weight(name, tuple(modules[one] + end for one in theirs), rows))
    return weights


def plain_tensors(model: PerceiverAR) -> dict[str, Tensor]:
    """The tensors to export. Raises InputError if some weights are made of other weights."""
    tensors = model.stored_tensors()
    check_plain(tensors)
    return tensors


def to_theirs(weights: Iterable[Weight], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names: the inverse of `to_ours`."""
    theirs = {}
    for weight in weights:
        parts = tensors[weight.ours].chunk(len(weight.theirs))
        for name, part, order in zip(weight.theirs, parts, weight.rows, strict=True):
            theirs[name] = (part if order is None else part[order.argsort()]).contiguous()
    return theirs


def from_interleaved(heads: int, channels: int, rotated: int) -> Tensor:
    """The order of rows that turns their query and key projections into ours.

    They rotate the pairs (2j, 2j + 1) of each head, we (j, j + rotated / 2). Scores do not change when queries and keys
    are reordered alike.
    """
    pairs = torch.arange(rotated // 2)
    one = torch.cat([2 * pairs, 2 * pairs + 1, torch.arange(rotated, channels)])
    return (one + channels * torch.arange(heads)[:, None]).flatten()


def rotated_channels(config: PerceiverARConfig, channels: int) -> int:
    """Number of rotated channels of a head."""
    return 2 * int(config.rotary_fraction * channels / 2 + 1e-6)


def inverse_frequencies(rotated: int) -> Tensor:
    """The buffer `inv_freq` that torch implementations store."""
    return 1.0 / (10000 ** (torch.arange(0, rotated, 2).float() / rotated))


def rotary_settings(rotated: int, head_dim: int) -> dict[str, float]:
    """Our settings for `inverse_frequencies(rotated)` on heads of `head_dim` channels.

    An odd number has (rotated + 1) / 2 frequencies, so these implementations rotate one channel more.
    """
    turned = rotated + rotated % 2
    return {"rotary_fraction": turned / head_dim, "rotary_base": 10000.0 ** (turned / rotated) if rotated else 10000.0}


def refuse_differences(ours: PerceiverARConfig, theirs: PerceiverARConfig, package: str) -> None:
    """Raises InputError that names the settings by which `ours` computes another function than `theirs`."""
    one, other = (_function(config) for config in (ours, theirs))
    if different := [f"{name} is {one[name]!r}, not {other[name]!r}" for name in one if one[name] != other[name]]:
        raise InputError(f"{package} cannot compute what this model does: {', '.join(different)}")


def _function(config: PerceiverARConfig) -> dict[str, Any]:
    """The settings that the function of weights and tokens depends on, with their defaults filled in."""
    settings = dataclasses.asdict(config) | {
        "head_dim": config.width_head,
        "embed_dim": config.width_embed,
        "cross_num_heads": config.heads_cross,
        "cross_head_dim": config.width_head_cross,
        "cross_mlp_ratio": config.cross_mlp_ratio or config.mlp_ratio,
        "index_dims": config.table_sizes,
        "rotary_fraction": rotated_channels(config, config.width_head) / config.width_head,
        "rotary_base": config.context_length if config.rotary_base is None else config.rotary_base,
        "rotary_layers": config.num_layers
        if config.rotary_layers is None
        else min(config.rotary_layers, config.num_layers),
    }
    without = "prefix_chunk", "prefix_dropout", "attention_dropout", "mlp_dropout", "init", "query_mlp_activation"
    for name in without:
        del settings[name]
    return settings


class LeftOut(UserWarning):
    """Names tensors in a checkpoint that are not of the network, and are not read."""


def say_left_out(names: Sequence[str], where: str) -> None:
    if names:
        warnings.warn(f"{where}: left out {listed(names)}, not weights of the network", LeftOut, stacklevel=5)


WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Wrappers that torch.compile, FSDP and activation checkpointing put into names of modules."""


OPTIMIZER = re.compile(r"(?:^|[^a-z])optim(?:izer)?s?(?:$|[^a-z])", re.IGNORECASE)


class Found(NamedTuple):
    """A state dict in a file."""

    depth: int
    place: str
    """The keys that lead to the mapping it is in."""
    tensors: dict[str, Tensor]
    """By their names without the prefix."""
    others: list[str]
    """Names of the other tensors in the mapping."""


def find_state(content: Any, marker: str, package: str, where: str) -> dict[str, Tensor]:
    """The state dict in the content of a file of `torch.save`, without the prefix before its parameter `marker`.

    It may be the whole content or an entry, or lie deeper if no entry is one; its names may have any prefix (net.,
    module., ema_model.). Warns of tensors beside it without the prefix: a criterion, counters of an average.
    Raises InputError if it is missing, there are several, or some weights are made of other weights.
    """
    found: dict[str, Found] = {}
    mappings = list(_mappings(content))
    for depth, place, mapping in mappings:
        tensors = {WRAPPERS.sub("", str(name)): x for name, x in mapping.items() if isinstance(x, Tensor)}
        for name in tensors:
            prefix = name.removesuffix(marker)
            if f".{name}".endswith(f".{marker}") and not OPTIMIZER.search(place + prefix):
                own = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
                others = [key for key in tensors if not key.startswith(prefix)]
                found[place + name] = Found(max(depth, 1), place, own, others)
    highest = min((state.depth for state in found.values()), default=0)
    found = {name: state for name, state in found.items() if state.depth == highest}
    searched = [state.tensors for state in found.values()] or [mapping for _, _, mapping in mappings]
    if replaced := [name for names in searched for name in map(str, names) if REPLACED.search(name)]:
        raise InputError(
            f"{where} holds weights that adapters, parametrizations or pruning make of others ({listed(replaced)}): "
            "merge them where it was written, then save the state dict"
        )
    if not found and any(OPTIMIZER.search(place) or "param_groups" in mapping for _, place, mapping in mappings):
        raise InputError(f"{where} holds an optimizer's state and no {marker}: give the file with the model's weights")
    require(len(found) > 0, f"{where} has no {marker}, so it is not of {package}")
    state, *more = found.values()
    if not all(other.place == state.place and _equal(other.tensors, state.tensors) for other in more):
        raise InputError(f"{where} holds several models ({listed(list(found))}): save the one you mean alone")
    say_left_out(state.others, where)
    return state.tensors


def _mappings(content: Any) -> Iterator[tuple[int, str, Mapping[Any, Any]]]:
    """Every mapping in `content`, itself included, with its depth and the keys that lead to it."""
    waiting, seen = [(0, "", content)], set[int]()
    for depth, place, value in waiting:
        if isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            entries = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [(depth + 1, f"{place}{key}: ", entry) for key, entry in entries]
            if isinstance(value, Mapping):
                yield depth, place, value


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are equal, as those of one module under two prefixes."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
