"""Commands that check and clean up."""
