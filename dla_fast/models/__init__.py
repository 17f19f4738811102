"""The Deep Layer Aggregation networks."""
