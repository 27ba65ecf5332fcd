"""What `kvtally model` answers, as plain values.

report       curves, break-even bandwidths, reuses that pay, and claims
deployment   the replicas of a ledger that are asked about: their law, their price
measured     the ledger's own points beside what the law says of them
what_if      a store that is not there, under the reuse that was seen

Only the first is loaded where no ledger is asked about.
"""

from __future__ import annotations

from kvtally.agent.model_report.report import Input, Question, model_report, points

__all__ = ["Input", "Question", "model_report", "points"]
