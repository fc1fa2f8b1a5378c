"""Call somebody's function, sync or async, within a limit of time and without holding the event loop up."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
from collections.abc import Callable
from typing import Any


class OutOfTime(TimeoutError):
    """The call took longer than its limit. A coroutine was cancelled; a thread cannot be, and runs on unheeded."""


async def call(function: Callable[..., Any], *args: Any, timeout: float | None = None) -> Any:
    """What `function(*args)` returns, awaited where that is an awaitable.

    An `async def` runs on the event loop. Everything else runs in a thread of its own, so several calls of one function
    may be under way at once. The threads are daemons: one that never ends delays the end of neither loop nor program.

    Args:
        timeout: seconds; None is no limit.

    Raises:
        OutOfTime: the limit is over.
        RuntimeError: the function raised SystemExit or StopIteration, which are no answers.
        Exception: what else the function raised.
    """
    try:
        async with asyncio.timeout(timeout) as limit:
            if inspect.iscoroutinefunction(function):
                return await function(*args)
            value = await _in_thread(function, args)
            return await value if inspect.isawaitable(value) else value
    except TimeoutError as error:
        if limit.expired():
            raise OutOfTime(f"not done after {timeout:g} s") from error
        raise


async def _in_thread(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if done.done():  # nobody waits any more
            return
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def work() -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = context.run(function, *args)
        except (SystemExit, StopIteration) as caught:
            error = RuntimeError(f"it raised {caught!r}")
            error.__cause__ = caught
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, name="limited-call", daemon=True).start()
    return await done
