"""Rundown engine: background jobs over HTTP, kept in one SQLite file.

    python rundown_engine.py --db jobs.db
    curl -H 'Content-Type: application/json' http://localhost:8181/enqueue -d '{"queue": "images", "payload": "a.jpg"}'

One file, standard library alone: copy it and run it. It owns the state of every job, the retries and the storage;
workers (rundown_workers.py, curl, anything that speaks HTTP) poll it and report back.

LIFECYCLE                                                          JOB: id, queue, tag, payload, status, priority,
  enqueue -> pending --poll--> running --complete--> done          attempt, retries, max_retries, timeout, key, worker,
               ^  ^               |                                progress, result, error, created_at, updated_at,
               |  +-- fail, lost worker (retries left), release    next_run_at, started_at, finished_at. `attempt`
               |                  +-- fail (none left) --> failed  counts claims and names the current one; `retries`
               +---- retry ------- failed | cancelled              counts failures and lost workers and is what
  pending | running --cancel--> cancelled                          `max_retries` bounds.

CALLS (JSON in, JSON out; times are RFC 3339 in UTC, durations are seconds)
    POST /enqueue    queue, payload, timeout, max_retries, tag, priority, delay or run_at, key, id, after, after_any
                     -> the job; {"jobs": [...]}, at most 10,000: all or nothing
    POST /poll       queue, limit, wait (at most 60: sleep for a job that long), worker, lease, max_retries, timeout,
                     hung -> a job, with limit a list of jobs; 204 when there is none
    POST /fail       id, attempt, error, retry (false: never again), delay (instead of the backoff)
    POST /complete   id, attempt, result                   POST /release   id, attempt -> pending again, nothing counted
    POST /heartbeat  id, attempt, progress -> 409 when the claim is gone; these four also take {"jobs": [...]}: each
                     item is answered, with `error` and `code` if refused
    POST /cancel, /retry   id, or queue with status (pending, running; failed, cancelled) -> {"count": n}
    POST /purge            queue and/or status (never running) -> {"count": n}            POST /pause, /resume  queue
    POST /limit      queue, max_running (jobs at a time), rate and per (so many claims at once, then one each per / rate
                     seconds); null lifts one, what is not named stays
    POST /schedule   name, queue, cron or every, zone, payload, timeout, max_retries, tag, priority, key -> the schedule
    POST /unschedule name -> {"count": n}; its jobs stay   GET  /schedules  by name, limit, after
    GET  /jobs/{id}  the job, its attempts, and why it does not run; ?wait=30 waits for its end
    GET  /jobs       queue, status, tag, limit, after: newest first, paged by `after`; brief=true leaves out payload,
                     result and all but the last line of the error; id=..: as /jobs/{id}, for any id;
                     needed_by=ID: what that job waits or waited for, in its order
    GET  /queues     limit, after, busy (work first): counts, oldest age, paused, workers seen, last hour by the minute
    GET  /metrics, /health, /backup    Prometheus text; JSON; a consistent copy of the database
    GET  /status/{id}, /details/{tag}  the job; the newest job with that tag   GET  /, /docs  the dashboard; this text

Every error is {"error": "a sentence that names the field"}: 400 bad input, 401 token, 403 foreign page, 404, 405, 409
not (or no longer) possible, 408, 411, 413, 415, 421 foreign Host, 431, 500, 503 try again (with Retry-After).

GUARANTEES
- Acknowledged means on disk: the answer is sent after the commit (synchronous=FULL unless --sync normal).
- At least once, fenced: a job has one claim at a time; whoever names an older `attempt` gets 409 and changes nothing.
  Complete, fail and release that are sent again, since the answer was lost, get the same answer and count once.
- Enqueuing an `id` that exists, or a `key` pending or running in the queue, returns that job with "created": false.
- Within a queue: higher priority first, then the earliest due, then the oldest. A poll costs the same with any number.
- The n-th retry is due 5 * n^2 seconds after the failure. A lost worker (no sign of life within its lease) counts as a
  failure, but a job whose retries are used up still survives 3 losses. So a job that kills its worker ends, always.
- The lease is `timeout` + 5 s from the claim; a poll that names a `lease` must heartbeat within it. It runs on a clock
  that setting the system's clock does not touch; a restart keeps leases and gives those that are overdue one more, and
  time in which nobody could be heard (a full disk, a lock, a stopped process) costs none: it gets one more period.
- A job with `after` is handed out once all jobs that it names are done. It is cancelled when one fails, is cancelled or
  purged before that; with `after_any` it is handed out once all have ended. What a pending job waits for is kept.
- Each tick of a schedule makes one job, NAME@TIME, in the transaction that moves the schedule on; missed ticks make
  one, for the last of them. While its `key` is pending or running a tick makes none and counts in `skipped`. Cron has
  five fields (minute, hour, day of month, month, day of week: *, lists, ranges, /step, names), or @hourly, @daily,
  @weekly, @monthly, @yearly. Two restricted days: either suffices. A time that the zone's clock leaps over fires at the
  first minute after the leap, one that it shows twice the first time.

LIMITS
One engine per database, on a local disk; the file has one name. A body has at most 8 MiB, JSON at most 200 levels, an
integer 4,300 digits; the jobs of a body wait for at most 20,000 others. A poll claims at most 16 MiB of jobs (one at
least), and a page ends there. Requests that are not done with hold 64 MiB in all, answers that nobody takes too: above
that the newest large ones get 503. Done or cancelled jobs are kept for --keep (7d), failed for --keep-failed (30d).
A clock that is set back is followed slowly (1 ms a second) until a restart: run_at is early by what is left to follow.
"""

import argparse, base64, bisect, calendar, collections, contextlib, datetime, difflib, functools, gc, glob, hashlib
import hmac, http.client, http.server, ipaddress, itertools, json, operator, os, pathlib, random, re, selectors
import signal, socket, socketserver, sqlite3, ssl, sys, tempfile, threading, time, types, urllib.parse
from queue import Empty, SimpleQueue

# -- Settings ---------------------------------------------------------------------------------------------------------
VERSION, PORT = '1.0', 8181
DEFAULT_TIMEOUT, GRACE = 300, 5         # seconds a handler may take where nobody says; more, until its worker is lost
BACKOFF, MAX_LOSSES = 5, 3              # seconds, times retries squared; lost workers a job survives without retries
MAX_WAIT, MAX_BATCH, MAX_LIMIT = 60, 10000, 1000        # seconds of a long poll; jobs in a body; jobs in an answer
MAX_BODY, MAX_HEAD, MAX_HEADERS = 8 << 20, 32 << 10, 100    # bytes of a body, of a request's line and headers; of these
MAX_DEPTH, MAX_DIGITS = 200, 4300       # levels of JSON, digits of integers: newer Pythons refuse more, older are slow
MAX_ERROR = 64 << 10                    # characters of an error; the middle is cut out
MAX_ATTEMPTS, MAX_ATTEMPT_ERROR = 10, 4 << 10   # ended attempts that a job remembers, and characters of their errors
MAX_WORKERS, SHOWN = 1000, 100          # workers that are remembered; jobs that wait for a job and are named there
MAX_AFTER, MAX_NEEDED = 1000, 20000     # jobs that a job waits for, and that all jobs of a body do
IDLE, DEADLINE, LINGER = 120, 30, 5     # seconds of an idle connection; of a request or answer; after the last one
BIG_BODY, THREADS = 256 << 10, 4        # bytes of a body that a thread parses; threads for what takes long
CHUNK = SMALL = 64 << 10                # bytes that are received or read at a time; and for which there is always room
MAX_HELD = MAX_UNSENT = 64 << 20        # bytes of requests not done with, and of answers not taken, of all clients
MAX_ANSWER = 16 << 20                   # characters of the jobs that polls claim in a pass, and of a page
DRAIN = 4                               # seconds that requests in flight get when the engine stops
BUSY, RETRY = 5, 0.005                  # seconds to wait for another program's write lock, and between two tries
DEAF = 0.05                             # seconds in which no client could be heard that make the engine renew leases
TICK, LOOK = 1, 0.05                    # seconds between two looks at the clock, and at all connections' deadlines
TOGETHER = 64                           # rows a statement adds, a power of two; SQLite before 3.32 takes 999 values
STEP = 500                              # rows of a kind that a transaction of a long change or of overdue() takes
PRUNE, RECENT = 60, 600                 # seconds between rounds of retention; until an unused queue is forgotten
CHECKPOINT, CHECKED = 4000, 64 << 20    # pages in the log that start a checkpoint; bytes checked in full at the start
BUCKETS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800)  # seconds of a histogram
GROUPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)                                              # operations in a commit
COPY = '.backup-'                       # in the names of copies that are being made

# -- Lifecycle --------------------------------------------------------------------------------------------------------
TRANSITIONS = {     # from each of the first statuses, to one of the others
    'poll':      ('pending',                       'running'),
    'complete':  ('running',                       'done'),
    'fail':      ('running',                       'pending failed'),       # retries left; none left, or retry: false
    'lose':      ('running',                       'pending failed'),       # retries or losses left; none
    'heartbeat': ('running',                       'running'),
    'release':   ('running',                       'pending'),
    'cancel':    ('pending running',               'cancelled'),
    'retry':     ('failed cancelled',              'pending'),
    'purge':     ('pending done failed cancelled', ''),
}
SOURCES = {call: tuple(sources.split()) for call, (sources, _) in TRANSITIONS.items()}
STATUSES, ENDED = ('pending', 'running', 'done', 'failed', 'cancelled'), ('done', 'failed', 'cancelled')
EPOCH, MICROSECOND = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc), datetime.timedelta(microseconds=1)

class Clock:
    """Engine time, in microseconds since 1970: the wall clock while that behaves, never standing still or going back.
    It runs on the monotonic clock from where the wall clock stood at the start, is drawn towards the wall clock by a
    millisecond a second, and follows it at once only forward (a machine that slept, a clock that was set)."""
    def __init__(self, source=time):
        self.monotonic, self.wall, self.looked = source.monotonic, source.time, source.monotonic()
        self.offset = self.wall() - self.looked

    def now(self): return int((self.monotonic() + self.offset) * 1000000)

    def follow(self):
        """Draw near to the wall clock. Seconds that it is ahead by, where that is a leap and not a drift; else 0."""
        now = self.monotonic()
        step, self.looked = (now - self.looked) / 1000, now
        drift = self.wall() - now - self.offset
        if drift > 1:
            return drift
        self.offset += max(-step, min(step, drift))
        return 0

def micros(seconds): return round(seconds * 1000000)
def as_seconds(span): return span and (span / 1000000 if span % 1000000 else span // 1000000)
def rfc3339(moment): return None if moment is None else '%s.%06dZ' % (_date(moment // 1000000), moment % 1000000)

@functools.lru_cache(maxsize=4096)
def _date(second): return (EPOCH + datetime.timedelta(seconds=second)).isoformat()[:19]

# -- Errors -----------------------------------------------------------------------------------------------------------
class Refused(Exception):
    """A refusal, raised anywhere and answered in one place: a status, a sentence that names the field, headers."""
    headers = ()

    def __init__(self, sentence, **headers):
        super().__init__(sentence)
        self.headers = [*self.headers, *headers.items()]

class BadRequest(Refused):      status = 400    # the input is not what the call takes
class Unauthorized(Refused):    status, headers = 401, [('WWW-Authenticate', 'Bearer')]     # token missing or wrong
class Forbidden(Refused):       status = 403    # a page of another origin asks
class NotFound(Refused):        status = 404    # there is no such job or path
class NotAllowed(Refused):      status = 405    # the path is there, the method is not
class TooSlow(Refused):         status = 408    # the request did not arrive in time
class Stale(Refused):           status = 409    # the job is not, or no longer, in a state that allows the call
class LengthRequired(Refused):  status = 411    # the length of the body is not told beforehand
class TooLarge(Refused):        status = 413    # the body is longer than the engine takes
class NotJSON(Refused):         status = 415    # the body does not claim to be JSON
class Misdirected(Refused):     status = 421    # the Host is none of this engine's names
class HeadTooLarge(Refused):    status = 431    # the header section is larger than the engine takes
class Fault(Refused):           status = 500    # a mistake of the engine's own
class Unavailable(Refused):     status, headers = 503, [('Retry-After', '1')]   # storage, no room, stopping: try again
class Unusable(Refused):        status = 503    # the engine cannot start like this

# -- Fields -----------------------------------------------------------------------------------------------------------
UNPRINTABLE, SURROGATE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]'), re.compile('[\x00\ud800-\udfff]')
RFC3339 = re.compile(r'(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:[Zz]|([+-]\d\d:\d\d))', re.ASCII)
encode, escape = json.JSONEncoder(separators=(',', ':'), allow_nan=False).encode, json.encoder.encode_basestring_ascii

def json_text(value):
    """A JSON value as text; ValueError or RecursionError when it is too deep for some Python to read it back."""
    text = encode(value)
    if text.count('[') + text.count('{') > MAX_DEPTH:
        layer = [[value]]
        for _ in range(MAX_DEPTH + 1):      # to what is one level deeper
            inside = itertools.chain.from_iterable(v.values() if isinstance(v, dict) else v for v in layer)
            layer = [v for v in inside if isinstance(v, (dict, list))]
        if layer:
            raise ValueError
    return text

def parse_time(text):
    """RFC 3339 as microseconds since 1970; OverflowError beyond the years 1 to 9999, where its offset may lead."""
    day, clock, fraction, zone = RFC3339.fullmatch(text).groups('')
    at = datetime.datetime.fromisoformat(f'{day}T{clock}.{fraction[:6].ljust(6, "0")}{zone or "+00:00"}')
    return (at.astimezone(datetime.timezone.utc) - EPOCH) // MICROSECOND

def shorten(text, longest):
    half, cut = longest // 2, len(text) - longest // 2 * 2
    return text if len(text) <= longest else f'{text[:half]}\n[... {cut} characters ...]\n{text[-half:]}'

def shown(value):
    """A value as a sentence may hold it: one line, bounded."""
    return {dict: 'an object', list: 'a list'}.get(type(value)) or shorten(json.dumps(value), 60).replace('\n', ' ')

# rules of fields: what is allowed, whether a value is, and what the store takes for it
def as_is(value): return value
def whole(low, top): return f'a whole number from {low} to {top}', lambda v: type(v) is int and low <= v <= top, as_is
def duration(low, top): return (
    f'a number of seconds from {low} to {top}', lambda v: type(v) in (int, float) and low <= v <= top, micros)
def printable(longest): return (
    f'a string of 1 to {longest} characters without control characters',
    lambda v: type(v) is str and 0 < len(v) <= longest and not UNPRINTABLE.search(v), as_is)

NAME = printable(200)
IDS = (f'a list of 1 to {MAX_AFTER} ids of jobs', lambda v: type(v) is list and 0 < len(v) <= MAX_AFTER and
       all(map(NAME[1], v)), lambda v: list(dict.fromkeys(v)))
FIELDS = {
    **dict.fromkeys(('id', 'queue', 'tag', 'key', 'worker', 'after', 'needed_by', 'zone'), NAME),
    **dict.fromkeys(('payload', 'result', 'progress'), (
        f'JSON of finite numbers that is nested at most {MAX_DEPTH} levels', lambda v: True, json_text)),
    **dict.fromkeys(('retry', 'brief', 'busy', 'after_any'), ('true or false', lambda v: type(v) is bool, as_is)),
    'attempt': whole(0, 2**53), 'priority': whole(-2**31, 2**31 - 1), 'limit': whole(1, MAX_LIMIT),
    'max_retries': whole(0, 1000), 'hung': whole(0, 10**6), 'max_running': whole(1, 10**6), 'rate': whole(1, 10**6),
    'delay': duration(0, 3650 * 86400), 'every': duration(1, 3650 * 86400), 'per': duration(0.001, 366 * 86400),
    'lease': duration(0.1, 86400), 'timeout': duration(0, 7 * 86400), 'wait': duration(0, MAX_WAIT),
    'name': printable(150), 'status': ('one of ' + ', '.join(STATUSES), lambda v: v in STATUSES, as_is),
    'error': ('a string', lambda v: type(v) is str, lambda v: shorten(SURROGATE.sub('\ufffd', v), MAX_ERROR)),
    'cron': ('a string like "0 3 * * *" or "@daily"', lambda v: type(v) is str and len(v) <= 1000, as_is),
    'run_at': ('a time like 2030-01-31T12:00:00Z', lambda v: type(v) is str and RFC3339.fullmatch(v), parse_time),
    'jobs': ('at the top of the body', lambda v: False, as_is),
}
LIFTED = ('max_running', 'rate', 'per')     # by null; elsewhere null is as good as missing

def checked(path, body):
    """The fields of `body` as the store takes them. BadRequest names the field."""
    if type(body) is not dict:
        raise BadRequest('the body must be a JSON object, such as {"queue": "images"}')
    rules, ask = ROUTES[path].rules, {}
    for field, value in body.items():
        if field not in rules:
            near = difflib.get_close_matches(field[:200], rules, 1)
            hint = f'did you mean {near[0]}?' if near else f'it takes {", ".join(rules) or "no fields"}'
            raise BadRequest(f'{shown(field)} is not a field of this call: {hint}')
        if value is not None or field in LIFTED:
            ask[field] = None if value is None else fit(field, value, rules[field])
    for fields in ROUTES[path].required:
        if ask.keys().isdisjoint(fields):
            raise BadRequest(f'{" or ".join(fields)} is missing: {path} needs it')
    for one, other in (('run_at', 'delay'), ('cron', 'every'), ('every', 'zone')):
        if one in ask and other in ask:
            raise BadRequest(f'{one} and {other} exclude each other')
    return ask

def fit(field, value, rule):
    allowed, holds, store = rule
    try:        # a call of suppress() would take half as long again as all of this
        if holds(value):
            return store(value)
    except (ValueError, OverflowError, RecursionError):
        pass
    raise BadRequest(f'{field} must be {allowed}, not {shown(value)}')

def batch(path, body):
    """The checked fields of `body`, or of each item of {"jobs": [...]}; an item that is refused is its refusal."""
    if type(body) is not dict or 'jobs' not in body or 'jobs' not in ROUTES[path].rules:
        return checked(path, body)
    items, asks = body['jobs'], []
    if len(body) > 1:
        raise BadRequest('jobs stands alone: the other fields belong into its items')
    if type(items) is not list or not 0 < len(items) <= MAX_BATCH:
        raise BadRequest(f'jobs must be a list of 1 to {MAX_BATCH} objects, not {shown(items)}')
    for number, item in enumerate(items):
        try:
            asks.append(checked(path, item))
        except BadRequest as error:
            refused = BadRequest(f'jobs[{number}]: {error}')
            if path == '/enqueue':      # all or nothing
                raise refused from None
            refused.id = item['id'] if type(item) is dict and NAME[1](item.get('id')) else None
            asks.append(refused)
    return asks

def _integer(digits):
    if len(digits) > MAX_DIGITS:
        raise ValueError(f'an integer has more than {MAX_DIGITS} digits')
    return int(digits)

_decode, _decode_long = json.JSONDecoder().decode, json.JSONDecoder(parse_int=_integer).decode

def parsed(body):
    """The JSON value of a request's body; encode() refuses what is infinite in it."""
    try:
        return (_decode_long if len(body) > MAX_DIGITS else _decode)(body.decode('utf-8'))
    except (ValueError, RecursionError) as error:
        raise BadRequest(f'the body must be JSON in UTF-8: {shorten(str(error), 200)}') from None

# -- Cron -------------------------------------------------------------------------------------------------------------
CRON = (    # POSIX crontab, and what cron on Linux adds: field, lowest and highest number, names from the lowest on
    ('minute', 0, 59, ''), ('hour', 0, 23, ''), ('day of month', 1, 31, ''),
    ('month', 1, 12, 'jan feb mar apr may jun jul aug sep oct nov dec'),
    ('day of week', 0, 7, 'sun mon tue wed thu fri sat'))       # Sunday is 0 and 7
NICKNAMES = {'@hourly': '0 * * * *', '@daily': '0 0 * * *', '@weekly': '0 0 * * 0', '@monthly': '0 0 1 * *',
             '@yearly': '0 0 1 1 *'}
PART = re.compile('(?:[*]|([a-z0-9]+)-([a-z0-9]+))(?:/([0-9]{1,3}))?|([a-z0-9]+)')  # * or a range, in steps; or one
MINUTE, HOUR, DAY = datetime.timedelta(minutes=1), datetime.timedelta(hours=1), datetime.timedelta(days=1)

class Cron:
    """A cron expression and a zone; BadRequest where one is none. Its ticks are whole minutes of the zone's clock."""
    def __init__(self, expression, zone):
        parts = NICKNAMES.get(expression, expression).split()
        if len(parts) != 5:
            raise BadRequest(f'cron: {shown(expression)} has not five fields (minute, hour, day of month, month, '
                             f'day of week), nor is it one of {", ".join(NICKNAMES)}')
        self.minutes, self.hours, self.days, self.months, weekdays = map(values_of, parts, *zip(*CRON))
        self.weekdays = {day % 7 for day in weekdays}
        self.enough = all if parts[2].startswith('*') or parts[4].startswith('*') else any      # of the two days
        if self.enough is all and min(self.days) > max(calendar.monthrange(2000, month)[1] for month in self.months):
            raise BadRequest(f'cron: no month of {shown(parts[3])} has a day {min(self.days)}')
        self.zone = datetime.timezone.utc if zone == 'UTC' else zone_of(zone)

    def after(self, at):
        """The first tick after a moment of UTC."""
        local = at.astimezone(self.zone).replace(tzinfo=None, second=0, microsecond=0) + MINUTE
        while True:     # from the largest unit to the smallest, skip what does not fit
            if local.month not in self.months:
                local = (local.replace(day=28, hour=0, minute=0) + 4 * DAY).replace(day=1)
            elif not self.enough((local.day in self.days, local.isoweekday() % 7 in self.weekdays)):
                local = local.replace(hour=0, minute=0) + DAY
            elif local.hour not in self.hours:
                local = local.replace(minute=0) + HOUR
            elif local.minute not in self.minutes or self._shown(local) <= at:  # the clock shows it the second time
                local += MINUTE
            else:
                return self._shown(local)

    def _shown(self, local):
        """When the zone's clock shows that first; if it leaps over it, the first minute after the leap."""
        at = local.replace(tzinfo=self.zone).astimezone(datetime.timezone.utc)
        while (at - MINUTE).astimezone(self.zone).replace(tzinfo=None) >= local:    # only where the clock leaps
            at -= MINUTE
        return at

def values_of(text, name, low, high, names):
    """The numbers that a field of a cron expression names."""
    values, names = set(), names.split()
    for part in text.lower().split(','):
        try:
            first, last, step, one = PART.fullmatch(part).groups()
            start, end = (names.index(bound) + low if bound in names else int(bound)
                          for bound in (first or one or low, last or one or high))
            end = 7 if end == 0 < start and high == 7 else end      # fri-sun
            if not low <= start <= end <= high:
                raise ValueError
            values.update(range(start, end + 1, int(step or 1)))
        except (AttributeError, ValueError):
            raise BadRequest(f'cron: {name}: {part[:60]} is not {low}-{high}{" or " * bool(names)}{", ".join(names)}, '
                             '* or a range (both may have a /step), or a list of these') from None
    return values

def zone_of(name):
    try:
        import zoneinfo
        return zoneinfo.ZoneInfo(name)
    except (ImportError, KeyError, ValueError, OSError):
        raise BadRequest(f'zone: this machine does not know a zone {shown(name)} (Python 3.8: only UTC)') from None

cron_of = functools.lru_cache(maxsize=1024)(Cron)

def first_tick(schedule, now):
    """When the schedule fires first after `now`; times are microseconds since 1970, here and below."""
    if schedule['every']:
        return now // 1000000 * 1000000 + schedule['every']
    try:
        return (cron_of(schedule['cron'], schedule['zone']).after(EPOCH + now * MICROSECOND) - EPOCH) // MICROSECOND
    except OverflowError:
        raise BadRequest('cron: it does not fire before the year 10000') from None

def last_tick(schedule, now):
    """The last tick of a schedule that is due, and the one after it."""
    last, every, beyond = schedule['next_run_at'], schedule['every'], now
    if every:
        last += (now - last) // every * every
        return last, last + every
    while True:     # invariant: no tick lies in (beyond, now]; halve what is between `last` and `beyond`
        upcoming = first_tick(schedule, last)
        if upcoming > now:
            return last, upcoming
        middle = (upcoming + beyond) // 2
        tick = first_tick(schedule, middle)
        last, beyond = (tick, beyond) if tick <= now else (upcoming, middle)

# -- Database ---------------------------------------------------------------------------------------------------------
APPLICATION_ID = 0x52554e44     # "RUND", in the header of the file
SCHEMA_VERSION = 2
COUNTS = {**{status: f"status = '{status}'" for status in STATUSES},         # columns of queues, and the jobs that
          'scheduled': 'scheduled = 1', 'waiting': 'scheduled = 2'}         # each counts
MORE = ', '.join(f'{column} = {column} + (NEW.{jobs}) - (OLD.{jobs})' for column, jobs in COUNTS.items())
LESS = ', '.join(f'{column} = {column} - (OLD.{jobs})' for column, jobs in COUNTS.items())
SCHEMA = f'''
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY,                            -- the order of arrival
    id TEXT NOT NULL, queue TEXT NOT NULL, tag TEXT,
    payload TEXT,                                       -- JSON, as are progress, result, attempts and after
    status TEXT NOT NULL DEFAULT 'pending',
    scheduled INTEGER NOT NULL DEFAULT 0,               -- of pending ones: 0 due, 1 not due yet, 2 waits for other jobs
    priority INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL DEFAULT 0,    -- attempt: how many claims
    retries INTEGER NOT NULL DEFAULT 0, losses INTEGER NOT NULL DEFAULT 0,      -- failures and losses; losses alone
    max_retries INTEGER, worker_max_retries INTEGER,    -- its own; of the last claim, where it has none of its own
    timeout INTEGER, worker_timeout INTEGER,            -- the same, in microseconds
    lease INTEGER,                                      -- microseconds; null: the timeout and the grace
    lease_until INTEGER,                                -- times are microseconds since 1970
    key TEXT, worker TEXT, progress TEXT, result TEXT, error TEXT,
    attempts TEXT,                                      -- those that did not end in done
    created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, next_run_at INTEGER NOT NULL,
    started_at INTEGER, finished_at INTEGER,
    after TEXT,                                         -- the ids of the jobs that it waits for; null: none
    after_any INTEGER NOT NULL DEFAULT 0,               -- 1: however they end
    waits_for INTEGER NOT NULL DEFAULT 0                -- how many of them have not ended
);
CREATE TABLE IF NOT EXISTS queues (
    queue TEXT PRIMARY KEY, paused INTEGER NOT NULL DEFAULT 0,
    polled_at INTEGER,                                  -- give or take PRUNE seconds; null: never polled
    pending INTEGER NOT NULL DEFAULT 0,                 -- this and the next six count jobs, by the triggers below
    scheduled INTEGER NOT NULL DEFAULT 0, running INTEGER NOT NULL DEFAULT 0, done INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, cancelled INTEGER NOT NULL DEFAULT 0, waiting INTEGER NOT NULL DEFAULT 0,
    max_running INTEGER, rate INTEGER, per INTEGER,     -- `rate` claims at once, then one each per / rate microseconds
    full_at INTEGER NOT NULL DEFAULT 0                  -- when the token bucket of the rate is full again
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS needs (
    job INTEGER NOT NULL, place INTEGER NOT NULL,       -- seq of a job with `after`, place in it,
    needed INTEGER NOT NULL,                            -- seq of the job that is named there
    state INTEGER NOT NULL,                             -- as `job` was told: 0 not ended, 1 done, 2 otherwise
    PRIMARY KEY (job, place)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ended (                      -- jobs that ended; not all that wait for them have been told
    job INTEGER PRIMARY KEY,                            -- seq
    id TEXT NOT NULL, outcome TEXT NOT NULL             -- a status, or purged
);
CREATE TABLE IF NOT EXISTS schedules (
    name TEXT PRIMARY KEY, queue TEXT NOT NULL,         -- and what else its jobs get:
    payload TEXT, timeout INTEGER, max_retries INTEGER, tag TEXT, priority INTEGER, key TEXT,
    cron TEXT, every INTEGER, zone TEXT,                -- every: microseconds
    next_run_at INTEGER NOT NULL, last_run_at INTEGER, last_id TEXT, skipped INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS jobs_id ON jobs (id);
CREATE INDEX IF NOT EXISTS jobs_claim ON jobs (queue, priority DESC, next_run_at)           -- poll
    WHERE status = 'pending' AND scheduled = 0;
CREATE INDEX IF NOT EXISTS jobs_due ON jobs (next_run_at)                                   -- promotion of what is due
    WHERE status = 'pending' AND scheduled = 1;
CREATE INDEX IF NOT EXISTS jobs_lease ON jobs (lease_until) WHERE status = 'running';       -- the staleness checker
CREATE UNIQUE INDEX IF NOT EXISTS jobs_key ON jobs (queue, key)                             -- enqueue with a key
    WHERE key IS NOT NULL AND status IN ('pending', 'running');
CREATE INDEX IF NOT EXISTS jobs_tag ON jobs (tag) WHERE tag IS NOT NULL;                    -- details, jobs
CREATE INDEX IF NOT EXISTS jobs_finished ON jobs (status, finished_at) WHERE finished_at IS NOT NULL;   -- retention
CREATE INDEX IF NOT EXISTS needs_needed ON needs (needed, state);                           -- the end of a job
CREATE INDEX IF NOT EXISTS schedules_due ON schedules (next_run_at);
CREATE TRIGGER jobs_insert AFTER INSERT ON jobs BEGIN
    INSERT INTO queues (queue, pending, scheduled, waiting) VALUES (NEW.queue, 1, NEW.scheduled = 1, NEW.scheduled = 2)
    ON CONFLICT (queue) DO UPDATE
    SET pending = pending + 1, scheduled = scheduled + excluded.scheduled, waiting = waiting + excluded.waiting; END;
CREATE TRIGGER jobs_update AFTER UPDATE OF status, scheduled ON jobs BEGIN
    UPDATE queues SET {MORE} WHERE queue = NEW.queue; END;
CREATE TRIGGER jobs_delete AFTER DELETE ON jobs BEGIN
    UPDATE queues SET {LESS} WHERE queue = OLD.queue; END;
CREATE TRIGGER jobs_forget AFTER DELETE ON jobs WHEN OLD.after IS NOT NULL BEGIN
    DELETE FROM needs WHERE job = OLD.seq; END;
'''

def columns_of(table):
    """The definitions of its columns by their names, in their order."""
    text = re.sub('--.*', '', SCHEMA).partition(f'EXISTS {table} (')[2].partition('\n)')[0]
    return {column.split()[0]: column.strip() for column in text.split(',')}

def of_storage(error):
    """Is it the storage's, and no mistake of the engine's own?"""
    mistakes = sqlite3.ProgrammingError, sqlite3.IntegrityError
    return isinstance(error, (sqlite3.Error, OSError)) and not isinstance(error, mistakes)

class Busy(Unavailable):
    """Another program holds the write lock: nothing was begun."""

def lock(path):
    """The open, locked file PATH.lock. Not the database: closing a second handle of that drops SQLite's locks on it."""
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
        raise Unusable(f'{path} is in use by another engine') from None
    return file

def examine(path):
    """Refuse a file that is no database of ours, by its header so that it is not touched; create a missing one."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_BINARY', 0), 0o600), 'rb') as file:
        header, names = file.read(100), os.fstat(file.fileno()).st_nlink
    if names > 1:       # each name would have a lock and a write-ahead log of its own
        raise Unusable(f'{path} has {names} names (hard links); an engine takes a database that has one')
    journal = path + '-journal'
    if header and not (os.path.exists(journal) and os.path.getsize(journal)):   # else SQLite ends what broke off
        version, application = (int.from_bytes(header[at:at + 4], 'big') for at in (60, 68))
        if header[:16] != b'SQLite format 3\0' or application != APPLICATION_ID:
            raise Unusable(f'{path} is not a Rundown database; it was left as it is')
        if version > SCHEMA_VERSION:
            raise Unusable(f'{path} was written by a newer engine (schema {version}, this one knows {SCHEMA_VERSION}); '
                           'it was left as it is')
    with contextlib.suppress(PermissionError):
        os.chmod(path, 0o600)

class Database:
    """The file: whose it is, the connection that writes, those that read, copies of it."""

    def __init__(self, path, sync):
        self.path, self.sync = os.path.realpath(path), sync     # constant after start, as are lock_file and files
        self.lock_file = self.files = None      # what tells that the files under the path are ours, see _check_files()
        # safe without a lock: connections that read, and those that no thread uses at the moment
        self.readers = []
        self.idle_readers = []
        self.copying = threading.Lock()         # held while a copy is made: one at a time
        self.db = None                          # the writer's, as is the rest: its connection
        self.trouble = None                     # what the last commit failed of
        self.unsynced = False                   # the log may hold a commit that did not reach the disk

    def open(self):
        """Take the file and make or check what is in it; Unusable with a sentence where that cannot be."""
        try:
            self.lock_file = lock(self.path)
            examine(self.path)
            self._remove_copies()
            self.db = self._connect(BUSY)
            with self.transaction():
                self._create()
            self.db.execute('PRAGMA journal_mode = WAL')
            if os.path.getsize(self.path) <= CHECKED and self.db.execute('PRAGMA quick_check(1)').fetchone()[0] != 'ok':
                raise Unusable(f'{self.path} is damaged; restore a backup')
            self.db.execute('PRAGMA busy_timeout = 0')      # from now on the loop waits, not SQLite
            with self.reading() as db:  # one reader stays, so that the log outlives the writer
                db.execute('SELECT 1 FROM jobs').fetchone()
            inodes = [os.stat(self.path + suffix).st_ino for suffix in ('', '-wal')]
            self.files = [*inodes, os.fstat(self.lock_file.fileno()).st_ino]
            self._check_files()
        except BaseException as error:
            self.close()
            if not isinstance(error, (sqlite3.Error, OSError, Unavailable)):
                raise
            reason = getattr(error, 'strerror', None) or error.__cause__ or error
            raise Unusable(f'{self.path} cannot be used: {reason}') from None

    def _create(self):
        """Make what is not there yet: all, or what version 1 did not know."""
        version, application, tables = (self.db.execute(ask).fetchone()[0] for ask in (
            'PRAGMA user_version', 'PRAGMA application_id', 'SELECT COUNT(*) FROM sqlite_master'))
        if tables and application != APPLICATION_ID:        # examine() does not look beside a journal
            raise Unusable(f'{self.path} is not a Rundown database; it was left as it is')
        if version == SCHEMA_VERSION:
            return
        for table in ('jobs', 'queues'):
            known = {row['name'] for row in self.db.execute(f'PRAGMA table_info({table})')}
            for column, definition in columns_of(table).items():
                if known and column not in known:
                    self.db.execute(f'ALTER TABLE {table} ADD COLUMN {definition}')
        for trigger in ('jobs_insert', 'jobs_update', 'jobs_delete'):       # they counted less
            self.db.execute(f'DROP TRIGGER IF EXISTS {trigger}')
        for statement in re.split('(?m)^(?=CREATE)', SCHEMA)[1:]:
            self.db.execute(statement)
        self.db.execute(f'PRAGMA application_id = {APPLICATION_ID}')
        self.db.execute(f'PRAGMA user_version = {SCHEMA_VERSION}')

    def _connect(self, patience, *pragmas):
        """A connection to the file: the one that writes, unless `pragmas` say otherwise."""
        db = sqlite3.connect(pathlib.Path(self.path).as_uri() + '?mode=rw', uri=True, timeout=patience,
                             isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        writes = f'synchronous = {self.sync}', f'wal_autocheckpoint = {CHECKPOINT}', 'cache_size = -16384'
        for pragma in pragmas or writes:
            db.execute('PRAGMA ' + pragma)
        return db

    @contextlib.contextmanager
    def transaction(self):
        """The one place where the database is changed. Busy: nothing was. Unavailable: perhaps it was."""
        begun = False
        try:
            if self.trouble:
                self._check_files()
            if self.db is None:
                self._reconnect()
            self.db.execute('BEGIN IMMEDIATE')
            begun = True
            yield self.db
            self.db.execute('COMMIT')
            self._check_files()
        except BaseException as error:
            if self.db and self.db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    self.db.execute('ROLLBACK')
            if not of_storage(error):
                raise
            sentence = f'the database could not be written ({error})'
            if self.db and not begun and 'locked' in str(error):
                raise Busy(f'{sentence}; nothing was changed, try again') from error
            if self.db:     # after an I/O error only a fresh connection knows what is on disk
                self.db.close()
                self.db = None
            self.unsynced = self.unsynced or 'I/O' in str(error)
            raise Unavailable(f'{sentence}; whether it was done is not known, send it again') from error

    def _reconnect(self):
        """The log may hold a commit that was never synced; it is, before a replay of it is acknowledged."""
        db = self._connect(0)
        if self.unsynced and db.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchone()[0]:
            db.close()
            raise sqlite3.OperationalError('the write-ahead log is locked')
        self.db, self.unsynced = db, False

    def _check_files(self):
        """Unavailable where database, log or lock file was replaced: commits would go to a deleted file."""
        found = None
        with contextlib.suppress(FileNotFoundError):
            found = [os.stat(self.path + suffix).st_ino for suffix in ('', '-wal', '.lock')]
        if self.files and found != self.files:
            raise Unavailable(f'the database {self.path} or its lock file was deleted or replaced while in use; '
                              'restart the engine')

    @contextlib.contextmanager
    def reading(self):
        """A connection that reads what is committed and never waits for the writer.

        Threads come and go, so that connections are pooled: no more are open than were in use at
        a time.
        """
        try:
            db = self.idle_readers.pop()
        except IndexError:
            db = None
        try:
            if db is None:
                db = self._connect(BUSY, 'query_only = ON')
                self.readers.append(db)
            yield db
        except sqlite3.Error as error:
            raise Unavailable(f'the database could not be read ({error}); try again') from error
        finally:
            if db is not None:
                self.idle_readers.append(db)

    def backup(self):
        """An open file, gone when it is closed: a consistent copy of the database, made beside the load."""
        if not self.copying.acquire(blocking=False):
            raise Unavailable('another copy is being made; try again when it is done')
        try:
            folder, name = os.path.split(self.path)
            handle, name = tempfile.mkstemp(prefix=name + COPY, dir=folder)
            os.close(handle)
            try:
                with self.reading() as db, contextlib.closing(sqlite3.connect(name)) as copy:
                    db.backup(copy)
                return open(name, 'rb', opener=lambda path, flags: os.open(path, flags | getattr(os, 'O_TEMPORARY', 0)))
            finally:
                with contextlib.suppress(PermissionError, FileNotFoundError):   # Windows removes it when it is closed
                    os.unlink(name)
        except OSError as error:
            raise Unavailable(f'the copy could not be written: {error.strerror}') from None
        finally:
            self.copying.release()

    def _remove_copies(self):
        """What a copy that was cut off has left behind."""
        for left in glob.glob(glob.escape(self.path + COPY) + '*'):
            with contextlib.suppress(OSError):
                os.unlink(left)

    def close(self):
        """Leave the file in order. Nobody writes any more."""
        for db in filter(None, [self.db, *self.readers]):
            db.close()
        if self.files:
            self._remove_copies()
        if self.lock_file:
            self.lock_file.close()

# -- Store ------------------------------------------------------------------------------------------------------------
COLUMNS = list(columns_of('jobs'))
BRIEF = ', '.join(column for column in COLUMNS if column not in ('payload', 'result', 'attempts', 'after'))
BLANK = dict(dict.fromkeys(COLUMNS), status='pending', attempt=0, retries=0, priority=0)
ADDED = ('id', 'queue', 'tag', 'payload', 'scheduled', 'priority', 'max_retries', 'timeout', 'key', 'created_at',
         'updated_at', 'next_run_at')       # the columns of a new job that are not as SCHEMA has them
added_values = operator.itemgetter(*ADDED)
VALUES = f'({", ".join("?" * len(ADDED))})'
INSERT = {2 ** n: f'INSERT INTO jobs ({", ".join(ADDED)}) VALUES {", ".join([VALUES] * 2 ** n)}'
          for n in range(TOGETHER.bit_length())}        # by the number of rows
CLAIMABLE = "FROM jobs WHERE queue = :queue AND status = 'pending' AND scheduled = 0"
CLAIM = f"""
    SELECT * {CLAIMABLE} AND NOT EXISTS (SELECT 1 FROM queues WHERE queue = :queue AND paused)
    ORDER BY priority DESC, next_run_at, seq LIMIT :limit"""
FIND = """
    SELECT seq, id, queue, status, attempt, retries, losses, max_retries, worker_max_retries, timeout, worker_timeout,
        lease, lease_until, worker, attempts, next_run_at, started_at, scheduled, after_any, waits_for
    FROM jobs WHERE """     # all that an outcome needs; no payload, result, error or progress, which may be large
BY_ID, BY_SEQ, QUEUE = FIND + 'id = ?', FIND + 'seq = ?', 'SELECT * FROM queues WHERE queue = ?'
LOST = FIND + "status = 'running' AND lease_until <= ? ORDER BY lease_until LIMIT ?"
TELL = 'UPDATE needs SET state = ? WHERE job = ? AND place = ?'
TICKS = 'SELECT * FROM schedules WHERE next_run_at <= ? ORDER BY next_run_at LIMIT ?'
LEASE = 'COALESCE(lease, COALESCE(NULLIF(timeout, 0), NULLIF(worker_timeout, 0), :timeout) + :grace)'
RENEW = f"""
    UPDATE jobs SET started_at = MIN(started_at, :now), lease_until =
        CASE WHEN lease_until <= :now THEN :now + MAX(:grace, COALESCE(lease, 0))
             ELSE MIN(MAX(lease_until, :now + :grace), :now + MAX(:grace, {LEASE})) END
    WHERE status = 'running' AND {LEASE} < 2 * :pause"""
SHIFTS = ("UPDATE jobs SET lease_until = lease_until + :by, started_at = started_at + :by WHERE status = 'running'",
          "UPDATE jobs SET next_run_at = next_run_at + :by WHERE status = 'pending' AND scheduled = 1 AND attempt > 0",
          'UPDATE queues SET full_at = full_at + :by WHERE rate')
NEXT = """
    SELECT MIN(at) FROM (SELECT MIN(next_run_at) AS at FROM jobs WHERE status = 'pending' AND scheduled = 1
        UNION ALL SELECT MIN(lease_until) FROM jobs WHERE status = 'running'
        UNION ALL SELECT MIN(next_run_at) FROM schedules
        UNION ALL SELECT MIN(1) FROM ended UNION ALL SELECT ?)"""       # 1: long ago
OLDEST = f"""
    WITH RECURSIVE levels (priority) AS (SELECT MAX(priority) {CLAIMABLE}   -- each by the index, from the highest on
        UNION ALL SELECT (SELECT MAX(priority) {CLAIMABLE} AND priority < levels.priority) FROM levels
        WHERE priority IS NOT NULL LIMIT 100)
    SELECT MIN((SELECT MIN(next_run_at) {CLAIMABLE} AND priority = levels.priority)) FROM levels"""
AHEAD = f"""
    SELECT COUNT(*) FROM (SELECT 1 {CLAIMABLE} AND priority > :priority
        UNION ALL SELECT 1 {CLAIMABLE} AND priority = :priority
        AND next_run_at <= :next_run_at AND (next_run_at, seq) < (:next_run_at, :seq) LIMIT 1000)"""
FILTERS = {     # `after`, `last`, `needed_by` and `beyond` are each the seq of a job
    'queue': 'queue = :queue', 'tag': 'tag = :tag', 'after': 'seq < :after', 'last': 'seq > :last',
    'status': '+status = :status',      # the plus: in the order of seq, not by the index on finished_at
    'needed_by': 'job = :needed_by',
    'beyond': 'place > (SELECT place FROM needs WHERE job = :needed_by AND needed = :beyond)'}
FOR_JOBS = ('queue', 'payload', 'timeout', 'max_retries', 'tag', 'priority', 'key')     # what a schedule gives its jobs
DEFINED = ('name', *FOR_JOBS, 'cron', 'every', 'zone')                                  # what makes it another one
SCHEDULED = list(columns_of('schedules'))
WAITS = 2       # a job's `scheduled` while it waits for others
STATES = {'done': 1, 'failed': 2, 'cancelled': 2, 'purged': 2}      # of what a job waits for; 0: not ended
ENDS = {'complete': 'done', 'fail': 'failed', 'release': 'released'}        # how an attempt ends by a call

def quoted(text):
    return 'null' if text is None else escape(text)

@functools.lru_cache(maxsize=1024)
def json_time(moment):
    return 'null' if moment is None else f'"{rfc3339(moment)}"'

def as_json(row, more='', brief=False):
    """The job of a row as clients see it, as JSON text, with `more` at its end. Its values are JSON text already."""
    payload, result, error = '', '', row['error']
    if brief:
        error = error and error.strip().rpartition('\n')[2]
        more = f',"waits_for":{row["waits_for"]}{more}' if row['waits_for'] else more
    else:
        payload, result = f'"payload":{row["payload"] or "null"},', f'"result":{row["result"] or "null"},'
        more = f',"after":{row["after"]},"waits_for":{row["waits_for"]}{more}' if row['after'] else more
    known = row['max_retries'] is not None or row['attempt']        # else no worker has said yet
    return (
        f'{{"id":{quoted(row["id"])},"queue":{quoted(row["queue"])},"tag":{quoted(row["tag"])},'
        f'{payload}"status":"{row["status"]}","priority":{row["priority"]},"attempt":{row["attempt"]},'
        f'"retries":{row["retries"]},"max_retries":{max_retries_of(row) if known else "null"},'
        f'"timeout":{as_seconds(timeout_of(row))},"key":{quoted(row["key"])},"worker":{quoted(row["worker"])},'
        f'"progress":{row["progress"] or "null"},{result}"error":{quoted(error)},'
        f'"created_at":{json_time(row["created_at"])},"updated_at":{json_time(row["updated_at"])},'
        f'"next_run_at":{json_time(row["next_run_at"])},"started_at":{json_time(row["started_at"])},'
        f'"finished_at":{json_time(row["finished_at"])}{more}}}')

def as_schedule(row, **more):
    """A schedule as clients see it, as JSON text; its payload is JSON text already."""
    fields = {field: row[field] for field in SCHEDULED if field != 'payload'}
    fields.update({field: as_seconds(fields[field]) for field in ('every', 'timeout')})
    fields.update({field: rfc3339(fields[field]) for field in ('next_run_at', 'last_run_at')})
    return f'{encode({**fields, **more})[:-1]},"payload":{row["payload"] or "null"}}}'

def as_list(texts):
    return '[' + ','.join(texts) + ']'

def as_page(name, key, rows, render, limit):
    """A page as JSON text; `after` is null on the last one. One that grows large ends early."""
    texts, room, last = [], MAX_ANSWER, None
    for row in rows:
        text = render(row)
        room -= len(text)
        if room < 0 and texts:
            break
        texts.append(text)
        last = row[key]
    after = last if room < 0 or len(texts) == limit else None
    return f'{{"{name}":{as_list(texts)},"after":{quoted(after)}}}'

def timeout_of(row):
    """Microseconds; 0 and null are no say. The job's own, that of the worker, the default."""
    return row['timeout'] or row['worker_timeout'] or DEFAULT_TIMEOUT * 1000000

def max_retries_of(row):
    own = row['max_retries']
    return own if own is not None else row['worker_max_retries'] or 0

def existing(row, otherwise, name, kind=NotFound):
    if row is None:
        raise kind(f'{otherwise} {shown(name)}')
    return row

def history(row, outcome, finished_at, error=None):
    """The last attempts of a job as JSON: those that were recorded when they ended, and the one with this outcome."""
    attempt = {'attempt': row['attempt'], 'worker': row['worker'], 'outcome': outcome,
               'started_at': rfc3339(row['started_at']), 'finished_at': rfc3339(finished_at),
               'error': error and shorten(error, MAX_ATTEMPT_ERROR)}
    return encode((json.loads(row['attempts'] or '[]') + [attempt])[-MAX_ATTEMPTS:])

def where(ask):
    found = [clause for field, clause in FILTERS.items() if field in ask]
    return 'WHERE ' + ' AND '.join(found) if found else ''

@functools.lru_cache(maxsize=64)
def changing(columns, of_queue=False):
    """The statement that changes these columns of a job, or of a queue, which it may be the first to name."""
    changes = ', '.join(f'{column} = :{column}' for column in columns)
    return f'UPDATE jobs SET {changes} WHERE seq = :seq' if not of_queue else (
        f'INSERT INTO queues (queue, {", ".join(columns)}) VALUES (:queue, :{", :".join(columns)}) '
        f'ON CONFLICT (queue) DO UPDATE SET {changes}')

# The random part of this process's ids: of their third group, and of the last two, where the variant is on top.
SERIES, SERIAL = random.getrandbits(12), itertools.count(8 << 60 | random.getrandbits(61))

def new_id(now):
    """A UUID of version 7 (RFC 9562), each greater than the one before, so that its index grows at its end alone."""
    stamp, number = now // 1000, next(SERIAL)
    return f'{stamp >> 16:08x}-{stamp & 0xffff:04x}-7{SERIES:03x}-{number >> 48:04x}-{number & 0xffffffffffff:012x}'

def size_of(row):
    """Characters of a job that may be many."""
    return sum(len(row[field] or '') for field in ('payload', 'result', 'error', 'progress', 'after')) + 500

def full_at(queue, now):
    """When the bucket is full again. Each claim puts that off by per / rate (the generic cell rate algorithm, GCRA)."""
    return min(max(queue['full_at'], now), now + queue['per'])      # at most: a clock set back leaves full_at far ahead

def tokens(queue, now):
    return (now + queue['per'] - full_at(queue, now)) * queue['rate'] // queue['per']

def next_token(queue, now):
    """When there is one in an empty bucket."""
    return full_at(queue, now) - queue['per'] - -queue['per'] // queue['rate']

@functools.lru_cache(maxsize=1024)
def nobody(queue, polled):
    """That no worker polls the queue, with the name that is meant perhaps. Short names alone: it takes time."""
    names = [name for name in polled if abs(len(name) - len(queue)) < 4 and len(name) <= 40]
    near = difflib.get_close_matches(queue, names, 1)
    hint = f'; did you mean {shown(near[0])}?' if near else ''
    return f'no worker has ever polled the queue {shown(queue)}{hint}'

class Meter:
    """Counts since the start: totals, histograms, the last hour by the minute. Written after each commit."""

    def __init__(self):
        self.lock = threading.Lock()                        # guards all of it
        self.totals = collections.Counter()                 # (event, queue) -> n
        self.seconds = {}                                   # (event, queue) -> [n per bucket ..., beyond, sum]
        self.groups = [0] * (len(GROUPS) + 2)               # the same of operations in a commit
        self.minutes = collections.defaultdict(collections.Counter)     # minute -> (event, queue) -> n
        self.requests = collections.Counter()               # (route, status) -> n

    def record(self, now, noted, group):
        with self.lock:
            observe(self.groups, GROUPS, group)
            minute = self.minutes[now // 60000000]
            for event, queue, took in noted:
                self.totals[event, queue] += 1
                minute[event, queue] += 1
                if took is not None:
                    histogram = self.seconds.setdefault((event, queue), [0] * (len(BUCKETS) + 2))
                    observe(histogram, BUCKETS, max(0, took) / 1000000)
            if len(self.minutes) > 60:
                del self.minutes[min(self.minutes)]

    def request(self, route, status):
        with self.lock:
            self.requests[route, status] += 1

    def forget(self, queue):
        """Count what is known of the queue to that of all others, so that the sums stay."""
        with self.lock:
            for event in {event for event, _ in self.totals}:
                self.totals[event, '(others)'] += self.totals.pop((event, queue), 0)
                self.seconds.pop((event, queue), None)

    def last_hour(self, now, queue):
        """Per event 60 counts, the last one of the current minute."""
        with self.lock:
            hour = [self.minutes.get(now // 60000000 - ago, {}) for ago in range(59, -1, -1)]
            return {name: [sum(minute.get((event, queue), 0) for event in events) for minute in hour]
                    for name, *events in (('enqueued',) * 2, ('done', 'completed'), ('failed', 'failed', 'lost'))}

def observe(histogram, buckets, value):
    histogram[bisect.bisect_left(buckets, value)] += 1
    histogram[-1] += value

class Store:
    """The jobs of one database: a method a call. Those that change something run in a transaction of the loop's."""

    def __init__(self, database, clock=time, keep=0, keep_failed=0):
        self.database, self.clock = database, Clock(clock)      # constant after start:
        self.keep = {'done': keep, 'cancelled': keep, 'failed': keep_failed}    # microseconds; 0: for ever
        self.meter = Meter()
        # from here on only the loop writes; threads read `workers` and `polled`, each by one copy of all of it
        self.workers = collections.OrderedDict()                # (worker, queue) -> (seen at, hung)
        with database.reading() as db:
            queues = db.execute('SELECT * FROM queues').fetchall()
        self.polled = {row['queue']: row['polled_at'] for row in queues if row['polled_at'] is not None}
        self.limited = {row['queue'] for row in queues if row['max_running'] or row['rate']}    # or once had one
        self.next_due = self.next_prune = 0                     # when overdue() has something to do, or to prune
        self.hungry = set()         # queues whose polls got nothing for want of room or of a token: woken by overdue()
        self.begin(None)

    def begin(self, db, room=MAX_ANSWER):
        self.db, self.now = db, self.clock.now()                # of a transaction: its connection, engine time,
        self.room = room                                        # characters of jobs that polls may claim,
        self.noted, self.said = [], []                          # what the meter and the log get after the commit,
        self.woken, self.fed = set(), set()     # topics whose sleepers may find something; queues not hungry any more

    def committed(self, group):
        self.hungry -= self.fed
        self.meter.record(self.now, self.noted, group)
        for sentence in self.said:
            log(sentence)

    def _one(self, statement, *values):
        return self.db.execute(statement, values).fetchone()

    def _change(self, seq, **columns):
        self.db.execute(changing(tuple(columns)), dict(columns, seq=seq))

    def _set(self, queue, **columns):
        self.db.execute(changing(tuple(columns), True), dict(columns, queue=queue))

    # calls: producers

    def enqueue(self, asks):
        """Add the jobs, all or none. Of each (row, created): the new job, or the one that has its `id` or `key`."""
        if len(asks) > 1 and sum(len(ask['after']) for ask in asks if 'after' in ask) > MAX_NEEDED:
            raise TooLarge(f'jobs: their `after` names more than {MAX_NEEDED} jobs in all; send fewer at a time')
        jobs, size, rows = [], 0, [self._new(ask) for ask in asks]
        while rows:
            count = min(TOGETHER, 1 << len(rows).bit_length() - 1)      # a power of two: INSERT has few statements
            jobs += self._add(rows[:count])
            del rows[:count]
            size += sum(0 if created else size_of(row) for row, created in jobs[-count:])
            if size > MAX_UNSENT:
                raise TooLarge('jobs: those that exist already are too large for one answer; send fewer at a time')
        return jobs

    def _new(self, ask):
        now = self.now
        due = ask['run_at'] if 'run_at' in ask else now + ask.get('delay', 0)
        return {**BLANK, **ask, 'id': ask.get('id') or new_id(now), 'created_at': now, 'updated_at': now,
                'next_run_at': due, 'scheduled': due > now}

    def _add(self, rows):
        """Insert them in one statement, in half the time that one each takes; one by one if that cannot be."""
        if not any(row['after'] for row in rows):
            with contextlib.suppress(sqlite3.IntegrityError):       # one is there already
                self.db.execute(INSERT[len(rows)], [*itertools.chain(*map(added_values, rows))])
                for row in rows:
                    self._pending(row['queue'], row['next_run_at'])
                    self.noted.append(('enqueued', row['queue'], None))
                return [(row, True) for row in rows]
        if len(rows) > 1:
            return [self._add([row])[0] for row in rows]
        row, = rows
        same = self._one('SELECT * FROM jobs WHERE id = ?', row['id']) or self._one(
            "SELECT * FROM jobs WHERE queue = ? AND key = ? AND status IN ('pending', 'running')",
            row['queue'], row['key'])
        return [(same, False) if same else (self._add_after(row), True)]

    def announced(self, jobs):
        """The JSON texts of jobs that enqueue() gave, with a warning where nobody polls their queue."""
        texts, first = [], jobs[0][0]['queue']
        names = () if first in self.polled else tuple(self.polled)[-20:]        # to compare takes time: for one queue
        for row, created in jobs:
            more = ',"created":true' if created else ',"created":false'
            if created and row['queue'] not in self.polled:
                more += ',"warning":' + quoted(nobody(row['queue'], names if row['queue'] == first else ()))
            texts.append(as_json(row, more))
        return texts

    def _pending(self, queue, due):
        """A job of the queue is pending: wake a poll for it, now or when it is due."""
        if due <= self.now:
            self.woken.add(('queue', queue))
        else:
            self._due(due)

    def _due(self, at):
        self.next_due = min(self.next_due, at)

    # calls: workers

    def poll(self, ask):
        """Claim jobs: the rows as they are then, no more than may be answered in this pass but one at least."""
        queue, worker = ask['queue'], ask.get('worker')
        before, self.polled[queue], span = self.polled.get(queue, 0), self.now, PRUNE * 1000000
        if before // span != self.now // span:      # stored once in PRUNE seconds; self.polled is exact
            self._set(queue, polled_at=self.now)
        if worker:
            self._seen(worker, queue, ask.get('hung', 0))
        self.fed.add(queue)
        if self.room <= 0:      # enough is being handed out; those that sleep are woken when there is room
            self._starve(queue, self.now + micros(RETRY))
            if not ask.get('wait'):
                raise Unavailable('too much is being handed out at a time; try again')
            return []
        limits = self._one(QUEUE, queue) if queue in self.limited else None
        most = min(ask.get('limit', 1), self._allowed(limits) if limits else MAX_LIMIT)
        changes = {'status': 'running', 'worker': worker, 'lease': ask.get('lease'), 'started_at': self.now,
                   'updated_at': self.now, 'worker_timeout': ask.get('timeout'),
                   'worker_max_retries': ask.get('max_retries')}
        claims = self._claim(self.db.execute(CLAIM, {'queue': queue, 'limit': most}), changes)
        self.db.executemany(changing((*changes, 'attempt', 'lease_until')), claims)
        if claims and limits and limits['rate']:
            taken = -(-len(claims) * limits['per'] // limits['rate'])       # rounded up
            self._set(queue, full_at=full_at(limits, self.now) + taken)
        return claims

    def _claim(self, rows, changes):
        """The rows as they are once claimed, as many as there is room for."""
        claims = []
        for row in rows:
            size = size_of(row)
            if claims and size > self.room:
                break
            self.room -= size
            claim = dict(zip(COLUMNS, row))
            claim.update(changes, attempt=row['attempt'] + 1)
            last = self.now + timeout_of(claim) + micros(GRACE)
            claim['lease_until'] = min(last, self.now + claim['lease']) if claim['lease'] else last
            self._due(claim['lease_until'])
            self.noted.append(('started', claim['queue'], self.now - claim['next_run_at']))
            claims.append(claim)
        return claims

    def _seen(self, worker, queue, hung=None):
        before = self.workers.pop((worker, queue), (0, 0))
        self.workers[worker, queue] = self.now, before[1] if hung is None else hung
        if len(self.workers) > MAX_WORKERS:
            self.workers.popitem(last=False)

    def outcome(self, method, ask):
        """What the method makes of an item of a batch; its refusal is an outcome like others."""
        try:
            if isinstance(ask, Refused):
                raise ask
            return method(self, ask)
        except Refused as error:
            return {'id': error.id if error is ask else ask['id'], 'error': str(error), 'code': error.status}

    def claimed(self, call, ask):
        """(the job `id`, True), or False when this attempt already ended by this `call`: sent again. Else Stale."""
        job = existing(self._one(BY_ID, ask['id']), 'id: there is no job', ask['id'])
        current, status = ask.get('attempt', job['attempt']) == job['attempt'], job['status']
        if current and status in SOURCES[call]:
            return job, True
        ended = 'done' if status == 'done' else json.loads(job['attempts'] or '[{}]')[-1].get('outcome')
        if current and 'attempt' in ask and ENDS.get(call, '') == ended:
            return job, False
        if status in SOURCES[call]:
            raise Stale(f'attempt: {ask["attempt"]} is over, the job is running as attempt {job["attempt"]}')
        raise Stale(f'id: the job is {status}, so {call} is not possible')

    def complete(self, ask):
        job, new = self.claimed('complete', ask)
        if new:
            self._move(job, 'done', 'completed', result=ask.get('result'), error=None)
        return {'id': job['id'], 'status': 'done'}

    def release(self, ask):
        job, new = self.claimed('release', ask)
        if new:
            self._move(job, 'pending', 'released')
        return {'id': job['id'], 'status': 'pending'}

    def fail(self, ask):
        job, new = self.claimed('fail', ask)
        if new:
            again = ask.get('retry', True) and job['retries'] < max_retries_of(job)
            self._give_back(job, 'failed', again, ask.get('error'), ask.get('delay'))
            job = self._one(BY_ID, ask['id'])
        due = rfc3339(job['next_run_at'])
        return {'id': job['id'], 'status': job['status'], 'retries': job['retries'], 'next_run_at': due}

    def _give_back(self, job, outcome, again, error, delay=None, **changes):
        """The attempt did not work out: pending again after the backoff, or failed."""
        if again:
            retries = job['retries'] + 1
            due = self.now + (micros(BACKOFF * retries ** 2) if delay is None else delay)
            changes.update(retries=retries, next_run_at=due)
        self._move(job, 'pending' if again else 'failed', outcome, error=error, **changes)

    def heartbeat(self, ask):
        job, _ = self.claimed('heartbeat', ask)
        last = job['started_at'] + timeout_of(job) + micros(GRACE)
        until = max(job['lease_until'], min(self.now + (job['lease'] or 0), last))
        changes = {'progress': ask['progress']} if 'progress' in ask else {}
        self._change(job['seq'], **changes, lease_until=until, updated_at=self.now)
        if job['worker']:
            self._seen(job['worker'], job['queue'])
        return {'id': job['id'], 'status': 'running'}

    def _move(self, job, status, event, **changes):
        """Change the status of a job other than by poll. `event`: how the attempt ended, if it ran."""
        waits_for, due = (changes.get(column, job[column]) for column in ('waits_for', 'next_run_at'))
        scheduled = status == 'pending' and (WAITS if waits_for else due > self.now)
        ran, ends = job['status'] == 'running', status in ENDED
        if ran and status != 'done':
            changes['attempts'] = history(job, event, self.now, changes.get('error'))
        if ran and job['queue'] in self.limited:
            self.woken.add(('queue', job['queue']))
        self._change(job['seq'], **changes, status=status, scheduled=scheduled, updated_at=self.now,
                     finished_at=self.now if ends else None)
        self.noted.append((event, job['queue'], self.now - job['started_at'] if status == 'done' else None))
        if ends:
            self._told(job, status)
        elif scheduled != WAITS:
            self._pending(job['queue'], due)

    # jobs after jobs

    def _add_after(self, row):
        """The row of a job that waits for others, once it is added."""
        needed = [existing(self._one(BY_ID, id), 'after: there is no job', id, BadRequest) for id in row['after']]
        states = [STATES.get(job['status'], 0) for job in needed]
        seq = self.db.execute(INSERT[1], added_values({**row, 'scheduled': WAITS})).lastrowid
        self._change(seq, after=encode(row['after']), after_any=bool(row['after_any']))
        self.db.executemany('INSERT INTO needs (job, place, needed, state) VALUES (?, ?, ?, ?)', [
            (seq, place, job['seq'], state) for place, (job, state) in enumerate(zip(needed, states))])
        job = self._one(BY_SEQ, seq)
        self._move(job, 'pending', 'enqueued', waits_for=states.count(0))
        if 2 in states and not job['after_any']:
            self._give_up(job, needed[states.index(2)])
        return self._one('SELECT * FROM jobs WHERE seq = ?', seq)

    def _give_up(self, job, needed):
        error = f'it waits for the job {shown(needed["id"])}, which is {needed["status"]}'
        self._move(job, 'cancelled', 'cancelled', error=error)

    def _told(self, job, outcome):
        """The job has ended, or is purged: wake the calls that wait for it; overdue() tells the jobs, in steps."""
        self.woken.add(('job', job['id']))
        if self._one('SELECT 1 FROM needs WHERE needed = ? AND state = 0 LIMIT 1', job['seq']):
            self.db.execute('INSERT OR IGNORE INTO ended VALUES (?, ?, ?)', (job['seq'], job['id'], outcome))
            self._due(self.now)

    def _settle(self):
        """A step of telling the jobs that wait for those that have ended."""
        for _ in range(STEP):
            end = self._one('SELECT ended.job AS seq, id, outcome AS status, needs.job AS waiter, place FROM ended '
                            'LEFT JOIN needs ON needed = ended.job AND state = 0 LIMIT 1')
            if not end:
                break
            if end['waiter']:
                self._count_down(end)
            else:
                self.db.execute('DELETE FROM ended WHERE job = ?', (end['seq'],))

    def _count_down(self, end):
        """A job has one job less to wait for."""
        self.db.execute(TELL, (STATES[end['status']], end['waiter'], end['place']))
        job = self._one(BY_SEQ, end['waiter'])
        if job['scheduled'] != WAITS:       # cancelled, or let go before the needed job was retried and ended again
            return
        if end['status'] != 'done' and not job['after_any']:
            return self._give_up(job, end)
        due = max(self.now, job['next_run_at'])
        self._move(job, 'pending', 'told', waits_for=job['waits_for'] - 1, next_run_at=due)

    def _wait_anew(self, job):
        """How many jobs this one, which is retried, has to wait for; Stale where it would wait in vain."""
        needs = self.db.execute('SELECT needs.*, id, status FROM needs LEFT JOIN jobs ON seq = needed WHERE job = ? '
                                'ORDER BY place', (job['seq'],)).fetchall()
        states = [STATES.get(need['status'], 0) if need['id'] else need['state'] or STATES['purged'] for need in needs]
        if 2 in states and not job['after_any']:
            bad = needs[states.index(2)]
            name = shown(bad['id']) if bad['id'] else 'that is gone'
            raise Stale(f'id: it waits for the job {name}, which is {bad["status"] or "purged"}')
        self.db.executemany(TELL, [(state, need['job'], need['place']) for state, need in zip(states, needs)])
        return states.count(0)

    # calls: operators

    def limit(self, ask):
        """Set or lift limits of a queue: what they are then."""
        row = {**dict(self._one(QUEUE, ask['queue']) or dict.fromkeys(LIFTED)), **ask}
        if row['rate'] is None and ask.get('per') is not None:
            raise BadRequest('per needs a rate')
        row['per'] = row['rate'] and (row['per'] or micros(1))
        self._set(ask['queue'], **{limit: row[limit] for limit in LIFTED})
        self.limited.add(ask['queue'])
        self.woken.add(('queue', ask['queue']))
        return {**{field: row[field] for field in ('queue', *LIFTED)}, 'per': as_seconds(row['per'])}

    def _allowed(self, row):
        """How many jobs of the queue may be claimed now; a poll that gets none is woken when its rate allows one."""
        most = MAX_LIMIT if row['max_running'] is None else max(0, row['max_running'] - row['running'])
        if row['rate'] and most:
            most = min(most, tokens(row, self.now))
            if not most:
                self._set(row['queue'], full_at=full_at(row, self.now))     # it fills, even if the clock was set back
                self._starve(row['queue'], next_token(row, self.now))
        return most

    def _starve(self, queue, until):
        self.hungry.add(queue)
        self.fed.discard(queue)
        self._due(until)

    def schedule(self, wanted):
        """Make or change a schedule: (row, created)."""
        row = self._one('SELECT * FROM schedules WHERE name = ?', wanted['name'])
        if row and all(row[field] == wanted[field] for field in DEFINED):
            return row, False
        past = dict(row or {'last_run_at': None, 'last_id': None, 'skipped': 0})
        wanted = {**past, **wanted, 'next_run_at': first_tick(wanted, self.now)}
        self.db.execute(f'REPLACE INTO schedules VALUES ({", ".join(":" + column for column in SCHEDULED)})', wanted)
        self._due(wanted['next_run_at'])
        return wanted, not row

    def unschedule(self, ask):
        return {'count': self.db.execute('DELETE FROM schedules WHERE name = ?', (ask['name'],)).rowcount}

    def schedules(self, limit=None, after=''):
        with self.database.reading() as db:
            rows = db.execute('SELECT * FROM schedules WHERE name > ? ORDER BY name LIMIT ?', (after, limit or -1))
            return as_page('schedules', 'name', rows, as_schedule, limit)

    def _tick(self, row):
        """A schedule is due: the job of its last tick, and when the next one is."""
        try:
            at, upcoming = last_tick(row, self.now)
        except BadRequest as error:         # the machine is another one, and does not know the zone
            at, upcoming = row['next_run_at'], self.now + micros(3600)
            self.said.append(f'schedule {shown(row["name"])}: {error}; its next job is made in an hour')
        ask = {field: row[field] for field in FOR_JOBS if row[field] is not None}
        ask['id'] = f'{row["name"]}@{rfc3339(at)[:19]}Z'
        (job, created), = self.enqueue([ask])
        skipped = not created and job['id'] != ask['id']
        self.db.execute(
            'UPDATE schedules SET next_run_at = ?, last_run_at = ?, last_id = ?, skipped = skipped + ? WHERE name = ?',
            (upcoming, at, row['last_id'] if skipped else ask['id'], skipped, row['name']))

    def steps(self, ask):
        """The ids that a large change is about, some at a time, found by a reader so that the writer is not held up."""
        ask = {**ask, 'last': 0, 'step': STEP}
        while True:
            with self.database.reading() as db:
                rows = db.execute(f'SELECT seq, id FROM jobs {where(ask)} ORDER BY seq LIMIT :step', ask).fetchall()
            if not rows:
                return
            ask['last'] = rows[-1]['seq']
            yield [row['id'] for row in rows]

    def step(self, method, ids, statuses):
        """Call the method with those of the jobs that have such a status still; how many those are."""
        count = 0
        for id in ids:
            job = self._one(BY_ID, id)
            with contextlib.suppress(Stale):
                if job and job['status'] in statuses:
                    method(self, job)
                    count += 1
        return count

    def cancel(self, job):
        self._move(job, 'cancelled', 'cancelled')

    def retry(self, job):
        waits_for = self._wait_anew(job)
        try:
            self._move(job, 'pending', 'retried', retries=0, losses=0, next_run_at=self.now, waits_for=waits_for)
        except sqlite3.IntegrityError:
            raise Stale('key: another job with the same key is pending or running in the queue') from None
        self.db.execute('UPDATE jobs SET waits_for = waits_for + 1 WHERE scheduled = 2 AND seq IN '     # they wait on
                        '(SELECT job FROM needs WHERE needed = ? AND state <> 0)', (job['seq'],))
        self.db.execute('UPDATE needs SET state = 0 WHERE needed = ?', (job['seq'],))
        self.db.execute('DELETE FROM ended WHERE job = ?', (job['seq'],))

    def purge(self, job):
        self._told(job, 'purged')
        self.db.execute('DELETE FROM jobs WHERE seq = ?', (job['seq'],))

    def pause(self, ask, paused=True):
        self._set(ask['queue'], paused=paused)
        self.woken.add(('queue', ask['queue']))
        return {'queue': ask['queue'], 'paused': paused}

    def resume(self, ask):
        return self.pause(ask, paused=False)

    # calls: readers

    def job(self, id):
        """The job with its attempts and why it does not run."""
        with self.database.reading() as db:
            row = existing(db.execute('SELECT * FROM jobs WHERE id = ?', (id,)).fetchone(), 'id: there is no job', id)
            attempts = row['attempts'] or '[]'      # of those that ended otherwise than in done
            if row['status'] in ('running', 'done'):
                attempts = history(row, row['status'], row['finished_at'])
            waiters = [id for id, in db.execute('SELECT id FROM needs JOIN jobs ON seq = job WHERE needed = ? '
                                                'ORDER BY seq LIMIT ?', (row['seq'], SHOWN))]
            needed_by = f',"needed_by":{encode(waiters)}' if waiters else ''
            return as_json(row, f',"attempts":{attempts},"why":{quoted(self._why(db, row))}{needed_by}')

    def ended(self, id):
        """Is there nothing to wait for?"""
        with self.database.reading() as db:
            job = db.execute(BY_ID, (id,)).fetchone()
        return job is None or job['status'] in ENDED

    def newest(self, tag):
        with self.database.reading() as db:
            row = db.execute('SELECT * FROM jobs WHERE tag = ? ORDER BY seq DESC LIMIT 1', (tag,)).fetchone()
        return as_json(existing(row, 'tag: there is no job tagged', tag))

    def jobs(self, limit=50, brief=False, **ask):
        """A page of jobs, newest first, or those that one needs in its order."""
        source, order = ('needs JOIN jobs ON seq = needed', 'place') if 'needed_by' in ask else ('jobs', 'seq DESC')
        with self.database.reading() as db:
            for field in {'after', 'needed_by'} & ask.keys():
                job = db.execute(BY_ID, (ask[field],)).fetchone()
                ask[field] = existing(job, f'{field}: there is no job', ask[field], BadRequest)['seq']
            if {'after', 'needed_by'} <= ask.keys():
                ask['beyond'] = ask.pop('after')
            matching = f'SELECT SUM({ask.get("status", 1)}) FROM queues WHERE queue = COALESCE(?, queue)'
            if not db.execute(matching, (ask.get('queue'),)).fetchone()[0]:
                limit = 0           # else nothing but a look at every job would tell
            rows = db.execute(f'SELECT {BRIEF if brief else "*"} FROM {source} {where(ask)} ORDER BY {order} '
                              'LIMIT :limit', {**ask, 'limit': limit})
            return as_page('jobs', 'id', rows, functools.partial(as_json, brief=brief), limit)

    def health(self):
        trouble = self.database.trouble
        return {'status': 'trouble' if trouble else 'ok', 'storage': trouble or 'ok', 'version': VERSION}

    def queues(self, limit=MAX_LIMIT, after='', busy=False):
        """A page of the queues, by name or the busy ones first, and the workers seen, with counts; ages in seconds."""
        order = 'pending + running > 0 DESC, failed > 0 DESC, queue' if busy else 'queue'
        with self.database.reading() as db:
            rows = [dict(row) for row in db.execute(f'SELECT * FROM queues WHERE queue > ? ORDER BY {order} LIMIT ?',
                                                    (after, limit))]
            running = {(worker, queue): count for worker, queue, count in db.execute(
                "SELECT worker, queue, COUNT(*) FROM jobs WHERE status = 'running' GROUP BY worker, queue")}
            oldest = [db.execute(OLDEST, row).fetchone()[0] for row in rows]
        now, workers, names = self.clock.now(), list(self.workers.items()), collections.defaultdict(list)
        for (worker, queue), _ in workers:
            names[queue].append(worker)
        for row, due in zip(rows, oldest):
            queue = row['queue']
            del row['full_at']
            row.update(per=as_seconds(row['per']), paused=bool(row['paused']), workers=names[queue],
                       polled_at=rfc3339(self.polled.get(queue)), minutes=self.meter.last_hour(now, queue),
                       oldest_age=None if due is None else max(0, now - due) / 1000000)
        after = rows[-1]['queue'] if len(rows) == limit and not busy else None
        return {'queues': rows, 'after': after, 'now': rfc3339(now), 'workers': [
            {'worker': worker, 'queue': queue, 'seen_at': rfc3339(at), 'hung': hung,
             'running': running.get((worker, queue), 0)} for (worker, queue), (at, hung) in reversed(workers)]}

    def counts(self):
        """The counts of the first queues, and of all others together; the first schedules."""
        totals = ', '.join(f'TOTAL({column}) AS {column}' for column in COUNTS)
        with self.database.reading() as db:
            rows = [dict(row) for row in db.execute('SELECT * FROM queues ORDER BY queue LIMIT ?', (MAX_LIMIT,))]
            if len(rows) == MAX_LIMIT:
                rows += map(dict, db.execute(f"SELECT '(others)' AS queue, {totals}, NULL AS max_running, NULL AS rate "
                                             'FROM queues WHERE queue > ?', (rows[-1]['queue'],)))
            for row in rows:
                row['oldest'] = db.execute(OLDEST, row).fetchone()[0]
            return rows, db.execute('SELECT * FROM schedules ORDER BY name LIMIT ?', (MAX_LIMIT,)).fetchall()

    def _why(self, db, row):
        """Why the job is where it is, in a sentence; None once it ended."""
        if row['status'] == 'running':
            started, seen, lost = map(rfc3339, (row['started_at'], row['updated_at'], row['lease_until']))
            return (f'attempt {row["attempt"]} runs on {row["worker"] or "a worker without a name"} since {started}, '
                    f'last sign of life {seen}, lost if there is none by {lost}')
        if row['status'] in ENDED:
            return None
        queue = db.execute(QUEUE, (row['queue'],)).fetchone()
        ahead = db.execute(AHEAD, dict(row)).fetchone()[0]
        now, polled = self.clock.now(), self.polled.get(row['queue'])
        silent = (now - (polled or 0)) // 60000000
        retry = f' (retry {row["retries"]})' if row['retries'] else ''
        needed = [shown(id) for id, in db.execute('SELECT id FROM needs JOIN jobs ON seq = needed WHERE job = ? '
                                                  'AND state = 0 ORDER BY place LIMIT 4', (row['seq'],))]
        named = ', '.join(needed[:3] + ['...'] * (len(needed) > 3))
        full = queue['max_running'] is not None and queue['running'] >= queue['max_running']
        free = rfc3339(next_token(queue, now)) if queue['rate'] and not tokens(queue, now) else None
        reasons = [sentence for holds, sentence in (
            (queue['paused'], 'the queue is paused'),
            (row['scheduled'] == WAITS, f'waits for {row["waits_for"]} job{"s" * (row["waits_for"] != 1)}: {named}'),
            (full, f"the queue's limit of {queue['max_running']} running jobs is reached"),
            (free, f"the queue's rate allows the next at {free}"),
            (row['scheduled'] == 1, f'scheduled for {rfc3339(row["next_run_at"])}{retry}'),
            (polled is None, nobody(row['queue'], tuple(self.polled)[-20:])),
            (polled and silent, f'no worker has polled the queue for {silent} minutes'),
            (ahead and not row['scheduled'], f'behind {ahead}{" or more" if ahead == 1000 else ""} other jobs'),
        ) if holds]
        return '; '.join(reasons) or 'next in line'

    # time

    def renew(self, pause):
        """No client could be heard for `pause` seconds: leases shorter than twice that get one more period."""
        self.db.execute(f'PRAGMA user_version = {SCHEMA_VERSION}')     # writes, where a full disk lets the rest pass
        self.db.execute(RENEW, {'now': self.now, 'grace': micros(GRACE), 'timeout': micros(DEFAULT_TIMEOUT),
                                'pause': micros(min(pause, 1e9))})
        self.next_due = 0

    def leap(self, offset, ahead):
        """The wall clock went ahead. What is counted in seconds moves with it: leases, starts, backoff."""
        self.clock.offset = offset
        self.now = self.clock.now()     # at once: what else is in this transaction, and the next, tells the new time
        for shift in SHIFTS:
            self.db.execute(shift, {'by': micros(ahead)})
        self.next_due = 0
        self.said.append(f'the system clock went ahead by {ahead:.0f} s')

    def overdue(self):
        """A step of what is due: ticks, scheduled jobs, jobs of lost workers, jobs that wait for others; retention."""
        if self.next_due > self.now:
            return
        step = self.now, STEP
        for row in self.db.execute(TICKS, step).fetchall():
            self._tick(row)
        due = self.db.execute("""
            SELECT seq, queue FROM jobs WHERE status = 'pending' AND scheduled = 1 AND next_run_at <= ?
            ORDER BY next_run_at LIMIT ?""", step).fetchall()
        self.db.executemany('UPDATE jobs SET scheduled = 0 WHERE seq = ?', [(seq,) for seq, _ in due])
        self.woken.update(('queue', queue) for queue in self.hungry.union(queue for _, queue in due))
        for job in self.db.execute(LOST, step).fetchall():
            again = job['retries'] < max_retries_of(job) or job['losses'] < MAX_LOSSES
            self._give_back(job, 'lost', again, 'worker lost', losses=job['losses'] + 1)
            self.said.append(f'job {shown(job["id"])}: worker lost')
        self._settle()
        if self.next_prune <= self.now:
            self._prune()
        self.next_due = self._one(NEXT, self.next_prune)[0]

    def _prune(self):
        """A step of retention, and of forgetting queues that nobody uses."""
        counts = [self.db.execute("""
            DELETE FROM jobs WHERE seq IN (
                SELECT seq FROM jobs WHERE status = ? AND finished_at <= ? AND NOT EXISTS (
                    SELECT 1 FROM needs JOIN jobs AS waiter ON waiter.seq = needs.job
                    WHERE needs.needed = jobs.seq AND waiter.status IN ('pending', 'running'))
                ORDER BY finished_at LIMIT ?)""", (status, self.now - keep, STEP)).rowcount
            for status, keep in self.keep.items() if keep]
        unused = self.db.execute("""
            SELECT queue FROM queues WHERE pending + running + done + failed + cancelled = 0 AND NOT paused
                AND max_running IS NULL AND rate IS NULL AND COALESCE(polled_at, 0) < ? LIMIT ?
            """, (self.now - micros(RECENT), STEP)).fetchall()
        for queue, in unused:
            self.db.execute('DELETE FROM queues WHERE queue = ?', (queue,))
            self.polled.pop(queue, None)
            self.meter.forget(queue)
        if STEP not in [*counts, len(unused)]:
            self.next_prune = self.now + micros(PRUNE)


# -- Seam (temporary) -----------------------------------------------------------------------------
# This section maps the new names, below, to the old store. Delete it once the store has its new shape, keep its
# imports and its new constants, and use the new names of the settings below it (old new, ...):
# DRAIN DRAIN_TIMEOUT, BUSY LOCK_TIMEOUT, RETRY LOCK_RETRY_INTERVAL, DEAF MAX_LISTEN_GAP, TICK CLOCK_CHECK_INTERVAL,
# SMALL RESERVED_BYTES, CHUNK CHUNK_BYTES, MAX_HELD MAX_REQUEST_BUFFER, MAX_UNSENT MAX_RESPONSE_BUFFER,
# MAX_ANSWER MAX_RESPONSE, IDLE KEEP_ALIVE_TIMEOUT, DEADLINE REQUEST_TIMEOUT, BIG_BODY OFFLOAD_BODY_BYTES,
# THREADS OFFLOAD_THREADS, BUCKETS DURATION_BUCKETS, GROUPS COMMIT_SIZE_BUCKETS
import heapq
import traceback
from typing import Callable, Dict, Iterable, NamedTuple, Optional, Sequence, Tuple
HTTPError, RequestTimeout, InternalError, UnsupportedMediaType = Refused, TooSlow, Fault, NotJSON
StartupError, HeadersTooLarge, PayloadTooLarge, MethodNotAllowed = Unusable, HeadTooLarge, TooLarge, NotAllowed
identity, describe, is_storage_error, job_json, json_list, schedule_json = as_is, shown, of_storage, as_json, as_list, as_schedule
validate, validate_batch, parse_json, SCHEDULE_FIELDS = checked, batch, parsed, DEFINED
FieldRule = lambda a, b, c: (a, b, c)
MAX_QUERY, MAX_KNOWN_HEADS, MAX_KNOWN_HEAD_BYTES = 16 << 10, 1024, 1024
JSON_QUERY_FIELDS = 'limit', 'wait', 'brief', 'busy'
Clock.slew = Clock.follow
Store.next_deadline = property(lambda s: s.next_due, lambda s, v: setattr(s, 'next_due', v))
Store.topics = property(lambda s: s.woken)
class _Concern:
    def __init__(self, store): self.store = store
    def __getattr__(self, name):
        name = {'render_created': 'announced', 'id_batches': 'steps', 'apply_to_batch': 'step', 'require_status': 'claimed', 'apply_item': 'outcome', 'has_ended': 'ended', 'metric_counts': 'counts'}.get(name, name)
        f = getattr(self.store, name)
        def call(*args, **kw):
            args = [a for a in args if a is not self.store]
            if name in ('outcome', 'step'):
                m = args[0]
                return f(lambda store, item: m(self.store, item), *args[1:])
            return f(*args, **kw)
        return call
_init, _begin, _committed = Store.__init__, Store.begin, Store.committed
def _sinit(self, *a):
    _init(self, *a)
    self.producers = self.claims = self.operators = self.schedules_ = self.queries = _Concern(self)
def _sbegin(self, *a):
    _begin(self, *a); return self
Store.__init__, Store.begin = _sinit, _sbegin
Store.run_due = lambda s, tx: Store.overdue(s)
Store.extend_leases = lambda s, tx, p: Store.renew(s, p)
Store.shift_deadlines = lambda s, tx, o, a: Store.leap(s, o, a)
Store.bulk_insert = lambda s, tx, l: Store.enqueue(s, l)
Store.committed = lambda s, tx, n: _committed(s, n)


# -- Event loop -----------------------------------------------------------------------------------
READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
NEVER = float('inf')    # a time that does not come
READY = object()        # the event of a socket that can be read or written
NOTHING = ()            # the result of a poll or wait whose time is over


class Client:
    """The protocol between the event loop and those it works for; the loop's thread calls it.

    resume(event)   Continue. `event` is READY, the result of an operation or of a slow call, or an
                    exception, which is raised where the client waits.
    is_open         False once the client is gone: it is given no job any more.
    set_timeout(s)  Have on_timeout() called in `s` seconds, instead of at the time set before.
    on_timeout()    The time is over.
    """
    is_open = True
    deadline = NEVER        # the loop's time at which on_timeout() is called
    timer = (NEVER,)        # its entry in the heap of Timeouts, which may be earlier

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


class ThreadWait(Client):
    """Another thread that waits for the result of its transaction."""

    def __init__(self, loop):
        super().__init__(loop)
        self.results = SimpleQueue()

    def resume(self, event):
        self.results.put(event)

    def result(self):
        """The result; raises the error of the transaction, or Unavailable if the loop has ended."""
        while not self.loop.ended:
            with contextlib.suppress(Empty):
                result = self.results.get(timeout=1)
                if isinstance(result, Exception):
                    raise result
                return result
        raise Unavailable('the engine is stopping')


class Operation:
    """Work for a transaction, and how its result becomes a response."""
    topic = None        # a LongPoll has one
    client = None       # gets the result by resume()
    submitted_at = 0    # the loop's time
    result = None
    error = None        # an HTTPError; it fails for sure, so it is not run again

    def __init__(self, work, render=identity, single_insert=None):
        self.work = work                        # (transaction) -> result; may be called again
        self.render = render                    # result -> response
        self.single_insert = single_insert      # the fields of a job, if it inserts just one

    def submit(self, loop):
        """Begin. True if the client has to wait for resume()."""
        loop.committer.submit(self)
        return True

    def finish(self):
        """Give the client its result, and let go of it: an error's traceback refers to requests."""
        event = self.result if self.error is None else self.error
        self.result = self.error = None
        self.client.resume(event)


class LongPoll(Operation):
    """An operation that waits for its topic, up to `wait` seconds, while its result is empty."""

    def __init__(self, work, render, topic, wait):
        super().__init__(work, render)
        self.topic = topic
        self.wait = wait


class JobWait:
    """A wait for a job's end: it looks once without a transaction, then waits for its topic."""
    result = error = None
    finish = Operation.finish

    def __init__(self, has_ended, render, topic, wait):
        self.has_ended = has_ended
        self.render = render
        self.topic = topic
        self.wait = wait
        self.client = None

    def submit(self, loop):
        self.result = self.has_ended()
        return loop.waiters.park_if_empty(self)


class Timeouts:
    """A heap of the times at which clients time out; entries are [time, number, client].

    A client's deadline is set often and mostly moves back. So its entry is left where it is, and
    is moved to the deadline when its time comes. A closed client's entry loses its client.
    """
    TIME, NUMBER, CLIENT = range(3)

    def __init__(self):
        self.heap = []
        self.numbers = itertools.count()    # equal times come in their order

    def next(self):
        return self.heap[0][self.TIME] if self.heap else NEVER

    def push(self, client):
        self.cancel(client)
        client.timer = [client.deadline, next(self.numbers), client]
        heapq.heappush(self.heap, client.timer)

    def cancel(self, client):
        if client.timer is not Client.timer:
            client.timer[self.CLIENT] = None
            client.timer = Client.timer

    def fire(self, now):
        """Call on_timeout() of the clients whose time is over."""
        while self.next() <= now:
            client = heapq.heappop(self.heap)[self.CLIENT]
            if client is None:
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
        if not operation.client.is_open or self.loop.is_draining():
            return False
        self.by_topic.setdefault(operation.topic, {})[operation] = True
        operation.client.set_timeout(operation.wait)
        return True

    def withdraw(self, operation):
        line = self.by_topic.get(operation.topic)
        if line and line.pop(operation, False) and not line:
            del self.by_topic[operation.topic]

    def serve(self, topics, run):
        """The waits that are over and the polls that find a job; run(poll) looks.

        A poll that finds nothing ends its topic: those behind it would find nothing either.
        """
        served = []
        for topic in topics:
            for operation in self.by_topic.get(topic, ()):
                if isinstance(operation, JobWait):
                    operation.result = True
                else:
                    run(operation)
                    if not operation.result and operation.error is None:
                        break
                served.append(operation)
        return served

    def end_all(self):
        for operation in [operation for line in self.by_topic.values() for operation in line]:
            operation.client.on_timeout()


class Budget:
    """Bytes of requests in progress and of responses that are not taken, of all connections."""

    def __init__(self, connections):
        self.connections = connections
        self.request_bytes = 0
        self.response_bytes = 0

    def require_capacity(self, size):
        """Refuse a large response or request while clients leave too many responses untaken."""
        if size > SMALL and self.response_bytes + size > MAX_UNSENT:
            raise Unavailable('too many answers wait to be taken; try again')

    def for_claims(self):
        """Characters of jobs that the polls of a transaction may claim."""
        return min(MAX_ANSWER, MAX_UNSENT - self.response_bytes)

    def shed_load(self):
        """While too much is being received, refuse the newest of the large requests."""
        if self.request_bytes <= MAX_HELD:
            return
        large = [connection for connection in self.connections
                 if connection.request and len(connection.received) > SMALL]
        newest = max(large, key=lambda connection: connection.request.deadline, default=None)
        if newest:
            newest.resume(Unavailable('too much is being sent; try again'))


class PoisonedTransaction(Exception):      # noqa: N818 (the house's word)
    """An operation failed and left changes behind: the others run again, without it."""

    def __init__(self, operation):
        super().__init__()
        self.operation = operation      # None: one of the single inserts


class Committer:
    """Runs operations in transactions: all that arrived in a pass share one (group commit).

    Writes come first, then maintenance (what is due), then the parked polls, in the order in which
    they came, then the new ones. So a job and the poll that takes it meet in one commit, whichever
    came first.
    """

    def __init__(self, loop, store):
        # constant after start
        self.loop = loop
        self.store = store
        self.database = store.database
        # touched by the loop's thread only; times are the loop's
        self.submitted = []                 # operations for the next transaction
        self.lock_retry_at = 0              # another program has the write lock: no try before
        self.maintenance_paused_until = 0   # after trouble
        self.clock_checked_at = -NEVER
        self.listening_until = -NEVER       # heartbeats could be received until then

    def submit(self, operation):
        operation.submitted_at = self.loop.now
        self.submitted.append(operation)

    def check_clock(self):
        """Compare the clocks in this pass, not in up to TICK seconds."""
        self.clock_checked_at = -NEVER

    def is_listening(self, now):
        """False if heartbeats may have been missed: then the next transaction extends leases."""
        return (now - self.listening_until < DEAF and not self.lock_retry_at
                and self.database.trouble is None)

    def next_attempt(self, now):
        """When there is something to do: an operation, or something due."""
        due = now + (self.store.next_deadline - self.store.clock.now()) / 1000000
        due = max(due, self.maintenance_paused_until)
        return min(due, self.lock_retry_at) if self.submitted else due

    def commit_batch(self, now):
        """Run what was submitted and what is due, and give the clients their results."""
        if now < self.lock_retry_at:
            return
        clock = self.store.clock
        offset = clock.offset
        ahead = 0
        maintain = now >= self.maintenance_paused_until
        if maintain and now - self.clock_checked_at >= TICK:
            self.clock_checked_at = now
            ahead = clock.slew()
        is_due = maintain and (ahead or self.store.next_deadline <= clock.now())
        if not (self.submitted or is_due):
            return
        operations = self.submitted
        self.submitted = []
        maintenance = Operation(self.store.run_due) if maintain else None
        try:
            transaction, served = self._run_transaction(operations, maintenance, ahead)
        except Unavailable as error:
            clock.offset = offset       # the step of the clock is not on disk
            self._storage_failed(error, operations, now)
            return
        failed = maintenance and maintenance.error
        self.lock_retry_at = 0
        self.maintenance_paused_until = now + TICK if failed else 0
        self.loop.now = time.monotonic()
        for operation in itertools.chain(served, operations):
            if not (operation.topic and self.loop.waiters.park_if_empty(operation)):
                operation.finish()
        self.store.committed(transaction, len(served) + len(operations))    # nobody waits for this

    def _storage_failed(self, error, operations, now):
        """Keep the operations that still wait for a foreign lock; fail all others."""
        is_locked = isinstance(error, Busy)
        last_try = self.loop.drain_deadline - 1
        waiting, failed = [], []
        for operation in operations:
            waits = is_locked and now < min(operation.submitted_at + BUSY, last_try)
            (waiting if waits else failed).append(operation)
        self.submitted[:0] = waiting
        self.lock_retry_at = now + RETRY if is_locked else 0
        self.maintenance_paused_until = self.lock_retry_at or now + TICK
        if failed or not is_locked:
            cause = error.__cause__ or error
            if self.database.trouble is None:
                log(f'storage trouble: {cause}')
            self.database.trouble = str(cause)
        self.loop.now = time.monotonic()
        for operation in failed:
            operation.error = error
            operation.finish()

    def _run_transaction(self, operations, maintenance, ahead):
        """Run it all in one transaction: (transaction, the parked operations that got something).

        A transaction that an operation poisons begins again without it.
        """
        insert_in_bulk = True
        while True:
            writes, inserts, polls = self._sort(operations, insert_in_bulk)
            try:
                with self.database.transaction() as db:
                    transaction, began = self._begin(db, ahead)
                    run = functools.partial(self._run, transaction)
                    if inserts:
                        self._bulk_insert(transaction, inserts)
                    for operation in writes:
                        run(operation)
                    if maintenance:
                        run(maintenance)
                    served = self.loop.waiters.serve(transaction.topics, run)
                    for operation in polls:
                        run(operation)
                self.listening_until = began
                self.database.trouble = None
                return transaction, served
            except PoisonedTransaction as error:
                insert_in_bulk = False      # one by one it shows whose fault it is
                if error.operation in writes:
                    # those behind it have their turn in the next pass, so that none runs often
                    behind = operations.index(error.operation) + 1
                    self.submitted[:0] = operations[behind:]
                    del operations[behind:]

    def _sort(self, operations, insert_in_bulk):
        """(writes, those of them that insert one job and may do that together, polls)"""
        writes, inserts, polls = [], [], []
        for operation in operations:
            if operation.topic:
                if operation.client.is_open:
                    polls.append(operation)
            elif operation.single_insert and insert_in_bulk and operation.error is None:
                inserts.append(operation)
            else:
                writes.append(operation)
        return writes, inserts, polls

    def _begin(self, db, ahead):
        """(transaction, the loop's time at its begin). First of all leases are put right."""
        transaction = self.store.begin(db, self.loop.budget.for_claims())
        began = time.monotonic()
        gap = began - self.listening_until
        if gap > DEAF or self.database.trouble:
            self.store.extend_leases(transaction, gap)
        if ahead:
            self.store.shift_deadlines(transaction, self.store.clock.offset + ahead, ahead)
        return transaction, began

    def _run(self, transaction, operation):
        """Set its result or its error, unless it is known to fail."""
        if operation.error is not None:
            return
        changes = transaction.db.total_changes
        try:
            operation.result = operation.work(transaction)
        except Exception as error:
            if is_storage_error(error):
                raise
            operation.result = None
            operation.error = self.loop.server.as_http_error('an operation', error)
            operation.error.with_traceback(None)        # its frames hold the request's body
            if transaction.db.total_changes != changes:
                raise PoisonedTransaction(operation) from error

    def _bulk_insert(self, transaction, inserts):
        """Insert the jobs of single inserts in few statements."""
        try:
            jobs = self.store.bulk_insert(
                transaction, [operation.single_insert for operation in inserts])
        except Exception as error:
            if is_storage_error(error):
                raise
            raise PoisonedTransaction(None) from error
        for operation, job in zip(inserts, jobs):
            operation.result = [job]


class SlowCall(NamedTuple):
    """A function that a thread of the server's calls for a client."""
    client: Client
    function: Callable
    args: tuple


class Offload:
    """Slow calls, in order: at most THREADS threads of the server's run them.

    A thread's place is free again once the loop has taken its result, so that large results do not
    pile up between the threads and the loop.
    """

    def __init__(self, server):
        # constant after start
        self.server = server
        # touched by the loop's thread only
        self.waiting = collections.deque()
        self.running = 0

    def submit(self, call):
        self.waiting.append(call)
        self._start_next()

    def finished(self, call, result):
        self.running -= 1
        call.client.resume(result)
        self._start_next()

    def _start_next(self):
        while self.waiting and self.running < THREADS:
            call = self.waiting.popleft()
            self.running += 1
            try:
                self.server.start_thread(call)
            except RuntimeError:        # the system gives no more threads
                self.running -= 1
                refusal = Unavailable('no thread could be started; try again')
                self.server.loop.call_soon_threadsafe(
                    functools.partial(call.client.resume, refusal))


class EventLoop:
    """One thread that does all that is quick, in passes: receive, commit, respond.

    It owns the connections, the connection that writes the database, and the memory of the store,
    without a lock. Other threads hand something in with call_soon_threadsafe() and
    run_in_transaction(), and read the committed state of the database.
    """

    def __init__(self, server, store):
        # constant after start
        self.server = server
        self.selector = selectors.DefaultSelector()     # calls the data of what is ready
        is_select = isinstance(self.selector, selectors.SelectSelector)
        self.max_connections = 500 if is_select else NEVER
        self.wakeup_reader, self.wakeup_writer = socket.socketpair()
        self.wakeup_writer.setblocking(False)
        self.wake = self.wakeup_writer.send
        if os.name == 'posix':      # so that a trace tells wake-ups from responses
            self.wake = functools.partial(os.write, self.wakeup_writer.fileno())
        self.selector.register(self.wakeup_reader, READ, self._drain_wakeups)
        self.thread = threading.Thread(target=self._run, name='loop', daemon=True)
        # safe without a lock
        self.calls_from_threads = collections.deque()
        self.ended = False                  # written by the loop's thread, read by all
        # touched by the loop's thread only
        self.now = time.monotonic()         # the time of this pass, taken when something happened
        self.drain_deadline = NEVER         # when the engine ends, whoever is still there
        self.connections = set()
        self.timeouts = Timeouts()
        self.budget = Budget(self.connections)
        self.waiters = Waiters(self)
        self.committer = Committer(self, store)
        self.offload = Offload(server)

    def call_soon_threadsafe(self, function):
        """Have the loop's thread call it in this pass or the next."""
        self.calls_from_threads.append(function)
        with contextlib.suppress(OSError):      # full: the loop has been woken often enough
            self.wake(b'.')

    def run_in_transaction(self, work):
        """For other threads: the result of work(transaction), once it is on disk."""
        operation = Operation(work)
        operation.client = ThreadWait(self)
        self.call_soon_threadsafe(functools.partial(self.committer.submit, operation))
        return operation.client.result()

    def is_draining(self):
        return self.drain_deadline < NEVER

    def drain(self):
        """Answer what was received, end what waits, and come to an end."""
        self.drain_deadline = time.monotonic() + DRAIN
        self.waiters.end_all()
        for connection in [one for one in self.connections if one.request is None]:
            connection.close()

    def _is_drained(self):
        return self.is_draining() and (
            not self.connections or time.monotonic() >= self.drain_deadline)

    def _run(self):
        try:
            while not self._is_drained():
                self._run_once()
            for connection in list(self.connections):
                connection.close()
        except BaseException as error:      # supervisors start an engine again that ends
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
        if listening:       # a process that was stopped in select() did not listen for longer
            self.committer.listening_until = min(now, before + timeout)
        for key, _ in events:
            key.data(READY)
            self.budget.shed_load()
        for _ in range(len(self.calls_from_threads)):
            self.calls_from_threads.popleft()()
        self.timeouts.fire(now)
        self.committer.commit_batch(now)

    def _select_timeout(self, now):
        """Seconds until something is due; 0 if calls from other threads wait."""
        if self.calls_from_threads:
            return 0
        next_event = min(now + TICK, self.timeouts.next(),
                         self.committer.next_attempt(now), self.drain_deadline)
        return max(0, next_event - now)

    def _drain_wakeups(self, _):
        self.wakeup_reader.recv(4096)


# -- HTTP -----------------------------------------------------------------------------------------
REQUEST_LINE = re.compile(rb'([!#-\'*+.0-9A-Z^-z|~-]{1,32}) (/[!-~]*) HTTP/1\.([01])')
HEADER = re.compile(rb'([!#-\'*+.0-9A-Z^-z|~-]+):([\t -~\x80-\xff]*)')
JSON_TYPE = re.compile(r'application/json\s*(?:;\s*charset="?utf-8"?\s*)?', re.IGNORECASE)
SINGLE_HEADERS = ('host', 'content-length', 'content-type', 'authorization', 'origin')
END_OF_HEAD = b'\r\n\r\n'
NOT_READY = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
PROMETHEUS = 'text/plain; version=0.0.4; charset=utf-8'
PLAIN_TEXT = 'text/plain; charset=utf-8'
COMMON_HEADERS = ('Cache-Control: no-store', 'X-Content-Type-Options: nosniff')


class Response(NamedTuple):
    """What a handler returns; a dict or a string of JSON stands for one with status 200."""
    body: object = b''      # bytes, text, a dict, or an open file
    status: int = 200
    content_type: str = 'application/json'
    headers: Tuple[Tuple[str, str], ...] = ()


class RequestHead(NamedTuple):
    """The parsed request line and headers. Immutable, since clients that repeat a head share it."""
    method: str
    path: str
    route: str                  # a key of ROUTES, or 'other'
    path_parameter: str         # '/jobs/17' is the route '/jobs/' and the parameter '17'
    query: str
    headers: Dict[str, str]     # by lower-case names
    keep_alive: bool
    # known once it is authorized
    rule: Optional['Route'] = None
    content_length: int = 0


def check_head_bytes(head):
    """Refuse what is no request, as soon as that is known."""
    if len(head) > MAX_HEAD:
        raise HeadersTooLarge(f'the request line and headers have more than {MAX_HEAD} bytes')
    if not head[:1].isalpha() or head.count(b'\n') != head.count(b'\r\n'):
        raise BadRequest('this is not HTTP/1.1, whose lines end in CR LF')


def parse_head(raw):
    """Parse strictly: refuse everything that two programs could read in two ways."""
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
    is_http_1_1 = request_line[3] == b'1'
    if is_http_1_1 and 'host' not in headers:
        raise BadRequest('the header Host is missing')
    if len(headers) < len(fields):
        names = [name for name, _ in fields]
        for name in SINGLE_HEADERS:
            if names.count(name) > 1:
                raise BadRequest(f'the header {name} is there twice')
    connection = headers.get('connection', '').lower()
    keep_alive = 'close' not in connection and (is_http_1_1 or 'keep-alive' in connection)
    path, _, query = request_line[2].decode().partition('?')
    route, path_parameter = split_path(path)
    return RequestHead(
        request_line[1].decode(), path, route, path_parameter, query, headers, keep_alive)


def split_path(path):
    """(route, parameter) of a path; the route is 'other' where there is none."""
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
        pairs.append((head.rule.required[0][0], head.path_parameter))
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

    def __init__(self, deadline):
        self.deadline = deadline    # the loop's time at which it has to be here
        self.head = None            # a RequestHead; None until its end was received
        self.body = None            # bytes, until they are parsed
        self.size = 0               # bytes of the body, also of what it became
        self.operation = None       # an Operation or JobWait that it waits for

    @property
    def name(self):
        return self.head.route if self.head else 'a request head'


class Connection(Client):
    """A client's connection: requests are received, served and answered one after the other.

    It is a generator that yields the events to wait for, 0 for none; see Client.resume().
    """
    request = None              # a Request, from its first byte until its response is sent
    unsent = b''                # of the response
    watched = 0                 # events that the selector looks for
    request_bytes = 0           # what the budget knows of it
    response_bytes = 0

    def __init__(self, server, sock, address):
        super().__init__(server.loop)
        self.server = server
        self.sock = sock
        self.address = address
        self.received = bytearray()     # and not used yet
        self.steps = self._serve()
        self.loop.connections.add(self)
        self.resume(None)

    def resume(self, event):
        if not self.is_open:
            return
        try:
            if event is READY and self.watched == READ:
                event = self._receive()
            if isinstance(event, Exception):
                events = self.steps.throw(event)
            else:
                events = self.steps.send(event)
            if events != self.watched:
                self._watch(events)
            self._update_budget(len(self.received) + (self.request.size if self.request else 0),
                                len(self.unsent))
        except (StopIteration, OSError, EOFError, HTTPError):   # served, gone, or late
            self.close()
        except Exception as error:
            self.server.log_bug('a connection', error)
            self.close()

    def on_timeout(self):
        if self.request and self.request.operation:
            self.resume(NOTHING)
        else:
            self.resume(RequestTimeout(
                f'the request did not arrive within {DEADLINE} seconds'))

    def close(self):
        if self.is_open:
            self.is_open = False
            self.steps.close()
            self.loop.connections.discard(self)
            self.loop.timeouts.cancel(self)
            self._watch(0)
            self._update_budget(0, 0)
            self.sock.close()

    def _receive(self):
        """Receive a piece: so little that pipelined requests take no more than SMALL."""
        try:
            data = self.sock.recv(MAX_HEAD)
        except NOT_READY:
            return READY
        self.received += data
        return READY if data else EOFError()

    def _watch(self, events):
        if self.watched:
            self.loop.selector.unregister(self.sock)
        if events:
            self.loop.selector.register(self.sock, events, self.resume)
        self.watched = events

    def _update_budget(self, request_bytes, response_bytes):
        budget = self.loop.budget
        budget.request_bytes += request_bytes - self.request_bytes
        budget.response_bytes += response_bytes - self.response_bytes
        self.request_bytes = request_bytes
        self.response_bytes = response_bytes

    def _serve(self):
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.server.tls:     # the handshake is part of receiving
            self.sock = self.server.tls.wrap_socket(
                self.sock, server_side=True, do_handshake_on_connect=False)
        keep_alive = True
        self.set_timeout(DEADLINE)
        while keep_alive and (self.received or not self.loop.is_draining()):
            while not self.received or not self._skip_blank_lines():
                yield READ
            self.set_timeout(DEADLINE)
            self.request = Request(self.deadline)
            keep_alive = yield from self._serve_request(self.request)
            self.request = None
            self.set_timeout(IDLE if keep_alive else LINGER)
        if not keep_alive:      # closing at once would reset the connection and lose the response
            self.sock.shutdown(socket.SHUT_WR)
        while not (keep_alive or self.loop.is_draining()):
            self.received.clear()
            yield READ

    def _skip_blank_lines(self):
        """They are no part of the request that follows (RFC 9112, 2.2). True if there is one."""
        if self.received[0] in b'\r\n':
            self.received = self.received.lstrip(b'\r\n')
        return bool(self.received)

    def _serve_request(self, request):
        """Receive and answer it. True if another may follow."""
        keep_alive = False      # after an error in the head or body the next request is not found
        try:
            yield from self._receive_request(request)
            keep_alive = request.head.keep_alive
            response = yield from self._dispatch(request)
            file = self._begin_response(request, response, keep_alive)
        except (OSError, EOFError):     # the client is gone
            raise
        except Exception as error:
            file = self._begin_error(request, error, keep_alive)
        request.operation = request.body = None
        request.size = 0
        self.set_timeout(DEADLINE)
        if file:
            yield from self._send_file(file)
        elif not self._send():
            yield from self._send_rest()
        return keep_alive

    def _receive_request(self, request):
        end = self.received.find(END_OF_HEAD)
        while end < 0:
            check_head_bytes(self.received)
            yield READ
            end = self.received.find(END_OF_HEAD)
        raw_head = bytes(self.received[:end])
        del self.received[:end + len(END_OF_HEAD)]
        request.head = self.server.known_heads.get(raw_head)
        if request.head is None:
            check_head_bytes(raw_head)
            request.head = parse_head(raw_head)     # a refusal is counted by its route
            request.head = self.server.authorize(request.head)
            self.server.remember_head(raw_head, request.head)
        length = request.head.content_length
        self.loop.budget.require_capacity(length)
        if len(self.received) < length:
            if 'expect' in request.head.headers:
                self.sock.send(b'HTTP/1.1 100 Continue\r\n\r\n')
            while len(self.received) < length:
                yield READ
        request.body = bytes(self.received[:length])
        request.size = length
        del self.received[:length]

    def _dispatch(self, request):
        """The response of the handler, after the operation that it asks for."""
        head = request.head
        if head.rule.offload or len(request.body) >= BIG_BODY:
            result = yield from self._offload(self.server.handle, head, request.body)
        else:
            result = self.server.handle(head, request.body)
        if isinstance(result, (Operation, JobWait)):
            result = yield from self._run_operation(request, result)
        return result

    def _run_operation(self, request, operation):
        """The response once the operation has its result. A wait's job is read in a thread."""
        request.operation = operation
        request.body = None
        operation.client = self
        self.deadline = NEVER
        if operation.topic:
            request.size = 0        # what waits needs no memory
        try:
            waits = operation.submit(self.loop)
            result = (yield from self._wait_for_result()) if waits else None
        finally:
            if operation.topic:
                self.loop.waiters.withdraw(operation)
        if isinstance(operation, JobWait):
            return (yield from self._offload(operation.render, result))
        return operation.render(result)

    def _offload(self, function, *args):
        """Call the function in a thread of the server's."""
        self.deadline = NEVER
        self.loop.offload.submit(SlowCall(self, function, args))
        return (yield from self._wait_for_result())

    def _wait_for_result(self):
        """The event that is a result. Bytes that come meanwhile belong to the next request."""
        event = READY
        at_end = False
        while event is READY:
            try:
                event = yield 0 if at_end or len(self.received) > MAX_HEAD else READ
            except EOFError:
                if self.request.operation and self.request.operation.topic:
                    raise       # a job is for a client that is still there
                at_end = True
        return event

    def _begin_error(self, request, error, keep_alive):
        error = self.server.as_http_error(request.name, error)
        response = Response({'error': str(error)}, error.status, headers=tuple(error.headers))
        if error.status == 401 and request.name == '/':
            response = dashboard(401)       # the page is no secret, and asks for the token
        return self._begin_response(request, response, keep_alive)

    def _begin_response(self, request, response, keep_alive):
        """Set `unsent` to the bytes of the response; returns the file that follows, or None."""
        method, route = ('-', 'other')
        if request.head:
            method, route = request.head.method, request.head.route
        if not isinstance(response, Response):
            response = Response(response)
        body = encode_body(response.body)
        file = body if hasattr(body, 'read') else None
        length = os.fstat(file.fileno()).st_size if file else len(body)
        if method == 'GET' and not file:
            self.loop.budget.require_capacity(length)
        self.server.store.meter.request(route, response.status)
        if self.server.verbose:
            log(f'{self.address[0]} {method} {route} {response.status}')
        head = response_head(response.status, response.content_type, response.headers, keep_alive)
        if response.status != 204:
            head += b'Content-Length: %d\r\n\r\n' % length
        self.unsent = head if file or method == 'HEAD' else head + body
        if file and method == 'HEAD':
            file.close()
            return None
        return file

    def _send(self):
        """Send what the client takes at the moment. True once nothing is left."""
        try:
            sent = self.sock.send(self.unsent)
        except NOT_READY:
            return False
        self.unsent = memoryview(self.unsent)[sent:] if sent < len(self.unsent) else b''
        return not self.unsent

    def _send_rest(self):
        yield WRITE
        while not self._send():
            yield WRITE

    def _send_file(self, file):
        """Send what is left of the response, then the file piece by piece."""
        with file:
            while self.unsent:
                self.set_timeout(DEADLINE)
                if not self._send():
                    yield from self._send_rest()
                self.unsent = file.read(CHUNK)


def encode_body(body):
    """Bytes, or the file; JSON and text end in one line feed."""
    if isinstance(body, dict):
        body = encode(body)
    if isinstance(body, str):
        return (body if body.endswith('\n') else body + '\n').encode()
    return body


@functools.lru_cache(maxsize=256)
def response_head(status, content_type, headers, keep_alive):
    """The status line and headers, up to the content length; complete for 204, which has none."""
    lines = [f'HTTP/1.1 {status} {http.client.responses[status]}', *COMMON_HEADERS]
    lines += [f'{name}: {value}' for name, value in headers]
    if not keep_alive:
        lines.append('Connection: close')
    if status != 204:
        lines.append(f'Content-Type: {content_type}')
    end = '\r\n\r\n' if status == 204 else '\r\n'
    return ('\r\n'.join(lines) + end).encode('latin-1')


# handlers: (server, params) -> a response, or an Operation or JobWait whose result becomes one

def enqueue(server, params):
    producers = server.store.producers
    if isinstance(params, dict):
        return Operation(
            lambda transaction: producers.enqueue(transaction, [params]),
            lambda jobs: producers.render_created(jobs)[0],
            None if 'after' in params else params)
    return Operation(
        lambda transaction: producers.enqueue(transaction, params),
        lambda jobs: f'{{"jobs":{json_list(producers.render_created(jobs))}}}')


def poll(server, params):
    def render(jobs):
        if not jobs:
            return Response(status=204)
        texts = [job_json(job) for job in jobs]
        return json_list(texts) if 'limit' in params else texts[0]

    claims = server.store.claims
    topic = ('queue', params['queue'])
    wait = params.get('wait', 0) / 1000000
    return LongPoll(lambda transaction: claims.poll(transaction, params), render, topic, wait)


def write_call(name):
    """The handler that runs a method of the store, for one body or for each item of `jobs`."""
    method_of = operator.attrgetter(name)

    def handler(server, params):
        method = method_of(server.store)
        if isinstance(params, dict):
            return Operation(lambda transaction: method(transaction, params))
        apply_item = server.store.claims.apply_item
        return Operation(lambda transaction: {
            'jobs': [apply_item(transaction, method, item) for item in params]})
    return handler


def schedule(server, params):
    defaults = {**dict.fromkeys(SCHEDULE_FIELDS), 'priority': 0}
    if 'cron' in params:
        defaults['zone'] = 'UTC'
    wanted = {**defaults, **params}
    if 'cron' in params:
        cron_of(wanted['cron'], wanted['zone'])     # refused before a transaction begins
    return Operation(
        lambda transaction: server.store.schedules_.schedule(transaction, wanted),
        lambda found: schedule_json(found[0], created=found[1]))


def change_call(call):
    """The handler of cancel, retry and purge: of one job, or of all of a queue and status."""
    def change_one(server, params):
        operators = server.store.operators

        def work(transaction):
            job, _ = operators.require_status(transaction, call, params)
            getattr(operators, call)(transaction, job)
            return {'count': 1}
        return Operation(work)

    def change_many(server, params):
        operators = server.store.operators
        method = getattr(operators, call)
        statuses = [params['status']] if 'status' in params else SOURCES[call]
        count = 0
        for ids in operators.id_batches(params):
            count += server.loop.run_in_transaction(
                lambda transaction, ids=ids: operators.apply_to_batch(
                    transaction, method, ids, statuses))
        return {'count': count}

    def handler(server, params):
        if 'id' in params:
            if len(params) > 1:
                raise BadRequest('id names one job, and stands without queue and status')
            return change_one(server, params)
        if not server.change_slots.acquire(blocking=False):
            raise Unavailable('other changes of whole queues are under way; try again')
        try:
            return change_many(server, params)
        finally:
            server.change_slots.release()
    return handler


def get_job(server, params):
    """The job; with `wait`, once it has ended or the time is over."""
    queries = server.store.queries
    id = params['id']
    if 'wait' not in params:
        return queries.job(id)
    return JobWait(lambda: queries.has_ended(id), lambda _: queries.job(id),
                   ('job', id), params['wait'] / 1000000)


def list_jobs(server, params):
    """A page of jobs; with `id`, which a path cannot hold if it is like `..`, that job."""
    return get_job(server, params) if 'id' in params else server.store.queries.jobs(**params)


def backup(server, params):
    database = server.store.database
    name = urllib.parse.quote(os.path.basename(database.path))
    headers = (('Content-Disposition', f"attachment; filename*=UTF-8''{name}"),)
    return Response(database.backup(), 200, 'application/vnd.sqlite3', headers)


def read_call(name):
    """The handler that runs a method of the store's queries."""
    return lambda server, params: getattr(server.store.queries, name)(**params)


def metrics(server, params):
    return Response(exposition(server.store), content_type=PROMETHEUS)


def docs(server, params):
    return Response(__doc__, content_type=PLAIN_TEXT)


def dashboard(status=200):
    headers = (('Content-Security-Policy', POLICY),)
    return Response(DASHBOARD, status, 'text/html; charset=utf-8', headers)


class Route(NamedTuple):
    method: str
    handler: Callable
    required: Sequence[Sequence[str]]   # of each group at least one field
    rules: Dict[str, 'FieldRule']       # of all fields that it takes
    offload: bool                       # may take long: it is served in a thread


def route(method, handler, required=(), optional='', offload=False, **rules):
    """A Route; `required` is a list of fields, and of tuples of which one field is required.

    `optional` lists fields, separated by blanks. `rules` replace those in FIELDS.
    """
    required = [(group,) if isinstance(group, str) else group for group in required]
    fields = [*itertools.chain(*required), *optional.split()]
    return Route(method, handler, required,
                 {field: rules.get(field, FIELDS[field]) for field in fields}, offload)


def change_route(call, *required):
    sources = SOURCES[call]
    status = FieldRule('one of ' + ', '.join(sources), lambda value: value in sources, identity)
    return route('POST', change_call(call), required, offload=True, status=status)


ROUTES = {
    '/enqueue': route(
        'POST', enqueue, ['queue'],
        'payload timeout max_retries tag priority delay run_at key id jobs after after_any',
        after=IDS),
    '/poll': route(
        'POST', poll, ['queue'], 'limit wait worker lease max_retries timeout hung'),
    '/complete': route('POST', write_call('claims.complete'), ['id'], 'attempt result jobs'),
    '/fail': route('POST', write_call('claims.fail'), ['id'], 'attempt error retry delay jobs'),
    '/heartbeat': route(
        'POST', write_call('claims.heartbeat'), ['id'], 'attempt progress jobs'),
    '/release': route('POST', write_call('claims.release'), ['id'], 'attempt jobs'),
    '/cancel': change_route('cancel', ('id', 'queue'), ('id', 'status')),
    '/retry': change_route('retry', ('id', 'queue'), ('id', 'status')),
    '/purge': change_route('purge', ('queue', 'status')),
    '/pause': route('POST', write_call('operators.pause'), ['queue']),
    '/resume': route('POST', write_call('operators.resume'), ['queue']),
    '/limit': route('POST', write_call('operators.limit'), ['queue'], 'max_running rate per'),
    '/schedule': route(
        'POST', schedule, ['name', 'queue', ('cron', 'every')],
        'zone payload timeout max_retries tag priority key'),
    '/unschedule': route('POST', write_call('schedules_.unschedule'), ['name']),
    '/schedules': route('GET', read_call('schedules'), optional='limit after', offload=True),
    '/jobs/': route('GET', get_job, ['id'], 'wait', offload=True),
    '/status/': route('GET', get_job, ['id'], 'wait', offload=True),
    '/details/': route('GET', read_call('newest'), ['tag'], offload=True),
    '/jobs': route(
        'GET', list_jobs, optional='id queue status tag limit after brief needed_by',
        offload=True),
    '/queues': route('GET', read_call('queues'), optional='limit after busy', offload=True),
    '/metrics': route('GET', metrics, offload=True),
    '/health': route('GET', read_call('health')),
    '/backup': route('GET', backup, offload=True),
    '/docs': route('GET', docs),
    '/': route('GET', lambda server, params: dashboard()),
}


class RequestHandler(socketserver.BaseRequestHandler):
    """Serves a slow call in a thread of the server's: its `request` is a SlowCall."""

    def handle(self):
        call = self.request
        try:
            result = call.function(*call.args)
        except Exception as error:
            result = self.server.as_http_error(call.client.request.name, error)
        loop = self.server.loop
        loop.call_soon_threadsafe(functools.partial(loop.offload.finished, call, result))


class Server(http.server.ThreadingHTTPServer):
    """Listens, and knows who may come in. The event loop serves what is quick; the server's
    threads serve slow calls, as process_request() of socketserver has it: one thread each."""
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
        # touched by the loop's thread only
        self.known_heads = {}       # bytes -> authorized RequestHead
        # safe without a lock
        self.change_slots = threading.Semaphore(THREADS - 1)    # a thread is left to read
        self.failed = False         # the loop has come to a bad end
        super().__init__(address, RequestHandler)
        host = f'[{address[0]}]' if ':' in address[0] else address[0]
        self.url = f'{"https" if tls else "http"}://{host}:{self.server_address[1]}'

    def start(self, store):
        self.store = store
        self.loop = EventLoop(self, store)
        self.loop.thread.start()
        self.loop.run_in_transaction(lambda transaction: None)  # extends leases before polls come

    def get_request(self):
        try:
            if len(self.loop.connections) > self.loop.max_connections:
                raise OSError
            return super().get_request()
        except OSError:         # out of file descriptors: the connection stays in the backlog
            time.sleep(0.1)
            raise

    def process_request(self, request, client_address):
        """For serve_forever(): a new connection belongs to the loop."""
        self.loop.call_soon_threadsafe(
            functools.partial(Connection, self, request, client_address))

    def start_thread(self, call):
        """For the loop: have a RequestHandler serve a slow call in a thread."""
        super().process_request(call, call.client.address)

    def shutdown_request(self, request):
        """A slow call has no connection of its own to close."""
        if not isinstance(request, SlowCall):
            super().shutdown_request(request)

    def handle(self, head, body):
        """What the handler of the route makes of the request."""
        if head.method == 'POST':
            params = validate_batch(head.route, parse_json(body))
        else:
            params = parse_query(head)
        return head.rule.handler(self, params)

    def remember_head(self, raw, head):
        """Keep an authorized head, since clients send the same one again and again."""
        if len(raw) < MAX_KNOWN_HEAD_BYTES:
            if len(self.known_heads) >= MAX_KNOWN_HEADS:
                self.known_heads.clear()
            self.known_heads[raw] = head

    def authorize(self, head):
        """The head with its rule and content length, if this client may call it like this.

        This depends on the head and on constants alone, so the result may be kept.
        """
        self._check_host(head)
        if self.token and head.route != '/health':
            sent = head.headers.get('authorization', '').encode('latin-1')
            if not hmac.compare_digest(sent, b'Bearer ' + self.token):
                raise Unauthorized(
                    'the token is missing or wrong: send Authorization: Bearer TOKEN')
        rule = ROUTES.get(head.route)
        if not rule:
            raise NotFound(f'there is no {describe(head.path)}; GET /docs lists what there is')
        allowed = ('POST',) if rule.method == 'POST' else ('GET', 'HEAD')
        if head.method not in allowed:
            raise MethodNotAllowed(f'{head.route} takes {rule.method}', Allow=', '.join(allowed))
        self._check_origin(head)
        if rule.method == 'POST' and not JSON_TYPE.fullmatch(head.headers.get('content-type', '')):
            raise UnsupportedMediaType('Content-Type must be application/json')
        if rule.method == 'POST' and head.query:
            raise BadRequest(f'{head.route} takes its fields in the body, not in the query')
        return head._replace(rule=rule, content_length=self._content_length(head))

    def _check_host(self, head):
        """A foreign name may be one that an attacker's DNS has bound to this address."""
        header = head.headers.get('host', 'localhost')
        host = re.sub(r':\d*$', '', header).strip('[]').lower()
        if host in self.allowed_hosts or is_loopback(host):
            return
        if not address_of(host) or self.is_loopback_only:
            raise Misdirected(
                f'Host {describe(header)} is not a name of this engine; see --allow-host')

    def _check_origin(self, head):
        """Pages of other origins may link to the pages, and call nothing."""
        if head.route in ('/', '/docs', '/health'):
            return
        origin = head.headers.get('origin')
        is_foreign = origin is not None and origin.partition('://')[2] != head.headers.get('host')
        site = head.headers.get('sec-fetch-site', 'none')
        if is_foreign or site not in ('none', 'same-origin'):
            raise Forbidden(
                'Origin or Sec-Fetch-Site: pages of other origins may not call this engine')

    def _content_length(self, head):
        length = head.headers.get('content-length', None if head.method == 'POST' else '0')
        if length is None or 'transfer-encoding' in head.headers:
            raise LengthRequired('Content-Length is needed, and no Transfer-Encoding')
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
        """Do all that is due by now before this returns: for clocks that are moved by hand."""
        def is_due(transaction):
            return self.store.next_deadline <= self.store.clock.now()

        self.loop.call_soon_threadsafe(self.loop.committer.check_clock)
        while self.loop.run_in_transaction(is_due):
            pass

    def server_close(self):
        """Once serve_forever() has returned: let nobody in, answer what was received, and close
        the database."""
        super().server_close()
        if self.loop:
            self.loop.call_soon_threadsafe(self.loop.drain)
            self.loop.thread.join(DRAIN + BUSY)
            if not self.loop.thread.is_alive():     # else leave it as a crash would: SQLite copes
                self.store.database.close()


def address_of(name):
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name)


def is_loopback(name):
    return name == 'localhost' or getattr(address_of(name), 'is_loopback', False)


def log(sentence):
    """One line on stderr, whatever is in the sentence; nothing where stderr is gone."""
    line = UNPRINTABLE.sub(lambda match: f'\\x{ord(match[0]):02x}', sentence)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(time.strftime('%Y-%m-%d %H:%M:%S'), line, file=sys.stderr, flush=True)


# -- Metrics --------------------------------------------------------------------------------------
LABEL_ESCAPES = str.maketrans({'\\': r'\\', '"': r'\"', '\n': r'\n'})


class Family(NamedTuple):
    """A metric with its samples: texts that follow its name in the exposition."""
    name: str
    kind: str
    meaning: str
    samples: Iterable[str]


def exposition(store):
    """The metrics in the text format of Prometheus, version 0.0.4."""
    lines = []
    for family in metric_families(store):
        lines.append(f'# HELP rundown_{family.name} {family.meaning}\n')
        lines.append(f'# TYPE rundown_{family.name} {family.kind}\n')
        lines.extend(f'rundown_{family.name}{text}\n' for text in family.samples)
    return ''.join(lines)


def metric_families(store):
    queues, schedules = store.queries.metric_counts()
    now = store.clock.now()
    yield from queue_families(queues, now)
    yield from schedule_families(schedules, now)
    yield from meter_families(store.meter, {queue['queue'] for queue in queues})


def queue_families(queues, now):
    yield Family(
        'jobs', 'gauge',
        'Jobs by queue and status; scheduled and waiting ones are part of the pending ones.',
        (sample(queue[name], queue=queue['queue'], status=name)
         for queue in queues for name in (*STATUSES, 'scheduled', 'waiting')))
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
    """What happened since the start; queues without a name of their own are summed up."""
    totals = collections.Counter()
    with meter.lock:
        requests = dict(meter.requests)
        commit_sizes = list(meter.groups)
        histograms = {key: list(histogram) for key, histogram in meter.seconds.items()
                      if key[1] in named_queues}
        for (event, queue), count in meter.totals.items():
            totals[event, queue if queue in named_queues else '(others)'] += count
    for event in ('enqueued', 'completed', 'failed', 'lost', 'released', 'cancelled'):
        yield Family(
            f'{event}_total', 'counter', f'Jobs or attempts {event} since the start of the engine.',
            [sample(count, queue=queue) for (name, queue), count in totals.items()
             if name == event])
    for event, name, span in (('started', 'wait', 'due to claimed'),
                              ('completed', 'job', 'claimed to completed')):
        yield Family(
            f'{name}_seconds', 'histogram', f'Seconds from {span}.',
            [text for (kind, queue), histogram in histograms.items() if kind == event
             for text in histogram_samples(histogram, BUCKETS, queue=queue)])
    yield Family('commit_operations', 'histogram', 'Operations that share a commit.',
                 histogram_samples(commit_sizes, GROUPS))
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


# -- Command line ---------------------------------------------------------------------------------

def make_server(db='rundown.db', host='127.0.0.1', port=PORT, sync='full', token=None, cert=None,
                key=None, keep='7d', keep_failed='30d', allow_host=(), verbose=False, clock=time):
    """An engine that listens, ready for serve_forever(), and for server_close() after that.

    Port 0 takes a free one (see `url`). `keep` and `keep_failed` are ages like '7d', '12h', 0 for
    ever. `clock` has time() and monotonic(). Raises StartupError with a sentence when it cannot
    start like this.
    """
    if sqlite3.sqlite_version_info < (3, 24):
        raise StartupError(f'SQLite {sqlite3.sqlite_version} is too old; 3.24 or newer is needed')
    if not is_loopback(host) and not token:
        raise StartupError(f'to listen on {host or "all addresses"} a token is needed: '
                           'write a secret into a file and give --token-file FILE')
    if token and not re.fullmatch('[!-~]+', token):
        raise StartupError('the token must be of visible ASCII characters, without spaces')
    tls = tls_context(cert, key) if cert else None
    ages = [parse_duration(keep), parse_duration(keep_failed)]
    try:
        # first of all: a port that is taken leaves no file behind
        server = Server((host, port), token, tls, allow_host, verbose)
    except (OSError, OverflowError) as error:
        raise StartupError(f'{host}:{port} cannot be listened on: {error}') from None
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
        raise StartupError(f'--cert {cert} or --key {key} cannot be used: '
                           f'{error.strerror or error}') from None
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
        help='the address to listen on (127.0.0.1)')
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
    add('--verbose', action='store_true', help='a line per request')
    return parser.parse_args(argv)


def main(argv=None):
    """Serve until SIGTERM or SIGINT; the exit code."""
    options = vars(parse_arguments(argv))
    port = options.pop('port')
    token_file = options.pop('token_file')
    raise_file_limit()
    try:
        if not re.fullmatch('[0-9]{1,5}', port) or int(port) > 65535:
            raise StartupError(f'--port must be a number from 0 to 65535, not {port}')
        token = read_token(token_file) if token_file else os.environ.get('RUNDOWN_TOKEN')
        server = make_server(port=int(port), token=token, **options)
    except (StartupError, HTTPError, OSError, sqlite3.Error) as error:
        print(f'rundown_engine: {error}', file=sys.stderr)
        return 2
    stop_on_signals(server)
    gc.set_threshold(20000)     # requests leave few cycles; a search every 700 objects is felt
    print_greeting(server)
    server.serve_forever()
    server.server_close()
    return int(server.failed)


def stop_on_signals(server):
    def stop(*_):
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if hasattr(signal, 'SIGBREAK'):     # Windows
        signal.signal(signal.SIGBREAK, stop)


def print_greeting(server):
    secret = ' -H "Authorization: Bearer $RUNDOWN_TOKEN"' if server.token else ''
    with contextlib.suppress(OSError, ValueError, AttributeError):      # there may be no stdout
        print(f'Rundown engine on {server.url}, jobs in {server.store.database.path}; a first one: '
              f'curl -H "Content-Type: application/json"{secret} {server.url}/enqueue '
              '-d \'{"queue": "images", "payload": "a.jpg"}\'', flush=True)


def raise_file_limit():
    """A waiting worker is an open file: take as many as the system lets us."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536) if most > 0 else 65536, most))


# -- Dashboard --------------------------------------------------------------------------------------------------------
DASHBOARD = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Rundown-Workers</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --back: light-dark(#f5f5f2, #121518); --card: light-dark(#fff, #1a1e22);
  --text: light-dark(#1d2328, #e2e6e9); --soft: light-dark(#59636d, #9ba6b0); --line: light-dark(#dcdcd6, #30363c);
  --accent: light-dark(#0a5fb8, #74b6ff); --bad: light-dark(#b3261e, #ff8f85); }  * { box-sizing: border-box; }  a { color: var(--accent); }
body { margin: 0 auto; max-width: 90rem; padding: 0 1rem 4rem; background: var(--back); color: var(--text); overflow-wrap: anywhere;
  font: 14px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; }  .bad, .bad a { color: var(--bad); font-weight: 650; }
[hidden], p:empty, pre:empty, h2:has(+ :empty), table:has(tbody:empty), h2:has(+ table > tbody:empty), #login:not([hidden]) ~ main {
  display: none !important; }  /* what has nothing to show */  #home { font-weight: 650; margin-right: auto; }
header, form, #buttons { display: flex; flex-wrap: wrap; gap: .4rem .8rem; align-items: center; margin: .7rem 0; }
h1, h2 { font-size: 1rem; margin: 1.4rem 0 .4rem; outline: none; }  #notice { position: fixed; bottom: 0; border-color: var(--accent); }
button, input, select, table, pre, .box { font: inherit; color: var(--text); background: var(--card); border: 1px solid var(--line); }
button, input, select { border-color: var(--soft); border-radius: 5px; padding: .1rem .5rem; }  #offline { position: sticky; top: 0; }
button[aria-disabled=true] { color: var(--soft); border-color: var(--line); }  .armed { background: var(--bad); color: var(--card); }
td button { margin-right: .3rem; min-width: 4.3rem; font-size: .85rem; }  td button:last-child { min-width: 6rem; margin: 0; }
pre, .box { padding: .6rem .8rem; margin: .5rem 0; max-height: 30rem; overflow: auto; }  [data-attempt] { vertical-align: top; }
table { width: 100%; border-collapse: collapse; table-layout: fixed; }  tr { border-bottom: 1px solid var(--line); }
th, td { text-align: left; padding: .3rem .45rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
th, label, #updated, td.field { color: var(--soft); font-weight: 400; font-size: .85rem; }  td a, #home { text-decoration: none; }
pre, td.error { font: 12.5px/1.45 ui-monospace, monospace; }  pre, .box, .error, .state, .value { white-space: pre-wrap; }
.number { text-align: right; }  th.error { width: 50%; }  th.detail { width: 28%; }  th.queue { width: 13%; }  th.actions { width: 18rem; }
th.last_hour, th.state { width: 8.6rem; }  th.field { width: 8rem; }
svg { display: block; width: 120px; stroke: var(--accent); stroke-width: 1.6; }  svg .bad { stroke: var(--bad); }
@media (max-width: 78rem) { table:not(#fields) {  /* each row becomes a card, its cells carry their headings */
  thead { position: fixed; clip-path: inset(50%); }  &, tbody, td { display: block; padding: 0; text-align: left; white-space: pre-wrap; }
  tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr)); gap: .4rem .8rem; padding: .6rem .8rem; }
  td:before { content: attr(data-label); display: block; color: var(--soft); font: .85rem system-ui, sans-serif; }
  .queue, .worker, .state, .last_hour { grid-column: span 2; }  td:first-child, .actions, .detail, .error { grid-column: 1 / -1; } } }
</style><header><a id="home" href="#">Rundown-Workers</a> <noscript>this page needs JavaScript, the engine does not</noscript>
  <span id="updated"></span> <a id="manual" href="/docs">manual</a></header> <p id="offline" class="box bad" role="alert"></p>
<p id="notice" class="box" role="status"></p> <form id="login" method="dialog" class="box" hidden>
  <label for="token">this engine asks for its token</label> <input id="token" type="password" autocomplete="current-password" required
    pattern="[!-~]+" title="visible ASCII characters"> <button>open</button> <span id="refused" class="bad" role="alert"></span></form>
<main id="list" hidden><h2>Queues</h2><table id="queues"></table> <h2>Schedules</h2><table id="schedules"></table>
  <h2>Workers seen</h2><table id="workers"></table> <h2>Newest jobs</h2> <form id="filter" method="dialog" role="search">
  <label>queue <input name="queue" autocomplete="off"></label> <label>status <select name="status"><option value="">any<option>pending
  <option>running<option>done<option>failed<option>cancelled</select></label> <label>tag <input name="tag" autocomplete="off"></label>
  <button>filter</button> <a href="#">all jobs</a></form> <table id="jobs"></table> <p id="older"></p> <pre id="example" tabindex="0"></pre>
</main><main id="page" hidden><h1 id="title" tabindex="-1"></h1> <div id="job" hidden><p id="why" class="box"></p> <p id="buttons"></p>
  <h2>Error</h2><pre id="error" tabindex="0"></pre> <h2>Payload</h2><pre id="payload" tabindex="0"></pre> <h2>Result</h2>
  <pre id="result" tabindex="0"></pre> <h2>Waits or waited for</h2><p id="after"></p> <h2>Needed by</h2><p id="needed_by"></p>
  <h2>Attempts</h2><table id="attempts"></table> <h2>Fields</h2><table id="fields"></table></div>
  <p id="missing" class="box" hidden>There is no job with this id. It may have been purged.</p></main>
<script>
"use strict";
let turn = 0, timer = 0, skew = 0, place = {}, armed = "";  // an answer to an older turn is dropped; skew: engine's clock - ours, ms
const $ = id => document.getElementById(id);
const fill = contents => { for (const id in contents) put($(id), contents[id]); };
const age = (time, now = Date.now() + skew) => (now - Date.parse(time)) / 1000;
const span = s => s < 10 ? Math.max(0, s).toFixed(1) + " s" : s < 120 ? Math.round(s) + " s" : s < 7200 ? Math.round(s / 60) + " min"
  : s < 172800 ? Math.round(s / 3600) + " h" : Math.round(s / 86400) + " d";
const ago = time => !time ? "never" : age(time) < 0 ? "in " + span(-age(time)) : span(age(time)) + " ago";
const hash = filter => "#" + new URLSearchParams(Object.entries(filter).filter(pair => pair[1]));
const link = (href, label, title = "") => el("a", {href, title}, label);
const job = (id, label = id) => link("#job/" + encodeURIComponent(id), label, id);
const exact = (key, value, source) =>  // where the browser can, 1.0 stays 1.0 and 2^63 keeps its digits
  JSON.rawJSON && typeof value === "number" && String(value) !== source.source ? JSON.rawJSON(source.source) : value;
function el(tag, attributes, ...children) {  // data enters as text and attributes, never as markup
  const node = document.createElementNS("http://www.w3.org/" + (/svg|path/.test(tag) ? "2000/svg" : "1999/xhtml"), tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  node.append(...children.flat().map(child => typeof child === "number" ? child.toLocaleString("en") : child ?? ""));
  return node;
}
function put(node, content) {  // text, a node or several, in place, so that focus, selection and a click that has begun are not lost
  if (typeof content === "boolean") { node.hidden = !content; return; }  // or whether it is shown
  const keyed = nodes => new Map(Array.from(nodes, (child, i) => [child.nodeName + (child.dataset?.key ?? i), child]));
  const old = keyed(node.childNodes), next = keyed(el("p", {}, content).childNodes);
  for (const [key, child] of old) if (!next.has(key) && !(child.dataset?.key && child.contains(document.activeElement))) child.remove();
  [...next].forEach(([key, child], i) => {
    const kept = old.get(key) || child;
    if (kept.data !== child.data) kept.data = child.data;
    for (const {name, value} of child.attributes || []) kept.setAttribute(name, value);
    if (kept !== child && child.attributes) put(kept, [...child.childNodes]);
    if (node.childNodes[i] !== kept) node.insertBefore(kept, node.childNodes[i]);
  });
}
function button(label, able, about, action = label.replace(" ", "-")) {
  const sure = action === "purge" && armed === about.queue;  // "disabled" instead of aria-disabled would drop the focus
  const attributes = {"data-action": action, "data-about": JSON.stringify(about), "aria-disabled": !able, class: sure ? "armed" : ""};
  return el("button", attributes, sure ? "sure?" : label);
}
function plot({done, failed}) {  // done rises from the base line, failed hangs below it, in one scale
  const high = Math.max(...done), low = Math.max(...failed), unit = 25 / Math.max(1, high + low), base = 1.5 + (low ? high * unit : 25);
  const bars = (values, up) => values.map((n, i) => n ? `M${2 * i + 1} ${base}v${up * Math.max(1, n * unit)}` : "").join("");
  const sum = values => values.reduce((a, b) => a + b).toLocaleString("en");
  const label = `last hour: ${sum(done)} done, ${sum(failed)} failed, at most ${high} done in a minute`;
  return el("svg", {role: "img", viewBox: "0 0 120 28", "aria-label": label},
    el("path", {d: bars(done, -1) + `M0 ${base}H120`}), el("path", {d: bars(failed, 1), class: "bad"}));
}
// tables: the first column names the row; a cell shows the field of its column's name, a time as its age, or what CELLS says; * is a number
const TABLES = {queues: "queue pending* scheduled* running* done* failed* oldest* jobs/min* last_hour state actions", fields: "field value",
  workers: "worker queue seen_at* running* hung_threads*", jobs: "job queue tag status attempt* worker created_at* detail",
  attempts: "attempt worker started_at* took* outcome error", schedules: "schedule queue ticks next_run_at* last_run* skipped*"};
const CELLS = {job: ({id}) => job(id, id.length > 16 ? "…" + id.slice(-12) : id),  // ids begin with the time, alike in all rows
  queue: ({queue}) => link(hash({queue}), queue), tag: ({tag}) => tag && link(hash({tag}), tag), schedule: schedule => schedule.name,
  took: ({started_at, finished_at}) => started_at && finished_at ? span(age(started_at, Date.parse(finished_at))) : "",
  hung_threads: worker => worker.hung, oldest: queue => queue.oldest_age === null ? "–" : span(queue.oldest_age),
  ticks: ({cron, zone, every}) => cron ? cron + " " + zone : "every " + span(every), last_hour: queue => plot(queue.minutes),
  last_run: ({last_id, last_run_at}) => last_id ? job(last_id, ago(last_run_at)) : ago(last_run_at),
  "jobs/min": ({minutes: {done, failed}}) =>  // of the last 60 s: this minute, and the part of the one before that this one lacks
    Math.round(done[59] + failed[59] + (done[58] + failed[58]) * (1 - (Date.now() + skew) % 60000 / 60000)),
  state: ({paused, polled_at, running, max_running, rate, per}) => (paused ? "paused" : !polled_at ? "no worker yet"
    : age(polled_at) < 120 || running ? "open" : "no worker " + span(age(polled_at)))
    + (max_running ? `, max ${max_running}` : "") + (rate ? `, ${rate} per ${per} s` : ""),
  actions: ({queue, paused, failed, done}) => [button(paused ? "resume" : "pause", true, {queue}),
    button("retry failed", failed, {queue, status: "failed"}), button("purge done", done, {queue, status: "done"}, "purge")],
  detail: job => [{done: "took " + CELLS.took(job), running: job.progress !== null && "progress " + JSON.stringify(job.progress),
    pending: job.waits_for ? `waits for ${job.waits_for} job(s)` : age(job.next_run_at) < 0 && "due " + ago(job.next_run_at)}[job.status],
    (job.error || "").trim().split("\n").pop()].filter(Boolean).join(" ")};
for (const status of ["pending", "running", "done", "failed"]) CELLS[status] = row => link(hash({queue: row.queue, status}), row[status]);
const BAD = /^(failed|hung_threads) [1-9]|^status failed|^state (paused|no worker)/;
function cells(id, item) {  // of the item's row; without an item the headings
  return TABLES[id].split(" ").map(column => {
    const key = column.replace("*", ""), label = key.replace(/_at$/, "").replaceAll("_", " "), role = item ? "cell" : "columnheader";
    const content = !item ? label : key in CELLS ? CELLS[key](item) : key.endsWith("_at") ? ago(item[key]) : item[key];
    const cell = el(item ? "td" : "th", {role, "data-count": key, "data-label": label}, content), shown = cell.textContent;
    const className = key + (column === key ? " " : " number ") + (BAD.test(`${key} ${shown}`) ? "bad" : "");
    return Object.assign(cell, {className, title: key === "actions" ? "" : shown});
  });
}
function draw(tables) {  // the same item keeps its row, so that focus, scroll and selection stay; a row in focus stays anyway
  for (const [id, items] of Object.entries(tables)) put($(id).tBodies[0], items.map(item => {
    const first = TABLES[id].split(" ")[0], name = item[first] ?? item.id ?? item.name;
    return el("tr", {role: "row", ["data-" + first]: name, "data-key": name + " " + item.queue}, cells(id, item));
  }));
}
function list({queues, workers}, {schedules}, {jobs, after}) {
  workers.sort((a, b) => a.queue.localeCompare(b.queue) || a.worker.localeCompare(b.worker));  // rows that stay where they are
  draw({queues, schedules, workers, jobs});
  fill({older: after && link(hash({...place, after}), "older"), example: jobs.length ? "" : `# no job here; how to enqueue one:
curl -H 'Content-Type: application/json' -d '{"queue": "hello", "payload": "world"}' ${location.origin}/enqueue`});
}
function page({why, error, attempts, payload, result, after = [], needed_by = [], ...fields}) {
  const {id, status} = fields, links = ids => ids.flatMap(id => [job(id), " "]);
  const json = (value, text = JSON.stringify(value, null, 2)) =>
    text.length > 200000 ? text.slice(0, 200000) + " ... (cut here; GET /jobs/ID has the rest)" : text;
  const buttons = [button("retry", /failed|cancelled/.test(status), {id}), button("cancel", /pending|running/.test(status), {id})];
  fill({why, buttons, error, payload: json(payload), result: result === null ? "" : json(result),
    after: links(after), needed_by: links(needed_by)});
  draw({attempts, fields: Object.entries(fields).map(([field, value]) => ({field, value: value === null ? "–" : typeof value !== "string"
    ? JSON.stringify(value) : field.endsWith("_at") ? new Date(value).toLocaleString("sv") + ", " + ago(value) : value}))});
}
async function call(path, body, reviver) {  // what the engine answers; throws {status, message}
  const {token} = sessionStorage, headers = {"Content-Type": "application/json", ...token && {Authorization: "Bearer " + token}};
  const options = {method: body ? "POST" : "GET", headers, body: JSON.stringify(body), signal: AbortSignal.timeout(body ? 60000 : 10000)};
  const read = async answer => [answer.status, JSON.parse(await answer.text(), reviver)];
  const [status, content] = await fetch(path, options).then(read).catch(() => [0]);  // no answer, or none in JSON
  if (status === 200) return content;
  throw {status, message: status ? "the engine says: " + content.error : "engine does not answer, trying again"};
}
async function refresh() {
  const mine = ++turn, began = Date.now(), {id} = place, {token} = sessionStorage;
  clearTimeout(timer);
  if (document.hidden) return;
  const path = "/jobs?" + hash(id ? place : {...place, limit: 50, brief: true}).slice(1);  // the path /jobs/ID cannot hold the id ".."
  try {
    const [queues, schedules, found] = await Promise.all([call("/queues?busy=true&limit=100"), call("/schedules?limit=100"),
      call(path, undefined, id && exact).catch(failure => { if (failure.status !== 404) throw failure; })]);
    if (mine !== turn) return;
    skew = Date.parse(queues.now) - Date.now();
    if (!id) list(queues, schedules, found); else if (found) page(found);
    fill({job: !!found, missing: !found, manual: !token, updated: "at " + new Date().toLocaleTimeString("sv"), offline: ""});
  } catch ({status, message}) {
    if (mine !== turn) return;
    fill({login: status === 401, offline: status === 401 ? "" : message, refused: token ? "the engine refused this token" : ""});
    if (status === 401) return $("token").focus();
  }
  timer = setTimeout(refresh, Math.max(2000, 4 * (Date.now() - began)));
}
async function press({action, about}) {
  const arm = queue => { armed = queue; refresh(); }, {id, queue, status} = JSON.parse(about);
  if (action === "purge" && armed !== queue)  // wants a second press, and a double click is not one
    return [setTimeout(arm, 300, queue), setTimeout(arm, 5000, "")];
  const said = await call("/" + action.replace("-failed", ""), {id, queue, status}).catch(failure => failure);
  fill({notice: `${action} ${id || queue}: ${said.message || ("count" in said ? said.count + " job(s)" : "ok")}`});
  setTimeout(fill, 6000, {notice: ""});
  arm("");
}
function route() {
  place = Object.fromEntries(new URLSearchParams(location.hash.slice(1).replace(/^job\//, "id=")));
  for (const name of ["queue", "status", "tag"]) $("filter")[name].value = place[name] || "";
  const title = document.title = place.id ? "job " + place.id : "Rundown-Workers";
  fill({title, list: !place.id, page: !!place.id, job: false, missing: false});
  if (place.id) { $("title").focus(); scrollTo(0, 0); }  // back in the history, the browser restores the scroll
  else if (document.activeElement.closest("#queues, #workers")) $("filter").scrollIntoView({block: "nearest"});
  refresh();
}
for (const id in TABLES) Object.assign($(id), {role: "table", ariaLabel: id}).append(
  el("thead", {role: "rowgroup"}, el("tr", {role: "row"}, cells(id))), el("tbody", {role: "rowgroup"}));
$("filter").onsubmit = $("filter").onchange = () => { location.hash = hash(Object.fromEntries(new FormData($("filter")))); };
$("login").onsubmit = () => { sessionStorage.token = $("token").value; location.reload(); };
document.onclick = ({target}) => { const button = target.closest("[aria-disabled=false]"); if (button) press(button.dataset); };
window.onload = window.onhashchange = route;
document.onvisibilitychange = refresh;
</script>"""

# The Content-Security-Policy of the page: its own style and script by their digests, its own engine, nothing else.
POLICY = '; '.join([*(
    f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    for tag, text in re.findall('<(style|script)>(.*?)</', DASHBOARD, re.DOTALL)), "default-src 'none'",
    "connect-src 'self'", 'img-src data:', "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])

if __name__ == '__main__':
    sys.exit(main())
