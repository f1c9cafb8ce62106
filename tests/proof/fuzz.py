"""Gives the decoders what nobody has thought of, and looks what they make of it.

    python -m proof.fuzz --seconds 300

begins with the good documents of each kind and the hostile files of `tests/hostile`, and changes
them: their structure, their values, their text and their bytes. Where `atheris` is installed, it is
led by which code was reached; else changes are random alone. What a decoder must do, and must not,
says `proof.decoding`; with little memory is 64 MiB, in little time a second of the processor's.

Each new fault is written to `tests/hostile/found`, where the tests try it from then on.
"""

import copy
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

from proof import decoding, hostile
from proof.record import Campaign, Row, parser

MEMORY_BYTES = 64 << 20
LIMIT_S = 1.0
FOUND = hostile.DIRECTORY / "found"
KINDS = tuple(hostile.good())

# What a value may become: numbers at the edges of their types, and what is no number.
VALUES = (
    0, 1, -1, 2, 7, 63, 64, 65, 255, 4095, 4096, 4097, 1 << 31, (1 << 32) - 1, 1 << 32,
    (1 << 53) + 1, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**30, 0.5, -0.0, 1e308,
    True, False, None, "", "0", "1", "a", "b", "..", "/", "a/b", "a\0", "\\", "\ud800", "x" * 300,
    "float32", "int8", "object", "O", "whole", "0.0 of 1.1", "none", "list", "dict", "tuple",
    "prng_key", "float", "bytes", "array", "scalar", "array beside", [], {}, [[]], [0], [0, 0],
    {"__stepsave__": ["tuple", []]}, {"version": 1, "notes": []},
)  # fmt: skip
PIECES = (b"NaN", b"-Infinity", b"1e999", b"\xff", b"\\ud800", b'"', b"{", b"[", b"}", b",", b"\n")


def mutate(document, rng):
    """Returns a document with some of its values changed, removed, doubled or exchanged."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        places = []
        _walk(document, places)
        if not places:
            return rng.choice(VALUES)
        parent, key = rng.choice(places)
        how = rng.randrange(6)
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif how == 2:
            other, there = rng.choice(places)
            parent[key] = copy.deepcopy(other[there])
        elif how == 3 and type(parent[key]) is int:
            parent[key] += rng.choice((-4096, -64, -8, -1, 1, 8, 64, 4096))
        elif how == 4 and isinstance(parent, dict):
            parent[str(rng.choice(VALUES))] = parent.pop(key)
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return document


def _walk(node, places):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        places.append((node, key))
        if isinstance(value, (dict, list)):
            _walk(value, places)


def garble(data, rng):
    """Returns bytes with some of them changed, removed, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(4)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at : at + rng.choice((1, 2, 8, 64))]
        elif how == 2:
            data[at:at] = data[at : at + rng.choice((1, 2, 8, 64))]
        else:
            data[at:at] = rng.choice(PIECES)
    return bytes(data)


def seeds():
    """Bodies to begin with, by kind: without the line of a marker, which is made anew."""
    found = {kind: [hostile.dump(document)] for kind, document in hostile.good().items()}
    for path in sorted(hostile.DIRECTORY.glob("*/*")):
        kind = path.parent.name if path.parent != FOUND else path.name.partition("-")[0]
        data = path.read_bytes()
        found[kind].append(data.partition(b"\n")[2] if data.startswith(b"stepsave-") else data)
    return found


def complete(kind, body, rng):
    """What is decoded: of a marker also its line, which is right most of the time."""
    if kind not in ("marker", "claim"):
        return body
    data = hostile.prove(body, 1 if kind == "marker" else 2)
    return garble(data, rng) if rng.randrange(8) == 0 else data


class Findings:
    """Tries bytes, and keeps the first of each fault."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.known = {}
        self.executions = dict.fromkeys(KINDS, 0)

    def check(self, kind, data):
        self.executions[kind] += 1
        began_s = time.thread_time()
        fault = decoding.fault_of(kind, data)
        took_s = time.thread_time() - began_s
        if not fault and took_s > LIMIT_S:
            fault = "takes long"
        if fault and (kind, fault) not in self.known:
            name = f"{kind}-{hashlib.sha256(data).hexdigest()[:12]}"
            self.known[kind, fault] = name
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / name).write_bytes(data)
            print(f"FOUND {name}: {fault}", flush=True)  # noqa: T201


def bound_memory(left_bytes=MEMORY_BYTES):
    """Has fail what needs more memory than that beside what the process has now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = used + left_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def by_chance(findings, options):
    """Changes by chance alone, until there were enough or the time is over."""
    rng = random.Random(options.seed)
    corpus, end_s = seeds(), time.monotonic() + options.seconds
    documents = hostile.good()
    bound_memory()
    for number in range(options.executions):
        if number % 256 == 0 and time.monotonic() > end_s:
            break
        kind = KINDS[number % len(KINDS)]
        if rng.randrange(4):
            body = hostile.dump(mutate(documents[kind], rng))
        else:
            body = rng.choice(corpus[kind])
        if rng.randrange(4) == 0:
            body = garble(body, rng)
        findings.check(kind, complete(kind, body, rng))
    done = sum(findings.executions.values())
    print(f"Done {done} runs, {findings.executions}", flush=True)  # noqa: T201


def led(findings, options):
    """As atheris has it, by which code is reached. Never returns."""
    import atheris

    for name, module in list(sys.modules.items()):
        for key, found in list(vars(module).items()) if name.startswith("stepsave.format.") else ():
            if isinstance(found, types.FunctionType) and found.__module__ == name:
                setattr(module, key, atheris.instrument_func(found))
    rng = random.Random(options.seed)
    documents = hostile.good()

    def test(data):
        kind = KINDS[data[0] % len(KINDS)] if data else "layout"
        findings.check(kind, complete(kind, data[1:], random.Random(len(data))))

    def change(data, max_size, seed):
        rng.seed(seed)
        number = data[0] % len(KINDS) if data else rng.randrange(len(KINDS))
        try:
            document = json.loads(data[1:])
        except (ValueError, RecursionError):
            document = documents[KINDS[number]]
        if rng.randrange(3) == 0:
            return atheris.Mutate(data, max_size)
        try:
            body = hostile.dump(mutate(document, rng))
        except (TypeError, AttributeError, RecursionError):  # it was no container
            body = hostile.dump(mutate(documents[KINDS[number]], rng))
        return (bytes([number]) + body)[:max_size]

    corpus = Path("corpus")
    corpus.mkdir()
    for number, kind in enumerate(KINDS):
        for i, body in enumerate(seeds()[kind]):
            (corpus / f"{kind}-{i}").write_bytes(bytes([number]) + body)
    bound_memory()
    flags = [f"-runs={options.executions}", f"-max_total_time={options.seconds:.0f}"]
    flags += [f"-seed={options.seed % (1 << 31)}", "-max_len=16384", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], test, custom_mutator=change)
    atheris.Fuzz()


def main(arguments=None):
    options = parser("fuzz", __doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=300.0)
    options.add_argument("--executions", type=int, default=1 << 40)
    options.add_argument("--found", type=Path, default=FOUND, help="where findings go")
    options.add_argument("--engine", choices=("chance", "atheris"), help="atheris, if it is there")
    options.add_argument("--child", choices=("chance", "atheris"), help="for this campaign itself")
    options = options.parse_args(arguments)
    if options.child:
        run = led if options.child == "atheris" else by_chance
        return run(Findings(options.found), options)
    if options.quick:
        options.seconds = min(options.seconds, 20.0)
    engine = options.engine
    if engine is None:
        engine = "atheris" if importlib.util.find_spec("atheris") else "chance"
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        campaign = Campaign("fuzz", options, work)
        output = _run_child(engine, options, work)
    found = re.findall(r"^FOUND (\S+: .*)$", output, re.MULTILINE)
    (done,) = re.findall(r"^Done (\d+) runs", output, re.MULTILINE)
    how = "led by what is reached (atheris)" if engine == "atheris" else "at random"
    what = f"decoders of {', '.join(KINDS)}, inputs changed {how}"
    campaign.add(Row(what, int(done), len(found), "; ".join(found)))
    return int(campaign.bad > 0)


def _run_child(engine, options, work):
    """In a process of its own, which is bounded, and which a crash of the interpreter would end."""
    asked = {
        "--seconds": options.seconds,
        "--executions": min(options.executions, (1 << 31) - 1),
        "--found": options.found.resolve(),
        "--seed": options.seed,
        "--child": engine,
    }
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    child = subprocess.run(
        [sys.executable, "-m", "proof.fuzz", *(str(one) for pair in asked.items() for one in pair)],
        cwd=work,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=options.seconds + 600,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError(f"ended with {child.returncode}:\n{child.stdout[-4000:]}")
    return child.stdout


if __name__ == "__main__":
    sys.exit(main())
