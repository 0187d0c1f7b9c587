"""The body of POST /v1/completions. Unsupported values are refused, with the name of the field."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation

from perceiver_ar.errors import InputError
from perceiver_ar.generation.sampling import Sampling, is_whole

MAX_PROMPTS = 128
MAX_LOGPROBS = 100
MAX_STOPS, MAX_STOP = 16, 1000
MAX_SCORES = 2**18
"""Maximum of (tokens of all scored prompts) * n * (logprobs + 1) in one request: each takes about 200 bytes."""
MAX_UNREAD = 2**14
"""Maximum number of tokens that a client leaves unread, before its rows end."""

Prompt = str | list[str] | list[int] | list[list[int]]


class Refused(InputError):
    """A request that cannot be served; `param` is the wrong field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class CompletionRequest(StrictModel):
    """Fields of OpenAI's completions with their meanings, and `top_k`, `min_p`, `repetition_penalty`, `condition`."""

    prompt: Annotated[Prompt, SkipValidation]  # `prompts` checks it: pydantic would report an error for every element
    model: str | None = None
    max_tokens: int | None = Field(None, ge=0, le=1_000_000)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    n: int | None = Field(None, ge=1)
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | Literal[False] | None = None
    echo: bool | None = None
    logit_bias: dict[str, float] | None = None
    suffix: str | None = None
    condition: dict[str, str] | None = None
    """Conditions of the documents that the texts of `prompt` begin, such as {"composer": "bach"}."""
    user: str | None = None
    """Accepted without effect."""

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def count(self) -> int:
        """Maximum number of tokens to draw, with OpenAI's default."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int | None:
        """Number of likeliest tokens to list with each token; None: no log-probabilities."""
        return None if self.logprobs is None or self.logprobs is False else int(self.logprobs)

    def check(self, slots: int) -> None:
        """Raises Refused for unsupported values. Values that change nothing are accepted."""
        neutral: dict[str, Callable[[Any], bool]] = {
            "best_of": lambda value: value in (1, self.samples),
            "suffix": lambda value: value == "",
            "logit_bias": lambda value: value == {},
        }
        for name, changes_nothing in neutral.items():
            value = getattr(self, name)
            if value is not None and not changes_nothing(value):
                raise Refused(f"{name} is not supported: leave it out", name)
        if self.samples > slots:
            raise Refused(f"n is {self.n}: this server draws at most {slots} samples at the same time", "n")
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options needs stream: set stream, or leave it out", "stream_options")

    def prompts(self) -> list[str] | list[list[int]]:
        """Texts, or rows of ids, which may be outside of the vocabulary. Raises Refused for anything else."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and is_whole(prompt[0])):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise Refused("prompt must be a text, a list of texts, a list of ids or a list of lists of ids", "prompt")
        if len(prompt) > MAX_PROMPTS:
            raise Refused(f"prompt is a list of {len(prompt)}: give at most {MAX_PROMPTS} in one request", "prompt")
        texts = all(isinstance(one, str) for one in prompt)
        if not texts and not all(isinstance(one, list) and all(map(is_whole, one)) for one in prompt):
            raise Refused("prompt must hold texts alone, or whole numbers alone", "prompt")
        for text in prompt if texts else ():
            require_unicode(text, "prompt")
        return prompt

    def stops(self) -> list[bytes]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP for stop in stops):
            raise Refused(f"stop must be at most {MAX_STOPS} texts of at most {MAX_STOP} characters", "stop")
        return [require_unicode(stop, "stop") for stop in stops if stop]

    def sampling(self) -> Sampling:
        """Raises Refused for numbers out of range."""
        return sampling_of(self.model_copy(update={"top_k": None}) if self.top_k in (0, -1) else self)


def sampling_of(request: BaseModel) -> Sampling:
    """The settings of sampling in a request; a field that is None has its default. Raises Refused."""
    fields = {name: getattr(request, name) for name in Sampling.__dataclass_fields__}
    try:
        return Sampling(**{name: value for name, value in fields.items() if value is not None})
    except InputError as error:
        raise Refused(str(error), str(error).split()[0]) from None


def require_unicode(text: str, param: str) -> bytes:
    """A text as UTF-8. Raises Refused for half of a surrogate pair, which JSON can hold."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise Refused(f"{param} is not Unicode text: it has half of a surrogate pair", param) from None
