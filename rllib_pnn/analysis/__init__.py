"""What a run learned and where: transfer scores, AFS, APS, plots and the report. Reads files, never a live algorithm."""
