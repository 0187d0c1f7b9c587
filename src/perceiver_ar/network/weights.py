"""Weights on disk, as config.json and model.safetensors, and on the Hub."""

import inspect
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path, write_text


class StoredModule(nn.Module):
    """A module that is built from a `PerceiverARConfig`, and can be saved and loaded."""

    config: PerceiverARConfig
    embed: nn.Embedding

    @property
    def device(self) -> torch.device:
        """Where it computes: its weights' device, or the one to which accelerate fetches offloaded weights."""
        fetched_to = getattr(getattr(self.embed, "_hf_hook", None), "execution_device", None)
        return self.embed.weight.device if fetched_to is None else torch.device(fetched_to)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into a directory, each whole or not at all.

        Raises InputError as `check_plain` and `stored_tensors`.
        """
        save_directory = Path(save_directory)
        check_plain(self.stored_tensors())
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.stored_tensors().items()}
        with atomic_path(save_directory / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_text(save_directory / "config.json", self.config.to_json())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """The model in a directory (a run is one) or, with huggingface_hub's arguments, on the Hub; in evaluation mode.

        Raises:
            InputError: files are missing, damaged or not ours; an argument is unknown.
        """
        path = Path(pretrained_model_name_or_path)
        if kwargs or not path.is_dir():
            path = from_hub(pretrained_model_name_or_path, **kwargs)
        model = cls(PerceiverARConfig.load(path))
        file = path / "model.safetensors"
        index = path / "model.safetensors.index.json"  # transformers' `save_pretrained` may have written shards
        try:
            shards = [file]
            if index.exists() and not file.exists():
                file = index
                names = sorted({*json.loads(index.read_text())["weight_map"].values()})
                shards = [path / Path(name).name for name in names]  # never outside of the directory
            tensors: dict[str, Tensor] = {}
            for file in shards:
                file.open("rb").close()  # safetensors reports a file without read permission as missing
                tensors |= load_file(file)
        except PermissionError:
            raise
        except FileNotFoundError:
            raise InputError(f"{file}: no such file, so there is no trained model here (yet)") from None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is damaged ({error}): restore it, or train again") from None
        model.load_tensors(tensors, where=str(path if len(shards) > 1 else file))
        return model.eval()

    def stored_tensors(self) -> dict[str, Tensor]:
        """The state dict, without the second name of a tied embedding. Raises InputError if its head is another one."""
        return without_tied_head(self.state_dict()) if self.config.tie_embeddings else self.state_dict()

    def load_tensors(self, tensors: dict[str, Tensor], where: str) -> None:
        """Loads every tensor by name. Raises InputError that lists missing, unknown and misshaped ones."""
        if wrong := differences(tensors, self.stored_tensors()):
            raise InputError(f"{where} does not fit the settings: {'; '.join(wrong)}")
        self.load_state_dict(tensors, strict=False)


def without_tied_head(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Tensors by name without the head's, which is the embedding. Raises InputError if it is not."""
    own = {name: tensor for name, tensor in tensors.items() if name != f"{prefix}head.weight"}
    head, embedding = tensors.get(f"{prefix}head.weight"), tensors.get(f"{prefix}embed.weight")
    if head is None or embedding is None or type(head.detach()) is not Tensor:  # nothing to compare, or divided by FSDP
        return own
    same = head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)
    require(same, "the head has weights of its own, which tie_embeddings would drop: set it to False")
    return own


REPLACED = re.compile(
    r"\.(?:parametrizations|base_layer|modules_to_save)\.|\.lora_|\.(?:weight|bias)_(?:g|v|orig|mask)$"
)
"""Names of weights that adapters, parametrizations or pruning make of other weights."""


def check_plain(tensors: Iterable[str]) -> None:
    """Raises InputError if names of tensors say that weights are made of other weights."""
    if replaced := [name for name in tensors if REPLACED.search(name)]:
        names = ", ".join(replaced[:3]) + (f" and {len(replaced) - 3} more" if len(replaced) > 3 else "")
        raise InputError(
            f"the model holds adapters, parametrizations or pruning ({names}): merge them into its weights, by peft's "
            "merge_and_unload, parametrize.remove_parametrizations or prune.remove"
        )


def differences(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names that are missing, unknown, or of another shape than expected, as phrases."""
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in expected]
    return wrong + [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]


def from_hub(name: str | os.PathLike[str], **kwargs: Any) -> Path:
    """The folder with a model's files; fetched from the Hub unless `name` is a directory.

    kwargs: of `huggingface_hub.snapshot_download`.
    """
    from huggingface_hub import snapshot_download  # with its HTTP client a fifth of a second to import

    unknown = sorted(set(kwargs) - set(inspect.signature(snapshot_download).parameters))
    require(not unknown, f"from_pretrained has no argument {', '.join(unknown)}: leave it out")
    if Path(name).is_dir():
        return Path(name)
    files = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=files, **kwargs))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{name}: no such directory, and loading it from the Hub failed: {reason}") from error
