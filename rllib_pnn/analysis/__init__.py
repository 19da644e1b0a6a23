"""What a run learned and where: transfer, AFS, APS, plots, the report. Reads files, never a live algorithm."""
