"""Words that are keys of answers, of columns and of tables alike, each in the order in which it is shown."""

from __future__ import annotations

TIERS = ("hbm", "dram", "disk", "p2p", "external")  # external: outside HBM, and nobody tells where
OUTER = TIERS[1:]
TOLD_APART = TIERS[1:4]  # outer tiers that an engine or its cache may tell apart
PARTS = ("prefill", "decode", "stall", "store")  # of occupied time
OVERHEADS = ("idle", "asleep", "warm_up", "unallocated")
RESOURCES = ("gpu", "server", "energy", "dram", "storage", "network", "platform", "unused_commitment")
RUNGS = ("M0", "M1", "M2", "M3", "M4", "M5")  # of the method, the one with the least evidence first (METHOD 4.1)
REFUSED = ("insufficient_data", "unreconciled")  # statuses without a figure
