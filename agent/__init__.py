"""The program: intervals, rates, costing, ledger, daemon, command line."""
