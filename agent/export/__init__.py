"""What leaves the ledger for the systems that people already run.

figures         what /metrics and OTLP carry at one instant, in the names of `metrics` (counters: `counters`)
prometheus      figures as the pages that Prometheus reads
otlp            figures pushed to an OpenTelemetry backend, as the `otlp_environment` says, by an `otlp_exporter` that
                tells what is answered to it (`otlp_http`, `otlp_grpc`); what was `last_sent` is kept for deltas
opencost        some of them under OpenCost's names
focus           charges as rows of a FOCUS dataset with the columns of `focus_columns`
tables          the ledger's own rows for a warehouse
openmetrics     the counters as they were, to be backfilled
rows, parquet   typed rows as text and as Parquet
"""
