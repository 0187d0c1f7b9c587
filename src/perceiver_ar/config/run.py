"""The settings of a run beside its network: data, optimizer, trainer."""

import re
from dataclasses import dataclass
from typing import Literal

from perceiver_ar.config.checks import (
    NotNegative,
    NotNegativeNumber,
    Positive,
    Share,
    ShareBelow1,
    check_fields,
    parse_duration,
)
from perceiver_ar.errors import InputError, require


@dataclass(frozen=True)
class DataConfig:
    """How files become documents and tokens, and which documents are held out."""

    validation: tuple[str, ...] | str = ()
    """File or folder to hold out for evaluation, or a list of them, instead of a share of the documents. For genomes
    also a .bed file: its regions are held out."""
    validation_fraction: ShareBelow1 = 0.05
    """Share of the bytes held out, as whole documents."""
    split_on: str | None = None
    """Text that separates documents in a file, such as '\\n\\n\\n\\n'; it is removed. None: each file is a document."""
    column: str = "text"
    """Column that holds the text in .jsonl, .ndjson, .csv, .tsv, .parquet and .arrow files and in datasets of the Hub,
    or a field of a field (doc.text). Each row is a document. In .tar files another extension than txt, or json.FIELD.
    """
    max_bytes: Positive | None = None
    """Bytes of text to take from each dataset of the Hugging Face Hub (hf://datasets/OWNER/NAME). None: all of it."""
    group_by: str | None = None
    """Regular expression for file names: files with the same match are held out together, or not at all. '(.*)__' keeps
    all performances of Piece__Performer.mid together, '(.*)/' all files of a folder. With several groups in it, the
    first that takes part counts. None: every file is separate."""
    conditions: str | None = None
    """A table (.csv, .tsv, .jsonl, .parquet) with a column `file` (relative to the table's folder); its other columns,
    such as composer, become tokens in front of each document, which generate --condition composer=bach chooses."""
    condition_text: str | None = None
    """The column of that table that is free text of at most 256 bytes, such as description; the others are fields with
    at most 1,000 values. generate --condition description='a slow waltz' also takes texts that no document has."""
    augment: bool = True
    """Train on variants of windows if the modality has any: music in other keys, faster, slower, louder, softer."""
    tokenizer: str | None = None
    """A Hugging Face tokenizers file (tokenizer.json); None: every byte is a token."""
    bpe_vocab_size: int | None = None
    """Train a byte-level BPE tokenizer of this size on the files first."""

    midi_tokens: Literal["performance", "remi", "tsd", "midilike", "remi_plus"] = "performance"
    """performance: 388 events (note on, note off, time shift, velocity); remi, tsd, midilike: as in MidiTok. remi_plus:
    instruments, drums, tempo and time signatures; the others take all instruments as one piano, without drums."""
    image_size: tuple[int, int] = (32, 32)
    """Rows and columns of pictures after scaling and cropping; they determine model.context_length."""
    image_colours: Literal["rgb", "grey", "palette"] = "rgb"
    """rgb: three ids per pixel (red, green, blue); grey: one; palette: one, the nearest of palette_size colours."""
    palette_size: Positive = 256
    """Number of colours in the palette, which is chosen from the pictures."""
    classes: bool = False
    """Put a class token before each picture: the class is the picture's folder. --prompt then names a class."""
    audio_codec: Literal["mulaw", "encodec", "dac", "mimi"] = "mulaw"
    """mulaw: 8-bit mu-law samples, without a model; the others: codes of a neural codec."""
    sample_rate: Positive = 16_000
    """Sample rate of mu-law in Hz; recordings are resampled to it. Neural codecs have their own."""
    audio_weights: str | None = None
    """Weights of a neural codec: a folder or a name on the Hub; None: the codec's usual ones on the Hub."""
    codebooks: Positive | None = None
    """Number of a neural codec's codebooks to use, coarsest first; None: eight, or all if it has fewer."""
    kmer: Positive = 1
    """Bases of a genome in one token, 1 ... 8."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        if isinstance(self.validation, str):
            object.__setattr__(self, "validation", (self.validation,))
        require(self.palette_size <= 256, f"data.palette_size is {self.palette_size}: it must be at most 256")
        require(min(self.image_size) >= 1, f"data.image_size is {self.image_size}: rows and columns must be at least 1")
        if self.split_on is not None:  # shells pass backslashes on
            object.__setattr__(
                self, "split_on", self.split_on.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
            )
        if self.group_by is not None:
            try:
                re.compile(self.group_by)
            except re.error as error:
                raise InputError(f"data.group_by {self.group_by!r} is no regular expression ({error})") from None
        require(self.split_on != "", "data.split_on is empty: give a text, or leave it out")
        require(
            self.bpe_vocab_size is None or self.bpe_vocab_size > 256,
            f"data.bpe_vocab_size is {self.bpe_vocab_size}: it must be more than 256, the single bytes",
        )
        require(
            self.tokenizer is None or self.bpe_vocab_size is None,
            "data.tokenizer and data.bpe_vocab_size are both given: choose one",
        )


@dataclass(frozen=True)
class OptimConfig:
    """The learning rule. Learning rates are peaks; the schedule scales them all alike."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for hidden matrices and AdamW for the rest, which includes adapters; adamw: AdamW for all."""
    muon_lr: NotNegativeNumber = 0.02
    """Peak learning rate of the hidden matrices under Muon."""
    lr: NotNegativeNumber | None = None
    """Peak learning rate of AdamW; None: 0.03 with muon, 0.003 with adamw, 0.01 for an adapter."""
    weight_decay: NotNegativeNumber = 0.0
    """Decoupled weight decay of matrices, per unit of learning rate."""
    momentum: Share = 0.95
    """Muon's momentum."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """After the warmup: wsd: stable, then linear decay to zero; cosine: half a cosine to zero; constant: stable."""
    warmup: Share = 0.02
    """Share of the run over which learning rates rise from zero."""
    decay: Share = 0.6
    """wsd: share of the run over which learning rates fall to zero."""
    grad_clip: NotNegativeNumber = 1.0
    """Maximum norm of the whole gradient; 0: no clipping."""
    skip_spikes: NotNegativeNumber = 0.0
    """Skip a step if its gradient norm exceeds the median of the last 100 by this factor, such as 10. 0: skip none."""
    label_smoothing: NotNegativeNumber = 0.0
    """Share of each target spread over all other ids. Evaluation does not use it."""
    z_loss: NotNegativeNumber = 0.0
    """Weight of log^2(sum exp(logits)) in the loss, such as 1e-4; it keeps logits from drifting. Evaluation does not
    use it."""
    ema: ShareBelow1 = 0.0
    """Decay per step of a running mean of the weights, such as 0.999. The mean is then evaluated and saved instead of
    the weights. 0: no mean."""

    def __post_init__(self) -> None:
        check_fields(self, "optim.")
        require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas is {self.betas}: both must be in [0, 1)")

    @property
    def adamw_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        return 3e-2 if self.name == "muon" else 3e-3


@dataclass(frozen=True)
class TrainerConfig:
    """The steps of a run: batches, devices, precision, evaluations, checkpoints."""

    batch_size: Positive = 4
    """Windows per optimizer step."""
    blocks: Positive | None = None
    """Number of blocks in each window, each of num_latents targets, one after the other. They share the keys and values
    of the text before them, so a step learns from more tokens in less time, but from fewer texts. None: 4, or as
    many as fill half of the context; 1 with prefix dropout, or if the network allows no more."""
    micro_batch_size: Positive | None = None
    """Windows per forward pass on each device. Fewer than its share of batch_size: less memory, with accumulated
    gradients. None: the whole share."""
    devices: Positive = 1
    """Number of devices that share each step, with one process each. torchrun and SLURM set it themselves."""
    prefix_ranks: Positive = 1
    """Number of devices that read the same windows, each a share of the prefix, so that the context can grow with it.
    The windows of a step are divided among devices / prefix_ranks such groups."""
    short_prefix: Share = 0.5
    """Share of the steps whose windows have their prefix cut at random to 3/4, 1/2, 1/4 or nothing. So the model learns
    to predict from short contexts, too, and a shorter prefix is less work."""
    prefix_growth: Share = 0.0
    """Share of the run over which the maximum prefix grows from nothing to whole, in quarters. The model learns to use
    near tokens first, at less cost. 0: it is whole from the start."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With several devices. ddp: each holds the whole network; fsdp: each a share of weights, gradients and optimizer
    state."""
    precision: Literal["auto", "32", "bf16", "fp16"] = "auto"
    """auto: bfloat16 autocast if the device is faster with it, else float32; the run's recipe records the choice."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    compile: bool = False
    """torch.compile the network: minutes of compilation, then faster steps."""
    deterministic: bool = False
    """Compute in the same order every time, so that a seed gives the same weights again on a GPU, too; slower. A CPU
    always does. An operation that has no such form ends the run with torch's message."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, a third more time."""
    evaluations: NotNegative = 10
    """Number of evaluations, each with a sample, evenly spread over the run."""
    evaluation_tokens: int = 100_000
    """Held-out tokens to score per evaluation, spread over all. The final evaluation: the first ten times as many."""
    sample_tokens: NotNegative = 200
    """Length of the samples in tokens; 0: no samples. Texts continue a held-out document; the last sample of pictures
    is a whole picture."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Where metrics go besides metrics.csv and TensorBoard (used if installed); each tracker is an extra to install."""
    checkpoint_every: str = "60s"
    """Time between checkpoints, written as max_time is. Each evaluation writes one, too."""
    keep_best: NotNegative = 1
    """Number of checkpoints with the best held-out loss to keep, besides the newest two."""
    patience: Positive | None = None
    """End the run when this many evaluations in a row gave no better held-out loss than the best one before. The
    learning rate is then where its schedule is: optim.schedule constant suits such runs. None: train to the end."""
    final_weights: Literal["last", "best"] = "last"
    """best: the run ends with the weights of the kept checkpoint with the best held-out loss, if that is better than
    the last weights' on the same tokens. Resuming goes on from the last ones all the same."""

    def __post_init__(self) -> None:
        check_fields(self, "trainer.")
        require(
            self.devices == 1 or self.devices % self.prefix_ranks == 0,
            f"trainer.prefix_ranks is {self.prefix_ranks}, which does not divide devices {self.devices}",
        )
        ranks = f"devices {self.devices}" + (f" / prefix_ranks {self.prefix_ranks}" if self.prefix_ranks > 1 else "")
        require(
            self.batch_size % self.data_ranks == 0,
            f"trainer.batch_size {self.batch_size} is not a multiple of {ranks}, which share it: "
            f"set it to {-(-self.batch_size // self.data_ranks) * self.data_ranks}, or lower devices",
        )
        each = self.data_ranks * self.micro_batch
        require(
            self.batch_size % each == 0,
            f"trainer.batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            + (f" times {ranks}" if self.data_ranks > 1 else "")
            + f": set it to {-(-self.batch_size // each) * each}, or lower micro_batch_size",
        )
        require(
            self.evaluation_tokens >= 2, f"trainer.evaluation_tokens is {self.evaluation_tokens}: it must be at least 2"
        )
        parse_duration(self.checkpoint_every, "trainer.checkpoint_every")
        require(
            self.patience is None or self.evaluations > 0,
            f"trainer.patience is {self.patience}, but trainer.evaluations is 0: set both, or neither",
        )
        require(
            self.final_weights == "last" or (self.evaluations > 0 and self.keep_best > 0),
            "trainer.final_weights is best: set trainer.evaluations and trainer.keep_best to at least 1",
        )

    @property
    def data_ranks(self) -> int:
        """Groups of devices that share the windows of a step."""
        return max(1, self.devices // self.prefix_ranks)

    @property
    def micro_batch(self) -> int:
        """micro_batch_size with its default filled in."""
        return self.micro_batch_size or self.batch_size // self.data_ranks

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp" and self.devices > 1
