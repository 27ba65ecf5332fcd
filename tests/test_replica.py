from __future__ import annotations

import pytest

from kvtally.agent.replica import About, Describer
from kvtally.collectors.base import Reading

H100 = "NVIDIA H100 80GB HBM3"
L40S = "NVIDIA L40S"
FOUR = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")


def engine(name: str = "host:8000/0", **attributes: str) -> Reading:
    return Reading("engine", name, attributes, ())


def gpu(uuid: str, sku: str | None = H100) -> Reading:
    return Reading("gpu", uuid, {} if sku is None else {"sku": sku}, ())


def described(about: About, *names: str) -> dict[str, dict[str, str]]:
    """The attributes of engines whose readings came in one scrape."""
    describer = Describer({"host:8000": about}, About(mapping="nobody knows this engine"))
    return {one.name: dict(one.attributes) for one in describer([engine(name) for name in names])}


def test_an_engine_carries_what_is_known_of_it_beside_what_its_page_says() -> None:
    about = About(
        ("GPU-a",),
        None,
        "config",
        H100,
        "owned",
        "dc-1",
        {"tenant": "blue"},
        dram_gib="64.000000000",
        storage_tib="1.5",
    )
    describer = Describer({"host:8000": about}, About())
    reading = engine(model="llama", version="0.25.1")
    (one,) = describer([reading])
    assert one.attributes == {
        "model": "llama",
        "version": "0.25.1",
        "gpus": "GPU-a",
        "mapping": "config",
        "sku": H100,
        "term": "owned",
        "site": "dc-1",
        "tenant": "blue",
        "dram_gib": "64.000000000",
        "storage_tib": "1.5",
    }
    assert one._replace(attributes=reading.attributes) == reading
    assert reading.attributes == {"model": "llama", "version": "0.25.1"}


@pytest.mark.parametrize(
    ("about", "role"),
    [
        (About(facts={"role": "decode"}), "decode"),
        (About(facts={"role": "decode"}, role="prefill"), "prefill"),
        (About(facts={"role": "decode"}, role="both"), "both"),
        (About(), None),
    ],
)
def test_the_role_that_is_named_goes_before_that_of_the_command_line(about: About, role: str | None) -> None:
    (one,) = described(about, "host:8000/0").values()
    assert one.get("role") == role


@pytest.mark.parametrize(
    ("about", "engine_type", "role"),
    [
        (About(), "prefill", "prefill"),
        (About(), "decode", "decode"),
        (About(facts={"role": "decode"}), "prefill", "decode"),
        (About(role="both"), "decode", "both"),
        (About(), "unified", None),
        (About(), "trtllm", None),
    ],
)
def test_where_nothing_else_tells_the_role_the_page_does(about: About, engine_type: str, role: str | None) -> None:
    (one,) = Describer({"host:8000": about}, About())([engine(engine_type=engine_type)])
    assert one.attributes.get("role") == role


def test_an_engine_carries_the_group_that_it_costs_together_with() -> None:
    (one,) = described(About(role="prefill", group="pair-1"), "host:8000/0").values()
    assert (one["role"], one["group"]) == ("prefill", "pair-1")


def test_an_engine_carries_how_it_is_run_and_every_rank_of_it_the_same() -> None:
    facts = {"shape": '{"num_hidden_layers":32}', "token_budget": "8192", "term": "none of theirs"}
    about = About(("GPU-a", "GPU-b"), 1, "config", facts=facts)
    found = described(about, "host:8000/0", "host:8000/1")
    added = {"shape": '{"num_hidden_layers":32}', "token_budget": "8192", "term": "on-demand", "mapping": "config"}
    assert found == {"host:8000/0": {**added, "gpus": "GPU-a"}, "host:8000/1": {**added, "gpus": "GPU-b"}}


def test_an_engine_that_comes_back_with_other_options_is_described_anew() -> None:
    describer = Describer({"host:8000": About(gpus=(), facts={"eager": "1"})}, About())
    reading = engine()
    assert describer([reading])[0].attributes["eager"] == "1"
    describer.learn({"host:8000": About(gpus=())})
    assert "eager" not in describer([reading])[0].attributes


def test_what_is_not_known_is_left_out() -> None:
    assert described(About(mapping="no evidence"), "host:8000/0") == {
        "host:8000/0": {"term": "on-demand", "mapping": "no evidence"}
    }


def test_an_engine_without_a_gpu_says_so_and_differs_from_one_whose_gpus_are_unknown() -> None:
    assert described(About(gpus=()), "host:8000/0")["host:8000/0"] == {"gpus": "", "term": "on-demand"}


def test_an_engine_that_nobody_knows_gets_the_default() -> None:
    assert described(About(("GPU-a",)), "other:8000/0")["other:8000/0"] == {
        "term": "on-demand",
        "mapping": "nobody knows this engine",
    }


def test_other_readings_stay_as_they_are_and_in_their_order() -> None:
    describer = Describer({}, About(("GPU-a",)))
    readings = [gpu("GPU-a"), Reading("cache", "host:8000/lmcache", {"cache": "lmcache"}, ()), engine()]
    found = describer(readings)
    assert found[:2] == readings[:2]
    assert [one.kind for one in found] == ["gpu", "cache", "engine"]


def test_the_product_of_its_gpus_comes_from_the_driver() -> None:
    describer = Describer({"host:8000": About(("GPU-b", "GPU-a"))}, About())
    reading = engine()
    assert "sku" not in describer([reading])[0].attributes
    describer([gpu("GPU-z", L40S), gpu("GPU-b", None)])
    assert "sku" not in describer([reading])[0].attributes
    describer([gpu("GPU-a")])
    assert describer([reading])[0].attributes["sku"] == H100
    describer([gpu("GPU-b", L40S)])
    assert describer([reading])[0].attributes["sku"] == L40S


def test_a_product_that_the_mapping_names_goes_before_the_drivers() -> None:
    describer = Describer({"host:8000": About(("GPU-a",), sku=L40S)}, About())
    describer([gpu("GPU-a")])
    assert describer([engine()])[0].attributes["sku"] == L40S


@pytest.mark.parametrize(
    ("gpus", "per_replica", "ranks", "shares"),
    [
        # tensor parallel over all of them
        (FOUR, None, ["0"], ["GPU-a,GPU-b,GPU-c,GPU-d"]),
        (FOUR, 4, ["0"], ["GPU-a,GPU-b,GPU-c,GPU-d"]),
        # data parallel behind one address
        (FOUR, 2, ["0", "1"], ["GPU-a,GPU-b", "GPU-c,GPU-d"]),
        (FOUR, 1, ["0", "1", "2", "3"], list(FOUR)),
        (FOUR, 2, ["1/llama", "0/llama"], ["GPU-c,GPU-d", "GPU-a,GPU-b"]),
        # one rank behind its own address, which names its own GPUs
        (FOUR[:2], 2, ["1"], ["GPU-a,GPU-b"]),
        (FOUR[:2], None, ["1"], ["GPU-a,GPU-b"]),
        # the first rank of several, whose others are not on this page
        (FOUR, 2, ["0"], ["GPU-a,GPU-b"]),
        # more ranks than GPUs, an odd GPU, a rank without a number
        (FOUR, 2, ["2", "0"], [None, "GPU-a,GPU-b"]),
        (FOUR[:3], 2, ["0", "1"], ["GPU-a,GPU-b", None]),
        (FOUR, 2, ["prefill"], [None]),
        # several ranks and nobody says how many GPUs each has: not all of them for everyone
        (FOUR, None, ["0", "1"], [None, None]),
        ((), None, ["0", "1"], ["", ""]),
        (None, None, ["0", "1"], [None, None]),
    ],
)
def test_every_rank_holds_its_own_gpus(
    gpus: tuple[str, ...] | None, per_replica: int | None, ranks: list[str], shares: list[str | None]
) -> None:
    found = described(About(gpus, per_replica), *(f"host:8000/{rank}" for rank in ranks))
    assert [found[f"host:8000/{rank}"].get("gpus") for rank in ranks] == shares


def test_ranks_that_cannot_be_told_apart_say_why() -> None:
    found = described(About(FOUR, None, "config"), "host:8000/0", "host:8000/1")
    assert found["host:8000/0"]["mapping"] == "2 ranks answer for 4 GPUs: say gpus_per_replica"
    found = described(About(FOUR, 3, "config"), "host:8000/1")
    assert found["host:8000/1"]["mapping"] == "rank 1 with 3 GPUs is beyond the 4 that are named"
    assert described(About(FOUR, 2, "config"), "host:8000/1")["host:8000/1"]["mapping"] == "config"


def test_ranks_of_other_addresses_do_not_count() -> None:
    describer = Describer({"host:8000": About(("GPU-a",)), "host:8001": About(("GPU-b",))}, About())
    found = describer([engine("host:8000/0"), engine("host:8001/1")])
    assert [one.attributes["gpus"] for one in found] == ["GPU-a", "GPU-b"]


def test_a_second_rank_that_appears_later_ends_a_mapping_that_held_for_one() -> None:
    describer = Describer({"host:8000": About(("GPU-a",))}, About())
    first, second = engine("host:8000/0"), engine("host:8000/1")
    assert describer([first])[0].attributes["gpus"] == "GPU-a"
    assert [one.attributes.get("gpus") for one in describer([first, second])] == [None, None]
    assert describer([first])[0].attributes["gpus"] == "GPU-a"


def test_a_later_discovery_is_learned_and_what_it_does_not_name_stays() -> None:
    describer = Describer({"host:8000": About(("GPU-a",))}, About(mapping="default"))
    first, second = engine("host:8000/0"), engine("host:8001/0")
    assert [one.attributes["mapping"] for one in describer([second])] == ["default"]
    describer.learn({"host:8001": About(("GPU-b",), mapping="NVML")})
    found = describer([first, second])
    assert [one.attributes["gpus"] for one in found] == ["GPU-a", "GPU-b"]
    assert found[1].attributes["mapping"] == "NVML"


def test_while_nothing_changes_the_attributes_are_one_object() -> None:
    describer = Describer({"host:8000": About(("GPU-a",))}, About())
    describer([gpu("GPU-a")])
    reading = engine(version="0.25.1")
    (first,), (again,) = describer([reading]), describer([reading._replace(values=(1.0,))])
    assert first.attributes is again.attributes
    describer([gpu("GPU-a")])
    describer.learn({"host:8000": About(("GPU-a",))})
    assert describer([reading])[0].attributes is first.attributes
    (other,) = describer([engine(version="0.26.0")])
    assert other.attributes["version"] == "0.26.0"


def instance(uuid: str, share: str, profile: str = "1g.10gb") -> Reading:
    attributes = {"sku": f"{H100} MIG {profile}", "mig": "1", "parent": "GPU-a", "share": share}
    return Reading("gpu", uuid, attributes, ())


def test_a_mig_instance_brings_its_share_and_the_whole_of_it_is_another_product() -> None:
    describer = Describer({"host:8000": About(("MIG-one",), None, "config")}, About())
    *_, one = describer([instance("MIG-one", "1/7"), engine()])
    assert (one.attributes["gpus"], one.attributes["sku"]) == ("MIG-one", f"{H100} MIG 1g.10gb")
    assert one.attributes["slices"] == "1/7"
    # the GPU was cut anew
    *_, one = describer([instance("MIG-one", "2/15"), engine()])
    assert one.attributes["slices"] == "2/15"


def test_several_instances_add_up_and_one_that_is_not_seen_leaves_the_sum_unknown() -> None:
    describer = Describer({"host:8000": About(("MIG-one", "MIG-two"), None, "config")}, About())
    *_, one = describer([instance("MIG-one", "1/7"), engine()])
    assert "slices" not in one.attributes
    *_, one = describer([instance("MIG-two", "1/2"), engine()])
    assert one.attributes["slices"] == "9/14"


def test_a_gpu_that_is_cut_is_held_by_nobody_as_a_whole() -> None:
    describer = Describer({"host:8000": About(("GPU-a",), None, "config")}, About())
    whole = Reading("gpu", "GPU-a", {"sku": H100, "mig": "1", "share": "6/7"}, ())
    *_, one = describer([whole, engine()])
    assert "gpus" not in one.attributes
    assert one.attributes["mapping"] == "GPU-a is cut into MIG instances: name the one that it holds, MIG-…"
    *_, one = describer([whole._replace(attributes={"sku": H100, "mig": "0"}), engine()])
    assert (one.attributes["gpus"], one.attributes["mapping"]) == ("GPU-a", "config")


def test_gpus_of_replicas_that_answer_as_the_same_rank_are_told_by_nothing() -> None:
    about = About(gpus=("GPU-a", "GPU-b"), per_replica=1, mapping="config")
    names = ("host:8000/0/x2kq8", "host:8000/0/z9")
    for one in described(about, *names).values():
        assert "gpus" not in one
        assert one["mapping"] == "2 engines of one page answer as rank 0: nothing tells which of its GPUs each has"
    (alone,) = described(about._replace(gpus=("GPU-a",)), names[0]).values()
    assert alone["gpus"] == "GPU-a"


def test_a_page_with_ever_new_models_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtally.agent.replica._NAMES_MAX", 10)
    describer = Describer({}, About())
    for number in range(50):
        readings = [Reading("engine", f"a:1/m{number}/0", {}, ()), Reading("gpu", f"GPU-{number}", {"sku": "H100"}, ())]
        assert len(describer(readings)) == 2
        assert max(len(kept) for kept in (describer._made, describer._skus, describer._slices)) <= 10


def test_engines_of_ever_new_names_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtally.agent.replica._ENGINES_MAX", 10)
    describer = Describer({}, About())
    for number in range(50):
        describer.learn({f"10.0.0.{number}:8000": About(role="decode"), "stays:1": About(role="prefill")})
        assert len(describer._engines) <= 12
    (reading,) = describer([Reading("engine", "stays:1/0", {}, ())])
    assert reading.attributes["role"] == "prefill"
