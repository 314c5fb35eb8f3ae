"""Experiment configurations, one file each: `layercomb train NAME`."""
