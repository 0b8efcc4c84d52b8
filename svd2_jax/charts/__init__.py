"""Charts as PNG files: what all of them share, and the chart of a live run."""
