"""Money and rates: ledger, spending cap, rate limits, cost estimates."""
