"""The bodies of requests: the fields of OpenAI's that are served, and what of the others may stand there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# change nothing of an answer: who asks, what is kept, how it is looked up
HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "request_id", "prediction", "priority", "cache_salt", "parallel_tool_calls"}
)  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what OpenAI, vLLM and SGLang have more, and the values that ask for nothing
    "response_format": ({"type": "text"},),
    "best_of": (1,),
    "suffix": ("",),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}
CHATTY: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "documents": ([],),
    "chat_template_kwargs": ({},),
    "echo": (False,),
}


class Body(BaseModel):
    """`HARMLESS` fields may have any value, `NEUTRAL` ones those that ask for nothing; others are refused by name."""

    HARMLESS: ClassVar[frozenset[str]] = HARMLESS
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_listed)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Weighted(BaseModel):
    """An adapter of a request and its weight."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1, max_length=200)]
    scale: Annotated[float, Field(ge=-100, le=100)] = 1.0


class StreamOptions(BaseModel):
    """`include_obfuscation` is of OpenAI's own network: nothing is padded here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Named(Body):
    """What asks a model."""

    model: Annotated[str, Field(min_length=1, max_length=400)]
    adapters: list[Weighted] = []


class Sampled(Named):
    """What has text written."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}
    stop: Annotated[Texts, Field(max_length=16)] = []
    n: Annotated[int, Field(ge=1)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False


class Completion(Sampled):
    """`/v1/completions`."""

    NEUTRAL = {**NEUTRAL, "add_special_tokens": (True,)}

    prompt: Any
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False


class Message(BaseModel):
    """One turn of a talk.  Its content is text, or a list of pieces of text."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: Any = None


class Chat(Sampled):
    """`/v1/chat/completions`."""

    NEUTRAL = {**NEUTRAL, **CHATTY}

    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Embedding(Named):
    """`/v1/embeddings`."""

    NEUTRAL = {"add_special_tokens": (True,)}

    input: Any
    encoding_format: Annotated[str, Field(pattern="^(float|base64)$")] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


class Classify(Named):
    """`/classify`."""

    NEUTRAL = {"add_special_tokens": (True,)}

    input: Any


class Tokenize(Body):
    """`/tokenize`: of a prompt or of messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)] | None = None
    add_special_tokens: bool = True


class Load(Body):
    """`/v1/load_lora_adapter`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    load_inplace: bool = False


class Unload(Body):
    """`/v1/unload_lora_adapter`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
