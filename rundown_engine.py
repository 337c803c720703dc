"""Rundown engine: background jobs over HTTP, kept in one SQLite file.

    python rundown_engine.py --db jobs.db
    curl -H 'Content-Type: application/json' http://127.0.0.1:8181/enqueue \\
        -d '{"queue": "images", "payload": "a.jpg"}'

One file that needs nothing but the standard library: copy it and run it. It owns the state of
every job, the retries and the storage. Workers (rundown_workers.py, curl, anything that speaks
HTTP) poll it and report back.

LIFECYCLE
    enqueue -> pending --poll--> running --complete--> done
                 ^  ^               |
                 |  +-- fail, lost worker (retries left), release
                 |                  +-- fail (none left) --> failed
                 +---- retry ------- failed | cancelled
    pending | running --cancel--> cancelled
    pending --expires, or a job that it waits for does not succeed--> cancelled

    A job: id, queue, tag, payload, status, priority, attempt, retries, max_retries, timeout, key,
    worker, progress, result, error, created_at, updated_at, next_run_at, started_at, finished_at;
    if it has them, group, expires_at, after and waits_for, steps.
    `attempt` counts claims and names the current one. `retries` counts failures and lost workers;
    `max_retries` bounds it.

CALLS (JSON in, JSON out; times are RFC 3339 in UTC, durations are seconds)
    POST /enqueue    queue, payload, timeout, max_retries, tag, priority, delay or run_at, id, key
                     and key_until ("start": the key is free once the job is handed out), replace
                     (true: a pending job with the key that has never started gets these values),
                     expires, group, after, after_any -> the job; {"jobs": [...]}, at most
                     10,000: all or nothing
    POST /poll       queue, limit, wait (at most 60: wait for a job that long; answered after 55,
                     before proxies give up), worker, lease, max_retries, timeout, hung (threads
                     that never came back) -> a job, with limit a list of jobs; 204 if there is none
    POST /complete   id, attempt, result
    POST /fail       id, attempt, error, retry (false: never again), delay (instead of the backoff)
    POST /heartbeat  id, attempt, progress -> 409 when the claim is gone
    POST /release    id, attempt -> pending again, nothing counted
                     These four also take {"jobs": [...]}: each item is answered, with `error` and
                     `code` if it is refused.
    POST /step       id, attempt, name, result -> the first result under that name, which later
                     attempts get in `steps`; also a heartbeat
    POST /reschedule id (or jobs), and delay, run_at or priority: changes a pending job
    POST /cancel     id, or queue, status (pending, running) and tag -> {"count": n}; a queue alone
                     or a status alone does not suffice; {"jobs": [{"id": ...}, ...]}: each item is
                     answered. The same for the next two:
    POST /retry      id, or status (failed, cancelled), tag or both; a queue narrows these down
    POST /purge      id, or any of queue, status (never running) and tag
    POST /pause, /resume   queue
    POST /limit      queue, max_running (jobs at a time), rate and per (so many claims at once, then
                     one each per / rate seconds); null removes a limit, omitted fields stay
    POST /schedule   name, queue, cron or every, zone, payload, timeout, max_retries, tag, priority,
                     key, group -> the schedule
    POST /unschedule name -> {"count": n}; the jobs it made stay
    GET  /schedules  limit, after, name; brief=true leaves out the payloads
    GET  /jobs/{id}  the job, its attempts, and why it does not run; ?wait=30 waits for its end
    GET  /jobs       queue, status, tag, group, search (text in payload, error, result, tag or id),
                     limit, after: newest first, paged by `after`. A page looks at a bounded number
                     of jobs: go on while `after` is not null, even if it is empty. brief=true
                     leaves out payload, result and all but one line of the error;
                     id=..: as /jobs/{id}, for any id; needed_by=ID: the jobs that this one waits or
                     waited for, in its order; needs=ID: the jobs that wait or waited for this one
    GET  /lost       worker, wait, since (of the previous answer): {"lost": true, "since": ...} as
                     soon as a job that this worker runs is cancelled or given to others, so that it
                     need not wait for its heartbeat
    GET  /queues     limit, after, busy (work first), queue, search (a part of the name): counts,
                     oldest age, paused, workers seen, the last hour by the minute; totals=true:
                     also the sums of all queues, and those with due jobs that no worker polls
    GET  /health     JSON; status 503 while jobs cannot be stored; warnings before that
    GET  /metrics, /backup    Prometheus text; a consistent copy of the database, one at a time
    GET  /status/{id}, /details/{tag}  the job; the newest job with that tag
    GET  /, /docs    the dashboard; this text
    GET  /openapi.json, /rundown.mjs   these calls for generators of clients; the SDK for Node

Every error is {"error": "a sentence that names the field"}: 400 bad input, 401 token, 403 foreign
page, 404, 405, 408, 409 not (or no longer) possible, 411, 413, 415, 421 foreign Host, 431, 500,
503 try again (with Retry-After).

GUARANTEES
- Acknowledged means on disk: the answer is sent after the commit (synchronous=FULL unless
  --sync normal).
- At least once, fenced: a job has one claim at a time, and `attempt` is its fencing token. A call
  that names an older attempt gets 409 and changes nothing. Complete, fail and release that are sent
  again, since their answer was lost, get the same answer and count once.
- Enqueuing an `id` that exists, or a `key` that is pending or running in the queue, returns that
  job with "created": false.
- Within a queue: higher priority first, then the earliest due, then the oldest. A poll costs the
  same however many jobs there are.
- The n-th retry is due 5 * n^2 seconds after the failure. A lost worker (no sign of life within its
  lease) counts as a failure, but the first 3 losses never end a job. So a job that kills its worker
  always ends up failed.
- The lease is `timeout` + 5 s from the claim. If the poll named a `lease`, the worker must send a
  heartbeat within that time. Setting the system's clock does not touch leases. A restart keeps
  them, and extends overdue ones by one more period (the `lease`, at least 5 s). So does a time in
  which the engine could not receive heartbeats (a full disk, a lock, a stopped process), unless
  the lease is at least twice as long.
- A job with `after` is handed out once all jobs that it names are done. It is cancelled when one
  fails, is cancelled or is purged before that; with `after_any` it is handed out once all have
  ended. Retention keeps the jobs that the `after` of an unfinished job names.
- Jobs with the same `group` in the same queue run one at a time, in the order of their arrival. The
  next one is available once the one before has ended for good; while that waits for a retry, its
  time or other jobs, those behind it wait too. Priority orders groups, not the jobs within one.
- A job that `expires` (seconds from now, or from run_at) is cancelled if it has not started by
  then.
- Each tick of a schedule makes one job, NAME@TIME, in the transaction that moves the schedule on;
  missed ticks make one, for the last of them. While its `key` is pending or running, a tick makes
  none and counts in `skipped`. Cron has five fields (minute, hour, day of month, month, day of
  week: *, lists, ranges, /step, names), or @hourly, @daily, @weekly, @monthly, @yearly. When both
  days are restricted, either suffices. A time that the zone's clock skips fires at the first
  minute after the gap. One that it shows twice fires the first time only, unless the hour field
  begins with *: then it fires both times.

LIMITS
One engine per database, on a local disk; the file has no other hard links. A body has at most 8
MiB, JSON at most 200 levels, an integer 4,300 digits; the jobs of one request have at most
20,000 dependencies. A poll claims at most 16 MiB of jobs (one at least), and a page ends there.
At most 64 MiB of requests and 64 MiB of responses are buffered; above that the newest large
ones get 503. Done or cancelled jobs are kept for --keep (7d), failed ones for --keep-failed
(30d). A clock that is set back is followed slowly (1 ms a second) until a restart: run_at is
early by the difference that is left. After a restart, deadlines that are counted in seconds
have moved with the clock. When it is set ahead, leases, retries and `expires` move with it in one
transaction, which takes about 0.2 s per 100,000; first attempts with a `delay` and schedules with
`every` keep their times. A job has at most 1,000 steps, of 8 MiB in all.
When jobs have filled the disk, no more are added; a reserve of 8 MiB lets them be completed and
purged. A job that is claimed for a client that leaves during the commit waits until its lease ends.
"""

# Checkers of a program beside this file need not check this one:
# mypy: ignore-errors
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportOptionalContextManager=false
# pyright: reportOptionalIterable=false, reportOptionalMemberAccess=false
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportReturnType=false
# pyright: reportOverlappingOverload=false

import argparse
import base64
import bisect
import calendar
import collections
import contextlib
import datetime
import difflib
import email.utils
import errno
import functools
import gc
import glob
import hashlib
import heapq
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import operator
import os
import pathlib
import random
import re
import selectors
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from queue import Empty, SimpleQueue
from typing import Any, Callable, Dict, Iterable, NamedTuple, Optional, Sequence, Tuple

# -- Settings --------------------------------------------------------------------------------------
VERSION = '1.2'
PORT = 8181
NEVER = float('inf')            # a deadline that is never reached

DEFAULT_TIMEOUT = 300           # seconds a handler may take if neither job nor worker says
GRACE = 5                       # seconds after the timeout until a worker is lost
BACKOFF = 5                     # seconds, times the square of the number of retries
MAX_LOSSES = 3                  # lost workers that a job survives without retries left
MAX_DELAY = 3650 * 86400        # seconds until a job is due
MAX_WAIT = 60                   # seconds of a long poll
MAX_BATCH = 10000               # jobs in a request
MAX_LIMIT = 1000                # jobs in a page, and claimed by a poll
MAX_DEPTH = 200                 # levels of JSON; more than this some Python cannot read back
MAX_DIGITS = 4300               # digits of an integer; newer Pythons refuse more, older are slow
MAX_ERROR = 64 << 10            # characters of an error; the middle is cut out
MAX_ATTEMPTS = 10               # ended attempts that a job remembers
MAX_ATTEMPT_ERROR = 4 << 10     # characters of the error of a remembered attempt
MAX_WORKERS = 1000              # workers that are remembered
MAX_AFTER = 1000                # dependencies of a job
MAX_DEPENDENCIES = 20000        # dependencies of all jobs of a request together
MAX_STEPS = 1000                # steps of a job
MAX_STEPS_SIZE = 8 << 20        # characters of the names and results of a job's steps
MAX_DEPENDENTS_LISTED = 100     # dependents that GET /jobs/{id} names
MAX_PRIORITIES_SCANNED = 100    # in search of a queue's oldest job
MAX_UNSERVED_LISTED = 20        # queues in GET /queues that no worker polls
SUSPICIOUS_SILENCE = 30         # seconds without a poll after which `why` mentions it
WORKER_SILENCE = 120            # seconds without a poll until a queue counts as unserved
MAX_RESPONSE = 16 << 20         # characters of jobs in a page, and claimed in one commit

MAX_BODY = 8 << 20              # bytes in a request body
MAX_HEAD = 32 << 10             # bytes in a request line and headers
MAX_HEADERS = 100               # headers in a request
MAX_QUERY = 16 << 10            # characters of a query
MAX_KNOWN_HEADS = 1024          # parsed request heads in the cache
MAX_KNOWN_HEAD_BYTES = 1024     # bytes of the longest request head that is cached
KEEP_ALIVE_TIMEOUT = 120        # seconds until an idle connection is closed
REQUEST_TIMEOUT = 30            # seconds a request may take to arrive, and a response to be taken
LONG_POLL_TIMEOUT = 55          # seconds until a poll or wait is answered; proxies allow 60
LINGER = 5                      # seconds to read on after the last response
OFFLOAD_BODY_BYTES = 256 << 10  # bodies from this size are parsed in a server thread
OFFLOAD_THREADS = 4             # server threads for requests that may take long
MIN_DOWNLOAD_RATE = 256 << 10   # bytes per second at which a copy of the database has to be taken
CHUNK_BYTES = 64 << 10          # bytes that are received, or read from a file, at a time
MAX_JOINED_BYTES = 1 << 20      # bytes of a body up to which it is sent together with its head
SMALL_MESSAGE_BYTES = 64 << 10  # requests and responses up to this size are never shed
MAX_REQUEST_BUFFER = 64 << 20   # bytes of all requests that are not answered yet
MAX_RESPONSE_BUFFER = 64 << 20  # bytes of all responses that are not taken yet
DRAIN_TIMEOUT = 4               # seconds that requests in flight get when the engine stops

LOCK_TIMEOUT = 5                # seconds to wait for another program's write lock
LOCK_RETRY_INTERVAL = 0.005     # seconds between two attempts to get that lock
STARVED_POLL_INTERVAL = 0.005   # seconds until a poll that found no response budget tries again
MAX_LISTEN_GAP = 0.05           # seconds without receiving after which leases are extended
CLOCK_CHECK_INTERVAL = 1        # seconds between two comparisons with the wall clock
# rows that one INSERT adds, a power of two; SQLite before 3.32 takes 999 values a statement
ROWS_PER_INSERT = 64 if sqlite3.sqlite_version_info >= (3, 32) else 32
SLICE_ROWS = 500                # rows that one slice of a long change touches at most
MAX_ROWS_SEARCHED = 100000      # jobs that one page of GET /jobs looks at
MAX_SEARCH_TIME = 0.1           # seconds after which a page of GET /jobs ends early
SLICE_TIME = 0.02               # seconds after which a slice of a long change begins no new row
RETENTION_INTERVAL = 60         # seconds between rounds of retention
POLL_TIME_RESOLUTION = 60       # seconds; the time of a queue's last poll is stored this exactly
FORGET_QUEUE_AFTER = 600        # seconds until an unused queue is forgotten
CHECKPOINT_PAGES = 4000         # pages in the write-ahead log that start a checkpoint
NEARLY_FULL_LOG_PAGES = 250     # CHECKPOINT_PAGES while the disk is nearly full
MAX_LOG_BYTES = 24 << 20        # a longer log is truncated to this after a checkpoint
DISK_RESERVE_BYTES = 8 << 20    # kept free on the disk for the time when jobs have filled it
SHRINK_PAGES = 500              # free pages that one slice gives back to the disk
MIN_FREE_PAGES = 1000           # free pages that a database keeps for new jobs
FULL_CHECK_MAX_BYTES = 64 << 20     # databases up to this size are checked in full at the start
BACKUP_INFIX = '.backup-'       # in the names of copies that are being made
DURATION_BUCKETS = (            # seconds
    .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
COMMIT_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)   # operations in a commit

# -- Lifecycle -------------------------------------------------------------------------------------
STATUSES = ('pending', 'running', 'done', 'failed', 'cancelled')
ENDED = ('done', 'failed', 'cancelled')

# The column `hold`: why a pending job is not handed out. Only READY jobs are handed out.
READY = 0
DELAYED = 1                     # next_run_at has not come
BLOCKED = 2                     # it waits for other jobs
QUEUED_IN_GROUP = 3             # another job of its group has to end first

# The column `state` of `dependencies`: how the job depended on has ended.
UNRESOLVED = 0                  # it has not, or the dependent has not been told
SUCCEEDED = 1                   # done
FAILED = 2                      # failed, cancelled or purged


class Transition(NamedTuple):
    """What a call does to a job. Jobs.transition() enforces the sources and the targets."""

    sources: Tuple[str, ...]
    targets: Tuple[str, ...]            # none: the job is deleted
    event: Optional[str] = None         # in the metrics
    outcome: Optional[str] = None       # of the attempt that ends


TRANSITIONS = {
    'poll': Transition(('pending',), ('running',), 'started'),
    'complete': Transition(('running',), ('done',), 'completed', 'done'),
    'fail': Transition(('running',), ('pending', 'failed'), 'failed', 'failed'),
    'lose': Transition(('running',), ('pending', 'failed'), 'lost', 'lost'),
    'heartbeat': Transition(('running',), ('running',)),
    'step': Transition(('running',), ('running',)),
    'release': Transition(('running',), ('pending',), 'released', 'released'),
    'cancel': Transition(('pending', 'running'), ('cancelled',), 'cancelled', 'cancelled'),
    'expire': Transition(('pending',), ('cancelled',), 'expired'),
    'retry': Transition(('failed', 'cancelled'), ('pending',)),
    'reschedule': Transition(('pending',), ('pending',)),
    'replace': Transition(('pending',), ('pending',)),
    'unblock': Transition(('pending',), ('pending',)),      # a job that it waits for has ended
    'purge': Transition(('pending', 'done', 'failed', 'cancelled'), ()),
}


EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
MICROSECOND = datetime.timedelta(microseconds=1)
LATEST_TIME = (datetime.datetime.max.replace(tzinfo=datetime.timezone.utc) - EPOCH) // MICROSECOND


class Clock:
    """Engine time, in microseconds since 1970: the wall clock, but it never goes back.

    It runs on the monotonic clock from the wall clock's time at the start, and is slewed towards
    the wall clock by a millisecond a second. It steps only forward, after the machine slept or the
    clock was set.
    """

    def __init__(self, source=time):
        self.monotonic = source.monotonic
        self.wall = source.time
        self.last_checked = source.monotonic()
        self.offset = self.wall() - self.last_checked       # seconds; engine time - monotonic time

    def now(self):
        return int((self.monotonic() + self.offset) * 1000000)

    def slew(self):
        """Slew towards the wall clock, and return 0.

        If that is more than a second ahead, return by how many seconds instead: the caller steps.
        """
        now = self.monotonic()
        slew = (now - self.last_checked) / 1000
        self.last_checked = now
        drift = self.wall() - now - self.offset
        if drift > 1:
            return drift
        self.offset += max(-slew, min(slew, drift))
        return 0


def micros(seconds):
    return round(seconds * 1000000)


def as_seconds(duration):
    """Microseconds as seconds, an int where they are whole; None stays None."""
    if duration is None:
        return None
    return duration / 1000000 if duration % 1000000 else duration // 1000000


def rfc3339(moment):
    if moment is None:
        return None
    return f'{_to_the_second(moment // 1000000)}.{moment % 1000000:06}Z'


@functools.lru_cache(maxsize=4096)
def _to_the_second(second):
    return (EPOCH + datetime.timedelta(seconds=second)).isoformat()[:19]


# -- Errors ----------------------------------------------------------------------------------------
# ruff: noqa: N818 (errors are named after their status in HTTP)
class StartupError(Exception):
    """The engine cannot start like this; the message says why."""


class HTTPError(Exception):
    """An error response: a status, a sentence that names the field, headers. Raised anywhere."""

    status = 500
    headers = ()

    def __init__(self, sentence, **headers):
        super().__init__(sentence)
        self.headers = [*self.headers, *headers.items()]


class BadRequest(HTTPError):
    """The call does not take this input."""

    status = 400


class Unauthorized(HTTPError):
    """The token is missing or wrong."""

    status = 401
    headers = [('WWW-Authenticate', 'Bearer')]


class Forbidden(HTTPError):
    """The request comes from a page of another origin."""

    status = 403


class NotFound(HTTPError):
    """There is no such job or path."""

    status = 404


class MethodNotAllowed(HTTPError):
    """The path exists, but does not take the method."""

    status = 405


class RequestTimeout(HTTPError):
    """The request did not arrive in time."""

    status = 408


class Conflict(HTTPError):
    """The job is not, or no longer, in a state that allows the call."""

    status = 409


class LengthRequired(HTTPError):
    """The request has neither Content-Length nor chunked coding."""

    status = 411


class PayloadTooLarge(HTTPError):
    """The body is longer than the engine takes."""

    status = 413


class UnsupportedMediaType(HTTPError):
    """The body is not declared as JSON."""

    status = 415


class Misdirected(HTTPError):
    """The Host is none of this engine's names."""

    status = 421


class HeadersTooLarge(HTTPError):
    """The header section is larger than the engine takes."""

    status = 431


class InternalError(HTTPError):
    """A bug in the engine."""

    status = 500


class Unavailable(HTTPError):
    """Storage trouble, no memory left, or the engine is stopping: try again."""

    status = 503
    headers = [('Retry-After', '1')]


class DiskFull(Unavailable):
    """The disk was full. Nothing was written; the reserve was freed, so a retry may succeed."""


class Busy(Unavailable):
    """Another program holds the write lock: no transaction was begun."""


def require(row, message, name, error=NotFound):
    """The row; if there is none, the error with the message and the name."""
    if row is None:
        raise error(f'{message} {describe(name)}')
    return row


# -- Validation ------------------------------------------------------------------------------------
UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]')
SURROGATE = re.compile('[\x00\ud800-\udfff]')
RFC3339 = re.compile(
    r'(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:[Zz]|([+-]\d\d:\d\d))', re.ASCII)

encode = json.JSONEncoder(separators=(',', ':'), allow_nan=False).encode
json_quote = json.encoder.encode_basestring_ascii


def storable_json(value):
    """A value as JSON text; ValueError or RecursionError if some Python could not read it back."""
    text = encode(value)
    if text.count('[') + text.count('{') > MAX_DEPTH and is_deeper_than(value, MAX_DEPTH):
        raise ValueError
    return text


def is_deeper_than(value, levels):
    """Whether lists and objects are nested in more levels; walks level by level."""
    containers = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        members = itertools.chain.from_iterable(map(members_of, containers))
        containers = [member for member in members if isinstance(member, (dict, list))]
        if not containers:
            return False
    return True


def members_of(container):
    return container.values() if isinstance(container, dict) else container


def parse_time(text):
    """RFC 3339 as microseconds since 1970; OverflowError beyond the years 1 to 9999."""
    day, clock, fraction, zone = RFC3339.fullmatch(text).groups('')
    fraction = fraction[:6].ljust(6, '0')
    moment = datetime.datetime.fromisoformat(f'{day}T{clock}.{fraction}{zone or "+00:00"}')
    return (moment.astimezone(datetime.timezone.utc) - EPOCH) // MICROSECOND


def truncate_middle(text, longest):
    if len(text) <= longest:
        return text
    half = longest // 2
    return f'{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}'


def describe(value):
    """A value for use in a message: one line, bounded."""
    if isinstance(value, dict):
        return 'an object'
    if isinstance(value, list):
        return f'a list of {len(value)}'
    return truncate_middle(json.dumps(value), 60).replace('\n', ' ')


class FieldRule(NamedTuple):
    """The values that a field may have, and how they are converted for storage."""

    description: str                    # completes "FIELD must be ..."
    is_valid: Callable[[Any], Any]
    convert: Callable[[Any], Any]       # may raise ValueError, OverflowError, RecursionError
    schema: Dict[str, Any]              # the same in JSON Schema, for OpenAPI


def identity(value):
    return value


def whole_number(low, high):
    return FieldRule(
        f'a whole number from {low} to {high}',
        lambda value: type(value) is int and low <= value <= high,
        identity,
        {'type': 'integer', 'minimum': low, 'maximum': high})


def duration(low, high):
    return FieldRule(
        f'a number of seconds from {low} to {high}',
        lambda value: type(value) in (int, float) and low <= value <= high,
        micros,
        {'type': 'number', 'minimum': low, 'maximum': high})


def clamped_duration(low, high):
    """A duration that is clamped to its range: a report is not refused because of it."""
    rule = duration(low, high)
    return rule._replace(
        description='a number of seconds',
        is_valid=lambda value: type(value) in (int, float) and value == value,     # not NaN
        convert=lambda value: micros(min(max(value, low), high)))


def printable(longest):
    return FieldRule(
        f'a string of 1 to {longest} characters without control characters',
        lambda value: (
            type(value) is str and 0 < len(value) <= longest and not UNPRINTABLE.search(value)),
        identity,
        {'type': 'string', 'minLength': 1, 'maxLength': longest})


def one_of(words):
    return FieldRule(
        'one of ' + ', '.join(words),
        lambda value: value in words,
        identity,
        {'type': 'string', 'enum': list(words)})


NAME = printable(200)
JSON_VALUE = FieldRule(
    f'JSON of finite numbers that is nested at most {MAX_DEPTH} levels',
    lambda value: True,
    storable_json,
    {})
FLAG = FieldRule(
    'true or false', lambda value: type(value) is bool, identity, {'type': 'boolean'})
JOB_IDS = FieldRule(
    f'a list of 1 to {MAX_AFTER} ids of jobs',
    lambda value: (
        type(value) is list and 0 < len(value) <= MAX_AFTER and all(map(NAME.is_valid, value))),
    lambda value: list(dict.fromkeys(value)),
    {'type': 'array', 'items': NAME.schema, 'minItems': 1, 'maxItems': MAX_AFTER})

ERROR_TEXT = FieldRule(
    'a string',
    lambda value: type(value) is str,
    lambda value: truncate_middle(SURROGATE.sub('\ufffd', value), MAX_ERROR),
    {'type': 'string'})
CRON_TEXT = FieldRule(
    'a string like "0 3 * * *" or "@daily"',
    lambda value: type(value) is str and len(value) <= 1000,
    identity,
    {'type': 'string', 'maxLength': 1000})

# The fields of requests; ROUTES says which call takes which. Those of JOB_COLUMNS and
# SCHEDULE_COLUMNS join them below.
FIELDS = {
    'replace': FLAG,
    'expires': duration(0.001, MAX_DELAY),
    'after': NAME,              # the cursor of a page; in POST /enqueue the dependencies (JOB_IDS)
    'needed_by': NAME,
    'needs': NAME,
    'search': NAME,
    'retry': FLAG,
    'brief': FLAG,
    'busy': FLAG,
    'totals': FLAG,
    'limit': whole_number(1, MAX_LIMIT),
    'hung': whole_number(0, 10**6),
    'since': whole_number(0, 2**63 - 1),
    'max_running': whole_number(1, 10**6),
    'rate': whole_number(1, 10**6),
    'per': duration(0.001, 366 * 86400),
    'delay': duration(0, MAX_DELAY),
    'wait': duration(0, MAX_WAIT),
    'run_at': FieldRule(
        'a time like 2030-01-31T12:00:00Z',
        lambda value: type(value) is str and RFC3339.fullmatch(value),
        parse_time,
        {'type': 'string', 'format': 'date-time'}),
    # Valid nowhere else: validate_batch() has taken {"jobs": [...]} apart before.
    'jobs': FieldRule('at the top of the body', lambda value: False, identity, {}),
}
# fields of a query whose text is parsed as JSON: numbers and flags
JSON_QUERY_FIELDS = ('limit', 'wait', 'since', 'brief', 'busy', 'totals')
LIMITS = ('max_running', 'rate', 'per')
NULLABLE = (*LIMITS, 'progress')        # null is a value; in other fields it is the same as omitted
# no request has both; a flag that is false does not count
EXCLUSIVE = (('run_at', 'delay'), ('cron', 'every'), ('every', 'zone'), ('replace', 'after'))
# the first field needs the second
REQUIRES = (('after_any', 'after'), ('replace', 'key'), ('key_until', 'key'))


def validate(path, body):
    """The fields of `body`, converted. BadRequest names the field."""
    if type(body) is not dict:
        raise BadRequest('the body must be a JSON object, such as {"queue": "images"}')
    route = ROUTES[path]
    params = {}
    for field, value in body.items():
        rule = route.rules.get(field) or refuse_unknown(field, route.rules)
        if value is not None:
            params[field] = validate_field(field, value, rule)
        elif field in NULLABLE:
            params[field] = None
    for alternatives in route.required:
        if params.keys().isdisjoint(alternatives):
            raise BadRequest(f'{" or ".join(alternatives)} is missing: {path} needs it')
    for one, other in EXCLUSIVE:
        if one in params and other in params and params[one] is not False:
            raise BadRequest(f'{one} and {other} exclude each other')
    for one, other in REQUIRES:
        if params.get(one) and other not in params:
            raise BadRequest(f'{one} needs {other}')
    return params


def refuse_unknown(field, rules):
    near = difflib.get_close_matches(field[:200], rules, 1)
    known = ", ".join(rules) or "no fields"
    hint = f'did you mean {near[0]}?' if near else f'it takes {known}'
    raise BadRequest(f'{describe(field)} is not a field of this call: {hint}')


def validate_field(field, value, rule):
    try:    # contextlib.suppress() would take half as long again
        if rule.is_valid(value):
            return rule.convert(value)
    except (ValueError, OverflowError, RecursionError):
        pass
    raise BadRequest(f'{field} must be {rule.description}, not {describe(value)}')


def validate_batch(path, body):
    """The params of `body`, or of each item of {"jobs": [...]}.

    In place of an item that is refused stands its error; /enqueue takes all or nothing.
    """
    if type(body) is not dict or 'jobs' not in body or 'jobs' not in ROUTES[path].rules:
        return validate(path, body)
    items = body['jobs']
    if len(body) > 1:
        raise BadRequest('jobs stands alone: the other fields belong into its items')
    if type(items) is not list or not 0 < len(items) <= MAX_BATCH:
        raise BadRequest(f'jobs must be a list of 1 to {MAX_BATCH} objects, not {describe(items)}')
    batch = []
    for number, item in enumerate(items):
        try:
            if type(item) is not dict:
                raise BadRequest(f'it must be a JSON object, not {describe(item)}')
            batch.append(validate(path, item))
        except BadRequest as error:
            refusal = BadRequest(f'jobs[{number}]: {error}')
            if path == '/enqueue':
                raise refusal from None
            named = type(item) is dict and NAME.is_valid(item.get('id'))
            refusal.id = item['id'] if named else None      # Claims.apply_item() answers with it
            batch.append(refusal)
    return batch


def parse_bounded_int(digits):
    if len(digits) > MAX_DIGITS:
        raise ValueError(f'an integer has more than {MAX_DIGITS} digits')
    return int(digits)


decode = json.JSONDecoder().decode
decode_bounded = json.JSONDecoder(parse_int=parse_bounded_int).decode


def parse_json(body):
    """The JSON value of a request body. It may hold Infinity, which encode() refuses."""
    try:
        text = body.decode('utf-8')
        return decode_bounded(text) if len(body) > MAX_DIGITS else decode(text)
    except (ValueError, RecursionError) as error:
        reason = truncate_middle(str(error), 200)
        raise BadRequest(f'the body must be JSON in UTF-8: {reason}') from None


# -- Cron ------------------------------------------------------------------------------------------
class CronField(NamedTuple):
    name: str
    low: int
    high: int
    names: Tuple[str, ...] = ()         # from `low` on


CRON_FIELDS = (        # POSIX crontab, and the additions of cron on Linux
    CronField('minute', 0, 59),
    CronField('hour', 0, 23),
    CronField('day of month', 1, 31),
    CronField('month', 1, 12, ('jan', 'feb', 'mar', 'apr', 'may', 'jun',
                               'jul', 'aug', 'sep', 'oct', 'nov', 'dec')),
    CronField('day of week', 0, 7, ('sun', 'mon', 'tue', 'wed', 'thu', 'fri', 'sat')),  # 7: Sunday
)
NICKNAMES = {
    '@hourly': '0 * * * *',
    '@daily': '0 0 * * *',
    '@weekly': '0 0 * * 0',
    '@monthly': '0 0 1 * *',
    '@yearly': '0 0 1 1 *',
}
CRON_PART = re.compile('(?:[*]|([a-z0-9]+)-([a-z0-9]+))(?:/([0-9]{1,3}))?|([a-z0-9]+)')
MINUTE = datetime.timedelta(minutes=1)
HOUR = datetime.timedelta(hours=1)
DAY = datetime.timedelta(days=1)


class Cron:
    """A cron expression in a time zone; BadRequest if either is invalid. Its ticks are minutes."""

    def __init__(self, expression, zone):
        parts = NICKNAMES.get(expression, expression).split()
        if len(parts) != len(CRON_FIELDS):
            raise BadRequest(
                f'cron: {describe(expression)} has not five fields (minute, hour, day of month, '
                f'month, day of week), nor is it one of {", ".join(NICKNAMES)}')
        self.minutes, self.hours, self.days, self.months, weekdays = (
            parse_cron_field(part, field) for part, field in zip(parts, CRON_FIELDS))
        self.weekdays = {day % 7 for day in weekdays}
        self.fires_twice = parts[1].startswith('*')     # in hours that the zone's clock shows twice
        self.either_day = not (parts[2].startswith('*') or parts[4].startswith('*'))
        longest = max(calendar.monthrange(2000, month)[1] for month in self.months)
        if not self.either_day and min(self.days) > longest:
            raise BadRequest(f'cron: no month of {describe(parts[3])} has a day {min(self.days)}')
        self.zone = datetime.timezone.utc if zone == 'UTC' else load_zone(zone)

    def after(self, moment):
        """The first tick after a moment in UTC."""
        tick = self._next_first_occurrence(moment)
        if self.fires_twice:
            return self._repeated_before(tick, moment) or tick
        return tick

    def _repeated_before(self, tick, moment):
        """The first match before `tick` in an hour that the zone's clock repeats, or None."""
        moment = moment.replace(second=0, microsecond=0) + MINUTE
        end = min(tick, moment + 3 * HOUR)      # no clock is set back by more
        first = moment.astimezone(self.zone)
        last = end.astimezone(self.zone)
        if first.fold or first.utcoffset() > last.utcoffset():
            while moment < end:
                local = moment.astimezone(self.zone)
                if local.fold and self._matches(local):
                    return moment
                moment += MINUTE
        return None

    def _matches(self, local):
        return (local.minute in self.minutes and local.hour in self.hours
                and local.month in self.months and self._fires_on(local))

    def _next_first_occurrence(self, moment):
        local = moment.astimezone(self.zone).replace(tzinfo=None, second=0, microsecond=0) + MINUTE
        while True:     # from the largest unit to the smallest, skip to the next that matches
            if local.month not in self.months:
                local = (local.replace(day=28, hour=0, minute=0) + 4 * DAY).replace(day=1)
            elif not self._fires_on(local):
                local = local.replace(hour=0, minute=0) + DAY
            elif local.hour not in self.hours:
                local = local.replace(minute=0) + HOUR
            elif local.minute not in self.minutes or self._first_occurrence(local) <= moment:
                local += MINUTE
            else:
                return self._first_occurrence(local)

    def _fires_on(self, local):
        day_of_month = local.day in self.days
        weekday = local.isoweekday() % 7 in self.weekdays
        if self.either_day:
            return day_of_month or weekday
        return day_of_month and weekday

    def _first_occurrence(self, local):
        """When the zone's clock first shows `local`; if it skips that, the first minute after."""
        moment = local.replace(tzinfo=self.zone).astimezone(datetime.timezone.utc)
        while (moment - MINUTE).astimezone(self.zone).replace(tzinfo=None) >= local:    # skipped
            moment -= MINUTE
        return moment


def parse_cron_field(text, field):
    """The numbers that a field of a cron expression names."""
    values = set()
    for part in text.lower().split(','):
        match = CRON_PART.fullmatch(part)
        numbers = match and cron_range(field, *match.groups())
        if not numbers:
            names = (' or ' if field.names else '') + ', '.join(field.names)
            raise BadRequest(
                f'cron: {field.name}: {part[:60]} is not {field.low}-{field.high}{names}, '
                '* or a range (both may have a /step), or a list of these')
        values.update(numbers)
    return values


def cron_range(field, first, last, step, single):
    """The numbers of a range, a single number or *; None if they are invalid."""
    start = cron_number(field, first or single or str(field.low))
    end = cron_number(field, last or single or str(field.high))
    if field.high == 7 and end == 0 and start:      # fri-sun
        end = 7
    step = int(step or 1)
    if start is None or end is None or not step or not field.low <= start <= end <= field.high:
        return None
    return range(start, end + 1, step)


def cron_number(field, text):
    if text in field.names:
        return field.names.index(text) + field.low
    return int(text) if text.isdigit() else None


def load_zone(name):
    try:
        import zoneinfo
        return zoneinfo.ZoneInfo(name)
    except (ImportError, KeyError, ValueError, OSError):
        raise BadRequest(f'zone: this machine does not know a zone {describe(name)} '
                         '(Python 3.8: only UTC)') from None


@functools.lru_cache(maxsize=1024)
def load_cron(expression, zone):
    return Cron(expression, zone)


def first_tick(schedule, now):
    """The first tick of the schedule after `now`; both are microseconds since 1970."""
    if schedule['every']:
        return now // 1000000 * 1000000 + schedule['every']
    cron = load_cron(schedule['cron'], schedule['zone'])
    try:
        return (cron.after(EPOCH + now * MICROSECOND) - EPOCH) // MICROSECOND
    except OverflowError:
        raise BadRequest('cron: it does not fire before the year 10000') from None


def last_tick(schedule, now):
    """(the last tick of the schedule that is due, the tick after that)"""
    last = schedule['next_run_at']
    every = schedule['every']
    if every:
        last += (now - last) // every * every
        return last, last + every
    beyond = now
    while True:     # invariant: no tick lies in (beyond, now]; halve [last, beyond]
        upcoming = first_tick(schedule, last)
        if upcoming > now:
            return last, upcoming
        middle = (upcoming + beyond) // 2
        tick = first_tick(schedule, middle)
        if tick <= now:
            last = tick
        else:
            last = upcoming
            beyond = middle


# -- Database: schema, migrations ------------------------------------------------------------------
APPLICATION_ID = 0x52554e44     # "RUND", in the header of the file


ALWAYS = 'always'


class Column(NamedTuple):
    """A column of `jobs` or `schedules`; schema, statements and JSON are derived from this."""

    type: str                           # SQL
    json: Optional[Callable] = None     # value -> JSON text; None: clients do not see it
    brief: Optional[Callable] = None    # the same in brief pages
    inserted: Optional[str] = None      # INSERT writes it ALWAYS, or if a request has this field
    copied: bool = False                # of a schedule: its jobs get the value
    optional: bool = False              # left out of the JSON while it is null
    large: bool = False                 # may fill many pages; stored after the others
    passive: bool = False               # transitions do not read it
    default: Any = None                 # in SQL and in the rows of new jobs
    of_row: bool = False                # `json` takes the row instead of the value
    rule: Optional[FieldRule] = None    # joins FIELDS
    filter: bool = False                # joins FILTERS

    def definition(self, name):
        default = '' if self.default is None else f' DEFAULT {self.default!r}'
        return f'"{name}" {self.type}{default}'


def shown(type, json, **more):
    """A column that clients see, in brief pages too."""
    return Column(type, json, brief=json, **more)


def json_string(text):
    return 'null' if text is None else json_quote(text)


def json_value(text):
    """A value that is stored as JSON text."""
    return text or 'null'


def json_number(number):
    return 'null' if number is None else number


def json_duration(duration):
    return json_number(as_seconds(duration))


@functools.lru_cache(maxsize=1024)
def json_time(moment):
    return 'null' if moment is None else f'"{rfc3339(moment)}"'


def json_last_line(text):
    """The last line of an error that is not indented, as lines of a stack are."""
    if text is None:
        return 'null'
    lines = text.strip().split('\n')
    return json_quote(next((line for line in reversed(lines) if not line[:1].isspace()), ''))


def timeout_of(row):
    """Microseconds: the job's timeout, else the worker's, else the default. 0 counts as unset."""
    return row['timeout'] or row['worker_timeout'] or DEFAULT_TIMEOUT * 1000000


def max_retries_of(row):
    if row['max_retries'] is not None:
        return row['max_retries']
    return row['worker_max_retries'] or 0


def json_key(row):
    return json_string(row['released_key'] if row['key'] is None else row['key'])


def json_timeout(row):
    return as_seconds(timeout_of(row))


def json_max_retries(row):
    """Null while it is not known: the job has none, and was not claimed by a worker yet."""
    if row['max_retries'] is None and not row['attempt']:
        return 'null'
    return max_retries_of(row)


JOB_COLUMNS = {     # in the order of the JSON; times and durations are in microseconds
    'seq': Column('INTEGER PRIMARY KEY'),       # the order of arrival; never used again
    'id': shown('TEXT NOT NULL', json_string, inserted=ALWAYS, rule=NAME),
    'queue': shown('TEXT NOT NULL', json_string, inserted=ALWAYS, rule=NAME, filter=True),
    'tag': shown('TEXT', json_string, inserted='tag', rule=NAME, filter=True, passive=True),
    'payload': Column('TEXT', json_value, inserted=ALWAYS, large=True, passive=True,
                      rule=JSON_VALUE),
    'status': shown('TEXT NOT NULL', json_string, default='pending', rule=one_of(STATUSES)),
    'hold': Column('INTEGER NOT NULL', default=READY, inserted=ALWAYS),   # why it is not handed out
    'priority': shown('INTEGER NOT NULL', json_number, default=0, inserted='priority',
                      rule=whole_number(-2**31, 2**31 - 1)),
    'attempt': shown('INTEGER NOT NULL', json_number, default=0,        # how many claims
                     rule=whole_number(0, 2**53)),
    'retries': shown('INTEGER NOT NULL', json_number, default=0),       # failures and losses
    'losses': Column('INTEGER NOT NULL', default=0),                    # lost workers alone
    'max_retries': shown('INTEGER', json_max_retries, of_row=True, inserted='max_retries',
                         rule=whole_number(0, 1000)),
    'worker_max_retries': Column('INTEGER'),    # of the last claim, if the job has none of its own
    'timeout': shown('INTEGER', json_timeout, of_row=True, inserted='timeout',
                     rule=duration(0, 7 * 86400)),
    'worker_timeout': Column('INTEGER'),        # of the last claim, if the job has none of its own
    'lease': Column('INTEGER', rule=duration(0.1, 86400)),      # null: the timeout and the grace
    'lease_until': Column('INTEGER'),
    'key': shown('TEXT', json_key, of_row=True, inserted='key', rule=NAME,      # while it is held
                 passive=True),
    'key_until': Column('TEXT', inserted='key_until', rule=one_of(('start', 'end')), passive=True),
    'released_key': Column('TEXT', passive=True),       # the key, once it is not held any more
    'worker': shown('TEXT', json_string, rule=NAME),
    'progress': shown('TEXT', json_value, large=True, passive=True, rule=JSON_VALUE),
    'result': Column('TEXT', json_value, large=True, passive=True, rule=JSON_VALUE),
    'error': Column('TEXT', json_string, brief=json_last_line, large=True, passive=True,
                    rule=ERROR_TEXT),
    'attempts': Column('TEXT', large=True),     # JSON: all ended ones, except one that is done
    'created_at': shown('INTEGER NOT NULL', json_time, inserted=ALWAYS, passive=True),
    'updated_at': shown('INTEGER NOT NULL', json_time, inserted=ALWAYS, passive=True),
    'next_run_at': shown('INTEGER NOT NULL', json_time, inserted=ALWAYS),
    'started_at': shown('INTEGER', json_time),
    'finished_at': shown('INTEGER', json_time, passive=True),
    'group': shown('TEXT', json_string, optional=True, inserted='group', rule=NAME, filter=True),
    'expires_at': shown('INTEGER', json_time, optional=True, inserted='expires', passive=True),
    'has_run_at': Column('INTEGER NOT NULL', default=0, inserted='run_at',  # 1: a time was given
                         passive=True),
    'steps': Column('INTEGER NOT NULL', default=0),     # how many rows of `steps` it has
    'steps_size': Column('INTEGER NOT NULL', default=0),    # characters of those
    'after': Column('TEXT', large=True, passive=True),      # JSON: the ids of its dependencies
    'after_any': Column('INTEGER NOT NULL', default=0, rule=FLAG),      # 1: however they end
    'waits_for': Column('INTEGER NOT NULL', default=0),     # how many of them have not ended
}
SCHEDULE_COLUMNS = {
    'name': shown('TEXT PRIMARY KEY', json_string, rule=printable(150)),
    'queue': shown('TEXT NOT NULL', json_string, copied=True),
    'timeout': shown('INTEGER', json_duration, copied=True),
    'max_retries': shown('INTEGER', json_number, copied=True),
    'tag': shown('TEXT', json_string, copied=True),
    'priority': shown('INTEGER', json_number, copied=True),
    'key': shown('TEXT', json_string, copied=True),
    'group': shown('TEXT', json_string, optional=True, copied=True),
    'cron': shown('TEXT', json_string, rule=CRON_TEXT),
    'every': shown('INTEGER', json_duration, rule=duration(1, 3650 * 86400)),
    'zone': shown('TEXT', json_string, rule=NAME),
    'next_run_at': shown('INTEGER NOT NULL', json_time),
    'last_run_at': shown('INTEGER', json_time),
    'last_id': shown('TEXT', json_string),
    'skipped': shown('INTEGER NOT NULL', json_number, default=0),
    'payload': Column('TEXT', json_value, copied=True, large=True, passive=True),
}


ALL_COLUMNS = [*JOB_COLUMNS.items(), *SCHEDULE_COLUMNS.items()]
FIELDS.update((name, column.rule) for name, column in ALL_COLUMNS if column.rule)


def definitions(columns):
    """Large columns come last: to read a column, SQLite reads all pages of those before it."""
    in_order = sorted(columns.items(), key=lambda item: item[1].large)
    return ', '.join(column.definition(name) for name, column in in_order)


COUNTS = {      # columns of `queues`, and the condition of the jobs that each counts
    **{status: f"status = '{status}'" for status in STATUSES},
    'scheduled': f'hold = {DELAYED}',
    'waiting': f'hold = {BLOCKED}',
    'grouped': f'hold = {QUEUED_IN_GROUP}',
}
UNFINISHED = "status IN ('pending', 'running')"
TABLES = {
    'jobs': f'CREATE TABLE jobs ({definitions(JOB_COLUMNS)})',
    'schedules': f'CREATE TABLE schedules ({definitions(SCHEDULE_COLUMNS)}) WITHOUT ROWID',
    'queues': '''
CREATE TABLE queues (
    queue TEXT PRIMARY KEY,
    paused INTEGER NOT NULL DEFAULT 0,
    polled_at INTEGER,                      -- exact to a minute; null: never polled
    pending INTEGER NOT NULL DEFAULT 0,     -- from here on COUNTS, kept by the triggers below
    running INTEGER NOT NULL DEFAULT 0,
    done INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    cancelled INTEGER NOT NULL DEFAULT 0,
    scheduled INTEGER NOT NULL DEFAULT 0,
    waiting INTEGER NOT NULL DEFAULT 0,
    grouped INTEGER NOT NULL DEFAULT 0,
    max_running INTEGER,
    rate INTEGER,                           -- `rate` claims at once,
    per INTEGER,                            -- then one each per / rate microseconds
    full_at INTEGER NOT NULL DEFAULT 0,     -- when the token bucket of the rate is full again
    changed_at INTEGER NOT NULL DEFAULT 0   -- when a job of the queue changed last
) WITHOUT ROWID''',
    'dependencies': '''
CREATE TABLE dependencies (
    dependent INTEGER NOT NULL,             -- seq of a job with `after`
    position INTEGER NOT NULL,              -- in `after`
    dependency INTEGER NOT NULL,            -- seq of the job that is named there
    state INTEGER NOT NULL,                 -- 0; DEPENDENCY_STATE once the dependent was updated
    PRIMARY KEY (dependent, position)
) WITHOUT ROWID''',
    'unresolved_ends': '''
CREATE TABLE unresolved_ends (              -- ended jobs whose dependents are not all updated
    job INTEGER PRIMARY KEY,                -- seq
    id TEXT NOT NULL,
    outcome TEXT NOT NULL                   -- a status, or purged
)''',
    'steps': '''
CREATE TABLE steps (
    job INTEGER NOT NULL,                   -- seq
    name TEXT NOT NULL,
    position INTEGER NOT NULL,              -- the order in which they were done
    result TEXT NOT NULL,                   -- JSON
    PRIMARY KEY (job, name)
) WITHOUT ROWID''',
    'last_seq': '''
CREATE TABLE last_seq (                     -- one row: the highest seq of a deleted job
    seq INTEGER NOT NULL
)''',
}
INDEXES = {     # each with the query that it serves
    # every call that names a job
    'jobs_id': 'CREATE UNIQUE INDEX jobs_id ON jobs (id)',
    # poll
    'jobs_claim': f'''
CREATE INDEX jobs_claim ON jobs (queue, priority DESC, next_run_at)
    WHERE status = 'pending' AND hold = {READY}''',
    # delayed jobs that have become due
    'jobs_due': f'''
CREATE INDEX jobs_due ON jobs (next_run_at) WHERE status = 'pending' AND hold = {DELAYED}''',
    # lost workers
    'jobs_lease': "CREATE INDEX jobs_lease ON jobs (lease_until) WHERE status = 'running'",
    # enqueue with a key
    'jobs_key': f'''
CREATE UNIQUE INDEX jobs_key ON jobs (queue, key) WHERE key IS NOT NULL AND {UNFINISHED}''',
    # GET /jobs by group
    'jobs_group': 'CREATE INDEX jobs_group ON jobs (queue, "group") WHERE "group" IS NOT NULL',
    # a group's active job, and the next one
    'jobs_group_next': f'''
CREATE INDEX jobs_group_next ON jobs (queue, "group", hold)
    WHERE "group" IS NOT NULL AND {UNFINISHED}''',
    # jobs that have expired
    'jobs_expiry': '''
CREATE INDEX jobs_expiry ON jobs (expires_at)
    WHERE expires_at IS NOT NULL AND status = 'pending' AND attempt = 0''',
    # GET /details and /jobs
    'jobs_tag': 'CREATE INDEX jobs_tag ON jobs (tag) WHERE tag IS NOT NULL',
    # GET /jobs by status; there are too many done ones to keep another index for them
    'jobs_failed': (
        'CREATE INDEX jobs_failed ON jobs (status) '
        "WHERE status = 'failed' OR status = 'cancelled'"),
    # retention
    'jobs_finished': '''
CREATE INDEX jobs_finished ON jobs (status, finished_at) WHERE finished_at IS NOT NULL''',
    # the end of a job
    'dependencies_dependency': '''
CREATE INDEX dependencies_dependency ON dependencies (dependency, state)''',
    # the next tick
    'schedules_due': 'CREATE INDEX schedules_due ON schedules (next_run_at)',
}


HOLD_COUNTS = ('scheduled', 'waiting', 'grouped')


def count_changes(columns):
    """Assignments to counts of a queue, one of whose jobs was updated."""
    return ', '.join(
        f'{column} = {column} + (NEW.{COUNTS[column]}) - (OLD.{COUNTS[column]})'
        for column in columns)


def count_deletion():
    """Assignments to counts of a queue, one of whose jobs was deleted."""
    return ', '.join(
        f'{column} = {column} - (OLD.{condition})' for column, condition in COUNTS.items())


TRIGGERS = {
    'jobs_insert': f'''
CREATE TRIGGER jobs_insert AFTER INSERT ON jobs BEGIN
    INSERT INTO queues (queue, pending, scheduled, waiting, grouped, changed_at)
    VALUES (NEW.queue, 1, NEW.hold = {DELAYED}, NEW.hold = {BLOCKED}, NEW.hold = {QUEUED_IN_GROUP},
        NEW.updated_at)
    ON CONFLICT (queue) DO UPDATE SET pending = pending + 1,
        scheduled = scheduled + excluded.scheduled, waiting = waiting + excluded.waiting,
        grouped = grouped + excluded.grouped, changed_at = excluded.changed_at;
END''',
    'jobs_update': f'''
CREATE TRIGGER jobs_update AFTER UPDATE OF status ON jobs WHEN NEW.status <> OLD.status BEGIN
    UPDATE queues SET {count_changes(STATUSES)}, changed_at = NEW.updated_at
    WHERE queue = NEW.queue;
END''',
    'jobs_hold': f'''
CREATE TRIGGER jobs_hold AFTER UPDATE OF hold ON jobs WHEN NEW.hold <> OLD.hold BEGIN
    UPDATE queues SET {count_changes(HOLD_COUNTS)} WHERE queue = NEW.queue;
END''',
    'jobs_delete': f'''
CREATE TRIGGER jobs_delete AFTER DELETE ON jobs BEGIN
    UPDATE queues SET {count_deletion()} WHERE queue = OLD.queue;
    UPDATE last_seq SET seq = OLD.seq WHERE seq < OLD.seq;
END''',
    'jobs_delete_dependencies': '''
CREATE TRIGGER jobs_delete_dependencies AFTER DELETE ON jobs WHEN OLD.after IS NOT NULL BEGIN
    DELETE FROM dependencies WHERE dependent = OLD.seq;
END''',
    'jobs_delete_steps': '''
CREATE TRIGGER jobs_delete_steps AFTER DELETE ON jobs WHEN OLD.steps > 0 BEGIN
    DELETE FROM steps WHERE job = OLD.seq;
END''',
}
SCHEMA = [*TABLES.values(), *INDEXES.values(), 'INSERT INTO last_seq VALUES (0)',
          *TRIGGERS.values()]

# From each version of the schema to the next. These texts never change once they are
# released, so none of them is derived from the tables above.
MIGRATIONS = {
    1: [        # version 1.0: no dependencies, limits and schedules
        'ALTER TABLE jobs ADD COLUMN after TEXT',
        'ALTER TABLE jobs ADD COLUMN after_any INTEGER NOT NULL DEFAULT 0',
        'ALTER TABLE jobs ADD COLUMN waits_for INTEGER NOT NULL DEFAULT 0',
        'ALTER TABLE queues ADD COLUMN waiting INTEGER NOT NULL DEFAULT 0',
        'ALTER TABLE queues ADD COLUMN max_running INTEGER',
        'ALTER TABLE queues ADD COLUMN rate INTEGER',
        'ALTER TABLE queues ADD COLUMN per INTEGER',
        'ALTER TABLE queues ADD COLUMN full_at INTEGER NOT NULL DEFAULT 0',
        '''
CREATE TABLE needs (
    job INTEGER NOT NULL, place INTEGER NOT NULL, needed INTEGER NOT NULL, state INTEGER NOT NULL,
    PRIMARY KEY (job, place)
) WITHOUT ROWID''',
        'CREATE TABLE ended (job INTEGER PRIMARY KEY, id TEXT NOT NULL, outcome TEXT NOT NULL)',
        '''
CREATE TABLE schedules (
    name TEXT PRIMARY KEY, queue TEXT NOT NULL, payload TEXT, timeout INTEGER, max_retries INTEGER,
    tag TEXT, priority INTEGER, key TEXT, cron TEXT, every INTEGER, zone TEXT,
    next_run_at INTEGER NOT NULL, last_run_at INTEGER, last_id TEXT,
    skipped INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID''',
        'CREATE INDEX needs_needed ON needs (needed, state)',
        'CREATE INDEX schedules_due ON schedules (next_run_at)',
        'DROP TRIGGER jobs_insert',
        'DROP TRIGGER jobs_update',
        'DROP TRIGGER jobs_delete',
        '''
CREATE TRIGGER jobs_insert AFTER INSERT ON jobs BEGIN
    INSERT INTO queues (queue, pending, scheduled, waiting)
    VALUES (NEW.queue, 1, NEW.scheduled = 1, NEW.scheduled = 2)
    ON CONFLICT (queue) DO UPDATE SET pending = pending + 1,
        scheduled = scheduled + excluded.scheduled, waiting = waiting + excluded.waiting;
END''',
        '''
CREATE TRIGGER jobs_update AFTER UPDATE OF status, scheduled ON jobs BEGIN
    UPDATE queues SET
        pending = pending + (NEW.status = 'pending') - (OLD.status = 'pending'),
        running = running + (NEW.status = 'running') - (OLD.status = 'running'),
        done = done + (NEW.status = 'done') - (OLD.status = 'done'),
        failed = failed + (NEW.status = 'failed') - (OLD.status = 'failed'),
        cancelled = cancelled + (NEW.status = 'cancelled') - (OLD.status = 'cancelled'),
        scheduled = scheduled + (NEW.scheduled = 1) - (OLD.scheduled = 1),
        waiting = waiting + (NEW.scheduled = 2) - (OLD.scheduled = 2)
    WHERE queue = NEW.queue;
END''',
        '''
CREATE TRIGGER jobs_delete AFTER DELETE ON jobs BEGIN
    UPDATE queues SET
        pending = pending - (OLD.status = 'pending'),
        running = running - (OLD.status = 'running'),
        done = done - (OLD.status = 'done'),
        failed = failed - (OLD.status = 'failed'),
        cancelled = cancelled - (OLD.status = 'cancelled'),
        scheduled = scheduled - (OLD.scheduled = 1),
        waiting = waiting - (OLD.scheduled = 2)
    WHERE queue = OLD.queue;
END''',
        '''
CREATE TRIGGER jobs_forget AFTER DELETE ON jobs WHEN OLD.after IS NOT NULL BEGIN
    DELETE FROM needs WHERE job = OLD.seq;
END''',
    ],
    2: [        # version 1.1: no groups, steps and expiry; columns and tables had other names
        'DROP TRIGGER jobs_insert',
        'DROP TRIGGER jobs_update',
        'DROP TRIGGER jobs_delete',
        'DROP TRIGGER jobs_forget',
        'ALTER TABLE jobs RENAME COLUMN scheduled TO hold',
        'ALTER TABLE jobs ADD COLUMN key_until TEXT',
        'ALTER TABLE jobs ADD COLUMN released_key TEXT',
        'ALTER TABLE jobs ADD COLUMN "group" TEXT',
        'ALTER TABLE jobs ADD COLUMN expires_at INTEGER',
        'ALTER TABLE jobs ADD COLUMN has_run_at INTEGER NOT NULL DEFAULT 0',
        'ALTER TABLE jobs ADD COLUMN steps INTEGER NOT NULL DEFAULT 0',
        'ALTER TABLE jobs ADD COLUMN steps_size INTEGER NOT NULL DEFAULT 0',
        'ALTER TABLE schedules ADD COLUMN "group" TEXT',
        'ALTER TABLE queues ADD COLUMN grouped INTEGER NOT NULL DEFAULT 0',
        'ALTER TABLE queues ADD COLUMN changed_at INTEGER NOT NULL DEFAULT 0',
        # a given time cannot be told from a delay here, but a retry is always counted in seconds
        "UPDATE jobs SET has_run_at = 1 WHERE status = 'pending' AND hold = 1 AND attempt = 0",
        'CREATE INDEX jobs_group ON jobs (queue, "group") WHERE "group" IS NOT NULL',
        'CREATE INDEX jobs_failed ON jobs (status) '
        "WHERE status = 'failed' OR status = 'cancelled'",
        '''
CREATE INDEX jobs_group_next ON jobs (queue, "group", hold)
    WHERE "group" IS NOT NULL AND status IN ('pending', 'running')''',
        '''
CREATE INDEX jobs_expiry ON jobs (expires_at)
    WHERE expires_at IS NOT NULL AND status = 'pending' AND attempt = 0''',
        '''
CREATE TABLE steps (
    job INTEGER NOT NULL, name TEXT NOT NULL, position INTEGER NOT NULL, result TEXT NOT NULL,
    PRIMARY KEY (job, name)
) WITHOUT ROWID''',
        'ALTER TABLE needs RENAME TO dependencies',
        'ALTER TABLE dependencies RENAME COLUMN job TO dependent',
        'ALTER TABLE dependencies RENAME COLUMN place TO position',
        'ALTER TABLE dependencies RENAME COLUMN needed TO dependency',
        'DROP INDEX needs_needed',
        'CREATE INDEX dependencies_dependency ON dependencies (dependency, state)',
        'ALTER TABLE ended RENAME TO unresolved_ends',
        'CREATE TABLE last_seq (seq INTEGER NOT NULL)',
        '''
INSERT INTO last_seq SELECT IFNULL(MAX(seq), 0) FROM (
    SELECT MAX(dependency) AS seq FROM dependencies
    UNION ALL SELECT MAX(job) FROM unresolved_ends)''',
        '''
CREATE TRIGGER jobs_insert AFTER INSERT ON jobs BEGIN
    INSERT INTO queues (queue, pending, scheduled, waiting, grouped, changed_at)
    VALUES (NEW.queue, 1, NEW.hold = 1, NEW.hold = 2, NEW.hold = 3, NEW.updated_at)
    ON CONFLICT (queue) DO UPDATE SET pending = pending + 1,
        scheduled = scheduled + excluded.scheduled, waiting = waiting + excluded.waiting,
        grouped = grouped + excluded.grouped, changed_at = excluded.changed_at;
END''',
        '''
CREATE TRIGGER jobs_update AFTER UPDATE OF status ON jobs WHEN NEW.status <> OLD.status BEGIN
    UPDATE queues SET
        pending = pending + (NEW.status = 'pending') - (OLD.status = 'pending'),
        running = running + (NEW.status = 'running') - (OLD.status = 'running'),
        done = done + (NEW.status = 'done') - (OLD.status = 'done'),
        failed = failed + (NEW.status = 'failed') - (OLD.status = 'failed'),
        cancelled = cancelled + (NEW.status = 'cancelled') - (OLD.status = 'cancelled'),
        changed_at = NEW.updated_at
    WHERE queue = NEW.queue;
END''',
        '''
CREATE TRIGGER jobs_hold AFTER UPDATE OF hold ON jobs WHEN NEW.hold <> OLD.hold BEGIN
    UPDATE queues SET
        scheduled = scheduled + (NEW.hold = 1) - (OLD.hold = 1),
        waiting = waiting + (NEW.hold = 2) - (OLD.hold = 2),
        grouped = grouped + (NEW.hold = 3) - (OLD.hold = 3)
    WHERE queue = NEW.queue;
END''',
        '''
CREATE TRIGGER jobs_delete AFTER DELETE ON jobs BEGIN
    UPDATE queues SET
        pending = pending - (OLD.status = 'pending'),
        running = running - (OLD.status = 'running'),
        done = done - (OLD.status = 'done'),
        failed = failed - (OLD.status = 'failed'),
        cancelled = cancelled - (OLD.status = 'cancelled'),
        scheduled = scheduled - (OLD.hold = 1),
        waiting = waiting - (OLD.hold = 2),
        grouped = grouped - (OLD.hold = 3)
    WHERE queue = OLD.queue;
    UPDATE last_seq SET seq = OLD.seq WHERE seq < OLD.seq;
END''',
        '''
CREATE TRIGGER jobs_delete_dependencies AFTER DELETE ON jobs WHEN OLD.after IS NOT NULL BEGIN
    DELETE FROM dependencies WHERE dependent = OLD.seq;
END''',
        '''
CREATE TRIGGER jobs_delete_steps AFTER DELETE ON jobs WHEN OLD.steps > 0 BEGIN
    DELETE FROM steps WHERE job = OLD.seq;
END''',
    ],
}
SCHEMA_VERSION = max(MIGRATIONS) + 1


def migrate(db, version):
    """Bring the schema from this version to SCHEMA_VERSION, in the transaction that is open."""
    for step in range(version, SCHEMA_VERSION):
        for statement in MIGRATIONS[step]:
            renaming = re.fullmatch(r'ALTER TABLE (\w+) RENAME COLUMN (\w+) TO (\w+)', statement)
            if renaming and sqlite3.sqlite_version_info < (3, 25):
                rename_column(db, *renaming.groups())
            else:
                db.execute(statement)


def missing_from_schema(db):
    """The tables, columns, indexes and triggers of SCHEMA that a database lacks."""
    with contextlib.closing(sqlite3.connect(':memory:')) as model:
        for statement in SCHEMA:
            model.execute(statement)
        return sorted(schema_names(model) - schema_names(db))


def schema_names(db):
    found = set()
    for kind, name in db.execute('SELECT type, name FROM sqlite_master').fetchall():
        found.add(name)
        if kind == 'table':
            columns = db.execute(f'PRAGMA table_info({name})').fetchall()
            found.update(f'{name}.{column[1]}' for column in columns)
    return found


def rename_column(db, table, old, new):
    """RENAME COLUMN for SQLite 3.24, which lacks it: only the schema names columns."""
    db.execute('PRAGMA writable_schema = ON')
    for name, sql in db.execute(
            'SELECT name, sql FROM sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL',
            (table,)).fetchall():
        db.execute('UPDATE sqlite_master SET sql = ? WHERE name = ?',
                   (re.sub(rf'\b{old}\b', new, sql), name))
    version = fetch_value(db, 'PRAGMA schema_version')
    db.execute(f'PRAGMA schema_version = {version + 1}')        # have the schema read again
    db.execute('PRAGMA writable_schema = OFF')


# -- Database: connections, transactions, backup ---------------------------------------------------
def is_storage_error(error):
    """Whether the storage failed, rather than the engine's own statements."""
    mistakes = (sqlite3.ProgrammingError, sqlite3.IntegrityError)
    return isinstance(error, (sqlite3.Error, OSError)) and not isinstance(error, mistakes)


def obstacle(database_path, error):
    """Why a database cannot be used; names the file or folder at fault, if there is one."""
    reason = getattr(error, 'strerror', None) or error.__cause__ or error
    named = getattr(error, 'filename', None)
    folder = os.path.dirname(database_path)
    if named and not os.path.exists(folder):
        return f'the folder {folder} does not exist'
    if named and not os.path.exists(named):
        return f'{reason}: {named} in {folder} ({owner_and_mode(folder)})'
    files = [database_path + suffix for suffix in ('.lock', '', '-wal', '-shm', '-journal')]
    for path in (*files, folder):
        if os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
            return f'{reason}: {path} ({owner_and_mode(path)})'
    return f'{reason}: {named}' if named else reason


def owner_and_mode(path):
    try:
        info = os.stat(path)
    except OSError as error:
        return error.strerror
    owner = info.st_uid
    with contextlib.suppress(ImportError, KeyError):
        import pwd
        owner = pwd.getpwuid(owner).pw_name
    return f'owner {owner}, mode {stat.filemode(info.st_mode)}'


def is_mounted_alone(path):
    """Whether a file is a mount point of its own, on Linux: `docker run -v ./jobs.db:/jobs.db`."""
    try:
        lines = pathlib.Path('/proc/self/mountinfo').read_bytes().splitlines()
    except OSError:
        return False
    mount_points = [unescape_octal(line.split(b' ')[4]) for line in lines]
    return os.fsencode(path) in mount_points


def unescape_octal(name):
    r"""The name without escapes like \040 for a blank."""
    return re.sub(rb'\\([0-7]{3})', lambda code: bytes([int(code[1], 8)]), name)


def lock(path):
    """The open, locked file PATH.lock.

    Not the database itself: closing a second handle of that drops SQLite's locks on it.
    """
    file = os.fdopen(os.open(path + '.lock', os.O_RDWR | os.O_CREAT, 0o600), 'r+b')
    try:
        if os.name == 'nt':
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StartupError(f'{path} is in use by another engine') from None
    return file


def check_header(path):
    """Create the file if it is missing; only its owner may read it.

    StartupError if an engine must not use it: the file is unchanged then.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, 'O_BINARY', 0)
    with os.fdopen(os.open(path, flags, 0o600), 'rb') as file:
        header = file.read(100)
        links = os.fstat(file.fileno()).st_nlink
    if links > 1:       # each name would have a lock and a write-ahead log of its own
        raise StartupError(
            f'{path} has {links} names (hard links); an engine takes a database that has one')
    if is_mounted_alone(path):      # the log beside it would be left behind with the container
        raise StartupError(
            f'{path} is mounted by itself, without the write-ahead log beside it; '
            'mount its folder instead')
    journal = path + '-journal'
    has_journal = os.path.exists(journal) and os.path.getsize(journal)
    if header and not has_journal:      # else SQLite rolls back the hot journal first
        version = int.from_bytes(header[60:64], 'big')
        application = int.from_bytes(header[68:72], 'big')
        if header[:16] != b'SQLite format 3\0' or application != APPLICATION_ID:
            raise StartupError(f'{path} is not a Rundown database; it was left as it is')
        refuse_newer_schema(path, version)
    with contextlib.suppress(PermissionError):
        os.chmod(path, 0o600)


def refuse_newer_schema(path, version):
    if version > SCHEMA_VERSION:
        raise StartupError(
            f'{path} was written by a newer engine (schema {version}, this one knows '
            f'{SCHEMA_VERSION}); it was left as it is')


class DiskReserve:
    """A file that keeps a part of the disk free, for the time when jobs have filled the rest.

    It is allocated when the disk is nearly full, and freed when a write finds the disk full. From
    then on no jobs are added, but they can be completed and purged, until there is room again.
    """

    def __init__(self, database_path):
        # constant after start
        self.database_path = database_path
        self.path = database_path + '-reserve'
        self.folder = os.path.dirname(database_path)
        self.size = 0           # bytes; 0: free space cannot be determined on this disk
        self.nearly_full = 0    # free bytes; with less the disk is nearly full
        # touched by the thread that writes, read by all
        self.is_held = False
        self.free = 0           # free bytes besides the reserve, at the last update()

    def open(self):
        """Adopt the file of an earlier run; free it if the disk is too full to start."""
        with contextlib.suppress(OSError):
            self.size = min(DISK_RESERVE_BYTES, shutil.disk_usage(self.folder).total // 8)
            self.nearly_full = 32 * self.size       # jobs fill less than this in a second
        self.is_held = os.path.exists(self.path)
        self.update()
        if self.is_held and self.free < self.size:
            self.give_up()

    def update(self):
        """Measure the free space; allocate the reserve if that is little, free it if plenty."""
        with contextlib.suppress(OSError):
            self.free = shutil.disk_usage(self.folder).free
        if self.is_held and self.free > 2 * self.nearly_full:
            self.give_up()
        elif not self.is_held and 2 * self.size <= self.free < self.nearly_full:
            self._allocate()

    def _allocate(self):
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, 'O_BINARY', 0)
            with os.fdopen(os.open(self.path, flags, 0o600), 'wb') as file:
                if hasattr(os, 'posix_fallocate'):
                    os.posix_fallocate(file.fileno(), 0, self.size)
                else:
                    file.write(bytes(self.size))
            self.is_held = True
        except OSError:
            self.give_up()

    def give_up(self):
        """Free the reserve. True if it was held, so that there is room now."""
        held = self.is_held
        self.is_held = False
        with contextlib.suppress(OSError):
            os.unlink(self.path)
            self.free = shutil.disk_usage(self.folder).free
        return held

    def has_room(self, db):
        """Whether jobs may be added: the reserve is held or not needed, or the file has room."""
        if self.is_held or self.free >= self.nearly_full:
            return True
        self.update()
        if self.is_held:
            return True
        used_pages = page_count(db) - free_pages(db)
        free_in_file = file_size(self.database_path) - used_pages * page_size(db)
        return self.free + free_in_file >= 2 * self.size


def file_size(path):
    """Bytes; 0 if there is no such file."""
    with contextlib.suppress(OSError):
        return os.path.getsize(path)
    return 0


def fetch_value(db, statement, values=()):
    """The first column of the first row."""
    return db.execute(statement, values).fetchone()[0]


def free_pages(db):
    return fetch_value(db, 'PRAGMA freelist_count')


def page_count(db):
    return fetch_value(db, 'PRAGMA page_count')


def page_size(db):
    return fetch_value(db, 'PRAGMA page_size')


class FileWatch:
    """Notices that a file of the database was deleted or replaced while in use."""

    def __init__(self, database_path):
        # constant after start
        self.path = database_path
        self.folder = os.path.dirname(database_path)
        # touched by the thread that writes only
        self.inodes = None              # of the database, log and lock file; None: not in use
        self.folder_mtime = None        # when the files were checked; None: check them again

    def watch(self):
        """From now on the files are in use."""
        self.inodes = self._find_inodes()

    def _find_inodes(self):
        return [os.stat(self.path + suffix).st_ino for suffix in ('', '-wal', '.lock')]

    def check(self):
        """Unavailable if a file was deleted or replaced: commits would go to the deleted one.

        Deleting a file changes its folder's mtime. So after a commit the folder alone is checked,
        unless its last change is so recent that the next could have the same mtime.
        """
        mtime = os.stat(self.folder).st_mtime
        if mtime == self.folder_mtime:
            return
        found = None
        with contextlib.suppress(FileNotFoundError):
            found = self._find_inodes()
        if self.inodes and found != self.inodes:
            raise Unavailable(
                f'the database {self.path} or its lock file was deleted or replaced while in use; '
                'restart the engine')
        resolution = 0.1 if mtime % 1 else 2     # some file systems store whole seconds
        is_settled = os.name == 'posix' and mtime < time.time() - resolution
        self.folder_mtime = mtime if is_settled else None


class Database:
    """The file: its lock, the writing connection, the reading connections, its copies."""

    def __init__(self, path, sync):
        # constant after start
        self.path = os.path.realpath(path)
        self.sync = sync
        self.lock_file = None
        # safe without a lock
        self.readers = []               # all connections that read
        self.idle_readers = []          # connections that no thread uses at the moment
        self.reserve = DiskReserve(self.path)
        self.files = FileWatch(self.path)
        self.backups = Backups(self)
        # touched by the thread that writes only
        self.db = None                  # its connection
        self.unsynced = False           # the log may hold a commit that did not reach the disk
        self.is_sparse = False          # much of the file is free pages, which shrink() gives back
        self.checkpoint_pages = 0       # pages in the log that start a checkpoint
        # written by the thread that writes, read by all
        self.last_storage_error = None  # why the last commit failed; None: it did not
        self.takes_jobs = True          # False: the disk is full, jobs are not added

    def open(self):
        """Take the file and create or check its contents; StartupError if that is impossible."""
        try:
            self.lock_file = lock(self.path)
            check_header(self.path)
            self.backups.remove_left()
            self.reserve.open()
            self.db = self._connect_writer(LOCK_TIMEOUT)
            with self.transaction() as db:
                old_version = fetch_value(db, 'PRAGMA user_version')
                self._create_or_migrate(db)
            if 0 < old_version < SCHEMA_VERSION:
                log(f'{self.path}: migrated from schema {old_version} to {SCHEMA_VERSION}')
            self.db.execute('PRAGMA journal_mode = WAL')
            self._check_integrity()
            self.db.execute('PRAGMA busy_timeout = 0')      # from now on the loop waits, not SQLite
            with self.reading() as db:      # one reader stays, so that the log outlives the writer
                db.execute('SELECT 1 FROM jobs').fetchone()
            self.files.watch()
        except BaseException as error:
            self.close()
            if not isinstance(error, (sqlite3.Error, OSError, Unavailable)):
                raise
            reason = obstacle(self.path, error)
            raise StartupError(f'{self.path} cannot be used: {reason}') from None

    def _create_or_migrate(self, db):
        version = fetch_value(db, 'PRAGMA user_version')
        application = fetch_value(db, 'PRAGMA application_id')
        is_new = not fetch_value(db, 'SELECT COUNT(*) FROM sqlite_master')
        # check_header() does not look at a file with a journal
        if not is_new and application != APPLICATION_ID:
            raise StartupError(f'{self.path} is not a Rundown database; it was left as it is')
        refuse_newer_schema(self.path, version)
        if version == SCHEMA_VERSION:
            return
        if is_new:
            for statement in SCHEMA:
                db.execute(statement)
        else:
            migrate(db, version)
        missing = missing_from_schema(db)
        if missing:     # a migration forgot it
            raise StartupError(f'{self.path}: its schema lacks {", ".join(missing)}')
        db.execute(f'PRAGMA application_id = {APPLICATION_ID}')
        db.execute(f'PRAGMA user_version = {SCHEMA_VERSION}')

    def _check_integrity(self):
        is_small = os.path.getsize(self.path) <= FULL_CHECK_MAX_BYTES
        if is_small and fetch_value(self.db, 'PRAGMA quick_check(1)') != 'ok':
            raise StartupError(f'{self.path} is damaged; restore a backup')

    def _connect_writer(self, lock_timeout):
        db = self._connect(
            lock_timeout, f'synchronous = {self.sync}', 'auto_vacuum = INCREMENTAL',
            'secure_delete = FAST', 'cache_size = -16384')
        self.checkpoint_pages = 0
        self._limit_log(db)
        return db

    def _limit_log(self, db):
        """Keep the log short while the disk is nearly full: it takes space besides the database."""
        is_nearly_full = self.reserve.free < self.reserve.nearly_full
        pages = NEARLY_FULL_LOG_PAGES if is_nearly_full else CHECKPOINT_PAGES
        if pages != self.checkpoint_pages:
            self.checkpoint_pages = pages
            limit = min(MAX_LOG_BYTES, 4 * pages * page_size(db))
            db.execute(f'PRAGMA wal_autocheckpoint = {pages}')
            db.execute(f'PRAGMA journal_size_limit = {limit}')

    def _connect(self, lock_timeout, *pragmas):
        db = sqlite3.connect(
            pathlib.Path(self.path).as_uri() + '?mode=rw', uri=True, timeout=lock_timeout,
            isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        for pragma in ('temp_store = MEMORY', *pragmas):    # there may be no folder to write to
            db.execute('PRAGMA ' + pragma)
        return db

    @contextlib.contextmanager
    def transaction(self):
        """The one place where the database is changed.

        Busy, DiskFull: nothing was written. Any other Unavailable: the outcome is unknown.
        """
        begun = False
        try:
            if self.last_storage_error:
                self.files.check()
            if self.db is None:
                self._reconnect()
            self.db.execute('BEGIN IMMEDIATE')
            begun = True
            yield self.db
            self.db.execute('COMMIT')
            self.files.check()
        except BaseException as error:
            if self.db and self.db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    self.db.execute('ROLLBACK')
            if not is_storage_error(error):
                raise
            # errors are told apart by their messages: sqlite_errorcode needs Python 3.11
            message = f'the database could not be written ({error})'
            is_full = 'full' in str(error) and self.reserve.give_up()
            if self.db and not begun and 'locked' in str(error):
                raise Busy(f'{message}; nothing was changed, try again') from error
            if self.db:     # after an I/O error only a fresh connection knows the disk's content
                self.db.close()
                self.db = None
            self.unsynced = self.unsynced or 'I/O' in str(error)
            if is_full:
                raise DiskFull(f'{message}; nothing was changed, try again') from error
            raise Unavailable(
                f'{message}; whether it was done is not known, send it again') from error

    def _reconnect(self):
        """Connect again, and sync a commit that may be in the log only.

        It has to be on disk before a replay of it is acknowledged.
        """
        db = self._connect_writer(0)
        if self.unsynced and fetch_value(db, 'PRAGMA wal_checkpoint(TRUNCATE)'):    # it is busy
            db.close()
            raise sqlite3.OperationalError('the write-ahead log is locked')
        self.db = db
        self.unsynced = False

    def check_disk(self):
        """Measure the free space, and fit the log to it; find out whether shrink() has work.

        Called every second.
        """
        self.reserve.update()
        if self.db is None:
            return
        with contextlib.suppress(sqlite3.Error):
            self._update_sparse(self.db)
            self._limit_log(self.db)
            # pages that shrink() gave back leave the file once the log is written into it
            is_shrunk = file_size(self.path) > page_count(self.db) * page_size(self.db)
            if self.log_bytes() and (is_shrunk or not self.takes_jobs):
                self.db.execute('PRAGMA wal_checkpoint(TRUNCATE)')

    def _update_sparse(self, db):
        free = free_pages(db)
        pages = page_count(db)
        can_shrink = fetch_value(db, 'PRAGMA auto_vacuum')      # 0: made by 1.1 or older
        self.is_sparse = bool(can_shrink) and free > MIN_FREE_PAGES and free > pages // 4

    def shrink(self, tx):
        """A slice of giving free pages back to the disk, while more than a quarter is free."""
        for _ in range(SHRINK_PAGES):       # one at a time: Python 3.11 steps a PRAGMA only once
            tx.fetch_all('PRAGMA incremental_vacuum(1)')
            if tx.is_slice_over():
                break
        self._update_sparse(tx.db)

    def log_bytes(self):
        return file_size(self.path + '-wal')

    def trouble(self):
        """A sentence if jobs cannot be stored at the moment; else None."""
        if self.last_storage_error:
            return self.last_storage_error
        return None if self.takes_jobs else DISK_IS_FULL

    def warnings(self):
        """Sentences about conditions that may become trouble."""
        log_bytes = self.log_bytes()
        if log_bytes > 2 * MAX_LOG_BYTES:
            return [f'the write-ahead log has {log_bytes >> 20} MiB: another program has been '
                    'reading the database for a long time']
        return []

    @contextlib.contextmanager
    def reading(self):
        """A connection that reads one committed state and never waits for the writer.

        Threads come and go, so connections are pooled: at most as many are open as were ever in use
        at once.
        """
        try:
            db = self.idle_readers.pop()
        except IndexError:
            db = None
        try:
            if db is None:
                db = self._connect(LOCK_TIMEOUT, 'query_only = ON')
                self.readers.append(db)
            db.execute('BEGIN')     # all statements see the state that the first one sees
            yield db
        except sqlite3.Error as error:
            raise Unavailable(f'the database could not be read ({error}); try again') from error
        finally:
            if db is not None:
                if db.in_transaction:
                    db.execute('ROLLBACK')
                self.idle_readers.append(db)

    def close(self):
        """Close all connections, and unlock the file. No transaction may be open."""
        for db in (self.db, *self.readers):
            if db:
                db.close()
        if self.files.inodes:
            self.backups.remove_left()
        if self.lock_file:
            self.lock_file.close()


class Backups:
    """Consistent copies of a database under load.

    Only one is made at a time, since each is as large as the database.
    """

    def __init__(self, database):
        self.database = database
        self.in_progress = threading.Lock()     # held until the copy was sent and closed

    def make(self):
        """A copy as an open file, which is deleted when it is closed."""
        if not self.in_progress.acquire(blocking=False):
            raise Unavailable('another copy is being made or taken; try again when that is done')
        try:
            return self._copy()
        except BaseException as error:
            self.in_progress.release()
            if not isinstance(error, OSError):
                raise
            raise Unavailable(f'the copy could not be written: {error.strerror}') from None

    def _copy(self):
        folder, name = os.path.split(self.database.path)
        handle, path = tempfile.mkstemp(prefix=name + BACKUP_INFIX, dir=folder)
        os.close(handle)
        try:
            with self.database.reading() as db, contextlib.closing(sqlite3.connect(path)) as copy:
                db.backup(copy)
            return BackupFile(path, self.in_progress.release)
        finally:
            # Windows deletes it when it is closed
            with contextlib.suppress(PermissionError, FileNotFoundError):
                os.unlink(path)

    def remove_left(self):
        """Remove copies that an earlier run did not finish."""
        for path in glob.glob(glob.escape(self.database.path + BACKUP_INFIX) + '*'):
            with contextlib.suppress(OSError):
                os.unlink(path)


class BackupFile(io.FileIO):
    """A copy of the database; calls on_close() once when it is closed."""

    def __init__(self, path, on_close):
        super().__init__(path, 'r', opener=open_temporary)
        self.on_close = on_close

    def close(self):
        if not self.closed:
            super().close()
            self.on_close()


def open_temporary(path, flags):
    return os.open(path, flags | getattr(os, 'O_TEMPORARY', 0))


# -- Jobs: statements and rendering ----------------------------------------------------------------
def columns_where(wanted, columns=JOB_COLUMNS):
    return [name for name, column in columns.items() if wanted(column)]


def column_list(columns):
    """Quoted, since the name of a column may be a keyword of SQL."""
    return ', '.join(f'"{column}"' for column in columns)


COLUMNS = list(JOB_COLUMNS)
TRANSITION_COLUMNS = columns_where(lambda column: not column.passive)
BRIEF_COLUMNS = [*columns_where(lambda column: column.brief),
                 # columns that `json_key`, `job_cursor` and the like read
                 'seq', 'worker_max_retries', 'worker_timeout', 'released_key', 'waits_for']
BRIEF_SCHEDULE_COLUMNS = columns_where(lambda column: column.brief, SCHEDULE_COLUMNS)
JOB_DEFAULTS = {name: column.default for name, column in JOB_COLUMNS.items()}

# The columns are named, since a migrated database may have them in another order.
SELECT_JOB = f'SELECT {column_list(COLUMNS)} FROM jobs WHERE '
# All that a transition needs. The other columns may be large.
FIND_JOB = f'SELECT {column_list(TRANSITION_COLUMNS)} FROM jobs WHERE '
FIND_BY_ID = FIND_JOB + 'id = ?'
FIND_BY_SEQ = FIND_JOB + 'seq = ?'
SELECT_QUEUE = 'SELECT * FROM queues WHERE queue = ?'
JOB_WITH_KEY = f'{SELECT_JOB} queue = ? AND key = ? AND {UNFINISHED}'

# A seq is never used again. (SQLite by itself gives the highest one again after its deletion.)
NEXT_SEQ = ('(SELECT MAX(seq) + 1 FROM '
            '(SELECT MAX(seq) AS seq FROM jobs UNION ALL SELECT seq FROM last_seq))')


INSERTING_FIELDS = frozenset(
    {column.inserted for column in JOB_COLUMNS.values()} - {ALWAYS, None})


@functools.lru_cache(maxsize=256)
def insert_plan(rows, fields=INSERTING_FIELDS):
    """(statement, function of a row that returns its values) for this number of rows.

    A column that is inserted with a field is written only if `fields` has that field: each column
    makes a bulk insert 3 % slower.
    """
    columns = columns_where(lambda column: column.inserted == ALWAYS or column.inserted in fields)
    values = ', ?' * len(columns)
    others = f', (NULL{values})' * (rows - 1)       # their seqs count on from the first one
    statement = (f'INSERT INTO jobs (seq, {column_list(columns)}) '
                 f'VALUES ({NEXT_SEQ}{values}){others}')
    return statement, operator.itemgetter(*columns)


CLAIMABLE = f"FROM jobs WHERE queue = :queue AND status = 'pending' AND hold = {READY}"
SET_BY_CLAIM = {
    'status', 'worker', 'lease', 'lease_until', 'started_at', 'updated_at', 'worker_timeout',
    'worker_max_retries'}
UNUSED_BY_CLAIM = {'hold', 'losses', 'attempts', 'after_any', 'has_run_at'}
CLAIMED_COLUMNS = [name for name in JOB_COLUMNS if name not in SET_BY_CLAIM | UNUSED_BY_CLAIM]
CLAIM = f'''
    SELECT {column_list(CLAIMED_COLUMNS)} {CLAIMABLE}
        AND NOT EXISTS (SELECT 1 FROM queues WHERE queue = :queue AND paused)
    ORDER BY priority DESC, next_run_at, seq LIMIT :limit'''

OWNED_COLUMNS = {'status', 'hold', 'next_run_at', 'lease_until'}        # written by Jobs alone


@functools.lru_cache(maxsize=64)
def update_statement(columns):
    """Takes the values in order, then the seq. Named parameters would take half as long again."""
    assignments = ', '.join(f'"{column}" = ?' for column in columns)
    return f'UPDATE jobs SET {assignments} WHERE seq = ?'


@functools.lru_cache(maxsize=64)
def upsert_queue_statement(columns):
    """Takes the queue, then the values in order."""
    assignments = ', '.join(f'{column} = excluded.{column}' for column in columns)
    return (f'INSERT INTO queues (queue, {column_list(columns)}) VALUES (?{", ?" * len(columns)}) '
            f'ON CONFLICT (queue) DO UPDATE SET {assignments}')


CURSOR = 'seq:'         # the cursor of a page of jobs: this, and a seq


def compile_renderer(columns, renderer_of):
    """A function of a row that returns the members of its JSON object.

    Its source is built and evaluated once. A loop over the columns, for each job, takes twice as
    long as this, and rendering is a fifth of the time of a claim.
    """
    template = ''
    values = []
    for name, column in columns.items():
        renderer = renderer_of(column)
        if renderer is None:
            continue
        comma = ',' if values else ''
        member = f'{comma}"{name}":'
        argument = 'row' if column.of_row else f'row[{name!r}]'
        value = f'{renderer.__name__}({argument})'
        if column.optional:
            template += '%s'
            values.append(f'"" if {argument} is None else {member!r} + {value}')
        else:
            template += f'{member}%s'
            values.append(value)
    return eval(f'lambda row: {template!r} % ({", ".join(values)})', globals())


render_job = compile_renderer(JOB_COLUMNS, operator.attrgetter('json'))
render_brief_job = compile_renderer(JOB_COLUMNS, operator.attrgetter('brief'))
render_schedule = compile_renderer(SCHEDULE_COLUMNS, operator.attrgetter('json'))
render_brief_schedule = compile_renderer(SCHEDULE_COLUMNS, operator.attrgetter('brief'))


def job_json(row, more='', brief=False):
    """A job as clients see it, as JSON text. `more` (',"name":value') ends its members."""
    if brief:
        waits = f',"waits_for":{row["waits_for"]}' if row['waits_for'] else ''
        return f'{{{render_brief_job(row)}{waits}{more}}}'
    waits = ''
    if row['after']:
        waits = f',"after":{row["after"]},"waits_for":{row["waits_for"]}'
    return f'{{{render_job(row)}{waits}{more}}}'


def claim_json(claim):
    """A claimed job, with its steps if it has any."""
    return job_json(claim, claim.get('steps_json', ''))


def steps_json(db, row):
    """The steps of a job as a member of its JSON object; '' if it has none."""
    if not row['steps']:
        return ''
    steps = db.execute('SELECT name, result FROM steps WHERE job = ? ORDER BY position',
                       (row['seq'],))
    members = ','.join(f'{json_quote(name)}:{result}' for name, result in steps)
    return f',"steps":{{{members}}}'


def schedule_json(row, brief=False, **more):
    render = render_brief_schedule if brief else render_schedule
    members = [render(row)] + [f'"{name}":{encode(value)}' for name, value in more.items()]
    return f'{{{",".join(members)}}}'


def json_list(texts):
    return '[' + ','.join(texts) + ']'


def json_page(name, rows, render, limit, cursor_of, resume_after=None):
    """A page as JSON text; `after` is null on the last one. One that grows large ends early.

    `resume_after` is the cursor of the next page if the search ended before this one was full.
    """
    texts = []
    size = 0
    last = None
    for row in rows:
        text = render(row)
        size += len(text)
        if size > MAX_RESPONSE and texts:
            break
        texts.append(text)
        last = cursor_of(row)
    is_full = size > MAX_RESPONSE or len(texts) == limit
    after = json_string(last if is_full else resume_after)
    members = ','.join(texts)
    return f'{{"{name}":[{members}],"after":{after}}}\n'


def job_cursor(row):
    """The cursor of a page that ends in this job. It stays valid when the job is purged."""
    return f'{CURSOR}{row["seq"]}'


def attempts_json(row, outcome, finished_at, error=None):
    """The last MAX_ATTEMPTS attempts: the recorded ones, and the current one with its outcome."""
    attempt = {
        'attempt': row['attempt'],
        'worker': row['worker'],
        'outcome': outcome,
        'started_at': rfc3339(row['started_at']),
        'finished_at': rfc3339(finished_at),
        'error': error and truncate_middle(error, MAX_ATTEMPT_ERROR),
    }
    recorded = json.loads(row['attempts'] or '[]')
    return encode((recorded + [attempt])[-MAX_ATTEMPTS:])


def size_of(row):
    """Characters of a job in a response, roughly: those of the fields that may be large."""
    size = 500 + row['steps_size']
    for field in ('payload', 'result', 'error', 'progress', 'after'):
        size += len(row[field] or '')
    return size


# The random parts of the ids that this process makes. ID_SERIES belongs to the third group of
# digits. The last two groups are a number that counts up; it begins with RFC 9562's variant bits.
ID_SERIES = random.getrandbits(12)
id_numbers = itertools.count(8 << 60 | random.getrandbits(61))


def new_id(now):
    """A UUID of version 7 (RFC 9562). Each is greater than the last: the index grows at its end."""
    stamp = now // 1000
    number = next(id_numbers)
    return (f'{stamp >> 16:08x}-{stamp & 0xffff:04x}-7{ID_SERIES:03x}-'
            f'{number >> 48:04x}-{number & 0xffffffffffff:012x}')


# -- Jobs: transactions, transitions ---------------------------------------------------------------
class Transaction:
    """One write transaction: its connection and time, and the effects that follow its commit.

    Created for one pass of the event loop and dropped after it. Nothing here is visible to others
    before the commit, and nothing survives a rollback.
    """

    def __init__(self, db, now, response_budget, pauses=()):
        self.db = db
        self.now = now                          # microseconds since 1970, engine time
        self.response_budget = response_budget  # characters of jobs that polls may still claim
        self.pauses = pauses                    # see Pause; oldest first, without outdated ones
        self.takes_jobs = True                  # False: the disk is full
        self.events = []                        # (event, queue, duration or None) for the metrics
        self.log_lines = []
        # ('queue', q), ('job', id) and ('worker', w) whose waiters may find something now
        self.topics = set()
        # (queue, worker or None, hung threads; None: a heartbeat, not a poll)
        self.signs_of_life = []
        self.deprived_workers = set()   # workers from whom a job was taken
        # queues whose polls got nothing for now: they lacked response budget or a rate token, or
        # found expired jobs only
        self.starved = set()
        self.forgotten_queues = []      # that retention deleted
        self.next_deadline = NEVER      # the earliest time at which this makes something due
        self.is_deadline_exact = False  # True: next_deadline holds for the whole database
        self.slice_time = SLICE_TIME    # seconds
        self.slice_ends = None          # time.monotonic() after which paced() ends

    def execute(self, statement, values=()):
        return self.db.execute(statement, values)

    def fetch_one(self, statement, *values):
        return self.db.execute(statement, values).fetchone()

    def fetch_all(self, statement, *values):
        return self.db.execute(statement, values).fetchall()

    def upsert_queue(self, queue, **columns):
        self.db.execute(upsert_queue_statement(tuple(columns)), (queue, *columns.values()))

    def spend(self, size):
        """Take `size` characters of the response budget; Unavailable if it is used up.

        The last job may exceed the rest, so that a large one can be in a response at all. Small
        ones may overdraw the budget by MAX_RESPONSE, so they are refused last.
        """
        lowest = 0 if size > SMALL_MESSAGE_BYTES else -MAX_RESPONSE
        if self.response_budget <= lowest:
            raise Unavailable('too much is being handed out at a time; try again')
        self.response_budget -= size

    def paced(self, items):
        """Yield items until the time slice is over, but at least one.

        All changes of a transaction share one SLICE_TIME, until end_slice(). This bounds how long
        others wait for the transaction.
        """
        self.begin_slice()
        for item in items:
            yield item
            if self.is_slice_over():
                return

    def keep_small(self):
        """Claim and change little: what a transaction writes has to fit into the disk's reserve."""
        self.response_budget = min(self.response_budget, DISK_RESERVE_BYTES // 8)
        self.slice_time = SLICE_TIME / 10

    def begin_slice(self):
        if self.slice_ends is None:
            self.slice_ends = time.monotonic() + self.slice_time

    def end_slice(self):
        """The next change begins a time slice of its own."""
        self.slice_ends = None

    def is_slice_over(self):
        return self.slice_ends is not None and time.monotonic() > self.slice_ends

    def wake_at(self, moment):
        """Lower the next deadline to this time, at which something falls due."""
        if moment < self.next_deadline:
            self.next_deadline = moment

    def wake_polls(self, queue):
        self.topics.add(('queue', queue))


# The clock was set: deadlines that are counted in seconds move with it; times that were given stay.
SHIFT_DEADLINES = (
    # leases
    '''
    UPDATE jobs SET lease_until = lease_until + :by, started_at = started_at + :by,
        updated_at = updated_at + :by
    WHERE status = 'running'
    ''',
    # retries
    f'''
    UPDATE jobs SET next_run_at = next_run_at + :by
    WHERE status = 'pending' AND hold = {DELAYED} AND attempt > 0 AND NOT has_run_at''',
    # a retry that is not the active job of its group
    f'''
    UPDATE jobs INDEXED BY jobs_group_next SET next_run_at = next_run_at + :by
    WHERE "group" IS NOT NULL AND {UNFINISHED} AND hold = {QUEUED_IN_GROUP} AND attempt > 0
        AND NOT has_run_at AND next_run_at > :before''',
    # `expires` of jobs without `run_at`
    '''
    UPDATE jobs SET expires_at = expires_at + :by
    WHERE expires_at IS NOT NULL AND status = 'pending' AND attempt = 0 AND NOT has_run_at''',
    # rates
    'UPDATE queues SET full_at = full_at + :by WHERE rate',
)
# The clock was set back before the start: these come before SHIFT_DEADLINES.
SET_BACK = (
    # jobs that were due stay due
    f'''
    UPDATE jobs SET next_run_at = MIN(next_run_at, :now)
    WHERE status = 'pending' AND next_run_at <= :before
        AND (hold IN ({BLOCKED}, {QUEUED_IN_GROUP})
            OR hold = {DELAYED} AND attempt = 0 AND NOT has_run_at)''',
    # delays, of jobs that may wait for their group, too
    f'''
    UPDATE jobs SET next_run_at = next_run_at + :by
    WHERE status = 'pending' AND hold IN ({DELAYED}, {QUEUED_IN_GROUP}) AND attempt = 0
        AND NOT has_run_at AND next_run_at > :before''',
    # delays and retries of jobs that wait for others
    f'''
    UPDATE jobs SET next_run_at = next_run_at + :by
    WHERE status = 'pending' AND hold = {BLOCKED} AND NOT has_run_at
        AND next_run_at > :before''',
    # times that lie in the future now
    'UPDATE queues SET polled_at = MIN(polled_at, :now), changed_at = MIN(changed_at, :now)',
)
SELECT_DUE = f'''
    SELECT seq, queue FROM jobs WHERE status = 'pending' AND hold = {DELAYED} AND next_run_at <= ?
    ORDER BY next_run_at LIMIT ?'''


HAS_UNRESOLVED_DEPENDENT = f'''
    SELECT 1 FROM dependencies WHERE dependency = ? AND state = {UNRESOLVED} LIMIT 1'''
ACTIVE_IN_GROUP = f'''
    {FIND_JOB} queue = ? AND "group" = ? AND {UNFINISHED} AND hold < {QUEUED_IN_GROUP} LIMIT 1'''
FIRST_IN_GROUP = f'''
    {FIND_JOB} queue = ? AND "group" = ? AND {UNFINISHED} AND hold = {QUEUED_IN_GROUP}
    ORDER BY seq LIMIT 1'''
SELECT_EXPIRED = '''
    SELECT seq FROM jobs WHERE expires_at <= ? AND status = 'pending' AND attempt = 0
    ORDER BY expires_at LIMIT ?'''


class Jobs:
    """The one writer of a job's status, hold, next_run_at and lease_until."""

    def __init__(self, limits):
        self.limits = limits            # constant after start

    def transition(self, tx, call, job, target, next_run_at=None, **changes):
        """Change a job's status: write it, record the event, wake waiters, set the next deadline.

        Raises AssertionError if TRANSITIONS does not allow it. None leaves `next_run_at` as it is.
        """
        rule = self._rule(call, job['status'], target)
        queue = job['queue']
        if job['status'] == 'running':
            self._leave_running(tx, call, job, target, changes)
        if target == 'pending':
            due = job['next_run_at'] if next_run_at is None else next_run_at
            waits_for = changes.get('waits_for', job['waits_for'])
            is_active = job['hold'] != QUEUED_IN_GROUP and job['status'] not in ENDED
            queued = job['group'] is not None and not is_active
            self.set_hold(tx, changes, queue, due, waits_for, queued)
            changes['finished_at'] = None
        else:
            changes['finished_at'] = tx.now
            if job['hold'] != READY:
                changes['hold'] = READY
        changes['status'] = target
        changes['updated_at'] = tx.now
        self._write(tx, job, changes)
        if job['group'] is not None:
            self.advance_group(tx, queue, job['group'])
        if rule.event:
            took = tx.now - job['started_at'] if target == 'done' else None
            tx.events.append((rule.event, queue, took))
        if target in ENDED:
            self.announce_end(tx, job, target)

    def _leave_running(self, tx, call, job, target, changes):
        """An attempt ends: record it in `changes`; tell its worker if the job was taken away."""
        if target != 'done':
            outcome = TRANSITIONS[call].outcome
            changes['attempts'] = attempts_json(job, outcome, tx.now, changes.get('error'))
        if job['queue'] in self.limits.queues:
            tx.wake_polls(job['queue'])
        if call in ('cancel', 'lose'):
            tx.deprived_workers.add(job['worker'])
            tx.topics.add(('worker', job['worker']))

    def _rule(self, call, source, target):
        rule = TRANSITIONS[call]
        if source not in rule.sources or target not in rule.targets:
            raise AssertionError(f'{call} does not lead from {source} to {target}')
        return rule

    def set_hold(self, tx, columns, queue, next_run_at, waits_for=0, queued=False):
        """Set next_run_at and hold of a pending job in `columns`; wake polls or set the deadline.

        With `queued` it stays QUEUED_IN_GROUP: only advance_group() makes it the active job.
        """
        columns['next_run_at'] = next_run_at
        if queued:
            columns['hold'] = QUEUED_IN_GROUP
        elif waits_for:
            columns['hold'] = BLOCKED
        elif next_run_at > tx.now:
            columns['hold'] = DELAYED
            tx.wake_at(next_run_at)
        else:
            columns['hold'] = READY
            tx.wake_polls(queue)

    def advance_group(self, tx, queue, group):
        """Make the right job of a group the active one, after each change of one of its jobs.

        The active job is the running one, else the oldest that has not ended. All others are
        QUEUED_IN_GROUP. This costs two index lookups, however many jobs the group has.
        """
        active = tx.fetch_one(ACTIVE_IN_GROUP, queue, group)
        if active and active['status'] == 'running':
            return
        first = tx.fetch_one(FIRST_IN_GROUP, queue, group)
        if not first:
            return
        if active:
            if active['seq'] < first['seq']:
                return
            self._write_hold(tx, active, queued=True)       # an older job was retried
        self._write_hold(tx, first, queued=False)

    def _write_hold(self, tx, job, queued):
        columns = {}
        self.set_hold(tx, columns, job['queue'], job['next_run_at'], job['waits_for'], queued)
        self._write(tx, job, columns)

    def _write(self, tx, job, columns):
        tx.db.execute(update_statement(tuple(columns)), (*columns.values(), job['seq']))

    def claim(self, tx, claims, columns):
        """Start jobs. `claims` are their new rows as dicts, `columns` the columns that changed."""
        rule = self._rule('poll', 'pending', 'running')
        for claim in claims:
            claim['status'] = 'running'
            tx.events.append((rule.event, claim['queue'], tx.now - claim['next_run_at']))
        self.set_leases(tx, claims, 'status', *columns)

    def set_leases(self, tx, jobs, *columns):
        """Write `lease_until` and other columns of running jobs; each is a dict with its `seq`."""
        columns += ('lease_until',)
        values_of = operator.itemgetter(*columns, 'seq')
        tx.db.executemany(update_statement(columns), map(values_of, jobs))
        tx.wake_at(min(job['lease_until'] for job in jobs))

    def shift_deadlines(self, tx, seconds):
        """The clock was set by this much: move all deadlines that are counted in seconds."""
        by = micros(seconds)
        for statement in SHIFT_DEADLINES:
            tx.execute(statement, {'by': by, 'before': tx.now - by})

    def set_back(self, tx, before):
        """Move deadlines back with the clock; `before` is the time that the last engine reached."""
        by = tx.now - before
        for statement in SET_BACK:
            tx.execute(statement, {'by': by, 'now': tx.now, 'before': before})
        self.shift_deadlines(tx, by / 1000000)

    def promote_due(self, tx):
        """A slice of making those delayed jobs READY whose time has come."""
        for job in tx.paced(tx.fetch_all(SELECT_DUE, tx.now, SLICE_ROWS)):
            tx.execute(f'UPDATE jobs SET hold = {READY} WHERE seq = ?', (job['seq'],))
            tx.wake_polls(job['queue'])

    def expire(self, tx):
        """A slice of cancelling jobs that have not started in time."""
        for seq, in tx.paced(tx.fetch_all(SELECT_EXPIRED, tx.now, SLICE_ROWS)):
            job = tx.fetch_one(FIND_BY_SEQ, seq)
            self.transition(tx, 'expire', job, 'cancelled', error='expired')

    def update(self, tx, job, **columns):
        """Write columns of a job that are not in OWNED_COLUMNS."""
        owned = OWNED_COLUMNS.intersection(columns)
        if owned:
            raise AssertionError(f'{", ".join(owned)}: Jobs has a method that writes it')
        self._write(tx, job, columns)

    def delete(self, tx, job):
        self._require_purgeable(job)
        self.announce_end(tx, job, 'purged')
        tx.execute('DELETE FROM jobs WHERE seq = ?', (job['seq'],))
        if job['group'] is not None:
            self.advance_group(tx, job['queue'], job['group'])

    def _require_purgeable(self, job):
        if job['status'] not in TRANSITIONS['purge'].sources:
            raise AssertionError(f'purge does not lead from {job["status"]}')

    def announce_end(self, tx, job, outcome):
        """Wake calls that wait for the job. Dependencies.resolve() will update its dependents."""
        tx.topics.add(('job', job['id']))
        if tx.fetch_one(HAS_UNRESOLVED_DEPENDENT, job['seq']):
            tx.execute('INSERT OR IGNORE INTO unresolved_ends VALUES (?, ?, ?)',
                       (job['seq'], job['id'], outcome))
            tx.wake_at(tx.now)

    def retry_or_fail(self, tx, call, job, again, error, delay=None, **changes):
        """End an attempt without success: the job is pending after the backoff, or failed."""
        if not again:
            self.transition(tx, call, job, 'failed', error=error, **changes)
            return
        retries = job['retries'] + 1
        wait = micros(BACKOFF * retries ** 2) if delay is None else delay
        self.transition(tx, call, job, 'pending', tx.now + wait, retries=retries, error=error,
                        has_run_at=0, **changes)

    def require_status(self, tx, call, params):
        """(job, True) if the call is possible; (job, False) if it is a replay; else Conflict.

        A replay repeats the call that ended the current attempt, with the same `attempt`.
        """
        job = require(tx.fetch_one(FIND_BY_ID, params['id']), 'id: there is no job', params['id'])
        sources = TRANSITIONS[call].sources
        is_current = params.get('attempt', job['attempt']) == job['attempt']
        if is_current and job['status'] in sources:
            return job, True
        if is_current and 'attempt' in params and last_outcome(job) == TRANSITIONS[call].outcome:
            return job, False
        if job['status'] in sources:
            raise Conflict(f'attempt: {params["attempt"]} is over, '
                           f'the job is running as attempt {job["attempt"]}')
        raise Conflict(f'id: the job is {job["status"]}, so {call} is not possible')


def last_outcome(job):
    """How the job's last attempt ended; '' if none has ended."""
    if job['status'] == 'done':
        return 'done'
    attempts = json.loads(job['attempts'] or '[]')
    return attempts[-1]['outcome'] if attempts else ''


# -- Jobs: producers -------------------------------------------------------------------------------
# the outcome of an item of an enqueue
CREATED = 'created'
EXISTING = 'existing'           # its id or key is taken
REPLACED = 'replaced'           # a pending job had its key, and got its values
CREATED_MEMBERS = {             # members that are appended to the job in the answer
    CREATED: ',"created":true',
    EXISTING: ',"created":false',
    REPLACED: ',"created":false,"replaced":true',
}
REPLACED_COLUMNS = ('payload', 'tag', 'priority', 'timeout', 'max_retries', 'key_until',
                    'expires_at', 'has_run_at')


DISK_IS_FULL = ('the disk is full: no jobs are added until there is room; '
                'completing and purging jobs is possible')


class Producers:
    """POST /enqueue."""

    def __init__(self, jobs, dependencies, workers):
        # constant after start
        self.jobs = jobs
        self.dependencies = dependencies
        self.workers = workers

    def enqueue(self, tx, items):
        """Add the jobs, all or none: a list of (row, CREATED, EXISTING or REPLACED)."""
        if not tx.takes_jobs:
            raise Unavailable(DISK_IS_FULL)
        self._require_few_dependencies(items)
        rows = [self._new_row(tx, item) for item in items]
        fields = INSERTING_FIELDS.intersection(itertools.chain.from_iterable(items))
        jobs = []
        budget = tx.response_budget
        aliases = {}        # id in the request -> id of the job that holds its key
        while len(jobs) < len(rows):
            left = len(rows) - len(jobs)
            # a power of two: so there are few different statements, and insert_plan() knows them
            count = min(ROWS_PER_INSERT, 1 << (left.bit_length() - 1))
            try:
                jobs += self._insert(tx, rows[len(jobs):len(jobs) + count], fields, aliases)
            except Unavailable:
                if len(rows) > 1 and tx.response_budget < budget:       # this request used it up
                    raise PayloadTooLarge(
                        'jobs: the existing ones are too large for one answer; '
                        'send fewer at a time') from None
                raise
        if 'group' in fields:
            groups = {(row['queue'], row['group']) for row in rows if row['group'] is not None}
            for queue, group in groups:
                self.jobs.advance_group(tx, queue, group)
        return jobs

    def _require_few_dependencies(self, items):
        if len(items) == 1:
            return
        named = sum(len(item['after']) for item in items if 'after' in item)
        if named > MAX_DEPENDENCIES:
            raise PayloadTooLarge(
                f'jobs: their `after` names more than {MAX_DEPENDENCIES} jobs in all; '
                'send fewer at a time')

    def _new_row(self, tx, item):
        row = JOB_DEFAULTS.copy()
        row.update(item)
        row['id'] = item.get('id') or new_id(tx.now)
        row['created_at'] = row['updated_at'] = tx.now
        due = tx.now + item.get('delay', 0)
        expiry_counts_from = tx.now
        if 'run_at' in item:
            due = expiry_counts_from = item['run_at']
            row['has_run_at'] = 1
        if 'expires' in item:
            row['expires_at'] = min(expiry_counts_from + item['expires'], LATEST_TIME)
            tx.wake_at(row['expires_at'])       # if it has passed, Jobs.expire() cancels the job
        # enqueue() makes the right job of the group the active one, once all are inserted
        self.jobs.set_hold(tx, row, row['queue'], due, queued=row['group'] is not None)
        return row

    def _insert(self, tx, rows, fields, aliases):
        """Insert the rows in one statement, which is twice as fast.

        If one has `after`, or its job exists already, insert them one by one.
        """
        if all(row['after'] is None for row in rows):
            statement, values_of = insert_plan(len(rows), fields)
            values = list(itertools.chain.from_iterable(map(values_of, rows)))
            try:
                tx.execute(statement, values)
            except sqlite3.IntegrityError:      # one exists already
                pass
            else:
                tx.events += [('enqueued', row['queue'], None) for row in rows]
                return [(row, CREATED) for row in rows]
        if len(rows) == 1:
            return [self._insert_one(tx, rows[0], aliases)]
        jobs = []
        for row in rows:
            jobs += self._insert(tx, [row], fields, aliases)
        return jobs

    def _insert_one(self, tx, row, aliases):
        """The existing job with the id or key of the row; else the row, inserted with `after`."""
        existing = tx.fetch_one(SELECT_JOB + 'id = ?', row['id'])
        if existing:
            tx.spend(size_of(existing))
            return existing, EXISTING
        existing = tx.fetch_one(JOB_WITH_KEY, row['queue'], row['key'])
        if existing:
            tx.spend(size_of(existing))
            aliases[row['id']] = existing['id']
            if row.get('replace'):
                return self._replace(tx, existing, row)
            return existing, EXISTING
        row['after'] = list(dict.fromkeys(aliases.get(id, id) for id in row['after']))
        return self.dependencies.insert(tx, row), CREATED

    def _replace(self, tx, existing, row):
        """Give the job that holds the key the values of the row, unless it has started."""
        if existing['status'] != 'pending' or existing['attempt']:
            return existing, EXISTING
        if row['group'] not in (None, existing['group']):
            raise Conflict('group: the pending job with this key is not in this group; replace '
                           'does not move it')
        values = {field: row[field] for field in REPLACED_COLUMNS}
        self.jobs.transition(tx, 'replace', existing, 'pending', row['next_run_at'], **values)
        return tx.fetch_one(SELECT_JOB + 'seq = ?', existing['seq']), REPLACED

    def render_created(self, jobs):
        """The result of enqueue() as JSON texts, with a warning if nobody ever polled the queue."""
        last_polled = self.workers.last_polled
        first = jobs[0][0]['queue']
        # comparing names takes time: only one queue of a request gets a hint
        known = () if first in last_polled else tuple(last_polled)[-20:]
        texts = []
        for row, outcome in jobs:
            more = CREATED_MEMBERS[outcome]
            queue = row['queue']
            if outcome is CREATED and queue not in last_polled:
                warning = no_worker_warning(queue, known if queue == first else ())
                more += f',"warning":{json_quote(warning)}'
            texts.append(job_json(row, more))
        return texts


@functools.lru_cache(maxsize=1024)
def no_worker_warning(queue, known):
    """The warning that no worker polls the queue; a similar name among the `known` is a hint."""
    names = [name for name in known if abs(len(name) - len(queue)) < 4 and len(name) <= 40]
    near = difflib.get_close_matches(queue, names, 1)
    hint = f'; did you mean {describe(near[0])}?' if near else ''
    return f'no worker has ever polled the queue {describe(queue)}{hint}'


# -- Jobs: claims ----------------------------------------------------------------------------------
SELECT_STEP = 'SELECT result FROM steps WHERE job = ? AND name = ?'
SELECT_LOST = '''
    SELECT seq FROM jobs WHERE status = 'running' AND lease_until <= ?
    ORDER BY lease_until LIMIT ?'''


class Claims:
    """The calls of workers: poll, and the calls that end, extend or use a claim."""

    def __init__(self, jobs, limits, workers):
        # constant after start
        self.jobs = jobs
        self.limits = limits
        self.workers = workers

    def poll(self, tx, params):
        """Claim jobs; their new rows, as many as the response budget allows, but at least one."""
        queue = params['queue']
        if tx.response_budget <= 0 and not params.get('wait'):
            raise Unavailable('too much is being handed out at a time; try again')
        self._record_poll(tx, queue, params)
        if tx.response_budget <= 0:     # run_due() wakes its waiters again a moment later
            tx.starved.add(queue)
            tx.wake_at(tx.now + micros(STARVED_POLL_INTERVAL))
            return []
        limit = self.limits.claimable(tx, queue, params.get('limit', 1))
        if not limit:
            return []
        changes = {
            'worker': params.get('worker'),
            'lease': params.get('lease'),
            'started_at': tx.now,
            'updated_at': tx.now,
            'worker_timeout': params.get('timeout'),
            'worker_max_retries': params.get('max_retries'),
        }
        claims = self._select_claims(tx, queue, limit, changes)
        if claims:
            self.jobs.claim(tx, claims, (*changes, 'attempt'))
            self.limits.take_tokens(tx, queue, len(claims))
            self._prepare_claims(tx, claims)
        return claims

    def _select_claims(self, tx, queue, limit, changes):
        """Due jobs as the rows that they will be once claimed. Expired ones are cancelled."""
        rows = tx.execute(CLAIM, {'queue': queue, 'limit': limit})
        expired = []        # their seqs
        claims = self._within_budget(tx, rows, changes, expired)
        for seq in tx.paced(expired):
            job = tx.fetch_one(FIND_BY_SEQ, seq)
            self.jobs.transition(tx, 'expire', job, 'cancelled', error='expired')
        if expired and not claims:
            # others may be due behind them: try again after the next slice of Jobs.expire()
            tx.starved.add(queue)
            tx.wake_at(tx.now)
        return claims

    def _prepare_claims(self, tx, claims):
        """Release keys that are held until the start, and add the steps of earlier attempts."""
        for claim in claims:
            if claim['key_until'] == 'start' and claim['key'] is not None:
                claim['released_key'] = claim['key']
                claim['key'] = None
                self.jobs.update(tx, claim, key=None, released_key=claim['released_key'])
            if claim['steps']:
                claim['steps_json'] = steps_json(tx.db, claim)

    def _record_poll(self, tx, queue, params):
        """Record a sign of life. `polled_at` is stored once a minute; Workers knows it exactly."""
        span = micros(POLL_TIME_RESOLUTION)
        if self.workers.last_polled.get(queue, 0) // span != tx.now // span:
            tx.upsert_queue(queue, polled_at=tx.now)
        tx.signs_of_life.append((queue, params.get('worker'), params.get('hung', 0)))

    def _within_budget(self, tx, rows, changes, expired):
        """The rows as they will be once claimed, as many as the response budget allows.

        Expired jobs are left out; their seqs go to the list `expired`.
        """
        claims = []
        for row in rows:
            claim = dict(zip(CLAIMED_COLUMNS, row))     # five times as fast as dict(row)
            expires_at = claim['expires_at']
            if expires_at is not None and expires_at <= tx.now and not claim['attempt']:
                expired.append(claim['seq'])
                tx.begin_slice()
                if tx.is_slice_over():
                    break
                continue
            size = size_of(claim)
            if claims and size > tx.response_budget:
                break
            tx.response_budget -= size
            claim.update(changes)
            claim['attempt'] += 1
            claim['lease_until'] = latest_lease(claim, tx.now)
            if claim['lease']:
                claim['lease_until'] = min(claim['lease_until'], tx.now + claim['lease'])
            claims.append(claim)
        return claims

    def apply_item(self, tx, method, item):
        """The result of the method for an item of a batch; an HTTPError becomes a result."""
        if isinstance(item, HTTPError):     # validate_batch() has refused it
            return refusal_json(item, item.id)
        try:
            return method(tx, item)
        except HTTPError as error:
            return refusal_json(error, item.get('id'))

    def complete(self, tx, params):
        job, is_new = self.jobs.require_status(tx, 'complete', params)
        if is_new:
            result = params.get('result')
            self.jobs.transition(tx, 'complete', job, 'done', result=result, error=None)
        return {'id': job['id'], 'status': 'done'}

    def release(self, tx, params):
        job, is_new = self.jobs.require_status(tx, 'release', params)
        if is_new:
            # it was due, even if the clock was set back since
            due = min(job['next_run_at'], tx.now)
            self.jobs.transition(tx, 'release', job, 'pending', due)
        return {'id': job['id'], 'status': 'pending'}

    def fail(self, tx, params):
        job, is_new = self.jobs.require_status(tx, 'fail', params)
        if is_new:
            again = params.get('retry', True) and job['retries'] < max_retries_of(job)
            self.jobs.retry_or_fail(
                tx, 'fail', job, again, params.get('error'), params.get('delay'))
            job = tx.fetch_one(FIND_BY_ID, params['id'])
        return {
            'id': job['id'],
            'status': job['status'],
            'retries': job['retries'],
            'next_run_at': rfc3339(job['next_run_at']),
        }

    def heartbeat(self, tx, params):
        job, _ = self.jobs.require_status(tx, 'heartbeat', params)
        changes = {'progress': params['progress']} if 'progress' in params else {}
        self._keep(tx, job, **changes)
        return {'id': job['id'], 'status': 'running'}

    def step(self, tx, params):
        """Store the result of a step; the first under a name stays. Returns JSON text."""
        job, _ = self.jobs.require_status(tx, 'step', params)
        name = params['name']
        known = tx.fetch_one(SELECT_STEP, job['seq'], name)
        result = known['result'] if known else params.get('result', 'null')
        if known:
            tx.spend(len(result))
            self._keep(tx, job)
        else:
            self._add_step(tx, job, name, result)
        created = encode(not known)
        return (f'{{"id":{json_quote(job["id"])},"name":{json_quote(name)},"created":{created},'
                f'"result":{result}}}')

    def _add_step(self, tx, job, name, result):
        size = job['steps_size'] + len(name) + len(result)
        if job['steps'] >= MAX_STEPS:
            raise PayloadTooLarge(f'name: the job has {MAX_STEPS} steps already')
        if size > MAX_STEPS_SIZE:
            raise PayloadTooLarge(
                f'result: the steps of the job exceed {MAX_STEPS_SIZE} characters')
        tx.execute('INSERT INTO steps (job, name, position, result) VALUES (?, ?, ?, ?)',
                   (job['seq'], name, job['steps'], result))
        self._keep(tx, job, steps=job['steps'] + 1, steps_size=size)

    def _keep(self, tx, job, **changes):
        """Extend the lease after a sign of life, and write `changes` to the job."""
        changes['updated_at'] = tx.now
        until = min(tx.now + (job['lease'] or 0), latest_lease(job, job['started_at']))
        until = max(until, job['lease_until'])
        self.jobs.set_leases(tx, [dict(changes, seq=job['seq'], lease_until=until)], *changes)
        if job['worker']:
            tx.signs_of_life.append((job['queue'], job['worker'], None))

    def lose_overdue(self, tx):
        """A slice of the leases that are over: a pause extends one, or its attempt ends."""
        overdue = tx.fetch_all(SELECT_LOST, tx.now, SLICE_ROWS)
        handled = 0
        for seq, in tx.paced(overdue):
            handled += 1
            job = tx.fetch_one(FIND_BY_SEQ, seq)
            lease_until = extended_lease(job, tx.pauses)
            if lease_until > tx.now:
                self.jobs.set_leases(tx, [{'seq': seq, 'lease_until': lease_until}])
            else:
                self._lose(tx, job)
        # no other lease is over, so pauses whose grace has passed cannot extend any more
        if handled == len(overdue) < SLICE_ROWS:
            tx.pauses = tuple(
                pause for pause in tx.pauses if pause.ended_at + micros(GRACE) > tx.now)

    def _lose(self, tx, job):
        again = job['retries'] < max_retries_of(job) or job['losses'] < MAX_LOSSES
        self.jobs.retry_or_fail(tx, 'lose', job, again, 'worker lost', losses=job['losses'] + 1)
        worker = 'a worker without a name'
        if job['worker'] is not None:
            worker = f'worker {describe(job["worker"])}'
        tx.log_lines.append(
            f'job {describe(job["id"])} (queue {describe(job["queue"])}, '
            f'attempt {job["attempt"]}): {worker} lost, {"given back" if again else "failed"}')


class Pause(NamedTuple):
    """A time in which no heartbeat could be received.

    It extends leases, but only once they are over: so it costs nothing, however many jobs run.
    """

    ended_at: int       # engine time
    length: int         # microseconds


def with_pause(pauses, ended_at, seconds):
    """The pauses and one that has just ended. It makes the shorter ones before it redundant."""
    length = micros(min(seconds, 1e9))
    longer = [pause for pause in pauses if pause.length > length]
    return (*longer, Pause(ended_at, length))


def extended_lease(job, pauses):
    """When the lease ends: one that was overdue after a pause gets one more period.

    Any other lasts at least GRACE beyond the pause. A lease of twice the pause or more is not
    extended: heartbeats are so frequent that one arrives after the pause in time.
    """
    lease_until = job['lease_until']
    longest = job['lease'] or timeout_of(job) + micros(GRACE)
    for pause in pauses:
        if job['started_at'] < pause.ended_at and longest < 2 * pause.length:
            is_overdue = lease_until <= pause.ended_at
            period = max(micros(GRACE), job['lease'] or 0) if is_overdue else micros(GRACE)
            lease_until = max(lease_until, pause.ended_at + period)
    return lease_until


def refusal_json(error, id):
    return {'id': id, 'error': str(error), 'code': error.status}


def latest_lease(job, started_at):
    """When a claim expires even with heartbeats."""
    return started_at + timeout_of(job) + micros(GRACE)


# -- Jobs: dependencies ----------------------------------------------------------------------------
# the column `state` of a dependency, by what became of the job depended on
DEPENDENCY_STATE = {'done': SUCCEEDED, 'failed': FAILED, 'cancelled': FAILED, 'purged': FAILED}
SET_DEPENDENCY_STATE = 'UPDATE dependencies SET state = ? WHERE dependent = ? AND position = ?'
NEXT_UNRESOLVED = f'''
    SELECT job AS seq, id, outcome AS status, dependent, position
    FROM unresolved_ends LEFT JOIN dependencies ON dependency = job AND state = {UNRESOLVED}
    LIMIT 1'''
INFORMED_DEPENDENTS = '''
    SELECT dependent, position FROM dependencies WHERE dependency = ? AND state > 0 LIMIT ?'''
DEPENDENCIES_OF = '''
    SELECT dependencies.*, id, status FROM dependencies LEFT JOIN jobs ON seq = dependency
    WHERE dependent = ? ORDER BY position'''


class Dependencies:
    """`after` of jobs, and the effect of a job's end on its dependents."""

    def __init__(self, jobs):
        self.jobs = jobs        # constant after start

    def insert(self, tx, row):
        """Insert the row of a job with `after`, and its dependencies. Returns all its columns."""
        dependencies = [
            require(tx.fetch_one(FIND_BY_ID, id), 'after: there is no job', id, BadRequest)
            for id in row['after']]
        states = [DEPENDENCY_STATE.get(job['status'], 0) for job in dependencies]
        if row['group'] is None:
            row['hold'] = BLOCKED
        statement, values_of = insert_plan(1)
        seq = tx.execute(statement, values_of(row)).lastrowid
        self.jobs.update(tx, {'seq': seq}, after=encode(row['after']),
                         after_any=bool(row['after_any']))
        tx.db.executemany('INSERT INTO dependencies VALUES (?, ?, ?, ?)', [
            (seq, position, job['seq'], state)
            for position, (job, state) in enumerate(zip(dependencies, states))])
        tx.events.append(('enqueued', row['queue'], None))
        job = tx.fetch_one(FIND_BY_SEQ, seq)
        # sets its hold: the dependencies may have ended
        self.jobs.transition(tx, 'unblock', job, 'pending', waits_for=states.count(0))
        if FAILED in states and not job['after_any']:
            self._cancel_dependent(tx, job, dependencies[states.index(FAILED)])
        return tx.fetch_one(SELECT_JOB + 'seq = ?', seq)

    def _cancel_dependent(self, tx, job, dependency):
        self.jobs.transition(tx, 'cancel', job, 'cancelled', error=self._reason(dependency))

    def resolve(self, tx):
        """A slice of updating the dependents of jobs that have ended."""
        for _ in tx.paced(range(SLICE_ROWS)):
            end = tx.fetch_one(NEXT_UNRESOLVED)
            if not end:
                break
            if end['dependent']:
                self._dependency_ended(tx, end)
            else:
                tx.execute('DELETE FROM unresolved_ends WHERE job = ?', (end['seq'],))

    def _dependency_ended(self, tx, end):
        """A dependency has ended: its dependent is unblocked or cancelled, or waits for more."""
        state = DEPENDENCY_STATE[end['status']]
        tx.execute(SET_DEPENDENCY_STATE, (state, end['dependent'], end['position']))
        job = tx.fetch_one(FIND_BY_SEQ, end['dependent'])
        # it was cancelled, or was unblocked before the dependency was retried
        if job['status'] != 'pending' or not job['waits_for']:
            return
        if state != SUCCEEDED and not job['after_any']:
            self._cancel_dependent(tx, job, end)
            return
        waits_for = job['waits_for'] - 1
        if not waits_for and job['after_any']:
            waits_for = self.recheck(tx, job)       # one may have been retried, see reopen()
        due = max(tx.now, job['next_run_at'])
        self.jobs.transition(tx, 'unblock', job, 'pending', due, waits_for=waits_for)

    def recheck(self, tx, job):
        """Set the state of all dependencies again; returns how many have not ended.

        Conflict if one failed, and the job needs all of them to succeed.
        """
        dependencies = tx.fetch_all(DEPENDENCIES_OF, job['seq'])
        states = [self._current_state(dependency) for dependency in dependencies]
        if FAILED in states and not job['after_any']:
            raise Conflict('id: ' + self._reason(dependencies[states.index(FAILED)]))
        tx.db.executemany(SET_DEPENDENCY_STATE, [
            (state, job['seq'], dependency['position'])
            for state, dependency in zip(states, dependencies)])
        return states.count(0)

    def _current_state(self, dependency):
        """The state by the job's status now; of a purged job the stored one, else FAILED."""
        if dependency['id'] is None:
            return dependency['state'] or FAILED
        return DEPENDENCY_STATE.get(dependency['status'], 0)

    def _reason(self, dependency):
        if dependency['id'] is None:
            return 'it waits for a job that is purged'
        return f'it waits for the job {describe(dependency["id"])}, which is {dependency["status"]}'

    def reopen(self, tx, job):
        """An ended job is retried: its dependents that are still blocked wait for it again.

        A slice of them is updated here; the others notice by recheck().
        """
        tx.execute('DELETE FROM unresolved_ends WHERE job = ?', (job['seq'],))
        informed = tx.fetch_all(INFORMED_DEPENDENTS, job['seq'], SLICE_ROWS)
        for dependent, position in tx.paced(informed):
            tx.execute(SET_DEPENDENCY_STATE, (0, dependent, position))
            waiting = tx.fetch_one(FIND_BY_SEQ, dependent)
            if waiting['status'] == 'pending' and waiting['waits_for']:
                self.jobs.update(tx, waiting, waits_for=waiting['waits_for'] + 1)


# -- Jobs: limits ----------------------------------------------------------------------------------
def bucket_full_at(queue, now):
    """When the token bucket is full again.

    Each claim delays that by per / rate: the theoretical arrival time of the generic cell rate
    algorithm (GCRA). It is at most `per` from now: a clock that was set back leaves `full_at` far
    ahead.
    """
    return min(max(queue['full_at'], now), now + queue['per'])


def tokens(queue, now):
    return (now + queue['per'] - bucket_full_at(queue, now)) * queue['rate'] // queue['per']


def round_up_division(dividend, divisor):
    return -(-dividend // divisor)


def next_token(queue, now):
    """When an empty bucket gets its next token."""
    token = round_up_division(queue['per'], queue['rate'])
    return bucket_full_at(queue, now) - queue['per'] + token


class Limits:
    """max_running and rate of queues: how many jobs a poll may claim at the moment."""

    def __init__(self, queues):
        # touched by the loop's thread only: queues that have a limit, or had one since the start
        self.queues = queues

    def set(self, tx, params):
        """Set or remove limits of a queue; returns all its limits."""
        queue = params['queue']
        known = tx.fetch_one(SELECT_QUEUE, queue)
        limits = {limit: known[limit] if known else None for limit in LIMITS}
        limits.update((limit, params[limit]) for limit in LIMITS if limit in params)
        if limits['rate'] is None:
            if params.get('per') is not None:
                raise BadRequest('per needs a rate')
            limits['per'] = None
        elif limits['per'] is None:
            limits['per'] = micros(1)
        tx.upsert_queue(queue, **limits)
        self.queues.add(queue)
        tx.wake_polls(queue)
        return {'queue': queue, **limits, 'per': as_seconds(limits['per'])}

    def claimable(self, tx, queue, wanted):
        """How many jobs a poll may claim, at most `wanted`. An empty bucket sets a deadline."""
        limits = tx.fetch_one(SELECT_QUEUE, queue) if queue in self.queues else None
        if not limits:
            return wanted
        if limits['max_running'] is not None:
            wanted = min(wanted, max(0, limits['max_running'] - limits['running']))
        if not wanted or limits['rate'] is None:
            return wanted
        allowed = min(wanted, tokens(limits, tx.now))
        if not allowed:
            self._wake_when_tokens(tx, limits)
        return allowed

    def _wake_when_tokens(self, tx, limits):
        # stored, so that the bucket fills even if the clock was set back
        tx.upsert_queue(limits['queue'], full_at=bucket_full_at(limits, tx.now))
        tx.starved.add(limits['queue'])
        tx.wake_at(next_token(limits, tx.now))

    def take_tokens(self, tx, queue, count):
        """Take `count` tokens out of the queue's bucket, if it has one."""
        if queue not in self.queues:
            return
        limits = tx.fetch_one(SELECT_QUEUE, queue)
        if limits['rate']:
            span = round_up_division(count * limits['per'], limits['rate'])
            tx.upsert_queue(queue, full_at=bucket_full_at(limits, tx.now) + span)


# -- Jobs: schedules -------------------------------------------------------------------------------
COPIED_COLUMNS = columns_where(lambda column: column.copied, SCHEDULE_COLUMNS)
SCHEDULE_FIELDS = ('name', *COPIED_COLUMNS, 'cron', 'every', 'zone')
SCHEDULE_DEFAULTS = {name: column.default for name, column in SCHEDULE_COLUMNS.items()}
SELECT_SCHEDULE = f'SELECT {column_list(SCHEDULE_COLUMNS)} FROM schedules '
# A tick does not read the payload, which may have 8 MiB: COPY_PAYLOAD copies it within SQLite.
SMALL_SCHEDULE_COLUMNS = columns_where(lambda column: not column.large, SCHEDULE_COLUMNS)
SMALL_COPIED_COLUMNS = [name for name in COPIED_COLUMNS if name in SMALL_SCHEDULE_COLUMNS]
SELECT_FOR_TICK = f'SELECT {column_list(SMALL_SCHEDULE_COLUMNS)} FROM schedules WHERE name = ?'
# The clock was set back, so the next tick is further away than two ticks ever are.
STOPPED_SCHEDULES = 'FROM schedules WHERE next_run_at > ? + every'
HAS_STOPPED_SCHEDULE = f'SELECT EXISTS (SELECT 1 {STOPPED_SCHEDULES})'
SELECT_STOPPED_SCHEDULES = f'SELECT {column_list(SMALL_SCHEDULE_COLUMNS)} {STOPPED_SCHEDULES}'
COPY_PAYLOAD = '''
    UPDATE jobs SET payload = (SELECT payload FROM schedules WHERE name = :schedule)
    WHERE id = :id'''
REPLACE_SCHEDULE = (f'REPLACE INTO schedules ({column_list(SCHEDULE_COLUMNS)}) '
                    f'VALUES (:{", :".join(SCHEDULE_COLUMNS)})')


def tick_id(name, tick):
    """The id of the job that a tick of the schedule makes."""
    return f'{name}@{rfc3339(tick)[:19]}Z'


class Schedules:
    """Schedules, and the jobs that their ticks make."""

    def __init__(self, producers):
        self.producers = producers      # constant after start

    def schedule(self, tx, wanted):
        """Create or change a schedule: (row, created). The same one again changes nothing."""
        row = tx.fetch_one(SELECT_SCHEDULE + 'WHERE name = ?', wanted['name'])
        if row and all(row[field] == wanted[field] for field in SCHEDULE_FIELDS):
            return row, False
        schedule = {**SCHEDULE_DEFAULTS, **dict(row or {}), **wanted}
        schedule['next_run_at'] = first_tick(wanted, tx.now)
        tx.execute(REPLACE_SCHEDULE, schedule)
        tx.wake_at(schedule['next_run_at'])
        return schedule, not row

    def unschedule(self, tx, params):
        deleted = tx.execute('DELETE FROM schedules WHERE name = ?', (params['name'],)).rowcount
        return {'count': deleted}

    def run_due(self, tx):
        """A slice of making the jobs of ticks that are due. On a full disk they stay due."""
        if not tx.takes_jobs:
            return
        due = tx.fetch_all('SELECT name FROM schedules WHERE next_run_at <= ? ORDER BY next_run_at '
                           'LIMIT ?', tx.now, SLICE_ROWS)
        for name, in tx.paced(due):
            self._tick(tx, tx.fetch_one(SELECT_FOR_TICK, name))

    def set_back(self, tx):
        """The clock was set back: no schedule with `every` waits for longer than that."""
        waiting = tx.fetch_all(SELECT_STOPPED_SCHEDULES, tx.now)
        for row in waiting:
            tick = first_tick(row, tx.now)
            # the clock shows this time again, so the tick's id may be taken
            while tx.fetch_one(FIND_BY_ID, tick_id(row['name'], tick)):
                tick += micros(1)
            tx.execute('UPDATE schedules SET next_run_at = ? WHERE name = ?', (tick, row['name']))

    def _tick(self, tx, row):
        """Make the job of the last tick that is due, and set the next one."""
        try:
            tick, upcoming = last_tick(row, tx.now)
        except BadRequest as error:     # the database came from a machine that knew the zone
            tick = row['next_run_at']
            upcoming = tx.now + micros(3600)
            tx.log_lines.append(
                f'schedule {describe(row["name"])}: {error}; its next job is made in an hour')
        changes = {'next_run_at': upcoming, 'last_run_at': tick}
        id = tick_id(row['name'], tick)
        if self._add_job(tx, row, id):
            changes['last_id'] = id
        else:
            changes['skipped'] = row['skipped'] + 1
        columns = ', '.join(f'{column} = ?' for column in changes)
        tx.execute(f'UPDATE schedules SET {columns} WHERE name = ?',
                   (*changes.values(), row['name']))

    def _add_job(self, tx, row, id):
        """Add a job of the schedule. False if there is one with its key or id."""
        item = {field: row[field] for field in SMALL_COPIED_COLUMNS if row[field] is not None}
        item['id'] = id
        budget = tx.response_budget
        tx.response_budget = MAX_RESPONSE       # the job goes into no response
        (job, outcome), = self.producers.enqueue(tx, [item])
        tx.response_budget = budget
        if outcome is CREATED:
            tx.execute(COPY_PAYLOAD, {'schedule': row['name'], 'id': id})
            return True
        if job['id'] == id:
            tx.log_lines.append(f'schedule {describe(row["name"])}: its tick makes no job, '
                                f'the id {describe(id)} is taken')
        return False


# -- Jobs: operators -------------------------------------------------------------------------------
FILTERS = {     # of GET /jobs, and of the calls that change many jobs
    **{name: f'"{name}" = :{name}' for name, column in JOB_COLUMNS.items() if column.filter},
    # the plus keeps SQLite from using jobs_finished: pages are in the order of seq
    'status': '+status = :status',
    'search': (
        '(' + ' OR '.join(f"{column} LIKE :text ESCAPE '!'"
                          for column in ('id', 'tag', 'error', 'payload', 'result'))
        # texts in JSON are kept in ASCII, with escapes
        + " OR payload LIKE :escaped ESCAPE '!' OR result LIKE :escaped ESCAPE '!')"),
    # from here on the values are seqs of jobs
    'after': 'seq < :after',
    'beyond': 'seq > :beyond',
    'needed_by': 'dependent = :needed_by',
    'needs': 'seq IN (SELECT dependent FROM dependencies WHERE dependency = :needs)',
    'after_position': ('position > (SELECT position FROM dependencies '
                       'WHERE dependent = :needed_by AND dependency = :after_position)'),
}


def like_pattern(text):
    return '%' + re.sub('([%_!])', r'!\1', text) + '%'


def where_clause(params):
    found = [condition for field, condition in FILTERS.items() if field in params]
    return 'WHERE ' + ' AND '.join(found) if found else ''


class Operators:
    """The calls of operators. Those in `changes` also take many jobs at once."""

    def __init__(self, database, jobs, dependencies, claims):
        # constant after start
        self.claims = claims
        self.database = database
        self.jobs = jobs
        self.dependencies = dependencies
        self.changes = {'cancel': self.cancel, 'retry': self.retry, 'purge': self.purge}

    def cancel(self, tx, job):
        self.jobs.transition(tx, 'cancel', job, 'cancelled')

    def retry(self, tx, job):
        waits_for = self.dependencies.recheck(tx, job)
        try:
            self.jobs.transition(tx, 'retry', job, 'pending', tx.now, retries=0, losses=0,
                                 waits_for=waits_for, expires_at=None, has_run_at=0)
        except sqlite3.IntegrityError:
            raise Conflict('key: another job with the same key is pending or running in the '
                           'queue') from None
        self.dependencies.reopen(tx, job)

    def purge(self, tx, job):
        self.jobs.delete(tx, job)

    def reschedule(self, tx, params):
        """Change when a pending job is due, or its priority."""
        job, _ = self.jobs.require_status(tx, 'reschedule', params)
        changes = {'priority': params['priority']} if 'priority' in params else {}
        due = job['next_run_at']
        if 'run_at' in params:
            due = params['run_at']
            changes['has_run_at'] = 1
        elif 'delay' in params:
            due = tx.now + params['delay']
            changes['has_run_at'] = 0
        self.jobs.transition(tx, 'reschedule', job, 'pending', due, **changes)
        return {'id': job['id'], 'status': 'pending', 'next_run_at': rfc3339(due),
                'priority': changes.get('priority', job['priority'])}

    def pause(self, tx, params):
        return self._set_paused(tx, params['queue'], True)

    def resume(self, tx, params):
        return self._set_paused(tx, params['queue'], False)

    def _set_paused(self, tx, queue, paused):
        tx.upsert_queue(queue, paused=paused)
        tx.wake_polls(queue)
        return {'queue': queue, 'paused': paused}

    def change_items(self, tx, call, items):
        """A slice of a call over jobs named one by one: (results, items that are left)."""
        results = []
        apply_one = functools.partial(self.change_item, call=call)
        for item in tx.paced(items):
            results.append(self.claims.apply_item(tx, apply_one, item))
        return results, items[len(results):]

    def change_item(self, tx, params, call):
        """Run the call for the job `id`; Conflict if its status forbids that."""
        if 'id' not in params or len(params) > 1:
            raise BadRequest('id is needed, and stands alone')
        job, _ = self.jobs.require_status(tx, call, params)
        self.changes[call](tx, job)
        targets = TRANSITIONS[call].targets
        return {'id': params['id'], 'status': targets[0] if targets else 'purged'}

    def matching_seqs(self, params):
        """Yield the seqs of the jobs that a large change applies to, in batches.

        A reader finds them, so that the writer is not held up. Seqs, because the id of a deleted
        job may be enqueued again meanwhile.
        """
        params = {**params, 'beyond': 0, 'rows': SLICE_ROWS}
        query = f'SELECT seq FROM jobs {where_clause(params)} ORDER BY seq LIMIT :rows'
        while True:
            with self.database.reading() as db:
                seqs = [seq for seq, in db.execute(query, params)]
            if not seqs:
                return
            params['beyond'] = seqs[-1]
            yield seqs

    def change_slice(self, tx, method, seqs, statuses):
        """A slice of calling the method with those jobs that still have one of the statuses.

        Returns (how many were changed, the seqs that are left).
        """
        changed = 0
        handled = 0
        for seq in tx.paced(seqs):
            handled += 1
            job = tx.fetch_one(FIND_BY_SEQ, seq)
            if job and job['status'] in statuses:
                with contextlib.suppress(Conflict):
                    method(tx, job)
                    changed += 1
        return changed, seqs[handled:]


# -- Jobs: retention -------------------------------------------------------------------------------
NEXT_ENDED = '''
    SELECT finished_at, seq FROM jobs
    WHERE status = ? AND finished_at <= ? AND (finished_at, seq) > (?, ?)
    ORDER BY finished_at, seq LIMIT ?'''
NEXT_DEPENDENTS = '''
    SELECT dependent, jobs.status IN ('pending', 'running') AS is_unfinished
    FROM dependencies JOIN jobs ON jobs.seq = dependent
    WHERE dependency = ? AND state = ? AND dependent > ? ORDER BY dependent LIMIT ?'''
SELECT_IS_UNUSED = '''
    SELECT queue, pending + running + done + failed + cancelled = 0 AND NOT paused
        AND max_running IS NULL AND rate IS NULL AND COALESCE(polled_at, 0) < ?
    FROM queues'''
NEXT_QUEUES = SELECT_IS_UNUSED + ' WHERE queue > ? ORDER BY queue LIMIT ?'


class Retention:
    """Deletes jobs that have been kept long enough, and forgets queues that nobody uses.

    A round walks over all of them once, in slices. It is a generator: each `yield` is between two
    pieces of work of bounded cost, and the next piece may be in another transaction.
    """

    def __init__(self, keep, keep_failed):
        # constant after start
        self.keep = {'done': keep, 'cancelled': keep, 'failed': keep_failed}    # 0: for ever
        # touched by the loop's thread only
        self.next_round = 0     # engine time in microseconds
        self.round = None       # the generator while one is under way
        self.tx = None          # the transaction of the current step

    def run_due(self, tx):
        """A slice of a round; the next round begins after RETENTION_INTERVAL."""
        if self.next_round > tx.now:
            return
        self.tx = tx
        self.round = self.round or self._walk()
        try:
            for _ in tx.paced(self.round):
                pass
        except BaseException:
            self.round = None       # a generator that raised has ended
            raise

    def _walk(self):
        for status, keep in self.keep.items():
            if keep:
                yield from self._delete_ended(status, keep)
        yield from self._forget_queues()
        self.next_round = self.tx.now + micros(RETENTION_INTERVAL)
        self.round = None

    def _delete_ended(self, status, keep):
        """Delete old jobs of the status, except dependencies of unfinished jobs."""
        position = (0, 0)
        while True:
            before = self.tx.now - keep
            rows = self.tx.fetch_all(NEXT_ENDED, status, before, *position, SLICE_ROWS)
            for finished_at, seq in rows:
                position = (finished_at, seq)
                if not (yield from self._is_needed(seq)):
                    # a job that was retried since the SELECT stays
                    self.tx.execute(
                        'DELETE FROM jobs WHERE seq = ? AND status = ? AND finished_at = ?',
                        (seq, status, finished_at))
                yield
            if not rows:
                return

    def _is_needed(self, seq):
        """Whether an unfinished job depends on it. A generator: there may be many dependents."""
        for state in (UNRESOLVED, SUCCEEDED, FAILED):
            last = 0
            while True:
                rows = self.tx.fetch_all(NEXT_DEPENDENTS, seq, state, last, SLICE_ROWS)
                if not rows:
                    break
                if any(row['is_unfinished'] for row in rows):
                    return True
                last = rows[-1]['dependent']
                yield
        return False

    def _forget_queues(self):
        last = ''
        while True:
            before = self.tx.now - micros(FORGET_QUEUE_AFTER)
            rows = self.tx.fetch_all(NEXT_QUEUES, before, last, SLICE_ROWS)
            yield
            for queue, is_unused in rows:
                last = queue
                if is_unused:
                    self._forget(queue, before)
                    yield
            if not rows:
                return

    def _forget(self, queue, before):
        """Forget the queue if it is still unused: an earlier transaction may have read it."""
        row = self.tx.fetch_one(SELECT_IS_UNUSED + ' WHERE queue = ?', before, queue)
        if row and row[1]:
            self.tx.execute('DELETE FROM queues WHERE queue = ?', (queue,))
            self.tx.forgotten_queues.append(queue)


# -- Jobs: queries ---------------------------------------------------------------------------------
AHEAD = f'''
    SELECT COUNT(*) FROM (
        SELECT 1 {CLAIMABLE} AND priority > :priority
        UNION ALL
        SELECT 1 {CLAIMABLE} AND priority = :priority AND next_run_at <= :next_run_at
            AND (next_run_at, seq) < (:next_run_at, :seq)
        LIMIT 1000)'''
RUNNING_OF_WORKERS = '''
    SELECT worker, queue, COUNT(*) FROM jobs WHERE status = 'running' GROUP BY worker, queue'''
UNFINISHED_DEPENDENCIES = f'''
    SELECT id FROM dependencies JOIN jobs ON seq = dependency
    WHERE dependent = ? AND state = {UNRESOLVED} ORDER BY position LIMIT 4'''


STATUS_INDEXES = {'failed': 'jobs_failed', 'cancelled': 'jobs_failed', 'running': 'jobs_lease'}


def oldest_due(db, queue):
    """When the job that has been due for longest fell due; None if none is due.

    A skip scan: for each priority, the index has its earliest job first.
    """
    earliest = []
    values = {'queue': queue, 'priority': 2**31}
    while len(earliest) < MAX_PRIORITIES_SCANNED:
        values['priority'] = fetch_value(
            db, f'SELECT MAX(priority) {CLAIMABLE} AND priority < :priority', values)
        if values['priority'] is None:
            break
        earliest.append(fetch_value(
            db, f'SELECT MIN(next_run_at) {CLAIMABLE} AND priority = :priority', values))
    return min(earliest, default=None)


class Queries:
    """The calls that read. They run in any thread, and see committed state only."""

    def __init__(self, database, clock, workers):
        # constant after start
        self.database = database
        self.clock = clock
        self.workers = workers

    def job(self, id):
        """The job with its attempts, its dependents, and why it does not run."""
        with self.database.reading() as db:
            row = db.execute(SELECT_JOB + 'id = ?', (id,)).fetchone()
            require(row, 'id: there is no job', id)
            attempts = row['attempts'] or '[]'
            if row['status'] in ('running', 'done'):
                # the current attempt, or the one that is done, is not recorded there
                attempts = attempts_json(row, row['status'], row['finished_at'])
            more = steps_json(db, row)
            more += f',"attempts":{attempts},"why":{json_string(self._why(db, row))}'
            dependents = [dependent for dependent, in db.execute(
                'SELECT id FROM dependencies JOIN jobs ON seq = dependent WHERE dependency = ? '
                'ORDER BY seq LIMIT ?', (row['seq'], MAX_DEPENDENTS_LISTED))]
            if dependents:
                more += f',"needed_by":{encode(dependents)}'
            return job_json(row, more)

    def has_ended(self, id):
        """Whether the job has ended, or does not exist."""
        with self.database.reading() as db:
            job = db.execute(FIND_BY_ID, (id,)).fetchone()
        return job is None or job['status'] in ENDED

    def newest(self, tag):
        with self.database.reading() as db:
            query = SELECT_JOB + 'tag = ? ORDER BY seq DESC LIMIT 1'
            row = db.execute(query, (tag,)).fetchone()
        return job_json(require(row, 'tag: there is no job tagged', tag))

    def jobs(self, limit=50, brief=False, **params):
        """A page of jobs, newest first; with `needed_by` a job's dependencies, in its order."""
        columns = column_list(BRIEF_COLUMNS if brief else COLUMNS)
        render = functools.partial(job_json, brief=brief)
        if 'search' in params:
            params['text'] = like_pattern(params['search'])
            params['escaped'] = like_pattern(json_quote(params['search'])[1:-1])
        with self.database.reading() as db:
            for field in ('after', 'needed_by', 'needs'):
                if field in params:
                    params[field] = self._seq_of(db, field, params[field])
            if 'needed_by' in params or 'needs' in params:
                rows = self._related(db, columns, limit, params)
                return json_page('jobs', rows, render, limit, job_cursor)
            if not self._may_have(db, params.get('queue'), params.get('status')):
                limit = 0
            seqs, last_seq = self._search(db, limit, params)
            query = f'SELECT {columns} FROM jobs WHERE seq = ?'
            rows = (db.execute(query, (seq,)).fetchone() for seq in seqs)
            resume_after = last_seq and job_cursor({'seq': last_seq})
            return json_page('jobs', rows, render, limit, job_cursor, resume_after)

    def _related(self, db, columns, limit, params):
        """The rows of jobs that depend on one, or that it depends on."""
        source = 'jobs'
        order = 'seq DESC'
        if 'needed_by' in params:
            source = 'dependencies JOIN jobs ON seq = dependency'
            order = 'position'
            if 'after' in params:
                params['after_position'] = params.pop('after')
        return db.execute(
            f'SELECT {columns} FROM {source} {where_clause(params)} ORDER BY {order} LIMIT :limit',
            {**params, 'limit': limit})

    def _search(self, db, limit, params):
        """(seqs of matching jobs, newest first; the last seq examined if the search ended early).

        A page examines a bounded number of jobs.
        """
        source, condition = self._search_plan(params)
        examined_at_most = MAX_ROWS_SEARCHED if limit else 0
        rows = db.execute(
            f'SELECT seq, {condition} FROM {source} ORDER BY seq DESC LIMIT :rows',
            {**params, 'rows': examined_at_most})
        ends = time.monotonic() + MAX_SEARCH_TIME
        found = []
        for examined, (seq, is_match) in enumerate(rows, 1):
            if is_match:
                found.append(seq)
                if len(found) == limit:
                    break
            if examined == MAX_ROWS_SEARCHED or time.monotonic() > ends:
                return found, seq
        return found, None

    def _search_plan(self, params):
        """(the jobs that an index leads to, as the text after FROM; the other conditions).

        There are indexes for tags, groups and STATUS_INDEXES. The other conditions are checked job
        by job.
        """
        indexed = {'after', 'tag'}
        if 'group' in params:
            indexed |= {'queue', 'group'}
        used = indexed & params.keys()
        found = {field: FILTERS[field] for field in FILTERS if field in params}
        where = ['1'] + [found[field] for field in found if field in used]
        conditions = ['1'] + [found[field] for field in found if field not in used]
        table = 'jobs'
        status = params.get('status')
        if status in STATUS_INDEXES and used <= {'after'}:
            table = f'jobs INDEXED BY {STATUS_INDEXES[status]}'
            where.append(f"status = '{status}'")        # as text: a partial index needs it
        return f'{table} WHERE {" AND ".join(where)}', ' AND '.join(conditions)

    def _seq_of(self, db, field, id):
        """The seq of a job by its id, or of the job of a cursor, which may be purged."""
        if field == 'after' and re.fullmatch(CURSOR + '[0-9]{1,18}', id):
            return int(id[len(CURSOR):])
        job = db.execute(FIND_BY_ID, (id,)).fetchone()
        return require(job, f'{field}: there is no job', id, BadRequest)['seq']

    def _may_have(self, db, queue, status):
        """Whether there can be such a job, by the counts of the queues."""
        count = status if status in STATUSES else 1     # each status is a column
        return fetch_value(
            db, f'SELECT SUM({count}) FROM queues WHERE queue = COALESCE(?, queue)', (queue,))

    def health(self):
        """Whether jobs can be stored, and warnings."""
        trouble = self.database.trouble()
        return {
            'status': 'trouble' if trouble else 'ok',
            'storage': trouble or 'ok',
            'warnings': self.database.warnings(),
            'version': VERSION,
        }

    def schedules(self, limit=None, after='', name=None, brief=False):
        columns = column_list(BRIEF_SCHEDULE_COLUMNS if brief else SCHEDULE_COLUMNS)
        with self.database.reading() as db:
            rows = db.execute(
                f'SELECT {columns} FROM schedules WHERE name > ? AND name = COALESCE(?, name) '
                'ORDER BY name LIMIT ?', (after, name, limit or -1))
            render = functools.partial(schedule_json, brief=brief)
            return json_page('schedules', rows, render, limit, operator.itemgetter('name'))

    def metric_counts(self):
        """The counts of the first queues, and of all others together; the first schedules."""
        totals = ', '.join(f'TOTAL({column}) AS {column}' for column in COUNTS)
        with self.database.reading() as db:
            rows = [dict(row) for row in db.execute(
                'SELECT * FROM queues ORDER BY queue LIMIT ?', (MAX_LIMIT,))]
            if len(rows) == MAX_LIMIT:
                rows += [dict(row) for row in db.execute(
                    f"SELECT '(others)' AS queue, {totals}, NULL AS max_running, NULL AS rate "
                    'FROM queues WHERE queue > ?', (rows[-1]['queue'],))]
            for row in rows:
                row['oldest'] = oldest_due(db, row['queue'])
            schedules = db.execute(
                'SELECT name, next_run_at, skipped FROM schedules ORDER BY name LIMIT ?',
                (MAX_LIMIT,))
            return rows, schedules.fetchall()

    def _why(self, db, row):
        """A sentence on why the job has its status and does not run; None once it has ended."""
        if row['status'] in ENDED:
            return None
        if row['status'] == 'running':
            worker = row['worker'] or 'a worker without a name'
            return (f'attempt {row["attempt"]} runs on {worker} '
                    f'since {rfc3339(row["started_at"])}, '
                    f'last sign of life {rfc3339(row["updated_at"])}, '
                    f'lost if there is none by {rfc3339(row["lease_until"])}')
        queue = db.execute(SELECT_QUEUE, (row['queue'],)).fetchone()
        reasons = (
            'the queue is paused' if queue['paused'] else None,
            self._why_queued(db, row),
            self._why_blocked(db, row),
            self._why_limited(queue),
            self._why_delayed(row),
            self._why_unpolled(row),
            self._why_behind(db, row),
        )
        found = [reason for reason in reasons if reason] or ['next in line']
        return '; '.join([*found, *self._why_expiring(row)])

    def _why_queued(self, db, row):
        if row['hold'] != QUEUED_IN_GROUP:
            return None
        ahead = db.execute(ACTIVE_IN_GROUP, (row['queue'], row['group'])).fetchone()
        if not ahead:       # it has just ended
            return None
        return (f'waits in the group {describe(row["group"])} for the job {describe(ahead["id"])}, '
                f'which is {ahead["status"]}')

    def _why_blocked(self, db, row):
        if not row['waits_for']:
            return None
        names = [describe(id) for id, in db.execute(UNFINISHED_DEPENDENCIES, (row['seq'],))]
        if len(names) > 3:
            names[3] = '...'
        count = row['waits_for']
        return f'waits for {count} job{"" if count == 1 else "s"}: {", ".join(names)}'

    def _why_limited(self, queue):
        now = self.clock.now()
        if queue['max_running'] is not None and queue['running'] >= queue['max_running']:
            return f"the queue's limit of {queue['max_running']} running jobs is reached"
        if queue['rate'] and not tokens(queue, now):
            return f"the queue's rate allows the next at {rfc3339(next_token(queue, now))}"
        return None

    def _why_delayed(self, row):
        if row['next_run_at'] <= self.clock.now() or row['hold'] == READY:
            return None
        retry = f' (retry {row["retries"]})' if row['retries'] else ''
        return f'scheduled for {rfc3339(row["next_run_at"])}{retry}'

    def _why_unpolled(self, row):
        """A worker polls at least every LONG_POLL_TIMEOUT seconds, and gets a READY job at once."""
        polled_at = self.workers.last_polled.get(row['queue'])
        if polled_at is None:
            return no_worker_warning(row['queue'], tuple(self.workers.last_polled)[-20:])
        silence = (self.clock.now() - polled_at) // micros(1)
        if silence >= WORKER_SILENCE:
            return f'no worker has polled the queue for {silence // 60} minutes'
        if silence >= 60 or (silence >= SUSPICIOUS_SILENCE and row['hold'] == READY):
            return f'no worker has polled the queue for {silence} seconds'
        return None

    def _why_expiring(self, row):
        if row['expires_at'] is None or row['attempt']:
            return []
        return [f'it is cancelled if it has not started by {rfc3339(row["expires_at"])}']

    def _why_behind(self, db, row):
        if row['hold'] != READY:
            return None
        position = {name: row[name] for name in ('queue', 'priority', 'next_run_at', 'seq')}
        ahead = fetch_value(db, AHEAD, position)
        return f'behind {ahead}{" or more" if ahead == 1000 else ""} other jobs' if ahead else None


IS_UNSERVED = '''(NOT paused AND NOT running AND pending > scheduled + waiting + grouped
    AND COALESCE(polled_at, 0) < :silent_since)'''
SUMS = ', '.join(f'COALESCE(SUM({name}), 0) AS {name}' for name in ('paused', *COUNTS))
TOTALS = f'''
    SELECT COUNT(*) AS queues, {SUMS}, COALESCE(SUM({IS_UNSERVED}), 0) AS unserved FROM queues'''
UNSERVED = f'''
    SELECT queue, pending - scheduled - waiting - grouped AS due FROM queues WHERE {IS_UNSERVED}
    ORDER BY queue LIMIT {MAX_UNSERVED_LISTED}'''


class Overview:
    """GET /queues: a page of the queues, their sums, and the workers seen."""

    def __init__(self, database, clock, workers, meter):
        # constant after start
        self.database = database
        self.clock = clock
        self.workers = workers
        self.meter = meter

    def queues(self, totals=False, **params):
        """A page of queues, by name or the busy first; `search` is a part of the name.

        `totals` adds the sums over all queues. Ages are in seconds.
        """
        now = self.clock.now()
        with self.database.reading() as db:
            page = self._page(db, now, **params)
            running = {(worker, queue): count
                       for worker, queue, count in db.execute(RUNNING_OF_WORKERS)}
            sums = self._sums(db, now) if totals else {}
        return {**page, 'now': rfc3339(now), **sums, 'workers': self._workers_json(running)}

    def _page(self, db, now, limit=MAX_LIMIT, after='', busy=False, queue=None, search=None):
        order = 'pending + running > 0 DESC, failed > 0 DESC, queue' if busy else 'queue'
        rows = db.execute(
            'SELECT * FROM queues WHERE queue > :after AND queue = COALESCE(:queue, queue) '
            'AND (:search IS NULL OR INSTR(LOWER(queue), LOWER(:search))) '
            f'ORDER BY {order} LIMIT :limit',
            {'after': after, 'queue': queue, 'search': search, 'limit': limit}).fetchall()
        oldest = [oldest_due(db, row['queue']) for row in rows]
        return {
            'queues': self._queues_json(rows, oldest, now),
            'after': rows[-1]['queue'] if len(rows) == limit and not busy else None,
        }

    def _sums(self, db, now):
        # polled_at is stored once in POLL_TIME_RESOLUTION
        silence = {'silent_since': now - micros(WORKER_SILENCE + POLL_TIME_RESOLUTION)}
        totals = dict(db.execute(TOTALS, silence).fetchone())
        unserved = db.execute(UNSERVED, silence).fetchall() if totals['unserved'] else []
        return {
            'totals': totals,
            'minutes': {**self.meter.last_hour(now), 'wait': self.meter.waits(now)},
            'unserved': [self._unserved_json(row) for row in unserved],
        }

    def _unserved_json(self, row):
        return {**row, 'polled_at': rfc3339(self.workers.last_polled.get(row['queue']))}

    def _workers_json(self, running):
        return [
            {'worker': worker, 'queue': queue, 'seen_at': rfc3339(seen_at), 'hung': hung,
             'running': running.get((worker, queue), 0)}
            for (worker, queue), (seen_at, hung) in reversed(list(self.workers.seen.items()))]

    def _queues_json(self, rows, oldest, now):
        workers = collections.defaultdict(list)
        for (worker, queue), (seen_at, _) in list(self.workers.seen.items()):
            if seen_at > now - micros(WORKER_SILENCE):
                workers[queue].append(worker)
        return [self._queue_json(row, due, workers[row['queue']], now)
                for row, due in zip(rows, oldest)]

    def _queue_json(self, row, oldest, workers, now):
        queue = dict(row)
        del queue['full_at'], queue['changed_at']
        name = queue['queue']
        queue['per'] = as_seconds(queue['per'])
        queue['paused'] = bool(queue['paused'])
        queue['workers'] = workers
        queue['polled_at'] = rfc3339(self.workers.last_polled.get(name))
        queue['minutes'] = self.meter.last_hour(now, name)
        queue['oldest_age'] = None if oldest is None else max(0, now - oldest) / 1000000
        return queue


# -- Jobs: known workers, counts, wiring -----------------------------------------------------------
class Workers:
    """Signs of life. Only the loop writes them, after a commit.

    Other threads look up a key, or copy a dict in one step: they do not iterate over it.
    """

    def __init__(self, last_polled):
        self.last_polled = last_polled          # queue -> time of its last poll
        self.seen = collections.OrderedDict()   # (worker, queue) -> (time, hung threads)
        # worker -> time at which the latest job was taken from it, since the start
        self.lost_at = collections.OrderedDict()

    def record(self, tx):
        for queue, worker, hung in tx.signs_of_life:
            if hung is not None:
                self.last_polled[queue] = tx.now
            if worker:
                _, known = self.seen.pop((worker, queue), (0, 0))
                self.seen[worker, queue] = tx.now, known if hung is None else hung
        for worker in tx.deprived_workers:
            self.lost_at[worker] = tx.now
            self.lost_at.move_to_end(worker)
        for known in (self.seen, self.lost_at):
            while len(known) > MAX_WORKERS:
                known.popitem(last=False)


METER_EVENTS = ['enqueued', *(rule.event for rule in TRANSITIONS.values() if rule.event)]
HOURLY = {      # counts of a queue's last hour, and the events that each sums up
    'enqueued': ('enqueued',),
    'done': ('completed',),
    'failed': ('failed', 'lost'),
}


class Meter:
    """Counts since the start: totals, histograms, the last hour by the minute."""

    def __init__(self):
        self.lock = threading.Lock()            # guards all of it
        self.totals = collections.Counter()     # (event, queue) -> n
        self.seconds = {}                       # (event, queue) -> histogram with DURATION_BUCKETS
        # histogram: operations in a commit
        self.commit_sizes = [0] * (len(COMMIT_SIZE_BUCKETS) + 2)
        self.minutes = collections.defaultdict(collections.Counter)     # minute -> totals
        self.requests = collections.Counter()   # (route, status) -> n

    def record(self, now, events, operations):
        """Count the events of a transaction that is committed."""
        with self.lock:
            observe(self.commit_sizes, COMMIT_SIZE_BUCKETS, operations)
            minute = self.minutes[now // 60000000]
            for event, queue, took in events:
                self.totals[event, queue] += 1
                minute[event, queue] += 1
                minute[event, None] += 1        # of all queues
                if took is not None:
                    histogram = self.seconds.setdefault(
                        (event, queue), [0] * (len(DURATION_BUCKETS) + 2))
                    observe(histogram, DURATION_BUCKETS, max(0, took) / 1000000)
                if event == 'started':
                    minute['waited', None] += max(0, took)      # microseconds
            if len(self.minutes) > 60:
                del self.minutes[min(self.minutes)]

    def request(self, route, status):
        with self.lock:
            self.requests[route, status] += 1

    def fold_into_others(self, queue):
        """Forget the queue; its counts go to '(others)', so that the sums stay."""
        with self.lock:
            for event in METER_EVENTS:
                self.totals[event, '(others)'] += self.totals.pop((event, queue), 0)
                self.seconds.pop((event, queue), None)

    def last_hour(self, now, queue=None):
        """60 counts for each of HOURLY, the last for the current minute; of all queues if None."""
        with self.lock:
            minutes = self._last_minutes(now)
            return {
                name: [sum(minute.get((event, queue), 0) for event in events) for minute in minutes]
                for name, events in HOURLY.items()}

    def waits(self, now):
        """The mean seconds from due to claimed in each minute of the last hour; None: no claim."""
        with self.lock:
            pairs = [(minute.get(('waited', None), 0), minute.get(('started', None), 0))
                     for minute in self._last_minutes(now)]
        return [waited / started / 1000000 if started else None for waited, started in pairs]

    def _last_minutes(self, now):
        return [self.minutes.get(now // 60000000 - ago, {}) for ago in range(59, -1, -1)]


def observe(histogram, buckets, value):
    """Count a value. A histogram lists a count per bucket, the count beyond, and the sum."""
    histogram[bisect.bisect_left(buckets, value)] += 1
    histogram[-1] += value


# An unresolved end is due at once: the seq of its job, taken as a time, lies in 1970.
NEXT_DEADLINE = f'''
    SELECT MIN(moment) FROM (
        SELECT MIN(next_run_at) AS moment FROM jobs WHERE status = 'pending' AND hold = {DELAYED}
        UNION ALL SELECT MIN(lease_until) FROM jobs WHERE status = 'running'
        UNION ALL SELECT MIN(next_run_at) FROM schedules
        UNION ALL SELECT MIN(expires_at) FROM jobs
            WHERE expires_at IS NOT NULL AND status = 'pending' AND attempt = 0
        UNION ALL SELECT MIN(job) FROM unresolved_ends
        UNION ALL SELECT ?)'''


# The latest engine time that is stored: the last engine has reached it.
LAST_TIME = '''
    SELECT MAX(moment) FROM (
        SELECT MAX(MAX(changed_at, COALESCE(polled_at, 0))) AS moment FROM queues
        UNION ALL SELECT MAX(updated_at) FROM jobs WHERE status = 'running')'''


class Store:
    """The jobs of one database: one object per concern, and the calls that span them.

    Calls that write take the loop's current transaction as their first argument.
    """

    def __init__(self, database, time_source=time, keep=0, keep_failed=0):
        """`keep` and `keep_failed` are microseconds that ended jobs are kept; 0: for ever.

        `time_source` has the functions time() and monotonic().
        """
        # constant after start
        self.database = database
        self.clock = Clock(time_source)
        self.meter = Meter()
        with database.reading() as db:
            queues = db.execute('SELECT * FROM queues').fetchall()
        self.workers = Workers({
            row['queue']: row['polled_at'] for row in queues if row['polled_at'] is not None})
        self.limits = Limits({row['queue'] for row in queues if row['max_running'] or row['rate']})
        self.jobs = Jobs(self.limits)
        self.dependencies = Dependencies(self.jobs)
        self.producers = Producers(self.jobs, self.dependencies, self.workers)
        self.claims = Claims(self.jobs, self.limits, self.workers)
        self.schedules = Schedules(self.producers)
        self.operators = Operators(
            database, self.jobs, self.dependencies, self.claims)
        self.retention = Retention(keep, keep_failed)
        self.queries = Queries(database, self.clock, self.workers)
        self.overview = Overview(database, self.clock, self.workers, self.meter)
        # touched by the loop's thread only
        self.pauses = ()            # as of the last commit
        self.next_deadline = 0      # engine time at which run_due() has something to do
        self.maintenance = collections.deque([
            self.schedules.run_due, self.jobs.expire, self.jobs.promote_due,
            self.claims.lose_overdue, self.dependencies.resolve, self.retention.run_due])
        self.starved = set()        # see Transaction.starved; run_due() wakes their polls
        self._check_set_back()

    def _check_set_back(self):
        """If the clock was set back since the last engine, move deadlines with it."""
        with self.database.reading() as db:
            before = fetch_value(db, LAST_TIME) or 0
            # a schedule without jobs leaves no other trace of the time
            soon = self.clock.now() + micros(1)
            has_stopped_schedule = fetch_value(db, HAS_STOPPED_SCHEDULE, (soon,))
        back = before - self.clock.now()
        if back <= micros(1) and not has_stopped_schedule:
            return
        with self.database.transaction() as db:
            tx = self.begin(db)
            if back > micros(1):
                self.jobs.set_back(tx, before)
            self.schedules.set_back(tx)
        how_far = f' by {back / 1000000:.0f} s or more' if back > micros(1) else ''
        log(f'the system clock was set back{how_far}')

    def begin(self, db, response_budget=MAX_RESPONSE):
        return Transaction(db, self.clock.now(), response_budget, self.pauses)

    def committed(self, tx):
        """Publish the effects of a transaction, once it is on disk."""
        if tx.signs_of_life or tx.starved:
            polled = {queue for queue, _, hung in tx.signs_of_life if hung is not None}
            self.starved -= polled
            self.starved |= tx.starved
        if tx.is_deadline_exact:
            self.next_deadline = tx.next_deadline
        else:
            self.next_deadline = min(self.next_deadline, tx.next_deadline)
        self.pauses = tx.pauses
        for queue in tx.forgotten_queues:
            self.workers.last_polled.pop(queue, None)
        self.workers.record(tx)

    def report(self, tx, operations):
        """Count and log what a committed transaction of so many operations did."""
        for queue in tx.forgotten_queues:
            self.meter.fold_into_others(queue)
        self.meter.record(tx.now, tx.events, operations)
        for line in tx.log_lines:
            log(line)

    def note_pause(self, tx, seconds):
        """No heartbeat could be received for so long: leases that ended meanwhile are extended."""
        # a write, so that on a full disk this transaction fails, and the pause goes on
        tx.execute(f'PRAGMA user_version = {SCHEMA_VERSION}')
        tx.pauses = with_pause(tx.pauses, tx.now, seconds)

    def shift_deadlines(self, tx, offset, ahead_seconds):
        """Set the clock ahead, and move all deadlines that are counted in seconds."""
        self.clock.offset = offset
        tx.now = self.clock.now()       # the rest of this transaction has the new time
        self.jobs.shift_deadlines(tx, ahead_seconds)
        tx.pauses = tuple(
            pause._replace(ended_at=pause.ended_at + micros(ahead_seconds)) for pause in tx.pauses)
        tx.wake_at(0)
        tx.log_lines.append(f'the system clock went ahead by {ahead_seconds:.0f} s')

    def run_due(self, tx):
        """A slice of all work that is due: schedules, delayed jobs, lost workers, retention."""
        if min(self.next_deadline, tx.next_deadline) > tx.now:
            return
        for queue in self.starved:
            tx.wake_polls(queue)
        for _ in range(len(self.maintenance)):
            self.maintenance[0](tx)
            self.maintenance.rotate(-1)     # each gets its turn, however long another takes
            if tx.is_slice_over():
                break
        tx.next_deadline = tx.fetch_one(NEXT_DEADLINE, self.retention.next_round)[0]
        tx.is_deadline_exact = True


# -- Event loop -----------------------------------------------------------------------------------
READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
SOCKET_READY = object()     # the event of a socket that can be read or written
NOTHING = ()                # the result of a poll or wait whose time is over


class Client:
    """The protocol of objects that wait for the event loop; the loop's thread calls it.

    resume(event)   Continue. `event` is SOCKET_READY, the result of an operation or of a slow call,
                    or an exception, which is raised where the client waits.
    is_open         False once the client is known to be gone.
    is_connected()  Check the connection now; this costs a system call.
    set_timeout(s)  Have on_timeout() called in `s` seconds, instead of at the time set before.
    on_timeout()    That time has passed.
    """
    is_open = True
    deadline = NEVER        # the loop's time at which on_timeout() is called
    timer = (NEVER,)        # its entry in the heap of Timeouts, which may be earlier; this: none

    def __init__(self, loop):
        self.loop = loop

    def resume(self, event):
        raise NotImplementedError

    def set_timeout(self, seconds):
        self.deadline = deadline = self.loop.now + seconds
        if deadline < self.timer[0]:
            self.loop.timeouts.push(self)

    def on_timeout(self):
        raise NotImplementedError

    def is_connected(self):
        """Whether the client is still there, checked before it is given a job."""
        return self.is_open


class ThreadWait(Client):
    """Another thread that waits for the result of its transaction."""

    def __init__(self, loop):
        super().__init__(loop)
        self.results = SimpleQueue()

    def resume(self, event):
        self.results.put(event)

    def result(self):
        """The result; raises the error of the transaction, or Unavailable if the loop has ended.

        Then the outcome may be unknown: a transaction may have been the loop's last.
        """
        while not self.loop.ended:
            with contextlib.suppress(Empty):
                result = self.results.get(timeout=1)
                if isinstance(result, Exception):
                    raise result
                return result
        raise Unavailable('the engine is stopping')


class Operation:
    """Work to be done in a transaction, and the function that renders its result."""
    topic = None        # a LongPoll has one
    client = None       # gets the result by resume()
    submitted_at = 0    # the loop's time
    result = None
    error = None        # an HTTPError: it has failed, and is not run again

    def __init__(self, work, render=identity, single_insert=None):
        self.work = work                        # (transaction) -> result; may be called again
        self.render = render                    # result -> response
        self.single_insert = single_insert      # the fields of a job, if it inserts just one

    def submit(self, loop):
        """Begin. True if the client has to wait for resume()."""
        loop.committer.submit(self)
        return True

    def finish(self):
        """Give the client the result or error, and drop both: they keep requests in memory."""
        event = self.result if self.error is None else self.error
        self.result = self.error = None
        self.client.resume(event)


class LongPoll(Operation):
    """An operation that waits for its topic, up to `wait` seconds, while its result is empty."""

    def __init__(self, work, render, topic, wait):
        super().__init__(work, render)
        self.topic = topic
        self.wait = wait


class BatchOperation(Operation):
    """One call for each of many items, a slice of them in each transaction."""

    def __init__(self, apply, items):
        super().__init__(self._apply_slice)
        self.apply = apply      # (transaction, item) -> result
        self.items = items
        self.results = []       # of the items whose transactions are committed

    def _apply_slice(self, tx):
        items = self.items[len(self.results):]
        return [self.apply(tx, item) for item in tx.paced(items)]

    def finish(self):
        if self.error is None:
            self.results += self.result
            if len(self.results) < len(self.items):
                self.submit(self.client.loop)
                return
            self.result = {'jobs': self.results}
        super().finish()


class EventWait:
    """A wait for an event, without a transaction: only the loop's thread changes its condition.

    It checks once whether the event is over. If not, it waits for its topic.
    """
    result = error = None
    finish = Operation.finish

    def __init__(self, is_over, render, topic, wait):
        self.is_over = is_over
        self.render = render
        self.topic = topic
        self.wait = wait
        self.client = None

    def submit(self, loop):
        self.result = self.is_over()
        return loop.waiters.park_if_empty(self)


class Timeouts:
    """A heap of the times at which clients time out; entries are [time, number, client].

    A client's deadline is set often and mostly moves back. So its entry is left where it is, and
    is moved to the deadline when its time comes. An entry without a client is dead.
    """
    TIME, NUMBER, CLIENT = range(3)

    def __init__(self):
        self.heap = []
        self.dead = 0                       # entries without a client
        self.numbers = itertools.count()    # equal times come in their order

    def next(self):
        return self.heap[0][self.TIME] if self.heap else NEVER

    def push(self, client):
        self.cancel(client)
        client.timer = [client.deadline, next(self.numbers), client]
        heapq.heappush(self.heap, client.timer)

    def cancel(self, client):
        if client.timer is Client.timer:
            return
        client.timer[self.CLIENT] = None
        client.timer = Client.timer
        self.dead += 1
        if self.dead > 1000 and self.dead > len(self.heap) // 2:    # many clients came and went
            self.heap = [entry for entry in self.heap if entry[self.CLIENT]]
            heapq.heapify(self.heap)
            self.dead = 0

    def fire(self, now):
        """Call on_timeout() of the clients whose time is over."""
        while self.next() <= now:
            client = heapq.heappop(self.heap)[self.CLIENT]
            if client is None:
                self.dead -= 1
                continue
            client.timer = Client.timer
            if client.deadline <= now:
                client.deadline = NEVER
                client.on_timeout()
            elif client.deadline < NEVER:
                self.push(client)


class Waiters:
    """Polls and waits that found nothing, by topic, in the order in which they came."""

    def __init__(self, loop):
        self.loop = loop
        self.by_topic = {}      # topic -> {operation: True}

    def park_if_empty(self, operation):
        """Park it if its result is empty and it may wait. True if it is parked."""
        if operation.result or operation.error or not operation.wait:
            return False
        if not operation.client.is_open or self.loop.draining:
            return False
        self.by_topic.setdefault(operation.topic, {})[operation] = True
        operation.client.set_timeout(operation.wait)
        return True

    def __contains__(self, operation):
        return bool(operation) and operation in self.by_topic.get(operation.topic, ())

    def withdraw(self, operation):
        parked = self.by_topic.get(operation.topic)
        if parked and parked.pop(operation, False) and not parked:
            del self.by_topic[operation.topic]

    def serve(self, topics, run):
        """List the waits that are over, and the polls that have found a job or failed.

        run(poll) runs a poll. After one that finds nothing, its topic is left: those behind it
        would find nothing either.
        """
        served = []
        done = set()
        while len(done) < len(topics):      # a poll may wake others, when it expires a job
            woken = topics - done
            done |= woken
            for topic in woken:
                served += self._serve_topic(topic, run)
        return served

    def _serve_topic(self, topic, run):
        served = []
        for operation in self.by_topic.get(topic, ()):
            if isinstance(operation, EventWait):
                operation.result = True
            elif not operation.client.is_connected():
                continue
            else:
                run(operation)
                if not operation.result and operation.error is None:
                    break
            served.append(operation)
        return served

    def end_all(self):
        for operation in list(itertools.chain.from_iterable(self.by_topic.values())):
            operation.client.on_timeout()


class Budget:
    """Bytes of unanswered requests and of unsent responses, of all connections."""

    def __init__(self, connections):
        self.connections = connections
        self.request_bytes = 0
        self.response_bytes = 0

    def update(self, connection, request_bytes, response_bytes):
        self.request_bytes += request_bytes - connection.request_bytes
        self.response_bytes += response_bytes - connection.response_bytes
        connection.request_bytes = request_bytes
        connection.response_bytes = response_bytes

    def require_capacity(self, size):
        """Refuse a large response or request while clients leave too many responses untaken."""
        if size > SMALL_MESSAGE_BYTES and self.response_bytes + size > MAX_RESPONSE_BUFFER:
            raise Unavailable('too many answers wait to be taken; try again')

    def for_claims(self):
        """Characters of jobs that the polls of a transaction may claim."""
        return min(MAX_RESPONSE, MAX_RESPONSE_BUFFER - self.response_bytes)

    def shed_load(self):
        """Refuse the newest of the large requests that are being received."""
        large = [connection for connection in self.connections
                 if connection.is_receiving and connection.request_bytes > SMALL_MESSAGE_BYTES]
        newest = max(large, key=lambda connection: connection.request.deadline, default=None)
        if newest:
            newest.resume(Unavailable('too much is being sent; try again'))

    def drop_untaken(self):
        """Close the clients that have not taken their responses for longest.

        The responses of writes are not refused by require_capacity(), and add up.
        """
        untaken = [connection for connection in self.connections if connection.response_bytes]
        for connection in sorted(untaken, key=operator.attrgetter('deadline')):
            if self.response_bytes <= MAX_RESPONSE_BUFFER:
                break
            connection.close()


class PoisonedTransaction(Exception):      # noqa: N818 (it is a state, more than an error)
    """An operation failed and left changes behind: the others run again, without it."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation      # None: one of the single inserts


class Committer:
    """Runs operations in transactions: all that arrived in a pass share one (group commit).

    Writes come first, then maintenance, then the polls: the parked ones in the order in which they
    came, then the new ones. So a job and the poll that takes it meet in one commit, whichever came
    first.
    """

    def __init__(self, loop, store):
        # constant after start
        self.loop = loop
        self.store = store
        self.database = store.database
        # touched by the loop's thread only; times are the loop's
        self.submitted = []                 # operations for the next transaction
        self.maintenance = Operation(self._maintain)    # part of each of them
        self.lock_retry_at = 0              # no transaction before: another program has the lock
        self.maintenance_paused_until = 0   # after an error or while the disk is full
        self.clock_checked_at = -NEVER
        self.listening_until = -NEVER       # no heartbeat was missed until then
        # read by other threads, too
        self.commits = 0
        self.commit_seconds = 0             # all their durations, from BEGIN to COMMIT

    def submit(self, operation):
        operation.submitted_at = self.loop.now
        self.submitted.append(operation)

    def check_clock(self):
        """Have the clocks compared in this pass, without waiting for CLOCK_CHECK_INTERVAL."""
        self.clock_checked_at = -NEVER

    def is_listening(self, now):
        """Whether heartbeats are received. If not, the next transaction extends leases."""
        return (now - self.listening_until < MAX_LISTEN_GAP and not self.lock_retry_at
                and self.database.last_storage_error is None)

    def next_attempt(self, now):
        """The loop's time at which an operation can run or something is due."""
        due = now + (self.store.next_deadline - self.store.clock.now()) / 1000000
        if self.database.is_sparse:
            due = now
        due = max(due, self.maintenance_paused_until)
        return min(due, self.lock_retry_at) if self.submitted else due

    def commit_batch(self, now):
        """Run submitted operations and due maintenance, and give the clients their results."""
        if now < self.lock_retry_at:
            return
        clock = self.store.clock
        offset = clock.offset
        ahead = 0
        maintain = now >= self.maintenance_paused_until
        is_due = False
        if maintain and now - self.clock_checked_at >= CLOCK_CHECK_INTERVAL:
            self.clock_checked_at = now
            ahead = clock.slew()
            self.database.check_disk()
        if maintain:
            is_due = ahead or self.database.is_sparse or self.store.next_deadline <= clock.now()
        if not (self.submitted or is_due):
            return
        operations = self.submitted
        self.submitted = []
        maintenance = self.maintenance if maintain else None
        try:
            tx, began, served = self._run_transaction(operations, maintenance, ahead)
        except DiskFull:        # tried again in the next pass, with the space of the reserve
            clock.offset = offset
            self.submitted[:0] = operations
            return
        except Unavailable as error:
            clock.offset = offset       # the shifted deadlines are not on disk
            self._storage_failed(error, operations, now)
            return
        self.lock_retry_at = 0
        if maintain:
            # after an error, or while schedules stay due since no jobs can be added
            pause = self.maintenance.error or not tx.takes_jobs
            self.maintenance_paused_until = now + CLOCK_CHECK_INTERVAL if pause else 0
            self.maintenance.error = None
        self.loop.now = time.monotonic()
        self.commits += 1
        self.commit_seconds += self.loop.now - began
        self.store.committed(tx)        # before the responses: the next request may depend on it
        for operation in itertools.chain(served, operations):
            if not (operation.topic and self.loop.waiters.park_if_empty(operation)):
                operation.finish()
        # after the responses, which need not wait for this
        self.store.report(tx, len(served) + len(operations))

    def _storage_failed(self, error, operations, now):
        """Keep operations that may still wait for another program's lock; fail all others."""
        is_locked = isinstance(error, Busy)
        last_try = self.loop.drain_deadline - 1     # a second is left to send the refusals
        waiting = []
        failed = []
        for operation in operations:
            if is_locked and now < min(operation.submitted_at + LOCK_TIMEOUT, last_try):
                waiting.append(operation)
            else:
                failed.append(operation)
        self.submitted[:0] = waiting
        self.lock_retry_at = now + LOCK_RETRY_INTERVAL if is_locked else 0
        self.maintenance_paused_until = self.lock_retry_at or now + CLOCK_CHECK_INTERVAL
        if failed or not is_locked:     # a lock is no trouble while all can wait for it
            cause = error.__cause__ or error
            if self.database.last_storage_error is None:
                log(f'storage trouble: {cause}')
            self.database.last_storage_error = str(cause)
        self.loop.now = time.monotonic()
        for operation in failed:
            operation.error = error
            operation.finish()

    def _run_transaction(self, operations, maintenance, ahead):
        """Run everything in one transaction: (tx, the time at which it began, parked operations).

        Those returned have a result or an error now. `ahead` is by how many seconds the wall clock
        has jumped ahead. A transaction that an operation poisons begins again without it; then
        `operations` may be cut short, and the rest is submitted again.
        """
        insert_in_bulk = True
        offset = self.store.clock.offset + ahead    # the same if the transaction begins again
        while True:
            writes, inserts, polls = self._sort(operations, insert_in_bulk)
            try:
                with self.database.transaction() as db:
                    tx, began = self._begin(db, ahead, offset)
                    run = functools.partial(self._run, tx)
                    if inserts:
                        self._bulk_insert(tx, inserts)
                    for operation in writes:
                        run(operation)
                    if maintenance:
                        run(maintenance)
                    served = self.loop.waiters.serve(tx.topics, run)
                    for operation in polls:
                        run(operation)
                self.listening_until = began
                self.database.last_storage_error = None
                if tx.takes_jobs != self.database.takes_jobs:
                    self._note_room(tx.takes_jobs)
                return tx, began, served
            except PoisonedTransaction as error:
                insert_in_bulk = False      # one by one, the failing insert is found
                if error.operation in writes:
                    # those after it wait for the next pass, so that none runs again and again
                    behind = operations.index(error.operation) + 1
                    self.submitted[:0] = operations[behind:]
                    del operations[behind:]
                elif error.operation in self.loop.waiters:
                    error.operation.finish()    # now: the next try may not wake its topic

    def _sort(self, operations, insert_in_bulk):
        """(writes, single inserts that can share a statement, polls of clients still there)"""
        writes, inserts, polls = [], [], []
        for operation in operations:
            if operation.topic:
                if operation.client.is_connected():
                    polls.append(operation)
            elif operation.single_insert and insert_in_bulk and operation.error is None:
                inserts.append(operation)
            else:
                writes.append(operation)
        return writes, inserts, polls

    def _note_room(self, takes_jobs):
        self.database.takes_jobs = takes_jobs
        log('there is room on the disk again: jobs are added' if takes_jobs else DISK_IS_FULL)

    def _maintain(self, tx):
        tx.end_slice()      # requests may have used up theirs
        self.store.run_due(tx)
        if self.database.is_sparse:
            self.database.shrink(tx)

    def _begin(self, db, ahead, offset):
        """(tx, the time at which it began), after leases and the clock were put right."""
        tx = self.store.begin(db, self.loop.budget.for_claims())
        tx.takes_jobs = self.database.reserve.has_room(db)
        if not tx.takes_jobs:
            tx.keep_small()
        began = time.monotonic()
        gap = began - self.listening_until
        if gap > MAX_LISTEN_GAP or self.database.last_storage_error:
            self.store.note_pause(tx, gap)
        if ahead:
            self.store.shift_deadlines(tx, offset, ahead)
        return tx, began

    def _run(self, tx, operation):
        """Set the result or the error of the operation, unless it has failed before."""
        if operation.error is not None:
            return
        changes = tx.db.total_changes
        try:
            operation.result = operation.work(tx)
        except Exception as error:
            if is_storage_error(error):
                raise
            operation.result = None
            operation.error = self.loop.server.as_http_error('an operation', error)
            operation.error.with_traceback(None)        # its frames hold the request's body
            if tx.db.total_changes != changes:
                raise PoisonedTransaction(operation) from error

    def _bulk_insert(self, tx, inserts):
        """Insert the jobs of single inserts in few statements."""
        try:
            jobs = self.store.producers.enqueue(
                tx, [operation.single_insert for operation in inserts])
        except Exception as error:
            if is_storage_error(error):
                raise
            raise PoisonedTransaction(None) from error
        for operation, job in zip(inserts, jobs):
            operation.result = [job]


# kinds of calls that the server's threads serve
SLOW = 'slow'       # may take long
LARGE = 'large'     # its response may be large


class SlowCall(NamedTuple):
    """A function that one of the server's threads calls for a client."""
    client: Client
    name: str                   # of the request, for the log: the client may be gone by then
    function: Callable
    args: tuple


class Offload:
    """Slow calls, in order of arrival. At most `max_threads` of the server's threads run them.

    A thread takes the next call once the loop has taken its result, so that results do not pile
    up between them. It ends when no call has come for a second.
    """

    def __init__(self, server, max_threads):
        # constant after start
        self.server = server
        self.max_threads = max_threads
        # safe without a lock
        self.calls = SimpleQueue()      # no thread has taken them yet
        # touched by the loop's thread only
        self.unfinished = 0             # calls without a result yet
        self.threads = 0

    def submit(self, call):
        self.unfinished += 1
        self.calls.put(call)
        self._start_threads()

    def finished(self, call, result, taken):
        self.unfinished -= 1
        call.client.resume(result)
        taken.set()

    def thread_ended(self):
        self.threads -= 1
        self._start_threads()       # a call may have come just as the thread ended

    def _start_threads(self):
        while self.threads < min(self.unfinished, self.max_threads):
            self.threads += 1
            try:
                self.server.start_thread(self)
            except RuntimeError:        # the system gives no more threads
                self.threads -= 1
                if not self.threads:
                    self._refuse_all()
                return

    def _refuse_all(self):
        refusal = Unavailable('no thread could be started; try again')
        with contextlib.suppress(Empty):
            while True:
                call = self.calls.get_nowait()
                self.server.loop.call_soon_threadsafe(functools.partial(
                    self.finished, call, refusal, threading.Event()))


class EventLoop:
    """One thread that does all quick work, in passes: receive, commit, respond.

    It owns the connections, the connection that writes the database, and the memory of the store,
    without a lock. Other threads submit work with call_soon_threadsafe() and
    run_in_transaction(), and read the committed state of the database.
    """

    def __init__(self, server, store):
        # constant after start
        self.server = server
        self.selector = selectors.DefaultSelector()     # the data of a key is its callback
        is_select = isinstance(self.selector, selectors.SelectSelector)
        self.max_connections = 500 if is_select else NEVER
        self.wakeup_reader, self.wakeup_writer = socket.socketpair()
        self.wakeup_writer.setblocking(False)
        self.wake = self.wakeup_writer.send
        if os.name == 'posix':      # so that strace shows wake-ups apart from responses
            self.wake = functools.partial(os.write, self.wakeup_writer.fileno())
        self.selector.register(self.wakeup_reader, READ, self._drain_wakeups)
        self.thread = threading.Thread(target=self._run, name='loop', daemon=True)
        # safe without a lock
        self.calls_from_threads = collections.deque()
        self.ended = False                  # written by the loop's thread, read by all
        # touched by the loop's thread only
        self.now = time.monotonic()         # read after each select() and each commit
        self.draining = False               # the engine ends once no connection is left
        self.drain_deadline = NEVER         # when it ends even with connections left
        self.lags = [0, 0]                  # see _note_lag(): of this minute, of the last one
        self.lag_minute = 0
        self.connections = set()
        self.timeouts = Timeouts()
        self.budget = Budget(self.connections)
        self.waiters = Waiters(self)
        self.committer = Committer(self, store)
        self.offloads = {
            SLOW: Offload(server, OFFLOAD_THREADS),
            LARGE: Offload(server, 1),      # so that one large response is rendered at a time
        }

    def call_soon_threadsafe(self, function):
        """Have the loop's thread call it in this pass or the next."""
        self.calls_from_threads.append(function)
        with contextlib.suppress(OSError):      # full: the loop has been woken often enough
            self.wake(b'.')

    def run_in_transaction(self, work):
        """For other threads: the result of work(tx), once it is on disk."""
        operation = Operation(work)
        operation.client = ThreadWait(self)
        self.call_soon_threadsafe(functools.partial(self.committer.submit, operation))
        return operation.client.result()

    def drain(self):
        """Answer received requests, end long polls and waits, and stop the loop after that."""
        self.draining = True
        self.drain_deadline = time.monotonic() + DRAIN_TIMEOUT
        self.waiters.end_all()
        idle = [connection for connection in self.connections if connection.request is None]
        for connection in idle:
            connection.close()

    def _is_drained(self):
        return self.draining and (
            not self.connections or time.monotonic() >= self.drain_deadline)

    def _run(self):
        try:
            while not self._is_drained():
                self._run_once()
            for connection in list(self.connections):
                connection.close()
        except BaseException as error:      # the process ends, so that a supervisor starts it again
            self.server.log_bug('the loop, the engine ends', error)
            self.server.failed = True
        self.ended = True
        if self.server.failed:
            self.server.shutdown()

    def _run_once(self):
        """Wait for events, run their callbacks, then commit the operations these submitted."""
        before = time.monotonic()
        listening = self.committer.is_listening(before)
        if not listening:
            self.committer.store.next_deadline = 0      # leases have to be extended
        timeout = self._select_timeout(before)
        events = self.selector.select(timeout)
        self.now = now = time.monotonic()
        if listening:       # not `now` alone: the process may have been stopped in select()
            self.committer.listening_until = min(now, before + timeout)
        for key, _ in events:
            key.data(SOCKET_READY)
            if self.budget.request_bytes > MAX_REQUEST_BUFFER:
                self.budget.shed_load()
        for _ in range(len(self.calls_from_threads)):
            self.calls_from_threads.popleft()()
        self.timeouts.fire(now)
        self.committer.commit_batch(now)
        if self.budget.response_bytes > MAX_RESPONSE_BUFFER + MAX_RESPONSE:
            self.budget.drop_untaken()
        self._note_lag(now)

    def _note_lag(self, now):
        """Remember the longest time from a select() to the end of its pass, in seconds."""
        lag = time.monotonic() - now
        if now >= self.lag_minute + 60:
            self.lag_minute = now
            self.lags = [lag, self.lags[0]]
        elif lag > self.lags[0]:
            self.lags[0] = lag

    def _select_timeout(self, now):
        """Seconds until something is due; 0 if calls from other threads wait."""
        if self.calls_from_threads:
            return 0
        next_event = min(now + CLOCK_CHECK_INTERVAL, self.timeouts.next(),
                         self.committer.next_attempt(now), self.drain_deadline)
        return max(0, next_event - now)

    def _drain_wakeups(self, _):
        self.wakeup_reader.recv(4096)


# -- HTTP -----------------------------------------------------------------------------------------
REQUEST_LINE = re.compile(
    rb'([!#-\'*+.0-9A-Z^-z|~-]{1,32}) '                                 # method
    rb'(?:[Hh][Tt][Tt][Pp][Ss]?://([0-9A-Za-z._:\[\]-]{1,300})(?=/))?'  # absolute form
    rb'(/[!-~]*) HTTP/1\.([01])')
HEADER = re.compile(rb'([!#-\'*+.0-9A-Z^-z|~-]+):([\t -~\x80-\xff]*)')
JSON_TYPE = re.compile(r'application/json\s*(?:;\s*charset="?utf-8"?\s*)?', re.IGNORECASE)
SINGLE_HEADERS = ('host', 'content-length', 'content-type', 'authorization', 'origin',
                  'transfer-encoding')
CHUNK_LINE = re.compile(rb'([0-9A-Fa-f]{1,8})(?:[\t ]*;[\t -~]*)?')      # size, extensions
MAX_CHUNK_LINE = 256            # bytes
TLS_ALERT = b'\x15'             # type of the record that ends a connection; TLS 1.3 hides it
END_OF_HEAD = b'\r\n\r\n'
NOT_READY = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
PROMETHEUS = 'text/plain; version=0.0.4; charset=utf-8'
PLAIN_TEXT = 'text/plain; charset=utf-8'
COMMON_HEADERS = ('Cache-Control: no-store', 'X-Content-Type-Options: nosniff')


class Response(NamedTuple):
    """The result of a handler; a dict or JSON text stands for a Response with status 200."""
    body: object = b''      # bytes, text, a dict, or an open file
    status: int = 200
    content_type: str = 'application/json'
    headers: Tuple[Tuple[str, str], ...] = ()


JSON_OK = Response()[1:]


class RequestHead(NamedTuple):
    """The parsed request line and headers. Immutable, since requests with equal heads share it."""
    method: str
    path: str
    route: str                  # a key of ROUTES, or 'other'
    path_parameter: str         # '/jobs/17' is the route '/jobs/' and the parameter '17'
    query: str
    headers: Dict[str, str]     # by lower-case names
    is_http_1_1: bool
    keep_alive: bool
    # known once it is authorized
    entry: Optional['Route'] = None     # its row in ROUTES
    content_length: Optional[int] = 0       # None: the body is chunked


def check_head_bytes(head):
    """Refuse bytes that cannot become a request, without waiting for the rest."""
    if len(head) > MAX_HEAD:
        raise HeadersTooLarge(f'the request line and headers have more than {MAX_HEAD} bytes')
    if not head[:1].isalpha() or head.count(b'\n') != head.count(b'\r\n'):
        raise BadRequest('this is not HTTP/1.1, whose lines end in CR LF')


def parse_head(raw):
    """Parse strictly: refuse a head that another program could read differently."""
    lines = raw.split(b'\r\n')
    if len(lines) > MAX_HEADERS + 1:
        raise HeadersTooLarge(f'a request has at most {MAX_HEADERS} headers')
    request_line = REQUEST_LINE.fullmatch(lines[0])
    matches = [request_line, *map(HEADER.fullmatch, lines[1:])]
    if None in matches:
        line = lines[matches.index(None)].decode('latin-1')
        raise BadRequest(f'{describe(line)} is no line of a request head')
    fields = [(match[1].decode().lower(), match[2].strip(b' \t').decode('latin-1'))
              for match in matches[1:]]
    headers = dict(fields)
    is_http_1_1 = request_line[4] == b'1'
    if is_http_1_1 and 'host' not in headers:
        raise BadRequest('the header Host is missing')
    if len(headers) < len(fields):
        names = [name for name, _ in fields]
        for name in SINGLE_HEADERS:
            if names.count(name) > 1:
                raise BadRequest(f'the header {name} is there twice')
    connection = headers.get('connection', '').lower()
    keep_alive = 'close' not in connection and (is_http_1_1 or 'keep-alive' in connection)
    if request_line[2]:         # the host of an absolute form holds (RFC 9112, 3.2.2)
        headers['host'] = request_line[2].decode()
    path, _, query = request_line[3].decode().partition('?')
    route, path_parameter = split_path(path)
    return RequestHead(request_line[1].decode(), path, route, path_parameter, query, headers,
                       is_http_1_1, keep_alive)


def split_path(path):
    """(route, parameter) of a path; the route is 'other' if ROUTES has none."""
    end = path.find('/', 1) + 1 or len(path)
    route = path[:end]
    parameter = urllib.parse.unquote(path[end:], errors='surrogateescape')
    takes_parameter = route != '/' and route.endswith('/')
    if route not in ROUTES or bool(parameter) != takes_parameter:
        route = 'other'
    return route, parameter


def parse_query(head):
    """The validated fields of a query; a path's parameter is the field that its route requires."""
    if head.query.count('&') > len(FIELDS) or len(head.query) > MAX_QUERY:
        raise BadRequest('the query has more fields than there are, or is too long')
    pairs = urllib.parse.parse_qsl(head.query, keep_blank_values=True, errors='surrogateescape')
    if head.path_parameter:
        pairs.append((head.entry.required[0][0], head.path_parameter))
    fields = {}
    for field, value in pairs:
        if field in fields:
            raise BadRequest(f'{describe(field)} is there twice')
        fields[field] = value
        if field in JSON_QUERY_FIELDS and len(value) <= 30 and value != 'null':
            with contextlib.suppress(ValueError):   # validate() refuses other text
                fields[field] = json.loads(value)
    return validate(head.route, fields)


class Request:
    """A request on its way through a connection."""

    def __init__(self, connection):
        self.connection = connection
        self.deadline = connection.deadline     # the loop's time by which it has to arrive
        self.head = None            # a RequestHead; None until its end was received
        self.is_received = False
        self.body = None            # bytes, until they are parsed
        self.params = None          # the validated fields, of each item of a batch
        self.size = 0               # bytes of the body, counted until the response is ready
        self.operation = None       # an Operation or EventWait that it waits for

    @property
    def name(self):
        return self.head.route if self.head else 'a request head'

    def offload_kind(self):
        """SLOW or LARGE if a thread serves it, None if the loop does."""
        kind = self.head.entry.offload
        if kind == LARGE and 'wait' in self.params:     # offloaded after the wait
            return None
        if kind == LARGE and self.params.get('brief'):
            return SLOW
        return kind or (SLOW if len(self.body) >= OFFLOAD_BODY_BYTES else None)

    def receive(self):
        """Receive the head and body; a part of the connection's generator."""
        received = self.connection.received
        end = received.find(END_OF_HEAD)
        while end < 0:
            check_head_bytes(received)
            yield READ
            end = received.find(END_OF_HEAD)
        raw_head = bytes(received[:end])
        del received[:end + len(END_OF_HEAD)]
        server = self.connection.server
        self.head = server.known_heads.get(raw_head)
        if self.head is None:
            check_head_bytes(raw_head)
            # set before authorize(), so that a refusal is counted with the route
            self.head = parse_head(raw_head)
            self.head = server.authorize(self.head)
            server.remember_head(raw_head, self.head)
        length = self.head.content_length
        if length is None:
            self._continue_if_expected()
            self.body = yield from self._receive_chunks()
        else:
            self._require_capacity(length)
            if len(received) < length:
                self._continue_if_expected()
                while len(received) < length:
                    yield READ
            self.body = bytes(received[:length])
            self.size = length
            del received[:length]
        self.is_received = True

    def _require_capacity(self, size):
        self.connection.loop.budget.require_capacity(size)

    def _continue_if_expected(self):
        """Ask for the body, if the client waits for that (RFC 9110, 10.1.1)."""
        if 'expect' in self.head.headers and self.head.is_http_1_1:
            self.connection.sock.send(b'HTTP/1.1 100 Continue\r\n\r\n')

    def _receive_chunks(self):
        """The body of a chunked request (RFC 9112, 7.1), without extensions and trailers."""
        received = self.connection.received
        body = bytearray()
        size = yield from self._receive_chunk_size()
        while size:
            self.size = len(body) + size
            if self.size > MAX_BODY:
                raise PayloadTooLarge(f'the body has more than {MAX_BODY} bytes')
            self._require_capacity(self.size)
            while len(received) < size + 2:
                yield READ
            if received[size:size + 2] != b'\r\n':
                raise BadRequest('a chunk of the body is longer than its size')
            body += received[:size]
            del received[:size + 2]
            size = yield from self._receive_chunk_size()
        for _ in range(MAX_HEADERS + 1):
            trailer = yield from self._receive_line(MAX_HEAD)
            if not trailer:
                return bytes(body)
            if not HEADER.fullmatch(trailer):
                raise BadRequest('the body ends in a line that is no trailer')
        raise HeadersTooLarge(f'a request has at most {MAX_HEADERS} trailers')

    def _receive_chunk_size(self):
        line = yield from self._receive_line(MAX_CHUNK_LINE)
        match = CHUNK_LINE.fullmatch(line)
        if not match:
            raise BadRequest(f'{describe(line.decode("latin-1"))} is no size of a chunk')
        return int(match[1], 16)

    def _receive_line(self, longest):
        received = self.connection.received
        end = received.find(b'\r\n', 0, longest + 2)
        while end < 0:
            if len(received) > longest:
                raise BadRequest(f'a line of the body has more than {longest} bytes')
            yield READ
            end = received.find(b'\r\n', 0, longest + 2)
        line = bytes(received[:end])
        del received[:end + 2]
        return line


class Connection(Client):
    """A client's connection: requests are received, served and answered one after the other.

    Its generator yields the events to wait for, 0 for none; see Client.resume().
    """
    request = None              # a Request, from its first byte until its response is sent
    outgoing = None             # an Outgoing, until all of the response is sent
    watched = 0                 # events that it is registered for in the selector
    request_bytes = 0           # as the budget counts it
    response_bytes = 0

    def __init__(self, server, sock, address):
        super().__init__(server.loop)
        self.server = server
        self.sock = sock
        self.address = address
        self.received = bytearray()     # bytes not consumed yet; changed in place
        self.generator = self._serve()
        self.loop.connections.add(self)
        self.resume(None)       # starts the generator

    def resume(self, event):
        if not self.is_open:
            if isinstance(event, Response) and isinstance(event.body, io.IOBase):
                event.body.close()      # nobody takes it
            return
        try:
            if event is SOCKET_READY and self.watched == READ:
                event = self._receive()
            if isinstance(event, Exception):
                events = self.generator.throw(event)
            else:
                events = self.generator.send(event)
            if events != self.watched:
                self._watch(events)
            request_bytes = len(self.received) + (self.request.size if self.request else 0)
            response_bytes = self.outgoing.size if self.outgoing else 0
            self.loop.budget.update(self, request_bytes, response_bytes)
        except (StopIteration, OSError, EOFError, HTTPError):   # served, gone, or late
            self.close()
        except Exception as error:
            self.server.log_bug('a connection', error)
            self.close()

    @property
    def is_receiving(self):
        """Whether a part of a request is still to come."""
        return self.request is not None and not self.request.is_received

    def on_timeout(self):
        if self.request and self.request.operation:
            self.resume(NOTHING)
        else:
            self.resume(RequestTimeout(
                f'the request did not arrive within {REQUEST_TIMEOUT} seconds'))

    def close(self):
        if self.is_open:
            self.is_open = False
            self.generator.close()
            self.loop.connections.discard(self)
            self.loop.timeouts.cancel(self)
            self._watch(0)
            self.loop.budget.update(self, 0, 0)
            self.sock.close()
            self.request = None     # a cycle, which the collector would free much later
            self.outgoing = None

    def _receive(self):
        """Receive a small piece: its pipelined requests are never shed for their size."""
        try:
            data = self.sock.recv(MAX_HEAD)
        except NOT_READY:
            return SOCKET_READY
        self.received += data
        return SOCKET_READY if data else EOFError()

    def is_connected(self):
        if not self.is_open:
            return False
        try:
            data = socket.socket.recv(self.sock, 1, socket.MSG_PEEK)    # beneath TLS, too
        except NOT_READY:
            return True
        except OSError:
            return False
        return data != b'' and not (self.server.tls and data == TLS_ALERT)

    def _watch(self, events):
        if self.watched:
            self.loop.selector.unregister(self.sock)
        if events:
            self.loop.selector.register(self.sock, events, self.resume)
        self.watched = events

    def _serve(self):
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.server.tls:     # the handshake is part of receiving
            self.sock = self.server.tls.wrap_socket(
                self.sock, server_side=True, do_handshake_on_connect=False)
        keep_alive = True
        self.set_timeout(REQUEST_TIMEOUT)
        while keep_alive and (self.received or not self.loop.draining):
            while not self.received or not self._skip_blank_lines():
                yield READ
            self.set_timeout(REQUEST_TIMEOUT)
            self.request = Request(self)
            keep_alive = yield from self._serve_request(self.request)
            self.request = None
            self.set_timeout(KEEP_ALIVE_TIMEOUT if keep_alive else LINGER)
        if not keep_alive:      # closing at once would reset the connection and lose the response
            self.sock.shutdown(socket.SHUT_WR)
        while not (keep_alive or self.loop.draining):       # until the client closes, or LINGER
            self.received.clear()
            yield READ

    def _skip_blank_lines(self):
        """Skip CR and LF before a request (RFC 9112, 2.2). True if bytes of a request are left."""
        if self.received[0] in b'\r\n':
            self.received[:] = self.received.lstrip(b'\r\n')
        return bool(self.received)

    def _serve_request(self, request):
        """Receive and answer it. True if another may follow."""
        # after a bad head or body, it is unknown where the next request begins
        keep_alive = False
        try:
            yield from request.receive()
            keep_alive = request.head.keep_alive
            self._begin_response(request, (yield from self._dispatch(request)), keep_alive)
        except (OSError, EOFError):     # the client is gone
            raise
        except Exception as error:
            self._begin_error(request, error, keep_alive)
        request.operation = request.body = request.params = None
        request.size = 0
        with contextlib.closing(self.outgoing) as outgoing:
            yield from self._send(outgoing)
        self.outgoing = None
        return keep_alive

    def _dispatch(self, request):
        """The response of the handler, or of the operation that it returns."""
        head = request.head
        if head.method != 'POST':
            request.params = parse_query(head)
        kind = request.offload_kind()
        if kind:
            result = yield from self._offload(kind, self.server.handle, request)
        else:
            result = self.server.handle(request)
        if isinstance(result, (Operation, EventWait)):
            result = yield from self._run_operation(request, result)
        if head.route in AUDITED:
            log(audit_line(self.address[0], head.route, request.params, result))
        return result

    def _run_operation(self, request, operation):
        """The response, once the operation has its result."""
        request.operation = operation
        request.body = None
        operation.client = self
        self.deadline = NEVER
        if operation.topic:
            request.size = 0        # the params of a poll or wait are small
        try:
            waits = operation.submit(self.loop)
            result = (yield from self._wait_for_result()) if waits else None
        finally:
            if operation.topic:
                self.loop.waiters.withdraw(operation)
        kind = request.head.entry.offload
        if kind and isinstance(operation, EventWait):       # its render() reads the database
            return (yield from self._offload(kind, operation.render, result))
        return operation.render(result)

    def _offload(self, kind, function, *args):
        """The result of a function that one of the server's threads calls."""
        self.deadline = NEVER
        self.loop.offloads[kind].submit(SlowCall(self, self.request.name, function, args))
        return (yield from self._wait_for_result())

    def _wait_for_result(self):
        """Wait for the event that is a result. Bytes received meanwhile are the next request."""
        event = SOCKET_READY
        at_end = False      # True: the client sends no more, but may still read
        while event is SOCKET_READY:
            receives = not at_end and len(self.received) <= MAX_HEAD
            try:
                event = yield READ if receives else 0
            except EOFError:
                if self.request.operation and self.request.operation.topic:
                    raise       # no job is handed to a client that may be gone
                at_end = True
        return event

    def _begin_error(self, request, error, keep_alive):
        error = self.server.as_http_error(request.name, error)
        response = Response({'error': str(error)}, error.status, headers=tuple(error.headers))
        if error.status == 401 and request.name == '/':
            response = dashboard(401)       # the page is no secret, and asks for the token
        self._begin_response(request, response, keep_alive)

    def _begin_response(self, request, response, keep_alive):
        """Set `outgoing`; count and log the response."""
        method = '-'
        route = 'other'
        if request.head:
            method = request.head.method
            route = request.head.route
        if not isinstance(response, Response):
            response = (response, *JSON_OK)
        body = encode_body(response[0])
        length = length_of(body)
        if method == 'GET' and isinstance(body, bytes):
            self.loop.budget.require_capacity(length)
        status = response[1]
        self.server.store.meter.request(route, status)
        if self.server.verbose:
            log(f'{self.address[0]} {method} {route} {status}')
        connection = '' if keep_alive else 'close'
        if keep_alive and not request.head.is_http_1_1:
            connection = 'keep-alive'
        head = encode_head(response, length, connection)
        self.outgoing = Outgoing(head, body)
        if method == 'HEAD':
            self.outgoing.close()
            self.outgoing = Outgoing(head, b'')

    def _send(self, outgoing):
        """Send the response, a piece in each pass of the loop."""
        ends = self.loop.now + REQUEST_TIMEOUT + outgoing.length / MIN_DOWNLOAD_RATE
        while not outgoing.send_piece(self.sock):
            self.set_timeout(min(REQUEST_TIMEOUT, ends - self.loop.now))
            yield WRITE


class Outgoing:
    """A response on its way to the client; close() closes the file in it."""

    def __init__(self, head, body):
        """`body` is bytes or an open file."""
        self.piece = head           # bytes that are sent next
        self.rest = None            # a stream of the bytes that follow
        self.rest_in_memory = 0     # bytes of it that are in memory
        self.length = length_of(body)
        if not isinstance(body, bytes):
            self.rest = body
        elif self.length > MAX_JOINED_BYTES:
            self.rest = io.BytesIO(body)        # which does not copy it
            self.rest_in_memory = self.length
        else:
            self.piece += body

    @property
    def size(self):
        """Bytes in memory."""
        return len(self.piece) + self.rest_in_memory

    def send_piece(self, sock):
        """Send what the socket takes of the next piece. True once all is sent."""
        try:
            sent = sock.send(self.piece)
        except NOT_READY:
            return False
        self.piece = memoryview(self.piece)[sent:]
        if not self.piece and self.rest:
            self.piece = self.rest.read(CHUNK_BYTES)
        return not self.piece

    def close(self):
        if self.rest:
            self.rest.close()


def length_of(body):
    return len(body) if isinstance(body, bytes) else os.fstat(body.fileno()).st_size


def encode_body(body):
    """Bytes, or an open file as it is. JSON and text end in one line feed."""
    if isinstance(body, dict):
        body = encode(body)
    if isinstance(body, str):
        body = (body if body.endswith('\n') else body + '\n').encode()
    return body


def encode_head(response, length, connection):
    """The status line and headers of a response; `connection` is its option, or empty."""
    _, status, content_type, headers = response
    head = response_head(status, content_type, headers, connection)
    head += date_header(int(time.time()))
    return head + (b'\r\n' if status == 204 else b'Content-Length: %d\r\n\r\n' % length)


@functools.lru_cache(maxsize=256)
def response_head(status, content_type, headers, connection):
    """The status line and all headers but Date and Content-Length."""
    lines = [f'HTTP/1.1 {status} {http.client.responses[status]}', *COMMON_HEADERS]
    lines += [f'{name}: {value}' for name, value in headers]
    if connection:
        lines.append(f'Connection: {connection}')
    if status != 204:
        lines.append(f'Content-Type: {content_type}')
    return ''.join(f'{line}\r\n' for line in lines).encode('latin-1')


@functools.lru_cache(maxsize=1)
def date_header(second):
    return f'Date: {email.utils.formatdate(second, usegmt=True)}\r\n'.encode()


# handlers: (server, params) -> a response, or an Operation or EventWait whose result becomes one

def enqueue(server, params):
    producers = server.store.producers
    if isinstance(params, dict):
        return Operation(
            lambda tx: producers.enqueue(tx, [params]),
            lambda jobs: producers.render_created(jobs)[0],
            single_insert=None if 'after' in params else params)
    return Operation(
        lambda tx: producers.enqueue(tx, params),
        lambda jobs: f'{{"jobs":{json_list(producers.render_created(jobs))}}}')


def poll(server, params):
    def render(jobs):
        if not jobs:
            return Response(status=204)
        texts = [claim_json(job) for job in jobs]
        return json_list(texts) if 'limit' in params else texts[0]

    claims = server.store.claims
    topic = ('queue', params['queue'])
    wait = long_poll_seconds(params)
    return LongPoll(lambda tx: claims.poll(tx, params), render, topic, wait)


def long_poll_seconds(params):
    """Seconds until a poll or wait is answered: before proxies give up."""
    return min(params.get('wait', 0) / 1000000, LONG_POLL_TIMEOUT)


def write_call(name):
    """The handler that runs a method of the store, for one body or for each item of `jobs`."""
    method_of = operator.attrgetter(name)

    def handler(server, params):
        method = method_of(server.store)
        if isinstance(params, dict):
            return Operation(lambda tx: method(tx, params))
        apply_item = server.store.claims.apply_item
        return BatchOperation(lambda tx, item: apply_item(tx, method, item), params)
    return handler


def schedule(server, params):
    defaults = {**dict.fromkeys(SCHEDULE_FIELDS), 'priority': 0}
    if 'cron' in params:
        defaults['zone'] = 'UTC'
    wanted = {**defaults, **params}
    if 'cron' in params:
        load_cron(wanted['cron'], wanted['zone'])     # refused before a transaction begins

    def render(row_and_created):
        row, created = row_and_created
        return schedule_json(row, created=created)

    return Operation(lambda tx: server.store.schedules.schedule(tx, wanted), render)


def change_call(call):
    """The handler of cancel, retry or purge: for jobs by their ids, or for all that match."""
    def change_one(server, params):
        def work(tx):
            server.store.operators.change_item(tx, params, call)
            return {'count': 1}
        return Operation(work)

    def change_each(server, items):
        results = []
        while items:
            slice_results, items = server.loop.run_in_transaction(functools.partial(
                server.store.operators.change_items, call=call, items=items))
            results += slice_results
        return {'jobs': results}

    def change_many(server, params):
        operators = server.store.operators
        method = operators.changes[call]
        statuses = [params['status']] if 'status' in params else TRANSITIONS[call].sources
        count = 0
        for seqs in operators.matching_seqs(params):
            while seqs:
                changed, seqs = server.loop.run_in_transaction(functools.partial(
                    operators.change_slice, method=method, seqs=seqs, statuses=statuses))
                count += changed
        return {'count': count}

    def handler(server, params):
        if 'id' in params:
            if len(params) > 1:
                raise BadRequest('id names one job, and stands without queue, status and tag')
            return change_one(server, params)
        if not server.change_slots.acquire(blocking=False):
            raise Unavailable('other changes of whole queues are under way; try again')
        try:
            change = change_each if isinstance(params, list) else change_many
            return change(server, params)
        finally:
            server.change_slots.release()
    return handler


def get_job(server, params):
    """The job; with `wait`, when it has ended or after that time."""
    queries = server.store.queries
    id = params['id']
    if 'wait' not in params:
        return queries.job(id)
    return EventWait(lambda: queries.has_ended(id), lambda _: queries.job(id),
                     ('job', id), long_poll_seconds(params))


def wait_for_loss(server, params):
    """Whether the worker has lost a job after `since`, as it was cancelled or its lease ended.

    The next call is given the `since` of this response, so that it misses no loss in between.
    """
    worker = params['worker']
    lost_at = server.store.workers.lost_at
    since = params.get('since', lost_at.get(worker, 0))

    def was_lost():
        return lost_at.get(worker, 0) > since

    def render(was_woken):
        return {'lost': bool(was_woken) or was_lost(), 'since': max(since, lost_at.get(worker, 0))}

    return EventWait(was_lost, render, ('worker', worker), long_poll_seconds(params))


def list_jobs(server, params):
    """A page of jobs; with `id`, that job: an id such as `..` cannot be in a path."""
    return get_job(server, params) if 'id' in params else server.store.queries.jobs(**params)


def backup(server, params):
    database = server.store.database
    name = urllib.parse.quote(os.path.basename(database.path))
    headers = (('Content-Disposition', f"attachment; filename*=UTF-8''{name}"),)
    return Response(database.backups.make(), 200, 'application/vnd.sqlite3', headers)


def health(server, params):
    """Status 503 in trouble, for probes that check the status alone."""
    state = server.store.queries.health()
    return Response(state, 200 if state['status'] == 'ok' else 503)


def read_call(name):
    """The handler that runs a method of the store that reads."""
    method_of = operator.attrgetter(name)
    return lambda server, params: method_of(server.store)(**params)


def metrics(server, params):
    return Response(exposition(server), content_type=PROMETHEUS)


def docs(server, params):
    return Response(__doc__, content_type=PLAIN_TEXT)


def node_sdk(server, params):
    return Response(NODE_SDK, content_type='text/javascript; charset=utf-8')


def dashboard(status=200):
    headers = (('Content-Security-Policy', POLICY),)
    return Response(DASHBOARD, status, 'text/html; charset=utf-8', headers)


class Route(NamedTuple):
    method: str
    handler: Callable
    required: Sequence[Sequence[str]]   # groups of fields; one field of each group is required
    rules: Dict[str, 'FieldRule']       # all fields that it takes
    offload: Optional[str]              # SLOW or LARGE: a thread serves it


def route(method, handler, required=(), optional='', offload=None, **rules):
    """A Route. `required` lists fields, and tuples of fields of which one is required.

    `optional` lists fields, separated by blanks. `rules` replace those in FIELDS.
    """
    required = [(group,) if isinstance(group, str) else group for group in required]
    fields = [*itertools.chain(*required), *optional.split()]
    return Route(method, handler, required,
                 {field: rules.get(field, FIELDS[field]) for field in fields}, offload)


def change_route(call, *required):
    status = one_of(TRANSITIONS[call].sources)
    return route('POST', change_call(call), required, 'id queue status tag jobs', offload=SLOW,
                 status=status)


ROUTES = {
    '/enqueue': route(
        'POST', enqueue, ['queue'],
        'payload timeout max_retries tag priority delay run_at key key_until replace expires group '
        'id jobs after after_any',
        after=JOB_IDS),
    '/poll': route(
        'POST', poll, ['queue'], 'limit wait worker lease max_retries timeout hung'),
    '/complete': route('POST', write_call('claims.complete'), ['id'], 'attempt result jobs'),
    '/fail': route(
        'POST', write_call('claims.fail'), ['id'], 'attempt error retry delay jobs',
        delay=clamped_duration(0, MAX_DELAY)),
    '/heartbeat': route(
        'POST', write_call('claims.heartbeat'), ['id'], 'attempt progress jobs'),
    '/step': route('POST', write_call('claims.step'), ['id', 'name'], 'attempt result', name=NAME),
    '/release': route('POST', write_call('claims.release'), ['id'], 'attempt jobs'),
    '/cancel': change_route('cancel', ('id', 'queue', 'tag'), ('id', 'status', 'tag')),
    '/retry': change_route('retry', ('id', 'status', 'tag')),
    '/reschedule': route(
        'POST', write_call('operators.reschedule'),
        ['id', ('delay', 'run_at', 'priority')], 'jobs'),
    '/purge': change_route('purge', ('id', 'queue', 'status', 'tag')),
    '/pause': route('POST', write_call('operators.pause'), ['queue']),
    '/resume': route('POST', write_call('operators.resume'), ['queue']),
    '/limit': route('POST', write_call('limits.set'), ['queue'], 'max_running rate per'),
    '/schedule': route(
        'POST', schedule, ['name', 'queue', ('cron', 'every')],
        'zone payload timeout max_retries tag priority key group'),
    '/unschedule': route('POST', write_call('schedules.unschedule'), ['name']),
    '/schedules': route(
        'GET', read_call('queries.schedules'), optional='limit after name brief', offload=LARGE),
    '/jobs/': route('GET', get_job, ['id'], 'wait', offload=LARGE),
    '/status/': route('GET', get_job, ['id'], 'wait', offload=LARGE),
    '/details/': route('GET', read_call('queries.newest'), ['tag'], offload=LARGE),
    '/jobs': route(
        'GET', list_jobs,
        optional='id queue status tag group search limit after brief needed_by needs',
        offload=LARGE),
    '/lost': route('GET', wait_for_loss, ['worker'], 'wait since'),
    '/queues': route(
        'GET', read_call('overview.queues'), optional='limit after busy queue search totals',
        offload=SLOW),
    '/metrics': route('GET', metrics, offload=SLOW),
    '/health': route('GET', health),
    '/backup': route('GET', backup, offload=SLOW),
    '/docs': route('GET', docs),
    '/openapi.json': route('GET', lambda server, params: openapi()),
    '/rundown.mjs': route('GET', node_sdk),
    '/': route('GET', lambda server, params: dashboard()),
}


# the calls that are logged: those of operators
AUDITED = frozenset(('/pause', '/resume', '/limit', '/cancel', '/retry', '/purge', '/reschedule',
                     '/schedule', '/unschedule'))
AUDIT_FIELDS = {        # field that is logged -> how it is written
    **dict.fromkeys(('id', 'name', 'queue', 'status', 'tag', 'group', 'max_running', 'rate', 'cron',
                     'zone', 'priority'), describe),
    'per': as_seconds,
    'every': as_seconds,
    'delay': as_seconds,
    'run_at': rfc3339,
}


def audit_line(address, path, params, result):
    """Address, call, its fields, and to how many jobs it applied."""
    if isinstance(params, dict):
        fields = [f'{field}={write(params[field])}'
                  for field, write in AUDIT_FIELDS.items() if field in params]
    else:
        fields = [f'{len(params)} jobs']
    count = 1
    if isinstance(result, dict):
        items = [item for item in result.get('jobs', ()) if 'error' not in item]
        count = result.get('count', len(items) if 'jobs' in result else 1)
    return f'{address} {path} {" ".join(fields)}: {count}'


class RequestHandler(socketserver.BaseRequestHandler):
    """Serves slow calls, one after the other, in a thread of the server's.

    Its `request`, to socketserver the connection, is the Offload with the calls.
    """

    def handle(self):
        with contextlib.suppress(Empty):
            while True:
                self._serve(self.request.calls.get(timeout=1))

    def _serve(self, call):
        try:
            result = call.function(*call.args)
            if isinstance(result, str):
                result = encode_body(result)
        except Exception as error:
            result = self.server.as_http_error(call.name, error)
        taken = threading.Event()       # the loop has taken the result
        if isinstance(result, bytes) and len(result) <= SMALL_MESSAGE_BYTES:
            taken.set()                 # small results may pile up
        self._tell_loop(self.request.finished, call, result, taken)
        del call, result        # which may be large
        while not taken.wait(1) and not self.server.loop.ended:
            pass

    def finish(self):
        self._tell_loop(self.request.thread_ended)

    def _tell_loop(self, function, *args):
        self.server.loop.call_soon_threadsafe(functools.partial(function, *args))


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, and decides which requests are allowed.

    The event loop serves quick calls. Threads, which socketserver starts, serve slow calls.
    """
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    allow_reuse_address = os.name != 'nt'
    server_bind = socketserver.TCPServer.server_bind    # HTTPServer's asks the resolver for a name

    def __init__(self, address, token=None, tls=None, names=(), verbose=False):
        self.address_family = socket.AF_INET6 if ':' in address[0] else socket.AF_INET
        # constant after start
        self.tls = tls
        self.verbose = verbose
        self.token = token.encode() if token else None
        self.is_loopback_only = is_loopback(address[0])
        self.allowed_hosts = {'localhost', address[0].lower(), *(name.lower() for name in names)}
        self.store = None
        self.loop = None
        self.ipv6_listener = None   # on ::1, if the server listens on 127.0.0.1
        # touched by the loop's thread only
        self.known_heads = {}       # bytes -> authorized RequestHead
        # safe without a lock
        self.change_slots = threading.Semaphore(OFFLOAD_THREADS - 1)    # a thread is left to read
        self.failed = False         # the loop has ended with an exception
        super().__init__(address, RequestHandler)
        host = f'[{address[0]}]' if ':' in address[0] else address[0]
        self.url = f'{"https" if tls else "http"}://{host}:{self.server_address[1]}'

    def start(self, store):
        self.store = store
        self.loop = EventLoop(self, store)
        if self.server_address[0] == '127.0.0.1':
            with contextlib.suppress(OSError):      # no IPv6 here, or the port is taken there
                self.ipv6_listener = IPv6Listener(self)
        self.loop.thread.start()
        self.loop.run_in_transaction(lambda tx: None)  # extends leases before polls come

    def get_request(self):
        try:
            if len(self.loop.connections) > self.loop.max_connections:
                raise OSError
            return super().get_request()
        except OSError:         # too many files or connections: this one stays in the backlog
            time.sleep(0.1)
            raise

    def process_request(self, request, client_address):
        """For serve_forever(): a new connection belongs to the loop."""
        self.loop.call_soon_threadsafe(
            functools.partial(Connection, self, request, client_address))

    def start_thread(self, offload):
        """For the loop: have a RequestHandler serve slow calls in a thread."""
        super().process_request(offload, None)

    def shutdown_request(self, request):
        """A thread with slow calls has no connection to close."""
        if not isinstance(request, Offload):
            super().shutdown_request(request)

    def handle(self, request):
        """The result of the route's handler for the request."""
        head = request.head
        if head.method == 'POST':
            request.params = validate_batch(head.route, parse_json(request.body))
        return head.entry.handler(self, request.params)

    def remember_head(self, raw, head):
        """Cache an authorized head, since clients send the same one again and again."""
        if len(raw) <= MAX_KNOWN_HEAD_BYTES:
            if len(self.known_heads) >= MAX_KNOWN_HEADS:
                self.known_heads.clear()
            self.known_heads[raw] = head

    def authorize(self, head):
        """The head with its entry and content length; an HTTPError if the client may not call it.

        The result depends on the head and on constants alone, so it can be cached.
        """
        self._check_host(head)
        if self.token and head.route != '/health':
            sent = head.headers.get('authorization', '').encode('latin-1')
            if not hmac.compare_digest(sent, b'Bearer ' + self.token):
                raise Unauthorized(
                    'the token is missing or wrong: send Authorization: Bearer TOKEN')
        entry = ROUTES.get(head.route)
        if not entry:
            raise NotFound(f'there is no {describe(head.path)}; GET /docs lists what there is')
        allowed = ('POST',) if entry.method == 'POST' else ('GET', 'HEAD')
        if head.method not in allowed:
            raise MethodNotAllowed(f'{head.route} takes {entry.method}', Allow=', '.join(allowed))
        self._check_origin(head)
        if entry.method == 'POST' and not JSON_TYPE.fullmatch(head.headers.get('content-type', '')):
            raise UnsupportedMediaType('Content-Type must be application/json')
        if entry.method == 'POST' and head.query:
            raise BadRequest(f'{head.route} takes its fields in the body, not in the query')
        return head._replace(entry=entry, content_length=self._content_length(head))

    def _is_own_name(self, host):
        """Whether a host, perhaps with a port, is a name of this engine.

        Other names are refused, since the DNS of an attacker may point them here (DNS rebinding).
        An address needs no DNS, so all are taken, unless the engine listens on loopback alone.
        """
        name = re.sub(r':\d*$', '', host).strip('[]').lower()
        if name in self.allowed_hosts or is_loopback(name):
            return True
        return address_of(name) is not None and not self.is_loopback_only

    def _check_host(self, head):
        host = head.headers.get('host', 'localhost')
        if not self._is_own_name(host):
            raise Misdirected(
                f'Host {describe(host)} is not a name of this engine; see --allow-host')

    def _check_origin(self, head):
        """Pages of other origins may link to the engine's pages, but may not call it.

        A proxy may have rewritten Host. A browser then still sends `Sec-Fetch-Site: same-origin`,
        which no page can set; Origin must name the engine nevertheless. With a token there is no
        check, since foreign pages do not know it.
        """
        if self.token or head.route in ('/', '/docs', '/health'):
            return
        site = head.headers.get('sec-fetch-site', 'none')
        origin = head.headers.get('origin')
        is_foreign = site not in ('none', 'same-origin')
        if origin is not None:
            host = origin.partition('://')[2]
            is_same = host == head.headers.get('host') or (
                site == 'same-origin' and self._is_own_name(host))
            is_foreign = is_foreign or not is_same
        if is_foreign:
            raise Forbidden(
                'Origin or Sec-Fetch-Site: pages of other origins may not call this engine')

    def _content_length(self, head):
        """The length of the body; None if it is chunked. Both at once are refused."""
        length = head.headers.get('content-length')
        coding = head.headers.get('transfer-encoding')
        if coding is not None:
            if length is not None or not head.is_http_1_1 or coding.lower() != 'chunked':
                raise BadRequest('Transfer-Encoding can only be chunked, without '
                                 'Content-Length and not in HTTP 1.0')
            return None
        if length is None:
            if head.method == 'POST':
                raise LengthRequired('Content-Length or Transfer-Encoding: chunked is needed')
            return 0
        if not re.fullmatch('[0-9]{1,15}', length):
            raise BadRequest(f'Content-Length must be a number of bytes, not {describe(length)}')
        if int(length) > MAX_BODY:
            raise PayloadTooLarge(
                f'the body has {int(length)} bytes; at most {MAX_BODY} are taken')
        return int(length)

    def as_http_error(self, where, error):
        """The error as a response. A bug of the engine becomes a 500, and is logged."""
        if isinstance(error, HTTPError):
            return error
        self.log_bug(where, error)
        return InternalError('the engine made a mistake; its log says which')

    def log_bug(self, where, error):
        """One line with the innermost frame of this file; with --verbose the whole traceback."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__)
                  if frame.filename == __file__]
        place = 'the engine'
        if frames:
            place = f'{frames[-1].name}, {os.path.basename(__file__)} line {frames[-1].lineno}'
        log(f'fault in {where}: {type(error).__name__}: {error} (in {place})')
        if self.verbose:
            for line in traceback.format_exception(type(error), error, error.__traceback__):
                for part in line.rstrip('\n').split('\n'):
                    log(part)

    def run_due_now(self):
        """Do everything that is due, then return: for tests, which move the clock by hand."""
        def is_due(tx):
            return self.store.next_deadline <= self.store.clock.now()

        self.loop.call_soon_threadsafe(self.loop.committer.check_clock)
        while self.loop.run_in_transaction(is_due):
            pass

    tick = run_due_now      # its name in testing() of the SDK of version 1.1

    def server_close(self):
        """Close the listener, answer received requests, and close the database.

        To be called once serve_forever() has returned.
        """
        super().server_close()
        if self.loop:
            if self.ipv6_listener:
                self.loop.call_soon_threadsafe(self.ipv6_listener.close)
            self.loop.call_soon_threadsafe(self.loop.drain)
            self.loop.thread.join(DRAIN_TIMEOUT + LOCK_TIMEOUT)
            if not self.loop.thread.is_alive():     # else the next start recovers, as after a crash
                self.store.database.close()


class IPv6Listener(Client):
    """Accepts connections on ::1, too: some clients take localhost for that address alone."""

    def __init__(self, server):
        super().__init__(server.loop)
        self.server = server
        self.sock = socket.socket(socket.AF_INET6)
        try:
            self.sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, server.allow_reuse_address)
            self.sock.bind(('::1', server.server_address[1]))
            self.sock.listen(server.request_queue_size)
        except OSError:
            self.sock.close()
            raise
        self.sock.setblocking(False)
        self.on_timeout()

    def resume(self, event):
        try:
            if len(self.loop.connections) > self.loop.max_connections:
                raise OSError
            Connection(self.server, *self.sock.accept())
        except NOT_READY:
            pass
        except OSError:     # too many files or connections: new ones stay in the backlog
            self.loop.selector.unregister(self.sock)
            self.set_timeout(0.1)

    def on_timeout(self):
        self.loop.selector.register(self.sock, READ, self.resume)

    def close(self):
        if self.deadline == NEVER:
            self.loop.selector.unregister(self.sock)
        self.loop.timeouts.cancel(self)
        self.sock.close()


def address_of(name):
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name)


def is_loopback(name):
    return name == 'localhost' or getattr(address_of(name), 'is_loopback', False)


def log(sentence):
    """Write one line to stderr, with control characters escaped; do nothing if it is closed."""
    line = UNPRINTABLE.sub(lambda match: f'\\x{ord(match[0]):02x}', sentence)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(local_time(), line, file=sys.stderr, flush=True)


def local_time():
    return time.strftime('%Y-%m-%d %H:%M:%S')


# -- Metrics --------------------------------------------------------------------------------------
# METER_EVENTS without 'started', which has a histogram that counts it
COUNTER_EVENTS = ('enqueued', 'completed', 'failed', 'lost', 'released', 'cancelled', 'expired')
LABEL_ESCAPES = str.maketrans({'\\': r'\\', '"': r'\"', '\n': r'\n'})


class Family(NamedTuple):
    """A metric with its samples: texts that follow its name in the exposition."""
    name: str
    kind: str
    meaning: str
    samples: Iterable[str]


def exposition(server):
    """The metrics in the text format of Prometheus, version 0.0.4."""
    lines = []
    for family in metric_families(server):
        lines.append(f'# HELP rundown_{family.name} {family.meaning}\n')
        lines.append(f'# TYPE rundown_{family.name} {family.kind}\n')
        lines.extend(f'rundown_{family.name}{text}\n' for text in family.samples)
    return ''.join(lines)


def metric_families(server):
    store = server.store
    yield from storage_families(store.database)
    yield from loop_families(server.loop)
    queues, schedules = store.queries.metric_counts()
    now = store.clock.now()
    yield from live_families(store, now)
    yield from queue_families(queues, now)
    yield from schedule_families(schedules, now)
    yield from meter_families(store.meter, {queue['queue'] for queue in queues})


def gauge(name, meaning, value):
    return Family(name, 'gauge', meaning, [sample(value)])


def storage_families(database):
    yield gauge('storage_trouble', '1 while jobs cannot be stored, as GET /health says.',
                int(database.trouble() is not None))
    yield gauge('database_bytes', 'Size of the database.', file_size(database.path))
    yield gauge('log_bytes', 'Size of its write-ahead log, which long readers let grow.',
                database.log_bytes())
    yield gauge('disk_free_bytes', 'Free bytes of the disk, besides the reserve.',
                database.reserve.free)
    yield gauge('reserve_bytes', 'Kept free for the time when jobs have filled the disk; '
                '0 while there is plenty, and when it is used up.',
                database.reserve.size if database.reserve.is_held else 0)


def loop_families(loop):
    yield gauge('loop_lag_seconds', 'Longest time in this and the last minute in which the event '
                'loop received nothing.', max(loop.lags))
    yield Family('commit_seconds', 'summary', 'Seconds from the begin of a transaction to its '
                 'commit.', [sample(loop.committer.commit_seconds, '_sum'),
                             sample(loop.committer.commits, '_count')])


def live_families(store, now):
    seen = list(store.workers.seen.items())
    live = {worker for (worker, _), (seen_at, _) in seen if seen_at > now - micros(60)}
    yield gauge('workers', 'Workers that polled or sent a heartbeat in the last minute.',
                len(live))
    with store.database.reading() as db:
        paused, = db.execute('SELECT COUNT(*) FROM queues WHERE paused').fetchone()
    yield gauge('queues_paused', 'Queues that are paused.', paused)


def queue_families(queues, now):
    yield Family(
        'jobs', 'gauge',
        'Jobs by queue and status; scheduled, waiting and grouped ones are pending, too.',
        (sample(queue[name], queue=queue['queue'], status=name)
         for queue in queues for name in COUNTS if name != 'grouped' or queue[name]))
    yield Family(
        'max_running', 'gauge', 'Jobs of the queue that may run at a time.',
        (sample(queue['max_running'], queue=queue['queue'])
         for queue in queues if queue['max_running']))
    yield Family(
        'rate', 'gauge', 'Claims a second that the queue allows.',
        (sample(queue['rate'] * 1000000 / queue['per'], queue=queue['queue'])
         for queue in queues if queue['rate']))
    yield Family(
        'oldest_seconds', 'gauge', 'How long the longest waiting job has been due.',
        (sample(max(0, now - (queue['oldest'] or now)) / 1000000, queue=queue['queue'])
         for queue in queues))


def schedule_families(schedules, now):
    yield Family(
        'schedule_next_seconds', 'gauge', 'Seconds until the next tick of the schedule.',
        (sample((row['next_run_at'] - now) / 1000000, schedule=row['name']) for row in schedules))
    yield Family(
        'schedule_skipped_total', 'counter',
        'Ticks without a job, as the one before had not ended.',
        (sample(row['skipped'], schedule=row['name']) for row in schedules))


def meter_families(meter, named_queues):
    """Counts since the start. Queues that are not in `named_queues` are summed up.

    Counters of a queue begin at 0, since Prometheus sees no increase in a first sample.
    """
    totals = collections.Counter()
    with meter.lock:
        requests = dict(meter.requests)
        commit_sizes = list(meter.commit_sizes)
        histograms = {key: list(histogram) for key, histogram in meter.seconds.items()
                      if key[1] in named_queues}
        for (event, queue), count in meter.totals.items():
            totals[event, queue if queue in named_queues else '(others)'] += count
    queues = sorted(named_queues.union(queue for _, queue in totals))
    for event in COUNTER_EVENTS:
        yield Family(
            f'{event}_total', 'counter', f'Jobs or attempts {event} since the start of the engine.',
            [sample(totals[event, queue], queue=queue) for queue in queues])
    for event, name, span in (('started', 'wait', 'due to claimed'),
                              ('completed', 'job', 'claimed to completed')):
        yield Family(
            f'{name}_seconds', 'histogram', f'Seconds from {span}.',
            [text for (kind, queue), histogram in histograms.items() if kind == event
             for text in histogram_samples(histogram, DURATION_BUCKETS, queue=queue)])
    yield Family('commit_operations', 'histogram', 'Operations that share a commit.',
                 histogram_samples(commit_sizes, COMMIT_SIZE_BUCKETS))
    yield Family(
        'requests_total', 'counter', 'Requests by route and status.',
        [sample(count, route=route, status=status)
         for (route, status), count in requests.items()])


def histogram_samples(histogram, bounds, **labels):
    *counts, total = histogram
    cumulative = list(itertools.accumulate(counts))
    for bound, count in zip((*bounds, '+Inf'), cumulative):
        yield sample(count, '_bucket', **labels, le=bound)
    yield sample(total, '_sum', **labels)
    yield sample(cumulative[-1], '_count', **labels)


def sample(value, suffix='', **labels):
    """A line of a family without the family's name."""
    if not labels:
        return f'{suffix} {value}'
    pairs = ','.join(f'{name}="{str(text).translate(LABEL_ESCAPES)}"'
                     for name, text in labels.items())
    return f'{suffix}{{{pairs}}} {value}'


# -- OpenAPI ---------------------------------------------------------------------------------------
COLUMN_SCHEMAS = {      # renderer of a column -> the JSON Schema of its output, without null
    json_string: {'type': 'string'},
    json_key: {'type': 'string'},
    json_number: {'type': 'integer'},
    json_time: {'type': 'string', 'format': 'date-time'},
    json_duration: {'type': 'number'},
    json_timeout: {'type': 'number'},
    json_max_retries: {'type': 'integer'},
    json_value: {},
}


def object_schema(required='', **properties):
    return {'type': 'object', 'properties': properties, 'required': required.split()}


def list_schema(items):
    return {'type': 'array', 'items': items}


def or_null(schema):
    return {**schema, 'type': [schema['type'], 'null']} if 'type' in schema else schema


def either(*schemas):
    return {'anyOf': list(schemas)}


def reference(schema):
    return {'$ref': f'#/components/schemas/{schema}'}


def page_schema(name, item):
    return object_schema(f'{name} after', after=or_null(STRING), **{name: list_schema(item)})


def table_schema(columns, **more):
    """An object of the visible columns. Columns that brief pages leave out are not required."""
    schema = object_schema()
    for name, column in columns.items():
        if column.json:
            values = dict(COLUMN_SCHEMAS[column.json])
            if column.rule and 'enum' in column.rule.schema:
                values['enum'] = column.rule.schema['enum']
            is_set = re.search('NOT NULL|PRIMARY KEY', column.type) or column.json is json_timeout
            schema['properties'][name] = values if is_set else or_null(values)
            if column.brief and not column.optional:
                schema['required'].append(name)
    schema['properties'].update(more)
    return schema


STRING = {'type': 'string'}
INTEGER = {'type': 'integer'}
NUMBER = {'type': 'number'}
BOOLEAN = {'type': 'boolean'}
TIME = COLUMN_SCHEMAS[json_time]
SCHEMAS = {
    'Error': object_schema('error', error=STRING),
    'Attempt': object_schema(
        'attempt outcome', attempt=INTEGER, worker=or_null(STRING), outcome=STRING,
        started_at=TIME, finished_at=or_null(TIME), error=or_null(STRING)),
    'Job': table_schema(
        JOB_COLUMNS, created=BOOLEAN, why=or_null(STRING),
        attempts=list_schema(reference('Attempt')), after=list_schema(STRING), waits_for=INTEGER,
        steps={'type': 'object'}, replaced=BOOLEAN, warning=STRING,
        needed_by=list_schema(STRING)),
    'JobPage': page_schema('jobs', reference('Job')),
    'Outcome': object_schema(
        'id status', id=STRING, status=STRING, retries=INTEGER, next_run_at=TIME, priority=INTEGER),
    'Refusal': object_schema('id error code', id=or_null(STRING), error=STRING, code=INTEGER),
    'Step': object_schema('id name created result', id=STRING, name=STRING, created=BOOLEAN,
                          result={}),
    'Count': object_schema('count', count=INTEGER),
    'Paused': object_schema('queue paused', queue=STRING, paused=BOOLEAN),
    'Limits': object_schema(
        'queue max_running rate per', queue=STRING, max_running=or_null(INTEGER),
        rate=or_null(INTEGER), per=or_null(NUMBER)),
    'Schedule': table_schema(SCHEDULE_COLUMNS, created=BOOLEAN),
    'SchedulePage': page_schema('schedules', reference('Schedule')),
    'Queue': object_schema(
        'queue paused', queue=STRING, paused=BOOLEAN, oldest_age=or_null(NUMBER),
        polled_at=or_null(TIME), max_running=or_null(INTEGER), rate=or_null(INTEGER),
        per=or_null(NUMBER), workers=list_schema(STRING), minutes={},
        **dict.fromkeys(COUNTS, INTEGER)),
    'Worker': object_schema(
        'worker queue seen_at running', worker=STRING, queue=STRING, seen_at=TIME, running=INTEGER,
        hung=or_null(INTEGER)),
    'QueuePage': object_schema(
        'queues after now workers', queues=list_schema(reference('Queue')), after=or_null(STRING),
        now=TIME, workers=list_schema(reference('Worker')), totals={}, minutes={},
        unserved=list_schema({})),
    'Health': object_schema(
        'status storage warnings version', status=STRING, storage=STRING,
        warnings=list_schema(STRING), version=STRING),
}


class Call(NamedTuple):
    """The description of a route in OpenAPI, besides its fields."""

    name: str
    summary: str
    response: Dict[str, Any]
    content_type: str = 'application/json'
    item: Optional[Dict[str, Any]] = None       # in the response to a batch; None: as `response`


CALLS = {       # a route that is not here is described by its fields alone
    '/enqueue': Call('enqueue', 'Add a job; or many, all or none.', reference('Job')),
    '/poll': Call('poll', 'Claim a job; with `limit`, jobs.',
                  either(reference('Job'), list_schema(reference('Job')))),
    '/complete': Call('complete', 'Report that a job is done.', reference('Outcome')),
    '/fail': Call('fail', 'Report that an attempt has failed.', reference('Outcome')),
    '/heartbeat': Call('heartbeat', 'Keep a claim; show progress.', reference('Outcome')),
    '/step': Call('step', 'Keep the result of a step; the first one stays.', reference('Step')),
    '/release': Call('release', 'Give a job back; nothing is counted.', reference('Outcome')),
    '/cancel': Call('cancel', 'Cancel a job, or all of a queue and status.', reference('Count'),
                    item=reference('Outcome')),
    '/retry': Call('retry', 'Make jobs pending again.', reference('Count'),
                   item=reference('Outcome')),
    '/purge': Call('purge', 'Delete jobs that do not run.', reference('Count'),
                   item=reference('Outcome')),
    '/reschedule': Call('reschedule', 'Change a pending job.', reference('Outcome')),
    '/pause': Call('pause', 'Hand out no jobs of a queue.', reference('Paused')),
    '/resume': Call('resume', 'Hand out jobs of a queue again.', reference('Paused')),
    '/limit': Call('limit', 'Set the limits of a queue; null removes one.', reference('Limits')),
    '/schedule': Call('schedule', 'Create or change a schedule.', reference('Schedule')),
    '/unschedule': Call('unschedule', 'Delete a schedule; its jobs stay.', reference('Count')),
    '/schedules': Call('list_schedules', 'A page of schedules.', reference('SchedulePage')),
    '/jobs/': Call('get_job', 'A job; with `wait`, once it has ended.', reference('Job')),
    '/status/': Call('get_status', 'A job.', reference('Job')),
    '/details/': Call('get_newest', 'The newest job with a tag.', reference('Job')),
    '/jobs': Call('list_jobs', 'A page of jobs, newest first; with `id`, that job.',
                  either(reference('JobPage'), reference('Job'))),
    '/lost': Call('wait_for_loss', 'Wait until a worker loses a job that it runs.',
                  object_schema('lost since', lost=BOOLEAN, since=INTEGER)),
    '/queues': Call('list_queues', 'A page of queues, and the workers.', reference('QueuePage')),
    '/metrics': Call('metrics', 'Metrics for Prometheus.', STRING, 'text/plain'),
    '/health': Call('health', 'Whether the engine can store jobs.', reference('Health')),
    '/backup': Call('backup', 'A copy of the database.', STRING, 'application/vnd.sqlite3'),
    '/docs': Call('docs', 'The manual.', STRING, 'text/plain'),
    '/openapi.json': Call('openapi', 'This document.', {'type': 'object'}),
    '/rundown.mjs': Call('node_sdk', 'The SDK for Node.', STRING, 'text/javascript'),
    '/': Call('dashboard', 'The dashboard.', STRING, 'text/html'),
}


@functools.lru_cache(maxsize=1)
def openapi():
    """The OpenAPI document, derived from ROUTES, FIELDS and the tables of columns."""
    requests = {}
    paths = {}
    for path, route in ROUTES.items():
        operation = openapi_operation(path, route)
        if route.method == 'POST':
            name = path[1:].capitalize() + 'Request'
            requests[name], body = openapi_body(route, reference(name))
            operation['requestBody'] = {
                'required': True, 'content': {'application/json': {'schema': body}}}
        else:
            operation['parameters'] = openapi_parameters(path, route)
        if path.endswith('/') and path != '/':
            path += f'{{{route.required[0][0]}}}'
        paths[path] = {route.method.lower(): operation}
    return {
        'openapi': '3.1.0',
        'info': {'title': 'Rundown', 'version': VERSION, 'summary': __doc__.partition('\n')[0]},
        'servers': [{'url': '/'}],
        'security': [{}, {'token': []}],
        'paths': paths,
        'components': {
            'schemas': {**SCHEMAS, **requests},
            'securitySchemes': {'token': {'type': 'http', 'scheme': 'bearer'}},
        },
    }


def openapi_operation(path, route):
    call = CALLS.get(path, Call(path.strip('/'), '', {}))
    schema = call.response
    if 'jobs' in route.rules:
        item = call.item or schema
        if path != '/enqueue':      # that one takes all or nothing
            item = either(item, reference('Refusal'))
        schema = either(schema, object_schema('jobs', jobs=list_schema(item)))
    error = {'application/json': {'schema': reference('Error')}}
    operation = {
        'operationId': call.name,
        'summary': call.summary,
        'responses': {
            '200': {'description': 'Done.', 'content': {call.content_type: {'schema': schema}}},
            'default': {'description': 'Refused, or not possible now.', 'content': error},
        },
    }
    if path == '/poll':
        operation['responses']['204'] = {'description': 'No job came.'}
    if path == '/health':
        operation['responses']['503'] = {
            'description': 'Jobs cannot be stored.',
            'content': {call.content_type: {'schema': schema}}}
    alternatives = [' or '.join(fields) for fields in route.required if len(fields) > 1]
    if alternatives:
        operation['description'] = f'It needs {", and ".join(alternatives)}.'
    return operation


def openapi_body(route, item):
    """The schema of one item, and that of the body: one item or, where allowed, many."""
    fields = {
        field: or_null(rule.schema) if field in NULLABLE else rule.schema
        for field, rule in route.rules.items() if field != 'jobs'}
    schema = object_schema(**fields)
    schema['required'] = [fields[0] for fields in route.required if len(fields) == 1]
    schema['additionalProperties'] = False
    if 'jobs' not in route.rules:
        return schema, item
    jobs = {**list_schema(item), 'minItems': 1, 'maxItems': MAX_BATCH}
    return schema, either(item, object_schema('jobs', jobs=jobs))


def openapi_parameters(path, route):
    required = [fields[0] for fields in route.required]
    place = 'path' if path.endswith('/') else 'query'
    return [
        {
            'name': field,
            'in': place if field in required else 'query',
            'required': field in required,
            'schema': rule.schema,
        }
        for field, rule in route.rules.items()]


# -- Command line ----------------------------------------------------------------------------------
M_MMAP_THRESHOLD = -3       # of glibc's malloc.h: larger blocks are returned when they are freed


def make_server(db='rundown.db', host='127.0.0.1', port=PORT, sync='full', token=None, cert=None,
                key=None, keep='7d', keep_failed='30d', allow_host=(), verbose=False, clock=time):
    """An engine that listens, ready for serve_forever(), and for server_close() after that.

    Port 0 takes a free one (see `url`). `keep` and `keep_failed` are ages like '7d' or '12h'; 0
    keeps jobs for ever. `clock` has time() and monotonic(). Raises StartupError, with a sentence
    that says why, when it cannot start like this.
    """
    if sqlite3.sqlite_version_info < (3, 24):
        raise StartupError(f'SQLite {sqlite3.sqlite_version} is too old; 3.24 or newer is needed')
    if str(db) in ('', ':memory:'):
        raise StartupError('--db takes the name of a file')
    if not is_loopback(host) and not token:
        raise StartupError(f'to listen on {host or "all addresses"} a token is needed: '
                           'write a secret into a file and give --token-file FILE')
    if token and not re.fullmatch('[!-~]+', token):
        raise StartupError('the token must be of visible ASCII characters, without spaces')
    if key and not cert:
        raise StartupError('--key needs --cert: without a certificate there is no TLS')
    tls = tls_context(cert, key) if cert else None
    ages = [parse_duration(keep), parse_duration(keep_failed)]
    try:
        # before the database: if the port is taken, no file is left behind
        server = Server((host, port), token, tls, allow_host, verbose)
    except (OSError, OverflowError) as error:
        reason = f'cannot be listened on: {error}'
        if getattr(error, 'errno', None) == errno.EADDRINUSE:
            reason = 'is taken: another engine or program listens there; --port takes another'
        elif isinstance(error, PermissionError):
            reason = 'is not allowed to this user; --port takes another'
        raise StartupError(f'{host}:{port} {reason}') from None
    try:
        open_store(server, Database(db, sync), clock, ages)
    except BaseException:
        server.server_close()
        raise
    return server


def open_store(server, database, clock, ages):
    database.open()
    try:
        server.start(Store(database, clock, *ages))
    except BaseException:
        if not server.loop:         # else server_close() closes it
            database.close()
        raise


def tls_context(cert, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2        # Pythons before 3.10 take older ones
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:        # SSLError is one
        files = f'--cert {cert} or --key {key}' if key else f'--cert {cert}'
        raise StartupError(f'{files} cannot be used: {error.strerror or error}') from None
    return context


def parse_duration(text):
    """'7d', '12h', '30m', '45s' or '0' as microseconds."""
    match = re.fullmatch(r'(\d{1,6})([dhms])|0{1,6}', str(text))
    if not match:
        raise StartupError('--keep and --keep-failed take an age like 7d, 12h, 30m, 45s, '
                           f'or 0 for ever, not {text}')
    if not match[1]:
        return 0
    return int(match[1]) * {'d': 86400, 'h': 3600, 'm': 60, 's': 1}[match[2]] * 1000000


def read_token(path):
    try:
        token = pathlib.Path(path).read_text('ascii').strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', 'it is not ASCII')
        raise StartupError(f'the token file {path} cannot be read: {reason}') from None
    if not token:
        raise StartupError(f'the token file {path} is empty')
    return token


def parse_arguments(argv):
    parser = argparse.ArgumentParser('rundown_engine.py', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    env = os.environ.get
    add('--db', default=env('RUNDOWN_DB', 'rundown.db'), help='the database file (rundown.db)')
    add('--host', default=env('RUNDOWN_HOST', '127.0.0.1'),
        help='the address to listen on (127.0.0.1, and also ::1)')
    add('--port', default=env('RUNDOWN_PORT', str(PORT)), help=f'0 takes a free one ({PORT})')
    add('--sync', default='full', choices=('full', 'normal'),
        help='normal: a power cut may cost the last commits')
    add('--token-file', metavar='FILE',
        help='callers must send the secret in it; else RUNDOWN_TOKEN, else none')
    add('--cert', metavar='FILE', help='TLS: the certificate chain, PEM')
    add('--key', metavar='FILE', help='TLS: its key, where that is not in the same file')
    add('--keep', default='7d', metavar='AGE',
        help='how long done and cancelled jobs are kept (7d; 0: for ever)')
    add('--keep-failed', default='30d', metavar='AGE', help='how long failed jobs are kept (30d)')
    add('--allow-host', action='append', default=[], metavar='NAME',
        help='another name clients call the engine by')
    add('--version', action='version', version=f'rundown_engine {VERSION}')
    add('--verbose', action='store_true', help='a line per request')
    return parser.parse_args(argv)


def main(argv=None):
    """Serve until SIGTERM or SIGINT; return the exit code."""
    signals = StopSignals()
    options = vars(parse_arguments(argv))
    port = options.pop('port')
    token_file = options.pop('token_file')
    raise_file_limit()
    return_free_memory()
    try:
        if not re.fullmatch('[0-9]{1,5}', port) or int(port) > 65535:
            raise StartupError(f'--port must be a number from 0 to 65535, not {port}')
        token = read_token(token_file) if token_file else os.environ.get('RUNDOWN_TOKEN')
        server = make_server(port=int(port), token=token, **options)
    except (StartupError, HTTPError, OSError, sqlite3.Error) as error:
        print(f'rundown_engine: {error}', file=sys.stderr)
        return 2
    gc.set_threshold(20000)     # requests leave few cycles; a search every 700 objects is felt
    print_greeting(server)
    signals.stop(server)
    server.serve_forever()
    server.server_close()
    if server.failed:           # the log says why
        return 1
    if not server.loop.thread.is_alive():       # and the database is closed
        log('the engine has stopped')
    return 0


class StopSignals:
    """SIGTERM and SIGINT, and Ctrl-Break on Windows, end the engine.

    They are caught from the beginning: to start may take long, and the kernel drops signals to
    process 1 of a container that it does not catch.
    """

    def __init__(self):
        self.server = None
        self.came = False
        for name in ('SIGTERM', 'SIGINT', 'SIGBREAK'):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._catch)

    def _catch(self, *_):
        self.came = True
        if self.server:
            # shutdown() waits for serve_forever(), which this thread runs
            threading.Thread(target=self.server.shutdown, daemon=True).start()

    def stop(self, server):
        """Let the signals stop this server; at once if one has come already."""
        self.server = server
        if self.came:
            self._catch()


def print_greeting(server):
    secret = ' -H "Authorization: Bearer $RUNDOWN_TOKEN"' if server.token else ''
    lines = (
        f'Rundown engine on {server.url}, jobs in {server.store.database.path}; '
        f'version {VERSION}, since {local_time()}. In a browser the address is the dashboard.',
        f'A first job: curl -H "Content-Type: application/json"{secret} {server.url}/enqueue '
        '-d \'{"queue": "images", "payload": "a.jpg"}\'',
    )
    with contextlib.suppress(OSError, ValueError, AttributeError):      # there may be no stdout
        print('\n'.join(lines), flush=True)


def raise_file_limit():
    """Raise the limit of open files, since each waiting worker holds one."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limit = 65536 if hard_limit <= 0 else min(hard_limit, 65536)     # negative: no limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard_limit))


def return_free_memory():
    """Have glibc give free memory back to the system.

    Now that is the memory in which this file was compiled, later that of payloads. By itself glibc
    keeps blocks of up to 32 MiB once it has freed one of that size.
    """
    with contextlib.suppress(ImportError, OSError, AttributeError, TypeError):
        import ctypes
        libc = ctypes.CDLL(None)        # TypeError: Windows; AttributeError: not glibc
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)


# -- Dashboard -------------------------------------------------------------------------------------
DASHBOARD = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Rundown-Workers</title>
<link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
/* -- Colours and type ---------------------------------------------------------------------- */
:root {
  color-scheme: light dark;
  --page: light-dark(#f3f4f6, #0e1115);
  --card: light-dark(#ffffff, #171b21);
  --hover: light-dark(#f5f8fc, #1d232b);
  --text: light-dark(#1b2129, #e3e7ec);
  --soft: light-dark(#586371, #9ca8b5);
  --line: light-dark(#e0e4e9, #2a313a);
  --edge: light-dark(#8a95a3, #5d6976);
  --accent: light-dark(#0b5bb0, #7db9ff);
  --done: light-dark(#177245, #5ecb8f);
  --bad: light-dark(#b8211a, #ff8d84);
  --warn: light-dark(#855300, #e6b45c);
  --on-solid: light-dark(#ffffff, #0e1115);
}

* {
  box-sizing: border-box;
}

body {
  margin: 0;
  background: var(--page);
  color: var(--text);
  font: 14px/1.45 system-ui, sans-serif;
  font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere;
}

a {
  color: var(--accent);
  text-decoration: none;
}

a:hover {
  text-decoration: underline;
}

:focus-visible {
  outline: 2px solid var(--accent);
  outline-offset: 1px;
}

h1:focus-visible {
  outline: none;
}

h1,
h2 {
  margin: 0;
  font-size: 1rem;
  font-weight: 650;
}

h1 {
  font-size: 1.15rem;
}

p {
  margin: 0;
}

pre,
code,
.error {
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}

pre {
  margin: 0;
  max-height: 30rem;
  overflow: auto;
  white-space: pre-wrap;
}

.soft {
  color: var(--soft);
}

.bad,
.bad a {
  color: var(--bad);
}

.warn,
.warn a {
  color: var(--warn);
}

/* -- The frame ----------------------------------------------------------------------------- */
[hidden],
p:empty,
section:has(> .body:empty),
table:has(> tbody:empty),
.optional:has(> table > tbody:empty),
body:has(#login:not([hidden])) main {
  display: none !important;
}

header {
  position: sticky;
  top: 0;
  z-index: 2;
  display: flex;
  align-items: center;
  gap: .2rem 1.2rem;
  padding: 0 max(1rem, 50vw - 44rem);
  min-height: 3rem;
  background: var(--card);
  border-bottom: 1px solid var(--line);
}

#home {
  color: var(--text);
  font-weight: 700;
}

nav {
  display: flex;
  align-self: stretch;
  margin-right: auto;
}

nav a {
  display: flex;
  align-items: center;
  padding: 0 .8rem;
  color: var(--soft);
  border-bottom: 2px solid transparent;
}

nav a[aria-current] {
  color: var(--text);
  font-weight: 600;
  border-color: var(--accent);
}

#updated {
  color: var(--soft);
  font-size: .85rem;
}

main,
#problems,
#login {
  max-width: 90rem;
  margin: 0 auto;
  padding: 0 1rem;
}

main {
  padding-bottom: 5rem;
}

section,
.card {
  margin-top: 1rem;
  padding: .8rem 1rem;
  background: var(--card);
  border: 1px solid var(--line);
  border-radius: 8px;
}

.heading {
  display: flex;
  flex-wrap: wrap;
  align-items: center;
  gap: .3rem 1rem;
  margin-bottom: .5rem;
}

.heading > :first-child {
  margin-right: auto;
}

.problem {
  margin-top: .6rem;
  padding: .6rem 1rem;
  color: var(--bad);
  background: color-mix(in srgb, var(--bad) 10%, var(--card));
  border: 1px solid var(--bad);
  border-radius: 8px;
  font-weight: 600;
}

.problem.mild {
  color: var(--warn);
  background: color-mix(in srgb, var(--warn) 10%, var(--card));
  border-color: var(--warn);
}

.problem a {
  color: inherit;
  text-decoration: underline;
}

.stale main {
  opacity: .55;
}

#notice {
  position: fixed;
  z-index: 3;
  left: 50%;
  bottom: 1rem;
  translate: -50%;
  width: max-content;
  max-width: 90vw;
  padding: .6rem 1rem;
  color: var(--page);
  background: var(--text);
  border-radius: 8px;
}

#login {
  max-width: 30rem;
  margin-top: 3rem;
}

#login form {
  display: grid;
  gap: .6rem;
}

/* -- Buttons, fields and dialogs ----------------------------------------------------------- */
button,
input,
select {
  padding: .25rem .7rem;
  min-height: 2rem;
  font: inherit;
  color: var(--text);
  background: var(--card);
  border: 1px solid var(--edge);
  border-radius: 6px;
}

button {
  cursor: pointer;
}

button:hover {
  background: var(--hover);
}

button.danger {
  color: var(--bad);
}

button[aria-disabled=true],
button[aria-disabled=true]:hover {
  background: none;
  color: var(--soft);
  border-color: var(--line);
  cursor: default;
}

button.primary {
  color: var(--on-solid);
  background: var(--accent);
  border-color: var(--accent);
}

button.primary.danger {
  background: var(--bad);
  border-color: var(--bad);
}

button.plain {
  padding: 0 .3rem;
  color: var(--accent);
  background: none;
  border-color: transparent;
}

button:disabled {
  opacity: .5;
  cursor: default;
}

input[type=checkbox] {
  width: 1.1rem;
  height: 1.1rem;
  min-height: 0;
  margin: 0;
  accent-color: var(--accent);
  vertical-align: middle;
}

dialog {
  width: min(30rem, 92vw);
  padding: 1.2rem;
  color: var(--text);
  background: var(--card);
  border: 1px solid var(--edge);
  border-radius: 10px;
}

dialog::backdrop {
  background: rgb(0 0 0 / .45);
}

dialog form {
  display: grid;
  gap: .8rem;
}

.buttons {
  display: flex;
  flex-wrap: wrap;
  align-items: center;
  gap: .4rem;
}

dialog .buttons {
  justify-content: end;
}

/* -- Tables -------------------------------------------------------------------------------- */
table {
  width: 100%;
  border-collapse: collapse;
  table-layout: fixed;
}

th,
td {
  padding: .35rem .4rem;
  overflow: hidden;
  text-align: left;
  text-overflow: ellipsis;
  white-space: nowrap;
  border-bottom: 1px solid var(--line);
}

tbody tr:last-child td {
  border-bottom: none;
}

tbody tr:hover {
  background: var(--hover);
}

th {
  color: var(--soft);
  font-size: .79rem;
  font-weight: 500;
  white-space: normal;
  overflow-wrap: normal;
  vertical-align: bottom;
}

th.select,
th.actions {
  font-size: 0;
}

td.number,
th.number {
  text-align: right;
}

td.zero,
td.zero a {
  color: var(--soft);
}

td:is(.state, .ticks, .value, .result, .line),
#workers td,
#gone-workers td {
  white-space: pre-wrap;
}

td button {
  min-height: 1.7rem;
  padding: 0 .4rem;
  font-size: .8rem;
  white-space: nowrap;
}

td .buttons {
  flex-wrap: nowrap;
}

#queues th.number {
  width: 5rem;
}

#queues th:is(.oldest, .per_minute) {
  width: 4.2rem;
}

#jobs th:is(.queue, .tag, .group) {
  width: 11%;
}

#jobs th.detail {
  width: auto;
}

th.actions {
  width: 6.2rem;
}

#queues th.actions {
  width: 16.8rem;
}

th.last_hour {
  width: 136px;
}

th.state {
  width: 8.4rem;
}

th.select {
  width: 2.2rem;
}

th.job {
  width: 9rem;
}

th.status,
th.created {
  width: 7rem;
}

th.attempt,
th.count {
  width: 4.5rem;
}

#needs th.detail,
#needed-by th.detail {
  width: 32%;
}

:is(#needs, #needed-by) th.job {
  width: 21rem;
}

th.step {
  width: 14rem;
}

th.field {
  width: 9rem;
}

#schedules th.ticks {
  width: 11rem;
}

#schedules th:is(.next, .last_run) {
  width: 6rem;
}

th.skipped,
th.hung_threads,
#workers th.running {
  width: 4.8rem;
}

th.seen,
th.next,
th.last_run {
  width: 5.6rem;
}

th.line {
  width: 60%;
}

table:not(:has(td.tag a)) .tag,
table:not(:has(td.group a)) .group {
  display: none;
}

/* -- Statuses and progress ----------------------------------------------------------------- */
.status-pending,
.status-released {
  --tint: var(--soft);
}

.status-running {
  --tint: var(--accent);
}

.status-done {
  --tint: var(--done);
}

.status-failed,
.status-lost {
  --tint: var(--bad);
}

.status-cancelled {
  --tint: var(--warn);
}

.badge {
  display: inline-block;
  padding: 0 .55rem;
  color: var(--tint, var(--soft));
  background: color-mix(in srgb, var(--tint, var(--soft)) 12%, transparent);
  border-radius: 1rem;
  font-size: .88rem;
  font-weight: 600;
}

progress {
  width: 8rem;
  height: .55rem;
  appearance: none;
  background: var(--line);
  border: none;
  border-radius: 1rem;
  overflow: hidden;
  vertical-align: middle;

  &::-webkit-progress-bar {
    background: var(--line);
  }

  &::-webkit-progress-value {
    background: var(--accent);
  }

  &::-moz-progress-bar {
    background: var(--accent);
  }
}

#top progress {
  width: min(24rem, 100%);
  height: .8rem;
}

/* -- Overview ------------------------------------------------------------------------------ */
#totals {
  display: grid;
  grid-template-columns: repeat(7, 1fr);
  padding: 0;
  overflow: hidden;
}

.total {
  padding: .7rem 1rem;
  color: var(--soft);
  border-left: 1px solid var(--line);
  margin-left: -1px;
}

.total b {
  display: block;
  color: var(--text);
  font-size: 1.5rem;
  font-weight: 600;
  line-height: 1.2;
}

.total.bad b {
  color: var(--bad);
}

a.total:hover {
  background: var(--hover);
  text-decoration: none;
}

svg {
  display: block;
}

.bars-done {
  stroke: var(--done);
}

.bars-failed {
  stroke: var(--bad);
}

.bars-wait {
  stroke: var(--warn);
}

.base {
  stroke: var(--edge);
}

.spark {
  width: 120px;
  height: 28px;
  stroke-width: 1.6;
}

#chart {
  position: relative;
  touch-action: pan-y;
}

#chart svg {
  width: 100%;
  stroke-width: 7;
}

#chart .base,
#chart .cursor {
  vector-effect: non-scaling-stroke;
  stroke-width: 1;
}

#chart .cursor {
  stroke: var(--text);
}

#chart .jobs {
  height: 110px;
}

#chart .wait {
  height: 46px;
  margin-top: .3rem;
}

.scale {
  display: flex;
  justify-content: space-between;
  color: var(--soft);
  font-size: .82rem;
}

.legend {
  display: flex;
  flex-wrap: wrap;
  gap: 0 1rem;
}

.legend span::before {
  content: "";
  display: inline-block;
  width: .7rem;
  height: .7rem;
  margin-right: .35rem;
  background: var(--tint);
  border-radius: 2px;
}

.status-wait {
  --tint: var(--warn);
}

#reading {
  min-height: 1.45em;
  font-weight: 600;
}

#halves {
  display: grid;
  grid-template-columns: 2fr 3fr;
  gap: 0 1rem;
  align-items: start;
}

#halves:has(#schedules > tbody:empty) {
  grid-template-columns: 1fr;
}

/* -- Jobs ---------------------------------------------------------------------------------- */
.tabs {
  display: flex;
  overflow: hidden;
  gap: .3rem;
  margin: 1rem 0 0;
}

.tabs a {
  padding: .35rem .8rem;
  color: var(--text);
  white-space: nowrap;
  border: 1px solid transparent;
  border-radius: 1.2rem;
}

.tabs a[aria-current] {
  background: var(--card);
  border-color: var(--accent);
  font-weight: 600;
}

#filter {
  display: flex;
  flex-wrap: wrap;
  align-items: end;
  gap: .6rem;
}

#filter label {
  display: grid;
  flex: 1 1 8rem;
  color: var(--soft);
  font-size: .82rem;
}

#filter label:first-child {
  flex-grow: 3;
}

#filter input {
  width: 100%;
  min-width: 0;
}

#failures .scroll {
  max-height: 19rem;
  overflow: auto;
}

#bulk {
  position: sticky;
  bottom: .6rem;
  z-index: 1;
  display: flex;
  flex-wrap: wrap;
  align-items: center;
  gap: .4rem .8rem;
  border-color: var(--accent);
  box-shadow: 0 4px 18px rgb(0 0 0 / .25);
}

.id {
  white-space: nowrap;
}

.id span {
  font-size: 0;
}

.id span::after {
  content: "…";
  font-size: 14px;
}

/* -- One job ------------------------------------------------------------------------------- */
#title code {
  font-size: 1rem;
  user-select: all;
}

#facts {
  display: flex;
  flex-wrap: wrap;
  gap: .4rem 2rem;
  margin: .8rem 0;
}

.fact b {
  display: block;
  color: var(--soft);
  font-size: .82rem;
  font-weight: 500;
}

#attempts {
  margin: .5rem 0 0;
  padding: 0 0 0 .4rem;
  list-style: none;
}

#attempts li {
  position: relative;
  padding: 0 0 .8rem 1.4rem;
  border-left: 2px solid var(--line);
}

#attempts li:last-child {
  padding-bottom: 0;
  border-color: transparent;
}

#attempts li::before {
  content: "";
  position: absolute;
  top: .25rem;
  left: -.45rem;
  width: .75rem;
  height: .75rem;
  background: var(--tint, var(--edge));
  border: 2px solid var(--card);
  border-radius: 50%;
}

#attempts pre {
  margin-top: .3rem;
}

/* -- Narrow screens: each row becomes a card whose cells carry their headings ---------------- */
@media (max-width: 78rem) {
  .last_hour {
    display: none;
  }

  #queues th.number {
    width: 4.5rem;
    padding-left: 0;
  }

  #halves {
    grid-template-columns: 1fr;
  }
}

@media (max-width: 66rem) {
  table:not(.small) {
    &,
    tbody,
    td {
      display: block;
      width: auto;
      padding: 0;
      border: none;
      text-align: left;
      white-space: normal;
    }

    thead {
      position: fixed;
      clip-path: inset(50%);
    }

    tr {
      display: grid;
      grid-template-columns: repeat(auto-fill, minmax(5.4rem, 1fr));
      gap: .4rem .6rem;
      padding: .7rem 0;
      border-bottom: 1px solid var(--line);
    }

    tr:last-child {
      border: none;
    }

    td::before {
      content: attr(data-label);
      display: block;
      color: var(--soft);
      font: .8rem/1.3 system-ui, sans-serif;
    }

    td:empty,
    td.select::before,
    td.actions::before {
      display: none;
    }

    td:is(.queue, .worker, .state, .last_hour, .schedule) {
      grid-column: span 2;
    }

    td:is(.actions, .detail, .error, .line, .step, .result) {
      grid-column: 1 / -1;
    }

    td:is(.step, .result)::before {
      display: none;
    }

    td.step {
      font-weight: 600;
    }

    td.actions {
      order: 2;
    }
  }

  #queues td.state {
    order: -1;
  }

  #queues td.queue {
    order: -2;
    font-weight: 600;
  }

  #errors tr {
    grid-template-columns: 2.4rem 1fr auto;
  }

  #errors td:is(.line, .actions) {
    grid-column: auto;
  }

  #errors td::before,
  #errors td.newest {
    display: none;
  }

  :is(#jobs, #needs, #needed-by) tr {
    position: relative;
    grid-template-columns: 1fr auto;
    gap: .1rem .8rem;
  }

  #jobs tr {
    padding-left: 2.4rem;
  }

  :is(#jobs, #needs, #needed-by) td:not(.tag, .group)::before,
  #jobs td.attempt {
    display: none;
  }

  :is(#jobs, #needs, #needed-by) td.queue {
    grid-column: auto;
  }

  :is(#jobs, #needs, #needed-by) td:is(.tag, .group, .detail) {
    grid-column: 1 / -1;
    order: 1;
  }

  #jobs td.created {
    text-align: right;
  }

  #jobs td.select {
    position: absolute;
    top: .7rem;
    left: 0;
  }
}

@media (max-width: 40rem) {
  #queues td.zero {
    display: none;
  }

  #totals {
    grid-template-columns: repeat(3, 1fr);
  }

  .tabs {
    flex-wrap: wrap;
  }

  .tabs a {
    padding: .6rem .8rem;
  }

  #filter label {
    flex-basis: 5rem;
  }

  #filter label:first-child,
  #filter button {
    flex-basis: 100%;
  }

  table:not(.small, #jobs, #errors, #needs, #needed-by) tr {
    grid-template-columns: repeat(4, 1fr);
  }

  .total {
    padding: .5rem .7rem;
    border-bottom: 1px solid var(--line);
    margin-bottom: -1px;
    font-size: .85rem;
  }

  .total:last-child {
    grid-column: span 2;
  }

  .total b {
    font-size: 1.15rem;
  }

  #updated,
  #manual {
    display: none;
  }

  button,
  input,
  select,
  td button {
    min-height: 2.5rem;
  }

  input[type=checkbox] {
    width: 1.5rem;
    height: 1.5rem;
  }

  td a,
  #paging a {
    display: inline-block;
    margin: -.35rem 0;
    padding: .35rem 0;
  }

  summary {
    padding: .35rem 0;
  }

  #queues td.number a {
    min-width: 2rem;
  }
}
</style>
</head>
<body>

<header>
  <a id="home" href="#">Rundown</a>
  <nav aria-label="pages">
    <a href="#" data-view="overview">Overview</a>
    <a href="#jobs" data-view="jobs">Jobs</a>
  </nav>
  <noscript>This page needs JavaScript; the engine does not.</noscript>
  <span id="updated"></span>
  <a id="manual" href="docs">Manual</a>
  <button id="forget" class="plain" hidden>Forget token</button>
</header>

<div id="problems">
  <p id="offline" class="problem" role="alert"></p>
  <p id="storage" class="problem" role="alert"></p>
  <div id="warnings"></div>
</div>
<p id="notice" role="status"></p>

<div id="login" hidden>
  <form method="dialog" class="card">
    <h2>This engine asks for its token</h2>
    <label for="token" class="soft">
      It is kept in this browser until you press "Forget token".
    </label>
    <input id="token" type="password" autocomplete="current-password" required
      pattern="[!-~]+" title="visible ASCII characters">
    <span id="refused" class="bad" role="alert"></span>
    <button class="primary">Open</button>
  </form>
</div>

<main id="overview" hidden>
  <div id="totals" class="card"></div>
  <section>
    <h2>Enqueue a first job</h2>
    <pre id="example" class="body" tabindex="0"></pre>
  </section>
  <section id="hour" aria-label="last hour">
    <div class="heading">
      <h2>Last hour</h2>
      <p class="legend soft">
        <span class="status-done">done</span>
        <span class="status-failed">failed attempts</span>
        <span class="status-wait">waiting time</span>
      </p>
    </div>
    <p id="reading"></p>
    <div id="chart" tabindex="0" role="slider" aria-label="minute of the last hour"
      aria-valuemin="0" aria-valuemax="59"></div>
    <details>
      <summary class="soft">As a table</summary>
      <table id="minutes" class="small"></table>
    </details>
  </section>
  <section>
    <div class="heading">
      <h2>Queues</h2>
      <span id="shown" class="soft"></span>
      <input id="find" type="search" placeholder="find a queue" aria-label="find a queue">
    </div>
    <table id="queues"></table>
    <p id="no-queue" class="soft"></p>
  </section>
  <div id="halves">
    <section>
      <h2>Workers</h2>
      <table id="workers"></table>
      <p id="no-worker" class="soft"></p>
      <details id="gone" class="optional">
        <summary id="gone-count" class="soft"></summary>
        <table id="gone-workers"></table>
      </details>
    </section>
    <section class="optional">
      <div class="heading">
        <h2>Schedules</h2>
        <span id="schedules-cut" class="soft"></span>
      </div>
      <table id="schedules"></table>
    </section>
  </div>
</main>

<main id="jobs-page" hidden>
  <div id="tabs" class="tabs" role="navigation" aria-label="status"></div>
  <section>
    <form id="filter" method="dialog" role="search">
      <label>search in payload, error, result, tag and id
        <input name="search" type="search" autocomplete="off">
      </label>
      <label>queue <input name="queue" autocomplete="off"></label>
      <label>tag <input name="tag" autocomplete="off"></label>
      <label>group <input name="group" autocomplete="off"></label>
      <button>Filter</button>
    </form>
  </section>
  <section id="failures">
    <details open>
      <summary id="errors-title"></summary>
      <div class="scroll">
        <table id="errors"></table>
      </div>
    </details>
  </section>
  <section>
    <label id="select-these" class="soft">
      <input id="select-page" type="checkbox"> <span id="select-label"></span>
    </label>
    <table id="jobs"></table>
    <p id="nothing" class="soft"></p>
    <p id="paging" class="buttons"></p>
  </section>
  <div id="bulk" class="card" hidden>
    <div id="selection" class="buttons"></div>
  </div>
</main>

<main id="job-page" hidden>
  <div id="top" class="card">
    <div class="heading">
      <h1 id="title" tabindex="-1"></h1>
      <button class="copy" data-copy="title">Copy id</button>
    </div>
    <div id="job">
      <p id="progress"></p>
      <div id="facts"></div>
      <p id="buttons" class="buttons"></p>
    </div>
    <p id="missing" hidden>There is no job with this id. It may have been deleted.</p>
  </div>
  <div id="job-sections" hidden>
    <section>
      <h2 id="why-title"></h2>
      <p id="why" class="body"></p>
    </section>
    <section>
      <h2 id="error-title" class="bad"></h2>
      <pre id="error" class="body" tabindex="0"></pre>
    </section>
    <section>
      <h2>Attempts</h2>
      <ol id="attempts" class="body"></ol>
    </section>
    <section class="optional">
      <h2>Steps that are done</h2>
      <table id="steps"></table>
    </section>
    <section class="optional">
      <h2>Waits or waited for</h2>
      <table id="needs"></table>
    </section>
    <section class="optional">
      <h2>Needed by</h2>
      <table id="needed-by"></table>
    </section>
    <section>
      <div class="heading">
        <h2>Payload</h2>
        <button class="copy" data-copy="payload">Copy</button>
      </div>
      <pre id="payload" class="body" tabindex="0"></pre>
    </section>
    <section>
      <div class="heading">
        <h2>Result</h2>
        <button class="copy" data-copy="result">Copy</button>
      </div>
      <pre id="result" class="body" tabindex="0"></pre>
    </section>
    <section>
      <h2>All fields</h2>
      <table id="fields" class="small"></table>
    </section>
  </div>
</main>

<dialog id="confirm" aria-labelledby="question">
  <form method="dialog">
    <h2 id="question"></h2>
    <p id="consequence"></p>
    <label id="typing" hidden>
      Type <b id="expected"></b> to confirm
      <input id="typed" inputmode="numeric" autocomplete="off">
    </label>
    <p class="buttons">
      <button id="no" value="no">Back</button>
      <button id="yes" value="yes"></button>
    </p>
  </form>
</dialog>

<script>
"use strict";

// -- Settings -----------------------------------------------------------------------------------
const REFRESH_INTERVAL = 2000;      // ms, at least; four times as long as the last refresh took
const REQUEST_TIMEOUT = 10000;      // ms for a read
const ACTION_TIMEOUT = 60000;       // ms for a write
const NOTICE_TIME = 8000;           // ms that the outcome of an action is shown
const CLICK_GUARD = 300;            // ms in which a second click belongs to the first
const WORKER_SILENCE = 120;         // seconds without a poll until a worker counts as gone
const PAGE_QUEUES = 100;            // rows on a page
const PAGE_SCHEDULES = 100;
const PAGE_JOBS = 50;
const PAGE_SEARCHES = 10;           // requests that fill one page of a filter
const GROUPED_FAILURES = 1000;      // newest failures that are grouped
const FAILURES_INTERVAL = 10000;    // ms until they are fetched again
const MAX_SELECTED = 10000;         // jobs that can be selected
const ACTION_BATCH = 1000;          // jobs in one request
const TYPED_FROM = 100;             // jobs from which a deletion is confirmed by typing their count
const MAX_NAMED = 8;                // queues or workers in one line about a problem
const MAX_LINE = 200;               // characters of an error's last line, in a search or a summary
const MAX_SHOWN = 200000;           // characters of a payload or result that are shown
const MAX_STEP = 2000;              // of a step's result
const TOKEN_KEY = "rundown token " + location.pathname;     // one for each engine of an origin
const STATUSES = ["pending", "running", "done", "failed", "cancelled"];
const FILTERS = ["search", "queue", "status", "tag", "group"];

// -- State --------------------------------------------------------------------------------------
let view = "";              // overview, jobs or job
let params = {};            // the rest of the address: filters, the id of a job
let refreshId = 0;          // answers to an earlier refresh are dropped
let refreshTimer = 0;
let noticeTimer = 0;
let clockSkew = 0;          // ms that the engine's clock is ahead of the browser's
let token = readToken();
let pointer = "";           // the kind that moved last: mouse, pen or touch
let hour = null;            // the counts of the last hour, by the minute
let pointedMinute = null;   // index into them, null: none
let selected = new Map();   // id -> status of the jobs whose boxes are checked
let selectedAll = null;     // or all jobs of a filter: {queue, status, count}
let keptPage = null;        // that of a costly search is not fetched again: {address, page}
let counts = null;          // of the jobs by status, of all queues or of the filter's queue
let failures = noFailures();        // the newest failed jobs of the filter at `address`
let lastPress = {button: "", time: 0};      // a double click is one press
let lastRows = {};          // table -> the items in its rows
let firstProgress = {};     // the first progress that was seen of an attempt: {claim, time, part}

// -- Times and numbers --------------------------------------------------------------------------
const number = value => value.toLocaleString("en");
const plural = (total, noun) => `${number(total)} ${noun}${total === 1 ? "" : "s"}`;
const now = () => Date.now() + clockSkew;
const ageOf = time => (now() - Date.parse(time)) / 1000;
const secondsBetween = (start, end) => (Date.parse(end) - Date.parse(start)) / 1000;

function duration(seconds) {
  if (seconds < 1) {
    return Math.max(0, Math.round(seconds * 1000)) + " ms";
  }
  if (seconds < 9.95) {
    return seconds.toFixed(1) + " s";
  }
  if (seconds < 120) {
    return Math.round(seconds) + " s";
  }
  if (seconds < 7200) {
    return Math.round(seconds / 60) + " min";
  }
  if (seconds < 172800) {
    return Math.round(seconds / 3600) + " h";
  }
  return Math.round(seconds / 86400) + " d";
}

function ago(time) {
  if (!time) {
    return "never";
  }
  const age = ageOf(time);
  if (Math.abs(age) < 1) {
    return "now";
  }
  return age < 0 ? "in " + duration(-age) : duration(age) + " ago";
}

function local(time) {      // Swedish dates are ISO 8601
  return new Date(time).toLocaleString("sv");
}

function timeNode(time, text = local(time)) {
  const utc = new Date(time).toISOString().replace("T", " ").replace("Z", " UTC");
  return el("time", {datetime: time, title: `${local(time)} here, ${utc}`}, text);
}

function agoNode(time) {
  return time ? timeNode(time, ago(time)) : "never";
}

function withLocalTimes(sentence) {     // the UTC times in a sentence as times of the browser
  const parts = (sentence || "").split(/(\d{4}-\d\d-\d\dT[\d:.]+Z)/);
  return parts.map((part, i) => i % 2 && Date.parse(part) ? timeNode(part) : part);
}

// -- Elements: data enters as text and attributes, never as markup ------------------------------
const $ = id => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const isDrawing = ["svg", "path"].includes(tag);
  const space = isDrawing ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const node = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== null && value !== undefined) {
      node.setAttribute(name, value === true ? "" : value);
    }
  }
  for (const child of children.flat(Infinity)) {
    node.append(typeof child === "number" ? number(child) : child ?? "");
  }
  return node;
}

function show(contents) {       // id -> content of the element, or whether it is shown
  for (const [id, content] of Object.entries(contents)) {
    if (typeof content === "boolean") {
      $(id).hidden = !content;
    } else {
      patch($(id), content);
    }
  }
}

function keyed(nodes) {
  const key = (child, i) => child.nodeName + (child.dataset?.key ?? i);
  return new Map(Array.from(nodes, (child, i) => [key(child, i), child]));
}

// Changes the contents of a node in place: focus, selection, scrolling and a click that has begun
// are not lost. A row that has the focus stays even if the new contents do not have it.
function patch(node, content) {
  const before = keyed(node.childNodes);
  const after = keyed(el("p", {}, content).childNodes);     // <p> serves as a list of nodes
  for (const [key, child] of before) {
    const isFocused = child.dataset?.key && child.contains(document.activeElement);
    if (!after.has(key) && !isFocused) {
      child.remove();
    }
  }
  let i = 0;
  for (const [key, child] of after) {
    const kept = before.get(key) || child;
    if (kept !== child) {
      patchOne(kept, child);
    }
    if (node.childNodes[i] !== kept) {
      node.insertBefore(kept, node.childNodes[i]);
    }
    i += 1;
  }
}

function patchOne(kept, child) {
  if (!child.attributes) {      // a text
    if (kept.data !== child.data) {
      kept.data = child.data;
    }
    return;
  }
  for (const {name} of [...kept.attributes]) {
    if (!child.hasAttribute(name) && name !== "open") {     // `open` is the reader's
      kept.removeAttribute(name);
    }
  }
  for (const {name, value} of child.attributes) {
    if (kept.getAttribute(name) !== value) {
      kept.setAttribute(name, value);
    }
  }
  if (child.type === "checkbox") {
    kept.checked = child.checked;
  }
  patch(kept, [...child.childNodes]);
}

// -- Links, buttons and badges ------------------------------------------------------------------
function address(page, fields = {}) {
  const filled = Object.entries(fields).filter(([, value]) => value);
  return "#" + page + (filled.length ? "?" + new URLSearchParams(filled) : "");
}

function link(href, label, title) {
  return el("a", {href, title}, label);
}

function jobsLink(fields, label = Object.values(fields)[0]) {
  return link(address("jobs", fields), label);
}

function jobLink(id, label = id) {
  return link("#job/" + encodeURIComponent(id), label, id);
}

// A UUID begins with the time, alike in all rows. Copied, the id is whole.
function shortId(id) {
  const cut = /^[0-9a-f-]{36}$/.test(id) ? 24 : 0;
  return el("span", {class: "id"}, cut ? el("span", {}, id.slice(0, cut)) : "", id.slice(cut));
}

function badge(status) {
  return el("span", {class: "badge status-" + status}, status);
}

function button(action, about, label, isPossible = true, look = "") {
  return el("button", {
    "data-action": action,
    "data-about": JSON.stringify(about),
    "aria-disabled": String(!isPossible),   // `disabled` would drop the focus
    class: look,
  }, label);
}

// -- Requests: relative addresses, so that the engine may live under any path -------------------
function readToken() {
  try {
    return localStorage.getItem(TOKEN_KEY);
  } catch {
    return null;
  }
}

function keepToken(value) {
  token = value;
  try {
    if (value) {
      localStorage.setItem(TOKEN_KEY, value);
    } else {
      localStorage.removeItem(TOKEN_KEY);
    }
  } catch {
    show({notice: "This browser keeps no data of this page: it will ask again."});
  }
}

class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;       // 0: the engine was not reached
  }
}

async function call(path, {body, reviver, accepted = [200]} = {}) {
  const headers = {"Content-Type": "application/json"};
  if (token) {
    headers.Authorization = "Bearer " + token;
  }
  const options = {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    signal: AbortSignal.timeout(body ? ACTION_TIMEOUT : REQUEST_TIMEOUT),
  };
  let response = null;
  let content = null;
  try {
    response = await fetch(path, options);
    content = JSON.parse(await response.text(), reviver);
  } catch {                     // no response, or one that is not the engine's
    const from = response ? ` (something in between answered ${response.status})` : "";
    throw new Failure(0, "The engine does not answer" + from);
  }
  if (!accepted.includes(response.status)) {
    throw new Failure(response.status, "The engine says: " + content.error);
  }
  return content;
}

function exactNumber(key, value, context) {     // where the browser can, 1.0 and 2^63 stay as sent
  const isExact = typeof value !== "number" || String(value) === context?.source;
  const canKeep = JSON.rawJSON && context;
  return !isExact && canKeep ? JSON.rawJSON(context.source) : value;
}

function query(path, fields) {
  const filled = Object.entries(fields).filter(([, value]) => value);
  return path + "?" + new URLSearchParams(filled);
}

// -- Progress -----------------------------------------------------------------------------------
function plainNumber(value) {       // of one that exactNumber() kept as it was sent
  return JSON.isRawJSON?.(value) ? Number(value.rawJSON) : value;
}

function partDone(progress) {       // from 0 to 1; null: not a progress that has an end
  const done = plainNumber(progress?.done);
  const total = plainNumber(progress?.total);
  const part = typeof done === "number" && total > 0 ? done / total : plainNumber(progress);
  return typeof part === "number" && part >= 0 && part <= 1 ? part : null;
}

// Goes by the pace since this page first saw the attempt, else since the attempt began.
function secondsLeft(job, part) {
  const claim = job.id + " " + job.attempt;
  if (firstProgress.claim !== claim || part < firstProgress.part) {
    firstProgress = {claim, time: now(), part};
  }
  const seen = (now() - firstProgress.time) / 1000;
  const gained = part - firstProgress.part;
  if (gained > 0 && seen > 5) {
    return (1 - part) * seen / gained;
  }
  const beganAtZero = part > 0 && job.attempt === 1;    // a later attempt may begin further on
  return beganAtZero ? (1 - part) * ageOf(job.started_at) / part : null;
}

function progressText(progress, part) {
  const percent = Math.floor(part * 100) + " %";
  const done = plainNumber(progress.done);
  const total = plainNumber(progress.total);
  return total ? `${number(done)} of ${number(total)}, ${percent}` : percent;
}

function progressNodes(job, withTime) {
  const part = partDone(job.progress);
  if (part === null) {
    return job.progress === null ? [] : ["progress " + JSON.stringify(job.progress)];
  }
  const text = progressText(job.progress, part);
  const left = withTime && job.status === "running" ? secondsLeft(job, part) : null;
  const time = left === null ? "" : `, about ${duration(left)} left`;
  return [el("progress", {max: 1, value: part, "aria-label": text}), " " + text + time];
}

// -- Tables: a column is a name, a function of an item, and whether its value is a number -------
function column(name, content = item => item[name], isNumber = false) {
  return {name, content, isNumber, label: name.replaceAll("_", " ")};
}

function count(name, content) {
  return column(name, content, true);
}

function statusCount(status) {
  return count(status, row => jobsLink({queue: row.queue, status}, row[status]));
}

const QUEUE_COLUMNS = [
  column("queue", row => jobsLink({queue: row.queue})),
  statusCount("pending"),
  count("scheduled"),
  statusCount("running"),
  statusCount("done"),
  statusCount("failed"),
  count("oldest", row => row.oldest_age === null ? "–" : duration(row.oldest_age)),
  count("per_minute", row => lastMinute(row.minutes)),
  column("last_hour", row => sparkline(row.minutes)),
  column("state", queueState),
  column("actions", queueButtons),
];

const WORKER_COLUMNS = [
  column("worker", row => row.worker || "(without a name)"),
  column("queue", row => row.queues.flatMap(queue => [jobsLink({queue}), " "]).slice(0, -1)),
  count("running"),
  count("hung_threads", row => row.hung),
  count("seen", row => agoNode(row.seen_at)),
];

const SCHEDULE_COLUMNS = [
  column("schedule", row => row.name),
  column("queue", row => jobsLink({queue: row.queue})),
  column("ticks", scheduleTicks),
  count("next", row => agoNode(row.next_run_at)),
  count("last_run", row => row.last_id ? jobLink(row.last_id, ago(row.last_run_at)) : "never"),
  count("skipped"),
  column("actions", row => button("run-schedule", {name: row.name}, "Run now")),
];

const MINUTE_COLUMNS = [
  column("minute", row => row.time),
  count("done"),
  count("failed"),
  count("waited", row => row.waited === null ? "–" : duration(row.waited)),
];

const JOB_COLUMNS = [
  column("select", selectionBox),
  column("job", row => jobLink(row.id, shortId(row.id))),
  column("status", row => badge(row.status)),
  column("queue", row => jobsLink({queue: row.queue})),
  column("tag", row => row.tag && jobsLink({tag: row.tag})),
  column("group", row => row.group && jobsLink({queue: row.queue, group: row.group}, row.group)),
  count("attempt"),
  count("created", row => agoNode(row.created_at)),
  column("detail", jobDetail),
];

const FAILURE_COLUMNS = [
  count("count", row => row.jobs.length),
  column("line", row => jobsLink({...filters(), search: row.search}, row.line)),
  count("newest", row => agoNode(row.jobs[0].finished_at)),
  column("actions", row => button("select-failures", row.line, "Select")),
];

const DEPENDENCY_COLUMNS = [
  column("job", row => jobLink(row.id)),
  column("status", row => row.status && badge(row.status)),
  column("queue", row => row.queue && jobsLink({queue: row.queue})),
  column("detail", row => row.status ? jobDetail(row) : ""),
];

const TABLES = {
  queues: QUEUE_COLUMNS,
  workers: WORKER_COLUMNS,
  "gone-workers": WORKER_COLUMNS,
  schedules: SCHEDULE_COLUMNS,
  minutes: MINUTE_COLUMNS,
  jobs: JOB_COLUMNS,
  errors: FAILURE_COLUMNS,
  steps: [column("step", row => row.name), column("result", row => stepResult(row.result))],
  needs: DEPENDENCY_COLUMNS,
  "needed-by": DEPENDENCY_COLUMNS,
  fields: [column("field"), column("value", row => fieldValue(row))],
};

function buildTables() {
  for (const [id, columns] of Object.entries(TABLES)) {
    const headings = columns.map(each => el("th", {
      role: "columnheader",
      class: cellClass(each),
    }, each.label));
    $(id).setAttribute("role", "table");        // a display other than table would lose the roles
    $(id).append(
      el("thead", {role: "rowgroup"}, el("tr", {role: "row"}, headings)),
      el("tbody", {role: "rowgroup"}));
  }
}

function cellClass({name, isNumber}, ...more) {
  return [name, isNumber && "number", ...more].filter(Boolean).join(" ");
}

function drawTable(id, items, keyOf) {
  const name = TABLES[id].find(each => each.name !== "select").name;
  const rows = items.map(item => {
    const key = keyOf(item);
    const cells = TABLES[id].map(each => drawCell(each, item));
    return el("tr", {role: "row", "data-key": key, ["data-" + name]: key}, cells);
  });
  patch($(id).tBodies[0], rows);
  lastRows[id] = items;
}

function drawCell(each, item) {
  const cell = el("td", {
    role: "cell",
    "data-count": each.name,
    "data-label": each.label,
  }, each.content(item));
  const text = cell.textContent;
  const isZero = each.isNumber && text === "0";
  cell.className = cellClass(each, isBad(each.name, text) && "bad", isZero && "zero");
  if (!cell.querySelector("button, input, time, svg") && text) {
    cell.title = text;
  }
  return cell;
}

function isBad(name, text) {
  return ["failed", "hung_threads"].includes(name) && text !== "0";
}

// While the pointer is on a table its rows stay where they are; they change in place. A new one
// is added below (queues) or held back (jobs, which come in above).
function heldRows(id, items, keyOf, addsNew) {
  const isHeld = pointer === "mouse" && $(id).matches(":hover");     // after a touch it stays
  if (!isHeld || !lastRows[id]) {
    return items;
  }
  const fresh = new Map(items.map(item => [keyOf(item), item]));
  const rows = lastRows[id].map(item => fresh.get(keyOf(item)) || item);
  const known = new Set(rows.map(keyOf));
  return addsNew ? [...rows, ...items.filter(item => !known.has(keyOf(item)))] : rows;
}

// -- Problems -----------------------------------------------------------------------------------
function problemLine(key, intro, items, total = items.length) {
  const rest = total > MAX_NAMED ? `, and ${number(total - MAX_NAMED)} more` : "";
  const named = items.slice(0, MAX_NAMED).map((item, i) => [i ? ", " : "", item]);
  return items.length ? el("p", {class: "problem", "data-key": key}, intro, named, rest) : "";
}

function unservedItem({queue, due, polled_at}) {
  const since = polled_at ? ["not since ", timeNode(polled_at), ", "] : "";
  return [jobsLink({queue}), " (", since, plural(due, "job"), " due)"];
}

function hungItem({worker, queues, hung}) {
  const name = worker || "without a name";
  const links = queues.map((queue, i) => [i ? ", " : "", jobsLink({queue})]);
  return [name, " (", plural(hung, "hung thread"), " in ", links, ")"];
}

function drawTitle() {
  const title = {overview: "Rundown-Workers", jobs: "Jobs", job: "job " + params.id}[view];
  document.title = ($("problems").textContent.trim() ? "(!) " : "") + title;
}

function drawProblems(health, {unserved, totals, workers}) {
  const isInTrouble = health.status !== "ok";
  const hung = byWorker(workers.filter(row => isLive(row) && row.hung));
  show({
    storage: isInTrouble ? "Storage trouble: " + health.storage : "",
    warnings: [
      problemLine("unserved", "Jobs are due and no worker polls: ", unserved.map(unservedItem),
        totals.unserved),
      problemLine("hung", "Restart these workers: ", hung.map(hungItem)),
      health.warnings.map(sentence => el("p", {class: "problem mild"}, sentence)),
    ],
  });
}

// -- Overview: totals and the last hour ---------------------------------------------------------
// Of the last 60 s: the current minute so far, and as much of the minute before as is missing.
function lastMinute({done, failed}) {
  const missing = 1 - (now() % 60000) / 60000;
  return Math.round(done[59] + failed[59] + (done[58] + failed[58]) * missing);
}

function totalNode(name, value, href) {
  const look = "total" + (name === "failed" && value ? " bad" : "");
  const content = [el("b", {"data-total": name}, value), name];
  return href ? el("a", {class: look, href}, content) : el("div", {class: look}, content);
}

function drawTotals(totals, minutes) {
  const nodes = ["pending", "scheduled", ...STATUSES.slice(1)].map(name => {
    const status = name === "scheduled" ? "pending" : name;
    return totalNode(name, totals[name], address("jobs", {status}));
  });
  show({totals: [...nodes, totalNode("per minute", lastMinute(minutes))]});
}

function bars(values, width, base, unit, direction) {
  const bar = (value, i) => {
    const height = Math.max(1, value * unit) * direction;
    return value ? `M${(i + .5) * width} ${base}v${height.toFixed(2)}` : "";
  };
  return values.map(bar).join("");
}

// Done rises from the base line, failed hangs below it, in one scale.
function jobBars({done, failed}, width, height) {
  const high = Math.max(...done);
  const low = Math.max(...failed);
  const unit = (height - 3) / Math.max(1, high + low);
  const base = 1.5 + (low ? high * unit : height - 3);
  return [
    el("path", {class: "bars-done", d: bars(done, width, base, unit, -1)}),
    el("path", {class: "bars-failed", d: bars(failed, width, base, unit, 1)}),
    el("path", {class: "base", d: `M0 ${base}H${60 * width}`}),
  ];
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function endedText(done, failedAttempts) {
  return `${number(done)} done, ${plural(failedAttempts, "failed attempt")}`;
}

function hourText({done, failed}) {
  return endedText(sum(done), sum(failed));
}

function sparkline(minutes) {
  const label = "last hour: " + hourText(minutes);
  const attributes = {role: "img", class: "spark", viewBox: "0 0 120 28", "aria-label": label};
  return el("div", {title: label}, el("svg", attributes, jobBars(minutes, 2, 28)));
}

function minuteTime(i) {
  const time = new Date(now() - (59 - i) * 60000);
  return time.toLocaleTimeString("sv", {hour: "2-digit", minute: "2-digit"});
}

function minuteText(i) {
  const wait = hour.wait[i] === null ? "" : `, waited ${duration(hour.wait[i])}`;
  return `${minuteTime(i)}: ${endedText(hour.done[i], hour.failed[i])}${wait}`;
}

function chartNodes() {
  const cursor = pointedMinute === null ? "" : `M${pointedMinute * 10 + 5} 0V200`;
  const waits = hour.wait.map(value => value || 0);
  const longest = Math.max(...waits);
  const drawing = (name, height, ...content) => el("svg", {
    class: name,
    viewBox: `0 0 600 ${height}`,
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  }, content, el("path", {class: "cursor", d: cursor}));
  return [
    el("p", {class: "scale"}, `jobs a minute, at most ${number(Math.max(...hour.done))} done`),
    drawing("jobs", 110, jobBars(hour, 10, 110)),
    el("p", {class: "scale"}, `waiting time, at most ${duration(longest)}`),
    drawing("wait", 46,
      el("path", {class: "bars-wait", d: bars(waits, 10, 45, 43 / (longest || 1), -1)}),
      el("path", {class: "base", d: "M0 45H600"})),
    el("p", {class: "scale"}, el("span", {}, minuteTime(0)), el("span", {}, minuteTime(59))),
  ];
}

function drawChart() {
  const i = pointedMinute;
  const text = i === null ? "in all " + hourText(hour) : minuteText(i);
  show({chart: chartNodes(), reading: text});
  $("chart").setAttribute("aria-valuenow", i ?? 59);
  $("chart").setAttribute("aria-valuetext", text);
}

function drawMinutes() {
  const rows = hour.done.map((done, at) => (
    {time: minuteTime(at), done, failed: hour.failed[at], waited: hour.wait[at]}));
  drawTable("minutes", rows.reverse(), row => row.time);
}

function pointAtMinute(i) {
  const before = pointedMinute;
  pointedMinute = i === null ? null : Math.max(0, Math.min(59, i));
  if (hour && pointedMinute !== before) {
    drawChart();
  }
}

function minuteUnder({clientX}) {
  const {left, width} = $("chart").getBoundingClientRect();
  return Math.floor((clientX - left) / width * 60);
}

function moveMinute(event) {
  const steps = {ArrowLeft: -1, ArrowRight: 1, Home: -60, End: 60};
  if (event.key in steps) {
    event.preventDefault();
    pointAtMinute((pointedMinute ?? 59) + steps[event.key]);
  }
}

// -- Overview: queues, workers, schedules -------------------------------------------------------
function queueState(row) {
  const {paused, polled_at, running, oldest_age} = row;
  const isServed = running || polled_at && ageOf(polled_at) < WORKER_SILENCE;
  if (paused) {
    return [el("span", {class: "warn"}, "paused"), limitText(row)];
  }
  if (isServed) {
    return ["open", limitText(row)];
  }
  const look = oldest_age === null ? "soft" : "bad";
  const silence = polled_at ? "last worker " + ago(polled_at) : "no worker yet";
  return [el("span", {class: look}, silence), limitText(row)];
}

function limitText({max_running, rate, per}) {
  const most = max_running ? `, max ${max_running}` : "";
  return most + (rate ? `, ${rate} per ${per} s` : "");
}

function queueButtons({queue, paused, failed, done}) {
  const retry = {queue, status: "failed", count: failed};
  const purge = {queue, status: "done", count: done};
  return el("span", {class: "buttons"},
    button(paused ? "resume" : "pause", {queue}, paused ? "Resume" : "Pause"),
    button("retry-all", retry, "Retry failed", failed > 0),
    button("delete-all", purge, "Delete done", done > 0));
}

function scheduleTicks({cron, zone, every}) {
  return cron ? `${cron} ${zone}` : "every " + duration(every);
}

function byWorker(seen) {       // one row for each worker, with all its queues
  const workers = new Map();
  for (const {worker, queue, seen_at, hung, running} of seen) {
    const row = workers.get(worker) || {worker, queues: [], seen_at, hung: 0, running: 0};
    row.queues.push(queue);
    row.seen_at = seen_at > row.seen_at ? seen_at : row.seen_at;
    row.hung = Math.max(row.hung, hung);        // each queue repeats the worker's number
    row.running += running;
    workers.set(worker, row);
  }
  const names = row => row.queues.sort().join();
  return [...workers.values()].sort((a, b) => (
    names(a).localeCompare(names(b)) || String(a.worker).localeCompare(String(b.worker))));
}

function isLive(worker) {
  return worker.running || ageOf(worker.seen_at) < WORKER_SILENCE;
}

function drawWorkers(seen) {
  const workers = byWorker(seen);
  const gone = workers.filter(row => !isLive(row));
  drawTable("workers", workers.filter(isLive), row => row.worker);
  drawTable("gone-workers", gone, row => row.worker);
  const hasLive = workers.length > gone.length;
  show({
    "gone-count": `${plural(gone.length, "worker")} not seen for two minutes or longer`,
    "no-worker": hasLive ? "" : "No worker has polled in the last two minutes.",
  });
}

function drawQueues({queues, totals}) {
  const keyOf = row => row.queue;
  const byName = [...queues].sort((a, b) => a.queue.localeCompare(b.queue));
  const isCut = queues.length < totals.queues;
  const which = params.find ? "that match" : "with work first";
  drawTable("queues", heldRows("queues", byName, keyOf, true), keyOf);
  show({
    shown: isCut ? `${number(queues.length)} of ${number(totals.queues)}, ${which}` : "",
    find: totals.queues > 10,
    "no-queue": queues.length ? "" : params.find ? "Nothing matches." : "There are no queues yet.",
  });
}

function drawOverview(queues, schedules) {
  hour = queues.minutes;
  drawTotals(queues.totals, queues.minutes);
  drawChart();
  drawMinutes();
  drawQueues(queues);
  drawWorkers(queues.workers);
  drawTable("schedules", schedules.schedules, row => row.name);
  const isEmpty = !queues.totals.queues;
  show({
    example: isEmpty ? exampleText() : "",
    hour: !isEmpty,
    "schedules-cut": schedules.after ? `the first ${PAGE_SCHEDULES} by name` : "",
  });
}

function exampleText() {
  const url = new URL("enqueue", location.href);
  const secret = token ? " -H 'Authorization: Bearer ...'" : "";
  const headers = "-H 'Content-Type: application/json'" + secret;
  const host = new URL(".", location.href);
  return `# in a shell
curl ${headers} -d '{"queue": "hello", "payload": "world"}' ${url}

# in Python, beside rundown_workers.py
import rundown_workers as rw

@rw.queue(name="hello", host="${host}")
def hello(payload):
    print("hello,", payload)

rw.enqueue("hello", "world", host="${host}")
rw.run()`;
}

// -- Jobs: the page -----------------------------------------------------------------------------
function filters() {
  return Object.fromEntries(FILTERS.filter(name => params[name]).map(name => [name, params[name]]));
}

function lastLine(error) {      // without indented lines, which are those of a stack
  const lines = (error || "").trim().split("\n");
  return lines.reverse().find(line => !/^\s/.test(line));
}

function jobDetail(job) {
  let detail = [];
  if (job.status === "running") {
    detail = progressNodes(job, false);
  } else if (job.status === "done") {
    detail = ["took " + duration(secondsBetween(job.started_at, job.finished_at))];
  } else if (job.status === "pending") {
    detail = [pendingDetail(job)];
  }
  const error = job.status === "running" ? "" : lastLine(job.error);
  return error ? [...detail, " ", el("span", {class: "error"}, error)] : detail;
}

function pendingDetail(job) {
  if (job.waits_for) {
    return `waits for ${plural(job.waits_for, "job")}`;
  }
  return ageOf(job.next_run_at) < 0 ? "due " + ago(job.next_run_at) : "";
}

function drawTabs() {
  const tab = status => {
    const href = address("jobs", {...filters(), status});
    const isCurrent = (params.status || "") === status;
    const isCounted = status && !params.tag && !params.group && !params.search;
    const total = isCounted ? " " + number(counts[status]) : "";
    return el("a", {href, "aria-current": isCurrent && "page"}, (status || "all") + total);
  };
  show({tabs: ["", ...STATUSES].map(tab)});
}

function nothingText(page) {
  if (page.jobs.length) {
    return "";
  }
  if (page.refusal) {
    return page.refusal;
  }
  if (page.after) {
    return "Nothing matches among the jobs that were looked at so far.";
  }
  return Object.keys(filters()).length ? "Nothing matches." : "There are no jobs yet.";
}

function drawPaging({jobs, after, isKept}) {
  const label = jobs.length < PAGE_JOBS ? "Look further back" : "Older jobs";
  const older = after && link(address("jobs", {...filters(), after}), label);
  const newest = params.after && link(address("jobs", filters()), "Newest jobs");
  const all = Object.keys(filters()).length ? link("#jobs", "Clear filters") : null;
  const again = isKept ? button("look-again", "", "Look again", true, "plain") : null;
  show({paging: [newest, older, all, again].filter(Boolean)});
}

function drawJobs(page) {
  const keyOf = job => job.id;
  const shown = page.jobs.length;
  updateSelected(page.jobs);
  drawTabs();
  drawTable("jobs", heldRows("jobs", page.jobs, keyOf, false), keyOf);
  drawPaging(page);
  show({
    nothing: nothingText(page),
    "select-these": shown > 0,
    "select-label": shown === 1 ? "select this one" : `select these ${number(shown)}`,
  });
  drawSelection(page.after);
}

// The engine may look at many jobs that do not match: it takes several requests to fill a page.
async function findJobs(fields, limit) {
  const jobs = [];
  let after = fields.after || "";
  let requests = 0;
  while (requests < PAGE_SEARCHES) {
    requests += 1;
    const missing = Math.min(limit - jobs.length, ACTION_BATCH);
    const page = await call(query("jobs", {...fields, after, brief: true, limit: missing}));
    jobs.push(...page.jobs);
    after = page.after;
    if (!after || jobs.length >= limit) {
      break;
    }
  }
  return {jobs, after, isCostly: requests > 1};
}

function refusedPage(failure) {     // the engine does not take a filter, such as one too long
  if (failure.status !== 400) {
    throw failure;
  }
  return {jobs: [], after: null, refusal: failure.message};
}

async function findPage() {
  if (keptPage?.address === location.hash) {
    return keptPage.page;
  }
  const mine = refreshId;
  const hash = location.hash;
  const isSearch = Boolean(params.search);
  const page = await findJobs({...filters(), after: params.after}, PAGE_JOBS).catch(refusedPage);
  page.isKept = isSearch || page.isCostly;
  if (mine === refreshId) {     // else it may lack a change, or replace a later search
    keptPage = page.isKept ? {address: hash, page} : null;
  }
  return page;
}

// -- Jobs: failures by their last line ----------------------------------------------------------
function noFailures() {
  return {address: "", time: 0, jobs: []};
}

async function findFailures() {
  if (params.status !== "failed" || params.search) {
    return [];
  }
  const isFresh = Date.now() - failures.time < FAILURES_INTERVAL;
  if (failures.address === location.hash && isFresh) {
    return failures.jobs;
  }
  const mine = refreshId;
  const hash = location.hash;
  const {jobs} = await findJobs(filters(), GROUPED_FAILURES);
  if (mine === refreshId) {
    failures = {address: hash, time: Date.now(), jobs};
  }
  return jobs;
}

function failuresByLine(jobs) {
  const rows = new Map();
  for (const job of jobs) {
    const line = lastLine(job.error) || "(no error)";
    const row = rows.get(line) || {line, search: line.slice(0, MAX_LINE), jobs: []};
    row.jobs.push(job);
    rows.set(line, row);
  }
  return [...rows.values()].sort((a, b) => (
    b.jobs.length - a.jobs.length || a.line.localeCompare(b.line)));
}

function drawFailures(jobs) {
  const isCut = jobs.length >= GROUPED_FAILURES;
  const which = isCut ? `The newest ${number(jobs.length)} failures` : "Failures";
  drawTable("errors", failuresByLine(jobs), row => row.line);
  show({
    failures: jobs.length > 0,
    "errors-title": `${which} by the last line of their error`,
  });
}

// -- Jobs: selection ----------------------------------------------------------------------------
function selectionBox(job) {
  return el("input", {
    type: "checkbox",
    "data-id": job.id,
    "data-status": job.status,
    "aria-label": "select " + job.id,
    checked: selected.has(job.id) || selectedAll !== null,
  });
}

function select(jobs, isSelected = true) {
  selectedAll = null;
  for (const job of jobs) {
    if (isSelected) {
      selected.set(job.id, job.status);
    } else {
      selected.delete(job.id);
    }
  }
  refresh();
}

function clearSelection() {
  selected = new Map();
  selectedAll = null;
}

// Selects by status and queue where the jobs are too many to name them, else by their ids.
async function selectMatching() {
  const {search, tag, group, queue, status} = params;
  const total = status && !search && !tag && !group ? counts[status] : 0;
  if (total > MAX_SELECTED) {
    selectedAll = {queue, status, count: total};
  } else {
    const hash = location.hash;
    const {jobs} = await findJobs(filters(), MAX_SELECTED);
    if (location.hash === hash) {       // else the reader has gone on to other jobs
      select(jobs);
    }
  }
}

function updateSelected(jobs) {
  for (const {id, status} of jobs) {
    if (selected.has(id)) {
      selected.set(id, status);
    }
  }
}

function selectionCount(action) {       // of the selected jobs that the action applies to
  const {statuses, path} = ACTIONS[action];
  if (selectedAll) {
    return statuses.includes(selectedAll.status) && path !== "reschedule" ? selectedAll.count : 0;
  }
  return [...selected.values()].filter(status => statuses.includes(status)).length;
}

function drawSelection(hasMore) {
  const total = selectedAll ? selectedAll.count : selected.size;
  const actions = Object.entries(ACTIONS).map(([name, {label, isDangerous}]) => {
    const able = selectionCount(name);
    const look = isDangerous ? "danger" : "";
    return button("bulk", name, able ? `${label} ${number(able)}` : label, able > 0, look);
  });
  const content = [
    el("b", {}, `${plural(total, "job")} selected`),
    el("span", {class: "buttons"}, actions),
    hasMore && button("select-matching", "", "Select all that match", true, "plain"),
    button("select-none", "", "Clear", true, "plain"),
  ];
  show({bulk: total > 0, selection: content.filter(Boolean)});
  $("select-page").checked = total > 0 && lastRows.jobs.every(job => selected.has(job.id));
}

// -- One job ------------------------------------------------------------------------------------
function jsonText(value, longest = MAX_SHOWN) {
  const text = JSON.stringify(value, null, 2);
  const isCut = text.length > longest;
  return isCut ? text.slice(0, longest) + " ... (cut here; GET /jobs/ID has the rest)" : text;
}

function stepResult(value) {
  const line = JSON.stringify(value);
  return line.length <= MAX_LINE ? line : jsonText(value, MAX_STEP);
}

function fieldValue({field, value}) {
  if (value === null || value === undefined) {
    return "–";
  }
  if (field.endsWith("_at")) {
    return [timeNode(value), ", " + ago(value)];
  }
  return typeof value === "string" ? value : JSON.stringify(value);
}

function fact(name, ...content) {
  return el("div", {class: "fact", "data-fact": name}, el("b", {}, name), content);
}

function jobFacts(job) {
  const retries = job.max_retries === null ? "" : `, ${job.retries} of ${job.max_retries} retries`;
  const isDue = job.status === "pending" && !job.waits_for;
  const took = job.started_at && job.finished_at;
  return [
    fact("status", badge(job.status)),
    fact("queue", jobsLink({queue: job.queue})),
    fact("age", timeNode(job.created_at, duration(ageOf(job.created_at)))),
    fact("attempt", String(job.attempt) + retries),
    job.worker && fact("worker", job.worker),
    job.tag && fact("tag", jobsLink({tag: job.tag})),
    job.group && fact("group", jobsLink({queue: job.queue, group: job.group}, job.group)),
    isDue && fact("due", agoNode(job.next_run_at)),
    took && fact("took", duration(secondsBetween(job.started_at, job.finished_at))),
    job.finished_at && fact("ended", agoNode(job.finished_at)),
  ].filter(Boolean);
}

function jobButtons({id, status, waits_for}) {
  return Object.entries(ACTIONS).map(([action, {label, statuses, isDangerous}]) => {
    const isBlocked = action === "run" && waits_for;
    const isPossible = statuses.includes(status) && !isBlocked;
    return button("one", {action, id}, label, isPossible, isDangerous ? "danger" : "");
  });
}

// Of a job that runs or is done, the error of an earlier attempt is not shown at the top.
function currentError({status, error, attempt}) {
  if (!error || status === "running" || status === "done") {
    return {"error-title": "", error: ""};
  }
  const title = status === "pending" ? `Error of attempt ${attempt}` : "Error";
  return {"error-title": title, error};
}

function attemptError(error) {
  if (!error) {
    return "";
  }
  const text = el("pre", {}, error);
  const line = lastLine(error);
  if (line === error.trim() && line.length <= MAX_LINE) {
    return text;
  }
  return el("details", {}, el("summary", {class: "error"}, line.slice(0, MAX_LINE)), text);
}

function attemptNode({attempt, worker, started_at, finished_at, outcome, error}) {
  const took = started_at && finished_at ? duration(secondsBetween(started_at, finished_at)) : "";
  const details = el("div", {class: "soft"},
    started_at ? ["began ", timeNode(started_at)] : "",
    took ? `, took ${took}` : "",
    worker ? `, on ${worker}` : "");
  const key = "attempt " + attempt;
  return el("li", {class: "status-" + outcome, "data-key": key, "data-attempt": attempt},
    el("b", {}, `Attempt ${attempt} `),
    el("span", {"data-count": "outcome"}, badge(outcome)),
    details,
    attemptError(error));
}

function momentNode(name, time) {
  return el("li", {"data-key": name},
    el("b", {}, name),
    el("div", {class: "soft"}, timeNode(time), ", " + ago(time)));
}

function timeline({created_at, next_run_at, status, waits_for, attempts = []}) {
  const isDue = status === "pending" && !waits_for;
  const next = isDue && next_run_at !== created_at ? [momentNode("Due", next_run_at)] : [];
  return [momentNode("Enqueued", created_at), ...attempts.map(attemptNode), ...next];
}

function dependencies(ids, page) {      // in the order of the ids; one that is gone has no status
  const known = new Map(page.jobs.map(job => [job.id, job]));
  return ids.slice(0, PAGE_QUEUES).map(id => known.get(id) || {id});
}

async function fetchJob() {
  try {
    const job = await call(query("jobs", {id: params.id}), {reviver: exactNumber});
    const brief = {brief: true, limit: PAGE_QUEUES};
    const [needs, neededBy] = await Promise.all([
      job.after ? call(query("jobs", {...brief, needed_by: job.id})) : {jobs: []},
      job.needed_by ? call(query("jobs", {...brief, needs: job.id})) : {jobs: []},
    ]);
    return {job, needs, neededBy};
  } catch (failure) {
    if (failure.status === 404) {
      return {};
    }
    throw failure;
  }
}

function drawJob({job, needs, neededBy}) {
  show({job: Boolean(job), "job-sections": Boolean(job), missing: !job});
  if (!job) {
    return;
  }
  const {why, error, attempts, payload, result, after, needed_by, steps, ...fields} = job;
  show({
    ...currentError(job),
    progress: progressNodes(job, true),
    facts: jobFacts(job),
    buttons: jobButtons(job),
    "why-title": "Why it is " + job.status,
    why: withLocalTimes(why),
    attempts: timeline(job),
    payload: jsonText(payload),
    result: result === null ? "" : jsonText(result),
  });
  drawTable("steps", Object.entries(steps || {}).map(([name, value]) => ({name, result: value})),
    step => step.name);
  drawTable("needs", dependencies(after || [], needs), each => each.id);
  drawTable("needed-by", dependencies(needed_by || [], neededBy), each => each.id);
  drawTable("fields", Object.entries(fields).map(([field, value]) => ({field, value})),
    each => each.field);
}

// -- Actions on jobs ----------------------------------------------------------------------------
const ACTIONS = {
  retry: {
    label: "Retry",
    path: "retry",
    statuses: ["failed", "cancelled"],
    consequence: "Retried jobs are pending again, with all their retries.",
  },
  run: {
    label: "Run now",
    path: "reschedule",
    fields: {delay: 0},
    statuses: ["pending"],
    consequence: "Jobs become due now, whatever time they were scheduled for.",
  },
  cancel: {
    label: "Cancel",
    path: "cancel",
    statuses: ["pending", "running"],
    isDangerous: true,
    consequence: "Running jobs are interrupted, and jobs that wait for a cancelled one are "
      + "cancelled too. Cancelled jobs can be retried.",
  },
  delete: {
    label: "Delete",
    path: "purge",
    statuses: ["pending", "done", "failed", "cancelled"],
    isDangerous: true,
    isFinal: true,
    consequence: "Payloads, results and errors are deleted too, and jobs that wait for a deleted "
      + "one are cancelled. This cannot be undone.",
  },
};

// Asks for as much as is at risk: nothing for one harmless change, a dialog for more changes or
// for a loss, and the typed count for a large loss. The result may be a promise.
function confirmAction(action, total) {
  const {label, isDangerous, isFinal, consequence} = ACTIONS[action];
  if (total === 1 && !isDangerous) {
    return true;
  }
  show({
    question: `${label} ${plural(total, "job")}?`,
    consequence,
    expected: String(total),
    typing: Boolean(isFinal && total >= TYPED_FROM),
    yes: `${label} ${number(total)}`,
  });
  $("yes").className = isDangerous ? "primary danger" : "primary";
  return openDialog();
}

function openDialog() {
  const dialog = $("confirm");
  $("typed").value = "";
  $("yes").disabled = true;
  setTimeout(allowYes, CLICK_GUARD);        // a double click does not confirm, too
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise(resolve => {
    dialog.onclose = () => {
      lastPress.time = 0;       // pressed again, the button asks again
      resolve(dialog.returnValue === "yes");
    };
  });
}

function allowYes() {
  const isTyped = $("typed").value.trim() === $("expected").textContent;
  $("yes").disabled = !isTyped && !$("typing").hidden;
}

async function applyToId(action, id) {
  const {label, path, fields} = ACTIONS[action];
  await call(path, {body: {id, ...fields}});
  return `${label}: 1 job`;
}

async function applyToIds(action, ids) {
  const {label, path, fields} = ACTIONS[action];
  const refused = [];
  for (let i = 0; i < ids.length; i += ACTION_BATCH) {
    const jobs = ids.slice(i, i + ACTION_BATCH).map(id => ({id, ...fields}));
    const answer = await call(path, {body: {jobs}});
    refused.push(...answer.jobs.filter(each => each.code));
  }
  const rest = refused.length ? `; ${number(refused.length)} refused: ${refused[0].error}` : "";
  return `${label}: ${plural(ids.length - refused.length, "job")}${rest}`;
}

async function applyToAll(action, {queue, status}) {
  const {label, path} = ACTIONS[action];
  const answer = await call(path, {body: {queue, status}});
  return `${label}: ${plural(answer.count, "job")}`;
}

async function applyToSelected(action) {
  if (!await confirmAction(action, selectionCount(action))) {
    return "";
  }
  const {statuses} = ACTIONS[action];
  const ids = [...selected].filter(([, status]) => statuses.includes(status)).map(([id]) => id);
  const all = selectedAll;
  clearSelection();
  return all ? applyToAll(action, all) : applyToIds(action, ids);
}

async function applyToOne({action, id}) {
  if (!await confirmAction(action, 1)) {
    return "";
  }
  const outcome = await applyToId(action, id);
  if (action === "delete") {
    location.hash = "#jobs";
  }
  return outcome;
}

async function applyToQueue(action, about) {
  return await confirmAction(action, about.count) ? applyToAll(action, about) : "";
}

// -- Other actions ------------------------------------------------------------------------------
async function pause(path, {queue}) {
  await call(path, {body: {queue}});
  return `${path === "pause" ? "Paused" : "Resumed"} ${queue}`;
}

async function runSchedule({name}) {
  const {schedules} = await call(query("schedules", {name}), {reviver: exactNumber});
  if (!schedules.length) {
    return `The schedule ${name} is gone`;
  }
  const schedule = schedules[0];
  const copied = ["queue", "payload", "timeout", "max_retries", "tag", "priority", "key", "group"];
  const given = copied.filter(field => (schedule[field] ?? null) !== null);
  const body = Object.fromEntries(given.map(field => [field, schedule[field]]));
  const job = await call("enqueue", {body});
  const known = `A job with the key ${schedule.key} is there already: ${job.id}`;
  return job.created === false ? known : "Enqueued " + job.id;
}

async function copyText(id) {
  const source = id === "title" ? $("id") : $(id);
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {                     // only a secure page may use the clipboard
    getSelection().selectAllChildren(source);
    document.execCommand("copy");
  }
  notify("Copied");
}

// data-action of a button -> its function; ACTIONS change jobs.
const PRESSES = {
  pause: about => pause("pause", about),
  resume: about => pause("resume", about),
  "retry-all": about => applyToQueue("retry", about),
  "delete-all": about => applyToQueue("delete", about),
  "run-schedule": runSchedule,
  one: applyToOne,
  bulk: applyToSelected,
  "select-failures": line => select(lastRows.errors.find(row => row.line === line).jobs),
  "select-matching": selectMatching,
  "select-none": clearSelection,
  "look-again": route,
};

function notify(text) {
  show({notice: text});
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(show, NOTICE_TIME, {notice: ""});
}

async function press({action, about}) {
  const isDouble = lastPress.button === action + about && Date.now() - lastPress.time < CLICK_GUARD;
  lastPress = {button: action + about, time: Date.now()};
  if (isDouble) {
    return;
  }
  try {
    const outcome = await PRESSES[action](JSON.parse(about));
    if (outcome) {
      notify(outcome);
    }
  } catch (failure) {
    notify(failure.message);
  }
  keptPage = null;
  failures = noFailures();
  refresh();
}

// -- Refreshing ---------------------------------------------------------------------------------
async function fetchHealth() {
  const health = await call("health", {accepted: [200, 503]});
  if (!health.status) {
    throw new Failure(503, "The engine says: " + health.error);
  }
  return health;
}

// queues: the fields of its GET /queues; fetch: its other requests; draw: takes all the responses.
const VIEWS = {
  overview: {
    queues: () => ({busy: true, limit: PAGE_QUEUES, search: params.find}),
    fetch: () => [call(query("schedules", {limit: PAGE_SCHEDULES, brief: true}))],
    draw: drawOverview,
  },
  jobs: {
    queues: () => ({limit: 1, queue: params.queue}),
    fetch: () => [findPage(), findFailures()],
    draw: drawJobsPage,
  },
  job: {
    queues: () => ({limit: 1}),
    fetch: () => [fetchJob()],
    draw: (queues, job) => drawJob(job),
  },
};

function drawJobsPage(queues, page, failed) {
  const none = Object.fromEntries(STATUSES.map(status => [status, 0]));
  counts = params.queue ? queues.queues[0] || none : queues.totals;
  drawFailures(failed);
  drawJobs(page);
}

async function refresh() {
  const mine = ++refreshId;
  const began = Date.now();
  clearTimeout(refreshTimer);
  if (document.hidden) {
    return;
  }
  const {queues, fetch, draw} = VIEWS[view];
  try {
    const [health, overview, ...rest] = await Promise.all([
      fetchHealth(), call(query("queues", {totals: true, ...queues()})), ...fetch()]);
    if (mine !== refreshId) {
      return;
    }
    clockSkew = Date.parse(overview.now) - Date.now();
    keepingInPlace(() => {
      showOnline();
      drawProblems(health, overview);
      draw(overview, ...rest);
    });
    drawTitle();
  } catch (failure) {
    if (mine !== refreshId || showFailure(failure)) {
      return;
    }
  }
  refreshTimer = setTimeout(refresh, Math.max(REFRESH_INTERVAL, 4 * (Date.now() - began)));
}

// The row under the pointer stays there, whatever comes or goes above it.
function keepingInPlace(change) {
  const row = document.querySelector("tr:hover");
  const before = row?.getBoundingClientRect().top;
  change();
  if (row?.isConnected) {
    scrollBy(0, row.getBoundingClientRect().top - before);
  }
}

function showOnline() {
  const time = new Date().toLocaleTimeString("sv");
  document.body.classList.remove("stale");
  show({
    offline: "",
    updated: "at " + time,
    login: false,
    manual: !token,         // a link cannot send it
    forget: Boolean(token),
  });
}

function shownSince() {
  const time = $("updated").textContent;
  return time ? ` This page shows the state ${time}.` : "";
}

function showFailure(failure) {         // returns whether the page waits for the token
  const isLocked = failure.status === 401;
  if (failure.status === undefined) {
    console.error(failure);
  }
  document.body.classList.toggle("stale", !isLocked);
  show({
    login: isLocked,
    forget: false,
    refused: isLocked && token ? "The engine refused this token." : "",
    offline: isLocked ? "" : `${failure.message}. Trying again.${shownSince()}`,
  });
  drawTitle();
  if (isLocked) {
    $("token").focus();
  }
  return isLocked;
}

// -- Addresses: #, #jobs?queue=...&status=..., #job/ID ------------------------------------------
function readAddress() {
  const hash = location.hash.slice(1);
  if (hash.startsWith("job/")) {
    view = "job";
    params = {id: new URLSearchParams("id=" + hash.slice(4)).get("id")};
    return;
  }
  const [page, ...rest] = hash.split("?");
  view = page === "jobs" ? "jobs" : "overview";
  params = Object.fromEntries(new URLSearchParams(rest.join("?")));
}

function route() {
  readAddress();
  clearSelection();
  keptPage = null;
  $("confirm").close("no");
  show({
    title: view === "job" ? ["job ", el("code", {id: "id"}, params.id)] : "",
    overview: view === "overview",
    "jobs-page": view === "jobs",
    "job-page": view === "job",
    job: false,
    "job-sections": false,
    missing: false,
    nothing: "Looking ...",
    "select-these": false,
    paging: "",
  });
  for (const each of document.querySelectorAll("[data-view]")) {
    each.ariaCurrent = each.dataset.view === view ? "page" : null;
  }
  for (const name of ["search", "queue", "tag", "group"]) {
    $("filter").elements[name].value = params[name] || "";
  }
  $("find").value = "";
  for (const id of ["jobs", "errors"]) {
    lastRows[id] = null;
    patch($(id).tBodies[0], "");
  }
  drawTitle();
  if (view === "job") {
    $("title").focus();
  }
  scrollTo(0, 0);           // back in the history, the browser restores the scroll
  refresh();
}

function applyFilter() {
  const fields = Object.fromEntries(new FormData($("filter")));
  const hash = address("jobs", {...fields, status: params.status});
  if (location.hash === hash) {
    route();                // the search is repeated
  }
  location.hash = hash;
}

// -- Events -------------------------------------------------------------------------------------
function onClick({target}) {
  const pressed = target.closest("[data-action][aria-disabled=false]");
  if (pressed) {
    press(pressed.dataset);
  }
  const copied = target.closest(".copy");
  if (copied) {
    copyText(copied.dataset.copy);
  }
}

function onCheck({target}) {
  if (target.dataset.id) {
    select([target.dataset], target.checked);
  }
  if (target.id === "select-page") {
    select(lastRows.jobs || [], target.checked);
  }
}

function listen() {
  document.onclick = onClick;
  document.onpointermove = ({pointerType}) => {
    pointer = pointerType;
  };
  document.onvisibilitychange = refresh;
  window.onhashchange = route;
  $("jobs-page").onchange = onCheck;
  $("filter").onchange = applyFilter;
  $("filter").onsubmit = applyFilter;
  $("typed").oninput = allowYes;
  $("no").onclick = () => $("confirm").close("no");
  $("forget").onclick = () => {
    keepToken(null);
    refresh();
  };
  $("login").onsubmit = () => {
    keepToken($("token").value);
    $("token").value = "";
    refresh();
  };
  $("find").oninput = () => {
    params.find = $("find").value;
    refresh();
  };
  $("chart").onpointermove = event => pointAtMinute(minuteUnder(event));
  $("chart").onpointerleave = () => pointAtMinute(null);
  $("chart").onblur = () => pointAtMinute(null);
  $("chart").onkeydown = moveMinute;
}

buildTables();
listen();
route();
</script>
</body>
</html>"""


def source_of(tag):
    """The policy's source for the only <style> or <script> of the page: its digest."""
    text = re.search(f'<{tag}>(.*?)</{tag}>', DASHBOARD, re.DOTALL).group(1)
    digest = hashlib.sha256(text.encode()).digest()
    return f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"


# The Content-Security-Policy: the page's own style and script, its own engine, nothing else.
POLICY = '; '.join([
    source_of('style'),
    source_of('script'),
    "default-src 'none'",
    "connect-src 'self'",
    'img-src data:',
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
])


# -- Node SDK --------------------------------------------------------------------------------------
NODE_SDK = r"""// @ts-nocheck: the types, in JSDoc, are for programs that use this file
/**
 * Rundown for Node 18 and newer: enqueue background jobs and work on them. No packages.
 *
 *     import { queue, enqueue, run } from "./rundown.mjs";
 *
 *     queue("images", { maxRetries: 5, concurrency: 4 }, async (payload, { signal, step }) => {
 *       const image = await step("download", () => download(payload, { signal }));
 *       return resize(image);
 *     });
 *     const job = await enqueue("images", "path/to/image.jpg", { delay: 60 });
 *     await run();
 *
 * A handler that returns completes its job; the value is the result. One that throws fails it with
 * the stack, and the engine tries again while retries are left: after `delay` seconds for
 * `throw new Retry("why", { delay: 60 })`, never for `throw new Abort("why")`. A job may run more
 * than once, since workers get killed: make handlers idempotent, or divide them into steps.
 *
 * RUNDOWN_URL names the engine (or several, separated by blanks: the first that answers is used for
 * as long as it does), RUNDOWN_TOKEN its token, NODE_EXTRA_CA_CERTS a certificate of your own. All
 * times are in seconds. A handler that blocks the event loop for longer than the lease (30 s) loses
 * its job, since heartbeats need the loop. TypeScript needs "allowJs". In CommonJS:
 * `const { enqueue } = await import("./rundown.mjs")`.
 */
import { randomUUID } from "node:crypto";
import { once, setMaxListeners } from "node:events";
import http from "node:http";
import https from "node:https";
import os from "node:os";
import { text } from "node:stream/consumers";
import { setTimeout as sleep } from "node:timers/promises";
import { inspect } from "node:util";

const DEFAULT_URL = "http://127.0.0.1:8181"; // not "localhost", which may be ::1
const PATIENCE = 30; // seconds for which a call is repeated
const ANSWER_TIMEOUT = 30; // seconds for an answer, divided by the number of engines
const JOB_WAIT = 25; // seconds of a request that waits for a job; proxies give up after 60
const POLL_WAIT = 1; // seconds of a poll; a worker that stops waits for its end
const MAX_PAUSE = 3; // seconds between two tries
const REFUSED_PAUSE = 10; // seconds until a worker that is refused (token, host) tries again
const FAREWELL = 2; // seconds for reports after the grace of a worker that stops
const EXIT_TIMEOUT = 5; // seconds after run() until a process that got a signal exits in any case
const SAME_SIGNAL = 0.5; // seconds in which a signal is the one before: npm passes on a Ctrl-C
const MAX_BATCH = 100; // jobs in a request
const MAX_STEPS = 1000; // of a job
const MAX_ERROR = 10000; // characters that are kept of an error that was refused as too long
const MAX_LINE = 200; // characters of an error in the log
const MAX_TIMER = 2 ** 31 - 1; // milliseconds that a timer of Node takes

/**
 * A job as the engine shows it.
 * @typedef {{
 *   id: string, queue: string, payload: any, attempt: number, retries: number,
 *   status: "pending" | "running" | "done" | "failed" | "cancelled", result?: any, error?: string,
 *   timeout: number, max_retries: number | null, priority: number, tag?: string, key?: string,
 *   group?: string, worker?: string, progress?: any, steps?: Record<string, any>,
 *   created?: boolean, created_at: string, updated_at: string, next_run_at?: string | null,
 *   started_at?: string | null, finished_at?: string | null
 * }} Job
 *
 * `runAt` is instead of `delay`; `expires` is seconds too. `after` are the jobs (or their ids) that
 * have to be done before; with `afterAny` they only have to end.
 * @typedef {{
 *   delay?: number, runAt?: Date | string, timeout?: number, maxRetries?: number, tag?: string,
 *   priority?: number, id?: string, key?: string, keyUntil?: "start" | "end", replace?: boolean,
 *   group?: string, expires?: number, after?: Job | string | (Job | string)[], afterAny?: boolean
 * }} EnqueueOptions
 *
 * `concurrency` jobs run at a time (1). `maxRetries` (3) and `timeout` (300) hold for jobs that
 * were enqueued without their own. Heartbeats are sent every third of the `lease` (30).
 * @typedef {{
 *   concurrency?: number, maxRetries?: number, timeout?: number, lease?: number
 * }} QueueOptions
 *
 * `signal` is aborted at the timeout, and when the job is no longer this worker's: cancelled, lost,
 * or released when the worker stops. `progress` shows any JSON value on the job. `step` runs a part
 * of the job once: its result is on disk before it resolves, and a later attempt gets that result.
 * @typedef {{
 *   job: Job, signal: AbortSignal, progress: (value: any) => void,
 *   step: <T>(name: string, action: () => T | Promise<T>) => Promise<T>
 * }} Context
 *
 * @typedef {(payload: any, context: Context) => any} Handler
 */

class RundownError extends Error {
  name = this.constructor.name;
}

/** Thrown by a handler: fail this attempt, and try again after `delay` seconds if it is given. */
export class Retry extends RundownError {
  /** @param {string} [message] @param {{ delay?: number }} [options] */
  constructor(message = "the handler asked for a retry", { delay } = {}) {
    super(message);
    this.delay = delay;
  }
}

/** Thrown by a handler: fail the job, and do not try again. */
export class Abort extends RundownError {}

/** The reason of `signal`: the job was cancelled, given to another worker, or released. */
export class Lost extends RundownError {}

/** A handler or a wait() took too long. */
export class TimedOut extends RundownError {}

/** No engine answers, or it cannot answer now. */
export class Unavailable extends RundownError {}

/** The engine refuses a call; `status` is the HTTP status. */
export class Refused extends RundownError {
  /** @param {string} message @param {number} status */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// -- Calls -----------------------------------------------------------------------------------

const AGENT_OPTIONS = { keepAlive: true, timeout: 4000 }; // idle: closed before a proxy does it
const plainAgent = new http.Agent(AGENT_OPTIONS);
const secureAgent = new https.Agent(AGENT_OPTIONS);
let current = 0; // which engine is in use; counts on when that one does not answer

function engineUrls() {
  const urls = (process.env.RUNDOWN_URL?.trim() || DEFAULT_URL).split(/\s+/);
  const pattern = /^https?:\/\/(\[[\da-f:.]+\]|[^\s/?#@:[\]]+)(:\d+)?(\/[^\s?#]*)?$/i;
  const bad = urls.find((url) => !pattern.test(url));
  if (bad) {
    throw new TypeError(`RUNDOWN_URL: ${bad} is not a URL such as ${DEFAULT_URL}`);
  }
  return urls.map((url) => url.replace(/\/$/, ""));
}

/** Sends one request (with `body` a POST); resolves with the answer. */
async function exchange(url, body, seconds) {
  const isSecure = url.startsWith("https");
  const token = process.env.RUNDOWN_TOKEN?.trim();
  const headers = { "Content-Type": "application/json" };
  if (token) {
    headers.Authorization = `Bearer ${token}`;
  }
  const request = (isSecure ? https : http).request(url, {
    method: body === undefined ? "GET" : "POST",
    agent: isSecure ? secureAgent : plainAgent,
    headers,
  });
  request.on("error", () => {}); // once() and text() hear of it too
  const expire = () => request.destroy(new Error(`no answer within ${seconds} s`));
  const timer = setTimeout(expire, seconds * 1000);
  try {
    request.end(body);
    const [response] = await once(request, "response");
    return readAnswer(response, await text(response));
  } finally {
    clearTimeout(timer);
  }
}

/** Sends a request to the engine in use. Throws Refused or Unavailable. */
async function send(path, body, seconds, isAnswer = Boolean) {
  const urls = engineUrls();
  const used = current;
  const url = urls[used % urls.length];
  try {
    const answer = await exchange(url + path, body, seconds);
    if (!isAnswer(answer)) {
      throw new Error("the answer is not an engine's");
    }
    return answer;
  } catch (error) {
    if (error instanceof RundownError) {
      throw error;
    }
    current = used + 1;
    throw new Unavailable(`no engine answers at ${url}: ${error.code ?? error.message}`);
  }
}

/** Only JSON is the engine's answer. Anything else is a proxy's, and means "not reached". */
function readAnswer({ statusCode: status, headers }, text) {
  const isJson = headers["content-type"]?.startsWith("application/json");
  const answer = isJson ? JSON.parse(text) : null;
  if (status === 204 || (status === 200 && answer)) {
    return answer;
  }
  if (status === 413) {
    throw new Refused(answer?.error ?? "the request is too large for a proxy", status);
  }
  if (status < 400 || typeof answer?.error !== "string") {
    throw new Error(`HTTP status ${status} is not an engine's answer`);
  }
  const isFinal = status < 500 && status !== 408 && status !== 429;
  throw isFinal ? new Refused(answer.error, status) : new Unavailable(answer.error);
}

/** Seconds on a clock that nobody sets. */
function now() {
  return performance.now() / 1000;
}

async function pause(seconds, signal) {
  const milliseconds = Math.min(Math.max(seconds * 1000, 0), MAX_TIMER);
  await sleep(milliseconds, undefined, { signal }).catch(() => {});
}

/**
 * Any call of the engine, repeated for `patience` seconds while no engine answers:
 * `await call("/cancel", { id })`; without a body it is a GET: `await call("/queues")`.
 * `wait` is how long the engine may take to answer; `signal` ends the repeating.
 * @param {string} path
 * @param {object} [body]
 * @param {{ wait?: number, patience?: number, signal?: AbortSignal }} [options]
 * @returns {Promise<any>}
 */
export async function call(path, body, options = {}) {
  const { wait = 0, patience = PATIENCE, limit = ANSWER_TIMEOUT } = options;
  const { signal, isAnswer, onError } = options;
  const text = body && JSON.stringify(body);
  const deadline = now() + patience;
  for (let tries = 1; ; tries += 1) {
    signal?.throwIfAborted();
    const longest = Math.min(limit / engineUrls().length, Math.max(1, deadline - now()));
    try {
      return await send(path, text, wait + longest, isAnswer);
    } catch (error) {
      const rest = pauseAfter(error, tries, patience);
      if (now() + rest >= deadline) {
        throw error;
      }
      onError?.(error);
      await pause(rest, signal);
    }
  }
}

/** Seconds until the next try. A worker outlives a wrong setting, which may be mended. */
function pauseAfter(error, tries, patience) {
  if (error instanceof Unavailable) {
    return Math.min(MAX_PAUSE, 0.1 * 2 ** tries) * (0.5 + Math.random() / 2);
  }
  const isSetting = [401, 403, 421].includes(error.status);
  return isSetting && patience === Infinity ? REFUSED_PAUSE : Infinity;
}

/** A UUID of version 7: ordered by time, so that the engine's index grows at its end. */
function newId() {
  const time = Date.now().toString(16).padStart(12, "0");
  return `${time.slice(0, 8)}-${time.slice(8)}-7${randomUUID().slice(15)}`;
}

function isJob(answer) {
  return typeof answer?.id === "string";
}

/**
 * Adds a job and returns it. While no engine answers, it is sent again for 30 s, and added once.
 * @param {string} queue
 * @param {any} [payload] any JSON value
 * @param {EnqueueOptions} [options]
 * @returns {Promise<Job>}
 */
export async function enqueue(queue, payload = null, options = {}) {
  const body = { queue, payload, id: newId() };
  for (const [option, value] of Object.entries(options)) {
    if (value !== undefined) {
      body[option.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`)] = value;
    }
  }
  if (body.after) {
    body.after = [body.after].flat().map((job) => job.id ?? job);
  }
  return call("/enqueue", body, { isAnswer: isJob });
}

/**
 * The job (given as it is or by its id) once it is done, failed or cancelled.
 * Throws TimedOut if it has not ended after `timeout` seconds.
 * @param {Job | string} job
 * @param {number} [timeout]
 * @returns {Promise<Job>}
 */
export async function wait(job, timeout = Infinity) {
  const given = await job;
  const id = given.id ?? given;
  const deadline = now() + timeout;
  for (;;) {
    const left = Math.max(0, deadline - now());
    const wait = Math.min(JOB_WAIT, left);
    const path = `/jobs/${encodeURIComponent(id)}?wait=${wait.toFixed(3)}`;
    const patience = Math.min(PATIENCE, left);
    const found = await call(path, undefined, { wait, patience, isAnswer: isJob });
    if (found.finished_at) {
      return found;
    }
    if (now() >= deadline) {
      throw new TimedOut(`job ${id} is still ${found.status} after ${timeout} s`);
    }
  }
}

// -- Worker ----------------------------------------------------------------------------------

const queues = new Map(); // name -> options and handler
let worker; // the one of the run() that is under way

/**
 * Registers the handler of a queue for run(), and returns it.
 * @param {string} name
 * @param {QueueOptions | Handler} options
 * @param {Handler} [handler]
 * @returns {Handler}
 */
export function queue(name, options, handler) {
  if (typeof options === "function" && !handler) {
    return queue(name, {}, options);
  }
  if (typeof name !== "string" || typeof handler !== "function") {
    throw new TypeError("queue() takes a name, options if you like, and a handler");
  }
  const { concurrency = 1, maxRetries = 3, timeout, lease = 30, ...others } = options;
  refuseOptions("queue()", others);
  if (!Number.isInteger(concurrency) || concurrency < 1) {
    throw new TypeError(`concurrency must be a whole number from 1 on, not ${concurrency}`);
  }
  queues.set(name, { name, concurrency, maxRetries, timeout, lease, handler });
  return handler;
}

function refuseOptions(place, options) {
  for (const option of Object.keys(options)) {
    throw new TypeError(`${place} has no option ${option}`);
  }
}

/**
 * Works on all registered queues until stop(), SIGTERM or SIGINT. Handlers that run then get
 * `grace` seconds (30); jobs that are not over by then are released to other workers. After a
 * signal the process exits with 0, at the latest 5 s after this resolves; after a second one at
 * once. With `burst` it runs all due jobs and resolves: for cron jobs and tests.
 * @param {{ grace?: number, burst?: boolean, log?: (line: string) => void }} [options]
 * @returns {Promise<void>}
 */
export async function run(options = {}) {
  const { grace = 30, burst = false, log = console.error, ...others } = options;
  refuseOptions("run()", others);
  engineUrls(); // throws if RUNDOWN_URL is wrong
  if (worker || !queues.size) {
    throw new Error(worker ? "run() is under way already" : "run() needs a queue: see queue()");
  }
  worker = new Worker(burst, log);
  let signalledAt = 0;
  const onSignal = (name) => {
    if (signalledAt && now() - signalledAt > SAME_SIGNAL) {
      process.exit(128 + os.constants.signals[name]);
    }
    signalledAt ||= now();
    worker?.stop();
  };
  process.on("SIGTERM", onSignal);
  process.on("SIGINT", onSignal);
  try {
    worker.ended = worker.run(grace);
    await worker.ended;
  } finally {
    worker = undefined;
    if (signalledAt) {
      setTimeout(() => process.exit(), EXIT_TIMEOUT * 1000).unref();
    } else {
      process.off("SIGTERM", onSignal);
      process.off("SIGINT", onSignal);
    }
  }
}

/**
 * Ends run() in good order, as SIGTERM does, and resolves when it has ended.
 * @returns {Promise<void>}
 */
export async function stop() {
  worker?.stop();
  await worker?.ended;
}

/**
 * One run(). consume() polls a queue; each job that it gets becomes a Claim, which runs the handler
 * and hands the outcome to Reports. keepAlive() sends heartbeats meanwhile.
 */
class Worker {
  name = `${os.hostname().slice(0, 150)}:${process.pid}`;
  claims = new Set(); // those whose outcome the engine does not have
  lease = Math.min(...[...queues.values()].map(({ lease }) => lease));
  reports = {
    heartbeat: new Reports("/heartbeat", this, this.lease / 3),
    complete: new Reports("/complete", this),
    fail: new Reports("/fail", this),
    release: new Reports("/release", this),
  };
  stopping = new AbortController(); // aborted: no more polls
  closing = new AbortController(); // aborted: no more reports
  isAway = false; // the last call was not answered, which the log has said
  changes = 0; // claims that began or ended: each may make jobs due
  emptyAt = new Map(); // queue -> `changes` when a poll was sent that found nothing

  constructor(burst, log) {
    this.burst = burst;
    this.log = log;
    setMaxListeners(0, this.stopping.signal, this.closing.signal);
  }

  async run(grace) {
    const { signal } = this.closing;
    const consumers = [...queues.values()].map((options) => {
      return this.consume(options).catch((error) => this.stop(error));
    });
    this.keepAlive();
    await once(this.stopping.signal, "abort");
    if (this.claims.size) {
      this.log(`stopping: ${this.claims.size} jobs have ${grace} s to end`);
    }
    const isOver = Promise.all(consumers).then(() => {
      return Promise.all([...this.claims].map(({ finished }) => finished));
    });
    await Promise.race([isOver, pause(grace, signal)]);
    this.claims.forEach((claim) => claim.release());
    await Promise.race([isOver, pause(FAREWELL, signal)]);
    if (this.claims.size) {
      this.log(`outcomes of ${this.claims.size} jobs were not reported; they will run again`);
    }
    this.closing.abort();
    if (this.error instanceof Refused) {
      Error.captureStackTrace(this.error, run); // of the caller, whose setting is refused
    }
    if (this.error) {
      throw this.error;
    }
  }

  stop(error) {
    if (!this.stopping.signal.aborted) {
      this.error = error;
      this.stopping.abort();
    }
  }

  /** Polls a queue and runs its jobs. A poll is never aborted, since its answer may bring jobs. */
  async consume({ name, concurrency, maxRetries, lease, timeout, handler }) {
    const { signal } = this.stopping;
    const wait = this.burst ? 0 : POLL_WAIT;
    const patience = this.burst ? PATIENCE : Infinity;
    const poll = { queue: name, worker: this.name, lease, max_retries: maxRetries, timeout, wait };
    const isAnswer = (answer) => answer === null || Array.isArray(answer);
    const options = { wait, patience, signal, isAnswer };
    let running = 0;
    let held = 0; // running or not reported: an engine that takes no outcomes gets no more jobs
    let wake;
    this.log(`working on ${name} (concurrency ${concurrency}) as ${this.name}`);
    while (!signal.aborted) {
      const limit = Math.min(concurrency - running, 2 * concurrency - held, MAX_BATCH);
      if (limit <= 0) {
        await new Promise((resolve) => (wake = resolve));
        continue;
      }
      const { changes } = this;
      const began = now();
      const jobs = (await this.insist("/poll", { ...poll, limit }, options)) ?? [];
      for (const job of jobs) {
        const claim = new Claim(job, this);
        this.claims.add(claim);
        this.changes += 1;
        running += 1;
        held += 1;
        claim.decision.then(() => {
          running -= 1;
          wake?.();
        });
        claim.finished = claim.run(handler).then(() => {
          this.claims.delete(claim);
          this.changes += 1;
          held -= 1;
          wake?.();
        });
      }
      if (!jobs.length) {
        if (this.burst && !(await this.isHeldBack(name))) {
          this.endBurst(name, changes);
        }
        await pause(began + (wait || 0.05) - now(), signal); // an engine that stops answers at once
      }
    }
  }

  /** Does a rate hold back due jobs of the queue? A burst waits for them. */
  async isHeldBack(name) {
    const { queues: rows } = await call(`/queues?queue=${encodeURIComponent(name)}`);
    return rows.some(({ oldest_age, rate, paused }) => oldest_age !== null && rate && !paused);
  }

  /** A burst is over when no queue had a job since the last claim ended. */
  endBurst(name, changes) {
    this.emptyAt.set(name, changes);
    const isEmpty = (each) => this.emptyAt.get(each) === this.changes;
    if (!this.claims.size && [...queues.keys()].every(isEmpty)) {
      this.stop();
    }
  }

  /** A call that is repeated until an engine answers. The log says once that none does. */
  async insist(path, body, options) {
    const onError = ({ message }) => {
      if (!this.isAway) {
        this.log(`engine away, trying again until it is back: ${message}`);
      }
      this.isAway = true;
    };
    const answer = await call(path, body, { patience: Infinity, onError, ...options });
    if (this.isAway) {
      this.log("engine back");
    }
    this.isAway = false;
    return answer;
  }

  /** Heartbeats of all claims: every third of the lease, and when the engine took one away. */
  async keepAlive() {
    const { signal } = this.closing;
    const interval = this.lease / 3;
    const wait = Math.min(interval / 2, POLL_WAIT);
    const path = `/lost?worker=${encodeURIComponent(this.name)}&wait=${wait}&since=`;
    let since = 0;
    let dueAt = 0;
    while (!signal.aborted) {
      const began = now();
      if (this.claims.size) {
        const news = await send(path + since, undefined, wait + interval).catch(() => ({}));
        since = news.since ?? since;
        const isDue = news.lost || now() >= dueAt;
        dueAt = isDue ? now() + interval : dueAt;
        await Promise.all([...this.claims].map((claim) => claim.beat(isDue)));
      }
      await pause(began + wait - now(), signal);
    }
  }
}

/** Reports of one kind. Reports that come during a request go together in the next. */
class Reports {
  waiting = [];
  isSending = false;

  constructor(path, worker, limit) {
    this.path = path;
    this.worker = worker;
    this.limit = limit;
  }

  /** Resolves when the engine has taken the report; rejects if it refuses it. */
  send(report) {
    return new Promise((resolve, reject) => {
      this.waiting.push({ report, resolve, reject });
      this.sendAll();
    });
  }

  async sendAll() {
    if (!this.isSending) {
      this.isSending = true;
      while (this.waiting.length) {
        await undefined; // until all that is reported at this moment is there
        await this.sendBatch(this.waiting.splice(0, MAX_BATCH));
      }
      this.isSending = false;
    }
  }

  /** If a batch is refused for one of its reports, they go one by one. */
  async sendBatch(batch) {
    const { limit, path, worker } = this;
    const body = { jobs: batch.map(({ report }) => report) };
    const isAnswer = (answer) => answer?.jobs?.length === batch.length;
    const options = { signal: worker.closing.signal, limit, isAnswer };
    try {
      const { jobs } = await worker.insist(path, body, options);
      batch.forEach(({ resolve, reject }, index) => {
        const { error, code } = jobs[index];
        return error ? reject(new Refused(error, code)) : resolve();
      });
    } catch (error) {
      if (batch.length === 1) {
        batch[0].reject(error);
      } else {
        for (const one of batch) {
          await this.sendBatch([one]);
        }
      }
    }
  }
}

/** A claimed job. How it ends is decided once: by its handler, the time, the engine, or a stop. */
class Claim {
  controller = new AbortController();
  progress; // field of the next heartbeat

  constructor(job, worker) {
    this.job = job;
    this.worker = worker;
    this.address = { id: job.id, attempt: job.attempt }; // the handler may change the job
    this.label = `${job.queue} ${job.id}`;
    this.steps = new Map(Object.entries(job.steps ?? {}));
    this.decision = new Promise((resolve) => (this.resolve = resolve));
  }

  /** Runs the handler; resolves when the engine has the outcome, or has taken the job away. */
  async run(handler) {
    const error = `timed out after ${this.job.timeout} s`;
    const expire = () => this.decide("fail", { error }, new TimedOut(error));
    const timer = setTimeout(expire, this.job.timeout * 1000);
    if (this.worker.stopping.signal.aborted) {
      this.release();
    } else {
      this.perform(handler);
    }
    const { call, fields } = await this.decision;
    clearTimeout(timer);
    if (call) {
      await this.beat(false);
      await this.report(call, fields);
    }
  }

  async perform(handler) {
    try {
      const result = await handler(this.job.payload, {
        job: this.job,
        signal: this.controller.signal,
        progress: (value) => (this.progress = JSON.parse(JSON.stringify({ progress: value }))),
        step: (name, action) => this.step(name, action),
      });
      this.decide("complete", { result });
    } catch (error) {
      this.decide("fail", failure(error));
    }
  }

  /** Sets how the job is reported, and why the handler is aborted, if it is. */
  decide(call, fields, reason) {
    if (!this.isDecided) {
      this.isDecided = true;
      this.resolve({ call, fields });
      if (reason) {
        this.controller.abort(reason);
      }
    }
  }

  lose(message) {
    this.decide(undefined, {}, new Lost(message));
  }

  release() {
    this.decide("release", {}, new Lost("the worker stops, and the job is released"));
  }

  /** An outcome that the engine cannot store is replaced by a failure that it can. */
  async report(call, fields, isReplaced = false) {
    if (call === "fail") {
      const line = fields.error.trim().split("\n").pop();
      this.worker.log(`${this.label} failed: ${line.slice(0, MAX_LINE)}`);
    }
    try {
      await this.worker.reports[call].send({ ...this.address, ...fields });
    } catch (error) {
      if (this.worker.closing.signal.aborted) {
        return;
      }
      if (isGone(error) || isReplaced) {
        this.worker.log(`${this.label}: the engine refuses its ${call}: ${error.message}`);
      } else if (call === "complete") {
        const message = `the result cannot be stored: ${error}`.split("\n")[0];
        await this.report("fail", { error: message, retry: false }, true);
      } else {
        const message = fields.error.slice(-MAX_ERROR);
        await this.report("fail", { error: message, retry: fields.retry }, true);
      }
    }
  }

  /** A heartbeat, if one is due or there is progress to show. */
  async beat(isDue) {
    const { progress } = this;
    if (!isDue && !progress) {
      return;
    }
    try {
      await this.worker.reports.heartbeat.send({ ...this.address, ...progress });
    } catch (error) {
      if (isGone(error)) {
        this.lose(error.message);
      } else if (!this.worker.closing.signal.aborted) {
        this.worker.log(`${this.label}: the engine refuses its progress: ${error.message}`);
      }
    }
    this.progress = this.progress === progress ? undefined : this.progress;
  }

  async step(name, action) {
    const { signal } = this.controller;
    if (this.steps.has(name)) {
      return this.steps.get(name);
    }
    checkStep(name, this.steps.size);
    this.letGo();
    const result = (await action()) ?? null;
    try {
      const body = { ...this.address, name, result };
      const answer = await call("/step", body, { patience: Infinity, signal });
      this.steps.set(name, answer.result);
    } catch (error) {
      if (isGone(error)) {
        this.lose(error.message);
      }
      signal.throwIfAborted();
      throw error;
    }
    this.letGo();
    return this.steps.get(name);
  }

  /** A worker that stops does not wait for the next step: another continues there. */
  letGo() {
    if (this.worker.stopping.signal.aborted) {
      this.release();
    }
    this.controller.signal.throwIfAborted();
  }
}

/** Before the step runs: if the engine refused its name afterwards, each attempt would run it. */
function checkStep(name, count) {
  if (typeof name !== "string" || !/^[^\p{Cc}\p{Cs}]{1,200}$/u.test(name)) {
    const rule = "a string of 1 to 200 characters without control characters";
    throw new TypeError(`the name of a step must be ${rule}, not ${inspect(name)}`);
  }
  if (count >= MAX_STEPS) {
    throw new RangeError(`a job has at most ${MAX_STEPS} steps`);
  }
}

function isGone({ status }) {
  return status === 404 || status === 409;
}

/** The fields of /fail. The last line names the error, since lists of jobs show that line. */
function failure(error) {
  if (error instanceof Retry || error instanceof Abort) {
    const message = error.message || error.name;
    return { error: message, delay: error.delay, retry: error instanceof Retry };
  }
  try {
    const isError = error instanceof Error;
    return { error: isError ? `${stackOf(error)}\n\n${error}` : `${inspect(error)} was thrown` };
  } catch {
    return { error: "an error that cannot be shown" }; // a getter or toString() of its own throws
  }
}

/** Not what inspect() shows: properties of errors may hold secrets, such as a request's headers. */
function stackOf(error) {
  const cause = error.cause instanceof Error ? `\n\ncaused by ${stackOf(error.cause)}` : "";
  return `${error.stack}${cause}`;
}
"""


if __name__ == '__main__':
    sys.exit(main())
