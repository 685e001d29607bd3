"""The format of requests and responses: OpenAI's completions API, as far as it applies to a base model with adapters.

See https://platform.openai.com/docs/api-reference/completions. `top_k` is an extension that vLLM also has. Unsupported
fields are not ignored: the error message names the field.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_from_scratch.serving.sampling import Sampling

MOST_PROMPTS, MOST_STOPS = 64, 4  # per request
# Fields of OpenAI's API that have no effect with these values; any other value is refused.
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
IGNORED = ("user",)


class ApiError(Exception):
    """An error response to a client.

    Args:
        status: the HTTP status code.
        message: the error message.
        param: the name of the invalid field.
        code: a machine-readable error code.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Completion:
    """A validated request to /v1/completions."""

    model: str
    prompts: Sequence[str | list[int]]
    max_tokens: int
    sampling: Sampling
    stop: Sequence[str]
    stream: bool
    include_usage: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a request body, which must be a JSON object.

    Raises:
        ApiError: the body is not a JSON object.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ApiError(400, f"the body must be a JSON object, got {_kind(document)}")
    return document


def parse_completion(body: Mapping[str, Any]) -> Completion:
    """Validate a completion request.

    Raises:
        ApiError: a field is missing, unknown, unsupported, of the wrong type or out of range. The error names it.
    """
    fields = _Fields(body)
    for name, values in NEUTRAL.items():
        value = fields.take(name, None)
        if value not in values or (isinstance(value, bool) and value is not False):
            allowed = " or ".join(json.dumps(value) for value in values)
            raise ApiError(400, f"{name}={json.dumps(value)} is not supported, only {allowed}", param=name)
    for name in IGNORED:
        fields.take(name, None)
    stop = fields.take("stop", None) or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MOST_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise ApiError(400, f"stop must be a string or up to {MOST_STOPS} non-empty strings", param="stop")
    completion = Completion(
        model=fields.text("model"),
        prompts=_prompts(fields.take("prompt", None)),
        max_tokens=fields.integer("max_tokens", 16),
        sampling=_sampling(fields),
        stop=stop,
        stream=fields.boolean("stream", False),
        include_usage=_include_usage(fields.take("stream_options", None)),
    )
    if completion.max_tokens < 1:
        raise ApiError(400, f"max_tokens must be at least 1, got {completion.max_tokens}", param="max_tokens")
    fields.refuse_rest()
    return completion


class _Fields:
    """The fields of a request that have not been processed yet."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.rest = dict(body)

    def take(self, name: str, default: Any) -> Any:
        value = self.rest.pop(name, None)
        return default if value is None else value

    def text(self, name: str) -> str:
        value = self.take(name, None)
        if not isinstance(value, str):
            raise ApiError(400, f"{name} must be a string, got {_kind(value)}", param=name)
        return value

    def integer(self, name: str, default: int | None) -> Any:
        value = self.take(name, default)
        if value is not None and type(value) is not int:
            raise ApiError(400, f"{name} must be a whole number, got {_kind(value)}", param=name)
        return value

    def number(self, name: str, default: float | None) -> Any:
        value = self.take(name, default)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ApiError(400, f"{name} must be a number, got {_kind(value)}", param=name)
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise ApiError(400, f"{name} must be true or false, got {_kind(value)}", param=name)
        return value

    def refuse_rest(self) -> None:
        if self.rest:
            name = sorted(self.rest)[0]
            raise ApiError(400, f"there is no field {name!r} in a completion request", param=name)


def _prompts(prompt: Any) -> Sequence[str | list[int]]:
    """A string, token ids, or several of either."""
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(one, str) or _are_ids(one) for one in prompt):
        if len(prompt) > MOST_PROMPTS:
            raise ApiError(400, f"a request may have {MOST_PROMPTS} prompts, got {len(prompt)}", param="prompt")
        return prompt
    raise ApiError(400, "prompt must be a string, a list of token ids, or a list of either", param="prompt")


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _sampling(fields: _Fields) -> Sampling:
    seed = fields.integer("seed", None)
    temperature, top_p, top_k = (
        fields.number("temperature", 1),
        fields.number("top_p", None),
        fields.integer("top_k", None),
    )
    try:
        top_k = None if top_k == -1 else top_k  # -1 means all tokens, as in vLLM
        return Sampling(temperature, top_k, top_p, secrets.randbits(62) if seed is None else seed)
    except ValueError as error:
        raise ApiError(400, str(error), param=str(error).split()[0]) from None


def _include_usage(options: Any) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or not set(options) <= {"include_usage"}:
        raise ApiError(400, 'stream_options must be {"include_usage": true or false}', param="stream_options")
    return options.get("include_usage") is True


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "nothing" if value is None else names[type(value)]


# --- Responses -----------------------------------------------------------------------------------------------


class Answer:
    """Builds the parts of one response, which share an id and a time stamp."""

    def __init__(self, model: str) -> None:
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """A complete response, or one chunk of a stream."""
        return {**self.head, "choices": list(choices), **({} if usage is None else {"usage": usage})}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def server_sent_event(document: Any) -> str:
    text = document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)
    return f"data: {text}\n\n"
