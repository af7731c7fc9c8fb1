"""Cost control: ledger, spending cap, rate limits, cost estimates."""
