"""Jobs are limited for each user and each endpoint; they are counted in memory or in Redis."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from ourvidz_serverless import settings
from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import ModelLoadError, RateLimited
from ourvidz_serverless.guard.rate_limits import (
    AWAY_S,
    MAX_WINDOWS,
    Counter,
    FallbackCounter,
    MemoryCounter,
    RateLimits,
    RedisCounter,
    UpstashCounter,
)
from ourvidz_serverless.net.plain_redis import PlainRedis
from ourvidz_serverless.net.retries import Fault, Retry
from ourvidz_serverless.net.upstash import Upstash
from ourvidz_serverless.settings import Rate, Settings
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.patience import PATIENCE_S, start, wait_until
from tests.servers import handler
from tests.servers.handler import failure
from tests.servers.redis import RedisRestServer, RedisServer
from tests.servers.runpod import Platform

MakeLocal = Callable[..., LocalWorker]
TWO = Rate(2, 60, "2/minute")
LIMITED = Settings(rate_limit_user="2/minute")
DAY = 24 * 3600
PATIENT = Retry(base_s=0.01, try_s=30.0)
PASSWORD = "a-password"


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def rest_server(redis: RedisServer) -> Iterator[RedisRestServer]:
    redis.call("FLUSHALL")
    with RedisRestServer(redis) as server:
        yield server


def upstash_counter(
    rest_server: RedisRestServer, endpoint: str = "sdxl", token: str | None = None
) -> UpstashCounter:
    client = Upstash(rest_server.url, token or rest_server.token)
    return UpstashCounter(client, endpoint, PATIENT)


def redis_counter(url: str, endpoint: str = "sdxl") -> RedisCounter:
    return RedisCounter(PlainRedis(url, PATIENCE_S), endpoint, PATIENT)


@pytest.fixture
def redis_url(redis: RedisServer) -> str:
    redis.call("FLUSHALL")
    return f"unix://{redis.socket}"


@pytest.fixture(params=["redis", "upstash"])
def shared_counter(request: pytest.FixtureRequest) -> Counter:
    if request.param == "redis":
        return redis_counter(request.getfixturevalue("redis_url"))
    return upstash_counter(request.getfixturevalue("rest_server"))


@pytest.fixture(params=["memory", "redis", "upstash"])
def counter(request: pytest.FixtureRequest) -> Counter:
    if request.param == "memory":
        return MemoryCounter()
    if request.param == "redis":
        return redis_counter(request.getfixturevalue("redis_url"))
    return upstash_counter(request.getfixturevalue("rest_server"))


def outcomes(limits: RateLimits, users: str) -> str:
    """A character for each job: `.` if it is accepted, `x` if it is over a limit."""

    def outcome(user: str) -> str:
        try:
            limits.check(user)
        except RateLimited:
            return "x"
        return "."

    return "".join(map(outcome, users))


# --- which jobs are accepted ---


def test_a_users_jobs_are_accepted_up_to_the_limit(counter: Counter) -> None:
    assert outcomes(RateLimits({"user": TWO}, counter), "aaaa") == "..xx"


def test_each_user_has_a_limit_of_its_own(counter: Counter) -> None:
    assert outcomes(RateLimits({"user": TWO}, counter), "aaabab") == "..x.x."


def test_all_users_share_the_endpoints_limit(counter: Counter) -> None:
    assert outcomes(RateLimits({"endpoint": TWO}, counter), "abc") == "..x"


def test_jobs_over_a_users_limit_do_not_count_against_the_endpoints(counter: Counter) -> None:
    limits = RateLimits({"user": TWO, "endpoint": Rate(4, 60, "4/minute")}, counter)

    assert outcomes(limits, "aaaaaabbc") == "..xxxx..x"


def test_without_rates_nothing_is_counted(rest_server: RedisRestServer) -> None:
    assert outcomes(RateLimits({}, upstash_counter(rest_server)), "aaaa") == "...."
    assert rest_server.pipelines == []


def test_a_refusal_names_the_limit_and_the_seconds_to_wait(counter: Counter) -> None:
    limits = RateLimits({"user": Rate(1, 3600, "1/hour")}, counter)
    limits.check("a")

    with pytest.raises(RateLimited, match="over the limit of 1/hour for this user") as refused:
        limits.check("a")

    assert refused.value.retry_after is not None
    assert 3000 < refused.value.retry_after <= 3600


def test_jobs_at_the_same_time_are_each_counted(counter: Counter) -> None:
    limits = RateLimits({"user": Rate(20, 3600, "20/hour")}, counter)

    counting = [start(outcomes, limits, "a" * 5) for _ in range(8)]

    all_outcomes = "".join(each.result(PATIENCE_S) for each in counting)
    assert (all_outcomes.count("."), all_outcomes.count("x")) == (20, 20)


# --- windows ---


def test_a_window_in_memory_closes_after_its_length_however_many_came() -> None:
    now = [0.0]
    limits = RateLimits({"user": TWO}, MemoryCounter(clock=lambda: now[0]))
    assert outcomes(limits, "aaa") == "..x"

    now[0] = 59.9
    assert outcomes(limits, "a") == "x"
    now[0] = 60.0
    assert outcomes(limits, "aaa") == "..x"


def test_a_window_in_redis_is_set_once_and_closed_by_redis(
    shared_counter: Counter, redis: RedisServer
) -> None:
    limits = RateLimits({"user": TWO}, shared_counter)
    limits.check("a")
    redis.call("PEXPIRE", "ourvidz:sdxl:user:a:60", 50_000)

    outcomes(limits, "a")

    assert redis.call("PTTL", "ourvidz:sdxl:user:a:60") <= 50_000
    redis.call("PEXPIRE", "ourvidz:sdxl:user:a:60", 0)
    assert outcomes(limits, "aaa") == "..x"


def test_a_count_in_redis_without_an_expiry_gets_one_again(
    shared_counter: Counter, redis: RedisServer
) -> None:
    redis.call("SET", "ourvidz:sdxl:user:a:60", 7)

    assert outcomes(RateLimits({"user": TWO}, shared_counter), "a") == "x"
    assert redis.call("TTL", "ourvidz:sdxl:user:a:60") > 0


def test_the_wait_for_a_window_that_redis_has_just_closed_is_zero(shared_counter: Counter) -> None:
    # Redis removes a key whose window has no length, before it answers how long the key lives.
    assert shared_counter.count("user:a", 0) == (1, 0.0)


def test_the_number_of_windows_in_memory_is_bounded() -> None:
    counter = MemoryCounter()

    for i in range(3 * MAX_WINDOWS):
        counter.count(f"user-{i}", 60)

    assert counter.num_windows <= MAX_WINDOWS


def test_a_full_memory_forgets_the_windows_that_close_first() -> None:
    now = [0.0]
    limits = RateLimits({"user": TWO}, MemoryCounter(clock=lambda: now[0]))
    for i in range(MAX_WINDOWS):
        limits.check(f"early-{i}")
    now[0] = 30.0
    assert outcomes(limits, "aaa") == "..x"

    now[0] = 61.0
    for i in range(MAX_WINDOWS // 4):
        limits.check(f"late-{i}")

    assert outcomes(limits, "a") == "x"


# --- shared ---


def test_two_workers_of_an_endpoint_count_together(redis_url: str) -> None:
    shared = Settings(rate_limit_user="2/minute", redis_url=SecretStr(redis_url))
    one, other = (RateLimits.of(shared, "sdxl") for _ in range(2))

    assert outcomes(one, "a") + outcomes(other, "aa") == "..x"


def test_workers_with_redis_and_workers_with_upstash_count_together(
    redis_url: str, rest_server: RedisRestServer
) -> None:
    one = RateLimits({"user": TWO}, redis_counter(redis_url))
    other = RateLimits({"user": TWO}, upstash_counter(rest_server))

    assert outcomes(one, "a") + outcomes(other, "aa") == "..x"


def test_two_endpoints_of_one_redis_count_separately(redis_url: str) -> None:
    one = RateLimits({"endpoint": TWO}, redis_counter(redis_url, "sdxl"))
    other = RateLimits({"endpoint": TWO}, redis_counter(redis_url, "chat"))

    assert outcomes(one, "aaa") + outcomes(other, "aa") == "..x.."


def test_jobs_are_counted_in_redis_if_the_environment_names_one(
    rest_server: RedisRestServer,
) -> None:
    shared = Settings(
        rate_limit_endpoint="2/minute",
        upstash_redis_rest_url=rest_server.url,
        upstash_redis_rest_token=SecretStr(rest_server.token),
    )

    assert outcomes(RateLimits.of(shared, "sdxl"), "abc") == "..x"
    assert len(rest_server.pipelines) == 3
    assert outcomes(RateLimits.of(LIMITED), "aaa") == "..x"
    assert len(rest_server.pipelines) == 3


# --- an outage of Redis ---


@dataclass
class Away:
    """A shared counter that fails as long as `is_out`."""

    is_out: bool = True
    is_away = False
    policy = PATIENT
    asked: int = 0
    answers: threading.Event = field(default_factory=threading.Event)

    def count(self, key: str, window_s: int) -> tuple[int, float]:
        self.asked += 1
        self.answers.wait(PATIENCE_S)
        if self.is_out:
            raise Fault(503)
        return 1, 60.0


def test_while_redis_is_away_a_worker_counts_its_own_jobs_and_logs_it_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counter = FallbackCounter(redis_counter(f"unix://{tmp_path}/nothing"))

    assert outcomes(RateLimits({"user": TWO}, counter), "aabab") == "...x."
    (line,) = caplog.messages
    assert line.startswith("rate limits: Redis does not count (no answer); until it does, ")


def test_an_outage_of_redis_does_not_delay_each_job() -> None:
    away = Away()
    away.answers.set()

    outcomes(RateLimits({"user": TWO}, FallbackCounter(away)), "abcdef")

    assert away.asked == PATIENT.tries


def test_while_one_job_asks_redis_again_the_others_do_not_wait_for_it() -> None:
    now, away = [0.0], Away()
    away.answers.set()
    limits = RateLimits({"user": TWO}, FallbackCounter(away, clock=lambda: now[0]))
    limits.check("a")
    away.answers.clear()
    now[0] = AWAY_S

    asking = start(outcomes, limits, "b")
    wait_until(lambda: away.asked > PATIENT.tries)
    others = outcomes(limits, "ccc")
    away.answers.set()

    assert (others, asking.result(PATIENCE_S)) == ("..x", ".")


def test_redis_counts_again_after_its_outage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now, away = [0.0], Away()
    away.answers.set()
    limits = RateLimits({"user": TWO}, FallbackCounter(away, clock=lambda: now[0]))
    assert (outcomes(limits, "aaa"), limits.is_away) == ("..x", True)

    away.is_out, now[0] = False, AWAY_S

    assert (outcomes(limits, "aaa"), limits.is_away) == ("...", False)
    assert caplog.messages[-1] == "rate limits: Redis counts again"


def test_a_killed_redis_loses_no_job(
    local: MakeLocal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ourvidz.audit")
    with RedisServer() as server:
        url = SecretStr(f"unix://{server.socket}")
        at = local(settings=Settings(rate_limit_user="2/minute", redis_url=url))
        at.run(sdxl_payload(id="job-1"))

    codes = [code(at.run(sdxl_payload(id=f"job-{i}"))) for i in (2, 3, 4)]

    assert codes == [None, None, "RATE_LIMITED"]
    own = "by this worker's own count"
    assert [line["rate"] for line in audited(caplog)] == [
        "within",
        *[f"within, {own}"] * 2,
        f"over, {own}",
    ]


def test_a_url_that_is_none_of_redis_ends_the_start() -> None:
    wrong = Settings(rate_limit_user="2/minute", redis_url=SecretStr("http://a-secret"))

    with pytest.raises(ModelLoadError, match=r"^REDIS_URL: Input should be a redis:// URL$"):
        RateLimits.of(wrong)


def test_without_rates_a_worker_does_not_read_the_bridges_redis_url() -> None:
    assert RateLimits.of(Settings(redis_url=SecretStr("http://a-secret"))).rates == {}


# --- settings ---


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("60/minute", (60, 60)),
        (" 5 / second ", (5, 1)),
        ("1/hour", (1, 3600)),
        ("9/day", (9, 86400)),
    ],
)
def test_a_rate_is_a_number_of_jobs_in_a_unit_of_time(text: str, rate: tuple[int, int]) -> None:
    read = Settings(rate_limit_user=text).rate_limit_user

    assert read is not None
    assert (read.jobs, read.window_s) == rate


@pytest.mark.parametrize("text", ["60", "0/minute", "-1/minute", "60/week", "a/minute", "1.5/hour"])
def test_an_invalid_rate_ends_the_start(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("RATE_LIMIT_USER", text)

    with pytest.raises(ModelLoadError, match="RATE_LIMIT_USER: Input should be JOBS/second"):
        settings.read()


# --- a job ---


def code(document: Document) -> str | None:
    return document.failure.code if document.failure else None


def audited(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [each for each in caplog.records if each.name == "ourvidz.audit"]
    return [json.loads(each.message) for each in lines]


def test_the_failure_of_a_job_over_the_limit_has_the_seconds_to_wait(local: MakeLocal) -> None:
    at = local(settings=LIMITED)

    codes = [code(at.run(sdxl_payload(id=f"job-{i}"))) for i in range(2)]
    refused = at.run().callback()

    assert codes == [None, None]
    assert refused["error"]["code"] == "RATE_LIMITED"
    assert refused["error"]["retryable"] is True
    assert 0 < refused["error"]["retry_after"] <= 60
    assert len(at.fake_sdxl.requests) == 2


def test_a_job_of_another_endpoint_is_not_counted(local: MakeLocal) -> None:
    at = local(settings=LIMITED)

    for _ in range(5):
        assert code(at.run(sdxl_payload(type="video_fast"))) == "WORKER_UNAVAILABLE"

    assert at.run().status == "completed"


def test_administrative_jobs_do_not_count_against_the_limits(local: MakeLocal) -> None:
    everybody = Settings(rate_limit_user="2/minute", rate_limit_endpoint="2/minute")
    at = local(settings=everybody)
    question = {"type": "admin_utilities", "config": {"operation": "status"}}

    for i in range(5):
        asked = {"id": f"admin-{i}", "user_id": "user-1", **question}
        assert at.run(asked).status == "completed"

    assert [code(at.run(sdxl_payload(id=f"job-{i}"))) for i in range(3)] == [
        None,
        None,
        "RATE_LIMITED",
    ]


def test_administrative_jobs_run_when_the_limit_is_reached(local: MakeLocal) -> None:
    at = local(settings=LIMITED)
    for i in range(3):
        at.run(sdxl_payload(id=f"job-{i}"))

    asked = {"id": "admin-1", "user_id": "user-1", "type": "admin_utilities"}

    assert at.run({**asked, "config": {"operation": "status"}}).status == "completed"


def test_a_job_that_cannot_be_counted_is_refused_if_the_limits_fail_closed(
    local: MakeLocal, rest_server: RedisRestServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ourvidz.audit")
    closed = Settings(
        rate_limit_user="2/minute",
        rate_limit_fail_open=False,
        upstash_redis_rest_url=rest_server.url,
        upstash_redis_rest_token=SecretStr("wrong"),
    )

    document = local(settings=closed).run()

    assert code(document) == "WORKER_UNAVAILABLE"
    assert audited(caplog)[0]["rate"] == "not counted: HTTP 401"


@pytest.mark.parametrize("kind", ["REDIS_URL", "UPSTASH_REDIS_REST_URL"])
def test_the_handler_counts_in_redis_and_shows_no_secret(
    redis: RedisServer, redis_url: str, rest_server: RedisRestServer, tmp_path: Path, kind: str
) -> None:
    servers = {
        "REDIS_URL": {"REDIS_URL": f"{redis_url}?password={PASSWORD}&username=default"},
        "UPSTASH_REDIS_REST_URL": {
            "UPSTASH_REDIS_REST_URL": rest_server.url,
            "UPSTASH_REDIS_REST_TOKEN": rest_server.token,
        },
    }
    env = {
        "STORAGE_URL": f"file:{tmp_path}",
        "RATE_LIMIT_USER": "1/hour",
        "RUNPOD_ENDPOINT_ID": "endpoint-7",
        **servers[kind],
    }
    with Platform() as own, handler.start(own, **env) as process:
        first, second = (own.submit(sdxl_payload(id=f"job-{i}")) for i in range(2))
        own.result(first)
        own.result(second)

        refused = [job for job in (first, second) if own.status(job)["status"] == "FAILED"]
        assert len(refused) == 1
        assert failure(own.status(refused[0]))["code"] == "RATE_LIMITED"
    assert redis.call("GET", "ourvidz:endpoint-7:user:user-1:3600") == "2"
    assert rest_server.token not in process.log
    assert PASSWORD not in process.log
