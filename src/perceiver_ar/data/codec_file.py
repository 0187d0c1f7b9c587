"""codec.json in a run directory: which codec, with which settings, and with which conditions."""

import json
from importlib import import_module
from pathlib import Path

from perceiver_ar.data.codec import Codec
from perceiver_ar.data.conditions import MOST_BYTES, ConditionedCodec
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import write_text

# Codec names in `codec.json` -> their classes; one modality may have several. Nothing else is ever imported by name.
# docs/modalities.md lists what else a new modality has to add.
CODECS = {
    "bytes": "perceiver_ar.data.text:BytesCodec",
    "offset_bytes": "perceiver_ar.data.text:OffsetBytesCodec",
    "tokenizer": "perceiver_ar.data.text:TokenizerCodec",
    "performance": "perceiver_ar.data.midi:PerformanceCodec",
    "miditok": "perceiver_ar.data.midi:MidiTokCodec",
    "remi_plus": "perceiver_ar.data.remi_plus:RemiPlusCodec",
    "image": "perceiver_ar.data.image:ImageCodec",
    "mulaw": "perceiver_ar.data.audio:MuLawCodec",
    "neural": "perceiver_ar.data.audio:NeuralCodec",
    "integers": "perceiver_ar.data.integers:IntegerCodec",
    "nucleotides": "perceiver_ar.data.genome:NucleotideCodec",
}


def save_codec(codec: Codec, directory: str | Path) -> None:
    """Writes `codec.json` and the codec's own files into `directory`, each atomically, `codec.json` last."""
    codec.save(Path(directory))
    content = {"codec": codec.name, "settings": codec.settings()}
    content |= {"conditions": dict(codec.conditions)} if codec.conditions else {}
    write_text(Path(directory) / "codec.json", json.dumps(content, indent=2) + "\n")


def load_codec(directory: str | Path) -> Codec:
    """The codec that `save_codec` wrote. Raises `InputError` if it is missing, damaged, or of an unknown kind."""
    path = Path(directory) / "codec.json"
    require(
        path.is_file(),
        f"{path} does not exist: {directory} is not a run directory (train one with --out), or was converted from a "
        "checkpoint that does not say what its ids stand for, and needs a codec.json",
    )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, settings, conditions = content["codec"], content["settings"], content.get("conditions")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); copy it again from the original run") from None
    known = ", ".join(sorted(CODECS))
    require(
        str(name) in CODECS, f"{path} names the codec {name!r}, known are {known}; use the perceiver-ar that wrote it"
    )
    module, _, attribute = CODECS[name].partition(":")
    codec_class: type[Codec] = getattr(import_module(module), attribute)
    try:
        codec = codec_class.load(path.parent, settings)
        if conditions is None:
            return codec
        for values in conditions.values():
            texts = isinstance(values, list) and {*map(type, values)} <= {str}
            if not (texts or (type(values) is int and 0 < values <= MOST_BYTES)):
                raise ValueError(f"conditions need lists of texts, or numbers in 1 ... {MOST_BYTES}")
        return ConditionedCodec(codec, conditions)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:  # not what the class takes
        raise InputError(f"{path} is damaged ({error}); copy it again from the original run") from None
