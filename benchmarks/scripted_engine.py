"""An engine without a model: SGLang's answer to a chat body, at once or after a delay, for next to no CPU.

    python -m benchmarks.scripted_engine --port 30000

A prompt has as many tokens as `input_ids`, an answer always `Script.generated`. What is generated at place p of a
session is a function of p alone: ids, logprobs and rows. Who knows a prompt's length knows what has to be recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import re
import socket
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import orjson
import uvloop
from numpy.typing import NDArray

LAYERS, DENSE, EXPERTS, TOP_K = 47, 1, 64, 4
"""GLM-4.7-Flash: 46 layers of 47 route to 4 of 64."""
TEXT = "The answer is in the words before it; nothing is left to say. " * 6
_START = re.compile(rb'"routed_experts_start_len":(\d+)')


@dataclass(frozen=True)
class Script:
    """What is generated.

    Attributes:
        generated: tokens an answer.
        longest: tokens of the longest session.
    """

    generated: int = 100
    longest: int = 80_000

    @cached_property
    def rows(self) -> NDArray[np.int32]:
        """[longest, LAYERS, TOP_K]: the row at each place; zeros in the dense layer, distinct experts in the others."""
        places = np.arange(self.longest)[:, None, None]
        layers = np.arange(LAYERS)[None, :, None]
        ids = (places * 7 + layers * 11 + 16 * np.arange(TOP_K)[None, None, :]) % EXPERTS
        ids[:, :DENSE] = 0
        return np.ascontiguousarray(ids.astype("<i4"))

    def ids(self, place: int) -> list[int]:
        """The ids of an answer that starts at a place."""
        return [40 + (place + offset) % 200 for offset in range(self.generated)]

    def logprobs(self, place: int) -> list[float]:
        """Their logprobs."""
        return [-((place + offset) % 1000 + 1) / 1024 for offset in range(self.generated)]

    def answer(self, prompt: int, start: int | None, version: str = "0") -> bytes:
        """The body for a prompt of so many tokens, with the rows from `start` on; None: without rows."""
        ids, logprobs = self.ids(prompt), self.logprobs(prompt)
        entries = [[logprob, id, None] for logprob, id in zip(logprobs, ids, strict=True)]
        content = [{"token": "word", "bytes": [119], "logprob": logprob, "top_logprobs": []} for logprob in logprobs]
        meta = {
            "id": "a", "finish_reason": {"type": "length", "length": self.generated}, "prompt_tokens": prompt,
            "completion_tokens": self.generated, "cached_tokens": max(prompt - 300, 0), "weight_version": version,
            "output_token_logprobs": entries,
        }  # fmt: skip
        if start is not None:
            rows = self.rows[start : prompt + self.generated - 1]
            meta["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
        choice = {
            "index": 0, "message": {"role": "assistant", "content": TEXT}, "logprobs": {"content": content},
            "finish_reason": "length", "meta_info": meta,
        }  # fmt: skip
        return orjson.dumps({"id": "a", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


def read_body(body: bytes) -> tuple[int, int | None]:
    """(prompt tokens, start of the rows or None) of a chat body; found, not parsed."""
    first = body.index(b'"input_ids":[')
    prompt = body.count(b",", first, body.index(b"]", first)) + 1
    found = _START.search(body) if b'"return_routed_experts":true' in body else None
    return prompt, int(found[1]) if found else None


class Engine:
    """Answers HTTP.

    Args:
        script: what it says.
        delay: seconds before an answer.
        failing: share of answers that are a 500, or break off.
        version: of the weights.
    """

    def __init__(self, script: Script, *, delay: float = 0.0, failing: float = 0.0, version: str = "0") -> None:
        self._script, self._delay, self._failing, self._version = script, delay, failing, version
        self._random = random.Random(0)
        models = {"object": "list", "data": [{"id": "m", "object": "model"}]}
        self._about = orjson.dumps({"model_path": "m", "served_model_name": "m", "weight_version": version, **models})

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = re.search(rb"content-length: *(\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                answer = self._about
                status = b"200 OK"
                if head.startswith(b"post /v1/chat/completions"):
                    await asyncio.sleep(self._delay)
                    answer = self._script.answer(*read_body(body), self._version)
                    if self._random.random() < self._failing:
                        if self._random.random() < 0.5:
                            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer[:100])
                            break
                        status, answer = b"500 Internal Server Error", b'{"message": "scripted"}'
                writer.write(b"HTTP/1.1 %s\r\ncontent-type: application/json\r\n" % status)
                writer.write(b"content-length: %d\r\n\r\n" % len(answer))
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def _serve(engine: Engine, listener: socket.socket) -> None:
    server = await asyncio.start_server(engine.client, sock=listener, limit=1 << 26, backlog=4096)
    await server.serve_forever()


def main() -> None:
    """Answer until killed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scripted_engine", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before an answer")
    parser.add_argument("--failing", type=float, default=0.0, help="share of answers that fail")
    parser.add_argument("--version", default="0", help="of the weights")
    asked = parser.parse_args()
    script = Script()
    script.rows  # noqa: B018 - before anybody waits
    listener = socket.create_server(("127.0.0.1", asked.port), backlog=4096)
    engine = Engine(script, delay=asked.delay, failing=asked.failing, version=asked.version)
    asyncio.Runner(loop_factory=uvloop.new_event_loop).run(_serve(engine, listener))


if __name__ == "__main__":
    main()
