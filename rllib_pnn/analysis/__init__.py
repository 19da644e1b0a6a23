"""What a run learned and where: transfer scores, AFS, APS, plots, the report. Reads files, never a live algorithm."""
