"""The tests of Rundown-Workers: real engines, real workers, real kills, and what came of them.

    python -m pytest                    all of it, in under two minutes
    python -m pytest -k "lease"         what has a word in its name

Each test talks to an engine as a stranger would: over HTTP, by signals, through the SDK in a
process of its own. Engines listen on a free port of 127.0.0.1 with a database in a temporary
folder. Where time has to pass, the engine runs in this process on a clock that the test moves.
The sections follow the engine's manual, then the SDK's, then the README.
"""

import contextlib
import datetime
import hashlib
import http.client
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import rundown_engine

# -- helpers: engines, calls, waiting, processes -------------------------------------------------

HERE = Path(__file__).resolve().parent
LINUX = sys.platform.startswith("linux")
POSIX = os.name == "posix"
STATUSES = ["pending", "running", "done", "failed", "cancelled"]


def until(condition, seconds=15.0):
    """The first true value of `condition()`; asked again and again, and no longer than `seconds`."""
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
    """One engine through HTTP. `call` is any request; `post` and `get` are those that must succeed."""

    def __init__(self, url):
        self.url = url
        self.host, port = url.split("//")[1].split(":")
        self.port = int(port)

    def connect(self, timeout=30):
        """A keep-alive connection of one's own, for `call(..., over=connection)`."""
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def call(self, method, path, body=None, headers=None, over=None):
        """(status, JSON value or text) of one request; `body` is a JSON value, or bytes as they are."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        with contextlib.closing(self.connect()) if over is None else contextlib.nullcontext(over) as connection:
            connection.request(method, path, body, {**kind, **(headers or {})})
            self.response = response = connection.getresponse()
            text = response.read()
        if response.getheader("Content-Type", "").startswith("application/json"):
            return response.status, json.loads(text)
        return response.status, text.decode() if text else None

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
        """(status, answer) of /complete, /fail, /heartbeat or /release for a job as /poll gave it."""
        return self.call("POST", "/" + verb, {"id": job["id"], "attempt": job["attempt"], **fields})

    def job(self, job):
        return self.get("/jobs/" + (job if isinstance(job, str) else job["id"]))

    def row(self, job):
        """A job without the sentence that says how it stands now: equal as long as nothing changed."""
        return {name: value for name, value in self.job(job).items() if name != "why"}

    def count(self, queue):
        return len(self.get("/jobs?limit=1000&queue=" + queue)["jobs"])

    def raw(self, data, seconds=5.0, end=False):
        """All bytes that come back for `data` until the engine closes, or for `seconds`."""
        with socket.create_connection((self.host, self.port), timeout=seconds) as connection:
            return exchange(connection, data, end)


def exchange(connection, data, end=False):
    """Sends `data` (and the end of the stream, with `end`) and reads until close, reset or timeout."""
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


class Engine(Api):
    """A real engine process on a database in `folder`. What it writes on stderr is in `log()`."""

    def __init__(self, folder, *options, prefix=(), env=None, **settings):
        self.folder, self.database = folder, folder / "jobs.db"
        self.start(*options, prefix=prefix, env=env, **settings)

    def start(self, *options, prefix=(), env=None, **settings):
        command = [*prefix, sys.executable, str(HERE / "rundown_engine.py"), "--db", str(self.database),
                   "--port", "0", *options]
        with open(str(self.folder / "engine.log"), "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL,
                cwd=str(self.folder), env=environment(env), **settings)
        self.line = self.process.stdout.readline().decode()
        found = re.search(r"https?://[\w.]+:\d+", self.line)
        assert found, (self.line, self.log())
        super().__init__(found.group())
        return self

    def kill(self):
        """kill -9: nothing is flushed, nothing is said."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stop(self, number=signal.SIGTERM):
        """Ends it as a supervisor would; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number if POSIX else signal.SIGTERM)
        status = self.process.wait(15)
        self.process.stdout.close()
        return status

    def log(self):
        return (self.folder / "engine.log").read_text(errors="replace")


def environment(extra=None):
    """This process's variables without those that steer Rundown, and with a path to the two modules."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RUNDOWN_")}
    return {**kept, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1", **(extra or {})}


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.wall, self.steady = 1.8e9, 1000.0

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
        self.folder, self.clock = folder, clock or Clock()
        self.start()

    def start(self):
        self.server = rundown_engine.make_server(str(self.folder / "jobs.db"), port=0, clock=self.clock)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        super().__init__(self.server.url)

    def advance(self, seconds):
        """Lets time pass, a second at a time: one leap would look like a machine that was suspended."""
        while seconds > 0:
            step = min(1.0, seconds)
            self.clock.move(step)
            self.server.store.tick()
            seconds = round(seconds - step, 6)

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The engine that most tests share, each with a queue of its own. No traceback may be in its log."""
    engine = Engine(tmp_path_factory.mktemp("engine"))
    yield engine
    assert engine.stop() == 0
    assert "Traceback" not in engine.log()


@pytest.fixture
def own(tmp_path):
    """Starts engines that a test may kill: `own()`, `own("--option", ...)`. Ended when the test is."""
    started = []

    def start(*options, folder=tmp_path, **settings):
        started.append(Engine(folder, *options, **settings))
        return started[-1]

    yield start
    for engine in started:
        if engine.process.poll() is None:
            engine.kill()
        assert "Traceback" not in engine.log(), engine.log()


@pytest.fixture(scope="module")
def clocked(tmp_path_factory):
    """The engine on a moved clock that most tests of time share."""
    engine = ClockedEngine(tmp_path_factory.mktemp("clocked"))
    yield engine
    engine.stop()


@pytest.fixture
def q():
    """A queue's name that nobody else uses."""
    return "q%d" % next(NUMBERS)


NUMBERS = itertools.count(1)


@contextlib.contextmanager
def meanwhile(function, *arguments, **fields):
    """Runs `function` in a thread during the block; `.result(seconds)` of the value waits for it."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function, *arguments, **fields)


@contextlib.contextmanager
def waiting(api, queue, number=1, **fields):
    """`number` long polls that are under way when the block begins: a list of futures of what they got."""
    with ThreadPoolExecutor(number) as pool:
        polls = [pool.submit(api.poll, queue, **{"wait": 20, **fields}) for _ in range(number)]
        time.sleep(0.15 + number * 0.01)
        yield polls


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
    elif (verb, status) == ("complete", "done"):
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


def test_enqueue_warns_when_no_worker_ever_polled_the_queue(engine, q):
    engine.poll("thumbnails")
    assert "thumbnails" in engine.enqueue("thumbnials")["warning"]
    assert "warning" not in engine.enqueue("thumbnails")


def test_an_unknown_field_suggests_the_nearest_known_one(engine, q):
    code, answer = engine.call("POST", "/enqueue", {"queue": q, "max_retrys": 3})
    assert code == 400 and "max_retrys" in answer["error"] and "max_retries" in answer["error"]


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


@pytest.mark.parametrize("text", ["tomorrow", "2030-01-02", "2030-13-01T00:00:00Z", "2030-01-02T03:04:05", "12", ""])
def test_a_run_at_that_is_no_time_is_refused(engine, q, text):
    code, answer = engine.call("POST", "/enqueue", {"queue": q, "run_at": text})
    assert code == 400 and "run_at" in answer["error"]


def test_delay_and_run_at_together_are_refused(engine, q):
    code, answer = engine.call("POST", "/enqueue", {"queue": q, "delay": 1, "run_at": written(5)})
    assert code == 400 and "run_at" in answer["error"]


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
    with waiting(engine, q, 8, wait=1.5) as polls:
        engine.post("/enqueue", jobs=[{"queue": q, "payload": number} for number in range(3)])
        got = [poll.result(10) for poll in polls]
    assert sorted(job["payload"] for job in got if job) == [0, 1, 2]


def test_a_wake_up_is_not_lost_when_jobs_come_one_by_one(engine, q):
    with waiting(engine, q, 10) as polls:
        for number in range(10):
            engine.enqueue(q, number)
        assert sorted(poll.result(10)["payload"] for poll in polls) == list(range(10))


def test_jobs_of_one_queue_do_not_wake_the_polls_of_another(engine, q):
    with waiting(engine, q, wait=0.8) as [poll]:
        engine.enqueue(q + "x")
        assert poll.result(10) is None


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
        clocked.advance(5 * number ** 2 - 0.001)
        assert clocked.poll(q) is None
        clocked.advance(0.001)
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


def test_release_counts_nothing_but_the_claim(engine, q):
    job = engine.enqueue(q, max_retries=1)
    for _ in range(5):
        assert engine.tell("release", engine.poll(q)) == (200, {"id": job["id"], "status": "pending"})
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


def test_a_job_of_a_lost_worker_comes_back_after_the_backoff_and_not_before(clocked, q):
    clocked.enqueue(q, timeout=10, max_retries=1)
    clocked.poll(q, lease=2)
    clocked.advance(2)
    lost_at = clocked.clock.time()
    job = clocked.get("/jobs?queue=" + q)["jobs"][0]
    assert (job["status"], when(job["next_run_at"])) == ("pending", lost_at + 5)
    clocked.advance(4.999)
    assert clocked.poll(q) is None
    clocked.advance(0.001)
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
    clocked.server.store.tick()
    assert clocked.tell("heartbeat", claim)[0] == 200
    clocked.advance(9.9)
    assert clocked.job(claim)["status"] == "running"
    clocked.advance(0.2)
    assert clocked.job(claim)["status"] == "pending"


def test_a_wall_clock_set_back_freezes_no_pending_job(clocked, q):
    job = clocked.enqueue(q)
    clocked.clock.wall -= 3600
    clocked.server.store.tick()
    assert clocked.poll(q)["id"] == job["id"]


def test_a_wall_clock_set_back_freezes_no_retry(clocked, q):
    clocked.enqueue(q, max_retries=1)
    clocked.tell("fail", clocked.poll(q))
    clocked.clock.wall -= 3600
    clocked.advance(5.1)
    assert clocked.poll(q)["attempt"] == 2


def test_a_suspended_engine_gives_its_workers_a_grace_pass(tmp_path, q):
    engine = ClockedEngine(tmp_path)
    engine.enqueue(q)
    claim = engine.poll(q, lease=2)
    engine.clock.move(600)
    engine.server.store.tick()
    assert engine.tell("heartbeat", claim)[0] == 200
    engine.advance(2.1)
    assert engine.job(claim)["status"] == "pending"
    engine.stop()


def test_a_restart_of_the_engine_keeps_leases(tmp_path, q):
    engine = ClockedEngine(tmp_path)
    engine.enqueue(q, timeout=1000)
    claim = engine.poll(q, lease=100)
    engine.advance(50)
    engine.stop()
    engine.start()
    engine.advance(49)
    assert engine.job(claim)["status"] == "running"
    engine.advance(1.1)
    assert engine.job(claim)["status"] == "pending"
    engine.stop()


@pytest.mark.parametrize("lease, grace", [(2, 5), (20, 20)])
def test_a_restart_gives_overdue_leases_one_grace_period(tmp_path, q, lease, grace):
    engine = ClockedEngine(tmp_path)
    engine.enqueue(q, timeout=1000)
    claim = engine.poll(q, lease=lease)
    engine.stop()
    engine.clock.move(600)
    engine.start()
    engine.advance(grace - 0.1)
    assert engine.job(claim)["status"] == "running"
    engine.advance(0.2)
    assert engine.job(claim)["status"] == "pending"
    engine.stop()


def test_a_sweep_and_a_complete_at_the_same_instant_have_one_winner(clocked, q):
    for number in range(100):
        clocked.enqueue(q, number)
        claim = clocked.poll(q, lease=1)
        clocked.clock.move(1)
        with meanwhile(clocked.server.store.tick) as sweep:
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


def test_jobs_are_found_by_queue_status_and_tag(engine, q):
    engine.enqueue(q, 1, tag="a")
    engine.enqueue(q, 2, tag="b")
    engine.tell("complete", engine.poll(q))
    found = lambda query: [job["payload"] for job in engine.get("/jobs?queue=%s&%s" % (q, query))["jobs"]]
    assert (found("status=done"), found("status=pending"), found("status=failed")) == ([1], [2], [])
    assert (found("tag=b"), found("tag=b&status=done")) == ([2], [])


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "status=odd", "after=nobody", "colour=red",
                                   "queue=", "limit=1&limit=2"])
def test_a_bad_query_is_refused_and_names_its_part(engine, query):
    code, answer = engine.call("GET", "/jobs?" + query)
    assert code in (400, 404) and query.split("=")[0] in answer["error"]


def test_queues_are_counted_by_status(engine, q):
    for status in STATUSES:
        job_in(engine, status, q) if status != "pending" else None
    engine.enqueue(q)
    engine.enqueue(q, delay=100)
    row = {row["queue"]: row for row in engine.get("/queues")["queues"]}[q]
    assert [row[status] for status in STATUSES] == [2, 1, 1, 1, 1]
    assert (row["scheduled"], row["paused"]) == (1, False) and row["oldest_age"] >= 0
    assert sum(row["minutes"]["done"]) == 1 and len(row["minutes"]["failed"]) == 60


def test_queues_names_the_workers_that_polled(engine, q):
    engine.poll(q, worker="w-" + q, hung=2)
    answer = engine.get("/queues")
    row = {row["queue"]: row for row in answer["queues"]}.get(q)
    worker = {worker["worker"]: worker for worker in answer["workers"]}["w-" + q]
    assert (worker["queue"], worker["hung"]) == (q, 2)
    assert row is None or row["workers"] == ["w-" + q]


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
    jobs = [job_in(engine, status, q) for _ in range(3 if status != "pending" else 1)]
    other, spared = job_in(engine, status, q + "x"), job_in(engine, "done", q)
    assert engine.post("/" + verb, queue=q, status=status) == {"count": len(jobs)}
    assert {engine.job(job)["status"] for job in jobs} == {becomes}
    assert (engine.job(other)["status"], engine.job(spared)["status"]) == (status, "done")


@pytest.mark.parametrize("verb, body", [
    ("cancel", {"status": "pending"}), ("cancel", {"queue": "q"}), ("cancel", {"queue": "q", "status": "done"}),
    ("retry", {"queue": "q", "status": "running"}), ("retry", {}), ("retry", {"queue": "q"}),
    ("purge", {"status": "running"}), ("purge", {}), ("purge", {"status": "odd"}), ("pause", {}), ("resume", {}),
])
def test_steering_without_a_clear_aim_is_refused(engine, verb, body):
    code, answer = engine.call("POST", "/" + verb, body)
    assert code == 400 and re.search("queue|status|id", answer["error"])


def test_purge_deletes_by_status_and_never_what_runs(engine, q):
    jobs = {status: job_in(engine, status, q) for status in STATUSES[1:]}
    assert engine.post("/purge", queue=q, status="failed") == {"count": 1}
    assert engine.call("GET", "/jobs/" + jobs["failed"]["id"])[0] == 404
    assert engine.post("/purge", queue=q) == {"count": 2}
    assert [job["status"] for job in engine.get("/jobs?queue=" + q)["jobs"]] == ["running"]


def test_a_large_purge_goes_in_steps_that_hold_nobody_up(own, q):
    engine = own()
    for _ in range(3):
        engine.post("/enqueue", jobs=[{"queue": q, "payload": "x" * 100}] * 10000)
    slowest = 0
    with meanwhile(engine.post, "/purge", queue=q) as purge:
        while not purge.done():
            began = time.monotonic()
            engine.enqueue("other")
            slowest = max(slowest, time.monotonic() - began)
        assert purge.result() == {"count": 30000}
    assert slowest < 1


def test_a_paused_queue_takes_jobs_and_hands_out_none(engine, q):
    assert engine.post("/pause", queue=q) == {"queue": q, "paused": True}
    engine.enqueue(q)
    assert engine.poll(q) is None
    assert {row["queue"]: row["paused"] for row in engine.get("/queues")["queues"]}[q] is True
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
