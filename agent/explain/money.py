"""From engine-seconds to money: the prices of the time, what holding costs, and how much of it was cash."""

from __future__ import annotations

import math
from functools import reduce
from typing import TYPE_CHECKING, Any

from kvtally.agent.explain.arithmetic import Worked
from kvtally.agent.price import HOUR_NS, NANO, UNITS, rate_text
from kvtally.agent.savings import bound_shares, sampling
from kvtally.agent.savings_money import HOLDING, TIME_RESOURCES, rate_of, weight_of
from kvtally.agent.worth import added

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.facts import Facts
    from kvtally.agent.price import Rate
    from kvtally.agent.savings import Estimate, Part
    from kvtally.agent.savings_money import Money
    from kvtally.agent.savings_report import Group

MOST_RATES = 8  # that are told one by one
_UNIT_PLACES, _RATE_PLACES = 9, 12
MEANING = (
    "Avoided compute is the price of GPU time the reused tokens would have taken. It becomes cash only if capacity was "
    "short or was released: realised counts the net of the time in which requests waited for capacity, and holding "
    "whole."
)


def money_json(group: Group, currency: str, seconds: Worked, parts: Sequence[Part]) -> dict[str, Any] | None:
    """The group's money, each line from printed ones; None where a price is missing.

    `seconds` has W, its costs and the tiers with their intervals, `parts` what they are made of.
    """
    money = group.money
    if money is None:
        return None
    lines = Worked(seconds.printed())
    prices = _rate(lines, group, currency, money)
    places = _places(money)
    about = {"unit": currency, "basis": "ASSUMED" if any(rate.basis == "ASSUMED" for rate in prices) else "MODELLED"}
    lines.result("gross", "what the avoided seconds cost", "W * rate", places, **about)
    _reach(lines, "gross", "gross", "W", places, unit=currency)
    if money.net is not None:
        lines.result("stall_paid", "loading", "stall * rate", places, **about)
        lines.result("store_paid", "storing", "store * rate", places, **about)
    held = _held(lines, group.facts, currency, places)
    if money.net is not None:
        lines.result("net_paid", "net", "gross - stall_paid - store_paid - holding", places, **about)
        _reach(lines, "net_paid", "net", "net", places, unit=currency)
    _tiers(lines, money, places, about)
    _realised(lines, group, parts, places, about)
    return {
        "rows": lines.as_json(),
        "prices": [rate_text(rate) for rate in prices],
        "holding": held,
        "capacity_bound_share": None if group.seconds is None else group.seconds.capacity_bound_share,
        "meaning": MEANING,
    }


def _reach(lines: Worked, name: str, words: str, of: str, places: int, *, unit: str) -> None:
    """From where to where an amount goes, by the seconds `of` around theirs; nothing where these have no interval."""
    if f"{of}_low" in lines.printed():
        lines.result(f"{name}_low", f"{words}, from", f"{name} - ({of} - {of}_low) * rate", places, unit=unit)
        lines.result(f"{name}_high", f"{words}, to", f"{name} + ({of}_high - {of}) * rate", places, unit=unit)


def _tiers(lines: Worked, money: Money, places: int, about: dict[str, str]) -> None:
    """The net of each tier, where there are several, from where to where."""
    for name, tier in money.tiers.items() if len(money.tiers) > 1 else ():
        if tier.net is None:
            continue
        held = ""
        if tier.holding:
            lines.given(f"held_{name}", f"of holding, for {name}", tier.holding / NANO, places, unit=about["unit"])
            held = f" - held_{name}"
        symbols = (
            ("W_hbm", "W_hbm_low", "W_hbm_high") if name == "hbm" else (f"net_{name}", f"low_{name}", f"high_{name}")
        )
        net, low, high = (symbol if symbol in lines.printed() else "" for symbol in symbols)
        if not net and not held:
            continue
        lines.result(f"paid_{name}", f"{name}: net", f"{net} * rate{held}" if net else f"0{held}", places, **about)
        if low and high:
            down, up = f"paid_{name} - ({net} - {low}) * rate", f"paid_{name} + ({high} - {net}) * rate"
            lines.result(f"least_{name}", f"{name}: net, from", down, places, unit=about["unit"])
            lines.result(f"most_{name}", f"{name}: net, to", up, places, unit=about["unit"])


def _places(money: Money) -> int:
    """Decimal places that show six digits of the gross amount, nine at most."""
    gross = abs(money.gross.point) / NANO or money.holding / NANO
    return max(2, min(9, 5 - math.floor(math.log10(gross)))) if gross else 9


def _rate(lines: Worked, group: Group, currency: str, money: Money) -> list[Rate]:
    """What an engine-second costs: what was paid for the time over the time, by price. Gives the prices."""
    used: dict[Rate, int] = {}
    for one in group.facts:
        for line in one.lines or ():
            if line.resource in TIME_RESOURCES:
                used[line.rate] = used.get(line.rate, 0) + line.quantity
    prices = [rate for rate in used if rate.price_nano]
    rates = _weights(group)
    if len(rates) == 1 and len(prices) <= MOST_RATES:
        _spent(lines, used, prices, currency)
        length = sum(sum(one.state_ns.values()) for one in group.facts) / NANO
        lines.given("time", "engine time in the window, idle or not", length, 3, unit="s", basis="MEASURED")
        lines.result("rate", "an engine-second", "spent / time", _RATE_PLACES, unit=f"{currency}/s")
    elif len(rates) <= MOST_RATES:
        _mean(lines, rates, currency)
    else:
        words = f"an engine-second: the mean of {len(rates)} rates, weighted by the seconds avoided at each"
        lines.given("rate", words, float(money.rate_nano) / NANO, _RATE_PLACES, unit=f"{currency}/s")
    return prices or list(used)


def _weights(group: Group) -> dict[float, float]:
    """Seconds avoided at each rate, per second; rates that differ by rounding alone are one."""
    avoided = {(one.hour_ns, one.target_id): max(weight_of(one.worth), 0.0) for one in group.values}
    weights: dict[float, float] = {}
    for one in group.facts:
        rate = rate_of(one)
        if rate is not None and one.replica is not None:
            near = float(f"{float(rate) / NANO:.6g}")
            place = (one.period_ns - one.period_ns % HOUR_NS, one.replica.target_id)
            weights[near] = weights.get(near, 0.0) + avoided.get(place, 0.0)
    return weights


def _mean(lines: Worked, rates: dict[float, float], currency: str) -> None:
    """The mean over replicas and hours that cost differently."""
    sums: tuple[list[str], list[str]] = ([], [])
    for number, (rate, seconds) in enumerate(rates.items(), 1):
        lines.given(f"rate_{number}", "an engine-second of some", rate, _RATE_PLACES, unit=f"{currency}/s")
        weight = seconds if sum(rates.values()) else 1.0
        lines.given(f"W_{number}", "avoided at that rate", weight, 4, unit="s", basis="MODELLED")
        sums[0].append(f"rate_{number} * W_{number}")
        sums[1].append(f"W_{number}")
    formula = f"({' + '.join(sums[0])}) / ({' + '.join(sums[1])})"
    lines.result("rate", "an engine-second: their mean", formula, _RATE_PLACES, unit=f"{currency}/s")


def _spent(lines: Worked, used: dict[Rate, int], prices: Sequence[Rate], currency: str) -> None:
    """Units that were held over time, times their prices."""
    names = []
    for number, rate in enumerate(prices, 1):
        hours = UNITS[rate.resource][rate.unit]
        units = used[rate] / HOUR_NS / float(hours or 1)
        held = " ".join(part for part in (rate.resource, rate.sku, rate.site, rate.term) if part)
        lines.given(f"held_{number}", held, units, _UNIT_PLACES, unit=f"{rate.unit}s", basis="MEASURED")
        price = {"unit": f"{currency}/{rate.unit}", "basis": rate.basis, "source": rate.source}
        lines.given(f"price_{number}", "its price", rate.price_nano / NANO, _UNIT_PLACES, **price)
        names.append(f"held_{number} * price_{number}")
    if names:
        lines.result("spent", "paid for the engine time", " + ".join(names), _UNIT_PLACES, unit=currency)
    else:
        lines.given("spent", "paid for the engine time: every price is 0", 0.0, _UNIT_PLACES, unit=currency)


def _held(lines: Worked, facts: Sequence[Facts], currency: str, places: int) -> list[dict[str, str]]:
    """What holding KV cost, a line for each price; those of 0 are named."""
    amounts: dict[Rate, int] = {}
    for one in facts:
        for line in one.lines or ():
            if line.resource in HOLDING:
                amounts[line.rate] = amounts.get(line.rate, 0) + line.amount_nano
    names = []
    for number, (rate, amount) in enumerate((item for item in amounts.items() if item[0].price_nano), 1):
        words = f"holding {HOLDING[rate.resource]}: {rate_text(rate)}"
        lines.given(f"held_kv_{number}", words, amount / NANO, places, unit=currency, basis=rate.basis)
        names.append(f"held_kv_{number}")
    if names:
        lines.result("holding", "holding KV, hits or not", " + ".join(names), places, unit=currency)
    else:
        words = (
            "holding KV: no price, or inside the server's"
            if amounts
            else "holding KV: no kv_dram_gib or kv_storage_tib is told"
        )
        lines.given("holding", words, 0.0, places, unit=currency, basis="ASSUMED")
    return [{"price": rate_text(rate), "amount_nano": str(amount)} for rate, amount in amounts.items()]


def _realised(lines: Worked, group: Group, parts: Sequence[Part], places: int, about: dict[str, str]) -> None:
    """Of the net, what fell into time of short capacity."""
    seconds = group.seconds
    if seconds is None or seconds.net is None or seconds.bound is None or seconds.capacity_bound_share is None:
        return
    source = 'vllm:num_requests_waiting_by_reason{reason="capacity"} > 0'
    words = "share of the time in which requests waited for capacity, as scrapes sample it"
    lines.given("s_bound", words, seconds.capacity_bound_share, 4, basis="MEASURED", source=source)
    _bound(lines, seconds.bound, seconds.net, parts)
    lines.result("realised", "cash", "net_bound * rate - holding", places, **about)
    _reach(lines, "realised", "cash", "net_bound", places, unit=about["unit"])


def _bound(lines: Worked, bound: Estimate, net: Estimate, parts: Sequence[Part]) -> None:
    """Of the net seconds, those in time of short capacity, with their interval."""
    words, about = "of the net seconds, those of the intervals in that time", {"unit": "s", "basis": "MODELLED"}
    told = [name for name in ("W", "stall", "store") if f"{name}_low" in lines.printed()]
    if not told:
        lines.given("net_bound", words, bound.point, 4, **about)
        return
    total = reduce(added, (part.worth for part in parts))
    downs, ups, terms = [], [], []
    for name, sign, share in zip(("W", "stall", "store"), ("", " - ", " - "), bound_shares(total), strict=True):
        if name in told and (share or name == told[0]):
            lines.given(f"k_{name}", f"share of {name} in that time", share, 7, basis="MODELLED")
            terms.append(f"{sign}k_{name} * {name}")
            ends = (f"({name} - {name}_low)", f"({name}_high - {name})")
            downs.append(f"(k_{name} * {ends[name != 'W']})^2")
            ups.append(f"(k_{name} * {ends[name == 'W']})^2")
    sum_of = "".join(terms if "W" in told else ("0", *terms))
    lines.result("net_bound", words, f"min({sum_of}, net)" if net.point >= 0 else sum_of, 4, **about)
    less, more = sampling(total, net)
    lines.given("less", "of it, by as much less, since scrapes only sample who waits", less, 4, **about)
    lines.given("more", "by as much more", more, 4, **about)
    low, high = (f"sqrt({' + '.join(part)})" for part in ([*downs, "less^2"], [*ups, "more^2"]))
    low, high = f"net_bound - {low}", f"net_bound + {high}"
    if net.point >= 0:  # no more than all of it, be it a gain or a loss; that fewer waited makes no gain a loss
        low = f"max({low}, min(net_bound - sqrt({' + '.join(downs)}), 0))"
        high = f"max(net_bound, min({high}, net_high))"
    else:
        low = f"min(net_bound, max({low}, net_low))"
    lines.result("net_bound_low", "from", low, 4, unit="s")
    lines.result("net_bound_high", "to", high, 4, unit="s")
