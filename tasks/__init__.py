"""What the pipeline does: one folder per stage, plus what the stages share."""
