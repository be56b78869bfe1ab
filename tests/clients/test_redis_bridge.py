"""The bridge from the application's Redis lists: a real Redis, the platform, and the real loop."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless import jobs
from ourvidz_serverless.client.routes import Endpoints
from ourvidz_serverless.client.services import Connection
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.job_types import SYNONYMS, job_type
from ourvidz_serverless.net.retries import Fault, Retry
from ourvidz_serverless.net.upstash import Upstash
from ourvidz_serverless.serving import redis_bridge
from ourvidz_serverless.serving.redis_bridge import Bridge, NotAJob
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import chat_payload, sdxl_payload, wan_payload
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.local_server import json_answer
from tests.servers.redis import RedisRestServer, RedisServer
from tests.servers.runpod import Platform
from tests.servers.worker_process import WorkerProcess

#: Endpoints without workers: jobs stay in the queue.
ENDPOINTS = {"sdxl": "pictures", "chat": "chats", "wan": "videos"}
QUEUE = "sdxl_queue"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def redis(server: RedisServer) -> RedisServer:
    server.call("FLUSHALL")
    return server


@pytest.fixture
def rest_server(redis: RedisServer) -> Iterator[RedisRestServer]:
    with RedisRestServer(redis) as running:
        yield running


@pytest.fixture(params=["plain", "rest"])
def redis_settings(
    request: pytest.FixtureRequest, redis: RedisServer, rest_server: RedisRestServer
) -> dict[str, str]:
    """The settings that name the Redis."""
    return plain(redis) if request.param == "plain" else rest(rest_server)


def plain(redis: RedisServer) -> dict[str, str]:
    return {"REDIS_URL": f"unix://{redis.socket}"}


def rest(rest_server: RedisRestServer) -> dict[str, str]:
    return {
        "UPSTASH_REDIS_REST_URL": rest_server.url,
        "UPSTASH_REDIS_REST_TOKEN": rest_server.token,
    }


def env_of(platform: Platform, redis_settings: dict[str, str], **changes: str) -> dict[str, str]:
    ids = {f"{family.upper()}_ENDPOINT_ID": name for family, name in ENDPOINTS.items()}
    env = {
        "RUNPOD_API_KEY": platform.caller_key,
        "RUNPOD_BASE_URL": platform.caller_url,
        "BRIDGE_POLL_S": "0.05",
        "WORKER_API_KEY": "worker-key",
    }
    return {**env, **ids, **redis_settings, **changes}


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Retry(tries=redis_bridge.OUTAGE_RETRY.tries, base_s=0.01, max_s=0.05)
    monkeypatch.setattr(redis_bridge, "OUTAGE_RETRY", fast)


@contextmanager
def bridged(platform: Platform, redis_settings: dict[str, str], **changes: str) -> Iterator[Bridge]:
    """A bridge in a thread of this process. It ends with the block."""
    env = {
        name.lower(): value for name, value in env_of(platform, redis_settings, **changes).items()
    }
    running = Bridge.of(Settings(**env))  # type: ignore[arg-type]
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        yield running
    finally:
        running.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def process(platform: Platform, redis_settings: dict[str, str], **changes: str) -> WorkerProcess:
    env = env_of(platform, redis_settings, **changes)
    return WorkerProcess(None, "-m", env=env, cwd=ROOT, args=["ourvidz_serverless", "bridge"])


def push(redis: RedisServer, *items: Any, queue: str = QUEUE, command: str = "RPUSH") -> None:
    for item in items:
        redis.call(command, queue, item if isinstance(item, str) else json.dumps(item))


def pictures(*names: int) -> list[dict[str, Any]]:
    return [sdxl_payload(id=f"job-{name}") for name in names]


def accepted(platform: Platform, endpoint: str = "pictures") -> list[str]:
    return [job["input"]["id"] for job in platform.queued(endpoint)]


def wait_for_jobs(platform: Platform, count: int, endpoint: str = "pictures") -> None:
    what = f"{count} jobs at {endpoint}"
    platform.wait_until(lambda: len(platform.queued(endpoint)) >= count, what=what)


def listed_ids(redis: RedisServer, *parts: str) -> list[str]:
    """The ids of the jobs in a list, left to right."""
    items = redis.call("LRANGE", ":".join((QUEUE, *parts)), "0", "-1")
    return [json.loads(item)["id"] for item in items]


def job_ids(*numbers: int) -> list[str]:
    return [f"job-{number}" for number in numbers]


# --- in order ---


@pytest.mark.parametrize(("command", "end"), [("LPUSH", "right"), ("RPUSH", "left")])
def test_jobs_leave_a_list_in_the_order_in_which_they_were_pushed(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str], command: str, end: str
) -> None:
    push(redis, *pictures(1, 2, 3, 4, 5), command=command)

    with bridged(scripted, redis_settings, BRIDGE_TAKE_FROM=end):
        wait_for_jobs(scripted, 5)

    assert accepted(scripted) == job_ids(1, 2, 3, 4, 5)
    assert listed_ids(redis) == listed_ids(redis, "processing") == listed_ids(redis, "dead") == []


def test_jobs_that_are_pushed_while_the_bridge_runs_are_submitted_in_order(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str]
) -> None:
    with bridged(scripted, redis_settings):
        push(redis, *pictures(1, 2))
        wait_for_jobs(scripted, 2)
        push(redis, *pictures(3))
        wait_for_jobs(scripted, 3)

    (first, *_) = scripted.queued("pictures")
    assert accepted(scripted) == job_ids(1, 2, 3)
    assert first["input"] == {**sdxl_payload(id="job-1"), "api_key": "worker-key"}


def test_each_list_goes_to_the_endpoint_of_the_jobs_family(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str]
) -> None:
    push(redis, sdxl_payload(), queue="sdxl_queue")
    push(redis, chat_payload(), queue="chat_queue")
    push(redis, wan_payload(type="wan_video_fast"), queue="wan_queue")

    with bridged(scripted, redis_settings):
        for endpoint in ENDPOINTS.values():
            wait_for_jobs(scripted, 1, endpoint)


def test_lists_may_have_other_names(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str]
) -> None:
    push(redis, *pictures(1), queue="one")
    push(redis, *pictures(2), queue="other")

    with bridged(scripted, redis_settings, BRIDGE_QUEUES="one, other"):
        wait_for_jobs(scripted, 2)

    assert sorted(accepted(scripted)) == job_ids(1, 2)


# --- as the application pushes ---


def as_the_application_pushes(rest_server: RedisRestServer, payload: dict[str, Any]) -> None:
    """The request of the application's `queue-job`, byte for byte."""
    requests.post(
        f"{rest_server.url}/rpush/{QUEUE}",
        headers={
            "Authorization": f"Bearer {rest_server.token}",
            "Content-Type": "application/json",
        },
        data=compact([compact(payload)]).encode(),
        timeout=PATIENCE_S,
    ).raise_for_status()


def compact(value: Any) -> str:
    """`JSON.stringify(value)`."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def test_items_as_queue_job_pushes_them_are_submitted_first_in_first_out(
    redis: RedisServer,
    rest_server: RedisRestServer,
    scripted: Platform,
    redis_settings: dict[str, str],
) -> None:
    pushed = pictures(1, 2, 3)
    for payload in pushed:
        as_the_application_pushes(rest_server, payload)
    (item, *_) = redis.call("LRANGE", QUEUE, "0", "-1")

    with bridged(scripted, redis_settings):
        wait_for_jobs(scripted, 3)

    inputs = [job["input"] for job in scripted.queued("pictures")]
    assert item == compact([compact(pushed[0])])
    assert inputs == [{**payload, "api_key": "worker-key"} for payload in pushed]
    assert redis.call("KEYS", f"{QUEUE}*") == []


@pytest.mark.parametrize("wrap", [lambda job: [job], lambda job: [compact(job)]])
def test_a_list_of_one_job_is_that_job(wrap: Callable[[Any], Any]) -> None:
    (job,) = pictures(1)

    assert redis_bridge.read(compact(wrap(job))) == job


# --- nothing is lost ---


@pytest.mark.usefixtures("fast_retries")
@pytest.mark.parametrize(
    "steps", [[503, 502, 500], [(429, {"Retry-After": "0"}), 408], ["reset", "reset"], [401, 404]]
)
def test_the_bridge_waits_until_an_outage_of_the_platform_ends(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str], steps: list[Any]
) -> None:
    push(redis, *pictures(1, 2, 3))
    scripted.script([200, *steps])

    with bridged(scripted, redis_settings):
        wait_for_jobs(scripted, 3)

    assert accepted(scripted) == job_ids(1, 2, 3)
    assert listed_ids(redis, "dead") == []


def test_an_outage_of_one_endpoint_does_not_delay_another(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str]
) -> None:
    scripted.script_path = "/pictures/run"
    scripted.script([503] * 1000)
    push(redis, *pictures(1))
    push(redis, *[chat_payload(id=f"talk-{i}") for i in range(5)], queue="chat_queue")

    with bridged(scripted, redis_settings):
        wait_for_jobs(scripted, 5, "chats")

    assert listed_ids(redis) == job_ids(1)


def test_an_outage_that_outlasts_the_process_leaves_the_list_as_it_was(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str]
) -> None:
    push(redis, *pictures(1, 2, 3))
    scripted.script([200, *[503] * 1000])

    with bridged(scripted, redis_settings):
        scripted.wait_until(lambda: len(scripted.script_left) < 1000)

    assert accepted(scripted) == job_ids(1)
    assert listed_ids(redis) == job_ids(2, 3)
    assert listed_ids(redis, "processing") == []


@pytest.mark.usefixtures("fast_retries")
@pytest.mark.parametrize("misbehaviour", ["slow", "reset", 503])
@pytest.mark.parametrize("at", range(4))
def test_an_answer_of_redis_that_is_lost_loses_no_job_and_no_order(
    redis: RedisServer,
    rest_server: RedisRestServer,
    scripted: Platform,
    monkeypatch: pytest.MonkeyPatch,
    misbehaviour: str | int,
    at: int,
) -> None:
    monkeypatch.setattr(redis_bridge, "REDIS_S", 0.2)
    rest_server.slow_seconds = 0.5
    push(redis, *pictures(1, 2, 3))
    rest_server.script([*[200] * at, misbehaviour])

    with bridged(scripted, rest(rest_server), BRIDGE_QUEUES=QUEUE):
        wait_for_jobs(scripted, 3)

    assert list(dict.fromkeys(accepted(scripted))) == job_ids(1, 2, 3)
    assert listed_ids(redis) == listed_ids(redis, "processing") == []


#: Commands that make a real Redis refuse changes of a list, and commands that end that.
FAILOVERS = {
    "READONLY": (["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"]),
    "OOM": (["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"]),
    "NOREPLICAS": (
        ["CONFIG", "SET", "min-replicas-to-write", "1"],
        ["CONFIG", "SET", "min-replicas-to-write", "0"],
    ),
}


def wait_for_error(redis: RedisServer, kind: str) -> None:
    """Wait until the server has answered an error of this kind."""
    deadline = time.monotonic() + PATIENCE_S
    while f"errorstat_{kind}:" not in redis.call("INFO", "errorstats"):
        assert time.monotonic() < deadline, f"Redis never said {kind}"
        time.sleep(0.02)


@pytest.mark.usefixtures("fast_retries")
@pytest.mark.parametrize("kind", FAILOVERS)
def test_the_bridge_waits_while_redis_refuses_commands_for_a_time(
    redis: RedisServer,
    scripted: Platform,
    redis_settings: dict[str, str],
    kind: str,
) -> None:
    begins, ends = FAILOVERS[kind]
    push(redis, *pictures(1, 2, 3))
    redis.call("CONFIG", "RESETSTAT")
    redis.call(*begins)
    try:
        with bridged(scripted, redis_settings, BRIDGE_QUEUES=QUEUE):
            wait_for_error(redis, kind)
            redis.call(*ends)
            wait_for_jobs(scripted, 3)
    finally:
        redis.call(*ends)

    assert accepted(scripted) == job_ids(1, 2, 3)
    assert listed_ids(redis) == listed_ids(redis, "processing") == []


@pytest.mark.usefixtures("fast_retries")
def test_a_failover_to_another_server_of_the_same_name_is_followed(
    redis: RedisServer, scripted: Platform, tmp_path: Path
) -> None:
    name = tmp_path / "redis.sock"
    name.symlink_to(redis.socket)
    opened = redis_bridge.open_redis(Settings(redis_url=f"unix://{name}"))
    assert opened.call("LLEN", QUEUE) == 0

    with RedisServer() as promoted:
        push(promoted, *pictures(1))
        redis.call("REPLICAOF", "127.0.0.1", "1")
        name.unlink()
        name.symlink_to(promoted.socket)
        try:
            with pytest.raises(Fault, match="READONLY") as demoted:
                opened.call("LMOVE", QUEUE, "other", "LEFT", "RIGHT")
            assert demoted.value.is_transient
            assert opened.call("LMOVE", QUEUE, "other", "LEFT", "RIGHT")
        finally:
            redis.call("REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ("LOADING Redis is loading the dataset in memory", True),
        ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", True),
        ("CLUSTERDOWN The cluster is down", True),
        ("TRYAGAIN Multiple keys request during rehashing of slot", True),
        ("BUSY Redis is busy running a script.", True),
        ("MISCONF Redis is configured to save RDB snapshots", True),
        ("ERR max number of clients reached", True),
        ("ERR max daily request limit exceeded. Limit: 10000, Usage: 10000.", True),
        ("ERR max requests limit exceeded.", True),
        ("ERR max request size exceeded", False),
        ("ERR unknown command 'LMOVE'", False),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", False),
        ("WRONGPASS invalid username-password pair or user is disabled.", False),
        ("NOAUTH Authentication required.", False),
        ("NOPERM User default has no permissions to run the 'lmove' command", False),
    ],
)
def test_errors_of_redis_that_end_by_themselves_are_transient_and_others_are_not(
    rest_server: RedisRestServer, redis_settings: dict[str, str], said: str, passes: bool
) -> None:
    opened = redis_bridge.open_redis(
        Settings(**{name.lower(): value for name, value in redis_settings.items()})
    )

    with pytest.raises(Fault) as refused:
        opened.call("EVAL", "return redis.error_reply(ARGV[1])", "0", said)

    assert refused.value.is_transient is passes


@pytest.mark.parametrize(
    ("said", "passes"),
    [("ERR max daily request limit exceeded. Limit: 10000", True), ("ERR empty command", False)],
)
def test_an_error_of_upstash_for_the_request_is_read(
    rest_server: RedisRestServer, said: str, passes: bool
) -> None:
    rest_server.script([json_answer({"error": said}, 400)])
    upstash = redis_bridge.UpstashRedis(Upstash(rest_server.url, rest_server.token))

    with pytest.raises(Fault, match="Redis says ERR") as refused:
        upstash.call("LLEN", QUEUE)

    assert refused.value.is_transient is passes


def test_a_bridge_that_is_killed_after_the_platform_accepted_a_job_submits_it_again(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str]
) -> None:
    push(redis, *pictures(1, 2, 3, 4))
    scripted.slow_seconds = 60
    scripted.script([200, "slow"])
    with process(scripted, redis_settings) as killed:
        wait_for_jobs(scripted, 2)
        killed.kill()
    held = listed_ids(redis, "processing")

    with bridged(scripted, redis_settings):
        wait_for_jobs(scripted, 5)

    # Twice under one id: the worker runs it once at a time, and a second run has the same files.
    assert held == job_ids(2)
    assert accepted(scripted) == job_ids(1, 2, 2, 3, 4)
    assert listed_ids(redis) == listed_ids(redis, "processing") == []


def test_jobs_that_several_processes_left_claimed_go_back_in_order(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str]
) -> None:
    push(redis, *pictures(1, 2, 3, 4))
    for _ in range(3):
        redis.call("LMOVE", QUEUE, f"{QUEUE}:processing", "LEFT", "RIGHT")

    with bridged(scripted, redis_settings):
        wait_for_jobs(scripted, 4)

    assert accepted(scripted) == job_ids(1, 2, 3, 4)


def test_a_job_without_an_id_gets_the_same_id_at_every_try(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str]
) -> None:
    nameless = {"type": "sdxl_image_fast", "prompt": "a red sun"}
    push(redis, nameless, nameless)

    with bridged(scripted, redis_settings):
        wait_for_jobs(scripted, 2)

    one, other = accepted(scripted)
    assert one == other


# --- items that are no jobs ---

POISON = {
    "{": "it is not JSON",
    '{"type": "sdxl_image_fast", "seed": NaN}': "it is not JSON",
    '{"type": "sdxl_image_fast", "seed": 1e999}': "it is not JSON",
    "[" * 100_000: "it is not JSON",
    "": "it is not JSON",
    "[1]": "it is not an object",
    '["{"]': "it is not JSON",
    '[[{"type": "sdxl_image_fast"}]]': "it is not an object",
    '["[{}]"]': "it is not an object",
    '[{"type": "sdxl_image_fast"}, {"type": "sdxl_image_fast"}]': "it is not an object",
    '"{}"': "it is not an object",
    '{"id": "job-9", "type": "poem"}': "its type is none of the job types",
    '{"id": "job-9", "prompt": "a zebra"}': "its type is none of the job types",
    '{"type": "video_fast"}': "no endpoint serves wan",
}


@pytest.mark.parametrize("raw", POISON, ids=lambda raw: raw[:32] or "nothing")
def test_an_item_that_is_no_job_goes_to_the_dead_list_with_its_reason(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str], raw: str
) -> None:
    push(redis, *pictures(1), raw, *pictures(2))

    with bridged(scripted, redis_settings, WAN_ENDPOINT_ID=""):
        wait_for_jobs(scripted, 2)

    (dead,) = map(json.loads, redis.call("LRANGE", f"{QUEUE}:dead", "0", "-1"))
    assert (dead["reason"], dead["payload"]) == (POISON[raw], raw)
    assert dead["at"] > 0
    assert accepted(scripted) == job_ids(1, 2)
    assert redis.call("KEYS", f"{QUEUE}*") == [f"{QUEUE}:dead"]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_job_that_the_platform_never_accepts_goes_to_the_dead_list(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str], status: int
) -> None:
    push(redis, *pictures(1, 2))
    scripted.script([status])

    with bridged(scripted, redis_settings):
        wait_for_jobs(scripted, 1)

    (dead,) = map(json.loads, redis.call("LRANGE", f"{QUEUE}:dead", "0", "-1"))
    assert dead["reason"].startswith("the platform refuses it: POST http://")
    assert dead["reason"].endswith(f"/run: HTTP {status}")
    assert accepted(scripted) == job_ids(2)


def test_a_job_that_the_worker_refuses_is_submitted_and_reported_by_callback(
    redis: RedisServer, scripted: Platform, redis_settings: dict[str, str]
) -> None:
    push(redis, sdxl_payload(id="job-1", config={"num_images": 7}))

    with bridged(scripted, redis_settings):
        wait_for_jobs(scripted, 1)

    assert listed_ids(redis, "dead") == []


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
TYPES = st.sampled_from([*jobs.FAMILY_OF, *SYNONYMS]) | JSON


@given(st.text() | st.builds(json.dumps, JSON | st.fixed_dictionaries({"type": TYPES})))
def test_every_text_is_either_a_job_with_an_id_or_no_job(raw: str) -> None:
    try:
        payload = redis_bridge.read(raw)
    except NotAJob:
        return

    assert payload["id"]
    assert job_type(payload)


@given(st.sampled_from([*jobs.FAMILY_OF]), JSON)
def test_every_job_has_an_endpoint(name: str, config: Any) -> None:
    routes = Endpoints(ENDPOINTS, Connection("https://runpod.test"))

    assert routes.family_of({"type": name, "config": config}) in ENDPOINTS


# --- the process ---


def test_sigterm_submits_the_claimed_job_and_leaves_the_others(
    redis: RedisServer, scripted: Platform
) -> None:
    push(redis, *pictures(1, 2, 3))
    # Enough time for the signal to arrive on a slow machine.
    scripted.slow_seconds = 5
    scripted.script([200, "slow"])

    with process(scripted, plain(redis)) as running:
        wait_for_jobs(scripted, 2)
        running.terminate()
        assert running.wait() == 0

    assert accepted(scripted) == job_ids(1, 2)
    assert listed_ids(redis) == job_ids(3)
    assert listed_ids(redis, "processing") == []


def test_the_log_has_one_line_a_job_and_no_prompt(redis: RedisServer, scripted: Platform) -> None:
    zebra = "an unmistakable zebra"
    push(redis, sdxl_payload(prompt=zebra), {"type": zebra}, '{"type": "unmistakable')

    with process(scripted, plain(redis)) as running:
        running.wait_for_log("it is not JSON")
        log = running.log

    (line,) = [each for each in log.splitlines() if "→" in each]
    assert "sdxl_queue → sdxl_image_fast(job-1) is " in line
    assert line.endswith(" at pictures")
    assert len([each for each in log.splitlines() if "✗" in each]) == 2
    assert "unmistakable" not in log


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"RUNPOD_API_KEY": None}, "RUNPOD_API_KEY, one of SDXL_ENDPOINT_ID"),
        (dict.fromkeys(("SDXL_ENDPOINT_ID", "CHAT_ENDPOINT_ID", "WAN_ENDPOINT_ID"), ""), "RUNPOD"),
        ({"BRIDGE_QUEUES": ","}, "RUNPOD_API_KEY, one of"),
        ({"REDIS_URL": None}, "REDIS_URL: needed"),
        ({"REDIS_URL": "http://a-secret"}, "REDIS_URL: Input should be"),
    ],
)
def test_a_missing_setting_of_the_bridge_is_named_at_the_start(
    redis: RedisServer, scripted: Platform, changes: dict[str, Any], says: str
) -> None:
    env = {**env_of(scripted, plain(redis)), **changes}

    with pytest.raises(ModelLoadError) as wrong:
        Bridge.of(Settings(**{name.lower(): value for name, value in env.items()}))

    assert wrong.value.message.startswith(says)
    assert "a-secret" not in wrong.value.message


def test_a_start_that_fails_ends_with_one_clear_line(scripted: Platform) -> None:
    with process(scripted, {"BRIDGE_TAKE_FROM": "top"}) as running:
        assert running.wait() == 1

    (line,) = running.log.splitlines()
    assert line.startswith("cannot start: BRIDGE_TAKE_FROM: ")


def test_a_redis_that_refuses_ends_the_process(
    rest_server: RedisRestServer, scripted: Platform
) -> None:
    wrong = {**rest(rest_server), "UPSTASH_REDIS_REST_TOKEN": "wrong"}

    with process(scripted, wrong) as running:
        assert running.wait() == 1

    assert running.log.splitlines()[-1] == "Redis refuses: HTTP 401"
    assert "Traceback" not in running.log


def test_a_key_that_is_no_list_is_a_permanent_fault(
    redis: RedisServer, redis_settings: dict[str, str]
) -> None:
    redis.call("SET", QUEUE, "a string")
    opened = redis_bridge.open_redis(
        Settings(**{name.lower(): value for name, value in redis_settings.items()})
    )

    with pytest.raises(Fault) as refused:
        opened.call("LMOVE", QUEUE, "other", "LEFT", "RIGHT")

    assert not refused.value.is_transient


@pytest.mark.parametrize("url", ["unix:///no/such/socket", "redis://127.0.0.1:1"])
def test_a_redis_that_cannot_be_reached_is_a_transient_fault(url: str) -> None:
    with pytest.raises(Fault) as absent:
        redis_bridge.open_redis(Settings(redis_url=url)).call("PING")

    assert absent.value.is_transient


# --- from the list to the picture ---


@pytest.mark.usefixtures("worker")
def test_a_job_that_the_application_pushes_is_rendered_by_the_real_loop(
    redis: RedisServer,
    platform: Platform,
    redis_settings: dict[str, str],
    receiver: WorkerProcess,
    outputs: Path,
) -> None:
    name = f"from-{'redis' if 'REDIS_URL' in redis_settings else 'upstash'}"
    push(redis, sdxl_payload(id=name))

    with bridged(platform, redis_settings, SDXL_ENDPOINT_ID="local"):
        receiver.wait_for_log(f'"job":"{name}"')

    assert (outputs / f"user-1/{name}/0.png").exists()
