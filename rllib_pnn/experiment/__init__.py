"""From a YAML file to a run folder: validation and Ray Tune."""
