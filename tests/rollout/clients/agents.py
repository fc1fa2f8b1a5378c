"""The same agent on each client library: two questions, a tool until the policy has had enough of it.

Each hands back its client's own message objects as history, as its users do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.rollout.clients.policy import TOOL

QUESTIONS = ("Roll a die.", "And again.")
RESULT = "6"
PATIENCE = 50  # turns after which the policy is taken to have no end
KEY = "unused"
BLOCKS = ("text", "thinking", "tool_use")


@dataclass(kw_only=True)
class Talk:
    """What an agent saw.

    Attributes:
        answers: the text of each final answer.
        thoughts: the reasoning of each turn, where the client shows it.
        calls: number of tool calls.
        usage: (prompt, completion) tokens of each turn.
    """

    answers: list[str] = field(default_factory=list)
    thoughts: list[str | None] = field(default_factory=list)
    calls: int = 0
    usage: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One answer: the client's message object, or a list of its items, and what the agent needs of it."""

    message: Any
    text: str | None
    thought: str | None
    calls: Sequence[str]
    usage: tuple[int, int]


Agent = Callable[[str, dict[str, int], Sequence[str]], Talk]
"""Takes a session's `/v1`, the `logit_bias`, and what its user says."""


def _tool_messages(calls: Sequence[str]) -> list[Any]:
    """The results of calls in OpenAI's shape."""
    return [{"role": "tool", "tool_call_id": call, "content": RESULT} for call in calls]


def _converse(
    questions: Sequence[str],
    ask: Callable[[list[Any]], Heard],
    results: Callable[[Sequence[str]], list[Any]] = _tool_messages,
) -> Talk:
    """The loop of clients that have none of their own, with OpenAI's dicts for the agent's messages."""
    talk, history = Talk(), list[Any]()
    for question in questions:
        history.append({"role": "user", "content": question})
        for _ in range(PATIENCE):
            heard = ask(history)
            history += heard.message if isinstance(heard.message, list) else [heard.message]
            talk.thoughts.append(heard.thought)
            talk.usage.append(heard.usage)
            if not heard.calls:
                talk.answers.append(heard.text or "")
                break
            talk.calls += len(heard.calls)
            history += results(heard.calls)
    return talk


def _heard(completion: Any) -> Heard:
    """From an object in OpenAI's shape."""
    message, usage = completion.choices[0].message, completion.usage
    return Heard(
        message=message,
        text=message.content,
        thought=getattr(message, "reasoning_content", None),
        calls=[call.id for call in message.tool_calls or ()],
        usage=(usage.prompt_tokens, usage.completion_tokens),
    )


def openai_sync(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """openai.OpenAI."""
    import openai

    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        create: Any = client.chat.completions.create
        return _converse(
            questions, lambda history: _heard(create(model="m", messages=history, tools=[TOOL], logit_bias=bias))
        )


def openai_async(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """openai.AsyncOpenAI; history as plain dicts."""
    import openai

    async def ask(history: list[Any]) -> Heard:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            create: Any = client.chat.completions.create
            heard = _heard(await create(model="m", messages=history, tools=[TOOL], logit_bias=bias))
        return Heard(**{**vars(heard), "message": heard.message.model_dump()})

    return _converse(questions, lambda history: asyncio.run(ask(history)))


def openai_stream(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """openai.OpenAI's stream helper."""
    import openai

    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        start: Any = client.chat.completions.stream

        def ask(history: list[Any]) -> Heard:
            usage = {"include_usage": True}
            with start(model="m", messages=history, tools=[TOOL], logit_bias=bias, stream_options=usage) as stream:
                return _heard(stream.get_final_completion())

        return _converse(questions, ask)


def litellm_sync(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """litellm.completion."""
    import litellm

    def ask(history: list[Any]) -> Heard:
        completion = litellm.completion(
            model="openai/m", api_base=url, api_key=KEY, messages=history, tools=[TOOL], logit_bias=bias, max_retries=0
        )
        return _heard(completion)

    return _converse(questions, ask)


def litellm_stream(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """litellm.completion with stream, put together by its own builder."""
    import litellm

    def ask(history: list[Any]) -> Heard:
        chunks: Any = litellm.completion(
            model="openai/m", api_base=url, api_key=KEY, messages=history, tools=[TOOL], logit_bias=bias, max_retries=0,
            stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        return _heard(litellm.stream_chunk_builder(list(chunks)))

    return _converse(questions, ask)


def aiohttp_raw(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """aiohttp and JSON, no library."""
    import aiohttp

    async def ask(history: list[Any]) -> Heard:
        body = {"messages": history, "tools": [TOOL], "logit_bias": bias}
        async with aiohttp.ClientSession() as http, http.post(f"{url}/chat/completions", json=body) as answer:
            completion = await answer.json()
            if answer.status != 200:
                raise aiohttp.ClientPayloadError(completion["error"]["message"])
        message, usage = completion["choices"][0]["message"], completion["usage"]
        return Heard(
            message=message,
            text=message["content"],
            thought=message["reasoning_content"],
            calls=[call["id"] for call in message.get("tool_calls", ())],
            usage=(usage["prompt_tokens"], usage["completion_tokens"]),
        )

    return _converse(questions, lambda history: asyncio.run(ask(history)))


def _langchain(url: str, bias: dict[str, int], questions: Sequence[str], *, stream: bool) -> Talk:
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"base_url": url, "api_key": KEY, "max_retries": 0, "logit_bias": bias}
    model: Any = ChatOpenAI(model="m", stream_usage=True, **options).bind_tools([TOOL])
    talk, history = Talk(), list[BaseMessage]()
    for question in questions:
        history.append(HumanMessage(question))
        for _ in range(PATIENCE):
            if stream:
                first, *rest = model.stream(history)
                message: AIMessage = sum(rest, start=first)
            else:
                message = model.invoke(history)
            history.append(message)
            assert message.usage_metadata is not None
            talk.usage.append((message.usage_metadata["input_tokens"], message.usage_metadata["output_tokens"]))
            if not message.tool_calls:
                talk.answers.append(str(message.content))
                break
            talk.calls += len(message.tool_calls)
            history += [ToolMessage(RESULT, tool_call_id=call["id"] or "") for call in message.tool_calls]
    return talk


def langchain(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """langchain_openai.ChatOpenAI."""
    return _langchain(url, bias, questions, stream=False)


def langchain_stream(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """langchain_openai.ChatOpenAI, streamed."""
    return _langchain(url, bias, questions, stream=True)


def pydantic_ai(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """pydantic_ai.Agent, whose own loop calls the tool."""
    from pydantic_ai import Agent, UsageLimits
    from pydantic_ai.messages import ModelResponse
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings
    from pydantic_ai.providers.openai import OpenAIProvider

    talk = Talk()

    def roll(sides: int) -> str:
        """Roll a die."""
        talk.calls += 1
        return RESULT

    model = OpenAIChatModel("m", provider=OpenAIProvider(base_url=url, api_key=KEY))
    agent = Agent(model, tools=[roll], model_settings=OpenAIChatModelSettings(logit_bias=bias))
    history: list[Any] = []
    for question in questions:
        run = agent.run_sync(question, message_history=history, usage_limits=UsageLimits(request_limit=PATIENCE))
        history = run.all_messages()
        talk.answers.append(run.output)
    for message in history:
        if isinstance(message, ModelResponse):
            talk.thoughts.append(message.thinking)
            talk.usage.append((message.usage.input_tokens, message.usage.output_tokens))
    return talk


def _tool_results(calls: Sequence[str]) -> list[Any]:
    """The results of calls in Anthropic's shape: one message."""
    return [
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call, "content": RESULT} for call in calls]}
    ]


def _function_outputs(calls: Sequence[str]) -> list[Any]:
    """The results of calls as items of Responses."""
    return [{"type": "function_call_output", "call_id": call, "output": RESULT} for call in calls]


def _anthropic(url: str, bias: dict[str, int], questions: Sequence[str], *, stream: bool) -> Talk:
    import anthropic

    function: Any = TOOL["function"]
    tool = {name: function[name] for name in ("name", "description")} | {"input_schema": function["parameters"]}
    options: dict[str, Any] = {"model": "m", "max_tokens": 64, "tools": [tool], "extra_body": {"logit_bias": bias}}

    with anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key=KEY, max_retries=0) as client:

        def ask(history: list[Any]) -> Heard:
            if stream:
                with client.messages.stream(messages=history, **options) as events:
                    message = events.get_final_message()
            else:
                message = client.messages.create(messages=history, **options)
            blocks = {kind: [block for block in message.content if block.type == kind] for kind in BLOCKS}
            return Heard(
                message={"role": "assistant", "content": message.content},
                text="".join(block.text for block in blocks["text"]),
                thought="".join(block.thinking for block in blocks["thinking"]) or None,
                calls=[block.id for block in blocks["tool_use"]],
                usage=(message.usage.input_tokens, message.usage.output_tokens),
            )

        return _converse(questions, ask, _tool_results)


def anthropic_sync(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """anthropic.Anthropic."""
    return _anthropic(url, bias, questions, stream=False)


def anthropic_stream(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """anthropic.Anthropic's stream helper."""
    return _anthropic(url, bias, questions, stream=True)


def _responses(url: str, bias: dict[str, int], questions: Sequence[str], *, stream: bool) -> Talk:
    import openai

    tool = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
    options: Any = {"model": "m", "tools": [tool], "extra_body": {"logit_bias": bias}, "store": False}

    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:

        def ask(history: list[Any]) -> Heard:
            if stream:
                with client.responses.stream(input=history, **options) as events:
                    response: Any = events.get_final_response()
            else:
                response = client.responses.create(input=history, **options)
            thoughts = [part.text for item in response.output if item.type == "reasoning" for part in item.content]
            return Heard(
                message=[item.to_dict() for item in response.output] if stream else response.output,
                text=response.output_text,
                thought="".join(thoughts) or None,
                calls=[item.call_id for item in response.output if item.type == "function_call"],
                usage=(response.usage.input_tokens, response.usage.output_tokens),
            )

        return _converse(questions, ask, _function_outputs)


def responses_sync(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """openai.OpenAI's responses."""
    return _responses(url, bias, questions, stream=False)


def responses_stream(url: str, bias: dict[str, int], questions: Sequence[str]) -> Talk:
    """openai.OpenAI's responses, streamed; items as plain dicts."""
    return _responses(url, bias, questions, stream=True)


AGENTS: dict[str, tuple[str, Agent, str]] = {
    "openai": ("openai", openai_sync, "BadRequestError"),
    "openai-async": ("openai", openai_async, "BadRequestError"),
    "openai-stream": ("openai", openai_stream, "BadRequestError"),
    "openai-responses": ("openai", responses_sync, "BadRequestError"),
    "openai-responses-stream": ("openai", responses_stream, "BadRequestError"),
    "anthropic": ("anthropic", anthropic_sync, "BadRequestError"),
    "anthropic-stream": ("anthropic", anthropic_stream, "BadRequestError"),
    "litellm": ("litellm", litellm_sync, "ContextWindowExceededError"),
    "litellm-stream": ("litellm", litellm_stream, "ContextWindowExceededError"),
    "aiohttp": ("aiohttp", aiohttp_raw, "ClientPayloadError"),
    "langchain": ("langchain_openai", langchain, "OpenAIContextOverflowError"),
    "langchain-stream": ("langchain_openai", langchain_stream, "OpenAIContextOverflowError"),
    "pydantic-ai": ("pydantic_ai", pydantic_ai, "ModelContextWindowExceededError"),
}
"""By name: the module that it needs, the agent, and what a context overflow is in its client."""
