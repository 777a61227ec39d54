"""From params.yaml to finished runs: planned, checked, named by their fingerprints, trained, kept."""
