"""The raw clients of the soak, which know exactly what they were sent, and hold it against what is promised."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tests.soak.stage import Call, Stage, now
from tests.support.following import RETRY, UNAVAILABLE, Following, Refused
from tests.support.mcp_http import LATEST, ConnectionCut, Session

DEADLINE = 120.0
"""Seconds after which a call without an outcome counts as hung: several times what any one fault may cost."""
LIFE = (10.0, 60.0)
"""How long a session lives, in seconds."""
UNANSWERED = "unanswered"
"""The POST's connection ended before an id came: nobody can tell whether the call runs (guarantees, "Not promised")."""


def outcome_of(final: Any) -> str:
    """One word for how a call ended: `result`, the reason of this package's error, or what else it was."""
    if "result" in final:
        return "result" if not final["result"].get("isError") else f"tool error {final['result']['content']}"
    error = final["error"]
    if error["code"] == -32800:
        return "cancelled"
    return str((error.get("data") or {}).get("reason") or error)


class RawClient:
    """One client: a session after the other, with two calls at a time, and the standalone stream."""

    def __init__(self, number: int, stage: Stage, rng: random.Random) -> None:
        self.name = f"raw {number}"
        self._stage = stage
        self._rng = rng
        self._ids = itertools.count(1)
        self._told: dict[str, list[int]] = {}
        self._deleting: set[str | None] = set()
        """Sessions whose DELETE is on its way: what is still being sent to them may get 404."""

    def _url(self) -> str:
        return self._stage.url(self._rng)

    async def run(self) -> None:
        while not self._stage.over.is_set():
            session = await self._open()
            self._told = {}
            standalone = Following(session, self._url, "standalone", self._hear, self._cut)
            async with asyncio.TaskGroup() as group:
                listening = group.create_task(self._listen(standalone))
                while standalone.cursor is None:  # noqa: ASYNC110 (what is sent before there is one cannot be resumed)
                    await asyncio.sleep(0.02)
                until = time.monotonic() + self._rng.uniform(*LIFE)
                working = group.create_task(self._work(session, until))
                await self._heard_all(await self._tell(session, until))
                await working
                listening.cancel()
            self._judge(standalone)
            self._stage.count("events on standalone streams", len(standalone.events))
            self._stage.count("resumes of standalone streams", standalone.resumes)
            await self._close(session)

    # --- a session's beginning and end --------------------------------------------------------------------------------

    async def _open(self) -> Session:
        """Shake hands, as often as it takes. What a failed attempt leaves behind is abandoned."""
        while True:
            session = Session(self._url())
            params = {
                "protocolVersion": LATEST,
                "capabilities": {"elicitation": {}},
                "clientInfo": {"name": self.name, "version": "0"},
            }
            try:
                response = await session.request("initialize", params, id=0)
                if response.status == 200:
                    session.initialize_result = (await response.result())["result"]
                    session.session_id, session.version = response.headers["mcp-session-id"], LATEST
                    await self._deliver(session, {"jsonrpc": "2.0", "method": "notifications/initialized"})
                    self._stage.count("sessions")
                    return session
                if response.status not in UNAVAILABLE:
                    self._stage.violation(f"{self.name}: initialize got {response.status}")
                await response.read()
            except (ConnectionCut, OSError, IndexError, KeyError):
                pass  # also a response that ended before the result, or with an error in its place
            self._stage.count("sessions that could not be opened at once")
            await asyncio.sleep(RETRY)

    async def _deliver(self, session: Session, message: Any) -> None:
        """POST a notification or an answer until it is taken."""
        while True:
            with contextlib.suppress(ConnectionCut, OSError):
                response = await session.post(message, base_url=self._url())
                await response.read()
                if response.status == 202 or (response.status == 404 and session.session_id in self._deleting):
                    return
                if response.status not in UNAVAILABLE:
                    self._stage.violation(f"{self.name}: {message} got {response.status}")
                    return
            await asyncio.sleep(RETRY)

    async def _close(self, session: Session) -> None:
        """DELETE it, sometimes with a call running; then it is unknown everywhere."""
        deleting: asyncio.Task[None] | None = None

        async def delete(message: Any) -> None:
            nonlocal deleting
            if deleting is None:
                deleting = asyncio.create_task(self._delete(session))

        if self._rng.random() < 0.5:
            arguments = {"n": 20, "seconds": 4.0}
            await self._call(
                session, "delete", "count", arguments, delete, expected={"session_ended"}, result="counted 20"
            )
        await (deleting or self._delete(session))
        for _ in range(3):
            with contextlib.suppress(ConnectionCut, OSError):
                response = await session.request("ping", base_url=self._url())
                await response.read()
                if response.status not in (404, *UNAVAILABLE):
                    self._stage.violation(f"{self.name}: a deleted session answers with {response.status}")

    async def _delete(self, session: Session) -> None:
        self._deleting.add(session.session_id)
        while True:
            with contextlib.suppress(ConnectionCut, OSError):
                response = await session.delete(base_url=self._url())
                await response.read()
                # 404: an attempt before this one got through, though nobody said so.
                if response.status in (200, 404):
                    return
                if response.status not in UNAVAILABLE:
                    self._stage.violation(f"{self.name}: DELETE got {response.status}")
                    return
            await asyncio.sleep(RETRY)

    # --- calls --------------------------------------------------------------------------------------------------------

    async def _work(self, session: Session, until: float) -> None:
        operations: list[tuple[int, Callable[[Session], Awaitable[None]]]] = [
            (6, self._count),
            (3, self._ask),
            (2, self._echo),
            (1, self._cancel),
            (1, self._block),
        ]
        weights = [weight for weight, _ in operations]
        while time.monotonic() < until and not self._stage.over.is_set():
            [(_, operation)] = self._rng.choices(operations, weights)
            await operation(session)

    async def _count(self, session: Session) -> None:
        n = self._rng.randint(2, 25)
        arguments = {"n": n, "seconds": self._rng.uniform(0.1, 6.0)}
        call = await self._call(session, "progress", "count", arguments, result=f"counted {n}")
        if call.outcome == "result" and call.following is not None:
            told = [event.message["params"]["message"] for event in call.following.events[:-1]]
            if told != [str(index) for index in range(n)]:
                self._stage.violation(f"{self.name}: {call.request_id} was told {told} of {n}")

    async def _ask(self, session: Session) -> None:
        question = f"{self.name} {next(self._ids)}"

        async def answer(message: Any) -> None:
            if message["method"] == "elicitation/create":
                self._stage.spawn(self._answer(session, message))

        call = await self._call(session, "question", "ask", {"question": question}, answer)
        if call.outcome == "result":
            given = json.loads(call.final["result"]["content"][0]["text"])["content"]
            if given != {"answer": question}:
                self._stage.violation(f"{self.name}: asked {question!r}, and got the answer {given}")

    async def _answer(self, session: Session, message: Any) -> None:
        await asyncio.sleep(self._rng.choice((0.0, 0.0, self._rng.uniform(0.5, 3.0))))
        result = {"action": "accept", "content": {"answer": message["params"]["message"]}}
        await self._deliver(session, {"jsonrpc": "2.0", "id": message["id"], "result": result})

    async def _echo(self, session: Session) -> None:
        text = f"{self.name} {next(self._ids)}"
        await self._call(session, "echo", "echo", {"text": text}, result=text)

    async def _block(self, session: Session) -> None:
        arguments = {"seconds": self._rng.uniform(0.1, 2.0)}
        await self._call(session, "blocked loop", "block", arguments, result="blocked")

    async def _cancel(self, session: Session) -> None:
        sent = False

        async def cancel(message: Any) -> None:
            nonlocal sent
            if not sent:
                sent = True
                params = {"requestId": request_id}
                notice = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}
                self._stage.spawn(self._deliver(session, notice))

        request_id = f"cancelled-{next(self._ids)}"
        arguments = {"n": 20, "seconds": 4.0}
        await self._call(
            *(session, "cancelled", "count", arguments, cancel),
            expected={"cancelled"},
            result="counted 20",
            request_id=request_id,
        )

    async def _call(
        self,
        session: Session,
        operation: str,
        tool: str,
        arguments: dict[str, Any],
        on_message: Callable[[Any], Awaitable[None]] | None = None,
        *,
        expected: frozenset[str] | set[str] = frozenset(),
        result: str | None = None,
        request_id: str | None = None,
    ) -> Call:
        """Call a tool to its outcome, which is one of those that are promised."""
        call = Call(self.name, operation, request_id or f"{operation}-{next(self._ids)}", now())
        call.following = Following(session, self._url, call.request_id, on_message, self._cut)
        self._stage.calls.append(call)
        self._stage.attached.add(call.following)
        began = time.monotonic()
        try:
            async with asyncio.timeout(DEADLINE):
                call.final = await self._post(session, tool, arguments, call.following)
            call.outcome = outcome_of(call.final) if call.final is not None else UNANSWERED
            if call.outcome == "result" and result is not None and text_of(call.final) != result:
                self._stage.violation(f"{self.name}: {call.request_id} gave {text_of(call.final)!r}, not {result!r}")
            if call.outcome not in {"result", "worker_lost", "shutdown", "outage", UNANSWERED} | expected:
                self._stage.violation(f"{self.name}: {call.request_id} ended with {call.outcome}")
            if call.final is not None:
                self._judge(call.following)
        except TimeoutError:
            call.outcome = "hung"
            self._stage.violation(f"{self.name}: {call.request_id} hangs; its cursor is {call.following.cursor}")
        except Refused as refused:
            if refused.status == 404 and "session_ended" in expected:
                call.outcome = "session_ended"  # which the 404 says too
                return call
            call.outcome = "refused"
            self._stage.violation(f"{self.name}: {call.request_id} at {call.following.cursor}: {refused}")
        finally:
            call.seconds = time.monotonic() - began
            self._stage.attached.discard(call.following)
        return call

    async def _post(self, session: Session, tool: str, arguments: dict[str, Any], following: Following) -> Any:
        """POST until somebody takes it, and follow; None where nobody can tell what became of it."""
        while True:
            try:
                response = await session.call(
                    *(tool, arguments),
                    progress_token=following.request_id,
                    id=following.request_id,
                    base_url=self._url(),
                )
                if response.status == 200:
                    return await following.follow(response)
                body = await response.read()
            except ConnectionRefusedError:
                following.refusals += 1
                await asyncio.sleep(RETRY)
                continue
            except (ConnectionCut, OSError):
                return None
            # Refused for now; or it had got in all the same, by an attempt whose answer was lost.
            if response.status == 503:
                following.refusals += 1
            elif response.status in (409, 502, 504):
                return None
            else:
                raise Refused("POST", response.status, body)
            await asyncio.sleep(RETRY)

    def _cut(self) -> int | None:
        return self._rng.choice((None, None, None, None, 0, self._rng.randint(1, 15)))

    def _judge(self, following: Following) -> None:
        try:
            following.assert_exactly_once()
        except AssertionError as error:
            self._stage.violation(f"{self.name}: {following.request_id}: {error}")

    # --- notifications of the session ---------------------------------------------------------------------------------

    async def _tell(self, session: Session, until: float) -> dict[str, tuple[int, bool]]:
        """Have notifications sent; by tag, how many, and whether the call says that it sent them all."""
        notices: dict[str, tuple[int, bool]] = {}
        while time.monotonic() < until and not self._stage.over.is_set():
            tag, n = f"{self.name} {next(self._ids)}", self._rng.randint(1, 10)
            arguments = {"tag": tag, "n": n, "seconds": self._rng.uniform(0.1, 3.0)}
            call = await self._call(session, "notifications", "tell", arguments, result=f"told {n}")
            notices[tag] = n, call.outcome == "result"
        return notices

    async def _hear(self, message: Any) -> None:
        data = message["params"]["data"]
        self._told.setdefault(data["tag"], []).append(data["index"])

    async def _listen(self, standalone: Following) -> None:
        """Follow the standalone stream until cancelled."""
        self._stage.attached.add(standalone)
        try:
            while True:
                with contextlib.suppress(ConnectionCut):
                    await standalone.follow(await standalone.resume())
        except Refused as refused:
            self._stage.violation(f"{self.name}: the standalone stream at {standalone.cursor}: {refused}")
        finally:
            self._stage.attached.discard(standalone)
            if standalone.response is not None:
                standalone.response.close()

    async def _heard_all(self, notices: dict[str, tuple[int, bool]]) -> None:
        """Every notification whose call ended well has come, once and in order; of the others the first ones."""

        def missing() -> list[str]:
            return [tag for tag, (n, sent) in notices.items() if sent and len(self._told.get(tag, [])) < n]

        deadline = time.monotonic() + DEADLINE
        while missing() and time.monotonic() < deadline:  # noqa: ASYNC110 (another task hears)
            await asyncio.sleep(0.05)
        for tag, (n, sent) in notices.items():
            heard = self._told.get(tag, [])
            if heard != list(range(n if sent else len(heard))):
                self._stage.violation(f"{self.name}: of {n} notifications {tag!r} came {heard}")


def text_of(final: Any) -> str:
    return str(final["result"]["content"][0]["text"])
