"""The report: one self-contained HTML file with all images and figures of a run."""
