"""The dashboard from top to bottom."""

from __future__ import annotations

from deploy.grafana.money import BY_KVTALLY, COST, SAVINGS, WHERE_IT_GOES
from deploy.grafana.work import GPUS, HEALTH, REUSE, STORAGE

ROWS = (COST, WHERE_IT_GOES, REUSE, SAVINGS, BY_KVTALLY, GPUS, STORAGE, HEALTH)
