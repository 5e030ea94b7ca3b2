"""Many clients at once: tokens per second of our server and of transformers', and what must hold.

    python benchmarks/serve.py MODEL [--clients 64] [--seconds 60] [--peers]
    python benchmarks/serve.py MODEL --imports          what the server's start imports, by time

MODEL is a chat model's folder, such as the quickstart's runs/quickstart/dpo. A copy of it is served
whose head never chooses to end, so that every answer has the same length whoever writes it. Each
client streams one answer after the other. Of our server is asked that no request fails, that each
text is the one that the same seeded request gets alone, that no client is starved, that memory
stays flat, that a first token comes soon after the model's own prefill, and that it starts quickly.
``--peers`` sends the same load to ``transformers serve`` as it starts by default, and with
--continuous-batching (needs fastapi); a client's tokens are the events that carry text.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUM_TOKENS = 100  # of an answer
NUM_SHORT = 20  # requests by which the wait for a first token is measured
VARIANTS = 2  # different requests of one client, asked in turn
PEERS: dict[str, list[str]] = {
    "transformers serve": [],
    "transformers serve --continuous-batching": ["--continuous-batching"],
}
NEEDED = {"transformers serve": 6.0, "transformers serve --continuous-batching": 1.3}
NEEDED_START_S = 5.0
NEEDED_FIRST_TOKEN_S = 0.050  # beyond the prefill
NEEDED_FAIRNESS = 1 / 3
FLAT = 1.05  # memory of the last third, of the first's


# ---------------------------------------------------------------- the model


def write_endless(source: Path, folder: Path) -> Path:
    """A copy of a chat model that all but never ends a turn: its end token's logit is always 0."""
    import torch
    from safetensors.torch import load_file, save_file

    from open_instruct.encode import load_chat_encoder

    folder.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    weights = load_file(source / "model.safetensors")
    names = [name for name in weights if name.endswith(("lm_head.weight", "embed_out.weight"))]
    assert names, f"{source}: its head is its embedding; take a model with a head of its own"
    encoder = load_chat_encoder(source)
    ends = sorted(encoder.end_of_turn_ids | set(encoder.tokenizer.all_special_ids))
    weights[names[0]][torch.tensor(ends)] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


# ---------------------------------------------------------------- a server in its own process


@dataclass
class Process:
    """A running server."""

    process: subprocess.Popen
    port: int
    start_s: float  # until the first answer to /health
    start_work_s: float  # of that, what all its threads computed


@contextlib.contextmanager
def started(command: Sequence[str], port: int, timeout_s: float = 180) -> Iterator[Process]:
    """The server of this command, once it answers /health, until the block ends."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not _is_healthy(port):
                if process.poll() is not None or time.perf_counter() - began > timeout_s:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(command)} did not start:\n{log.read()[-2000:]}")
                time.sleep(0.01)
            start_s = time.perf_counter() - began
            yield Process(process, port, start_s, processor_seconds(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_healthy(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
            return b" 200 " in connection.recv(100)
    except OSError:
        return False


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def our_command(model: Path, port: int) -> list[str]:
    """Our server."""
    return [sys.executable, "-m", "open_instruct", "serve", str(model), "--port", str(port)]


def peer_command(model: Path, port: int, options: Sequence[str]) -> list[str]:
    """transformers' server."""
    code = "from transformers.cli.transformers import main; main()"
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-c", code, "serve", str(model), *where, *options]


def processor_seconds(pid: int) -> float:
    """What a process has computed so far, in all its threads, the kernel's work for it included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory that a process holds now."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


# ---------------------------------------------------------------- clients


@dataclass
class Load:
    """What the clients saw."""

    seconds: float = 0.0
    tokens: list[int] = field(default_factory=list)  # of each client, in the measured time
    first_s: list[float] = field(default_factory=list)  # of each request, until its first text
    prefill_s: list[float] = field(default_factory=list)  # of its prompt, by the model alone
    texts: list[tuple[tuple[int, int], str]] = field(default_factory=list)  # of whole answers
    errors: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)  # bytes, once a second


def request_body(model: str, client: int, variant: int) -> bytes:
    """The request number ``variant`` of a client."""
    question = f"What do you know of number {client * VARIANTS + variant}? Tell me all."
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "temperature": 1.0,
        "seed": client * VARIANTS + variant,
        "max_tokens": NUM_TOKENS,
    }
    return json.dumps(body).encode()


async def _ask(port: int, body: bytes, load: Load, key: tuple[int, int], end: float | None) -> None:
    """One streamed request; cut short when the time is over."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            load.errors.append((status + await reader.read(2000)).decode("utf-8", "replace"))
            return
        events: list[bytes] = []
        is_first = True
        while line := await reader.readline():
            if not line.startswith(b"data:"):
                continue
            events.append(line)
            if b'"content":"' in line and b'"content":""' not in line:
                now = time.perf_counter()
                if end is not None and now > end:
                    continue  # it is read to its end, for its text, and no longer counted
                load.tokens[key[0]] += 1
                if is_first:
                    load.first_s.append(now - began)
                    is_first = False
        if b"[DONE]" not in (events or [b""])[-1] and b'"finish_reason":"' not in b"".join(events):
            load.errors.append(f"a stream broke off after {len(events)} events")
        load.texts.append((key, _text(events)))
    except (OSError, asyncio.IncompleteReadError) as error:
        load.errors.append(repr(error))
    finally:
        writer.close()


def _text(events: Sequence[bytes]) -> str:
    pieces = []
    for event in events:
        data = event.removeprefix(b"data:").strip()
        if data and data != b"[DONE]":
            for choice in json.loads(data).get("choices", ()):
                pieces.append(choice["delta"].get("content") or "")
    return "".join(pieces)


def stream_many(server: Process, model: str, num_clients: int, seconds: float) -> Load:
    """All clients at once, for some seconds."""
    load = Load(tokens=[0] * num_clients)

    async def client(number: int, end: float) -> None:
        turn = 0
        while time.perf_counter() < end and len(load.errors) < 100:
            key = (number, turn % VARIANTS)
            wait = end - time.perf_counter() + 30
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(
                    _ask(server.port, request_body(model, *key), load, key, end), wait
                )
            turn += 1

    async def watch(end: float) -> None:
        while time.perf_counter() < end:
            load.resident.append(resident_bytes(server.process.pid))
            await asyncio.sleep(min(1.0, seconds / 20))

    async def run() -> None:
        began = time.perf_counter()
        end = began + seconds
        await asyncio.gather(watch(end), *(client(number, end) for number in range(num_clients)))
        load.seconds = seconds

    asyncio.run(run())
    return load


def stream_alone(server: Process, model: str, keys: Sequence[tuple[int, int]]) -> Load:
    """The same requests one after the other."""
    load = Load(tokens=[0] * (1 + max(key[0] for key in keys)))

    async def run() -> None:
        for key in keys:
            await _ask(server.port, request_body(model, *key), load, key, None)

    began = time.perf_counter()
    asyncio.run(run())
    load.seconds = time.perf_counter() - began
    return load


def in_own_process(name: str, server: Process, *arguments: Any) -> Load:
    """``stream_many``, ``_alone`` or ``_beside_prefills`` in a process of its own."""
    given = json.dumps([name, server.process.pid, server.port, *arguments])
    command = [sys.executable, str(Path(__file__).resolve()), "--client", given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return Load(**json.loads(done.stdout.splitlines()[-1]))


def be_client(given: str) -> None:
    """What ``in_own_process`` starts."""
    name, pid, port, *arguments = json.loads(given)

    class Watched:  # only its number is looked at
        def __init__(self) -> None:
            self.pid = pid

    server = Process(Watched(), port, 0.0, 0.0)  # type: ignore[arg-type]
    if name == "alone":
        load = stream_alone(server, arguments[0], [(key[0], key[1]) for key in arguments[1]])
    elif name == "beside":
        load = stream_beside_prefills(server, *arguments)
    else:
        load = stream_many(server, *arguments)
    print(json.dumps(load.__dict__))


# ---------------------------------------------------------------- what must hold


def mixed_up(many: Load, alone: Load) -> list[tuple[int, int]]:
    """The requests whose text was another one than alone."""
    expected = {(client, turn): text for (client, turn), text in alone.texts}
    return [(client, turn) for (client, turn), text in many.texts if expected[client, turn] != text]


def fairness(load: Load) -> float:
    """The slowest client's tokens, of the fastest one's."""
    return min(load.tokens) / max(1, *load.tokens)


def growth(load: Load) -> float:
    """Memory in the last third of the time, of that in the first third (its beginning left out)."""
    third = len(load.resident) // 3
    first, last = load.resident[third // 2 : third], load.resident[-third:]
    return statistics.mean(last) / statistics.mean(first) if first else 1.0


def stream_beside_prefills(server: Process, model: str, number: int, folder: str) -> Load:
    """One request after the other, each right after the model alone has read the same prompt.

    Both meet the same moment of the machine. Each prompt is new to the server and to the model.
    """
    import torch

    from olmo_base.model.generate import load_generator
    from open_instruct.encode import load_chat_encoder

    torch.set_num_threads(1)
    encoder, generator = load_chat_encoder(folder), load_generator(folder)
    load = Load(tokens=[0])
    for variant in range(number):
        body = request_body(model, 0, variant)
        prompt = encoder.encode_prompt(json.loads(body)["messages"])
        began = time.perf_counter()
        next(generator.stream(prompt, max_new_tokens=1))
        load.prefill_s.append(time.perf_counter() - began)
        asyncio.run(_ask(server.port, body, load, (0, variant), None))
    return load


# ---------------------------------------------------------------- from the command line


def described(load: Load) -> str:
    """Speed and waiting of a load."""
    rate = sum(load.tokens) / load.seconds
    first = sorted(load.first_s) or [float("nan")]
    starved = sum(tokens == 0 for tokens in load.tokens)
    return (
        f"{rate:8.0f} tokens/s   first token: median {statistics.median(first) * 1e3:.0f} ms, "
        f"slowest {first[-1] * 1e3:.0f} ms   fairness {fairness(load):.2f}   "
        f"errors {len(load.errors)}" + (f"   {starved} clients without a token" if starved else "")
    )


def judge(what: str, is_met: bool) -> bool:
    """Print one requirement."""
    print(f"  {'yes' if is_met else 'NO '}  {what}")
    return is_met


def measure(options: argparse.Namespace, model: Path) -> bool:
    """All of it; whether all requirements are met."""
    name = str(model)
    port = free_port()
    keys = [(client, turn) for client in range(options.clients) for turn in range(VARIANTS)]
    starts, works = [], []
    for _ in range(2):  # the first reads files from the disk
        with started(our_command(model, port), port) as server:
            starts.append(server.start_s)
            works.append(server.start_work_s)
    with started(our_command(model, port), port) as server:
        starts.append(server.start_s)
        works.append(server.start_work_s)
        short = in_own_process("beside", server, name, NUM_SHORT, name)
        alone = in_own_process("alone", server, name, keys)
        many = in_own_process("many", server, name, options.clients, options.seconds)
    first, prefill = statistics.median(short.first_s), statistics.median(short.prefill_s)
    more = sorted(f - p for f, p in zip(short.first_s, short.prefill_s, strict=True))
    print(
        f"{options.clients} clients, {options.seconds:g} s, {os.cpu_count()} cores, {options.model}"
    )
    print(f"{'open-instruct serve':<42}{described(many)}")
    for error in many.errors[:3]:
        print(f"  error: {error}")
    print(f"{'  one after the other':<42}{described(alone)}")
    wrong = mixed_up(many, alone)
    starts_s = ", ".join(f"{seconds:.1f}" for seconds in starts)
    fair, grown = fairness(many), growth(many)
    met = [
        judge(f"no error ({len(many.errors)})", not many.errors and not alone.errors),
        judge(
            f"{len(many.texts) - len(wrong)} of {len(many.texts)} texts are those given alone",
            bool(many.texts) and not wrong,
        ),
        judge(
            f"the slowest client has {fair:.2f} of the fastest, needed {NEEDED_FAIRNESS:.2f}",
            fair >= NEEDED_FAIRNESS,
        ),
        judge(
            f"memory of the last third is {grown:.3f} of the first's, needed at most {FLAT}",
            grown <= FLAT,
        ),
        judge(
            f"first token after {first * 1e3:.1f} ms; the model alone reads the prompt in "
            f"{prefill * 1e3:.1f} ms: {statistics.median(more) * 1e3:.1f} ms more (slowest "
            f"{more[-1] * 1e3:.1f}), needed at most {NEEDED_FIRST_TOKEN_S * 1e3:.0f}",
            statistics.median(more) <= NEEDED_FIRST_TOKEN_S,
        ),
        judge(
            f"starts in {min(starts):.1f} s ({starts_s}), {min(works):.1f} s of which it computes, "
            f"needed less than {NEEDED_START_S:g}",
            min(starts) < NEEDED_START_S,
        ),
    ]
    if options.peers:
        for peer, extra in PEERS.items():
            with started(peer_command(model, port, extra), port) as server:
                in_own_process("alone", server, name, keys[:2])  # it makes ready at the first
                theirs = in_own_process("many", server, name, options.clients, options.seconds)
            print(f"{peer:<42}{described(theirs)}")
            ratio = sum(many.tokens) / max(1, sum(theirs.tokens))
            what = f"{ratio:.1f} times {peer}, needed {NEEDED[peer]}"
            met.append(judge(what, ratio >= NEEDED[peer]))
    return all(met)


def show_imports(model: Path) -> None:
    """The costliest imports of a server that starts, itself and what it brings along."""
    port = free_port()
    command = our_command(model, port)
    command.insert(1, "-X")
    command.insert(2, "importtime")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        while not _is_healthy(port):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        log.seek(0)
        lines = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \|( +)(\S+)", log.read())
    print("  own ms   with its imports   module")
    for own, whole, _, module in sorted(lines, key=lambda line: -int(line[1]))[:40]:
        print(f"{int(own) / 1e3:8.1f}   {int(whole) / 1e3:16.1f}   {module}")


def main() -> int:
    """Measure and print; 1 if something needed is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        be_client(options.client)
        return 0
    if options.imports:
        show_imports(options.model)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return 0 if measure(options, write_endless(options.model, Path(folder) / "model")) else 1


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
