# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable
from threading import get_ident
from typing import Any


class CallAttribute:
    """
    An attribute of a pipeline that belongs to a call: every thread reads and sets that of the call it is in. Outside of
    calls it is that of the last one; what a thread sets while it is in none goes to all calls that are running, which
    is how a program interrupts them.
    """

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __get__(self, pipe: Any, owner: type | None = None) -> Any:
        if pipe is None:
            return self
        own = pipe.__dict__.get("_running_calls", {}).get(get_ident())
        values = own[-1] if own else pipe.__dict__.get("_last_call", {})
        if self.name not in values:
            raise AttributeError(self.name)  # before the first call
        return values[self.name]

    def __set__(self, pipe: Any, value: Any):
        running = pipe.__dict__.setdefault("_running_calls", {})
        if own := running.get(get_ident()):
            own[-1][self.name] = value
            return
        for values in [pipe.__dict__.setdefault("_last_call", {})] + [
            call for calls in list(running.values()) for call in calls
        ]:
            values[self.name] = value


def with_own_state(call: Callable) -> Callable:
    """
    Decorates the `__call__` of a pipeline: gives every call [`CallAttribute`]s of its own, so that threads, and calls
    inside of callbacks, do not see each other's; and when a call fails, takes models back from the device that
    offloading brought them to, as the end of a call does.
    """

    @functools.wraps(call)
    def call_with_own_state(self, *args: Any, **kwargs: Any) -> Any:
        running = self.__dict__.setdefault("_running_calls", {})
        own = running.setdefault(get_ident(), [])
        own.append(dict(self.__dict__.get("_last_call", {})))
        try:
            return call(self, *args, **kwargs)
        except BaseException:
            self.maybe_free_model_hooks()
            raise
        finally:
            self.__dict__["_last_call"] = own.pop()
            if not own:
                del running[get_ident()]

    return call_with_own_state
