"""Rundown workers: functions as background jobs, and the client of a Rundown engine.

    import rundown_workers as rw

    @rw.queue(name="images", max_retries=5)
    def make_thumbnail(payload):
        ...

    if __name__ == "__main__":
        rw.enqueue("images", "path/to/image.jpg")       # or make_thumbnail.enqueue("path/to/image.jpg")
        rw.run()                                        # works until SIGTERM or SIGINT

One file, standard library alone: copy it and import it. The engine (rundown_engine.py) keeps the jobs; RUNDOWN_URL says
where it is (http://localhost:8181), RUNDOWN_TOKEN its token, RUNDOWN_CA the file of a private certificate. Where it
names several engines, separated by blanks, each client uses the first that answers, until that does not any more.

A JOB'S WAY THROUGH A WORKER
    poll --> claimed --> slot: handler --> outcome --> report
               |                 |                       |
               | 1 s not begun   | timeout: fail         | no answer: kept and sent again
               +--> release      | claim lost: dropped   | 404, 409: the claim is gone, dropped
Per queue there is one long poll and `concurrency` slots, each a thread. When jobs are short the worker claims ahead,
never more than its slots start within 100 ms at their recent pace. Outcomes pile into one request while another is in
flight. One heartbeat for all claims, every third of the lease, keeps long jobs alive.

PRODUCING
    enqueue(queue, payload, timeout, max_retries, tag, delay, run_at, priority, key, after, give_up) -> the job, a dict
                                with wait(timeout), result(timeout), refresh(); `after`: jobs or ids to be done first
    enqueue_many(queue, payloads, ...)      many in few requests; each request is all or nothing
    wait(job, timeout), results(jobs, timeout)      the finished job; what many returned, Failed when one did not
    schedule(name, queue, cron, every, zone, payload), unschedule(name)     a job at each tick
    Client(host, token, timeout, ca)        one method per call of the engine
An enqueue chooses its id, so it is sent again for `give_up` seconds (30) while no engine answers, and still makes one
job; then EngineUnavailable. What the engine refuses is Refused, at once. A run_at without a zone is local time.

WORKING
    @queue(name, host, poll_interval, max_retries, timeout, concurrency, isolate, backoff, retry_on, abort_on,
           cron, every, zone, max_running, rate)    the last five are sent to the engine by run()
    @task(queue="default", ...)             any number on a queue: add.delay(4, y=4), add.options(delay=60).delay(4);
                                            the payload is {"task": name, "args": [], "kwargs": {}}
    job(), inputs(), progress(value)        in a handler: the job; the results of those it waited for; JSON to be shown
    raise Retry(delay=60), Abort("why")     fail and come back in 60 s; fail for good
    @on("start" | "success" | "failure" | "lost")       hook(job, None | result | exception | exception)
    run(burst, grace, max_hung), stop()     burst: work off what is due, and return
    testing()                               with testing() as t: t.run(delayed=True); t.advance(60) moves its clock
A handler's return value is the result. Any exception fails the job with its traceback, what is not JSON for good. At
its timeout a handler gets Timeout raised inside, when its claim is gone Lost (in async def handlers both are a
cancellation); the slot is free again whatever the thread does. Threads that never come back are hung: after max_hung
(10) the worker drains and exits with 1. With isolate=True the handler runs in a process of its own, which is killed
with its children. It is imported there by its name, so a script needs `if __name__ == "__main__":` around its run().
SIGTERM or SIGINT: no more jobs are taken, what runs has `grace` seconds (30), the rest is released, exit with 0. The
second signal exits at once. The log is logging.getLogger("rundown"), on stderr where logging is not set up: a line for
each job, but where more than 100 a second are done the rest are counted.

ANY PROGRAM AS A WORKER
    python rundown_workers.py exec QUEUE [--concurrency N] [--timeout S] [--text] -- PROGRAM ARGS...
It runs once a job, in a process group of its own: the payload as JSON on its stdin (a string as it is with --text),
RUNDOWN_ID, RUNDOWN_QUEUE and RUNDOWN_ATTEMPT in its environment. Exit code 0: done, stdout (UTF-8, 1 MB) is the result,
JSON or else text. 65: failed for good. Any other: failed, with the end of stderr. At the timeout, when the claim is
lost and at the end of the grace its group gets SIGTERM, SIGKILL after 5 s. What it leaves in its group is killed.

PRODUCERS WITH A DATABASE OF THEIR OWN
    enqueue_in(connection, queue, payload, ...)    write a job into the open transaction of a DB-API connection
    forward(connect, keep), forwarding(...)        send what is committed, once; a context that does so in a thread
The job exists if and only if the transaction commits. It waits in the table rundown_outbox, which is made on first use
(in SQLite and PostgreSQL), until the engine has it. Jobs arrive in order, once, whoever is killed or away. One that the
engine refuses stays, with its `error`, and holds up no other; it is sent again when somebody sets that to NULL.

COMMAND LINE: JSON on a pipe, a table on a terminal; exits with 0, 1 refused or failed, 2 misused, 3 no engine
"""
# What is public is annotated, for those who check their own programs; the rest is not:
# mypy: ignore-errors

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import contextvars
import copy
import ctypes
import datetime
import difflib
import encodings
import functools
import hashlib
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import random
import re
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
from queue import Empty, SimpleQueue
from typing import Any, Callable, Generic, Iterable, Iterator, TypeVar, overload

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
    'enqueue',
    'enqueue_in',
    'enqueue_many',
    'forward',
    'forwarding',
    'inputs',
    'job',
    'on',
    'progress',
    'queue',
    'results',
    'run',
    'schedule',
    'stop',
    'task',
    'testing',
    'unschedule',
    'wait',
]

# -- Settings --------------------------------------------------------------------------------------
DEFAULT_URL = 'http://localhost:8181'   # of the engine if neither `host` nor RUNDOWN_URL names one

# the client
CLIENT_TIMEOUT = 30         # seconds that a call is tried again while no engine answers
RESPONSE_TIMEOUT = 10       # seconds until a request counts as unanswered, beyond its own wait
MIN_LAST_TRY = 1            # seconds that the last try of a call gets at least
RETRY_PAUSE = 0.1           # seconds before the second try; doubled from try to try
MAX_RETRY_PAUSE = 3         # seconds that this pause grows to
MAX_RETRY_AFTER = 60        # seconds of a Retry-After that are obeyed
MAX_BATCH = 1000            # jobs in a poll, a report or an enqueue
MAX_BATCH_BYTES = 1 << 20   # characters in a request with several jobs
MAX_DEPTH = 100             # levels of a value that are searched for the part that is not JSON

# the worker
LEASE = 30                  # seconds that the engine waits for a sign of life
LONG_POLL = 30              # seconds that a poll waits for a job
GRACE = 30                  # seconds that running handlers get when the worker stops
REPORT_GRACE = 2            # seconds, at least, that their outcomes get to be reported
RELEASE_WINDOW = 0.5        # seconds in which jobs that arrive during a stop are released
PREFETCH_SECONDS = 0.1      # seconds of work that are claimed ahead
MAX_PREFETCH_AGE = 1        # seconds that a claimed job waits for a slot before it is released
HUNG_AFTER = 1              # seconds after its interruption until a thread counts as hung
MAX_HUNG = 10               # hung threads that end the worker
WATCH_INTERVAL = 0.1        # seconds between two looks at the running jobs
MAX_LOG_LINES_PER_TICK = 10     # finished jobs of a queue that are logged one by one in that time
PROGRESS_INTERVAL = 0.5     # seconds between two reports of a job's progress
MAX_BACKLOG = 5000          # unreported outcomes above which no jobs are claimed
MAX_RESULT = 8_000_000      # characters of a result as JSON
MAX_ERROR = 16_000          # characters of a traceback; the middle is cut out
REFUSED_PAUSE = 10          # seconds until a refused worker (token, queue) asks again
PACE_WEIGHT = 0.25          # weight of the last job in the average time of a job

# programs and the outbox
MAX_STDOUT = 1 << 20        # bytes of a program's output
TERM_GRACE = 5              # seconds between SIGTERM and SIGKILL for a program
OUTBOX_BURST = 60           # seconds after a write in which the outbox is looked at often

log = logging.getLogger('rundown')


# -- Errors -----------------------------------------------------------------------------------------------------------
class Error(Exception):
    """Whatever this module raises."""
    status = retry_after = 0        # of what an engine answers: its HTTP status, the seconds that it asks for

class EngineUnavailable(Error): """No engine answers under the URL, or it cannot answer now."""
class Refused(Error): """The engine says no: `status` is the HTTP status, the text its sentence."""
class NotJSON(Error): """A value that JSON cannot hold."""
class Misuse(Error, TypeError): """What was asked for makes no sense, whatever the engine says."""
class Unfinished(Error, TimeoutError): """The job did not end in the time that wait() had."""
class Hung(Error): """Too many handlers never came back: the worker has ended, to be started afresh."""
class Crashed(Error): """An isolated handler failed; the text is its traceback or how its process ended."""
class Abort(Error): """Raised by a handler: fail the job, and do not try again."""
class Interruption(BaseException): """Raised inside a handler from outside; `except Exception` does not catch it."""
class Timeout(Interruption): """The handler has had its time; its job has failed."""
class Lost(Interruption): """The job is not this worker's any more: cancelled, given to another, or released."""

class Failed(Error):
    """The job whose result was asked for has failed or was cancelled: `job` is it, the text its error."""
    job: Job

class Retry(Error):
    """Raised by a handler: fail this attempt, and try again after `delay` seconds (None: the engine's backoff)."""
    def __init__(self, reason: str = 'the handler asked for a retry', delay: float | None = None) -> None:
        super().__init__(reason)
        if delay is not None and not 0 <= delay < float('inf'):
            raise ValueError(f'the delay of a retry must be a number of seconds, not {delay!r}')
        self.delay = delay

# -- Values -----------------------------------------------------------------------------------------------------------
UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')
encode_json = json.JSONEncoder(separators=(',', ':'), allow_nan=False).encode
quote = functools.partial(urllib.parse.quote, safe='', errors='surrogatepass')
rng = random.Random()        # not the module's, which a handler may seed
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=rng.seed)     # else two processes would choose the same ids

def as_json(value, name, level=0):
    """JSON text. NotJSON names what is in the way and where in the value it is."""
    try:
        return encode_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(value, (dict, list, tuple)) and level < MAX_DEPTH:
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                as_json(part, f'{name}[{truncate_middle(repr(key), 100)}]', level + 1)      # raises at what is in the way
        what = value if isinstance(value, float) else f'a {type(value).__name__}'
        raise NotJSON(f'{truncate_middle(name, 200)} is {what}, which JSON cannot hold: {error}') from None

def drop_none(**fields): return {field: value for field, value in fields.items() if value is not None}
def in_seconds(span): return span.total_seconds() if isinstance(span, datetime.timedelta) else span
def printable(text): return UNPRINTABLE.sub(lambda match: f'\\x{ord(match[0]):02x}', text)
def retry_pause(tries): return min(MAX_RETRY_PAUSE, RETRY_PAUSE * 2 ** min(tries, 10)) * rng.uniform(0.5, 1)

def truncate_middle(text, longest):
    half = longest // 2
    return text if len(text) <= longest else f'{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}'

def new_id():
    """A UUID of version 7 (RFC 9562): ordered by time, so that the engine's index grows at its end alone."""
    stamp, noise = time.time_ns() // 1000000, rng.getrandbits(74)
    return (f'{stamp >> 16:08x}-{stamp & 0xffff:04x}-7{noise >> 62:03x}-{0x8000 | noise >> 48 & 0x3fff:04x}-'
            f'{noise & 0xffffffffffff:012x}')

# -- HTTP -------------------------------------------------------------------------------------------------------------
# The head of an answer as the engine writes it, or nearly so: only its length bears on where the body ends.
PLAIN = re.compile(rb'HTTP/1\.1 (200|204) [A-Za-z ]+\r\nContent-Type: [^\r\n]+\r\nContent-Length: (\d+)\r\n'
                   rb'(?:(?:Cache-|Date:|Server:|X-)[^\r\n]+\r\n)*\r\n')

class Incoming(io.RawIOBase):
    """What a socket receives until a deadline, however slowly it trickles, after what has come already: a file."""
    def __init__(self, sock, deadline, data):
        self.sock, self.deadline, self.data = sock, deadline, data

    def readable(self): return True

    def readinto(self, buffer):
        if not self.data:
            self.sock.settimeout(remaining(self.deadline))
            self.data = self.sock.recv(len(buffer))
        count = min(len(self.data), len(buffer))
        buffer[:count], self.data = self.data[:count], self.data[count:]
        return count

def read_answer(sock, deadline):
    """An answer, read to its end. What matches PLAIN is cut up here: http.client takes ten times as long."""
    sock.settimeout(remaining(deadline))
    data = sock.recv(65536)
    plain = PLAIN.match(data)
    if plain and len(data) == plain.end() + int(plain[2]):
        return types.SimpleNamespace(status=int(plain[1]), content=data[plain.end():], will_close=False)
    file = io.BufferedReader(Incoming(sock, deadline, data))
    answer = http.client.HTTPResponse(types.SimpleNamespace(makefile=lambda mode: file))
    answer.begin()
    if answer.length is None and not answer.chunked and 'content-length' in answer.headers or answer.status < 200:
        raise http.client.HTTPException('its length is no number, or it is not the last')   # http.client lets both pass
    answer.content = answer.read()
    return answer

def remaining(deadline):
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise socket.timeout('timed out')
    return seconds

class ConnectionPool:
    """Connections that are kept open between requests. It knows of no proxy and no redirect."""
    def __init__(self, headers='', context=None):
        self.headers, self.context = headers, context       # constant: header lines of all requests; of TLS
        self.process, self.closed = os.getpid(), False      # whose the connections are; a fork must not share them
        self.idle, self.active = collections.deque(), set()     # safe by themselves; the one used last is reused first

    def exchange(self, url, data, seconds):
        """The answer within so many seconds: of a POST of the bytes, or of a GET where they are None."""
        deadline = time.monotonic() + seconds
        scheme, _, rest = url.partition('://')
        host, _, path = rest.partition('/')
        verb, data = ('GET', b'') if data is None else ('POST', data)
        head = f'{verb} /{path} HTTP/1.1\r\nHost: {host}\r\n{self.headers}Content-Length: {len(data)}\r\n\r\n'.encode()
        while True:
            connection = self._connection((scheme, host), deadline)
            try:
                return self._exchange(connection, head + data, deadline)
            except ConnectionError:         # closed while it was idle: that is no reason to give up
                if not connection.rested:
                    raise

    def _connection(self, place, deadline):
        """An idle one to that place, else a new one. Idle ones to elsewhere, or not to be used again, are closed."""
        if self.process != os.getpid():
            self.process, self.idle, self.active = os.getpid(), collections.deque(), set()
        try:
            while True:
                connection = self.idle.pop()
                if connection.place == place and connection.rested:
                    return connection
                connection.close()
        except IndexError:
            tls = {'context': self.context} if place[0] == 'https' else {}
        kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
        connection = kind(place[1], timeout=min(RESPONSE_TIMEOUT, remaining(deadline)), **tls)
        connection.place, connection.rested = place, False
        connection.connect()
        return connection

    def _exchange(self, connection, request, deadline):
        sock = connection.sock
        self.active.add(connection)
        try:
            if self.closed:
                raise ConnectionAbortedError('the connection was hung up')
            sock.settimeout(remaining(deadline))
            with contextlib.suppress(ConnectionError):      # a refusal that came before all was sent can still be read
                sock.sendall(request)
            answer = read_answer(sock, deadline)
        except BaseException:
            connection.close()
            raise
        finally:
            self.active.discard(connection)
        connection.rested = not answer.will_close
        self.idle.append(connection)
        return answer

    def shutdown(self, how=socket.SHUT_WR):
        """Send nothing more. With SHUT_WR an answer on its way still comes in; an engine gives no job after it."""
        self.closed = True
        for connection in self.active.copy():
            with contextlib.suppress(OSError, TypeError):       # its own thread has closed it: it has no socket then
                socket.socket.shutdown(connection.sock, how)    # not SSLSocket's, which forgets its keys
        with contextlib.suppress(IndexError):       # there is none, or its own thread was quicker
            while True:
                self.idle.pop().close()

class Client:
    """An engine's calls, one method each; every method takes the fields of its call, and returns the answer.
    `host` may name several engines, separated by blanks: each is used until it does not answer any more, then the next.
    `timeout` is how long a call is tried again (seconds) while none answers or it cannot answer now; then
    EngineUnavailable. Refused at once when the engine says no. Safe to use from many threads and after a fork."""
    def __init__(self, host: str | None = None, token: str | None = None, timeout: float = CLIENT_TIMEOUT, ca: str | None = None) -> None:
        self.hosts = [url.rstrip('/') for url in (host or os.environ.get('RUNDOWN_URL') or DEFAULT_URL).split()] or ['']
        self.timeout, self.used = timeout, self.hosts[:1]       # the latter is the engine in use; clones share it
        token, ca = token or os.environ.get('RUNDOWN_TOKEN'), ca or os.environ.get('RUNDOWN_CA')
        for url in self.hosts:
            if not re.fullmatch(r'https?://[^\s/?#@]+(/[!-~]*)?', url):
                raise Error(f'{url!r} is not the URL of an engine, such as {DEFAULT_URL}')
        if token and not re.fullmatch('[!-~]+', token):
            raise Error('the token must be of visible ASCII characters')
        headers = 'Content-Type: application/json\r\nAccept-Encoding: identity\r\n'
        headers += f'Authorization: Bearer {token}\r\n' if token else ''
        context = ssl.create_default_context(cafile=ca) if 'https:' in ' '.join(self.hosts) else None
        if context and ca:      # home-made certificates rarely pass what Python 3.13 asks for
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        self.pool = ConnectionPool(headers, context)

    @property
    def host(self): return self.used[0]

    def clone(self):
        """A client with connections of its own, which goes on to the next engine together with this one."""
        clone = copy.copy(self)
        clone.pool = ConnectionPool(self.pool.headers, self.pool.context)
        return clone

    def send(self, path: str, body: Any = None, seconds: float = CLIENT_TIMEOUT) -> Any:
        """One try: what is answered within so many seconds. `body` is JSON text or a dict; None makes it a GET."""
        data = None if body is None else (body if isinstance(body, str) else as_json(body, 'body')).encode()
        host = self.host
        try:
            answer = self.pool.exchange(host + path, data, seconds)
            if answer.status in (200, 204):
                return json.loads(answer.content.decode()) if answer.status == 200 else None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            reason = printable(str(getattr(error, 'strerror', None) or error) or type(error).__name__)
            if host == self.host:           # what one thread finds out holds for all, once
                self.used[0] = self.hosts[(self.hosts.index(host) + 1) % len(self.hosts)]
            raise EngineUnavailable(f'no engine answers at {host}: {reason}') from error
        raise refusal(answer)

    def call(self, path: str, body: Any = None, wait: float = 0, give_up: float | None = None) -> Any:
        """send(), tried again for `give_up` seconds (None: the client's timeout), and the `wait` that the engine takes.
        The last try gets a second at least, so an engine that is there but silent is noticed that much later."""
        give_up = self.timeout if give_up is None else give_up
        deadline = time.monotonic() + give_up + wait
        for tries in itertools.count():
            try:
                share = (deadline - time.monotonic()) / len(self.hosts)        # so that each of them has a chance
                return self.send(path, body, max(share, wait + MIN_LAST_TRY))
            except EngineUnavailable as error:
                rounds, rest = divmod(tries + 1, len(self.hosts))
                now, pause = time.monotonic(), 0 if rest else max(retry_pause(rounds - 1), error.retry_after)
                deadline = min(deadline, now + give_up)        # without the wait, once the first try is over
                if now + pause >= deadline:
                    raise EngineUnavailable(f'{" ".join(self.hosts)} was tried for {give_up:g} s: {error}') from None
            time.sleep(pause)

    def enqueue(self, queue: str, payload: Any = None, timeout: float | None = None, max_retries: int | None = None,
                tag: str | None = None, delay: float | datetime.timedelta | None = None, run_at: str | datetime.datetime | None = None, priority: int | None = None, key: str | None = None,
                id: str | None = None, give_up: float | None = None, after: Any = None, after_any: bool | None = None) -> Job:
        """Add a job, once however often it is sent; returns it, `created` False when its id or key was there before.
        It waits until the jobs `after` (or their ids) are done; one that is not cancels it, unless `after_any`."""
        text = encode_job(payload, id, run_at, delay, after, queue=queue, timeout=timeout, max_retries=max_retries,
                        tag=tag, priority=priority, key=key, after_any=after_any)
        return Job(self.call('/enqueue', text, give_up=give_up), self)

    def enqueue_many(self, queue: str, payloads: Iterable[Any], ids: Iterable[str] | None = None,
                     give_up: float | None = None, **options: Any) -> list[Job]:
        """Add a job per payload, in requests of up to 1,000, each all or nothing; returns the jobs in order.
        `ids` are theirs, one each; the options are those of enqueue() but for `id` and `key`, and hold for all."""
        if isinstance(payloads, (str, bytes, dict)):
            raise Misuse(f'payloads must be a list with one payload for each job, not a {type(payloads).__name__}')
        if 'id' in options or 'key' in options:
            raise Misuse('id and key are for one job, and these are many; ids takes a list')
        payloads = list(payloads)
        ids = sorted(new_id() for _ in payloads) if ids is None else list(ids)
        if len(ids) != len(payloads):
            raise Misuse(f'ids must be one for each payload: there are {len(ids)} and {len(payloads)}')
        texts = (encode_job(payload, queue=queue, id=id, **options) for payload, id in zip(payloads, ids))
        bodies = ('{"jobs":[' + ','.join(batch) + ']}' for batch in batches(texts, len))
        return [Job(job, self) for body in bodies for job in self.call('/enqueue', body, give_up=give_up)['jobs']]

    def _post(self, path, **fields): return self.call(path, drop_none(**fields), fields.get('wait') or 0)

    def poll(self, queue: str, limit: int | None = None, wait: float | None = None, worker: str | None = None, lease: float | None = None,
             max_retries: int | None = None, timeout: float | None = None, hung: int | None = None) -> Any:
        """Claim a job, or None; with `limit` a list of jobs, or None. `wait`, `lease` and `timeout` are in seconds."""
        return self._post('/poll', queue=queue, limit=limit, wait=wait, worker=worker, lease=lease,
                          max_retries=max_retries, timeout=timeout, hung=hung)

    def complete(self, id: str, attempt: int | None = None, result: Any = None) -> dict[str, Any]:
        return self._post('/complete', id=id, attempt=attempt, result=result)

    def fail(self, id: str, attempt: int | None = None, error: str | None = None, retry: bool | None = None,
             delay: float | None = None) -> dict[str, Any]:
        """Report a failure; with retry False for good, with `delay` (seconds) in place of the engine's backoff."""
        return self._post('/fail', id=id, attempt=attempt, error=error, retry=retry, delay=delay)

    def heartbeat(self, id: str, attempt: int | None = None, progress: Any = None) -> dict[str, Any]:
        return self._post('/heartbeat', id=id, attempt=attempt, progress=progress)

    def release(self, id: str, attempt: int | None = None) -> dict[str, Any]: return self._post('/release', id=id, attempt=attempt)
    def unschedule(self, name: str) -> dict[str, Any]: return self._post('/unschedule', name=name)
    def pause(self, queue: str) -> dict[str, Any]: return self._post('/pause', queue=queue)
    def resume(self, queue: str) -> dict[str, Any]: return self._post('/resume', queue=queue)

    def cancel(self, id: str | None = None, queue: str | None = None, status: str | None = None) -> dict[str, Any]:
        """Cancel a job, or all of a queue and status; {"count": n}."""
        return self._post('/cancel', id=id, queue=queue, status=status)

    def retry(self, id: str | None = None, queue: str | None = None, status: str | None = None) -> dict[str, Any]:
        """Make a failed or cancelled job pending, or all of a queue and status; {"count": n}."""
        return self._post('/retry', id=id, queue=queue, status=status)

    def purge(self, queue: str | None = None, status: str | None = None) -> dict[str, Any]:
        """Delete the jobs of a queue and/or status, but for those that run; {"count": n}."""
        return self._post('/purge', queue=queue, status=status)

    def limit(self, queue: str, max_running: Any = ..., rate: Any = ..., per: Any = ...) -> dict[str, Any]:
        """Limit how many jobs of a queue run at a time, and its claims: `rate` at once, one each per / rate seconds.
        None lifts a limit; what is not given stays as it is. Returns what holds then."""
        fields = {'queue': queue, 'max_running': max_running, 'rate': rate, 'per': per}
        return self.call('/limit', {name: value for name, value in fields.items() if value is not ...})

    def schedule(self, name: str, queue: str, cron: str | None = None, every: float | datetime.timedelta | None = None, zone: str | None = None,
                 payload: Any = None, timeout: float | None = None, max_retries: int | None = None, tag: str | None = None,
                 priority: int | None = None, key: str | None = None) -> dict[str, Any]:
        """Have a job made at each tick: of `cron`, five fields in a time zone (UTC), or `every` so many seconds.
        Sent again unchanged it changes nothing. With `key` there is no tick while the last one's job is not over."""
        return self._post('/schedule', name=name, queue=queue, cron=cron, every=in_seconds(every), zone=zone, tag=tag,
                          payload=payload, timeout=timeout, max_retries=max_retries, priority=priority, key=key)

    def _get(self, path, **fields):
        return self.call(f'{path}?{urllib.parse.urlencode(drop_none(**fields))}', wait=fields.get('wait') or 0)

    def schedules(self, limit: int | None = None, after: str | None = None) -> dict[str, Any]:
        return self._get('/schedules', limit=limit, after=after)

    def jobs(self, queue: str | None = None, status: str | None = None, tag: str | None = None, limit: int | None = None, after: str | None = None,
             needed_by: str | None = None) -> dict[str, Any]:
        """A page of jobs, newest first; the next one is `after` the id in its `after`, null on the last page.
        `needed_by` an id: what that job waits or waited for, in its order."""
        return self._get('/jobs', queue=queue, status=status, tag=tag, limit=limit, after=after, needed_by=needed_by)

    def queues(self, limit: int | None = None, after: str | None = None) -> dict[str, Any]:
        """Counts and limits of each queue, and the workers seen."""
        return self._get('/queues', limit=limit, after=after)

    def job(self, id: str, wait: float | None = None) -> dict[str, Any]:
        """The job; with `wait` as soon as it has ended, or as it is after so many seconds (at most 60)."""
        return self._get('/jobs/' + quote(id), wait=wait)

    def details(self, tag: str) -> dict[str, Any]:
        """The newest job with that tag."""
        return self._get('/details/' + quote(tag))

    def health(self) -> dict[str, Any]: return self._get('/health')

    def wait(self, job: Any, timeout: float | None = None, give_up: float | None = None) -> Job:
        """The job (given as it or as its id) once it has ended; Unfinished when it has not after `timeout` seconds.
        Where no engine answers it ends with EngineUnavailable, after `give_up` seconds or at the timeout."""
        id, deadline = job if isinstance(job, str) else job['id'], deadline_after(timeout)
        while True:
            left = max(0, deadline - time.monotonic())
            span, most = round(min(LONG_POLL, left), 3), min(self.timeout if give_up is None else give_up, left)
            job = self.call(f'/jobs/{quote(id)}?wait={span}', wait=span, give_up=most)
            if job['status'] in ('done', 'failed', 'cancelled'):
                return Job(job, self)
            if time.monotonic() >= deadline:
                raise Unfinished(f'job {id} is still {job["status"]} after {timeout:g} s')

    def shutdown(self, how):
        self.pool.shutdown(how)

    def close(self) -> None:
        """Close the connections, those in use too. Nothing can be sent after that."""
        self.shutdown(socket.SHUT_RDWR)

class Job(dict):
    """A job as the engine told of it, a dict that knows whom to ask for news."""
    def __init__(self, fields, client):
        super().__init__(fields)
        self.client = client

    def refresh(self) -> Job:
        """Bring it up to date, and return it."""
        self.update(self.client.job(self['id']))
        return self

    def wait(self, timeout: float | None = None, give_up: float | None = None) -> Job:
        """Bring it up to date once it has ended, and return it; see Client.wait."""
        self.update(self.client.wait(self, timeout, give_up))
        return self

    def result(self, timeout: float | None = None, give_up: float | None = None) -> Any:
        """What the handler returned, once it has; Failed with the job's error when it failed or was cancelled."""
        if self.wait(timeout, give_up)['status'] != 'done':
            error = Failed(self['error'] or f'the job was {self["status"]}')
            error.job = self
            raise error
        return self['result']

    def __reduce__(self): return dict, (dict(self),)        # in another process, and in a copy, it is a plain dict

def results(jobs: Iterable[Job], timeout: float | None = None, give_up: float | None = None) -> list[Any]:
    """The results of many jobs as enqueue returned them, in order: see Job.result. The timeout is that of all."""
    deadline = deadline_after(timeout)
    return [job.result(max(0, deadline - time.monotonic()), give_up) for job in jobs]

def refusal(answer):
    """The exception for an answer that is no success."""
    try:
        sentence = str(json.loads(answer.content)['error'])
    except (ValueError, TypeError, LookupError, RecursionError):
        where = f', which points to {answer.headers["location"]}' if 'location' in answer.headers else ''
        sentence = f'HTTP status {answer.status} {answer.reason}{where}'
    error = (Refused if is_permanent(answer.status) else EngineUnavailable)(printable(sentence))
    error.status, pause = answer.status, answer.headers.get('retry-after', '')
    error.retry_after = min(int(pause), MAX_RETRY_AFTER) if re.fullmatch('[0-9]{1,9}', pause) else 0
    return error

def deadline_after(timeout): return time.monotonic() + (float('inf') if timeout is None else timeout)
def is_permanent(status): return status < 500 and status != 429     # there is no use in sending it again

def is_claim(job):
    return (isinstance(job, dict) and isinstance(job.get('id'), str) and type(job.get('attempt')) is int
            and type(job.get('timeout')) in (int, float) and 'payload' in job)

def is_item_reply(item):
    return isinstance(item, dict) and type(item.get('code', 0)) is int and isinstance(item.get('error', ''), str)

def encode_job(payload, id=None, run_at=None, delay=None, after=None, **fields):
    """A job to be enqueued, as JSON. The id is chosen here, so that it can be sent again."""
    if isinstance(run_at, datetime.datetime):
        run_at = run_at.astimezone(datetime.timezone.utc).isoformat()
    if after is not None:
        after = [after] if isinstance(after, (str, dict)) else after
        after = [one['id'] if isinstance(one, dict) else one for one in after]
    id, delay = new_id() if id is None else id, in_seconds(delay)
    return as_json(drop_none(payload=payload, id=id, run_at=run_at, delay=delay, after=after, **fields), 'the job')

def batches(items, size):
    """Lists of the items, each short enough for a request."""
    batch, total = [], 0
    for item in items:
        total += size(item)
        if batch and (total > MAX_BATCH_BYTES or len(batch) == MAX_BATCH):
            yield batch
            batch, total = [], size(item)
        batch.append(item)
    if batch:
        yield batch

# -- Running a handler ------------------------------------------------------------------------------------------------
current = contextvars.ContextVar('rundown_task', default=None)      # what the handler of this context works at

def job() -> dict[str, Any]:
    """The job that the handler at hand works at, a dict; None outside of handlers."""
    return current.get() and current.get().job

def progress(value: Any) -> None:
    """Show any JSON value as the job's progress, within a second or so. Does nothing outside of handlers."""
    text = as_json(value, 'progress')
    if current.get():
        current.get().show(text)

def inputs() -> list[Any]:
    """The results of the jobs that the one at hand waited for, in the order of `after`; None where one is not done."""
    task = current.get()
    after = task.job.get('after') if task else None
    done = {job['id']: job['result'] for job in iter_jobs(task.client, needed_by=task.job['id'])} if after else {}
    return [done.get(id) for id in after or ()]

class Outcome:
    """How a run ended: the call that reports it, its fields, each as JSON text, and what hooks get to see."""
    def __init__(self, call, value=None, **fields):
        self.call, self.value, self.fields = call, value, fields

def failed(error, text=None, retry=True, delay=None):
    text = truncate_middle(text or trace(error), MAX_ERROR)
    return Outcome('fail', error, error=encode_json(text), retry=encode_json(retry), delay=encode_json(delay))

class Policy:
    """After which failures, and after how many seconds, a job is tried again."""
    def __init__(self, backoff=None, retry_on=None, abort_on=None):
        self.backoff, self.retry_on, self.abort_on = listed(backoff), listed(retry_on), listed(abort_on)
        for name, given in (('retry_on', self.retry_on), ('abort_on', self.abort_on)):
            if not all(isinstance(one, type) and issubclass(one, BaseException) for one in given):
                raise Misuse(f'{name} must be a class of exceptions or a tuple of them, not {given!r}')
        for step in itertools.filterfalse(callable, self.backoff):
            check('backoff', step, 0, NUMBER)

    def verdict(self, error, retries):
        """The fields `retry` and `delay` of the failure. retry_on is about what the handler raised by itself."""
        own = not isinstance(error, (Retry, Timeout, Crashed))
        if isinstance(error, (Abort, *self.abort_on)) or self.retry_on and own and not isinstance(error, self.retry_on):
            return {'retry': False}
        delay = error.delay if isinstance(error, Retry) else None
        try:
            if delay is None and self.backoff:
                step = self.backoff[min(retries, len(self.backoff) - 1)]
                delay = step(retries + 1) if callable(step) else step
                check('backoff', delay, 0, NUMBER)
            return {'delay': delay}
        except Exception as failure:
            note(logging.ERROR, 'backoff of retry %d failed: %s', retries + 1, summary(failure))
            return {}

def listed(given): return tuple(given) if isinstance(given, (tuple, list)) else () if given is None else (given,)

class Handler:
    """What works a queue's payloads: its one function, which has no name, or the task that the payload names."""
    def __init__(self, functions):
        self.functions = {name: as_handler(function) for name, function in functions.items()}

    def find(self, payload):
        """The function for the payload, and its arguments."""
        if None in self.functions:
            return self.functions[None], [payload], {}
        call = payload if isinstance(payload, dict) else {}
        name, args, kwargs = call.get('task'), call.get('args') or [], call.get('kwargs') or {}
        if not isinstance(name, str) or not isinstance(args, list) or not isinstance(kwargs, dict):
            raise Abort('the payload of a task must be {"task": "its name", "args": [...], "kwargs": {...}}')
        if name in self.functions:
            return self.functions[name], args, kwargs
        near = difflib.get_close_matches(name, self.functions) or sorted(self.functions)[:10]
        raise Abort(f'no worker here knows the task {name}; near it are {", ".join(near)}')

    def verdict(self, error, job):
        """What the policy says of a failure of the job, which the handler may have changed."""
        payload, retries = job.get('payload'), job.get('retries')
        name = payload.get('task') if None not in self.functions and isinstance(payload, dict) else None
        rule = getattr(self.functions.get(name if isinstance(name, str) else None), 'policy', Policy())
        return rule.verdict(error, retries if type(retries) is int else 0)

def perform(handler, job):
    """One run of a handler, as its outcome. It knows no network, and raises nothing, whatever the handler does."""
    process = os.getpid()
    try:
        function, args, kwargs = handler.find(job['payload'])
        result = function(*args, **kwargs)
    except BaseException as error:
        return failed(error, **handler.verdict(error, job))
    finally:
        if os.getpid() != process:
            os._exit(1)                 # a process that the handler forked, and that came back here
    try:
        text = as_json(result, 'result')
        if len(text) > MAX_RESULT:
            raise NotJSON(f'result has {len(text)} characters of JSON; at most {MAX_RESULT} are taken')
        return Outcome('complete', result, result=text)
    except BaseException as error:      # a result that is not JSON now will not be JSON the next time
        return failed(error, str(error) if isinstance(error, NotJSON) else None, retry=False)

def trace(error):
    """The traceback, from the handler on; of Retry and Abort what they say."""
    try:
        if isinstance(error, (Retry, Abort)) and not error.__cause__:
            return str(error) or type(error).__name__
        below = error.__traceback__ and error.__traceback__.tb_next
        return ''.join(traceback.format_exception(type(error), error, below))
    except BaseException:               # what an exception says of itself may fail in any way
        return f'{type(error).__name__}, of which there is no traceback'

def as_handler(function):
    """The function; an async one on an event loop of its own, that is closed with all it holds when it ends."""
    if not inspect.iscoroutinefunction(function):
        return function
    import asyncio      # here, since it takes megabytes that most workers have no use for

    async def main(*args, **kwargs):
        task, running = current.get(), asyncio.current_task()
        task.coroutine = running.get_coro()
        task.cancel = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, running.cancel)
        return await function(*args, **kwargs)
    return functools.wraps(function)(lambda *args, **kwargs: asyncio.run(main(*args, **kwargs)))

class Task:
    """A claimed job on its way through the worker. Who settles it first says how it ends; the rest is dropped."""
    def __init__(self, job, consumer, now):
        self.job = job                                  # the handler may change it: the rest does not rely on it
        self.consumer, self.client, self.claimed = consumer, consumer.link.client, now
        self.address = f'{{"id":{encode_json(job["id"])},"attempt":{job["attempt"]}'     # how an item of a batch begins
        self.timeout, self.lock = job['timeout'], threading.Lock()      # held to change the next three from None
        self.outcome = self.slot = self.begun = None    # how it ended (None: it has not); its slot; since when
        self.progress, self.shown = collections.deque(maxlen=1), now    # JSON text that is not sent; when it last was
        self.show = self.progress.append
        self.item = self.cancel = self.coroutine = None     # its report as JSON text; cancels an async handler; is it

    def begin(self, slot, now):
        """True when the slot may run it: it was neither released nor lost meanwhile."""
        with self.lock:
            if self.outcome is None:
                self.slot, self.begun = slot, now
            return self.outcome is None

    def settle(self, outcome, interruption=None, unless_begun=False):
        """True when this outcome counts. With an interruption the handler is stopped, if it runs."""
        with self.lock:
            if self.outcome is not None or unless_begun and self.slot:
                return False
            self.outcome = outcome
            if self.slot and interruption:
                self.slot.interrupt(self, interruption)     # the lock keeps the slot from going on with another task
            return True

    def __str__(self):
        claim = json.loads(self.address + '}')
        return f'{self.consumer.name} {claim["id"]} attempt {claim["attempt"]}'

class Slot:
    """A thread that runs the tasks of a queue, one after the other, until a handler does not come back in time."""
    ready = True            # for a task
    ending = abandoned = False      # after interrupt(): its program is waited for; its thread takes no more tasks

    def __init__(self, consumer):
        self.consumer = consumer
        self.thread = consumer.worker.thread(self._run, consumer.name)

    def _run(self):
        while not self.abandoned:
            self.prepare()
            task = self.consumer.inbox.get()
            if task is None:
                break
            if task.begin(self, time.monotonic()):
                current.set(task)
                self.consumer.hook('start', task, None)
                outcome = self.perform(task)
                if task.settle(outcome):
                    self.consumer.ended(task, outcome)
        self.close()

    def perform(self, task): return perform(self.consumer.handler, task.job)

    def interrupt(self, task, interruption):
        """Stop the handler, and do without this thread."""
        self.abandoned = True
        if task.cancel:
            with contextlib.suppress(RuntimeError):     # the loop is closed: it was about to end
                task.cancel()
        else:
            thread = ctypes.c_ulong(self.thread.ident)      # raises it in Python code, so not while it sleeps in C
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(interruption))
        self.consumer.replace(self)

    def where(self, task):
        """The stack at which the handler is, as text."""
        frame, frames, coroutine = sys._current_frames().get(self.thread.ident), [], task.coroutine
        if frame and not coroutine:
            frames = list(traceback.walk_stack(frame))[::-1]
        with contextlib.suppress(AttributeError):       # it waits for no coroutine, or has ended meanwhile
            while coroutine:
                frames.append((coroutine.cr_frame, coroutine.cr_frame.f_lineno))
                coroutine = coroutine.cr_await
        stack, ours = traceback.StackSummary.extract(frames[-50:]), (__file__, threading.__file__)
        return ''.join(traceback.format_list(itertools.dropwhile(lambda one: one.filename in ours, stack)))

    def close(self): """Nothing to do here, nor in prepare() and kill(): only subclasses start processes."""
    prepare = kill = close

# -- Handlers in processes of their own -------------------------------------------------------------------------------
CHILD = 'rundown-child-'            # how the names of the processes begin
STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGBREAK') if hasattr(signal, name)]
KILL = getattr(signal, 'SIGKILL', signal.SIGTERM)
spawning = threading.Lock()         # held to start or join a process: multiprocessing reaps any ended child in start()

class IsolatedSlot(Slot):
    """A slot whose handler runs in a process of its own, which waits for the next task as long as it lives."""
    process, ready = None, False

    def prepare(self):
        if self.process is None and not self.consumer.worker.stopping.is_set():
            self._start()

    def _start(self):
        context = multiprocessing.get_context('spawn')
        self.pipe, theirs = context.Pipe()
        functions = self.consumer.registered.functions.items()
        where = {name: (one.__module__, inspect.getfile(one), one.__qualname__) for name, one in functions}
        given = theirs, where, self.consumer.link.settings
        self.process = context.Process(target=child, args=given, name=CHILD + self.consumer.name)
        with spawning:
            self.process.start()
        theirs.close()
        atexit.register(self.kill)
        self._receive()             # that it is ready: the imports of the handler's module may take long
        self.ready = True

    def _receive(self):
        """The next word of the child; how it ended when there comes none."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.kill()             # its children; it is exiting itself by now, and keeps its exit code
        with spawning:
            self.process.join(1)
        code = self.process.exitcode
        return 'fail', "the handler's process " + ('closed its pipe' if code is None else ending(code))

    def perform(self, task):
        for _ in range(2):          # the first process may be gone before it begins: killed while it had nothing to do
            if self.process is None:
                self._start()
            if task.outcome:        # it was settled meanwhile, when there was nobody to kill
                return task.outcome
            with contextlib.suppress(OSError):
                self.pipe.send(task.job)
            kind, text = self._receive()
            if kind == 'begun' or task.outcome:
                break
            self.close()
        while kind in ('begun', 'progress'):
            if kind == 'progress':
                task.show(text)
            kind, text = self._receive()
        if kind == 'outcome':
            call, fields, error = text
            return Outcome(call, Crashed(error) if error else json.loads(fields['result']), **fields)
        self.close()
        return failed(Crashed(text), text, **self.consumer.handler.verdict(Crashed(text), task.job))

    def interrupt(self, task, interruption):
        self.kill()                 # the thread hears of it at once, and goes on with a fresh process

    def where(self, task): return 'its process was killed\n'

    def kill(self):
        """End the process, and the processes that it started."""
        process = self.process
        signal_group(process, KILL)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            process.kill()          # it may not lead its group yet

    def close(self):
        if self.process is not None:
            self.kill()
            atexit.unregister(self.kill)
            self.pipe.close()
            with spawning:
                self.process.join(1)
            self.process, self.ready = None, False

def signal_group(process, number):
    """Send it to a process and what it started, which Windows simply ends. True when there was somebody."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):       # not started, or over
        if os.name == 'nt':
            subprocess.run(['taskkill', '/T', '/F', '/PID', str(process.pid)], capture_output=True)
        else:
            os.killpg(process.pid, number)
            return True

def ending(code):
    name = next((one.name for one in signal.Signals if one == -code), None)
    return f'was killed by {name}' if name else f'ended with exit code {code}'

def child(pipe, where, settings):
    """The process of an isolated slot: works what comes through the pipe. It and its children end with the worker."""
    if hasattr(os, 'setsid'):
        os.setsid()                                     # to be killed with its children
        os.set_inheritable(pipe.fileno(), False)        # its death would go unnoticed while a child of it has the pipe
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)          # the worker decides; not SIG_IGN, which children would inherit
    jobs, lock, fault = SimpleQueue(), threading.Lock(), None

    def say(kind, text=None):
        with lock:
            pipe.send((kind, text))
    try:
        handler, client = Handler({name: locate(*place) for name, place in where.items()}), Client(*settings)
    except BaseException as error:
        fault = truncate_middle(trace(error), MAX_ERROR)
    say('ready')
    threading.Thread(target=listen, args=(pipe, jobs), daemon=True).start()
    while True:
        job = jobs.get()
        say('begun')
        if fault:
            return say('fail', fault)
        current.set(types.SimpleNamespace(job=job, client=client, show=functools.partial(say, 'progress')))
        outcome = perform(handler, job)
        say('outcome', (outcome.call, outcome.fields, trace(outcome.value) if outcome.call == 'fail' else None))

def listen(pipe, jobs):
    with contextlib.suppress(EOFError, OSError):
        while True:
            jobs.put(pipe.recv())
    signal_group(multiprocessing.current_process(), KILL)
    os._exit(1)

def locate(module, file, name):
    """The function of that name in a module, which is imported by its name or else from its file."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        found = load(file, module)
    return functools.reduce(getattr, name.split('.'), found)

def load(file, name):
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

# -- Worker -----------------------------------------------------------------------------------------------------------
RELEASED, LOST = Outcome('release'), Outcome(None)      # of the latter nothing is reported
REFUSALS, GONE = (400, 413), (404, 409)     # statuses that blame what was sent, and that blame the claim

def note(level, text, *values):
    """A line in the log, whatever is in the values, and whatever a handler did to the log's streams."""
    with contextlib.suppress(Exception):
        if log.isEnabledFor(level):
            log.log(level, '%s', printable(text % values))

def until(condition, deadline):
    """Wait for the condition. Signals are handled meanwhile."""
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)

class Consumer:
    """A queue at work: a thread that fetches its jobs, and the slots that run them."""
    def __init__(self, worker, link, registered, concurrency):
        self.worker, self.link, self.registered, self.concurrency = worker, link, registered, concurrency   # constant
        self.name, self.handler = registered.name, Handler(registered.functions)
        self.client = link.client.clone()    # of its own, to be hung up
        self.told = list(registered.told)   # only the fetcher writes it and the next two: calls to make before polling
        self.enough, self.dry = 0, None     # open tasks above which it sleeps; worker.reported when there was nothing
        self.inbox, self.open = SimpleQueue(), {}   # safe by themselves: tasks for the slots; claimed and not settled
        self.pace, self.lines = None, 0     # seconds a task keeps a slot; jobs done in this tick. Races are harmless
        self.slots, self.thread, self.hungry = [], None, threading.Event()      # the last: there may be room for more

    def start(self):
        handler = self.registered.functions.get(None)
        kind = getattr(handler, 'rundown_slot', IsolatedSlot if self.registered.isolate else Slot)
        self.slots = [kind(self) for _ in range(self.concurrency)]
        self.thread = self.worker.thread(self._fetch, f'fetch-{self.name}')

    def _fetch(self):
        """Poll, hand to the slots, rest; until the worker stops."""
        while not self.worker.stopping.is_set():
            self.hungry.clear()
            limit, reported, began = self._room(), self.worker.reported, time.monotonic()
            if not limit:
                self.hungry.wait(WATCH_INTERVAL)
                continue
            try:
                jobs = self._poll(limit)
            except Error as error:
                if isinstance(error, Refused) and (self.worker.burst or error.status == 400):
                    raise               # asking again does not mend it: that ends the worker
                if not self.worker.stopping.is_set():
                    self.worker.stopping.wait(self.link.away(error))
                continue
            for task in [Task(job, self, time.monotonic()) for job in jobs]:
                self.link.tasks[task] = self.open[task] = None
                if not self.worker.stopping.is_set():
                    self.inbox.put(task)
            if self.worker.stopping.is_set():
                self.worker.release()   # these jobs may have come after _drain() released the others
            time.sleep(0)               # lets the slots begin, before the next poll is put together
            self.link.back()
            if not jobs and self.worker.burst:      # there may be some once another task is over, and only then
                self.dry = reported
                until(lambda: self.worker.reported is not self.dry or self.worker.stopping.is_set(), float('inf'))
            elif not jobs and time.monotonic() - began < min(1, LONG_POLL / 2):      # from an engine that does not wait
                self.worker.stopping.wait(self.registered.poll_interval)

    def _room(self):
        """How many jobs to claim now: 0, or up to one open task per slot plus what slots start within AHEAD seconds."""
        if self.link.stuck or self.link.pile.qsize() > MAX_BACKLOG:
            return 0
        slots = sum(slot.ready for slot in self.slots)
        ahead = min(MAX_BATCH, int(slots * PREFETCH_SECONDS / max(self.pace, 1e-5))) if self.pace is not None else 0
        target, held = slots + ahead, len(self.open)
        self.enough = max(slots - 1, target // 2)
        return min(target - held, MAX_BATCH) if held <= self.enough else 0

    def _poll(self, limit):
        while self.told:
            self.client.send(*self.told[0], RESPONSE_TIMEOUT)
            self.told.pop(0)
        registered, worker = self.registered, self.worker
        wait = 0 if worker.burst or self.link.since else LONG_POLL       # an engine that was away has to show it is back
        ask = {'queue': self.name, 'limit': limit, 'lease': LEASE, 'worker': worker.name, 'wait': wait,
               'hung': worker.hung(), 'max_retries': registered.max_retries, 'timeout': registered.timeout}
        jobs = self.client.send('/poll', ask, wait + RESPONSE_TIMEOUT) or []
        if not isinstance(jobs, list) or not all(map(is_claim, jobs)):
            raise EngineUnavailable(f'what answers at {self.client.host} is no engine')
        return jobs

    def ended(self, task, outcome):
        """A slot has run the task to its end. It goes on after the hooks; the report does not wait for them."""
        took, done = time.monotonic() - task.begun, outcome.call == 'complete'
        self.report(task, outcome)
        self.lines += done
        if not done:
            note(logging.WARNING, '%s failed after %.3f s: %s', task, took, summary(outcome.value))
        elif self.lines <= MAX_LOG_LINES_PER_TICK:
            note(logging.INFO, '%s done in %.3f s', task, took)
        self.hook('success' if done else 'failure', task, outcome.value)
        outcome.value, took = None, time.monotonic() - task.begun
        self.pace = took if self.pace is None else self.pace + PACE_WEIGHT * (took - self.pace)
        self._dismiss(task)

    def settle(self, task, outcome, interruption=None):
        """End a task from outside of its slot; without an interruption only one that has not begun. True if it did."""
        if not task.settle(outcome, interruption, unless_begun=not interruption):
            return False
        self.report(task, outcome)
        self._dismiss(task)
        return True

    def report(self, task, outcome):
        task.outcome = outcome
        if outcome.call:
            fields = ''.join([f',"{field}":{text}' for field, text in outcome.fields.items()])
            task.item = f'{task.address}{fields}}}'
            self.link.pile.put(task)
        else:
            self.link.forget(task)

    def _dismiss(self, task):
        self.open.pop(task, None)
        if len(self.open) <= self.enough:
            self.hungry.set()

    def watch(self, now):
        """Look for what waits too long for a slot, has had its time, or has progress to show."""
        for task in self.open.copy():
            if task.begun is None:
                if now - task.claimed > MAX_PREFETCH_AGE and self.settle(task, RELEASED):
                    self.pace = None        # it was wrong
            elif now - task.begun > task.timeout and task.outcome is None:
                text = f'timed out after {task.timeout:g} s'
                error = Timeout(f'{text}\n{task.slot.where(task)}')
                if self.settle(task, failed(error, str(error), **self.handler.verdict(error, task.job)), Timeout):
                    self.tell('failure', task, error, '%s; hung threads: %d', text, self.worker.hung())
            elif task.progress and now - task.shown > PROGRESS_INTERVAL:
                task.shown = now
                self.link.pile.put(task)
        rest, self.lines = self.lines - MAX_LOG_LINES_PER_TICK, 0
        if rest > 0:        # a line for each would take longer than they do
            note(logging.INFO, '%s: %d more done', self.name, rest)

    def replace(self, slot):
        """Go on with a fresh thread. The lock of the slot's task is held, so no other does it too."""
        self.worker.threads[slot.thread] = time.monotonic()
        self.slots[self.slots.index(slot)] = type(slot)(self)

    def hook(self, event, task, value):
        for function in self.worker.app.hooks[event]:
            try:
                function(task.job, value)
            except Interruption:
                raise
            except BaseException as error:
                note(logging.ERROR, '%s: the hook %r failed: %s', task, event, summary(error))

    def tell(self, event, task, error, text, *values):
        """Log what befell a task, and call the hooks in a thread of their own, if it has begun."""
        note(logging.WARNING, '%s ' + text, task, *values)
        if self.worker.app.hooks[event] and task.begun is not None:
            threading.Thread(target=self.hook, args=(event, task, error), daemon=True).start()

def summary(error):
    """The last line of an exception's traceback; of an exception group the line that names the group."""
    text = trace(error)
    group = re.search(r'^  \| (\S.*)', text, re.M) if text.rstrip().endswith('-----') else None
    return truncate_middle(group[1] if group else (text.strip().splitlines() or [''])[-1], 300)

class Link:
    """What the consumers of one engine share: tasks under way, reporter, heartbeat, and whether the engine is there."""
    def __init__(self, worker, host):
        self.worker, self.settings = worker, (host, worker.app.token, CLIENT_TIMEOUT, worker.app.ca)       # constant
        self.client = Client(*self.settings)
        self.tasks, self.pile = {}, SimpleQueue()       # safe: those not acknowledged; to be reported, None: no more
        self.stuck, self.since = False, None        # outcomes were not taken at the last try; when the engine went away

    def away(self, error):
        """Say once that the engine is away, end a burst after TIMEOUT, and return the seconds until the next try."""
        now, since = time.monotonic(), self.since
        if since is None:
            self.since = since = now
            note(logging.WARNING, 'engine away, trying again until it is back: %s', error)
        if self.worker.burst and now - since >= CLIENT_TIMEOUT:
            self.worker.stop(error)
        pause = min(MAX_RETRY_PAUSE, max(RETRY_PAUSE, now - since)) * rng.uniform(0.5, 1)       # as long as it is away
        return max(pause, REFUSED_PAUSE if isinstance(error, Refused) else error.retry_after)

    def back(self):
        since, self.since = self.since, None
        if since is not None:
            note(logging.INFO, 'engine back at %s after %.1f s', self.client.host, time.monotonic() - since)

    def forget(self, task):
        """The task is over, and the engine knows or does not care."""
        self.worker.reported = object()     # first: who sees the task gone sees this too
        self.tasks.pop(task, None)

    def report(self):
        """Send what piles up while the last request is in flight."""
        tasks = []
        while None not in tasks:
            tasks = [self.pile.get()]
            with contextlib.suppress(Empty):
                while len(tasks) < MAX_BATCH:
                    tasks.append(self.pile.get_nowait())
            requests = {'heartbeat': [], 'complete': [], 'fail': [], 'release': []}
            for task in [task for task in dict.fromkeys(tasks) if task in self.tasks]:
                if task.progress:
                    requests['heartbeat'].append((task, f'{task.address},"progress":{task.progress.pop()}}}'))
                if task.item:
                    requests[task.outcome.call].append((task, task.item))
            for call, items in requests.items():
                for batch in batches(items, lambda item: len(item[1])):
                    self._send(call, batch, CLIENT_TIMEOUT)

    def _send(self, call, items, seconds):
        """Send pairs of a task and its text until the engine answers; what it refuses as a whole is sent one by one."""
        while not self.worker.closed.is_set():
            try:
                answer = self.client.send('/' + call, f'{{"jobs":[{",".join([text for _, text in items])}]}}', seconds)
                answers = answer.get('jobs') if isinstance(answer, dict) else None
                if not isinstance(answers, list) or len(answers) != len(items) or not all(map(is_item_reply, answers)):
                    raise EngineUnavailable(f'what answers at {self.client.host} is no engine')
            except Error as error:
                if error.status not in REFUSALS:
                    self.stuck = self.stuck or call != 'heartbeat'
                    self.worker.closed.wait(self.away(error))
                    continue
                answers = [{'code': error.status, 'error': str(error)}]
            self.stuck = False
            self.back()
            for (task, _), answer in zip(items, answers) if len(answers) == len(items) else ():
                self._answered(call, task, answer)
            for item in items if len(answers) < len(items) else ():
                self._send(call, [item], seconds)       # which of them was it?
            return

    def _answered(self, call, task, answer):
        code, sentence, beat = answer.get('code'), answer.get('error'), call == 'heartbeat'
        if code and not is_permanent(code):
            return self.pile.put(task)
        if code in GONE:
            if not beat or task.consumer.settle(task, LOST, Lost):
                when = '' if beat else f' before its outcome ({call}) was known'
                task.consumer.tell('lost', task, Lost(sentence), 'lost%s: %s', when, sentence)
        elif code:
            note(logging.ERROR, '%s: the engine refused its %s: %s', task, call, sentence)
            if call == 'complete':      # what the handler gave is not taken: that fails the job, once
                text = f'the engine refused the result: {sentence}'
                return task.consumer.report(task, failed(Error(sentence), text, retry=False))
        if not beat:
            self.forget(task)           # one that was refused is ended by its lease

    def heartbeat(self):
        """One sign of life for all tasks, also for those whose outcome is waiting."""
        while not self.worker.closed.wait(LEASE / 3):
            for batch in batches([(task, task.address + '}') for task in self.tasks.copy()], lambda item: 100):
                self._send('heartbeat', batch, LEASE / 3)

class Worker:
    """One run(): the consumers of all registered queues, what they share, and their orderly end."""
    def __init__(self, app, burst, grace, max_hung, concurrency):
        self.app, self.burst, self.grace, self.max_hung = app, burst, grace, max_hung       # constant
        self.name, self.signalled = f'{printable(socket.gethostname())[:150]}:{os.getpid()}', False
        self.events = SimpleQueue()         # safe by themselves, in signal handlers too: None or an exception
        self.stopping, self.closed = threading.Event(), threading.Event()       # no more jobs; no more reports
        self.threads = {}                   # those that are not over, and when each was interrupted: inf, it was not
        self.links, self.consumers, self.reported = {}, [], object()        # the last: a new object when a task is over
        for registered in app.registered.values():
            host, slots = ' '.join(app.client(registered.host).hosts), concurrency or registered.concurrency
            link = self.links[host] = self.links.get(host) or Link(self, host)
            self.consumers.append(Consumer(self, link, registered, slots))
            note(logging.INFO, 'working on %s (concurrency %d) from %s as %s', registered.name, slots, host, self.name)

    def thread(self, loop, name):
        """Start a thread of the worker's own. A fault in it ends the worker: better started afresh than half alive."""
        def guarded():
            try:
                with contextlib.suppress(Interruption):     # too late for the handler; the thread is abandoned anyway
                    loop()
            except BaseException as error:
                told = summary(error) if isinstance(error, Refused) else trace(error)
                note(logging.CRITICAL, 'the thread %s failed: %s', name, told)
                self.stop(error)
            self.threads.pop(thread, None)
        thread = threading.Thread(target=guarded, name=f'rundown-{name}', daemon=True)
        self.threads[thread] = float('inf')
        thread.start()
        return thread

    def stop(self, error=None):
        self.events.put(error)

    def busy(self): return sum(len(link.tasks) for link in self.links.values())
    def slots(self): return [slot for consumer in self.consumers for slot in consumer.slots]

    def hung(self, seconds=HUNG_AFTER):
        """How many threads did not come back within so many seconds of their interruption."""
        return sum(at <= time.monotonic() - seconds and thread.is_alive() for thread, at in self.threads.copy().items())

    def _watch(self):
        closed = False
        while not closed:
            closed, now = self.closed.wait(WATCH_INTERVAL), time.monotonic()
            for consumer in self.consumers:
                consumer.watch(now)
            if self.hung() >= self.max_hung:
                self.stop(Hung(f'{self.hung()} handlers hang: the worker ends, to be started afresh'))

    def run(self):
        """Work until told to stop, then end in good order. Raises what it was stopped by."""
        ours = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()    # others may set none
        before = {number: signal.signal(number, self._signalled) for number in ours}
        try:
            for link in self.links.values():
                self.thread(link.report, 'report')
                self.thread(link.heartbeat, 'heartbeat')
            for consumer in self.consumers:
                consumer.start()
            self.thread(self._watch, 'watch')
            error = self._wait()
            self._drain()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
        if error is not None:
            raise error

    def _wait(self):
        """The exception to stop for; None: told to stop, or a burst whose queues were empty since the last report."""
        while not self.burst or self.busy() or any(consumer.dry is not self.reported for consumer in self.consumers):
            with contextlib.suppress(Empty):
                return self.events.get(timeout=0.005 if self.burst else 1)      # on Windows signals come between two

    def _signalled(self, number, frame):
        if self.signalled:
            for slot in self.slots():
                slot.kill()
            os._exit(128 + number)
        self.signalled = True
        self.stop()

    def _drain(self):
        """Let what runs come to its end, within the grace, and be reported; release the rest; end the threads."""
        ends = time.monotonic() + self.grace
        self.stopping.set()
        self.release()
        for how in socket.SHUT_WR, socket.SHUT_RDWR:        # between the two, jobs on their way come in, for release
            for consumer in self.consumers:
                consumer.client.shutdown(how)
            until(lambda: not any(one.thread.is_alive() for one in self.consumers), time.monotonic() + RELEASE_WINDOW)
        until(lambda: not any(consumer.open for consumer in self.consumers), ends)
        self.release(Lost)
        until(lambda: not self.busy(), max(ends, time.monotonic() + REPORT_GRACE))
        if self.busy():
            note(logging.ERROR, 'outcomes of %d jobs were not reported; they will be handed out again', self.busy())
        self.closed.set()
        for slot in self.slots():
            slot.consumer.inbox.put(None)
        for link in self.links.values():
            link.pile.put(None)
        for one in (*self.links.values(), *self.consumers):
            one.client.close()
        until(lambda: not any(slot.ending for slot in self.slots()), time.monotonic() + TERM_GRACE + 1)
        for slot in self.slots():
            slot.kill()
        until(lambda: float('inf') not in self.threads.copy().values(), time.monotonic() + REPORT_GRACE)

    def release(self, interruption=None):
        for consumer in self.consumers:
            for task in consumer.open.copy():
                if consumer.settle(task, RELEASED, interruption):
                    note(logging.INFO, '%s released', task)

# -- The module's API: one column over a default App ------------------------------------------------------------------
QueueConfig = collections.namedtuple(
    'Registered', 'name host poll_interval max_retries timeout concurrency isolate functions told')
TASK_SETTINGS = {'host', 'poll_interval', 'concurrency', 'isolate', 'max_running', 'rate'}     # of its queue
NUMBER = int, float
LEAST = dict(poll_interval=0.0, timeout=0.0, every=1.0, per=0.0, max_retries=0, concurrency=1, max_running=1, rate=1)
R = TypeVar('R')
F = TypeVar('F')

class QueueFunction(Generic[R]):        # what @queue makes of a function, for those who check types
    __call__: Callable[..., R]
    enqueue: Callable[..., Job]

class TaskFunction(Generic[R]):         # the same of @task
    __call__: Callable[..., R]
    delay: Callable[..., Job]
    options: Callable[..., TaskFunction[R]]

class App:
    """Queues and their handlers, hooks, and an engine: what the functions of this module are about, for one's own use.
    Where `host`, `token` or `ca` are None, RUNDOWN_URL, RUNDOWN_TOKEN and RUNDOWN_CA count at the time of each call."""
    def __init__(self, host: str | None = None, token: str | None = None, timeout: float = CLIENT_TIMEOUT, ca: str | None = None) -> None:
        self.host, self.token, self.timeout, self.ca = host, token, timeout, ca
        self.registered = {}                            # (queue, host) -> Registered
        self.hooks = {'start': [], 'success': [], 'failure': [], 'lost': []}
        self.clients = {}                               # safe by itself: (host, token, timeout, ca) -> Client
        self.workers = []                               # safe by itself: those that run

    def client(self, host: str | None = None) -> Client:
        """The client for an engine; its connections are kept."""
        host, token = host or self.host or os.environ.get('RUNDOWN_URL'), self.token or os.environ.get('RUNDOWN_TOKEN')
        settings = host, token, self.timeout, self.ca or os.environ.get('RUNDOWN_CA')
        if settings not in self.clients:
            self.clients[settings] = Client(*settings)
        return self.clients[settings]

    def queue(self, name: str, host: str | None = None, poll_interval: float = 1.0, max_retries: int = 3,
              timeout: float | None = None, concurrency: int = 1, isolate: bool = False, backoff: Any = None,
              retry_on: Any = None, abort_on: Any = None, cron: str | None = None, every: float | datetime.timedelta | None = None, zone: str | None = None,
              max_running: Any = None, rate: Any = None) -> Callable[[Callable[..., R]], QueueFunction[R]]:
        """Make the decorated function a queue's handler. It stays as it is, and gets `.enqueue(payload, **options)`.
        `max_retries` and `timeout` (seconds) hold for jobs that were enqueued without their own. `concurrency` handlers
        run at a time; with `isolate` each in a process of its own. `backoff` is the seconds until each retry, the last
        for all that follow, or a function of the retry's number; after exceptions that are not in `retry_on`, where it
        is given, or are in `abort_on`, there is none. `poll_interval` (seconds) is for engines that do not wait in a
        poll. run() tells the engine of a schedule under the queue's name (`cron` in a `zone`, or `every` so many
        seconds), and of limits over all workers: `max_running` jobs at a time, and a `rate` of (claims, seconds)."""
        if not isinstance(name, str) or not name:
            raise Misuse(f'queue needs the name of a queue, @queue("name"), not {name!r}')
        told, rule = engine_settings(name, max_running, rate, cron, every, zone), Policy(backoff, retry_on, abort_on)
        registered = QueueConfig(name, host, poll_interval, max_retries, timeout, concurrency, isolate, {}, told)
        check_all(poll_interval=poll_interval, concurrency=concurrency,
                  **drop_none(max_retries=max_retries, timeout=timeout))

        def enqueue(payload=None, *more, **options):
            """Add a job to the queue, with the options of rw.enqueue; returns it."""
            if more:
                raise Misuse(f'{name} takes one payload, and options by name; @rw.task has any number of arguments')
            return self.enqueue(name, payload, **{'host': host, **options})
        enqueue.__signature__ = inspect.Signature([*inspect.signature(self.enqueue).parameters.values()][1:])

        def register(function):
            check_call(function, None)
            self._register(registered, function, False)
            function.policy, function.enqueue = rule, enqueue
            return function
        return register

    @overload
    def task(self, function: Callable[..., R]) -> TaskFunction[R]: ...
    @overload
    def task(self, *, queue: str = ..., **settings: Any) -> Callable[[Callable[..., R]], TaskFunction[R]]: ...

    def task(self, function: Any = None, *, queue: str = 'default', max_retries: int | None = None, timeout: float | None = None,
             backoff: Any = None, retry_on: Any = None, abort_on: Any = None, **settings: Any) -> Any:
        """Make the decorated function a task, one of any number on its queue: `.delay(...)` sends its arguments.
        `.options(delay=60).delay(...)` gives one job what enqueue() takes. `max_retries` and `timeout` are sent with
        each job. `settings` are those of the queue, as queue() has them; what was given last holds."""
        rule, unknown = Policy(backoff, retry_on, abort_on), sorted(set(settings) - TASK_SETTINGS)
        if unknown:
            raise Misuse(f'a task has no setting {unknown[0]}')
        host, told = settings.get('host'), engine_settings(queue, settings.pop('max_running', None), settings.pop('rate', None))
        check_all(**settings, **drop_none(max_retries=max_retries, timeout=timeout))
        send = functools.partial(self.enqueue, queue, host=host, max_retries=max_retries, timeout=timeout)

        def register(function):
            known = self.registered.get((queue, host)) or QueueConfig(queue, host, 1.0, 3, None, 1, False, {}, [])
            self._register(known._replace(told=told or known.told, **settings), function, True)
            function.policy = rule
            return add_delay_methods(function, function, send)
        return register if function is None else register(function)

    def _register(self, registered, function, is_task):
        """Have a function work what comes to a queue: all of it, or what is meant for the task of its name."""
        if not callable(function) or inspect.ismethod(function) or inspect.isbuiltin(function):
            raise Misuse(f'what is decorated must be a function, not {function!r}')
        if registered.isolate and not re.fullmatch(r'\w+(\.\w+)*', getattr(function, '__qualname__', '<')):
            raise Misuse(f'{function!r} cannot be isolated: its process has to find it by its name in a module')
        queue, name = (registered.name, registered.host), task_name(function) if is_task else None
        known = self.registered.get(queue, registered).functions
        if (known and (None in known) == is_task) or source(known.get(name, function)) != source(function):
            raise Misuse(f'the queue {queue[0]} has another handler already; only tasks, each of a name, can share one')
        self.registered[queue] = registered._replace(functions={**known, name: function})

    def on(self, event: str) -> Callable[[F], F]:
        """Have the decorated function called as hook(job, value) at each "start" (None), "success" (the result),
        "failure" or "lost" (the exception) of a run. What it raises is logged and changes nothing."""
        if event not in self.hooks:
            raise Error(f'there is no event {event!r}; there are {", ".join(self.hooks)}')

        def register(function):
            self.hooks[event].append(function)
            return function
        return register

    def enqueue(self, queue: str, payload: Any = None, *, host: str | None = None, timeout: float | None = None,
                max_retries: int | None = None, tag: str | None = None, delay: float | datetime.timedelta | None = None, run_at: str | datetime.datetime | None = None,
                priority: int | None = None, key: str | None = None, id: str | None = None, after: Any = None,
                after_any: bool | None = None, give_up: float | None = None) -> Job:
        """Add a job; returns it, a Job. `run_at` is a datetime or RFC 3339; see Client.enqueue for the rest."""
        return self.client(host).enqueue(
            queue, payload, timeout, max_retries, tag, delay, run_at, priority, key, id, give_up, after, after_any)

    def enqueue_many(self, queue: str, payloads: Iterable[Any], *, host: str | None = None,
                     ids: Iterable[str] | None = None, **options: Any) -> list[Job]:
        """Add a job per payload: see Client.enqueue_many."""
        return self.client(host).enqueue_many(queue, payloads, ids, **options)

    def schedule(self, name: str, queue: str, cron: str | None = None, every: float | datetime.timedelta | None = None, zone: str | None = None,
                 payload: Any = None, *, host: str | None = None, **options: Any) -> dict[str, Any]:
        """Have a job made at each tick; returns the schedule. The options are those of Client.schedule."""
        return self.client(host).schedule(name, queue, cron, every, zone, payload, **options)

    def unschedule(self, name: str, *, host: str | None = None) -> dict[str, Any]:
        """End a schedule; the jobs that it made stay."""
        return self.client(host).unschedule(name)

    def wait(self, job: Any, timeout: float | None = None, host: str | None = None, give_up: float | None = None) -> Job:
        """The finished job: see Client.wait."""
        return (job.client if isinstance(job, Job) and not host else self.client(host)).wait(job, timeout, give_up)

    def run(self, burst: bool = False, grace: float = GRACE, max_hung: int = MAX_HUNG,
            concurrency: int | None = None) -> None:
        """Work on the registered queues until SIGTERM, SIGINT or stop(); with `burst` until nothing is due.
        Returns after an orderly end. In the main thread, unless `burst`, it ends the process if handlers still hang,
        for nobody can end their threads: with 1 if `max_hung` of them did. In all other cases that is SystemExit(1)."""
        if multiprocessing.current_process().name.startswith(CHILD):
            raise Error("run() runs where isolate=True imports the script: put it behind if __name__ == '__main__':")
        if not self.registered:
            raise Error('there is no handler: decorate a function with @queue("name")')
        set_up_log()
        worker, code = Worker(self, burst, grace, max_hung, concurrency), 0
        self.workers.append(worker)
        try:
            worker.run()
        except Hung as error:
            note(logging.CRITICAL, '%s', error)
            code = 1
        finally:
            self.workers.remove(worker)
        if worker.hung(0) and not burst and threading.current_thread() is threading.main_thread():
            for end in logging.shutdown, functools.partial(print, end='', flush=True):
                with contextlib.suppress(Exception):
                    end()
            os._exit(code)
        if code:
            raise SystemExit(code)

    def stop(self) -> None:
        """Have run() end as after SIGTERM, from any thread."""
        for worker in list(self.workers):
            worker.stop()

    @contextlib.contextmanager
    def testing(self) -> Iterator[Testing]:
        """A throwaway engine for the time of the block, in place of the default one: see Testing. `t.client` is its
        client. It needs rundown_engine.py to be importable. Queues with their own `host` stay there."""
        try:
            import rundown_engine       # here, since only tests need it
        except ModuleNotFoundError:
            raise Error('this needs rundown_engine.py to be importable, such as beside rundown_workers.py') from None
        test, before = Testing(self), (self.host, self.clients, os.environ.get('RUNDOWN_URL', ''))     # '' is none
        with tempfile.TemporaryDirectory() as folder:
            test.server = rundown_engine.make_server(f'{folder}/jobs.db', port=0, sync='normal', clock=test.clock)
            threading.Thread(target=test.server.serve_forever, args=(0.005,), daemon=True).start()
            self.host, self.clients, os.environ['RUNDOWN_URL'] = test.server.url, {}, test.server.url
            test.client = self.client()
            try:
                yield test
            finally:
                test.client.close()
                self.host, self.clients, os.environ['RUNDOWN_URL'] = before
                test.server.shutdown()
                test.server.server_close()

class Testing:
    """What testing() gives: an engine for a test, its client, and its clock, which is `seconds` ahead."""
    def __init__(self, app):
        self.app, self.seconds = app, 0.0
        self.clock = types.SimpleNamespace(time=lambda: time.time() + self.seconds,
                                           monotonic=lambda: time.monotonic() + self.seconds)

    def advance(self, seconds: float) -> None:
        """Move the engine's clock on; it sees at once what is due by then."""
        self.seconds += seconds
        self.server.run_due_now()

    def run(self, delayed: bool = False, **options: Any) -> None:
        """Work off what is due, as run(burst=True) does; with `delayed` what is scheduled or to be retried, too."""
        queues, later = {queue for queue, _ in self.app.registered}, [None]
        while later:
            self.app.run(burst=True, **options)
            jobs = [job for job in iter_jobs(self.client, status='pending') if job['queue'] in queues] if delayed else []
            due = [datetime.datetime.fromisoformat(job['next_run_at'].replace('Z', '+00:00')) for job in jobs]
            later = [at.timestamp() for at in due if at.timestamp() > self.clock.time()]
            if later:
                self.advance(min(later) - self.clock.time() + 0.01)

def add_delay_methods(target, function, send):
    """Give an object the `delay` and `options` of a task; `send` enqueues a payload. Returns the object."""
    def delay(*args, **kwargs):
        """Add a job that calls the task with these arguments, and return it; see enqueue()."""
        check_call(function, *args, **kwargs)
        return send({'task': task_name(function), 'args': list(args), 'kwargs': kwargs})

    def options(**more):
        """The same with options of enqueue() for its jobs: add.options(delay=60).delay(4)."""
        return add_delay_methods(types.SimpleNamespace(), function, functools.partial(send, **more))

    with contextlib.suppress(ValueError):       # it has no signature to look at
        delay.__signature__ = inspect.signature(function)
    target.delay, target.options = delay, options
    return target

def task_name(function):
    """The name that producers and workers call a task by; of a script's the same as where it is imported."""
    module = function.__module__
    if module in ('__main__', '__mp_main__'):
        module = os.path.splitext(os.path.basename(inspect.getfile(function)))[0]
    return f'{module}.{function.__qualname__}'

def source(function):
    """Where a function is written: the same when it comes anew, as on a reload."""
    code = getattr(function, '__code__', None)
    return getattr(code, 'co_filename', None), getattr(function, '__qualname__', function)

def check(name, value, least, types=int):
    """Misuse unless the setting is a number from `least`."""
    if isinstance(value, bool) or not isinstance(value, types) or not least <= value < float('inf'):
        kind = 'whole number' if types is int else 'number of seconds'
        raise Misuse(f'{name} must be a {kind} from {least:g}, not {value!r}')

def check_all(**settings):
    for name in settings.keys() & LEAST.keys():
        check(name, settings[name], LEAST[name], int if type(LEAST[name]) is int else NUMBER)

def engine_settings(queue, max_running=None, rate=None, cron=None, every=None, zone=None):
    """The calls that tell an engine of a queue's limits, and of its schedule."""
    claims, seconds = rate if isinstance(rate, (tuple, list)) and len(rate) == 2 else (rate, 1)
    limits = drop_none(max_running=max_running, rate=claims, per=None if rate is None else seconds)
    ticks = drop_none(name=queue, cron=cron, every=in_seconds(every), zone=zone)
    check_all(**limits, **ticks)
    if ticks.keys() & {'cron', 'zone'} and ('every' in ticks or not isinstance(cron, str) or not cron):
        raise Misuse(f'cron must be a string like "0 3 * * *", as zone needs one, without every, not {cron!r}')
    told = ('/limit', limits), ('/schedule', ticks if cron or every else None)
    return [(path, {'queue': queue, **fields}) for path, fields in told if fields]

def check_call(function, *args, **kwargs):
    """Misuse unless the function can be called like this, as far as one can tell."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except ValueError:      # it has no signature to look at
        pass
    except TypeError as error:
        raise Misuse(f'{getattr(function, "__qualname__", function)} cannot be called like this: {error}') from None

def iter_jobs(client, **aim):
    page = {'after': None}
    while page['after'] or 'jobs' not in page:
        page = client.jobs(limit=1000, after=page['after'], **aim)
        yield from page['jobs']

def set_up_log():
    """Log to stderr, where nobody set up logging."""
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
        log.handlers[0].setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
        log.setLevel(log.level or logging.INFO)

default = App()
queue, task, on, testing, stop = default.queue, default.task, default.on, default.testing, default.stop
enqueue, enqueue_many, run, wait = default.enqueue, default.enqueue_many, default.run, default.wait
schedule, unschedule = default.schedule, default.unschedule

# -- Any program as a worker ------------------------------------------------------------------------------------------
class ProgramSlot(Slot):
    """A slot that runs a program for each job. Its streams are files, since pipes fill up, and are kept by children."""
    process = errors = None

    def prepare(self):
        self.ending = False             # the last task is settled, so no interrupt() for it can come any more

    def execute(self, command, data, task):
        file, mine = tempfile.TemporaryFile, {'RUNDOWN_ID': task.job['id'], 'RUNDOWN_QUEUE': self.consumer.name}
        env = {**os.environ, **mine, 'RUNDOWN_ATTEMPT': str(task.job['attempt'])}
        with file() as given, file() as out, file('a+b') as self.errors:
            given.write(data)
            given.seek(0)
            self.process = subprocess.Popen(
                command, stdin=given, stdout=out, stderr=self.errors, env=env, start_new_session=True)
            while not self.ending and size(out) <= MAX_STDOUT and self.process.returncode is None:
                if size(self.errors) > MAX_STDOUT:      # only its end is wanted, and a disk is finite
                    self.errors.truncate(0)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(WATCH_INTERVAL)
            if self.process.returncode is None:
                signal_group(self.process, signal.SIGTERM)
                over = time.monotonic() + TERM_GRACE
                until(lambda: self.process.poll() is not None and not signal_group(self.process, 0), over)
            signal_group(self.process, KILL)            # whoever is left of its group
            self.process.wait()
            out.seek(0)
            return self._result(self.process.returncode, out.read(MAX_STDOUT + 1))

    def _result(self, code, output):
        if len(output) > MAX_STDOUT:
            raise Abort(f'the program wrote more than {MAX_STDOUT:,} bytes to stdout, which is the most for a result')
        if code:                        # 65 is EX_DATAERR of sysexits.h
            raise (Abort if code == 65 else Retry)(f'the program {ending(code)}\n{self.where(None)}'.strip())
        try:
            text = output.decode()
        except UnicodeDecodeError as error:
            raise Abort(f'what the program wrote to stdout is not UTF-8: {error}') from None
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text)
            encode_json(value)               # NaN is no JSON
            return value
        return text

    def interrupt(self, task, interruption):
        self.ending = True              # its thread sees it within a tick

    def where(self, task):
        with contextlib.suppress(AttributeError, ValueError, OSError):     # not begun, or over
            self.errors.seek(max(0, size(self.errors) - MAX_ERROR // 2))
            return self.errors.read().decode(errors='replace')
        return ''

    def kill(self):
        if self.process and self.process.returncode is None:
            signal_group(self.process, KILL)

def size(file): return os.fstat(file.fileno()).st_size

def command_exec(client, options):
    """Work on a queue by running a program."""
    if not shutil.which(options.program[0]):
        raise Misuse(f'there is no program {options.program[0]}')

    def program(payload):
        text = payload if options.text and isinstance(payload, str) else as_json(payload, 'payload')
        return current.get().slot.execute(options.program, text.encode(), current.get())
    program.rundown_slot = ProgramSlot
    default.queue(options.queue, timeout=options.timeout)(program)
    default.run(burst=options.burst, grace=options.grace, concurrency=options.concurrency)

# -- Outbox -----------------------------------------------------------------------------------------------------------
OUTBOX = ('CREATE TABLE IF NOT EXISTS rundown_outbox (number %s PRIMARY KEY %s, job TEXT NOT NULL, error TEXT, '
          'taken_by TEXT, taken_at BIGINT)')
recent = types.SimpleNamespace(written=float('-inf'))       # when this process last wrote into an outbox

def enqueue_in(connection: Any, queue: str, payload: Any = None, delay: float | datetime.timedelta | None = None,
               run_at: str | datetime.datetime | None = None, id: str | None = None, **options: Any) -> str:
    """Write a job into the transaction that is open on a connection; it is enqueued if that commits. Returns its id.
    The driver is sqlite3, or writes parameters as %s. The options are those of enqueue(); a delay begins now."""
    inspect.signature(Client.enqueue).bind(None, queue, **options)      # TypeError for an unknown option
    if 'give_up' in options:
        raise Misuse('give_up is for what is sent now, not for an outbox')
    if delay is not None:
        run_at = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=in_seconds(delay))
    id = id or new_id()
    text = encode_job(payload, id, run_at, queue=queue, **options)
    with_table(connection, 'INSERT INTO rundown_outbox (job) VALUES (?)', text)
    recent.written = time.monotonic()
    return id

def with_table(connection, statement, *values):
    """The cursor of a statement; where the table is missing, it is made first."""
    cursor, lite, reasons = connection.cursor(), hasattr(connection, 'total_changes'), []
    create = OUTBOX % (('INTEGER', 'AUTOINCREMENT') if lite else ('BIGSERIAL', ''))

    def guard(action):      # a failure ends the whole transaction; not so in SQLite, where RELEASE might end it
        if not lite:
            connection.cursor().execute(f'{action} SAVEPOINT rundown')

    guard('')
    for text, given in ((statement, values), (create, ()), (statement, values)):
        try:
            cursor.execute(text if lite else text.replace('?', '%s'), given)
            if text is statement:
                guard('RELEASE')
                return cursor
        except Exception as error:      # each driver has its own; `create` also fails when somebody else just did it
            if not reasons and 'rundown_outbox' not in str(error):
                raise
            reasons.append(str(error).partition('\n')[0])
            guard('ROLLBACK TO')
    raise Error(f'the table rundown_outbox cannot be used, nor made: {"; ".join(reasons)}. What makes it: {create}')

def forward(connect: Callable[[], Any], host: str | None = None, keep: float = 0) -> int:
    """Send the jobs in the outbox of the database that connect() opens; returns how many the engine took.
    Rows are kept for `keep` seconds after that, and sent again to a standby that takes over meanwhile."""
    client = default.client(host)
    with contextlib.closing(connect()) as connection:
        return drain(connection, client, client.call, keep)

def drain(connection, client, send, keep):
    """Send in order, and delete what was taken `keep` seconds ago; how many jobs were taken. An id is taken once."""
    count, parts, sql = 0, [], functools.partial(with_table, connection)
    if keep:
        send('/health')         # moves client.host on where a standby has taken over; taken_by is compared with it
    while True:
        if not parts:
            over = int(time.time() - keep)
            if sql('SELECT 1 FROM rundown_outbox WHERE taken_at <= ?', over).fetchone():    # a look takes no write lock
                sql('DELETE FROM rundown_outbox WHERE taken_at <= ?', over)
            rows = sql('SELECT number, job FROM rundown_outbox WHERE error IS NULL AND '
                       '(taken_by IS NULL OR taken_by <> ?) ORDER BY number LIMIT 500', client.host).fetchall()
            parts = list(batches(rows, lambda row: len(row[1])))
        connection.commit()     # no transaction is open while the engine is away
        if not parts:
            return count
        part = parts.pop(0)
        numbers, half = ','.join([str(number) for number, _ in part]), len(part) // 2
        try:
            send('/enqueue', f'{{"jobs":[{",".join([text for _, text in part])}]}}')
            sql(f'UPDATE rundown_outbox SET taken_by = ?, taken_at = ? WHERE number IN ({numbers})',
                client.host, int(time.time()))
            count += len(part)
        except Refused as error:
            if error.status not in REFUSALS:
                raise
            if half:
                parts[:0] = part[:half], part[half:]        # which of them was it?
                continue
            note(logging.ERROR, 'the engine refused job %s of the outbox: %s', numbers, error)
            sql('UPDATE rundown_outbox SET error = ? WHERE number = ?', str(error), part[0][0])

@contextlib.contextmanager
def forwarding(connect: Callable[[], Any], host: str | None = None, keep: float = 0) -> Iterator[None]:
    """forward() in a thread during the block: at once what this process commits, and every second the rest."""
    stopping = threading.Event()
    thread = threading.Thread(target=keep_forwarding, args=(connect, host, keep, stopping), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(REPORT_GRACE)           # what is not sent by then is sent next time

def keep_forwarding(connect, host, keep, stopping):
    tries, ended = 0, False
    while not ended:
        try:
            with contextlib.closing(connect()) as connection:
                while not ended:
                    ended = stopping.is_set()           # then this look is the last
                    client = default.client(host)
                    drain(connection, client, client.send, keep)
                    tries, now = 0, time.monotonic()
                    while time.monotonic() < now + 1 and not stopping.wait(WATCH_INTERVAL / 2) and now > recent.written + OUTBOX_BURST:
                        pass            # look again in TICK / 2 while what this process wrote may commit, else in 1 s
        except Exception as error:      # the database's or the engine's
            if not tries:
                note(logging.WARNING, 'cannot forward the outbox, trying again until it works: %s', error)
            tries += 1
            ended = stopping.wait(retry_pause(tries))

def command_forward(client, options):
    """Forward the outbox in a SQLite file."""
    import sqlite3      # here, since not every Python has it
    if not os.path.isfile(options.file):
        raise Misuse(f'there is no file {options.file}')
    set_up_log()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), forwarding(lambda: sqlite3.connect(options.file), keep=options.keep):
        while True:
            time.sleep(1)

# -- Command line -----------------------------------------------------------------------------------------------------
COLUMNS = {
    'jobs': 'id queue status attempt retries priority tag next_run_at worker',
    'queues': 'queue pending scheduled running done failed cancelled oldest_age paused',
    'schedules': 'name queue cron every zone next_run_at last_run_at last_id skipped'}

def show(answer):
    """JSON on a pipe; on a terminal a table, or a line for each field."""
    if not sys.stdout.isatty():
        return print(json.dumps(answer))
    for kind in COLUMNS.keys() & answer.keys():
        rows = [COLUMNS[kind].split()]
        rows += [[printable(plain(row[column])) for column in rows[0]] for row in answer[kind]]
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            print('  '.join(map(str.ljust, row, widths)).rstrip())
        return
    for field, value in answer.items():
        lines = [printable(line) for line in plain(value).splitlines()]
        print('\n'.join([f'{field}:', *lines]) if len(lines) > 1 else f'{field:14}{"".join(lines)}')

def json_value(text):
    try:
        return json.loads(sys.stdin.read() if text == '-' else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'is not JSON ({error}); a string needs its quotes: \'"text"\'') from None
def limit(text): return None if text == 'none' else json.loads(text)

def plain(value):
    return '' if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

def command_call(client, options):
    """The client's method of that name, with what the command line says of its fields."""
    call = getattr(client, options.command)
    fields = inspect.signature(call).parameters
    show(call(**{field: value for field, value in vars(options).items() if field in fields}))

def command_queues(client, options):
    answer = client.queues()
    for row in answer['queues'] if not options.minutes else ():
        del row['minutes']
    show(answer)

def command_status(client, options):
    job = client.job(options.id) if options.wait is None else client.wait(options.id, options.wait)
    show(job)
    return options.wait is not None and job['status'] != 'done'

def command_run(client, options):
    """Import a file or a module with handlers, and work on its queues."""
    target, file = options.tasks, os.path.abspath(options.tasks) if os.path.isfile(options.tasks) else None
    sys.path.insert(0, os.path.dirname(file) if file else os.getcwd())
    if file:
        name = os.path.splitext(os.path.basename(file))[0]
        load(file, name if name.isidentifier() and name not in sys.modules else 'tasks_' + re.sub(r'\W', '_', name))
    elif re.fullmatch(r'\w+(\.\w+)*', target) and importlib.util.find_spec(target.partition('.')[0]):
        importlib.import_module(target)
    else:
        raise Misuse(f'there is neither a file nor a module {target}')
    default.run(burst=options.burst, grace=options.grace, concurrency=options.concurrency)

def command_demo(client, options):
    """Hash each file under a folder as a job of an engine of its own, and once more here: do the digests agree?"""
    app, files = App(), [path for path in pathlib.Path(options.folder).rglob('*') if path.is_file()]
    log.setLevel(logging.ERROR)

    @app.queue('demo', concurrency=4, max_retries=1)
    def digest(path):
        if job() and job()['attempt'] == 1 and hash(path) % 20 == 0:
            raise Retry('one in 20 fails once, for the show', delay=0)
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()

    with app.testing() as engine:
        began = time.monotonic()
        jobs = app.enqueue_many('demo', [str(path) for path in files if os.access(path, os.R_OK)])
        engine.run()
        took = time.monotonic() - began
        right = sum(job.refresh()['result'] == digest(job['payload']) for job in jobs)
    show({'files': len(jobs), 'retries': sum(job['retries'] for job in jobs), 'seconds': round(took, 2),
          'jobs a second': round(len(jobs) / took), 'right digests': right})
    return right != len(jobs)

SECONDS, WHOLE, FLAG = dict(type=float, metavar='S'), dict(type=int, metavar='N'), dict(action='store_true')
LIMIT = dict(type=limit, metavar='N', default=argparse.SUPPRESS)       # not given is no None
WORK, OF_JOB = '--concurrency --grace --burst', '--tag --priority --key --timeout --max-retries'
COMMANDS = [    # name, function, arguments, what it does
    ('enqueue', command_call, f'queue payload --delay --run-at --id {OF_JOB} --after', 'add a job'),
    ('status', command_status, 'id --wait', 'show a job'),
    ('jobs', command_call, '--queue --status --tag --limit --after --needed-by', 'list jobs, newest first'),
    ('queues', command_queues, '--minutes', 'count jobs by queue and status'),
    ('cancel', command_call, 'id --queue --status', 'cancel a job, or all of a queue and status'),
    ('retry', command_call, 'id --queue --status', 'make a failed or cancelled job pending again, or all of them'),
    ('purge', command_call, '--queue --status', 'delete jobs of a queue and/or status'),
    ('pause', command_call, 'queue', 'hand out no jobs of a queue'),
    ('resume', command_call, 'queue', 'hand out jobs again'),
    ('limit', command_call, 'queue --max-running --rate --per', 'limit a queue, over all workers; none lifts a limit'),
    ('schedule', command_call, f'name queue payload --cron --every --zone {OF_JOB}', 'have a job made at each tick'),
    ('unschedule', command_call, 'name', 'end a schedule'),
    ('schedules', command_call, '', 'list schedules by name'),
    ('run', command_run, f'tasks {WORK}', 'import tasks, and work on them'),
    ('exec', command_exec, f'queue program --timeout --text {WORK}', 'run a program for each job of a queue'),
    ('forward', command_forward, 'file --keep', 'send what is in the outbox of a SQLite file, until SIGTERM or SIGINT'),
    ('demo', command_demo, 'folder', 'hash the files under a folder as jobs of an engine of its own')]
ARGUMENTS = {   # what is not plain text; of one command alone where that is named
    **dict.fromkeys(('--delay', '--timeout', '--every'), SECONDS), '--grace': dict(SECONDS, default=GRACE),
    **dict.fromkeys(('--priority', '--max-retries', '--limit', '--concurrency'), WHOLE),
    **dict.fromkeys(('--max-running', '--rate'), LIMIT), **dict.fromkeys(('cancel id', 'retry id'), dict(nargs='?')),
    '--per': dict(LIMIT, metavar='S', help='seconds for --rate claims (1)'), '--cron': dict(metavar='"* * * * *"'),
    'payload': dict(nargs='?', default='null', type=json_value, help='JSON; - is stdin'),
    'enqueue --after': dict(nargs='+', metavar='ID', help='to be done first'), 'tasks': dict(metavar='FILE_OR_MODULE'),
    'status --wait': dict(SECONDS, nargs='?', const=float('inf'), help='for its end; exit with 1 unless it is done'),
    '--minutes': dict(FLAG, help='with counts of the last hour'), 'program': dict(nargs='+', metavar='PROGRAM'),
    '--burst': dict(FLAG, help='work off what is due, and end'), '--text': dict(FLAG, help='a string as it is'),
    '--keep': dict(SECONDS, default=0, help='keep what was sent for so long, for a standby'),
    'folder': dict(metavar='DIR', nargs='?', default=os.path.dirname(encodings.__file__))}

def main(argv=None):
    """The command line; the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog='rundown_workers.py', description=__doc__, formatter_class=raw)
    parser.add_argument('--host', metavar='URL', help=f'of the engine (RUNDOWN_URL, else {DEFAULT_URL})')
    parser.add_argument('--give-up', type=float, default=10, metavar='S', help='seconds to try while none answers (10)')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for name, function, taken, meaning in COMMANDS:
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.set_defaults(function=function)
        for argument in taken.split():
            command.add_argument(argument, **ARGUMENTS.get(f'{name} {argument}', ARGUMENTS.get(argument, {})))
    options = parser.parse_args(argv)
    try:
        if options.host:
            os.environ['RUNDOWN_URL'] = options.host        # for tasks that are imported, and for isolated ones
        return int(options.function(Client(timeout=options.give_up), options) or 0)
    except (Error, BrokenPipeError, KeyboardInterrupt) as error:
        print(f'rundown_workers: {error or type(error).__name__}', file=sys.stderr)
        return 3 if isinstance(error, EngineUnavailable) else 2 if isinstance(error, Misuse) else 1

if __name__ in ('__main__', '__mp_main__'):
    sys.modules.setdefault('rundown_workers', sys.modules[__name__])    # task files that import it must meet this one
if __name__ == '__main__':
    sys.exit(main())
