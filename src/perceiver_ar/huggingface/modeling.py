"""The network as a causal language model of Hugging Face transformers.

Weights keep their names and files (`model.safetensors` of a run); every logit is that of a window of `windows.py`:

    forward(input_ids)       every position: `blocks`, that is, those of generation from the row's first token;
                             with position_ids, every document of a packed row is a row of its own
    generate, or a cache     the next token: `next_window` from the prompt on, as in `perceiver_ar.generate`

Shapes: B batch, T columns of input_ids, D dim, V vocabulary.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from perceiver_ar.config import MODEL_TYPE
from perceiver_ar.errors import InputError, require
from perceiver_ar.huggingface.caching import CACHE, PerceiverARCache, only_cache
from perceiver_ar.huggingface.configuration import PerceiverARModelConfig
from perceiver_ar.huggingface.hub import end_of_document
from perceiver_ar.network.model import PerceiverAR
from perceiver_ar.network.weights import check_plain, without_tied_head
from perceiver_ar.objective import IGNORE
from perceiver_ar.windows import blocks

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments of collators of packed documents beside position_ids, which hold the same information."""


class PerceiverARBaseModel(PerceiverAR):
    """The network. Called with `input_ids`, as TRL calls a base model, it returns the latents of every position."""

    def forward(
        self,
        *args: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: PerceiverARCache | None = None,
        **others: Any,
    ) -> Any:
        """Without `input_ids`: the network's own forward. With: `last_hidden_state` (B, T or less, D), from which
        the head makes the logits of `PerceiverARForCausalLM.forward`; same arguments.

        With a cache: the logits that `cache.read` returns.
        """
        if input_ids is None:
            return super().forward(*args, **others)
        _refuse(others, position_ids)
        if cache is not None:
            return cache.read(self, input_ids, attention_mask)
        h = self.every_position(*_documents(input_ids, attention_mask, position_ids), logits_to_keep)
        return BaseModelOutputWithPast(last_hidden_state=cast(Any, h))

    def every_position(self, tokens: Tensor, document: Tensor, place: Tensor, keep: int | Tensor) -> Tensor:
        """Latents (B, T or less, D), for the results of `_documents`."""
        # Later tokens change nothing, so no mask is needed.
        columns = slice(-keep, None) if isinstance(keep, int) else keep  # -0: all
        lengths = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        lengths = lengths.scatter_reduce(0, document.flatten(), place.flatten() + 1, "amax")
        document, place = document[:, columns], place[:, columns]
        least, length = int(place.min()), int(place.max()) + 1
        index = torch.zeros(len(tokens), length, dtype=torch.int64, device=tokens.device)  # of positions among latents
        parts = list[Tensor]()
        for block in blocks(self.config, length):
            if block.end <= least:
                continue
            targets = (lengths.clamp(max=block.end) - block.first).clamp(min=0)
            size = targets.double().log2().ceil()  # -inf: the document ends before
            for one in size[targets > 0].unique():  # packed documents differ much in length: group similar ones
                rows = (size == one).nonzero()[:, 0]
                n = int(targets[rows].max())
                end, count = block.first + n, sum(map(len, parts))
                part = self.latents(tokens[rows, block.start : end], block.prefix_len)[:, -n:]
                index[rows, block.first : end] = torch.arange(len(rows) * n, device=rows.device).view(-1, n) + count
                parts.append(part.flatten(0, 1))
        return torch.cat(parts)[index[document, place]]


def _documents(tokens: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Documents as rows (documents, T), and the document (B, T) of each of `tokens` (B, T) and its place there (B, T).

    A row without its padding is one document; with position_ids, a document begins at each position 0.
    """
    require(tokens.ndim == 2 and 0 not in tokens.shape, f"input_ids have shape {tuple(tokens.shape)}: give (B, T)")
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    require(
        real.shape == tokens.shape,
        f"attention_mask has shape {tuple(real.shape)}, input_ids {tuple(tokens.shape)}: they must be equal",
    )
    row = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
    document, place = row, (real.cumsum(1) - 1).clamp(min=0)
    if position_ids is not None:
        require(
            position_ids.shape[-1:] == tokens.shape[1:] and position_ids.numel() in (tokens.numel(), tokens.shape[1]),
            f"position_ids have shape {tuple(position_ids.shape)}, input_ids {tuple(tokens.shape)}: they must be equal",
        )
        positions = position_ids.expand_as(tokens)
        first = real & ((positions == 0) | (place == 0))
        document = (first.flatten().cumsum(0) - 1).clamp(min=0).view_as(tokens)
        start = place.masked_fill(~first, 0).cummax(1).values  # where its document begins, among real tokens
        place = place - start
        if wrong := (real & (positions != place)).nonzero().tolist():
            r, c = wrong[0]
            raise InputError(
                f"position_ids has {int(positions[r, c])} at row {r}, column {c}: they must count the tokens of each "
                f"document from 0, here {int(place[r, c])}; leave them out if a row is one document"
            )
    rows = tokens.new_zeros(int(document.max()) + 1, int(place.max()) + 1)
    rows[document[real], place[real]] = tokens[real]
    return rows, document, place


def _refuse(others: dict[str, Any], position_ids: Tensor | None) -> None:
    """Raises InputError for arguments that have a value, because it would be ignored."""
    known = () if position_ids is None else PACKED
    given = sorted({name for name, value in others.items() if value is not None and value is not False} - {*known})
    require(not given, f"{', '.join(given)}: this network has no such input or output, leave it out")


class PerceiverARForCausalLM(PreTrainedModel, GenerationMixin):
    """The network with the interface of transformers' causal language models; `network` is the `PerceiverAR` itself."""

    config_class = PerceiverARModelConfig
    base_model_prefix = "network"
    _tied_weights_keys = {"network.head.weight": "network.embed.weight"}  # noqa: RUF012  (if tie_word_embeddings)
    _is_stateful = True
    _no_split_modules = ["CrossLayer", "SelfLayer"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def __init__(self, config: PerceiverARModelConfig) -> None:
        super().__init__(config)
        self.network = PerceiverARBaseModel(config.network)
        self.register_load_state_dict_pre_hook(_names_of_a_run)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: the network has drawn its weights."""

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.network.head

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.network.embed = cast(nn.Embedding, value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.network.head = cast(nn.Linear, new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.network.config = self.config.network
        return embeddings

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """Recomputes layers without re-entering autograd, even if `use_reentrant` is given."""
        require(every_n_layers == 1, f"every_n_layers is {every_n_layers}: all layers are recomputed, leave it out")
        self.gradient_checkpointing = self.network.activation_checkpointing = enable

    def enable_input_require_grads(self) -> None:
        """Nothing to do, see `_set_gradient_checkpointing`. (transformers' hook would prevent streaming the prefix.)"""

    disable_input_require_grads = enable_input_require_grads

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: PerceiverARCache | None = None,
        past_key_values: PerceiverARCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V) of the token after each position.

        Without a cache, position i of a row, counted from its first real token, has the logits with which generation
        from that first token would draw token i + 1: contexts from `windows.blocks`, which depend on i alone. A context
        is all tokens so far, and past context_length at least the last context_length - num_latents / 2 of them; the
        first num_latents positions are all latents, later ones have num_latents / 2 ... num_latents latents. So a row's
        logits depend on no other row, nor on padding on either side; logits at padding mean nothing. Rows may have any
        length. With a cache, the logits after the last token are those from which generation would draw.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding; None: no padding. With a cache: of all columns so far.
            labels: (B, T) ids that belong to input_ids: the loss is the mean cross-entropy, in nats, of those that are
                not -100 and follow a real token.
            cache: of the tokens before.
            past_key_values: another name of `cache`.
            use_cache: begin a cache, if none is given. None: no.
            logits_to_keep: n: the last n positions only, 0: all; a tensor: the positions at these indices.
            return_dict: False: a tuple.
            num_items_in_batch: number of labels in all batches of one step, as transformers' Trainer counts them. The
                loss is then the sum of the losses over this number, instead of their mean.
            others: position_ids (B, T), which count each document of a row from 0, so that packed documents do not see
                each other (not with a cache). All others must be None or False, as from wrappers such as PEFT's.

        Raises:
            InputError: shapes that do not fit; padding on the right with a cache; another library's cache; others.
        """
        require(
            input_ids is not None,
            "input_ids are missing: give the ids themselves, as keys depend on the ids before (no inputs_embeds)",
        )
        input_ids = cast(Tensor, input_ids)
        cache = only_cache(cache, past_key_values)
        position_ids = others.pop("position_ids", None) if cache is None and not use_cache else None
        _refuse(others, position_ids)
        require(
            attention_mask is None or attention_mask.ndim == 2,
            f"attention_mask has shape {None if attention_mask is None else tuple(attention_mask.shape)}: give (B, T)",
        )
        results: dict[str, Any] = {}
        if cache is not None or use_cache:
            cache = PerceiverARCache() if cache is None else cache
            require(
                isinstance(cache, PerceiverARCache),
                f"the cache is a {type(cache).__name__}: leave it out, or give a PerceiverARCache",
            )
            require(labels is None, "labels need the logits of every position: leave out the cache")
            last = isinstance(logits_to_keep, int) and logits_to_keep == 1
            with torch.no_grad():
                prompts = cache.get_seq_length() == 0 and not last and input_ids.shape[-1] > 1
                logits = self.network(input_ids=input_ids, attention_mask=attention_mask, cache=cache)
                if prompts:
                    logits = torch.cat([self.score(input_ids, attention_mask)[:, :-1], logits], dim=1)
            columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = logits[:, columns]
            results[CACHE] = cache
        else:
            logits = self.score(input_ids, attention_mask, logits_to_keep, position_ids)
            if labels is not None:
                if position_ids is not None:  # a document's first token is predicted from nothing
                    labels = labels.masked_fill(position_ids == 0, IGNORE)
                if attention_mask is not None:  # so is a token after padding
                    before = nn.functional.pad(attention_mask.bool(), (1, -1))
                    counted, labels = labels, labels.masked_fill(~(before & attention_mask.bool()), IGNORE)
                    if num_items_in_batch is not None:
                        left, all_of_them = ((ids[:, 1:] != IGNORE).sum().clamp(min=1) for ids in (labels, counted))
                        num_items_in_batch = num_items_in_batch * left / all_of_them
                results["loss"] = self.loss_function(
                    logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
                )
        output = CausalLMOutputWithPast(logits=cast(Any, logits), **results)
        return output.to_tuple() if return_dict is False else output

    def score(
        self, tokens: Tensor, mask: Tensor | None, keep: int | Tensor = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        """`forward` without a cache: logits (B, T or less, V)."""
        output = self.network(
            input_ids=tokens, attention_mask=mask, position_ids=position_ids, logits_to_keep=keep, use_cache=False
        )
        return self.network.head(output.last_hidden_state)

    # Generation: GenerationMixin's, over our own cache.

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_length: int,
    ) -> None:
        cache = only_cache(model_kwargs.pop("cache", None), model_kwargs.pop("past_key_values", None))
        model_kwargs[CACHE] = PerceiverARCache(max_length) if cache is None else cache

    def prepare_inputs_for_generation(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Drops the tokenizer of stop strings, which transformers pass on to the network."""
        cache = only_cache(kwargs.get("cache"), kwargs.get("past_key_values"))
        if kwargs.get("is_first_iteration") and args and isinstance(cache, PerceiverARCache):
            cache.require_same(args[0], kwargs.get("attention_mask"))
        prepare = super().prepare_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        return prepare(*args, **kwargs)

    def _validate_generation_mode(self, generation_mode: Any, generation_config: Any, *rest: Any) -> None:
        """Refuses settings that would not give the logits of the windows."""
        require(
            generation_mode != GenerationMode.ASSISTED_GENERATION,
            "assisted decoding removes drafted tokens, which latents cannot forget: leave out assistant_model and "
            "prompt_lookup_num_tokens",
        )
        require(generation_config.use_cache is not False, "use_cache is False: windows need it, leave it out")
        require(
            generation_config.cache_implementation in (None, "dynamic"),
            f"cache_implementation is {generation_config.cache_implementation!r}: this network has a cache of its own, "
            "leave it out",
        )
        require(
            generation_config.prefill_chunk_size is None,
            f"prefill_chunk_size is {generation_config.prefill_chunk_size}: a prompt's latents are computed together, "
            "leave it out (its prefix is read in pieces anyway)",
        )
        validate = super()._validate_generation_mode  # pyright: ignore[reportAttributeAccessIssue]
        validate(generation_mode, generation_config, *rest)

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        raise InputError("continuous batching pages keys and values, but refills compute them again: use generate")

    continuous_batching_context_manager = init_continuous_batching
    generate_batch = init_continuous_batching

    # Weights on disk: those of a run.

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The model of a run, or of a directory that `save_pretrained` wrote; as transformers' `from_pretrained`.

        Generation ends at the codec's end of a document, if there is one and no generation_config.json says otherwise.

        Raises:
            InputError: weights are missing or unknown (lists them), or tie_embeddings is set and the head has its own.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs, output_loading_info=True)
        model, info = loaded
        wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
        wrong += [f"{name} is unknown" for name in sorted(info["unexpected_keys"])]
        require(not wrong, f"{pretrained_model_name_or_path}: weights do not fit the settings: {'; '.join(wrong)}")
        network = model.network
        require(
            not model.config.tie_word_embeddings or network.head.weight is network.embed.weight,
            f"{pretrained_model_name_or_path}: tie_embeddings is given, but the head has its own weights: leave it out",
        )
        if model.generation_config.eos_token_id is None:
            end = end_of_document(pretrained_model_name_or_path, kwargs)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if getattr(model.generation_config, name) is None:
                    setattr(model.generation_config, name, end)
        return (model, info) if wants_info else model

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Writes `config.json` and `model.safetensors` as a run has them, and `generation_config.json`.

        Raises InputError if they could not be loaded: adapters are not merged, weights are quantised, or a head that is
        tied to the embedding has become another one.
        """
        require(getattr(self, "hf_quantizer", None) is None, "quantised weights cannot be saved: save the model before")
        state_dict = self.state_dict() if state_dict is None else state_dict
        check_plain(state_dict)
        if self.config.tie_word_embeddings:
            state_dict = without_tied_head(state_dict, "network.")
        state_dict = {name.removeprefix("network."): tensor for name, tensor in state_dict.items()}
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        if is_main_process:  # transformers removes older shards only: a whole file beside new ones would be loaded
            folder = Path(save_directory)
            shards = any(folder.glob("model-*-of-*.safetensors"))
            (folder / f"model.safetensors{'' if shards else '.index.json'}").unlink(missing_ok=True)


# With this entry the label smoothing of transformers' Trainer shifts labels by one.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MODEL_TYPE, PerceiverARForCausalLM.__name__)


def _names_of_a_run(model: PerceiverARForCausalLM, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: renames weights from the names in files of `save_pretrained` to the model's own.

    transformers' Trainer reads its checkpoints itself, so it needs this to resume.
    """
    own = model.network.state_dict()
    for name in own:
        if prefix + name in state_dict:
            state_dict[f"{prefix}network.{name}"] = state_dict.pop(prefix + name)
    if model.config.tie_word_embeddings:
        for name, source in model._tied_weights_keys.items():
            if prefix + source in state_dict and name.removeprefix("network.") in own:  # not if PEFT wraps it
                state_dict.setdefault(prefix + name, state_dict[prefix + source])
