from __future__ import annotations

import signal
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from tests.fake_vllm import (
    AWAKE,
    DONE,
    FINISHED,
    FIRST_TOKENS,
    PREFILL,
    TOKEN,
    WAITING,
    FakeVllm,
    beside,
    counted,
    hang,
    refuse,
    reply,
    stream,
    usage,
)
from tests.loopback import COMPUTED, PROMPT, RUNNING, START

from kvtally.agent.probe.api import Served
from kvtally.agent.probe.engine import Engine
from kvtally.agent.probe.measure import Probe, Probed, measure
from kvtally.agent.probe.passive import passive_probes
from kvtally.agent.probe.plan import announce, plan, prompt_tokens
from kvtally.agent.request_log import Request
from kvtally.collectors.base import CollectError

if TYPE_CHECKING:
    import socket

    from tests.fake_vllm import Act, Sent

LENGTHS = (600, 1200, 2400)
WARM_UP = 1200
TINY = Served("tiny", 4096)


class Clock:
    """Time passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept = 0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += 1


def probed(vllm: FakeVllm, seconds_max: float = 300.0, vocabulary: int | None = None) -> Probed:
    clock = Clock()
    with closing(Engine(f"{vllm.url}/metrics", answer_seconds=30)) as engine:
        return measure(
            engine, TINY, LENGTHS, vocabulary=vocabulary, seconds_max=seconds_max, clock=clock, sleep=clock.sleep
        )


def sent_lengths(vllm: FakeVllm) -> list[int]:
    return [len(one.json["prompt"]) for one in vllm.completions]


# the plan


def test_a_plan_goes_from_512_to_32768_tokens_in_seven_steps() -> None:
    assert plan(131_072) == (512, 1024, 2048, 4096, 8192, 16_384, 32_768)


def test_a_plan_ends_where_the_model_ends_with_room_for_one_token() -> None:
    # 512 x (4095/512)^(i/6): each is 1.4141 times the one before
    assert plan(4096) == (512, 724, 1024, 1448, 2048, 2896, 4095)


def test_a_plan_begins_lower_for_a_short_model() -> None:
    # 249 x (999/249)^(i/6): each is 1.2606 times the one before
    assert plan(1000) == (249, 314, 396, 499, 629, 793, 999)


def test_a_plan_has_the_token_budget_among_its_lengths() -> None:
    # 5,000 is 1.22 times 4,096, and 8,192 is 1.64 times 5,000
    assert plan(131_072, 5000) == (512, 1024, 2048, 5000, 8192, 16_384, 32_768)
    assert plan(4096, 8192) == plan(4096)


def test_a_plan_keeps_below_the_tokens_that_may_be_sent() -> None:
    # the longest shrinks by quarters: 32,768, 24,576, 18,432, 13,824, 10,368, 7,776
    lengths = plan(131_072, tokens_max=50_000)
    assert lengths == (512, 806, 1268, 1995, 3140, 4941, 7776)
    assert prompt_tokens(lengths) == 2 * 20_438 + 1995
    assert plan(131_072, tokens_max=42_871) == lengths
    assert plan(131_072, tokens_max=42_870) != lengths


@pytest.mark.parametrize(("limit", "tokens_max"), [(128, 200_000), (0, 200_000), (131_072, 1000)])
def test_no_plan_is_made_where_no_prompt_of_128_tokens_may_be_sent(limit: int, tokens_max: int) -> None:
    with pytest.raises(CollectError, match="no prompts of 128 tokens can be sent"):
        plan(limit, tokens_max=tokens_max)


def test_what_is_announced_names_every_prompt_and_what_it_does_to_the_engine() -> None:
    text = announce(plan(131_072), "llama", "http://gpu-7:8000", tokens_per_second=10_000)
    # 2 x (512 + 1,024 + ... + 32,768) = 2 x 65,024, and 4,096 to warm up
    assert "15 prompts with 134,144 tokens in all to llama at http://gpu-7:8000, one at a time" in text
    assert "2 each of 512, 1,024, 2,048, 4,096, 8,192, 16,384, 32,768 tokens, after one to warm up" in text
    assert "about 14 s at 10,000 tokens a second, and ends after 300 s in any case" in text
    for what in (
        "No user's text is read or sent",
        "only while the engine has no other request",
        "the ledger",
        "blocks",
    ):
        assert what in text
    assert max(map(len, text.splitlines())) <= 120


def test_what_is_announced_promises_no_duration_that_nobody_knows() -> None:
    assert "seconds on a large GPU and minutes on a CPU" in announce((512,), "llama", "http://gpu-7:8000")


# an engine that is left alone


def test_every_length_is_measured_twice_after_a_prompt_that_is_not_counted() -> None:
    with FakeVllm() as vllm:
        result = probed(vllm)
        assert sent_lengths(vllm) == [WARM_UP, 600, 1200, 2400, 600, 1200, 2400]
    assert result.discarded == 0
    assert not result.stopped
    assert [probe.prompt_tokens for probe in result.probes] == [600, 1200, 2400, 600, 1200, 2400]


def test_the_seconds_are_those_by_which_the_engine_s_own_prefill_time_grew() -> None:
    with FakeVllm() as vllm:
        vllm.add(PREFILL, 5000)
        result = probed(vllm)
    assert [probe.source for probe in result.probes] == ["engine"] * 6
    assert [probe.seconds for probe in result.probes[:3]] == pytest.approx([600e-6, 1200e-6, 2400e-6], rel=1e-6)


def test_the_seconds_are_the_client_s_where_the_engine_shows_no_prefill_time() -> None:
    waits = threading.Event()

    def slow(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        waits.wait(0.05)
        return vllm.serve(connection, sent)

    with FakeVllm(FakeVllm.serve, slow) as vllm:
        vllm.hidden.add(PREFILL)
        result = probed(vllm)
    assert [probe.source for probe in result.probes] == ["ttft"] * 6
    assert 0.05 <= result.probes[0].seconds < 30


def test_a_prompt_is_of_random_tokens_under_a_salt_of_its_own_and_asks_for_one_token() -> None:
    with FakeVllm() as vllm:
        probed(vllm)
        bodies = [one.json for one in vllm.completions]
    for body in bodies:
        assert {key: body[key] for key in ("model", "max_tokens", "temperature", "stream")} == {
            "model": "tiny",
            "max_tokens": 1,
            "temperature": 0,
            "stream": True,
        }
    assert len({body["cache_salt"] for body in bodies}) == 7
    assert all(len(body["cache_salt"]) == 32 for body in bodies)
    assert len({tuple(body["prompt"][:16]) for body in bodies}) == 7


@pytest.mark.parametrize(
    ("vocabulary", "least", "most"),
    [(None, 256, 1023), (4096, 1024, 4095), (128_256, 1024, 31_999), (512, 128, 511)],
)
def test_token_ids_are_plain_ones_of_the_vocabulary(vocabulary: int | None, least: int, most: int) -> None:
    with FakeVllm() as vllm:
        probed(vllm, vocabulary=vocabulary)
        ids = {token for one in vllm.completions for token in one.json["prompt"]}
    assert least <= min(ids) < least + (most - least) / 4
    assert most - (most - least) / 4 < max(ids) <= most


def test_what_is_measured_is_told_at_once() -> None:
    told: list[Probe] = []
    with FakeVllm() as vllm, closing(Engine(f"{vllm.url}/metrics")) as engine:
        result = measure(engine, TINY, LENGTHS, told=told.append)
    assert tuple(told) == result.probes


def test_an_engine_of_several_ranks_is_counted_as_a_whole() -> None:
    # the second rank is another FakeEngine's lines; prompts go to the first
    with FakeVllm() as vllm:
        for key in list(vllm.counters._values):
            if 'engine="0"' in key:
                vllm.counters._values[key.replace('engine="0"', 'engine="1"')] = vllm.counters._values[key]
        result = probed(vllm)
        assert len(result.probes) == 6
        assert not result.discarded
        vllm.counters.set(WAITING.replace('engine="0"', 'engine="1"'), 1)
        with pytest.raises(CollectError, match="0 requests run and 1 wait"):
            probed(vllm)


@pytest.mark.parametrize("at_once", [(), (FIRST_TOKENS,)], ids=["nothing", "the first token"])
def test_an_engine_that_counts_late_is_waited_for(at_once: tuple[str, ...]) -> None:
    def late(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        prompt, pages = len(sent.json["prompt"]), 0
        for key in at_once:
            vllm.add(key, 1)

        def after_three(vllm: FakeVllm) -> None:
            nonlocal pages
            pages += 1
            if pages == 3:
                vllm.count(prompt)
                for key in at_once:
                    vllm.add(key, -1)

        vllm.before_page = after_three
        reply(connection, TOKEN, usage(prompt), DONE)
        return True

    with FakeVllm(*[late] * 7) as vllm:
        result = probed(vllm)
    assert [probe.source for probe in result.probes] == ["engine"] * 6
    assert result.discarded == 0


# an engine that is not


@pytest.mark.parametrize(("key", "words"), [(RUNNING, "2 requests run and 0 wait"), (WAITING, "0 requests run and 2")])
def test_a_busy_engine_is_sent_nothing(key: str, words: str) -> None:
    with FakeVllm() as vllm:
        vllm.counters.set(key, 2)
        with pytest.raises(CollectError, match=words):
            probed(vllm)
        assert vllm.completions == []


def test_an_engine_that_answers_others_in_the_first_second_is_sent_nothing() -> None:
    with FakeVllm() as vllm:
        vllm.before_page = lambda vllm: vllm.count(100)
        with pytest.raises(CollectError, match="requests come all the time"):
            probed(vllm)
        assert vllm.completions == []


def test_a_sleeping_engine_is_sent_nothing() -> None:
    with FakeVllm() as vllm:
        vllm.counters.set(AWAKE, 0)
        with pytest.raises(CollectError, match="the engine sleeps"):
            probed(vllm)
        assert vllm.completions == []


@pytest.mark.parametrize("key", [RUNNING, WAITING, FIRST_TOKENS, PROMPT])
@pytest.mark.parametrize("how", ["hidden", "NaN"])
def test_an_engine_that_does_not_tell_whether_it_idles_is_sent_nothing(key: str, how: str) -> None:
    with FakeVllm() as vllm:
        if how == "hidden":
            vllm.hidden.add(key)
        else:
            vllm.counters.set(key, float("nan"))
        with pytest.raises(CollectError, match="does not tell whether it is idle"):
            probed(vllm)
        assert vllm.completions == []


def test_an_engine_that_gets_busy_between_two_prompts_is_waited_for() -> None:
    def leave_behind(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        pages = 0

        def busy_for_five(vllm: FakeVllm) -> None:
            nonlocal pages
            pages += 1
            vllm.counters.set(RUNNING, 1 if 2 <= pages <= 6 else 0)

        vllm.before_page = busy_for_five  # the first page confirms the prompt
        return vllm.serve(connection, sent)

    with FakeVllm(leave_behind) as vllm:
        result = probed(vllm)
        assert len(vllm.completions) == 7
    assert len(result.probes) == 6
    assert result.discarded == 0


def test_an_engine_that_stays_busy_ends_the_run_with_what_was_measured() -> None:
    def last(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        pages = 0

        def busy_from_the_second_page(vllm: FakeVllm) -> None:
            nonlocal pages
            pages += 1
            vllm.counters.set(RUNNING, 3 if pages > 1 else 0)

        vllm.before_page = busy_from_the_second_page
        return vllm.serve(connection, sent)

    with FakeVllm(FakeVllm.serve, FakeVllm.serve, last) as vllm:
        result = probed(vllm)
        assert sent_lengths(vllm) == [WARM_UP, 600, 1200]
    assert [probe.prompt_tokens for probe in result.probes] == [600, 1200]
    assert result.stopped == "the engine is not idle: 3 requests run and 0 wait"


def moved(key: str) -> Act:
    """Serve the prompt, and move another counter beside it by one."""

    def act(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        vllm.add(key, 1)
        return vllm.serve(connection, sent)

    return act


def miscounting(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
    """Count the prompt as it is, and tell its client of a token more."""
    prompt = len(sent.json["prompt"])
    vllm.count(prompt)
    reply(connection, TOKEN, usage(prompt + 1), DONE)
    return True


def prefill_of(seconds: float) -> Act:
    return counted(seconds=seconds)


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (beside(100), "other requests came meanwhile"),
        (counted(cached=512), "a part of it came from a cache"),
        (counted(told=512), "a part of it came from a cache"),
        (moved(FIRST_TOKENS), "other requests came meanwhile"),
        (moved(FINISHED), "other requests came meanwhile"),
        (miscounting, "the engine did not count 600 prompt tokens"),
        (counted(more=1), "the engine did not count 600 prompt tokens"),
        (stream(TOKEN, usage(600), DONE), "the page did not count it: it may be another engine's"),
        (prefill_of(60.0), "the engine's prefill time is longer than the whole answer took"),
        (prefill_of(-0.5), "the engine's prefill time is longer than the whole answer took"),
    ],
)
def test_a_prompt_that_its_counters_do_not_confirm_is_thrown_away_and_sent_again(act: Act, fault: str) -> None:
    with FakeVllm(FakeVllm.serve, act) as vllm:
        vllm.add(PREFILL, 1)
        result = probed(vllm)
        assert sent_lengths(vllm) == [WARM_UP, 600, 600, 1200, 2400, 600, 1200, 2400]
    assert result.discarded == 1
    assert len(result.probes) == 6
    assert not result.stopped
    # the same over and over: five are sent again, in all
    with FakeVllm(FakeVllm.serve, FakeVllm.serve, *[act] * 9) as vllm:
        vllm.add(PREFILL, 10)
        with closing(Engine(f"{vllm.url}/metrics")) as engine:
            clock = Clock()
            result = measure(engine, TINY, (600,), clock=clock, sleep=clock.sleep)
        assert sent_lengths(vllm) == [600] * 8
    assert [probe.prompt_tokens for probe in result.probes] == [600]
    assert result.stopped == f"6 prompts were disturbed, the last since {fault}"


def test_a_request_that_is_still_there_after_a_prompt_has_disturbed_it() -> None:
    def joined(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        vllm.counters.set(RUNNING, 1)
        return vllm.serve(connection, sent)

    with FakeVllm(FakeVllm.serve, joined) as vllm:
        pages = 0

        def leaves(vllm: FakeVllm) -> None:
            nonlocal pages
            pages += 1
            if pages > 100:  # 3 s of a look every 50 ms, and some more
                vllm.counters.set(RUNNING, 0)

        vllm.before_page = leaves
        result = probed(vllm)
    assert result.discarded == 1
    assert len(result.probes) == 6


def test_nothing_measured_for_being_disturbed_is_an_error() -> None:
    with FakeVllm(*[beside(100)] * 9) as vllm:
        with pytest.raises(CollectError, match="6 prompts were disturbed"):
            probed(vllm)
        assert len(vllm.completions) == 6


def test_an_engine_that_restarts_ends_the_run() -> None:
    def restart(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        first = vllm.counters.value(FIRST_TOKENS)
        vllm.counters.begin_anew(vllm.counters.value(START) + 60)
        vllm.counters.set(FIRST_TOKENS, first)  # others were quick to use the new one
        return vllm.serve(connection, sent)

    with FakeVllm(FakeVllm.serve, FakeVllm.serve, restart) as vllm:
        result = probed(vllm)
    assert [probe.prompt_tokens for probe in result.probes] == [600]
    assert result.stopped == "the engine was restarted"


def test_counters_that_fall_without_a_new_start_are_a_restart_too() -> None:
    def fall(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        for key in (FIRST_TOKENS, FINISHED, PROMPT, COMPUTED, PREFILL):
            vllm.counters.set(key, 0)
        reply(connection, TOKEN, usage(len(sent.json["prompt"])), DONE)
        return True

    with FakeVllm(FakeVllm.serve, FakeVllm.serve, fall) as vllm:
        assert probed(vllm).stopped == "the engine was restarted"


def test_an_error_after_the_first_probe_leaves_what_was_measured() -> None:
    with FakeVllm(
        FakeVllm.serve, FakeVllm.serve, refuse("500 Internal Server Error", '{"error":{"message":"out of memory"}}')
    ) as vllm:
        result = probed(vllm)
        assert len(vllm.completions) == 3
        assert result.stopped == f"{vllm.origin} refuses with HTTP 500: out of memory"
    assert [probe.prompt_tokens for probe in result.probes] == [600]


def test_an_error_before_it_is_raised() -> None:
    with FakeVllm(refuse("500 Internal Server Error", "")) as vllm, pytest.raises(CollectError, match="HTTP 500"):
        probed(vllm)


def test_no_prompt_is_begun_that_would_not_end_in_time() -> None:
    waits = threading.Event()

    def slow(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        waits.wait(0.4)  # 1 ms for 3 tokens: 2,400 would take 0.8 s, and half as much is kept in hand
        return vllm.serve(connection, sent)

    with FakeVllm(FakeVllm.serve, FakeVllm.serve, slow) as vllm:
        result = probed(vllm, seconds_max=2.1)  # one of them goes by to see that nobody else comes
        assert sent_lengths(vllm) == [WARM_UP, 600, 1200]
    assert [probe.prompt_tokens for probe in result.probes] == [600, 1200]
    assert result.stopped == "time is up: a prompt of 2,400 tokens would take too long"


def test_a_prompt_that_hangs_is_given_up_and_the_engine_left() -> None:
    with FakeVllm(FakeVllm.serve, FakeVllm.serve, hang) as vllm:
        result = probed(vllm, seconds_max=2.0)  # as above
        assert vllm.hung_up.wait(10)
        assert result.stopped.endswith("/v1/completions took longer than 1 s")
    assert len(result.probes) == 1


def test_ctrl_c_hangs_up_on_the_engine() -> None:
    def interrupt(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        return hang(vllm, connection, sent)

    with FakeVllm(FakeVllm.serve, interrupt) as vllm:
        with pytest.raises(KeyboardInterrupt):
            probed(vllm)
        assert vllm.hung_up.wait(10)
        assert len(vllm.completions) == 2


# probes that a log holds


def request(
    at: int, prompt: int, cached: int | None = 0, ttft: float | None = 1.0, outer: int | None = None
) -> Request:
    return Request(1_700_000_000.0 + at, prompt, cached, ttft, outer)


def test_the_requests_with_most_computed_tokens_are_facts_and_others_evenly_by_rank() -> None:
    requests = [request(at, 100 + at) for at in range(9)]  # ranks by computed tokens: 108 is the first
    chosen = passive_probes(requests, most=2, spread=3)
    # ranks 0 and 1, and 0, 4 and 8 of the nine; given by time
    assert [one.prompt_tokens for one in chosen] == [100, 104, 107, 108]


def test_a_few_requests_are_all_facts_each_of_them_once() -> None:
    requests = [request(at, 100) for at in range(5)]
    assert passive_probes(requests) == tuple(requests)
    assert passive_probes([]) == ()


def test_of_many_requests_sixty_and_sixty_are_facts() -> None:
    # ranks 0..59, and of 10,000 every 169.5th: only the rank 0 is in both
    assert len(passive_probes([request(at, 100 + at) for at in range(10_000)])) == 119


def test_a_request_is_no_fact_without_its_cached_tokens_or_its_time_to_first_token() -> None:
    assert passive_probes([request(0, 100, cached=None), request(1, 100, ttft=None)]) == ()


def test_a_request_that_was_a_quarter_cached_is_no_fact_where_nobody_knows_from_where() -> None:
    kept, left = request(0, 400, cached=99), request(1, 400, cached=100)
    assert passive_probes([kept, left]) == (kept,)


def test_a_request_whose_cached_tokens_are_known_to_be_the_engine_s_own_is_a_fact() -> None:
    kept, left = request(0, 400, cached=390, outer=0), request(1, 400, cached=90, outer=1)
    assert passive_probes([kept, left]) == (kept,)


def test_a_request_that_the_engine_may_have_preempted_is_no_fact() -> None:
    requests = [request(at, 100) for at in (0, 2, 4, 6, 8)]  # each until its first token a second later
    base = 1_700_000_000.0
    # spans that overlap count together; one that begins as the first token comes does not count
    spans = [(base + 9, base + 20), (base + 2.5, base + 2.6), (base + 1.5, base + 4.5)]
    assert passive_probes(requests, preempted=spans) == (requests[0], requests[3], requests[4])
