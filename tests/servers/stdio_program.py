"""An MCP server on stdio that does what the tests of the proxy want of it, well and badly behaved. Starts in no time:
nothing but the standard library.

    TEST_DIRECTORY   where `wait` looks for its files
    TEST_PROGRAM     how it misbehaves from the start: dies, silent, slow, noisy, stubborn
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIRECTORY = Path(os.environ.get("TEST_DIRECTORY", "."))
MANNER = os.environ.get("TEST_PROGRAM", "")
output = threading.Lock()
answers: dict[object, Any] = {}
answered = threading.Condition()
asked = 0
reading = threading.Event()
closing = threading.Event()
cancelled: set[object] = set()
received: list[str] = []
capabilities: dict[str, Any] = {}


def send(message: dict[str, Any]) -> None:
    line = json.dumps({"jsonrpc": "2.0", **message})
    with output:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def ask(method: str, params: dict[str, Any]) -> Any:
    """Ask the client, and wait for its answer."""
    global asked
    with answered:
        asked += 1
        number = asked
    send({"id": number, "method": method, "params": params})
    with answered:
        answered.wait_for(lambda: number in answers)
        return answers.pop(number)


class Call:
    """A `tools/call` in a thread of its own."""

    def __init__(self, message: dict[str, Any]) -> None:
        self.id = message["id"]
        self.arguments = message["params"].get("arguments", {})
        self.token = message["params"].get("_meta", {}).get("progressToken")

    def progress(self, number: float, text: str) -> None:
        params = {"progressToken": self.token, "progress": number, "message": text}
        send({"method": "notifications/progress", "params": params})

    def log(self, data: object) -> None:
        send({"method": "notifications/message", "params": {"level": "info", "data": data}})

    def echo(self, text: str) -> str:
        return text

    def count(self, n: int, seconds: float = 0.0) -> str:
        start = time.monotonic()
        for index in range(n):
            self.progress(index + 1, str(index))
            time.sleep(max(0.0, start + (index + 1) * seconds / n - time.monotonic()))
        return f"counted {n}"

    def burst(self, n: int, size: int) -> str:
        """As `count`, in one go; with a size for each."""
        lines = []
        for index in range(n):
            params = {"progressToken": self.token, "progress": index + 1, "message": str(index).ljust(size)}
            lines.append(json.dumps({"jsonrpc": "2.0", "method": "notifications/progress", "params": params}))
        with output:
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
        return f"burst of {n}"

    def flood(self, seconds: float, size: int) -> str:
        """Write as much as is taken, for some seconds; how much it was."""
        end, sent = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            self.progress(sent + 1, "x" * size)
            sent += 1
        return str(sent)

    def logs(self, n: int) -> str:
        for index in range(n):
            self.log(index)
        return f"logged {n}"

    def wait(self, key: str) -> str:
        self.progress(1, "waiting")
        (DIRECTORY / f"{key}.waiting").touch()
        while not (DIRECTORY / key).exists():
            if self.id in cancelled:
                (DIRECTORY / f"{key}.cancelled").touch()
            time.sleep(0.01)
        self.progress(2, "released")
        return f"waited for {key}"

    def ask(self, question: str) -> str:
        schema = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
        answer = ask("elicitation/create", {"message": question, "requestedSchema": schema})
        return json.dumps(answer["content"])

    def sample(self, text: str) -> str:
        content = {"type": "text", "text": text}
        params = {"messages": [{"role": "user", "content": content}], "maxTokens": 5}
        return json.dumps(ask("sampling/createMessage", params)["content"])

    def whoami(self) -> str:
        return json.dumps({"pid": os.getpid(), "environment": dict(os.environ)})

    def large(self, size: int) -> str:
        return "x" * size

    def length(self, text: str) -> str:
        return str(len(text))

    def die(self, code: int) -> str:
        os._exit(code)

    def answer_and_die(self, n: int) -> str:
        with output:
            for index in range(n):
                params = {"progressToken": self.token, "progress": index + 1}
                print(json.dumps({"jsonrpc": "2.0", "method": "notifications/progress", "params": params}))
            result = {"content": [{"type": "text", "text": "died"}]}
            print(json.dumps({"jsonrpc": "2.0", "id": self.id, "result": result}), flush=True)
            os._exit(0)

    def close_output(self) -> str:
        os.close(1)
        time.sleep(60)
        return "never seen"

    def leave(self) -> str:
        os._exit(3)

    def child(self) -> str:
        """Start a child that holds the output open."""
        return str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)

    def surrogate(self) -> str:
        return "\ud800"

    def not_a_number(self) -> float:
        return float("nan")

    def garbage(self) -> str:
        with output:
            sys.stdout.write("secret: this is no message\n[]\n{}\n7\n")
            sys.stdout.flush()
        return "written"

    def complain(self, n: int, size: int = 20) -> str:
        for index in range(n):
            sys.stderr.write(f"complaint {index} ".ljust(size, "x") + "\n")
        sys.stderr.flush()
        return "complained"

    def received(self) -> str:
        """The names of what came before this call."""
        return json.dumps(received[:-1])

    def close_input(self) -> str:
        """After the next message."""
        closing.set()
        return "closing"

    def read_again(self, key: str) -> str:
        """Deaf until a file is there."""
        reading.clear()

        def listen() -> None:
            while not (DIRECTORY / key).exists():
                time.sleep(0.01)
            reading.set()

        threading.Thread(target=listen, daemon=True).start()
        return "deaf for now"

    def run(self, name: str) -> None:
        tool: Callable[..., Any] = getattr(self, name)
        try:
            text = tool(**self.arguments)
        except Exception as error:
            send({"id": self.id, "error": {"code": -32603, "message": repr(error)}})
            return
        if self.id not in cancelled:
            send({"id": self.id, "result": {"content": [{"type": "text", "text": text}]}})


def serve(message: dict[str, Any]) -> None:
    received.append(message.get("method", "an answer"))
    match message.get("method"):
        case None:
            with answered:
                answers[message["id"]] = message.get("result")
                answered.notify_all()
        case "initialize":
            if MANNER == "slow":
                time.sleep(1)
            capabilities.update(message["params"].get("capabilities", {}))
            info = {"name": "program", "version": "1"}
            version = message["params"]["protocolVersion"]
            result = {"protocolVersion": version, "capabilities": {"tools": {}, "logging": {}}, "serverInfo": info}
            send({"id": message["id"], "result": result})
        case "notifications/initialized":
            if "roots" in capabilities:
                send({"id": "roots", "method": "roots/list"})
            (DIRECTORY / "initialized").touch()
        case "notifications/cancelled":
            cancelled.add(message["params"]["requestId"])
        case "tools/call":
            call = Call(message)
            threading.Thread(target=call.run, args=(message["params"]["name"],), daemon=True).start()
        case "tools/list":
            send({"id": message["id"], "result": {"tools": [{"name": "echo", "inputSchema": {"type": "object"}}]}})
        case "ping":
            send({"id": message["id"], "result": {}})
        case _ if "id" in message:
            send({"id": message["id"], "error": {"code": -32601, "message": "Method not found"}})


def main() -> None:
    sys.stderr.write(f"program {os.getpid()} starts\n")
    sys.stderr.flush()
    if MANNER == "dies":
        sys.exit(7)
    if MANNER == "noisy":
        print("Welcome to the program!\n\n   key=secret", flush=True)
    if MANNER == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    reading.set()
    for line in sys.stdin:
        if MANNER != "silent":
            serve(json.loads(line))
        reading.wait()
        if closing.is_set():
            os.close(0)
            time.sleep(600)
    if MANNER == "stubborn":
        time.sleep(600)
    (DIRECTORY / f"{os.getpid()}.left").touch()


if __name__ == "__main__":
    main()
