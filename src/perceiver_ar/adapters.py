"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685), by the PEFT library: small trained additions to frozen weights.

The weight W (out, in) of a projection becomes W + B A, with A (rank, in) random and B (out, rank) zero at first. Only A
and B are trained. Runs have the sum as their weights; A and B lie beside it, as PEFT saves them.
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perceiver_ar.config import Recipe
from perceiver_ar.data.codec import Codec, importing
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path, write_text
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.network.weights import differences
from perceiver_ar.run import Run

TARGETS = ["q_proj", "qkv_proj", "out_proj", "up_proj", "down_proj"]
"""The projections that get an adapter: all of the layers but cross-attention's `kv_proj`, whose plain weights streaming
reads."""
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.network."
"""PEFT's prefix of names within a model, and ours of the network in that for transformers."""


def with_adapter(model: PerceiverAR, recipe: Recipe) -> PerceiverAR:
    """`model` with a new adapter, and everything else frozen; it is changed in place."""
    return import_peft().inject_adapter_in_model(lora_config(recipe), model)


def import_peft() -> Any:
    """The package. Raises InputError if it is not installed."""
    with importing("adapters"):
        import peft
    return peft


def lora_config(recipe: Recipe, **settings: Any) -> Any:
    rank = recipe.adapter_rank
    # PEFT multiplies B A by lora_alpha / r.
    return import_peft().LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM", **settings)


def merged(model: PerceiverAR, weights: dict[str, Tensor]) -> PerceiverAR:
    """A plain copy of an adapted `model`, with the adapter `weights` added to those of the projections."""
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(model)
    plain.load_state_dict(weights, strict=False)
    for name, layer in [(name, layer) for name, layer in plain.named_modules() if isinstance(layer, LoraLayer)]:
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    return plain


def fingerprint(model: PerceiverAR) -> str:
    """SHA-256 of the names and values of a network's weights in float32; an adapter in it makes no difference."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".lora_" not in name:
            digest.update(name.replace(".base_layer.", ".").encode())
            digest.update(tensor.to("cpu", torch.float32).numpy())
    return digest.hexdigest()


def save_adapter(directory: Path, recipe: Recipe, weights: dict[str, Tensor], base: str) -> None:
    """Writes adapter `weights`, named as in the adapted network, and their settings as PEFT does, atomically.

    base: fingerprint of the weights that they are added to.
    """
    tensors = {PREFIX + name.replace(".default.", "."): tensor.contiguous() for name, tensor in weights.items()}
    with atomic_path(directory / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "base": base})
    config = lora_config(recipe, inference_mode=True, base_model_name_or_path=recipe.init_from)
    write_text(directory / SETTINGS, json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted) + "\n")


def read(directory: Path, base: str | None) -> tuple[PerceiverAR, Codec | None]:
    """The network of the run `base` with the PEFT adapter in `directory` added to its weights, and its codec.

    Raises InputError if the adapter is missing or damaged, cannot be merged, or does not fit the run.
    """
    require(base is not None, "--base is missing: name the run that the adapter was trained on")
    for name in (SETTINGS, WEIGHTS):
        require((directory / name).is_file(), f"{directory / name}: no such file, so this is not a PEFT adapter")
    run, peft, remedy = Run.open(str(base)), import_peft(), "give the run that it was trained on"
    from perceiver_ar.huggingface import PerceiverARForCausalLM, PerceiverARModelConfig

    plain = run.model()
    model: Any = PerceiverARForCausalLM(PerceiverARModelConfig(plain.config))
    model.network.load_state_dict(plain.state_dict())
    model.network.head.weight = nn.Parameter(plain.head.weight.detach().clone())  # merging would change a tied one, too
    try:
        config = peft.PeftConfig.from_pretrained(str(directory))
        require(not config.is_prompt_learning, f"{directory} holds a prompt, and only weights can be merged")
        with safe_open(directory / WEIGHTS, "pt") as file:
            trained_on = (file.metadata() or {}).get("base")
        tensors = load_file(directory / WEIGHTS)
        model = peft.get_peft_model(model, config)
        if wrong := differences(tensors, peft.get_peft_model_state_dict(model, save_embedding_layers=False)):
            raise InputError(f"{directory} does not fit {base}: {wrong[0]} ({len(wrong)} such differences); {remedy}")
        require(
            trained_on in (None, fingerprint(plain)),
            f"{directory} was trained on other weights than those of {base}: {remedy}",
        )
        peft.set_peft_model_state_dict(model, tensors)
        network: PerceiverAR = model.merge_and_unload().network
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{directory} cannot be merged into {base} ({type(error).__name__}: {reason})") from error
    require(
        not network.config.tie_embeddings or network.head.weight.equal(network.embed.weight),
        f"{directory} changes the embedding and the head of {base} differently, and they are one (tie_embeddings): "
        "use it with PEFT, unmerged",
    )
    plain.load_tensors(network.stored_tensors(), str(directory))
    return plain, run.codec_if_any()
