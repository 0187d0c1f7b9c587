"""Codecs as tokenizers of Hugging Face transformers, with the codec's own ids.

Text is encoded as the start of a document: `codec.separator` first (`add_special_tokens=False`: without it). As with
other tokenizers of transformers, `tokenizer.eos_token` in a text is the end of a document (TRL writes it there), and
with `split_special_tokens=True` it is text. Codecs that do not write text have ids as words: "60 388 12". Conditions
are special tokens, such as `<|composer=bach|>`, or `<|description=0x61|>` for a byte of a free text; those after the
separator are unknown: `<|composer|>`, `<|description|>`.
"""

import json
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import load_codec
from perceiver_ar.data.conditions import BYTES
from perceiver_ar.data.genome import WRITTEN_AS, NucleotideCodec
from perceiver_ar.data.text import BYTE_CHARACTERS, END_OF_TEXT, BytesCodec, OffsetBytesCodec, TokenizerCodec
from perceiver_ar.errors import require
from perceiver_ar.huggingface.hub import HUB, find_codec

NO_UTF8 = BYTE_CHARACTERS[0xFF]
"""The token of a byte that is in no UTF-8 text."""
PADDING = "<|padding|>"
"""The name of the id that stands for no text: collators mask every pad token, so it must not be the end of a text."""


class PerceiverARTokenizer:
    """`AutoTokenizer` finds this class for a run; `from_pretrained` makes an ordinary tokenizer of the run's codec."""

    @classmethod
    def from_pretrained(cls, path: Any, *_: Any, **kwargs: Any) -> PreTrainedTokenizerFast:
        options = {name: value for name, value in kwargs.items() if name not in HUB and not name.startswith("_")}
        return codec_tokenizer(load_codec(find_codec(path, kwargs) or path), **options)


def codec_tokenizer(codec: Codec, **options: Any) -> PreTrainedTokenizerFast:
    """A codec as a tokenizer: `tokenizer(text).input_ids` are `codec.start(text)`.

    options: those of transformers' tokenizers, such as padding_side ("left" unless given).
    """
    tokenizer = id_tokenizer(codec)
    end = tokenizer.id_to_token(codec.separator[-1]) if codec.separator else None
    padding = PADDING if tokenizer.token_to_id(PADDING) is not None else end
    if codec.separator or codec.unknown:
        names = [(str(tokenizer.id_to_token(index)), index) for index in (*codec.separator, *codec.unknown)]
        start = [name for name, _ in names]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*start, "$A"], special_tokens=[*{*names}])
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # adds nothing
    defaults: dict[str, Any] = {
        **dict.fromkeys(("bos_token", "eos_token"), end),
        "pad_token": padding,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(defaults | options))


def id_tokenizer(codec: Codec) -> Tokenizer:
    """Text to the codec's ids and back, without a start."""
    if codec.conditions:
        tokenizer = id_tokenizer(codec.plain)
        for field, own in codec.conditions.items():
            values = BYTES if isinstance(own, int) else own
            tokenizer.add_special_tokens([f"<|{field}|>", *(f"<|{field}={value}|>" for value in values)])
        first = tokenizer.token_to_id(f"<|{next(iter(codec.conditions))}|>")
        require(first == codec.unknown[0], "the tokenizer leaves ids out, so conditions cannot follow them: no export")
        return tokenizer
    if isinstance(codec, TokenizerCodec):
        settings = json.loads(codec.tokenizer.to_str())
        vocab = settings["model"]["vocab"]
        used = any(NO_UTF8 in token for token in vocab if token != NO_UTF8) or PADDING in vocab
        if codec.separator and NO_UTF8 in vocab and not used:
            vocab[PADDING] = vocab.pop(NO_UTF8)
        return Tokenizer.from_str(json.dumps(settings))
    if isinstance(codec, BytesCodec | OffsetBytesCodec):
        first = codec.reserved if isinstance(codec, OffsetBytesCodec) else 0
        names = {index: f"<|{index}|>" for index in range(first)}
        names |= {first + byte: character for byte, character in enumerate(BYTE_CHARACTERS)}
        names |= dict.fromkeys(codec.separator, END_OF_TEXT)
        if codec.separator:
            names[first + 0xFF] = PADDING
        vocab = {name: index for index, name in names.items()}
        # NUL has no name of its own if it separates texts.
        tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=END_OF_TEXT if END_OF_TEXT in vocab else None))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
    if isinstance(codec, NucleotideCodec):
        return kmer_tokenizer(codec)
    tokenizer = Tokenizer(models.WordLevel({str(index): index for index in range(codec.vocab_size)}, unk_token=""))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def kmer_tokenizer(codec: NucleotideCodec) -> Tokenizer:
    """Bases, on lines or in one, as the codec's k-mers. Raises an Exception ("Missing [UNK]") for other letters."""
    names = {codec.decode([index]).decode() or END_OF_TEXT: index for index in range(codec.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token=""))
    written_as = {**WRITTEN_AS, "": r" \t\r\n"}
    replaced = [normalizers.Replace(Regex(f"[{letters}]"), base) for base, letters in written_as.items()]
    tokenizer.normalizer = normalizers.Sequence(replaced)
    patterns = [f".{{{codec.kmer}}}", f"[ACGT]{{{codec.kmer}}}|."]  # a k-mer with N, or what is left: single bases
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    )
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
