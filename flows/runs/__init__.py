"""What one flow run needs and leaves: its context, record, log and artifacts."""
