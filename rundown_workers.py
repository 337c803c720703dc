"""Rundown workers: functions as background jobs, and the client of a Rundown engine.

    import rundown_workers as rw

    @rw.queue(name="images", max_retries=5)
    def make_thumbnail(payload):
        ...

    if __name__ == "__main__":
        rw.enqueue("images", "path/to/image.jpg")   # or make_thumbnail.enqueue("path/to/image.jpg")
        rw.run()                                    # works until SIGTERM or SIGINT

One file without dependencies: copy and import it. The engine (rundown_engine.py) keeps the jobs.
RUNDOWN_URL is its URL (http://localhost:8181), RUNDOWN_TOKEN its token, RUNDOWN_CA the file of a
private certificate authority. If the URL names several engines, separated by blanks, a client
uses one of them until it stops answering, then the next.

A JOB'S WAY THROUGH A WORKER
    poll --> claimed --> slot: handler --> outcome --> report
               |                 |                       |
               | 1 s not begun   | timeout: fail         | no answer: kept and sent again
               +--> release      | claim lost: dropped   | 404, 409: the claim is gone, dropped

A queue has one long poll and `concurrency` slots; each slot is a thread, or a task of the event
loop that all async handlers share. When jobs are short, the worker prefetches: at most as many as
its slots start within 100 ms at their recent pace. Outcomes are collected while a request is in
flight, and sent together in the next one. Every third of the lease one heartbeat extends the
leases of all claims.

PRODUCING
    enqueue(queue, payload, ...)        add a job; returns it, a dict with wait(timeout),
                                        result(timeout), refresh(), cancel(), retry()
        timeout, max_retries, tag       seconds of an attempt; retries after failures; a label
        delay, run_at                   when it is due: seconds from now, or a time
        expires                         seconds from then; cancelled if it has not started
        priority                        higher ones are claimed first
        after, after_any                jobs or ids that have to be done first; with after_any=True
                                        they only have to end
        group                           its jobs run one at a time, in order
        key, key_until, replace         one job at a time has a key: enqueueing a second one
                                        returns the first, or replaces it
        id, give_up                     see below
    enqueue_many(queue, payloads, ...)  a job for each payload; each request is all or nothing
    get(id), wait(job, timeout)         a job; the finished job
    results(jobs, timeout)              the results of many jobs
    schedule(name, queue, cron, every, zone, payload), unschedule(name)     a job at each tick
    await aenqueue(...), job.aresult(timeout)       the same for asyncio programs: their event
                                        loops are never blocked
    Client(host, token, timeout, ca)    one method per call of the engine

The client chooses the job's id, so enqueue() is idempotent: while no engine answers it is sent
again for `give_up` seconds (30), and then raises EngineUnavailable. A call that the engine
refuses raises Refused at once; a proxy's error page does not count as a refusal. A run_at is a
datetime (local time if it has no zone) or text like 2030-01-31T12:00:00Z. A duration is a number
of seconds or a timedelta.

WORKING
    @queue(name, max_retries, timeout, concurrency, isolate, max_jobs, backoff, retry_on, abort_on,
           host, poll_interval, cron, every, zone, max_running, rate)
                                        one handler of payloads for a queue; run() sends cron,
                                        every, zone, max_running and rate to the engine
    @task(queue="default", name, ...)   one of a queue's tasks: add.delay(4, y=4), add.adelay(4),
                                        add.options(delay=60).delay(4), add.schedule(name, cron=...)
    job(), inputs(), progress(value)    in a handler: the job; the results of its dependencies;
                                        show a JSON value as its progress
    step(name, function, *args)         run a part once: later attempts get its result
    checkpoint(value)                   progress() that returns once the value is on disk
    track(items, total, every)          iterate and report how many items are done; with `every` a
                                        later attempt continues at the last checkpoint
    raise Retry(delay=60)               fail this attempt; the next one follows in 60 s
    raise Abort("why")                  fail for good
    @on("start" | "success" | "failure" | "lost")   hook(job, value) at each attempt, with the
                                        value None, the result, or the exception
    @on("start_worker" | "stop_worker") hook() in each process that runs handlers
    @around                             a generator that yields once, around each run of a handler
    run(burst, grace, max_hung), stop() burst: run the due jobs, and return
    testing()                           with testing() as t: t.run(delayed=True);
                                        t.advance(60) moves the clock of its engine

The return value of a handler is the result. Any exception fails the job with its traceback; a
result that is not JSON fails it for good. A task's payload is {"task": name, "args": [],
"kwargs": {}}; its name is the one under which it is imported, however its module is started.

At its timeout, Timeout is raised inside a handler; when its claim is lost, Lost is. Async handlers
are cancelled instead. The slot is free at once, even if the thread does not react. Threads that
never return are hung: when there are max_hung (10) the worker drains and exits with 1.

With isolate=True the handler runs in a process of its own, which is killed with its children, and
replaced after max_jobs. It is imported there by its name, so a script needs
`if __name__ == "__main__":` around its run(). Isolate handlers that call C code which keeps the
interpreter's lock for more than 30 s: it stops the worker's heartbeats, so another worker gets the
job. Isolate handlers that start programs: interrupting a thread does not end its programs, but
killing a process does.

Async handlers must not block the event loop; one that does so for more than a second is logged.
If it does not even end at its timeout, the loop is replaced, and the handlers that were suspended
on it fail with CancelledError and are retried. They use `await step(...)` with a coroutine
function, `await checkpoint(...)` and `async for item in track(...)`. Each job has its own context
variables. job() also works in threads and thread pools of a handler.

A handler must not wait for a job of its own queue that needs its slot: if it holds the only one,
and no other worker polls the queue, the wait raises Error at once.

SIGTERM, SIGINT, SIGHUP or SIGQUIT: no more jobs are taken, running ones have `grace` seconds (30),
the others are released, and the worker exits with 0. A handler that reaches a step or checkpoint
gets Lost there, and its job is released at once; the handler has the rest of the grace to clean up.
A second signal exits at once.

The log is logging.getLogger("rundown"), on stderr where logging is not set up; other loggers are
for the program to set up. It has a line for each failed attempt, and for up to 100 done jobs of a
queue a second; further ones are counted. The engine keeps the schedules and limits of decorators
that were removed; the log names them, with the command that deletes them.

ANY PROGRAM AS A WORKER
    python rundown_workers.py exec QUEUE [--concurrency N] [--timeout S] [--text] -- PROGRAM ARGS...

The program runs once for each job, in a process group of its own. Its stdin is the payload as JSON
(with --text a string is not quoted). RUNDOWN_ID, RUNDOWN_QUEUE and RUNDOWN_ATTEMPT are in its
environment, RUNDOWN_TOKEN is not. Exit code 0: done; stdout (UTF-8, up to 1 MiB) is the result,
parsed as JSON if possible, otherwise text. 65: failed for good. Any other: failed, with the end of
stderr. At the timeout, when the claim is lost and when the grace is over, the group gets SIGTERM,
and SIGKILL after 5 s. Processes that the program leaves in its group are killed.

PRODUCERS WITH A DATABASE OF THEIR OWN
    enqueue_in(connection, queue, payload, ...)
                                write a job into the open transaction of a connection of sqlite3,
                                psycopg, psycopg2, SQLAlchemy or Django; returns its id
    forward(connect, host, keep)
                                send the committed jobs of the database that connect() opens
    forwarding(connect, host, keep, interval)
                                a context that does so in a thread

The job exists if and only if the transaction commits. It waits in the table rundown_outbox, which
is made on first use, until the engine has it. Jobs arrive in order and once, whichever process is
killed. A job that the engine refuses stays in the table with its `error`, and holds up no other;
set `error` to NULL to send it again. Connections in autocommit mode are rejected.

DJANGO (6.0 and newer)
    TASKS = {"default": {"BACKEND": "rundown_workers.DjangoBackend", "OPTIONS": {"outbox": True}}}
    python rundown_workers.py django [QUEUE ...]
                                the worker; it forwards the outbox, and needs
                                DJANGO_SETTINGS_MODULE

With `outbox` (True, or the alias of a database) a task runs if and only if the open transaction
commits. Other OPTIONS: host, max_retries, timeout. As around a request, database connections that
are broken or too old are closed around each task. task_finished is sent after the last attempt.

COMMAND LINE
    python rundown_workers.py COMMAND --help        enqueue, status, jobs, queues, top, cancel, ...

JSON on a pipe, a table on a terminal. Exit codes: 0, 1 refused or failed, 2 misused, 3 no engine.
"""
# ruff: noqa: N818 - the names of the exceptions are public and older than that rule
# Public names are annotated, for the type checkers of users. The rest is not:
# mypy: ignore-errors
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportOptionalContextManager=false
# pyright: reportOptionalIterable=false, reportOptionalMemberAccess=false
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportReturnType=false
# pyright: reportOverlappingOverload=false

from __future__ import annotations

import argparse
import atexit
import builtins
import collections
import contextlib
import contextvars
import copy
import ctypes
import datetime
import difflib
import dis
import encodings
import functools
import glob
import hashlib
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import logging
import multiprocessing
import operator
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import urllib.parse
import urllib.request
from http import HTTPStatus
from queue import Empty, SimpleQueue
from typing import (
    TYPE_CHECKING,
    Any,
    AsyncIterator,
    Callable,
    Dict,
    Generic,
    Iterable,
    Iterator,
    NamedTuple,
    TypeVar,
    overload,
)

if TYPE_CHECKING:
    from typing import Coroutine, Protocol

    import typing_extensions

__all__ = [
    'Abort',
    'App',
    'Client',
    'Crashed',
    'EngineUnavailable',
    'Error',
    'Failed',
    'Hung',
    'Interruption',
    'Job',
    'Lost',
    'Misuse',
    'NotJSON',
    'Refused',
    'Retry',
    'Timeout',
    'Unfinished',
    'aenqueue',
    'around',
    'checkpoint',
    'enqueue',
    'enqueue_in',
    'enqueue_many',
    'forward',
    'forwarding',
    'get',
    'inputs',
    'job',
    'on',
    'progress',
    'queue',
    'results',
    'run',
    'schedule',
    'step',
    'stop',
    'task',
    'testing',
    'track',
    'unschedule',
    'wait',
]

__version__ = '1.2'

# -- Settings --------------------------------------------------------------------------------------
DEFAULT_URL = 'http://localhost:8181'   # the engine, if neither `host` nor RUNDOWN_URL is given
EXAMPLE_URL = 'http://127.0.0.1:8181'   # in error messages

# the client
CLIENT_TIMEOUT = 30         # seconds for which a call is retried while no engine answers
RESPONSE_TIMEOUT = 10       # seconds to connect, or for a worker's request besides its `wait`
MIN_LAST_TRY = 1            # seconds that the last try of a call has at least
MAX_TRY = 60                # seconds that any try has at most, in addition to its `wait`
PROBE_TIMEOUT = 5           # seconds in which an engine has to answer a probe
LONG_CHANGE = 600           # seconds that an engine may take to change all jobs of a queue
RETRY_PAUSE = 0.1           # seconds before the second try; doubles with each try
MAX_RETRY_PAUSE = 3         # seconds: the longest such pause
STILL_TRYING_AFTER = 1      # seconds until a producer on a terminal says that no engine answers
MAX_RETRY_AFTER = 60        # seconds: the longest Retry-After that is obeyed
MAX_DELAY = 3650 * 86400    # seconds: the longest delay that an engine accepts
MAX_BATCH = 1000            # jobs in a poll, a report or an enqueue
MAX_BATCH_AFTER = 20_000    # dependencies of the jobs in an enqueue
MAX_BATCH_BYTES = 1_000_000  # bytes of a request with several jobs; proxies often take 1 MiB
MAX_ASYNC_CALLS = 100       # concurrent short calls of asyncio programs
MAX_ASYNC_WAITS = 2000      # concurrent long polls of asyncio programs that wait for a job
CROWDED_POLL = 1            # seconds of such a long poll while more of them are queued
MAX_ASYNC_IDLE = 20         # idle connections of asyncio programs
MAX_RESPONSE_HEAD = 1 << 17     # bytes in the status line and headers of a response
MAX_DEPTH = 100             # levels that the search for a part that is not JSON goes down

# the worker
LEASE = 30                  # seconds until the engine gives a claim without heartbeat to others
LONG_POLL = 25              # seconds that a poll waits for a job; some proxies cut it off at 30
GRACE = 30                  # seconds that running handlers have when the worker stops
REPORT_GRACE = 2            # seconds, at least, for reporting their outcomes
STRAY_DELAY = 0.3           # seconds in which a proxy may still forward a poll that was cut off
RELEASE_WINDOW = 0.5        # seconds in which a stopping worker releases jobs that arrive late
PREFETCH_SECONDS = 0.1      # seconds of work that are prefetched
MAX_PREFETCH_AGE = 1        # seconds that a claimed job waits for a slot before it is released
HUNG_AFTER = 1              # seconds after its interruption until a thread counts as hung
MAX_HUNG = 10               # hung threads at which the worker ends
WATCH_INTERVAL = 0.1        # seconds between two checks of the running jobs
MAX_LOG_LINES_PER_TICK = 10     # done jobs of a queue that get a line each per WATCH_INTERVAL
PROGRESS_INTERVAL = 0.5     # seconds between two reports of a job's progress
BURST_INTERVAL = 0.5        # seconds between two polls of a burst for an empty queue
MAX_BACKLOG = 5000          # unreported outcomes above which no jobs are claimed
MAX_STEPS = 1000            # steps of a job, as the engine bounds them
MAX_STEP_NAME = 200         # characters in the name of a step
MAX_RESULT = 8_000_000      # characters in a result as JSON
MAX_ERROR = 16_000          # characters in a traceback; the middle of longer ones is cut out
UNSERVED_AFTER = 60         # seconds without a poll after which a queue has no worker
REFUSED_PAUSE = 10          # seconds until a worker polls again that was refused (token, queue)
PACE_WEIGHT = 0.25          # weight of the last job in the average time of a job
MAX_LOOP_BLOCK = 1          # seconds until an event loop counts as blocked
MAX_EXECUTOR_THREADS = 64   # threads in which async handlers run blocking functions
MAX_LOG_BACKLOG = 10_000    # queued log lines, above which new ones are dropped
RETRY_INTERRUPTION = 0.005  # seconds until an interruption is tried again
RELOAD_INTERVAL = 0.3       # seconds between two checks of the project's files

# programs and the outbox
MAX_STDOUT = 1 << 20        # bytes in a program's stdout
MAX_STDOUT_LEVELS = 200     # levels of JSON that an engine accepts; deeper output is kept as text
TERM_GRACE = 5              # seconds between SIGTERM and SIGKILL for a program
OUTBOX_INTERVAL = 1         # seconds between two reads of an outbox
DJANGO_OUTBOX_INTERVAL = 0.2    # seconds between two reads by the worker of a Django project
OUTBOX_BURST = 60           # seconds after a write in which the outbox is read more often
OUTBOX_BURST_INTERVAL = 0.05    # seconds between two reads in that time
OUTBOX_PAGE = 500           # rows that are read at a time
OUTBOX_TOO_LARGE_PAUSE = 60     # seconds until a job that a proxy found too large is sent again

log = logging.getLogger('rundown')
F = TypeVar('F', bound=Callable[..., Any])
if TYPE_CHECKING:
    R = typing_extensions.TypeVar('R', default=Any)     # the result of a handler
else:
    R = TypeVar('R')


# -- Errors ----------------------------------------------------------------------------------------
class Error(Exception):
    """Base class of the errors that this module raises."""

    status = 0          # HTTP status of the response; 0 if there was none
    retry_after = 0     # seconds that the engine asks its clients to wait


class EngineUnavailable(Error):
    """No engine answers under the URL, or it cannot answer now."""


class NotAnEngine(EngineUnavailable):
    """A proxy or another server answers, with the HTTP status `status`, and not the engine."""


class Refused(Error):
    """The engine refuses the call: `status` is the HTTP status, the text is its message."""


class NotJSON(Error):
    """A value that JSON cannot represent."""


class Misuse(Error, TypeError):
    """A call or a setting that is wrong in itself: the engine was not asked."""


class Unfinished(Error, TimeoutError):
    """The job has not ended within the timeout of wait()."""


class Hung(Error):
    """Too many handlers never returned. The worker has ended and should be restarted."""


class Crashed(Error):
    """An isolated handler failed; the text is its traceback, or says how its process ended."""


class Abort(Error):
    """Raised by a handler: fail the job, and do not try again."""


class Interruption(BaseException):
    """Raised in a handler by the worker; `except Exception` does not catch it."""


class Timeout(Interruption):
    """The handler has used up its time; its job has failed."""


class Lost(Interruption):
    """The claim is lost: the job was cancelled, released, or given to another worker."""


class Failed(Error):
    """The job has failed or was cancelled, so it has no result; the text is the job's error."""

    job: Job        # the job in question


class Retry(Error):
    """Raised by a handler: fail this attempt, and try again after `delay`.

    The delay is in seconds, or a timedelta; None stands for the engine's backoff.
    """

    delay = None        # of a subclass that does not call this __init__

    def __init__(
        self,
        reason: str = 'the handler asked for a retry',
        delay: float | datetime.timedelta | None = None,
    ) -> None:
        super().__init__(reason)
        self.delay = None if delay is None else duration('delay', delay)
        if self.delay is not None and not 0 <= self.delay < float('inf'):
            raise ValueError(f'the delay of a retry must be a number of seconds, not {delay!r}')


# -- Values ----------------------------------------------------------------------------------------
NUMBER = (int, float)
UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')
encode_json = json.JSONEncoder(separators=(',', ':'), allow_nan=False).encode
rng = random.Random()       # our own, since a handler may seed the module's
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=rng.seed)    # two processes must not choose the same ids


def as_json(value, name):
    """JSON text of the value. NotJSON names the part that JSON cannot represent."""
    try:
        text = encode_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        path, part = find_unencodable(value, name)
        path = truncate_middle(path, 200)
        if isinstance(part, dict):
            check_own_keys(part, path)
        if isinstance(error, TypeError):    # its message only names the type
            raise NotJSON(f'{path} has the type {type(part).__name__}, which JSON cannot hold; '
                          'str() of it may do') from None
        kind = part if isinstance(part, float) else f'a {type(part).__name__}'
        raise NotJSON(f'{path} is {kind}, which JSON cannot hold: {error}') from None
    if isinstance(value, (dict, list, tuple)):
        check_keys(value, name)
    return text


def find_unencodable(value, path):
    """The path to the innermost part that cannot be encoded, and that part."""
    for _ in range(MAX_DEPTH):
        for key, part in parts_of(value):
            try:
                encode_json(part)
            except (TypeError, ValueError, RecursionError):
                path += f'[{truncate_middle(repr(key), 100)}]'
                value = part
                break
        else:
            break
    return path, value


def parts_of(value):
    """(key, part) pairs of a container; none for any other value."""
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def check_keys(value, name):
    """Raise NotJSON for a dictionary key that is not a string, at any depth."""
    # containers, each with its path: None for the outermost, else (path of its parent, key)
    pending = [(value, None)]
    while pending:
        container, path = pending.pop()
        if isinstance(container, dict) and not all(isinstance(key, str) for key in container):
            check_own_keys(container, truncate_middle(name + path_text(path), 200))
        for key, part in parts_of(container):
            if isinstance(part, (dict, list, tuple)):
                pending.append((part, (path, key)))


def check_own_keys(container, path):
    """Raise NotJSON for the first key of a dictionary that is not a string."""
    for key in container:
        if not isinstance(key, str):
            text = truncate_middle(repr(key), 100)
            raise NotJSON(f'{path} has the key {text} of the type {type(key).__name__}; '
                          'in JSON, all keys are strings')


def path_text(path):
    """A path of check_keys() as text, such as `['users'][0]`."""
    keys = []
    while path is not None:
        path, key = path
        keys.append(f'[{truncate_middle(repr(key), 100)}]')
    return ''.join(reversed(keys))


def drop_none(**fields):
    return {field: value for field, value in fields.items() if value is not None}


def quote(text):
    """A name or an id as a part of a URL."""
    if not isinstance(text, str):
        raise Misuse(f'a name or an id must be a string, not {text!r}')
    return urllib.parse.quote(text, safe='', errors='surrogatepass')


def in_seconds(span):
    return span.total_seconds() if isinstance(span, datetime.timedelta) else span


def duration(name, span):
    """A duration in seconds; Misuse unless it is a number or a timedelta."""
    seconds = in_seconds(span)
    is_number = isinstance(seconds, NUMBER) and not isinstance(seconds, bool)
    if not is_number or seconds != seconds:     # NaN differs from itself
        raise Misuse(f'{name} must be a number of seconds or a timedelta, not {span!r}')
    return seconds


def check_names(given, known, problem='there is no option'):
    """Raise Misuse for an unknown name, and suggest the most similar known one."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f'; did you mean {near[0]}?' if near else ''
            raise Misuse(f'{problem} {name}{hint}')


def suggest_known_options(function: F) -> F:
    """Decorator: the error for an unknown option suggests the most similar known one."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        check_names(kwargs, known)
        return function(*args, **kwargs)

    return checked


def require_temporary_folder():
    """Raise Error if there is no folder for temporary files, as on a read-only file system."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise Error(f'no folder for temporary files (TMPDIR may name one): {error}') from None


def in_utc(moment):
    """A datetime (local time if it has no zone) as RFC 3339 text in UTC; text is unchanged."""
    if isinstance(moment, datetime.datetime):
        return moment.astimezone(datetime.timezone.utc).isoformat()
    return moment


def clamp_delay(delay):
    """The delay in seconds, limited to the range that an engine accepts; None stays None."""
    return None if delay is None else min(max(duration('delay', delay), 0), MAX_DELAY)


def printable(text):
    return UNPRINTABLE.sub(lambda match: f'\\x{ord(match[0]):02x}', text)


def truncate_middle(text, limit):
    half = limit // 2
    if len(text) <= limit:
        return text
    return f'{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}'


def retry_pause(tries):
    """Seconds until the next try, with jitter."""
    return min(MAX_RETRY_PAUSE, RETRY_PAUSE * 2 ** min(tries, 10)) * rng.uniform(0.5, 1)


def deadline_after(timeout):
    """A time of time.monotonic(); infinity if the timeout is None."""
    return time.monotonic() + (float('inf') if timeout is None else duration('timeout', timeout))


def remaining(deadline):
    """Seconds until the deadline; raises socket.timeout if it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise socket.timeout('timed out')
    return seconds


def new_id():
    """A UUID of version 7 (RFC 9562), ordered by time: the engine's index grows only at its end."""
    stamp = time.time_ns() // 1_000_000
    noise = rng.getrandbits(74)
    variant = 0x8000 | noise >> 48 & 0x3fff
    return (
        f'{stamp >> 16:08x}-{stamp & 0xffff:04x}-7{noise >> 62:03x}-{variant:04x}-'
        f'{noise & 0xffffffffffff:012x}'
    )


# -- Connections -----------------------------------------------------------------------------------
def request_bytes(request):
    """A request of urllib.request as bytes, to be sent as one packet."""
    if ' ' in request.selector or not request.selector.isprintable():
        raise http.client.InvalidURL(f'{request.selector!r} is not the path of a call')
    lines = [
        f'{request.get_method()} {request.selector} HTTP/1.1',
        f'Host: {request.host}',
        'Accept-Encoding: identity',
    ]
    lines += [f'{name}: {value}' for name, value in request.headers.items()]
    if request.data is None:
        return '\r\n'.join([*lines, '', '']).encode('ascii')
    lines += [f'Content-Length: {len(request.data)}', '', '']
    return '\r\n'.join(lines).encode('ascii') + request.data


# the complete head of the final response, after any interim ones such as `100 Continue`
FINAL_HEAD = re.compile(
    rb'(HTTP/1\.[01] 1.*\n([^\r\n].*\n)*\r?\n)*'
    rb'(?!HTTP/1\.[01] 1)([^\r\n].*\n)+\r?\n'
)


class ResponseReader:
    """Collects the bytes of a response until http.client can read it to its end."""

    def __init__(self):
        self.received = bytearray()
        self.size = None            # bytes in the whole response; None: its head is incomplete
        self.is_chunked = False

    def feed(self, data):
        """The response, or None while it is incomplete. Empty `data`: no more will come."""
        self.received += data
        if data and not self._may_be_complete():
            return None
        file = io.BytesIO(self.received)
        # an HTTPResponse calls only makefile() of its socket
        response = http.client.HTTPResponse(types.SimpleNamespace(makefile=lambda mode: file))
        try:
            response.begin()
            check_framing(response)
            self.is_chunked = response.chunked
            self.size = float('inf') if response.length is None else file.tell() + response.length
            if data and not self._may_be_complete():    # again, now that its size is known
                return None
            response.content = response.read()
        except (http.client.IncompleteRead, http.client.RemoteDisconnected):
            if not data:
                raise
            return None
        return response

    def _may_be_complete(self):
        if self.is_chunked:
            return self.received.endswith(b'\n\r\n')
        if self.size is None:
            return len(self.received) > MAX_RESPONSE_HEAD or FINAL_HEAD.match(self.received)
        return len(self.received) >= self.size


def check_framing(response):
    """Raise HTTPException for two kinds of broken responses that http.client accepts."""
    length_is_no_number = response.length is None and not response.chunked
    if length_is_no_number and 'content-length' in response.headers:
        raise http.client.HTTPException('its Content-Length is no number')
    if response.status < 200:
        raise http.client.HTTPException('it is not the final response')


class PooledConnection:
    """A connection that is used for one request after the other."""

    def __init__(self, origin, deadline, context):
        self.origin = origin        # (scheme, host and port), constant
        scheme, host = origin
        timeout = min(RESPONSE_TIMEOUT, remaining(deadline))
        if scheme == 'https':
            connection = http.client.HTTPSConnection(host, timeout=timeout, context=context)
        else:
            connection = http.client.HTTPConnection(host, timeout=timeout)
        connection.connect()
        self.sock = connection.sock

    def exchange(self, data, deadline):
        """The response to a request, which has to be complete before the deadline."""
        self.sock.settimeout(remaining(deadline))
        with contextlib.suppress(ConnectionError):      # the response may come before all is sent
            self.sock.sendall(data)
        reader = ResponseReader()
        response = None
        while response is None:
            self.sock.settimeout(remaining(deadline))   # again: the bytes may trickle in
            response = reader.feed(self.sock.recv(1 << 16))
        return response

    def close(self):
        self.sock.close()


class ConnectionPool(urllib.request.BaseHandler):
    """Opens URLs for urllib.request over connections that stay open between requests."""

    def __init__(self, context=None):
        self.context = context              # constant: the settings of TLS
        self.process = os.getpid()          # owner of the connections: a fork must not use them
        self.closed = False                 # written by shutdown() in any thread
        # safe without a lock: single operations of a deque and a set are atomic
        self.idle = collections.deque()     # connections without a request; most recently used last
        self.active = set()                 # connections with a request in flight

    def http_open(self, request):
        """The response, which has to be complete within request.timeout seconds."""
        deadline = time.monotonic() + request.timeout
        origin = (request.type, request.host)
        data = request_bytes(request)
        while True:
            reused = self._take_idle(origin)
            connection = reused or PooledConnection(origin, deadline, self.context)
            try:
                return self._exchange(connection, data, deadline)
            except ConnectionError:
                if not reused:      # a reused one may have been closed while it was idle
                    raise

    https_open = http_open

    def _take_idle(self, origin):
        """The last used connection to the origin, or None. Closes those to other origins."""
        if self.process != os.getpid():
            self.idle = collections.deque()
            self.active = set()
            self.process = os.getpid()      # last: other threads then skip this and use the above
        with contextlib.suppress(IndexError):
            while True:
                connection = self.idle.pop()
                if connection.origin == origin:
                    return connection
                connection.close()
        return None

    def _exchange(self, connection, data, deadline):
        self.active.add(connection)
        try:
            if self.closed:
                raise ConnectionAbortedError('the connection was shut down')
            response = connection.exchange(data, deadline)
        except BaseException:
            connection.close()
            raise
        finally:
            self.active.discard(connection)
        if response.will_close:
            connection.close()
        else:
            self.idle.append(connection)
        return response

    def shutdown(self, how=socket.SHUT_WR):
        """Send nothing more. With SHUT_WR, responses to requests in flight still arrive."""
        self.closed = True
        for connection in self.active.copy():
            # SSLSocket.shutdown would drop the session keys, so the plain one is called.
            with contextlib.suppress(OSError):      # its own thread may have just closed it
                socket.socket.shutdown(connection.sock, how)
        with contextlib.suppress(IndexError):       # its own thread may take the last one
            while True:
                self.idle.pop().close()


# -- Client ----------------------------------------------------------------------------------------
class ActiveHost:
    """The engine that a client and its clones use, one of several."""

    def __init__(self, hosts):
        self.hosts = hosts          # constant: URLs
        # written by any thread; a race costs one more try at most
        self.url = hosts[0]
        self.has_answered = len(hosts) == 1     # False: `url` may be one that never answers

    def move_on(self, failed):
        """Use the engine after `failed`, unless another thread has already done so."""
        if failed == self.url and len(self.hosts) > 1:
            self.has_answered = False
            self.url = self.hosts[(self.hosts.index(failed) + 1) % len(self.hosts)]


class Retries:
    """When a call is tried again: for `give_up` seconds in all, at one engine after the other."""

    def __init__(self, hosts, wait, give_up):
        self.hosts = hosts
        self.wait = min(duration('wait', wait), LONG_CHANGE)    # seconds that the engine may take
        self.give_up = duration('give_up', give_up)
        self.tries = 0
        self.began = time.monotonic()
        self.deadline = self.began + self.give_up + self.wait
        self.has_told_terminal = False          # that it is still trying

    def seconds(self):
        """Seconds for the next try: the time that is left, shared equally among the engines.

        With several engines, tries of the first rounds are shorter: a silent one costs little.
        """
        share = (self.deadline - time.monotonic()) / len(self.hosts)
        longest = MAX_TRY
        if len(self.hosts) > 1:
            rounds = self.tries // len(self.hosts)
            longest = min(longest, PROBE_TIMEOUT * 2 ** min(rounds, 10))
        return max(min(share, self.wait + longest), self.wait + MIN_LAST_TRY)

    def pause_after(self, error):
        """Seconds until the next try; EngineUnavailable if there is none."""
        if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            raise error         # a proxy's limit: trying again would not help
        self.tries += 1
        rounds, turn = divmod(self.tries, len(self.hosts))
        pause = 0 if turn else max(retry_pause(rounds - 1), error.retry_after)
        now = time.monotonic()
        self.deadline = min(self.deadline, now + self.give_up)  # counted from the first failure
        hosts = ' '.join(self.hosts)
        if now + pause >= self.deadline:
            final = type(error)(f'{hosts} was tried for {self.give_up:g} s: {error}')
            final.status = error.status
            raise final from None
        if now + pause - self.began >= STILL_TRYING_AFTER and not self.has_told_terminal:
            self.has_told_terminal = True
            tell_terminal(f'no engine at {hosts}, still trying ({error})')
        return pause


def tell_terminal(sentence):
    """Write a message to stderr if it is a terminal."""
    with contextlib.suppress(OSError, ValueError, AttributeError):      # it may be closed, or None
        if sys.stderr.isatty():
            print(f'rundown_workers: {sentence}', file=sys.stderr, flush=True)


class Caller:
    """Sends calls to one of several engines, and tries them again while none answers."""

    def __init__(
        self,
        host: str | None = None,
        token: str | None = None,
        timeout: float = CLIENT_TIMEOUT,
        ca: str | None = None,
    ) -> None:
        self.hosts = parse_hosts(host or os.environ.get('RUNDOWN_URL') or DEFAULT_URL)
        self.active = ActiveHost(self.hosts)    # shared with clones
        self.timeout = duration('timeout', timeout)
        self.headers = {'Content-Type': 'application/json'}
        token = token or os.environ.get('RUNDOWN_TOKEN')
        if token:
            if not isinstance(token, str) or not re.fullmatch('[!-~]+', token):
                raise Error('the token must be of visible ASCII characters')
            self.headers['Authorization'] = f'Bearer {token}'
        self._open_pool(tls_context(self.hosts, ca or os.environ.get('RUNDOWN_CA')))

    def _open_pool(self, context):
        """Set up a pool, and an opener that uses no proxy and follows no redirect."""
        self.pool = ConnectionPool(context)
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(self.pool)

    @property
    def host(self) -> str:
        """The URL of the engine in use."""
        return self.active.url

    def clone(self) -> Client:
        """A client with connections of its own, which changes engines together with this one."""
        clone = copy.copy(self)
        clone._open_pool(self.pool.context)
        return clone

    def send(self, path: str, body: Any = None, seconds: float = CLIENT_TIMEOUT) -> Any:
        """Try a call once, for up to `seconds`, and return the answer.

        `body` is a dict or JSON text and makes it a POST; without it the call is a GET.
        """
        data = encode_body(body)
        host = self.host
        try:
            if not self.active.has_answered:
                self._open(host + '/health', None, min(seconds, PROBE_TIMEOUT))
                self.active.has_answered = True
            return self._read(host, self._open(host + path, data, seconds))
        except UNREACHABLE as error:
            raise self._unreachable(host, error) from error

    def _request(self, url, data):
        return urllib.request.Request(url, data, self.headers)

    def _open(self, url, data, seconds):
        return self.opener.open(self._request(url, data), timeout=seconds)

    def _read(self, host, response):
        """The decoded body of a response; raises the error of an unsuccessful one."""
        if response.status == 200:
            return json.loads(response.content.decode())
        if response.status == 204:
            return None
        error = response_error(response)
        if isinstance(error, NotAnEngine):
            self.active.move_on(host)
        raise error

    def _unreachable(self, host, error):
        """The exception for a request without a response. Moves on to the next engine."""
        if not self.pool.closed:        # otherwise shutdown() has ended the request
            self.active.move_on(host)
        reason = str(getattr(error, 'strerror', None) or error) or type(error).__name__
        if isinstance(error, ssl.SSLCertVerificationError):
            reason += '; RUNDOWN_CA names the file of a private certificate authority'
        return EngineUnavailable(f'no engine answers at {host}: {printable(reason)}')

    def call(
        self,
        path: str,
        body: Any = None,
        wait: float = 0,
        give_up: float | datetime.timedelta | None = None,
    ) -> Any:
        """send(), tried again for `give_up` seconds (None: the client's timeout).

        `wait` are the seconds that the engine may take, as for a long poll. The last try has at
        least `wait` and one second, so a silent engine may be noticed that much later.
        """
        retries = Retries(self.hosts, wait, self.timeout if give_up is None else give_up)
        while True:
            try:
                return self.send(path, body, retries.seconds())
            except EngineUnavailable as error:
                pause = retries.pause_after(error)
            time.sleep(pause)

    def _post(self, path, **fields):
        given = given_fields(fields)
        return self.call(path, given, given.get('wait', 0))

    def _get(self, path, **fields):
        given = given_fields(fields)
        query = urllib.parse.urlencode(given, errors='surrogatepass')
        return self.call(f'{path}?{query}', wait=given.get('wait', 0))

    def _change(self, path, jobs, **fields):
        """A call about the given jobs; if `jobs` is None, about all that match the fields."""
        given = given_fields(fields)
        if jobs is None:
            return self.call(path, given, wait=0 if 'id' in given else LONG_CHANGE)
        texts = [as_json({**given, 'id': id}, 'the job') for id in job_ids(jobs)]
        replies = []
        for batch in batches(texts, len):
            replies += self.call(path, batch_body(batch))['jobs']
        return {'jobs': replies}

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        """Send nothing more; with SHUT_WR, answers to calls in flight still arrive."""
        self.pool.shutdown(how)

    def close(self) -> None:
        """Close the connections, even if threads are using them. Nothing can be sent after that.

        A call of an asyncio program that is in flight still gets its answer.
        """
        self.shutdown()
        async_calls.close_idle(self.pool)


class ProducerCalls(Caller):
    """The calls that add jobs and wait for them."""

    @suggest_known_options
    def enqueue(
        self,
        queue: str,
        payload: Any = None,
        timeout: float | datetime.timedelta | None = None,
        max_retries: int | None = None,
        tag: str | None = None,
        delay: float | datetime.timedelta | None = None,
        run_at: str | datetime.datetime | None = None,
        priority: int | None = None,
        key: str | None = None,
        id: str | None = None,
        give_up: float | datetime.timedelta | None = None,
        after: Any = None,
        after_any: bool | None = None,
        group: str | None = None,
        key_until: str | None = None,
        replace: bool | None = None,
        expires: float | datetime.timedelta | None = None,
    ) -> Job:
        """Add a job, and return it. The call is idempotent: sending it again adds nothing.

        `created` in it is False if a job with its id or key existed before. A datetime without a
        zone is local time; durations are in seconds, or timedeltas.

        The job waits until the jobs `after` (jobs or ids) are done; if one of them fails it is
        cancelled, unless `after_any` is True. Jobs of a `group` run one at a time, in order.
        A `key` is held until the job has ended, with `key_until="start"` until it starts; with
        `replace` the new job takes the place of one that holds the key and has not started. A
        job that has not started `expires` seconds after it was due is cancelled.
        """
        text = encode_job(
            payload, id=id, run_at=run_at, delay=delay, after=after, queue=queue, timeout=timeout,
            max_retries=max_retries, tag=tag, priority=priority, key=key, after_any=after_any,
            group=group, key_until=key_until, replace=replace, expires=expires,
        )
        job = Job(self.call('/enqueue', text, give_up=give_up), self)
        warn_of_own_key(job)
        return job

    async def aenqueue(self, queue: str, payload: Any = None, **options: Any) -> Job:
        """enqueue() for asyncio programs; it never blocks their event loop."""
        give_up = options.pop('give_up', None)
        check_names(options, ENQUEUE_OPTIONS)
        text = encode_job(payload, queue=queue, **options)
        return Job(await async_calls.call(self, '/enqueue', text, give_up=give_up), self)

    def enqueue_many(
        self,
        queue: str,
        payloads: Iterable[Any],
        ids: Iterable[str] | None = None,
        give_up: float | datetime.timedelta | None = None,
        **options: Any,
    ) -> list[Job]:
        """Add a job per payload, in requests of up to 1,000 jobs; return the jobs in order.

        Each request is all or nothing. `ids` has one id for each payload. The options are those
        of enqueue() except `id` and `key`, and apply to all jobs.
        """
        if isinstance(payloads, (str, bytes, dict)):
            kind = type(payloads).__name__
            raise Misuse(f'payloads must be a list with one payload for each job, not a {kind}')
        if 'id' in options or 'key' in options:
            raise Misuse('id and key are for one job, and these are many; ids takes a list')
        check_names(options, ENQUEUE_OPTIONS)
        payloads = list(payloads)
        ids = sorted(new_id() for _ in payloads) if ids is None else list(ids)
        if len(ids) != len(payloads):
            counts = f'there are {len(ids)} and {len(payloads)}'
            raise Misuse(f'ids must be one for each payload: {counts}')
        most = MAX_BATCH        # jobs in a request
        if options.get('after') is not None:
            options['after'] = job_ids(options['after'])
            most = max(1, min(most, MAX_BATCH_AFTER // max(1, len(options['after']))))
        texts = (
            encode_job(payload, queue=queue, id=id, **options)
            for payload, id in zip(payloads, ids)
        )
        return [
            Job(job, self)
            for batch in batches(texts, len, most)
            for job in self._enqueue_batch(batch, give_up)
        ]

    def _enqueue_batch(self, texts, give_up):
        """The jobs of a batch. A batch that is too large for a proxy is sent in halves."""
        try:
            return self.call('/enqueue', batch_body(texts), give_up=give_up)['jobs']
        except EngineUnavailable as error:
            half = len(texts) // 2
            if error.status != HTTPStatus.REQUEST_ENTITY_TOO_LARGE or not half:
                raise
            first = self._enqueue_batch(texts[:half], give_up)
            return first + self._enqueue_batch(texts[half:], give_up)

    def wait(
        self,
        job: Any,
        timeout: float | datetime.timedelta | None = None,
        give_up: float | datetime.timedelta | None = None,
    ) -> Job:
        """The job, given as a job or an id, once it has ended.

        Unfinished if it has not after `timeout` seconds. EngineUnavailable if no engine answers
        for `give_up` seconds, or until the timeout.

        In a handler: Error if the job needs the slot of this handler, and so would never start.
        """
        waiting = Waiting(self, job, timeout, give_up)
        claim = current.get()
        if may_deadlock(claim, job):
            check_deadlock(self, claim, waiting)
        while True:
            job = self.call(**waiting.next_call(LONG_POLL))
            if waiting.is_over(job):
                return Job(job, self)

    async def await_job(
        self,
        job: Any,
        timeout: float | datetime.timedelta | None = None,
        give_up: float | datetime.timedelta | None = None,
    ) -> Job:
        """wait() for asyncio programs; thousands may run at a time."""
        waiting = Waiting(self, job, timeout, give_up)
        claim = current.get()
        if may_deadlock(claim, job):
            await run_in_thread(check_deadlock, self, claim, waiting)
        return Job(await async_calls.wait(self, waiting), self)

    @suggest_known_options
    def schedule(
        self,
        name: str,
        queue: str,
        cron: str | None = None,
        every: float | datetime.timedelta | None = None,
        zone: str | None = None,
        payload: Any = None,
        timeout: float | datetime.timedelta | None = None,
        max_retries: int | None = None,
        tag: str | None = None,
        priority: int | None = None,
        key: str | None = None,
        group: str | None = None,
    ) -> dict[str, Any]:
        """Make a job at each tick: of `cron`, or every `every` seconds.

        `cron` has five fields, in the time zone `zone` (UTC). Sending the same schedule again
        changes nothing. With `key`, a tick is skipped while the job of an earlier one is pending
        or running.
        """
        return self._post(
            '/schedule', name=name, queue=queue, cron=cron, every=every, zone=zone,
            payload=payload, timeout=timeout, max_retries=max_retries, tag=tag,
            priority=priority, key=key, group=group,
        )

    def unschedule(self, name: str) -> dict[str, Any]:
        """End a schedule; the jobs that it made stay."""
        return self._post('/unschedule', name=name)


class WorkerCalls(Caller):
    """The calls that claim jobs and report on them."""

    def poll(
        self,
        queue: str,
        limit: int | None = None,
        wait: float | datetime.timedelta | None = None,
        worker: str | None = None,
        lease: float | datetime.timedelta | None = None,
        max_retries: int | None = None,
        timeout: float | datetime.timedelta | None = None,
        hung: int | None = None,
    ) -> Any:
        """Claim a job, or None; with `limit` a list of jobs, or None.

        `wait`, `lease` and `timeout` are in seconds.
        """
        return self._post(
            '/poll', queue=queue, limit=limit, wait=wait, worker=worker, lease=lease,
            max_retries=max_retries, timeout=timeout, hung=hung,
        )

    def complete(self, id: str, attempt: int | None = None, result: Any = None) -> dict[str, Any]:
        """Report that a job is done."""
        return self._post('/complete', id=id, attempt=attempt, result=result)

    def fail(
        self,
        id: str,
        attempt: int | None = None,
        error: str | None = None,
        retry: bool | None = None,
        delay: float | datetime.timedelta | None = None,
    ) -> dict[str, Any]:
        """Report a failure; `retry=False` makes it final, `delay` replaces the engine's backoff."""
        return self._post(
            '/fail', id=id, attempt=attempt, error=error, retry=retry, delay=clamp_delay(delay))

    def heartbeat(
        self,
        id: str,
        attempt: int | None = None,
        progress: Any = None,
    ) -> dict[str, Any]:
        """Extend the lease of a claim, and show its progress."""
        return self._post('/heartbeat', id=id, attempt=attempt, progress=progress)

    def lost(
        self,
        worker: str,
        wait: float | datetime.timedelta | None = None,
        since: int | None = None,
    ) -> dict[str, Any]:
        """Wait until the worker loses a claim; `since` is the one of the previous answer."""
        return self._get('/lost', worker=worker, wait=wait, since=since)

    def release(self, id: str, attempt: int | None = None) -> dict[str, Any]:
        """Give a claim back; it counts as no failure."""
        return self._post('/release', id=id, attempt=attempt)

    def step(self, id: str, attempt: int | None, name: str, result: Any) -> dict[str, Any]:
        """Store the result of a step of a job; the first result under a name is kept."""
        return self.call('/step', {'id': id, 'attempt': attempt, 'name': name, 'result': result})


class Client(ProducerCalls, WorkerCalls):
    """The calls of an engine, one method each; a method takes the fields of its call.

    GET /metrics and GET /backup have none, since their answers are not JSON.

    `host` may name several engines, separated by blanks: one is used until it stops answering,
    then the next. While none answers, a call is retried for `timeout` seconds; then it raises
    EngineUnavailable. A call that the engine refuses raises Refused at once. Safe to use from
    many threads, and after a fork.
    """

    def pause(self, queue: str) -> dict[str, Any]:
        """Hand out no jobs of the queue."""
        return self._post('/pause', queue=queue)

    def resume(self, queue: str) -> dict[str, Any]:
        """Hand out jobs of the queue again."""
        return self._post('/resume', queue=queue)

    def reschedule(
        self,
        id: str | None = None,
        delay: float | datetime.timedelta | None = None,
        run_at: str | datetime.datetime | None = None,
        priority: int | None = None,
        jobs: Iterable[Any] | None = None,
    ) -> dict[str, Any]:
        """Change the time or the priority of a pending job; `delay` 0 means now.

        With `jobs` (jobs or ids), changes all of them: returns {"jobs": [...]}, a reply for each.
        """
        return self._change(
            '/reschedule', jobs, id=id, delay=delay, run_at=in_utc(run_at), priority=priority)

    def cancel(
        self,
        id: str | None = None,
        queue: str | None = None,
        status: str | None = None,
        tag: str | None = None,
        jobs: Iterable[Any] | None = None,
    ) -> dict[str, Any]:
        """Cancel a job, all with a tag, or all of a queue and status; returns {"count": n}.

        With `jobs` (jobs or ids), cancels all of them: returns {"jobs": [...]}, a reply for each.
        """
        return self._change('/cancel', jobs, id=id, queue=queue, status=status, tag=tag)

    def retry(
        self,
        id: str | None = None,
        queue: str | None = None,
        status: str | None = None,
        tag: str | None = None,
        jobs: Iterable[Any] | None = None,
    ) -> dict[str, Any]:
        """Make a failed or cancelled job pending again, or all with a status or a tag.

        `queue` limits that to a queue. Returns the same as cancel().
        """
        return self._change('/retry', jobs, id=id, queue=queue, status=status, tag=tag)

    def purge(
        self,
        queue: str | None = None,
        status: str | None = None,
        tag: str | None = None,
        id: str | None = None,
        jobs: Iterable[Any] | None = None,
    ) -> dict[str, Any]:
        """Delete a job, or all of a queue, status or tag, except running ones.

        Returns the same as cancel().
        """
        return self._change('/purge', jobs, id=id, queue=queue, status=status, tag=tag)

    def limit(
        self,
        queue: str,
        max_running: Any = ...,
        rate: Any = ...,
        per: Any = ...,
    ) -> dict[str, Any]:
        """Limit how many jobs of a queue run at a time, and how fast they are claimed.

        At most `rate` are claimed at once, then one every `per / rate` seconds. None removes a
        limit; omitted limits are unchanged. Returns the limits of the queue.
        """
        fields = {'queue': queue, 'max_running': max_running, 'rate': rate, 'per': in_seconds(per)}
        given = {name: value for name, value in fields.items() if value is not ...}
        return self.call('/limit', given)

    def schedules(self, limit: int | None = None, after: str | None = None) -> dict[str, Any]:
        """A page of schedules by name."""
        return self._get('/schedules', limit=limit, after=after)

    def jobs(
        self,
        queue: str | None = None,
        status: str | None = None,
        tag: str | None = None,
        limit: int | None = None,
        after: str | None = None,
        needed_by: str | None = None,
        group: str | None = None,
        search: str | None = None,
    ) -> dict[str, Any]:
        """A page of jobs, newest first; the answer's `after` asks for the next page.

        `needed_by` is the id of a job: selects its dependencies, in the order of its `after`.
        `search` is a text in the payload, error, result, tag or id; such a page may be empty
        although there is a next one.
        """
        return self._get(
            '/jobs', queue=queue, status=status, tag=tag, limit=limit, after=after,
            needed_by=needed_by, group=group, search=search,
        )

    def queues(self, limit: int | None = None, after: str | None = None) -> dict[str, Any]:
        """The counts and limits of each queue, and the workers seen."""
        return self._get('/queues', limit=limit, after=after)

    def job(
        self, id: str, wait: float | datetime.timedelta | None = None,
    ) -> dict[str, Any]:
        """The job; with `wait`, once it has ended or after `wait` seconds (60 at most)."""
        return self._get('/jobs/' + quote(id), wait=wait)

    def details(self, tag: str) -> dict[str, Any]:
        """The newest job with that tag."""
        return self._get('/details/' + quote(tag))

    def health(self) -> dict[str, Any]:
        """The state of the engine."""
        return self._get('/health')


ENDED = ('done', 'failed', 'cancelled')     # statuses of a job that has ended
ENQUEUE_OPTIONS = list(inspect.signature(Client.enqueue).parameters)[3:]


class Waiting:
    """A wait for the end of a job: the long polls that it takes, and when it is over."""

    def __init__(self, client, job, timeout, give_up):
        self.id = job['id'] if isinstance(job, dict) else job
        self.deadline = deadline_after(timeout)
        self.give_up = client.timeout if give_up is None else duration('give_up', give_up)

    def next_call(self, longest):
        """The arguments of Client.call() for the next long poll, of `longest` seconds at most."""
        left = max(0, self.deadline - time.monotonic())
        wait = round(min(longest, left), 3)
        path = f'/jobs/{quote(self.id)}?wait={wait}'
        return {'path': path, 'wait': wait, 'give_up': min(self.give_up, left)}

    def is_over(self, job):
        """Has the job ended? Raises Unfinished if it has not and the timeout is over."""
        if job['status'] in ENDED:
            return True
        if time.monotonic() >= self.deadline:
            raise Unfinished(f'job {self.id} is still {job["status"]}, and the timeout is over')
        return False


class Job(Dict[str, Any], Generic[R]):
    """A job as the engine described it last: a dict with methods that update it."""

    def __init__(self, fields: dict[str, Any], client: Client) -> None:
        super().__init__(fields)
        self.client = client

    def refresh(self) -> Job[R]:
        """Update it from the engine, and return it."""
        self.update(self.client.job(self['id']))
        return self

    def cancel(self) -> Job[R]:
        """Cancel it, update it, and return it; Refused if it has ended."""
        self.client.cancel(self['id'])
        return self.refresh()

    def retry(self) -> Job[R]:
        """Make it pending again, update it, and return it.

        Refused unless it has failed or was cancelled.
        """
        self.client.retry(self['id'])
        return self.refresh()

    def wait(
        self,
        timeout: float | datetime.timedelta | None = None,
        give_up: float | datetime.timedelta | None = None,
    ) -> Job[R]:
        """Wait until it has ended, update it, and return it; see Client.wait."""
        self.update(self.client.wait(self, timeout, give_up))
        return self

    def result(
        self,
        timeout: float | datetime.timedelta | None = None,
        give_up: float | datetime.timedelta | None = None,
    ) -> R:
        """The value that the handler returned, once it has.

        Failed, with the job's error, if it failed or was cancelled.
        """
        self.wait(timeout, give_up)
        return self._result()

    async def aresult(
        self,
        timeout: float | datetime.timedelta | None = None,
        give_up: float | datetime.timedelta | None = None,
    ) -> R:
        """result() for asyncio programs; it never blocks their event loop."""
        self.update(await self.client.await_job(self, timeout, give_up))
        return self._result()

    def _result(self):
        if self['status'] != 'done':
            error = Failed(self['error'] or f'the job was {self["status"]}')
            error.job = self
            raise error
        return self['result']

    def __reduce__(self):
        """Pickle and copy it as a plain dict: a client cannot be pickled."""
        return dict, (dict(self),)


def results(
    jobs: Iterable[Job[R]],
    timeout: float | datetime.timedelta | None = None,
    give_up: float | datetime.timedelta | None = None,
) -> list[R]:
    """The results of many jobs, in order: see Job.result. The timeout is for all together."""
    jobs = list(jobs)
    for job in jobs:
        if not isinstance(job, Job):
            raise Misuse(f'results() takes jobs, as enqueue() and get() return them, not {job!r}')
    deadline = deadline_after(timeout)
    return [job.result(max(0, deadline - time.monotonic()), give_up) for job in jobs]


# Exceptions of a request to which no usable response came. JSON that cannot be parsed is a
# ValueError or a RecursionError; http.client raises OverflowError for an impossible length.
UNREACHABLE = (OSError, http.client.HTTPException, ValueError, OverflowError, RecursionError)


def encode_body(body):
    """The bytes of a request's body, which is a dict, JSON text or None."""
    if body is None:
        return None
    return (body if isinstance(body, str) else as_json(body, 'body')).encode()


def parse_hosts(text):
    """The URLs of engines, separated by blanks; raises Error for an invalid one."""
    if not isinstance(text, str):
        raise Misuse(f'host must be the URL of an engine, not {text!r}')
    hosts = [url.rstrip('/') for url in text.split()] or ['']
    for url in hosts:
        if not re.fullmatch(r'https?://[^\s/?#@]+(/[!-~]*)?', url) or not url.isascii():
            raise Error(f'{url!r} is not the URL of an engine, such as {EXAMPLE_URL}')
    return hosts


def tls_context(hosts, ca):
    """The settings of TLS, or None where no host needs it."""
    if not any(url.startswith('https:') for url in hosts):
        return None
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise Error(f'cannot read the certificates in {ca}: {error}') from None
    if ca:      # self-made certificates rarely pass the strict checks of Python 3.13
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def response_error(response):
    """The exception for an unsuccessful response.

    Only the engine's own JSON is a refusal. Anything else is from a proxy or another server.
    """
    message = error_message(response)
    if message is None:
        location = response.headers.get('location')
        where = f', which points to {location}' if location else ''
        status = f'{response.status} {response.reason}{where}'
        message = f'no engine answers, but something with HTTP status {status}'
        error = NotAnEngine(printable(message))
    elif is_permanent(response.status):
        error = Refused(printable(message))
    else:
        error = EngineUnavailable(printable(message))
    error.status = response.status
    pause = response.headers.get('retry-after', '')
    if re.fullmatch('[0-9]{1,9}', pause):
        error.retry_after = min(int(pause), MAX_RETRY_AFTER)
    return error


def error_message(response):
    """The message of an engine's refusal; None if the response is not an engine's."""
    try:
        message = json.loads(response.content)['error']
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return message if isinstance(message, str) else None


def is_permanent(status):
    """Would the same request get the same answer again?"""
    return status < 500 and status != 429


def is_claim(job):
    """Is this item of a poll's answer a job that can be run?"""
    return (
        isinstance(job, dict)
        and isinstance(job.get('id'), str)
        and type(job.get('attempt')) is int
        and type(job.get('timeout')) in (int, float)
        and 'payload' in job
    )


def is_item_reply(item):
    """Is this item of a batch's answer a well-formed reply?"""
    return (
        isinstance(item, dict)
        and type(item.get('code', 0)) is int
        and isinstance(item.get('error', ''), str)
    )


DURATIONS = {'delay', 'every', 'expires', 'lease', 'per', 'timeout', 'wait'}     # in seconds


def encode_job(payload, id=None, run_at=None, after=None, **fields):
    """A new job as JSON text. Its id is chosen here, so that enqueueing it is idempotent."""
    fields.update(
        payload=payload,
        id=new_id() if id is None else id,
        run_at=in_utc(run_at),
        after=None if after is None else job_ids(after),
    )
    return as_json(given_fields(fields), 'the job')


def job_ids(jobs):
    """The ids of jobs, or of one job; each is given as a job or as its id."""
    jobs = [jobs] if isinstance(jobs, (str, dict)) else jobs
    return [job['id'] if isinstance(job, dict) else job for job in jobs]


def given_fields(fields):
    """The fields that are not None, with durations in seconds."""
    return {
        name: in_seconds(value) if name in DURATIONS else value
        for name, value in fields.items() if value is not None
    }


def batch_body(texts):
    """The body of a request about several jobs, which are given as JSON text."""
    return '{"jobs":[' + ','.join(texts) + ']}'


BATCH_FRAME = len(batch_body([]))       # bytes around the items of a batch


def batches(items, size, most=MAX_BATCH):
    """Lists of up to `most` items, each short enough for a request; size(item) is in bytes."""
    batch = []
    total = BATCH_FRAME
    for item in items:
        length = size(item) + 1         # with its comma
        if batch and (total + length > MAX_BATCH_BYTES or len(batch) == most):
            yield batch
            batch = []
            total = BATCH_FRAME
        batch.append(item)
        total += length
    if batch:
        yield batch


# -- asyncio: calls that never block an event loop -------------------------------------------------
class AsyncCalls:
    """A thread whose event loop makes the calls of asyncio programs.

    The event loops of the programs only wait for a future. Nothing blocks them, not even a DNS
    lookup, and their default executors stay free.
    """

    def __init__(self):
        self._reset()
        if hasattr(os, 'register_at_fork'):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self):
        """Start again: a forked process does not have the thread.

        The parent's loop is never freed here: that would close its connections, and so remove
        them from the epoll object that both processes share.
        """
        if self.loop is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.loop))
        self._reset()

    def _reset(self):
        self.lock = threading.Lock()    # held to start the thread
        self.loop = None                # written with the lock; None: the thread is not started
        # used by the loop's thread only
        self.idle = collections.deque()     # without a request; most recently used last
        self.call_slots = None          # semaphore of short calls
        self.wait_slots = None          # semaphore of long polls

    def _start(self):
        import asyncio      # here, since it takes megabytes and most programs do not need it
        loop = asyncio.new_event_loop()
        thread = threading.Thread(
            target=self._run, args=[loop], name='rundown-asyncio', daemon=True)
        contextvars.Context().run(thread.start)     # it belongs to no job
        self.loop = loop

    def _run(self, loop):
        import asyncio
        asyncio.set_event_loop(loop)        # where semaphores of Python 3.8 look for it
        self.call_slots = asyncio.Semaphore(MAX_ASYNC_CALLS)
        self.wait_slots = asyncio.Semaphore(max_async_waits())
        loop.run_forever()

    def submit(self, coroutine):
        """A future of the running loop; cancelling it cancels the coroutine."""
        import asyncio
        with self.lock:
            if self.loop is None:
                self._start()
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    async def call(self, client, path, body=None, wait=0, give_up=None):
        """Client.call() for the caller's loop."""
        return await self.submit(self._short_call(client, path, body, wait, give_up))

    async def wait(self, client, waiting):
        """Client.wait() for the caller's loop; the fields of the job."""
        return await self.submit(self._wait(client, waiting))

    async def _short_call(self, client, path, body, wait, give_up):
        return await self._call(self.call_slots, client, path, body, wait, give_up)

    async def _wait(self, client, waiting):
        while True:
            # if all connections are in use, short polls let the others have a turn
            longest = CROWDED_POLL if self.wait_slots.locked() else LONG_POLL
            arguments = waiting.next_call(longest)
            job = await self._call(self.wait_slots, client, **arguments)
            if waiting.is_over(job):
                return job

    async def _call(self, slots, client, path, body=None, wait=0, give_up=None):
        """Client.call() on this loop. A slot is held during a try, not between two of them."""
        import asyncio
        retries = Retries(client.hosts, wait, client.timeout if give_up is None else give_up)
        while True:
            try:
                async with slots:
                    return await self._send(client, path, body, retries.seconds())
            except EngineUnavailable as error:
                pause = retries.pause_after(error)
            await asyncio.sleep(pause)

    async def _send(self, client, path, body, seconds):
        """Client.send() on this loop."""
        data = encode_body(body)
        host = client.host
        try:
            if not client.active.has_answered:
                await self._open(client, host + '/health', None, min(seconds, PROBE_TIMEOUT))
                client.active.has_answered = True
            return client._read(host, await self._open(client, host + path, data, seconds))
        except UNREACHABLE as error:
            raise client._unreachable(host, error) from error

    async def _open(self, client, url, data, seconds):
        import asyncio
        exchange = self._exchange(client._request(url, data), client.pool)
        try:
            return await asyncio.wait_for(exchange, seconds)
        except asyncio.TimeoutError:
            raise socket.timeout('timed out') from None

    async def _exchange(self, request, pool):
        origin = (request.type, request.host)
        data = request_bytes(request)
        while True:
            if pool.closed:
                raise ConnectionAbortedError('the connection was shut down')
            reused = self._take_idle(pool, origin)
            connection = reused or await AsyncConnection.open(self.loop, pool, origin)
            try:
                response = await connection.exchange(self.loop, data)
            except BaseException as error:
                connection.close()
                if reused and isinstance(error, ConnectionError):
                    continue        # it was closed while it was idle
                raise
            if response.will_close or pool.closed:
                connection.close()
            else:
                self.idle.append(connection)
            if len(self.idle) > MAX_ASYNC_IDLE:
                self.idle.popleft().close()
            return response

    def _take_idle(self, pool, origin):
        """The last used connection of a client to the origin, or None."""
        for connection in list(reversed(self.idle)):
            if connection.transport.is_closing():
                self.idle.remove(connection)        # the engine has closed it
            elif connection.pool is pool and connection.origin == origin:
                self.idle.remove(connection)
                return connection
        return None

    def close_idle(self, pool):
        """Close the idle connections of a client, from any thread."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._close_idle, pool)

    def _close_idle(self, pool):
        for connection in [one for one in self.idle if one.pool is pool]:
            self.idle.remove(connection)
            connection.close()


class AsyncConnection:
    """A connection that asyncio calls use for one request after the other.

    It is an asyncio.Protocol in all but name: asyncio calls connection_made() to
    resume_writing().
    """

    def __init__(self, pool, origin):
        self.pool = pool        # of the client that uses it
        self.origin = origin    # (scheme, host and port)
        self.transport = None   # set when it is connected
        self.reader = None      # ResponseReader of the request in flight, or of the last one
        self.response = None    # the future of its response

    @classmethod
    async def open(cls, loop, pool, origin):
        scheme, host_and_port = origin
        parts = urllib.parse.urlsplit(f'{scheme}://{host_and_port}')
        is_https = scheme == 'https'
        port = parts.port or (443 if is_https else 80)
        context = pool.context if is_https else None
        _, connection = await loop.create_connection(
            lambda: cls(pool, origin), parts.hostname, port, ssl=context)
        return connection

    async def exchange(self, loop, data):
        """The response to a request."""
        self.reader = ResponseReader()
        self.response = loop.create_future()
        self.transport.write(data)
        return await self.response

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        if self.response is None or self.response.done():
            self.close()        # nobody asked for these bytes
            return
        try:
            response = self.reader.feed(data)
        except Exception as error:
            self.response.set_exception(error)
        else:
            if response is not None:
                self.response.set_result(response)

    def eof_received(self):
        self.data_received(b'')

    def connection_lost(self, error):
        if self.response is not None and not self.response.done():
            self.response.set_exception(error or ConnectionResetError('the connection was lost'))

    def pause_writing(self):
        """A request is buffered as a whole, so there is nothing to pause."""

    def resume_writing(self):
        """See pause_writing()."""

    def close(self):
        self.transport.close()


def max_async_waits():
    """Half of the files that this process may open: from 10 to MAX_ASYNC_WAITS."""
    try:
        import resource     # not on Windows
    except ImportError:
        return min(MAX_ASYNC_WAITS, 250)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_ASYNC_WAITS if files < 0 else max(10, min(MAX_ASYNC_WAITS, files // 2))


async_calls = AsyncCalls()


# -- In a handler ----------------------------------------------------------------------------------
# the claim whose handler runs in this context; in an isolated process a ChildClaim
current = contextvars.ContextVar('rundown_claim', default=None)


def job() -> dict[str, Any]:
    """The job of the running handler, a dict; None outside of handlers."""
    claim = current.get()
    return claim and claim.job


def progress(value: Any) -> None:
    """Show any JSON value as the job's progress, within a second or so.

    It does nothing outside of handlers.
    """
    text = as_json(value, 'progress')
    claim = current.get()
    if claim:
        claim.show_progress(text)


def inputs() -> list[Any]:
    """The results of the job's dependencies, in the order of `after`; None if one is not done."""
    claim = current.get()
    after = claim.job.get('after') if claim else None
    if not after:
        return []
    jobs = iter_jobs(claim.client, needed_by=claim.job['id'])
    results = {job['id']: job['result'] for job in jobs}
    return [results.get(id) for id in after]


def may_deadlock(claim, job):
    """Whether to call check_deadlock() before the handler of the claim waits for a job, or id."""
    if claim is None or not claim.holds_last_slot():
        return False
    return isinstance(job, str) or job.get('queue') == claim.job.get('queue')


def check_deadlock(client, claim, waiting):
    """Warn if a handler that holds the last slot of its queue waits for a job of that queue.

    Raises Error instead if it holds the only slot, and no other worker polls the queue.
    """
    job = client.call(**waiting.next_call(0))
    queue = claim.job.get('queue')
    worker = claim.job.get('worker')
    holds_only_slot = claim.holds_only_slot()
    # if this worker has claimed the job, it is the handler's own, or it was prefetched and
    # waits for the only slot
    is_ours = job['status'] == 'running' and job['worker'] == worker
    needs_slot = job['status'] == 'pending' or (holds_only_slot and is_ours)
    if job['queue'] != queue or not needs_slot:
        return
    give_up = waiting.next_call(0)['give_up']
    if not has_job(client, claim.job['id'], give_up):
        return      # it is another engine, whose queue has the same name
    text = f'{describe_job(claim.job)} waits for the job {job["id"]} of its own queue'
    if holds_only_slot and not has_other_workers(client, queue, worker, give_up):
        raise Error(f'the handler of {text}, which needs its slot: raise the concurrency, use '
                    'another queue, or enqueue a job with `after`')
    note(logging.WARNING, 'the handler of %s, which has no free slot: it may wait for long', text)


def has_job(client, id, give_up):
    try:
        client.call(f'/jobs?id={quote(id)}&brief=true', give_up=give_up)
    except Refused:
        return False
    return True


def has_other_workers(client, queue, worker, give_up):
    """Whether a queue has been polled lately by other workers than this one."""
    try:
        page = client.call(f'/queues?queue={quote(queue)}', give_up=give_up)
    except Refused:
        return True         # an older engine cannot tell
    return any(name != worker for row in page['queues'] for name in row['workers'])


# -- Steps and checkpoints -------------------------------------------------------------------------
T = TypeVar('T')


def step(name: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a part of the job once: return the saved result, or call the function and save it.

    The result is on disk before this returns; later attempts get it, and do not call the function.
    The first attempt, too, gets the result as it was decoded from JSON. An exception is not saved.
    With a coroutine function: `await step(...)`. In an async handler, any other function blocks the
    event loop until its result is saved. If the worker is stopping, this raises Lost and the job
    is released. Outside of handlers it only calls the function.
    """
    claim = current.get()
    if inspect.iscoroutinefunction(function):
        return async_step(claim, name, function, args, kwargs)
    if claim is None:
        return function(*args, **kwargs)
    claim.begin_step(name)
    if name not in claim.steps:
        text = as_json(function(*args, **kwargs), f'the result of step {name!r}')
        claim.steps[name] = claim.save_step(name, text)
    return copy.deepcopy(claim.steps[name])


async def async_step(claim, name, function, args, kwargs):
    if claim is None:
        return await function(*args, **kwargs)
    claim.begin_step(name)
    if name not in claim.steps:
        text = as_json(await function(*args, **kwargs), f'the result of step {name!r}')
        claim.steps[name] = await run_in_thread(claim.save_step, name, text)
    return copy.deepcopy(claim.steps[name])


def checkpoint(value: Any) -> Any:
    """progress() that returns once the value is on disk.

    A later attempt finds it in `job()["progress"]`. In async handlers: `await checkpoint(value)`.
    If the worker is stopping, this saves the value, raises Lost, and the job is released.
    """
    text = as_json(value, 'progress')
    claim = current.get()
    save = functools.partial(claim.save_progress, text) if claim else lambda: None
    return run_in_thread(save) if is_in_event_loop() else save()


def track(
    iterable: Iterable[T], total: int | None = None, every: int | None = None
) -> Track[T]:
    """Iterate, and show {"done": n, "total": total} as the job's progress.

    `total` defaults to len(iterable). With `every`, a checkpoint() is made after each `every`
    items, and a later attempt skips the items before the last checkpoint. In async handlers:
    `async for`.
    """
    return Track(iterable, total, every)


class Track(Generic[T]):
    """See track()."""

    def __init__(self, iterable: Iterable[T], total: int | None, every: int | None) -> None:
        if every is not None:
            check_number('every', every, 1)
        self._iterable = iterable
        self._every = every
        self._total = len(iterable) if total is None and hasattr(iterable, '__len__') else total

    def __iter__(self) -> Iterator[T]:
        if self._every and is_in_event_loop():
            raise Misuse('track(every=...) needs `async for` in an async handler')
        done = self._count_skipped()
        for item in itertools.islice(self._iterable, done, None):
            yield item
            done += 1
            if not self._every:
                progress(self._value(done))
            elif done % self._every == 0:
                checkpoint(self._value(done))
        if self._every:
            checkpoint(self._value(done))

    async def __aiter__(self) -> AsyncIterator[T]:
        skipped = self._count_skipped()
        done = 0
        async for item in as_async(self._iterable):
            done += 1
            if done <= skipped:
                continue
            yield item
            if not self._every:
                progress(self._value(done))
            elif done % self._every == 0:
                await checkpoint(self._value(done))
        if self._every:
            await checkpoint(self._value(done))

    def _count_skipped(self):
        """How many items are skipped, since an earlier attempt has done them."""
        claim = current.get()
        saved = claim.job.get('progress') if claim and self._every else None
        done = saved.get('done') if isinstance(saved, dict) else None
        return done if type(done) is int and done > 0 else 0

    def _value(self, done):
        return {'done': done, 'total': self._total}


async def as_async(iterable):
    if hasattr(iterable, '__aiter__'):
        async for item in iterable:
            yield item
    else:
        for item in iterable:
            yield item


def is_in_event_loop():
    """Whether the caller runs in an event loop, which must not be blocked."""
    asyncio = sys.modules.get('asyncio')    # otherwise there is none
    return asyncio is not None and asyncio._get_running_loop() is not None


def run_in_thread(function, *args):
    """Call a function in a new thread; returns a future of the running event loop."""
    import asyncio
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def resolve(set_outcome, value):
        if not future.done():       # otherwise it was cancelled
            set_outcome(value)

    def run():
        try:
            value = function(*args)
            set_outcome = future.set_result
        except BaseException as error:
            value = error
            set_outcome = future.set_exception
        with contextlib.suppress(RuntimeError):     # the loop has ended
            loop.call_soon_threadsafe(resolve, set_outcome, value)

    threading.Thread(target=run, daemon=True).start()
    return future


def warn_of_own_key(job):
    """Warn if a handler's enqueue() added nothing, since its own job holds the key."""
    claim = current.get()
    if claim and not job.get('created', True) and job.get('id') == claim.job.get('id'):
        note(logging.WARNING, 'the handler of %s enqueued a job with the key %s, which its own job '
             'holds until it ends: nothing was added. key_until="start" frees a key when its job '
             'begins', describe_job(claim.job), job.get('key'))


def describe_job(job):
    return f'{job.get("queue")} {job.get("id")}'


class Saver:
    """Saves steps and checkpoints of a running handler.

    Subclasses have the attributes steps, json_prefix, client and timeout, and the methods
    leave_if_stopping() and drop_progress().
    """

    def begin_step(self, name):
        """Raise Lost if the worker is stopping, Misuse if the engine would refuse the name.

        This precedes the function, since a result that cannot be saved would be lost.
        """
        self.leave_if_stopping()
        if self.steps is None:
            self.steps = {}
        is_text = isinstance(name, str) and not UNPRINTABLE.search(name)
        if not is_text or not 1 <= len(name) <= MAX_STEP_NAME:
            raise Misuse(f'the name of a step must have 1 to {MAX_STEP_NAME} printable characters, '
                         f'not {truncate_middle(repr(name), 300)}')
        if len(self.steps) >= MAX_STEPS and name not in self.steps:
            raise Error(f'the job has {MAX_STEPS} steps already')

    def save_step(self, name, text):
        """Save a step's result, JSON text; returns the first result that was saved by that name."""
        body = f'{self.json_prefix},"name":{as_json(name, "name")},"result":{text}}}'
        return self._save('/step', body)['result']

    def save_progress(self, text):
        self.drop_progress()
        self._save('/heartbeat', f'{self.json_prefix},"progress":{text}}}')
        self.leave_if_stopping()

    def _save(self, path, body):
        try:
            return self.client.call(path, body, give_up=self.timeout)
        except Refused as error:
            if error.status in GONE:
                raise Lost(str(error)) from None
            raise


def json_prefix(job):
    """The start of an item of a batch: a JSON object without its closing brace."""
    return f'{{"id":{encode_json(job["id"])},"attempt":{job["attempt"]}'


# -- Running a handler -----------------------------------------------------------------------------
OUR_FILE = job.__code__.co_filename


class Outcome:
    """How a run of a handler ended: the call that reports it, and the call's fields."""

    def __init__(self, call, value=None, **fields):
        self.call = call        # 'complete', 'fail' or 'release'; None: nothing is reported
        self.value = value      # the result or the exception, for hooks
        self.fields = fields    # each as JSON text


def failure(error, text=None, retry=True, delay=None):
    """The outcome of a job that failed; `text` replaces the traceback."""
    text = truncate_middle(text or error_text(error), MAX_ERROR)
    return Outcome('fail', error, error=encode_json(text), retry=encode_json(retry),
                   delay=encode_json(clamp_delay(delay)))


def error_text(error):
    """The traceback below our own frames; for Retry and Abort only the reason."""
    try:
        if isinstance(error, (Retry, Abort)) and error.__cause__ is None:
            return str(error) or type(error).__name__
        below_ours = error.__traceback__
        while below_ours and below_ours.tb_frame.f_code.co_filename == OUR_FILE:
            below_ours = below_ours.tb_next
        return ''.join(traceback.format_exception(type(error), error, below_ours))
    except BaseException:       # str() and repr() of an exception may raise anything
        return f'{type(error).__name__}, of which there is no traceback'


def last_line(error):
    """The last line of a traceback; for an exception group the line with its message."""
    text = error_text(error).rstrip()
    if text.endswith('-----'):
        group = re.search(r'^  \| (\S.*)', text, re.M)
        if group:
            return truncate_middle(group[1], 300)
    lines = text.strip().splitlines() or ['']
    return truncate_middle(lines[-1], 300)


class Policy:
    """Which failures are retried, and after how many seconds."""

    def __init__(self, backoff=None, retry_on=None, abort_on=None):
        self.backoff = as_tuple(backoff)
        self.retry_on = as_tuple(retry_on)
        self.abort_on = as_tuple(abort_on)
        for name, classes in (('retry_on', self.retry_on), ('abort_on', self.abort_on)):
            for each in classes:
                if not isinstance(each, type) or not issubclass(each, BaseException):
                    raise Misuse(f'{name} must be a class of exceptions or a tuple of them, '
                                 f'not {classes!r}')
        for pause in self.backoff:
            if not callable(pause):
                check_number('backoff', pause, 0, NUMBER)

    def retry_fields(self, error, retries):
        """The fields `retry` and `delay` of /fail, for a job that had `retries` retries so far."""
        try:
            if not self._is_retried(error):
                return {'retry': False}
            return {'delay': self._delay(error, retries)}
        except BaseException as problem:    # classes and functions of users may raise anything
            note(logging.ERROR, 'backoff of retry %d failed: %s', retries + 1, last_line(problem))
            return {}

    def _is_retried(self, error):
        if isinstance(error, (Abort, *self.abort_on)):
            return False
        if not self.retry_on or isinstance(error, (Retry, Timeout, Crashed)):
            return True     # retry_on only selects among the handler's own exceptions
        return isinstance(error, self.retry_on)

    def _delay(self, error, retries):
        """Seconds until the next attempt; None: the engine decides."""
        delay = error.delay if isinstance(error, Retry) else None
        if delay is None and self.backoff:
            pause = self.backoff[min(retries, len(self.backoff) - 1)]
            delay = pause(retries + 1) if callable(pause) else pause
        if delay is not None:
            check_number('backoff', delay, 0, NUMBER)
        return delay


def as_tuple(value):
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


class HandlerTable:
    """The functions that handle a queue's jobs, by task name; the name None handles all jobs."""

    def __init__(self, functions):
        self.functions = functions

    def are_async(self):
        return all(map(inspect.iscoroutinefunction, self.functions.values()))

    def resolve(self, payload):
        """The function for a payload, and its arguments."""
        if None in self.functions:
            return self.functions[None], [payload], {}
        call = payload if isinstance(payload, dict) else {}
        name = call.get('task')
        args = call.get('args') or []
        kwargs = call.get('kwargs') or {}
        if not (isinstance(name, str) and isinstance(args, list) and isinstance(kwargs, dict)):
            raise Abort('the payload of a task must be '
                        '{"task": "its name", "args": [...], "kwargs": {...}}')
        return self._find_task(name), args, kwargs

    def task_name(self, job):
        """The name of the job's task, for the log; '' if the queue has no tasks."""
        payload = job.get('payload')
        name = payload.get('task') if isinstance(payload, dict) else None
        return name[:100] if isinstance(name, str) and None not in self.functions else ''

    def _find_task(self, name):
        """The task of that name, or the only one whose name differs only by leading packages.

        An unknown task fails like any error, so that a newer worker can take the next attempt.
        """
        if name in self.functions:
            return self.functions[name]
        similar = [known for known in self.functions
                   if known.endswith('.' + name) or name.endswith('.' + known)]
        if len(similar) == 1:
            return self.functions[similar[0]]
        near = difflib.get_close_matches(name, self.functions) or sorted(self.functions)[:10]
        raise Retry(f'this worker does not know the task {name}; near it are {", ".join(near)}')

    def retry_fields(self, error, job):
        """The fields `retry` and `delay` of /fail, by the policy of the job's function.

        The handler may have changed the job, so its fields are checked.
        """
        try:
            function = self.resolve(job.get('payload'))[0]
        except Error:
            function = None
        policy = getattr(function, 'policy', None) or Policy()
        retries = job.get('retries')
        return policy.retry_fields(error, retries if type(retries) is int else 0)


def run_handler(handlers, job, around=()):
    """Run a job's handler; returns the outcome. Never raises, and sends nothing."""
    pid = os.getpid()
    try:
        function, args, kwargs = handlers.resolve(job['payload'])
        if around:
            result = call_surrounded(around, job, function, args, kwargs)
        else:
            result = function(*args, **kwargs)
            if isinstance(result, types.CoroutineType):
                result = current.get().run_coroutine(result)
    except BaseException as error:
        return failure(error, **handlers.retry_fields(error, job))
    finally:
        if os.getpid() != pid:
            os._exit(1)         # a process that the handler forked must not go on as a worker
    return completion(result)


def call_surrounded(around, job, function, args, kwargs):
    result = None       # stays so if a function of around() suppresses an exception
    with around_context(around, job):
        result = function(*args, **kwargs)
        if isinstance(result, types.CoroutineType):
            result = current.get().run_coroutine(result)
    return result


async def run_async_handler(handlers, job, around=()):
    """run_handler() on an event loop, for a queue whose handlers are async."""
    pid = os.getpid()
    result = None       # stays so if a function of around() suppresses an exception
    try:
        function, args, kwargs = handlers.resolve(job['payload'])
        with around_context(around, job):
            result = await function(*args, **kwargs)
    except BaseException as error:
        return failure(error, **handlers.retry_fields(error, job))
    finally:
        if os.getpid() != pid:
            os._exit(1)
    return completion(result)


def around_context(around, job):
    """A context manager made of the generator functions that wrap each run of a handler."""
    stack = contextlib.ExitStack()
    try:
        for function in around:
            args = [job] if inspect.signature(function).parameters else []
            stack.enter_context(contextlib.contextmanager(function)(*args))
    except BaseException as error:
        stack.__exit__(type(error), error, error.__traceback__)
        raise
    return stack


def completion(result):
    """The outcome of a handler that returned. A result that is not JSON fails the job for good."""
    try:
        if result is None:
            return Outcome('complete')
        text = as_json(result, 'result')
        if len(text) > MAX_RESULT:
            raise NotJSON(f'result has {len(text)} characters of JSON; '
                          f'at most {MAX_RESULT} are taken')
        return Outcome('complete', result, result=text)
    except BaseException as error:      # a property or __iter__ of the result may raise anything
        return failure(error, str(error) if isinstance(error, NotJSON) else None, retry=False)


def run_with_claim(claim, function, /, *args, **kwargs):
    token = current.set(claim)
    try:
        return function(*args, **kwargs)
    finally:
        current.reset(token)


def pass_jobs_to_threads():
    """Make job() and progress() work in threads and thread pools that a handler uses.

    Threads do not inherit context variables, so this wraps the methods that start them.
    """
    from concurrent.futures import ThreadPoolExecutor       # here, since only workers need it
    start = threading.Thread.start
    submit = ThreadPoolExecutor.submit
    if getattr(start, 'passes_jobs', False):
        return

    @functools.wraps(start)
    def start_with_claim(self):
        claim = current.get()
        if claim is not None:
            self.run = functools.partial(run_with_claim, claim, self.run)
        return start(self)

    @functools.wraps(submit)
    def submit_with_claim(self, function, /, *args, **kwargs):
        claim = current.get()
        if claim is None:
            return submit(self, function, *args, **kwargs)
        # in an empty context: a pool thread that this starts also serves other jobs
        empty = contextvars.Context()
        return empty.run(submit, self, run_with_claim, claim, function, *args, **kwargs)

    start_with_claim.passes_jobs = True
    threading.Thread.start = start_with_claim
    ThreadPoolExecutor.submit = submit_with_claim


class Claim(Saver):
    """A claimed job on its way through the worker.

    Several threads may try to finish it: the first decides how it ends, the others are ignored.
    """

    # changed with the lock held
    slot = None                     # the slot that runs it
    started_at = None               # None: waits for a slot
    progress = None                 # the latest that was not sent yet, as JSON text
    # set with the lock held; then only the reporter changes them
    outcome = None                  # None: not finished
    is_sending_progress = False
    # written by the thread that finishes it, then by the reporter only
    report_item = None              # the item of the batch that reports the outcome
    # written by the reporter only
    was_refused = False             # the engine refused an outcome
    # set by the event loop's thread; reset when the handler has ended
    asyncio_task = None             # of an async handler, once it has begun

    def __init__(self, job, consumer, now):
        # constant, except that the handler may change the dict `job`
        self.job = job
        self.consumer = consumer
        self.client = consumer.session.client
        self.claimed_at = now               # monotonic seconds, like the other times here
        self.timeout = job['timeout']       # seconds
        self.json_prefix = json_prefix(job)
        self.lock = threading.Lock()
        # written by the handler's threads
        self.steps = job.get('steps')       # results by name; None: there are none
        # touched by the watcher only
        self.progress_sent_at = now

    def start(self, slot, now):
        """True if the slot may run it; False if it was released or lost meanwhile."""
        with self.lock:
            if self.outcome is not None:
                return False
            self.slot = slot
            self.started_at = now
            return True

    def try_finish(self, outcome, interruption=None, unless_started=False):
        """True if this was the first outcome. An interruption stops the handler if it runs.

        With `unless_started`, a claim that has a slot is left alone.
        """
        with self.lock:
            if self.outcome is not None or (unless_started and self.slot):
                return False
            self.outcome = outcome
            if self.slot and interruption:
                # with the lock held, so that the slot cannot start another claim meanwhile
                self.slot.interrupt(self, interruption)
            return True

    def interrupt(self, interruption):
        """Stop the handler of a claim that was let go."""
        with self.lock:
            if self.slot:
                self.slot.interrupt(self, interruption)

    def show_progress(self, text):
        with self.lock:
            self.progress = text

    def take_progress(self):
        """The progress to send now, or None."""
        with self.lock:
            text = self.progress
            self.progress = None
            self.is_sending_progress = text is not None
            return text

    def drop_progress(self):
        """Discard progress that is older than a checkpoint, and wait until none is in flight."""
        with self.lock:
            self.progress = None
        wait_until(lambda: not self.is_sending_progress or self.outcome, NEVER)

    def leave_if_stopping(self):
        """Raise Lost if the claim has ended. If the worker is stopping, release it first."""
        if self.outcome is None and self.consumer.worker.stopping.is_set():
            self.consumer.let_go(self)
        if self.outcome is not None:
            raise Lost('the job was released, or is no longer claimed by this worker')

    def holds_last_slot(self):
        """Whether no slot is free for another job of its queue."""
        running = [claim for claim in self.consumer.in_flight.copy() if claim.slot]
        return len(running) >= len(self.consumer.slots)

    def holds_only_slot(self):
        return len(self.consumer.slots) == 1

    def run_coroutine(self, coroutine):
        """The result of an async handler on a queue that has handlers of both kinds."""
        task = None
        while task is None:
            task = self.consumer.worker.event_loop.run(coroutine, self)
        return task.result()

    def __str__(self):
        item = json.loads(self.json_prefix + '}')       # the handler may have changed `job`
        task = self.consumer.handlers.task_name(self.job)
        words = [self.consumer.name, task, item['id'], f'attempt {item["attempt"]}']
        return ' '.join(filter(None, words))


class Slot:
    """A thread that runs claims of a queue, one after the other.

    A handler that was interrupted keeps the thread until it returns; a new slot takes its place.
    """

    # written by the slot's thread, except where noted
    is_ready = True         # it can take a claim
    is_terminating = False  # the worker's end waits for its program or process
    is_abandoned = False    # it takes no more claims; set by interrupt() or use_event_loop()
    interrupted_task = None     # of an async handler that had to be stopped; set by interrupt()

    def __init__(self, consumer):
        self.consumer = consumer
        self.thread = consumer.worker.start_thread(self._run, consumer.name)

    def _run(self):
        while not self.is_abandoned:
            self.prepare()
            claim = self.consumer.ready.get()
            if claim is None:
                break
            if claim.start(self, time.monotonic()):
                # a new context: the next job must not see the context variables of this one
                contextvars.Context().run(self._run_claim, claim)
        self.close()

    def _run_claim(self, claim):
        current.set(claim)
        try:
            if self.consumer.hooks['start']:
                self.call_hooks('start', claim, None)
            outcome = self.run(claim)
        except Interruption as error:       # in a hook, or just after the handler
            outcome = failure(error)
        self.consumer.on_ended(claim, outcome)

    def prepare(self):
        """Get ready for the next claim."""

    def run(self, claim):
        """The outcome of the claim's handler."""
        return run_handler(self.consumer.handlers, claim.job, self.consumer.worker.app.wrappers)

    def call_hooks(self, event, claim, value):
        self.consumer.call_hooks(event, claim, value)

    def on_stop(self):
        """Called when the worker begins to stop."""

    def interrupt(self, claim, interruption):
        """Stop the handler, and continue with another slot. The claim's lock is held."""
        self.is_abandoned = True
        self.interrupted_task = claim.asyncio_task
        self.consumer.replace(self)
        self.consumer.worker.interruptions.add(self, claim, interruption)

    def try_raise(self, claim, interruption):
        """Raise an interruption in the handler; False if that has to be tried again."""
        if claim.asyncio_task:
            return self.consumer.worker.event_loop.cancel(claim.asyncio_task, interruption)
        return try_raise(self.thread, interruption)

    def is_alive(self):
        """Whether a handler may run in it."""
        return self.thread.is_alive()

    def blocks_event_loop(self):
        """Whether its interrupted async handler still runs without awaiting."""
        task = self.interrupted_task
        return task is not None and task.get_coro().cr_running

    def stack_text(self, claim):
        """The stack of the handler, from its own frames on."""
        task = claim.asyncio_task
        frames = self.consumer.worker.event_loop.task_frames(task) if task else self.frames()
        stack = traceback.StackSummary.extract(frames[-50:])    # a recursion may be deep
        ours = (OUR_FILE, threading.__file__)
        lines = itertools.dropwhile(lambda line: line.filename in ours, stack)
        return ''.join(traceback.format_list(lines))

    def frames(self):
        """The frames of its thread."""
        return thread_frames(self.thread.ident)

    def kill(self):
        """Kill the slot's process, if it has one."""

    def close(self):
        """Called when the slot runs no more claims."""


def thread_frames(thread_id):
    """The frames of a thread, outermost first, with their line numbers."""
    frame = sys._current_frames().get(thread_id)
    return list(traceback.walk_stack(frame))[::-1] if frame else []


def coroutine_frames(coroutine):
    """The frames of a coroutine that waits, and of the coroutines that it awaits."""
    frames = []
    with contextlib.suppress(AttributeError):   # it waits for no coroutine, or has ended meanwhile
        while coroutine:
            frames.append((coroutine.cr_frame, coroutine.cr_frame.f_lineno))
            coroutine = coroutine.cr_await
    return frames


# -- Async handlers --------------------------------------------------------------------------------
class EventLoop:
    """The event loop that the async handlers of a worker share, in a thread of its own."""

    def __init__(self, start_thread):
        import asyncio      # here, since it takes megabytes and most workers do not need it
        # constant
        self.asyncio = asyncio
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(make_daemon_executor())
        # safe without a lock: a dict whose single operations are atomic, and flags
        self.not_begun = {}         # a queue for each waiting thread whose coroutine has not begun
        self.is_abandoned = False
        self.is_ending = False
        # written by the watcher; the loop's thread resets probed_at, any thread reads is_blocked
        self.probed_at = None       # when the pending probe was sent; None: it was answered
        self.is_blocked = False     # by a handler or callback that does not return to the loop
        self.thread = start_thread(self._run, 'asyncio')

    def _run(self):
        self.asyncio.set_event_loop(self.loop)
        try:
            while not self.is_ending:
                self._run_until_stopped()
            tasks = self.asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self.loop.run_until_complete(self.asyncio.wait(tasks, timeout=REPORT_GRACE))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()

    def _run_until_stopped(self):
        """Run the loop until stop(), or until a handler stops it or exits in a task of its own."""
        try:
            self.loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as error:
            note(logging.ERROR, 'a task of an async handler failed: %s', last_line(error))

    def call(self, function, *args):
        """Call a function soon in the loop's thread. Does nothing once the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *args)

    def stop(self):
        self.is_ending = True
        self.call(self.loop.stop)

    def create_task(self, coroutine, context, on_done):
        """Run a coroutine in a context. Called in the loop's thread."""
        task = context.run(self.loop.create_task, coroutine)
        task.add_done_callback(on_done, context=contextvars.Context())
        return task

    def run(self, coroutine, claim):
        """Run a coroutine while the calling thread waits; returns its finished task.

        None if the loop was abandoned before the coroutine began.
        """
        finished = SimpleQueue()
        context = contextvars.copy_context()

        def start():
            if self.not_begun.pop(finished, None) is None:
                return                  # the loop was abandoned
            claim.asyncio_task = self.create_task(coroutine, context, finished.put)
            if claim.outcome:           # it ended before there was a task to cancel
                claim.asyncio_task.cancel()

        self.not_begun[finished] = True
        self.loop.call_soon_threadsafe(start)
        if self.is_abandoned:       # perhaps before this was in `not_begun`
            self.abandon()
        task = finished.get()
        claim.asyncio_task = None
        return task

    def abandon(self):
        """Leave the loop to a handler that blocks it. Coroutines that have not begun move on."""
        self.is_abandoned = True
        for finished in list(self.not_begun):
            with contextlib.suppress(KeyError):     # it has just begun
                self.not_begun.pop(finished)
                finished.put(None)
        self.stop()         # takes effect when the handler returns

    def cancel(self, task, interruption):
        """Cancel a task. One that blocks the loop gets the interruption raised instead.

        Returns False while that is not possible.
        """
        coroutine = task.get_coro()
        frame = coroutine.cr_frame
        if frame is None:       # it has ended
            return True
        if not self.is_blocked or not coroutine.cr_running:
            self.call(task.cancel)
            return True
        return try_raise(self.thread, interruption, within=frame)

    def task_frames(self, task):
        coroutine = task.get_coro()
        if not coroutine.cr_running:
            return coroutine_frames(coroutine)
        frames = thread_frames(self.thread.ident)
        return list(itertools.dropwhile(lambda pair: pair[0] is not coroutine.cr_frame, frames))

    def probe(self, now):
        """Check that the loop still runs callbacks. True once when it is found to be blocked."""
        if self.probed_at is None:
            self.probed_at = now
            self.is_blocked = False
            self.call(self._on_probe)
        elif now - self.probed_at > MAX_LOOP_BLOCK and not self.is_blocked:
            self.is_blocked = True
            return True
        return False

    def _on_probe(self):
        self.probed_at = None


def make_daemon_executor():
    """An executor for asyncio whose threads do not keep the process from ending.

    A cancelled handler cannot stop a function that it runs in such a thread.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    class DaemonExecutor(ThreadPoolExecutor):
        def __init__(self):
            super().__init__()
            self.calls = SimpleQueue()
            self.lock = threading.Lock()        # held to change `threads` and `idle`
            self.threads = 0
            self.idle = 0                       # threads that wait for a call

        def submit(self, function, /, *args, **kwargs):
            future = Future()
            call = functools.partial(run_with_claim, current.get(), function, *args, **kwargs)
            self.calls.put((future, call))
            with self.lock:
                if self.idle:
                    self.idle -= 1
                elif self.threads < MAX_EXECUTOR_THREADS:
                    self.threads += 1
                    empty = contextvars.Context()
                    empty.run(start_daemon_thread, self._run, 'executor')
            return future

        def _run(self):
            while True:
                future, call = self.calls.get()
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(call())
                    except BaseException as error:
                        future.set_exception(error)
                del future, call        # so that an idle thread keeps no job's objects alive
                with self.lock:
                    self.idle += 1

    return DaemonExecutor()


class AsyncReady:
    """Matches the waiting claims of an async queue with its free slots."""

    def __init__(self, event_loop):
        self.event_loop = event_loop    # constant
        # touched in the loop's thread only
        self.claims = collections.deque()
        self.slots = []

    def put(self, claim):
        self.event_loop.call(self._on_claim, claim)

    def put_slot(self, slot):
        self.event_loop.call(self.on_slot, slot)

    def _on_claim(self, claim):
        if claim is not None:       # None ends a slot that is a thread
            self.claims.append(claim)
            self._dispatch()

    def on_slot(self, slot):
        self.slots.append(slot)
        self._dispatch()

    def _dispatch(self):
        while self.slots and self.claims:
            claim = self.claims.popleft()
            if claim.start(self.slots[-1], time.monotonic()):
                self.slots.pop().begin(claim)


class AsyncSlot(Slot):
    """A slot that runs its claims as tasks of the event loop, one after the other."""

    def __init__(self, consumer):
        self.consumer = consumer
        self.ready = consumer.ready
        self.event_loop = self.ready.event_loop
        self.task = None            # the latest
        self.ready.put_slot(self)

    @property
    def is_ready(self):
        return not self.event_loop.is_blocked

    def begin(self, claim):
        """Start a claim. Called in the loop's thread."""
        context = contextvars.Context()
        on_done = functools.partial(self._on_done, claim)
        self.task = self.event_loop.create_task(self._run_claim(claim), context, on_done)
        claim.asyncio_task = self.task
        if claim.outcome:       # it ended before there was a task to cancel
            self.task.cancel()

    async def _run_claim(self, claim):
        current.set(claim)
        consumer = self.consumer
        around = consumer.worker.app.wrappers
        try:
            consumer.call_hooks('start', claim, None)
            outcome = await run_async_handler(consumer.handlers, claim.job, around)
        except Interruption as error:       # in a hook, or just after the handler
            outcome = failure(error)
        claim.asyncio_task = None
        consumer.on_ended(claim, outcome)

    def _on_done(self, claim, task):
        if task.cancelled():        # before it began: its loop was abandoned, or the claim ended
            self.consumer.let_go(claim)
            self.consumer.on_ended(claim, RELEASED)
        elif isinstance(task.exception(), Interruption):        # just after its handler had ended
            self.consumer.on_ended(claim, failure(task.exception()))
        elif task.exception():
            self.consumer.worker.on_fault('asyncio', task.exception())
        if not self.is_abandoned:
            self.ready.on_slot(self)

    def try_raise(self, claim, interruption):
        task = claim.asyncio_task
        return task is None or self.event_loop.cancel(task, interruption)

    def is_alive(self):
        return self.task is not None and not self.task.done()

    def frames(self):
        return []       # without a task there are none


# -- Interrupting a handler ------------------------------------------------------------------------
class Interruptions:
    """Interrupted slots, and the exceptions that wait until it is safe to raise them."""

    def __init__(self):
        # safe without a lock: a dict and a queue whose single operations are atomic
        self.interrupted_at = {}        # slot -> time (monotonic), while its handler still runs
        self.pending = SimpleQueue()    # (slot, claim, exception) of those not raised yet

    def add(self, slot, claim, interruption):
        self.interrupted_at[slot] = time.monotonic()
        if not slot.try_raise(claim, interruption):
            self.pending.put((slot, claim, interruption))

    def retry(self):
        """Try again to raise the pending exceptions."""
        for _ in range(self.pending.qsize()):
            slot, claim, interruption = self.pending.get()
            if slot.is_alive() and not slot.try_raise(claim, interruption):
                self.pending.put((slot, claim, interruption))

    def is_event_loop_hung(self):
        """Whether a handler blocks the event loop HUNG_AFTER seconds after its interruption."""
        return any(slot.blocks_event_loop() for slot in self.hung())

    def forget_ended(self):
        for slot in list(self.interrupted_at):
            if not slot.is_alive():
                self.interrupted_at.pop(slot, None)

    def running(self):
        """The interrupted slots whose handlers still run."""
        return [slot for slot in list(self.interrupted_at) if slot.is_alive()]

    def hung(self):
        """Slots that still run HUNG_AFTER seconds after their interruption."""
        latest = time.monotonic() - HUNG_AFTER
        return [slot for slot in self.running() if self.interrupted_at.get(slot, NEVER) <= latest]

    def have_taken_effect(self):
        """Whether each interrupted handler has returned or hangs."""
        return len(self.running()) == len(self.hung())


# Methods that acquire or release a lock.
LOCK_METHODS = frozenset({
    'acquire', 'release', '__enter__', '__exit__', '_acquire_restore', '_release_save',
    '_acquireLock', '_releaseLock', 'acquire_lock', 'release_lock',
})
LOCK_CALL_BYTES = 60    # bytes of bytecode around such a call, where its lock may be held
STDLIB = os.path.dirname(threading.__file__) + os.sep


def try_raise(thread, error, within=None):
    """Raise an exception in another thread, unless that leaves a lock of the stdlib locked.

    Returns False if the thread is at such a place now, and the caller has to try again. Does
    nothing if the frame `within` is no longer on its stack. The exception is raised when the
    thread next runs Python code, so not while it sleeps in C.
    """
    frame = sys._current_frames().get(thread.ident)
    if frame is None or not thread.is_alive():      # in this order: a new thread may get its ident
        return True
    instruction = frame.f_lasti
    stack = [each for each, _ in traceback.walk_stack(frame)]
    if within and within not in stack:
        return True
    if any(is_taking_lock(each.f_code, each.f_lasti) for each in stack):
        return False
    return raise_if_unmoved(thread.ident, frame, instruction, error)


def raise_if_unmoved(thread_id, frame, instruction, error):
    """Raise an exception in a thread if it is still at this instruction of this frame.

    Returns whether it was raised.

    In plain terms: if frames[thread_id] is frame and frame.f_lasti == instruction, raise it.
    The interpreter may switch threads between any two bytecode instructions, but not inside of one
    call into C. So this builds a chain of iterators of C, which any() runs in one call.
    """
    # the frames by thread, once and only when any() asks for them
    frames = itertools.islice(iter(sys._current_frames, None), 1)
    # the thread's innermost frame, if it is still the same one
    innermost = map(operator.methodcaller('get', thread_id), frames)
    same_frame = filter(functools.partial(operator.is_, frame), innermost)
    # whether that frame is still at the instruction
    is_there = map(functools.partial(operator.eq, instruction),
                   map(operator.attrgetter('f_lasti'), same_frame))
    # the arguments of the call that raises the exception: once if it is there, else never
    arguments = (ctypes.c_ulong(thread_id), ctypes.py_object(error))
    calls = itertools.compress(itertools.repeat(arguments), is_there)
    return any(itertools.starmap(ctypes.pythonapi.PyThreadState_SetAsyncExc, calls))


@functools.lru_cache(maxsize=10_000)
def is_taking_lock(code, instruction):
    """Whether a lock of the standard library may stay locked if an exception is raised here.

    That is possible near a call that acquires or releases it, unless a `with` or `try` handles
    the exception.
    """
    is_stdlib = code.co_filename.startswith(STDLIB) and 'site-packages' not in code.co_filename
    if not is_stdlib and not code.co_filename.startswith('<frozen '):
        return False
    if LOCK_METHODS.isdisjoint(code.co_names):
        return False
    near = [each.offset for each in dis.get_instructions(code)
            if each.argval in LOCK_METHODS and abs(each.offset - instruction) <= LOCK_CALL_BYTES]
    return bool(near) and not is_guarded(code, instruction)


def is_guarded(code, instruction):
    """Whether the instruction is in the block of a `with` or `try`."""
    bytecode = dis.Bytecode(code)
    if hasattr(bytecode, 'exception_entries'):      # Python 3.11 and newer
        return any(entry.start <= instruction < entry.end for entry in bytecode.exception_entries)
    blocks = 0
    for each in bytecode:
        if each.offset >= instruction:
            break
        if each.opname in ('SETUP_FINALLY', 'SETUP_WITH', 'SETUP_ASYNC_WITH'):
            blocks += 1
        elif each.opname == 'POP_BLOCK':
            blocks = max(0, blocks - 1)
    return blocks > 0


# -- Worker ----------------------------------------------------------------------------------------
NEVER = float('inf')        # a time or deadline that does not come
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ('SIGTERM', 'SIGINT', 'SIGBREAK', 'SIGHUP', 'SIGQUIT')
    if hasattr(signal, name)
]
KILL = getattr(signal, 'SIGKILL', signal.SIGTERM)
SIGHUP = getattr(signal, 'SIGHUP', None)
RELEASED = Outcome('release')
LOST = Outcome(None)
REFUSALS = (400, 413)       # statuses: the request itself is wrong
GONE = (404, 409)           # statuses: the claim no longer exists
# log messages for the time when the requests of a worker begin to fail
AWAY = 'engine away, trying again until it is back'
REFUSING = 'engine refuses this worker, trying again until it does not'


class LogWriter:
    """A thread that logs for the threads of a worker.

    A job's handler may hold the lock of a log handler for long, even for ever. The threads of the
    worker must not wait for it: they only put lines into a queue.
    """

    def __init__(self):
        self.calls = SimpleQueue()      # safe by itself: functions to call; None ends the thread
        self.users = 0                  # workers that run; changed by the threads that run them

    def start(self):
        self.users += 1
        if self.users == 1:
            threading.Thread(target=self._run, name='rundown-log', daemon=True).start()

    def stop(self, seconds):
        """Wait until everything is logged, for `seconds` at most."""
        logged = SimpleQueue()
        self.calls.put(functools.partial(logged.put, None))
        with contextlib.suppress(Empty):
            logged.get(timeout=seconds)
        self.users -= 1
        if not self.users:
            self.calls.put(None)

    def put(self, function, *args):
        """Call the function in the thread; without a thread, call it here.

        It is not called at all while MAX_LOG_BACKLOG calls wait.
        """
        if not self.users:
            function(*args)
        elif self.calls.qsize() < MAX_LOG_BACKLOG:
            self.calls.put(functools.partial(function, *args))

    def after_fork(self):
        self.users = 0      # a child has no such thread

    def _run(self):
        for call in iter(self.calls.get, None):
            with contextlib.suppress(Exception):
                call()


log_writer = LogWriter()
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=log_writer.after_fork)


def write_line(level, text, created):
    if log.isEnabledFor(level):
        record = log.makeRecord(log.name, level, OUR_FILE, 0, '%s', (text,), None, 'note')
        record.created = created
        record.msecs = int(created % 1 * 1000)
        log.handle(record)


def write_record(fields):
    """Log a record that an isolated process has sent."""
    logger = logging.getLogger(fields['name'])
    if logger.isEnabledFor(fields['levelno']):
        logger.handle(logging.makeLogRecord(fields))


def note(level, text, *values):
    """Log a line. Never raises, not even if a handler of a job has closed the log's streams."""
    with contextlib.suppress(Exception):
        log_writer.put(write_line, level, printable(text % values), time.time())


def wait_until(condition, deadline):
    """Wait for a condition, until a deadline at most. Signals are handled meanwhile."""
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


def exit_process(code):
    """End the process although handlers hang, which may hold locks of the log and of stdout.

    With --reload, the program starts again instead if the project's files have changed.
    """
    def flush():
        for function in (logging.shutdown, sys.stdout.flush):
            with contextlib.suppress(Exception):
                function()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(REPORT_GRACE)
    reloader.restart_if_changed()
    os._exit(code)


def end_at_sigterm():
    """Until run() sets a handler, end at SIGTERM also as PID 1, which ignores it by default."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))


def open_standard_streams():
    """Open 0, 1 and 2 if they are closed.

    Otherwise a pipe could get one of these numbers, and programs would write their output into it.
    """
    with contextlib.suppress(OSError):
        number = os.open(os.devnull, os.O_RDWR)
        while number <= 2:
            os.set_inheritable(number, True)
            number = os.open(os.devnull, os.O_RDWR)
        os.close(number)


replaced_signals = {}       # the handlers of signals before run() replaced them


def restore_signals():
    """Restore the handlers that signals had before run().

    Also called in processes that a handler forks, so that terminate() ends them.
    """
    for number in list(replaced_signals):
        with contextlib.suppress(ValueError):       # not in the main thread
            signal.signal(number, replaced_signals.pop(number) or signal.SIG_DFL)


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=restore_signals)


class Consumer:
    """Runs the jobs of a queue: has its fetcher, its slots, and the claims in flight.

    Claims arrive from the fetcher by accept(), and leave by on_ended() or finish().
    """

    def __init__(self, worker, session, config, concurrency):
        # constant after start()
        self.worker = worker
        self.session = session
        self.config = config
        self.name = config.name
        self.concurrency = concurrency
        self.hooks = worker.app.hooks       # by event
        self.handlers = HandlerTable(config.functions)
        self.fetcher = Fetcher(self)
        # safe without a lock: a queue, and a dict whose single operations are atomic
        # claims that wait for a slot; None ends a slot thread. Async handlers have an AsyncReady,
        # which the watcher replaces together with the event loop.
        self.ready = SimpleQueue()
        self.in_flight = {}                 # claims that wait, run or clean up, in order
        # changed with the lock held
        self.slots_lock = threading.Lock()
        self.slots = []
        # races are harmless
        self.seconds_per_job = None         # a moving average; None: not known yet
        self.finished_at = 0                # monotonic: when the last job was finished
        self.lines_this_tick = 0            # of the log, for jobs that are done

    def start(self):
        slot_type = self._slot_type()
        if slot_type is AsyncSlot:
            self.ready = AsyncReady(self.worker.event_loop)
        self.slots = [slot_type(self) for _ in range(self.concurrency)]
        self.fetcher.start()

    def use_event_loop(self, event_loop):
        """Continue with new slots on another event loop, if the handlers are async."""
        if isinstance(self.ready, AsyncReady):
            self.ready = AsyncReady(event_loop)
            with self.slots_lock:
                for slot in self.slots:
                    slot.is_abandoned = True
                self.slots = [AsyncSlot(self) for _ in range(self.concurrency)]

    def _slot_type(self):
        handler = self.config.functions.get(None)
        if hasattr(handler, 'slot_type'):
            return handler.slot_type
        if self.config.isolate:
            return IsolatedSlot
        return AsyncSlot if self.handlers.are_async() else Slot

    def accept(self, jobs):
        """Hand newly claimed jobs to the slots, or release them if the worker is stopping."""
        now = time.monotonic()
        for job in jobs:
            claim = Claim(job, self, now)
            self.session.claims[claim] = None
            self.in_flight[claim] = None
            if not self.worker.stopping.is_set():
                self.ready.put(claim)
        if self.worker.stopping.is_set():
            self.worker.release()       # the release at the stop may have missed these

    def count_ready_slots(self):
        return sum(slot.is_ready for slot in self.slots)

    def prefetch_target(self, slots):
        """How many claims this number of slots should have in flight.

        One for each, and as many as the slots will start within PREFETCH_SECONDS. Their pace is
        not known if none has finished a job in that time: they may be busy with long ones.
        """
        is_recent = time.monotonic() - self.finished_at < PREFETCH_SECONDS
        if self.seconds_per_job is None or not is_recent:
            return slots
        ahead = int(slots * PREFETCH_SECONDS / max(self.seconds_per_job, 1e-5))
        return slots + min(MAX_BATCH, ahead)

    def on_ended(self, claim, outcome):
        """Called when a claim's handler has ended. Only the first outcome of a claim counts."""
        if claim.try_finish(outcome):
            self._on_finished(claim, outcome)
        self._remove(claim)

    def _on_finished(self, claim, outcome):
        """Report and log the outcome of a handler, call its hooks, and note its pace."""
        seconds = time.monotonic() - claim.started_at
        succeeded = outcome.call == 'complete'
        self.report(claim, outcome)
        if not succeeded:
            reason = last_line(outcome.value)
            note(logging.WARNING, '%s failed after %.3f s: %s', claim, seconds, reason)
        else:
            self.lines_this_tick += 1
            if self.lines_this_tick <= MAX_LOG_LINES_PER_TICK:
                note(logging.INFO, '%s done in %.3f s', claim, seconds)
        event = 'success' if succeeded else 'failure'
        if self.hooks[event]:
            claim.slot.call_hooks(event, claim, outcome.value)
        outcome.value = None        # it may be large, and the claim waits for its report
        self._note_pace(claim)

    def _note_pace(self, claim):
        """Update the average time of a job, which includes its hooks."""
        self.finished_at = time.monotonic()
        seconds = self.finished_at - claim.started_at
        pace = self.seconds_per_job
        self.seconds_per_job = seconds if pace is None else pace + PACE_WEIGHT * (seconds - pace)

    def finish(self, claim, outcome, interruption=None):
        """Finish a claim from outside of its slot; True if this was its first outcome.

        Without an interruption, only a claim that has not started is finished.
        """
        if not claim.try_finish(outcome, interruption, unless_started=not interruption):
            return False
        self.report(claim, outcome)
        self._remove(claim)
        return True

    def let_go(self, claim):
        """Release a running job whose handler has reached a step or checkpoint.

        The claim stays in flight: its handler has the rest of the grace to clean up.
        """
        if claim.try_finish(RELEASED):
            self.report(claim, RELEASED)
            note(logging.INFO, '%s released', claim)

    def report(self, claim, outcome):
        """Give a claim's outcome to the reporter, or forget the claim if it is LOST."""
        claim.outcome = outcome
        if outcome.call:
            fields = ''.join([f',"{field}":{text}' for field, text in outcome.fields.items()])
            claim.report_item = f'{claim.json_prefix}{fields}}}'
            self.session.reporter.to_report.put(claim)
        else:
            self.session.forget(claim)

    def release_strays(self):
        """Release jobs that the engine thinks this worker runs, but whose claims never arrived."""
        path = f'/jobs?status=running&brief=true&limit=1000&queue={quote(self.name)}'
        page = self.session.client.send(path, None, REPORT_GRACE)
        known = {claim.json_prefix for claim in self.session.claims.copy()}
        items = [json_prefix(job) + '}' for job in page['jobs']
                 if job['worker'] == self.worker.name and json_prefix(job) not in known]
        for batch in batches(items, len):
            text = f'{{"jobs":[{",".join(batch)}]}}'
            self.session.client.send('/release', text, REPORT_GRACE)

    def _remove(self, claim):
        self.in_flight.pop(claim, None)
        fetcher = self.fetcher
        if len(self.in_flight) <= fetcher.low_watermark and not fetcher.capacity_freed.is_set():
            fetcher.capacity_freed.set()

    def replace(self, slot):
        """Replace an interrupted slot."""
        with self.slots_lock:
            if slot in self.slots:      # otherwise use_event_loop() has replaced all
                self.slots[self.slots.index(slot)] = type(slot)(self)

    def call_hooks(self, event, claim, value, only=None):
        functions = self.hooks[event] if only is None else only
        for function in functions:
            call_hook(event, function, claim.job, value)

    def log_and_notify(self, event, claim, error, text, *values):
        """Log an event. If the claim has started, call its hooks in a new thread."""
        note(logging.WARNING, '%s ' + text, claim, *values)
        if self.hooks[event] and claim.started_at is not None:
            thread = threading.Thread(
                target=self.call_hooks, args=(event, claim, error), daemon=True)
            thread.start()


class Fetcher:
    """The thread that polls for a queue's jobs."""

    def __init__(self, consumer):
        # constant after start()
        self.consumer = consumer
        self.worker = consumer.worker
        self.session = consumer.session
        self.client = self.session.client.clone()   # its own, so that it can be shut down alone
        self.thread = None
        # written by the fetching thread only
        self.configured_host = None     # the engine that has the queue's limits and schedule
        self.low_watermark = 0          # polls when at most this many claims are in flight
        self.is_prefetching = False     # all slots are in use
        self.idle_generation = None     # worker.generation at the last poll that found nothing
        self.was_cut_off = False        # the worker's stop ended the last poll: jobs may be lost
        # safe by itself
        self.capacity_freed = threading.Event()

    def start(self):
        self.thread = self.worker.start_thread(self._run, f'fetch-{self.consumer.name}')

    def _run(self):
        while not self.worker.stopping.is_set():
            self.capacity_freed.clear()
            limit = self._claim_limit()
            if not limit:
                self.capacity_freed.wait(WATCH_INTERVAL)
                continue
            try:
                self._fetch(limit)
            except Error as error:
                self._on_error(error)

    def _claim_limit(self):
        """How many jobs to claim now; 0 if enough are in flight, or too many unreported.

        Also decides whether the next poll prefetches, and when a poll makes sense again.
        """
        if self.session.is_backlogged or self.session.reporter.to_report.qsize() > MAX_BACKLOG:
            return 0
        slots = self.consumer.count_ready_slots()
        target = self.consumer.prefetch_target(slots)
        self.low_watermark = max(slots - 1, target // 2)
        in_flight = len(self.consumer.in_flight)
        self.is_prefetching = in_flight >= slots
        if in_flight > self.low_watermark:
            return 0
        return min(target - in_flight, MAX_BATCH)

    def _fetch(self, limit):
        """Poll once. Without jobs, wait until the next poll makes sense."""
        generation = self.worker.generation
        began = time.monotonic()
        wait = self._poll_wait()
        jobs = self._poll(limit, wait)
        self.consumer.accept(jobs)
        time.sleep(0)           # lets the slots start before the next poll is prepared
        self.session.on_up(began)
        if jobs:
            return
        if self.worker.burst:
            if not self.worker.app.waits_for_rates or not self._wait_for_rate():
                self.idle_generation = generation
                # a handler may wait for a job that it has added, so poll again after a while
                wait_until(self._may_have_jobs, time.monotonic() + BURST_INTERVAL)
        elif self.is_prefetching:
            self.capacity_freed.wait(WATCH_INTERVAL)
        elif wait and time.monotonic() - began < min(1, LONG_POLL / 2):
            # the answer came at once, so this was no long poll
            self.worker.stopping.wait(self.consumer.config.poll_interval)

    def _may_have_jobs(self):
        """Whether to end the pause of a burst: a claim that ended may have added jobs.

        True also if the worker is stopping.
        """
        return self.worker.generation != self.idle_generation or self.worker.stopping.is_set()

    def _wait_for_rate(self):
        """If a rate holds back due jobs of the queue, wait until it allows a claim.

        Waits for a second at most. Returns False at once if there are no such jobs.
        """
        try:
            page = self.client.send(f'/queues?queue={quote(self.consumer.name)}', None,
                                    RESPONSE_TIMEOUT)
        except Refused:
            return False        # an older engine cannot tell
        for row in page['queues']:
            if is_held_back(row):
                self.worker.stopping.wait(min(1, row['per'] / row['rate']))
                return True
        return False

    def _configure(self):
        """Send the limits and the schedule of the queue, once to each engine."""
        host = self.client.host
        if self.configured_host != host:
            for path, body in self.consumer.config.setup_calls:
                self.client.send(path, body, PROBE_TIMEOUT)
            self.configured_host = host

    def _poll_wait(self):
        """Seconds of the next long poll; 0 in a burst, or to probe an engine that was away.

        A poll that prefetches must not wait: the pace may change, and it would take back jobs that
        are released for others.
        """
        can_wait = self.session.is_up() and not self.worker.burst and not self.is_prefetching
        return LONG_POLL if can_wait else 0

    def _poll(self, limit, wait):
        self._configure()
        worker = self.worker
        config = self.consumer.config
        params = {
            'queue': config.name,
            'limit': limit,
            'wait': wait,
            'lease': LEASE,
            'worker': worker.name,
            'hung': worker.count_hung(),
            'max_retries': config.max_retries,
            'timeout': config.timeout,
        }
        is_probe = not self.session.is_up() and not worker.burst
        timeout = PROBE_TIMEOUT if is_probe else wait + RESPONSE_TIMEOUT
        jobs = self.client.send('/poll', params, timeout) or []
        if not isinstance(jobs, list) or not all(map(is_claim, jobs)):
            raise self.session.not_an_engine()
        return jobs

    def _on_error(self, error):
        if isinstance(error, Refused) and (self.worker.burst or error.status == 400):
            raise error         # polling again would not help: this ends the worker
        self.was_cut_off = self.worker.stopping.is_set()
        if not self.was_cut_off:
            self.worker.stopping.wait(self.session.on_down(error))


def call_hook(event, function, *args):
    try:
        function(*args)
    except BaseException as error:
        if event == 'start' and isinstance(error, Interruption):
            raise       # the handler must not run
        name = getattr(function, '__qualname__', function)
        note(logging.ERROR, 'the hook %r, %s, failed: %s', event, name, last_line(error))


class EngineSession:
    """Shared by the consumers of one engine: a client, claims, reporter and heartbeat."""

    def __init__(self, worker, host):
        # constant
        self.worker = worker
        self.settings = (host, worker.app.token, CLIENT_TIMEOUT, worker.app.ca)     # of Client
        self.client = Client(*self.settings)
        self.reporter = Reporter(self)
        self.heartbeat = Heartbeat(self)
        # safe without a lock: a dict whose single operations are atomic
        self.claims = {}            # claims that the engine still counts as running
        # races are harmless
        self.is_backlogged = False  # the last try to report outcomes failed
        self.down_since = None      # monotonic; None: the engine answered the last request
        self.trouble = None         # since then; REFUSING or AWAY
        self.was_reached = False    # the engine has answered at least once

    def start(self):
        self.worker.start_thread(self.reporter.run, 'report')
        self.worker.start_thread(self.heartbeat.run, 'heartbeat')

    def forget(self, claim):
        """Drop a claim: the engine knows that it has ended, or no longer has it."""
        # in this order: a thread that no longer finds the claim must find the new generation
        self.worker.generation = self.worker.next_generation()
        self.claims.pop(claim, None)

    def on_down(self, error):
        """Log once for each kind of trouble; returns the seconds until the next try.

        Stops a burst worker after CLIENT_TIMEOUT.
        """
        now = time.monotonic()
        since = self.down_since
        if since is None:
            self.down_since = since = now
        trouble = REFUSING if isinstance(error, Refused) else AWAY
        if self.trouble != trouble:
            self.trouble = trouble
            note(logging.WARNING, '%s: %s', trouble, error)
        if self.worker.burst and now - since >= CLIENT_TIMEOUT:
            self.worker.stop(error)
        longest = min(MAX_RETRY_PAUSE, max(RETRY_PAUSE, now - since))
        asked_for = REFUSED_PAUSE if isinstance(error, Refused) else error.retry_after
        return max(longest * rng.uniform(0.5, 1), asked_for)

    def is_up(self):
        """Whether the engine has answered, and nothing has failed since then."""
        return self.was_reached and self.down_since is None

    def on_up(self, asked_at):
        """Called when a request of that time (monotonic) was answered."""
        self.was_reached = True
        since = self.down_since
        if since is not None and asked_at > since:      # otherwise it was sent before the trouble
            self.down_since = None
            self.trouble = None
            seconds = time.monotonic() - since
            note(logging.INFO, 'engine back at %s after %.1f s', self.client.host, seconds)

    def not_an_engine(self):
        return EngineUnavailable(f'the server at {self.client.host} is no engine')

    def send_batch(self, call, items, seconds):
        """Send items, each a pair of a claim and JSON text. Tries until the engine answers.

        Yields each claim with its answer. A batch that is refused as a whole is sent item by item.
        """
        while not self.worker.closed.is_set():
            began = time.monotonic()
            try:
                answers = self._try_batch(call, items, seconds)
            except Error as error:
                if not is_verdict(error):
                    self.is_backlogged = self.is_backlogged or call != 'heartbeat'
                    self.worker.closed.wait(self.on_down(error))
                    continue
                # the answer of a single item; of more items, none has an answer yet
                answers = [{'code': error.status, 'error': str(error)}]
            self.is_backlogged = False
            self.on_up(began)
            if len(answers) == len(items):
                for (claim, _), answer in zip(items, answers):
                    yield claim, answer
            else:
                for item in items:
                    yield from self.send_batch(call, [item], seconds)
            return

    def _try_batch(self, call, items, seconds):
        body = ','.join([text for _, text in items])
        answer = self.client.send('/' + call, f'{{"jobs":[{body}]}}', seconds)
        answers = answer.get('jobs') if isinstance(answer, dict) else None
        if (not isinstance(answers, list) or len(answers) != len(items)
                or not all(map(is_item_reply, answers))):
            raise self.not_an_engine()
        return answers


def is_verdict(error):
    """Whether sending the same request again would not help.

    A proxy's error page says nothing about the request, except that it is too large (413).
    """
    return error.status in REFUSALS if isinstance(error, Refused) else error.status == 413


class Reporter:
    """The thread that reports outcomes and progress to an engine.

    Claims that arrive while a request is in flight are sent together in the next one.
    """

    def __init__(self, session):
        self.session = session          # constant
        # safe by itself: claims with an outcome or progress to report; None ends the thread
        self.to_report = SimpleQueue()
        # touched by the thread only
        self.was_put_off = False        # the engine could not take an outcome now

    def run(self):
        claims = []
        while None not in claims:
            claims = self._next_claims()
            known = [claim for claim in dict.fromkeys(claims) if claim in self.session.claims]
            for call, items in self._requests(known).items():
                for batch in batches(items, lambda item: len(item[1])):
                    for claim, answer in self.session.send_batch(call, batch, CLIENT_TIMEOUT):
                        self._on_answer(call, claim, answer)
            if self.was_put_off:
                self.was_put_off = False
                self.session.worker.closed.wait(RETRY_PAUSE)

    def _next_claims(self):
        claims = [self.to_report.get()]
        with contextlib.suppress(Empty):
            while len(claims) < MAX_BATCH:
                claims.append(self.to_report.get_nowait())
        return claims

    def _requests(self, claims):
        """The items to send, by call: each a pair of a claim and JSON text."""
        requests = {'heartbeat': [], 'complete': [], 'fail': [], 'release': []}
        for claim in claims:
            progress = claim.progress and claim.take_progress()
            if progress:
                text = f'{claim.json_prefix},"progress":{progress}}}'
                requests['heartbeat'].append((claim, text))
            if claim.report_item:
                requests[claim.outcome.call].append((claim, claim.report_item))
        return requests

    def _on_answer(self, call, claim, answer):
        if call == 'heartbeat':
            claim.is_sending_progress = False
            on_heartbeat_answer(claim, answer)      # progress that was not taken is not sent again
            return
        code = answer.get('code')
        if not code:
            self.session.forget(claim)
            return
        if not is_permanent(code):
            self.to_report.put(claim)
            self.was_put_off = True
            return
        reason = answer.get('error')
        if code in GONE:
            text = 'lost before its outcome (%s) was known: %s'
            claim.consumer.log_and_notify('lost', claim, Lost(reason), text, call, reason)
        else:
            note(logging.ERROR, '%s: the engine refused its %s: %s', claim, call, reason)
            if not claim.was_refused and call in ('complete', 'fail'):
                claim.was_refused = True
                claim.consumer.report(claim, refused_outcome(claim.outcome, reason))
                return
        self.session.forget(claim)      # without heartbeats, the claim ends with its lease


def refused_outcome(outcome, reason):
    """The outcome to report in place of one that the engine refused.

    A refused result becomes a final failure. A refused failure is reported without its delay.
    """
    if outcome.call == 'complete':
        return failure(Error(reason), f'the engine refused the result: {reason}', retry=False)
    text = f'{json.loads(outcome.fields["error"])}\n(the engine refused to fail it thus: {reason})'
    return failure(Error(reason), text, retry=json.loads(outcome.fields['retry']))


class Heartbeat:
    """The thread that extends the leases of all claims of an engine, every third of a lease.

    It covers claims whose outcome is not reported yet. When the engine tells that some claim was
    lost, it sends a heartbeat at once, whose answer tells which.
    """

    def __init__(self, session):
        # constant
        self.session = session
        self.worker = session.worker
        self.client = session.client.clone()    # its own, so that it can be shut down alone
        # touched by the thread only
        self.can_wait = True    # False: the engine has no call /lost
        self.since = None       # `since` of its last answer; the next one tells of later losses

    def run(self):
        interval = LEASE / 3
        while not self.worker.closed.is_set():
            self._wait(time.monotonic() + interval)
            items = [(claim, claim.json_prefix + '}') for claim in self.session.claims.copy()]
            for batch in batches(items, lambda item: len(item[1])):
                for claim, answer in self.session.send_batch('heartbeat', batch, interval):
                    on_heartbeat_answer(claim, answer)

    def _wait(self, deadline):
        """Wait until a deadline, or until the engine has taken a claim away."""
        while not self.worker.closed.is_set() and time.monotonic() < deadline:
            seconds = max(0, deadline - time.monotonic())
            if self.can_wait and self.session.down_since is None:
                if self._wait_for_loss(seconds):
                    return
                seconds = min(1, seconds)       # it answered early: do not call it in a tight loop
            self.worker.closed.wait(min(max(0, deadline - time.monotonic()), seconds))

    def _wait_for_loss(self, seconds):
        since = '' if self.since is None else f'&since={self.since}'
        path = f'/lost?worker={quote(self.worker.name)}&wait={seconds:.3f}{since}'
        try:
            answer = self.client.send(path, None, seconds + RESPONSE_TIMEOUT)
            self.since = int(answer['since'])
            return answer['lost'] is True
        except (LookupError, TypeError, ValueError):
            self.can_wait = False       # this is not the engine's answer
        except Refused:
            self.can_wait = False       # an older engine
        except EngineUnavailable:
            pass                        # the fetchers notice and log it
        return False


def on_heartbeat_answer(claim, answer):
    """End a claim that the engine says is gone."""
    code = answer.get('code')
    reason = answer.get('error')
    consumer = claim.consumer
    if code in GONE:
        if consumer.finish(claim, LOST, Lost):
            consumer.log_and_notify('lost', claim, Lost(reason), 'lost: %s', reason)
    elif code and is_permanent(code):
        note(logging.ERROR, '%s: the engine refused its heartbeat: %s', claim, reason)


class Watcher:
    """The thread that checks for claims that wait too long, time out, or have new progress."""

    def __init__(self, worker):
        self.worker = worker        # constant

    def run(self):
        is_last = False
        now = time.monotonic()
        while not is_last:
            last_look = now
            is_last = self._wait()
            now = time.monotonic()
            if now - last_look > LEASE / 3:
                note(logging.WARNING, 'the worker stood still for %.1f s: isolate handlers that '
                     'run C code for so long, otherwise their jobs are lost', now - last_look)
            for consumer in self.worker.consumers:
                for claim in consumer.in_flight.copy():
                    self._check(consumer, claim, now)
                self._log_more_done(consumer)
            self.worker.interruptions.forget_ended()
            self._check_event_loop(now)
            hung = self.worker.count_hung()
            if hung >= self.worker.max_hung:
                text = f'{hung} handlers hang: the worker ends, and should be restarted'
                self.worker.stop(Hung(text))

    def _wait(self):
        """Wait until the next check, and raise pending interruptions meanwhile.

        True if the next check is the last one.
        """
        deadline = time.monotonic() + WATCH_INTERVAL
        interruptions = self.worker.interruptions
        while not interruptions.pending.empty() and time.monotonic() < deadline:
            interruptions.retry()
            time.sleep(RETRY_INTERRUPTION)
        return self.worker.closed.wait(max(0, deadline - time.monotonic()))

    def _check_event_loop(self, now):
        event_loop = self.worker.started_event_loop
        if not event_loop:
            return
        if event_loop.is_blocked and self.worker.interruptions.is_event_loop_hung():
            self.worker.replace_event_loop()
        elif event_loop.probe(now):
            self._log_block(event_loop)

    def _log_block(self, event_loop):
        frames = thread_frames(event_loop.thread.ident)
        innermost = [f'{line.filename}:{line.lineno} in {line.name}'
                     for line in traceback.StackSummary.extract(frames[-1:])]
        where = innermost[0] if innermost else 'C code'
        names = [str(claim) for consumer in self.worker.consumers
                 for claim in consumer.in_flight.copy() if is_running_coroutine(claim)]
        note(logging.WARNING, 'the event loop has been blocked for %g s by %s, at %s',
             MAX_LOOP_BLOCK, ', '.join(names) or 'a callback', where)

    def _check(self, consumer, claim, now):
        if claim.started_at is None:
            if now - claim.claimed_at > MAX_PREFETCH_AGE and consumer.finish(claim, RELEASED):
                consumer.seconds_per_job = None     # the pace was wrong
        elif now - claim.started_at > claim.timeout and claim.outcome is None:
            self._time_out(consumer, claim)
        elif claim.progress and now - claim.progress_sent_at > PROGRESS_INTERVAL:
            claim.progress_sent_at = now
            consumer.session.reporter.to_report.put(claim)

    def _time_out(self, consumer, claim):
        text = f'timed out after {claim.timeout:g} s'
        error = Timeout(f'{text}\n{claim.slot.stack_text(claim)}')
        retry_fields = consumer.handlers.retry_fields(error, claim.job)
        if consumer.finish(claim, failure(error, str(error), **retry_fields), Timeout):
            hung = self.worker.count_hung()
            if hung:
                text += f'; hung threads: {hung}'
            consumer.log_and_notify('failure', claim, error, '%s', text)

    def _log_more_done(self, consumer):
        """Log how many more jobs are done: a line for each could take longer than the jobs."""
        more = consumer.lines_this_tick - MAX_LOG_LINES_PER_TICK
        consumer.lines_this_tick = 0
        if more > 0:
            note(logging.INFO, '%s: %d more done', consumer.name, more)


def is_running_coroutine(claim):
    task = claim.asyncio_task
    return task is not None and task.get_coro().cr_running


class Worker:
    """One run(): the consumers of all queues, and their orderly end."""

    def __init__(self, app, burst, grace, max_hung, concurrency):
        # constant
        self.app = app
        self.burst = burst
        self.grace = grace              # seconds
        self.max_hung = max_hung
        self.process = os.getpid()
        # unique, since release_strays() finds the worker's jobs by this name
        suffix = f'{rng.getrandbits(16):04x}'
        self.name = f'{printable(socket.gethostname())[:150]}:{self.process}-{suffix}'
        self.sessions = {}              # by the engine's addresses
        self.consumers = []
        # safe by themselves, stop_requests also in signal handlers
        self.stop_requests = SimpleQueue()      # None, or an exception for run() to raise
        self.stopping = threading.Event()       # no more jobs are taken
        self.closed = threading.Event()         # no more outcomes are reported
        # safe without a lock: a dict whose single operations are atomic
        self.threads = {}               # the running ones
        self.interruptions = Interruptions()
        # set with the lock held
        self.event_loop_lock = threading.Lock()
        self.started_event_loop = None
        # safe without a lock: taking the next number is atomic. Two threads may store theirs in
        # the wrong order: only a difference counts, and no number is stored twice.
        self.generation = 0             # changes whenever a claim is over
        self.next_generation = itertools.count(1).__next__
        # touched by the main thread only
        self.was_signalled = False
        for config in app.configs.values():
            self._add(config, concurrency or config.concurrency)

    def _add(self, config, concurrency):
        host = ' '.join(self.app.client(config.host).hosts)
        if host not in self.sessions:
            self.sessions[host] = EngineSession(self, host)
        self.consumers.append(Consumer(self, self.sessions[host], config, concurrency))
        note(logging.INFO, 'working on %s (concurrency %d) from %s as %s',
             config.name, concurrency, host, self.name)

    def start_thread(self, loop, name):
        """Start a thread of the worker's own.

        An exception in it ends the worker, since a restart is better than a crippled worker.
        """
        def guarded():
            try:
                # an interruption may be raised after its handler; the thread ends then anyway
                with contextlib.suppress(Interruption):
                    loop()
            except BaseException as error:
                self.on_fault(name, error)
            self.threads.pop(thread, None)

        thread = threading.Thread(target=guarded, name=f'rundown-{name}', daemon=True)
        self.threads[thread] = None
        contextvars.Context().run(thread.start)     # it is not part of a handler's job
        return thread

    def on_fault(self, name, error):
        """Log the exception of a thread of the worker with our own frames, and stop."""
        text = last_line(error)
        if not isinstance(error, Refused):
            text = ''.join(traceback.format_exception(type(error), error, error.__traceback__))
        note(logging.CRITICAL, 'the thread %s failed: %s', name, text)
        self.stop(error)

    @property
    def event_loop(self):
        """The event loop of the async handlers, started on first use."""
        with self.event_loop_lock:
            if self.started_event_loop is None:
                self.started_event_loop = EventLoop(self.start_thread)
            return self.started_event_loop

    def replace_event_loop(self):
        """Abandon an event loop that an interrupted handler still blocks, and start another.

        Called by the watcher only. The old loop ends when that handler returns, and cancels the
        others that it runs.
        """
        abandoned = self.started_event_loop
        self.threads.pop(abandoned.thread, None)
        with self.event_loop_lock:
            self.started_event_loop = EventLoop(self.start_thread)
        abandoned.abandon()
        for consumer in self.consumers:
            consumer.use_event_loop(self.started_event_loop)
        note(logging.WARNING, 'the blocked event loop is replaced')

    def stop(self, error=None):
        self.stop_requests.put(error)

    def count_unreported(self):
        return sum(len(session.claims) for session in self.sessions.values())

    def slots(self):
        return [slot for consumer in self.consumers for slot in consumer.slots]

    def count_hung(self):
        return len(self.interruptions.hung())

    def run(self):
        """Work until a stop is requested, then shut down; raises the exception given to stop()."""
        open_standard_streams()
        log_writer.start()
        try:
            with self._signal_handlers():
                self._start()
                error = self._wait()
                Shutdown(self).run()
        finally:
            log_writer.stop(REPORT_GRACE)
        if error is not None:
            raise error

    @contextlib.contextmanager
    def _signal_handlers(self):
        is_main = threading.current_thread() is threading.main_thread()
        numbers = STOP_SIGNALS if is_main else ()       # other threads cannot set handlers
        for number in numbers:
            is_nohup = number == SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not is_nohup:
                replaced_signals[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            if is_main:
                restore_signals()

    def _start(self):
        pass_jobs_to_threads()
        if self._runs_handlers():
            for function in self.app.hooks['start_worker']:
                function()
        for session in self.sessions.values():
            session.start()
        for consumer in self.consumers:
            consumer.start()
        self.start_thread(Watcher(self).run, 'watch')

    def _runs_handlers(self):
        """Whether handlers run in this process, and not only in processes of their own."""
        return not all(consumer.config.isolate for consumer in self.consumers)

    def call_stop_hooks(self):
        if self._runs_handlers():
            for function in self.app.hooks['stop_worker']:
                call_hook('stop_worker', function)

    def _wait(self):
        """Wait until the worker has to stop; returns the exception given to stop(), or None."""
        timeout = 0.005 if self.burst else 1    # Windows handles signals only between two waits
        while not (self.burst and self._is_idle()):
            with contextlib.suppress(Empty):
                return self.stop_requests.get(timeout=timeout)
        return None

    def _is_idle(self):
        """Whether no claim is left, and each queue was found empty after the last claim ended."""
        if self.count_unreported():
            return False
        return all(consumer.fetcher.idle_generation == self.generation
                   for consumer in self.consumers)

    def _on_signal(self, number, frame):
        if os.getpid() != self.process:     # in a child that a handler has just forked
            restore_signals()
            os.kill(os.getpid(), number)
            return
        if self.was_signalled and number == SIGHUP:
            return      # closing a terminal may send it several times
        if self.was_signalled:
            for slot in self.slots():
                slot.kill()
            os._exit(128 + number)
        self.was_signalled = True
        self.stop()

    def release(self, interruption=None):
        """Release the claims that have not started; with an interruption also the running ones."""
        for consumer in self.consumers:
            for claim in consumer.in_flight.copy():
                if consumer.finish(claim, RELEASED, interruption):
                    note(logging.INFO, '%s released', claim)


class Shutdown:
    """The orderly end of a worker: running handlers may end, waiting claims are released."""

    def __init__(self, worker):
        # constant
        self.worker = worker
        self.deadline = time.monotonic() + worker.grace     # for the running handlers

    def run(self):
        self._stop_claiming()
        self._wait_for_handlers()
        self._release_strays()
        self._wait_for_reports()
        wait_until(self.worker.interruptions.have_taken_effect, NEVER)      # HUNG_AFTER at most
        self._end_threads()

    def _stop_claiming(self):
        worker = self.worker
        worker.stopping.set()
        worker.release()
        for slot in worker.slots():
            slot.on_stop()
        running = sum(len(consumer.in_flight) for consumer in worker.consumers)
        if not worker.burst or running:
            note(logging.INFO, 'stopping: %d running jobs have %g s to end', running, worker.grace)
        self._end_polls()

    def _end_polls(self):
        """Shut down the connections of the fetchers: first for sending, then both ways.

        In between, responses in flight still arrive, and their jobs are released.
        """
        for how in (socket.SHUT_WR, socket.SHUT_RDWR):
            for consumer in self.worker.consumers:
                consumer.fetcher.client.shutdown(how)
            wait_until(self._have_fetchers_ended, time.monotonic() + RELEASE_WINDOW)

    def _have_fetchers_ended(self):
        return not any(consumer.fetcher.thread.is_alive() for consumer in self.worker.consumers)

    def _wait_for_handlers(self):
        """Wait until all have returned; at the deadline release the others."""
        consumers = self.worker.consumers
        wait_until(lambda: not any(consumer.in_flight for consumer in consumers), self.deadline)
        self.worker.release(Lost)
        for consumer in consumers:
            for claim in consumer.in_flight.copy():     # let go before, and still cleaning up
                claim.interrupt(Lost)

    def _release_strays(self):
        """Release jobs of polls whose responses were lost.

        Some proxies drop the response when the client half-closes its connection.
        """
        cut_off = [consumer for consumer in self.worker.consumers if consumer.fetcher.was_cut_off]
        if cut_off:
            time.sleep(STRAY_DELAY)
        for consumer in cut_off:
            with contextlib.suppress(Error, LookupError, TypeError):    # their leases end them
                consumer.release_strays()

    def _wait_for_reports(self):
        deadline = max(self.deadline, time.monotonic() + REPORT_GRACE)
        wait_until(lambda: not self.worker.count_unreported(), deadline)
        unreported = self.worker.count_unreported()
        if unreported:
            note(logging.ERROR, 'outcomes of %d jobs were not reported; they will be handed out '
                 'again', unreported)

    def _end_threads(self):
        worker = self.worker
        worker.closed.set()
        for slot in worker.slots():
            slot.consumer.ready.put(None)
        for session in worker.sessions.values():
            session.reporter.to_report.put(None)
            session.heartbeat.client.close()
            session.client.close()
        for consumer in worker.consumers:
            consumer.fetcher.client.close()
        wait_until(lambda: not any(slot.is_terminating for slot in worker.slots()),
              time.monotonic() + TERM_GRACE + 1)
        for slot in worker.slots():
            slot.kill()
        if worker.started_event_loop:
            worker.started_event_loop.stop()
        wait_until(self._have_threads_ended, time.monotonic() + REPORT_GRACE)
        worker.call_stop_hooks()

    def _have_threads_ended(self):
        """Whether all have ended, except those of interrupted handlers, which may hang."""
        interrupted = self.worker.interruptions.interrupted_at
        abandoned = [getattr(slot, 'thread', None) for slot in interrupted]
        return not set(self.worker.threads.copy()).difference(abandoned)


# -- Handlers in processes of their own ------------------------------------------------------------
CHILD_NAME_PREFIX = 'rundown-child-'
# Held to start or join a process, since start() reaps all ended processes of multiprocessing.
process_lock = threading.Lock()

# Kinds of messages from the process of an isolated slot. Each is a pair of a kind and a value.
READY = 'ready'             # the handler's module is imported
STARTED = 'started'         # the job has arrived
PROGRESS_MADE = 'progress'  # JSON text
DROP_PROGRESS = 'drop'      # discard older progress; echoed once none is being sent
LOGGED = 'logged'           # the attributes of a log record
LEFT = 'left'               # the handler was left at a step, as the worker stops: release it
FINISHED = 'finished'       # call and fields of the outcome, and a traceback if it failed
HOOKS_CALLED = 'hooks'      # after the hooks of the outcome, if there are any
CRASHED = 'crashed'         # there is no outcome; the value says why

STOP = 'stop'               # sent to the process when the worker stops; None: end now

# the events of App.on() whose hooks run in the process of the handler
CHILD_EVENTS = ('start_worker', 'start', 'success', 'failure', 'stop_worker')


class ChildSettings(NamedTuple):
    """Settings of a process that runs the handlers of a queue. For places, see location_of()."""
    handlers: dict          # task name -> place
    wrappers: list          # places of the functions of around()
    hooks: dict             # event -> list of places
    client: tuple           # the arguments of Client
    concurrency: int        # of the queue
    log_levels: dict        # name of a logger -> level


def location_of(function):
    """Module, file and qualified name of a function."""
    return function.__module__, inspect.getfile(function), function.__qualname__


def has_location(function):
    """Whether another process can find the function by its name."""
    return bool(re.fullmatch(r'\w+(\.\w+)*', getattr(function, '__qualname__', '<')))


class IsolatedSlot(Slot):
    """A slot that runs its claims in a child process, one after the other."""

    # written by the slot's thread only; kill() reads the process in any thread
    process = None
    pipe = None
    is_ready = False
    jobs_run = 0            # by this process

    def __init__(self, consumer):
        self.pipe_lock = threading.Lock()       # held to write into the pipe
        super().__init__(consumer)

    def prepare(self):
        max_jobs = self.consumer.config.max_jobs
        if max_jobs and self.jobs_run >= max_jobs:
            self.close()
        if self.process is None and not self.consumer.worker.stopping.is_set():
            self._start_process()

    def _start_process(self):
        context = multiprocessing.get_context('spawn')
        self.pipe, childs_end = context.Pipe()
        self.process = context.Process(
            target=run_child, args=(childs_end, self._child_settings()),
            name=CHILD_NAME_PREFIX + self.consumer.name)
        self.jobs_run = 0
        with process_lock:
            self.process.start()
        childs_end.close()
        atexit.register(self.kill)
        self._receive()             # READY: importing the handler's module may take long
        self.is_ready = True

    def _child_settings(self):
        app = self.consumer.worker.app
        functions = self.consumer.config.functions
        loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.copy().values()]
        return ChildSettings(
            {name: location_of(function) for name, function in functions.items()},
            [location_of(function) for function in app.wrappers],
            {event: [location_of(hook) for hook in app.hooks[event] if has_location(hook)]
             for event in CHILD_EVENTS},
            self.consumer.session.settings,
            self.consumer.concurrency,
            {logger.name: logger.level for logger in loggers if getattr(logger, 'level', 0)})

    def _receive(self):
        """The next message of the process; CRASHED if it has ended."""
        try:
            while True:
                kind, value = self.pipe.recv()
                if kind != LOGGED:
                    return kind, value
                log_writer.put(write_record, value)
        except Exception:           # the pipe is closed, or the handler wrote something into it
            self.kill()             # with its children: the process itself may be exiting already
        with process_lock:
            self.process.join(1)
        code = self.process.exitcode
        reason = 'closed its pipe' if code is None else exit_text(code)
        return CRASHED, f"the handler's process {reason}"

    def run(self, claim):
        kind, value = self._send(claim)
        if claim.outcome:           # it was finished from outside before a process had it
            return claim.outcome
        while kind in (STARTED, PROGRESS_MADE, DROP_PROGRESS, LEFT):
            if kind == PROGRESS_MADE:
                claim.show_progress(value)
            if kind == DROP_PROGRESS:
                claim.drop_progress()
                self._write(DROP_PROGRESS)
            if kind == LEFT:
                self.consumer.let_go(claim)
            kind, value = self._receive()
        if kind == FINISHED:
            self.jobs_run += 1
            call, fields, error = value
            result = Crashed(error) if error else json.loads(fields.get('result', 'null'))
            return Outcome(call, result, **fields)
        self.close()
        error = Crashed(value)
        return failure(error, value, **self.consumer.handlers.retry_fields(error, claim.job))

    def _send(self, claim):
        """Send the job; returns the first answer.

        The process may have been killed while it was idle. Then a second one gets the job.
        """
        message = None, None
        for _ in range(2):
            if self.process is None:
                self._start_process()
            if claim.outcome:
                break
            self._write(claim.job)
            message = self._receive()
            while message[0] == HOOKS_CALLED:       # left over from a job that was released
                message = self._receive()
            if message[0] == STARTED or claim.outcome:
                break
            self.close()
        return message

    def _write(self, message):
        with contextlib.suppress(OSError, AttributeError), self.pipe_lock:
            self.pipe.send(message)

    def on_stop(self):
        self._write(STOP)

    def call_hooks(self, event, claim, value):
        """Call the hooks that the process cannot find, and wait until it has called the others.

        If the process is gone, call all of them here. Hooks of `start` are not waited for: the
        process calls them when it gets the job.
        """
        hooks = self.consumer.hooks[event]
        ours = [hook for hook in hooks if not has_location(hook)]
        if event == 'start':
            self.consumer.call_hooks(event, claim, value, ours)
        elif self.process is None:
            self.consumer.call_hooks(event, claim, value, hooks)
        else:
            self.consumer.call_hooks(event, claim, value, ours)
            if len(ours) < len(hooks):
                self._await_hooks()

    def _await_hooks(self):
        kind = None
        while kind not in (HOOKS_CALLED, CRASHED):
            kind, _ = self._receive()
        if kind == CRASHED:
            self.close()

    def interrupt(self, claim, interruption):
        self.kill()                 # the slot's thread then notices, and starts a new process

    def stack_text(self, claim):
        return 'its process was killed\n'

    @property
    def is_terminating(self):
        """Whether its process may still be calling stop_worker hooks."""
        hooks = self.consumer.hooks['stop_worker']
        return bool(hooks) and self.process is not None and self.thread.is_alive()

    def kill(self):
        """End the process, and the processes that it started."""
        process = self.process
        signal_group(process, KILL)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            process.kill()          # it may not be a group leader yet

    def close(self):
        if self.process is None:
            return
        if self.consumer.hooks['stop_worker']:
            self._write(None)
            while self._receive()[0] != CRASHED:    # it ends after the hooks
                pass
        self.kill()
        atexit.unregister(self.kill)
        self.pipe.close()
        with process_lock:
            self.process.join(1)
        self.process = None
        self.is_ready = False


def signal_group(process, number):
    """Send a signal to a process and those it started; on Windows end them.

    True if there was one to receive it.
    """
    # the process may not have started, or may have ended
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        if os.name == 'nt':
            subprocess.run(['taskkill', '/T', '/F', '/PID', str(process.pid)], capture_output=True)
        else:
            os.killpg(process.pid, number)
            return True
    return False


def exit_text(code):
    for known in signal.Signals:
        if known == -code:
            return f'was killed by {known.name}'
    return f'ended with exit code {code}'


class ChildClaim(Saver):
    """The claim that job(), progress(), step() and so on use in an isolated process."""

    asyncio_task = None
    outcome = None          # never set: the worker kills the process if it ends the claim
    was_left = False

    def __init__(self, job, child):
        self.job = job
        self.child = child
        self.client = child.client
        self.timeout = job['timeout']
        self.json_prefix = json_prefix(job)
        self.steps = job.get('steps')
        self.has_progress = False       # some was sent to the worker, which may be reporting it

    def leave_if_stopping(self):
        if self.child.stopping.is_set():
            if not self.was_left:
                self.was_left = True
                self.child.send(LEFT)
            raise Lost('the worker is stopping: the job is released')

    def holds_last_slot(self):
        """As far as it is known: the process does not see the other slots of its queue."""
        return self.child.settings.concurrency == 1

    holds_only_slot = holds_last_slot

    def show_progress(self, text):
        self.has_progress = True
        self.child.send(PROGRESS_MADE, text)

    def drop_progress(self):
        if self.has_progress:
            self.child.send(DROP_PROGRESS)
            self.child.progress_dropped.get()
            self.has_progress = False

    def run_coroutine(self, coroutine):
        if self.child.event_loop is None:
            self.child.event_loop = EventLoop(start_daemon_thread)
        return self.child.event_loop.run(coroutine, self).result()


def start_daemon_thread(loop, name):
    thread = threading.Thread(target=loop, name=f'rundown-{name}', daemon=True)
    thread.start()
    return thread


class PipeLogHandler(logging.Handler):
    """Sends log records to the worker, which logs them with its own handlers."""

    def __init__(self, send):
        super().__init__()
        self.send = send

    def emit(self, record):
        try:
            self.send(LOGGED, self._fields(record))
        except Exception:
            self.handleError(record)

    def _fields(self, record):
        """The attributes of the record, as far as they can be sent, else as text."""
        fields = {
            name: value if isinstance(value, (str, int, float, type(None))) else repr(value)
            for name, value in vars(record).items()}
        fields.update(msg=record.getMessage(), args=None, exc_info=None)
        if record.exc_info:
            fields['exc_text'] = ''.join(traceback.format_exception(*record.exc_info)).rstrip()
        return fields


class Child:
    """The process of an isolated slot: runs the jobs that come through the pipe.

    It ends with the worker, and so do the processes that it started.
    """

    def __init__(self, pipe, settings):
        # constant
        self.pipe = pipe
        self.settings = settings
        self.send_lock = threading.Lock()
        self.jobs = SimpleQueue()
        self.progress_dropped = SimpleQueue()
        self.stopping = threading.Event()
        # set by load()
        self.handlers = None
        self.wrappers = []
        self.hooks = {event: [] for event in CHILD_EVENTS}
        self.client = None
        self.problem = None         # why the handlers cannot run, as text
        # started when the first async handler runs
        self.event_loop = None

    def send(self, kind, value=None):
        with self.send_lock:
            self.pipe.send((kind, value))

    def load(self):
        settings = self.settings
        try:
            self.handlers = HandlerTable(import_all(settings.handlers))
            self.wrappers = [import_function(*place) for place in settings.wrappers]
            self.hooks = {event: [import_function(*place) for place in places]
                          for event, places in settings.hooks.items()}
            self.client = Client(*settings.client)
            self._set_up_log()
            for function in self.hooks['start_worker']:
                function()
        except BaseException as error:
            self.problem = truncate_middle(error_text(error), MAX_ERROR)

    def _set_up_log(self):
        """Log to the worker, unless the modules that were imported have set up the log."""
        root = logging.getLogger()
        if root.handlers:
            return
        root.addHandler(PipeLogHandler(self.send))
        for name, level in self.settings.log_levels.items():
            logger = root if name == 'root' else logging.getLogger(name)
            logger.setLevel(level)

    def run(self):
        self.load()
        return_free_memory()
        self.send(READY)
        start_daemon_thread(self._receive_messages, 'receive')
        for job in iter(self.jobs.get, None):
            self.send(STARTED)
            if self.problem:
                self.send(CRASHED, self.problem)
                return
            # each job has its own copy of the variables that hooks of `start_worker` have set
            contextvars.copy_context().run(self._run_job, job)
        for function in self.hooks['stop_worker']:
            call_hook('stop_worker', function)

    def _run_job(self, job):
        claim = ChildClaim(job, self)
        current.set(claim)
        self._call_hooks('start', job, None)
        outcome = run_handler(self.handlers, job, self.wrappers)
        has_failed = outcome.call == 'fail'
        error = error_text(outcome.value) if has_failed else None
        self.send(FINISHED, (outcome.call, outcome.fields, error))
        event = 'failure' if has_failed else 'success'
        if self.hooks[event] and not claim.was_left:
            self._call_hooks(event, job, outcome.value)
            self.send(HOOKS_CALLED)

    def _call_hooks(self, event, job, value):
        for function in self.hooks[event]:
            call_hook(event, function, job, value)

    def _receive_messages(self):
        """Receive jobs and other messages until the worker ends, then end this process."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self.pipe.recv()
                if message == STOP:
                    self.stopping.set()
                elif message == DROP_PROGRESS:
                    self.progress_dropped.put(None)
                else:
                    self.jobs.put(message)
        signal_group(multiprocessing.current_process(), KILL)
        os._exit(1)


def run_child(pipe, settings):
    separate_from_worker(pipe)
    open_standard_streams()
    pass_jobs_to_threads()
    Child(pipe, settings).run()


def import_all(places):
    return {name: import_function(*place) for name, place in places.items()}


def separate_from_worker(pipe):
    if hasattr(os, 'setsid'):
        os.setsid()         # lead a group, which is killed with all processes in it
        # a child that held the pipe open would hide the end of this process from the worker
        os.set_inheritable(pipe.fileno(), False)
    for number in STOP_SIGNALS:
        # the worker decides when to stop; not SIG_IGN, which programs would inherit
        replaced_signals[number] = signal.signal(number, lambda *_: None)


def import_function(module, file, name):
    """The function with this qualified name; imports its module by name or from its file."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        found = import_file_as(file, module)
    return functools.reduce(getattr, name.split('.'), found)


def import_file_as(file, name):
    """Import a module from its file."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# -- Any program as a worker -----------------------------------------------------------------------
EX_DATAERR = 65     # of sysexits.h: the input is wrong, so a retry would not help


class ProgramSlot(Slot):
    """A slot that runs a program for each job.

    The program's streams are files: a pipe fills up, and ends only when all children have ended.
    """

    # written by the slot's thread only; kill() and stack_text() read them in any thread
    process = None
    stderr = None
    stderr_tail = b''       # the last bytes before stderr was truncated

    def prepare(self):
        # the last claim is finished, so nobody calls interrupt() now
        self.is_terminating = False

    def execute(self, command, data, claim):
        """Run the program with the data on its stdin; returns its result."""
        env = {
            **os.environ,
            'RUNDOWN_ID': claim.job['id'],
            'RUNDOWN_QUEUE': self.consumer.name,
            'RUNDOWN_ATTEMPT': str(claim.job['attempt']),
        }
        env.pop('RUNDOWN_TOKEN', None)      # the program need not be trusted like the worker
        with contextlib.ExitStack() as files:
            stdin = files.enter_context(tempfile.TemporaryFile())
            stdout = files.enter_context(tempfile.TemporaryFile())
            self.stderr = files.enter_context(tempfile.TemporaryFile())
            self.stderr_tail = b''
            set_append_mode(self.stderr)
            stdin.write(data)
            stdin.seek(0)
            with process_lock:      # so that reap_orphans() knows the process as a slot's
                self.process = subprocess.Popen(
                    command, stdin=stdin, stdout=stdout, stderr=self.stderr, env=env,
                    start_new_session=True)
            self._supervise(stdout)
            self._terminate()
            stdout.seek(0)
            return self._result(self.process.returncode, stdout.read(MAX_STDOUT + 1))

    def _supervise(self, stdout):
        """Wait until the program ends, has to be terminated, or writes too much to stdout."""
        while not self.is_terminating and file_size(stdout) <= MAX_STDOUT:
            if file_size(self.stderr) > MAX_STDOUT:     # only its end is needed: save disk space
                self.stderr_tail = read_tail(self.stderr, MAX_ERROR // 2)
                self.stderr.truncate(0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(WATCH_INTERVAL)
                return

    def _terminate(self):
        """Send SIGTERM if it still runs, then SIGKILL to the remaining members of its group."""
        if self.process.returncode is None:
            signal_group(self.process, signal.SIGTERM)
            wait_until(self._has_ended, time.monotonic() + TERM_GRACE)
        signal_group(self.process, KILL)
        self.process.wait()

    def _has_ended(self):
        return self.process.poll() is not None and not has_members(self.process.pid)

    def _result(self, code, output):
        if len(output) > MAX_STDOUT:
            raise Abort(f'the program wrote more than {MAX_STDOUT:,} bytes to stdout, '
                        'which is the most for a result')
        if code:
            error = Abort if code == EX_DATAERR else Retry
            raise error(f'the program {exit_text(code)}\n{self.stack_text(None)}'.strip())
        try:
            text = output.decode()
        except UnicodeDecodeError as error:
            reason = f'the stdout of the program is not UTF-8: {error}'
            raise Abort(reason) from None
        if text.count('[') + text.count('{') > MAX_STDOUT_LEVELS and is_too_deep(text):
            return text
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text)
            encode_json(value)          # json.loads() takes NaN, which is not JSON
            return value
        return text

    def interrupt(self, claim, interruption):
        self.is_terminating = True      # the slot's thread sees it within WATCH_INTERVAL

    def stack_text(self, claim):
        """The end of the program's stderr."""
        # the program may not have started, or its files may be closed
        with contextlib.suppress(AttributeError, ValueError, OSError):
            end = self.stderr_tail + read_tail(self.stderr, MAX_ERROR // 2)
            return end[-(MAX_ERROR // 2):].lstrip(b'\0').decode(errors='replace')
        return ''

    def kill(self):
        if self.process and self.process.returncode is None:
            signal_group(self.process, KILL)


def file_size(file):
    return os.fstat(file.fileno()).st_size


def read_tail(file, length):
    """The end of a file that a program is writing; seek() would move the program's offset too."""
    offset = max(0, file_size(file) - length)
    if hasattr(os, 'pread'):
        return os.pread(file.fileno(), length, offset)
    file.seek(offset)
    return file.read(length)


def set_append_mode(file):
    """Make programs write at the end of the file, also after it was truncated."""
    with contextlib.suppress(ImportError):
        import fcntl    # not on Windows, where the truncated part reads as zeros
        fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)


def has_members(group):
    """Whether a process group has members. Zombies do not count: PID 1 may never reap them."""
    try:
        os.killpg(group, 0)
    except (OSError, AttributeError):       # none is left; Windows has no groups
        return False
    stats = list(pathlib.Path('/proc').glob('[0-9]*/stat'))
    return not stats or any(is_running_member(stat, group) for stat in stats)


def is_running_member(stat, group):
    with contextlib.suppress(OSError):      # it has ended meanwhile
        state, _, its_group = stat.read_text(errors='replace').rpartition(')')[2].split()[:3]
        return int(its_group) == group and state not in 'ZX'
    return False


def is_too_deep(text):
    """Whether JSON text has more levels than an engine takes."""
    level = 0
    for token in re.findall(r'"(?:[^"\\]|\\.)*"|[][{}]', text):      # strings and brackets
        if token in '[{':
            level += 1
        elif token in ']}':
            level -= 1
        if level > MAX_STDOUT_LEVELS:
            return True
    return False


def reap_orphans(slots):
    """Reap orphaned children of programs, for as long as this process runs.

    As PID 1 of a container this process becomes the parent of orphans.
    """
    while True:
        time.sleep(WATCH_INTERVAL)
        with contextlib.suppress(ChildProcessError), process_lock:
            while True:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                ours = [slot.process.pid for slot in slots() if slot.process]
                if ended is None or ended.si_pid in ours:
                    break
                os.waitpid(ended.si_pid, 0)


def program_slots():
    return [slot for worker in list(default.workers) for slot in worker.slots()]


class Program:
    """The handler of a queue that runs a program for each job."""

    slot_type = ProgramSlot

    def __init__(self, command, is_text):
        self.command = command      # a list: the program and its arguments
        self.is_text = is_text      # a payload that is a string is not quoted

    def __call__(self, payload):
        is_plain = self.is_text and isinstance(payload, str)
        text = payload if is_plain else as_json(payload, 'payload')
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise Abort(f'the payload cannot be written as UTF-8: {error}') from None
        claim = current.get()
        return claim.slot.execute(self.command, data, claim)


def command_exec(client, options):
    """Work on a queue by running a program."""
    if not shutil.which(options.program[0]):
        raise Misuse(f'there is no program {options.program[0]}')
    require_temporary_folder()
    program = Program(options.program, options.text)
    default.queue(options.queue, timeout=options.timeout)(program)
    if hasattr(os, 'waitid'):
        threading.Thread(target=reap_orphans, args=(program_slots,), daemon=True).start()
    default.run(burst=options.burst, grace=options.grace, concurrency=options.concurrency)


# -- Queues and tasks: the module's API ------------------------------------------------------------
class QueueConfig(NamedTuple):
    """The settings of a queue, and the functions that handle its jobs."""

    name: str
    host: str | None = None
    poll_interval: float = 1.0
    max_retries: int | None = 3
    timeout: float | None = None
    concurrency: int = 1
    isolate: bool = False
    max_jobs: int | None = None
    # replaced and never changed in place, since all queues share these defaults
    functions: dict = {}        # task name -> function; the name None: it handles all jobs
    setup_calls: list = []      # (path, fields) of the calls that set limits and a schedule


TASK_SETTINGS = [       # settings of a queue that a task may have; the last task's value is used
    'host', 'poll_interval', 'concurrency', 'isolate', 'max_jobs', 'max_running', 'rate',
]
TASK_METHODS = {        # an option that is not such a setting -> the task's method that takes it
    **dict.fromkeys(ENQUEUE_OPTIONS, '.options()'),
    **dict.fromkeys(['cron', 'every', 'zone'], '.schedule()'),
}
MINIMUMS = {            # setting -> its least value; if that is an int, so is the setting
    'poll_interval': 0.0,
    'timeout': 0.0,
    'every': 1.0,
    'per': 0.0,
    'max_retries': 0,
    'concurrency': 1,
    'max_jobs': 1,
    'max_running': 1,
    'rate': 1,
}

if TYPE_CHECKING:
    P = typing_extensions.ParamSpec('P')

    class QueueFunction(Protocol[P, R]):
        """A function that @queue has decorated."""

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
        def enqueue(self, payload: Any = ..., **options: Any) -> Job[R]: ...

    class AsyncQueueFunction(Protocol[P, R]):
        """The same for an async function."""

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]: ...
        def enqueue(self, payload: Any = ..., **options: Any) -> Job[R]: ...

    class QueueDecorator(Protocol):
        @overload
        def __call__(
            self, function: Callable[P, Coroutine[Any, Any, R]]
        ) -> AsyncQueueFunction[P, R]: ...
        @overload
        def __call__(self, function: Callable[P, R]) -> QueueFunction[P, R]: ...

    class TaskCalls(Protocol[P, R]):
        """The methods that send a task's arguments as a job."""

        def delay(self, *args: P.args, **kwargs: P.kwargs) -> Job[R]: ...
        async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> Job[R]: ...
        def options(self, **options: Any) -> TaskCalls[P, R]: ...
        def schedule(
            self,
            name: str,
            cron: str | None = None,
            every: float | datetime.timedelta | None = None,
            zone: str | None = None,
            args: Iterable[Any] = (),
            kwargs: dict[str, Any] | None = None,
            **options: Any,
        ) -> dict[str, Any]: ...

    class TaskFunction(TaskCalls[P, R], Protocol[P, R]):
        """A function that @task has decorated."""

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    class AsyncTaskFunction(TaskCalls[P, R], Protocol[P, R]):
        """The same for an async function."""

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]: ...

    class TaskDecorator(Protocol):
        @overload
        def __call__(
            self, function: Callable[P, Coroutine[Any, Any, R]]
        ) -> AsyncTaskFunction[P, R]: ...
        @overload
        def __call__(self, function: Callable[P, R]) -> TaskFunction[P, R]: ...


class Registry:
    """Queues with their handlers, and hooks, as decorators declare them."""

    def __init__(self) -> None:
        # filled by decorators, before run()
        self.configs = {}            # (queue, host) -> QueueConfig
        self.hooks = {
            'start': [], 'success': [], 'failure': [], 'lost': [],
            'start_worker': [], 'stop_worker': [],
        }
        self.wrappers = []              # generator functions: see around()

    @suggest_known_options
    def queue(
        self,
        name: str,
        host: str | None = None,
        poll_interval: float = 1.0,
        max_retries: int = 3,
        timeout: float | datetime.timedelta | None = None,
        concurrency: int = 1,
        isolate: bool = False,
        backoff: Any = None,
        retry_on: Any = None,
        abort_on: Any = None,
        cron: str | None = None,
        every: float | datetime.timedelta | None = None,
        zone: str | None = None,
        max_running: int | None = None,
        rate: Any = None,
        max_jobs: int | None = None,
    ) -> QueueDecorator:
        """Make the decorated function the handler of a queue.

        The function is unchanged, except that it gets `.enqueue(payload, **options)`. Durations
        are in seconds, or timedeltas.

        `max_retries` and `timeout` apply to jobs that were enqueued without their own.
        `concurrency` handlers run at a time; with `isolate` each in a process of its own, which
        is replaced after `max_jobs` jobs. `poll_interval` is for engines without long polls.

        `backoff` is the time until a retry: a number, a list (its last item is used for all
        further retries), or a function of the retry's number. Exceptions in `abort_on`, and
        those not in `retry_on` if that is given, fail the job for good.

        run() sends the engine a schedule named like the queue (`cron` in a `zone`, or `every` in
        seconds), and limits for all workers together: `max_running` jobs at a time, and a `rate`
        of (claims, seconds).
        """
        if not isinstance(name, str) or not name:
            raise Misuse(f'queue needs the name of a queue, @queue("name"), not {name!r}')
        policy = Policy(backoff, retry_on, abort_on)
        timeout = in_seconds(timeout)
        poll_interval = in_seconds(poll_interval)
        check_settings(
            poll_interval=poll_interval, concurrency=concurrency,
            **drop_none(max_retries=max_retries, timeout=timeout, max_jobs=max_jobs),
        )
        limits = limit_calls(name, max_running, rate)
        config = QueueConfig(
            name=name, host=host, poll_interval=poll_interval, max_retries=max_retries,
            timeout=timeout, concurrency=concurrency, isolate=isolate, max_jobs=max_jobs,
            setup_calls=limits + schedule_calls(name, cron, every, zone),
        )

        def register(function):
            check_function(function)
            check_call(function, [None])
            self._register(config, function)
            function.policy = policy
            function.enqueue = enqueue_method(self, name, host)
            return function
        return register

    @overload
    def task(
        self, function: Callable[P, Coroutine[Any, Any, R]]
    ) -> AsyncTaskFunction[P, R]: ...

    @overload
    def task(self, function: Callable[P, R]) -> TaskFunction[P, R]: ...

    @overload
    def task(
        self, *, queue: str = ..., name: str | None = ..., max_retries: int | None = ...,
        timeout: float | datetime.timedelta | None = ..., backoff: Any = ..., retry_on: Any = ...,
        abort_on: Any = ..., host: str | None = ..., poll_interval: float = ...,
        concurrency: int = ..., isolate: bool = ..., max_jobs: int | None = ...,
        max_running: int | None = ..., rate: Any = ...,
    ) -> TaskDecorator: ...

    def task(
        self,
        function: Any = None,
        *,
        queue: str = 'default',
        name: str | None = None,
        max_retries: int | None = None,
        timeout: float | datetime.timedelta | None = None,
        backoff: Any = None,
        retry_on: Any = None,
        abort_on: Any = None,
        **settings: Any,
    ) -> Any:
        """Make the decorated function a task, one of any number on its queue.

        `.delay(...)` sends its arguments as a job, `.adelay(...)` does so in asyncio programs.
        `.options(delay=60).delay(...)` gives the job options of enqueue(), and
        `.schedule(name, cron=...)` makes a job at each tick. `max_retries` and `timeout` are
        sent with each job. `name` is the task's name for producers and workers; by default
        the one under which the function is imported. `settings` are those of the queue, as
        queue() has them; tasks of one queue share them, and the last task's values are used.
        """
        for setting in settings.keys() - set(TASK_SETTINGS):
            remedy = TASK_METHODS.get(setting)
            if remedy:
                raise Misuse(f'a task has no setting {setting}; {remedy} takes it')
            names = [*inspect.signature(self.task).parameters, *TASK_SETTINGS]
            check_names([setting], names, 'a task has no setting')
        host = settings.get('host')
        if 'poll_interval' in settings:
            settings['poll_interval'] = in_seconds(settings['poll_interval'])
        max_running = settings.pop('max_running', None)
        limits = limit_calls(queue, max_running, settings.pop('rate', None))
        timeout = in_seconds(timeout)
        check_settings(**settings, **drop_none(max_retries=max_retries, timeout=timeout))
        policy = Policy(backoff, retry_on, abort_on)

        def register(function):
            check_function(function)
            task = name or task_name(function)
            known = self.configs.get((queue, host), QueueConfig(queue))
            config = known._replace(setup_calls=limits or known.setup_calls, **settings)
            self._register(config, function, task)
            function.policy = policy
            options = drop_none(host=host, max_retries=max_retries, timeout=timeout)
            sender = TaskSender(self, function, task, queue, options)
            for method in ('delay', 'adelay', 'options', 'schedule'):
                setattr(function, method, getattr(sender, method))
            return function
        return register if function is None else register(function)

    def _register(self, config, function, task=None):
        """Add a function that handles all jobs of a queue, or those for the task of that name."""
        qualified = getattr(function, '__qualname__', '')      # may have <locals> or <lambda> in it
        if config.isolate and not re.fullmatch(r'\w+(\.\w+)*', qualified):
            raise Misuse(
                f'{function!r} cannot be isolated: its process has to find it by its name in a '
                'module'
            )
        key = (config.name, config.host)
        known = self.configs.get(key, config).functions
        is_mixed = known and (None in known) != (task is None)
        if is_mixed or source_of(known.get(task, function)) != source_of(function):
            raise Misuse(
                f'the queue {config.name} has another handler already; only tasks with '
                'different names can share one'
            )
        self.configs[key] = config._replace(functions={**known, task: function})

    def on(self, event: str) -> Callable[[F], F]:
        """Call the decorated function at an event of each run of a handler.

        hook(job, value) at "start" (None), "success" (the result), "failure" and "lost" (the
        exception). An exception in such a hook is logged and changes nothing. "start_worker" and
        "stop_worker" hooks have no arguments: they are called once in each process that runs
        handlers. An exception in a start_worker hook ends the worker.
        """
        if event not in self.hooks:
            raise Misuse(f'there is no event {event!r}; there are {", ".join(self.hooks)}')

        def register(function):
            self.hooks[event].append(function)
            return function
        return register

    def around(self, function: F) -> F:
        """Wrap each run of a handler in the decorated generator function, which yields once.

        It runs in the process of the handler: for database connections, tracing and the like.
        It gets the job if it has a parameter.
        """
        if not inspect.isgeneratorfunction(function):
            raise Misuse(
                f'around decorates a generator function that yields once, not {function!r}')
        self.wrappers.append(function)
        return function


class App(Registry):
    """Queues, their handlers, hooks, and an engine: the functions of this module are its methods.

    If `host`, `token` or `ca` is None, each call reads RUNDOWN_URL, RUNDOWN_TOKEN or RUNDOWN_CA.
    """

    def __init__(
        self,
        host: str | None = None,
        token: str | None = None,
        timeout: float = CLIENT_TIMEOUT,
        ca: str | None = None,
    ) -> None:
        super().__init__()
        # written by testing() alone
        self.host = host
        self.waits_for_rates = True     # whether a burst waits until a rate allows the next claim
        # constant
        self.token = token
        self.timeout = timeout
        self.ca = ca
        # safe without a lock: single operations of a dict and a list are atomic
        self.clients = {}               # (host, token, timeout, ca) -> Client
        self.workers = []               # the running ones

    def client(self, host: str | None = None) -> Client:
        """The client for an engine; its connections are kept."""
        host = host or self.host or os.environ.get('RUNDOWN_URL')
        token = self.token or os.environ.get('RUNDOWN_TOKEN')
        settings = (host, token, self.timeout, self.ca or os.environ.get('RUNDOWN_CA'))
        if settings not in self.clients:
            self.clients[settings] = Client(*settings)
        return self.clients[settings]

    @suggest_known_options
    def enqueue(
        self,
        queue: str,
        payload: Any = None,
        host: str | None = None,
        timeout: float | datetime.timedelta | None = None,
        max_retries: int | None = None,
        tag: str | None = None,
        delay: float | datetime.timedelta | None = None,
        run_at: str | datetime.datetime | None = None,
        priority: int | None = None,
        key: str | None = None,
        *,
        id: str | None = None,
        after: Any = None,
        after_any: bool | None = None,
        give_up: float | datetime.timedelta | None = None,
        group: str | None = None,
        key_until: str | None = None,
        replace: bool | None = None,
        expires: float | datetime.timedelta | None = None,
    ) -> Job:
        """Add a job, and return it; see Client.enqueue for the options."""
        return self.client(host).enqueue(
            queue, payload, timeout=timeout, max_retries=max_retries, tag=tag, delay=delay,
            run_at=run_at, priority=priority, key=key, id=id, after=after, after_any=after_any,
            give_up=give_up, group=group, key_until=key_until, replace=replace, expires=expires,
        )

    def get(self, id: str, host: str | None = None) -> Job:
        """The job with that id; Refused (404) if there is none."""
        client = self.client(host)
        return Job(client.job(id), client)

    async def aenqueue(
        self, queue: str, payload: Any = None, *, host: str | None = None, **options: Any,
    ) -> Job:
        """enqueue() for asyncio programs; it never blocks their event loop."""
        return await self.client(host).aenqueue(queue, payload, **options)

    def enqueue_many(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        host: str | None = None,
        ids: Iterable[str] | None = None,
        **options: Any,
    ) -> list[Job]:
        """Add a job per payload: see Client.enqueue_many."""
        return self.client(host).enqueue_many(queue, payloads, ids, **options)

    def schedule(
        self,
        name: str,
        queue: str,
        cron: str | None = None,
        every: float | datetime.timedelta | None = None,
        zone: str | None = None,
        payload: Any = None,
        host: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Make a job at each tick; see Client.schedule. Returns the schedule."""
        return self.client(host).schedule(
            name, queue, cron=cron, every=every, zone=zone, payload=payload, **options)

    def unschedule(self, name: str, *, host: str | None = None) -> dict[str, Any]:
        """End a schedule; the jobs that it made stay."""
        return self.client(host).unschedule(name)

    def wait(
        self,
        job: Any,
        timeout: float | datetime.timedelta | None = None,
        host: str | None = None,
        give_up: float | datetime.timedelta | None = None,
    ) -> Job:
        """The finished job: see Client.wait."""
        uses_own_client = isinstance(job, Job) and not host
        client = job.client if uses_own_client else self.client(host)
        return client.wait(job, timeout, give_up)

    def run(
        self,
        burst: bool = False,
        grace: float = GRACE,
        max_hung: int = MAX_HUNG,
        concurrency: int | None = None,
    ) -> None:
        """Work on the declared queues until a signal such as SIGTERM, or stop(), ends it.

        With `burst`, it ends when nothing is due. Returns after an orderly end. Raises
        SystemExit(1) if `max_hung` handlers hang. In the main thread, unless `burst`, it ends the
        process if handlers still hang, since nothing else can end their threads.
        """
        if multiprocessing.current_process().name.startswith(CHILD_NAME_PREFIX):
            raise Error(
                'run() runs where isolate=True imports the script: put it behind '
                "if __name__ == '__main__':"
            )
        if not self.configs:
            raise Error('there is no handler: decorate a function with @queue("name")')
        check_number('max_hung', max_hung, 1)
        if concurrency is not None:
            check_number('concurrency', concurrency, 1)
        set_up_log()
        worker = Worker(self, burst, duration('grace', grace), max_hung, concurrency)
        code = 0
        if not burst:
            return_free_memory()
            report = functools.partial(report_undeclared, worker)
            threading.Thread(target=report, daemon=True).start()
        self.workers.append(worker)
        try:
            worker.run()
        except Hung as error:
            note(logging.CRITICAL, '%s', error)
            code = 1
        finally:
            self.workers.remove(worker)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if worker.interruptions.running() and not burst and in_main_thread:
            exit_process(code)
        if code:
            raise SystemExit(code)

    def stop(self) -> None:
        """End run() as SIGTERM does, from any thread."""
        for worker in list(self.workers):
            worker.stop()

    @contextlib.contextmanager
    def testing(self) -> Iterator[Testing]:
        """A temporary engine that replaces the default one during the block.

        See Testing; its `client` is a client of this engine. rundown_engine.py has to be
        importable. Queues with a `host` of their own stay there.
        """
        make_server = import_engine().make_server
        require_temporary_folder()
        test = Testing(self)
        before = (self.host, self.clients)
        with tempfile.TemporaryDirectory() as folder:
            test.server = make_server(f'{folder}/jobs.db', port=0, sync='normal', clock=test.clock)
            serve = functools.partial(test.server.serve_forever, 0.005)
            threading.Thread(target=serve, daemon=True).start()
            self.host, self.clients = (test.server.url, {})
            with environment_variable('RUNDOWN_URL', test.server.url):
                test.client = self.client()
                try:
                    yield test
                finally:
                    test.client.close()
                    self.host, self.clients = before
                    test.server.shutdown()
                    test.server.server_close()


def enqueue_method(app, queue, host):
    """The `enqueue` of a function that handles a queue."""

    def enqueue(payload=None, *more, **options):
        """Add a job to the queue, with the options of rw.enqueue; returns it."""
        if more:
            raise Misuse(
                f'{queue} takes one payload, and options by name; @rw.task has any number of '
                'arguments'
            )
        return app.enqueue(queue, payload, **{'host': host, **options})

    _, payload, *options = inspect.signature(app.enqueue).parameters.values()
    by_name = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    enqueue.__signature__ = inspect.Signature([payload, *by_name])
    return enqueue


class TaskSender:
    """Sends calls of a task as jobs."""

    def __init__(self, app, function, task, queue, options):
        self.app = app
        self.function = function
        self.task = task
        self.queue = queue
        self.enqueue_options = options
        self.delay = with_signature(self._delay, function)
        self.adelay = with_signature(self._adelay, function)

    def _payload(self, args, kwargs):
        check_call(self.function, args, kwargs)
        return {'task': self.task, 'args': list(args), 'kwargs': kwargs}

    def _delay(self, /, *args, **kwargs):
        """Add a job that calls the task with these arguments, and return it; see enqueue()."""
        payload = self._payload(args, kwargs)
        return self.app.enqueue(self.queue, payload, **self.enqueue_options)

    async def _adelay(self, /, *args, **kwargs):
        """delay() for asyncio programs; it never blocks their event loop."""
        payload = self._payload(args, kwargs)
        return await self.app.aenqueue(self.queue, payload, **self.enqueue_options)

    def schedule(self, name, cron=None, every=None, zone=None, args=(), kwargs=None, **options):
        """Call the task with these arguments at each tick; see rw.schedule()."""
        payload = self._payload(args, kwargs or {})
        merged = {**self.enqueue_options, **options}
        return self.app.schedule(
            name, self.queue, cron=cron, every=every, zone=zone, payload=payload, **merged)

    def options(self, **options):
        """A sender whose jobs have these options of enqueue(): add.options(delay=60).delay(4)."""
        check_names(options, ['host', *ENQUEUE_OPTIONS])
        merged = {**self.enqueue_options, **options}
        return TaskSender(self.app, self.function, self.task, self.queue, merged)


def with_signature(method, function):
    """The method as a function with the signature of another one."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        return method(*args, **kwargs)

    del call.__wrapped__        # inspect.unwrap() would lead to the method's own signature
    with contextlib.suppress(ValueError):       # builtins may have none
        call.__signature__ = inspect.signature(function)
    return call


def task_name(function):
    """The name under which a task's function is imported, also where its module is a script."""
    module = function.__module__
    if module in ('__main__', '__mp_main__'):
        module = main_module_name(getattr(function, '__globals__', {}))
        module = module or module_of_file(inspect.getfile(function))[1]
    return f'{module}.{function.__qualname__}'


def main_module_name(variables):
    """The name with which `python -m` was called, from a module's variables; None without it."""
    spec = variables.get('__spec__')
    return spec.name if spec and spec.name != '__main__' else None


def module_of_file(file):
    """The folder from which a file is imported, and its name there, as in package.module."""
    folder, name = os.path.split(os.path.abspath(file))
    names = [os.path.splitext(name)[0]]
    while os.path.exists(os.path.join(folder, '__init__.py')):
        folder, name = os.path.split(folder)
        names.insert(0, name)
    return folder, '.'.join(names)


def source_of(function):
    """Where a function is defined; the same after a reload, or in a notebook cell run again."""
    file = getattr(getattr(function, '__code__', None), 'co_filename', None)
    is_main = getattr(function, '__module__', None) == '__main__'
    if is_main and file and not os.path.isfile(file):
        file = None     # a notebook cell: its file name is another one each time it runs
    return file, getattr(function, '__qualname__', function)


def check_number(name, value, minimum, types=int):
    """Raise Misuse unless the setting is a finite number, and at least `minimum`."""
    is_number = isinstance(value, types) and not isinstance(value, bool)
    if not is_number or not minimum <= value < float('inf'):
        kind = 'whole number' if types is int else 'number of seconds'
        raise Misuse(f'{name} must be a {kind} from {minimum:g}, not {value!r}')


def check_settings(**settings):
    """Raise Misuse for a setting that is below its minimum, or not a number as MINIMUMS says."""
    for name in settings.keys() & MINIMUMS.keys():
        minimum = MINIMUMS[name]
        check_number(name, settings[name], minimum, int if isinstance(minimum, int) else NUMBER)


def check_function(function):
    """Raise Misuse unless it is a function that can be given attributes."""
    if not callable(function) or inspect.ismethod(function) or inspect.isbuiltin(function):
        raise Misuse(f'a decorated handler must be a function, not {function!r}')


def check_call(function, args, kwargs=None):
    """Raise Misuse if the function's signature does not allow this call."""
    try:
        inspect.signature(function).bind(*args, **kwargs or {})
    except ValueError:      # it has no signature
        pass
    except TypeError as error:
        name = getattr(function, '__qualname__', function)
        raise Misuse(f'{name} cannot be called like this: {error}') from None


def limit_calls(queue, max_running, rate):
    """The call that sets the limits of a queue, as a list; empty without a limit."""
    limits = drop_none(max_running=max_running)
    if isinstance(rate, int):
        rate = (rate, 1)
    if rate is not None:
        if not isinstance(rate, (tuple, list)) or len(rate) != 2:
            raise Misuse(f'rate must be claims and seconds, such as (10, 60), not {rate!r}')
        limits.update(rate=rate[0], per=in_seconds(rate[1]))
    check_settings(**limits)
    return [('/limit', {'queue': queue, **limits})] if limits else []


def schedule_calls(queue, cron, every, zone):
    """The call that schedules jobs of a queue, as a list; empty without a schedule."""
    schedule = drop_none(name=queue, cron=cron, every=in_seconds(every), zone=zone)
    check_settings(**schedule)
    is_cron = cron is not None or zone is not None
    if is_cron and every is not None:
        raise Misuse('a schedule has either every, or cron with or without a zone, not both')
    if is_cron and (not isinstance(cron, str) or not cron):
        raise Misuse(f'cron must be a string like "0 3 * * *" (a zone needs one), not {cron!r}')
    return [('/schedule', {'queue': queue, **schedule})] if cron or every else []


def report_undeclared(worker):
    """Log the schedules and limits in the engine that no decorator declares.

    A second time after UNSERVED_AFTER: by then no worker of the code's previous version seems to
    serve the queue of such a schedule.
    """
    reported = set()
    for session in list(worker.sessions.values()):
        while not session.was_reached:
            if worker.stopping.wait(WATCH_INTERVAL):
                return
        report_undeclared_settings(worker, session, reported)
    if not worker.stopping.wait(UNSERVED_AFTER):
        for session in list(worker.sessions.values()):
            report_undeclared_settings(worker, session, reported)


def report_undeclared_settings(worker, session, reported):
    """Log those of one engine that are not in the set `reported`, and add them to it."""
    configs = [consumer.config for consumer in worker.consumers if consumer.session is session]
    try:
        for finding in sorted(set(undeclared_settings(session.client, configs)) - reported):
            reported.add(finding)
            note(logging.WARNING, 'the engine has a %s of %s that this code does not declare; '
                 'to remove it: python rundown_workers.py %s', *finding)
    except (Error, LookupError, TypeError, AttributeError) as error:
        note(logging.DEBUG, 'cannot compare schedules and limits: %s', error)


def undeclared_settings(client, configs):
    """Schedules and limits that an engine has and no decorator declares.

    Yields (kind, queue, command that removes it). Only schedules like those of decorators count:
    they have the name of their queue and no payload. A schedule of a queue that this worker does
    not serve counts unless another worker polls the queue.
    """
    # without the queues of `exec`, whose limits the operator sets
    here = {config.name for config in configs
            if not hasattr(config.functions.get(None), 'slot_type')}
    declared = {(path, body['queue']) for config in configs for path, body in config.setup_calls}
    queues = {row['queue']: row for row in iter_pages(client.queues, 'queues')}
    silent_since = parse_time(client.queues(limit=1)['now']) - UNSERVED_AFTER
    for schedule in iter_pages(client.schedules, 'schedules'):
        name = schedule['name']
        is_ours = name == schedule['queue'] and schedule['payload'] is None
        polled_at = parse_time(queues[name]['polled_at']) if name in queues else None
        is_served = name not in here and polled_at and polled_at > silent_since
        if is_ours and not is_served and ('/schedule', name) not in declared:
            yield 'schedule', name, f'unschedule {shlex.quote(name)}'
    for name in sorted(here & queues.keys()):
        has_limit = queues[name]['max_running'] or queues[name]['rate']
        if has_limit and ('/limit', name) not in declared:
            yield 'limit', name, f'limit {shlex.quote(name)} --max-running none --rate none'


def iter_pages(call, key, **filters):
    """All rows of a call whose answers are pages."""
    after = None
    while True:
        page = call(after=after, **filters)
        yield from page[key]
        after = page.get('after')
        if not after:
            return


def iter_jobs(client, **filters):
    """All jobs that the filters of Client.jobs let pass, newest first."""
    return iter_pages(client.jobs, 'jobs', limit=1000, **filters)


def return_free_memory():
    """Return memory to the system: compiling this file takes 9 MB, which glibc would keep."""
    with contextlib.suppress(AttributeError, OSError, TypeError):       # it is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def is_held_back(row):
    """Whether a rate holds back due jobs of a queue, given as the engine describes it."""
    return row['oldest_age'] is not None and row['rate'] and not row['paused']


def set_up_log():
    """Log to stderr, until the program sets up logging itself."""
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
        handler.addFilter(lambda record: not logging.getLogger().handlers)
        log.addHandler(handler)
        log.setLevel(log.level or logging.INFO)


default = App()
queue = default.queue
task = default.task
on = default.on
around = default.around
enqueue = default.enqueue
aenqueue = default.aenqueue
enqueue_many = default.enqueue_many
get = default.get
schedule = default.schedule
unschedule = default.unschedule
wait = default.wait
run = default.run
stop = default.stop
testing = default.testing


# -- Outbox ----------------------------------------------------------------------------------------
CREATE_OUTBOX = (
    'CREATE TABLE rundown_outbox (number {}, job TEXT NOT NULL, error TEXT, '
    'taken_by TEXT, taken_at BIGINT)'
)
CREATE_IN_POSTGRESQL = CREATE_OUTBOX.format('BIGSERIAL PRIMARY KEY')
CREATE_IN_SQLITE = CREATE_OUTBOX.format('INTEGER PRIMARY KEY AUTOINCREMENT')
CREATE_INDEXES = [      # so that reading pending rows does not scan refused or kept ones
    'CREATE INDEX rundown_outbox_pending ON rundown_outbox (number) '
    'WHERE error IS NULL AND taken_by IS NULL',
    'CREATE INDEX rundown_outbox_taken ON rundown_outbox (taken_at) '
    'WHERE taken_at IS NOT NULL',
]
ADD_COLUMNS = [     # to a table of the first version
    'ALTER TABLE rundown_outbox ADD COLUMN taken_by TEXT',
    'ALTER TABLE rundown_outbox ADD COLUMN taken_at BIGINT',
]
NUMBER_ROWS = [     # of a table of version 1.1 in SQLite
    'ALTER TABLE rundown_outbox RENAME TO rundown_outbox_unnumbered',
    CREATE_IN_SQLITE,
    'INSERT INTO rundown_outbox (job, error, taken_by, taken_at) '
    'SELECT job, error, taken_by, taken_at FROM rundown_outbox_unnumbered ORDER BY rowid',
    'DROP TABLE rundown_outbox_unnumbered',
    *CREATE_INDEXES,
]


def enqueue_in(
    connection: Any,
    queue: str,
    payload: Any = None,
    delay: float | datetime.timedelta | None = None,
    run_at: str | datetime.datetime | None = None,
    id: str | None = None,
    **options: Any,
) -> str:
    """Write a job into the open transaction of a connection. It is enqueued if that commits.

    The connection is one of sqlite3, psycopg, psycopg2, SQLAlchemy (a Connection or a Session) or
    Django (django.db.connection); other drivers work if they write parameters as %s and the table
    is there. With an AsyncSession on psycopg: `await session.run_sync(enqueue_in, queue, payload)`.
    Returns the job's id. The options are those of enqueue(); a delay begins now.
    """
    check_names(options, ENQUEUE_OPTIONS)
    if 'give_up' in options:
        raise Misuse('an outbox takes no give_up: its jobs are not sent at once')
    if run_at is not None and delay is not None:
        raise Misuse('a job has a delay or a run_at, not both')
    if run_at is None and (delay is not None or options.get('expires') is not None):
        # counted from now, and not from when the engine gets the job
        now = datetime.datetime.now(datetime.timezone.utc)
        run_at = now + datetime.timedelta(seconds=clamp_delay(delay or 0))
    id = id or new_id()
    outbox_of(connection).insert(encode_job(payload, id, run_at, queue=queue, **options))
    Forwarder.last_write = time.monotonic()
    return id


def driver_connection(connection):
    """The driver's own connection, which may be inside one of Django or SQLAlchemy."""
    if hasattr(connection, 'ensure_connection'):            # Django
        connection.ensure_connection()
        return connection.connection
    if callable(getattr(connection, 'connection', None)):   # a Session of SQLAlchemy
        connection = connection.connection()
    if hasattr(connection, 'exec_driver_sql'):              # a Connection of SQLAlchemy
        if not connection.in_transaction() and hasattr(connection, 'commit'):
            connection.begin()      # as its first statement would do; its commit() needs that
        connection = connection.connection
    return getattr(connection, 'dbapi_connection', connection)


def outbox_of(connection):
    """The Outbox in the database of a connection; Misuse if the connection is not supported."""
    if not is_async(connection):
        connection = driver_connection(connection)
    if hasattr(connection, 'total_changes') and hasattr(connection, 'isolation_level'):
        return SQLiteOutbox(connection)
    is_usable = (
        hasattr(connection, 'cursor')
        and hasattr(connection, 'commit')
        and not is_async(connection)
        # SQLAlchemy's adapters of these drivers take other parameters
        and not has_class_of(connection, 'aiosqlite')
        and not has_class_of(connection, 'asyncpg')
    )
    if not is_usable:
        raise Misuse('an outbox needs a connection of sqlite3, psycopg, psycopg2, SQLAlchemy or '
                     f'Django that is not for asyncio, not a {type(connection).__name__}')
    return Outbox(connection)


def is_async(connection):
    return inspect.iscoroutinefunction(getattr(connection, 'commit', None))


def has_class_of(connection, name):
    """Is `name` in the module name of the connection's class, or of one of its bases?"""
    return any(name in kind.__module__ for kind in type(connection).__mro__)


class Outbox:
    """The table rundown_outbox, for psycopg, psycopg2, or another driver with parameters as %s."""

    parameter = '%s'
    row_factory = staticmethod(lambda cursor: tuple)    # of cursors; psycopg2's have none
    create_table = CREATE_IN_POSTGRESQL

    def __init__(self, connection):
        # constant
        self.connection = connection
        # the types of the columns are those of PostgreSQL; other databases may lack them
        self.makes_table = has_class_of(connection, 'psycopg')

    # In the transaction of a producer, which goes on if a statement fails.
    def insert(self, text):
        """Add a job, as JSON text."""
        if self.commits_each_statement():
            raise Misuse('the connection is in autocommit mode, so the job would be enqueued '
                         'even if your other statements fail: begin a transaction first')
        self.use_table('INSERT INTO rundown_outbox (job) VALUES (?)', text)

    def find(self, id):
        """The job with this id as far as the outbox knows it; None if it is not in the outbox."""
        rows = self.use_table('SELECT job, error FROM rundown_outbox WHERE job LIKE ?', f'%{id}%')
        for text, error in rows:
            fields = json.loads(text)
            if fields['id'] == id:
                return {**fields, 'status': 'failed' if error else 'pending', 'error': error}
        return None

    def use_table(self, statement, *values):
        """The rows of a statement. If the table or a column is missing, it is made."""
        try:
            return self.execute_guarded(statement, *values)
        except Exception as error:          # each driver has its own classes
            problem = first_line(error)
            if not re.search('rundown_outbox|taken_(at|by)', problem):
                raise
        problems = [problem, *self._make_missing(problem)]
        try:
            return self.execute_guarded(statement, *values)
        except Exception as error:
            problems.append(first_line(error))
            raise Error('the table rundown_outbox cannot be used, nor made: '
                        f'{"; ".join(problems)}. The statement that makes it: '
                        f'{self.create_table}') from error

    def _make_missing(self, problem):
        """Make the table, or its columns. Returns a list: empty, or with the error message.

        An error need not matter: another process may have just made the same.
        """
        changes = []
        if 'taken_' in problem:
            changes = ADD_COLUMNS
        elif self.makes_table:
            # The first fails if another producer has just made the table. Indexes on a table in
            # which others write could lead to a deadlock.
            changes = [self.create_table, *CREATE_INDEXES]
        try:
            for change in changes:
                self.execute_guarded(change)
        except Exception as error:
            return [first_line(error)]
        return []

    # In transactions of a forwarder.
    def prepare(self):
        """Make the table, or bring one of an older version up to date."""
        self.use_table('SELECT taken_by, taken_at FROM rundown_outbox WHERE 1 = 0')
        self.connection.commit()

    def texts(self, numbers):
        """The jobs of these rows as JSON; fewer if another forwarder has deleted some."""
        rows = self.read(
            f'SELECT job FROM rundown_outbox WHERE number IN ({numbers}) ORDER BY number')
        # a connection may return text as bytes
        return [text if isinstance(text, str) else bytes(text).decode() for text, in rows]

    def read(self, statement, *values):
        """The rows of a statement in a transaction of its own."""
        rows = self.execute(statement, *values)
        self.connection.commit()
        return rows

    def change(self, statement, *values):
        """Execute a statement in a transaction of its own.

        PostgreSQL may abort it because of another forwarder; then it is tried once more.
        """
        try:
            self.read(statement, *values)
        except Exception:
            self.connection.rollback()      # raises if the connection is lost
            self.read(statement, *values)

    # Differences between drivers.
    def commits_each_statement(self):
        """Does the next statement commit by itself (autocommit mode, no open transaction)?"""
        status = getattr(getattr(self.connection, 'info', None), 'transaction_status', 0)
        return getattr(self.connection, 'autocommit', None) is True and status == 0     # 0: idle

    def execute_guarded(self, statement, *values):
        """execute(). If it fails, the transaction can go on."""
        if self.commits_each_statement():
            return self.execute(statement, *values)
        self.execute('SAVEPOINT rundown')
        try:
            rows = self.execute(statement, *values)
        except Exception:
            self.execute('ROLLBACK TO SAVEPOINT rundown')
            self.execute('RELEASE SAVEPOINT rundown')
            raise
        self.execute('RELEASE SAVEPOINT rundown')
        return rows

    def execute(self, statement, *values):
        """The rows of a statement as tuples, also if the connection has a row factory."""
        with contextlib.closing(self.connection.cursor()) as cursor:
            if hasattr(self.connection, 'row_factory'):     # sqlite3 and psycopg
                with contextlib.suppress(AttributeError):   # an adapter whose rows are plain
                    cursor.row_factory = self.row_factory
            cursor.execute(statement.replace('?', self.parameter), values)
            rows = cursor.fetchall() if cursor.description else []
        return [tuple(row.values() if isinstance(row, dict) else row) for row in rows]


class SQLiteOutbox(Outbox):
    """The table in a database of sqlite3."""

    parameter = '?'
    row_factory = None
    create_table = CREATE_IN_SQLITE
    # A failure does not end the transaction, and releasing the outermost savepoint would commit.
    execute_guarded = Outbox.execute

    def __init__(self, connection):
        super().__init__(connection)
        self.makes_table = True

    def commits_each_statement(self):
        if self.connection.in_transaction:
            return False
        # True or False since Python 3.12; -1, or missing: isolation_level decides
        autocommit = getattr(self.connection, 'autocommit', -1)
        return self.connection.isolation_level is None if autocommit == -1 else autocommit

    def prepare(self):
        super().prepare()
        if self._lacks_numbers():
            self._number_rows()

    def _lacks_numbers(self):
        return self.execute(
            "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'rundown_outbox' "
            "AND sql LIKE '%BIGSERIAL%'")

    def _number_rows(self):
        """Number the rows of a table that version 1.1 made through Django's connection.

        Its jobs are all sent again, since it does not tell which of them the engine has. The
        engine recognizes their ids.
        """
        begins = not self.connection.in_transaction
        if begins:
            self.execute('BEGIN IMMEDIATE')
        if self._lacks_numbers():       # still, now that no other forwarder can change that
            for statement in NUMBER_ROWS:
                self.execute(statement)
            note(logging.WARNING, 'the outbox had no row numbers: repaired, all is sent again')
        if begins:
            self.execute('COMMIT')
        else:
            self.connection.commit()


def first_line(error):
    return str(error).partition('\n')[0]


class Forwarder:
    """Sends the committed jobs of an outbox to an engine, in order.

    No transaction is open while it waits for the engine.
    """

    # When this process last wrote into an outbox: set by enqueue_in(), read by all forwarders. A
    # time and not an Event: an interrupted handler, or a fork, could leave the lock of an Event
    # locked. It also tells how long to read often: there is no signal of a commit.
    last_write = float('-inf')

    def __init__(self, connection, client, send, keep):
        # constant
        self.outbox = outbox_of(connection)
        self.client = client
        self.send = send            # client.send or client.call
        self.keep = keep            # seconds for which rows are kept that the engine took
        # touched by the thread that forwards
        self.postponed = {}         # row number -> when a job too large for a proxy is sent again
        self.checked_host = None    # the engine for which the kept rows were last searched
        self.checked_at = 0         # monotonic seconds of that search
        self.outbox.prepare()

    def send_all(self):
        """Send all committed jobs; returns how many the engine took."""
        if self.keep:
            self.send('/health')    # if a standby has taken over, this changes client.host
        count = 0
        while True:
            self._delete_taken()
            rows = self._next_rows()
            if not rows:
                return count
            for batch in batches(rows, lambda row: row[1]):
                count += self._send(batch)

    def _delete_taken(self):
        """Delete the rows that were taken `keep` seconds ago or earlier."""
        latest = int(time.time() - self.keep)
        where = 'FROM rundown_outbox WHERE taken_at <= ?'
        if self.outbox.read(f'SELECT 1 {where} LIMIT 1', latest):   # reading takes no write lock
            self.outbox.change(f'DELETE {where}', latest)

    def _next_rows(self):
        """(number, characters) of the next rows that the engine in use has not taken.

        JSON text is ASCII, so characters are bytes. The texts are read later: a page of rows may
        be larger than the memory.
        """
        now = time.monotonic()
        host = self.client.host
        self.postponed = {number: at for number, at in self.postponed.items() if at > now}
        if host != self.checked_host or now > self.checked_at + OUTBOX_INTERVAL:
            rows = self._select_rows('taken_by <> ?', host)     # scans all kept rows
            if rows:
                return rows
            self.checked_host = host
            self.checked_at = now
        return self._select_rows('taken_by IS NULL')

    def _select_rows(self, condition, *values):
        postponed = ','.join(map(str, self.postponed)) or '0'
        return self.outbox.read(
            f'SELECT number, LENGTH(job) FROM rundown_outbox WHERE error IS NULL AND {condition} '
            f'AND number NOT IN ({postponed}) ORDER BY number LIMIT {OUTBOX_PAGE}', *values)

    def _send(self, rows):
        """Send rows in one request; returns how many the engine took."""
        numbers = ','.join(str(number) for number, _ in rows)
        jobs = self.outbox.texts(numbers)
        if not jobs:        # another forwarder was faster
            return 0
        host = self.client.host
        try:
            self.send('/enqueue', batch_body(jobs))
        except (Refused, EngineUnavailable) as error:
            if not is_verdict(error):
                raise
            problem = error
        else:
            # If the client has changed to another engine meanwhile, that one gets them again.
            self._mark_taken(numbers, host)
            return len(rows)
        return self._isolate(rows, problem)

    def _isolate(self, rows, problem):
        """Halve the rows of a request that was refused, until the one at fault is alone."""
        if len(rows) > 1:
            middle = len(rows) // 2
            return self._send(rows[:middle]) + self._send(rows[middle:])
        number, _ = rows[0]
        if isinstance(problem, Refused):
            note(logging.ERROR, 'the engine refused job %s of the outbox: %s', number, problem)
            self.outbox.change(
                'UPDATE rundown_outbox SET error = ? WHERE number = ?', str(problem), number)
        else:
            note(logging.ERROR, 'job %s of the outbox is sent again in %g s: it is too large for '
                 'a proxy before the engine: %s', number, OUTBOX_TOO_LARGE_PAUSE, problem)
            self.postponed[number] = time.monotonic() + OUTBOX_TOO_LARGE_PAUSE
        return 0

    def _mark_taken(self, numbers, host):
        if self.keep:
            self.outbox.change(
                f'UPDATE rundown_outbox SET taken_by = ?, taken_at = ? WHERE number IN ({numbers})',
                host, int(time.time()))
        else:
            self.outbox.change(f'DELETE FROM rundown_outbox WHERE number IN ({numbers})')


def forward(connect: Callable[[], Any], host: str | None = None, keep: float = 0) -> int:
    """Send the jobs in the outbox of the database that connect() opens.

    Returns how many the engine took. Their rows are kept for `keep` seconds, and sent again to a
    standby that takes over in that time.
    """
    client = default.client(host)
    with contextlib.closing(connect()) as connection:
        return Forwarder(connection, client, client.call, keep).send_all()


@contextlib.contextmanager
def forwarding(
    connect: Callable[[], Any],
    host: str | None = None,
    keep: float = 0,
    interval: float = OUTBOX_INTERVAL,
) -> Iterator[None]:
    """forward() in a thread during the block. connect() is called in that thread.

    The outbox is read every `interval` seconds. In the minute after this process called
    enqueue_in(), it is read every 50 ms.
    """
    stopping = threading.Event()
    thread = threading.Thread(
        target=keep_forwarding, args=(connect, host, keep, interval, stopping), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(REPORT_GRACE)           # the remaining jobs stay in the outbox


def keep_forwarding(connect, host, keep, interval, stopping):
    """Forward until `stopping` is set, and then once more unless the last try failed.

    Reconnects after each failure.
    """
    failures = 0
    is_last = False
    while not is_last:
        try:
            with contextlib.closing(connect()) as connection:
                client = default.client(host)
                forwarder = Forwarder(connection, client, client.send, keep)
                while not is_last:
                    is_last = stopping.is_set()
                    forwarder.send_all()
                    failures = 0
                    wait_for_commits(interval, stopping)
        except Exception as error:      # the database's or the engine's
            if not failures:
                note(logging.WARNING,
                     'cannot forward the outbox, trying again until it works: %s', error)
            failures += 1
            is_last = stopping.wait(retry_pause(failures))


def wait_for_commits(interval, stopping):
    """Wait until the outbox should be read again, or `stopping` is set."""
    deadline = time.monotonic() + interval
    while time.monotonic() < deadline and not stopping.wait(OUTBOX_BURST_INTERVAL):
        if time.monotonic() < Forwarder.last_write + OUTBOX_BURST:
            return


def command_forward(client, options):
    """Forward the outbox in a SQLite file."""
    import sqlite3      # here, since not every Python has it
    if not os.path.isfile(options.file):
        raise Misuse(f'there is no file {options.file}')
    set_up_log()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    forwarder = forwarding(lambda: sqlite3.connect(options.file), keep=options.keep)
    with contextlib.suppress(KeyboardInterrupt), forwarder:
        while True:
            time.sleep(1)


# -- Django ----------------------------------------------------------------------------------------
DJANGO_OPTIONS = ['host', 'max_retries', 'outbox', 'timeout']
DJANGO_STATUSES = {     # of a job -> of Django's TaskResult
    'pending': 'READY',
    'running': 'RUNNING',
    'done': 'SUCCESSFUL',
    'failed': 'FAILED',
    'cancelled': 'FAILED',
}


def import_django():
    """Import what this section uses of Django. Only its users pay for that."""
    global asgiref, django
    import asgiref.sync
    import django.conf
    import django.db
    import django.tasks.backends.base
    import django.tasks.exceptions
    import django.tasks.signals
    import django.utils.json
    import django.utils.module_loading
    import django.utils.timezone


class DjangoTasks:
    """Sends Django's tasks as jobs, and finds their results.

    DjangoBackend is this class and Django's BaseTaskBackend. With `"OPTIONS": {"outbox": True}`
    (or the alias of a database) jobs are written into the transaction that is open there, or into
    one of their own. Other options are `host`, `timeout` and `max_retries`. A task is READY again
    while it waits for a retry.
    """

    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def __init__(self, alias, params):
        super().__init__(alias, params)
        check_names(self.options, DJANGO_OPTIONS, f'TASKS[{alias!r}] has no option')
        # constant
        outbox = self.options.get('outbox') or None
        self.database = 'default' if outbox is True else outbox     # its alias; None: no outbox
        self.host = self.options.get('host')                        # None: RUNDOWN_URL
        if self.database:
            aliases = list(django.db.connections)
            check_names([self.database], aliases, f'TASKS[{alias!r}]: there is no database')

    def enqueue(self, task, args, kwargs):
        options = self._enqueue_options(task, args, kwargs)
        if self.database:
            job = self._enqueue_in_outbox(options)
        else:
            job = default.enqueue(host=self.host, **options)
        result = self._result(task, job)
        django.tasks.signals.task_enqueued.send(type(self), task_result=result)
        return result

    async def aenqueue(self, task, args, kwargs):
        if self.database:       # in the thread that has the connection
            return await super().aenqueue(task, args, kwargs)
        options = self._enqueue_options(task, args, kwargs)
        result = self._result(task, await default.aenqueue(host=self.host, **options))
        await django.tasks.signals.task_enqueued.asend(type(self), task_result=result)
        return result

    def _enqueue_options(self, task, args, kwargs):
        self.validate_task(task)
        return {
            'queue': task.queue_name,
            'payload': {
                'task': task.module_path,
                'args': django.utils.json.normalize_json(args),
                'kwargs': django.utils.json.normalize_json(kwargs),
            },
            'priority': task.priority,
            'run_at': task.run_after,
            'max_retries': self.options.get('max_retries'),
            'timeout': self.options.get('timeout'),
        }

    def _enqueue_in_outbox(self, options):
        """Write the job; returns the fields of it that are known before the engine has it."""
        connection = django.db.connections[self.database]
        begins = connection.get_autocommit()
        with django.db.transaction.atomic(self.database) if begins else contextlib.nullcontext():
            id = enqueue_in(connection, **options)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        return {**options, 'id': id, 'status': 'pending', 'created_at': now}

    # The outbox is searched before the engine. The other way round, a job that moves to the engine
    # between the two searches would not be found.
    def get_result(self, result_id):
        job = self._find_in_outbox(result_id)
        with missing_result(result_id):
            return self.stored_result(job or default.client(self.host).job(result_id))

    async def aget_result(self, result_id):
        job = self.database and await asgiref.sync.sync_to_async(self._find_in_outbox)(result_id)
        with missing_result(result_id):
            if not job:
                client = default.client(self.host)
                job = await async_calls.call(client, '/jobs/' + quote(result_id))
            return self.stored_result(job)

    def _find_in_outbox(self, id):
        return self.database and outbox_of(django.db.connections[self.database]).find(id)

    def stored_result(self, job):
        """The TaskResult of a job as the engine or the outbox has it."""
        priority = max(-100, min(100, job.get('priority', 0)))      # operators may set others
        task = django_task(job['payload'])
        task = task.using(queue_name=job['queue'], priority=priority, backend=self.alias)
        return self._result(task, job)

    def _result(self, task, job):
        attempts = job.get('attempts', [])
        workers = [attempt['worker'] for attempt in attempts]
        if job['status'] == 'running':
            workers.append(job['worker'])
        unknown = job.get('attempt', 0) - len(workers)      # the engine keeps the last ten
        result = django.tasks.TaskResult(
            task=task,
            id=job['id'],
            status=django.tasks.TaskResultStatus[DJANGO_STATUSES[job['status']]],
            enqueued_at=django_time(job.get('created_at')),
            started_at=django_time((attempts or [job])[0].get('started_at')),
            last_attempted_at=django_time(job.get('started_at')),
            finished_at=django_time(job.get('finished_at')),
            args=job['payload'].get('args', []),
            kwargs=job['payload'].get('kwargs', {}),
            backend=self.alias,
            errors=[django_error(text) for text in error_texts(job)],
            worker_ids=[''] * unknown + workers,
        )
        set_fields(result, _return_value=job.get('result'))
        return result


class DjangoAttempt:
    """One attempt of a task in a worker. Sends Django's signals, and closes old connections."""

    def __init__(self, backend, job):
        # constant
        self.sender = type(backend)
        self.result = backend.stored_result(job)    # its fields are set when the task ends
        self.function = self.result.task.func

    def run(self):
        try:
            value = as_django_json(self.function(*self._begin(), **self.result.kwargs))
        except BaseException as error:
            self._end(error=error)
            raise
        self._end(value)
        return value

    async def arun(self):
        """run() for an async task. As in a request, it has a thread and connections of its own."""
        async with asgiref.sync.ThreadSensitiveContext():
            try:
                args = await asgiref.sync.sync_to_async(self._begin)()
                value = as_django_json(await self.function(*args, **self.result.kwargs))
            except BaseException as error:
                await asgiref.sync.sync_to_async(self._end)(error=error)
                raise
            else:
                await asgiref.sync.sync_to_async(self._end)(value)
            finally:
                await asgiref.sync.sync_to_async(django.db.connections.close_all)()
        return value

    def _begin(self):
        """Send task_started; returns the positional arguments."""
        django.db.close_old_connections()
        django.tasks.signals.task_started.send(self.sender, task_result=self.result)
        takes_context = self.result.task.takes_context
        context = [django.tasks.TaskContext(task_result=self.result)] if takes_context else []
        return context + self.result.args

    def _end(self, value=None, error=None):
        """Send task_finished, unless another attempt follows."""
        succeeded = error is None       # an exception may be false, as an empty container is
        if not succeeded:
            self.result.errors.append(django_error(error_text(error)))
        try:
            if succeeded or is_last_attempt(error):
                status = 'SUCCESSFUL' if succeeded else 'FAILED'
                set_fields(
                    self.result,
                    _return_value=value,
                    finished_at=django.utils.timezone.now(),
                    status=django.tasks.TaskResultStatus[status],
                )
                # robust: a receiver that fails must not have the task run again
                django.tasks.signals.task_finished.send_robust(self.sender, task_result=self.result)
        finally:
            django.db.close_old_connections()


def is_last_attempt(error):
    """Is the attempt that ended with this error the last one of the current job?"""
    claim = current.get()
    # the worker has released the job, or lost its claim
    is_lost = claim.outcome is not None and claim.outcome.call != 'fail'
    # .get(), since the task may have removed keys of its job
    has_retries = claim.job.get('retries', 0) < claim.job.get('max_retries', 0)
    return not is_lost and (isinstance(error, Abort) or not has_retries)


def set_fields(result, **fields):
    """Set fields of a TaskResult, which is frozen for users."""
    for name, value in fields.items():
        object.__setattr__(result, name, value)


@contextlib.contextmanager
def missing_result(id):
    """Raise Django's exception if the engine does not have the job, or it is no task of Django."""
    try:
        yield
    except Refused as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        raise django.tasks.exceptions.TaskResultDoesNotExist(id) from None
    except (Abort, ImportError) as error:
        raise django.tasks.exceptions.TaskResultDoesNotExist(f'{id}: {error}') from None


def as_django_json(value):
    try:
        return django.utils.json.normalize_json(value)
    except (TypeError, ValueError) as error:
        raise Abort(f'the return value is not JSON: {error}') from None


def django_task(payload):
    name = payload.get('task') if isinstance(payload, dict) else None
    if not isinstance(name, str):
        raise Abort('the payload of a task must be {"task": "its name", "args": [...], ...}')
    task = django.utils.module_loading.import_string(name)
    if not isinstance(task, django.tasks.Task):
        raise Abort(f'{name} is not a task of Django')
    return task


def django_time(text):
    """The datetime of a time in the engine's JSON; naive if Django's times are."""
    if text is None:
        return None
    moment = datetime.datetime.fromisoformat(text)
    return moment if django.conf.settings.USE_TZ else django.utils.timezone.make_naive(moment)


def error_texts(job):
    """The error of each failed attempt; for a job that was cancelled, also that of the job."""
    texts = [attempt['error'] for attempt in job.get('attempts', []) if attempt.get('error')]
    if job['status'] == 'failed':
        texts[-1:] = [job['error'] or 'failed']         # the whole text
    elif job['status'] == 'cancelled':
        texts.append(job['error'] or 'cancelled')
    return texts


def django_error(text):
    """The TaskError of a text. A traceback names the class; for other texts it is Error."""
    found = re.findall(r'^ .*\n([A-Za-z_][\w.]*)(?=:|$)', text, re.MULTILINE)
    name = found[-1] if found else 'Error'
    if '.' not in name:
        name = f'builtins.{name}' if hasattr(builtins, name) else f'{__name__}.{name}'
    return django.tasks.base.TaskError(exception_class_path=name, traceback=text)


if not TYPE_CHECKING:       # otherwise type checkers would accept any name of this module
    def __getattr__(name):
        """Make DjangoBackend when it is asked for, so that only its users import Django."""
        if name != 'DjangoBackend':
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        try:
            import_django()
        except ImportError as error:
            raise AttributeError(f'DjangoBackend needs Django 6.0 or newer: {error}') from error
        bases = (DjangoTasks, django.tasks.backends.base.BaseTaskBackend)
        globals()[name] = type(name, bases, {'__doc__': DjangoTasks.__doc__})
        return globals()[name]


def command_django(client, options):
    """Work on Django's tasks, and forward the outboxes of their backends."""
    sys.path.insert(0, os.getcwd())
    if options.reload:
        reloader.start()
    backends = find_django_backends()
    register_django_queues(backends, options.queues)
    outboxes = {(backend.database, backend.host) for backend in backends if backend.database}
    with contextlib.ExitStack() as forwarders:
        for database, host in outboxes:
            connect = functools.partial(django.db.connections.create_connection, database)
            if options.burst:
                forward(connect, host)      # before the worker finds that nothing is due
            forwarder = forwarding(connect, host, interval=DJANGO_OUTBOX_INTERVAL)
            forwarders.enter_context(forwarder)
        default.run(burst=options.burst, grace=options.grace, concurrency=options.concurrency)
    reloader.restart_if_changed()


def find_django_backends():
    """The backends of a project's setting TASKS that are DjangoBackends."""
    try:
        import_django()
    except ImportError as error:
        raise Misuse(f'this needs Django 6.0 or newer: {error}') from None
    if not os.environ.get('DJANGO_SETTINGS_MODULE'):
        raise Misuse("DJANGO_SETTINGS_MODULE has to name the project's settings, as in manage.py")
    django.setup()
    backends = django.tasks.task_backends.all()
    return [backend for backend in backends if isinstance(backend, DjangoTasks)]


def register_django_queues(backends, names):
    """Register handlers for the queues with these names; without names, for those in QUEUES."""
    for backend in backends:
        for queue in names or sorted(backend.queues):
            is_allowed = not backend.queues or queue in backend.queues
            if is_allowed and (queue, backend.host) not in default.configs:
                default.queue(queue, host=backend.host)(django_handler(backend))
    served = {queue for queue, _ in default.configs}
    unknown = [repr(name) for name in names if name not in served]
    if unknown or not served:
        raise Misuse('no rundown_workers.DjangoBackend in the setting TASKS has '
                     f'{", ".join(unknown) or "a queue"} among its QUEUES')


def django_handler(backend):
    """The handler of a queue. For an async task it returns a coroutine."""
    def run_task(payload):
        attempt = DjangoAttempt(backend, job())
        is_async = inspect.iscoroutinefunction(attempt.function)
        return attempt.arun() if is_async else attempt.run()

    return run_task


# -- Testing ---------------------------------------------------------------------------------------
class Testing:
    """An engine for a test, its client, and its clock: the value of testing()."""

    client: Client

    def __init__(self, app: App) -> None:
        self.app = app
        self.server = None      # set by App.testing()
        self.seconds = 0.0      # by which the engine's clock is ahead
        self.clock = types.SimpleNamespace(
            time=lambda: time.time() + self.seconds,
            monotonic=lambda: time.monotonic() + self.seconds,
        )

    def advance(self, seconds: float | datetime.timedelta) -> None:
        """Move the engine's clock on; jobs that are due by then become available at once."""
        self.seconds += duration('seconds', seconds)
        self.server.run_due_now()

    def run(self, delayed: bool = False, **options: Any) -> None:
        """Run the due jobs, as run(burst=True) does.

        With `delayed`, also jobs that are delayed, wait for a retry, or are held back by a rate:
        the clock moves on until they are due.
        """
        self.app.waits_for_rates = not delayed
        pause = 0
        try:
            while pause is not None:
                self.advance(pause)
                began = self.clock.time()
                self.app.run(burst=True, **options)
                pause = self._pause(began) if delayed else None
        finally:
            self.app.waits_for_rates = True

    def _pause(self, began):
        """Seconds until the next job that was not due at `began` can be claimed; None: no job."""
        queues = {queue for queue, _ in self.app.configs}
        moments = [
            parse_time(job['next_run_at']) + 0.01
            for job in iter_jobs(self.client, status='pending') if job['queue'] in queues
        ]
        moments += [
            self.clock.time() + row['per'] for row in iter_pages(self.client.queues, 'queues')
            if row['queue'] in queues and is_held_back(row)
        ]
        later = [moment for moment in moments if moment > began]
        return max(0, min(later) - self.clock.time()) if later else None


def import_engine():
    """The module rundown_engine, beside this one in a package, or on the import path."""
    names = ['rundown_engine']
    if __package__:
        names.insert(0, f'{__package__}.rundown_engine')
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise Error(
        'this needs rundown_engine.py to be importable, such as beside rundown_workers.py'
    )


@contextlib.contextmanager
def environment_variable(name, value):
    """Set an environment variable during a block; one that was not there is removed again."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


# -- Command line ----------------------------------------------------------------------------------
TABLES = {      # key of an answer with rows -> the columns that a terminal shows
    'jobs': ['id', 'queue', 'status', 'attempt', 'age', 'tag'],
    'queues': [
        'queue', 'pending', 'scheduled', 'running', 'done', 'failed', 'cancelled', 'oldest',
    ],
    'schedules': [
        'name', 'queue', 'cron', 'every', 'zone', 'next_run_at', 'last_run_at', 'skipped',
    ],
}
TOP_COLUMNS = [
    'queue', 'pending', 'later', 'running', 'failed', 'done/min', 'fail/min', 'oldest', 'workers',
]
TOP_OTHER_LINES = 6     # lines of `top` with neither a queue nor a worker
MIN_TOP_ROWS = 5        # queues that `top` shows even on a small terminal
WORKER_COLUMNS = ['worker', 'queue', 'running', 'hung', 'seen']
MIN_COLUMN = 6          # characters that a column keeps when a table is fitted to a terminal
FLEXIBLE_COLUMNS = ['queue', 'tag', 'name', 'worker', 'cron']    # the columns that are shortened
BAR_WIDTH = 30          # characters of a progress bar
CLEAR_SCREEN = '\x1b[H\x1b[2J'
CLEAR_LINE = '\r\x1b[K'


def show(answer):
    """Print JSON on a pipe; on a terminal a table, or a line for each field."""
    key = next((key for key in TABLES if key in answer), None)
    try:
        if not sys.stdout.isatty():
            print(json.dumps(answer))
        elif key:
            print_table(TABLES[key], answer[key])
        else:
            for field, value in answer.items():
                show_field(field, value)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # Python flushes it once more when it ends
        raise Error(f'cannot write the answer: {error.strerror}') from None


def show_field(field, value):
    if field == 'attempts' and isinstance(value, list):
        lines = [attempt_line(attempt) for attempt in value]
    else:
        lines = [printable(line) for line in plain(value).splitlines()]
    if len(lines) > 1 or field == 'attempts' and lines:
        print('\n'.join([f'{field}:', *lines]))
    else:
        print(f'{field:14}{"".join(lines)}')


def attempt_line(attempt):
    """An attempt as a line: its number, outcome, time, worker and the end of its error."""
    began = parse_time(attempt['started_at'])
    ended = parse_time(attempt['finished_at'])
    took = f'{ended - began:.1f} s' if began and ended else ''
    error = last_error_line(attempt.get('error'))
    parts = [
        f'{attempt["attempt"]:4}', f'{plain(attempt["outcome"]):10}', plain(attempt['started_at']),
        f'{took:>9}', plain(attempt['worker']), error,
    ]
    return printable('  '.join(parts).rstrip())


def print_table(columns, rows):
    """Print rows as a table, which is fitted to the width of the terminal if there is one.

    The error of a row gets a line of its own.
    """
    cells = [columns]
    cells += [[printable(plain(row.get(column))) for column in columns] for row in rows]
    errors = [None, *(row.get('error') for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    available = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    fit_widths(columns, widths, available)
    for row, error in zip(cells, errors):
        texts = [shorten_end(text, width) for text, width in zip(row, widths)]
        print('  '.join(map(str.ljust, texts, widths)).rstrip())
        if error:
            print(shorten_end('    ' + printable(last_error_line(error)), available))


def fit_widths(columns, widths, available):
    """Shorten the widest columns until the table fits."""
    excess = sum(widths) + 2 * (len(widths) - 1) - available
    while excess > 0:
        shrinkable = [
            number for number, width in enumerate(widths)
            if width > MIN_COLUMN and columns[number] in FLEXIBLE_COLUMNS
        ]
        if not shrinkable:
            return
        widths[max(shrinkable, key=widths.__getitem__)] -= 1
        excess -= 1


def shorten_end(text, width):
    return text if len(text) <= width else text[:width - 1] + '~'


def plain(value):
    """A value as text: strings without quotes, nothing for None."""
    if value is None:
        return ''
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def parse_time(text):
    """Seconds since 1970 of a time in the engine's JSON, or None."""
    return text and datetime.datetime.fromisoformat(text.replace('Z', '+00:00')).timestamp()


def duration_text(seconds):
    """A duration in its largest unit, such as `5 s` or `3 h`."""
    for size, unit in ((86400, 'd'), (3600, 'h'), (60, 'min')):
        if seconds >= size:
            return f'{seconds / size:.0f} {unit}'
    return f'{max(0, seconds):.0f} s'


def age_text(moment):
    """The time since a moment of the engine's JSON, such as `3 h`."""
    return duration_text(time.time() - parse_time(moment)) if moment else ''


def last_error_line(error):
    return (error or '').strip().rpartition('\n')[2]


def json_from(text):
    try:
        return json.loads(sys.stdin.read() if text == '-' else text)
    except ValueError as error:
        hint = 'a string needs its quotes: \'"text"\''
        raise argparse.ArgumentTypeError(f'is not JSON ({error}); {hint}') from None


def limit_from(text):
    with contextlib.suppress(ValueError):
        return None if text == 'none' else json.loads(text)
    raise argparse.ArgumentTypeError(f'must be a number or none, not {text!r}')


def seconds_from(text):
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < float('inf'):
            return float(text)
    raise argparse.ArgumentTypeError(f'must be a number of seconds, not {text!r}')


def command_call(client, options):
    """Call the client's method that is named like the command, and show its answer."""
    call = getattr(client, options.command)
    known = inspect.signature(call).parameters
    show(call(**{field: value for field, value in vars(options).items() if field in known}))


def command_jobs(client, options):
    """List jobs; on a terminal with their ages and the last lines of their errors."""
    filters = vars(options).keys() & inspect.signature(client.jobs).parameters.keys()
    answer = client.jobs(**{name: getattr(options, name) for name in filters})
    if sys.stdout.isatty():
        for job in answer['jobs']:
            job['age'] = age_text(job['created_at'])
    show(answer)


def command_queues(client, options):
    answer = client.queues()
    if not options.minutes:
        for row in answer['queues']:
            del row['minutes']
    if sys.stdout.isatty():
        for row in answer['queues']:
            add_texts(row)
    show(answer)


def add_texts(row):
    """Add the texts that a terminal shows to the row of a queue."""
    row['oldest'] = '' if row['oldest_age'] is None else duration_text(row['oldest_age'])
    row['queue'] += ' (paused)' if row['paused'] else ''


def command_top(client, options):
    """Show queues and workers: each second until Ctrl-C on a terminal, once on a pipe."""
    in_terminal = sys.stdout.isatty()
    interval = options.interval or (1 if in_terminal else None)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            page = client.queues()
            if in_terminal:
                print(CLEAR_SCREEN, end='')
            lines = shutil.get_terminal_size().lines if in_terminal else sys.maxsize
            show_top(page, lines - TOP_OTHER_LINES - len(page['workers']))
            sys.stdout.flush()
            if interval is None:
                return
            time.sleep(interval)


def show_top(page, room):
    """Print the totals, up to `room` queues (those with work first), and the workers."""
    now = parse_time(page['now'])
    rows = page['queues']
    total = {
        name: sum(row[name] for row in rows)
        for name in ('pending', 'scheduled', 'running', 'done', 'failed')
    }
    counts = '  '.join(f'{name} {count:,}' for name, count in total.items())
    print(f'{page["now"][:19]}Z  {counts}')
    hidden = len(rows) - max(room, MIN_TOP_ROWS)
    if hidden > 0:
        rows = sorted(rows, key=has_no_work)[:-hidden]
    for row in rows:
        row['done/min'] = per_minute(row['minutes']['done'], now)
        row['fail/min'] = per_minute(row['minutes']['failed'], now)
        row['workers'] = len(row['workers'])
        row['later'] = row['scheduled']
        add_texts(row)
    print_table(TOP_COLUMNS, rows)
    if hidden > 0:
        print(f'... and {hidden} more queues')
    for worker in page['workers']:
        worker['seen'] = duration_text(now - parse_time(worker['seen_at'])) + ' ago'
    if page['workers']:
        print()
        print_table(WORKER_COLUMNS, page['workers'])


def has_no_work(row):
    return row['pending'] == 0 and row['running'] == 0


def per_minute(counts, now):
    """How many in the last 60 seconds, from the counts of whole minutes."""
    part = now % 60 / 60        # of the current minute, which comes last
    return round(counts[-1] + counts[-2] * (1 - part))


def command_status(client, options):
    if options.wait is None:
        show(client.job(options.id))
        return False
    if sys.stdout.isatty():
        job = watch_progress(client, options.id, options.wait)
    else:
        job = client.wait(options.id, options.wait)
    show(job)
    return job['status'] != 'done'


def watch_progress(client, id, timeout):
    """The job once it has ended; meanwhile its progress is drawn."""
    waiting = Waiting(client, id, timeout, None)
    longest = 0
    try:
        while True:
            job = client.call(**waiting.next_call(longest))
            longest = 1     # seconds between two updates; the first one comes at once
            print(CLEAR_LINE + progress_text(job), end='', flush=True)
            if waiting.is_over(job):
                return job
    finally:
        print(CLEAR_LINE, end='', flush=True)


def progress_text(job):
    """The status of a job, with a bar and the time left if its progress tells them."""
    done = progress_share(job['progress'])
    if job['status'] != 'running' or done is None:
        return job['status']
    filled = round(done * BAR_WIDTH)
    bar = '#' * filled + '.' * (BAR_WIDTH - filled)
    text = f'[{bar}] {done:4.0%}'
    took = parse_time(job['updated_at']) - parse_time(job['started_at'])
    return f'{text}, {duration_text(took / done - took)} left' if done and took > 1 else text


def progress_share(progress):
    """The part that is done, from 0 to 1, if progress is a number or has `done` and `total`."""
    if isinstance(progress, dict):
        done, total = progress.get('done'), progress.get('total')
        if not is_number(done) or not is_number(total) or total <= 0:
            return None
        progress = done / total
    return progress if is_number(progress) and 0 <= progress <= 1 else None


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def command_purge(client, options):
    """Delete jobs. On a terminal it asks before it deletes those of all queues."""
    everywhere = options.id is None and options.queue is None
    has_filter = options.status or options.tag      # the engine refuses to purge without one
    if everywhere and has_filter and not options.yes and sys.stdin.isatty() and sys.stdout.isatty():
        tag = options.tag and repr(options.tag)
        words = ['Delete the', options.status, tag, 'jobs of all queues?']
        if not confirmed(' '.join(filter(None, words))):
            return True
    command_call(client, options)
    return False


def confirmed(question):
    try:
        return input(f'{question} [y/N] ').strip().lower() in ('y', 'yes')
    except EOFError:
        return False


def command_run(client, options):
    """Import a file or a module with handlers, and work on its queues."""
    if options.reload:
        reloader.start()
    try:
        import_target(options.tasks)
    except Exception:
        if not options.reload:
            raise
        traceback.print_exc()       # such as a syntax error that is being corrected
        reloader.wait_and_restart()
    default.run(burst=options.burst, grace=options.grace, concurrency=options.concurrency)
    reloader.restart_if_changed()


def import_target(target):
    if os.path.isfile(target):
        if not target.endswith('.py'):
            raise Misuse(f'{target} is not a Python file, whose name ends in .py')
        import_file(os.path.abspath(target))
    else:
        sys.path.insert(0, os.getcwd())
        is_name = re.fullmatch(r'\w+(\.\w+)*', target)
        if not is_name or not importlib.util.find_spec(target.partition('.')[0]):
            raise Misuse(f'there is neither a file nor a module {target}')
        importlib.import_module(target)


class Reloader:
    """Restarts the process when one of the project's modules changes."""

    def __init__(self):
        self.started_at = 0         # nanoseconds since 1970
        self.modified_at = {}       # by file; touched by the watching thread only
        self.has_changed = False    # written by the watching thread

    def start(self):
        self.started_at = time.time_ns()
        start_daemon_thread(self._watch, 'reload')

    def _watch(self):
        while not self.has_changed:
            self._check_files()
            if not self.has_changed:
                time.sleep(RELOAD_INTERVAL)
        while True:
            default.stop()
            time.sleep(RELOAD_INTERVAL)     # run() may not have begun

    def _check_files(self):
        for file in self._files():
            with contextlib.suppress(OSError):      # an editor may be replacing it
                modified_at = os.stat(file).st_mtime_ns
                known = self.modified_at.setdefault(file, modified_at)
                if known != modified_at or modified_at > self.started_at:
                    self.has_changed = True
                    note(logging.INFO, '%s has changed: the worker restarts', file)

    def _files(self):
        """The source files of modules that are neither Python's nor installed.

        These are all files in their folders, including one that cannot be imported.
        """
        files = [getattr(module, '__file__', None) for module in list(sys.modules.values())]
        folders = {os.path.dirname(file) for file in files if file and is_of_project(file)}
        folders.update(path for path in sys.path[:1] if is_of_project(path + os.sep))
        return [file for folder in folders for file in glob.glob(f'{glob.escape(folder)}/*.py')]

    def wait_and_restart(self):
        while not self.has_changed:
            time.sleep(RELOAD_INTERVAL)
        self.restart_if_changed()

    def restart_if_changed(self):
        if not self.has_changed:
            return
        arguments = getattr(sys, 'orig_argv', [sys.executable, *sys.argv])[1:]
        if os.name == 'nt':         # exec() on Windows starts a new process and ends this one
            os._exit(subprocess.call([sys.executable, *arguments]))
        os.execv(sys.executable, [sys.executable, *arguments])


reloader = Reloader()


def is_of_project(path):
    path = os.path.abspath(path)
    return not path.startswith((STDLIB, sys.prefix + os.sep, sys.base_prefix + os.sep)) \
        and 'site-packages' not in path


def import_file(file):
    """Import a file under the module name that other programs use for it."""
    folder, name = module_of_file(file)
    sys.path.insert(0, folder)
    if '.' in name:
        sys.path.append(os.path.dirname(file))      # modules beside it may be imported, too
        importlib.import_module(name)
    else:
        if not name.isidentifier() or name in sys.modules:
            name = 'tasks_' + re.sub(r'\W', '_', name)
        import_file_as(file, name)


def command_demo(client, options):
    """Hash each file under a folder as a job of an engine of its own, and compare the digests."""
    if not os.path.isdir(options.folder):
        raise Misuse(f'there is no folder {options.folder}')
    app = App()
    files = [path for path in pathlib.Path(options.folder).rglob('*') if path.is_file()]
    files = [str(path) for path in files if os.access(path, os.R_OK)]
    log.setLevel(logging.ERROR)

    @app.queue('demo', concurrency=4, max_retries=1)
    def digest(path):
        if job() and job()['attempt'] == 1 and hash(path) % 20 == 0:
            raise Retry('one in 20 fails once, for the show', delay=0)
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()

    with app.testing() as engine:
        began = time.monotonic()
        jobs = app.enqueue_many('demo', files)
        engine.run()
        took = time.monotonic() - began
        right = sum(job.refresh()['result'] == digest(job['payload']) for job in jobs)
    show({
        'files': len(jobs),
        'retries': sum(job['retries'] for job in jobs),
        'seconds': round(took, 2),
        'jobs a second': round(len(jobs) / took),
        'right digests': right,
    })
    return right != len(jobs)


def argument(*names, **settings):
    """The arguments of a call of argparse's add_argument()."""
    return names, settings


def seconds_argument(name, **settings):
    return argument(name, type=seconds_from, metavar='S', **settings)


def number_argument(name, **settings):
    return argument(name, type=int, metavar='N', **settings)


class Command(NamedTuple):
    name: str
    function: Callable          # called with a client and the options; True means exit code 1
    meaning: str
    arguments: list


PAYLOAD = argument(
    'payload', nargs='?', default='null', type=json_from, help='JSON; - reads it from stdin')
QUEUE_OPTION = argument('--queue')
STATUS_OPTION = argument('--status')
TAG_OPTION = argument('--tag')
OPTIONAL_ID = argument('id', nargs='?')
JOB_OPTIONS = [
    TAG_OPTION,
    argument('--group', help='its jobs run one at a time'),
    number_argument('--priority'),
    argument('--key'),
    seconds_argument('--timeout'),
    number_argument('--max-retries'),
]
WORKER_OPTIONS = [
    number_argument('--concurrency', help='jobs at a time, of each queue (as declared)'),
    seconds_argument('--grace', default=GRACE, help='for running jobs when it stops (30)'),
    argument('--burst', action='store_true', help='run the due jobs, and end'),
]
COMMANDS = [
    Command('enqueue', command_call, 'add a job', [
        argument('queue'),
        PAYLOAD,
        seconds_argument('--delay'),
        argument('--run-at'),
        argument('--id'),
        *JOB_OPTIONS,
        argument('--after', nargs='+', metavar='ID', help='jobs that have to be done first'),
        argument('--key-until', choices=['start', 'end'], help='when the key is free again'),
        argument(
            '--replace', action='store_true', default=None,
            help='take the place of the job that holds the key'),
        seconds_argument('--expires', help='cancel it if it has not started by then'),
    ]),
    Command('status', command_status, 'show a job', [
        argument('id'),
        seconds_argument(
            '--wait', nargs='?', const=float('inf'),
            help='wait for its end; exit with 1 unless it is done'),
    ]),
    Command('jobs', command_jobs, 'list jobs, newest first', [
        QUEUE_OPTION,
        STATUS_OPTION,
        TAG_OPTION,
        argument('--group'),
        argument('--search', metavar='TEXT', help='in payload, error, result, tag or id'),
        number_argument('--limit'),
        argument('--after', metavar='ID', help='the next page, of jobs older than this one'),
        argument('--needed-by', metavar='ID', help='the jobs that a job waits for'),
    ]),
    Command('queues', command_queues, 'count jobs by queue and status', [
        argument('--minutes', action='store_true', help='with counts of the last hour'),
    ]),
    Command('top', command_top, 'watch queues and workers; once on a pipe', [
        seconds_argument('--interval', help='seconds between refreshes (1; a pipe: no refresh)'),
    ]),
    Command('cancel', command_call, 'cancel a job, or all of a queue and status', [
        OPTIONAL_ID,
        QUEUE_OPTION,
        STATUS_OPTION,
        TAG_OPTION,
    ]),
    Command('retry', command_call, 'make a failed or cancelled job pending again, or all of them', [
        OPTIONAL_ID,
        QUEUE_OPTION,
        STATUS_OPTION,
        TAG_OPTION,
    ]),
    Command('reschedule', command_call, 'change the time or the priority of a pending job', [
        argument('id'),
        seconds_argument('--delay', help='from now; 0 runs it now'),
        argument('--run-at'),
        number_argument('--priority'),
    ]),
    Command('purge', command_purge, 'delete a job, or those of a queue and/or status', [
        OPTIONAL_ID,
        QUEUE_OPTION,
        STATUS_OPTION,
        TAG_OPTION,
        argument('--yes', action='store_true', help='do not ask before all queues are purged'),
    ]),
    Command('pause', command_call, 'hand out no jobs of a queue', [argument('queue')]),
    Command('resume', command_call, 'hand out jobs again', [argument('queue')]),
    Command('limit', command_call, 'limit a queue, over all workers; none removes a limit', [
        argument('queue'),
        argument('--max-running', type=limit_from, metavar='N', default=argparse.SUPPRESS),
        argument('--rate', type=limit_from, metavar='N', default=argparse.SUPPRESS),
        argument(
            '--per', type=limit_from, metavar='S', default=argparse.SUPPRESS,
            help='seconds for --rate claims (1)'),
    ]),
    Command('schedule', command_call, 'make a job at each tick', [
        argument('name'),
        argument('queue'),
        PAYLOAD,
        argument('--cron', metavar='"* * * * *"'),
        seconds_argument('--every'),
        argument('--zone'),
        *JOB_OPTIONS,
    ]),
    Command('unschedule', command_call, 'end a schedule', [argument('name')]),
    Command('schedules', command_call, 'list schedules by name', []),
    Command('run', command_run, 'import tasks, and work on them', [
        argument('tasks', metavar='FILE_OR_MODULE'),
        argument('--reload', action='store_true', help='restart when a module of yours changes'),
        *WORKER_OPTIONS,
    ]),
    Command('exec', command_exec, 'run a program for each job of a queue', [
        argument('queue'),
        argument('program', nargs='+', metavar='PROGRAM'),
        seconds_argument('--timeout'),
        argument('--text', action='store_true', help='pass a string payload without quotes'),
        *WORKER_OPTIONS,
    ]),
    Command('forward', command_forward, 'send the jobs in the outbox of a SQLite file', [
        argument('file'),
        seconds_argument(
            '--keep', default=0, help='keep sent jobs for so long, for a standby'),
    ]),
    Command('django', command_django, 'work on the tasks of a Django project', [
        argument('queues', nargs='*', metavar='QUEUE', help='all that the setting TASKS names'),
        argument('--reload', action='store_true', help='restart when a module of yours changes'),
        *WORKER_OPTIONS,
    ]),
    Command('demo', command_demo, 'hash files as jobs of an engine of its own', [
        argument('folder', metavar='DIR', nargs='?', default=os.path.dirname(encodings.__file__)),
    ]),
]


def build_parser():
    parser = argparse.ArgumentParser(
        prog='rundown_workers.py', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--version', action='version', version=f'rundown_workers {__version__}')
    parser.add_argument(
        '--host', metavar='URL', help=f'of the engine (RUNDOWN_URL, else {DEFAULT_URL})')
    parser.add_argument(
        '--give-up', type=seconds_from, default=10, metavar='S',
        help='seconds to try while no engine answers (10)')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name, help=command.meaning, description=command.meaning)
        subparser.set_defaults(function=command.function)
        for names, settings in command.arguments:
            subparser.add_argument(*names, **settings)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command of the command line; returns its exit code."""
    end_at_sigterm()
    if sys.stdout is None:      # closed by the caller
        sys.stdout = open(os.devnull, 'w')      # noqa: SIM115 - it stays open
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):       # it may be None, or something else
            stream.reconfigure(errors='backslashreplace')   # a terminal may know ASCII only
    options = build_parser().parse_args(argv)
    try:
        if options.host:
            os.environ['RUNDOWN_URL'] = options.host    # for imported tasks and isolated ones
        return int(options.function(Client(timeout=options.give_up), options) or 0)
    except (Error, BrokenPipeError, KeyboardInterrupt) as error:
        hint = '; RUNDOWN_TOKEN sets it' if getattr(error, 'status', 0) == 401 else ''
        print(f'rundown_workers: {str(error) or type(error).__name__}{hint}', file=sys.stderr)
        if isinstance(error, EngineUnavailable):
            return 3
        return 2 if isinstance(error, Misuse) else 1


def answer_to_other_names():
    """Register this module, run as a script, under the names by which task files import it."""
    names = ['rundown_workers', main_module_name(globals()), module_of_file(__file__)[1]]
    for name in filter(None, names):
        sys.modules.setdefault(name, sys.modules[__name__])


if __name__ in ('__main__', '__mp_main__'):
    answer_to_other_names()
if __name__ == '__main__':
    sys.exit(main())
